//! A UDP proxy on loopback that behaves like a bad network.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

/// How a network treats datagrams, in both directions alike. The default lets everything through.
#[derive(Clone, Copy, Debug, Default)]
pub struct Link {
    /// Part of the datagrams that are lost, 0.0 to 1.0.
    pub loss: f64,
    /// Time that each takes on its way.
    pub delay: Duration,
    /// Bytes a second that fit through; what would have to wait longer than a router's queue is
    /// long is lost.
    pub bandwidth: Option<u32>,
    /// Nothing gets through.
    pub cut: bool,
}

/// What became of the datagrams so far.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counts {
    /// Bytes that went to the target.
    pub sent_bytes: u64,
    /// Bytes that came back from it.
    pub received_bytes: u64,
    /// Datagrams lost, either way.
    pub lost: u64,
}

/// How long a datagram may wait for its turn on a link of limited bandwidth.
const QUEUE_MAX: Duration = Duration::from_millis(200);

/// Datagrams on their way in one direction: more than any test's bandwidth times delay.
const ON_THE_WAY_MAX: usize = 16 << 10;

/// Stands between QUIC endpoints: agents dial [`UdpProxy::address`], and the proxy talks to the
/// target from one socket a client. It runs in a thread of its own, so that a test that blocks
/// does not stop it.
#[derive(Debug)]
pub struct UdpProxy {
    address: SocketAddr,
    network: Arc<Mutex<Network>>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Network {
    target: SocketAddr,
    link: Link,
    counts: Counts,
    random: StdRng,
}

impl UdpProxy {
    /// Starts a perfect network to `target`. What `seed` decides is which datagrams are lost.
    pub fn start(target: SocketAddr, seed: u64) -> Self {
        let random = StdRng::seed_from_u64(seed);
        let network = Network {
            target,
            link: Link::default(),
            counts: Counts::default(),
            random,
        };
        let network = Arc::new(Mutex::new(network));
        let stop = CancellationToken::new();
        let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0));
        let socket = socket.expect("loopback has a free port");
        let address = socket.local_addr().expect("a bound socket has an address");
        let thread = thread::spawn({
            let (network, stop) = (network.clone(), stop.clone());
            move || run(socket, &network, &stop)
        });
        Self {
            address,
            network,
            stop,
            thread: Some(thread),
        }
    }

    /// Where clients find it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the network for what is sent from now on.
    pub fn set(&self, link: Link) {
        self.lock().link = link;
    }

    /// Lets nothing through, until [`UdpProxy::mend`].
    pub fn cut(&self) {
        self.lock().link.cut = true;
    }

    /// Lets through again what a cut stopped.
    pub fn mend(&self) {
        self.lock().link.cut = false;
    }

    /// Sends to another target from now on: a master that came back on another port.
    pub fn retarget(&self, target: SocketAddr) {
        self.lock().target = target;
    }

    /// What became of the datagrams so far.
    pub fn counts(&self) -> Counts {
        self.lock().counts
    }

    fn lock(&self) -> MutexGuard<'_, Network> {
        lock(&self.network)
    }
}

impl Drop for UdpProxy {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // If it panicked, it has said so.
            let _ = thread.join();
        }
    }
}

/// One direction of the link. Datagrams keep their order, as they mostly do on a real one.
struct Lane {
    /// When the last one admitted has left the queue.
    free: Instant,
}

impl Lane {
    /// When a datagram of `bytes` that comes `now` arrives, if it does. `fate` is its throw of the
    /// dice, from 0.0 up to 1.0.
    fn admit(&mut self, link: Link, bytes: usize, now: Instant, fate: f64) -> Option<Instant> {
        if link.cut || fate < link.loss {
            return None;
        }
        let turn = self.free.max(now);
        if turn - now > QUEUE_MAX {
            return None;
        }
        let takes = link.bandwidth.map(|rate| bytes as f64 / f64::from(rate));
        self.free = turn + takes.map_or(Duration::ZERO, Duration::from_secs_f64);
        Some(self.free + link.delay)
    }
}

#[derive(Clone, Copy)]
enum Direction {
    ToTarget,
    FromTarget,
}

/// A datagram that will arrive.
struct Datagram {
    due: Instant,
    from: Arc<UdpSocket>,
    to: SocketAddr,
    bytes: Vec<u8>,
}

fn run(socket: std::net::UdpSocket, network: &Arc<Mutex<Network>>, stop: &CancellationToken) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.expect("a runtime needs only a few descriptors");
    runtime.block_on(async {
        socket.set_nonblocking(true).expect("a UDP socket");
        let socket = Arc::new(UdpSocket::from_std(socket).expect("inside a runtime"));
        tokio::select! {
            () = stop.cancelled() => {}
            () = serve(socket, network) => {}
        }
        // Every task belongs to the runtime and ends with it.
    });
}

/// Takes what clients send, each through a socket of its own, so that answers find back.
async fn serve(socket: Arc<UdpSocket>, network: &Arc<Mutex<Network>>) {
    let (out, out_queue) = mpsc::channel(ON_THE_WAY_MAX);
    let (back, back_queue) = mpsc::channel(ON_THE_WAY_MAX);
    tokio::spawn(deliver(out_queue));
    tokio::spawn(deliver(back_queue));
    let mut lane = Lane {
        free: Instant::now(),
    };
    let back_lane = Arc::new(Mutex::new(Lane {
        free: Instant::now(),
    }));
    let mut clients = HashMap::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok((length, client)) = socket.recv_from(&mut buffer).await else {
            continue; // an earlier datagram found nobody
        };
        let ours = match clients.entry(client) {
            Entry::Occupied(known) => Arc::clone(known.get()),
            Entry::Vacant(new) => {
                let ours = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await;
                let ours = Arc::new(ours.expect("loopback has a free port"));
                let (socket, network) = (socket.clone(), network.clone());
                let (lane, back) = (back_lane.clone(), back.clone());
                tokio::spawn(take_answers(
                    ours.clone(),
                    socket,
                    client,
                    network,
                    lane,
                    back,
                ));
                new.insert(ours).clone()
            }
        };
        let bytes = &buffer[..length];
        if let Some((due, to)) = decide(network, &mut lane, Direction::ToTarget, bytes) {
            let datagram = Datagram {
                due,
                from: ours,
                to,
                bytes: bytes.to_vec(),
            };
            let _ = out.try_send(datagram); // a full link loses it
        }
    }
}

async fn take_answers(
    ours: Arc<UdpSocket>,
    socket: Arc<UdpSocket>,
    client: SocketAddr,
    network: Arc<Mutex<Network>>,
    lane: Arc<Mutex<Lane>>,
    back: mpsc::Sender<Datagram>,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok((length, _)) = ours.recv_from(&mut buffer).await else {
            continue; // the target's port is closed at the moment
        };
        let bytes = &buffer[..length];
        let decided = decide(&network, &mut lock(&lane), Direction::FromTarget, bytes);
        if let Some((due, _)) = decided {
            let datagram = Datagram {
                due,
                from: socket.clone(),
                to: client,
                bytes: bytes.to_vec(),
            };
            let _ = back.try_send(datagram); // a full link loses it
        }
    }
}

fn decide(
    network: &Mutex<Network>,
    lane: &mut Lane,
    direction: Direction,
    bytes: &[u8],
) -> Option<(Instant, SocketAddr)> {
    let network = &mut *lock(network);
    let fate = network.random.random();
    let due = lane.admit(network.link, bytes.len(), Instant::now(), fate);
    let length = bytes.len() as u64;
    match (due, direction) {
        (None, _) => network.counts.lost += 1,
        (Some(_), Direction::ToTarget) => network.counts.sent_bytes += length,
        (Some(_), Direction::FromTarget) => network.counts.received_bytes += length,
    }
    Some((due?, network.target))
}

async fn deliver(mut queue: mpsc::Receiver<Datagram>) {
    while let Some(datagram) = queue.recv().await {
        sleep_until(datagram.due).await;
        // Who is not there does not get it, as on any network.
        let _ = datagram.from.send_to(&datagram.bytes, datagram.to).await;
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().expect("nobody panics while holding it")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends `count` datagrams of 1000 bytes at once and returns the milliseconds after which
    /// each arrives.
    fn check(link: Link, count: usize, expected: &[Option<u64>]) {
        let now = Instant::now();
        let mut lane = Lane { free: now };
        let arrivals: Vec<_> = (0..count)
            .map(|_| {
                lane.admit(link, 1000, now, 0.5)
                    .map(|due| (due - now).as_millis() as u64)
            })
            .collect();
        assert_eq!(arrivals, expected, "{link:?}");
    }

    #[test]
    fn a_link_loses_delays_and_queues() {
        let link = Link::default();
        check(link, 2, &[Some(0), Some(0)]);
        check(
            Link {
                delay: Duration::from_millis(30),
                ..link
            },
            2,
            &[Some(30), Some(30)],
        );
        check(Link { cut: true, ..link }, 1, &[None]);
        check(Link { loss: 0.5, ..link }, 1, &[Some(0)]);
        check(Link { loss: 0.51, ..link }, 1, &[None]);
        let narrow = Link {
            bandwidth: Some(10_000),
            ..link
        };
        check(narrow, 4, &[Some(100), Some(200), Some(300), None]);
    }
}
