//! Files and processes of a host. Everything of the system's own (`/etc`, `/proc`, `/sys`) is read
//! below a directory, so that a test can lay out another distribution's.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use clamcast_daemon::input::{self, user_name};
use nix::unistd::Uid;

/// Largest file of the system's that is read, in bytes. A crontab, unit or profile has a few kB.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Of a command line so many bytes are read: an option that matters stands near its beginning.
const COMMAND_BYTES_MAX: u64 = 8 << 10;

/// Entries of a directory that are looked at: more than Linux has processes unless told otherwise.
const ENTRIES_MAX: usize = 40_000;

/// A host's file system.
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
}

impl Host {
    /// This host.
    pub fn here() -> Self {
        Self::below("/")
    }

    /// The host whose `/` is the directory `root`.
    pub fn below(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Where the host's `path` is.
    pub fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Whether something is there.
    pub fn has(&self, path: impl AsRef<Path>) -> bool {
        self.at(path).exists()
    }

    /// The text of a plain file.
    pub fn text(&self, path: impl AsRef<Path>) -> io::Result<String> {
        let bytes = input::beginning(&self.at(path), FILE_BYTES_MAX)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The names in a directory, sorted; none if it cannot be read.
    pub fn names(&self, directory: impl AsRef<Path>) -> Vec<String> {
        let entries = fs::read_dir(self.at(directory)).into_iter().flatten();
        let names = entries.take(ENTRIES_MAX).flatten();
        let mut names: Vec<_> = names
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// The processes that can be seen.
    pub fn processes(&self) -> Vec<Process> {
        let pids = self.names("/proc").into_iter();
        let pids = pids.filter_map(|name| name.parse().ok());
        // One that ends meanwhile is left out.
        pids.filter_map(|pid| self.process(pid)).collect()
    }

    /// Puts a file on a host that a test lays out.
    #[cfg(test)]
    pub(crate) fn write(&self, path: &str, text: &str) {
        let path = self.at(path);
        fs::create_dir_all(path.parent().expect("it is below the root")).expect("a directory");
        fs::write(path, text).expect("a file");
    }

    fn process(&self, pid: u32) -> Option<Process> {
        let directory = PathBuf::from(format!("/proc/{pid}"));
        let uid = fs::metadata(self.at(&directory)).ok()?.uid();
        let name = self.text(directory.join("comm")).ok()?;
        let name = name.trim_end().replace(char::is_control, "?");
        let line = input::beginning(&self.at(directory.join("cmdline")), COMMAND_BYTES_MAX).ok()?;
        let line = String::from_utf8_lossy(&line);
        let arguments = line.split_terminator('\0').map(str::to_owned).collect();
        Some(Process {
            pid,
            name,
            uid,
            arguments,
        })
    }
}

/// A process.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Its name: fifteen characters at most, of a script that of the script.
    pub name: String,
    /// The user that it runs as.
    pub uid: u32,
    /// Its command line.
    pub arguments: Vec<String>,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = user_name(Uid::from_raw(self.uid));
        write!(f, "{} (pid {}, user {user})", self.name, self.pid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_host_is_a_directory() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::below(root.path());
        fs::create_dir_all(host.at("/proc/612")).unwrap();
        fs::write(host.at("/proc/612/comm"), "freshclam\n").unwrap();
        fs::write(host.at("/proc/612/cmdline"), "freshclam\0-d\0").unwrap();
        fs::create_dir_all(host.at("/proc/self")).unwrap();
        let processes = host.processes();
        assert_eq!(processes.len(), 1);
        assert_eq!(processes[0].arguments, ["freshclam", "-d"]);
        assert_eq!(host.names("/nowhere"), [""; 0]);
    }
}
