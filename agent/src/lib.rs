//! Keeps one host at the generation it was offered, and proves it.

pub mod admin;
pub mod audit;
pub mod backoff;
pub mod clamd;
pub mod config;
pub mod endpoint;
pub mod install;
pub mod keeper;
pub mod link;
pub mod part;
pub mod receipts;
pub mod run;
pub mod slot;
pub mod state;
pub mod status;
pub mod trust;

/// An error with its sources, as one line for the master and for receipts.
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
