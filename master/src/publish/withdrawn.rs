//! What the fleet tells the publisher: the generations that were taken back, and whether anything
//! may be published at all.
//!
//! Pure: no sockets, no disk, no clock. The rollout owns these facts. The publisher reads them when
//! it needs them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use clamcast_proto::dsse::Verified;
use clamcast_proto::manifest::{Manifest, ManifestFile};
use clamcast_proto::{DatabaseName, Digest, Position};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Generations that are remembered as withdrawn. A host that still has an older one of them was away
/// for so many bad updates; then it is told to go on from there like any other.
pub const WITHDRAWN_MAX: usize = 256;

/// Files of all withdrawn generations together that are remembered as new in them. Beyond that the
/// lowest generations are remembered by their content alone.
pub const NEW_FILES_MAX: usize = 20_000;

/// How a rollout ended that did not go through.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// By itself: clamds refused it.
    Halted,
    /// By an operator.
    Aborted,
    /// By an operator, after it was complete.
    #[serde(alias = "rolled back")]
    RolledBack,
}

/// What was done to the generation, as in `was halted`.
impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Halted => "halted",
            Self::Aborted => "aborted",
            Self::RolledBack => "rolled back",
        })
    }
}

/// A generation that was taken back.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Withdrawal {
    /// The content digest.
    pub content: Digest,
    /// The generation that had it.
    pub position: Position,
    /// What became of that generation.
    pub outcome: Ending,
    /// When.
    pub since: Timestamp,
    /// Its files that the generation does not have which the fleet went back to. Absent in a record of
    /// an earlier build, and in one of very many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new: Option<BTreeMap<DatabaseName, Digest>>,
    /// The files that the refusals which halted it name. Empty if one of them names none, so that any new
    /// file may be at fault. Hosts name them: a name need not be one of the generation.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub blamed: BTreeSet<DatabaseName>,
}

impl Withdrawal {
    /// The new files because of which the generation was taken back, or may have been.
    fn suspects(&self) -> impl Iterator<Item = (&DatabaseName, &Digest)> {
        let new = self.new.iter().flatten();
        let blames_new = |new: &BTreeMap<_, _>| self.blamed.iter().any(|it| new.contains_key(it));
        let is_blamed = self.new.as_ref().is_some_and(blames_new);
        new.filter(move |(name, _)| !is_blamed || self.blamed.contains(*name))
    }
}

impl fmt::Display for Withdrawal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            position, outcome, ..
        } = self;
        write!(
            f,
            "the mirror has the databases of generation {position}, which was {outcome}; \
             `publish --accept REASON` to publish them again"
        )
    }
}

/// The generations that were taken back: nobody is offered them any more.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(from = "Vec<Withdrawal>", into = "Vec<Withdrawal>")]
pub struct Withdrawn(BTreeMap<Position, Withdrawal>);

impl Withdrawn {
    /// Adds one. Of more than [`WITHDRAWN_MAX`] the lowest is forgotten.
    pub fn insert(&mut self, withdrawal: Withdrawal) {
        self.0.insert(withdrawal.position, withdrawal);
        if self.0.len() > WITHDRAWN_MAX {
            self.0.pop_first();
        }
        let mut files = 0;
        for withdrawal in self.0.values_mut().rev() {
            files += withdrawal.new.as_ref().map_or(0, BTreeMap::len);
            if files > NEW_FILES_MAX {
                withdrawal.new = None;
            }
        }
    }

    /// Takes note of the files that were new in a withdrawn generation.
    pub fn were_new(&mut self, position: Position, new: BTreeMap<DatabaseName, Digest>) {
        if let Some(mut withdrawal) = self.0.remove(&position) {
            withdrawal.new = Some(new);
            self.insert(withdrawal);
        }
    }

    /// The last withdrawal because of which a unit with these `files` is held, with a file that was new.
    /// `is_of_unit` says which names belong to the unit. A unit that has changed since, in any of the files
    /// that were new, is not held, nor one that was published again in a generation that was not withdrawn.
    pub fn condemnation(
        &self,
        files: &[ManifestFile],
        published: &[Arc<Verified<Manifest>>],
        is_of_unit: impl Fn(&DatabaseName) -> bool,
    ) -> Option<(&Withdrawal, &DatabaseName)> {
        self.0.values().rev().find_map(|withdrawal| {
            let suspects = withdrawal.suspects().filter(|(name, _)| is_of_unit(name));
            let suspects: Vec<_> = suspects.collect();
            let has_all = |files: &[ManifestFile]| {
                let has = |(name, digest): &(&DatabaseName, &Digest)| {
                    let mut files = files.iter();
                    files.any(|it| (&it.name, &it.sha256) == (*name, *digest))
                };
                suspects.iter().all(has)
            };
            let is_back = published.iter().rev().any(|it| {
                it.position() > withdrawal.position
                    && !self.has(it.position())
                    && has_all(&it.files)
            });
            let (name, _) = suspects.first()?;
            (has_all(files) && !is_back).then_some((withdrawal, *name))
        })
    }

    /// Whether this generation was taken back.
    pub fn has(&self, position: Position) -> bool {
        self.0.contains_key(&position)
    }

    /// How and when this generation was taken back, if it was.
    pub fn of(&self, position: Position) -> Option<&Withdrawal> {
        self.0.get(&position)
    }

    /// The last withdrawal of a generation with this content, if its databases were not `published`
    /// again since under a position that was not withdrawn as well.
    pub fn rejection(
        &self,
        content: Digest,
        mut published: impl Iterator<Item = (Position, Digest)>,
    ) -> Option<&Withdrawal> {
        let mut withdrawals = self.0.values().rev();
        let last = withdrawals.find(|it| it.content == content)?;
        let again = published.any(|(position, published)| {
            published == content && position > last.position && !self.has(position)
        });
        (!again).then_some(last)
    }

    /// All, lowest first.
    pub fn iter(&self) -> impl Iterator<Item = &Withdrawal> {
        self.0.values()
    }
}

impl From<Vec<Withdrawal>> for Withdrawn {
    fn from(withdrawals: Vec<Withdrawal>) -> Self {
        let mut withdrawn = Self::default();
        withdrawals.into_iter().for_each(|it| withdrawn.insert(it));
        withdrawn
    }
}

impl From<Withdrawn> for Vec<Withdrawal> {
    fn from(withdrawn: Withdrawn) -> Self {
        withdrawn.0.into_values().collect()
    }
}

/// The highest generation that was not withdrawn, of `manifests`, lowest first.
pub fn newest(
    manifests: &[Arc<Verified<Manifest>>],
    withdrawn: &Withdrawn,
) -> Option<Arc<Verified<Manifest>>> {
    let mut highest = manifests.iter().rev();
    let published = || manifests.iter().map(|it| (it.position(), it.content));
    let good = highest.find(|it| {
        !withdrawn.has(it.position()) && withdrawn.rejection(it.content, published()).is_none()
    });
    good.cloned()
}

/// A rollback that has to be published.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rollback {
    /// The generation whose databases are published again.
    pub to: Position,
    /// The generation that it takes away.
    pub of: Position,
}

/// What the fleet tells the publisher.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Directives {
    /// Why nothing is published from the mirror.
    pub held: Option<String>,
    /// The rollback that has to be published.
    pub owed: Option<Rollback>,
    /// The generations that were taken back.
    pub withdrawn: Withdrawn,
    /// Why only databases with plain names may be published
    /// ([`clamcast_proto::DatabaseName::is_plain`]).
    pub plain_names: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clamcast_proto::{Epoch, Generation};

    fn position(number: u64) -> Position {
        Position {
            epoch: Epoch(1),
            generation: Generation::new(number).unwrap(),
        }
    }

    fn withdrawal(number: u64, content: &str) -> Withdrawal {
        Withdrawal {
            content: Digest::of(content.as_bytes()),
            position: position(number),
            outcome: Ending::Halted,
            since: Timestamp::UNIX_EPOCH,
            new: None,
            blamed: BTreeSet::new(),
        }
    }

    #[test]
    fn a_content_is_rejected_until_it_is_published_again() {
        let mut withdrawn = Withdrawn::default();
        withdrawn.insert(withdrawal(5, "a"));
        let a = Digest::of(b"a");
        let published = |numbers: &'static [u64]| numbers.iter().map(move |it| (position(*it), a));
        assert!(withdrawn.rejection(a, published(&[3, 5])).is_some());
        assert!(withdrawn.rejection(a, published(&[5, 7])).is_none());
        let b = Digest::of(b"b");
        assert!(withdrawn.rejection(b, published(&[5])).is_none());
        withdrawn.insert(withdrawal(7, "a"));
        let last = withdrawn.rejection(a, published(&[5, 7])).unwrap();
        assert_eq!(last.position, position(7));
    }

    #[test]
    fn the_lowest_is_forgotten_and_the_file_of_earlier_versions_is_read() {
        let mut withdrawn = Withdrawn::default();
        for number in (1..=WITHDRAWN_MAX as u64 + 1).rev() {
            withdrawn.insert(withdrawal(number, "a"));
        }
        assert_eq!(withdrawn.iter().count(), WITHDRAWN_MAX);
        assert!(!withdrawn.has(position(1)) && withdrawn.has(position(2)));
        let text = serde_json::to_string(&withdrawal(1, "a")).unwrap();
        let text = format!("[{}]", text.replace("halted", "rolled back"));
        let read: Withdrawn = serde_json::from_str(&text).unwrap();
        let outcome = read.of(position(1)).unwrap().outcome;
        assert_eq!(outcome, Ending::RolledBack);
    }
}
