//! The mirror directory: what stands in it, and when a look at it is worth a capture.

pub mod listing;
