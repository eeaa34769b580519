//! What the commands print: results on stdout, talk on stderr.

use std::cell::RefCell;

use clamcast_daemon::admin::Finish;
use clamcast_daemon::exit::{self, Exit};
use clamcast_daemon::say;
use clamcast_daemon::table::Table;
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use serde_json::Value;

pub(crate) mod audit;
pub(crate) mod force;

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
