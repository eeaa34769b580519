//! What an install keeps on disk: the journal of the one under way, what is installed, and what
//! clamd refused.
//!
//! Each is one JSON file in the state directory, replaced as a whole and durable before anything is
//! done that it speaks of. A file that cannot be read is taken as absent, with a warning: what it
//! said is then found out again from the database directory, by hash.

use std::sync::Arc;

use clamcast_proto::dsse::{Envelope, Verified};
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::{ClamdReport, FileState, InstallNumber, Outcome};
use clamcast_proto::{DatabaseName, Digest, Position};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::disk::{At, Dir, HostFault, RECORD_MODE, Tree};
use crate::chain;

/// Largest record that is read, in bytes. A journal holds two manifests, the files of both sets, and
/// lists of names: less than 24 MB where both have [`clamcast_proto::manifest::FILES_MAX`] files with the
/// longest names.
const RECORD_BYTES_MAX: u64 = 32 << 20;

/// Refused generations that are remembered. A master offers the newest one only, so that an older
/// refusal is never asked for again.
const REFUSALS_MAX: usize = 16;

const JOURNAL: &str = "journal.json";
/// The record of an [`Installed`] in the state directory.
pub const INSTALLED: &str = "installed.json";
const REFUSED: &str = "refused.json";

/// A manifest with the envelope it came in. Cheap to clone.
///
/// It is kept in files that only the agent writes, and was verified before: a key that has been
/// rotated since must not make a host forget what it has.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(into = "Envelope", try_from = "Envelope")]
pub struct Set {
    /// The manifest.
    pub manifest: Arc<Manifest>,
    /// As it was signed.
    pub envelope: Arc<Envelope>,
    sha256: Digest,
}

impl Set {
    /// SHA-256 of the manifest's payload: its name.
    pub fn sha256(&self) -> Digest {
        self.sha256
    }

    /// Its files, as they should be on disk.
    pub fn files(&self) -> Vec<FileState> {
        self.manifest.files.iter().map(FileState::from).collect()
    }
}

impl From<&Verified<Manifest>> for Set {
    fn from(manifest: &Verified<Manifest>) -> Self {
        Self {
            manifest: Arc::new(Manifest::clone(manifest)),
            envelope: Arc::new(manifest.envelope().clone()),
            sha256: manifest.payload_sha256(),
        }
    }
}

impl From<Set> for Envelope {
    fn from(set: Set) -> Self {
        Arc::unwrap_or_clone(set.envelope)
    }
}

impl TryFrom<Envelope> for Set {
    type Error = String;

    fn try_from(envelope: Envelope) -> Result<Self, String> {
        let manifest = envelope.peek().map_err(|error| chain(&error))?;
        let sha256 = Digest::of(&envelope.payload);
        Ok(Self {
            manifest: Arc::new(manifest),
            envelope: Arc::new(envelope),
            sha256,
        })
    }
}

/// What is installed.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Installed {
    /// The generation.
    pub set: Set,
    /// Number of the install.
    pub install: InstallNumber,
    /// What came of it: `live`; `installed`; `refused` where clamd cannot use it and there was
    /// nothing to go back to.
    pub outcome: Outcome,
}

/// The install under way, as the next start finds it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Journal {
    /// The generation that it is about, also on the way back.
    pub set: Set,
    /// Number of the install: what canary and gate say.
    pub install: InstallNumber,
    /// The proof that is being made, 1 or 2.
    pub pass: u8,
    /// How many proofs it takes.
    pub passes: u8,
    /// To the new set or back to the old one.
    pub way: Way,
    /// How far it is.
    pub step: Step,
    /// Whether the database directory may differ from what it was before.
    pub touched: bool,
    /// Whether the set has stood there whole: a fault while it is put there once more is no reason
    /// to take it away where there is no other.
    #[serde(default)]
    pub whole: bool,
    /// Whether clamd has accepted the previous set since it rejected this one: if clamd rejects this
    /// one again, that is evidence against it.
    #[serde(default)]
    pub control: bool,
    /// What shall stand in the directory.
    pub files: Vec<FileState>,
    /// What stood there before.
    pub before: Before,
    /// Files in `adopted/` that no set restores any more.
    #[serde(default)]
    pub obsolete: Vec<PutAside>,
    /// Names that others had put there, to be kept in `adopted/`.
    pub adopt: Vec<DatabaseName>,
    /// The host's own files that come back from `adopted/`, as the set owns their names no more.
    #[serde(default)]
    pub restore: Vec<Moved>,
    /// Names that go before the gate.
    pub withdraw: Vec<DatabaseName>,
    /// Names that go after the proof: an old form that the new one outranks.
    pub later: Vec<DatabaseName>,
}

/// Where an install is going.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// To the new set.
    Forward,
    /// Back to what stood there before.
    Back {
        /// Why.
        cause: Cause,
        /// The number under which the new set was tried.
        tried: InstallNumber,
    },
}

/// Why an install turns back.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// Evidence against the set: the words of clamd or `clamscan`.
    Refused(String),
    /// Only clamd has rejected the set, once: the previous set is the control.
    Doubted(String),
    /// The host's fault: its disk failed in the middle, or nothing can tell why clamd rejects the
    /// set.
    HostFault(String),
}

/// How far an install is.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Files are being renamed.
    Swapping,
    /// Everything is in place, and clamd is made to load it.
    Proving,
    /// Everything is in place, clamd is absent or silent, probing goes on.
    Waiting,
    /// The outcome is decided; what remains is tidying up.
    Settling(Ending),
}

/// What an install came to.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Ending {
    /// The outcome.
    pub outcome: Outcome,
    /// Number of the install that the proof was about.
    pub install: InstallNumber,
    /// The clamd it was made with.
    pub clamd: ClamdReport,
    /// Why it is not live.
    pub error: Option<String>,
}

/// What stood in the directory under the names that an install touches.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Before {
    /// The generation that was installed.
    pub installed: Option<Installed>,
    /// The files as they really were, and a way back for each of them.
    pub files: Vec<FileState>,
    /// Files of others that could not be read: they are kept by their names.
    #[serde(default)]
    pub moved: Vec<Moved>,
    /// Whether there were databases of others, too, which stay where they are.
    #[serde(default)]
    pub others: bool,
}

impl Before {
    /// Whether there was nothing that clamd could have loaded.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty() && self.moved.is_empty() && !self.others
    }

    /// Whether something stood under this name.
    pub fn had(&self, name: &DatabaseName) -> bool {
        self.files.iter().any(|file| file.name == *name)
            || self.moved.iter().any(|moved| moved.name == *name)
    }
}

/// What stood under a name and could not be read: another user's file, a symbolic link, a pipe.
/// clamd may be able to use it all the same. To rename it takes no right to it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Moved {
    /// Where it stood.
    pub name: DatabaseName,
    /// Its name in `adopted/`, from where it comes back.
    pub kept: String,
}

/// A file in `adopted/` that gets a name from which nothing is restored.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct PutAside {
    /// Its name.
    pub kept: String,
    /// The new one.
    pub aside: String,
}

/// A generation with evidence against it, found by `clamscan` or by clamd.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Refusal {
    /// Its position.
    pub position: Position,
    /// Its manifest.
    pub manifest_sha256: Digest,
    /// The number under which it was tried.
    pub install: InstallNumber,
    /// Why.
    pub error: String,
}

/// The records in the state directory.
pub(super) struct Records<'t>(pub(super) &'t Tree);

impl Records<'_> {
    pub(super) fn journal(&self) -> Result<Option<Journal>, HostFault> {
        self.load(JOURNAL)
    }

    pub(super) fn save(&self, journal: &Journal) -> Result<(), HostFault> {
        self.store(JOURNAL, journal)
    }

    pub(super) fn forget(&self) -> Result<(), HostFault> {
        self.0.remove(At(Dir::State, JOURNAL))?;
        self.0.sync_dir(Dir::State)
    }

    pub(super) fn installed(&self) -> Result<Option<Installed>, HostFault> {
        self.load(INSTALLED)
    }

    /// Records what is installed; with `None`, that nothing of ours is.
    pub(super) fn record(&self, installed: Option<&Installed>) -> Result<(), HostFault> {
        match installed {
            Some(installed) => self.store(INSTALLED, installed),
            None => {
                self.0.remove(At(Dir::State, INSTALLED))?;
                self.0.sync_dir(Dir::State)
            }
        }
    }

    pub(super) fn refusals(&self) -> Result<Vec<Refusal>, HostFault> {
        Ok(self.load(REFUSED)?.unwrap_or_default())
    }

    /// Remembers a refusal, the newest last, one for each manifest.
    pub(super) fn remember(&self, refusal: &Refusal) -> Result<(), HostFault> {
        let mut refusals = self.refusals()?;
        refusals.retain(|known| known.manifest_sha256 != refusal.manifest_sha256);
        refusals.push(refusal.clone());
        let surplus = refusals.len().saturating_sub(REFUSALS_MAX);
        refusals.drain(..surplus);
        self.store(REFUSED, &refusals)
    }

    fn store(&self, name: &str, record: &impl Serialize) -> Result<(), HostFault> {
        let bytes = serde_json::to_vec(record).expect("our own records serialise");
        self.0.replace(At(Dir::State, name), &bytes, RECORD_MODE)
    }

    fn load<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, HostFault> {
        let at = At(Dir::State, name);
        let Some(bytes) = self.0.read(at, RECORD_BYTES_MAX)? else {
            return Ok(None);
        };
        match serde_json::from_slice(&bytes) {
            Ok(record) => Ok(Some(record)),
            Err(error) => {
                let path = self.0.path(at);
                tracing::warn!(?path, %error, "cannot read this record, going on without it");
                Ok(None)
            }
        }
    }
}
