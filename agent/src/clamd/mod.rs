//! Decides whether clamd scans with an install, from its answers and its log.
//! Reads clamd's configuration, speaks its protocol, and makes the files of the proof.
//! Must not know how files get into the database directory.

mod attempt;
mod client;
mod conf;
#[cfg(test)]
mod fake;
mod last_load;
mod log;
pub mod proof;
mod prover;
mod scanner;
mod settings;
mod signal;
mod tail;

pub use attempt::LoadTest;
pub use client::{Address, AddressError, Clamd, ClamdError, Scan};
pub use conf::ClamdConf;
pub use prover::{LogMark, Prover, Verdict};
pub use settings::{Instance, ProofBy, RawClamd, Reload, ReloadBy, Settings};
pub use signal::{SignalError, running_pid};
