//! What the commands print: results on stdout, talk on stderr.

use std::cell::RefCell;
use std::collections::BTreeMap;

use clamcast_daemon::admin::Finish;
use clamcast_daemon::audit::Verification;
use clamcast_daemon::exit::{self, Exit};
use clamcast_daemon::say;
use clamcast_daemon::table::{Table, printable};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

/// Reads `--since`: a point in time, or how long ago.
pub(crate) fn since(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    let ago = humantime::parse_duration(text)
        .map_err(|_| "expected a time like 2026-11-22T08:00:00Z or a duration like 24h")?;
    let ago = SignedDuration::try_from(ago).map_err(|error| error.to_string())?;
    Timestamp::now()
        .checked_sub(ago)
        .map_err(|error| error.to_string())
}

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
        "unchanged" => say!("unchanged: {position} is what the mirror holds"),
        _ => say!("current is still {position}"),
    }
    if let Some(agents) = result.get("agents") {
        say!("{}", counts(agents));
    }
}

/// Agents that `status` names; `agents` has them all.
const NAMED_MAX: usize = 20;

pub(crate) fn status(result: &Value) {
    say!("fleet        {}", text(&result["fleet"]));
    if result["generation"].is_null() {
        say!("generation   none published yet");
    } else {
        let content = text(&result["content"]);
        let short = content.get(..12).unwrap_or(&content);
        let published = age(&result["published"]);
        say!(
            "generation   {}, published {published} ago (content {short})",
            position(result)
        );
    }
    signatures(&result["signatures"]);
    say!("agents       {}", counts(&result["agents"]));
    if let Some(refused) = result.get("refused") {
        alarm(&format!(
            "{}: {}",
            text(&refused["kind"]),
            text(&refused["reason"])
        ));
    }
    if let Some(reason) = result.get("alarm") {
        alarm(&format!("alarm: {}", text(reason)));
    }
    for certificate in result["certificates"].as_array().into_iter().flatten() {
        let (name, ends) = (text(&certificate["name"]), time(&certificate["ends"]));
        let command = if name == "master" { "master" } else { "agent" };
        alarm(&format!(
            "certificate of {name} ends {ends}; `clamcast-certs {command} --force` makes a new one"
        ));
    }
    let lagging: Vec<_> = result["lagging"].as_array().into_iter().flatten().collect();
    if lagging.is_empty() {
        return;
    }
    say!("");
    let mut table = Table::new(["NOT CONFORMANT OR AWAY", "LINK", "OUTCOME", "SINCE", "WHY"]);
    for row in lagging.iter().take(NAMED_MAX) {
        table.row([
            text(&row["name"]),
            link(row),
            text(&row["outcome"]),
            age(&row["since"]),
            or_dash(text(&row["error"])),
        ]);
    }
    say!("{table}");
    if lagging.len() > NAMED_MAX {
        say!(
            "and {} more; `agents` has them all",
            lagging.len() - NAMED_MAX
        );
    }
}

/// Prints `status` in place of the one before, on a terminal; one after the other elsewhere.
pub(crate) fn again(finish: Finish, json: bool) -> Result<(), Exit> {
    let terminal = console::Term::stdout();
    if json {
        say!("{}", finish.result);
        return Ok(());
    }
    if terminal.is_term() {
        terminal.clear_screen()?;
    }
    end(finish, json, status)?;
    if !terminal.is_term() {
        say!("");
    }
    Ok(())
}

/// Says that `status --watch` waits for the daemon.
pub(crate) fn unreachable(exit: &Exit) {
    if let Some(error) = &exit.error {
        let now = Timestamp::now();
        eprintln!("{now:.0} {error:#}");
    }
}

/// How old the signatures are, with the auditors' limits.
fn signatures(signatures: &Value) {
    if signatures.is_null() {
        return;
    }
    let [name, version] = ["name", "version"].map(|key| text(&signatures[key]));
    let age = age(&signatures["built"]);
    say!("signatures   {name} version {version}, built {age} ago");
    match signatures["alarm"].as_str() {
        Some("7d") => alarm("alarm: signatures older than the 7 days that auditors allow"),
        Some(_) => alarm("alarm: signatures older than 24 h; does freshclam run on the mirror?"),
        None => {}
    }
}

/// A line that must be seen; in colour where a terminal wants it.
fn alarm(line: &str) {
    say!("{}", console::style(line).red().bold());
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
            if row["generation"].is_null() {
                "-".to_owned()
            } else {
                position(row)
            },
            if row["live"] == true { "yes" } else { "no" }.to_owned(),
            text(&row["outcome"]),
            age(&row["since"]),
            version.map_or_else(|| text(&clamd["state"]), str::to_owned),
            or_dash(text(&row["error"])),
        ]);
    }
    say!("{table}");
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

/// Prints a piece of the audit log.
pub(crate) fn records(records: Value, json: bool) {
    for record in records.as_array().into_iter().flatten() {
        if json {
            say!("{record}");
            continue;
        }
        let at = if record["generation"].is_null() {
            "-".to_owned()
        } else {
            position(record)
        };
        let outcome = or_dash(text(&record["outcome"]));
        let line = format!(
            "{:>6} {} {:<15} {:<18} {:<18} {:<6} {:<9} {}",
            text(&record["seq"]),
            time(&record["time"]),
            text(&record["event"]),
            text(&record["actor"]),
            text(&record["subject"]),
            at,
            outcome,
            detail(&record["detail"]),
        );
        say!("{}", printable(&line));
    }
}

/// The details that a person can read; a receipt's envelope is for machines (`--json`).
fn detail(detail: &Value) -> String {
    let fields = detail.as_object().into_iter().flatten();
    let readable = fields.filter(|(_, value)| !value.is_object() && !value.is_null());
    let pairs = readable.map(|(key, value)| match value.as_array() {
        Some(list) => format!(
            "{key}={}",
            list.iter().map(text).collect::<Vec<_>>().join(",")
        ),
        None => format!("{key}={}", text(value)),
    });
    pairs.collect::<Vec<_>>().join(" ")
}

/// Prints what `audit verify` found; exit 1 if anything is wrong.
pub(crate) fn verification(verification: &Verification, json: bool) -> Result<(), Exit> {
    if json {
        say!("{:#}", verification.to_json());
    }
    match &verification.first_bad {
        None => {
            if !json {
                say!(
                    "good: {} records, signed head and all",
                    verification.records
                );
            }
            Ok(())
        }
        Some(_) if json => Err(Exit::quietly(exit::NOT_CONFORMANT)),
        Some(bad) => {
            let bad = anyhow::anyhow!("line {}: {}", bad.line, bad.fault);
            Err(Exit::new(
                exit::NOT_CONFORMANT,
                bad.context("the audit log is not what was signed"),
            ))
        }
    }
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
            let agents = counts(&progress["agents"]);
            bar.set_message(format!("{agents}; waiting for {}", waiting.join(", ")));
            bar.tick();
        }
    }

    pub(crate) fn clear(&self) {
        if let Some(bar) = self.0.take() {
            bar.finish_and_clear();
        }
    }
}

/// What became of each agent of a `force-sync`.
pub(crate) fn synced(result: &Value) {
    let mut table = Table::new(["NAME", "OUTCOME", "GENERATION", "CONFORMANT", "ERROR"]);
    for end in result["agents"].as_array().into_iter().flatten() {
        table.row([
            text(&end["agent"]),
            text(&end["outcome"]),
            or_dash(text(&end["generation"])),
            if end["conformant"] == true {
                "yes"
            } else {
                "no"
            }
            .to_owned(),
            or_dash(text(&end["error"])),
        ]);
    }
    say!("{table}");
}

/// What `force-sync --no-wait` can say.
pub(crate) fn ordered(result: &Value) {
    say!("ordered; `agents` and `audit show --event force-sync-end` tell the rest");
    if result["agents"]
        .as_array()
        .is_some_and(|offline| !offline.is_empty())
    {
        synced(result); // those that are not connected
    }
}

/// Lines on the terminal for as long as `force-sync` waits: one for each agent that is at it, and
/// above them those that are done.
pub(crate) struct Hosts {
    json: bool,
    lines: MultiProgress,
    bars: RefCell<BTreeMap<String, ProgressBar>>,
}

/// Agents with a line of their own at a time; a terminal has few more lines.
const LINES_MAX: usize = 16;

impl Hosts {
    pub(crate) fn new(json: bool) -> Self {
        let lines = MultiProgress::new(); // draws on a terminal only
        let bars = RefCell::default();
        Self { json, lines, bars }
    }

    pub(crate) fn show(&self, news: &Value) {
        if self.json {
            say!("{news}");
            return;
        }
        let agent = text(&news["agent"]);
        let mut bars = self.bars.borrow_mut();
        if let Some(phase) = news.get("phase") {
            if bars.len() < LINES_MAX && !bars.contains_key(&agent) {
                let style = ProgressStyle::with_template("{spinner} {msg}").expect("a template");
                let bar = self.lines.add(ProgressBar::new_spinner().with_style(style));
                bar.enable_steady_tick(std::time::Duration::from_millis(200));
                bars.insert(agent.clone(), bar);
            }
            if let Some(bar) = bars.get(&agent) {
                bar.set_message(printable(&format!("{agent}  {}", text(phase))));
            }
            return;
        }
        if let Some(bar) = bars.remove(&agent) {
            bar.finish_and_clear();
        }
        // Fails only if the terminal is gone; without one it prints nothing.
        let line = format!("{agent}  {}", text(&news["outcome"]));
        let _ = self.lines.println(printable(&line));
    }

    pub(crate) fn clear(&self) {
        let _ = self.lines.clear(); // fails only if the terminal is gone
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
fn age(value: &Value) -> String {
    let Ok(time) = text(value).parse::<Timestamp>() else {
        return "-".to_owned();
    };
    let seconds = Timestamp::now().duration_since(time).as_secs().max(0);
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
