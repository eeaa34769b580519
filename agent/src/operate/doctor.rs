//! `clamcast-agent doctor`: what on this host would keep an install from being live, and what to do
//! about it.
//!
//! It changes nothing and disturbs nobody: no lock, no port, no file is made, and nobody speaks to
//! the master in the name of an agent that runs, or of one that never has and that the master so
//! does not know. Facts are gathered in thin code; what they
//! mean is decided by functions without effects, the `judge` ones.

mod confinement;
mod identity;
mod installed;
mod master;
mod program;
mod rights;
mod scanner;
mod space;
mod updaters;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use clamcast_daemon::input::{self, InputError};
use clamcast_daemon::table;
use jiff::Timestamp;
use nix::unistd::{Gid, Uid, geteuid, initgroups, setgid, setuid};
use serde::Serialize;

use crate::chain;
use crate::clamd::{Address, Settings, running_pid};
use crate::config::{Config, DEFAULT_PATH};
use crate::host::memory;
use crate::host::state::StateError;
use crate::host::{Host, Node, Process, User};
use crate::install::watch;
use crate::keeper::trust;
use crate::link::endpoint::FILE_BYTES_MAX;

pub use updaters::Signs;

/// The agent's user where nothing says otherwise: that of the unit in the package.
const UNIT: &str = "clamcast-agent.service";

/// Where units are, the ones that count first (systemd.unit(5)).
const UNIT_DIRECTORIES: [&str; 5] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];

/// How a check came out.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// As it should be.
    Good,
    /// It works, and somebody should know.
    Note,
    /// It has to be put right.
    Bad,
    /// It could not be looked at.
    Unknown,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Note => "note",
            Self::Bad => "bad",
            Self::Unknown => "unknown",
        }
    }
}

/// One thing that was found. The keys are for scripts and stay as they are.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Finding {
    /// Which check.
    pub check: &'static str,
    /// How it came out.
    pub state: State,
    /// What is there; of `unknown`, why it could not be looked at.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
    /// Whether it is that this process may not look, which another user may.
    #[serde(skip)]
    denied: bool,
}

impl Finding {
    fn good(check: &'static str, found: impl Into<String>) -> Self {
        Self::new(check, State::Good, found, None)
    }

    fn note(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(check, State::Note, found, Some(advice.into()))
    }

    fn bad(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(check, State::Bad, found, Some(advice.into()))
    }

    fn unknown(check: &'static str, why: impl Into<String>, advice: Option<String>) -> Self {
        Self::new(check, State::Unknown, why, advice)
    }

    fn new(
        check: &'static str,
        state: State,
        found: impl Into<String>,
        advice: Option<String>,
    ) -> Self {
        Self {
            check,
            state,
            found: found.into(),
            advice,
            denied: false,
        }
    }

    /// Says whether it comes of what this process may not do.
    fn denied(self, denied: bool) -> Self {
        Self { denied, ..self }
    }

    /// The same as seen by `user`, who is not the agent's: what that user may not look at says
    /// nothing of the agent.
    fn seen_by(self, user: &User) -> Self {
        match self.denied {
            true => {
                let why = format!("{} may not look: {}", user.name, self.found);
                Self::unknown(self.check, why, None)
            }
            false => self,
        }
    }
}

/// Whether this, or what it comes of, is a want of rights.
fn is_denied(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.any(|cause| match cause.downcast_ref::<InputError>() {
        Some(error) => matches!(error, InputError::Denied { .. }),
        None => cause
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied),
    })
}

/// All that was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Nothing is bad.
    pub ok: bool,
    /// The user who looked. If it is not `agent_user`, all of it holds for this user only.
    pub user: String,
    /// Whom the agent runs as.
    pub agent_user: String,
    /// In the order of the checks.
    pub findings: Vec<Finding>,
}

/// What only root may see, gathered before the rights are given up.
#[derive(Clone, Debug)]
pub struct Inventory {
    /// The processes.
    pub processes: Vec<Process>,
    /// Who else brings databases.
    pub updaters: Signs,
    /// Whether those were all processes of the host.
    pub sees_all_processes: bool,
    /// The private key that the unit passes on to the agent in place of the configured file.
    pub key: Option<PassedKey>,
}

/// A private key that systemd reads for the agent (`LoadCredential=`), so that it may belong to root.
#[derive(Clone)]
pub struct PassedKey {
    path: PathBuf,
    /// `None` if this process may not read it.
    content: Option<Vec<u8>>,
}

impl std::fmt::Debug for PassedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("PassedKey").field(&self.path).finish()
    }
}

impl PassedKey {
    /// The one that this unit passes on. As in the daemon, a file that is absent or blank does not
    /// count.
    fn of(host: &Host, unit: &str) -> Option<Self> {
        let mut passed = settings(unit, "LoadCredential").rev();
        let path = passed.find_map(|value| value.strip_prefix("tls.key:"))?;
        let path = host.at(Path::new(path));
        match input::whole(&path, FILE_BYTES_MAX) {
            Ok(content) if content.trim_ascii().is_empty() => None,
            Ok(content) => Some(Self {
                path,
                content: Some(content),
            }),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Some(Self {
                path,
                content: None,
            }),
            Err(_) => None,
        }
    }
}

impl Inventory {
    /// Takes it, for an agent with this configuration.
    pub fn take(host: &Host, config_path: &Path) -> Self {
        let processes = host.processes();
        Self {
            updaters: updaters::look(host),
            // With `hidepid` others' are not there, and init is always another's.
            sees_all_processes: processes.iter().any(|process| process.pid == 1),
            key: unit(host, config_path).and_then(|unit| PassedKey::of(host, &unit)),
            processes,
        }
    }
}

/// The running agent's own view, asked for before the rights are given up: its socket may be root's and
/// the operators', and the agent's user is no operator.
#[derive(Debug)]
pub struct Running(master::Agent);

impl Running {
    /// Asks the agent of this configuration.
    pub async fn ask(config: &Config) -> Self {
        Self(master::Agent::ask(&config.admin, master::ANSWER_TIME).await)
    }
}

/// This process cannot become the agent's user.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// There is no such user.
    #[error(
        "there is no user `{0}`; make it with `useradd --system --home-dir /var/lib/clamcast/agent \
         --shell /usr/sbin/nologin {0}`, or name another one with --user"
    )]
    Nobody(String),
    /// Only root can.
    #[error("only root can look as user `{0}`; run this with sudo, or as that user")]
    NotRoot(String),
    /// The system does not let it.
    #[error("cannot become user `{user}`")]
    Become {
        /// The user.
        user: String,
        /// Why.
        source: nix::errno::Errno,
    },
}

/// The user whose rights count: `wanted`, else what the agent's unit says, else the owner of its
/// state directory, else whoever runs this.
pub fn agents_user(
    host: &Host,
    config_path: &Path,
    config: &Config,
    wanted: Option<&str>,
) -> Result<User, UserError> {
    let unit = || unit(host, config_path);
    let name = wanted.map(str::to_owned);
    let name = name.or_else(|| unit().map(|unit| unit_user(&unit)));
    if let Some(name) = name {
        return User::named(&name).ok_or(UserError::Nobody(name));
    }
    let owner = Node::at(&config.state).map(|node| User::numbered(node.uid));
    Ok(owner.unwrap_or_else(|_| User::this()))
}

/// The unit that runs this configuration, as text. Drop-ins come last and count: those named `.conf`,
/// by their names, of two with one name that of the directory that counts first (systemd.unit(5)).
fn unit(host: &Host, config_path: &Path) -> Option<String> {
    let mut directories = UNIT_DIRECTORIES.iter().map(Path::new);
    let mut text = directories.find_map(|path| host.text(path.join(UNIT)).ok())?;
    let mut dropins = BTreeMap::new();
    for directory in UNIT_DIRECTORIES.iter().rev() {
        let directory = PathBuf::from(format!("{directory}/{UNIT}.d"));
        let names = host.names(&directory).into_iter();
        let names = names.filter(|name| name.ends_with(".conf"));
        dropins.extend(names.map(|name| (name.clone(), directory.join(name))));
    }
    for path in dropins.values() {
        text += "\n"; // the last line of a file may lack its own
        text += &host.text(path).unwrap_or_default();
    }
    let text = text.replace("\\\n", " ");
    let start = settings(&text, "ExecStart").last()?;
    let ours = match start.split_once("--config") {
        Some((_, named)) => {
            let named = named.trim_start_matches(['=', ' ']).split(' ').next();
            named.map(Path::new) == Some(config_path)
        }
        None => config_path == Path::new(DEFAULT_PATH),
    };
    ours.then_some(text)
}

/// The user that it runs as.
fn unit_user(unit: &str) -> String {
    settings(unit, "User").last().unwrap_or("root").to_owned()
}

/// The values of a setting, in order; an empty one takes those before it back.
fn settings<'u>(unit: &'u str, name: &str) -> impl DoubleEndedIterator<Item = &'u str> {
    let lines = unit.lines().map(str::trim);
    let values = lines.filter_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix('='));
    let values: Vec<_> = values.map(str::trim).collect();
    let taken_back = values.iter().rposition(|value| value.is_empty());
    values.into_iter().skip(taken_back.map_or(0, |at| at + 1))
}

/// Whether a value means yes (`parse_boolean` in systemd.syntax(7)).
fn is_yes(value: &str) -> bool {
    let value = value.to_ascii_lowercase();
    ["1", "yes", "y", "true", "t", "on"].contains(&value.as_str())
}

fn displayed<'p>(paths: impl Iterator<Item = &'p Path>) -> Vec<String> {
    paths.map(|path| path.display().to_string()).collect()
}

/// Judges whether the unit's sandbox, which this process is not in, leaves the agent what it needs:
/// the directories of databases and state (both after links) to write, and clamd's sockets.
fn judge_unit(unit: &str, written: [&Path; 2], sockets: &[&Path]) -> Finding {
    let edit = |setting: &str| {
        format!("systemctl edit {UNIT}, with `[Service]` and `{setting}`; then restart it")
    };
    let closed = settings(unit, "ProtectSystem").last() == Some("strict");
    let words = |name| settings(unit, name).flat_map(str::split_whitespace);
    let open =
        words("ReadWritePaths").map(|path| PathBuf::from(path.trim_start_matches(['-', '+'])));
    // `NAME:LINK` makes a link to it besides.
    let own = words("StateDirectory").filter_map(|name| name.split(':').next());
    let open: Vec<_> = open
        .chain(own.map(|name| Path::new("/var/lib").join(name)))
        .collect();
    let shut = |path: &&Path| closed && !open.iter().any(|open| path.starts_with(open));
    let shut = written.iter().copied().filter(shut);
    let shut: Vec<_> = shut.collect();
    if !shut.is_empty() {
        let found = format!(
            "{UNIT} does not let the agent write {} (ProtectSystem=strict)",
            displayed(shut.iter().copied()).join(" and ")
        );
        // The parent of the database directory, which may be removed and made again.
        let opened = shut.iter().map(|path| match path.parent() {
            Some(parent) if *path == written[0] && parent != Path::new("/") => parent,
            Some(_) | None => path,
        });
        let setting = format!("ReadWritePaths={}", displayed(opened).join(" "));
        return Finding::bad("unit", found, edit(&setting));
    }
    let private = settings(unit, "PrivateTmp").last().filter(|value| {
        is_yes(value) || *value == "disconnected" // yes, in a file system of its own
    });
    let hidden = |path: &&&Path| path.starts_with("/tmp") || path.starts_with("/var/tmp");
    match (sockets.iter().find(hidden), private) {
        (Some(path), Some(private)) => {
            let path = path.display();
            let found =
                format!("{UNIT} has a /tmp of its own (PrivateTmp={private}): {path} is not in it");
            let advice = edit("PrivateTmp=no") + ", or give clamd a `LocalSocket` in /run";
            Finding::bad("unit", found, advice)
        }
        (Some(_), None) | (None, _) => {
            Finding::good("unit", format!("{UNIT} lets the agent do its work"))
        }
    }
}

/// Makes this process that user, with its groups and without root's rights, so that what it then
/// can do is what the agent can do. Nothing to do for whoever is that user. A process that is not
/// root stays what it is if the user was not `wanted`.
pub fn become_user(user: &User, wanted: bool) -> Result<(), UserError> {
    let own = geteuid();
    if own.as_raw() == user.uid {
        return Ok(());
    }
    if !own.is_root() {
        return match wanted {
            true => Err(UserError::NotRoot(user.name.clone())),
            false => Ok(()),
        };
    }
    let group = user.gids.first().copied().unwrap_or(user.uid);
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(group));
    let name = std::ffi::CString::new(user.name.clone()).expect("a name of the system's");
    initgroups(&name, gid)
        .and_then(|()| setgid(gid))
        .and_then(|()| setuid(uid))
        .map_err(|source| UserError::Become {
            user: user.name.clone(),
            source,
        })
}

/// Looks at everything, as the user that this process is now. `agent` is whom the agent runs as.
pub async fn examine(
    host: &Host,
    inventory: &Inventory,
    Running(running): &Running,
    config_path: &Path,
    config: &Config,
    agent: &User,
) -> Report {
    let this = User::this();
    let mut findings = vec![judge_user(&this, agent, config_path)];

    let mut file = scanner::ConfFile::look(host, &config.clamd_conf);
    file.ask().await;
    let (settings, _) = Settings::resolve(config.clamd.clone(), file.conf().cloned());
    let database = settings.database_directory.as_path();
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let ours = real(database);
    let has_clamd = !settings.instances.is_empty();
    if has_clamd {
        let theirs = file
            .conf()
            .and_then(|conf| conf.database_directory.as_deref());
        let same = theirs.is_some_and(|theirs| real(theirs) == ours);
        findings.extend(scanner::judge_conf(&file, &settings, same, agent));
        for instance in &settings.instances {
            let talk = scanner::Talk::with(&instance.address, agent).await;
            findings.push(scanner::judge_talk(&talk, &file, agent));
            let signal = |pid_file: &Path| scanner::signal_fault(pid_file, agent);
            findings.push(scanner::judge_reload(
                &instance.address,
                &instance.reload,
                signal,
                &file,
            ));
        }
        let log = scanner::Log::look(&settings);
        findings.push(scanner::judge_log(&log, &file, &settings, agent));
    } else {
        let found = "this host has none by configuration: installed counts as live";
        findings.push(Finding::good("clamd-conf", found));
    }

    if let Some(unit) = unit(host, config_path) {
        let addresses = settings.instances.iter().map(|instance| &instance.address);
        let sockets: Vec<_> = addresses.filter_map(Address::path).collect();
        findings.push(judge_unit(&unit, [&ours, &real(&config.state)], &sockets));
    }
    let clamd = clamds_process(&file, &inventory.processes);
    let passed = inventory.key.as_ref();
    let key = passed.map_or(&*config.tls.key, |passed| &*passed.path);
    let paths = rights::Paths::look(database, &config.state, key, &this, agent);
    let names = [database, &config.state, key];
    findings.extend(rights::judge_agent(&paths, names, agent, passed.is_some()));
    if has_clamd {
        match clamds_user(&file, clamd) {
            Ok(user) => findings.extend(rights::judge_clamd(&paths, user.as_ref(), agent)),
            Err(finding) => findings.push(finding),
        }
        let confinement = confinement::Confinement::look(host, &ours);
        findings.extend(confinement::judge(&confinement, &ours));
    }

    let told = updaters::told(host, &inventory.processes);
    findings.extend(updaters::judge(inventory, &ours, told.as_deref(), |path| {
        real(&host.at(path))
    }));
    if has_clamd {
        findings.extend(match installed::Facts::look(config, &settings).await {
            Ok(facts) => installed::judge(&facts),
            Err(error) => vec![unread("databases", &error)],
        });
    }
    let databases = memory::databases(database);
    match space::disk(host, database) {
        Ok(disk) => {
            let kept = memory::databases(&database.join(crate::install::HIDDEN).join("previous"));
            findings.extend(space::judge_disk(&disk, databases, kept.bytes));
        }
        Err(why) => findings.push(Finding::unknown("disk-space", why, None)),
    }
    if let Ok(disk) = space::disk(host, &config.state) {
        findings.extend(space::judge_state(&disk));
    }
    if has_clamd && (settings.concurrent_reload || settings.scanner.is_some()) {
        let memory = memory::memory(host, clamd);
        findings.push(space::judge_memory(memory.as_ref(), databases));
    }

    let (identity, credentials) = identity::look(config, passed, Timestamp::now());
    findings.extend(identity);
    findings.extend(match installed::last(running, &config.state) {
        Ok(last) => last.as_ref().map(installed::judge_last),
        Err(error) => Some(unread("outcome", &error)),
    });
    findings.extend(installed::judge_drift(running));
    let tried = || watch::try_events(&ours);
    findings.push(installed::judge_events(running, tried));
    let tried = match &credentials {
        None => Vec::new(),
        Some(credentials) => {
            // The master's first words enrol a host that it does not know.
            let alone = matches!(running, master::Agent::Away) && trust::is_pinned(&config.state);
            master::try_all(config, credentials, alone).await
        }
    };
    findings.extend(master::judge(running, &tried));
    if credentials.is_none() {
        let why = "no handshake without the host's certificate and keys";
        findings.push(Finding::unknown("master", why, None));
    }
    findings.extend(master::judge_clock(running, &tried, &inventory.processes));

    if this.uid != agent.uid {
        findings = findings.into_iter().map(|f| f.seen_by(&this)).collect();
    }
    Report {
        ok: findings.iter().all(|finding| finding.state != State::Bad),
        user: this.name,
        agent_user: agent.name.clone(),
        findings,
    }
}

/// A record of the agent's that cannot be read.
fn unread(check: &'static str, error: &StateError) -> Finding {
    Finding::bad(check, chain(error), "it has to be the agent's own").denied(is_denied(error))
}

fn judge_user(this: &User, agent: &User, config_path: &Path) -> Finding {
    let (own, agents) = (&this.name, &agent.name);
    let config = config_path.display();
    if let Err(error) = input::open(config_path) {
        let advice = format!("chown {agents}: {config}");
        return Finding::bad(
            "user",
            format!("{own} cannot read {config}: {error}"),
            advice,
        );
    }
    if this.uid != agent.uid {
        let found = format!(
            "looked at as {own}, and the agent runs as {agents}: what follows holds for {own} only"
        );
        let advice = format!("sudo -u {agents} clamcast-agent doctor --config {config}");
        return Finding::note("user", found, advice);
    }
    if agent.uid == 0 {
        let found = "the agent runs as root, which it need not";
        let advice = "run it as a user of its own, as clamcast-agent.service does";
        return Finding::note("user", found, advice);
    }
    Finding::good(
        "user",
        format!("looked at as {own}, which the agent runs as; {config}"),
    )
}

/// The process of the clamd that `file` configures: by its pid file, else by its command line, else
/// the only one that there is.
fn clamds_process<'p>(file: &scanner::ConfFile, processes: &'p [Process]) -> Option<&'p Process> {
    let clamds = || processes.iter().filter(|process| process.name == "clamd");
    let pid_file = file.conf().and_then(|conf| conf.pid_file.as_deref());
    let pid = pid_file.and_then(|path| u32::try_from(running_pid(path).ok()?.as_raw()).ok());
    let path = file.path().map(|path| path.display().to_string());
    let names = |process: &&Process| {
        let mut arguments = process.arguments.iter();
        path.as_ref()
            .is_some_and(|path| arguments.any(|argument| argument.ends_with(path)))
    };
    let by_pid = clamds().find(|process| Some(process.pid) == pid);
    let only = || clamds().next().filter(|_| clamds().nth(1).is_none());
    by_pid.or_else(|| clamds().find(names)).or_else(only)
}

/// Whom clamd runs as: by its process, else by its configuration.
fn clamds_user(
    file: &scanner::ConfFile,
    process: Option<&Process>,
) -> Result<Option<User>, Finding> {
    let named = file.conf().and_then(|conf| conf.user.as_deref());
    match (named, process) {
        (Some(name), _) => match User::named(name) {
            Some(user) => Ok(Some(user)),
            None => Err(Finding::bad(
                "clamd-user",
                format!("clamd.conf has `User {name}`, and there is no such user"),
                format!("useradd --system --no-create-home --shell /usr/sbin/nologin {name}"),
            )),
        },
        (None, Some(process)) => Ok(Some(User::numbered(process.uid))),
        (None, None) => Ok(None),
    }
}

impl Report {
    /// For people: `width` is that of the terminal; without one every finding is one line, and its
    /// advice another.
    pub fn text(&self, width: Option<usize>, colour: bool) -> String {
        let check = self
            .findings
            .iter()
            .map(|finding| finding.check.len())
            .max();
        let indent = "unknown".len() + 2 + check.unwrap_or(0) + 2;
        let room = width.map(|width| width.saturating_sub(indent).max(ROOM_MIN));
        let mut lines = Vec::new();
        for finding in &self.findings {
            let (before, after) = colours(finding.state, colour);
            let word = finding.state.word();
            let mut head = format!(
                "{before}{word:<7}{after}  {:<1$}  ",
                finding.check,
                indent - 11
            );
            for line in wrapped(&finding.found, room) {
                lines.push(head + &line);
                head = " ".repeat(indent);
            }
            let advice = finding
                .advice
                .iter()
                .flat_map(|advice| wrapped(advice, room.map(|r| r - 3)));
            for (number, line) in advice.enumerate() {
                let arrow = if number == 0 { "-> " } else { "   " };
                lines.push(" ".repeat(indent) + arrow + &line);
            }
        }
        lines.push(String::new());
        lines.push(self.summary());
        lines.join("\n")
    }

    fn summary(&self) -> String {
        let count = |state| self.findings.iter().filter(|f| f.state == state).count();
        let (bad, notes, unknown) = (count(State::Bad), count(State::Note), count(State::Unknown));
        let things = match bad {
            0 => "nothing is wrong".to_owned(),
            1 => "1 thing is wrong".to_owned(),
            _ => format!("{bad} things are wrong"),
        };
        let seen = match self.user == self.agent_user {
            true => String::new(),
            false => {
                let Self {
                    user, agent_user, ..
                } = self;
                format!("; for user {user} only, as the agent runs as {agent_user}")
            }
        };
        format!("{things}; {notes} to note, {unknown} that could not be looked at{seen}")
    }
}

/// Narrower than this nothing is wrapped to.
const ROOM_MIN: usize = 30;

fn colours(state: State, colour: bool) -> (&'static str, &'static str) {
    match state {
        _ if !colour => ("", ""),
        State::Good => ("\x1b[32m", "\x1b[0m"),
        State::Note | State::Unknown => ("\x1b[33m", "\x1b[0m"),
        State::Bad => ("\x1b[1;31m", "\x1b[0m"),
    }
}

/// Lines of at most `room` columns. Text of others must not be able to move the cursor.
fn wrapped(text: &str, room: Option<usize>) -> Vec<String> {
    let text = table::printable(text);
    match room {
        None => vec![text],
        Some(room) => table::fold(&text, room),
    }
}

#[cfg(test)]
mod testing {
    use super::Finding;

    /// One line a finding: `STATE CHECK: FOUND -> ADVICE`.
    pub(super) fn lines(findings: &[Finding]) -> String {
        let line = |finding: &Finding| {
            let advice = finding.advice.iter().map(|advice| format!(" -> {advice}"));
            let advice: String = advice.collect();
            let Finding { check, found, .. } = finding;
            format!("{} {check}: {found}{advice}", finding.state.word())
        };
        findings.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    /// Each line has the words of its `expected`, which are separated by ` | `.
    #[track_caller]
    pub(super) fn assert_lines(findings: &[Finding], expected: &[&str]) {
        let lines = lines(findings);
        assert_eq!(lines.lines().count(), expected.len(), "{lines}");
        for (line, words) in lines.lines().zip(expected) {
            for word in words.split(" | ") {
                assert!(line.contains(word), "{line} lacks {word}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report {
            ok: false,
            user: "clamcast".into(),
            agent_user: "clamcast".into(),
            findings: vec![
                Finding::good("clamd-conf", "/etc/clamav/clamd.conf"),
                Finding::bad(
                    "updaters",
                    "freshclam (pid 612) runs",
                    "systemctl disable --now f",
                ),
            ],
        }
    }

    #[test]
    fn in_a_pipe_a_finding_is_a_line_and_so_is_its_advice() {
        assert_eq!(
            report().text(None, false),
            "good     clamd-conf  /etc/clamav/clamd.conf\n\
             bad      updaters    freshclam (pid 612) runs\n                     \
             -> systemctl disable --now f\n\n\
             1 thing is wrong; 0 to note, 0 that could not be looked at"
        );
    }

    #[test]
    fn what_another_user_may_not_look_at_says_nothing_of_the_agent() {
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let error = StateError::Read {
            path: "/state".into(),
            source: denied,
        };
        let alice = User {
            name: "alice".into(),
            uid: 4_000_009,
            gids: vec![],
        };
        let findings = [
            unread("outcome", &error),
            Finding::bad("x", "broken", "mend"),
        ];
        testing::assert_lines(
            &findings.clone(),
            &["bad outcome: cannot read /state", "bad x"],
        );
        testing::assert_lines(
            &findings.map(|finding| finding.seen_by(&alice)),
            &["unknown outcome: alice may not look: | /state", "bad x"],
        );
        let mut report = report();
        report.user = "alice".into();
        let text = report.text(None, false);
        assert!(
            text.ends_with("for user alice only, as the agent runs as clamcast"),
            "{text}"
        );
    }

    #[test]
    fn on_a_terminal_lines_are_wrapped_and_bad_ones_stand_out() {
        let text = report().text(Some(40), true);
        assert!(
            text.contains("\x1b[1;31mbad    \x1b[0m  updaters"),
            "{text}"
        );
        let mut long = report();
        long.findings[0].found = "word ".repeat(20) + "\x1b[2J";
        let text = long.text(Some(60), false);
        assert!(
            text.lines().all(|line| line.chars().count() <= 60),
            "{text}"
        );
        assert!(!text.contains('\x1b'), "{text:?}");
    }

    #[test]
    fn json_has_stable_keys() {
        let json = serde_json::to_value(report()).unwrap();
        let expected = serde_json::json!({
            "ok": false,
            "user": "clamcast",
            "agent_user": "clamcast",
            "findings": [
                { "check": "clamd-conf", "state": "good", "found": "/etc/clamav/clamd.conf" },
                {
                    "check": "updaters",
                    "state": "bad",
                    "found": "freshclam (pid 612) runs",
                    "advice": "systemctl disable --now f",
                },
            ],
        });
        assert_eq!(json, expected);
    }

    #[track_caller]
    fn check_unit(files: &[(&str, &str)], config: &str, expected: Option<&str>) {
        let root = tempfile::tempdir().unwrap();
        let host = Host::below(root.path());
        for (path, text) in files {
            let path = host.at(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let user = unit(&host, Path::new(config)).map(|unit| unit_user(&unit));
        assert_eq!(user.as_deref(), expected);
    }

    #[test]
    fn the_unit_of_this_configuration_says_whom_the_agent_runs_as() {
        let unit = include_str!("../../package/systemd/clamcast-agent.service");
        let lib = "/usr/lib/systemd/system/clamcast-agent.service";
        let etc = "/etc/systemd/system/clamcast-agent.service";
        let dropin = "/etc/systemd/system/clamcast-agent.service.d/user.conf";
        check_unit(&[], DEFAULT_PATH, None);
        check_unit(&[(lib, unit)], DEFAULT_PATH, Some("clamcast-agent"));
        check_unit(&[(lib, unit)], "/srv/agent.toml", None);
        check_unit(
            &[(lib, unit), (etc, "[Service]\nExecStart=/a run\n")],
            DEFAULT_PATH,
            Some("root"),
        );
        let other = "[Service]\nUser=other\n";
        check_unit(&[(lib, unit), (dropin, other)], DEFAULT_PATH, Some("other"));
        let (high, low) = (
            "/etc/systemd/system/clamcast-agent.service.d/a.conf",
            "/usr/lib/systemd/system/clamcast-agent.service.d/a.conf",
        );
        check_unit(
            &[(lib, unit), (high, "[Service]"), (low, other)],
            DEFAULT_PATH,
            Some("clamcast-agent"),
        );
        let later = "/usr/lib/systemd/system/clamcast-agent.service.d/z.conf";
        check_unit(
            &[(lib, unit), (high, "[Service]\nUser=high"), (later, other)],
            DEFAULT_PATH,
            Some("other"),
        );
        check_unit(
            &[(lib, unit.trim_end()), (dropin, "User=other")],
            DEFAULT_PATH,
            Some("other"),
        );
        let saved = "/etc/systemd/system/clamcast-agent.service.d/user.conf.rpmsave";
        check_unit(
            &[(lib, unit), (saved, other)],
            DEFAULT_PATH,
            Some("clamcast-agent"),
        );
        let broken = "[Service]\nUser=me\nExecStart=/a run \\\n  --config /srv/agent.toml\n";
        check_unit(&[(etc, broken)], "/srv/agent.toml", Some("me"));
        let named = "[Service]\nUser=me\nExecStart=/a run --config /srv/agent.toml\n";
        check_unit(&[(etc, named)], "/srv/agent.toml", Some("me"));
    }

    #[track_caller]
    fn check_sandbox(dropin: &str, database: &str, socket: &str, expected: &str) {
        let unit = include_str!("../../package/systemd/clamcast-agent.service").to_owned() + dropin;
        let written = [database, "/var/lib/clamcast/agent"].map(Path::new);
        let finding = judge_unit(&unit, written, &[Path::new(socket)]);
        testing::assert_lines(&[finding], &[expected]);
    }

    #[test]
    fn the_units_sandbox_must_leave_the_agent_its_directory_and_clamds_socket() {
        let (usual, socket) = ("/var/lib/clamav", "/run/clamav/clamd.ctl");
        check_sandbox("", usual, socket, "good unit");
        check_sandbox(
            "",
            "/srv/clamav",
            socket,
            "bad unit: | does not let the agent write /srv/clamav ( | `ReadWritePaths=/srv`",
        );
        check_sandbox(
            "ReadWritePaths=-/srv /x\n",
            "/srv/clamav",
            socket,
            "good unit",
        );
        check_sandbox("ReadWritePaths=\n", usual, socket, "bad unit");
        check_sandbox("ProtectSystem=full\n", "/srv/clamav", socket, "good unit");
        check_sandbox(
            "",
            usual,
            "/tmp/clamd.socket",
            "bad unit: | PrivateTmp=yes | `LocalSocket` in /run",
        );
        let (own, private) = ("/tmp/clamd.socket", "PrivateTmp=True\n");
        check_sandbox(private, usual, own, "bad unit: | PrivateTmp=True");
        check_sandbox("PrivateTmp=0\n", usual, own, "good unit");
        let closed = "ReadWritePaths=\nReadWritePaths=/var/lib/clamav\n";
        check_sandbox(
            &format!("StateDirectory=\n{closed}"),
            usual,
            socket,
            "bad unit: | write /var/lib/clamcast/agent ( | `ReadWritePaths=/var/lib/clamcast/agent`",
        );
        check_sandbox(
            &format!("StateDirectory=\n{closed}ReadWritePaths=/var/lib/clamcast\n"),
            usual,
            socket,
            "good unit",
        );
        let named = format!("StateDirectory=x:y\n{closed}");
        check_sandbox(&named, "/var/lib/x/db", socket, "good unit");
    }
}
