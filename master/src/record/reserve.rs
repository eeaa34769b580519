//! Disk space that is kept for operators' lines and alarms: while a full disk takes nothing else.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::posix_fallocate;
use nix::sys::statvfs::statvfs;

/// Bytes of the reserve: what waits for the disk when it is full, and then tens of thousands of lines.
pub(super) const BYTES: u64 = 16 << 20;

/// The reserve is made again when the disk has this much space.
const FREE_BYTES: u64 = 3 * BYTES;

/// A file that takes up space until a full disk needs it.
#[derive(Debug)]
pub(super) struct Reserve {
    path: PathBuf,
    is_held: bool,
}

impl Reserve {
    /// Makes the reserve, if the disk has space for it.
    pub(super) fn new(directory: &Path) -> Self {
        let path = directory.join("reserve");
        let is_held = fs::metadata(&path).is_ok_and(|file| file.len() == BYTES);
        let mut reserve = Self { path, is_held };
        if !is_held {
            let _ = fs::remove_file(&reserve.path); // what a crash left of it
        }
        reserve.restore();
        reserve
    }

    /// Whether the reserve is on the disk.
    pub(super) fn is_held(&self) -> bool {
        self.is_held
    }

    /// Gives the space back to the disk. Returns whether the reserve was there.
    pub(super) fn release(&mut self) -> bool {
        let was_held = std::mem::take(&mut self.is_held);
        was_held && fs::remove_file(&self.path).is_ok()
    }

    /// Takes the space again, as soon as the disk has more than enough. Returns whether the reserve is
    /// there.
    pub(super) fn restore(&mut self) -> bool {
        if !self.is_held {
            self.is_held = self.free() >= FREE_BYTES && self.allocate().is_ok();
        }
        self.is_held
    }

    /// Whether the disk has less free space than the reserve.
    pub(super) fn is_short(&self) -> bool {
        self.free() < BYTES
    }

    /// Free bytes of the disk.
    fn free(&self) -> u64 {
        let directory = self.path.parent().expect("the reserve is in a directory");
        statvfs(directory).map_or(0, |it| it.blocks_available() * it.fragment_size())
    }

    fn allocate(&self) -> io::Result<()> {
        let file: File = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&self.path)?;
        let length = i64::try_from(BYTES).expect("a few megabytes");
        posix_fallocate(&file, 0, length).map_err(|error| {
            let _ = fs::remove_file(&self.path);
            error.into()
        })
    }
}

/// Whether an error says that the disk is full.
pub(super) fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded)
}
