//! Renders the answers of the daemon: results on stdout, diagnostics on stderr.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::Write as _;

use clamcast_daemon::admin::Finish;
use clamcast_daemon::exit::{self, Exit};
use clamcast_daemon::say;
use clamcast_daemon::table::{self, Table, fold, printable, printable_json, terminal_width};
use clamcast_proto::manifest::SignedBy;
use clamcast_proto::receipt::ClamdState;
use clamcast_proto::{AgentName, DatabaseName, Digest, GroupName, Position};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize as _;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::api::{
    self, Alarm, Counts, Current, Expiry, Generation, HeldUnit, Preview, Publication,
    PublicationOutcome, Published, Signatures, Status, UnitState,
};
use crate::fleet::agents::Row;

pub(crate) mod audit;
pub(crate) mod force;
pub(crate) mod rollout;

/// Hosts that are named in a line about an adopted name; `--json` has all.
const ADOPTED_HOSTS_MAX: usize = 3;

/// The answer of the daemon does not have the expected form.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot read the answer: command and daemon are of different versions; restart the daemon \
     (`systemctl restart clamcast-master`) or use its own command; --json prints the answer unread"
)]
pub(crate) struct Unreadable(#[source] pub(crate) serde_json::Error);

/// Ends a command: prints the result as JSON or with `text`, the message on stderr, and returns the exit
/// code.
pub(crate) fn end<T: DeserializeOwned>(
    finish: Finish,
    json: bool,
    text: impl FnOnce(T),
) -> Result<(), Exit> {
    let Finish {
        exit,
        result,
        message,
    } = finish;
    let mut read = Ok(());
    if json && !result.is_null() {
        say!("{}", table::json(&result));
    } else if !result.is_null() {
        read = serde_json::from_value(result).map(text);
    }
    match (read, exit, message) {
        (Err(source), code, message) => {
            if let Some(message) = message {
                eprintln!("{message}");
            }
            let code = if code == exit::DONE {
                exit::FAILED
            } else {
                code
            };
            Err(Exit::new(code, Unreadable(source)))
        }
        (Ok(()), exit::DONE, None) => Ok(()),
        (Ok(()), exit::DONE, Some(message)) => {
            eprintln!("{message}");
            Ok(())
        }
        (Ok(()), code, Some(message)) => Err(Exit::new(code, anyhow::anyhow!("{message}"))),
        (Ok(()), code, None) => Err(Exit::quietly(code)),
    }
}

pub(crate) fn published(result: Publication) {
    if let Some(Published { position, .. }) = result.generation {
        match result.outcome {
            PublicationOutcome::New => say!("published {position}"),
            PublicationOutcome::Begun => say!("{position} waits no longer"),
            PublicationOutcome::Unchanged if result.held.is_empty() => {
                say!("unchanged: {position} is what the mirror holds");
            }
            PublicationOutcome::Unchanged => say!("unchanged: {position}"),
            PublicationOutcome::Held | PublicationOutcome::Refused => {
                say!("current is still {position}");
            }
        }
    }
    for unit in result.held.iter().take(NAMED_MAX) {
        say!("{}", held(unit, Timestamp::now()));
    }
    if let Some(more) = result.held.len().checked_sub(NAMED_MAX + 1) {
        say!(
            "and {} more units are held; `status --json` has them all",
            more + 1
        );
    }
    if let Some(agents) = result.agents {
        say!("{}", counts(&agents));
    }
}

pub(crate) fn preview(preview: Preview) {
    let would = match preview.outcome {
        PublicationOutcome::New | PublicationOutcome::Begun => "would be published".to_owned(),
        PublicationOutcome::Unchanged => "unchanged: nothing would be published".to_owned(),
        PublicationOutcome::Held => "would be held".to_owned(),
        PublicationOutcome::Refused => "would be refused".to_owned(),
    };
    match &preview.reason {
        Some(reason) => say!("{would}: {}", printable(reason)),
        None => say!("{would}"),
    }
    let mut table = Table::with_width(["UNIT", "STATE", "FILES", "WHY"], terminal_width());
    let mut unchanged = 0;
    for unit in &preview.units {
        if unit.state == UnitState::Unchanged {
            unchanged += 1;
            continue;
        }
        let why = unit.reason.as_deref().map(|reason| match &unit.remedy {
            Some(remedy) => format!("{reason}; {remedy}"),
            None => reason.to_owned(),
        });
        let files: Vec<_> = unit.files.iter().map(DatabaseName::as_str).collect();
        table.row([
            unit.unit.as_str(),
            unit.state.word(),
            or_dash((!files.is_empty()).then(|| files.join(" ")).as_deref()),
            or_dash(why.as_deref()),
        ]);
    }
    if unchanged < preview.units.len() {
        say!("{table}");
    }
    if unchanged > 0 {
        say!("{unchanged} more units are unchanged");
    }
    for skipped in &preview.skipped {
        say!("skipped: {}", printable(&skipped.to_string()));
    }
    for accepted in &preview.accepted {
        say!("accepted: {}", printable(accepted));
    }
}

/// A line about a held unit.
fn held(unit: &HeldUnit, now: Timestamp) -> String {
    let HeldUnit {
        unit,
        reason,
        remedy,
        since,
        carries,
    } = unit;
    let carries = match carries {
        Some(carried) => format!("the fleet keeps {carried}"),
        None => "nothing is published in its place".to_owned(),
    };
    let since = ago(*since, now);
    printable(&format!(
        "held: {unit}: {reason} (since {since}; {carries}); {remedy}"
    ))
}

/// Agents and units that `status` names; `agents` has them all.
const NAMED_MAX: usize = 20;

pub(crate) fn status(status: Status) {
    for line in status_lines(&status, Timestamp::now(), terminal_width()) {
        say!("{line}");
    }
}

/// What `status` prints at `now`, for a terminal of this width or a pipe.
fn status_lines(status: &Status, now: Timestamp, width: Option<usize>) -> Vec<String> {
    let mut lines = Lines::new(width);
    lines.field("fleet", status.fleet.as_str());
    match &status.current {
        None => lines.field("generation", "none published yet"),
        Some(Current {
            published,
            signatures: age,
        }) => {
            let generation = format!(
                "{}, published {} (content {})",
                published.position,
                ago(published.published, now),
                short(&published.content)
            );
            lines.field("generation", &generation);
            if let Some(age) = age {
                signatures(&mut lines, age, now);
            }
        }
    }
    rollout::standing(&mut lines, &status.rollout);
    lines.field("agents", &counts(&status.agents));
    if let Some(refused) = &status.refused {
        lines.alarm(&refused.to_string());
    }
    for unit in status.held.iter().take(NAMED_MAX) {
        lines.alarm(&held(unit, now));
    }
    if let Some(more) = status.held.len().checked_sub(NAMED_MAX + 1) {
        lines.alarm(&format!(
            "and {} more units are held; `--json` has them all",
            more + 1
        ));
    }
    for skipped in status.skipped.iter().take(NAMED_MAX) {
        lines.field("skipped", &printable(&skipped.to_string()));
    }
    if let Some(more) = status.skipped.len().checked_sub(NAMED_MAX + 1) {
        lines.field(
            "skipped",
            &format!("{} more; `--json` has them all", more + 1),
        );
    }
    for Alarm { name, text, since } in &status.alarms {
        // The rollout's lines say the same of these, with the hosts.
        if !["set-aside", "withheld", "weighing"].contains(&&**name) {
            lines.alarm(&format!(
                "alarm: {text} ({name}, since {})",
                ago(*since, now)
            ));
        }
    }
    for Expiry { name, ends } in &status.certificates {
        let command = if name == "master" { "master" } else { "agent" };
        let ends = match *ends <= now {
            true => format!("expired at {ends:.0}"),
            false => format!("expires at {ends:.0}"),
        };
        lines.alarm(&format!(
            "certificate of {name} {ends}; `clamcast-certs {command} --force` makes a new one"
        ));
    }
    // The rollout has a field of its own.
    for wait in status.waits.iter().filter(|wait| wait.name != "rollout") {
        let until = wait
            .until
            .map_or_else(String::new, |it| format!(", until {it:.0}"));
        let since = ago(wait.since, now);
        lines.field(
            "waits",
            &format!("{}: {} (since {since}{until})", wait.name, wait.text),
        );
    }
    if status.lagging.is_empty() {
        return lines.lines;
    }
    let columns = ["NOT CONFORMANT OR AWAY", "LINK", "OUTCOME", "SINCE", "WHY"];
    let mut table = Table::with_width(columns, width);
    for row in status.lagging.iter().take(NAMED_MAX) {
        table.row([
            row.name.as_str(),
            link(row.connected),
            &row.outcome,
            &age(row.since, now),
            or_dash(row.error.as_deref()),
        ]);
    }
    lines.table(&table);
    if status.lagging.len() > NAMED_MAX {
        let more = status.lagging.len() - NAMED_MAX;
        lines.line(&format!("and {more} more; `agents` has them all"));
    }
    lines.lines
}

/// The age of the signatures.
fn signatures(lines: &mut Lines, signatures: &Signatures, now: Timestamp) {
    let Signatures {
        name,
        version,
        built,
        alarm: _, // stands among the alarms
    } = signatures;
    let built = ago(*built, now);
    lines.field(
        "signatures",
        &format!("{name} version {version}, built {built}"),
    );
}

/// Text that fits a terminal.
struct Lines {
    width: Option<usize>,
    lines: Vec<String>,
}

/// Where the values of a list of fields begin.
const VALUES_AT: usize = 13;

impl Lines {
    fn new(width: Option<usize>) -> Self {
        let lines = Vec::new();
        Self { width, lines }
    }

    fn field(&mut self, name: &str, value: &str) {
        for (number, part) in self.folded(value, VALUES_AT).iter().enumerate() {
            let name = if number == 0 { name } else { "" };
            self.lines.push(format!("{name:VALUES_AT$}{part}"));
        }
    }

    fn line(&mut self, line: &str) {
        let folded = self.folded(line, 0);
        self.lines.extend(folded);
    }

    /// A line that must be seen; in colour where a terminal wants it.
    fn alarm(&mut self, line: &str) {
        let folded = self.folded(line, 0);
        let styled = folded.iter().map(|line| console::style(line).red().bold());
        self.lines.extend(styled.map(|line| line.to_string()));
    }

    /// A table below an empty line.
    fn table(&mut self, table: &Table) {
        self.lines.push(String::new());
        let table = table.to_string();
        self.lines.extend(table.lines().map(str::to_owned));
    }

    fn folded(&self, text: &str, indent: usize) -> Vec<String> {
        let text = printable(text);
        match self.width {
            Some(width) => fold(&text, width.saturating_sub(indent)),
            None => vec![text],
        }
    }
}

/// Prints `status` again and again: on a terminal in place of the one before, elsewhere one after the
/// other.
pub(crate) struct Watch {
    json: bool,
    terminal: console::Term,
    /// What was shown last, to be kept on the screen while the daemon does not answer.
    last: Option<Status>,
    begun: bool,
}

impl Watch {
    pub(crate) fn new(json: bool) -> Self {
        Self {
            json,
            terminal: console::Term::stdout(),
            last: None,
            begun: false,
        }
    }

    pub(crate) fn show(&mut self, finish: Finish) -> Result<(), Exit> {
        if self.json && finish.exit == exit::DONE {
            say!("{}", printable_json(&finish.result.to_string())); // one object a line
            return Ok(());
        }
        if finish.exit != exit::DONE || !self.terminal.is_term() {
            end(finish, self.json, status)?;
            say!("");
            return Ok(());
        }
        let status = serde_json::from_value(finish.result);
        self.last = Some(status.map_err(Unreadable)?);
        self.draw(None);
        Ok(())
    }

    /// The daemon does not answer; one that is restarted comes back.
    pub(crate) fn unreachable(&mut self, error: &str) {
        if self.terminal.is_term() && !self.json {
            self.draw(Some(error));
        } else {
            let now = Timestamp::now();
            eprintln!("{now:.0} {error}");
        }
    }

    fn draw(&mut self, alarm: Option<&str>) {
        let now = Timestamp::now();
        let (rows, columns) = self.terminal.size();
        let (rows, width) = (usize::from(rows), Some(usize::from(columns)));
        let mut lines = Lines::new(width);
        lines.line(&format!("{now:.0}, every 2 s until Ctrl-C"));
        if let Some(alarm) = alarm {
            lines.alarm(&format!("waiting for the daemon: {alarm}"));
        }
        lines.line("");
        let mut lines = lines.lines;
        if let Some(last) = &self.last {
            lines.extend(status_lines(last, now, width));
        }
        let frame = frame(lines, rows, !self.begun);
        self.begun = true;
        // Fails only if the terminal is gone, and with it whoever watches.
        let mut stdout = std::io::stdout().lock();
        let _ = stdout
            .write_all(frame.as_bytes())
            .and_then(|()| stdout.flush());
    }
}

/// What draws `lines` over what is on a terminal of so many rows: each line over the one before and
/// then the rest is cleared, so that nothing flickers and nothing is left. The first one scrolls away
/// what stood there.
fn frame(mut lines: Vec<String>, rows: usize, first: bool) -> String {
    let room = rows.saturating_sub(1).max(1); // the cursor has a row of its own
    if lines.len() > room {
        let hidden = lines.len() - room + 1;
        lines.truncate(room - 1);
        lines.push(format!("and {hidden} lines more than fit"));
    }
    let before = if first {
        "\n".repeat(rows)
    } else {
        String::new()
    };
    let lines: String = lines.iter().map(|line| format!("{line}\x1b[K\n")).collect();
    format!("{before}\x1b[H{lines}\x1b[J")
}

fn link(connected: bool) -> &'static str {
    if connected { "up" } else { "down" }
}

fn yes_or_no(yes: bool) -> &'static str {
    if yes { "yes" } else { "no" }
}

/// A line for each adopted name, with the first hosts that have a file of their own under it.
fn adopted_lines(rows: &[Row]) -> Vec<String> {
    let mut hosts = BTreeMap::<&DatabaseName, Vec<&str>>::new();
    for row in rows {
        for name in &row.adopted {
            hosts.entry(name).or_default().push(row.name.as_str());
        }
    }
    let line = |(name, hosts): (&DatabaseName, Vec<&str>)| {
        let named = hosts[..hosts.len().min(ADOPTED_HOSTS_MAX)].join(", ");
        let more = match hosts.len().saturating_sub(ADOPTED_HOSTS_MAX) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        format!("adopted: {name} of {named}{more}, restored when the fleet withdraws the name")
    };
    hosts.into_iter().map(line).collect()
}

pub(crate) fn agents(rows: Vec<Row>) {
    let now = Timestamp::now();
    let mut table = Table::new([
        "NAME",
        "GROUPS",
        "LINK",
        "GENERATION",
        "LIVE",
        "OUTCOME",
        "SINCE",
        "CLAMD",
        "ERROR",
    ]);
    for row in &rows {
        let groups: Vec<_> = row.groups.iter().map(GroupName::as_str).collect();
        let pinned = if row.pinned { " pinned" } else { "" };
        let version = row.clamd.version.as_ref();
        let version = version.and_then(|version| version.split('/').next());
        table.row([
            row.name.as_str(),
            or_dash(Some(&groups.join(","))),
            link(row.connected),
            &format!("{}{pinned}", position_or_dash(row.position)),
            yes_or_no(row.live),
            &row.outcome,
            &age(row.since, now),
            version.unwrap_or(match row.clamd.state {
                ClamdState::Up => "up",
                ClamdState::Down => "down",
                ClamdState::Silent => "silent",
                ClamdState::None => "none",
            }),
            or_dash(row.error.as_deref()),
        ]);
    }
    say!("{table}");
    for line in adopted_lines(&rows) {
        say!("{line}");
    }
    if rows.is_empty() {
        eprintln!("no agent has connected yet; `clamcast-certs agent` makes what a host needs");
    }
}

pub(crate) fn generations(rows: Vec<Generation>) {
    let mut table = Table::new(["GENERATION", "PUBLISHED", "STATE", "CONTENT", "FILES"]);
    for row in rows {
        let files = row.files.iter().map(|file| {
            let container = file.container.as_ref();
            let version = container.map(|container| format!(":{}", container.version));
            let signer = match file.signed_by() {
                Some(SignedBy::None) => " (unsigned)",
                Some(SignedBy::Unknown) | None if file.name.is_container() => " (not verified)",
                Some(SignedBy::Talos | SignedBy::Unknown) | None => "",
            };
            format!("{}{}{signer}", file.name, version.unwrap_or_default())
        });
        let Published {
            position,
            content,
            published,
        } = row.published;
        table.row([
            position.to_string(),
            format!("{published:.0}"),
            row.state.word().to_owned(),
            short(&content),
            files.collect::<Vec<_>>().join(", "),
        ]);
    }
    say!("{table}");
}

/// A line on the terminal for as long as a command waits.
pub(crate) struct Progress(RefCell<Option<ProgressBar>>);

impl Progress {
    pub(crate) fn new(wanted: bool) -> Self {
        let bar = wanted.then(|| {
            let style = ProgressStyle::with_template("{spinner} {msg}").expect("a template");
            ProgressBar::new_spinner().with_style(style) // draws on a terminal only
        });
        Self(RefCell::new(bar))
    }

    pub(crate) fn show(&self, progress: &Value) -> serde_json::Result<()> {
        let bar = self.0.borrow();
        let Some(bar) = &*bar else { return Ok(()) };
        let progress = api::Progress::deserialize(progress)?;
        let standing = progress.standing.as_deref().map(printable);
        let mut message = standing.unwrap_or_else(|| counts(&progress.agents));
        let waiting = progress.unsettled.iter().map(AgentName::as_str).take(5);
        let waiting: Vec<_> = waiting.collect();
        if !waiting.is_empty() {
            message += &format!("; waiting for {}", waiting.join(", "));
        }
        bar.set_message(message);
        bar.tick();
        Ok(())
    }

    pub(crate) fn clear(&self) {
        if let Some(bar) = self.0.take() {
            bar.finish_and_clear();
        }
    }
}

fn counts(agents: &Counts) -> String {
    let Counts {
        total,
        connected,
        conformant,
        behind,
        failed,
    } = agents;
    format!(
        "{total} enrolled, {connected} connected, {conformant} conformant, {behind} behind, \
         {failed} failed"
    )
}

fn position_or_dash(position: Option<Position>) -> String {
    position.map_or("-".to_owned(), |position| position.to_string())
}

/// The first 12 digits of a digest, which tell it from others.
fn short(digest: &Digest) -> String {
    digest.to_string().chars().take(12).collect()
}

/// How long ago, to the unit that a person would say.
fn age(time: Timestamp, now: Timestamp) -> String {
    let seconds = now.duration_since(time).as_secs().max(0);
    if seconds < 120 {
        format!("{seconds}s")
    } else if seconds < 2 * 3600 {
        format!("{}m", seconds / 60)
    } else if seconds < 2 * 86_400 {
        format!("{}h", seconds / 3600)
    } else {
        format!("{}d", seconds / 86_400)
    }
}

/// How long ago in a sentence, with the day when that is what a person would ask for.
fn ago(time: Timestamp, now: Timestamp) -> String {
    let age = age(time, now);
    if now.duration_since(time) >= DAY_TOLD {
        format!("{} ({age} ago)", time.strftime("%Y-%m-%d"))
    } else {
        format!("{age} ago")
    }
}

/// From this age on a day says more than a number of days.
const DAY_TOLD: SignedDuration = SignedDuration::from_hours(3 * 24);

fn or_dash(text: Option<&str>) -> &str {
    text.filter(|text| !text.is_empty()).unwrap_or("-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn morning() -> Status {
        let status = json!({
            "fleet": "bank", "epoch": 1, "generation": 7, "published": "2026-11-22T08:00:00Z",
            "content": "fde3840f0bd4122539b34bd73b182519656ac15cd7f2a2cbb07a9649a49180d2",
            "signatures": {
                "name": "daily.cud", "version": 5, "built": "2026-11-01T08:00:00Z", "alarm": "7d",
            },
            "agents": { "total": 2, "connected": 1, "conformant": 1, "behind": 1, "failed": 0 },
            "lagging": [{
                "name": "web1", "connected": false, "outcome": "live",
                "since": "2026-11-22T08:30:00Z", "error": "not connected; it catches up",
            }],
            "daemon": { "state": "/state", "quic": "[::]:7310", "admin": "/admin" },
            "alarms": [{
                "name": "signatures-old", "since": "2026-11-08T08:00:00Z",
                "text": "signatures older than the 7 days that auditors allow",
            }],
            "waits": [{
                "name": "mirror", "text": "feed.ndb in the mirror keeps changing",
                "since": "2026-11-22T08:50:00Z", "until": "2026-11-22T09:05:00Z",
            }],
            "certificates": [{ "name": "web2", "ends": "2026-11-22T08:59:00Z" }],
            "rollout": {
                "state": "complete", "wave": 0, "waves": 0, "set_aside": {}, "thin": [], "pins": [],
            },
        });
        serde_json::from_value(status).unwrap()
    }

    fn shown(width: Option<usize>) -> Vec<String> {
        let now = "2026-11-22T09:00:00Z".parse().unwrap();
        status_lines(&morning(), now, width)
    }

    #[test]
    fn status_is_a_line_for_each_fact_in_a_pipe() {
        assert_eq!(
            shown(None),
            [
                "fleet        bank",
                "generation   1.7, published 60m ago (content fde3840f0bd4)",
                "signatures   daily.cud version 5, built 2026-11-01 (21d ago)",
                "agents       2 enrolled, 1 connected, 1 conformant, 1 behind, 0 failed",
                "alarm: signatures older than the 7 days that auditors allow (signatures-old, since 2026-11-08 (14d ago))",
                "certificate of web2 expired at 2026-11-22T08:59:00Z; `clamcast-certs agent --force` makes a new one",
                "waits        mirror: feed.ndb in the mirror keeps changing (since 10m ago, until 2026-11-22T09:05:00Z)",
                "",
                "NOT CONFORMANT OR AWAY  LINK  OUTCOME  SINCE  WHY",
                "web1                    down  live     30m    not connected; it catches up",
            ]
        );
    }

    #[test]
    fn status_fits_a_narrow_terminal_without_broken_words() {
        assert_eq!(
            shown(Some(50))[1..],
            [
                "generation   1.7, published 60m ago (content",
                "             fde3840f0bd4)",
                "signatures   daily.cud version 5, built 2026-11-01",
                "             (21d ago)",
                "agents       2 enrolled, 1 connected, 1",
                "             conformant, 1 behind, 0 failed",
                "alarm: signatures older than the 7 days that",
                "auditors allow (signatures-old, since 2026-11-08",
                "(14d ago))",
                "certificate of web2 expired at",
                "2026-11-22T08:59:00Z; `clamcast-certs agent",
                "--force` makes a new one",
                "waits        mirror: feed.ndb in the mirror keeps",
                "             changing (since 10m ago, until",
                "             2026-11-22T09:05:00Z)",
                "",
                "NOT CONFORMANT OR AWAY  LINK  OUTCOME  SINCE",
                "web1                    down  live     30m",
                "    why: not connected; it catches up",
            ]
        );
    }

    #[test]
    fn an_answer_of_another_version_is_an_error_with_the_next_step() {
        let finish = |exit, result| Finish {
            exit,
            ..Finish::done(result)
        };
        let check = |finish: Finish, json: bool, code: Option<u8>| {
            let ended = end(finish, json, |_: Counts| {}).err();
            assert_eq!(ended.as_ref().map(|exit| exit.code), code);
            let error = ended.and_then(|exit| exit.error);
            error.map_or(String::new(), |error| format!("{error:#}"))
        };
        let strange = || json!({ "total": "three" });
        let error = check(finish(exit::DONE, strange()), false, Some(exit::FAILED));
        assert!(error.contains("restart the daemon") && error.contains("three"));
        check(finish(exit::REFUSED, strange()), false, Some(exit::REFUSED));
        check(finish(exit::DONE, strange()), true, None);
    }

    #[test]
    fn a_frame_covers_the_one_before_and_never_scrolls() {
        let lines = |count: usize| (1..=count).map(|line| line.to_string()).collect();
        assert_eq!(frame(lines(2), 4, false), "\x1b[H1\x1b[K\n2\x1b[K\n\x1b[J");
        assert_eq!(
            frame(lines(9), 4, false),
            "\x1b[H1\x1b[K\n2\x1b[K\nand 7 lines more than fit\x1b[K\n\x1b[J"
        );
        assert!(frame(lines(1), 3, true).starts_with("\n\n\n\x1b[H1"));
    }

    #[test]
    fn an_age_is_said_as_a_person_would() {
        let now: Timestamp = "2026-11-22T12:00:00Z".parse().unwrap();
        let check = |time: &str, expected: &str| {
            assert_eq!(ago(time.parse().unwrap(), now), expected);
        };
        check("2026-11-22T11:59:01Z", "59s ago");
        check("2026-11-22T12:00:05Z", "0s ago"); // a clock that is ahead
        check("2026-11-22T10:01:00Z", "119m ago");
        check("2026-11-20T13:00:00Z", "47h ago");
        check("2026-11-20T12:00:00Z", "2d ago");
        check("2021-06-22T12:00:00Z", "2021-06-22 (1979d ago)");
    }
}
