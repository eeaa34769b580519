//! The life of a daemon under systemd or a terminal: start, reload, stop.

use std::convert::Infallible;
use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::{Instant, Interval, interval, sleep};

use crate::admin::{Finish, Listener};
use crate::exit::{self, Exit};
use crate::inherited;
use crate::pulse::Pulse;

/// systemd hears of the loop's beats this many times in the time that its watchdog allows.
const FEEDS: u32 = 4;

/// For so long a reload is under way as far as the watchdog is concerned. The start reads the whole
/// store, or ends an interrupted install, as at the start of the process, for which the units allow
/// as much.
const RELOAD_TIME_MAX: Duration = Duration::from_secs(10 * 60);

/// A daemon that can be started, watched and stopped.
pub trait Service: Sized {
    /// What it is started with.
    type Config: Clone;

    /// Starts it. When this returns it is ready. `kept` is its admin socket from before a reload,
    /// which it takes with [`Listener::open`] once nothing else can fail.
    fn start(
        config: Self::Config,
        kept: &mut Option<Listener>,
    ) -> impl Future<Output = Result<Self, Exit>>;

    /// The loop that does its work. Without beats of this loop systemd restarts the daemon.
    fn pulse(&self) -> Pulse;

    /// Returns if a part of it ends by itself, which is a bug: what it died of.
    fn failed(&mut self) -> impl Future<Output = String>;

    /// The configuration was read again, and this runs with it; or, with the reason, it is not in
    /// use, and this runs with the old one. To be written down, without waiting for the disk, and shown
    /// until the next start.
    fn reloaded(&mut self, outcome: Result<(), String>) -> impl Future<Output = ()>;

    /// Stops it within seconds, with nothing lost. Returns its admin socket, with the commands that
    /// wait there; none if that is what has died.
    fn stop(self, occasion: Occasion) -> impl Future<Output = Option<Listener>>;
}

/// Why a service is stopped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Occasion {
    /// The process ends.
    Exit,
    /// It is started again at once, with a configuration that was read again.
    Reload,
}

impl Occasion {
    /// What a command is told that cannot be served any more.
    pub fn finish(self) -> Finish {
        let message = match self {
            Self::Exit => "the daemon is stopping; nothing was done",
            Self::Reload => "the daemon reads its configuration again; try again in a moment",
        };
        Finish::because(exit::UNREACHABLE, message)
    }
}

/// Runs a service until SIGTERM or SIGINT, and tells systemd where it is (`Type=notify`).
///
/// SIGHUP reads everything again: `load` returns the new configuration, after it has also looked at
/// the files that it names. If it fails, the running service stays as it is. If it succeeds, the
/// service is stopped and started with it: simpler than changing a running one piece by piece, and
/// nothing can be forgotten. Peers reconnect within seconds, and commands wait at the admin socket,
/// which stays open. If the start fails all the same (a port that is taken), the service goes back to
/// the configuration that worked.
pub async fn run<S: Service>(load: impl Fn() -> Result<S::Config, Exit>) -> Result<(), Exit> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut config = load()?;
    let mut none = None; // nothing is kept from before
    inherited::take();
    let mut service = tokio::select! {
        started = S::start(config.clone(), &mut none) => started?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    loop {
        let pulse = service.pulse();
        let failure = tokio::select! {
            _ = terminate.recv() => None,
            _ = interrupt.recv() => None,
            failure = service.failed() => Some(failure),
            never = tend(&pulse) => match never {},
            _ = hang_up.recv() => {
                tell(NotifyState::Reloading);
                match load() {
                    Ok(new) => {
                        tracing::info!("configuration read again, starting with it");
                        let mut kept = feeding(service.stop(Occasion::Reload)).await;
                        let restarted = tokio::select! {
                            restarted = feeding(restart::<S>(new, config, &mut kept)) => {
                                Some(restarted)
                            }
                            // A start may wait for a disk.
                            _ = terminate.recv() => None,
                            _ = interrupt.recv() => None,
                        };
                        if let Some(old) = kept {
                            // The new configuration has it elsewhere, or there is no service any more.
                            let occasion = match &restarted {
                                Some(Ok(_)) => Occasion::Reload,
                                Some(Err(_)) | None => Occasion::Exit,
                            };
                            old.close(occasion.finish()).await;
                        }
                        let Some(restarted) = restarted else {
                            return Ok(());
                        };
                        (service, config) = restarted?;
                    }
                    Err(exit) => {
                        report(&exit, "the new configuration is not used, the old one stays");
                        service.reloaded(Err(reason(&exit))).await;
                    }
                }
                continue;
            }
        };
        tell(NotifyState::Stopping);
        tracing::info!("stopping");
        if let Some(listener) = service.stop(Occasion::Exit).await {
            listener.close(Occasion::Exit.finish()).await;
        }
        return match failure {
            None => Ok(()),
            Some(failure) => Err(anyhow::anyhow!("stopped by a bug: {failure}").into()),
        };
    }
}

/// Starts with the new configuration, or else with the old one.
async fn restart<S: Service>(
    new: S::Config,
    old: S::Config,
    kept: &mut Option<Listener>,
) -> Result<(S, S::Config), Exit> {
    match S::start(new.clone(), kept).await {
        Ok(mut service) => {
            service.reloaded(Ok(())).await;
            Ok((service, new))
        }
        Err(exit) => {
            report(
                &exit,
                "cannot start with the new configuration, going back to the old one",
            );
            let mut service = S::start(old.clone(), kept).await?;
            service.reloaded(Err(reason(&exit))).await;
            Ok((service, old))
        }
    }
}

fn reason(exit: &Exit) -> String {
    let error = exit.error.as_ref();
    error.map_or_else(
        || "no reason given".to_owned(),
        |error| format!("{error:#}"),
    )
}

fn report(exit: &Exit, what: &str) {
    tracing::error!(error = reason(exit), "{what}");
}

/// Waits until the loop turns, and tells systemd that the daemon is ready. From then on passes on the
/// loop's state and, as long as the loop is not stalled, feeds the watchdog.
async fn tend(pulse: &Pulse) -> Infallible {
    // After a reload the watchdog is armed already.
    feeding(pulse.begun()).await;
    let mut status = pulse.status();
    tell_status(&status.borrow_and_update());
    tell(NotifyState::Ready);
    let allowed = watchdog();
    // A feed and the beats before it are on time together.
    let limit = allowed.unwrap_or_default() / 2;
    // A status line that changes often must not put the next feed off.
    let mut feeds = allowed.map(|allowed| interval(allowed / FEEDS));
    let mut was_stalled = false;
    loop {
        tokio::select! {
            // An error is impossible: the sender is in the pulse.
            Ok(()) = status.changed() => tell_status(&status.borrow_and_update()),
            () = next(&mut feeds) => {
                let is_stalled = pulse.is_stalled(limit);
                if !is_stalled {
                    tell(NotifyState::Watchdog);
                } else if !was_stalled {
                    tracing::error!(
                        "the daemon's main loop is stalled, which is a bug; systemd restarts the \
                         daemon if the loop does not continue"
                    );
                }
                was_stalled = is_stalled;
            }
        }
    }
}

/// Waits for the next feed. Without a watchdog this never returns.
async fn next(feeds: &mut Option<Interval>) {
    match feeds {
        Some(feeds) => {
            feeds.tick().await;
        }
        None => std::future::pending().await,
    }
}

/// Feeds the watchdog while a reload is under way, in which no loop turns.
async fn feeding<T>(work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    let allowed = watchdog();
    let begun = Instant::now();
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            () = sleep(allowed.unwrap_or_default() / FEEDS),
                if allowed.is_some() && begun.elapsed() < RELOAD_TIME_MAX =>
            {
                tell(NotifyState::Watchdog);
            }
        }
    }
}

/// How long systemd waits for a sign of life, if the unit has a watchdog.
fn watchdog() -> Option<Duration> {
    let mut micros = 0;
    sd_notify::watchdog_enabled(false, &mut micros).then(|| Duration::from_micros(micros))
}

/// Wraps a task. The receiver gets a value when the task runs for the first time.
pub fn announced<F: Future>(task: F) -> (impl Future<Output = F::Output>, oneshot::Receiver<()>) {
    let (running, runs) = oneshot::channel();
    let task = async move {
        let _ = running.send(()); // the start may have been broken off
        task.await
    };
    (task, runs)
}

fn tell_status(status: &str) {
    if !status.is_empty() {
        tell(NotifyState::Status(status));
    }
}

fn tell(state: NotifyState<'_>) {
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(false, &[state]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::{Signal, raise};
    use std::sync::{LazyLock, Mutex};

    /// What the service of the test was told, in order.
    static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());

    static SOCKET: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().unwrap());

    struct Scripted(u32, Listener, Pulse);

    impl Service for Scripted {
        type Config = u32;

        async fn start(config: u32, kept: &mut Option<Listener>) -> Result<Self, Exit> {
            note(format!("start {config}"));
            if config == 3 {
                return Err(anyhow::anyhow!("the port is taken").into());
            }
            let path = SOCKET.path().join("admin.sock");
            assert_eq!(kept.is_some(), config > 1);
            let listener = Listener::open("scripted", &path, None, kept)?;
            assert!(kept.is_none(), "the socket is kept over every reload");
            // The next signal comes when this one is up.
            let signal = if config == 4 {
                Signal::SIGTERM
            } else {
                Signal::SIGHUP
            };
            tokio::spawn(async move { raise(signal) });
            Ok(Self(config, listener, Pulse::default()))
        }

        fn pulse(&self) -> Pulse {
            self.2.clone()
        }

        async fn failed(&mut self) -> String {
            std::future::pending().await
        }

        async fn reloaded(&mut self, outcome: Result<(), String>) {
            match outcome {
                Ok(()) => note("reloaded".to_owned()),
                Err(reason) => note(reason),
            }
        }

        async fn stop(self, occasion: Occasion) -> Option<Listener> {
            note(format!("{occasion:?} {}", self.0));
            Some(self.1)
        }
    }

    fn note(what: String) {
        TOLD.lock().unwrap().push(what);
    }

    #[tokio::test]
    async fn a_reload_keeps_the_old_configuration_on_error() {
        let loads = Mutex::new(vec![Ok(4), Ok(3), Err(()), Ok(2), Ok(1)]);
        let load = || {
            let next = loads
                .lock()
                .unwrap()
                .pop()
                .expect("the script is long enough");
            if next.is_err() {
                tokio::spawn(async { raise(Signal::SIGHUP) });
            }
            next.map_err(|()| anyhow::anyhow!("unknown key").into())
        };
        let ended = run::<Scripted>(load).await;
        assert!(ended.is_ok());
        let told = TOLD.lock().unwrap().join(", ");
        let expected = "start 1, Reload 1, start 2, reloaded, unknown key, Reload 2, start 3, \
                        start 2, the port is taken, Reload 2, start 4, reloaded, Exit 4";
        assert_eq!(told, expected);
    }

    /// Serves until its end, with a loop that beats for [`TURNS`] and then stalls.
    struct Stalling(Pulse, tokio::task::JoinHandle<()>);

    const TURNS: Duration = Duration::from_millis(1500);

    impl Service for Stalling {
        type Config = ();

        async fn start((): (), _: &mut Option<Listener>) -> Result<Self, Exit> {
            let pulse = Pulse::default();
            let turning = pulse.clone();
            let task = tokio::spawn(async move {
                let begun = Instant::now();
                while begun.elapsed() < TURNS {
                    turning.beat();
                    // More often than the watchdog is fed.
                    let status = format!("turning for {} ms", begun.elapsed().as_millis());
                    turning.say(status);
                    sleep(Duration::from_millis(20)).await;
                }
                std::future::pending().await
            });
            Ok(Self(pulse, task))
        }

        fn pulse(&self) -> Pulse {
            self.0.clone()
        }

        async fn failed(&mut self) -> String {
            (&mut self.1)
                .await
                .map_or_else(|error| error.to_string(), |()| "ended".to_owned())
        }

        async fn reloaded(&mut self, _: Result<(), String>) {}

        async fn stop(self, _: Occasion) -> Option<Listener> {
            self.1.abort();
            None
        }
    }

    /// The process that the next test starts runs the same test with this variable.
    const DAEMON: &str = "CLAMCAST_TEST_IS_DAEMON";

    #[test]
    fn systemd_hears_ready_and_status_and_no_watchdog_of_a_stalled_loop() {
        if std::env::var_os(DAEMON).is_some() {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(run::<Stalling>(|| Ok(()))).ok().unwrap();
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        let name = std::thread::current().name().unwrap().to_owned();
        // As systemd does, the shell names the process that the watchdog is for.
        let mut daemon = std::process::Command::new("sh")
            .args(["-c", "WATCHDOG_PID=$$ exec \"$0\" \"$@\""])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", &name])
            .env(DAEMON, "1")
            .env("NOTIFY_SOCKET", &path)
            .env("WATCHDOG_USEC", "400000")
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let mut heard = Vec::new();
        let mut bytes = [0; 256];
        // It ends when nothing was heard for two seconds, five times the watchdog's patience.
        while let Ok(length) = socket.recv(&mut bytes) {
            let text = String::from_utf8_lossy(&bytes[..length]);
            heard.extend(text.lines().map(str::to_owned));
        }
        let pid = nix::unistd::Pid::from_raw(i32::try_from(daemon.id()).unwrap());
        assert!(
            daemon.try_wait().unwrap().is_none(),
            "it still runs: {heard:?}"
        );
        nix::sys::signal::kill(pid, Signal::SIGTERM).unwrap();
        assert!(daemon.wait().unwrap().success());
        let length = socket.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..length], b"STOPPING=1\n");

        let at = |what: &str| heard.iter().position(|line| line == what);
        let ready = at("READY=1").unwrap();
        assert!(at("WATCHDOG=1").unwrap() > ready, "{heard:?}");
        let is_status = |line: &String| line.starts_with("STATUS=turning for 1");
        let status = heard.iter().position(is_status);
        assert!(status.unwrap() > ready, "{heard:?}");
        let fed = heard.iter().filter(|line| *line == "WATCHDOG=1").count();
        assert!((8..=20).contains(&fed), "every 100 ms of 1.5 s: {heard:?}");
        assert_eq!(heard.iter().filter(|line| *line == "READY=1").count(), 1);
    }
}
