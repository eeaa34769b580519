//! Publishes generations and pushes them to the fleet.

pub mod config;
pub mod fleet;
pub mod link;
pub mod operate;
pub mod publish;
pub mod record;
pub mod serve;
pub mod store;

use clamcast_daemon::chain;
