//! The load test: the real `clamscan` loads the whole set, as the fleet's clamds will.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use clamcast_proto::{DatabaseName, Digest};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::config::LoadTest;
use crate::store::{Store, StoreError};

/// How long a load test may take. Half a gigabyte of signatures takes a slow host two minutes.
pub const TIME_MAX: Duration = Duration::from_secs(10 * 60);

/// How much of what `clamscan` says is kept: a broken database can have a complaint for each of
/// its millions of lines.
pub const OUTPUT_BYTES_MAX: u64 = 64 << 10;

/// How much of it becomes the reason.
const REASON_CHARS_MAX: usize = 400;

/// Why a set did not pass.
#[derive(Debug, thiserror::Error)]
pub enum LoadTestError {
    /// The configuration demands what is not installed.
    #[error(
        "`load_test` is \"always\" and there is no clamscan; install clamav, or set it to \"auto\""
    )]
    NoClamscan,
    /// It does not load.
    #[error("clamscan cannot load the set: {0}")]
    Refused(String),
    /// It was killed, most likely for want of memory.
    #[error(
        "clamscan did not end by itself ({0}); is there memory enough for one more copy of the signatures?"
    )]
    Killed(ExitStatus),
    /// It did not come to an end.
    #[error("clamscan did not load the set within {} s", TIME_MAX.as_secs())]
    TimedOut,
    /// It could not be run.
    #[error("cannot run {}", program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory to load could not be made.
    #[error("cannot prepare the load test")]
    Prepare(#[source] io::Error),
    /// Ours.
    #[error("cannot prepare the load test")]
    Store(#[from] StoreError),
}

impl LoadTestError {
    /// Whether it says nothing about the set: worth another try, for a disk may have been full.
    pub(crate) fn is_ours(&self) -> bool {
        matches!(self, Self::Run { .. } | Self::Prepare(_) | Self::Store(_))
    }
}

/// Runs the test if the rule and what is installed say so.
pub(super) fn run(
    objects: &[(&DatabaseName, &Digest)],
    store: &Store,
    rule: LoadTest,
) -> Result<(), LoadTestError> {
    let program = match (rule, find()) {
        (LoadTest::Never, _) | (LoadTest::Auto, None) => return Ok(()),
        (LoadTest::Always, None) => return Err(LoadTestError::NoClamscan),
        (LoadTest::Auto | LoadTest::Always, Some(program)) => program,
    };
    load(&program, objects, store, TIME_MAX)
}

/// `clamscan` on the search path, or where Debian, Red Hat and a build from source put it, which a
/// service's path need not have.
fn find() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/bin", "/usr/local/bin"].map(PathBuf::from);
    env::split_paths(&path)
        .chain(usual)
        .map(|directory| directory.join("clamscan"))
        .find(|program| program.is_file())
}

fn load(
    program: &Path,
    objects: &[(&DatabaseName, &Digest)],
    store: &Store,
    time_max: Duration,
) -> Result<(), LoadTestError> {
    let place = store.temporary_directory()?;
    // Under their real names: clamscan skips in silence what it does not know by its extension.
    let databases = place.path().join("databases");
    let nothing = place.path().join("nothing");
    let prepare = || {
        fs::create_dir(&databases)?;
        for (name, digest) in objects {
            fs::hard_link(store.object(digest), databases.join(name.as_str()))?;
        }
        File::create(&nothing)
    };
    prepare().map_err(LoadTestError::Prepare)?;
    let mut command = Command::new(program);
    command
        .env("LC_ALL", "C")
        .arg("--no-summary")
        .arg("-d")
        .arg(&databases)
        .arg(&nothing);
    let failed = |source| LoadTestError::Run {
        program: program.to_owned(),
        source,
    };
    let (status, output) = output(command, time_max).map_err(failed)?;
    match status {
        None => Err(LoadTestError::TimedOut),
        Some(status) if status.success() => Ok(()),
        Some(status) if status.code().is_none() => Err(LoadTestError::Killed(status)),
        Some(status) => {
            // The directory has another name each time, and one reason must stay one reason.
            let output = output.replace(&format!("{}/", databases.display()), "");
            Err(LoadTestError::Refused(reason(&output).unwrap_or_else(
                || format!("it ended with {status} and gave no reason"),
            )))
        }
    }
}

/// Runs a command to its end, or until the time is up, and returns how it ended with the beginning
/// of what it said.
fn output(mut command: Command, time_max: Duration) -> io::Result<(Option<ExitStatus>, String)> {
    let (mut said, pipe) = io::pipe()?;
    command
        .process_group(0) // so that a wrapper's own child ends with it
        .stdin(Stdio::null())
        .stdout(pipe.try_clone()?)
        .stderr(pipe);
    let mut child = command.spawn()?;
    drop(command); // our ends of the pipe, so that it ends when the child does
    let (ended, end) = mpsc::channel();
    let reader = thread::spawn(move || {
        let mut head = Vec::new();
        let _ = (&mut said).take(OUTPUT_BYTES_MAX).read_to_end(&mut head);
        // A full pipe would stop the child.
        let _ = io::copy(&mut said, &mut io::sink());
        let _ = ended.send(());
        head
    });
    let in_time = end.recv_timeout(time_max).is_ok();
    if !in_time {
        let group = Pid::from_raw(i32::try_from(child.id()).expect("pids fit"));
        killpg(group, Signal::SIGKILL)?;
    }
    let status = child.wait()?;
    let head = reader.join().unwrap_or_default();
    let head = String::from_utf8_lossy(&head).into_owned();
    Ok((in_time.then_some(status), head))
}

/// The lines in which ClamAV complains.
fn reason(output: &str) -> Option<String> {
    let complaints: Vec<_> = output
        .lines()
        .filter_map(|line| {
            let complaint = line.strip_prefix("LibClamAV Error: ");
            complaint.or_else(|| line.strip_prefix("ERROR: "))
        })
        .collect();
    let text: String = complaints.join("; ");
    let printable = text.chars().map(|c| if c.is_control() { '?' } else { c });
    (!text.is_empty()).then(|| printable.take(REASON_CHARS_MAX).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::open_store;

    fn check(program: &str, time_max: Duration) -> Result<(), LoadTestError> {
        let root = tempfile::tempdir().unwrap();
        let store = open_store(root.path());
        let file = tempfile::tempfile().unwrap();
        let (digest, _) = store.import(&file).unwrap();
        let name = "daily.cud".parse().unwrap();
        let tested = load(Path::new(program), &[(&name, &digest)], &store, time_max);
        let left = fs::read_dir(root.path().join("tmp")).unwrap().count();
        assert_eq!(left, 0, "the test cleans up");
        tested
    }

    #[test]
    fn the_exit_code_decides() {
        assert!(check("/bin/true", TIME_MAX).is_ok());
        let refused = check("/bin/false", TIME_MAX).unwrap_err();
        assert!(refused.to_string().contains("gave no reason"), "{refused}");
    }

    #[test]
    fn a_program_that_talks_without_end_is_stopped() {
        let mut endless = Command::new("sh");
        endless.args(["-c", "yes; true"]); // not by exec: yes is the child of a child
        let (status, said) = output(endless, Duration::from_millis(300)).unwrap();
        assert_eq!((status, said.len() as u64), (None, OUTPUT_BYTES_MAX));
    }

    #[test]
    fn a_program_that_cannot_be_run_is_named() {
        let error = check("/nowhere/clamscan", TIME_MAX).unwrap_err();
        assert_eq!(error.to_string(), "cannot run /nowhere/clamscan");
    }

    #[test]
    fn the_reason_is_what_clamav_complains_of() {
        let output = "LibClamAV Warning: old engine\n\
                      LibClamAV Error: cli_loadhash: Malformed hash at line 3\n\
                      LibClamAV Error: Can't load /x.hsb: Malformed database\n\
                      ERROR: Malformed database\u{7}\n";
        assert_eq!(
            reason(output).unwrap(),
            "cli_loadhash: Malformed hash at line 3; Can't load /x.hsb: Malformed database; \
             Malformed database?"
        );
        assert_eq!(reason("\n"), None);
        let endless = "ERROR: x\n".repeat(10_000);
        assert_eq!(reason(&endless).unwrap().len(), REASON_CHARS_MAX);
    }
}
