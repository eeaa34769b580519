//! Decides the order in which the parts of the agent start and stop.
//! Opens everything on disk, and owns every task until its end.
//! Must not know what the parts tell each other.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use clamcast_daemon::admin::{AdminError, Listener};
use clamcast_daemon::exit::{self, Exit, OrExit as _};
use clamcast_daemon::input::InputError;
use clamcast_daemon::logging;
use clamcast_daemon::pulse::Pulse;
use clamcast_daemon::service::{self, Occasion, Service};
use clamcast_proto::identity::Certificate;
use jiff::Timestamp;
use nix::sys::prctl;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::{Mutex, mpsc};
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::clamd::{self, ClamdConf, Prover};
use crate::config::{self, ClamdConfFile, Config};
use crate::core::{self, Now};
use crate::host::state::{State, StateError};
use crate::install::watch::Watch;
use crate::install::{self, HostFault, HostStorage, Installer};
use crate::keeper::audit::{AuditLog, KeyError};
use crate::keeper::records::Records;
use crate::keeper::{Begin, Keeper, Question, trust};
use crate::link::endpoint::{self, CERTIFICATE_ENDS_SOON, Credentials, CredentialsError};
use crate::link::{self, Link};
use crate::operate::admin::{self, Commands};

/// Messages of the link that wait for the keeper; then the master waits.
const LINK_EVENTS_MAX: usize = 16;

/// Questions of operators that wait for the keeper.
const QUESTIONS_MAX: usize = 16;

/// Runs the daemon in the foreground until a signal stops it.
pub fn daemon(config: &Path, verbose: u8) -> Result<(), Exit> {
    logging::start(verbose);
    let runtime = Runtime::new()?;
    let result = runtime.block_on(service::run::<Agent>(|| load(config)));
    // What the grace period did not end is ended by the next start.
    runtime.shutdown_background();
    result
}

/// The configuration, if the files that it names can be used.
fn load(path: &Path) -> Result<Config, Exit> {
    let config = Config::load(path).or_exit(exit::USAGE)?;
    look(&config, Timestamp::now()).map_err(|error| Exit::new(error.exit_code(), error))?;
    for key in &config.without_effect {
        tracing::warn!("{key} has no effect in this version");
    }
    Ok(config)
}

/// The daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// What is to be trusted.
    #[error(transparent)]
    Trust(#[from] trust::OpenError),
    /// Who this host is.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// clamd's configuration.
    #[error(transparent)]
    ClamdConf(#[from] InputError),
    /// The database directory, or the journal of an install in it.
    #[error("cannot use the database directory")]
    Install(#[from] HostFault),
    /// The key of the local log.
    #[error("cannot open the local audit log")]
    Audit(#[from] KeyError),
    /// The operators' socket.
    #[error("cannot listen to operators")]
    Admin(#[from] AdminError),
    /// The socket to the master.
    #[error("cannot open a UDP socket")]
    Socket(#[source] std::io::Error),
}

impl StartError {
    /// The exit code that a daemon which does not start ends with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Trust(trust::OpenError::State(_)) => exit::FAILED,
            Self::Trust(_) | Self::Credentials(_) | Self::ClamdConf(_) => exit::USAGE,
            Self::State(_)
            | Self::Install(_)
            | Self::Audit(_)
            | Self::Admin(_)
            | Self::Socket(_) => exit::FAILED,
        }
    }
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    keeper: JoinHandle<()>,
    keeper_stop: CancellationToken,
    link: JoinHandle<()>,
    admin: JoinHandle<Listener>,
    admin_stop: CancellationToken,
    questions: mpsc::Sender<Question>,
    pulse: Pulse,
    ending: Arc<OnceLock<Occasion>>,
    stop: CancellationToken,
}

/// What the disk has to say before the network is touched.
struct Opened {
    begin: Begin,
    credentials: Arc<Credentials>,
    installer: Installer<HostStorage, Prover>,
    prover: Prover,
}

impl Agent {
    /// Starts everything. When this returns, an install that the last run left in the middle is
    /// whole on disk, unless the database directory cannot be used, and the daemon is ready; it need
    /// not have reached its master. `kept` is the
    /// operators' socket from before a reload.
    pub async fn start(config: Config, kept: &mut Option<Listener>) -> Result<Self, StartError> {
        let (addresses, socket) = (config.master.clone(), config.admin.clone());
        let keeper_stop = CancellationToken::new();
        let stops = keeper_stop.clone();
        let opened = tokio::task::spawn_blocking(move || open(config, stops));
        let opened = opened.await.unwrap_or_else(re_raise)?;
        let Opened {
            begin,
            credentials,
            installer,
            prover,
        } = opened;
        let endpoint = endpoint::bind().map_err(StartError::Socket)?;
        let listener = Listener::open(config::DAEMON.program, &socket, None, kept)?;

        let stop = CancellationToken::new();
        let admin_stop = CancellationToken::new();
        let (events, from_link) = mpsc::channel(LINK_EVENTS_MAX);
        let (questions, asked) = mpsc::channel(QUESTIONS_MAX);
        let pulse = begin.pulse.clone();
        let keeper = {
            let (keeper, runtime) = (Keeper::new(begin, keeper_stop.clone()), Handle::current());
            // It syncs files between two messages, so it has a thread of its own.
            tokio::task::spawn_blocking(move || {
                // For `top -H` and debuggers. Without the name the loop runs all the same.
                let _ = prctl::set_name(c"keeper");
                runtime.block_on(keeper.run(from_link, asked))
            })
        };
        let link = Link {
            endpoint,
            credentials,
            addresses,
            events,
        };
        let link = tokio::spawn(link::run(link, stop.clone()));
        let ending = Arc::new(OnceLock::new());
        let commands = Commands {
            questions: questions.clone(),
            installer,
            prover,
            reading: Mutex::default(),
            stop: admin_stop.clone(),
            ending: ending.clone(),
        };
        let (serving, serves) = service::announced(admin::serve(listener, commands));
        let admin = tokio::spawn(serving);
        let _ = serves.await; // `failed` reports a task that has died
        Ok(Self {
            keeper,
            keeper_stop,
            link,
            admin,
            admin_stop,
            questions,
            pulse,
            ending,
            stop,
        })
    }

    /// Returns if a part of the agent ends by itself, which is a bug: what it died of.
    pub async fn failed(&mut self) -> String {
        let (what, ended) = tokio::select! {
            ended = &mut self.keeper => ("keeper", ended),
            ended = &mut self.link => ("link", ended),
            ended = &mut self.admin => ("admin socket", ended.map(drop)),
        };
        match ended {
            Ok(()) => format!("the {what} ended"),
            Err(error) => format!("the {what} died: {error}"),
        }
    }

    /// The configuration was read again, and this runs with it, or, for the reason given, with the
    /// old one. Noted; that it is not in use is shown as long as this runs.
    pub async fn reloaded(&self, outcome: Result<(), String>) {
        // A keeper that has died is reported by `failed`.
        let _ = self.questions.send(Question::Reloaded(outcome)).await;
    }

    /// Stops at a file boundary. The operators' socket goes first, so that a command that comes from
    /// now on waits for the next start, and the link last, so that a receipt that is ready may still
    /// reach the master. Returns that socket, unless its task has died.
    pub async fn stop(self, occasion: Occasion) -> Option<Listener> {
        let _ = self.ending.set(occasion); // it ends once
        let listener = end(self.admin, &self.admin_stop).await;
        end(self.keeper, &self.keeper_stop).await;
        end(self.link, &self.stop).await;
        listener
    }
}

/// The daemon's life is the same for master and agent.
impl Service for Agent {
    type Config = Config;

    async fn start(config: Config, kept: &mut Option<Listener>) -> Result<Self, Exit> {
        let started = Agent::start(config, kept).await;
        started.map_err(|error| Exit::new(error.exit_code(), error))
    }

    fn pulse(&self) -> Pulse {
        self.pulse.clone()
    }

    async fn failed(&mut self) -> String {
        Agent::failed(self).await
    }

    async fn reloaded(&mut self, outcome: Result<(), String>) {
        Agent::reloaded(self, outcome).await;
    }

    async fn stop(self, occasion: Occasion) -> Option<Listener> {
        Agent::stop(self, occasion).await
    }
}

/// Has a part of the agent end, and waits for it. One that had died before was reported by
/// [`Agent::failed`], which took what is left of it.
async fn end<T>(part: JoinHandle<T>, stop: &CancellationToken) -> Option<T> {
    let died = part.is_finished();
    stop.cancel();
    match died {
        true => None,
        false => part.await.ok(),
    }
}

/// Reads the files that `config` names, as [`Agent::start`] will at the time `now`, and changes
/// nothing: what cannot be used is found before an agent that runs is stopped for it. Blocking.
pub fn look(config: &Config, now: Timestamp) -> Result<(), StartError> {
    let keys = trust::look(&config.state, &config.keys)?;
    Credentials::load(&config.tls, &keys.fleet, now)?;
    if let ClamdConfFile::At(path) = &config.clamd_conf {
        ClamdConf::read(path)?; // one that was not named need not be readable
    }
    Ok(())
}

/// Opens everything on disk, and ends there what the last run left. Blocking.
fn open(config: Config, stop: CancellationToken) -> Result<Opened, StartError> {
    let now = Timestamp::now();
    let state = State::open(&config.state)?;
    let (trust, mark) = trust::open(state.path(), &config.keys)?;
    let root = trust.root().id();
    let credentials = Arc::new(Credentials::load(&config.tls, trust.fleet(), now)?);
    warn_if_it_ends_soon(&credentials.certificate, now);
    if let Some(doubt) = &credentials.doubt {
        tracing::error!("{}", crate::chain(doubt));
    }
    let audit = AuditLog::open(
        state.path(),
        &credentials.fleet,
        &credentials.agent,
        rand::random(),
        now,
    )?;

    let records = Records::new(state);
    let not_before = credentials.certificate.not_before;
    let now = Now {
        clock: now,
        at: Instant::now(),
    };
    let kept = records.load((trust, mark), not_before, now)?;
    let database = config.clamd.database_directory.clone();
    let conf = clamd_conf(&config.clamd_conf)?;
    let (settings, notes) = clamd::Settings::resolve(config.clamd, conf);
    for note in notes {
        tracing::warn!("{note}");
    }
    let nonce = install::nonce(&config.state, rand::random())?;
    let prover = Prover::with_state(settings, nonce, &config.state, stop);
    let watch = Watch::new(&database);
    let settings = install::Settings {
        database,
        state: config.state.clone(),
    };
    let installer = Installer::open(&settings, nonce, prover.clone())?;
    tracing::info!(
        agent = %credentials.agent,
        fleet = %credentials.fleet,
        %root,
        installed = installer.installed().map(|i| i.set.manifest.position().to_string()),
        "agent {}",
        env!("CARGO_PKG_VERSION")
    );
    let begin = Begin {
        credentials: credentials.clone(),
        settings: core::Settings {
            stale: config.stale,
            splay: prover.settings().splay,
            directory: watch.path().to_owned(),
            drift: config.drift,
            rescan: config.rescan,
        },
        kept,
        records,
        audit,
        installer: installer.clone(),
        watch,
        pulse: Pulse::default(),
    };
    Ok(Opened {
        begin,
        credentials,
        installer,
        prover,
    })
}

fn warn_if_it_ends_soon(certificate: &Certificate, now: Timestamp) {
    let left = certificate.not_after.duration_since(now);
    if left.is_positive() && left < CERTIFICATE_ENDS_SOON {
        tracing::warn!(
            not_after = %certificate.not_after,
            "this host's certificate ends soon; make a new one with `clamcast-certs agent --force`"
        );
    }
}

/// clamd.conf, where one is to be looked at. Only one that was named has to be readable.
fn clamd_conf(file: &ClamdConfFile) -> Result<Option<ClamdConf>, InputError> {
    let path: PathBuf = match file {
        ClamdConfFile::None => return Ok(None),
        ClamdConfFile::At(path) => return ClamdConf::read(path).map(Some),
        ClamdConfFile::Auto => match ClamdConf::find() {
            None => return Ok(None),
            Some(path) => path,
        },
    };
    let conf = ClamdConf::read(&path);
    Ok(conf
        .inspect_err(|error| tracing::warn!(error = crate::chain(error), "going on without it"))
        .ok())
}

fn re_raise<T>(error: JoinError) -> T {
    match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(error) => unreachable!("nothing aborts it: {error}"),
    }
}
