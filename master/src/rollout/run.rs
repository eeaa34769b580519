//! One generation on its way: its waves, and whether it may go on.

use std::time::Duration;

use clamcast_daemon::config::Percent;
use clamcast_proto::AgentName;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::{Begun, Effect, Member, Rules, Target, Wave, Word, note};

/// Members that were not seen for longer than this are not waited for.
const SEEN: SignedDuration = SignedDuration::from_hours(24);

/// Where the waves before it are empty, this part of the fleet goes first: an empty canary group
/// must not mean that everybody is a canary.
const SUBSTITUTE: u8 = 10;

/// So long after a start agents are waited for that were there before: the idle timeout of their
/// connections, and their longest wait between two tries, with some time to spare.
const RECONNECT: SignedDuration = SignedDuration::from_mins(3);

/// However much progress an agent shows, it has so long for one generation: the longest silence
/// that it may announce, twice.
const TAKE: SignedDuration = SignedDuration::from_hours(24);

/// Agents that a reason names; `agents` has them all.
const NAMED_MAX: usize = 5;

/// A generation on its way.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Run {
    /// The generation.
    pub target: Target,
    /// The waves that have begun.
    pub begun: Vec<Begun>,
    /// Those that are still to come.
    pub ahead: Vec<Wave>,
    /// Waves without members, which were passed over.
    pub skipped: Vec<Wave>,
    /// Whether the next wave waits for a window of its members to open.
    #[serde(default)]
    pub waits_for_window: bool,
    /// An operator has made one wave of everybody.
    #[serde(default)]
    pub promoted: bool,
    /// Since when the last wave that began is done.
    pub done: Option<Timestamp>,
    /// Why it does not go on.
    pub paused: Option<Pause>,
    /// Agents with trouble that an operator has seen and gone on with.
    pub(super) unwell_seen: usize,
    /// When the master was started, if it went on after a start.
    #[serde(skip)]
    pub(super) resumed: Option<Timestamp>,
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
    /// Too many agents have trouble of their own: until they are well, or `rollout resume`.
    Unwell,
    /// Too few prove the wave live: until they do, or `rollout resume`.
    Unproven,
}

/// What became of the agents of the waves that have begun.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Tally {
    /// All of them.
    pub members: usize,
    /// Seen in the last 24 hours.
    pub seen: usize,
    /// Proven live.
    pub live: usize,
    /// Not done, and connected or at it: they are waited for.
    pub unsettled: usize,
    /// Refused by clamd.
    pub refused: usize,
    /// With trouble of their own.
    pub unwell: usize,
    /// The last sign of progress of any.
    #[serde(skip)]
    progress: Option<Timestamp>,
    /// Some that refused or are unwell.
    pub named: Vec<AgentName>,
    /// Some that are waited for.
    pub waited: Vec<AgentName>,
}

/// An agent that takes part.
#[derive(Clone, Debug)]
pub(super) struct Participant<'a> {
    pub(super) member: Member<'a>,
    /// Its window is open, or it has taken the generation before that closed.
    pub(super) may: bool,
}

/// What follows for a run.
#[derive(Debug)]
pub(super) enum Turn {
    /// Nothing yet.
    Rest,
    /// Something has changed, so more may follow.
    Again,
    /// Every wave is done.
    Through,
    /// It must end.
    Halt(String),
}

impl Pause {
    /// Whether it is of this kind, or took the place of one that was.
    pub(super) fn is_for(&self, kind: PauseKind) -> bool {
        self.kind == kind || self.before.as_ref().is_some_and(|it| it.is_for(kind))
    }

    /// Whether agents of waves that have begun are still offered it: there is nothing against it,
    /// only too little for it.
    pub(super) fn lets_offer(&self) -> bool {
        self.kind == PauseKind::Unproven
    }
}

impl Run {
    /// Has not begun any wave.
    pub(super) fn new(target: Target, waves: Vec<Wave>) -> Self {
        Self {
            target,
            begun: Vec::new(),
            ahead: waves,
            skipped: Vec::new(),
            waits_for_window: false,
            promoted: false,
            done: None,
            paused: None,
            unwell_seen: 0,
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
        let all = self.tally(subject, None, rules, now);
        if let Some(reason) = self.refusals(&all, rules) {
            return Turn::Halt(reason);
        }
        let wave = self.tally(subject, self.begun.last(), rules, now);
        self.unwell_seen = self.unwell_seen.min(all.unwell);
        let unwell = all.unwell > self.unwell_seen
            && all.unwell as u64 > rules.unwell_max.of(all.members as u64);
        let over = match self.paused.as_ref().map(|pause| pause.kind) {
            None => false,
            Some(PauseKind::Operator) => return Turn::Rest,
            Some(PauseKind::Unwell) => !unwell,
            Some(PauseKind::Unproven) => unwell || wave.is_done(),
        };
        if over {
            self.paused = None;
            let reason = "what it was paused for is over".to_owned();
            effects.push(note("rollout-resumed", self.target, reason));
        }
        if self.paused.is_some() {
            return Turn::Rest;
        }
        if unwell {
            let (unwell, members) = (all.unwell, all.members);
            let named = names(&all.named);
            let reason = format!("{unwell} of {members} hosts have trouble of their own: {named}");
            effects.extend(self.pause(PauseKind::Unwell, reason, now));
            return Turn::Rest;
        }
        if wave.members == 0 && !self.begun.is_empty() && !self.promoted {
            let last = self.begun.len() - 1;
            if subject
                .iter()
                .any(|agent| self.wave_of(&agent.member) == Some(last))
            {
                return Turn::Rest; // their window has closed
            }
            let wave = self.begun.remove(last).wave; // revoked or pinned meanwhile
            self.skip(wave, effects);
            self.done.get_or_insert(now); // what it had to say settles all the same
            return Turn::Again;
        }
        if let Some(begun) = self.begun.last() {
            if !wave.is_done() {
                self.done = None;
                let since = wave.progress.unwrap_or(begun.since).max(begun.since);
                if wave.unsettled == 0 && is_over(since, rules.deadline, now) {
                    effects.extend(self.pause(PauseKind::Unproven, wave.lacks(), now));
                }
                return Turn::Rest;
            }
            if subject
                .iter()
                .all(|agent| self.wave_of(&agent.member).is_some())
            {
                return Turn::Through; // nobody is left for the waves ahead
            }
            self.done.get_or_insert(now);
        }
        if self
            .done
            .is_some_and(|since| !is_over(since, rules.settle, now))
        {
            return Turn::Rest;
        }
        self.next_wave(subject, rules, now, effects)
    }

    /// An operator's pause, which nothing but `rollout resume` ends.
    pub(super) fn frozen(&self) -> Option<&Pause> {
        let pause = self.paused.as_ref();
        pause.filter(|pause| pause.kind == PauseKind::Operator)
    }

    /// Whether the wave of an agent has begun.
    pub fn has(&self, member: &Member<'_>) -> bool {
        self.wave_of(member).is_some()
    }

    /// The first wave that has begun and that an agent is in.
    fn wave_of(&self, member: &Member<'_>) -> Option<usize> {
        let place = member.place?;
        let mut begun = self.begun.iter();
        begun.position(|begun| begun.has(member.groups, &place))
    }

    /// Begins the next wave with members that no wave before it has.
    fn next_wave(
        &mut self,
        subject: &[Participant<'_>],
        rules: &Rules,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) -> Turn {
        if self.begun.is_empty() && subject.is_empty() {
            return Turn::Rest; // the first to come will be the first wave
        }
        while !self.ahead.is_empty() {
            let wave = self.ahead.remove(0);
            let open = subject.iter().filter(|agent| agent.may);
            let mut places: Vec<_> = open.filter_map(|agent| agent.member.place).collect();
            let begun = Begun::new(wave.clone(), &mut places, now);
            let is_new = |agent: &&Participant<'_>| {
                let place = &agent.member.place;
                place.is_some_and(|place| begun.has(agent.member.groups, &place))
                    && self.wave_of(&agent.member).is_none()
            };
            let new = subject
                .iter()
                .filter(|agent| agent.may)
                .filter(is_new)
                .count();
            if new == 0 {
                let mut left = subject
                    .iter()
                    .filter(|it| self.wave_of(&it.member).is_none());
                // Later ones catch up when theirs opens, as long as there are others to go on with.
                let first = self.begun.is_empty() || left.all(|agent| !agent.may);
                let closed = self.closed(&wave, subject);
                if first && !closed.is_empty() {
                    if !std::mem::replace(&mut self.waits_for_window, true) {
                        let windows = rules.windows_of(&closed).join("; ");
                        let reason =
                            format!("{wave}: until a window of its members opens: {windows}");
                        effects.push(note("rollout-waits", self.target, reason));
                    }
                    self.ahead.insert(0, wave);
                    return Turn::Rest;
                }
                self.skip(wave, effects);
                continue;
            }
            self.waits_for_window = false;
            let substitute = Percent::new(SUBSTITUTE).expect("a percentage");
            let most = substitute.of_rounded_up(places.len() as u64);
            if self.begun.is_empty() && !self.skipped.is_empty() && new as u64 > most {
                self.ahead.insert(0, wave);
                self.ahead.insert(0, Wave::Share(substitute));
                continue;
            }
            effects.push(note("wave", self.target, format!("{wave}: {new} agents")));
            self.begun.push(begun);
            self.done = None;
            return Turn::Again;
        }
        Turn::Through
    }

    /// Those whom a wave that is still to come would have, if their windows were open.
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
            Some(wave) => rules.windows_of(&self.closed(wave, subject)),
            None => Vec::new(),
        }
    }

    fn skip(&mut self, wave: Wave, effects: &mut Vec<Effect>) {
        self.waits_for_window = false;
        let reason = format!("{wave} has no members");
        effects.push(note("wave-skipped", self.target, reason));
        self.skipped.push(wave);
    }

    /// Takes what is said to be in the future for now: the clock was set back.
    pub(super) fn clock_is_at(&mut self, now: Timestamp) {
        let begun = self.begun.iter_mut().map(|begun| &mut begun.since);
        let paused = self.paused.as_mut().map(|pause| &mut pause.since);
        let others = [self.done.as_mut(), self.resumed.as_mut(), paused];
        for since in begun.chain(others.into_iter().flatten()) {
            *since = now.min(*since);
        }
    }

    pub(super) fn promote(&mut self, now: Timestamp) {
        let everybody = Wave::Share(Percent::new(100).expect("a percentage"));
        self.begun = vec![Begun::new(everybody, &mut [], now)];
        self.ahead.clear();
        self.promoted = true;
        self.waits_for_window = false;
        self.paused = None;
        self.done = None;
    }

    pub(super) fn pause(&mut self, kind: PauseKind, reason: String, now: Timestamp) -> Vec<Effect> {
        let effects = vec![note("rollout-paused", self.target, reason.clone())];
        let before = self.paused.take().map(Box::new);
        self.paused = Some(Pause {
            kind,
            reason,
            since: now,
            before,
        });
        effects
    }

    /// Counts the members of one wave, or of all that have begun. A refusal counts in any case:
    /// an operator may have forced it on a host whose wave is still to come.
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
            let (of, member) = (self.wave_of(&agent.member), &agent.member);
            let refused = member.word == Some(Word::Refused);
            if !agent.may {
                continue;
            }
            if of.is_none() && !(refused && wave.is_none()) || (wave.is_some() && of != last) {
                continue;
            }
            let late = is_late(member, rules, now);
            let unwell = match member.word {
                Some(Word::Unwell) => true,
                Some(Word::Installed) => late, // clamd may be about to start
                Some(Word::Live | Word::Refused) => false,
                None => late && member.progress.is_some(),
            };
            // Whoever has taken it in hand is waited for also where its connection is lost, or a
            // wave would be done whenever its last agents blink.
            let seen = member.connected || is_seen(member.seen, now);
            let coming = is_coming_back(self.resumed, member.seen, now);
            let at_it = member.connected || member.progress.is_some() || coming;
            let unsettled = member.word.is_none() && at_it && !unwell;
            tally.members += 1;
            tally.seen += usize::from(seen);
            tally.live += usize::from(member.word == Some(Word::Live));
            tally.unsettled += usize::from(unsettled);
            tally.refused += usize::from(refused);
            tally.unwell += usize::from(unwell);
            tally.progress = tally.progress.max(member.progress);
            if (refused || unwell) && tally.named.len() < NAMED_MAX {
                tally.named.push(member.name.clone());
            }
            if unsettled && tally.waited.len() < NAMED_MAX {
                tally.waited.push(member.name.clone());
            }
        }
        tally
    }

    /// Why it must be halted, if it must: in the first wave one refusal is enough.
    fn refusals(&self, all: &Tally, rules: &Rules) -> Option<String> {
        let bound = match self.begun.len() {
            0 | 1 if !self.promoted => 0,
            _ => rules.refused_max.of(all.members as u64).max(1),
        };
        let Tally {
            refused, members, ..
        } = all;
        let named = names(&all.named);
        (*refused as u64 > bound)
            .then(|| format!("clamd refused it on {refused} of {members} hosts: {named}"))
    }
}

impl Tally {
    /// Whether the next wave may begin: nobody who is there is still at it, somebody has proven it
    /// live, and so has half of those who were seen lately.
    pub fn is_done(&self) -> bool {
        self.unsettled == 0 && self.live > 0 && 2 * self.live >= self.seen
    }

    /// What it lacks to be done, in words.
    fn lacks(&self) -> String {
        let Self {
            live,
            seen,
            members,
            ..
        } = self;
        let look = match names(&self.named) {
            none if none.is_empty() => none,
            some => format!("; look at {some}"),
        };
        format!(
            "too few to go on have proven it live: {live} of {seen} hosts that were seen in the \
             last 24 hours, of {members} in the wave{look}"
        )
    }
}

/// Whether an agent that was `seen` not long before the master was started, and not since, is waited for.
pub(super) fn is_coming_back(started: Option<Timestamp>, seen: Timestamp, now: Timestamp) -> bool {
    started.is_some_and(|start| {
        seen <= start && is_seen(seen, now) && now.duration_since(start) < RECONNECT
    })
}

/// Whether an agent was there lately.
fn is_seen(seen: Timestamp, now: Timestamp) -> bool {
    now.duration_since(seen) < SEEN
}

/// Whether an agent has shown no progress for too long, or has made nothing of it.
fn is_late(member: &Member<'_>, rules: &Rules, now: Timestamp) -> bool {
    let since = member.progress.unwrap_or(Timestamp::MIN);
    let offered = member.offered.unwrap_or(now);
    is_over(since, rules.deadline, now) || now.duration_since(offered) >= TAKE
}

fn is_over(since: Timestamp, span: Duration, now: Timestamp) -> bool {
    let span = SignedDuration::try_from(span).unwrap_or(SignedDuration::MAX);
    now.duration_since(since) >= span
}

fn names(names: &[AgentName]) -> String {
    let names: Vec<_> = names.iter().map(AgentName::as_str).collect();
    names.join(", ")
}
