//! The life of a daemon under systemd or a terminal: start, reload, stop.

use std::future::Future;

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};

use crate::admin::{Finish, Listener};
use crate::exit::{self, Exit};

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
    let mut service = tokio::select! {
        started = S::start(config.clone(), &mut none) => started?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    loop {
        tell(NotifyState::Ready);
        let failure = tokio::select! {
            _ = terminate.recv() => None,
            _ = interrupt.recv() => None,
            failure = service.failed() => Some(failure),
            _ = hang_up.recv() => {
                tell(NotifyState::Reloading);
                match load() {
                    Ok(new) => {
                        tracing::info!("configuration read again, starting with it");
                        let mut kept = service.stop(Occasion::Reload).await;
                        let restarted = tokio::select! {
                            restarted = restart::<S>(new, config, &mut kept) => Some(restarted),
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

    struct Scripted(u32, Listener);

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
            Ok(Self(config, listener))
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
}
