//! The connection to the master.

pub mod backoff;
mod connection;
pub mod endpoint;
pub mod part;

pub use connection::{Event, Link, LinkError, Outbox, RETRY, first_words, run};
