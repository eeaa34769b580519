//! Mounts of a test, which takes root.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A mount, taken away when dropped.
#[derive(Debug)]
pub struct Mount(PathBuf);

impl Mount {
    /// Mounts a directory over itself, for reading only.
    pub fn read_only(directory: &Path) -> Self {
        mount(&["-o", "bind"], directory, directory);
        let mounted = Self(directory.into());
        mount(&["-o", "remount,bind,ro"], directory, directory);
        mounted
    }

    /// Mounts an empty ramfs. The clock of its time stamps moves on with the kernel's ticks, as that
    /// of every file system did before Linux 6.13: changes within one tick look like one.
    pub fn of_coarse_times(directory: &Path) -> Self {
        mount(&["-t", "ramfs"], Path::new("ramfs"), directory);
        Self(directory.into())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: somebody may be there.
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

/// A disk in memory of 24 MiB: a small set fits, with the room that an agent leaves free, and a large
/// one does not.
#[derive(Debug)]
pub struct SmallDisk(Mount);

impl SmallDisk {
    /// An empty one.
    pub fn mount(directory: &Path) -> Self {
        Self::of(directory, "24m")
    }

    /// One of another size, as tmpfs(5) has it.
    pub fn of(directory: &Path, size: &str) -> Self {
        fs::create_dir_all(directory).expect("a scratch directory can be written");
        let size = format!("size={size}");
        mount(&["-t", "tmpfs", "-o", &size], Path::new("tmpfs"), directory);
        Self(Mount(directory.into()))
    }

    /// Leaves no byte free.
    pub fn fill(&self) {
        let mut filler = File::create(self.filler()).expect("a file takes no room");
        for size in [1 << 16, 1] {
            while filler.write_all(&vec![0; size]).is_ok() {}
        }
    }

    /// Frees what [`SmallDisk::fill`] took.
    pub fn free(&self) {
        fs::remove_file(self.filler()).expect("it was filled");
    }

    fn filler(&self) -> PathBuf {
        self.0.0.join("filler")
    }
}

fn mount(options: &[&str], what: &Path, directory: &Path) {
    let mut mount = Command::new("mount");
    mount.args(options).arg(what).arg(directory);
    let output = mount.output().expect("every system has mount");
    assert!(output.status.success(), "{mount:?}: {output:?}");
}
