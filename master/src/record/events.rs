//! What the master's audit log tells of, and which of it somebody wants to see.

use std::fmt;
use std::str::FromStr;

use clamcast_proto::AuditEvent;
use clamcast_proto::audit::Record;
use clamcast_proto::event::Subject;
use globset::{Glob, GlobMatcher};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Lists in the detail of an order to several agents, which name them.
const NAMING_AGENTS: [&str; 2] = ["agents", "failed"];

/// Which records somebody wants to see: those that all of this fits. What is `None` does not restrict.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Filter {
    /// Only those with a higher number, for whoever has seen the ones up to it.
    #[serde(default)]
    pub after: Option<u64>,
    /// Not before this.
    pub since: Option<Timestamp>,
    /// By or about these agents.
    pub agent: Option<AgentPattern>,
    /// Of this event.
    pub event: Option<String>,
    /// By the operator with this name or user id.
    pub operator: Option<String>,
}

impl Filter {
    /// Whether `record` is wanted.
    pub fn matches(&self, record: &Record) -> bool {
        self.after.is_none_or(|after| record.seq > after)
            && self.since.is_none_or(|since| record.time >= since)
            && self
                .event
                .as_ref()
                .is_none_or(|event| record.event == *event)
            && self
                .operator
                .as_ref()
                .is_none_or(|operator| by_operator(record, operator))
            && self
                .agent
                .as_ref()
                .is_none_or(|agent| concerns(record, agent))
    }
}

fn by_operator(record: &Record, operator: &str) -> bool {
    let who = record.actor.strip_prefix("operator:");
    let parts = who.and_then(|who| who.split_once('/'));
    parts.is_some_and(|(uid, name)| uid == operator || name == operator)
}

fn concerns(record: &Record, agent: &AgentPattern) -> bool {
    let actor = record.actor.strip_prefix("agent:");
    let event = AuditEvent::named(&record.event);
    let is_about_one = event.is_some_and(|event| event.subject() == Subject::Agent);
    let subject = is_about_one.then_some(record.subject.as_str());
    let named = record.detail["agent"].as_str();
    let listed = NAMING_AGENTS
        .iter()
        .filter_map(|list| record.detail[list].as_array())
        .flatten()
        .filter_map(|name| name.as_str());
    actor
        .into_iter()
        .chain(subject)
        .chain(named)
        .chain(listed)
        .any(|name| agent.matches(name))
}

/// An agent's name, or a pattern of names like `db-*`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct AgentPattern(GlobMatcher);

/// The text is no pattern.
#[derive(Debug, thiserror::Error)]
#[error("expected an agent's name or a pattern like `db-*`")]
pub struct PatternError(#[from] globset::Error);

impl AgentPattern {
    /// Whether the agent called `name` is meant.
    pub fn matches(&self, name: &str) -> bool {
        self.0.is_match(name)
    }
}

impl FromStr for AgentPattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        Ok(Self(Glob::new(text)?.compile_matcher()))
    }
}

impl TryFrom<String> for AgentPattern {
    type Error = PatternError;

    fn try_from(text: String) -> Result<Self, PatternError> {
        text.parse()
    }
}

impl From<AgentPattern> for String {
    fn from(pattern: AgentPattern) -> Self {
        pattern.to_string()
    }
}

impl fmt::Display for AgentPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.glob().glob())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clamcast_proto::audit::Draft;
    use serde_json::{Value, json};

    /// Whether the filter of `arguments`, like `agent=web*`, wants a record of the time 0 by `actor`.
    #[track_caller]
    fn check(record: [&str; 3], detail: &Value, arguments: &str, expected: bool) {
        let [actor, event, subject] = record;
        let event = AuditEvent::named(event).unwrap();
        let draft = Draft {
            detail: detail.clone(),
            ..Draft::new(event, actor, subject)
        };
        let mut filter = Filter::default();
        for argument in arguments.split_whitespace() {
            let (key, value) = argument.split_once('=').unwrap();
            let text = Some(value.to_owned());
            match key {
                "since" => filter.since = Some(value.parse().unwrap()),
                "agent" => filter.agent = Some(value.parse().unwrap()),
                "event" => filter.event = text,
                "operator" => filter.operator = text,
                other => panic!("{other}"),
            }
        }
        // As it comes over the admin socket.
        let filter: Filter =
            serde_json::from_value(serde_json::to_value(&filter).unwrap()).unwrap();
        let record = draft.record(1, Timestamp::UNIX_EPOCH);
        assert_eq!(filter.matches(&record), expected, "{arguments}");
    }

    #[test]
    fn a_filter_restricts_by_what_it_names_and_by_all_of_it() {
        let published = ["operator:1000/operator", "published", "mirror"];
        let none = json!({});
        check(published, &none, "", true);
        check(published, &none, "event=published", true);
        check(published, &none, "event=offer", false);
        check(published, &none, "operator=operator", true);
        check(published, &none, "operator=1000", true);
        check(published, &none, "operator=a", false);
        check(published, &none, "since=1970-01-01T00:00:00Z", true);
        check(published, &none, "since=1970-01-01T00:00:01Z", false);
        check(published, &none, "operator=operator event=published", true);
        check(published, &none, "operator=operator event=offer", false);
    }

    #[test]
    fn an_agents_records_are_those_by_it_about_it_and_that_name_it() {
        let none = json!({});
        let offer = ["master", "offer", "web1"];
        let receipt = ["agent:web1", "receipt", "web1"];
        for record in [offer, receipt] {
            check(record, &none, "agent=web1", true);
            check(record, &none, "agent=web*", true);
            check(record, &none, "agent=web", false);
            check(record, &none, "agent=db*", false);
        }
        let order = ["operator:0/root", "force-sync", "fleet"];
        let named = json!({ "agents": ["web1", "web2"] });
        check(order, &named, "agent=web2", true);
        check(order, &named, "agent=*2 operator=root", true);
        check(order, &named, "agent=web3", false);
        check(["master", "published", "mirror"], &none, "agent=*", false);
        check(["master", "rejected", "192.0.2.1"], &none, "agent=*", false);
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        assert!("web[".parse::<AgentPattern>().is_err());
        assert!(serde_json::from_value::<AgentPattern>(json!("web[")).is_err());
    }
}
