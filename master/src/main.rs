//! `clamcast-master`: publishes the databases of a mirror to a fleet.

mod help;
mod show;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clamcast_daemon::admin::{self, Finish, Listener};
use clamcast_daemon::exit::{self, Exit, OrExit as _};
use clamcast_daemon::say;
use clamcast_daemon::service::{self, Occasion, Service};
use clamcast_daemon::{audit, logging};
use clamcast_master::admin::{REASON_BYTES_MAX, Request};
use clamcast_master::config::{self, Config};
use clamcast_master::events::{self, AgentPattern, EVENTS};
use clamcast_master::force::{Meant, Selection};
use clamcast_master::preflight;
use clamcast_master::serve::{self, Master, StartError};
use clamcast_proto::GroupName;
use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use clap::{ArgAction, Args, Parser, Subcommand};
use jiff::Timestamp;
use serde::Serialize;

/// Publishes the ClamAV databases of a mirror directory to a fleet of agents, and shows what came
/// of it on every host.
///
/// `serve` is the daemon. The other commands talk to it through its admin socket, which root and
/// the members of its admin_group may use; `check-config` and `audit verify` read files alone.
#[derive(Parser)]
#[command(version, max_term_width = 100, after_long_help = help::MASTER)]
struct Cli {
    /// The daemon's admin socket
    #[arg(long, global = true, display_order = 100, value_name = "PATH", default_value = config::DEFAULT_SOCKET)]
    socket: PathBuf,

    /// More of the daemon's log on stderr (twice: all of it)
    #[arg(short, long, global = true, display_order = 101, action = ArgAction::Count)]
    verbose: u8,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon in the foreground until SIGTERM or SIGINT
    ///
    /// SIGHUP reads configuration, keys and certificates again; on an error the old ones stay in
    /// use. Agents reconnect by themselves.
    #[command(after_long_help = help::SERVE)]
    Serve {
        /// Its configuration
        #[arg(long, value_name = "FILE", default_value = config::DEFAULT_PATH)]
        config: PathBuf,
    },
    /// Try what `serve` would do at its start, and say what is wrong, changing nothing
    ///
    /// An error is what the daemon would not start with (exit 2); what it would start with, but what
    /// is probably not meant, is doubtful (exit 0). Run it as the daemon's user.
    #[command(after_long_help = help::CHECK_CONFIG)]
    CheckConfig {
        /// The configuration
        #[arg(long, value_name = "FILE", default_value = config::DEFAULT_PATH)]
        config: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Capture the mirror and publish it now
    ///
    /// The daemon does this by itself when the mirror has changed and is quiet; this is for those
    /// who cannot wait. A set that is published already changes nothing.
    #[command(after_long_help = help::PUBLISH)]
    Publish {
        /// Return when every connected agent has settled; exit 1 if one failed
        #[arg(long)]
        wait: bool,
        /// Publish also what is held for an operator (a database that shrank); the reason goes into
        /// the audit log
        #[arg(long, value_name = "REASON", value_parser = reason)]
        accept: Option<String>,
        /// Let it, or the one that waits, take the place of the generation that is on its way, which
        /// otherwise goes first
        #[arg(long)]
        supersede: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// What the fleet is at, who is not there and why, and how old its signatures are
    ///
    /// An alarm is raised for signatures older than a day, for a set that is held or refused, for a log
    /// that cannot be written, and for certificates that end within 30 days.
    #[command(after_long_help = help::STATUS)]
    Status {
        /// Show it again and again, until Ctrl-C
        #[arg(long)]
        watch: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Every agent: its generation, whether clamd was seen scanning with it, and why not
    ///
    /// One line for each that was ever connected and is not revoked. On a terminal that is too narrow
    /// the last columns stand beneath their line.
    #[command(after_long_help = help::AGENTS)]
    Agents {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// The generations that are kept
    ///
    /// Oldest first; each is an immutable, signed set of databases.
    #[command(after_long_help = help::GENERATIONS)]
    Generations {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Drive agents to the current generation, now
    ///
    /// They re-hash what is really on their disks first, fetch what is missing or damaged, install
    /// it at once and prove it. An agent that is not connected is named at once. What was ordered is
    /// carried out also if this command is interrupted (exit 130); its outcome stands in the audit log
    /// (`audit show --event force-sync-end`). Exit 1 if an agent failed, or if the daemon was stopped
    /// before every agent was done.
    #[command(after_long_help = help::FORCE_SYNC)]
    ForceSync(ForceSync),
    /// A generation's way through the fleet: where it is, and what to do about it
    #[command(subcommand)]
    Rollout(Rollout),
    /// Publish the databases of an older generation again, under a new number
    ///
    /// Everybody gets them at once. What the mirror has is not published until `rollout resume`.
    #[command(after_long_help = help::ROLLOUT)]
    Rollback {
        /// The generation: 1.42, or 42
        generation: Meant,
        /// Why, for the audit log
        #[arg(long, value_name = "TEXT", value_parser = reason)]
        reason: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Keep a group at a generation while the others go on
    #[command(after_long_help = help::ROLLOUT)]
    Pin {
        /// The group
        group: GroupName,
        /// The generation: 1.42, or 42; where the group is wanted now, unless it is said
        generation: Option<Meant>,
        /// Why, for the audit log
        #[arg(long, value_name = "TEXT", value_parser = reason)]
        reason: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Let a pinned group go with the others again
    #[command(after_long_help = help::ROLLOUT)]
    Unpin {
        /// The group
        group: GroupName,
        /// Why, for the audit log
        #[arg(long, value_name = "TEXT", value_parser = reason)]
        reason: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// The log of what happened
    #[command(subcommand)]
    Audit(Audit),
}

#[derive(Args)]
struct ForceSync {
    /// Agents: names, or patterns like 'db-*'
    #[arg(value_name = "AGENT_OR_GLOB", required_unless_present_any = ["groups", "all"])]
    agents: Vec<String>,
    /// The agents of a group; may be repeated
    #[arg(long = "group", value_name = "GROUP")]
    groups: Vec<GroupName>,
    /// Every agent
    #[arg(long, conflicts_with_all = ["agents", "groups"])]
    all: bool,
    /// Send whole files, no deltas
    #[arg(long)]
    full: bool,
    /// A generation that was halted, aborted or rolled back (1.42, or 42), on hosts that are below
    /// it; or only if it is the current one. Needs --accept, and never goes with --all
    #[arg(long, value_name = "N", conflicts_with = "all", requires = "accept")]
    generation: Option<Meant>,
    /// Why, for the audit log
    #[arg(long, value_name = "REASON", value_parser = reason)]
    accept: Option<String>,
    /// Return once the agents are told; exit 1 if one is not connected
    #[arg(long)]
    no_wait: bool,
    /// How long to wait for them
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Print JSON, one object a line
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Rollout {
    /// Wave, counts, who holds it up and why
    #[command(after_long_help = help::ROLLOUT)]
    Status {
        /// Wait so long until it is complete or halted
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
        timeout: Option<Duration>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Begin no further wave and offer nothing more, until `resume`
    #[command(after_long_help = help::ROLLOUT)]
    Pause(Reason),
    /// Go on after a pause; publish again after a `rollback`
    #[command(after_long_help = help::ROLLOUT)]
    Resume(Reason),
    /// End the running generation: those who took it go back, as after a halt
    #[command(after_long_help = help::ROLLOUT)]
    Abort(Reason),
    /// Begin all waves that are still to come
    #[command(after_long_help = help::ROLLOUT)]
    Promote(Reason),
}

#[derive(Args)]
struct Reason {
    /// Why, for the audit log
    #[arg(long, value_name = "TEXT", value_parser = reason)]
    reason: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Audit {
    /// Print records, oldest first
    ///
    /// Of publications, offers, receipts, orders and by whom, enrolments, revocations, rejected
    /// connections, starts and stops. Nothing is verified here; `audit verify` does that.
    #[command(after_long_help = help::AUDIT_SHOW)]
    Show {
        #[command(flatten)]
        filter: Filter,
        /// Go on with new records as they come, until Ctrl-C
        #[arg(long)]
        follow: bool,
        /// Print JSON, one record a line
        #[arg(long)]
        json: bool,
    },
    /// Check that no record was changed, removed, inserted or cut off
    ///
    /// Reads the files and the public keys alone; no daemon is needed.
    #[command(after_long_help = help::AUDIT_VERIFY)]
    Verify {
        /// The daemon's configuration, which says where state and keys are
        #[arg(long, value_name = "FILE", default_value = config::DEFAULT_PATH)]
        config: PathBuf,
        /// The state directory, instead of the configuration's
        #[arg(long, value_name = "DIR")]
        state: Option<PathBuf>,
        /// The key set (manifest.pub), instead of the configuration's; with --state alone the copy
        /// in the state directory is used
        #[arg(long, value_name = "FILE")]
        keys: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
struct Filter {
    /// Only from this time on: a day like 2026-11-22 (from midnight UTC), a time like
    /// 2026-11-22T08:00:00Z, or a duration like 24h
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<Timestamp>,
    /// Only what an agent did or what was done to it: its name, or a pattern like 'db-*'
    #[arg(long, value_name = "AGENT_OR_GLOB")]
    agent: Option<AgentPattern>,
    /// Only this event
    #[arg(long, value_name = "EVENT", ignore_case = true,
        value_parser = PossibleValuesParser::new(EVENTS).map(|event| event.to_lowercase()))]
    event: Option<String>,
    /// Only what this operator did: a user name or id
    #[arg(long, value_name = "USER")]
    operator: Option<String>,
}

impl From<Filter> for events::Filter {
    fn from(filter: Filter) -> Self {
        let Filter {
            since,
            agent,
            event,
            operator,
        } = filter;
        Self {
            after: None,
            since,
            agent,
            event,
            operator,
        }
    }
}

fn since(text: &str) -> Result<Timestamp, String> {
    show::audit::since(text, Timestamp::now())
}

/// A reason that tells whoever reads the audit log something.
fn reason(text: &str) -> Result<String, String> {
    match text.trim() {
        "" => Err("expected a few words for the audit log".to_owned()),
        text if text.len() > REASON_BYTES_MAX => Err(format!(
            "it has {} bytes, at most {REASON_BYTES_MAX} may be",
            text.len()
        )),
        text => Ok(text.to_owned()),
    }
}

/// Time between two looks of `status --watch`.
const WATCH: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let cli = Cli::parse();
    exit::end("clamcast-master", run(cli))
}

fn run(cli: Cli) -> Result<(), Exit> {
    let socket = &cli.socket;
    match cli.command {
        Command::Serve { config } => {
            logging::start(cli.verbose);
            let read = RefCell::new(Vec::<preflight::Running>::new());
            let load = || {
                let config = load(&config)?;
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
        Command::CheckConfig { config, json } => check_config(&config, json),
        Command::Publish {
            wait,
            accept,
            supersede,
            json,
        } => {
            let progress = show::Progress::new(wait && !json);
            let request = Request::Publish {
                wait,
                accept,
                supersede,
            };
            let finish = call(socket, &request, |value| progress.show(&value))?;
            progress.clear();
            show::end(finish, json, show::published)
        }
        Command::Status { watch: false, json } => {
            show::end(ask(socket, &Request::Status)?, json, show::status)
        }
        Command::Status { watch: true, json } => {
            let mut watch = show::Watch::new(json);
            loop {
                // A daemon that is restarted comes back; whoever watches waits for it.
                match ask(socket, &Request::Status) {
                    // Its last word, to whom it did not serve any more, is no end either.
                    Ok(finish) if finish.exit == exit::UNREACHABLE => {
                        watch.unreachable(&finish.message.unwrap_or_default());
                    }
                    Ok(finish) => watch.show(finish)?,
                    Err(exit) if exit.code == exit::UNREACHABLE => {
                        let error = exit.error.map(|error| format!("{error:#}"));
                        watch.unreachable(&error.unwrap_or_default());
                    }
                    Err(exit) => return Err(exit),
                }
                std::thread::sleep(WATCH);
            }
        }
        Command::Agents { json } => show::end(ask(socket, &Request::Agents)?, json, show::agents),
        Command::Generations { json } => {
            show::end(ask(socket, &Request::Generations)?, json, show::generations)
        }
        Command::ForceSync(args) => force_sync(socket, args),
        Command::Rollout(command) => rollout(socket, command),
        Command::Rollback {
            generation,
            reason,
            json,
        } => ordered(socket, &Request::Rollback { generation, reason }, json),
        Command::Pin {
            group,
            generation,
            reason,
            json,
        } => {
            let request = Request::Pin {
                group,
                generation,
                reason,
            };
            ordered(socket, &request, json)
        }
        Command::Unpin {
            group,
            reason,
            json,
        } => ordered(socket, &Request::Unpin { group, reason }, json),
        Command::Audit(Audit::Show {
            filter,
            follow,
            json,
        }) => {
            let mut filter: events::Filter = filter.into();
            let mut records = show::audit::Records::new(json);
            loop {
                filter.after = records.last();
                let request = Request::AuditShow {
                    filter: filter.clone(),
                    follow,
                };
                let ended = call(socket, &request, |piece| records.show(&piece));
                // Whoever follows goes on with a daemon that was restarted where the last one ended.
                let (code, word) = match &ended {
                    Ok(finish) => (finish.exit, finish.message.clone()),
                    Err(exit) => (exit.code, exit.error.as_ref().map(|it| format!("{it:#}"))),
                };
                if !follow || code != exit::UNREACHABLE || !records.begun() {
                    return show::end(ended?, false, |_| {});
                }
                eprintln!("{}", word.unwrap_or_default());
                std::thread::sleep(WATCH);
            }
        }
        Command::Audit(Audit::Verify {
            config,
            state,
            keys,
            json,
        }) => verify(&config, state, keys, json),
    }
}

fn rollout(socket: &Path, command: Rollout) -> Result<(), Exit> {
    let (request, json) = match command {
        Rollout::Status { timeout, json } => {
            let progress = show::Progress::new(timeout.is_some() && !json);
            let timeout = timeout.map(|timeout| timeout.as_secs());
            let request = Request::RolloutStatus { timeout };
            let finish = call(socket, &request, |value| progress.show(&value))?;
            progress.clear();
            return show::end(finish, json, show::rollout_status);
        }
        Rollout::Pause(Reason { reason, json }) => (Request::RolloutPause { reason }, json),
        Rollout::Resume(Reason { reason, json }) => (Request::RolloutResume { reason }, json),
        Rollout::Abort(Reason { reason, json }) => (Request::RolloutAbort { reason }, json),
        Rollout::Promote(Reason { reason, json }) => (Request::RolloutPromote { reason }, json),
    };
    ordered(socket, &request, json)
}

fn ordered(socket: &Path, request: &Request, json: bool) -> Result<(), Exit> {
    show::end(ask(socket, request)?, json, show::rollout_status)
}

fn force_sync(socket: &Path, args: ForceSync) -> Result<(), Exit> {
    let json = args.json;
    let selection = Selection {
        names: args.agents,
        groups: args.groups,
        all: args.all,
    };
    let request = Request::ForceSync {
        selection,
        full: args.full,
        generation: args.generation,
        accept: args.accept,
        wait: !args.no_wait,
        timeout: args.timeout.as_secs().max(1),
    };
    let hosts = show::force::Hosts::new(json);
    hosts.on_interrupt();
    let finish = call(socket, &request, |news| hosts.show(&news))?;
    hosts.clear();
    let Finish {
        exit,
        mut result,
        message,
    } = finish;
    if json {
        result = serde_json::Value::Null; // it was printed line by line
    }
    let table = if args.no_wait {
        show::force::ordered
    } else {
        show::force::synced
    };
    let finish = Finish {
        exit,
        result,
        message,
    };
    show::end(finish, false, table)
}

fn ask(socket: &Path, request: &Request) -> Result<Finish, Exit> {
    call(socket, request, |_| {})
}

fn call(
    socket: &Path,
    request: &Request,
    progress: impl FnMut(serde_json::Value),
) -> Result<Finish, Exit> {
    admin::call(config::DAEMON, socket, request, progress)
        .map_err(|error| Exit::new(error.exit_code(), error))
}

/// The daemon's life is the same for master and agent.
struct Daemon(Master);

impl Service for Daemon {
    type Config = Config;

    async fn start(config: Config, kept: &mut Option<Listener>) -> Result<Self, Exit> {
        Ok(Self(Master::start(config, kept).await?))
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
    match serve::check_files(&config).into_iter().next() {
        None => Ok(config),
        Some(error) => Err(Exit::new(exit::USAGE, error)),
    }
}

/// What `check-config --json` prints. The keys are for scripts and stay as they are.
#[derive(Default, Serialize)]
struct Checked {
    /// Whether `serve` would start.
    ok: bool,
    /// Why it would not.
    errors: Vec<String>,
    /// What is probably not meant.
    doubts: Vec<String>,
}

/// Everything that `serve` would stumble over, and what is probably not meant. Nothing is changed.
fn check_config(path: &Path, json: bool) -> Result<(), Exit> {
    let mut checked = Checked::default();
    match Config::load(path) {
        Ok(config) => {
            let errors = serve::check_files(&config);
            let errors = errors.iter().map(|error| clamcast_daemon::chain(error));
            checked.errors.extend(errors);
            checked
                .errors
                .extend(preflight::obstacles(&config, running(&config).as_slice()));
            let unused = config.without_effect.iter();
            let unused = unused.map(|key| format!("{key} has no effect in this version"));
            checked.doubts.extend(unused);
            let doubts = preflight::doubts(&config, Timestamp::now());
            checked.doubts.extend(doubts);
        }
        Err(error) if json => checked.errors.push(clamcast_daemon::chain(&error)),
        Err(error) => return Err(Exit::new(exit::USAGE, error)),
    }
    checked.ok = checked.errors.is_empty();
    if json {
        say!("{:#}", serde_json::to_value(&checked)?);
    } else {
        for error in &checked.errors {
            say!("error: {error}");
        }
        for doubt in &checked.doubts {
            say!("doubtful: {doubt}");
        }
        let path = path.display();
        match checked.errors.len() {
            0 => say!("{path}: good"),
            count => say!("{path}: `serve` would not start, for {count} error(s)"),
        }
    }
    match checked.ok {
        true => Ok(()),
        false => Err(Exit::quietly(exit::USAGE)),
    }
}

/// The master that answers at the configured socket, if one does and this user may ask it.
fn running(config: &Config) -> Option<preflight::Running> {
    let finish = ask(&config.listen.admin, &Request::Status).ok()?;
    serde_json::from_value(finish.result.get("daemon")?.clone()).ok()
}

fn verify(
    config: &Path,
    state: Option<PathBuf>,
    keys: Option<PathBuf>,
    json: bool,
) -> Result<(), Exit> {
    let (state, keys) = match (state, keys) {
        (Some(state), Some(keys)) => (state, ("--keys", keys)),
        (Some(state), None) => {
            let keys = state.join("keys.json");
            eprintln!(
                "the keys are the copy in {}; --keys FILE for an independent check",
                keys.display()
            );
            (state, ("--state", keys))
        }
        (None, keys) => {
            let config =
                Config::load(config).map_err(|error| Exit::new(error.exit_code(), error))?;
            let configured = ("signing.keys", config.signing.keys);
            (
                config.state,
                keys.map_or(configured, |keys| ("--keys", keys)),
            )
        }
    };
    let (key, keys) = keys;
    let keys = serve::load_keys(key, &keys).map_err(|error| {
        let code = if let StartError::Read(error) = &error {
            error.exit_code()
        } else {
            exit::USAGE
        };
        Exit::new(code, error)
    })?;
    let origin = serve::audit_origin(&keys.fleet);
    let verification = audit::verify(&state.join("audit"), &keys.audit, Some(&origin))?;
    show::audit::verification(&verification, json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_says_something() {
        assert_eq!(reason(" looked at it "), Ok("looked at it".to_owned()));
        let long = "x".repeat(REASON_BYTES_MAX + 1);
        for line in [
            "publish --accept",
            "force-sync web1 --accept",
            "rollout pause --reason",
            "rollback 1 --reason",
            "pin db --reason",
        ] {
            for blank in ["", " \t", &long] {
                let words = ["clamcast-master"].into_iter().chain(line.split(' '));
                assert!(Cli::try_parse_from(words.clone().chain(["looked"])).is_ok());
                let error = Cli::try_parse_from(words.chain([blank])).err().expect(line);
                assert_eq!(error.exit_code(), i32::from(exit::USAGE));
            }
        }
    }
}
