//! The daemon: puts the parts together, and takes them apart in order.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use clamcast_daemon::admin::{AdminError, Listener};
use clamcast_daemon::audit::{self, AuditError, Draft};
use clamcast_daemon::durable;
use clamcast_daemon::service::Occasion;
use jiff::Timestamp;
use quinn::{Endpoint, ServerConfig};
use serde_json::json;
use tokio::sync::{Notify, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::config::{
    self, Config, KeyError, audit_origin, check_fleet, load_audit_key, load_keys, load_manifest_key,
};
use crate::fleet::agents::Fleet;
use crate::fleet::hub::{self, Event, Hub};
use crate::fleet::rollout::{Failed, Rollout};
use crate::link::connection::{self, Shared};
use crate::link::endpoint::{self, EndpointError};
use crate::link::meter::Meters;
use crate::link::push::Pusher;
use crate::link::rejections::Rejections;
use crate::link::revocations::{Look, Revocations};
use crate::operate::admin::{self, Commands, Life, Orders};
use crate::publish::mirror;
use crate::publish::pipeline::{self, Pipeline};
use crate::publish::publisher::{self, Publisher, Rejected};
use crate::record::archive::Archive;
use crate::record::recorder::{self, Job, Places, Recorder};
use crate::store::{Store, StoreError};

/// Time between looks at the revocation list; a revoked agent is cut off within 5 s.
const REVOKED_LOOK: Duration = Duration::from_secs(1);

/// How long a stopping daemon waits for a disk that refuses the audit log.
const DISK_PATIENCE: Duration = Duration::from_secs(5);

/// How long a port that is in use is waited for: connections that were being made when the endpoint
/// before it was closed may keep it for three probe timeouts (RFC 9000 section 10.2).
const PORT_PATIENCE: Duration = Duration::from_secs(10);

/// Manifests of agents that are ahead of this master and wait to be looked at.
const FORGOTTEN_MAX: usize = 16;

/// What the rollout wants published and waits for it: it asks again for what it still lacks.
const WISHES_MAX: usize = 4;

/// Where the rollout is, in the state directory.
const ROLLOUT: &str = "rollout.json";

/// The daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A directory of the state.
    #[error("state: cannot use {path}; it and what is in it must belong to the daemon's user")]
    State {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The store.
    #[error("cannot open the store")]
    Store(#[from] StoreError),
    /// A key or key set.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// TLS or the socket.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The operators' socket.
    #[error("cannot listen to operators")]
    Admin(#[from] AdminError),
    /// The audit log.
    #[error("cannot use the audit log")]
    Audit(#[from] AuditError),
    /// What was published, and the key that signs it.
    #[error("cannot publish")]
    Publish(#[from] publisher::StartError),
}

/// A running master.
#[derive(Debug)]
pub struct Master {
    address: SocketAddr,
    hub: Hub,
    stop: CancellationToken,
    tasks: JoinSet<()>,
    admin: JoinHandle<Listener>,
    life: Life,
    hub_task: JoinHandle<()>,
    hub_stop: CancellationToken,
    recorder: Recorder,
    recorder_thread: thread::JoinHandle<()>,
}

impl Master {
    /// Starts everything. When this returns, agents and operators are listened to and the first
    /// look at the mirror is under way. `kept` is the operators' socket from before a reload.
    pub async fn start(config: Config, kept: &mut Option<Listener>) -> Result<Self, StartError> {
        let state = |directory: &str| {
            let path = config.state.join(directory);
            durable::create_dir(&path, 0o700).map_err(|source| StartError::State {
                path: path.clone(),
                source,
            })?;
            Ok::<_, StartError>(path)
        };
        let [_, agents, certificates, audit_dir] = [
            state("")?,
            state("agents")?,
            state("certificates")?,
            state("audit")?,
        ];
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| StartError::State { path, source }
        };

        let keys = load_keys("signing.keys", &config.signing.keys)?;
        check_fleet(&config, &keys)?;
        let manifest_key = load_manifest_key(&config.signing, &keys)?;
        let audit_key = load_audit_key(&config.signing, &keys)?;
        let (server, own) = endpoint::server_config(&config.tls, &config.fleet)?;
        let (_, ca) = endpoint::load_ca(&config.tls.ca)?;

        // The store's lock on the state directory comes before anything is written there.
        let store = Arc::new(Store::open(&config.state, &keys)?);
        let log = audit::Log::open(&audit_dir, audit_key, audit_origin(&config.fleet))?;
        let path = config.state.join(ROLLOUT);
        let (mut rollout, lost) = load_rollout(&store, Timestamp::now())?;
        store.need(hub::needed(&rollout, &store));
        let publisher = Arc::new(Publisher::new(
            &config,
            store.clone(),
            manifest_key,
            keys.clone(),
        )?);
        if lost.is_some() {
            rollout.are_taken_back(publisher.rejected().iter().map(|it| it.position));
        }
        if let Some(rejected) = unremembered(&rollout, &publisher) {
            publisher.reject(rejected)?;
        }
        // A copy of the key set for `audit verify` on a disk that was taken out.
        let envelope = serde_json::to_vec(keys.envelope()).expect("an envelope serialises");
        let copy = config.state.join("keys.json");
        durable::ensure(&copy, &envelope, 0o600).map_err(failed(&copy))?;

        let records = recorder::load(&agents).map_err(failed(&agents))?;
        let archive = Archive::load(&certificates).map_err(failed(&certificates))?;
        let endpoint = bind(&config, server).await?;
        let address = endpoint
            .local_addr()
            .map_err(|source| EndpointError::Bind {
                address: config.listen.quic,
                source,
            })?;
        let (socket, group) = (&config.listen.admin, &config.listen.admin_group);
        let listener = Listener::open(config::DAEMON.program, socket, Some(group), kept)?;

        let places = Places {
            agents: agents.clone(),
            certificates,
            rollout: path,
        };
        // From here on nothing fails: a start that came to nothing must not leave a task behind that
        // holds the state directory.
        let (recorder, recorder_thread) = Recorder::start(log, places);
        let keys = Arc::new(keys);
        publisher.hold(rollout.held().map(|held| held.reason.clone()));
        let mut revocations = Revocations::open(
            config.tls.revoked.clone(),
            &config.state,
            config.fleet.clone(),
            ca.key.clone(),
        );
        let look = revocations.look();
        note_look(&look, &revocations, &recorder).await;
        let fleet = Fleet::new(
            records,
            rollout,
            config.rollout.clone(),
            publisher.offerable(),
        );
        let replay = replay(&fleet, &publisher);
        let hub_stop = CancellationToken::new();
        let (forget, forgotten) = mpsc::channel(FORGOTTEN_MAX);
        let (wishes, wished) = mpsc::channel(WISHES_MAX);
        let means = hub::Means {
            keys: keys.clone(),
            recorder: recorder.clone(),
            ahead: forget,
            publisher: publisher.clone(),
            fresh: config.signing.fresh,
            wishes,
        };
        let (hub, hub_task) = hub::start(fleet, means, hub_stop.clone());
        if let Some(list) = revocations.list() {
            let _ = hub.tell(Event::Revoked(list.clone())).await;
        }

        if let Some(event) = replay {
            let _ = hub.tell(event).await;
        }

        let started = Job {
            draft: Some(Draft {
                event: "started".to_owned(),
                actor: "master".to_owned(),
                subject: config.fleet.to_string(),
                position: None,
                outcome: None,
                detail: json!({
                    "version": env!("CARGO_PKG_VERSION"),
                    "mirror": config.mirror.path,
                    "state": config.state,
                    "quic": address.to_string(),
                    "keys": keys.version,
                    "epoch": keys.epoch,
                    "certificate": own.fingerprint,
                    "certificate_ends": own.not_after,
                }),
            }),
            ..Job::default()
        };
        recorder.write(started).await; // without waiting for the disk, which may be full
        if let Some(reason) = lost {
            let mut draft = own_draft("alarm", None, json!({ "reason": reason }));
            draft.subject = ROLLOUT.to_owned();
            let draft = Some(draft);
            recorder
                .write(Job {
                    draft,
                    ..Job::default()
                })
                .await;
        }
        pipeline::recover(&publisher, &recorder).await;

        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let pipeline = Pipeline::new(publisher, hub.clone(), recorder.clone(), stop.clone());
        let (wake, woken) = mpsc::channel(1);
        let again = Arc::new(Notify::new());
        tasks.spawn(mirror::watch(
            config.mirror.clone(),
            wake,
            again.clone(),
            stop.clone(),
        ));
        tasks.spawn(pipeline.clone().run(woken, again, forgotten, wished));
        let shared = Shared {
            fleet: config.fleet.clone(),
            hub: hub.clone(),
            pusher: Pusher::new(store.clone(), config.push_concurrent),
            groups: config.groups.clone(),
            meters: Meters::default(),
            archive,
            recorder: recorder.clone(),
            rejections: Rejections::new(recorder.clone()),
        };
        tasks.spawn(connection::serve(endpoint, Arc::new(shared), stop.clone()));
        let life = Life::default();
        tasks.spawn(watch_revocations(
            revocations,
            recorder.clone(),
            hub.clone(),
            life.clone(),
            stop.clone(),
        ));
        let commands = Commands {
            denials: Arc::new(Rejections::new(recorder.clone())),
            fleet: config.fleet.clone(),
            hub: hub.clone(),
            pipeline,
            store,
            groups: config.groups.clone(),
            recorder: recorder.clone(),
            audit: audit_dir,
            life: life.clone(),
            stop: stop.clone(),
            orders: Orders::default(),
            certificate_ends: own.not_after,
            daemon: (&config).into(),
        };
        let admin = tokio::spawn(admin::serve(listener, commands));
        tracing::info!(%address, fleet = %config.fleet, mirror = %config.mirror.path.display(), "ready");
        Ok(Self {
            address,
            hub,
            stop,
            tasks,
            admin,
            life,
            hub_task,
            hub_stop,
            recorder,
            recorder_thread,
        })
    }

    /// Where agents are listened to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The fleet, to look at.
    pub fn hub(&self) -> &Hub {
        &self.hub
    }

    /// The configuration was read again, and this runs with it, or, for the reason given, with the
    /// old one. Audited; that it is not in use is an alarm as long as this runs.
    pub async fn reloaded(&self, outcome: Result<(), String>) {
        let (word, detail) = match outcome {
            Ok(()) => ("done", json!({})),
            Err(reason) => {
                self.life.configuration_is_unused(reason.clone());
                (
                    "failed",
                    json!({ "reason": reason, "in_use": "the old configuration" }),
                )
            }
        };
        let job = Job {
            draft: Some(own_draft("reload", Some(word), detail)),
            ..Job::default()
        };
        self.recorder.write(job).await;
    }

    /// Stops in order: no new agents, open connections and commands end, then the fleet's state, then
    /// the log. Returns the operators' socket, unless its task has died.
    pub async fn stop(mut self, occasion: Occasion) -> Option<Listener> {
        let give_up = self.recorder.give_up();
        let patience = tokio::spawn(async move {
            tokio::time::sleep(DISK_PATIENCE).await;
            give_up.store(true, Ordering::Relaxed);
        });
        self.life.ends(occasion);
        let died = self.admin.is_finished(); // as `failed` reported
        self.stop.cancel();
        let listener = match died {
            true => None,
            false => (&mut self.admin).await.ok(),
        };
        while let Some(ended) = self.tasks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a task of the daemon panicked; this is a bug");
            }
        }
        let reload = (occasion == Occasion::Reload).then_some("reload");
        self.recorder
            .note(own_draft("stopped", reload, json!({})))
            .await;
        self.hub_stop.cancel();
        if let Err(error) = self.hub_task.await {
            tracing::error!(%error, "the hub panicked; this is a bug");
        }
        drop(self.recorder);
        drop(self.hub);
        // All senders are gone, so the thread ends after its last batch.
        let joined = tokio::task::spawn_blocking(move || self.recorder_thread.join()).await;
        if !matches!(joined, Ok(Ok(()))) {
            tracing::error!("the recorder panicked; this is a bug");
        }
        patience.abort();
        listener
    }

    /// Returns when one of the daemon's tasks has ended by itself, which none does but by a bug.
    pub async fn failed(&mut self) -> String {
        tokio::select! {
            ended = self.tasks.join_next() => match ended {
                Some(Err(error)) => error.to_string(),
                Some(Ok(())) => "a task ended".to_owned(),
                None => std::future::pending().await,
            },
            ended = &mut self.admin => match ended {
                Err(error) => error.to_string(),
                Ok(_) => "the admin socket ended".to_owned(),
            },
            () = self.recorder.ended() => "the recorder ended".to_owned(),
            () = self.hub.ended() => "the hub ended".to_owned(),
        }
    }
}

/// What the audit log says of the master itself.
fn own_draft(event: &str, outcome: Option<&str>, detail: serde_json::Value) -> Draft {
    Draft {
        event: event.to_owned(),
        actor: "master".to_owned(),
        subject: "master".to_owned(),
        position: None,
        outcome: outcome.map(str::to_owned),
        detail,
    }
}

/// Where the rollout stood; and why that is not known, if so. Then nobody is offered anything and
/// nothing is published or removed until an operator says so: what was halted, pinned or held must
/// not come through because a file is gone.
fn load_rollout(store: &Store, now: Timestamp) -> Result<(Rollout, Option<String>), StoreError> {
    let reason = match store.load(ROLLOUT) {
        Ok(Some(rollout)) => return Ok((rollout, None)),
        Ok(None) if store.taken().is_none() => {
            // From now on there is one for as long as there are generations.
            let rollout = Rollout::default();
            store.save(ROLLOUT, &rollout)?;
            return Ok((rollout, None));
        }
        Ok(None) => format!("{} is gone", store.directory().join(ROLLOUT).display()),
        Err(error) => {
            let kept = match store.keep_damaged(ROLLOUT) {
                Ok(kept) => format!("it is kept as {}", kept.display()),
                Err(error) => format!(
                    "copy it before you order anything: {}",
                    crate::chain(&error)
                ),
            };
            format!("{}; {kept}", crate::chain(&error))
        }
    };
    let reason = format!(
        "{reason}; which generations agents are wanted at, and which groups were pinned, is not \
         known, so nothing is offered; `pin` again what was pinned"
    );
    tracing::error!("{reason}, and then `rollout resume`");
    Ok((Rollout::lost(reason.clone(), now), Some(reason)))
}

/// What ended badly and was not remembered before the last end: the disk may have refused it.
fn unremembered(rollout: &Rollout, publisher: &Publisher) -> Option<Rejected> {
    let Failed {
        target, how, since, ..
    } = rollout.failed()?;
    let manifests = publisher.store().manifests();
    let again = manifests
        .iter()
        .any(|it| it.content == target.content && it.position() > target.position);
    let known = publisher.rejected();
    let known = known.iter().any(|it| it.content == target.content);
    // Published again it was on the word of an operator.
    (!known && !again).then(|| Rejected {
        content: target.content,
        position: target.position,
        outcome: how.word().to_owned(),
        since: *since,
    })
}

/// What the rollout may not have heard before the last end: the generation published last.
fn replay(fleet: &Fleet, publisher: &Publisher) -> Option<Event> {
    let rollout = fleet.rollout();
    if let (Some(owed), Some(manifest)) = (rollout.owed(), publisher.current())
        && manifest.rollback_of == Some(owed.of.position)
        && manifest.content == owed.to.content
    {
        return Some(Event::WentBack(manifest));
    }
    if rollout.held().is_some() {
        return None; // nothing was published since, and where that stood may not be known
    }
    let manifest = publisher.newest()?;
    let supersede = false;
    Some(Event::Published {
        manifest,
        supersede,
    })
}

/// Opens the endpoint. After a reload the port may still be the last endpoint's for a moment.
async fn bind(config: &Config, server: ServerConfig) -> Result<Endpoint, EndpointError> {
    let deadline = Instant::now() + PORT_PATIENCE;
    loop {
        match endpoint::bind(config.listen.quic, server.clone(), &config.state) {
            Err(EndpointError::Bind { source, .. })
                if source.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline =>
            {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            bound => return bound,
        }
    }
}

async fn watch_revocations(
    mut revocations: Revocations,
    recorder: Recorder,
    hub: Hub,
    life: Life,
    stop: CancellationToken,
) {
    loop {
        life.revocations_are(revocations.alarm());
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = tokio::time::sleep(REVOKED_LOOK) => {}
        }
        // A look is a stat of one file, and a read of it when it changed.
        let look = tokio::task::block_in_place(|| revocations.look());
        // First the connections are closed, then it is written down: a full disk must not keep a
        // stolen host in.
        if let (Look::Newer, Some(list)) = (&look, revocations.list()) {
            let _ = hub.tell(Event::Revoked(list.clone())).await; // if it has stopped, so do we
        }
        note_look(&look, &revocations, &recorder).await;
    }
}

/// Writes down what a look at the list brought.
async fn note_look(look: &Look, revocations: &Revocations, recorder: &Recorder) {
    let (event, detail) = match look {
        Look::Same => return,
        Look::Newer => {
            let list = revocations.list().expect("just taken");
            let (version, revoked) = (list.version, list.revoked.len());
            tracing::info!(version, revoked, "revocation list");
            (
                "revocation_list",
                json!({ "version": version, "revoked": revoked }),
            )
        }
        Look::Alarm(reason) => {
            tracing::error!("{reason}");
            ("alarm", json!({ "reason": reason }))
        }
    };
    let draft = Draft {
        event: event.to_owned(),
        actor: "master".to_owned(),
        subject: "revoked.json".to_owned(),
        position: None,
        outcome: None,
        detail,
    };
    let job = Job {
        draft: Some(draft),
        ..Job::default()
    };
    recorder.write(job).await;
}
