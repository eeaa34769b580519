//! Receipts: an agent's signed statement of what came of a generation.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::dsse::Statement;
use crate::manifest::{MANIFEST_BYTES_MAX, Manifest, SignedBy};
use crate::{AgentName, DatabaseName, Digest, Epoch, FleetName, Generation, Position};

/// Longest error text in a receipt, in bytes: clamd's own reason and the chain around it.
pub const ERROR_BYTES_MAX: usize = 4 << 10;

/// Files of others that a receipt lists. More are only counted.
pub const FOREIGN_MAX: usize = 100;

/// Adopted files that a receipt lists. The agent keeps further files without listing them. Only a
/// host that was a mirror before has so many files of its own under names of the fleet.
pub const ADOPTED_MAX: usize = 100;

/// Drifted files that a receipt lists. More are found again by the next look.
pub const DRIFT_MAX: usize = 100;

/// Counts the installs of a host. Install N has a sample of its own, by which clamd proves it.
#[derive(
    Clone, Copy, Debug, Default, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize,
)]
#[serde(transparent)]
pub struct InstallNumber(pub u64);

impl InstallNumber {
    /// Below the first install: nothing was tried.
    pub const NONE: Self = Self(0);

    /// The next one; `None` at the end of the numbers, which no host reaches by its installs.
    pub fn next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }
}

impl fmt::Display for InstallNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What came of a generation on a host. Signed with the key of the agent's certificate.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Receipt {
    /// The fleet.
    pub fleet: FleetName,
    /// Who says so.
    pub agent: AgentName,
    /// Rises by one with every receipt of this agent; acknowledged by it.
    pub seq: u64,
    /// Epoch of the generation.
    pub epoch: Epoch,
    /// The generation.
    pub generation: Generation,
    /// SHA-256 of its manifest's payload.
    pub manifest_sha256: Digest,
    /// The install that the proof was about; [`InstallNumber::NONE`] if there was none.
    pub install: InstallNumber,
    /// What came of it.
    pub outcome: Outcome,
    /// What is on disk now under a database name of the generation.
    pub files: Vec<ReceiptFile>,
    /// Databases in the directory that are not clamcast's, at most [`FOREIGN_MAX`].
    pub foreign: Vec<String>,
    /// The host's own files under names that the fleet publishes, at most [`ADOPTED_MAX`]. The agent
    /// keeps them and restores one when the fleet withdraws its name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adopted: Vec<DatabaseName>,
    /// Files of the installed generation that were found other than published since the last
    /// receipt, at most [`DRIFT_MAX`]. An agent that does not look for drift leaves it out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drift: Vec<Drift>,
    /// The clamd that it was proven with.
    pub clamd: ClamdReport,
    /// Why it is not live, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Seconds from the offer to this outcome.
    pub took: f64,
    /// When.
    pub time: Timestamp,
}

impl Statement for Receipt {
    const TYPE: &'static str = "application/vnd.clamcast.receipt+json";
    const BYTES_MAX: usize = MANIFEST_BYTES_MAX; // it lists the files that a manifest lists
}

impl Receipt {
    /// Whether its texts and lists keep their limits: what an honest agent sends does.
    pub fn is_bounded(&self) -> bool {
        let texts = [&self.error, &self.clamd.version, &self.clamd.note];
        let mut texts = texts.into_iter().flatten();
        self.foreign.len() <= FOREIGN_MAX
            && self.adopted.len() <= ADOPTED_MAX
            && self.drift.len() <= DRIFT_MAX
            && texts.all(|text| text.len() <= ERROR_BYTES_MAX)
    }

    /// The generation it is about.
    pub fn position(&self) -> Position {
        Position {
            epoch: self.epoch,
            generation: self.generation,
        }
    }
}

/// How a generation ended on a host.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// clamd has been seen scanning with it.
    Live,
    /// On disk; clamd is absent or silent. Probing goes on.
    Installed,
    /// There is evidence that clamd cannot use it. The previous set is back.
    Refused,
    /// The host could not take it: disk, rights, space.
    HostFault,
}

impl Outcome {
    /// As it stands in JSON and in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Installed => "installed",
            Self::Refused => "refused",
            Self::HostFault => "host_fault",
        }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// A file as it is on the host's disk.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct FileState {
    /// Its name.
    pub name: DatabaseName,
    /// Its length in bytes.
    pub size: u64,
    /// SHA-256 of what is there.
    pub sha256: Digest,
}

/// A file that a receipt lists.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ReceiptFile {
    /// Its name, length and digest.
    #[serde(flatten)]
    pub file: FileState,
    /// Whose signature the master verified over these bytes, as the manifest has it: absent for a loose
    /// file, and for bytes that are not the generation's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signed_by: Option<SignedBy>,
}

impl ReceiptFile {
    /// A file that was found on disk under a name of a manifest.
    pub fn new(file: FileState, manifest: &Manifest) -> Self {
        let published = manifest.file(&file.name);
        let facts = published
            .filter(|published| published.sha256 == file.sha256)
            .and_then(|published| published.container.as_ref());
        let signed_by = facts.and_then(|facts| facts.signed_by);
        Self { file, signed_by }
    }
}

/// A file of the installed generation that somebody or something has changed.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Drift {
    /// Its name.
    pub name: DatabaseName,
    /// What was found under it.
    pub found: Found,
    /// Whether the published bytes are back.
    pub mended: bool,
}

/// What was found in the place of a published file.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Found {
    /// Nothing.
    Missing,
    /// Other bytes, or something that is not a file.
    Changed,
    /// It cannot be read.
    Unreadable,
}

/// What an agent knows of its clamd.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct ClamdReport {
    /// Whether it answers.
    pub state: ClamdState,
    /// Its answer to VERSION, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// How the last proof was made.
    pub proof: Proof,
    /// What the proof was weakened by, or what is odd, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// Whether clamd is there.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ClamdState {
    /// It answers.
    Up,
    /// Nobody at the socket.
    #[default]
    Down,
    /// Somebody at the socket, without a sensible answer.
    Silent,
    /// This host has none, by configuration.
    None,
}

/// How it is known that clamd scans with a generation.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Proof {
    /// A sample that only this install names was found.
    Canary,
    /// VERSION and the log say so: weaker.
    Version,
    /// Not proven.
    #[default]
    None,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_install_number_is_a_plain_number_on_disk_and_has_a_checked_successor() {
        let seven = InstallNumber(7);
        assert_eq!(serde_json::to_string(&seven).unwrap(), "7");
        assert_eq!(serde_json::from_str::<InstallNumber>("7").unwrap(), seven);
        assert_eq!(seven.to_string(), "7");
        assert_eq!(seven.next(), Some(InstallNumber(8)));
        assert_eq!(InstallNumber(u64::MAX).next(), None);
    }
}
