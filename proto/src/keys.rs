//! The key set: which keys sign manifests and audit logs, signed by the fleet's offline root key.
//!
//! An agent pins the root of the first set it sees, keeps the newest set, and takes newer ones
//! over the wire. So keys can be replaced on hosts that nobody can visit, and only by whoever
//! holds the root key.

use jiff::Timestamp;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::dsse::{ED25519, Envelope, EnvelopeError, KeyId, PublicKey, Statement, Verified};
use crate::{Epoch, FleetName};

/// Keys of one role in a set: the current ones and a few that are being brought in.
pub const KEYS_MAX: usize = 16;

/// The statement in `manifest.pub`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct KeySet {
    /// The fleet it is for.
    pub fleet: FleetName,
    /// Rises by one with every change.
    pub version: u64,
    /// The reign that manifests must belong to. Raised when a manifest key was stolen.
    pub epoch: Epoch,
    /// When the set was signed.
    pub issued: Timestamp,
    /// The root key itself, so that a set can be pinned as it is.
    pub root: PublicKey,
    /// Keys that sign manifests and freshness statements.
    #[serde(deserialize_with = "known_algorithms")]
    pub manifest: Vec<PublicKey>,
    /// Keys that sign audit checkpoints.
    #[serde(deserialize_with = "known_algorithms")]
    pub audit: Vec<PublicKey>,
}

impl Statement for KeySet {
    const TYPE: &'static str = "application/vnd.clamcast.keys+json";
    const BYTES_MAX: usize = 32 << 10; // two roles of KEYS_MAX keys of 200 bytes, with room
}

/// Keys of algorithms that this version does not know are left out: a set that brings a new
/// algorithm in beside the old one must be taken by hosts that nobody upgrades at once.
fn known_algorithms<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<PublicKey>, D::Error> {
    let keys = Vec::<Value>::deserialize(input)?;
    let known = keys.into_iter().filter(|key| key["algorithm"] == ED25519);
    known
        .map(|key| serde_json::from_value(key).map_err(D::Error::custom))
        .collect()
}

/// Why a key set was not taken.
#[derive(Debug, thiserror::Error)]
pub enum KeySetError {
    /// Not a key set, or not signed by the root.
    #[error("the key set is not to be trusted")]
    Envelope(#[from] EnvelopeError),
    /// Signed by another root than the pinned one.
    #[error("the key set has another root key than the one pinned here ({pinned})")]
    Root {
        /// The root that counts here.
        pinned: KeyId,
    },
    /// Of another fleet.
    #[error("the key set is for fleet `{found}`, this is fleet `{expected}`")]
    Fleet {
        /// The fleet it is for.
        found: FleetName,
        /// Ours.
        expected: FleetName,
    },
    /// An older one, or a different one under the same version.
    #[error("key set version {offered} is not newer than version {current} in use")]
    Old {
        /// The version offered.
        offered: u64,
        /// The version in use.
        current: u64,
    },
    /// The epoch would go down.
    #[error("key set version {version} would lower the epoch from {current} to {offered}")]
    Epoch {
        /// The set's version.
        version: u64,
        /// Its epoch.
        offered: Epoch,
        /// The epoch in use.
        current: Epoch,
    },
    /// No key, or more than anyone needs.
    #[error("the key set has {found} {role} keys, expected 1 to {KEYS_MAX}")]
    Count {
        /// Which keys.
        role: &'static str,
        /// How many.
        found: usize,
    },
}

impl KeySet {
    /// Checks a set that nothing is pinned for: it must be signed by the root it names.
    pub fn verify(envelope: &Envelope) -> Result<Verified<Self>, KeySetError> {
        let root = envelope.peek::<Self>()?.root;
        Self::verify_by(envelope, &root)
    }

    /// Checks a set against the pinned root.
    pub fn verify_by(
        envelope: &Envelope,
        pinned: &PublicKey,
    ) -> Result<Verified<Self>, KeySetError> {
        let set: Verified<Self> = envelope.verify([pinned])?;
        if set.root != *pinned {
            return Err(KeySetError::Root {
                pinned: pinned.id(),
            });
        }
        for (role, keys) in [("manifest", &set.manifest), ("audit", &set.audit)] {
            if keys.is_empty() || keys.len() > KEYS_MAX {
                return Err(KeySetError::Count {
                    role,
                    found: keys.len(),
                });
            }
        }
        Ok(set)
    }

    /// Checks a set that would replace this one. `Ok(None)`: it is the one already in use.
    pub fn accept(
        current: &Verified<Self>,
        envelope: &Envelope,
    ) -> Result<Option<Verified<Self>>, KeySetError> {
        let set = Self::verify_by(envelope, &current.root)?;
        if set.fleet != current.fleet {
            let (found, expected) = (set.fleet.clone(), current.fleet.clone());
            return Err(KeySetError::Fleet { found, expected });
        }
        if set.payload_sha256() == current.payload_sha256() {
            return Ok(None);
        }
        if set.version <= current.version {
            return Err(KeySetError::Old {
                offered: set.version,
                current: current.version,
            });
        }
        if set.epoch < current.epoch {
            let (version, offered) = (set.version, set.epoch);
            return Err(KeySetError::Epoch {
                version,
                offered,
                current: current.epoch,
            });
        }
        Ok(Some(set))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dsse::sign;
    use ed25519_dalek::SigningKey;

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_bytes(&[seed; 32])
    }

    fn set(root: u8, fleet: &str, version: u64, epoch: u64) -> Verified<KeySet> {
        let root = key(root);
        let set = KeySet {
            fleet: fleet.parse().unwrap(),
            version,
            epoch: Epoch(epoch),
            issued: Timestamp::UNIX_EPOCH,
            root: PublicKey::of(&root),
            manifest: vec![PublicKey::of(&key(2))],
            audit: vec![PublicKey::of(&key(3))],
        };
        sign(set, &root)
    }

    fn accept(current: &Verified<KeySet>, offered: &Verified<KeySet>) -> Result<bool, String> {
        KeySet::accept(current, offered.envelope())
            .map(|newer| newer.is_some())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn versions_and_epochs_only_rise() {
        let current = set(1, "bank", 5, 2);
        assert_eq!(accept(&current, &set(1, "bank", 6, 2)), Ok(true));
        assert_eq!(accept(&current, &set(1, "bank", 9, 3)), Ok(true));
        assert_eq!(accept(&current, &current), Ok(false));
        assert!(
            accept(&current, &set(1, "bank", 4, 2))
                .unwrap_err()
                .contains("not newer")
        );
        assert!(
            accept(&current, &set(1, "bank", 5, 3))
                .unwrap_err()
                .contains("not newer")
        );
        assert!(
            accept(&current, &set(1, "bank", 6, 1))
                .unwrap_err()
                .contains("lower the epoch")
        );
    }

    #[test]
    fn the_root_is_pinned_and_so_is_the_fleet() {
        let current = set(1, "bank", 5, 2);
        assert!(accept(&current, &set(9, "bank", 6, 2)).is_err());
        assert!(
            accept(&current, &set(1, "shop", 6, 2))
                .unwrap_err()
                .contains("shop")
        );
    }

    #[test]
    fn keys_of_unknown_algorithms_are_left_out_and_the_set_is_taken() {
        let mut json = serde_json::to_value(&*set(1, "bank", 1, 1)).unwrap();
        let newer = serde_json::json!({ "id": "x", "algorithm": "ml-dsa-44", "public": "?" });
        json["manifest"].as_array_mut().unwrap().insert(0, newer);
        let read: KeySet = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(read, *set(1, "bank", 1, 1));
        json["manifest"][1]["public"] = "00".into();
        assert!(
            serde_json::from_value::<KeySet>(json).is_err(),
            "a damaged known one"
        );
    }

    #[test]
    fn a_set_must_be_signed_by_the_root_it_names() {
        let honest = set(1, "bank", 1, 1);
        assert!(KeySet::verify(honest.envelope()).is_ok());
        let forged = sign((*set(1, "bank", 1, 1)).clone(), &key(9));
        assert!(KeySet::verify(forged.envelope()).is_err());
    }
}
