//! What master and agent say to each other, and the rules both must agree on.
//!
//! Pure: everything here is a value or a function of values, without sockets, files, clock or
//! randomness. Time is an argument (`clippy.toml` holds that), bytes come in as slices or as
//! `Read`.

pub mod audit;
pub mod container;
pub mod delta;
pub mod digest;
pub mod dsse;
pub mod event;
pub mod fresh;
pub mod identity;
pub mod keys;
pub mod manifest;
pub mod names;
pub mod position;
pub mod receipt;
pub mod revocation;
pub mod talos;
pub mod trust;
pub mod wire;

pub use digest::Digest;
pub use event::AuditEvent;
pub use names::{AgentName, DatabaseName, FleetName, GroupName};
pub use position::{Epoch, Generation, Position};
