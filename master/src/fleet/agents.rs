//! The agents that the master knows, and what it knows of each.
//!
//! Pure: no sockets, no disk, no clock. `dispatch.rs` feeds events in and keeps what [`Fleet::record`]
//! returns on disk. Invariant: what is said of a host comes from its signed receipts, never from
//! what the master sent.

mod agent;
mod row;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clamcast_proto::dsse::{Envelope, Verified};
use clamcast_proto::manifest::{Manifest, ManifestFile};
use clamcast_proto::receipt::{ClamdReport, Receipt};
use clamcast_proto::revocation::RevocationList;
use clamcast_proto::wire::{Feature, Features, OfferId, OtherMaster, Phase};
use clamcast_proto::{AgentName, Digest, GroupName, Position};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::config::{Rules, Wave};
use crate::fleet::rollout::{
    Agents, Effect, Ending, Member, Order, OrderError, PauseKind, Rollout, Tally, Target, Wanted,
};
use crate::fleet::twins::{Arrivals, Twins};
use crate::publish::withdrawn::{Directives, Withdrawal};

pub use agent::{
    Answered, Declined, Failed, Installed, Link, LinkId, Offered, Record, Standing, Taken,
};
pub use row::{AWAY, OFFERED, Row};

use agent::{Agent, bounded, bounded_list, is_silent};

/// Longest silence that an agent may announce: a splay over a working day.
pub const SILENCE_MAX: SignedDuration = SignedDuration::from_hours(12);

/// Members of each ClamAV version that the first wave should have: two proofs outweigh one refusal.
pub const CANARIES_MIN: usize = 3;

/// All agents that were ever connected and are not revoked, and what they are wanted at.
#[derive(Debug)]
pub struct Fleet {
    agents: Roster,
    rollout: Rollout,
    rules: Rules,
    /// Those that somebody may be wanted at, and those that somebody has.
    manifests: HashMap<Digest, Arc<Verified<Manifest>>>,
    /// What the next [`Fleet::step`] says besides.
    unsaid: Vec<Effect>,
    /// The latest time that was seen.
    latest: Timestamp,
}

/// The agents by their names.
#[derive(Debug, Default)]
struct Roster(BTreeMap<AgentName, Agent>);

/// What a new connection means.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Arrival {
    /// The agent is new to the fleet.
    pub new: bool,
    /// What is kept of it has changed.
    pub changed: bool,
    /// The connection that this one replaces: after a crash of the host the old one may linger for
    /// a minute.
    pub replaced: Option<LinkId>,
    /// Two hosts use the name, as this connection shows first.
    pub twins: Option<Twins>,
    /// A known agent came with a certificate that it had not come with before.
    pub is_new_certificate: bool,
}

/// A generation that waits for its turn.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Turn {
    /// Which one.
    pub position: Position,
    /// When it was published.
    pub since: Timestamp,
    /// When the generation before it makes way, if that has paused by itself.
    pub until: Option<Timestamp>,
}

/// How many agents stand where.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Counts {
    /// Enrolled.
    pub total: usize,
    /// With an open connection.
    pub connected: usize,
    /// Conformant.
    pub conformant: usize,
    /// Neither conformant nor failed.
    pub behind: usize,
    /// Failed.
    pub failed: usize,
}

impl Fleet {
    /// The fleet as it was kept on disk, before anyone connects. What is wanted that is not among
    /// `manifests` is wanted no more: it was signed for a fleet that is past it.
    pub fn new(
        records: Vec<Record>,
        mut rollout: Rollout,
        rules: Rules,
        manifests: Vec<Arc<Verified<Manifest>>>,
    ) -> Self {
        let agent = |record: Record| {
            let (name, was_connected) = (record.name.clone(), record.connected);
            let agent = Agent {
                record,
                link: None,
                answered: None,
                was_connected,
                returning: was_connected,
                arrivals: Arrivals::default(),
            };
            (name, agent)
        };
        let known = manifests.into_iter();
        let manifests: HashMap<_, _> = known.map(|it| (it.payload_sha256(), it)).collect();
        let unsaid = rollout.retain(|target| manifests.contains_key(&target.manifest_sha256));
        Self {
            agents: Roster(records.into_iter().map(agent).collect()),
            rollout,
            rules,
            manifests,
            unsaid,
            latest: Timestamp::MAX, // what is kept may be of any time
        }
    }

    /// Takes note that the master was started at `now`, and nobody is connected yet.
    pub fn resumed(&mut self, now: Timestamp) {
        self.rollout.resumed(now);
    }

    /// What the publisher is to know.
    pub fn directives(&self) -> Directives {
        Directives {
            plain_names: self.plain_names(),
            ..self.rollout.directives()
        }
    }

    /// Why only databases with plain names may be published: the agents whose program declines a
    /// manifest with any other. An agent that is away counts, because it would decline such a manifest
    /// when it is back.
    pub fn plain_names(&self) -> Option<String> {
        let agents = self.agents.0.iter();
        let mut lacking = agents.filter(|(_, agent)| agent.record.lacks(Feature::WideNames));
        let (first, _) = lacking.next()?;
        Some(match lacking.count() {
            0 => {
                format!("{first} runs a clamcast-agent that does not accept such names; upgrade it")
            }
            more => format!(
                "{first} and {more} more run a clamcast-agent that does not accept such names; \
                 upgrade them"
            ),
        })
    }

    /// How careful rollouts are.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// The generation on its way, and the one that all other agents should run.
    pub fn rollout(&self) -> &Rollout {
        &self.rollout
    }

    /// A generation was published, or its rollout goes on after a restart.
    pub fn published(
        &mut self,
        manifest: &Arc<Verified<Manifest>>,
        supersede: bool,
        now: Timestamp,
    ) -> Vec<Effect> {
        let target = self.know(manifest);
        let rules = &self.rules;
        self.rollout.published(target, supersede, rules, now)
    }

    /// The rollback that was owed was published.
    pub fn went_back(&mut self, manifest: &Arc<Verified<Manifest>>) -> Vec<Effect> {
        let target = self.know(manifest);
        self.rollout.went_back(target)
    }

    /// The fleet is past what was wanted, which is not to be offered any more; the next publication
    /// is.
    pub fn passed(&mut self) {
        self.unsaid.extend(self.rollout.retain(|_| false));
    }

    /// Remembers a manifest, and forgets those that no agent has or should run.
    fn know(&mut self, manifest: &Arc<Verified<Manifest>>) -> Target {
        let needed = self.rollout.needed().map(|target| target.manifest_sha256);
        let agents = self.agents.0.values();
        let installed = agents.filter_map(|agent| agent.record.installed.as_ref());
        let installed = installed.map(|installed| installed.manifest_sha256);
        let kept: HashSet<_> = needed.chain(installed).collect();
        self.manifests.retain(|digest, _| kept.contains(digest));
        self.remember(manifest)
    }

    /// Carries out what an operator orders.
    pub fn order(&mut self, order: Order, now: Timestamp) -> Result<Vec<Effect>, OrderError> {
        let rules = &self.rules;
        let effects = self.rollout.order(order, &self.agents, rules, now)?;
        self.note_withdrawals(&effects, now);
        Ok(effects)
    }

    /// Takes note of the files that were new in the generations that were taken back.
    fn note_withdrawals(&mut self, effects: &[Effect], now: Timestamp) {
        for effect in effects {
            let Effect::Withdrawn {
                target,
                how,
                back_to,
            } = effect
            else {
                continue;
            };
            let Some(manifest) = self.manifests.get(&target.manifest_sha256) else {
                continue;
            };
            let base = back_to.and_then(|it| self.manifests.get(&it.manifest_sha256));
            let is_new = |file: &&ManifestFile| {
                let before = base.and_then(|base| base.file(&file.name));
                before.map(|before| before.sha256) != Some(file.sha256)
            };
            let new = manifest.files.iter().filter(is_new);
            let new: BTreeMap<_, _> = new.map(|it| (it.name.clone(), it.sha256)).collect();
            if *how == Ending::RolledBack {
                // The same databases under an older number are no better.
                let known = self.manifests.values();
                let same = known.filter(|manifest| manifest.content == target.content);
                self.rollout.were_withdrawn(same.map(|manifest| Withdrawal {
                    content: manifest.content,
                    position: manifest.position(),
                    outcome: Ending::RolledBack,
                    since: now,
                    new: Some(new.clone()),
                    blamed: BTreeSet::new(),
                }));
            }
            self.rollout.were_new(target.position, new);
        }
    }

    /// Takes note of a manifest that somebody is to be wanted at.
    pub fn remember(&mut self, manifest: &Arc<Verified<Manifest>>) -> Target {
        let target = target(manifest);
        self.manifests
            .insert(target.manifest_sha256, manifest.clone());
        target
    }

    /// Goes on where the rollout may go on, or stops it.
    pub fn step(&mut self, now: Timestamp) -> Vec<Effect> {
        if now < self.latest {
            self.clock_went_back(now);
        }
        self.latest = now;
        let mut effects = std::mem::take(&mut self.unsaid);
        effects.extend(self.rollout.step(&self.agents, &self.rules, now));
        self.note_withdrawals(&effects, now);
        effects
    }

    /// Takes signs that are further in the future than any agent may promise for signs of now.
    fn clock_went_back(&mut self, now: Timestamp) {
        let latest = now.saturating_add(SILENCE_MAX).unwrap_or(Timestamp::MAX);
        for agent in self.agents.0.values_mut() {
            agent.record.seen = agent.record.seen.min(now);
            let offer = agent.link.as_mut().and_then(|link| link.offer.as_mut());
            let taken = agent.record.taken.as_mut();
            let renewed = taken.map(|taken| {
                taken.since = taken.since.min(now);
                &mut taken.renewed
            });
            let progress = offer.map(|offer| &mut offer.progress);
            for sign in [renewed, progress].into_iter().flatten() {
                if *sign > latest {
                    *sign = now;
                }
            }
        }
    }

    /// What became of the running generation in all waves that have begun, and in the last.
    pub fn tallies(&self, now: Timestamp) -> Option<(Tally, Tally)> {
        self.rollout.tallies(&self.agents, &self.rules, now)
    }

    /// The windows that the next wave waits for, if it does.
    pub fn waits_for(&self, now: Timestamp) -> Vec<String> {
        self.rollout.waits_for(&self.agents, &self.rules, now)
    }

    /// Since and until when the rollout waits for agents that were connected before a start of the
    /// master, if it does.
    pub fn reconnecting(&self, now: Timestamp) -> Option<(Timestamp, Timestamp)> {
        self.rollout.reconnecting(&self.agents, &self.rules, now)
    }

    /// The generation that waits for its turn.
    pub fn turn(&self) -> Option<Turn> {
        let waiting = self.rollout.waiting()?;
        let manifest = self.manifests.get(&waiting.manifest_sha256)?;
        Some(Turn {
            position: waiting.position,
            since: manifest.created,
            until: self.rollout.running().and_then(|run| {
                let pause = run.paused.as_ref()?;
                let is_operators = pause.kind == PauseKind::Operator;
                (!is_operators).then(|| run.is_stuck_at(&self.rules))
            }),
        })
    }

    /// Members of settled waves that have not proven the running generation.
    pub fn stragglers(&self, now: Timestamp) -> Vec<&AgentName> {
        self.rollout.stragglers(&self.agents, &self.rules, now)
    }

    /// ClamAV versions of which the first wave, where it is a group, has too few members to judge a
    /// generation although the fleet has more.
    pub fn thin_versions(&self) -> Vec<ThinVersion> {
        match self.rules.waves.first() {
            Some(Wave::Group(canary)) => {
                thin_versions(self.agents.0.values().map(|it| &it.record), canary)
            }
            _ => Vec::new(), // a part of the fleet, another one each time
        }
    }

    /// The generation that an agent took and that makes it decline `manifest`, if it does: what it
    /// has it takes at any time, so that it is mended.
    pub fn past(&self, name: &AgentName, manifest: &Verified<Manifest>) -> Option<Position> {
        let agent = self.agents.0.get(name)?;
        let has_it = agent.has(&manifest.payload_sha256());
        agent.at().filter(|at| *at > manifest.position() && !has_it)
    }

    /// The agents as the rollout sees them, with what each says of what is on its way.
    pub fn members(&self) -> Vec<Member<'_>> {
        let running = self.rollout.running().map(|run| &run.target);
        self.agents.members(running)
    }

    /// Whether time alone may change what is wanted.
    pub fn is_timed(&self) -> bool {
        self.rollout.running().is_some() || !self.rules.windows.is_empty()
    }

    /// The generation that an agent is to be offered. One that it failed with waits until what it has
    /// is mended.
    pub fn wanted(&self, name: &AgentName, now: Timestamp) -> Option<&Arc<Verified<Manifest>>> {
        self.due_to(self.agents.0.get(name)?, now)
    }

    fn due_to(&self, agent: &Agent, now: Timestamp) -> Option<&Arc<Verified<Manifest>>> {
        match self.wanted_of(agent, now) {
            Wanted::At(target) if agent.is_mending() && agent.failed_with(&target) => None,
            Wanted::At(target) => self.manifests.get(&target.manifest_sha256),
            Wanted::Nothing | Wanted::Stay | Wanted::Later(_) => None,
        }
    }

    /// The connected agents that are to be offered something else than they have or were offered last,
    /// and what.
    pub fn due(&self, now: Timestamp) -> Vec<(AgentName, LinkId, Arc<Verified<Manifest>>)> {
        let due = |agent: &Agent| {
            let link = agent.link.as_ref().filter(|link| link.greeted)?;
            let manifest = self.due_to(agent, now)?;
            let is_news = link.told != Some(manifest.payload_sha256());
            is_news.then(|| (agent.record.name.clone(), link.id, manifest.clone()))
        };
        self.agents.0.values().filter_map(due).collect()
    }

    /// The open connections of agents that have said Hello.
    pub fn greeted(&self) -> impl Iterator<Item = (&AgentName, LinkId)> {
        self.agents.0.iter().filter_map(|(name, agent)| {
            let link = agent.link.as_ref()?;
            link.greeted.then_some((name, link.id))
        })
    }

    /// An agent's open connection.
    pub fn link_of(&self, name: &AgentName) -> Option<LinkId> {
        self.agents.0.get(name)?.link.as_ref().map(|link| link.id)
    }

    /// The generation that an agent may rely on for now: the one that it should run, or the one that
    /// it has and nobody holds against it.
    pub fn vouched(&self, name: &AgentName, now: Timestamp) -> Option<&Arc<Verified<Manifest>>> {
        let agent = self.agents.0.get(name)?;
        match self.wanted_of(agent, now) {
            Wanted::At(target) => self.manifests.get(&target.manifest_sha256),
            Wanted::Nothing => None,
            Wanted::Stay | Wanted::Later(_) => self.installed(agent),
        }
    }

    /// The generation that an agent is offered when it lacks files of what it has: that which it is
    /// wanted at, since that brings it what it lacks, too; or, where it failed with that or is to
    /// stay where it is, that which it has, if nobody holds it against it and its files are still
    /// there (`is_kept`).
    pub fn mending(
        &self,
        name: &AgentName,
        is_kept: impl Fn(Position) -> bool,
        now: Timestamp,
    ) -> Option<&Arc<Verified<Manifest>>> {
        let agent = self.agents.0.get(name)?;
        let installed = self.installed(agent);
        let installed = installed.filter(|manifest| is_kept(manifest.position()));
        match self.wanted_of(agent, now) {
            Wanted::At(target) => {
                let installed = installed.filter(|_| agent.failed_with(&target));
                installed.or_else(|| self.manifests.get(&target.manifest_sha256))
            }
            Wanted::Nothing => None,
            Wanted::Stay | Wanted::Later(_) => installed,
        }
    }

    /// What an agent has, unless it was taken back.
    fn installed(&self, agent: &Agent) -> Option<&Arc<Verified<Manifest>>> {
        let installed = agent.record.installed.as_ref()?;
        let manifest = self.manifests.get(&installed.manifest_sha256);
        manifest.filter(|manifest| !self.rollout.is_taken_back(manifest.position()))
    }

    fn wanted_of(&self, agent: &Agent, now: Timestamp) -> Wanted {
        let running = self.rollout.running().map(|run| &run.target);
        self.rollout
            .wanted(&agent.member(running), &self.rules, now)
    }

    /// The newest generation that somebody is wanted at.
    pub fn current(&self) -> Option<&Arc<Verified<Manifest>>> {
        let running = self.rollout.running().map(|run| &run.target);
        let target = running.or(self.rollout.complete())?;
        self.manifests
            .get(&target.manifest_sha256)
            .filter(|manifest| !self.rollout.is_taken_back(manifest.position()))
    }

    /// The manifest that an agent says it has `installed`, if an agent has or should run it.
    pub fn known(&self, installed: &Envelope) -> Option<&Arc<Verified<Manifest>>> {
        let mut known = self.manifests.values();
        known.find(|manifest| manifest.envelope().payload == installed.payload)
    }

    /// Whether an agent has a generation that this master never offered it, as far as the master's state
    /// knows: the state is a copy from before.
    pub fn has_forgotten(&self, name: &AgentName, manifest: &Manifest) -> bool {
        let agent = self.agents.0.get(name);
        agent.is_some_and(|agent| agent.at() < Some(manifest.position()))
    }

    /// Whether a generation waits for its turn that no agent was offered, as far as the master's state
    /// knows. Operators drive hosts to what waits, and a host may have been revoked and enrolled since.
    pub fn is_overtaken(&self, position: Position) -> bool {
        let waits = self.rollout.waiting().map(|it| it.position) == Some(position);
        let mut agents = self.agents.0.values();
        waits && !agents.any(|agent| agent.at() >= Some(position))
    }

    /// Takes note that an agent took a generation: it declines what is lower.
    pub fn took(&mut self, name: &AgentName, manifest: &Verified<Manifest>, now: Timestamp) {
        if let Some(agent) = self.agents.0.get_mut(name) {
            let version = agent.record.version.clone();
            let sha256 = manifest.payload_sha256();
            agent.record.taken = Some(Taken::new(manifest.position(), sha256, version, now));
        }
    }

    /// The newest generation that was not taken back: also one that waits for its turn.
    pub fn newest(&self) -> Option<&Arc<Verified<Manifest>>> {
        let waiting = self.rollout.waiting();
        let waiting = waiting.and_then(|target| self.manifests.get(&target.manifest_sha256));
        waiting.or_else(|| self.current())
    }

    /// Whether a generation is current, on its way, or waits for that.
    pub fn is_open(&self, manifest_sha256: &Digest) -> bool {
        let mut needed = self.rollout.needed();
        needed.any(|target| target.manifest_sha256 == *manifest_sha256)
    }

    /// What the group of an agent is pinned to.
    pub fn pinned(&self, name: &AgentName) -> Option<&Arc<Verified<Manifest>>> {
        let pin = self.rollout.pin(&self.record(name)?.groups)?;
        self.manifests.get(&pin.manifest_sha256)
    }

    /// An agent is connected.
    pub fn connected(
        &mut self,
        name: &AgentName,
        groups: Vec<GroupName>,
        fingerprint: Digest,
        link: Link,
    ) -> Arrival {
        let now = link.since;
        let new = !self.agents.0.contains_key(name);
        let agent = self.agents.0.entry(name.clone()).or_insert_with(|| Agent {
            record: Record {
                name: name.clone(),
                groups: Vec::new(),
                enrolled: now,
                seen: now,
                serial: link.serial.clone(),
                certificate_ends: link.certificate_ends,
                certificates: VecDeque::new(),
                connected: true,
                taken: None,
                version: None,
                accepts: None,
                installed: None,
                failed: None,
                clamd: ClamdReport::default(),
                foreign: Vec::new(),
                adopted: Vec::new(),
                drift: Vec::new(),
                drift_error: None,
                receipts: VecDeque::new(),
            },
            link: None,
            answered: None,
            was_connected: false,
            returning: false,
            arrivals: Arrivals::default(),
        });
        agent.returning = false;
        let record = &mut agent.record;
        let was_connected = std::mem::replace(&mut record.connected, true);
        let is_new_certificate = record.learn_certificate(fingerprint);
        let changed =
            new || !was_connected || record.groups != groups || record.serial != link.serial;
        record.groups = groups;
        record.seen = now;
        record.serial = link.serial.clone();
        record.certificate_ends = link.certificate_ends;
        let twins = agent.arrivals.connected(link.address, now).cloned();
        let replaced = agent.link.replace(link).map(|old| {
            agent.answered = old.answered.or(agent.answered);
            old.id
        });
        Arrival {
            new,
            changed,
            replaced,
            twins,
            is_new_certificate,
        }
    }

    /// A connection that was replaced still answers, from `old`. Returns the twins, if this is the first
    /// sign of them.
    pub fn both_answer(
        &mut self,
        name: &AgentName,
        old: SocketAddr,
        now: Timestamp,
    ) -> Option<Twins> {
        let agent = self.agents.0.get_mut(name)?;
        let new = agent.link.as_ref()?.address;
        agent.arrivals.both_answer([old, new], now).cloned()
    }

    /// The agents that declined their last offer because they follow another master.
    pub fn other_masters(&self) -> impl Iterator<Item = (&AgentName, &OtherMaster, Timestamp)> {
        self.agents.0.iter().filter_map(|(name, agent)| {
            let declined = agent.link.as_ref()?.declined.as_ref()?;
            let other = declined.other_master.as_deref()?;
            let is_ours = self.manifests.contains_key(&other.manifest_sha256);
            (!is_ours).then_some((name, other, declined.since))
        })
    }

    /// The names that two hosts use.
    pub fn twins(&self, now: Timestamp) -> impl Iterator<Item = (&AgentName, &Twins)> {
        let agents = self.agents.0.iter();
        agents.filter_map(move |(name, agent)| Some((name, agent.arrivals.twins(now)?)))
    }

    /// Open connections whose certificate has expired.
    pub fn expired(&self, now: Timestamp) -> impl Iterator<Item = (&AgentName, &Link)> {
        let links = self.agents.0.iter();
        let links = links.filter_map(|(name, agent)| Some((name, agent.link.as_ref()?)));
        links.filter(move |(_, link)| link.certificate_ends <= now)
    }

    /// The master cannot send a file of an agent's offer, for this reason, or can again.
    pub fn unsent(&mut self, name: &AgentName, id: LinkId, reason: Option<String>) {
        if let Some(link) = self.link(name, id) {
            link.unsent = reason;
        }
    }

    /// A connection ended. Returns whether that changes what is kept of the agent: the end of a
    /// connection that was replaced does not.
    pub fn disconnected(&mut self, name: &AgentName, id: LinkId, now: Timestamp) -> bool {
        let agent = self.agents.0.get_mut(name);
        let Some((agent, link)) = agent.and_then(|agent| {
            let link = agent.link.take_if(|link| link.id == id)?;
            Some((agent, link))
        }) else {
            return false;
        };
        agent.answered = link.answered.or(agent.answered);
        agent.record.seen = now;
        agent.record.connected = false;
        true
    }

    /// Agents whose last certificate is revoked are no part of the fleet any more. Returns them, with
    /// their connections.
    pub fn revoked(&mut self, list: &RevocationList) -> Vec<(AgentName, Option<LinkId>)> {
        let serials: HashSet<_> = list.revoked.iter().map(|revoked| &revoked.serial).collect();
        let gone = self
            .agents
            .0
            .iter()
            .filter(|(_, agent)| serials.contains(&agent.record.serial));
        let gone = gone.map(|(name, agent)| (name.clone(), agent.link.as_ref().map(|it| it.id)));
        let gone: Vec<_> = gone.collect();
        for (name, _) in &gone {
            self.agents.0.remove(name);
        }
        gone
    }

    /// An agent was offered a generation.
    pub fn offered(
        &mut self,
        name: &AgentName,
        id: LinkId,
        offer: OfferId,
        manifest: &Verified<Manifest>,
        now: Timestamp,
    ) {
        let Some(agent) = self.linked(name, id) else {
            return;
        };
        agent.record.seen = now;
        let manifest_sha256 = manifest.payload_sha256();
        let taken = agent.record.taken.as_ref();
        let is_new = taken.map(|taken| taken.manifest_sha256) != Some(manifest_sha256);
        // What it has is offered to mend it, and says nothing of how far it came.
        let mends = agent.at() > Some(manifest.position());
        if is_new && !mends {
            let version = agent.record.version.clone();
            let taken = Taken::new(manifest.position(), manifest_sha256, version, now);
            agent.record.taken = Some(taken);
        }
        if let Some(link) = &mut agent.link {
            (link.declined, link.unsent) = (None, None);
            link.told = Some(manifest_sha256);
            link.says_live = false;
            link.offer = Some(Offered {
                id: offer,
                position: manifest.position(),
                manifest_sha256,
                phase: Phase::Idle,
                progress: now,
                unbegun: false,
            });
        }
    }

    /// An offer was dropped before the agent heard of it.
    pub fn not_offered(&mut self, name: &AgentName, id: LinkId, offer: OfferId) {
        let link = self.link(name, id);
        let is_last = |link: &&mut Link| link.offer.as_ref().is_some_and(|it| it.id == offer);
        if let Some(link) = link.filter(is_last) {
            (link.offer, link.told) = (None, None);
        }
    }

    /// The offer that an agent was just made is an operator's order.
    pub fn forced(&mut self, name: &AgentName, id: LinkId) {
        let offer = self.link(name, id).and_then(|link| link.offer.as_mut());
        if let Some(offer) = offer {
            offer.unbegun = true;
        }
    }

    /// An agent gave a sign of progress with its offer, and may have said until when it will be
    /// silent: at most [`SILENCE_MAX`] of that is believed. `sent`: bytes of files that its connection
    /// has carried.
    pub fn progress(
        &mut self,
        name: &AgentName,
        id: LinkId,
        phase: Phase,
        until: Option<Timestamp>,
        sent: u64,
        now: Timestamp,
    ) {
        let Some(agent) = self.linked(name, id) else {
            return;
        };
        if let Some(offer) = agent.link.as_mut().and_then(|link| link.offer.as_mut()) {
            let latest = now.saturating_add(SILENCE_MAX).unwrap_or(Timestamp::MAX);
            offer.phase = phase;
            offer.unbegun = false;
            offer.progress = until.map_or(now, |until| until.clamp(now, latest));
            if let Some(taken) = &mut agent.record.taken
                && taken.manifest_sha256 == offer.manifest_sha256
            {
                taken.progress(phase, offer.progress, sent, now);
            }
        }
    }

    /// What an agent's Hello says of its program and its clamd. Returns whether it is news; nothing if
    /// this is not its connection any more.
    pub fn hello(
        &mut self,
        name: &AgentName,
        id: LinkId,
        accepts: Features,
        clamd: ClamdReport,
        foreign: Vec<String>,
    ) -> Option<bool> {
        let agent = self.linked(name, id)?;
        if let Some(link) = &mut agent.link {
            link.greeted = true;
        }
        let (clamd, foreign) = (bounded(clamd), bounded_list(foreign));
        let accepts = Some(accepts);
        let record = &agent.record;
        let news = record.clamd != clamd || record.foreign != foreign || record.accepts != accepts;
        agent.record.accepts = accepts;
        agent.record.clamd = clamd;
        agent.record.learn_version();
        agent.record.foreign = foreign;
        Some(news)
    }

    /// An agent has its target generation, by its last receipt, and needs no offer of it. `says_live`:
    /// its Hello says that it is live with it.
    pub fn has_it(
        &mut self,
        name: &AgentName,
        id: LinkId,
        manifest_sha256: Digest,
        says_live: bool,
    ) {
        if let Some(link) = self.link(name, id) {
            link.told = Some(manifest_sha256);
            link.says_live = says_live;
        }
    }

    /// Whether refusals by hosts of an agent's version are being weighed already, or were.
    pub fn is_weighed(&self, name: &AgentName) -> bool {
        let (run, agent) = (self.rollout.running(), self.agents.0.get(name));
        run.zip(agent).is_some_and(|(run, agent)| {
            let version = agent.member(Some(&run.target)).version;
            run.weighing.contains_key(version) || run.withheld.contains_key(version)
        })
    }

    /// Whether the running generation waits for the first agent to connect, and this is the one.
    pub fn first_wave_waits(&self) -> bool {
        let run = self.rollout.running();
        let linked = || self.agents.0.values().filter(|agent| agent.link.is_some());
        run.is_some_and(|run| run.begun.is_empty()) && linked().nth(1).is_none()
    }

    /// The generation that an agent was not offered because its Hello and its last receipt said that it
    /// is live with it, where an older receipt that it had kept says otherwise. A crash has cost it the
    /// receipt that came after that one, and only the answer to an offer makes up for that.
    pub fn doubted(&self, name: &AgentName, now: Timestamp) -> Option<&Arc<Verified<Manifest>>> {
        let agent = self.agents.0.get(name)?;
        let link = agent.link.as_ref().filter(|link| link.says_live)?;
        let wanted = self.due_to(agent, now)?;
        let is_told = link.told == Some(wanted.payload_sha256());
        let standing = self.standing(name, now, self.rules.deadline);
        (is_told && standing != Standing::Conformant).then_some(wanted)
    }

    /// Whether an agent sent this receipt before.
    pub fn knows(&self, receipt: &Verified<Receipt>) -> bool {
        let agent = self.agents.0.get(&receipt.agent);
        agent.is_some_and(|agent| agent.knows(receipt))
    }

    /// Takes a receipt whose signature was checked. `false`: it is known already.
    pub fn receipt(&mut self, receipt: &Verified<Receipt>, now: Timestamp) -> bool {
        let manifest = self.manifests.get(&receipt.manifest_sha256);
        let manifest = manifest.map(|manifest| &***manifest);
        let agent = self.agents.0.get_mut(&receipt.agent);
        agent.is_some_and(|agent| {
            if let Some(link) = &mut agent.link {
                link.unsent = None;
            }
            agent.receipt(receipt, manifest, now)
        })
    }

    /// The offer that an agent has not answered.
    pub fn offer(&self, name: &AgentName) -> Option<OfferId> {
        let link = self.agents.0.get(name)?.link.as_ref()?;
        link.offer.as_ref().map(|offer| offer.id)
    }

    /// What is to be kept of an agent.
    pub fn record(&self, name: &AgentName) -> Option<&Record> {
        self.agents.0.get(name).map(|agent| &agent.record)
    }

    /// Every agent's name.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &AgentName> {
        self.agents.0.keys()
    }

    /// Where an agent stands.
    pub fn standing(&self, name: &AgentName, now: Timestamp, deadline: Duration) -> Standing {
        let Some(agent) = self.agents.0.get(name) else {
            return Standing::Behind;
        };
        self.standing_of(agent, self.wanted_of(agent, now), now, deadline)
    }

    fn standing_of(
        &self,
        agent: &Agent,
        wanted: Wanted,
        now: Timestamp,
        deadline: Duration,
    ) -> Standing {
        match agent.standing(wanted, now, deadline) {
            // It stays there only until something newer comes.
            Standing::Conformant if agent.has_taken_back(&self.rollout) => Standing::Behind,
            standing @ (Standing::Conformant | Standing::Behind | Standing::Failed) => standing,
        }
    }

    /// How many stand where.
    pub fn counts(&self, now: Timestamp, deadline: Duration) -> Counts {
        let mut counts = Counts {
            total: self.agents.0.len(),
            ..Counts::default()
        };
        for (name, agent) in &self.agents.0 {
            counts.connected += usize::from(agent.link.is_some());
            match self.standing(name, now, deadline) {
                Standing::Conformant if agent.arrivals.twins(now).is_some() => counts.failed += 1,
                Standing::Conformant => counts.conformant += 1,
                Standing::Behind => counts.behind += 1,
                Standing::Failed => counts.failed += 1,
            }
        }
        counts
    }

    /// Connected agents that have not answered their offer yet and still give signs of progress.
    pub fn unsettled(
        &self,
        now: Timestamp,
        deadline: Duration,
    ) -> impl Iterator<Item = &AgentName> {
        let on_its_way = move |(_, agent): &(&AgentName, &Agent)| {
            let offer = agent.link.as_ref().and_then(|link| link.offer.as_ref());
            offer.is_some_and(|offer| !is_silent(offer, now, deadline))
        };
        self.agents
            .0
            .iter()
            .filter(on_its_way)
            .map(|(name, _)| name)
    }

    /// An agent does not take its offer. Returns which one, unless it was answered before.
    pub fn declined(
        &mut self,
        name: &AgentName,
        id: LinkId,
        message: String,
        other_master: Option<Box<OtherMaster>>,
        now: Timestamp,
    ) -> Option<Position> {
        let link = self.link(name, id)?;
        let offer = link.offer.take()?;
        link.unsent = None;
        link.answered = Some(Answered {
            offer: offer.id,
            outcome: None,
        });
        link.declined = Some(Declined {
            manifest_sha256: offer.manifest_sha256,
            message,
            other_master,
            since: now,
        });
        Some(offer.position)
    }

    /// The table of agents.
    pub fn rows(&self, now: Timestamp, deadline: Duration) -> Vec<Row> {
        let row = |agent: &Agent| {
            let wanted = self.wanted_of(agent, now);
            let standing = self.standing_of(agent, wanted, now, deadline);
            agent.row(&self.rollout, wanted, standing, now)
        };
        self.agents.0.values().map(row).collect()
    }

    fn link(&mut self, name: &AgentName, id: LinkId) -> Option<&mut Link> {
        self.linked(name, id)?.link.as_mut()
    }

    /// The agent, if this is its connection.
    fn linked(&mut self, name: &AgentName, id: LinkId) -> Option<&mut Agent> {
        let agent = self.agents.0.get_mut(name)?;
        let link = agent.link.as_ref()?;
        (link.id == id).then_some(agent)
    }
}

impl Agents for Roster {
    fn members(&self, target: Option<&Target>) -> Vec<Member<'_>> {
        let agents = self.0.values();
        agents.map(|agent| agent.member(target)).collect()
    }

    fn is_enrolled(&self, name: &AgentName) -> bool {
        self.0.contains_key(name)
    }

    fn proven(&self, name: &AgentName) -> Option<Position> {
        let record = &self.0.get(name)?.record;
        let installed = record.installed.as_ref()?;
        let failed = record.failed.as_ref().map(|failed| failed.position);
        let proven = installed.live && installed.intact && installed.proven;
        // A host that has refused what it proved before contradicts itself.
        (proven && failed < Some(installed.position)).then_some(installed.position)
    }
}

/// A ClamAV version of which the first wave has too few members: one host that lies or fails there
/// decides for all hosts of that version.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ThinVersion {
    /// The version.
    pub version: String,
    /// Members of the first wave that have it.
    pub canaries: usize,
    /// Other hosts that have it.
    pub hosts: usize,
    /// One of those.
    pub one: AgentName,
}

/// The versions of which the group has less than three members, although other agents have them.
/// None, where nobody is in the group.
pub fn thin_versions<'a>(
    records: impl Iterator<Item = &'a Record>,
    canary: &GroupName,
) -> Vec<ThinVersion> {
    let mut versions: BTreeMap<&str, ThinVersion> = BTreeMap::new();
    let mut canaries: HashMap<&str, usize> = HashMap::new();
    for record in records {
        let Some(version) = record.version.as_deref() else {
            continue;
        };
        if record.groups.contains(canary) {
            *canaries.entry(version).or_default() += 1;
        } else {
            let thin = versions.entry(version).or_insert_with(|| ThinVersion {
                version: version.to_owned(),
                canaries: 0,
                hosts: 0,
                one: record.name.clone(),
            });
            thin.hosts += 1;
        }
    }
    if canaries.is_empty() {
        return Vec::new();
    }
    let with_canaries = versions.into_values().map(|thin| ThinVersion {
        canaries: canaries.get(thin.version.as_str()).copied().unwrap_or(0),
        ..thin
    });
    with_canaries
        .filter(|thin| thin.canaries < CANARIES_MIN)
        .collect()
}

fn target(manifest: &Verified<Manifest>) -> Target {
    Target {
        position: manifest.position(),
        manifest_sha256: manifest.payload_sha256(),
        content: manifest.content,
    }
}
