//! Programs that bring databases to this host: which processes they are, and where they write.
//!
//! An agent without capabilities sees of other users' processes their names, owners and command
//! lines, of its own user's processes the open files, too. That names freshclam, cvdupdate and
//! rsync, and whoever writes there as the agent's own user.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use clamcast_daemon::input::{self, user_name};
use nix::unistd::Uid;
use serde::{Deserialize, Serialize};

use crate::clamd::ClamdConf;
use crate::host::{Host, Process};

/// Open files of one process that are looked at: an updater has a dozen.
const FILES_MAX: usize = 256;

/// Of `/proc/PID/fdinfo/FD` so many bytes are read: the flags stand in its second line.
const FDINFO_BYTES_MAX: u64 = 4 << 10;

/// Where distributions put freshclam.conf: Debian, Red Hat, built from source.
const FRESHCLAM_CONFS: [&str; 3] = [
    "/etc/clamav/freshclam.conf",
    "/etc/freshclam.conf",
    "/usr/local/etc/freshclam.conf",
];

/// Where freshclam writes unless told otherwise, in all of them.
pub const FRESHCLAM_DIRECTORY: &str = "/var/lib/clamav";

/// So much of its name a process shows (`TASK_COMM_LEN` in proc_pid_comm(5)).
const COMM_BYTES: usize = 15;

/// A program that brings databases.
#[derive(Debug)]
pub struct Program {
    /// Its name.
    pub name: &'static str,
    /// What its processes are called, if not after it.
    process: Option<&'static str>,
    /// The units that start it, without what follows a dot or a hyphen.
    units: &'static [&'static str],
    /// Whether that is all it is there for. Of another only a command line that leads to the
    /// directory counts.
    brings_databases_only: bool,
}

/// Those that are known. freshclam is the first.
pub const PROGRAMS: [Program; 5] = [
    Program {
        name: "freshclam",
        process: None,
        units: &["clamav-freshclam", "freshclam"],
        brings_databases_only: true,
    },
    Program {
        name: "clamav-unofficial-sigs",
        process: None,
        units: &["clamav-unofficial-sigs"],
        brings_databases_only: true,
    },
    Program {
        name: "fangfrisch",
        process: None,
        units: &["fangfrisch"],
        brings_databases_only: true,
    },
    Program {
        name: "cvdupdate",
        process: Some("cvd"),
        units: &["cvdupdate"],
        brings_databases_only: true,
    },
    Program {
        name: "rsync",
        process: None,
        units: &[],
        brings_databases_only: false,
    },
];

impl Program {
    /// Whether this is freshclam, which has a directory by configuration.
    pub fn is_freshclam(&self) -> bool {
        self.name == PROGRAMS[0].name
    }

    /// Whether a process of this name runs it.
    fn is_called(&self, process: &str) -> bool {
        let shown = &self.name[..self.name.len().min(COMM_BYTES)];
        process == shown || self.process == Some(process)
    }

    /// Whether `process` runs it, in order to bring databases to `directory` if it may be there for
    /// something else.
    pub fn runs_as(&self, process: &Process, directory: &Path) -> bool {
        self.is_called(&process.name)
            && (self.brings_databases_only || names(&process.arguments, directory))
    }

    /// Whether it is what a unit of this name starts.
    pub fn is_started_by(&self, unit: &str) -> bool {
        let stem = unit.rsplit_once('.').map_or(unit, |(stem, _)| stem);
        let is = |own: &&str| stem == *own || stem.starts_with(&format!("{own}-"));
        self.units.iter().any(is)
    }

    /// Whether a crontab or a script starts it. Comments do not count. A name counts with its path,
    /// too, and whatever its end is.
    pub fn is_started_in(&self, script: &str) -> bool {
        let lines = script.lines();
        let lines = lines.filter(|line| !line.trim_start().starts_with('#'));
        let mut words = lines.flat_map(str::split_whitespace);
        self.brings_databases_only
            && words.any(|word| {
                let name = word.rsplit('/').next().unwrap_or(word);
                name.starts_with(self.name)
            })
    }
}

/// Whether an argument is a path in `directory`, or has one as its value.
fn names(arguments: &[String], directory: &Path) -> bool {
    arguments.iter().any(|argument| {
        let path = argument
            .split_once('=')
            .map_or(argument.as_str(), |(_, v)| v);
        Path::new(path).starts_with(directory)
    })
}

/// Where the command line of a freshclam leads: its directory, else that in the configuration that
/// it names. `None` if it says nothing, or is another program's. Anybody may call a program
/// freshclam, so this is for a process without root's rights.
pub fn told_directory(host: &Host, process: &Process) -> Option<PathBuf> {
    if !PROGRAMS[0].is_called(&process.name) {
        return None;
    }
    if let Some(directory) = option(process, "--datadir") {
        return Some(directory.into());
    }
    directory_in(host, Path::new(&option(process, "--config-file")?))
}

/// Where a freshclam writes that is told nothing, if its configuration is there and can be read.
pub fn configured_directory(host: &Host) -> Option<PathBuf> {
    let mut places = FRESHCLAM_CONFS.iter().map(Path::new);
    places.find_map(|place| directory_in(host, place))
}

/// What the freshclam.conf at `path` says of it. The option has the same form as clamd's.
fn directory_in(host: &Host, path: &Path) -> Option<PathBuf> {
    let conf = ClamdConf::parse(&host.text(path).ok()?);
    let directory = conf.database_directory;
    Some(directory.unwrap_or_else(|| FRESHCLAM_DIRECTORY.into()))
}

/// The value of a long option on its command line.
fn option(process: &Process, name: &str) -> Option<String> {
    let mut arguments = process.arguments.iter();
    while let Some(argument) = arguments.next() {
        match argument.strip_prefix(name) {
            Some("") => return arguments.next().cloned(),
            Some(value) if value.starts_with('=') => return Some(value[1..].to_owned()),
            Some(_) | None => {}
        }
    }
    None
}

/// A process that writes into our directory.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Updater {
    /// Its name, as the kernel has it.
    pub name: String,
    /// Its process id.
    pub pid: u32,
    /// Whom it belongs to.
    pub user: String,
}

impl fmt::Display for Updater {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, pid, user } = self;
        write!(f, "{name} (pid {pid}, user {user})")
    }
}

impl From<&Process> for Updater {
    fn from(process: &Process) -> Self {
        Self {
            name: process.name.clone(),
            pid: process.pid,
            user: user_name(Uid::from_raw(process.uid)),
        }
    }
}

impl Updater {
    /// Whether it is a program that comes again. Of any other writer that is not known: an operator
    /// may have copied a file.
    pub fn comes_again(&self) -> bool {
        PROGRAMS.iter().any(|program| program.is_called(&self.name))
    }

    /// What an operator does about it.
    pub fn remedy(&self) -> &'static str {
        match PROGRAMS[0].is_called(&self.name) {
            true => "systemctl disable --now clamav-freshclam",
            false => "remove the job that starts it",
        }
    }

    /// Looks for one that is at work on `directory`. Blocking, for some milliseconds.
    pub fn find(directory: &Path) -> Option<Self> {
        let host = Host::here();
        let directory = real(directory);
        let processes = host.processes().into_iter();
        // The agent writes databases itself.
        let mut others = processes.filter(|process| process.pid != std::process::id());
        let found = others.find(|process| {
            leads_to(&host, process, &directory) || writes_below(process, &directory)
        });
        found.as_ref().map(Self::from)
    }
}

fn real(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}

/// Whether a process is of a known program, and its command line leads to `directory`: an argument
/// names it or a path in it, or it is a freshclam whose configuration does.
fn leads_to(host: &Host, process: &Process, directory: &Path) -> bool {
    let mut programs = PROGRAMS.iter();
    let Some(program) = programs.find(|program| program.is_called(&process.name)) else {
        return false;
    };
    if !program.is_freshclam() {
        return names(&process.arguments, directory);
    }
    let told = told_directory(host, process);
    let writes = told.or_else(|| configured_directory(host));
    let writes = writes.unwrap_or_else(|| FRESHCLAM_DIRECTORY.into());
    real(&writes).starts_with(directory)
}

/// Whether a process has a file below `directory` open for writing. Of other users' processes that
/// cannot be seen.
fn writes_below(process: &Process, directory: &Path) -> bool {
    let proc = PathBuf::from(format!("/proc/{}", process.pid));
    let Ok(files) = fs::read_dir(proc.join("fd")) else {
        return false;
    };
    files.flatten().take(FILES_MAX).any(|file| {
        let below = fs::read_link(file.path()).is_ok_and(|path| path.starts_with(directory));
        let info = proc.join("fdinfo").join(file.file_name());
        let info = below.then(|| input::beginning(&info, FDINFO_BYTES_MAX));
        info.and_then(Result::ok)
            .is_some_and(|info| is_for_writing(&String::from_utf8_lossy(&info)))
    })
}

/// As `/proc/PID/fdinfo/FD` has it: the flags of `open`, in octal digits (man 5 proc).
fn is_for_writing(info: &str) -> bool {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| flags & 0o3 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn process(command: &str) -> Process {
        let arguments: Vec<_> = command.split(' ').map(str::to_owned).collect();
        Process {
            pid: 612,
            name: arguments[0].clone(),
            uid: 0,
            arguments,
        }
    }

    /// Whether `command` leads to `/var/lib/clamav` on a host whose freshclam.conf names `configured`.
    #[track_caller]
    fn check(command: &str, configured: &str, leads: bool) {
        let root = tempfile::tempdir().unwrap();
        let host = Host::below(root.path());
        fs::create_dir_all(host.at("/etc/clamav")).unwrap();
        let conf = format!("#DatabaseDirectory /x\nDatabaseDirectory {configured}\n");
        fs::write(host.at("/etc/clamav/freshclam.conf"), conf).unwrap();
        fs::write(host.at("/own.conf"), "DatabaseDirectory /srv/own\n").unwrap();
        nix::unistd::mkfifo(&host.at("/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let directory = Path::new("/var/lib/clamav");
        let found = leads_to(&host, &process(command), directory);
        assert_eq!(found, leads, "{command}");
    }

    #[test]
    fn a_freshclam_writes_where_its_command_line_says_or_its_configuration() {
        check("freshclam -d", "/var/lib/clamav", true);
        check("freshclam -d", "/srv/mirror", false);
        check("freshclam --datadir=/var/lib/clamav", "/srv/mirror", true);
        check("freshclam --datadir /srv/mirror", "/var/lib/clamav", false);
        check(
            "freshclam --config-file /own.conf",
            "/var/lib/clamav",
            false,
        );
        check("freshclam --config-file=/fifo", "/var/lib/clamav", true);
    }

    #[test]
    fn another_updater_names_the_directory() {
        check("rsync -a mirror::db/ /var/lib/clamav/", "/", true);
        check("rsync -a mirror::db/ /var/lib/clamav2/", "/", false);
        check("cp daily.cld /var/lib/clamav/", "/", false);
        check("cvd update", "/var/lib/clamav", false);
    }

    #[test]
    fn programs_are_known_by_what_a_process_shows_of_their_names() {
        let ours = Path::new("/var/lib/clamav");
        let runs = |command: &str| {
            let mut programs = PROGRAMS.iter();
            let program = programs.find(|program| program.runs_as(&process(command), ours));
            program.map(|program| program.name)
        };
        assert_eq!(runs("freshclam -d"), Some("freshclam"));
        assert_eq!(runs("clamav-unoffici"), Some("clamav-unofficial-sigs"));
        assert_eq!(runs("cvd update"), Some("cvdupdate"));
        assert_eq!(runs("rsync -a x::db/ /var/lib/clamav/"), Some("rsync"));
        assert_eq!(runs("rsync -a x::mail/ /srv/mail/"), None);
        assert_eq!(runs("freshclamx"), None);
    }

    #[test]
    fn whoever_writes_a_file_there_is_found_and_a_reader_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let (there, file) = (directory.path(), directory.path().join("daily.cld"));
        fs::write(&file, "one").unwrap();
        let mut mine = process("test");
        mine.pid = std::process::id();
        assert!(!writes_below(&mine, there));
        let reader = File::open(&file).unwrap();
        assert!(!writes_below(&mine, there));
        drop(reader);
        let writer = File::options().append(true).open(&file).unwrap();
        assert!(writes_below(&mine, there));
        drop(writer);
        assert_eq!(Updater::find(there), None, "it is this process itself");
    }
}
