//! Configuration files: TOML in which a key that we do not know is a mistake, not a comment, and
//! every mistake is told with its line, its key and what was expected there.

mod problem;

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

pub use crate::values::{Percent, SPAN_MAX, Size, Span, ValueError};

use crate::exit;
use crate::input::{self, InputError};

pub use problem::Problem;

/// Longest configuration file in bytes that is read: thousands of groups fit, and a path that was
/// mistyped to a database or a device is not taken into memory.
pub const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(transparent)]
    Read(#[from] InputError),
    /// It is some other kind of file.
    #[error("{path}:{line}: not a text in UTF-8; is it a configuration file?")]
    NotText {
        /// The file.
        path: PathBuf,
        /// The line of the first byte that is none, from 1.
        line: usize,
    },
    /// There is nothing in it.
    #[error("{path} is empty; is it the right file?")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Something in it is wrong.
    #[error("{path}:{}{problem}", line.map_or(" ".to_owned(), |line| format!("{line}: ")))]
    Content {
        /// The file.
        path: PathBuf,
        /// The line, from 1; `None` if it is about the file as a whole.
        line: Option<usize>,
        /// What is wrong there.
        problem: Box<Problem>,
    },
}

impl ConfigError {
    /// The exit code of a command that only wants to know what the configuration says.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Read(error) => error.exit_code(),
            Self::NotText { .. } | Self::Empty { .. } | Self::Content { .. } => exit::USAGE,
        }
    }
}

/// What a configuration file may hold. Its structs are to be `#[serde(deny_unknown_fields)]`.
pub trait Settings: DeserializeOwned {
    /// Every key.
    const KEYS: &'static [Key];
}

/// A key of a configuration file, for messages, the manual page and the example configuration.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// The key with the tables around it, as in `mirror.path`; `*` stands for names that the operator
    /// chooses.
    pub name: &'static str,
    /// Its value if the file does not set it.
    pub value: Value,
    /// The values that it accepts, in words that continue "expected".
    pub expected: &'static str,
    /// The effect of the value, in full sentences.
    pub meaning: &'static str,
}

/// The value of a key that a file does not set, in TOML.
#[derive(Clone, Copy, Debug)]
pub enum Value {
    /// The file must set the key; this is an example.
    Required(&'static str),
    /// The default.
    Default(&'static str),
    /// Nothing: the operator chooses the names. This is an example, `NAME = VALUE`.
    Named(&'static str),
    /// The default, or the example, of a key without effect in this version.
    Reserved(&'static str),
}

/// A configuration file that was read.
#[derive(Debug)]
pub struct File {
    path: PathBuf,
    text: String,
}

impl File {
    /// Reads `path`, which the option `--config` names.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let origin = "name the configuration file with --config";
        Self::read_for("--config", path, origin)
    }

    /// Reads `path`, see [`input::read`].
    pub fn read_for(
        option: &'static str,
        path: &Path,
        origin: &'static str,
    ) -> Result<Self, ConfigError> {
        let bytes = input::read(option, path, CONFIG_BYTES_MAX, origin)?;
        let path = path.to_owned();
        let text = match String::from_utf8(bytes) {
            Err(error) => {
                let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
                let line = line_of(good);
                return Err(ConfigError::NotText { path, line });
            }
            // TOML has no such byte, nor does any text; a zeroed file is what some crashes leave.
            Ok(text) => match text.find('\0') {
                None => text,
                Some(at) => {
                    let line = line_of(&text.as_bytes()[..at]);
                    return Err(ConfigError::NotText { path, line });
                }
            },
        };
        if text.trim().is_empty() {
            return Err(ConfigError::Empty { path });
        }
        Ok(Self { path, text })
    }

    /// What it says.
    pub fn parse<T: Settings>(&self) -> Result<T, ConfigError> {
        problem::parse(&self.text).map_err(|(line, problem)| self.error(line, problem))
    }

    /// The error that the value of `key` (the names of its tables, and its own) is well-formed but
    /// not what is expected there; `found` is the part of a list that is not.
    pub fn wrong<T: Settings>(&self, key: &[&str], found: Option<&str>) -> ConfigError {
        let (line, problem) = problem::wrong::<T>(&self.text, key, found);
        self.error(line, problem)
    }

    /// The error that a part of the value of `key` is not what it should be, which `why` says with
    /// what stands there.
    pub fn wrong_part(&self, key: &[&str], why: &dyn std::error::Error) -> ConfigError {
        let (line, problem) = problem::part(&self.text, key, why.to_string());
        self.error(line, problem)
    }

    fn error(&self, line: Option<usize>, problem: Problem) -> ConfigError {
        ConfigError::Content {
            path: self.path.clone(),
            line,
            problem: Box::new(problem),
        }
    }
}

/// The line, from 1, in which the text after `before` begins.
fn line_of(before: &[u8]) -> usize {
    before.iter().filter(|byte| **byte == b'\n').count() + 1
}

/// The path as the file `file` means it: relative to the directory that the file is in.
pub fn beside(file: &Path, path: &Path) -> PathBuf {
    file.parent().unwrap_or(Path::new("")).join(path)
}

/// Whether one of two directories is the other, or is in it, wherever links lead. What is not there
/// yet is taken to be a plain directory.
pub fn overlap(one: &Path, other: &Path) -> bool {
    let (one, other) = (without_links(one), without_links(other));
    one.starts_with(&other) || other.starts_with(&one)
}

fn without_links(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let real = path.ancestors().find_map(|there| {
        let rest = path.strip_prefix(there).ok()?;
        there.canonicalize().ok().map(|real| real.join(rest))
    });
    real.unwrap_or(path)
}

/// A path; nothing is none.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "PathBuf")]
pub struct FilePath(PathBuf);

impl TryFrom<PathBuf> for FilePath {
    type Error = &'static str;

    fn try_from(path: PathBuf) -> Result<Self, &'static str> {
        if path.as_os_str().is_empty() {
            return Err("a path is not empty");
        }
        Ok(Self(path))
    }
}

impl FilePath {
    /// The path as the file `file` means it, see [`beside`].
    pub fn beside(&self, file: &Path) -> PathBuf {
        beside(file, &self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_relative_to_the_file() {
        let file = Path::new("/etc/clamcast/agent.toml");
        let found = |path: &str| beside(file, Path::new(path)).display().to_string();
        assert_eq!(found("ca.pem"), "/etc/clamcast/ca.pem");
        assert_eq!(found("/srv/ca.pem"), "/srv/ca.pem");
        let bare = beside(Path::new("agent.toml"), Path::new("ca.pem"));
        assert_eq!(bare, Path::new("ca.pem"));
    }

    #[test]
    fn directories_overlap_where_one_is_in_the_other_behind_links_too() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("db/inner")).unwrap();
        std::os::unix::fs::symlink("db", dir.path().join("link")).unwrap();
        let check = |one: &str, other: &str, expected: bool| {
            let (one, other) = (dir.path().join(one), dir.path().join(other));
            assert_eq!(overlap(&one, &other), expected, "{one:?} {other:?}");
            assert_eq!(overlap(&other, &one), expected, "{other:?} {one:?}");
        };
        check("db", "db/", true);
        check("db", "db/inner", true);
        check("db", "db/not/there/yet", true);
        check("db/inner/..", "db/state", true);
        check("link/state", "db", true);
        check("db", "db2", false);
        check("db/inner", "db/state", false);
        check("state", "link", false);
    }
}
