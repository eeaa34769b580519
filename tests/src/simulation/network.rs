//! Connections, as QUIC gives them: what is said on one arrives in order or the connection ends.
//! Files come on streams of their own, in any order; an end is heard of at any time, by each side
//! on its own, so that a new connection may be there before the old one is known to be gone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use clamcast_proto::DatabaseName;
use clamcast_proto::dsse::{Envelope, Verified};
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::{ClamdReport, Outcome, Receipt};
use clamcast_proto::wire::{OfferId, Phase};
use jiff::Timestamp;

/// Names a connection for as long as the world lasts.
pub(super) type LinkNumber = u64;

/// What a host says.
#[derive(Debug)]
pub(super) enum Said {
    Hello {
        installed: Option<Envelope>,
        outcome: Option<Outcome>,
        clamd: ClamdReport,
    },
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
    Receipt(Box<Verified<Receipt>>),
    Declined {
        offer: OfferId,
        message: String,
    },
    Reoffer,
}

/// What the master tells a host.
#[derive(Clone, Debug)]
pub(super) enum Told {
    Welcome,
    Offer {
        offer: OfferId,
        manifest: Arc<Verified<Manifest>>,
        rehash: bool,
    },
    Part {
        offer: OfferId,
        name: DatabaseName,
    },
    Acknowledge(u64),
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
