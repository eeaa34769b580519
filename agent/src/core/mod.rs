//! Decides which offer the host takes, what the host trusts, and when it repairs changed files.
//! Carries the decisions out, and keeps receipts and the local log.
//! Must not know how operators ask, or how the agent starts and stops.

pub mod audit;
pub mod drift;
pub mod keeper;
mod needs;
pub mod receipts;
pub mod slot;
pub mod status;
pub mod trust;
