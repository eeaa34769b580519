//! The host's own files under names of the fleet: kept in `adopted/` while the fleet publishes the
//! name, and restored when the fleet withdraws it.
//!
//! `adopted/` and `current/` are the records, so nothing else has to survive a restart or the loss of
//! the state directory: `current/` has the names of the last set. A file is restored by a rename over
//! the fleet's file: the name is never missing, and a replay finds that the kept file is gone and does
//! nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use clamcast_proto::DatabaseName;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::ADOPTED_MAX;

use super::disk::{At, Dir, Facts, HostFault, io_fault};
use super::journal::{Installed, Journal, Moved, PutAside};
use super::stage::state_of;
use super::swap::{Swap, succeeds};

/// So much is kept in `adopted/` of what stood in the place of one database. One more is a fault, for
/// somebody to look at.
const KEPT_MAX: u32 = 100;

/// Ends the name of a file that no set restores any more. No database's name ends like this.
const OBSOLETE: &str = "obsolete";

/// What an install has to do with the files in `adopted/`.
pub(super) struct Adopted {
    /// Files that come back: the set does not own their names, and an earlier set did.
    pub(super) restore: Vec<Moved>,
    /// The same where the host has put a newer file of its own there meanwhile. That file stays.
    pub(super) stay: BTreeSet<DatabaseName>,
    /// Files that no set restores any more. Before this set no set owned their names, and so the file
    /// that the host has there now, or that none is there, is newer.
    pub(super) obsolete: Vec<PutAside>,
}

impl Swap<'_> {
    /// The host's own files under names that `manifest` owns, bounded as a receipt is.
    pub(super) fn adopted(&self, manifest: &Manifest) -> Result<Vec<DatabaseName>, HostFault> {
        let kept = self.kept()?.into_keys();
        let adopted = kept.filter(|name| is_owned(manifest, name));
        Ok(adopted.take(ADOPTED_MAX).collect())
    }

    /// The files in `adopted/` by the names that they had, the one that was kept last first.
    fn kept(&self) -> Result<BTreeMap<DatabaseName, Vec<String>>, HostFault> {
        let mut kept = BTreeMap::<DatabaseName, Vec<(i128, String)>>::new();
        for entry in self.tree.list(Dir::Adopted)? {
            let Some(entry) = entry.to_str() else {
                continue;
            };
            let (Some(name), Some(facts)) =
                (original(entry), self.tree.facts(At(Dir::Adopted, entry))?)
            else {
                continue;
            };
            // A directory that stood in the place of a database is no file to restore.
            if !facts.directory {
                let kept = kept.entry(name).or_default();
                kept.push((facts.changed, entry.to_owned()));
            }
        }
        let newest_first = |mut entries: Vec<(i128, String)>| {
            entries.sort_by(|a, b| b.cmp(a));
            entries.into_iter().map(|(_, entry)| entry).collect()
        };
        let kept = kept.into_iter();
        Ok(kept
            .map(|(name, entries)| (name, newest_first(entries)))
            .collect())
    }

    /// Compares `adopted/` with a new set.
    pub(super) fn survey_adopted(
        &self,
        target: &Manifest,
        earlier: &[&Manifest],
    ) -> Result<Adopted, HostFault> {
        let mut adopted = Adopted {
            restore: Vec::new(),
            stay: BTreeSet::new(),
            obsolete: Vec::new(),
        };
        let current = self.current_names()?;
        for (name, kept) in self.kept()? {
            let was_owned =
                earlier.iter().any(|set| is_owned(set, &name)) || is_among(current.iter(), &name);
            match (was_owned, is_owned(target, &name)) {
                (true, true) | (false, false) => {}
                (false, true) => {
                    for kept in kept {
                        let aside = self.free_in_adopted(&format!("{kept}.{OBSOLETE}"))?;
                        adopted.obsolete.push(PutAside { kept, aside });
                    }
                }
                (true, false) => {
                    let there = self.tree.facts(At(Dir::Databases, name.as_str()))?;
                    let is_file = there.is_some_and(|there| there.regular);
                    if is_file && self.is_taken(&name, earlier)? {
                        tracing::warn!(%name, "the host has a newer file of its own, the adopted one stays kept");
                        adopted.stay.insert(name);
                    } else {
                        let newest = kept.into_iter().next();
                        let newest = newest.map(|kept| Moved { name, kept });
                        adopted.restore.extend(newest);
                    }
                }
            }
        }
        Ok(adopted)
    }

    /// Names of the set that the agent put in place last.
    fn current_names(&self) -> Result<Vec<DatabaseName>, HostFault> {
        let names = self.tree.list(Dir::Current)?.into_iter();
        Ok(names
            .filter_map(|name| name.to_str()?.parse().ok())
            .collect())
    }

    /// Whether a file that is not of an earlier set stands under this name.
    pub(super) fn is_taken(
        &self,
        name: &DatabaseName,
        earlier: &[&Manifest],
    ) -> Result<bool, HostFault> {
        let at = At(Dir::Databases, name.as_str());
        if self.tree.facts(at)?.is_none() || self.is_current(name)? {
            return Ok(false);
        }
        for file in earlier.iter().filter_map(|set| set.file(name)) {
            if self.stage.holds(at, &state_of(file))?.is_some() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether the file under this name is the one that the agent placed there, damaged or not.
    pub(super) fn is_current(&self, name: &DatabaseName) -> Result<bool, HostFault> {
        self.is_one_file(
            At(Dir::Databases, name.as_str()),
            At(Dir::Current, name.as_str()),
        )
    }

    fn is_one_file(&self, one: At<'_>, other: At<'_>) -> Result<bool, HostFault> {
        let inode = |facts: Facts| facts.inode;
        let one = self.tree.facts(one)?.map(inode);
        Ok(one.is_some() && one == self.tree.facts(other)?.map(inode))
    }

    /// The names in `adopted/` that a file of this name may have, up to the first free one.
    fn places(&self, name: &str) -> Result<(Vec<String>, Option<String>), HostFault> {
        let mut taken = Vec::new();
        let mut place = name.to_owned();
        for n in 2..=KEPT_MAX + 1 {
            if self.tree.facts(At(Dir::Adopted, &place))?.is_none() {
                return Ok((taken, Some(place)));
            }
            taken.push(std::mem::replace(&mut place, format!("{name}-{n}")));
        }
        Ok((taken, None))
    }

    /// This name, or the first one after it that nothing in `adopted/` has.
    pub(super) fn free_in_adopted(&self, name: &str) -> Result<String, HostFault> {
        self.places(name)?.1.ok_or_else(|| {
            let path = self.tree.path(At(Dir::Adopted, name));
            let reason = format!("{KEPT_MAX} of that name are kept there already; remove some");
            let source = io::Error::new(io::ErrorKind::AlreadyExists, reason);
            io_fault("keep another", &path, source)
        })
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
        for name in names {
            // `previous/` has it, and as a file of ours, which may be linked.
            let there = At(Dir::Previous, name.as_str());
            if self.tree.facts(there)?.is_none() || self.kept_as(name, there)?.is_some() {
                continue;
            }
            let kept = self.free_in_adopted(name.as_str())?;
            self.tree.link(there, At(Dir::Adopted, &kept))?;
            tracing::info!(%name, kept, "the host's own file is kept, the fleet publishes its name");
        }
        self.tree.sync_dir(Dir::Adopted)
    }

    /// Forgets what [`Swap::adopt`] kept: the set is taken back, and the host's files stand there
    /// again.
    pub(super) fn give_up(&self, names: &[DatabaseName]) -> Result<(), HostFault> {
        for name in names {
            if let Some(kept) = self.kept_as(name, At(Dir::Previous, name.as_str()))? {
                self.tree.remove(At(Dir::Adopted, &kept))?;
            }
        }
        Ok(())
    }

    /// Under which name this very file is kept.
    fn kept_as(&self, name: &DatabaseName, file: At<'_>) -> Result<Option<String>, HostFault> {
        for kept in self.places(name.as_str())?.0 {
            if self.is_one_file(At(Dir::Adopted, &kept), file)? {
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

/// Whether a set owns this name: it has a file of it, or a successor for one.
pub(super) fn is_owned(manifest: &Manifest, name: &DatabaseName) -> bool {
    is_among(manifest.files.iter().map(|file| &file.name), name)
}

/// The same of the names of a set.
fn is_among<'n>(mut names: impl Iterator<Item = &'n DatabaseName>, name: &DatabaseName) -> bool {
    names.any(|owned| owned == name || succeeds(owned, name))
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

/// The name that a file in `adopted/` had: `local.ign2` for `local.ign2` and `local.ign2-2`.
fn original(entry: &str) -> Option<DatabaseName> {
    let numbered = entry
        .rsplit_once('-')
        .filter(|(name, number)| name.contains('.') && number.parse::<u32>().is_ok_and(|n| n >= 2));
    numbered.map_or(entry, |(name, _)| name).parse().ok()
}
