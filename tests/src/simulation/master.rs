//! The master: the real dispatcher with its fleet and rollout. What the hub, the recorder and the
//! publisher do around it is done here in the same order, on a disk that is made up.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clamcast_master::config::Rules;
use clamcast_master::fleet::agents::{Fleet, LinkId};
use clamcast_master::fleet::dispatch::{
    Action, Bounds, Closing, Decline, Dispatcher, Forcing, Message, Newcomer, Now, Order, Progress,
};
use clamcast_master::fleet::recovery;
use clamcast_master::fleet::rollout::{self, OrderError, Owed, Rollout, Target};
use clamcast_master::publish::news::News;
use clamcast_master::publish::withdrawn::Withdrawn;
use clamcast_master::record::entry::{Entry, FileName};
use clamcast_proto::audit::Operator;
use clamcast_proto::dsse::{PublicKey, Verified, sign};
use clamcast_proto::fresh::Freshness;
use clamcast_proto::identity::Serial;
use clamcast_proto::manifest::{Manifest, Publisher, content_digest};
use clamcast_proto::receipt::{Outcome, Receipt};
use clamcast_proto::revocation::RevocationList;
use clamcast_proto::{AgentName, AuditEvent, Digest, Epoch, Generation, GroupName, Position};
use ed25519_dalek::SigningKey;
use jiff::Timestamp;
use rand::Rng as _;
use rand::rngs::StdRng;
use serde::de::DeserializeOwned;

use super::Size;
use super::contents::files;
use super::network::{LinkNumber, Said, Told};
use super::rules::Witness;

/// Entries that are written together.
const BATCH_MAX: usize = 256;

/// The master, with its disk and without its process where that has crashed.
pub(super) struct Master {
    key: SigningKey,
    pub(super) rules: Rules,
    looks: (Duration, Duration),
    backlog: u64,
    pub(super) disk: MasterDisk,
    pub(super) running: Option<Running>,
    /// How often it was started.
    pub(super) life: u32,
    /// When the last word of the publisher reaches the hub.
    told: Option<Instant>,
}

/// What outlives the process.
#[derive(Default)]
pub(super) struct MasterDisk {
    /// What the recorder wrote.
    files: BTreeMap<FileName, Vec<u8>>,
    pub(super) published: Vec<Arc<Verified<Manifest>>>,
    /// For each of them a statement that it is current.
    fresh: HashMap<Digest, Arc<Verified<Freshness>>>,
    revoked: Option<RevocationList>,
    /// The state of the databases in the mirror.
    pub(super) mirror: u64,
}

/// The process.
pub(super) struct Running {
    pub(super) dispatcher: Dispatcher,
    /// The connections by the names that the world and the dispatcher have for them.
    links: BTreeMap<LinkNumber, (LinkId, AgentName)>,
    numbers: BTreeMap<LinkId, LinkNumber>,
    /// The rollout as the witness saw it last, and what was withdrawn.
    seen: Rollout,
    withdrawn: BTreeSet<Position>,
    /// The receipt that the dispatcher is told of.
    receipt: Option<(AgentName, u64)>,
    queue: VecDeque<Waiting>,
    writing: bool,
    /// The look that is on the agenda.
    look_at: Option<Instant>,
}

/// An entry that waits for the disk.
struct Waiting {
    entry: Entry,
    /// The receipt that the audit log has then.
    receipt: Option<(AgentName, u64)>,
    /// The rollout that the disk has then.
    rollout: Option<Rollout>,
}

/// What happens in the master by itself.
#[derive(Debug)]
pub(super) enum MasterEvent {
    /// The rollout is to be looked at.
    Look,
    /// Nothing happened for a while.
    Idle,
    /// What waits for the disk is written.
    Written,
    /// The mirror is looked at.
    Publish { accept: bool, supersede: bool },
    /// The rollback that is owed is published.
    RollBack(Owed),
    /// The hub hears of a publication, and whether it takes the place of what is on its way.
    Published(Arc<Verified<Manifest>>, bool),
    /// The hub hears of a rollback.
    WentBack(Arc<Verified<Manifest>>),
}

/// What it does to the world.
#[derive(Debug)]
pub(super) enum MasterDeed {
    Tell(LinkNumber, Told),
    /// Closes a connection, perhaps because it does not want this host.
    Close(LinkNumber, bool),
    Later(Duration, MasterEvent),
}

/// What the master sees of the world.
pub(super) struct MasterSight<'w> {
    pub(super) now: Now,
    pub(super) random: &'w mut StdRng,
    pub(super) witness: &'w mut Witness,
    pub(super) deeds: Vec<MasterDeed>,
}

impl MasterSight<'_> {
    fn later(&mut self, after: Duration, event: MasterEvent) {
        self.deeds.push(MasterDeed::Later(after, event));
    }
}

impl Master {
    pub(super) fn new(key: SigningKey, rules: Rules, size: &Size) -> Self {
        Self {
            key,
            rules,
            looks: (size.looks_apart, size.look),
            backlog: size.backlog,
            disk: MasterDisk {
                mirror: 1,
                ..MasterDisk::default()
            },
            running: None,
            life: 0,
            told: None,
        }
    }

    pub(super) fn start(&mut self, sight: &mut MasterSight<'_>) {
        let files = &self.disk.files;
        let agents = files
            .iter()
            .filter(|(name, _)| matches!(name, FileName::Agent(_)));
        let records = agents.map(|(_, text)| read(text)).collect();
        let saved = match files.get(&FileName::Rollout) {
            Some(text) => Ok(read(text)),
            None => Ok(Rollout::default()),
        };
        // The loss of this file brings nothing back.
        let lost = sight.random.random_bool(0.2);
        let withdrawn = files.get(&FileName::Withdrawn).filter(|_| !lost);
        let withdrawn: Withdrawn = withdrawn.map(|text| read(text)).unwrap_or_default();
        let rollout = recovery::rollout(saved, &withdrawn, sight.now.clock);
        let manifests = self.disk.published.clone();
        let fleet = Fleet::new(records, rollout, self.rules.clone(), manifests);
        sight.witness.started(&fleet);
        let seen = fleet.rollout().clone();
        let withdrawn = seen.withdrawn().iter().map(|it| it.position).collect();
        let bounds = Bounds {
            agents: usize::MAX,
            looks_apart: self.looks.0,
            backlog: self.backlog,
        };
        self.running = Some(Running {
            dispatcher: Dispatcher::new(fleet, bounds, sight.now),
            links: BTreeMap::new(),
            numbers: BTreeMap::new(),
            seen,
            withdrawn,
            receipt: None,
            queue: VecDeque::new(),
            writing: false,
            look_at: None,
        });
        if let Some(list) = self.disk.revoked.clone() {
            self.revoke(list, sight);
        }
        self.replay(sight);
        self.carry_out(sight);
        let events = [
            MasterEvent::Idle,
            MasterEvent::Publish {
                accept: false,
                supersede: false,
            },
        ];
        for event in events {
            sight.later(Duration::from_secs(1), event);
        }
    }

    /// The hub hears again of the newest generation: it may have been published shortly before the
    /// end.
    fn replay(&mut self, sight: &mut MasterSight<'_>) {
        let rollout = self.process().dispatcher.fleet().rollout().clone();
        match recovery::replay(&rollout, &self.disk.published) {
            Some(News::WentBack(manifest)) => self.on(MasterEvent::WentBack(manifest), sight),
            Some(News::Published {
                manifest,
                supersede,
            }) => self.on(MasterEvent::Published(manifest, supersede), sight),
            Some(News::Passed) | None => {}
        }
    }

    /// The process is gone, and with it what was not written. Of what was being written the audit
    /// log comes first, then the records of agents.
    pub(super) fn crash(&mut self, random: &mut StdRng, witness: &mut Witness) {
        let Some(mut running) = self.running.take() else {
            return;
        };
        self.life += 1;
        let batch = running.queue.len().min(BATCH_MAX);
        let audited = random.random_range(0..=batch);
        let kept = if audited == batch {
            random.random_range(0..=batch)
        } else {
            0
        };
        for (at, waiting) in running.queue.drain(..audited).enumerate() {
            witness.receipts_on_disk.extend(waiting.receipt);
            let of_agents = |name: &FileName| matches!(name, FileName::Agent(_));
            let files = waiting.entry.files.into_iter();
            let files = files.filter(|(name, content)| of_agents(name) && content.is_some());
            self.disk.write(files.filter(|_| at < kept));
        }
    }

    fn process(&mut self) -> &mut Running {
        self.running.as_mut().expect("asked only while it runs")
    }

    pub(super) fn on(&mut self, event: MasterEvent, sight: &mut MasterSight<'_>) {
        match event {
            MasterEvent::Look => {
                let running = self.process();
                running.look_at.take_if(|at| *at <= sight.now.at);
                let due = running.dispatcher.look_at();
                if due.is_some_and(|at| at <= sight.now.at) {
                    running.dispatcher.look(sight.now);
                }
            }
            MasterEvent::Idle => {
                self.process().dispatcher.tick(sight.now);
                sight.later(self.looks.1, MasterEvent::Idle);
            }
            MasterEvent::Written => self.written(sight),
            MasterEvent::Publish { accept, supersede } => self.publish(accept, supersede, sight),
            MasterEvent::RollBack(owed) => self.roll_back(&owed, sight),
            MasterEvent::Published(manifest, supersede) => {
                let dispatcher = &mut self.process().dispatcher;
                dispatcher.published(&manifest, supersede, sight.now);
            }
            MasterEvent::WentBack(manifest) => {
                self.process().dispatcher.went_back(&manifest, sight.now);
            }
        }
        self.carry_out(sight);
    }

    // The hub.

    fn carry_out(&mut self, sight: &mut MasterSight<'_>) {
        let actions = self.process().dispatcher.actions();
        for action in actions {
            match action {
                Action::Tell(id, message) => self.tell(id, message, sight),
                Action::Write(entry) => {
                    let waiting = self.witnesses(entry, sight);
                    self.record(waiting, sight);
                }
                Action::Close(id, closing) => {
                    let running = self.process();
                    if let Some(link) = running.numbers.remove(&id) {
                        running.links.remove(&link);
                        let rejected = match closing {
                            Closing::Replaced
                            | Closing::Revoked
                            | Closing::Expired
                            | Closing::NewDay => true,
                        };
                        sight.deeds.push(MasterDeed::Close(link, rejected));
                    }
                }
                Action::Publish => {
                    let event = MasterEvent::Publish {
                        accept: false,
                        supersede: false,
                    };
                    let after = Duration::from_millis(sight.random.random_range(10..5000));
                    sight.later(after, event);
                }
                Action::RollBack(owed) => {
                    let takes = Duration::from_millis(sight.random.random_range(1..3000));
                    sight.later(takes, MasterEvent::RollBack(owed));
                }
                // Restored masters are not part of this world.
                Action::Accepted(_) | Action::Ahead(_) => {}
            }
        }
        let running = self.process();
        let look_at = running.dispatcher.look_at();
        if let Some(at) = look_at.filter(|_| look_at != running.look_at) {
            running.look_at = Some(at);
            sight.later(
                at.saturating_duration_since(sight.now.at),
                MasterEvent::Look,
            );
        }
    }

    /// The witness sees what was decided.
    fn witnesses(&mut self, entry: Entry, sight: &mut MasterSight<'_>) -> Waiting {
        let running = self.running.as_mut().expect("it runs");
        let (fleet, witness) = (running.dispatcher.fleet(), &mut *sight.witness);
        let mut receipt = None;
        if let Some(draft) = &entry.draft {
            witness.decided(draft);
            if draft.event == AuditEvent::Receipt {
                receipt = running.receipt.take();
            }
            if draft.event == AuditEvent::Offer {
                let name = draft.subject.parse().expect("the subject is the agent");
                let mut published = self.disk.published.iter();
                let offered = published.find(|it| Some(it.position()) == draft.position);
                let forced = draft.detail["forced"] == true;
                let offered = offered.expect("all are kept");
                witness.offered(fleet, &name, offered, forced, sight.now.clock);
            }
        }
        let mut rollout = None;
        for (name, content) in &entry.files {
            match (name, content) {
                (FileName::Agent(name), None) => witness.revoked(name),
                (FileName::Rollout, Some(_)) => {
                    rollout = Some(fleet.rollout().clone());
                    // The databases that an operator goes back to are published again.
                    let owed = fleet.rollout().owed().map(|owed| owed.to.content);
                    for withdrawal in fleet.rollout().withdrawn().iter() {
                        if running.withdrawn.insert(withdrawal.position)
                            && owed != Some(withdrawal.content)
                        {
                            witness.rejected(&withdrawal.content);
                        }
                    }
                    if running.seen != *fleet.rollout() {
                        witness.changed(&running.seen, fleet, sight.now.clock);
                        running.seen = fleet.rollout().clone();
                    }
                }
                _ => {}
            }
        }
        Waiting {
            entry,
            receipt,
            rollout,
        }
    }

    fn tell(&mut self, id: LinkId, message: Message, sight: &mut MasterSight<'_>) {
        let running = self.running.as_mut().expect("it runs");
        let Some(link) = running.numbers.get(&id).copied() else {
            return; // it has ended
        };
        let told = match message {
            Message::Welcome => Told::Welcome,
            Message::Offer {
                offer,
                manifest,
                manner,
            } => Told::Offer {
                offer,
                fresh: self.disk.fresh[&manifest.payload_sha256()].clone(),
                manifest,
                rehash: manner.rehash,
            },
            Message::Acknowledge(seq) => Told::Acknowledge(seq),
            // Nobody here looks how old its statement is, or keeps heads of logs.
            Message::Fresh(_) | Message::Checkpoint(_) => return,
        };
        if let Some((_, name)) = running.links.get(&link) {
            let fleet = running.dispatcher.fleet();
            sight.witness.told(fleet, name, &told);
        }
        sight.deeds.push(MasterDeed::Tell(link, told));
    }

    pub(super) fn connected(
        &mut self,
        link: LinkNumber,
        name: &AgentName,
        groups: &[GroupName],
        serial: &Serial,
        sight: &mut MasterSight<'_>,
    ) {
        let newcomer = Newcomer {
            name: name.clone(),
            groups: groups.to_vec(),
            address: SocketAddr::from(([127, 0, 0, 1], 1)),
            serial: serial.clone(),
            certificate_ends: Timestamp::MAX,
            fingerprint: Digest::of(serial.0.as_bytes()),
        };
        let running = self.process();
        match running.dispatcher.connected(newcomer, sight.now) {
            Ok(id) => {
                running.links.insert(link, (id, name.clone()));
                running.numbers.insert(id, link);
                sight.witness.enrolled(name);
                self.carry_out(sight);
            }
            Err(_) => sight.deeds.push(MasterDeed::Close(link, true)),
        }
    }

    pub(super) fn disconnected(&mut self, link: LinkNumber, sight: &mut MasterSight<'_>) {
        let running = self.process();
        if let Some((id, name)) = running.links.remove(&link) {
            running.numbers.remove(&id);
            running.dispatcher.disconnected(&name, id, sight.now);
            self.carry_out(sight);
        }
    }

    /// `key`: what the certificate of that connection has.
    pub(super) fn heard(
        &mut self,
        link: LinkNumber,
        said: Said,
        key: &PublicKey,
        sight: &mut MasterSight<'_>,
    ) {
        let running = self.running.as_mut().expect("asked only while it runs");
        let Some((id, name)) = running.links.get(&link).cloned() else {
            return; // replaced, or thrown out
        };
        let (dispatcher, now) = (&mut running.dispatcher, sight.now);
        match said {
            Said::Hello(hello) => {
                dispatcher.hello(&name, id, *hello, now);
            }
            Said::Need { offer, files } => {
                for name in files {
                    let part = Told::Part { offer, name };
                    sight.deeds.push(MasterDeed::Tell(link, part));
                }
                return; // the pusher's matter
            }
            Said::Progress {
                offer,
                phase,
                until,
                sent,
            } => {
                let progress = Progress {
                    offer,
                    phase,
                    until,
                    sent,
                };
                dispatcher.progress(&name, id, progress, now);
            }
            Said::Receipt(receipt) => {
                let checked = receipt.verify([key]).expect("it is its own");
                self.receipt(id, &checked, sight);
            }
            Said::Declined { offer, message } => {
                let decline = Decline {
                    offer,
                    message,
                    other_master: None,
                };
                dispatcher.declined(&name, id, decline, now);
            }
            Said::Reoffer => {
                let published = &self.disk.published;
                let kept = |at| published.iter().find(|it| it.position() == at).cloned();
                dispatcher.reoffer(&name, id, kept, now);
            }
        }
        self.carry_out(sight);
    }

    fn receipt(&mut self, id: LinkId, receipt: &Verified<Receipt>, sight: &mut MasterSight<'_>) {
        let running = self.process();
        running.receipt = Some((receipt.agent.clone(), receipt.seq));
        let dispatcher = &mut running.dispatcher;
        let refused = match receipt.outcome {
            Outcome::Refused => sight.witness.learns_of(receipt, dispatcher.fleet()),
            Outcome::Live | Outcome::Installed | Outcome::HostFault => None,
        };
        dispatcher.receipt(id, receipt, sight.now);
        sight.witness.was_looked_at(refused, dispatcher.fleet());
    }

    // What operators do.

    pub(super) fn order(
        &mut self,
        order: rollout::Order,
        sight: &mut MasterSight<'_>,
    ) -> Result<(), OrderError> {
        let operator = Operator {
            uid: 0,
            name: "root".to_owned(),
            login_uid: None,
        };
        let published = |of: Target| {
            let mut published = self.disk.published.iter();
            let found = published.find(|it| it.payload_sha256() == of.manifest_sha256);
            found.expect("all are kept").clone()
        };
        let order = match order {
            rollout::Order::RollBack(to, reason) => Order::RollBack(published(to), reason),
            rollout::Order::Pin(group, Some(to), reason) => {
                Order::Pin(group, published(to), reason)
            }
            order @ (rollout::Order::Pause(_)
            | rollout::Order::Resume(_)
            | rollout::Order::Abort(_)
            | rollout::Order::Promote(_)
            | rollout::Order::Supersede
            | rollout::Order::Pin(_, None, _)
            | rollout::Order::Unpin(..)
            | rollout::Order::SetAside(..)
            | rollout::Order::Restore(..)) => Order::Plain(order),
        };
        let dispatcher = &mut self.process().dispatcher;
        dispatcher.order(order, None, &operator, sight.now)?;
        self.carry_out(sight);
        Ok(())
    }

    /// Drives an agent past waves, pauses and windows to the newest generation, or to its pin.
    pub(super) fn force(&mut self, name: &AgentName, sight: &mut MasterSight<'_>) {
        let dispatcher = &mut self.process().dispatcher;
        let Some(newest) = dispatcher.fleet().newest().map(|it| it.position()) else {
            return;
        };
        let what = Forcing::Current(newest);
        dispatcher.force(&what, vec![name.clone()], false, sight.now);
        self.carry_out(sight);
    }

    pub(super) fn revoke(&mut self, list: RevocationList, sight: &mut MasterSight<'_>) {
        self.process().dispatcher.revoked(list.clone());
        self.disk.revoked = Some(list);
        self.carry_out(sight);
    }

    pub(super) fn revocations(&self) -> Option<&RevocationList> {
        self.disk.revoked.as_ref()
    }

    // The publisher.

    fn publish(&mut self, accept: bool, supersede: bool, sight: &mut MasterSight<'_>) {
        if self.process().dispatcher.fleet().rollout().held().is_some() {
            return;
        }
        let files = files(self.disk.mirror);
        let content = content_digest(files.iter().map(|f| (&f.name, f.size, &f.sha256)));
        let rejected = self.is_rejected(&content);
        let same = self
            .disk
            .published
            .last()
            .is_some_and(|it| it.content == content);
        if (same || rejected) && !(rejected && accept) {
            return;
        }
        if rejected {
            sight.witness.accepted(&content);
        }
        let manifest = self.add(content, files, None, sight);
        self.announce(MasterEvent::Published(manifest, supersede), sight);
    }

    fn roll_back(&mut self, owed: &Owed, sight: &mut MasterSight<'_>) {
        if self.process().dispatcher.fleet().rollout().owed() != Some(owed) {
            return; // an operator ordered another one meanwhile
        }
        let (to, of) = (owed.to.position, owed.of.position);
        let mut published = self.disk.published.iter();
        let to = published
            .find(|it| it.position() == to)
            .expect("all are kept")
            .clone();
        let newest = self.disk.published.last().expect("there is one");
        let done = newest.rollback_of == Some(of) && newest.content == to.content;
        let manifest = match done {
            true => newest.clone(),
            false => self.add(to.content, to.files.clone(), Some(of), sight),
        };
        self.announce(MasterEvent::WentBack(manifest), sight);
    }

    /// Whether a content is not to be published unless an operator accepts it.
    pub(super) fn is_rejected(&self, content: &Digest) -> bool {
        let published = self.disk.published.iter();
        let published = published.map(|it| (it.position(), it.content));
        let running = self.running.as_ref().expect("asked only while it runs");
        let withdrawn = running.dispatcher.fleet().rollout().withdrawn();
        withdrawn.rejection(*content, published).is_some()
    }

    fn add(
        &mut self,
        content: Digest,
        files: Vec<clamcast_proto::manifest::ManifestFile>,
        rollback_of: Option<clamcast_proto::Position>,
        sight: &mut MasterSight<'_>,
    ) -> Arc<Verified<Manifest>> {
        let newest = self.disk.published.last();
        let generation = newest.map_or(Some(Generation::FIRST), |it| it.generation.next());
        let manifest = Manifest {
            fleet: "bank".parse().expect("a fleet's name"),
            epoch: Epoch(1),
            generation: generation.expect("there are many numbers"),
            publisher: Publisher("p1".to_owned()),
            created: sight.now.clock,
            previous: newest.map(|it| it.payload_sha256()),
            rollback_of,
            content,
            files,
        };
        let manifest = Arc::new(sign(manifest, &self.key));
        sight.witness.published(&manifest);
        let fresh = Freshness {
            fleet: manifest.fleet.clone(),
            epoch: manifest.epoch,
            generation: manifest.generation,
            manifest_sha256: manifest.payload_sha256(),
            issued: sight.now.clock,
            expires: Timestamp::MAX,
        };
        let fresh = Arc::new(sign(fresh, &self.key));
        self.disk.fresh.insert(manifest.payload_sha256(), fresh);
        self.disk.published.push(manifest.clone());
        manifest
    }

    /// The hub hears of publications in their order.
    fn announce(&mut self, event: MasterEvent, sight: &mut MasterSight<'_>) {
        let takes = Duration::from_millis(sight.random.random_range(1..2000));
        let at = (sight.now.at + takes).max(self.told.unwrap_or(sight.now.at));
        self.told = Some(at);
        sight.later(at - sight.now.at, event);
    }

    // The recorder.

    fn record(&mut self, waiting: Waiting, sight: &mut MasterSight<'_>) {
        let running = self.process();
        running.queue.push_back(waiting);
        if !running.writing {
            running.writing = true;
            let slow = sight.random.random_bool(0.01);
            let takes = sight
                .random
                .random_range(1..=if slow { 20_000 } else { 30 });
            sight.later(Duration::from_millis(takes), MasterEvent::Written);
        }
    }

    fn written(&mut self, sight: &mut MasterSight<'_>) {
        let running = self.running.as_mut().expect("it runs");
        let batch: Vec<_> = {
            let many = running.queue.len().min(BATCH_MAX);
            running.queue.drain(..many).collect()
        };
        running.writing = false;
        for waiting in batch {
            sight.witness.receipts_on_disk.extend(waiting.receipt);
            self.disk.write(waiting.entry.files.into_iter());
            if let Some(rollout) = &waiting.rollout {
                sight.witness.kept(rollout);
            }
        }
        let waiting = running.queue.len();
        running.dispatcher.durable(waiting, &"".into());
        self.carry_out(sight);
        let running = self.process();
        if !running.queue.is_empty() && !running.writing {
            running.writing = true;
            sight.later(Duration::from_millis(5), MasterEvent::Written);
        }
    }
}

impl MasterDisk {
    fn write(&mut self, files: impl Iterator<Item = (FileName, Option<Vec<u8>>)>) {
        for (name, content) in files {
            match content {
                Some(content) => self.files.insert(name, content),
                None => self.files.remove(&name),
            };
        }
    }
}

fn read<T: DeserializeOwned>(text: &[u8]) -> T {
    serde_json::from_slice(text).expect("it is what was written")
}

/// Where a published manifest stands.
pub(super) fn target(manifest: &Verified<Manifest>) -> Target {
    Target {
        position: manifest.position(),
        manifest_sha256: manifest.payload_sha256(),
        content: manifest.content,
    }
}
