//! The revocation list as the master uses it: the last good one, whatever happens to the file.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use clamcast_daemon::durable;
use clamcast_daemon::input::{self, InputError};
use clamcast_proto::FleetName;
use clamcast_proto::dsse::{Envelope, EnvelopeError, PublicKey, Verified};
use clamcast_proto::revocation::RevocationList;

/// Watches `revoked.json`.
#[derive(Debug)]
pub struct Revocations {
    path: PathBuf,
    /// Where the last good list is kept, so that a damaged or deleted file brings nobody back.
    kept: PathBuf,
    fleet: FleetName,
    ca: PublicKey,
    list: Option<Verified<RevocationList>>,
    /// Why the kept copy cannot be used, if there is one.
    kept_damage: Option<String>,
    seen: Option<Stamp>,
    alarm: Option<String>,
}

/// What tells two versions of the file apart without reading them.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Stamp {
    Missing,
    File {
        modified: Option<SystemTime>,
        bytes: u64,
        inode: u64,
    },
    Unreadable(io::ErrorKind),
}

/// What a look at the file brought.
#[derive(Debug)]
pub enum Look {
    /// Nothing new.
    Same,
    /// A newer list is in force.
    Newer,
    /// The file is damaged, gone or older than the list in force, which stays. Said once.
    Alarm(String),
}

/// Why the file does not count.
#[derive(Debug, thiserror::Error)]
enum RevokedError {
    #[error(transparent)]
    Read(#[from] InputError),
    #[error("it is not a signed list")]
    Json(#[from] serde_json::Error),
    #[error("it is not signed by this fleet's CA")]
    Envelope(#[from] EnvelopeError),
    #[error("it is the list of fleet `{0}`")]
    Fleet(FleetName),
}

/// Largest file read: the payload's bound in base64.
const FILE_BYTES_MAX: u64 = 24 << 20;

impl Revocations {
    /// Starts with the list that was last in force. Call [`Revocations::look`] before the first use.
    pub fn open(path: PathBuf, state: &Path, fleet: FleetName, ca: PublicKey) -> Self {
        let kept = state.join("revoked.json");
        let (list, kept_damage) = match stamp(&kept) {
            Stamp::Missing => (None, None),
            Stamp::File { .. } | Stamp::Unreadable(_) => match read(&kept, &fleet, &ca) {
                Ok(list) => (Some(list), None),
                Err(error) => (None, Some(crate::chain(&error))),
            },
        };
        Self {
            kept_damage,
            path,
            kept,
            fleet,
            ca,
            list,
            seen: None,
            alarm: None,
        }
    }

    /// The list in force.
    pub fn list(&self) -> Option<&RevocationList> {
        self.list.as_deref()
    }

    /// Why the file does not count at the moment.
    pub fn alarm(&self) -> Option<&str> {
        self.alarm.as_deref()
    }

    /// Looks at the file again. Blocking, and cheap as long as it does not change.
    pub fn look(&mut self) -> Look {
        let stamp = stamp(&self.path);
        if self.seen.as_ref() == Some(&stamp) {
            return Look::Same;
        }
        self.seen = Some(stamp.clone());
        let newer = match (&stamp, &self.list) {
            (Stamp::Missing, None) => match &self.kept_damage {
                None => return Look::Same, // nobody was ever revoked
                Some(reason) => Err(format!(
                    "it is gone, and the kept copy is damaged ({reason})"
                )),
            },
            (Stamp::Missing, Some(_)) => Err("it is gone".to_owned()),
            (Stamp::File { .. } | Stamp::Unreadable(_), _) => {
                read(&self.path, &self.fleet, &self.ca).map_err(|error| crate::chain(&error))
            }
        };
        let newer = newer.and_then(|newer| match &self.list {
            Some(list) if newer.version < list.version => Err(format!(
                "it has version {}, older than version {} in force",
                newer.version, list.version
            )),
            Some(_) | None => Ok(newer),
        });
        match newer {
            Ok(newer) => {
                (self.alarm, self.kept_damage) = (None, None);
                let text = serde_json::to_vec(newer.envelope()).expect("an envelope serialises");
                if let Err(error) = durable::write(&self.kept, &text, 0o600) {
                    tracing::error!(path = %self.kept.display(), %error, "cannot keep the revocation list");
                }
                let same = self.list.as_ref().map(Verified::payload_sha256)
                    == Some(newer.payload_sha256());
                self.list = Some(newer);
                if same { Look::Same } else { Look::Newer }
            }
            Err(reason) => {
                let (path, kept) = (self.path.display(), self.kept.display());
                let next = match &self.list {
                    Some(_) => format!("the last good list stays in force, a copy of it is {kept}"),
                    None => "no list is in force and revoked hosts may connect: copy revoked.json \
                             from the directory of `clamcast-certs`"
                        .to_owned(),
                };
                let alarm = format!("{path} does not count: {reason}; {next}");
                self.alarm = Some(alarm.clone());
                Look::Alarm(alarm)
            }
        }
    }
}

/// Why the list at `path` would not count; a missing one is none.
pub fn objection(path: &Path, fleet: &FleetName, ca: &PublicKey) -> Option<String> {
    if stamp(path) == Stamp::Missing {
        return None;
    }
    let error = read(path, fleet, ca).err()?;
    Some(format!(
        "{} does not count: {}",
        path.display(),
        crate::chain(&error)
    ))
}

fn stamp(path: &Path) -> Stamp {
    use std::os::unix::fs::MetadataExt as _;
    match fs::metadata(path) {
        Ok(file) => Stamp::File {
            modified: file.modified().ok(),
            bytes: file.len(),
            inode: file.ino(),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Stamp::Missing,
        Err(error) => Stamp::Unreadable(error.kind()),
    }
}

fn read(
    path: &Path,
    fleet: &FleetName,
    ca: &PublicKey,
) -> Result<Verified<RevocationList>, RevokedError> {
    let origin = "`clamcast-certs revoke` writes it";
    let text = input::read("tls.revoked", path, FILE_BYTES_MAX, origin)?;
    let envelope: Envelope = serde_json::from_slice(&text)?;
    let list: Verified<RevocationList> = envelope.verify([ca])?;
    if list.fleet != *fleet {
        return Err(RevokedError::Fleet(list.fleet.clone()));
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clamcast_proto::dsse::sign;
    use clamcast_proto::identity::Serial;
    use clamcast_proto::revocation::Revoked;
    use ed25519_dalek::SigningKey;
    use jiff::Timestamp;
    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    struct Case {
        dir: tempfile::TempDir,
        revocations: Revocations,
    }

    impl Case {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let revocations = Self::open(&dir);
            Self { dir, revocations }
        }

        fn open(dir: &tempfile::TempDir) -> Revocations {
            let ca = PublicKey::of(&SigningKey::from_bytes(&[1; 32]));
            Revocations::open(
                dir.path().join("given.json"),
                dir.path(),
                "bank".parse().unwrap(),
                ca,
            )
        }

        fn put(&self, version: u64, signer: u8) {
            let revoked = Revoked {
                name: "web1".parse().unwrap(),
                serial: Serial(format!("{version:02x}")),
                time: Timestamp::UNIX_EPOCH,
                reason: None,
            };
            let list = RevocationList {
                fleet: "bank".parse().unwrap(),
                version,
                issued: Timestamp::UNIX_EPOCH,
                revoked: vec![revoked],
            };
            let signed = sign(list, &SigningKey::from_bytes(&[signer; 32]));
            self.write(&serde_json::to_vec(signed.envelope()).unwrap());
        }

        fn write(&self, bytes: &[u8]) {
            durable::write(&self.dir.path().join("given.json"), bytes, 0o600).unwrap();
        }

        fn version(&self) -> u64 {
            self.revocations.list().map_or(0, |list| list.version)
        }
    }

    #[test]
    fn no_file_means_that_nobody_is_revoked() {
        let mut case = Case::new();
        assert!(matches!(case.revocations.look(), Look::Same));
        assert_eq!(case.version(), 0);
    }

    #[test]
    fn a_missing_list_with_a_damaged_kept_copy_is_an_alarm() {
        let mut case = Case::new();
        case.put(2, 1);
        assert!(matches!(case.revocations.look(), Look::Newer));
        fs::remove_file(case.dir.path().join("given.json")).unwrap();
        fs::write(case.dir.path().join("revoked.json"), "{").unwrap();
        case.revocations = Case::open(&case.dir);
        let Look::Alarm(alarm) = case.revocations.look() else {
            panic!("revoked hosts may connect");
        };
        assert!(alarm.contains("revoked hosts may connect"), "{alarm}");
        case.put(2, 1);
        assert!(matches!(case.revocations.look(), Look::Newer));
        assert_eq!((case.version(), case.revocations.alarm()), (2, None));
    }

    #[test]
    fn a_damaged_deleted_forged_or_older_list_leaves_the_last_good_one_also_after_a_restart() {
        let mut case = Case::new();
        case.put(2, 1);
        assert!(matches!(case.revocations.look(), Look::Newer));
        assert!(matches!(case.revocations.look(), Look::Same));
        let given = case.dir.path().join("given.json");
        for damage in 0..5 {
            match damage {
                0 => case.write(b"{"),
                1 => case.put(3, 9),
                2 => case.put(1, 1),
                3 => fs::remove_file(&given).unwrap(),
                _ => mkfifo(&given, Mode::S_IRUSR).unwrap(), // which hangs nobody
            }
            assert!(
                matches!(case.revocations.look(), Look::Alarm(_)),
                "damage {damage}"
            );
            assert!(
                matches!(case.revocations.look(), Look::Same),
                "an alarm is said once"
            );
            assert!(case.revocations.alarm().is_some());
            assert_eq!(case.version(), 2);
        }
        case.revocations = Case::open(&case.dir);
        case.revocations.look();
        assert_eq!(case.version(), 2);
        case.put(3, 1);
        assert!(matches!(case.revocations.look(), Look::Newer));
        assert_eq!((case.version(), case.revocations.alarm()), (3, None));
    }
}
