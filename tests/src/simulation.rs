//! A whole fleet in one thread: the real cores of master and agent over a network, disks, clocks and
//! clamds that are made up.
//!
//! Everything that happens follows from one seed. The master is the real `Dispatcher` with its `Fleet`
//! and `Rollout`. A host is the real `Core` with the real `Installer`, `Tasks` and back-off. Manifests,
//! freshness statements and receipts are signed and checked. What is made up is what they act on:
//! sockets, disks, clamds (`host/body.rs`), and the code around the core and the dispatcher, which does
//! what the keeper, the hub, the recorder and the publisher do; and everything that goes wrong: see
//! `faults.rs`. The rules that must hold are functions
//! in `rules.rs`, asked after every event that could break them; `calm.rs` says what must have
//! become of everybody some time after the last fault.

mod agenda;
mod calm;
mod contents;
mod disk;
mod faults;
mod host;
mod master;
mod network;
mod promises;
mod rules;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use world::World;

/// How large a run is, and what may go wrong in it.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Hosts at the beginning.
    pub hosts: usize,
    /// How long faults go on.
    pub faults: Duration,
    /// Mean time between two of them.
    pub between_faults: Duration,
    /// Time between two looks of the master at the rollout when nothing happens.
    pub look: Duration,
    /// Shortest time between two of them.
    pub looks_apart: Duration,
    /// Entries that wait for the master's disk when it offers nothing more.
    pub backlog: u64,
    /// Whether nothing goes wrong but what dishonest hosts do.
    pub only_lies: bool,
}

impl Size {
    /// A small fleet with much trouble: a second of a machine's time for dozens of such runs.
    pub const SMALL: Self = Self {
        hosts: 24,
        faults: Duration::from_secs(6 * 3600),
        between_faults: Duration::from_secs(90),
        look: Duration::from_secs(20),
        looks_apart: Duration::from_millis(50),
        backlog: 8,
        only_lies: false,
    };

    /// A fleet with many dishonest hosts among well ones.
    pub const LIARS: Self = Self {
        hosts: 40,
        faults: Duration::from_secs(8 * 3600),
        between_faults: Duration::from_secs(900),
        look: Duration::from_secs(5),
        looks_apart: Duration::from_millis(50),
        backlog: 8,
        only_lies: true,
    };

    /// As many agents as five masters may have.
    pub const LARGE: Self = Self {
        hosts: 100_000,
        faults: Duration::from_secs(300),
        between_faults: Duration::from_secs(15),
        look: Duration::from_secs(900),
        looks_apart: Duration::from_secs(180),
        backlog: u64::MAX, // it is looked at too seldom for more than one round of offers
        only_lies: false,
    };
}

/// What a run came to. Two runs of one seed have the same.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Report {
    /// Events.
    pub events: u64,
    /// Generations that were published.
    pub published: usize,
    /// Offers that were sent.
    pub offers: u64,
    /// Receipts that the master took.
    pub receipts: u64,
    /// Rollouts that every wave went through.
    pub completed: u64,
    /// Rollouts that halted by themselves.
    pub halted: u64,
    /// Crashes of the master.
    pub master_crashes: u64,
    /// Crashes of hosts.
    pub host_crashes: u64,
    /// Rollouts of which all promises to honest hosts were checked: see `promises.rs`.
    pub promises: u64,
    /// What the master noted, folded into a number.
    pub trace: u64,
}

/// Runs one seed to its end.
///
/// # Panics
///
/// If a rule is broken, with the seed, the last events and how to run it alone.
pub fn run(seed: u64, size: Size) -> Report {
    let mut world = World::new(seed, size);
    match catch_unwind(AssertUnwindSafe(|| world.run())) {
        Ok(report) => report,
        Err(_) => {
            let last = world.last_events();
            panic!(
                "{last}\nseed {seed} broke a rule at {:?}, see above; \
                 CLAMCAST_SEED={seed} runs it alone",
                world.now()
            );
        }
    }
}
