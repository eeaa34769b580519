//! The agent's trust on disk: the pinned root with the newest key set, and how far it has come.

use std::path::{Path, PathBuf};

use clamcast_daemon::input::{self, InputError};
use clamcast_proto::dsse::{Envelope, KeyId, Verified};
use clamcast_proto::keys::{KeySet, KeySetError};
use clamcast_proto::manifest::Manifest;
use clamcast_proto::trust::{Mark, Trust, TrustError};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::host::state::{self, StateError};

/// Largest `manifest.pub` in bytes that is read: a key set of the largest size in base64, with
/// room for its layout.
const KEYS_FILE_BYTES_MAX: u64 = 64 << 10;

/// The kept key set, in the state directory.
const KEYS: &str = "keys.json";

/// What the agent believes, and where it is kept. Every change is on disk before it counts.
#[derive(Debug)]
pub struct TrustStore {
    trust: Trust,
    accepted: Option<Timestamp>,
    keys_path: PathBuf,
    mark_path: PathBuf,
}

/// The mark with the time of the first offer of that generation.
#[derive(Deserialize, Serialize)]
struct KeptMark {
    #[serde(flatten)]
    mark: Mark,
    accepted: Timestamp,
}

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

impl TrustStore {
    /// Loads what was kept in the state directory, or pins the root of the `configured` key set at
    /// the first start. A newer configured set with the pinned root is taken over.
    pub fn open(state: &Path, configured: &Path) -> Result<Self, OpenError> {
        let keys_path = state.join(KEYS);
        let mark_path = state.join("mark.json");
        let keys = match chosen(state, configured)? {
            Chosen::Kept(keys) => keys,
            Chosen::First(keys) => {
                state::save(&keys_path, keys.envelope())?;
                tracing::info!(root = %keys.root.id(), fleet = %keys.fleet, "root key pinned");
                keys
            }
            Chosen::Newer(keys) => {
                state::save(&keys_path, keys.envelope())?;
                let version = keys.version;
                tracing::info!(version, "newer key set taken from the file");
                keys
            }
        };
        let mark: Option<KeptMark> = state::load(
            &mark_path,
            "the host then takes any generation that the fleet's keys signed, older ones too",
        )?;
        Ok(Self {
            accepted: mark.as_ref().map(|mark| mark.accepted),
            trust: Trust::new(keys, mark.map(|kept| kept.mark)),
            keys_path,
            mark_path,
        })
    }

    /// What is believed now.
    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// When the newest accepted generation was offered first.
    pub fn accepted(&self) -> Option<Timestamp> {
        self.accepted
    }

    /// Judges a key set and uses it from now on if it is newer; whether it is.
    pub fn offer_keys(&mut self, envelope: &Envelope) -> Result<bool, RefusedKeys> {
        match self.trust.judge_keys(envelope)? {
            None => Ok(false),
            Some(newer) => {
                state::save(&self.keys_path, newer.envelope())?;
                self.trust.adopt_keys(newer);
                Ok(true)
            }
        }
    }

    /// Remembers that `manifest`, which [`Trust::judge_manifest`] let pass, was accepted: nothing
    /// older is from now on, but for what is installed.
    pub fn accept(
        &mut self,
        manifest: &Verified<Manifest>,
        now: Timestamp,
    ) -> Result<(), StateError> {
        let Some(mark) = self.trust.raised(manifest) else {
            return Ok(());
        };
        let kept = KeptMark {
            mark,
            accepted: now,
        };
        state::save(&self.mark_path, &kept)?;
        self.trust.adopt_mark(kept.mark);
        self.accepted = Some(now);
        Ok(())
    }
}

/// A key set is not used.
#[derive(Debug, thiserror::Error)]
pub enum RefusedKeys {
    /// It is not to be believed.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// It could not be kept.
    #[error(transparent)]
    State(#[from] StateError),
}

/// The key set that [`TrustStore::open`] would believe; changes nothing.
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
    use clamcast_proto::manifest::{ManifestFile, Publisher, content_digest};
    use clamcast_proto::{Digest, Epoch, Generation};
    use ed25519_dalek::SigningKey;

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

    fn manifest(generation: u64) -> Verified<Manifest> {
        let files = vec![ManifestFile {
            captured: None,
            name: "daily.cld".parse().unwrap(),
            size: 1,
            sha256: Digest::of(b"a"),
            container: None,
        }];
        let manifest = Manifest {
            fleet: "bank".parse().unwrap(),
            epoch: Epoch(1),
            generation: Generation::new(generation).unwrap(),
            publisher: Publisher("p1".into()),
            created: Timestamp::UNIX_EPOCH,
            previous: None,
            rollback_of: None,
            content: content_digest(files.iter().map(|f| (&f.name, f.size, &f.sha256))),
            files,
        };
        sign(manifest, &key(2))
    }

    /// A host whose bundle has the given key set.
    struct Host(tempfile::TempDir);

    impl Host {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn start(&self, bundle: &Verified<KeySet>) -> Result<TrustStore, String> {
            let configured = self.0.path().join("manifest.pub");
            std::fs::write(&configured, serde_json::to_vec(bundle.envelope()).unwrap()).unwrap();
            TrustStore::open(self.0.path(), &configured).map_err(|error| error.to_string())
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
    fn newer_key_sets_are_taken_from_the_file_and_from_the_wire_and_kept() {
        let host = Host::new();
        let version = |store: &TrustStore| store.trust().keys().version;
        assert_eq!(version(&host.start(&keys(1, 1)).unwrap()), 1);
        let mut store = host.start(&keys(1, 2)).unwrap();
        assert_eq!(version(&store), 2);
        assert!(store.offer_keys(keys(1, 3).envelope()).unwrap());
        assert!(!store.offer_keys(keys(1, 3).envelope()).unwrap());
        assert!(store.offer_keys(keys(1, 1).envelope()).is_err());
        assert!(store.offer_keys(keys(9, 4).envelope()).is_err());
        assert_eq!(version(&host.start(&keys(1, 2)).unwrap()), 3);
    }

    #[test]
    fn what_was_accepted_is_remembered_over_a_restart() {
        let host = Host::new();
        let mut store = host.start(&keys(1, 1)).unwrap();
        let time = Timestamp::from_second(1000).unwrap();
        store.accept(&manifest(7), time).unwrap();
        store.accept(&manifest(7), Timestamp::MAX).unwrap();
        let store = host.start(&keys(1, 1)).unwrap();
        assert_eq!(store.accepted(), Some(time));
        let judge = |generation| {
            store
                .trust()
                .judge_manifest(manifest(generation).envelope(), None)
        };
        assert!(judge(7).is_ok() && judge(8).is_ok());
        assert!(matches!(judge(6), Err(TrustError::Rollback { .. })));
    }

    #[test]
    fn what_is_taken_again_below_the_mark_does_not_lower_it() {
        let host = Host::new();
        let mut store = host.start(&keys(1, 1)).unwrap();
        let time = Timestamp::from_second(1000).unwrap();
        store.accept(&manifest(7), time).unwrap();
        store.accept(&manifest(5), Timestamp::MAX).unwrap();
        assert_eq!(store.trust().mark(), Some(&Mark::of(&manifest(7))));
        let store = host.start(&keys(1, 1)).unwrap();
        assert_eq!(store.trust().mark(), Some(&Mark::of(&manifest(7))));
        assert_eq!(store.accepted(), Some(time));
    }
}
