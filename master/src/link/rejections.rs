//! Connections that were rejected, and commands of users who may not give any: each is logged, and
//! the audit log is not flooded.
//!
//! Each agent has a budget of its own, and unknown peers share one: a flood of strangers hides no
//! rejection of an agent.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Mutex;

use clamcast_proto::audit::{Draft, Operator};
use clamcast_proto::{AgentName, AuditEvent};
use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use crate::record::entry::Entry;
use crate::record::recorder::Recorder;

/// Rejections written into the audit log in one [`WINDOW`]; the rest are counted in the next line.
const PER_WINDOW: u64 = 10;

/// A minute.
const WINDOW: SignedDuration = SignedDuration::from_secs(60);

/// Rejections written in one [`DAY`]: half a megabyte. From then on one is written an hour, with the number
/// of the others.
const PER_DAY: u64 = 1000;

/// An hour.
const HOUR: SignedDuration = SignedDuration::from_hours(1);

/// A day.
const DAY: SignedDuration = SignedDuration::from_hours(24);

/// Agents whose budgets are remembered. Only the CA makes agents; with this many rejected ones, those
/// that are quiet are forgotten.
const AGENTS_MAX: usize = 4096;

/// How many rejections are written in a time, and how many were. Pure.
#[derive(Debug)]
struct Window {
    length: SignedDuration,
    limit: u64,
    start: Timestamp,
    written: u64,
}

impl Window {
    fn new(length: SignedDuration, limit: u64) -> Self {
        let (start, written) = (Timestamp::UNIX_EPOCH, 0);
        Self {
            length,
            limit,
            start,
            written,
        }
    }

    fn has_room(&mut self, now: Timestamp) -> bool {
        if now.duration_since(self.start) >= self.length || now < self.start {
            self.start = now;
            self.written = 0;
        }
        self.written < self.limit
    }
}

/// Decides which rejections of one peer, or of all unknown ones, are written. Pure.
#[derive(Debug)]
struct Budget {
    minute: Window,
    hour: Window,
    day: Window,
    unwritten: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            minute: Window::new(WINDOW, PER_WINDOW),
            hour: Window::new(HOUR, 1),
            day: Window::new(DAY, PER_DAY),
            unwritten: 0,
        }
    }
}

impl Budget {
    /// Whether the rejection at `now` is written, and how many were not since the last that was. None
    /// is while the recorder has no room.
    fn admit(&mut self, now: Timestamp, has_room: bool) -> Option<u64> {
        let fits_hour = self.hour.has_room(now);
        let fits = (self.day.has_room(now) || fits_hour) && self.minute.has_room(now);
        if !fits || !has_room {
            self.unwritten += 1;
            return None;
        }
        for window in [&mut self.minute, &mut self.hour, &mut self.day] {
            window.written += 1;
        }
        Some(std::mem::take(&mut self.unwritten))
    }

    /// Whether nothing is lost if it is forgotten.
    fn is_quiet(&self, now: Timestamp) -> bool {
        self.unwritten == 0 && now.duration_since(self.minute.start) >= WINDOW
    }
}

/// The budgets of all peers. Pure.
#[derive(Debug, Default)]
struct Budgets {
    unknown: Budget,
    agents: HashMap<AgentName, Budget>,
}

impl Budgets {
    fn of(&mut self, agent: Option<&AgentName>, now: Timestamp) -> &mut Budget {
        let Some(agent) = agent else {
            return &mut self.unknown;
        };
        if self.agents.len() >= AGENTS_MAX && !self.agents.contains_key(agent) {
            self.agents.retain(|_, budget| !budget.is_quiet(now));
        }
        self.agents.entry(agent.clone()).or_default()
    }
}

/// Notes rejected connections. The admin socket has an instance of its own, so that a flood of strangers
/// hides no denied command either.
#[derive(Debug)]
pub struct Rejections {
    budgets: Mutex<Budgets>,
    recorder: Recorder,
}

impl Rejections {
    /// Notes them through `recorder`.
    pub fn new(recorder: Recorder) -> Self {
        let budgets = Mutex::default();
        Self { budgets, recorder }
    }

    /// A connection was rejected. `agent`: the name in its certificate, if the fleet's CA signed that.
    pub fn note(&self, agent: Option<&AgentName>, address: SocketAddr, reason: &str) {
        let Some(unwritten) = self.admit(agent) else {
            return;
        };
        let name = agent.map(tracing::field::display);
        tracing::warn!(agent = name, %address, reason, "connection rejected");
        let draft = rejection(agent, address, reason, unwritten);
        self.recorder.write(Entry::line(draft));
    }

    /// A user who reached the admin socket gave a command that only operators may give.
    pub fn denied(&self, user: &Operator, command: &str) {
        let Some(unwritten) = self.admit(None) else {
            return;
        };
        tracing::warn!(%user, login_uid = user.login_uid, command, "command denied");
        let draft = denial(user, command, unwritten);
        self.recorder.write(Entry::line(draft));
    }

    fn admit(&self, agent: Option<&AgentName>) -> Option<u64> {
        let has_room = self.recorder.has_room();
        let mut budgets = self.budgets.lock().expect("nothing panics with it");
        let now = Timestamp::now();
        budgets.of(agent, now).admit(now, has_room)
    }
}

fn rejection(
    agent: Option<&AgentName>,
    address: SocketAddr,
    reason: &str,
    unwritten: u64,
) -> Draft {
    let mut detail = json!({ "reason": reason, "not_logged_before": unwritten });
    if let Some(agent) = agent {
        detail["agent"] = json!(agent);
    }
    Draft {
        detail,
        ..Draft::new(AuditEvent::Rejected, "master", address.ip())
    }
}

fn denial(user: &Operator, command: &str, unwritten: u64) -> Draft {
    Draft {
        detail: json!({ "login_uid": user.login_uid, "not_logged_before": unwritten }),
        ..Draft::new(AuditEvent::Denied, user, command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denied_command_is_recorded_with_who_gave_it() {
        let user = Operator {
            uid: 1000,
            name: "mallory".to_owned(),
            login_uid: Some(7),
        };
        let draft = denial(&user, "force-sync", 3);
        assert_eq!(draft.actor, "operator:1000/mallory");
        assert_eq!(draft.subject, "force-sync");
        assert_eq!(
            draft.detail,
            json!({ "login_uid": 7, "not_logged_before": 3 })
        );
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_flood_is_counted_and_not_written() {
        let mut budget = Budget::default();
        let written = (0..1000)
            .filter(|_| budget.admit(at(5), true).is_some())
            .count();
        assert_eq!(written, 10);
        assert_eq!(budget.admit(at(65), true), Some(990));
        assert_eq!(budget.admit(at(66), false), None);
        assert_eq!(budget.admit(at(67), true), Some(1));
    }

    #[test]
    fn a_flood_that_goes_on_for_a_day_is_bounded() {
        let mut budget = Budget::default();
        let written = (0..86_000)
            .filter(|second| budget.admit(at(86_400 + second), true).is_some())
            .count();
        assert!((1000..1024).contains(&written), "{written}");
    }

    #[test]
    fn a_flood_of_unknown_peers_hides_no_rejection_of_an_agent() {
        let mut budgets = Budgets::default();
        let name = |number: usize| format!("web{number}").parse().unwrap();
        for _ in 0..1000 {
            budgets.of(None, at(5)).admit(at(5), true);
        }
        for agent in 0..2 * AGENTS_MAX {
            let name = name(agent);
            let second = i64::try_from(agent).unwrap();
            let budget = budgets.of(Some(&name), at(second));
            assert_eq!(budget.admit(at(second), true), Some(0));
        }
        assert!(budgets.agents.len() <= AGENTS_MAX);
    }
}
