//! Decides what the host does next.

pub mod audit;
pub mod drift;
pub mod keeper;
pub mod receipts;
pub mod slot;
pub mod status;
pub mod trust;
