//! A generation's way through the fleet: which one each agent is wanted at, and when it is the next
//! one's turn.
//!
//! Pure: no sockets, no disk, no clock. `hub.rs` feeds in what happened, keeps the state on disk
//! before any agent hears of it, and carries out the [`Effect`]s.

mod run;
#[cfg(test)]
mod tests;
mod wave;
mod window;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use clamcast_daemon::config::Percent;
use clamcast_proto::{AgentName, Digest, GroupName, Position};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use run::{Pause, PauseKind, Run, Tally};
pub use wave::{Begun, Wave, WaveError, place};
pub use window::{Window, WindowError};

use run::{Placed, Turn};

/// Generations that are remembered as taken back. A host that still has an older one of them was
/// away for so many bad updates; then it is told to go on from there like any other.
const TAKEN_BACK_MAX: usize = 256;

/// How careful rollouts are: `[rollout]` of the configuration.
#[derive(Clone, Debug)]
pub struct Rules {
    /// The steps, in order. After the last one everybody is wanted at the generation.
    pub waves: Vec<Wave>,
    /// Wait after a wave is done before the next begins.
    pub settle: Duration,
    /// Agents whose clamd refused it, as a part of those that were offered it.
    pub refused_max: Percent,
    /// Agents with trouble of their own, as a part of those that were offered it.
    pub unwell_max: Percent,
    /// Whether those who took what was halted go back.
    pub rollback_on_halt: bool,
    /// Silence that counts as trouble.
    pub deadline: Duration,
    /// When hosts of a group may be given something new. A group without one: always.
    pub windows: BTreeMap<GroupName, Vec<Window>>,
}

/// A published generation.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Target {
    /// Where it stands.
    pub position: Position,
    /// Its manifest.
    pub manifest_sha256: Digest,
    /// What is in it.
    pub content: Digest,
}

/// An agent, as far as rollouts are concerned.
#[derive(Clone, Debug)]
pub struct Member<'a> {
    /// Its name.
    pub name: &'a AgentName,
    /// Its groups.
    pub groups: &'a [GroupName],
    /// Whether it is connected.
    pub connected: bool,
    /// When it last was.
    pub seen: Timestamp,
    /// The highest generation that it took, by its receipts and by what it was offered: agents never
    /// take a lower one.
    pub at: Option<Position>,
    /// What its receipt says of the running generation.
    pub word: Option<Word>,
    /// Its last sign of progress with the running generation, on this connection or before.
    pub progress: Option<Timestamp>,
    /// When it was first offered the running generation.
    pub offered: Option<Timestamp>,
}

/// Where members come from: the fleet.
pub trait Agents {
    /// Every enrolled agent, with what it says of `target`.
    fn members(&self, target: Option<&Target>) -> Vec<Member<'_>>;
}

/// What came of a generation on an agent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Word {
    /// Live, with every file intact.
    Live,
    /// On its disk, and clamd has not shown it yet.
    Installed,
    /// clamd cannot use it.
    Refused,
    /// The host could not take it, or declined.
    Unwell,
}

/// What an agent is wanted at.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Wanted {
    /// Nothing yet: no generation is meant for it.
    Nothing,
    /// What it has, whichever that is.
    Stay,
    /// This generation.
    At(Target),
}

/// What everybody is wanted at, and where that is about to change.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Rollout {
    /// The last one that went through, or went back.
    complete: Option<Target>,
    /// What that one takes away: who has had it waits for no window.
    urgent: Option<Position>,
    running: Option<Run>,
    /// The newest one that waits for the running one to end.
    waiting: Option<Target>,
    pins: BTreeMap<GroupName, Pin>,
    /// How the last one ended that did not go through.
    failed: Option<Failed>,
    /// All that were halted, aborted or rolled back: nobody is offered them any more.
    #[serde(default)]
    taken_back: BTreeSet<Position>,
    /// A rollback that has to be published.
    owed: Option<Owed>,
    /// Why nothing is published although the mirror changes.
    held: Option<Held>,
}

/// A generation that did not go through.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Failed {
    /// Which one.
    pub target: Target,
    /// How it ended.
    pub how: Ending,
    /// Why.
    pub reason: String,
    /// When.
    pub since: Timestamp,
}

/// How a rollout ended that did not go through.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// By itself: clamds refused it.
    Halted,
    /// By an operator.
    Aborted,
    /// By an operator, after it was complete.
    RolledBack,
}

impl Ending {
    /// What was done to it, as in `was halted`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Halted => "halted",
            Self::Aborted => "aborted",
            Self::RolledBack => "rolled back",
        }
    }
}

/// A group that is kept where it is.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Pin {
    /// The generation.
    pub target: Target,
    /// Why.
    pub reason: Option<String>,
    /// Since when.
    pub since: Timestamp,
}

/// A rollback that was decided and is not published yet.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Owed {
    /// What is to be published again.
    pub to: Target,
    /// What it takes away.
    pub of: Target,
}

/// Why nothing is published.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Held {
    /// In words.
    pub reason: String,
    /// Since when.
    pub since: Timestamp,
}

/// What follows from a change. The state is on disk before it is carried out.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// For the audit log.
    Note {
        /// The event.
        event: &'static str,
        /// The generation.
        target: Target,
        /// Why, or what.
        reason: String,
    },
    /// This content must not be published again unless an operator accepts it.
    Reject {
        /// What had it.
        target: Target,
        /// How it ended.
        how: Ending,
    },
    /// The mirror may hold something that was passed over.
    Look,
}

/// What an operator orders.
#[derive(Clone, Debug)]
pub enum Order {
    /// Begin no further wave and offer nothing more.
    Pause(String),
    /// Go on.
    Resume(Option<String>),
    /// End the running generation, as a halt does.
    Abort(String),
    /// Begin all waves that are still to come.
    Promote(String),
    /// Let what waits take the place of the running generation.
    Supersede,
    /// Publish these databases again, in the place of what is current.
    RollBack(Target, String),
    /// Keep a group at a generation, or where it is wanted now.
    Pin(GroupName, Option<Target>, Option<String>),
    /// Let a group go with everybody else again.
    Unpin(GroupName, Option<String>),
}

/// An order that cannot be carried out.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub enum OrderError {
    /// Nothing is on its way.
    #[error("no rollout is running{}", complete.map(|target| format!("; everybody is wanted at {}", target.position)).unwrap_or_default())]
    Idle {
        /// What everybody is wanted at.
        complete: Option<Target>,
    },
    /// Nothing waits.
    #[error("no generation waits for its turn")]
    NothingWaits,
    /// It is not paused.
    #[error("the rollout of {0} is not paused")]
    NotPaused(Position),
    /// An operator has paused it; whose reason counts must not depend on who came last.
    #[error(
        "the rollout of {position} is paused since {since:.0}: {reason}; `rollout resume` first to pause it for another reason"
    )]
    Paused {
        /// What is on its way.
        position: Position,
        /// Why it is paused.
        reason: String,
        /// Since when.
        since: Timestamp,
    },
    /// Agents never go back.
    #[error(
        "{agent} is at {at} already, and agents never go back to a lower number: `rollback` publishes the old databases under a new one"
    )]
    Past {
        /// Who.
        agent: AgentName,
        /// Where it is.
        at: Position,
    },
    /// It is not to be offered to anybody.
    #[error("{0} was halted, aborted or rolled back, and nobody is offered it any more")]
    TakenBack(Position),
    /// Nothing is pinned.
    #[error("group `{0}` is not pinned")]
    NotPinned(GroupName),
    /// It is not what everybody could have by now.
    #[error(
        "{0} has not gone through the fleet yet: wait until it has (`rollout status`), or pin one that everybody has"
    )]
    NotThrough(Position),
    /// Some of the group have what is on its way, and some have not.
    #[error(
        "{agent} and others of group `{group}` are at {at}, which is on its way, and the others are not: wait until it has gone through, or `rollout abort`"
    )]
    Split {
        /// The group.
        group: GroupName,
        /// One that has it.
        agent: AgentName,
        /// Where that one is.
        at: Position,
    },
    /// It is what is on its way.
    #[error("{0} is on its way already; `rollout promote` brings it to everybody at once")]
    OnItsWay(Position),
    /// That is where everybody is wanted.
    #[error("{0} is what everybody is wanted at")]
    Current(Position),
}

impl Rollout {
    /// Where it stood is not known: nobody is wanted at anything, and nothing is published until
    /// [`Rollout::resume`].
    pub fn lost(reason: String, now: Timestamp) -> Self {
        Self {
            held: Some(Held { reason, since: now }),
            ..Self::default()
        }
    }

    /// What everybody is wanted at who is in no wave that has begun.
    pub fn complete(&self) -> Option<&Target> {
        self.complete.as_ref()
    }

    /// What [`Rollout::complete`] takes away, if that is a rollback.
    pub fn went_back_from(&self) -> Option<Position> {
        self.urgent.filter(|_| self.complete.is_some())
    }

    /// What is on its way.
    pub fn running(&self) -> Option<&Run> {
        self.running.as_ref()
    }

    /// What waits for its turn.
    pub fn waiting(&self) -> Option<&Target> {
        self.waiting.as_ref()
    }

    /// How the last one ended that did not go through.
    pub fn failed(&self) -> Option<&Failed> {
        self.failed.as_ref()
    }

    /// Whether a generation was halted, aborted or rolled back.
    pub fn is_taken_back(&self, position: Position) -> bool {
        self.taken_back.contains(&position)
    }

    /// The rollback that is to be published now.
    pub fn owed(&self) -> Option<&Owed> {
        self.owed.as_ref()
    }

    /// Why nothing is published at the moment.
    pub fn held(&self) -> Option<&Held> {
        self.held.as_ref()
    }

    /// The pinned groups.
    pub fn pins(&self) -> &BTreeMap<GroupName, Pin> {
        &self.pins
    }

    /// Takes note of a start of the master: agents that were there are waited for.
    pub fn resumed(&mut self, now: Timestamp) {
        if let Some(run) = &mut self.running {
            run.resumed = Some(now);
        }
    }

    /// Generations that somebody may be wanted at: they and their files are kept.
    pub fn needed(&self) -> impl Iterator<Item = &Target> {
        let running = self.running.as_ref().map(|run| &run.target);
        let pinned = self.pins.values().map(|pin| &pin.target);
        let owed = self.owed.as_ref().map(|owed| &owed.to);
        let one = [self.complete.as_ref(), running, self.waiting.as_ref(), owed];
        one.into_iter().flatten().chain(pinned)
    }

    /// What an agent should run: the pin of its group; else the running generation if its wave has
    /// begun; else the last complete one. Never lower than what it has, and never what was taken
    /// back.
    pub fn wanted(&self, member: &Member<'_>, rules: &Rules, now: Timestamp) -> Wanted {
        let Some(wanted) = self.meant_for(member) else {
            return member.at.map_or(Wanted::Nothing, |_| Wanted::Stay);
        };
        match member.at {
            Some(at) if at > wanted.position => Wanted::Stay,
            Some(at)
                if at < wanted.position && self.waits_for_window(member, wanted, rules, now) =>
            {
                Wanted::Stay
            }
            Some(_) | None => Wanted::At(*wanted),
        }
    }

    /// The same without a look at what it has or at the clock.
    fn meant_for(&self, member: &Member<'_>) -> Option<&Target> {
        self.named_for(member)
            .filter(|target| !self.is_taken_back(target.position))
    }

    fn named_for(&self, member: &Member<'_>) -> Option<&Target> {
        if let Some(pin) = self.pin(member.groups) {
            return Some(pin);
        }
        let running = self.running.as_ref().filter(|run| {
            // What an agent has taken in hand while the rollout ran it may finish.
            let offered =
                run.paused.as_ref().is_none_or(Pause::lets_offer) || member.progress.is_some();
            offered && run.has(member)
        });
        running.map(|run| &run.target).or(self.complete.as_ref())
    }

    /// Of several pinned groups of an agent the lowest generation counts: a pin holds back.
    pub fn pin(&self, groups: &[GroupName]) -> Option<&Target> {
        let pins = groups.iter().filter_map(|group| self.pins.get(group));
        pins.map(|pin| &pin.target)
            .min_by_key(|target| target.position)
    }

    fn waits_for_window(
        &self,
        member: &Member<'_>,
        wanted: &Target,
        rules: &Rules,
        now: Timestamp,
    ) -> bool {
        if self.urgent.is_some()
            && self.complete.as_ref() == Some(wanted)
            && member.at >= self.urgent
        {
            return false;
        }
        !rules.is_open(member.groups, now)
    }

    /// A generation was published. It goes through the waves, at once or after the running one.
    pub fn published(&mut self, target: Target, supersede: bool, rules: &Rules) -> Vec<Effect> {
        let failed = self.failed.as_ref().map(|failed| &failed.target);
        let highest = self.needed().chain(failed).map(|known| known.position);
        if highest.max() >= Some(target.position) {
            return Vec::new(); // told again after a restart
        }
        if self.owed.is_some() {
            return Vec::new(); // it is below the rollback, after which the mirror is looked at
        }
        // One that nobody was offered needs no end, and one that waits for a night has made way.
        let makes_way =
            |run: &Run| run.paused.is_none() && (run.begun.is_empty() || run.waits_for_window);
        let running = self.running.as_ref();
        let Some(run) = running.filter(|run| !supersede && !makes_way(run)) else {
            return self.begin(target, rules);
        };
        let reason = format!("waits for {}", run.target.position);
        self.waiting = Some(target);
        vec![note("rollout-waits", target, reason)]
    }

    /// The rollback that was [`Rollout::owed`] was published: everybody is wanted at it at once.
    /// Who never had what it takes away only counts its number.
    pub fn went_back(&mut self, target: Target) -> Vec<Effect> {
        // Told again after a restart, or another one was ordered meanwhile.
        let Some(owed) = self.owed.take_if(|owed| owed.to.content == target.content) else {
            return Vec::new();
        };
        self.complete = Some(target);
        self.urgent = Some(owed.of.position);
        let reason = format!(
            "the databases of {} instead of those of {}",
            owed.to.position, owed.of.position
        );
        let mut effects = vec![note("rollback", target, reason)];
        if self.held.is_none() {
            effects.push(Effect::Look); // what waited has a lower number now
        }
        effects
    }

    /// Forgets generations that are not to be offered any more.
    pub fn retain(&mut self, may_be_offered: impl Fn(&Target) -> bool) -> Vec<Effect> {
        self.complete.take_if(|target| !may_be_offered(target));
        self.running.take_if(|run| !may_be_offered(&run.target));
        self.waiting.take_if(|target| !may_be_offered(target));
        self.owed.take_if(|owed| !may_be_offered(&owed.to));
        if self.complete.is_none() {
            self.urgent = None;
        }
        let why = "its generation is not to be offered any more";
        self.unpin_all(|pin| !may_be_offered(&pin.target), why)
    }

    /// Lets go the groups of some pins.
    fn unpin_all(&mut self, of: impl Fn(&Pin) -> bool, why: &str) -> Vec<Effect> {
        let gone = self.pins.extract_if(.., |_, pin| of(pin));
        let unpinned =
            gone.map(|(group, pin)| note("unpin", pin.target, format!("group {group}: {why}")));
        unpinned.collect()
    }

    fn begin(&mut self, target: Target, rules: &Rules) -> Vec<Effect> {
        let waves: Vec<_> = rules.waves.iter().map(Wave::to_string).collect();
        self.waiting = None;
        self.running = Some(Run::new(target, rules.waves.clone()));
        vec![note(
            "rollout",
            target,
            format!("waves {}", waves.join(", ")),
        )]
    }

    /// Looks where the running generation is, and decides what follows. To be called after every
    /// change of the fleet, and every few seconds.
    pub fn step(&mut self, agents: &impl Agents, rules: &Rules, now: Timestamp) -> Vec<Effect> {
        let mut effects = Vec::new();
        if let Some(run) = &mut self.running {
            run.clock_is_at(now);
        }
        loop {
            let subject = self.subject(agents, rules, now);
            let Some(run) = &mut self.running else {
                return effects;
            };
            match run.turn(&subject, rules, now, &mut effects) {
                Turn::Rest => return effects,
                Turn::Again => {} // a wave has begun, or is over
                Turn::Through => effects.extend(self.completed(rules)),
                Turn::Halt(reason) => {
                    effects.extend(self.end(Ending::Halted, reason, rules, now));
                }
            }
        }
    }

    /// The agents that take part in the running generation: who is pinned to another one does not,
    /// nor does who is past it. A refusal counts in any case.
    fn subject<'a>(
        &self,
        agents: &'a impl Agents,
        rules: &Rules,
        now: Timestamp,
    ) -> Vec<Placed<'a>> {
        let Some(run) = &self.running else {
            return Vec::new();
        };
        let takes_part = |member: &Member<'_>| {
            let pin = self.pin(member.groups);
            let pinned = pin.is_some_and(|pin| pin.position != run.target.position);
            (!pinned || member.word == Some(Word::Refused))
                && member.at.is_none_or(|at| at <= run.target.position)
        };
        let members = agents.members(Some(&run.target));
        let members = members.into_iter().filter(takes_part);
        let placed = |member: Member<'a>| {
            let may = member.word.is_some() || rules.is_open(member.groups, now);
            run.placed(member, may)
        };
        members.map(placed).collect()
    }

    fn completed(&mut self, rules: &Rules) -> Vec<Effect> {
        let Some(run) = self.running.take() else {
            return Vec::new();
        };
        self.complete = Some(run.target);
        self.urgent = None;
        self.failed = None;
        let mut effects = vec![note(
            "rollout-complete",
            run.target,
            "every wave is done".to_owned(),
        )];
        if let Some(next) = self.waiting.take() {
            effects.extend(self.begin(next, rules));
        }
        effects
    }

    /// Ends the running generation: nothing more is offered of it.
    fn end(&mut self, how: Ending, reason: String, rules: &Rules, now: Timestamp) -> Vec<Effect> {
        let Some(run) = self.running.take() else {
            return Vec::new();
        };
        let target = run.target;
        self.take_back(target);
        self.failed = Some(Failed {
            target,
            how,
            reason: reason.clone(),
            since: now,
        });
        let event = match how {
            Ending::Halted => "halt",
            Ending::Aborted => "abort",
            Ending::RolledBack => "rolled-back",
        };
        let mut effects = vec![note(event, target, reason), Effect::Reject { target, how }];
        let same = |it: &Target| it.content == target.content;
        effects.extend(self.unpin_all(|pin| same(&pin.target), "its generation was taken back"));
        if self.waiting.take_if(|waiting| same(waiting)).is_some() {
            effects.push(Effect::Look); // which says that it is held
        }
        match self.complete {
            // What waits has a lower number than the rollback will have: it is captured anew.
            Some(to) if rules.rollback_on_halt && !run.begun.is_empty() => {
                self.owed = Some(Owed { to, of: target });
                self.waiting = None;
            }
            Some(_) | None => {
                if let Some(next) = self.waiting.take() {
                    effects.extend(self.begin(next, rules));
                }
            }
        }
        effects
    }

    fn take_back(&mut self, target: Target) {
        self.taken_back.insert(target.position);
        if self.taken_back.len() > TAKEN_BACK_MAX {
            self.taken_back.pop_first();
        }
    }

    /// Carries out what an operator orders.
    pub fn order(
        &mut self,
        order: Order,
        agents: &impl Agents,
        rules: &Rules,
        now: Timestamp,
    ) -> Result<Vec<Effect>, OrderError> {
        match order {
            Order::Pause(reason) => self.pause(reason, now),
            Order::Resume(reason) => self.resume(reason, agents, rules, now),
            Order::Abort(reason) => self.abort(reason, rules, now),
            Order::Promote(reason) => self.promote(reason, now),
            Order::Supersede => {
                let waiting = self.waiting.ok_or(OrderError::NothingWaits)?;
                Ok(self.begin(waiting, rules))
            }
            Order::RollBack(to, reason) => self.roll_back(to, reason, agents, now),
            Order::Pin(group, Some(target), reason) => {
                self.pin_group(group, target, reason, agents, now)
            }
            Order::Pin(group, None, reason) => {
                let target = self.common(&group, agents)?;
                self.pin_group(group, target, reason, agents, now)
            }
            Order::Unpin(group, reason) => self.unpin_group(&group, reason),
        }
    }

    /// Begins no further wave and offers nothing more, until [`Rollout::resume`]: also where what it
    /// has paused for by itself is over before that.
    pub fn pause(&mut self, reason: String, now: Timestamp) -> Result<Vec<Effect>, OrderError> {
        let run = self.run()?;
        let by_operator = |pause: &&Pause| pause.kind == PauseKind::Operator;
        if let Some(pause) = run.paused.as_ref().filter(by_operator) {
            return Err(OrderError::Paused {
                position: run.target.position,
                reason: pause.reason.clone(),
                since: pause.since,
            });
        }
        Ok(run.pause(PauseKind::Operator, reason, now))
    }

    /// Goes on, with the agents that have trouble now; and publishes again after a rollback.
    pub fn resume(
        &mut self,
        reason: Option<String>,
        agents: &impl Agents,
        rules: &Rules,
        now: Timestamp,
    ) -> Result<Vec<Effect>, OrderError> {
        let reason = reason.unwrap_or_else(|| "by an operator".to_owned());
        if self.held.take().is_some() {
            let known = self.complete.or(self.owed.as_ref().map(|owed| owed.to));
            let resumed = known.map(|known| {
                let reason = format!("the mirror is published again: {reason}");
                note("rollout-resumed", known, reason)
            });
            return Ok(resumed.into_iter().chain([Effect::Look]).collect());
        }
        let subject = self.subject(agents, rules, now);
        let run = self.run()?;
        let Some(pause) = run.paused.take() else {
            return Err(OrderError::NotPaused(run.target.position));
        };
        run.unwell_seen = run.tally(&subject, None, rules, now).unwell;
        if let Some(begun) = run.begun.last_mut()
            && pause.is_for(PauseKind::Unproven)
        {
            begun.since = now; // as long again
        }
        Ok(vec![note("rollout-resumed", run.target, reason)])
    }

    /// Ends the running generation, as a halt does.
    pub fn abort(
        &mut self,
        reason: String,
        rules: &Rules,
        now: Timestamp,
    ) -> Result<Vec<Effect>, OrderError> {
        self.run()?;
        Ok(self.end(Ending::Aborted, reason, rules, now))
    }

    /// Makes one wave of everybody, in the place of those that have begun and are still to come.
    pub fn promote(&mut self, reason: String, now: Timestamp) -> Result<Vec<Effect>, OrderError> {
        let run = self.run()?;
        run.promote(now);
        Ok(vec![note("promoted", run.target, reason)])
    }

    /// Takes the current generation away: the databases of `to` are to be published again, and
    /// nothing else until [`Rollout::resume`].
    pub fn roll_back(
        &mut self,
        to: Target,
        reason: String,
        agents: &impl Agents,
        now: Timestamp,
    ) -> Result<Vec<Effect>, OrderError> {
        let Some(complete) = self.complete else {
            return Err(OrderError::Idle { complete: None });
        };
        if self.is_taken_back(to.position) {
            return Err(OrderError::TakenBack(to.position));
        }
        let running = self.running.as_ref().map(|run| run.target);
        if running.is_some_and(|running| running.content == to.content) {
            return Err(OrderError::OnItsWay(to.position));
        }
        let mut effects = Vec::new();
        let of = match self.running.take() {
            Some(run) => run.target,
            None => {
                // Where a halt took nobody back, those who are past it are to come.
                let all = agents.members(None);
                let ahead = all.iter().filter_map(|it| it.at).max();
                if complete.content == to.content && ahead <= Some(complete.position) {
                    return Err(OrderError::Current(complete.position));
                }
                match self.failed.as_ref().map(|failed| failed.target) {
                    Some(failed) if ahead >= Some(failed.position) => failed,
                    Some(_) | None => complete,
                }
            }
        };
        let how = Ending::RolledBack;
        for target in [of, complete] {
            if target.content != to.content {
                self.take_back(target);
                effects.push(Effect::Reject { target, how });
                let same = |pin: &Pin| pin.target.content == target.content;
                effects.extend(self.unpin_all(same, "its generation was taken back"));
            }
        }
        self.take_back(of);
        let gone = |pin: &Pin| pin.target.position == of.position;
        effects.extend(self.unpin_all(gone, "its generation was taken back"));
        effects.dedup();
        self.waiting = None;
        self.failed = Some(Failed {
            target: of,
            how,
            reason: reason.clone(),
            since: now,
        });
        self.held = Some(Held {
            reason: format!("rolled back to the databases of {}: {reason}", to.position),
            since: now,
        });
        self.owed = Some(Owed { to, of });
        effects.push(note("rolled-back", of, reason));
        Ok(effects)
    }

    /// Where all of a group are: what everybody has, or what is on its way if all of them have it.
    fn common(&self, group: &GroupName, agents: &impl Agents) -> Result<Target, OrderError> {
        let complete = self.complete;
        let running = self.running.as_ref().map(|run| run.target);
        let members = agents.members(None);
        let of_group = || members.iter().filter(|it| it.groups.contains(group));
        let past = |it: &&Member<'_>| it.at > complete.map(|target| target.position);
        let Some(ahead) = of_group().find(past) else {
            return complete.ok_or(OrderError::Idle { complete });
        };
        let running = running.ok_or(OrderError::Idle { complete })?;
        if of_group().all(|it| it.at == Some(running.position)) {
            return Ok(running);
        }
        Err(OrderError::Split {
            group: group.clone(),
            agent: ahead.name.clone(),
            at: running.position,
        })
    }

    /// Keeps a group at `target`: one that everybody could have, or that all of the group have.
    pub fn pin_group(
        &mut self,
        group: GroupName,
        target: Target,
        reason: Option<String>,
        agents: &impl Agents,
        now: Timestamp,
    ) -> Result<Vec<Effect>, OrderError> {
        if self.is_taken_back(target.position) {
            return Err(OrderError::TakenBack(target.position));
        }
        let members = agents.members(None);
        let of_group = || members.iter().filter(|it| it.groups.contains(&group));
        let past = of_group().filter_map(|member| {
            Some((member.name, member.at.filter(|at| *at > target.position)?))
        });
        if let Some((agent, at)) = past.max_by_key(|(_, at)| *at) {
            return Err(OrderError::Past {
                agent: agent.clone(),
                at,
            });
        }
        let through = self
            .complete
            .is_some_and(|it| it.position >= target.position);
        if !through && !of_group().all(|it| it.at == Some(target.position)) {
            return Err(OrderError::NotThrough(target.position)); // the waves are not to be got round
        }
        let text = format!(
            "group {group}{}",
            reason
                .as_ref()
                .map(|reason| format!(": {reason}"))
                .unwrap_or_default()
        );
        self.pins.insert(
            group,
            Pin {
                target,
                reason,
                since: now,
            },
        );
        Ok(vec![note("pin", target, text)])
    }

    /// Lets a group go with everybody else again.
    pub fn unpin_group(
        &mut self,
        group: &GroupName,
        reason: Option<String>,
    ) -> Result<Vec<Effect>, OrderError> {
        let pin = self
            .pins
            .remove(group)
            .ok_or_else(|| OrderError::NotPinned(group.clone()))?;
        let reason = reason
            .map(|reason| format!(": {reason}"))
            .unwrap_or_default();
        Ok(vec![note(
            "unpin",
            pin.target,
            format!("group {group}{reason}"),
        )])
    }

    fn run(&mut self) -> Result<&mut Run, OrderError> {
        let complete = self.complete;
        self.running.as_mut().ok_or(OrderError::Idle { complete })
    }

    /// What became of the running generation so far, in all waves that have begun, and in the last.
    pub fn tallies(
        &self,
        agents: &impl Agents,
        rules: &Rules,
        now: Timestamp,
    ) -> Option<(Tally, Tally)> {
        let subject = self.subject(agents, rules, now);
        let run = self.running.as_ref()?;
        let all = run.tally(&subject, None, rules, now);
        let wave = run.tally(&subject, run.begun.last(), rules, now);
        Some((all, wave))
    }
}

impl Rules {
    /// Whether an agent of these groups may be given something new now.
    fn is_open(&self, groups: &[GroupName], now: Timestamp) -> bool {
        let mut windows = groups
            .iter()
            .filter_map(|group| self.windows.get(group))
            .flatten()
            .peekable();
        windows.peek().is_none() || windows.any(|window| window.is_open(now))
    }
}

fn note(event: &'static str, target: Target, reason: String) -> Effect {
    Effect::Note {
        event,
        target,
        reason,
    }
}
