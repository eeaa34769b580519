//! The master: the real fleet with its rollout. What the hub, the recorder and the publisher do
//! around it is done here in the same order, on a disk that is made up.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clamcast_master::fleet::{Arrival, Fleet, Link, LinkId, Record, Standing};
use clamcast_master::rollout::{Effect, Order, OrderError, Owed, Rollout, Rules, Target};
use clamcast_proto::dsse::{PublicKey, Verified, sign};
use clamcast_proto::identity::Serial;
use clamcast_proto::manifest::{Manifest, Publisher, content_digest};
use clamcast_proto::receipt::{Outcome, Receipt};
use clamcast_proto::revocation::RevocationList;
use clamcast_proto::wire::OfferId;
use clamcast_proto::{AgentName, Digest, Epoch, Generation, GroupName};
use ed25519_dalek::SigningKey;
use jiff::Timestamp;
use rand::Rng as _;
use rand::rngs::StdRng;

use super::Size;
use super::contents::files;
use super::network::{LinkNumber, Said, Told};
use super::rules::Witness;

/// Time between two tries to have a rollback published.
const TRY_AGAIN: Duration = Duration::from_secs(10);

/// Jobs that are written together.
const BATCH_MAX: usize = 256;

/// The master, with its disk and without its process where that has crashed.
pub(super) struct Master {
    key: SigningKey,
    pub(super) rules: Rules,
    looks: (Duration, Duration),
    pub(super) disk: MasterDisk,
    pub(super) running: Option<Running>,
    /// How often it was started.
    pub(super) life: u32,
    /// When the last word of the publisher reaches the hub.
    told: Duration,
}

/// What outlives the process.
#[derive(Default)]
pub(super) struct MasterDisk {
    records: BTreeMap<AgentName, Record>,
    rollout: Rollout,
    pub(super) published: Vec<Arc<Verified<Manifest>>>,
    /// Contents that are not published again.
    pub(super) rejected: Vec<Digest>,
    revoked: Option<RevocationList>,
    /// The state of the databases in the mirror.
    pub(super) mirror: u64,
}

/// The process.
pub(super) struct Running {
    pub(super) fleet: Fleet,
    pub(super) links: BTreeMap<LinkNumber, Open>,
    offers: u64,
    forced: BTreeMap<AgentName, Arc<Verified<Manifest>>>,
    kept: Rollout,
    /// How often `kept` has changed.
    changes: u64,
    queue: VecDeque<Job>,
    writing: bool,
    look_at: Option<Duration>,
    looked: Duration,
    tried: Option<Duration>,
}

/// A connection.
pub(super) struct Open {
    pub(super) name: AgentName,
    serial: Serial,
    greeted: bool,
    offered: Option<Digest>,
}

/// One thing to write.
#[derive(Default)]
struct Job {
    receipt: Option<(AgentName, u64)>,
    keep: Option<Record>,
    forget: Option<AgentName>,
    rollout: Option<Rollout>,
    then: Option<(LinkNumber, Told)>,
    rolls_back: Option<Owed>,
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
    pub(super) now: Duration,
    pub(super) clock: Timestamp,
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
            disk: MasterDisk {
                mirror: 1,
                ..MasterDisk::default()
            },
            running: None,
            life: 0,
            told: Duration::ZERO,
        }
    }

    pub(super) fn start(&mut self, sight: &mut MasterSight<'_>) {
        let text = serde_json::to_vec(&self.disk.rollout).expect("it serialises");
        let rollout: Rollout = serde_json::from_slice(&text).expect("it is what was written");
        let records = self.disk.records.values().cloned().collect();
        let manifests = self.disk.published.clone();
        let mut fleet = Fleet::new(records, rollout, self.rules.clone(), manifests);
        fleet.resumed(sight.clock);
        sight.witness.started(&fleet);
        self.running = Some(Running {
            kept: fleet.rollout().clone(),
            fleet,
            links: BTreeMap::new(),
            offers: 0,
            forced: BTreeMap::new(),
            changes: 0,
            queue: VecDeque::new(),
            writing: false,
            look_at: None,
            looked: sight.now,
            tried: None,
        });
        if let Some(list) = self.disk.revoked.clone() {
            self.revoke(list, sight);
        }
        self.replay(sight);
        self.look_soon(sight);
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
        let Some(newest) = self.disk.published.last().cloned() else {
            return;
        };
        let owed = self.process().fleet.rollout().owed();
        let is_owed = owed.is_some_and(|owed| {
            newest.rollback_of == Some(owed.of.position) && newest.content == owed.to.content
        });
        match is_owed {
            true => self.on(MasterEvent::WentBack(newest), sight),
            // It was taken back since.
            false if self.disk.rejected.contains(&newest.content) => {}
            false => self.on(MasterEvent::Published(newest, false), sight),
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
        for (at, job) in running.queue.drain(..audited).enumerate() {
            witness.receipts_on_disk.extend(job.receipt);
            if let Some(record) = job.keep.filter(|_| at < kept) {
                self.disk.records.insert(record.name.clone(), record);
            }
        }
    }

    fn process(&mut self) -> &mut Running {
        self.running.as_mut().expect("asked only while it runs")
    }

    pub(super) fn on(&mut self, event: MasterEvent, sight: &mut MasterSight<'_>) {
        match event {
            MasterEvent::Look => {
                let due = self.process().look_at.take_if(|at| *at <= sight.now);
                if due.is_some() {
                    self.look(sight);
                }
            }
            MasterEvent::Idle => {
                if self.process().fleet.is_timed() || self.process().kept.owed().is_some() {
                    self.look_soon(sight);
                }
                sight.later(self.looks.1, MasterEvent::Idle);
            }
            MasterEvent::Written => self.written(sight),
            MasterEvent::Publish { accept, supersede } => self.publish(accept, supersede, sight),
            MasterEvent::RollBack(owed) => self.roll_back(&owed, sight),
            MasterEvent::Published(manifest, supersede) => {
                let effects = self.process().fleet.published(&manifest, supersede);
                self.carry_out(effects, sight);
                self.look_soon(sight);
            }
            MasterEvent::WentBack(manifest) => {
                let effects = self.process().fleet.went_back(&manifest);
                self.carry_out(effects, sight);
                self.look_soon(sight);
            }
        }
    }

    // The hub.

    fn look_soon(&mut self, sight: &mut MasterSight<'_>) {
        let apart = self.looks.0;
        let running = self.process();
        if running.look_at.is_none() {
            let at = (running.looked + apart).max(sight.now);
            running.look_at = Some(at);
            sight.later(at - sight.now, MasterEvent::Look);
        }
    }

    /// Looks at the rollout, and offers what follows.
    fn look(&mut self, sight: &mut MasterSight<'_>) {
        self.process().look_at = None;
        let effects = self.process().fleet.step(sight.clock);
        self.carry_out(effects, sight);
        let running = self.process();
        let offers = running.links.iter().filter_map(|(link, open)| {
            if !open.greeted {
                return None;
            }
            let manifest = running.fleet.wanted(&open.name, sight.clock)?;
            let known = open.offered == Some(manifest.payload_sha256());
            (!known && !running.is_forced(&open.name)).then(|| (*link, manifest.clone()))
        });
        for (link, manifest) in offers.collect::<Vec<_>>() {
            self.offer(link, manifest, false, sight);
        }
        self.process().looked = sight.now;
    }

    fn carry_out(&mut self, effects: Vec<Effect>, sight: &mut MasterSight<'_>) {
        let mut looks = false;
        for effect in effects {
            sight.witness.decided(&effect);
            match effect {
                Effect::Note { .. } => {}
                Effect::Reject { target, .. } => {
                    self.disk.rejected.push(target.content);
                    self.process().forced.clear();
                }
                Effect::Look => looks = true,
            }
        }
        let running = self.running.as_mut().expect("it runs");
        let rollout = running.fleet.rollout().clone();
        if rollout != running.kept {
            sight
                .witness
                .changed(&running.kept, &running.fleet, sight.clock);
            if rollout.owed() != running.kept.owed() {
                running.tried = None;
            }
            running.kept = rollout.clone();
            running.changes += 1;
            let rollout = Some(rollout);
            self.record(
                Job {
                    rollout,
                    ..Job::default()
                },
                sight,
            );
        }
        if looks {
            self.look_at_the_mirror(sight);
        }
        self.try_what_is_owed(sight);
    }

    fn look_at_the_mirror(&mut self, sight: &mut MasterSight<'_>) {
        let event = MasterEvent::Publish {
            accept: false,
            supersede: false,
        };
        let after = Duration::from_millis(sight.random.random_range(10..5000));
        sight.later(after, event);
    }

    fn try_what_is_owed(&mut self, sight: &mut MasterSight<'_>) {
        let running = self.process();
        let tried = running
            .tried
            .is_some_and(|tried| sight.now < tried + TRY_AGAIN);
        if let Some(owed) = running.kept.owed().cloned().filter(|_| !tried) {
            running.tried = Some(sight.now);
            let rolls_back = Some(owed);
            self.record(
                Job {
                    rolls_back,
                    ..Job::default()
                },
                sight,
            );
        }
    }

    pub(super) fn connected(
        &mut self,
        link: LinkNumber,
        name: &AgentName,
        groups: &[GroupName],
        serial: &Serial,
        sight: &mut MasterSight<'_>,
    ) {
        let revoked = self.disk.revoked.as_ref();
        if revoked.is_some_and(|list| list.revoked.iter().any(|it| it.serial == *serial)) {
            return sight.deeds.push(MasterDeed::Close(link, true));
        }
        let running = self.process();
        let arrival = running.fleet.connected(
            name,
            groups.to_vec(),
            Link {
                id: LinkId(link),
                since: sight.clock,
                address: SocketAddr::from(([127, 0, 0, 1], 1)),
                serial: serial.clone(),
                certificate_ends: Timestamp::MAX,
                offer: None,
                answered: None,
                declined: None,
            },
        );
        let Arrival {
            new: _,
            changed,
            replaced,
        } = arrival;
        if let Some(LinkId(old)) = replaced
            && running.links.remove(&old).is_some()
        {
            sight.deeds.push(MasterDeed::Close(old, true));
        }
        let open = Open {
            name: name.clone(),
            serial: serial.clone(),
            greeted: false,
            offered: None,
        };
        running.links.insert(link, open);
        sight.witness.enrolled(name);
        sight.deeds.push(MasterDeed::Tell(link, Told::Welcome));
        if changed {
            self.keep(name, sight);
        }
        self.look_soon(sight);
    }

    pub(super) fn disconnected(&mut self, link: LinkNumber, sight: &mut MasterSight<'_>) {
        if let Some(open) = self.process().links.remove(&link) {
            self.process()
                .fleet
                .disconnected(&open.name, LinkId(link), sight.clock);
            self.look_soon(sight);
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
        let Some(name) = self
            .process()
            .links
            .get(&link)
            .map(|open| open.name.clone())
        else {
            return; // replaced, or thrown out
        };
        match said {
            Said::Hello { installed, clamd } => {
                if self.process().fleet.hello(&name, clamd, Vec::new()) {
                    self.keep(&name, sight);
                }
                let installed = installed.map(|installed| installed.payload);
                self.hello(link, &name, installed.as_deref(), sight);
            }
            Said::Need { offer, files } => {
                for name in files {
                    let part = Told::Part { offer, name };
                    sight.deeds.push(MasterDeed::Tell(link, part));
                }
                return; // the pusher's matter
            }
            Said::Progress { phase, until } => {
                let clock = sight.clock;
                self.process()
                    .fleet
                    .progress(&name, LinkId(link), phase, until, clock);
            }
            Said::Receipt(receipt) => {
                let checked: Verified<Receipt> =
                    receipt.envelope().verify([key]).expect("it is its own");
                self.receipt(link, &checked, sight);
            }
            Said::Declined { message } => {
                let running = self.process();
                if running
                    .fleet
                    .declined(&name, LinkId(link), message)
                    .is_some()
                {
                    running.forced.remove(&name);
                }
            }
            Said::Reoffer => {
                let fleet = &self.process().fleet;
                let manifest = fleet.mending(&name, |_| true, sight.clock).cloned();
                if let Some(manifest) = manifest {
                    self.offer(link, manifest, false, sight);
                }
            }
        }
        self.look_soon(sight);
    }

    fn hello(
        &mut self,
        link: LinkNumber,
        name: &AgentName,
        installed: Option<&[u8]>,
        sight: &mut MasterSight<'_>,
    ) {
        let deadline = self.rules.deadline;
        let running = self.process();
        if let Some(open) = running.links.get_mut(&link) {
            open.greeted = true;
        }
        let ordered = running.forced.get(name).cloned();
        let ordered = ordered.filter(|_| running.is_forced(name));
        let forced = running.forced.contains_key(name);
        let wanted = running.fleet.wanted(name, sight.clock).cloned();
        let Some(manifest) = ordered.or(wanted) else {
            return;
        };
        let has_it = installed.is_some_and(|it| it == manifest.envelope().payload);
        let standing = running.fleet.standing(name, sight.clock, deadline);
        if has_it && standing == Standing::Conformant && !forced {
            if let Some(open) = running.links.get_mut(&link) {
                open.offered = Some(manifest.payload_sha256());
            }
        } else {
            self.offer(link, manifest, forced, sight);
        }
    }

    fn offer(
        &mut self,
        link: LinkNumber,
        manifest: Arc<Verified<Manifest>>,
        rehash: bool,
        sight: &mut MasterSight<'_>,
    ) -> bool {
        let running = self.running.as_mut().expect("it runs");
        let Some(open) = running.links.get_mut(&link) else {
            return false;
        };
        running.offers += 1;
        let offer = OfferId(running.offers);
        open.offered = Some(manifest.payload_sha256());
        let name = open.name.clone();
        sight
            .witness
            .offered(&running.fleet, &name, &manifest, rehash);
        running
            .fleet
            .offered(&name, LinkId(link), offer, &manifest, sight.clock);
        let told = Told::Offer {
            offer,
            manifest,
            rehash,
        };
        let then = Some((link, told));
        self.record(
            Job {
                then,
                ..Job::default()
            },
            sight,
        );
        true
    }

    fn receipt(
        &mut self,
        link: LinkNumber,
        receipt: &Verified<Receipt>,
        sight: &mut MasterSight<'_>,
    ) {
        let then = Some((link, Told::Acknowledge(receipt.seq)));
        let running = self.process();
        if !running.fleet.receipt(receipt, sight.clock) {
            return self.record(
                Job {
                    then,
                    ..Job::default()
                },
                sight,
            );
        }
        sight.witness.receipts += 1;
        if !running.fleet.has_offer(&receipt.agent) {
            running.forced.remove(&receipt.agent);
        }
        let job = Job {
            receipt: Some((receipt.agent.clone(), receipt.seq)),
            keep: running.fleet.record(&receipt.agent).cloned(),
            then,
            ..Job::default()
        };
        self.record(job, sight);
        if receipt.outcome == Outcome::Refused {
            let fleet = &self.process().fleet;
            let knew = sight.witness.learns_of_a_refusal(receipt, fleet);
            self.look(sight);
            sight
                .witness
                .a_refusal_was_looked_at(knew, &self.process().fleet);
        }
    }

    // What operators do.

    pub(super) fn order(
        &mut self,
        order: Order,
        sight: &mut MasterSight<'_>,
    ) -> Result<(), OrderError> {
        let effects = self.process().fleet.order(order, sight.clock)?;
        self.carry_out(effects, sight);
        self.look(sight);
        Ok(())
    }

    /// Drives an agent past waves, pauses and windows to the newest generation, or to its pin.
    pub(super) fn force(&mut self, name: &AgentName, sight: &mut MasterSight<'_>) {
        let running = self.process();
        let pinned = running.fleet.pinned(name);
        let Some(manifest) = pinned.or_else(|| running.fleet.newest()).cloned() else {
            return;
        };
        let link = running.links.iter().find(|(_, open)| open.name == *name);
        let Some(link) = link.map(|(link, _)| *link) else {
            return;
        };
        if running.fleet.past(name, &manifest).is_some() {
            return;
        }
        if self.offer(link, manifest.clone(), true, sight) {
            self.process().forced.insert(name.clone(), manifest);
        }
        self.look_soon(sight);
    }

    pub(super) fn revoke(&mut self, list: RevocationList, sight: &mut MasterSight<'_>) {
        let running = self.process();
        let is_on = |open: &Open| list.revoked.iter().any(|it| it.serial == open.serial);
        let out = running.links.iter().filter(|(_, open)| is_on(open));
        let out: Vec<_> = out.map(|(link, _)| *link).collect();
        for link in out {
            running.links.remove(&link);
            sight.deeds.push(MasterDeed::Close(link, true));
        }
        for name in self.process().fleet.revoked(&list) {
            self.process().forced.remove(&name);
            sight.witness.revoked(&name);
            let forget = Some(name);
            self.record(
                Job {
                    forget,
                    ..Job::default()
                },
                sight,
            );
        }
        self.disk.revoked = Some(list);
        self.look_soon(sight);
    }

    pub(super) fn revocations(&self) -> Option<&RevocationList> {
        self.disk.revoked.as_ref()
    }

    // The publisher.

    fn publish(&mut self, accept: bool, supersede: bool, sight: &mut MasterSight<'_>) {
        if self.process().fleet.rollout().held().is_some() {
            return;
        }
        let files = files(self.disk.mirror);
        let content = content_digest(files.iter().map(|f| (&f.name, f.size, &f.sha256)));
        let rejected = self.disk.rejected.contains(&content);
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
            self.disk.rejected.retain(|it| *it != content);
        }
        let manifest = self.add(content, files, None, sight);
        self.announce(MasterEvent::Published(manifest, supersede), sight);
    }

    fn roll_back(&mut self, owed: &Owed, sight: &mut MasterSight<'_>) {
        if self.process().fleet.rollout().owed() != Some(owed) {
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
            created: sight.clock,
            previous: newest.map(|it| it.payload_sha256()),
            rollback_of,
            content,
            files,
        };
        let manifest = Arc::new(sign(manifest, &self.key));
        sight.witness.published(&manifest);
        self.disk.published.push(manifest.clone());
        manifest
    }

    /// The hub hears of publications in their order.
    fn announce(&mut self, event: MasterEvent, sight: &mut MasterSight<'_>) {
        let takes = Duration::from_millis(sight.random.random_range(1..2000));
        self.told = self.told.max(sight.now + takes);
        sight.later(self.told - sight.now, event);
    }

    // The recorder.

    fn keep(&mut self, name: &AgentName, sight: &mut MasterSight<'_>) {
        let keep = self.process().fleet.record(name).cloned();
        self.record(
            Job {
                keep,
                ..Job::default()
            },
            sight,
        );
    }

    fn record(&mut self, job: Job, sight: &mut MasterSight<'_>) {
        let running = self.process();
        running.queue.push_back(job);
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
        let mut said = Vec::new();
        for job in batch {
            sight.witness.receipts_on_disk.extend(job.receipt);
            if let Some(record) = job.keep {
                self.disk.records.insert(record.name.clone(), record);
            }
            if let Some(name) = job.forget {
                self.disk.records.remove(&name);
            }
            if let Some(rollout) = job.rollout {
                sight.witness.kept(&rollout);
                self.disk.rollout = rollout;
            }
            said.push((job.then, job.rolls_back));
        }
        for (then, rolls_back) in said {
            if let Some(owed) = rolls_back {
                let takes = Duration::from_millis(sight.random.random_range(1..3000));
                sight.later(takes, MasterEvent::RollBack(owed));
            }
            if let Some((link, told)) = then {
                let running = self.running.as_ref().expect("it runs");
                if let Some(open) = running.links.get(&link) {
                    sight.witness.told(&running.fleet, &open.name, &told);
                }
                sight.deeds.push(MasterDeed::Tell(link, told));
            }
        }
        if !self.process().queue.is_empty() {
            self.process().writing = true;
            sight.later(Duration::from_millis(5), MasterEvent::Written);
        }
    }
}

impl Running {
    fn is_forced(&self, name: &AgentName) -> bool {
        let forced = self.forced.get(name);
        forced.is_some_and(|manifest| self.fleet.is_open(&manifest.payload_sha256()))
    }
}

/// Where a published manifest stands.
pub(super) fn target(manifest: &Verified<Manifest>) -> Target {
    Target {
        position: manifest.position(),
        manifest_sha256: manifest.payload_sha256(),
        content: manifest.content,
    }
}
