//! The load test: the real `clamscan` loads the whole set, as the fleet's clamds will.

use std::fs;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::ExitStatus;
use std::thread;
use std::time::Duration;

use clamcast_daemon::clamscan::{self, LoadError};
use clamcast_proto::{DatabaseName, Digest};
use nix::sys::signal::Signal;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use super::jail::{self, Cell, JailError};
use crate::config::LoadTest;
use crate::store::{Store, StoreError};

/// How long a load test may take. Half a gigabyte of signatures takes a slow host two minutes.
pub const TIME_MAX: Duration = Duration::from_secs(10 * 60);

/// How much address space clamscan may take, in bytes, beside [`MEMORY_FACTOR`].
const MEMORY_BASE: u64 = 2 << 30;

/// How much of it for each byte of the databases. Too little would hold back every update, so both
/// are far above what clamscan 1.4.6 was measured to take: 5 for each byte of a set like the official
/// ones, 19 of `.ldb` files, 78 of the shortest `.ndb` signatures (0.8 GiB for 10 MiB), and 1.3 GiB for
/// YARA rules however few.
const MEMORY_FACTOR: u64 = 32;

/// Signals that end a program for a mistake of its own. Databases that make clamscan crash would make
/// clamd crash, on every host.
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
    /// It does not load, or clamscan could not find out.
    #[error(transparent)]
    Clamscan(LoadError),
    /// The databases crash the loader.
    #[error(
        "clamscan crashed with {signal} while it loaded the databases; clamd would do the same"
    )]
    Crashed {
        /// How it ended.
        signal: Signal,
    },
    /// It was stopped by its limit.
    #[error("clamscan was stopped after {limit:?} of CPU time")]
    CpuTime {
        /// The limit.
        limit: Duration,
    },
    /// Memory of this host or its limit was not enough, or something else of this host.
    #[error("clamscan could not load the databases in {} MiB of memory", memory >> 20)]
    Hindered {
        /// Its limit in bytes.
        memory: u64,
        /// What it said, or how it ended.
        source: LoadError,
    },
    /// The daemon stops, and clamscan with it.
    #[error("the daemon stops")]
    Stopping,
    /// The directory to load could not be made, or nothing be run at all.
    #[error("cannot prepare the load test")]
    Prepare(#[source] io::Error),
    /// Without its confinement it does not run.
    #[error("cannot confine the load test")]
    Jail(#[from] JailError),
    /// Ours.
    #[error("cannot prepare the load test")]
    Store(#[from] StoreError),
}

impl LoadTestError {
    /// Whether it says nothing about the set and is worth another try: memory or a disk may have
    /// been full.
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
            | Self::Hindered { .. }
            | Self::Stopping
            | Self::Prepare(_)
            | Self::Jail(_)
            | Self::Store(_) => true,
        }
    }

    /// What the error of a run with these limits means here.
    fn of(error: LoadError, limits: &Limits) -> Self {
        match error {
            LoadError::NoReason { status } => match signal(status) {
                Some(signal) if CRASHES.contains(&signal) => Self::Crashed { signal },
                Some(Signal::SIGXCPU) => Self::CpuTime { limit: limits.cpu },
                Some(_) | None => Self::Hindered {
                    memory: limits.memory,
                    source: error,
                },
            },
            LoadError::Hindered { .. } => Self::Hindered {
                memory: limits.memory,
                source: error,
            },
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

/// What clamscan may use up.
#[derive(Clone, Copy)]
struct Limits {
    /// Address space in bytes.
    memory: u64,
    /// CPU time of all its threads.
    cpu: Duration,
}

impl Limits {
    /// For databases of so many bytes.
    fn for_databases(bytes: u64) -> Self {
        Self {
            memory: MEMORY_BASE + MEMORY_FACTOR * bytes,
            // It has one thread, and cannot use more before it is stopped; but a process that outlives
            // this daemon ends by this limit alone.
            cpu: TIME_MAX,
        }
    }
}

/// Runs the test if the rule and what is installed say so. Blocks until it is done, or until
/// `stop`.
pub(super) fn run(
    objects: &[(&DatabaseName, &Digest)],
    store: &Store,
    rule: LoadTest,
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
    load(
        &program,
        objects,
        store,
        &Limits::for_databases(bytes),
        stop,
    )
}

fn load(
    program: &Path,
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
    for (name, digest) in objects {
        // Under their real names: clamscan skips in silence what it does not know by its extension.
        fs::hard_link(store.object(digest), databases.join(name.as_str()))
            .map_err(LoadTestError::Prepare)?;
    }
    let cell = Cell {
        program,
        read: &databases,
        write: &temporary,
    };
    let confined = || {
        // Made before the thread is confined: the first one opens a pair of sockets for signals.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(LoadTestError::Prepare)?;
        jail::confine(&cell)?; // what the kernel lacks was reported at the start
        runtime.block_on(async {
            let mut command = Command::new(program);
            command.env_clear().env("TMPDIR", &temporary);
            let limit = |process| jail::limit(process, limits.memory, limits.cpu);
            tokio::select! {
                biased;
                () = stop.cancelled() => Err(LoadTestError::Stopping),
                loaded = clamscan::run(command, &databases, TIME_MAX, limit) => {
                    loaded.map_err(|error| LoadTestError::of(error, limits))
                }
            }
        })
    };
    // A thread of its own, since the confinement is for good; on it clamscan and `stop` are waited for
    // together.
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("load-test".to_owned());
        let testing = thread.spawn_scoped(scope, confined);
        let tested = testing.map_err(LoadTestError::Prepare)?.join();
        tested.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publish::check::jail::tests::without_landlock;
    use crate::store::tests::open_store;
    use std::net::TcpListener;
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::PathBuf;
    use tempfile::TempDir;

    /// One object in a store, and a shell script in the place of clamscan: a fake, for the real one
    /// cannot be made to fail as it does on a host without memory, or to attack its host.
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

        /// What the script writes into its temporary directory as `file`, once it is whole.
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
    fn only_the_word_of_libclamav_and_a_crash_are_held_against_the_set() {
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
            // It lacked memory, and died of what it did not get.
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
    fn memory_and_cpu_time_of_the_load_test_are_limited_and_their_lack_refuses_nothing() {
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
        // The limits come once it runs. `tail` keeps a line until it ends.
        let script = "while [ \"$(ulimit -v)\" = unlimited ]; do :; done; \
                      yes | tr -d '\\n' | head -c 300000000 | tail -n 1 > /dev/null && exit 0; \
                      exit 2";
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
        // In the place of the key that signs manifests.
        let secret = tempfile::NamedTempFile::new().unwrap();
        fs::write(secret.path(), "secret").unwrap();
        let secret = secret.path().display();
        // Not `:`, at whose failed redirection a shell ends.
        check(&format!(
            "! cat {secret} && ! true >> {secret} && ! chmod 666 {secret}"
        ))
        .unwrap();
        check("! true > \"$3/daily.cud\" && ! true > \"$3/new\" && ! chmod 666 \"$3/daily.cud\"")
            .unwrap();
        check("! cat /etc/passwd && ! ls /etc && ! ls / && ! ls /proc").unwrap();
        check(&format!("! cat /proc/{}/environ", std::process::id())).unwrap();
        check("echo mine > \"$TMPDIR/file\" && cat \"$TMPDIR/file\"").unwrap();
        // Without the jail the same commands succeed, so it is the jail that forbids them.
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
        assert!(unconfined.unwrap().success(), "it can be connected to");
        let error = check(&script).unwrap_err();
        assert!(matches!(error, LoadTestError::Hindered { .. }), "{error}");
        let said = "bash -c ': > /dev/tcp/127.0.0.1/PORT' 2>&1 | grep -q 'Operation not permitted'";
        check(&said.replace("PORT", &port.to_string())).unwrap();
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
                thread::yield_now(); // the limits come once it runs
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
            assert_eq!(limit("Max core file size"), "1");
        });
    }

    #[test]
    fn a_stop_ends_it_at_once() {
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
