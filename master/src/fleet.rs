//! Decides which generation each agent should run, when the next wave begins, and what each agent is
//! told.
//! Runs the hub, the one task that owns the fleet and carries out what the dispatcher decides.
//! Must not know how bytes travel or how a capture becomes a generation.

pub mod agents;
pub mod budget;
pub mod dispatch;
pub mod force;
pub mod hub;
pub mod recovery;
pub mod rollout;
pub(crate) mod twins;

pub use twins::Twins;
