//! `clamcast-certs rotate`: replaces a key that signs generations or the audit log.
//!
//! A rotation makes a key set `[new, old...]`, so that statements of the old keys still count. The
//! previous private key is kept beside the new one, and the master can go back to it for as long as it
//! is in the set. [`Change::DropOld`] removes the old keys from the set. [`Change::RestoreOld`] puts the
//! previous audit key back into the set, for a master that has not yet signed its log with the new key.
//!
//! A crash at any point loses no key, and a rerun of the command completes the rotation:
//!
//! | crash after | on disk | the rerun |
//! |---|---|---|
//! | the new private key | `NAME.key.next`, not in the set | signs a set with it |
//! | the key set | `NAME.key.next`, first in the set | renames it |
//! | setting the old key aside | the same, and no `NAME.key` | the same |
//! | the key set without old keys | `NAME.key.old` | removes a manifest key, and reports the set again |

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
    /// The files of the key in use, of the key of an unfinished rotation, and of the previous key.
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

/// The change to make.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Change {
    /// A new key, and a key set in which it precedes the old ones.
    Add,
    /// A key set without the old keys, of a new epoch if they are manifest keys.
    DropOld,
    /// A key set that has the previous key again, after the newest.
    RestoreOld,
}

/// The result of [`rotate`].
#[derive(Debug)]
pub struct Rotation {
    /// The files for the master, in the order of copying: the key set, then the private key.
    pub files: Vec<Written>,
    /// The previous private key, if it is kept.
    pub old: Option<PathBuf>,
    /// The key set's version.
    pub version: u64,
    /// The key set's epoch.
    pub epoch: Epoch,
    /// The number of keys of this kind in the set.
    pub keys: usize,
    /// Keys that the set no longer has.
    pub dropped: Vec<KeyId>,
    /// What was done.
    pub outcome: Outcome,
}

/// What [`rotate`] did.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// The change that was asked for.
    Changed,
    /// The key set was as asked for before.
    Unchanged,
    /// An unfinished rotation was completed, and nothing else was done.
    Resumed,
}

/// Why no key was replaced.
#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    /// The fleet's directory.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Another root key than that of the key set.
    #[error("{path} is not the root key of the key set; put the right one there for this command")]
    Root {
        /// The root key.
        path: PathBuf,
    },
    /// The private key is not the newest of the set.
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

/// Makes a change, or completes an unfinished rotation.
///
/// Old keys are not dropped in the same run as an unfinished rotation is completed: the master has not
/// had the new audit key yet, and would refuse the log that the old key signed.
pub fn rotate(
    dir: &Path,
    rotated: Rotated,
    change: Change,
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
        let set = rotation.set_as_it_is();
        return rotation.done(set, Vec::new(), Outcome::Resumed);
    }
    match change {
        Change::Add => rotation.add(),
        Change::DropOld => rotation.drop_old(),
        Change::RestoreOld => rotation.restore_old(),
    }
}

struct Rotating<'a> {
    dir: &'a Path,
    rotated: Rotated,
    /// See [`Rotated::names`].
    paths: [PathBuf; 3],
    set: KeySet,
    now: Timestamp,
}

impl Rotating<'_> {
    fn add(mut self) -> Result<Rotation, RotateError> {
        let root = self.root()?;
        // A rotation is the cure for a lost key. Another key in its place is a mistake.
        if files::is_there(&self.paths[0]) {
            self.current()?;
        }
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
        // The oldest keys make room: they have signed nothing for many rotations.
        let dropped = keys.split_off(keys.len().min(KEYS_MAX));
        let written = self.sign(&root)?;
        self.place()?;
        self.done(written, dropped, Outcome::Changed)
    }

    fn drop_old(mut self) -> Result<Rotation, RotateError> {
        self.current()?;
        let dropped = self.rotated.keys(&mut self.set).split_off(1);
        let (set, outcome) = if dropped.is_empty() {
            // Also after a crash: the operator has not seen the report of the set yet.
            (self.set_as_it_is(), Outcome::Unchanged)
        } else {
            let root = self.root()?;
            if self.rotated == Rotated::Manifest {
                // A thief may have used up the numbers of the current epoch.
                self.set.epoch.0 += 1;
            }
            (self.sign(&root)?, Outcome::Changed)
        };
        let old = &self.paths[2];
        // A master that has not run with the new audit key needs the old one, until the next rotation.
        if self.rotated == Rotated::Manifest && files::is_there(old) {
            fs::remove_file(old)
                .and_then(|()| durable::sync_dir(self.dir))
                .map_err(failed(old))?;
        }
        self.done(set, dropped, outcome)
    }

    fn restore_old(mut self) -> Result<Rotation, RotateError> {
        self.current()?;
        let old = PublicKey::of(&key::read(&self.paths[2])?);
        let keys = self.rotated.keys(&mut self.set);
        if keys.contains(&old) {
            let set = self.set_as_it_is();
            return self.done(set, Vec::new(), Outcome::Unchanged);
        }
        keys.insert(1, old);
        let dropped = keys.split_off(keys.len().min(KEYS_MAX));
        let root = self.root()?;
        let written = self.sign(&root)?;
        self.done(written, dropped, Outcome::Changed)
    }

    fn done(
        mut self,
        set: Written,
        dropped: Vec<PublicKey>,
        outcome: Outcome,
    ) -> Result<Rotation, RotateError> {
        let current = self.current()?;
        let [path, _, old] = self.paths;
        let key = Written::new(path, self.rotated.what()).with_key(&PublicKey::of(&current));
        Ok(Rotation {
            // The set first: a master with the new key and the old set refuses to start.
            files: vec![set, key],
            old: files::is_there(&old).then_some(old),
            version: self.set.version,
            epoch: self.set.epoch,
            keys: self.rotated.keys(&mut self.set).len(),
            dropped: dropped.iter().map(PublicKey::id).collect(),
            outcome,
        })
    }

    /// The key set on disk.
    fn set_as_it_is(&self) -> Written {
        Written::new(self.dir.join(fleet::KEYS), "key set, written before").with_key(&self.set.root)
    }

    /// Writes the changed set.
    fn sign(&mut self, root: &SigningKey) -> Result<Written, RotateError> {
        self.set.version += 1;
        self.set.issued = self.now;
        Ok(fleet::write_keys(self.dir, self.set.clone(), root)?)
    }

    /// Renames the new private key to its final name. The previous key is kept.
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

    /// The private key of an unfinished rotation.
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
