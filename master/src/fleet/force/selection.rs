//! What an operator means: which agents, and which generation.

use std::collections::BTreeSet;
use std::str::FromStr;

use clamcast_proto::{AgentName, Epoch, Generation, GroupName, Position};
use globset::Glob;
use serde::{Deserialize, Serialize};

use crate::fleet::agents::Row;

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
    /// Looking up very many takes time that the connections of agents need.
    #[error(
        "{0} names and patterns are too many, at most {NAMES_MAX} may be; use wider patterns, --group or --all"
    )]
    TooMany(usize),
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

/// Names and patterns of one selection: each pattern is tried on every agent.
const NAMES_MAX: usize = 500;

/// Likeness from which on one name may be a slip for another (Jaro-Winkler; host names share their
/// beginnings).
const SLIP: f64 = 0.9;

impl Selection {
    /// The rows of the agents that are meant, if each is meant by its whole name.
    pub fn by_name<'a>(&self, rows: &'a [Row]) -> Option<Vec<&'a Row>> {
        if self.all || !self.groups.is_empty() {
            return None;
        }
        let row = |name: &String| {
            let row = rows.binary_search_by(|row| row.name.as_str().cmp(name));
            row.ok().map(|at| &rows[at])
        };
        self.names.iter().map(row).collect()
    }

    /// The agents that are meant. Every part of the selection must mean somebody: a slip must not
    /// pass as success.
    pub fn resolve(&self, rows: &[Row]) -> Result<BTreeSet<AgentName>, SelectError> {
        if !self.all && self.names.is_empty() && self.groups.is_empty() {
            return Err(SelectError::Nobody);
        }
        if self.names.len() > NAMES_MAX {
            return Err(SelectError::TooMany(self.names.len()));
        }
        let everybody = || rows.iter().map(|row| &row.name);
        let mut meant = BTreeSet::new();
        if self.all {
            meant.extend(everybody().cloned());
        }
        for name in &self.names {
            let exact = rows.binary_search_by(|row| row.name.as_str().cmp(name));
            if let Ok(exact) = exact {
                meant.insert(rows[exact].name.clone());
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
            if matching.is_empty() {
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

/// The generation that an operator means: `EPOCH.NUMBER`, or a number in the current epoch.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Meant {
    /// The epoch, if it was said.
    pub epoch: Option<Epoch>,
    /// The number.
    pub generation: Generation,
}

impl Meant {
    /// Whether this is the generation at `position`, if that is current.
    pub fn is(self, position: Position) -> bool {
        self.generation == position.generation
            && self.epoch.is_none_or(|epoch| epoch == position.epoch)
    }
}

/// A text does not name a generation.
#[derive(Debug, thiserror::Error)]
#[error("expected a generation as `generations` lists it, like 1.42, or its number alone")]
pub struct MeantError;

impl FromStr for Meant {
    type Err = MeantError;

    fn from_str(text: &str) -> Result<Self, MeantError> {
        let number = |text: &str| text.parse().map_err(|_| MeantError);
        let (epoch, generation) = match text.split_once('.') {
            Some((epoch, generation)) => (Some(Epoch(number(epoch)?)), generation),
            None => (None, text),
        };
        let generation = Generation::new(number(generation)?).ok_or(MeantError)?;
        Ok(Self { epoch, generation })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::force::tests::rows;

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
    fn by_name_is_by_whole_names_alone() {
        let rows = rows("web1 dmz | web2 dmz | db1 lan");
        let check = |names: &[&str], groups: &[&str], all, expected: Option<usize>| {
            let selection = Selection {
                names: names.iter().map(|name| (*name).to_owned()).collect(),
                groups: groups.iter().map(|group| group.parse().unwrap()).collect(),
                all,
            };
            let found = selection.by_name(&rows).map(|rows| rows.len());
            assert_eq!(found, expected, "{names:?} {groups:?}");
        };
        check(&["web1", "db1"], &[], false, Some(2));
        check(&["web1", "*"], &[], false, None);
        check(&["web1"], &["lan"], false, None);
        check(&["web1"], &[], true, None);
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

    #[test]
    fn a_generation_is_meant_by_its_number_in_the_current_epoch_or_by_both() {
        let current = Position {
            epoch: Epoch(2),
            generation: Generation::new(7).unwrap(),
        };
        let check = |text: &str, expected: Option<bool>| {
            let meant: Option<Meant> = text.parse().ok();
            assert_eq!(meant.map(|meant| meant.is(current)), expected, "{text}");
        };
        check("7", Some(true));
        check("2.7", Some(true));
        check("1.7", Some(false));
        check("8", Some(false));
        for wrong in ["", "0", "2.", "x", "2.7.1", "-1"] {
            check(wrong, None);
        }
    }
}
