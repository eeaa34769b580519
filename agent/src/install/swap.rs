//! Puts a staged set under the names that clamd reads, and looks at what stands there.
//!
//! Every name changes by one rename, so whoever opens it gets a whole file. The swap can be
//! repeated from its start at any time: links that are there already are seen by their inode, the
//! stage keeps every file until the outcome is decided, and what is gone need not be removed again.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use clamcast_proto::DatabaseName;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::names::{DatabaseKind, looks_like_a_database};
use clamcast_proto::receipt::{FOREIGN_MAX, FileState, InstallNumber};

use super::disk::{At, DATABASE_MODE, Dir, HostFault, Inode, Tree};
use super::journal::{Before, Journal, Moved, Set, Way};
use super::look::Baseline;
use super::others::Other;
use super::stage::{PLACE, Stage, state_of};
use super::storage::StepFault;
use super::survey::{Numbers, Planner, Role, Seen, Stands, There};
use crate::clamd::proof::{CANARY, GATE, Nonce, PROOF_FILE_BYTES_MAX, canary, gate};

/// Where canary and gate are written: on disk before the first database is renamed, so that a full
/// disk is noticed while nothing has happened.
const NEW_CANARY: At<'_> = At(Dir::Hidden, "canary");
const NEW_GATE: At<'_> = At(Dir::Hidden, "gate");

const CANARY_AT: At<'_> = At(Dir::Databases, CANARY);
const GATE_AT: At<'_> = At(Dir::Databases, GATE);

/// The swap and everything around it.
pub(super) struct Swap<'a> {
    pub(super) tree: &'a Tree,
    pub(super) stage: Stage<'a>,
    pub(super) nonce: &'a Nonce,
}

impl Swap<'_> {
    /// Reads canary and gate.
    pub(super) fn numbers(&self) -> Result<Numbers, HostFault> {
        let text = |at| -> Result<String, HostFault> {
            let bytes = self
                .tree
                .read(at, PROOF_FILE_BYTES_MAX)?
                .unwrap_or_default();
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let (canary, gate) = (text(CANARY_AT)?, text(GATE_AT)?);
        Ok(Numbers::parse(self.nonce, &canary, &gate))
    }

    /// Reads the facts that a plan needs.
    pub(super) fn see(&self, planner: &Planner<'_>) -> Result<Seen, HostFault> {
        let numbers = self.numbers()?;
        let names = self.tree.list(Dir::Databases)?.into_iter();
        let current = self.tree.list(Dir::Current)?.into_iter();
        let mut seen = Seen {
            numbers,
            names: names.map(|it| it.to_string_lossy().into_owned()).collect(),
            current: current.filter_map(|it| it.to_str()?.parse().ok()).collect(),
            adopted: self.kept_files()?,
            there: BTreeMap::new(),
        };
        for (name, role) in planner.concerned(&seen) {
            let is_listed = seen.current.contains(&name);
            let there = self.there(planner, &name, &role, is_listed)?;
            seen.there.insert(name, there);
        }
        Ok(seen)
    }

    /// Reads what stands under a name, its content only where the plan depends on it. `is_listed`:
    /// whether `current/` has the name.
    fn there(
        &self,
        planner: &Planner<'_>,
        name: &DatabaseName,
        role: &Role,
        is_listed: bool,
    ) -> Result<There, HostFault> {
        let at = At(Dir::Databases, name.as_str());
        let Some(facts) = self.tree.facts(at)? else {
            let is_kept = self.is_kept(planner, name, None)?;
            return Ok(There {
                is_kept,
                ..There::default()
            });
        };
        let is_file_at = |other| Ok::<_, HostFault>(self.inode(other)? == Some(facts.inode));
        let mut there = There {
            stands: match (facts.regular, facts.directory) {
                (true, _) => Stands::File,
                (false, true) => Stands::Directory,
                (false, false) => Stands::Special,
            },
            is_current: is_listed && is_file_at(At(Dir::Current, name.as_str()))?,
            is_placed: match role {
                Role::Placed(sha256) => is_file_at(At(Dir::Stage, &sha256.to_string()))?,
                Role::Returns(_) | Role::Leaves => false,
            },
            ..There::default()
        };
        let candidates = planner.candidates(name, role, &there);
        if facts.regular && candidates.iter().any(|file| file.size == facts.size) {
            there.state = self.state(name)?;
        }
        if planner.is_touched(name, role, &there) {
            there.is_kept = self.is_kept(planner, name, there.state.as_ref())?;
            if there.state.is_none() && !there.is_kept {
                there.state = self.state(name)?;
            }
        }
        Ok(there)
    }

    /// Reads the file under a name; `None` if it cannot be read.
    fn state(&self, name: &DatabaseName) -> Result<Option<FileState>, HostFault> {
        let found = self.stage.state(At(Dir::Databases, name.as_str()))?;
        Ok(found.map(|(facts, sha256)| FileState {
            name: name.clone(),
            size: facts.size,
            sha256,
        }))
    }

    /// Whether the installed content of a name is kept, where the file that stands there has another.
    fn is_kept(
        &self,
        planner: &Planner<'_>,
        name: &DatabaseName,
        there: Option<&FileState>,
    ) -> Result<bool, HostFault> {
        let installed = planner.installed_file(name);
        let Some(file) = installed.filter(|file| there != Some(file)) else {
            return Ok(false);
        };
        let is_in =
            |dir| Ok::<_, HostFault>(self.stage.holds(At(dir, name.as_str()), &file)?.is_some());
        Ok(is_in(Dir::Current)? || is_in(Dir::Previous)?)
    }

    pub(super) fn inode(&self, at: At<'_>) -> Result<Option<Inode>, HostFault> {
        Ok(self.tree.facts(at)?.map(|facts| facts.inode))
    }

    /// Carries out a journal's swap.
    pub(super) fn perform(&self, journal: &Journal) -> Result<(), StepFault> {
        let touched = |fault| StepFault {
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
    pub(super) fn place_only(&self, journal: &Journal) -> Result<(), StepFault> {
        let touched = |fault| StepFault {
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
        if self.inode(to)? == self.inode(staged)? {
            return Ok(());
        }
        self.tree.remove(PLACE)?;
        self.tree.link(staged, PLACE)?;
        self.tree.rename(PLACE, to)
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
        let Some(there) = self.inode(kept)? else {
            return Ok(false);
        };
        let staged = self.inode(At(Dir::Stage, &new.sha256.to_string()))?;
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
