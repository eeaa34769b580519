//! Reads and writes the files of a fleet's directory.

use std::io;
use std::path::{Path, PathBuf};

use clamcast_daemon::durable;
use clamcast_daemon::input::{self, InputError, this_user};
use clamcast_proto::Digest;
use clamcast_proto::dsse::PublicKey;
use clamcast_proto::identity::Certificate;
use jiff::Timestamp;

/// What the files are named by, and what to do about one that is not there.
pub(crate) const OPTION: &str = "--dir";
pub(crate) const FROM_BACKUP: &str = "put a copy back from a backup";

/// Modes: of what is secret, of what is not, and of directories, which all hold secrets.
pub(crate) const PRIVATE: u32 = 0o600;
pub(crate) const PUBLIC: u32 = 0o644;
pub(crate) const DIRECTORY: u32 = 0o700;

/// Longest certificate, key or key set that is read: ours have some hundred bytes, a full key set
/// 32 KiB before base64.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Longest `revoked.json` that is read: the longest list, in base64, and the envelope around it.
pub(crate) const REVOKED_BYTES_MAX: u64 = 24 << 20;

/// Names in one directory of a fleet: more than a fleet has agents, or a host certificates.
const NAMES_MAX: usize = 1_000_000;

/// A file that was written, as the commands report it.
#[derive(Clone, Debug)]
pub struct Written {
    /// Where it is.
    pub path: PathBuf,
    /// What it is, in a few words.
    pub what: &'static str,
    /// SHA-256 of what it holds: of a certificate's DER encoding, or of a key's 32 public bytes
    /// (its id in key sets, receipts and logs). A key set goes by its root key. `None` for text.
    pub fingerprint: Option<Digest>,
    /// When a certificate expires.
    pub not_after: Option<Timestamp>,
}

impl Written {
    pub(crate) fn new(path: PathBuf, what: &'static str) -> Self {
        Self {
            path,
            what,
            fingerprint: None,
            not_after: None,
        }
    }

    pub(crate) fn with_key(mut self, key: &PublicKey) -> Self {
        self.fingerprint = Some(Digest::of(key.as_bytes()));
        self
    }

    pub(crate) fn with_certificate(mut self, certificate: &Certificate) -> Self {
        self.fingerprint = Some(certificate.fingerprint);
        self.not_after = Some(certificate.not_after);
        self
    }
}

/// A file or directory of a fleet cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// A file.
    #[error(transparent)]
    Input(#[from] InputError),
    /// A directory cannot be listed.
    #[error("cannot list {path}; run this as the owner of the directory")]
    List {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{path} is damaged: expected {expected}; put a copy back from a backup")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
    },
}

/// A file or directory could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {path}; {}", write_hint(source))]
pub struct WriteError {
    /// The file or directory.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

fn write_hint(error: &io::Error) -> String {
    let is = |kind| error.kind() == kind;
    if is(io::ErrorKind::AlreadyExists) || is(io::ErrorKind::NotADirectory) {
        "--dir is to be a directory, or a name that is free".to_owned()
    } else if is(io::ErrorKind::PermissionDenied) {
        format!(
            "user `{}` may not: run this as the user whose directory it is, or name another --dir",
            this_user()
        )
    } else {
        "run it again when that is mended".to_owned()
    }
}

/// Whether something has this name, be it a dangling link.
pub(crate) fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Writes the file that `file` describes, durably; its directory is made if need be.
pub(crate) fn write(file: Written, text: &str, mode: u32) -> Result<Written, WriteError> {
    let dir = file.path.parent().expect("our files are in directories");
    let written = durable::create_dir(dir, DIRECTORY)
        .and_then(|()| durable::write(&file.path, text.as_bytes(), mode));
    match written {
        Ok(()) => Ok(file),
        Err(source) => Err(WriteError {
            path: file.path,
            source,
        }),
    }
}

/// Whether the file has this text.
pub(crate) fn has(path: &Path, text: &str) -> bool {
    input::whole(path, text.len() as u64).is_ok_and(|there| there == text.as_bytes())
}

/// Reads a certificate, a key or a key set.
pub(crate) fn read(path: &Path) -> Result<String, FileError> {
    read_up_to(path, FILE_BYTES_MAX)
}

pub(crate) fn read_up_to(path: &Path, bytes_max: u64) -> Result<String, FileError> {
    let bytes = input::read(OPTION, path, bytes_max, FROM_BACKUP)?;
    // What is no text does not parse.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The names in a directory, which need not be there, but for what a write that was cut short left.
pub(crate) fn names(path: &Path) -> Result<Vec<String>, FileError> {
    let names = match input::names(path, NAMES_MAX) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        names => names.map_err(|source| FileError::List {
            path: path.into(),
            source,
        })?,
    };
    let names = names.iter().map(|name| name.to_string_lossy().into_owned());
    Ok(names.filter(|name| !name.starts_with('.')).collect())
}
