//! Reads small files and directories within bounds: a configuration, a certificate, a key, another
//! program's log, the daemon's own state.
//!
//! A name may be mistyped to anything, or laid out to harm. What is not a plain file is never read,
//! so a FIFO hangs nobody, and what is too long is never taken into memory. A tidy test keeps other
//! ways to read whole files out of the daemons.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::unistd::{Uid, User};

use crate::exit;

/// A file that an operator named cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// There is none.
    #[error("{key}: {path} does not exist; {origin}")]
    Missing {
        /// The configuration key, or the option, that names it.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Where such a file comes from.
        origin: &'static str,
    },
    /// There is none, and no credential of systemd in its place.
    #[error(
        "{key}: {path} does not exist, and the credential `{key}` is blank or missing; {origin}"
    )]
    NoCredential {
        /// The configuration key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Where such a file comes from.
        origin: &'static str,
    },
    /// This user may not.
    #[error("{key}: user `{user}` may not read {path}; {next}")]
    Denied {
        /// The configuration key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Who tried.
        user: String,
        /// Who may, and how.
        next: String,
    },
    /// A directory, a FIFO, a device.
    #[error("{key}: {path} is {kind}; {origin}")]
    NotAFile {
        /// The configuration key.
        key: &'static str,
        /// The name.
        path: PathBuf,
        /// What has it.
        kind: &'static str,
        /// Where such a file comes from.
        origin: &'static str,
    },
    /// Longer than any such file.
    #[error("{key}: {path} has more than {limit} bytes, which no such file has; {origin}")]
    TooLong {
        /// The configuration key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// The bound.
        limit: u64,
        /// Where such a file comes from.
        origin: &'static str,
    },
    /// The disk.
    #[error("{key}: cannot read {path}")]
    Io {
        /// The configuration key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl InputError {
    /// The exit code of a command that ends with this: a name that is wrong is wrong usage, a file
    /// that this user or the disk does not give is a failure.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Missing { .. }
            | Self::NoCredential { .. }
            | Self::NotAFile { .. }
            | Self::TooLong { .. } => exit::USAGE,
            Self::Denied { .. } | Self::Io { .. } => exit::FAILED,
        }
    }
}

/// Reads the file `path`, which `key` names and which has at most `limit` bytes. `origin` is the
/// next step if it is not there, or something else is: where such a file comes from.
pub fn read(
    key: &'static str,
    path: &Path,
    limit: u64,
    origin: &'static str,
) -> Result<Vec<u8>, InputError> {
    let failed = |source: io::Error| {
        let kind = source.kind();
        if kind == io::ErrorKind::PermissionDenied {
            return denied(key, path);
        }
        let path = path.to_owned();
        if kind == io::ErrorKind::NotFound || kind == io::ErrorKind::NotADirectory {
            InputError::Missing { key, path, origin }
        } else {
            InputError::Io { key, path, source }
        }
    };
    let facts = fs::metadata(path).map_err(failed)?;
    if !facts.is_file() {
        return Err(InputError::NotAFile {
            key,
            path: path.to_owned(),
            kind: kind(facts.file_type()),
            origin,
        });
    }
    let bytes = beginning(path, limit + 1).map_err(failed)?;
    if bytes.len() as u64 > limit {
        let path = path.to_owned();
        return Err(InputError::TooLong {
            key,
            path,
            limit,
            origin,
        });
    }
    Ok(bytes)
}

/// All of the plain file `path`. One with more than `limit` bytes is [`io::ErrorKind::FileTooLarge`];
/// other errors as [`open`].
pub fn whole(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let bytes = beginning(path, limit + 1)?;
    if bytes.len() as u64 > limit {
        let message = format!("it has more than {limit} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    Ok(bytes)
}

/// The names in a directory of at most `limit` entries. The error of a directory with more says so.
pub fn names(directory: &Path, limit: usize) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        if names.len() == limit {
            let message =
                format!("it has more than {limit} entries; move away what does not belong there");
            return Err(io::Error::other(message));
        }
        names.push(entry?.file_name());
    }
    Ok(names)
}

/// The first `limit` bytes of the plain file `path`, or all of a shorter one. Errors as [`open`].
pub fn beginning(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Opens the plain file `path`. An error says of anything else what it is: a FIFO, for one, would
/// keep whoever opens it waiting for somebody at its other end.
pub fn open(path: &Path) -> io::Result<File> {
    plain(&fs::metadata(path)?)?;
    // Something else may take its place now.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
        .open(path)?;
    plain(&file.metadata()?)?;
    Ok(file)
}

fn plain(facts: &fs::Metadata) -> io::Result<()> {
    if facts.is_file() {
        return Ok(());
    }
    let what = format!("it is {}", kind(facts.file_type()));
    Err(io::Error::new(io::ErrorKind::InvalidInput, what))
}

fn kind(file: fs::FileType) -> &'static str {
    if file.is_dir() {
        "a directory"
    } else if file.is_fifo() {
        "a named pipe"
    } else if file.is_socket() {
        "a socket"
    } else {
        "a device"
    }
}

/// Whose the file is, or the nearest directory above it that can be looked at, tells who may.
fn denied(key: &'static str, path: &Path) -> InputError {
    let me = Uid::effective();
    let facts = path.ancestors().find_map(|above| fs::metadata(above).ok());
    let next = match facts.map(|facts| Uid::from_raw(facts.uid())) {
        Some(owner) if owner == me => {
            "its permissions keep its own user out; see `ls -l`".to_owned()
        }
        Some(owner) if owner.is_root() => {
            let me = this_user();
            format!(
                "it is root's: run this with sudo, or `chown {me}` that file if the daemon is `{me}`"
            )
        }
        Some(owner) => {
            let owner = user_name(owner);
            format!(
                "it belongs to `{owner}`: run this as the daemon's user, `sudo -u {owner} ...`, \
                 or give that file to `{}`",
                this_user()
            )
        }
        None => "run this with sudo, or as the daemon's user".to_owned(),
    };
    InputError::Denied {
        key,
        path: path.to_owned(),
        user: this_user(),
        next,
    }
}

/// Who runs this.
pub fn this_user() -> String {
    user_name(Uid::effective())
}

/// The user's name, or the number of one without a name.
pub fn user_name(uid: Uid) -> String {
    let user = User::from_uid(uid).ok().flatten();
    user.map_or_else(|| uid.to_string(), |user| user.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;
    use std::os::unix::fs::PermissionsExt as _;

    fn check(prepare: impl FnOnce(&Path), expected: &str) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        prepare(&path);
        let said = match read("tls.ca", &path, 10, "it comes from `init`") {
            Ok(bytes) => format!("{} bytes", bytes.len()),
            Err(error) => error.to_string(),
        };
        assert_eq!(
            said.replace(&path.display().to_string(), "ca.pem"),
            expected
        );
    }

    #[test]
    fn only_a_plain_file_of_reasonable_length_is_read() {
        check(|path| fs::write(path, [0; 10]).unwrap(), "10 bytes");
        check(
            |path| fs::write(path, [0; 11]).unwrap(),
            "tls.ca: ca.pem has more than 10 bytes, which no such file has; it comes from `init`",
        );
        check(
            |_| {},
            "tls.ca: ca.pem does not exist; it comes from `init`",
        );
        check(
            |path| fs::create_dir(path).unwrap(),
            "tls.ca: ca.pem is a directory; it comes from `init`",
        );
        check(
            |path| nix::unistd::mkfifo(path, Mode::S_IRWXU).unwrap(),
            "tls.ca: ca.pem is a named pipe; it comes from `init`",
        );
    }

    #[test]
    fn of_a_strangers_file_the_beginning_is_read_and_a_fifo_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (long, fifo) = (dir.path().join("long"), dir.path().join("fifo"));
        fs::write(&long, [7; 100]).unwrap();
        assert_eq!(beginning(&long, 10).unwrap(), [7; 10]);
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        let error = beginning(&fifo, 10).unwrap_err();
        assert_eq!(error.to_string(), "it is a named pipe");
    }

    #[test]
    fn a_whole_file_or_directory_is_read_up_to_its_bound() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("state.json");
        fs::write(&file, [7; 10]).unwrap();
        assert_eq!(whole(&file, 10).unwrap(), [7; 10]);
        let error = whole(&file, 9).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(error.to_string(), "it has more than 9 bytes");
        assert_eq!(names(dir.path(), 1).unwrap(), ["state.json"]);
        let error = names(dir.path(), 0).unwrap_err().to_string();
        assert!(
            error.starts_with("it has more than 0 entries; move"),
            "{error}"
        );
    }

    #[test]
    fn who_may_not_read_is_told_who_may() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        fs::write(&path, "x").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
        match read("tls.ca", &path, 10, "") {
            Ok(_) => assert!(Uid::effective().is_root(), "nothing keeps root out"),
            Err(error) => assert!(error.to_string().contains("own user out"), "{error}"),
        }
        let error = denied("tls.ca", Path::new("/"));
        if !Uid::effective().is_root() {
            assert!(error.to_string().contains("it is root's"), "{error}");
        }
    }
}
