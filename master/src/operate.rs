//! Decides whether an operator's command may be carried out, and how the state of the fleet reads.
//! Parses the command line, answers the admin socket, prints tables and checks the configuration.
//! Must not know how a generation is published, sent or written to disk.

pub mod admin;
pub mod api;
mod cli;
pub mod command;
mod help;
pub mod preflight;
mod report;
mod show;

pub use cli::command_line;
