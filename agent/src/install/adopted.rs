//! The host's own files under names of the fleet: kept in `adopted/` while the fleet publishes the
//! name, and restored when the fleet withdraws it.
//!
//! `adopted/` itself is the record, so nothing else has to survive a restart or the loss of the
//! state directory. A file is restored by a rename over the fleet's file: the name is never
//! missing, and a replay finds that the kept file is gone and does nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use clamcast_proto::DatabaseName;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::ADOPTED_MAX;

use super::disk::{At, Dir, Facts, HostFault, io_fault};
use super::journal::{Installed, Journal, Moved};
use super::stage::state_of;
use super::swap::{Swap, succeeds};

/// So much is kept in `adopted/` of what stood in the place of one database. One more is a fault, for
/// somebody to look at.
const KEPT_MAX: u32 = 100;

impl Swap<'_> {
    /// The host's own files under names that `manifest` owns, bounded as a receipt is.
    pub(super) fn adopted(&self, manifest: &Manifest) -> Result<Vec<DatabaseName>, HostFault> {
        let kept = self.kept()?.into_keys();
        let adopted = kept.filter(|name| is_owned(manifest, name));
        Ok(adopted.take(ADOPTED_MAX).collect())
    }

    /// What `adopted/` holds: for each name the file that was kept last.
    fn kept(&self) -> Result<BTreeMap<DatabaseName, String>, HostFault> {
        let mut newest = BTreeMap::<DatabaseName, (i128, String)>::new();
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
            let known = newest.get(&name).map(|(kept, _)| *kept);
            if !facts.directory && known < Some(facts.changed) {
                newest.insert(name, (facts.changed, entry.to_owned()));
            }
        }
        let newest = newest.into_iter();
        Ok(newest.map(|(name, (_, entry))| (name, entry)).collect())
    }

    /// The host's files that come back with `target`: it owns their names no more, and an earlier
    /// set did. Where the host has put a newer file of its own there meanwhile, that one stays:
    /// these names are returned, too.
    pub(super) fn to_restore(
        &self,
        target: &Manifest,
        earlier: &[&Manifest],
    ) -> Result<(Vec<Moved>, BTreeSet<DatabaseName>), HostFault> {
        let (mut restore, mut stay) = (Vec::new(), BTreeSet::new());
        for (name, kept) in self.kept()? {
            let was_owned = earlier.iter().any(|set| is_owned(set, &name));
            if is_owned(target, &name) || !was_owned {
                continue;
            }
            let there = self.tree.facts(At(Dir::Databases, name.as_str()))?;
            if there.is_some_and(|there| there.regular) && self.is_taken(&name, earlier)? {
                tracing::warn!(%name, "the host has a newer file of its own, the adopted one stays kept");
                stay.insert(name);
            } else {
                restore.push(Moved { name, kept });
            }
        }
        Ok((restore, stay))
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
        let earlier = earlier_sets(journal.before.installed.as_ref(), None);
        let kept = At(Dir::Adopted, kept);
        if self.tree.facts(kept)?.is_some() || !self.is_taken(name, &earlier)? {
            return Ok(()); // it was not restored, or is kept again
        }
        let there = At(Dir::Databases, name.as_str());
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
    manifest.file(name).is_some() || succeeds(manifest, name)
}

/// The manifests of the sets before a new one, proven or not.
pub(super) fn earlier_sets<'s>(
    installed: Option<&'s Installed>,
    open: Option<&'s Journal>,
) -> Vec<&'s Manifest> {
    let open_set = open.map(|journal| &journal.set.manifest);
    let before = open.and_then(|journal| journal.before.installed.as_ref());
    let installed = installed.into_iter().chain(before);
    let installed = installed.map(|installed| &installed.set.manifest);
    installed.chain(open_set).collect()
}

/// The name that a file in `adopted/` had: `local.ign2` for `local.ign2` and `local.ign2-2`.
fn original(entry: &str) -> Option<DatabaseName> {
    let numbered = entry
        .rsplit_once('-')
        .filter(|(name, number)| name.contains('.') && number.parse::<u32>().is_ok_and(|n| n >= 2));
    numbered.map_or(entry, |(name, _)| name).parse().ok()
}
