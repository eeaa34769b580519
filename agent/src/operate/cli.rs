//! The command line of `clamcast-agent`.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clamcast_daemon::admin::{self, Finish};
use clamcast_daemon::exit::{self, Exit, OrExit as _};
use clamcast_daemon::logging;
use clamcast_daemon::say;
use clamcast_daemon::table;
use clap::{ArgAction, Parser, Subcommand};
use indicatif::ProgressBar;
use jiff::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::admin::Request;
use super::doctor::{self, Inventory, Running};
use super::status::Verification;
use crate::config::{self, Config};
use crate::core::status::Status;
use crate::host::Host;

/// Keeps this host's ClamAV databases at the generation that the fleet's master offers: fetches
/// what is missing, swaps the files in, makes clamd reload, and signs a receipt once clamd was seen
/// scanning with them.
///
/// `run` is the daemon. `status` and `verify` ask it through its admin socket, which root and the
/// agent's own user and group may use; neither changes anything. `doctor` needs no daemon.
#[derive(Parser)]
#[command(version, max_term_width = 100, after_long_help = AGENT)]
pub struct Cli {
    /// The daemon's admin socket
    #[arg(long, global = true, display_order = 100, value_name = "PATH", default_value = config::DEFAULT_SOCKET)]
    socket: PathBuf,

    /// More of the daemon's log on stderr (twice: all of it)
    #[arg(short, long, global = true, display_order = 101, action = ArgAction::Count)]
    verbose: u8,

    #[command(subcommand)]
    command: Command,
}

const AGENT: &str = "\
Exit codes:
  0  done
  1  something does not conform: verify; something is bad: doctor
  2  wrong usage or configuration
  3  the daemon cannot be reached
  4  refused
  5  failed: disk, network, a bug

Files:
  /etc/clamcast/agent.toml   configuration; `run --config FILE` for another
  /run/clamcast/agent.sock   where the daemon takes commands; --socket PATH for another, which is
                             `admin` under [listen] in the configuration
  /var/lib/clamcast/agent    `state` in the configuration: what the agent trusts, receipts that the
                             master has not acknowledged, and a signed log of what it did
  /var/lib/clamav/.clamcast  what is being fetched, and the sets that it can go back to

Environment:
  CLAMCAST_LOG   what run logs, instead of -v: for example debug, or info,clamcast_agent=trace";

const RUN: &str = "\
Exit codes:
  0  stopped by a signal
  2  the configuration, a key or a certificate cannot be used; the message says which
  5  failed: disk, or another agent has the state directory

Examples:
  systemctl enable --now clamcast-agent
  systemctl reload clamcast-agent            after a change of configuration or certificate
  clamcast-agent -v run --config agent.toml";

const STATUS: &str = "\
Exit codes:
  0  it could answer, whatever the answer is
  3  the daemon cannot be reached

Examples:
  clamcast-agent status
  clamcast-agent status --json";

const VERIFY: &str = "\
Exit codes:
  0  every file is what was published
  1  one is not, or nothing is installed yet; the output says which
  3  the daemon cannot be reached

Examples:
  clamcast-agent verify
  clamcast-agent verify --json
  clamcast-master force-sync NAME    on the master: mends what is not";

const DOCTOR: &str = "\
Exit codes:
  0  nothing is bad
  1  something is; the output says what, and what to do
  2  the configuration cannot be used, or there is no such user

Environment:
  NO_COLOR   no colours on a terminal either

Examples:
  sudo clamcast-agent doctor
  clamcast-agent doctor --config agent.toml --json | jq '.findings[] | select(.state == \"bad\")'";

#[derive(Subcommand)]
enum Command {
    /// Run the daemon in the foreground until SIGTERM or SIGINT
    ///
    /// It dials the master, so no port needs to be open here. An install that a crash interrupted
    /// is ended before the network is touched.
    #[command(after_long_help = RUN)]
    Run {
        /// Its configuration
        #[arg(long, value_name = "FILE", default_value = config::DEFAULT_PATH)]
        config: PathBuf,
    },
    /// What is installed, whether clamd scans with it, and how things stand with the master
    #[command(after_long_help = STATUS)]
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Re-hash the database directory against the installed manifest
    ///
    /// Exit code 1 if a database is missing or is not what was published, or if nothing is
    /// installed yet.
    #[command(after_long_help = VERIFY)]
    Verify {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Look for what would keep this host from being up to date, and say what to do about it
    ///
    /// Looks at clamd and its configuration, other updaters, rights, space, clock, certificate and
    /// the way to the master. It needs no running agent, disturbs none, and changes nothing. Run
    /// as root it sees the most; it then looks at files and sockets as the agent's user does.
    #[command(after_long_help = DOCTOR)]
    Doctor {
        /// The agent's configuration
        #[arg(long, value_name = "FILE", default_value = config::DEFAULT_PATH)]
        config: PathBuf,
        /// Whom the agent runs as, if not as its unit says
        #[arg(long, value_name = "NAME")]
        user: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// Carries out a command line. `daemon` is the agent itself, with the path of its configuration and
/// how verbose its log is.
pub fn run(cli: Cli, daemon: impl FnOnce(&Path, u8) -> Result<(), Exit>) -> Result<(), Exit> {
    let socket = &cli.socket;
    match cli.command {
        Command::Run { config } => daemon(&config, cli.verbose),
        Command::Status { json } => {
            let finish = call(socket, &Request::Status)?;
            show(finish, json, |status: &Status| {
                status.text(Timestamp::now())
            })
        }
        Command::Verify { json } => {
            let spinner = spinner("hashing the databases");
            let finish = call(socket, &Request::Verify);
            spinner.finish_and_clear();
            show(finish?, json, Verification::text)
        }
        Command::Doctor { config, user, json } => {
            if cli.verbose > 0 {
                logging::start(cli.verbose);
            }
            examine(&config, user.as_deref(), json)
        }
    }
}

fn call(socket: &Path, request: &Request) -> Result<Finish, Exit> {
    let ignored = |_| {}; // the agent's commands report no progress
    admin::call(config::DAEMON, socket, request, ignored)
        .map_err(|error| Exit::new(error.exit_code(), error))
}

/// Prints a result, and ends with the code that the daemon gave.
fn show<T: DeserializeOwned + Serialize>(
    finish: Finish,
    json: bool,
    text: impl FnOnce(&T) -> String,
) -> Result<(), Exit> {
    if let Some(message) = finish.message {
        return Err(Exit::new(finish.exit, anyhow::anyhow!(message)));
    }
    if json {
        say!("{}", table::json(&finish.result));
    } else {
        let result: T = serde_json::from_value(finish.result)?;
        say!("{}", text(&result).trim_end());
    }
    match finish.exit {
        exit::DONE => Ok(()),
        code => Err(Exit::quietly(code)),
    }
}

fn examine(path: &Path, user: Option<&str>, json: bool) -> Result<(), Exit> {
    let config = Config::load(path).or_exit(exit::USAGE)?;
    let host = Host::here();
    // What only root can see comes first; then root's rights are given up for good.
    let inventory = Inventory::take(&host, path);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let running = runtime.block_on(Running::ask(&config));
    let agent = doctor::agents_user(&host, path, &config, user).or_exit(exit::USAGE)?;
    doctor::become_user(&agent, user.is_some()).or_exit(exit::USAGE)?;

    let spinner = spinner("looking around");
    let examined = doctor::examine(&host, &inventory, &running, path, &config, &agent);
    let report = runtime.block_on(examined);
    spinner.finish_and_clear();
    if json {
        say!("{}", table::json(&serde_json::to_value(&report)?));
    } else {
        let width = table::terminal_width();
        let colour = std::io::stdout().is_terminal() && !logging::is_set("NO_COLOR");
        say!("{}", report.text(width, colour));
    }
    match report.ok {
        true => Ok(()),
        false => Err(Exit::quietly(exit::NOT_CONFORMANT)),
    }
}

/// Something that moves on a terminal, for what may take longer than a second.
fn spinner(message: &'static str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let spinner = ProgressBar::new_spinner().with_message(message);
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}
