//! What operators ask of the running daemon.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clamcast_daemon::admin::{AdminError, Finish, Listener, Session};
use clamcast_daemon::{audit, exit};
use clamcast_proto::FleetName;
use clamcast_proto::manifest::Manifest;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::hub::{Hub, Stopping, View};
use crate::pipeline::Pipeline;
use crate::publish::{Published, Request as PublishRequest};
use crate::recorder::Recorder;
use crate::store::Store;

/// Commands served at a time. A waiting `publish` is one of them.
const SESSIONS_MAX: usize = 64;

/// While it waits, `publish` looks again at least this often, for silence is no event.
const LOOK: Duration = Duration::from_secs(5);

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
    },
    /// The fleet in numbers.
    Status,
    /// The table of agents.
    Agents,
    /// The generations that are kept.
    Generations,
    /// Records of the audit log.
    AuditShow {
        /// Which ones.
        filter: audit::Filter,
    },
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
    /// Says whether the log can be written.
    pub recorder: Recorder,
    /// The audit log's directory.
    pub audit: PathBuf,
    /// Silence that counts as failure.
    pub deadline: Duration,
}

/// Serves operators until `stop` fires.
pub async fn serve(mut listener: Listener, commands: Commands, stop: CancellationToken) {
    let mut sessions = JoinSet::new();
    loop {
        let session = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(_) = sessions.join_next() => continue,
            session = listener.accept(), if sessions.len() < SESSIONS_MAX => session,
        };
        match session {
            Ok(session) => {
                let (commands, stop) = (commands.clone(), stop.clone());
                sessions.spawn(async move {
                    if let Err(error) = commands.answer(session, stop).await {
                        tracing::debug!(error = crate::chain(&error), "a command got no answer");
                    }
                });
            }
            Err(error) => {
                tracing::error!(%error, "cannot accept a command");
                tokio::time::sleep(Duration::from_millis(100)).await; // out of descriptors, say
            }
        }
    }
    while sessions.join_next().await.is_some() {}
}

impl Commands {
    async fn answer(
        &self,
        mut session: Session,
        stop: CancellationToken,
    ) -> Result<(), AdminError> {
        if !session.operator.may_act {
            let who = session.operator.name.clone();
            let message = format!(
                "user `{who}` may not command this master; it takes root or a member of its admin_group"
            );
            return session
                .finish(Finish::because(exit::REFUSED, message))
                .await;
        }
        let request = match session.request().await {
            Ok(request) => request,
            Err(error @ (AdminError::Request(_) | AdminError::RequestLine)) => {
                let message = crate::chain(&error);
                return session.finish(Finish::because(exit::USAGE, message)).await;
            }
            Err(error) => return Err(error),
        };
        let finish = match request {
            Request::Publish { wait, accept } => {
                self.publish(&mut session, wait, accept, &stop).await?
            }
            Request::Status => self.status().await.unwrap_or_else(stopping),
            Request::Agents => self
                .hub
                .view()
                .await
                .map_or_else(stopping, |view| Finish::done(view.rows)),
            Request::Generations => Finish::done(self.generations()),
            Request::AuditShow { filter } => self.audit_show(&mut session, filter).await?,
        };
        session.finish(finish).await
    }

    async fn publish(
        &self,
        session: &mut Session,
        wait: bool,
        accept: Option<String>,
        stop: &CancellationToken,
    ) -> Result<Finish, AdminError> {
        let actor = session.operator.to_string();
        tracing::info!(
            operator = actor,
            login_uid = session.operator.login_uid,
            wait,
            accept,
            "publish"
        );
        let published = match self
            .pipeline
            .publish(PublishRequest { accept }, &actor)
            .await
        {
            Ok(published) => published,
            Err(error) => {
                return Ok(Finish::because(exit::FAILED, crate::chain(&error)));
            }
        };
        let (word, reason) = match published {
            Published::New { .. } => ("new", None),
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
        if let Some(manifest) = self.store.current() {
            describe(fields, &manifest);
        }
        if let Some(reason) = reason {
            fields.insert("reason".to_owned(), reason.clone().into());
            let next = if word == "held" {
                "look at the mirror; if it is right, `publish --accept REASON`"
            } else {
                "mend the mirror; the last good generation stays"
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
        let mut hub = self.hub.clone();
        loop {
            let Ok(view) = self.hub.view().await else {
                return Ok(stopping(Stopping));
            };
            session.progress(&progress(&view)).await?;
            if view.unsettled.is_empty() {
                return Ok(settled(result, &view));
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(stopping(Stopping)),
                () = session.gone() => return Ok(Finish::done(result)), // nobody hears it
                changed = hub.changed() => if changed.is_err() { return Ok(stopping(Stopping)) },
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    async fn status(&self) -> Result<Finish, Stopping> {
        let view = self.hub.view().await?;
        let mut result = json!({ "fleet": self.fleet, "generation": null });
        let fields = result.as_object_mut().expect("made as one");
        if let Some(manifest) = &view.current {
            describe(fields, manifest);
        }
        if let Some(refusal) = self.pipeline.refusal() {
            let refused = json!({
                "reason": refusal.reason, "since": refusal.since, "kind": refusal.kind,
            });
            fields.insert("refused".to_owned(), refused);
        }
        if let Some(alarm) = self.recorder.alarm() {
            fields.insert("alarm".to_owned(), alarm.into());
        }
        // The whole fleet is one wave.
        let state = match (&view.current, view.unsettled.is_empty()) {
            (None, _) => "none",
            (Some(_), false) => "running",
            (Some(_), true) => "complete",
        };
        fields.insert(
            "rollout".to_owned(),
            json!({ "state": state, "wave": 1, "waves": 1 }),
        );
        fields.insert("agents".to_owned(), json!(view.counts));
        Ok(Finish::done(result))
    }

    fn generations(&self) -> Value {
        let current = self.store.current().map(|manifest| manifest.position());
        let row = |manifest: &Manifest| {
            let state = if Some(manifest.position()) == current {
                "current"
            } else {
                "superseded"
            };
            json!({
                "epoch": manifest.epoch,
                "generation": manifest.generation,
                "published": manifest.created,
                "content": manifest.content,
                "files": manifest.files,
                "state": state,
            })
        };
        self.store
            .manifests()
            .iter()
            .map(|manifest| row(manifest))
            .collect()
    }

    async fn audit_show(
        &self,
        session: &mut Session,
        filter: audit::Filter,
    ) -> Result<Finish, AdminError> {
        // Read in a thread, sent in pieces: the log of years does not fit in memory.
        let (pieces, mut read) = tokio::sync::mpsc::channel(2);
        let directory = self.audit.clone();
        let reading = tokio::task::spawn_blocking(move || {
            let mut piece = Vec::new();
            for record in audit::read(&directory, filter)? {
                piece.push(record?);
                if piece.len() == AUDIT_CHUNK
                    && pieces.blocking_send(std::mem::take(&mut piece)).is_err()
                {
                    return Ok(()); // nobody reads any more
                }
            }
            let _ = pieces.blocking_send(piece); // as above
            Ok::<_, audit::AuditError>(())
        });
        while let Some(piece) = read.recv().await {
            session.progress(&piece).await?;
        }
        Ok(match reading.await.expect("reading does not panic") {
            Ok(()) => Finish::done(Value::Null),
            Err(error) => Finish::because(exit::FAILED, crate::chain(&error)),
        })
    }
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

/// The end of `publish --wait`: every connected agent has settled, well or not.
fn settled(mut result: Value, view: &View) -> Finish {
    let fields = result.as_object_mut().expect("made as one");
    fields.insert("agents".to_owned(), json!(view.counts));
    fields.insert("failed".to_owned(), json!(view.failed));
    if view.failed.is_empty() {
        return Finish::done(result);
    }
    let failed = view
        .rows
        .iter()
        .filter(|row| view.failed.contains(&row.name))
        .map(|row| format!("{}: {}", row.name, row.error.as_deref().unwrap_or("failed")));
    let message = Some(failed.collect::<Vec<_>>().join("\n"));
    Finish {
        exit: exit::NOT_CONFORMANT,
        result,
        message,
    }
}

fn stopping(_: Stopping) -> Finish {
    Finish::because(exit::UNREACHABLE, "the daemon is stopping")
}
