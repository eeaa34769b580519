//! Decides which offer the host takes, what the host trusts, and when it repairs changed files.
//! Pure: an event, the time and a random number go in, actions come out.
//! Must not open sockets or files, and must not know how operators ask or how the agent starts and stops.
//!
//! [`Core::handle`] takes one event and returns what to do about it, in order: what must survive a
//! crash is saved before anything is said that depends on it. The keeper carries the actions out, and
//! so does a simulated host. What takes long is a [`Task`]; its end is an event like any other.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clamcast_proto::dsse::{Envelope, Verified};
use clamcast_proto::manifest::{Manifest, ManifestFile};
use clamcast_proto::receipt::{ClamdReport, Outcome, Receipt};
use clamcast_proto::trust::{Mark, Trust};
use clamcast_proto::wire::{
    Features, NeedFile, Offer, OfferId, Part, Phase, ToAgent, ToMaster, Welcome,
};
use clamcast_proto::{AgentName, AuditEvent, DatabaseName, Digest, FleetName, Position};
use ed25519_dalek::SigningKey;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::chain;
use crate::config::{DriftPolicy, Stale};
use crate::host::state::StateError;
use crate::host::updater::Updater;
use crate::install::{
    Completed, Depth, HostFault, Look, Planned, ReceiveError, RepairError, Sighting, Standing,
};
use crate::link::backoff::Backoff;
use drift::{Event as GuardEvent, Guard};
use files::Files;
use left_alone::LeftAlone;
use master::{Heard, Master, Trusted};
use receipts::Receipts;
use slot::{Action as SlotAction, Ending, Event as SlotEvent, Slot, Work};

pub mod drift;
mod files;
pub mod left_alone;
mod master;
mod needs;
mod outcomes;
pub mod receipts;
pub mod slot;
pub mod status;
#[cfg(test)]
mod tests;

pub use master::{CLOCK_SKEW_SECS_MAX, FRESH_UNHEARD, Greeting, KeptFresh};

/// While something is going on, the master hears of it at least this often.
const PROGRESS: Duration = Duration::from_secs(15);

/// Waits between two looks at a clamd that has not shown the installed set yet.
const PROBE: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));

/// A clamd that was seen with the installed set is asked this often whether it is still there.
const CLAMD_LOOK: Duration = Duration::from_secs(60);

/// One moment on both clocks. Records and signed statements have times of the wall clock, which may be
/// set. Waits are measured by the monotonic clock.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// The wall clock.
    pub clock: Timestamp,
    /// The monotonic clock.
    pub at: Instant,
}

impl Now {
    /// The moment at which the wall clock showed `time`. A time of the future counts as now: the wall
    /// clock may have been set since it was kept.
    fn instant(self, time: Timestamp) -> Instant {
        let ago = Duration::try_from(self.clock.duration_since(time)).unwrap_or_default();
        self.at.checked_sub(ago).unwrap_or(self.at)
    }

    /// What the wall clock shows at a moment.
    fn time(self, instant: Instant) -> Timestamp {
        let time = match instant.checked_duration_since(self.at) {
            Some(ahead) => self.clock.checked_add(ahead),
            None => self.clock.checked_sub(self.at.duration_since(instant)),
        };
        time.unwrap_or(self.clock)
    }
}

/// Names a connection to the master for as long as the agent runs.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct ConnectionId(pub u64);

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// The agent starts.
    Started,
    /// The state of the installer has changed. This comes before every other event that depends on it.
    Standing(Standing),
    /// The master's first words on a new connection. The answer is an [`Action::Answer`].
    Welcome(Box<Greeting>),
    /// Another message of the master.
    Message(ToAgent),
    /// A stream with a part of a file. It is taken if an [`Action::Receive`] follows.
    Part(Part),
    /// The connection is lost, or none could be made, for this reason.
    Disconnected(String),
    /// A record whose loss matters was saved, or not.
    Saved(Saved, Result<(), StateError>),
    /// Whether the file system reports changes of the databases from now on.
    Watched(bool),
    /// Something happened in the database directory.
    Touched {
        /// As a run of freshclam begins.
        run_begun: bool,
    },
    /// The configuration was read again; or, for this reason, it is not in use.
    Reloaded(Result<(), String>),
    /// The time of [`Core::wake`] may have come. With the number of bytes of parts that were received
    /// since the start.
    Tick(u64),
    /// [`Task::Plan`] ended. An operator's order comes with the files that were wrong before it.
    Planned(Vec<Sighting>, Result<Planned, HostFault>),
    /// [`Action::Receive`] ended.
    Received(DatabaseName, Result<(), ReceiveError>),
    /// [`Task::Install`] ended.
    Installed(Arc<Job>, Box<Completed>),
    /// [`Task::Fault`] ended.
    Faulted(Arc<Job>, Box<Completed>),
    /// [`Task::Resume`] ended.
    Resumed(Option<Box<Completed>>),
    /// [`Task::Ping`] ended.
    Pinged(ClamdReport),
    /// [`Task::Probe`] ended.
    Probed(Option<Box<Completed>>),
    /// [`Task::Look`] ended.
    Looked(Box<Looked>),
    /// [`Task::Scan`] ended.
    Scanned(Option<Updater>),
    /// [`Task::Repair`] ended. With the state of clamd.
    Repaired(Result<Option<Box<Completed>>, RepairError>, ClamdReport),
    /// The agent stops. Until every task has ended, what came of installs is still kept.
    Stopping,
    /// The agent has stopped.
    Stopped,
}

/// What a look at the database directory came to.
#[derive(Debug)]
pub struct Looked {
    /// How thorough it was.
    pub depth: Depth,
    /// What it found.
    pub look: Look,
    /// The updater of somebody else that was seen there, if files are wrong.
    pub updater: Option<Updater>,
    /// What is known of clamd.
    pub clamd: ClamdReport,
}

/// A record whose loss the core must know of.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Saved {
    /// See [`Record::Keys`].
    Keys,
    /// See [`Record::Mark`].
    Mark,
    /// See [`Record::ReceiptDone`].
    ReceiptDone(u64),
}

/// What to do.
#[derive(Debug)]
pub enum Action {
    /// Keep this for the next start. A key set, a mark and the end of a receipt are answered with
    /// [`Event::Saved`] before anything else happens.
    Save(Record),
    /// Say this on that connection, if it is still there.
    Say(ConnectionId, ToMaster),
    /// Write a line into the local audit log.
    Note(Note),
    /// Tell the link whether the master is believed.
    Answer(Result<(), String>),
    /// Read a part of this file from its stream; [`Event::Received`] follows.
    Receive(Part, ManifestFile),
    /// Begin something that takes long.
    Start(Task),
    /// Break something off. It ends soon, as if nothing had come of it.
    Cut(Cut),
}

/// What takes long. Each task ends with one event.
#[derive(Debug)]
pub enum Task {
    /// Look what is missing for an offer; with `full` nothing that is there is of use.
    Plan(Arc<Job>, bool),
    /// Install what an offer has staged.
    Install(Arc<Job>),
    /// End what the last run left in the middle.
    Resume,
    /// Make the receipt for an offer that the host could not take.
    Fault(Arc<Job>, HostFault),
    /// Ask how clamd is.
    Ping,
    /// Ask whether clamd has the installed set. `unproven`: it has not been seen with it.
    Probe {
        /// Whether clamd has yet to be seen with the set.
        unproven: bool,
    },
    /// Compare the files with what was installed.
    Look(Depth),
    /// Look for the updater of somebody else.
    Scan,
    /// Put the installed files back.
    Repair,
}

/// What can be broken off.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cut {
    /// Every [`Action::Receive`] under way.
    Transfers,
    /// [`Task::Probe`].
    Probe,
    /// [`Task::Look`].
    Look,
    /// The waiting of [`Task::Repair`] for clamd.
    Repair,
}

/// What survives a restart.
#[derive(Clone, Debug)]
pub enum Record {
    /// The newest key set.
    Keys(Envelope),
    /// The newest generation that was accepted.
    Mark(KeptMark),
    /// Until when the newest freshness statement holds.
    Fresh(KeptFresh),
    /// What the master accepts.
    Accepts(Features),
    /// The signed head of the master's audit log.
    Checkpoint(String),
    /// Why changed files are left alone, and which were put back.
    LeftAlone(LeftAlone),
    /// A receipt that the master has not acknowledged, under its number.
    Receipt(u64, Envelope),
    /// The receipt with this number is no longer needed. If it is the newest one, its content is kept as
    /// the last that was said.
    ReceiptDone(u64, Option<Box<Receipt>>),
}

impl Record {
    /// How [`Event::Saved`] names this record, if the core must hear whether it was saved.
    pub fn awaited(&self) -> Option<Saved> {
        match self {
            Self::Keys(_) => Some(Saved::Keys),
            Self::Mark(_) => Some(Saved::Mark),
            Self::ReceiptDone(seq, _) => Some(Saved::ReceiptDone(*seq)),
            Self::Fresh(_)
            | Self::Accepts(_)
            | Self::Checkpoint(_)
            | Self::LeftAlone(_)
            | Self::Receipt(..) => None,
        }
    }
}

/// The mark with the time of the first offer of that generation.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct KeptMark {
    /// The mark.
    #[serde(flatten)]
    pub mark: Mark,
    /// When that generation was offered first.
    pub accepted: Timestamp,
}

/// A line of the local audit log.
#[derive(Clone, Debug)]
pub struct Note {
    /// The event.
    pub event: AuditEvent,
    /// The generation that it is about.
    pub position: Option<Position>,
    /// Its outcome.
    pub outcome: Option<&'static str>,
    /// What else is known, by the kind of event.
    pub detail: Value,
}

/// An accepted offer.
#[derive(Debug)]
pub struct Job {
    /// The offer, which its connection numbers.
    pub offer: OfferId,
    /// What was offered.
    pub manifest: Verified<Manifest>,
    /// An operator wants it, whatever the host made of it before.
    pub forced: bool,
    /// Without deltas.
    pub full: bool,
    /// It was taken although it is below the mark, because it is installed.
    mends: bool,
    since: Instant,
    connection: ConnectionId,
}

impl Work for Arc<Job> {
    fn is_same(&self, other: &Self) -> bool {
        self.manifest.payload_sha256() == other.manifest.payload_sha256()
    }
}

/// Who this host is.
#[derive(Clone)]
pub struct Identity {
    /// The fleet.
    pub fleet: FleetName,
    /// The host's name in it.
    pub agent: AgentName,
    /// Signs receipts.
    pub key: SigningKey,
}

/// How this host behaves.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What is done with a stale offer.
    pub stale: Stale,
    /// Longest wait before an install that no operator forces.
    pub splay: Duration,
    /// The database directory, for messages.
    pub directory: PathBuf,
    /// What is done about changed files.
    pub drift: DriftPolicy,
    /// Every byte of the files is read this often.
    pub rescan: Duration,
}

/// What the last run left.
#[derive(Debug)]
pub struct Kept {
    /// The pinned root with the newest key set, and the mark.
    pub trust: Trust,
    /// When the marked generation was offered first.
    pub accepted: Option<Timestamp>,
    /// The receipts that the master does not have.
    pub receipts: Receipts,
    /// The newest freshness statement.
    pub fresh: Option<KeptFresh>,
    /// What the master accepts.
    pub accepts: Features,
    /// When the agent started first.
    pub first_start: Timestamp,
    /// Why changed files are left alone, and which were put back.
    pub left_alone: drift::Kept,
}

/// Everything that an agent decides.
pub struct Core {
    identity: Identity,
    settings: Settings,
    /// Until the first look at the files has ended.
    is_opening: bool,
    is_stopping: bool,

    trusted: Trusted,
    /// A plan that waits until the mark is on disk.
    plan: Option<(Arc<Job>, bool)>,
    receipts: Receipts,
    standing: Standing,

    slot: Slot<Arc<Job>>,
    /// Whether the transfers of the job in the slot were cut short.
    is_cut: bool,
    /// Bytes that had been received at the last progress report.
    reported: u64,
    /// The last failure: the reason, if the host gives up.
    trouble: Option<HostFault>,
    progress_at: Instant,

    master: Master,
    heard: Heard,
    unused_configuration: Option<String>,
    probing: Probing,
    files: Files,
    /// The last known state of clamd.
    clamd: ClamdReport,

    /// The moment of the event that is handled, and its random number.
    now: Now,
    random: f64,
    actions: Vec<Action>,
}

#[derive(Debug)]
struct Probing {
    /// When the next look is due; `None` while one is taken, or an install is under way.
    at: Option<Instant>,
    is_running: bool,
    backoff: Backoff,
}

impl Core {
    /// Takes over what the last run left. The first event is [`Event::Started`]. `random` is from 0 to 1.
    pub fn new(
        identity: Identity,
        settings: Settings,
        kept: Kept,
        standing: Standing,
        now: Now,
        random: f64,
    ) -> Self {
        let installed = standing.installed.as_ref();
        let installed = installed.map(|installed| installed.set.sha256());
        let (policy, rescan) = (settings.drift, settings.rescan);
        let guard = Guard::new(policy, rescan, kept.left_alone, now.at, random);
        Self {
            identity,
            settings,
            is_opening: true,
            is_stopping: false,
            trusted: Trusted {
                trust: kept.trust,
                accepted: kept.accepted,
                mark: None,
                is_saving: false,
                keys: None,
            },
            plan: None,
            receipts: kept.receipts,
            slot: Slot::new(true),
            is_cut: false,
            reported: 0,
            trouble: None,
            progress_at: now.at,
            master: Master::Away {
                since: now.clock,
                error: None,
            },
            heard: Heard {
                early: None,
                accepts: kept.accepts,
                fresh: kept.fresh,
                first_start: kept.first_start,
                stale_said: false,
                clock_said: false,
                refusal: None,
            },
            unused_configuration: None,
            probing: Probing {
                at: None,
                is_running: false,
                backoff: PROBE,
            },
            files: Files::new(guard, installed, now.at),
            clamd: ClamdReport::default(),
            standing,
            now,
            random,
            actions: Vec::new(),
        }
    }

    /// Takes one event and returns what to do about it, in order. `random` is from 0 to 1.
    pub fn handle(&mut self, event: Event, now: Now, random: f64) -> Vec<Action> {
        (self.now, self.random) = (now, random);
        if self.is_stopping {
            self.wind_up(event);
        } else {
            self.react(event);
        }
        std::mem::take(&mut self.actions)
    }

    /// Whether the first look at the files is still to come. Until it has ended nothing is said to a
    /// master.
    pub fn is_opening(&self) -> bool {
        self.is_opening
    }

    fn react(&mut self, event: Event) {
        match event {
            Event::Started => {
                let detail = json!({ "version": env!("CARGO_PKG_VERSION") });
                self.note(AuditEvent::Started, self.installed(), None, detail);
                self.open();
            }
            Event::Standing(standing) => self.stands(standing),
            Event::Welcome(greeting) => self.welcomed(greeting),
            Event::Message(message) => self.message(message),
            Event::Part(part) => self.part(part),
            Event::Disconnected(error) => {
                self.heard.early = None;
                let since = match &self.master {
                    Master::Connected { .. } => self.now.clock,
                    Master::Away { since, .. } => *since,
                };
                let error = Some(error);
                self.master = Master::Away { since, error };
                self.slot_event(SlotEvent::Disconnected);
            }
            Event::Saved(saved, result) => self.saved(saved, result),
            Event::Watched(watched) => self.files.is_watched = watched,
            Event::Touched { run_begun } => self.touched(run_begun),
            Event::Reloaded(Ok(())) => {
                self.note(AuditEvent::Reload, None, Some("done"), json!({}));
            }
            Event::Reloaded(Err(reason)) => {
                let detail = json!({ "reason": reason, "in_use": "the old configuration" });
                self.note(AuditEvent::Reload, None, Some("failed"), detail);
                self.unused_configuration = Some(reason);
            }
            Event::Tick(received) => self.tick(received),
            Event::Planned(wrong, planned) => self.planned(wrong, planned),
            Event::Received(name, result) => {
                let ending = self.received(&name, result);
                self.slot_event(SlotEvent::PartEnded(name, ending));
            }
            Event::Installed(job, completed) => self.installed_job(&job, &completed),
            Event::Faulted(job, completed) => self.complete(&completed, Some(job.since), false),
            Event::Resumed(completed) => {
                if let Some(completed) = completed {
                    self.complete(&completed, None, false);
                }
                self.slot_event(SlotEvent::Installed { fault: false });
                // Much may have happened to clamd since this host was seen with its set.
                self.probing.at = self.probing.at.map(|_| self.now.at);
            }
            Event::Pinged(clamd) => self.clamd = clamd,
            Event::Probed(completed) => self.probed(completed),
            Event::Looked(looked) => self.looked(*looked),
            Event::Scanned(updater) => {
                self.files.scanned();
                self.sighted(updater);
            }
            Event::Repaired(repaired, clamd) => self.repaired(repaired, clamd),
            Event::Stopping => self.is_stopping = true,
            Event::Stopped => self.stopped(),
        }
    }

    /// At the end: what came of an install is kept; nothing new is begun.
    fn wind_up(&mut self, event: Event) {
        match event {
            Event::Standing(standing) => self.standing = standing,
            Event::Installed(job, completed) | Event::Faulted(job, completed) => {
                self.complete(&completed, Some(job.since), false);
            }
            Event::Resumed(Some(completed))
            | Event::Probed(Some(completed))
            | Event::Repaired(Ok(Some(completed)), _) => self.complete(&completed, None, false),
            Event::Stopped => self.stopped(),
            Event::Started
            | Event::Stopping
            | Event::Welcome(_)
            | Event::Message(_)
            | Event::Part(_)
            | Event::Disconnected(_)
            | Event::Saved(..)
            | Event::Watched(_)
            | Event::Touched { .. }
            | Event::Reloaded(_)
            | Event::Tick(_)
            | Event::Planned(..)
            | Event::Received(..)
            | Event::Pinged(_)
            | Event::Resumed(None)
            | Event::Probed(None)
            | Event::Looked(_)
            | Event::Scanned(_)
            | Event::Repaired(..) => {}
        }
        // A look or a repair is not begun any more.
        let is_kept = |action: &Action| !matches!(action, Action::Start(_) | Action::Cut(_));
        self.actions.retain(is_kept);
    }

    fn stopped(&mut self) {
        self.note(AuditEvent::Stopped, self.installed(), None, json!({}));
    }

    /// When [`Event::Tick`] is due without anything else happening.
    pub fn wake(&self, now: Now) -> Option<Instant> {
        let is_working = self.slot.job().is_some() && !self.slot.is_resting();
        let stale = (!self.heard.stale_said).then(|| {
            let left = self.fresh_until().duration_since(now.clock);
            now.at + Duration::try_from(left).unwrap_or_default()
        });
        let due = [
            self.slot.deadline(),
            self.probing.at,
            self.files.guard.deadline().filter(|_| !self.is_busy()),
            is_working.then_some(self.progress_at),
            stale,
        ];
        due.into_iter().flatten().min()
    }

    fn tick(&mut self, received: u64) {
        let now = self.now.at;
        if self.slot.deadline().is_some_and(|at| at <= now) {
            self.slot_event(SlotEvent::Tick);
        }
        if self.probing.at.is_some_and(|at| at <= now) {
            self.probe();
        }
        if !self.is_busy() {
            self.guard_event(GuardEvent::Tick);
        }
        if self.progress_at <= now {
            // A master that sends nothing must not be told that all is well.
            let has_moved = std::mem::replace(&mut self.reported, received) != received;
            self.report_progress(has_moved);
        }
        if self.stale_since(self.now.clock).is_some() && !self.heard.stale_said {
            self.heard.stale_said = true;
            tracing::warn!(
                heard = self.heard.fresh.is_some(),
                "the freshness statement of the master expired, or none ever came; this host's \
                 signatures grow old"
            );
        }
    }

    fn stands(&mut self, standing: Standing) {
        let has_moved = standing.phase != self.standing.phase;
        self.standing = standing;
        if has_moved && self.slot.phase() == Phase::Swapping && self.phase() != Phase::Staged {
            self.report_progress(true);
        }
    }

    /// How far the work on an offer is, or a repair.
    fn phase(&self) -> Phase {
        let is_queued = self.standing.phase == Phase::Idle && self.slot.job().is_some();
        let installing = match is_queued {
            true => Phase::Staged,
            false => self.standing.phase,
        };
        match self.files.is_repairing {
            true => self.standing.phase,
            false => self.slot.phase_given(installing),
        }
    }

    // What the slot wants.

    fn slot_event(&mut self, event: SlotEvent<Arc<Job>>) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let actions = self.slot.handle(event, self.now.at, self.random);
            for action in actions {
                events.extend(self.perform(action));
            }
        }
        self.schedule_probe();
    }

    /// Does what the slot wants; returns what it must hear of at once.
    fn perform(&mut self, action: SlotAction<Arc<Job>>) -> Option<SlotEvent<Arc<Job>>> {
        match action {
            SlotAction::Plan { job, full } => {
                if let Some(message) = self.made_void(&job) {
                    tracing::warn!(said = message, "an offer is void");
                    let error = ToMaster::Error {
                        offer: Some(job.offer),
                        message,
                        other_master: None,
                    };
                    self.say_on(job.connection, error);
                    return Some(SlotEvent::Answered);
                }
                self.plan = Some((job, full));
                match self.trusted.mark.is_none() {
                    true => self.begin_plan(),
                    false => self.save_mark(),
                }
            }
            SlotAction::Need(job, files) => {
                self.trouble = None;
                self.say_need(&job, files);
            }
            SlotAction::NeedMore(job, files) => self.say_need(&job, files),
            SlotAction::Abort => {
                self.is_cut = true;
                self.actions.push(Action::Cut(Cut::Transfers));
            }
            SlotAction::Wait(job, until) => {
                let left = until.saturating_duration_since(self.now.at);
                tracing::info!(position = %job.manifest.position(), ?left, "staged, waiting");
                let until = self.now.clock.checked_add(left).ok();
                self.say_progress(&job, Phase::Staged, until);
                self.progress_at = self.now.at + PROGRESS.max(left);
            }
            SlotAction::Install(job) => {
                self.give_way();
                self.say_progress(&job, Phase::Staged, None);
                self.progress_at = self.now.at + PROGRESS;
                self.actions.push(Action::Start(Task::Install(job)));
            }
            SlotAction::Fault(job) => {
                let fault = self.trouble.take().unwrap_or_else(|| {
                    let reason =
                        "the files did not arrive whole, however often they were asked for"
                            .to_owned();
                    HostFault::because("receive", PathBuf::from("the generation"), reason)
                });
                self.actions.push(Action::Start(Task::Fault(job, fault)));
            }
        }
        None
    }

    /// Begins the plan that was held until the mark is on disk.
    fn begin_plan(&mut self) {
        let Some((job, full)) = self.plan.take() else {
            return;
        };
        self.is_cut = false;
        self.give_way();
        self.progress_at = self.now.at + PROGRESS;
        let full = full || job.full;
        self.actions.push(Action::Start(Task::Plan(job, full)));
    }

    /// Whatever keeps the installer for long gives way.
    fn give_way(&mut self) {
        self.actions.push(Action::Cut(Cut::Look));
        self.actions.push(Action::Cut(Cut::Probe));
        if self.files.is_repairing {
            self.actions.push(Action::Cut(Cut::Repair));
        }
    }

    /// Why an offer that was taken is not to be carried out, now that its turn has come: it was good
    /// because it was installed, and another set has taken its place meanwhile.
    fn made_void(&self, job: &Job) -> Option<String> {
        let is_settled = self.standing.settled == Some(job.manifest.payload_sha256());
        let position = job.manifest.position();
        (job.mends && !is_settled)
            .then(|| format!("{position} is not installed any more, and lower than what is"))
    }

    fn planned(&mut self, wrong: Vec<Sighting>, planned: Result<Planned, HostFault>) {
        self.learn(wrong);
        match planned {
            Err(fault) => {
                tracing::warn!(error = chain(&fault), "cannot plan an install");
                self.trouble = Some(fault);
                self.slot_event(SlotEvent::PlanFailed);
            }
            Ok(Planned::Answered(completed)) => {
                let since = self.slot.job().map(|job| job.since);
                self.complete(&completed, since, false);
                self.slot_event(SlotEvent::Answered);
            }
            Ok(Planned::Needs(needs)) => {
                // An operator who forces an install does not want it to wait.
                let is_forced = self.slot.job().is_none_or(|job| job.forced);
                let splay = match is_forced {
                    true => Duration::ZERO,
                    false => self.settings.splay.mul_f64(self.random),
                };
                self.slot_event(SlotEvent::Planned { needs, splay });
            }
        }
    }

    /// A stream with a file: taken if the slot waits for it.
    fn part(&mut self, part: Part) {
        let job = self.slot.job().filter(|job| job.offer == part.offer);
        let file = job.and_then(|job| job.manifest.file(&part.name)).cloned();
        match file.filter(|_| self.slot.begin(&part.name)) {
            Some(file) => self.actions.push(Action::Receive(part, file)),
            None => tracing::debug!(name = %part.name, "a part that nobody waits for"),
        }
    }

    fn received(&mut self, name: &DatabaseName, result: Result<(), ReceiveError>) -> Ending {
        let Err(error) = result else {
            tracing::debug!(%name, "received");
            return Ending::Good;
        };
        let reason = chain(&error);
        // What ends after it was cut short says nothing of its own: the reason for that stands.
        if !self.is_cut {
            tracing::warn!(error = reason, "a part was not taken");
        }
        let about = || HostFault::because("receive", PathBuf::from(name.as_str()), reason);
        let (trouble, ending) = match error {
            ReceiveError::Host { source, .. } => (source, Ending::Fault),
            ReceiveError::Interrupted { .. } => (about(), Ending::Interrupted),
            ReceiveError::Damaged { .. } | ReceiveError::Unexpected { .. } => {
                (about(), Ending::Spoilt)
            }
        };
        if !self.is_cut {
            self.trouble = Some(trouble);
        }
        ending
    }

    fn installed_job(&mut self, job: &Job, completed: &Completed) {
        self.complete(completed, Some(job.since), job.forced);
        let stays = self.standing.stays(&completed.set.sha256());
        let fault = completed.outcome == Outcome::HostFault && !stays;
        self.slot_event(SlotEvent::Installed { fault });
    }

    /// Tells the master what is going on, if anything is. `has_moved`: whether anything came.
    fn report_progress(&mut self, has_moved: bool) {
        self.progress_at = self.now.at + PROGRESS;
        let Some(job) = self.slot.job().filter(|_| !self.slot.is_resting()).cloned() else {
            return;
        };
        let phase = self.phase();
        if phase != Phase::Fetching || has_moved {
            self.say_progress(&job, phase, None);
        }
    }

    fn say_need(&mut self, job: &Job, files: Vec<NeedFile>) {
        tracing::debug!(position = %job.manifest.position(), files = files.len(), "need");
        let offer = job.offer;
        self.say_on(job.connection, ToMaster::Need { offer, files });
    }

    fn say_progress(&mut self, job: &Job, phase: Phase, until: Option<Timestamp>) {
        let progress = ToMaster::Progress {
            offer: job.offer,
            phase,
            until,
        };
        self.say_on(job.connection, progress);
    }

    // clamd, once more.

    fn schedule_probe(&mut self) {
        let is_busy = self.slot.phase() == Phase::Swapping || self.files.is_repairing;
        let is_unproven = self.standing.is_unproven;
        if is_busy || !is_unproven {
            self.probing.backoff.reset();
        }
        if is_busy {
            self.probing.at = None;
        } else if self.probing.at.is_none() && !self.probing.is_running {
            let wait = match is_unproven {
                true => self.probing.backoff.next(1.0),
                false => CLAMD_LOOK,
            };
            self.probing.at = Some(self.now.at + wait);
        }
    }

    fn probe(&mut self) {
        self.probing.at = None;
        self.probing.is_running = true;
        let unproven = self.standing.is_unproven;
        self.actions.push(Action::Start(Task::Probe { unproven }));
    }

    fn probed(&mut self, completed: Option<Box<Completed>>) {
        self.probing.is_running = false;
        if let Some(completed) = completed {
            self.complete(&completed, None, false);
            // It went back for a fault of the disk, with nobody to try it again.
            let is_gone = !self.standing.has(&completed.set.sha256());
            if completed.outcome == Outcome::HostFault && is_gone {
                self.say(ToMaster::Reoffer {});
            }
        }
        self.schedule_probe();
    }

    // What goes out.

    fn say(&mut self, message: ToMaster) {
        if let Master::Connected { connection, .. } = &self.master {
            let connection = *connection;
            self.say_on(connection, message);
        }
    }

    fn say_on(&mut self, connection: ConnectionId, message: ToMaster) {
        self.actions.push(Action::Say(connection, message));
    }

    fn save(&mut self, record: Record) {
        self.actions.push(Action::Save(record));
    }

    fn note(
        &mut self,
        event: AuditEvent,
        position: Option<Position>,
        outcome: Option<&'static str>,
        detail: Value,
    ) {
        self.actions.push(Action::Note(Note {
            event,
            position,
            outcome,
            detail,
        }));
    }

    fn installed(&self) -> Option<Position> {
        let installed = self.standing.installed.as_ref()?;
        Some(installed.set.manifest.position())
    }
}
