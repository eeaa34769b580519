//! Decides when a capture of the mirror is due, and which units it has to leave as they were.
//!
//! Pure: looks at the directory, open files and points in time come in, a decision comes out.
//! Invariants: a unit is captured only after none of its files changed for the quiet time, while no
//! program has one of them open for writing and, for the official unit, while no freshclam run is open;
//! one change makes its unit due once; and an unsettled unit delays the others by at most two quiet times.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use clamcast_proto::DatabaseName;

use super::listing::{Listing, Run, Stamp};
use crate::config::units::{OFFICIAL_UNIT, UnitName, Units};

/// A run or an open file in which nothing changed for this long was left behind, or its program hangs.
pub const ABANDONED_AFTER: Duration = Duration::from_secs(15 * 60);

/// A unit that has kept changing for this long is an alarm.
pub const RESTLESS_AFTER: Duration = Duration::from_secs(15 * 60);

/// Quiet times that a unit waits for others that began to change: after its own last change, and after
/// their first. An update of several files within that time becomes one generation.
const TOGETHER: u32 = 2;

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
    names: Units,
    /// Whether the last look could list the mirror, and since when that is so.
    access: Option<(Access, Instant)>,
    /// The same when a capture was last due.
    told: Option<Access>,
    units: BTreeMap<UnitName, Unit>,
    /// The working directories of freshclam at the last look.
    runs: Vec<String>,
    /// The open run, and when it counts as abandoned, unless it changes something.
    run: Option<(String, Instant)>,
    /// Files that are open for writing, and when they count as abandoned: one for each unit.
    writing: BTreeMap<UnitName, (DatabaseName, Instant)>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Access {
    Listed,
    Missing,
}

/// What is known of one unit.
#[derive(Debug)]
struct Unit {
    /// Its files at the last look, sorted by name.
    seen: Vec<(DatabaseName, Stamp)>,
    /// The same when a capture was last due; `None` if the unit is due whatever it holds.
    captured: Option<Vec<(DatabaseName, Stamp)>>,
    /// When it last changed.
    changed: Instant,
    /// When its quiet time began anew without a change: it was asked for again, or a run ended.
    restarted: Option<Instant>,
    /// The file that changed last.
    changing: DatabaseName,
    /// Since when it has something that was not captured.
    since: Option<Instant>,
    /// The same of what a capture is under way for.
    captured_since: Option<Instant>,
}

/// Why a unit is not captured.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Waiting {
    /// What it waits for.
    pub reason: Reason,
    /// Since when.
    pub since: Instant,
    /// When it ends by itself; where files keep changing, when it is an alarm.
    pub until: Instant,
}

/// What a capture of a unit waits for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Reason {
    /// The end of a freshclam run, by its working directory.
    Run(String),
    /// The end of a program's write access to this file.
    Writing(DatabaseName),
    /// The quiet time after a change of this file.
    Changes(DatabaseName),
    /// The quiet time after the mirror appeared or disappeared.
    Mirror,
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
    /// Nothing was seen yet. `quiet` is how long a unit must not have changed before a capture.
    pub fn new(quiet: Duration, names: Units) -> Self {
        Self {
            quiet,
            names,
            access: None,
            told: None,
            units: BTreeMap::new(),
            runs: Vec::new(),
            run: None,
            writing: BTreeMap::new(),
        }
    }

    /// Takes in one look; `None` if the mirror could not be listed. Returns whether anything changed.
    pub fn look(&mut self, listing: Option<&Listing>, now: Instant) -> bool {
        let access = listing.map_or(Access::Missing, |_| Access::Listed);
        let before = self.access.map(|(access, _)| access);
        let mut has_changed = before != Some(access);
        if has_changed {
            self.access = Some((access, now));
        }
        let Some(listing) = listing else {
            return has_changed;
        };
        let files = listing.files.iter();
        let files = files.map(|(name, stamp)| (name.clone(), *stamp));
        let mut found: BTreeMap<UnitName, Vec<_>> = self.names.group(files, |it| &it.0);
        for (name, unit) in &mut self.units {
            let files = found.remove(name).unwrap_or_default();
            has_changed |= unit.look(files, now);
        }
        for (name, files) in found {
            has_changed = true;
            // A start does not take old files for changing ones.
            let first = before.is_none();
            let age = |(_, stamp): &(_, Stamp)| stamp.age(listing.taken);
            let age = files.iter().map(age).min().filter(|_| first);
            let changed = age.and_then(|age| now.checked_sub(age)).unwrap_or(now);
            let Some((changing, _)) = files.first() else {
                continue;
            };
            let unit = Unit {
                changing: changing.clone(),
                seen: files,
                captured: Some(Vec::new()),
                changed,
                restarted: None,
                since: Some(now),
                captured_since: None,
            };
            self.units.insert(name, unit);
        }
        let runs = listing.runs.iter().map(|run| run.name.clone()).collect();
        if self.runs != runs {
            self.runs = runs;
            has_changed = true;
            if let Some(official) = self.units.get_mut(&UnitName::new(OFFICIAL_UNIT)) {
                official.restarted = Some(now);
            }
        }
        self.units
            .retain(|_, unit| !unit.seen.is_empty() || unit.has_news());
        has_changed
    }

    /// Takes in the open run of freshclam, with the time of its last change, and the files that are open
    /// for writing, each with the time when it counts as abandoned.
    pub fn busy(
        &mut self,
        run: Option<(String, Instant)>,
        writing: impl IntoIterator<Item = (DatabaseName, Instant)>,
    ) {
        self.run = run.map(|(name, changed)| (name, changed + ABANDONED_AFTER));
        self.writing.clear();
        for (file, until) in writing {
            let name = self.names.of(&file);
            // A file that was removed may still be written to.
            if !self.units.get(&name).is_some_and(|unit| unit.has(&file)) {
                continue;
            }
            match self.writing.get(&name) {
                Some((_, longest)) if *longest >= until => {}
                Some(_) | None => _ = self.writing.insert(name, (file, until)),
            }
        }
    }

    /// What to do, going by the last look.
    pub fn next(&self, now: Instant) -> Next {
        let Some((access, since)) = self.access else {
            return Next::Idle;
        };
        if self.is_due_as_a_whole(access) {
            let quiet_at = since + self.quiet;
            return match now < quiet_at {
                true => Next::Wait(quiet_at),
                false => Next::Due,
            };
        }
        if access == Access::Missing {
            return Next::Idle;
        }
        // When the first settled unit stops waiting for others, and when the last other one has settled
        // or has been changing for so long that it delays nobody.
        let mut settled: Option<Instant> = None;
        let mut together: Option<Instant> = None;
        let mut unsettled: Option<Instant> = None;
        for (name, unit) in self.units.iter().filter(|(_, unit)| unit.has_news()) {
            let patience = self.quiet * TOGETHER;
            let changed = unit.quiet_since(since);
            let Some((obstacle, until)) = self.obstacle(name, changed, now) else {
                let limit = changed + patience;
                settled = Some(settled.map_or(limit, |first| first.min(limit)));
                continue;
            };
            unsettled = Some(unsettled.map_or(until, |first| first.min(until)));
            let limit = unit.since.unwrap_or(now) + patience;
            if matches!(obstacle, Obstacle::Changes) && now < limit {
                together = together.max(Some(until.min(limit)));
            }
        }
        match (settled, together, unsettled) {
            (None, _, None) => Next::Idle,
            (None, _, Some(until)) => Next::Wait(until),
            (Some(limit), Some(others), _) if now < limit => Next::Wait(limit.min(others)),
            (Some(_), _, _) => Next::Due,
        }
    }

    /// Units with something new that no capture was due for, going by the last look; without a name if
    /// it is the mirror itself.
    pub fn waiting(&self, now: Instant) -> Vec<(Option<UnitName>, Waiting)> {
        let Some((access, since)) = self.access else {
            return Vec::new();
        };
        let Next::Wait(until) = self.next(now) else {
            return Vec::new();
        };
        if self.is_due_as_a_whole(access) {
            let waiting = Waiting {
                reason: Reason::Mirror,
                since,
                until,
            };
            return vec![(None, waiting)];
        }
        let units = self.units.iter().filter(|(_, unit)| unit.has_news());
        let waiting = units.map(|(name, unit)| {
            let obstacle = self.obstacle(name, unit.quiet_since(since), now);
            (Some(name.clone()), unit.wait(obstacle))
        });
        waiting.collect()
    }

    /// The units that a capture has to leave as they were, whether they hold something new or not.
    pub fn unsettled(&self, now: Instant) -> BTreeMap<UnitName, Waiting> {
        let mut unsettled = BTreeMap::new();
        if let Some((run, until)) = self.run.as_ref().filter(|(_, until)| now < *until) {
            let official = UnitName::new(OFFICIAL_UNIT);
            let waiting = Waiting {
                reason: Reason::Run(run.clone()),
                since: until.checked_sub(ABANDONED_AFTER).unwrap_or(now),
                until: *until,
            };
            unsettled.insert(official, waiting); // also if it has no file yet
        }
        for (name, unit) in &self.units {
            let obstacle = self.obstacle(name, unit.changed, now);
            if obstacle.is_some() {
                unsettled.insert(name.clone(), unit.wait(obstacle));
            }
        }
        unsettled
    }

    /// A capture of what was seen last is on its way. It takes the units that are settled.
    pub fn told(&mut self, now: Instant) {
        let Some((access, since)) = self.access else {
            return;
        };
        self.told = Some(access);
        let mut units = std::mem::take(&mut self.units);
        for (name, unit) in &mut units {
            if access == Access::Missing {
                unit.captured = None;
            } else if unit.has_news() && self.obstacle(name, unit.quiet_since(since), now).is_none()
            {
                unit.captured = Some(unit.seen.clone());
                unit.captured_since = unit.since.take();
            }
        }
        self.units = units;
    }

    /// The capture could not take the whole mirror, or these units: they are due again when they are
    /// quiet.
    pub fn again(&mut self, units: Option<&BTreeSet<UnitName>>, now: Instant) {
        if units.is_none() {
            self.told = None;
            self.access = self.access.map(|(access, _)| (access, now));
        }
        for (name, unit) in &mut self.units {
            if units.is_none_or(|units| units.contains(name)) {
                unit.captured = None;
                unit.since = unit.captured_since.take().or(unit.since).or(Some(now));
                unit.restarted = Some(now);
            }
        }
    }

    /// Whether the mirror is due, and no unit of it: it cannot be listed, or has no files.
    fn is_due_as_a_whole(&self, access: Access) -> bool {
        let is_empty = || self.units.values().all(|unit| unit.seen.is_empty());
        self.told != Some(access) && (access == Access::Missing || is_empty())
    }

    /// What keeps a unit from being captured, and when that ends by itself.
    fn obstacle(
        &self,
        name: &UnitName,
        changed: Instant,
        now: Instant,
    ) -> Option<(Obstacle<'_>, Instant)> {
        let run = self.run.as_ref().filter(|_| name.is_official());
        if let Some((run, until)) = run.filter(|(_, until)| now < *until) {
            return Some((Obstacle::Run(run), *until));
        }
        let writing = self.writing.get(name);
        if let Some((file, until)) = writing.filter(|(_, until)| now < *until) {
            return Some((Obstacle::Writing(file), *until));
        }
        let quiet_at = changed + self.quiet;
        (now < quiet_at).then_some((Obstacle::Changes, quiet_at))
    }
}

/// What keeps a unit from being captured.
#[derive(Clone, Copy, Debug)]
enum Obstacle<'a> {
    Run(&'a str),
    Writing(&'a DatabaseName),
    Changes,
}

impl Unit {
    /// Takes in the files of one look, sorted by name. Returns whether any of them changed.
    fn look(&mut self, files: Vec<(DatabaseName, Stamp)>, now: Instant) -> bool {
        let differs_from = |others: &[(DatabaseName, Stamp)], it: &(DatabaseName, Stamp)| {
            let found = others.binary_search_by(|(name, _)| name.cmp(&it.0));
            found.map_or(true, |at| others[at].1 != it.1)
        };
        let new = files.iter().find(|it| differs_from(&self.seen, it));
        let changing = new.or_else(|| self.seen.iter().find(|it| differs_from(&files, it)));
        let changing = changing.map(|(name, _)| name.clone());
        let has_changed = changing.is_some();
        if let Some(changing) = changing {
            self.changing = changing;
            self.changed = now;
            self.seen = files;
        }
        match self.has_news() {
            true => _ = self.since.get_or_insert(now),
            false => self.since = None,
        }
        has_changed
    }

    /// Whether it holds something that no capture was due for.
    fn has_news(&self) -> bool {
        self.captured.as_ref() != Some(&self.seen)
    }

    /// Whether it has the file.
    fn has(&self, file: &DatabaseName) -> bool {
        let found = self.seen.binary_search_by(|(name, _)| name.cmp(file));
        found.is_ok()
    }

    /// From when on its quiet time counts, in a mirror that is there since `since`.
    fn quiet_since(&self, since: Instant) -> Instant {
        self.changed.max(since).max(self.restarted.unwrap_or(since))
    }

    /// Says what it waits for. A settled unit waits for others that changed when it did.
    fn wait(&self, obstacle: Option<(Obstacle<'_>, Instant)>) -> Waiting {
        let since = self.since.unwrap_or(self.changed);
        let (reason, until) = match obstacle {
            Some((Obstacle::Run(run), until)) => (Reason::Run(run.to_owned()), until),
            Some((Obstacle::Writing(file), until)) => (Reason::Writing(file.clone()), until),
            Some((Obstacle::Changes, _)) | None => {
                let reason = Reason::Changes(self.changing.clone());
                (reason, since + RESTLESS_AFTER)
            }
        };
        Waiting {
            reason,
            since,
            until,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::listing::Identity;
    use super::*;
    use std::time::SystemTime;

    /// A look such as `daily.cld=2 tmp.a=60`: a file by its number, a run by its age in seconds.
    /// `gone` is a mirror that cannot be listed, and `-` an empty one. An exclamation mark after the
    /// number is a program that has the file open for writing.
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
            skipped: Vec::new(),
            runs: Vec::new(),
            taken: SystemTime::UNIX_EPOCH,
        };
        for word in look.split_whitespace() {
            if word == "gone" {
                return None;
            }
            let Some((name, number)) = word.split_once('=') else {
                continue;
            };
            let number = number.trim_end_matches('!').parse().unwrap();
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

    /// The files that a look shows as open for writing.
    fn writing(look: &str, now: Instant) -> Vec<(DatabaseName, Instant)> {
        let open = look.split_whitespace().filter(|word| word.ends_with('!'));
        let name = |word: &str| word.split_once('=').unwrap().0.parse().unwrap();
        open.map(|word| (name(word), now + ABANDONED_AFTER))
            .collect()
    }

    /// Runs lines such as `4: daily.cld=2 -> wait 7`, seconds since the start, with a quiet time of
    /// 3 s and the files `joined.*` in one unit. `again` for a look is a capture that met a mirror in
    /// motion; with names, one that met these units in motion. What is due is captured, and named.
    fn check(script: &str) {
        let start = Instant::now();
        let files = ["joined.ndb", "joined.ign2"].map(|name| name.parse().unwrap());
        let units = Units::joining([("joined".to_owned(), files.to_vec())]).unwrap();
        let mut quiet = Quiet::new(Duration::from_secs(3), units);
        let mut runs = Runs::default();
        for line in script.lines().filter(|line| !line.trim().is_empty()) {
            let (at, rest) = line.split_once(':').unwrap();
            let (look, expected) = rest.split_once("->").unwrap();
            let now = start + Duration::from_secs(at.trim().parse().unwrap());
            if let Some(names) = look.trim().strip_prefix("again") {
                let units: BTreeSet<_> = names.split_whitespace().map(UnitName::new).collect();
                quiet.again(Some(&units).filter(|units| !units.is_empty()), now);
            } else {
                let listing = listing(look);
                runs.look(listing.as_ref().map_or(&[], |it| &it.runs), now);
                let open = runs.open(now).map(|(name, at)| (name.to_owned(), at));
                quiet.look(listing.as_ref(), now);
                quiet.busy(open, writing(look, now));
            }
            let next = match quiet.next(now) {
                Next::Idle => "idle".to_owned(),
                Next::Wait(until) => format!("wait {}", (until - start).as_secs()),
                Next::Due => {
                    let before = news(&quiet);
                    quiet.told(now);
                    let after = news(&quiet);
                    let captured = before.difference(&after).cloned();
                    let words = ["due".to_owned()].into_iter().chain(captured);
                    words.collect::<Vec<_>>().join(" ")
                }
            };
            assert_eq!(next, expected.trim(), "{line}");
        }
    }

    /// The units with something new.
    fn news(quiet: &Quiet) -> BTreeSet<String> {
        let units = quiet.units.iter().filter(|(_, unit)| unit.has_news());
        units.map(|(name, _)| name.to_string()).collect()
    }

    /// The units that are not to be captured, with the reason.
    fn unsettled(quiet: &Quiet, now: Instant) -> Vec<(String, Reason)> {
        let unsettled = quiet.unsettled(now).into_iter();
        unsettled
            .map(|(name, it)| (name.to_string(), it.reason))
            .collect()
    }

    fn file(name: &str) -> DatabaseName {
        name.parse().unwrap()
    }

    #[test]
    fn a_change_is_due_once_after_the_quiet_time() {
        check(
            "0: daily.cld=1 -> wait 3
             3: daily.cld=1 -> due official
             4: daily.cld=1 -> idle
             9: daily.cld=2 -> wait 12
            12: daily.cld=2 -> due official
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
             9: daily.cld=2 -> due official",
        );
    }

    #[test]
    fn nothing_is_due_while_freshclam_runs() {
        check(
            "0: daily.cvd=1 -> wait 3
             3: daily.cvd=1 -> due official
            10: daily.cvd=1 tmp.a=0 -> idle
            11: daily.cvd=1 daily.cld=2 tmp.a=0 -> wait 910
            12: daily.cld=2 tmp.a=1 -> wait 912
            90: daily.cld=2 main.cld=3 tmp.a=0 -> wait 990
            95: daily.cld=2 main.cld=3 -> wait 98
            98: daily.cld=2 main.cld=3 -> due official",
        );
    }

    #[test]
    fn a_run_that_changed_nothing_for_a_quarter_of_an_hour_is_abandoned() {
        check(
            "0: daily.cld=1 tmp.a=890 -> wait 10
            10: daily.cld=1 tmp.a=890 -> due official",
        );
    }

    #[test]
    fn a_run_of_the_future_is_abandoned_a_quarter_of_an_hour_after_it_was_seen() {
        check(
            "0: daily.cld=1 tmp.a=0 -> wait 900
           899: daily.cld=1 tmp.a=0 -> wait 900
           900: daily.cld=1 tmp.a=0 -> due official",
        );
    }

    #[test]
    fn a_unit_that_is_never_quiet_waits_since_its_first_change_and_delays_no_other() {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let mut quiet = Quiet::new(Duration::from_secs(3), Units::default());
        quiet.look(listing("feed.ndb=1 x.ndb=1").as_ref(), start);
        assert_eq!(quiet.next(at(3)), Next::Due);
        quiet.told(at(3));
        assert_eq!(quiet.waiting(at(3)), []);
        for second in 10..2000 {
            let other = second / 100;
            let look = listing(&format!("feed.ndb={second} x.ndb={other}"));
            quiet.look(look.as_ref(), at(second));
            let waiting = quiet.waiting(at(second));
            let feed = Waiting {
                reason: Reason::Changes(file("feed.ndb")),
                since: at(10),
                until: at(10) + RESTLESS_AFTER,
            };
            let first = (Some(UnitName::new("feed.ndb")), feed);
            if quiet.next(at(second)) == Next::Due {
                assert_eq!(waiting, []);
                quiet.told(at(second));
                assert!(
                    second == 16 || second % 100 == 3,
                    "x.ndb is due at {second}"
                );
                assert_eq!(quiet.waiting(at(second)), [first]);
            } else {
                assert_eq!(waiting[0], first);
            }
        }
        quiet.look(listing("feed.ndb=1999 x.ndb=19").as_ref(), at(2003));
        assert_eq!(quiet.next(at(2003)), Next::Due);
        quiet.told(at(2003));
        quiet.again(None, at(2004)); // the capture met a change
        quiet.look(listing("feed.ndb=2005 x.ndb=19").as_ref(), at(2005));
        assert_eq!(quiet.waiting(at(2005))[0].1.since, at(10));
    }

    #[test]
    fn units_that_change_together_are_due_together() {
        check(
            "0: a.ndb=1 b.ndb=1 -> wait 3
             3: a.ndb=1 b.ndb=1 -> due a.ndb b.ndb
            10: a.ndb=2 b.ndb=1 -> wait 13
            12: a.ndb=2 b.ndb=2 -> wait 13
            13: a.ndb=2 b.ndb=2 -> wait 15
            15: a.ndb=2 b.ndb=2 -> due a.ndb b.ndb
            16: a.ndb=2 b.ndb=2 -> idle
            20: a.ndb=2 -> wait 23
            23: a.ndb=2 -> due b.ndb
            24: a.ndb=2 -> idle",
        );
    }

    #[test]
    fn joined_files_settle_together() {
        check(
            "0: joined.ndb=1 joined.ign2=1 -> wait 3
             2: joined.ndb=2 joined.ign2=1 -> wait 5
             4: joined.ndb=2 joined.ign2=2 -> wait 7
             7: joined.ndb=2 joined.ign2=2 -> due joined
             8: joined.ndb=2! joined.ign2=3 -> wait 908
             9: joined.ndb=2 joined.ign2=3 -> wait 11
            11: joined.ndb=2 joined.ign2=3 -> due joined",
        );
    }

    #[test]
    fn a_settled_unit_waits_for_others_at_most_twice_the_quiet_time() {
        check(
            "0: a.ndb=1 -> wait 3
             1: a.ndb=1 b.ndb=1 -> wait 3
             3: a.ndb=1 b.ndb=1 c.ndb=1 -> wait 6
             5: a.ndb=1 b.ndb=2 c.ndb=2 d.ndb=2 -> wait 6
             6: a.ndb=1 b.ndb=2 c.ndb=2 d.ndb=2 -> due a.ndb
             8: a.ndb=1 b.ndb=2 c.ndb=2 d.ndb=2 -> due b.ndb c.ndb d.ndb",
        );
    }

    #[test]
    fn a_file_that_is_open_for_writing_delays_its_own_unit_and_no_other() {
        check(
            "0: a.ndb=1 b.ndb=1! -> wait 3
             3: a.ndb=1 b.ndb=1! -> due a.ndb
            60: a.ndb=1 b.ndb=1! -> wait 960
            70: a.ndb=2 b.ndb=1! -> wait 73
            73: a.ndb=2 b.ndb=1! -> due a.ndb
            80: a.ndb=2 b.ndb=1 -> due b.ndb
            90: a.ndb=2 b.ndb=1! -> idle
            91: a.ndb=2 -> wait 94
            94: a.ndb=2 b.ndb=1! -> idle
            95: a.ndb=2 b.ndb=2! -> wait 995",
        );
    }

    #[test]
    fn an_open_run_delays_the_official_unit_and_no_other() {
        check(
            "0: daily.cld=1 a.ndb=1 tmp.a=0 -> wait 3
             3: daily.cld=1 a.ndb=1 tmp.a=0 -> due a.ndb
             4: daily.cld=1 a.ndb=1 tmp.a=0 -> wait 900
            10: daily.cld=2 a.ndb=2 tmp.a=0 -> wait 13
            13: daily.cld=2 a.ndb=2 -> due a.ndb
            16: daily.cld=2 a.ndb=2 -> due official",
        );
    }

    #[test]
    fn units_that_a_capture_found_in_motion_are_due_again_when_they_are_quiet() {
        check(
            "0: a.ndb=1 b.ndb=1 -> wait 3
             3: a.ndb=1 b.ndb=1 -> due a.ndb b.ndb
             4: again b.ndb -> wait 7
             7: a.ndb=1 b.ndb=1 -> due b.ndb
             8: a.ndb=1 b.ndb=1 -> idle
             9: again -> wait 12
            12: a.ndb=1 b.ndb=1 -> due a.ndb b.ndb",
        );
    }

    #[test]
    fn an_empty_mirror_is_due_once_and_so_is_one_that_was_emptied() {
        check(
            "0: - -> wait 3
             3: - -> due
             4: - -> idle
             5: a.ndb=1 -> wait 8
             8: a.ndb=1 -> due a.ndb
             9: - -> wait 12
            12: - -> due a.ndb
            13: - -> idle",
        );
    }

    #[test]
    fn unsettled_units_are_named_with_what_they_wait_for() {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let mut quiet = Quiet::new(Duration::from_secs(3), Units::default());
        // Files that are older than the quiet time have not just changed because the daemon starts.
        let mut first = listing("a.ndb=1 b.ndb=1 daily.cld=1").unwrap();
        first.taken += Duration::from_secs(3600);
        quiet.look(Some(&first), at(0));
        assert_eq!(unsettled(&quiet, at(0)), []);
        assert_eq!(quiet.next(at(0)), Next::Wait(at(3)));
        quiet.told(at(3));
        let look = "a.ndb=2 b.ndb=1! daily.cld=1";
        quiet.look(listing(look).as_ref(), at(10));
        let run = Some(("tmp.a".to_owned(), at(9)));
        quiet.busy(run.clone(), writing(look, at(10)));
        let expected = [
            ("a.ndb".to_owned(), Reason::Changes(file("a.ndb"))),
            ("b.ndb".to_owned(), Reason::Writing(file("b.ndb"))),
            ("official".to_owned(), Reason::Run("tmp.a".to_owned())),
        ];
        assert_eq!(unsettled(&quiet, at(10)), expected);
        assert_eq!(unsettled(&quiet, at(13)), expected[1..]);
        assert_eq!(unsettled(&quiet, at(910)), []);
        let waiting = quiet.waiting(at(10));
        assert_eq!(
            waiting.len(),
            1,
            "only a.ndb holds something new: {waiting:?}"
        );
        // Also where the run has not brought its first database yet.
        quiet.look(listing("a.ndb=2").as_ref(), at(20));
        quiet.busy(run, []);
        assert_eq!(unsettled(&quiet, at(23))[0].0, "official");
    }

    #[test]
    fn a_run_that_found_nothing_new_makes_no_capture() {
        check(
            "0: daily.cld=1 -> wait 3
             3: daily.cld=1 -> due official
             5: daily.cld=1 tmp.a=0 -> idle
             6: daily.cld=1 -> idle",
        );
    }

    #[test]
    fn a_capture_that_met_a_change_is_due_again_when_it_is_quiet() {
        check(
            "0: daily.cld=1 -> wait 3
             3: daily.cld=1 -> due official
             4: again -> wait 7
             7: daily.cld=1 -> due official
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
            16: daily.cld=1 -> due official",
        );
    }
}
