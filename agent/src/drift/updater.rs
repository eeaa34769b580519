//! Finds the updater of somebody else that is at work on the database directory.
//!
//! An agent without capabilities sees of other users' processes their names, owners and command
//! lines, of its own user's processes the open files, too. That names freshclam, cvdupdate and
//! rsync, and whoever writes there as the agent's own user.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::unistd::{Uid, User};

use crate::clamd::ClamdConf;

/// Processes that are looked at. A host with more has other worries.
const PROCESSES_MAX: usize = 50_000;

/// Open files of one process that are looked at: an updater has a dozen.
const FILES_MAX: usize = 256;

/// Of a command line so many bytes are read.
const COMMAND_BYTES_MAX: u64 = 8 << 10;

/// Where freshclam's configuration is if its command line does not say so: Debian, Red Hat, built
/// from source.
const FRESHCLAM_CONFS: [&str; 3] = [
    "/etc/clamav/freshclam.conf",
    "/etc/freshclam.conf",
    "/usr/local/etc/freshclam.conf",
];

/// Where freshclam writes if its configuration does not say so.
const FRESHCLAM_DIRECTORY: &str = "/var/lib/clamav";

/// Programs that bring databases, by the names of their processes. They are named if their command
/// line leads to the directory.
const UPDATERS: [&str; 4] = ["freshclam", "cvd", "cvdupdate", "rsync"];

/// A process that writes into our directory.
#[derive(Clone, Debug, Eq, PartialEq)]
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

impl Updater {
    /// Whether it is a program that comes again. Of any other writer that is not known: an operator
    /// may have copied a file.
    pub fn comes_again(&self) -> bool {
        UPDATERS.contains(&self.name.as_str())
    }

    /// What an operator does about it.
    pub fn remedy(&self) -> &'static str {
        match self.name.as_str() {
            "freshclam" => "systemctl disable --now clamav-freshclam",
            _ => "remove the job that starts it",
        }
    }

    /// Looks for one that is at work on `directory`. Blocking, for some milliseconds.
    pub fn find(directory: &Path) -> Option<Self> {
        let directory = fs::canonicalize(directory).unwrap_or_else(|_| directory.to_owned());
        let entries = fs::read_dir("/proc").ok()?;
        let pids = entries.flatten().filter_map(|entry| {
            let name = entry.file_name();
            name.to_str()?.parse::<u32>().ok()
        });
        // It writes databases itself.
        let others = pids.filter(|pid| *pid != std::process::id());
        others
            .take(PROCESSES_MAX)
            .find_map(|pid| judge(pid, &directory))
    }
}

/// What goes away while it is looked at was none.
fn judge(pid: u32, directory: &Path) -> Option<Updater> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let name = fs::read_to_string(proc.join("comm")).ok()?;
    let name: String = name
        .trim_end()
        .chars()
        .filter(|c| !c.is_control())
        .collect();
    let is_it = match UPDATERS.contains(&name.as_str()) {
        true => {
            let arguments = arguments(&proc).unwrap_or_default();
            leads_to(&name, &arguments, directory, configured_directory)
        }
        false => false,
    };
    if !is_it && !writes_below(&proc, directory) {
        return None;
    }
    let uid = Uid::from_raw(fs::metadata(&proc).ok()?.uid());
    let user = User::from_uid(uid).ok().flatten();
    let user = user.map_or_else(|| uid.to_string(), |user| user.name);
    Some(Updater { name, pid, user })
}

fn arguments(proc: &Path) -> io::Result<Vec<String>> {
    let mut bytes = Vec::new();
    File::open(proc.join("cmdline"))?
        .take(COMMAND_BYTES_MAX)
        .read_to_end(&mut bytes)?;
    let arguments = bytes.split(|byte| *byte == 0);
    Ok(arguments
        .map(|argument| String::from_utf8_lossy(argument).into_owned())
        .collect())
}

/// Whether an updater's command line leads to `directory`: an argument names it or a path in it,
/// or it is a freshclam whose configuration, which `configured` reads, does.
fn leads_to(
    name: &str,
    arguments: &[String],
    directory: &Path,
    configured: impl Fn(Option<&Path>) -> PathBuf,
) -> bool {
    let value = |long: &str| {
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.strip_prefix(long) {
                Some("") => return rest.next().map(PathBuf::from),
                Some(value) => return value.strip_prefix('=').map(PathBuf::from),
                None => {}
            }
        }
        None
    };
    let within = |path: &Path| path.starts_with(directory);
    let named = arguments.iter().any(|argument| {
        let path = argument
            .split_once('=')
            .map_or(argument.as_str(), |(_, v)| v);
        within(Path::new(path))
    });
    if named || name != "freshclam" {
        return named;
    }
    match value("--datadir") {
        Some(elsewhere) => within(&elsewhere),
        None => within(&configured(value("--config-file").as_deref())),
    }
}

/// Where the freshclam with this configuration writes.
fn configured_directory(conf: Option<&Path>) -> PathBuf {
    let places = FRESHCLAM_CONFS.map(PathBuf::from);
    let conf = match conf {
        Some(conf) => Some(conf.to_owned()),
        None => places.into_iter().find(|place| place.exists()),
    };
    // The option has the same name and form as clamd's.
    let conf = conf.and_then(|conf| ClamdConf::read(&conf).ok());
    let named = conf.and_then(|conf| conf.database_directory);
    let directory = named.unwrap_or_else(|| FRESHCLAM_DIRECTORY.into());
    fs::canonicalize(&directory).unwrap_or(directory)
}

/// Whether a process has a file below `directory` open for writing. Of other users' processes that
/// cannot be seen.
fn writes_below(proc: &Path, directory: &Path) -> bool {
    let Ok(files) = fs::read_dir(proc.join("fd")) else {
        return false;
    };
    files.flatten().take(FILES_MAX).any(|file| {
        let below = fs::read_link(file.path()).is_ok_and(|path| path.starts_with(directory));
        let info = proc.join("fdinfo").join(file.file_name());
        below && fs::read_to_string(info).is_ok_and(|info| is_for_writing(&info))
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

    fn check(command: &str, configured: &str, leads: bool) {
        let arguments: Vec<_> = command.split(' ').map(str::to_owned).collect();
        let name = arguments[0].clone();
        let directory = Path::new("/var/lib/clamav");
        let configured = |_: Option<&Path>| PathBuf::from(configured);
        assert_eq!(
            leads_to(&name, &arguments, directory, configured),
            leads,
            "{command}"
        );
    }

    #[test]
    fn a_freshclam_writes_where_its_configuration_says() {
        check("freshclam -d", "/var/lib/clamav", true);
        check("freshclam -d", "/srv/mirror", false);
        check("freshclam --datadir=/var/lib/clamav", "/srv/mirror", true);
        check("freshclam --datadir /srv/mirror", "/var/lib/clamav", false);
    }

    #[test]
    fn another_updater_names_the_directory() {
        check("rsync -a mirror::db/ /var/lib/clamav/", "", true);
        check("rsync -a mirror::db/ /var/lib/clamav2/", "", false);
        check("cvd update", "/var/lib/clamav", false);
    }

    #[test]
    fn whoever_writes_a_file_there_is_found_and_a_reader_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let (there, file) = (directory.path(), directory.path().join("daily.cld"));
        fs::write(&file, "one").unwrap();
        let mine = Path::new("/proc/self");
        assert!(!writes_below(mine, there));
        let reader = File::open(&file).unwrap();
        assert!(!writes_below(mine, there));
        drop(reader);
        let writer = File::options().append(true).open(&file).unwrap();
        assert!(writes_below(mine, there));
        drop(writer);
        assert_eq!(Updater::find(there), None, "it is this process itself");
    }
}
