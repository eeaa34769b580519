//! Captures: immutable copies of the mirror's databases, taken when the set is whole.
//!
//! The directory is listed, every file copied into the store, and the directory listed again. If
//! anything differs, some program was at work in between and the set may be a mixture: start over.
//! Files are always copied and hashed anew, also those that look unchanged. That costs a fifth of
//! a second for 200 MB, a few times a day, and no published content depends on a time stamp that a
//! program can set.
//!
//! The clock of a file system moves in steps. A file that changes twice within one step keeps its time
//! stamp, so the second change does not show. A capture therefore waits until the clock has passed the
//! newest change of the mirror: up to 60 ms, or two seconds where a file system counts whole seconds.
//!
//! That holds for local file systems of Linux. Stores through a mapping on tmpfs stay unseen, and so do
//! changes on network and FUSE file systems whose time stamps are cached or invented.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Instant, SystemTime};

use clamcast_proto::container::{ContainerError, HEADER_BYTES, Header};
use clamcast_proto::manifest::{DATABASE_BYTES_MAX, content_digest};
use clamcast_proto::names::DatabaseKind;
use clamcast_proto::{DatabaseName, Digest};
use nix::fcntl::OFlag;
use nix::libc;

use crate::publish::mirror::activity::Activity;
use crate::publish::mirror::listing::{Kind, Listing, Stamp};
use crate::store::{Store, StoreError};

/// Databases in one capture. Their manifest entries fit into a manifest, and no mirror has a tenth
/// of it.
pub const FILES_MAX: usize = 2000;

/// How often a capture starts over before it leaves the mirror alone until it is quiet again.
const TRIES_MAX: u32 = 3;

/// A consistent set of databases, all of it in the store.
#[derive(Clone, Debug)]
pub struct Capture {
    /// The databases, sorted by name.
    pub files: Vec<Captured>,
    /// [`content_digest`] of the files.
    pub content: Digest,
    /// Names that clamd would load, and that were left out: hidden, in capitals, clamcast's own.
    pub ignored: Vec<String>,
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
    /// The mirror changes faster than it can be copied. It is worth another try when it is quiet.
    #[error("the mirror kept changing while it was copied")]
    Changing,
    /// freshclam is not done. It is worth another try when it is.
    #[error("a freshclam run is open in the mirror ({run}/ is there and changed {age_secs} s ago)")]
    RunOpen {
        /// Its working directory.
        run: String,
        /// Since its newest change.
        age_secs: u64,
    },
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
    /// More than any mirror has.
    #[error("the mirror has {found} databases, at most {FILES_MAX} are published")]
    TooMany {
        /// How many.
        found: usize,
    },
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
    /// Ours, not the mirror's.
    #[error("cannot keep a capture")]
    Store(#[from] StoreError),
}

/// Captures the mirror at `path` into the store.
pub fn capture(path: &Path, store: &Store, activity: &Activity) -> Result<Capture, CaptureError> {
    capture_interrupted(path, store, activity, || {})
}

/// The same; `copied` runs after each copy, so that a test can be the program that gets in between.
fn capture_interrupted(
    path: &Path,
    store: &Store,
    activity: &Activity,
    mut copied: impl FnMut(),
) -> Result<Capture, CaptureError> {
    for left in (0..TRIES_MAX).rev() {
        match attempt(path, store, activity, &mut copied) {
            Ok(Some(capture)) => return Ok(capture),
            Ok(None) => {}
            // A symlink was swapped, and the directory that it led to was removed.
            Err(CaptureError::List { source, .. })
                if source.kind() == io::ErrorKind::NotFound && left > 0 => {}
            Err(error) => return Err(error),
        }
    }
    Err(CaptureError::Changing)
}

/// Captures the mirror; `None` if it changed meanwhile.
fn attempt(
    path: &Path,
    store: &Store,
    activity: &Activity,
    copied: &mut impl FnMut(),
) -> Result<Option<Capture>, CaptureError> {
    let Some(before) = list_settled(path, activity)? else {
        return Ok(None);
    };
    // The files stay open to the end, so that no replacement gets the inode number of one of them.
    let Some(opened) = open_all(&before)? else {
        return Ok(None);
    };
    let Some(files) = copy(&before, &opened, store, copied)? else {
        return Ok(None);
    };
    let Some(after) = list(path, activity, SystemTime::now())? else {
        return Ok(None);
    };
    if (after.identity, &after.files) != (before.identity, &before.files) {
        return Ok(None);
    }
    let content = content_digest(files.iter().map(|f| (&f.name, f.size, &f.sha256)));
    let ignored = after.ignored;
    Ok(Some(Capture {
        files,
        content,
        ignored,
    }))
}

/// Lists the mirror at a time when every further change will show; `None` if the mirror changes
/// meanwhile. All entries of the listing existed at one moment.
fn list_settled(path: &Path, activity: &Activity) -> Result<Option<Listing>, CaptureError> {
    let now = SystemTime::now();
    let Some(listing) = list(path, activity, now)? else {
        return Ok(None);
    };
    let Some(wait) = listing.settles_in(now) else {
        return Ok(Some(listing));
    };
    // After this the clock of the file system shows another time, whatever it shows now.
    thread::sleep(wait);
    let again = list(path, activity, SystemTime::now())?;
    let stamps = |it: &Listing| (it.identity, it.changed, it.files.clone());
    Ok(again.filter(|again| stamps(again) == stamps(&listing)))
}

/// Lists the mirror and refuses a listing that no capture can be made of; `None` if entries came or
/// went while they were read.
fn list(
    path: &Path,
    activity: &Activity,
    clock: SystemTime,
) -> Result<Option<Listing>, CaptureError> {
    let listing = Listing::of(path, clock).map_err(|source| CaptureError::List {
        path: path.to_owned(),
        source,
    })?;
    let now = Instant::now();
    if let Some((run, changed)) = activity.look(&listing.runs, now) {
        let age_secs = now.saturating_duration_since(changed).as_secs();
        return Err(CaptureError::RunOpen { run, age_secs });
    }
    if !listing.is_whole {
        return Ok(None);
    }
    if listing.files.is_empty() {
        let path = path.to_owned();
        return Err(CaptureError::Empty { path });
    }
    let kinds = listing.files.keys().map(DatabaseName::kind);
    let found = kinds.filter(|kind| *kind != DatabaseKind::Sign).count();
    if found > FILES_MAX {
        return Err(CaptureError::TooMany { found });
    }
    for (name, stamp) in &listing.files {
        let what = match stamp.kind() {
            Kind::File => continue,
            Kind::Symlink => "a symbolic link",
            Kind::Special => "a pipe, socket or device",
        };
        let name = name.clone();
        return Err(CaptureError::NotAFile { name, what });
    }
    Ok(Some(listing))
}

/// Opens the listed files, without the lower form of a database that has both forms and without the
/// signatures of other versions; `None` if one has changed since the listing.
///
/// Also writes the files to disk. A program that writes through a mapping changes the time stamp with
/// its first store to a page, and again only after that page went to disk. On tmpfs such stores never
/// change the time stamp.
fn open_all(listing: &Listing) -> Result<Option<BTreeMap<DatabaseName, File>>, CaptureError> {
    let mut opened = BTreeMap::new();
    let is_signature = |name: &&DatabaseName| name.kind() == DatabaseKind::Sign;
    for name in listing.files.keys().filter(|name| !is_signature(name)) {
        let Some(file) = open_listed(listing, name)? else {
            return Ok(None);
        };
        opened.insert(name.clone(), file);
    }
    if let Err(error) = drop_lower_forms(&mut opened) {
        let is_listed = |(name, file): (&DatabaseName, &File)| {
            let metadata = file.metadata().ok();
            metadata.is_some_and(|it| Stamp::of(&it) == listing.files[name])
        };
        // A program that writes in place may have emptied the file since.
        return match opened.iter().all(is_listed) {
            true => Err(error),
            false => Ok(None),
        };
    }
    for name in listing.files.keys().filter(is_signature) {
        if !is_of_a_captured_version(name, &opened) {
            continue;
        }
        let Some(file) = open_listed(listing, name)? else {
            return Ok(None);
        };
        opened.insert(name.clone(), file);
    }
    for (name, file) in &opened {
        flush(file).map_err(|source| CaptureError::Read {
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
fn open_listed(listing: &Listing, name: &DatabaseName) -> Result<Option<File>, CaptureError> {
    let size = listing.files[name].size();
    if size > DATABASE_BYTES_MAX {
        let name = name.clone();
        return Err(CaptureError::TooLarge { name, size });
    }
    match open(&listing.directory, name) {
        Ok(file) => Ok(Some(file)),
        // Gone, or a link by now: the next listing shows which.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => Ok(None),
        Err(source) => {
            let name = name.clone();
            Err(CaptureError::Read { name, source })
        }
    }
}

/// Whether a `.cvd.sign` belongs to a captured `.cvd` of its version. ClamAV 1.5 looks for no other
/// one, and cvdupdate keeps those of all earlier versions.
fn is_of_a_captured_version(
    signature: &DatabaseName,
    files: &BTreeMap<DatabaseName, File>,
) -> bool {
    let of = signature
        .base()
        .rsplit_once('-')
        .and_then(|(base, version)| {
            let cvd: DatabaseName = format!("{base}.cvd").parse().ok()?;
            let header = header(&cvd, files.get(&cvd)?).ok()?; // the check reports a bad one
            Some(header.version.to_string() == version)
        });
    of == Some(true)
}

/// Copies the opened files; `None` if one has changed since the listing.
fn copy(
    listing: &Listing,
    opened: &BTreeMap<DatabaseName, File>,
    store: &Store,
    copied: &mut impl FnMut(),
) -> Result<Option<Vec<Captured>>, CaptureError> {
    let mut files = Vec::new();
    for (name, file) in opened {
        let unchanged = || {
            let metadata = file.metadata().map_err(|source| CaptureError::Read {
                name: name.clone(),
                source,
            })?;
            Ok::<_, CaptureError>(Some(&Stamp::of(&metadata)) == listing.files.get(name))
        };
        if !unchanged()? {
            return Ok(None);
        }
        let (sha256, size) = store.import(file)?;
        copied();
        if !unchanged()? {
            return Ok(None);
        }
        let name = name.clone();
        files.push(Captured { name, size, sha256 });
    }
    Ok(Some(files))
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
fn drop_lower_forms(files: &mut BTreeMap<DatabaseName, File>) -> Result<(), CaptureError> {
    let names: Vec<_> = files.keys().cloned().collect();
    for cld in names.iter().filter(|name| name.as_str().ends_with(".cld")) {
        let Some(cvd) = cld.other_form().filter(|cvd| files.contains_key(cvd)) else {
            continue;
        };
        let version = |name: &DatabaseName| header(name, &files[name]).map(|head| head.version);
        let lower = if version(&cvd)? > version(cld)? {
            cld
        } else {
            &cvd
        };
        files.remove(lower);
    }
    Ok(())
}

fn header(name: &DatabaseName, file: &File) -> Result<Header, CaptureError> {
    let mut bytes = [0; HEADER_BYTES];
    let read = file.read_at(&mut bytes, 0);
    let length = read.map_err(|source| CaptureError::Read {
        name: name.clone(),
        source,
    })?;
    Header::read(&bytes[..length]).map_err(|source| CaptureError::Header {
        name: name.clone(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publish::publisher::tests::container;
    use crate::store::tests::open_store;
    use std::fs;

    /// Captures a directory in which `change` is made after each copy, with the directory and how
    /// many copies there were.
    fn capture_while(
        files: &[(&str, Vec<u8>)],
        mut change: impl FnMut(&Path, usize),
    ) -> Result<Vec<(String, Digest)>, CaptureError> {
        let root = tempfile::tempdir().unwrap();
        let mirror = root.path().join("mirror");
        fs::create_dir(&mirror).unwrap();
        for (name, content) in files {
            fs::write(mirror.join(name), content).unwrap();
        }
        let store = open_store(&root.path().join("state"));
        let mut copies = 0;
        let capture = capture_interrupted(&mirror, &store, &Activity::default(), || {
            copies += 1;
            change(&mirror, copies);
        })?;
        for file in &capture.files {
            let object = fs::read(store.object(&file.sha256)).unwrap();
            assert_eq!(
                (object.len() as u64, Digest::of(&object)),
                (file.size, file.sha256)
            );
        }
        let files = capture.files.into_iter();
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
        let list = || list_settled(dir.path(), &Activity::default());
        let listing = list().unwrap().unwrap();
        assert!(open_all(&listing).unwrap().is_some());
        fs::write(dir.path().join("daily.cvd"), "").unwrap();
        assert!(open_all(&listing).unwrap().is_none());
        let listing = list().unwrap().unwrap();
        let error = open_all(&listing).unwrap_err();
        assert!(matches!(error, CaptureError::Header { .. }), "{error}");
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
        assert!(matches!(captured, Err(CaptureError::Changing)));
    }

    #[test]
    fn the_limit_of_files_fits_a_manifest() {
        let entry = r#"{"name":"","size":2147483648,"sha256":"","version":99999,"signatures":9999999,"built":"2026-11-22T00:00:00Z"},"#;
        let usual_name = 40;
        let bytes = FILES_MAX * (entry.len() + usual_name + 64);
        assert!(
            bytes < clamcast_proto::manifest::MANIFEST_BYTES_MAX,
            "{bytes}"
        );
    }
}
