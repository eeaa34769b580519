//! Decides what on the host would keep an install from being live.
//! Answers the command line and the admin socket, and prints results.
//! Must not know how the agent starts and stops, and must change nothing.

pub mod admin;
pub mod cli;
pub mod doctor;
pub mod status;
