//! What both daemons need of their own host: configuration files, durable files, the admin socket,
//! the audit log on disk, a clamscan to load databases with, and the manners of a command line.

pub mod admin;
pub mod alarms;
pub mod audit;
pub mod clamscan;
pub mod config;
pub mod credential;
pub mod durable;
pub mod exit;
pub mod inherited;
pub mod input;
pub mod logging;
pub mod pulse;
pub mod service;
pub mod table;
pub mod values;

/// An error with its sources, as one line: `cannot start: cannot read /srv/m.toml: Permission
/// denied`.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
