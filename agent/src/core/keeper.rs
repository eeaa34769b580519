//! Everything that the agent knows, in one place, and the loop that acts on it.
//!
//! One task owns trust, receipts, the slot and the local log; the link, the admin socket and the
//! workers send it messages. It writes to disk between two of them, so it has a thread of its own.
//! What takes long (reading the disk, transfers, installs) is done by workers, whose end is a
//! message like any other.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clamcast_daemon::durable;
use clamcast_daemon::pulse::{BEAT, Pulse};
use clamcast_proto::audit::Checkpoint;
use clamcast_proto::dsse::{Envelope, Verified};
use clamcast_proto::fresh::Freshness;
use clamcast_proto::keys::KeySetError;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::{
    ClamdState, Contents, Drift, ERROR_BYTES_MAX, Outcome, Receipt, ReceiptFile,
};
use clamcast_proto::trust::TrustError;
use clamcast_proto::wire::{
    Feature, Features, Hello, NeedFile, Offer, OfferId, OtherMaster, Part, Phase, ToAgent,
    ToMaster, Welcome, close,
};
use clamcast_proto::{AuditEvent, DatabaseName, Digest, FleetName, Position};
use jiff::Timestamp;
use quinn::{RecvStream, VarInt};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::chain;
use crate::clamd::Prover;
use crate::config::Stale;
use crate::core::audit::AuditLog;
use crate::core::drift::{Event as GuardEvent, Guard, Outages};
use crate::core::needs::Needs;
use crate::core::receipts::Receipts;
use crate::core::slot::{Action, Ending, Event as SlotEvent, Slot, Work};
use crate::core::status::{HeldBack, LastStatus, MasterStatus, Status};
use crate::core::trust::{RefusedKeys, TrustStore};
use crate::host::state::{self, State, StateError};
use crate::host::updater::Updater;
use crate::install::watch::Watch;
use crate::install::{
    Completed, Depth, HostFault, Installer, Look, ReceiveError, RepairError, Sighting,
};
use crate::link::backoff::Backoff;
use crate::link::endpoint::Credentials;
use crate::link::part::PartReader;
use crate::link::{self, Outbox};

mod drift;

pub(crate) use drift::kept_rest;

/// What this agent accepts beyond version 0.1.0.
pub const ACCEPTED: [Feature; 2] = [Feature::WideNames, Feature::LargeManifests];

/// Most files that a receipt lists for a master of version 0.1.0, which publishes no more.
const LISTED_MAX: usize = 2_000;

/// While something is going on, the master hears of it at least this often.
pub const PROGRESS: Duration = Duration::from_secs(15);

/// Waits between two looks at a clamd that has not shown the installed set yet.
pub const PROBE: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));

/// A clamd that was seen with the installed set is asked this often whether it is still there.
pub const CLAMD_LOOK: Duration = Duration::from_secs(60);

/// The wall clock is looked at this often: it may have been set.
const CLOCK_LOOK: Duration = Duration::from_secs(600);

/// So far this host's clock and the master's may differ, in seconds, before somebody should look:
/// more than a message travels, less than what certificates and logs suffer from.
pub const CLOCK_SKEW_SECS_MAX: i64 = 300;

/// So long a host that never received a freshness statement is not stale: what a master's `[signing]
/// fresh` is unless told otherwise, which the host learns only with the first statement.
pub const FRESH_UNHEARD: Duration = Duration::from_secs(48 * 3600);

/// After this long at the end, what is still going on is left to the journal.
const STOP_GRACE: Duration = Duration::from_secs(20);

/// A phase that an install reports is lost when this many wait already, which is harmless.
const PHASES_MAX: usize = 64;

/// What the keeper is asked or told from outside the link.
#[derive(Debug)]
pub enum Question {
    /// For the agent's status.
    Status(oneshot::Sender<Status>),
    /// The configuration was read again; or, for this reason, it is not in use.
    Reloaded(Result<(), String>),
}

/// What the agent knows.
pub struct Keeper {
    state: State,
    fleet: FleetName,
    credentials: Arc<Credentials>,
    trust: TrustStore,
    receipts: Receipts,
    audit: AuditLog,
    stale: Stale,
    installer: Installer<Prover>,
    prover: Prover,
    /// Why the configuration on disk is not in use, if it is not.
    unused_configuration: Option<String>,

    slot: Slot<Arc<Job>>,
    /// What the last plan found missing.
    needs: Needs,
    /// Ends the transfers of the job in the slot.
    transfers: CancellationToken,
    /// Bytes that came for it, and how many the master knows of.
    received: Arc<AtomicU64>,
    reported: u64,
    /// What failed last, in case it is the reason to give up.
    trouble: Option<HostFault>,
    phase: Phase,
    progress_at: Instant,

    master: Master,
    /// What the master that was connected last accepts.
    accepted: Features,
    fresh: Option<KeptFresh>,
    first_start: Timestamp,
    stale_said: bool,
    clock_said: bool,
    refusal: Option<String>,
    probing: Probing,

    /// Watches over the installed files.
    guard: Guard,
    watch: Watch,
    /// Breaks a look off.
    looking: CancellationToken,
    /// Ends the waiting of a repair for clamd; `None` while there is none.
    repairing: Option<CancellationToken>,
    /// Whether somebody else's updater is being looked for.
    scanning: bool,
    /// The last one that was seen.
    updater: Option<(Updater, Timestamp)>,
    /// Why the database directory cannot be used.
    blocked: Option<String>,
    /// Which of these faults are reported.
    outages: Outages,
    /// Whether damaged files can come from the master alone.
    lacking: bool,
    /// When every byte was read last.
    rehashed: Option<Timestamp>,
    /// The manifest of the last install.
    guarded: Option<Digest>,

    workers: JoinSet<Done>,
    phases: (mpsc::Sender<Phase>, mpsc::Receiver<Phase>),
    pulse: Pulse,
    stop: CancellationToken,
}

/// The word that a generation is current, as it was heard.
#[derive(Deserialize, Serialize)]
struct KeptFresh {
    #[serde(flatten)]
    fresh: Freshness,
    /// Until when it holds by this host's clock, which may have been wrong then and be set since.
    until: Timestamp,
}

/// An accepted offer.
#[derive(Debug)]
struct Job {
    offer: OfferId,
    manifest: Verified<Manifest>,
    rehash: bool,
    full: bool,
    /// It was taken although it is below the mark, because it is installed.
    mends: bool,
    since: Instant,
    /// The connection that it was made on: its number means nothing on another.
    outbox: Outbox,
}

impl Work for Arc<Job> {
    fn is_same(&self, other: &Self) -> bool {
        self.manifest.payload_sha256() == other.manifest.payload_sha256()
    }
}

#[derive(Debug)]
enum Master {
    Connected {
        address: String,
        version: String,
        since: Timestamp,
        clock_ahead_secs: i64,
        outbox: Outbox,
    },
    Away {
        since: Timestamp,
        error: Option<String>,
    },
}

#[derive(Debug)]
struct Probing {
    /// When the next look is due; `None` while one is taken, or an install is under way.
    at: Option<Instant>,
    /// Whether one is taken.
    running: bool,
    backoff: Backoff,
    stop: CancellationToken,
}

/// What a worker came back with.
#[derive(Debug)]
enum Done {
    /// With what an ordered look found wrong before.
    Planned(Result<Vec<NeedFile>, HostFault>, Vec<Sighting>),
    Answered(Box<Completed>),
    Received(DatabaseName, Result<(), ReceiveError>),
    Faulted(Box<Completed>, Instant),
    Installed(Box<Completed>, Instant),
    Resumed(Option<Box<Completed>>),
    Probed(Option<Box<Completed>>),
    Looked,
    Scanned(Option<Updater>),
    Inspected(Depth, Look, Option<Updater>),
    Repaired(Result<Option<Box<Completed>>, RepairError>),
}

/// What a keeper is made of.
pub struct Begin {
    /// The state directory.
    pub state: State,
    /// Who this host is.
    pub credentials: Arc<Credentials>,
    /// What is believed.
    pub trust: TrustStore,
    /// What the master has not heard.
    pub receipts: Receipts,
    /// The local log.
    pub audit: AuditLog,
    /// What is done with a stale offer.
    pub stale: Stale,
    /// Installs. Its journal has been replayed.
    pub installer: Installer<Prover>,
    /// Knows clamd.
    pub prover: Prover,
    /// Decides about changed files.
    pub guard: Guard,
    /// Sees them change.
    pub watch: Watch,
    /// Takes the keeper's beats.
    pub pulse: Pulse,
}

/// Why an offer is not taken.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Trust(#[from] TrustError),
    #[error("{0}")]
    Keys(String),
    #[error(
        "the freshness statement for {position} expired at {expires}, and `stale = \"refuse\"`"
    )]
    Stale {
        position: Position,
        expires: Timestamp,
    },
}

impl Keeper {
    /// Takes over what was kept. Whatever the end of the last run interrupted is ended first.
    pub fn new(begin: Begin, stop: CancellationToken) -> Self {
        let Begin {
            state,
            credentials,
            trust,
            receipts,
            audit,
            stale,
            installer,
            prover,
            guard,
            watch,
            pulse,
        } = begin;
        let fresh = state::load(&fresh_path(&state), "the master says it again");
        let fresh = fresh.unwrap_or_else(|error| {
            tracing::warn!(error = chain(&error), "the kept freshness is of no use");
            None
        });
        let accepted = state::load(
            &accepted_path(&state),
            "receipts list every file until then",
        );
        let accepted = accepted.unwrap_or_else(|error| {
            tracing::warn!(
                error = chain(&error),
                "what the master accepts is not known"
            );
            None
        });
        let first_start = first_start(&state, Timestamp::now(), credentials.certificate.not_before);
        Self {
            fleet: credentials.fleet.clone(),
            slot: Slot::new(true),
            needs: Needs::default(),
            transfers: stop.child_token(),
            received: Arc::default(),
            reported: 0,
            trouble: None,
            phase: Phase::Idle,
            progress_at: Instant::now(),
            master: Master::Away {
                since: Timestamp::now(),
                error: None,
            },
            accepted: accepted.unwrap_or_default(),
            fresh,
            first_start,
            stale_said: false,
            clock_said: false,
            refusal: None,
            probing: Probing {
                at: None,
                running: false,
                backoff: PROBE,
                stop: stop.child_token(),
            },
            guard,
            watch,
            looking: stop.child_token(),
            repairing: None,
            scanning: false,
            updater: None,
            blocked: None,
            outages: Outages::new(Instant::now()),
            lacking: false,
            rehashed: None,
            guarded: installer
                .installed()
                .map(|installed| installed.set.sha256()),
            workers: JoinSet::new(),
            phases: mpsc::channel(PHASES_MAX),
            state,
            credentials,
            trust,
            receipts,
            audit,
            stale,
            installer,
            prover,
            unused_configuration: None,
            pulse,
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
        let detail = json!({ "version": env!("CARGO_PKG_VERSION") });
        let installed = self.installed_position();
        self.audit
            .note(AuditEvent::Started, installed, None, detail);
        self.watch_over();
        self.resume();
        self.look();
        let stop = self.stop.clone();
        loop {
            let wake = self.wake().into();
            self.pulse.beat();
            self.pulse.say(self.summary());
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(phase) = self.phases.1.recv() => self.entered(phase),
                Some(done) = self.workers.join_next() => self.done(done.unwrap_or_else(died)),
                Some(event) = link.recv() => self.heard(event),
                run_begun = self.watch.event() => self.touched(run_begun),
                Some(question) = questions.recv() => self.asked(question),
                () = sleep_until(wake) => self.tick(),
                _ = beats.tick() => {}
            }
        }
        let grace = async {
            while let Some(done) = self.workers.join_next().await {
                self.wind_up(done.unwrap_or_else(died));
            }
        };
        if timeout(STOP_GRACE, grace).await.is_err() {
            tracing::warn!("an install is not ended after {STOP_GRACE:?}; the next start ends it");
            self.workers.detach_all(); // what is on the disk's side cannot be cut short anyway
        }
        let installed = self.installed_position();
        self.audit
            .note(AuditEvent::Stopped, installed, None, json!({}));
    }

    fn asked(&mut self, question: Question) {
        match question {
            // Whoever asked may have gone.
            Question::Status(answer) => drop(answer.send(self.status())),
            Question::Reloaded(Ok(())) => {
                self.audit
                    .note(AuditEvent::Reload, None, Some("done"), json!({}));
            }
            Question::Reloaded(Err(reason)) => {
                let detail = json!({ "reason": reason, "in_use": "the old configuration" });
                self.audit
                    .note(AuditEvent::Reload, None, Some("failed"), detail);
                self.unused_configuration = Some(reason);
            }
        }
    }

    /// Ends what `open` rolled forward.
    fn resume(&mut self) {
        let (installer, stop) = (self.installer.clone(), self.stop.clone());
        let progress = self.progress();
        self.phase = Phase::Proving;
        self.workers.spawn(async move {
            let completed = installer.resume(stop, progress).await;
            Done::Resumed(completed.map(Box::new))
        });
    }

    /// Asks how clamd is, for Hello.
    fn look(&mut self) {
        let (prover, stop) = (self.prover.clone(), self.stop.clone());
        self.workers.spawn(async move {
            let _ = stop.run_until_cancelled(prover.look()).await; // the prover remembers it
            Done::Looked
        });
    }

    /// The next moment at which something is due without anybody saying so.
    fn wake(&self) -> Instant {
        let now = Instant::now();
        let mut wake = now + CLOCK_LOOK;
        let mut due = |at: Option<Instant>| wake = at.map_or(wake, |at| wake.min(at));
        due(self.slot.deadline());
        due(self.probing.at);
        due(self.guard.deadline().filter(|_| !self.is_busy()));
        if self.slot.job().is_some() && !self.slot.is_resting() {
            due(Some(self.progress_at));
        }
        if !self.stale_said {
            let left = self.fresh_until().duration_since(Timestamp::now());
            due(Some(now + Duration::try_from(left).unwrap_or_default()));
        }
        wake
    }

    fn tick(&mut self) {
        let now = Instant::now();
        if self.slot.deadline().is_some_and(|at| at <= now) {
            self.slot_event(SlotEvent::Tick);
        }
        if self.probing.at.is_some_and(|at| at <= now) {
            self.probe();
        }
        if !self.is_busy() {
            self.guard_event(GuardEvent::Tick);
        }
        if self.progress_at <= now {
            self.report_progress();
        }
        let stale = self.stale_since().is_some();
        if stale && !mem::replace(&mut self.stale_said, stale) {
            tracing::warn!(
                heard = self.fresh.is_some(),
                "the freshness statement of the master expired, or none ever came; this host's \
                 signatures grow old"
            );
        }
    }

    /// Until when the newest freshness statement holds; without any, until when this host is not
    /// stale.
    fn fresh_until(&self) -> Timestamp {
        let unheard = || self.first_start.checked_add(FRESH_UNHEARD);
        let heard = self.fresh.as_ref().map(|fresh| fresh.until);
        heard.unwrap_or_else(|| unheard().unwrap_or(Timestamp::MAX))
    }

    /// When this host became stale, if it has.
    fn stale_since(&self) -> Option<Timestamp> {
        let until = self.fresh_until();
        (until < Timestamp::now()).then_some(until)
    }

    // What the master says.

    fn heard(&mut self, event: link::Event) {
        match event {
            link::Event::Welcome {
                welcome,
                address,
                outbox,
                answer,
            } => {
                let judged = self.judge_welcome(&welcome);
                if judged.is_ok() {
                    // Before the link goes on, so that nothing is said before Hello.
                    self.connected(*welcome, address.to_string(), outbox);
                }
                // Without anybody to hear the answer the connection is gone already.
                let _ = answer.send(judged);
            }
            link::Event::Message(message) => self.message(message),
            link::Event::Part(part, stream) => self.part(part, stream),
            link::Event::Disconnected { error } => {
                let now = Timestamp::now();
                let since = match &self.master {
                    Master::Connected { .. } => now,
                    Master::Away { since, .. } => *since,
                };
                self.master = Master::Away {
                    since,
                    error: Some(chain(&*error)),
                };
                self.slot_event(SlotEvent::Disconnected);
            }
        }
    }

    fn judge_welcome(&mut self, welcome: &Welcome) -> Result<(), String> {
        let ahead = ahead_secs(welcome.time);
        let differ = ahead.abs() > CLOCK_SKEW_SECS_MAX;
        if differ && !self.clock_said {
            tracing::warn!(
                ahead_secs = ahead,
                "this host's clock and the master's differ; which one is wrong?"
            );
        }
        self.clock_said = differ;
        let Some(keys) = &welcome.keys else {
            return Ok(());
        };
        self.take_keys(keys)
            .map_err(|error| format!("has keys that are not believed: {error}"))
    }

    /// Judges a key set and uses it if it is newer. An older one is no reason to quarrel: this
    /// host goes on with its own, as a master that was restored from a backup must.
    fn take_keys(&mut self, keys: &Envelope) -> Result<(), String> {
        match self.trust.offer_keys(keys) {
            Ok(false) => Ok(()),
            Ok(true) => {
                let keys = self.trust.trust().keys();
                let (version, epoch) = (keys.version, keys.epoch);
                tracing::info!(version, %epoch, "newer key set");
                let detail = json!({ "version": version, "epoch": epoch });
                self.audit.note(AuditEvent::Keys, None, None, detail);
                Ok(())
            }
            Err(RefusedKeys::Trust(TrustError::Keys(old @ KeySetError::Old { .. }))) => {
                tracing::warn!(error = chain(&old), "the master has another key set");
                Ok(())
            }
            Err(error) => {
                let error = chain(&error);
                tracing::error!(error, "the master's key set is refused");
                self.refused("keys", None, &error);
                Err(error)
            }
        }
    }

    fn connected(&mut self, welcome: Welcome, address: String, outbox: Outbox) {
        self.learn_accepted(&welcome.accepts);
        let hello = self.hello(&welcome.known);
        let waiting = self.receipts.pending();
        tracing::debug!(address, receipts = waiting.len(), "hello");
        let mut sent = outbox.send(&ToMaster::Hello(Box::new(hello)));
        for receipt in waiting {
            let receipt = receipt.clone();
            sent = sent.and_then(|()| outbox.send(&ToMaster::Receipt { receipt }));
        }
        if let Err(error) = sent {
            tracing::error!(error = chain(&error), "cannot tell the master everything");
        }
        self.master = Master::Connected {
            address,
            version: welcome.master_version,
            since: Timestamp::now(),
            clock_ahead_secs: ahead_secs(welcome.time),
            outbox,
        };
        self.guard_event(GuardEvent::Connected);
    }

    /// Keeps what the master accepts: a receipt that is made while the agent is not connected has the form
    /// that this master takes.
    fn learn_accepted(&mut self, accepts: &Features) {
        if self.accepted == *accepts {
            return;
        }
        if let Err(error) = state::save(&accepted_path(&self.state), accepts) {
            tracing::warn!(error = chain(&error), "what the master accepts is not kept");
        }
        self.accepted = accepts.clone();
    }

    /// What is installed, and what the last receipt said, as far as the disk bears it out. A set
    /// with files that only the master has is not presented as installed, so that it is offered
    /// again. Of a manifest that the master has (`known`) the digest is enough.
    fn hello(&self, known: &[Digest]) -> Hello {
        let lacking = self.is_lacking();
        let installed = self.installer.installed().filter(|_| !lacking);
        let last = self.receipts.last();
        // A crash may have cost it the receipt of the record on disk.
        let is_live = installed.as_ref().is_some_and(|installed| {
            installed.outcome == Outcome::Live
                && last.is_some_and(|last| last.manifest_sha256 == installed.set.sha256())
        });
        let outcome = match is_live {
            true => Some(Outcome::Live),
            false => last.map(|last| last.outcome),
        };
        let contents = installed.as_ref().map(|installed| {
            let found = self.found(&installed.set);
            Contents::of(&installed.set.manifest, &found)
        });
        let installed_sha256 = installed.as_ref().map(|installed| installed.set.sha256());
        let installed_sha256 = installed_sha256.filter(|digest| known.contains(digest));
        let hostname = nix::unistd::gethostname().ok();
        let hostname = hostname.map(|name| name.to_string_lossy().into_owned());
        Hello {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            accepts: ACCEPTED.into_iter().collect(),
            clamd: self.installer.clamd(),
            outcome: outcome.filter(|_| !lacking),
            content: contents.as_ref().map(|it| it.content),
            files: contents
                .as_ref()
                .map_or_else(Vec::new, |it| it.files.clone()),
            missing: contents.map_or_else(Vec::new, |it| it.missing),
            foreign: last.map_or_else(Vec::new, |last| last.foreign.clone()),
            installed_sha256,
            installed: installed
                .filter(|_| installed_sha256.is_none())
                .map(|installed| installed.set.into()),
            labels: hostname
                .map(|name| ("hostname".to_owned(), name))
                .into_iter()
                .collect(),
        }
    }

    fn message(&mut self, message: ToAgent) {
        match message {
            ToAgent::Offer(offer) => self.offer(&offer),
            ToAgent::Fresh { fresh } => {
                let trust = self.trust.trust();
                if trust.mark().is_none() {
                    return; // nothing was accepted here that it could be about
                }
                match trust.judge_renewal(&fresh, self.installer.settled()) {
                    Ok(fresh) => self.keep_fresh(&fresh),
                    Err(error) => {
                        let message = chain(&error);
                        tracing::warn!(error = message, "the master's word is not taken");
                        self.say(&ToMaster::Error {
                            offer: None,
                            message,
                            other_master: None,
                        });
                    }
                }
            }
            ToAgent::ReceiptAck { seq } => {
                if let Err(error) = self.receipts.acknowledge(seq) {
                    tracing::error!(error = chain(&error), "an acknowledged receipt stays");
                }
            }
            ToAgent::Checkpoint { checkpoint } => {
                let keys = &self.trust.trust().keys().audit;
                // Of any key in the set: the master's may have changed. They are this fleet's alone.
                if let Err(error) = Checkpoint::verify(&checkpoint, keys, None) {
                    tracing::warn!(error = chain(&error), "the checkpoint is not believed");
                    return;
                }
                let path = self.state.path().join("checkpoint");
                if let Err(error) = durable::write(&path, checkpoint.as_bytes(), 0o600) {
                    tracing::warn!(%error, "the master's checkpoint is not kept");
                }
            }
            // Not as `message`: that would be printed as it is, line breaks and all.
            ToAgent::Error { message } => tracing::warn!(said = message, "the master objects"),
            ToAgent::Welcome(_) => tracing::warn!("the master says welcome twice"),
        }
    }

    fn offer(&mut self, offer: &Offer) {
        let Master::Connected { outbox, .. } = &self.master else {
            return;
        };
        let outbox = outbox.clone();
        let (manifest, fresh) = match self.judge(offer) {
            Ok(accepted) => accepted,
            Err(refusal) => {
                let message = chain(&refusal);
                match &refusal {
                    // Somebody else signs with this fleet's keys: nothing is more urgent.
                    Refusal::Trust(
                        TrustError::TwoManifests { .. } | TrustError::TwoPublishers { .. },
                    ) => tracing::error!(error = message, "ALARM: an offer is refused"),
                    Refusal::Trust(_) | Refusal::Keys(_) | Refusal::Stale { .. } => {
                        tracing::warn!(error = message, "an offer is refused");
                    }
                }
                self.refused("offer", None, &message);
                self.say(&ToMaster::Error {
                    offer: Some(offer.offer),
                    message,
                    other_master: self.other_master(&refusal).map(Box::new),
                });
                return;
            }
        };
        self.refusal = None;
        self.keep_fresh(&fresh);
        let position = manifest.position();
        let known = self.trust.trust().mark().map(|mark| mark.manifest_sha256);
        if known != Some(manifest.payload_sha256()) || offer.rehash {
            tracing::info!(%position, forced = offer.rehash, "offer accepted");
            let detail = json!({
                "manifest_sha256": manifest.payload_sha256(), "forced": offer.rehash,
            });
            self.audit
                .note(AuditEvent::Accepted, Some(position), None, detail);
        }
        let installed = self.installer.installed();
        let has_it = installed.is_some_and(|i| i.set.sha256() == manifest.payload_sha256());
        if has_it
            && !offer.rehash
            && let Some(message) = self.stands_back()
        {
            self.say(&ToMaster::Error {
                offer: Some(offer.offer),
                message,
                other_master: None,
            });
            return;
        }
        let mends = self.trust.trust().is_below(&manifest);
        self.accept(&manifest); // if that fails, it is tried again before anything is done
        let job = Job {
            offer: offer.offer,
            manifest,
            rehash: offer.rehash,
            full: offer.full,
            mends,
            since: Instant::now(),
            outbox,
        };
        if offer.rehash {
            // An operator waits: receipts that the master gets before this answer an earlier offer.
            say_progress(&job, Phase::Fetching, None);
        }
        self.slot_event(SlotEvent::Offered(Arc::new(job)));
    }

    fn judge(
        &mut self,
        offer: &Offer,
    ) -> Result<(Verified<Manifest>, Verified<Freshness>), Refusal> {
        if let Some(keys) = &offer.keys {
            self.take_keys(keys).map_err(Refusal::Keys)?;
        }
        let trust = self.trust.trust();
        let manifest = trust.judge_manifest(&offer.manifest, self.installer.settled())?;
        let fresh = trust.judge_fresh(&offer.fresh, manifest.payload_sha256())?;
        let (position, now) = (manifest.position(), Timestamp::now());
        let expires = fresh.holds_until(now);
        if expires < now {
            if self.stale == Stale::Refuse {
                return Err(Refusal::Stale { position, expires });
            }
            tracing::warn!(%position, %expires, "the freshness statement of an offer expired");
        }
        Ok((manifest, fresh))
    }

    /// What this host follows, if an offer is declined because of another master.
    fn other_master(&self, refusal: &Refusal) -> Option<OtherMaster> {
        let (
            Refusal::Trust(TrustError::TwoManifests { .. } | TrustError::TwoPublishers { .. }),
            Some(mark),
        ) = (refusal, self.trust.trust().mark())
        else {
            return None;
        };
        Some(OtherMaster {
            publisher: mark.publisher.clone(),
            position: mark.position,
            manifest_sha256: mark.manifest_sha256,
        })
    }

    /// Keeps the word that a generation is current, unless a longer one for it is kept already.
    fn keep_fresh(&mut self, fresh: &Freshness) {
        let until = fresh.holds_until(Timestamp::now());
        let longer = |kept: &KeptFresh| {
            kept.fresh.manifest_sha256 == fresh.manifest_sha256 && kept.until >= until
        };
        if self.fresh.as_ref().is_some_and(longer) {
            return;
        }
        let fresh = fresh.clone();
        let kept = KeptFresh { fresh, until };
        if let Err(error) = state::save(&fresh_path(&self.state), &kept) {
            tracing::warn!(error = chain(&error), "the master's word is not kept");
        }
        self.fresh = Some(kept);
        self.stale_said = false;
    }

    /// Why an offer that was taken is not to be carried out, now that its turn has come: it was good
    /// because it was installed, and another set has taken its place meanwhile.
    fn made_void(&self, job: &Job) -> Option<String> {
        let settled = self.installer.settled();
        let is_void = job.mends && settled != Some(job.manifest.payload_sha256());
        let position = job.manifest.position();
        is_void.then(|| format!("{position} is not installed any more, and lower than what is"))
    }

    /// Remembers an accepted manifest before anything is done about it.
    fn accept(&mut self, manifest: &Verified<Manifest>) -> bool {
        let Err(error) = self.trust.accept(manifest, Timestamp::now()) else {
            return true;
        };
        tracing::error!(error = chain(&error), "cannot remember an accepted offer");
        let reason = chain(&error);
        self.trouble = Some(if let StateError::Write { path, source } = error {
            let doing = "write";
            HostFault::Io {
                doing,
                path,
                source,
            }
        } else {
            fault_of("keep", PathBuf::from("mark.json"), reason)
        });
        false
    }

    /// Notes a refusal, once while it repeats itself.
    fn refused(&mut self, what: &str, position: Option<Position>, why: &str) {
        if self.refusal.as_deref() == Some(why) {
            return;
        }
        self.refusal = Some(why.to_owned());
        let detail = json!({ "what": what, "error": why });
        self.audit.note(AuditEvent::Refused, position, None, detail);
    }

    // What the slot wants.

    fn slot_event(&mut self, event: SlotEvent<Arc<Job>>) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let actions = self.slot.handle(event, Instant::now(), rand::random());
            for action in actions {
                events.extend(self.perform(action));
            }
        }
        self.schedule_probe();
    }

    /// Does what the slot wants; returns what it must hear of at once.
    fn perform(&mut self, action: Action<Arc<Job>>) -> Option<SlotEvent<Arc<Job>>> {
        match action {
            Action::Plan { job, full } => {
                if let Some(message) = self.made_void(&job) {
                    tracing::warn!(said = message, "an offer is void");
                    let offer = Some(job.offer);
                    let error = ToMaster::Error {
                        offer,
                        message,
                        other_master: None,
                    };
                    if let Err(error) = job.outbox.send(&error) {
                        tracing::error!(error = chain(&error), "cannot tell the master");
                    }
                    return Some(SlotEvent::Answered);
                }
                if !self.accept(&job.manifest) {
                    return Some(SlotEvent::PlanFailed);
                }
                self.phase = Phase::Fetching;
                self.give_way();
                self.probing.stop.cancel(); // it keeps the installer, for as long as a proof takes
                self.progress_at = Instant::now() + PROGRESS;
                let (installer, stop) = (self.installer.clone(), self.stop.clone());
                self.workers.spawn_blocking(move || {
                    let Job {
                        manifest, rehash, ..
                    } = &*job;
                    if !rehash && let Some(before) = installer.refused_before(manifest) {
                        return Done::Answered(Box::new(before));
                    }
                    let look = rehash.then(|| installer.look(Depth::Ordered, &stop));
                    let wrong = match look {
                        Some(Look::Made(wrong)) => wrong,
                        Some(Look::NotNow | Look::Stopped | Look::Blocked(_)) | None => Vec::new(),
                    };
                    let planned = installer.plan(manifest, *rehash, full || job.full);
                    Done::Planned(planned, wrong)
                });
            }
            Action::Need(job) => {
                self.transfers = self.stop.child_token();
                self.trouble = None;
                self.ask(&job);
            }
            Action::Abort => self.transfers.cancel(),
            Action::Wait(job, until) => {
                self.phase = Phase::Staged;
                let left = until.saturating_duration_since(Instant::now());
                tracing::info!(position = %job.manifest.position(), ?left, "staged, waiting");
                let until = Timestamp::now().checked_add(left).ok();
                say_progress(&job, Phase::Staged, until);
                self.progress_at = Instant::now() + PROGRESS.max(left);
            }
            Action::Install(job) => {
                self.phase = Phase::Staged;
                self.give_way();
                self.probing.stop.cancel(); // it would keep clamd, and the installer, waiting
                say_progress(&job, Phase::Staged, None);
                self.progress_at = Instant::now() + PROGRESS;
                let (installer, stop) = (self.installer.clone(), self.stop.clone());
                let progress = self.progress();
                self.workers.spawn(async move {
                    let completed = installer.install(&job.manifest, stop, progress).await;
                    Done::Installed(Box::new(completed), job.since)
                });
            }
            Action::Fault(job) => {
                let fault = self.trouble.take().unwrap_or_else(|| {
                    let reason =
                        "the files did not arrive whole, however often they were asked for"
                            .to_owned();
                    fault_of("receive", PathBuf::from("the generation"), reason)
                });
                let installer = self.installer.clone();
                self.workers.spawn_blocking(move || {
                    let completed = installer.host_fault(&job.manifest, &fault);
                    Done::Faulted(Box::new(completed), job.since)
                });
            }
        }
        None
    }

    /// Asks for the next files that are missing.
    fn ask(&mut self, job: &Job) {
        let files = self.needs.next();
        tracing::debug!(position = %job.manifest.position(), files = files.len(), "need");
        let need = ToMaster::Need {
            offer: job.offer,
            files,
        };
        if let Err(error) = job.outbox.send(&need) {
            tracing::error!(error = chain(&error), "cannot ask for files");
        }
    }

    /// A stream with a file: taken if the slot waits for it.
    fn part(&mut self, part: Part, mut stream: RecvStream) {
        let job = self.slot.job().filter(|job| job.offer == part.offer);
        let file = job.and_then(|job| job.manifest.file(&part.name)).cloned();
        let Some(file) = file.filter(|_| self.slot.begin(&part.name)) else {
            tracing::debug!(name = %part.name, "a part that nobody waits for");
            // Fails only if the stream has ended already.
            let _ = stream.stop(VarInt::from_u32(close::STOPPING));
            return;
        };
        let reader = PartReader::new(stream, self.transfers.clone(), self.received.clone());
        let installer = self.installer.clone();
        self.workers.spawn_blocking(move || {
            let result = installer.receive(&part, &file, reader);
            Done::Received(part.name, result)
        });
    }

    /// Tells of the phases of an install while it runs.
    fn progress(&self) -> impl Fn(Phase) + Send + Sync + use<> {
        let phases = self.phases.0.clone();
        move |phase| {
            let _ = phases.try_send(phase);
        }
    }

    fn entered(&mut self, phase: Phase) {
        self.phase = phase;
        self.report_progress();
    }

    /// Tells the master what is going on, if anything is.
    fn report_progress(&mut self) {
        self.progress_at = Instant::now() + PROGRESS;
        let received = self.received.load(Ordering::Relaxed);
        let moved = mem::replace(&mut self.reported, received) != received;
        let Some(job) = self.slot.job().filter(|_| !self.slot.is_resting()) else {
            return;
        };
        // A master that sends nothing must not be told that all is well.
        if self.phase != Phase::Fetching || moved {
            say_progress(job, self.phase, None);
        }
    }

    // What the workers come back with.

    fn done(&mut self, done: Done) {
        match done {
            Done::Planned(Err(fault), wrong) => {
                self.learn(wrong);
                tracing::warn!(error = chain(&fault), "cannot plan an install");
                self.trouble = Some(fault);
                self.slot_event(SlotEvent::PlanFailed);
            }
            Done::Planned(Ok(needs), wrong) => {
                self.learn(wrong);
                let missing = needs.iter().map(|need| need.name.clone()).collect();
                self.needs = Needs::new(needs);
                // An operator who forces an install does not want it to wait.
                let forced = self.slot.job().is_none_or(|job| job.rehash);
                let splay = if forced {
                    Duration::ZERO
                } else {
                    self.prover.splay()
                };
                self.slot_event(SlotEvent::Planned { missing, splay });
            }
            Done::Answered(completed) => {
                let since = self.slot.job().map(|job| job.since);
                self.complete(&completed, since, false);
                self.slot_event(SlotEvent::Answered);
            }
            Done::Received(name, result) => {
                let ending = self.received(&name, result);
                let is_due = self.needs.ended(&name);
                self.slot_event(SlotEvent::PartEnded(name, ending));
                // If the slot plans anew, the plan finds what was not asked for.
                if is_due
                    && self.slot.is_fetching()
                    && let Some(job) = self.slot.job().cloned()
                {
                    self.ask(&job);
                }
            }
            Done::Faulted(completed, since) => self.complete(&completed, Some(since), false),
            Done::Installed(completed, since) => {
                let forced = self.slot.job().is_some_and(|job| job.rehash);
                self.complete(&completed, Some(since), forced);
                self.phase = Phase::Idle;
                // A set that stays on disk is not installed again: probing goes on until clamd has it.
                let installed = self.installer.installed().map(|i| i.set.sha256());
                let stays =
                    self.installer.waits_for_clamd() && installed == Some(completed.set.sha256());
                let fault = completed.outcome == Outcome::HostFault && !stays;
                self.slot_event(SlotEvent::Installed { fault });
            }
            Done::Resumed(completed) => {
                if let Some(completed) = completed {
                    self.complete(&completed, None, false);
                }
                self.phase = Phase::Idle;
                self.slot_event(SlotEvent::Installed { fault: false });
                // Much may have happened to clamd since this host was seen with its set.
                self.probing.at = self.probing.at.map(|_| Instant::now());
            }
            Done::Looked => {}
            Done::Probed(completed) => {
                self.probing.running = false;
                if let Some(completed) = completed {
                    self.complete(&completed, None, false);
                    // It went back for a fault of the disk, with nobody to try it again.
                    let installed = self.installer.installed().map(|i| i.set.sha256());
                    let gone = installed != Some(completed.set.sha256());
                    if completed.outcome == Outcome::HostFault && gone {
                        self.say(&ToMaster::Reoffer {});
                    }
                }
                self.schedule_probe();
            }
            Done::Scanned(updater) => self.scanned(updater),
            Done::Inspected(depth, look, updater) => self.inspected(depth, look, updater),
            Done::Repaired(repaired) => self.repaired(repaired),
        }
    }

    fn received(&mut self, name: &DatabaseName, result: Result<(), ReceiveError>) -> Ending {
        let Err(error) = result else {
            tracing::debug!(%name, "received");
            return Ending::Good;
        };
        // What ends after it was cut short says nothing of its own: the reason for that stands.
        let cut_short = self.transfers.is_cancelled();
        if !cut_short {
            tracing::warn!(error = chain(&error), "a part was not taken");
        }
        let reason = chain(&error);
        let (trouble, ending) = match error {
            ReceiveError::Host { source, .. } => (source, Ending::Fault),
            ReceiveError::Interrupted { .. } => (receiving(name, reason), Ending::Interrupted),
            ReceiveError::Damaged { .. } | ReceiveError::Unexpected { .. } => {
                (receiving(name, reason), Ending::Spoilt)
            }
        };
        if !cut_short {
            self.trouble = Some(trouble);
        }
        ending
    }

    /// At the end: what came of an install is kept; nothing new is begun.
    fn wind_up(&mut self, done: Done) {
        match done {
            Done::Installed(completed, since) | Done::Faulted(completed, since) => {
                self.complete(&completed, Some(since), false);
            }
            Done::Resumed(Some(completed))
            | Done::Probed(Some(completed))
            | Done::Repaired(Ok(Some(completed))) => {
                self.complete(&completed, None, false);
            }
            Done::Resumed(None)
            | Done::Probed(None)
            | Done::Repaired(Ok(None) | Err(_))
            | Done::Scanned(_)
            | Done::Inspected(..)
            | Done::Looked
            | Done::Answered(_)
            | Done::Planned(..)
            | Done::Received(..) => {}
        }
    }

    /// What came of an install goes into the logs and to the master. `since`: when the offer was
    /// made, if it was in this run; `forced`: by an operator.
    fn complete(&mut self, completed: &Completed, since: Option<Instant>, forced: bool) {
        let manifest = &completed.set.manifest;
        let position = manifest.position();
        let error = completed.error.clone().map(|error| bounded(&error));
        let now = Timestamp::now();
        let took = since.map_or_else(
            || {
                let accepted = self.trust.accepted();
                accepted.map_or(0.0, |accepted| now.duration_since(accepted).as_secs_f64())
            },
            |since| since.elapsed().as_secs_f64(),
        );
        match completed.outcome {
            Outcome::Live => tracing::info!(%position, took, "live"),
            Outcome::Installed => tracing::warn!(
                %position, error, "installed, and clamd has yet to be seen with it"
            ),
            Outcome::Refused => tracing::error!(%position, error, "refused by clamd"),
            Outcome::HostFault => tracing::warn!(%position, error, "this host cannot take it"),
        }
        let outcome = Some(completed.outcome.as_str());
        let detail = json!({
            "install": completed.install, "error": error, "took": took,
            "adopted": completed.adopted,
        });
        self.audit
            .note(AuditEvent::Installed, Some(position), outcome, detail);
        let back = self.installed_position().filter(|back| *back != position);
        if completed.outcome == Outcome::Refused && back.is_some() {
            let detail = json!({ "refused": position.to_string() });
            self.audit.note(AuditEvent::RolledBack, back, None, detail);
        }
        let drift = self.mended_by(completed, forced);
        self.send_receipt(completed, took, drift);
    }

    /// Signs, keeps and sends a receipt. `took` is in seconds.
    fn send_receipt(&mut self, completed: &Completed, took: f64, drift: Vec<Drift>) {
        let manifest = &completed.set.manifest;
        let error = completed.error.as_deref().map(bounded);
        let (fleet, agent) = (self.fleet.clone(), self.credentials.agent.clone());
        let is_short =
            self.accepted.has(Feature::ShortReceipts) || completed.files.len() > LISTED_MAX;
        let contents = is_short.then(|| Contents::of(manifest, &completed.files));
        let (content, files, missing, unlisted) = match contents {
            Some(it) => (Some(it.content), it.files, it.missing, it.unlisted),
            None => (None, completed.files.clone(), Vec::new(), 0),
        };
        let files = files
            .into_iter()
            .map(|file| ReceiptFile::new(file, manifest));
        let receipt = |seq| Receipt {
            fleet,
            agent,
            seq,
            epoch: manifest.epoch,
            generation: manifest.generation,
            manifest_sha256: completed.set.sha256(),
            install: completed.install,
            outcome: completed.outcome,
            content,
            files: files.collect(),
            missing,
            unlisted,
            foreign: completed.foreign.clone(),
            adopted: completed.adopted.clone(),
            drift,
            clamd: completed.clamd.clone(),
            error,
            blamed: completed.blamed.clone(),
            took: took.max(0.0), // the clock may have been set back
            time: Timestamp::now(),
        };
        let receipt = self.receipts.add(&self.credentials.key.0, receipt);
        self.say(&ToMaster::Receipt { receipt });
    }

    // clamd, once more.

    /// Whether the installed set is on disk, and clamd has yet to be seen with it.
    fn is_unproven(&self) -> bool {
        let on_disk = match self.installer.phase() {
            Phase::Idle | Phase::Fetching | Phase::Staged => false,
            Phase::Swapping | Phase::Reloading | Phase::Proving => true,
        };
        on_disk || self.installer.waits_for_clamd()
    }

    fn schedule_probe(&mut self) {
        let busy = self.slot.phase() == Phase::Swapping || self.repairing.is_some();
        let unproven = self.is_unproven();
        if busy || !unproven {
            self.probing.backoff.reset();
        }
        if busy {
            self.probing.at = None;
        } else if self.probing.at.is_none() && !self.probing.running {
            let wait = match unproven {
                true => self.probing.backoff.next(1.0),
                false => CLAMD_LOOK,
            };
            self.probing.at = Some(Instant::now() + wait);
        }
    }

    fn probe(&mut self) {
        self.probing.at = None;
        self.probing.running = true;
        self.probing.stop = self.stop.child_token();
        let (installer, stop) = (self.installer.clone(), self.probing.stop.clone());
        let unproven = self.is_unproven();
        self.workers.spawn(async move {
            let completed = match unproven {
                true => installer.probe_on(stop).await,
                false => installer.look_at_clamd(stop).await,
            };
            Done::Probed(completed.map(Box::new))
        });
    }

    // Who asks.

    fn say(&self, message: &ToMaster) {
        if let Master::Connected { outbox, .. } = &self.master
            && let Err(error) = outbox.send(message)
        {
            tracing::error!(error = chain(&error), "cannot tell the master");
        }
    }

    fn installed_position(&self) -> Option<Position> {
        let installed = self.installer.installed()?;
        Some(installed.set.manifest.position())
    }

    /// Where this host is, in one line.
    fn summary(&self) -> String {
        let installed = self.installer.installed();
        let generation = match &installed {
            None => "nothing installed".to_owned(),
            Some(installed) => {
                let position = installed.set.manifest.position();
                let word = if self.is_live(Some(installed.outcome)) {
                    "live"
                } else {
                    "not live"
                };
                format!("generation {position} {word}")
            }
        };
        let job = self.slot.job().map(|job| job.manifest.position());
        let job = job.map_or_else(String::new, |job| format!(", installing {job}"));
        match &self.master {
            Master::Connected { address, .. } => {
                format!("{generation}{job}, connected to {address}")
            }
            Master::Away { .. } => format!("{generation}{job}, not connected to the master"),
        }
    }

    /// Whether clamd scans with the whole installed set, whose outcome this is.
    fn is_live(&self, outcome: Option<Outcome>) -> bool {
        outcome == Some(Outcome::Live)
            && self.guard.wrong().len() == 0
            && self.prover.report().state != ClamdState::Down
    }

    /// What somebody should look at although the agent works.
    fn alarm(&self) -> Option<String> {
        let unused = self.unused_configuration.as_ref();
        let unused = unused.map(|reason| format!("configuration on disk is not in use: {reason}"));
        let invalid = self.credentials.invalid(Timestamp::now());
        let alarms: Vec<_> = unused.into_iter().chain(invalid).collect();
        (!alarms.is_empty()).then(|| alarms.join("; "))
    }

    fn status(&self) -> Status {
        let trust = self.trust.trust();
        let installed = self.installer.installed();
        let manifest = installed.as_ref().map(|installed| &installed.set.manifest);
        let outcome = installed.as_ref().map(|installed| installed.outcome);
        let last = self.receipts.last();
        let unwell = last.filter(|last| last.outcome != Outcome::Live);
        let (held_back, held_back_more) =
            manifest.map_or_else(Default::default, |it| HeldBack::of(it));
        Status {
            held_back,
            held_back_more,
            fleet: self.fleet.clone(),
            agent: self.credentials.agent.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            master: self.master.status(),
            epoch: manifest.map(|manifest| manifest.epoch),
            generation: manifest.map(|manifest| manifest.generation),
            content: manifest.map(|manifest| manifest.content),
            published: manifest.map(|manifest| manifest.created),
            install: installed.as_ref().map(|installed| installed.install),
            files: manifest.map_or_else(Vec::new, |manifest| {
                manifest.files.iter().map(|f| f.name.clone()).collect()
            }),
            unsigned: manifest
                .map_or_else(Vec::new, |manifest| manifest.unsigned().cloned().collect()),
            live: self.is_live(outcome),
            outcome: last.map(|last| last.outcome).or(outcome),
            alarm: self.alarm(),
            phase: if self.repairing.is_some() {
                self.phase
            } else {
                self.slot.phase_given(self.phase)
            },
            working_on: self.slot.job().map(|job| job.manifest.position()),
            last: last.map(LastStatus::from),
            fresh_until: self.fresh.as_ref().map(|fresh| fresh.until),
            stale: self.stale_since().is_some(),
            stale_since: self.stale_since(),
            clamd: self.installer.clamd(),
            foreign: last.map_or_else(Vec::new, |last| last.foreign.clone()),
            adopted: last.map_or_else(Vec::new, |last| last.adopted.clone()),
            drift: self.drift_status(),
            error: self
                .refusal
                .clone()
                .or_else(|| self.blocked.clone())
                .or_else(|| self.guard.reason(self.watch.path()))
                .or_else(|| unwell.and_then(|last| last.error.clone())),
            receipts_pending: self.receipts.pending().len(),
            certificate_expires: self.credentials.certificate.not_after,
            certificate_expired: self.credentials.certificate.not_after < Timestamp::now(),
            root: trust.root().id(),
            keys_version: trust.keys().version,
        }
    }
}

impl Master {
    fn status(&self) -> MasterStatus {
        match self {
            Self::Connected {
                address,
                version,
                since,
                clock_ahead_secs,
                ..
            } => MasterStatus {
                connected: true,
                address: Some(address.clone()),
                version: Some(version.clone()),
                since: *since,
                error: None,
                clock_ahead_secs: Some(*clock_ahead_secs),
            },
            Self::Away { since, error } => MasterStatus {
                connected: false,
                address: None,
                version: None,
                since: *since,
                error: error.clone(),
                clock_ahead_secs: None,
            },
        }
    }
}

/// How far this host's clock is ahead of one that showed `time` just now.
fn ahead_secs(time: Timestamp) -> i64 {
    Timestamp::now().duration_since(time).as_secs()
}

/// When this host's agent started first, by its clock, kept at the first start. A time of the
/// future, of a clock that was wrong, counts as now. A time before the agent's certificate counts as
/// the start of the certificate: the clock was wrong, or the file is that of a cloned image.
fn first_start(state: &State, now: Timestamp, not_before: Timestamp) -> Timestamp {
    kept_start(state, now).max(not_before)
}

fn kept_start(state: &State, now: Timestamp) -> Timestamp {
    let path = state.path().join("first-start.json");
    match state::load::<Timestamp>(&path, "staleness counts from now") {
        Ok(Some(first)) if first <= now => return first,
        Ok(_) => {}
        Err(error) => tracing::warn!(
            error = chain(&error),
            "staleness counts from this start, the kept time of the first one is of no use"
        ),
    }
    if let Err(error) = state::save(&path, &now) {
        tracing::warn!(
            error = chain(&error),
            "the time of the first start is not kept"
        );
    }
    now
}

fn fresh_path(state: &State) -> PathBuf {
    state.path().join("fresh.json")
}

fn accepted_path(state: &State) -> PathBuf {
    state.path().join("accepted.json")
}

fn say_progress(job: &Job, phase: Phase, until: Option<Timestamp>) {
    let progress = ToMaster::Progress {
        offer: job.offer,
        phase,
        until,
    };
    job.outbox.send(&progress).expect("three short fields");
}

fn receiving(name: &DatabaseName, reason: String) -> HostFault {
    fault_of("receive", PathBuf::from(name.as_str()), reason)
}

fn fault_of(doing: &'static str, path: PathBuf, reason: String) -> HostFault {
    HostFault::Io {
        doing,
        path,
        source: io::Error::other(reason),
    }
}

/// An error that fits a receipt.
fn bounded(error: &str) -> String {
    let end = error.floor_char_boundary(ERROR_BYTES_MAX);
    error[..end].to_owned()
}

/// A worker ends only by returning: what it panicked with goes on here.
fn died(error: tokio::task::JoinError) -> Done {
    match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(error) => unreachable!("no worker is aborted: {error}"),
    }
}
