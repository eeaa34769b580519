//! Datagrams of QUIC handshakes in the hands of a test: sent without anybody behind them, or held
//! back halfway.

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use super::rogue::Rogue;
use super::until::{PATIENCE, until_async};

/// How long a socket is listened at before its thread looks whether it is still wanted.
const TICK: Duration = Duration::from_millis(50);

/// The first datagrams of so many handshakes, each of its own, which nobody will go on with.
pub async fn initials(rogue: &Rogue, count: usize) -> Vec<Vec<u8>> {
    let nobody = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await;
    let nobody = nobody.expect("loopback has a free port");
    let address = nobody.local_addr().expect("it is bound");
    let mut seen = HashSet::new();
    let mut datagrams = Vec::new();
    let mut buffer = vec![0; 2048];
    while datagrams.len() < count {
        // A few at a time, for nobody reads the socket meanwhile.
        let dialing: Vec<_> = (0..16)
            .map(|_| {
                let rogue = rogue.clone();
                tokio::spawn(async move { rogue.connect_to(address, rogue.config()).await })
            })
            .collect();
        let mut new = 0;
        until_async(PATIENCE, "the handshakes begin", async || {
            while let Ok(length) = nobody.try_recv(&mut buffer) {
                let datagram = &buffer[..length];
                let initial = Initial::read(datagram).expect("a handshake begins with an Initial");
                if seen.insert(initial.source.to_vec()) {
                    datagrams.push(datagram.to_vec());
                    new += 1;
                }
            }
            new >= dialing.len()
        })
        .await;
        for dial in dialing {
            dial.abort();
        }
    }
    datagrams.truncate(count);
    datagrams
}

/// Sends a datagram from one of the many addresses of loopback.
pub fn send_from(number: u8, datagram: &[u8], to: SocketAddr) {
    let socket = UdpSocket::bind((Ipv4Addr::new(127, 7, 7, number), 0));
    let socket = socket.expect("every address of 127/8 is this host's");
    // A full queue loses it, as any network may.
    let _ = socket.send_to(datagram, to);
}

/// Starts a relay to `master` that lets handshakes get as far as they cost most: the first packet of
/// each passes, the answer to a Retry does too, and nothing after them. Returns where to dial. It
/// lives as long as the test's process.
pub fn halfway(master: SocketAddr) -> SocketAddr {
    let bind = || {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0));
        let socket = socket.expect("loopback has a free port");
        socket.set_read_timeout(Some(TICK)).expect("it is a socket");
        socket
    };
    let (front, back) = (bind(), bind());
    let address = front.local_addr().expect("it is bound");
    let (to_front, to_back) = (front.try_clone(), back.try_clone());
    let (to_front, to_back) = (
        to_front.expect("a descriptor"),
        to_back.expect("a descriptor"),
    );
    let (dialer, dialers) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let mut buffer = vec![0; 2048];
        let mut passed = HashSet::new();
        loop {
            let Ok((length, from)) = front.recv_from(&mut buffer) else {
                continue;
            };
            let _ = dialer.send(from); // the other thread lives as long
            let datagram = &buffer[..length];
            let begins = Initial::read(datagram)
                .is_some_and(|initial| passed.insert((initial.source.to_vec(), initial.proven)));
            if begins {
                let _ = to_back.send_to(datagram, master);
            }
        }
    });
    thread::spawn(move || {
        let mut buffer = vec![0; 2048];
        let mut dialer = None;
        loop {
            let Ok(length) = back.recv(&mut buffer) else {
                continue;
            };
            // All handshakes are dialed from one socket, which knows them by their connection ids.
            dialer = dialers.try_iter().last().or(dialer);
            if let Some(dialer) = dialer {
                let _ = to_front.send_to(&buffer[..length], dialer);
            }
        }
    });
    address
}

/// The beginning of an Initial packet (RFC 9000, section 17.2.2).
struct Initial<'d> {
    /// The client's connection id, which stays the same after a Retry.
    source: &'d [u8],
    /// Whether there is a token: the answer to a Retry.
    proven: bool,
}

impl<'d> Initial<'d> {
    /// `None` if the datagram begins otherwise.
    fn read(datagram: &'d [u8]) -> Option<Self> {
        let (first, rest) = datagram.split_first()?;
        if first & 0b1011_0000 != 0b1000_0000 {
            return None; // a long header, and of the four types the first
        }
        let after_version = rest.get(4..)?;
        let (length, rest) = after_version.split_first()?;
        let (length, rest) = rest.get(usize::from(*length)..)?.split_first()?;
        let (source, rest) = rest.split_at_checked(usize::from(*length))?;
        Some(Self {
            source,
            proven: *rest.first()? != 0, // the length of the token
        })
    }
}
