//! The host's clamd: how it is configured, how it is spoken to, and how it is known what it scans
//! with.

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

pub use attempt::LoadTest;
pub use client::{Address, AddressError, Clamd, ClamdError, Scan};
pub use conf::ClamdConf;
pub use prover::{LogMark, Prover, Verdict};
pub use settings::{Instance, ProofBy, RawClamd, Reload, ReloadBy, Settings};
pub use signal::{SignalError, running_pid};
