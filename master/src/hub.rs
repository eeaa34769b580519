//! The one task that owns the fleet: connections tell it what agents say, publishing tells it what
//! is wanted, and it decides who is offered what.
//!
//! Nothing here waits for a peer. What it learns is on disk before the agent hears that it was
//! taken: a receipt is acknowledged after the audit log has it, and a crash in between makes the
//! agent send it again, which is harmless because it is known by its digest.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clamcast_daemon::admin::Operator;
use clamcast_daemon::audit::Draft;
use clamcast_proto::dsse::{Envelope, Verified};
use clamcast_proto::fresh::Freshness;
use clamcast_proto::identity::{Certificate, Serial};
use clamcast_proto::keys::KeySet;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::{Outcome, Receipt};
use clamcast_proto::revocation::RevocationList;
use clamcast_proto::wire::{self, Hello, OfferId, Phase, Welcome};
use clamcast_proto::{AgentName, Digest, GroupName, Position};
use jiff::Timestamp;
use quinn::{Connection, VarInt};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{MissedTickBehavior, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::fleet::{Arrival, Counts, Fleet, Link, LinkId, Row, Standing};
use crate::pipeline::Wish;
use crate::publish::{Publisher, Rejected};
use crate::recorder::{Job, Recorder};
use crate::rollout::{self, Effect, Ending, OrderError, Rollout, Run, Tally, Target, Window};
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

/// Events that end a rollout: agents are told the head of the log that has them.
const ENDS: [&str; 5] = [
    "abort",
    "halt",
    "rollback",
    "rolled-back",
    "rollout-complete",
];

/// Events that somebody should look at.
const ALARMING: [&str; 4] = ["abort", "halt", "rolled-back", "rollout-paused"];

/// Agents hear that their generation is current this many times in the time that the word holds,
/// so that a few lost ones do not make a host stale.
const FRESH_PARTS: u32 = 4;

/// Time between looks at a rollout when nothing happens, for silence is no event.
const LOOK: Duration = Duration::from_secs(1);

/// Shortest time between two looks at it: each goes through the whole fleet, and what happens in
/// between is looked at together.
const LOOKS_APART: Duration = Duration::from_millis(50);

/// Time between two tries to have something published or remembered.
const TRY_AGAIN: Duration = Duration::from_secs(10);

/// Agents that the master knows, at most: each is a file and a row. A fleet of this size needs a
/// second master.
pub const AGENTS_MAX: usize = 20_000;

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
        /// What it is doing.
        phase: Phase,
        /// Until when it means to be silent.
        until: Option<Timestamp>,
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

/// An order about the rollout; generations are given by their manifests.
#[derive(Debug)]
pub enum Order {
    /// Without a generation.
    Plain(rollout::Order),
    /// Publish its databases again.
    RollBack(Arc<Verified<Manifest>>, String),
    /// Keep a group at it.
    Pin(GroupName, Arc<Verified<Manifest>>, Option<String>),
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

/// Why a verified agent is not let in.
#[derive(Debug, thiserror::Error)]
pub enum Unwanted {
    /// Its certificate was revoked.
    #[error("the certificate of `{name}` with serial {serial} is revoked")]
    Revoked {
        /// Whose it was.
        name: AgentName,
        /// Its serial number.
        serial: Serial,
    },
    /// There are too many.
    #[error("the fleet is full: {AGENTS_MAX} agents")]
    Full,
}

/// A generation that somebody is wanted at, with the word that it is current.
#[derive(Clone, Debug)]
pub struct Current {
    /// The generation.
    pub manifest: Arc<Verified<Manifest>>,
    /// The statement that it is current.
    pub fresh: Verified<Freshness>,
}

/// What is forced.
#[derive(Clone, Debug)]
pub enum Forcing {
    /// What is current, if it still is the one at this position.
    Current(Position),
    /// One that was taken back, on the word of an operator.
    TakenBack(Arc<Verified<Manifest>>),
}

impl Forcing {
    /// Where it stands.
    pub fn position(&self) -> Position {
        match self {
            Self::Current(position) => *position,
            Self::TakenBack(manifest) => manifest.position(),
        }
    }
}

/// What came of [`Event::Force`] at first.
#[derive(Debug)]
pub struct Forced {
    /// The offers made.
    pub offers: Vec<(AgentName, OfferId)>,
    /// Agents that are not connected.
    pub offline: Vec<AgentName>,
    /// Agents that took a higher one and do not have it, and which they took.
    pub past: Vec<(AgentName, Position)>,
}

/// How a generation is offered.
#[derive(Clone, Copy, Debug, Default)]
pub struct Manner {
    /// The agent hashes what is really on its disk first.
    pub rehash: bool,
    /// No delta is used.
    pub full: bool,
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
    /// Versions of clamd that no canary tries, with the number of hosts and one of them.
    pub untried: Vec<(String, usize, AgentName)>,
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

/// What the hub's task needs.
#[derive(Debug)]
pub struct Task {
    /// The fleet as it was kept.
    pub fleet: Fleet,
    /// The key set.
    pub keys: Arc<Verified<KeySet>>,
    /// The revocation list in force.
    pub revoked: Option<RevocationList>,
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
pub fn start(mut task: Task, stop: CancellationToken) -> (Hub, tokio::task::JoinHandle<()>) {
    task.fleet.resumed(Timestamp::now());
    let (events, inbox) = mpsc::channel(EVENTS_MAX);
    let (tick, changed) = watch::channel(0);
    let running = Running {
        kept: task.fleet.rollout().clone(),
        task,
        links: HashMap::new(),
        links_made: 0,
        offers_made: 0,
        accepted: false,
        forced: HashMap::new(),
        told: None,
        checkpoint: None,
        vouched: HashMap::new(),
        look: Some(Instant::now()),
        looked: Instant::now(),
        unrejected: Vec::new(),
        unlooked: false,
        tried: None,
        tick,
    };
    let handle = tokio::spawn(running.run(inbox, stop));
    (Hub { events, changed }, handle)
}

struct Running {
    task: Task,
    links: HashMap<LinkId, OpenLink>,
    links_made: u64,
    offers_made: u64,
    accepted: bool,
    /// Agents that an operator has forced and that have not answered yet: one that loses its
    /// connection is to look at its disk all the same when it is back.
    forced: HashMap<AgentName, Ordered>,
    /// When agents were last told the audit log's head, and when they are to be.
    told: Option<Instant>,
    checkpoint: Option<Instant>,
    /// Words that a generation is current, until they are made anew.
    vouched: HashMap<Digest, Verified<Freshness>>,
    /// The state of the rollout that is on disk or on its way there.
    kept: Rollout,
    /// When the rollout is to be looked at, and when it was.
    look: Option<Instant>,
    looked: Instant,
    /// Contents that could not be kept from being published again yet.
    unrejected: Vec<Rejected>,
    /// The mirror is to be looked at, for which there was no room yet.
    unlooked: bool,
    /// When that, or the rollback that is owed, was tried last.
    tried: Option<Instant>,
    tick: watch::Sender<u64>,
}

/// What an operator has forced on an agent.
#[derive(Clone, Debug)]
struct Ordered {
    manner: Manner,
    manifest: Arc<Verified<Manifest>>,
    /// It is not current and does not become so.
    taken_back: bool,
}

struct OpenLink {
    certificate: Certificate,
    line: Line,
    /// Whether its agent has said Hello.
    greeted: bool,
    /// The generation that it has or was offered last.
    offered: Option<Digest>,
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
        let mut renewals = tokio::time::interval(self.task.fresh / FRESH_PARTS);
        let mut looks = tokio::time::interval(LOOK);
        for interval in [&mut renewals, &mut looks] {
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        loop {
            let event = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = until(self.look) => {
                    // Whoever waits is not woken every second for nothing.
                    if self.look(Timestamp::now()).await {
                        self.tick.send_modify(|tick| *tick += 1);
                    }
                    continue;
                }
                () = until(self.checkpoint) => {
                    self.checkpoint().await;
                    continue;
                }
                event = inbox.recv() => event,
                _ = looks.tick() => {
                    if self.task.fleet.is_timed() || self.is_owing() {
                        self.look_soon();
                    }
                    continue;
                }
                _ = renewals.tick() => {
                    self.renew(Timestamp::now());
                    continue;
                }
                _ = checkpoints.tick() => {
                    self.checkpoint_soon();
                    continue;
                }
            };
            let Some(event) = event else { break };
            self.handle(event, Timestamp::now()).await;
        }
    }

    async fn handle(&mut self, event: Event, now: Timestamp) {
        match event {
            Event::Query(reply) => {
                // What is told takes in what happened.
                if self.look.is_some() && self.look(now).await {
                    self.tick.send_modify(|tick| *tick += 1);
                }
                // Nobody may be waiting any more.
                let _ = reply.send(self.view(now));
                return; // a question changes nothing
            }
            Event::Connected(connected) => self.connected(*connected, now).await,
            Event::Hello { name, id, hello } => self.hello(&name, id, *hello, now).await,
            Event::Progress {
                name,
                id,
                phase,
                until,
            } => self.task.fleet.progress(&name, id, phase, until, now),
            Event::Receipt { id, receipt } => self.receipt(id, &receipt, now).await,
            Event::Declined { name, id, message } => {
                // Said twice of one offer it is nothing new.
                if let Some(position) = self.task.fleet.declined(&name, id, message.clone()) {
                    self.forced.remove(&name);
                    tracing::warn!(agent = %name, said = message, "an agent does not take its offer");
                    let detail = json!({ "said": message });
                    self.note("declined", &name, Some(position), None, detail)
                        .await;
                }
            }
            Event::Reoffer { name, id } => {
                let store = self.task.publisher.store();
                let is_kept = |position| store.keeps(position);
                if let Some(manifest) = self.task.fleet.mending(&name, is_kept, now).cloned() {
                    tracing::info!(agent = %name, "lacks files, offered anew");
                    self.offer(id, manifest, Manner::default(), now).await;
                }
            }
            Event::Disconnected { name, id } => {
                self.links.remove(&id);
                self.task.fleet.disconnected(&name, id, now);
            }
            Event::Published {
                manifest,
                supersede,
            } => {
                let effects = self.task.fleet.published(&manifest, supersede);
                self.carry_out(effects, None, now).await;
            }
            Event::WentBack(manifest) => {
                let effects = self.task.fleet.went_back(&manifest);
                self.carry_out(effects, None, now).await;
            }
            Event::Force {
                what,
                agents,
                full,
                reply,
            } => self.force(what, agents, full, reply, now).await,
            Event::Order {
                order,
                operator,
                reply,
            } => {
                let fleet = &mut self.task.fleet;
                let order = match order {
                    Order::Plain(order) => order,
                    Order::RollBack(to, reason) => {
                        rollout::Order::RollBack(fleet.remember(&to), reason)
                    }
                    Order::Pin(group, to, reason) => {
                        rollout::Order::Pin(group, Some(fleet.remember(&to)), reason)
                    }
                };
                let ordered = fleet.order(order, now);
                let answer = match ordered {
                    Ok(mut effects) => {
                        if effects.contains(&Effect::Look) {
                            effects.extend(self.begin_anew());
                        }
                        self.carry_out(effects, Some(&operator), now).await;
                        self.look(now).await;
                        Ok(self.written().await)
                    }
                    Err(error) => Err(error),
                };
                let _ = reply.send(answer); // the operator may have gone
            }
            Event::Withdrawn => {
                self.task.fleet.withdrawn();
                self.carry_out(Vec::new(), None, now).await;
            }
            Event::Revoked(list) => self.revoked(list).await,
        }
        self.look_soon();
        self.tick.send_modify(|tick| *tick += 1);
    }

    /// What is published goes through the fleet again, if it is not known how far it came.
    fn begin_anew(&mut self) -> Vec<Effect> {
        let (publisher, rollout) = (&self.task.publisher, self.task.fleet.rollout());
        let is_known = rollout.complete().is_some() || rollout.running().is_some();
        let newest = publisher
            .newest()
            .filter(|_| !is_known && !publisher.is_due());
        newest.map_or_else(Vec::new, |it| self.task.fleet.published(&it, false))
    }

    /// Has the rollout looked at as soon as what waits with this was heard.
    fn look_soon(&mut self) {
        self.look.get_or_insert(self.looked + LOOKS_APART);
    }

    /// Looks at the rollout, and offers what follows. Returns whether anything did.
    async fn look(&mut self, now: Timestamp) -> bool {
        self.look = None;
        let effects = self.task.fleet.step(now);
        let mut changed = *self.task.fleet.rollout() != self.kept;
        self.carry_out(effects, None, now).await;
        let offers = self.links.iter().filter_map(|(id, link)| {
            let manifest = self.task.fleet.wanted(&link.line.name, now)?;
            let known = link.offered == Some(manifest.payload_sha256());
            let forced = self.is_forced(&link.line.name);
            (link.greeted && !known && !forced).then(|| (*id, manifest.clone()))
        });
        for (id, manifest) in offers.collect::<Vec<_>>() {
            self.offer(id, manifest, Manner::default(), now).await;
            changed = true;
        }
        self.looked = Instant::now();
        changed
    }

    /// Whether an agent is being driven past the waves to what is still current, or to what was
    /// taken back.
    fn is_forced(&self, name: &AgentName) -> bool {
        let fleet = &self.task.fleet;
        self.forced.get(name).is_some_and(|order| {
            order.taken_back || fleet.is_open(&order.manifest.payload_sha256())
        })
    }

    /// Carries out what a change of the rollout brings. Its new state stands in the recorder's
    /// queue before every offer that follows from it.
    async fn carry_out(
        &mut self,
        effects: Vec<Effect>,
        operator: Option<&Operator>,
        now: Timestamp,
    ) {
        let actor = operator.map_or_else(|| "master".to_owned(), Operator::to_string);
        let (mut looks, mut ended) = (false, false);
        for effect in effects {
            match effect {
                Effect::Note {
                    event,
                    target,
                    mut reason,
                } => {
                    let running = self.task.fleet.rollout().running();
                    if event == "rollout-waits" && running.is_some_and(|run| run.target == target) {
                        reason = format!("{reason}: {}", self.windows().join("; "));
                    }
                    let position = target.position;
                    if ALARMING.contains(&event) {
                        tracing::warn!(%position, event, "{reason}");
                    } else {
                        tracing::info!(%position, event, "{reason}");
                    }
                    ended |= ENDS.contains(&event);
                    let mut detail = json!({ "reason": reason });
                    if let Some(operator) = operator {
                        detail["login_uid"] = json!(operator.login_uid);
                    }
                    let draft = Draft {
                        event: event.to_owned(),
                        actor: actor.clone(),
                        subject: "fleet".to_owned(),
                        position: Some(position),
                        outcome: None,
                        detail,
                    };
                    let job = Job {
                        draft: Some(draft),
                        ..Job::default()
                    };
                    self.task.recorder.write(job).await;
                }
                Effect::Reject { target, how } => {
                    self.reject(rejected(&target, how, now)).await;
                    self.forced.clear(); // what takes it back must come through
                }
                Effect::Look => looks = true,
            }
        }
        let rollout = self.task.fleet.rollout();
        if *rollout != self.kept {
            let publisher = &self.task.publisher;
            publisher.hold(rollout.held().map(|held| held.reason.clone()));
            let store = publisher.store();
            store.need(needed(rollout, store));
            if rollout.owed() != self.kept.owed() {
                self.tried = None;
            }
            self.kept = rollout.clone();
            let job = Job {
                rollout: Some(rollout.clone()),
                ..Job::default()
            };
            self.task.recorder.write(job).await;
        }
        if ended {
            self.checkpoint_soon();
        }
        if looks {
            self.unlooked = self.task.wishes.try_send(Wish::Look).is_err();
        }
        self.try_what_is_owed().await;
    }

    fn is_owing(&self) -> bool {
        self.kept.owed().is_some() || !self.unrejected.is_empty() || self.unlooked
    }

    /// Has the rollback published that is owed, once the disk knows that it is, and tries again to
    /// remember what must not be published.
    async fn try_what_is_owed(&mut self) {
        let tried = self.tried.is_some_and(|tried| tried.elapsed() < TRY_AGAIN);
        if !self.is_owing() || tried {
            return;
        }
        self.tried = Some(Instant::now());
        if self.unlooked {
            self.unlooked = self.task.wishes.try_send(Wish::Look).is_err();
        }
        for rejected in std::mem::take(&mut self.unrejected) {
            self.reject(rejected).await;
        }
        if let Some(owed) = self.kept.owed().cloned() {
            let written = self.written().await;
            let wishes = self.task.wishes.clone();
            tokio::spawn(async move {
                if written.await.is_ok() {
                    // Full: it is tried again.
                    let _ = wishes.try_send(Wish::RollBack(owed));
                }
            });
        }
    }

    /// Tells when all that was queued so far is on disk.
    async fn written(&self) -> oneshot::Receiver<()> {
        let (done, written) = oneshot::channel();
        let job = Job {
            done: Some(done),
            ..Job::default()
        };
        self.task.recorder.write(job).await;
        written
    }

    /// Keeps a content from being published again; later, if the disk refuses.
    async fn reject(&mut self, rejected: Rejected) {
        let (publisher, entry) = (self.task.publisher.clone(), rejected.clone());
        let rejecting = tokio::task::spawn_blocking(move || publisher.reject(entry));
        if let Err(error) = rejecting.await.expect("rejecting does not panic") {
            let position = rejected.position;
            tracing::error!(%position, error = crate::chain(&error), "cannot remember that its databases must not be published again");
            self.unrejected.push(rejected);
        }
    }

    /// Tells all agents anew that what they are wanted at is current.
    fn renew(&mut self, now: Timestamp) {
        self.vouched.clear();
        let ids: Vec<_> = self.links.keys().copied().collect();
        for id in ids {
            self.vouch_to(id, now);
        }
    }

    /// Tells one agent that what it is wanted at is current.
    fn vouch_to(&mut self, id: LinkId, now: Timestamp) {
        let Some(link) = self.links.get(&id).filter(|link| link.greeted) else {
            return;
        };
        if let Some(manifest) = self.task.fleet.vouched(&link.line.name, now).cloned() {
            let fresh = self.fresh(&manifest, now);
            self.send(id, Command::Fresh(fresh.envelope().clone()));
        }
    }

    fn fresh(&mut self, manifest: &Verified<Manifest>, now: Timestamp) -> Verified<Freshness> {
        let vouch = || self.task.publisher.vouch(manifest, now);
        let digest = manifest.payload_sha256();
        self.vouched.entry(digest).or_insert_with(vouch).clone()
    }

    /// The windows of each group, if the next wave waits for one.
    fn windows(&self) -> Vec<String> {
        let fleet = &self.task.fleet;
        let running = fleet.rollout().running();
        if !running.is_some_and(|run| run.waits_for_window) {
            return Vec::new();
        }
        let text = |(group, windows): (&GroupName, &Vec<Window>)| {
            let windows: Vec<_> = windows.iter().map(Window::to_string).collect();
            format!("{group}: {}", windows.join(", "))
        };
        fleet.rules().windows.iter().map(text).collect()
    }

    fn view(&self, now: Timestamp) -> View {
        let (fleet, deadline) = (&self.task.fleet, self.task.fleet.rules().deadline);
        View {
            current: fleet.current().cloned(),
            newest: fleet.newest().map(|manifest| manifest.position()),
            rollout: fleet.rollout().clone(),
            tallies: fleet.tallies(now),
            windows: self.windows(),
            untried: fleet
                .untried_versions()
                .into_iter()
                .map(|(version, (hosts, one))| (version.to_owned(), hosts, one.clone()))
                .collect(),
            counts: fleet.counts(now, deadline),
            unsettled: fleet.unsettled(now, deadline).cloned().collect(),
            rows: fleet.rows(now, deadline),
        }
    }

    async fn connected(&mut self, connected: Connected, now: Timestamp) {
        let Connected {
            name,
            certificate,
            groups,
            address,
            connection,
            reply,
        } = connected;
        let entry = self
            .task
            .revoked
            .as_ref()
            .and_then(|list| list.entry(&certificate));
        if let Some(entry) = entry {
            let (name, serial) = (entry.name.clone(), entry.serial.clone());
            let _ = reply.send(Err(Unwanted::Revoked { name, serial }));
            return;
        }
        let known = self.task.fleet.record(&name).is_some();
        if !known && self.task.fleet.names().count() >= AGENTS_MAX {
            let _ = reply.send(Err(Unwanted::Full));
            return;
        }
        self.links_made += 1;
        let id = LinkId(self.links_made);
        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let link = Link {
            id,
            since: now,
            address,
            serial: certificate.serial.clone(),
            certificate_ends: certificate.not_after,
            offer: None,
            answered: None,
            declined: None,
        };
        let Arrival {
            new,
            changed,
            replaced,
        } = self.task.fleet.connected(&name, groups, link);
        if let Some(old) = replaced.and_then(|old| self.links.remove(&old)) {
            old.line.close(wire::close::REPLACED, "a newer connection");
        }
        if new {
            tracing::info!(agent = %name, %address, "enrolled");
            let (address, fingerprint) = (address.to_string(), certificate.fingerprint);
            let detail = json!({ "address": address, "certificate": fingerprint });
            self.note("enrolled", &name, None, None, detail).await;
        }
        tracing::debug!(agent = %name, %address, "connected");
        let welcome = Welcome {
            fleet: self.task.keys.fleet.clone(),
            master_version: env!("CARGO_PKG_VERSION").to_owned(),
            time: now,
            keep_alive: wire::KEEP_ALIVE_SECS,
            keys: Some(self.task.keys.envelope().clone()),
        };
        let line = Line {
            name: name.clone(),
            connection,
            commands,
        };
        line.send(Command::Welcome(Box::new(welcome)));
        let link = OpenLink {
            certificate,
            line,
            greeted: false,
            offered: None,
        };
        self.links.insert(id, link);
        if changed {
            self.keep(&name).await;
        }
        // The task may have ended meanwhile; then its end is the next event.
        let _ = reply.send(Ok((id, inbox)));
    }

    async fn hello(&mut self, name: &AgentName, id: LinkId, hello: Hello, now: Timestamp) {
        if !self.links.contains_key(&id) {
            return; // replaced meanwhile
        }
        if self.task.fleet.hello(name, hello.clamd, hello.foreign) {
            self.keep(name).await;
        }
        if let Some(installed) = &hello.installed {
            self.is_ahead(installed);
        }
        if let Some(link) = self.links.get_mut(&id) {
            link.greeted = true;
        }
        let forced = self.forced.get(name).cloned();
        let manner = forced.as_ref().map(|order| order.manner);
        let ordered = forced.and_then(|order| self.is_forced(name).then_some(order.manifest));
        let wanted = self.task.fleet.wanted(name, now).cloned();
        let Some(manifest) = ordered.or(wanted) else {
            self.vouch_to(id, now);
            return;
        };
        let has_it = hello
            .installed
            .is_some_and(|installed| installed.payload == manifest.envelope().payload);
        // Also a host that is there already hears of the offer when the master lacks its receipt
        // (a restored master): the answer is a receipt and costs nothing.
        let deadline = self.task.fleet.rules().deadline;
        let standing = self.task.fleet.standing(name, now, deadline);
        if has_it && standing == Standing::Conformant && manner.is_none() {
            if let Some(link) = self.links.get_mut(&id) {
                link.offered = Some(manifest.payload_sha256());
            }
            self.vouch_to(id, now);
        } else {
            let manner = manner.unwrap_or_default();
            self.offer(id, manifest, manner, now).await;
        }
    }

    /// A master that was restored from a backup learns from its agents what it has forgotten. Only
    /// a signature moves it.
    fn is_ahead(&self, installed: &Envelope) {
        let ours = self.task.fleet.current();
        if let Ok(manifest) = Manifest::verify(installed, &self.task.keys.manifest)
            // Of its number there may be another one here, which was made after the restoration.
            && ours.is_none_or(|ours| {
                manifest.position() >= ours.position()
                    && manifest.payload_sha256() != ours.payload_sha256()
            })
        {
            // Full: others wait that say the same, and the agents come again.
            let _ = self.task.ahead.try_send(installed.clone());
        }
    }

    /// Offers the generation on one connection, once the audit log has it.
    async fn offer(
        &mut self,
        id: LinkId,
        manifest: Arc<Verified<Manifest>>,
        manner: Manner,
        now: Timestamp,
    ) -> Option<OfferId> {
        let fresh = self.fresh(&manifest, now);
        let link = self.links.get_mut(&id)?;
        self.offers_made += 1;
        let offer = OfferId(self.offers_made);
        link.offered = Some(manifest.payload_sha256());
        let line = &link.line;
        let position = manifest.position();
        let fleet = &mut self.task.fleet;
        fleet.offered(&line.name, id, offer, &manifest, now);
        let current = Current { manifest, fresh };
        let detail = json!({ "forced": manner.rehash });
        let draft = draft("offer", "master", &line.name, Some(position), None, detail);
        let keys = self.task.keys.clone();
        let command = Command::Offer {
            offer,
            current: Box::new(current),
            keys,
            manner,
        };
        let job = Job {
            draft: Some(draft),
            then: Some((line.clone(), command)),
            ..Job::default()
        };
        self.task.recorder.write(job).await;
        Some(offer)
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
        if self.links.is_empty() {
            return; // nobody to be told
        }
        self.told = Some(Instant::now());
        let job = Job {
            checkpoint_to: self.links.values().map(|link| link.line.clone()).collect(),
            ..Job::default()
        };
        self.task.recorder.write(job).await;
    }

    async fn force(
        &mut self,
        what: Forcing,
        agents: Vec<AgentName>,
        full: bool,
        reply: oneshot::Sender<Forced>,
        now: Timestamp,
    ) {
        let manifest = match &what {
            Forcing::Current(position) => {
                let newest = self.task.fleet.newest().cloned();
                let Some(newest) = newest.filter(|it| it.position() == *position) else {
                    return; // dropping `reply` says so
                };
                newest
            }
            Forcing::TakenBack(manifest) => manifest.clone(),
        };
        let by_name: HashMap<_, _> = self
            .links
            .iter()
            .map(|(id, link)| (link.line.name.clone(), *id))
            .collect();
        let mut forced = Forced {
            offers: Vec::new(),
            offline: Vec::new(),
            past: Vec::new(),
        };
        let manner = Manner { rehash: true, full };
        for name in agents {
            let pinned = self.task.fleet.pinned(&name);
            let manifest = pinned.unwrap_or(&manifest).clone();
            if let Some(at) = self.task.fleet.past(&name, &manifest) {
                forced.past.push((name, at));
                continue;
            }
            let offer = match by_name.get(&name) {
                Some(id) => self.offer(*id, manifest.clone(), manner, now).await,
                None => None,
            };
            match offer {
                Some(offer) => {
                    let order = Ordered {
                        manner,
                        manifest: manifest.clone(),
                        taken_back: matches!(what, Forcing::TakenBack(_)),
                    };
                    self.forced.insert(name.clone(), order);
                    forced.offers.push((name, offer));
                }
                None => forced.offline.push(name),
            }
        }
        // The operator may have gone; the offers are made all the same.
        let _ = reply.send(forced);
    }

    async fn receipt(&mut self, id: LinkId, receipt: &Verified<Receipt>, now: Timestamp) {
        let Some(OpenLink { line, .. }) = self.links.get(&id) else {
            return;
        };
        let acknowledge = Command::Acknowledge(receipt.seq);
        if !self.task.fleet.receipt(receipt, now) {
            // Known is not yet on disk: the job of its first arrival may still wait before this one.
            let then = Some((line.clone(), acknowledge));
            let job = Job {
                then,
                ..Job::default()
            };
            self.task.recorder.write(job).await;
            return;
        }
        if !self.task.fleet.has_offer(&receipt.agent) {
            self.forced.remove(&receipt.agent);
        }
        if !self.accepted && matches!(receipt.outcome, Outcome::Live | Outcome::Installed) {
            self.accepted = true;
            let (publisher, manifest) = (self.task.publisher.clone(), receipt.manifest_sha256);
            tokio::task::spawn_blocking(move || {
                if let Err(error) = publisher.accepted(&manifest) {
                    tracing::error!(error = crate::chain(&error), "cannot keep the publisher id");
                }
            });
        }
        let (name, position) = (&receipt.agent, receipt.position());
        let outcome = receipt.outcome.to_string();
        tracing::info!(agent = %name, %position, outcome, error = receipt.error, "receipt");
        let detail = json!({ "receipt": receipt.envelope() });
        let actor = format!("agent:{name}");
        let job = Job {
            draft: Some(draft(
                "receipt",
                &actor,
                name,
                Some(position),
                Some(outcome),
                detail,
            )),
            keep: self.task.fleet.record(name).cloned(),
            then: Some((line.clone(), acknowledge)),
            ..Job::default()
        };
        self.drift(receipt).await; // before the acknowledgement
        self.task.recorder.write(job).await;
        let running = self.task.fleet.rollout().running();
        if receipt.outcome == Outcome::Refused
            && running.is_some_and(|run| run.target.position == receipt.position())
        {
            self.look(now).await; // before anybody else is offered it
        }
    }

    /// Writes what a receipt says of changed files into the audit log.
    async fn drift(&self, receipt: &Receipt) {
        let name = &receipt.agent;
        for (event, mended) in [("drift", false), ("repair", true)] {
            let files = receipt.drift.iter().filter(|file| file.mended == mended);
            let files: Vec<_> = files
                .map(|file| json!({ "name": file.name, "found": file.found }))
                .collect();
            if files.is_empty() {
                continue;
            }
            tracing::warn!(agent = %name, files = files.len(), error = receipt.error, "{event}");
            let detail = json!({ "files": files, "error": receipt.error });
            let outcome = Some(receipt.outcome.to_string());
            self.note(event, name, Some(receipt.position()), outcome, detail)
                .await;
        }
    }

    async fn revoked(&mut self, list: RevocationList) {
        self.links.retain(|_, link| {
            let Some(entry) = list.entry(&link.certificate) else { return true };
            link.line.close(wire::close::REVOKED, "certificate revoked");
            tracing::warn!(agent = %link.line.name, serial = %entry.serial, "revoked, connection closed");
            false
        });
        for name in self.task.fleet.revoked(&list) {
            self.forced.remove(&name);
            let detail = json!({ "list": list.version });
            let draft = draft("revoked", "master", &name, None, None, detail);
            let job = Job {
                draft: Some(draft),
                forget: Some(name),
                ..Job::default()
            };
            self.task.recorder.write(job).await;
        }
        self.task.revoked = Some(list);
    }

    /// Keeps what is known of an agent on disk.
    async fn keep(&self, name: &AgentName) {
        let keep = self.task.fleet.record(name).cloned();
        self.task
            .recorder
            .write(Job {
                keep,
                ..Job::default()
            })
            .await;
    }

    /// Writes what an agent did into the audit log.
    async fn note(
        &self,
        event: &str,
        name: &AgentName,
        position: Option<Position>,
        outcome: Option<String>,
        detail: Value,
    ) {
        let draft = draft(
            event,
            &format!("agent:{name}"),
            name,
            position,
            outcome,
            detail,
        );
        self.task
            .recorder
            .write(Job {
                draft: Some(draft),
                ..Job::default()
            })
            .await;
    }

    fn send(&self, id: LinkId, command: Command) {
        if let Some(link) = self.links.get(&id) {
            link.line.send(command);
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

fn rejected(target: &Target, how: Ending, now: Timestamp) -> Rejected {
    Rejected {
        content: target.content,
        position: target.position,
        outcome: how.word().to_owned(),
        since: now,
    }
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

fn draft(
    event: &str,
    actor: &str,
    subject: &AgentName,
    position: Option<Position>,
    outcome: Option<String>,
    detail: Value,
) -> Draft {
    let (event, actor, subject) = (event.to_owned(), actor.to_owned(), subject.to_string());
    Draft {
        event,
        actor,
        subject,
        position,
        outcome,
        detail,
    }
}
