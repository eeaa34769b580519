//! Confines the load test: `clamscan` parses what a stranger may have written into the mirror, and
//! must not be able to reach the keys, the network or other processes of this host.
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
use rustix::process::{Resource, Rlimit, prlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, apply_filter,
};

/// The Landlock version that the rules are written for, and tested with. An older kernel enforces
/// those that it knows.
const LANDLOCK: ABI = ABI::V6;

/// Where distributions and builds from source put programs and libraries. Nothing there is secret.
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

/// What the loader, the C library, OpenSSL and ClamAV 1.5 read beside that. Of `/etc` nothing else can
/// be read.
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

/// What a program at PREFIX/bin has beside it: its libraries, and the certificates of ClamAV.
const BESIDE: [&str; 3] = ["lib", "lib64", "etc/certs"];

/// System calls that fail with EPERM. A list of the forbidden ones: libraries change which of the
/// harmless ones they use, and a load test that fails for that would hold back every update.
const FORBIDDEN: &[libc::c_long] = &[
    // The network. io_uring makes sockets without these calls. Sending and receiving stay allowed: no
    // child inherits a socket, and the thread hears of signals through a pair of them.
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // Other processes, and keys that the kernel keeps for this user.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // Namespaces, in which it would have capabilities, and large interfaces of the kernel.
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    // Landlock leaves these to the owner of a file, and the files of the master have the same owner.
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
    // And this one before Linux 6.2.
    libc::SYS_truncate,
];

/// Of these the numbers are the same on every architecture, and not in libc everywhere: fchmodat2,
/// setxattrat, removexattrat, file_setattr.
const FORBIDDEN_NEW: &[libc::c_long] = &[452, 463, 466, 469];

/// The same under older names, which newer architectures do not have.
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

/// On x86-64 some kernels take each system call under a second number, that of the x32 ABI.
const X32: i64 = if cfg!(target_arch = "x86_64") {
    0x4000_0000
} else {
    0
};

/// What the confined program may use.
pub(super) struct Cell<'a> {
    /// The program; what it needs beside it goes with it.
    pub(super) program: &'a Path,
    /// Files and directories to read.
    pub(super) read: &'a Path,
    /// A directory to write in.
    pub(super) write: &'a Path,
}

/// What of the confinement this kernel lacks, as a sentence.
type Gap = String;

/// The thread could not be confined although the kernel has what it takes.
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

/// What the kernel lacks to confine a load test, in sentences for the operator. Empty: nothing.
pub fn gaps() -> Vec<Gap> {
    let nothing = Path::new("/dev/null");
    let cell = Cell {
        program: nothing,
        read: nothing,
        write: nothing,
    };
    // On a thread that does nothing else, since what is given up does not come back.
    let confined = thread::scope(|scope| scope.spawn(|| confine(&cell)).join());
    match confined.expect("it does not panic") {
        Ok(gaps) => gaps,
        Err(error) => vec![format!(
            "the load test cannot be confined, so nothing is published: {}",
            crate::chain(&error)
        )],
    }
}

/// Confines the calling thread, and all that it starts from now on, for good. Returns what this
/// kernel cannot do; the rest is done all the same.
pub(super) fn confine(cell: &Cell<'_>) -> Result<Vec<Gap>, JailError> {
    give_up_privileges().map_err(JailError::Privileges)?;
    let mut gaps = restrict_files(cell).map_err(JailError::Files)?;
    gaps.extend(restrict_calls()?);
    Ok(gaps)
}

fn give_up_privileges() -> io::Result<()> {
    set_no_new_privs(true)?;
    clear_ambient_capability_set()?;
    // Only a thread that may change this set can; another one gains nothing by it without privileges.
    for capability in CapabilitySet::all().iter() {
        let _ = remove_capability_from_bounding_set(capability);
    }
    let none = CapabilitySet::empty();
    set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )?;
    Ok(())
}

fn restrict_files(cell: &Cell<'_>) -> Result<Vec<Gap>, landlock::RulesetError> {
    // PREFIX/bin/PROGRAM; of a symbolic link, where it leads.
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
            "this kernel has no Landlock: clamscan can read in a load test whatever the master can, \
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
    let forbidden = FORBIDDEN.iter().chain(FORBIDDEN_NEW).chain(FORBIDDEN_OLD);
    let mut rules = rules(forbidden.map(|&call| (call, Vec::new())));
    rules.extend(self::rules([(libc::SYS_clone, vec![user_namespace()])]));
    // The flags of this one are out of a filter's sight; without it the C library uses the other.
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

/// Matches a `clone` that makes a user namespace, in which the process would have capabilities. All
/// other namespaces take one.
fn user_namespace() -> SeccompRule {
    let flag = u64::try_from(libc::CLONE_NEWUSER).expect("a flag");
    let is_set = SeccompCmpOp::MaskedEq(flag);
    SeccompCondition::new(0, SeccompCmpArgLen::Qword, is_set, flag)
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

/// Whether a kernel without filters, or this architecture, is the reason.
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

/// Limits the memory and the CPU time of a process, and turns its core dumps off.
///
/// It runs already, so this binds what it takes from now on.
pub(super) fn limit(process: Pid, memory: u64, cpu: Duration) -> io::Result<()> {
    let process = rustix::process::Pid::from_raw(process.as_raw());
    let seconds = cpu.as_secs();
    for (resource, soft, hard) in [
        (Resource::As, memory, memory),
        // SIGXCPU, and SIGKILL for a process that ignores it.
        (Resource::Cpu, seconds, seconds + 1),
        // Not 0: a pipe to a collector takes a dump of any other length (core(5), fs/coredump.c).
        (Resource::Core, 1, 1),
    ] {
        let limit = Rlimit {
            current: Some(soft),
            maximum: Some(hard),
        };
        prlimit(process, resource, limit)?;
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};

    /// Runs `work` on a thread whose kernel has no Landlock, as far as it can tell.
    pub(crate) fn without_landlock<T: Send>(work: impl FnOnce() -> T + Send) -> T {
        let old = || {
            let unknown = rules([(libc::SYS_landlock_create_ruleset, Vec::new())]);
            apply(unknown, libc::ENOSYS).unwrap();
            work()
        };
        thread::scope(|scope| scope.spawn(old).join()).unwrap()
    }

    #[test]
    fn what_the_kernel_lacks_for_the_jail_is_reported() {
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

    #[test]
    fn a_confined_thread_cannot_open_a_socket_and_the_others_can() {
        let nothing = Path::new("/dev/null");
        let cell = Cell {
            program: nothing,
            read: nothing,
            write: nothing,
        };
        // As tokio has one for signals.
        let (mut here, mut there) = std::os::unix::net::UnixStream::pair().unwrap();
        let open =
            || std::net::UdpSocket::bind("127.0.0.1:0").map_err(|error| error.raw_os_error());
        let confined = thread::scope(|scope| {
            let confined = scope.spawn(|| {
                confine(&cell).unwrap();
                here.write_all(b"x").unwrap();
                there.read_exact(&mut [0]).unwrap();
                open()
            });
            confined.join().unwrap()
        });
        assert_eq!(confined.unwrap_err(), Some(libc::EPERM));
        open().unwrap();
    }
}
