//! Which files of the store still hold what they held when they were written.
//!
//! An object is checked against its name, and an encoding against the SHA-256 behind its last byte
//! (its seal). A file is hashed before it is used, and then again after [`TRUSTED`], after a change
//! of its stamp, or when an agent asks for it again.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clamcast_proto::Digest;

use super::copy_hashed;

/// How long a file counts as whole after it was hashed. It bounds how long a disk that silently
/// loses bits can make hosts receive damaged files; hashing a set of 300 MB takes less than a second.
pub(super) const TRUSTED: Duration = Duration::from_secs(3600);

/// A doubt about a file that was hashed within this time changes nothing: agents raise doubts.
const DOUBTS_APART: Duration = Duration::from_secs(60);

/// Bytes of a seal.
pub(super) const SEAL_BYTES: u64 = 32;

/// The files that were found whole, until they are hashed again.
#[derive(Debug, Default)]
pub(super) struct Whole(Mutex<HashMap<PathBuf, Seen>>);

#[derive(Debug)]
struct Seen {
    stamp: Stamp,
    at: Instant,
}

/// Differs after every write through the file system. Not the time of the last status change: a hard
/// link, which the load test makes, sets it.
#[derive(Debug, PartialEq)]
struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

impl Whole {
    /// Whether the file was found whole not long ago, and was not written since.
    pub(super) fn has(&self, path: &Path, metadata: &Metadata) -> bool {
        let whole = self.lock();
        let seen = whole.get(path);
        seen.is_some_and(|it| it.stamp == Stamp::of(metadata) && it.at.elapsed() < TRUSTED)
    }

    /// Takes note that the file was found whole.
    pub(super) fn insert(&self, path: &Path, metadata: &Metadata) {
        let (stamp, at) = (Stamp::of(metadata), Instant::now());
        self.lock().insert(path.to_owned(), Seen { stamp, at });
    }

    /// Has the file hashed before its next use.
    pub(super) fn doubt(&self, path: &Path) {
        let old = |seen: &mut Seen| seen.at.elapsed() >= DOUBTS_APART;
        let mut whole = self.lock();
        if whole.get_mut(path).is_some_and(old) {
            whole.remove(path);
        }
    }

    /// Forgets files that are gone. The disk is not waited for under the lock.
    pub(super) fn forget_removed(&self) {
        let known: Vec<_> = self.lock().keys().cloned().collect();
        for path in known.iter().filter(|path| !path.exists()) {
            self.lock().remove(path);
        }
    }

    /// Each change is one insertion or removal: a panic leaves the map whole.
    fn lock(&self) -> MutexGuard<'_, HashMap<PathBuf, Seen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes the seal of a file behind its content. Returns the length of the content.
pub(super) fn seal(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::Start(0))?;
    let (digest, length) = copy_hashed(file, &mut io::sink())?;
    file.seek(SeekFrom::Start(length))?;
    file.write_all(digest.as_bytes())?;
    Ok(length)
}

/// Whether a sealed file still has the content that was sealed.
pub(super) fn is_sealed(file: &File) -> io::Result<bool> {
    let length = file.metadata()?.len();
    let Some(length) = length.checked_sub(SEAL_BYTES) else {
        return Ok(false);
    };
    let mut hasher = Hasher::default();
    io::copy(&mut (&mut &*file).take(length), &mut hasher)?;
    let mut seal = [0; SEAL_BYTES as usize];
    (&mut &*file).read_exact(&mut seal)?;
    Ok(hasher.finish().as_bytes() == &seal)
}

/// Whether a file has the content of this digest.
pub(super) fn is_object(file: &File, digest: &Digest) -> io::Result<bool> {
    let (found, _) = copy_hashed(file, &mut io::sink())?;
    Ok(found == *digest)
}

/// SHA-256 as a writer.
#[derive(Default)]
struct Hasher(sha2::Sha256);

impl Hasher {
    fn finish(self) -> Digest {
        Digest::finish(self.0)
    }
}

impl io::Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        sha2::Digest::update(&mut self.0, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
