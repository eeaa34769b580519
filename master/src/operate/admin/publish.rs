//! `publish`, and the wait until the fleet has it.

use clamcast_daemon::admin::{AdminError, Finish, Session};
use clamcast_daemon::exit;
use clamcast_daemon::table::printable;
use clamcast_proto::Position;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::rollout::Undone;
use super::{CHANGES_SETTLE, Commands, LOOK, describe};
use crate::fleet::agents::Row;
use crate::fleet::dispatch::Order;
use crate::fleet::hub::{Stopping, View};
use crate::fleet::rollout::{Order as RolloutOrder, OrderError};
use crate::operate::report;
use crate::publish::publisher::{PublishError, Published, Request};

impl Commands {
    /// Captures the mirror and publishes it, and waits for the fleet if `wait` says so.
    pub(super) async fn publish(
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
            .publish(Request { accept, supersede }, &actor)
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
