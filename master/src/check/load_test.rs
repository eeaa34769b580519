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
    /// It does not load.
    #[error("{reason}")]
    Refused {
        /// The words of clamscan.
        reason: String,
    },
    /// clamscan could not find out.
    #[error("the load test was not made")]
    NotMade(#[source] LoadError),
    /// The daemon stops.
    #[error("the load test was broken off, for the daemon stops")]
    Stopping,
    /// The directory to load could not be made.
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
            Self::NotMade(_) | Self::Stopping | Self::Prepare(_) | Self::Store(_) => true,
            Self::NoClamscan | Self::Refused { .. } => false,
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
