//! Users of a host, and what the permission bits on a path let them do.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use clamcast_daemon::input::user_name;
use nix::unistd::{Gid, Uid, getegid, geteuid, getgrouplist, getgroups};

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
}
