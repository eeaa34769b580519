//! Memory for one more engine: what a set of databases takes, and what this host has left.

use std::path::{Path, PathBuf};

use clamcast_proto::names::looks_like_a_database;

use crate::host::{Host, Process};

/// A full set of ClamAV's own databases, in bytes, where none is there yet to be measured.
pub(crate) const FULL_SET_BYTES: u64 = 300 << 20;

/// Bytes of an engine for each byte of its databases: the lightest signatures, and the mix that
/// was measured with clamd 1.4.
const ENGINE_FACTOR_LEAST: u64 = 3;
const ENGINE_FACTOR: u64 = 7;

/// What a compressed database inflates to, about.
const INFLATED_FACTOR: u64 = 3;

/// Bytes of the databases in a directory: as they are, and inflated.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Databases {
    /// On disk.
    pub(crate) bytes: u64,
    /// About what clamd reads.
    pub(crate) inflated_bytes: u64,
}

impl Databases {
    /// What the lightest signatures take as an engine.
    pub(crate) fn engine_bytes_least(self) -> u64 {
        self.read_bytes() * ENGINE_FACTOR_LEAST
    }

    /// What a usual mix of signatures takes.
    pub(crate) fn engine_bytes(self) -> u64 {
        self.read_bytes() * ENGINE_FACTOR
    }

    fn read_bytes(self) -> u64 {
        match self.inflated_bytes {
            0 => FULL_SET_BYTES,
            bytes => bytes,
        }
    }
}

/// Adds up what is in `directory`.
pub(crate) fn databases(directory: &Path) -> Databases {
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

/// Why this host has too little memory to load `directory` once more in a program that the agent
/// starts; `None` if there is enough, or the kernel does not say. Blocking.
pub(crate) fn shortage(directory: &Path) -> Option<String> {
    let agent = Process {
        pid: std::process::id(),
        name: String::new(),
        uid: 0,
        arguments: Vec::new(),
    };
    let needed = databases(directory).engine_bytes();
    let memory = memory(&Host::here(), Some(&agent))?;
    (memory.available_bytes < needed).then(|| {
        let mib = needed.div_ceil(1 << 20);
        format!("{} has no {mib} MiB left for clamscan", memory.bound)
    })
}

/// The names of the databases in `directory`.
pub(crate) fn names(directory: &Path) -> Vec<String> {
    let mut names = Host::here().names(directory);
    names.retain(|name| looks_like_a_database(name));
    names
}

/// How much memory a second engine may take.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Memory {
    /// Bytes.
    pub(crate) available_bytes: u64,
    /// What bounds it, for people.
    pub(crate) bound: String,
}

/// The least of what the host has and what the control groups of `process` leave it. `None` if the
/// kernel does not say.
pub(crate) fn memory(host: &Host, process: Option<&Process>) -> Option<Memory> {
    let meminfo = host.text("/proc/meminfo").ok()?;
    let mut least = Memory {
        available_bytes: kib_field(&meminfo, "MemAvailable:")?,
        bound: "this host".into(),
    };
    let Some(process) = process else {
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
                bound: format!("the control group {group}"),
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

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_least_of_host_and_control_groups_bounds_a_second_engine() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::below(root.path());
        let write = |path: &str, text: &str| host.write(path, text);
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
        assert_eq!(available(), (500, "the control group /system.slice".into()));
        std::fs::remove_file(host.at("/sys/fs/cgroup/system.slice/memory.max")).unwrap();
        write("/proc/7/cgroup", "5:cpu,memory:/clamd\n0::/\n");
        write(
            "/sys/fs/cgroup/memory/clamd/memory.limit_in_bytes",
            "1048576000\n",
        );
        assert_eq!(available(), (0, "the control group /clamd".into()));
    }
}
