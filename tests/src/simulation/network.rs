//! Connections, as QUIC gives them: what is said on one arrives in order or the connection ends.
//! Files come on streams of their own, in any order; an end is heard of at any time, by each side
//! on its own, so that a new connection may be there before the old one is known to be gone.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use clamcast_proto::DatabaseName;
use clamcast_proto::dsse::{Envelope, Verified};
use clamcast_proto::fresh::Freshness;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::wire::{Hello, OfferId, Phase};
use jiff::Timestamp;

/// Names a connection for as long as the world lasts.
pub(super) type LinkNumber = u64;

/// What a host says.
pub(super) enum Said {
    Hello(Box<Hello>),
    Need {
        offer: OfferId,
        files: Vec<DatabaseName>,
    },
    Progress {
        offer: OfferId,
        phase: Phase,
        until: Option<Timestamp>,
        /// Bytes of files that the master has sent on the connection by then.
        sent: u64,
    },
    Receipt(Box<Envelope>),
    Declined {
        offer: OfferId,
        message: String,
    },
    Reoffer,
}

/// What the master tells a host.
#[derive(Clone)]
pub(super) enum Told {
    Welcome,
    Offer {
        offer: OfferId,
        manifest: Arc<Verified<Manifest>>,
        fresh: Arc<Verified<Freshness>>,
        rehash: bool,
    },
    Part {
        offer: OfferId,
        name: DatabaseName,
    },
    Acknowledge(u64),
}

/// In a few words: every event is written down for a failure to show.
impl fmt::Debug for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hello(hello) => write!(f, "Hello {:?}", hello.outcome),
            Self::Need { offer, files } => write!(f, "Need {offer:?} {}", files.len()),
            Self::Progress { offer, phase, .. } => write!(f, "Progress {offer:?} {phase:?}"),
            Self::Receipt(_) => write!(f, "Receipt"),
            Self::Declined { offer, message } => write!(f, "Declined {offer:?} {message}"),
            Self::Reoffer => write!(f, "Reoffer"),
        }
    }
}

impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Welcome => write!(f, "Welcome"),
            Self::Offer {
                offer, manifest, ..
            } => write!(f, "Offer {offer:?} {}", manifest.generation),
            Self::Part { offer, name } => write!(f, "Part {offer:?} {name}"),
            Self::Acknowledge(seq) => write!(f, "Acknowledge {seq}"),
        }
    }
}

/// A connection.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) host: usize,
    /// Which life of the host and of the master it belongs to.
    pub(super) host_life: u32,
    pub(super) master_life: u32,
    /// Whether packets come through.
    pub(super) whole: bool,
    /// Whether the host has heard the master's Welcome.
    pub(super) welcomed: bool,
    /// How many sides know that it has ended.
    pub(super) ends: u8,
    /// When the last thing said arrives, on each side.
    pub(super) at_host: Duration,
    pub(super) at_master: Duration,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Network {
    pub(super) lines: BTreeMap<LinkNumber, Line>,
    made: LinkNumber,
}

impl Network {
    pub(super) fn connect(&mut self, line: Line) -> LinkNumber {
        self.made += 1;
        self.lines.insert(self.made, line);
        self.made
    }
}
