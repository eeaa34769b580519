//! `force-sync`: which agents are meant, and what became of each.
//!
//! Pure: `admin.rs` feeds it what the hub sees and writes down what comes out.

use std::collections::{BTreeMap, BTreeSet};

use clamcast_proto::wire::OfferId;
use clamcast_proto::{AgentName, GroupName};
use globset::Glob;
use serde::{Deserialize, Serialize};

use crate::fleet::Row;

/// Which agents an operator means.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Selection {
    /// Names and patterns of names.
    pub names: Vec<String>,
    /// Groups.
    pub groups: Vec<GroupName>,
    /// Every agent.
    pub all: bool,
}

/// The selection does not mean anybody.
#[derive(Debug, thiserror::Error)]
pub enum SelectError {
    /// Nothing was said.
    #[error("say which agents: names, patterns, --group or --all")]
    Nobody,
    /// No such agent.
    #[error("no agent is called `{name}`; {}", nearest.as_ref().map_or("`agents` lists them".to_owned(), |near| format!("did you mean `{near}`?")))]
    Unknown {
        /// What was said.
        name: String,
        /// The agent that may have been meant.
        nearest: Option<AgentName>,
    },
    /// A pattern that no agent matches.
    #[error("no agent matches `{0}`; `agents` lists them")]
    NoMatch(String),
    /// A group without agents.
    #[error("no agent is in group `{0}`; `agents` lists them with their groups")]
    EmptyGroup(GroupName),
    /// Not a pattern.
    #[error("`{pattern}` is not a pattern")]
    Pattern {
        /// What was said.
        pattern: String,
        /// Why not.
        source: globset::Error,
    },
}

/// Likeness from which on one name may be a slip for another (Jaro-Winkler; host names share their
/// beginnings).
const SLIP: f64 = 0.9;

impl Selection {
    /// The agents that are meant. Every part of the selection must mean somebody: a slip must not
    /// pass as success.
    pub fn resolve(&self, rows: &[Row]) -> Result<BTreeSet<AgentName>, SelectError> {
        if !self.all && self.names.is_empty() && self.groups.is_empty() {
            return Err(SelectError::Nobody);
        }
        let everybody = || rows.iter().map(|row| &row.name);
        let mut meant = BTreeSet::new();
        if self.all {
            meant.extend(everybody().cloned());
        }
        for name in &self.names {
            let before = meant.len();
            if let Some(exact) = everybody().find(|agent| agent.as_str() == name) {
                meant.insert(exact.clone());
                continue;
            }
            if !name.contains(['*', '?', '[', '{']) {
                let slip = name.to_lowercase();
                let likeness =
                    |agent: &AgentName| strsim::jaro_winkler(&agent.as_str().to_lowercase(), &slip);
                let nearest = everybody()
                    .filter(|agent| likeness(agent) >= SLIP)
                    .max_by(|one, other| likeness(one).total_cmp(&likeness(other)))
                    .cloned();
                return Err(SelectError::Unknown {
                    name: name.clone(),
                    nearest,
                });
            }
            let glob = Glob::new(name).map_err(|source| SelectError::Pattern {
                pattern: name.clone(),
                source,
            })?;
            let glob = glob.compile_matcher();
            let matching = everybody().filter(|agent| glob.is_match(agent.as_str()));
            let matching: Vec<_> = matching.cloned().collect();
            if matching.is_empty() && before == meant.len() {
                return Err(SelectError::NoMatch(name.clone()));
            }
            meant.extend(matching);
        }
        for group in &self.groups {
            let members = rows.iter().filter(|row| row.groups.contains(group));
            let members: Vec<_> = members.map(|row| row.name.clone()).collect();
            if members.is_empty() {
                return Err(SelectError::EmptyGroup(group.clone()));
            }
            meant.extend(members);
        }
        Ok(meant)
    }
}

/// One forced install on its way through the fleet.
#[derive(Debug)]
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

/// What became of one agent.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct End {
    /// The agent.
    pub agent: AgentName,
    /// An outcome of its receipt, or `offline`, `gone`, `timeout`.
    pub outcome: String,
    /// The generation it has now.
    pub generation: Option<u64>,
    /// Whether it is what the master wants, with every file intact.
    pub conformant: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// News of one agent.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
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
    /// Begins with the agents that were offered, and those that are not connected, which are done
    /// at once.
    pub fn new(offers: Vec<(AgentName, OfferId)>, offline: Vec<AgentName>) -> (Self, Vec<News>) {
        let waiting = offers.into_iter().map(|(agent, offer)| {
            let said = String::new();
            (agent, Waiting { offer, said })
        });
        let mut work = Self {
            waiting: waiting.collect(),
            ended: Vec::new(),
        };
        let offline = offline.into_iter().map(|agent| {
            let error = "not connected; it catches up when it comes back, without a re-hash";
            work.end(agent, "offline", None, Some(error.to_owned()))
        });
        let news = offline.collect();
        (work, news)
    }

    /// What the hub sees now.
    pub fn look(&mut self, rows: &[Row]) -> Vec<News> {
        let names: Vec<_> = self.waiting.keys().cloned().collect();
        let mut news = Vec::new();
        for agent in names {
            let Some(row) = rows.iter().find(|row| row.name == agent) else {
                let error = Some("revoked meanwhile".to_owned());
                news.push(self.end(agent, "gone", None, error));
                continue;
            };
            let waiting = self.waiting.get_mut(&agent).expect("taken from its keys");
            let answered = row
                .answered
                .is_some_and(|answered| answered >= waiting.offer);
            // It lost the connection and is back without a newer offer: nothing was left to do.
            let back = row.connected && row.offered.is_none() && row.conformant;
            if answered || back {
                let outcome = row.outcome.clone();
                news.push(self.end(agent, &outcome, Some(row), row.error.clone()));
                continue;
            }
            let said = if row.connected {
                row.outcome.as_str()
            } else {
                "connection lost"
            };
            if waiting.said != said {
                said.clone_into(&mut waiting.said);
                let phase = said.to_owned();
                news.push(News::Phase { agent, phase });
            }
        }
        news
    }

    /// The time is over: whoever is not done has failed.
    pub fn time_out(&mut self, rows: &[Row]) -> Vec<News> {
        let names: Vec<_> = self.waiting.keys().cloned().collect();
        let late = names.into_iter().map(|agent| {
            let said = self.waiting[&agent].said.clone();
            let row = rows.iter().find(|row| row.name == agent);
            let error = format!("not done in time, last seen: {said}; it goes on by itself");
            self.end(agent, "timeout", row, Some(error))
        });
        late.collect()
    }

    /// Whether every agent is done.
    pub fn is_done(&self) -> bool {
        self.waiting.is_empty()
    }

    /// What became of each, in the order in which they ended.
    pub fn ended(&self) -> &[End] {
        &self.ended
    }

    fn end(
        &mut self,
        agent: AgentName,
        outcome: &str,
        row: Option<&Row>,
        error: Option<String>,
    ) -> News {
        self.waiting.remove(&agent);
        let end = End {
            agent,
            outcome: outcome.to_owned(),
            generation: row.and_then(|row| row.generation),
            conformant: row.is_some_and(|row| row.conformant) && outcome != "timeout",
            error,
        };
        self.ended.push(end.clone());
        News::End(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clamcast_proto::receipt::ClamdReport;
    use jiff::Timestamp;

    /// Rows from `name group outcome [offered] [answered]`; a leading `!` means not connected, and
    /// `live` is conformant.
    fn rows(text: &str) -> Vec<Row> {
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
                generation: Some(7),
                epoch: Some(1),
                live: outcome == "live",
                conformant: outcome == "live",
                outcome,
                error: None,
                since: Timestamp::UNIX_EPOCH,
                clamd: ClamdReport::default(),
                foreign: vec![],
                drift: vec![],
                address: None,
                certificate_ends: Timestamp::UNIX_EPOCH,
                offered: number(),
                answered: number(),
            }
        };
        text.split('|').map(str::trim).map(row).collect()
    }

    fn select(names: &[&str], groups: &[&str], all: bool) -> String {
        let selection = Selection {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            groups: groups.iter().map(|group| group.parse().unwrap()).collect(),
            all,
        };
        match selection.resolve(&rows("web1 dmz | web2 dmz | db1 lan")) {
            Ok(names) => names
                .iter()
                .map(AgentName::as_str)
                .collect::<Vec<_>>()
                .join(" "),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn names_patterns_and_groups_add_up_and_a_slip_is_an_error() {
        assert_eq!(select(&["web1"], &[], false), "web1");
        assert_eq!(select(&["web*"], &[], false), "web1 web2");
        assert_eq!(select(&["db1"], &["dmz"], false), "db1 web1 web2");
        assert_eq!(select(&[], &[], true), "db1 web1 web2");
        assert!(select(&[], &[], false).contains("--all"));
        assert_eq!(
            select(&["wbe1"], &[], false),
            "no agent is called `wbe1`; did you mean `web1`?"
        );
        assert!(select(&["DB1"], &[], false).contains("did you mean `db1`?"));
        assert_eq!(
            select(&["mail"], &[], false),
            "no agent is called `mail`; `agents` lists them"
        );
        assert!(select(&["mail*"], &[], false).contains("no agent matches"));
        assert!(select(&[], &["attic"], false).contains("no agent is in group"));
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
        let (mut work, first) = Work::new(offers, vec!["db1".parse().unwrap()]);
        assert_eq!(news(&first), "db1 = offline");
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
    fn whoever_is_late_or_revoked_has_failed() {
        let offers = vec![
            ("web1".parse().unwrap(), OfferId(5)),
            ("web2".parse().unwrap(), OfferId(6)),
        ];
        let (mut work, _) = Work::new(offers, vec![]);
        let rows = rows("web1 dmz proving 5");
        assert_eq!(news(&work.look(&rows)), "web1 proving, web2 = gone");
        assert_eq!(news(&work.time_out(&rows)), "web1 = timeout");
        assert!(work.is_done() && work.ended().iter().all(|end| !end.conformant));
    }
}
