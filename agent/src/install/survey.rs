//! Decides what an install changes in the database directory.
//!
//! Pure: facts about the directory come in as [`Seen`], and the journal of the install goes out.
//!
//! The facts are read in three steps, because reading a database costs seconds: first names alone,
//! which decide what names are concerned; then inodes and lengths of these; then the content, where
//! the plan depends on it. [`Planner`] answers what each step needs.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use clamcast_proto::manifest::{Manifest, ManifestFile};
use clamcast_proto::names::{DATABASE_NAME_BYTES_MAX, DatabaseKind, looks_like_a_database};
use clamcast_proto::receipt::{FileState, InstallNumber};
use clamcast_proto::{DatabaseName, Digest};

use super::journal::{Before, Installed, Journal, Moved, PutAside, Set, Step, Way};
use crate::clamd::proof::{CANARY, GATE, GATE_SPAN, Nonce, canary, canary_number, gate_number};

/// So much is kept in `adopted/` of what stood in the place of one database. One more is a fault, for
/// somebody to look at.
const KEPT_MAX: u32 = 100;

/// Ends the name of a file that no set restores any more. No database's name ends like this.
const OBSOLETE: &str = "obsolete";

/// The facts that a plan needs.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Canary and gate.
    pub numbers: Numbers,
    /// Every name in the database directory, directories included. Bytes that are not UTF-8 are
    /// replaced.
    pub names: Vec<String>,
    /// The names in `current/`: of the files that the agent put in place last.
    pub current: BTreeSet<DatabaseName>,
    /// The entries of `adopted/`.
    pub adopted: Vec<Entry>,
    /// What stands under the names that [`Planner::concerned`] returns. Nothing stands under a name
    /// that is missing here.
    pub there: BTreeMap<DatabaseName, There>,
}

impl Seen {
    fn there(&self, name: &DatabaseName) -> &There {
        const NOTHING: &There = &There {
            stands: Stands::Nothing,
            state: None,
            is_current: false,
            is_placed: false,
            is_kept: false,
        };
        self.there.get(name).unwrap_or(NOTHING)
    }
}

/// An entry of `adopted/`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Time of its last change, in nanoseconds: it is when the file was kept, unless somebody
    /// touched it later.
    pub changed: i128,
    /// Whether it is a directory.
    pub is_directory: bool,
}

/// What stands under a name in the database directory.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct There {
    /// The kind of file.
    pub stands: Stands,
    /// Its content; `None` if it cannot be read, and where [`Planner::candidates`] and
    /// [`Planner::is_touched`] say that the plan does not depend on it.
    pub state: Option<FileState>,
    /// Whether it is the same file as the one of this name in `current/`.
    pub is_current: bool,
    /// Whether it is the same file as the staged one for this name.
    pub is_placed: bool,
    /// Whether `current/` or `previous/` has the content of the installed set for this name. Only
    /// read where the file itself does not have this content.
    pub is_kept: bool,
}

/// The kind of file under a name.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Stands {
    /// The name is free.
    #[default]
    Nothing,
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link, a pipe or a device.
    Special,
}

impl Stands {
    /// Whether clamd may load it: clamd follows a link.
    fn is_loadable(self) -> bool {
        matches!(self, Self::File | Self::Special)
    }
}

/// The install numbers in canary and gate.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Numbers {
    /// Of the canary.
    pub canary: Option<InstallNumber>,
    /// Of the gate.
    pub gate: Option<InstallNumber>,
    /// Of both, if both are whole and of this host.
    pub whole: Option<InstallNumber>,
}

impl Numbers {
    /// Parses the content of the canary and the gate.
    pub fn parse(nonce: &Nonce, canary_text: &str, gate_text: &str) -> Self {
        let (canary_there, gate_there) = (canary_number(canary_text), gate_number(gate_text));
        let whole = canary_there.filter(|n| canary_text == canary(nonce, *n));
        Self {
            canary: canary_there,
            gate: gate_there,
            whole: whole.filter(|_| canary_there == gate_there),
        }
    }

    /// Above everything that was ever shown to clamd.
    pub fn next(&self, journal: Option<&Journal>, installed: Option<&Installed>) -> InstallNumber {
        let seen = [
            self.canary,
            self.gate,
            journal.map(|journal| journal.install),
            installed.map(|installed| installed.install),
        ];
        // GATE_SPAN numbers above it are written into the gate.
        let highest = InstallNumber(u64::MAX - 2 * GATE_SPAN);
        let seen = seen.into_iter().flatten().max().unwrap_or_default();
        seen.min(highest).next().expect("there are more above that")
    }

    /// Whether the gate that clamd has hides install `n`: only then is one proof enough.
    fn hides(&self, n: InstallNumber) -> bool {
        self.gate
            .is_some_and(|gate| (gate.0 + 1..=gate.0 + GATE_SPAN).contains(&n.0))
    }
}

/// The plan of an install.
#[derive(Clone, Debug)]
pub struct Survey {
    /// The journal that the install begins with.
    pub journal: Journal,
    /// Every file stands there already and nothing has to go: only the number would move.
    pub in_place: bool,
    /// The same but for signature files, and some of them differ from those of the installed set.
    pub resigned: bool,
}

/// No name is left in `adopted/` for one more file.
#[derive(Debug, thiserror::Error)]
pub enum NoPlace {
    /// All names that a file of this name may get are taken.
    #[error("{KEPT_MAX} of that name are kept there already; remove some")]
    Full(String),
    /// The next free name is longer than a file system allows.
    #[error("the next free name has more than {DATABASE_NAME_BYTES_MAX} bytes; remove some")]
    Long(String),
}

impl NoPlace {
    /// The name that a file was to be kept under.
    pub fn name(&self) -> &str {
        match self {
            Self::Full(name) | Self::Long(name) => name,
        }
    }
}

/// The part that a name plays in an install. Names alone decide it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Role {
    /// The set has a file of this name, with this digest.
    Placed(Digest),
    /// An earlier set owned the name, and the new one does not. This entry of `adopted/`, the newest
    /// of that name, comes back unless the host has put a newer file of its own there.
    Returns(String),
    /// The set has no file of this name. The agent's file goes, and so does a file of the host that
    /// the set has a successor for; any other stays.
    Leaves,
}

/// Makes the plan of one install.
#[derive(Clone, Debug)]
pub struct Planner<'s> {
    set: &'s Set,
    installed: Option<&'s Installed>,
    open: Option<&'s Journal>,
    earlier: Vec<&'s Manifest>,
    /// Names of the files of earlier sets.
    ours: BTreeSet<&'s DatabaseName>,
}

impl<'s> Planner<'s> {
    /// For a set that is staged, on a host that has `installed` and perhaps an install that is not
    /// ended.
    pub fn new(set: &'s Set, installed: Option<&'s Installed>, open: Option<&'s Journal>) -> Self {
        let earlier = earlier_sets(installed, open);
        let ours = earlier.iter().flat_map(|set| &set.files);
        let ours = ours.map(|file| &file.name).collect();
        Self {
            set,
            installed,
            open,
            earlier,
            ours,
        }
    }

    /// The names that the plan depends on, found by names and by the entries of `adopted/`. Files of
    /// others under any other name are neither read nor touched.
    pub fn concerned(&self, seen: &Seen) -> BTreeMap<DatabaseName, Role> {
        let target = &self.set.manifest;
        let placed = target.files.iter();
        let placed = placed.map(|file| (file.name.clone(), Role::Placed(file.sha256)));
        let mut roles: BTreeMap<_, _> = placed.collect();
        for (name, kept) in kept_by_name(&seen.adopted) {
            let newest = kept.first().copied();
            if let Some(newest) = newest.filter(|_| self.returns(&name, seen)) {
                roles.insert(name, Role::Returns(newest.to_owned()));
            }
        }
        for name in seen.names.iter().filter_map(|name| name.parse().ok()) {
            if !roles.contains_key(&name)
                && (self.ours.contains(&name)
                    || seen.current.contains(&name)
                    || is_owned(target, &name))
            {
                roles.insert(name, Role::Leaves);
            }
        }
        roles
    }

    /// The contents that the file under a name is compared with. The file is read for it only if it
    /// has the length of one of them. [`There::state`] may still be missing.
    pub fn candidates(&self, name: &DatabaseName, role: &Role, there: &There) -> Vec<FileState> {
        let sets: &[&Manifest] = match (role, self.installed) {
            (Role::Returns(_), _) if may_be_newer(there) => &self.earlier,
            (_, Some(installed)) => &[&installed.set.manifest],
            (_, None) => &[],
        };
        let files = sets.iter().filter_map(|set| set.file(name));
        files.map(FileState::from).collect()
    }

    /// Whether the install changes the name, and so needs a way back. Then the content must be known
    /// unless the content of the installed set is kept. [`There::state`] may be missing if the file
    /// has none of the [`Planner::candidates`].
    pub fn is_touched(&self, name: &DatabaseName, role: &Role, there: &There) -> bool {
        match role {
            Role::Placed(_) => true,
            Role::Returns(_) => !self.is_newer(name, there),
            Role::Leaves => {
                there.stands.is_loadable()
                    && (self.is_agents(name, there) || is_owned(&self.set.manifest, name))
            }
        }
    }

    /// The file of the installed set.
    pub fn installed_file(&self, name: &DatabaseName) -> Option<FileState> {
        let file = self.installed?.set.manifest.file(name);
        file.map(FileState::from)
    }

    /// Compares the directory with the set.
    ///
    /// # Errors
    ///
    /// If `adopted/` has no room for another file of one name.
    pub fn plan(&self, seen: &Seen) -> Result<Survey, NoPlace> {
        let install = seen.numbers.next(self.open, self.installed);
        let files = self.set.files();
        let obsolete = self.obsolete(seen)?;

        let mut adopt = Vec::new();
        let (mut in_place, mut databases_in_place) = (true, true);
        for file in &files {
            let there = seen.there(&file.name);
            let is_placed = there.stands.is_loadable() && there.is_placed;
            in_place &= is_placed;
            databases_in_place &= is_placed || file.name.kind() == DatabaseKind::Sign;
            if self.is_adopted(file, there) {
                adopt.push(file.name.clone());
            }
        }
        let (mut restore, mut withdraw, mut later) = (Vec::new(), Vec::new(), Vec::new());
        for (name, role) in self.concerned(seen) {
            let there = seen.there(&name);
            let is_touched = self.is_touched(&name, &role, there);
            match role {
                Role::Placed(_) => {}
                Role::Returns(kept) if is_touched => restore.push(Moved { name, kept }),
                Role::Returns(_) => {
                    tracing::warn!(%name, "the host has a newer file of its own, the adopted one stays kept");
                }
                Role::Leaves if !is_touched => {}
                Role::Leaves if !self.is_agents(&name, there) => {
                    adopt.push(name.clone());
                    withdraw.push(name);
                }
                Role::Leaves => match self.may_stay_till_the_proof(&name, there) {
                    true => later.push(name),
                    false => withdraw.push(name),
                },
            }
        }
        let is_shown = self
            .installed
            .is_some_and(|installed| seen.numbers.whole == Some(installed.install));
        in_place &= withdraw.is_empty() && later.is_empty() && restore.is_empty() && is_shown;
        let same_databases = self
            .installed
            .is_some_and(|installed| databases_of(&installed.set).eq(databases_of(self.set)));
        let only_signatures_go = later.iter().all(|it| it.kind() == DatabaseKind::Sign);
        let mut resigned = databases_in_place && same_databases && only_signatures_go && is_shown;
        // Nothing of the host's own comes, goes or is replaced.
        resigned &= withdraw.is_empty() && restore.is_empty();
        resigned &= adopt.is_empty() && obsolete.is_empty() && !in_place;

        let placed: BTreeSet<_> = files.iter().map(|file| &file.name).collect();
        let restored = restore.iter().map(|restored| &restored.name);
        let touched = placed.into_iter().chain(&withdraw).chain(&later);
        let before = self.before(seen, touched.chain(restored))?;
        // What is moved need not be linked.
        let linked: HashSet<_> = before.files.iter().map(|old| &old.name).collect();
        adopt.retain(|name| linked.contains(name));
        resigned &= before.moved.is_empty();
        // Names may have gone before a proof that is still to come.
        let unproven = self.open.is_some_and(|open| open.pass < open.passes);
        let sure = withdraw.is_empty() && !unproven && seen.numbers.hides(install);
        Ok(Survey {
            journal: Journal {
                set: self.set.clone(),
                install,
                pass: 1,
                passes: if sure { 1 } else { 2 },
                way: Way::Forward,
                step: Step::Swapping,
                touched: false,
                whole: false,
                control: false,
                files,
                before,
                obsolete,
                adopt,
                restore,
                withdraw,
                later,
            },
            in_place,
            resigned,
        })
    }

    fn was_owned(&self, name: &DatabaseName, seen: &Seen) -> bool {
        self.earlier.iter().any(|set| is_owned(set, name)) || is_among(seen.current.iter(), name)
    }

    /// Whether adopted files of this name are the host's again.
    fn returns(&self, name: &DatabaseName, seen: &Seen) -> bool {
        !is_owned(&self.set.manifest, name) && self.was_owned(name, seen)
    }

    /// Whether the agent put the file there, damaged or not. After the loss of the state directory
    /// its link in `current/` tells.
    fn is_agents(&self, name: &DatabaseName, there: &There) -> bool {
        self.ours.contains(name) || there.is_current
    }

    /// Whether a file that is not of an earlier set stands under a name that such a set owned.
    fn is_newer(&self, name: &DatabaseName, there: &There) -> bool {
        let is_there = |file: &ManifestFile| there.state == Some(FileState::from(file));
        let mut earlier = self.earlier.iter().filter_map(|set| set.file(name));
        may_be_newer(there) && !earlier.any(is_there)
    }

    /// Whether a file of the host is kept when this file of the set takes its name. A loose file with
    /// the published bytes is kept too: the fleet may withdraw the name. A container with the
    /// published bytes is not, because its publisher replaces it daily.
    fn is_adopted(&self, file: &FileState, there: &There) -> bool {
        let is_published = there.is_placed || there.state.as_ref() == Some(file);
        there.stands.is_loadable()
            && !self.is_agents(&file.name, there)
            && (!is_published || file.name.kind() == DatabaseKind::Loose)
    }

    /// An old form that clamd ranks below the new one, and that is known to be whole, does no harm
    /// beside it. Removed before the proof it could: a load that had listed the directory before
    /// the new name came would find neither. Detached signatures are not loaded at all.
    fn may_stay_till_the_proof(&self, name: &DatabaseName, there: &There) -> bool {
        if name.kind() == DatabaseKind::Sign {
            return true;
        }
        // A set that waits for clamd may still have the old forms of the one before it beside it.
        let waiting = self.open.and_then(|open| open.before.installed.as_ref());
        let mut known = self.installed.into_iter().chain(waiting);
        let old = known.find_map(|known| known.set.manifest.file(name));
        let form = name.other_form();
        let new = form.and_then(|form| self.set.manifest.file(&form));
        let (Some(old), Some(new)) = (old, new) else {
            return false;
        };
        let version = |file: &ManifestFile| file.container.as_ref().map(|facts| facts.version);
        version(old).is_some()
            && version(old) < version(new)
            // A damaged one makes the whole load fail, outranked or not.
            && there.state == Some(FileState::from(old))
    }

    /// Files in `adopted/` that no set restores any more. Before this set no set owned their names,
    /// and so the file that the host has there now, or that none is there, is newer.
    fn obsolete(&self, seen: &Seen) -> Result<Vec<PutAside>, NoPlace> {
        let entries = seen.adopted.iter().map(|entry| entry.name.clone());
        let entries: BTreeSet<_> = entries.collect();
        let mut obsolete = Vec::new();
        for (name, kept) in kept_by_name(&seen.adopted) {
            if !is_owned(&self.set.manifest, &name) || self.was_owned(&name, seen) {
                continue;
            }
            for kept in kept {
                let aside = free_place(&entries, &format!("{kept}.{OBSOLETE}"))?;
                let kept = kept.to_owned();
                obsolete.push(PutAside { kept, aside });
            }
        }
        Ok(obsolete)
    }

    /// What stands under these names: the content that belongs there where the host still has it,
    /// else what really is there. What cannot be read is to be moved.
    fn before<'n>(
        &self,
        seen: &Seen,
        names: impl Iterator<Item = &'n DatabaseName>,
    ) -> Result<Before, NoPlace> {
        let entries = seen.adopted.iter().map(|entry| entry.name.clone());
        let entries: BTreeSet<_> = entries.collect();
        let (mut files, mut moved) = (Vec::new(), Vec::new());
        for name in names {
            let there = seen.there(name);
            let good = self.installed_file(name);
            let good = good.filter(|good| there.is_kept || there.state.as_ref() == Some(good));
            match good.or_else(|| there.state.clone()) {
                Some(found) => files.push(found),
                None if there.stands.is_loadable() => moved.push(Moved {
                    name: name.clone(),
                    kept: free_place(&entries, name.as_str())?,
                }),
                None => {}
            }
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Before {
            installed: self.installed.cloned(),
            files,
            moved,
            others: self.has_others(&seen.names),
        })
    }

    /// Whether clamd finds databases here that are neither this set's nor from an earlier install.
    fn has_others(&self, names: &[String]) -> bool {
        let targets = self.set.manifest.files.iter().map(|file| &file.name);
        let known = targets.chain(self.ours.iter().copied());
        let known = known.map(DatabaseName::as_str).chain([CANARY, GATE]);
        let known: HashSet<_> = known.collect();
        let mut names = names.iter().map(String::as_str);
        names.any(|name| looks_like_a_database(name) && !known.contains(name))
    }
}

/// Whether the host may have put a file of its own there: it is not the agent's, by its inode.
fn may_be_newer(there: &There) -> bool {
    there.stands == Stands::File && !there.is_current
}

/// The files of a set that clamd loads, sorted by name.
fn databases_of(set: &Set) -> impl Iterator<Item = FileState> {
    let files = set.files().into_iter();
    files.filter(|file| file.name.kind() != DatabaseKind::Sign)
}

/// The files in `adopted/` by the names that they had, the one that was kept last first.
pub(super) fn kept_by_name(adopted: &[Entry]) -> BTreeMap<DatabaseName, Vec<&str>> {
    // A directory that stood in the place of a database is no file to restore.
    let mut files: Vec<_> = adopted.iter().filter(|it| !it.is_directory).collect();
    files.sort_by(|a, b| (b.changed, &b.name).cmp(&(a.changed, &a.name)));
    let mut kept = BTreeMap::<_, Vec<_>>::new();
    for Entry { name, .. } in files {
        if let Some(original) = original(name) {
            kept.entry(original).or_default().push(name.as_str());
        }
    }
    kept
}

/// The name that a file in `adopted/` had: `local.ign2` for `local.ign2` and `local.ign2-2`.
pub(super) fn original(entry: &str) -> Option<DatabaseName> {
    let numbered = entry
        .rsplit_once('-')
        .filter(|(name, number)| name.contains('.') && number.parse::<u32>().is_ok_and(|n| n >= 2));
    numbered.map_or(entry, |(name, _)| name).parse().ok()
}

/// The names in `adopted/` that a file of this name may get, in order.
fn places(name: &str) -> impl Iterator<Item = String> {
    let numbered = (2..=KEPT_MAX).map(move |n| format!("{name}-{n}"));
    std::iter::once(name.to_owned()).chain(numbered)
}

/// The entries of `adopted/` that may be files of this name.
pub(super) fn taken_places(entries: &BTreeSet<String>, name: &str) -> impl Iterator<Item = String> {
    places(name).take_while(|place| entries.contains(place))
}

/// This name, or the first one after it that no entry of `adopted/` has.
pub(super) fn free_place(entries: &BTreeSet<String>, name: &str) -> Result<String, NoPlace> {
    let free = places(name).find(|place| !entries.contains(place));
    let free = free.ok_or_else(|| NoPlace::Full(name.to_owned()))?;
    match free.len() <= DATABASE_NAME_BYTES_MAX {
        true => Ok(free),
        false => Err(NoPlace::Long(name.to_owned())),
    }
}

/// Whether a set owns this name: it has a file of it, or a successor for one.
pub(super) fn is_owned(manifest: &Manifest, name: &DatabaseName) -> bool {
    is_among(manifest.files.iter().map(|file| &file.name), name)
}

/// The same of the names of a set. The successor of a container is its other form, and that of a
/// detached signature is any version of the database that it belongs to.
fn is_among<'n>(mut names: impl Iterator<Item = &'n DatabaseName>, name: &DatabaseName) -> bool {
    let form = name.other_form();
    let signed = (name.kind() == DatabaseKind::Sign).then(|| name.database_base());
    names.any(|owned| {
        owned == name
            || form.as_ref() == Some(owned)
            || signed.is_some_and(|base| base == owned.database_base())
    })
}

/// The manifests of the sets before a new one, proven or not.
pub(super) fn earlier_sets<'s>(
    installed: Option<&'s Installed>,
    open: Option<&'s Journal>,
) -> Vec<&'s Manifest> {
    let open_set = open.map(|journal| &*journal.set.manifest);
    let before = open.and_then(|journal| journal.before.installed.as_ref());
    let installed = installed.into_iter().chain(before);
    let installed = installed.map(|installed| &*installed.set.manifest);
    installed.chain(open_set).collect()
}
