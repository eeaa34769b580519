//! Writes what must last: the audit log, what is known of each agent, the certificates it came with,
//! and where the rollout is.
//!
//! One thread of its own, because every write ends in an fsync. Jobs that wait together are
//! written together, so that a whole fleet's receipts cost a few fsyncs and not thousands. What a
//! job wants said to an agent is said after it is on disk.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use clamcast_daemon::audit::{self, Draft};
use clamcast_daemon::durable;
use clamcast_proto::{AgentName, Digest, Position};
use jiff::Timestamp;
use serde_json::json;
use tokio::sync::{mpsc, oneshot};

use crate::fleet::agents::Record;
use crate::fleet::hub::{Command, Line};
use crate::fleet::rollout::Rollout;
use crate::record::events::EVENTS;

/// Jobs that wait; senders wait when it is full.
const JOBS_MAX: usize = 4096;

/// Jobs written together: what the audit log syncs at once.
const BATCH_MAX: usize = audit::BATCH_MAX;

/// Longest detail of a record in bytes of JSON: with the rest it fits a line of the audit log. Of a
/// longer one, which nothing writes on purpose, the digest is kept.
const DETAIL_BYTES_MAX: usize = 1_000_000;

/// Time between two tries when the disk refuses.
const RETRY: Duration = Duration::from_secs(1);

/// One thing to write, in this order: the certificate, the audit log, the agent's record, the
/// rollout's state, then the word to the agent.
#[derive(Debug, Default)]
pub struct Job {
    /// A certificate to archive, in DER, by its fingerprint.
    pub certificate: Option<(Digest, Vec<u8>)>,
    /// A line for the audit log.
    pub draft: Option<Draft>,
    /// An agent's record to keep.
    pub keep: Option<Record>,
    /// An agent to forget.
    pub forget: Option<AgentName>,
    /// The state of the rollout to keep.
    pub rollout: Option<Rollout>,
    /// What is said, and to whom, once all that is on disk.
    pub then: Option<(Line, Command)>,
    /// Who is told the signed head of the audit log, once all that is on disk.
    pub checkpoint_to: Vec<Line>,
    /// Told once all that is on disk.
    pub done: Option<oneshot::Sender<()>>,
}

/// Where it is written, beside the audit log.
#[derive(Clone, Debug)]
pub struct Places {
    /// The directory of the agents' records.
    pub agents: PathBuf,
    /// The directory of their certificates.
    pub certificates: PathBuf,
    /// The file that says where the rollout is.
    pub rollout: PathBuf,
}

/// The way to the writing thread.
#[derive(Clone, Debug)]
pub struct Recorder {
    jobs: mpsc::Sender<Job>,
    alarm: Arc<Mutex<Option<String>>>,
    give_up: Arc<AtomicBool>,
    taken_back: Arc<Mutex<BTreeSet<Position>>>,
}

impl Recorder {
    /// Starts the thread. It ends when the last clone is dropped and all jobs are written.
    pub fn start(log: audit::Log, places: Places) -> (Self, thread::JoinHandle<()>) {
        let (jobs, inbox) = mpsc::channel(JOBS_MAX);
        let alarm = Arc::new(Mutex::new(None));
        let give_up = Arc::new(AtomicBool::new(false));
        let taken_back = Arc::new(Mutex::new(BTreeSet::new()));
        let writer = Writer {
            log,
            places,
            alarm: alarm.clone(),
            give_up: give_up.clone(),
            taken_back: taken_back.clone(),
        };
        let thread = thread::Builder::new()
            .name("recorder".to_owned())
            .spawn(move || writer.run(inbox))
            .expect("a thread can be started");
        let recorder = Self {
            jobs,
            alarm,
            give_up,
            taken_back,
        };
        (recorder, thread)
    }

    /// Queues a job.
    pub async fn write(&self, job: Job) {
        if let Some(draft) = &job.draft {
            let event = draft.event.as_str();
            debug_assert!(EVENTS.contains(&event), "`{event}` is missing in EVENTS");
        }
        // The thread outlives every sender, unless it panicked, which its owner reports.
        let _ = self.jobs.send(job).await;
    }

    /// Writes a line into the audit log and returns when it is there.
    pub async fn note(&self, draft: Draft) {
        let (done, written) = oneshot::channel();
        self.write(Job {
            draft: Some(draft),
            done: Some(done),
            ..Job::default()
        })
        .await;
        let _ = written.await;
    }

    /// Returns when the thread has ended, which it does before its last sender only by a panic.
    pub async fn ended(&self) {
        self.jobs.closed().await;
    }

    /// To be set when the daemon stops and has waited long enough: what the disk refuses from then
    /// on is not tried again. Nobody was told of it, so the agents will send it again.
    pub fn give_up(&self) -> Arc<AtomicBool> {
        self.give_up.clone()
    }

    /// From now on nobody is offered this generation but by force: also not by an offer that still
    /// waits for the disk.
    pub fn take_back(&self, position: Position) {
        let mut taken_back = self.taken_back.lock().expect("nothing panics with it");
        taken_back.insert(position);
    }

    /// Why nothing can be written at the moment.
    pub fn alarm(&self) -> Option<String> {
        self.alarm.lock().expect("nothing panics with it").clone()
    }
}

/// Reads the records of all agents. A damaged one is reported and left out: the agent says Hello
/// again.
pub fn load(agents: &Path) -> io::Result<Vec<Record>> {
    let mut records = Vec::new();
    for entry in fs::read_dir(agents)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        match serde_json::from_slice(&fs::read(&path)?) {
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
    alarm: Arc<Mutex<Option<String>>>,
    give_up: Arc<AtomicBool>,
    taken_back: Arc<Mutex<BTreeSet<Position>>>,
}

impl Writer {
    fn run(mut self, mut inbox: mpsc::Receiver<Job>) {
        let mut batch = Vec::new();
        while let Some(first) = inbox.blocking_recv() {
            batch.push(first);
            while batch.len() < BATCH_MAX {
                let Ok(next) = inbox.try_recv() else { break };
                batch.push(next);
            }
            if !self.write(&mut batch) {
                batch.clear(); // not on disk, and so nobody is told
            }
            for job in batch.drain(..) {
                if let Some((line, command)) = job.then
                    && !self.is_taken_back(&command)
                {
                    line.send(command);
                }
                for line in job.checkpoint_to {
                    line.send(Command::Checkpoint(self.log.checkpoint()));
                }
                if let Some(done) = job.done {
                    let _ = done.send(()); // whoever asked may have gone
                }
            }
        }
    }

    fn is_taken_back(&self, command: &Command) -> bool {
        let Command::Offer {
            current, manner, ..
        } = command
        else {
            return false;
        };
        let taken_back = self.taken_back.lock().expect("nothing panics with it");
        !manner.rehash && taken_back.contains(&current.manifest.position())
    }

    /// Tries until the disk takes it: nothing is said that is not in the log. Returns whether it did.
    fn write(&mut self, batch: &mut [Job]) -> bool {
        let drafts = batch.iter_mut().filter_map(|job| job.draft.take());
        let mut drafts: Vec<_> = drafts.map(shortened).collect();
        let rollouts = batch.iter_mut().filter_map(|job| job.rollout.take());
        let rollout = rollouts.last();
        let certificates = batch.iter_mut().filter_map(|job| job.certificate.take());
        let named = |(fingerprint, der): (Digest, _)| (format!("{fingerprint}.der"), der);
        let certificates: Vec<_> = certificates.map(named).collect();
        let mut records = BTreeMap::new(); // of several jobs about one agent the last one counts
        for job in &mut *batch {
            if let Some(record) = job.keep.take() {
                records.insert(record.name.clone(), Some(record));
            }
            if let Some(name) = job.forget.take() {
                records.insert(name, None);
            }
        }
        let mut kept = certificates.is_empty()
            || self.until_written("the agents' certificates", |writer| {
                durable::write_all(&writer.places.certificates, &certificates, 0o600)
            });
        let logged = self.until_written("the audit log", |writer| {
            let before = writer.log.records();
            let written = writer.log.append_all(drafts.clone(), Timestamp::now());
            if writer.log.records() > before {
                drafts.clear(); // in the log; what may be left to do is to sign it
            }
            written
                .map(|_| ())
                .map_err(|error| io::Error::other(crate::chain(&error)))
        });
        let (mut keep, mut forget) = (Vec::new(), Vec::new());
        for (name, record) in records {
            match record {
                Some(record) => {
                    let text = serde_json::to_vec(&record).expect("a record serialises");
                    keep.push((format!("{name}.json"), text));
                }
                None => forget.push(format!("{name}.json")),
            }
        }
        if !keep.is_empty() || !forget.is_empty() {
            kept &= self.until_written("the agents' records", |writer| {
                for name in &forget {
                    match fs::remove_file(writer.places.agents.join(name)) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                        Ok(()) | Err(_) => {}
                    }
                }
                durable::write_all(&writer.places.agents, &keep, 0o600)
            });
        }
        if let Some(rollout) = rollout {
            kept &= self.until_written("the state of the rollout", |writer| {
                let text = serde_json::to_vec(&rollout).expect("a rollout serialises");
                durable::write(&writer.places.rollout, &text, 0o600)
            });
        }
        *self.alarm.lock().expect("nothing panics with it") = None;
        logged && kept
    }

    fn until_written(
        &mut self,
        what: &str,
        mut write: impl FnMut(&mut Self) -> io::Result<()>,
    ) -> bool {
        while let Err(error) = write(self) {
            tracing::error!(%error, "cannot write {what}; nothing is offered or acknowledged until it works");
            *self.alarm.lock().expect("nothing panics with it") =
                Some(format!("cannot write {what}: {error}"));
            if self.give_up.load(Ordering::Relaxed) {
                return false;
            }
            thread::sleep(RETRY);
        }
        true
    }
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
    use ed25519_dalek::SigningKey;

    fn draft(detail: serde_json::Value) -> Draft {
        Draft {
            event: "offer".to_owned(),
            actor: "master".to_owned(),
            subject: "test".to_owned(),
            position: None,
            outcome: None,
            detail,
        }
    }

    fn start(dir: &Path) -> (Recorder, thread::JoinHandle<()>) {
        let key = SigningKey::from_bytes(&[1; 32]);
        let log = audit::Log::open(dir, key, "clamcast/bank".to_owned()).unwrap();
        let places = Places {
            agents: dir.to_owned(),
            certificates: dir.to_owned(),
            rollout: dir.join("rollout.json"),
        };
        Recorder::start(log, places)
    }

    #[tokio::test]
    async fn a_record_that_fits_no_line_stops_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let (recorder, thread) = start(dir.path());
        for detail in [json!({ "long": "x".repeat(2_000_000) }), json!({})] {
            recorder.note(draft(detail)).await;
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
        noting.await.unwrap();
        drop(recorder);
        thread.join().unwrap();
    }
}
