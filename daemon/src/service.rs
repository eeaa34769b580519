//! The life of a daemon under systemd or a terminal: start, reload, stop.

use std::future::Future;

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};

use crate::exit::Exit;

/// A daemon that can be started, watched and stopped.
pub trait Service: Sized {
    /// What it is started with.
    type Config: Clone;

    /// Starts it. When this returns it is ready.
    fn start(config: Self::Config) -> impl Future<Output = Result<Self, Exit>>;

    /// Returns if a part of it ends by itself, which is a bug: what it died of.
    fn failed(&mut self) -> impl Future<Output = String>;

    /// Stops it within seconds, with nothing lost.
    fn stop(self) -> impl Future<Output = ()>;
}

/// Runs a service until SIGTERM or SIGINT, and tells systemd where it is (`Type=notify`).
///
/// SIGHUP reads everything again: `load` returns the new configuration, after it has also looked at
/// the files that it names. If it fails, the running service stays as it is. If it succeeds, the
/// service is stopped and started with it: simpler than changing a running one piece by piece, and
/// nothing can be forgotten. Peers reconnect within seconds. If the start fails all the same (a
/// port that is taken), the service goes back to the configuration that worked.
pub async fn run<S: Service>(load: impl Fn() -> Result<S::Config, Exit>) -> Result<(), Exit> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut config = load()?;
    let mut service = tokio::select! {
        started = S::start(config.clone()) => started?,
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
                        service.stop().await;
                        (service, config) = restart(new, config).await?;
                    }
                    Err(exit) => report(&exit, "the new configuration is not used, the old one stays"),
                }
                continue;
            }
        };
        tell(NotifyState::Stopping);
        tracing::info!("stopping");
        service.stop().await;
        return match failure {
            None => Ok(()),
            Some(failure) => Err(anyhow::anyhow!("stopped by a bug: {failure}").into()),
        };
    }
}

/// Starts with the new configuration, or else with the old one.
async fn restart<S: Service>(new: S::Config, old: S::Config) -> Result<(S, S::Config), Exit> {
    match S::start(new.clone()).await {
        Ok(service) => Ok((service, new)),
        Err(exit) => {
            report(
                &exit,
                "cannot start with the new configuration, going back to the old one",
            );
            Ok((S::start(old.clone()).await?, old))
        }
    }
}

fn report(exit: &Exit, what: &str) {
    let error = exit.error.as_ref().map(|error| format!("{error:#}"));
    tracing::error!(error, "{what}");
}

fn tell(state: NotifyState<'_>) {
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(false, &[state]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::{Signal, raise};
    use std::sync::Mutex;

    /// What the service of the test was told, in order.
    static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());

    struct Scripted(u32);

    impl Service for Scripted {
        type Config = u32;

        async fn start(config: u32) -> Result<Self, Exit> {
            note(format!("start {config}"));
            if config == 3 {
                return Err(anyhow::anyhow!("the port is taken").into());
            }
            // The next signal comes when this one is up.
            let signal = if config == 4 {
                Signal::SIGTERM
            } else {
                Signal::SIGHUP
            };
            tokio::spawn(async move { raise(signal) });
            Ok(Self(config))
        }

        async fn failed(&mut self) -> String {
            std::future::pending().await
        }

        async fn stop(self) {
            note(format!("stop {}", self.0));
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
                note("bad".to_owned());
                tokio::spawn(async { raise(Signal::SIGHUP) });
            }
            next.map_err(|()| anyhow::anyhow!("unknown key").into())
        };
        let ended = run::<Scripted>(load).await;
        assert!(ended.is_ok());
        let told = TOLD.lock().unwrap().join(", ");
        let expected =
            "start 1, stop 1, start 2, bad, stop 2, start 3, start 2, stop 2, start 4, stop 4";
        assert_eq!(told, expected);
    }
}
