//! What goes wrong, and what people do, at random.

use std::sync::{Arc, RwLock};
use std::time::Duration;

use clamcast_daemon::values::Percent;
use clamcast_master::config::Rules;
use clamcast_master::fleet::rollout::Order;
use clamcast_proto::GroupName;
use clamcast_proto::identity::Serial;
use clamcast_proto::revocation::{RevocationList, Revoked};
use jiff::SignedDuration;
use rand::Rng as _;
use rand::rngs::StdRng;

use super::Size;
use super::contents::{Bad, CLAMD_VERSIONS, EVERY_CLAMD};
use super::disk::Trouble;
use super::host::{Host, HostEvent};
use super::master::{MasterEvent, target};
use super::world::{Event, World};

/// What lasts for a while.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    /// A host's packets are lost.
    Cut(usize),
    /// A host's disk is full.
    Full(usize),
    /// A host's clamd is stopped.
    Clamd(usize),
    /// A host is slow.
    Slow(usize),
    /// A revoked host waits for a new certificate.
    Revoked(usize),
}

/// Hosts of a fleet that is called large: what would touch one host touches one in so many there,
/// and it rolls out as most do.
const LARGE: usize = 1000;

/// How this fleet's rollouts go.
pub(super) fn rules(size: &Size, random: &mut StdRng) -> Rules {
    let hosts = size.hosts;
    let waves: &[&str] = match random.random_range(0..8) {
        0..4 if size.only_lies => &["group:canary", "40%", "100%"],
        _ if size.only_lies => &["group:canary", "100%"],
        _ if hosts > LARGE => &["group:canary", "10%", "100%"],
        0..3 => &["group:canary", "10%", "100%"],
        3 => &["group:canary", "100%"],
        4 => &["1", "30%", "100%"],
        5 => &["group:canary", "group:web", "100%"],
        6 => &["group:canary", "group:night", "5", "50%"],
        _ => &["group:nobody", "group:canary", "20%", "60%", "100%"],
    };
    let percent = |of: u8| Percent::new(of).expect("a percentage");
    let mut rules = Rules {
        waves: waves
            .iter()
            .map(|wave| wave.parse().expect("a wave"))
            .collect(),
        settle: Duration::from_secs([0, 60, 600][random.random_range(0..3)]),
        refused_max: percent([0, 2, 10][random.random_range(0..3)]),
        unwell_max: percent([5, 20, 50][random.random_range(0..3)]),
        rollback_on_halt: random.random_bool(0.8),
        deadline: Duration::from_secs(900),
        windows: Default::default(),
    };
    if hosts <= LARGE && !size.only_lies && random.random_bool(0.4) {
        let window = "Mon-Sun 22:00-05:00 Europe/Berlin"
            .parse()
            .expect("a window");
        rules.windows.insert(group("night"), vec![window]);
    }
    rules
}

/// The hosts at the beginning: a few canaries or none, and some that lie.
pub(super) fn hosts(size: &Size, bad: &Arc<RwLock<Bad>>, random: &mut StdRng) -> Vec<Host> {
    let count = size.hosts;
    let rare = random.random_range(0.0..0.5);
    let (canaries, liars) = match count > LARGE {
        _ if size.only_lies => (random.random_range(5..13), random.random_range(0.05..0.3)),
        true => (count / LARGE, 0.0005),
        false => (
            random.random_range(0..4),
            [0.0, 0.0, 0.03, 0.1][random.random_range(0..4)],
        ),
    };
    let host = |number| {
        let mut groups = Vec::new();
        if number < canaries {
            groups.push(group("canary"));
        }
        for (name, of) in [("web", 0.3), ("night", 0.2)] {
            if random.random_bool(of) {
                groups.push(group(name));
            }
        }
        let version = match size.only_lies {
            true => u32::from(random.random_bool(rare)),
            false => random.random_range(0..CLAMD_VERSIONS),
        };
        let mut host = Host::new(number, groups, version, bad.clone(), random);
        if size.only_lies {
            host.slowness = random.random_range(1.0..8.0);
        }
        host.honest = !random.random_bool(liars);
        if random.random_bool(0.2) {
            host.splay = Duration::from_secs(random.random_range(1..600));
        }
        host
    };
    let mut hosts: Vec<_> = (0..count).map(host).collect();
    if count <= LARGE && random.random_bool(0.2) {
        let number = random.random_range(0..count);
        hosts[number].cloned = true;
        hosts.push(Host::clone_of(&hosts[number], random));
    }
    hosts
}

fn group(name: &str) -> GroupName {
    name.parse().expect("a group's name")
}

impl World {
    /// Something happens, and the next is set.
    pub(super) fn fault(&mut self) {
        if !self.faulty {
            return;
        }
        let wait = self
            .size
            .between_faults
            .mul_f64(self.random.random_range(0.1..1.9));
        self.set(wait, Event::Fault);
        if self.size.only_lies {
            return self.mirror_changes();
        }
        let kind = self.random.random_range(0..100);
        let hosts = match kind {
            0..53 => self.hosts.len().div_ceil(LARGE),
            _ => 1,
        };
        for _ in 0..hosts {
            let number = self.random.random_range(0..self.hosts.len());
            self.strikes(kind, number);
        }
    }

    fn strikes(&mut self, kind: u32, number: usize) {
        let host = &mut self.hosts[number];
        match kind {
            0..8 => self.host_stops(number),
            8..14 => {
                let after = self.random.random_range(0..24);
                let troubles = [Trouble::Crash(after), Trouble::Fault(after)];
                host.body().disk.trouble = troubles[self.random.random_range(0..2)];
            }
            14..17 => {
                host.body().disk.trouble = Trouble::Full;
                self.lasts(7200, Fault::Full(number));
            }
            17..21 => {
                for _ in 0..self.random.random_range(1..12) {
                    let number = self.random.random_range(0..self.hosts.len());
                    self.hosts[number].cut = true;
                    self.breaks(number);
                    self.lasts(3600, Fault::Cut(number));
                }
            }
            21..28 => self.breaks(number),
            28..33 => {
                self.on_host(number, Host::clamd_stopped);
                self.lasts(5400, Fault::Clamd(number));
            }
            33..38 => {
                host.slowness = self.random.random_range(1.0..60.0);
                self.lasts(3600, Fault::Slow(number));
            }
            38..41 => {
                let jump = self.random.random_range(-100_000..100_000);
                host.skew = SignedDuration::from_secs(jump);
            }
            41..44 => {
                if host.is_up() && host.honest {
                    self.on_host(number, Host::damage);
                }
            }
            44..46 => self.comes(),
            46..47 => self.leaves(number),
            47..49 => self.is_revoked(number),
            49..51 => {
                let canary = group("canary");
                match host.groups.iter().position(|it| *it == canary) {
                    Some(at) => drop(host.groups.remove(at)),
                    None => host.groups.push(canary),
                }
                self.breaks(number); // the certificate is checked anew
            }
            51..53 => {
                let jump = self.random.random_range(-7200..7200);
                self.skew = SignedDuration::from_secs(jump);
            }
            53..56 => self.master_crashes(),
            56..72 => self.mirror_changes(),
            _ => self.operator(),
        }
    }

    /// What was set to last ends after at most so many seconds.
    fn lasts(&mut self, seconds: u64, fault: Fault) {
        let after = Duration::from_secs(self.random.random_range(1..seconds));
        self.set(after, Event::Over(fault));
    }

    pub(super) fn over(&mut self, fault: Fault) {
        match fault {
            Fault::Cut(number) => self.hosts[number].cut = false,
            Fault::Full(number) => {
                let disk = &mut self.hosts[number].body().disk;
                if disk.trouble == Trouble::Full {
                    disk.trouble = Trouble::None;
                }
            }
            Fault::Clamd(number) => self.clamd_starts(number),
            Fault::Slow(number) => self.hosts[number].slowness = 1.0,
            Fault::Revoked(number) => {
                let version = self.master.revocations().map_or(0, |list| list.version);
                self.hosts[number].serial = Serial(format!("{number:x}-{version}"));
            }
        }
    }

    /// From now on nothing goes wrong.
    pub(super) fn heal(&mut self) {
        self.faulty = false;
        self.skew = SignedDuration::ZERO;
        for number in 0..self.hosts.len() {
            let host = &mut self.hosts[number];
            host.cut = false;
            host.body().disk.trouble = Trouble::None;
            host.slowness = 1.0;
            host.skew = SignedDuration::ZERO;
            self.clamd_starts(number);
        }
    }

    fn clamd_starts(&mut self, number: usize) {
        let mut body = self.hosts[number].body();
        body.clamd.wanted = true;
        body.is_clamd_up();
    }

    fn host_stops(&mut self, number: usize) {
        let reboots = self.random.random_bool(0.5);
        let has_time = self.random.random_bool(0.5);
        let host = &mut self.hosts[number];
        if host.is_up() && !host.left {
            if has_time {
                self.on_host(number, Host::stop);
            }
            let host = &mut self.hosts[number];
            host.crash();
            if reboots {
                host.body().clamd.loaded = None; // it starts again with the host
            }
            self.host_crashed(number);
        }
    }

    fn breaks(&mut self, number: usize) {
        if let Some(link) = self.hosts[number].link() {
            self.break_line(link);
        }
    }

    fn comes(&mut self) {
        let number = self.hosts.len();
        let web = vec![group("web")];
        let version = self.random.random_range(0..CLAMD_VERSIONS);
        let bad = self.bad.clone();
        let host = Host::new(number, web, version, bad, &mut self.random);
        self.hosts.push(host);
        self.set(Duration::ZERO, Event::Host(number, 0, HostEvent::Start));
    }

    fn leaves(&mut self, number: usize) {
        self.breaks(number);
        self.hosts[number].crash();
        self.hosts[number].left = true;
    }

    fn is_revoked(&mut self, number: usize) {
        if self.master.running.is_none() {
            return;
        }
        let host = &self.hosts[number];
        let entry = Revoked {
            name: host.name.clone(),
            serial: host.serial.clone(),
            time: self.clock(),
            reason: None,
        };
        let before = self.master.revocations();
        let mut revoked = before.map_or_else(Vec::new, |list| list.revoked.clone());
        revoked.push(entry);
        let list = RevocationList {
            fleet: "bank".parse().expect("a fleet's name"),
            version: before.map_or(1, |list| list.version + 1),
            issued: self.clock(),
            revoked,
        };
        self.on_master(|master, sight| master.revoke(list, sight));
        if self.random.random_bool(0.7) {
            self.lasts(1800, Fault::Revoked(number));
        }
    }

    /// New databases, of which some clamds, or all, cannot load a part.
    fn mirror_changes(&mut self) {
        self.master.disk.mirror += 1;
        if self.random.random_bool(0.35) {
            let versions = match self.random.random_bool(0.5) {
                true => EVERY_CLAMD,
                false => self.random.random_range(1..EVERY_CLAMD),
            };
            let mut bad = self.bad.write().expect("nothing panics with it");
            bad.set(self.master.disk.mirror, versions);
        }
        self.publish(false);
    }

    fn publish(&mut self, accept: bool) {
        let supersede = !self.size.only_lies && self.random.random_bool(0.1);
        let life = self.master.life;
        if self.master.running.is_some() {
            let event = MasterEvent::Publish { accept, supersede };
            self.set(Duration::from_millis(1), Event::Master(life, event));
        }
    }

    fn operator(&mut self) {
        if self.master.running.is_none() {
            return;
        }
        let number = self.random.random_range(0..self.hosts.len());
        let why = || "so an operator says".to_owned();
        let groups = ["canary", "web", "night"];
        let group = group(groups[self.random.random_range(0..groups.len())]);
        let published = &self.master.disk.published;
        let any = match published.len() {
            0 => None,
            many => Some(target(&published[self.random.random_range(0..many)])),
        };
        let may_return = any.filter(|any| !self.master.is_rejected(&any.content));
        let host = || self.hosts[number].name.clone();
        let order = match (self.random.random_range(0..32), any, may_return) {
            (0..3, ..) => Order::Pause(why()),
            (3..12, ..) => Order::Resume(None),
            (12..14, ..) => Order::Abort(why()),
            (14..17, ..) => Order::Promote(why()),
            (17..19, _, Some(to)) => Order::RollBack(to, why()),
            (19..21, Some(at), _) => Order::Pin(group, Some(at), None),
            (21..22, ..) => Order::Pin(group, None, None),
            (22..26, ..) => Order::Unpin(group, None),
            (26, ..) => return self.publish(true),
            (27, ..) => Order::Supersede,
            (28, ..) => Order::SetAside(host(), why()),
            (29, ..) => Order::Restore(host(), None),
            _ => {
                let name = host();
                return self.on_master(|master, sight| master.force(&name, sight));
            }
        };
        // An order that makes no sense now is refused with a reason.
        let _ = self.on_master(|master, sight| master.order(order, sight));
    }
}
