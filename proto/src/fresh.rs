//! Freshness: the master's word that a generation is still the current one.
//!
//! Without it a network that only ever loses the master's messages would keep a host at old
//! signatures unnoticed (a freeze attack). It is a statement of its own, so that a manifest never
//! changes once it is signed.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::dsse::Statement;
use crate::{Digest, Epoch, FleetName, Generation, Position};

/// "This generation is current until then."
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Freshness {
    /// The fleet it is for.
    pub fleet: FleetName,
    /// The generation's epoch.
    pub epoch: Epoch,
    /// The generation.
    pub generation: Generation,
    /// SHA-256 of its manifest's payload.
    pub manifest_sha256: Digest,
    /// When the master said so.
    pub issued: Timestamp,
    /// Until when it holds.
    pub expires: Timestamp,
}

impl Statement for Freshness {
    const TYPE: &'static str = "application/vnd.clamcast.fresh+json";
    const BYTES_MAX: usize = 4 << 10; // six short fields
}

impl Freshness {
    /// The generation that it vouches for.
    pub fn position(&self) -> Position {
        Position {
            epoch: self.epoch,
            generation: self.generation,
        }
    }
}
