//! Decides who is offered what, what is said to whom, and what is written down before.
//!
//! Pure: no sockets, no disk, no clock. `hub.rs` tells it what happens and carries out the
//! [`Action`]s that come of it, in their order. What follows from a change is held until the
//! [`Entry`] that writes the change down is on disk ([`Dispatcher::durable`]). An offer that was held
//! is dropped if its generation was withdrawn meanwhile.

#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clamcast_proto::audit::{Draft, Operator};
use clamcast_proto::dsse::{Envelope, Verified};
use clamcast_proto::identity::Serial;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::{Outcome, Receipt};
use clamcast_proto::revocation::RevocationList;
use clamcast_proto::wire::{self, Hello, OfferId, OtherMaster, Phase};
use clamcast_proto::{AgentName, AuditEvent, Digest, GroupName, Position};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};

use crate::fleet::Twins;
use crate::fleet::agents::{Arrival, Fleet, Link, LinkId, Standing};
use crate::fleet::budget::{Budgets, Exceeded, LINE_BYTES};
use crate::fleet::rollout::{self, Effect, OrderError, Owed, Rollout};
use crate::record::entry::{Entry, FileName};

/// Time between checkpoints that agents are told of, beside those at the end of a rollout.
const CHECKPOINTS: Duration = Duration::from_secs(3600);

/// Shortest time between two of them.
const CHECKPOINTS_MIN: Duration = Duration::from_secs(60);

/// Time between two tries of what did not go at first: to have a rollback published or the mirror
/// looked at.
pub const TRY_AGAIN: Duration = Duration::from_secs(10);

/// Decides for the whole fleet.
#[derive(Debug)]
pub struct Dispatcher {
    fleet: Fleet,
    revoked: Option<RevocationList>,
    bounds: Bounds,
    links_made: u64,
    offers_made: u64,
    /// Whether some agent has taken a generation since the start.
    accepted: bool,
    /// Agents that an operator has forced and that have not answered yet: one that loses its
    /// connection is to look at its disk all the same when it is back.
    forced: HashMap<AgentName, Ordered>,
    /// The state of the rollout that was written down last.
    kept: Rollout,
    /// When the rollout is to be looked at, and when it was.
    look_at: Option<Instant>,
    looked: Instant,
    /// When the rollback that is owed was tried last.
    tried: Option<Instant>,
    /// When agents are told the head of the audit log next, and when they were last.
    checkpoint_at: Instant,
    checkpointed: Option<Instant>,
    /// Entries that were made, and how many of them are on disk.
    written: u64,
    durable: u64,
    /// The signed head of the audit log.
    checkpoint: Arc<str>,
    /// What follows from entries that are not on disk yet, each with the number of its entry.
    held: VecDeque<(u64, Held)>,
    /// Agents whose records are to be kept when fewer entries wait for the disk.
    unkept: BTreeSet<AgentName>,
    /// Whether offers wait for that, too.
    offers_wait: bool,
    /// What agents add to the audit log.
    budgets: Budgets,
    /// Whether the disk is so full that offers and records of agents wait.
    is_short: bool,
    /// The generation that waits for its turn although the fleet has it.
    overtaken: Option<Position>,
    actions: Vec<Action>,
}

/// What is done when an entry is on disk.
#[derive(Debug)]
enum Held {
    /// A receipt is acknowledged.
    Acknowledge(LinkId, u64),
    /// An agent is told its offer. `despite`: an operator wants it although it was withdrawn.
    Offer {
        name: AgentName,
        id: LinkId,
        offer: OfferId,
        manifest: Arc<Verified<Manifest>>,
        manner: Manner,
        despite: bool,
    },
    RollBack(Owed),
    /// Everybody is told the head of the audit log.
    Checkpoint,
}

/// What one master does at most.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Agents that it knows.
    pub agents: usize,
    /// Shortest time between two looks at the rollout.
    pub looks_apart: Duration,
    /// Entries of its own that wait for the disk. From there on nothing new is offered.
    pub backlog: u64,
}

/// What an operator has forced on an agent.
#[derive(Clone, Debug)]
struct Ordered {
    manner: Manner,
    manifest: Arc<Verified<Manifest>>,
    /// It is not current and does not become so.
    taken_back: bool,
}

/// A moment, on both clocks: signed and kept is the one that may be set, measured is the other.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// What the clock on the wall shows.
    pub clock: Timestamp,
    /// What only goes forward.
    pub at: Instant,
}

/// What is to be done.
#[derive(Debug)]
pub enum Action {
    /// Say this, if the connection is still there.
    Tell(LinkId, Message),
    /// Write this down. [`Dispatcher::durable`] hears how many of these still wait for the disk.
    Write(Entry),
    /// End a connection.
    Close(LinkId, Closing),
    /// Publish what the mirror has now.
    Publish,
    /// Publish a rollback.
    RollBack(Owed),
    /// Some agent has taken this generation of ours.
    Accepted(Digest),
    /// An agent has a generation that may be newer than all of ours: the master was restored.
    Ahead(Envelope),
}

/// What an agent is told.
#[derive(Clone, Debug)]
pub enum Message {
    /// The first message of a connection.
    Welcome,
    /// Take this generation.
    Offer {
        /// Names the offer.
        offer: OfferId,
        /// The generation.
        manifest: Arc<Verified<Manifest>>,
        /// How.
        manner: Manner,
    },
    /// What it has is still current.
    Fresh(Arc<Verified<Manifest>>),
    /// The receipt with this number is in the audit log.
    Acknowledge(u64),
    /// The signed head of the audit log.
    Checkpoint(Arc<str>),
}

/// How a generation is offered.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Manner {
    /// The agent hashes what is really on its disk first.
    pub rehash: bool,
    /// No delta is used.
    pub full: bool,
}

/// Why a connection is ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Closing {
    /// Its agent has a newer one.
    Replaced,
    /// Its certificate was revoked.
    Revoked,
    /// Its certificate has expired.
    Expired,
    /// A day begins, and the agent may send the receipts that were left out on the day before.
    NewDay,
}

/// An agent whose certificate was checked.
#[derive(Clone, Debug)]
pub struct Newcomer {
    /// Its name.
    pub name: AgentName,
    /// Its groups, of the certificate and of the configuration.
    pub groups: Vec<GroupName>,
    /// Where it comes from.
    pub address: SocketAddr,
    /// Its certificate's number.
    pub serial: Serial,
    /// When that ends.
    pub certificate_ends: Timestamp,
    /// SHA-256 of it.
    pub fingerprint: Digest,
}

/// An offer that an agent does not take.
#[derive(Clone, Debug)]
pub struct Decline {
    /// Which one.
    pub offer: OfferId,
    /// Why, in the agent's words.
    pub message: String,
    /// The master that the agent follows, if the reason is that there are two.
    pub other_master: Option<Box<OtherMaster>>,
}

/// A sign of progress.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// With which offer.
    pub offer: OfferId,
    /// What the agent is doing.
    pub phase: Phase,
    /// Until when it means to be silent.
    pub until: Option<Timestamp>,
    /// Bytes of files that its connection has carried so far.
    pub sent: u64,
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
    /// There are so many already.
    #[error("the fleet is full: {0} agents")]
    Full(usize),
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

/// What came of forcing at first.
#[derive(Debug, Default)]
pub struct Forced {
    /// The offers made.
    pub offers: Vec<(AgentName, OfferId)>,
    /// Agents that are not connected.
    pub offline: Vec<AgentName>,
    /// Agents that took a higher one and do not have it, and which they took.
    pub past: Vec<(AgentName, Position)>,
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

impl Dispatcher {
    /// The fleet as it was kept, at the start of the master: nobody is connected yet.
    pub fn new(mut fleet: Fleet, bounds: Bounds, now: Now) -> Self {
        fleet.resumed(now.clock);
        Self {
            kept: fleet.rollout().clone(),
            fleet,
            revoked: None,
            bounds,
            links_made: 0,
            offers_made: 0,
            accepted: false,
            forced: HashMap::new(),
            look_at: Some(now.at),
            looked: now.at,
            tried: None,
            checkpoint_at: now.at + CHECKPOINTS,
            checkpointed: None,
            written: 0,
            durable: 0,
            checkpoint: Arc::from(""),
            held: VecDeque::new(),
            unkept: BTreeSet::new(),
            offers_wait: false,
            budgets: Budgets::default(),
            is_short: false,
            overtaken: None,
            actions: Vec::new(),
        }
    }

    /// The fleet as it is now.
    pub fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    /// The signed head of the audit log.
    pub fn checkpoint(&self) -> Arc<str> {
        self.checkpoint.clone()
    }

    /// What agents add to the audit log today.
    pub fn budgets(&self) -> &Budgets {
        &self.budgets
    }

    /// What came of all that was told since the last call, to be carried out in this order.
    pub fn actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// When [`Dispatcher::look`] is due.
    pub fn look_at(&self) -> Option<Instant> {
        self.look_at
    }

    /// All entries but the last `waiting` are on disk. `checkpoint`: the signed head of the audit log.
    /// To be called when all actions were carried out.
    pub fn durable(&mut self, waiting: usize, checkpoint: &Arc<str>) {
        self.durable = self.written - waiting as u64;
        self.checkpoint = checkpoint.clone();
        let number = self.durable;
        while let Some((_, held)) = self.held.pop_front_if(|(after, _)| *after <= number) {
            self.release(held);
        }
        // Not before half of them are on disk: each look goes through the whole fleet.
        if !self.is_short && self.written - self.durable <= self.bounds.backlog / 2 {
            for name in std::mem::take(&mut self.unkept) {
                self.keep(&name);
            }
            if std::mem::take(&mut self.offers_wait) {
                self.look_soon();
            }
        }
    }

    /// Does what an entry held up.
    fn release(&mut self, held: Held) {
        let rollout = self.fleet.rollout();
        match held {
            Held::Offer {
                name,
                id,
                offer,
                manifest,
                manner,
                despite,
            } => {
                if !despite && rollout.is_taken_back(manifest.position()) {
                    return self.fleet.not_offered(&name, id, offer);
                }
                let message = Message::Offer {
                    offer,
                    manifest,
                    manner,
                };
                self.actions.push(Action::Tell(id, message));
            }
            Held::Acknowledge(id, seq) => {
                self.actions
                    .push(Action::Tell(id, Message::Acknowledge(seq)));
            }
            Held::RollBack(owed) if rollout.owed() == Some(&owed) => {
                self.actions.push(Action::RollBack(owed));
            }
            Held::RollBack(_) => {} // an operator ordered another one meanwhile
            Held::Checkpoint => {
                let links: Vec<_> = self.fleet.greeted().map(|(_, id)| id).collect();
                for id in links {
                    let message = Message::Checkpoint(self.checkpoint.clone());
                    self.actions.push(Action::Tell(id, message));
                }
            }
        }
    }

    /// Whether as many entries wait for the disk as may.
    fn is_busy(&self) -> bool {
        self.is_short || self.written - self.durable >= self.bounds.backlog
    }

    /// Whether the disk is so full that what is left is for operators and alarms. To be called before
    /// [`Dispatcher::tick`].
    pub fn disk_is_short(&mut self, is_short: bool) {
        self.is_short = is_short;
    }

    /// To be called every second or so: silence is no event, and neither is a window that opens.
    pub fn tick(&mut self, now: Now) {
        if now.at >= self.checkpoint_at {
            self.checkpoint_at = now.at + CHECKPOINTS;
            if self.fleet.greeted().next().is_some() {
                self.checkpointed = Some(now.at);
                self.hold(Held::Checkpoint);
            }
        }
        self.close_expired(now);
        self.begin_day(now);
        if self.fleet.is_timed() || self.kept.owed().is_some() {
            self.look_soon();
        }
    }

    /// Ends the connections of agents whose certificate has expired.
    fn close_expired(&mut self, now: Now) {
        let expired = self.fleet.expired(now.clock);
        let expired = expired.map(|(name, link)| (name.clone(), link.id, link.certificate_ends));
        for (name, id, ends) in expired.collect::<Vec<_>>() {
            self.actions.push(Action::Close(id, Closing::Expired));
            tracing::warn!(agent = %name, %ends, "certificate expired, connection closed");
            let draft = Draft::new(AuditEvent::Expired, "master", &name);
            let detail = json!({ "certificate_ends": ends });
            self.write(Entry::line(Draft { detail, ..draft }));
            self.disconnected(&name, id, now);
        }
    }

    /// Gives all agents a new budget in the audit log when a day begins. One that exceeded the last one
    /// reconnects, and sends again what was left out.
    fn begin_day(&mut self, now: Now) {
        for (name, exceeded) in self.budgets.begin_day(now.clock) {
            self.summarise(&name, exceeded);
            if let Some(id) = self.fleet.link_of(&name) {
                self.actions.push(Action::Close(id, Closing::NewDay));
                self.disconnected(&name, id, now);
            }
        }
    }

    /// The master stops: what was left out of the audit log so far is written down.
    pub fn stop(&mut self) {
        let exceeded = self.budgets.exceeded();
        let exceeded: Vec<_> = exceeded.map(|(name, it)| (name.clone(), it)).collect();
        for (name, exceeded) in exceeded {
            self.summarise(&name, exceeded);
        }
    }

    /// Writes down how many lines of an agent were left out.
    fn summarise(&mut self, name: &AgentName, exceeded: Exceeded) {
        let draft = Draft::new(AuditEvent::BudgetExceeded, "master", name);
        let detail = json!({ "left_out": exceeded.lines, "since": exceeded.since });
        self.write(Entry::line(Draft { detail, ..draft }));
    }

    /// Takes a line of so many bytes from an agent's budget in the audit log.
    fn spend(&mut self, name: &AgentName, bytes: usize, now: Now) -> bool {
        let known = self.budgets.is_exceeded(name);
        let fits = self
            .budgets
            .spend(name, LINE_BYTES + bytes as u64, now.clock);
        if let (false, false, Some(exceeded)) = (fits, known, self.budgets.of(name)) {
            let until = exceeded.until;
            tracing::warn!(agent = %name, %until, "audit budget exceeded, lines are left out");
            let draft = Draft::new(AuditEvent::BudgetExceeded, "master", name);
            let detail = json!({ "until": until });
            self.write(Entry::line(Draft { detail, ..draft }));
        }
        fits
    }

    /// Has the rollout looked at as soon as what waits with this was heard: each look goes through
    /// the whole fleet.
    fn look_soon(&mut self) {
        self.look_at
            .get_or_insert(self.looked + self.bounds.looks_apart);
    }

    /// Looks at the rollout, and offers what follows. Returns whether anything did.
    pub fn look(&mut self, now: Now) -> bool {
        self.look_at = None;
        self.begin_overtaken(now);
        let effects = self.fleet.step(now.clock);
        let mut changed = *self.fleet.rollout() != self.kept;
        self.carry_out(effects, None, now);
        for (name, id, manifest) in self.fleet.due(now.clock) {
            if self.is_busy() {
                self.offers_wait = true;
                break;
            }
            if !self.is_forced(&name, &manifest) {
                if !self.spend_on_offer(&name, now) {
                    continue;
                }
                self.forced.remove(&name);
                self.offer(&name, id, manifest, Manner::default(), now);
                changed = true;
            }
        }
        self.looked = now.at;
        changed
    }

    /// What came of a look is carried out: the time to the next one begins.
    pub fn has_looked(&mut self, at: Instant) {
        self.looked = at;
    }

    /// Whether an agent is being driven past the waves to what is still current, or to what was
    /// taken back, and so is not offered this, which is not newer.
    fn is_forced(&self, name: &AgentName, instead_of: &Manifest) -> bool {
        self.forced.get(name).is_some_and(|order| {
            let open = order.taken_back || self.fleet.is_open(&order.manifest.payload_sha256());
            open && order.manifest.position() >= instead_of.position()
        })
    }

    /// Takes the line of an offer from an agent's budget: a host that connects again and again, or
    /// asks for offers, makes one each time.
    fn spend_on_offer(&mut self, name: &AgentName, now: Now) -> bool {
        // Looked at with every change of the fleet: an offer that waits is not a line each time.
        !self.budgets.is_exceeded(name) && self.spend(name, 0, now)
    }

    /// Has done what a change of the rollout brings. Its new state is written before every offer
    /// that follows from it.
    fn carry_out(&mut self, effects: Vec<Effect>, operator: Option<&Operator>, now: Now) {
        let (mut looks, mut ended) = (false, false);
        for effect in effects {
            match effect {
                Effect::Note {
                    event,
                    position,
                    host,
                    reason,
                } => {
                    let subject = host.map_or_else(|| "fleet".to_owned(), |host| host.to_string());
                    let about = position.map(tracing::field::display);
                    if event.is_alarming() {
                        tracing::warn!(position = about, subject, %event, "{reason}");
                    } else {
                        tracing::info!(position = about, subject, %event, "{reason}");
                    }
                    ended |= event.ends_a_rollout();
                    let mut detail = json!({ "reason": reason });
                    let mut draft = match operator {
                        Some(operator) => {
                            detail["login_uid"] = json!(operator.login_uid);
                            Draft::new(event, operator, subject)
                        }
                        None => Draft::new(event, "master", subject),
                    };
                    (draft.position, draft.detail) = (position, detail);
                    self.write(Entry::line(draft));
                }
                // What takes it back must come through.
                Effect::Withdrawn { .. } => self.forced.clear(),
                Effect::Look => looks = true,
            }
        }
        let rollout = self.fleet.rollout();
        if *rollout != self.kept {
            if rollout.owed() != self.kept.owed() {
                self.tried = None;
            }
            let mut files = Vec::new();
            if rollout.withdrawn() != self.kept.withdrawn() {
                files.push((FileName::Withdrawn, Some(json_of(rollout.withdrawn()))));
            }
            files.push((FileName::Rollout, Some(json_of(rollout))));
            self.kept = rollout.clone();
            self.write(Entry { draft: None, files });
        }
        if ended {
            let last = self.checkpointed.map(|last| last + CHECKPOINTS_MIN);
            let earliest = now.at.max(last.unwrap_or(now.at));
            self.checkpoint_at = self.checkpoint_at.min(earliest);
        }
        if looks {
            self.actions.push(Action::Publish);
        }
        let tried = self.tried.is_some_and(|tried| now.at < tried + TRY_AGAIN);
        if let Some(owed) = self.kept.owed().filter(|_| !tried) {
            self.tried = Some(now.at);
            let owed = owed.clone();
            self.held
                .retain(|(_, held)| !matches!(held, Held::RollBack(_)));
            self.hold(Held::RollBack(owed));
        }
    }

    // What the publisher says.

    /// A generation was published. `supersede`: it takes the place of what is on its way.
    pub fn published(&mut self, manifest: &Arc<Verified<Manifest>>, supersede: bool, now: Now) {
        let effects = self.fleet.published(manifest, supersede, now.clock);
        self.carry_out(effects, None, now);
        self.look_soon();
    }

    /// The rollback that was owed was published.
    pub fn went_back(&mut self, manifest: &Arc<Verified<Manifest>>, now: Now) {
        let effects = self.fleet.went_back(manifest);
        self.carry_out(effects, None, now);
        self.look_soon();
    }

    /// The fleet is past what was current, which is not to be offered any more; the next publication
    /// is.
    pub fn passed(&mut self, now: Now) {
        self.fleet.passed();
        self.carry_out(Vec::new(), None, now);
        self.look_soon();
    }

    // What operators order.

    /// Carries out an order about the rollout. `newest`: the newest generation that was published,
    /// where nothing newer is about to be; it goes through the fleet, if it is not known how far it
    /// came.
    pub fn order(
        &mut self,
        order: Order,
        newest: Option<&Arc<Verified<Manifest>>>,
        operator: &Operator,
        now: Now,
    ) -> Result<(), OrderError> {
        let order = match order {
            Order::Plain(order) => order,
            Order::RollBack(to, reason) => {
                rollout::Order::RollBack(self.fleet.remember(&to), reason)
            }
            Order::Pin(group, to, reason) => {
                rollout::Order::Pin(group, Some(self.fleet.remember(&to)), reason)
            }
        };
        let mut effects = self.fleet.order(order, now.clock)?;
        if let Some(newest) = newest.filter(|_| effects.contains(&Effect::Look)) {
            effects.extend(self.fleet.published(newest, false, now.clock));
        }
        self.carry_out(effects, Some(operator), now);
        self.look(now);
        self.look_soon();
        Ok(())
    }

    /// Drives these agents to a generation, whatever they say they have. Nothing comes of it if it
    /// is not current any more.
    pub fn force(
        &mut self,
        what: &Forcing,
        agents: Vec<AgentName>,
        full: bool,
        now: Now,
    ) -> Option<Forced> {
        let manifest = match what {
            Forcing::Current(position) => {
                let newest = self.fleet.newest();
                newest.filter(|it| it.position() == *position)?.clone()
            }
            Forcing::TakenBack(manifest) => manifest.clone(),
        };
        let mut forced = Forced::default();
        let manner = Manner { rehash: true, full };
        for name in agents {
            let pinned = self.fleet.pinned(&name);
            let manifest = pinned.unwrap_or(&manifest).clone();
            if let Some(at) = self.fleet.past(&name, &manifest) {
                forced.past.push((name, at));
                continue;
            }
            let Some(id) = self.fleet.link_of(&name) else {
                forced.offline.push(name);
                continue;
            };
            if let Some(exceeded) = self.budgets.renew(&name) {
                self.summarise(&name, exceeded);
            }
            let offer = self.offer(&name, id, manifest.clone(), manner, now);
            let order = Ordered {
                manner,
                manifest,
                taken_back: matches!(what, Forcing::TakenBack(_)),
            };
            self.forced.insert(name.clone(), order);
            forced.offers.push((name, offer));
        }
        self.look_soon();
        Some(forced)
    }

    /// A newer revocation list is in force.
    pub fn revoked(&mut self, list: RevocationList) {
        let revoked = self.fleet.revoked(&list);
        // First of all: what is written may have to wait for the disk.
        for id in revoked.iter().filter_map(|(_, link)| *link) {
            self.actions.push(Action::Close(id, Closing::Revoked));
        }
        for (name, _) in revoked {
            self.forced.remove(&name);
            let detail = json!({ "list": list.version });
            let draft = Draft::new(AuditEvent::Revoked, "master", &name);
            self.unkept.remove(&name);
            self.write(Entry {
                draft: Some(Draft { detail, ..draft }),
                files: vec![(FileName::Agent(name), None)],
            });
        }
        self.revoked = Some(list);
        self.look_soon();
    }

    // What agents say.

    /// An agent's certificate was checked. Returns the name of its connection.
    pub fn connected(&mut self, newcomer: Newcomer, now: Now) -> Result<LinkId, Unwanted> {
        let Newcomer {
            name,
            groups,
            address,
            serial,
            certificate_ends,
            fingerprint,
        } = newcomer;
        let list = self.revoked.as_ref().map(|list| &list.revoked);
        let revoked = list.into_iter().flatten().find(|it| it.serial == serial);
        if let Some(revoked) = revoked {
            let (name, serial) = (revoked.name.clone(), revoked.serial.clone());
            return Err(Unwanted::Revoked { name, serial });
        }
        let known = self.fleet.record(&name).is_some();
        if !known && self.fleet.names().len() >= self.bounds.agents {
            return Err(Unwanted::Full(self.bounds.agents));
        }
        self.links_made += 1;
        let id = LinkId(self.links_made);
        let link = Link::new(id, now.clock, address, serial, certificate_ends);
        let Arrival {
            new,
            changed,
            replaced,
            twins,
            is_new_certificate,
        } = self.fleet.connected(&name, groups, fingerprint, link);
        if let Some(old) = replaced {
            self.actions.push(Action::Close(old, Closing::Replaced));
        }
        if new {
            tracing::info!(agent = %name, %address, "enrolled");
            let detail = json!({ "address": address.to_string(), "certificate": fingerprint });
            self.note(AuditEvent::Enrolled, &name, None, None, detail);
        } else if is_new_certificate {
            tracing::info!(agent = %name, %address, certificate = %fingerprint, "new certificate of a known agent");
            let detail = json!({ "address": address.to_string(), "certificate": fingerprint });
            let draft = Draft::new(AuditEvent::Certificate, by(&name), &name);
            // In one entry: the record that knows the certificate follows the line.
            self.write(Entry {
                draft: Some(Draft { detail, ..draft }),
                files: self.record(&name),
            });
        }
        if let Some(twins) = twins {
            self.report_twins(&name, &twins);
        }
        tracing::debug!(agent = %name, %address, "connected");
        self.actions.push(Action::Tell(id, Message::Welcome));
        if changed {
            self.keep(&name);
        }
        self.look_soon();
        Ok(id)
    }

    /// A connection that a newer one replaced still answers: two hosts use the name.
    pub fn both_answer(&mut self, name: &AgentName, old: SocketAddr, now: Now) {
        if let Some(twins) = self.fleet.both_answer(name, old, now.clock) {
            self.report_twins(name, &twins);
        }
    }

    fn report_twins(&mut self, name: &AgentName, twins: &Twins) {
        let addresses = twins.addresses.map(|address| address.to_string());
        tracing::error!(agent = %name, ?addresses, "two hosts use one name");
        let detail = json!({
            "reason": "two hosts use this name", "addresses": addresses, "agent": name,
        });
        let draft = Draft::new(AuditEvent::Alarm, "master", name);
        self.write(Entry::line(Draft { detail, ..draft }));
    }

    /// A file of an agent's offer cannot be sent, for this reason, or can be sent again.
    pub fn unsent(&mut self, name: &AgentName, id: LinkId, offer: OfferId, reason: Option<String>) {
        if self.fleet.offer(name) == Some(offer) {
            self.fleet.unsent(name, id, reason);
        }
    }

    /// A connection ended.
    pub fn disconnected(&mut self, name: &AgentName, id: LinkId, now: Now) {
        if self.fleet.disconnected(name, id, now.clock) {
            self.keep(name); // a start waits for the agents that were connected
        }
        self.look_soon();
    }

    /// An agent said Hello.
    pub fn hello(&mut self, name: &AgentName, id: LinkId, hello: Hello, now: Now) {
        let Hello {
            accepts,
            clamd,
            foreign,
            installed,
            outcome,
            ..
        } = hello;
        let installed = installed.as_ref();
        if self.fleet.first_wave_waits() {
            self.look(now); // else it would be offered the generation before first
        }
        let Some(news) = self.fleet.hello(name, id, accepts, clamd, foreign) else {
            return; // replaced meanwhile
        };
        self.look_soon();
        if news {
            self.keep(name);
        }
        if let Some(installed) = installed {
            self.actions.push(Action::Ahead(installed.clone()));
        }
        let known = installed.and_then(|installed| self.fleet.known(installed));
        let known = known.filter(|known| self.fleet.has_forgotten(name, known));
        if let Some(forgotten) = known.cloned() {
            self.catch_up(name, &forgotten, now);
        }
        let forced = self.forced.get(name).cloned();
        let manner = forced.as_ref().map(|order| order.manner);
        let wanted = self.fleet.wanted(name, now.clock).cloned();
        let ordered = forced.map(|order| order.manifest).filter(|ordered| {
            let instead_of = wanted.as_ref().unwrap_or(ordered);
            self.is_forced(name, instead_of)
        });
        let Some(manifest) = ordered.or(wanted) else {
            return self.vouch_to(name, id, now);
        };
        let has_it = installed.is_some_and(|it| it.payload == manifest.envelope().payload);
        // Also a host that is there already hears of the offer when the master lacks its receipt
        // (a restored master): the answer is a receipt and costs nothing.
        let deadline = self.fleet.rules().deadline;
        let standing = self.fleet.standing(name, now.clock, deadline);
        if has_it && standing == Standing::Conformant && manner.is_none() {
            let says_live = outcome == Some(Outcome::Live);
            self.fleet
                .has_it(name, id, manifest.payload_sha256(), says_live);
            self.vouch_to(name, id, now);
        } else if self.spend_on_offer(name, now) {
            self.offer(name, id, manifest, manner.unwrap_or_default(), now);
        }
    }

    /// Begins the generation that waits for its turn, if the fleet has it already: the state of this
    /// master is a copy that was made in the middle of a rollout, and agents decline what is on its way.
    fn catch_up(&mut self, name: &AgentName, known: &Verified<Manifest>, now: Now) {
        let waits = self.fleet.is_overtaken(known.position());
        self.fleet.took(name, known, now.clock);
        if !waits {
            return;
        }
        let position = known.position();
        tracing::warn!(agent = %name, %position, "an agent has the generation that waits: the master was restored from a copy");
        let draft = Draft::new(AuditEvent::Restored, "master", "fleet");
        self.write(Entry::line(Draft {
            position: Some(position),
            detail: json!({ "reported_by": name }),
            ..draft
        }));
        self.overtaken = Some(position);
        self.look(now);
    }

    /// Begins the waiting generation if the fleet has it already. Not during an operator's pause: it is
    /// tried again with each look.
    fn begin_overtaken(&mut self, now: Now) {
        let waiting = self.fleet.rollout().waiting().map(|it| it.position);
        if self.overtaken.is_none() || waiting != self.overtaken {
            self.overtaken = None;
            return;
        }
        if let Ok(effects) = self.fleet.order(rollout::Order::Supersede, now.clock) {
            self.overtaken = None;
            self.carry_out(effects, None, now);
        }
    }

    /// An agent gave a sign of progress with an offer.
    pub fn progress(&mut self, name: &AgentName, id: LinkId, progress: Progress, now: Now) {
        let Progress {
            offer,
            phase,
            until,
            sent,
        } = progress;
        if self.fleet.offer(name) == Some(offer) {
            let now = now.clock;
            self.fleet.progress(name, id, phase, until, sent, now);
            self.look_soon();
        }
    }

    /// An agent lacks files of what it has. `kept`: a generation whose files are still there.
    pub fn reoffer(
        &mut self,
        name: &AgentName,
        id: LinkId,
        kept: impl Fn(Position) -> Option<Arc<Verified<Manifest>>>,
        now: Now,
    ) {
        let installed = self.fleet.record(name).and_then(|it| it.installed.as_ref());
        if let Some(manifest) = installed.and_then(|installed| kept(installed.position)) {
            self.fleet.remember(&manifest); // its receipt may have come after that was forgotten
        }
        let is_kept = |position| kept(position).is_some();
        if let Some(manifest) = self.fleet.mending(name, is_kept, now.clock).cloned()
            && self.fleet.link_of(name) == Some(id)
            && self.spend_on_offer(name, now)
        {
            tracing::info!(agent = %name, "lacks files, offered anew");
            self.offer(name, id, manifest, Manner::default(), now);
        }
        self.look_soon();
    }

    /// An agent does not take an offer. Said twice of one it is nothing new, and of one that another
    /// has taken the place of it is no answer.
    pub fn declined(&mut self, name: &AgentName, id: LinkId, decline: Decline, now: Now) {
        let Decline {
            offer,
            message,
            other_master,
        } = decline;
        if self.fleet.offer(name) != Some(offer) {
            return;
        }
        let fits = self.spend(name, message.len(), now);
        let other = other_master.clone();
        let declined = self
            .fleet
            .declined(name, id, message.clone(), other, now.clock);
        if let Some(position) = declined {
            self.forced.remove(name);
            tracing::warn!(agent = %name, said = message, "an agent does not take its offer");
            let mut detail = json!({ "said": message });
            if let Some(other) = other_master {
                tracing::error!(agent = %name, publisher = other.publisher.0, position = %other.position, "an agent follows another master");
                detail["other_master"] = json!(other);
            }
            if fits {
                self.note(AuditEvent::Declined, name, Some(position), None, detail);
            }
        }
        self.look_soon();
    }

    /// An agent sent a receipt whose signature was checked.
    pub fn receipt(&mut self, id: LinkId, receipt: &Verified<Receipt>, now: Now) {
        let (name, position) = (&receipt.agent, receipt.position());
        if self.fleet.link_of(name) != Some(id) {
            return; // it comes again on the new connection
        }
        self.look_soon();
        let acknowledgement = Held::Acknowledge(id, receipt.seq);
        let bytes = lines_bytes(receipt);
        if !self.fleet.knows(receipt) && !self.spend(name, bytes, now) {
            return; // unacknowledged, it comes again
        }
        if !self.fleet.receipt(receipt, now.clock) {
            // Known is not yet on disk: the entry of its first arrival may still wait. Of an agent that
            // repeats itself while the disk takes nothing not every word is kept.
            if (self.held.len() as u64) < self.bounds.backlog.saturating_mul(2) {
                self.hold(acknowledgement);
            }
            return;
        }
        if self.fleet.offer(name).is_none() {
            self.forced.remove(name);
        }
        let ours = self.fleet.is_open(&receipt.manifest_sha256);
        if !self.accepted && ours && matches!(receipt.outcome, Outcome::Live | Outcome::Installed) {
            self.accepted = true;
            let accepted = Action::Accepted(receipt.manifest_sha256);
            self.actions.push(accepted);
        }
        let outcome = receipt.outcome.to_string();
        tracing::info!(agent = %name, %position, outcome, error = receipt.error, "receipt");
        self.drift(receipt); // before the acknowledgement
        let mut detail = json!({ "receipt": receipt.envelope() });
        if !receipt.adopted.is_empty() {
            detail["adopted"] = json!(receipt.adopted);
        }
        let draft = Draft {
            position: Some(position),
            outcome: Some(outcome),
            detail,
            ..Draft::new(AuditEvent::Receipt, by(name), name)
        };
        self.write(Entry {
            draft: Some(draft),
            files: self.record(name),
        });
        self.hold(acknowledgement);
        if let Some(manifest) = self.fleet.doubted(name, now.clock).cloned()
            && self.spend_on_offer(name, now)
        {
            self.offer(name, id, manifest, Manner::default(), now);
        }
        let running = self.fleet.rollout().running();
        if receipt.outcome == Outcome::Refused
            && running.is_some_and(|run| run.target.position == position)
            && !self.fleet.is_weighed(name)
        {
            self.look(now); // before it is offered to anybody else
        }
    }

    /// Writes what a receipt says of changed files into the audit log.
    fn drift(&mut self, receipt: &Receipt) {
        let name = &receipt.agent;
        for (event, mended) in [(AuditEvent::Drift, false), (AuditEvent::Repair, true)] {
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
            self.note(event, name, Some(receipt.position()), outcome, detail);
        }
    }

    // What agents are told.

    /// Tells all agents anew that what they are wanted at is current.
    pub fn renew(&mut self, now: Now) {
        let greeted = self.fleet.greeted();
        let greeted: Vec<_> = greeted.map(|(name, id)| (name.clone(), id)).collect();
        for (name, id) in greeted {
            self.vouch_to(&name, id, now);
        }
    }

    /// Tells one agent that what it is wanted at is current.
    fn vouch_to(&mut self, name: &AgentName, id: LinkId, now: Now) {
        if let Some(manifest) = self.fleet.vouched(name, now.clock) {
            let fresh = Message::Fresh(manifest.clone());
            self.actions.push(Action::Tell(id, fresh));
        }
    }

    /// Offers the generation on one connection, once the audit log has it.
    fn offer(
        &mut self,
        name: &AgentName,
        id: LinkId,
        manifest: Arc<Verified<Manifest>>,
        manner: Manner,
        now: Now,
    ) -> OfferId {
        self.offers_made += 1;
        let (offer, position) = (OfferId(self.offers_made), manifest.position());
        // Only an operator's word brings out what is withdrawn already.
        let despite = self.fleet.rollout().is_taken_back(position);
        self.fleet.offered(name, id, offer, &manifest, now.clock);
        if manner.rehash {
            self.fleet.forced(name, id);
        }
        let draft = Draft {
            position: Some(position),
            detail: json!({ "forced": manner.rehash }),
            ..Draft::new(AuditEvent::Offer, "master", name)
        };
        self.write(Entry {
            draft: Some(draft),
            files: self.record(name), // a start finds who was there
        });
        self.hold(Held::Offer {
            name: name.clone(),
            id,
            offer,
            manifest,
            manner,
            despite,
        });
        offer
    }

    // What is written.

    /// Keeps what is known of an agent on disk: later, if too much waits for the disk.
    fn keep(&mut self, name: &AgentName) {
        if self.is_busy() {
            self.unkept.insert(name.clone());
            return;
        }
        let files = self.record(name);
        self.write(Entry { draft: None, files });
    }

    /// The file that says what is known of an agent.
    fn record(&self, name: &AgentName) -> Vec<(FileName, Option<Vec<u8>>)> {
        let record = self.fleet.record(name);
        let file = |record| (FileName::Agent(name.clone()), Some(json_of(record)));
        record.map(file).into_iter().collect()
    }

    /// Writes what an agent did into the audit log.
    fn note(
        &mut self,
        event: AuditEvent,
        name: &AgentName,
        position: Option<Position>,
        outcome: Option<String>,
        detail: Value,
    ) {
        self.write(Entry::line(Draft {
            position,
            outcome,
            detail,
            ..Draft::new(event, by(name), name)
        }));
    }

    fn write(&mut self, entry: Entry) {
        self.written += 1;
        self.actions.push(Action::Write(entry));
    }

    /// Does this when all that was written so far is on disk.
    fn hold(&mut self, held: Held) {
        match self.written == self.durable {
            true => self.release(held),
            false => self.held.push_back((self.written, held)),
        }
    }
}

impl Closing {
    /// The code that the connection is closed with, and why, in words.
    pub fn code(self) -> (u32, &'static str) {
        match self {
            Self::Replaced => (wire::close::REPLACED, "a newer connection"),
            Self::Revoked => (wire::close::REVOKED, "certificate revoked"),
            Self::Expired => (wire::close::EXPIRED, "certificate expired"),
            Self::NewDay => (wire::close::BUSY, "the audit budget of a new day begins"),
        }
    }
}

/// Bytes that a receipt adds to the audit log at most: its envelope in base64, and what it says of changed
/// files and of their trouble once more in a line of their own each.
fn lines_bytes(receipt: &Verified<Receipt>) -> usize {
    let payload = receipt.envelope().payload.len();
    let has = |mended| receipt.drift.iter().any(|file| file.mended == mended);
    let more = usize::from(has(false)) + usize::from(has(true));
    payload * 4 / 3 + more * (payload + LINE_BYTES as usize)
}

/// An agent, as the actor of a record.
fn by(name: &AgentName) -> String {
    format!("agent:{name}")
}

fn json_of(state: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(state).expect("our own state serialises")
}
