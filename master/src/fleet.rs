//! Decides which generation each agent is wanted at, when a wave goes on, and what is said to whom.
//! Runs the hub, the one task that owns the fleet and carries out what the dispatcher decides.
//! Must not know how bytes travel or how a capture becomes a generation.

pub mod agents;
pub mod dispatch;
pub mod force;
pub mod hub;
pub mod recovery;
pub mod rollout;
