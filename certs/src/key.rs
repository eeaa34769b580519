//! Ed25519 keys as PKCS#8 PEM files.

use std::path::Path;

use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::spki::der::zeroize::Zeroizing;
use ed25519_dalek::pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _, KeypairBytes};
use rand::TryRngCore as _;
use rand::rngs::OsRng;

use crate::files::{self, FileError};

/// A new key, straight from the operating system's random numbers.
pub(crate) fn generate() -> SigningKey {
    let mut seed = Zeroizing::new([0; 32]);
    OsRng
        .try_fill_bytes(seed.as_mut())
        .expect("the kernel always has random numbers once it has booted");
    SigningKey::from_bytes(&seed)
}

/// The key as PKCS#8, version 1: the form that OpenSSL reads too. Version 2 (RFC 5958) adds the
/// public key, which follows from the private one.
pub(crate) fn to_pem(key: &SigningKey) -> Zeroizing<String> {
    KeypairBytes {
        secret_key: key.to_bytes(),
        public_key: None,
    }
    .to_pkcs8_pem(LineEnding::LF)
    .expect("32 bytes always encode")
}

/// Reads a private key.
pub(crate) fn read(path: &Path) -> Result<SigningKey, FileError> {
    let pem = Zeroizing::new(files::read(path)?);
    SigningKey::from_pkcs8_pem(&pem).map_err(|_| FileError::Damaged {
        path: path.to_owned(),
        expected: "an Ed25519 private key in PKCS#8 PEM",
    })
}
