//! Thousands of agents in one process, for a master that cannot tell them from real ones.
//!
//! Each has its own certificate of the fleet's CA and its own QUIC connection, kept by the agent's
//! own link with its jittered back-off; each decides by the agent's own core, with its trust rules and
//! signed receipts, and applies deltas with the real applier, which checks the SHA-256. Three things are cheaper than in life: a few dozen agents share a UDP socket, the
//! contents of the databases are kept once for all of them, and an install is a change of a list
//! in memory, live at once, as on a host without a clamd.
//!
//! [`Sockets`] and [`credentials`] are of use by themselves for tests that connect to a master
//! with something else than an agent.

mod databases;
mod host;
mod sockets;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use clamcast_agent::link::{self, Link};
use clamcast_proto::dsse::{Envelope, Verified};
use clamcast_proto::keys::KeySet;
use jiff::Timestamp;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::lab::Fleet;
use databases::Databases;
use host::Host;
pub use sockets::{Sockets, credentials};

/// Threads that the agents' tasks share, and as many apply deltas: simulated agents are not to take
/// every core from the master.
const THREADS: usize = 2;

/// Messages of a link that wait for its agent.
const LINK_EVENTS_MAX: usize = 16;

/// Agents that run until this is dropped.
#[derive(Debug)]
pub struct Agents {
    sights: Vec<Arc<Sight>>,
    stop: CancellationToken,
    runtime: Option<Runtime>,
}

/// What is seen of one agent from outside.
#[derive(Clone, Copy, Debug, Default)]
pub struct Standing {
    /// Whether the master has said Welcome to it on a connection that still stands.
    pub connected: bool,
    /// Times that the master has said Welcome, and when it did last.
    pub welcomes: u32,
    /// See there.
    pub welcomed: Option<Instant>,
    /// The number of the generation whose files it has verified and installed; 0: none.
    pub installed: u64,
    /// The number of the newest generation whose receipt the master has acknowledged; 0: none.
    pub acknowledged: u64,
    /// Parts that arrived whole and were verified.
    pub parts: u32,
    /// Bytes that came in them.
    pub part_bytes: u64,
    /// Offers and parts that it did not take.
    pub refused: u32,
}

#[derive(Debug, Default)]
struct Sight(Mutex<Standing>);

impl Sight {
    fn now(&self) -> MutexGuard<'_, Standing> {
        self.0.lock().expect("nothing panics with it")
    }
}

impl Agents {
    /// Starts the agents `names` of `fleet`, each with a new certificate and with the databases
    /// that `disk` holds, as a host whose files came another way before.
    pub fn start(fleet: &Fleet, names: &[String], disk: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .max_blocking_threads(THREADS)
            .enable_all()
            .build()
            .expect("threads can be started");
        let _entered = runtime.enter();
        let (databases, disk) = Databases::read(disk);
        let databases = Arc::new(databases);
        let stop = CancellationToken::new();
        let sockets = Sockets::for_agents(names.len());
        let keys = keys(fleet);
        let addresses = vec![format!("127.0.0.1:{}", fleet.port())];
        let credentials = credentials(fleet, names);
        let mut sights = Vec::new();
        for (number, credentials) in credentials.into_iter().enumerate() {
            let sight = Arc::new(Sight::default());
            let (events, from_link) = mpsc::channel(LINK_EVENTS_MAX);
            let link = Link {
                endpoint: sockets.of(number),
                credentials: credentials.clone(),
                addresses: addresses.clone(),
                events,
            };
            let databases = databases.clone();
            let host = Host::new(&credentials, keys.clone(), databases, &disk, sight.clone());
            runtime.spawn(host.run(from_link));
            runtime.spawn(link::run(link, stop.clone()));
            sights.push(sight);
        }
        Self {
            sights,
            stop,
            runtime: Some(runtime),
        }
    }

    /// How they stand, in the order of their names.
    pub fn standings(&self) -> impl Iterator<Item = Standing> {
        self.sights.iter().map(|sight| *sight.now())
    }

    /// How many stand so.
    pub fn count(&self, so: impl Fn(&Standing) -> bool) -> usize {
        self.standings().filter(so).count()
    }
}

impl Drop for Agents {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background(); // a master need not hear of it
        }
    }
}

/// The key set that comes with every agent's bundle.
fn keys(fleet: &Fleet) -> Verified<KeySet> {
    let text = std::fs::read(fleet.pki().join("manifest.pub")).expect("the fleet has a PKI");
    let envelope: Envelope = serde_json::from_slice(&text).expect("it is a key set");
    KeySet::verify(&envelope).expect("its root signed it")
}

/// Names for so many agents: `host-0001` and so on.
pub fn names(count: usize) -> Vec<String> {
    (1..=count)
        .map(|number| format!("host-{number:04}"))
        .collect()
}

fn now() -> Timestamp {
    Timestamp::now()
}
