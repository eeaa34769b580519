//! Publishes generations and pushes them to the fleet.

pub mod admin;
pub mod archive;
pub mod capture;
pub mod check;
pub mod config;
pub mod endpoint;
pub mod fleet;
pub mod force;
pub mod hub;
pub mod link;
pub mod mirror;
pub mod pipeline;
pub mod publish;
pub mod push;
pub mod recorder;
pub mod rejections;
pub mod revoked;
pub mod serve;
pub mod store;

/// An error with its sources, as one line for a log.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
