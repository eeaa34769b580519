//! Decides nothing but the order in which entries reach the disk.
//! Writes the audit log, the agents' records and certificates, and the state of the rollout.
//! Must not know connections, offers or generations.

pub mod archive;
pub mod entry;
pub mod events;
pub mod recorder;
mod reserve;
