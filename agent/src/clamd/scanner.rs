//! Loads a set of databases with `clamscan`: it says what clamd's log keeps to itself.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use clamcast_daemon::chain;
use clamcast_daemon::clamscan::{self, LoadError};
use clamcast_daemon::input;
use clamcast_proto::names::looks_like_a_database;
use nix::errno::Errno;

use super::attempt::LoadTest;
use super::proof::{CANARY, GATE};
use super::settings::Settings;

/// A full set takes half a minute on a slow host. A directory that is named like a database makes
/// the loader spin for ever.
const LOAD_TEST_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// Loads `directory` as clamd would, with as much memory as clamd needs for it.
pub(super) async fn load(settings: &Settings, directory: &Path) -> LoadTest {
    let Some(scanner) = &settings.scanner else {
        return LoadTest::Missing("no clamscan on this host".into());
    };
    match clamscan::load(
        scanner,
        directory,
        settings.official_only,
        LOAD_TEST_TIMEOUT,
    )
    .await
    {
        Ok(()) => LoadTest::Passed,
        Err(LoadError::Refused { reason }) => LoadTest::Failed(reason),
        Err(error @ LoadError::Run { .. }) if cannot_be_executed(&error) => {
            LoadTest::Missing(chain(&error))
        }
        Err(
            error @ (LoadError::Hindered { .. }
            | LoadError::NoReason { .. }
            | LoadError::TimedOut { .. }
            | LoadError::Run { .. }),
        ) => LoadTest::Hindered(chain(&error)),
    }
}

/// A fork that fails for want of memory is the host's trouble; a program that is no program is as
/// good as none.
fn cannot_be_executed(error: &LoadError) -> bool {
    let LoadError::Run { source, .. } = error else {
        return false;
    };
    let no_program = [
        io::ErrorKind::NotFound,
        io::ErrorKind::PermissionDenied,
        io::ErrorKind::IsADirectory,
    ];
    no_program.contains(&source.kind()) || source.raw_os_error() == Some(Errno::ENOEXEC as i32)
}

/// Entries of a directory that are looked at: an install lists no more either.
const ENTRIES_MAX: usize = 20_000;

/// A set of files on disk as clamd would load it, told from another by names, inodes, lengths and
/// times: hard links to the same files are the same set.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Fingerprint(BTreeSet<(OsString, u64, u64, u64, i64, i64)>);

impl Fingerprint {
    /// Of the databases in `directory`, the files of the proof aside. `None`: it cannot be read.
    /// Blocking.
    pub(super) fn of(directory: &Path) -> Option<Self> {
        let mut files = BTreeSet::new();
        for name in input::names(directory, ENTRIES_MAX).ok()? {
            let shown = name.to_string_lossy();
            if [CANARY, GATE].contains(&&*shown) || !looks_like_a_database(&shown) {
                continue;
            }
            let Ok(file) = fs::metadata(directory.join(&name)) else {
                continue; // clamd passes over a link that leads nowhere
            };
            let (mtime, nanos) = (file.mtime(), file.mtime_nsec());
            files.insert((name, file.dev(), file.ino(), file.len(), mtime, nanos));
        }
        Some(Self(files))
    }
}
