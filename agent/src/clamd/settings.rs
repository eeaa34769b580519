//! How this host's clamd is to be treated: agent.toml and clamd.conf together.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clamcast_daemon::clamscan;
use clamcast_proto::DatabaseName;
use clamcast_proto::names::DatabaseKind;
use serde::Deserialize;

use super::client::Address;
use super::conf::ClamdConf;

/// Where clamd listens if nothing says so: Debian's place.
const SOCKET: &str = "/run/clamav/clamd.ctl";

/// The `[clamd]` section of agent.toml, and the directory that it is about.
#[derive(Clone, Debug)]
pub struct RawClamd {
    /// `socket`: `None` for the one in clamd.conf, empty for "none".
    pub sockets: Option<Vec<Address>>,
    /// `reload`.
    pub reload: ReloadBy,
    /// `pid_file`, if it stands there.
    pub pid_file: Option<PathBuf>,
    /// `proof`.
    pub proof: ProofBy,
    /// `deadline`: so long an install may take to be proven.
    pub deadline: Duration,
    /// `splay`: a random part of it is waited before the reload.
    pub splay: Duration,
    /// Where the databases are: `[database] path`.
    pub database_directory: PathBuf,
}

#[cfg(test)]
impl RawClamd {
    /// What a configuration says that leaves out everything.
    pub(crate) fn unset() -> Self {
        Self {
            sockets: None,
            reload: ReloadBy::Socket,
            pid_file: None,
            proof: ProofBy::Canary,
            deadline: Duration::from_secs(300),
            splay: Duration::ZERO,
            database_directory: "/var/lib/clamav".into(),
        }
    }
}

/// How clamd is asked for a reload.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum ReloadBy {
    /// RELOAD over its socket.
    #[default]
    Socket,
    /// SIGUSR2 to the process in its pid file.
    Signal,
}

/// How an install is proven.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum ProofBy {
    /// By a sample that only this install names.
    #[default]
    Canary,
    /// By VERSION and the log: weaker.
    Version,
}

/// How this host's clamds are to be treated.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The clamds on the database directory; none: installed counts as live.
    pub instances: Vec<Instance>,
    /// The log of the instances that [`Instance::logs`], if it is known.
    pub log_file: Option<PathBuf>,
    /// Whether clamd goes on scanning while it reloads. Where not, a failed load leaves it dead.
    pub concurrent_reload: bool,
    /// How an install is proven; `Version` too where clamd loads official databases only.
    pub proof: ProofBy,
    /// Whether clamd loads official databases only.
    pub official_only: bool,
    /// Where the databases are.
    pub database_directory: PathBuf,
    /// `clamscan`, if this host has it.
    pub scanner: Option<PathBuf>,
    /// So long an install may take to be proven.
    pub deadline: Duration,
    /// A random part of it is waited before the reload.
    pub splay: Duration,
    /// Whom clamd runs as, if clamd.conf says so.
    pub user: Option<String>,
}

impl Settings {
    /// Whether clamd loads a file of this name. Where it loads official databases only, that is
    /// containers that may be signed, and what it reads before it asks: lists of signatures to be
    /// ignored and two names (`cli_loaddbdir` in libclamav/readdb.c, measured with 1.4.6). A detached
    /// signature is not loaded anywhere, and nobody misses it.
    pub fn loads(&self, name: &DatabaseName) -> bool {
        let before = |name: &str| {
            let name_in_lower_case = name.to_ascii_lowercase();
            matches!(name, "local.gdb" | "daily.cfg")
                || name_in_lower_case.ends_with(".ign")
                || name_in_lower_case.ends_with(".ign2")
        };
        !self.official_only
            || match name.kind() {
                DatabaseKind::Cvd | DatabaseKind::Cld | DatabaseKind::Sign => true,
                DatabaseKind::Cud => false,
                DatabaseKind::Loose => before(name.as_str()),
            }
    }
}

/// One clamd on the database directory.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Instance {
    /// Where it listens.
    pub address: Address,
    /// How it is asked for a reload.
    pub reload: Reload,
    /// Whether the log file is this one's.
    pub logs: bool,
}

/// How a clamd is asked for a reload.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Reload {
    /// RELOAD over its socket.
    Command,
    /// SIGUSR2 to the process in this file.
    Signal(PathBuf),
    /// It cannot be asked; it looks by itself (`SelfCheck`).
    Never,
}

impl Settings {
    /// What agent.toml and clamd.conf come to, and what an operator should know about it.
    pub fn resolve(raw: RawClamd, conf: Option<ClamdConf>) -> (Self, Vec<String>) {
        Self::with_scanner(raw, conf.unwrap_or_default(), clamscan::find())
    }

    fn with_scanner(
        raw: RawClamd,
        conf: ClamdConf,
        scanner: Option<PathBuf>,
    ) -> (Self, Vec<String>) {
        let mut notes = Vec::new();
        let mut note = |text: String| notes.push(text);
        let sockets = raw.sockets.unwrap_or_else(|| {
            vec![conf.address().unwrap_or_else(|| {
                note(format!(
                    "no clamd.conf says where clamd listens: taking {SOCKET}"
                ));
                Address::Unix(SOCKET.into())
            })]
        });
        let alone = sockets.len() == 1;
        let directory = conf.database_directory.as_deref();
        let elsewhere = directory.filter(|dir| !same_directory(dir, &raw.database_directory));
        let reload_command = conf.reload_command.unwrap_or(true);
        let pid_file = raw.pid_file.or_else(|| conf.pid_file.clone());
        let wants_signal = raw.reload == ReloadBy::Signal || !reload_command;
        let instances: Vec<_> = sockets
            .into_iter()
            .map(|address| {
                // With several sockets, clamd.conf speaks for the one that it names.
                let ours = alone || conf.is_at(&address);
                let reload = match &pid_file {
                    Some(pid_file) if wants_signal && ours => Reload::Signal(pid_file.clone()),
                    None if !reload_command && ours => Reload::Never,
                    Some(_) | None => Reload::Command,
                };
                Instance {
                    reload,
                    // A clamd on another directory has nothing to say about ours.
                    logs: ours && conf.log_file.is_some() && elsewhere.is_none(),
                    address,
                }
            })
            .collect();
        for instance in &instances {
            let address = &instance.address;
            match &instance.reload {
                Reload::Never => note(format!(
                    "clamd at {address} does not allow RELOAD and has no pid file: an install is \
                     live when clamd's own check (SelfCheck) finds it"
                )),
                Reload::Command if raw.reload == ReloadBy::Signal => note(format!(
                    "no pid file is known of clamd at {address}: RELOAD goes over its socket"
                )),
                Reload::Signal(path) if raw.reload == ReloadBy::Socket => note(format!(
                    "clamd.conf does not allow RELOAD: clamd gets SIGUSR2 (pid in {})",
                    path.display()
                )),
                Reload::Command | Reload::Signal(_) => {}
            }
        }
        let concurrent_reload = conf.concurrent_reload.unwrap_or(true);
        let official_only = conf.official_only.unwrap_or(false);
        if !instances.is_empty() {
            if official_only && raw.proof == ProofBy::Canary {
                note("OfficialDatabaseOnly yes: clamd does not load the canary, so the proof is VERSION and the log".into());
            }
            if !concurrent_reload {
                note("ConcurrentDatabaseReload no: clamd does not answer while it loads, and one failed load leaves it dead until it is restarted".into());
                if scanner.is_none() {
                    note("no clamscan on this host to try a set before clamd gets it".into());
                }
            }
            if conf.virus_event.is_some() {
                note("VirusEvent is set: it runs once for every install, with Clamcast.Install-N as the name".into());
            }
        }
        if let Some(directory) = elsewhere {
            note(format!(
                "clamd loads {}, and the agent installs into {}",
                directory.display(),
                raw.database_directory.display()
            ));
        }
        let settings = Self {
            instances,
            log_file: conf.log_file,
            concurrent_reload,
            proof: if official_only {
                ProofBy::Version
            } else {
                raw.proof
            },
            official_only,
            database_directory: raw.database_directory,
            scanner,
            deadline: raw.deadline,
            splay: raw.splay,
            user: conf.user,
        };
        (settings, notes)
    }
}

/// The same after symbolic links, or by name where one is not there yet.
fn same_directory(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    real(one) == real(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(sockets: Option<&[&str]>) -> RawClamd {
        let address = |text: &&str| text.parse().expect("an address");
        RawClamd {
            sockets: sockets.map(|all| all.iter().map(address).collect()),
            ..RawClamd::unset()
        }
    }

    /// One word an instance: address, how it reloads, `log` if the log is its own.
    fn instances(raw: RawClamd, conf: &str) -> (String, String) {
        let (settings, notes) = Settings::with_scanner(
            raw,
            ClamdConf::parse(conf),
            Some("/usr/bin/clamscan".into()),
        );
        let one = |instance: &Instance| {
            let reload = match &instance.reload {
                Reload::Command => "command".to_owned(),
                Reload::Signal(path) => path.display().to_string(),
                Reload::Never => "never".to_owned(),
            };
            let log = if instance.logs { "+log" } else { "" };
            format!("{}={reload}{log}", instance.address)
        };
        let all: Vec<_> = settings.instances.iter().map(one).collect();
        (all.join(" "), notes.join("; "))
    }

    #[track_caller]
    fn check(sockets: Option<&[&str]>, conf: &str, expected: &str, note: &str) {
        let (instances, notes) = instances(raw(sockets), conf);
        assert_eq!(instances, expected);
        assert!(notes.contains(note), "{notes:?} lacks {note:?}");
        assert_eq!(notes.is_empty(), note.is_empty(), "{notes:?}");
    }

    #[test]
    fn what_stands_in_agent_toml_counts_before_clamd_conf() {
        let conf = "LocalSocket /run/a\nLogFile /log\n";
        check(None, conf, "/run/a=command+log", "");
        check(Some(&["/run/b"]), conf, "/run/b=command+log", "");
        check(Some(&[]), conf, "", "");
        check(
            None,
            "",
            "/run/clamav/clamd.ctl=command",
            "no clamd.conf says",
        );
    }

    #[test]
    fn of_several_clamds_the_log_is_that_of_the_one_in_clamd_conf() {
        let conf = "LocalSocket /run/a\nTCPSocket 3310\nLogFile /log\n";
        let expected = "/run/a=command+log /run/b=command";
        check(Some(&["/run/a", "/run/b"]), conf, expected, "");
        let expected = "127.0.0.1:3310=command+log /run/b=command";
        check(Some(&["127.0.0.1:3310", "/run/b"]), conf, expected, "");
    }

    #[test]
    fn where_reload_is_forbidden_a_signal_is_sent_or_clamd_is_left_to_itself() {
        let conf = "LocalSocket /run/a\nEnableReloadCommand no\n";
        check(None, conf, "/run/a=never", "SelfCheck");
        let conf = "LocalSocket /run/a\nEnableReloadCommand no\nPidFile /run/pid\n";
        check(None, conf, "/run/a=/run/pid", "SIGUSR2");
        let mut signal = raw(None);
        signal.reload = ReloadBy::Signal;
        let (found, notes) = instances(signal.clone(), "LocalSocket /run/a\nPidFile /run/pid\n");
        assert_eq!((found.as_str(), notes.as_str()), ("/run/a=/run/pid", ""));
        let (found, notes) = instances(signal, "LocalSocket /run/a\n");
        assert_eq!(found, "/run/a=command");
        assert!(notes.contains("no pid file"), "{notes}");
    }

    #[test]
    fn where_only_official_databases_count_others_are_passed_over() {
        let passed_over = |conf: &str| {
            let (settings, _) = Settings::with_scanner(raw(None), ClamdConf::parse(conf), None);
            let names = "main.cvd daily.cld daily.cud x.ndb x.yar daily.cfg x.cfg local.gdb x.ign2 \
                         main-1.cvd.sign";
            let names = names.split(' ').filter(|name| {
                let name = name.parse().expect("a database name");
                !settings.loads(&name)
            });
            names.collect::<Vec<_>>().join(" ")
        };
        assert_eq!(passed_over("LocalSocket /run/a\n"), "");
        let conf = "LocalSocket /run/a\nOfficialDatabaseOnly yes\n";
        assert_eq!(passed_over(conf), "daily.cud x.ndb x.yar x.cfg");
    }

    #[test]
    fn what_weakens_the_proof_is_noted() {
        for (conf, note) in [
            ("OfficialDatabaseOnly yes", "VERSION and the log"),
            ("ConcurrentDatabaseReload no", "one failed load"),
            ("VirusEvent /bin/tell", "once for every install"),
            ("DatabaseDirectory /srv/clamav", "clamd loads /srv/clamav"),
        ] {
            let conf = format!("LocalSocket /run/a\n{conf}\n");
            check(None, &conf, "/run/a=command", note);
        }
    }
}
