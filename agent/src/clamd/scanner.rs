//! Loads a set of databases with `clamscan`: it says what clamd's log keeps to itself.

use std::path::Path;
use std::time::Duration;

use clamcast_daemon::chain;
use clamcast_daemon::clamscan::{self, LoadError};

use super::attempt::LoadTest;
use super::settings::Settings;

/// A full set takes half a minute on a slow host. A directory that is named like a database makes
/// the loader spin for ever.
pub(super) const LOAD_TEST_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// Loads `directory` as clamd would, with as much memory as clamd needs for it.
pub(super) async fn load(settings: &Settings, directory: &Path, limit: Duration) -> LoadTest {
    let Some(scanner) = &settings.scanner else {
        return LoadTest::NotRun("no clamscan on this host".into());
    };
    match clamscan::load(scanner, directory, settings.official_only, limit).await {
        Ok(()) => LoadTest::Passed,
        Err(LoadError::Refused { reason }) => LoadTest::Failed(reason),
        Err(
            error @ (LoadError::Hindered { .. }
            | LoadError::NoReason { .. }
            | LoadError::TimedOut { .. }
            | LoadError::Run { .. }),
        ) => LoadTest::NotRun(chain(&error)),
    }
}
