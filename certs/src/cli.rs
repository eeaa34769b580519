//! The command line of `clamcast-certs`: parses it, calls the library, and prints the outcome.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clamcast_daemon::exit::{self, Exit};
use clamcast_daemon::table::Table;
use clamcast_proto::identity::{Certificate, Role};
use clamcast_proto::{AgentName, FleetName, GroupName};
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use jiff::{Timestamp, Unit};

use crate::{Change, Host, Issued, Listed, Outcome, Rotated, Written};

/// Makes the certificates and signing keys of a clamcast fleet, lists, revokes and rotates them
///
/// All of it lives in one directory, which holds the keys to every scanner of the fleet: keep it
/// on a machine of its own, away from the master. Master and agents get copies of the few files
/// that they need; each command says which, and what comes next. The SHA-256 that is shown beside a
/// file is that of the certificate, or of the public key, by which logs and receipts name it.
#[derive(Parser)]
#[command(name = PROGRAM, version, after_long_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const PROGRAM: &str = "clamcast-certs";

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  2  wrong usage, or something stands in the way; the message says what to do
  4  refused: a file in the directory is signed by another CA or key
  5  failed: disk, rights, a damaged file

Example:
  clamcast-certs init   --dir fleet --fleet example
  clamcast-certs master --dir fleet --host mirror.example.net
  clamcast-certs agent  --dir fleet web1 --group canary
  clamcast-certs list   --dir fleet";

#[derive(Subcommand)]
enum Command {
    /// Makes a new fleet: CA, root key and signing keys
    ///
    /// Writes DIR/ca.pem and ca.key (the CA, ten years), root.key (signs which manifest and audit
    /// keys count; belongs offline), manifest.key and audit.key (for the master), manifest.pub (the
    /// key set that agents trust) and fleet.toml. An init that was interrupted is simply run again.
    Init {
        #[command(flatten)]
        at: Directory,
        /// The fleet's name: letters, digits, `.`, `_` and `-`
        ///
        /// It stands in every certificate and every signed statement and cannot be changed later.
        #[arg(long, value_name = "NAME")]
        fleet: FleetName,
        /// Make a new fleet in place of the one in DIR, whose files move to DIR/replaced-TIME-N
        ///
        /// The old fleet is orphaned: no master and no agent of it trusts the new keys, and every
        /// host has to be visited again.
        #[arg(long)]
        force: bool,
    },
    /// Issues the master's certificate, for one year
    ///
    /// Writes DIR/master/cert.pem and key.pem, and keeps the hosts in DIR/fleet.toml, so that every
    /// agent's configuration written from then on says where the master is.
    Master {
        #[command(flatten)]
        at: Directory,
        /// DNS name or IP address by which agents reach the master; may be repeated
        ///
        /// Agents try them in the order given, always at port 7310.
        #[arg(long = "host", value_name = "NAME_OR_IP", required = true)]
        hosts: Vec<Host>,
        /// Issue a new key and certificate although there are some
        #[arg(long)]
        force: bool,
    },
    /// Issues an agent's certificate, for one year, with all that its host needs
    ///
    /// Writes DIR/agents/NAME/ with cert.pem, key.pem, ca.pem, manifest.pub and agent.toml, which
    /// work as they are, wherever they are copied to.
    Agent {
        #[command(flatten)]
        at: Directory,
        /// The agent's name; the host's own name is a good one
        ///
        /// Letters, digits, `.`, `_` and `-`. No two hosts may have the same.
        #[arg(value_name = "NAME")]
        name: AgentName,
        /// A group that the agent belongs to; may be repeated
        #[arg(long = "group", value_name = "G")]
        groups: Vec<GroupName>,
        /// Issue a new key and certificate although there are some, and write all files again
        ///
        /// An agent.toml that was edited is kept as agent.toml.old. The old certificate counts
        /// until it expires; to withdraw it, revoke NAME before.
        #[arg(long)]
        force: bool,
    },
    /// Lists all certificates that were issued, and whether they count
    ///
    /// `expiring` has less than 30 days left; `replaced` means that the holder has a newer one. Serial
    /// numbers and fingerprints are cut short, --json has them in full.
    List {
        #[command(flatten)]
        at: Directory,
        /// For machines: an array of objects with all facts
        #[arg(long)]
        json: bool,
    },
    /// Revokes all certificates of an agent
    ///
    /// Writes DIR/revoked.json, signed by the CA. It takes effect on the master: copied to where
    /// `revoked` in its configuration says, it closes open connections within 5 seconds.
    Revoke {
        #[command(flatten)]
        at: Directory,
        /// The agent
        #[arg(value_name = "NAME")]
        name: AgentName,
        /// The reason, in a few words; the list keeps the reason
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
    },
    /// Makes a new manifest or audit key, and a key set in which it precedes the old ones
    ///
    /// Needs DIR/root.key. Writes DIR/manifest.key or audit.key, keeps the previous key as NAME.key.old,
    /// and raises the version of DIR/manifest.pub. Statements that the old key signed still count. The
    /// previous key may be lost. After an interruption run the command again.
    Rotate {
        #[command(flatten)]
        at: Directory,
        /// The key to replace
        #[arg(value_name = "KEY")]
        key: Rotated,
        /// Make no key, but a key set without the old ones, and delete manifest.key.old
        ///
        /// For an old key that was stolen or is no longer needed. Without old manifest keys a new epoch
        /// begins: the master publishes again, and agents refuse all earlier generations. The master must
        /// have run with the new audit key before the old ones are dropped, so that it has signed the
        /// log. Otherwise it refuses the log until --restore-old.
        #[arg(long)]
        drop_old: bool,
        /// Make no key, but a key set that has the key of NAME.key.old again
        ///
        /// For a master that refuses its log because the old audit key was dropped too early.
        #[arg(long, conflicts_with = "drop_old")]
        restore_old: bool,
    },
}

#[derive(Args)]
struct Directory {
    /// The directory that holds the fleet
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    exit::end(PROGRAM, run(Cli::parse().command))
}

/// The command line, for manual pages and completions.
pub fn command_line() -> clap::Command {
    Cli::command()
}

fn run(command: Command) -> Result<(), Exit> {
    let now = Timestamp::now().round(Unit::Second)?;
    match command {
        Command::Init { at, fleet, force } => init(&at.dir, &fleet, force, now),
        Command::Master { at, hosts, force } => {
            let issued = crate::issue_master(&at.dir, &hosts, force, now)
                .map_err(|error| Exit::new(error.exit_code(), error))?;
            master(&at.dir, &issued)
        }
        Command::Agent {
            at,
            name,
            groups,
            force,
        } => {
            let issued = crate::issue_agent(&at.dir, &name, &groups, force, now)
                .map_err(|error| Exit::new(error.exit_code(), error))?;
            agent(&at.dir, &name, &issued)
        }
        Command::List { at, json } => list(&at.dir, json, now),
        Command::Rotate {
            at,
            key,
            drop_old,
            restore_old,
        } => {
            let change = match (drop_old, restore_old) {
                (true, _) => Change::DropOld,
                (false, true) => Change::RestoreOld,
                (false, false) => Change::Add,
            };
            rotate(&at.dir, key, change, now)
        }
        Command::Revoke { at, name, reason } => revoke(&at.dir, &name, reason.as_deref(), now),
    }
}

fn init(dir: &Path, fleet: &FleetName, force: bool, now: Timestamp) -> Result<(), Exit> {
    let done =
        crate::init(dir, fleet, force, now).map_err(|error| Exit::new(error.exit_code(), error))?;
    if done.resumed {
        eprintln!("{PROGRAM}: an earlier init had not finished; started over");
    }
    if let Some(moved_to) = done.moved_to {
        eprintln!(
            "{PROGRAM}: what stood there is now in {}",
            moved_to.display()
        );
        if !done.resumed {
            eprintln!(
                "{PROGRAM}: no master and no agent that was set up before trusts the new keys; \
                 every host needs a new bundle"
            );
        }
    }
    report(
        "the fleet was made",
        &format!(
            "{}\n\
         {root} belongs offline: move it to a medium in a safe, with a second copy elsewhere.\n\
         Only a change of the manifest or audit key needs root.key. A thief of root.key controls the fleet.\n\
         next: clamcast-certs master --dir {dir} --host NAME_OR_IP\n",
            describe(&done.files),
            root = dir.join("root.key").display(),
            dir = quoted(dir),
        ),
    )
}

fn master(dir: &Path, issued: &Issued) -> Result<(), Exit> {
    tell_earlier(issued, "the master", "");
    if !issued.left.is_empty() {
        eprintln!(
            "{PROGRAM}: agents set up before look for the master at {} too; change `master` in \
             their agent.toml",
            joined(&issued.left)
        );
    }
    report(
        "the certificate was issued",
        &format!(
            "{}\n\
         for /etc/clamcast on the master: ca.pem, manifest.pub, manifest.key, audit.key and master/ \
         of {dir}\n\
         next: clamcast-certs agent --dir {dir} NAME [--group G]...\n",
            describe(&issued.files),
            dir = quoted(dir),
        ),
    )
}

fn agent(dir: &Path, name: &AgentName, issued: &Issued) -> Result<(), Exit> {
    let dir = quoted(dir);
    let withdraw =
        format!("; to withdraw: clamcast-certs revoke --dir {dir} {name}, then agent --force");
    tell_earlier(issued, &format!("agent {name}"), &withdraw);
    if let Some(saved) = &issued.saved {
        eprintln!(
            "{PROGRAM}: agent.toml had been changed; what it said is in {}",
            saved.display()
        );
    }
    let groups = groups(&issued.certificate);
    if let Some(before) = issued.earlier.last().map(self::groups)
        && before != groups
    {
        eprintln!("{PROGRAM}: {name} was {before}");
    }
    report(
        "the certificate was issued",
        &format!(
            "{}\n\
         {name} is {groups}\n\
         next: copy {} to {name}, as /etc/clamcast, and run there\n      \
         systemctl enable --now clamcast-agent\n",
            describe(&issued.files),
            quoted(&issued.bundle),
        ),
    )
}

/// Says that older certificates still count, lest somebody believes them gone.
fn tell_earlier(issued: &Issued, holder: &str, withdraw: &str) {
    if let Some(last) = issued.earlier.last() {
        eprintln!(
            "{PROGRAM}: {holder} has {} from before, good until {}{withdraw}",
            certificates(issued.earlier.len()),
            last.not_after,
        );
    }
}

/// Says that there may be certificates that nobody knows of any more.
fn tell_lost(dir: &Path) {
    eprintln!(
        "{PROGRAM}: the record of what was issued is not whole: only the newest certificates, those \
         in the bundles, are known; put {} back from a backup",
        dir.join("issued").display()
    );
}

fn list(dir: &Path, json: bool, now: Timestamp) -> Result<(), Exit> {
    let listed = crate::list(dir, now).map_err(|error| Exit::new(error.exit_code(), error))?;
    if listed.iter().any(|one| !one.recorded) {
        tell_lost(dir);
    }
    if json {
        return print(&(serde_json::to_string_pretty(&listed)? + "\n"));
    }
    if listed.is_empty() {
        eprintln!(
            "{PROGRAM}: nothing was issued yet; next: clamcast-certs master --dir {} --host NAME_OR_IP",
            quoted(dir)
        );
        return Ok(());
    }
    print(&table(&listed))
}

fn revoke(dir: &Path, name: &AgentName, reason: Option<&str>, now: Timestamp) -> Result<(), Exit> {
    let done = crate::revoke(dir, name, reason, now)
        .map_err(|error| Exit::new(error.exit_code(), error))?;
    if !done.recorded {
        tell_lost(dir);
    }
    if done.revoked.is_empty() {
        return print(&match done.before.last() {
            Some(last) => format!(
                "{name} was revoked already, at {}{}; nothing was changed\n",
                last.time,
                because(last.reason.as_deref()),
            ),
            None => format!("every certificate of {name} has expired; nothing was changed\n"),
        });
    }
    let mut text = String::new();
    for revoked in &done.revoked {
        let _ = writeln!(text, "revoked serial {} of {name}", revoked.serial);
    }
    let path = done.path.display();
    let _ = write!(
        text,
        "{path}: revocation list, version {}, signed by the CA\n\n\
         next: copy {path} to /etc/clamcast/revoked.json on the master, which then acts within 5 s\n",
        done.version,
    );
    report("it was revoked", &text)
}

fn rotate(dir: &Path, key: Rotated, change: Change, now: Timestamp) -> Result<(), Exit> {
    let done = crate::rotate(dir, key, change, now)
        .map_err(|error| Exit::new(error.exit_code(), error))?;
    match done.outcome {
        Outcome::Changed => {}
        Outcome::Unchanged => eprintln!(
            "{PROGRAM}: the key set {}; it was not changed",
            match change {
                Change::DropOld => "has no old key of this kind",
                Change::Add | Change::RestoreOld => "has the key already",
            },
        ),
        Outcome::Resumed => eprintln!(
            "{PROGRAM}: an earlier rotation had not finished; it is finished now, and nothing else \
             was done"
        ),
    }
    let mut text = describe(&done.files);
    if let Some(old) = &done.old {
        let _ = writeln!(text, "{}: the previous private key", old.display());
    }
    for dropped in &done.dropped {
        let _ = writeln!(text, "no longer in the key set: SHA-256 {dropped}");
    }
    let (version, epoch, keys) = (done.version, done.epoch, done.keys);
    let name = match key {
        Rotated::Manifest => "manifest",
        Rotated::Audit => "audit",
    };
    let _ = writeln!(
        text,
        "key set: version {version}, epoch {epoch}, {keys} {name} {}\n",
        if keys == 1 { "key" } else { "keys" },
    );
    let paths: Vec<_> = done.files.iter().map(|file| quoted(&file.path)).collect();
    let _ = writeln!(
        text,
        "next: copy {}, in this order, to /etc/clamcast on the master, and restart the master \
         (systemctl restart clamcast-master);\n      \
         agents get the key set from it",
        paths.join(" and "),
    );
    let again = format!("clamcast-certs rotate --dir {} {name}", quoted(dir));
    if keys > 1 {
        let _ = writeln!(text, "then, if an old key was stolen: {again} --drop-old");
    } else if key == Rotated::Manifest {
        let _ = writeln!(text, "      it publishes in epoch {epoch}");
    } else if done.old.is_some() {
        let _ = writeln!(
            text,
            "if the master then refuses its audit log: {again} --restore-old",
        );
    }
    report("the key set was written", &text)
}

/// `in group dmz`, as the certificate says it.
fn groups(certificate: &Certificate) -> String {
    let identity = certificate.identity.as_ref();
    match identity.map(|identity| &identity.role) {
        Some(Role::Agent { groups, .. }) if groups.len() == 1 => format!("in group {}", groups[0]),
        Some(Role::Agent { groups, .. }) if !groups.is_empty() => {
            format!("in groups {}", joined(groups))
        }
        Some(Role::Agent { .. } | Role::Master) | None => "in no group".to_owned(),
    }
}

fn joined<T: ToString>(list: &[T]) -> String {
    let list: Vec<String> = list.iter().map(T::to_string).collect();
    list.join(", ")
}

fn because(reason: Option<&str>) -> String {
    reason.map_or(String::new(), |reason| format!(" ({reason})"))
}

fn certificates(count: usize) -> String {
    match count {
        1 => "1 certificate".to_owned(),
        count => format!("{count} certificates"),
    }
}

fn table(listed: &[Listed]) -> String {
    let short = |digits: &str| digits.chars().take(12).collect::<String>();
    let mut table = Table::new([
        "name", "role", "state", "expires", "groups", "serial", "sha-256",
    ]);
    for one in listed {
        let replaced = if one.replaced { ", replaced" } else { "" };
        table.row([
            one.name.clone(),
            one.role.to_owned(),
            format!("{}{replaced}", one.state),
            one.not_after.strftime("%Y-%m-%d").to_string(),
            joined(&one.groups),
            short(&one.serial.0),
            one.fingerprint.short(),
        ]);
    }
    format!("{table}\n")
}

/// What was written: path, what it is, when it expires, and its fingerprint.
fn describe(files: &[Written]) -> String {
    let mut text = String::new();
    for file in files {
        let _ = write!(text, "{}: {}", file.path.display(), file.what);
        if let Some(not_after) = file.not_after {
            let _ = write!(text, ", expires {not_after}");
        }
        let _ = writeln!(text);
        if let Some(fingerprint) = file.fingerprint {
            let _ = writeln!(text, "    SHA-256 {fingerprint}");
        }
    }
    text
}

/// A path as it can be pasted into a shell.
fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// Prints what came of a command that changed something. Where that cannot be read, it is `done` all
/// the same.
fn report(done: &str, text: &str) -> Result<(), Exit> {
    print(text).map_err(|exit| Exit {
        error: exit
            .error
            .map(|error| error.context(format!("{done}; only this text is missing"))),
        ..exit
    })
}

/// Results go to stdout. A reader that has seen enough (`| head`) is not a failure.
fn print(text: &str) -> Result<(), Exit> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            let error = Exit::from(error);
            Err(Exit {
                error: error
                    .error
                    .map(|error| error.context("cannot write to stdout")),
                ..error
            })
        }
        Ok(()) | Err(_) => Ok(()),
    }
}
