//! strace at a running daemon: it lists the calls that change files, or spoils one of them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::needs::Part;
use super::until::{PATIENCE, until};

/// System calls that change files or make changes durable; a name that a machine does not know is
/// passed over (`?`).
const CALLS: &str = "?open,openat,write,?pwrite64,fsync,fdatasync,?rename,renameat,?renameat2,\
                     ?link,linkat,?unlink,unlinkat,fchmod,ftruncate,mkdirat";

/// One call as strace wrote it down.
#[derive(Clone, Debug)]
pub struct Call {
    /// The thread that made it.
    pub thread: String,
    /// The system call.
    pub name: String,
    /// The paths and names in its arguments, the file that it changes last.
    pub paths: Vec<String>,
    /// All of it.
    pub line: String,
}

/// An strace that is attached to a process until it is dropped.
#[derive(Debug)]
pub struct Strace {
    child: Child,
    log: PathBuf,
}

impl Strace {
    /// Lists the calls of the process from now on.
    pub fn list(pid: u32, directory: &Path) -> Self {
        Self::attach(pid, directory, &["-e", &format!("trace={CALLS}")])
    }

    /// Does `what` (such as `signal=SIGKILL` or `error=ENOSPC`) at the `when`th call of `name` that
    /// one thread makes on `path`: a whole path for calls on open files, a name as it is given for
    /// the others, nothing for any. strace counts for each thread.
    pub fn spoil(
        pid: u32,
        directory: &Path,
        name: &str,
        path: &str,
        what: &str,
        when: &str,
    ) -> Self {
        let (trace, inject) = (
            format!("trace={name}"),
            format!("inject={name}:{what}:when={when}"),
        );
        let mut arguments = vec!["-e", &trace, "-e", &inject];
        if !path.is_empty() {
            arguments.extend(["-P", path]);
        }
        Self::attach(pid, directory, &arguments)
    }

    fn attach(pid: u32, directory: &Path, arguments: &[&str]) -> Self {
        let (log, said) = (
            directory.join("strace.log"),
            directory.join("strace.stderr"),
        );
        let _ = fs::remove_file(&log);
        let stderr = File::create(&said).expect("a scratch file can be written");
        let mut child = Command::new(Part::Strace.path())
            .args(["-f", "-y", "-s", "0", "-p", &pid.to_string(), "-o"])
            .arg(&log)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .expect("strace was found");
        until(PATIENCE, "strace to attach", || {
            let ended = child.try_wait().expect("our own child");
            let said = fs::read_to_string(&said).unwrap_or_default();
            // It ends with its process, which a call that came at once may have ended.
            let attached = said.contains("attached");
            assert!(attached || ended.is_none(), "strace ended: {said}");
            attached
        });
        Self { child, log }
    }

    /// Whether it has done what it was to do.
    pub fn has_struck(&self) -> bool {
        self.log().contains("(INJECTED)")
    }

    /// Whether it has stopped the process, as `signal=SIGSTOP` does.
    pub fn has_stopped(&self) -> bool {
        self.log().contains("stopped by SIGSTOP")
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Lets the process go, and returns its calls on files below one of the `directories`.
    pub fn calls(mut self, directories: &[&Path]) -> Vec<Call> {
        self.detach();
        let log = self.log();
        let calls = log.lines().filter_map(call);
        let below = |call: &Call| {
            directories
                .iter()
                .any(|d| call.line.contains(&*d.to_string_lossy()))
        };
        calls.filter(below).collect()
    }

    fn detach(&mut self) {
        let pid = i32::try_from(self.child.id()).expect("a process id");
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM); // it may have ended with its process
        let _ = self.child.wait();
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        self.detach();
    }
}

/// `12 linkat(7</a/stage>, "x", 8</a>, "y", 0) = 0`, whose end is on another line if a call of
/// another thread came between.
fn call(line: &str) -> Option<Call> {
    let (thread, rest) = line.split_once(' ')?;
    let (name, arguments) = rest.trim_start().split_once('(')?;
    if !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return None;
    }
    let mut paths = Vec::new();
    let mut rest = arguments.split(") = ").next()?;
    rest = rest.strip_suffix(" <unfinished ...>").unwrap_or(rest);
    while let Some(at) = rest.find(['"', '<']) {
        let end = if rest[at..].starts_with('"') {
            '"'
        } else {
            '>'
        };
        let inner = &rest[at + 1..];
        let length = inner.find(end)?;
        if length > 0 {
            paths.push(inner[..length].to_owned()); // nothing is shown of what is written
        }
        rest = &inner[length + 1..];
    }
    Some(Call {
        thread: thread.to_owned(),
        name: name.to_owned(),
        paths,
        line: line.to_owned(),
    })
}
