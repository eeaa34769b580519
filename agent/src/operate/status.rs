//! What `clamcast-agent status` and `verify` show.

use std::fmt::{self, Write as _};
use std::time::Duration;

use clamcast_proto::receipt::{ClamdReport, ClamdState, FileState, Found, Proof};
use clamcast_proto::{DatabaseName, Position};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::core::status::{Blindness, DriftStatus, HeldBack, LastStatus, RepairWait, Status};
use crate::install::FileCheck;

impl Status {
    /// For people; `now` makes ages of times.
    pub fn text(&self, now: Timestamp) -> String {
        let mut text = String::new();
        let mut line = |key: &str, value: &dyn fmt::Display| {
            writeln!(text, "{key:<13} {value}").expect("a string takes everything");
        };
        line(
            "agent:",
            &format_args!("{} of fleet {}", self.agent, self.fleet),
        );
        let master = &self.master;
        let since = age(master.since, now);
        let version = master.version.as_deref().unwrap_or("?");
        match (&master.address, master.connected) {
            (Some(address), true) => line(
                "master:",
                &format_args!("connected to {address} for {since} (version {version})"),
            ),
            (_, _) => line("master:", &format_args!("not connected for {since}")),
        }
        if let Some(error) = &master.error {
            line("", error);
        }
        match (self.epoch, self.generation, self.published) {
            (Some(epoch), Some(generation), Some(published)) => line(
                "installed:",
                &format_args!(
                    "generation {epoch}.{generation}, published {} ago, {}",
                    age(published, now),
                    match self.files.len() {
                        1 => "1 database".to_owned(),
                        count => format!("{count} databases"),
                    },
                ),
            ),
            (_, _, _) => line("installed:", &"nothing yet"),
        }
        if !self.unsigned.is_empty() {
            line(
                "unsigned:",
                &format_args!(
                    "{}; no verified signature says who made them",
                    joined(&self.unsigned)
                ),
            );
        }
        held_back(&self.held_back, self.held_back_more, now, &mut line);
        if self.generation.is_some() {
            let changed = !self.drift.files.is_empty();
            line("live:", &is_live(self.live, changed, &self.clamd));
        }
        if let Some(last) = &self.last {
            let LastStatus {
                epoch,
                generation,
                outcome,
                time,
                ..
            } = last;
            let ago = age(*time, now);
            line(
                "last:",
                &format_args!("generation {epoch}.{generation} {outcome}, {ago} ago"),
            );
            if let Some(error) = &last.error {
                line("", error);
            }
        }
        match self.working_on {
            Some(position) => line("phase:", &format_args!("{} {position}", self.phase)),
            None => line("phase:", &self.phase),
        }
        match (self.fresh_until, self.stale_since) {
            (Some(until), _) => line("fresh:", &validity(until, now)),
            (None, Some(since)) => line(
                "fresh:",
                &format_args!(
                    "{}: no freshness statement came since the first start",
                    validity(since, now)
                ),
            ),
            (None, None) => line("fresh:", &"no freshness statement from the master yet"),
        }
        let version = self.clamd.version.as_deref().unwrap_or("version unknown");
        match self.clamd.state {
            ClamdState::Up => line("clamd:", &version),
            ClamdState::Down => line("clamd:", &"nobody at its socket"),
            ClamdState::Silent => line("clamd:", &"does not answer"),
            ClamdState::None => line("clamd:", &"none, by configuration"),
        }
        if let Some(note) = &self.clamd.note {
            line("", note);
        }
        self.drift.text(now, &mut line);
        if !self.foreign.is_empty() {
            line("foreign:", &self.foreign.join(", "));
        }
        if !self.adopted.is_empty() {
            line(
                "adopted:",
                &format_args!(
                    "{}; kept until the fleet withdraws the name",
                    joined(&self.adopted)
                ),
            );
        }
        if self.receipts_pending > 0 {
            line(
                "receipts:",
                &format_args!("{} wait for the master", self.receipts_pending),
            );
        }
        line("certificate:", &validity(self.certificate_expires, now));
        line(
            "root key:",
            &format_args!("{}, key set {}", self.root, self.keys_version),
        );
        if let Some(error) = &self.error {
            line("error:", error);
        }
        if let Some(alarm) = &self.alarm {
            line("alarm:", alarm);
        }
        text
    }
}

/// Most names in a line for people. `--json` has all.
const NAMED_MAX: usize = 20;

/// Lines about the files that the master holds back.
fn held_back(
    files: &[HeldBack],
    more: usize,
    now: Timestamp,
    line: &mut impl FnMut(&str, &dyn fmt::Display),
) {
    for (n, HeldBack { name, since }) in files.iter().enumerate() {
        let key = if n == 0 { "held back:" } else { "" };
        let age = age(*since, now);
        line(
            key,
            &format_args!("{name}, on the master since {since:.0} ({age})"),
        );
    }
    if more > 0 {
        line("", &format_args!("and {more} more"));
    }
    if !files.is_empty() {
        line("", &"`clamcast-master status` says why");
    }
}

fn joined(names: &[DatabaseName]) -> String {
    let named = names.iter().take(NAMED_MAX).map(DatabaseName::as_str);
    let named = named.collect::<Vec<_>>().join(", ");
    match names.len().checked_sub(NAMED_MAX) {
        None | Some(0) => named,
        Some(more) => format!("{named} and {more} more"),
    }
}

impl DriftStatus {
    fn text(&self, now: Timestamp, line: &mut impl FnMut(&str, &dyn fmt::Display)) {
        let rehashed = match self.rehashed {
            Some(time) => format!("every byte read {} ago", age(time, now)),
            None => "not every byte read since the start".to_owned(),
        };
        let blind = if self.watched { "" } else { "; no file events" };
        if self.files.is_empty() {
            line("drift:", &format_args!("none; {rehashed}{blind}"));
        }
        if let Some(Blindness { why, remedy }) = &self.blind {
            line("", &format_args!("{why}; {remedy}"));
        }
        for (n, file) in self.files.iter().enumerate() {
            let what = match file.found {
                Found::Missing => "is missing",
                Found::Changed => "was changed",
                Found::Unreadable => "cannot be read",
            };
            let key = if n == 0 { "drift:" } else { "" };
            line(key, &format_args!("{} {what}", file.name));
        }
        if let Some(reason) = &self.reason {
            line("", reason);
        }
        if let Some(RepairWait { since, until }) = self.repair_waits {
            let when = match until <= now {
                true => "now".to_owned(),
                false => format!("by {until} (in {})", age(now, until)),
            };
            line(
                "",
                &format_args!(
                    "the repair waits since {since} ({}) and starts {when} unless another updater is \
                     seen before",
                    age(since, now)
                ),
            );
        }
        if let (Some(updater), Some(seen)) = (&self.updater, self.updater_seen) {
            line(
                "",
                &format_args!("{updater} was at work {} ago", age(seen, now)),
            );
        }
    }
}

/// The end of a validity, and how far it lies ahead or in the past.
fn validity(until: Timestamp, now: Timestamp) -> String {
    match until < now {
        true => format!("expired at {until} ({} ago)", age(until, now)),
        false => format!("valid until {until} (another {})", age(now, until)),
    }
}

/// The time between two instants in the two largest units; zero if `to` lies before `from`.
fn age(from: Timestamp, to: Timestamp) -> String {
    let duration = to.duration_since(from).max(SignedDuration::ZERO);
    let secs = Duration::from_secs(duration.as_secs().unsigned_abs());
    let text = humantime::format_duration(secs).to_string();
    let units: Vec<_> = text.split(' ').take(2).collect();
    units.join(" ")
}

/// Whether the installed set is live, and the evidence.
fn is_live(live: bool, changed: bool, clamd: &ClamdReport) -> &'static str {
    match (live, clamd.state, clamd.proof) {
        (true, ClamdState::None, _) => "yes: this host has no clamd by configuration",
        (true, _, Proof::Canary) => "yes: clamd was seen scanning with it",
        (true, _, Proof::Version) => "yes: by clamd's VERSION and log",
        // Since a start of the agent, or while another set is tried.
        (true, _, Proof::None) => "yes: by the proof of its install, not repeated since",
        (false, ClamdState::Down, _) => "no: clamd is not there",
        (false, ..) if changed => "no: its files were changed",
        (false, ClamdState::None, _) => {
            "no: this host has no clamd by configuration, and the set was not seen whole yet"
        }
        (false, ..) => "no: clamd was not seen scanning with it yet",
    }
}

/// The result of `verify`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Verification {
    /// Whether every database is as published.
    pub ok: bool,
    /// The installed generation.
    pub position: Option<Position>,
    /// The generation's databases.
    pub files: Vec<CheckedFile>,
}

/// One database, compared.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct CheckedFile {
    /// The database's name.
    pub name: DatabaseName,
    /// Whether the file is as published.
    pub ok: bool,
    /// The published file.
    pub expected: FileState,
    /// The file on disk.
    pub found: Option<FileState>,
    /// Why the file could not be read.
    pub error: Option<String>,
}

impl Verification {
    /// Judges the files on disk of the generation at `position`.
    pub fn new(position: Option<Position>, checks: Vec<FileCheck>) -> Self {
        let files: Vec<_> = checks.into_iter().map(CheckedFile::from).collect();
        Self {
            ok: position.is_some() && files.iter().all(|file| file.ok),
            position,
            files,
        }
    }

    /// For people.
    pub fn text(&self) -> String {
        let Some(position) = self.position else {
            return "nothing is installed yet\n".to_owned();
        };
        let mut text = String::new();
        let mut line = |name: &str, what: &str| {
            writeln!(text, "{name}: {what}").expect("a string takes everything");
        };
        for file in &self.files {
            let what = match (file.ok, &file.error, &file.found) {
                (true, ..) => "as published".to_owned(),
                (false, Some(error), _) => format!("cannot be read: {error}"),
                (false, None, None) => "missing".to_owned(),
                (false, None, Some(found)) => format!(
                    "changed: {} bytes, SHA-256 {}, expected {} bytes, SHA-256 {}",
                    found.size,
                    found.sha256.short(),
                    file.expected.size,
                    file.expected.sha256.short()
                ),
            };
            line(file.name.as_str(), &what);
        }
        let verdict = if self.ok {
            "conforms"
        } else {
            "does not conform"
        };
        line(&format!("generation {position}"), verdict);
        text
    }
}

impl From<FileCheck> for CheckedFile {
    fn from(check: FileCheck) -> Self {
        Self {
            name: check.expected.name.clone(),
            ok: check.is_right(),
            expected: check.expected,
            found: check.found,
            error: check.error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clamcast_proto::{Digest, Epoch, Generation};

    #[test]
    fn a_line_names_some_databases_and_counts_the_others() {
        let names: Vec<DatabaseName> = (0..NAMED_MAX + 3)
            .map(|number| format!("{number:02}.ndb").parse().unwrap())
            .collect();
        assert_eq!(joined(&names[..2]), "00.ndb, 01.ndb");
        assert!(joined(&names[..NAMED_MAX]).ends_with(", 19.ndb"));
        assert!(joined(&names).ends_with(", 19.ndb and 3 more"));
    }

    #[test]
    fn live_says_by_what_it_is_known() {
        for (live, state, proof, text) in [
            (true, ClamdState::Up, Proof::Canary, "seen scanning"),
            (true, ClamdState::Up, Proof::Version, "VERSION"),
            (true, ClamdState::Up, Proof::None, "not repeated since"),
            (false, ClamdState::Down, Proof::Canary, "not there"),
        ] {
            let clamd = ClamdReport {
                state,
                proof,
                ..ClamdReport::default()
            };
            let said = is_live(live, false, &clamd);
            assert!(said.contains(text), "{state:?}, {proof:?}: {said}");
        }
    }

    #[test]
    fn files_that_the_master_holds_back_are_shown_with_the_time_and_the_next_step() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let shown = |count: usize, more| {
            let held = HeldBack {
                name: "feed.ndb".parse().unwrap(),
                since: at(3600),
            };
            let mut text = String::new();
            held_back(&vec![held; count], more, at(3 * 3600), &mut |key, value| {
                writeln!(text, "{key}|{value}").unwrap();
            });
            text
        };
        assert_eq!(shown(0, 0), "");
        assert_eq!(
            shown(2, 3),
            "held back:|feed.ndb, on the master since 1970-01-01T01:00:00Z (2h)\n\
             |feed.ndb, on the master since 1970-01-01T01:00:00Z (2h)\n\
             |and 3 more\n|`clamcast-master status` says why\n"
        );
    }

    fn check(found: Result<Option<&[u8]>, &str>) -> Verification {
        let name: DatabaseName = "daily.cld".parse().unwrap();
        let state = |content: &[u8]| FileState {
            name: name.clone(),
            size: content.len() as u64,
            sha256: Digest::of(content),
        };
        let position = Position {
            epoch: Epoch(1),
            generation: Generation::FIRST,
        };
        let check = FileCheck {
            expected: state(b"good"),
            found: found.ok().flatten().map(state),
            error: found.err().map(str::to_owned),
        };
        Verification::new(Some(position), vec![check])
    }

    #[test]
    fn only_the_published_bytes_conform() {
        assert!(check(Ok(Some(b"good"))).ok);
        for (found, text) in [
            (Ok(Some(&b"evil"[..])), "changed"),
            (Ok(None), "missing"),
            (Err("Permission denied"), "Permission denied"),
        ] {
            let verification = check(found);
            assert!(!verification.ok);
            let shown = verification.text();
            assert!(
                shown.contains(text) && shown.contains("does not conform"),
                "{shown}"
            );
        }
    }

    #[test]
    fn a_host_without_a_generation_does_not_conform() {
        assert!(!Verification::new(None, Vec::new()).ok);
    }

    #[test]
    fn what_is_past_its_end_is_reported_as_expired_with_the_time() {
        let at = |secs| Timestamp::from_second(secs).unwrap();
        let ends = at(3600);
        for now in [3601, 7200] {
            let said = validity(ends, at(now));
            assert!(
                said.starts_with("expired at 1970-01-01T01:00:00Z"),
                "{said}"
            );
        }
        assert_eq!(
            validity(ends, at(3540)),
            "valid until 1970-01-01T01:00:00Z (another 1m)"
        );
        assert!(!validity(ends, ends).contains("expired"), "its last second");
    }

    #[test]
    fn ages_have_two_units() {
        let at = |secs| Timestamp::from_second(secs).unwrap();
        assert_eq!(age(at(0), at(59)), "59s");
        assert_eq!(age(at(0), at(2 * 3600 + 61)), "2h 1m");
        assert_eq!(age(at(0), at(86_400 + 3700)), "1day 1h");
        assert_eq!(age(at(0), at(364 * 86_400 + 3700)), "11months 29days");
        assert_eq!(age(at(5), at(0)), "0s");
    }
}
