//! What `cargo xtask dist` built.

use std::fs;
use std::path::{Path, PathBuf};

/// The one package in a directory whose name begins and ends so, such as `clamcast-agent_` and
/// `.deb`.
///
/// # Panics
///
/// If there is none, or if there are several.
#[track_caller]
pub fn package(directory: &Path, prefix: &str, suffix: &str) -> PathBuf {
    let entries = fs::read_dir(directory).expect("the packages were found");
    let paths = entries.map(|entry| entry.expect("it is there").path());
    let mut found = paths.filter(|path| {
        let name = path
            .file_name()
            .expect("a file has a name")
            .to_string_lossy();
        name.starts_with(prefix) && name.ends_with(suffix)
    });
    let wanted = || format!("{prefix}*{suffix} in {}", directory.display());
    let path = found
        .next()
        .unwrap_or_else(|| panic!("no {}; run `cargo xtask dist`", wanted()));
    assert!(found.next().is_none(), "several {}", wanted());
    path
}
