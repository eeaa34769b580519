//! Asks clamd what it makes of a set, and says whose fault it is where that is nothing.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;

use clamcast_daemon::clamscan;
use clamcast_proto::DatabaseName;
use clamcast_proto::receipt::{ClamdReport, ClamdState, FileState, InstallNumber, Outcome};
use clamcast_proto::wire::Phase;
use tokio::sync::OwnedMutexGuard;
use tokio_util::sync::CancellationToken;

use super::disk::{Dir, HostFault};
use super::journal::{Installed, Journal, Step, Way};
use super::machine::Event;
use super::others::{Blame, Other};
use super::{Completed, Installer, Shared, lock, swap};
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

/// What a load test with `clamscan` came to.
pub(super) enum Tried {
    /// It loads, beside these files of others; or nobody can tell.
    Loads(Vec<Other>),
    /// It loads, but for what others have beside it: it may stand there, and clamd is not asked.
    Alone,
    /// The set does not: there is evidence against it.
    Bad(String),
    /// For a fault of this host there is no telling, or no loading.
    Hindered(String),
}

/// What loading the previous set with `clamscan` shows about its verdict on the new one.
enum Control {
    /// `clamscan` loads the previous set, or there is none: its verdict stands.
    Stands,
    /// `clamscan` loads neither: this host is at fault.
    Fails(String),
    /// It could not be tried.
    Impossible(String),
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
        // It may run clamscan, which takes as long as a load.
        let probing = self.shared.prover.probe(journal.install);
        let verdict = stop.run_until_cancelled(probing).await?;
        let (guard, others) = self.others(guard, &journal).await;
        let hindrance = lock(&self.shared.hindrance).clone();
        let waits_for_the_host = lock(&self.shared.machine).waits_for_the_host();
        let again = match &verdict {
            Verdict::Live(_) => false,
            _ if hindrance.is_some() && hindrance.as_ref() == others.as_ref().ok() => return None,
            // What clamd's log says may be about what is gone, or names nobody.
            _ if hindrance.is_some() => true,
            Verdict::Refused { .. } => {
                waits_for_the_host || !others.as_ref().is_ok_and(Vec::is_empty)
            }
            Verdict::Unproven(report) => report.state == ClamdState::Up,
            Verdict::Absent(_) => false,
        };
        let (guard, event) = if again {
            self.prove(guard, &journal, others, &mut None, &stop, &|_| ())
                .await
        } else {
            self.judged(guard, verdict, None).await
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
                let said = match self.load_test(Dir::Trial).await {
                    LoadTest::Passed | LoadTest::Hindered(_) | LoadTest::Missing(_) => {
                        return (guard, Tried::Loads(others));
                    }
                    LoadTest::Failed(said) => said,
                };
                let ours = swap::names_of(journal).collect();
                match Blame::of_failure(&said, &ours, &others) {
                    Blame::Set => return self.weighed(guard, journal, said).await,
                    Blame::Others(reason) if !needed => return (guard, Tried::Hindered(reason)),
                    Blame::Others(reason) => reason,
                    Blame::Host(_) | Blame::Unknown => {
                        format!("clamscan cannot load the set, and names no file of it: {said}")
                    }
                }
            }
        };
        let (guard, alone) = self.trial_of(guard, journal, Beside::Nothing).await;
        if let Err(fault) = alone {
            return (guard, Tried::Hindered(fault));
        }
        let tried = match self.load_test(Dir::Trial).await {
            LoadTest::Failed(said) => {
                let ours = swap::names_of(journal).collect();
                if Blame::of_failure(&said, &ours, &[]) == Blame::Set {
                    return self.weighed(guard, journal, said).await;
                }
                Tried::Hindered(hindrance)
            }
            LoadTest::Passed if needed => Tried::Alone,
            LoadTest::Passed | LoadTest::Hindered(_) | LoadTest::Missing(_) => {
                Tried::Hindered(hindrance)
            }
        };
        (guard, tried)
    }

    /// Whether the verdict of `clamscan`, which names a file of the set, is evidence against the
    /// set. The files are still in the trial directory.
    async fn weighed(
        &self,
        guard: OwnedMutexGuard<()>,
        journal: &Journal,
        said: String,
    ) -> (OwnedMutexGuard<()>, Tried) {
        let (files, reason) = (journal.files.clone(), said.clone());
        let (guard, doubt) = self
            .blocking(guard, move |shared| {
                shared.doubt_about(&reason, &files, Dir::Trial)
            })
            .await;
        if let Some(doubt) = doubt {
            return (guard, Tried::Hindered(format!("{doubt}: {said}")));
        }
        let (guard, control) = self.control(guard, journal).await;
        let tried = match control {
            Control::Stands => Tried::Bad(said),
            Control::Fails(why) | Control::Impossible(why) => {
                Tried::Hindered(format!("clamscan: {said}; {why}"))
            }
        };
        (guard, tried)
    }

    /// Loads the previous set with `clamscan`, if there is one that the agent can read and memory
    /// permits.
    async fn control(
        &self,
        guard: OwnedMutexGuard<()>,
        journal: &Journal,
    ) -> (OwnedMutexGuard<()>, Control) {
        let before = &journal.before;
        if before.files.is_empty() && !before.others {
            return (guard, Control::Stands);
        }
        let journal = journal.clone();
        let (guard, made) = self
            .blocking(guard, move |shared| {
                let others = shared.swap().others(&journal);
                let others = others.map_err(|fault| chain(&fault))?;
                let made = shared.swap().make_control(&journal.before, &others);
                made.map_err(|fault| chain(&fault))?;
                let directory = shared.tree.directory(Dir::Trial);
                shared
                    .prover
                    .memory_shortage(&directory)
                    .map_or(Ok(()), Err)
            })
            .await;
        let control = match made {
            Err(why) => Control::Impossible(format!(
                "the previous set could not be tried with clamscan as a control: {why}"
            )),
            Ok(()) => match self.load_test(Dir::Trial).await {
                LoadTest::Passed => Control::Stands,
                LoadTest::Failed(why) | LoadTest::Hindered(why) | LoadTest::Missing(why) => {
                    Control::Fails(format!(
                        "clamscan does not load the previous set either ({why}): look at this \
                         host's memory and limits"
                    ))
                }
            },
        };
        (guard, control)
    }

    /// Loads a directory with `clamscan`.
    async fn load_test(&self, directory: Dir) -> LoadTest {
        let directory = self.shared.tree.directory(directory);
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
        self.judged(guard, verdict, others.ok()).await
    }

    /// What a verdict means for the set that is being proven: see [`Shared::judged`]. Where
    /// `clamscan` is the evidence, the previous set is the control.
    async fn judged(
        &self,
        guard: OwnedMutexGuard<()>,
        verdict: Verdict,
        before: Option<Vec<Other>>,
    ) -> (OwnedMutexGuard<()>, Event) {
        let (guard, event) = self
            .blocking(guard, move |shared| shared.judged(verdict, before))
            .await;
        let open = lock(&self.shared.machine).journal().cloned();
        let (
            Some(open),
            Event::Judged(
                Verdict::Refused {
                    reason,
                    scan,
                    report,
                    ..
                },
                Blame::Set,
            ),
        ) = (open, &event)
        else {
            return (guard, event);
        };
        if open.way != Way::Forward {
            return (guard, event);
        }
        let (guard, control) = self.control(guard, &open).await;
        let event = match control {
            Control::Stands => event,
            Control::Fails(why) => Event::Judged(
                Verdict::Unproven(report.clone()),
                Blame::Host(format!("{reason}; {why}")),
            ),
            // Not evidence enough, and clamd could not start with the set: the previous one comes
            // back, which no other fault of the host asks for.
            Control::Impossible(why) => Event::Judged(
                Verdict::Refused {
                    reason: format!("{reason}; {why}"),
                    scan: scan.clone(),
                    control: false,
                    report: report.clone(),
                },
                Blame::Unknown,
            ),
        };
        (guard, event)
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
            LoadTest::Hindered(_) | LoadTest::Missing(_) => {}
            LoadTest::Failed(said) => {
                let refused = Verdict::Refused {
                    reason: format!("clamscan: {said}"),
                    scan: LoadTest::Failed(said),
                    control: false,
                    report,
                };
                let (guard, event) = self.judged(guard, refused, Some(others)).await;
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
        let verdict = unless_changed_beside(verdict, &open, changed);
        let blame = match &others {
            Ok(others) => Blame::of(&verdict, &ours, others),
            Err(fault) => {
                tracing::warn!(error = chain(fault), "cannot look for databases of others");
                Blame::Unknown
            }
        };
        let blame = match &verdict {
            Verdict::Refused { reason, scan, .. } if open.way == Way::Forward => {
                self.unless_doubtful(blame, reason, scan, &open)
            }
            Verdict::Refused { .. }
            | Verdict::Live(_)
            | Verdict::Unproven(_)
            | Verdict::Absent(_) => blame,
        };
        let met = before.or(others.ok());
        *lock(&self.hindrance) = met.filter(|_| matches!(blame, Blame::Others(_)));
        Event::Judged(verdict, blame)
    }

    /// Nobody blames a set whose files are not what was published: then this host is at fault.
    fn unless_doubtful(
        &self,
        blame: Blame,
        reason: &str,
        scan: &LoadTest,
        open: &Journal,
    ) -> Blame {
        let said = match (&blame, scan) {
            (Blame::Others(_) | Blame::Host(_), _) => return blame,
            (Blame::Set, LoadTest::Failed(said)) => said,
            (Blame::Set | Blame::Unknown, _) => "",
        };
        match self.doubt_about(said, &open.files, Dir::Databases) {
            None => blame,
            Some(doubt) => {
                tracing::warn!(doubt, reason, "clamd rejects what was not published");
                Blame::Host(format!("{doubt}: {reason}"))
            }
        }
    }

    /// Reads every byte of these files in `dir`: why they are no evidence against the set. Of a file
    /// that `said` does not name a failed read says nothing.
    fn doubt_about(&self, said: &str, files: &[FileState], dir: Dir) -> Option<String> {
        let named = clamscan::culprit(said, files.iter().map(|file| file.name.as_str()));
        files.iter().find_map(|file| {
            let check = self.check_in(dir, file.clone());
            let name = &file.name;
            match check.error {
                Some(error) if named == Some(name.as_str()) => {
                    Some(format!("{name} cannot be read again ({error})"))
                }
                None if !check.is_right() => Some(format!("{name} was changed by somebody")),
                Some(_) | None => None,
            }
        })
    }

    /// What of these files of others `clamscan` cannot be given in clamd's place. Then they are kept
    /// until they change.
    fn obstacle(&self, others: &[Other]) -> Option<String> {
        let obstacle = others.iter().find_map(Other::obstacle)?;
        *lock(&self.hindrance) = Some(others.to_vec());
        Some(obstacle)
    }
}

/// Where databases beside the set were changed meanwhile, clamd's error says nothing about those
/// that are there now: probing goes on.
fn unless_changed_beside(verdict: Verdict, open: &Journal, changed: bool) -> Verdict {
    match verdict {
        Verdict::Refused { reason, report, .. } if changed && open.way == Way::Forward => {
            let note = format!("a database beside the set was changed by somebody: {reason}");
            tracing::warn!(note, "clamd rejects what is not there any more");
            let note = Some(note);
            Verdict::Unproven(ClamdReport { note, ..report })
        }
        Verdict::Refused { .. } | Verdict::Live(_) | Verdict::Unproven(_) | Verdict::Absent(_) => {
            verdict
        }
    }
}
