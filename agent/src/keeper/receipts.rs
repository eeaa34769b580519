//! Receipts that the master has not acknowledged yet, on disk.
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
use clamcast_proto::dsse::Envelope;
use clamcast_proto::receipt::Receipt;
use clamcast_proto::wire::RECEIPTS_PENDING_MAX;

use crate::core::receipts::Receipts;
use crate::host::state::{self, StateError};

const LAST: &str = "last.json";

/// Entries of the directory that are looked at: what waits, and what could not be removed since.
const ENTRIES_MAX: usize = 10_000;

/// Reads what waits in the state directory. A damaged receipt is dropped with a warning: it could not
/// be sent. A damaged `last.json` is set aside as `last.json.damaged`.
pub fn open(state: &Path) -> Result<Receipts, StateError> {
    let directory = directory(state);
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
        match state::load::<Envelope>(&path(state, seq), "the receipt is lost") {
            Ok(Some(envelope)) => {
                pending.insert(seq, envelope);
            }
            Ok(None) => {}
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(seq, error, "receipt dropped");
            }
        }
    }
    if let Some(newest) = pending.last_key_value().map(|(_, newest)| &newest.payload)
        && let Ok(newest) = serde_json::from_slice::<Receipt>(newest)
        && last.as_ref().is_none_or(|last| last.seq < newest.seq)
    {
        last = Some(newest); // only we write here, so no signature is looked at
    }
    Ok(Receipts::new(pending, highest, last))
}

/// Keeps a receipt.
pub fn save(state: &Path, seq: u64, receipt: &Envelope) -> Result<(), StateError> {
    state::save(&path(state, seq), receipt)
}

/// Removes a receipt. `last`: what it said, if it is the newest one. Crashing between the two leaves a
/// receipt that is sent again, which is harmless.
pub fn done(state: &Path, seq: u64, last: Option<&Receipt>) -> Result<(), StateError> {
    if let Some(last) = last {
        state::save(&directory(state).join(LAST), last)?;
    }
    let path = path(state, seq);
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(StateError::Write { path, source })
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn directory(state: &Path) -> PathBuf {
    state.join("receipts")
}

fn path(state: &Path, seq: u64) -> PathBuf {
    directory(state).join(format!("{seq}.json"))
}

/// Reads the newest receipt in the agent's state directory, for programs other than the daemon. It
/// changes nothing.
///
/// # Errors
///
/// If the receipts cannot be read.
pub fn newest(state: &Path) -> Result<Option<Receipt>, StateError> {
    let directory = directory(state);
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
    use crate::core::Record;
    use clamcast_proto::dsse::PublicKey;
    use clamcast_proto::receipt::{ClamdReport, InstallNumber, Outcome};
    use clamcast_proto::{Digest, Epoch, Generation};
    use ed25519_dalek::SigningKey;
    use jiff::Timestamp;

    fn key() -> SigningKey {
        SigningKey::from_bytes(&[1; 32])
    }

    /// Keeps what is to be kept, as the keeper does.
    fn keep(state: &Path, records: impl IntoIterator<Item = Record>) -> Result<(), StateError> {
        records.into_iter().try_for_each(|record| {
            if let Record::Receipt(seq, receipt) = record {
                return save(state, seq, &receipt);
            }
            let Record::ReceiptDone(seq, last) = record else {
                panic!("{record:?}");
            };
            done(state, seq, last.as_deref())
        })
    }

    fn acknowledge(state: &Path, receipts: &mut Receipts, seq: u64) {
        keep(state, receipts.acknowledge(seq)).unwrap();
        receipts.forget(seq);
    }

    fn add(state: &Path, receipts: &mut Receipts) {
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
        let (records, _) = receipts.add(&key(), receipt);
        keep(state, records).unwrap();
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
        let mut receipts = open(dir.path()).unwrap();
        add(dir.path(), &mut receipts);
        add(dir.path(), &mut receipts);
        check(&receipts, &[1, 2]);
        let mut receipts = open(dir.path()).unwrap();
        check(&receipts, &[1, 2]);
        acknowledge(dir.path(), &mut receipts, 1);
        acknowledge(dir.path(), &mut receipts, 1);
        acknowledge(dir.path(), &mut receipts, 99);
        check(&open(dir.path()).unwrap(), &[2]);
    }

    #[test]
    fn whoever_looks_on_sees_the_newest_one_wherever_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let seen = || newest(dir.path()).unwrap().map(|receipt| receipt.seq);
        assert_eq!(seen(), None);
        let mut receipts = open(dir.path()).unwrap();
        assert_eq!(seen(), None);
        add(dir.path(), &mut receipts);
        assert_eq!(seen(), Some(1));
        add(dir.path(), &mut receipts);
        acknowledge(dir.path(), &mut receipts, 1);
        assert_eq!(seen(), Some(2));
        acknowledge(dir.path(), &mut receipts, 2);
        assert_eq!(seen(), Some(2));
    }

    #[test]
    fn numbers_go_on_after_everything_was_acknowledged() {
        let dir = tempfile::tempdir().unwrap();
        let mut receipts = open(dir.path()).unwrap();
        add(dir.path(), &mut receipts);
        add(dir.path(), &mut receipts);
        acknowledge(dir.path(), &mut receipts, 2);
        acknowledge(dir.path(), &mut receipts, 1);
        let mut receipts = open(dir.path()).unwrap();
        assert_eq!(receipts.last().map(|last| last.seq), Some(2));
        add(dir.path(), &mut receipts);
        check(&receipts, &[3]);
    }

    #[test]
    fn of_too_many_the_oldest_go() {
        let dir = tempfile::tempdir().unwrap();
        let mut receipts = open(dir.path()).unwrap();
        for _ in 0..=RECEIPTS_PENDING_MAX {
            add(dir.path(), &mut receipts);
        }
        let kept: Vec<_> = (2..=RECEIPTS_PENDING_MAX as u64 + 1).collect();
        check(&receipts, &kept);
        fs::copy(path(dir.path(), 2), path(dir.path(), 1)).unwrap();
        check(&open(dir.path()).unwrap(), &kept);
    }

    #[test]
    fn a_damaged_receipt_does_not_stop_the_agent_and_its_number_is_not_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut receipts = open(dir.path()).unwrap();
        add(dir.path(), &mut receipts);
        fs::write(path(dir.path(), 1), "{").unwrap();
        let mut receipts = open(dir.path()).unwrap();
        check(&receipts, &[]);
        add(dir.path(), &mut receipts);
        check(&receipts, &[2]);
    }

    #[test]
    fn a_damaged_record_of_the_last_one_is_set_aside_and_numbers_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let mut receipts = open(dir.path()).unwrap();
        add(dir.path(), &mut receipts);
        add(dir.path(), &mut receipts);
        let path = directory(dir.path()).join(LAST);
        for damage in [&b"{"[..], b"\xff\xfe", b""] {
            fs::write(&path, damage).unwrap();
            let receipts = open(dir.path()).unwrap();
            assert_eq!(receipts.last().map(|last| last.seq), Some(2));
            assert!(!path.exists());
            let aside = fs::read(directory(dir.path()).join("last.json.damaged"));
            assert_eq!(aside.unwrap(), damage);
        }
        let mut receipts = open(dir.path()).unwrap();
        add(dir.path(), &mut receipts);
        check(&receipts, &[1, 2, 3]);
    }
}
