//! What may stand on the command line.

use std::path::PathBuf;
use std::time::Duration;

use crate::config;
use crate::fleet::force::Meant;
use crate::operate::admin::REASON_BYTES_MAX;
use crate::record::events::{self, AgentPattern};
use clamcast_proto::{AgentName, AuditEvent, GroupName};
use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use clap::{ArgAction, Args, CommandFactory as _, Parser, Subcommand};
use jiff::Timestamp;

use crate::operate::{help, show};

/// Publishes the ClamAV databases of a mirror directory to a fleet of agents, and shows what came
/// of it on every host.
///
/// `serve` is the daemon. The other commands talk to it through its admin socket, which root and
/// the members of its admin_group may use; `check-config` and `audit verify` read files alone.
#[derive(Parser)]
#[command(version, max_term_width = 100, after_long_help = help::MASTER)]
pub(crate) struct Cli {
    /// The daemon's admin socket
    #[arg(long, global = true, display_order = 100, value_name = "PATH", default_value = config::DEFAULT_SOCKET)]
    pub(crate) socket: PathBuf,

    /// More of the daemon's log on stderr (twice: all of it)
    #[arg(short, long, global = true, display_order = 101, action = ArgAction::Count)]
    pub(crate) verbose: u8,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The command line, for manual pages and completions.
pub fn command_line() -> clap::Command {
    Cli::command()
}

#[derive(Subcommand)]
pub(crate) enum Command {
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
    /// Load databases with clamscan for the daemon, as clamcast-loadtest@.service does
    #[command(hide = true)]
    LoadTest,
    /// Try what `serve` would do at its start, and say what is wrong, changing nothing
    ///
    /// An error is what the daemon would not start with (exit 2); what it would start with, but what
    /// is probably not meant, is doubtful (exit 0). Run it as root, who may read the keys.
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
        /// Publish also units that are held because they shrank, are older, were withdrawn or
        /// rejected, or are still being written: these, or all. The reason goes into the audit log
        #[arg(long, value_names = ["REASON", "UNIT"], num_args = 1.., value_parser = reason)]
        accept: Vec<String>,
        /// Show which units would be published or held, and why, and publish nothing
        #[arg(long, conflicts_with_all = ["wait", "supersede"])]
        dry_run: bool,
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
pub(crate) struct ForceSync {
    /// Agents: names, or patterns like 'db-*'
    #[arg(value_name = "AGENT_OR_GLOB", required_unless_present_any = ["groups", "all"])]
    pub(crate) agents: Vec<String>,
    /// The agents of a group; may be repeated
    #[arg(long = "group", value_name = "GROUP")]
    pub(crate) groups: Vec<GroupName>,
    /// Every agent
    #[arg(long, conflicts_with_all = ["agents", "groups"])]
    pub(crate) all: bool,
    /// Send whole files, no deltas
    #[arg(long)]
    pub(crate) full: bool,
    /// A generation that was halted, aborted or rolled back (1.42, or 42), on hosts that are below
    /// it; or only if it is the current one. Needs --accept, and never goes with --all
    #[arg(long, value_name = "N", conflicts_with = "all", requires = "accept")]
    pub(crate) generation: Option<Meant>,
    /// Why, for the audit log
    #[arg(long, value_name = "REASON", value_parser = reason)]
    pub(crate) accept: Option<String>,
    /// Return once the agents are told; exit 1 if one is not connected
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// How long to wait for them
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = humantime::parse_duration)]
    pub(crate) timeout: Duration,
    /// Print JSON, one object a line
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Subcommand)]
pub(crate) enum Rollout {
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
    /// Do not count a host's refusals, until `restore`
    #[command(after_long_help = help::ROLLOUT)]
    SetAside(OfHost),
    /// Count the refusals of a host that was set aside again
    #[command(after_long_help = help::ROLLOUT)]
    Restore(OfHost),
}

#[derive(Args)]
pub(crate) struct OfHost {
    /// The host: an agent's name
    pub(crate) host: AgentName,
    #[command(flatten)]
    pub(crate) reason: Reason,
}

#[derive(Args)]
pub(crate) struct Reason {
    /// Why, for the audit log
    #[arg(long, value_name = "TEXT", value_parser = reason)]
    pub(crate) reason: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Subcommand)]
pub(crate) enum Audit {
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
pub(crate) struct Filter {
    /// Only from this time on: a day like 2026-11-22 (from midnight UTC), a time like
    /// 2026-11-22T08:00:00Z, or a duration like 24h
    #[arg(long, value_name = "TIME", value_parser = since)]
    pub(crate) since: Option<Timestamp>,
    /// Only what an agent did or what was done to it: its name, or a pattern like 'db-*'
    #[arg(long, value_name = "AGENT_OR_GLOB")]
    pub(crate) agent: Option<AgentPattern>,
    /// Only this event
    #[arg(long, value_name = "EVENT", ignore_case = true,
        value_parser = PossibleValuesParser::new(AuditEvent::of_master().map(AuditEvent::name)).map(|event| event.to_lowercase()))]
    pub(crate) event: Option<String>,
    /// Only what this operator did: a user name or id
    #[arg(long, value_name = "USER")]
    pub(crate) operator: Option<String>,
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

#[cfg(test)]
mod tests {
    use clamcast_daemon::exit;

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
