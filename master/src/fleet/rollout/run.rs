//! One generation on its way: its waves, and whether it may go on.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use clamcast_daemon::values::Percent;
use clamcast_proto::{AgentName, AuditEvent, DatabaseName, GroupName};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::weigh::{Judgement, Votes};
use super::{Answer, Begun, Effect, Member, Target, note};
use crate::config::{Rules, Wave};

/// Where the waves before it are empty, this part of the fleet goes first: an empty canary group
/// must not mean that everybody is a canary.
const SUBSTITUTE: u8 = 10;

/// How long a started master waits for the agents that were connected before: the idle timeout of
/// their connections and their longest wait between two attempts, with some time to spare.
const RECONNECT: SignedDuration = SignedDuration::from_mins(3);

/// This part of the agents that were connected before a start must be back before a wave begins
/// within [`RECONNECT`].
const BACK_PERCENT: usize = 90;

/// In a smaller fleet the other hosts do not wait for a group whose members are all disconnected.
const SMALL_FLEET: usize = 10;

/// Members of a group that were not connected for this long are not waited for.
const SEEN: SignedDuration = SignedDuration::from_hours(24);

/// Agents that a reason names; `agents` lists all.
const NAMED_MAX: usize = 5;

/// Files that the refusals of one generation may blame. With more of them the generation is to blame.
pub(super) const BLAMED_MAX: usize = 100;

/// Agents that an audit record or `status` names.
const LISTED_MAX: usize = 20;

/// A generation on its way.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Run {
    /// The generation.
    pub target: Target,
    /// When it began. An operator's pause moves it on.
    pub since: Timestamp,
    /// The waves that have begun.
    pub begun: Vec<Begun>,
    /// Those that are still to come.
    pub ahead: Vec<Wave>,
    /// Waves without members, which were skipped.
    pub skipped: Vec<Wave>,
    /// Whether the next wave waits for a window of its members to open.
    #[serde(default)]
    pub waits_for_window: bool,
    /// Since when the next wave, a group, waits for one of its members to connect.
    #[serde(default)]
    pub waits_for_group: Option<Timestamp>,
    /// An operator has made one wave of everybody.
    #[serde(default)]
    pub promoted: bool,
    /// Since when the last wave that began is settled.
    pub done: Option<Timestamp>,
    /// Why it does not go on.
    pub paused: Option<Pause>,
    /// Members of the last wave with trouble that an operator has seen and gone on with.
    pub(super) unwell_seen: usize,
    /// ClamAV versions whose refusals are being weighed, and since when: meanwhile no further agent
    /// is offered the generation.
    #[serde(default)]
    pub weighing: BTreeMap<String, Weighing>,
    /// ClamAV versions that are not offered it.
    #[serde(default)]
    pub withheld: BTreeMap<String, Withheld>,
    /// When the master was started, if it went on after a start.
    #[serde(skip)]
    pub(super) resumed: Option<Timestamp>,
}

/// Refusals by hosts of one ClamAV version that are being weighed.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Weighing {
    /// Some of the hosts that refused.
    pub refused: Vec<AgentName>,
    /// Since when.
    pub since: Timestamp,
}

/// Why the agents of a ClamAV version are not offered a generation.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Withheld {
    /// What kind of reason.
    pub cause: WithheldCause,
    /// In words.
    pub reason: String,
    /// Since when.
    pub since: Timestamp,
}

/// The kinds of reasons.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WithheldCause {
    /// Members of that version refused it, and too few proved it.
    Refused,
    /// The first wave has members of that version, and too few have proven it yet. It ends with
    /// their proofs, or when twice the wave's deadline has passed.
    Unproven,
}

/// Why a rollout does not go on.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Pause {
    /// What kind.
    pub kind: PauseKind,
    /// In words.
    pub reason: String,
    /// Since when.
    pub since: Timestamp,
    /// The pause that the rollout had made by itself, if an operator's took its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Box<Pause>>,
}

/// Who or what paused a rollout.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PauseKind {
    /// `rollout pause`: until `rollout resume`.
    Operator,
    /// Too many members have trouble of their own: until they are well, until the wave's deadline if
    /// it has a quorum then, or `rollout resume`.
    Unwell,
    /// The wave has no quorum at its deadline: until it has one, or `rollout resume`.
    Unproven,
}

/// The state of the running generation on the members of the last wave, or of all waves that have
/// begun. Hosts that are set aside and versions that it is withheld from do not count.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Tally {
    /// Members that were connected at some time since their wave began.
    pub members: usize,
    /// Proven live.
    pub live: usize,
    /// Have not answered, and the wave waits for them.
    pub unsettled: usize,
    /// Refused it.
    pub refused: usize,
    /// With trouble of their own.
    pub unwell: usize,
    /// Some that refused it or are unwell.
    pub named: Vec<AgentName>,
    /// Some of those that the wave waits for.
    pub waits_for: Vec<Awaited>,
    /// Have not proven it, and are not set aside.
    #[serde(skip)]
    behind: usize,
    /// Some of those.
    #[serde(skip)]
    lacking: Vec<AgentName>,
}

/// A member that a wave waits for.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Awaited {
    /// Its name.
    pub agent: AgentName,
    /// Until when at most.
    pub until: Timestamp,
}

/// An agent that takes part.
#[derive(Clone, Debug)]
pub(super) struct Participant<'a> {
    pub(super) member: Member<'a>,
    /// The first started wave that it is in.
    pub(super) wave: Option<usize>,
    /// Its window is open, or it has taken the generation before that closed.
    pub(super) may: bool,
    pub(super) regard: Regard,
}

/// Whether a host counts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Regard {
    Counted,
    /// Its refusal of this generation was outweighed.
    SetAsideNow,
    /// It was set aside before.
    SetAside,
}

/// What follows for a run.
#[derive(Debug)]
pub(super) enum Turn {
    /// Nothing yet.
    Rest,
    /// Something has changed, so more may follow.
    Again,
    /// These hosts refused what others of their version have proven.
    SetAside(Vec<AgentName>, String),
    /// Every wave is settled.
    Through,
    /// It must end.
    Halt(Halt),
}

/// Why a run ends before it is through.
#[derive(Debug)]
pub(super) struct Halt {
    /// In words.
    pub(super) reason: String,
    /// See [`Withdrawal::blamed`](crate::publish::withdrawn::Withdrawal::blamed).
    pub(super) blamed: BTreeSet<DatabaseName>,
}

/// An operator's reason names no file.
impl From<String> for Halt {
    fn from(reason: String) -> Self {
        let blamed = BTreeSet::new();
        Self { reason, blamed }
    }
}

impl Pause {
    /// Whether it is of this kind, or took the place of one that was.
    pub(super) fn is_for(&self, kind: PauseKind) -> bool {
        self.kind == kind || self.before.as_ref().is_some_and(|it| it.is_for(kind))
    }

    /// Whether members of started waves are still offered it: without them a wave would never have a
    /// quorum.
    fn lets_offer(&self) -> bool {
        self.kind != PauseKind::Operator
    }
}

impl Run {
    /// Has not begun any wave.
    pub(super) fn new(target: Target, waves: Vec<Wave>, now: Timestamp) -> Self {
        Self {
            target,
            since: now,
            begun: Vec::new(),
            ahead: waves,
            skipped: Vec::new(),
            waits_for_window: false,
            waits_for_group: None,
            promoted: false,
            done: None,
            paused: None,
            unwell_seen: 0,
            weighing: BTreeMap::new(),
            withheld: BTreeMap::new(),
            resumed: None,
        }
    }

    /// Decides what follows, one thing at a time.
    pub(super) fn turn(
        &mut self,
        subject: &[Participant<'_>],
        rules: &Rules,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) -> Turn {
        if let Some(turn) = self.weigh(subject, rules, now, effects) {
            return turn;
        }
        self.release_unproven(subject, rules, now, effects);
        let wave = self.tally(subject, self.begun.last(), rules, now);
        self.unwell_seen = self.unwell_seen.min(wave.unwell);
        let unwell =
            wave.unwell > self.unwell_seen && wave.unwell as u64 > rules.unwell(wave.members);
        let last = self.begun.last();
        let is_due = last.is_some_and(|begun| is_over(begun.timed_from, rules.deadline, now));
        let is_settled = wave.has_quorum() && (is_due || wave.unsettled == 0 && !unwell);
        let resumes = match self.paused.as_ref().map(|pause| pause.kind) {
            None => false,
            Some(PauseKind::Operator) => return Turn::Rest,
            Some(PauseKind::Unwell) => !unwell || is_settled,
            Some(PauseKind::Unproven) => is_settled,
        };
        if resumes {
            self.paused = None;
            let reason = "what it was paused for is over".to_owned();
            effects.push(note(AuditEvent::RolloutResumed, self.target, reason));
        }
        if self.paused.is_some() {
            return Turn::Rest;
        }
        if unwell && !is_settled {
            let (unwell, members) = (wave.unwell, wave.members);
            let named = names(&wave.named);
            let reason = format!("{unwell} of {members} hosts have trouble of their own: {named}");
            effects.extend(self.pause(PauseKind::Unwell, reason, now));
            return Turn::Rest;
        }
        // Whether the generation is withheld from all members of the last wave: the others go on.
        let mut left_out = false;
        if wave.members == 0 && !self.promoted && !self.begun.is_empty() {
            let last = self.begun.len() - 1;
            let mut members = subject
                .iter()
                .filter(|agent| agent.regard == Regard::Counted && agent.wave == Some(last));
            if members.clone().next().is_none() {
                let wave = self.begun.remove(last).wave; // revoked, pinned or set aside meanwhile
                self.skip(wave, "it has no members", effects);
                self.done.get_or_insert(now); // the settle time passes all the same
                return Turn::Again;
            }
            if members.clone().all(|agent| !agent.may) {
                return Turn::Rest; // their window has closed
            }
            left_out = members.all(|agent| self.is_refused_by(agent.member.version));
        }
        if !self.begun.is_empty() {
            if !is_settled && !left_out {
                self.done = None;
                if is_due && wave.unsettled == 0 {
                    effects.extend(self.pause(PauseKind::Unproven, wave.lacks(), now));
                }
                return Turn::Rest;
            }
            let all_in_waves = subject.iter().all(|agent| agent.wave.is_some());
            if all_in_waves {
                return self.through(subject, rules, now, effects);
            }
            self.done.get_or_insert(now);
        }
        if self
            .done
            .is_some_and(|since| !is_over(since, rules.settle, now))
            || !self.weighing.is_empty()
            || self.waits_for_reconnects(subject, now)
        {
            return Turn::Rest;
        }
        let turn = self.next_wave(subject, rules, now, effects);
        if let Turn::Through = turn {
            return self.through(subject, rules, now, effects);
        }
        turn
    }

    /// Nobody is left for the waves ahead. Versions whose members of the first wave have yet to
    /// answer get their time.
    fn through(
        &self,
        subject: &[Participant<'_>],
        rules: &Rules,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) -> Turn {
        if self.is_withheld_for(WithheldCause::Unproven) {
            return Turn::Rest;
        }
        self.note_stragglers(subject, rules, now, effects);
        Turn::Through
    }

    // Refusals.

    /// Weighs the refusals of each version. `None`: nothing follows from them.
    fn weigh(
        &mut self,
        subject: &[Participant<'_>],
        rules: &Rules,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) -> Option<Turn> {
        // The time of an operator's pause does not count.
        let now = self.frozen().map_or(now, |pause| pause.since.min(now));
        let votes = self.votes(subject, rules, now);
        let refused = |version: &str| votes.get(version).is_some_and(|it| !it.refused.is_empty());
        self.weighing.retain(|version, _| refused(version));
        let mut notes = Vec::new();
        for (version, votes) in votes.iter().filter(|(_, votes)| !votes.refused.is_empty()) {
            let weighing = self.weighing.get(*version);
            let overdue = weighing.is_some_and(|it| is_over(it.since, rules.deadline, now));
            let is_weighed = weighing.is_some();
            let is_withheld = self.is_refused_by(version);
            let named = some_of(votes.refused.iter().copied());
            match votes.judge(overdue) {
                Judgement::Proven => {
                    effects.extend(notes);
                    return Some(self.overrule(version, votes, effects));
                }
                Judgement::Open | Judgement::Refused if is_withheld => {}
                Judgement::Open if is_weighed => {}
                Judgement::Open => {
                    let refused = votes.refused.iter().take(NAMED_MAX);
                    let weighing = Weighing {
                        refused: refused.map(|name| (*name).clone()).collect(),
                        since: now,
                    };
                    self.weighing.insert((*version).to_owned(), weighing);
                    let reason = format!(
                        "{version}: {named} refused it; no further host is offered it until the \
                         others of that version have answered"
                    );
                    notes.push(note(AuditEvent::Weighing, self.target, reason));
                }
                Judgement::Refused => {
                    self.weighing.remove(*version);
                    let reason = format!("{named} refused it, and too few hosts have proven it");
                    let said = format!("{version}: {reason}");
                    notes.push(note(AuditEvent::Withheld, self.target, said));
                    let withheld = Withheld {
                        cause: WithheldCause::Refused,
                        reason,
                        since: now,
                    };
                    self.withheld.insert((*version).to_owned(), withheld);
                }
            }
        }
        let halt = self.refusals(subject, &votes, rules, now);
        if halt.is_none() {
            effects.extend(notes); // the halt says the same
        }
        halt.map(Turn::Halt)
    }

    /// The hosts that refused it are set aside: more of their version have proven it.
    fn overrule(&mut self, version: &str, votes: &Votes<'_>, effects: &mut Vec<Effect>) -> Turn {
        self.weighing.remove(version);
        if self.withheld.remove(version).is_some() {
            let reason = format!("{version}: the hosts that proved it outweigh those that refused");
            effects.push(note(AuditEvent::Released, self.target, reason));
        }
        let reason = format!("refused what more hosts with {version} have proven");
        let refused = votes.refused.iter().map(|name| (*name).clone());
        Turn::SetAside(refused.collect(), reason)
    }

    /// Why the generation must be halted, if it must: it is withheld from every version that could
    /// judge it, or too many hosts of later waves refused it and their refusals are not outweighed.
    fn refusals(
        &self,
        subject: &[Participant<'_>],
        votes: &BTreeMap<&str, Votes<'_>>,
        rules: &Rules,
        now: Timestamp,
    ) -> Option<Halt> {
        let withheld = votes
            .iter()
            .filter(|(version, _)| self.is_refused_by(version));
        let refused: BTreeSet<_> = withheld
            .flat_map(|(_, votes)| votes.refused.iter().copied())
            .collect();
        if refused.is_empty() {
            return None;
        }
        let counts = |agent: &&Participant<'_>| {
            let member = &agent.member;
            let wave = agent.wave.map(|wave| &self.begun[wave]);
            let in_wave = wave.is_some_and(|wave| self.was_connected(member, wave, now));
            agent.may && agent.regard == Regard::Counted && (in_wave || self.begun.is_empty())
        };
        let members: Vec<_> = subject.iter().filter(counts).collect();
        let is_left = |agent: &&Participant<'_>| !self.is_refused_by(agent.member.version);
        let any_left = members.iter().any(is_left);
        let is_later = |agent: &&Participant<'_>| {
            let is_first = agent.wave == Some(0) && !self.promoted;
            !is_first && refused.contains(&agent.member.name)
        };
        let later = subject.iter().filter(is_later).count();
        let bound = rules.refused_max.of(members.len() as u64).max(1);
        // A few hosts that claim versions of their own are no reason to stop the others.
        let proofs = votes.values().map(|votes| votes.proofs + votes.pending);
        let too_many = later as u64 > bound && later >= proofs.sum();
        (!any_left || too_many).then(|| {
            let named = some_of(refused.iter().copied());
            let members = members.len().max(refused.len());
            let count = refused.len();
            Halt {
                reason: format!("clamd refused it on {count} of {members} hosts: {named}"),
                blamed: blamed(subject, &refused),
            }
        })
    }

    fn is_refused_by(&self, version: &str) -> bool {
        let withheld = self.withheld.get(version);
        withheld.is_some_and(|it| it.cause == WithheldCause::Refused)
    }

    fn is_withheld_for(&self, cause: WithheldCause) -> bool {
        self.withheld.values().any(|it| it.cause == cause)
    }

    /// Whether a member is not offered it because of its version. Members of the first wave go on
    /// where their proofs are what is missing.
    pub(super) fn is_withheld_from(&self, member: &Member<'_>) -> bool {
        let withheld = self.withheld.get(member.version);
        withheld.is_some_and(|withheld| match withheld.cause {
            WithheldCause::Refused => true,
            WithheldCause::Unproven => self.wave_of(member) != Some(0),
        })
    }

    // Versions that the first wave has yet to prove.

    /// Members of the first wave and how many of them have proven it, by version.
    fn first_wave<'a>(
        &self,
        subject: &[Participant<'a>],
        now: Timestamp,
    ) -> BTreeMap<&'a str, Tally> {
        let mut tallies: BTreeMap<&str, Tally> = BTreeMap::new();
        for agent in subject {
            let member = &agent.member;
            if agent.wave == Some(0)
                && agent.may
                && agent.regard != Regard::SetAside
                && self.was_connected(member, &self.begun[0], now)
            {
                let tally = tallies.entry(member.version).or_default();
                tally.members += 1;
                tally.live += usize::from(member.is_live());
            }
        }
        tallies
    }

    /// Withholds it from each version that has members in the first wave of which too few have
    /// proven it: the quorum of the wave may be that of another version.
    fn withhold_unproven(
        &mut self,
        subject: &[Participant<'_>],
        rules: &Rules,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        if self.promoted || self.begun.len() != 1 || self.is_first_wave_over(rules, now) {
            return;
        }
        for (version, tally) in self.first_wave(subject, now) {
            if tally.has_quorum() || self.withheld.contains_key(version) {
                continue;
            }
            let reason = format!(
                "{} of its {} hosts in the first wave have proven it",
                tally.live, tally.members
            );
            effects.push(note(
                AuditEvent::Withheld,
                self.target,
                format!("{version}: {reason}"),
            ));
            let withheld = Withheld {
                cause: WithheldCause::Unproven,
                reason,
                since: now,
            };
            self.withheld.insert(version.to_owned(), withheld);
        }
    }

    fn release_unproven(
        &mut self,
        subject: &[Participant<'_>],
        rules: &Rules,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        if !self.is_withheld_for(WithheldCause::Unproven) {
            return;
        }
        let over = self.is_first_wave_over(rules, now);
        let tallies = self.first_wave(subject, now);
        let target = self.target;
        let released = self.withheld.extract_if(.., |version, withheld| {
            let proven = tallies.get(version.as_str()).is_none_or(Tally::has_quorum);
            withheld.cause == WithheldCause::Unproven && (over || proven)
        });
        for (version, _) in released {
            let reason = match over {
                true => "its hosts in the first wave had twice the deadline to answer",
                false => "its hosts in the first wave have proven it",
            };
            effects.push(note(
                AuditEvent::Released,
                target,
                format!("{version}: {reason}"),
            ));
        }
    }

    fn is_first_wave_over(&self, rules: &Rules, now: Timestamp) -> bool {
        let first = self.begun.first();
        first.is_none_or(|first| is_over(first.timed_from, 2 * rules.deadline, now))
    }

    // Membership and time.

    /// An operator's pause, which nothing but `rollout resume` ends.
    pub(super) fn frozen(&self) -> Option<&Pause> {
        let pause = self.paused.as_ref();
        pause.filter(|pause| pause.kind == PauseKind::Operator)
    }

    /// Whether the wave of an agent has begun.
    pub fn has(&self, member: &Member<'_>) -> bool {
        self.wave_of(member).is_some()
    }

    /// Whether an agent is offered the generation. One that has it in hand may finish, whatever holds
    /// others back.
    pub(super) fn offers_to(&self, member: &Member<'_>, rules: &Rules, now: Timestamp) -> bool {
        let lets_offer = self.paused.as_ref().is_none_or(Pause::lets_offer);
        // The members of the version that is weighed must be able to answer.
        let is_stopped = |(version, weighing): (&String, &Weighing)| {
            version != member.version && !is_over(weighing.since, rules.deadline, now)
        };
        let goes_on = lets_offer && !self.weighing.iter().any(is_stopped);
        self.has(member) && !self.is_withheld_from(member) && (goes_on || member.offered.is_some())
    }

    /// The first wave that has begun and that an agent is in.
    pub(super) fn wave_of(&self, member: &Member<'_>) -> Option<usize> {
        let mut begun = self.begun.iter();
        begun.position(|begun| begun.has(member.name, member.groups))
    }

    /// Whether the master was started a moment ago and expects this agent back.
    pub(super) fn is_returning(&self, member: &Member<'_>, now: Timestamp) -> bool {
        member.returning && is_reconnecting(self.resumed, now)
    }

    /// Whether a member was connected at some time since its wave began.
    pub(super) fn was_connected(&self, member: &Member<'_>, wave: &Begun, now: Timestamp) -> bool {
        member.connected || member.seen >= wave.since || self.is_returning(member, now)
    }

    /// Whether a wave waits for a member's answer.
    pub(super) fn is_awaited(
        &self,
        member: &Member<'_>,
        wave: &Begun,
        rules: &Rules,
        now: Timestamp,
    ) -> bool {
        let is_there = member.connected || self.is_returning(member, now);
        member.answer.is_none() && is_there && now < due(member, wave, rules)
    }

    /// Whether the agents that were connected before a start of the master have yet to come back:
    /// a wave that begins without them would be drawn from the few that are faster.
    pub(super) fn waits_for_reconnects(&self, subject: &[Participant<'_>], now: Timestamp) -> bool {
        if !is_reconnecting(self.resumed, now) {
            return false;
        }
        let known = subject.iter().filter(|agent| agent.member.was_connected);
        let (known, back) = known.fold((0, 0), |(known, back), agent| {
            (known + 1, back + usize::from(!agent.member.returning))
        });
        100 * back < BACK_PERCENT * known
    }

    /// Whether it makes way for a newer generation that waits: nobody was offered it, it waits for a
    /// window, or it is stuck and has had the time that all of its waves may take.
    pub(super) fn makes_way(&self, rules: &Rules, now: Timestamp) -> bool {
        match &self.paused {
            None => self.begun.is_empty() || self.waits_for_window,
            Some(pause) => pause.kind != PauseKind::Operator && self.is_stuck_at(rules) <= now,
        }
    }

    /// When it has had the time that all of its waves may take.
    pub fn is_stuck_at(&self, rules: &Rules) -> Timestamp {
        let waves = self.begun.len() + self.ahead.len() + self.skipped.len();
        let each = rules.deadline.saturating_add(rules.settle);
        let time = each.saturating_mul(u32::try_from(waves).unwrap_or(u32::MAX));
        let time = SignedDuration::try_from(time).unwrap_or(SignedDuration::MAX);
        self.since.saturating_add(time).unwrap_or(Timestamp::MAX)
    }

    // Waves.

    /// Begins the next wave with members that no wave before it has.
    fn next_wave(
        &mut self,
        subject: &[Participant<'_>],
        rules: &Rules,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) -> Turn {
        let is_counted =
            |agent: &&Participant<'_>| agent.member.connected && agent.regard == Regard::Counted;
        let withheld: BTreeSet<_> = self.withheld.keys().cloned().collect();
        let is_there = |agent: &&Participant<'_>| {
            agent.may && is_counted(agent) && !withheld.contains(agent.member.version)
        };
        if self.begun.is_empty() && !subject.iter().any(|agent| is_counted(&agent)) {
            return Turn::Rest; // the first to connect will be the first wave
        }
        while !self.ahead.is_empty() {
            let wave = self.ahead.remove(0);
            let connected = || subject.iter().filter(is_there);
            let names = connected().map(|agent| agent.member.name);
            let mut begun = Begun::new(wave.clone(), &self.target.content, names, now);
            let is_new = |agent: &&Participant<'_>| {
                let member = &agent.member;
                begun.has(member.name, member.groups) && agent.wave.is_none()
            };
            let new = connected().filter(is_new).count();
            let has_members = subject.iter().any(|agent| is_new(&agent));
            let mut others = subject.iter().filter(is_counted).filter(is_new);
            let waits_for_version = others.any(|agent| {
                let withheld = self.withheld.get(agent.member.version);
                withheld.is_some_and(|it| it.cause == WithheldCause::Unproven)
            });
            if new == 0 && waits_for_version {
                self.ahead.insert(0, wave);
                return Turn::Rest; // the canaries of its members have yet to answer
            }
            if new == 0 {
                let mut left = subject.iter().filter(|it| it.wave.is_none());
                // Later ones catch up when theirs opens, as long as there are others to go on with.
                let first = self.begun.is_empty() || left.all(|agent| !agent.may);
                let closed = self.closed(&wave, subject);
                if first && !closed.is_empty() {
                    if !std::mem::replace(&mut self.waits_for_window, true) {
                        let windows = rules.windows_of(|it| are_in(&closed, it)).join("; ");
                        let reason =
                            format!("{wave}: until a window of its members opens: {windows}");
                        effects.push(note(AuditEvent::RolloutWaits, self.target, reason));
                    }
                    self.ahead.insert(0, wave);
                    return Turn::Rest;
                }
                if self.waits_for_group(&wave, subject, rules, now, effects) {
                    self.ahead.insert(0, wave);
                    return Turn::Rest;
                }
                let why = match has_members {
                    true => "none of its members is connected and may be offered it",
                    false => "it has no members",
                };
                self.skip(wave, why, effects);
                continue;
            }
            self.waits_for_window = false;
            self.waits_for_group = None;
            let substitute = Percent::new(SUBSTITUTE).expect("a percentage");
            let most = substitute.of_rounded_up(connected().count() as u64);
            // Those that are away are in a wave of everybody, too, when they are back.
            let reach = match begun.is_of_everybody() {
                true => subject.len(),
                false => new,
            };
            if self.begun.is_empty() && !self.skipped.is_empty() && reach as u64 > most {
                self.ahead.insert(0, wave);
                self.ahead.insert(0, Wave::Share(substitute));
                continue;
            }
            self.note_stragglers(subject, rules, now, effects);
            self.withhold_unproven(subject, rules, now, effects);
            effects.push(note(
                AuditEvent::Wave,
                self.target,
                format!("{wave}: {new} agents"),
            ));
            begun.keep_new(|name| self.begun.iter().any(|before| before.has_drawn(name)));
            self.begun.push(begun);
            self.done = None;
            self.unwell_seen = 0;
            return Turn::Again;
        }
        Turn::Through
    }

    /// Whether a wave, a group, waits for one of its members to connect: for one deadline, and not in
    /// a fleet so small that every host is missed.
    fn waits_for_group(
        &mut self,
        wave: &Wave,
        subject: &[Participant<'_>],
        rules: &Rules,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let Wave::Group(group) = wave else {
            return false;
        };
        let is_awaited = |agent: &&Participant<'_>| {
            let member = &agent.member;
            agent.may
                && !member.connected
                && member.groups.contains(group)
                && agent.wave.is_none()
                && now.duration_since(member.seen) < SEEN
        };
        let awaited = subject.iter().filter(is_awaited).count();
        if awaited == 0 || subject.len() < SMALL_FLEET {
            return false;
        }
        let is_new = self.waits_for_group.is_none();
        let since = *self.waits_for_group.get_or_insert(now);
        if is_new {
            let reason = format!("{wave}: until one of its {awaited} hosts connects");
            effects.push(note(AuditEvent::RolloutWaits, self.target, reason));
        }
        !is_over(since, rules.deadline, now)
    }

    /// Members of a wave that is still to come, if their windows were open.
    fn closed<'a>(&self, wave: &Wave, subject: &'a [Participant<'a>]) -> Vec<&'a Member<'a>> {
        let would = |member: &&Member<'_>| match wave {
            Wave::Group(group) => member.groups.contains(group),
            Wave::Share(_) | Wave::Count(_) => true,
        };
        let closed = subject.iter().filter(|agent| !agent.may);
        let closed = closed.map(|agent| &agent.member).filter(would);
        closed.filter(|it| self.wave_of(it).is_none()).collect()
    }

    /// The windows that the next wave waits for, if it does.
    pub(super) fn waits_for(&self, subject: &[Participant<'_>], rules: &Rules) -> Vec<String> {
        match self.ahead.first().filter(|_| self.waits_for_window) {
            Some(wave) => {
                let closed = self.closed(wave, subject);
                rules.windows_of(|group| are_in(&closed, group))
            }
            None => Vec::new(),
        }
    }

    fn skip(&mut self, wave: Wave, why: &str, effects: &mut Vec<Effect>) {
        self.waits_for_window = false;
        self.waits_for_group = None;
        let reason = format!("{wave}: {why}");
        effects.push(note(AuditEvent::WaveSkipped, self.target, reason));
        self.skipped.push(wave);
    }

    /// Members of settled waves that have not proven it: it stays on offer to them, and nobody waits
    /// for them.
    pub(super) fn stragglers<'a>(
        &self,
        subject: &[Participant<'a>],
        rules: &Rules,
        now: Timestamp,
    ) -> Vec<&'a AgentName> {
        let last = self.begun.len().checked_sub(1);
        let is_settled = |wave: usize| Some(wave) != last || self.done.is_some();
        let is_left = |agent: &&Participant<'_>| {
            let member = &agent.member;
            agent.wave.is_some_and(|wave| {
                let wave_is_settled = is_settled(wave);
                let wave = &self.begun[wave];
                wave_is_settled
                    && agent.may
                    && agent.regard == Regard::Counted
                    && !member.is_live()
                    && !self.is_withheld_from(member)
                    && self.was_connected(member, wave, now)
                    && !self.is_awaited(member, wave, rules, now)
            })
        };
        let left = subject.iter().filter(is_left);
        left.map(|agent| agent.member.name).collect()
    }

    /// Has the audit log name the members that the last wave leaves behind.
    fn note_stragglers(
        &self,
        subject: &[Participant<'_>],
        rules: &Rules,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let Some(last) = self.begun.len().checked_sub(1) else {
            return;
        };
        let wave = self.tally(subject, self.begun.last(), rules, now);
        let behind = wave.behind;
        if behind == 0 {
            return;
        }
        let (named, wave) = (names(&wave.lacking), &self.begun[last].wave);
        let reason = format!("wave {wave} is settled without {behind} of its hosts: {named}");
        effects.push(note(AuditEvent::Stragglers, self.target, reason));
    }

    /// Takes what is said to be in the future for now: the clock was set back.
    pub(super) fn clock_is_at(&mut self, now: Timestamp) {
        let begun = self.begun.iter_mut();
        let begun = begun.flat_map(|begun| [&mut begun.since, &mut begun.timed_from]);
        let weighing = self.weighing.values_mut().map(|it| &mut it.since);
        let withheld = self.withheld.values_mut().map(|it| &mut it.since);
        let paused = self.paused.as_mut().map(|pause| &mut pause.since);
        let others = [
            Some(&mut self.since),
            self.done.as_mut(),
            self.resumed.as_mut(),
            self.waits_for_group.as_mut(),
            paused,
        ];
        let others = others.into_iter().flatten();
        for since in begun.chain(weighing).chain(withheld).chain(others) {
            *since = now.min(*since);
        }
    }

    pub(super) fn promote(&mut self, now: Timestamp) {
        let everybody = Wave::Share(Percent::new(100).expect("a percentage"));
        let (content, nobody) = (self.target.content, std::iter::empty());
        self.begun = vec![Begun::new(everybody, &content, nobody, now)];
        self.ahead.clear();
        self.promoted = true;
        self.waits_for_window = false;
        self.waits_for_group = None;
        self.paused = None;
        self.done = None;
        self.withheld
            .retain(|_, it| it.cause != WithheldCause::Unproven);
    }

    pub(super) fn pause(&mut self, kind: PauseKind, reason: String, now: Timestamp) -> Vec<Effect> {
        let effects = vec![note(AuditEvent::RolloutPaused, self.target, reason.clone())];
        let before = self.paused.take().map(Box::new);
        self.paused = Some(Pause {
            kind,
            reason,
            since: now,
            before,
        });
        effects
    }

    /// Goes on after `pause`: the time that an operator took is not the rollout's, and a wave that
    /// lacked a quorum has its deadline once more.
    pub(super) fn goes_on(&mut self, pause: &Pause, now: Timestamp) {
        if pause.kind == PauseKind::Operator {
            let paused = now.duration_since(pause.since);
            let waves = self.begun.iter_mut().map(|begun| &mut begun.timed_from);
            let weighing = self.weighing.values_mut().map(|it| &mut it.since);
            for since in waves.chain(weighing).chain([&mut self.since]) {
                *since = since.saturating_add(paused).unwrap_or(now).min(now);
            }
        }
        if let Some(begun) = self.begun.last_mut()
            && pause.is_for(PauseKind::Unproven)
        {
            begun.timed_from = now;
        }
    }

    /// Counts the members of one wave, or of all that have begun.
    pub(super) fn tally(
        &self,
        subject: &[Participant<'_>],
        wave: Option<&Begun>,
        rules: &Rules,
        now: Timestamp,
    ) -> Tally {
        let mut tally = Tally::default();
        let last = self.begun.len().checked_sub(1);
        for agent in subject {
            let member = &agent.member;
            let Some(of) = agent.wave else {
                continue;
            };
            let begun = &self.begun[of];
            if !agent.may
                || (wave.is_some() && Some(of) != last)
                || agent.regard == Regard::SetAside
                || self.is_withheld_from(member) && member.answer != Some(Answer::Refused)
                || !self.was_connected(member, begun, now)
            {
                continue;
            }
            let until = due(member, begun, rules);
            let is_late = now >= until;
            let unwell = match member.answer {
                Some(Answer::Unwell) => true,
                Some(Answer::Installed) => is_late, // clamd may be about to start
                Some(Answer::Live { .. } | Answer::Refused) => false,
                None => is_late && member.offered.is_some(),
            };
            let refused = member.answer == Some(Answer::Refused);
            let unsettled = self.is_awaited(member, begun, rules, now);
            tally.members += 1;
            tally.live += usize::from(member.is_live());
            tally.unsettled += usize::from(unsettled);
            tally.refused += usize::from(refused);
            tally.unwell += usize::from(unwell);
            if (refused || unwell) && tally.named.len() < NAMED_MAX {
                tally.named.push(member.name.clone());
            }
            if unsettled && tally.waits_for.len() < LISTED_MAX {
                tally.waits_for.push(Awaited {
                    agent: member.name.clone(),
                    until,
                });
            }
            let is_behind = !member.is_live() && agent.regard == Regard::Counted;
            tally.behind += usize::from(is_behind);
            if is_behind && tally.lacking.len() < LISTED_MAX {
                tally.lacking.push(member.name.clone());
            }
        }
        tally
    }
}

impl Tally {
    /// Whether half of the members, and at least one, have proven it live.
    pub fn has_quorum(&self) -> bool {
        self.live > 0 && 2 * self.live >= self.members
    }

    /// What it lacks for a quorum, in words.
    fn lacks(&self) -> String {
        let Self { live, members, .. } = self;
        let look = match names(&self.lacking) {
            none if none.is_empty() => none,
            some => format!("; look at {some}"),
        };
        format!(
            "too few to go on have proven it live: {live} of {members} hosts of the wave that were \
             connected since it began{look}"
        )
    }
}

/// Whether some of these agents are in the group.
fn are_in(members: &[&Member<'_>], group: &GroupName) -> bool {
    members.iter().any(|it| it.groups.contains(group))
}

/// Until when a wave waits for a member: its deadline, or as long after the member's last progress,
/// but never twice the deadline.
pub(super) fn due(member: &Member<'_>, wave: &Begun, rules: &Rules) -> Timestamp {
    let after = |since: Timestamp, span| {
        let span = SignedDuration::try_from(span).unwrap_or(SignedDuration::MAX);
        since.saturating_add(span).unwrap_or(Timestamp::MAX)
    };
    let at_deadline = after(wave.timed_from, rules.deadline);
    let renewed = member.offered.map_or(at_deadline, |offered| {
        after(offered.renewed, rules.deadline)
    });
    let most = after(wave.timed_from, rules.deadline.saturating_mul(2));
    renewed.clamp(at_deadline, most.max(at_deadline))
}

/// Whether the master was started at `started` and its agents may still be reconnecting.
pub(super) fn is_reconnecting(started: Option<Timestamp>, now: Timestamp) -> bool {
    started.is_some_and(|started| now.duration_since(started) < RECONNECT)
}

/// Until when agents may still be reconnecting after a start at `started`.
pub(super) fn reconnected(started: Timestamp) -> Timestamp {
    started.saturating_add(RECONNECT).unwrap_or(Timestamp::MAX)
}

pub(super) fn is_over(since: Timestamp, span: Duration, now: Timestamp) -> bool {
    let span = SignedDuration::try_from(span).unwrap_or(SignedDuration::MAX);
    now.duration_since(since) >= span
}

/// The files that these hosts named when they refused the generation; none if one of the hosts named
/// none, or if they named too many.
fn blamed(subject: &[Participant<'_>], refused: &BTreeSet<&AgentName>) -> BTreeSet<DatabaseName> {
    let refusing = subject.iter().map(|agent| &agent.member);
    let refusing = refusing.filter(|member| refused.contains(member.name));
    let names: Option<BTreeSet<_>> = refusing.map(|member| member.blamed).collect();
    let names = names.filter(|names| names.len() <= BLAMED_MAX);
    names.into_iter().flatten().cloned().collect()
}

/// A few names, and how many more there are.
fn some_of<'a>(all: impl Iterator<Item = &'a AgentName>) -> String {
    let all: Vec<_> = all.map(AgentName::as_str).collect();
    let mut text = all[..all.len().min(NAMED_MAX)].join(", ");
    if all.len() > NAMED_MAX {
        text += &format!(" and {} more", all.len() - NAMED_MAX);
    }
    text
}

fn names(names: &[AgentName]) -> String {
    let names: Vec<_> = names.iter().map(AgentName::as_str).collect();
    names.join(", ")
}
