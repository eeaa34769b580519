//! Room for an install: on disk, and in memory for a second engine.

use std::path::{Path, PathBuf};

use clamcast_proto::names::looks_like_a_database;
use nix::sys::statvfs::statvfs;

use super::Finding;
use crate::host::{Host, Process};
use crate::install::SPACE_RESERVE_BYTES;

/// A full set of ClamAV's own databases, in bytes, where none is there yet to be measured.
const FULL_SET_BYTES: u64 = 300 << 20;

/// Names that an install makes at most: a staged, a current and a previous one for every database,
/// and some for the rest.
const INODES_NEEDED: u64 = 1000;

/// Bytes of an engine for each byte of its databases: the lightest signatures, and the mix that
/// was measured with clamd 1.4.
const ENGINE_FACTOR_LEAST: u64 = 3;
const ENGINE_FACTOR: u64 = 7;

/// What a compressed database inflates to, about.
const INFLATED_FACTOR: u64 = 3;

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

/// Bytes of the databases in a directory: as they are, and inflated.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Databases {
    /// On disk.
    pub(super) bytes: u64,
    /// About what clamd reads.
    pub(super) inflated_bytes: u64,
}

/// Adds up what is in `directory`.
pub(super) fn databases(directory: &Path) -> Databases {
    let mut sum = Databases::default();
    for name in names(directory) {
        let size = std::fs::metadata(directory.join(&name)).map_or(0, |facts| facts.len());
        sum.bytes += size;
        let factor = if name.ends_with(".cvd") {
            INFLATED_FACTOR
        } else {
            1
        };
        sum.inflated_bytes += size * factor;
    }
    sum
}

/// The names of the databases in `directory`.
pub(super) fn names(directory: &Path) -> Vec<String> {
    let mut names = Host::here().names(directory);
    names.retain(|name| looks_like_a_database(name));
    names
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

/// How much memory a second engine may take.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Memory {
    /// Bytes.
    pub(super) available_bytes: u64,
    /// What bounds it, for people.
    pub(super) bound: String,
}

/// The least of what the host has and what clamd's control groups leave it. `None` if the kernel
/// does not say.
pub(super) fn memory(host: &Host, clamd: Option<&Process>) -> Option<Memory> {
    let meminfo = host.text("/proc/meminfo").ok()?;
    let mut least = Memory {
        available_bytes: kib_field(&meminfo, "MemAvailable:")?,
        bound: "this host".into(),
    };
    let Some(process) = clamd else {
        return Some(least);
    };
    let pid = process.pid;
    let status = host.text(format!("/proc/{pid}/status")).unwrap_or_default();
    let resident = kib_field(&status, "VmRSS:").unwrap_or(0);
    let groups = host.text(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    for (file, group) in groups.lines().flat_map(limit_files) {
        let limit = host
            .text(&file)
            .ok()
            .and_then(|text| text.trim().parse::<u64>().ok());
        // What is not a number is `max`.
        let left = limit.map(|limit| limit.saturating_sub(resident));
        if let Some(left) = left.filter(|left| *left < least.available_bytes) {
            least = Memory {
                available_bytes: left,
                bound: format!("clamd's control group {group}"),
            };
        }
    }
    Some(least)
}

/// The files that bound a group and each of those around it, of cgroups version 2 (`0::PATH`) and
/// version 1 (`N:memory:PATH`).
fn limit_files(line: &str) -> Vec<(PathBuf, String)> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else {
        return Vec::new();
    };
    let (base, file) = if controllers.is_empty() {
        ("/sys/fs/cgroup", "memory.max")
    } else if controllers.split(',').any(|name| name == "memory") {
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
    } else {
        return Vec::new();
    };
    let around = Path::new(group).ancestors();
    let files = around.map(|group| {
        let relative = group.strip_prefix("/").unwrap_or(group);
        (
            Path::new(base).join(relative).join(file),
            group.display().to_string(),
        )
    });
    files.collect()
}

fn kib_field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let number: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(number.saturating_mul(1024))
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
    let bytes = match databases.inflated_bytes {
        0 => FULL_SET_BYTES,
        bytes => bytes,
    };
    let (least, usual) = (bytes * ENGINE_FACTOR_LEAST, bytes * ENGINE_FACTOR);
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
    use crate::doctor::testing;

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
    fn the_least_of_host_and_control_groups_bounds_a_second_engine() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::below(root.path());
        let write = |path: &str, text: &str| testing::write(&host, path, text);
        write(
            "/proc/meminfo",
            "MemTotal: 9000000 kB\nMemAvailable:    4096000 kB\n",
        );
        write("/proc/7/status", "Name:\tclamd\nVmRSS:\t 1024000 kB\n");
        write("/proc/7/cgroup", "0::/system.slice/clamav-daemon.service\n");
        let clamd = Process {
            pid: 7,
            name: "clamd".into(),
            uid: 0,
            arguments: vec![],
        };
        let available = || {
            let memory = memory(&host, Some(&clamd)).unwrap();
            (memory.available_bytes / MIB, memory.bound)
        };
        assert_eq!(available(), (4000, "this host".into()));
        write(
            "/sys/fs/cgroup/system.slice/clamav-daemon.service/memory.max",
            "max\n",
        );
        write("/sys/fs/cgroup/system.slice/memory.max", "1572864000\n");
        assert_eq!(
            available(),
            (500, "clamd's control group /system.slice".into())
        );
        std::fs::remove_file(host.at("/sys/fs/cgroup/system.slice/memory.max")).unwrap();
        write("/proc/7/cgroup", "5:cpu,memory:/clamd\n0::/\n");
        write(
            "/sys/fs/cgroup/memory/clamd/memory.limit_in_bytes",
            "1048576000\n",
        );
        assert_eq!(available(), (0, "clamd's control group /clamd".into()));
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
