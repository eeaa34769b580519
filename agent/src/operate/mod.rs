//! What operators see.

pub mod admin;
pub mod cli;
pub mod doctor;
pub mod status;
