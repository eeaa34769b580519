//! How long clamd's last load took, kept across restarts of the agent.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use clamcast_daemon::{durable, input};

/// File in the state directory: milliseconds as a decimal number.
const NAME: &str = "last-load";

/// Longest such file that is read, in bytes; a longer one is damaged.
const BYTES_MAX: u64 = 32;

/// Whoever administers the host may read it.
const MODE: u32 = 0o644;

/// Longer than any load: a file with a larger number is damaged.
const MILLIS_MAX: u64 = 24 * 60 * 60 * 1000;

/// The duration of the last load that ended in a proof.
#[derive(Debug, Default)]
pub(super) struct LastLoad {
    path: Option<PathBuf>,
    took: Mutex<Option<Duration>>,
}

impl LastLoad {
    /// What the state directory has of it; nothing if the file is missing or damaged. Blocking.
    pub(super) fn open(state: &Path) -> Self {
        let path = state.join(NAME);
        let kept = input::whole(&path, BYTES_MAX).ok();
        let kept = kept.and_then(|text| String::from_utf8(text).ok());
        let millis = kept.and_then(|text| text.trim_end().parse().ok());
        let millis = millis.filter(|millis| *millis <= MILLIS_MAX);
        Self {
            path: Some(path),
            took: Mutex::new(millis.map(Duration::from_millis)),
        }
    }

    pub(super) fn get(&self) -> Option<Duration> {
        *self.took.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a new measurement. One that cannot be written counts until the agent ends. Blocking.
    pub(super) fn keep(&self, took: Duration) {
        *self.took.lock().unwrap_or_else(PoisonError::into_inner) = Some(took);
        let Some(path) = &self.path else { return };
        let text = format!("{}\n", took.as_millis());
        if let Err(error) = durable::write(path, text.as_bytes(), MODE) {
            tracing::warn!(path = %path.display(), %error, "cannot keep the duration of a load");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_duration_of_a_load_outlives_the_agent_and_a_damaged_record_is_none() {
        let state = tempfile::tempdir().unwrap();
        let last = LastLoad::open(state.path());
        assert_eq!(last.get(), None);
        last.keep(Duration::from_millis(2300));
        let last = LastLoad::open(state.path());
        assert_eq!(last.get(), Some(Duration::from_millis(2300)));
        for damaged in ["", "2.3 s\n", "-1\n", "99999999999999\n"] {
            fs::write(state.path().join(NAME), damaged).unwrap();
            assert_eq!(LastLoad::open(state.path()).get(), None, "{damaged:?}");
        }
    }
}
