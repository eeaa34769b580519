//! Puts a staged set under the names that clamd reads, and looks at what stands there.
//!
//! Every name changes by one rename, so whoever opens it gets a whole file. The swap can be
//! repeated from its start at any time: links that are there already are seen by their inode, the
//! stage keeps every file until the outcome is decided, and what is gone need not be removed again.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use clamcast_proto::DatabaseName;
use clamcast_proto::manifest::{Manifest, ManifestFile};
use clamcast_proto::names::{DatabaseKind, looks_like_a_database};
use clamcast_proto::receipt::{FOREIGN_MAX, FileState, InstallNumber};

use super::adopted::{Adopted, earlier_sets, is_owned};
use super::disk::{At, DATABASE_MODE, Dir, HostFault, Tree};
use super::journal::{Before, Installed, Journal, Moved, Set, Step, Way};
use super::look::Baseline;
use super::others::Other;
use super::stage::{PLACE, Stage, state_of};
use crate::clamd::proof::{
    CANARY, GATE, GATE_SPAN, Nonce, PROOF_FILE_BYTES_MAX, canary, canary_number, gate, gate_number,
};

/// Where canary and gate are written: on disk before the first database is renamed, so that a full
/// disk is noticed while nothing has happened.
const NEW_CANARY: At<'_> = At(Dir::Hidden, "canary");
const NEW_GATE: At<'_> = At(Dir::Hidden, "gate");

const CANARY_AT: At<'_> = At(Dir::Databases, CANARY);
const GATE_AT: At<'_> = At(Dir::Databases, GATE);

/// A swap failed, perhaps halfway.
pub(super) struct SwapFault {
    pub(super) fault: HostFault,
    /// Whether the database directory may have been changed.
    pub(super) touched: bool,
}

impl From<HostFault> for SwapFault {
    /// Nothing was changed yet, or the journal knows that something was.
    fn from(fault: HostFault) -> Self {
        Self {
            fault,
            touched: false,
        }
    }
}

/// What canary and gate on disk say.
pub(super) struct Numbers {
    canary: Option<InstallNumber>,
    gate: Option<InstallNumber>,
    /// Whether both are the ones of this host for this number.
    whole: Option<InstallNumber>,
}

impl Numbers {
    pub(super) fn read(tree: &Tree, nonce: &Nonce) -> Result<Self, HostFault> {
        let text = |at| -> Result<String, HostFault> {
            let bytes = tree.read(at, PROOF_FILE_BYTES_MAX)?.unwrap_or_default();
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let (canary_text, gate_text) = (text(CANARY_AT)?, text(GATE_AT)?);
        let (canary_there, gate_there) = (canary_number(&canary_text), gate_number(&gate_text));
        let whole = canary_there.filter(|n| canary_text == canary(nonce, *n));
        Ok(Self {
            canary: canary_there,
            gate: gate_there,
            whole: whole.filter(|_| canary_there == gate_there),
        })
    }

    /// Above everything that was ever shown to clamd.
    pub(super) fn next(
        &self,
        journal: Option<&Journal>,
        installed: Option<&Installed>,
    ) -> InstallNumber {
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

/// What an install has to do, seen without touching anything.
pub(super) struct Survey {
    pub(super) journal: Journal,
    /// Every file stands there already and nothing has to go: only the number would move.
    pub(super) in_place: bool,
    /// The same but for signature files, and some of them differ from those of the installed set.
    pub(super) resigned: bool,
}

/// The files of a set that clamd loads, sorted by name.
fn databases_of(set: &Set) -> impl Iterator<Item = FileState> {
    let files = set.files().into_iter();
    files.filter(|file| file.name.kind() != DatabaseKind::Sign)
}

/// The swap and everything around it.
pub(super) struct Swap<'a> {
    pub(super) tree: &'a Tree,
    pub(super) stage: Stage<'a>,
    pub(super) nonce: &'a Nonce,
}

impl Swap<'_> {
    /// Compares the directory with a staged set.
    pub(super) fn survey(
        &self,
        set: &Set,
        installed: Option<&Installed>,
        open: Option<&Journal>,
    ) -> Result<Survey, HostFault> {
        let numbers = Numbers::read(self.tree, self.nonce)?;
        let install = numbers.next(open, installed);
        let files = set.files();
        let present = self.databases()?;
        let earlier = earlier_sets(installed, open);
        let ours = earlier.iter().flat_map(|set| &set.files);
        let ours: BTreeSet<_> = ours.map(|file| file.name.clone()).collect();
        let Adopted {
            restore,
            stay,
            obsolete,
        } = self.survey_adopted(&set.manifest, &earlier)?;

        let mut adopt = Vec::new();
        let (mut in_place, mut databases_in_place) = (true, true);
        for file in &files {
            let is_signature = file.name.kind() == DatabaseKind::Sign;
            let Some(name) = present.get(file.name.as_str()) else {
                in_place = false;
                databases_in_place &= is_signature;
                continue;
            };
            let is_placed = self.is_placed(file)?;
            in_place &= is_placed;
            databases_in_place &= is_placed || is_signature;
            // After the loss of the state directory the agent's own file is known by its link.
            if ours.contains(name) || self.is_current(name)? {
                continue;
            }
            // A loose file with the published bytes is kept too: the fleet may withdraw the name. A
            // container with the published bytes is not, because its publisher replaces it daily.
            let at = At(Dir::Databases, name.as_str());
            let is_published = is_placed || self.stage.holds(at, file)?.is_some();
            if !is_published || name.kind() == DatabaseKind::Loose {
                adopt.push(name.clone());
            }
        }
        // A set that waits for clamd may still have the old forms of the one before it beside it.
        let waiting = open.and_then(|journal| journal.before.installed.as_ref());
        let known: Vec<_> = installed.into_iter().chain(waiting).collect();
        let (mut withdraw, mut later) = (Vec::new(), Vec::new());
        for name in present.values() {
            if set.manifest.file(name).is_some() {
                continue;
            }
            if stay.contains(name) || restore.iter().any(|restored| restored.name == *name) {
                continue; // the host's own file is there, or is put there
            }
            // After the loss of the state directory the agent's own file is known by its link.
            if ours.contains(name) || self.is_current(name)? {
                match self.may_stay_till_the_proof(name, &set.manifest, &known)? {
                    true => later.push(name.clone()),
                    false => withdraw.push(name.clone()),
                }
            } else if is_owned(&set.manifest, name) {
                adopt.push(name.clone());
                withdraw.push(name.clone());
            }
        }
        let is_shown = installed.is_some_and(|installed| numbers.whole == Some(installed.install));
        in_place &= withdraw.is_empty() && later.is_empty() && restore.is_empty() && is_shown;
        let same_databases =
            installed.is_some_and(|installed| databases_of(&installed.set).eq(databases_of(set)));
        let only_signatures_go = later.iter().all(|it| it.kind() == DatabaseKind::Sign);
        let mut resigned = databases_in_place && same_databases && only_signatures_go && is_shown;
        // Nothing of the host's own comes, goes or is replaced.
        resigned &= withdraw.is_empty() && restore.is_empty();
        resigned &= adopt.is_empty() && obsolete.is_empty() && !in_place;

        let touched: BTreeSet<_> = files.iter().map(|file| file.name.clone()).collect();
        let restored = restore.iter().map(|restored| &restored.name);
        let touched = touched
            .iter()
            .chain(&withdraw)
            .chain(&later)
            .chain(restored);
        let (old, moved) = self.before(touched, installed)?;
        // What is moved need not be linked.
        let linked: HashSet<_> = old.iter().map(|old| &old.name).collect();
        adopt.retain(|name| linked.contains(name));
        resigned &= moved.is_empty();
        let before = Before {
            installed: installed.cloned(),
            files: old,
            moved,
            others: self.has_others(&set.manifest, &ours)?,
        };
        // Names may have gone before a proof that is still to come.
        let unproven = open.is_some_and(|journal| journal.pass < journal.passes);
        let sure = withdraw.is_empty() && !unproven && numbers.hides(install);
        Ok(Survey {
            journal: Journal {
                set: set.clone(),
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

    /// Whatever stands in the database directory under a name that could be in a manifest, except
    /// directories: clamd follows a link.
    fn databases(&self) -> Result<BTreeMap<String, DatabaseName>, HostFault> {
        let mut databases = BTreeMap::new();
        for name in self.tree.list(Dir::Databases)? {
            let parsed = name
                .to_str()
                .and_then(|name| name.parse::<DatabaseName>().ok());
            let Some(name) = parsed else { continue };
            let facts = self.tree.facts(At(Dir::Databases, name.as_str()))?;
            if facts.is_some_and(|facts| !facts.directory) {
                databases.insert(name.as_str().to_owned(), name);
            }
        }
        Ok(databases)
    }

    /// An old form that clamd ranks below the new one, and that is known to be whole, does no harm
    /// beside it. Removed before the proof it could: a load that had listed the directory before
    /// the new name came would find neither. Detached signatures are not loaded at all.
    fn may_stay_till_the_proof(
        &self,
        name: &DatabaseName,
        target: &Manifest,
        known: &[&Installed],
    ) -> Result<bool, HostFault> {
        if name.kind() == DatabaseKind::Sign {
            return Ok(true);
        }
        let old = known.iter().find_map(|known| known.set.manifest.file(name));
        let new = name
            .other_form()
            .and_then(|form| target.file(&form).cloned());
        let (Some(old), Some(new)) = (old, new) else {
            return Ok(false);
        };
        let version = |file: &ManifestFile| file.container.as_ref().map(|facts| facts.version);
        if version(old).is_none() || version(old) >= version(&new) {
            return Ok(false);
        }
        // A damaged one makes the whole load fail, outranked or not.
        let at = At(Dir::Databases, name.as_str());
        Ok(self.stage.holds(at, &state_of(old))?.is_some())
    }

    /// Whether clamd finds databases here that are neither this set's nor from an earlier install.
    fn has_others(
        &self,
        target: &Manifest,
        ours: &BTreeSet<DatabaseName>,
    ) -> Result<bool, HostFault> {
        let targets = target.files.iter().map(|file| &file.name);
        let known: HashSet<_> = targets.chain(ours).map(DatabaseName::as_str).collect();
        let names = self.tree.list(Dir::Databases)?;
        Ok(names.iter().any(|name| {
            let name = name.to_string_lossy();
            name != CANARY
                && name != GATE
                && looks_like_a_database(&name)
                && !known.contains(&*name)
        }))
    }

    /// What stands under these names: the content that belongs there where the host still has it,
    /// else what really is there. What cannot be read is to be moved.
    fn before<'n>(
        &self,
        names: impl Iterator<Item = &'n DatabaseName>,
        installed: Option<&Installed>,
    ) -> Result<(Vec<FileState>, Vec<Moved>), HostFault> {
        let (mut files, mut moved) = (Vec::new(), Vec::new());
        for name in names {
            let good = installed.and_then(|installed| installed.set.manifest.file(name));
            let good = good.map(state_of);
            let mut found = None;
            if let Some(good) = good {
                for dir in [Dir::Databases, Dir::Current, Dir::Previous] {
                    if found.is_none() && self.stage.holds(At(dir, name.as_str()), &good)?.is_some()
                    {
                        found = Some(good.clone());
                    }
                }
            }
            if found.is_none() {
                let there = self.stage.state(At(Dir::Databases, name.as_str()))?;
                found = there.map(|(facts, sha256)| FileState {
                    name: name.clone(),
                    size: facts.size,
                    sha256,
                });
            }
            let there = self.tree.facts(At(Dir::Databases, name.as_str()))?;
            if found.is_none() && there.is_some_and(|facts| !facts.directory) {
                moved.push(Moved {
                    name: name.clone(),
                    kept: self.free_in_adopted(name.as_str())?,
                });
            }
            files.extend(found);
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok((files, moved))
    }

    /// Carries out a journal's swap.
    pub(super) fn perform(&self, journal: &Journal) -> Result<(), SwapFault> {
        let touched = |fault| SwapFault {
            fault,
            touched: true,
        };
        let forward = journal.way == Way::Forward;
        if forward {
            self.fill_previous(&journal.before)?;
        }
        if !forward {
            return self.go_back(journal).map_err(touched);
        }
        for file in &journal.files {
            self.must_be_staged(file)?;
        }
        self.tree.sync_dir(Dir::Stage)?;
        self.prepare_proof(journal.install)?;
        self.put_aside(&journal.obsolete)?;
        self.adopt(&journal.adopt)?;
        self.move_away(journal).map_err(touched)?;
        for file in signatures_first(&journal.files) {
            self.place(file).map_err(touched)?;
        }
        for name in &journal.withdraw {
            self.withdraw(name).map_err(touched)?;
        }
        self.restore(journal).map_err(touched)?;
        self.show_proof().map_err(touched)?;
        self.tree.sync_dir(Dir::Databases).map_err(touched)?;
        self.fill_current(&journal.files, Some(&journal.set.manifest))
            .map_err(touched)
    }

    /// Puts the files of a journal in place whose databases are there already, without a new canary and
    /// gate.
    pub(super) fn place_only(&self, journal: &Journal) -> Result<(), SwapFault> {
        let touched = |fault| SwapFault {
            fault,
            touched: true,
        };
        self.fill_previous(&journal.before)?;
        for file in &journal.files {
            self.must_be_staged(file)?;
        }
        self.tree.sync_dir(Dir::Stage)?;
        for file in signatures_first(&journal.files) {
            self.place(file).map_err(touched)?;
        }
        self.tree.sync_dir(Dir::Databases).map_err(touched)?;
        self.fill_current(&journal.files, Some(&journal.set.manifest))
            .map_err(touched)
    }

    /// The way back: whatever cannot be restored, everything else is, before it fails.
    fn go_back(&self, journal: &Journal) -> Result<(), HostFault> {
        let mut restored = Ok(());
        let mut also = |done: Result<(), HostFault>| {
            if let Err(fault) = &done {
                tracing::error!(error = crate::chain(fault), "on the way back");
            }
            if restored.is_ok() {
                restored = done;
            }
        };
        for file in &journal.files {
            also(self.must_be_staged(file));
        }
        also(self.tree.sync_dir(Dir::Stage));
        for file in signatures_first(&journal.files) {
            also(self.place_back(journal, file));
        }
        let returns = |name: &DatabaseName| journal.files.iter().any(|file| file.name == *name);
        for restored in journal.restore.iter().filter(|it| !returns(&it.name)) {
            also(self.keep_restored(journal, restored));
        }
        // In reverse: what the set has no file for comes back first, beside the whole set.
        for moved in journal.before.moved.iter().rev() {
            also(self.move_back(moved, &journal.set));
        }
        for name in &journal.withdraw {
            also(self.withdraw(name));
        }
        restored?;
        // After every file is back: where one is not, the kept copy may be the last one.
        self.give_up(&journal.adopt)?;
        // The old set comes first: it needs no room, and these two may find none.
        self.prepare_proof(journal.install)?;
        self.show_proof()?;
        self.tree.sync_dir(Dir::Databases)?;
        let old = journal.before.installed.as_ref();
        self.fill_current(&journal.files, old.map(|old| &*old.set.manifest))
    }

    /// Puts only the next canary and gate in place.
    pub(super) fn renumber(&self, install: InstallNumber) -> Result<(), HostFault> {
        self.prepare_proof(install)?;
        self.show_proof()?;
        self.tree.sync_dir(Dir::Databases)
    }

    /// Links to everything that stands there, so that there is a way back.
    fn fill_previous(&self, before: &Before) -> Result<(), HostFault> {
        for file in &before.files {
            let previous = At(Dir::Previous, file.name.as_str());
            if self.stage.holds(previous, file)?.is_some() {
                continue;
            }
            self.must_be_staged(file)?;
            self.link_over(file, previous)?;
        }
        self.keep_only(
            Dir::Previous,
            before.files.iter().map(|file| file.name.as_str()),
        )?;
        self.tree.sync_dir(Dir::Previous)
    }

    /// Links to the files of this set among those that were put in place. After the way back the
    /// host's own files are among them, too, and they are not the agent's.
    fn fill_current(&self, files: &[FileState], set: Option<&Manifest>) -> Result<(), HostFault> {
        let is_ours = |file: &&FileState| set.is_some_and(|set| set.file(&file.name).is_some());
        let files = files.iter().filter(is_ours);
        for file in files.clone() {
            self.link_over(file, At(Dir::Current, file.name.as_str()))?;
        }
        self.keep_only(Dir::Current, files.map(|file| file.name.as_str()))?;
        self.tree.sync_dir(Dir::Current)
    }

    fn keep_only<'n>(
        &self,
        dir: Dir,
        names: impl Iterator<Item = &'n str>,
    ) -> Result<(), HostFault> {
        let names: BTreeSet<_> = names.collect();
        for name in self.tree.list(dir)? {
            let name = name.to_string_lossy();
            if !names.contains(&*name) {
                self.tree.remove(At(dir, &name))?;
            }
        }
        Ok(())
    }

    fn must_be_staged(&self, file: &FileState) -> Result<(), HostFault> {
        if self.stage.ensure(file)? {
            return Ok(());
        }
        Err(HostFault::Unstaged {
            path: self.tree.path(At(Dir::Databases, file.name.as_str())),
            digest: file.sha256,
        })
    }

    /// Gives the staged file this name. A rename between two links to one file does nothing and
    /// leaves both, hence the look first.
    fn link_over(&self, file: &FileState, to: At<'_>) -> Result<(), HostFault> {
        let hex = file.sha256.to_string();
        let staged = At(Dir::Stage, &hex);
        let inode =
            |at| -> Result<_, HostFault> { Ok(self.tree.facts(at)?.map(|facts| facts.inode)) };
        if inode(to)? == inode(staged)? {
            return Ok(());
        }
        self.tree.remove(PLACE)?;
        self.tree.link(staged, PLACE)?;
        self.tree.rename(PLACE, to)
    }

    fn is_placed(&self, file: &FileState) -> Result<bool, HostFault> {
        let hex = file.sha256.to_string();
        let staged = self.tree.facts(At(Dir::Stage, &hex))?;
        let placed = self.tree.facts(At(Dir::Databases, file.name.as_str()))?;
        Ok(matches!((staged, placed), (Some(staged), Some(placed)) if staged.inode == placed.inode))
    }

    fn prepare_proof(&self, install: InstallNumber) -> Result<(), HostFault> {
        let canary = canary(self.nonce, install);
        self.tree
            .write_new(NEW_CANARY, canary.as_bytes(), DATABASE_MODE)?;
        self.tree
            .write_new(NEW_GATE, gate(install).as_bytes(), DATABASE_MODE)
    }

    /// The gate last: whoever has read it finds everything else in place.
    fn show_proof(&self) -> Result<(), HostFault> {
        self.tree.rename(NEW_CANARY, CANARY_AT)?;
        self.tree.rename(NEW_GATE, GATE_AT)
    }

    /// Gives a staged file its name in the database directory.
    fn place(&self, file: &FileState) -> Result<(), HostFault> {
        self.move_directory_away(&file.name)?;
        self.link_over(file, At(Dir::Databases, file.name.as_str()))
    }

    /// The same on the way back. The host's own file, which was restored, is kept first.
    fn place_back(&self, journal: &Journal, file: &FileState) -> Result<(), HostFault> {
        for restored in journal.restore.iter().filter(|it| it.name == file.name) {
            self.keep_restored(journal, restored)?;
        }
        self.place(file)
    }

    /// A file cannot be renamed over a directory. Whoever made one in the place of a database finds
    /// it in `adopted/`.
    fn move_directory_away(&self, name: &DatabaseName) -> Result<(), HostFault> {
        let there = At(Dir::Databases, name.as_str());
        if !self.tree.is_directory(there)? {
            return Ok(());
        }
        let kept = self.free_in_adopted(&format!("{name}.directory"))?;
        self.tree.rename(there, At(Dir::Adopted, &kept))
    }

    /// Keeps what cannot be read in `adopted/`. The kernel may forbid a second name for another
    /// user's file: then it changes places with the new one.
    fn move_away(&self, journal: &Journal) -> Result<(), HostFault> {
        for moved in &journal.before.moved {
            let (there, kept) = places_of(moved);
            let new = journal.files.iter().find(|file| file.name == moved.name);
            let is_new = self.holds_new(kept, new)?;
            let done = self.tree.facts(kept)?.is_some() && !is_new;
            if done || self.tree.facts(there)?.is_none() {
                continue;
            }
            if !is_new {
                if self.tree.link(there, kept).is_ok() {
                    continue;
                }
                if let Some(new) = new {
                    self.tree
                        .link(At(Dir::Stage, &new.sha256.to_string()), kept)?;
                }
            }
            if new.is_none() || !self.tree.exchange(kept, there)? {
                // It is missing until the new one is placed, if there is one.
                self.tree.rename(there, kept)?;
            }
        }
        if journal.before.moved.is_empty() {
            return Ok(());
        }
        self.tree.sync_dir(Dir::Adopted)
    }

    /// Whether it is still the new file that waits in `adopted/` to change places with the old one,
    /// which cannot be read.
    fn holds_new(&self, kept: At<'_>, new: Option<&FileState>) -> Result<bool, HostFault> {
        let Some(new) = new else { return Ok(false) };
        let inode =
            |at| -> Result<_, HostFault> { Ok(self.tree.facts(at)?.map(|facts| facts.inode)) };
        let Some(there) = inode(kept)? else {
            return Ok(false);
        };
        let staged = inode(At(Dir::Stage, &new.sha256.to_string()))?;
        Ok(staged == Some(there) || self.stage.holds(kept, new)?.is_some())
    }

    fn move_back(&self, moved: &Moved, set: &Set) -> Result<(), HostFault> {
        let (there, kept) = places_of(moved);
        let new = set.manifest.file(&moved.name).map(state_of);
        if self.holds_new(kept, new.as_ref())? {
            return self.tree.remove(kept); // they had not changed places yet
        }
        if self.tree.facts(kept)?.is_some() {
            self.tree.rename(kept, there)?;
            // A rename between two names of one file leaves both.
            self.tree.remove(kept)?;
        }
        Ok(())
    }

    /// Takes a name away; `previous/` or `adopted/` holds what stood there.
    fn withdraw(&self, name: &DatabaseName) -> Result<(), HostFault> {
        self.tree.remove(At(Dir::Databases, name.as_str()))
    }

    /// Removes the old forms once the new ones are live.
    pub(super) fn remove_later(&self, journal: &Journal) -> Result<(), HostFault> {
        for name in &journal.later {
            self.withdraw(name)?;
        }
        self.tree.sync_dir(Dir::Databases)
    }

    /// Databases of others that lie beside this journal's set once it is in place, as clamd meets
    /// them. A link that leads nowhere it passes over.
    pub(super) fn others(&self, journal: &Journal) -> Result<Vec<Other>, HostFault> {
        let ours = names_of(journal).chain([CANARY, GATE]);
        let mut ours: BTreeSet<_> = ours.map(str::to_owned).collect();
        let mut others = Vec::new();
        // A file that is still to be restored replaces the file that has its name now.
        let forward = journal.way == Way::Forward;
        for Moved { name, kept } in journal.restore.iter().filter(|_| forward) {
            let kept_at = At(Dir::Adopted, kept);
            if self.tree.facts(kept_at)?.is_none() || !ours.insert(name.to_string()) {
                continue;
            }
            let behind = self.tree.behind(kept_at)?;
            if is_loaded(name.as_str()) && behind.is_some() {
                others.push(Other {
                    name: name.to_string(),
                    kept: Some(kept.clone()),
                    behind,
                });
            }
        }
        for name in self.tree.list(Dir::Databases)? {
            let shown = name.to_string_lossy();
            if ours.contains(&*shown) || !is_loaded(&shown) {
                continue;
            }
            let behind = match name.to_str() {
                None => None,
                Some(name) => match self.tree.behind(At(Dir::Databases, name))? {
                    None => continue,
                    there => there,
                },
            };
            let name = printable(&shown);
            others.push(Other {
                name,
                kept: None,
                behind,
            });
        }
        Ok(others)
    }

    /// The directory as clamd would see it after the swap, for a load test: the set under its real
    /// names, and what lies beside it, files that the install restores included. That may be another
    /// user's, which the kernel may forbid to give a second name; a symbolic link takes no right.
    pub(super) fn make_trial(&self, journal: &Journal, others: &[Other]) -> Result<(), HostFault> {
        for file in &journal.files {
            self.must_be_staged(file)?;
            self.link_over(file, At(Dir::Trial, file.name.as_str()))?;
        }
        let later = journal.later.iter().map(DatabaseName::as_str);
        let later = later.map(|name| (name, in_databases(name)));
        let others = others
            .iter()
            .map(|other| (other.name.as_str(), target(other)));
        let beside: Vec<_> = later.chain(others).collect();
        let files = journal.files.iter().map(|file| file.name.as_str());
        self.link_beside(files, &beside)
    }

    /// The directory as clamd would see it with what stood there before, for a load test of the
    /// previous set. What could not be read is missing in it.
    pub(super) fn make_control(&self, before: &Before, others: &[Other]) -> Result<(), HostFault> {
        for file in &before.files {
            self.must_be_staged(file)?;
            self.link_over(file, At(Dir::Trial, file.name.as_str()))?;
        }
        let files = before.files.iter().map(|file| file.name.as_str());
        // The previous set owned the name of a file that is restored.
        let others = others.iter().filter(|other| {
            let is_before = files.clone().any(|name| name == other.name);
            other.kept.is_none() && !is_before
        });
        let beside = others.map(|other| (other.name.as_str(), target(other)));
        let beside: Vec<_> = beside.collect();
        self.link_beside(files, &beside)
    }

    /// Makes symbolic links beside these files in the trial directory, and removes everything else.
    fn link_beside<'n>(
        &self,
        files: impl Iterator<Item = &'n str>,
        beside: &'n [(&'n str, String)],
    ) -> Result<(), HostFault> {
        for (name, target) in beside {
            let link = At(Dir::Trial, name);
            self.tree.remove(link)?;
            self.tree.symlink(target, link)?;
        }
        self.keep_only(
            Dir::Trial,
            files.chain(beside.iter().map(|(name, _)| *name)),
        )
    }

    /// Removes what an ended install leaves behind.
    pub(super) fn clean(&self) -> Result<(), HostFault> {
        self.tree.remove(PLACE)?;
        self.clean_trial()?;
        for name in self.tree.list(Dir::Stage)? {
            let name = name.to_string_lossy();
            // Spools of a newer offer go by their own plan.
            if !name.contains('.') {
                self.tree.remove(At(Dir::Stage, &name))?;
            }
        }
        Ok(())
    }

    /// Removes what a load test left behind.
    pub(super) fn clean_trial(&self) -> Result<(), HostFault> {
        self.keep_only(Dir::Trial, [].into_iter())
    }

    /// What is on disk under the names of a set, by reading it.
    pub(super) fn files_on_disk(&self, set: &Set, baseline: &Baseline) -> Vec<FileState> {
        let mut files = Vec::new();
        for file in &set.manifest.files {
            match self.stage.state(At(Dir::Databases, file.name.as_str())) {
                Ok(Some((facts, sha256))) => {
                    baseline.insert(file.name.as_str(), facts, sha256);
                    files.push(FileState {
                        name: file.name.clone(),
                        size: facts.size,
                        sha256,
                    });
                }
                Ok(None) => {}
                Err(fault) => {
                    tracing::warn!(error = %crate::chain(&fault), "cannot report on a file")
                }
            }
        }
        files
    }

    /// Databases in the directory that belong to nobody's set, as clamd would load them: it looks
    /// at how a name ends, whatever it starts with and in whatever case.
    pub(super) fn foreign(&self, ours: &HashSet<&str>) -> Result<Vec<String>, HostFault> {
        let mut foreign = Vec::new();
        for name in self.tree.list(Dir::Databases)? {
            let name = name.to_string_lossy();
            let ours = name == CANARY || name == GATE || ours.contains(&*name);
            if !ours && looks_like_a_database(&name) {
                foreign.push(printable(&name));
            }
        }
        if foreign.len() > FOREIGN_MAX {
            let more = foreign.len() - (FOREIGN_MAX - 1);
            foreign.truncate(FOREIGN_MAX - 1);
            foreign.push(format!("(and {more} more)"));
        }
        Ok(foreign)
    }
}

/// Names that an install has a use for: of the files that shall stand there, and of those that go.
pub(super) fn names_of(journal: &Journal) -> impl Iterator<Item = &str> {
    let files = journal.files.iter().map(|file| &file.name);
    let gone = journal.withdraw.iter().chain(&journal.later);
    files.chain(gone).map(DatabaseName::as_str)
}

/// Whether clamd loads what has this name. A detached signature it passes over.
fn is_loaded(name: &str) -> bool {
    let signs = name.to_ascii_lowercase().ends_with(".cvd.sign");
    looks_like_a_database(name) && !signs
}

/// A file of others, from `.clamcast/trial`.
fn target(other: &Other) -> String {
    match &other.kept {
        Some(kept) => format!("../adopted/{kept}"),
        None => in_databases(&other.name),
    }
}

/// A name in the database directory, from `.clamcast/trial`.
fn in_databases(name: &str) -> String {
    format!("../../{name}")
}

/// As `clamscan`'s reason shows it, too.
fn printable(name: &str) -> String {
    let shown = |c: char| if c.is_control() { '?' } else { c };
    name.chars().map(shown).collect()
}

/// Detached signatures before the containers that they belong to.
fn signatures_first(files: &[FileState]) -> impl Iterator<Item = &FileState> {
    let signs = |file: &&FileState| file.name.kind() == DatabaseKind::Sign;
    let (first, then): (Vec<_>, Vec<_>) = files.iter().partition(signs);
    first.into_iter().chain(then)
}

/// Where it stands, and where it is kept.
fn places_of(moved: &Moved) -> (At<'_>, At<'_>) {
    (
        At(Dir::Databases, moved.name.as_str()),
        At(Dir::Adopted, &moved.kept),
    )
}

/// Whether a file of the fleet is the successor of another's file: the other form of a container, or
/// the file that a detached signature of any version belongs to.
pub(super) fn succeeds(successor: &DatabaseName, name: &DatabaseName) -> bool {
    if name.kind() == DatabaseKind::Loose {
        return false;
    }
    name.other_form().as_ref() == Some(successor)
        || (name.kind() == DatabaseKind::Sign && successor.database_base() == name.database_base())
}
