//! Decides who may connect and how much work one agent may make.
//! Runs one task for each QUIC connection, which speaks the control stream and sends files.
//! Must not know why an agent is offered a generation.

pub mod connection;
pub mod endpoint;
pub mod meter;
pub mod push;
pub mod rejections;
pub mod revocations;
