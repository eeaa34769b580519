//! What the agent knows of its own host.

pub(crate) mod memory;
mod processes;
pub mod state;
pub mod updater;

pub(crate) use processes::Node;
pub use processes::{Host, Process, User};
