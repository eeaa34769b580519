//! Decides which processes bring databases to the host, and whether memory permits another engine.
//! Reads processes, users and rights, and keeps the state directory.
//! Must not know generations, the master or the database directory's layout.

pub(crate) mod memory;
mod processes;
pub mod state;
pub mod updater;
mod users;

pub use processes::{Host, Process};
pub(crate) use users::Node;
pub use users::User;
