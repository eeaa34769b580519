//! Confines the load test: `clamscan` parses databases that a stranger may have written into the
//! mirror, and must not reach the keys, the network or other processes of this host.
//!
//! Capabilities, Landlock domains and seccomp filters belong to a thread on Linux, and its children
//! inherit them. So a thread is confined and `clamscan` started from it: the rest of the daemon keeps
//! its rights, and no code runs between fork and exec.

use std::collections::BTreeMap;
use std::env;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, LandlockStatus, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, Scope, path_beneath_rules,
};
use nix::libc;
use nix::unistd::Pid;
use rustix::process::{Resource, Rlimit, getrlimit, prlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, apply_filter,
};

/// The Landlock version that the rules are written for and tested with. An older kernel enforces the
/// rules that it knows.
const LANDLOCK: ABI = ABI::V6;

/// Directories of programs and libraries on distributions and after builds from source. They hold
/// nothing secret.
const PROGRAMS: [&str; 11] = [
    "/bin",
    "/lib",
    "/lib32",
    "/lib64",
    "/nix/store",
    "/usr/bin",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/local/lib64",
];

/// Other files that the loader, the C library, OpenSSL and ClamAV 1.5 read. The rest of `/etc` is
/// unreadable.
const FILES: [&str; 13] = [
    "/dev/random",
    "/dev/urandom",
    "/etc/clamav/certs",
    "/etc/crypto-policies",
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
    "/etc/localtime",
    "/etc/pki/tls/openssl.cnf",
    "/etc/ssl/openssl.cnf",
    "/sys/devices/system/cpu",
    "/usr/local/etc/certs",
    "/usr/share/crypto-policies",
    "/usr/share/zoneinfo",
];

/// Directories below PREFIX that a program at PREFIX/bin needs: libraries, and the certificates of
/// ClamAV.
const BESIDE: [&str; 3] = ["lib", "lib64", "etc/certs"];

/// The largest file that clamscan may write, in bytes. clamscan 1.4.6 writes no file while it loads
/// databases. A version that unpacks containers into temporary files has room for the official ones,
/// which hold half a gigabyte in all.
const FILE_BYTES_MAX: u64 = 1 << 30;

// The numbers of newer system calls are the same on every architecture. libc lacks some of them.
const FCHMODAT2: libc::c_long = 452;
const SETXATTRAT: libc::c_long = 463;
const REMOVEXATTRAT: libc::c_long = 466;
const FILE_SETATTR: libc::c_long = 469;

/// System calls that fail with EPERM. A list of the permitted calls would break with libraries that
/// use other harmless calls, and a failing load test holds back every update.
const FORBIDDEN: &[libc::c_long] = &[
    // The network. io_uring makes sockets without `socket`. Sending and receiving stay allowed: no
    // child inherits a socket, and tokio reports signals to the confined thread through a pair of
    // sockets.
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // Other processes, and keys that the kernel keeps for this user. For prlimit64 see
    // `another_process`.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_sched_setattr,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setscheduler,
    libc::SYS_sched_setaffinity,
    libc::SYS_setpriority,
    libc::SYS_ioprio_set,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // Leaving the process group, which is killed as a whole. setpgid leaves it, too, but the child
    // makes the group with that call after it has inherited the filter. A process that leaves stays
    // confined.
    libc::SYS_setsid,
    // Namespaces, in which a process has capabilities, and large interfaces of the kernel.
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    // Modes, owners, times and attributes of files. Landlock does not cover them, and the master's
    // files have the same owner.
    FCHMODAT2,
    SETXATTRAT,
    REMOVEXATTRAT,
    FILE_SETATTR,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    // Landlock covers truncate only from Linux 6.2 on.
    libc::SYS_truncate,
];

/// Older calls for the same purposes. Newer architectures lack all but `accept`.
#[cfg(target_arch = "x86_64")]
const FORBIDDEN_OLD: &[libc::c_long] = &[
    libc::SYS_accept,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_utime,
    libc::SYS_utimes,
    libc::SYS_futimesat,
];
#[cfg(not(target_arch = "x86_64"))]
const FORBIDDEN_OLD: &[libc::c_long] = &[libc::SYS_accept];

/// Added to the number of a call for the x32 ABI, which some kernels on x86-64 also serve.
const X32: i64 = if cfg!(target_arch = "x86_64") {
    0x4000_0000
} else {
    0
};

/// Files that the confined program may use.
pub(super) struct Cell<'a> {
    /// The program. The [`BESIDE`] directories of its prefix are readable, too.
    pub(super) program: &'a Path,
    /// A directory to read.
    pub(super) read: &'a Path,
    /// A directory to write in.
    pub(super) write: &'a Path,
}

/// A part of the confinement that this kernel lacks, as a sentence for the operator.
type Gap = String;

/// The thread could not be confined although the kernel supports it.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Capabilities or privileges.
    #[error("cannot give up capabilities")]
    Privileges(#[source] io::Error),
    /// The file system.
    #[error("cannot restrict access to files")]
    Files(#[source] landlock::RulesetError),
    /// System calls.
    #[error("cannot restrict system calls")]
    Calls(#[source] seccompiler::Error),
}

/// The parts of the confinement that this kernel lacks.
pub fn gaps() -> Vec<Gap> {
    let nothing = Path::new("/dev/null");
    let cell = Cell {
        program: nothing,
        read: nothing,
        write: nothing,
    };
    // On a thread of its own: a thread stays confined until it ends.
    let confined = thread::scope(|scope| scope.spawn(|| confine(&cell)).join());
    match confined.expect("it does not panic") {
        Ok(gaps) => gaps,
        Err(error) => vec![format!(
            "the load test cannot be confined, so nothing is published: {}",
            crate::chain(&error)
        )],
    }
}

/// Confines the calling thread, and all processes that it starts from now on, for good. Returns the
/// parts that this kernel lacks; the other parts are in force.
pub(super) fn confine(cell: &Cell<'_>) -> Result<Vec<Gap>, JailError> {
    give_up_privileges().map_err(JailError::Privileges)?;
    let mut gaps = restrict_files(cell).map_err(JailError::Files)?;
    gaps.extend(restrict_calls()?);
    Ok(gaps)
}

fn give_up_privileges() -> io::Result<()> {
    set_no_new_privs(true)?;
    clear_ambient_capability_set()?;
    // Fails without CAP_SETPCAP. The bounding set of a thread without privileges is no danger:
    // `no_new_privs` keeps it from getting any.
    for capability in CapabilitySet::all().iter() {
        let _ = remove_capability_from_bounding_set(capability);
    }
    let none = CapabilitySet::empty();
    let empty = CapabilitySets {
        effective: none,
        permitted: none,
        inheritable: none,
    };
    // The service's system call filter forbids capset, which a daemon without capabilities never needs.
    if capabilities(None)? != empty {
        set_capabilities(None, empty)?;
    }
    Ok(())
}

fn restrict_files(cell: &Cell<'_>) -> Result<Vec<Gap>, landlock::RulesetError> {
    // PREFIX/bin/PROGRAM: of the path as given, and of the target of a symbolic link.
    let real = cell.program.canonicalize().ok();
    let programs = [Some(cell.program), real.as_deref()];
    let prefixes = programs
        .into_iter()
        .flatten()
        .filter_map(|program| program.parent()?.parent());
    let beside: Vec<PathBuf> = prefixes
        .flat_map(|prefix| BESIDE.map(|name| prefix.join(name)))
        .collect();

    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let run = read | AccessFs::Execute;
    let write = AccessFs::from_all(LANDLOCK) & !AccessFs::Execute;
    let confined = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?
        .add_rules(path_beneath_rules(PROGRAMS, run))?
        .add_rules(path_beneath_rules([cell.program], run))?
        .add_rules(path_beneath_rules(beside, run))?
        .add_rules(path_beneath_rules(FILES, read))?
        .add_rules(path_beneath_rules([cell.read], read))?
        .add_rules(path_beneath_rules(
            [cell.write, Path::new("/dev/null")],
            write,
        ))?
        .restrict_self()?;
    Ok(landlock_gaps(confined.landlock))
}

fn landlock_gaps(status: LandlockStatus) -> Vec<Gap> {
    let LandlockStatus::Available { effective_abi, .. } = status else {
        return vec![
            "this kernel has no Landlock: in a load test clamscan can read every file of the master, \
             its keys too; boot with `lsm=landlock,...` (Linux 5.13 or newer)"
                .to_owned(),
        ];
    };
    if effective_abi >= ABI::V6 {
        return Vec::new();
    }
    vec![
        "Landlock of this kernel is older than Linux 6.12: clamscan can send signals to the master \
         in a load test"
            .to_owned(),
    ]
}

fn restrict_calls() -> Result<Vec<Gap>, JailError> {
    let forbidden = FORBIDDEN.iter().chain(FORBIDDEN_OLD);
    let mut rules = rules(forbidden.map(|&call| (call, Vec::new())));
    rules.extend(self::rules([
        (libc::SYS_clone, vec![user_namespace()]),
        (libc::SYS_prlimit64, vec![another_process()]),
    ]));
    // A filter cannot see the flags of clone3. The C library falls back to clone if there is no clone3.
    let unknown = self::rules([(libc::SYS_clone3, Vec::new())]);
    for (rules, errno) in [(rules, libc::EPERM), (unknown, libc::ENOSYS)] {
        match apply(rules, errno) {
            Ok(()) => {}
            Err(error) if is_unsupported(&error) => {
                return Ok(vec![format!(
                    "system calls cannot be filtered on this host ({error}): clamscan can use the \
                     network in a load test"
                )]);
            }
            Err(error) => return Err(JailError::Calls(error)),
        }
    }
    Ok(Vec::new())
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn rules(calls: impl IntoIterator<Item = (libc::c_long, Vec<SeccompRule>)>) -> Rules {
    let both = |(call, rules): (i64, Vec<_>)| [(call, rules.clone()), (call | X32, rules)];
    calls.into_iter().flat_map(both).collect()
}

/// Matches a `clone` that makes a user namespace, in which the process has capabilities. All other
/// namespaces need a capability.
fn user_namespace() -> SeccompRule {
    let flag = u64::try_from(libc::CLONE_NEWUSER).expect("a flag");
    rule(SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(flag), flag)
}

/// Matches a `prlimit64` of another process: 0 is the caller. The C library sets the limits of its
/// own process with this call.
fn another_process() -> SeccompRule {
    rule(SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, 0)
}

/// Matches by the first argument.
fn rule(length: SeccompCmpArgLen, operator: SeccompCmpOp, value: u64) -> SeccompRule {
    SeccompCondition::new(0, length, operator, value)
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .expect("there is a first argument")
}

fn apply(rules: Rules, errno: libc::c_int) -> Result<(), seccompiler::Error> {
    let errno = SeccompAction::Errno(u32::try_from(errno).expect("an error number"));
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        errno,
        env::consts::ARCH.try_into()?,
    )?;
    let program: BpfProgram = filter.try_into()?;
    apply_filter(&program)
}

/// Whether the kernel has no filters, or seccompiler does not know this architecture.
fn is_unsupported(error: &seccompiler::Error) -> bool {
    match error {
        seccompiler::Error::Backend(BackendError::InvalidTargetArch(_)) => true,
        seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error) => {
            matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL))
        }
        seccompiler::Error::Backend(_)
        | seccompiler::Error::EmptyFilter
        | seccompiler::Error::ThreadSync(_) => false,
    }
}

/// Limits the memory, CPU time and file size of a child process, and turns its core dumps off.
///
/// The child runs already, so the limits apply to memory that it takes from now on. A confined thread
/// cannot call this: see `another_process`. There is no limit on the number of processes, since that
/// limit counts all processes and threads of the user, the master's among them.
pub(super) fn limit(child: Pid, memory: u64, cpu: Duration) -> io::Result<()> {
    let child = rustix::process::Pid::from_raw(child.as_raw());
    let seconds = cpu.as_secs();
    for (resource, soft, hard) in [
        // SIGXCPU, and SIGKILL for a process that ignores it.
        (Resource::Cpu, seconds, seconds + 1),
        // Not 0: a pipe to a collector takes a dump of any other length (core(5), fs/coredump.c).
        (Resource::Core, 1, 1),
        (Resource::Fsize, FILE_BYTES_MAX, FILE_BYTES_MAX),
        (Resource::As, memory, memory),
    ] {
        // The child has inherited this hard limit. Raising it takes a capability.
        let inherited = getrlimit(resource).maximum.unwrap_or(u64::MAX);
        let limit = Rlimit {
            current: Some(soft.min(inherited)),
            maximum: Some(hard.min(inherited)),
        };
        prlimit(child, resource, limit)?;
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};

    /// Runs `work` on a thread for which the kernel seems to have no Landlock.
    pub(crate) fn without_landlock<T: Send>(work: impl FnOnce() -> T + Send) -> T {
        let old = || {
            let unknown = rules([(libc::SYS_landlock_create_ruleset, Vec::new())]);
            apply(unknown, libc::ENOSYS).unwrap();
            work()
        };
        thread::scope(|scope| scope.spawn(old).join()).unwrap()
    }

    #[test]
    fn missing_kernel_support_for_the_jail_is_reported() {
        let gaps = without_landlock(gaps);
        assert_eq!(gaps.len(), 1, "{gaps:?}");
        assert!(gaps[0].contains("no Landlock"), "{gaps:?}");
        let old = LandlockStatus::Available {
            effective_abi: ABI::V5,
            kernel_abi: None,
        };
        let gaps = landlock_gaps(old);
        assert!(gaps[0].contains("Linux 6.12"), "{gaps:?}");
        let new = LandlockStatus::Available {
            effective_abi: ABI::V7,
            kernel_abi: None,
        };
        assert_eq!(landlock_gaps(new), [] as [Gap; 0]);
    }

    /// Runs `work` on a confined thread.
    fn confined<T: Send>(work: impl FnOnce() -> T + Send) -> T {
        let nothing = Path::new("/dev/null");
        let cell = Cell {
            program: nothing,
            read: nothing,
            write: nothing,
        };
        let work = || {
            confine(&cell).unwrap();
            work()
        };
        thread::scope(|scope| scope.spawn(work).join()).unwrap()
    }

    #[test]
    fn a_confined_thread_cannot_open_a_socket_and_the_others_can() {
        // As tokio has one for signals.
        let (mut here, mut there) = std::os::unix::net::UnixStream::pair().unwrap();
        let open =
            || std::net::UdpSocket::bind("127.0.0.1:0").map_err(|error| error.raw_os_error());
        let confined = confined(|| {
            here.write_all(b"x").unwrap();
            there.read_exact(&mut [0]).unwrap();
            open()
        });
        assert_eq!(confined.unwrap_err(), Some(libc::EPERM));
        open().unwrap();
    }

    #[test]
    fn a_confined_thread_cannot_change_limits_priority_or_processors_of_the_master() {
        let master = rustix::process::Pid::from_raw(i32::try_from(std::process::id()).unwrap());
        let limit = getrlimit(Resource::Nofile);
        let change = move || {
            let priority = rustix::process::getpriority_process(master).unwrap();
            let processors = rustix::thread::sched_getaffinity(None).unwrap();
            [
                prlimit(master, Resource::Nofile, limit).map(drop),
                rustix::process::setpriority_process(master, priority),
                rustix::thread::sched_setaffinity(master, &processors),
            ]
        };
        assert_eq!(confined(change), [Err(rustix::io::Errno::PERM); 3]);
        assert_eq!(change(), [Ok(()); 3], "the confinement is the reason");
        // The C library reads and sets limits of its own process with the same call.
        confined(|| prlimit(None, Resource::Nofile, limit)).unwrap();
    }

    #[test]
    fn limits_are_set_under_a_lower_inherited_hard_limit() {
        let inherited = |hard| Rlimit {
            current: Some(hard),
            maximum: Some(hard),
        };
        rustix::process::setrlimit(Resource::Core, inherited(0)).unwrap();
        rustix::process::setrlimit(Resource::Cpu, inherited(3600)).unwrap();
        // Without the capability to raise a hard limit.
        let unprivileged = || {
            give_up_privileges().unwrap();
            let mut child = std::process::Command::new("sleep").arg("1000").spawn();
            let child = child.as_mut().unwrap();
            let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
            let limited = limit(pid, 1 << 30, Duration::from_secs(7200));
            let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"));
            child.kill().unwrap();
            child.wait().unwrap();
            limited.map(|()| limits.unwrap())
        };
        let limits = thread::scope(|scope| scope.spawn(unprivileged).join())
            .unwrap()
            .unwrap();
        for (name, value) in [
            ("Max core file size", "0"),
            ("Max cpu time", "3600"),
            ("Max address space", "1073741824"),
            ("Max file size", "1073741824"),
        ] {
            let line = limits.lines().find_map(|line| line.strip_prefix(name));
            let soft = line.and_then(|values| values.split_whitespace().next());
            assert_eq!(soft, Some(value), "{name}");
        }
    }
}
