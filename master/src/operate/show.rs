//! What the commands print: results on stdout, talk on stderr.

use std::cell::RefCell;
use std::io::Write as _;

use clamcast_daemon::admin::Finish;
use clamcast_daemon::exit::{self, Exit};
use clamcast_daemon::say;
use clamcast_daemon::table::{Table, fold, printable, terminal_width};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

pub(crate) mod audit;
pub(crate) mod force;
pub(crate) mod rollout;

/// Ends a command: the result as JSON or by `text`, the message on stderr, the exit code.
pub(crate) fn end(finish: Finish, json: bool, text: impl Fn(&Value)) -> Result<(), Exit> {
    let Finish {
        exit,
        result,
        message,
    } = finish;
    if !result.is_null() {
        if json {
            say!(
                "{}",
                serde_json::to_string_pretty(&result).expect("a value serialises")
            );
        } else {
            text(&result);
        }
    }
    match (exit, message) {
        (exit::DONE, None) => Ok(()),
        (exit::DONE, Some(message)) => {
            eprintln!("{message}");
            Ok(())
        }
        (code, Some(message)) => Err(Exit::new(code, anyhow::anyhow!("{message}"))),
        (code, None) => Err(Exit::quietly(code)),
    }
}

pub(crate) fn published(result: &Value) {
    let position = position(result);
    match text(&result["outcome"]).as_str() {
        "new" => say!("published {position}"),
        "begun" => say!("{position} waits no longer"),
        "unchanged" => say!("unchanged: {position} is what the mirror holds"),
        _ if result["generation"].is_null() => {}
        _ => say!("current is still {position}"),
    }
    if let Some(agents) = result.get("agents") {
        say!("{}", counts(agents));
    }
}

/// Agents that `status` names; `agents` has them all.
const NAMED_MAX: usize = 20;

pub(crate) fn status(result: &Value) {
    for line in status_lines(result, Timestamp::now(), terminal_width()) {
        say!("{line}");
    }
}

/// What `status` says at `now`, for a terminal of this width or a pipe.
fn status_lines(result: &Value, now: Timestamp, width: Option<usize>) -> Vec<String> {
    let mut lines = Lines {
        width,
        lines: Vec::new(),
    };
    lines.field("fleet", &text(&result["fleet"]));
    if result["generation"].is_null() {
        lines.field("generation", "none published yet");
    } else {
        let content = text(&result["content"]);
        let short = content.get(..12).unwrap_or(&content);
        let generation = format!(
            "{}, published {} (content {short})",
            position(result),
            ago(&result["published"], now)
        );
        lines.field("generation", &generation);
    }
    signatures(&mut lines, &result["signatures"], now);
    rollout::standing(&mut lines, &result["rollout"]);
    lines.field("agents", &counts(&result["agents"]));
    if let Some(refused) = result.get("refused") {
        let (kind, reason) = (text(&refused["kind"]), text(&refused["reason"]));
        lines.alarm(&format!("{kind}: {reason}"));
    }
    if let Some(reason) = result.get("alarm") {
        lines.alarm(&format!("alarm: {}", text(reason)));
    }
    for certificate in result["certificates"].as_array().into_iter().flatten() {
        let (name, ends) = (text(&certificate["name"]), time(&certificate["ends"]));
        let command = if name == "master" { "master" } else { "agent" };
        lines.alarm(&format!(
            "certificate of {name} ends {ends}; `clamcast-certs {command} --force` makes a new one"
        ));
    }
    let lagging: Vec<_> = result["lagging"].as_array().into_iter().flatten().collect();
    if lagging.is_empty() {
        return lines.lines;
    }
    let columns = ["NOT CONFORMANT OR AWAY", "LINK", "OUTCOME", "SINCE", "WHY"];
    let mut table = Table::with_width(columns, width);
    for row in lagging.iter().take(NAMED_MAX) {
        table.row([
            text(&row["name"]),
            link(row),
            text(&row["outcome"]),
            age(&row["since"], now),
            or_dash(text(&row["error"])),
        ]);
    }
    lines.lines.push(String::new());
    let table = table.to_string();
    lines.lines.extend(table.lines().map(str::to_owned));
    if lagging.len() > NAMED_MAX {
        let more = lagging.len() - NAMED_MAX;
        lines.line(&format!("and {more} more; `agents` has them all"));
    }
    lines.lines
}

/// How old the signatures are, with the auditors' limits.
fn signatures(lines: &mut Lines, signatures: &Value, now: Timestamp) {
    if signatures.is_null() {
        return;
    }
    let [name, version] = ["name", "version"].map(|key| text(&signatures[key]));
    let built = ago(&signatures["built"], now);
    lines.field(
        "signatures",
        &format!("{name} version {version}, built {built}"),
    );
    match signatures["alarm"].as_str() {
        Some("7d") => lines.alarm("alarm: signatures older than the 7 days that auditors allow"),
        Some(_) => {
            lines.alarm("alarm: signatures older than 24 h; does freshclam run on the mirror?");
        }
        None => {}
    }
}

/// Text that fits a terminal.
struct Lines {
    width: Option<usize>,
    lines: Vec<String>,
}

/// Where the values of a list of fields begin.
const VALUES_AT: usize = 13;

impl Lines {
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
    last: Value,
    begun: bool,
}

impl Watch {
    pub(crate) fn new(json: bool) -> Self {
        Self {
            json,
            terminal: console::Term::stdout(),
            last: Value::Null,
            begun: false,
        }
    }

    pub(crate) fn show(&mut self, finish: Finish) -> Result<(), Exit> {
        if self.json && finish.exit == exit::DONE {
            say!("{}", finish.result); // one object a line
            return Ok(());
        }
        if finish.exit != exit::DONE || !self.terminal.is_term() {
            end(finish, self.json, status)?;
            say!("");
            return Ok(());
        }
        self.last = finish.result;
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
        let mut lines = Lines {
            width,
            lines: Vec::new(),
        };
        lines.line(&format!("{now:.0}, every 2 s until Ctrl-C"));
        if let Some(alarm) = alarm {
            lines.alarm(&format!("waiting for the daemon: {alarm}"));
        }
        lines.line("");
        let mut lines = lines.lines;
        if !self.last.is_null() {
            lines.extend(status_lines(&self.last, now, width));
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

fn link(row: &Value) -> String {
    if row["connected"] == true {
        "up"
    } else {
        "down"
    }
    .to_owned()
}

pub(crate) fn agents(result: &Value) {
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
    for row in result.as_array().into_iter().flatten() {
        let groups = row["groups"].as_array().into_iter().flatten().map(text);
        let clamd = &row["clamd"];
        let version = clamd["version"]
            .as_str()
            .and_then(|version| version.split('/').next());
        table.row([
            text(&row["name"]),
            or_dash(groups.collect::<Vec<_>>().join(",")),
            link(row),
            generation(row),
            if row["live"] == true { "yes" } else { "no" }.to_owned(),
            text(&row["outcome"]),
            age(&row["since"], now),
            version.map_or_else(|| text(&clamd["state"]), str::to_owned),
            or_dash(text(&row["error"])),
        ]);
    }
    say!("{table}");
    if result.as_array().is_some_and(Vec::is_empty) {
        eprintln!("no agent has connected yet; `clamcast-certs agent` makes what a host needs");
    }
}

/// What a host has, with a mark where it is kept at it.
fn generation(row: &Value) -> String {
    let pinned = if row["pinned"] == true { " pinned" } else { "" };
    match row["generation"].is_null() {
        true => format!("-{pinned}"),
        false => format!("{}{pinned}", position(row)),
    }
}

pub(crate) fn generations(result: &Value) {
    let mut table = Table::new(["GENERATION", "PUBLISHED", "STATE", "CONTENT", "FILES"]);
    for row in result.as_array().into_iter().flatten() {
        let files = row["files"].as_array().into_iter().flatten().map(|file| {
            let version = &file["version"];
            let name = text(&file["name"]);
            if version.is_null() {
                name
            } else {
                format!("{name}:{version}")
            }
        });
        table.row([
            position(row),
            time(&row["published"]),
            text(&row["state"]),
            text(&row["content"]).chars().take(12).collect(),
            files.collect::<Vec<_>>().join(" "),
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

    pub(crate) fn show(&self, progress: &Value) {
        if let Some(bar) = &*self.0.borrow() {
            let waiting = progress["unsettled"]
                .as_array()
                .into_iter()
                .flatten()
                .map(text);
            let waiting: Vec<_> = waiting.take(5).collect();
            let standing = progress["standing"].as_str().map(printable);
            let mut message = standing.unwrap_or_else(|| counts(&progress["agents"]));
            if !waiting.is_empty() {
                message += &format!("; waiting for {}", waiting.join(", "));
            }
            bar.set_message(message);
            bar.tick();
        }
    }

    pub(crate) fn clear(&self) {
        if let Some(bar) = self.0.take() {
            bar.finish_and_clear();
        }
    }
}

fn counts(agents: &Value) -> String {
    let number = |key: &str| agents[key].as_u64().unwrap_or(0);
    format!(
        "{} enrolled, {} connected, {} conformant, {} behind, {} failed",
        number("total"),
        number("connected"),
        number("conformant"),
        number("behind"),
        number("failed"),
    )
}

fn position(value: &Value) -> String {
    format!("{}.{}", text(&value["epoch"]), text(&value["generation"]))
}

fn time(value: &Value) -> String {
    let text = text(value);
    let seconds = text.parse::<Timestamp>().map(|time| format!("{time:.0}"));
    seconds.unwrap_or(text)
}

/// How long ago, to the unit that a person would say.
fn age(value: &Value, now: Timestamp) -> String {
    let Ok(time) = text(value).parse::<Timestamp>() else {
        return "-".to_owned();
    };
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
fn ago(value: &Value, now: Timestamp) -> String {
    let age = age(value, now);
    let time = text(value).parse::<Timestamp>();
    match time {
        Ok(time) if now.duration_since(time) >= DAY_TOLD => {
            format!("{} ({age} ago)", time.strftime("%Y-%m-%d"))
        }
        Ok(_) | Err(_) => format!("{age} ago"),
    }
}

/// From this age on a day says more than a number of days.
const DAY_TOLD: SignedDuration = SignedDuration::from_hours(3 * 24);

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
    }
}

fn or_dash(text: String) -> String {
    if text.is_empty() {
        "-".to_owned()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn morning() -> Value {
        json!({
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
        })
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
                "alarm: signatures older than the 7 days that auditors allow",
                "agents       2 enrolled, 1 connected, 1 conformant, 1 behind, 0 failed",
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
                "alarm: signatures older than the 7 days that",
                "auditors allow",
                "agents       2 enrolled, 1 connected, 1",
                "             conformant, 1 behind, 0 failed",
                "",
                "NOT CONFORMANT OR AWAY  LINK  OUTCOME  SINCE",
                "web1                    down  live     30m",
                "    why: not connected; it catches up",
            ]
        );
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
        let check = |time: &str, expected: &str| assert_eq!(ago(&json!(time), now), expected);
        check("2026-11-22T11:59:01Z", "59s ago");
        check("2026-11-22T12:00:05Z", "0s ago"); // a clock that is ahead
        check("2026-11-22T10:01:00Z", "119m ago");
        check("2026-11-20T13:00:00Z", "47h ago");
        check("2026-11-20T12:00:00Z", "2d ago");
        check("2021-06-22T12:00:00Z", "2021-06-22 (1979d ago)");
    }
}
