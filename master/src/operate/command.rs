//! Runs the commands of the command line.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clamcast_daemon::admin::{self, Finish};
use clamcast_daemon::audit;
use clamcast_daemon::exit::{self, Exit};
use clamcast_daemon::{say, table};
use clap::Parser as _;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::api::{Change, ForceRequest, Request};
use super::cli::{Audit, Cli, Command, ForceSync, OfHost, Reason, Rollout};
use super::show::Unreadable;
use super::{preflight, show};
use crate::config::{self, Config, KeyError};
use crate::fleet::force::Selection;
use crate::publish::check;
use crate::record::events;

/// Time between two looks of `status --watch`.
const WATCH: Duration = Duration::from_secs(2);

/// Runs the command of this process. `serve` is what runs the daemon, given its configuration file
/// and how often `-v` was given.
pub fn main(serve: impl FnOnce(&Path, u8) -> Result<(), Exit>) -> ExitCode {
    let cli = Cli::parse();
    exit::end(config::DAEMON.program, run(cli, serve))
}

fn run(cli: Cli, serve: impl FnOnce(&Path, u8) -> Result<(), Exit>) -> Result<(), Exit> {
    let socket = &cli.socket;
    match cli.command {
        Command::Serve { config } => serve(&config, cli.verbose),
        Command::LoadTest => check::serve(),
        Command::CheckConfig { config, json } => check_config(&config, json),
        Command::Publish {
            wait,
            accept,
            dry_run,
            supersede,
            json,
        } => {
            let mut accept = accept.into_iter();
            let (accept, units) = (accept.next(), accept.collect());
            if dry_run {
                let finish = ask(socket, &Request::Preview { accept, units })?;
                return show::end(finish, json, show::preview);
            }
            let progress = show::Progress::new(wait && !json);
            let request = Request::Publish {
                wait,
                accept,
                units,
                supersede,
            };
            let finish = call(socket, &request, |value| progress.show(value))?;
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
        } => ordered(socket, Change::RollBack(generation), reason, json),
        Command::Pin {
            group,
            generation,
            reason,
            json,
        } => ordered(socket, Change::Pin(group, generation), reason, json),
        Command::Unpin {
            group,
            reason,
            json,
        } => ordered(socket, Change::Unpin(group), reason, json),
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
                let ended = call(socket, &request, |piece| records.show(piece));
                // Whoever follows goes on with a daemon that was restarted where the last one ended.
                let (code, word) = match &ended {
                    Ok(finish) => (finish.exit, finish.message.clone()),
                    Err(exit) => (exit.code, exit.error.as_ref().map(|it| format!("{it:#}"))),
                };
                if !follow || code != exit::UNREACHABLE || !records.begun() {
                    return show::end(ended?, false, |()| {});
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
    let (change, Reason { reason, json }) = match command {
        Rollout::Status { timeout, json } => return rollout_status(socket, timeout, json),
        Rollout::Pause(reason) => (Change::Pause, reason),
        Rollout::Resume(reason) => (Change::Resume, reason),
        Rollout::Abort(reason) => (Change::Abort, reason),
        Rollout::Promote(reason) => (Change::Promote, reason),
        Rollout::SetAside(OfHost { host, reason }) => (Change::SetAside(host), reason),
        Rollout::Restore(OfHost { host, reason }) => (Change::Restore(host), reason),
    };
    ordered(socket, change, reason, json)
}

/// Whoever waits goes on waiting with a daemon that was restarted or has read its configuration again,
/// for the time that is left.
fn rollout_status(socket: &Path, timeout: Option<Duration>, json: bool) -> Result<(), Exit> {
    let progress = show::Progress::new(timeout.is_some() && !json);
    let begun = Instant::now();
    let mut answered = false;
    let ended = loop {
        let left = timeout.map(|timeout| timeout.saturating_sub(begun.elapsed()));
        let ended = call(socket, &Request::RolloutStatus { timeout: left }, |value| {
            answered = true;
            progress.show(value)
        });
        let code = match &ended {
            Ok(finish) => finish.exit,
            Err(exit) => exit.code,
        };
        answered |= ended.is_ok();
        if code != exit::UNREACHABLE || !answered || left.is_none_or(|left| left.is_zero()) {
            break ended;
        }
        std::thread::sleep(WATCH.min(left.unwrap_or_default()));
    };
    progress.clear();
    show::end(ended?, json, show::rollout::status)
}

fn ordered(socket: &Path, change: Change, reason: Option<String>, json: bool) -> Result<(), Exit> {
    let request = Request::Rollout { change, reason };
    show::end(ask(socket, &request)?, json, show::rollout::status)
}

fn force_sync(socket: &Path, args: ForceSync) -> Result<(), Exit> {
    let json = args.json;
    let selection = Selection {
        names: args.agents,
        groups: args.groups,
        all: args.all,
    };
    let request = Request::ForceSync(ForceRequest {
        selection,
        full: args.full,
        generation: args.generation,
        accept: args.accept,
        wait: !args.no_wait,
        timeout: args.timeout,
    });
    let hosts = show::force::Hosts::new(json);
    hosts.on_interrupt();
    let finish = call(socket, &request, |news| hosts.show(news))?;
    hosts.clear();
    let finish = Finish {
        // As JSON, it was printed line by line.
        result: if json { Value::Null } else { finish.result },
        ..finish
    };
    let table = if args.no_wait {
        show::force::ordered
    } else {
        show::force::synced
    };
    show::end(finish, false, table)
}

fn ask(socket: &Path, request: &Request) -> Result<Finish, Exit> {
    call(socket, request, |_| Ok(()))
}

/// Sends a request, and shows progress with `show`. Progress that cannot be read is reported once, at
/// once, because a command that follows may never end; a command that then ends well ends with
/// [`exit::FAILED`].
fn call(
    socket: &Path,
    request: &Request,
    mut show: impl FnMut(&Value) -> serde_json::Result<()>,
) -> Result<Finish, Exit> {
    let mut unreadable = false;
    let progress = |progress: Value| {
        if let Err(source) = show(&progress)
            && !std::mem::replace(&mut unreadable, true)
        {
            eprintln!("{}", crate::chain(&Unreadable(source)));
        }
    };
    let finish = admin::call(config::DAEMON, socket, request, progress);
    let mut finish = finish.map_err(|error| Exit::new(error.exit_code(), error))?;
    if unreadable && finish.exit == exit::DONE {
        finish.exit = exit::FAILED;
    }
    Ok(finish)
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
            let errors = preflight::unreadable(&config);
            let errors = errors.iter().map(|error| crate::chain(error.as_ref()));
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
        Err(error) if json => checked.errors.push(crate::chain(&error)),
        Err(error) => return Err(Exit::new(exit::USAGE, error)),
    }
    checked.ok = checked.errors.is_empty();
    if json {
        say!("{}", table::json(&serde_json::to_value(&checked)?));
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
    /// The rest of the answer does not matter, so a daemon of another version may answer, too.
    #[derive(Deserialize)]
    struct Status {
        daemon: preflight::Running,
    }
    let finish = ask(&config.listen.admin, &Request::Status).ok()?;
    let status = serde_json::from_value::<Status>(finish.result);
    status.ok().map(|status| status.daemon)
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
    let keys = config::load_keys(key, &keys).map_err(|error| {
        let code = if let KeyError::Read(error) = &error {
            error.exit_code()
        } else {
            exit::USAGE
        };
        Exit::new(code, error)
    })?;
    let origin = config::audit_origin(&keys.fleet);
    let verification = audit::verify(&state.join("audit"), &keys.audit, Some(&origin))?;
    show::audit::verification(&verification, json)
}
