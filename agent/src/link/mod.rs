//! Decides which address of the master the agent dials next, and when.
//! Keeps one connection, checks who is at its other end, and passes messages and parts on.
//! Must not know what an offer means or what is installed.

pub mod backoff;
mod connection;
pub mod endpoint;
pub mod part;

pub use connection::{Event, Link, LinkError, Outbox, RETRY, first_words, run};
