//! Publishes generations and pushes them to the fleet.

pub mod admin;
pub mod archive;
pub mod capture;
pub mod check;
pub mod config;
pub mod dispatch;
pub mod endpoint;
pub mod events;
pub mod fleet;
pub mod force;
pub mod hub;
pub mod link;
pub mod meter;
pub mod mirror;
pub mod pipeline;
pub mod preflight;
pub mod publish;
pub mod push;
pub mod recorder;
pub mod rejections;
pub mod report;
pub mod revoked;
pub mod rollout;
pub mod serve;
pub mod store;

use clamcast_daemon::chain;
