//! What stands in the mirror directory at one moment, without opening any of it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::{self, Write as _};
use std::fs::{self, Metadata};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clamcast_daemon::input;
use clamcast_proto::DatabaseName;
use clamcast_proto::names::{DATABASE_NAME_BYTES_MAX, OWN_PREFIX, looks_like_a_database};

/// freshclam works in `tmp.<hex>/` and removes it at the end of its run.
const RUN_PREFIX: &str = "tmp.";

/// Most entries of a mirror directory. One with more is not published.
pub const ENTRIES_MAX: usize = 100_000;

/// Entries of freshclam's working directory that are looked at for changes. A run that unpacks a
/// database has one for each member.
const RUN_ENTRIES_MAX: usize = 10_000;

/// How deep freshclam's working directory is looked into: it unpacks in a directory within.
const RUN_DEPTH_MAX: usize = 3;

/// The longest step of a file system's clock that counts nanoseconds: a tick of Linux is at most 10 ms,
/// and a busy machine may miss five ticks before another processor takes over (`MAX_STALLED_JIFFIES`).
const STEP_MAX: Duration = Duration::from_millis(60);

/// The longest step of a file system's clock that counts whole seconds: FAT counts by two, and ext4
/// with inodes of 128 bytes by one.
const STEP_OF_SECONDS_MAX: Duration = Duration::from_millis(2060);

/// One look at the mirror.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Listing {
    /// The directory itself; where `path` is a symlink, what it points to.
    pub directory: PathBuf,
    /// Which directory that is: another one may have its name later.
    pub identity: Identity,
    /// When the directory last changed, as of the start of the listing, in seconds and nanoseconds.
    pub changed: (i64, i64),
    /// Whether no entry came or went during the listing. Otherwise even a database that was there all
    /// the time can be missing, because it was renamed.
    pub is_whole: bool,
    /// Everything that has the name of a database.
    pub files: BTreeMap<DatabaseName, Stamp>,
    /// Names that clamd would load and that no database may have, sorted.
    pub skipped: Vec<Skipped>,
    /// freshclam's runs that are open or were killed.
    pub runs: Vec<Run>,
    /// The time before the directory was listed.
    pub taken: SystemTime,
}

/// An entry that clamd would load and that is not published.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Skipped {
    /// Its name, with control characters and bytes that are not UTF-8 escaped.
    pub name: String,
    /// Why it is not published.
    pub reason: SkipReason,
}

/// Why the name of an entry is no name of a database.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum SkipReason {
    /// It begins with a dot.
    Hidden,
    /// It has clamcast's own prefix.
    Own,
    /// It has a control character.
    Control,
    /// It is not UTF-8.
    NotUtf8,
    /// It is longer than [`DATABASE_NAME_BYTES_MAX`].
    TooLong,
    /// It has an invisible character, or white space at an end.
    Character,
}

impl Skipped {
    /// The entry `name`, if clamd would load it.
    fn of(name: &OsStr) -> Option<Self> {
        let lossy = name.to_string_lossy();
        if !looks_like_a_database(&lossy) {
            return None;
        }
        let lower = lossy.to_ascii_lowercase();
        let reason = if name.to_str().is_none() {
            SkipReason::NotUtf8
        } else if lossy.chars().any(char::is_control) {
            SkipReason::Control
        } else if lossy.starts_with('.') {
            SkipReason::Hidden
        } else if lower.starts_with(OWN_PREFIX) {
            SkipReason::Own
        } else if lossy.len() > DATABASE_NAME_BYTES_MAX {
            SkipReason::TooLong
        } else {
            SkipReason::Character
        };
        Some(Self {
            name: escaped(name),
            reason,
        })
    }
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.reason)
    }
}

impl fmt::Display for SkipReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Hidden => "hidden",
            Self::Own => "the name of a file of clamcast",
            Self::Control => "control characters in the name",
            Self::NotUtf8 => "the name is not UTF-8",
            Self::TooLong => "the name is too long",
            Self::Character => "an invisible character in the name, or white space at an end",
        })
    }
}

/// A name that is safe to print: control characters, backslashes and bytes that are not UTF-8 as escapes.
fn escaped(name: &OsStr) -> String {
    let mut text = String::new();
    for chunk in name.as_bytes().utf8_chunks() {
        for c in chunk.valid().chars() {
            match c.is_control() || c == '\\' {
                true => text.extend(c.escape_default()),
                false => text.push(c),
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}"); // a string takes everything
        }
    }
    text
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
    /// A directory. clamd fails on one that has the name of a database.
    Directory,
    /// A pipe, a socket or a device.
    Special,
}

/// A run of freshclam, by its working directory.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Run {
    /// `tmp.` and ten hexadecimal digits.
    pub name: String,
    /// Differs after every change inside.
    pub trace: u64,
    /// Since the newest change inside, by the file system's clock; zero if that is in the future.
    pub age: Duration,
}

impl Listing {
    /// Lists the directory. `now` only says how old runs and files are, which counts at the first look.
    pub fn of(path: &Path, now: SystemTime) -> io::Result<Self> {
        let directory = fs::canonicalize(path)?;
        let metadata = fs::metadata(&directory)?;
        let mut listing = Self {
            directory: directory.clone(),
            identity: Identity {
                device: metadata.dev(),
                inode: metadata.ino(),
            },
            changed: changed(&metadata),
            is_whole: true,
            files: BTreeMap::new(),
            skipped: Vec::new(),
            runs: Vec::new(),
            taken: now,
        };
        for entry in input::names(&directory, ENTRIES_MAX)? {
            let path = directory.join(&entry);
            let metadata = match fs::symlink_metadata(&path) {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue, // gone since
                Err(error) => return Err(error),
            };
            let name = entry.to_str();
            let database = name.and_then(|name| name.parse::<DatabaseName>().ok());
            if let Some(name) = database
                && name.has_known_extension()
            {
                listing.files.insert(name, Stamp::of(&metadata));
            } else if let Some(skipped) = Skipped::of(&entry) {
                listing.skipped.push(skipped);
            } else if let Some(name) = name
                && name.starts_with(RUN_PREFIX)
                && metadata.is_dir()
            {
                let (trace, newest) = trace(&path, &metadata);
                let age = now.duration_since(newest).unwrap_or_default();
                let name = name.to_owned();
                listing.runs.push(Run { name, trace, age });
            }
        }
        let after = fs::metadata(&directory); // an error: it was a snapshot, and is gone
        listing.is_whole = after.is_ok_and(|it| changed(&it) == listing.changed);
        listing.skipped.sort();
        listing.runs.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(listing)
    }

    /// How long to wait until every further change gets a later time stamp than the newest listed one;
    /// `None` if every change gets one already. `now` is the time before the directory was listed.
    ///
    /// The clock of a file system moves in steps. A file that changes twice within one step has one
    /// time stamp and two contents; git calls such a file racy.
    pub fn settles_in(&self, now: SystemTime) -> Option<Duration> {
        let changes = self.files.values().map(|stamp| stamp.changed);
        let steps = changes.chain([self.changed]);
        steps.filter_map(|changed| settles_in(changed, now)).max()
    }
}

/// The same for one change.
fn settles_in(changed: (i64, i64), now: SystemTime) -> Option<Duration> {
    let step = match changed.1 {
        0 => STEP_OF_SECONDS_MAX,
        _ => STEP_MAX,
    };
    is_recent(changed, step, now).then_some(step)
}

impl Stamp {
    /// The stamp of a file whose attributes were read.
    pub fn of(metadata: &Metadata) -> Self {
        let kind = if metadata.is_file() {
            Kind::File
        } else if metadata.is_symlink() {
            Kind::Symlink
        } else if metadata.is_dir() {
            Kind::Directory
        } else {
            Kind::Special
        };
        Self {
            kind,
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: changed(metadata),
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

    /// How long to wait until a further change gets a later time stamp; see [`Listing::settles_in`].
    pub fn settles_in(&self, now: SystemTime) -> Option<Duration> {
        settles_in(self.changed, now)
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Time since the last change at `now`; zero if that is in the future.
    pub(super) fn age(&self, now: SystemTime) -> Duration {
        now.duration_since(time(self.changed)).unwrap_or_default()
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// The time of the last change of content or attributes, in seconds and nanoseconds. Only the kernel
/// sets it; any program can set a modification time, also to the future.
fn changed(metadata: &Metadata) -> (i64, i64) {
    (metadata.ctime(), metadata.ctime_nsec())
}

/// A time stamp as a point in time.
fn time((seconds, nanoseconds): (i64, i64)) -> SystemTime {
    let seconds = Duration::from_secs(seconds.try_into().unwrap_or(0));
    SystemTime::UNIX_EPOCH + seconds + Duration::from_nanos(nanoseconds.try_into().unwrap_or(0))
}

/// Whether a change is at most `step` ago, or in the future.
fn is_recent(changed: (i64, i64), step: Duration, now: SystemTime) -> bool {
    let elapsed = now.duration_since(time(changed)); // an error: it is in the future
    elapsed.map_or(true, |elapsed| elapsed <= step)
}

/// What a run's working directory looks like, and the newest status change in it. A directory that
/// cannot be read counts alone: freshclam keeps it to itself where it runs as another user.
fn trace(run: &Path, metadata: &Metadata) -> (u64, SystemTime) {
    let mut newest = time(changed(metadata));
    let mut hasher = DefaultHasher::new();
    let mut looked_at = 0;
    let mut todo = vec![(run.to_owned(), 1)];
    let mut entries = BTreeMap::new();
    while let Some((directory, depth)) = todo.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            looked_at += 1;
            if looked_at > RUN_ENTRIES_MAX {
                todo.clear();
                break;
            }
            let Ok(metadata) = entry.metadata() else {
                continue; // gone since
            };
            newest = newest.max(time(changed(&metadata)));
            if metadata.is_dir() && depth < RUN_DEPTH_MAX {
                todo.push((entry.path(), depth + 1));
            }
            let stamp = (metadata.ino(), metadata.size(), changed(&metadata));
            entries.insert(entry.path(), stamp);
        }
    }
    (metadata.ino(), changed(metadata), entries).hash(&mut hasher);
    (hasher.finish(), newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_databases_are_listed_and_what_else_clamd_would_load_is_skipped_with_the_reason()
     {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            &b"daily.cld"[..],
            b"local.ndb",
            b"daily-7.cvd.sign",
            b"freshclam.dat",
            b"daily.cld.tmp",
            b"x.txt",
            b".hidden.ndb",
            b"clamcast-canary.hsb",
            b"a\nb\\.ndb",
            b"gr\xf6sse.ndb",
        ] {
            fs::write(dir.path().join(OsStr::from_bytes(name)), "").unwrap();
        }
        for name in ["sub.ndb", ".sub.ndb", "sub", "tmp.db"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let listing = Listing::of(dir.path(), SystemTime::now()).unwrap();
        let files = listing.files.iter().map(|it| (it.0.as_str(), it.1.kind()));
        assert_eq!(
            files.collect::<Vec<_>>(),
            [
                ("daily-7.cvd.sign", Kind::File),
                ("daily.cld", Kind::File),
                ("local.ndb", Kind::File),
                ("sub.ndb", Kind::Directory),
                ("tmp.db", Kind::Directory),
            ]
        );
        let skipped: Vec<_> = listing.skipped.iter().map(ToString::to_string).collect();
        assert_eq!(
            skipped,
            [
                ".hidden.ndb (hidden)",
                ".sub.ndb (hidden)",
                r"a\nb\\.ndb (control characters in the name)",
                "clamcast-canary.hsb (the name of a file of clamcast)",
                r"gr\xf6sse.ndb (the name is not UTF-8)",
            ]
        );
        assert_eq!(listing.runs, []);
    }

    #[test]
    fn a_change_deep_inside_a_run_changes_its_trace_and_the_future_is_no_age() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("tmp.0123456789/clamav-x.tmp");
        fs::create_dir_all(&deep).unwrap();
        let run = |now| {
            let mut runs = Listing::of(dir.path(), now).unwrap().runs;
            runs.pop().unwrap()
        };
        let now = SystemTime::now();
        let first = run(now);
        assert_eq!(first, run(now));
        assert!(run(now + Duration::from_secs(600)).age > Duration::from_secs(590));
        assert_eq!(run(now - Duration::from_secs(600)).age, Duration::ZERO);
        let file = fs::File::create(deep.join("part")).unwrap();
        let second = run(now);
        assert_ne!(first.trace, second.trace);
        file.set_modified(now + Duration::from_secs(86_400))
            .unwrap();
        assert_ne!(second.trace, run(now).trace);
        assert!(run(now + Duration::from_secs(600)).age > Duration::from_secs(590));
    }

    #[test]
    fn a_mirror_that_changed_within_the_last_step_of_a_clock_has_not_settled() {
        let dir = tempfile::tempdir().unwrap();
        let mut listing = Listing::of(dir.path(), SystemTime::now()).unwrap();
        let name: DatabaseName = "daily.cld".parse().unwrap();
        let (millis, seconds) = (STEP_MAX, STEP_OF_SECONDS_MAX);
        for (directory, file, now, wait) in [
            ((10, 1), (20, 1), 20_000, Some(millis)),
            ((10, 1), (20, 1), 20_060, Some(millis)),
            ((10, 1), (20, 1), 20_061, None),
            ((20, 1), (10, 1), 20_060, Some(millis)),
            ((10, 1), (20, 0), 22_060, Some(seconds)),
            ((10, 1), (20, 0), 22_061, None),
            // The clock was set back, or is that of another machine.
            ((10, 1), (90, 1), 20_000, Some(millis)),
        ] {
            let mut stamp = Stamp::numbered(1);
            stamp.changed = file;
            listing.files.insert(name.clone(), stamp);
            listing.changed = directory;
            let now = SystemTime::UNIX_EPOCH + Duration::from_millis(now);
            assert_eq!(listing.settles_in(now), wait, "{directory:?} {file:?}");
        }
    }
}
