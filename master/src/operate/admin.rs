//! Carries out the commands of operators and answers them.

mod force;
mod publish;
mod rollout;
mod waits;

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use clamcast_daemon::admin::{AdminError, Finish, Listener, Session};
use clamcast_daemon::alarms::Alarms;
use clamcast_daemon::audit;
use clamcast_daemon::exit;
use clamcast_daemon::service::Occasion;
use clamcast_proto::FleetName;
use clamcast_proto::dsse::Verified;
use clamcast_proto::manifest::Manifest;
use jiff::Timestamp;
use serde_json::Value;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::config::Groups;
use crate::config::units::Units;
use crate::fleet::force::{Meant, Selection};
use crate::fleet::hub::{Hub, Stopping, View};
use crate::fleet::rollout::PINS_MAX;
use crate::link::rejections::Rejections;
use crate::operate::api::{AuditPiece, HeldUnit, Request, Wait};
use crate::operate::preflight::Running;
use crate::operate::report;
use crate::publish::mirror::activity::{Activity, MirrorWaits};
use crate::publish::pipeline::Pipeline;
use crate::publish::publisher::{self, Accept, Hold};
use crate::record::events::Filter;
use crate::record::recorder::Recorder;
use crate::store::{RECORD_BYTES_MAX, Store};

pub use force::{ORDERS_MAX, Orders};
pub use waits::Waits;

/// Commands served at a time. A waiting `publish` is one of them.
const SESSIONS_MAX: usize = 64;

/// Longest reason in bytes: a long sentence. A record of the audit log holds it as well as the state
/// of the rollout.
pub const REASON_BYTES_MAX: usize = 1000;

/// The state of the rollout, with as many pins as may be and the longest reasons, in which each byte may
/// need six in JSON, has half of what a record may have for the rest.
const _: () = assert!(PINS_MAX * (6 * REASON_BYTES_MAX + 1000) < RECORD_BYTES_MAX as usize / 2);

/// Longest time that a `force-sync` follows its agents: a weekend.
const TIMEOUT_MAX: Duration = Duration::from_secs(72 * 3600);

/// While it waits, `publish` looks again at least this often, for silence is no event.
const LOOK: Duration = Duration::from_secs(5);

/// Time between looks for new records by `audit show --follow`.
const FOLLOW: Duration = Duration::from_millis(300);

/// After a change others follow within moments. One look serves them all.
const CHANGES_SETTLE: Duration = Duration::from_millis(50);

/// Time between looks whether the disk refuses an order that waits to be written.
const WRITING: Duration = Duration::from_millis(300);

/// Records of the audit log sent with one line of progress.
const AUDIT_CHUNK: usize = 500;

/// The parts of the daemon that commands need.
#[derive(Clone, Debug)]
pub struct Commands {
    /// The fleet's name.
    pub fleet: FleetName,
    /// The fleet.
    pub hub: Hub,
    /// Publishes.
    pub pipeline: Pipeline,
    /// The published generations.
    pub store: Arc<Store>,
    /// Groups of the configuration.
    pub groups: Groups,
    /// Which files of the mirror belong together.
    pub units: Units,
    /// Says whether the log can be written.
    pub recorder: Recorder,
    /// The audit log's directory.
    pub audit: PathBuf,
    /// The daemon's configuration and its end.
    pub life: Life,
    /// Alarms of the daemon.
    pub alarms: Alarms,
    /// What goes on in the mirror.
    pub activity: Activity,
    /// Commands that wait.
    pub waits: Waits,
    /// Signatures, or a hold, that are older than this are an alarm.
    pub age_alarm: Duration,
    /// Ends the commands that are under way.
    pub stop: CancellationToken,
    /// The `force-sync`s under way.
    pub orders: Orders,
    /// Records the commands of unauthorised users.
    pub denials: Arc<Rejections>,
    /// When the master's own certificate ends.
    pub certificate_ends: Timestamp,
    /// Directories and sockets of the daemon.
    pub daemon: Running,
}

/// What the operators of a running daemon have to know of its life.
#[derive(Clone, Debug, Default)]
pub struct Life(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    ending: OnceLock<Occasion>,
}

impl Life {
    /// Commands that are still served end soon, for this reason.
    pub fn ends(&self, occasion: Occasion) {
        let _ = self.0.ending.set(occasion); // it ends once
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
        if !session.may_act {
            let request = session.request::<Request>();
            let command = request.as_ref().map_or("unknown", Request::word);
            self.denials.denied(&session.operator, command);
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
        let _waits = self.waits.begin(&request, &session.operator);
        let finish = match request {
            // Nothing that changes anything begins when the end has begun.
            Request::Publish { .. }
            | Request::Preview { .. }
            | Request::ForceSync(_)
            | Request::Rollout { .. }
                if self.stop.is_cancelled() =>
            {
                stopping(Stopping)
            }
            Request::Publish {
                wait,
                accept,
                units,
                supersede,
            } => {
                let accept = accept.map(|reason| Accept { reason, units });
                let request = publisher::Request {
                    accept,
                    supersede,
                    is_operators: true,
                };
                self.publish(&mut session, wait, request).await?
            }
            Request::Preview { accept, units } => {
                let accept = accept.map(|reason| Accept { reason, units });
                self.preview(accept).await
            }
            Request::Status => self.status().await.unwrap_or_else(stopping),
            Request::Agents => self
                .hub
                .view()
                .await
                .map_or_else(stopping, |view| Finish::done(view.rows)),
            Request::Generations => self.generations().await.unwrap_or_else(stopping),
            Request::ForceSync(request) => return self.force_sync(session, request).await,
            Request::RolloutStatus { timeout } => {
                self.rollout_status(&mut session, timeout).await?
            }
            Request::Rollout { change, reason } => self.change(&session, change, reason).await,
            Request::AuditShow { filter, follow } => {
                self.audit_show(&mut session, filter, follow).await?
            }
        };
        session.finish(finish).await
    }

    /// No order is taken that would be in nobody's log.
    fn can_write(&self) -> Result<(), Finish> {
        let Some(alarm) = self.recorder.alarm() else {
            return Ok(());
        };
        let message = format!("no order is taken while it cannot be written down: {alarm}");
        Err(Finish::because(exit::FAILED, message))
    }

    /// Returns when an entry is on disk; or why it is not, as soon as that is known.
    async fn written(&self, number: u64) -> Result<(), String> {
        loop {
            match timeout(WRITING, self.recorder.durable(number)).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(stopping)) => return Err(stopping.to_string()),
                Err(_) => {}
            }
            if let Some(alarm) = self.recorder.alarm() {
                return Err(alarm);
            }
        }
    }

    /// The complete generation, if the store still holds it.
    fn complete(&self, view: &View) -> Option<Arc<Verified<Manifest>>> {
        let target = view.rollout.complete()?;
        self.store.manifest(target.position)
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

    /// Answers the questions of a morning: which generation the fleet has, which hosts lack it and why,
    /// how old its signatures are, and what needs an operator soon.
    async fn status(&self) -> Result<Finish, Stopping> {
        let view = self.hub.view().await?;
        let now = Timestamp::now();
        let disk = self.recorder.alarms();
        let mirror = mirror_waits(self.activity.waiting(Instant::now()));
        let master = report::Master {
            fleet: self.fleet.clone(),
            daemon: self.daemon.clone(),
            refused: self.pipeline.refusal(),
            held: self.held(|hold| !hold.is_passing(now)),
            skipped: self.pipeline.skipped(),
            alarms: disk.into_iter().chain(self.alarms.all(now)).collect(),
            waits: mirror.into_iter().chain(self.waits.all()).collect(),
            age_alarm: self.age_alarm,
            certificate_ends: self.certificate_ends,
        };
        let complete = self.complete(&view);
        let complete = complete.as_ref().map(|manifest| &***manifest);
        let status = report::status(master, &view, complete, now);
        Ok(Finish::done(status))
    }

    /// The units that are held and that `is_shown`.
    fn held(&self, is_shown: impl Fn(&Hold) -> bool) -> Vec<HeldUnit> {
        let held = self.pipeline.holds().into_iter();
        let held = held.filter(|(_, hold)| is_shown(hold));
        let mut held: Vec<_> = held
            .map(|(unit, hold)| HeldUnit {
                reason: hold.held.cause.text,
                remedy: hold.held.cause.kind.remedy(&unit),
                since: hold.since,
                carries: hold.held.carries,
                unit,
            })
            .collect();
        held.sort_by_key(|it: &HeldUnit| !it.unit.is_official()); // it matters most
        held
    }

    async fn generations(&self) -> Result<Finish, Stopping> {
        let rollout = self.hub.view().await?.rollout;
        let withdrawn = self.pipeline.withdrawn();
        let manifests = self.store.manifests();
        let rows = manifests
            .iter()
            .map(|manifest| report::generation(manifest, &rollout, &withdrawn));
        Ok(Finish::done(rows.collect::<Vec<_>>()))
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
                        session.progress(&AuditPiece::Records(piece)).await?;
                    }
                    Some(_) if any => {}
                    Some(_) => {
                        let nothing = AuditPiece::Nothing(self.nothing(&filter).await);
                        session.progress(&nothing).await?;
                    }
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

/// The waits for the mirror, the longest first. The last one counts those that are left out.
fn mirror_waits(mirror: MirrorWaits) -> Vec<Wait> {
    let wait = |text, since, until| Wait {
        name: "mirror".to_owned(),
        text,
        since,
        until,
    };
    let last = mirror.waits.last().map(|it| it.since);
    let shown = mirror.waits.into_iter();
    let mut waits: Vec<_> = shown
        .map(|it| wait(it.reason, it.since, Some(it.until)))
        .collect();
    if let Some(since) = last.filter(|_| mirror.more > 0) {
        let text = format!("{} more units of the mirror wait", mirror.more);
        waits.push(wait(text, since, None));
    }
    waits
}
