//! The directory that holds a fleet: its CA, its signing keys, and what was issued.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use clamcast_daemon::config::{self, ConfigError, Key, Settings, Value};
use clamcast_daemon::durable::{self, LockError, LockGuard};
use clamcast_daemon::exit;
use clamcast_daemon::input::InputError;
use clamcast_proto::dsse::{Envelope, EnvelopeError, PublicKey, Verified, sign};
use clamcast_proto::identity::{Certificate, Role};
use clamcast_proto::keys::{KeySet, KeySetError};
use clamcast_proto::revocation::RevocationList;
use clamcast_proto::{AgentName, FleetName};
use ed25519_dalek::SigningKey;
use serde::{Deserialize, Serialize};

use crate::files::{
    FROM_BACKUP, FileError, OPTION, PUBLIC, REVOKED_BYTES_MAX, WriteError, Written, is_there,
    names, read, read_up_to, write,
};
use crate::host::Host;
use crate::key;
use crate::x509::{self, Authority};

/// The files and directories of a fleet, below its directory.
pub(crate) const CA: &str = "ca.pem";
pub(crate) const CA_KEY: &str = "ca.key";
pub(crate) const ROOT_KEY: &str = "root.key";
pub(crate) const MANIFEST_KEY: &str = "manifest.key";
pub(crate) const AUDIT_KEY: &str = "audit.key";
pub(crate) const MANIFEST_KEY_NEXT: &str = "manifest.key.next";
pub(crate) const MANIFEST_KEY_OLD: &str = "manifest.key.old";
pub(crate) const AUDIT_KEY_NEXT: &str = "audit.key.next";
pub(crate) const AUDIT_KEY_OLD: &str = "audit.key.old";
pub(crate) const KEYS: &str = "manifest.pub";
pub(crate) const CHARTER: &str = "fleet.toml";
pub(crate) const MASTER: &str = "master";
pub(crate) const AGENTS: &str = "agents";
pub(crate) const ISSUED: &str = "issued";
pub(crate) const REVOKED: &str = "revoked.json";

/// The certificate in a holder's bundle.
pub(crate) const CERTIFICATE: &str = "cert.pem";

/// Stands while `init` is at work. Until it goes, nothing was issued from what is there.
pub(crate) const UNFINISHED: &str = ".unfinished";

const LOCK: &str = ".lock";

/// What `fleet.toml` says.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Charter {
    pub(crate) fleet: FleetName,
    /// Where agents find the master; empty until its certificate is issued.
    #[serde(default)]
    pub(crate) hosts: Vec<Host>,
}

impl Settings for Charter {
    const KEYS: &'static [Key] = &[
        Key {
            name: "fleet",
            value: Value::Required("\"example\""),
            expected: "the fleet's name, such as \"example\"",
            meaning: "The fleet's name.",
        },
        Key {
            name: "hosts",
            value: Value::Default("[]"),
            expected: "a list of DNS names and IP addresses without ports, such as [\"mirror.example.net\"]",
            meaning: "Where agents find the master.",
        },
    ];
}

impl Charter {
    /// Writes `fleet.toml` into `dir`.
    pub(crate) fn write(&self, dir: &Path) -> Result<Written, WriteError> {
        let toml = toml::to_string(self).expect("a name and a list of texts are TOML");
        let head = "# Written by clamcast-certs; `clamcast-certs master --host` sets `hosts`.\n";
        let file = Written::new(
            dir.join(CHARTER),
            "the fleet's name and where its master is",
        );
        write(file, &format!("{head}{toml}"), PUBLIC)
    }
}

/// Signs a key set with the root key and writes it into `dir`.
pub(crate) fn write_keys(
    dir: &Path,
    set: KeySet,
    root: &SigningKey,
) -> Result<Written, WriteError> {
    let signed = sign(set, root);
    let text = serde_json::to_string_pretty(signed.envelope()).expect("an envelope serialises");
    let what = "key set: what agents trust, by its root key";
    let file = Written::new(dir.join(KEYS), what).with_key(&signed.root);
    write(file, &(text + "\n"), PUBLIC)
}

/// A fleet's directory, opened.
pub(crate) struct Fleet {
    pub(crate) dir: PathBuf,
    pub(crate) charter: Charter,
    pub(crate) ca_pem: String,
    pub(crate) ca: Certificate,
}

/// Why a fleet's directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no fleet.
    #[error(
        "{dir} holds no fleet; make one with `clamcast-certs init --dir {dir} --fleet NAME`, or name another --dir"
    )]
    NoFleet {
        /// The directory.
        dir: PathBuf,
    },
    /// The fleet was not made to its end.
    #[error(
        "`init` did not finish in {dir}; run it again: `clamcast-certs init --dir {dir} --fleet NAME` (nothing was issued from what is there)"
    )]
    Unfinished {
        /// The directory.
        dir: PathBuf,
    },
    /// Another command is writing there.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// `fleet.toml` is wrong.
    #[error(transparent)]
    Charter(#[from] ConfigError),
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// What was issued cannot be known.
    #[error("the record of what was issued is gone; put {path} back from a backup")]
    NoRecord {
        /// The record's directory.
        path: PathBuf,
    },
    /// The CA's key and certificate do not belong together.
    #[error("{key} is not the key of {certificate}; put the right one back from a backup")]
    Mismatch {
        /// The key.
        key: PathBuf,
        /// The certificate.
        certificate: PathBuf,
    },
    /// The key set does not verify.
    #[error("{path} cannot be given to agents; put a copy back from a backup")]
    Keys {
        /// The file.
        path: PathBuf,
        /// Why.
        source: KeySetError,
    },
    /// A statement is of another fleet.
    #[error("{path} is of fleet `{found}`, {dir} holds fleet `{expected}`")]
    OtherFleet {
        /// The file.
        path: PathBuf,
        /// The fleet's directory.
        dir: PathBuf,
        /// Whose it is.
        found: FleetName,
        /// Whose it should be.
        expected: FleetName,
    },
    /// The revocation list does not verify.
    #[error(
        "{path} is not the list that this CA signed; put a copy back, the master has one in its configuration directory"
    )]
    Revoked {
        /// The file.
        path: PathBuf,
        /// Why.
        source: EnvelopeError,
    },
}

impl OpenError {
    /// The exit code of a command that ends with this.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NoFleet { .. } | Self::Unfinished { .. } | Self::Charter(_) => exit::USAGE,
            Self::Keys { .. } | Self::OtherFleet { .. } | Self::Revoked { .. } => exit::REFUSED,
            Self::Lock(_) | Self::File(_) | Self::NoRecord { .. } | Self::Mismatch { .. } => {
                exit::FAILED
            }
        }
    }
}

impl Fleet {
    /// Opens the directory to read.
    pub(crate) fn open(dir: &Path) -> Result<Self, OpenError> {
        if is_there(&dir.join(UNFINISHED)) {
            return Err(OpenError::Unfinished { dir: dir.into() });
        }
        let charter = config::File::read_for(OPTION, &dir.join(CHARTER), FROM_BACKUP)
            .and_then(|file| file.parse())
            .map_err(|error| match error {
                ConfigError::Read(InputError::Missing { .. }) => {
                    OpenError::NoFleet { dir: dir.into() }
                }
                ConfigError::Read(error) => OpenError::File(FileError::Input(error)),
                ConfigError::NotText { .. }
                | ConfigError::Empty { .. }
                | ConfigError::Content { .. } => OpenError::Charter(error),
            })?;
        let path = dir.join(CA);
        let ca_pem = read(&path)?;
        let ca = x509::read(&ca_pem).ok_or(FileError::Damaged {
            path,
            expected: "a certificate with an Ed25519 key in PEM",
        })?;
        Ok(Self {
            dir: dir.into(),
            charter,
            ca_pem,
            ca,
        })
    }

    /// Opens the directory to write: nobody else writes there until the guard is dropped.
    pub(crate) fn open_to_write(dir: &Path) -> Result<(Self, LockGuard), OpenError> {
        // Twice: a directory without a fleet is left as it is, without a lock file, and with one
        // what counts is what is there once the lock is held.
        Self::open(dir)?;
        let guard = lock(dir)?;
        durable::sweep(dir); // it may have left a private key behind
        Ok((Self::open(dir)?, guard))
    }

    /// The CA with its key.
    pub(crate) fn authority(&self) -> Result<Authority, OpenError> {
        let path = self.dir.join(CA_KEY);
        let key = key::read(&path)?;
        let certificate = self.dir.join(CA);
        if PublicKey::of(&key) != self.ca.key {
            let key = path;
            return Err(OpenError::Mismatch { key, certificate });
        }
        let authority = Authority::new(&self.ca_pem, self.ca.clone(), key);
        Ok(authority.map_err(|_| FileError::Damaged {
            path: certificate,
            expected: "the certificate of a CA",
        })?)
    }

    /// The key set as agents get it, checked, and its text.
    pub(crate) fn keys(&self) -> Result<(Verified<KeySet>, String), OpenError> {
        let path = self.dir.join(KEYS);
        let text = read(&path)?;
        let envelope: Envelope = serde_json::from_str(&text).map_err(|_| FileError::Damaged {
            path: path.clone(),
            expected: "a signed key set in JSON",
        })?;
        let set = KeySet::verify(&envelope).map_err(|source| OpenError::Keys {
            path: path.clone(),
            source,
        })?;
        self.check_fleet(path, &set.fleet)?;
        Ok((set, text))
    }

    /// The newest revocation list; `None` if nobody was ever revoked.
    pub(crate) fn revoked(&self) -> Result<Option<Verified<RevocationList>>, OpenError> {
        let path = self.dir.join(REVOKED);
        if !is_there(&path) {
            return Ok(None);
        }
        let text = read_up_to(&path, REVOKED_BYTES_MAX)?;
        let envelope: Envelope = serde_json::from_str(&text).map_err(|_| FileError::Damaged {
            path: path.clone(),
            expected: "a signed revocation list in JSON",
        })?;
        let list: Verified<RevocationList> =
            envelope
                .verify([&self.ca.key])
                .map_err(|source| OpenError::Revoked {
                    path: path.clone(),
                    source,
                })?;
        self.check_fleet(path, &list.fleet)?;
        Ok(Some(list))
    }

    /// The names of all agents that ever had a certificate, in order: those in the record, and those
    /// with a bundle, should the record be gone.
    pub(crate) fn agents(&self) -> Result<Vec<AgentName>, OpenError> {
        let mut found = names(&self.dir.join(ISSUED).join(AGENTS))?;
        found.extend(names(&self.dir.join(AGENTS))?);
        let mut names: Vec<AgentName> = found.iter().filter_map(|name| name.parse().ok()).collect();
        names.sort();
        names.dedup();
        Ok(names)
    }

    /// Every certificate that the holder of `role` is known to have had, in the order in which they
    /// run out.
    pub(crate) fn issued(&self, role: &Role) -> Result<Vec<Certificate>, OpenError> {
        let mut issued = self.recorded(role)?;
        issued.extend(self.unrecorded(role, &issued));
        issued.sort_by_key(|certificate| certificate.not_after);
        Ok(issued)
    }

    /// The certificate in the holder's bundle, if it is not among the `recorded` ones. The record is
    /// written first, so then a part of it is gone.
    pub(crate) fn unrecorded(&self, role: &Role, recorded: &[Certificate]) -> Option<Certificate> {
        let path = self.bundle_path(role).join(CERTIFICATE);
        let pem = is_there(&path).then(|| read(&path).ok())??;
        let certificate = x509::read(&pem)?;
        let identity = certificate.identity.as_ref()?;
        let ours = identity.fleet == self.charter.fleet && same_holder(&identity.role, role);
        let is_known = |known: &Certificate| known.serial == certificate.serial;
        (ours && !recorded.iter().any(is_known)).then_some(certificate)
    }

    /// That there is a record, without which nobody can say that something was never issued: the
    /// first certificate of a fleet is the master's.
    pub(crate) fn check_record(&self) -> Result<(), OpenError> {
        let path = self.dir.join(ISSUED);
        let has_master = !self.charter.hosts.is_empty();
        match has_master && !is_there(&self.issued_path(&Role::Master)) {
            true => Err(OpenError::NoRecord { path }),
            false => Ok(()),
        }
    }

    /// The record of what was issued to the holder of `role`.
    pub(crate) fn recorded(&self, role: &Role) -> Result<Vec<Certificate>, OpenError> {
        let path = self.issued_path(role);
        let mut issued = Vec::new();
        for name in names(&path)? {
            let path = path.join(name);
            let certificate = x509::read(&read(&path)?).filter(|certificate| {
                let identity = certificate.identity.as_ref();
                identity.is_some_and(|identity| same_holder(&identity.role, role))
            });
            issued.push(certificate.ok_or(FileError::Damaged {
                path,
                expected: "a certificate issued to the holder that its directory names, in PEM",
            })?);
        }
        Ok(issued)
    }

    /// Where copies of all certificates of a holder are kept, so that they can be revoked.
    pub(crate) fn issued_path(&self, role: &Role) -> PathBuf {
        let issued = self.dir.join(ISSUED);
        match role {
            Role::Master => issued.join(MASTER),
            Role::Agent { name, .. } => issued.join(AGENTS).join(name.as_str()),
        }
    }

    /// Where the files go that the holder of `role` needs.
    pub(crate) fn bundle_path(&self, role: &Role) -> PathBuf {
        match role {
            Role::Master => self.dir.join(MASTER),
            Role::Agent { name, .. } => self.dir.join(AGENTS).join(name.as_str()),
        }
    }

    fn check_fleet(&self, path: PathBuf, found: &FleetName) -> Result<(), OpenError> {
        if *found == self.charter.fleet {
            return Ok(());
        }
        Err(OpenError::OtherFleet {
            path,
            dir: self.dir.clone(),
            found: found.clone(),
            expected: self.charter.fleet.clone(),
        })
    }
}

/// Whether two roles are those of one holder, whatever the groups.
fn same_holder(one: &Role, other: &Role) -> bool {
    match (one, other) {
        (Role::Master, Role::Master) => true,
        (Role::Agent { name: one, .. }, Role::Agent { name: other, .. }) => one == other,
        (Role::Master, Role::Agent { .. }) | (Role::Agent { .. }, Role::Master) => false,
    }
}

/// How long a command waits for another one that writes in the same directory. One takes some
/// milliseconds; an Ansible play issues for several hosts at a time.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// How often it looks.
const LOCK_POLL: Duration = Duration::from_millis(20);

/// Keeps other writers out of the directory.
pub(crate) fn lock(dir: &Path) -> Result<LockGuard, LockError> {
    let start = Instant::now();
    loop {
        match durable::lock(&dir.join(LOCK)) {
            Err(LockError::Held { .. }) if start.elapsed() < LOCK_PATIENCE => {
                thread::sleep(LOCK_POLL);
            }
            result => return result,
        }
    }
}
