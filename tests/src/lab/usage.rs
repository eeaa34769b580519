//! What a process has used, by the kernel's own account (proc_pid_stat(5), proc_pid_status(5)).

use std::fs;
use std::time::Duration;

use nix::unistd::{SysconfVar, sysconf};

/// What a process has used so far.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Time on a processor, in the kernel and outside.
    pub processor: Duration,
    /// Bytes of memory that are its own: without files that are mapped.
    pub memory: u64,
    /// Bytes of it that were resident at most, mapped files with it.
    pub memory_peak: u64,
}

impl Usage {
    /// Of the process `pid`.
    ///
    /// # Panics
    ///
    /// If there is no such process.
    pub fn of(pid: u32) -> Self {
        let read = |file: &str| {
            let path = format!("/proc/{pid}/{file}");
            fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
        };
        let stat = read("stat");
        // The name of the program is in parentheses and may hold anything; utime is the 14th field.
        let (_, fields) = stat.rsplit_once(") ").expect("the name ends");
        let ticks = fields.split(' ').skip(11).take(2);
        let ticks: u64 = ticks.filter_map(|field| field.parse::<u64>().ok()).sum();
        let second = sysconf(SysconfVar::CLK_TCK).ok().flatten();
        let second = second.expect("the kernel counts time in ticks") as f64;
        let status = read("status");
        let bytes = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            let kib = line.and_then(|line| line.trim_end_matches("kB").trim().parse::<u64>().ok());
            kib.expect("a process has memory") << 10
        };
        Self {
            processor: Duration::from_secs_f64(ticks as f64 / second),
            memory: bytes("RssAnon:"),
            memory_peak: bytes("VmHWM:"),
        }
    }
}

/// Datagrams that the kernel has thrown away for the UDP sockets on `port`, because nobody read
/// them in time.
pub fn datagrams_dropped(port: u16) -> u64 {
    let of = |table: &str| {
        let table = fs::read_to_string(table).unwrap_or_default();
        let dropped = |line: &str| {
            let mut fields = line.split_whitespace();
            let local = fields.nth(1)?.rsplit_once(':')?.1;
            let is_it = u16::from_str_radix(local, 16) == Ok(port);
            is_it.then(|| fields.next_back()?.parse::<u64>().ok())?
        };
        table.lines().filter_map(dropped).sum::<u64>()
    };
    of("/proc/net/udp") + of("/proc/net/udp6")
}
