//! A host's disk, which outlives the agent.

use std::collections::{BTreeMap, BTreeSet};

use clamcast_agent::core::left_alone::LeftAlone;
use clamcast_agent::core::receipts::Receipts;
use clamcast_agent::core::{KeptFresh, KeptMark, Record};
use clamcast_agent::install::journal::{Installed, Journal, Refusal};
use clamcast_proto::dsse::Envelope;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::{FileState, InstallNumber, Outcome, Receipt};
use clamcast_proto::wire::Features;
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
    /// Files that a load test is made of.
    pub(super) trial: Vec<FileState>,
    /// The records of the agent.
    pub(super) records: Records,
    /// Whether somebody has damaged the databases since a set was put in place.
    pub(super) is_damaged: bool,
    pub(super) trouble: Trouble,
    /// The host crashed in a write: from there on no write has an effect.
    pub(super) has_crashed: bool,
}

/// What the agent keeps of its own.
#[derive(Debug, Default)]
pub(super) struct Records {
    pub(super) mark: Option<KeptMark>,
    pub(super) fresh: Option<KeptFresh>,
    pub(super) accepts: Features,
    pub(super) left_alone: Option<LeftAlone>,
    /// Receipts that the master has not acknowledged.
    pub(super) receipts: BTreeMap<u64, Envelope>,
    pub(super) last_receipt: Option<Receipt>,
}

impl Records {
    pub(super) fn save(&mut self, record: Record) {
        match record {
            Record::Mark(mark) => self.mark = Some(mark),
            Record::Fresh(fresh) => self.fresh = Some(fresh),
            Record::Accepts(features) => self.accepts = features,
            Record::LeftAlone(record) => self.left_alone = Some(record),
            Record::Receipt(seq, receipt) => _ = self.receipts.insert(seq, receipt),
            Record::ReceiptDone(seq, last) => {
                if let Some(last) = last {
                    self.last_receipt = Some(*last);
                }
                self.receipts.remove(&seq);
            }
            Record::Keys(_) | Record::Checkpoint(_) => {
                unreachable!("this master has one key set, and says nothing of its log")
            }
        }
    }

    /// The receipts, as an agent reads them at its start.
    pub(super) fn receipts(&self) -> Receipts {
        let newest = self.receipts.last_key_value();
        let waiting =
            newest.and_then(|(_, it)| serde_json::from_slice::<Receipt>(&it.payload).ok());
        let newest = [self.last_receipt.clone(), waiting].into_iter().flatten();
        let last = newest.max_by_key(|receipt| receipt.seq);
        let highest = last.as_ref().map_or(0, |last| last.seq);
        Receipts::new(self.receipts.clone(), highest, last)
    }
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
        if self.has_crashed {
            return Fate::Crash;
        }
        let fate = self.next_fate();
        self.has_crashed |= fate == Fate::Crash;
        fate
    }

    fn next_fate(&mut self) -> Fate {
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

    /// Whether clamd was seen with the installed set.
    pub(super) fn is_live(&self) -> bool {
        let installed = self.installed.as_ref();
        installed.is_some_and(|installed| installed.outcome == Outcome::Live)
    }

    /// Stages this content if it is somewhere; whether it is staged then.
    pub(super) fn stage_if_here(&mut self, digest: &Digest) -> bool {
        let is_here = self.has(digest);
        if is_here {
            self.stage.insert(*digest);
        }
        is_here
    }

    /// Whether this content is somewhere.
    pub(super) fn has(&self, digest: &Digest) -> bool {
        self.stage.contains(digest)
            || self.previous.contains(digest)
            || self.databases.values().any(|file| file.sha256 == *digest)
    }

    /// Whether exactly the files of this generation are in the directory.
    pub(super) fn holds(&self, manifest: &Manifest) -> bool {
        let files = &manifest.files;
        self.databases.len() == files.len()
            && files.iter().all(|file| {
                let there = self.databases.get(&file.name);
                there.is_some_and(|there| there.sha256 == file.sha256)
            })
    }

    /// Puts a journal's files in place, then canary and gate; what does not go well ends it
    /// anywhere. Returns how it went, and whether anything was changed by then.
    pub(super) fn swap(&mut self, journal: &Journal, random: &mut StdRng) -> (Fate, bool) {
        if self.has_crashed {
            return (Fate::Crash, false);
        }
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
