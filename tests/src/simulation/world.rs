//! The world: time passes from one event to the next, and everything meets here.

use std::collections::VecDeque;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use clamcast_master::fleet::dispatch::Now;
use clamcast_proto::Epoch;
use clamcast_proto::dsse::{PublicKey, Verified, sign};
use clamcast_proto::keys::KeySet;
use ed25519_dalek::SigningKey;
use jiff::{SignedDuration, Timestamp};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::agenda::Agenda;
use super::contents::Bad;
use super::faults::{self, Fault};
use super::host::{Deed, Host, HostEvent, Sight};
use super::master::{Master, MasterDeed, MasterEvent, MasterSight};
use super::network::{Line, LinkNumber, Network, Said, Told};
use super::promises::{Promise, Promises};
use super::rules::Witness;
use super::{Report, Size};

/// So long after the last fault everybody must have come to rest: two days of windows, silence that
/// counts as trouble, and a rollout or two.
const PATIENCE: Duration = Duration::from_secs(4 * 24 * 3600);

/// Time between two questions whether they have.
const CALM_LOOK: Duration = Duration::from_secs(900);

/// Events that a failure shows.
const SHOWN: usize = 60;

/// Everything.
pub(super) struct World {
    pub(super) size: Size,
    pub(super) random: StdRng,
    start: Instant,
    clock: Timestamp,
    pub(super) now: Duration,
    agenda: Agenda<Event>,
    pub(super) hosts: Vec<Host>,
    pub(super) network: Network,
    pub(super) master: Master,
    pub(super) witness: Witness,
    pub(super) promises: Promises,
    pub(super) bad: Arc<RwLock<Bad>>,
    keys: Verified<KeySet>,
    /// How far the master's clock is ahead.
    pub(super) skew: SignedDuration,
    /// Whether anything still goes wrong.
    pub(super) faulty: bool,
    pub(super) report: Report,
    last: VecDeque<String>,
}

/// What happens.
#[derive(Debug)]
pub(super) enum Event {
    /// On a host, in this life of it.
    Host(usize, u32, HostEvent),
    /// In the master, in this life of it.
    Master(u32, MasterEvent),
    /// A host's certificate was checked.
    Connected(LinkNumber),
    /// Something that was said arrives.
    AtMaster(LinkNumber, Said),
    /// Something that was told arrives.
    AtHost(LinkNumber, Told),
    /// The master notices that a connection has ended.
    MasterLoses(LinkNumber),
    /// The host does; whether it was sent away.
    HostLoses(LinkNumber, bool),
    /// The process begins.
    MasterStarts,
    /// Something goes wrong, or somebody does something.
    Fault,
    /// A fault is over.
    Over(Fault),
    /// From now on nothing goes wrong.
    Heal,
    /// What was promised to honest hosts is due.
    Promise(Promise),
    /// Has everybody come to rest?
    Calm,
}

impl World {
    pub(super) fn new(seed: u64, size: Size) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let [root, manifest, audit] = [1, 2, 3].map(|seed| SigningKey::from_bytes(&[seed; 32]));
        let keys = KeySet {
            fleet: "bank".parse().expect("a fleet's name"),
            version: 1,
            epoch: Epoch(1),
            issued: Timestamp::UNIX_EPOCH,
            root: PublicKey::of(&root),
            manifest: vec![PublicKey::of(&manifest)],
            audit: vec![PublicKey::of(&audit)],
        };
        let rules = faults::rules(&size, &mut random);
        let begins = SignedDuration::from_secs(random.random_range(0..7 * 24 * 3600));
        let monday: Timestamp = "2026-03-02T00:00:00Z".parse().expect("a time");
        let bad = Arc::<RwLock<Bad>>::default();
        Self {
            size,
            hosts: faults::hosts(&size, &bad, &mut random),
            start: Instant::now(),
            clock: monday + begins,
            now: Duration::ZERO,
            agenda: Agenda::new(),
            network: Network::default(),
            master: Master::new(manifest, rules.clone(), &size),
            witness: Witness::new(rules),
            promises: Promises::default(),
            bad,
            keys: sign(keys, &root),
            skew: SignedDuration::ZERO,
            faulty: true,
            report: Report::default(),
            last: VecDeque::new(),
            random,
        }
    }

    pub(super) fn run(&mut self) -> Report {
        self.set(Duration::ZERO, Event::MasterStarts);
        for number in 0..self.hosts.len() {
            let late = if !self.size.only_lies && self.random.random_bool(0.1) {
                7200
            } else {
                60
            };
            let after = Duration::from_millis(self.random.random_range(0..late * 1000));
            self.set(after, Event::Host(number, 0, HostEvent::Start));
        }
        self.set(self.size.between_faults, Event::Fault);
        self.set(self.size.faults, Event::Heal);
        while let Some((at, event)) = self.agenda.next() {
            self.now = at;
            self.report.events += 1;
            if self.hosts.len() < 1000 {
                self.last
                    .push_back(format!("{:9.3} {event:.120?}", at.as_secs_f64()));
                if self.last.len() > SHOWN {
                    self.last.pop_front();
                }
            }
            if let Event::Calm = event {
                match self.is_calm() {
                    Ok(()) => break,
                    Err(reason) => assert!(
                        self.now < self.size.faults + PATIENCE,
                        "nobody has come to rest {PATIENCE:?} after the last fault: {reason}"
                    ),
                }
                self.set(CALM_LOOK, Event::Calm);
            } else {
                self.happens(event);
            }
        }
        let witness = &self.witness;
        Report {
            published: witness.publications(),
            offers: witness.offers,
            receipts: witness.receipts,
            completed: witness.completed,
            halted: witness.halted,
            promises: self.promises.kept,
            trace: witness.trace(),
            ..self.report.clone()
        }
    }

    pub(super) fn now(&self) -> Duration {
        self.now
    }

    pub(super) fn last_events(&self) -> String {
        let told = self.witness.told.iter();
        let last: Vec<_> = told.chain(&self.last).map(String::as_str).collect();
        last.join("\n")
    }

    pub(super) fn set(&mut self, after: Duration, event: Event) {
        self.agenda.set(self.now + after, event);
    }

    /// What the master's clock shows.
    pub(super) fn clock(&self) -> Timestamp {
        let since = SignedDuration::try_from(self.now).expect("a few days");
        self.clock + since + self.skew
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::Host(number, life, event) => {
                let host = &self.hosts[number];
                if host.life != life
                    || host.left
                    || (!host.is_up() && !matches!(event, HostEvent::Start))
                {
                    return;
                }
                if let HostEvent::Dial = event {
                    self.dial(number);
                } else {
                    self.on_host(number, |host, sight| host.on(event, sight));
                }
            }
            Event::Master(life, event) => {
                if self.master.life == life {
                    self.on_master(|master, sight| master.on(event, sight));
                }
            }
            Event::Connected(link) => self.connected(link),
            Event::AtMaster(link, said) => {
                if let Some(number) = self.arrives(link) {
                    let key = self.hosts[number].public_key();
                    let before = self.targets_before(number);
                    self.on_master(|master, sight| master.heard(link, said, &key, sight));
                    self.targets_after(number, before);
                }
            }
            Event::AtHost(link, told) => {
                if let Some(number) = self.arrives(link) {
                    if let Told::Welcome = told {
                        let line = self.network.lines.get_mut(&link);
                        line.expect("it just arrived on it").welcomed = true;
                    }
                    self.on_host(number, |host, sight| host.heard(link, told, sight));
                }
            }
            Event::MasterLoses(link) => {
                let life = self.network.lines.get(&link).map(|line| line.master_life);
                if life == Some(self.master.life) {
                    self.on_master(|master, sight| master.disconnected(link, sight));
                }
                self.ended(link);
            }
            Event::HostLoses(link, rejected) => {
                self.host_loses(link, rejected);
                self.ended(link);
            }
            Event::MasterStarts => {
                if self.master.running.is_none() {
                    self.on_master(Master::start);
                }
            }
            Event::Fault => self.fault(),
            Event::Over(fault) => self.over(fault),
            Event::Heal => {
                self.heal();
                self.set(CALM_LOOK, Event::Calm);
            }
            Event::Promise(promise) => self.is_kept(&promise),
            Event::Calm => unreachable!("the loop's matter"),
        }
    }

    // The two sides.

    pub(super) fn on_host(&mut self, number: usize, act: impl FnOnce(&mut Host, &mut Sight<'_>)) {
        let host = &mut self.hosts[number];
        let since = SignedDuration::try_from(self.now).expect("a few days");
        let mut sight = Sight {
            now: self.start + self.now,
            clock: self.clock + since + host.skew,
            keys: &self.keys,
            random: &mut self.random,
            deeds: Vec::new(),
        };
        act(host, &mut sight);
        let deeds = sight.deeds;
        self.witness.looks_at(number, &self.hosts[number]);
        self.is_live(number);
        let life = self.hosts[number].life;
        let crashed = deeds.iter().any(|deed| matches!(deed, Deed::Crash));
        for deed in deeds {
            match deed {
                Deed::Say(link, said) => self.say(link, said),
                Deed::Later(after, event) if !crashed => {
                    self.set(after, Event::Host(number, life, event));
                }
                Deed::Later(..) => {}
                Deed::Crash => self.host_crashed(number),
                Deed::Vanish(long) => {
                    self.hosts[number].cut = true;
                    if let Some(link) = self.hosts[number].dialed {
                        self.break_line(link);
                    }
                    self.set(long, Event::Over(Fault::Cut(number)));
                }
            }
        }
    }

    pub(super) fn on_master<T>(
        &mut self,
        act: impl FnOnce(&mut Master, &mut MasterSight<'_>) -> T,
    ) -> T {
        let mut sight = MasterSight {
            now: Now {
                clock: self.clock(),
                at: self.start + self.now,
            },
            random: &mut self.random,
            witness: &mut self.witness,
            deeds: Vec::new(),
        };
        let done = act(&mut self.master, &mut sight);
        let deeds = sight.deeds;
        let life = self.master.life;
        for deed in deeds {
            match deed {
                MasterDeed::Tell(link, told) => self.tell(link, told),
                MasterDeed::Close(link, rejected) => {
                    if let Some(line) = self.network.lines.get_mut(&link) {
                        line.whole = false;
                        let after = self.delay();
                        self.set(after, Event::HostLoses(link, rejected));
                        self.set(after, Event::MasterLoses(link));
                    }
                }
                MasterDeed::Later(after, event) => self.set(after, Event::Master(life, event)),
            }
        }
        self.promises_follow();
        done
    }

    /// The agent of a host is gone, and comes back after a while.
    pub(super) fn host_crashed(&mut self, number: usize) {
        self.report.host_crashes += 1;
        if let Some(link) = self.hosts[number].dialed {
            self.break_line(link);
        }
        let after = Duration::from_millis(self.random.random_range(500..120_000));
        let life = self.hosts[number].life;
        self.set(after, Event::Host(number, life, HostEvent::Start));
    }

    pub(super) fn master_crashes(&mut self) {
        if self.master.running.is_none() {
            return;
        }
        self.report.master_crashes += 1;
        let life = self.master.life;
        self.master.crash(&mut self.random, &mut self.witness);
        let lines = self.network.lines.iter_mut();
        let mut broken = Vec::new();
        for (link, line) in lines.filter(|(_, line)| line.master_life == life && line.whole) {
            line.whole = false;
            broken.push(*link);
        }
        for link in broken {
            let after = self.unnoticed();
            self.set(after, Event::HostLoses(link, false));
            self.set(after, Event::MasterLoses(link));
        }
        let after = Duration::from_millis(self.random.random_range(1000..300_000));
        self.set(after, Event::MasterStarts);
    }

    // The network.

    fn dial(&mut self, number: usize) {
        let no_answer = self.hosts[number].cut
            || self.master.running.is_none()
            || self.random.random_bool(self.loss());
        if no_answer {
            let random = self.random.random();
            let host = &mut self.hosts[number];
            let wait = host.retry(false, false, random) + Duration::from_secs(10);
            let life = host.life;
            return self.set(wait, Event::Host(number, life, HostEvent::Dial));
        }
        let link = self.network.connect(Line {
            host: number,
            host_life: self.hosts[number].life,
            master_life: self.master.life,
            whole: true,
            welcomed: false,
            ends: 0,
            at_host: self.now,
            at_master: self.now,
        });
        self.hosts[number].dialed = Some(link);
        let handshake = self.delay() * 2;
        self.set(handshake, Event::Connected(link));
    }

    fn connected(&mut self, link: LinkNumber) {
        let Some(number) = self.arrives(link) else {
            return;
        };
        let host = &self.hosts[number];
        let (name, groups, serial) = (host.name.clone(), host.groups.clone(), host.serial.clone());
        self.on_master(|master, sight| master.connected(link, &name, &groups, &serial, sight));
    }

    /// The host of a connection on which something can arrive.
    fn arrives(&self, link: LinkNumber) -> Option<usize> {
        let line = self.network.lines.get(&link)?;
        let there = line.whole
            && self.hosts[line.host].life == line.host_life
            && self.master.life == line.master_life
            && self.master.running.is_some();
        there.then_some(line.host)
    }

    fn say(&mut self, link: LinkNumber, said: Said) {
        let (delay, lost) = (self.delay(), self.random.random_bool(self.loss()));
        let Some(line) = self.network.lines.get_mut(&link).filter(|line| line.whole) else {
            return;
        };
        if lost {
            return self.break_line(link);
        }
        line.at_master = line.at_master.max(self.now + delay);
        let at = line.at_master;
        self.agenda.set(at, Event::AtMaster(link, said));
    }

    fn tell(&mut self, link: LinkNumber, told: Told) {
        let (delay, lost) = (self.delay(), self.random.random_bool(self.loss()));
        let Some(line) = self.network.lines.get_mut(&link).filter(|line| line.whole) else {
            return;
        };
        if lost {
            return self.break_line(link);
        }
        let at = match told {
            // On a stream of its own.
            Told::Part { .. } => self.now + delay,
            Told::Welcome | Told::Offer { .. } | Told::Acknowledge(_) => {
                line.at_host = line.at_host.max(self.now + delay);
                line.at_host
            }
        };
        self.agenda.set(at, Event::AtHost(link, told));
    }

    /// Nothing comes through any more; each side notices some time.
    pub(super) fn break_line(&mut self, link: LinkNumber) {
        let Some(line) = self.network.lines.get_mut(&link).filter(|line| line.whole) else {
            return;
        };
        line.whole = false;
        let (host, master) = (self.unnoticed(), self.unnoticed());
        self.set(host, Event::HostLoses(link, false));
        self.set(master, Event::MasterLoses(link));
    }

    fn host_loses(&mut self, link: LinkNumber, rejected: bool) {
        let Some(line) = self.network.lines.get(&link) else {
            return;
        };
        let (number, welcomed, life) = (line.host, line.welcomed, line.host_life);
        let host = &self.hosts[number];
        if host.life != life || !host.is_up() || host.left {
            return;
        }
        let mut was_current = false;
        self.on_host(number, |host, sight| was_current = host.lost(link, sight));
        if was_current || !welcomed {
            let random = self.random.random();
            let wait = self.hosts[number].retry(rejected, welcomed, random);
            self.set(wait, Event::Host(number, life, HostEvent::Dial));
        }
    }

    /// One side knows.
    fn ended(&mut self, link: LinkNumber) {
        if let Some(line) = self.network.lines.get_mut(&link) {
            line.ends += 1;
            if line.ends == 2 {
                self.network.lines.remove(&link);
            }
        }
    }

    fn loss(&self) -> f64 {
        match (self.faulty, self.size.only_lies) {
            (false, _) => 0.0,
            (true, false) => 0.002,
            (true, true) => 0.0003,
        }
    }

    /// Has a failure show this among the last events.
    pub(super) fn note(&mut self, text: String) {
        self.last.push_back(text);
    }

    fn delay(&mut self) -> Duration {
        let slow = self.faulty && self.random.random_bool(0.02);
        Duration::from_millis(self.random.random_range(1..if slow { 8000 } else { 120 }))
    }

    /// How long one side takes the other for being there.
    fn unnoticed(&mut self) -> Duration {
        Duration::from_millis(self.random.random_range(10..30_000))
    }
}
