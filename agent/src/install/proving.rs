//! Asks clamd what it makes of a set, and says whose fault it is where that is nothing.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;

use clamcast_proto::DatabaseName;
use clamcast_proto::receipt::{ClamdReport, FileState, InstallNumber};
use clamcast_proto::wire::Phase;
use tokio_util::sync::CancellationToken;

use super::disk::{Dir, HostFault};
use super::engine::{Engine, Probed};
use super::evidence::{self, Control, Trial, Tried};
use super::journal::{Journal, Step};
use super::machine::Event;
use super::others::{Blame, Other};
use super::{Completed, Held, Installer, Shared, Storage};
use crate::chain;
use crate::clamd::{LoadTest, LogMark, Prover, Verdict};
use crate::host::memory;

/// Where verdicts come from: the host's clamds, or a fake in tests.
pub trait Prove: Send + Sync + 'static {
    /// A place in clamd's log.
    type Mark: Send;
    /// Where clamd's log ends now: asked after the renames and before the first RELOAD.
    fn mark(&self) -> Self::Mark;
    /// Makes clamd reload until it is seen with install `n`, or until there is evidence that it
    /// cannot use the set.
    fn prove(
        &self,
        n: InstallNumber,
        mark: Self::Mark,
        stop: CancellationToken,
    ) -> impl Future<Output = Verdict> + Send;
    /// One look, without a reload.
    fn probe(&self, n: InstallNumber) -> impl Future<Output = Verdict> + Send;
    /// Whether clamd is there. It proves nothing, and leaves no hit in clamd's log.
    fn ping(&self) -> impl Future<Output = ClamdReport> + Send;
    /// Whether a set is to be loaded with `clamscan` before clamd gets to see it: where clamd stops
    /// scanning to reload, a failed load leaves it dead until it is restarted.
    fn wants_load_test(&self) -> bool;
    /// A new install begins: what `clamscan` said before counts no more.
    fn begin_install(&self);
    /// Loads a directory with `clamscan`, once for each set of files in an install.
    fn load_test(&self, directory: &Path) -> impl Future<Output = LoadTest> + Send;
    /// Why there is too little memory to load this directory once more. Blocking.
    fn memory_shortage(&self, directory: &Path) -> Option<String>;
    /// Whether every clamd, as it answered last, is older than ClamAV 1.5, which was the first to read
    /// `.cvd.sign` files. A clamd of an unknown version reads them.
    fn ignores_signature_files(&self) -> bool;
    /// Whether clamd loads a file of this name.
    fn loads(&self, name: &DatabaseName) -> bool;
    /// What is known of clamd without asking.
    fn report(&self) -> ClamdReport;
}

impl Prove for Prover {
    type Mark = LogMark;

    fn mark(&self) -> LogMark {
        self.mark()
    }

    async fn prove(&self, n: InstallNumber, mark: LogMark, stop: CancellationToken) -> Verdict {
        self.prove(n, mark, stop).await
    }

    async fn probe(&self, n: InstallNumber) -> Verdict {
        self.probe(n).await
    }

    async fn ping(&self) -> ClamdReport {
        self.look().await
    }

    fn wants_load_test(&self) -> bool {
        let settings = self.settings();
        !settings.concurrent_reload && !settings.instances.is_empty()
    }

    fn begin_install(&self) {
        self.begin_install();
    }

    async fn load_test(&self, directory: &Path) -> LoadTest {
        self.load_test(directory).await
    }

    fn memory_shortage(&self, directory: &Path) -> Option<String> {
        memory::shortage(directory)
    }

    fn ignores_signature_files(&self) -> bool {
        self.ignores_signature_files()
    }

    fn loads(&self, name: &DatabaseName) -> bool {
        self.settings().loads(name)
    }

    fn report(&self) -> ClamdReport {
        self.report()
    }
}

/// What lies beside a set in a load test.
#[derive(Clone, Copy)]
enum Beside {
    /// What others have in the database directory.
    Others,
    Nothing,
}

impl<S: Storage, P: Prove> Installer<S, P> {
    /// Where the outcome is `installed`: one look at clamd, and a reload if it is up with another
    /// set. `Some` once it is live, or refused.
    pub async fn probe_on(&self, stop: CancellationToken) -> Option<Completed> {
        let engine = self.lock().await;
        let journal = engine.journal().cloned()?;
        let set = journal.set.clone();
        if engine.is_unfinished() {
            // A disk that failed in the middle of something: perhaps it works again. An outcome that was
            // decided by then has been reported.
            let is_decided = matches!(journal.step, Step::Settling(_));
            let (engine, next) = self
                .blocking(engine, move |shared, engine| shared.resume(engine, journal))
                .await;
            let completed = self.complete(engine, set, next.ok()?, None, stop).await.1;
            return completed.filter(|_| !is_decided);
        }
        // It may run clamscan, which takes as long as a load.
        let probing = self.shared.prover.probe(journal.install);
        let verdict = stop.run_until_cancelled(probing).await?;
        let (engine, others) = self.others(engine, &journal).await;
        let (engine, event) = match engine.probed(&verdict, others.as_deref().ok()) {
            Probed::Known => return None,
            Probed::Again => self.prove(engine, &journal, others, &mut None, &stop).await,
            Probed::Judge => self.judged(engine, verdict, None).await,
        };
        let (engine, next) = self.drive(engine, event).await;
        self.complete(engine, set, next, None, stop).await.1
    }

    /// Where the outcome is `live`: asks whether clamd is still there. `Some` if it is gone; then
    /// [`Installer::probe_on`] goes on asking, and sees it with the set when it is back. It gives
    /// way to an install, and when `stop` fires.
    pub async fn look_at_clamd(&self, stop: CancellationToken) -> Option<Completed> {
        let engine = Arc::clone(&self.engine).try_lock_owned();
        let asked = stop.run_until_cancelled(self.shared.prover.ping()).await;
        let (engine, report) = (engine.ok()?, asked?);
        let (set, lost) = engine.pinged(report)?;
        let (engine, next) = self.drive(engine, lost).await;
        self.complete(engine, set, next, None, stop).await.1
    }

    /// Loads with `clamscan` what clamd would load after the swap, where a bad set would be the end
    /// of clamd.
    pub(super) async fn try_out(&self, engine: Held, journal: &Journal) -> (Held, Tried) {
        let (mut engine, others) = self.trial_of(engine, journal, Beside::Others).await;
        let mut trial = match others {
            Err(hindrance) => Trial::Alone { hindrance },
            Ok(others) => Trial::beside(self.load_test(Dir::Trial).await, journal, others),
        };
        if let Trial::Alone { hindrance } = trial {
            let alone;
            (engine, alone) = self.trial_of(engine, journal, Beside::Nothing).await;
            if let Err(fault) = alone {
                return (engine, Tried::Hindered(fault));
            }
            trial = Trial::alone(self.load_test(Dir::Trial).await, journal, hindrance);
        }
        match trial {
            Trial::Done(tried) => (engine, tried),
            Trial::Weigh(said) => self.weighed(engine, journal, said).await,
            Trial::Alone { hindrance } => (engine, Tried::Hindered(hindrance)),
        }
    }

    /// Whether the verdict of `clamscan`, which names a file of the set, is evidence against the
    /// set. The files are still in the trial directory.
    async fn weighed(&self, engine: Held, journal: &Journal, said: String) -> (Held, Tried) {
        let (files, reason) = (journal.files.clone(), said.clone());
        let (engine, doubt) = self
            .blocking(engine, move |shared, _| {
                shared.doubt_about(&reason, &files, Dir::Trial)
            })
            .await;
        if let Some(doubt) = doubt {
            return (engine, Tried::Hindered(format!("{doubt}: {said}")));
        }
        let (engine, control) = self.control(engine, journal).await;
        (engine, Tried::weighed(said, control))
    }

    /// Loads the previous set with `clamscan`, if there is one that the agent can read and memory
    /// permits.
    async fn control(&self, engine: Held, journal: &Journal) -> (Held, Control) {
        if !Control::is_possible(journal) {
            return (engine, Control::Stands);
        }
        let journal = journal.clone();
        let (engine, made) = self
            .blocking(engine, move |shared, _| {
                let others = shared.storage.others(&journal);
                let others = others.map_err(|fault| chain(&fault))?;
                let made = shared.storage.make_control(&journal.before, &others);
                made.map_err(|fault| chain(&fault))?;
                let directory = shared.storage.directory(Dir::Trial);
                let shortage = shared.prover.memory_shortage(&directory);
                shortage.map_or(Ok(()), Err)
            })
            .await;
        let control = match made {
            Err(why) => Control::impossible(&why),
            Ok(()) => Control::of(self.load_test(Dir::Trial).await),
        };
        (engine, control)
    }

    /// Loads a directory with `clamscan`.
    async fn load_test(&self, directory: Dir) -> LoadTest {
        let directory = self.shared.storage.directory(directory);
        let test = self.shared.prover.load_test(&directory).await;
        if let LoadTest::Hindered(why) | LoadTest::Missing(why) = &test {
            tracing::warn!(why, "clamscan could not try the databases");
        }
        test
    }

    /// Makes a directory for a load test; the files of others that are to be in it, or what stands
    /// in the way.
    async fn trial_of(
        &self,
        engine: Held,
        journal: &Journal,
        beside: Beside,
    ) -> (Held, Result<Vec<Other>, String>) {
        let journal = journal.clone();
        self.blocking(engine, move |shared, engine| {
            let others = match beside {
                Beside::Others => shared.storage.others(&journal),
                Beside::Nothing => Ok(Vec::new()),
            };
            let others = others.map_err(|fault| chain(&fault))?;
            if let Some(obstacle) = engine.obstacle(&others) {
                return Err(obstacle);
            }
            let made = shared.storage.make_trial(&journal, &others);
            made.map_err(|fault| chain(&fault))?;
            Ok(others)
        })
        .await
    }

    /// The files of others beside a journal's set, as they are now.
    pub(super) async fn others(
        &self,
        engine: Held,
        journal: &Journal,
    ) -> (Held, Result<Vec<Other>, HostFault>) {
        let journal = journal.clone();
        self.blocking(engine, move |shared, _| shared.storage.others(&journal))
            .await
    }

    /// Makes clamd load what is there, beside these files of others, and says what came of it. Where
    /// a failed load would be the end of clamd it is asked only if `clamscan` has loaded the same.
    pub(super) async fn prove(
        &self,
        mut engine: Held,
        journal: &Journal,
        others: Result<Vec<Other>, HostFault>,
        tried: &mut Option<Vec<Other>>,
        stop: &CancellationToken,
    ) -> (Held, Event) {
        if self.shared.prover.wants_load_test() {
            let event;
            (engine, event) = self.test_again(engine, &others, tried).await;
            if let Some(event) = event {
                return (engine, event);
            }
        }
        self.enter(&mut engine, Phase::Reloading);
        let mark = self.shared.prover.mark();
        self.enter(&mut engine, Phase::Proving);
        let number = journal.install;
        let verdict = self.shared.prover.prove(number, mark, stop.clone()).await;
        self.judged(engine, verdict, others.ok()).await
    }

    /// What a verdict means for the set that is being proven. Where `clamscan` is the evidence, the
    /// previous set is the control. `before`: the files of others that clamd, or `clamscan` in its place,
    /// may have met; they may have been mended meanwhile.
    async fn judged(
        &self,
        engine: Held,
        verdict: Verdict,
        before: Option<Vec<Other>>,
    ) -> (Held, Event) {
        let (mut engine, (verdict, blame)) = self
            .blocking(engine, move |shared, engine| {
                shared.blame(engine, verdict, before)
            })
            .await;
        let open = engine.journal().cloned();
        let open = open.filter(|open| evidence::wants_control(&verdict, &blame, open));
        let Some(open) = open else {
            return (engine, Event::Judged(verdict, blame));
        };
        let control;
        (engine, control) = self.control(engine, &open).await;
        (engine, evidence::controlled(verdict, blame, control))
    }

    /// Loads the database directory itself with `clamscan`, unless it was `tried` beside the same
    /// files of others. `Some`: clamd must not get it.
    async fn test_again(
        &self,
        mut engine: Held,
        others: &Result<Vec<Other>, HostFault>,
        tried: &mut Option<Vec<Other>>,
    ) -> (Held, Option<Event>) {
        let report = self.shared.prover.report();
        let others = match others {
            Ok(others) => engine.obstacle(others).map_or(Ok(others), Err),
            Err(fault) => Err(chain(fault)),
        };
        let others = match others {
            Ok(others) => others.clone(),
            Err(reason) => {
                let hindered = Event::Judged(Verdict::Unproven(report), Blame::Others(reason));
                return (engine, Some(hindered));
            }
        };
        if tried.as_ref() == Some(&others) {
            return (engine, None);
        }
        *tried = None;
        match self.load_test(Dir::Databases).await {
            LoadTest::Passed => *tried = Some(others),
            LoadTest::Hindered(_) | LoadTest::Missing(_) => {}
            LoadTest::Failed(said) => {
                let refused = evidence::rejected(said, report);
                let (engine, event) = self.judged(engine, refused, Some(others)).await;
                return (engine, Some(event));
            }
        }
        (engine, None)
    }
}

impl<S: Storage, P: Prove> Shared<S, P> {
    fn blame(
        &self,
        engine: &mut Engine,
        verdict: Verdict,
        before: Option<Vec<Other>>,
    ) -> (Verdict, Blame) {
        let open = engine.journal().cloned();
        let (Some(open), false) = (open, matches!(verdict, Verdict::Live(_))) else {
            engine.hindered_by(None);
            return (verdict, Blame::Set);
        };
        let others = self.storage.others(&open);
        let others = others.inspect_err(|fault| {
            tracing::warn!(error = chain(fault), "cannot look for databases of others");
        });
        let others = others.ok();
        let (verdict, mut blame) =
            evidence::blame(verdict, &open, before.as_deref(), others.as_deref());
        if let Some(said) = evidence::to_be_doubted(&verdict, &blame, &open)
            && let Some(doubt) = self.doubt_about(said, &open.files, Dir::Databases)
        {
            blame = evidence::doubted(&verdict, &doubt);
        }
        let met = before.or(others);
        engine.hindered_by(met.filter(|_| matches!(blame, Blame::Others(_))));
        (verdict, blame)
    }

    /// Reads every byte of these files in `dir`: why they are no evidence against the set.
    fn doubt_about(&self, said: &str, files: &[FileState], dir: Dir) -> Option<String> {
        let names: Vec<_> = files.iter().map(|file| file.name.as_str()).collect();
        let checks = files
            .iter()
            .map(|file| self.storage.check(dir, file.clone()));
        evidence::doubt(said, &names, checks)
    }
}
