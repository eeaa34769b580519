//! Fuzz targets: each hands bytes to one parser of hostile input and checks what the parser accepts.
//!
//! `cargo xtask fuzz` runs the targets under libFuzzer. `tests/replay.rs` replays the inputs of
//! `corpus` in every test run. A target returns whether the input was accepted, so that the replay
//! shows that the corpus reaches both outcomes.
//!
//! A finding becomes a file of the corpus. To replace a corpus by fewer inputs that reach as much code:
//! `cargo fuzz cmin --fuzz-dir tests/fuzz -s none -D --features libfuzzer TARGET`.

mod configuration;
mod container;
mod delta;
mod frame;
mod statement;

use std::error::Error;

pub use configuration::configuration;
pub use container::{dsig, header, info, tar};
pub use delta::delta;
pub use frame::frame;
pub use statement::{key_set, manifest};

/// A fuzz target and its name, which is also the name of its corpus directory.
pub type Target = (&'static str, fn(&[u8]) -> bool);

/// All fuzz targets.
pub const TARGETS: [Target; 9] = [
    ("header", header),
    ("tar", tar),
    ("info", info),
    ("dsig", dsig),
    ("key_set", key_set),
    ("manifest", manifest),
    ("frame", frame),
    ("delta", delta),
    ("configuration", configuration),
];

/// The message of an error with its sources, as a daemon logs it.
fn render(error: &(dyn Error + 'static)) -> String {
    let text = clamcast_daemon::chain(error);
    assert!(!text.is_empty(), "an error without a message");
    text
}
