//! A generation's way through the fleet: which one each agent is wanted at, and when it is the next
//! one's turn.
//!
//! Pure: no sockets, no disk, no clock. `dispatch.rs` feeds in what happened, keeps the state on disk
//! before any agent hears of it, and carries out the [`Effect`]s.

mod order;
mod run;
#[cfg(test)]
mod tests;
mod wave;
mod weigh;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use clamcast_proto::{AgentName, AuditEvent, DatabaseName, Digest, GroupName, Position};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use order::{Order, OrderError, PINS_MAX};
pub use run::{Awaited, Pause, PauseKind, Run, Tally, Weighing, Withheld, WithheldCause};
pub use wave::Begun;

pub use weigh::SetAside;

use crate::config::{Rules, Wave};
pub use crate::publish::withdrawn::Ending;
use crate::publish::withdrawn::{Directives, Rollback, Withdrawal, Withdrawn};
use run::{Halt, Participant, Regard, Turn};

/// Generations that are remembered as passed over: more than any store keeps.
const PASSED_OVER_MAX: usize = 256;

/// Contents of which the withholding versions are remembered: more than any store keeps.
const UNFIT_MAX: usize = 64;

/// The version of an agent whose clamd has not reported one.
pub const UNKNOWN_VERSION: &str = "an unknown version";

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
    /// The ClamAV version that its clamd reported last, before it was offered the running generation;
    /// or [`UNKNOWN_VERSION`].
    pub version: &'a str,
    /// Whether it is connected.
    pub connected: bool,
    /// Whether it was connected when the master was started.
    pub was_connected: bool,
    /// Whether it was, and has not connected since.
    pub returning: bool,
    /// When it was connected last.
    pub seen: Timestamp,
    /// The highest generation that it took, by its receipts and by what it was offered: agents never
    /// take a lower one.
    pub at: Option<Position>,
    /// What its receipt says of the running generation.
    pub answer: Option<Answer>,
    /// The file that it named, if it refused the running generation.
    pub blamed: Option<&'a DatabaseName>,
    /// The offer of the running generation.
    pub offered: Option<Offering>,
}

/// An offer that an agent was made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Offering {
    /// When it was made first.
    pub since: Timestamp,
    /// When the agent last made real progress with it.
    pub renewed: Timestamp,
}

impl Member<'_> {
    /// Whether it has the running generation live.
    pub fn is_live(&self) -> bool {
        matches!(self.answer, Some(Answer::Live { .. }))
    }
}

/// Where members come from: the fleet.
pub trait Agents {
    /// Every enrolled agent, with what it says of `target`.
    fn members(&self, target: Option<&Target>) -> Vec<Member<'_>>;
    /// Whether an agent is enrolled.
    fn is_enrolled(&self, name: &AgentName) -> bool;
    /// The generation that the real clamd of an agent has proven live, if it has it now.
    fn proven(&self, name: &AgentName) -> Option<Position>;
}

/// What came of a generation on an agent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// Live, with every file intact.
    Live {
        /// A real clamd found the canary of the install. Only that counters a refusal.
        proven: bool,
    },
    /// On its disk, and clamd has not shown it yet.
    Installed,
    /// Refused, with evidence against the set.
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
    /// What it has, until a window of it opens; then this generation.
    Later(Target),
    /// This generation.
    At(Target),
}

/// What everybody is wanted at, and where that is about to change.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Rollout {
    /// The last one that went through, or went back.
    complete: Option<Target>,
    /// What that one takes away, if it was a rollback.
    urgent: Option<Position>,
    running: Option<Run>,
    /// The newest one that waits for the running one to end.
    waiting: Option<Target>,
    pins: BTreeMap<GroupName, Pin>,
    /// How the last one ended that did not go through.
    failed: Option<Failed>,
    /// All that were halted, aborted or rolled back.
    #[serde(default)]
    withdrawn: Withdrawn,
    /// Those that something newer took the place of before they went through: nobody is rolled back
    /// to what no wave has proven.
    #[serde(default)]
    passed_over: BTreeSet<Position>,
    /// Versions that the last complete generation is withheld from, and what went through for them
    /// before.
    #[serde(default)]
    complete_before: BTreeMap<String, Target>,
    /// Contents that were withheld from versions, oldest first.
    #[serde(default)]
    unfit: VecDeque<(Digest, BTreeSet<String>)>,
    /// Hosts whose refusals do not count.
    #[serde(default)]
    set_aside: BTreeMap<AgentName, SetAside>,
    /// A rollback that has to be published.
    owed: Option<Owed>,
    /// Why nothing is published although the mirror changes.
    held: Option<Held>,
    /// When the master was started.
    #[serde(skip)]
    resumed: Option<Timestamp>,
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

impl Owed {
    /// As the publisher knows it.
    pub fn rollback(&self) -> Rollback {
        Rollback {
            to: self.to.position,
            of: self.of.position,
        }
    }
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
        event: AuditEvent,
        /// The generation, if it is about one.
        position: Option<Position>,
        /// The host that it is about; none: the fleet.
        host: Option<AgentName>,
        /// Why, or what.
        reason: String,
    },
    /// A generation was taken back.
    Withdrawn {
        /// What had it.
        target: Target,
        /// How it ended.
        how: Ending,
        /// What the fleet goes back to, if anything was complete.
        back_to: Option<Target>,
    },
    /// The mirror may hold something that was passed over.
    Look,
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

    /// Adds to what was withdrawn: whoever has one of these is not told that it is current, and
    /// nobody is pinned to it.
    pub fn were_withdrawn(&mut self, withdrawals: impl IntoIterator<Item = Withdrawal>) {
        for withdrawal in withdrawals {
            if !self.withdrawn.has(withdrawal.position) {
                self.withdrawn.insert(withdrawal);
            }
        }
    }

    /// Takes note of the files that were new in a withdrawn generation.
    pub fn were_new(&mut self, position: Position, new: BTreeMap<DatabaseName, Digest>) {
        self.withdrawn.were_new(position, new);
    }

    /// The generations that were taken back.
    pub fn withdrawn(&self) -> &Withdrawn {
        &self.withdrawn
    }

    /// What the publisher is to know of rollouts.
    pub fn directives(&self) -> Directives {
        Directives {
            held: self.held.as_ref().map(|held| held.reason.clone()),
            owed: self.owed.as_ref().map(|owed| owed.rollback()),
            withdrawn: self.withdrawn.clone(),
            plain_names: None, // the agents decide it
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
        self.withdrawn.has(position)
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
        self.resumed = Some(now);
        if let Some(run) = &mut self.running {
            run.resumed = Some(now);
            for weighing in run.weighing.values_mut() {
                weighing.since = now; // nobody could answer meanwhile
            }
        }
    }

    /// Whether the master was started a moment ago, so that its agents may still be reconnecting.
    pub fn is_reconnecting(&self, now: Timestamp) -> bool {
        run::is_reconnecting(self.resumed, now)
    }

    /// Hosts whose refusals do not count, until they prove a generation live or an operator restores
    /// them.
    pub fn set_aside(&self) -> &BTreeMap<AgentName, SetAside> {
        &self.set_aside
    }

    /// The ClamAV versions that the last complete generation is withheld from.
    pub fn withheld_from_complete(&self) -> impl Iterator<Item = &String> {
        let content = self.complete.map(|complete| complete.content);
        let unfit = self
            .unfit
            .iter()
            .filter(move |(of, _)| Some(*of) == content);
        unfit.flat_map(|(_, versions)| versions)
    }

    /// Generations that somebody may be wanted at: they and their files are kept.
    pub fn needed(&self) -> impl Iterator<Item = &Target> {
        let running = self.running.as_ref().map(|run| &run.target);
        let pinned = self.pins.values().map(|pin| &pin.target);
        let owed = self.owed.as_ref().map(|owed| &owed.to);
        let one = [self.complete.as_ref(), running, self.waiting.as_ref(), owed];
        let before = self.complete_before.values();
        one.into_iter().flatten().chain(pinned).chain(before)
    }

    /// What an agent should run: the pin of its group; else the running generation if its wave has
    /// begun; else the last complete one. Never lower than what it has, and never what was taken
    /// back.
    pub fn wanted(&self, member: &Member<'_>, rules: &Rules, now: Timestamp) -> Wanted {
        let Some(wanted) = self.meant_for(member, rules, now) else {
            return member.at.map_or(Wanted::Nothing, |_| Wanted::Stay);
        };
        match member.at {
            Some(at) if at > wanted.position => Wanted::Stay,
            Some(at) if at < wanted.position && self.waits_for_window(member, rules, now) => {
                Wanted::Later(*wanted)
            }
            Some(_) | None => Wanted::At(*wanted),
        }
    }

    /// The generation for a host, whatever the host has and whether its window is open.
    fn meant_for(&self, member: &Member<'_>, rules: &Rules, now: Timestamp) -> Option<&Target> {
        self.named_for(member, rules, now)
            .filter(|target| !self.is_taken_back(target.position))
    }

    fn named_for(&self, member: &Member<'_>, rules: &Rules, now: Timestamp) -> Option<&Target> {
        if let Some(pin) = self.pin(member.groups) {
            return Some(pin);
        }
        let offers = |run: &&Run| run.offers_to(member, rules, now);
        let running = self.running.as_ref().filter(offers);
        let complete = || match self.is_unfit(self.complete.as_ref()?, member.version) {
            true => self.complete_before.get(member.version),
            false => self.complete.as_ref(),
        };
        running.map(|run| &run.target).or_else(complete)
    }

    /// Whether a generation's databases were withheld from a ClamAV version.
    fn is_unfit(&self, target: &Target, version: &str) -> bool {
        let mut unfit = self.unfit.iter();
        unfit.any(|(content, versions)| *content == target.content && versions.contains(version))
    }

    /// Of several pinned groups of an agent the lowest generation counts: a pin holds back.
    pub fn pin(&self, groups: &[GroupName]) -> Option<&Target> {
        let pins = groups.iter().filter_map(|group| self.pins.get(group));
        pins.map(|pin| &pin.target)
            .min_by_key(|target| target.position)
    }

    fn waits_for_window(&self, member: &Member<'_>, rules: &Rules, now: Timestamp) -> bool {
        // Whoever has what was taken back is to lose it soon, whatever takes its place.
        let has_bad = member.at.is_some_and(|at| self.is_taken_back(at));
        !has_bad && !rules.is_open(member.groups, now)
    }

    /// A generation was published. It goes through the waves, at once or after the running one.
    pub fn published(
        &mut self,
        target: Target,
        supersede: bool,
        rules: &Rules,
        now: Timestamp,
    ) -> Vec<Effect> {
        let failed = self.failed.as_ref().map(|failed| &failed.target);
        let highest = self.needed().chain(failed).map(|known| known.position);
        if highest.max() >= Some(target.position) {
            return Vec::new(); // told again after a restart
        }
        if self.owed.is_some() {
            return Vec::new(); // it is below the rollback, after which the mirror is looked at
        }
        let running = self.running.as_ref();
        let makes_way = |run: &Run| run.makes_way(rules, now);
        let goes_first = |run: &Run| makes_way(run) || (supersede && run.frozen().is_none());
        let Some(run) = running.filter(|run| !goes_first(run)) else {
            return self.begin(target, rules, now);
        };
        let reason = format!("waits for {}", run.target.position);
        let before = self.waiting.replace(target);
        self.pass_over(before);
        vec![note(AuditEvent::RolloutWaits, target, reason)]
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
        let mut effects = vec![note(AuditEvent::Rollback, target, reason)];
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
        self.complete_before
            .retain(|_, target| may_be_offered(target));
        if self.complete.is_none() {
            self.urgent = None;
        }
        let why = "its generation is not to be offered any more";
        self.unpin_all(|pin| !may_be_offered(&pin.target), why)
    }

    /// Lets go the groups of some pins.
    fn unpin_all(&mut self, of: impl Fn(&Pin) -> bool, why: &str) -> Vec<Effect> {
        let gone = self.pins.extract_if(.., |_, pin| of(pin));
        let unpinned = gone.map(|(group, pin)| {
            note(
                AuditEvent::Unpin,
                pin.target,
                format!("group {group}: {why}"),
            )
        });
        unpinned.collect()
    }

    fn begin(&mut self, target: Target, rules: &Rules, now: Timestamp) -> Vec<Effect> {
        let waves: Vec<_> = rules.waves.iter().map(Wave::to_string).collect();
        let waited = self.waiting.take().filter(|waited| *waited != target);
        self.pass_over(waited);
        let mut run = Run::new(target, rules.waves.clone(), now);
        run.resumed = self.resumed;
        let before = self.running.replace(run);
        self.pass_over(before.map(|run| run.target));
        vec![note(
            AuditEvent::Rollout,
            target,
            format!("waves {}", waves.join(", ")),
        )]
    }

    /// Looks where the running generation is, and decides what follows. To be called after every
    /// change of the fleet, and every few seconds.
    pub fn step(&mut self, agents: &impl Agents, rules: &Rules, now: Timestamp) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.resumed = self.resumed.map(|resumed| resumed.min(now));
        if let Some(run) = &mut self.running {
            run.clock_is_at(now);
        }
        self.restore_proven(agents, &mut effects);
        loop {
            let makes_way = |run: &Run| run.makes_way(rules, now);
            if let Some(next) = self.waiting
                && self.running.as_ref().is_some_and(makes_way)
            {
                effects.extend(self.begin(next, rules, now));
            }
            let subject = self.subject(agents, rules, now);
            let Some(run) = &mut self.running else {
                return effects;
            };
            match run.turn(&subject, rules, now, &mut effects) {
                Turn::Rest => return effects,
                Turn::Again => {} // a wave has begun, or is over
                Turn::SetAside(hosts, reason) => {
                    let target = run.target;
                    for host in hosts {
                        effects.push(self.overruled(host, target, reason.clone(), now));
                    }
                }
                Turn::Through => effects.extend(self.completed(rules, now)),
                Turn::Halt(halt) => {
                    let how = Ending::Halted;
                    effects.extend(self.end(how, halt, agents, rules, now));
                }
            }
        }
    }

    /// A host's refusal of a generation was outweighed.
    fn overruled(
        &mut self,
        host: AgentName,
        target: Target,
        reason: String,
        now: Timestamp,
    ) -> Effect {
        let before = self.set_aside.get(&host);
        let rollouts = before.map_or(0, |before| before.rollouts) + 1;
        let effect = set_aside(&host, Some(target.position), reason.clone());
        let set_aside = SetAside {
            refused: Some(target.position),
            rollouts,
            reason,
            since: now,
        };
        self.set_aside.insert(host, set_aside);
        effect
    }

    /// Hosts that were set aside count again once they have proven a generation live that is not
    /// older than the one they refused.
    fn restore_proven(&mut self, agents: &impl Agents, effects: &mut Vec<Effect>) {
        self.set_aside.retain(|host, set_aside| {
            let Some(refused) = set_aside.refused else {
                return agents.is_enrolled(host); // an operator restores it
            };
            let proven = agents.proven(host).filter(|proven| *proven >= refused);
            if let Some(proven) = proven {
                let reason = "it has proven a generation live".to_owned();
                effects.push(counted_again(host, Some(proven), reason));
            }
            proven.is_none() && agents.is_enrolled(host)
        });
    }

    /// The agents that take part in the running generation: agents that are pinned to another one do
    /// not, nor do agents that are past it. A refusal counts in any case.
    fn subject<'a>(
        &self,
        agents: &'a impl Agents,
        rules: &Rules,
        now: Timestamp,
    ) -> Vec<Participant<'a>> {
        let Some(run) = &self.running else {
            return Vec::new();
        };
        let takes_part = |member: &Member<'_>| {
            let pin = self.pin(member.groups);
            let pinned = pin.is_some_and(|pin| pin.position != run.target.position);
            (!pinned || member.answer == Some(Answer::Refused))
                && member.at.is_none_or(|at| at <= run.target.position)
        };
        let members = agents.members(Some(&run.target));
        let members: Vec<_> = members.into_iter().filter(takes_part).collect();
        // A host of the first wave is judged by others of that wave.
        let place = |member: &Member<'_>| run.wave_of(member) == Some(0);
        let mut judges: HashMap<(&str, bool), usize> = HashMap::new();
        if !self.set_aside.is_empty() {
            let first = run.begun.first();
            let is_judge = |it: &&Member<'_>| {
                let was_there = first.is_none_or(|first| run.was_connected(it, first, now));
                was_there && !self.set_aside.contains_key(it.name)
            };
            for member in members.iter().filter(is_judge) {
                *judges.entry((member.version, place(member))).or_default() += 1;
            }
        }
        let participant = |member: Member<'a>| {
            let has_it = member.answer.is_some() || member.offered.is_some();
            let may = has_it || rules.is_open(member.groups, now);
            let set_aside = self.set_aside.get(member.name);
            let regard = set_aside.map_or(Regard::Counted, |set_aside| {
                let judges = judges.get(&(member.version, place(&member)));
                let judges = judges.copied().unwrap_or(0);
                set_aside.regard(run.target.position, judges)
            });
            Participant {
                wave: run.wave_of(&member),
                member,
                may,
                regard,
            }
        };
        members.into_iter().map(participant).collect()
    }

    fn completed(&mut self, rules: &Rules, now: Timestamp) -> Vec<Effect> {
        let Some(run) = self.running.take() else {
            return Vec::new();
        };
        let before = self.complete.replace(run.target);
        let withheld: BTreeSet<_> = run.withheld.into_keys().collect();
        self.unfit
            .retain(|(content, _)| *content != run.target.content); // it had another chance
        self.complete_before
            .retain(|version, _| withheld.contains(version));
        let mut text = "every wave is settled".to_owned();
        if !withheld.is_empty() {
            for version in &withheld {
                let fits = before.filter(|before| !self.is_unfit(before, version));
                if let Some(before) = fits {
                    self.complete_before.insert(version.clone(), before);
                }
            }
            let versions: Vec<_> = withheld.iter().map(String::as_str).collect();
            text += &format!("; withheld from {}", versions.join(", "));
            self.unfit.push_back((run.target.content, withheld));
            if self.unfit.len() > UNFIT_MAX {
                self.unfit.pop_front();
            }
        }
        self.urgent = None;
        self.failed = None;
        let mut effects = vec![note(AuditEvent::RolloutComplete, run.target, text)];
        if let Some(next) = self.waiting.take() {
            effects.extend(self.begin(next, rules, now));
        }
        effects
    }

    /// Ends the running generation: nothing more is offered of it.
    fn end(
        &mut self,
        how: Ending,
        halt: Halt,
        agents: &impl Agents,
        rules: &Rules,
        now: Timestamp,
    ) -> Vec<Effect> {
        let Halt { reason, blamed } = halt;
        let Some(run) = self.running.take() else {
            return Vec::new();
        };
        let target = run.target;
        // An operator may have brought it to hosts before their wave.
        let members = agents.members(Some(&target));
        let forced = members.iter().any(|it| it.at >= Some(target.position));
        self.failed = Some(Failed {
            target,
            how,
            reason: reason.clone(),
            since: now,
        });
        self.withdraw(target, how, blamed, now);
        let event = match how {
            Ending::Halted => AuditEvent::Halt,
            Ending::Aborted => AuditEvent::Abort,
            Ending::RolledBack => AuditEvent::RolledBack,
        };
        let mut effects = vec![
            note(event, target, reason),
            Effect::Withdrawn {
                target,
                how,
                back_to: self.complete,
            },
        ];
        let same = |it: &Target| it.content == target.content;
        effects.extend(self.unpin_all(|pin| same(&pin.target), "its generation was taken back"));
        if self.waiting.take_if(|waiting| same(waiting)).is_some() {
            effects.push(Effect::Look); // which says that it is held
        }
        match self.complete {
            // What waits has a lower number than the rollback will have: it is captured anew.
            Some(to) if rules.rollback_on_halt && (!run.begun.is_empty() || forced) => {
                self.owed = Some(Owed { to, of: target });
                let waited = self.waiting.take();
                self.pass_over(waited);
            }
            Some(_) | None => {
                if let Some(next) = self.waiting.take() {
                    effects.extend(self.begin(next, rules, now));
                }
            }
        }
        effects
    }

    fn pass_over(&mut self, target: Option<Target>) {
        self.passed_over
            .extend(target.map(|target| target.position));
        if self.passed_over.len() > PASSED_OVER_MAX {
            self.passed_over.pop_first();
        }
    }

    fn withdraw(
        &mut self,
        target: Target,
        outcome: Ending,
        blamed: BTreeSet<DatabaseName>,
        since: Timestamp,
    ) {
        self.withdrawn.insert(Withdrawal {
            content: target.content,
            position: target.position,
            outcome,
            since,
            new: None,
            blamed,
        });
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

    /// Since and until when no wave begins because agents that were connected before a start of the master
    /// are not back.
    pub fn reconnecting(
        &self,
        agents: &impl Agents,
        rules: &Rules,
        now: Timestamp,
    ) -> Option<(Timestamp, Timestamp)> {
        let (run, since) = (self.running.as_ref()?, self.resumed?);
        let waits = run.waits_for_reconnects(&self.subject(agents, rules, now), now);
        waits.then(|| (since, run::reconnected(since)))
    }

    /// Members of settled waves that have not proven the running generation.
    pub fn stragglers<'a>(
        &self,
        agents: &'a impl Agents,
        rules: &Rules,
        now: Timestamp,
    ) -> Vec<&'a AgentName> {
        let subject = self.subject(agents, rules, now);
        let run = self.running.as_ref();
        run.map_or_else(Vec::new, |run| run.stragglers(&subject, rules, now))
    }

    /// The windows that the next wave waits for, if it does: `GROUP: WINDOW, ...` of each group.
    pub fn waits_for(&self, agents: &impl Agents, rules: &Rules, now: Timestamp) -> Vec<String> {
        let subject = self.subject(agents, rules, now);
        let run = self.running.as_ref();
        run.map_or_else(Vec::new, |run| run.waits_for(&subject, rules))
    }
}

fn note(event: AuditEvent, target: Target, reason: String) -> Effect {
    Effect::Note {
        event,
        position: Some(target.position),
        host: None,
        reason,
    }
}

/// A host's refusals do not count any more.
fn set_aside(host: &AgentName, position: Option<Position>, reason: String) -> Effect {
    let (event, host) = (AuditEvent::SetAside, Some(host.clone()));
    Effect::Note {
        event,
        position,
        host,
        reason,
    }
}

/// A host's refusals count again.
fn counted_again(host: &AgentName, position: Option<Position>, reason: String) -> Effect {
    let (event, host) = (AuditEvent::CountedAgain, Some(host.clone()));
    Effect::Note {
        event,
        position,
        host,
        reason,
    }
}
