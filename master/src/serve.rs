//! Decides in which order the parts of the daemon start and stop.
//! Opens files, sockets and tasks, and joins them at the end.
//! Must not know what the parts say to each other.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use clamcast_daemon::admin::{AdminError, Listener};
use clamcast_daemon::alarms::Alarms;
use clamcast_daemon::audit::{self, AuditError, Bad, Fault};
use clamcast_daemon::durable;
use clamcast_daemon::pulse::Pulse;
use clamcast_daemon::service::{self, Occasion};
use clamcast_proto::AuditEvent;
use clamcast_proto::audit::Draft;
use jiff::Timestamp;
use quinn::{Endpoint, ServerConfig};
use serde_json::json;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::config::{
    self, Config, KeyError, audit_origin, check_fleet, load_audit_key, load_keys, load_manifest_key,
};
use crate::fleet::agents::Fleet;
use crate::fleet::hub::{self, Event, Hub};
use crate::fleet::recovery;
use crate::fleet::rollout::Rollout;
use crate::link::connection::{self, Shared};
use crate::link::endpoint::{self, EndpointError};
use crate::link::meter::Meters;
use crate::link::push::Pusher;
use crate::link::rejections::Rejections;
use crate::link::revocations::{Look, Revocations};
use crate::operate::admin::{self, Commands, Life, Orders, Waits};
use crate::publish::mirror::{self, activity::Activity};
use crate::publish::pipeline::{self, Pipeline};
use crate::publish::publisher::{self, Publisher};
use crate::publish::withdrawn::Withdrawn;
use crate::record::archive::Archive;
use crate::record::entry::{Entry, ROLLOUT, WITHDRAWN};
use crate::record::recorder::{self, Places, Recorder};
use crate::store::{Store, StoreError};

/// Time between looks at the revocation list; a revoked agent is cut off within 5 s.
const REVOKED_LOOK: Duration = Duration::from_secs(1);

/// How long a stopping daemon waits for a disk that refuses the audit log.
const DISK_PATIENCE: Duration = Duration::from_secs(5);

/// How long a port that is in use is waited for: connections that were being made when the endpoint
/// before it was closed may keep it for three probe timeouts (RFC 9000 section 10.2).
const PORT_PATIENCE: Duration = Duration::from_secs(10);

/// The alarm about a configuration that cannot be used.
const CONFIGURATION: &str = "configuration";

/// The alarm about the revocation list.
const REVOCATIONS: &str = "revocations";

/// Manifests of agents that are ahead of this master and wait to be looked at.
const FORGOTTEN_MAX: usize = 16;

/// What the rollout wants published and waits for it: it asks again for what it still lacks.
const WISHES_MAX: usize = 4;

/// News of publications that wait for the hub.
const NEWS_MAX: usize = 16;

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
    #[error("cannot use the audit log{}", audit_hint(.0))]
    Audit(#[from] AuditError),
    /// What was published, and the key that signs it.
    #[error("cannot publish")]
    Publish(#[from] publisher::StartError),
}

/// A log is intact if a key that was dropped from the key set signed it last.
fn audit_hint(error: &AuditError) -> &'static str {
    if let AuditError::Bad { bad, .. } = error
        && let Bad {
            fault: Fault::Checkpoint(_),
            ..
        } = **bad
    {
        " (if its key was dropped from the key set, copy the key set of `clamcast-certs rotate --dir \
         DIR audit --restore-old` to this host)"
    } else {
        ""
    }
}

/// A running master.
#[derive(Debug)]
pub struct Master {
    address: SocketAddr,
    hub: Hub,
    pulse: Pulse,
    stop: CancellationToken,
    tasks: JoinSet<()>,
    admin: JoinHandle<Listener>,
    life: Life,
    alarms: Alarms,
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
        let alarms = Alarms::default();
        let mirror_path = &config.mirror.path;
        let store = Store::open(&config.state, mirror_path, &keys, alarms.clone())?;
        let store = Arc::new(store);
        for directory in [&config.state, &agents, &certificates, &audit_dir] {
            durable::sweep(directory);
        }
        let origin = audit_origin(&config.fleet);
        // Another key of the set may have signed it last.
        let log = audit::Log::open_after(&audit_dir, audit_key, &keys.audit, origin)?;
        let saved = load_rollout(&store)?;
        let lost = saved.as_ref().err().cloned();
        let withdrawn = load_withdrawn(&store);
        let rollout = recovery::rollout(saved, &withdrawn, Timestamp::now());
        if *rollout.withdrawn() != withdrawn {
            store.save(WITHDRAWN, rollout.withdrawn())?;
        }
        store.need(hub::needed(&rollout, &store));
        let (directives, directed) = watch::channel(rollout.directives());
        let activity = Activity::new(config.mirror.quiet, config.mirror.units.clone());
        let publisher = Arc::new(Publisher::new(
            &config,
            store.clone(),
            manifest_key,
            keys.clone(),
            directed,
            activity.clone(),
        )?);
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
        let load_test = &config.mirror.load_test_socket;
        if std::env::var_os("NOTIFY_SOCKET").is_some() && !load_test.exists() {
            tracing::warn!(
                socket = %load_test.display(),
                "the socket of the load test service does not exist; the daemon runs load tests itself"
            );
        }

        let places = Places {
            agents: agents.clone(),
            certificates,
            state: config.state.clone(),
        };
        // From here on nothing fails: a start that came to nothing must not leave a task behind that
        // holds the state directory.
        let (recorder, recorder_thread) = Recorder::start(log, places);
        let keys = Arc::new(keys);
        let mut revocations = Revocations::open(
            config.tls.revoked.clone(),
            &config.state,
            config.fleet.clone(),
            ca.key.clone(),
        );
        note_look(&revocations.look(), &revocations, &recorder, &alarms);
        let fleet = Fleet::new(
            records,
            rollout,
            config.rollout.clone(),
            publisher.offerable(),
        );
        let replay = recovery::replay(fleet.rollout(), &publisher.offerable());
        let hub_stop = CancellationToken::new();
        let pulse = Pulse::default();
        let (forget, forgotten) = mpsc::channel(FORGOTTEN_MAX);
        let (wishes, wished) = mpsc::channel(WISHES_MAX);
        let (news, heard) = mpsc::channel(NEWS_MAX);
        let means = hub::Means {
            keys: keys.clone(),
            recorder: recorder.clone(),
            ahead: forget,
            publisher: publisher.clone(),
            fresh: config.signing.fresh,
            news: heard,
            wishes,
            directives,
            pulse: pulse.clone(),
        };
        let (hub, hub_task) = hub::start(fleet, means, hub_stop.clone());
        if let Some(list) = revocations.list() {
            let _ = hub.tell(Event::Revoked(list.clone())).await;
        }

        if let Some(replay) = replay {
            let _ = news.send(replay).await;
        }

        let started = Draft {
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
            ..Draft::new(AuditEvent::Started, "master", &config.fleet)
        };
        recorder.write(Entry::line(started));
        if let Some(reason) = lost {
            let draft = Draft::new(AuditEvent::Alarm, "master", ROLLOUT);
            let detail = json!({ "reason": reason });
            recorder.write(Entry::line(Draft { detail, ..draft }));
        }
        let recovered = pipeline::recover(&publisher, &recorder);

        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let pipeline = Pipeline::new(
            publisher.clone(),
            news,
            recorder.clone(),
            alarms.clone(),
            stop.clone(),
        );
        let (wake, woken) = mpsc::channel(1);
        let again = Arc::new(Notify::new());
        tasks.spawn(mirror::watch(
            config.mirror.clone(),
            wake,
            again.clone(),
            activity.clone(),
            stop.clone(),
        ));
        tasks.spawn(
            pipeline
                .clone()
                .run(recovered, woken, again, forgotten, wished),
        );
        let shared = Shared {
            fleet: config.fleet.clone(),
            hub: hub.clone(),
            keys: keys.clone(),
            publisher,
            pusher: Arc::new(Pusher::new(store.clone(), config.push_concurrent)),
            groups: config.groups.clone(),
            meters: Meters::default(),
            archive,
            recorder: recorder.clone(),
            rejections: Rejections::new(recorder.clone()),
        };
        let serving = connection::serve(endpoint, Arc::new(shared), stop.clone());
        let (serving, serves_agents) = service::announced(serving);
        tasks.spawn(serving);
        let life = Life::default();
        tasks.spawn(watch_revocations(
            revocations,
            recorder.clone(),
            hub.clone(),
            alarms.clone(),
            stop.clone(),
        ));
        tasks.spawn(record_alarms(
            alarms.clone(),
            recorder.clone(),
            stop.clone(),
        ));
        let commands = Commands {
            denials: Arc::new(Rejections::new(recorder.clone())),
            fleet: config.fleet.clone(),
            hub: hub.clone(),
            pipeline,
            store,
            units: config.mirror.units.clone(),
            groups: config.groups.clone(),
            recorder: recorder.clone(),
            audit: audit_dir,
            life: life.clone(),
            alarms: alarms.clone(),
            activity,
            waits: Waits::default(),
            age_alarm: config.mirror.age_alarm,
            stop: stop.clone(),
            orders: Orders::default(),
            certificate_ends: own.not_after,
            daemon: (&config).into(),
        };
        let (serving, serves_operators) = service::announced(admin::serve(listener, commands));
        let admin = tokio::spawn(serving);
        for serves in [serves_agents, serves_operators] {
            let _ = serves.await; // `failed` reports a task that has died
        }
        tracing::info!(%address, fleet = %config.fleet, mirror = %config.mirror.path.display(), "ready");
        Ok(Self {
            address,
            hub,
            pulse,
            stop,
            tasks,
            admin,
            life,
            alarms,
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

    /// The beats of the task that owns the fleet.
    pub fn pulse(&self) -> Pulse {
        self.pulse.clone()
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
                let text = format!("configuration on disk is not in use: {reason}");
                let now = Timestamp::now();
                self.alarms.raise(CONFIGURATION, "", text, now);
                (
                    "failed",
                    json!({ "reason": reason, "in_use": "the old configuration" }),
                )
            }
        };
        let draft = own_draft(AuditEvent::Reload, Some(word), detail);
        self.recorder.write(Entry::line(draft));
    }

    /// Stops in order: no new agents, open connections and commands end, then the fleet's state, then
    /// the log. Returns the operators' socket, unless its task has died.
    pub async fn stop(mut self, occasion: Occasion) -> Option<Listener> {
        let give_up = self.recorder.give_up(); // the recorder itself would keep the thread alive
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
        let stopped = own_draft(AuditEvent::Stopped, reload, json!({}));
        let _ = self.recorder.note(stopped).await; // an error: the disk refuses
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
fn own_draft(event: AuditEvent, outcome: Option<&str>, detail: serde_json::Value) -> Draft {
    Draft {
        outcome: outcome.map(str::to_owned),
        detail,
        ..Draft::new(event, "master", "master")
    }
}

/// The second copy of what was withdrawn. The rollout has the first, so a damaged one stops nothing.
fn load_withdrawn(store: &Store) -> Withdrawn {
    store.load(WITHDRAWN).map_or_else(
        |error| {
            let error = crate::chain(&error);
            tracing::error!(
                error,
                "the list of withdrawn generations is damaged; rollout.json has it"
            );
            Withdrawn::default()
        },
        Option::unwrap_or_default,
    )
}

/// The rollout as it was saved; or why that is not known.
fn load_rollout(store: &Store) -> Result<Result<Rollout, String>, StoreError> {
    let reason = match store.load(ROLLOUT) {
        Ok(Some(rollout)) => return Ok(Ok(rollout)),
        Ok(None) if store.taken().is_none() => {
            // From now on there is one for as long as there are generations.
            let rollout = Rollout::default();
            store.save(ROLLOUT, &rollout)?;
            return Ok(Ok(rollout));
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
    Ok(Err(reason))
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
    alarms: Alarms,
    stop: CancellationToken,
) {
    loop {
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
        note_look(&look, &revocations, &recorder, &alarms);
    }
}

/// Writes down what a look at the list brought.
fn note_look(look: &Look, revocations: &Revocations, recorder: &Recorder, alarms: &Alarms) {
    match look {
        Look::Same => {}
        Look::Newer => {
            let list = revocations.list().expect("just taken");
            let (version, revoked) = (list.version, list.revoked.len());
            tracing::info!(version, revoked, "revocation list");
            let draft = Draft {
                detail: json!({ "version": version, "revoked": revoked }),
                ..Draft::new(AuditEvent::RevocationList, "master", "revoked.json")
            };
            recorder.write(Entry::line(draft));
        }
        Look::Alarm(reason) => {
            return alarms.raise(REVOCATIONS, "", reason.clone(), Timestamp::now());
        }
    }
    if revocations.alarm().is_none() {
        alarms.end(REVOCATIONS, "");
    }
}

/// Writes alarms into the audit log.
async fn record_alarms(alarms: Alarms, recorder: Recorder, stop: CancellationToken) {
    loop {
        let raised = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            raised = alarms.raised() => raised,
        };
        for alarm in raised {
            let draft = Draft {
                detail: json!({ "reason": alarm.text }),
                ..Draft::new(AuditEvent::Alarm, "master", &alarm.name)
            };
            recorder.write(Entry::line(draft));
        }
    }
}
