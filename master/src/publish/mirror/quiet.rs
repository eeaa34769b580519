//! Decides when a capture of the mirror is due.
//!
//! Pure: looks at the directory and points in time come in, a decision comes out. Invariants: a
//! capture is due only after nothing changed for the quiet time and while no freshclam run is
//! open, and one change makes it due once.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use clamcast_proto::DatabaseName;

use super::listing::{ABANDONED_AFTER, Listing, Stamp};

/// Keeps track of a mirror.
#[derive(Debug)]
pub struct Quiet {
    quiet: Duration,
    seen: Option<Seen>,
    /// What stood there when a capture was last due.
    captured: Option<Databases>,
    changed: Option<Instant>,
    /// When the open run counts as abandoned, unless it changes something.
    run_until: Option<Instant>,
}

/// What one look found.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Seen {
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
            run_until: None,
        }
    }

    /// Takes in one look; `None` if the mirror could not be listed.
    pub fn look(&mut self, listing: Option<&Listing>, now: Instant) {
        let seen = Seen {
            databases: listing.map_or(Databases::NotListed, |it| {
                Databases::Listed(it.files.clone())
            }),
            runs: listing.map_or(Vec::new(), |it| {
                it.runs.iter().map(|run| run.name.clone()).collect()
            }),
        };
        if self.seen.as_ref() != Some(&seen) {
            self.seen = Some(seen);
            self.changed = Some(now);
        }
        let open = listing.and_then(Listing::open_run);
        self.run_until = open.map(|run| now + ABANDONED_AFTER.saturating_sub(run.age));
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
        match self.run_until {
            Some(until) if now < until => Next::Wait(until),
            Some(_) | None if now < quiet_at => Next::Wait(quiet_at),
            Some(_) | None => Next::Due,
        }
    }

    /// A capture of what was seen last is on its way.
    pub fn told(&mut self) {
        self.captured = self.seen.as_ref().map(|seen| seen.databases.clone());
    }

    /// The capture found the mirror changing: it is due again when that is over.
    pub fn again(&mut self, now: Instant) {
        self.captured = None;
        self.changed = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::super::listing::{Identity, Run};
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
                listing.runs.push(Run { name, age });
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
        for line in script.lines().filter(|line| !line.trim().is_empty()) {
            let (at, rest) = line.split_once(':').unwrap();
            let (look, expected) = rest.split_once("->").unwrap();
            let now = start + Duration::from_secs(at.trim().parse().unwrap());
            if look.trim() == "again" {
                quiet.again(now);
            } else {
                quiet.look(listing(look).as_ref(), now);
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
            11: daily.cvd=1 daily.cld=2 tmp.a=0 -> wait 911
            12: daily.cld=2 tmp.a=1 -> wait 911
            90: daily.cld=2 main.cld=3 tmp.a=0 -> wait 990
            95: daily.cld=2 main.cld=3 -> wait 98
            98: daily.cld=2 main.cld=3 -> due",
        );
    }

    #[test]
    fn a_run_that_changed_nothing_for_a_quarter_of_an_hour_is_abandoned() {
        check(
            "0: daily.cld=1 tmp.a=890 -> wait 10
            10: daily.cld=1 tmp.a=900 -> due",
        );
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
