//! (being written)
pub mod clamd;
pub mod install;
