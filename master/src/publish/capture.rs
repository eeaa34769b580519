//! Captures: immutable copies of the mirror's databases, unit by unit.
//!
//! The directory is listed, every file copied into the store, and the directory listed again. If a file
//! of a unit differs, some program was at work in between and the unit may be a mixture: it is copied
//! again. A unit that cannot be captured does not keep the others from it. Files are always copied and
//! hashed anew, also those that look unchanged, so no published content depends on a time stamp that a
//! program can set.
//!
//! The clock of a file system moves in steps. A file that changes twice within one step keeps its time
//! stamp, so the second change does not show. A unit is therefore copied only when the clock has passed
//! its newest change: up to 60 ms, or two seconds where a file system counts whole seconds.
//!
//! That holds for local file systems of Linux. Stores through a mapping on tmpfs stay unseen, and so do
//! changes on network and FUSE file systems whose time stamps are cached or invented.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Instant, SystemTime};

use clamcast_proto::container::{ContainerError, HEADER_BYTES, Header};
use clamcast_proto::manifest::DATABASE_BYTES_MAX;
use clamcast_proto::names::DatabaseKind;
use clamcast_proto::{DatabaseName, Digest};
use nix::fcntl::OFlag;
use nix::libc;

use crate::config::units::{UnitName, Units};
use crate::publish::mirror::activity::Activity;
use crate::publish::mirror::listing::{Identity, Kind, Listing, Skipped, Stamp};
use crate::publish::mirror::quiet::Reason;
use crate::store::{Store, StoreError};

/// How often a unit that changes is copied again before it is left alone until it is quiet.
const TRIES_MAX: u32 = 3;

/// What stands in the mirror, with the content of every whole unit in the store.
#[derive(Debug)]
pub struct Capture {
    /// The units of the mirror.
    pub units: BTreeMap<UnitName, Result<Vec<Captured>, Fault>>,
    /// Files that clamd would load and that no generation carries.
    pub skipped: Vec<Skipped>,
    /// Signature files that cannot be read. Their databases are captured without them.
    pub left_out: BTreeMap<DatabaseName, Fault>,
    /// Units that a program is at work on. One that is not among `units` has no file at the moment.
    pub waiting: BTreeMap<UnitName, Fault>,
    /// Whether every file of the mirror is among these. Otherwise names came and went all the time, and
    /// a unit that is missing here may be there.
    pub is_whole: bool,
}

/// One database of a capture.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Captured {
    /// Its name in the mirror.
    pub name: DatabaseName,
    /// Length in bytes.
    pub size: u64,
    /// Its object in the store.
    pub sha256: Digest,
}

/// Why there is no capture.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The mirror directory cannot be listed.
    #[error("cannot list the mirror {}", path.display())]
    List {
        /// As configured.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is nothing to publish.
    #[error("the mirror {} has no databases", path.display())]
    Empty {
        /// As configured.
        path: PathBuf,
    },
    /// Ours, not the mirror's.
    #[error("cannot keep a capture")]
    Store(#[from] StoreError),
}

/// Decides whether a capture leaves a unit alone for this reason.
pub type WaitsFor<'a> = dyn Fn(&UnitName, &Reason) -> bool + 'a;

/// Where captures come from.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// The mirror.
    pub path: &'a Path,
    /// Which files belong together.
    pub units: &'a Units,
    /// What goes on in the mirror.
    pub activity: &'a Activity,
    /// Whether a unit that a program is at work on is left alone.
    pub waits_for: &'a WaitsFor<'a>,
}

/// Why a unit cannot be captured.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// Some program is not done with it.
    #[error("{0}")]
    Waiting(String),
    /// It changes faster than it can be copied.
    #[error("it kept changing while it was copied")]
    Changing,
    /// A name of a database on something else than a file.
    #[error("{name} is {what}, expected a regular file")]
    NotAFile {
        /// Its name.
        name: DatabaseName,
        /// What it is.
        what: &'static str,
    },
    /// Larger than clamd loads.
    #[error("{name} has {size} bytes, clamd loads at most {DATABASE_BYTES_MAX}")]
    TooLarge {
        /// Its name.
        name: DatabaseName,
        /// Its length.
        size: u64,
    },
    /// A file cannot be read.
    #[error("cannot read {name} in the mirror")]
    Read {
        /// Its name.
        name: DatabaseName,
        /// Why.
        source: io::Error,
    },
    /// Both forms of a database are there, and one of them is not a database.
    #[error("{name} stands beside its other form, and which one counts cannot be told")]
    Header {
        /// Its name.
        name: DatabaseName,
        /// What is wrong.
        source: ContainerError,
    },
}

/// The files of one unit as a listing has them.
type Entries = BTreeMap<DatabaseName, Stamp>;

/// What was captured so far.
#[derive(Default)]
struct Progress {
    /// The directory that it stands in.
    directory: Option<Identity>,
    units: BTreeMap<UnitName, Result<Vec<Captured>, Fault>>,
    left_out: BTreeMap<DatabaseName, Fault>,
    /// See [`Capture::waiting`], as of the last listing.
    waiting: BTreeMap<UnitName, Fault>,
}

/// Captures the mirror into the store.
pub fn capture(source: &Source<'_>, store: &Store) -> Result<Capture, CaptureError> {
    capture_interrupted(source, store, || {})
}

/// The same; `copied` runs after each copy, so that a test can be the program that gets in between.
fn capture_interrupted(
    source: &Source<'_>,
    store: &Store,
    mut copied: impl FnMut(),
) -> Result<Capture, CaptureError> {
    let mut progress = Progress::default();
    let mut left = TRIES_MAX;
    loop {
        left -= 1;
        let looked = look(source, store, &mut progress, &mut copied);
        let (mut missing, listing) = match looked {
            // A symlink was swapped, and the directory that it led to was removed.
            Err(CaptureError::List { source, .. })
                if source.kind() == io::ErrorKind::NotFound && left > 0 =>
            {
                continue;
            }
            looked => looked?,
        };
        if left > 0 && !(missing.is_empty() && listing.is_whole) {
            continue;
        }
        let seen = units_in(&listing, source.units);
        let mut captured = progress.units;
        captured.retain(|unit, _| seen.contains_key(unit) || missing.contains(unit));
        missing.retain(|unit| !captured.contains_key(unit));
        captured.extend(missing.into_iter().map(|unit| (unit, Err(Fault::Changing))));
        return Ok(Capture {
            units: captured,
            skipped: listing.skipped,
            left_out: progress.left_out,
            waiting: progress.waiting,
            is_whole: listing.is_whole,
        });
    }
}

/// Lists the mirror, copies the units that were not captured yet, and lists it again. Returns the units
/// that have changed meanwhile, with the second listing.
fn look(
    source: &Source<'_>,
    store: &Store,
    progress: &mut Progress,
    copied: &mut impl FnMut(),
) -> Result<(BTreeSet<UnitName>, Listing), CaptureError> {
    let (before, now) = list_settled(source.path)?;
    if progress.directory.replace(before.identity) != Some(before.identity) {
        progress.units.clear(); // another snapshot: a capture is of one
    }
    let captured = &mut progress.units;
    let mut copies = BTreeMap::new();
    let listed = units_in(&before, source.units);
    let waiting = waiting(source, &before);
    for (unit, entries) in &listed {
        if captured.contains_key(unit) {
            continue;
        }
        if let Some(reason) = waiting.get(unit) {
            captured.insert(unit.clone(), Err(Fault::Waiting(reason.clone())));
            continue;
        }
        // A change within the same step of the clock would not show.
        let is_settled = entries
            .values()
            .all(|stamp| stamp.settles_in(now).is_none());
        let left_out = &mut progress.left_out;
        if is_settled
            && let Some(copy) = copy_unit(&before.directory, entries, store, left_out, copied)?
        {
            copies.insert(unit.clone(), copy);
        }
    }
    let after = list(source.path, SystemTime::now())?;
    let again = units_in(&after, source.units);
    // A program may have begun since, and need not have changed anything yet.
    let waiting = self::waiting(source, &after);
    for (unit, copy) in copies {
        let is_same = before.identity == after.identity && listed.get(&unit) == again.get(&unit);
        if let Some(reason) = waiting.get(&unit) {
            captured.insert(unit, Err(Fault::Waiting(reason.clone())));
        } else if is_same {
            captured.insert(unit, copy);
        }
    }
    let there = listed.into_keys().chain(again.into_keys());
    let missing = there.filter(|unit| !captured.contains_key(unit));
    let missing = missing.collect();
    let waiting = waiting.into_iter();
    let waiting = waiting.map(|(unit, reason)| (unit, Fault::Waiting(reason)));
    progress.waiting = waiting.collect();
    Ok((missing, after))
}

/// The units that are left alone as of a listing, with the reason.
fn waiting(source: &Source<'_>, listing: &Listing) -> BTreeMap<UnitName, String> {
    source.activity.look(listing, Instant::now());
    let unsettled = source.activity.unsettled(Instant::now()).into_iter();
    let waiting = unsettled.filter(|(unit, it)| (source.waits_for)(unit, &it.reason));
    waiting.map(|(unit, it)| (unit, it.to_string())).collect()
}

fn units_in(listing: &Listing, units: &Units) -> BTreeMap<UnitName, Entries> {
    let files = listing.files.iter();
    units.group(files.map(|(name, stamp)| (name.clone(), *stamp)), |it| {
        &it.0
    })
}

/// Lists the mirror when the clock of its file system has passed the changes that were there first.
/// Returns also the time before the listing.
fn list_settled(path: &Path) -> Result<(Listing, SystemTime), CaptureError> {
    let now = SystemTime::now();
    let listing = list(path, now)?;
    let Some(wait) = listing.settles_in(now) else {
        return Ok((listing, now));
    };
    // After this the clock of the file system shows another time, whatever it shows now.
    thread::sleep(wait);
    let now = SystemTime::now();
    Ok((list(path, now)?, now))
}

fn list(path: &Path, now: SystemTime) -> Result<Listing, CaptureError> {
    let listing = Listing::of(path, now).map_err(|source| CaptureError::List {
        path: path.to_owned(),
        source,
    })?;
    if listing.files.is_empty() {
        let path = path.to_owned();
        return Err(CaptureError::Empty { path });
    }
    Ok(listing)
}

/// Copies one unit; `None` if it has changed since the listing.
fn copy_unit(
    directory: &Path,
    entries: &Entries,
    store: &Store,
    left_out: &mut BTreeMap<DatabaseName, Fault>,
    copied: &mut impl FnMut(),
) -> Result<Option<Result<Vec<Captured>, Fault>>, StoreError> {
    // The files stay open to the end, so that no replacement gets the inode number of one of them.
    let opened = match open_unit(directory, entries, left_out) {
        Ok(Some(opened)) => opened,
        Ok(None) => return Ok(None),
        Err(fault) => return Ok(Some(Err(fault))),
    };
    let mut files = Vec::new();
    for (name, file) in &opened {
        // A program that writes in place may have been at work since.
        let is_listed = || is_listed(entries, name, file);
        if !is_listed() {
            return Ok(None);
        }
        let (sha256, size) = match store.import(file) {
            Err(StoreError::TooLarge { .. }) => return Ok(None), // it grew: the next listing shows it
            imported => imported?,
        };
        copied();
        if !is_listed() {
            return Ok(None);
        }
        let name = name.clone();
        files.push(Captured { name, size, sha256 });
    }
    let still = |(name, stamp): (&DatabaseName, &Stamp)| {
        let metadata = fs::symlink_metadata(directory.join(name.as_str()));
        metadata.is_ok_and(|it| Stamp::of(&it) == *stamp)
    };
    Ok(entries.iter().all(still).then_some(Ok(files)))
}

fn is_listed(entries: &Entries, name: &DatabaseName, file: &File) -> bool {
    let metadata = file.metadata();
    metadata.is_ok_and(|it| Stamp::of(&it) == entries[name])
}

/// Opens the files of a unit, without the lower form of a database that has both forms and without the
/// signatures of other versions; `None` if one has changed since the listing.
///
/// Also writes the files to disk. A program that writes through a mapping changes the time stamp with
/// its first store to a page, and again only after that page went to disk. On tmpfs such stores never
/// change the time stamp.
fn open_unit(
    directory: &Path,
    entries: &Entries,
    left_out: &mut BTreeMap<DatabaseName, Fault>,
) -> Result<Option<BTreeMap<DatabaseName, File>>, Fault> {
    let mut opened = BTreeMap::new();
    let is_signature = |name: &DatabaseName| name.kind() == DatabaseKind::Sign;
    for (name, stamp) in entries.iter().filter(|(name, _)| !is_signature(name)) {
        let Some(file) = open_listed(directory, name, stamp)? else {
            return Ok(None);
        };
        opened.insert(name.clone(), file);
    }
    if let Err(error) = drop_lower_forms(&mut opened) {
        // A program that writes in place may have emptied the file since.
        let mut files = opened.iter();
        return match files.all(|(name, file)| is_listed(entries, name, file)) {
            true => Err(error),
            false => Ok(None),
        };
    }
    for (name, stamp) in entries.iter().filter(|(name, _)| is_signature(name)) {
        if !is_of_a_captured_version(name, &opened) {
            continue;
        }
        match open_listed(directory, name, stamp) {
            Ok(Some(file)) => _ = opened.insert(name.clone(), file),
            Ok(None) => return Ok(None),
            Err(fault) => _ = left_out.insert(name.clone(), fault),
        }
    }
    for (name, file) in &opened {
        flush(file).map_err(|source| Fault::Read {
            name: name.clone(),
            source,
        })?;
    }
    Ok(Some(opened))
}

/// Writes dirty pages to disk. Where nobody can write there are none.
fn flush(file: &File) -> io::Result<()> {
    match file
        .sync_data()
        .map_err(|error| (error.raw_os_error(), error))
    {
        Ok(()) | Err((Some(libc::EROFS | libc::EINVAL), _)) => Ok(()),
        Err((_, error)) => Err(error),
    }
}

/// Opens one file; `None` if it is gone since the listing.
fn open_listed(
    directory: &Path,
    name: &DatabaseName,
    stamp: &Stamp,
) -> Result<Option<File>, Fault> {
    let name = || name.clone();
    let what = match stamp.kind() {
        Kind::File => None,
        Kind::Directory => Some("a directory"),
        Kind::Symlink => Some("a symbolic link"),
        Kind::Special => Some("a pipe, socket or device"),
    };
    if let Some(what) = what {
        return Err(Fault::NotAFile { name: name(), what });
    }
    let size = stamp.size();
    if size > DATABASE_BYTES_MAX {
        return Err(Fault::TooLarge { name: name(), size });
    }
    match open(directory, &name()) {
        Ok(file) => Ok(Some(file)),
        // Gone, or a link by now: the next listing shows which.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => Ok(None),
        Err(source) => Err(Fault::Read {
            name: name(),
            source,
        }),
    }
}

/// Whether a `.cvd.sign` belongs to a captured `.cvd` of its version. ClamAV 1.5 looks for no other
/// one, and cvdupdate keeps those of all earlier versions.
fn is_of_a_captured_version(
    signature: &DatabaseName,
    files: &BTreeMap<DatabaseName, File>,
) -> bool {
    let of = signature.signs().and_then(|(base, version)| {
        let cvd: DatabaseName = format!("{base}.cvd").parse().ok()?;
        let header = header(&cvd, files.get(&cvd)?).ok()?; // the check reports a bad one
        Some(header.version.to_string() == version)
    });
    of == Some(true)
}

/// Opens a file of the mirror, and neither follows a link nor waits for the writer of a pipe.
fn open(directory: &Path, name: &DatabaseName) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
        .open(directory.join(name.as_str()))
}

/// Of `x.cvd` and `x.cld` the one with the higher version counts, on a tie `x.cld`, as clamd has
/// it. Both are there while freshclam is between a rename and an unlink, or was killed there.
fn drop_lower_forms(files: &mut BTreeMap<DatabaseName, File>) -> Result<(), Fault> {
    let names: Vec<_> = files.keys().cloned().collect();
    for cld in names.iter().filter(|name| name.kind() == DatabaseKind::Cld) {
        let other = cld.other_form().map(|cvd| cvd.folded());
        let Some(cvd) = names.iter().find(|it| Some(it.folded()) == other) else {
            continue;
        };
        let version = |name: &DatabaseName| header(name, &files[name]).map(|head| head.version);
        let lower = if version(cvd)? > version(cld)? {
            cld
        } else {
            cvd
        };
        files.remove(lower);
    }
    Ok(())
}

fn header(name: &DatabaseName, file: &File) -> Result<Header, Fault> {
    let mut bytes = [0; HEADER_BYTES];
    let read = file.read_at(&mut bytes, 0);
    let length = read.map_err(|source| Fault::Read {
        name: name.clone(),
        source,
    })?;
    Header::read(&bytes[..length]).map_err(|source| Fault::Header {
        name: name.clone(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publish::publisher::tests::container;
    use crate::store::tests::open_store;

    /// Captures a directory in which `change` is made after each copy, with the directory and how
    /// many copies there were.
    fn capture_while(
        files: &[(&str, Vec<u8>)],
        mut change: impl FnMut(&Path, usize),
    ) -> Result<Vec<(String, Digest)>, Fault> {
        let root = tempfile::tempdir().unwrap();
        let mirror = root.path().join("mirror");
        fs::create_dir(&mirror).unwrap();
        for (name, content) in files {
            fs::write(mirror.join(name), content).unwrap();
        }
        let store = open_store(&root.path().join("state"));
        let mut copies = 0;
        let source = Source {
            path: &mirror,
            units: &Units::default(),
            activity: &Activity::default(),
            waits_for: &|_, _| false,
        };
        let capture = capture_interrupted(&source, &store, || {
            copies += 1;
            change(&mirror, copies);
        });
        let units = capture.unwrap().units;
        let files: Result<Vec<_>, _> = units.into_values().collect();
        let files: Vec<_> = files?.into_iter().flatten().collect();
        for file in &files {
            let object = fs::read(store.object(&file.sha256)).unwrap();
            assert_eq!(
                (object.len() as u64, Digest::of(&object)),
                (file.size, file.sha256)
            );
        }
        let files = files.into_iter();
        Ok(files.map(|it| (it.name.to_string(), it.sha256)).collect())
    }

    fn names(files: &[(&str, Vec<u8>)]) -> Vec<String> {
        let captured = capture_while(files, |_, _| {}).unwrap();
        captured.into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn of_both_forms_the_higher_version_counts_and_on_a_tie_the_cld() {
        let form = |version| container("daily", version, 3);
        let other = ("main.cvd", container("main", 1, 1));
        for (cvd, cld, expected) in [
            (7, 6, "daily.cvd"),
            (6, 7, "daily.cld"),
            (7, 7, "daily.cld"),
        ] {
            let files = [
                ("daily.cvd", form(cvd)),
                ("daily.cld", form(cld)),
                other.clone(),
            ];
            assert_eq!(names(&files), [expected, "main.cvd"]);
        }
        let broken = [("daily.cvd", b"short".to_vec()), ("daily.cld", form(7))];
        let error = capture_while(&broken, |_, _| {}).unwrap_err();
        assert!(
            error.to_string().starts_with("daily.cvd stands beside"),
            "{error}"
        );
    }

    #[test]
    fn a_file_that_changes_during_a_capture_is_captured_again() {
        let files = [("a.ndb", b"1".to_vec()), ("b.ndb", b"1".to_vec())];
        // The first file changes after it was copied, and the second one while it is.
        for (name, at) in [("a.ndb", 2), ("b.ndb", 2), ("b.ndb", 1)] {
            let captured = capture_while(&files, |mirror, copies| {
                if copies == at {
                    fs::write(mirror.join(name), "22").unwrap();
                }
            });
            let mut expected = [Digest::of(b"1"), Digest::of(b"1")];
            expected[usize::from(name == "b.ndb")] = Digest::of(b"22");
            let digests: Vec<_> = captured.unwrap().into_iter().map(|it| it.1).collect();
            assert_eq!(digests, expected, "{name} after copy {at}");
        }
    }

    #[test]
    fn a_rename_and_an_unlink_during_a_capture_are_noticed() {
        let files = [
            ("daily.cvd", container("daily", 1, 1)),
            ("z.ndb", b"1".to_vec()),
        ];
        let captured = capture_while(&files, |mirror, copies| {
            if copies == 2 {
                fs::write(mirror.join("part"), container("daily", 2, 1)).unwrap();
                fs::rename(mirror.join("part"), mirror.join("daily.cld")).unwrap();
                fs::remove_file(mirror.join("daily.cvd")).unwrap();
            }
        });
        let captured = captured.unwrap();
        let names: Vec<_> = captured.into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["daily.cld", "z.ndb"]);
    }

    #[test]
    fn of_the_signature_files_only_that_of_the_captured_version_counts() {
        let sign = |name: &'static str| (name, b"PKCS7".to_vec());
        let files = [
            ("daily.cvd", container("daily", 7, 1)),
            ("main.cld", container("main", 60, 1)),
            sign("daily-6.cvd.sign"),
            sign("daily-7.cvd.sign"),
            sign("main-60.cvd.sign"),
            sign("other-1.cvd.sign"),
            sign("daily.cvd.sign"),
        ];
        let expected = ["daily-7.cvd.sign", "daily.cvd", "main.cld"];
        assert_eq!(names(&files), expected);
    }

    #[test]
    fn a_form_that_was_emptied_since_it_was_listed_is_a_change_and_no_error() {
        let dir = tempfile::tempdir().unwrap();
        for (name, version) in [("daily.cvd", 2), ("daily.cld", 1)] {
            fs::write(dir.path().join(name), container("daily", version, 1)).unwrap();
        }
        let list = || list_settled(dir.path()).unwrap().0.files;
        let entries = list();
        assert!(
            open_unit(dir.path(), &entries, &mut BTreeMap::new())
                .unwrap()
                .is_some()
        );
        fs::write(dir.path().join("daily.cvd"), "").unwrap();
        assert!(
            open_unit(dir.path(), &entries, &mut BTreeMap::new())
                .unwrap()
                .is_none()
        );
        let error = open_unit(dir.path(), &list(), &mut BTreeMap::new()).unwrap_err();
        assert!(matches!(error, Fault::Header { .. }), "{error}");
    }

    #[test]
    fn a_file_that_looks_the_same_afterwards_is_captured_again() {
        let files = [("a.ndb", b"1".to_vec()), ("b.ndb", b"1".to_vec())];
        // In place with its time set back, through another name, and as another file in its place,
        // which would get the same inode number if it were not open.
        let time = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
        let changes: [fn(&Path, SystemTime); 3] = [
            |path, modified| {
                fs::write(path, "2").unwrap();
                let file = File::options().write(true).open(path).unwrap();
                file.set_modified(modified).unwrap();
            },
            |path, _| {
                let link = path.with_extension("link");
                fs::hard_link(path, &link).unwrap();
                fs::write(&link, "2").unwrap();
                fs::remove_file(link).unwrap();
            },
            |path, modified| {
                fs::remove_file(path).unwrap();
                fs::write(path, "2").unwrap();
                let file = File::options().write(true).open(path).unwrap();
                file.set_modified(modified).unwrap();
            },
        ];
        for change in changes {
            let captured = capture_while(&files, |mirror, copies| {
                if copies == 2 {
                    let path = mirror.join("a.ndb");
                    change(&path, time(&path));
                }
            });
            let digests: Vec<_> = captured.unwrap().into_iter().map(|it| it.1).collect();
            assert_eq!(digests, [Digest::of(b"2"), Digest::of(b"1")]);
        }
    }

    #[test]
    fn a_mirror_that_never_rests_is_left_alone() {
        let files = [("a.ndb", b"1".to_vec())];
        let captured = capture_while(&files, |mirror, copies| {
            fs::write(mirror.join("a.ndb"), vec![b'x'; copies + 1]).unwrap();
        });
        assert!(matches!(captured, Err(Fault::Changing)));
    }
}
