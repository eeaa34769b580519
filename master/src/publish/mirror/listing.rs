//! What stands in the mirror directory at one moment, without opening any of it.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clamcast_daemon::input;
use clamcast_proto::DatabaseName;
use clamcast_proto::names::looks_like_a_database;

/// freshclam works in `tmp.<hex>/` and removes it at the end of its run.
const RUN_PREFIX: &str = "tmp.";

/// Most entries of a mirror directory. One with more is not published.
pub const ENTRIES_MAX: usize = 100_000;

/// A run in which nothing changed for this long was killed, or hangs.
pub const ABANDONED_AFTER: Duration = Duration::from_secs(15 * 60);

/// Entries of freshclam's working directory that are looked at for its newest change. A run that
/// unpacks a database has one for each member.
const RUN_ENTRIES_MAX: usize = 10_000;

/// How deep freshclam's working directory is looked into: it unpacks in a directory within.
const RUN_DEPTH_MAX: usize = 3;

/// One look at the mirror.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Listing {
    /// The directory itself; where `path` is a symlink, what it points to.
    pub directory: PathBuf,
    /// Which directory that is: another one may have its name later.
    pub identity: Identity,
    /// Everything that has the name of a database.
    pub files: BTreeMap<DatabaseName, Stamp>,
    /// Names that clamd would load, and we do not take: hidden, in capitals, our own.
    pub ignored: Vec<String>,
    /// freshclam's runs that are open or were killed.
    pub runs: Vec<Run>,
}

/// A directory by device and inode.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Identity {
    pub(super) device: u64,
    pub(super) inode: u64,
}

/// What tells without opening whether a file is still the same: the kernel sets `changed` on every
/// change of content or attributes, and no program can set it back.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Stamp {
    kind: Kind,
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// What an entry of the mirror is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A symbolic link.
    Symlink,
    /// A pipe, a socket or a device.
    Special,
}

/// A run of freshclam, by its working directory.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Run {
    /// `tmp.` and ten hexadecimal digits.
    pub name: String,
    /// Since the newest change inside.
    pub age: Duration,
}

impl Listing {
    /// Lists the directory. `now` only says how old runs are.
    pub fn of(path: &Path, now: SystemTime) -> io::Result<Self> {
        let directory = fs::canonicalize(path)?;
        let metadata = fs::metadata(&directory)?;
        let mut listing = Self {
            directory: directory.clone(),
            identity: Identity {
                device: metadata.dev(),
                inode: metadata.ino(),
            },
            files: BTreeMap::new(),
            ignored: Vec::new(),
            runs: Vec::new(),
        };
        for name in input::names(&directory, ENTRIES_MAX)? {
            let path = directory.join(&name);
            let name = name.to_string_lossy();
            let metadata = match fs::symlink_metadata(&path) {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue, // gone since
                Err(error) => return Err(error),
            };
            if metadata.is_dir() {
                if name.starts_with(RUN_PREFIX) {
                    let newest = newest_change(&path, &metadata);
                    let age = now.duration_since(newest).unwrap_or_default();
                    let name = name.into_owned();
                    listing.runs.push(Run { name, age });
                }
            } else if let Ok(name) = name.parse::<DatabaseName>()
                && name.has_known_extension()
            {
                listing.files.insert(name, Stamp::of(&metadata));
            } else if looks_like_a_database(&name) {
                listing.ignored.push(name.into_owned());
            }
        }
        listing.ignored.sort();
        listing.runs.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(listing)
    }

    /// The run that may still change databases, if there is one: the one that changed last.
    pub fn open_run(&self) -> Option<&Run> {
        let live = self.runs.iter().filter(|run| run.age < ABANDONED_AFTER);
        live.min_by_key(|run| run.age)
    }
}

impl Stamp {
    /// The stamp of a file whose attributes were read.
    pub fn of(metadata: &Metadata) -> Self {
        let kind = if metadata.is_file() {
            Kind::File
        } else if metadata.is_symlink() {
            Kind::Symlink
        } else {
            Kind::Special
        };
        Self {
            kind,
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// A file that differs from those with another number.
    #[cfg(test)]
    pub(super) fn numbered(number: u64) -> Self {
        Self {
            kind: Kind::File,
            device: 1,
            inode: number,
            size: 0,
            modified: (0, 0),
            changed: (0, 0),
        }
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// The newest modification in a run's working directory. What cannot be read counts by its
/// directory: freshclam keeps it to itself where it runs as another user.
fn newest_change(run: &Path, metadata: &Metadata) -> SystemTime {
    let modified = |metadata: &Metadata| metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    let mut newest = modified(metadata);
    let mut looked_at = 0;
    let mut todo = vec![(run.to_owned(), 1)];
    while let Some((directory, depth)) = todo.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            looked_at += 1;
            if looked_at > RUN_ENTRIES_MAX {
                return newest;
            }
            let Ok(metadata) = entry.metadata() else {
                continue; // gone since
            };
            newest = newest.max(modified(&metadata));
            if metadata.is_dir() && depth < RUN_DEPTH_MAX {
                todo.push((entry.path(), depth + 1));
            }
        }
    }
    newest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_databases_are_listed_and_what_clamd_might_load_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "daily.cld",
            "local.ndb",
            "daily-7.cvd.sign",
            "freshclam.dat",
            "daily.cld.tmp",
            "x.txt",
            ".hidden.ndb",
            "X.NDB",
            "clamcast-canary.hsb",
            "a\nb.ndb",
        ] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        fs::create_dir(dir.path().join("sub.ndb")).unwrap();
        let listing = Listing::of(dir.path(), SystemTime::now()).unwrap();
        let files: Vec<_> = listing.files.keys().map(ToString::to_string).collect();
        assert_eq!(files, ["daily-7.cvd.sign", "daily.cld", "local.ndb"]);
        assert_eq!(
            listing.ignored,
            [".hidden.ndb", "X.NDB", "a\nb.ndb", "clamcast-canary.hsb"]
        );
    }

    #[test]
    fn a_run_is_open_until_nothing_changed_in_it_for_a_quarter_of_an_hour() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("tmp.0123456789/clamav-x.tmp")).unwrap();
        let now = SystemTime::now();
        let open = |ago: Duration| {
            let listing = Listing::of(dir.path(), now + ago).unwrap();
            listing.open_run().is_some()
        };
        assert!(open(Duration::ZERO));
        assert!(open(ABANDONED_AFTER - Duration::from_secs(10)));
        assert!(!open(ABANDONED_AFTER + Duration::from_secs(10)));
        // What is written deep inside keeps it open.
        let deep = dir.path().join("tmp.0123456789/clamav-x.tmp/part");
        let file = fs::File::create(deep).unwrap();
        file.set_modified(now + ABANDONED_AFTER).unwrap();
        assert!(open(ABANDONED_AFTER + Duration::from_secs(10)));
    }
}
