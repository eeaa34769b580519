//! The host's own files under names of the fleet: kept in `adopted/` while the fleet publishes the
//! name, and restored when the fleet withdraws it.
//!
//! `adopted/` and `current/` are the records, so nothing else has to survive a restart or the loss of
//! the state directory: `current/` has the names of the last set. A file is restored by a rename over
//! the fleet's file: the name is never missing, and a replay finds that the kept file is gone and does
//! nothing.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use clamcast_proto::DatabaseName;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::ADOPTED_MAX;

use super::disk::{At, Dir, HostFault, Inode, io_fault};
use super::journal::{Journal, Moved, PutAside};
use super::survey::{self, Entry, NoPlace};
use super::swap::Swap;

impl Swap<'_> {
    /// The host's own files under names that `manifest` owns, bounded as a receipt is.
    pub(super) fn adopted(&self, manifest: &Manifest) -> Result<Vec<DatabaseName>, HostFault> {
        let kept = self.kept_files()?;
        let names = survey::kept_by_name(&kept).into_keys();
        let adopted = names.filter(|name| survey::is_owned(manifest, name));
        Ok(adopted.take(ADOPTED_MAX).collect())
    }

    /// The files in `adopted/` that may have stood in the place of a database, and directories.
    pub(super) fn kept_files(&self) -> Result<Vec<Entry>, HostFault> {
        let mut kept = Vec::new();
        for name in self.entries()? {
            let is_kept = survey::original(&name).is_some();
            let facts = match is_kept {
                true => self.tree.facts(At(Dir::Adopted, &name))?,
                false => None,
            };
            kept.extend(facts.map(|facts| Entry {
                name,
                changed: facts.changed,
                is_directory: facts.directory,
            }));
        }
        Ok(kept)
    }

    /// The names in `adopted/`.
    fn entries(&self) -> Result<BTreeSet<String>, HostFault> {
        let names = self.tree.list(Dir::Adopted)?.into_iter();
        Ok(names.filter_map(|name| name.into_string().ok()).collect())
    }

    /// The same, if they matter to these names.
    fn entries_for(&self, names: &[DatabaseName]) -> Result<BTreeSet<String>, HostFault> {
        match names.is_empty() {
            true => Ok(BTreeSet::new()),
            false => self.entries(),
        }
    }

    /// This name, or the first one after it that nothing in `adopted/` has.
    pub(super) fn free_in_adopted(&self, name: &str) -> Result<String, HostFault> {
        let free = survey::free_place(&self.entries()?, name);
        free.map_err(|error| self.no_place(error))
    }

    fn no_place(&self, error: NoPlace) -> HostFault {
        no_place(&self.tree.directory(Dir::Adopted), error)
    }

    /// Gives obsolete files names from which nothing is restored. A replay does nothing: by then
    /// the old name may be that of a file that was kept since.
    pub(super) fn put_aside(&self, obsolete: &[PutAside]) -> Result<(), HostFault> {
        for PutAside { kept, aside } in obsolete {
            let (kept_at, aside_at) = (At(Dir::Adopted, kept), At(Dir::Adopted, aside));
            if self.tree.facts(aside_at)?.is_none() && self.tree.facts(kept_at)?.is_some() {
                self.tree.rename(kept_at, aside_at)?;
                tracing::info!(kept, aside, "an obsolete file of the host is put aside");
            }
        }
        Ok(())
    }

    /// Keeps what others had put there.
    pub(super) fn adopt(&self, names: &[DatabaseName]) -> Result<(), HostFault> {
        let mut entries = self.entries_for(names)?;
        for name in names {
            // `previous/` has it, and as a file of ours, which may be linked.
            let there = At(Dir::Previous, name.as_str());
            let Some(file) = self.inode(there)? else {
                continue;
            };
            if self.kept_as(&entries, name, file)?.is_some() {
                continue;
            }
            let kept = survey::free_place(&entries, name.as_str());
            let kept = kept.map_err(|error| self.no_place(error))?;
            self.tree.link(there, At(Dir::Adopted, &kept))?;
            tracing::info!(%name, kept, "the host's own file is kept, the fleet publishes its name");
            entries.insert(kept);
        }
        self.tree.sync_dir(Dir::Adopted)
    }

    /// Forgets what [`Swap::adopt`] kept: the set is taken back, and the host's files stand there
    /// again.
    pub(super) fn give_up(&self, names: &[DatabaseName]) -> Result<(), HostFault> {
        let entries = self.entries_for(names)?;
        for name in names {
            let Some(file) = self.inode(At(Dir::Previous, name.as_str()))? else {
                continue;
            };
            if let Some(kept) = self.kept_as(&entries, name, file)? {
                self.tree.remove(At(Dir::Adopted, &kept))?;
            }
        }
        Ok(())
    }

    /// Under which of these names in `adopted/` this very file is kept.
    fn kept_as(
        &self,
        entries: &BTreeSet<String>,
        name: &DatabaseName,
        file: Inode,
    ) -> Result<Option<String>, HostFault> {
        for kept in survey::taken_places(entries, name.as_str()) {
            if self.inode(At(Dir::Adopted, &kept))? == Some(file) {
                return Ok(Some(kept));
            }
        }
        Ok(None)
    }

    /// Restores the host's files.
    pub(super) fn restore(&self, journal: &Journal) -> Result<(), HostFault> {
        for Moved { name, kept } in &journal.restore {
            let kept_at = At(Dir::Adopted, kept);
            if self.tree.facts(kept_at)?.is_none() {
                continue; // restored by the run before
            }
            self.tree
                .rename(kept_at, At(Dir::Databases, name.as_str()))?;
            // A rename between two names of one file leaves both.
            self.tree.remove(kept_at)?;
            tracing::info!(%name, "the host's own file is restored, the fleet withdrew its name");
        }
        match journal.restore.is_empty() {
            true => Ok(()),
            false => self.tree.sync_dir(Dir::Adopted),
        }
    }

    /// Keeps a restored file once more, before the set that owned its name comes back.
    pub(super) fn keep_restored(
        &self,
        journal: &Journal,
        Moved { name, kept }: &Moved,
    ) -> Result<(), HostFault> {
        let (kept, there) = (At(Dir::Adopted, kept), At(Dir::Databases, name.as_str()));
        if self.tree.facts(kept)?.is_some() || self.tree.facts(there)?.is_none() {
            return Ok(()); // it was not restored, or is kept again
        }
        let returns = journal.files.iter().any(|file| file.name == *name);
        // With a second name it is not missing until the set's file is placed over it.
        if !returns || self.tree.link(there, kept).is_err() {
            self.tree.rename(there, kept)?;
        }
        self.tree.sync_dir(Dir::Adopted)
    }
}

/// `adopted` has no room for one more file of a name.
pub(super) fn no_place(adopted: &Path, error: NoPlace) -> HostFault {
    let path = adopted.join(error.name());
    let source = io::Error::new(io::ErrorKind::AlreadyExists, error);
    io_fault("keep another", &path, source)
}
