//! What operators ask of the running daemon.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clamcast_daemon::admin::{AdminError, Finish, Listener, Session};
use clamcast_daemon::audit::{self, Draft};
use clamcast_daemon::exit;
use clamcast_daemon::table::printable;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::{AgentName, FleetName, Position};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::events::Filter;
use crate::fleet::{AWAY, Row};
use crate::force::{News, Selection, Work};
use crate::hub::{Event, Hub, Stopping, View};
use crate::pipeline::Pipeline;
use crate::publish::{Published, Request as PublishRequest};
use crate::recorder::Recorder;
use crate::store::Store;

/// Commands served at a time. A waiting `publish` is one of them.
const SESSIONS_MAX: usize = 64;

/// While it waits, `publish` looks again at least this often, for silence is no event.
const LOOK: Duration = Duration::from_secs(5);

/// Signatures older than this are an alarm: Talos publishes daily, so the mirror is stuck.
const SIGNATURES_OLD: SignedDuration = SignedDuration::from_hours(24);

/// Signatures older than this break the rule that auditors apply.
const SIGNATURES_AUDITED: SignedDuration = SignedDuration::from_hours(7 * 24);

/// A certificate that ends within this time is named.
const CERTIFICATE_SOON: SignedDuration = SignedDuration::from_hours(30 * 24);

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
        generation: Option<u64>,
        /// Why, for the audit log.
        accept: Option<String>,
        /// Return when the agents are done.
        wait: bool,
        /// Seconds after which an agent that is not done has failed.
        timeout: u64,
    },
    /// Records of the audit log.
    AuditShow {
        /// Which ones.
        filter: Filter,
        /// Go on with those that are still to come.
        follow: bool,
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
    /// When the master's own certificate ends.
    pub certificate_ends: Timestamp,
}

/// Serves operators until `stop` fires, and lets the sessions that saw it end.
pub async fn serve(mut listener: Listener, commands: Commands, stop: CancellationToken) {
    let answer = |session| {
        let (commands, stop) = (commands.clone(), stop.clone());
        async move { commands.answer(session, stop).await }
    };
    let mut sessions = listener.serve(SESSIONS_MAX, stop.clone(), answer).await;
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
        let request: Request = match session.request().await {
            Ok(request) => request,
            Err(error @ (AdminError::Request(_) | AdminError::RequestLine)) => {
                let message = crate::chain(&error);
                return session.finish(Finish::because(exit::USAGE, message)).await;
            }
            Err(error) => return Err(error),
        };
        let finish = match request.clone() {
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
            Request::ForceSync { .. } => return self.force_sync(session, request, &stop).await,
            Request::AuditShow { filter, follow } => {
                self.audit_show(&mut session, filter, follow, &stop).await?
            }
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
                changed = hub.changed() => match changed {
                    Ok(()) => tokio::time::sleep(CHANGES_SETTLE).await,
                    Err(stop) => return Ok(stopping(stop)),
                },
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// Once it has begun it goes on to its end, whether the operator still listens or not: what was
    /// ordered is carried out and its outcome stands in the audit log.
    async fn force_sync(
        &self,
        session: Session,
        request: Request,
        stop: &CancellationToken,
    ) -> Result<(), AdminError> {
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
        let (position, agents) = match self.forced(&selection, generation).await {
            Ok(forced) => forced,
            Err(finish) => return session.finish(finish).await,
        };
        let note = |event: &str, outcome: Option<&str>, detail: Value| Draft {
            event: event.to_owned(),
            actor: operator.to_string(),
            subject: "fleet".to_owned(),
            position: Some(position),
            outcome: outcome.map(str::to_owned),
            detail,
        };
        let detail = json!({
            "agents": agents, "full": full, "reason": accept, "login_uid": operator.login_uid,
        });
        self.recorder.note(note("force-sync", None, detail)).await;
        tracing::info!(%operator, agents = agents.len(), full, "force-sync");

        let (reply, forced) = oneshot::channel();
        let event = Event::Force {
            agents,
            full,
            reply,
        };
        let told = self.hub.tell(event).await;
        let (Ok(()), Ok(forced)) = (told, forced.await) else {
            return session.finish(stopping(Stopping)).await;
        };
        let (mut work, first) = Work::new(forced.offers, forced.offline);
        let mut listener = Some(session);
        tell(&mut listener, &first).await;
        if !wait && let Some(session) = listener.take() {
            // Whoever did not wait does not hear more, and nothing depends on it.
            let _ = session.finish(Finish::done(ends(&work, position))).await;
        }
        let end = self.follow(&mut work, &mut listener, timeout, stop).await;

        let failed: Vec<_> = work.ended().iter().filter(|end| !end.conformant).collect();
        let outcome = match end {
            Err(Stopping) => "interrupted",
            Ok(()) if failed.is_empty() => "done",
            Ok(()) => "failed",
        };
        let names: Vec<_> = failed.iter().map(|end| &end.agent).collect();
        let detail = json!({ "done": work.ended().len() - failed.len(), "failed": names });
        self.recorder
            .note(note("force-sync-end", Some(outcome), detail))
            .await;
        let Some(session) = listener else {
            return Ok(());
        };
        let finish = match end {
            Err(stop) => stopping(stop),
            Ok(()) => Finish {
                exit: if failed.is_empty() {
                    exit::DONE
                } else {
                    exit::NOT_CONFORMANT
                },
                result: ends(&work, position),
                message: (!failed.is_empty())
                    .then(|| format!("{} of {} agents failed", failed.len(), work.ended().len())),
            },
        };
        session.finish(finish).await
    }

    /// The generation and the agents of a `force-sync`, or why there is nothing to do.
    async fn forced(
        &self,
        selection: &Selection,
        generation: Option<u64>,
    ) -> Result<(Position, Vec<AgentName>), Finish> {
        let view = self.hub.view().await.map_err(stopping)?;
        let Some(current) = view.current.as_ref().map(|manifest| manifest.position()) else {
            let message = "no generation is published yet; `publish` makes one";
            return Err(Finish::because(exit::FAILED, message));
        };
        if generation.is_some_and(|number| number != current.generation.number()) {
            let message = format!(
                "only the current generation, {current}, can be forced: agents never go back to a \
                 lower number"
            );
            return Err(Finish::because(exit::REFUSED, message));
        }
        match selection.resolve(&view.rows) {
            Ok(agents) => Ok((current, Vec::from_iter(agents))),
            Err(error) => Err(Finish::because(exit::USAGE, crate::chain(&error))),
        }
    }

    /// Follows the agents until each is done or the time is over.
    async fn follow(
        &self,
        work: &mut Work,
        listener: &mut Option<Session>,
        timeout: u64,
        stop: &CancellationToken,
    ) -> Result<(), Stopping> {
        let mut hub = self.hub.clone();
        let deadline = tokio::time::sleep(Duration::from_secs(timeout));
        tokio::pin!(deadline);
        loop {
            let view = self.hub.view().await?;
            tell(listener, &work.look(&view.rows)).await;
            if deadline.is_elapsed() {
                tell(listener, &work.time_out(&view.rows)).await;
            }
            if work.is_done() {
                return Ok(());
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return Err(Stopping),
                changed = hub.changed() => {
                    changed?;
                    tokio::time::sleep(CHANGES_SETTLE).await;
                }
                () = &mut deadline => {}
                () = hang_up(listener) => *listener = None,
            }
        }
    }

    /// The three questions of a morning: what is the fleet at, who is not there and why, and how
    /// old are its signatures; and what will be a question of some morning soon.
    async fn status(&self) -> Result<Finish, Stopping> {
        let view = self.hub.view().await?;
        let now = Timestamp::now();
        let mut result = json!({ "fleet": self.fleet, "generation": null });
        let fields = result.as_object_mut().expect("made as one");
        if let Some(manifest) = &view.current {
            describe(fields, manifest);
            fields.insert("signatures".to_owned(), signatures(manifest, now));
        }
        if let Some(refusal) = self.pipeline.refusal() {
            let refused = json!({
                "reason": refusal.reason, "since": refusal.since, "kind": refusal.kind,
            });
            fields.insert("refused".to_owned(), refused);
        }
        let trouble = self.pipeline.trouble();
        if let Some(alarm) = self.recorder.alarm().or(trouble) {
            fields.insert("alarm".to_owned(), alarm.into());
        }
        // The whole fleet is one wave.
        let state = match (&view.current, view.unsettled.is_empty()) {
            (None, _) => "none",
            (Some(_), false) => "running",
            (Some(_), true) => "complete",
        };
        let rollout = json!({ "state": state, "wave": 1, "waves": 1 });
        fields.insert("rollout".to_owned(), rollout);
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
        let soon = |ends: Timestamp| ends.duration_since(now) < CERTIFICATE_SOON;
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
        filter: Filter,
        follow: bool,
        stop: &CancellationToken,
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
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
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

/// What `force-sync` answers.
fn ends(work: &Work, position: Position) -> Value {
    json!({ "epoch": position.epoch, "generation": position.generation, "agents": work.ended() })
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
fn settled(mut result: Value, view: &View) -> Finish {
    let lagging = view
        .rows
        .iter()
        .filter(|row| row.connected && !row.conformant);
    let lagging: Vec<_> = lagging.collect();
    let fields = result.as_object_mut().expect("made as one");
    fields.insert("agents".to_owned(), json!(view.counts));
    let names: Vec<_> = lagging.iter().map(|row| &row.name).collect();
    fields.insert("failed".to_owned(), json!(names));
    if lagging.is_empty() {
        return Finish::done(result);
    }
    let line = |row: &&Row| {
        let error = row.error.as_deref().unwrap_or("not there yet");
        printable(&format!("{}: {}: {error}", row.name, row.outcome))
    };
    let message = Some(lagging.iter().map(line).collect::<Vec<_>>().join("\n"));
    let exit = exit::NOT_CONFORMANT;
    Finish {
        exit,
        result,
        message,
    }
}

fn stopping(_: Stopping) -> Finish {
    Finish::because(exit::UNREACHABLE, "the daemon is stopping")
}
