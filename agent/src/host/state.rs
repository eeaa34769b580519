//! The agent's state directory: what survives a restart, in small files of JSON.

use std::io;
use std::path::{Path, PathBuf};

use clamcast_daemon::durable::{self, LockError, LockGuard};
use clamcast_daemon::input;
use serde::Serialize;
use serde::de::{DeserializeOwned, Error as _};

/// Largest state file in bytes that is read: a receipt of the largest size in base64. Larger means
/// damaged.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The state directory, and the lock that keeps a second agent out of it.
#[derive(Debug)]
pub struct State {
    path: PathBuf,
    _lock: LockGuard,
}

/// The state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another agent has it.
    #[error("state: another agent runs with this directory, and one at a time may")]
    Shared(#[source] LockError),
    /// Its lock file.
    #[error(
        "state: cannot use the directory; it and what is in it must belong to the agent's user"
    )]
    Lock(#[source] LockError),
    /// The directory.
    #[error("state: cannot make the directory {path}; it must belong to the agent's user")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not what we wrote.
    #[error("{path} is damaged; put it back from a backup, or move it away: {without}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the host does without it.
        without: &'static str,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

impl State {
    /// Opens the directory, made if need be, for this process alone.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        durable::create_dir(path, 0o700).map_err(|source| StateError::Directory {
            path: path.to_owned(),
            source,
        })?;
        let lock = lock(path)?;
        for directory in ["", "receipts", "audit"] {
            durable::sweep(&path.join(directory));
        }
        Ok(Self {
            path: path.to_owned(),
            _lock: lock,
        })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn lock(directory: &Path) -> Result<LockGuard, StateError> {
    durable::lock(&directory.join("lock")).map_err(|error| match error {
        LockError::Held { .. } => StateError::Shared(error),
        LockError::Io { .. } => StateError::Lock(error),
    })
}

/// Reads a state file; `None` if there is none. `without` says what happens when somebody moves a
/// damaged one away.
pub fn load<T: DeserializeOwned>(
    path: &Path,
    without: &'static str,
) -> Result<Option<T>, StateError> {
    let read = |source| StateError::Read {
        path: path.to_owned(),
        source,
    };
    let parsed = match input::whole(path, FILE_BYTES_MAX) {
        Ok(text) => serde_json::from_slice(&text),
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
            Err(serde_json::Error::custom(error))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(read(error)),
    };
    parsed.map(Some).map_err(|source| StateError::Damaged {
        path: path.to_owned(),
        without,
        source,
    })
}

/// Writes a state file: durable when this returns.
pub fn save(path: &Path, value: &impl Serialize) -> Result<(), StateError> {
    let text = serde_json::to_vec(value).expect("our own state serialises");
    durable::write(path, &text, 0o600).map_err(|source| StateError::Write {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn one_agent_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let first = State::open(&path).unwrap();
        assert!(matches!(State::open(&path), Err(StateError::Shared(_))));
        drop(first);
        State::open(&path).unwrap();
    }

    #[test]
    fn a_lock_file_that_cannot_be_opened_is_not_taken_for_another_agent() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("lock")).unwrap(); // stops root, too
        let error = State::open(dir.path()).unwrap_err();
        let text = crate::chain(&error);
        assert!(matches!(error, StateError::Lock(_)), "{text}");
        assert!(text.contains("Is a directory"), "{text}");
    }

    #[test]
    fn a_file_is_there_or_not_or_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("number.json");
        let read = || load::<u64>(&path, "it counts from 1");
        assert!(read().unwrap().is_none());
        save(&path, &7).unwrap();
        assert_eq!(read().unwrap(), Some(7));
        fs::write(&path, "7 or so").unwrap();
        let error = read().unwrap_err().to_string();
        assert!(
            error.contains("damaged") && error.contains("counts from 1"),
            "{error}"
        );
        fs::write(&path, " ".repeat(FILE_BYTES_MAX as usize) + "7").unwrap();
        let error = read().unwrap_err();
        assert!(matches!(error, StateError::Damaged { .. }), "{error}");
        assert!(crate::chain(&error).contains("more than 1048576 bytes"));
    }
}
