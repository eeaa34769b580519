//! The agent's trust on disk: the pinned root with the newest key set, and the newest generation that
//! was accepted.

use std::path::{Path, PathBuf};

use clamcast_daemon::input::{self, InputError};
use clamcast_proto::dsse::{Envelope, KeyId, Verified};
use clamcast_proto::keys::{KeySet, KeySetError};
use clamcast_proto::trust::Trust;

use crate::core::KeptMark;
use crate::host::state::{self, StateError};

/// Largest `manifest.pub` in bytes that is read: a key set of the largest size in base64, with
/// room for its layout.
const KEYS_FILE_BYTES_MAX: u64 = 64 << 10;

/// The kept key set, in the state directory.
const KEYS: &str = "keys.json";

/// The kept mark, in the state directory.
const MARK: &str = "mark.json";

/// There is nothing to trust.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// What was kept.
    #[error(transparent)]
    State(#[from] StateError),
    /// What was kept does not hold together.
    #[error(
        "the pinned key set in {path} is damaged; put it back from a backup, or move it away to \
         pin the configured one"
    )]
    Pinned {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: KeySetError,
    },
    /// The configured file is not there or cannot be read.
    #[error(transparent)]
    Read(#[from] InputError),
    /// The configured file is no envelope.
    #[error("trust.keys: {path} is not a key set; {ORIGIN}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// The configured file is not to be believed.
    #[error("trust.keys: the key set {path} is refused; {ORIGIN}")]
    Refused {
        /// The file.
        path: PathBuf,
        /// Why.
        source: KeySetError,
    },
    /// The configured file is another fleet's, or somebody's who wants to be the fleet.
    #[error(
        "{path} has the root key {found}, but {pinned} is pinned in {pinned_path} since the first \
         start; if the fleet really has a new root, move the pinned file away"
    )]
    OtherRoot {
        /// The configured file.
        path: PathBuf,
        /// Its root.
        found: KeyId,
        /// The pinned root.
        pinned: KeyId,
        /// Where it is pinned.
        pinned_path: PathBuf,
    },
}

/// Loads what was kept in the state directory, or pins the root of the `configured` key set at the
/// first start. A newer configured set with the pinned root is taken over.
pub fn open(state: &Path, configured: &Path) -> Result<(Trust, Option<KeptMark>), OpenError> {
    let keys = match chosen(state, configured)? {
        Chosen::Kept(keys) => keys,
        Chosen::First(keys) => {
            save_keys(state, keys.envelope())?;
            tracing::info!(root = %keys.root.id(), fleet = %keys.fleet, "root key pinned");
            keys
        }
        Chosen::Newer(keys) => {
            save_keys(state, keys.envelope())?;
            let version = keys.version;
            tracing::info!(version, "newer key set taken from the file");
            keys
        }
    };
    let mark: Option<KeptMark> = state::load(
        &state.join(MARK),
        "the host then takes any generation that the fleet's keys signed, older ones too",
    )?;
    let trust = Trust::new(keys, mark.as_ref().map(|kept| kept.mark.clone()));
    Ok((trust, mark))
}

/// Keeps the newest key set.
pub fn save_keys(state: &Path, keys: &Envelope) -> Result<(), StateError> {
    state::save(&state.join(KEYS), keys)
}

/// Keeps the newest generation that was accepted.
pub fn save_mark(state: &Path, mark: &KeptMark) -> Result<(), StateError> {
    state::save(&state.join(MARK), mark)
}

/// The key set that [`open`] would believe; changes nothing.
pub fn look(state: &Path, configured: &Path) -> Result<Verified<KeySet>, OpenError> {
    match chosen(state, configured)? {
        Chosen::Kept(keys) | Chosen::First(keys) | Chosen::Newer(keys) => Ok(keys),
    }
}

/// Whether a root was pinned in the state directory, and so an agent has started with it.
pub fn is_pinned(state: &Path) -> bool {
    state.join(KEYS).exists()
}

/// Which key set is believed.
enum Chosen {
    /// The one that was kept.
    Kept(Verified<KeySet>),
    /// The configured one, as none was kept.
    First(Verified<KeySet>),
    /// The configured one, as it is newer.
    Newer(Verified<KeySet>),
}

fn chosen(state: &Path, configured: &Path) -> Result<Chosen, OpenError> {
    let keys_path = state.join(KEYS);
    let offered = read_configured(configured)?;
    let kept: Option<Envelope> = state::load(&keys_path, "the configured key set is pinned")?;
    let Some(kept) = kept else {
        let keys = KeySet::verify(&offered).map_err(|source| OpenError::Refused {
            path: configured.to_owned(),
            source,
        })?;
        return Ok(Chosen::First(keys));
    };
    let pinned = KeySet::verify(&kept).map_err(|source| OpenError::Pinned {
        path: keys_path.clone(),
        source,
    })?;
    let newer = newer(&pinned, &offered, configured, &keys_path)?;
    Ok(newer.map_or(Chosen::Kept(pinned), Chosen::Newer))
}

const ORIGIN: &str = "it comes with the bundle of `clamcast-certs agent`";

fn read_configured(path: &Path) -> Result<Envelope, OpenError> {
    let text = input::read("trust.keys", path, KEYS_FILE_BYTES_MAX, ORIGIN)?;
    serde_json::from_slice(&text).map_err(|source| OpenError::Parse {
        path: path.to_owned(),
        source,
    })
}

/// The configured set if it is newer than the pinned one. An older one is what a bundle turns into
/// once keys were rotated over the wire.
fn newer(
    pinned: &Verified<KeySet>,
    offered: &Envelope,
    configured: &Path,
    keys_path: &Path,
) -> Result<Option<Verified<KeySet>>, OpenError> {
    match KeySet::accept(pinned, offered) {
        Ok(newer) => Ok(newer),
        Err(KeySetError::Old { .. }) => Ok(None),
        Err(source) => Err(match KeySet::verify(offered) {
            Ok(other) if other.root != pinned.root => OpenError::OtherRoot {
                path: configured.to_owned(),
                found: other.root.id(),
                pinned: pinned.root.id(),
                pinned_path: keys_path.to_owned(),
            },
            Ok(_) | Err(_) => OpenError::Refused {
                path: configured.to_owned(),
                source,
            },
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clamcast_proto::dsse::{PublicKey, sign};
    use clamcast_proto::manifest::Publisher;
    use clamcast_proto::trust::Mark;
    use clamcast_proto::{Digest, Epoch, Generation, Position};
    use ed25519_dalek::SigningKey;
    use jiff::Timestamp;

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_bytes(&[seed; 32])
    }

    fn keys(root: u8, version: u64) -> Verified<KeySet> {
        let set = KeySet {
            fleet: "bank".parse().unwrap(),
            version,
            epoch: Epoch(1),
            issued: Timestamp::UNIX_EPOCH,
            root: PublicKey::of(&key(root)),
            manifest: vec![PublicKey::of(&key(2))],
            audit: vec![PublicKey::of(&key(3))],
        };
        sign(set, &key(root))
    }

    /// A host whose bundle has the given key set.
    struct Host(tempfile::TempDir);

    impl Host {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn start(&self, bundle: &Verified<KeySet>) -> Result<(Trust, Option<KeptMark>), String> {
            let configured = self.0.path().join("manifest.pub");
            std::fs::write(&configured, serde_json::to_vec(bundle.envelope()).unwrap()).unwrap();
            open(self.0.path(), &configured).map_err(|error| error.to_string())
        }
    }

    #[test]
    fn the_first_root_is_pinned_and_another_one_is_an_error_with_a_next_step() {
        let host = Host::new();
        host.start(&keys(1, 1)).unwrap();
        host.start(&keys(1, 1)).unwrap();
        let error = host.start(&keys(9, 2)).unwrap_err();
        assert!(error.contains("move the pinned file away"), "{error}");
    }

    #[test]
    fn newer_key_sets_are_taken_from_the_file_and_kept() {
        let host = Host::new();
        let version = |bundle| host.start(&keys(1, bundle)).unwrap().0.keys().version;
        assert_eq!(version(1), 1);
        assert_eq!(version(2), 2);
        save_keys(host.0.path(), keys(1, 3).envelope()).unwrap();
        assert_eq!(version(2), 3);
    }

    #[test]
    fn what_was_accepted_is_remembered_over_a_restart() {
        let host = Host::new();
        assert!(host.start(&keys(1, 1)).unwrap().1.is_none());
        let mark = Mark {
            position: Position {
                epoch: Epoch(1),
                generation: Generation::new(7).unwrap(),
            },
            manifest_sha256: Digest::of(b"7"),
            publisher: Publisher("p1".into()),
        };
        let accepted = Timestamp::from_second(1000).unwrap();
        let kept = KeptMark {
            mark: mark.clone(),
            accepted,
        };
        save_mark(host.0.path(), &kept).unwrap();
        let (trust, kept) = host.start(&keys(1, 1)).unwrap();
        assert_eq!(trust.mark(), Some(&mark));
        assert_eq!(kept.map(|kept| kept.accepted), Some(accepted));
    }
}
