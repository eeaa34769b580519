//! Turns what reaches the agent into events of the core, and carries out what comes back.
//! Decides nothing. Keeps the records of the state directory and the local log.
//! Must not know how operators ask, or how the agent starts and stops.
//!
//! One task feeds the core; the link, the admin socket, the watch on the database directory and the
//! tasks that take long send it messages. It writes to disk between two of them, so it has a thread of
//! its own.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clamcast_daemon::pulse::{BEAT, Pulse};
use clamcast_proto::wire::close;
use jiff::Timestamp;
use quinn::{RecvStream, VarInt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{MissedTickBehavior, interval, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::chain;
use crate::clamd::Prover;
use crate::core::status::{Blindness, Status, Surroundings};
use crate::core::{
    Action, ConnectionId, Core, Event, Greeting, Identity, Kept, Now, Record, Settings,
};
use crate::install::watch::Watch;
use crate::install::{HostStorage, Installer, Standing};
use crate::link::endpoint::Credentials;
use crate::link::part::PartReader;
use crate::link::{self, Outbox};
use audit::AuditLog;
use records::Records;
use tasks::Tasks;

pub mod audit;
pub mod receipts;
pub mod records;
pub mod tasks;
pub mod trust;

/// The wall clock is looked at this often: it may have been set.
const CLOCK_LOOK: Duration = Duration::from_secs(600);

/// After this long at the end, what is still going on is left to the journal.
const STOP_GRACE: Duration = Duration::from_secs(20);

/// What the keeper is asked or told from outside the link.
#[derive(Debug)]
pub enum Question {
    /// For the agent's status.
    Status(oneshot::Sender<Status>),
    /// The configuration was read again; or, for this reason, it is not in use.
    Reloaded(Result<(), String>),
}

/// What a keeper is made of.
pub struct Begin {
    /// Who this host is.
    pub credentials: Arc<Credentials>,
    /// How it behaves.
    pub settings: Settings,
    /// What the last run left.
    pub kept: Kept,
    /// The state directory.
    pub records: Records,
    /// The local log.
    pub audit: AuditLog,
    /// Installs. Its journal has been replayed.
    pub installer: Installer<HostStorage, Prover>,
    /// Sees files change.
    pub watch: Watch,
    /// Takes the keeper's beats.
    pub pulse: Pulse,
}

/// Feeds the core.
pub struct Keeper {
    core: Core,
    credentials: Arc<Credentials>,
    records: Records,
    audit: AuditLog,
    installer: Installer<HostStorage, Prover>,
    standing: watch::Receiver<Standing>,
    watch: Watch,
    pulse: Pulse,

    tasks: Tasks<HostStorage, Prover>,
    workers: JoinSet<Event>,
    /// Bytes of parts that came since the start.
    received: Arc<AtomicU64>,

    /// The number of connections so far, and the outbox of the last one.
    connections: u64,
    outbox: Option<Outbox>,
    /// Receives whether the master is believed.
    answer: Option<oneshot::Sender<Result<(), String>>>,
    /// The stream of the part that is being handled.
    stream: Option<RecvStream>,
    stop: CancellationToken,
}

impl Keeper {
    /// Takes over what was kept. Whatever the end of the last run interrupted is ended first.
    pub fn new(begin: Begin, stop: CancellationToken) -> Self {
        let Begin {
            credentials,
            settings,
            kept,
            records,
            audit,
            installer,
            watch,
            pulse,
        } = begin;
        let identity = Identity {
            fleet: credentials.fleet.clone(),
            agent: credentials.agent.clone(),
            key: credentials.key.0.clone(),
        };
        let mut standing = installer.standing();
        let stands = standing.borrow_and_update().clone();
        Self {
            core: Core::new(identity, settings, kept, stands, now(), rand::random()),
            credentials,
            records,
            audit,
            standing,
            watch,
            pulse,
            tasks: Tasks::new(installer.clone(), stop.clone()),
            installer,
            workers: JoinSet::new(),
            received: Arc::default(),
            connections: 0,
            outbox: None,
            answer: None,
            stream: None,
            stop,
        }
    }

    /// Acts until `stop` fires; then ends what must be ended on disk, and returns.
    pub async fn run(
        mut self,
        mut link: mpsc::Receiver<link::Event>,
        mut questions: mpsc::Receiver<Question>,
    ) {
        self.pulse.owns_thread();
        let mut beats = interval(BEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.follow();
        self.feed(Event::Started);
        let stop = self.stop.clone();
        loop {
            let now = now();
            let wake = self.core.wake(now);
            let latest = now.at + CLOCK_LOOK;
            let wake = wake.map_or(latest, |wake| wake.min(latest)).into();
            self.pulse.beat();
            self.pulse
                .say(self.core.summary(self.installer.clamd_state()));
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Ok(()) = self.standing.changed() => self.stands(),
                Some(ended) = self.workers.join_next() => self.ended(ended),
                Some(event) = link.recv() => self.heard(event),
                run_begun = self.watch.event() => self.feed(Event::Touched { run_begun }),
                Some(question) = questions.recv() => self.asked(question),
                () = sleep_until(wake) => {
                    let received = self.received.load(Ordering::Relaxed);
                    self.feed(Event::Tick(received));
                }
                _ = beats.tick() => {}
            }
        }
        self.feed(Event::Stopping);
        let grace = async {
            while let Some(ended) = self.workers.join_next().await {
                self.ended(ended);
            }
        };
        if timeout(STOP_GRACE, grace).await.is_err() {
            tracing::warn!("an install is not ended after {STOP_GRACE:?}; the next start ends it");
            self.workers.detach_all(); // what is on the disk's side cannot be cut short anyway
        }
        self.feed(Event::Stopped);
    }

    // What comes in.

    fn asked(&mut self, question: Question) {
        match question {
            // The asking connection may be closed by now.
            Question::Status(answer) => drop(answer.send(self.status())),
            Question::Reloaded(outcome) => self.feed(Event::Reloaded(outcome)),
        }
    }

    fn status(&self) -> Status {
        let now = now();
        let around = Surroundings {
            clamd: self.installer.clamd(),
            watched: self.watch.is_watching(),
            blind: self.watch.blind().map(Blindness::from),
            invalid: self.credentials.invalid(now.clock),
            certificate_expires: self.credentials.certificate.not_after,
        };
        self.core.status(now, around)
    }

    fn heard(&mut self, event: link::Event) {
        match event {
            link::Event::Welcome {
                welcome,
                address,
                outbox,
                answer,
            } => {
                self.connections += 1;
                (self.outbox, self.answer) = (Some(outbox), Some(answer));
                let hostname = nix::unistd::gethostname().ok();
                self.feed(Event::Welcome(Box::new(Greeting {
                    connection: ConnectionId(self.connections),
                    address: address.to_string(),
                    welcome: *welcome,
                    clamd: self.installer.clamd(),
                    hostname: hostname.map(|name| name.to_string_lossy().into_owned()),
                })));
            }
            link::Event::Message(message) => self.feed(Event::Message(message)),
            link::Event::Part(part, stream) => {
                self.stream = Some(stream);
                self.feed(Event::Part(part));
                if let Some(mut stream) = self.stream.take() {
                    // Fails only if the stream has ended already.
                    let _ = stream.stop(VarInt::from_u32(close::STOPPING));
                }
            }
            link::Event::Disconnected { error } => {
                self.outbox = None;
                self.feed(Event::Disconnected(chain(&*error)));
            }
        }
    }

    fn ended(&mut self, ended: Result<Event, JoinError>) {
        let event = ended.unwrap_or_else(died);
        if let Event::Looked(_) = &event {
            self.follow();
        }
        self.feed(event);
    }

    /// Watches the directory that stands there now.
    fn follow(&mut self) {
        let is_watched = self.watch.follow();
        self.feed(Event::Watched(is_watched));
    }

    fn stands(&mut self) {
        let standing = self.standing.borrow_and_update().clone();
        self.handle(Event::Standing(standing));
    }

    // What comes of it.

    fn feed(&mut self, event: Event) {
        if self.standing.has_changed().unwrap_or(false) {
            self.stands();
        }
        self.handle(event);
    }

    fn handle(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for action in self.core.handle(event, now(), rand::random()) {
                events.extend(self.carry_out(action));
            }
        }
    }

    /// Carries out one action; returns what the core must hear of at once.
    fn carry_out(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Save(record) => return self.save(&record),
            Action::Say(connection, message) => {
                let outbox = self.outbox.as_ref();
                let outbox = outbox.filter(|_| connection.0 == self.connections);
                if let Some(Err(error)) = outbox.map(|outbox| outbox.send(&message)) {
                    tracing::error!(error = chain(&error), "cannot tell the master");
                }
            }
            Action::Note(note) => self.audit.note(note),
            Action::Answer(answer) => {
                if answer.is_err() {
                    self.outbox = None;
                }
                if let Some(asked) = self.answer.take() {
                    // Without anybody to hear the answer the connection is gone already.
                    let _ = asked.send(answer);
                }
            }
            Action::Receive(part, file) => {
                let stream = self.stream.take().expect("a part comes with its stream");
                let reader = PartReader::new(stream, self.tasks.transfers(), self.received.clone());
                let installer = self.installer.clone();
                self.workers.spawn_blocking(move || {
                    let result = installer.receive(&part, &file, reader);
                    Event::Received(part.name, result)
                });
            }
            Action::Start(task) => {
                let task = self.tasks.begin(task);
                self.workers.spawn(task);
            }
            Action::Cut(cut) => self.tasks.cut(cut),
        }
        None
    }

    fn save(&self, record: &Record) -> Option<Event> {
        let result = self.records.save(record);
        if let Some(saved) = record.awaited() {
            return Some(Event::Saved(saved, result));
        }
        if let Err(error) = result {
            let error = chain(&error);
            if let Record::Receipt(..) = record {
                tracing::error!(error, "a receipt is only in memory");
            } else {
                tracing::warn!(error, "a restart will forget this record");
            }
        }
        None
    }
}

fn now() -> Now {
    Now {
        clock: Timestamp::now(),
        at: Instant::now(),
    }
}

/// A worker ends only by returning: what it panicked with goes on here.
fn died(error: JoinError) -> Event {
    match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(error) => unreachable!("no worker is aborted: {error}"),
    }
}
