//! `clamcast-master`: publishes the databases of a mirror to a fleet.

use std::cell::RefCell;
use std::path::Path;
use std::process::ExitCode;

use clamcast_daemon::admin::Listener;
use clamcast_daemon::exit::{self, Exit, OrExit as _};
use clamcast_daemon::logging;
use clamcast_daemon::pulse::Pulse;
use clamcast_daemon::service::{self, Occasion, Service};
use clamcast_master::config::Config;
use clamcast_master::operate::{command, preflight};
use clamcast_master::serve::Master;
use jiff::Timestamp;

fn main() -> ExitCode {
    command::main(serve)
}

/// Runs the daemon until a signal ends it.
fn serve(config: &Path, verbose: u8) -> Result<(), Exit> {
    logging::start(verbose);
    let read = RefCell::new(Vec::<preflight::Running>::new());
    let load = || {
        let config = load(config)?;
        // What a reload would fail on is found before anything is stopped for it.
        let mut read = read.borrow_mut();
        if !read.is_empty()
            && let Some(obstacle) = preflight::obstacles(&config, &read).into_iter().next()
        {
            return Err(Exit::new(exit::USAGE, anyhow::anyhow!(obstacle)));
        }
        for key in &config.without_effect {
            tracing::warn!("{key} has no effect in this version");
        }
        for doubt in preflight::doubts(&config, Timestamp::now()) {
            tracing::warn!("{doubt}");
        }
        read.push((&config).into());
        Ok(config)
    };
    let runtime = tokio::runtime::Runtime::new()?;
    let ended = runtime.block_on(service::run::<Daemon>(load));
    // A load test or a hash that is under way holds nothing that must be kept.
    runtime.shutdown_background();
    ended
}

/// The daemon's life is the same for master and agent.
struct Daemon(Master);

impl Service for Daemon {
    type Config = Config;

    async fn start(config: Config, kept: &mut Option<Listener>) -> Result<Self, Exit> {
        Ok(Self(Master::start(config, kept).await?))
    }

    fn pulse(&self) -> Pulse {
        self.0.pulse()
    }

    async fn failed(&mut self) -> String {
        self.0.failed().await
    }

    async fn reloaded(&mut self, outcome: Result<(), String>) {
        self.0.reloaded(outcome).await;
    }

    async fn stop(self, occasion: Occasion) -> Option<Listener> {
        self.0.stop(occasion).await
    }
}

/// The configuration, and a look at every file that it names.
fn load(path: &Path) -> Result<Config, Exit> {
    let config = Config::load(path).or_exit(exit::USAGE)?;
    match preflight::unreadable(&config).into_iter().next() {
        None => Ok(config),
        Some(error) => Err(Exit::new(exit::USAGE, error)),
    }
}
