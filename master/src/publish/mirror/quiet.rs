//! Decides when a capture of the mirror is due.
//!
//! Pure: looks at the directory and points in time come in, a decision comes out. Invariants: a
//! capture is due only after nothing changed for the quiet time and while no freshclam run is
//! open, and one change makes it due once.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use clamcast_proto::DatabaseName;

use super::listing::{Listing, Run, Stamp};

/// A run in which nothing changed for this long was killed, or hangs.
pub const ABANDONED_AFTER: Duration = Duration::from_secs(15 * 60);

/// A mirror that has not been quiet for this long is an alarm.
pub const RESTLESS_AFTER: Duration = Duration::from_secs(15 * 60);

/// The runs of freshclam in the mirror, timed by a clock that only goes forward.
#[derive(Debug, Default)]
pub struct Runs(BTreeMap<String, Seen>);

#[derive(Debug)]
struct Seen {
    trace: u64,
    changed: Instant,
}

impl Runs {
    /// Takes in one look. A run's own age counts only where it is seen first: a start does not wait for
    /// the remains of an old run, and a time in the future is no age.
    pub fn look(&mut self, runs: &[Run], now: Instant) {
        self.0
            .retain(|name, _| runs.iter().any(|run| run.name == *name));
        for Run { name, trace, age } in runs {
            let first = || Seen {
                trace: *trace,
                changed: now.checked_sub(*age).unwrap_or(now),
            };
            let seen = self.0.entry(name.clone()).or_insert_with(first);
            if seen.trace != *trace {
                (seen.trace, seen.changed) = (*trace, now);
            }
        }
    }

    /// The run that may still change databases, if there is one, and when it last changed.
    pub fn open(&self, now: Instant) -> Option<(&str, Instant)> {
        let open = self
            .0
            .iter()
            .filter(|(_, seen)| now.saturating_duration_since(seen.changed) < ABANDONED_AFTER);
        let last = open.max_by_key(|(_, seen)| seen.changed)?;
        Some((last.0, last.1.changed))
    }
}

/// Keeps track of a mirror.
#[derive(Debug)]
pub struct Quiet {
    quiet: Duration,
    seen: Option<Look>,
    /// What stood there when a capture was last due.
    captured: Option<Databases>,
    changed: Option<Instant>,
    /// The database that changed last.
    changing: Option<String>,
    /// Since when the mirror has something that was not captured.
    unsettled: Option<Instant>,
    /// The same of what a capture is under way for.
    captured_since: Option<Instant>,
    /// The open run, and when it counts as abandoned, unless it changes something.
    run: Option<(String, Instant)>,
}

/// A wait for the mirror.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Waiting {
    /// What for.
    pub reason: Reason,
    /// Since when.
    pub since: Instant,
    /// When it ends by itself; where databases keep changing, when it is an alarm.
    pub until: Instant,
}

/// What a capture waits for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Reason {
    /// A run of freshclam, by its working directory.
    Run(String),
    /// The quiet time after a change, with the database that changed last.
    Changes(Option<String>),
}

/// What one look found.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Look {
    databases: Databases,
    runs: Vec<String>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum Databases {
    Listed(BTreeMap<DatabaseName, Stamp>),
    NotListed,
}

/// What to do next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Next {
    /// Nothing, until something changes.
    Idle,
    /// Look again then.
    Wait(Instant),
    /// Capture.
    Due,
}

impl Quiet {
    /// Nothing was seen yet. `quiet` is how long nothing may have changed before a capture.
    pub fn new(quiet: Duration) -> Self {
        Self {
            quiet,
            seen: None,
            captured: None,
            changed: None,
            changing: None,
            unsettled: None,
            captured_since: None,
            run: None,
        }
    }

    /// Takes in one look; `None` if the mirror could not be listed. `open`: the open run of freshclam,
    /// and when it last changed.
    pub fn look(
        &mut self,
        listing: Option<&Listing>,
        open: Option<(String, Instant)>,
        now: Instant,
    ) {
        let seen = Look {
            databases: listing.map_or(Databases::NotListed, |it| {
                Databases::Listed(it.files.clone())
            }),
            runs: listing.map_or(Vec::new(), |it| {
                it.runs.iter().map(|run| run.name.clone()).collect()
            }),
        };
        if self.seen.as_ref() != Some(&seen) {
            let before = self.seen.as_ref().map(|before| &before.databases);
            self.changing = before.and_then(|before| seen.databases.differs_in(before));
            self.seen = Some(seen);
            self.changed = Some(now);
        }
        self.run = open.map(|(name, changed)| (name, changed + ABANDONED_AFTER));
        let has_news = self.seen.as_ref().map(|seen| &seen.databases) != self.captured.as_ref();
        match has_news {
            true => _ = self.unsettled.get_or_insert(now),
            false => self.unsettled = None,
        }
    }

    /// What to do, going by the last look.
    pub fn next(&self, now: Instant) -> Next {
        let (Some(seen), Some(changed)) = (&self.seen, self.changed) else {
            return Next::Idle;
        };
        if self.captured.as_ref() == Some(&seen.databases) {
            return Next::Idle;
        }
        let quiet_at = changed + self.quiet;
        match &self.run {
            Some((_, until)) if now < *until => Next::Wait(*until),
            Some(_) | None if now < quiet_at => Next::Wait(quiet_at),
            Some(_) | None => Next::Due,
        }
    }

    /// What it waits for, going by the last look.
    pub fn waiting(&self, now: Instant) -> Option<Waiting> {
        let Next::Wait(until) = self.next(now) else {
            return None;
        };
        let since = self.unsettled?;
        let run = self.run.as_ref().filter(|(_, until)| now < *until);
        Some(match run {
            Some((name, _)) => Waiting {
                reason: Reason::Run(name.clone()),
                since,
                until,
            },
            None => Waiting {
                reason: Reason::Changes(self.changing.clone()),
                since,
                until: since + RESTLESS_AFTER,
            },
        })
    }

    /// A capture of what was seen last is on its way.
    pub fn told(&mut self) {
        self.captured = self.seen.as_ref().map(|seen| seen.databases.clone());
        self.captured_since = self.unsettled.take();
    }

    /// The capture found the mirror changing: it is due again when that is over.
    pub fn again(&mut self, now: Instant) {
        self.captured = None;
        self.unsettled = self.captured_since.take().or(self.unsettled);
        self.changed = Some(now);
    }
}

impl Databases {
    /// A database that is not the same in both.
    fn differs_in(&self, before: &Self) -> Option<String> {
        let (Self::Listed(now), Self::Listed(before)) = (self, before) else {
            return None;
        };
        let mut changed = now
            .iter()
            .filter(|(name, it)| before.get(*name) != Some(it));
        let mut gone = before.keys().filter(|name| !now.contains_key(*name));
        let name = changed.next().map(|(name, _)| name).or_else(|| gone.next());
        name.map(ToString::to_string)
    }
}

#[cfg(test)]
mod tests {
    use super::super::listing::Identity;
    use super::*;

    /// A look such as `daily.cld=2 tmp.a=60`: a file by its number, a run by its age in seconds.
    /// `gone` is a mirror that cannot be listed.
    fn listing(look: &str) -> Option<Listing> {
        let mut listing = Listing {
            directory: "/mirror".into(),
            identity: Identity {
                device: 1,
                inode: 1,
            },
            changed: (0, 0),
            is_whole: true,
            files: BTreeMap::new(),
            ignored: Vec::new(),
            runs: Vec::new(),
        };
        for word in look.split_whitespace() {
            if word == "gone" {
                return None;
            }
            let (name, number) = word.split_once('=').unwrap();
            let number = number.parse().unwrap();
            if name.starts_with("tmp.") {
                let name = name.to_owned();
                let age = Duration::from_secs(number);
                let trace = number; // the same until something changes
                listing.runs.push(Run { name, trace, age });
            } else {
                let stamp = Stamp::numbered(number);
                listing.files.insert(name.parse().unwrap(), stamp);
            }
        }
        Some(listing)
    }

    /// Runs lines such as `4: daily.cld=2 -> wait 7`, seconds since the start, with a quiet time of
    /// 3 s. `again` for a look is a capture that met a mirror in motion. What is due is captured.
    fn check(script: &str) {
        let start = Instant::now();
        let mut quiet = Quiet::new(Duration::from_secs(3));
        let mut runs = Runs::default();
        for line in script.lines().filter(|line| !line.trim().is_empty()) {
            let (at, rest) = line.split_once(':').unwrap();
            let (look, expected) = rest.split_once("->").unwrap();
            let now = start + Duration::from_secs(at.trim().parse().unwrap());
            if look.trim() == "again" {
                quiet.again(now);
            } else {
                let listing = listing(look);
                runs.look(listing.as_ref().map_or(&[], |it| &it.runs), now);
                let open = runs.open(now).map(|(name, at)| (name.to_owned(), at));
                quiet.look(listing.as_ref(), open, now);
            }
            let next = match quiet.next(now) {
                Next::Idle => "idle".to_owned(),
                Next::Wait(until) => format!("wait {}", (until - start).as_secs()),
                Next::Due => {
                    quiet.told();
                    "due".to_owned()
                }
            };
            assert_eq!(next, expected.trim(), "{line}");
        }
    }

    #[test]
    fn a_change_is_due_once_after_the_quiet_time() {
        check(
            "0: daily.cld=1 -> wait 3
             3: daily.cld=1 -> due
             4: daily.cld=1 -> idle
             9: daily.cld=2 -> wait 12
            12: daily.cld=2 -> due
            60: daily.cld=2 -> idle",
        );
    }

    #[test]
    fn every_change_starts_the_quiet_time_anew() {
        check(
            "0: daily.cld=1 -> wait 3
             2: daily.cld=2 -> wait 5
             4: daily.cld=2 main.cvd=3 -> wait 7
             6: daily.cld=2 -> wait 9
             9: daily.cld=2 -> due",
        );
    }

    #[test]
    fn nothing_is_due_while_freshclam_runs() {
        check(
            "0: daily.cvd=1 -> wait 3
             3: daily.cvd=1 -> due
            10: daily.cvd=1 tmp.a=0 -> idle
            11: daily.cvd=1 daily.cld=2 tmp.a=0 -> wait 910
            12: daily.cld=2 tmp.a=1 -> wait 912
            90: daily.cld=2 main.cld=3 tmp.a=0 -> wait 990
            95: daily.cld=2 main.cld=3 -> wait 98
            98: daily.cld=2 main.cld=3 -> due",
        );
    }

    #[test]
    fn a_run_that_changed_nothing_for_a_quarter_of_an_hour_is_abandoned() {
        check(
            "0: daily.cld=1 tmp.a=890 -> wait 10
            10: daily.cld=1 tmp.a=890 -> due",
        );
    }

    #[test]
    fn a_run_of_the_future_is_abandoned_a_quarter_of_an_hour_after_it_was_seen() {
        check(
            "0: daily.cld=1 tmp.a=0 -> wait 900
           899: daily.cld=1 tmp.a=0 -> wait 900
           900: daily.cld=1 tmp.a=0 -> due",
        );
    }

    #[test]
    fn a_mirror_that_is_never_quiet_waits_since_its_first_change_and_names_the_file() {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let mut quiet = Quiet::new(Duration::from_secs(3));
        quiet.look(listing("daily.cld=1").as_ref(), None, start);
        assert_eq!(quiet.next(at(3)), Next::Due);
        quiet.told();
        assert_eq!(quiet.waiting(at(3)), None);
        for second in 10..2000 {
            let look = listing(&format!("daily.cld=1 feed.ndb={second}"));
            quiet.look(look.as_ref(), None, at(second));
            let expected = Waiting {
                reason: Reason::Changes(Some("feed.ndb".to_owned())),
                since: at(10),
                until: at(10) + RESTLESS_AFTER,
            };
            assert_eq!(quiet.waiting(at(second)), Some(expected));
        }
        quiet.look(
            listing("daily.cld=1 feed.ndb=1999").as_ref(),
            None,
            at(2003),
        );
        assert_eq!(quiet.next(at(2003)), Next::Due);
        quiet.told();
        quiet.again(at(2004)); // the capture met a change
        quiet.look(
            listing("daily.cld=1 feed.ndb=2005").as_ref(),
            None,
            at(2005),
        );
        assert_eq!(quiet.waiting(at(2005)).unwrap().since, at(10));
    }

    #[test]
    fn a_run_that_found_nothing_new_makes_no_capture() {
        check(
            "0: daily.cld=1 -> wait 3
             3: daily.cld=1 -> due
             5: daily.cld=1 tmp.a=0 -> idle
             6: daily.cld=1 -> idle",
        );
    }

    #[test]
    fn a_capture_that_met_a_change_is_due_again_when_it_is_quiet() {
        check(
            "0: daily.cld=1 -> wait 3
             3: daily.cld=1 -> due
             4: again -> wait 7
             7: daily.cld=1 -> due
             8: daily.cld=1 -> idle",
        );
    }

    #[test]
    fn a_mirror_that_went_missing_is_told_once_and_so_is_its_return() {
        check(
            "0: gone -> wait 3
             3: gone -> due
             8: gone -> idle
            13: daily.cld=1 -> wait 16
            16: daily.cld=1 -> due",
        );
    }
}
