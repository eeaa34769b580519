//! The agents that the master knows, and what it knows of each.
//!
//! Pure: no sockets, no disk, no clock. `hub.rs` feeds events in and keeps what [`Fleet::record`]
//! returns on disk. Invariant: what is said of a host comes from its signed receipts, never from
//! what the master sent.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clamcast_proto::dsse::Verified;
use clamcast_proto::identity::Serial;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::names::DATABASE_NAME_BYTES_MAX;
use clamcast_proto::receipt::{
    ClamdReport, ClamdState, DRIFT_MAX, Drift, ERROR_BYTES_MAX, FOREIGN_MAX, FileState, Found,
    Outcome, Proof, Receipt,
};
use clamcast_proto::revocation::RevocationList;
use clamcast_proto::wire::{self, OfferId, Phase};
use clamcast_proto::{AgentName, Digest, Epoch, Generation, GroupName, Position};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::rollout::{
    Agents, Effect, Member, Order, OrderError, Rollout, Rules, Tally, Target, Wanted, Wave, Word,
    place,
};

/// Receipts remembered by digest, so that one that is sent again is not taken for a new one.
const RECEIPTS_REMEMBERED: usize = wire::RECEIPTS_PENDING_MAX;

/// Why a host that is not connected is not where it should be.
pub const AWAY: &str = "not connected; it catches up when it comes back";

/// What is said of an agent that has an offer and has given no sign of it.
pub const OFFERED: &str = "offered";

/// Longest silence that an agent may announce: a splay over a working day.
pub const SILENCE_MAX: SignedDuration = SignedDuration::from_hours(12);

/// An agent at work says so every 15 s. Whoever looks is told of a silence that is longer than this,
/// two signs that are missing, and shorter than what it takes to lose the connection of a dead one.
const SILENCE_TOLD: SignedDuration = SignedDuration::from_secs(30);

/// Names one connection for as long as the daemon runs.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct LinkId(pub u64);

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
    /// The content whose order the agents' places are of.
    placed: Option<Digest>,
    /// The latest time that was seen.
    latest: Timestamp,
}

/// The agents by their names.
#[derive(Debug, Default)]
struct Roster(BTreeMap<AgentName, Agent>);

/// One agent.
#[derive(Clone, Debug)]
struct Agent {
    record: Record,
    link: Option<Link>,
    /// The last offer that was answered on a connection which has ended.
    answered: Option<Answered>,
    took: Option<Took>,
    /// Its place in the order of the rollout of this content, so that it is not made at every look.
    place: Option<(Digest, Digest)>,
}

/// The generation that an agent was offered last.
#[derive(Clone, Copy, Debug)]
struct Took {
    position: Position,
    manifest_sha256: Digest,
    /// The last sign of progress with it, on this connection or before: a host that comes and goes
    /// has no new deadline each time.
    progress: Timestamp,
    /// When it was first offered.
    since: Timestamp,
}

/// What is kept of an agent across restarts of the master.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Record {
    /// Its name.
    pub name: AgentName,
    /// The groups of its last certificate and of the configuration.
    pub groups: Vec<GroupName>,
    /// When it first connected.
    pub enrolled: Timestamp,
    /// When it last came or went.
    pub seen: Timestamp,
    /// Serial number of the certificate that it last came with.
    pub serial: Serial,
    /// When that certificate ends.
    pub certificate_ends: Timestamp,
    /// What it last said is in its database directory.
    pub installed: Option<Installed>,
    /// The last generation that it could not take.
    pub failed: Option<Failed>,
    /// The clamd it last reported.
    pub clamd: ClamdReport,
    /// Databases of others beside ours.
    #[serde(default)]
    pub foreign: Vec<String>,
    /// Files that its last receipt says were found changed, and whether they are mended.
    #[serde(default)]
    pub drift: Vec<Drift>,
    /// Why they are not mended, in the agent's words.
    #[serde(default)]
    pub drift_error: Option<String>,
    /// Digests of its last receipts.
    #[serde(default)]
    receipts: VecDeque<Digest>,
}

/// A generation on an agent's disk.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Installed {
    /// Which one.
    pub position: Position,
    /// Its manifest.
    pub manifest_sha256: Digest,
    /// Whether clamd was seen scanning with it.
    pub live: bool,
    /// Whether every file has its hash.
    pub intact: bool,
    /// When the receipt says so.
    pub time: Timestamp,
}

/// A generation that came to nothing on an agent.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Failed {
    /// Which one.
    pub position: Position,
    /// Its manifest.
    pub manifest_sha256: Digest,
    /// Refused, or a fault of the host.
    pub outcome: Outcome,
    /// Why, in the agent's words.
    pub error: String,
    /// When the receipt says so.
    pub time: Timestamp,
}

/// An open connection.
#[derive(Clone, Debug)]
pub struct Link {
    /// Its name here.
    pub id: LinkId,
    /// Since when.
    pub since: Timestamp,
    /// The other end.
    pub address: SocketAddr,
    /// Serial number of its certificate.
    pub serial: Serial,
    /// When its certificate ends.
    pub certificate_ends: Timestamp,
    /// What it was offered and how far it is.
    pub offer: Option<Offered>,
    /// The last offer that was answered.
    pub answered: Option<Answered>,
    /// The last offer, if it was declined.
    pub declined: Option<Declined>,
    /// Whether it has said Hello: before that it is offered nothing.
    pub greeted: bool,
    /// The manifest that it has or was offered last on this connection.
    pub told: Option<Digest>,
}

impl Link {
    /// A connection on which nothing was said yet.
    pub fn new(
        id: LinkId,
        since: Timestamp,
        address: SocketAddr,
        serial: Serial,
        certificate_ends: Timestamp,
    ) -> Self {
        Self {
            id,
            since,
            address,
            serial,
            certificate_ends,
            offer: None,
            answered: None,
            declined: None,
            greeted: false,
            told: None,
        }
    }
}

/// An offer that is over.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Answered {
    /// Its name.
    pub offer: OfferId,
    /// What the receipt says that answers it; `None`: it was declined.
    pub outcome: Option<Outcome>,
}

/// An offer that was declined.
#[derive(Clone, Debug)]
pub struct Declined {
    /// Its manifest.
    pub manifest_sha256: Digest,
    /// Why, in the agent's words.
    pub message: String,
}

/// What a new connection means.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Arrival {
    /// The agent is new to the fleet.
    pub new: bool,
    /// What is kept of it has changed.
    pub changed: bool,
    /// The connection that this one replaces: after a crash of the host the old one may linger for
    /// a minute.
    pub replaced: Option<LinkId>,
}

/// An offer under way.
#[derive(Clone, Debug)]
pub struct Offered {
    /// Its name.
    pub id: OfferId,
    /// The generation.
    pub position: Position,
    /// Its manifest.
    pub manifest_sha256: Digest,
    /// What the agent last said that it is doing.
    pub phase: Phase,
    /// When it last gave a sign of progress.
    pub progress: Timestamp,
}

/// Where an agent stands against what is wanted of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Standing {
    /// Live at the wanted generation, every file with its hash.
    Conformant,
    /// Not there, and nothing says that it will not come.
    Behind,
    /// It said that it cannot, or gave no sign of progress for the deadline.
    Failed,
}

/// What `agents` shows of one.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its name.
    pub name: AgentName,
    /// Its groups.
    pub groups: Vec<GroupName>,
    /// Whether it is connected.
    pub connected: bool,
    /// Number of the generation in its database directory.
    pub generation: Option<u64>,
    /// Epoch of that generation.
    pub epoch: Option<u64>,
    /// Whether clamd was seen scanning with it.
    pub live: bool,
    /// The generation that it is wanted at now; that which it has where it is to keep it.
    pub wanted: Option<Position>,
    /// Whether a group of it is pinned.
    pub pinned: bool,
    /// Whether it is what the master wants, with every file intact.
    pub conformant: bool,
    /// What came of the last generation: an outcome, or what it is doing.
    pub outcome: String,
    /// Why it is not what is wanted, or what it refused before that was taken back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Since when: of the last receipt, else of the connection or the last one.
    pub since: Timestamp,
    /// Its clamd.
    pub clamd: ClamdReport,
    /// Databases of others beside ours.
    pub foreign: Vec<String>,
    /// Files that its last receipt says were found changed, and whether they are mended.
    pub drift: Vec<Drift>,
    /// Where it connects from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    /// When the certificate that it last came with ends.
    pub certificate_ends: Timestamp,
    /// Whether it may be about to be offered what it is wanted at: it has just connected, or the master
    /// was started a moment ago and it was there before.
    #[serde(skip)]
    pub coming: bool,
    /// The offer that is under way.
    #[serde(skip)]
    pub offered: Option<OfferId>,
    /// The last offer that was answered, also on a connection which has ended.
    #[serde(skip)]
    pub answered: Option<Answered>,
}

impl Row {
    /// The generation in its database directory.
    pub fn position(&self) -> Option<Position> {
        Some(Position {
            epoch: Epoch(self.epoch?),
            generation: Generation::new(self.generation?)?,
        })
    }
}

/// How many agents stand where.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
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
            let took = record.installed.as_ref().map(|installed| Took {
                position: installed.position,
                manifest_sha256: installed.manifest_sha256,
                progress: record.seen,
                since: record.seen,
            });
            let name = record.name.clone();
            let (link, answered) = (None, None);
            let agent = Agent {
                record,
                link,
                answered,
                took,
                place: None,
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
            placed: None,
            latest: Timestamp::MAX, // what is kept may be of any time
        }
    }

    /// Takes note that the master was started at `now`, and nobody is connected yet.
    pub fn resumed(&mut self, now: Timestamp) {
        self.rollout.resumed(now);
    }

    /// How careful rollouts are.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// What is on its way, and what everybody is wanted at.
    pub fn rollout(&self) -> &Rollout {
        &self.rollout
    }

    /// A generation was published, or its rollout goes on after a restart.
    pub fn published(
        &mut self,
        manifest: &Arc<Verified<Manifest>>,
        supersede: bool,
    ) -> Vec<Effect> {
        let target = self.know(manifest);
        self.rollout.published(target, supersede, &self.rules)
    }

    /// The rollback that was owed was published.
    pub fn went_back(&mut self, manifest: &Arc<Verified<Manifest>>) -> Vec<Effect> {
        let target = self.know(manifest);
        self.rollout.went_back(target)
    }

    /// What was wanted is not to be offered any more; the next publication is.
    pub fn withdrawn(&mut self) {
        self.unsaid.extend(self.rollout.retain(|_| false));
    }

    /// Remembers a manifest, and forgets those that nobody has or is wanted at.
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
        self.rollout.order(order, &self.agents, &self.rules, now)
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
        self.place_agents();
        let mut effects = std::mem::take(&mut self.unsaid);
        effects.extend(self.rollout.step(&self.agents, &self.rules, now));
        self.place_agents(); // it may be the next one's turn
        effects
    }

    /// Gives every agent its place in the running generation's rollout, once.
    fn place_agents(&mut self) {
        let content = self.rollout.running().map(|run| run.target.content);
        if self.placed != content {
            self.placed = content;
            for agent in self.agents.0.values_mut() {
                agent.place = content.map(|content| (content, agent.place_in(&content)));
            }
        }
    }

    /// Takes signs that are further in the future than any agent may promise for signs of now.
    fn clock_went_back(&mut self, now: Timestamp) {
        let latest = now.saturating_add(SILENCE_MAX).unwrap_or(Timestamp::MAX);
        for agent in self.agents.0.values_mut() {
            if let Some(took) = &mut agent.took {
                took.since = took.since.min(now);
                if took.progress > latest {
                    took.progress = now;
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

    /// Versions of clamd that hosts have and no host of the first wave has, where that is a group:
    /// whether they can load a generation is not known before it comes to them. With the number of
    /// hosts and one of them.
    pub fn untried_versions(&self) -> BTreeMap<&str, (usize, &AgentName)> {
        let Some(Wave::Group(canary)) = self.rules.waves.first() else {
            return BTreeMap::new(); // a part of the fleet, another one each time
        };
        let agents = self.agents.0.values().map(|agent| &agent.record);
        let (canaries, others): (Vec<_>, Vec<_>) =
            agents.partition(|record| record.groups.contains(canary));
        let tried: BTreeSet<_> = canaries
            .iter()
            .filter_map(|record| program_version(&record.clamd))
            .collect();
        let mut untried = BTreeMap::new();
        for record in others {
            let Some(version) = program_version(&record.clamd) else {
                continue;
            };
            if !tried.contains(version) && !canaries.is_empty() {
                untried.entry(version).or_insert((0, &record.name)).0 += 1;
            }
        }
        untried
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
            Wanted::Nothing | Wanted::Stay => None,
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

    /// The generation that an agent may rely on for now: that which it is wanted at, or that which
    /// it has and nobody holds against it.
    pub fn vouched(&self, name: &AgentName, now: Timestamp) -> Option<&Arc<Verified<Manifest>>> {
        let agent = self.agents.0.get(name)?;
        match self.wanted_of(agent, now) {
            Wanted::At(target) => self.manifests.get(&target.manifest_sha256),
            Wanted::Nothing => None,
            Wanted::Stay => self.installed(agent),
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
            Wanted::Stay => installed,
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
    pub fn connected(&mut self, name: &AgentName, groups: Vec<GroupName>, link: Link) -> Arrival {
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
                installed: None,
                failed: None,
                clamd: ClamdReport::default(),
                foreign: Vec::new(),
                drift: Vec::new(),
                drift_error: None,
                receipts: VecDeque::new(),
            },
            link: None,
            answered: None,
            took: None,
            place: None,
        });
        let content = self.placed;
        agent.place = content.map(|content| (content, agent.place_in(&content)));
        let record = &mut agent.record;
        let changed = new || record.groups != groups || record.serial != link.serial;
        record.groups = groups;
        record.seen = now;
        record.serial = link.serial.clone();
        record.certificate_ends = link.certificate_ends;
        let replaced = agent.link.replace(link).map(|old| {
            agent.answered = old.answered.or(agent.answered);
            old.id
        });
        Arrival {
            new,
            changed,
            replaced,
        }
    }

    /// A connection ended. One that was replaced says nothing about its agent any more.
    pub fn disconnected(&mut self, name: &AgentName, id: LinkId, now: Timestamp) {
        if let Some(agent) = self.agents.0.get_mut(name)
            && let Some(link) = agent.link.take_if(|link| link.id == id)
        {
            agent.answered = link.answered.or(agent.answered);
            agent.record.seen = now;
        }
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
        let manifest_sha256 = manifest.payload_sha256();
        let took = agent.took.map(|took| took.manifest_sha256);
        // What it has is offered to mend it, and says nothing of how far it came.
        let mends = agent.at() > Some(manifest.position());
        if took != Some(manifest_sha256) && !mends {
            agent.took = Some(Took {
                position: manifest.position(),
                manifest_sha256,
                progress: now,
                since: now,
            });
        }
        if let Some(link) = &mut agent.link {
            link.declined = None;
            link.told = Some(manifest_sha256);
            link.offer = Some(Offered {
                id: offer,
                position: manifest.position(),
                manifest_sha256,
                phase: Phase::Idle,
                progress: now,
            });
        }
    }

    /// An agent gave a sign of progress with its offer, and may have said until when it will be
    /// silent: at most [`SILENCE_MAX`] of that is believed.
    pub fn progress(
        &mut self,
        name: &AgentName,
        id: LinkId,
        phase: Phase,
        until: Option<Timestamp>,
        now: Timestamp,
    ) {
        let Some(agent) = self.linked(name, id) else {
            return;
        };
        if let Some(offer) = agent.link.as_mut().and_then(|link| link.offer.as_mut()) {
            let latest = now.saturating_add(SILENCE_MAX).unwrap_or(Timestamp::MAX);
            offer.phase = phase;
            offer.progress = until.map_or(now, |until| until.clamp(now, latest));
            if let Some(took) = &mut agent.took
                && took.manifest_sha256 == offer.manifest_sha256
            {
                took.progress = offer.progress;
            }
        }
    }

    /// What an agent's Hello says of its clamd. Returns whether it is news; nothing if this is not
    /// its connection any more.
    pub fn hello(
        &mut self,
        name: &AgentName,
        id: LinkId,
        clamd: ClamdReport,
        foreign: Vec<String>,
    ) -> Option<bool> {
        let agent = self.linked(name, id)?;
        if let Some(link) = &mut agent.link {
            link.greeted = true;
        }
        let (clamd, foreign) = (bounded(clamd), bounded_list(foreign));
        let news = agent.record.clamd != clamd || agent.record.foreign != foreign;
        agent.record.clamd = clamd;
        agent.record.foreign = foreign;
        Some(news)
    }

    /// An agent has what it is wanted at, and needs no offer of it.
    pub fn has_it(&mut self, name: &AgentName, id: LinkId, manifest_sha256: Digest) {
        if let Some(link) = self.link(name, id) {
            link.told = Some(manifest_sha256);
        }
    }

    /// Takes a receipt whose signature was checked. `false`: it is known already.
    pub fn receipt(&mut self, receipt: &Verified<Receipt>, now: Timestamp) -> bool {
        let manifest = self.manifests.get(&receipt.manifest_sha256);
        let Some(agent) = self.agents.0.get_mut(&receipt.agent) else {
            return false;
        };
        let digest = receipt.payload_sha256();
        let record = &mut agent.record;
        if record.receipts.contains(&digest) {
            return false;
        }
        if agent.link.is_some() {
            record.seen = now; // kept with the receipt: a start finds who was there
        }
        record.receipts.push_back(digest);
        if record.receipts.len() > RECEIPTS_REMEMBERED {
            record.receipts.pop_front();
        }
        record.clamd = bounded(receipt.clamd.clone());
        record.foreign = bounded_list(receipt.foreign.clone());
        record.drift = receipt.drift.iter().take(DRIFT_MAX).cloned().collect();
        let drifted = record.drift.iter().any(|file| !file.mended);
        let error = receipt.error.clone().filter(|_| drifted);
        record.drift_error = error.map(clipped);
        let (position, manifest_sha256) = (receipt.position(), receipt.manifest_sha256);
        match receipt.outcome {
            Outcome::Live | Outcome::Installed => {
                record.installed = Some(Installed {
                    position,
                    manifest_sha256,
                    live: receipt.outcome == Outcome::Live,
                    intact: !drifted
                        && manifest.is_none_or(|manifest| is_intact(manifest, &receipt.files)),
                    time: receipt.time,
                });
                // What it went back to and says it has says nothing for what it refused.
                record.failed.take_if(|failed| failed.position <= position);
            }
            Outcome::Refused | Outcome::HostFault => {
                if let Some(installed) = &mut record.installed
                    && installed.manifest_sha256 == manifest_sha256
                    && let Some(manifest) = manifest
                {
                    // It is about the generation that was there: what it found counts.
                    installed.intact = is_intact(manifest, &receipt.files);
                    installed.live &= installed.intact;
                } else if let Some(installed) = &mut record.installed
                    && receipt.outcome == Outcome::Refused
                {
                    installed.live = receipt.clamd.proof != Proof::None
                        || receipt.clamd.state == ClamdState::None;
                }
                // Nor does trouble with what it went back to.
                let newer = record.failed.as_ref().map(|failed| failed.position);
                if newer <= Some(position) {
                    record.failed = Some(Failed {
                        position,
                        manifest_sha256,
                        outcome: receipt.outcome,
                        error: clipped(receipt.error.clone().unwrap_or_default()),
                        time: receipt.time,
                    });
                }
            }
        }
        if let Some(took) = &mut agent.took
            && took.manifest_sha256 == manifest_sha256
        {
            took.progress = now;
        }
        // News of drift says nothing about the offer that may be under way to mend it, a fault does.
        let is_answer = !drifted || !matches!(receipt.outcome, Outcome::Live | Outcome::Installed);
        if is_answer
            && let Some(link) = &mut agent.link
            && let Some(offer) = link.offer.take_if(|offer| offer.position == position)
        {
            link.answered = Some(Answered {
                offer: offer.id,
                outcome: Some(receipt.outcome),
            });
        }
        true
    }

    /// Whether an agent has an offer that it has not answered.
    pub fn has_offer(&self, name: &AgentName) -> bool {
        let link = self
            .agents
            .0
            .get(name)
            .and_then(|agent| agent.link.as_ref());
        link.is_some_and(|link| link.offer.is_some())
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
        agent.standing(self.wanted_of(agent, now), now, deadline)
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
    pub fn declined(&mut self, name: &AgentName, id: LinkId, message: String) -> Option<Position> {
        let link = self.link(name, id)?;
        let offer = link.offer.take()?;
        link.answered = Some(Answered {
            offer: offer.id,
            outcome: None,
        });
        link.declined = Some(Declined {
            manifest_sha256: offer.manifest_sha256,
            message,
        });
        Some(offer.position)
    }

    /// The table of agents.
    pub fn rows(&self, now: Timestamp, deadline: Duration) -> Vec<Row> {
        let row = |(name, agent): (&AgentName, &Agent)| {
            let record = &agent.record;
            let installed = record.installed.as_ref();
            let offer = agent.link.as_ref().and_then(|link| link.offer.as_ref());
            let wanted = self.wanted_of(agent, now);
            let standing = agent.standing(wanted, now, deadline);
            let times = [
                installed.map(|i| i.time),
                record.failed.as_ref().map(|f| f.time),
            ];
            Row {
                name: name.clone(),
                groups: record.groups.clone(),
                connected: agent.link.is_some(),
                generation: installed.map(|installed| installed.position.generation.number()),
                epoch: installed.map(|installed| installed.position.epoch.0),
                live: installed.is_some_and(|installed| installed.live),
                wanted: match wanted {
                    Wanted::Nothing => None,
                    Wanted::Stay => installed.map(|installed| installed.position),
                    Wanted::At(target) => Some(target.position),
                },
                pinned: self.rollout.pin(&record.groups).is_some(),
                conformant: standing == Standing::Conformant && installed.is_some(),
                outcome: agent.outcome(),
                error: agent.error(standing, now),
                since: times.into_iter().flatten().max().unwrap_or(record.seen),
                clamd: record.clamd.clone(),
                foreign: record.foreign.clone(),
                drift: record.drift.clone(),
                address: agent.link.as_ref().map(|link| link.address),
                certificate_ends: record.certificate_ends,
                coming: match &agent.link {
                    Some(link) => offer.is_none() && link.answered.is_none(),
                    None => self.rollout.is_coming_back(record.seen, now),
                },
                offered: offer.map(|offer| offer.id),
                answered: agent
                    .link
                    .as_ref()
                    .and_then(|link| link.answered)
                    .or(agent.answered),
            }
        };
        self.agents.0.iter().map(row).collect()
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
}

fn target(manifest: &Verified<Manifest>) -> Target {
    Target {
        position: manifest.position(),
        manifest_sha256: manifest.payload_sha256(),
        content: manifest.content,
    }
}

impl Agent {
    /// What it says of `target`, by its receipts.
    fn member(&self, target: Option<&Target>) -> Member<'_> {
        let record = &self.record;
        let digest = target.map(|target| target.manifest_sha256);
        let took = self
            .took
            .filter(|took| Some(took.manifest_sha256) == digest);
        Member {
            name: &record.name,
            groups: &record.groups,
            connected: self.link.is_some(),
            seen: record.seen,
            at: self.at(),
            word: digest.and_then(|digest| self.word(&digest)),
            progress: took.map(|took| took.progress),
            offered: took.map(|took| took.since),
            place: target.map(|target| self.place_in(&target.content)),
        }
    }

    fn place_in(&self, content: &Digest) -> Digest {
        match &self.place {
            Some((of, place)) if of == content => *place,
            Some(_) | None => place(content, &self.record.name),
        }
    }

    /// The highest generation that it took, whether it came to have that generation or not: it
    /// declines what is below, but for what it has.
    fn at(&self) -> Option<Position> {
        let record = &self.record;
        let installed = record.installed.as_ref().map(|it| it.position);
        let failed = record.failed.as_ref().map(|it| it.position);
        let took = self.took.map(|took| took.position);
        installed.max(failed).max(took)
    }

    /// Whether its last receipts say that it has this manifest.
    fn has(&self, manifest_sha256: &Digest) -> bool {
        let installed = self.record.installed.as_ref();
        installed.is_some_and(|installed| installed.manifest_sha256 == *manifest_sha256)
    }

    /// Whether it has an offer of what it has.
    fn is_mending(&self) -> bool {
        let offer = self.link.as_ref().and_then(|link| link.offer.as_ref());
        offer.is_some_and(|offer| self.has(&offer.manifest_sha256))
    }

    /// Whether it could not take a generation, or its clamd could not use it.
    fn failed_with(&self, target: &Target) -> bool {
        let failed = self.record.failed.as_ref();
        failed.is_some_and(|failed| failed.manifest_sha256 == target.manifest_sha256)
    }

    fn word(&self, target: &Digest) -> Option<Word> {
        let failed = self.record.failed.as_ref();
        if let Some(failed) = failed.filter(|failed| failed.manifest_sha256 == *target) {
            return Some(match failed.outcome {
                Outcome::Refused => Word::Refused,
                Outcome::HostFault | Outcome::Live | Outcome::Installed => Word::Unwell,
            });
        }
        let declined = self.link.as_ref().and_then(|link| link.declined.as_ref());
        if declined.is_some_and(|declined| declined.manifest_sha256 == *target) {
            return Some(Word::Unwell);
        }
        let installed = self.record.installed.as_ref();
        let installed = installed.filter(|installed| installed.manifest_sha256 == *target)?;
        Some(match (installed.live, installed.intact) {
            (true, true) => Word::Live,
            (true, false) => Word::Unwell,
            (false, _) => Word::Installed,
        })
    }

    fn standing(&self, wanted: Wanted, now: Timestamp, deadline: Duration) -> Standing {
        let installed = self.record.installed.as_ref();
        let wanted = match wanted {
            Wanted::Nothing => return Standing::Behind, // of what is published next
            Wanted::Stay => installed.map(|installed| installed.manifest_sha256),
            Wanted::At(target) => Some(target.manifest_sha256),
        };
        let offer = self.link.as_ref().and_then(|link| link.offer.as_ref());
        let failed = self.record.failed.as_ref().map(|it| it.manifest_sha256);
        let failed = failed.is_some() && failed == wanted;
        let declined = self.link.as_ref().and_then(|link| link.declined.as_ref());
        let declined = declined.is_some_and(|it| Some(it.manifest_sha256) == wanted);
        // A success clears the failure before it, so one of the same that is there is the newer receipt.
        if !failed
            && !declined
            && let Some(installed) = installed
            && Some(installed.manifest_sha256) == wanted
            && installed.live
            && installed.intact
        {
            return Standing::Conformant;
        }
        if failed && offer.is_none() {
            return Standing::Failed;
        }
        match offer {
            Some(offer) if is_silent(offer, now, deadline) => Standing::Failed,
            None if declined => Standing::Failed,
            Some(_) | None => Standing::Behind,
        }
    }

    /// What it is doing, or what came of the last thing it did.
    fn outcome(&self) -> String {
        let link = self.link.as_ref();
        if let Some(offer) = link.and_then(|link| link.offer.as_ref()) {
            let begun = offer.phase != Phase::Idle;
            return if begun {
                offer.phase.to_string()
            } else {
                OFFERED.to_owned()
            };
        }
        if link.is_some_and(|link| link.declined.is_some()) {
            return "declined".to_owned();
        }
        match (&self.record.failed, &self.record.installed) {
            (Some(failed), _) => failed.outcome.to_string(),
            (None, Some(installed)) if installed.live => Outcome::Live.to_string(),
            (None, Some(_)) => Outcome::Installed.to_string(),
            (None, None) => "none".to_owned(),
        }
    }

    /// Which files are not the published ones, and why that stays so.
    fn drifted(&self) -> String {
        let drift = self.record.drift.iter().filter(|file| !file.mended);
        let words: Vec<_> = drift
            .map(|file| match file.found {
                Found::Missing => format!("{} is missing", file.name),
                Found::Changed => format!("{} was changed", file.name),
                Found::Unreadable => format!("{} cannot be read", file.name),
            })
            .collect();
        let mut text = match words.len() {
            0 => "a file on its disk is not the published one".to_owned(),
            shown => words[..shown.min(DRIFT_SHOWN)].join(", "),
        };
        if words.len() > DRIFT_SHOWN {
            text += &format!(" and {} more", words.len() - DRIFT_SHOWN);
        }
        match &self.record.drift_error {
            Some(error) => format!("{text}: {error}"),
            None => text,
        }
    }

    /// Why it is not conformant, as far as it or its silence says.
    fn error(&self, standing: Standing, now: Timestamp) -> Option<String> {
        if standing == Standing::Conformant && self.record.failed.is_none() {
            return None;
        }
        let link = self.link.as_ref();
        if let Some(offer) = link.and_then(|link| link.offer.as_ref()) {
            let silent = now.duration_since(offer.progress);
            let told = standing == Standing::Failed || silent >= SILENCE_TOLD;
            let silent = match silent.as_secs() {
                seconds @ ..120 => format!("{seconds}s"),
                seconds => format!("{}m", seconds / 60),
            };
            return told
                .then(|| format!("no sign of progress with {} for {silent}", offer.position));
        }
        if let Some(declined) = link.and_then(|link| link.declined.as_ref()) {
            return Some(declined.message.clone());
        }
        if let Some(failed) = &self.record.failed {
            return Some(format!("{}: {}", failed.position, failed.error));
        }
        if link.is_none() {
            return Some(AWAY.to_owned());
        }
        let installed = self.record.installed.as_ref()?;
        let clamd = &self.record.clamd;
        match (installed.live, installed.intact, clamd.state) {
            (_, false, _) => Some(self.drifted()),
            (true, true, _) => None, // behind, and on its way
            (false, true, ClamdState::Down) => Some("nobody answers at clamd's socket".to_owned()),
            (false, true, ClamdState::Up | ClamdState::Silent | ClamdState::None) => {
                let note = clamd.note.clone();
                Some(note.unwrap_or_else(|| "clamd has not shown that it scans with it".to_owned()))
            }
        }
    }
}

/// The program's own version in clamd's answer to VERSION: `ClamAV 1.4.3` of
/// `ClamAV 1.4.3/27890/Sat ...`.
fn program_version(clamd: &ClamdReport) -> Option<&str> {
    let version = clamd.version.as_deref()?;
    version.split('/').next()
}

/// Names of drifted files that a table has room for.
const DRIFT_SHOWN: usize = 3;

fn is_silent(offer: &Offered, now: Timestamp, deadline: Duration) -> bool {
    now.duration_since(offer.progress).unsigned_abs() > deadline && now > offer.progress
}

/// A text of an agent, cut to what a table or a log has use for.
fn clipped(text: String) -> String {
    if text.len() <= ERROR_BYTES_MAX {
        return text;
    }
    let end = text.floor_char_boundary(ERROR_BYTES_MAX);
    text[..end].to_owned()
}

fn bounded(clamd: ClamdReport) -> ClamdReport {
    ClamdReport {
        version: clamd.version.map(clipped),
        note: clamd.note.map(clipped),
        ..clamd
    }
}

fn bounded_list(names: Vec<String>) -> Vec<String> {
    let first = names.into_iter().take(FOREIGN_MAX);
    first
        .filter(|name| name.len() <= DATABASE_NAME_BYTES_MAX)
        .collect()
}

/// Whether what an agent found on its disk is the manifest's set.
fn is_intact(manifest: &Manifest, files: &[FileState]) -> bool {
    manifest.files.iter().all(|wanted| {
        files
            .iter()
            .any(|file| file.name == wanted.name && file.sha256 == wanted.sha256)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clamcast_proto::dsse::sign;
    use clamcast_proto::manifest::{ManifestFile, Publisher, content_digest};
    use clamcast_proto::{Epoch, Generation};
    use ed25519_dalek::SigningKey;

    const DEADLINE: Duration = Duration::from_secs(900);

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn manifest(generation: u64) -> Arc<Verified<Manifest>> {
        let name = "daily.cld".parse().unwrap();
        let sha256 = Digest::of(&generation.to_be_bytes());
        let manifest = Manifest {
            fleet: "bank".parse().unwrap(),
            epoch: Epoch(1),
            generation: Generation::new(generation).unwrap(),
            publisher: Publisher("p".into()),
            created: at(0),
            previous: None,
            rollback_of: None,
            content: content_digest([(&name, 1, &sha256)]),
            files: vec![ManifestFile {
                name,
                size: 1,
                sha256,
                container: None,
            }],
        };
        Arc::new(sign(manifest, &SigningKey::from_bytes(&[1; 32])))
    }

    fn receipt(generation: u64, seq: u64, outcome: Outcome) -> Verified<Receipt> {
        let manifest = manifest(generation);
        let files = manifest.files.iter().map(|file| FileState {
            name: file.name.clone(),
            size: file.size,
            sha256: file.sha256,
        });
        let receipt = Receipt {
            fleet: manifest.fleet.clone(),
            agent: "web1".parse().unwrap(),
            seq,
            epoch: manifest.epoch,
            generation: manifest.generation,
            manifest_sha256: manifest.payload_sha256(),
            install: seq,
            outcome,
            files: files.collect(),
            foreign: vec![],
            drift: vec![],
            clamd: ClamdReport {
                proof: Proof::Canary,
                ..ClamdReport::default()
            },
            error: (outcome == Outcome::Refused).then(|| "Malformed database".to_owned()),
            took: 1.0,
            time: at(100 + i64::try_from(seq).unwrap()),
        };
        sign(receipt, &SigningKey::from_bytes(&[2; 32]))
    }

    fn link(id: u64) -> Link {
        let (address, serial) = ("127.0.0.1:1".parse().unwrap(), Serial("01".into()));
        Link::new(LinkId(id), at(0), address, serial, at(1 << 30))
    }

    /// One agent, `web1`, connected, with these receipts, generation `wanted` wanted.
    fn fleet(wanted: u64, receipts: &[(u64, Outcome)]) -> Fleet {
        let rules = Rules {
            waves: vec![],
            settle: Duration::ZERO,
            refused_max: "2%".parse().unwrap(),
            unwell_max: "20%".parse().unwrap(),
            rollback_on_halt: true,
            deadline: DEADLINE,
            windows: BTreeMap::new(),
        };
        let mut fleet = Fleet::new(vec![], Rollout::default(), rules, vec![]);
        fleet.connected(&"web1".parse().unwrap(), vec![], link(1));
        fleet.published(&manifest(wanted), false);
        fleet.step(at(0)); // without waves everybody is wanted at it
        for (seq, (generation, outcome)) in (1..).zip(receipts) {
            assert!(fleet.receipt(&receipt(*generation, seq, *outcome), at(0)));
        }
        fleet
    }

    fn check(wanted: u64, receipts: &[(u64, Outcome)], standing: Standing, row: &str) {
        let fleet = fleet(wanted, receipts);
        assert_eq!(
            fleet.standing(&"web1".parse().unwrap(), at(200), DEADLINE),
            standing
        );
        let found = &fleet.rows(at(200), DEADLINE)[0];
        let live = if found.live { "live" } else { "not live" };
        let text = format!(
            "{:?} {live}: {}",
            found.generation.unwrap_or(0),
            found.outcome
        );
        assert_eq!(text, row);
    }

    #[test]
    fn a_version_of_clamd_that_no_canary_has_is_told() {
        let mut fleet = fleet(1, &[]);
        fleet.rules.waves = vec!["group:canary".parse().unwrap()];
        let mut check = |hosts: &[(&str, &str, &str)], expected: &[(&str, usize)]| {
            for (id, (name, group, version)) in (2..).zip(hosts) {
                let name = name.parse().unwrap();
                fleet.connected(&name, vec![group.parse().unwrap()], link(id));
                let clamd = ClamdReport {
                    version: Some((*version).to_owned()),
                    ..ClamdReport::default()
                };
                fleet.hello(&name, LinkId(id), clamd, vec![]);
            }
            let untried = fleet.untried_versions().into_iter();
            let untried: Vec<_> = untried.map(|(of, (count, _))| (of, count)).collect();
            assert_eq!(untried, expected);
        };
        check(&[("db1", "db", "ClamAV 1.0.7/1/Sat")], &[]); // without canaries, which is told elsewhere
        check(
            &[("web2", "canary", "ClamAV 1.4.3/2/Sun")],
            &[("ClamAV 1.0.7", 1)],
        );
        check(
            &[
                ("db2", "db", "ClamAV 1.0.7"),
                ("db3", "db", "ClamAV 1.4.3/1"),
            ],
            &[("ClamAV 1.0.7", 2)],
        );
        check(&[("web3", "canary", "ClamAV 1.0.7/1/Sat")], &[]);
    }

    #[test]
    fn a_host_stands_where_its_receipts_say() {
        use Outcome::{HostFault, Installed, Live, Refused};
        check(7, &[], Standing::Behind, "0 not live: none");
        check(7, &[(7, Live)], Standing::Conformant, "7 live: live");
        check(8, &[(7, Live)], Standing::Behind, "7 live: live");
        check(
            7,
            &[(7, Installed)],
            Standing::Behind,
            "7 not live: installed",
        );
        check(
            8,
            &[(7, Live), (8, Refused)],
            Standing::Failed,
            "7 live: refused",
        );
        check(
            8,
            &[(7, Live), (8, HostFault)],
            Standing::Failed,
            "7 live: host_fault",
        );
        check(
            9,
            &[(7, Live), (8, Refused)],
            Standing::Behind,
            "7 live: refused",
        );
        // What it went back to is seen in clamd once more.
        check(
            8,
            &[(7, Live), (8, Refused), (7, Live)],
            Standing::Failed,
            "7 live: refused",
        );
        check(
            8,
            &[(7, Live), (8, Refused), (7, HostFault)],
            Standing::Failed,
            "7 live: refused",
        );
        check(
            7,
            &[(7, Live), (7, HostFault)],
            Standing::Failed,
            "7 live: host_fault",
        );
        check(
            8,
            &[(7, Live), (8, HostFault), (8, Live)],
            Standing::Conformant,
            "8 live: live",
        );
    }

    #[test]
    fn whoever_declines_what_it_is_wanted_at_is_not_conformant() {
        let mut fleet = fleet(7, &[(7, Outcome::Live)]);
        let (name, link) = ("web1".parse().unwrap(), LinkId(1));
        fleet.offered(&name, link, OfferId(9), &manifest(7), at(0));
        fleet.declined(&name, link, "older than 1.8".to_owned());
        let standing = fleet.standing(&name, at(0), DEADLINE);
        assert_eq!(standing, Standing::Failed);
    }

    #[test]
    fn a_receipt_that_is_sent_again_is_known() {
        let mut fleet = fleet(7, &[(7, Outcome::Live)]);
        assert!(!fleet.receipt(&receipt(7, 1, Outcome::Live), at(0)));
    }

    #[test]
    fn a_changed_file_is_not_conformant() {
        let mut fleet = fleet(7, &[]);
        let mut changed = (*receipt(7, 1, Outcome::Live)).clone();
        changed.files[0].sha256 = Digest::of(b"drift");
        fleet.receipt(&sign(changed, &SigningKey::from_bytes(&[2; 32])), at(0));
        assert_eq!(
            fleet.standing(&"web1".parse().unwrap(), at(200), DEADLINE),
            Standing::Behind
        );
    }

    #[test]
    fn a_drifted_file_is_named_and_its_news_answer_no_offer() {
        let name: AgentName = "web1".parse().unwrap();
        let mut fleet = fleet(7, &[(7, Outcome::Live)]);
        fleet.offered(&name, LinkId(1), OfferId(9), &manifest(7), at(150));
        let mut drifted = |seq, mended, error: Option<&str>| {
            let mut receipt = (*receipt(7, seq, Outcome::Live)).clone();
            receipt.drift = vec![Drift {
                name: "daily.cld".parse().unwrap(),
                found: Found::Missing,
                mended,
            }];
            receipt.error = error.map(str::to_owned);
            fleet.receipt(&sign(receipt, &SigningKey::from_bytes(&[2; 32])), at(150));
            fleet.rows(at(200), DEADLINE).remove(0)
        };
        let row = drifted(2, false, Some("freshclam (pid 812)"));
        assert!(row.live && !row.conformant);
        assert_eq!((row.offered, row.answered), (Some(OfferId(9)), None));
        let row = drifted(3, true, None);
        assert!(row.conformant && row.error.is_none());
        assert_eq!(row.answered.map(|it| it.offer), Some(OfferId(9)));
        let row = drifted(4, false, Some("freshclam (pid 812)"));
        assert_eq!(
            row.error.unwrap(),
            "daily.cld is missing: freshclam (pid 812)"
        );
    }

    /// `web1`, complete at 7, was offered 8, and this came of it. No halt takes anybody back.
    fn after(outcome: Outcome) -> Fleet {
        let name = "web1".parse().unwrap();
        let mut fleet = fleet(7, &[(7, Outcome::Live)]);
        fleet.rules.waves = vec!["100%".parse().unwrap()];
        fleet.rules.rollback_on_halt = false;
        fleet.published(&manifest(8), false);
        fleet.step(at(150));
        fleet.offered(&name, LinkId(1), OfferId(1), &manifest(8), at(150));
        assert!(fleet.receipt(&receipt(8, 2, outcome), at(160)));
        fleet
    }

    fn abort(fleet: &mut Fleet) {
        let order = Order::Abort("ticket 7".to_owned());
        fleet.order(order, at(170)).unwrap();
    }

    /// Which generation `web1` is to be offered, is vouched for, and is offered when it lacks files.
    #[track_caller]
    fn check_offers(fleet: &Fleet, kept: &[u64], expected: [Option<u64>; 3]) {
        let (name, now) = ("web1".parse().unwrap(), at(200));
        let is_kept = |position: Position| kept.contains(&position.generation.number());
        let found = [
            fleet.wanted(&name, now),
            fleet.vouched(&name, now),
            fleet.mending(&name, is_kept, now),
        ];
        let found = found.map(|it| it.map(|manifest| manifest.generation.number()));
        assert_eq!(found, expected);
    }

    #[test]
    fn who_lacks_files_is_offered_what_it_is_wanted_at_or_where_it_failed_with_that_what_it_has() {
        for failed in [Outcome::Refused, Outcome::HostFault] {
            check_offers(&after(failed), &[7, 8], [Some(8), Some(8), Some(7)]);
            check_offers(&after(failed), &[8], [Some(8), Some(8), Some(8)]);
            let mut halted = after(failed);
            abort(&mut halted);
            check_offers(&halted, &[7, 8], [None, Some(7), Some(7)]);
            check_offers(&halted, &[8], [None, Some(7), None]);
        }
        check_offers(&after(Outcome::Live), &[7, 8], [Some(8), Some(8), Some(8)]);
    }

    #[test]
    fn what_was_taken_back_is_neither_vouched_for_nor_mended() {
        let mut fleet = after(Outcome::Live);
        abort(&mut fleet);
        check_offers(&fleet, &[7, 8], [None, None, None]);
    }

    #[test]
    fn a_mended_host_says_nothing_new_of_what_it_failed_with_and_is_then_offered_that_again() {
        for (failed, word) in [
            (Outcome::Refused, Word::Refused),
            (Outcome::HostFault, Word::Unwell),
        ] {
            for mended in [Outcome::Live, Outcome::HostFault] {
                let name: AgentName = "web1".parse().unwrap();
                let mut fleet = after(failed);
                let said = |fleet: &Fleet| {
                    let Member { at, word, .. } = fleet.members()[0];
                    let progress = fleet.members()[0].progress;
                    (at, word, progress)
                };
                let before = said(&fleet);
                assert_eq!(before.1, Some(word));
                fleet.offered(&name, LinkId(1), OfferId(2), &manifest(7), at(190));
                assert_eq!(said(&fleet), before);
                check_offers(&fleet, &[7, 8], [None, Some(8), Some(7)]);
                fleet.progress(&name, LinkId(1), Phase::Fetching, None, at(191));
                assert!(fleet.receipt(&receipt(7, 3, mended), at(192)));
                assert_eq!(said(&fleet), before);
                check_offers(&fleet, &[7, 8], [Some(8), Some(8), Some(7)]);
            }
        }
    }

    #[test]
    fn what_a_host_has_is_forced_on_it_whatever_it_took_before() {
        let name = "web1".parse().unwrap();
        let mut fleet = after(Outcome::Refused);
        abort(&mut fleet);
        let eight = manifest(8).position();
        let past = |generation| fleet.past(&name, &manifest(generation));
        assert_eq!([6, 7, 8, 9].map(past), [Some(eight), None, None, None]);
        // Then it is where the master wants it, and so says the answer, whatever it refused before.
        let (link, mended) = (LinkId(1), receipt(7, 3, Outcome::Live));
        fleet.offered(&name, link, OfferId(2), &manifest(7), at(190));
        fleet.receipt(&mended, at(192));
        let row = fleet.rows(at(200), DEADLINE).remove(0);
        let answered = Answered {
            offer: OfferId(2),
            outcome: Some(Outcome::Live),
        };
        assert_eq!((row.conformant, row.answered), (true, Some(answered)));
        assert_eq!(row.outcome, "refused");
    }

    #[test]
    fn silence_past_the_deadline_counts_as_failure() {
        let name = "web1".parse().unwrap();
        let mut fleet = fleet(8, &[(7, Outcome::Live)]);
        fleet.offered(&name, LinkId(1), OfferId(1), &manifest(8), at(1000));
        assert_eq!(fleet.standing(&name, at(1900), DEADLINE), Standing::Behind);
        assert_eq!(fleet.standing(&name, at(1901), DEADLINE), Standing::Failed);
        fleet.progress(&name, LinkId(1), Phase::Fetching, None, at(1901));
        assert_eq!(fleet.standing(&name, at(1902), DEADLINE), Standing::Behind);
        let error = |fleet: &Fleet, now| fleet.rows(at(now), DEADLINE).remove(0).error;
        assert_eq!(error(&fleet, 1930), None);
        assert!(error(&fleet, 1931).unwrap().ends_with("for 30s"));
        assert_eq!(
            error(&fleet, 1901 + 4 * 60).unwrap(),
            "no sign of progress with 1.8 for 4m"
        );
        fleet.progress(&name, LinkId(1), Phase::Staged, Some(at(9000)), at(1902));
        assert_eq!(error(&fleet, 8000), None);
        let announced = fleet.standing(&name, at(9000), DEADLINE);
        assert_eq!(
            announced,
            Standing::Behind,
            "it said that it would be silent"
        );
        // Of a silence without end half a day is believed, and none that lies in the past.
        fleet.progress(
            &name,
            LinkId(1),
            Phase::Staged,
            Some(Timestamp::MAX),
            at(2000),
        );
        let end = 2000 + SILENCE_MAX.as_secs() + 900;
        assert_eq!(fleet.standing(&name, at(end), DEADLINE), Standing::Behind);
        assert_eq!(
            fleet.standing(&name, at(end + 1), DEADLINE),
            Standing::Failed
        );
        fleet.progress(
            &name,
            LinkId(1),
            Phase::Staged,
            Some(Timestamp::MIN),
            at(end),
        );
        assert_eq!(fleet.standing(&name, at(end), DEADLINE), Standing::Behind);
    }

    #[test]
    fn a_new_connection_replaces_the_old_one_whose_end_then_means_nothing() {
        let name = "web1".parse().unwrap();
        let mut fleet = fleet(7, &[]);
        let arrival = Arrival {
            new: false,
            changed: false,
            replaced: Some(LinkId(1)),
        };
        assert_eq!(fleet.connected(&name, vec![], link(2)), arrival);
        fleet.disconnected(&name, LinkId(1), at(5));
        assert_eq!(fleet.counts(at(5), DEADLINE).connected, 1);
        fleet.disconnected(&name, LinkId(2), at(6));
        assert_eq!(fleet.counts(at(6), DEADLINE).connected, 0);
    }
}
