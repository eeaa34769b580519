//! Decides when the mirror is captured, what may be published, and under which number.
//! Copies, checks, load-tests and signs a set, and keeps what it decided on disk.
//! Must not know any agent.

pub mod capture;
pub mod check;
mod culprits;
pub mod mirror;
pub mod news;
pub mod pipeline;
pub mod plan;
pub mod publisher;
pub mod withdrawn;
