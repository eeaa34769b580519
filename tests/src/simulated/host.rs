//! One simulated agent: the real core, without disk and clamd.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clamcast_agent::config::{DriftPolicy, Stale};
use clamcast_agent::core::drift;
use clamcast_agent::core::receipts::Receipts;
use clamcast_agent::core::{
    Action, ConnectionId, Core, Cut, Event, Greeting, Identity, Job, Kept, Looked, Now, Record,
    Settings, Task,
};
use clamcast_agent::install::{
    Completed, Depth, Findings, Installed, Look, Planned, ReceiveError, Set, Standing,
};
use clamcast_agent::link::endpoint::Credentials;
use clamcast_agent::link::{self, Outbox};
use clamcast_proto::DatabaseName;
use clamcast_proto::delta::Object;
use clamcast_proto::dsse::Verified;
use clamcast_proto::keys::KeySet;
use clamcast_proto::manifest::{Manifest, ManifestFile};
use clamcast_proto::receipt::{ClamdReport, ClamdState, FileState, InstallNumber, Outcome};
use clamcast_proto::trust::Trust;
use clamcast_proto::wire::{Features, Have, NeedFile, Part, Phase, ToAgent, ToMaster};
use quinn::RecvStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::databases::{Databases, Disk};
use super::{Sight, now};

/// An encoded part may be this much longer than its file, as for a real agent.
const PART_OVERHEAD_BYTES: u64 = 1 << 20;

/// More than the time that a test takes: nobody touches these files, so nobody has to look at them.
const RESCAN: Duration = Duration::from_secs(24 * 3600);

pub(super) struct Host {
    core: Core,
    databases: Arc<Databases>,
    disk: Disk,
    /// Files of the offered generation that came.
    staged: Disk,
    installed: Option<Installed>,
    /// The generations that receipts are about, by the numbers of the receipts.
    reported: BTreeMap<u64, u64>,
    connections: u64,
    outbox: Option<Outbox>,
    answer: Option<oneshot::Sender<Result<(), String>>>,
    stream: Option<RecvStream>,
    transfers: JoinSet<(DatabaseName, Result<Object, ReceiveError>)>,
    cut: CancellationToken,
    /// A look at the files or at clamd, which ends when something else begins.
    look: Option<Depth>,
    is_probing: bool,
    received: u64,
    sight: Arc<Sight>,
}

impl Host {
    pub(super) fn new(
        credentials: &Credentials,
        keys: Verified<KeySet>,
        databases: Arc<Databases>,
        disk: &Disk,
        sight: Arc<Sight>,
    ) -> Self {
        let identity = Identity {
            fleet: credentials.fleet.clone(),
            agent: credentials.agent.clone(),
            key: credentials.key.0.clone(),
        };
        let settings = Settings {
            stale: Stale::Warn,
            splay: Duration::ZERO,
            directory: PathBuf::from("/"),
            drift: DriftPolicy::Repair,
            rescan: RESCAN,
        };
        let now = moment();
        let kept = Kept {
            trust: Trust::new(keys, None),
            accepted: None,
            receipts: Receipts::default(),
            fresh: None,
            accepts: Features::default(),
            first_start: now.clock,
            left_alone: drift::Kept::default(),
        };
        Self {
            core: Core::new(identity, settings, kept, Standing::default(), now, 1.0),
            databases,
            disk: disk.clone(),
            staged: Disk::new(),
            installed: None,
            reported: BTreeMap::new(),
            connections: 0,
            outbox: None,
            answer: None,
            stream: None,
            transfers: JoinSet::new(),
            cut: CancellationToken::new(),
            look: None,
            is_probing: false,
            received: 0,
            sight,
        }
    }

    /// Lives until its link ends.
    pub(super) async fn run(mut self, mut link: mpsc::Receiver<link::Event>) {
        self.feed(Event::Watched(true));
        self.feed(Event::Started);
        loop {
            let due = self.core.wake(moment());
            tokio::select! {
                biased;
                Some(ended) = self.transfers.join_next() => {
                    let (name, made) = ended.expect("a transfer does not panic");
                    let result = made.map(|object| {
                        self.staged.insert(name.clone(), object);
                    });
                    self.received += 1;
                    self.feed(Event::Received(name, result));
                }
                event = link.recv() => match event {
                    Some(event) => self.heard(event),
                    None => return,
                },
                () = until(due) => self.feed(Event::Tick(self.received)),
            }
        }
    }

    fn heard(&mut self, event: link::Event) {
        match event {
            link::Event::Welcome {
                welcome,
                outbox,
                answer,
                address,
            } => {
                self.connections += 1;
                (self.outbox, self.answer) = (Some(outbox), Some(answer));
                self.feed(Event::Welcome(Box::new(Greeting {
                    connection: ConnectionId(self.connections),
                    address: address.to_string(),
                    welcome: *welcome,
                    clamd: no_clamd(),
                    hostname: None,
                })));
            }
            link::Event::Message(message) => {
                if let ToAgent::ReceiptAck { seq } = message
                    && let Some(generation) = self.reported.remove(&seq)
                {
                    self.sight.now().acknowledged = generation;
                }
                self.feed(Event::Message(message));
            }
            link::Event::Part(part, stream) => {
                self.stream = Some(stream);
                self.feed(Event::Part(part));
                self.stream = None; // of an older offer
            }
            link::Event::Disconnected { error } => {
                self.outbox = None;
                self.sight.now().connected = false;
                self.feed(Event::Disconnected(error.to_string()));
            }
        }
    }

    fn feed(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for action in self.core.handle(event, moment(), rand::random()) {
                events.extend(self.carry_out(action));
            }
        }
    }

    /// Does what the core wants; returns what it must hear of at once.
    fn carry_out(&mut self, action: Action) -> Vec<Event> {
        match action {
            Action::Save(record) => {
                if let Record::Receipt(seq, _) = record {
                    let installed = self.installed.as_ref();
                    let generation = installed.map_or(0, |it| it.set.manifest.generation.number());
                    self.reported.insert(seq, generation);
                }
                let saved = record.awaited();
                return saved
                    .map(|saved| Event::Saved(saved, Ok(())))
                    .into_iter()
                    .collect();
            }
            Action::Note(_) => {}
            Action::Say(connection, message) => self.say(connection, &message),
            Action::Answer(answer) => {
                if answer.is_ok() {
                    let mut sight = self.sight.now();
                    sight.connected = true;
                    sight.welcomes += 1;
                    sight.welcomed = Some(Instant::now());
                }
                if let Some(asked) = self.answer.take() {
                    let _ = asked.send(answer); // the link may have ended
                }
            }
            Action::Receive(part, file) => self.receive(part, file),
            Action::Start(task) => return self.begin(task),
            Action::Cut(Cut::Transfers) => {
                self.cut.cancel();
                self.cut = CancellationToken::new();
            }
            Action::Cut(Cut::Look) => {
                let depth = self.look.take();
                return depth
                    .map(|depth| looked(depth, Look::Stopped))
                    .into_iter()
                    .collect();
            }
            Action::Cut(Cut::Probe) => {
                if std::mem::take(&mut self.is_probing) {
                    return vec![Event::Probed(None)];
                }
            }
            Action::Cut(Cut::Repair) => {}
        }
        Vec::new()
    }

    fn say(&self, connection: ConnectionId, message: &ToMaster) {
        if let ToMaster::Error { offer: Some(_), .. } = message {
            self.sight.now().refused += 1;
        }
        let outbox = self.outbox.as_ref();
        if let Some(outbox) = outbox.filter(|_| connection.0 == self.connections) {
            outbox.send(message).expect("it fits a frame");
        }
    }

    /// What is at its end at once, as nothing here takes long; or `None`, if it ends later.
    fn begin(&mut self, task: Task) -> Vec<Event> {
        let event = match task {
            Task::Plan(job, full) => {
                let need = |file: &ManifestFile| NeedFile {
                    name: file.name.clone(),
                    have: match self.disk.get(&file.name).filter(|_| !full) {
                        Some(object) => Have::Sha256(object.digest),
                        None => Have::Nothing,
                    },
                    resume_at: 0,
                    resume: None,
                };
                let needs = self.missing(&job.manifest).map(need).collect();
                Event::Planned(Vec::new(), Ok(Planned::Needs(needs)))
            }
            Task::Install(job) => return self.install(job).into(),
            Task::Resume => Event::Resumed(None),
            Task::Fault(job, fault) => {
                let outcome = Outcome::HostFault;
                let completed = self.completed(&job, outcome, Some(fault.to_string()));
                Event::Faulted(job, completed)
            }
            Task::Ping => Event::Pinged(no_clamd()),
            Task::Look(depth) if self.core.is_opening() => {
                looked(depth, Look::Made(Findings::default()))
            }
            Task::Look(depth) => {
                self.look = Some(depth);
                return Vec::new();
            }
            Task::Probe { .. } => {
                self.is_probing = true;
                return Vec::new();
            }
            Task::Scan => Event::Scanned(None),
            Task::Repair => Event::Repaired(Ok(None), no_clamd()),
        };
        vec![event]
    }

    /// Files of a generation that are neither installed nor staged.
    fn missing<'m>(&self, manifest: &'m Manifest) -> impl Iterator<Item = &'m ManifestFile> {
        let here = |file: &ManifestFile| {
            let there = [self.disk.get(&file.name), self.staged.get(&file.name)];
            let mut digests = there.into_iter().flatten().map(|object| object.digest);
            digests.any(|digest| digest == file.sha256)
        };
        manifest.files.iter().filter(move |file| !here(file))
    }

    fn receive(&mut self, part: Part, file: ManifestFile) {
        let stream = self.stream.take().expect("a part comes with its stream");
        let base = self.disk.get(&part.name).copied();
        let (databases, cut, sight) =
            (self.databases.clone(), self.cut.clone(), self.sight.clone());
        self.transfers.spawn(async move {
            let name = part.name.clone();
            let received = receive(&part, stream, base, file, databases, &sight);
            let made = cut.run_until_cancelled(received).await;
            let made = made.unwrap_or_else(|| Err(interrupted(&name)));
            (name, made)
        });
    }

    /// Everything is here: the new set takes the place of the old.
    fn install(&mut self, job: Arc<Job>) -> [Event; 2] {
        let placed = |file: &ManifestFile| {
            let (digest, size) = (file.sha256, file.size);
            (file.name.clone(), Object { digest, size })
        };
        self.disk = job.manifest.files.iter().map(placed).collect();
        self.staged.clear();
        let set = Set::from(&job.manifest);
        let last = self.installed.as_ref().map_or(0, |last| last.install.0);
        let installed = Installed {
            set: set.clone(),
            install: InstallNumber(last + 1),
            outcome: Outcome::Live,
        };
        self.installed = Some(installed.clone());
        self.sight.now().installed = job.manifest.generation.number();
        let standing = Standing {
            settled: Some(set.sha256()),
            installed: Some(installed),
            phase: Phase::Idle,
            waits_for_clamd: false,
            is_unproven: false,
        };
        let completed = self.completed(&job, Outcome::Live, None);
        [Event::Standing(standing), Event::Installed(job, completed)]
    }

    fn completed(&self, job: &Job, outcome: Outcome, error: Option<String>) -> Box<Completed> {
        let state = |(name, object): (&DatabaseName, &Object)| FileState {
            name: name.clone(),
            size: object.size,
            sha256: object.digest,
        };
        let install = self.installed.as_ref().map(|it| it.install);
        Box::new(Completed {
            set: Set::from(&job.manifest),
            outcome,
            install: install.unwrap_or_default(),
            files: self.disk.iter().map(state).collect(),
            foreign: Vec::new(),
            adopted: Vec::new(),
            clamd: no_clamd(),
            error,
            blamed: None,
        })
    }
}

fn looked(depth: Depth, look: Look) -> Event {
    Event::Looked(Box::new(Looked {
        depth,
        look,
        updater: None,
        clamd: no_clamd(),
    }))
}

fn moment() -> Now {
    Now {
        clock: now(),
        at: Instant::now(),
    }
}

fn interrupted(name: &DatabaseName) -> ReceiveError {
    ReceiveError::Interrupted {
        name: name.clone(),
        source: io::ErrorKind::ConnectionReset.into(),
    }
}

/// Reads a part to its end and makes the file of it.
async fn receive(
    part: &Part,
    mut stream: RecvStream,
    base: Option<Object>,
    file: ManifestFile,
    databases: Arc<Databases>,
    sight: &Sight,
) -> Result<Object, ReceiveError> {
    let length = part.encoding.length;
    let is_bounded = length <= file.size + PART_OVERHEAD_BYTES && part.offset == 0;
    let damaged = |reason: String| ReceiveError::Damaged {
        name: part.name.clone(),
        reason,
    };
    let limit = usize::try_from(length).ok().filter(|_| is_bounded);
    let limit = limit.ok_or_else(|| damaged("it is too long".to_owned()))?;
    let bytes = stream.read_to_end(limit).await;
    let bytes = bytes.map_err(|_| interrupted(&part.name))?;
    let came = bytes.len() as u64;
    if came != length {
        return Err(interrupted(&part.name));
    }
    let encoding = part.encoding.clone();
    let made = tokio::task::spawn_blocking(move || databases.make(&encoding, &bytes, base, &file));
    match made.await.expect("applying does not panic") {
        Ok(object) => {
            let mut sight = sight.now();
            sight.parts += 1;
            sight.part_bytes += came;
            Ok(object)
        }
        Err(error) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "a part is spoilt");
            sight.now().refused += 1;
            Err(damaged(error.to_string()))
        }
    }
}

/// What a host says that has none by configuration.
fn no_clamd() -> ClamdReport {
    ClamdReport {
        state: ClamdState::None,
        ..ClamdReport::default()
    }
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}
