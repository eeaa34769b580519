//! Renders `force-sync`.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clamcast_daemon::say;
use clamcast_daemon::table::{Table, printable, printable_json};
use clamcast_proto::AgentName;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Deserialize as _;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use super::{or_dash, position_or_dash, yes_or_no};
use crate::fleet::force::{self, News};
use crate::operate::api::Forced;

/// The table of the agents of a `force-sync`.
pub(crate) fn synced(forced: Forced) {
    let mut table = Table::new([
        "NAME",
        "OUTCOME",
        "GENERATION",
        "CONFORMANT",
        "FOUND",
        "ERROR",
    ]);
    for end in &forced.agents {
        table.row([
            end.agent.as_str(),
            &end.outcome,
            &position_or_dash(end.position),
            yes_or_no(end.conformant),
            or_dash(Some(&force::found(&end.drift))),
            or_dash(end.error.as_deref()),
        ]);
    }
    say!("{table}");
}

/// What `force-sync --no-wait` prints: its only table is of agents that are not connected.
pub(crate) fn ordered(forced: Forced) {
    say!("ordered; {WHERE}");
    if !forced.agents.is_empty() {
        synced(forced);
    }
}

/// Where to look for what goes on without the command.
const WHERE: &str =
    "`agents` shows how far they are, `audit show --event force-sync-end` what came of it";

/// The exit code of a command that Ctrl-C ended, as shells have it.
const INTERRUPTED: i32 = 130;

/// Lines on the terminal for as long as `force-sync` waits: one for each agent that is at it, and
/// above them those that are done.
pub(crate) struct Hosts {
    json: bool,
    lines: MultiProgress,
    bars: RefCell<BTreeMap<AgentName, ProgressBar>>,
    /// Whether the daemon has said anything.
    ordered: Arc<AtomicBool>,
}

/// Agents with a line of their own at a time; a terminal has few more lines.
const LINES_MAX: usize = 16;

impl Hosts {
    pub(crate) fn new(json: bool) -> Self {
        let lines = MultiProgress::new(); // draws on a terminal only
        let bars = RefCell::default();
        let ordered = Arc::default();
        Self {
            json,
            lines,
            bars,
            ordered,
        }
    }

    /// From now on Ctrl-C says that the work goes on. Without the signal (no runtime) the command just
    /// ends.
    pub(crate) fn on_interrupt(&self) {
        let (lines, ordered) = (self.lines.clone(), self.ordered.clone());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build();
        let Ok(runtime) = runtime else { return };
        // From here on a signal waits for the thread below.
        let interrupt = runtime.block_on(async { signal(SignalKind::interrupt()) });
        let Ok(mut interrupt) = interrupt else { return };
        std::thread::spawn(move || {
            runtime.block_on(interrupt.recv());
            let _ = lines.clear(); // fails only if the terminal is gone
            if ordered.load(Ordering::Relaxed) {
                eprintln!("interrupted; what was ordered goes on: {WHERE}");
            } else {
                eprintln!(
                    "interrupted before the daemon took the order; `audit show --event force-sync` says whether it did"
                );
            }
            std::process::exit(INTERRUPTED);
        });
    }

    pub(crate) fn show(&self, news: &Value) -> serde_json::Result<()> {
        self.ordered.store(true, Ordering::Relaxed);
        if self.json {
            say!("{}", printable_json(&news.to_string()));
            return Ok(());
        }
        let mut bars = self.bars.borrow_mut();
        match News::deserialize(news)? {
            News::Phase { agent, phase } => {
                if bars.len() < LINES_MAX && !bars.contains_key(&agent) {
                    let style =
                        ProgressStyle::with_template("{spinner} {msg}").expect("a template");
                    let bar = self.lines.add(ProgressBar::new_spinner().with_style(style));
                    bar.enable_steady_tick(std::time::Duration::from_millis(200));
                    bars.insert(agent.clone(), bar);
                }
                if let Some(bar) = bars.get(&agent) {
                    bar.set_message(printable(&format!("{agent}  {phase}")));
                }
            }
            News::End(end) => {
                if let Some(bar) = bars.remove(&end.agent) {
                    bar.finish_and_clear();
                }
                // Fails only if the terminal is gone; without one it prints nothing.
                let line = format!("{}  {}", end.agent, end.outcome);
                let _ = self.lines.println(printable(&line));
            }
        }
        Ok(())
    }

    pub(crate) fn clear(&self) {
        let _ = self.lines.clear(); // fails only if the terminal is gone
    }
}
