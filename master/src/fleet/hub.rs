//! The one task that owns the fleet: connections tell it what agents say, publishing tells it what
//! is wanted, the recorder tells it what is on disk, and it carries out what `dispatch.rs` decides.
//!
//! It waits for no peer and for no disk, so it answers at once whatever they do.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clamcast_daemon::pulse::Pulse;
use clamcast_proto::audit::Operator;
use clamcast_proto::dsse::{Envelope, Verified};
use clamcast_proto::keys::KeySet;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::Receipt;
use clamcast_proto::revocation::RevocationList;
use clamcast_proto::wire::{self, Hello, OfferId, OtherMaster};
use clamcast_proto::{AgentName, Position};
use jiff::Timestamp;
use quinn::{Connection, VarInt};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::Twins;
use super::agents::{Counts, Fleet, LinkId, Row, ThinVersion, Turn};
use super::budget::Exceeded;
use super::dispatch::{
    Action, Bounds, Closing, Decline, Dispatcher, Forced, Forcing, Message, Newcomer, Now, Order,
    Progress, TRY_AGAIN, Unwanted,
};
use super::recovery;
use super::rollout::{OrderError, Rollout, Run, Tally};
use crate::publish::news::{News, Wish};
use crate::publish::publisher::{FRESH_PARTS, Publisher};
use crate::publish::withdrawn::Directives;
use crate::record::entry::{Entry, FileName};
use crate::record::recorder::{Durable, ENTRIES_MAX, Recorder};
use crate::store::Store;

/// Messages that wait for the hub; senders wait when it is full, and with them their agents.
const EVENTS_MAX: usize = 1024;

/// Messages that wait for one connection: acknowledgements of all receipts that an agent may hold,
/// and as much again. Its task writes them as fast as the agent reads; an agent with this many
/// unread ones is disconnected and starts over.
const MESSAGES_MAX: usize = 2 * wire::RECEIPTS_PENDING_MAX;

/// Time between looks at a rollout when nothing happens, for silence is no event.
const LOOK: Duration = Duration::from_secs(1);

/// The status line is renewed after this time even without a change, because hosts expire.
const STATUS_AGE_MAX: Duration = Duration::from_secs(30);

/// How long a connection that was replaced has to answer: several round trips of a slow path.
const ANSWER: Duration = Duration::from_secs(3);

/// Connections that are probed at a time. When a whole fleet reconnects, the others are closed at once.
const PROBES_MAX: usize = 64;

/// Time between two looks whether it has.
const ANSWER_LOOK: Duration = Duration::from_millis(50);

/// Agents that the master knows, at most: each is a file and a row. A fleet of this size needs a
/// second master.
pub const AGENTS_MAX: usize = 20_000;

/// A look goes through the whole fleet: what happens within a moment is looked at together.
const BOUNDS: Bounds = Bounds {
    agents: AGENTS_MAX,
    looks_apart: Duration::from_millis(50),
    backlog: ENTRIES_MAX,
};

/// What happens to the fleet.
#[derive(Debug)]
pub enum Event {
    /// An agent's certificate was checked.
    Connected {
        /// Which agent.
        newcomer: Box<Newcomer>,
        /// The connection, to end it.
        connection: Connection,
        /// Gets the connection's name and what is said on it.
        reply: oneshot::Sender<Result<(LinkId, mpsc::Receiver<Message>), Unwanted>>,
    },
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
        /// Which one, and why.
        decline: Decline,
    },
    /// A file of its offer cannot be sent, or can be sent again.
    Unsent {
        /// Which agent.
        name: AgentName,
        /// On which connection.
        id: LinkId,
        /// Which offer.
        offer: OfferId,
        /// Why it cannot be sent, if so.
        reason: Option<String>,
    },
    /// The other end of a connection that was replaced still answers.
    BothAnswer {
        /// Who.
        name: AgentName,
        /// Where the replaced connection came from.
        old: SocketAddr,
    },
    /// A connection ended.
    Disconnected {
        /// Who.
        name: AgentName,
        /// Which connection.
        id: LinkId,
    },
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
        /// Gets why it cannot be carried out, or the number of the entry that has to be on disk first.
        reply: oneshot::Sender<Result<u64, OrderError>>,
    },
    /// A newer revocation list is in force.
    Revoked(RevocationList),
    /// Somebody asks.
    Query(oneshot::Sender<View>),
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
    /// The generation that waits for its turn.
    pub waiting: Option<Turn>,
    /// Since and until when the rollout waits for agents that were connected before a start.
    pub reconnecting: Option<(Timestamp, Timestamp)>,
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
    /// Names that two hosts use.
    pub twins: Vec<(AgentName, Twins)>,
    /// Agents that exceeded their budget in the audit log.
    pub exceeded: Vec<(AgentName, Exceeded)>,
    /// Agents that follow another master, and since when this one knows.
    pub other_masters: Vec<(AgentName, OtherMaster, Timestamp)>,
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
    /// Keeps what was published.
    pub publisher: Arc<Publisher>,
    /// For how long an agent may rely on a generation.
    pub fresh: Duration,
    /// Brings what was published.
    pub news: mpsc::Receiver<News>,
    /// Takes what the rollout wants published.
    pub wishes: mpsc::Sender<Wish>,
    /// Takes what the publisher is to know.
    pub directives: watch::Sender<Directives>,
    /// Takes the beats of the task.
    pub pulse: Pulse,
}

/// Starts the task. It ends when `stop` fires.
pub fn start(
    fleet: Fleet,
    means: Means,
    stop: CancellationToken,
) -> (Hub, tokio::task::JoinHandle<()>) {
    means.directives.send_replace(fleet.directives());
    let (events, inbox) = mpsc::channel(EVENTS_MAX);
    let (tick, changed) = watch::channel(0);
    let mut dispatcher = Dispatcher::new(fleet, BOUNDS, Now::get());
    dispatcher.durable(0, &means.recorder.watch().borrow().checkpoint);
    let running = Running {
        events: events.downgrade(),
        probes: Arc::new(Semaphore::new(PROBES_MAX)),
        dispatcher,
        numbers: VecDeque::new(),
        means,
        links: HashMap::new(),
        tasks: JoinSet::new(),
        unlooked: None,
        tick,
        said_at: None,
    };
    let handle = tokio::spawn(running.run(inbox, stop));
    (Hub { events, changed }, handle)
}

struct Running {
    /// For tasks of the hub's own.
    events: mpsc::WeakSender<Event>,
    /// Places for probes of connections that were replaced.
    probes: Arc<Semaphore>,
    dispatcher: Dispatcher,
    /// The recorder's numbers of the dispatcher's entries that are not on disk.
    numbers: VecDeque<u64>,
    means: Means,
    links: HashMap<LinkId, Line>,
    /// What waits for the store, or for an answer of a connection that was replaced.
    tasks: JoinSet<()>,
    /// The mirror is to be looked at, for which there was no room at this time.
    unlooked: Option<Instant>,
    tick: watch::Sender<u64>,
    /// The tick and the time of the last status line.
    said_at: Option<(u64, Instant)>,
}

/// The way to one connection's task.
#[derive(Debug)]
struct Line {
    name: AgentName,
    address: SocketAddr,
    connection: Connection,
    messages: mpsc::Sender<Message>,
}

impl Line {
    /// Queues a message; never waits for a peer.
    fn send(&self, message: Message) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.messages.try_send(message) {
            tracing::warn!(agent = %self.name, "reads nothing, connection closed");
            self.close(wire::close::TIMEOUT, "reads nothing");
        }
    }

    /// Whether the other end acknowledges the head of the audit log, which the master may send at any
    /// time. Only authenticated acknowledgements count.
    async fn answers(&self, checkpoint: Arc<str>) -> bool {
        let heard = || self.connection.stats().frame_rx.acks;
        let before = heard();
        self.send(Message::Checkpoint(checkpoint));
        let answered = async {
            while heard() == before {
                sleep(ANSWER_LOOK).await;
            }
        };
        tokio::select! {
            biased;
            _ = self.connection.closed() => false,
            answered = timeout(ANSWER, answered) => answered.is_ok(),
        }
    }

    fn close(&self, code: u32, reason: &str) {
        self.connection
            .close(VarInt::from_u32(code), reason.as_bytes());
    }
}

impl Running {
    async fn run(mut self, mut inbox: mpsc::Receiver<Event>, stop: CancellationToken) {
        let mut renewals = tokio::time::interval(self.means.fresh / FRESH_PARTS);
        let mut looks = tokio::time::interval(LOOK);
        for interval in [&mut renewals, &mut looks] {
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        let mut disk = self.means.recorder.watch();
        loop {
            self.means.pulse.beat(); // `looks` makes a beat at least every second
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = until(self.dispatcher.look_at()) => self.look(),
                Ok(()) = disk.changed() => {
                    let durable = disk.borrow_and_update().clone();
                    self.durable(&durable);
                }
                Some(ended) = self.tasks.join_next() => report(ended),
                _ = looks.tick() => {
                    let is_short = self.means.recorder.is_short();
                    self.dispatcher.disk_is_short(is_short);
                    self.dispatcher.tick(Now::get());
                    self.carry_out();
                    self.look_again();
                    self.say();
                }
                _ = renewals.tick() => {
                    self.dispatcher.renew(Now::get());
                    self.carry_out();
                }
                Some(news) = self.means.news.recv() => {
                    self.heard(news, Now::get());
                    self.carry_out();
                    self.changed();
                }
                event = inbox.recv() => match event {
                    None => break,
                    Some(Event::Query(reply)) => {
                        // What is told takes in what happened.
                        if self.dispatcher.look_at().is_some() {
                            self.look();
                        }
                        // Nobody may be waiting any more.
                        let _ = reply.send(View::of(&self.dispatcher, Timestamp::now()));
                    }
                    Some(event) => {
                        self.handle(event, Now::get());
                        self.carry_out();
                        self.changed();
                    }
                },
            }
        }
        self.dispatcher.stop();
        self.carry_out();
        while let Some(ended) = self.tasks.join_next().await {
            report(ended);
        }
    }

    fn changed(&self) {
        self.tick.send_modify(|tick| *tick += 1);
    }

    /// Updates the status line if anything changed. Counting goes through the whole fleet.
    fn say(&mut self) {
        let tick = *self.tick.borrow();
        if self
            .said_at
            .is_some_and(|(said, at)| said == tick && at.elapsed() < STATUS_AGE_MAX)
        {
            return;
        }
        self.said_at = Some((tick, Instant::now()));
        let fleet = self.dispatcher.fleet();
        let counts = fleet.counts(Timestamp::now(), fleet.rules().deadline);
        let generation = match fleet.current() {
            Some(manifest) => format!("generation {}", manifest.position()),
            None => "nothing published".to_owned(),
        };
        let Counts {
            total,
            connected,
            conformant,
            ..
        } = counts;
        self.means.pulse.say(format!(
            "{generation}, {conformant} of {total} hosts conformant, {connected} connected"
        ));
    }

    /// Looks at the rollout. Whoever waits is not woken every second for nothing.
    fn look(&mut self) {
        let changed = self.dispatcher.look(Now::get());
        self.carry_out();
        self.dispatcher.has_looked(Instant::now());
        if changed {
            self.changed();
        }
    }

    /// The disk has more than before.
    fn durable(&mut self, durable: &Durable) {
        let on_disk = self.numbers.partition_point(|it| *it <= durable.number);
        self.numbers.drain(..on_disk);
        let waiting = self.numbers.len();
        self.dispatcher.durable(waiting, &durable.checkpoint);
        self.dispatcher
            .disk_is_short(self.means.recorder.is_short());
        self.carry_out();
    }

    fn heard(&mut self, news: News, now: Now) {
        let dispatcher = &mut self.dispatcher;
        match news {
            News::Published {
                manifest,
                supersede,
            } => dispatcher.published(&manifest, supersede, now),
            News::WentBack(manifest) => dispatcher.went_back(&manifest, now),
            News::Passed => dispatcher.passed(now),
        }
    }

    fn handle(&mut self, event: Event, now: Now) {
        let dispatcher = &mut self.dispatcher;
        match event {
            Event::Query(_) => {} // answered above, and changes nothing
            Event::Connected {
                newcomer,
                connection,
                reply,
            } => {
                let (name, address) = (newcomer.name.clone(), newcomer.address);
                let answer = dispatcher.connected(*newcomer, now).map(|id| {
                    let (messages, inbox) = mpsc::channel(MESSAGES_MAX);
                    let line = Line {
                        name,
                        address,
                        connection,
                        messages,
                    };
                    self.links.insert(id, line);
                    (id, inbox)
                });
                // The task may have ended meanwhile; then its end is the next event.
                let _ = reply.send(answer);
            }
            Event::Hello {
                name,
                id,
                mut hello,
            } => {
                let store = self.means.publisher.store();
                // The digest alone names a manifest of this master, which was verified when it was read.
                if let Some(digest) = hello.installed_sha256.take()
                    && hello.installed.is_none()
                    && let Some(known) = store.named(&digest)
                {
                    hello.installed = Some(known.envelope().clone());
                }
                dispatcher.hello(&name, id, *hello, now);
            }
            Event::Progress { name, id, progress } => {
                dispatcher.progress(&name, id, progress, now);
            }
            Event::Receipt { id, receipt } => dispatcher.receipt(id, &receipt, now),
            Event::Declined { name, id, decline } => {
                dispatcher.declined(&name, id, decline, now);
            }
            Event::Unsent {
                name,
                id,
                offer,
                reason,
            } => dispatcher.unsent(&name, id, offer, reason),
            Event::BothAnswer { name, old } => dispatcher.both_answer(&name, old, now),
            Event::Reoffer { name, id } => {
                let store = self.means.publisher.store();
                let kept = |at| store.manifest(at).filter(|_| store.keeps(at));
                dispatcher.reoffer(&name, id, kept, now);
            }
            Event::Disconnected { name, id } => {
                self.links.remove(&id);
                dispatcher.disconnected(&name, id, now);
            }
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
                let done = dispatcher.order(order, newest.as_ref(), &operator, now);
                self.carry_out();
                // The operator may have gone.
                let _ = reply.send(done.map(|()| self.means.recorder.last()));
            }
        }
    }

    /// Carries out what was decided.
    fn carry_out(&mut self) {
        for action in self.dispatcher.actions() {
            match action {
                Action::Tell(id, message) => {
                    if let Some(line) = self.links.get(&id) {
                        line.send(message);
                    }
                }
                Action::Write(entry) => self.write(entry),
                Action::Close(id, closing) => {
                    if let Some(line) = self.links.remove(&id) {
                        let (code, reason) = closing.code();
                        tracing::debug!(agent = %line.name, reason, "connection closed");
                        match closing {
                            Closing::Replaced => self.replace(line),
                            Closing::Revoked | Closing::Expired | Closing::NewDay => {
                                line.close(code, reason);
                            }
                        }
                    }
                }
                Action::Publish => self.publish(),
                Action::RollBack(owed) => {
                    // Full: it is tried again.
                    let _ = self.means.wishes.try_send(Wish::RollBack(owed.rollback()));
                }
                Action::Accepted(manifest) => {
                    let publisher = self.means.publisher.clone();
                    self.tasks.spawn_blocking(move || {
                        if let Err(error) = publisher.accepted(&manifest) {
                            let error = crate::chain(&error);
                            tracing::error!(error, "cannot keep the publisher id");
                        }
                    });
                }
                // Nothing that this master has forgotten, and no other master's.
                Action::Ahead(installed) if self.means.publisher.store().has(&installed) => {}
                Action::Ahead(installed) => {
                    let ours = self.dispatcher.fleet().current();
                    if recovery::is_news(&installed, ours, &self.means.keys) {
                        // Full: others wait that say the same, and the agents come again.
                        let _ = self.means.ahead.try_send(installed);
                    }
                }
            }
        }
    }

    /// Closes a connection that was replaced, after a look whether its other end still answers. An agent
    /// that lost it does not; a second host with the same identity does.
    fn replace(&mut self, line: Line) {
        let (code, reason) = Closing::Replaced.code();
        let Ok(place) = self.probes.clone().try_acquire_owned() else {
            return line.close(code, reason); // a whole fleet reconnects
        };
        let (events, checkpoint) = (self.events.clone(), self.dispatcher.checkpoint());
        self.tasks.spawn(async move {
            let _place = place;
            if line.answers(checkpoint).await
                && let Some(events) = events.upgrade()
            {
                let (name, old) = (line.name.clone(), line.address);
                let _ = events.send(Event::BothAnswer { name, old }).await; // the hub stops
            }
            line.close(code, reason);
        });
    }

    fn write(&mut self, entry: Entry) {
        if entry
            .files
            .iter()
            .any(|(file, _)| *file == FileName::Rollout)
        {
            let rollout = self.dispatcher.fleet().rollout();
            let directives = self.dispatcher.fleet().directives();
            self.means.directives.send_replace(directives);
            let store = self.means.publisher.store();
            store.need(needed(rollout, store));
        } else if entry
            .files
            .iter()
            .any(|(file, _)| matches!(file, FileName::Agent(_)))
        {
            let plain_names = self.dispatcher.fleet().plain_names();
            let are_wider = plain_names.is_none();
            let is_news = self.means.directives.send_if_modified(|directives| {
                let is_news = directives.plain_names != plain_names;
                directives.plain_names = plain_names;
                is_news
            });
            if is_news && are_wider {
                self.publish(); // what was skipped
            }
        }
        self.numbers.push_back(self.means.recorder.write(entry));
    }

    /// Has the mirror looked at; later, if there is no room for that now.
    fn publish(&mut self) {
        let full = self.means.wishes.try_send(Wish::Look).is_err();
        self.unlooked = full.then(Instant::now);
    }

    fn look_again(&mut self) {
        if self.unlooked.is_some_and(|at| at.elapsed() >= TRY_AGAIN) {
            self.publish();
        }
    }
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a task of the hub panicked; this is a bug");
    }
}

impl View {
    fn of(dispatcher: &Dispatcher, now: Timestamp) -> Self {
        let fleet = dispatcher.fleet();
        let twins = fleet.twins(now);
        let exceeded = dispatcher.budgets().exceeded();
        let deadline = fleet.rules().deadline;
        let mut rows = fleet.rows(now, deadline);
        for row in rows.iter_mut().filter(|row| !row.conformant) {
            if let Some(exceeded) = dispatcher.budgets().of(&row.name) {
                row.error = Some(format!(
                    "exceeded its daily budget in the audit log; what it reports counts again at {:.0}",
                    exceeded.until
                ));
            }
        }
        Self {
            current: fleet.current().cloned(),
            waiting: fleet.turn(),
            reconnecting: fleet.reconnecting(now),
            newest: fleet.newest().map(|manifest| manifest.position()),
            rollout: fleet.rollout().clone(),
            tallies: fleet.tallies(now),
            windows: fleet.waits_for(now),
            deadline,
            stragglers: fleet.stragglers(now).into_iter().cloned().collect(),
            thin: fleet.thin_versions(),
            counts: fleet.counts(now, deadline),
            unsettled: fleet.unsettled(now, deadline).cloned().collect(),
            rows,
            twins: twins.map(|(name, it)| (name.clone(), it.clone())).collect(),
            other_masters: fleet
                .other_masters()
                .map(|(name, other, since)| (name.clone(), other.clone(), since))
                .collect(),
            exceeded: exceeded.map(|(name, it)| (name.clone(), it)).collect(),
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
