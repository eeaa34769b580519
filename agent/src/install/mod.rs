//! Decides how a set gets on disk so that clamd has the old set or the new one at any moment.
//! Stages, swaps, proves and restores sets, and compares the directory with the installed set.
//! Must not know the master, what is trusted, or who wants an install.
//!
//! [`Installer`] drives it: `plan` stages what is here and says what is missing, `receive` takes
//! the rest, `install` swaps, makes clamd prove it, and turns back where clamd refuses. What to do
//! next is decided by [`machine`]; `stage` and `swap` act through `disk::Tree`, `proving` asks
//! clamd, `receipt` says what came of it. A crash at any moment is ended by the next
//! [`Installer::open`].

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use clamcast_daemon::{durable, input};
use clamcast_proto::dsse::Verified;
use clamcast_proto::manifest::{Manifest, ManifestFile};
use clamcast_proto::receipt::{ClamdReport, InstallNumber, Outcome};
use clamcast_proto::wire::{NeedFile, Part, Phase};
use clamcast_proto::{DatabaseName, Digest};
use tokio::sync::OwnedMutexGuard;
use tokio_util::sync::CancellationToken;

use crate::chain;
use crate::clamd::Verdict;
use crate::clamd::proof::Nonce;

mod adopted;
pub mod disk;
#[cfg(test)]
mod faults;
pub mod journal;
#[cfg(test)]
mod lab;
mod look;
pub mod machine;
mod others;
mod proving;
mod receipt;
mod stage;
pub mod survey;
mod swap;
#[cfg(test)]
mod tests;
pub mod watch;

pub use disk::{HIDDEN, HostFault};
pub use journal::{Installed, Set};
pub use look::{Depth, Look, Sighting};
pub use proving::Prove;
pub use receipt::{Completed, FileCheck};
pub use stage::{ReceiveError, SPACE_RESERVE_BYTES};

use disk::{At, Dir, RECORD_MODE, Tree};
use journal::{Ending, Journal, Records, Refusal, Step};
use look::Baseline;
use machine::{Action, Event, Machine};
pub use others::Blame;
use others::Other;
use proving::Tried;
use stage::{Known, Receiving, Stage};
use survey::Survey;
use swap::{Swap, SwapFault};

/// File in the state directory with the host's nonce, in hexadecimal digits.
const NONCE: &str = "nonce";

/// What an installer works on.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The database directory.
    pub database: PathBuf,
    /// The agent's state directory.
    pub state: PathBuf,
}

/// Longest file of the nonce that is read, in bytes: 32 digits and the end of the line.
const NONCE_BYTES_MAX: u64 = 64;

/// The host's nonce, made of `random` and kept in the state directory when there is none yet.
/// Blocking.
pub fn nonce(state: &Path, random: [u8; 16]) -> Result<Nonce, HostFault> {
    let path = state.join(NONCE);
    let kept = match input::whole(&path, NONCE_BYTES_MAX) {
        Ok(text) => {
            let mut bytes = [0; 16];
            let whole = hex::decode_to_slice(text.trim_ascii_end(), &mut bytes);
            whole.is_ok().then_some(bytes) // a damaged one is replaced: the next install has a new canary
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => None, // damaged, too
        Err(source) => return Err(disk::io_fault("read", &path, source)),
    };
    if let Some(bytes) = kept {
        return Ok(Nonce(bytes));
    }
    let text = format!("{}\n", hex::encode(random));
    durable::write(&path, text.as_bytes(), RECORD_MODE)
        .map_err(|source| disk::io_fault("write", &path, source))?;
    Ok(Nonce(random))
}

/// Installs generations on this host, one at a time. Clones share everything.
pub struct Installer<P> {
    shared: Arc<Shared<P>>,
}

impl<P> Clone for Installer<P> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

struct Shared<P> {
    tree: Tree,
    nonce: Nonce,
    prover: P,
    /// Held from the look at the directory to the end of an install.
    slot: Arc<tokio::sync::Mutex<()>>,
    machine: Mutex<Machine>,
    installed: Mutex<Option<Installed>>,
    /// The manifest of the last plan, and whether an operator forced it.
    planned: Mutex<Option<(Digest, bool)>>,
    /// What `open` left for `resume`.
    opened: Mutex<Option<(Set, Next)>>,
    known: Known,
    receiving: Receiving,
    baseline: Baseline,
    /// Files were seen other than installed since the last proof: clamd may have loaded them.
    suspect: Mutex<bool>,
    /// Files of others that were there when clamd loaded nothing for what may be their fault. While
    /// they are the same, another try costs it a load and shows nothing new.
    hindrance: Mutex<Option<Vec<Other>>>,
}

/// Where the blocking part of an install ends.
enum Next {
    Prove(Box<Journal>),
    Finish(Ending),
    Nothing,
}

/// What an install begins with.
enum Prepared {
    Answered(Refusal),
    /// The files are those that are installed: if clamd still has them, only the number moves.
    InPlace(Box<Installed>, Box<Journal>),
    /// Put this set in place. With the number of the installed set, if only signature files differ.
    Go(Box<Journal>, Option<InstallNumber>),
}

impl<P: Prove> Installer<P> {
    /// Opens the directories and ends, on disk, an install that a crash interrupted. Call it before
    /// the network is touched. Where the database directory is missing or cannot be used, looks and
    /// installs report that as a fault of the host until it can be. Blocking.
    ///
    /// # Errors
    ///
    /// If the state directory cannot be used, or another agent works on the database directory.
    pub fn open(settings: &Settings, nonce: Nonce, prover: P) -> Result<Self, HostFault> {
        let tree = Tree::open_or_wait(&settings.database, &settings.state)?;
        Self::with_tree(tree, nonce, prover)
    }

    /// The same in open directories.
    fn with_tree(tree: Tree, nonce: Nonce, prover: P) -> Result<Self, HostFault> {
        let journal = Records(&tree).journal()?;
        let installed = Records(&tree).installed()?;
        let shared = Shared {
            tree,
            nonce,
            prover,
            slot: Arc::default(),
            machine: Mutex::default(),
            installed: Mutex::new(installed),
            planned: Mutex::default(),
            opened: Mutex::default(),
            known: Known::default(),
            receiving: Receiving::default(),
            baseline: Baseline::default(),
            suspect: Mutex::default(),
            hindrance: Mutex::default(),
        };
        if let Some(journal) = journal {
            let set = journal.set.clone();
            tracing::info!(generation = %set.manifest.position(), step = ?journal.step, "ending an interrupted install");
            match shared.resume(journal.clone()) {
                Ok(next) => *lock(&shared.opened) = Some((set, next)),
                Err(fault) => {
                    tracing::error!(
                        error = chain(&fault),
                        "the interrupted install is ended with the next probe or install"
                    );
                    lock(&shared.machine).hold(journal);
                }
            }
        }
        let shared = Arc::new(shared);
        Ok(Self { shared })
    }

    /// Proves and completes what `open` found interrupted, if anything. Call it once, after `open`.
    pub async fn resume(
        &self,
        stop: CancellationToken,
        progress: impl Fn(Phase) + Send + Sync,
    ) -> Option<Completed> {
        let guard = Arc::clone(&self.shared.slot).lock_owned().await;
        let (set, next) = lock(&self.shared.opened).take()?;
        self.complete(guard, set, next, None, stop, &progress).await
    }

    /// What is installed.
    pub fn installed(&self) -> Option<Installed> {
        lock(&self.shared.installed).clone()
    }

    /// The manifest that is installed, unless another set is being put in its place, on the disk or,
    /// where that failed, in the journal.
    pub fn settled(&self) -> Option<Digest> {
        let machine = lock(&self.shared.machine);
        let installed = lock(&self.shared.installed).as_ref()?.set.sha256();
        let journal = machine.journal().map(|journal| journal.set.sha256());
        journal
            .is_none_or(|set| set == installed)
            .then_some(installed)
    }

    /// What is known of clamd without asking, and which files of the installed set it passes over.
    pub fn clamd(&self) -> ClamdReport {
        let report = self.shared.prover.report();
        match lock(&self.shared.installed).as_ref() {
            Some(installed) => self
                .shared
                .with_passed_over(report, &installed.set.manifest),
            None => report,
        }
    }

    /// Compares the directory with the installed set; see [`Depth`] for how thoroughly. It waits for
    /// nobody, and gives way when `stop` fires. Blocking.
    pub fn look(&self, depth: Depth, stop: &CancellationToken) -> Look {
        match self.shared.slot.try_lock() {
            Ok(_guard) => self.shared.look(depth, stop),
            Err(_) => Look::NotNow,
        }
    }

    /// What is going on.
    pub fn phase(&self) -> Phase {
        lock(&self.shared.machine).phase()
    }

    /// Whether the installed set has yet to be seen in clamd: then [`Installer::probe_on`] goes on
    /// asking.
    pub fn waits_for_clamd(&self) -> bool {
        lock(&self.shared.machine).waits_for_clamd()
    }

    /// The answer to a manifest that was refused here before: no transfer, no other try. An offer
    /// that an operator forced need not ask. Blocking.
    pub fn refused_before(&self, manifest: &Verified<Manifest>) -> Option<Completed> {
        let refusal = self.shared.refusal(&manifest.payload_sha256())?;
        Some(self.shared.answer(Set::from(manifest), refusal))
    }

    /// Stages what is on the host, read and hashed anew, and says what must be transferred. `rehash`
    /// (an operator's force) also lets a generation be tried that was refused before; `full` asks
    /// for no deltas. Blocking: it waits for an install under way to end.
    ///
    /// # Errors
    ///
    /// `host_fault`: see [`Installer::host_fault`].
    pub fn plan(
        &self,
        manifest: &Verified<Manifest>,
        rehash: bool,
        full: bool,
    ) -> Result<Vec<NeedFile>, HostFault> {
        let _guard = self.shared.slot.blocking_lock();
        self.shared
            .plan(manifest, manifest.payload_sha256(), rehash, full)
    }

    /// Takes a part of a file that a plan asked for. Blocking; several at once for different files.
    ///
    /// # Errors
    ///
    /// Each says what to do next: resume, ask for the full file, or report a `host_fault`.
    pub fn receive(
        &self,
        part: &Part,
        file: &ManifestFile,
        bytes: impl Read,
    ) -> Result<(), ReceiveError> {
        let installed = self.installed();
        let installed = installed.as_ref().map(|installed| &*installed.set.manifest);
        self.shared.stage().receive(part, file, installed, bytes)?;
        lock(&self.shared.machine).handle(Event::Arrived(file.sha256));
        Ok(())
    }

    /// Installs what is staged: swap, reload, proof, and back on a refusal. Its disk work is done on
    /// the blocking pool and is never broken off; `stop` ends the waiting for clamd, and the next
    /// start goes on with it.
    pub async fn install(
        &self,
        manifest: &Verified<Manifest>,
        stop: CancellationToken,
        progress: impl Fn(Phase) + Send + Sync,
    ) -> Completed {
        let set = Set::from(manifest);
        let guard = Arc::clone(&self.shared.slot).lock_owned().await;
        self.install_set(guard, set, stop, &progress).await
    }

    /// Compares the directory with the installed manifest, reading every byte. Blocking.
    pub fn verify(&self) -> Vec<FileCheck> {
        let Some(installed) = self.installed() else {
            return Vec::new();
        };
        let files = installed.set.files().into_iter();
        files.map(|expected| self.shared.check(expected)).collect()
    }

    /// Puts the installed generation back after drift, from the host's own copies.
    ///
    /// # Errors
    ///
    /// With what the master has to send first; or a `host_fault`.
    pub async fn repair(
        &self,
        stop: CancellationToken,
        progress: impl Fn(Phase) + Send + Sync,
    ) -> Result<Option<Completed>, RepairError> {
        let guard = Arc::clone(&self.shared.slot).lock_owned().await;
        let Some(installed) = self.installed() else {
            return Ok(None);
        };
        let set = installed.set.clone();
        let (guard, planned) = self
            .blocking(guard, move |shared| {
                let set = &installed.set;
                shared.plan(&set.manifest, set.sha256(), true, false)
            })
            .await;
        let needs = planned?;
        if !needs.is_empty() {
            return Err(RepairError::Missing(needs));
        }
        Ok(Some(self.install_set(guard, set, stop, &progress).await))
    }

    /// Databases in the directory that are not ours, bounded as a receipt is. Blocking.
    pub fn foreign(&self) -> Vec<String> {
        self.shared.foreign()
    }

    /// The host's own files that are kept while the installed set owns their names. Blocking.
    pub fn adopted(&self) -> Vec<DatabaseName> {
        self.shared.adopted()
    }

    /// What a receipt says of a generation that this host could not take. Blocking.
    pub fn host_fault(&self, manifest: &Verified<Manifest>, fault: &HostFault) -> Completed {
        let ending = Ending {
            outcome: Outcome::HostFault,
            install: InstallNumber::NONE,
            clamd: self.shared.prover.report(),
            error: Some(chain(fault)),
        };
        self.shared.completed(Set::from(manifest), ending)
    }

    async fn install_set(
        &self,
        guard: OwnedMutexGuard<()>,
        set: Set,
        stop: CancellationToken,
        progress: &(impl Fn(Phase) + Send + Sync),
    ) -> Completed {
        self.shared.prover.begin_install();
        let (about, prepared) = (set.clone(), set.clone());
        let (mut guard, prepared) = self
            .blocking(guard, move |shared| shared.prepare(&prepared))
            .await;
        let fault = |reason| Ending {
            outcome: Outcome::HostFault,
            install: InstallNumber::NONE,
            clamd: self.shared.prover.report(),
            error: Some(reason),
        };
        let mut tried = None;
        let event = match prepared {
            Err(error) => return self.ended(guard, set, fault(chain(&error))).await,
            Ok(Prepared::Answered(refusal)) => {
                let answer = move |shared: &Shared<P>| shared.answer(set, refusal);
                return self.blocking(guard, answer).await.1;
            }
            Ok(Prepared::InPlace(installed, journal)) => {
                match self.shared.prover.probe(installed.install).await {
                    Verdict::Live(report) => Event::Moved(
                        Box::new(Installed {
                            set: set.clone(),
                            ..*installed
                        }),
                        report,
                    ),
                    Verdict::Refused { .. } | Verdict::Unproven(_) | Verdict::Absent(_) => {
                        Event::Begin(journal)
                    }
                }
            }
            Ok(Prepared::Go(journal, resigned)) => {
                let seen = match resigned {
                    Some(install) => self.seen_without_signature_files(install).await,
                    None => None,
                };
                match (seen, resigned) {
                    (Some(clamd), Some(install)) => Event::Resigned(
                        Box::new(Journal {
                            install,
                            ..*journal
                        }),
                        clamd,
                    ),
                    (_, _) => {
                        let begun;
                        (guard, begun) = self.begin(guard, &set, journal, &mut tried).await;
                        match begun {
                            Ok(event) => event,
                            Err(reason) => return self.ended(guard, set, fault(reason)).await,
                        }
                    }
                }
            }
        };
        progress(Phase::Swapping);
        let (guard, next) = self
            .blocking(guard, move |shared| shared.drive(event))
            .await;
        let completed = self.complete(guard, set, next, tried, stop, progress).await;
        completed.unwrap_or_else(|| {
            let ending = Ending {
                outcome: Outcome::Installed,
                install: InstallNumber::NONE,
                clamd: self.shared.prover.report(),
                error: None,
            };
            self.shared.completed(about, ending)
        })
    }

    /// Where clamd stops scanning to reload, loads the set with `clamscan` before anything is touched.
    /// An error is a fault of this host.
    async fn begin(
        &self,
        guard: OwnedMutexGuard<()>,
        set: &Set,
        journal: Box<Journal>,
        tried: &mut Option<Vec<Other>>,
    ) -> (OwnedMutexGuard<()>, Result<Event, String>) {
        if !self.shared.prover.wants_load_test() {
            return (guard, Ok(Event::Begin(journal)));
        }
        let (guard, test) = self.try_out(guard, &journal).await;
        let event = match test {
            Tried::Loads(others) => {
                *tried = Some(others);
                Event::Begin(journal)
            }
            Tried::Alone => Event::Begin(journal),
            Tried::Bad(error) => Event::Unloadable(
                Box::new(Refusal {
                    position: set.manifest.position(),
                    manifest_sha256: set.sha256(),
                    install: InstallNumber::NONE,
                    error,
                }),
                self.shared.prover.report(),
            ),
            Tried::Hindered(reason) => return (guard, Err(reason)),
        };
        (guard, Ok(event))
    }

    /// The clamds of this host, if all of them have install `n` and none reads signature files.
    async fn seen_without_signature_files(&self, n: InstallNumber) -> Option<ClamdReport> {
        let prover = &self.shared.prover;
        match prover.probe(n).await {
            Verdict::Live(clamd) if prover.ignores_signature_files() => Some(clamd),
            Verdict::Live(_)
            | Verdict::Refused { .. }
            | Verdict::Unproven(_)
            | Verdict::Absent(_) => None,
        }
    }

    /// Goes on until there is an ending: between the blocking parts, clamd is asked. `tried`: the
    /// files of others beside which the set was loaded with `clamscan`.
    async fn complete(
        &self,
        mut guard: OwnedMutexGuard<()>,
        set: Set,
        mut next: Next,
        mut tried: Option<Vec<Other>>,
        stop: CancellationToken,
        progress: &(impl Fn(Phase) + Send + Sync),
    ) -> Option<Completed> {
        loop {
            match next {
                Next::Nothing => return None,
                Next::Finish(ending) => return Some(self.ended(guard, set, ending).await),
                Next::Prove(journal) => {
                    let (others, event);
                    (guard, others) = self.others(guard, &journal).await;
                    (guard, event) = self
                        .prove(guard, &journal, others, &mut tried, &stop, progress)
                        .await;
                    if let Event::Judged(Verdict::Refused { .. }, _) = event {
                        progress(Phase::Swapping);
                    }
                    (guard, next) = self
                        .blocking(guard, move |shared| shared.drive(event))
                        .await;
                }
            }
        }
    }

    async fn ended(&self, guard: OwnedMutexGuard<()>, set: Set, ending: Ending) -> Completed {
        self.blocking(guard, move |shared| shared.completed(set, ending))
            .await
            .1
    }

    /// Runs disk work off the async threads. The guard goes along, so that work whose caller went
    /// away is ended before anything else begins.
    async fn blocking<T: Send + 'static>(
        &self,
        guard: OwnedMutexGuard<()>,
        work: impl FnOnce(&Shared<P>) -> T + Send + 'static,
    ) -> (OwnedMutexGuard<()>, T) {
        let shared = Arc::clone(&self.shared);
        let done = tokio::task::spawn_blocking(move || (guard, work(&shared)));
        match done.await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => std::future::pending().await, // the runtime is going down
            },
        }
    }
}

/// Why drift could not be repaired here.
#[derive(Debug, thiserror::Error)]
pub enum RepairError {
    /// No copy on this host has the right hash.
    #[error("{} of the installed files have no good copy here; the master has to send them", .0.len())]
    Missing(Vec<NeedFile>),
    /// The host.
    #[error("cannot repair the database directory")]
    Host(#[from] HostFault),
}

impl<P: Prove> Shared<P> {
    fn stage(&self) -> Stage<'_> {
        Stage {
            tree: &self.tree,
            known: &self.known,
            receiving: &self.receiving,
        }
    }

    fn swap(&self) -> Swap<'_> {
        Swap {
            tree: &self.tree,
            stage: self.stage(),
            nonce: &self.nonce,
        }
    }

    fn plan(
        &self,
        manifest: &Manifest,
        sha256: Digest,
        rehash: bool,
        full: bool,
    ) -> Result<Vec<NeedFile>, HostFault> {
        self.tree.check_in_place()?;
        self.recover()?;
        self.known.clear();
        self.swap().clean_trial()?;
        let installed = lock(&self.installed).clone();
        let installed = installed.as_ref().map(|installed| &*installed.set.manifest);
        let needs = self.stage().plan(manifest, installed, full)?;
        let missing = needs.iter().filter_map(|need| manifest.file(&need.name));
        let missing = missing.map(|file| file.sha256).collect();
        lock(&self.machine).handle(Event::Planned {
            manifest: sha256,
            missing,
        });
        *lock(&self.planned) = Some((sha256, rehash));
        Ok(needs)
    }

    /// Ends on disk what an earlier install could not: an install begins with a whole set.
    fn recover(&self) -> Result<(), HostFault> {
        let open = lock(&self.machine).journal().cloned();
        match open {
            Some(journal) if journal.step != Step::Waiting => match self.resume(journal)? {
                Next::Finish(Ending {
                    outcome: Outcome::HostFault | Outcome::Refused,
                    error: Some(reason),
                    ..
                }) if self.is_unfinished()? => Err(HostFault::Unfinished { reason }),
                Next::Finish(_) | Next::Prove(_) | Next::Nothing => Ok(()),
            },
            Some(_) | None => Ok(()),
        }
    }

    /// Whether the way back is still to be gone, and can be. Where the old files are lost, in the
    /// directory and in `previous/`, the next install is the way out: it brings a whole set, and
    /// its journal takes the place of this one.
    fn is_unfinished(&self) -> Result<bool, HostFault> {
        let open = lock(&self.machine).journal().cloned();
        let Some(open) = open.filter(|open| open.step == Step::Swapping) else {
            return Ok(false);
        };
        for file in &open.files {
            if !self.stage().ensure(file)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn resume(&self, journal: Journal) -> Result<Next, HostFault> {
        self.known.clear();
        let next = self
            .swap()
            .numbers()?
            .next(Some(&journal), lock(&self.installed).as_ref());
        Ok(self.drive(Event::Resumed {
            journal: Box::new(journal),
            next,
        }))
    }

    fn prepare(&self, set: &Set) -> Result<Prepared, HostFault> {
        let forced = lock(&self.planned).take() == Some((set.sha256(), true));
        if let (false, Some(refusal)) = (forced, self.refusal(&set.sha256())) {
            return Ok(Prepared::Answered(refusal));
        }
        self.tree.check_in_place()?;
        self.recover()?;
        let survey = self.survey(set)?;
        let installed = lock(&self.installed).clone();
        let open = lock(&self.machine).journal().cloned();
        let journal = Box::new(survey.journal);
        let installed = installed.map(Box::new).filter(|installed| {
            open.is_none() && !*lock(&self.suspect) && installed.outcome == Outcome::Live
        });
        Ok(match installed {
            Some(installed)
                if survey.in_place && installed.set.manifest.content == set.manifest.content =>
            {
                Prepared::InPlace(installed, journal)
            }
            Some(installed) if survey.resigned => Prepared::Go(journal, Some(installed.install)),
            Some(_) | None => Prepared::Go(journal, None),
        })
    }

    /// Compares the directory with a set that must be staged.
    fn survey(&self, set: &Set) -> Result<Survey, HostFault> {
        for file in set.files() {
            if !self.stage().ensure(&file)? {
                return Err(HostFault::Unstaged {
                    path: self.tree.path(At(Dir::Databases, file.name.as_str())),
                    digest: file.sha256,
                });
            }
        }
        let installed = lock(&self.installed).clone();
        let open = lock(&self.machine).journal().cloned();
        self.swap().survey(set, installed.as_ref(), open.as_ref())
    }

    /// The journal of a set that is installed once more, after clamd has accepted the previous one.
    fn survey_again(&self, set: &Set) -> Result<Journal, HostFault> {
        self.tree.check_in_place()?;
        let survey = self.survey(set)?;
        Ok(Journal {
            control: true,
            ..survey.journal
        })
    }

    /// Feeds the machine and carries out what it says, up to where clamd has to be asked.
    fn drive(&self, mut event: Event) -> Next {
        loop {
            let actions = lock(&self.machine).handle(event);
            if actions.is_empty() {
                return Next::Nothing;
            }
            event = Event::Done;
            for action in actions {
                if let Action::Again(set) = action {
                    event = match self.survey_again(&set) {
                        Ok(journal) => Event::Begin(Box::new(journal)),
                        Err(fault) => Event::Failed {
                            fault: chain(&fault),
                            touched: false,
                        },
                    };
                    break;
                }
                match self.perform(action) {
                    Ok(None) => {}
                    Ok(Some(next)) => return next,
                    Err(SwapFault { fault, touched }) => {
                        let fault = chain(&fault);
                        tracing::error!(error = fault, "an install met a fault of this host");
                        event = Event::Failed { fault, touched };
                        break;
                    }
                }
            }
        }
    }

    /// `Some`: here the blocking part ends.
    fn perform(&self, action: Action) -> Result<Option<Next>, SwapFault> {
        let records = Records(&self.tree);
        match action {
            Action::Prove(journal) => return Ok(Some(Next::Prove(journal))),
            Action::Finish(ending) => return Ok(Some(Next::Finish(ending))),
            Action::Save(journal) => records.save(&journal)?,
            Action::TrySave(journal) => {
                if let Err(fault) = records.save(&journal) {
                    let error = chain(&fault);
                    tracing::error!(error, "cannot keep the journal, going back without");
                }
            }
            Action::Swap(journal) => self.swap().perform(&journal)?,
            Action::Place(journal) => self.swap().place_only(&journal)?,
            Action::Renumber(install) => self.swap().renumber(install)?,
            Action::RemoveLater(journal) => self.swap().remove_later(&journal)?,
            Action::Record(installed) => {
                records.record(installed.as_deref())?;
                *lock(&self.installed) = installed.map(|installed| *installed);
            }
            Action::Remember(refusal) => records.remember(&refusal)?,
            Action::Forget => records.forget()?,
            Action::Clean => self.swap().clean()?,
            Action::Again(_) => unreachable!("`drive` begins again by itself"),
        }
        Ok(None)
    }

    fn refusal(&self, manifest_sha256: &Digest) -> Option<Refusal> {
        let refusals = Records(&self.tree).refusals().unwrap_or_default();
        refusals
            .into_iter()
            .find(|refusal| refusal.manifest_sha256 == *manifest_sha256)
    }
}

/// The data behind these locks is whole between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
