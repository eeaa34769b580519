//! Decides how one clamd is brought to an install, and when to stop trying.
//!
//! Pure: no sockets, no files, no clock. `prover.rs` asks [`Attempt::next`] what to do, does it and
//! tells what came of it. Three facts about clamd shape it:
//!
//! - A RELOAD that comes while another reload runs is answered like any other, and dropped. So it
//!   is sent again and again, and only what clamd then scans with is proof.
//! - clamd says nothing to whoever asked for a reload that fails. Only its log does, and there only
//!   a load that began after the files were in place says something about them. One failure may
//!   come from somebody else's half-written file: two loads in a row must fail.
//! - With `ConcurrentDatabaseReload no` clamd answers nothing while it loads, queues RELOADs, and
//!   has no engine left after a failed load.

use std::time::{Duration, Instant};

use super::log::{Current, Load, LoadEnd};

/// Between two looks at clamd: at first often, since small databases load in no time.
const LOOK: Pace = Pace {
    first: Duration::from_millis(20),
    last: Duration::from_secs(1),
    percent: 150,
};

/// Between two RELOADs, which cost nothing while a load runs, and a load when none does.
const RELOAD: Pace = Pace {
    first: Duration::from_secs(1),
    last: Duration::from_secs(15),
    percent: 200,
};

/// Between two RELOADs where they queue, and each stops the scanning for as long as a load takes.
const RELOAD_BLOCKING: Pace = Pace {
    first: Duration::from_secs(60),
    last: Duration::from_secs(240),
    percent: 200,
};

/// So long nobody may be at the socket: a clamd that is restarted removes its socket and says in
/// its log that it has started within this time. It makes the socket only after its first load, and
/// that may take a minute: if the log shows one, that is waited for, too.
const ABSENT_MAX: Duration = Duration::from_secs(3);

/// Before a failed load is tried again: somebody else who was writing a file may be done then.
const CONFIRM_AFTER: Duration = Duration::from_secs(2);

/// After a load that began too early: clamd takes the next RELOAD a moment after it logged its end.
const AGAIN_AFTER: Duration = Duration::from_millis(100);

/// A clamd whose log the agent cannot read is given this long before `clamscan` decides, where no
/// load of it was measured yet.
const DARK_UNMEASURED: Duration = Duration::from_secs(60);

/// The same at least, however quickly it loaded last: a busy host may take so long once, and
/// `clamscan` costs as much memory as clamd.
const DARK_MIN: Duration = Duration::from_secs(5);

/// So many times the duration of the last load is waited for this one.
const DARK_LOADS: u32 = 2;

/// So many loads in a row must fail before the databases are blamed.
const FAILED_LOADS: u32 = 2;

/// So many loads after the mark that end well, and still the canary is not found: it will not be.
const FUTILE_LOADS: u32 = 2;

/// What is known beforehand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    /// When the attempt began.
    pub(super) start: Instant,
    /// When it is over.
    pub(super) deadline: Instant,
    /// Whether clamd scans on while it reloads.
    pub(super) concurrent: bool,
    /// Whether clamd can be asked to reload.
    pub(super) reloads: bool,
    /// Whether its log can be read.
    pub(super) logs: bool,
    /// Whether there is a scanner for a load test.
    pub(super) scanner: bool,
    /// How long clamd's last load took, if it was measured.
    pub(super) last_load: Option<Duration>,
}

/// What a look at clamd showed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Sight {
    /// It found the sample under the name of this install.
    Canary,
    /// It did not; what it said instead, if that is odd.
    NoCanary(Option<String>),
    /// There is no canary, but VERSION: the daily database that it should name, or has none.
    VersionRight,
    /// VERSION names another daily database; what it said.
    VersionWrong(String),
    /// VERSION says nothing: it is forbidden, or the set has no daily database.
    VersionUnknown,
    /// Nobody is at the socket.
    Absent(String),
    /// The socket is not for us.
    Forbidden(String),
    /// Somebody is there and does not answer.
    Silent(String),
}

/// What came of a request to reload.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Asked {
    /// clamd took it, which is all that it says.
    Taken,
    /// It does not allow it.
    NotAllowed,
    /// Nobody is at the socket.
    Absent(String),
    /// No answer.
    Failed(String),
}

/// What a load test with `clamscan` said.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum LoadTest {
    /// It can be loaded.
    Passed,
    /// A content error; the scanner's reason.
    Failed(String),
    /// `clamscan` ran and met memory, limits, rights, time or a signal of the host.
    Hindered(String),
    /// This host has no `clamscan` that can be executed.
    Missing(String),
}

/// What to do next.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Step {
    /// Look at clamd.
    Look,
    /// Ask it to reload.
    Reload,
    /// Try the databases with `clamscan`.
    LoadTest,
    /// Nothing, until then.
    Wait(Instant),
    /// It is over.
    Done(End),
}

/// How an attempt ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum End {
    /// clamd scans with the install.
    Live,
    /// clamd reported a content error, in these words, or the scanner did, or both.
    Refused {
        clamd: Option<String>,
        scan: Option<LoadTest>,
    },
    /// It is not known.
    Unproven,
    /// There is no clamd.
    Absent,
}

/// What a clamd's log has shown since the mark.
#[derive(Clone, Debug, Default)]
pub(super) struct Evidence {
    /// Loads after the mark that failed, in a row.
    failed: u32,
    /// Loads after the mark that ended well.
    loaded: u32,
    /// The last reason of a failure.
    reason: Option<String>,
}

impl Evidence {
    /// Takes a load that ended.
    pub(super) fn take(&mut self, load: &Load) {
        match &load.end {
            LoadEnd::Loaded if load.after => {
                self.failed = 0;
                self.loaded += 1;
            }
            LoadEnd::Failed(reason) if load.after => {
                self.failed += 1;
                self.reason = Some(reason.clone());
            }
            LoadEnd::Loaded | LoadEnd::Failed(_) | LoadEnd::Hindered(_) | LoadEnd::Dead => {}
        }
    }

    /// clamd's reason why it cannot use the databases, once that is certain.
    pub(super) fn refusal(&self) -> Option<String> {
        (self.failed >= FAILED_LOADS).then(|| self.words())
    }

    /// Whether a load after the mark ended well, and none failed since.
    pub(super) fn loaded(&self) -> bool {
        self.loaded > 0 && self.failed == 0
    }

    fn words(&self) -> String {
        let reason = self.reason.as_deref().unwrap_or("no reason given");
        format!("clamd: {reason}")
    }
}

/// One clamd on its way to an install.
#[derive(Debug)]
pub(super) struct Attempt {
    terms: Terms,
    look_at: Instant,
    look_after: Duration,
    looked: Option<Instant>,
    reload_at: Instant,
    reload_after: Duration,
    reloads: bool,
    nobody: Option<Nobody>,
    /// VERSION was not right at first: that it became right is news.
    version_was_wrong: bool,
    evidence: Evidence,
    load_under_way: Option<Current>,
    load_test: Test,
    /// When clamd took the first RELOAD.
    asked_at: Option<Instant>,
    /// From then until the install was seen.
    load_took: Option<Duration>,
    trouble: Option<String>,
    end: Option<End>,
}

/// Since when nobody could be spoken to, and how the attempt ends if it stays so.
#[derive(Debug)]
struct Nobody {
    since: Instant,
    end: End,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Test {
    Unneeded,
    Wanted,
    Done,
}

impl Attempt {
    /// An attempt that looks at once, and reloads if that shows nothing.
    pub(super) fn new(terms: Terms) -> Self {
        Self {
            terms,
            look_at: terms.start,
            look_after: LOOK.first,
            looked: None,
            reload_at: terms.start,
            reload_after: terms.reload_pace().first,
            reloads: terms.reloads,
            nobody: None,
            version_was_wrong: false,
            evidence: Evidence::default(),
            load_under_way: None,
            load_test: Test::Unneeded,
            asked_at: None,
            load_took: None,
            trouble: None,
            end: None,
        }
    }

    /// What to do now. A step that is not waiting is to be done at once, and its outcome told.
    pub(super) fn next(&mut self, now: Instant) -> Step {
        if let Some(end) = &self.end {
            return Step::Done(end.clone());
        }
        if self.terms.deadline <= now {
            let end = self
                .nobody
                .take()
                .map_or(End::Unproven, |nobody| nobody.end);
            self.end = Some(end.clone());
            return Step::Done(end);
        }
        if self.load_test == Test::Unneeded
            && self.terms.dark_until() <= now
            && self.is_in_the_dark()
        {
            self.load_test = Test::Wanted;
        }
        if self.load_test == Test::Wanted {
            return Step::LoadTest;
        }
        // A look goes before every RELOAD, so that an install that is live is not loaded again. Not
        // where reloads block: they wait until every thread that has scanned is gone, and that is
        // up to `IdleTimeout` after our own look.
        let reload_due = self.reloads && self.reload_at <= now;
        let looked = self.looked >= Some(self.reload_at) || !self.terms.concurrent;
        if reload_due && looked && self.nobody.is_none() {
            return Step::Reload;
        }
        if reload_due && !looked || self.look_at <= now {
            return Step::Look;
        }
        let mut until = self.look_at.min(self.terms.deadline);
        if self.reloads && now < self.reload_at {
            until = until.min(self.reload_at);
        }
        Step::Wait(until)
    }

    /// Takes what a look showed.
    pub(super) fn seen(&mut self, sight: Sight, now: Instant) {
        self.looked = Some(now);
        self.look_at = now + self.look_after;
        self.look_after = LOOK.after(self.look_after);
        match sight {
            Sight::Absent(error) => return self.alone(error, End::Absent, now),
            Sight::Forbidden(error) => return self.alone(error, End::Unproven, now),
            Sight::Canary
            | Sight::NoCanary(_)
            | Sight::VersionRight
            | Sight::VersionWrong(_)
            | Sight::VersionUnknown
            | Sight::Silent(_) => self.nobody = None,
        }
        match sight {
            Sight::Canary => self.live(now),
            Sight::VersionRight if self.evidence.loaded() => self.live(now),
            Sight::VersionRight if !self.terms.logs && self.version_was_wrong => self.live(now),
            Sight::VersionUnknown if self.evidence.loaded() => self.live(now),
            Sight::NoCanary(None) if self.evidence.loaded >= FUTILE_LOADS => self.futile(),
            Sight::NoCanary(said) => {
                if let Some(said) = said {
                    self.trouble = Some(format!("to the sample it said `{said}`"));
                }
            }
            Sight::VersionRight | Sight::VersionUnknown => {
                self.trouble = Some(if self.terms.logs {
                    "its log shows no load since the files were put in place".into()
                } else {
                    "VERSION tells nothing new, and there is no log to read".into()
                });
            }
            Sight::VersionWrong(version) => {
                self.version_was_wrong = true;
                self.trouble = Some(format!("VERSION says `{version}`"));
                if self.evidence.loaded >= FUTILE_LOADS {
                    self.end = Some(End::Unproven);
                }
            }
            Sight::Silent(error) => {
                // Asked at once again, it would only have more connections to drop.
                self.look_at = now + LOOK.last;
                self.trouble = Some(error);
            }
            Sight::Absent(_) | Sight::Forbidden(_) => {}
        }
    }

    /// Takes what came of a request to reload.
    pub(super) fn asked(&mut self, asked: Asked, now: Instant) {
        if let Asked::Absent(error) = asked {
            return self.alone(error, End::Absent, now);
        }
        // One that got no answer may be in clamd's queue nonetheless.
        self.reload_at = now + self.reload_after;
        self.reload_after = self.terms.reload_pace().after(self.reload_after);
        match asked {
            Asked::Taken => {
                self.asked_at.get_or_insert(now);
                self.look_after = LOOK.first;
                self.look_at = now + self.look_after;
            }
            Asked::NotAllowed => {
                self.reloads = false;
                self.trouble = Some(
                    "it does not allow RELOAD, and will see the files when it checks by itself \
                     (SelfCheck)"
                        .into(),
                );
            }
            Asked::Absent(error) | Asked::Failed(error) => self.trouble = Some(error),
        }
    }

    /// Takes what the log shows: a load that ended.
    pub(super) fn logged(&mut self, load: &Load, now: Instant) {
        self.evidence.take(load);
        match &load.end {
            // It shows what it loaded at once.
            LoadEnd::Loaded if load.after => self.look_at = self.look_at.min(now),
            LoadEnd::Failed(reason) if load.after => {
                self.trouble = Some(format!("it could not load: {reason}"));
                if self.evidence.refusal().is_some() {
                    self.refused(None);
                } else if self.terms.concurrent {
                    self.reload_at = now + CONFIRM_AFTER;
                } else if self.terms.scanner {
                    // It cannot be asked to try again.
                    self.load_test = Test::Wanted;
                } else {
                    self.refused(None);
                }
            }
            // Whatever was asked while that load ran was dropped.
            LoadEnd::Loaded | LoadEnd::Failed(_) if self.terms.concurrent => {
                self.reload_at = self.reload_at.min(now + AGAIN_AFTER);
                self.reload_after = self.terms.reload_pace().first;
            }
            LoadEnd::Loaded | LoadEnd::Failed(_) => {}
            LoadEnd::Hindered(reason) => {
                self.trouble = Some(format!("it could not load: {reason}"));
            }
            LoadEnd::Dead => self.trouble = Some(DEAD.into()),
        }
    }

    /// Takes the load that is under way by the log, if one began after the mark.
    pub(super) fn load_under_way(&mut self, load: Option<Current>) {
        self.load_under_way = load;
    }

    /// Takes what the load test said.
    pub(super) fn tested(&mut self, test: LoadTest) {
        self.load_test = Test::Done;
        let failed_load = self.evidence.failed > 0;
        match test {
            LoadTest::Failed(_) => self.refused(Some(test)),
            LoadTest::Passed | LoadTest::Hindered(_) | LoadTest::Missing(_)
                if failed_load && !self.terms.concurrent =>
            {
                self.refused(Some(test));
            }
            LoadTest::Passed | LoadTest::Hindered(_) | LoadTest::Missing(_)
                if self.nobody.is_some() =>
            {
                self.end = Some(End::Absent);
            }
            // Where clamd's log is not for us, nobody else says what is in the way.
            LoadTest::Hindered(why) | LoadTest::Missing(why) => {
                self.trouble.get_or_insert(why);
            }
            LoadTest::Passed => {}
        }
    }

    /// From the first RELOAD that clamd took until the install was seen. Another reload that was
    /// under way counts with it; half the deadline bounds it.
    pub(super) fn load_took(&self) -> Option<Duration> {
        let half = self.terms.half().duration_since(self.terms.start);
        self.load_took.map(|took| took.min(half))
    }

    /// What stood in the way last.
    pub(super) fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// What the log has shown.
    pub(super) fn into_evidence(self) -> Evidence {
        self.evidence
    }

    /// Nobody who could be spoken to: given up after a while, unless the log shows a start.
    fn alone(&mut self, error: String, end: End, now: Instant) {
        self.trouble = Some(error);
        let since = self.nobody.as_ref().map_or(now, |nobody| nobody.since);
        self.nobody = Some(Nobody {
            since,
            end: end.clone(),
        });
        // Whoever was killed in a reload logs no end of it, and listens no more.
        let was_killed = end == End::Absent && self.load_under_way == Some(Current::Reload);
        let is_loading = self.load_under_way.is_some() && !was_killed;
        if now < since + ABSENT_MAX || is_loading {
            return;
        }
        // It may be gone because it cannot start with these databases.
        if self.evidence.failed > 0 && self.terms.scanner && self.load_test == Test::Unneeded {
            self.load_test = Test::Wanted;
        } else {
            self.end = Some(end);
        }
    }

    /// Whether neither clamd nor its log tell anything.
    fn is_in_the_dark(&self) -> bool {
        let told = self.evidence.loaded + self.evidence.failed > 0 || self.load_under_way.is_some();
        self.terms.scanner && !told && self.nobody.is_none()
    }

    fn live(&mut self, now: Instant) {
        self.load_took = self.asked_at.map(|asked| now.duration_since(asked));
        self.trouble = None;
        self.end = Some(End::Live);
    }

    fn futile(&mut self) {
        self.trouble = Some(
            "its log says that it has loaded the databases, and it does not find the canary: \
             does it load official databases only, or another directory?"
                .into(),
        );
        self.end = Some(End::Unproven);
    }

    fn refused(&mut self, scan: Option<LoadTest>) {
        let clamd = (self.evidence.failed > 0).then(|| self.evidence.words());
        self.end = Some(End::Refused { clamd, scan });
    }
}

/// What is the matter with a clamd whose blocking reload failed.
pub(super) const DEAD: &str =
    "it has no engine since a load failed (ConcurrentDatabaseReload no): restart it";

impl Terms {
    fn reload_pace(&self) -> Pace {
        if self.concurrent {
            RELOAD
        } else {
            RELOAD_BLOCKING
        }
    }

    /// When `clamscan` decides, if neither clamd nor its log has shown anything.
    fn dark_until(&self) -> Instant {
        let half = self.half();
        if self.logs {
            return half;
        }
        let patience = self.last_load.map_or(DARK_UNMEASURED, |load| {
            load.saturating_mul(DARK_LOADS).max(DARK_MIN)
        });
        half.min(self.start + patience)
    }

    fn half(&self) -> Instant {
        self.start + self.deadline.saturating_duration_since(self.start) / 2
    }
}

/// Waits that grow.
struct Pace {
    first: Duration,
    last: Duration,
    percent: u32,
}

impl Pace {
    fn after(&self, wait: Duration) -> Duration {
        (wait * self.percent / 100).min(self.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays `script` against an attempt and returns how it ended, in which second, and when
    /// RELOADs were asked for. `terms` are any of `blocking`, `mute` (no log), `scanner`, `broken`
    /// (the scanner fails), `barred` (it may not read a file), `unreloadable`, `took-N` (the last load
    /// took N seconds). The script is times and what happens then:
    ///
    /// - what looks show from then on: `old`, `canary`, `right`, `wrong`, `unknown` (VERSION),
    ///   `absent`, `forbidden`, `silent`;
    /// - what the log shows: `starting`, `loading`, `loaded`, `failed`, `hindered`, `dead`, and with
    ///   `early-` in front a load that began before the mark.
    fn play(terms: &str, script: &str) -> String {
        let has = |word| terms.split(' ').any(|term| term == word);
        let start = Instant::now();
        let mut attempt = Attempt::new(Terms {
            start,
            deadline: start + Duration::from_secs(300),
            concurrent: !has("blocking"),
            reloads: !has("unreloadable"),
            logs: !has("mute"),
            scanner: ["scanner", "broken", "barred"].into_iter().any(has),
            last_load: terms.split(' ').find_map(|term| {
                let seconds = term.strip_prefix("took-")?.parse().ok()?;
                Some(Duration::from_secs(seconds))
            }),
        });
        let mut events = script.split(", ").map(|event| {
            let (time, what) = event.split_once(' ').expect("a time and a word");
            let time: f64 = time.parse().expect("seconds");
            (start + Duration::from_secs_f64(time), what)
        });
        let mut coming = events.next();
        let mut showing = "old";
        let mut now = start;
        let mut reloads = Vec::new();
        let seconds = |at: Instant| format!("{:.1}", at.duration_since(start).as_secs_f64());
        for _ in 0..10_000 {
            while let Some((_, what)) = coming.filter(|(at, _)| *at <= now) {
                match load(what) {
                    Some(load) => {
                        attempt.load_under_way(None);
                        attempt.logged(&load, now);
                    }
                    None if what == "starting" => attempt.load_under_way(Some(Current::First)),
                    None if what == "loading" => attempt.load_under_way(Some(Current::Reload)),
                    None => showing = what,
                }
                coming = events.next();
            }
            match attempt.next(now) {
                Step::Look => attempt.seen(sight(showing), now),
                Step::Reload => {
                    reloads.push(seconds(now));
                    let asked = match showing {
                        "absent" => Asked::Absent("nobody".into()),
                        "silent" => Asked::Failed("no answer".into()),
                        _ => Asked::Taken,
                    };
                    attempt.asked(asked, now);
                }
                Step::LoadTest if has("broken") => {
                    attempt.tested(LoadTest::Failed("bad line".into()));
                }
                Step::LoadTest if has("barred") => {
                    attempt.tested(LoadTest::Hindered("may not read x.ndb".into()));
                }
                Step::LoadTest => attempt.tested(LoadTest::Passed),
                Step::Wait(until) => {
                    assert!(now < until, "waits for the past");
                    now = coming.map_or(until, |(at, _)| until.min(at.max(now)));
                }
                Step::Done(end) => {
                    let trouble = attempt.trouble().unwrap_or("-");
                    let end = match end {
                        End::Live => "live".to_owned(),
                        End::Refused { clamd, scan } => {
                            let scan = scan.map_or("-".to_owned(), |scan| format!("{scan:?}"));
                            format!("refused ({}; {scan})", clamd.as_deref().unwrap_or("-"))
                        }
                        End::Unproven => format!("unproven ({trouble})"),
                        End::Absent => format!("absent ({trouble})"),
                    };
                    let at = now.duration_since(start).as_secs();
                    return format!("{end} at {at}; {}", reloads.join(" "));
                }
            }
        }
        panic!("it does not end");
    }

    fn sight(word: &str) -> Sight {
        match word {
            "old" => Sight::NoCanary(None),
            "canary" => Sight::Canary,
            "right" => Sight::VersionRight,
            "wrong" => Sight::VersionWrong("ClamAV 1.4.6/101".into()),
            "unknown" => Sight::VersionUnknown,
            "absent" => Sight::Absent("nobody".into()),
            "forbidden" => Sight::Forbidden("not for us".into()),
            "silent" => Sight::Silent("no answer".into()),
            other => panic!("no such sight: {other}"),
        }
    }

    fn load(word: &str) -> Option<Load> {
        let (after, word) = match word.strip_prefix("early-") {
            Some(word) => (false, word),
            None => (true, word),
        };
        let end = match word {
            "loaded" => LoadEnd::Loaded,
            "failed" => LoadEnd::Failed("Malformed database".into()),
            "hindered" => LoadEnd::Hindered("Can't allocate memory".into()),
            "dead" => LoadEnd::Dead,
            _ => return None,
        };
        Some(Load { after, end })
    }

    #[track_caller]
    fn check(terms: &str, script: &str, expected: &str) {
        assert_eq!(play(terms, script), expected, "{terms}: {script}");
    }

    #[test]
    fn what_is_live_already_is_not_loaded_again() {
        check("", "0 canary", "live at 0; ");
    }

    #[test]
    fn one_reload_is_enough_if_it_is_not_dropped() {
        check("", "0 old, 0.1 canary", "live at 0; 0.0");
        check("mute", "0 old, 0.1 canary", "live at 0; 0.0");
    }

    #[test]
    fn a_dropped_reload_is_asked_for_again_ever_more_seldom() {
        check(
            "mute",
            "0 old, 50 canary",
            "live at 50; 0.0 1.0 3.0 7.0 15.0 30.0 45.0",
        );
    }

    #[test]
    fn when_a_load_that_began_too_early_ends_reload_is_asked_for_at_once() {
        check(
            "",
            "0 old, 2 early-loaded, 2.5 loaded, 2.5 canary",
            "live at 2; 0.0 1.0 2.1",
        );
        check(
            "",
            "0 old, 2 early-failed, 2.5 loaded, 2.5 canary",
            "live at 2; 0.0 1.0 2.1",
        );
    }

    #[test]
    fn a_slow_load_is_waited_for_to_the_deadline() {
        check("mute", "0 old, 299 canary", &live_after_silence("299"));
        let end = play("mute", "0 old");
        assert!(end.starts_with("unproven (-) at 300"), "{end}");
    }

    fn live_after_silence(at: &str) -> String {
        let more: String = (1..=18)
            .map(|n| format!(" {:.1}", 15.0 + 15.0 * f64::from(n)))
            .collect();
        format!("live at {at}; 0.0 1.0 3.0 7.0 15.0{more}")
    }

    #[test]
    fn two_failed_loads_in_a_row_are_a_refusal() {
        let refused = "refused (clamd: Malformed database; -)";
        check(
            "",
            "0.5 failed, 2.6 failed",
            &format!("{refused} at 2; 0.0 2.5"),
        );
        let script = "0.5 failed, 1 loaded, 1.5 failed, 5 failed";
        check("", script, &format!("{refused} at 5; 0.0 3.5"));
    }

    #[test]
    fn one_failed_load_is_none() {
        check(
            "",
            "0.5 failed, 2.6 loaded, 2.6 canary",
            "live at 2; 0.0 2.5",
        );
        let end = play("scanner", "0.5 failed");
        assert!(
            end.starts_with("unproven (it could not load: Malformed database) at 300"),
            "{end}"
        );
    }

    #[test]
    fn what_began_before_the_mark_or_lacked_memory_is_no_evidence() {
        let end = play("", "0.5 early-failed, 1 early-failed, 2 early-failed");
        assert!(end.starts_with("unproven"), "{end}");
        let end = play("", "0.5 hindered, 3 hindered, 9 hindered");
        let said = "unproven (it could not load: Can't allocate memory) at 300";
        assert!(end.starts_with(said), "{end}");
    }

    #[test]
    fn without_a_word_from_clamd_the_scanner_decides_after_twice_its_last_load() {
        let refused = "refused (-; Failed(\"bad line\"))";
        let check = |terms: &str, at: u64| {
            let end = play(terms, "0 silent");
            let expected = format!("{refused} at {at};");
            assert!(end.starts_with(&expected), "{terms}: {end}");
        };
        check("mute broken took-20", 40);
        check("mute broken", 60); // never measured
        check("mute broken took-0", 5);
        check("mute broken took-290", 150); // no later than half the deadline
        check("broken took-20", 150); // its log would show a load
        let end = play("mute scanner", "0 silent");
        assert!(end.starts_with("unproven (no answer) at 300"), "{end}");
        let end = play("mute barred", "0 old");
        let said = "unproven (may not read x.ndb) at 300";
        assert!(end.starts_with(said), "{end}");
        // Its log shows that it is still at it.
        let end = play("broken", "1 loading, 200 loaded, 200 canary");
        assert!(end.starts_with("live at 200"), "{end}");
    }

    #[test]
    fn nobody_at_the_socket_is_absent_after_a_moment() {
        check("", "0 absent", "absent (nobody) at 3; ");
        check("blocking", "0 absent", "absent (nobody) at 3; 0.0");
        check("", "0 forbidden", "unproven (not for us) at 3; ");
    }

    #[test]
    fn a_clamd_that_starts_is_waited_for() {
        check("", "0 old, 1 absent, 2 canary", "live at 2; 0.0");
        check(
            "",
            "0 absent, 1 starting, 60 loaded, 60 canary",
            "live at 60; ",
        );
        // It had begun to load before the files were there.
        check("", "0 absent, 1 old, 2 loaded, 2 canary", "live at 2; 1.5");
    }

    #[test]
    fn a_clamd_that_was_killed_in_a_reload_is_absent_and_one_that_is_started_then_is_waited_for() {
        check(
            "",
            "0 old, 1 loading, 2 absent",
            "absent (nobody) at 6; 0.0 1.0",
        );
        check(
            "",
            "0 old, 1 loading, 2 absent, 4 starting, 60 loaded, 60 canary",
            "live at 60; 0.0 1.0",
        );
        // It is there, and only the socket is not for us.
        check(
            "",
            "0 old, 1 loading, 2 forbidden, 60 loaded",
            "unproven (not for us) at 60; 0.0 1.0",
        );
    }

    #[test]
    fn a_clamd_that_cannot_start_with_the_databases_is_a_refusal() {
        let refused = "refused (clamd: Malformed database; -)";
        check(
            "",
            "0 absent, 1 failed, 2 failed",
            &format!("{refused} at 2; "),
        );
        check("", "0 absent, 1 failed", "absent (nobody) at 3; ");
        check("scanner", "0 absent, 1 failed", "absent (nobody) at 3; ");
        check(
            "broken",
            "0 absent, 1 failed",
            "refused (clamd: Malformed database; Failed(\"bad line\")) at 3; ",
        );
    }

    #[test]
    fn where_reloads_block_they_are_seldom_and_come_before_the_first_look() {
        check("blocking", "0 silent, 70 canary", "live at 70; 0.0 60.0");
        check("blocking", "0 canary", "live at 0; 0.0");
    }

    #[test]
    fn where_reloads_block_one_failure_is_all_that_will_be_seen() {
        let refused = "refused (clamd: Malformed database; -) at 5; 0.0";
        check("blocking", "0 silent, 5 failed", refused);
        check(
            "blocking broken",
            "0 silent, 5 failed",
            "refused (clamd: Malformed database; Failed(\"bad line\")) at 5; 0.0",
        );
        check(
            "blocking scanner",
            "0 silent, 5 failed",
            "refused (clamd: Malformed database; Passed) at 5; 0.0",
        );
        // It was dead before we came, and is restarted.
        check("blocking", "0 silent, 1 dead, 30 canary", "live at 30; 0.0");
    }

    #[test]
    fn version_counts_together_with_a_load_in_the_log() {
        check("", "0 wrong, 2 loaded, 2 right", "live at 2; 0.0 1.0");
        check("", "0 right, 2 loaded", "live at 2; 0.0 1.0");
        check("", "0 unknown, 2 loaded", "live at 2; 0.0 1.0");
        let end = play("", "0 wrong, 2 right");
        assert!(end.starts_with("unproven (its log shows no load"), "{end}");
        let end = play("", "0 right, 2 failed, 2 loaded, 2 wrong, 5 loaded");
        assert!(
            end.starts_with("unproven (VERSION says `ClamAV 1.4.6/101`) at 5"),
            "{end}"
        );
    }

    #[test]
    fn version_without_a_log_must_change() {
        check("mute", "0 wrong, 2 right", "live at 2; 0.0 1.0");
        let end = play("mute", "0 right");
        assert!(
            end.starts_with("unproven (VERSION tells nothing new"),
            "{end}"
        );
    }

    #[test]
    fn a_clamd_that_does_not_load_the_canary_is_not_asked_for_ever() {
        let end = play("", "0 old, 0.1 loaded, 1.1 loaded");
        assert!(
            end.starts_with("unproven (its log says that it has loaded"),
            "{end}"
        );
        assert!(end.ends_with("; 0.0 1.0"), "{end}");
    }

    #[test]
    fn a_clamd_that_cannot_be_asked_is_watched() {
        check(
            "unreloadable",
            "0 old, 250 loaded, 250 canary",
            "live at 250; ",
        );
    }
}
