//! What both daemons need of their own host: configuration files, durable files, the admin socket,
//! the audit log on disk, and the manners of a command line.

pub mod admin;
pub mod audit;
pub mod config;
pub mod durable;
pub mod exit;
pub mod logging;
pub mod table;
