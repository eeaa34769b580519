//! Decides when the installed files are looked at, and what is done about one that was changed.
//!
//! Pure: no disk, no clock, no randomness. [`super::Core`] feeds events in and carries out the actions
//! that come back. Invariants:
//!
//! - A look waits until the directory was quiet for a moment, and no longer than a bound.
//! - The guard repairs no file while the configuration says `report`.
//! - A repair that another updater delays waits until no updater was seen for ten minutes.
//! - Automatic repair ends after three repairs of one file that did not last.
//! - The intervals between reports of one lasting fault grow.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::time::{Duration, Instant};

use clamcast_proto::receipt::{DRIFT_MAX, Drift, Found};

use crate::config::DriftPolicy;
use crate::host::updater::Updater;
use crate::install::{Depth, Sighting};
use crate::link::backoff::Backoff;

/// After an event the directory must be quiet for this long: a file that is being written in place
/// is looked at once, not a hundred times.
const QUIET: Duration = Duration::from_millis(500);

/// A look is not put off for longer than this, however much goes on.
const BURST_LONGEST: Duration = Duration::from_secs(5);

/// Between two looks without an event: one may have been lost.
const LOOK: Duration = Duration::from_secs(60);

/// The same where there are no events at all.
const LOOK_BLIND: Duration = Duration::from_secs(5);

/// A look that could not be made is tried again after this.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// A file that was put back so often within [`REPAIRS_WINDOW`] and is wrong again has another
/// writer, and goes its way: each repair costs clamd a reload.
pub const REPAIRS_MAX: usize = 3;

/// See [`REPAIRS_MAX`]. As long as the hourly job of another updater takes to come round so often.
pub const REPAIRS_WINDOW: Duration = Duration::from_secs(4 * 3600);

/// Drift this soon after an updater was seen at work is its doing.
const SIGHT_HOLDS: Duration = Duration::from_secs(120);

/// A repair that waits for another updater is made once none was seen for this long: a run of
/// freshclam that retries against a slow mirror ends earlier.
pub const UPDATER_GONE: Duration = Duration::from_secs(10 * 60);

/// The last sight of an updater is kept again when it is this much newer than the kept one, so that
/// an updater that stays costs one small write a minute.
const SIGHT_KEPT: Duration = Duration::from_secs(60);

/// Waits between two reports of the same.
const REPORT_FIRST: Duration = Duration::from_secs(10 * 60);
const REPORT_LONGEST: Duration = Duration::from_secs(6 * 3600);

/// Waits between two tries of a repair that comes to nothing: the disk is full, or the master is
/// asked for a file and does not answer.
const REPAIR_FIRST: Duration = Duration::from_secs(15);
const REPAIR_LONGEST: Duration = Duration::from_secs(15 * 60);

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// Something in the database directory.
    Touched {
        /// As a run of freshclam begins.
        run_begun: bool,
    },
    /// Somebody else was seen at work on it.
    Sighted(Updater),
    /// A look was made.
    Looked {
        /// How thorough it was.
        depth: Depth,
        /// Every file that is wrong.
        wrong: Vec<Sighting>,
        /// Whether events come.
        watched: bool,
    },
    /// A look was not made or cut short.
    NotLooked,
    /// All files were put in place, under a new proof.
    Installed {
        /// On somebody's word, not by a repair: what went before counts no more.
        anew: bool,
    },
    /// The master is there again, which may have what a repair lacked.
    Connected,
    /// [`Guard::deadline`] has come.
    Tick,
}

/// What to do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Action {
    /// Look for the updater of somebody else; answer with [`Event::Sighted`] if there is one.
    Scan,
    /// Keep this for the next start, before anything else is done.
    Keep(Kept),
    /// Look at the files; answer with [`Event::Looked`] or [`Event::NotLooked`].
    Look(Depth),
    /// Tell what is wrong, or is not any more.
    Report(Vec<Drift>),
    /// Put the published files back; [`Event::Installed`] says that it worked.
    Repair,
}

/// Why nothing is repaired.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Rest {
    /// Another updater may still be at work.
    Updater {
        /// The updater.
        updater: Updater,
        /// When the repair began to wait.
        since: Instant,
        /// When an updater was last seen.
        seen: Instant,
    },
    /// Repairs did not last: automatic repair has ended.
    Again,
}

/// What outlives the agent, so that a restart does not begin to fight.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Kept {
    /// Why nothing is repaired.
    pub rest: Option<Rest>,
    /// When files were put back, the newest last.
    pub repaired: BTreeMap<String, VecDeque<Instant>>,
}

impl Kept {
    /// Whether the kept `other` serves as well after a restart.
    fn is_kept_by(&self, other: &Self) -> bool {
        let same_rest = match (&self.rest, &other.rest) {
            (
                Some(Rest::Updater { since, seen, .. }),
                Some(Rest::Updater {
                    since: kept_since,
                    seen: kept_seen,
                    ..
                }),
            ) => since == kept_since && seen.duration_since(*kept_seen) < SIGHT_KEPT,
            (rest, kept) => rest == kept,
        };
        same_rest && self.repaired == other.repaired
    }
}

/// A repair that waits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Wait {
    /// When the wait began.
    pub since: Instant,
    /// When the repair starts, unless another updater is seen again before.
    pub until: Instant,
}

/// Decides which faults of the database directory are reported. The end of a reported fault costs an
/// install and a proof, so that a directory that comes and goes must not have each fault reported.
#[derive(Debug)]
pub struct Outages {
    /// The fault that was reported and has not ended.
    open: Option<String>,
    /// Faults that were reported since the waits began.
    known: BTreeSet<String>,
    /// When a fault was last seen.
    seen: Option<Instant>,
    report_at: Instant,
    reports: Backoff,
}

impl Outages {
    /// No fault was seen yet.
    pub fn new(now: Instant) -> Self {
        Self {
            open: None,
            known: BTreeSet::new(),
            seen: None,
            report_at: now,
            reports: Backoff::new(REPORT_FIRST, REPORT_LONGEST),
        }
    }

    /// The directory cannot be used: whether to report it. `random` is from 0 to 1.
    pub fn blocked(&mut self, reason: &str, now: Instant, random: f64) -> bool {
        let seen = self.seen.replace(now);
        if seen.is_none_or(|seen| now.duration_since(seen) >= REPORT_LONGEST) {
            self.known.clear();
            self.reports.reset();
        }
        let is_new = !self.known.contains(reason);
        if self.open.as_deref() == Some(reason) || (!is_new && now < self.report_at) {
            return false;
        }
        self.known.insert(reason.to_owned());
        self.open = Some(reason.to_owned());
        self.report_at = now + self.reports.next(random);
        true
    }

    /// The directory can be used: whether that ends a reported fault.
    pub fn usable(&mut self) -> bool {
        self.open.take().is_some()
    }
}

/// Watches over the installed files of one host.
#[derive(Debug)]
pub struct Guard {
    policy: DriftPolicy,
    rescan: Duration,
    burst: Option<Burst>,
    look_at: Instant,
    rehash_at: Instant,
    looking: bool,
    wrong: BTreeMap<String, Sighting>,
    /// When it began.
    since: Option<Instant>,
    /// What was reported since it began.
    reported: BTreeSet<(String, Found)>,
    report_at: Instant,
    reports: Backoff,
    repair_at: Instant,
    repairs: Backoff,
    now: Kept,
    /// What the next start would find.
    kept: Kept,
    sighted: Option<(Updater, Instant)>,
}

/// Events that belong together.
#[derive(Clone, Copy, Debug)]
struct Burst {
    first: Instant,
    last: Instant,
}

impl Guard {
    /// Nothing is known to be wrong; `kept` is what was kept by the one before. The first re-hash
    /// comes after a random part of `rescan`, so that the guests of one machine do not read their
    /// disks at once; `random` is from 0 to 1.
    pub fn new(
        policy: DriftPolicy,
        rescan: Duration,
        kept: Kept,
        now: Instant,
        random: f64,
    ) -> Self {
        Self {
            policy,
            rescan,
            burst: None,
            look_at: now,
            rehash_at: now + rescan.mul_f64(random.clamp(0.0, 1.0)),
            looking: false,
            wrong: BTreeMap::new(),
            since: None,
            reported: BTreeSet::new(),
            report_at: now,
            reports: Backoff::new(REPORT_FIRST, REPORT_LONGEST),
            repair_at: now,
            repairs: Backoff::new(REPAIR_FIRST, REPAIR_LONGEST),
            now: kept.clone(),
            kept,
            sighted: None,
        }
    }

    /// What is done about a changed file.
    pub fn policy(&self) -> DriftPolicy {
        self.policy
    }

    /// Files that differ from the published ones.
    pub fn wrong(&self) -> impl ExactSizeIterator<Item = &Sighting> {
        self.wrong.values()
    }

    /// The same for a receipt, which knows only databases.
    pub fn drift(&self, mended: bool) -> Vec<Drift> {
        let drift = |wrong: &Sighting| {
            let (name, found) = (wrong.name.parse().ok()?, wrong.found);
            Some(Drift {
                name,
                found,
                mended,
            })
        };
        let drift = self.wrong.values().filter_map(drift);
        drift.take(DRIFT_MAX).collect()
    }

    /// Takes note of what an ordered look found before the install that will put it right.
    pub fn learn(&mut self, wrong: Vec<Sighting>, now: Instant) {
        if !wrong.is_empty() {
            self.since.get_or_insert(now);
        }
        for sighting in wrong {
            self.wrong.insert(sighting.name.clone(), sighting);
        }
    }

    /// When the first of them was found.
    pub fn since(&self) -> Option<Instant> {
        self.since
    }

    /// Whether files that are wrong are to stay so until somebody says otherwise.
    pub fn holds_back(&self) -> bool {
        !self.wrong.is_empty() && (self.policy == DriftPolicy::Report || self.now.rest.is_some())
    }

    /// Why they stay, with the next step; `None` if they do not.
    pub fn reason(&self, directory: &Path) -> Option<String> {
        let name = self.wrong.keys().next()?;
        match (&self.now.rest, self.policy) {
            (Some(Rest::Updater { updater, .. }), _) => Some(format!(
                "{name} is rewritten by somebody: {updater}; stop it: {}; the repair waits until no \
                 updater was seen for {} minutes",
                updater.remedy(),
                UPDATER_GONE.as_secs() / 60
            )),
            (Some(Rest::Again), _) => {
                let owner = self.wrong.values().find_map(|wrong| wrong.owner.as_ref());
                let owner = owner.map(|user| format!(" as user {user}"));
                let seen = self.sighted.as_ref();
                let seen = seen.map(|(writer, _)| format!(", {writer} was seen there"));
                Some(format!(
                    "{name} is rewritten by somebody{}, {REPAIRS_MAX} repairs did not last{}; find \
                     out who writes to {} (cron jobs, configuration management), then \
                     `force-sync`: automatic repair has ended",
                    owner.unwrap_or_default(),
                    seen.unwrap_or_default(),
                    directory.display(),
                ))
            }
            (None, DriftPolicy::Report) => {
                Some("it stays as it is: `[database] drift` is \"report\"".to_owned())
            }
            (None, DriftPolicy::Repair) => None,
        }
    }

    /// Whether something is known to be left alone, which may be from before a restart.
    pub fn rests(&self) -> bool {
        self.now.rest.is_some()
    }

    /// The wait of the repair, if it waits. A repair that has ended waits for nothing.
    pub fn wait(&self, now: Instant) -> Option<Wait> {
        let began = self.since?;
        let wait = match (&self.now.rest, self.policy) {
            (Some(Rest::Updater { since, seen, .. }), _) => Wait {
                since: *since,
                until: *seen + UPDATER_GONE,
            },
            (None, DriftPolicy::Repair) => Wait {
                since: began,
                until: self.repair_at,
            },
            (Some(Rest::Again), _) | (None, DriftPolicy::Report) => return None,
        };
        (now < wait.until).then_some(wait)
    }

    /// When [`Event::Tick`] is due, as long as no install keeps the directory busy.
    pub fn deadline(&self) -> Option<Instant> {
        (!self.looking).then(|| self.next_look().0)
    }

    fn next_look(&self) -> (Instant, Depth) {
        let quiet = self
            .burst
            .map(|burst| (burst.last + QUIET).min(burst.first + BURST_LONGEST));
        let touched = quiet.map_or(self.look_at, |at| at.min(self.look_at));
        if self.rehash_at < touched {
            (self.rehash_at, Depth::Full)
        } else {
            (touched, Depth::Touched)
        }
    }

    /// Takes one event and returns what to do about it, in order. `random` is from 0 to 1.
    pub fn handle(&mut self, event: Event, now: Instant, random: f64) -> Vec<Action> {
        let mut actions = self.react(event, now, random);
        if !self.now.is_kept_by(&self.kept) {
            self.kept = self.now.clone();
            // The file is written before any message, so that each message still holds after a crash. An
            // entry that an install has made obsolete is removed by the next look.
            actions.insert(0, Action::Keep(self.kept.clone()));
        }
        actions
    }

    fn react(&mut self, event: Event, now: Instant, random: f64) -> Vec<Action> {
        match event {
            Event::Touched { run_begun } => {
                let begins = run_begun || self.burst.is_none();
                let first = self.burst.map_or(now, |burst| burst.first);
                self.burst = Some(Burst { first, last: now });
                // An updater may be gone by the time of the look.
                begins.then_some(Action::Scan).into_iter().collect()
            }
            Event::Sighted(updater) => {
                if let Some(Rest::Updater {
                    updater: known,
                    seen,
                    ..
                }) = &mut self.now.rest
                    && updater.comes_again()
                {
                    (*known, *seen) = (updater.clone(), now);
                }
                self.sighted = Some((updater, now));
                Vec::new()
            }
            Event::Looked {
                depth,
                wrong,
                watched,
            } => {
                self.looking = false;
                self.look_at = now + if watched { LOOK } else { LOOK_BLIND };
                if depth == Depth::Full {
                    self.rehash_at = now + self.rescan;
                }
                self.looked(wrong, now, random)
            }
            Event::NotLooked => {
                self.looking = false;
                self.look_at = now + LOOK_AGAIN;
                self.rehash_at = self.rehash_at.max(now + LOOK_AGAIN);
                Vec::new()
            }
            Event::Installed { anew } => {
                let names = std::mem::take(&mut self.wrong).into_keys();
                for name in names {
                    self.now.repaired.entry(name).or_default().push_back(now);
                }
                if anew {
                    self.now.repaired.clear();
                }
                self.well(now);
                self.rehash_at = now + self.rescan; // the install has read everything
                Vec::new()
            }
            Event::Connected => {
                self.repair_at = now;
                self.repairs.reset();
                if !self.wrong.is_empty() {
                    self.look_at = now;
                }
                Vec::new()
            }
            Event::Tick => {
                let (due, depth) = self.next_look();
                if self.looking || now < due {
                    return Vec::new();
                }
                self.looking = true;
                self.burst = None;
                vec![Action::Look(depth)]
            }
        }
    }

    /// Nothing is wrong any more.
    fn well(&mut self, now: Instant) {
        self.wrong.clear();
        self.since = None;
        self.reported.clear();
        self.reports.reset();
        self.report_at = now;
        self.repairs.reset();
        self.repair_at = now;
        self.now.rest = None;
    }

    fn looked(&mut self, wrong: Vec<Sighting>, now: Instant, random: f64) -> Vec<Action> {
        if wrong.is_empty() {
            return self.came_right(now);
        }
        self.since.get_or_insert(now);
        self.wrong = wrong
            .into_iter()
            .map(|wrong| (wrong.name.clone(), wrong))
            .collect();
        self.now.rest = self.rest_for(now);
        let mut actions = Vec::new();
        let mut news = false;
        for wrong in self.wrong.values() {
            news |= self.reported.insert((wrong.name.clone(), wrong.found));
        }
        if news || self.report_at <= now {
            self.report_at = now + self.reports.next(random);
            actions.push(Action::Report(self.drift(false)));
        }
        if !self.holds_back() && self.repair_at <= now {
            self.repair_at = now + self.repairs.next(random);
            actions.push(Action::Repair);
        }
        let wait = self.wait(now).map_or(self.look_at, |wait| wait.until);
        self.look_at = self.look_at.min(self.report_at).min(wait);
        actions
    }

    /// Somebody else has put the files right. Only an install proves that clamd has them.
    fn came_right(&mut self, now: Instant) -> Vec<Action> {
        if self.wrong.is_empty() {
            self.now.rest = None;
            return Vec::new();
        }
        if self.holds_back() {
            let drift = self.drift(true);
            self.well(now);
            return vec![Action::Report(drift)];
        }
        if now < self.repair_at {
            self.look_at = self.look_at.min(self.repair_at);
            return Vec::new();
        }
        self.repair_at = now + self.repairs.next(1.0);
        vec![Action::Repair]
    }

    fn rest_for(&mut self, now: Instant) -> Option<Rest> {
        if self.policy == DriftPolicy::Report {
            return None;
        }
        match self.now.rest.take() {
            Some(Rest::Updater { seen, .. }) if seen + UPDATER_GONE <= now => {}
            Some(rest) => return Some(rest),
            None => {}
        }
        if let Some((updater, seen)) = &self.sighted
            && updater.comes_again()
            && now.duration_since(*seen) < SIGHT_HOLDS
        {
            return Some(Rest::Updater {
                updater: updater.clone(),
                since: now,
                seen: *seen,
            });
        }
        for times in self.now.repaired.values_mut() {
            times.retain(|time| now.duration_since(*time) < REPAIRS_WINDOW);
        }
        self.now.repaired.retain(|_, times| !times.is_empty());
        let repaired = &self.now.repaired;
        let again = |name: &String| repaired.get(name).map_or(0, VecDeque::len) >= REPAIRS_MAX;
        self.wrong.keys().any(again).then_some(Rest::Again)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a script and compares what was done about each step, `;` between the steps. A step is
    /// `touch`, `run` (of freshclam, which begins), `saw freshclam`, `saw cp`, `FILE ...` (a look finds these wrong, a `?` after a name says
    /// missing), `fine` (it finds none), `not looked`, `installed`, `forced`, `connected`, `restart` (of
    /// the agent), or a time like `500ms` or `20m` that passes, at the end of which what is due is done.
    #[track_caller]
    fn check(policy: DriftPolicy, script: &str, expected: &str) {
        let start = Instant::now();
        let mut now = start;
        let hour = Duration::from_secs(3600);
        let mut guard = Guard::new(policy, hour, Kept::default(), start, 1.0);
        let mut kept = Kept::default();
        let mut depth = Depth::Touched;
        let mut said = Vec::new();
        for step in script.split(';').map(str::trim) {
            let event = match step {
                "restart" => {
                    guard = Guard::new(policy, hour, kept.clone(), now, 1.0);
                    Event::Tick
                }
                "touch" => Event::Touched { run_begun: false },
                "run" => Event::Touched { run_begun: true },
                "saw freshclam" => Event::Sighted(writer("freshclam")),
                "saw cp" => Event::Sighted(writer("cp")),
                "not looked" => Event::NotLooked,
                "installed" => Event::Installed { anew: false },
                "forced" => Event::Installed { anew: true },
                "connected" => Event::Connected,
                time if time.starts_with(|c: char| c.is_ascii_digit()) => {
                    now += humantime::parse_duration(time).unwrap();
                    Event::Tick
                }
                files => Event::Looked {
                    depth,
                    wrong: match files {
                        "fine" => Vec::new(),
                        files => files.split(' ').map(sighting).collect(),
                    },
                    watched: true,
                },
            };
            let actions = guard.handle(event, now, 1.0);
            let words = actions.into_iter().map(|action| match action {
                Action::Scan => "scan".to_owned(),
                Action::Look(wanted) => {
                    depth = wanted;
                    if wanted == Depth::Full {
                        "hash"
                    } else {
                        "look"
                    }
                    .to_owned()
                }
                Action::Report(drift) if drift.iter().all(|file| file.mended) => "mended".into(),
                Action::Report(drift) => format!("report {}", drift.len()),
                Action::Repair => "repair".to_owned(),
                Action::Keep(now) => {
                    kept = now;
                    match (&kept.rest, kept.repaired.is_empty()) {
                        (Some(_), _) => "keep",
                        (None, false) => "count",
                        (None, true) => "forget",
                    }
                    .to_owned()
                }
            });
            said.push(words.collect::<Vec<_>>().join(" "));
        }
        assert_eq!(said.join(";").replace(' ', ""), expected.replace(' ', ""));
    }

    /// Feeds looks at the directory, one every two seconds, and compares how many faults and ends of
    /// faults were reported. A word is a fault, `ok`, or `WORD*N` for N looks in a row.
    #[track_caller]
    fn check_outages(looks: &str, faults: usize, ends: usize) {
        let mut now = Instant::now();
        let mut outages = Outages::new(now);
        let mut reported = (0, 0);
        for word in looks.split_whitespace() {
            let (word, times) = word.split_once('*').unwrap_or((word, "1"));
            for _ in 0..times.parse().unwrap() {
                match word {
                    "ok" => reported.1 += usize::from(outages.usable()),
                    fault => reported.0 += usize::from(outages.blocked(fault, now, 1.0)),
                }
                now += LOOK_AGAIN;
            }
        }
        assert_eq!(reported, (faults, ends), "{looks}");
    }

    #[test]
    fn a_fault_of_the_directory_is_reported_once_and_its_end_at_once() {
        check_outages("ok missing*9000 ok*9", 1, 1);
        // What an operator does step by step is reported at once.
        check_outages("missing*9 not_ours*9 read_only ok", 3, 1);
        // After six hours without a fault the next fault is reported at once.
        check_outages("missing ok*10800 missing ok missing", 2, 2);
    }

    #[test]
    fn a_directory_that_comes_and_goes_is_reported_at_longer_and_longer_intervals() {
        // A quarter of an hour has 450 looks, and the second wait has passed after thirty minutes.
        check_outages(&"missing ok ".repeat(225), 2, 2);
        check_outages(&"missing ok ".repeat(460), 3, 3);
        check_outages(&"missing ok read_only ok ".repeat(70), 2, 2);
        // A fault that stays is reported when its wait has passed.
        check_outages("missing ok missing*290", 1, 1);
        check_outages("missing ok missing*310 ok", 2, 2);
    }

    fn writer(name: &str) -> Updater {
        Updater {
            name: name.into(),
            pid: 812,
            user: "clamav".into(),
        }
    }

    fn sighting(word: &str) -> Sighting {
        let (name, found) = match word.strip_suffix('?') {
            Some(name) => (name, Found::Missing),
            None => (word, Found::Changed),
        };
        Sighting {
            name: name.to_owned(),
            found,
            state: None,
            owner: None,
        }
    }

    #[test]
    fn a_changed_file_is_reported_and_repaired() {
        check(
            DriftPolicy::Repair,
            "0s; fine; touch; touch; 400ms; 100ms; a.ndb b.ndb?; installed; touch; 500ms; fine",
            "look;; scan;;; look; report 2 repair; count; scan; look;",
        );
    }

    #[test]
    fn a_burst_is_one_look_and_does_not_put_it_off_for_ever() {
        check(
            DriftPolicy::Repair,
            "0s; fine; touch; 400ms; touch; 400ms; touch; 400ms; 100ms; fine",
            "look;; scan;;;;;; look;",
        );
        let busy = "touch; 450ms; ".repeat(11);
        let script = format!("0s; fine; {busy} touch; 50ms");
        let quiet = ";".repeat(22);
        check(
            DriftPolicy::Repair,
            &script,
            &format!("look;; scan {quiet}; look"),
        );
    }

    #[test]
    fn without_any_event_there_is_a_look_a_minute_and_every_byte_is_read_an_hour() {
        check(
            DriftPolicy::Repair,
            "0s; fine; 59s; 1s; not looked; 2s; fine; 58m; fine; 1h; fine; 59s; 1s",
            "look;;; look;; look;; look;; hash;;; look",
        );
    }

    #[test]
    fn the_first_rehash_comes_after_a_random_part_of_its_interval() {
        let now = Instant::now();
        let hour = Duration::from_secs(3600);
        for (random, minutes) in [(0.0, 0), (0.5, 30), (1.0, 60)] {
            let guard = Guard::new(DriftPolicy::Repair, hour, Kept::default(), now, random);
            assert_eq!(guard.rehash_at, now + Duration::from_secs(minutes * 60));
        }
    }

    #[test]
    fn where_the_configuration_says_report_nothing_is_repaired() {
        check(
            DriftPolicy::Report,
            "0s; a.ndb; touch; 500ms; a.ndb; 500ms; touch; 500ms; a.ndb b.ndb; touch; 500ms; fine",
            "look; report 1; scan; look;;; scan; look; report 2; scan; look; mended",
        );
    }

    #[test]
    fn what_stays_wrong_is_reported_at_longer_and_longer_intervals() {
        check(
            DriftPolicy::Report,
            "0s; a.ndb; 1m; a.ndb; 9m; a.ndb; 1m; a.ndb; 19m; a.ndb",
            "look; report 1; look;; look; report 1; look;; look; report 1",
        );
    }

    #[test]
    fn another_updater_that_was_seen_is_not_fought() {
        check(
            DriftPolicy::Repair,
            "0s; fine; touch; saw freshclam; 500ms; a.ndb; touch; 500ms; a.ndb; 1h; a.ndb",
            "look;; scan;; look; keep report 1; scan; look;; look; forget report 1 repair",
        );
        // Whoever copies a file by hand is none.
        check(
            DriftPolicy::Repair,
            "0s; fine; touch; saw cp; 500ms; a.ndb",
            "look;; scan;; look; report 1 repair",
        );
        // The word of an operator, or a new generation, ends that; a sight too long ago is none.
        check(
            DriftPolicy::Repair,
            "0s; fine; touch; run; saw freshclam; 500ms; a.ndb; forced; 2m; fine; touch; 500ms; a.ndb",
            "look;; scan; scan;; look; keep report 1; forget; look;; scan; look; report 1 repair",
        );
    }

    #[test]
    fn a_restart_does_not_begin_to_fight() {
        let seen = "0s; fine; run; saw freshclam; 500ms; a.ndb";
        let left = "look;; scan;; look; keep report 1";
        // Until an operator or a new generation says otherwise, or it comes right.
        check(
            DriftPolicy::Repair,
            &format!("{seen}; restart; a.ndb; 9m; a.ndb; forced; restart; fine; 1m; a.ndb"),
            &format!("{left}; look; report 1; look;; forget; look;; look; report 1 repair"),
        );
        check(
            DriftPolicy::Repair,
            &format!("{seen}; restart; fine; 1m; a.ndb"),
            &format!("{left}; look; forget; look; report 1 repair"),
        );
        check(
            DriftPolicy::Repair,
            &format!("{seen}; restart; a.ndb; touch; 500ms; fine"),
            &format!("{left}; look; report 1; scan; look; forget mended"),
        );
    }

    #[test]
    fn repairs_that_do_not_last_end() {
        let again = "touch; 500ms; a.ndb; installed; ".repeat(REPAIRS_MAX);
        let fought = "scan; look; report 1 repair; count; ".repeat(REPAIRS_MAX);
        check(
            DriftPolicy::Repair,
            &format!("0s; fine; {again} touch; 500ms; a.ndb; touch; 500ms; a.ndb"),
            &format!("look;; {fought} scan; look; keep report 1; scan; look; "),
        );
        // Another file is another matter, as long as it is alone.
        check(
            DriftPolicy::Repair,
            &format!("0s; fine; {again} touch; 500ms; b.ndb"),
            &format!("look;; {fought} scan; look; report 1 repair"),
        );
        check(
            DriftPolicy::Repair,
            &format!("0s; fine; {again} forced; touch; 500ms; a.ndb"),
            &format!("look;; {fought} forget; scan; look; report 1 repair"),
        );
        check(
            DriftPolicy::Repair,
            &format!("0s; fine; {again} touch; 4h; a.ndb"),
            &format!("look;; {fought} scan; look; forget report 1 repair"),
        );
    }

    #[test]
    fn a_repair_waits_until_no_updater_was_seen_for_ten_minutes_also_over_a_restart() {
        let seen = "0s; fine; run; saw freshclam; 500ms; a.ndb";
        let left = "look;; scan;; look; keep report 1";
        check(
            DriftPolicy::Repair,
            &format!("{seen}; 9m; saw freshclam; a.ndb; 9m; a.ndb; 59s; 1s; a.ndb; installed"),
            &format!("{left}; look; keep;; look; report 1;; look; forget repair; count"),
        );
        check(
            DriftPolicy::Repair,
            &format!("{seen}; 5m; a.ndb; restart; a.ndb; 4m; a.ndb; 59s; 1s; a.ndb"),
            &format!("{left}; look;; look; report 1; look;;; look; forget repair"),
        );
    }

    #[test]
    fn three_repairs_after_an_updater_in_four_hours_end_automatic_repair_also_over_restarts() {
        let run = "run; saw freshclam; 500ms; a.ndb; 10m; a.ndb; ";
        for (restart, looks) in [("", ""), ("restart; fine; ", "look;; ")] {
            let hourly = format!("{run} installed; {restart}").repeat(REPAIRS_MAX);
            let repair = |kept| {
                format!("scan;; look; keep report 1; look; {kept} report 1 repair; count; {looks}")
            };
            let repairs = repair("forget") + &repair("count").repeat(REPAIRS_MAX - 1);
            check(
                DriftPolicy::Repair,
                &format!("0s; fine; {hourly} {run} restart; a.ndb; 10m; a.ndb"),
                &format!(
                    "look;; {repairs} scan;; look; keep report 1; look; keep report 1; look; \
                     report 1; look; report 1"
                ),
            );
        }
    }

    #[test]
    fn a_repair_that_waits_has_a_start_and_a_bound() {
        let start = Instant::now();
        let at = |secs| start + Duration::from_secs(secs);
        let hour = Duration::from_secs(3600);
        let mut guard = Guard::new(DriftPolicy::Repair, hour, Kept::default(), start, 1.0);
        let wrong = || Event::Looked {
            depth: Depth::Touched,
            wrong: vec![sighting("daily.cld")],
            watched: true,
        };
        guard.handle(Event::Sighted(writer("freshclam")), start, 1.0);
        assert_eq!(guard.wait(start), None);
        guard.handle(wrong(), at(10), 1.0);
        let (since, gone) = (at(10), at(600));
        assert_eq!(guard.wait(at(20)), Some(Wait { since, until: gone }));
        // The first try; the next one waits for its turn.
        guard.handle(wrong(), gone, 1.0);
        let until = gone + REPAIR_FIRST;
        assert_eq!(guard.wait(gone), Some(Wait { since, until }));
    }

    #[test]
    fn a_repair_that_comes_to_nothing_is_tried_again_in_time_and_when_the_master_is_there() {
        check(
            DriftPolicy::Repair,
            "0s; a.ndb; 14s; 1s; a.ndb; 29s; 1s; a.ndb; 1s; connected; 0s; a.ndb",
            "look; report 1 repair;; look; repair;; look; repair;;; look; repair",
        );
    }

    #[test]
    fn what_came_right_by_itself_is_proven_again() {
        check(
            DriftPolicy::Repair,
            "0s; a.ndb; 15s; fine; installed; 1m; fine",
            "look; report 1 repair; look; repair; count; look;",
        );
    }

    #[test]
    fn whoever_writes_there_is_named_with_the_next_step() {
        let now = Instant::now();
        let directory = Path::new("/var/lib/clamav");
        let mut guard = Guard::new(
            DriftPolicy::Repair,
            Duration::from_secs(3600),
            Kept::default(),
            now,
            1.0,
        );
        assert_eq!(guard.reason(directory), None);
        guard.handle(Event::Sighted(writer("freshclam")), now, 1.0);
        let looked = Event::Looked {
            depth: Depth::Touched,
            wrong: vec![sighting("daily.cld")],
            watched: true,
        };
        guard.handle(looked, now, 1.0);
        assert_eq!(
            guard.reason(directory).unwrap(),
            "daily.cld is rewritten by somebody: freshclam (pid 812, user clamav); stop it: \
             systemctl disable --now clamav-freshclam; the repair waits until no updater was seen for \
             10 minutes"
        );
    }
}
