//! The one task that owns the fleet: connections tell it what agents say, publishing tells it what
//! is wanted, and it carries out what `dispatch.rs` decides.
//!
//! Nothing here waits for a peer. What it learns is on disk before the agent hears that it was
//! taken: a receipt is acknowledged after the audit log has it, and a crash in between makes the
//! agent send it again, which is harmless because it is known by its digest.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clamcast_daemon::admin::Operator;
use clamcast_proto::dsse::{Envelope, Verified};
use clamcast_proto::fresh::Freshness;
use clamcast_proto::identity::Certificate;
use clamcast_proto::keys::KeySet;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::Receipt;
use clamcast_proto::revocation::RevocationList;
use clamcast_proto::wire::{self, Hello, OfferId, Welcome};
use clamcast_proto::{AgentName, Digest, GroupName, Position};
use jiff::Timestamp;
use quinn::{Connection, VarInt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{MissedTickBehavior, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::fleet::agents::{Counts, Fleet, LinkId, Row, ThinVersion};
use crate::fleet::dispatch::{
    Action, Bounds, Dispatcher, Entry, Forced, Forcing, Manner, Newcomer, Now, Order, Progress,
    TRY_AGAIN, Unwanted, Word,
};
use crate::fleet::rollout::{OrderError, Rollout, Run, Tally};
use crate::publish::pipeline::Wish;
use crate::publish::publisher::{Publisher, Rejected};
use crate::record::recorder::{Job, Recorder};
use crate::store::Store;

/// Messages that wait for the hub; senders wait when it is full, and with them their agents.
const EVENTS_MAX: usize = 1024;

/// Messages that wait for one connection: acknowledgements of all receipts that an agent may hold,
/// and as much again. Its task writes them as fast as the agent reads; an agent with this many
/// unread ones is disconnected and starts over.
const COMMANDS_MAX: usize = 2 * wire::RECEIPTS_PENDING_MAX;

/// Time between checkpoints that agents are told of, beside those at the end of a rollout.
const CHECKPOINTS: Duration = Duration::from_secs(3600);

/// Shortest time between two of them.
const CHECKPOINTS_MIN: Duration = Duration::from_secs(60);

/// Agents hear that their generation is current this many times in the time that the word holds,
/// so that a few lost ones do not make a host stale.
const FRESH_PARTS: u32 = 4;

/// Time between looks at a rollout when nothing happens, for silence is no event.
const LOOK: Duration = Duration::from_secs(1);

/// Agents that the master knows, at most: each is a file and a row. A fleet of this size needs a
/// second master.
pub const AGENTS_MAX: usize = 20_000;

/// A look goes through the whole fleet: what happens within a moment is looked at together.
const BOUNDS: Bounds = Bounds {
    agents: AGENTS_MAX,
    looks_apart: Duration::from_millis(50),
};

/// What happens to the fleet.
#[derive(Debug)]
pub enum Event {
    /// An agent's certificate was checked.
    Connected(Box<Connected>),
    /// It said Hello.
    Hello {
        /// Who.
        name: AgentName,
        /// On which connection.
        id: LinkId,
        /// What it said.
        hello: Box<Hello>,
    },
    /// It gave a sign of progress.
    Progress {
        /// Who.
        name: AgentName,
        /// On which connection.
        id: LinkId,
        /// Which one.
        progress: Progress,
    },
    /// It sent a receipt whose signature was checked.
    Receipt {
        /// On which connection.
        id: LinkId,
        /// The receipt.
        receipt: Box<Verified<Receipt>>,
    },
    /// It lacks files of what it has, and asks for an offer.
    Reoffer {
        /// Who.
        name: AgentName,
        /// On which connection.
        id: LinkId,
    },
    /// It does not take an offer.
    Declined {
        /// Who.
        name: AgentName,
        /// On which connection.
        id: LinkId,
        /// Which one.
        offer: OfferId,
        /// Why, in its words.
        message: String,
    },
    /// A connection ended.
    Disconnected {
        /// Who.
        name: AgentName,
        /// Which connection.
        id: LinkId,
    },
    /// A generation was published.
    Published {
        /// Its manifest.
        manifest: Arc<Verified<Manifest>>,
        /// Whether it takes the place of what is on its way.
        supersede: bool,
    },
    /// A rollback was published.
    WentBack(Arc<Verified<Manifest>>),
    /// What was current is not to be offered any more; the next publication is.
    Withdrawn,
    /// An operator wants these agents at a generation, whatever they say they have.
    Force {
        /// Which one.
        what: Forcing,
        /// Which ones.
        agents: Vec<AgentName>,
        /// Without a delta.
        full: bool,
        /// Gets what was offered to whom; nothing if it may not be offered any more.
        reply: oneshot::Sender<Forced>,
    },
    /// An operator orders something about the rollout.
    Order {
        /// What.
        order: Order,
        /// Who.
        operator: Operator,
        /// Gets why it cannot be carried out, or what tells when it is on disk that it is.
        reply: oneshot::Sender<Result<oneshot::Receiver<()>, OrderError>>,
    },
    /// A newer revocation list is in force.
    Revoked(RevocationList),
    /// Somebody asks.
    Query(oneshot::Sender<View>),
}

/// An agent whose certificate was checked.
#[derive(Debug)]
pub struct Connected {
    /// Its name.
    pub name: AgentName,
    /// Its certificate.
    pub certificate: Certificate,
    /// Its groups, of the certificate and of the configuration.
    pub groups: Vec<GroupName>,
    /// Where it comes from.
    pub address: SocketAddr,
    /// The connection, to end it.
    pub connection: Connection,
    /// Gets the connection's name and its commands.
    pub reply: oneshot::Sender<Result<(LinkId, mpsc::Receiver<Command>), Unwanted>>,
}

/// A generation that somebody is wanted at, with the word that it is current.
#[derive(Clone, Debug)]
pub struct Current {
    /// The generation.
    pub manifest: Arc<Verified<Manifest>>,
    /// The statement that it is current.
    pub fresh: Verified<Freshness>,
}

/// What the hub tells a connection's task.
#[derive(Clone, Debug)]
pub enum Command {
    /// First words.
    Welcome(Box<Welcome>),
    /// Offer this generation.
    Offer {
        /// Names the offer.
        offer: OfferId,
        /// The generation.
        current: Box<Current>,
        /// The key set.
        keys: Arc<Verified<KeySet>>,
        /// How.
        manner: Manner,
    },
    /// The generation is still current.
    Fresh(Envelope),
    /// A receipt is in the audit log.
    Acknowledge(u64),
    /// The signed head of the audit log.
    Checkpoint(String),
}

/// The fleet at one moment, for whoever asks.
#[derive(Clone, Debug)]
pub struct View {
    /// The newest generation that anybody is wanted at.
    pub current: Option<Arc<Verified<Manifest>>>,
    /// What is on its way and what came of what was.
    pub rollout: Rollout,
    /// What became of the running generation in all waves that have begun, and in the last.
    pub tallies: Option<(Tally, Tally)>,
    /// The newest generation that was not taken back: also one that waits for its turn.
    pub newest: Option<Position>,
    /// What the next wave waits for, if it waits for a window: each group's windows.
    pub windows: Vec<String>,
    /// How long a wave waits for its members.
    pub deadline: Duration,
    /// Members of settled waves that have not proven the running generation.
    pub stragglers: Vec<AgentName>,
    /// ClamAV versions that too few canaries have.
    pub thin: Vec<ThinVersion>,
    /// Who stands where, in numbers.
    pub counts: Counts,
    /// Connected agents that have not answered their offer yet.
    pub unsettled: Vec<AgentName>,
    /// The table.
    pub rows: Vec<Row>,
}

impl View {
    /// Whether something is about to happen without anybody's help: an agent answers, a wave
    /// begins, a rollback is published.
    pub fn is_moving(&self) -> bool {
        // A wave waits also for those who took it in hand and lost their connection.
        let waits = self
            .tallies
            .as_ref()
            .is_some_and(|(_, wave)| wave.unsettled > 0);
        let settles = |run: &Run| {
            run.paused.is_none() && !run.waits_for_window && (run.done.is_some() || waits)
        };
        !self.unsettled.is_empty()
            || self.rollout.owed().is_some()
            || self.rollout.running().is_some_and(settles)
    }
}

/// Talks to the hub.
#[derive(Clone, Debug)]
pub struct Hub {
    events: mpsc::Sender<Event>,
    changed: watch::Receiver<u64>,
}

/// The hub is gone: the daemon stops.
#[derive(Debug, thiserror::Error)]
#[error("the daemon is stopping")]
pub struct Stopping;

impl Hub {
    /// Tells the hub something.
    pub async fn tell(&self, event: Event) -> Result<(), Stopping> {
        self.events.send(event).await.map_err(|_| Stopping)
    }

    /// Asks for the fleet as it is now.
    pub async fn view(&self) -> Result<View, Stopping> {
        let (reply, view) = oneshot::channel();
        self.tell(Event::Query(reply)).await?;
        view.await.map_err(|_| Stopping)
    }

    /// Returns when the hub has ended.
    pub async fn ended(&self) {
        self.events.closed().await;
    }

    /// Returns after the next change of the fleet. Clone first: a clone starts from what its
    /// original has seen.
    pub async fn changed(&mut self) -> Result<(), Stopping> {
        self.changed.changed().await.map_err(|_| Stopping)
    }
}

/// What the hub works with.
#[derive(Debug)]
pub struct Means {
    /// The key set.
    pub keys: Arc<Verified<KeySet>>,
    /// Writes what must last.
    pub recorder: Recorder,
    /// Takes manifests of agents that are ahead of this master.
    pub ahead: mpsc::Sender<Envelope>,
    /// Vouches for what agents are wanted at.
    pub publisher: Arc<Publisher>,
    /// How long that holds.
    pub fresh: Duration,
    /// Takes what the rollout wants published.
    pub wishes: mpsc::Sender<Wish>,
}

/// Starts the task. It ends when `stop` fires.
pub fn start(
    fleet: Fleet,
    means: Means,
    stop: CancellationToken,
) -> (Hub, tokio::task::JoinHandle<()>) {
    let (events, inbox) = mpsc::channel(EVENTS_MAX);
    let (tick, changed) = watch::channel(0);
    let running = Running {
        dispatcher: Dispatcher::new(fleet, BOUNDS, Now::get()),
        means,
        lines: HashMap::new(),
        told: None,
        checkpoint: None,
        vouched: HashMap::new(),
        unrejected: Vec::new(),
        unlooked: false,
        tried: Instant::now(),
        tick,
    };
    let handle = tokio::spawn(running.run(inbox, stop));
    (Hub { events, changed }, handle)
}

struct Running {
    dispatcher: Dispatcher,
    means: Means,
    lines: HashMap<LinkId, Line>,
    /// When agents were last told the audit log's head, and when they are to be.
    told: Option<Instant>,
    checkpoint: Option<Instant>,
    /// Words that a generation is current, until they are made anew.
    vouched: HashMap<Digest, Verified<Freshness>>,
    /// Contents that could not be kept from being published again yet.
    unrejected: Vec<Rejected>,
    /// The mirror is to be looked at, for which there was no room yet.
    unlooked: bool,
    /// When these two were tried last.
    tried: Instant,
    tick: watch::Sender<u64>,
}

/// The way to one connection's task.
#[derive(Clone, Debug)]
pub struct Line {
    name: AgentName,
    connection: Connection,
    commands: mpsc::Sender<Command>,
}

impl Line {
    /// Queues a command; never waits for a peer.
    pub fn send(&self, command: Command) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.commands.try_send(command) {
            tracing::warn!(agent = %self.name, "reads nothing, connection closed");
            self.close(wire::close::TIMEOUT, "reads nothing");
        }
    }

    fn close(&self, code: u32, reason: &str) {
        self.connection
            .close(VarInt::from_u32(code), reason.as_bytes());
    }
}

impl Running {
    async fn run(mut self, mut inbox: mpsc::Receiver<Event>, stop: CancellationToken) {
        let mut checkpoints = tokio::time::interval(CHECKPOINTS);
        let mut renewals = tokio::time::interval(self.means.fresh / FRESH_PARTS);
        let mut looks = tokio::time::interval(LOOK);
        for interval in [&mut renewals, &mut looks] {
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        loop {
            let event = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = until(self.dispatcher.look_at()) => {
                    self.look().await;
                    continue;
                }
                () = until(self.checkpoint) => {
                    self.checkpoint().await;
                    continue;
                }
                _ = looks.tick() => {
                    self.dispatcher.tick();
                    self.try_again().await;
                    continue;
                }
                _ = renewals.tick() => {
                    self.vouched.clear();
                    self.dispatcher.renew(Now::get());
                    self.carry_out().await;
                    continue;
                }
                _ = checkpoints.tick() => {
                    self.checkpoint_soon();
                    continue;
                }
                event = inbox.recv() => event,
            };
            match event {
                None => break,
                Some(Event::Query(reply)) => {
                    // What is told takes in what happened.
                    if self.dispatcher.look_at().is_some() {
                        self.look().await;
                    }
                    // Nobody may be waiting any more.
                    let _ = reply.send(View::of(self.dispatcher.fleet(), Timestamp::now()));
                }
                Some(event) => {
                    self.handle(event, Now::get()).await;
                    self.carry_out().await;
                    self.tick.send_modify(|tick| *tick += 1);
                }
            }
        }
    }

    /// Looks at the rollout. Whoever waits is not woken every second for nothing.
    async fn look(&mut self) {
        let changed = self.dispatcher.look(Now::get());
        self.carry_out().await;
        self.dispatcher.has_looked(Instant::now());
        if changed {
            self.tick.send_modify(|tick| *tick += 1);
        }
    }

    async fn handle(&mut self, event: Event, now: Now) {
        let dispatcher = &mut self.dispatcher;
        match event {
            Event::Query(_) => {} // answered above, and changes nothing
            Event::Connected(connected) => self.connected(*connected, now).await,
            Event::Hello { name, id, hello } => {
                let Hello {
                    clamd,
                    foreign,
                    installed,
                    outcome,
                    ..
                } = *hello;
                dispatcher.hello(&name, id, clamd, foreign, installed.as_ref(), outcome, now);
            }
            Event::Progress { name, id, progress } => {
                dispatcher.progress(&name, id, progress, now);
            }
            Event::Receipt { id, receipt } => dispatcher.receipt(id, &receipt, now),
            Event::Declined {
                name,
                id,
                offer,
                message,
            } => dispatcher.declined(&name, id, offer, message),
            Event::Reoffer { name, id } => {
                let store = self.means.publisher.store();
                let kept = |at| store.manifest(at).filter(|_| store.keeps(at));
                dispatcher.reoffer(&name, id, kept, now);
            }
            Event::Disconnected { name, id } => {
                self.lines.remove(&id);
                dispatcher.disconnected(&name, id, now);
            }
            Event::Published {
                manifest,
                supersede,
            } => dispatcher.published(&manifest, supersede, now),
            Event::WentBack(manifest) => dispatcher.went_back(&manifest, now),
            Event::Withdrawn => dispatcher.withdrawn(now),
            Event::Revoked(list) => dispatcher.revoked(list),
            Event::Force {
                what,
                agents,
                full,
                reply,
            } => {
                // The operator may have gone; the offers are made all the same.
                if let Some(forced) = dispatcher.force(&what, agents, full, now) {
                    let _ = reply.send(forced);
                }
            }
            Event::Order {
                order,
                operator,
                reply,
            } => {
                let publisher = &self.means.publisher;
                let newest = publisher.newest().filter(|_| !publisher.is_due());
                let answer = match dispatcher.order(order, newest.as_ref(), &operator, now) {
                    Ok(()) => {
                        self.carry_out().await;
                        Ok(self.written().await)
                    }
                    Err(error) => Err(error),
                };
                let _ = reply.send(answer); // the operator may have gone
            }
        }
    }

    async fn connected(&mut self, connected: Connected, now: Now) {
        let Connected {
            name,
            certificate,
            groups,
            address,
            connection,
            reply,
        } = connected;
        let newcomer = Newcomer {
            name: name.clone(),
            groups,
            address,
            serial: certificate.serial,
            certificate_ends: certificate.not_after,
            fingerprint: certificate.fingerprint,
        };
        let answer = match self.dispatcher.connected(newcomer, now) {
            Ok(id) => {
                let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
                let line = Line {
                    name,
                    connection,
                    commands,
                };
                self.lines.insert(id, line);
                self.carry_out().await;
                Ok((id, inbox))
            }
            Err(unwanted) => Err(unwanted),
        };
        // The task may have ended meanwhile; then its end is the next event.
        let _ = reply.send(answer);
    }

    /// Carries out what was decided.
    async fn carry_out(&mut self) {
        for action in self.dispatcher.actions() {
            match action {
                Action::Tell(id, word) => {
                    let command = self.command(word);
                    if let Some(line) = self.lines.get(&id) {
                        line.send(command);
                    }
                }
                Action::Write(entry) => self.write(*entry).await,
                Action::Close(id, closing) => {
                    if let Some(line) = self.lines.remove(&id) {
                        let (code, reason) = closing.code();
                        tracing::debug!(agent = %line.name, reason, "connection closed");
                        line.close(code, reason);
                    }
                }
                Action::Reject(rejected) => {
                    self.means.recorder.take_back(rejected.position);
                    self.reject(rejected).await;
                }
                Action::Publish => {
                    self.unlooked = self.means.wishes.try_send(Wish::Look).is_err();
                }
                Action::RollBack(owed) => {
                    let (written, wishes) = (self.written().await, self.means.wishes.clone());
                    tokio::spawn(async move {
                        if written.await.is_ok() {
                            // Full: it is tried again.
                            let _ = wishes.try_send(Wish::RollBack(owed));
                        }
                    });
                }
                Action::Accepted(manifest) => {
                    let publisher = self.means.publisher.clone();
                    tokio::task::spawn_blocking(move || {
                        if let Err(error) = publisher.accepted(&manifest) {
                            let error = crate::chain(&error);
                            tracing::error!(error, "cannot keep the publisher id");
                        }
                    });
                }
                Action::Ahead(installed) => self.is_ahead(&installed),
                Action::Checkpoint => self.checkpoint_soon(),
            }
        }
    }

    async fn write(&mut self, entry: Entry) {
        let Entry {
            draft,
            keep,
            forget,
            rollout,
            then,
        } = entry;
        if let Some(rollout) = &rollout {
            let publisher = &self.means.publisher;
            publisher.hold(rollout.held().map(|held| held.reason.clone()));
            let store = publisher.store();
            store.need(needed(rollout, store));
        }
        let then = then.and_then(|(id, word)| {
            let command = self.command(word);
            Some((self.lines.get(&id)?.clone(), command))
        });
        let job = Job {
            draft,
            keep,
            forget,
            rollout,
            then,
            ..Job::default()
        };
        self.means.recorder.write(job).await;
    }

    /// What a word is on the wire.
    fn command(&mut self, word: Word) -> Command {
        let keys = &self.means.keys;
        match word {
            Word::Welcome => Command::Welcome(Box::new(Welcome {
                fleet: keys.fleet.clone(),
                master_version: env!("CARGO_PKG_VERSION").to_owned(),
                time: Timestamp::now(),
                keep_alive: wire::KEEP_ALIVE_SECS,
                keys: Some(keys.envelope().clone()),
            })),
            Word::Offer {
                offer,
                manifest,
                manner,
            } => {
                let keys = keys.clone();
                let fresh = self.fresh(&manifest);
                let current = Box::new(Current { manifest, fresh });
                Command::Offer {
                    offer,
                    current,
                    keys,
                    manner,
                }
            }
            Word::Fresh(manifest) => Command::Fresh(self.fresh(&manifest).envelope().clone()),
            Word::Acknowledge(seq) => Command::Acknowledge(seq),
        }
    }

    fn fresh(&mut self, manifest: &Verified<Manifest>) -> Verified<Freshness> {
        let vouch = || self.means.publisher.vouch(manifest, Timestamp::now());
        let digest = manifest.payload_sha256();
        self.vouched.entry(digest).or_insert_with(vouch).clone()
    }

    /// Tells when all that was queued so far is on disk.
    async fn written(&self) -> oneshot::Receiver<()> {
        let (done, written) = oneshot::channel();
        let job = Job {
            done: Some(done),
            ..Job::default()
        };
        self.means.recorder.write(job).await;
        written
    }

    /// Keeps a content from being published again; later, if the disk refuses.
    async fn reject(&mut self, rejected: Rejected) {
        let (publisher, entry) = (self.means.publisher.clone(), rejected.clone());
        let rejecting = tokio::task::spawn_blocking(move || publisher.reject(entry));
        if let Err(error) = rejecting.await.expect("rejecting does not panic") {
            let (position, error) = (rejected.position, crate::chain(&error));
            tracing::error!(%position, error, "cannot remember that its databases must not be published again");
            self.unrejected.push(rejected);
        }
    }

    /// Tries what did not go at first.
    async fn try_again(&mut self) {
        if self.tried.elapsed() < TRY_AGAIN {
            return;
        }
        self.tried = Instant::now();
        if self.unlooked {
            self.unlooked = self.means.wishes.try_send(Wish::Look).is_err();
        }
        for rejected in std::mem::take(&mut self.unrejected) {
            self.reject(rejected).await;
        }
    }

    /// A master that was restored from a backup learns from its agents what it has forgotten. Only
    /// a signature moves it.
    fn is_ahead(&self, installed: &Envelope) {
        let ours = self.dispatcher.fleet().current();
        if let Ok(manifest) = Manifest::verify(installed, &self.means.keys.manifest)
            // Of its number there may be another one here, which was made after the restoration.
            && ours.is_none_or(|ours| {
                manifest.position() >= ours.position()
                    && manifest.payload_sha256() != ours.payload_sha256()
            })
        {
            // Full: others wait that say the same, and the agents come again.
            let _ = self.means.ahead.try_send(installed.clone());
        }
    }

    /// Has every agent told the head of the audit log, so that a log that is rewritten later can be
    /// told from the one they saw; later, if they were told just now.
    fn checkpoint_soon(&mut self) {
        let now = Instant::now();
        let at = self
            .told
            .map_or(now, |told| now.max(told + CHECKPOINTS_MIN));
        self.checkpoint.get_or_insert(at);
    }

    async fn checkpoint(&mut self) {
        self.checkpoint = None;
        if self.lines.is_empty() {
            return; // nobody to be told
        }
        self.told = Some(Instant::now());
        let job = Job {
            checkpoint_to: self.lines.values().cloned().collect(),
            ..Job::default()
        };
        self.means.recorder.write(job).await;
    }
}

impl View {
    fn of(fleet: &Fleet, now: Timestamp) -> Self {
        let deadline = fleet.rules().deadline;
        Self {
            current: fleet.current().cloned(),
            newest: fleet.newest().map(|manifest| manifest.position()),
            rollout: fleet.rollout().clone(),
            tallies: fleet.tallies(now),
            windows: fleet.waits_for(now),
            deadline,
            stragglers: fleet.stragglers(now).into_iter().cloned().collect(),
            thin: fleet.thin_versions(),
            counts: fleet.counts(now, deadline),
            unsettled: fleet.unsettled(now, deadline).cloned().collect(),
            rows: fleet.rows(now, deadline),
        }
    }
}

impl Now {
    fn get() -> Self {
        Self {
            clock: Timestamp::now(),
            at: Instant::now(),
        }
    }
}

/// Generations that agents may be wanted at. Of those in the store an operator may choose any for
/// as long as publishing is held.
pub fn needed(rollout: &Rollout, store: &Store) -> HashSet<Position> {
    if rollout.held().is_some() {
        let manifests = store.manifests();
        return manifests.iter().map(|it| it.position()).collect();
    }
    rollout.needed().map(|target| target.position).collect()
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}
