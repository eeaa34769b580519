//! Asks clamd what it makes of a set, and says whose fault it is where that is nothing.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;

use clamcast_proto::DatabaseName;
use clamcast_proto::receipt::{ClamdReport, ClamdState, Outcome};
use clamcast_proto::wire::Phase;
use tokio::sync::OwnedMutexGuard;
use tokio_util::sync::CancellationToken;

use super::disk::{Dir, HostFault};
use super::journal::{Installed, Journal, Step, Way};
use super::machine::Event;
use super::others::{Blame, Other};
use super::{Completed, FileCheck, Installer, Shared, lock, swap};
use crate::chain;
use crate::clamd::{LoadTest, LogMark, Prover, Verdict};

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
        n: u64,
        mark: Self::Mark,
        stop: CancellationToken,
    ) -> impl Future<Output = Verdict> + Send;
    /// One look, without a reload.
    fn probe(&self, n: u64) -> impl Future<Output = Verdict> + Send;
    /// Whether clamd is there. It proves nothing, and leaves no hit in clamd's log.
    fn ping(&self) -> impl Future<Output = ClamdReport> + Send;
    /// Whether a set is to be loaded with `clamscan` before clamd gets to see it: where clamd stops
    /// scanning to reload, a failed load leaves it dead until it is restarted.
    fn wants_load_test(&self) -> bool;
    /// Loads a directory with `clamscan`.
    fn load_test(&self, directory: &Path) -> impl Future<Output = LoadTest> + Send;
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

    async fn prove(&self, n: u64, mark: LogMark, stop: CancellationToken) -> Verdict {
        self.prove(n, mark, stop).await
    }

    async fn probe(&self, n: u64) -> Verdict {
        self.probe(n).await
    }

    async fn ping(&self) -> ClamdReport {
        self.look().await
    }

    fn wants_load_test(&self) -> bool {
        let settings = self.settings();
        !settings.concurrent_reload && !settings.instances.is_empty()
    }

    async fn load_test(&self, directory: &Path) -> LoadTest {
        self.load_test(directory).await
    }

    fn loads(&self, name: &DatabaseName) -> bool {
        self.settings().loads(name)
    }

    fn report(&self) -> ClamdReport {
        self.report()
    }
}

/// What a load test with `clamscan` came to.
pub(super) enum Tried {
    /// It loads, beside these files of others; or nobody can tell.
    Loads(Vec<Other>),
    /// It loads, but for what others have beside it: it may stand there, and clamd is not asked.
    Alone,
    /// The set does not.
    Bad(String),
    /// For a fault of this host there is no telling, or no loading.
    Hindered(String),
}

/// What lies beside a set in a load test.
#[derive(Clone, Copy)]
enum Beside {
    /// What others have in the database directory.
    Others,
    Nothing,
}

impl<P: Prove> Installer<P> {
    /// Where the outcome is `installed`: one look at clamd, and a reload if it is up with another
    /// set. `Some` once it is live, or refused.
    pub async fn probe_on(&self, stop: CancellationToken) -> Option<Completed> {
        let guard = Arc::clone(&self.shared.slot).lock_owned().await;
        let journal = lock(&self.shared.machine).journal().cloned()?;
        let set = journal.set.clone();
        if journal.step != Step::Waiting {
            // A disk that failed in the middle of something: perhaps it works again.
            let resumed = self
                .blocking(guard, move |shared| shared.resume(journal))
                .await;
            let (guard, next) = (resumed.0, resumed.1.ok()?);
            return self.complete(guard, set, next, None, stop, &|_| ()).await;
        }
        let verdict = self.shared.prover.probe(journal.install).await;
        let (guard, others) = self.others(guard, &journal).await;
        let hindrance = lock(&self.shared.hindrance).clone();
        let again = match &verdict {
            Verdict::Live(_) => false,
            _ if hindrance.is_some() && hindrance.as_ref() == others.as_ref().ok() => return None,
            // What clamd's log says may be about what is gone, or names nobody.
            _ if hindrance.is_some() => true,
            Verdict::Refused { .. } => !others.as_ref().is_ok_and(Vec::is_empty),
            Verdict::Unproven(report) => report.state == ClamdState::Up,
            Verdict::Absent(_) => false,
        };
        let (guard, event) = if again {
            self.prove(guard, &journal, others, &mut None, &stop, &|_| ())
                .await
        } else {
            self.blocking(guard, move |shared| shared.judged(verdict, None))
                .await
        };
        let (guard, next) = self
            .blocking(guard, move |shared| shared.drive(event))
            .await;
        self.complete(guard, set, next, None, stop, &|_| ()).await
    }

    /// Where the outcome is `live`: asks whether clamd is still there. `Some` if it is gone; then
    /// [`Installer::probe_on`] goes on asking, and sees it with the set when it is back. It gives
    /// way to an install, and when `stop` fires.
    pub async fn look_at_clamd(&self, stop: CancellationToken) -> Option<Completed> {
        let guard = Arc::clone(&self.shared.slot).try_lock_owned();
        let asked = stop.run_until_cancelled(self.shared.prover.ping()).await;
        let (guard, report) = (guard.ok()?, asked?);
        let live = |installed: &Installed| installed.outcome == Outcome::Live;
        let installed = self.installed().filter(live)?;
        if report.state != ClamdState::Down || lock(&self.shared.machine).journal().is_some() {
            return None;
        }
        let why = report.note.as_deref().unwrap_or("it does not listen");
        let note = Some(format!("clamd was seen with this set and is gone: {why}"));
        let event = Event::Lost(Box::new(installed.clone()), ClamdReport { note, ..report });
        let (guard, next) = self
            .blocking(guard, move |shared| shared.drive(event))
            .await;
        self.complete(guard, installed.set, next, None, stop, &|_| ())
            .await
    }

    /// Loads with `clamscan` what clamd would load after the swap, where a bad set would be the end
    /// of clamd.
    pub(super) async fn try_out(
        &self,
        guard: OwnedMutexGuard<()>,
        journal: &Journal,
    ) -> (OwnedMutexGuard<()>, Tried) {
        // A host without a set, or with a damaged one, is better off with it, whatever lies beside.
        let before = journal.before.installed.as_ref();
        let needed = before.is_none_or(|before| before.set == journal.set);
        let (guard, others) = self.trial_of(guard, journal, Beside::Others).await;
        let hindrance = match others {
            Err(reason) => reason,
            Ok(others) => {
                let reason = match self.load_test(Dir::Trial).await {
                    LoadTest::Passed | LoadTest::NotRun(_) => {
                        return (guard, Tried::Loads(others));
                    }
                    LoadTest::Failed(reason) => reason,
                };
                let ours = swap::names_of(journal).collect();
                match Blame::of_refusal(&reason, &ours, &others) {
                    Blame::Set => return (guard, Tried::Bad(reason)),
                    Blame::Others(reason) if !needed => return (guard, Tried::Hindered(reason)),
                    Blame::Others(reason) => reason,
                    Blame::Unknown => format!(
                        "beside the databases that are not of this set clamscan cannot load it: \
                         {reason}"
                    ),
                }
            }
        };
        let (guard, alone) = self.trial_of(guard, journal, Beside::Nothing).await;
        let tried = match alone {
            Err(fault) => Tried::Hindered(fault),
            Ok(_) => match self.load_test(Dir::Trial).await {
                LoadTest::Failed(reason) => Tried::Bad(reason),
                LoadTest::Passed if needed => Tried::Alone,
                LoadTest::Passed | LoadTest::NotRun(_) => Tried::Hindered(hindrance),
            },
        };
        (guard, tried)
    }

    /// Loads a directory with `clamscan`.
    async fn load_test(&self, directory: Dir) -> LoadTest {
        let directory = self.shared.tree.directory(directory);
        let test = self.shared.prover.load_test(&directory).await;
        if let LoadTest::NotRun(why) = &test {
            tracing::warn!(why, "the databases could not be tried in clamd's place");
        }
        test
    }

    /// Makes a directory for a load test; the files of others that are to be in it, or what stands
    /// in the way.
    async fn trial_of(
        &self,
        guard: OwnedMutexGuard<()>,
        journal: &Journal,
        beside: Beside,
    ) -> (OwnedMutexGuard<()>, Result<Vec<Other>, String>) {
        let journal = journal.clone();
        self.blocking(guard, move |shared| {
            let others = match beside {
                Beside::Others => shared.swap().others(&journal),
                Beside::Nothing => Ok(Vec::new()),
            };
            let others = others.map_err(|fault| chain(&fault))?;
            if let Some(obstacle) = shared.obstacle(&others) {
                return Err(obstacle);
            }
            let made = shared.swap().make_trial(&journal, &others);
            made.map_err(|fault| chain(&fault))?;
            Ok(others)
        })
        .await
    }

    /// The files of others beside a journal's set, as they are now.
    pub(super) async fn others(
        &self,
        guard: OwnedMutexGuard<()>,
        journal: &Journal,
    ) -> (OwnedMutexGuard<()>, Result<Vec<Other>, HostFault>) {
        let journal = journal.clone();
        self.blocking(guard, move |shared| shared.swap().others(&journal))
            .await
    }

    /// Makes clamd load what is there, beside these files of others, and says what came of it. Where
    /// a failed load would be the end of clamd it is asked only if `clamscan` has loaded the same.
    pub(super) async fn prove(
        &self,
        mut guard: OwnedMutexGuard<()>,
        journal: &Journal,
        others: Result<Vec<Other>, HostFault>,
        tried: &mut Option<Vec<Other>>,
        stop: &CancellationToken,
        progress: &(impl Fn(Phase) + Send + Sync),
    ) -> (OwnedMutexGuard<()>, Event) {
        if self.shared.prover.wants_load_test() {
            let event;
            (guard, event) = self.test_again(guard, &others, tried).await;
            if let Some(event) = event {
                return (guard, event);
            }
        }
        progress(Phase::Reloading);
        let mark = self.shared.prover.mark();
        progress(Phase::Proving);
        let number = journal.install;
        let verdict = self.shared.prover.prove(number, mark, stop.clone()).await;
        self.blocking(guard, move |shared| shared.judged(verdict, others.ok()))
            .await
    }

    /// Loads the database directory itself with `clamscan`, unless it was `tried` beside the same
    /// files of others. `Some`: clamd must not get it.
    async fn test_again(
        &self,
        guard: OwnedMutexGuard<()>,
        others: &Result<Vec<Other>, HostFault>,
        tried: &mut Option<Vec<Other>>,
    ) -> (OwnedMutexGuard<()>, Option<Event>) {
        let report = self.shared.prover.report();
        let others = match others {
            Ok(others) => self.shared.obstacle(others).map_or(Ok(others), Err),
            Err(fault) => Err(chain(fault)),
        };
        let others = match others {
            Ok(others) => others.clone(),
            Err(reason) => {
                let hindered = Event::Judged(Verdict::Unproven(report), Blame::Others(reason));
                return (guard, Some(hindered));
            }
        };
        if tried.as_ref() == Some(&others) {
            return (guard, None);
        }
        *tried = None;
        match self.load_test(Dir::Databases).await {
            LoadTest::Passed => *tried = Some(others),
            LoadTest::NotRun(_) => {}
            LoadTest::Failed(reason) => {
                let reason = format!("clamscan: {reason}");
                let refused = Verdict::Refused { reason, report };
                let (guard, event) = self
                    .blocking(guard, move |shared| shared.judged(refused, Some(others)))
                    .await;
                return (guard, Some(event));
            }
        }
        (guard, None)
    }
}

impl<P: Prove> Shared<P> {
    /// What a verdict means for the set that is being proven. `before`: the files of others that
    /// clamd, or `clamscan` in its place, may have met; they may have been mended meanwhile.
    fn judged(&self, verdict: Verdict, before: Option<Vec<Other>>) -> Event {
        let open = lock(&self.machine).journal().cloned();
        let (Some(open), false) = (open, matches!(verdict, Verdict::Live(_))) else {
            *lock(&self.hindrance) = None;
            return Event::Judged(verdict, Blame::Set);
        };
        let ours = swap::names_of(&open).collect();
        let others = self.swap().others(&open);
        let changed = matches!((&before, &others), (Some(before), Ok(now)) if before != now);
        let verdict = self.of_the_set(verdict, &open, changed);
        let blame = match &others {
            Ok(others) => Blame::of(&verdict, &ours, others),
            Err(fault) => {
                tracing::warn!(error = chain(fault), "cannot look for databases of others");
                Blame::Unknown
            }
        };
        let met = before.or(others.ok());
        *lock(&self.hindrance) = met.filter(|_| blame != Blame::Set);
        Event::Judged(verdict, blame)
    }

    /// A set is blamed only if it was there, and nothing was `changed_beside` it: of files that
    /// somebody changed meanwhile clamd's refusal says nothing, and probing goes on.
    fn of_the_set(&self, verdict: Verdict, open: &Journal, changed_beside: bool) -> Verdict {
        let (reason, report) = match verdict {
            Verdict::Refused { reason, report } if open.way == Way::Forward => (reason, report),
            Verdict::Refused { .. }
            | Verdict::Live(_)
            | Verdict::Unproven(_)
            | Verdict::Absent(_) => return verdict,
        };
        // What cannot be read for a moment is not changed.
        let is_changed = |check: &FileCheck| check.error.is_none() && !check.is_right();
        let mut checks = open.files.iter().map(|file| self.check(file.clone()));
        let changed = match changed_beside {
            true => Some("a database beside the set".to_owned()),
            false => checks
                .find(is_changed)
                .map(|check| check.expected.name.to_string()),
        };
        let Some(changed) = changed else {
            return Verdict::Refused { reason, report };
        };
        let note = format!("{changed} was changed by somebody: {reason}");
        tracing::warn!(note, "clamd refuses what is not there any more");
        let note = Some(note);
        Verdict::Unproven(ClamdReport { note, ..report })
    }

    /// What of these files of others `clamscan` cannot be given in clamd's place. Then they are kept
    /// until they change.
    fn obstacle(&self, others: &[Other]) -> Option<String> {
        let obstacle = others.iter().find_map(Other::obstacle)?;
        *lock(&self.hindrance) = Some(others.to_vec());
        Some(obstacle)
    }
}
