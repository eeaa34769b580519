//! `force-sync`: which agents are meant, and what became of each.
//!
//! Pure: `admin/force.rs` feeds it what the hub sees and writes down what comes out.

mod selection;

use std::collections::BTreeMap;

use clamcast_proto::receipt::{Drift, Found, Outcome};
use clamcast_proto::wire::OfferId;
use clamcast_proto::{AgentName, Position};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::fleet::agents::{OFFERED, Row};

pub use selection::{Meant, MeantError, SelectError, Selection};

/// Bytes of names that one record of the audit log lists: a fleet of thousands, and far below what
/// fits a line.
const NAMES_BYTES_MAX: usize = 300_000;

/// Bytes of reasons, and of what was mended, that one record lists: enough to see what went wrong;
/// each host's own receipt has the rest.
const REASONS_BYTES_MAX: usize = 100_000;

/// Longest of these in bytes.
const REASON_BYTES_MAX: usize = 300;

/// One forced install on its way through the fleet.
#[derive(Debug, Default)]
pub struct Work {
    waiting: BTreeMap<AgentName, Waiting>,
    ended: Vec<End>,
}

#[derive(Debug)]
struct Waiting {
    /// The offer that was made for it. A newer one that replaced it counts as well.
    offer: OfferId,
    said: String,
}

/// The outcome of a work, and of an agent, that nobody followed to its end.
pub const INTERRUPTED: &str = "interrupted";

/// The beginning of what is said of an agent whose offer waits for the disk.
const WAITS: &str = "waits: ";

/// What is said of an agent that has given no sign of its offer.
const ORDERED: &str = "ordered";

/// What became of one agent.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct End {
    /// The agent.
    pub agent: AgentName,
    /// An outcome of its receipt, or `offline`, `past`, `gone`, `no answer`, `timeout`, `interrupted`.
    pub outcome: String,
    /// The generation in its database directory: keys `epoch` and `generation`, null for an agent that
    /// has not answered.
    #[serde(flatten, with = "clamcast_proto::position::or_null")]
    pub position: Option<Position>,
    /// Whether it is what the master wants, with every file intact.
    pub conformant: bool,
    /// What its re-hash found to be other than published.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drift: Vec<Drift>,
    /// Why it is not conformant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// News of one agent.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(untagged)]
pub enum News {
    /// It does something else now.
    Phase {
        /// The agent.
        agent: AgentName,
        /// What it does.
        phase: String,
    },
    /// It is done, well or not.
    End(End),
}

impl Work {
    /// Begins with the agents that were offered, and those that are not connected or past it, which
    /// are done at once.
    pub fn new(
        offers: Vec<(AgentName, OfferId)>,
        offline: Vec<AgentName>,
        past: Vec<(AgentName, Position)>,
    ) -> (Self, Vec<News>) {
        let ordered = offers.iter().map(|(agent, _)| News::Phase {
            agent: agent.clone(),
            phase: ORDERED.to_owned(),
        });
        let mut news: Vec<_> = ordered.collect();
        let waiting = offers.into_iter().map(|(agent, offer)| {
            let said = ORDERED.to_owned();
            (agent, Waiting { offer, said })
        });
        let mut work = Self {
            waiting: waiting.collect(),
            ended: Vec::new(),
        };
        for agent in offline {
            let error = "not connected; it catches up when it comes back, without a re-hash";
            let end = End::new(agent, "offline", None, Some(error.to_owned()));
            news.push(work.end(end));
        }
        for (agent, at) in past {
            let error = format!(
                "it took {at} and never goes back to a lower number; `rollback` publishes old \
                 databases under a new one"
            );
            news.push(work.end(End::new(agent, "past", None, Some(error))));
        }
        (work, news)
    }

    /// What the hub sees now, in the order of names.
    pub fn look(&mut self, rows: &[Row]) -> Vec<News> {
        let names: Vec<_> = self.waiting.keys().cloned().collect();
        let mut news = Vec::new();
        for agent in names {
            let Some(row) = of(&agent, rows) else {
                let error = Some("revoked meanwhile".to_owned());
                news.push(self.end(End::new(agent, "gone", None, error)));
                continue;
            };
            let waiting = self.waiting.get_mut(&agent).expect("taken from its keys");
            // Of several orders at a time the answer to the last one is the answer to all.
            let answered = row.answered.filter(|it| it.offer >= waiting.offer);
            if let Some(answered) = answered.filter(|_| row.offered.is_none()) {
                // What it refused before is shown with its row, and is no answer to this.
                let live = Some(Outcome::Live);
                let there = row.conformant || (row.taken_back && row.live);
                let end = match answered.outcome == live && there {
                    true => End {
                        conformant: true,
                        ..End::new(agent, Outcome::Live.as_str(), Some(row), None)
                    },
                    // Where it is wanted it may be all the same: at the one before, whose wave has
                    // not begun. That is not what was ordered.
                    false => End {
                        conformant: false,
                        ..End::new(agent, &row.outcome, Some(row), row.error.clone())
                    },
                };
                news.push(self.end(end));
                continue;
            }
            let said = match row.outcome.as_str() {
                _ if !row.connected => "connection lost",
                OFFERED if waiting.said.starts_with(WAITS) => continue,
                OFFERED => ORDERED,
                phase => phase,
            };
            if waiting.said != said {
                said.clone_into(&mut waiting.said);
                let phase = said.to_owned();
                news.push(News::Phase { agent, phase });
            }
        }
        news
    }

    /// The disk holds up the offers, for this reason.
    pub fn hold_up(&mut self, reason: &str) -> Vec<News> {
        let mut news = Vec::new();
        for (agent, waiting) in &mut self.waiting {
            if waiting.said == ORDERED {
                waiting.said = format!("{WAITS}{reason}");
                news.push(News::Phase {
                    agent: agent.clone(),
                    phase: waiting.said.clone(),
                });
            }
        }
        news
    }

    /// The time is over: whoever is not done has failed.
    pub fn time_out(&mut self) -> Vec<News> {
        self.end_all(|said| match said {
            ORDERED => (
                "no answer",
                "it gave no sign of the order in time".to_owned(),
            ),
            said => (
                "timeout",
                format!("not done in time, last seen: {said}; it goes on by itself"),
            ),
        })
    }

    /// Nobody follows it any more, because of `reason`: what becomes of the others is not known here.
    pub fn interrupt(&mut self, reason: &str) -> Vec<News> {
        self.end_all(|said| {
            let error = format!("{reason} before it was done, last seen: {said}");
            (INTERRUPTED, error)
        })
    }

    fn end_all(&mut self, how: impl Fn(&str) -> (&'static str, String)) -> Vec<News> {
        let mut news = Vec::new();
        for (agent, waiting) in std::mem::take(&mut self.waiting) {
            let (outcome, error) = how(&waiting.said);
            let end = End::new(agent, outcome, None, Some(error));
            news.push(self.end(end));
        }
        news
    }

    /// Whether every agent is done.
    pub fn is_done(&self) -> bool {
        self.waiting.is_empty()
    }

    /// What became of each, in the order in which they ended.
    pub fn ended(&self) -> &[End] {
        &self.ended
    }

    /// Those that did not get there.
    pub fn failed(&self) -> Vec<&End> {
        self.ended.iter().filter(|end| !end.conformant).collect()
    }

    /// How many agents it is about.
    pub fn agents(&self) -> usize {
        self.waiting.len() + self.ended.len()
    }

    /// What came of it, in one word.
    pub fn outcome(&self) -> &'static str {
        let mut ended = self.ended.iter();
        if ended.any(|end| end.outcome == INTERRUPTED) {
            INTERRUPTED
        } else if self.failed().is_empty() {
            "done"
        } else {
            "failed"
        }
    }

    /// What the audit log keeps of it.
    pub fn detail(&self) -> Value {
        let failed = self.failed();
        let mut detail = named("agents", self.ended.iter().map(|end| &end.agent));
        if !failed.is_empty() {
            detail.extend(named("failed", failed.iter().map(|end| &end.agent)));
        }
        let done = self.ended.len() - failed.len();
        detail.insert("done".to_owned(), done.into());
        let errors = failed.iter().map(|end| {
            let error = end.error.as_deref().unwrap_or("not there yet");
            format!("{}: {}: {error}", end.agent, end.outcome)
        });
        let drift = self.ended.iter().filter(|end| !end.drift.is_empty());
        let drift = drift.map(|end| format!("{}: {}", end.agent, found(&end.drift)));
        for (key, lines) in [
            ("errors", listed(errors, REASONS_BYTES_MAX)),
            ("drift", listed(drift, REASONS_BYTES_MAX)),
        ] {
            if !lines.is_empty() {
                detail.insert(key.to_owned(), json!(lines));
            }
        }
        Value::Object(detail)
    }

    fn end(&mut self, end: End) -> News {
        self.waiting.remove(&end.agent);
        self.ended.push(end.clone());
        News::End(end)
    }
}

impl End {
    /// `row` is what is known of the agent now that it has ended; none if it has not answered.
    fn new(agent: AgentName, outcome: &str, row: Option<&Row>, error: Option<String>) -> Self {
        Self {
            agent,
            outcome: outcome.to_owned(),
            position: row.and_then(|row| row.position),
            conformant: row.is_some_and(|row| row.conformant),
            drift: row.map(|row| row.drift.clone()).unwrap_or_default(),
            error,
        }
    }
}

/// The agent's row among `rows`, which are in the order of names.
fn of<'a>(agent: &AgentName, rows: &'a [Row]) -> Option<&'a Row> {
    let index = rows.binary_search_by(|row| row.name.cmp(agent)).ok()?;
    Some(&rows[index])
}

/// What the re-hash of a host found, for people.
pub fn found(drift: &[Drift]) -> String {
    let one = |drift: &Drift| {
        let found = match drift.found {
            Found::Missing => "was missing",
            Found::Changed => "was changed",
            Found::Unreadable => "could not be read",
        };
        let mended = if drift.mended { "mended" } else { "not mended" };
        format!("{} {found}, {mended}", drift.name)
    };
    drift.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// A list of agents as it stands in the audit log: all of them unless they are too many for one
/// record, and then how many there are.
pub fn named<'a>(
    key: &str,
    agents: impl ExactSizeIterator<Item = &'a AgentName>,
) -> serde_json::Map<String, Value> {
    let total = agents.len();
    let names = listed(agents.map(AgentName::to_string), NAMES_BYTES_MAX);
    let mut map = serde_json::Map::new();
    if names.len() < total {
        map.insert(format!("{key}_total"), total.into());
    }
    map.insert(key.to_owned(), json!(names));
    map
}

/// As many `lines` as fit `bytes_max` in JSON, each cut to what one may have.
fn listed(lines: impl Iterator<Item = String>, bytes_max: usize) -> Vec<String> {
    let mut left = bytes_max;
    let cut = lines.map(|mut line| {
        line.truncate(line.floor_char_boundary(REASON_BYTES_MAX));
        line
    });
    let fits = cut.take_while(|line| {
        let bytes = json!(line).to_string().len() + 1;
        left = left.saturating_sub(bytes);
        left > 0
    });
    fits.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::agents::Answered;
    use clamcast_proto::receipt::ClamdReport;
    use clamcast_proto::{Epoch, Generation};
    use jiff::Timestamp;

    /// Rows from `name group outcome [offered] [answered]`; a leading `!` means not connected, and
    /// `live` is conformant.
    pub(super) fn rows(text: &str) -> Vec<Row> {
        let row = |line: &str| {
            let mut words = line.split_whitespace();
            let name = words.next().unwrap();
            let group = words.next().unwrap().parse().unwrap();
            let outcome = words.next().unwrap_or("none").to_owned();
            let mut number = || words.next().and_then(|word| word.parse().ok()).map(OfferId);
            Row {
                name: name.trim_start_matches('!').parse().unwrap(),
                groups: vec![group],
                connected: !name.starts_with('!'),
                position: Some(Position {
                    epoch: Epoch(1),
                    generation: Generation::FIRST,
                }),
                live: outcome == "live",
                wanted: None,
                pinned: false,
                taken_back: false,
                conformant: outcome == "live",
                outcome,
                error: None,
                since: Timestamp::UNIX_EPOCH,
                clamd: ClamdReport::default(),
                foreign: vec![],
                adopted: vec![],
                drift: vec![],
                address: None,
                certificate_ends: Timestamp::UNIX_EPOCH,
                coming: false,
                offered: number(),
                answered: number().map(|offer| Answered {
                    offer,
                    outcome: Some(Outcome::Live),
                }),
            }
        };
        let mut rows: Vec<_> = text.split('|').map(str::trim).map(row).collect();
        rows.sort_by(|one, other| one.name.cmp(&other.name));
        rows
    }

    fn news(news: &[News]) -> String {
        let word = |news: &News| match news {
            News::Phase { agent, phase } => format!("{agent} {phase}"),
            News::End(end) => format!("{} = {}", end.agent, end.outcome),
        };
        news.iter().map(word).collect::<Vec<_>>().join(", ")
    }

    #[test]
    fn every_agent_is_followed_to_its_end() {
        let offers = vec![
            ("web1".parse().unwrap(), OfferId(5)),
            ("web2".parse().unwrap(), OfferId(6)),
        ];
        let (mut work, first) = Work::new(offers, vec!["db1".parse().unwrap()], vec![]);
        assert_eq!(news(&first), "web1 ordered, web2 ordered, db1 = offline");
        let look = |work: &mut Work, text: &str| news(&work.look(&rows(text)));
        let fetching = "web1 dmz fetching 5 4 | web2 dmz live 6 2";
        assert_eq!(look(&mut work, fetching), "web1 fetching, web2 live");
        assert_eq!(look(&mut work, fetching), "", "nothing new");
        assert_eq!(
            look(&mut work, "!web1 dmz live | web2 dmz live - 6"),
            "web1 connection lost, web2 = live"
        );
        assert!(!work.is_done());
        // A newer generation came in between; its answer is as good.
        assert_eq!(look(&mut work, "web1 dmz refused - 9"), "web1 = refused");
        assert!(work.is_done());
        let conformant = work.ended().iter().filter(|end| end.conformant).count();
        assert_eq!(conformant, 1);
    }

    #[test]
    fn a_host_that_refused_something_else_before_ends_with_its_answer() {
        let offers = vec![("web1".parse().unwrap(), OfferId(5))];
        let (mut work, _) = Work::new(offers, vec![], vec![]);
        let mut rows = rows("web1 dmz refused - 5");
        rows[0].error = Some("1.8: Malformed database".to_owned());
        rows[0].conformant = true;
        assert_eq!(news(&work.look(&rows)), "web1 = live");
        assert_eq!(work.ended()[0].error, None);
    }

    #[test]
    fn a_host_that_refused_what_was_forced_has_failed_though_it_is_where_it_is_wanted() {
        let offers = vec![("web1".parse().unwrap(), OfferId(5))];
        let (mut work, _) = Work::new(offers, vec![], vec![]);
        let mut rows = rows("web1 dmz refused - 5");
        rows[0].answered = rows[0].answered.map(|it| Answered {
            outcome: Some(Outcome::Refused),
            ..it
        });
        rows[0].conformant = true; // at the one before, for its wave has not begun
        assert_eq!(news(&work.look(&rows)), "web1 = refused");
        assert!(!work.ended()[0].conformant);
    }

    #[test]
    fn whoever_is_late_or_revoked_has_failed() {
        let offers = vec![
            ("web1".parse().unwrap(), OfferId(5)),
            ("web2".parse().unwrap(), OfferId(6)),
        ];
        let (mut work, _) = Work::new(offers, vec![], vec![]);
        let rows = rows("web1 dmz proving 5");
        assert_eq!(news(&work.look(&rows)), "web1 proving, web2 = gone");
        assert_eq!(news(&work.time_out()), "web1 = timeout");
        assert!(work.is_done() && work.ended().iter().all(|end| !end.conformant));
    }

    #[test]
    fn whoever_never_answered_is_told_from_whoever_is_slow() {
        let offers = || {
            let names = ["web1", "web2"].map(|name| name.parse().unwrap());
            names.into_iter().zip([5, 6].map(OfferId)).collect()
        };
        let (mut work, _) = Work::new(offers(), vec![], vec![]);
        work.look(&rows("web1 dmz offered 5 | web2 dmz fetching 6"));
        assert_eq!(news(&work.time_out()), "web1 = no answer, web2 = timeout");
        let (mut work, _) = Work::new(offers(), vec![], vec![]);
        work.look(&rows("web1 dmz live - 5 | web2 dmz proving 6"));
        assert_eq!(news(&work.interrupt("reload")), "web2 = interrupted");
        assert_eq!(work.detail()["failed"], json!(["web2"]));
        let errors = json!(["web2: interrupted: reload before it was done, last seen: proving"]);
        assert_eq!(work.detail()["errors"], errors);
    }

    #[test]
    fn an_order_that_waits_for_the_disk_says_so_until_it_is_answered() {
        let offers = vec![("web1".parse().unwrap(), OfferId(5))];
        let (mut work, _) = Work::new(offers.clone(), vec![], vec![]);
        assert_eq!(news(&work.hold_up("no space")), "web1 waits: no space");
        assert_eq!(news(&work.hold_up("no space")), "");
        assert_eq!(news(&work.look(&rows("web1 dmz offered 5"))), "");
        assert_eq!(
            news(&work.look(&rows("web1 dmz proving 5"))),
            "web1 proving"
        );
        let (mut work, _) = Work::new(offers, vec![], vec![]);
        work.hold_up("no space");
        work.time_out();
        let error = work.ended()[0].error.as_deref().unwrap();
        assert!(error.contains("last seen: waits: no space"), "{error}");
    }

    #[test]
    fn a_record_of_a_whole_fleet_keeps_its_size() {
        let name = |number| format!("{}-{number:05}", "n".repeat(57)).parse().unwrap();
        let record = |count: u64| {
            let names: Vec<AgentName> = (0..count).map(name).collect();
            let ordered = Value::Object(named("agents", names.iter()));
            let (work, _) = Work::new(vec![], names, vec![]);
            (ordered, work.detail())
        };
        let (ordered, ended) = record(2_000);
        assert_eq!(ordered["agents"].as_array().unwrap().len(), 2_000);
        assert_eq!(ended["failed"].as_array().unwrap().len(), 2_000);
        let (ordered, ended) = record(20_000);
        assert_eq!(
            (&ordered["agents_total"], &ended["failed_total"]),
            (&json!(20_000), &json!(20_000))
        );
        for record in [ordered, ended] {
            let bytes = record.to_string().len();
            assert!((300_000..900_000).contains(&bytes), "{bytes}");
        }
    }
}
