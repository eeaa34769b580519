//! What operators ask of the running daemon.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use clamcast_daemon::admin::{AdminError, Finish, Listener, Operator, Place, Places, Session};
use clamcast_daemon::audit::{self, Draft};
use clamcast_daemon::exit;
use clamcast_daemon::service::Occasion;
use clamcast_daemon::table::printable;
use clamcast_proto::dsse::Verified;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::{AgentName, FleetName, GroupName, Position};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Groups;
use crate::events::Filter;
use crate::fleet::{AWAY, Row};
use crate::force::{self, INTERRUPTED, Meant, News, SelectError, Selection, Work};
use crate::hub::{Event, Forcing, Hub, Order, Stopping, View};
use crate::pipeline::Pipeline;
use crate::preflight::{CERTIFICATE_ENDS_SOON, Running};
use crate::publish::{PublishError, Published, Request as PublishRequest};
use crate::recorder::Recorder;
use crate::rejections::Rejections;
use crate::report;
use crate::rollout::{Order as RolloutOrder, OrderError};
use crate::store::{RECORD_BYTES_MAX, Store};

/// Commands served at a time. A waiting `publish` is one of them.
const SESSIONS_MAX: usize = 64;

/// `force-sync`s under way at a time: each looks at the whole fleet after every change.
pub const ORDERS_MAX: usize = 16;

/// Why an order came to nothing.
const SUPERSEDED: &str =
    "another generation became current before any agent was told; order it again";

/// Failed agents that the last line of a `force-sync` names; the table above it has them all.
const NAMED_MAX: usize = 20;

/// Longest reason in bytes: a long sentence. A record of the audit log holds it as well as the state
/// of the rollout.
pub const REASON_BYTES_MAX: usize = 1000;

/// Groups that are pinned at a time. With the longest reasons, in which each byte may need six in
/// JSON, they leave half of what a record may have to the rest of the rollout's state.
const PINS_MAX: usize = 100;
const _: () = assert!(PINS_MAX * (6 * REASON_BYTES_MAX + 1000) < RECORD_BYTES_MAX as usize / 2);

/// Longest time that a `force-sync` follows its agents: a weekend.
const TIMEOUT_MAX: Duration = Duration::from_secs(72 * 3600);

/// While it waits, `publish` looks again at least this often, for silence is no event.
const LOOK: Duration = Duration::from_secs(5);

/// Time between looks whether the disk refuses an order that waits to be written.
const WRITING: Duration = Duration::from_millis(300);

/// Signatures older than this are an alarm: Talos publishes daily, so the mirror is stuck.
const SIGNATURES_OLD: SignedDuration = SignedDuration::from_hours(24);

/// Signatures older than this break the rule that auditors apply.
const SIGNATURES_AUDITED: SignedDuration = SignedDuration::from_hours(7 * 24);

/// Time between looks for new records by `audit show --follow`.
const FOLLOW: Duration = Duration::from_millis(300);

/// After a change others follow within moments. One look serves them all.
const CHANGES_SETTLE: Duration = Duration::from_millis(50);

/// Records of the audit log sent with one line of progress.
const AUDIT_CHUNK: usize = 500;

/// A command.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Request {
    /// Capture and publish now.
    Publish {
        /// Return only when the connected agents have settled.
        wait: bool,
        /// Publish also what is held, for this reason.
        accept: Option<String>,
        /// In the place of what is on its way.
        supersede: bool,
    },
    /// The fleet in numbers.
    Status,
    /// The table of agents.
    Agents,
    /// The generations that are kept.
    Generations,
    /// Drive these agents to the current generation, re-hashing what they have.
    ForceSync {
        /// Which ones.
        selection: Selection,
        /// Without a delta.
        full: bool,
        /// The generation that the operator means; refused if it is not the current one.
        generation: Option<Meant>,
        /// Why, for the audit log.
        accept: Option<String>,
        /// Return when the agents are done.
        wait: bool,
        /// Seconds after which an agent that is not done has failed.
        timeout: u64,
    },
    /// Where the rollout is.
    RolloutStatus {
        /// Seconds to wait until it is complete or halted.
        timeout: Option<u64>,
    },
    /// Begin no further wave and offer nothing more.
    RolloutPause {
        /// Why.
        reason: Option<String>,
    },
    /// Go on.
    RolloutResume {
        /// Why.
        reason: Option<String>,
    },
    /// End the running generation, as a halt does.
    RolloutAbort {
        /// Why.
        reason: Option<String>,
    },
    /// Begin all waves that are still to come.
    RolloutPromote {
        /// Why.
        reason: Option<String>,
    },
    /// Publish the databases of a generation again.
    Rollback {
        /// Which one.
        generation: Meant,
        /// Why.
        reason: Option<String>,
    },
    /// Keep a group at a generation, or where it is.
    Pin {
        /// The group.
        group: GroupName,
        /// The generation.
        generation: Option<Meant>,
        /// Why.
        reason: Option<String>,
    },
    /// Let a group go with everybody else again.
    Unpin {
        /// The group.
        group: GroupName,
        /// Why.
        reason: Option<String>,
    },
    /// Records of the audit log.
    AuditShow {
        /// Which ones.
        filter: Filter,
        /// Go on with those that are still to come.
        follow: bool,
    },
}

impl Request {
    /// The command, as it is typed.
    fn word(&self) -> &'static str {
        match self {
            Self::Publish { .. } => "publish",
            Self::Status => "status",
            Self::Agents => "agents",
            Self::Generations => "generations",
            Self::ForceSync { .. } => "force-sync",
            Self::RolloutStatus { .. } => "rollout status",
            Self::RolloutPause { .. } => "rollout pause",
            Self::RolloutResume { .. } => "rollout resume",
            Self::RolloutAbort { .. } => "rollout abort",
            Self::RolloutPromote { .. } => "rollout promote",
            Self::Rollback { .. } => "rollback",
            Self::Pin { .. } => "pin",
            Self::Unpin { .. } => "unpin",
            Self::AuditShow { .. } => "audit show",
        }
    }

    /// Why, in the operator's words.
    fn reason(&self) -> Option<&str> {
        match self {
            Self::Publish { accept: reason, .. }
            | Self::ForceSync { accept: reason, .. }
            | Self::RolloutPause { reason }
            | Self::RolloutAbort { reason }
            | Self::RolloutPromote { reason }
            | Self::Rollback { reason, .. }
            | Self::RolloutResume { reason }
            | Self::Pin { reason, .. }
            | Self::Unpin { reason, .. } => reason.as_deref(),
            Self::Status
            | Self::Agents
            | Self::Generations
            | Self::RolloutStatus { .. }
            | Self::AuditShow { .. } => None,
        }
    }
}

/// What commands are answered from.
#[derive(Clone, Debug)]
pub struct Commands {
    /// The fleet's name.
    pub fleet: FleetName,
    /// The fleet.
    pub hub: Hub,
    /// Publishes.
    pub pipeline: Pipeline,
    /// What was published.
    pub store: Arc<Store>,
    /// Groups of the configuration.
    pub groups: Groups,
    /// Says whether the log can be written.
    pub recorder: Recorder,
    /// The audit log's directory.
    pub audit: PathBuf,
    /// Whether it ends, and with which configuration it runs.
    pub life: Life,
    /// Ends what is under way.
    pub stop: CancellationToken,
    /// What was ordered.
    pub orders: Orders,
    /// Notes the commands of those who may give none.
    pub denials: Arc<Rejections>,
    /// When the master's own certificate ends.
    pub certificate_ends: Timestamp,
    /// Where this daemon is.
    pub daemon: Running,
}

/// An order that is not carried out, or not known to be.
enum Undone {
    /// It cannot be.
    Refused(OrderError),
    /// The daemon ends, or the disk refuses it.
    Failed(Finish),
}

impl From<Finish> for Undone {
    fn from(finish: Finish) -> Self {
        Self::Failed(finish)
    }
}

impl From<Undone> for Finish {
    fn from(undone: Undone) -> Self {
        match undone {
            Undone::Refused(error) => Self::because(exit::REFUSED, error),
            Undone::Failed(finish) => finish,
        }
    }
}

/// The `force-sync`s under way, whether anybody waits for them or not.
#[derive(Clone, Debug)]
pub struct Orders {
    tasks: TaskTracker,
    places: Places,
}

impl Default for Orders {
    fn default() -> Self {
        Self {
            tasks: TaskTracker::new(),
            places: Places::new(ORDERS_MAX),
        }
    }
}

/// What the operators of a running daemon have to know of its life.
#[derive(Clone, Debug, Default)]
pub struct Life(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    unused: Mutex<Option<String>>,
    revocations: Mutex<Option<String>>,
    ending: OnceLock<Occasion>,
}

impl Life {
    /// The configuration on disk is not in use, for this reason.
    pub fn configuration_is_unused(&self, reason: String) {
        *self.0.unused.lock().expect("nothing panics with it") = Some(reason);
    }

    /// Why the revocation list on disk does not count, if it does not.
    pub fn revocations_are(&self, alarm: Option<&str>) {
        *self.0.revocations.lock().expect("nothing panics with it") = alarm.map(str::to_owned);
    }

    fn revocations(&self) -> Option<String> {
        self.0
            .revocations
            .lock()
            .expect("nothing panics with it")
            .clone()
    }

    /// Commands that are still served end soon, for this reason.
    pub fn ends(&self, occasion: Occasion) {
        let _ = self.0.ending.set(occasion); // it ends once
    }

    fn unused(&self) -> Option<String> {
        let unused = self.0.unused.lock().expect("nothing panics with it");
        let reason = unused.as_ref()?;
        Some(format!("configuration on disk is not in use: {reason}"))
    }

    fn ending(&self) -> Occasion {
        self.0.ending.get().copied().unwrap_or(Occasion::Exit)
    }

    /// What ended a command that was under way.
    fn word(&self) -> &'static str {
        match self.ending() {
            Occasion::Exit => "the daemon stopped",
            Occasion::Reload => "the daemon read its configuration again",
        }
    }
}

/// Serves operators until the daemon stops, and lets the sessions and orders that saw it end. Returns
/// the socket.
pub async fn serve(mut listener: Listener, commands: Commands) -> Listener {
    let (stop, orders) = (commands.stop.clone(), commands.orders.tasks.clone());
    let answer = move |session| {
        let commands = commands.clone();
        async move { commands.answer(session).await }
    };
    let mut sessions = listener.serve(SESSIONS_MAX, &stop, answer).await;
    while sessions.join_next().await.is_some() {}
    orders.close();
    orders.wait().await;
    listener
}

impl Commands {
    async fn answer(&self, mut session: Session) -> Result<(), AdminError> {
        if !session.operator.may_act {
            let request = session.request::<Request>();
            let command = request.as_ref().map_or("unknown", Request::word);
            self.denials.denied(&session.operator, command).await;
            let who = session.operator.name.clone();
            let message = format!(
                "user `{who}` may not command this master; it takes root or a member of its admin_group"
            );
            return session
                .finish(Finish::because(exit::REFUSED, message))
                .await;
        }
        let request: Request = match session.request() {
            Ok(request) => request,
            Err(error) => {
                let message = crate::chain(&error);
                return session.finish(Finish::because(exit::USAGE, message)).await;
            }
        };
        let stopping = |_: Stopping| self.life.ending().finish();
        if request
            .reason()
            .is_some_and(|it| it.len() > REASON_BYTES_MAX)
        {
            let message = format!("a reason may have {REASON_BYTES_MAX} bytes");
            return session.finish(Finish::because(exit::USAGE, message)).await;
        }
        let finish = match request.clone() {
            // Nothing that changes anything begins when the end has begun.
            Request::Publish { .. } | Request::ForceSync { .. } if self.stop.is_cancelled() => {
                stopping(Stopping)
            }
            Request::Publish {
                wait,
                accept,
                supersede,
            } => self.publish(&mut session, wait, accept, supersede).await?,
            Request::Status => self.status().await.unwrap_or_else(stopping),
            Request::Agents => self
                .hub
                .view()
                .await
                .map_or_else(stopping, |view| Finish::done(view.rows)),
            Request::Generations => self.generations().await.unwrap_or_else(stopping),
            Request::ForceSync { .. } => return self.force_sync(session, request).await,
            Request::RolloutStatus { timeout } => {
                self.rollout_status(&mut session, timeout.map(Duration::from_secs))
                    .await?
            }
            Request::RolloutPause { reason } => {
                let order = Order::Plain(RolloutOrder::Pause(said(reason)));
                self.order(&session, order).await
            }
            Request::RolloutResume { reason } => {
                let order = Order::Plain(RolloutOrder::Resume(reason));
                self.order(&session, order).await
            }
            Request::RolloutAbort { reason } => {
                let order = Order::Plain(RolloutOrder::Abort(said(reason)));
                self.order(&session, order).await
            }
            Request::RolloutPromote { reason } => {
                let order = Order::Plain(RolloutOrder::Promote(said(reason)));
                self.order(&session, order).await
            }
            Request::Rollback { generation, reason } => match self.good(generation) {
                Ok(to) => {
                    let order = Order::RollBack(to, said(reason));
                    self.order(&session, order).await
                }
                Err(finish) => finish,
            },
            Request::Pin {
                group,
                generation,
                reason,
            } => self.pin(&session, group, generation, reason).await,
            Request::Unpin { group, reason } => {
                let order = Order::Plain(RolloutOrder::Unpin(group, reason));
                self.order(&session, order).await
            }
            Request::AuditShow { filter, follow } => {
                self.audit_show(&mut session, filter, follow).await?
            }
        };
        session.finish(finish).await
    }

    async fn publish(
        &self,
        session: &mut Session,
        wait: bool,
        accept: Option<String>,
        supersede: bool,
    ) -> Result<Finish, AdminError> {
        let actor = session.operator.to_string();
        tracing::info!(
            operator = actor,
            login_uid = session.operator.login_uid,
            wait,
            accept,
            supersede,
            "publish"
        );
        let published = match self
            .pipeline
            .publish(PublishRequest { accept, supersede }, &actor)
            .await
        {
            Ok(published) => published,
            Err(PublishError::Stopping) => return Ok(self.life.ending().finish()),
            Err(error) => {
                return Ok(Finish::because(exit::FAILED, crate::chain(&error)));
            }
        };
        let (word, reason) = match published {
            Published::New { .. } => ("new", None),
            Published::Unchanged if supersede => {
                let order = Order::Plain(RolloutOrder::Supersede);
                match self.carry_out(session, order).await {
                    Ok(()) => ("begun", None),
                    Err(Undone::Refused(OrderError::NothingWaits)) => ("unchanged", None),
                    Err(undone) => return Ok(undone.into()),
                }
            }
            Published::Unchanged => ("unchanged", None),
            Published::Busy { reason } => {
                let message = format!("{reason}; the daemon publishes when it is quiet");
                return Ok(Finish::because(exit::FAILED, message));
            }
            Published::Held(refusal) => ("held", Some(refusal.reason)),
            Published::Refused(refusal) => ("refused", Some(refusal.reason)),
        };
        let mut result = json!({ "outcome": word });
        let fields = result.as_object_mut().expect("made as one");
        let newest = self.store.current();
        if let (Some(manifest), None) = (&newest, &reason) {
            describe(fields, manifest);
        }
        if let Some(reason) = reason {
            fields.insert("reason".to_owned(), reason.clone().into());
            let Ok(view) = self.hub.view().await else {
                return Ok(self.life.ending().finish());
            };
            if let Some(manifest) = self.complete(&view) {
                describe(fields, &manifest);
            }
            let by_hand = view.rollout.held().is_some();
            let next = match word {
                "held" if by_hand => "`rollout resume` publishes again",
                "held" => "look at the mirror; if it is right, `publish --accept REASON`",
                _ => "mend the mirror; the last good generation stays",
            };
            let message = Some(format!("{word}: {reason}; {next}"));
            return Ok(Finish {
                exit: exit::REFUSED,
                result,
                message,
            });
        }
        if !wait {
            return Ok(Finish::done(result));
        }
        // It is published; whoever waits is told so also when the waiting ends early.
        let left = |result| Finish {
            exit: exit::NOT_CONFORMANT,
            result,
            message: Some(format!(
                "{} before every agent had settled; they go on, `agents` shows how far they are",
                self.life.word()
            )),
        };
        let position = newest.map(|manifest| manifest.position());
        let mut hub = self.hub.clone();
        loop {
            let Ok(view) = self.hub.view().await else {
                return Ok(left(result));
            };
            session.progress(&progress(&view)).await?;
            if !view.is_moving() {
                return Ok(settled(result, position, &view));
            }
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return Ok(left(result)),
                () = session.gone() => return Ok(Finish::done(result)), // nobody hears it
                changed = hub.changed() => match changed {
                    Ok(()) => sleep(CHANGES_SETTLE).await,
                    Err(Stopping) => return Ok(left(result)),
                },
                () = sleep(LOOK) => {}
            }
        }
    }

    /// Orders something about the rollout, and answers with where it is then: when the disk has it.
    async fn order(&self, session: &Session, order: Order) -> Finish {
        if let Err(undone) = self.carry_out(session, order).await {
            return undone.into();
        }
        let view = self.hub.view().await;
        view.map_or_else(
            |Stopping| self.life.ending().finish(),
            |view| Finish::done(report::rollout(&view)),
        )
    }

    /// Has an order about the rollout carried out, and returns when the disk has it.
    async fn carry_out(&self, session: &Session, order: Order) -> Result<(), Undone> {
        if self.stop.is_cancelled() {
            return Err(self.life.ending().finish().into());
        }
        self.can_write()?;
        let (reply, answer) = oneshot::channel();
        let event = Event::Order {
            order,
            operator: session.operator.clone(),
            reply,
        };
        let told = self.hub.tell(event).await;
        let (Ok(()), Ok(answer)) = (told, answer.await) else {
            return Err(self.life.ending().finish().into());
        };
        let mut written = answer.map_err(Undone::Refused)?;
        loop {
            match timeout(WRITING, &mut written).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(_)) => return Err(self.life.ending().finish().into()), // the disk refused to the end
                Err(_) => {}
            }
            if let Some(alarm) = self.recorder.alarm() {
                let message = format!(
                    "{alarm}; the order is carried out, but forgotten if the daemon ends before it \
                     is written"
                );
                return Err(Finish::because(exit::FAILED, message).into());
            }
        }
    }

    /// No order is taken that would be in nobody's log.
    fn can_write(&self) -> Result<(), Finish> {
        let Some(alarm) = self.recorder.alarm() else {
            return Ok(());
        };
        let message = format!("no order is taken while it cannot be written down: {alarm}");
        Err(Finish::because(exit::FAILED, message))
    }

    /// What the fleet is at.
    fn complete(&self, view: &View) -> Option<Arc<Verified<Manifest>>> {
        let target = view.rollout.complete()?;
        self.store.manifest(target.position)
    }

    /// Keeps a group at a generation, or where it is.
    async fn pin(
        &self,
        session: &Session,
        group: GroupName,
        generation: Option<Meant>,
        reason: Option<String>,
    ) -> Finish {
        let Ok(view) = self.hub.view().await else {
            return self.life.ending().finish();
        };
        let has_agents = view.rows.iter().any(|row| row.groups.contains(&group));
        if !has_agents && !self.groups.has(&group) {
            let error = SelectError::EmptyGroup(group);
            return Finish::because(exit::USAGE, error.to_string());
        }
        let pins = view.rollout.pins();
        if pins.len() >= PINS_MAX && !pins.contains_key(&group) {
            let message =
                format!("{PINS_MAX} groups are pinned, more cannot be; `unpin` one first");
            return Finish::because(exit::REFUSED, message);
        }
        let order = match generation.map(|generation| self.good(generation)) {
            Some(Ok(to)) => Order::Pin(group, to, reason),
            Some(Err(finish)) => return finish,
            None => Order::Plain(RolloutOrder::Pin(group, None, reason)),
        };
        self.order(session, order).await
    }

    /// The generation that an operator means, if it is still kept.
    fn kept(&self, generation: Meant) -> Result<Arc<Verified<Manifest>>, Finish> {
        let mut manifests = self.store.manifests().into_iter().rev();
        let manifest = manifests.find(|manifest| generation.is(manifest.position()));
        manifest.ok_or_else(|| {
            let message = "there is no such generation; `generations` lists those that are kept";
            Finish::because(exit::USAGE, message.to_owned())
        })
    }

    /// The same, if nobody took it back.
    fn good(&self, generation: Meant) -> Result<Arc<Verified<Manifest>>, Finish> {
        let manifest = self.kept(generation)?;
        let rejected = self.pipeline.rejected();
        let Some(rejected) = rejected.iter().find(|it| it.content == manifest.content) else {
            return Ok(manifest);
        };
        let (position, bad, outcome) = (manifest.position(), rejected.position, &rejected.outcome);
        let same = match bad == position {
            true => String::new(),
            false => format!(" has the databases of {bad}, which"),
        };
        let message = format!(
            "{position}{same} was {outcome}; `publish --accept REASON` publishes the mirror's \
             databases in spite of that, `force-sync HOST --generation {position} --accept REASON` \
             tries it on single hosts"
        );
        Err(Finish::because(exit::REFUSED, message))
    }

    async fn rollout_status(
        &self,
        session: &mut Session,
        timeout: Option<Duration>,
    ) -> Result<Finish, AdminError> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout.min(TIMEOUT_MAX));
        let mut hub = self.hub.clone();
        loop {
            let Ok(view) = self.hub.view().await else {
                return Ok(self.life.ending().finish());
            };
            let ended = match report::state(&view.rollout) {
                "halted" => Some(exit::NOT_CONFORMANT),
                "complete" => Some(exit::DONE),
                _ => None,
            };
            let awaited = report::standing(&view);
            let code = match (ended, deadline) {
                (ended, None) => ended.unwrap_or(exit::DONE),
                (Some(code), Some(_)) if awaited.is_none() => code,
                (_, Some(deadline)) if Instant::now() >= deadline => exit::NOT_CONFORMANT,
                (_, Some(deadline)) => {
                    let progress = json!({
                        "agents": view.counts, "unsettled": report::waited(&view),
                        "standing": awaited, "time": Timestamp::now(),
                    });
                    session.progress(&progress).await?;
                    tokio::select! {
                        biased;
                        () = self.stop.cancelled() => return Ok(self.life.ending().finish()),
                        () = session.gone() => return Ok(Finish::done(Value::Null)),
                        changed = hub.changed() => match changed {
                            Ok(()) => sleep(CHANGES_SETTLE).await,
                            Err(Stopping) => return Ok(self.life.ending().finish()),
                        },
                        () = sleep_until(deadline) => {}
                        () = sleep(LOOK) => {}
                    }
                    continue;
                }
            };
            let late = deadline.is_some() && (ended.is_none() || awaited.is_some());
            let message = late.then(|| {
                let awaited = awaited.unwrap_or_else(|| "nothing is published yet".to_owned());
                format!("not complete in time: {awaited}")
            });
            return Ok(Finish {
                exit: code,
                result: report::rollout(&view),
                message,
            });
        }
    }

    async fn force_sync(&self, session: Session, request: Request) -> Result<(), AdminError> {
        let Request::ForceSync {
            selection,
            full,
            generation,
            accept,
            wait,
            timeout,
        } = request
        else {
            unreachable!("called for no other")
        };
        let operator = session.operator.clone();
        if let Err(finish) = self.can_write() {
            return session.finish(finish).await;
        }
        let Some(place) = self.orders.places.take(operator.uid) else {
            let message = format!(
                "too many force-syncs are under way, at most {ORDERS_MAX} may be, and half of them one user's; wait for one to end (`audit show --event force-sync-end`)"
            );
            return session.finish(Finish::because(exit::FAILED, message)).await;
        };
        let (what, agents) = match self.forced(&selection, generation, accept.as_deref()).await {
            Ok(forced) => forced,
            Err(finish) => return session.finish(finish).await,
        };
        let timeout = Duration::from_secs(timeout).min(TIMEOUT_MAX);
        let mut order = ForcedOrder {
            id: hex::encode(rand::random::<[u8; 4]>()),
            commands: self.clone(),
            operator,
            position: what.position(),
            deadline: Instant::now() + timeout,
            work: Work::default(),
            _place: place,
        };
        let mut detail = force::named("agents", agents.iter());
        detail.insert("full".to_owned(), full.into());
        detail.insert("reason".to_owned(), json!(accept));
        detail.insert("login_uid".to_owned(), json!(order.operator.login_uid));
        order.note("force-sync", None, detail.into()).await;
        tracing::info!(operator = %order.operator, agents = agents.len(), full, "force-sync");

        let (reply, forced) = oneshot::channel();
        let event = Event::Force {
            what,
            agents,
            full,
            reply,
        };
        let told = self.hub.tell(event).await;
        let (Ok(()), Ok(forced)) = (told, forced.await) else {
            let detail = json!({ "done": 0, "reason": SUPERSEDED });
            order
                .note("force-sync-end", Some(INTERRUPTED), detail)
                .await;
            let finish = match self.stop.is_cancelled() {
                true => self.life.ending().finish(),
                false => Finish::because(exit::FAILED, SUPERSEDED),
            };
            return session.finish(finish).await;
        };
        let (work, first) = Work::new(forced.offers, forced.offline, forced.past);
        order.work = work;
        let mut listener = Some(session);
        tell(&mut listener, &first).await;
        if wait {
            self.orders.tasks.spawn(order.carry_out(listener));
            return Ok(());
        }
        let finish = order.finish("not told");
        self.orders.tasks.spawn(order.carry_out(None));
        match listener {
            Some(session) => session.finish(finish).await,
            None => Ok(()),
        }
    }

    /// The generation and the agents of a `force-sync`, or why there is nothing to do.
    async fn forced(
        &self,
        selection: &Selection,
        generation: Option<Meant>,
        accept: Option<&str>,
    ) -> Result<(Forcing, Vec<AgentName>), Finish> {
        let view = self.hub.view().await;
        let view = view.map_err(|Stopping| self.life.ending().finish())?;
        let agents = selection
            .resolve(&view.rows)
            .map_err(|error| Finish::because(exit::USAGE, crate::chain(&error)))?;
        let what = match (generation, view.newest) {
            (Some(meant), Some(current)) if meant.is(current) => Forcing::Current(current),
            (None, Some(current)) => Forcing::Current(current),
            (Some(meant), _) => {
                let manifest = self.kept(meant)?;
                self.may_be_forced(&manifest, selection, accept)?;
                Forcing::TakenBack(manifest)
            }
            (None, None) => {
                let message = "no generation is published yet; `publish` makes one";
                return Err(Finish::because(exit::FAILED, message));
            }
        };
        Ok((what, Vec::from_iter(agents)))
    }

    /// A generation that is not current is forced only if it was taken back, by name, and with a
    /// reason.
    fn may_be_forced(
        &self,
        manifest: &Manifest,
        selection: &Selection,
        accept: Option<&str>,
    ) -> Result<(), Finish> {
        let position = manifest.position();
        let rejected = self.pipeline.rejected();
        let Some(rejected) = rejected.iter().find(|it| it.position == position) else {
            let message = format!(
                "{position} is neither current nor was it halted: agents never go back to a lower \
                 number, and what waits has its turn (`rollout status`)"
            );
            return Err(Finish::because(exit::REFUSED, message));
        };
        if selection.all || accept.is_none() {
            let message = format!(
                "{position} was {}; hosts get it all the same by name, with --accept REASON, and \
                 never with --all",
                rejected.outcome
            );
            return Err(Finish::because(exit::REFUSED, message));
        }
        Ok(())
    }

    /// The three questions of a morning: what is the fleet at, who is not there and why, and how
    /// old are its signatures; and what will be a question of some morning soon.
    async fn status(&self) -> Result<Finish, Stopping> {
        let view = self.hub.view().await?;
        let now = Timestamp::now();
        let mut result = json!({
            "fleet": self.fleet, "generation": null, "daemon": self.daemon,
        });
        let fields = result.as_object_mut().expect("made as one");
        // Before the first one is through: what is on its way.
        let complete = self.complete(&view);
        if let Some(manifest) = complete.as_ref().or(view.current.as_ref()) {
            describe(fields, manifest);
            fields.insert("signatures".to_owned(), signatures(manifest, now));
        }
        if let Some(refusal) = self.pipeline.refusal() {
            let refused = json!({
                "reason": refusal.reason, "since": refusal.since, "kind": refusal.kind,
            });
            fields.insert("refused".to_owned(), refused);
        }
        let alarms = [
            report::lost(&view.rollout),
            self.recorder.alarm(),
            self.pipeline.trouble(),
            self.pipeline.rollback_trouble(),
            self.life.unused(),
            self.life.revocations(),
        ];
        let alarms: Vec<_> = alarms.into_iter().flatten().collect();
        if !alarms.is_empty() {
            fields.insert("alarm".to_owned(), alarms.join("; ").into());
        }
        fields.insert("rollout".to_owned(), report::rollout(&view));
        fields.insert("agents".to_owned(), json!(view.counts));
        // A host that is away is not at fault and yet a question of the morning.
        let lagging = view
            .rows
            .iter()
            .filter(|row| !row.conformant || !row.connected);
        let lagging = lagging.map(|row| {
            let away = (!row.connected).then(|| AWAY.to_owned());
            json!({
                "name": row.name, "connected": row.connected, "outcome": row.outcome,
                "since": row.since, "error": row.error.clone().or(away),
            })
        });
        fields.insert("lagging".to_owned(), lagging.collect());
        let soon = |ends: Timestamp| ends.duration_since(now) < CERTIFICATE_ENDS_SOON;
        let own = soon(self.certificate_ends)
            .then(|| json!({ "name": "master", "ends": self.certificate_ends }));
        let agents = view.rows.iter().filter(|row| soon(row.certificate_ends));
        let agents = agents.map(|row| json!({ "name": row.name, "ends": row.certificate_ends }));
        fields.insert(
            "certificates".to_owned(),
            own.into_iter().chain(agents).collect(),
        );
        Ok(Finish::done(result))
    }

    async fn generations(&self) -> Result<Finish, Stopping> {
        let rollout = self.hub.view().await?.rollout;
        let rejected = self.pipeline.rejected();
        let row = |manifest: &Manifest| {
            let state = report::state_of(manifest, &rollout, &rejected);
            json!({
                "epoch": manifest.epoch,
                "generation": manifest.generation,
                "published": manifest.created,
                "content": manifest.content,
                "files": manifest.files,
                "state": state,
            })
        };
        let manifests = self.store.manifests();
        let rows: Value = manifests.iter().map(|manifest| row(manifest)).collect();
        Ok(Finish::done(rows))
    }

    async fn audit_show(
        &self,
        session: &mut Session,
        filter: Filter,
        follow: bool,
    ) -> Result<Finish, AdminError> {
        // Read in a thread, sent in pieces: the log of years does not fit in memory. What is there
        // now ends with an empty piece.
        let (pieces, mut read) = tokio::sync::mpsc::channel(2);
        let directory = self.audit.clone();
        let wanted = filter.clone();
        let reading = tokio::task::spawn_blocking(move || {
            let mut records = audit::read(&directory)?;
            let mut told = false;
            while !pieces.is_closed() {
                let mut piece = Vec::new();
                let mut failure = None;
                // The records before one that cannot be read are told of, too.
                for record in records.by_ref() {
                    match record {
                        Ok(record) if wanted.matches(&record) => piece.push(record),
                        Ok(_) => {}
                        Err(error) => failure = Some(error),
                    }
                    if piece.len() == AUDIT_CHUNK || failure.is_some() || pieces.is_closed() {
                        break;
                    }
                }
                let end = piece.is_empty();
                if !(end && (told || failure.is_some())) && pieces.blocking_send(piece).is_err() {
                    break; // nobody reads any more
                }
                if let Some(error) = failure {
                    return Err(error);
                }
                if end {
                    told = true;
                    if !follow {
                        break;
                    }
                    std::thread::sleep(FOLLOW);
                }
            }
            Ok::<_, audit::AuditError>(())
        });
        let mut any = false;
        let mut cut_off = false;
        loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => {
                    cut_off = true;
                    break;
                }
                () = session.gone() => break,
                piece = read.recv() => match piece {
                    Some(piece) if !piece.is_empty() => {
                        any = true;
                        session.progress(&piece).await?;
                    }
                    Some(_) if any => {}
                    Some(_) => session.progress(&self.nothing(&filter).await).await?,
                    None => break,
                },
            }
        }
        drop(read);
        Ok(match reading.await.expect("reading does not panic") {
            Ok(()) if cut_off => {
                let message = format!("{}; there may be more records", self.life.word());
                Finish::because(exit::UNREACHABLE, message)
            }
            Ok(()) => Finish::done(Value::Null),
            Err(error) => Finish::because(exit::FAILED, crate::chain(&error)),
        })
    }

    /// Says that `filter` matches no record so far, and that it may be for a slip.
    async fn nothing(&self, filter: &Filter) -> String {
        let mut text = "no records match".to_owned();
        if let (Some(agent), Ok(view)) = (&filter.agent, self.hub.view().await) {
            let names = vec![agent.to_string()];
            let selection = Selection {
                names,
                ..Selection::default()
            };
            if let Err(slip) = selection.resolve(&view.rows) {
                text += &format!("; {slip}");
            }
        }
        text
    }
}

/// One `force-sync`. It goes on to its end whether the operator still listens or not, and its outcome
/// stands in the audit log.
#[derive(Debug)]
struct ForcedOrder {
    /// Ties its two records in the audit log together.
    id: String,
    commands: Commands,
    operator: Operator,
    position: Position,
    deadline: Instant,
    work: Work,
    _place: Place,
}

impl ForcedOrder {
    async fn carry_out(mut self, mut listener: Option<Session>) {
        if let Err(Stopping) = self.follow(&mut listener).await {
            if let Ok(view) = self.commands.hub.view().await {
                tell(&mut listener, &self.work.look(&view.rows)).await; // the last answers
            }
            let news = self.work.interrupt(self.commands.life.word());
            tell(&mut listener, &news).await;
        }
        let outcome = self.work.outcome();
        self.note("force-sync-end", Some(outcome), self.work.detail())
            .await;
        if let Some(session) = listener {
            let mut finish = self.finish("failed");
            if let (INTERRUPTED, Some(message)) = (outcome, &mut finish.message) {
                let word = self.commands.life.word();
                *message += &format!("; {word}: order it again for those");
            }
            // Whoever has gone finds it in the log.
            let _ = session.finish(finish).await;
        }
    }

    /// Follows the agents until each is done or the time is over.
    async fn follow(&mut self, listener: &mut Option<Session>) -> Result<(), Stopping> {
        let mut hub = self.commands.hub.clone();
        loop {
            let view = hub.view().await?;
            tell(listener, &self.work.look(&view.rows)).await;
            if Instant::now() >= self.deadline {
                tell(listener, &self.work.time_out()).await;
            }
            if self.work.is_done() {
                return Ok(());
            }
            tokio::select! {
                biased;
                () = self.commands.stop.cancelled() => return Err(Stopping),
                changed = hub.changed() => {
                    changed?;
                    sleep(CHANGES_SETTLE).await;
                }
                () = sleep_until(self.deadline) => {}
                () = hang_up(listener) => *listener = None,
            }
        }
    }

    /// What the command is told at its end; `what` is what the failed agents have done.
    fn finish(&self, what: &str) -> Finish {
        let Position { epoch, generation } = self.position;
        let (failed, all) = (self.work.failed(), self.work.agents());
        let result = json!({
            "epoch": epoch, "generation": generation, "agents": self.work.ended(),
        });
        if failed.is_empty() {
            return Finish::done(result);
        }
        let names = failed.iter().take(NAMED_MAX).map(|end| end.agent.as_str());
        let names: Vec<_> = names.collect();
        let more = if failed.len() > NAMED_MAX { " ..." } else { "" };
        Finish {
            exit: exit::NOT_CONFORMANT,
            result,
            message: Some(format!(
                "{} of {all} agents {what}: {}{more}",
                failed.len(),
                names.join(" ")
            )),
        }
    }

    async fn note(&self, event: &str, outcome: Option<&str>, mut detail: Value) {
        detail["order"] = self.id.as_str().into();
        let draft = Draft {
            event: event.to_owned(),
            actor: self.operator.to_string(),
            subject: "fleet".to_owned(),
            position: Some(self.position),
            outcome: outcome.map(str::to_owned),
            detail,
        };
        self.commands.recorder.note(draft).await;
    }
}

/// An operator's reason, as the audit log has it.
fn said(reason: Option<String>) -> String {
    reason.unwrap_or_else(|| "no reason given".to_owned())
}

/// Tells whoever still listens. One that does not is as good as gone: the work goes on.
async fn tell(listener: &mut Option<Session>, news: &[News]) {
    for news in news {
        if let Some(session) = listener
            && session.progress(news).await.is_err()
        {
            *listener = None;
        }
    }
}

/// Returns when the command hangs up; never if nobody listens.
async fn hang_up(listener: &mut Option<Session>) {
    match listener {
        Some(session) => session.gone().await,
        None => std::future::pending().await,
    }
}

/// The age of what changes daily: the database `daily`, or the one that was built last.
fn signatures(manifest: &Manifest, now: Timestamp) -> Value {
    let built = manifest.files.iter().filter_map(|file| {
        let container = file.container.as_ref()?;
        Some((
            file.name.base() == "daily",
            container.built?,
            container.version,
            &file.name,
        ))
    });
    let Some((_, built, version, name)) = built.max() else {
        return Value::Null;
    };
    let age = now.duration_since(built);
    let alarm = match age {
        age if age > SIGNATURES_AUDITED => Some("7d"),
        age if age > SIGNATURES_OLD => Some("24h"),
        _ => None,
    };
    json!({ "name": name, "version": version, "built": built, "alarm": alarm })
}

/// What `status` and `publish` say of a generation.
fn describe(fields: &mut serde_json::Map<String, Value>, manifest: &Manifest) {
    fields.insert("epoch".to_owned(), json!(manifest.epoch));
    fields.insert("generation".to_owned(), json!(manifest.generation));
    fields.insert("content".to_owned(), json!(manifest.content));
    fields.insert("published".to_owned(), json!(manifest.created));
}

fn progress(view: &View) -> Value {
    json!({ "agents": view.counts, "unsettled": view.unsettled, "time": Timestamp::now() })
}

/// The end of `publish --wait`: every connected agent has answered, well or not.
fn settled(mut result: Value, published: Option<Position>, view: &View) -> Finish {
    let lagging = view
        .rows
        .iter()
        .filter(|row| row.connected && !row.conformant);
    let lagging: Vec<_> = lagging.collect();
    let fields = result.as_object_mut().expect("made as one");
    fields.insert("agents".to_owned(), json!(view.counts));
    let names: Vec<_> = lagging.iter().map(|row| &row.name).collect();
    fields.insert("failed".to_owned(), json!(names));
    let obstacle = published.and_then(|published| report::obstacle(view, published));
    if lagging.is_empty() && obstacle.is_none() {
        return Finish::done(result);
    }
    let line = |row: &&Row| {
        let error = row.error.as_deref().unwrap_or("not there yet");
        printable(&format!("{}: {}: {error}", row.name, row.outcome))
    };
    let lines = obstacle.into_iter().chain(lagging.iter().map(line));
    let message = Some(lines.collect::<Vec<_>>().join("\n"));
    let exit = exit::NOT_CONFORMANT;
    Finish {
        exit,
        result,
        message,
    }
}
