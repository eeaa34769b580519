//! The host's clamd: how it is configured, how it is spoken to, and how it is known what it scans
//! with.

mod client;
mod conf;
#[cfg(test)]
mod fake;
pub mod proof;
mod settings;

pub use client::{Address, AddressError, Clamd, ClamdError, Scan};
pub use conf::{ClamdConf, ConfError};
pub use settings::{Instance, ProofBy, RawClamd, Reload, ReloadBy, Settings};
