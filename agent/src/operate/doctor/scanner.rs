//! The host's clamd: its configuration, its sockets, its log.

use std::io;
use std::path::{Path, PathBuf};

use clamcast_daemon::input::{self, InputError};

use super::program::Program;
use super::{Finding, is_denied};
use crate::chain;
use crate::clamd::{Address, Clamd, ClamdConf, ClamdError, ProofBy, Reload, Settings, running_pid};
use crate::config::ClamdConfFile;
use crate::host::{Host, Node, User};

/// What clamd says instead of a version once a failed load has left it without an engine.
const NO_ENGINE: &str = "/4294967295/";

/// What came of looking for clamd.conf.
#[derive(Debug)]
pub(super) enum ConfFile {
    /// It was read; and what the installed clamd says of it, if there is one to ask.
    Read(PathBuf, Box<ClamdConf>, Option<Program>),
    /// It is in none of these places.
    Nowhere(Vec<PathBuf>),
    /// It cannot be read.
    Unreadable(PathBuf, InputError),
    /// agent.toml says that none counts.
    NotWanted,
}

impl ConfFile {
    /// Looks for it on `host`. Paths in it are made those of that host.
    pub(super) fn look(host: &Host, wanted: &ClamdConfFile) -> Self {
        let path = match wanted {
            ClamdConfFile::None => return Self::NotWanted,
            ClamdConfFile::At(path) => path.clone(),
            ClamdConfFile::Auto => {
                let places = ClamdConf::PLACES.map(PathBuf::from);
                match places.iter().find(|path| host.has(path)) {
                    None => return Self::Nowhere(places.into()),
                    Some(path) => host.at(path),
                }
            }
        };
        match ClamdConf::read(&path) {
            Err(error) => Self::Unreadable(path, error),
            Ok(mut conf) => {
                let paths = [
                    &mut conf.database_directory,
                    &mut conf.local_socket,
                    &mut conf.log_file,
                    &mut conf.pid_file,
                ];
                for path in paths.into_iter().flatten() {
                    *path = host.at(&*path);
                }
                Self::Read(path, Box::new(conf), None)
            }
        }
    }

    /// Asks the installed clamd about it.
    pub(super) async fn ask(&mut self) {
        if let Self::Read(path, _, program) = self {
            *program = Program::ask(path).await;
        }
    }

    /// What stands in it.
    pub(super) fn conf(&self) -> Option<&ClamdConf> {
        match self {
            Self::Read(_, conf, _) => Some(conf),
            Self::Nowhere(_) | Self::Unreadable(..) | Self::NotWanted => None,
        }
    }

    /// Where it is.
    pub(super) fn path(&self) -> Option<&Path> {
        match self {
            Self::Read(path, ..) | Self::Unreadable(path, _) => Some(path),
            Self::Nowhere(_) | Self::NotWanted => None,
        }
    }

    /// clamd's unit: Red Hat names it after the file.
    fn unit(&self) -> &'static str {
        match self.path() {
            Some(path) if path.ends_with("etc/clamd.d/scan.conf") => "clamd@scan",
            Some(_) | None => "clamav-daemon",
        }
    }

    /// How an option that not every clamd knows comes to have a value.
    fn set(&self, option: &str, value: &str) -> String {
        let (name, restart) = (self.name(), self.restart());
        match self {
            Self::Read(_, _, Some(program)) if program.unknown.contains(&option) => format!(
                "take {option} out of {name}, as the installed clamd does not know it, and {restart}"
            ),
            Self::Read(..) | Self::Nowhere(_) | Self::Unreadable(..) | Self::NotWanted => {
                format!("set `{option} {value}` in {name}, and {restart}")
            }
        }
    }

    /// How its changed configuration comes to count.
    fn restart(&self) -> String {
        format!("systemctl restart {}", self.unit())
    }

    fn name(&self) -> String {
        let path = self.path().map(|path| path.display().to_string());
        path.unwrap_or_else(|| "clamd.conf".into())
    }
}

/// Judges what stands in clamd.conf. `same_directory` says whether its DatabaseDirectory is ours.
pub(super) fn judge_conf(
    file: &ConfFile,
    settings: &Settings,
    same_directory: bool,
    agent: &User,
) -> Vec<Finding> {
    match file {
        ConfFile::NotWanted => {
            let found = "agent.toml has `[clamd] config = \"\"`: only what stands there counts";
            let advice =
                "take that line out, unless no clamd.conf describes the clamd of this host";
            vec![Finding::note("clamd-conf", found, advice)]
        }
        ConfFile::Nowhere(places) => {
            let places: Vec<_> = places
                .iter()
                .map(|path| path.display().to_string())
                .collect();
            let found = format!("none in {}", places.join(", "));
            let advice = "install clamd (apt install clamav-daemon, dnf install clamd), or name \
                          the file: `[clamd] config` in agent.toml";
            vec![Finding::bad("clamd-conf", found, advice)]
        }
        ConfFile::Unreadable(path, error) => {
            let advice = match error {
                InputError::Denied { .. } | InputError::Io { .. } => {
                    format!("let {} read it: chmod o+r {}", agent.name, path.display())
                }
                InputError::Missing { .. }
                | InputError::NoCredential { .. }
                | InputError::NotAFile { .. }
                | InputError::TooLong { .. } => {
                    "name this host's clamd.conf in agent.toml: `[clamd] config`".into()
                }
            };
            vec![Finding::bad("clamd-conf", chain(error), advice).denied(is_denied(error))]
        }
        ConfFile::Read(path, conf, program) => {
            let mut findings = vec![
                judge_file(file, path, conf, program.as_ref()),
                judge_directory(file, conf, settings, same_directory),
                judge_self_check(file, conf, settings),
                judge_concurrent_reload(file, settings),
            ];
            findings.extend(judge_proof(file, settings));
            findings.extend(conf.virus_event.is_some().then(|| {
                Finding::note(
                    "virus-event",
                    "VirusEvent is set: it runs once for every install, with \
                     Clamcast.Install-N as the name",
                    "let what it runs pass over names that begin with Clamcast.",
                )
            }));
            findings
        }
    }
}

/// Judges whether clamd starts with it. A clamd that runs does not look at it until then.
fn judge_file(
    file: &ConfFile,
    path: &Path,
    conf: &ClamdConf,
    program: Option<&Program>,
) -> Finding {
    let (path, restart) = (path.display(), file.restart());
    let out = format!("take the line `Example` out of {path}, and {restart}");
    let asked = program.and_then(|program| Some((program, program.verdict.as_ref()?)));
    let Some((program, verdict)) = asked else {
        let found = format!("clamd does not start with {path}: it has a line `Example`");
        return match conf.is_example {
            true => Finding::bad("clamd-conf", found, out),
            false => Finding::good("clamd-conf", path.to_string()),
        };
    };
    let clamd = program.path.display();
    match verdict {
        Err(reason) => {
            let found = format!("{clamd} does not start with {path}: {reason}");
            let advice = match conf.is_example {
                true => out,
                false => format!(
                    "correct that; `{clamd} --config-file={path} --version` says whether it is \
                     right; then {restart}"
                ),
            };
            Finding::bad("clamd-conf", found, advice)
        }
        Ok(version) if !program.warnings.is_empty() => {
            let found = format!("{path}: {version} says: {}", program.warnings.join("; "));
            let advice = format!("take those options out of {path}: a newer clamd may refuse them");
            Finding::note("clamd-conf", found, advice)
        }
        Ok(version) => Finding::good("clamd-conf", format!("{path}, as {version} reads it")),
    }
}

fn judge_directory(
    file: &ConfFile,
    conf: &ClamdConf,
    settings: &Settings,
    same_directory: bool,
) -> Finding {
    let ours = settings.database_directory.display();
    match &conf.database_directory {
        Some(theirs) if !same_directory => Finding::bad(
            "clamd-database",
            format!(
                "clamd loads {}, and the agent installs into {ours}",
                theirs.display()
            ),
            format!(
                "set `[database] path` in agent.toml to {}, or `DatabaseDirectory {ours}` in {} \
                 and {}",
                theirs.display(),
                file.name(),
                file.restart()
            ),
        ),
        Some(_) => Finding::good("clamd-database", format!("clamd loads {ours}")),
        None => Finding::note(
            "clamd-database",
            format!(
                "{} does not name it: clamd loads what it was built for",
                file.name()
            ),
            format!(
                "set `DatabaseDirectory {ours}` there, and {}",
                file.restart()
            ),
        ),
    }
}

fn judge_self_check(file: &ConfFile, conf: &ClamdConf, settings: &Settings) -> Finding {
    // clamd's own default (clamd.conf(5)).
    let seconds = conf.self_check.unwrap_or(600);
    let never = settings.instances.iter().any(|i| i.reload == Reload::Never);
    let found = match seconds {
        0 => "SelfCheck 0: clamd never looks at its databases by itself".to_owned(),
        _ => format!("clamd looks at its databases every {seconds} s by itself"),
    };
    if never && seconds == 0 {
        let found =
            format!("{found}, and it cannot be asked for a reload: it never loads an install");
        let advice = format!(
            "set `SelfCheck 600` in {}, or {}",
            file.name(),
            file.set("EnableReloadCommand", "yes")
        );
        return Finding::bad("self-check", found, advice);
    }
    if never && seconds > settings.deadline.as_secs() {
        let found = format!(
            "{found}, and only then is an install live: it cannot be asked, and the agent's \
             deadline is {} s",
            settings.deadline.as_secs()
        );
        let advice = format!(
            "{}; or raise `[clamd] deadline` in agent.toml",
            file.set("EnableReloadCommand", "yes")
        );
        return Finding::note("self-check", found, advice);
    }
    if seconds == 0 {
        let found = format!("{found}, so nothing mends what somebody else's reload mixed up");
        let advice = format!(
            "set `SelfCheck 3600` in {}, and {}",
            file.name(),
            file.restart()
        );
        return Finding::note("self-check", found, advice);
    }
    Finding::good("self-check", found)
}

fn judge_concurrent_reload(file: &ConfFile, settings: &Settings) -> Finding {
    if settings.concurrent_reload {
        return Finding::good(
            "concurrent-reload",
            "clamd goes on scanning while it reloads",
        );
    }
    let found = "ConcurrentDatabaseReload no: clamd does not answer while it loads, and one failed \
                 load leaves it dead until it is restarted";
    let yes = file.set("ConcurrentDatabaseReload", "yes");
    let yes = format!("{yes}, if there is memory for two engines");
    match &settings.scanner {
        Some(scanner) => {
            let found = format!("{found}; {} tries every set first", scanner.display());
            Finding::note("concurrent-reload", found, yes)
        }
        None => {
            let found = format!("{found}; there is no clamscan to try a set before clamd gets it");
            let advice =
                format!("install clamscan (apt install clamav, dnf install clamav), or {yes}");
            Finding::bad("concurrent-reload", found, advice)
        }
    }
}

fn judge_proof(file: &ConfFile, settings: &Settings) -> Option<Finding> {
    if settings.official_only {
        let found = "OfficialDatabaseOnly yes: clamd does not load the canary, so the proof is \
                     VERSION and the log, which is weaker, and unsigned databases are not loaded";
        let advice = file.set("OfficialDatabaseOnly", "no");
        return Some(Finding::note("proof", found, advice));
    }
    (settings.proof == ProofBy::Version).then(|| {
        let found = "agent.toml has `[clamd] proof = \"version\"`, which is weaker than the canary";
        Finding::note("proof", found, "take that line out")
    })
}

/// What came of talking to one clamd.
#[derive(Debug)]
pub(super) struct Talk {
    /// Where.
    pub(super) address: Address,
    /// The socket, or the first directory on the way that is closed to us.
    pub(super) node: Option<Node>,
    /// Its version.
    pub(super) answer: Result<String, ClamdError>,
}

impl Talk {
    /// Talks to the clamd at `address`.
    pub(super) async fn with(address: &Address, agent: &User) -> Self {
        let clamd = Clamd::new(address.clone());
        let answer = match clamd.ping().await {
            Ok(()) => clamd.version().await,
            Err(error) => Err(error),
        };
        let node = match address {
            Address::Tcp(_) => None,
            Address::Unix(path) => socket_node(path, agent),
        };
        let address = address.clone();
        Self {
            address,
            node,
            answer,
        }
    }
}

/// The first directory that `agent` cannot pass, else the socket itself.
fn socket_node(path: &Path, agent: &User) -> Option<Node> {
    let mut way: Vec<_> = path.ancestors().skip(1).collect();
    way.reverse();
    let mut nodes = way.into_iter().filter_map(|path| Node::at(path).ok());
    let closed = nodes.find(|node| !agent.may(node, 1));
    closed.or_else(|| Node::at(path).ok())
}

/// Judges what it said.
pub(super) fn judge_talk(talk: &Talk, file: &ConfFile, agent: &User) -> Finding {
    let address = &talk.address;
    let rights = talk
        .node
        .as_ref()
        .map(|node| format!(" ({})", node.rights()));
    let rights = rights.unwrap_or_default();
    match &talk.answer {
        Ok(version) if version.contains(NO_ENGINE) => Finding::bad(
            "clamd-socket",
            format!("clamd at {address} is up and scans nothing: a failed load took its engine"),
            file.restart(),
        ),
        Ok(version) => Finding::good("clamd-socket", format!("{address}{rights}: {version}")),
        Err(ClamdError::Unavailable { command, .. }) => Finding::note(
            "clamd-socket",
            format!("clamd at {address}{rights} does not allow {command}"),
            format!(
                "nothing, if you want it so; else {}",
                file.set("EnableVersionCommand", "yes")
            ),
        ),
        Err(error @ ClamdError::Forbidden { .. }) => {
            let found = format!("{}{rights}", chain(error));
            Finding::bad("clamd-socket", found, open_socket(talk, file, agent)).denied(true)
        }
        Err(error @ ClamdError::Absent { .. }) => {
            let advice = match file.conf() {
                Some(conf) if conf.address().is_none() => format!(
                    "{} sets neither LocalSocket nor TCPSocket: set `LocalSocket {address}` \
                     there, and {}",
                    file.name(),
                    file.restart()
                ),
                Some(_) | None => format!(
                    "systemctl enable --now {}; or, if this host has no clamd, `[clamd] socket = \
                     \"none\"` in agent.toml",
                    file.unit()
                ),
            };
            Finding::bad("clamd-socket", chain(error), advice)
        }
        Err(error @ (ClamdError::Silent { .. } | ClamdError::Unexpected { .. })) => Finding::bad(
            "clamd-socket",
            chain(error),
            format!(
                "it loads, hangs, or is something else: systemctl status {0}; journalctl -u {0}",
                file.unit()
            ),
        ),
    }
}

/// How the agent gets to use a socket that is closed to it.
fn open_socket(talk: &Talk, file: &ConfFile, agent: &User) -> String {
    let again = "systemctl restart clamcast-agent";
    match &talk.node {
        Some(node) if node.mode & 0o060 == 0o060 && node.gid != 0 => {
            let (group, user) = (node.group(), &agent.name);
            format!("usermod -aG {group} {user} && {again}")
        }
        Some(node) if Address::Unix(node.path.clone()) != talk.address => {
            let (group, path) = (node.group(), node.path.display());
            match node.mode & 0o010 != 0 && node.gid != 0 {
                true => format!("usermod -aG {group} {} && {again}", agent.name),
                false => format!("chmod o+x {path}"),
            }
        }
        Some(_) | None => format!(
            "set `LocalSocketMode 666`, or `LocalSocketMode 660` with a `LocalSocketGroup` that {} \
             is in, in {}, and {}",
            agent.name,
            file.name(),
            file.restart()
        ),
    }
}

/// clamd's log as the agent's user finds it.
#[derive(Debug)]
pub(super) enum Log {
    /// clamd.conf names none.
    None,
    /// It can be read.
    Readable(PathBuf),
    /// It cannot.
    Closed(PathBuf, Option<Node>, io::Error),
}

impl Log {
    /// Looks at it.
    pub(super) fn look(settings: &Settings) -> Self {
        let Some(path) = settings.log_file.clone() else {
            return Self::None;
        };
        match input::open(&path) {
            Ok(_) => Self::Readable(path),
            Err(error) => {
                let node = Node::at(&path).ok();
                Self::Closed(path, node, error)
            }
        }
    }
}

/// Judges it: without the log nobody sees why clamd refused a set, and the weaker proof has nothing
/// to go by.
pub(super) fn judge_log(log: &Log, file: &ConfFile, settings: &Settings, agent: &User) -> Finding {
    let by_log = settings.proof == ProofBy::Version;
    let without = if by_log {
        "the proof by VERSION needs it"
    } else {
        "without it a set that clamd refuses is `installed`, not `refused`, and stays"
    };
    let judge = if by_log { Finding::bad } else { Finding::note };
    match log {
        Log::Readable(path) => Finding::good("clamd-log", path.display().to_string()),
        Log::None => judge(
            "clamd-log",
            format!("{} names no LogFile; {without}", file.name()),
            format!(
                "set `LogFile /var/log/clamav/clamav.log` in {}, and {}",
                file.name(),
                file.restart()
            ),
        ),
        Log::Closed(path, node, error) => {
            let (path, user) = (path.display(), &agent.name);
            let again = "systemctl restart clamcast-agent";
            let (rights, advice) = match node {
                Some(node) if node.mode & 0o040 != 0 && node.gid != 0 => {
                    let join = format!("usermod -aG {} {user} && {again}", node.group());
                    (format!(" ({})", node.rights()), join)
                }
                Some(node) => (format!(" ({})", node.rights()), format!("chmod o+r {path}")),
                None => (
                    String::new(),
                    format!(
                        "let {user} into its directory: usermod -aG adm {user} && {again}, if that \
                         is its group, else chmod o+x"
                    ),
                ),
            };
            let found = format!("cannot read {path}{rights}: {error}; {without}");
            judge("clamd-log", found, advice).denied(is_denied(error))
        }
    }
}

/// What stands in the way of SIGUSR2 to the process of `pid_file`, if anything does.
pub(super) fn signal_fault(pid_file: &Path, agent: &User) -> Result<u32, String> {
    let pid = running_pid(pid_file).map_err(|error| chain(&error))?;
    let node = Node::at(Path::new(&format!("/proc/{pid}")));
    let node = node.map_err(|error| error.to_string())?;
    if agent.uid != 0 && node.uid != agent.uid {
        return Err(format!(
            "clamd (pid {pid}) runs as {}, and takes signals from its own user and root only",
            node.owner()
        ));
    }
    Ok(pid.as_raw().unsigned_abs())
}

/// Judges how one clamd is asked for a reload.
pub(super) fn judge_reload(
    address: &Address,
    reload: &Reload,
    signal: impl Fn(&Path) -> Result<u32, String>,
    file: &ConfFile,
) -> Finding {
    match reload {
        Reload::Command => Finding::good(
            "reload",
            format!("clamd at {address} is asked over its socket"),
        ),
        Reload::Never => Finding::note(
            "reload",
            format!(
                "clamd at {address} does not allow RELOAD and has no pid file: an install is live \
                 when clamd's own check finds it"
            ),
            file.set("EnableReloadCommand", "yes"),
        ),
        Reload::Signal(pid_file) => match signal(pid_file) {
            Ok(pid) => Finding::good("reload", format!("clamd (pid {pid}) gets SIGUSR2")),
            Err(error) => {
                let forbidden = file.conf().is_some_and(|c| c.reload_command == Some(false));
                let mut advice = "set `reload = \"socket\"` in agent.toml".to_owned();
                if forbidden {
                    advice = format!("{advice}, and {}", file.set("EnableReloadCommand", "yes"));
                }
                Finding::bad("reload", error, advice)
            }
        },
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::clamd::RawClamd;
    use crate::operate::doctor::testing;

    fn agent() -> User {
        User {
            name: "clamcast".into(),
            uid: 4_000_001,
            gids: vec![],
        }
    }

    fn settings(conf: &ClamdConf, scanner: Option<&str>) -> Settings {
        let (mut settings, _) = Settings::resolve(RawClamd::unset(), Some(conf.clone()));
        settings.scanner = scanner.map(Into::into);
        settings
    }

    fn file(conf: ClamdConf) -> ConfFile {
        ConfFile::Read("/etc/clamav/clamd.conf".into(), Box::new(conf), None)
    }

    /// What is found of `lines` where the installed clamd says so of it.
    #[track_caller]
    fn check_program(lines: &str, program: Option<Program>, expected: &[&str]) {
        let conf = ClamdConf::parse(&format!("{lines}DatabaseDirectory /var/lib/clamav\n"));
        let settings = settings(&conf, None);
        let file = ConfFile::Read("/etc/clamd.conf".into(), Box::new(conf), program);
        let mut findings = judge_conf(&file, &settings, true, &agent());
        findings.retain(|finding| finding.state != crate::operate::doctor::State::Good);
        testing::assert_lines(&findings, expected);
    }

    #[test]
    fn what_the_installed_clamd_refuses_is_said_in_its_words_and_never_advised() {
        let said = |verdict: Result<&str, &str>| Program {
            path: "/usr/sbin/clamd".into(),
            verdict: Some(verdict.map(str::to_owned).map_err(str::to_owned)),
            ..Program::default()
        };
        let example = "bad clamd-conf: | does not start with /etc/clamd.conf | take the line \
                       `Example` out of /etc/clamd.conf, and systemctl restart";
        check_program("Example\n", None, &[example]);
        let refused = said(Err("Please edit the example config file /etc/clamd.conf"));
        check_program("Example\n", Some(refused), &[example]);
        // Whatever else it takes is its own affair.
        check_program("Example\n", Some(said(Ok("ClamAV 9.0.0"))), &[]);

        let mut old = said(Err(
            "Parse error at /etc/clamd.conf:1: Unknown option EnableReloadCommand",
        ));
        old.unknown = vec!["EnableReloadCommand"];
        check_program(
            "EnableReloadCommand no\n",
            Some(old),
            &[
                "bad clamd-conf: /usr/sbin/clamd does not start | :1: Unknown option | --version",
                "note self-check: | take EnableReloadCommand out of /etc/clamd.conf",
            ],
        );
        check_program(
            "EnableReloadCommand no\n",
            Some(said(Ok("ClamAV 1.5.0"))),
            &["note self-check: | set `EnableReloadCommand yes` in /etc/clamd.conf"],
        );
        let mut odd = said(Ok("ClamAV 1.4.6"));
        odd.warnings = vec!["Ignoring deprecated option ScanOnAccess at /etc/clamd.conf:1".into()];
        check_program(
            "ScanOnAccess yes\n",
            Some(odd),
            &["note clamd-conf: | ClamAV 1.4.6 says: Ignoring deprecated option ScanOnAccess"],
        );
    }

    /// What is not good of a clamd.conf that is Debian's but for `lines`.
    #[track_caller]
    fn check_conf(lines: &str, scanner: Option<&str>, expected: &[&str]) {
        let debian = "DatabaseDirectory /var/lib/clamav\nLocalSocket /run/clamd\nSelfCheck 3600\n";
        let conf = ClamdConf::parse(&format!("{lines}\n{debian}"));
        let settings = settings(&conf, scanner);
        let same = conf.database_directory.as_deref() == Some(Path::new("/var/lib/clamav"));
        let mut findings = judge_conf(&file(conf), &settings, same, &agent());
        findings.retain(|finding| finding.state != crate::operate::doctor::State::Good);
        testing::assert_lines(&findings, expected);
    }

    #[test]
    fn each_option_that_matters_has_its_finding() {
        let scanner = Some("/usr/bin/clamscan");
        check_conf("", None, &[]);
        check_conf(
            "DatabaseDirectory /srv/clamav",
            None,
            &[
                "bad clamd-database: clamd loads /srv/clamav | `[database] path` | systemctl restart",
            ],
        );
        check_conf("SelfCheck 0", None, &["note self-check: | SelfCheck 3600"]);
        check_conf(
            "SelfCheck 0\nEnableReloadCommand no",
            None,
            &["bad self-check: | never loads an install | EnableReloadCommand yes"],
        );
        check_conf(
            "EnableReloadCommand no",
            None,
            &["note self-check: | deadline is 300 s"],
        );
        check_conf(
            "ConcurrentDatabaseReload no",
            scanner,
            &["note concurrent-reload: | /usr/bin/clamscan tries every set first"],
        );
        check_conf(
            "ConcurrentDatabaseReload no",
            None,
            &["bad concurrent-reload: | no clamscan | apt install clamav"],
        );
        check_conf(
            "OfficialDatabaseOnly yes",
            None,
            &["note proof: | weaker | OfficialDatabaseOnly no"],
        );
        check_conf(
            "VirusEvent /bin/tell",
            None,
            &["note virus-event: | once for every install"],
        );
    }

    #[test]
    fn a_clamd_conf_is_where_the_distribution_puts_it() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::below(root.path());
        let nowhere = ConfFile::look(&host, &ClamdConfFile::Auto);
        let settings = settings(&ClamdConf::default(), None);
        let findings = judge_conf(&nowhere, &settings, true, &agent());
        let expected = "bad clamd-conf: none in /etc/clamav/clamd.conf, /etc/clamd.d/scan.conf";
        testing::assert_lines(&findings, &[&format!("{expected} | dnf install clamd")]);

        std::fs::create_dir_all(host.at("/etc/clamd.d")).unwrap();
        let text = "LogFile /var/log/clamd.scan\nUser clamscan\n";
        std::fs::write(host.at("/etc/clamd.d/scan.conf"), text).unwrap();
        let scan = ConfFile::look(&host, &ClamdConfFile::Auto);
        let conf = scan.conf().unwrap();
        assert_eq!(conf.log_file, Some(host.at("/var/log/clamd.scan")));
        assert_eq!(scan.unit(), "clamd@scan");

        // Red Hat's file leaves the socket to the administrator.
        let address = Address::Unix("/run/clamd.scan/clamd.sock".into());
        let source = io::ErrorKind::NotFound.into();
        let talk = Talk {
            answer: Err(ClamdError::Absent {
                address: address.clone(),
                source,
            }),
            address,
            node: None,
        };
        let finding = judge_talk(&talk, &scan, &agent());
        testing::assert_lines(
            &[finding],
            &["bad clamd-socket: no clamd at | sets neither LocalSocket | restart clamd@scan"],
        );
    }

    #[track_caller]
    fn check_talk(answer: Result<&str, &str>, node: Option<(&str, u32)>, expected: &str) {
        let address = Address::Unix("/run/clamav/clamd.ctl".into());
        let (place, source) = (address.clone(), io::ErrorKind::TimedOut.into());
        let answer = match answer {
            Ok(version) => Ok(version.to_owned()),
            Err("forbidden") => Err(ClamdError::Forbidden {
                address: place,
                source,
            }),
            Err("absent") => Err(ClamdError::Absent {
                address: place,
                source,
            }),
            Err("unavailable") => Err(ClamdError::Unavailable {
                address: place,
                command: "VERSION",
            }),
            Err(_) => Err(ClamdError::Silent {
                address: place,
                command: "PING",
                source,
            }),
        };
        let node = node.map(|(path, mode)| Node {
            path: path.into(),
            uid: 0,
            gid: 4_000_003,
            mode,
        });
        let talk = Talk {
            address,
            node,
            answer,
        };
        let conf = ClamdConf::parse("LocalSocket /run/clamav/clamd.ctl\n");
        let finding = judge_talk(&talk, &file(conf), &agent());
        testing::assert_lines(&[finding], &[expected]);
    }

    #[test]
    fn what_clamd_answers_or_not_says_what_to_do() {
        let socket = "/run/clamav/clamd.ctl";
        let up = Ok("ClamAV 1.4.6/27890/Sun Nov 22 06:43:59 2026");
        check_talk(
            up,
            Some((socket, 0o666)),
            "good clamd-socket: | root:4000003 0666 | 27890",
        );
        let zombie = Ok("ClamAV 1.4.6/4294967295/invalid timestam");
        check_talk(
            zombie,
            None,
            "bad clamd-socket: | scans nothing | restart clamav-daemon",
        );
        check_talk(
            Err("forbidden"),
            Some((socket, 0o660)),
            "bad clamd-socket: | may not talk | usermod -aG 4000003 clamcast",
        );
        check_talk(
            Err("forbidden"),
            Some((socket, 0o600)),
            "bad clamd-socket: | LocalSocketMode 666",
        );
        check_talk(
            Err("forbidden"),
            Some(("/run/clamav", 0o700)),
            "bad clamd-socket: | chmod o+x /run/clamav",
        );
        check_talk(
            Err("forbidden"),
            Some(("/run/clamav", 0o710)),
            "bad clamd-socket: | usermod -aG 4000003 clamcast",
        );
        check_talk(
            Err("absent"),
            None,
            "bad clamd-socket: | systemctl enable --now clamav-daemon | socket = \"none\"",
        );
        check_talk(
            Err("silent"),
            None,
            "bad clamd-socket: | journalctl -u clamav-daemon",
        );
        check_talk(
            Err("unavailable"),
            None,
            "note clamd-socket: | does not allow VERSION",
        );
    }

    #[track_caller]
    fn check_log(conf: &str, log: Log, expected: &str) {
        let conf = ClamdConf::parse(conf);
        let settings = settings(&conf, None);
        let finding = judge_log(&log, &file(conf), &settings, &agent());
        testing::assert_lines(&[finding], &[expected]);
    }

    #[test]
    fn a_log_that_cannot_be_read_costs_the_reason_or_the_proof() {
        let closed = |mode| {
            let node = Node {
                path: "/log".into(),
                uid: 0,
                gid: 4_000_003,
                mode,
            };
            Log::Closed(
                "/log".into(),
                Some(node),
                io::ErrorKind::PermissionDenied.into(),
            )
        };
        check_log("", Log::Readable("/log".into()), "good clamd-log: /log");
        check_log(
            "",
            Log::None,
            "note clamd-log: | names no LogFile | not `refused`",
        );
        check_log(
            "",
            closed(0o640),
            "note clamd-log: | usermod -aG 4000003 clamcast",
        );
        check_log("", closed(0o600), "note clamd-log: | chmod o+r /log");
        check_log(
            "OfficialDatabaseOnly yes",
            closed(0o640),
            "bad clamd-log: | the proof by VERSION needs it",
        );
    }

    #[test]
    fn a_signal_needs_clamds_own_user() {
        let address = Address::Unix("/run/clamd".into());
        let file = file(ClamdConf::default());
        let judge = |reload: &Reload, signal: Result<u32, String>| {
            judge_reload(&address, reload, |_| signal.clone(), &file)
        };
        let by_signal = Reload::Signal("/run/clamd.pid".into());
        testing::assert_lines(
            &[
                judge(&Reload::Command, Ok(7)),
                judge(&by_signal, Ok(7)),
                judge(&by_signal, Err("clamd (pid 7) runs as clamav".into())),
                judge(&Reload::Never, Ok(7)),
            ],
            &[
                "good reload: | over its socket",
                "good reload: | SIGUSR2",
                "bad reload: | runs as clamav | reload = \"socket\"",
                "note reload: | own check",
            ],
        );
    }
}
