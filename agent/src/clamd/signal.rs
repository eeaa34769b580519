//! SIGUSR2: how clamd is asked to reload where it does not take the command.

use std::io;
use std::path::{Path, PathBuf};

use clamcast_daemon::input;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A pid and a newline are shorter.
const PID_FILE_BYTES_MAX: u64 = 64;

/// Longest `/proc/PID/comm`, in bytes: fifteen and the end of the line (proc_pid_comm(5)), with room.
const COMM_BYTES_MAX: u64 = 64;

/// The name of clamd's process in `/proc/PID/comm`.
const NAME: &str = "clamd";

/// Why no signal was sent.
#[derive(Debug, thiserror::Error)]
pub enum SignalError {
    /// No pid in it.
    #[error("cannot read a process id from {path}")]
    PidFile {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The pid is that of nobody, or of somebody else.
    #[error("process {pid} of {path} is not clamd")]
    NotClamd {
        /// Whose number it is.
        pid: Pid,
        /// The file that names it.
        path: PathBuf,
    },
    /// It may not be sent.
    #[error("cannot send SIGUSR2 to clamd ({pid}); it takes signals from its own user and root")]
    Kill {
        /// clamd's number.
        pid: Pid,
        /// What the system said.
        source: Errno,
    },
}

/// Sends SIGUSR2 to the clamd whose process id is in the file.
pub(super) fn reload(pid_file: &Path) -> Result<(), SignalError> {
    let pid = running_pid(pid_file)?;
    kill(pid, Signal::SIGUSR2).map_err(|source| SignalError::Kill { pid, source })
}

/// The process in `pid_file`, which is a clamd that runs. The file may be older than the process
/// that has the number now, so its name is looked at.
///
/// # Errors
///
/// If it is none.
pub fn running_pid(pid_file: &Path) -> Result<Pid, SignalError> {
    let pid = read_pid(pid_file).map_err(|source| SignalError::PidFile {
        path: pid_file.to_owned(),
        source,
    })?;
    let comm = PathBuf::from(format!("/proc/{pid}/comm"));
    let name = input::whole(&comm, COMM_BYTES_MAX).unwrap_or_default();
    if name.trim_ascii_end() != NAME.as_bytes() {
        let path = pid_file.to_owned();
        return Err(SignalError::NotClamd { pid, path });
    }
    Ok(pid)
}

fn read_pid(path: &Path) -> io::Result<Pid> {
    // clamd's user can put anything there.
    let bytes = input::beginning(path, PID_FILE_BYTES_MAX)?;
    match String::from_utf8_lossy(&bytes).trim().parse() {
        // Zero and less are groups of processes.
        Ok(pid @ 1..) => Ok(Pid::from_raw(pid)),
        Ok(_) | Err(_) => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it holds no process id",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_fifo_instead_of_the_pid_file_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("clamd.pid");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(read_pid(&path).is_err());
    }

    #[track_caller]
    fn check(content: &str, expected: &str) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("clamd.pid");
        fs::write(&path, content).unwrap();
        let error = reload(&path).unwrap_err().to_string();
        let file = path.display().to_string();
        assert_eq!(error.replace(&file, "FILE"), expected, "{content:?}");
    }

    #[test]
    fn only_clamd_gets_the_signal() {
        // This process, and one past the largest number that Linux gives.
        let own = std::process::id();
        check(
            &own.to_string(),
            &format!("process {own} of FILE is not clamd"),
        );
        check("4194305\n", "process 4194305 of FILE is not clamd");
        for content in ["", "x", "0", "-1", "99999999999", "12 13"] {
            check(content, "cannot read a process id from FILE");
        }
    }
}
