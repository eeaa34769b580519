//! Private keys: a file that the configuration names, or the credential that systemd passes on in its
//! place (`LoadCredential=` in systemd.exec(5)).
//!
//! A credential has the name of the configuration key, such as `tls.key`. It lets the file belong to
//! root, so that the daemon's user can read the key only while the service runs.

use std::env;
use std::io;
use std::path::{Path, PathBuf};

use crate::input::{self, InputError};

/// A private key as it was read.
pub struct Secret {
    /// Its content.
    pub bytes: Vec<u8>,
    /// The source, for messages: the file, or the credential and the file that it replaces.
    pub origin: PathBuf,
}

/// Reads the private key of the configuration key `key`, which has at most `limit` bytes. The
/// credential of this name replaces the file `path`, unless it is blank: that is how a unit says that
/// the file of its `LoadCredential=` does not exist. `origin` is as for [`input::read`].
pub fn read(
    key: &'static str,
    path: &Path,
    limit: u64,
    origin: &'static str,
) -> Result<Secret, InputError> {
    let directory = env::var_os("CREDENTIALS_DIRECTORY");
    read_in(
        directory.as_deref().map(Path::new),
        key,
        path,
        limit,
        origin,
    )
}

fn read_in(
    directory: Option<&Path>,
    key: &'static str,
    path: &Path,
    limit: u64,
    origin: &'static str,
) -> Result<Secret, InputError> {
    let from_file = || {
        let bytes = input::read(key, path, limit, origin)?;
        let origin = path.to_owned();
        Ok(Secret { bytes, origin })
    };
    let Some(directory) = directory else {
        return from_file();
    };
    let credential = directory.join(key);
    match input::whole(&credential, limit) {
        Ok(bytes) if !bytes.trim_ascii().is_empty() => Ok(Secret {
            bytes,
            origin: replacing(&credential, path),
        }),
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(InputError::Io {
            key,
            path: replacing(&credential, path),
            source,
        }),
        Ok(_) | Err(_) => from_file().map_err(|error| advised(error, key, path)),
    }
}

/// The credential, and the file that it replaces, for messages.
fn replacing(credential: &Path, path: &Path) -> PathBuf {
    let text = format!(
        "{} (the credential in place of {})",
        credential.display(),
        path.display()
    );
    text.into()
}

/// Adds the credential to the next step: under systemd, root may keep the file for itself.
fn advised(error: InputError, key: &'static str, path: &Path) -> InputError {
    match error {
        InputError::Denied {
            key,
            path,
            user,
            next: _,
        } => InputError::Denied {
            next: format!(
                "the credential `{key}` is blank or missing; set `LoadCredential={key}:{}` with \
                 `systemctl edit`, or let `{user}` read the file",
                path.display()
            ),
            key,
            path,
            user,
        },
        InputError::Missing { origin, .. } => InputError::NoCredential {
            key,
            path: path.to_owned(),
            origin,
        },
        InputError::NotAFile { .. }
        | InputError::TooLong { .. }
        | InputError::Io { .. }
        | InputError::NoCredential { .. } => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Reads a key whose file and credential have these contents, if they exist. Returns the content
    /// or the error, with placeholders for the directories.
    fn check(file: Option<&str>, credential: Option<&str>, expected: &str) {
        let [etc, run] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let path = etc.path().join("key.pem");
        if let Some(text) = file {
            fs::write(&path, text).unwrap();
        }
        if let Some(text) = credential {
            fs::write(run.path().join("tls.key"), text).unwrap();
        }
        let said = match read_in(Some(run.path()), "tls.key", &path, 10, "make it") {
            Ok(secret) => {
                let text = String::from_utf8(secret.bytes).unwrap();
                format!("{text} of {}", secret.origin.display())
            }
            Err(error) => crate::chain(&error),
        };
        let said = said.replace(&run.path().display().to_string(), "RUN");
        let said = said.replace(&etc.path().display().to_string(), "ETC");
        assert_eq!(said, expected);
    }

    #[test]
    fn a_credential_that_is_not_blank_replaces_the_file() {
        let replaced = "new of RUN/tls.key (the credential in place of ETC/key.pem)";
        check(Some("old"), Some("new"), replaced);
        check(None, Some("new"), replaced);
        for blank in [None, Some(""), Some("\n")] {
            check(Some("old"), blank, "old of ETC/key.pem");
        }
        check(
            Some("old"),
            Some("longer than ten"),
            "tls.key: cannot read RUN/tls.key (the credential in place of ETC/key.pem): \
             it has more than 10 bytes",
        );
    }

    #[test]
    fn without_file_and_credential_both_are_named() {
        check(
            None,
            Some("\n"),
            "tls.key: ETC/key.pem does not exist, and the credential `tls.key` is blank or missing; \
             make it",
        );
    }

    #[test]
    fn outside_a_unit_the_file_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pem");
        fs::write(&path, "old").unwrap();
        let secret = read_in(None, "tls.key", &path, 10, "").ok().unwrap();
        assert_eq!(
            (secret.bytes.as_slice(), secret.origin),
            (&b"old"[..], path)
        );
    }
}
