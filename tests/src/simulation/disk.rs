//! A host's disk, which outlives the agent.

use std::collections::{BTreeMap, BTreeSet};

use clamcast_agent::install::journal::{Installed, Journal, Refusal};
use clamcast_proto::dsse::Verified;
use clamcast_proto::receipt::{FileState, InstallNumber, Receipt};
use clamcast_proto::trust::Mark;
use clamcast_proto::{DatabaseName, Digest};
use rand::Rng as _;
use rand::rngs::StdRng;

/// What is on it.
#[derive(Debug, Default)]
pub(super) struct Disk {
    /// The database directory.
    pub(super) databases: BTreeMap<DatabaseName, FileState>,
    /// What canary and gate in it say.
    pub(super) gate: Option<InstallNumber>,
    /// Files that were received.
    pub(super) stage: BTreeSet<Digest>,
    /// Files of the set before.
    pub(super) previous: BTreeSet<Digest>,
    pub(super) journal: Option<Box<Journal>>,
    pub(super) installed: Option<Box<Installed>>,
    pub(super) refusals: Vec<Refusal>,
    pub(super) mark: Option<Mark>,
    /// Those that the master has not acknowledged.
    pub(super) receipts: BTreeMap<u64, Verified<Receipt>>,
    /// Number of the last one.
    pub(super) receipts_made: u64,
    pub(super) trouble: Trouble,
}

/// What is going to go wrong.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) enum Trouble {
    #[default]
    None,
    /// The write after so many more fails.
    Fault(u32),
    /// The host crashes there.
    Crash(u32),
    /// No room is left.
    Full,
}

/// How one write goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fate {
    Done,
    Fault,
    Crash,
}

impl Disk {
    /// How the next write goes.
    pub(super) fn fate(&mut self) -> Fate {
        match &mut self.trouble {
            Trouble::None => Fate::Done,
            Trouble::Full => Fate::Fault,
            Trouble::Fault(0) => {
                self.trouble = Trouble::None;
                Fate::Fault
            }
            Trouble::Crash(0) => {
                self.trouble = Trouble::None;
                Fate::Crash
            }
            Trouble::Fault(left) | Trouble::Crash(left) => {
                *left -= 1;
                Fate::Done
            }
        }
    }

    /// Stages what is here of these files.
    pub(super) fn stage_what_is_here(&mut self, files: &[FileState]) {
        let here = files
            .iter()
            .map(|file| file.sha256)
            .filter(|digest| self.has(digest));
        let here: Vec<_> = here.collect();
        self.stage.extend(here);
    }

    /// Whether this content is somewhere.
    pub(super) fn has(&self, digest: &Digest) -> bool {
        self.stage.contains(digest)
            || self.previous.contains(digest)
            || self.databases.values().any(|file| file.sha256 == *digest)
    }

    /// Whether exactly these files are in the directory.
    pub(super) fn holds(&self, files: &[FileState]) -> bool {
        self.databases.len() == files.len()
            && files
                .iter()
                .all(|file| self.databases.get(&file.name) == Some(file))
    }

    /// Puts a journal's files in place, then canary and gate; what does not go well ends it
    /// anywhere. Returns how it went, and whether anything was changed by then.
    pub(super) fn swap(&mut self, journal: &Journal, random: &mut StdRng) -> (Fate, bool) {
        let fate = self.fate();
        let is_lost = |file: &FileState| !self.has(&file.sha256);
        let fate = match fate {
            Fate::Done if journal.files.iter().any(is_lost) => Fate::Fault,
            Fate::Done | Fate::Fault | Fate::Crash => fate,
        };
        let steps = journal.files.len() + journal.withdraw.len() + 1;
        let (mut left, whole) = match fate {
            Fate::Done => (steps, true),
            Fate::Fault | Fate::Crash => (random.random_range(0..steps), false),
        };
        let mut touched = false;
        let mut may = || {
            let may = left > 0;
            left = left.saturating_sub(1);
            touched |= may;
            may
        };
        if !journal.before.files.is_empty() {
            self.previous = journal
                .before
                .files
                .iter()
                .map(|file| file.sha256)
                .collect();
        }
        for file in &journal.files {
            if may() && self.has(&file.sha256) {
                self.databases.insert(file.name.clone(), file.clone());
            }
        }
        for name in &journal.withdraw {
            if may() {
                self.databases.remove(name);
            }
        }
        if whole {
            self.gate = Some(journal.install);
        }
        (fate, touched)
    }
}
