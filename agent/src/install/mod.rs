//! Decides how a set gets on disk so that clamd has the old set or the new one at any moment.
//! Stages, swaps, proves and restores sets, and compares the directory with the installed set.
//! Must not know the master, what is trusted, or who wants an install.
//!
//! [`Installer`] drives it: `plan` stages what is here and says what is missing, `receive` takes
//! the rest, `install` swaps, makes clamd prove it, and turns back where clamd refuses. What to do
//! next is decided by the `engine` with its [`machine`], without any input or output. [`Storage`]
//! carries out each step on the disk, [`Prove`] asks clamd, `receipt` says what came of it. A crash at
//! any moment is ended by the next [`Installer::open`].
//!
//! One lock guards the engine. It is held from the look at the directory to the end of an install.
//! Readers that do not wait for it use the published [`Standing`].

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use clamcast_daemon::{durable, input};
use clamcast_proto::dsse::Verified;
use clamcast_proto::manifest::{Manifest, ManifestFile};
use clamcast_proto::receipt::{ClamdReport, ClamdState, InstallNumber, Outcome};
use clamcast_proto::wire::{NeedFile, Part, Phase};
use tokio::sync::OwnedMutexGuard;
use tokio::sync::watch::{Receiver, Sender};
use tokio_util::sync::CancellationToken;

use crate::chain;
use crate::clamd::Verdict;
use crate::clamd::proof::Nonce;
use crate::host::updater::Updater;

mod adopted;
pub mod disk;
mod engine;
mod evidence;
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
mod storage;
pub mod survey;
mod swap;
#[cfg(test)]
mod tests;
pub mod watch;

pub use disk::{HIDDEN, HostFault};
pub use engine::Standing;
pub use journal::{Installed, Set};
pub use look::{Depth, Findings, Look, Sighting};
pub use proving::Prove;
pub use receipt::{Completed, FileCheck};
pub use stage::{ReceiveError, SPACE_RESERVE_BYTES};
pub use storage::{HostStorage, StepFault, Storage};

use disk::{Dir, RECORD_MODE, Tree};
use engine::{Engine, Next, Prepared};
use journal::{Ending, Journal};
use machine::{Action, Event};
pub use others::{Blame, Other};
use receipt::with_passed_over;
use survey::{Planner, Survey};

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
pub struct Installer<S, P> {
    shared: Arc<Shared<S, P>>,
    engine: Arc<tokio::sync::Mutex<Engine>>,
}

impl<S, P> Clone for Installer<S, P> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            engine: Arc::clone(&self.engine),
        }
    }
}

struct Shared<S, P> {
    storage: S,
    prover: P,
    standing: Sender<Standing>,
}

/// The locked engine.
type Held = OwnedMutexGuard<Engine>;

/// What a plan came to.
#[derive(Debug)]
pub enum Planned {
    /// These files must come from the master.
    Needs(Vec<NeedFile>),
    /// The set was refused here before: no transfer, no other try.
    Answered(Box<Completed>),
}

impl<P: Prove> Installer<HostStorage, P> {
    /// Opens the directories and ends, on disk, an install that a crash interrupted. Call it before
    /// the network is touched. Where the database directory is missing or cannot be used, looks and
    /// installs report that as a fault of the host until it can be. Blocking.
    ///
    /// # Errors
    ///
    /// If the state directory cannot be used, or another agent works on the database directory.
    pub fn open(settings: &Settings, nonce: Nonce, prover: P) -> Result<Self, HostFault> {
        let tree = Tree::open_or_wait(&settings.database, &settings.state)?;
        Self::with_storage(HostStorage::new(tree, nonce), prover)
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
        let stage = self.shared.storage.staging();
        stage.receive(part, file, installed, bytes)
    }
}

impl<S: Storage, P: Prove> Installer<S, P> {
    /// The same as [`Installer::open`] on any storage.
    pub fn with_storage(storage: S, prover: P) -> Result<Self, HostFault> {
        let journal = storage.journal()?;
        let mut engine = Engine::new(storage.installed()?);
        let shared = Shared {
            storage,
            prover,
            standing: Sender::new(engine.standing()),
        };
        if let Some(journal) = journal {
            let set = journal.set.clone();
            tracing::info!(generation = %set.manifest.position(), step = ?journal.step, "ending an interrupted install");
            match shared.resume(&mut engine, journal.clone()) {
                Ok(next) => engine.opened(set, next),
                Err(fault) => {
                    tracing::error!(
                        error = chain(&fault),
                        "the interrupted install is ended with the next probe or install"
                    );
                    engine.hold(journal);
                }
            }
        }
        shared.publish(&engine);
        Ok(Self {
            shared: Arc::new(shared),
            engine: Arc::new(tokio::sync::Mutex::new(engine)),
        })
    }

    /// The state of the installer, and its changes.
    pub fn standing(&self) -> Receiver<Standing> {
        self.shared.standing.subscribe()
    }

    /// What is installed.
    pub fn installed(&self) -> Option<Installed> {
        self.shared.standing.borrow().installed.clone()
    }

    /// What is known of clamd without asking, and which files of the installed set it passes over.
    pub fn clamd(&self) -> ClamdReport {
        let report = self.shared.prover.report();
        match self.installed() {
            Some(installed) => {
                with_passed_over(&self.shared.prover, report, &installed.set.manifest)
            }
            None => report,
        }
    }

    /// Whether clamd runs, as far as is known without asking.
    pub fn clamd_state(&self) -> ClamdState {
        self.shared.prover.report().state
    }

    /// Proves and completes what opening found interrupted, if anything. Call it once, after that.
    pub async fn resume(&self, stop: CancellationToken) -> Option<Completed> {
        let mut engine = self.lock().await;
        let (set, next) = engine.take_opened()?;
        engine.begin(Phase::Proving);
        self.shared.publish(&engine);
        let (mut engine, completed) = self.complete(engine, set, next, None, stop).await;
        engine.end();
        self.shared.publish(&engine);
        completed
    }

    /// Compares the directory with the installed set; see [`Depth`] for how thoroughly. It waits for
    /// nobody, and gives way when `stop` fires. If files are wrong, returns the updater of somebody
    /// else that is at work there, too.
    pub async fn look(&self, depth: Depth, stop: CancellationToken) -> (Look, Option<Updater>) {
        let Ok(mut engine) = Arc::clone(&self.engine).try_lock_owned() else {
            return (Look::NotNow, None);
        };
        let shared = Arc::clone(&self.shared);
        let look = move || {
            let look = shared.look(&mut engine, depth, &stop);
            drop(engine);
            let is_wrong = matches!(&look, Look::Made(found) if !found.wrong.is_empty());
            let updater = is_wrong.then(|| shared.storage.updater()).flatten();
            (look, updater)
        };
        self.shared.storage.blocking(look).await
    }

    /// The updater of somebody else that is at work on the database directory.
    pub async fn updater(&self) -> Option<Updater> {
        let shared = Arc::clone(&self.shared);
        let find = move || shared.storage.updater();
        self.shared.storage.blocking(find).await
    }

    /// Asks how clamd is. Does not wait for the lock.
    pub async fn ping(&self) -> ClamdReport {
        self.shared.prover.ping().await
    }

    /// Stages what is on the host, read and hashed anew, and returns what must be transferred. `forced`
    /// (by an operator): every byte of the installed set is looked at first, and a generation is tried
    /// again that was refused before. `full` asks for no deltas. Returns what the look found, too.
    /// It waits for an install under way to end.
    pub async fn plan(
        &self,
        manifest: &Verified<Manifest>,
        forced: bool,
        full: bool,
        stop: CancellationToken,
    ) -> (Vec<Sighting>, Result<Planned, HostFault>) {
        let set = Set::from(manifest);
        if !forced && let Some(answer) = self.refused_before(&set).await {
            return (Vec::new(), Ok(Planned::Answered(Box::new(answer))));
        }
        let engine = self.lock().await;
        let plan = move |shared: &Shared<S, P>, engine: &mut Engine| {
            let look = forced.then(|| shared.look(engine, Depth::Ordered, &stop));
            let wrong = match look {
                Some(Look::Made(found)) => found.wrong,
                Some(Look::NotNow | Look::Stopped | Look::Blocked(_)) | None => Vec::new(),
            };
            let needs = shared.plan(engine, &set.manifest, full);
            (wrong, needs.map(Planned::Needs))
        };
        self.blocking(engine, plan).await.1
    }

    /// Installs what is staged: swap, reload, proof, and back on a refusal. `forced`: even if it was
    /// refused before. Its disk work is never broken off; `stop` ends the waiting for clamd, and the
    /// next start goes on with it.
    pub async fn install(
        &self,
        manifest: &Verified<Manifest>,
        forced: bool,
        stop: CancellationToken,
    ) -> Completed {
        let set = Set::from(manifest);
        let engine = self.lock().await;
        self.install_set(engine, set, forced, stop).await
    }

    /// Compares the directory with the installed manifest, reading every byte. Blocking.
    pub fn verify(&self) -> Vec<FileCheck> {
        let Some(installed) = self.installed() else {
            return Vec::new();
        };
        let files = installed.set.files().into_iter();
        let storage = &self.shared.storage;
        files
            .map(|expected| storage.check(Dir::Databases, expected))
            .collect()
    }

    /// Puts the installed generation back after drift, from the host's own copies.
    ///
    /// # Errors
    ///
    /// With what the master has to send first; or a `host_fault`.
    pub async fn repair(&self, stop: CancellationToken) -> Result<Option<Completed>, RepairError> {
        let engine = self.lock().await;
        let Some(installed) = engine.installed().cloned() else {
            return Ok(None);
        };
        let set = installed.set.clone();
        let (engine, planned) = self
            .blocking(engine, move |shared, engine| {
                shared.plan(engine, &installed.set.manifest, false)
            })
            .await;
        let needs = planned?;
        if !needs.is_empty() {
            return Err(RepairError::Missing(needs));
        }
        Ok(Some(self.install_set(engine, set, true, stop).await))
    }

    /// What a receipt says of a generation that this host could not take. Waits for no install.
    pub async fn host_fault(&self, manifest: &Verified<Manifest>, fault: &HostFault) -> Completed {
        let ending = self.fault(chain(fault));
        self.report(Set::from(manifest), ending).await
    }

    /// The answer to a set that was refused here before, if it was. Waits for no install.
    async fn refused_before(&self, set: &Set) -> Option<Completed> {
        let (shared, digest) = (Arc::clone(&self.shared), set.sha256());
        let refusal = move || shared.storage.refusal(&digest);
        let refusal = self.shared.storage.blocking(refusal).await?;
        let ending = engine::refused_before(refusal, self.shared.prover.report());
        Some(self.report(set.clone(), ending).await)
    }

    /// What a receipt says of a set that was not touched.
    async fn report(&self, set: Set, ending: Ending) -> Completed {
        let (shared, installed) = (Arc::clone(&self.shared), self.installed());
        let report = move || shared.completed(installed.as_ref(), None, set, ending);
        self.shared.storage.blocking(report).await
    }

    async fn lock(&self) -> Held {
        Arc::clone(&self.engine).lock_owned().await
    }

    fn fault(&self, reason: String) -> Ending {
        Ending {
            outcome: Outcome::HostFault,
            install: InstallNumber::NONE,
            clamd: self.shared.prover.report(),
            error: Some(reason),
        }
    }

    async fn install_set(
        &self,
        mut engine: Held,
        set: Set,
        forced: bool,
        stop: CancellationToken,
    ) -> Completed {
        self.shared.prover.begin_install();
        engine.begin(Phase::Staged);
        self.shared.publish(&engine);
        let about = set.clone();
        let prepared;
        (engine, prepared) = self
            .blocking(engine, move |shared, engine| {
                shared.prepare(engine, &about, forced)
            })
            .await;
        let mut tried = None;
        let event = match prepared {
            Err(error) => {
                let fault = self.fault(chain(&error));
                return self.ended(engine, set, fault).await.1;
            }
            Ok(Prepared::Answered(refusal)) => {
                let ending = engine::refused_before(refusal, self.shared.prover.report());
                return self.ended(engine, set, ending).await.1;
            }
            Ok(Prepared::InPlace(installed, journal)) => {
                let verdict = self.shared.prover.probe(installed.install).await;
                engine::in_place(verdict, &set, *installed, journal)
            }
            Ok(Prepared::Go(journal, resigned)) => {
                let begun;
                (engine, begun) = self.begin(engine, &set, journal, resigned).await;
                match begun {
                    Err(reason) => return self.ended(engine, set, self.fault(reason)).await.1,
                    Ok((event, beside)) => {
                        tried = beside;
                        event
                    }
                }
            }
        };
        let (engine, next) = self.drive(engine, event).await;
        let about = set.clone();
        let (engine, completed) = self.complete(engine, set, next, tried, stop).await;
        match completed {
            Some(completed) => completed,
            None => {
                let ending = engine::waits_on(self.shared.prover.report());
                self.ended(engine, about, ending).await.1
            }
        }
    }

    /// Where clamd stops scanning to reload, loads the set with `clamscan` before anything is touched.
    /// Returns the files of others that were loaded with it, too. An error is a fault of this host.
    async fn begin(
        &self,
        engine: Held,
        set: &Set,
        journal: Box<Journal>,
        resigned: Option<InstallNumber>,
    ) -> (Held, Result<(Event, Option<Vec<Other>>), String>) {
        if let Some(install) = resigned
            && let Some(clamd) = self.seen_without_signature_files(install).await
        {
            let journal = Journal {
                install,
                ..*journal
            };
            return (
                engine,
                Ok((Event::Resigned(Box::new(journal), clamd), None)),
            );
        }
        if !self.shared.prover.wants_load_test() {
            return (engine, Ok((Event::Begin(journal), None)));
        }
        let (engine, tried) = self.try_out(engine, &journal).await;
        let begun = tried.begin(set, journal, self.shared.prover.report());
        (engine, begun)
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

    /// Goes on until there is an ending: between the parts that wait for the disk, clamd is asked.
    /// `tried`: the files of others beside which the set was loaded with `clamscan`.
    async fn complete(
        &self,
        mut engine: Held,
        set: Set,
        mut next: Next,
        mut tried: Option<Vec<Other>>,
        stop: CancellationToken,
    ) -> (Held, Option<Completed>) {
        loop {
            match next {
                Next::Nothing => return (engine, None),
                Next::Finish(ending) => {
                    let (engine, completed) = self.ended(engine, set, ending).await;
                    return (engine, Some(completed));
                }
                Next::Prove(journal) => {
                    let (others, event);
                    (engine, others) = self.others(engine, &journal).await;
                    (engine, event) = self
                        .prove(engine, &journal, others, &mut tried, &stop)
                        .await;
                    (engine, next) = self.drive(engine, event).await;
                }
            }
        }
    }

    async fn drive(&self, engine: Held, event: Event) -> (Held, Next) {
        let drive = move |shared: &Shared<S, P>, engine: &mut Engine| shared.drive(engine, event);
        self.blocking(engine, drive).await
    }

    async fn ended(&self, engine: Held, set: Set, ending: Ending) -> (Held, Completed) {
        let complete = move |shared: &Shared<S, P>, engine: &mut Engine| {
            let completed = shared.completed(engine.installed(), engine.journal(), set, ending);
            engine.reported(&completed.set, completed.outcome, &completed.files);
            engine.end();
            shared.publish(engine);
            completed
        };
        self.blocking(engine, complete).await
    }

    /// An install is in a phase that only the installer knows.
    fn enter(&self, engine: &mut Engine, phase: Phase) {
        engine.enter(phase);
        self.shared.publish(engine);
    }

    /// Runs disk work off the async threads. The lock goes along, so that work whose caller went away
    /// is ended before anything else begins.
    async fn blocking<T: Send + 'static>(
        &self,
        mut engine: Held,
        work: impl FnOnce(&Shared<S, P>, &mut Engine) -> T + Send + 'static,
    ) -> (Held, T) {
        let shared = Arc::clone(&self.shared);
        let work = move || {
            let done = work(&shared, &mut engine);
            (engine, done)
        };
        self.shared.storage.blocking(work).await
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

impl<S: Storage, P: Prove> Shared<S, P> {
    /// Publishes the state of the engine.
    fn publish(&self, engine: &Engine) {
        self.standing.send_replace(engine.standing());
    }

    fn look(&self, engine: &mut Engine, depth: Depth, stop: &CancellationToken) -> Look {
        // A directory that was replaced is opened anew.
        if let Err(fault) = self.storage.check_in_place() {
            return Look::Blocked(chain(&fault));
        }
        // In the middle of an install names come and go.
        if engine.is_unfinished() {
            return Look::NotNow;
        }
        let old_forms = engine.journal().map_or(&[][..], |open| &open.later);
        let wrong = match engine.installed() {
            None => Vec::new(), // nothing that could be wrong
            Some(installed) => match self.storage.compare(installed, old_forms, depth, stop) {
                None => return Look::Stopped,
                Some(wrong) => wrong,
            },
        };
        if !wrong.is_empty() {
            engine.suspect();
        }
        let (foreign, adopted) = match engine.is_suspect() {
            true => self.beside(engine.installed(), engine.journal()),
            false => Default::default(),
        };
        Look::Made(Findings {
            wrong,
            foreign,
            adopted,
        })
    }

    fn plan(
        &self,
        engine: &mut Engine,
        manifest: &Manifest,
        full: bool,
    ) -> Result<Vec<NeedFile>, HostFault> {
        self.storage.check_in_place()?;
        self.recover(engine)?;
        self.storage.forget_digests();
        let installed = engine.installed();
        let installed = installed.map(|installed| &*installed.set.manifest);
        let needs = self.storage.stage(manifest, installed, full)?;
        engine.begin_staging();
        Ok(needs)
    }

    /// Ends on disk what an earlier install could not: an install begins with a whole set.
    fn recover(&self, engine: &mut Engine) -> Result<(), HostFault> {
        if !engine.is_unfinished() {
            return Ok(());
        }
        let Some(open) = engine.journal().cloned() else {
            return Ok(());
        };
        let next = self.resume(engine, open)?;
        let Some((reason, files)) = engine.way_back(&next) else {
            return Ok(());
        };
        for file in files {
            if !self.storage.ensure_staged(file)? {
                return Ok(());
            }
        }
        let reason = reason.to_owned();
        Err(HostFault::Unfinished { reason })
    }

    fn resume(&self, engine: &mut Engine, journal: Journal) -> Result<Next, HostFault> {
        self.storage.forget_digests();
        let resumed = engine.resumed(journal, &self.storage.numbers()?);
        Ok(self.drive(engine, resumed))
    }

    fn prepare(&self, engine: &mut Engine, set: &Set, forced: bool) -> Result<Prepared, HostFault> {
        if !forced && let Some(refusal) = self.storage.refusal(&set.sha256()) {
            return Ok(Prepared::Answered(refusal));
        }
        self.storage.check_in_place()?;
        self.recover(engine)?;
        let survey = self.survey(engine, set)?;
        Ok(engine.prepare(set, survey))
    }

    /// Compares the directory with a set that must be staged.
    fn survey(&self, engine: &Engine, set: &Set) -> Result<Survey, HostFault> {
        for file in set.files() {
            if !self.storage.ensure_staged(&file)? {
                return Err(HostFault::Unstaged {
                    path: self
                        .storage
                        .directory(Dir::Databases)
                        .join(file.name.as_str()),
                    digest: file.sha256,
                });
            }
        }
        let planner = Planner::new(set, engine.installed(), engine.journal());
        let planned = planner.plan(&self.storage.see(&planner)?);
        planned.map_err(|error| adopted::no_place(&self.storage.directory(Dir::Adopted), error))
    }

    /// The journal of a set that is installed once more, after clamd has accepted the previous one.
    fn survey_again(&self, engine: &Engine, set: &Set) -> Result<Journal, HostFault> {
        self.storage.check_in_place()?;
        let survey = self.survey(engine, set)?;
        Ok(Journal {
            control: true,
            ..survey.journal
        })
    }

    /// Feeds the engine and carries out what it says, up to where clamd has to be asked.
    fn drive(&self, engine: &mut Engine, event: Event) -> Next {
        let next = self.drive_on(engine, event);
        self.publish(engine);
        next
    }

    fn drive_on(&self, engine: &mut Engine, mut event: Event) -> Next {
        loop {
            let actions = engine.handle(event);
            self.publish(engine);
            if actions.is_empty() {
                return Next::Nothing;
            }
            event = Event::Done;
            for action in actions {
                let done = match action {
                    // The way back does not depend on the journal.
                    Action::TrySave(journal) => {
                        if let Err(step) = self.storage.perform(&Action::Save(journal)) {
                            let error = chain(&step.fault);
                            tracing::error!(error, "cannot keep the journal, going back without");
                        }
                        Ok(())
                    }
                    Action::Prove(journal) => return Next::Prove(journal),
                    Action::Finish(ending) => return Next::Finish(ending),
                    Action::Again(set) => {
                        event = match self.survey_again(engine, &set) {
                            Ok(journal) => Event::Begin(Box::new(journal)),
                            Err(fault) => Event::Failed {
                                fault: chain(&fault),
                                touched: false,
                            },
                        };
                        break;
                    }
                    action @ (Action::Save(_)
                    | Action::Swap(_)
                    | Action::Place(_)
                    | Action::Renumber(_)
                    | Action::RemoveLater(_)
                    | Action::Record(_)
                    | Action::Remember(_)
                    | Action::Forget
                    | Action::Clean) => {
                        if let Action::Record(installed) = &action {
                            // It is so, also if the record does not get to disk.
                            engine.recorded(installed.as_deref().cloned());
                        }
                        self.storage.perform(&action)
                    }
                };
                if let Err(StepFault { fault, touched }) = done {
                    let fault = chain(&fault);
                    tracing::error!(error = fault, "an install met a fault of this host");
                    event = Event::Failed { fault, touched };
                    break;
                }
            }
        }
    }
}

/// The data behind a lock is whole between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
