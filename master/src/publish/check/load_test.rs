//! The load test: the real `clamscan` loads the whole set, as the fleet's clamds will.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use clamcast_daemon::clamscan::{self, LoadError};
use clamcast_proto::{DatabaseName, Digest};
use tokio_util::sync::CancellationToken;

use crate::config::LoadTest;
use crate::store::{Store, StoreError};

/// How long a load test may take. Half a gigabyte of signatures takes a slow host two minutes.
pub const TIME_MAX: Duration = Duration::from_secs(10 * 60);

/// Why a set did not pass.
#[derive(Debug, thiserror::Error)]
pub enum LoadTestError {
    /// The configuration demands what is not installed.
    #[error(
        "`load_test` is \"always\" and there is no clamscan; install clamav, or set it to \"auto\""
    )]
    NoClamscan,
    /// It does not load, or clamscan could not find out.
    #[error(transparent)]
    Clamscan(#[from] LoadError),
    /// The daemon stops, and clamscan with it.
    #[error("the daemon stops")]
    Stopping,
    /// The directory to load could not be made, or nothing be run at all.
    #[error("cannot prepare the load test")]
    Prepare(#[source] io::Error),
    /// Ours.
    #[error("cannot prepare the load test")]
    Store(#[from] StoreError),
}

impl LoadTestError {
    /// Whether it says nothing about the set and is worth another try: memory or a disk may have
    /// been full.
    pub(crate) fn is_ours(&self) -> bool {
        match self {
            Self::NoClamscan | Self::Clamscan(LoadError::Refused { .. }) => false,
            Self::Clamscan(
                LoadError::Hindered { .. }
                | LoadError::NoReason { .. }
                | LoadError::TimedOut { .. }
                | LoadError::Run { .. },
            )
            | Self::Stopping
            | Self::Prepare(_)
            | Self::Store(_) => true,
        }
    }
}

/// Runs the test if the rule and what is installed say so. Blocks until it is done, or until
/// `stop`.
pub(super) fn run(
    objects: &[(&DatabaseName, &Digest)],
    store: &Store,
    rule: LoadTest,
    stop: &CancellationToken,
) -> Result<(), LoadTestError> {
    let program = match (rule, clamscan::find()) {
        (LoadTest::Never, _) | (LoadTest::Auto, None) => return Ok(()),
        (LoadTest::Always, None) => return Err(LoadTestError::NoClamscan),
        (LoadTest::Auto | LoadTest::Always, Some(program)) => program,
    };
    load(&program, objects, store, stop)
}

fn load(
    program: &Path,
    objects: &[(&DatabaseName, &Digest)],
    store: &Store,
    stop: &CancellationToken,
) -> Result<(), LoadTestError> {
    let place = store.temporary_directory()?;
    for (name, digest) in objects {
        // Under their real names: clamscan skips in silence what it does not know by its extension.
        fs::hard_link(store.object(digest), place.path().join(name.as_str()))
            .map_err(LoadTestError::Prepare)?;
    }
    // Publishing blocks a thread of its own; on it clamscan and `stop` are waited for together.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(LoadTestError::Prepare)?;
    runtime.block_on(async {
        tokio::select! {
            biased;
            () = stop.cancelled() => Err(LoadTestError::Stopping),
            loaded = clamscan::load(program, place.path(), false, TIME_MAX) => Ok(loaded?),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::open_store;
    use std::os::unix::fs::PermissionsExt as _;
    use std::thread;

    /// Tests one object with a shell script in the place of clamscan: a fake, for the real one
    /// cannot be made to fail as it does on a host without memory.
    fn check(script: &str, stop: &CancellationToken) -> Result<(), LoadTestError> {
        let root = tempfile::tempdir().unwrap();
        let store = open_store(root.path());
        let file = tempfile::tempfile().unwrap();
        let (digest, _) = store.import(&file).unwrap();
        let name = "daily.cud".parse().unwrap();
        let program = root.path().join("clamscan");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        // A test beside this one may be about to start a process that still has the script open.
        let tested = loop {
            match load(&program, &[(&name, &digest)], &store, stop) {
                Err(LoadTestError::Clamscan(LoadError::Run { source, .. }))
                    if source.kind() == io::ErrorKind::ExecutableFileBusy => {}
                tested => break tested,
            }
        };
        let left = fs::read_dir(root.path().join("tmp")).unwrap().count();
        assert_eq!(left, 0, "the test cleans up");
        tested
    }

    #[test]
    fn the_databases_are_there_under_their_names() {
        check("test -f \"$3/daily.cud\"", &CancellationToken::new()).unwrap();
    }

    #[test]
    fn only_the_word_of_libclamav_is_held_against_the_set() {
        for (script, is_ours) in [
            ("echo 'ERROR: Malformed database' >&2; exit 2", false),
            ("echo \"ERROR: Can't allocate memory\" >&2; exit 2", true),
            ("kill -KILL $$", true),
            ("exit 2", true),
        ] {
            let error = check(script, &CancellationToken::new()).unwrap_err();
            assert_eq!(error.is_ours(), is_ours, "{script}: {error}");
        }
    }

    #[test]
    fn a_stop_ends_it_at_once() {
        let stop = CancellationToken::new();
        let started = tempfile::NamedTempFile::new().unwrap();
        let script = format!("echo yes > {}; sleep 1000", started.path().display());
        let tested = thread::scope(|scope| {
            let testing = scope.spawn(|| check(&script, &stop));
            while fs::read(started.path()).unwrap().is_empty() && !testing.is_finished() {
                thread::yield_now();
            }
            stop.cancel();
            testing.join().unwrap()
        });
        assert!(matches!(tested, Err(LoadTestError::Stopping)), "{tested:?}");
    }
}
