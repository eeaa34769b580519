//! Decides what the next generation consists of: each unit as the mirror has it, or as it was published
//! last.
//!
//! Pure: what is in the mirror and what is published come in, a set of files comes out.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use clamcast_proto::manifest::{ManifestFile, content_digest};
use clamcast_proto::names::DatabaseKind;
use clamcast_proto::{DatabaseName, Digest};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::config::units::UnitName;

/// A file that clamd would load and that no generation carries.
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Skipped {
    /// Its name, safe to print.
    pub name: String,
    /// Why.
    pub reason: String,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.reason)
    }
}

/// Why a unit is held.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Cause {
    /// What kind of reason it is.
    pub kind: CauseKind,
    /// What is wrong, in words.
    pub text: String,
}

impl Cause {
    /// One cause of several objections.
    pub fn joined(kind: CauseKind, objections: &[(CauseKind, String)]) -> Self {
        let texts = objections.iter().map(|(_, text)| text.as_str());
        let text = listed(texts, REASONS_SHOWN);
        Self { kind, text }
    }
}

/// Reasons that a message tells; of more it has the number.
pub const REASONS_SHOWN: usize = 3;

/// The first of several texts, and how many more there are.
pub fn listed<'t>(texts: impl IntoIterator<Item = &'t str>, shown: usize) -> String {
    let mut texts = texts.into_iter();
    let first: Vec<_> = texts.by_ref().take(shown).collect();
    let mut list = first.join("; ");
    match texts.count() {
        0 => {}
        more => list += &format!("; and {more} more"),
    }
    list
}

/// What can be done about a held unit.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CauseKind {
    /// It changes faster than it can be copied.
    Restless,
    /// A program is at work on it. It ends by itself, or an operator overrules it.
    Unfinished,
    /// An operator may overrule it.
    Questionable,
    /// It has to be mended in the mirror.
    Broken,
    /// It or another one of several units is not loaded.
    Suspect,
    /// clamscan does not load it, which is not tried again before it changes.
    Unloadable,
}

impl CauseKind {
    /// What to do, for messages.
    pub fn remedy(self, unit: &UnitName) -> String {
        let unit = quoted(unit.as_str());
        match self {
            Self::Restless => "it is published when the program is done".to_owned(),
            Self::Unfinished => format!(
                "it is published when the program is done, or now with `publish --accept REASON {unit}`"
            ),
            Self::Suspect => {
                "find the one at fault: move the held files away one at a time, and run `publish`"
                    .to_owned()
            }
            Self::Questionable => {
                format!("if it is right, `publish --accept REASON {unit}`")
            }
            Self::Broken | Self::Unloadable => "mend, rename or remove it in the mirror".to_owned(),
        }
    }
}

/// The word for a command line. A writer to the mirror chooses the names of its files, and an operator
/// pastes the command.
fn quoted(word: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._+-".contains(&byte);
    match word.bytes().all(is_plain) && !word.starts_with('-') {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

/// A held unit.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Held {
    /// Why.
    #[serde(flatten)]
    pub cause: Cause,
    /// Content of the unit in the mirror; none if it could not be captured.
    pub version: Option<Digest>,
    /// What is published in its place; none if nothing is.
    pub carries: Option<Carried>,
}

/// The published version of a held unit.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Carried {
    /// Its files.
    pub files: Vec<DatabaseName>,
    /// The version of its container, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// When it was captured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub captured: Option<Timestamp>,
}

impl Carried {
    fn of(files: &[ManifestFile]) -> Option<Self> {
        let container = match files {
            [one] => one.container.as_ref(),
            _ => None,
        };
        (!files.is_empty()).then(|| Self {
            files: files.iter().map(|file| file.name.clone()).collect(),
            version: container.map(|facts| facts.version),
            captured: files.iter().filter_map(|file| file.captured).min(),
        })
    }
}

impl fmt::Display for Carried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.files.as_slice() {
            [one] => write!(f, "{one}")?,
            [one, more @ ..] => write!(f, "{one} and {} more", more.len())?,
            [] => {}
        }
        if let Some(version) = self.version {
            write!(f, " version {version}")?;
        }
        if let Some(captured) = self.captured {
            write!(f, " of {captured:.0}")?;
        }
        Ok(())
    }
}

/// What a generation has of a unit.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum State {
    /// What is published already.
    Unchanged,
    /// What the mirror has. `is_new`: nothing of the unit is published yet.
    Changed {
        /// Whether nothing of the unit is published yet.
        is_new: bool,
    },
    /// Nothing, because it is gone from the mirror.
    Removed,
    /// The published version, or nothing.
    Held(Held),
}

/// A generation in the making.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What is published, by unit, as far as it may be published again.
    carried: BTreeMap<UnitName, Vec<ManifestFile>>,
    parts: BTreeMap<UnitName, (Vec<ManifestFile>, State)>,
    /// What operators overruled.
    pub accepted: Vec<String>,
}

impl Plan {
    /// A generation without any unit yet. `carried`: what is published and may be published again.
    pub fn new(carried: BTreeMap<UnitName, Vec<ManifestFile>>) -> Self {
        Self {
            carried,
            parts: BTreeMap::new(),
            accepted: Vec::new(),
        }
    }

    /// Takes a unit as the mirror has it.
    pub fn take(&mut self, unit: UnitName, files: Vec<ManifestFile>) {
        let state = match self.carried.get(&unit) {
            Some(published) if content(published) == content(&files) => State::Unchanged,
            published => State::Changed {
                is_new: published.is_none(),
            },
        };
        self.parts.insert(unit, (files, state));
    }

    /// Leaves out a unit that is gone from the mirror.
    pub fn remove(&mut self, unit: UnitName) {
        self.parts.insert(unit, (Vec::new(), State::Removed));
    }

    /// Carries the published version of a unit.
    pub fn hold(&mut self, unit: UnitName, cause: Cause, version: Option<Digest>) {
        let files = self.carried.get(&unit).cloned().unwrap_or_default();
        let carries = Carried::of(&files);
        let held = Held {
            cause,
            version,
            carries,
        };
        self.parts.insert(unit, (files, State::Held(held)));
    }

    /// Holds a unit that was taken before.
    pub fn hold_taken(&mut self, unit: &UnitName, cause: Cause) {
        let version = self.parts.get(unit).map(|(files, _)| content(files));
        self.hold(unit.clone(), cause, version);
    }

    /// Leaves the signature files of a unit out.
    pub fn drop_signatures(&mut self, unit: &UnitName) {
        let files = without_signatures(self.files_of(unit));
        self.take(unit.clone(), files);
    }

    /// The units, with what the generation has of each.
    pub fn units(&self) -> impl Iterator<Item = (&UnitName, &State)> {
        self.parts.iter().map(|(unit, (_, state))| (unit, state))
    }

    /// The units that are held.
    pub fn held(&self) -> impl Iterator<Item = (&UnitName, &Held)> {
        self.units().filter_map(|(unit, state)| match state {
            State::Held(held) => Some((unit, held)),
            State::Unchanged | State::Changed { .. } | State::Removed => None,
        })
    }

    /// The units that the generation has and that are not published yet in this version.
    pub fn changed(&self) -> Vec<UnitName> {
        let changed = self.units();
        let changed = changed.filter(|(_, state)| matches!(state, State::Changed { .. }));
        changed.map(|(unit, _)| unit.clone()).collect()
    }

    /// The files of a unit.
    pub fn files_of(&self, unit: &UnitName) -> &[ManifestFile] {
        self.parts.get(unit).map_or(&[], |(files, _)| files)
    }

    /// Whether the generation has no file.
    pub fn is_empty(&self) -> bool {
        self.parts.values().all(|(files, _)| files.is_empty())
    }

    /// The content digest of the generation.
    pub fn content(&self) -> Digest {
        content(self.parts.values().flat_map(|(files, _)| files))
    }

    /// The files of the generation, sorted by name.
    pub fn files(&self) -> Vec<ManifestFile> {
        self.files_if(&BTreeSet::new(), &BTreeSet::new())
    }

    /// The files of the generation, sorted by name, if the units in `held` were held, and those in
    /// `unsigned` had no signature files.
    pub fn files_if(
        &self,
        held: &BTreeSet<UnitName>,
        unsigned: &BTreeSet<UnitName>,
    ) -> Vec<ManifestFile> {
        let files = self.parts.iter().flat_map(|(unit, (files, _))| {
            if held.contains(unit) {
                self.carried.get(unit).cloned().unwrap_or_default()
            } else if unsigned.contains(unit) {
                without_signatures(files)
            } else {
                files.clone()
            }
        });
        let mut files: Vec<_> = files.collect();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        files
    }

    /// Holds units of which a file has the same name as a file of another unit on a file system that
    /// folds case. What is published keeps its name.
    pub fn separate_names(&mut self) {
        let mut owners: BTreeMap<String, DatabaseName> = BTreeMap::new();
        let mut collisions = Vec::new();
        let rank = |state: &State| matches!(state, State::Changed { is_new: true });
        let mut parts: Vec<_> = self.parts.iter().collect();
        parts.sort_by_key(|(_, (_, state))| rank(state));
        for (unit, (files, state)) in parts {
            let mut own: BTreeMap<String, DatabaseName> = BTreeMap::new();
            let mut other = None;
            for name in files.iter().map(|file| &file.name) {
                // Both forms of a container are one database.
                let forms = name.other_form().map(|form| form.folded());
                let folded = [Some(name.folded()), forms];
                for folded in folded.into_iter().flatten() {
                    let known = own.get(&folded).or_else(|| owners.get(&folded));
                    if let Some(known) = known.filter(|known| *known != name) {
                        other = Some((name, known.clone()));
                    }
                    own.insert(folded, name.clone());
                }
            }
            match other {
                Some((name, other)) if !matches!(state, State::Held(_)) => {
                    let text = format!("{name} and {other} are one name where case does not count");
                    collisions.push((unit.clone(), text));
                }
                Some(_) | None => owners.extend(own),
            }
        }
        for (unit, text) in collisions {
            let kind = CauseKind::Broken;
            self.hold_taken(&unit, Cause { kind, text });
        }
    }

    /// Holds new units until the files of all units fit. `cost` is what a file takes of `limit`, which is
    /// counted in `what`. Official databases and what is published come first.
    pub fn fit(&mut self, limit: usize, cost: impl Fn(&ManifestFile) -> usize, what: &str) {
        let total = |files: &[ManifestFile]| files.iter().map(&cost).sum::<usize>();
        let is_optional = |unit: &UnitName, state: &State| {
            matches!(state, State::Changed { is_new: true }) && !unit.is_official()
        };
        let mut used = 0;
        let mut optional = Vec::new();
        for (unit, (files, state)) in &self.parts {
            match is_optional(unit, state) {
                true => optional.push((unit.clone(), total(files))),
                false => used += total(files),
            }
        }
        for (unit, cost) in optional {
            if used + cost <= limit {
                used += cost;
                continue;
            }
            let text = format!("a generation has no room for it: at most {limit} {what}");
            let kind = CauseKind::Broken;
            self.hold_taken(&unit, Cause { kind, text });
        }
    }
}

/// What a unit consists of, as one digest.
pub fn content<'f>(files: impl IntoIterator<Item = &'f ManifestFile>) -> Digest {
    let files = files.into_iter();
    content_digest(files.map(|it| (&it.name, it.size, &it.sha256)))
}

fn without_signatures(files: &[ManifestFile]) -> Vec<ManifestFile> {
    let others = files.iter();
    let others = others.filter(|file| file.name.kind() != DatabaseKind::Sign);
    others.cloned().collect()
}

/// Whether a unit has a signed container: the fleet must not lose it without an operator's word.
pub fn is_signed(files: &[ManifestFile]) -> bool {
    let mut kinds = files.iter().map(|file| file.name.kind());
    kinds.any(|kind| matches!(kind, DatabaseKind::Cvd | DatabaseKind::Cld))
}
