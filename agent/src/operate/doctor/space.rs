//! Room for an install: on disk, and in memory for a second engine.

use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;

use super::Finding;
use crate::host::Host;
use crate::host::memory::{Databases, FULL_SET_BYTES, Memory};
use crate::install::SPACE_RESERVE_BYTES;

/// Names that an install makes at most: a staged, a current and a previous one for every database,
/// and some for the rest.
const INODES_NEEDED: u64 = 1000;

/// A file system, as seen from a directory on it.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    /// The directory.
    pub(super) path: PathBuf,
    /// Bytes that an ordinary user may still write.
    pub(super) free_bytes: u64,
    /// Files that may still be made; `None` where there is no such limit.
    pub(super) free_inodes: Option<u64>,
    /// Its type and whether it is mounted read-only, if the mount was found.
    pub(super) mount: Option<Mount>,
}

/// How a file system is mounted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Mount {
    /// The kernel's name of its type.
    pub(super) kind: String,
    /// Nothing can be written.
    pub(super) read_only: bool,
}

/// Looks at the file system of `path`.
pub(super) fn disk(host: &Host, path: &Path) -> Result<Disk, String> {
    let real = path.canonicalize().map_err(|error| error.to_string())?;
    let stat = statvfs(&real).map_err(|error| error.to_string())?;
    let mounts = host.text("/proc/self/mountinfo").unwrap_or_default();
    Ok(Disk {
        free_bytes: stat.blocks_available().saturating_mul(stat.fragment_size()),
        // Some make them as they need them, and say that they have none.
        free_inodes: (stat.files() > 0).then(|| stat.files_available()),
        mount: mount_of(&mounts, &real),
        path: path.to_owned(),
    })
}

/// The mount that `path`, after links, is on. A later line hides an earlier one (proc(5)).
fn mount_of(mountinfo: &str, path: &Path) -> Option<Mount> {
    let mut best: Option<(usize, Mount)> = None;
    for line in mountinfo.lines() {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(4);
        let (Some(point), Some(options)) = (left.next(), left.next()) else {
            continue;
        };
        let mut right = right.split(' ');
        let kind = right.next().unwrap_or_default().to_owned();
        let of_disk = right.nth(1).unwrap_or_default();
        let point = PathBuf::from(unescaped(point));
        let depth = point.components().count();
        if path.starts_with(&point) && best.as_ref().is_none_or(|(best, _)| *best <= depth) {
            let read_only = [options, of_disk]
                .iter()
                .any(|o| o.split(',').any(|o| o == "ro"));
            best = Some((depth, Mount { kind, read_only }));
        }
    }
    best.map(|(_, mount)| mount)
}

/// Blanks in the path of a mount are written as octal numbers.
fn unescaped(path: &str) -> String {
    path.replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\134", "\\")
}

/// Judges the disk of the database directory. `kept` are the bytes that `previous/` holds already,
/// if it could be looked at.
pub(super) fn judge_disk(disk: &Disk, databases: Databases, kept: u64) -> Vec<Finding> {
    let path = disk.path.display();
    let mut findings = Vec::new();
    let (set, measured) = match databases.bytes {
        0 => (FULL_SET_BYTES, "a full set, as none is here yet"),
        bytes => (bytes, "the databases that are here"),
    };
    let stage = set + SPACE_RESERVE_BYTES;
    let both = stage + set.saturating_sub(kept);
    let free = disk.free_bytes;
    let found = format!(
        "{path} has {} free; a new set takes {} ({measured}, {} in reserve), and {} where the old one \
         is kept beside it",
        mib_free(free),
        mib(stage),
        mib(SPACE_RESERVE_BYTES),
        mib(both),
    );
    findings.push(if free < stage {
        let advice = format!(
            "make {} more room on that file system, better {}",
            mib(stage - free),
            mib(both - free)
        );
        Finding::bad("disk-space", found, advice)
    } else if free < both {
        let advice = format!(
            "make {} more room: one install fits, the next may not",
            mib(both - free)
        );
        Finding::note("disk-space", found, advice)
    } else {
        Finding::good("disk-space", found)
    });
    findings.push(match disk.free_inodes {
        Some(left) if left < INODES_NEEDED => Finding::bad(
            "inodes",
            format!("{path} has {left} inodes left"),
            "remove files that nobody needs, or make the file system anew with more inodes",
        ),
        Some(left) => Finding::good("inodes", format!("{path} has {left} left")),
        None => Finding::good("inodes", format!("{path} has no limit")),
    });
    findings.push(match &disk.mount {
        None => {
            let why = format!("the mount of {path} is not in /proc/self/mountinfo");
            Finding::unknown("file-system", why, None)
        }
        Some(Mount {
            kind,
            read_only: true,
        }) => Finding::bad(
            "file-system",
            format!("{path} is on a {kind} that is mounted read-only"),
            format!("mount -o remount,rw \"$(findmnt -n -o TARGET -T {path})\""),
        ),
        Some(Mount { kind, .. }) => match peculiar(kind) {
            None => Finding::good("file-system", kind.as_str()),
            Some((what, advice)) => {
                let found = format!("{path} is on {kind}, {what}");
                Finding::note("file-system", found, advice)
            }
        },
    });
    findings
}

/// What a type of file system means for databases.
fn peculiar(kind: &str) -> Option<(&'static str, &'static str)> {
    const NETWORK: [&str; 11] = [
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "ceph",
        "fuse.ceph",
        "fuse.glusterfs",
        "fuse.sshfs",
        "9p",
        "virtiofs",
        "lustre",
    ];
    if NETWORK.contains(&kind) {
        return Some((
            "a network file system: clamd's load waits for it, and other hosts may write there",
            "put the databases on a disk of this host",
        ));
    }
    match kind {
        "overlay" => Some((
            "the layer of a container: its files are gone with the container",
            "put the databases on a volume, if they should outlive it",
        )),
        "tmpfs" | "ramfs" => Some((
            "memory: after every boot the whole set is fetched again, and clamd starts without one",
            "put the databases on a disk",
        )),
        _ => None,
    }
}

/// Judges the disk of the state directory.
pub(super) fn judge_state(disk: &Disk) -> Option<Finding> {
    let (path, free) = (disk.path.display(), disk.free_bytes);
    if disk.mount.as_ref().is_some_and(|mount| mount.read_only) {
        let found = format!("{path} is on a file system that is mounted read-only");
        return Some(Finding::bad("disk-space", found, "mount it for writing"));
    }
    (free < SPACE_RESERVE_BYTES).then(|| {
        let found = format!("{path}, the state directory, has {} free", mib_free(free));
        Finding::bad(
            "disk-space",
            found,
            format!("make room for {}", mib(SPACE_RESERVE_BYTES)),
        )
    })
}

/// Judges the memory for a second copy of the signatures, which a concurrent reload and clamscan
/// alike load beside the first.
pub(super) fn judge_memory(memory: Option<&Memory>, databases: Databases) -> Finding {
    let Some(Memory {
        available_bytes: available,
        bound,
    }) = memory
    else {
        return Finding::unknown(
            "memory",
            "the kernel does not say how much is available",
            None,
        );
    };
    let (least, usual) = (databases.engine_bytes_least(), databases.engine_bytes());
    let found = format!(
        "{bound} has {} for the second engine that is loaded beside the first at every reload; it \
         takes {} to {}",
        mib_free(*available),
        mib(least),
        mib(usual)
    );
    let advice = "give clamd more memory (MemoryMax= of its unit, or the host), or set \
                  ConcurrentDatabaseReload no";
    if *available < least {
        Finding::bad("memory", found, advice)
    } else if *available < usual {
        Finding::note("memory", found, advice)
    } else {
        Finding::good("memory", found)
    }
}

/// What is needed, rounded up, so that it is enough.
fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

/// What there is, rounded down, so that it is not more than there is.
fn mib_free(bytes: u64) -> String {
    match bytes >> 20 {
        0 => "less than 1 MiB".to_owned(),
        whole => format!("{whole} MiB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operate::doctor::testing;

    const MIB: u64 = 1 << 20;

    #[track_caller]
    fn check_disk(free_mib: u64, set_mib: u64, kept_mib: u64, expected: &str) {
        let disk = Disk {
            path: "/db".into(),
            free_bytes: free_mib * MIB,
            free_inodes: Some(5000),
            mount: None,
        };
        let databases = Databases {
            bytes: set_mib * MIB,
            inflated_bytes: 0,
        };
        let line = testing::lines(&judge_disk(&disk, databases, kept_mib * MIB)[..1]);
        assert!(line.starts_with(expected), "{line}");
    }

    #[test]
    fn a_stage_must_fit_and_the_previous_set_should() {
        check_disk(
            1000,
            200,
            0,
            "good disk-space: /db has 1000 MiB free; a new set",
        );
        check_disk(300, 200, 0, "note disk-space");
        check_disk(300, 200, 200, "good disk-space");
        check_disk(215, 200, 200, "bad disk-space");
        // Nothing there yet: a full set of ClamAV's.
        check_disk(300, 0, 0, "bad disk-space");
        check_disk(620, 0, 0, "good disk-space");
        // Whoever subtracts gets what the advice says.
        check_disk(
            0,
            0,
            0,
            "bad disk-space: /db has less than 1 MiB free; a new set takes 316 MiB (a full set, as \
             none is here yet, 16 MiB in reserve), and 616 MiB where the old one is kept beside it \
             -> make 316 MiB more room on that file system, better 616 MiB",
        );
    }

    #[track_caller]
    fn check_mount(path: &str, expected: Option<(&str, bool)>) {
        let mounts = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
                      30 22 0:40 / /var/lib rw - nfs4 server:/x rw,vers=4.2\n\
                      31 30 0:41 / /var/lib/a\\040b ro,nosuid - xfs /dev/sdb rw\n\
                      32 22 0:42 / /srv rw - btrfs /dev/sdc ro,space_cache\n";
        let found = mount_of(mounts, Path::new(path));
        let found = found.as_ref().map(|m| (m.kind.as_str(), m.read_only));
        assert_eq!(found, expected, "{path}");
    }

    #[test]
    fn the_deepest_mount_counts_and_either_side_can_be_read_only() {
        check_mount("/etc", Some(("ext4", false)));
        check_mount("/var/lib/clamav", Some(("nfs4", false)));
        check_mount("/var/library", Some(("ext4", false)));
        check_mount("/var/lib/a b/c", Some(("xfs", true)));
        check_mount("/srv/clamav", Some(("btrfs", true)));
    }

    #[test]
    fn what_cannot_be_written_or_vanishes_is_said() {
        for (kind, read_only, inodes, expected) in [
            (
                "ext4",
                false,
                Some(2000),
                "good inodes: /db has 2000 left\ngood file-system: ext4",
            ),
            (
                "nfs4",
                false,
                None,
                "note file-system: /db is on nfs4, a network file system",
            ),
            (
                "overlay",
                false,
                None,
                "note file-system: /db is on overlay, the layer",
            ),
            (
                "ext4",
                true,
                None,
                "mounted read-only -> mount -o remount,rw",
            ),
            ("ext4", false, Some(7), "bad inodes: /db has 7 inodes left"),
        ] {
            let disk = Disk {
                path: "/db".into(),
                free_bytes: u64::MAX,
                free_inodes: inodes,
                mount: Some(Mount {
                    kind: kind.into(),
                    read_only,
                }),
            };
            let lines = testing::lines(&judge_disk(&disk, Databases::default(), 0));
            assert!(lines.contains(expected), "{lines}");
        }
    }

    #[test]
    fn memory_is_bad_where_no_kind_of_signature_fits_and_a_note_where_most_do_not() {
        for (available, expected) in [(2000, "good"), (500, "note"), (200, "bad")] {
            let memory = Memory {
                available_bytes: available * MIB,
                bound: "this host".into(),
            };
            let databases = Databases {
                bytes: 100 * MIB,
                inflated_bytes: 100 * MIB,
            };
            let line = testing::lines(&[judge_memory(Some(&memory), databases)]);
            assert!(line.starts_with(expected), "{line}");
        }
    }
}
