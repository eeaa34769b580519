//! What an install does to its host, step by step: each step succeeds or fails as a whole.
//!
//! [`HostStorage`] carries the steps out in the database directory and the state directory. A
//! simulation has a [`Storage`] of its own, on which everything above runs as it is.

use std::collections::HashSet;
use std::future::Future;
use std::path::PathBuf;

use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::FileState;
use clamcast_proto::wire::NeedFile;
use clamcast_proto::{DatabaseName, Digest};
use tokio_util::sync::CancellationToken;

use super::disk::{Dir, HostFault, Tree};
use super::journal::{Before, Installed, Journal, Records, Refusal, Set};
use super::look::{Baseline, Comparison, Depth, Sighting};
use super::machine::Action;
use super::others::Other;
use super::receipt::FileCheck;
use super::stage::{Known, Receiving, Stage};
use super::survey::{Numbers, Planner, Seen};
use super::swap::Swap;
use crate::clamd::proof::Nonce;
use crate::host::updater::Updater;

/// A step of an install failed, perhaps halfway.
#[derive(Debug)]
pub struct StepFault {
    /// What stands in the way.
    pub fault: HostFault,
    /// Whether the database directory may have been changed.
    pub touched: bool,
}

impl From<HostFault> for StepFault {
    /// Nothing was changed yet, or the journal knows that something was.
    fn from(fault: HostFault) -> Self {
        Self {
            fault,
            touched: false,
        }
    }
}

/// The disk of a host, as an install uses it. Everything but [`Storage::blocking`] blocks.
pub trait Storage: Send + Sync + 'static {
    /// Runs work on the disk where it keeps no other task waiting.
    fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> impl Future<Output = T> + Send;

    /// The journal of an install that has not ended.
    fn journal(&self) -> Result<Option<Journal>, HostFault>;

    /// What is installed.
    fn installed(&self) -> Result<Option<Installed>, HostFault>;

    /// Why this manifest was refused, if it was.
    fn refusal(&self, manifest_sha256: &Digest) -> Option<Refusal>;

    /// Opens the database directory anew if another one has taken its place.
    fn check_in_place(&self) -> Result<(), HostFault>;

    /// Reads files anew from now on, whatever is known of them.
    fn forget_digests(&self);

    /// What canary and gate say.
    fn numbers(&self) -> Result<Numbers, HostFault>;

    /// Stages what is on the host of a generation, and returns what is missing.
    fn stage(
        &self,
        manifest: &Manifest,
        installed: Option<&Manifest>,
        full: bool,
    ) -> Result<Vec<NeedFile>, HostFault>;

    /// Stages a file if the host has it; whether it is staged then.
    fn ensure_staged(&self, file: &FileState) -> Result<bool, HostFault>;

    /// Reads the facts that the plan of an install needs. Its set is staged.
    fn see(&self, planner: &Planner<'_>) -> Result<Seen, HostFault>;

    /// Carries out an action of the machine that concerns the disk.
    fn perform(&self, action: &Action) -> Result<(), StepFault>;

    /// The files of others that clamd meets beside a journal's set.
    fn others(&self, journal: &Journal) -> Result<Vec<Other>, HostFault>;

    /// Makes the directory for a load test of a journal's set.
    fn make_trial(&self, journal: &Journal, others: &[Other]) -> Result<(), HostFault>;

    /// Makes the directory for a load test of what stood there before.
    fn make_control(&self, before: &Before, others: &[Other]) -> Result<(), HostFault>;

    /// Reads every byte of a file that should stand in `dir`.
    fn check(&self, dir: Dir, expected: FileState) -> FileCheck;

    /// What is on disk under the names of a set.
    fn files(&self, set: &Set) -> Vec<FileState>;

    /// Databases in the directory that are none of `ours`, bounded as a receipt is.
    fn foreign(&self, ours: &HashSet<&str>) -> Result<Vec<String>, HostFault>;

    /// The host's own files that are kept while the set owns their names.
    fn adopted(&self, manifest: &Manifest) -> Result<Vec<DatabaseName>, HostFault>;

    /// Compares the directory with the installed set, its canary and its gate: every file that is
    /// wrong; `None` if `stop` fired meanwhile. `old_forms`: names that may stand beside the set until
    /// clamd was seen with it.
    fn compare(
        &self,
        installed: &Installed,
        old_forms: &[DatabaseName],
        depth: Depth,
        stop: &CancellationToken,
    ) -> Option<Vec<Sighting>>;

    /// The updater of somebody else that is at work on the database directory.
    fn updater(&self) -> Option<Updater>;

    /// The path of a directory, for other programs.
    fn directory(&self, dir: Dir) -> PathBuf;
}

/// The host's own disk.
pub struct HostStorage {
    pub(super) tree: Tree,
    pub(super) nonce: Nonce,
    pub(super) known: Known,
    pub(super) receiving: Receiving,
    pub(super) baseline: Baseline,
}

impl HostStorage {
    /// Works on what `tree` has open, with the host's nonce.
    pub(super) fn new(tree: Tree, nonce: Nonce) -> Self {
        Self {
            tree,
            nonce,
            known: Known::default(),
            receiving: Receiving::default(),
            baseline: Baseline::default(),
        }
    }

    pub(super) fn staging(&self) -> Stage<'_> {
        Stage {
            tree: &self.tree,
            known: &self.known,
            receiving: &self.receiving,
        }
    }

    fn swap(&self) -> Swap<'_> {
        Swap {
            tree: &self.tree,
            stage: self.staging(),
            nonce: &self.nonce,
        }
    }
}

impl Storage for HostStorage {
    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        match tokio::task::spawn_blocking(work).await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => std::future::pending().await, // the runtime is going down
            },
        }
    }

    fn journal(&self) -> Result<Option<Journal>, HostFault> {
        Records(&self.tree).journal()
    }

    fn installed(&self) -> Result<Option<Installed>, HostFault> {
        Records(&self.tree).installed()
    }

    fn refusal(&self, manifest_sha256: &Digest) -> Option<Refusal> {
        let refusals = Records(&self.tree).refusals().unwrap_or_default();
        let mut refusals = refusals.into_iter();
        refusals.find(|refusal| refusal.manifest_sha256 == *manifest_sha256)
    }

    fn check_in_place(&self) -> Result<(), HostFault> {
        self.tree.check_in_place()
    }

    fn forget_digests(&self) {
        self.known.clear();
    }

    fn numbers(&self) -> Result<Numbers, HostFault> {
        self.swap().numbers()
    }

    fn stage(
        &self,
        manifest: &Manifest,
        installed: Option<&Manifest>,
        full: bool,
    ) -> Result<Vec<NeedFile>, HostFault> {
        self.swap().clean_trial()?;
        self.staging().plan(manifest, installed, full)
    }

    fn ensure_staged(&self, file: &FileState) -> Result<bool, HostFault> {
        self.staging().ensure(file)
    }

    fn see(&self, planner: &Planner<'_>) -> Result<Seen, HostFault> {
        self.swap().see(planner)
    }

    fn perform(&self, action: &Action) -> Result<(), StepFault> {
        let records = Records(&self.tree);
        match action {
            Action::Save(journal) => records.save(journal)?,
            Action::Swap(journal) => self.swap().perform(journal)?,
            Action::Place(journal) => self.swap().place_only(journal)?,
            Action::Renumber(install) => self.swap().renumber(*install)?,
            Action::RemoveLater(journal) => self.swap().remove_later(journal)?,
            Action::Record(installed) => records.record(installed.as_deref())?,
            Action::Remember(refusal) => records.remember(refusal)?,
            Action::Forget => records.forget()?,
            Action::Clean => self.swap().clean()?,
            Action::TrySave(_) | Action::Prove(_) | Action::Again(_) | Action::Finish(_) => {
                unreachable!("these are no steps on the disk")
            }
        }
        Ok(())
    }

    fn others(&self, journal: &Journal) -> Result<Vec<Other>, HostFault> {
        self.swap().others(journal)
    }

    fn make_trial(&self, journal: &Journal, others: &[Other]) -> Result<(), HostFault> {
        self.swap().make_trial(journal, others)
    }

    fn make_control(&self, before: &Before, others: &[Other]) -> Result<(), HostFault> {
        self.swap().make_control(before, others)
    }

    fn check(&self, dir: Dir, expected: FileState) -> FileCheck {
        FileCheck::read(&self.tree, dir, expected)
    }

    fn files(&self, set: &Set) -> Vec<FileState> {
        self.swap().files_on_disk(set, &self.baseline)
    }

    fn foreign(&self, ours: &HashSet<&str>) -> Result<Vec<String>, HostFault> {
        self.swap().foreign(ours)
    }

    fn adopted(&self, manifest: &Manifest) -> Result<Vec<DatabaseName>, HostFault> {
        self.swap().adopted(manifest)
    }

    fn compare(
        &self,
        installed: &Installed,
        old_forms: &[DatabaseName],
        depth: Depth,
        stop: &CancellationToken,
    ) -> Option<Vec<Sighting>> {
        Comparison {
            tree: &self.tree,
            baseline: &self.baseline,
            depth,
            stop,
        }
        .make(installed, &self.nonce, old_forms)
    }

    fn updater(&self) -> Option<Updater> {
        Updater::find(&self.directory(Dir::Databases))
    }

    fn directory(&self, dir: Dir) -> PathBuf {
        self.tree.directory(dir)
    }
}
