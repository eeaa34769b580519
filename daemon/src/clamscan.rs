//! Loads a directory of databases with the real `clamscan`. It has the same loader as clamd, and
//! reports details that clamd's log lacks.

use std::env;
use std::fs;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// How much of stderr is kept, in bytes. The reason comes last, after a warning for every odd line.
const SAID_BYTES_MAX: usize = 16 << 10;

/// How many errors make a reason: the line, the file, the kind.
const ERRORS_MAX: usize = 3;

/// How long a reason is at most, in characters: [`ERRORS_MAX`] errors with a file name of 255 bytes
/// each. It goes into audit lines and receipts.
const REASON_CHARS_MAX: usize = 1000;

/// Longest line of stderr that is examined, in bytes. The lines that matter are far shorter.
const LINE_BYTES_MAX: usize = 8 << 10;

/// The exit code of clamscan when it cannot load its databases.
const EXIT_ERROR: i32 = 2;

/// Phrases, in lower case, that report a lack of memory. Most are libclamav's own. Measured with
/// clamscan 1.4.6 under 190 memory limits: the last line often says `Malformed database`, and a line
/// before it always has one of these. [`Misleading`] keeps file names from matching.
const LACK_OF_MEMORY: [&str; 9] = [
    "can't map file into memory",
    "can't allocate",
    "cannot allocate",
    "failed to allocate",
    "can't realloc",
    "failed to grow",
    "out of memory",
    "memory allocation of",         // Rust's, before it aborts
    "instance of 'std::bad_alloc'", // C++'s
];

/// Phrases, in lower case, that report other trouble of the host: rights, space, limits. The first ones
/// are libclamav's own (`cl_strerror` in libclamav/others.c), the others are strerror(3)'s.
const OTHER_TROUBLE: [&str; 17] = [
    "can't open file or directory",
    "can't create new file",
    "can't unlink file",
    "can't get file status",
    "can't read file",
    "can't write to file",
    "can't access file",
    "can't create temporary",
    "mutex lock failed",
    "no space left on device",
    "disk quota exceeded",
    "permission denied",
    "operation not permitted",
    "too many open files",
    "read-only file system",
    "input/output error",
    "resource temporarily unavailable",
];

/// Why databases were not loaded. Only [`LoadError::Refused`] says anything about them.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The databases are at fault; libclamav's own words.
    #[error("clamscan cannot load the databases: {reason}")]
    Refused {
        /// The file and what is wrong with it.
        reason: String,
    },
    /// This host is at fault; libclamav's own words.
    #[error("clamscan met trouble of this host: {reason}")]
    Hindered {
        /// Memory, space or rights.
        reason: String,
    },
    /// clamscan was killed, or failed without a message.
    #[error("clamscan gave no reason ({status}){}", no_reason_hint(*status))]
    NoReason {
        /// The signal or exit code.
        status: ExitStatus,
    },
    /// clamscan exceeded its time, and was killed.
    #[error("clamscan was not done after {limit:?}")]
    TimedOut {
        /// The time limit.
        limit: Duration,
    },
    /// clamscan could not be run.
    #[error("cannot run {program}")]
    Run {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The kernel kills with SIGKILL where memory ran out.
fn no_reason_hint(status: ExitStatus) -> &'static str {
    match status.signal() {
        Some(signal) if signal == Signal::SIGKILL as i32 => {
            "; is there memory for one more copy of the signatures?"
        }
        Some(_) | None => "",
    }
}

/// `clamscan` on the search path, or where Debian, Red Hat and a build from source put it, which a
/// service's path need not have.
pub fn find() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/bin", "/usr/local/bin"].map(PathBuf::from);
    env::split_paths(&path)
        .chain(usual)
        .map(|directory| directory.join("clamscan"))
        .find(|program| program.is_file())
}

/// The first ClamAV that reads the detached signatures of containers (`.cvd.sign`): major and minor
/// version.
pub const READS_SIGNATURE_FILES: (u32, u32) = (1, 5);

/// Major and minor version of `program`, a clamscan. `None` if it does not say.
pub fn version(program: &Path) -> Option<(u32, u32)> {
    let said = std::process::Command::new(program)
        .arg("--version")
        .output();
    parse_version(&String::from_utf8(said.ok()?.stdout).ok()?)
}

/// Major and minor version in what clamscan says of itself and clamd answers to VERSION, such as `ClamAV
/// 1.4.6/27890/Sun Nov 22 06:43:59 2026`.
pub fn parse_version(said: &str) -> Option<(u32, u32)> {
    let numbers = said.strip_prefix("ClamAV ")?;
    let mut numbers = numbers.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
}

/// Loads `databases` with `program`, a clamscan. With `official_only` it loads what a clamd with
/// `OfficialDatabaseOnly` would. See [`run`].
pub async fn load(
    program: &Path,
    databases: &Path,
    official_only: bool,
    limit: Duration,
) -> Result<(), LoadError> {
    let mut command = Command::new(program);
    if official_only {
        command.arg("--official-db-only=yes");
    }
    run(command, databases, limit, |_| Ok(())).await
}

/// Loads `databases` with `command`, a clamscan. The load takes as much memory as clamd needs for the
/// databases. `started` gets the process id of clamscan. An error of `started` kills clamscan.
///
/// clamscan loads only files with the extension of a database, and skips others without a message. At
/// the time limit, or when the future is dropped, clamscan and its process group are killed.
pub async fn run(
    mut command: Command,
    databases: &Path,
    limit: Duration,
    started: impl FnOnce(Pid) -> io::Result<()>,
) -> Result<(), LoadError> {
    let program = PathBuf::from(command.as_std().get_program());
    command.env("LC_ALL", "C").arg("--no-summary");
    command.arg("--database").arg(databases);
    // With an empty list of files clamscan ends when the databases are loaded.
    command.arg("--file-list=/dev/null");
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(Stdio::piped());
    let ended = timeout(limit, async {
        let mut clamscan = Group::spawn(command)?;
        started(clamscan.pid().expect("nobody has waited for it"))?;
        let stderr = clamscan.0.stderr.take().expect("it was asked for");
        let said = Said::read(stderr, &Misleading::names_in(databases)).await?;
        io::Result::Ok((clamscan.0.wait().await?, said))
    });
    let (status, said) = ended
        .await
        .map_err(|_| LoadError::TimedOut { limit })?
        .map_err(|source| LoadError::Run { program, source })?;
    if status.success() {
        return Ok(());
    }
    // The path differs between runs. Without it the same fault has the same reason.
    let place = format!("{}/", databases.display());
    if let Some(trouble) = said.trouble {
        let reason = printable(&trouble.replace(&place, ""));
        return Err(LoadError::Hindered { reason });
    }
    // Only with this exit code is stderr a verdict on the databases. A signal may have ended clamscan
    // in the middle of anything.
    let reason = (status.code() == Some(EXIT_ERROR))
        .then(|| reason(&said.end.replace(&place, "")))
        .flatten();
    Err(match reason {
        Some(reason) => LoadError::Refused { reason },
        None => LoadError::NoReason { status },
    })
}

/// Whether a line of libclamav reports trouble of the host and nothing about the databases.
pub fn is_hosts_trouble(line: &str) -> bool {
    is_about_memory(line) || has_any(line, &OTHER_TROUBLE)
}

/// Whether a line of libclamav reports a lack of memory.
pub fn is_about_memory(line: &str) -> bool {
    has_any(line, &LACK_OF_MEMORY)
}

fn has_any(line: &str, phrases: &[&str]) -> bool {
    let line = line.to_lowercase();
    phrases.iter().any(|phrase| line.contains(phrase))
}

/// Precedes a path in libclamav's reason of a failed load.
const CANNOT_LOAD: &str = "Can't load ";

/// Which of these files libclamav names in the reason of a failed load. It names a member of a
/// container first, then the container, so the last name counts. A name may itself contain what
/// libclamav writes around names: of the names that fit, the one that reaches furthest was meant.
pub fn culprit<'n>(reason: &str, files: impl Iterator<Item = &'n str> + Clone) -> Option<&'n str> {
    let mentions = reason.match_indices(CANNOT_LOAD).filter_map(|(at, words)| {
        let start = at + words.len();
        let after = &reason[start..];
        // A kind follows, as in `site.ndb: Malformed database`, or the next error.
        let is_named = |name: &&str| {
            let rest = after.strip_prefix(name);
            rest.is_some_and(|rest| {
                rest.is_empty() || rest.starts_with(": ") || rest.starts_with("; ")
            })
        };
        let name = files
            .clone()
            .filter(is_named)
            .max_by_key(|name| name.len())?;
        Some((start + name.len(), name.len(), name))
    });
    let (end, _, name) = mentions.max_by_key(|(end, length, _)| (*end, *length))?;
    (!reason[end..].contains(CANNOT_LOAD)).then_some(name)
}

/// A process in a group of its own, so that the children of a wrapper script are killed with it.
struct Group(Child);

impl Group {
    fn spawn(mut command: Command) -> io::Result<Self> {
        command
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map(Self)
    }

    /// `None` once the process is reaped: another process may have its id by then.
    fn pid(&self) -> Option<Pid> {
        let id = self.0.id()?;
        Some(Pid::from_raw(i32::try_from(id).expect("process ids fit")))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.pid() {
            // An error means that the group has no process left.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

/// The stderr of clamscan. A clamscan that lacks memory can write gigabytes.
#[derive(Default)]
struct Said {
    /// The last bytes.
    end: String,
    /// The first line of the whole stderr that reports trouble of the host.
    trouble: Option<String>,
}

impl Said {
    async fn read(mut stream: impl AsyncRead + Unpin, names: &Misleading) -> io::Result<Self> {
        let (mut kept, mut line, mut trouble) = (Vec::new(), Vec::new(), None);
        loop {
            let from = kept.len();
            if stream.read_buf(&mut kept).await? == 0 {
                break;
            }
            for piece in kept[from..].split_inclusive(|&byte| byte == b'\n') {
                if trouble.is_some() {
                    break;
                }
                let room = LINE_BYTES_MAX - line.len();
                line.extend(&piece[..piece.len().min(room)]);
                if piece.ends_with(b"\n") {
                    trouble = trouble_in(&line, names);
                    line.clear();
                }
            }
            if kept.len() > 2 * SAID_BYTES_MAX {
                kept.drain(..kept.len() - SAID_BYTES_MAX);
            }
        }
        Ok(Self {
            end: String::from_utf8_lossy(&kept).into_owned(),
            trouble: trouble.or_else(|| trouble_in(&line, names)),
        })
    }
}

/// Names of databases that contain one of the phrases of trouble, such as `out of memory.ndb`. An error
/// that repeats such a name is no report of trouble.
struct Misleading(Vec<String>);

impl Misleading {
    /// Most names that are kept. Each is searched in every line.
    const NAMES_MAX: usize = 100;

    fn names_in(databases: &Path) -> Self {
        let entries = fs::read_dir(databases).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let misleading = names.filter(|name| is_hosts_trouble(name));
        Self(misleading.take(Self::NAMES_MAX).collect())
    }

    fn removed_from(&self, line: &str) -> String {
        let names = self.0.iter();
        names.fold(line.to_owned(), |line, name| line.replace(name, ""))
    }
}

fn trouble_in(line: &[u8], names: &Misleading) -> Option<String> {
    let line = String::from_utf8_lossy(line);
    if !is_hosts_trouble(&names.removed_from(&line)) {
        return None;
    }
    let line = line.trim();
    let said = line.strip_prefix("LibClamAV Error: ");
    let said = said.or(line.strip_prefix("ERROR: ")).unwrap_or(line);
    Some(said.to_owned())
}

/// The reason of a failed load, which libclamav ends with a line `ERROR: ...`.
fn reason(said: &str) -> Option<String> {
    let last = said.lines().rev().find_map(|l| l.strip_prefix("ERROR: "))?;
    let errors: Vec<_> = said
        .lines()
        .filter_map(|line| line.strip_prefix("LibClamAV Error: "))
        // Repeats the line before it, without the kind.
        .filter(|error| !error.starts_with("cli_loaddbdir: error loading"))
        .collect();
    let mut errors = errors[errors.len().saturating_sub(ERRORS_MAX)..].to_vec();
    if !errors.iter().any(|error| error.contains(last)) {
        errors.push(last);
    }
    Some(printable(&errors.join("; ")))
}

fn printable(text: &str) -> String {
    let printable = text.chars().map(|c| if c.is_control() { '?' } else { c });
    printable.take(REASON_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    /// Only a failing test waits so long.
    const PATIENCE: Duration = Duration::from_secs(60);

    #[track_caller]
    fn check(said: &str, expected: Option<&str>) {
        assert_eq!(reason(said).as_deref(), expected, "{said}");
    }

    /// Loads a directory with a shell script in the place of clamscan. The script is a fake: a test
    /// cannot make the real clamscan fail in these ways.
    async fn load_with(script: &str, limit: Duration) -> Result<(), LoadError> {
        let root = tempfile::tempdir().unwrap();
        let program = root.path().join("clamscan");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        // A test beside this one may be about to start a process that still has the script open.
        loop {
            match load(&program, root.path(), false, limit).await {
                Err(LoadError::Run { source, .. })
                    if source.kind() == io::ErrorKind::ExecutableFileBusy => {}
                ended => return ended,
            }
        }
    }

    #[tokio::test]
    async fn databases_are_refused_only_for_an_error_that_libclamav_reports() {
        load_with("exit 0", PATIENCE).await.unwrap();
        let refused = load_with("echo 'ERROR: Malformed database' >&2; exit 2", PATIENCE).await;
        assert!(
            matches!(&refused, Err(LoadError::Refused { reason }) if reason == "Malformed database"),
            "{refused:?}"
        );
        let script = "echo \"ERROR: Can't allocate memory\" >&2; exit 2";
        let hindered = load_with(script, PATIENCE).await;
        assert!(
            matches!(hindered, Err(LoadError::Hindered { .. })),
            "{hindered:?}"
        );
        for silent in ["exit 2", "kill -KILL $$"] {
            let ended = load_with(silent, PATIENCE).await;
            assert!(
                matches!(ended, Err(LoadError::NoReason { .. })),
                "{ended:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_line_about_memory_anywhere_in_stderr_is_trouble_of_the_host() {
        // The lines of clamscan 1.4.6 under `ulimit -v 200000`, and more output than is kept.
        let early = "echo \"LibClamAV Error: cli_ac_addpatt: Can't allocate memory for new->trans\" >&2; \
                     yes 'LibClamAV Warning: odd' | head -c 100000 >&2; \
                     echo \"LibClamAV Error: Can't load $3/x.ndb: Malformed database\" >&2; \
                     echo 'ERROR: Malformed database' >&2; exit 2";
        for line in [
            "mpool_malloc(): Can't allocate memory (262144 bytes).",
            "cli_ac_addpatt: Can't realloc ac_listtable",
            "hm_addhash_bin: failed to grow hash array to 1 entries",
            "malloc_problem: Cannot allocate memory",
        ] {
            assert!(is_about_memory(line) && is_hosts_trouble(line), "{line}");
        }
        let hindered = load_with(early, PATIENCE).await;
        assert!(
            matches!(&hindered, Err(LoadError::Hindered { reason }) if reason.contains("new->trans")),
            "{hindered:?}"
        );
        // clamscan names a file, and then crashes as it frees memory that it did not get.
        let killed = "echo \"LibClamAV Error: Can't load $3/x.ldb: Malformed database\" >&2; \
                      echo 'ERROR: Malformed database' >&2; kill -SEGV $$";
        let ended = load_with(killed, PATIENCE).await;
        assert!(
            matches!(ended, Err(LoadError::NoReason { .. })),
            "{ended:?}"
        );
    }

    #[test]
    fn a_name_that_reads_like_trouble_of_the_host_is_a_name() {
        let said = |names: &[&str], line: &str| {
            let names = Misleading(names.iter().map(|name| (*name).to_owned()).collect());
            trouble_in(line.as_bytes(), &names)
        };
        let names = ["out of memory.ndb", "Permission denied.ndb"];
        for name in names {
            let line = format!("LibClamAV Error: Can't load db/{name}: Malformed database");
            assert_eq!(said(&names, &line), None);
            assert!(said(&[], &line).is_some());
            let line =
                format!("LibClamAV Error: cli_load(): Can't open file or directory db/{name}");
            assert!(said(&names, &line).is_some_and(|said| said.contains(name)));
        }
        let root = tempfile::tempdir().unwrap();
        for name in ["plain.ndb", "out of memory.ndb"] {
            fs::write(root.path().join(name), "").unwrap();
        }
        let found = Misleading::names_in(root.path());
        assert_eq!(found.0, ["out of memory.ndb"]);
    }

    #[tokio::test]
    async fn the_path_of_the_databases_is_no_part_of_the_reason() {
        let script = "echo \"LibClamAV Error: Can't load $3/x.hdb: Malformed database\" >&2; \
                      echo 'ERROR: Malformed database' >&2; exit 2";
        let refused = load_with(script, PATIENCE).await.unwrap_err();
        assert_eq!(
            refused.to_string(),
            "clamscan cannot load the databases: Can't load x.hdb: Malformed database"
        );
    }

    #[tokio::test]
    async fn a_program_with_endless_output_is_killed_with_its_children_at_the_time_limit() {
        // Not by exec: `yes` is the child of a child, and has the pipe, too.
        let ended = load_with("yes >&2; true", Duration::from_millis(300)).await;
        assert!(
            matches!(ended, Err(LoadError::TimedOut { .. })),
            "{ended:?}"
        );
    }

    #[tokio::test]
    async fn the_program_and_its_children_are_killed_when_the_future_is_dropped() {
        let root = tempfile::tempdir().unwrap();
        let started = root.path().join("started");
        let script = format!(
            "sleep 1000 & echo $! > {0}.new; mv {0}.new {0}; wait",
            started.display()
        );
        let loading = load_with(&script, PATIENCE);
        let child = async {
            let mut looks = tokio::time::interval(Duration::from_millis(5));
            loop {
                looks.tick().await;
                if let Ok(pid) = fs::read_to_string(&started) {
                    return Pid::from_raw(pid.trim().parse().unwrap());
                }
            }
        };
        let child = tokio::select! {
            child = child => child, // and `loading` is dropped
            ended = loading => panic!("{ended:?}"),
        };
        let gone = async {
            let mut looks = tokio::time::interval(Duration::from_millis(5));
            // The process that adopted the child may not have reaped it yet.
            while is_running(child) {
                looks.tick().await;
            }
        };
        timeout(PATIENCE, gone).await.expect("it is killed");
    }

    fn is_running(pid: Pid) -> bool {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
        // proc_pid_stat(5): the state follows the name in brackets. A zombie does not run.
        stat.is_ok_and(|stat| !stat.contains(") Z"))
    }

    #[tokio::test]
    async fn a_program_that_cannot_be_run_is_named() {
        let program = Path::new("/nowhere/clamscan");
        let error = load(program, program, false, PATIENCE).await.unwrap_err();
        assert_eq!(error.to_string(), "cannot run /nowhere/clamscan");
    }

    #[test]
    fn the_reason_names_the_file() {
        check(
            "LibClamAV Error: Problem parsing database at line 1\n\
             LibClamAV Error: Can't load db/bad.ndb: Malformed database\n\
             LibClamAV Error: cli_loaddbdir: error loading database db/bad.ndb\n\
             ERROR: Malformed database\n",
            Some("Problem parsing database at line 1; Can't load db/bad.ndb: Malformed database"),
        );
        check(
            "LibClamAV Error: cli_loaddbdir: No supported database files found in db\n\
             ERROR: Can't open file or directory\n",
            Some(
                "cli_loaddbdir: No supported database files found in db; \
                 Can't open file or directory",
            ),
        );
        check(
            "ERROR: Can't allocate memory\n",
            Some("Can't allocate memory"),
        );
    }

    #[test]
    fn without_an_error_at_the_end_there_is_no_reason() {
        check("", None);
        check("LibClamAV Warning: something odd\nKilled\n", None);
    }

    #[test]
    fn a_reason_is_short_and_printable() {
        check("ERROR: Malformed\u{7}\n", Some("Malformed?"));
        let endless = format!("ERROR: {}\n", "x".repeat(10_000));
        check(&endless, Some(&"x".repeat(REASON_CHARS_MAX)));
    }
}
