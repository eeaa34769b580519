//! `clamcast-certs rotate`: another key to sign generations or the audit log with.
//!
//! A rotation makes a key set `[new, old...]`: generations and logs that an old key signed still
//! count, and master and agents change over whenever they hear of it. The private key before this one
//! is kept beside the new one, so that the master can go back to it for as long as it is in the set.
//! With `drop_old` the old keys go from the set, and only then the kept private key goes, too.
//!
//! A crash at any point loses no key, and the same command again goes on from there:
//!
//! | crash after | on disk | the same command |
//! |---|---|---|
//! | the new private key | `NAME.key.next`, not in the set | signs a set with it |
//! | the key set | `NAME.key.next`, first in the set | gives it its name |
//! | setting the old key aside | the same, and no `NAME.key` | the same |

use std::fs;
use std::path::{Path, PathBuf};

use clamcast_daemon::durable;
use clamcast_daemon::exit;
use clamcast_proto::Epoch;
use clamcast_proto::dsse::{KeyId, PublicKey};
use clamcast_proto::keys::{KEYS_MAX, KeySet};
use clap::ValueEnum;
use ed25519_dalek::SigningKey;
use jiff::Timestamp;

use crate::files::{self, FileError, WriteError, Written};
use crate::fleet::{self, Fleet, OpenError};
use crate::key;

/// Which key is replaced.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Rotated {
    /// The key that signs what is published
    Manifest,
    /// The key that signs the master's log
    Audit,
}

impl Rotated {
    /// The file of the key that is in use, of the one that is made, and of the one before.
    fn names(self) -> [&'static str; 3] {
        match self {
            Self::Manifest => [
                fleet::MANIFEST_KEY,
                fleet::MANIFEST_KEY_NEXT,
                fleet::MANIFEST_KEY_OLD,
            ],
            Self::Audit => [
                fleet::AUDIT_KEY,
                fleet::AUDIT_KEY_NEXT,
                fleet::AUDIT_KEY_OLD,
            ],
        }
    }

    fn keys(self, set: &mut KeySet) -> &mut Vec<PublicKey> {
        match self {
            Self::Manifest => &mut set.manifest,
            Self::Audit => &mut set.audit,
        }
    }

    fn what(self) -> &'static str {
        match self {
            Self::Manifest => "manifest key: signs what is published",
            Self::Audit => "audit key: signs the master's log",
        }
    }
}

/// What [`rotate`] did.
#[derive(Debug)]
pub struct Rotation {
    /// What was written. Empty: there was no old key to drop.
    pub files: Vec<Written>,
    /// The private key before this one, if it is kept.
    pub old: Option<PathBuf>,
    /// The key set's version.
    pub version: u64,
    /// Its epoch.
    pub epoch: Epoch,
    /// How many keys of this kind count, the new one among them.
    pub keys: usize,
    /// Keys that count no more.
    pub dropped: Vec<KeyId>,
    /// A rotation before this one had not finished, and now has; nothing else was done.
    pub resumed: bool,
}

/// Why no key was replaced.
#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    /// The fleet's directory.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The root key does not sign this fleet's key sets.
    #[error("{path} is not the root key of the key set; put the right one there for this command")]
    Root {
        /// The root key.
        path: PathBuf,
    },
    /// The private key is not the first of the set.
    #[error("{path} is not the newest key of the key set; put the right one back from a backup")]
    Key {
        /// The private key.
        path: PathBuf,
    },
    /// A file could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl From<FileError> for RotateError {
    fn from(error: FileError) -> Self {
        Self::Open(error.into())
    }
}

impl RotateError {
    /// The exit code of a command that ends with this.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Open(error) => error.exit_code(),
            Self::Root { .. } | Self::Key { .. } => exit::REFUSED,
            Self::Write(_) => exit::FAILED,
        }
    }
}

/// Makes a new key and a key set that has it before the old ones; or, if `drop_old`, a key set
/// without the old ones, of a new epoch where generations are concerned.
pub fn rotate(
    dir: &Path,
    rotated: Rotated,
    drop_old: bool,
    now: Timestamp,
) -> Result<Rotation, RotateError> {
    let (fleet, _guard) = Fleet::open_to_write(dir)?;
    let set = (*fleet.keys()?.0).clone();
    let rotation = Rotating {
        paths: rotated.names().map(|name| dir.join(name)),
        dir,
        rotated,
        set,
        now,
    };
    let unfinished = rotation
        .next()?
        .is_some_and(|next| rotation.is_newest(&next));
    if unfinished {
        rotation.place()?;
    }
    match (drop_old, unfinished) {
        (true, _) => rotation.drop_old(),
        (false, true) => {
            let written = Written::new(dir.join(fleet::KEYS), "key set, written before");
            let root = rotation.set.root.clone();
            rotation.done(written.with_key(&root), Vec::new(), true)
        }
        (false, false) => rotation.add(),
    }
}

struct Rotating<'a> {
    dir: &'a Path,
    rotated: Rotated,
    /// Of the key in use, the one that is made, and the one before.
    paths: [PathBuf; 3],
    set: KeySet,
    now: Timestamp,
}

impl Rotating<'_> {
    fn add(mut self) -> Result<Rotation, RotateError> {
        let root = self.root()?;
        self.current()?;
        let next = match self.next()? {
            Some(next) => next,
            None => {
                let next = key::generate();
                let file = Written::new(self.paths[1].clone(), self.rotated.what());
                files::write(file, &key::to_pem(&next), files::PRIVATE)?;
                next
            }
        };
        let keys = self.rotated.keys(&mut self.set);
        keys.insert(0, PublicKey::of(&next));
        // The oldest go first, which nothing has been signed with for many rotations.
        let dropped = keys.split_off(keys.len().min(KEYS_MAX));
        let written = self.sign(&root)?;
        self.place()?;
        self.done(written, dropped, false)
    }

    fn drop_old(mut self) -> Result<Rotation, RotateError> {
        self.current()?;
        let dropped = self.rotated.keys(&mut self.set).split_off(1);
        let mut files = Vec::new();
        if !dropped.is_empty() {
            let root = self.root()?;
            if self.rotated == Rotated::Manifest {
                // A thief may have used up the numbers of this one.
                self.set.epoch.0 += 1;
            }
            files.push(self.sign(&root)?);
        }
        let old = &self.paths[2];
        if files::is_there(old) {
            fs::remove_file(old)
                .and_then(|()| durable::sync_dir(self.dir))
                .map_err(failed(old))?;
        }
        Ok(Rotation {
            files,
            old: None,
            version: self.set.version,
            epoch: self.set.epoch,
            keys: 1,
            dropped: dropped.iter().map(PublicKey::id).collect(),
            resumed: false,
        })
    }

    fn done(
        mut self,
        set: Written,
        dropped: Vec<PublicKey>,
        resumed: bool,
    ) -> Result<Rotation, RotateError> {
        let current = self.current()?;
        let [path, _, old] = self.paths;
        let key = Written::new(path, self.rotated.what()).with_key(&PublicKey::of(&current));
        Ok(Rotation {
            files: vec![key, set],
            old: files::is_there(&old).then_some(old),
            version: self.set.version,
            epoch: self.set.epoch,
            keys: self.rotated.keys(&mut self.set).len(),
            dropped: dropped.iter().map(PublicKey::id).collect(),
            resumed,
        })
    }

    /// Writes the changed set.
    fn sign(&mut self, root: &SigningKey) -> Result<Written, RotateError> {
        self.set.version += 1;
        self.set.issued = self.now;
        Ok(fleet::write_keys(self.dir, self.set.clone(), root)?)
    }

    /// Gives the new private key its name; the one that has it is kept.
    fn place(&self) -> Result<(), RotateError> {
        let [current, next, old] = &self.paths;
        if files::is_there(current) {
            fs::rename(current, old).map_err(failed(old))?;
        }
        fs::rename(next, current)
            .and_then(|()| durable::sync_dir(self.dir))
            .map_err(failed(current))?;
        Ok(())
    }

    fn root(&self) -> Result<SigningKey, RotateError> {
        let path = self.dir.join(fleet::ROOT_KEY);
        let root = key::read(&path)?;
        if PublicKey::of(&root) == self.set.root {
            Ok(root)
        } else {
            Err(RotateError::Root { path })
        }
    }

    /// The private key in use.
    fn current(&self) -> Result<SigningKey, RotateError> {
        let path = &self.paths[0];
        let current = key::read(path)?;
        if self.is_newest(&current) {
            Ok(current)
        } else {
            Err(RotateError::Key { path: path.clone() })
        }
    }

    /// The private key that an interrupted rotation made.
    fn next(&self) -> Result<Option<SigningKey>, RotateError> {
        let path = &self.paths[1];
        Ok(match files::is_there(path) {
            true => Some(key::read(path)?),
            false => None,
        })
    }

    fn is_newest(&self, key: &SigningKey) -> bool {
        let mut set = self.set.clone();
        self.rotated.keys(&mut set).first() == Some(&PublicKey::of(key))
    }
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> WriteError {
    let path = path.to_owned();
    move |source| WriteError { path, source }
}
