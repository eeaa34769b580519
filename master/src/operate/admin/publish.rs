//! `publish`, and the wait until the fleet has it.

use clamcast_daemon::admin::{AdminError, Finish, Session};
use clamcast_daemon::exit;
use clamcast_daemon::table::printable;
use jiff::Timestamp;
use tokio::time::sleep;

use super::rollout::Undone;
use super::{CHANGES_SETTLE, Commands, LOOK};
use crate::config::units::UnitName;
use crate::fleet::agents::Row;
use crate::fleet::dispatch::Order;
use crate::fleet::hub::{Stopping, View};
use crate::fleet::rollout::{Order as RolloutOrder, OrderError};
use crate::operate::api::{
    HeldUnit, Preview, PreviewUnit, Progress, Publication, PublicationOutcome, UnitState,
};
use crate::operate::report;
use crate::publish::plan::{Plan, State};
use crate::publish::publisher::{Accept, PublishError, Published, Refusal, RefusalKind, Request};

/// Held units that a message names; the answer has all.
const NAMED_MAX: usize = 3;

impl Commands {
    /// Captures the mirror and publishes it, and waits for the fleet if `wait` says so.
    pub(super) async fn publish(
        &self,
        session: &mut Session,
        wait: bool,
        request: Request,
    ) -> Result<Finish, AdminError> {
        if let Err(finish) = self.can_write() {
            return Ok(finish);
        }
        let actor = session.operator.to_string();
        tracing::info!(
            operator = actor,
            login_uid = session.operator.login_uid,
            wait,
            accept = request.accept.as_ref().map(|accept| &*accept.reason),
            units = ?request.accept.as_ref().map(|accept| &accept.units),
            supersede = request.supersede,
            "publish"
        );
        let supersede = request.supersede;
        let named = request
            .accept
            .as_ref()
            .map_or(Vec::new(), |it| it.units.clone());
        let wants = |unit: &UnitName| named.iter().any(|name| self.units.named(name) == *unit);
        let published = match self.pipeline.publish(request, &actor).await {
            Ok(published) => published,
            Err(PublishError::Stopping) => return Ok(self.life.ending().finish()),
            Err(error) if error.is_usage() => {
                return Ok(Finish::because(exit::USAGE, error));
            }
            Err(error) => {
                return Ok(Finish::because(exit::FAILED, crate::chain(&error)));
            }
        };
        let outcome = match published {
            Published::New { .. } => PublicationOutcome::New,
            Published::Unchanged if supersede => {
                let order = Order::Plain(RolloutOrder::Supersede);
                match self.carry_out(session, order).await {
                    Ok(()) => PublicationOutcome::Begun,
                    Err(Undone::Refused(OrderError::NothingWaits)) => PublicationOutcome::Unchanged,
                    Err(undone) => return Ok(undone.into()),
                }
            }
            Published::Unchanged => PublicationOutcome::Unchanged,
            Published::Busy { reason } => {
                let message = format!("{reason}; the daemon publishes when it is quiet");
                return Ok(Finish::because(exit::FAILED, message));
            }
            Published::Held(refusal) | Published::Refused(refusal) => {
                return Ok(self.rejected(refusal).await);
            }
        };
        let newest = self.store.current();
        let result = Publication {
            outcome,
            generation: newest.map(|manifest| (&**manifest).into()),
            reason: None,
            held: self.held(|_| true),
            agents: None,
            failed: None,
        };
        let is_wanted =
            |it: &&HeldUnit| outcome == PublicationOutcome::Unchanged || wants(&it.unit);
        let missed: Vec<_> = result.held.iter().filter(is_wanted).collect();
        if !missed.is_empty() {
            let named = missed.iter().take(NAMED_MAX);
            let named: Vec<_> = named
                .map(|it| format!("{}: {}", it.unit, it.reason))
                .collect();
            let mut message = format!("not published: {}", named.join("; "));
            if let Some(more) = missed.len().checked_sub(NAMED_MAX + 1) {
                message += &format!("; and {} more units", more + 1);
            }
            return Ok(Finish {
                exit: exit::REFUSED,
                message: Some(message),
                ..Finish::done(result)
            });
        }
        if !wait {
            return Ok(Finish::done(result));
        }
        // It is published; whoever waits is told so also when the waiting ends early.
        let left = |result| Finish {
            exit: exit::NOT_CONFORMANT,
            message: Some(format!(
                "{} before every agent had settled; they go on, `agents` shows how far they are",
                self.life.word()
            )),
            ..Finish::done(result)
        };
        let mut hub = self.hub.clone();
        loop {
            let Ok(view) = self.hub.view().await else {
                return Ok(left(result));
            };
            let progress = Progress {
                agents: view.counts,
                unsettled: view.unsettled.clone(),
                standing: None,
                time: Timestamp::now(),
            };
            session.progress(&progress).await?;
            if !view.is_moving() {
                return Ok(settled(result, &view));
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

    /// Reports what `publish` would do.
    pub(super) async fn preview(&self, accept: Option<Accept>) -> Finish {
        let request = Request {
            accept,
            supersede: false,
            is_operators: true,
        };
        let preview = match self.pipeline.preview(request).await {
            Ok(preview) => preview,
            Err(PublishError::Stopping) => return self.life.ending().finish(),
            Err(error) if error.is_usage() => return Finish::because(exit::USAGE, error),
            Err(error) => return Finish::because(exit::FAILED, crate::chain(&error)),
        };
        let outcome = match &preview.obstacle {
            Some((RefusalKind::Held, _)) => PublicationOutcome::Held,
            Some((RefusalKind::Refused, _)) => PublicationOutcome::Refused,
            None if preview.is_published => PublicationOutcome::Unchanged,
            None => PublicationOutcome::New,
        };
        let units = preview.plan.iter().flat_map(Plan::units);
        let units = units.map(|(unit, state)| {
            let files = preview.plan.iter().flat_map(|plan| plan.files_of(unit));
            let cause = match state {
                State::Held(held) => Some(&held.cause),
                State::Unchanged | State::Changed { .. } | State::Removed => None,
            };
            PreviewUnit {
                unit: unit.clone(),
                state: UnitState::from(state),
                files: files.map(|file| file.name.clone()).collect(),
                reason: cause.map(|cause| cause.text.clone()),
                remedy: cause.map(|cause| cause.kind.remedy(unit)),
            }
        });
        Finish::done(Preview {
            outcome,
            reason: preview.obstacle.as_ref().map(|(_, reason)| reason.clone()),
            units: units.collect(),
            skipped: preview.skipped,
            accepted: preview
                .plan
                .as_ref()
                .map_or_else(Vec::new, |plan| plan.accepted.clone()),
        })
    }

    /// The answer to a `publish` whose capture is held or refused.
    async fn rejected(&self, refusal: Refusal) -> Finish {
        let Ok(view) = self.hub.view().await else {
            return self.life.ending().finish();
        };
        let (outcome, next) = match (refusal.kind, view.rollout.held()) {
            (RefusalKind::Held, Some(_)) => {
                (PublicationOutcome::Held, "`rollout resume` publishes again")
            }
            (RefusalKind::Held, None) => (
                PublicationOutcome::Held,
                "look at the mirror; if it is right, `publish --accept REASON`",
            ),
            (RefusalKind::Refused, _) => (
                PublicationOutcome::Refused,
                "mend the mirror; the last good generation stays",
            ),
        };
        let complete = self.complete(&view);
        Finish {
            exit: exit::REFUSED,
            message: Some(format!("{refusal}; {next}")),
            ..Finish::done(Publication {
                outcome,
                generation: complete.map(|manifest| (&**manifest).into()),
                reason: Some(refusal.reason),
                held: self.held(|_| true),
                agents: None,
                failed: None,
            })
        }
    }
}

impl From<&State> for UnitState {
    fn from(state: &State) -> Self {
        match state {
            State::Unchanged => Self::Unchanged,
            State::Changed { is_new: true } => Self::New,
            State::Changed { is_new: false } => Self::Changed,
            State::Removed => Self::Removed,
            State::Held(_) => Self::Held,
        }
    }
}

/// The end of `publish --wait`: every connected agent has answered, well or not.
fn settled(mut result: Publication, view: &View) -> Finish {
    let rows = view.rows.iter();
    let lagging: Vec<_> = rows
        .filter(|row| row.connected && !row.conformant)
        .collect();
    result.agents = Some(view.counts);
    result.failed = Some(lagging.iter().map(|row| row.name.clone()).collect());
    let published = result.generation.map(|it| it.position);
    let obstacle = published.and_then(|published| report::obstacle(view, published));
    let done = Finish::done(result);
    if lagging.is_empty() && obstacle.is_none() {
        return done;
    }
    let line = |row: &&Row| {
        let error = row.error.as_deref().unwrap_or("not there yet");
        printable(&format!("{}: {}: {error}", row.name, row.outcome))
    };
    let lines = obstacle.into_iter().chain(lagging.iter().map(line));
    Finish {
        exit: exit::NOT_CONFORMANT,
        message: Some(lines.collect::<Vec<_>>().join("\n")),
        ..done
    }
}
