//! Keeps one host at the generation it was offered, and proves it.

pub mod admin;
pub mod audit;
pub mod backoff;
pub mod clamd;
pub mod config;
pub mod doctor;
pub mod drift;
pub mod endpoint;
pub mod host;
pub mod install;
pub mod keeper;
pub mod link;
mod memory;
pub mod part;
pub mod receipts;
pub mod run;
pub mod slot;
pub mod state;
pub mod status;
pub mod trust;
pub mod updater;

use clamcast_daemon::chain;
