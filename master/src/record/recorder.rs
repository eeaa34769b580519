//! Writes what must last: the audit log, what is known of each agent, the certificates that agents
//! came with, the state of the rollout, and what was withdrawn.
//!
//! One thread of its own, because every write ends in an fsync. Entries that wait together are
//! written together, so that a whole fleet's receipts cost a few fsyncs and not thousands. Nobody
//! waits in order to hand an entry over: whoever needs it on disk waits for its number
//! ([`Recorder::durable`]), and whoever makes many entries waits for room ([`Recorder::room`]).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use clamcast_daemon::alarms::Alarm;
use clamcast_daemon::audit::{self, Draft};
use clamcast_daemon::durable;
use clamcast_daemon::input;
use clamcast_proto::Digest;
use jiff::Timestamp;
use serde_json::json;
use tokio::sync::watch;

use super::entry::{Entry, FileName};
use super::reserve::{self, Reserve};

/// From this many entries that wait for the disk on there is no room for more, but for those that
/// nobody can make many of.
pub const ENTRIES_MAX: u64 = 4096;

/// Entries written together: what the audit log syncs at once.
const BATCH_MAX: usize = audit::BATCH_MAX;

/// Longest detail of a record in bytes of JSON: with the rest it fits a line of the audit log. Of a
/// longer one, which nothing writes on purpose, the digest is kept.
const DETAIL_BYTES_MAX: usize = 1_000_000;

/// Time between two tries when the disk refuses.
const RETRY: Duration = Duration::from_secs(1);

/// A write that takes longer is an alarm: the disk neither takes it nor refuses it.
const SLOW: Duration = Duration::from_secs(10);

/// Longest file in bytes that is read at a start: a record holds what one Hello can tell.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Most files in the directory of the agents' records, with those that a crash left behind.
const FILES_MAX: usize = 100_000;

/// What a file is written as to see whether its directory takes it.
const PROBE: &str = ".probed.new"; // a start removes what a crash left of it

/// Where the files are, beside the audit log.
#[derive(Clone, Debug)]
pub struct Places {
    /// The directory of the agents' records.
    pub agents: PathBuf,
    /// The directory of their certificates.
    pub certificates: PathBuf,
    /// The directory of the rest.
    pub state: PathBuf,
}

/// How far the disk is.
#[derive(Clone, Debug)]
pub struct Durable {
    /// The number of the last entry that is on disk, with all before it.
    pub number: u64,
    /// The signed head of the audit log.
    pub checkpoint: Arc<str>,
}

/// The daemon stops before the entry is on disk.
#[derive(Debug, thiserror::Error)]
#[error("the daemon stops, and the disk refuses")]
pub struct NotDurable;

/// The way to the writing thread.
#[derive(Clone, Debug)]
pub struct Recorder {
    queue: Arc<Mutex<Queue>>,
    durable: watch::Receiver<Durable>,
    trouble: Arc<Trouble>,
    give_up: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Queue {
    /// The number of the last entry that was handed over.
    last: u64,
    entries: std_mpsc::Sender<(u64, Entry)>,
}

/// What is wrong with the disk.
#[derive(Debug, Default)]
struct Trouble {
    /// Why nothing can be written at the moment.
    refused: Mutex<Option<(String, Timestamp)>>,
    /// Since when the reserve of disk space is gone: in use, or never made.
    unreserved: Mutex<Option<(Unreserved, Timestamp)>>,
    /// Since when the present write is under way.
    since: Mutex<Option<(Instant, Timestamp)>>,
    /// Files that cannot be written although others can, and why.
    unwritable: Mutex<BTreeMap<FileName, (String, Timestamp)>>,
}

/// Why there is no reserve of disk space.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Unreserved {
    /// The disk became full, and the reserve was given to it.
    InUse,
    /// The disk had no space for it.
    NoSpace,
}

impl Recorder {
    /// Starts the thread. It ends when the last clone is dropped and all entries are written.
    pub fn start(log: audit::Log, places: Places) -> (Self, thread::JoinHandle<()>) {
        let (entries, inbox) = std_mpsc::channel();
        let start = Durable {
            number: 0,
            checkpoint: log.checkpoint().into(),
        };
        let (written, durable) = watch::channel(start);
        let trouble = Arc::<Trouble>::default();
        let reserve = Reserve::new(&places.state);
        if !reserve.is_held() {
            // The last process may have given it to a full disk: what is left is for operators.
            let why = match reserve.is_short() {
                true => Unreserved::InUse,
                false => Unreserved::NoSpace,
            };
            *lock(&trouble.unreserved) = Some((why, Timestamp::now()));
        }
        let give_up = Arc::<AtomicBool>::default();
        let writer = Writer {
            log,
            places,
            trouble: trouble.clone(),
            give_up: give_up.clone(),
            retry: Files::new(),
            retried: Instant::now(),
            reserve,
        };
        let thread = thread::Builder::new()
            .name("recorder".to_owned())
            .spawn(move || writer.run(&inbox, &written))
            .expect("a thread can be started");
        let recorder = Self {
            queue: Arc::new(Mutex::new(Queue { last: 0, entries })),
            durable,
            trouble,
            give_up,
        };
        (recorder, thread)
    }

    /// Hands an entry over. Returns its number, which is above all that were given before.
    pub fn write(&self, entry: Entry) -> u64 {
        // Numbers are given and entries queued in one order.
        let mut queue = lock(&self.queue);
        queue.last += 1;
        // The thread outlives every sender, unless it gave up or panicked, which its owner reports.
        let _ = queue.entries.send((queue.last, entry));
        queue.last
    }

    /// The number of the last entry that was handed over.
    pub fn last(&self) -> u64 {
        lock(&self.queue).last
    }

    /// Returns when the entry with this number and all before it are on disk.
    pub async fn durable(&self, number: u64) -> Result<(), NotDurable> {
        let mut durable = self.durable.clone();
        let reached = durable.wait_for(|durable| durable.number >= number);
        reached.await.map(drop).map_err(|_| NotDurable)
    }

    /// Writes a line into the audit log and returns when it is there.
    pub async fn note(&self, draft: Draft) -> Result<(), NotDurable> {
        self.durable(self.write(Entry::line(draft))).await
    }

    /// How far the disk is, to be waited on.
    pub fn watch(&self) -> watch::Receiver<Durable> {
        self.durable.clone()
    }

    /// Whether there is room for what agents add: fewer than [`ENTRIES_MAX`] entries wait for the disk, and
    /// the reserve is not in use.
    pub fn has_room(&self) -> bool {
        !self.is_short() && self.last() < self.durable.borrow().number + ENTRIES_MAX
    }

    /// Whether the disk is full and the reserve for operators and alarms is in use.
    pub fn is_short(&self) -> bool {
        let unreserved = lock(&self.trouble.unreserved).map(|(why, _)| why);
        unreserved == Some(Unreserved::InUse)
    }

    /// Returns when there is room for more entries.
    pub async fn room(&self) {
        let mut durable = self.durable.clone();
        while !self.has_room() {
            if durable.changed().await.is_err() {
                return; // the daemon stops
            }
        }
    }

    /// Returns when the thread has ended, which it does before its last sender only by a panic.
    pub async fn ended(&self) {
        let _ = self.durable.clone().wait_for(|_| false).await; // an error: it is gone
    }

    /// Set to true, it makes the thread give up what the disk refuses: for a daemon that stops and has
    /// waited long enough. No message depends on it, so the agents will send it again.
    pub fn give_up(&self) -> Arc<AtomicBool> {
        self.give_up.clone()
    }

    /// Why nothing can be written at the moment.
    pub fn alarm(&self) -> Option<String> {
        self.refusal().map(|(reason, _)| reason)
    }

    /// Why nothing can be written at the moment, and since when.
    fn refusal(&self) -> Option<(String, Timestamp)> {
        let refused = lock(&self.trouble.refused).clone();
        let since = *lock(&self.trouble.since);
        let slow = since.filter(|(since, _)| since.elapsed() > SLOW);
        let slow = slow.map(|(since, clock)| {
            let seconds = since.elapsed().as_secs();
            (
                format!("the disk has not taken a write for {seconds} s"),
                clock,
            )
        });
        let (reason, since) = refused.or(slow)?;
        let durable = self.durable.borrow().number;
        let waiting = self.last().saturating_sub(durable);
        Some((
            format!("{reason}; {waiting} entries wait for the disk"),
            since,
        ))
    }

    /// Alarms about the disk, and about files that it does not take although it takes others.
    pub fn alarms(&self) -> Vec<Alarm> {
        let alarm = |(text, since)| Alarm {
            name: "disk".to_owned(),
            text,
            since,
        };
        let unreserved = lock(&self.trouble.unreserved).map(|(why, since)| {
            let text = match why {
                Unreserved::InUse => {
                    "the disk of the state directory is full: agents' receipts wait, and the reserve for \
                     operators and alarms is in use; free some space"
                }
                Unreserved::NoSpace => {
                    "the disk of the state directory has no space for the reserve of 16 MiB for \
                     operators and alarms; free some space"
                }
            };
            (text.to_owned(), since)
        });
        let unwritable = lock(&self.trouble.unwritable);
        let unwritable = unwritable.values().cloned();
        let disk = self.refusal().into_iter().chain(unreserved);
        disk.chain(unwritable).map(alarm).collect()
    }
}

/// What is read here is whole after a panic, too.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads the records of all agents. A damaged one is reported and left out: the agent says Hello
/// again.
pub fn load<T: serde::de::DeserializeOwned>(agents: &Path) -> io::Result<Vec<T>> {
    let mut records = Vec::new();
    for name in input::names(agents, FILES_MAX)? {
        let path = agents.join(name);
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let text = input::whole(&path, FILE_BYTES_MAX);
        let record = text.and_then(|text| Ok(serde_json::from_slice(&text)?));
        match record {
            Ok(record) => records.push(record),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "an agent's record is damaged and left out");
            }
        }
    }
    Ok(records)
}

struct Writer {
    log: audit::Log,
    places: Places,
    trouble: Arc<Trouble>,
    give_up: Arc<AtomicBool>,
    /// Files that could not be written although others could, until they can.
    retry: Files,
    retried: Instant,
    reserve: Reserve,
}

/// Files with their new content, in the order in which they are written.
type Files = BTreeMap<FileName, Option<Vec<u8>>>;

impl Writer {
    fn run(mut self, inbox: &std_mpsc::Receiver<(u64, Entry)>, written: &watch::Sender<Durable>) {
        let mut number = 0;
        while let Some((last, mut batch)) = self.next(inbox) {
            number = last.unwrap_or(number);
            *lock(&self.trouble.since) = Some((Instant::now(), Timestamp::now()));
            if !self.write(&mut batch) {
                return; // nobody is told of it
            }
            *lock(&self.trouble.since) = None;
            let checkpoint = self.log.checkpoint();
            self.restore_reserve();
            written.send_modify(|durable| {
                durable.number = number;
                if *durable.checkpoint != *checkpoint {
                    durable.checkpoint = checkpoint.into();
                }
            });
        }
    }

    /// Has space reserved again as soon as the disk has enough.
    fn restore_reserve(&mut self) {
        if !self.reserve.is_held() && self.reserve.restore() {
            *lock(&self.trouble.unreserved) = None;
        }
    }

    /// Waits for entries and takes those that wait together, with the number of the last one; or
    /// none, if there is a file or the reserve to be tried again. `None` at the end.
    fn next(&self, inbox: &std_mpsc::Receiver<(u64, Entry)>) -> Option<(Option<u64>, Vec<Entry>)> {
        let first = match self.retry.is_empty() && self.reserve.is_held() {
            true => inbox.recv().ok()?,
            false => match inbox.recv_timeout(RETRY) {
                Ok(first) => first,
                Err(std_mpsc::RecvTimeoutError::Timeout) => return Some((None, Vec::new())),
                Err(std_mpsc::RecvTimeoutError::Disconnected) => return None,
            },
        };
        let (mut number, mut batch) = (first.0, vec![first.1]);
        while batch.len() < BATCH_MAX
            && let Ok((next, entry)) = inbox.try_recv()
        {
            number = next;
            batch.push(entry);
        }
        Some((Some(number), batch))
    }

    /// Tries until the disk takes it. Returns whether it did.
    fn write(&mut self, batch: &mut [Entry]) -> bool {
        let drafts = batch.iter_mut().filter_map(|entry| entry.draft.take());
        let mut drafts: Vec<_> = drafts.map(shortened).collect();
        // Of several contents of one file the last one counts.
        let files = batch.iter_mut().flat_map(|entry| entry.files.drain(..));
        let mut files: Files = files.collect();
        // What could not be written waits for its next try, and holds up no other file.
        for (name, waiting) in &mut self.retry {
            if let Some(newer) = files.remove(name) {
                *waiting = newer;
            }
        }
        self.try_again();
        let of = |files: &mut Files, which: fn(&FileName) -> bool| -> Files {
            files.extract_if(.., |name, _| which(name)).collect()
        };
        let certificates = of(&mut files, |it| matches!(it, FileName::Certificate(_)));
        let agents = of(&mut files, |it| matches!(it, FileName::Agent(_)));
        self.write_each(&certificates, "the agents' certificates")
            && self.until_written("the audit log", |writer| {
                let before = writer.log.records();
                let written = writer.log.append_all(drafts.clone(), Timestamp::now());
                if writer.log.records() > before {
                    drafts.clear(); // in the log; what may be left to do is to sign it
                }
                written.map(drop).map_err(|error| {
                    let is_full = matches!(&error, audit::AuditError::Write { source, .. }
                        if reserve::is_full(source));
                    let kind = match is_full {
                        true => io::ErrorKind::StorageFull,
                        false => io::ErrorKind::Other,
                    };
                    io::Error::new(kind, crate::chain(&error))
                })
            })
            && self.write_each(&agents, "the agents' records")
            && self.until_written("the state of the rollout", |writer| {
                let mut files = files.iter();
                files.try_for_each(|(name, content)| writer.places.put(name, content.as_deref()))
            })
    }

    /// Writes files that concern one agent each. One that cannot be written although its directory
    /// takes its content under another name is put aside with an alarm, and holds up nothing else.
    fn write_each(&mut self, files: &Files, what: &str) -> bool {
        let Some(first) = files.keys().next() else {
            return true;
        };
        let directory = self.places.directory(first).to_owned();
        let named = files
            .iter()
            .filter_map(|(name, content)| Some((name.to_string(), content.as_deref()?)));
        let keep: Vec<_> = named.collect();
        let mut single = Vec::new();
        let written = self.until_written(what, |writer| {
            let mut removed = files.iter().filter(|(_, content)| content.is_none());
            let done =
                removed.try_for_each(|(name, gone)| writer.places.put(name, gone.as_deref()));
            if done.is_err() || durable::write_all(&directory, &keep, 0o600).is_err() {
                single = writer.one_by_one(files)?;
                durable::sync_dir(&directory)?;
            }
            Ok(())
        });
        for (name, error) in &single {
            self.put_aside(name, files[name].clone(), error);
        }
        written
    }

    /// Tries the files again that could not be written, once in a while.
    fn try_again(&mut self) {
        if self.retry.is_empty() || self.retried.elapsed() < RETRY {
            return;
        }
        self.retried = Instant::now();
        for (name, content) in std::mem::take(&mut self.retry) {
            match self.places.put(&name, content.as_deref()) {
                Ok(()) => {
                    lock(&self.trouble.unwritable).remove(&name);
                }
                Err(error) => self.put_aside(&name, content, &error),
            }
        }
    }

    /// Writes each file by itself. Returns those whose name is at fault; or an error, if the disk is.
    fn one_by_one(&self, files: &Files) -> io::Result<Vec<(FileName, io::Error)>> {
        let mut single = Vec::new();
        for (name, content) in files {
            let Err(error) = self.places.put(name, content.as_deref()) else {
                continue;
            };
            if !is_of_one_name(&error) {
                return Err(error);
            }
            let probe = self.places.directory(name).join(PROBE);
            durable::write(&probe, content.as_deref().unwrap_or_default(), 0o600)?;
            fs::remove_file(&probe)?;
            single.push((name.clone(), error));
        }
        Ok(single)
    }

    fn put_aside(&mut self, name: &FileName, content: Option<Vec<u8>>, error: &io::Error) {
        let path = self.places.of(name);
        let reason = format!(
            "cannot write {}, although its directory takes other files: {error}; remove what is in \
             its place",
            path.display()
        );
        let mut unwritable = lock(&self.trouble.unwritable);
        let known = unwritable.get(name).cloned();
        let since = known
            .as_ref()
            .map_or_else(Timestamp::now, |(_, since)| *since);
        if known.is_none_or(|(known, _)| known != reason) {
            tracing::error!("{reason}");
        }
        unwritable.insert(name.clone(), (reason, since));
        drop(unwritable);
        self.retry.insert(name.clone(), content);
    }

    /// Tries until `write` succeeds. Returns whether it did.
    fn until_written(
        &mut self,
        what: &str,
        mut write: impl FnMut(&mut Self) -> io::Result<()>,
    ) -> bool {
        while let Err(error) = write(self) {
            if reserve::is_full(&error) && self.reserve.release() {
                tracing::error!("disk full, reserve released for lines of operators and alarms");
                *lock(&self.trouble.unreserved) = Some((Unreserved::InUse, Timestamp::now()));
                continue;
            }
            tracing::error!(%error, "cannot write {what}; what depends on it waits");
            let mut refused = lock(&self.trouble.refused);
            let since = refused
                .as_ref()
                .map_or_else(Timestamp::now, |(_, since)| *since);
            *refused = Some((format!("cannot write {what}: {error}"), since));
            drop(refused);
            if self.give_up.load(Ordering::Relaxed) {
                return false;
            }
            thread::sleep(RETRY);
        }
        *lock(&self.trouble.refused) = None;
        true
    }
}

impl Places {
    fn directory(&self, name: &FileName) -> &Path {
        match name {
            FileName::Certificate(_) => &self.certificates,
            FileName::Agent(_) => &self.agents,
            FileName::Withdrawn | FileName::Rollout => &self.state,
        }
    }

    fn of(&self, name: &FileName) -> PathBuf {
        self.directory(name).join(name.to_string())
    }

    /// Gives a file its new content, or removes it if it is still there.
    fn put(&self, name: &FileName, content: Option<&[u8]>) -> io::Result<()> {
        let path = self.of(name);
        let Some(content) = content else {
            return match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                Ok(()) | Err(_) => Ok(()),
            };
        };
        durable::write(&path, content, 0o600)
    }
}

/// Whether an error may come from what stands under the name, and not from the disk.
fn is_of_one_name(error: &io::Error) -> bool {
    use io::ErrorKind::{
        DirectoryNotEmpty, InvalidFilename, IsADirectory, NotADirectory, PermissionDenied,
    };
    [
        DirectoryNotEmpty,
        InvalidFilename,
        IsADirectory,
        NotADirectory,
        PermissionDenied,
    ]
    .contains(&error.kind())
}

/// A draft that fits a line of the audit log.
fn shortened(draft: Draft) -> Draft {
    let detail = draft.detail.to_string();
    if detail.len() <= DETAIL_BYTES_MAX {
        return draft;
    }
    let (sha256, bytes) = (Digest::of(detail.as_bytes()), detail.len());
    let detail = json!({ "too_long": { "sha256": sha256, "bytes": bytes } });
    Draft { detail, ..draft }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clamcast_proto::AuditEvent;
    use ed25519_dalek::SigningKey;

    fn draft(detail: serde_json::Value) -> Draft {
        Draft {
            detail,
            ..Draft::new(AuditEvent::Offer, "master", "test")
        }
    }

    fn start(dir: &Path) -> (Recorder, thread::JoinHandle<()>) {
        let key = SigningKey::from_bytes(&[1; 32]);
        let log = audit::Log::open(dir, key, "clamcast/bank".to_owned()).unwrap();
        let places = Places {
            agents: dir.to_owned(),
            certificates: dir.to_owned(),
            state: dir.to_owned(),
        };
        Recorder::start(log, places)
    }

    fn record(name: &str, content: &str) -> Entry {
        let name = FileName::Agent(name.parse().unwrap());
        Entry::file(name, Some(content.as_bytes().to_vec()))
    }

    #[tokio::test]
    async fn a_record_that_fits_no_line_stops_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let (recorder, thread) = start(dir.path());
        for detail in [json!({ "long": "x".repeat(2_000_000) }), json!({})] {
            recorder.note(draft(detail)).await.unwrap();
        }
        drop(recorder);
        thread.join().unwrap();
        let text = fs::read_to_string(dir.path().join(audit::LOG)).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[0].contains("too_long") && lines[0].len() < 500);
    }

    #[tokio::test]
    async fn a_disk_that_refuses_does_not_hold_up_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let (recorder, thread) = start(dir.path());
        // As good as a disk that refuses: somebody else wrote to the log.
        fs::write(dir.path().join(audit::LOG), "forged\n").unwrap();
        let noting = {
            let recorder = recorder.clone();
            tokio::spawn(async move { recorder.note(draft(json!({}))).await })
        };
        while recorder.alarm().is_none() {
            tokio::task::yield_now().await;
        }
        recorder.give_up().store(true, Ordering::Relaxed);
        assert!(noting.await.unwrap().is_err());
        drop(recorder);
        thread.join().unwrap();
    }

    #[tokio::test]
    async fn entries_are_handed_over_at_once_and_are_durable_in_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let (recorder, thread) = start(dir.path());
        let numbers: Vec<_> = (0..1000)
            .map(|_| recorder.write(Entry::line(draft(json!({})))))
            .collect();
        assert!(numbers.is_sorted_by(|one, next| one < next));
        recorder.durable(numbers[999]).await.unwrap();
        assert!(recorder.watch().borrow().number >= numbers[999]);
        let give_up = recorder.give_up();
        drop(recorder);
        thread.join().unwrap(); // a stop holds this while it joins
        drop(give_up);
    }

    #[tokio::test]
    async fn a_file_whose_name_is_taken_by_a_directory_is_put_aside_until_it_can_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let in_its_place = dir.path().join("web1.json");
        fs::create_dir_all(in_its_place.join("inner")).unwrap();
        let (recorder, thread) = start(dir.path());
        recorder.write(record("web1", "one"));
        let number = recorder.write(record("web2", "two"));
        recorder.durable(number).await.unwrap();
        assert_eq!(fs::read(dir.path().join("web2.json")).unwrap(), b"two");
        assert_eq!(recorder.alarm(), None);
        let [alarm] = &recorder.alarms()[..] else {
            panic!("one file is at fault");
        };
        assert!(alarm.text.contains("web1.json"), "{alarm:?}");
        // A newer content takes the place of the one that waits.
        let number = recorder.write(record("web1", "new"));
        recorder.durable(number).await.unwrap();
        fs::remove_dir_all(&in_its_place).unwrap();
        while !recorder.alarms().is_empty() {
            tokio::task::yield_now().await;
        }
        assert_eq!(fs::read(&in_its_place).unwrap(), b"new");
        drop(recorder);
        thread.join().unwrap();
    }
}
