//! A host: the real core of the agent, its real installer, tasks and back-off, on a machine that is made
//! up. What is done here is what the keeper does: it turns what happens into events of the core, and
//! carries out the actions that come back.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use clamcast_agent::config::{DriftPolicy, Stale};
use clamcast_agent::core::left_alone::AnyLeftAlone;
use clamcast_agent::core::{
    Action, ConnectionId, Core, Cut, Event, Greeting, Identity, Kept, Looked, Now, Record,
    Settings, Task,
};
use clamcast_agent::host::state::StateError;
use clamcast_agent::install::{Depth, Installer, Look, ReceiveError, Standing};
use clamcast_agent::keeper::tasks::{Running, Tasks};
use clamcast_agent::link::RETRY;
use clamcast_agent::link::backoff::Backoff;
use clamcast_proto::dsse::{PublicKey, Verified, sign};
use clamcast_proto::identity::Serial;
use clamcast_proto::keys::KeySet;
use clamcast_proto::manifest::{Manifest, ManifestFile};
use clamcast_proto::receipt::{
    ClamdReport, ClamdState, FileState, Outcome, Proof, Receipt, ReceiptFile,
};
use clamcast_proto::trust::Trust;
use clamcast_proto::wire::{
    Feature, Offer, OfferId, Part, PartEncoding, PartKind, Phase, ToAgent, ToMaster, Welcome,
};
use clamcast_proto::{AgentName, DatabaseName, Digest, FleetName, GroupName, Position};
use ed25519_dalek::SigningKey;
use jiff::{SignedDuration, Timestamp};
use rand::Rng as _;
use rand::rngs::StdRng;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

mod body;
mod clamd;
mod lies;

pub(super) use body::Body;
pub(super) use clamd::Clamd;

use body::{Proving, Shared, fault};
use lies::{Lies, Lying};

use super::contents::{Bad, CLAMD_VERSIONS};
use super::disk::Fate;
use super::disk::Trouble;
use super::network::{LinkNumber, Said, Told};

/// One host.
pub(super) struct Host {
    pub(super) name: AgentName,
    pub(super) groups: Vec<GroupName>,
    pub(super) serial: Serial,
    key: SigningKey,
    pub(super) honest: bool,
    /// Whether another host has its name, key and certificate: a cloned machine, or a stolen key.
    pub(super) cloned: bool,
    /// The machine, which outlives the agent.
    body: Shared,
    agent: Option<Agent>,
    /// How often the agent was started.
    pub(super) life: u32,
    /// Whether it will never come back.
    pub(super) left: bool,
    /// Whether no packet gets to the master or back.
    pub(super) cut: bool,
    /// The connection that it made last.
    pub(super) dialed: Option<LinkNumber>,
    /// How far its clock is ahead.
    pub(super) skew: SignedDuration,
    /// Everything takes so many times as long as elsewhere.
    pub(super) slowness: f64,
    /// How long it waits before a swap at most.
    pub(super) splay: Duration,
    /// What a dishonest host has said.
    lies: Lies,
}

/// What the agent forgets in a crash.
struct Agent {
    core: Core,
    tasks: Tasks<Shared, Shared>,
    stop: CancellationToken,
    standing: watch::Receiver<Standing>,
    running: Vec<Running>,
    /// Tasks that go on some time later.
    later: VecDeque<Running>,
    /// A look at files that are right, and at a clamd that is there: each ends when that changes.
    parked_look: Option<Depth>,
    is_probe_parked: bool,
    /// Whether the last look found something wrong.
    saw_wrong: bool,
    link: Option<LinkNumber>,
    retry: Backoff,
    /// Files that arrive, and how often their arrival was cut short.
    receiving: BTreeMap<DatabaseName, ManifestFile>,
    cuts: u32,
    /// Bytes of them.
    received: u64,
    /// When the core is to be told the time.
    tick: Option<Instant>,
    /// What a dishonest host is at.
    lying: Option<Lying>,
}

/// What happens on a host.
#[derive(Debug)]
pub(super) enum HostEvent {
    /// The agent starts, and clamd after it.
    Start,
    /// It is time to dial.
    Dial,
    /// A task goes on.
    Begin,
    /// A clamd that has stopped is looked for.
    LookAtClamd,
    /// A file has arrived, or what came of it; of the transfers after so many cuts.
    Arrived(Box<(ManifestFile, Result<(), ReceiveError>)>, u32),
    /// clamd has loaded what is there.
    Judge(Proving),
    /// The core is told the time.
    Tick,
    /// A dishonest host goes on with its lie.
    Lie,
}

/// What a host does to the world.
#[derive(Debug)]
pub(super) enum Deed {
    Say(LinkNumber, Said),
    Later(Duration, HostEvent),
    /// The agent is gone, with the host or without.
    Crash,
    /// No packet gets to the master or back for so long.
    Vanish(Duration),
}

/// What a host sees of the world.
pub(super) struct Sight<'w> {
    pub(super) now: Instant,
    pub(super) clock: Timestamp,
    pub(super) keys: &'w Verified<KeySet>,
    pub(super) random: &'w mut StdRng,
    pub(super) deeds: Vec<Deed>,
}

impl Sight<'_> {
    fn later(&mut self, after: Duration, event: HostEvent) {
        self.deeds.push(Deed::Later(after, event));
    }

    fn chance(&mut self, of: f64) -> bool {
        self.random.random_bool(of)
    }

    fn now(&self) -> Now {
        Now {
            clock: self.clock,
            at: self.now,
        }
    }
}

impl Host {
    pub(super) fn new(
        number: usize,
        groups: Vec<GroupName>,
        version: u32,
        bad: Arc<RwLock<Bad>>,
        random: &mut StdRng,
    ) -> Self {
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&number.to_le_bytes());
        let body = Body::new(version, random.random(), bad);
        Self {
            name: format!("h{number}").parse().expect("an agent's name"),
            groups,
            serial: Serial(format!("{number:x}")),
            key: SigningKey::from_bytes(&seed),
            honest: true,
            cloned: false,
            body: Shared(Arc::new(Mutex::new(body))),
            agent: None,
            life: 0,
            left: false,
            cut: false,
            dialed: None,
            skew: SignedDuration::ZERO,
            slowness: 1.0,
            splay: Duration::ZERO,
            lies: Lies::default(),
        }
    }

    /// Another machine with the name, key and certificate of `host`.
    pub(super) fn clone_of(host: &Self, random: &mut StdRng) -> Self {
        let (version, bad) = {
            let body = host.body();
            (body.clamd.version, body.bad.clone())
        };
        Self {
            name: host.name.clone(),
            serial: host.serial.clone(),
            key: host.key.clone(),
            honest: true,
            cloned: true,
            ..Self::new(usize::MAX, host.groups.clone(), version, bad, random)
        }
    }

    /// Its disk and its clamd.
    pub(super) fn body(&self) -> MutexGuard<'_, Body> {
        self.body.lock()
    }

    /// Whether the agent runs.
    pub(super) fn is_up(&self) -> bool {
        self.agent.is_some()
    }

    /// Whether it is a member of the fleet that says what is so.
    pub(super) fn is_itself(&self) -> bool {
        self.honest && !self.cloned
    }

    /// What its receipts are checked with.
    pub(super) fn public_key(&self) -> PublicKey {
        PublicKey::of(&self.key)
    }

    pub(super) fn link(&self) -> Option<LinkNumber> {
        self.agent.as_ref()?.link
    }

    /// Where it is, in words.
    pub(super) fn said(&self) -> String {
        let Body { disk, clamd, .. } = &*self.body();
        let installed = disk.installed.as_ref();
        let installed = installed.map(|it| (it.set.manifest.generation, it.outcome, it.install));
        let journal = disk.journal.as_ref();
        let journal = journal.map(|it| (it.set.manifest.generation, &it.way, &it.step));
        let mark = disk.records.mark.as_ref().map(|kept| kept.mark.position);
        let agent = self.agent.as_ref();
        let agent = agent.map(|agent| agent.core.summary(ClamdState::Up));
        format!(
            "took {mark:?}, has {installed:?}, journal {journal:?}, agent {agent:?}, damaged {}, {clamd:?}",
            disk.is_damaged,
        )
    }

    /// The agent is gone; what is on disk stays.
    pub(super) fn crash(&mut self) {
        self.life += 1;
        self.agent = None;
        let mut body = self.body();
        (body.disk.has_crashed, body.asked) = (false, None);
    }

    pub(super) fn on(&mut self, event: HostEvent, sight: &mut Sight<'_>) {
        match event {
            HostEvent::Start => self.start(sight),
            HostEvent::Dial => {} // the network's matter
            HostEvent::Begin => {
                let Some(agent) = &mut self.agent else { return };
                agent.running.extend(agent.later.pop_front());
                self.work(sight);
            }
            HostEvent::LookAtClamd => {
                let Some(agent) = &mut self.agent else { return };
                if std::mem::take(&mut agent.is_probe_parked) {
                    let look = Task::Probe { unproven: false };
                    agent.running.push(agent.tasks.begin(look));
                    self.work(sight);
                }
            }
            HostEvent::Arrived(arrived, cuts) => self.arrived(*arrived, cuts, sight),
            HostEvent::Judge(proof) => {
                self.body().judge(proof);
                self.work(sight);
            }
            HostEvent::Tick => {
                let Some(agent) = &mut self.agent else { return };
                if agent.tick.take_if(|tick| *tick <= sight.now).is_some() {
                    let received = agent.received;
                    self.feed(Event::Tick(received), sight);
                }
            }
            HostEvent::Lie => self.lies_on(sight),
        }
    }

    /// Ends on disk what was interrupted, and goes on with it.
    fn start(&mut self, sight: &mut Sight<'_>) {
        let body = self.body.clone();
        let opened = Installer::with_storage(body.clone(), body);
        if self.has_crashed(sight) {
            return;
        }
        let installer = opened.expect("what was written can be read");
        let mut standing = installer.standing();
        let stands = standing.borrow_and_update().clone();
        let now = sight.now();
        let identity = Identity {
            fleet: sight.keys.fleet.clone(),
            agent: self.name.clone(),
            key: self.key.clone(),
        };
        let settings = Settings {
            stale: Stale::Warn,
            splay: self.splay,
            directory: PathBuf::from("/"),
            drift: DriftPolicy::Repair,
            rescan: Duration::from_secs(3600),
        };
        let (kept, random) = (self.kept(sight), sight.random.random());
        let stop = CancellationToken::new();
        self.agent = Some(Agent {
            core: Core::new(identity, settings, kept, stands, now, random),
            tasks: Tasks::new(installer, stop.clone()),
            stop,
            standing,
            running: Vec::new(),
            later: VecDeque::new(),
            parked_look: None,
            is_probe_parked: false,
            saw_wrong: true,
            link: None,
            retry: RETRY,
            receiving: BTreeMap::new(),
            cuts: 0,
            received: 0,
            tick: None,
            lying: None,
        });
        self.body().is_clamd_up();
        self.feed(Event::Watched(true), sight);
        self.feed(Event::Started, sight);
        if self.is_up() {
            sight.later(Duration::ZERO, HostEvent::Dial);
        }
    }

    /// What the last run left.
    fn kept(&self, sight: &Sight<'_>) -> Kept {
        let records = &self.body().disk.records;
        let mark = records.mark.clone();
        let left_alone = records.left_alone.clone().map(AnyLeftAlone::Now);
        let left_alone = left_alone.map(|record| record.kept(sight.now()));
        Kept {
            trust: Trust::new(sight.keys.clone(), mark.as_ref().map(|it| it.mark.clone())),
            accepted: mark.map(|it| it.accepted),
            receipts: records.receipts(),
            fresh: records.fresh.clone(),
            accepts: records.accepts.clone(),
            first_start: sight.clock,
            left_alone: left_alone.unwrap_or_default(),
        }
    }

    /// Whether the last write has ended this life of the host.
    fn has_crashed(&mut self, sight: &mut Sight<'_>) -> bool {
        let has_crashed = self.body().disk.has_crashed;
        if has_crashed {
            self.crash();
            sight.deeds.push(Deed::Crash);
        }
        has_crashed
    }

    // The core.

    /// Feeds the core, carries out what it says, and lets the tasks go on.
    fn feed(&mut self, event: Event, sight: &mut Sight<'_>) {
        self.handle(event, sight);
        self.work(sight);
    }

    fn handle(&mut self, event: Event, sight: &mut Sight<'_>) {
        let mut events = VecDeque::from([event]);
        if let Some(agent) = &mut self.agent
            && agent.standing.has_changed().unwrap_or(false)
        {
            let standing = agent.standing.borrow_and_update().clone();
            events.push_front(Event::Standing(standing));
        }
        while let Some(event) = events.pop_front() {
            let Some(agent) = &mut self.agent else { return };
            let (now, random) = (sight.now(), sight.random.random());
            for action in agent.core.handle(event, now, random) {
                events.extend(self.carry_out(action, sight));
                if self.has_crashed(sight) {
                    return;
                }
            }
        }
    }

    /// Lets the tasks go on until all of them wait for something.
    fn work(&mut self, sight: &mut Sight<'_>) {
        let mut context = Context::from_waker(Waker::noop());
        loop {
            let mut ended = None;
            if let Some(agent) = &mut self.agent {
                for (at, task) in agent.running.iter_mut().enumerate() {
                    if let Poll::Ready(event) = task.as_mut().poll(&mut context) {
                        ended = Some((at, event));
                        break;
                    }
                }
            }
            if self.has_crashed(sight) {
                return;
            }
            if let Some(proof) = self.body().asked.take() {
                let takes = self.takes(2.0, 40.0, sight);
                sight.later(takes, HostEvent::Judge(proof));
            }
            let (Some((at, event)), Some(agent)) = (ended, &mut self.agent) else {
                break;
            };
            drop(agent.running.remove(at));
            if let Event::Looked(looked) = &event {
                agent.saw_wrong = match &looked.look {
                    Look::Made(findings) => !findings.wrong.is_empty(),
                    Look::NotNow | Look::Stopped | Look::Blocked(_) => true,
                };
            }
            self.handle(event, sight);
        }
        self.set_tick(sight);
    }

    fn set_tick(&mut self, sight: &mut Sight<'_>) {
        let Some(agent) = &mut self.agent else { return };
        let Some(at) = agent.core.wake(sight.now()) else {
            return;
        };
        if agent.tick.is_none_or(|tick| at < tick) {
            agent.tick = Some(at);
            sight.later(at.saturating_duration_since(sight.now), HostEvent::Tick);
        }
    }

    /// Carries out one action; returns what the core must hear of at once.
    fn carry_out(&mut self, action: Action, sight: &mut Sight<'_>) -> Option<Event> {
        match action {
            Action::Save(record) => return self.save(record),
            Action::Say(connection, message) => self.says(connection, message, sight),
            Action::Note(_) | Action::Answer(_) => {}
            Action::Receive(_, file) => self.receives(file, sight),
            Action::Start(task) => self.begin(task, sight),
            Action::Cut(cut) => return self.breaks_off(cut, sight),
        }
        None
    }

    fn save(&mut self, record: Record) -> Option<Event> {
        let saved = record.awaited();
        let fate = self.body().write(|disk| disk.records.save(record));
        let failed = || StateError::Write {
            path: PathBuf::from("/"),
            source: io::Error::other("the disk failed"),
        };
        let result = match fate {
            Fate::Done => Ok(()),
            Fate::Fault | Fate::Crash => Err(failed()),
        };
        saved.map(|saved| Event::Saved(saved, result))
    }

    /// Begins a task: what reads or moves files takes its time.
    fn begin(&mut self, task: Task, sight: &mut Sight<'_>) {
        let mut body = self.body.lock();
        let Some(agent) = &mut self.agent else { return };
        match task {
            Task::Look(depth) if agent.core.is_opening() || agent.saw_wrong => {
                agent.running.push(agent.tasks.begin(Task::Look(depth)));
            }
            Task::Look(depth) => {
                let installed = body.disk.installed.as_deref();
                match installed.is_some_and(|installed| !body.wrong(installed).is_empty()) {
                    true => agent.running.push(agent.tasks.begin(Task::Look(depth))),
                    false => agent.parked_look = Some(depth),
                }
            }
            // Only a clamd that was seen with the set can be gone.
            Task::Probe { unproven: false } if !body.disk.is_live() || body.is_clamd_up() => {
                agent.is_probe_parked = true;
            }
            Task::Plan(..) | Task::Install(_) | Task::Repair => {
                agent.later.push_back(agent.tasks.begin(task));
                let takes = sight.random.random_range(0.1..3.0) * self.slowness;
                sight.later(Duration::from_secs_f64(takes), HostEvent::Begin);
            }
            Task::Resume | Task::Fault(..) | Task::Ping | Task::Probe { .. } | Task::Scan => {
                agent.running.push(agent.tasks.begin(task));
            }
        }
    }

    fn breaks_off(&mut self, cut: Cut, sight: &mut Sight<'_>) -> Option<Event> {
        let agent = self.agent.as_mut()?;
        agent.tasks.cut(cut);
        match cut {
            Cut::Transfers => {
                agent.cuts += 1;
                for file in agent.receiving.values().cloned() {
                    let cut = Err(interrupted(&file.name));
                    let event = HostEvent::Arrived(Box::new((file, cut)), agent.cuts);
                    sight.later(Duration::from_millis(10), event);
                }
                None
            }
            Cut::Look => {
                let depth = agent.parked_look.take()?;
                Some(looked(depth, Look::Stopped))
            }
            Cut::Probe => {
                let was_parked = std::mem::take(&mut agent.is_probe_parked);
                was_parked.then_some(Event::Probed(None))
            }
            Cut::Repair => None,
        }
    }

    /// How long something takes here, between these seconds on an ordinary host.
    fn takes(&self, from: f64, to: f64, sight: &mut Sight<'_>) -> Duration {
        Duration::from_secs_f64(sight.random.random_range(from..to) * self.slowness)
    }

    // The connection.

    /// How long to wait before the next try.
    pub(super) fn retry(&mut self, rejected: bool, was_welcome: bool, random: f64) -> Duration {
        let Some(agent) = &mut self.agent else {
            return Duration::ZERO;
        };
        if was_welcome && !rejected {
            agent.retry.reset();
        }
        agent.retry.next(random)
    }

    pub(super) fn lost(&mut self, link: LinkNumber, sight: &mut Sight<'_>) -> bool {
        if self.link() != Some(link) {
            return false;
        }
        if let Some(agent) = &mut self.agent {
            agent.link = None;
        }
        self.feed(
            Event::Disconnected("the connection was lost".to_owned()),
            sight,
        );
        true
    }

    pub(super) fn heard(&mut self, link: LinkNumber, told: Told, sight: &mut Sight<'_>) {
        let Some(agent) = &mut self.agent else { return };
        if let Told::Welcome = told {
            agent.link = Some(link);
        }
        if agent.link != Some(link) {
            return;
        }
        match told {
            Told::Welcome => {
                let clamd = self.body().clamd.report(ClamdState::Up, Proof::None);
                let greeting = Greeting {
                    connection: ConnectionId(link),
                    address: "192.0.2.1:7310".to_owned(),
                    welcome: Welcome {
                        fleet: sight.keys.fleet.clone(),
                        master_version: String::new(),
                        time: sight.clock,
                        keep_alive: 0,
                        keys: None,
                        accepts: [
                            Feature::WideNames,
                            Feature::LargeManifests,
                            Feature::ShortReceipts,
                        ]
                        .into_iter()
                        .collect(),
                        known: Vec::new(),
                    },
                    clamd,
                    hostname: None,
                };
                self.feed(Event::Welcome(Box::new(greeting)), sight);
                self.repeat_lies(sight);
            }
            Told::Offer {
                offer,
                manifest,
                fresh,
                rehash,
            } => {
                let told = Offered {
                    link,
                    offer,
                    manifest,
                    fresh,
                    rehash,
                };
                match self.honest {
                    true => self.offered(&told, sight),
                    false => self.lie(told, sight),
                }
            }
            Told::Part { offer, name } => {
                let part = Part {
                    offer,
                    name,
                    encoding: PartEncoding {
                        kind: PartKind::Full,
                        zstd: false,
                        from: None,
                        to: Digest::of(b""),
                        length: 0,
                    },
                    offset: 0,
                };
                self.feed(Event::Part(part), sight);
            }
            Told::Acknowledge(seq) => {
                self.lies.acknowledged(seq);
                self.feed(Event::Message(ToAgent::ReceiptAck { seq }), sight);
            }
        }
    }

    fn offered(&mut self, told: &Offered, sight: &mut Sight<'_>) {
        let offer = Offer {
            offer: told.offer,
            manifest: told.manifest.envelope().clone(),
            fresh: told.fresh.envelope().clone(),
            keys: None,
            rehash: told.rehash,
            full: false,
        };
        self.feed(Event::Message(ToAgent::Offer(Box::new(offer))), sight);
    }

    fn says(&mut self, connection: ConnectionId, message: ToMaster, sight: &mut Sight<'_>) {
        let said = match message {
            ToMaster::Hello(mut hello) => {
                if !self.honest {
                    hello.clamd.version = Some(self.claimed_version(sight));
                }
                Said::Hello(hello)
            }
            ToMaster::Need { offer, files } => {
                let files = files.into_iter().map(|need| need.name).collect();
                Said::Need { offer, files }
            }
            ToMaster::Progress {
                offer,
                phase,
                until,
            } => Said::Progress {
                offer,
                phase,
                until,
                sent: 0,
            },
            ToMaster::Receipt { receipt } => Said::Receipt(Box::new(receipt)),
            ToMaster::Error {
                offer: Some(offer),
                message,
                ..
            } => Said::Declined { offer, message },
            ToMaster::Error { offer: None, .. } => return,
            ToMaster::Reoffer {} => Said::Reoffer,
        };
        sight.deeds.push(Deed::Say(connection.0, said));
    }

    fn say(&self, said: Said, sight: &mut Sight<'_>) {
        if let Some(link) = self.link() {
            sight.deeds.push(Deed::Say(link, said));
        }
    }

    // Files that arrive.

    fn receives(&mut self, file: ManifestFile, sight: &mut Sight<'_>) {
        let is_full = self.body().disk.trouble == Trouble::Full;
        let name = file.name.clone();
        let result = match sight.random.random_range(0..100) {
            _ if is_full => Err(ReceiveError::Host {
                name,
                source: fault("write"),
            }),
            0..3 => Err(interrupted(&name)),
            3..5 => Err(ReceiveError::Damaged {
                name,
                reason: "a bit".to_owned(),
            }),
            _ => Ok(()),
        };
        let takes = self.takes(0.1, 20.0, sight);
        if let Some(agent) = &mut self.agent {
            agent.receiving.insert(file.name.clone(), file.clone());
            sight.later(
                takes,
                HostEvent::Arrived(Box::new((file, result)), agent.cuts),
            );
        }
    }

    fn arrived(
        &mut self,
        (file, result): (ManifestFile, Result<(), ReceiveError>),
        cuts: u32,
        sight: &mut Sight<'_>,
    ) {
        let Some(agent) = &mut self.agent else { return };
        if cuts != agent.cuts || agent.receiving.remove(&file.name).is_none() {
            return; // it was cut short, of which the core has heard or hears soon
        }
        agent.received += 1;
        if result.is_ok() {
            self.body().disk.stage.insert(file.sha256);
        }
        self.feed(Event::Received(file.name, result), sight);
    }

    // What happens to the machine.

    /// clamd has stopped: that is seen within the minute between two looks at it.
    pub(super) fn clamd_stopped(&mut self, sight: &mut Sight<'_>) {
        self.body().clamd.stop();
        let after = Duration::from_millis(sight.random.random_range(0..60_000));
        sight.later(after, HostEvent::LookAtClamd);
    }

    /// Somebody stops the agent, which has time to end what it is at.
    pub(super) fn stop(&mut self, sight: &mut Sight<'_>) {
        self.handle(Event::Stopping, sight);
        if let Some(agent) = &mut self.agent {
            agent.stop.cancel();
            agent.running.extend(agent.later.drain(..));
        }
        self.work(sight);
        self.handle(Event::Stopped, sight);
        self.crash();
    }

    /// A file was lost that only the master has.
    pub(super) fn damage(&mut self, sight: &mut Sight<'_>) {
        {
            let disk = &mut self.body().disk;
            let name = disk.databases.keys().next().cloned();
            let Some(name) = name.filter(|_| disk.journal.is_none()) else {
                return;
            };
            let lost = disk.databases.remove(&name).expect("it is a key");
            disk.previous.remove(&lost.sha256);
            disk.stage.remove(&lost.sha256);
            disk.is_damaged = true;
        }
        let Some(agent) = &mut self.agent else { return };
        if let Some(depth) = agent.parked_look.take() {
            agent.running.push(agent.tasks.begin(Task::Look(depth)));
        }
        self.feed(Event::Touched { run_begun: false }, sight);
    }
}

fn interrupted(name: &DatabaseName) -> ReceiveError {
    ReceiveError::Interrupted {
        name: name.clone(),
        source: io::ErrorKind::ConnectionReset.into(),
    }
}

/// What a look came to.
fn looked(depth: Depth, look: Look) -> Event {
    Event::Looked(Box::new(Looked {
        depth,
        look,
        updater: None,
        clamd: ClamdReport::default(),
    }))
}

/// An offer as the master sent it.
struct Offered {
    link: LinkNumber,
    offer: OfferId,
    manifest: Arc<Verified<Manifest>>,
    fresh: Arc<Verified<clamcast_proto::fresh::Freshness>>,
    rehash: bool,
}
