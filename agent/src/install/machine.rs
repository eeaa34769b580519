//! Decides what an install does next.
//!
//! Pure: no files, no clamd, no clock. What drives it feeds events in and carries out the actions
//! that come back, in order; the first that fails is the next event. The journal is the machine's
//! memory across a crash, and [`Action::Save`] stands before every effect that it speaks of. A
//! replay begins at the start of the swap, whatever had been done of it, under a new number: every
//! part of the swap is harmless when repeated, and a number that a half-done swap may have shown to
//! clamd proves nothing any more.

use clamcast_proto::receipt::{ClamdReport, InstallNumber, Outcome};
use clamcast_proto::wire::Phase;

use super::journal::{Before, Cause, Ending, Installed, Journal, Refusal, Set, Step, Way};
use super::others::Blame;
use crate::clamd::Verdict;

/// What an install is told.
#[derive(Clone, Debug)]
pub enum Event {
    /// A plan was made: from now on the stage holds files of a set that is to be installed.
    Staging,
    /// Everything is staged and the directory was looked at: go.
    Begin(Box<Journal>),
    /// The files are those that are installed, and clamd still has them: only the number moves.
    Moved(Box<Installed>, ClamdReport),
    /// Only signature files differ from what is installed, and clamd, which still has the databases,
    /// does not read such files: no reload and no new number. The journal has the number of the
    /// installed set.
    Resigned(Box<Journal>, ClamdReport),
    /// `clamscan` cannot load the staged set. Nothing was touched.
    Unloadable(Box<Refusal>, ClamdReport),
    /// All actions were carried out.
    Done,
    /// An action failed.
    Failed {
        /// What happened.
        fault: String,
        /// Whether something in the database directory may have been changed by then.
        touched: bool,
    },
    /// clamd was asked; whose fault it is where it does not have the set.
    Judged(Verdict, Blame),
    /// The clamd that was seen with the installed set is gone.
    Lost(Box<Installed>, ClamdReport),
    /// There is a journal that was not ended: from a crash, or from a disk that failed.
    Resumed {
        /// The journal.
        journal: Box<Journal>,
        /// A number above all that the journal, the canary and the gate on disk show.
        next: InstallNumber,
    },
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Make the journal durable.
    Save(Box<Journal>),
    /// The same, where a failure must not keep the old set from coming back: a replay from the
    /// journal that is on disk ends well too.
    TrySave(Box<Journal>),
    /// Put all files in place, then canary and gate.
    Swap(Box<Journal>),
    /// Put all files in place, and leave canary and gate.
    Place(Box<Journal>),
    /// Put only the next canary and gate in place.
    Renumber(InstallNumber),
    /// Make clamd reload and ask it for this journal's number.
    Prove(Box<Journal>),
    /// Remove the names that go after the proof.
    RemoveLater(Box<Journal>),
    /// Record what is installed.
    Record(Option<Box<Installed>>),
    /// Remember a refusal.
    Remember(Box<Refusal>),
    /// Remove the journal.
    Forget,
    /// Empty the stage.
    Clean,
    /// Survey the directory and begin the same set once more: clamd has accepted the previous set as
    /// a control. If this fails, the previous set stays.
    Again(Box<Set>),
    /// This is what came of it.
    Finish(Ending),
}

/// One host's install slot.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// Whether the stage holds files of a set whose install has not begun.
    is_staging: bool,
    journal: Option<Box<Journal>>,
    /// A set that waits for clamd and goes on waiting if the install that followed comes to nothing.
    waiting: Option<Box<Journal>>,
    /// What to say when the actions at hand are done and no journal holds it.
    ending: Option<Ending>,
    /// The clamd that was seen with the databases of the open journal before its files were placed: no
    /// other proof follows. A crash forgets it, and a replay proves the set like any other.
    seen: Option<ClamdReport>,
    /// The host's fault that was reported of a set that waits for clamd, so that probes which find
    /// the same fault report nothing.
    reported: Option<String>,
    /// How often in a row the way back, or tidying up, has failed.
    failures: u8,
}

/// The way back and tidying up are tried so often: one hiccup of a disk must not leave a host with
/// a set that clamd refuses. A disk that goes on failing is tried again with the next install,
/// probe or start.
const TRIES_MAX: u8 = 3;

impl Machine {
    /// How far the install under way is; idle while its set waits for clamd.
    pub fn phase(&self) -> Phase {
        match self.journal.as_ref().map(|journal| &journal.step) {
            Some(Step::Swapping) => Phase::Swapping,
            Some(Step::Proving) => Phase::Proving,
            Some(Step::Waiting | Step::Settling(_)) | None => Phase::Idle,
        }
    }

    /// The journal of an install that has not ended.
    pub fn journal(&self) -> Option<&Journal> {
        self.journal.as_deref()
    }

    /// Takes over a journal that cannot be ended now: the next install, probe or start ends it.
    pub fn hold(&mut self, journal: Journal) {
        self.journal = Some(Box::new(journal));
    }

    /// Whether the set is on disk and clamd has yet to be seen with it.
    pub fn waits_for_clamd(&self) -> bool {
        self.waiting().is_some()
    }

    /// The set that is on disk and waits for clamd.
    pub fn waiting(&self) -> Option<Installed> {
        let journal = self.journal()?;
        (journal.step == Step::Waiting).then(|| Installed {
            set: journal.set.clone(),
            install: journal.install,
            outcome: Outcome::Installed,
        })
    }

    /// Whether the set waits because of a fault of this host, which only another load can show to be
    /// gone.
    pub fn waits_for_the_host(&self) -> bool {
        self.waits_for_clamd() && self.reported.is_some()
    }

    /// Takes one event and returns what to do about it, in order.
    pub fn handle(&mut self, event: Event) -> Vec<Action> {
        match event {
            Event::Staging => {
                self.is_staging = true;
                Vec::new()
            }
            Event::Begin(mut journal) => {
                self.is_staging = false;
                self.failures = 0;
                self.reported = None;
                self.waiting = self.journal.take().filter(|old| old.step == Step::Waiting);
                if let Some(old) = &self.waiting {
                    // It is what was there, also where the record of it did not get to disk.
                    journal.before.installed.get_or_insert_with(|| Installed {
                        set: old.set.clone(),
                        install: old.install,
                        outcome: Outcome::Installed,
                    });
                }
                self.save_and_swap(journal)
            }
            Event::Moved(installed, clamd) => {
                self.is_staging = false;
                self.ending = Some(Ending {
                    outcome: Outcome::Live,
                    install: installed.install,
                    clamd,
                    error: None,
                });
                vec![Action::Record(Some(installed)), Action::Clean]
            }
            Event::Resigned(journal, clamd) => {
                self.is_staging = false;
                self.failures = 0;
                self.reported = None;
                self.ending = None;
                self.seen = Some(clamd);
                self.journal = Some(journal.clone());
                vec![save(journal.clone()), Action::Place(journal)]
            }
            Event::Unloadable(refusal, clamd) => {
                self.is_staging = false;
                self.ending = Some(Ending {
                    outcome: Outcome::Refused,
                    install: refusal.install,
                    clamd,
                    error: Some(refusal.error.clone()),
                });
                vec![Action::Remember(refusal), Action::Clean]
            }
            Event::Lost(installed, clamd) => {
                let journal = Journal {
                    files: installed.set.files(),
                    set: installed.set,
                    install: installed.install,
                    pass: 1,
                    passes: 1,
                    way: Way::Forward,
                    step: Step::Waiting,
                    touched: true,
                    whole: true,
                    control: false,
                    // It is what there is to go back to.
                    before: Before::default(),
                    obsolete: Vec::new(),
                    adopt: Vec::new(),
                    restore: Vec::new(),
                    withdraw: Vec::new(),
                    later: Vec::new(),
                };
                self.unproven(Box::new(journal), clamd)
            }
            Event::Resumed { journal, next } => self.resumed(journal, next),
            Event::Done => self.done(),
            Event::Failed { fault, touched } => self.failed(fault, touched),
            Event::Judged(verdict, blame) => self.judged(verdict, blame),
        }
    }

    fn save_and_swap(&mut self, journal: Box<Journal>) -> Vec<Action> {
        self.ending = None;
        self.seen = None;
        self.journal = Some(journal.clone());
        vec![save(journal.clone()), Action::Swap(journal)]
    }

    fn resumed(&mut self, mut journal: Box<Journal>, next: InstallNumber) -> Vec<Action> {
        self.failures = 0;
        if let Step::Settling(ending) = journal.step.clone() {
            return self.settle(journal, ending);
        }
        journal.step = Step::Swapping;
        journal.install = next;
        journal.pass = 1;
        journal.touched = true;
        self.save_and_swap(journal)
    }

    /// What comes after the actions of a step.
    fn done(&mut self) -> Vec<Action> {
        let Some(mut journal) = self.journal.take() else {
            return self.ending.take().map(Action::Finish).into_iter().collect();
        };
        match journal.step.clone() {
            Step::Swapping if let Some(clamd) = self.seen.take() => self.live(journal, clamd),
            Step::Swapping => {
                journal.step = Step::Proving;
                journal.touched = true;
                self.journal = Some(journal.clone());
                vec![save(journal.clone()), Action::Prove(journal)]
            }
            Step::Settling(ending) => vec![Action::Finish(ending)],
            Step::Proving | Step::Waiting => {
                self.journal = Some(journal);
                self.ending.take().map(Action::Finish).into_iter().collect()
            }
        }
    }

    fn failed(&mut self, fault: String, touched: bool) -> Vec<Action> {
        self.seen = None;
        let Some(journal) = self.journal.take() else {
            // The records could not be written, and nothing else was to be done.
            let mut ending = self
                .ending
                .take()
                .unwrap_or_else(|| host_fault(InstallNumber::NONE, &fault));
            ending.error = Some(joined(ending.error.take(), &fault));
            return vec![Action::Finish(ending)];
        };
        match (&journal.way, &journal.step) {
            // Decided: what is not tidy by now is tried again with the next install or start.
            (_, Step::Settling(ending)) => {
                let mut ending = ending.clone();
                if self.may_try_again() {
                    if matches!(
                        &journal.way,
                        Way::Back {
                            cause: Cause::Doubted(_),
                            ..
                        }
                    ) {
                        // It is why the set is not tried again.
                        ending.error = Some(joined(ending.error.take(), &fault));
                    }
                    return self.settle(journal, ending);
                }
                ending.error = Some(joined(ending.error.take(), &fault));
                self.journal = Some(journal);
                vec![Action::Finish(ending)]
            }
            (_, Step::Waiting) => {
                self.journal = Some(journal);
                let ending = self.ending.take();
                ending.map(Action::Finish).into_iter().collect()
            }
            (Way::Forward, Step::Swapping) if !journal.touched && !touched => {
                let ending = host_fault(journal.install, &fault);
                self.nothing_happened(journal, ending)
            }
            // It is tried again with the next probe, install or start.
            (Way::Forward, Step::Swapping | Step::Proving)
                if journal.whole && journal.before.is_empty() =>
            {
                let ending = host_fault(journal.install, &fault);
                self.journal = Some(journal);
                vec![Action::Finish(ending)]
            }
            (Way::Forward, Step::Swapping | Step::Proving) => {
                self.turn_back(journal, Cause::HostFault(fault))
            }
            (Way::Back { .. }, Step::Swapping | Step::Proving) if self.may_try_again() => {
                let mut journal = journal;
                journal.install = after(journal.install);
                journal.pass = 1;
                journal.passes = 2; // nobody knows which gate is in place
                journal.step = Step::Swapping;
                self.save_and_swap(journal)
            }
            (Way::Back { cause, tried }, Step::Swapping | Step::Proving) => {
                let ending = Ending {
                    outcome: outcome_of(cause),
                    install: *tried,
                    clamd: ClamdReport::default(),
                    error: Some(format!(
                        "{}; the previous set is not back yet: {fault}",
                        reason_of(cause)
                    )),
                };
                self.journal = Some(journal);
                vec![Action::Finish(ending)]
            }
        }
    }

    fn may_try_again(&mut self) -> bool {
        self.failures += 1;
        self.failures < TRIES_MAX
    }

    fn judged(&mut self, verdict: Verdict, blame: Blame) -> Vec<Action> {
        self.failures = 0;
        let waiting = self.waits_for_clamd();
        let Some(mut journal) = self.journal.take() else {
            return Vec::new();
        };
        if !matches!(journal.step, Step::Proving | Step::Waiting) {
            self.journal = Some(journal); // a straggler: nobody is being asked
            return Vec::new();
        }
        match (verdict, blame) {
            (Verdict::Live(_), _) if journal.pass < journal.passes => {
                journal.pass += 1;
                journal.install = after(journal.install);
                journal.step = Step::Swapping;
                self.journal = Some(journal.clone());
                let number = journal.install;
                vec![save(journal), Action::Renumber(number)]
            }
            (Verdict::Live(clamd), _) => self.live(journal, clamd),
            (
                Verdict::Refused { report: clamd, .. }
                | Verdict::Unproven(clamd)
                | Verdict::Absent(clamd),
                Blame::Host(reason),
            ) => self.hindered_by_the_host(journal, reason.clone(), reason, clamd),
            (
                Verdict::Refused { report: clamd, .. }
                | Verdict::Unproven(clamd)
                | Verdict::Absent(clamd),
                Blame::Others(reason),
            ) => self.hindered(journal, reason, clamd),
            (Verdict::Refused { reason, report, .. }, Blame::Set) => {
                self.refused(journal, Cause::Refused(reason), report)
            }
            (
                Verdict::Refused {
                    reason,
                    control,
                    report,
                    ..
                },
                Blame::Unknown,
            ) => {
                let cause = match (control, journal.control) {
                    (true, true) => Cause::Refused(format!(
                        "{reason}, twice; clamd accepted the previous set in between"
                    )),
                    (true, false) => Cause::Doubted(reason),
                    (false, _) => Cause::HostFault(format!(
                        "{reason}; nothing on this host can tell whether the set is at fault: \
                         install clamscan, or look at clamd's memory and limits"
                    )),
                };
                self.refused(journal, cause, report)
            }
            (Verdict::Unproven(_) | Verdict::Absent(_), _) if waiting => {
                self.journal = Some(journal);
                Vec::new()
            }
            (Verdict::Unproven(clamd) | Verdict::Absent(clamd), _) => self.unproven(journal, clamd),
        }
    }

    fn live(&mut self, journal: Box<Journal>, clamd: ClamdReport) -> Vec<Action> {
        self.reported = None;
        let install = journal.install;
        let ending = match &journal.way {
            Way::Forward => Ending {
                outcome: Outcome::Live,
                install,
                clamd,
                error: None,
            },
            Way::Back { cause, tried } => Ending {
                outcome: outcome_of(cause),
                install: *tried,
                clamd,
                error: Some(format!(
                    "{}; the previous set is back and live as install {install}",
                    reason_of(cause)
                )),
            },
        };
        match &journal.way {
            // A newer offer that is staged is tried instead.
            Way::Back {
                cause: Cause::Doubted(_),
                ..
            } if !journal.control && !self.is_staging => {
                self.settle_and_begin_again(journal, ending)
            }
            Way::Forward | Way::Back { .. } => self.settle(journal, ending),
        }
    }

    /// The control has succeeded: the previous set is installed and live, and nothing is remembered
    /// against the new one, which is still staged. A crash from here on leaves just that, and the
    /// master offers the new set again.
    fn settle_and_begin_again(&mut self, journal: Box<Journal>, ending: Ending) -> Vec<Action> {
        let set = Box::new(journal.set.clone());
        let mut actions = self.settle(journal, ending);
        actions.retain(|action| *action != Action::Clean);
        actions.push(Action::Again(set));
        actions
    }

    fn refused(&mut self, journal: Box<Journal>, cause: Cause, clamd: ClamdReport) -> Vec<Action> {
        let reason = reason_of(&cause).to_owned();
        match (&journal.way, &cause) {
            (Way::Forward, Cause::Refused(_)) if journal.before.is_empty() => {
                // clamd does not even start without databases: nothing is taken away.
                let ending = Ending {
                    outcome: Outcome::Refused,
                    install: journal.install,
                    clamd,
                    error: Some(format!("{reason}; there is no previous set to go back to")),
                };
                self.settle(journal, ending)
            }
            (Way::Forward, _) if journal.before.is_empty() => {
                let said = format!("{reason}; there is no previous set to tell why");
                self.hindered_by_the_host(journal, reason, said, clamd)
            }
            (Way::Forward, _) => self.turn_back(journal, cause),
            (Way::Back { .. }, _) => {
                self.hindered_by_the_host(journal, reason.clone(), reason, clamd)
            }
        }
    }

    /// A fault of this host: the set stays, and a probe that finds the same `fault` reports nothing.
    fn hindered_by_the_host(
        &mut self,
        journal: Box<Journal>,
        fault: String,
        said: String,
        clamd: ClamdReport,
    ) -> Vec<Action> {
        if journal.step == Step::Waiting && self.reported.as_ref() == Some(&fault) {
            self.journal = Some(journal);
            return Vec::new();
        }
        self.reported = Some(fault);
        self.hindered(journal, said, clamd)
    }

    /// clamd would load no other set either: this one stays, and probing goes on with it.
    fn hindered(
        &mut self,
        journal: Box<Journal>,
        reason: String,
        clamd: ClamdReport,
    ) -> Vec<Action> {
        let Way::Back { cause, tried } = &journal.way else {
            let ending = Ending {
                outcome: Outcome::HostFault,
                install: journal.install,
                clamd,
                error: Some(reason),
            };
            return self.wait(journal, ending);
        };
        let ending = Ending {
            outcome: outcome_of(cause),
            install: *tried,
            clamd,
            error: Some(format!(
                "{}; the previous set is back, and clamd does not load it either: {reason}",
                reason_of(cause)
            )),
        };
        self.wait_with_the_old_set(journal, ending)
    }

    fn unproven(&mut self, journal: Box<Journal>, clamd: ClamdReport) -> Vec<Action> {
        if let Way::Back { cause, tried } = &journal.way {
            let ending = Ending {
                outcome: outcome_of(cause),
                install: *tried,
                clamd,
                error: Some(format!(
                    "{}; the previous set is back, not yet proven",
                    reason_of(cause)
                )),
            };
            return self.wait_with_the_old_set(journal, ending);
        }
        let ending = Ending {
            outcome: Outcome::Installed,
            install: journal.install,
            error: clamd.note.clone(),
            clamd,
        };
        self.wait(journal, ending)
    }

    /// Ends an install whose set is on disk and not yet seen in clamd.
    fn wait(&mut self, mut journal: Box<Journal>, ending: Ending) -> Vec<Action> {
        self.ending = Some(ending);
        journal.step = Step::Waiting;
        journal.whole = true;
        let installed = Installed {
            set: journal.set.clone(),
            install: journal.install,
            outcome: Outcome::Installed,
        };
        self.journal = Some(journal.clone());
        vec![
            Action::Save(journal),
            Action::Record(Some(Box::new(installed))),
        ]
    }

    /// The outcome is decided and what it means for the records follows from the journal.
    fn settle(&mut self, journal: Box<Journal>, ending: Ending) -> Vec<Action> {
        if journal.way == Way::Forward && ending.outcome == Outcome::HostFault {
            return self.nothing_happened(journal, ending);
        }
        let install = journal.install;
        let installed = match (&journal.way, ending.outcome) {
            (Way::Forward, outcome) => Some(Installed {
                set: journal.set.clone(),
                install,
                outcome,
            }),
            (Way::Back { .. }, _) => journal.before.installed.clone().map(|before| Installed {
                install,
                outcome: Outcome::Live,
                ..before
            }),
        };
        let mut first = Vec::new();
        if ending.outcome == Outcome::Live {
            first.push(Action::RemoveLater(journal.clone()));
        }
        first.extend(
            refusal_of(&journal, &ending).map(|refusal| Action::Remember(Box::new(refusal))),
        );
        self.settle_with(journal, ending, installed, first)
    }

    fn settle_with(
        &mut self,
        mut journal: Box<Journal>,
        ending: Ending,
        installed: Option<Installed>,
        first: Vec<Action>,
    ) -> Vec<Action> {
        journal.step = Step::Settling(ending);
        self.journal = Some(journal.clone());
        let mut actions = vec![Action::Save(journal)];
        actions.extend(first);
        actions.push(Action::Record(installed.map(Box::new)));
        actions.push(Action::Forget);
        if !self.is_staging {
            actions.push(Action::Clean); // else it would take away what a newer offer has staged
        }
        actions
    }

    /// Ends an install that failed before it changed anything. The journal on disk, if it got there,
    /// is of no use any more; one that stays because it cannot be removed either makes the next
    /// start install this set, which is whole.
    fn nothing_happened(&mut self, mut journal: Box<Journal>, ending: Ending) -> Vec<Action> {
        if let Some(waiting) = self.waiting.take() {
            self.ending = Some(ending);
            self.journal = Some(waiting.clone());
            return vec![Action::Save(waiting)];
        }
        journal.step = Step::Settling(ending);
        self.journal = Some(journal);
        vec![Action::Forget]
    }

    fn turn_back(&mut self, forward: Box<Journal>, cause: Cause) -> Vec<Action> {
        let withdraw: Vec<_> = forward
            .files
            .iter()
            .map(|file| file.name.clone())
            .filter(|name| !forward.before.had(name))
            .collect();
        // Where the gate of the number before may not have been in place, or names vanish, one
        // proof is not enough.
        let sure =
            withdraw.is_empty() && forward.passes == 1 && !matches!(cause, Cause::HostFault(_));
        let journal = Box::new(Journal {
            install: after(forward.install),
            pass: 1,
            passes: if sure { 1 } else { 2 },
            way: Way::Back {
                cause,
                tried: forward.install,
            },
            step: Step::Swapping,
            touched: true,
            whole: false,
            files: forward.before.files.clone(),
            withdraw,
            later: Vec::new(),
            ..*forward
        });
        self.save_and_swap(journal)
    }

    /// Ends the way back where clamd has not been seen with the old set: probing goes on with that.
    fn wait_with_the_old_set(&mut self, journal: Box<Journal>, ending: Ending) -> Vec<Action> {
        let refusal =
            refusal_of(&journal, &ending).map(|refusal| Action::Remember(Box::new(refusal)));
        let mut actions: Vec<_> = refusal.into_iter().collect();
        let Some(old) = journal.before.installed.clone() else {
            // What others had left: there is no generation to report on.
            return self.settle_with(journal, ending, None, actions);
        };
        let old = Installed {
            install: journal.install,
            outcome: Outcome::Installed,
            ..old
        };
        let waiting = Box::new(Journal {
            set: old.set.clone(),
            way: Way::Forward,
            step: Step::Waiting,
            whole: true,
            control: false,
            // If clamd refuses this one too, there is nothing further back.
            before: Before::default(),
            obsolete: Vec::new(),
            adopt: Vec::new(),
            restore: Vec::new(),
            withdraw: Vec::new(),
            ..*journal
        });
        self.ending = Some(ending);
        self.journal = Some(waiting.clone());
        actions.push(Action::Save(waiting));
        actions.push(Action::Record(Some(Box::new(old))));
        actions
    }
}

/// The way back does not depend on the journal: a replay of the one on disk ends well too.
fn save(journal: Box<Journal>) -> Action {
    match journal.way {
        Way::Forward => Action::Save(journal),
        Way::Back { .. } => Action::TrySave(journal),
    }
}

/// The number after one that [`Event::Resumed`] or a survey gave.
fn after(install: InstallNumber) -> InstallNumber {
    let next = install.next();
    next.expect("a new number leaves room for those of its proofs and of the way back")
}

fn host_fault(install: InstallNumber, fault: &str) -> Ending {
    Ending {
        outcome: Outcome::HostFault,
        install,
        clamd: ClamdReport::default(),
        error: Some(fault.to_owned()),
    }
}

fn outcome_of(cause: &Cause) -> Outcome {
    match cause {
        Cause::Refused(_) => Outcome::Refused,
        // The set is no worse than the one before it, or nobody knows.
        Cause::Doubted(_) | Cause::HostFault(_) => Outcome::HostFault,
    }
}

fn reason_of(cause: &Cause) -> &str {
    match cause {
        Cause::Refused(reason) | Cause::Doubted(reason) | Cause::HostFault(reason) => reason,
    }
}

/// A refusal is remembered; a host's fault may be mended, and then the same set is good.
fn refusal_of(journal: &Journal, ending: &Ending) -> Option<Refusal> {
    (ending.outcome == Outcome::Refused).then(|| Refusal {
        position: journal.set.manifest.position(),
        manifest_sha256: journal.set.sha256(),
        install: ending.install,
        error: ending.error.clone().unwrap_or_default(),
    })
}

fn joined(error: Option<String>, fault: &str) -> String {
    match error {
        Some(error) => format!("{error}; {fault}"),
        None => fault.to_owned(),
    }
}

#[cfg(test)]
mod walk;

#[cfg(test)]
mod tests {
    use super::super::lab::manifest;
    use super::*;
    use crate::clamd::LoadTest;
    use crate::install::journal::Set;
    use clamcast_proto::receipt::FileState;

    /// Of an install on a host that has a set, or has none.
    pub(super) fn journal(before: bool) -> Box<Journal> {
        let set = |generation, line: &str| Set::from(&manifest(generation, line));
        let new = set(2, "daily.cld=two");
        let old = set(1, "daily.cvd=one");
        let before = match before {
            true => Before {
                files: old.files(),
                installed: Some(Installed {
                    set: old,
                    install: InstallNumber(1),
                    outcome: Outcome::Live,
                }),
                ..Before::default()
            },
            false => Before::default(),
        };
        let passes = if before.files.is_empty() { 2 } else { 1 };
        let files: Vec<FileState> = new.files();
        Box::new(Journal {
            set: new,
            install: InstallNumber(2),
            pass: 1,
            passes,
            way: Way::Forward,
            step: Step::Swapping,
            touched: false,
            whole: false,
            control: false,
            files,
            before,
            obsolete: Vec::new(),
            adopt: Vec::new(),
            restore: Vec::new(),
            withdraw: Vec::new(),
            later: Vec::new(),
        })
    }

    fn check(events: Vec<Event>, finish: &str) {
        let mut machine = Machine::default();
        let mut said = String::new();
        for event in events {
            let mut event = Some(event);
            while let Some(now) = event.take() {
                for action in machine.handle(now) {
                    event = Some(Event::Done);
                    match action {
                        Action::Prove(_) => event = None,
                        Action::Again(_) => event = Some(begin_again(&machine)),
                        Action::Finish(ending) => {
                            event = None;
                            said = format!("{} {}", ending.outcome, ending.install);
                        }
                        Action::Save(_)
                        | Action::TrySave(_)
                        | Action::Swap(_)
                        | Action::Place(_)
                        | Action::Renumber(_)
                        | Action::RemoveLater(_)
                        | Action::Record(_)
                        | Action::Remember(_)
                        | Action::Forget
                        | Action::Clean => {}
                    }
                }
            }
        }
        assert_eq!(said, finish);
    }

    fn begin(before: bool) -> Event {
        Event::Begin(journal(before))
    }

    /// The same set once more, above every number so far.
    pub(super) fn begin_again(machine: &Machine) -> Event {
        let before = machine.journal().map(|journal| journal.install);
        let install = after(before.unwrap_or_default());
        Event::Begin(Box::new(Journal {
            install,
            control: true,
            ..*journal(true)
        }))
    }

    fn judged(verdict: fn(ClamdReport) -> Verdict) -> Event {
        Event::Judged(verdict(ClamdReport::default()), Blame::Set)
    }

    fn blamed(blame: Blame) -> Event {
        Event::Judged(refused(ClamdReport::default()), blame)
    }

    fn refused(report: ClamdReport) -> Verdict {
        Verdict::Refused {
            reason: "bad".into(),
            scan: LoadTest::Missing("none".into()),
            control: true,
            report,
        }
    }

    /// As a clamd that is dead after a failed load.
    fn refused_for_good(report: ClamdReport) -> Verdict {
        Verdict::Refused {
            reason: "bad".into(),
            scan: LoadTest::Missing("none".into()),
            control: false,
            report,
        }
    }

    #[test]
    fn each_outcome_is_what_the_design_says() {
        check(vec![begin(true), judged(Verdict::Live)], "live 2");
        check(vec![begin(true), judged(Verdict::Absent)], "installed 2");
        check(vec![begin(true), judged(Verdict::Unproven)], "installed 2");
        check(vec![begin(true), judged(refused)], "");
        check(
            vec![
                begin(true),
                judged(refused),
                judged(Verdict::Live),
                judged(Verdict::Live),
            ],
            "refused 2",
        );
        check(
            vec![begin(true), judged(refused), judged(Verdict::Absent)],
            "refused 2",
        );
    }

    #[test]
    fn what_waits_is_gone_back_to_also_where_its_record_did_not_get_to_disk() {
        let mut machine = Machine::default();
        machine.handle(begin(false));
        machine.handle(Event::Done);
        let first = machine.journal().unwrap().set.clone();
        let saved = machine.handle(judged(Verdict::Absent));
        assert!(matches!(saved[..], [Action::Save(_), Action::Record(_)]));
        machine.handle(Event::Failed {
            fault: "no space".into(),
            touched: false,
        });
        machine.handle(begin(false)); // the look found no record
        let before = machine.journal().unwrap().before.installed.clone();
        assert_eq!(before.map(|installed| installed.set), Some(first));
    }

    #[test]
    fn what_a_file_of_others_does_is_no_refusal() {
        let others = || blamed(Blame::Others("theirs.ndb".into()));
        check(vec![begin(true), others()], "host_fault 2");
        check(vec![begin(false), others()], "host_fault 2");
        check(vec![begin(true), others(), judged(Verdict::Live)], "live 2");
        check(
            vec![
                begin(true),
                others(),
                judged(refused),
                judged(Verdict::Live),
                judged(Verdict::Live),
            ],
            "refused 2",
        );
        // That it is this set's was certain.
        check(vec![begin(true), judged(refused), others()], "refused 2");
    }

    fn unknown() -> Event {
        blamed(Blame::Unknown)
    }

    #[test]
    fn without_clamscan_a_set_is_refused_if_clamd_rejects_it_before_and_after_a_control() {
        let (back, live) = (|| judged(Verdict::Live), || judged(Verdict::Live));
        check(
            vec![
                begin(true),
                unknown(),
                back(),
                live(),
                unknown(),
                back(),
                live(),
            ],
            "refused 5",
        );
        // It is the second try that counts.
        check(
            vec![begin(true), unknown(), back(), live(), live()],
            "live 5",
        );
        let silent = || judged(Verdict::Unproven);
        check(
            vec![begin(true), unknown(), back(), live(), silent()],
            "installed 5",
        );
    }

    #[test]
    fn without_an_accepted_control_a_set_that_clamd_rejects_is_the_hosts_fault() {
        let (silent, absent) = (|| judged(Verdict::Unproven), || judged(Verdict::Absent));
        check(vec![begin(true), unknown(), unknown()], "host_fault 2");
        check(vec![begin(true), unknown(), silent()], "host_fault 2");
        check(vec![begin(true), unknown(), absent()], "host_fault 2");
        check(vec![begin(false), unknown()], "host_fault 2");
        // clamd is dead: there is no control.
        let dead = || Event::Judged(refused_for_good(ClamdReport::default()), Blame::Unknown);
        let live = || judged(Verdict::Live);
        check(vec![begin(true), dead(), live(), live()], "host_fault 2");
    }

    #[test]
    fn a_control_ends_without_a_second_try_where_a_newer_offer_is_staged() {
        let mut machine = Machine::default();
        machine.handle(begin(true));
        machine.handle(Event::Done);
        machine.handle(Event::Staging);
        machine.handle(unknown());
        machine.handle(Event::Done);
        let actions = [machine.handle(judged(Verdict::Live)), {
            machine.handle(Event::Done);
            machine.handle(Event::Done);
            machine.handle(judged(Verdict::Live))
        }]
        .concat();
        let again = |action: &Action| matches!(action, Action::Again(_) | Action::Clean);
        assert!(!actions.iter().any(again), "{actions:#?}");
    }

    #[test]
    fn a_fault_of_the_host_keeps_the_set_and_is_reported_once() {
        let host = |why: &str| blamed(Blame::Host(why.into()));
        check(vec![begin(true), host("memory")], "host_fault 2");
        check(
            vec![begin(true), host("memory"), judged(Verdict::Live)],
            "live 2",
        );
        let mut machine = Machine::default();
        machine.handle(begin(true));
        machine.handle(Event::Done);
        machine.handle(host("memory"));
        machine.handle(Event::Done);
        assert!(machine.waits_for_the_host());
        assert_eq!(machine.handle(host("memory")), []);
        assert_ne!(machine.handle(host("rights")), []);
    }

    #[test]
    fn without_a_gate_it_is_proven_twice() {
        check(vec![begin(false), judged(Verdict::Live)], "");
        check(
            vec![begin(false), judged(Verdict::Live), judged(Verdict::Live)],
            "live 3",
        );
    }

    #[test]
    fn a_refused_first_set_stays() {
        check(vec![begin(false), judged(refused)], "refused 2");
    }

    #[test]
    fn an_installed_set_becomes_live_when_clamd_comes() {
        check(
            vec![begin(true), judged(Verdict::Absent), judged(Verdict::Live)],
            "live 2",
        );
    }

    #[test]
    fn a_set_that_was_whole_is_not_taken_away_by_a_fault_after_a_restart() {
        let Some(installed) = journal(true).before.installed else {
            unreachable!("one is installed")
        };
        let mut machine = Machine::default();
        machine.handle(Event::Lost(Box::new(installed), ClamdReport::default()));
        let journal = Box::new(machine.journal().cloned().expect("it waits for clamd"));
        let mut machine = Machine::default();
        machine.handle(Event::Resumed {
            journal,
            next: InstallNumber(2),
        });
        let (fault, touched) = ("no space".to_owned(), true);
        let actions = machine.handle(Event::Failed { fault, touched });
        let [Action::Finish(ending)] = &actions[..] else {
            panic!("{actions:#?}");
        };
        assert_eq!(ending.outcome, Outcome::HostFault);
        assert!(machine.journal().is_some(), "it is tried again");
    }
}
