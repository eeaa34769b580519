//! Decides how much one agent may add to the audit log in a day.
//!
//! Pure: no sockets, no disk, no clock.

use std::collections::HashMap;

use clamcast_proto::AgentName;
use jiff::{SignedDuration, Timestamp};

/// Bytes that one agent may add to the audit log in a day of UTC: a hundred times what an honest
/// one adds, and half a gigabyte a day where five hundred hosts are hostile.
pub const BYTES_PER_DAY: u64 = 1 << 20;

/// Bytes of a line beside what the agent decides of it.
pub const LINE_BYTES: u64 = 400;

const DAY: SignedDuration = SignedDuration::from_hours(24);

/// What the agents have used of their budgets today.
#[derive(Debug, Default)]
pub struct Budgets(HashMap<AgentName, Used>);

#[derive(Debug)]
struct Used {
    /// When the day began.
    day: Timestamp,
    bytes: u64,
    exceeded: Option<Exceeded>,
}

/// A budget that does not suffice.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Exceeded {
    /// When the first line was left out.
    pub since: Timestamp,
    /// When the next day begins.
    pub until: Timestamp,
    /// Lines that were left out.
    pub lines: u64,
}

impl Budgets {
    /// Takes a line of so many bytes from an agent's budget. `false`: the budget is exceeded, and the
    /// line is left out and counted.
    pub fn spend(&mut self, name: &AgentName, bytes: u64, now: Timestamp) -> bool {
        let day = day(now);
        let used = self.0.entry(name.clone()).or_insert(Used {
            day,
            bytes: 0,
            exceeded: None,
        });
        let fits = used.exceeded.is_none() && used.bytes + bytes <= BYTES_PER_DAY;
        if fits {
            used.bytes += bytes;
        } else {
            let exceeded = used.exceeded.get_or_insert(Exceeded {
                since: now,
                until: day.saturating_add(DAY).unwrap_or(Timestamp::MAX),
                lines: 0,
            });
            exceeded.lines += 1;
        }
        fits
    }

    /// Whether an agent has exceeded its budget.
    pub fn is_exceeded(&self, name: &AgentName) -> bool {
        self.of(name).is_some()
    }

    /// How an agent has exceeded its budget, if it has.
    pub fn of(&self, name: &AgentName) -> Option<Exceeded> {
        self.0.get(name)?.exceeded
    }

    /// Gives an agent a new budget, because an operator drives it to a generation. Returns how it had
    /// exceeded the one before, if it had.
    pub fn renew(&mut self, name: &AgentName) -> Option<Exceeded> {
        self.0.remove(name)?.exceeded
    }

    /// The agents that have exceeded their budgets.
    pub fn exceeded(&self) -> impl Iterator<Item = (&AgentName, Exceeded)> {
        let used = self.0.iter();
        used.filter_map(|(name, used)| Some((name, used.exceeded?)))
    }

    /// Begins a new day, if it is one, also after the clock went back. Returns the agents that had
    /// exceeded the budgets of the day before.
    pub fn begin_day(&mut self, now: Timestamp) -> Vec<(AgentName, Exceeded)> {
        let day = day(now);
        let over = self.0.extract_if(|_, used| used.day != day);
        let mut over: Vec<_> = over
            .filter_map(|(name, used)| Some((name, used.exceeded?)))
            .collect();
        over.sort_by(|(one, _), (other, _)| one.cmp(other));
        over
    }
}

/// When the day of UTC began that `now` is in.
fn day(now: Timestamp) -> Timestamp {
    let second = now.as_second();
    let day = second - second.rem_euclid(DAY.as_secs());
    Timestamp::from_second(day).unwrap_or(Timestamp::MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn an_agent_that_floods_the_log_is_left_out_until_the_next_day() {
        let (name, other) = ("web1".parse().unwrap(), "web2".parse().unwrap());
        let mut budgets = Budgets::default();
        let lines = 2 * BYTES_PER_DAY / 1000;
        let written = (0..lines)
            .filter(|_| budgets.spend(&name, 1000, at(86_400)))
            .count();
        assert_eq!(written as u64, BYTES_PER_DAY / 1000);
        assert!(!budgets.spend(&name, 1, at(86_500)), "no gaps");
        assert!(budgets.spend(&other, 1000, at(86_400)));
        assert!(budgets.begin_day(at(2 * 86_400 - 1)).is_empty());

        let [(over, exceeded)] = &budgets.begin_day(at(2 * 86_400))[..] else {
            panic!("one agent exceeded its budget");
        };
        assert_eq!(*over, name);
        assert_eq!(exceeded.lines, lines - BYTES_PER_DAY / 1000 + 1);
        assert_eq!(
            (exceeded.since, exceeded.until),
            (at(86_400), at(2 * 86_400))
        );
        assert!(!budgets.is_exceeded(&name));
        assert!(budgets.spend(&name, 1000, at(2 * 86_400)));
    }

    #[test]
    fn an_operator_gives_an_agent_a_new_budget() {
        let name = "web1".parse().unwrap();
        let mut budgets = Budgets::default();
        assert_eq!(budgets.renew(&name), None);
        assert!(!budgets.spend(&name, BYTES_PER_DAY + 1, at(5)));
        assert_eq!(budgets.renew(&name).unwrap().lines, 1);
        assert!(budgets.spend(&name, BYTES_PER_DAY, at(5)));
    }

    #[test]
    fn a_clock_that_goes_back_begins_a_day() {
        let name = "web1".parse().unwrap();
        let mut budgets = Budgets::default();
        assert!(!budgets.spend(&name, BYTES_PER_DAY + 1, at(3 * 86_400)));
        assert_eq!(budgets.begin_day(at(86_400)).len(), 1);
        assert!(budgets.spend(&name, BYTES_PER_DAY, at(86_400)));
    }
}
