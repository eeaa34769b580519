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

    /// The names in `adopted/`.
    fn entries(&self) -> BTreeSet<String> {
        let entries = self.adopted.iter();
        entries.map(|entry| entry.name.clone()).collect()
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
        let entries = seen.entries();
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
        let entries = seen.entries();
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

#[cfg(test)]
mod tests {
    use clamcast_proto::receipt::Outcome;

    use super::super::lab::{files, manifest};
    use super::*;

    /// What a scenario line says.
    #[derive(Default)]
    struct Scenario {
        set: Option<Set>,
        installed: Option<Installed>,
        open: Option<Journal>,
        seen: Seen,
    }

    fn state((name, _, content): (String, Option<u64>, String)) -> FileState {
        FileState {
            name: name.parse().unwrap(),
            size: content.len() as u64,
            sha256: Digest::of(content.as_bytes()),
        }
    }

    fn installed(line: &str) -> Installed {
        Installed {
            set: Set::from(&manifest(1, line)),
            install: InstallNumber(1),
            outcome: Outcome::Live,
        }
    }

    impl Scenario {
        /// Sections, each a word and what it is about:
        ///
        /// - `set FILES`: the new set;
        /// - `installed FILES`: the installed set, whole and shown to clamd as install 1;
        /// - `linked FILES`: files of the agent, known by their links in `current/`;
        /// - `there FILES`: files of the host, instead of what the sections before say. `NAME?`
        ///   cannot be read, `NAME/` is a directory, `NAME*` is a link, `NAME-` does not exist;
        /// - `damaged FILES`: what somebody has written into files of the agent;
        /// - `lost NAMES`: `current/` and `previous/` do not have the installed content any more;
        /// - `adopted NAMES`: entries of `adopted/`, as `NAME@TIME`;
        /// - `open P/N FILES`: an install of this set, at proof P of N;
        /// - `before FILES`: the set that was installed before the open one;
        /// - `hidden`: canary and gate are missing.
        fn new(line: &str) -> Self {
            let mut scenario = Self::default();
            for section in line.split('|') {
                let (word, rest) = section
                    .trim()
                    .split_once(' ')
                    .unwrap_or((section.trim(), ""));
                scenario.add(word, rest);
            }
            scenario.finish();
            scenario
        }

        fn add(&mut self, word: &str, rest: &str) {
            match word {
                "set" => self.set = Some(Set::from(&manifest(3, rest))),
                "installed" => {
                    self.installed = Some(installed(rest));
                    let shown = Some(InstallNumber(1));
                    self.seen.numbers = Numbers {
                        canary: shown,
                        gate: shown,
                        whole: shown,
                    };
                    self.link(rest);
                }
                "linked" => self.link(rest),
                "damaged" => {
                    for file in files(rest).into_iter().map(state) {
                        self.there(&file.name).state = Some(file.clone());
                    }
                }
                "there" => rest.split_whitespace().for_each(|word| self.put(word)),
                "lost" => {
                    for name in rest.split_whitespace() {
                        self.there(&name.parse().unwrap()).is_kept = false;
                    }
                }
                "adopted" => {
                    for word in rest.split_whitespace() {
                        let (name, time) = word.split_once('@').unwrap();
                        self.seen.adopted.push(Entry {
                            name: name.trim_end_matches('/').to_owned(),
                            changed: time.parse().unwrap(),
                            is_directory: name.ends_with('/'),
                        });
                    }
                }
                "open" => {
                    let (proofs, line) = rest.split_once(' ').unwrap();
                    let (pass, passes) = proofs.split_once('/').unwrap();
                    let set = Set::from(&manifest(2, line));
                    let planner = Planner::new(&set, self.installed.as_ref(), None);
                    let survey = planner.plan(&Seen::default()).unwrap();
                    self.open = Some(Journal {
                        pass: pass.parse().unwrap(),
                        passes: passes.parse().unwrap(),
                        step: Step::Waiting,
                        ..survey.journal
                    });
                }
                "before" => {
                    let open = self.open.as_mut().unwrap();
                    open.before.installed = Some(installed(rest));
                }
                "hidden" => self.seen.numbers = Numbers::default(),
                _ => panic!("no such section: {word}"),
            }
        }

        fn there(&mut self, name: &DatabaseName) -> &mut There {
            self.seen.there.entry(name.clone()).or_default()
        }

        fn link(&mut self, line: &str) {
            for file in files(line).into_iter().map(state) {
                self.seen.current.insert(file.name.clone());
                *self.there(&file.name) = There {
                    stands: Stands::File,
                    state: Some(file.clone()),
                    is_current: true,
                    is_kept: true,
                    ..There::default()
                };
            }
        }

        fn put(&mut self, word: &str) {
            let (name, stands) = match word.chars().last().unwrap() {
                '?' => (word.trim_end_matches('?'), Stands::File),
                '/' => (word.trim_end_matches('/'), Stands::Directory),
                '*' => (word.trim_end_matches('*'), Stands::Special),
                '-' => (word.trim_end_matches('-'), Stands::Nothing),
                _ => (word.split_once('=').unwrap().0, Stands::File),
            };
            let file = word.contains('=').then(|| state(files(word).remove(0)));
            let there = self.there(&name.parse().unwrap());
            *there = There {
                stands,
                state: file,
                is_kept: there.is_kept,
                ..There::default()
            };
        }

        /// Names every file, and knows the agent's own files with the new content as the staged ones.
        fn finish(&mut self) {
            let set = &self.set.as_ref().unwrap().manifest;
            for (name, there) in &mut self.seen.there {
                let new = set.file(name).map(FileState::from);
                there.is_placed = there.is_current && new.is_some() && there.state == new;
                if there.stands != Stands::Nothing {
                    self.seen.names.push(name.to_string());
                }
            }
        }

        fn planner(&self) -> Planner<'_> {
            let set = self.set.as_ref().unwrap();
            Planner::new(set, self.installed.as_ref(), self.open.as_ref())
        }

        fn plan(&self) -> Result<Survey, NoPlace> {
            self.planner().plan(&self.seen)
        }
    }

    /// Everything that a plan does beyond placing the files of the set.
    fn shown(
        Survey {
            journal,
            in_place,
            resigned,
        }: &Survey,
    ) -> String {
        let mut shown = Vec::new();
        let mut show = |word: &str, items: Vec<String>| {
            if !items.is_empty() {
                shown.push(format!("{word} {}", items.join(" ")));
            }
        };
        let names = |names: &[DatabaseName]| names.iter().map(ToString::to_string).collect();
        let moved = |moved: &Moved| format!("{}>{}", moved.name, moved.kept);
        let restored = |moved: &Moved| format!("{}<{}", moved.name, moved.kept);
        let aside = |it: &PutAside| format!("{}>{}", it.kept, it.aside);
        show("adopt", names(&journal.adopt));
        show("withdraw", names(&journal.withdraw));
        show("later", names(&journal.later));
        show("restore", journal.restore.iter().map(restored).collect());
        show("aside", journal.obsolete.iter().map(aside).collect());
        show("move", journal.before.moved.iter().map(moved).collect());
        show("proofs", vec![journal.passes.to_string()]);
        let flags = [(*in_place, "in place"), (*resigned, "signatures only")];
        let flags = flags.into_iter().filter(|(is_set, _)| *is_set);
        shown.extend(flags.map(|(_, word)| word.to_owned()));
        shown.join(" | ")
    }

    #[track_caller]
    fn check(scenario: &str, plan: &str) {
        let survey = Scenario::new(scenario).plan().unwrap();
        assert_eq!(shown(&survey), plan, "{scenario}");
    }

    /// The files that the way back puts in place.
    #[track_caller]
    fn check_back(scenario: &str, back: &str) {
        let survey = Scenario::new(scenario).plan().unwrap();
        let back: Vec<_> = files(back).into_iter().map(state).collect();
        assert_eq!(survey.journal.before.files, back, "{scenario}");
    }

    #[test]
    fn the_installed_set_is_in_place_while_clamd_is_shown_its_number() {
        let same = "installed a.ndb=a b.ndb=b | set a.ndb=a b.ndb=b";
        check(same, "proofs 1 | in place");
        check(&format!("{same} | hidden"), "proofs 2");
        check(&format!("{same} | there b.ndb-"), "proofs 1");
        check(&format!("{same} | there b.ndb/"), "proofs 1");
        check(&format!("{same} | damaged b.ndb=x"), "proofs 1");
        check("installed a.ndb=a | set a.ndb=b", "proofs 1");
        check("set a.ndb=a", "proofs 2");
    }

    #[test]
    fn a_set_with_other_signature_files_alone_is_recognised() {
        let old = "installed d-1.cvd.sign=s d.cvd@1=one";
        let later = "later d-1.cvd.sign | proofs 1";
        let again = "proofs 1 | signatures only";
        check(&format!("{old} | set d-1.cvd.sign=t d.cvd@1=one"), again);
        check(
            &format!("{old} | set d.cvd@1=one"),
            &format!("{later} | signatures only"),
        );
        let renamed = format!("{old} | set d-2.cvd.sign=t d.cvd@1=one");
        check(&renamed, &format!("{later} | signatures only"));
        check(
            &format!("{renamed} | hidden"),
            "later d-1.cvd.sign | proofs 2",
        );
        check(&format!("{renamed} | there d.cvd=own"), later);
        check(
            &format!("{old} | set d-1.cvd.sign=t d.cvd@2=two"),
            "proofs 1",
        );
    }

    #[test]
    fn a_set_that_takes_a_signature_file_of_the_host_is_an_ordinary_install() {
        let new = "installed d.cvd@1=one | set d-1.cvd.sign=s d.cvd@1=one";
        check(new, "proofs 1 | signatures only");
        check(
            &format!("{new} | there d-1.cvd.sign=own"),
            "adopt d-1.cvd.sign | proofs 1",
        );
        check(
            &format!("{new} | there d-1.cvd.sign?"),
            "move d-1.cvd.sign>d-1.cvd.sign | proofs 1",
        );
    }

    #[test]
    fn a_whole_old_form_that_is_outranked_stays_until_the_proof() {
        let stays = "later d.cvd | proofs 1";
        let goes = "withdraw d.cvd | proofs 2";
        check("installed d.cvd@1=one | set d.cld@2=two", stays);
        check("installed d.cvd@2=one | set d.cld@2=two", goes);
        check("installed d.cvd@3=one | set d.cld@2=two", goes);
        check("installed d.cvd=one | set d.cld@2=two", goes);
        check(
            "installed d.cvd@1=one | damaged d.cvd=x | set d.cld@2=two",
            goes,
        );
        check(
            "installed d.cvd@1=one | there d.cvd? | set d.cld@2=two",
            goes,
        );
        check("installed d.cvd@1=one | set main.cvd@1=main", goes);
    }

    #[test]
    fn an_old_form_beside_a_set_that_waits_for_clamd_stays_until_the_proof() {
        let waits = "installed d.cld@2=two | open 1/1 d.cld@2=two | before d.cvd@1=one";
        let stays = "later d.cvd | proofs 1";
        check(
            &format!("{waits} | linked d.cvd=one | set d.cld@3=three"),
            stays,
        );
        let damaged = format!("{waits} | linked d.cvd=x | set d.cld@3=three");
        check(&damaged, "withdraw d.cvd | proofs 2");
    }

    #[test]
    fn a_withdrawn_name_goes_before_the_proof() {
        let old = "installed a.ndb=a b.ndb=b";
        check(&format!("{old} | set a.ndb=a"), "withdraw b.ndb | proofs 2");
        check(
            &format!("{old} | there b.ndb- | set a.ndb=a"),
            "proofs 1 | in place",
        );
        check(
            &format!("{old} | there b.ndb/ | set a.ndb=a"),
            "proofs 1 | in place",
        );
        check(
            &format!("{old} | there b.ndb=own | set a.ndb=a"),
            "withdraw b.ndb | proofs 2",
        );
    }

    #[test]
    fn a_file_of_the_host_under_a_name_of_the_set_is_adopted() {
        check("there a.ndb=own | set a.ndb=a", "adopt a.ndb | proofs 2");
        check(
            "there d.cvd=own | set d.cvd@1=one",
            "adopt d.cvd | proofs 2",
        );
        check("there a.ndb=own | set b.ndb=b", "proofs 2");
        check(
            "installed a.ndb=a | there a.ndb=own | set a.ndb=b",
            "proofs 1",
        );
        check("there a.ndb/ | set a.ndb=a", "proofs 2");
    }

    #[test]
    fn the_published_bytes_are_adopted_in_a_loose_file_but_not_in_a_container() {
        check("there a.ndb=a | set a.ndb=a", "adopt a.ndb | proofs 2");
        check("there d.cvd=one | set d.cvd@1=one", "proofs 2");
        check("there d-1.cvd.sign=s | set d-1.cvd.sign=s", "proofs 2");
    }

    #[test]
    fn a_file_of_the_host_that_the_set_succeeds_is_adopted_and_goes() {
        let gone = "adopt d.cvd | withdraw d.cvd | proofs 2";
        check("there d.cvd=own | set d.cld@1=one", gone);
        check("there d.cud=own | set d.cld@1=one", "proofs 2");
        let sign = "adopt d-1.cvd.sign | withdraw d-1.cvd.sign | proofs 2";
        check("there d-1.cvd.sign=own | set d.cld@1=one", sign);
        check("there d-1.cvd.sign=own | set e.cld@1=one", "proofs 2");
    }

    #[test]
    fn an_adopted_file_returns_when_its_name_is_withdrawn() {
        let withdrawn = "installed a.ndb=a local.ign2=f | set a.ndb=a";
        let newest = |entries: &str, kept: &str| {
            check(
                &format!("{withdrawn} | adopted {entries}"),
                &format!("restore local.ign2<{kept} | proofs 1"),
            );
        };
        newest("local.ign2@1", "local.ign2");
        newest("local.ign2@1 local.ign2-2@2 local.ign2-3@0", "local.ign2-2");
        newest("local.ign2@2 local.ign2-2@1", "local.ign2");
        newest("local.ign2@1 local.ign2-2@1", "local.ign2-2");
        newest(
            "local.ign2@1 local.ign2-2/@2 local.ign2.directory@3",
            "local.ign2",
        );
        newest("local.ign2@1 | there local.ign2-", "local.ign2");
        newest("local.ign2@1 | damaged local.ign2=x", "local.ign2");
        newest("local.ign2@1 | there local.ign2=f", "local.ign2");
        newest("local.ign2@1 | there local.ign2*", "local.ign2");
        check(
            "installed d.cld@1=one | adopted d.cvd@1 | set main.cvd@1=main",
            "withdraw d.cld | restore d.cvd<d.cvd | proofs 2",
        );
    }

    #[test]
    fn a_newer_file_of_the_host_stays_and_the_adopted_one_stays_kept() {
        let withdrawn = "installed a.ndb=a local.ign2=f | adopted local.ign2@1 | set a.ndb=a";
        check(
            &format!("{withdrawn} | there local.ign2=own"),
            "proofs 1 | in place",
        );
        check(
            &format!("{withdrawn} | there local.ign2?"),
            "proofs 1 | in place",
        );
        check_back(&format!("{withdrawn} | there local.ign2=own"), "a.ndb=a");
    }

    #[test]
    fn an_adopted_file_stays_kept_while_the_name_is_owned_and_while_it_never_was() {
        let adopted = "adopted local.ign2@1 d.cvd@1";
        check(
            &format!(
                "installed d.cld@1=one local.ign2=f | {adopted} | set d.cvd@2=two local.ign2=g"
            ),
            "later d.cld | proofs 1",
        );
        check(
            &format!("installed a.ndb=a | {adopted} | set a.ndb=b"),
            "proofs 1",
        );
    }

    #[test]
    fn adopted_files_of_a_name_that_no_earlier_set_owned_are_put_aside() {
        let new = "installed a.ndb=a | set a.ndb=a local.ign2=f";
        check(
            &format!("{new} | adopted local.ign2@1 local.ign2-2@2 local.ign2.obsolete@0"),
            "aside local.ign2-2>local.ign2-2.obsolete local.ign2>local.ign2.obsolete-2 | proofs 1",
        );
        check(
            &format!("{new} | there local.ign2=own | adopted local.ign2@1"),
            "adopt local.ign2 | aside local.ign2>local.ign2.obsolete | proofs 1",
        );
    }

    #[test]
    fn a_file_that_cannot_be_read_is_moved() {
        check("there a.ndb? | set a.ndb=a", "move a.ndb>a.ndb | proofs 2");
        check("there a.ndb* | set a.ndb=a", "move a.ndb>a.ndb | proofs 2");
        check(
            "there d.cvd? | set d.cld@1=one",
            "withdraw d.cvd | move d.cvd>d.cvd | proofs 2",
        );
        check(
            "there a.ndb? | adopted a.ndb@1 | set a.ndb=a",
            "aside a.ndb>a.ndb.obsolete | move a.ndb>a.ndb-2 | proofs 2",
        );
        let installed = "installed a.ndb=a | there a.ndb? | set a.ndb=b";
        check(installed, "proofs 1");
        check_back(installed, "a.ndb=a");
        check(
            &format!("{installed} | lost a.ndb"),
            "move a.ndb>a.ndb | proofs 1",
        );
    }

    #[test]
    fn the_way_back_leads_to_the_installed_content_or_else_to_what_is_there() {
        let update = "installed a.ndb=a b.ndb=b | set a.ndb=c b.ndb=b";
        check_back(update, "a.ndb=a b.ndb=b");
        check_back(&format!("{update} | damaged a.ndb=x"), "a.ndb=a b.ndb=b");
        check_back(
            &format!("{update} | damaged a.ndb=x | lost a.ndb"),
            "a.ndb=x b.ndb=b",
        );
        check_back(&format!("{update} | there a.ndb-"), "a.ndb=a b.ndb=b");
        check_back(&format!("{update} | there a.ndb/ | lost a.ndb"), "b.ndb=b");
        check_back(
            "there a.ndb=own d.cvd=own other.ndb=x | set a.ndb=a d.cld@1=one",
            "a.ndb=own d.cvd=own",
        );
    }

    #[test]
    fn more_files_of_one_name_than_fit_are_an_error() {
        let places: Vec<_> = places("a.ndb").map(|place| format!("{place}@1")).collect();
        assert_eq!(places.len(), KEPT_MAX as usize);
        let lost = "installed a.ndb=a | there a.ndb? | lost a.ndb | set a.ndb=b";
        let full = Scenario::new(&format!("{lost} | adopted {}", places.join(" ")));
        let error = full.plan().unwrap_err();
        assert_eq!(error.name(), "a.ndb");
        let message = "100 of that name are kept there already; remove some";
        assert_eq!(error.to_string(), message);
        let last = places[..places.len() - 1].join(" ");
        let move_last = "move a.ndb>a.ndb-100 | proofs 1";
        check(&format!("{lost} | adopted {last}"), move_last);
    }

    #[test]
    fn a_name_that_would_be_too_long_is_an_error_before_anything_is_touched() {
        let name = format!("{}.ndb", "a".repeat(DATABASE_NAME_BYTES_MAX - 4));
        let lost = format!("installed {name}=a | there {name}? | lost {name} | set {name}=b");
        check(&lost, &format!("move {name}>{name} | proofs 1"));
        let error = Scenario::new(&format!("{lost} | adopted {name}@1")).plan();
        assert!(matches!(error, Err(NoPlace::Long(long)) if long == name));
    }

    #[test]
    fn without_the_state_directory_the_agents_files_are_known_by_their_links() {
        let linked = "linked a.ndb=a b.ndb=b";
        check(&format!("{linked} | set a.ndb=a b.ndb=b"), "proofs 2");
        check(
            &format!("{linked} | set a.ndb=c"),
            "withdraw b.ndb | proofs 2",
        );
        check(
            &format!("{linked} | damaged a.ndb=x | set a.ndb=c b.ndb=b"),
            "proofs 2",
        );
        check(
            &format!("{linked} | there b.ndb=own | set a.ndb=c"),
            "proofs 2",
        );
        check(
            &format!("{linked} | there a.ndb=own | set a.ndb=c b.ndb=b"),
            "adopt a.ndb | proofs 2",
        );
        check(
            &format!("{linked} | adopted b.ndb@1 | set a.ndb=c"),
            "restore b.ndb<b.ndb | proofs 2",
        );
        check(
            "linked d.cvd=one | set d.cld@2=two",
            "withdraw d.cvd | proofs 2",
        );
    }

    #[test]
    fn one_proof_is_enough_only_if_the_gate_hides_the_number_and_no_name_is_missing() {
        check("installed a.ndb=a | set a.ndb=b", "proofs 1");
        check("installed a.ndb=a | hidden | set a.ndb=b", "proofs 2");
        check(
            "installed a.ndb=a b.ndb=b | set a.ndb=b",
            "withdraw b.ndb | proofs 2",
        );
        check(
            "installed a.ndb=a | open 1/2 a.ndb=b | set a.ndb=c",
            "proofs 2",
        );
        check(
            "installed a.ndb=a | open 2/2 a.ndb=b | set a.ndb=c",
            "proofs 1",
        );
        check(
            "installed a.ndb=a | open 1/1 a.ndb=b | set a.ndb=c",
            "proofs 1",
        );
    }

    #[test]
    fn databases_of_others_are_neither_concerned_nor_planned_for() {
        let others = "installed a.ndb=a | there other.ndb=x d.cud=x | set a.ndb=b d.cld@1=one";
        let scenario = Scenario::new(others);
        let names = scenario.planner().concerned(&scenario.seen).into_keys();
        let names: Vec<_> = names.map(String::from).collect();
        assert_eq!(names, ["a.ndb", "d.cld"]);
        let has_others = |scenario: &str| {
            let survey = Scenario::new(scenario).plan().unwrap();
            survey.journal.before.others
        };
        assert!(has_others(others));
        assert!(!has_others("installed a.ndb=a | set b.ndb=b"));
        assert!(!has_others("there a.ndb=own README.txt=x | set a.ndb=a"));
        assert!(has_others("there a.ndb=own | set b.ndb=b"));
    }

    #[test]
    fn a_newer_file_of_the_host_is_read_only_to_compare_it_with_earlier_sets() {
        let withdrawn = "installed a.ndb=a local.ign2=f | adopted local.ign2@1 | set a.ndb=a";
        let scenario = Scenario::new(&format!("{withdrawn} | there local.ign2=own"));
        let (planner, name) = (scenario.planner(), "local.ign2".parse().unwrap());
        let role = Role::Returns("local.ign2".into());
        let unread = There {
            stands: Stands::File,
            ..There::default()
        };
        let candidates = planner.candidates(&name, &role, &unread);
        assert_eq!(candidates, [state(files("local.ign2=f").remove(0))]);
        assert!(!planner.is_touched(&name, &role, &unread));
        let fleets = There {
            state: Some(candidates[0].clone()),
            ..unread
        };
        assert!(planner.is_touched(&name, &role, &fleets));
    }

    #[test]
    fn a_file_that_was_not_read_because_its_length_differs_changes_no_plan() {
        for line in [
            "installed a.ndb=a b.ndb=b | there a.ndb=long | set a.ndb=new b.ndb=b",
            "installed a.ndb=a d.cvd@1=one | there d.cvd=longer | set a.ndb=a d.cld@2=two",
            "installed a.ndb=a local.ign2=f | adopted local.ign2@1 | there local.ign2=own | set a.ndb=a",
        ] {
            let mut scenario = Scenario::new(line);
            let read = scenario.plan().unwrap();
            for there in scenario.seen.there.values_mut() {
                there.state = there.state.take().filter(|_| there.is_current);
            }
            let unread = scenario.plan().unwrap();
            assert_eq!(unread.journal, read.journal);
        }
    }

    #[test]
    fn the_next_number_is_above_all_that_were_shown_and_below_the_end() {
        let number = |n| Some(InstallNumber(n));
        let mut numbers = Numbers {
            canary: number(7),
            gate: number(9),
            whole: None,
        };
        assert_eq!(numbers.next(None, None), InstallNumber(10));
        let mut installed = installed("a.ndb=a");
        installed.install = InstallNumber(11);
        assert_eq!(numbers.next(None, Some(&installed)), InstallNumber(12));
        assert!(!numbers.hides(InstallNumber(9)));
        assert!(numbers.hides(InstallNumber(10)));
        assert!(numbers.hides(InstallNumber(9 + GATE_SPAN)));
        assert!(!numbers.hides(InstallNumber(10 + GATE_SPAN)));
        numbers.canary = number(u64::MAX);
        assert!(numbers.next(None, None).0 < u64::MAX - GATE_SPAN);
    }

    #[test]
    fn numbers_are_whole_only_in_the_canary_and_gate_of_one_install_of_this_host() {
        use crate::clamd::proof::gate;
        let (nonce, n) = (Nonce([3; 16]), InstallNumber(5));
        let text = canary(&nonce, n);
        let whole = |canary: &str, n| Numbers::parse(&nonce, canary, &gate(n)).whole;
        assert_eq!(whole(&text, n), Some(n));
        assert_eq!(whole(&text, InstallNumber(4)), None);
        assert_eq!(whole(&canary(&Nonce([4; 16]), n), n), None);
        assert_eq!(whole("", n), None);
    }
}
