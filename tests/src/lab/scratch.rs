//! A directory for one test.

use std::path::{Path, PathBuf};
use std::thread;

use tempfile::TempDir;

/// A directory that is removed when a test ends well, and kept, with its path printed, when it
/// fails. It is in the system's directory for temporary files, because the path of a Unix socket
/// must be short.
#[derive(Debug)]
pub struct Scratch(TempDir);

impl Scratch {
    /// A new, empty directory that only its owner may enter.
    #[expect(clippy::new_without_default, reason = "it makes a directory")]
    pub fn new() -> Self {
        let made = tempfile::Builder::new().prefix("clamcast-").tempdir();
        Self(made.expect("the directory for temporary files can be written"))
    }

    /// One in this directory, for a test that needs no socket.
    pub fn below(directory: &Path) -> Self {
        let made = tempfile::Builder::new()
            .prefix("clamcast-")
            .tempdir_in(directory);
        Self(made.expect("the directory can be written"))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The path of `name` in it, whether that exists or not.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path().join(name)
    }

    /// Makes the directory `name` in it.
    pub fn directory(&self, name: &str) -> PathBuf {
        let path = self.join(name);
        std::fs::create_dir_all(&path).expect("a scratch directory can be written");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.disable_cleanup(true);
            eprintln!("kept for you to look at: {}", self.path().display());
        }
    }
}
