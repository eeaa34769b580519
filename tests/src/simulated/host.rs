//! One simulated agent: what its keeper does, without disk and clamd.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clamcast_agent::core::slot::{Action, Ending, Event, Slot, Work};
use clamcast_agent::link::endpoint::Credentials;
use clamcast_agent::link::{self, Outbox};
use clamcast_proto::DatabaseName;
use clamcast_proto::delta::Object;
use clamcast_proto::dsse::{Envelope, Verified, sign};
use clamcast_proto::keys::KeySet;
use clamcast_proto::manifest::{Manifest, ManifestFile};
use clamcast_proto::receipt::{
    ClamdReport, ClamdState, FileState, InstallNumber, Outcome, Receipt, ReceiptFile,
};
use clamcast_proto::trust::{Trust, TrustError};
use clamcast_proto::wire::{
    Feature, Have, Hello, NeedFile, Offer, OfferId, Part, ToAgent, ToMaster,
};
use quinn::RecvStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::databases::{Databases, Disk};
use super::{Sight, now};

/// An encoded part may be this much longer than its file, as for a real agent.
const PART_OVERHEAD_BYTES: u64 = 1 << 20;

pub(super) struct Host {
    credentials: Arc<Credentials>,
    trust: Trust,
    databases: Arc<Databases>,
    disk: Disk,
    /// Files of the offered generation that came.
    staged: Disk,
    installed: Option<Installed>,
    /// Receipts that the master has not acknowledged, by number, with their generation's.
    pending: BTreeMap<u64, (u64, Envelope)>,
    receipts: u64,
    slot: Slot<Job>,
    outbox: Option<Outbox>,
    transfers: JoinSet<(DatabaseName, Result<Object, Ending>)>,
    cut: CancellationToken,
    sight: Arc<Sight>,
}

struct Installed {
    manifest: Verified<Manifest>,
    number: u64,
}

/// Something to install.
#[derive(Clone)]
struct Job(Arc<Accepted>);

/// An accepted offer, and the connection it was made on.
struct Accepted {
    offer: OfferId,
    manifest: Verified<Manifest>,
    full: bool,
    since: Instant,
    outbox: Outbox,
}

impl Work for Job {
    fn is_same(&self, other: &Self) -> bool {
        self.0.manifest.payload_sha256() == other.0.manifest.payload_sha256()
    }
}

impl Host {
    pub(super) fn new(
        credentials: Arc<Credentials>,
        keys: Verified<KeySet>,
        databases: Arc<Databases>,
        disk: &Disk,
        sight: Arc<Sight>,
    ) -> Self {
        Self {
            credentials,
            trust: Trust::new(keys, None),
            databases,
            disk: disk.clone(),
            staged: Disk::new(),
            installed: None,
            pending: BTreeMap::new(),
            receipts: 0,
            slot: Slot::new(false),
            outbox: None,
            transfers: JoinSet::new(),
            cut: CancellationToken::new(),
            sight,
        }
    }

    /// Lives until its link ends.
    pub(super) async fn run(mut self, mut link: mpsc::Receiver<link::Event>) {
        loop {
            let due = self.slot.deadline();
            tokio::select! {
                biased;
                Some(ended) = self.transfers.join_next() => {
                    let (name, made) = ended.expect("a transfer does not panic");
                    self.arrived(name, made);
                }
                event = link.recv() => match event {
                    Some(event) => self.heard(event),
                    None => return,
                },
                () = until(due) => self.happened(Event::Tick),
            }
        }
    }

    fn heard(&mut self, event: link::Event) {
        match event {
            link::Event::Welcome {
                welcome,
                outbox,
                answer,
                address: _,
            } => {
                let judged = match &welcome.keys {
                    Some(keys) => self.take_keys(keys).map_err(|error| error.to_string()),
                    None => Ok(()),
                };
                if judged.is_ok() {
                    self.greet(outbox);
                }
                let _ = answer.send(judged); // the link may have ended
            }
            link::Event::Message(ToAgent::Offer(offer)) => self.offered(&offer),
            link::Event::Message(ToAgent::ReceiptAck { seq }) => {
                if let Some((generation, _)) = self.pending.remove(&seq) {
                    self.sight.now().acknowledged = generation;
                }
            }
            link::Event::Message(
                ToAgent::Welcome(_)
                | ToAgent::Fresh { .. }
                | ToAgent::Checkpoint { .. }
                | ToAgent::Error { .. },
            ) => {}
            link::Event::Part(part, stream) => self.part(part, stream),
            link::Event::Disconnected { .. } => {
                self.outbox = None;
                self.sight.now().connected = false;
                self.happened(Event::Disconnected);
            }
        }
    }

    fn take_keys(&mut self, keys: &Envelope) -> Result<(), TrustError> {
        if let Some(keys) = self.trust.judge_keys(keys)? {
            self.trust.adopt_keys(keys);
        }
        Ok(())
    }

    /// Hello, and what the master has not heard.
    fn greet(&mut self, outbox: Outbox) {
        let installed = self.installed.as_ref();
        let hello = Hello {
            accepts: [Feature::WideNames, Feature::LargeManifests]
                .into_iter()
                .collect(),
            installed: installed.map(|installed| installed.manifest.envelope().clone()),
            outcome: installed.map(|_| Outcome::Live),
            files: installed.map_or_else(Vec::new, |_| self.files()),
            ..Hello::new(env!("CARGO_PKG_VERSION"), no_clamd())
        };
        say(&outbox, &ToMaster::Hello(Box::new(hello)));
        for (_, receipt) in self.pending.values() {
            let receipt = receipt.clone();
            say(&outbox, &ToMaster::Receipt { receipt });
        }
        self.outbox = Some(outbox);
        let mut sight = self.sight.now();
        sight.connected = true;
        sight.welcomes += 1;
        sight.welcomed = Some(Instant::now());
    }

    fn files(&self) -> Vec<FileState> {
        let state = |(name, object): (&DatabaseName, &Object)| FileState {
            name: name.clone(),
            size: object.size,
            sha256: object.digest,
        };
        self.disk.iter().map(state).collect()
    }

    fn offered(&mut self, offer: &Offer) {
        let Some(outbox) = self.outbox.clone() else {
            return;
        };
        let manifest = match self.judge(offer) {
            Ok(manifest) => manifest,
            Err(error) => {
                self.sight.now().refused += 1;
                let refusal = ToMaster::Error {
                    offer: Some(offer.offer),
                    message: error.to_string(),
                    other_master: None,
                };
                return say(&outbox, &refusal);
            }
        };
        if let Some(mark) = self.trust.raised(&manifest) {
            self.trust.adopt_mark(mark);
        }
        let accepted = Accepted {
            offer: offer.offer,
            manifest,
            full: offer.full,
            since: Instant::now(),
            outbox,
        };
        self.happened(Event::Offered(Job(Arc::new(accepted))));
    }

    fn judge(&mut self, offer: &Offer) -> Result<Verified<Manifest>, TrustError> {
        if let Some(keys) = &offer.keys {
            self.take_keys(keys)?;
        }
        let manifest = self.trust.judge_manifest(&offer.manifest, None)?;
        self.trust
            .judge_fresh(&offer.fresh, manifest.payload_sha256())?;
        Ok(manifest)
    }

    fn happened(&mut self, event: Event<Job>) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let actions = self.slot.handle(event, Instant::now(), rand::random());
            events.extend(
                actions
                    .into_iter()
                    .filter_map(|action| self.perform(action)),
            );
        }
    }

    /// Does what the slot wants; returns what it must hear of at once.
    fn perform(&mut self, action: Action<Job>) -> Option<Event<Job>> {
        match action {
            Action::Plan { job, full: _ } => {
                let missing = self.missing(&job.0.manifest);
                Some(Event::Planned {
                    missing: missing.map(|file| file.name.clone()).collect(),
                    splay: Duration::ZERO,
                })
            }
            Action::Need(job) => {
                self.cut = CancellationToken::new();
                let need = |file: &ManifestFile| NeedFile {
                    name: file.name.clone(),
                    have: match self.disk.get(&file.name).filter(|_| !job.0.full) {
                        Some(object) => Have::Sha256(object.digest),
                        None => Have::Nothing,
                    },
                    resume_at: 0,
                    resume: None,
                };
                let files = self.missing(&job.0.manifest).map(need).collect();
                let offer = job.0.offer;
                say(&job.0.outbox, &ToMaster::Need { offer, files });
                None
            }
            Action::Abort => {
                self.cut.cancel();
                None
            }
            Action::Install(job) => {
                self.install(&job.0);
                Some(Event::Installed { fault: false })
            }
            // Nothing waits here, and no host is at fault.
            Action::Wait(..) | Action::Fault(_) => None,
        }
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

    fn part(&mut self, part: Part, stream: RecvStream) {
        let file = self
            .slot
            .job()
            .and_then(|job| job.0.manifest.file(&part.name));
        let Some(file) = file.cloned() else {
            return; // of an older offer
        };
        if !self.slot.begin(&part.name) {
            return;
        }
        let base = self.disk.get(&part.name).copied();
        let (databases, cut, sight) =
            (self.databases.clone(), self.cut.clone(), self.sight.clone());
        self.transfers.spawn(async move {
            let received = receive(&part, stream, base, file, databases, &sight);
            let made = cut.run_until_cancelled(received).await;
            (part.name, made.unwrap_or(Err(Ending::Interrupted)))
        });
    }

    fn arrived(&mut self, name: DatabaseName, made: Result<Object, Ending>) {
        let ending = match made {
            Ok(object) => {
                self.staged.insert(name.clone(), object);
                Ending::Good
            }
            Err(ending) => ending,
        };
        self.happened(Event::PartEnded(name, ending));
    }

    /// Everything is here: the new set takes the place of the old, and the master hears of it.
    fn install(&mut self, job: &Accepted) {
        let manifest = &job.manifest;
        let placed = |file: &ManifestFile| {
            let (digest, size) = (file.sha256, file.size);
            (file.name.clone(), Object { digest, size })
        };
        self.disk = manifest.files.iter().map(placed).collect();
        self.staged.clear();
        let number = self.installed.as_ref().map_or(0, |last| last.number) + 1;
        self.installed = Some(Installed {
            manifest: manifest.clone(),
            number,
        });
        self.receipts += 1;
        let receipt = Receipt {
            fleet: self.credentials.fleet.clone(),
            agent: self.credentials.agent.clone(),
            seq: self.receipts,
            epoch: manifest.epoch,
            generation: manifest.generation,
            manifest_sha256: manifest.payload_sha256(),
            install: InstallNumber(number),
            outcome: Outcome::Live,
            files: self
                .files()
                .into_iter()
                .map(|file| ReceiptFile::new(file, manifest))
                .collect(),
            content: None,
            missing: Vec::new(),
            unlisted: 0,
            foreign: Vec::new(),
            adopted: Vec::new(),
            drift: Vec::new(),
            blamed: None,
            clamd: no_clamd(),
            error: None,
            took: job.since.elapsed().as_secs_f64(),
            time: now(),
        };
        let receipt = sign(receipt, &self.credentials.key.0).envelope().clone();
        let generation = manifest.generation.number();
        self.pending
            .insert(self.receipts, (generation, receipt.clone()));
        self.sight.now().installed = generation;
        if let Some(outbox) = &self.outbox {
            say(outbox, &ToMaster::Receipt { receipt });
        }
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
) -> Result<Object, Ending> {
    let length = part.encoding.length;
    let is_bounded = length <= file.size + PART_OVERHEAD_BYTES && part.offset == 0;
    let limit = usize::try_from(length).ok().filter(|_| is_bounded);
    let bytes = stream.read_to_end(limit.ok_or(Ending::Spoilt)?).await;
    let bytes = bytes.map_err(|_| Ending::Interrupted)?;
    let came = bytes.len() as u64;
    if came != length {
        return Err(Ending::Interrupted);
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
            Err(Ending::Spoilt)
        }
    }
}

/// Queues a message for the master.
fn say(outbox: &Outbox, message: &ToMaster) {
    outbox.send(message).expect("it fits a frame");
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
