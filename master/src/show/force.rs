//! What `force-sync` prints.

use std::cell::RefCell;
use std::collections::BTreeMap;

use clamcast_daemon::say;
use clamcast_daemon::table::{Table, printable};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::Value;

use super::{or_dash, text};

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
