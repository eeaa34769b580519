//! What the publisher tells the fleet, and what the fleet wants of it.
//!
//! Pure: no sockets, no disk, no clock.

use std::sync::Arc;

use clamcast_proto::dsse::Verified;
use clamcast_proto::manifest::Manifest;

use super::withdrawn::Rollback;

/// What the rollout wants published.
#[derive(Debug)]
pub enum Wish {
    /// What the mirror has now.
    Look,
    /// What was there before.
    RollBack(Rollback),
}

/// What the fleet hears of publications, in their order.
#[derive(Debug)]
pub enum News {
    /// A generation was published.
    Published {
        /// Its manifest.
        manifest: Arc<Verified<Manifest>>,
        /// Whether it takes the place of what is on its way.
        supersede: bool,
    },
    /// A rollback was published.
    WentBack(Arc<Verified<Manifest>>),
    /// The fleet is past what was current: the master was restored from a backup.
    Passed,
}
