//! What operators see.

pub mod admin;
pub mod doctor;
pub mod status;
