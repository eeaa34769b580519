//! Changes the rollout, and reports it.

use std::sync::Arc;
use std::time::Duration;

use clamcast_daemon::admin::{AdminError, Finish, Session};
use clamcast_daemon::exit;
use clamcast_proto::GroupName;
use clamcast_proto::dsse::Verified;
use clamcast_proto::manifest::Manifest;
use jiff::Timestamp;
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, sleep_until};

use super::{CHANGES_SETTLE, Commands, LOOK, TIMEOUT_MAX};
use crate::fleet::dispatch::Order;
use crate::fleet::force::{Meant, SelectError};
use crate::fleet::hub::{Event, Stopping};
use crate::fleet::rollout::{Order as RolloutOrder, OrderError};
use crate::operate::api::{Change, Progress, RolloutState};
use crate::operate::report;

/// An order that is not carried out, or not known to be.
pub(super) enum Undone {
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

impl Commands {
    /// Orders something about the rollout, and answers with where it is then.
    pub(super) async fn change(
        &self,
        session: &Session,
        change: Change,
        reason: Option<String>,
    ) -> Finish {
        let ordered = match self.meant(change, reason).await {
            Ok(order) => self.carry_out(session, order).await,
            Err(finish) => Err(Undone::Failed(finish)),
        };
        if let Err(undone) = ordered {
            return undone.into();
        }
        let view = self.hub.view().await;
        view.map_or_else(
            |Stopping| self.life.ending().finish(),
            |view| Finish::done(report::rollout(&view)),
        )
    }

    /// The order with the generation that an operator means by a number.
    async fn meant(&self, change: Change, reason: Option<String>) -> Result<Order, Finish> {
        let said = |reason: Option<String>| reason.unwrap_or_else(|| "no reason given".to_owned());
        Ok(Order::Plain(match change {
            Change::Pause => RolloutOrder::Pause(said(reason)),
            Change::Resume => RolloutOrder::Resume(reason),
            Change::Abort => RolloutOrder::Abort(said(reason)),
            Change::Promote => RolloutOrder::Promote(said(reason)),
            Change::RollBack(generation) => {
                return Ok(Order::RollBack(self.good(generation)?, said(reason)));
            }
            Change::Pin(group, generation) => {
                self.has_group(&group).await?;
                match generation {
                    Some(to) => return Ok(Order::Pin(group, self.good(to)?, reason)),
                    None => RolloutOrder::Pin(group, None, reason),
                }
            }
            Change::Unpin(group) => RolloutOrder::Unpin(group, reason),
            Change::SetAside(host) => RolloutOrder::SetAside(host, said(reason)),
            Change::Restore(host) => RolloutOrder::Restore(host, reason),
        }))
    }

    /// A slip must not pass as a pinned group.
    async fn has_group(&self, group: &GroupName) -> Result<(), Finish> {
        let view = self.hub.view().await;
        let view = view.map_err(|Stopping| self.life.ending().finish())?;
        let has_agents = view.rows.iter().any(|row| row.groups.contains(group));
        if has_agents || self.groups.has(group) {
            return Ok(());
        }
        let error = SelectError::EmptyGroup(group.clone());
        Err(Finish::because(exit::USAGE, error))
    }

    /// The generation that an operator means, if it is kept and nobody took it back.
    fn good(&self, generation: Meant) -> Result<Arc<Verified<Manifest>>, Finish> {
        let manifest = self.kept(generation)?;
        let Some(withdrawal) = self.pipeline.rejection(manifest.content) else {
            return Ok(manifest);
        };
        let (position, bad, outcome) =
            (manifest.position(), withdrawal.position, withdrawal.outcome);
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

    /// Has an order about the rollout carried out, and returns when the disk has it.
    pub(super) async fn carry_out(&self, session: &Session, order: Order) -> Result<(), Undone> {
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
        let number = answer.map_err(Undone::Refused)?;
        self.written(number).await.map_err(|reason| {
            let message = format!(
                "{reason}; the order is carried out, but forgotten if the daemon ends before it is \
                 written"
            );
            Finish::because(exit::FAILED, message).into()
        })
    }

    /// Reports the rollout: at once, or when it is complete or halted, or at the end of `timeout`.
    pub(super) async fn rollout_status(
        &self,
        session: &mut Session,
        timeout: Option<Duration>,
    ) -> Result<Finish, AdminError> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout.min(TIMEOUT_MAX));
        let mut hub = self.hub.clone();
        let mut watched = None;
        loop {
            let Ok(view) = self.hub.view().await else {
                return Ok(self.life.ending().finish());
            };
            // A generation that replaced the awaited one does not end the wait well.
            let running = view.rollout.running().map(|run| run.target.position);
            let watched = *watched.get_or_insert(running);
            let gone = watched.filter(|it| view.rollout.is_taken_back(*it));
            let ended = match report::state(&view.rollout) {
                RolloutState::Halted => Some(exit::NOT_CONFORMANT),
                _ if gone.is_some() => Some(exit::NOT_CONFORMANT),
                RolloutState::Complete => Some(exit::DONE),
                RolloutState::None | RolloutState::Running | RolloutState::Paused => None,
            };
            let awaited = report::standing(&view);
            let code = match (ended, deadline) {
                (ended, None) => ended.unwrap_or(exit::DONE),
                (Some(code), Some(_)) if awaited.is_none() || gone.is_some() => code,
                (_, Some(deadline)) if Instant::now() >= deadline => exit::NOT_CONFORMANT,
                (_, Some(deadline)) => {
                    let progress = Progress {
                        agents: view.counts,
                        unsettled: report::waited(&view),
                        standing: awaited,
                        time: Timestamp::now(),
                    };
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
            let gone = gone.filter(|_| running.is_some());
            let gone = gone.map(|gone| format!("{gone} was halted, aborted or rolled back"));
            let message = gone.or_else(|| {
                late.then(|| {
                    let awaited = awaited.unwrap_or_else(|| "nothing is published yet".to_owned());
                    format!("not complete in time: {awaited}")
                })
            });
            return Ok(Finish {
                exit: code,
                message,
                ..Finish::done(report::rollout(&view))
            });
        }
    }
}
