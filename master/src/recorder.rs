//! Writes what must last: the audit log and what is known of each agent.
//!
//! One thread of its own, because every write ends in an fsync. Jobs that wait together are
//! written together, so that a whole fleet's receipts cost a few fsyncs and not thousands. What a
//! job wants said to an agent is said after it is on disk.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use clamcast_daemon::audit::{self, Draft};
use clamcast_daemon::durable;
use clamcast_proto::AgentName;
use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot};

use crate::fleet::Record;
use crate::hub::{Command, Line};

/// Jobs that wait; senders wait when it is full.
const JOBS_MAX: usize = 4096;

/// Jobs written together: what the audit log syncs at once.
const BATCH_MAX: usize = audit::BATCH_MAX;

/// Time between two tries when the disk refuses.
const RETRY: Duration = Duration::from_secs(1);

/// One thing to write, in this order: the audit log, the agent's record, then the word to the agent.
#[derive(Debug, Default)]
pub struct Job {
    /// A line for the audit log.
    pub draft: Option<Draft>,
    /// An agent's record to keep.
    pub keep: Option<Record>,
    /// An agent to forget.
    pub forget: Option<AgentName>,
    /// What is said, and to whom, once all that is on disk.
    pub then: Option<(Line, Command)>,
    /// Who is told the signed head of the audit log, once all that is on disk.
    pub checkpoint_to: Vec<Line>,
    /// Told once all that is on disk.
    pub done: Option<oneshot::Sender<()>>,
}

/// The way to the writing thread.
#[derive(Clone, Debug)]
pub struct Recorder {
    jobs: mpsc::Sender<Job>,
    alarm: Arc<Mutex<Option<String>>>,
}

impl Recorder {
    /// Starts the thread. It ends when the last clone is dropped and all jobs are written.
    pub fn start(log: audit::Log, agents: PathBuf) -> (Self, thread::JoinHandle<()>) {
        let (jobs, inbox) = mpsc::channel(JOBS_MAX);
        let alarm = Arc::new(Mutex::new(None));
        let writer = Writer {
            log,
            agents,
            alarm: alarm.clone(),
        };
        let thread = thread::Builder::new()
            .name("recorder".to_owned())
            .spawn(move || writer.run(inbox))
            .expect("a thread can be started");
        (Self { jobs, alarm }, thread)
    }

    /// Queues a job.
    pub async fn write(&self, job: Job) {
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
    agents: PathBuf,
    alarm: Arc<Mutex<Option<String>>>,
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
            self.write(&mut batch);
            for job in batch.drain(..) {
                if let Some((line, command)) = job.then {
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

    /// Tries until the disk takes it: nothing is said that is not in the log.
    fn write(&mut self, batch: &mut [Job]) {
        let mut drafts: Vec<_> = batch
            .iter_mut()
            .filter_map(|job| job.draft.take())
            .collect();
        let mut records = BTreeMap::new(); // of several jobs about one agent the last one counts
        for job in &mut *batch {
            if let Some(record) = job.keep.take() {
                records.insert(record.name.clone(), Some(record));
            }
            if let Some(name) = job.forget.take() {
                records.insert(name, None);
            }
        }
        self.until_written("the audit log", |writer| {
            let before = writer.log.records();
            let written = writer.log.append_all(drafts.clone(), Timestamp::now());
            if writer.log.records() > before {
                drafts.clear(); // in the log; what may be left to do is to sign it
            }
            written
                .map(|_| ())
                .map_err(|error| io::Error::other(crate::chain(&error)))
        });
        for (name, record) in records {
            self.until_written("an agent's record", |writer| {
                let path = writer.agents.join(format!("{name}.json"));
                match &record {
                    Some(record) => {
                        let text = serde_json::to_vec(record).expect("a record serialises");
                        durable::write(&path, &text, 0o600)
                    }
                    None => match fs::remove_file(&path) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                        Ok(()) | Err(_) => durable::sync_dir(&writer.agents),
                    },
                }
            });
        }
        *self.alarm.lock().expect("nothing panics with it") = None;
    }

    fn until_written(&mut self, what: &str, mut write: impl FnMut(&mut Self) -> io::Result<()>) {
        while let Err(error) = write(self) {
            tracing::error!(%error, "cannot write {what}; nothing is offered or acknowledged until it works");
            *self.alarm.lock().expect("nothing panics with it") =
                Some(format!("cannot write {what}: {error}"));
            thread::sleep(RETRY);
        }
    }
}
