//! Puts a generation on disk so that clamd has either the old set or the new one, whatever happens.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clamcast_proto::dsse::{Envelope, Verified};
use clamcast_proto::manifest::{Manifest, ManifestFile};
use clamcast_proto::receipt::{ClamdReport, FileState, Outcome};
use clamcast_proto::wire::{NeedFile, Part, Phase};
use clamcast_proto::{DatabaseName, Digest};
use tokio_util::sync::CancellationToken;

/// A manifest with the envelope it came in. It is kept in files that only the agent writes, and was
/// verified before; a key that has been rotated since must not make a host forget what it has.
#[derive(Clone, Debug)]
pub struct Set {
    /// The manifest.
    pub manifest: Manifest,
    /// As it was signed.
    pub envelope: Envelope,
}

/// What is installed.
#[derive(Clone, Debug)]
pub struct Installed {
    /// The generation.
    pub set: Set,
    /// Number of the install.
    pub install: u64,
    /// What came of it: `live` or `installed`.
    pub outcome: Outcome,
}

/// How an install ended: what a receipt says.
#[derive(Clone, Debug)]
pub struct Completed {
    /// The generation it is about.
    pub set: Set,
    /// What came of it.
    pub outcome: Outcome,
    /// Number of the install that the proof was about.
    pub install: u64,
    /// What is on disk now under a name of the generation.
    pub files: Vec<FileState>,
    /// Databases in the directory that are not ours.
    pub foreign: Vec<String>,
    /// The clamd it was proven with.
    pub clamd: ClamdReport,
    /// Why it is not live.
    pub error: Option<String>,
}

/// One database of the installed generation, compared with the disk.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FileCheck {
    /// Its name.
    pub name: DatabaseName,
    /// What the manifest says.
    pub expected: (u64, Digest),
    /// What is there; an error text if it cannot be read.
    pub found: Result<Option<FileState>, String>,
}

/// What clamd says to an install.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// Seen scanning with it.
    Live(ClamdReport),
    /// Evidence that it cannot use the set.
    Refused {
        /// clamd's own words.
        reason: String,
        /// What is known of clamd.
        report: ClamdReport,
    },
    /// Silent, or the deadline passed.
    Unproven(ClamdReport),
    /// Not there.
    Absent(ClamdReport),
}

/// Where verdicts come from: `clamd::Prover`, or a fake one in tests.
pub trait Prove: Send + Sync + 'static {
    /// A place in clamd's log.
    type Mark: Send + Sync;
    /// Where clamd's log ends now: after the renames, before the first RELOAD.
    fn mark(&self) -> Self::Mark;
    /// Reloads until clamd is seen with install `n`, or until there is evidence that it cannot.
    fn prove(
        &self,
        n: u64,
        mark: Self::Mark,
        stop: CancellationToken,
    ) -> impl Future<Output = Verdict> + Send;
    /// One look, without a reload.
    fn probe(&self, n: u64) -> impl Future<Output = Verdict> + Send;
    /// Loads a directory with `clamscan`; its own reason if that fails. Only asked where a failed
    /// load would kill clamd; passes where there is no `clamscan`.
    fn load_test(&self, directory: &Path) -> impl Future<Output = Result<(), String>> + Send;
    /// What is known of clamd without asking.
    fn report(&self) -> ClamdReport;
}

/// Something of the host's own stood in the way.
#[derive(Debug, thiserror::Error)]
pub enum HostFault {
    /// A call failed.
    #[error("cannot {doing} {path}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// An install is under way; plan again when it has ended.
    #[error("an install is under way")]
    Busy,
}

/// Why a part was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The host's fault: the outcome is `host_fault`.
    #[error("the host cannot take it")]
    Host(#[from] HostFault),
    /// The connection ended early; what came is kept for resuming.
    #[error("the part of {name} ended early")]
    Interrupted {
        /// Which file.
        name: DatabaseName,
        /// Why.
        source: io::Error,
    },
}

/// What the installer works on.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The database directory.
    pub database: PathBuf,
    /// The agent's state directory.
    pub state: PathBuf,
}

/// The installer. Cheap to clone.
#[derive(Debug)]
pub struct Installer<P> {
    prover: Arc<P>,
}

impl<P: Prove> Installer<P> {
    /// Opens the directories and completes, on disk, an install that a crash interrupted: call it
    /// before the network is touched. Blocking.
    pub fn open(settings: Settings, nonce: [u8; 16], prover: P) -> Result<Self, HostFault> {
        let _ = (settings, nonce);
        Ok(Self {
            prover: Arc::new(prover),
        })
    }

    /// Proves and completes what `open` rolled forward, if anything. Async; call it once.
    pub async fn resume(&self, stop: CancellationToken) -> Option<Completed> {
        let _ = (&self.prover, stop);
        unimplemented!()
    }

    /// What is installed.
    pub fn installed(&self) -> Option<Installed> {
        unimplemented!()
    }

    /// The answer to a manifest that clamd refused before: no transfer, no other try. Blocking.
    pub fn refused_before(&self, manifest: &Verified<Manifest>) -> Option<Completed> {
        let _ = manifest;
        unimplemented!()
    }

    /// Stages what is on the host already and returns what must be transferred. Blocking.
    pub fn plan(
        &self,
        manifest: &Verified<Manifest>,
        rehash: bool,
        full: bool,
    ) -> Result<Vec<NeedFile>, HostFault> {
        let _ = (manifest, rehash, full);
        unimplemented!()
    }

    /// Takes a part. Blocking; several at once for different files.
    pub fn receive(
        &self,
        part: &Part,
        file: &ManifestFile,
        bytes: impl io::Read,
    ) -> Result<(), ReceiveError> {
        let _ = (part, file, bytes);
        unimplemented!()
    }

    /// Installs what is staged: swap, reload, prove, roll back on refusal. Async; does its disk work on
    /// the blocking pool. `stop` ends only the waiting for clamd; the disk work is always ended.
    pub async fn install(
        &self,
        manifest: &Verified<Manifest>,
        stop: CancellationToken,
        progress: impl Fn(Phase) + Send + Sync,
    ) -> Completed {
        let _ = (manifest, stop, progress);
        unimplemented!()
    }

    /// For outcome `installed`: one look; `Some` once it is live or refused. Async.
    pub async fn probe_on(&self, stop: CancellationToken) -> Option<Completed> {
        let _ = stop;
        unimplemented!()
    }

    /// Compares the directory with the installed manifest, reading every byte. Blocking.
    pub fn verify(&self) -> Vec<FileCheck> {
        unimplemented!()
    }

    /// Puts the installed generation back from its own copies after drift. `Err`: what the master must
    /// send first. Async.
    pub async fn repair(
        &self,
        stop: CancellationToken,
        progress: impl Fn(Phase) + Send + Sync,
    ) -> Result<Option<Completed>, Vec<NeedFile>> {
        let _ = (stop, progress);
        unimplemented!()
    }

    /// Databases in the directory that are not ours, bounded. Blocking.
    pub fn foreign(&self) -> Vec<String> {
        unimplemented!()
    }
}

/// The host's nonce, made from `random` when there is none yet in the state directory. Blocking.
pub fn nonce(state: &Path, random: [u8; 16]) -> Result<[u8; 16], HostFault> {
    let _ = state;
    Ok(random)
}
