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

    /// Until when it holds on a host whose clock showed `now` when it arrived: until it expires,
    /// and nowhere longer than the master meant it to, so that a slow clock does not prolong it. A
    /// host with one still takes signatures; a statement from its future says that its clock is
    /// wrong, and nothing against what it vouches for.
    pub fn holds_until(&self, now: Timestamp) -> Timestamp {
        let meant = self.expires.duration_since(self.issued);
        // Only at the end of time there is no such moment.
        let here = now.checked_add(meant).unwrap_or(Timestamp::MAX);
        self.expires.min(here)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A statement that the master made at `issued` for 100 s, on a host whose clock shows `now`.
    #[track_caller]
    fn check(issued: i64, now: i64, until: i64) {
        let at = |second| Timestamp::from_second(second).unwrap();
        let fresh = Freshness {
            fleet: "bank".parse().unwrap(),
            epoch: Epoch(1),
            generation: Generation::FIRST,
            manifest_sha256: Digest::of(b""),
            issued: at(issued),
            expires: at(issued + 100),
        };
        assert_eq!(fresh.holds_until(at(now)), at(until));
    }

    #[test]
    fn it_holds_until_it_expires_and_on_a_slow_clock_no_longer_than_was_meant() {
        check(1000, 1000, 1100);
        check(1000, 1060, 1100);
        check(1000, 1200, 1100);
        check(1000, 990, 1090);
        check(1_000_000_000, 0, 100);
        check(0, Timestamp::MAX.as_second(), 100);
    }
}
