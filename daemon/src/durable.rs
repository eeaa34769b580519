//! Files and directories that survive a crash: a name holds the old content or the new one, never
//! a part, and what was acknowledged is on disk.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::unistd::syncfs;
use tempfile::NamedTempFile;

use crate::{input, pulse};

/// How the name of a file begins and ends that is being written beside its target.
const BESIDE: (&str, &str) = (".", ".new");

/// How many random letters and digits stand between.
const RANDOM_CHARS: usize = 6;

/// Replaces the content of `path` by `bytes`, with permissions `mode` from the first byte on, so
/// that a private key is never readable by others, not even for a moment.
///
/// Written beside the target, synced, renamed, and the directory synced: after a crash there is the
/// old file or the new one, and after `Ok` it is the new one.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let _waiting = pulse::on_disk();
    let directory = directory_of(path);
    let file = beside(directory, bytes, mode)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    sync_dir(directory)
}

/// From this many files on, one sync of the whole file system costs less than one for each. It also
/// waits for what others have written there, which is why a few files do without.
const SYNC_TOGETHER: usize = 16;

/// [`write()`] for several files of one directory, by their names in it, for little more than the
/// cost of one. A crash leaves each of them old or new, and after `Ok` all are new.
pub fn write_all(directory: &Path, files: &[(String, &[u8])], mode: u32) -> io::Result<()> {
    let _waiting = pulse::on_disk();
    // Bounded, for each is an open file until it has its name.
    for files in files.chunks(WRITTEN_TOGETHER_MAX) {
        let each = |(_, bytes): &(String, &[u8])| beside(directory, bytes, mode);
        let written: Vec<_> = files.iter().map(each).collect::<io::Result<_>>()?;
        if written.len() < SYNC_TOGETHER {
            for file in &written {
                file.as_file().sync_all()?;
            }
        } else {
            syncfs(File::open(directory)?)?;
        }
        for (file, (name, _)) in written.into_iter().zip(files) {
            let placed = file.persist(directory.join(name));
            placed.map_err(|error| error.error)?;
        }
    }
    sync_dir(directory)
}

/// Files that are written at a time: open ones, of which a process may have 1024.
const WRITTEN_TOGETHER_MAX: usize = 256;

/// A new file beside its target, with its content, not synced.
fn beside(directory: &Path, bytes: &[u8], mode: u32) -> io::Result<NamedTempFile> {
    let mut file = tempfile::Builder::new()
        .prefix(BESIDE.0)
        .suffix(BESIDE.1)
        .rand_bytes(RANDOM_CHARS)
        .permissions(Permissions::from_mode(mode))
        .tempfile_in(directory)?;
    file.write_all(bytes)?;
    // The umask may have taken bits away that the caller wants others to have.
    file.as_file()
        .set_permissions(Permissions::from_mode(mode))?;
    Ok(file)
}

/// [`write()`], unless the file has that content already: what is there needs no room on a full disk.
pub fn ensure(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let _waiting = pulse::on_disk();
    match input::whole(path, bytes.len() as u64) {
        Ok(there) if there == bytes => Ok(()),
        Ok(_) | Err(_) => write(path, bytes, mode),
    }
}

/// Entries of a directory that a sweep looks at: more than a fleet has agents. It keeps none of them,
/// so the bound only ends a sweep of a directory that grows meanwhile.
const SWEPT_MAX: usize = 1_000_000;

/// Removes what crashes left of writes ([`write()`]) in a directory. For whoever holds the [`lock`] on
/// it, before anything is written there. What cannot be removed stays: it is in nobody's way.
pub fn sweep(directory: &Path) {
    let entries = fs::read_dir(directory).into_iter().flatten();
    for entry in entries.take(SWEPT_MAX).flatten() {
        let name = entry.file_name();
        if is_beside(&name.to_string_lossy()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Whether a file of this name was being written beside its target.
fn is_beside(name: &str) -> bool {
    let random = name.strip_prefix(BESIDE.0);
    let random = random.and_then(|name| name.strip_suffix(BESIDE.1));
    random.is_some_and(|random| {
        random.len() == RANDOM_CHARS && random.chars().all(|c| c.is_ascii_alphanumeric())
    })
}

/// Makes the names in a directory durable: a rename, a link or a removal counts only after this.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    let _waiting = pulse::on_disk();
    File::open(path)?.sync_all()
}

/// Makes a directory, and its parents, with permissions `mode`. One that is there already stays as
/// it is.
pub fn create_dir(path: &Path, mode: u32) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(mode).create(path)?;
    sync_dir(directory_of(path))
}

/// Holds a lock file until it is dropped. The kernel gives it up when the process dies, so a crash
/// never leaves one behind.
#[derive(Debug)]
pub struct LockGuard {
    _file: File,
}

/// Why a lock was not got.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else has it.
    #[error("{path} is locked by another process{holder}; stop that one first")]
    Held {
        /// The lock file.
        path: PathBuf,
        /// ` (pid N)`, if it said so.
        holder: String,
    },
    /// The lock file cannot be used.
    #[error("cannot lock {path}; it must belong to the user who runs this")]
    Io {
        /// The lock file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Takes the exclusive lock `path`, without waiting. The file, which is made if need be, names the
/// holder's pid for people to read.
pub fn lock(path: &Path) -> Result<LockGuard, LockError> {
    let failed = |source| LockError::Io {
        path: path.to_owned(),
        source,
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(LockError::Held {
                path: path.to_owned(),
                holder: holder(file),
            });
        }
        Err(TryLockError::Error(source)) => return Err(failed(source)),
    }
    file.set_len(0).map_err(failed)?;
    writeln!(file, "{}", std::process::id()).map_err(failed)?;
    Ok(LockGuard { _file: file })
}

/// What the lock file says about its holder, for the message.
fn holder(file: File) -> String {
    let mut text = String::new();
    let read = file.take(20).read_to_string(&mut text); // a pid has at most 10 digits
    match (read, text.trim().parse::<u32>()) {
        (Ok(_), Ok(pid)) => format!(" (pid {pid})"),
        (Ok(_) | Err(_), _) => String::new(),
    }
}

/// The directory that holds `path`.
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_write_replaces_content_and_mode_and_leaves_nothing_beside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        write(&path, b"public", 0o644).unwrap();
        assert_eq!(mode(&path), 0o644);
        write(&path, b"secret", 0o600).unwrap();
        assert_eq!(mode(&path), 0o600);
        assert_eq!(fs::read(&path).unwrap(), b"secret");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_leaves_the_old_content_and_nothing_beside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("target");
        fs::create_dir(&path).unwrap(); // a file cannot be renamed over a directory
        assert!(write(&path, b"bytes", 0o600).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn many_files_are_replaced_as_one_is() {
        for count in [0, 1, SYNC_TOGETHER, 2 * WRITTEN_TOGETHER_MAX + 1] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("0"), b"old").unwrap();
            let content = vec![b'x'; count];
            let files = (0..count).map(|number| (number.to_string(), &content[..number]));
            let files: Vec<_> = files.collect();
            write_all(dir.path(), &files, 0o600).unwrap();
            for (name, bytes) in &files {
                let path = dir.path().join(name);
                assert_eq!(
                    (fs::read(&path).unwrap(), mode(&path)),
                    (bytes.to_vec(), 0o600)
                );
            }
            let there = fs::read_dir(dir.path()).unwrap().count();
            assert_eq!(there, count.max(1));
        }
    }

    #[test]
    fn what_a_crash_left_beside_its_target_is_swept_away() {
        let dir = tempfile::tempdir().unwrap();
        let similar = [
            "kept",
            ".kept",
            "kept.new",
            ".new",
            ".web1.new",
            ".AbCdE.new",
            ".AbCdEfG.new",
            ".AbC-Ef.new",
            ".AbCdEf.new.json",
        ];
        for name in similar.into_iter().chain([".AbCdEf.new"]) {
            fs::write(dir.path().join(name), b"half").unwrap();
        }
        // As `write` names them.
        let beside = beside(dir.path(), b"half", 0o600).unwrap();
        let beside = beside.into_temp_path().keep().unwrap();
        sweep(dir.path());
        for name in similar {
            assert!(dir.path().join(name).exists(), "{name}");
        }
        assert!(!dir.path().join(".AbCdEf.new").exists());
        assert!(!beside.exists());
    }

    #[test]
    fn a_directory_is_made_with_its_parents_and_an_existing_one_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        create_dir(&path, 0o700).unwrap();
        assert_eq!((mode(&path), mode(&dir.path().join("a"))), (0o700, 0o700));
        create_dir(&path, 0o755).unwrap();
        assert_eq!(mode(&path), 0o700);
    }

    #[test]
    fn a_lock_has_one_holder_and_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = lock(&path).unwrap();
        let refused = lock(&path).unwrap_err().to_string();
        let pid = std::process::id();
        assert!(refused.contains(&format!("(pid {pid})")), "{refused}");
        drop(held);
        lock(&path).unwrap();
    }
}
