//! `force-sync`: selects agents and a generation, orders the install, and follows the agents.

use clamcast_daemon::admin::{AdminError, Finish, Place, Places, Session};
use clamcast_daemon::exit;
use clamcast_proto::AuditEvent;
use clamcast_proto::audit::{Draft, Operator};
use clamcast_proto::manifest::Manifest;
use clamcast_proto::{AgentName, Position};
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::task::TaskTracker;

use super::waits::Waiting;
use super::{CHANGES_SETTLE, Commands, LOOK, TIMEOUT_MAX};
use crate::fleet::agents::Row;
use crate::fleet::dispatch::Forcing;
use crate::fleet::force::{self, INTERRUPTED, Meant, News, Selection, Work};
use crate::fleet::hub::{Event, Stopping};
use crate::operate::api::{ForceRequest, Forced};
use crate::record::entry::Entry;

/// `force-sync`s under way at a time: each looks at the whole fleet after every change.
pub const ORDERS_MAX: usize = 16;

/// Why an order came to nothing.
const SUPERSEDED: &str =
    "another generation became current before any agent was told; order it again";

/// Failed agents that the last line of a `force-sync` names; the table above it has them all.
const NAMED_MAX: usize = 20;

/// The `force-sync`s under way, whether anybody waits for them or not.
#[derive(Clone, Debug)]
pub struct Orders {
    pub(super) tasks: TaskTracker,
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

impl Commands {
    /// Carries out a `force-sync`, and waits for its end if the request says so.
    pub(super) async fn force_sync(
        &self,
        session: Session,
        request: ForceRequest,
    ) -> Result<(), AdminError> {
        let ForceRequest {
            selection,
            full,
            generation,
            accept,
            wait,
            timeout,
        } = request;
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
        let mut order = ForcedOrder {
            id: hex::encode(rand::random::<[u8; 4]>()),
            commands: self.clone(),
            operator,
            position: what.position(),
            deadline: Instant::now() + timeout.min(TIMEOUT_MAX),
            work: Work::default(),
            _place: place,
            // The order outlives its session.
            _waits: self
                .waits
                .insert("force-sync", &session.operator, Some(timeout)),
        };
        let mut detail = force::named("agents", agents.iter());
        detail.insert("full".to_owned(), full.into());
        detail.insert("reason".to_owned(), accept.into());
        detail.insert("login_uid".to_owned(), order.operator.login_uid.into());
        // The offers stand behind it in the recorder's queue.
        let number = order.note(AuditEvent::ForceSync, None, detail.into());
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
            let detail =
                Value::from_iter([("done", Value::from(0)), ("reason", SUPERSEDED.into())]);
            order.note(AuditEvent::ForceSyncEnd, Some(INTERRUPTED), detail);
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
        let mut finish = order.finish("not told");
        if let Err(reason) = self.written(number).await {
            finish = Finish::because(exit::FAILED, format!("ordered, and waits: {reason}"));
        }
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
                self.may_be_forced(&manifest, selection, &view.rows, accept)?;
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
        rows: &[Row],
        accept: Option<&str>,
    ) -> Result<(), Finish> {
        let position = manifest.position();
        let withdrawn = self.pipeline.withdrawn();
        let Some(withdrawal) = withdrawn.of(position) else {
            let message = format!(
                "{position} is neither current nor was it halted: agents never go back to a lower \
                 number, and what waits has its turn (`rollout status`)"
            );
            return Err(Finish::because(exit::REFUSED, message));
        };
        let Some(rows) = selection.by_name(rows).filter(|_| accept.is_some()) else {
            let message = format!(
                "{position} was {}; hosts get it all the same by their whole names, with --accept \
                 REASON, and never with a pattern, --group or --all",
                withdrawal.outcome
            );
            return Err(Finish::because(exit::REFUSED, message));
        };
        if let Some(pinned) = rows.iter().find(|row| row.pinned) {
            let name = &pinned.name;
            let message = format!("a group of `{name}` is pinned; `unpin` it first");
            return Err(Finish::because(exit::REFUSED, message));
        }
        Ok(())
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
    _waits: Waiting,
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
        let number = self.note(AuditEvent::ForceSyncEnd, Some(outcome), self.work.detail());
        let written = self.commands.written(number).await;
        if let Some(session) = listener {
            let mut finish = self.finish("failed");
            if let Err(reason) = written {
                let message = finish.message.unwrap_or_else(|| "done".to_owned());
                finish.exit = exit::FAILED;
                finish.message = Some(format!(
                    "{message}; the audit log does not have the outcome yet: {reason}"
                ));
            }
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
            if let Some(alarm) = self.commands.recorder.alarm() {
                tell(listener, &self.work.hold_up(&alarm)).await;
            }
            tokio::select! {
                biased;
                () = self.commands.stop.cancelled() => return Err(Stopping),
                changed = hub.changed() => {
                    changed?;
                    sleep(CHANGES_SETTLE).await;
                }
                () = sleep_until(self.deadline) => {}
                () = sleep(LOOK) => {} // a disk that refuses is no change of the fleet
                () = hang_up(listener) => *listener = None,
            }
        }
    }

    /// The answer to the command. `what` says how the failed agents failed: `failed`, `not told`.
    fn finish(&self, what: &str) -> Finish {
        let (failed, all) = (self.work.failed(), self.work.agents());
        let result = Forced {
            position: self.position,
            agents: self.work.ended().to_vec(),
        };
        if failed.is_empty() {
            return Finish::done(result);
        }
        let names = failed.iter().take(NAMED_MAX).map(|end| end.agent.as_str());
        let names: Vec<_> = names.collect();
        let more = if failed.len() > NAMED_MAX { " ..." } else { "" };
        Finish {
            exit: exit::NOT_CONFORMANT,
            message: Some(format!(
                "{} of {all} agents {what}: {}{more}",
                failed.len(),
                names.join(" ")
            )),
            ..Finish::done(result)
        }
    }

    /// Writes it down. Returns the number of the entry.
    fn note(&self, event: AuditEvent, outcome: Option<&str>, mut detail: Value) -> u64 {
        detail["order"] = self.id.as_str().into();
        let draft = Draft {
            position: Some(self.position),
            outcome: outcome.map(str::to_owned),
            detail,
            ..Draft::new(event, &self.operator, "fleet")
        };
        self.commands.recorder.write(Entry::line(draft))
    }
}

/// Sends news to the command. The order continues if the command has disconnected.
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
