//! Receipts: an agent's signed statement of what came of a generation.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::dsse::Statement;
use crate::manifest::{
    FILES_MAX, MANIFEST_BYTES_MAX, Manifest, ManifestFile, SignedBy, content_digest,
};
use crate::{AgentName, DatabaseName, Digest, Epoch, FleetName, Generation, Position};

/// Longest error text in a receipt, in bytes: clamd's own reason and the chain around it.
pub const ERROR_BYTES_MAX: usize = 4 << 10;

/// Files of others that a receipt lists. More are only counted.
pub const FOREIGN_MAX: usize = 100;

/// Adopted files that a receipt lists. The agent keeps further files without listing them. Only a
/// host that was a mirror before has so many files of its own under names of the fleet.
pub const ADOPTED_MAX: usize = 100;

/// Files that a receipt or a Hello lists of those that are not as the manifest has them, and as many names
/// under which there is nothing. More are counted, and the content digest covers them.
pub const DEVIATIONS_MAX: usize = 256;

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
    /// [`content_digest`] of what is on disk now under the database names of the generation. An agent
    /// leaves it out where the master does not announce [`crate::wire::Feature::ShortReceipts`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Digest>,
    /// With `content`: the files on disk that are not the manifest's, at most [`DEVIATIONS_MAX`].
    /// Without it: every file that is on disk now under a database name of the generation.
    pub files: Vec<ReceiptFile>,
    /// With `content`: names of the generation under which no file can be read, at most
    /// [`DEVIATIONS_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<DatabaseName>,
    /// With `content`: deviations that neither `files` nor `missing` has room for.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unlisted: u64,
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
    /// The file of the generation that `clamscan` or clamd named as the cause of a refusal, if it named
    /// one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blamed: Option<DatabaseName>,
    /// Seconds from the offer to this outcome.
    pub took: f64,
    /// When.
    pub time: Timestamp,
}

impl Statement for Receipt {
    const TYPE: &'static str = "application/vnd.clamcast.receipt+json";
    const BYTES_MAX: usize = MANIFEST_BYTES_MAX; // without `content`, it lists what a manifest lists
}

impl Receipt {
    /// Whether its texts and lists keep their limits: what an honest agent sends does.
    pub fn is_bounded(&self) -> bool {
        let texts = [&self.error, &self.clamd.version, &self.clamd.note];
        let mut texts = texts.into_iter().flatten();
        let files_max = match self.content {
            Some(_) => DEVIATIONS_MAX,
            None => FILES_MAX,
        };
        self.files.len() <= files_max
            && self.missing.len() <= DEVIATIONS_MAX
            && self.foreign.len() <= FOREIGN_MAX
            && self.adopted.len() <= ADOPTED_MAX
            && self.drift.len() <= DRIFT_MAX
            && texts.all(|text| text.len() <= ERROR_BYTES_MAX)
    }

    /// Whether what was found on disk is the manifest's set, which the receipt is about.
    pub fn is_intact(&self, manifest: &Manifest) -> bool {
        if let Some(content) = self.content {
            let deviates = !self.files.is_empty() || !self.missing.is_empty() || self.unlisted > 0;
            return content == manifest.content && !deviates;
        }
        let found = self.files.iter().map(|it| (&it.file.name, &it.file.sha256));
        let found: HashMap<_, _> = found.collect();
        let mut wanted = manifest.files.iter();
        wanted.all(|wanted| found.get(&wanted.name) == Some(&&wanted.sha256))
    }

    /// Every file that was on disk under a name of the manifest, which the receipt is about. `None` where
    /// more files deviated than the receipt lists, or the list is not that of the content digest.
    pub fn on_disk(&self, manifest: &Manifest) -> Option<Vec<FileState>> {
        let listed = self.files.iter().map(|it| it.file.clone());
        let Some(content) = self.content else {
            return Some(listed.collect());
        };
        let mut found: BTreeMap<_, _> = manifest
            .files
            .iter()
            .map(|file| (file.name.clone(), FileState::from(file)))
            .collect();
        found.extend(listed.map(|file| (file.name.clone(), file)));
        for name in &self.missing {
            found.remove(name);
        }
        let found: Vec<_> = found.into_values().collect();
        (self.unlisted == 0 && content_of(&found) == content).then_some(found)
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

impl From<&ManifestFile> for FileState {
    /// The file as it is published.
    fn from(file: &ManifestFile) -> Self {
        Self {
            name: file.name.clone(),
            size: file.size,
            sha256: file.sha256,
        }
    }
}

/// [`content_digest`] of files that were found.
fn content_of(files: &[FileState]) -> Digest {
    content_digest(files.iter().map(|it| (&it.name, it.size, &it.sha256)))
}

/// What is on a host's disk under the names of a manifest, as its difference from the manifest.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Contents {
    /// [`content_digest`] of everything that was found.
    pub content: Digest,
    /// Files that are not the manifest's, at most [`DEVIATIONS_MAX`].
    pub files: Vec<FileState>,
    /// Names under which no file can be read, at most [`DEVIATIONS_MAX`].
    pub missing: Vec<DatabaseName>,
    /// Deviations that neither of the lists has room for.
    pub unlisted: u64,
}

impl Contents {
    /// Compares the files that were found under names of a manifest with it.
    pub fn of(manifest: &Manifest, found: &[FileState]) -> Self {
        let by_name: HashMap<_, _> = found.iter().map(|file| (&file.name, file)).collect();
        let (mut files, mut missing, mut unlisted) = (Vec::new(), Vec::new(), 0);
        for published in &manifest.files {
            match by_name.get(&published.name) {
                Some(file) if **file == FileState::from(published) => {}
                Some(file) if files.len() < DEVIATIONS_MAX => files.push((*file).clone()),
                None if missing.len() < DEVIATIONS_MAX => missing.push(published.name.clone()),
                Some(_) | None => unlisted += 1,
            }
        }
        Self {
            content: content_of(found),
            files,
            missing,
            unlisted,
        }
    }
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_zero(number: &u64) -> bool {
    *number == 0
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
    use crate::manifest::tests::manifest;

    fn state(name: &str, content: &str) -> FileState {
        FileState {
            name: name.parse().unwrap(),
            size: content.len() as u64,
            sha256: Digest::of(content.as_bytes()),
        }
    }

    fn receipt(manifest: &Manifest, found: &[FileState], is_short: bool) -> Receipt {
        let contents = Contents::of(manifest, found);
        let files = match is_short {
            true => contents.files,
            false => found.to_vec(),
        };
        Receipt {
            fleet: manifest.fleet.clone(),
            agent: "web1".parse().unwrap(),
            seq: 1,
            epoch: manifest.epoch,
            generation: manifest.generation,
            manifest_sha256: Digest::of(b""),
            install: InstallNumber(1),
            outcome: Outcome::Live,
            content: is_short.then_some(contents.content),
            blamed: None,
            files: files
                .into_iter()
                .map(|file| ReceiptFile::new(file, manifest))
                .collect(),
            missing: contents.missing,
            unlisted: contents.unlisted,
            foreign: vec![],
            adopted: vec![],
            drift: vec![],
            clamd: ClamdReport::default(),
            error: None,
            took: 0.0,
            time: Timestamp::UNIX_EPOCH,
        }
    }

    #[test]
    fn a_short_receipt_says_which_bytes_the_host_had() {
        let manifest = manifest(1, 1, &["a.ndb=1", "b.ndb=2", "c.ndb=3"]);
        let [a, b, c] = [("a.ndb", "1"), ("b.ndb", "2"), ("c.ndb", "3")].map(|(n, t)| state(n, t));
        let whole = receipt(&manifest, &[a.clone(), b.clone(), c.clone()], true);
        assert!(whole.is_intact(&manifest) && whole.files.is_empty());
        assert_eq!(whole.content, Some(manifest.content));
        let all = vec![a.clone(), b, c];
        assert_eq!(whole.on_disk(&manifest), Some(all));

        let found = vec![a, state("b.ndb", "other")];
        let damaged = receipt(&manifest, &found, true);
        assert!(!damaged.is_intact(&manifest));
        assert_eq!((damaged.files.len(), damaged.missing.len()), (1, 1));
        assert_eq!(damaged.on_disk(&manifest), Some(found));
        let mut lie = damaged;
        lie.content = Some(manifest.content);
        assert!(!lie.is_intact(&manifest) && lie.on_disk(&manifest).is_none());
    }

    #[test]
    fn the_whole_list_of_an_earlier_agent_is_compared_file_by_file() {
        let manifest = manifest(1, 1, &["a.ndb=1", "b.ndb=2"]);
        let whole = receipt(
            &manifest,
            &[state("a.ndb", "1"), state("b.ndb", "2")],
            false,
        );
        assert!(whole.is_intact(&manifest));
        let part = receipt(&manifest, &[state("a.ndb", "1")], false);
        assert!(!part.is_intact(&manifest));
        let json = serde_json::to_value(&whole).unwrap();
        for field in ["content", "missing", "unlisted"] {
            assert!(json.get(field).is_none(), "{field}");
        }
        assert_eq!(serde_json::from_value::<Receipt>(json).unwrap(), whole);
    }

    #[test]
    fn more_deviations_than_a_receipt_lists_are_counted() {
        let names: Vec<_> = (0..2 * DEVIATIONS_MAX + 7)
            .map(|number| format!("{number:04}.ndb=x"))
            .collect();
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        let manifest = manifest(1, 1, &names);
        let nothing = receipt(&manifest, &[], true);
        assert_eq!(nothing.missing.len(), DEVIATIONS_MAX);
        assert_eq!(nothing.unlisted, DEVIATIONS_MAX as u64 + 7);
        assert!(nothing.is_bounded() && !nothing.is_intact(&manifest));
        assert_eq!(nothing.on_disk(&manifest), None);
        let mut long = nothing;
        long.missing.push("more.ndb".parse().unwrap());
        assert!(!long.is_bounded());
    }

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
