//! Drives the real crates together: real QUIC, real freshclam, real clamd.
//!
//! The library half is the laboratory that the tests under `tests/` are written with. Production
//! code wants nothing from here.

pub mod lab;
pub mod simulated;
pub mod simulation;
