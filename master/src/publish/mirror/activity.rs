//! What goes on in the mirror, for captures and for `status`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use jiff::{SignedDuration, Timestamp};

use super::listing::Run;
use super::quiet::{Reason, Runs, Waiting};

/// Shared between the task that watches the mirror, captures and `status`.
#[derive(Clone, Debug, Default)]
pub struct Activity(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    runs: Runs,
    waiting: Option<Waiting>,
}

/// Why the mirror's databases are not captured yet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MirrorWait {
    /// The program or the file that is waited for.
    pub reason: String,
    /// Since when.
    pub since: Timestamp,
    /// When the wait ends by itself or becomes an alarm.
    pub until: Timestamp,
}

impl Activity {
    /// Takes note of the runs of freshclam that a look found. Returns the open one, with the time of its
    /// last change.
    pub fn look(&self, runs: &[Run], now: Instant) -> Option<(String, Instant)> {
        let mut state = self.lock();
        state.runs.look(runs, now);
        state.runs.open(now).map(|(name, at)| (name.to_owned(), at))
    }

    /// The task that watches the mirror waits.
    pub(super) fn waits(&self, waiting: Option<Waiting>) {
        self.lock().waiting = waiting;
    }

    /// What a capture waits for, if it waits.
    pub fn waiting(&self) -> Option<MirrorWait> {
        let waiting = self.lock().waiting.clone()?;
        let (now, clock) = (Instant::now(), Timestamp::now());
        let at = |instant: Instant| {
            let before = SignedDuration::try_from(now.saturating_duration_since(instant));
            let after = SignedDuration::try_from(instant.saturating_duration_since(now));
            let moved =
                after.unwrap_or(SignedDuration::ZERO) - before.unwrap_or(SignedDuration::ZERO);
            clock.saturating_add(moved).unwrap_or(clock)
        };
        let reason = match waiting.reason {
            Reason::Run(name) => format!("a freshclam run is open in the mirror ({name}/)"),
            Reason::Changes(Some(name)) => format!("{name} in the mirror keeps changing"),
            Reason::Changes(None) => "the mirror has changed".to_owned(),
        };
        Some(MirrorWait {
            reason,
            since: at(waiting.since),
            until: at(waiting.until),
        })
    }

    /// Each change is one assignment: a panic leaves the state whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
