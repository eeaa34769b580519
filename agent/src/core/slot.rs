//! Decides what the host works on: one generation at a time, and the newest offer wins.
//!
//! Pure: no sockets, no disk, no clock. [`super::Core`] feeds events in and carries out the actions
//! that come back. Invariants: one plan, one set of transfers or one install is under way, never two;
//! a new plan waits until the transfers of the old one have ended, because both may write the same
//! spool; what is being swapped or proven is ended before anything else begins.

use std::collections::BTreeSet;
use std::mem;
use std::time::{Duration, Instant};

use clamcast_proto::DatabaseName;
use clamcast_proto::wire::{NeedFile, Phase};

use super::needs::Needs;
use crate::link::backoff::Backoff;

/// How often missing files are asked for before it counts as trouble of the host's: the first time,
/// once more for what was interrupted, and once more for what came out wrong.
pub const ROUNDS_MAX: u32 = 3;

/// Waits before a generation is tried again that the host could not take.
const FAULT_FIRST: Duration = Duration::from_secs(30);
const FAULT_LONGEST: Duration = Duration::from_secs(15 * 60);

/// When nothing arrives for this long, the master is asked again: it may have given up without a
/// word. Much longer than a delta takes to make, or 64 transfers on a slow line before ours; and a
/// third of the time after which the master counts a silent host as failed, so that asking again
/// still helps.
const QUIET_MAX: Duration = Duration::from_secs(5 * 60);

/// What a slot works on.
pub trait Work: Clone {
    /// Whether both install the same, though they may have been offered on two connections.
    fn is_same(&self, other: &Self) -> bool;
}

/// The one place for work of kind `J`.
#[derive(Debug)]
pub struct Slot<J> {
    state: State<J>,
    /// What was staged last, and until when it waits: a host that loses its connection again and
    /// again and is offered the same again and again must still come to its turn.
    turn: Option<(J, Instant)>,
    /// The newest offer, which waits for what cannot be cut short.
    next: Option<J>,
    /// Files that are being written at this moment.
    receiving: BTreeSet<DatabaseName>,
    faults: Backoff,
}

#[derive(Debug)]
enum State<J> {
    Idle,
    /// The disk is looked at. Without a job: what comes of it is of no use any more.
    Planning {
        job: Option<J>,
        round: u32,
    },
    Fetching {
        job: J,
        round: u32,
        needs: Needs,
        spoilt: bool,
        /// When the master is asked again, unless something arrives then. What arrives ends by
        /// itself, if only because its stream stalls.
        quiet_until: Instant,
    },
    /// Waits for transfers to end that were cut short; with a job, because the host failed it.
    Draining {
        faulty: Option<J>,
    },
    /// Waits so that not every guest of a machine reloads at once.
    Staged {
        job: J,
        until: Instant,
    },
    /// Without a job: an install that was interrupted by the end of the last run.
    Installing {
        job: Option<J>,
    },
    /// The host could not take it; it is tried again.
    Resting {
        job: J,
        until: Instant,
    },
}

/// What happened.
#[derive(Debug)]
pub enum Event<J> {
    /// An offer that is to be taken.
    Offered(J),
    /// The disk was looked at.
    Planned {
        /// The files that must come from the master.
        needs: Vec<NeedFile>,
        /// How long to wait before the swap.
        splay: Duration,
    },
    /// There is nothing to do for it: what came of it before was said again.
    Answered,
    /// The disk could not be looked at.
    PlanFailed,
    /// A transfer is over.
    PartEnded(DatabaseName, Ending),
    /// An install is over.
    Installed {
        /// Whether the host could not take it.
        fault: bool,
    },
    /// The connection is lost, and with it the offers made on it.
    Disconnected,
    /// [`Slot::deadline`] has come, perhaps.
    Tick,
}

/// How a transfer ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ending {
    /// The file is there.
    Good,
    /// It was cut off; the beginning of the file that came is kept.
    Interrupted,
    /// What came is not the file.
    Spoilt,
    /// The host could not write it.
    Fault,
}

/// What to do about it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Action<J> {
    /// Look at the disk; answer with [`Event::Planned`], [`Event::Answered`] or
    /// [`Event::PlanFailed`].
    Plan {
        /// For this.
        job: J,
        /// Use nothing that is there to build a missing file from.
        full: bool,
    },
    /// Ask the master for the first files that a plan found missing. None: tell it that nothing is.
    Need(J, Vec<NeedFile>),
    /// Ask for the next ones.
    NeedMore(J, Vec<NeedFile>),
    /// Cut transfers short.
    Abort,
    /// Say that nothing will be heard until then.
    Wait(J, Instant),
    /// Install; answer with [`Event::Installed`].
    Install(J),
    /// Tell the master that the host cannot take it now.
    Fault(J),
}

impl<J: Work> Slot<J> {
    /// Nothing to do. `resuming`: an install of the last run is being ended, and
    /// [`Event::Installed`] will say so.
    pub fn new(resuming: bool) -> Self {
        Self {
            state: if resuming {
                State::Installing { job: None }
            } else {
                State::Idle
            },
            turn: None,
            next: None,
            receiving: BTreeSet::new(),
            faults: Backoff::new(FAULT_FIRST, FAULT_LONGEST),
        }
    }

    /// What is worked on, if anything is.
    pub fn job(&self) -> Option<&J> {
        match &self.state {
            State::Idle => None,
            State::Planning { job, .. } | State::Installing { job } => job.as_ref(),
            State::Draining { faulty } => faulty.as_ref(),
            State::Fetching { job, .. }
            | State::Staged { job, .. }
            | State::Resting { job, .. } => Some(job),
        }
    }

    /// How far it is. Within an install only the installer knows more.
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Idle | State::Resting { .. } => Phase::Idle,
            State::Planning { .. } | State::Fetching { .. } | State::Draining { .. } => {
                Phase::Fetching
            }
            State::Staged { .. } => Phase::Staged,
            State::Installing { .. } => Phase::Swapping,
        }
    }

    /// The same, where the installer said `installing` last, which counts only within an install.
    pub fn phase_given(&self, installing: Phase) -> Phase {
        match self.state {
            State::Installing { .. } => installing,
            State::Idle
            | State::Planning { .. }
            | State::Fetching { .. }
            | State::Draining { .. }
            | State::Staged { .. }
            | State::Resting { .. } => self.phase(),
        }
    }

    /// Whether a failed job waits for its next try.
    pub fn is_resting(&self) -> bool {
        matches!(self.state, State::Resting { .. })
    }

    /// When [`Event::Tick`] is due.
    pub fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Staged { until, .. } | State::Resting { until, .. } => Some(until),
            State::Fetching { quiet_until, .. } => self.receiving.is_empty().then_some(quiet_until),
            State::Idle
            | State::Planning { .. }
            | State::Draining { .. }
            | State::Installing { .. } => None,
        }
    }

    /// A part of `name` arrives: whether to take it. If so, [`Event::PartEnded`] must follow.
    pub fn begin(&mut self, name: &DatabaseName) -> bool {
        let State::Fetching { needs, .. } = &self.state else {
            return false;
        };
        needs.awaits(name) && self.receiving.insert(name.clone())
    }

    /// Takes one event and returns what to do about it, in order. `random` is from 0 to 1.
    pub fn handle(&mut self, event: Event<J>, now: Instant, random: f64) -> Vec<Action<J>> {
        match event {
            Event::Offered(job) => {
                self.faults.reset();
                self.next = Some(job);
                match &self.state {
                    State::Idle | State::Staged { .. } | State::Resting { .. } => self.take_next(),
                    State::Fetching { .. } => self.drain(None, now, random),
                    State::Planning { .. } | State::Draining { .. } | State::Installing { .. } => {
                        Vec::new()
                    }
                }
            }
            Event::Planned { needs, splay } => self.planned(needs, splay, now, random),
            Event::Answered => self.take_next(),
            Event::PlanFailed => {
                let State::Planning { job, .. } = self.take_state() else {
                    unreachable!("a plan ends only while one is made");
                };
                self.fault(job, now, random)
            }
            Event::PartEnded(name, ending) => self.part_ended(&name, ending, now, random),
            Event::Installed { fault } => {
                let State::Installing { job } = self.take_state() else {
                    unreachable!("an install ends only while one is made");
                };
                match job {
                    // Its receipt says that the host could not take it, so no word more here.
                    Some(job) if fault && self.next.is_none() => {
                        let until = now + self.faults.next(random);
                        self.state = State::Resting { job, until };
                        Vec::new()
                    }
                    Some(_) | None => self.take_next(),
                }
            }
            Event::Disconnected => {
                self.next = None;
                match &mut self.state {
                    State::Fetching { .. } => self.drain(None, now, random),
                    State::Planning { job, .. } => {
                        *job = None;
                        Vec::new()
                    }
                    State::Draining { faulty } => {
                        *faulty = None;
                        Vec::new()
                    }
                    State::Resting { .. } => self.take_next(),
                    // All that these need is on disk.
                    State::Idle | State::Staged { .. } | State::Installing { .. } => Vec::new(),
                }
            }
            Event::Tick => match &self.state {
                State::Fetching {
                    job,
                    round,
                    spoilt,
                    quiet_until,
                    ..
                } if self.receiving.is_empty() && *quiet_until <= now => {
                    let (job, round, spoilt) = (job.clone(), *round, *spoilt);
                    self.plan(job, round + 1, spoilt)
                }
                State::Staged { job, until } if *until <= now => {
                    let job = job.clone();
                    self.install(job)
                }
                State::Resting { job, until } if *until <= now => {
                    self.next = Some(job.clone());
                    self.take_next()
                }
                State::Idle
                | State::Planning { .. }
                | State::Fetching { .. }
                | State::Draining { .. }
                | State::Staged { .. }
                | State::Installing { .. }
                | State::Resting { .. } => Vec::new(),
            },
        }
    }

    fn take_state(&mut self) -> State<J> {
        mem::replace(&mut self.state, State::Idle)
    }

    /// Begins with the newest offer, if one waits.
    fn take_next(&mut self) -> Vec<Action<J>> {
        let Some(job) = self.next.take() else {
            self.state = State::Idle;
            return Vec::new();
        };
        self.plan(job, 1, false)
    }

    fn plan(&mut self, job: J, round: u32, full: bool) -> Vec<Action<J>> {
        self.state = State::Planning {
            job: Some(job.clone()),
            round,
        };
        vec![Action::Plan { job, full }]
    }

    fn planned(
        &mut self,
        needs: Vec<NeedFile>,
        splay: Duration,
        now: Instant,
        random: f64,
    ) -> Vec<Action<J>> {
        let State::Planning { job, round } = self.take_state() else {
            unreachable!("a plan ends only while one is made");
        };
        let (Some(job), None) = (job, &self.next) else {
            return self.take_next();
        };
        if !needs.is_empty() {
            if round > ROUNDS_MAX {
                return self.fault(Some(job), now, random);
            }
            let mut needs = Needs::new(needs);
            let asked = needs.next();
            self.state = State::Fetching {
                job: job.clone(),
                round,
                needs,
                spoilt: false,
                quiet_until: now + QUIET_MAX,
            };
            return vec![Action::Need(job, asked)];
        }
        // A master that was not asked yet hears that nothing is missing.
        let mut actions = match round {
            1 => vec![Action::Need(job.clone(), Vec::new())],
            _ => Vec::new(),
        };
        actions.extend(self.staged(job, splay, now));
        actions
    }

    fn staged(&mut self, job: J, splay: Duration, now: Instant) -> Vec<Action<J>> {
        let until = match &self.turn {
            Some((staged, until)) if staged.is_same(&job) => *until,
            Some(_) | None => now + splay,
        };
        if splay.is_zero() || until <= now {
            return self.install(job);
        }
        self.turn = Some((job.clone(), until));
        self.state = State::Staged {
            job: job.clone(),
            until,
        };
        vec![Action::Wait(job, until)]
    }

    fn install(&mut self, job: J) -> Vec<Action<J>> {
        self.turn = None;
        self.state = State::Installing {
            job: Some(job.clone()),
        };
        vec![Action::Install(job)]
    }

    fn part_ended(
        &mut self,
        name: &DatabaseName,
        ending: Ending,
        now: Instant,
        random: f64,
    ) -> Vec<Action<J>> {
        self.receiving.remove(name);
        match self.take_state() {
            state @ State::Draining { .. } => {
                self.state = state;
                self.drained(now, random)
            }
            State::Fetching { job, .. } if ending == Ending::Fault => {
                self.drain(Some(job), now, random)
            }
            State::Fetching {
                job,
                round,
                mut needs,
                spoilt,
                quiet_until: _,
            } => {
                let is_due = needs.ended(name);
                let spoilt = spoilt || ending == Ending::Spoilt;
                // After a stream that ended early a master sends no more of them until it is asked.
                let given_up = ending != Ending::Good && self.receiving.is_empty();
                if needs.is_empty() || given_up {
                    // Only the disk says what is still missing, if anything is.
                    return self.plan(job, round + 1, spoilt);
                }
                let more = is_due.then(|| Action::NeedMore(job.clone(), needs.next()));
                self.state = State::Fetching {
                    job,
                    round,
                    needs,
                    spoilt,
                    quiet_until: now + QUIET_MAX,
                };
                more.into_iter().collect()
            }
            State::Idle
            | State::Planning { .. }
            | State::Staged { .. }
            | State::Installing { .. }
            | State::Resting { .. } => unreachable!("transfers end before anything else begins"),
        }
    }

    /// Cuts transfers short.
    fn drain(&mut self, faulty: Option<J>, now: Instant, random: f64) -> Vec<Action<J>> {
        self.state = State::Draining { faulty };
        let mut actions = vec![Action::Abort];
        actions.extend(self.drained(now, random));
        actions
    }

    fn drained(&mut self, now: Instant, random: f64) -> Vec<Action<J>> {
        if !self.receiving.is_empty() {
            return Vec::new();
        }
        let State::Draining { faulty } = self.take_state() else {
            unreachable!("only called while draining");
        };
        self.fault(faulty, now, random)
    }

    /// The host could not take `job`, unless that is of no interest any more.
    fn fault(&mut self, job: Option<J>, now: Instant, random: f64) -> Vec<Action<J>> {
        match (job, &self.next) {
            (Some(job), None) => {
                let until = now + self.faults.next(random);
                self.state = State::Resting {
                    job: job.clone(),
                    until,
                };
                vec![Action::Fault(job)]
            }
            (Some(_) | None, _) => self.take_next(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clamcast_proto::wire::Have;

    impl Work for String {
        fn is_same(&self, other: &Self) -> bool {
            self == other
        }
    }

    fn need(name: &str) -> NeedFile {
        NeedFile {
            name: name.parse().unwrap(),
            have: Have::Nothing,
            resume_at: 0,
            resume: None,
        }
    }

    /// Runs a script of events, and compares what was done about each, `;` between the steps:
    /// `offer J`, `plan [FILE ...]`, `plan fails`, `answered`, `splay SECS`, `begin FILE`,
    /// `FILE ENDING`, `installed`, `fault`, `lost`, `SECSs` (time passes, and a tick if one is due).
    #[track_caller]
    fn check(script: &str, expected: &str) {
        let mut slot = Slot::new(false);
        let start = Instant::now();
        let mut now = start;
        let mut splay = Duration::ZERO;
        let mut said = Vec::new();
        for step in script.split(';').map(str::trim) {
            let words: Vec<_> = step.split_whitespace().collect();
            let event = match words[..] {
                ["offer", job] => Event::Offered(job.to_owned()),
                ["plan", "fails"] => Event::PlanFailed,
                ["plan", ref files @ ..] => Event::Planned {
                    needs: files.iter().map(|file| need(file)).collect(),
                    splay,
                },
                ["splay", secs] => {
                    splay = Duration::from_secs(secs.parse().unwrap());
                    continue;
                }
                ["begin", file] => {
                    let taken = slot.begin(&file.parse().unwrap());
                    said.push(if taken { "yes" } else { "no" }.to_owned());
                    continue;
                }
                ["answered"] => Event::Answered,
                ["installed"] => Event::Installed { fault: false },
                ["fault"] => Event::Installed { fault: true },
                ["lost"] => Event::Disconnected,
                [file, ending] => {
                    let ending = match ending {
                        "good" => Ending::Good,
                        "cut" => Ending::Interrupted,
                        "spoilt" => Ending::Spoilt,
                        "unwritable" => Ending::Fault,
                        _ => panic!("{ending}"),
                    };
                    Event::PartEnded(file.parse().unwrap(), ending)
                }
                [secs] => {
                    let secs = secs.strip_suffix('s').unwrap().parse().unwrap();
                    now += Duration::from_secs(secs);
                    Event::Tick
                }
                _ => panic!("{step}"),
            };
            let actions = slot.handle(event, now, 1.0);
            let actions: Vec<_> = actions
                .iter()
                .map(|action| match action {
                    Action::Plan { job, full: false } => format!("plan {job}"),
                    Action::Plan { job, full: true } => format!("plan {job} full"),
                    Action::Need(job, _) | Action::NeedMore(job, _) => format!("need {job}"),
                    Action::Abort => "abort".to_owned(),
                    Action::Wait(_, until) => format!("wait {}", (*until - now).as_secs()),
                    Action::Install(job) => format!("install {job}"),
                    Action::Fault(job) => format!("fault {job}"),
                })
                .collect();
            said.push(actions.join(" "));
        }
        assert_eq!(
            said.join("; ").replace("; ;", ";;"),
            expected.replace("; ;", ";;")
        );
    }

    #[test]
    fn an_offer_is_planned_fetched_and_installed() {
        check(
            "offer 1; plan a.ndb b.ndb; begin a.ndb; begin b.ndb; a.ndb good; b.ndb good; plan; installed",
            "plan 1; need 1; yes; yes; ; plan 1; install 1; ",
        );
        check("offer 1; plan; installed", "plan 1; need 1 install 1; ");
        check("offer 1; answered; offer 2", "plan 1; ; plan 2");
    }

    #[test]
    fn only_a_missing_file_is_taken_and_only_once() {
        check(
            "begin a.ndb; offer 1; begin a.ndb; plan a.ndb; begin b.ndb; begin a.ndb; begin a.ndb",
            "no; plan 1; no; need 1; no; yes; no",
        );
    }

    #[test]
    fn the_newest_offer_wins_at_once_until_the_swap() {
        // While planning: as soon as the disk is free.
        check("offer 1; offer 2; plan a.ndb", "plan 1; ; plan 2");
        // While fetching: as soon as the transfers have ended.
        check(
            "offer 1; plan a.ndb; begin a.ndb; offer 2; offer 3; a.ndb good",
            "plan 1; need 1; yes; abort; ; plan 3",
        );
        check(
            "offer 1; plan a.ndb; offer 2",
            "plan 1; need 1; abort plan 2",
        );
        // While waiting for its turn.
        check(
            "splay 60; offer 1; plan; 10s; offer 2",
            "plan 1; need 1 wait 60; ; plan 2",
        );
    }

    #[test]
    fn the_newest_offer_waits_for_the_end_of_swap_and_proof() {
        check(
            "offer 1; plan; offer 2; offer 3; installed; plan",
            "plan 1; need 1 install 1; ; ; plan 3; need 3 install 3",
        );
    }

    #[test]
    fn what_was_cut_off_is_asked_for_again_and_what_was_spoilt_in_full() {
        check(
            "offer 1; plan a.ndb; begin a.ndb; a.ndb cut; plan a.ndb; begin a.ndb; \
             a.ndb spoilt; plan a.ndb; begin a.ndb; a.ndb good; plan",
            "plan 1; need 1; yes; plan 1; need 1; yes; plan 1 full; need 1; yes; plan 1; install 1",
        );
    }

    #[test]
    fn a_master_that_gave_up_on_the_rest_is_asked_again_at_once() {
        check(
            "offer 1; plan a.ndb b.ndb; begin a.ndb; a.ndb cut; plan a.ndb b.ndb",
            "plan 1; need 1; yes; plan 1; need 1",
        );
        check(
            "offer 1; plan a.ndb b.ndb; begin a.ndb; a.ndb spoilt; plan a.ndb b.ndb",
            "plan 1; need 1; yes; plan 1 full; need 1",
        );
        // While something still arrives it has not given up.
        check(
            "offer 1; plan a.ndb b.ndb c.ndb; begin a.ndb; begin b.ndb; a.ndb cut; b.ndb good",
            "plan 1; need 1; yes; yes; ; ",
        );
    }

    #[test]
    fn a_master_that_says_nothing_for_long_is_asked_again_and_then_it_is_a_fault() {
        check(
            "offer 1; plan a.ndb; 299s; 1s; plan a.ndb; 300s; plan a.ndb; 300s; plan a.ndb",
            "plan 1; need 1; ; plan 1; need 1; plan 1; need 1; plan 1; fault 1",
        );
        // A file that arrives takes as long as it takes; the silence begins after it.
        check(
            "offer 1; plan a.ndb b.ndb; 200s; begin a.ndb; 999s; a.ndb good; 299s; 1s; plan b.ndb",
            "plan 1; need 1; ; yes; ; ; ; plan 1; need 1",
        );
    }

    #[test]
    fn after_the_last_round_it_counts_as_trouble_of_the_hosts() {
        check(
            "offer 1; plan a.ndb; begin a.ndb; a.ndb spoilt; plan a.ndb; begin a.ndb; \
             a.ndb spoilt; plan a.ndb; begin a.ndb; a.ndb good; plan a.ndb; 29s; 1s",
            "plan 1; need 1; yes; plan 1 full; need 1; yes; plan 1 full; need 1; yes; plan 1; \
             fault 1; ; plan 1",
        );
    }

    #[test]
    fn a_host_fault_is_tried_again_with_longer_and_longer_waits_until_a_newer_offer() {
        check(
            "offer 1; plan fails; 30s; plan fails; 59s; 1s; plan; fault; 119s; 1s; plan fails; \
             offer 2; plan fails; 30s",
            "plan 1; fault 1; plan 1; fault 1; ; plan 1; need 1 install 1; ; ; plan 1; fault 1; \
             plan 2; fault 2; plan 2",
        );
    }

    #[test]
    fn a_full_disk_stops_the_other_transfers_and_is_one_fault() {
        check(
            "offer 1; plan a.ndb b.ndb; begin a.ndb; begin b.ndb; a.ndb unwritable; b.ndb unwritable",
            "plan 1; need 1; yes; yes; abort; fault 1",
        );
    }

    #[test]
    fn a_lost_connection_ends_transfers_and_not_installs() {
        check(
            "offer 1; plan a.ndb; begin a.ndb; lost; a.ndb good; offer 2",
            "plan 1; need 1; yes; abort; ; plan 2",
        );
        check("offer 1; lost; plan a.ndb; offer 2", "plan 1; ; ; plan 2");
        check(
            "splay 9; offer 1; plan; lost; 9s",
            "plan 1; need 1 wait 9; ; install 1",
        );
        check(
            "offer 1; plan; offer 2; lost; installed",
            "plan 1; need 1 install 1; ; ; ",
        );
        check("offer 1; plan fails; lost; 30s", "plan 1; fault 1; ; ");
    }

    #[test]
    fn an_order_that_was_cut_off_leaves_nothing_under_way() {
        let now = Instant::now();
        let mut slot = Slot::new(false);
        let mut check = |event, said, expected| {
            slot.handle(event, now, 0.0);
            assert_eq!(slot.phase_given(said), expected);
        };
        let (needs, splay) = (vec![need("a.ndb")], Duration::ZERO);
        check(
            Event::Offered("1".to_owned()),
            Phase::Fetching,
            Phase::Fetching,
        );
        check(
            Event::Planned { needs, splay },
            Phase::Fetching,
            Phase::Fetching,
        );
        check(Event::Disconnected, Phase::Fetching, Phase::Idle);
        check(
            Event::Offered("1".to_owned()),
            Phase::Fetching,
            Phase::Fetching,
        );
        let needs = Vec::new();
        check(
            Event::Planned { needs, splay },
            Phase::Reloading,
            Phase::Reloading,
        );
        check(Event::Disconnected, Phase::Proving, Phase::Proving);
        check(
            Event::Installed { fault: true },
            Phase::Proving,
            Phase::Idle,
        );
    }

    #[test]
    fn the_same_offered_again_does_not_wait_from_the_beginning() {
        check(
            "splay 60; offer 1; plan; 50s; lost; offer 1; plan; 10s",
            "plan 1; need 1 wait 60; ; ; plan 1; need 1 wait 10; install 1",
        );
        // Its turn came while the disk was looked at.
        check(
            "splay 60; offer 1; plan; 50s; lost; offer 1; 10s; plan",
            "plan 1; need 1 wait 60; ; ; plan 1; ; need 1 install 1",
        );
        // An operator does not want it to wait, and the next time is another time.
        check(
            "splay 60; offer 1; plan; 50s; splay 0; offer 1; plan; installed; splay 60; offer 1; plan",
            "plan 1; need 1 wait 60; ; plan 1; need 1 install 1; ; plan 1; need 1 wait 60",
        );
        check(
            "splay 60; offer 1; plan; 50s; offer 2; plan",
            "plan 1; need 1 wait 60; ; plan 2; need 2 wait 60",
        );
    }

    #[test]
    fn an_offer_waits_for_the_end_of_what_the_last_run_left() {
        let mut slot = Slot::new(true);
        let now = Instant::now();
        let job = "1".to_owned();
        assert_eq!(slot.handle(Event::Offered(job.clone()), now, 0.0), []);
        let planned = slot.handle(Event::Installed { fault: true }, now, 0.0);
        assert_eq!(planned, [Action::Plan { job, full: false }]);
    }
}
