//! The key files that the configuration names.

use std::path::{Path, PathBuf};

use clamcast_daemon::credential;
use clamcast_daemon::input::{self, InputError};
use clamcast_proto::dsse::{Envelope, PublicKey, Verified};
use clamcast_proto::keys::{KeySet, KeySetError};
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::DecodePrivateKey as _;

use super::{Config, Signing};

/// Longest certificate, key or key set file in bytes: ours have some hundred.
pub const FILE_BYTES_MAX: u64 = 64 << 10;

/// A key file is not what the daemon needs.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A key or key set file cannot be read.
    #[error(transparent)]
    Read(#[from] InputError),
    /// The key set is not one.
    #[error("{key}: {path} is not a key set; {KEYS_ORIGIN}")]
    Keys {
        /// The configuration key, or the option.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: KeysError,
    },
    /// A private key is not one.
    #[error("{key}: {path} is not an Ed25519 key in PKCS#8 PEM; {SIGNING_ORIGIN}")]
    PrivateKey {
        /// The configuration key.
        key: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// A private key that nobody would believe.
    #[error(
        "{key}: {path} is not one of the keys for this in the key set {keys} (signing.keys), so \
         agents would refuse what it signs; take both from one directory of `clamcast-certs`"
    )]
    ForeignKey {
        /// The configuration key.
        key: &'static str,
        /// The key file.
        path: PathBuf,
        /// The key set file.
        keys: PathBuf,
    },
    /// The key set of another fleet.
    #[error(
        "signing.keys: {path} is for fleet `{found}`, the configuration says fleet = \"{expected}\""
    )]
    Fleet {
        /// The key set file.
        path: PathBuf,
        /// Its fleet.
        found: String,
        /// The configured fleet.
        expected: String,
    },
}

/// A file is not a key set.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// Not an envelope.
    #[error("it is not a signed statement in JSON")]
    Json(#[from] serde_json::Error),
    /// Not to be believed.
    #[error(transparent)]
    Set(#[from] KeySetError),
}

const KEYS_ORIGIN: &str = "copy manifest.pub from the directory of `clamcast-certs init --dir DIR`";
const SIGNING_ORIGIN: &str =
    "copy manifest.key and audit.key from the directory of `clamcast-certs init --dir DIR`";

/// Reads the key set file that `key`, a configuration key or an option, names; it must be signed by
/// the root that it names.
pub fn load_keys(key: &'static str, path: &Path) -> Result<Verified<KeySet>, KeyError> {
    let text = input::read(key, path, FILE_BYTES_MAX, KEYS_ORIGIN)?;
    let parse = || -> Result<_, KeysError> {
        let envelope: Envelope = serde_json::from_slice(&text)?;
        Ok(KeySet::verify(&envelope)?)
    };
    parse().map_err(|source| KeyError::Keys {
        key,
        path: path.to_owned(),
        source,
    })
}

/// Reads a private key that must be one of `among`.
fn load_key(
    key: &'static str,
    path: &Path,
    among: &[PublicKey],
    keys: &Path,
) -> Result<SigningKey, KeyError> {
    let pem = credential::read(key, path, FILE_BYTES_MAX, SIGNING_ORIGIN)?;
    let path = pem.origin;
    let Ok(private) = SigningKey::from_pkcs8_pem(&String::from_utf8_lossy(&pem.bytes)) else {
        return Err(KeyError::PrivateKey { key, path });
    };
    if !among.contains(&PublicKey::of(&private)) {
        let keys = keys.to_owned();
        return Err(KeyError::ForeignKey { key, path, keys });
    }
    Ok(private)
}

/// Reads the key that signs manifests.
pub fn load_manifest_key(signing: &Signing, keys: &KeySet) -> Result<SigningKey, KeyError> {
    let (key, path) = ("signing.manifest_key", &signing.manifest_key);
    load_key(key, path, &keys.manifest, &signing.keys)
}

/// Reads the key that signs the audit log.
pub fn load_audit_key(signing: &Signing, keys: &KeySet) -> Result<SigningKey, KeyError> {
    let (key, path) = ("signing.audit_key", &signing.audit_key);
    load_key(key, path, &keys.audit, &signing.keys)
}

/// The key set must be the configured fleet's.
pub fn check_fleet(config: &Config, keys: &KeySet) -> Result<(), KeyError> {
    if keys.fleet == config.fleet {
        return Ok(());
    }
    let path = config.signing.keys.clone();
    let (found, expected) = (keys.fleet.to_string(), config.fleet.to_string());
    Err(KeyError::Fleet {
        path,
        found,
        expected,
    })
}

/// The name of the audit log in its checkpoints.
pub fn audit_origin(fleet: &clamcast_proto::FleetName) -> String {
    format!("clamcast/{fleet}")
}
