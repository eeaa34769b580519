//! What the agent knows of its own host.

pub(crate) mod memory;
mod processes;
pub mod state;
pub mod updater;
mod users;

pub use processes::{Host, Process};
pub(crate) use users::Node;
pub use users::User;
