//! The load test: the real `clamscan` loads the whole set, as the fleet's clamds will.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use clamcast_daemon::clamscan::{self, LoadError};
use clamcast_proto::{DatabaseName, Digest};
use nix::sys::signal::Signal;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use super::jail::{self, Cell, JailError};
use super::service::{self, ServiceError};
use crate::config::LoadTest;
use crate::store::{Store, StoreError};

/// How long a load test may take. Half a gigabyte of signatures takes a slow host two minutes.
pub const TIME_MAX: Duration = Duration::from_secs(10 * 60);

/// Address space of clamscan in bytes, in addition to [`MEMORY_FACTOR`]. clamscan 1.4.6 takes 1.3 GiB
/// for YARA rules however few.
const MEMORY_BASE: u64 = 2 << 30;

/// Address space of clamscan in bytes for each byte of the databases. Too little would hold back every
/// update. clamscan 1.4.6 takes 5 bytes for a set like the official one, 19 for `.ldb` files, and 78
/// for the shortest `.ndb` signatures (0.8 GiB for 10 MiB).
const MEMORY_FACTOR: u64 = 128;

/// How much more address space clamscan may take after a crash. Code that does not check the result of
/// an allocation crashes at a memory limit, so a crash counts only if clamscan repeats it with far more
/// memory than any measured set needs. Without any limit the host would run out of memory.
const MEMORY_RETRY_FACTOR: u64 = 8;

/// Signals that end a crashed program. Databases that crash clamscan would crash clamd on every host.
const CRASHES: [Signal; 5] = [
    Signal::SIGABRT,
    Signal::SIGBUS,
    Signal::SIGFPE,
    Signal::SIGILL,
    Signal::SIGSEGV,
];

/// Why a set did not pass.
#[derive(Debug, thiserror::Error)]
pub enum LoadTestError {
    /// The configuration demands what is not installed.
    #[error(
        "`load_test` is \"always\" and there is no clamscan; install clamav, or set it to \"auto\""
    )]
    NoClamscan,
    /// The set does not load, or clamscan gave no verdict.
    #[error(transparent)]
    Clamscan(LoadError),
    /// The databases crash the loader.
    #[error(
        "clamscan crashed with {signal} while it loaded the databases; clamd would do the same"
    )]
    Crashed {
        /// The signal that ended clamscan.
        signal: Signal,
    },
    /// The CPU time limit ended clamscan.
    #[error("clamscan reached its limit of CPU time, which is at most {limit:?}")]
    CpuTime {
        /// The limit, unless the daemon has inherited a lower one.
        limit: Duration,
    },
    /// The memory of this host or the memory limit was not enough.
    #[error("clamscan could not load the databases in {} MiB of memory", memory >> 20)]
    Memory {
        /// The limit in bytes.
        memory: u64,
        /// The message or the end of clamscan.
        source: LoadError,
    },
    /// The confinement or this host kept clamscan from a verdict.
    #[error("clamscan could not run in its confinement")]
    Hindered {
        /// The message or the end of clamscan.
        source: LoadError,
    },
    /// The daemon stops, and clamscan with it.
    #[error("the daemon stops")]
    Stopping,
    /// The directories, the thread or its runtime could not be made.
    #[error("cannot prepare the load test")]
    Prepare(#[source] io::Error),
    /// The confinement failed, so clamscan was not started.
    #[error("cannot confine the load test")]
    Jail(#[from] JailError),
    /// The store failed.
    #[error("cannot prepare the load test")]
    Store(#[from] StoreError),
    /// The service that runs clamscan failed.
    #[error(
        "the load test service at {socket} failed; see `journalctl -u 'clamcast-loadtest@*'`, or stop \
         clamcast-loadtest.socket and the daemon runs clamscan itself"
    )]
    Service {
        /// Its socket.
        socket: PathBuf,
        /// Why.
        source: ServiceError,
    },
}

impl LoadTestError {
    /// Whether the error says nothing about the set, so that the test is repeated: memory or a disk
    /// may have been full.
    pub(crate) fn is_ours(&self) -> bool {
        match self {
            Self::NoClamscan | Self::Clamscan(LoadError::Refused { .. }) | Self::Crashed { .. } => {
                false
            }
            Self::Clamscan(
                LoadError::Hindered { .. }
                | LoadError::NoReason { .. }
                | LoadError::TimedOut { .. }
                | LoadError::Run { .. },
            )
            | Self::CpuTime { .. }
            | Self::Memory { .. }
            | Self::Hindered { .. }
            | Self::Stopping
            | Self::Prepare(_)
            | Self::Jail(_)
            | Self::Store(_)
            | Self::Service { .. } => true,
        }
    }

    /// libclamav's own words about the set, if it refused it.
    pub(crate) fn refusal(&self) -> Option<&str> {
        if let Self::Clamscan(LoadError::Refused { reason }) = self {
            return Some(reason);
        }
        None
    }

    /// Whether time or memory ran out.
    pub(crate) fn is_about_resources(&self) -> bool {
        matches!(
            self,
            Self::CpuTime { .. } | Self::Memory { .. } | Self::Clamscan(LoadError::TimedOut { .. })
        )
    }

    /// Converts the error of a run with these limits.
    fn of(error: LoadError, limits: &Limits) -> Self {
        let memory = limits.memory;
        match &error {
            LoadError::NoReason { status } => match signal(*status) {
                Some(signal) if CRASHES.contains(&signal) => Self::Crashed { signal },
                Some(Signal::SIGXCPU) => Self::CpuTime { limit: limits.cpu },
                // The kernel kills with it where memory ran out.
                Some(Signal::SIGKILL) => Self::Memory {
                    memory,
                    source: error,
                },
                Some(_) | None => Self::Hindered { source: error },
            },
            LoadError::Hindered { reason } if clamscan::is_about_memory(reason) => Self::Memory {
                memory,
                source: error,
            },
            LoadError::Hindered { .. } => Self::Hindered { source: error },
            LoadError::Refused { .. } | LoadError::TimedOut { .. } | LoadError::Run { .. } => {
                Self::Clamscan(error)
            }
        }
    }
}

/// The signal that ended the program.
fn signal(status: ExitStatus) -> Option<Signal> {
    Signal::try_from(status.signal()?).ok()
}

/// Resource limits of clamscan.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// Address space in bytes.
    pub(super) memory: u64,
    /// CPU time of all its threads.
    pub(super) cpu: Duration,
}

impl Limits {
    /// The limits for databases of this total size.
    pub(super) fn for_databases(bytes: u64) -> Self {
        Self {
            memory: MEMORY_BASE + MEMORY_FACTOR * bytes,
            // clamscan has one thread, so TIME_MAX ends it first. This limit ends a process that
            // outlives this daemon.
            cpu: TIME_MAX,
        }
    }
}

/// Runs the load test if the rule demands one, or permits one and clamscan is installed. Blocks until
/// the test ends or `stop` is cancelled. The service at the socket `service` runs clamscan, or, if
/// there is no such socket, this process.
pub(super) fn run(
    objects: &[(&DatabaseName, &Digest)],
    store: &Store,
    rule: LoadTest,
    service: &Path,
    stop: &CancellationToken,
) -> Result<(), LoadTestError> {
    let program = match (rule, clamscan::find()) {
        (LoadTest::Never, _) | (LoadTest::Auto, None) => return Ok(()),
        (LoadTest::Always, None) => return Err(LoadTestError::NoClamscan),
        (LoadTest::Auto | LoadTest::Always, Some(program)) => program,
    };
    let sizes = objects.iter().map(|(_, digest)| {
        let object = fs::metadata(store.object(digest));
        object.map(|object| object.len())
    });
    let bytes = sizes
        .sum::<io::Result<u64>>()
        .map_err(LoadTestError::Prepare)?;
    let limits = Limits::for_databases(bytes);
    load(&program, service, objects, store, &limits, stop)
}

fn load(
    program: &Path,
    service: &Path,
    objects: &[(&DatabaseName, &Digest)],
    store: &Store,
    limits: &Limits,
    stop: &CancellationToken,
) -> Result<(), LoadTestError> {
    let tested = load_once(program, service, objects, store, limits, stop);
    let Err(LoadTestError::Crashed { signal }) = tested else {
        return tested;
    };
    tracing::warn!(%signal, "clamscan crashed, repeating the load test with more memory");
    let limits = Limits {
        memory: limits.memory.saturating_mul(MEMORY_RETRY_FACTOR),
        ..*limits
    };
    load_once(program, service, objects, store, &limits, stop)
}

fn load_once(
    program: &Path,
    service: &Path,
    objects: &[(&DatabaseName, &Digest)],
    store: &Store,
    limits: &Limits,
    stop: &CancellationToken,
) -> Result<(), LoadTestError> {
    let place = store.temporary_directory()?;
    let (databases, temporary) = (place.path().join("db"), place.path().join("tmp"));
    for directory in [&databases, &temporary] {
        fs::create_dir(directory).map_err(LoadTestError::Prepare)?;
    }
    // The service has another user, and gets the directory as a descriptor. No other user passes the
    // directory above it.
    fs::set_permissions(&databases, Permissions::from_mode(0o755))
        .map_err(LoadTestError::Prepare)?;
    for (name, digest) in objects {
        // Under their real names: clamscan skips files with unknown extensions without a message.
        fs::hard_link(store.object(digest), databases.join(name.as_str()))
            .map_err(LoadTestError::Prepare)?;
    }
    let loaded = match service::load(service, &databases, limits, stop) {
        Some(loaded) => loaded?,
        None => confined(program, &databases, &temporary, limits, stop)?,
    };
    loaded.map_err(|error| LoadTestError::of(error, limits))
}

/// Runs `program`, a clamscan, on `databases` within the limits and the confinement. It can write only
/// in `temporary`.
pub(super) fn confined(
    program: &Path,
    databases: &Path,
    temporary: &Path,
    limits: &Limits,
    stop: &CancellationToken,
) -> Result<Result<(), LoadError>, LoadTestError> {
    let cell = Cell {
        program,
        read: databases,
        write: temporary,
    };
    let (started, children) = mpsc::channel();
    let (limited, outcome) = mpsc::channel();
    let cell = &cell;
    let confined = move || {
        // Made before the thread is confined: the first runtime opens a pair of sockets for signals.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(LoadTestError::Prepare)?;
        jail::confine(cell)?; // the start of the daemon reports what the kernel lacks
        runtime.block_on(async {
            let mut command = Command::new(program);
            command.env_clear().env("TMPDIR", cell.write);
            let limit = |child| {
                let asked = started.send(child).ok();
                asked
                    .and_then(|()| outcome.recv().ok())
                    .expect("the unconfined thread answers for as long as this one runs")
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => Err(LoadTestError::Stopping),
                loaded = clamscan::run(command, cell.read, TIME_MAX, limit) => Ok(loaded),
            }
        })
    };
    // On a thread of its own, since a thread stays confined. This thread sets the limits, which a
    // confined one cannot.
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("load-test".to_owned());
        let testing = thread
            .spawn_scoped(scope, confined)
            .map_err(LoadTestError::Prepare)?;
        for child in children {
            // An error means that the confined thread has ended.
            let _ = limited.send(jail::limit(child, limits.memory, limits.cpu));
        }
        let tested = testing.join();
        tested.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publish::check::jail::tests::without_landlock;
    use crate::store::tests::open_store;
    use std::net::TcpListener;
    use tempfile::TempDir;

    /// One object in a store, and a shell script in the place of clamscan. The script is a fake: a test
    /// cannot make the real clamscan run out of memory at will, or attack its host.
    struct Scene {
        root: TempDir,
        store: Store,
        program: PathBuf,
    }

    impl Scene {
        fn new(script: &str) -> Self {
            let root = tempfile::tempdir().unwrap();
            let store = open_store(root.path());
            let program = root.path().join("fake/bin/clamscan");
            fs::create_dir_all(program.parent().unwrap()).unwrap();
            fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
            Self {
                root,
                store,
                program,
            }
        }

        fn test(&self, limits: Limits, stop: &CancellationToken) -> Result<(), LoadTestError> {
            let file = tempfile::tempfile().unwrap();
            let (digest, _) = self.store.import(&file).unwrap();
            let name = "daily.cud".parse().unwrap();
            // A test beside this one may be about to start a process that still has the script open.
            let tested = loop {
                match load(
                    &self.program,
                    Path::new("/nowhere/loadtest.sock"),
                    &[(&name, &digest)],
                    &self.store,
                    &limits,
                    stop,
                ) {
                    Err(LoadTestError::Clamscan(LoadError::Run { source, .. }))
                        if source.kind() == io::ErrorKind::ExecutableFileBusy => {}
                    tested => break tested,
                }
            };
            let left = fs::read_dir(self.root.path().join("tmp")).unwrap().count();
            assert_eq!(left, 0, "the test cleans up");
            tested
        }

        /// The content of `file` in the script's temporary directory, once a line of it is complete.
        fn wait_for(&self, file: &str, is_over: impl Fn() -> bool) -> Option<String> {
            while !is_over() {
                for place in fs::read_dir(self.root.path().join("tmp")).unwrap() {
                    let path = place.unwrap().path().join("tmp").join(file);
                    if let Ok(text) = fs::read_to_string(path)
                        && text.ends_with('\n')
                    {
                        return Some(text);
                    }
                }
                thread::yield_now();
            }
            None
        }
    }

    fn check(script: &str) -> Result<(), LoadTestError> {
        Scene::new(script).test(Limits::for_databases(0), &CancellationToken::new())
    }

    #[test]
    fn the_databases_are_there_under_their_names() {
        check("test -f \"$3/daily.cud\"").unwrap();
    }

    #[test]
    fn a_set_is_refused_only_for_an_error_of_libclamav_or_a_crash() {
        for (script, is_ours) in [
            ("echo 'ERROR: Malformed database' >&2; exit 2", false),
            ("echo \"ERROR: Can't allocate memory\" >&2; exit 2", true),
            ("kill -KILL $$", true),
            ("kill -TERM $$", true),
            ("exit 2", true),
            ("kill -ABRT $$", false),
            ("kill -BUS $$", false),
            ("kill -FPE $$", false),
            ("kill -ILL $$", false),
            ("kill -SEGV $$", false),
            // An allocation failed, and clamscan crashed for it.
            (
                "echo \"LibClamAV Error: mpool_malloc(): Can't allocate memory\" >&2; kill -SEGV $$",
                true,
            ),
            (
                "echo 'memory allocation of 4096 bytes failed' >&2; kill -ABRT $$",
                true,
            ),
        ] {
            let error = check(script).unwrap_err();
            assert_eq!(error.is_ours(), is_ours, "{script}: {error}");
        }
    }

    #[test]
    fn a_crash_of_clamscan_is_a_refusal_that_names_the_signal() {
        let error = check("kill -SEGV $$").unwrap_err();
        assert!(
            error.to_string().contains("crashed with SIGSEGV"),
            "{error}"
        );
    }

    #[test]
    fn memory_is_named_only_where_memory_ran_out() {
        let memory = "clamscan could not load the databases in 2048 MiB of memory";
        let confinement = "clamscan could not run in its confinement";
        for (script, expected, reason) in [
            (
                "echo \"ERROR: Can't allocate memory\" >&2; exit 2",
                memory,
                "Can't allocate memory",
            ),
            ("kill -KILL $$", memory, "SIGKILL"),
            ("kill -TERM $$", confinement, "SIGTERM"),
            ("exec /nowhere/clamscan", confinement, "127"),
            (
                "cat /etc/shadow || exit 2",
                confinement,
                "Permission denied",
            ),
            (
                "echo 'ERROR: write: No space left on device' >&2; exit 2",
                confinement,
                "No space left on device",
            ),
        ] {
            let error = check(script).unwrap_err();
            assert_eq!(error.to_string(), expected, "{script}");
            let said = crate::chain(&error);
            assert!(said.contains(reason), "{script}: {said}");
            assert_eq!(said.contains("memory"), expected == memory, "{said}");
        }
    }

    #[test]
    fn a_crash_that_a_larger_memory_limit_prevents_is_no_refusal() {
        let narrow = Limits {
            memory: 512 << 20,
            ..Limits::for_databases(0)
        };
        // The limits come once the script runs. ulimit counts in KiB.
        let scene = Scene::new(
            "while [ \"$(ulimit -v)\" = unlimited ]; do :; done; \
             [ \"$(ulimit -v)\" -gt 524288 ] || kill -SEGV $$",
        );
        scene.test(narrow, &CancellationToken::new()).unwrap();
    }

    #[test]
    fn memory_and_cpu_time_of_the_load_test_are_limited_and_exceeding_them_is_no_refusal() {
        let generous = Limits::for_databases(0);
        let short = Limits {
            cpu: Duration::from_secs(1),
            ..generous
        };
        let scene = Scene::new("while :; do :; done");
        let error = scene.test(short, &CancellationToken::new()).unwrap_err();
        assert!(matches!(error, LoadTestError::CpuTime { .. }), "{error}");
        assert!(error.is_ours());

        let narrow = Limits {
            memory: 128 << 20,
            ..generous
        };
        // The limits come once the script runs. `tail` keeps a line until it is complete.
        let script = "while [ \"$(ulimit -v)\" = unlimited ]; do :; done; \
                      yes | tr -d '\\n' | head -c 300000000 | tail -n 1 > /dev/null && exit 0; \
                      echo \"ERROR: Can't allocate memory\" >&2; exit 2";
        check(script).unwrap();
        let stop = CancellationToken::new();
        let error = Scene::new(script).test(narrow, &stop).unwrap_err();
        assert!(error.is_ours(), "{error}");
        assert!(
            error.to_string().contains("in 128 MiB of memory"),
            "{error}"
        );
    }

    #[test]
    fn the_load_test_reads_nothing_but_its_input_and_writes_nothing_but_its_own_files() {
        // Stands for the key that signs manifests.
        let secret = tempfile::NamedTempFile::new().unwrap();
        fs::write(secret.path(), "secret").unwrap();
        let secret = secret.path().display();
        // `true` and not `:`, since a failed redirection of `:` ends the shell.
        check(&format!(
            "! cat {secret} && ! true >> {secret} && ! chmod 666 {secret}"
        ))
        .unwrap();
        check("! true > \"$3/daily.cud\" && ! true > \"$3/new\" && ! chmod 666 \"$3/daily.cud\"")
            .unwrap();
        check("! cat /etc/passwd && ! ls /etc && ! ls / && ! ls /proc").unwrap();
        check(&format!("! cat /proc/{}/environ", std::process::id())).unwrap();
        check("echo mine > \"$TMPDIR/file\" && cat \"$TMPDIR/file\"").unwrap();
        // Without the jail the same command succeeds.
        assert_eq!(fs::read_to_string(secret.to_string()).unwrap(), "secret");
        let scene = Scene::new(&format!("cat {secret}"));
        let limits = Limits::for_databases(0);
        let free = without_landlock(|| scene.test(limits, &CancellationToken::new()));
        free.unwrap();
    }

    #[test]
    fn the_load_test_has_no_network() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        // dash has no sockets.
        let script = format!("exec bash -c ': > /dev/tcp/127.0.0.1/{port}' 2> \"$TMPDIR/said\"");
        let unconfined = std::process::Command::new("bash")
            .args(["-c", &format!(": > /dev/tcp/127.0.0.1/{port}")])
            .status();
        assert!(unconfined.unwrap().success(), "the port is open");
        let error = check(&script).unwrap_err();
        assert!(matches!(error, LoadTestError::Hindered { .. }), "{error}");
        let said = "bash -c ': > /dev/tcp/127.0.0.1/PORT' 2>&1 | grep -q 'Operation not permitted'";
        check(&said.replace("PORT", &port.to_string())).unwrap();
    }

    #[test]
    fn the_load_test_cannot_start_a_session() {
        check(
            "! setsid --wait true 2> \"$TMPDIR/said\" && grep -q 'not permitted' \"$TMPDIR/said\"",
        )
        .unwrap();
    }

    #[test]
    fn the_load_test_has_no_capabilities_no_way_to_get_some_and_no_environment_of_ours() {
        let scene = Scene::new("echo $$ > \"$TMPDIR/pid\"; sleep 1000 & wait");
        let stop = CancellationToken::new();
        thread::scope(|scope| {
            let testing = scope.spawn(|| scene.test(Limits::for_databases(0), &stop));
            let pid = scene.wait_for("pid", || testing.is_finished());
            let proc = |file: &str| {
                let pid = pid.as_deref().unwrap_or_default().trim();
                fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default()
            };
            let memory = format!(" {MEMORY_BASE} ");
            while !proc("limits").contains(&memory) && !testing.is_finished() {
                thread::yield_now(); // the limits come once the script runs, that of memory last
            }
            let [status, environment, limits] = ["status", "environ", "limits"].map(proc);
            stop.cancel();
            let tested = testing.join().unwrap();
            assert!(matches!(tested, Err(LoadTestError::Stopping)), "{tested:?}");

            let field = |name: &str| {
                let value = status.lines().find_map(|line| line.strip_prefix(name));
                value.unwrap().trim().to_owned()
            };
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
                assert_eq!(field(set), "0000000000000000", "{set}");
            }
            assert_eq!(field("NoNewPrivs:"), "1");
            assert_eq!(field("Seccomp:"), "2", "a filter");
            let pairs = environment.split_terminator('\0');
            let mut names: Vec<_> = pairs.map(|pair| pair.split('=').next()).collect();
            names.sort();
            assert_eq!(names, [Some("LC_ALL"), Some("TMPDIR")]);
            let limit = |name: &str| {
                let line = limits.lines().find_map(|line| line.strip_prefix(name));
                line.unwrap().split_whitespace().next().unwrap().to_owned()
            };
            assert_eq!(limit("Max address space"), MEMORY_BASE.to_string());
            let inherited = rustix::process::getrlimit(rustix::process::Resource::Core).maximum;
            let core = inherited.unwrap_or(u64::MAX).min(1);
            assert_eq!(limit("Max core file size"), core.to_string());
            assert_eq!(limit("Max file size"), (1_u64 << 30).to_string());
        });
    }

    #[test]
    fn a_stop_ends_the_load_test_at_once() {
        let stop = CancellationToken::new();
        let scene = Scene::new("echo yes > \"$TMPDIR/started\"; sleep 1000");
        let tested = thread::scope(|scope| {
            let testing = scope.spawn(|| scene.test(Limits::for_databases(0), &stop));
            scene.wait_for("started", || testing.is_finished());
            stop.cancel();
            testing.join().unwrap()
        });
        assert!(matches!(tested, Err(LoadTestError::Stopping)), "{tested:?}");
    }
}
