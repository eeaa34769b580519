//! What the installer knows, and what follows from it.
//!
//! Pure: no disk, no clamd, no clock. The installer's one lock guards an [`Engine`]. The holder of the
//! lock feeds it events and carries out the actions that come back. Readers use the published
//! [`Standing`].

use clamcast_proto::Digest;
use clamcast_proto::receipt::{ClamdReport, ClamdState, FileState, InstallNumber, Outcome};
use clamcast_proto::wire::Phase;

use super::journal::{Ending, Installed, Journal, Refusal, Set, Step};
use super::machine::{Action, Event, Machine};
use super::others::Other;
use super::survey::{Numbers, Survey};
use crate::clamd::Verdict;

/// The state of a host's installs.
#[derive(Debug, Default)]
pub(super) struct Engine {
    machine: Machine,
    installed: Option<Installed>,
    /// Files were seen other than installed since the last proof: clamd may have loaded them.
    is_suspect: bool,
    /// Files of others that were there when clamd loaded nothing for what may be their fault. While
    /// they are the same, another try costs a load and shows nothing new.
    hindrance: Option<Vec<Other>>,
    /// An install that the last run did not end, and how far opening the directory has brought it.
    opened: Option<(Set, Next)>,
    /// The phase of the install under way. A probe is no install.
    phase: Phase,
}

/// The state of the installer, for readers that do not wait for its lock.
#[derive(Clone, Debug)]
pub struct Standing {
    /// What is installed.
    pub installed: Option<Installed>,
    /// The manifest that is installed, unless another set is being put in its place, on the disk or,
    /// where that failed, in the journal.
    pub settled: Option<Digest>,
    /// The phase of the install under way.
    pub phase: Phase,
    /// Whether the set is on disk and clamd has yet to be seen with it.
    pub waits_for_clamd: bool,
    /// Whether an install has not ended: its set waits for clamd, or the disk failed in the middle or at
    /// the end. A probe goes on with it.
    pub is_unproven: bool,
}

impl Default for Standing {
    fn default() -> Self {
        Engine::default().standing()
    }
}

impl Standing {
    /// Whether this set is the installed one.
    pub fn has(&self, set: &Digest) -> bool {
        let installed = self.installed.as_ref();
        installed.is_some_and(|installed| installed.set.sha256() == *set)
    }

    /// Whether this set is on disk and waits for clamd. Then it need not be installed again: probes go
    /// on.
    pub fn stays(&self, set: &Digest) -> bool {
        self.waits_for_clamd && self.has(set)
    }
}

/// What an install needs after its work on the disk.
#[derive(Debug)]
pub(super) enum Next {
    Prove(Box<Journal>),
    Finish(Ending),
    Nothing,
}

/// What an install begins with.
pub(super) enum Prepared {
    Answered(Refusal),
    /// The files in the directory are those of the set: if clamd still has them, only the record
    /// changes.
    InPlace(Box<Installed>, Box<Journal>),
    /// Put this set in place. With the number of the installed set, if only signature files differ.
    Go(Box<Journal>, Option<InstallNumber>),
}

/// What a probe of clamd leads to.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Probed {
    /// The same files of others as before keep clamd from loading the set.
    Known,
    /// clamd is to load the directory once more.
    Again,
    /// The answer itself is the verdict.
    Judge,
}

impl Engine {
    pub(super) fn new(installed: Option<Installed>) -> Self {
        Self {
            installed,
            ..Self::default()
        }
    }

    /// The state to publish.
    pub(super) fn standing(&self) -> Standing {
        Standing {
            installed: self.installed.clone(),
            settled: self.settled(),
            phase: self.phase,
            waits_for_clamd: self.machine.waits_for_clamd(),
            is_unproven: self.journal().is_some(),
        }
    }

    pub(super) fn installed(&self) -> Option<&Installed> {
        self.installed.as_ref()
    }

    /// The journal of an install that has not ended.
    pub(super) fn journal(&self) -> Option<&Journal> {
        self.machine.journal()
    }

    fn settled(&self) -> Option<Digest> {
        let installed = self.installed.as_ref()?.set.sha256();
        let journal = self.journal().map(|journal| journal.set.sha256());
        journal
            .is_none_or(|set| set == installed)
            .then_some(installed)
    }

    /// Takes one event and returns what to do about it: see [`Machine::handle`].
    pub(super) fn handle(&mut self, event: Event) -> Vec<Action> {
        let actions = self.machine.handle(event);
        // It is in the directory, also if the record of it does not get to disk.
        if let Some(waiting) = self.machine.waiting() {
            self.installed = Some(waiting);
        }
        // The phase of an install holds until its receipt is made.
        if self.phase != Phase::Idle && self.machine.phase() != Phase::Idle {
            self.phase = self.machine.phase();
        }
        actions
    }

    /// An install begins.
    pub(super) fn begin(&mut self, phase: Phase) {
        self.phase = phase;
    }

    /// The install under way, if there is one, enters a phase that the machine does not know.
    pub(super) fn enter(&mut self, phase: Phase) {
        if self.phase != Phase::Idle {
            self.phase = phase;
        }
    }

    /// The install has ended.
    pub(super) fn end(&mut self) {
        self.phase = Phase::Idle;
    }

    /// The machine has decided what is installed.
    pub(super) fn recorded(&mut self, installed: Option<Installed>) {
        self.installed = installed;
    }

    /// A plan was made. From now on the stage holds files of a set that is to be installed.
    pub(super) fn begin_staging(&mut self) {
        self.machine.handle(Event::Staging);
    }

    // An install that did not end.

    /// Keeps a journal that cannot be ended now for the next probe or install.
    pub(super) fn hold(&mut self, journal: Journal) {
        self.machine.hold(journal);
    }

    /// Opening the directory has resumed an install. `next` is still to be done.
    pub(super) fn opened(&mut self, set: Set, next: Next) {
        self.opened = Some((set, next));
    }

    /// The install that opening the directory has resumed.
    pub(super) fn take_opened(&mut self) -> Option<(Set, Next)> {
        self.opened.take()
    }

    /// Whether a journal must be ended on disk before an install begins.
    pub(super) fn is_unfinished(&self) -> bool {
        let open = self.journal();
        open.is_some_and(|journal| journal.step != Step::Waiting)
    }

    /// Goes on from a journal, under a number that no clamd was ever shown.
    pub(super) fn resumed(&self, journal: Journal, numbers: &Numbers) -> Event {
        let next = numbers.next(Some(&journal), self.installed());
        Event::Resumed {
            journal: Box::new(journal),
            next,
        }
    }

    /// If resuming a journal came to `next` and left a rollback unfinished: its cause, and the files that
    /// it needs. If one of these files is lost, in the directory and in `previous/`, the next install may
    /// begin: it brings a whole set, and its journal replaces this one.
    pub(super) fn way_back<'n>(&self, next: &'n Next) -> Option<(&'n str, &[FileState])> {
        let Next::Finish(Ending {
            outcome: Outcome::HostFault | Outcome::Refused,
            error: Some(reason),
            ..
        }) = next
        else {
            return None;
        };
        let open = self.journal();
        let open = open.filter(|open| open.step == Step::Swapping)?;
        Some((reason, &open.files))
    }

    // An install that begins.

    /// Decides how an install begins after its survey.
    pub(super) fn prepare(&self, set: &Set, survey: Survey) -> Prepared {
        let journal = Box::new(survey.journal);
        let installed = self.installed.clone().map(Box::new).filter(|installed| {
            self.journal().is_none() && !self.is_suspect && installed.outcome == Outcome::Live
        });
        match installed {
            Some(installed)
                if survey.in_place && installed.set.manifest.content == set.manifest.content =>
            {
                Prepared::InPlace(installed, journal)
            }
            Some(installed) if survey.resigned => Prepared::Go(journal, Some(installed.install)),
            Some(_) | None => Prepared::Go(journal, None),
        }
    }

    /// Whether files were seen other than installed since the last proof.
    pub(super) fn is_suspect(&self) -> bool {
        self.is_suspect
    }

    /// A look found files that are not as they were installed.
    pub(super) fn suspect(&mut self) {
        self.is_suspect = true;
    }

    /// A receipt was made. `files`: what is on disk of the set.
    pub(super) fn reported(&mut self, set: &Set, outcome: Outcome, files: &[FileState]) {
        let is_good = matches!(outcome, Outcome::Live | Outcome::Installed);
        if is_good && *files == set.files() {
            self.is_suspect = false;
        }
    }

    // What clamd answers.

    /// Decides what follows from a probe of clamd for a set that waits for it. `others`: the files of
    /// others beside the set, if they could be listed.
    pub(super) fn probed(&self, verdict: &Verdict, others: Option<&[Other]>) -> Probed {
        let is_again = match verdict {
            Verdict::Live(_) => false,
            _ if self.hindrance.is_some() && self.hindrance.as_deref() == others => {
                return Probed::Known;
            }
            // What clamd's log says may be about what is gone, or names nobody.
            _ if self.hindrance.is_some() => true,
            Verdict::Refused { .. } => {
                self.machine.waits_for_the_host() || !others.is_some_and(<[_]>::is_empty)
            }
            Verdict::Unproven(report) => report.state == ClamdState::Up,
            Verdict::Absent(_) => false,
        };
        if is_again {
            Probed::Again
        } else {
            Probed::Judge
        }
    }

    /// Decides whether the clamd that was seen with the installed set is gone. Returns the set and the
    /// event for the machine.
    pub(super) fn pinged(&self, report: ClamdReport) -> Option<(Set, Event)> {
        let live = |installed: &&Installed| installed.outcome == Outcome::Live;
        let installed = self.installed().filter(live)?.clone();
        if report.state != ClamdState::Down || self.journal().is_some() {
            return None;
        }
        let why = report.note.as_deref().unwrap_or("it does not listen");
        let note = Some(format!("clamd was seen with this set and is gone: {why}"));
        let set = installed.set.clone();
        let lost = Event::Lost(Box::new(installed), ClamdReport { note, ..report });
        Some((set, lost))
    }

    /// Why `clamscan` cannot load a set beside these files of others, if it cannot. Then the files are
    /// remembered until they change.
    pub(super) fn obstacle(&mut self, others: &[Other]) -> Option<String> {
        let obstacle = others.iter().find_map(Other::obstacle)?;
        self.hindrance = Some(others.to_vec());
        Some(obstacle)
    }

    /// Remembers the files of others that kept clamd from loading a set, or that none did.
    pub(super) fn hindered_by(&mut self, others: Option<Vec<Other>>) {
        self.hindrance = others;
    }
}

/// The event for a set whose files are in the directory already. `verdict`: whether clamd has them, under
/// the number of the installed set.
pub(super) fn in_place(
    verdict: Verdict,
    set: &Set,
    installed: Installed,
    journal: Box<Journal>,
) -> Event {
    match verdict {
        Verdict::Live(report) => {
            let set = set.clone();
            Event::Moved(Box::new(Installed { set, ..installed }), report)
        }
        Verdict::Refused { .. } | Verdict::Unproven(_) | Verdict::Absent(_) => {
            Event::Begin(journal)
        }
    }
}

/// The answer to a set that was refused here before.
pub(super) fn refused_before(refusal: Refusal, clamd: ClamdReport) -> Ending {
    Ending {
        outcome: Outcome::Refused,
        install: refusal.install,
        clamd,
        error: Some(format!("refused before: {}", refusal.error)),
    }
}

/// The ending of an install whose set waits for clamd, with nothing new to report.
pub(super) fn waits_on(clamd: ClamdReport) -> Ending {
    Ending {
        outcome: Outcome::Installed,
        install: InstallNumber::NONE,
        clamd,
        error: None,
    }
}
