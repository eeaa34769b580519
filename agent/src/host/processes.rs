//! Files, rights and processes of a host. Everything of the system's own (`/etc`, `/proc`, `/sys`)
//! is read below a directory, so that a test can lay out another distribution's.

use std::ffi::CString;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use clamcast_daemon::input::{self, user_name};
use nix::unistd::{Gid, Uid, getegid, geteuid, getgrouplist, getgroups};

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
    /// Whom it runs as.
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

/// A user with all that decides what it may do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct User {
    /// Its name, or its number where it has none.
    pub name: String,
    /// Its number.
    pub uid: u32,
    /// Its groups.
    pub gids: Vec<u32>,
}

impl User {
    /// The user of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::of(nix::unistd::User::from_name(name).ok()??)
    }

    /// The user of that number; one without an entry has no groups.
    pub fn numbered(uid: u32) -> Self {
        let known = nix::unistd::User::from_uid(Uid::from_raw(uid));
        known.ok().flatten().and_then(Self::of).unwrap_or(Self {
            name: uid.to_string(),
            uid,
            gids: Vec::new(),
        })
    }

    fn of(entry: nix::unistd::User) -> Option<Self> {
        let name = CString::new(entry.name.clone()).ok()?;
        let gids = getgrouplist(&name, entry.gid).unwrap_or_else(|_| vec![entry.gid]);
        Some(Self {
            name: entry.name,
            uid: entry.uid.as_raw(),
            gids: gids.into_iter().map(Gid::as_raw).collect(),
        })
    }

    /// Whom this process runs as, with the groups that it really has.
    pub fn this() -> Self {
        let uid = geteuid().as_raw();
        let gids = getgroups().unwrap_or_default().into_iter();
        Self {
            name: user_name(Uid::from_raw(uid)),
            uid,
            gids: gids.chain([getegid()]).map(Gid::as_raw).collect(),
        }
    }

    /// Whether the bits of `node` let this user do all of `wanted`: 4 read, 2 write, 1 enter.
    /// Access control lists are not looked at.
    pub(crate) fn may(&self, node: &Node, wanted: u32) -> bool {
        let shift = if self.uid == node.uid {
            6
        } else if self.gids.contains(&node.gid) {
            3
        } else {
            0
        };
        self.uid == 0 || node.mode >> shift & wanted == wanted
    }
}

/// Something on a path, with its rights.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Node {
    /// Its path.
    pub(crate) path: PathBuf,
    /// Its owner.
    pub(crate) uid: u32,
    /// Its group.
    pub(crate) gid: u32,
    /// Its permission bits.
    pub(crate) mode: u32,
}

impl Node {
    /// What is at `path`, after links.
    pub(crate) fn at(path: &Path) -> io::Result<Self> {
        let facts = fs::metadata(path)?;
        Ok(Self {
            path: path.to_owned(),
            uid: facts.uid(),
            gid: facts.gid(),
            mode: facts.mode() & 0o7777,
        })
    }

    /// The directories that lead to `path`, from the top, and `path` itself, after links.
    pub(crate) fn way(path: &Path) -> io::Result<Vec<Self>> {
        let real = path.canonicalize()?;
        let mut way: Vec<_> = real.ancestors().map(Self::at).collect::<Result<_, _>>()?;
        way.reverse();
        Ok(way)
    }

    /// Its owner's name.
    pub(crate) fn owner(&self) -> String {
        user_name(Uid::from_raw(self.uid))
    }

    /// Its group's name.
    pub(crate) fn group(&self) -> String {
        let known = nix::unistd::Group::from_gid(Gid::from_raw(self.gid));
        match known {
            Ok(Some(group)) => group.name,
            Ok(None) | Err(_) => self.gid.to_string(),
        }
    }

    /// `OWNER:GROUP MODE`.
    pub(crate) fn rights(&self) -> String {
        format!("{}:{} {:04o}", self.owner(), self.group(), self.mode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(uid: u32, gids: &[u32], mode: u32, wanted: u32, expected: bool) {
        let user = User {
            name: "u".into(),
            uid,
            gids: gids.to_vec(),
        };
        let node = Node {
            path: "/x".into(),
            uid: 10,
            gid: 20,
            mode,
        };
        assert_eq!(user.may(&node, wanted), expected, "{user:?} {mode:o}");
    }

    #[test]
    fn the_first_class_that_fits_decides() {
        check(10, &[20], 0o700, 7, true);
        check(10, &[20], 0o077, 4, false);
        check(11, &[20], 0o070, 7, true);
        check(11, &[20], 0o707, 4, false);
        check(11, &[21], 0o005, 5, true);
        check(11, &[21], 0o005, 2, false);
        check(0, &[0], 0o000, 7, true);
    }

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
