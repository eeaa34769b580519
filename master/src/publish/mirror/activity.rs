//! What goes on in the mirror, for captures and for `status`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use tokio::sync::Notify;

use super::listing::Listing;
use super::quiet::{Next, Quiet, Reason, Runs, Waiting};
use super::writers::{FileEvent, Writers};
use crate::config::units::{UnitName, Units};

/// Waits that `status` shows; the others are counted.
const WAITS_MAX: usize = 20;

/// Shared between the task that watches the mirror, captures and `status`.
#[derive(Clone, Debug)]
pub struct Activity(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// The task that watches has something to look at.
    woken: Notify,
}

#[derive(Debug)]
struct State {
    quiet: Quiet,
    runs: Runs,
    writers: Writers,
}

/// Why a unit of the mirror cannot be captured at the moment.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Unsettled {
    /// The program or the file that is waited for.
    pub reason: Reason,
    /// Since when the unit has something that was not captured, or has been changing.
    pub since: Timestamp,
    /// When the wait ends by itself or becomes an alarm.
    pub until: Timestamp,
}

impl fmt::Display for Unsettled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reason {
            Reason::Run(name) => write!(f, "a freshclam run is open in the mirror ({name}/)"),
            Reason::Writing(file) => {
                write!(f, "still being written: {file} is open for writing")
            }
            Reason::Changes(file) => write!(f, "still being written: {file} keeps changing"),
            Reason::Mirror => f.write_str("the mirror has changed"),
        }
    }
}

/// Why the mirror's databases are not captured yet.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct MirrorWaits {
    /// The units that wait longest, bounded.
    pub waits: Vec<MirrorWait>,
    /// How many more units wait.
    pub more: usize,
}

/// Why one unit of the mirror is not captured yet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MirrorWait {
    /// The unit; `None` for the mirror as a whole.
    pub unit: Option<UnitName>,
    /// The program or the file that is waited for.
    pub reason: String,
    /// Since when.
    pub since: Timestamp,
    /// When the wait ends by itself or becomes an alarm.
    pub until: Timestamp,
}

impl Default for Activity {
    /// That of a mirror that is always quiet, without joined files.
    fn default() -> Self {
        Self::new(Duration::ZERO, Units::default())
    }
}

impl Activity {
    /// Nothing was seen yet. `quiet` is how long a unit must not have changed before a capture.
    pub fn new(quiet: Duration, units: Units) -> Self {
        Self(Arc::new(Shared {
            state: Mutex::new(State {
                quiet: Quiet::new(quiet, units),
                runs: Runs::default(),
                writers: Writers::default(),
            }),
            woken: Notify::new(),
        }))
    }

    /// Takes note of what a capture found. Returns the open run of freshclam, with the time of its last
    /// change.
    pub fn look(&self, listing: &Listing, now: Instant) -> Option<(String, Instant)> {
        let mut state = self.lock();
        // An older look than that of the watching task must not be the last one.
        if state.look(Some(listing), now) {
            self.0.woken.notify_one();
        }
        state.runs.open(now).map(|(name, at)| (name.to_owned(), at))
    }

    /// The units that may not be captured now.
    pub fn unsettled(&self, now: Instant) -> BTreeMap<UnitName, Unsettled> {
        let mut state = self.lock();
        state.refresh(now);
        let clock = Clock::at(now);
        let unsettled = state.quiet.unsettled(now).into_iter();
        let shown = |it: Waiting| Unsettled {
            reason: it.reason,
            since: clock.of(it.since),
            until: clock.of(it.until),
        };
        unsettled.map(|(name, it)| (name, shown(it))).collect()
    }

    /// A capture found these units unsettled: they are due again when that is over.
    pub fn again(&self, units: &BTreeSet<UnitName>, now: Instant) {
        self.lock().quiet.again(Some(units), now);
        self.0.woken.notify_one();
    }

    /// What a capture waits for, the longest wait first.
    pub fn waiting(&self, now: Instant) -> MirrorWaits {
        let mut waiting = {
            let mut state = self.lock();
            state.refresh(now);
            state.quiet.waiting(now)
        };
        waiting.sort_by(|a, b| (a.1.since, &a.0).cmp(&(b.1.since, &b.0)));
        let more = waiting.len().saturating_sub(WAITS_MAX);
        waiting.truncate(WAITS_MAX);
        let clock = Clock::at(now);
        let shown = |(unit, it): (Option<UnitName>, Waiting)| MirrorWait {
            unit,
            reason: match it.reason {
                Reason::Run(name) => format!("a freshclam run is open in the mirror ({name}/)"),
                Reason::Writing(file) => format!("{file} in the mirror is open for writing"),
                Reason::Changes(file) => format!("{file} in the mirror keeps changing"),
                Reason::Mirror => "the mirror has changed".to_owned(),
            },
            since: clock.of(it.since),
            until: clock.of(it.until),
        };
        MirrorWaits {
            waits: waiting.into_iter().map(shown).collect(),
            more,
        }
    }

    /// Takes note of what the watching task found; `None` if the mirror could not be listed. Returns
    /// what to do next.
    pub(super) fn watched(&self, listing: Option<&Listing>, now: Instant) -> Next {
        let mut state = self.lock();
        state.look(listing, now);
        state.quiet.next(now)
    }

    /// A file event of the mirror.
    pub(super) fn event(&self, event: FileEvent, now: Instant) {
        self.lock().writers.handle(event, now);
    }

    /// A capture is on its way.
    pub(super) fn told(&self, now: Instant) {
        self.lock().quiet.told(now);
    }

    /// A capture did not succeed: the whole mirror is due again.
    pub(super) fn whole_again(&self, now: Instant) {
        self.lock().quiet.again(None, now);
    }

    /// Waits until a capture found something that the watching task has to look at.
    pub(super) async fn woken(&self) {
        self.0.woken.notified().await;
    }

    /// A panic in here is a bug of pure code, and leaves at worst an old look.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn look(&mut self, listing: Option<&Listing>, now: Instant) -> bool {
        self.runs.look(listing.map_or(&[], |it| &it.runs), now);
        let changed = self.quiet.look(listing, now);
        self.refresh(now);
        changed
    }

    /// Tells the units what events and runs say at this moment.
    fn refresh(&mut self, now: Instant) {
        self.writers.settle(now);
        let open = self.runs.open(now);
        let open = open.map(|(name, changed)| (name.to_owned(), changed));
        self.quiet.busy(open, self.writers.databases());
    }
}

/// Turns points in time of this process into those of a calendar.
struct Clock {
    now: Instant,
    clock: Timestamp,
}

impl Clock {
    fn at(now: Instant) -> Self {
        Self {
            now,
            clock: Timestamp::now(),
        }
    }

    fn of(&self, instant: Instant) -> Timestamp {
        let before = SignedDuration::try_from(self.now.saturating_duration_since(instant));
        let after = SignedDuration::try_from(instant.saturating_duration_since(self.now));
        let moved = after.unwrap_or(SignedDuration::ZERO) - before.unwrap_or(SignedDuration::ZERO);
        self.clock.saturating_add(moved).unwrap_or(self.clock)
    }
}
