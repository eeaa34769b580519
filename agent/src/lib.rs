//! Keeps one host at the generation it was offered, and proves it.

pub mod clamd;
pub mod config;
pub mod core;
pub mod host;
pub mod install;
pub mod keeper;
pub mod link;
pub mod operate;
pub mod run;

use clamcast_daemon::chain;
