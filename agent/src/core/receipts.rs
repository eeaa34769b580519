//! Receipts that the master has not acknowledged yet.
//!
//! Each is a file `SEQ.json` until then, so it outlives a lost connection, a crash and a master
//! that was away. `last.json` is what the newest one said, before its file goes: so no number is
//! ever used twice, none is left out, and the host knows after a restart what it said last. Should
//! it be damaged, numbers go on above the receipts that still wait. That may use one twice, which
//! is harmless: the master knows receipts by their digest.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clamcast_daemon::{durable, input};
use clamcast_proto::dsse::{Envelope, sign};
use clamcast_proto::receipt::Receipt;
use clamcast_proto::wire::RECEIPTS_PENDING_MAX;
use ed25519_dalek::SigningKey;

use crate::host::state::{self, StateError};

const LAST: &str = "last.json";

/// Entries of the directory that are looked at: what waits, and what could not be removed since.
const ENTRIES_MAX: usize = 10_000;

/// The receipts of one host.
#[derive(Debug)]
pub struct Receipts {
    directory: PathBuf,
    pending: BTreeMap<u64, Envelope>,
    highest: u64,
    last: Option<Receipt>,
}

impl Receipts {
    /// Reads what waits in the state directory. A damaged receipt is dropped with a warning: it
    /// could not be sent. A damaged `last.json` is set aside as `last.json.damaged`.
    pub fn open(state: &Path) -> Result<Self, StateError> {
        let directory = state.join("receipts");
        durable::create_dir(&directory, 0o700).map_err(|source| StateError::Directory {
            path: directory.clone(),
            source,
        })?;
        let read = |source| StateError::Read {
            path: directory.clone(),
            source,
        };
        let mut last = load_last(&directory.join(LAST))?;
        let mut highest = last.as_ref().map_or(0, |last| last.seq);
        let mut pending = BTreeMap::new();
        let mut waiting = numbers(&directory).map_err(read)?;
        highest = highest.max(waiting.last().copied().unwrap_or(0));
        // The rest waits on disk for a start with room for it.
        let waiting = waiting.split_off(waiting.len().saturating_sub(RECEIPTS_PENDING_MAX));
        for seq in waiting {
            let path = directory.join(format!("{seq}.json"));
            match state::load::<Envelope>(&path, "the receipt is lost") {
                Ok(Some(envelope)) => {
                    pending.insert(seq, envelope);
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(
                        seq,
                        error = &error as &dyn std::error::Error,
                        "receipt dropped"
                    );
                }
            }
        }
        if let Some(newest) = pending.last_key_value().map(|(_, newest)| &newest.payload)
            && let Ok(newest) = serde_json::from_slice::<Receipt>(newest)
            && last.as_ref().is_none_or(|last| last.seq < newest.seq)
        {
            last = Some(newest); // only we write here, so no signature is looked at
        }
        Ok(Self {
            directory,
            pending,
            highest,
            last,
        })
    }

    /// What the newest receipt said.
    pub fn last(&self) -> Option<&Receipt> {
        self.last.as_ref()
    }

    /// Numbers, signs and keeps a receipt; it is on disk when this returns. Where the disk fails, which
    /// may be what it is about, it is kept in memory: a crash may lose it, and the master hears it.
    pub fn add(&mut self, key: &SigningKey, receipt: impl FnOnce(u64) -> Receipt) -> Envelope {
        // A host that is cut off for months writes one for every install and fault; what came of
        // the last generations is what counts.
        while self.pending.len() >= RECEIPTS_PENDING_MAX {
            let (&oldest, _) = self.pending.first_key_value().expect("it is full");
            tracing::warn!(
                seq = oldest,
                "receipt dropped: {RECEIPTS_PENDING_MAX} wait for the master already"
            );
            if let Err(error) = self.forget(oldest) {
                tracing::error!(
                    error = crate::chain(&error),
                    "a dropped receipt stays on disk"
                );
                self.pending.remove(&oldest);
            }
        }
        let seq = self.highest + 1;
        let receipt = sign(receipt(seq), key);
        let envelope = receipt.envelope().clone();
        if let Err(error) = state::save(&self.path(seq), &envelope) {
            tracing::error!(error = crate::chain(&error), "a receipt is only in memory");
        }
        self.highest = seq;
        self.last = Some((*receipt).clone());
        self.pending.insert(seq, envelope.clone());
        envelope
    }

    /// What waits, oldest first.
    pub fn pending(&self) -> impl ExactSizeIterator<Item = &Envelope> {
        self.pending.values()
    }

    /// The master has it in its audit log.
    pub fn acknowledge(&mut self, seq: u64) -> Result<(), StateError> {
        if !self.pending.contains_key(&seq) {
            return Ok(()); // acknowledged twice: it was sent on two connections
        }
        self.forget(seq)
    }

    /// Crashing between the two leaves a receipt that is sent again, which is harmless.
    fn forget(&mut self, seq: u64) -> Result<(), StateError> {
        if let Some(last) = self.last.as_ref().filter(|last| last.seq == seq) {
            state::save(&self.directory.join(LAST), last)?;
        }
        let path = self.path(seq);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(StateError::Write { path, source });
            }
            Ok(()) | Err(_) => {}
        }
        self.pending.remove(&seq);
        Ok(())
    }

    fn path(&self, seq: u64) -> PathBuf {
        self.directory.join(format!("{seq}.json"))
    }
}

/// What the newest receipt in the agent's state directory said, for whoever looks on from outside:
/// nothing is changed.
///
/// # Errors
///
/// If the receipts cannot be read.
pub fn newest(state: &Path) -> Result<Option<Receipt>, StateError> {
    let directory = state.join("receipts");
    let last: Option<Receipt> = state::load(&directory.join(LAST), "it is written anew")?;
    let read = |source| StateError::Read {
        path: directory.clone(),
        source,
    };
    let waiting = match numbers(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(last),
        waiting => waiting.map_err(read)?,
    };
    let highest = waiting.last().copied().unwrap_or(0);
    let path = directory.join(format!("{highest}.json"));
    let waiting = state::load::<Envelope>(&path, "the receipt is lost")?;
    let waiting = waiting.and_then(|it| serde_json::from_slice::<Receipt>(&it.payload).ok());
    let receipts = [last, waiting].into_iter().flatten();
    Ok(receipts.max_by_key(|receipt| receipt.seq))
}

/// The numbers of the receipts that wait in a directory, in order.
fn numbers(directory: &Path) -> io::Result<Vec<u64>> {
    let number = |name: OsString| name.to_str()?.strip_suffix(".json")?.parse().ok();
    let names = input::names(directory, ENTRIES_MAX)?;
    let mut numbers: Vec<_> = names.into_iter().filter_map(number).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// What the newest receipt said. A damaged file is no reason not to start: a host without its agent
/// gets no signatures.
fn load_last(path: &Path) -> Result<Option<Receipt>, StateError> {
    match state::load(path, "numbers go on above the receipts that wait") {
        Err(error @ StateError::Damaged { .. }) => {
            let aside = path.with_added_extension("damaged");
            tracing::warn!(
                error = crate::chain(&error),
                ?aside,
                "going on without what the last receipt said, the file is set aside"
            );
            if let Err(error) = fs::rename(path, &aside) {
                tracing::warn!(%error, ?path, "cannot set it aside"); // the next one replaces it
            }
            Ok(None)
        }
        loaded => loaded,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clamcast_proto::dsse::PublicKey;
    use clamcast_proto::receipt::{ClamdReport, InstallNumber, Outcome};
    use clamcast_proto::{Digest, Epoch, Generation};
    use jiff::Timestamp;

    fn key() -> SigningKey {
        SigningKey::from_bytes(&[1; 32])
    }

    #[test]
    fn a_receipt_that_cannot_be_written_is_told_nonetheless() {
        let state = tempfile::tempdir().unwrap();
        let mut receipts = Receipts::open(state.path()).unwrap();
        add(&mut receipts);
        // Nothing can be made there any more, whoever runs this.
        fs::remove_dir_all(state.path().join("receipts")).unwrap();
        add(&mut receipts);
        assert_eq!(receipts.pending().len(), 2);
        assert_eq!(receipts.last().map(|last| last.seq), Some(2));
        assert!(receipts.acknowledge(2).is_err());
        fs::create_dir(state.path().join("receipts")).unwrap();
        receipts.acknowledge(2).unwrap();
        assert_eq!(receipts.pending().len(), 1);
    }

    fn add(receipts: &mut Receipts) {
        let receipt = |seq| Receipt {
            fleet: "bank".parse().unwrap(),
            agent: "web1".parse().unwrap(),
            seq,
            epoch: Epoch(1),
            generation: Generation::FIRST,
            manifest_sha256: Digest::of(b""),
            install: InstallNumber(1),
            outcome: Outcome::Live,
            content: None,
            files: Vec::new(),
            missing: Vec::new(),
            unlisted: 0,
            foreign: Vec::new(),
            adopted: Vec::new(),
            drift: Vec::new(),
            clamd: ClamdReport::default(),
            error: None,
            blamed: None,
            took: 1.5,
            time: Timestamp::UNIX_EPOCH,
        };
        receipts.add(&key(), receipt);
    }

    #[track_caller]
    fn check(receipts: &Receipts, expected: &[u64]) {
        let public = PublicKey::of(&key());
        let seq = |envelope: &Envelope| envelope.verify::<Receipt>([&public]).unwrap().seq;
        assert_eq!(receipts.pending().map(seq).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_receipt_waits_until_it_is_acknowledged_also_over_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let mut receipts = Receipts::open(dir.path()).unwrap();
        add(&mut receipts);
        add(&mut receipts);
        check(&receipts, &[1, 2]);
        let mut receipts = Receipts::open(dir.path()).unwrap();
        check(&receipts, &[1, 2]);
        receipts.acknowledge(1).unwrap();
        receipts.acknowledge(1).unwrap();
        receipts.acknowledge(99).unwrap();
        check(&Receipts::open(dir.path()).unwrap(), &[2]);
    }

    #[test]
    fn whoever_looks_on_sees_the_newest_one_wherever_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let seen = || newest(dir.path()).unwrap().map(|receipt| receipt.seq);
        assert_eq!(seen(), None);
        let mut receipts = Receipts::open(dir.path()).unwrap();
        assert_eq!(seen(), None);
        add(&mut receipts);
        assert_eq!(seen(), Some(1));
        add(&mut receipts);
        receipts.acknowledge(1).unwrap();
        assert_eq!(seen(), Some(2));
        receipts.acknowledge(2).unwrap();
        assert_eq!(seen(), Some(2));
    }

    #[test]
    fn numbers_go_on_after_everything_was_acknowledged() {
        let dir = tempfile::tempdir().unwrap();
        let mut receipts = Receipts::open(dir.path()).unwrap();
        add(&mut receipts);
        add(&mut receipts);
        receipts.acknowledge(2).unwrap();
        receipts.acknowledge(1).unwrap();
        let mut receipts = Receipts::open(dir.path()).unwrap();
        assert_eq!(receipts.last().map(|last| last.seq), Some(2));
        add(&mut receipts);
        check(&receipts, &[3]);
    }

    #[test]
    fn of_too_many_the_oldest_go() {
        let dir = tempfile::tempdir().unwrap();
        let mut receipts = Receipts::open(dir.path()).unwrap();
        for _ in 0..=RECEIPTS_PENDING_MAX {
            add(&mut receipts);
        }
        let kept: Vec<_> = (2..=RECEIPTS_PENDING_MAX as u64 + 1).collect();
        check(&receipts, &kept);
        fs::copy(receipts.path(2), receipts.path(1)).unwrap();
        check(&Receipts::open(dir.path()).unwrap(), &kept);
    }

    #[test]
    fn a_damaged_receipt_does_not_stop_the_agent_and_its_number_is_not_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut receipts = Receipts::open(dir.path()).unwrap();
        add(&mut receipts);
        fs::write(receipts.path(1), "{").unwrap();
        let mut receipts = Receipts::open(dir.path()).unwrap();
        check(&receipts, &[]);
        add(&mut receipts);
        check(&receipts, &[2]);
    }

    #[test]
    fn a_damaged_record_of_the_last_one_is_set_aside_and_numbers_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let mut receipts = Receipts::open(dir.path()).unwrap();
        add(&mut receipts);
        add(&mut receipts);
        let path = receipts.directory.join(LAST);
        for damage in [&b"{"[..], b"\xff\xfe", b""] {
            fs::write(&path, damage).unwrap();
            let receipts = Receipts::open(dir.path()).unwrap();
            assert_eq!(receipts.last().map(|last| last.seq), Some(2));
            assert!(!path.exists());
            let aside = fs::read(receipts.directory.join("last.json.damaged"));
            assert_eq!(aside.unwrap(), damage);
        }
        let mut receipts = Receipts::open(dir.path()).unwrap();
        add(&mut receipts);
        check(&receipts, &[1, 2, 3]);
    }
}
