//! Signed envelopes: DSSE (Dead Simple Signing Envelope, <https://github.com/secure-systems-lab/dsse>,
//! protocol version 1) with Ed25519 (RFC 8032).
//!
//! What is signed is the type and the exact payload bytes, so nothing is ever serialised again to
//! check a signature, and a statement of one kind can never pass for another.

use std::fmt;

use ed25519_dalek::{Signature as Ed25519Signature, Signer as _, SigningKey, VerifyingKey};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::Digest;

/// Signatures in one envelope: one, or two while a key is being replaced. Bounds the work that a
/// hostile envelope can ask for.
pub const SIGNATURES_MAX: usize = 4;

/// Longest signature in bytes that is kept: room for an algorithm after Ed25519, whose have 64.
pub const SIGNATURE_BYTES_MAX: usize = 8 << 10;

/// Names an Ed25519 public key: SHA-256 of its 32 bytes.
#[derive(Clone, Copy, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct KeyId(Digest);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An Ed25519 public key with its id, as key sets carry it.
#[derive(Clone, Deserialize, Eq, PartialEq, Serialize)]
#[serde(into = "RawPublicKey", try_from = "RawPublicKey")]
pub struct PublicKey(VerifyingKey);

#[derive(Deserialize, Serialize)]
struct RawPublicKey {
    id: KeyId,
    algorithm: String,
    public: String,
}

/// The one algorithm that this version knows.
pub(crate) const ED25519: &str = "ed25519";

/// The bytes are not a public key that we can use.
#[derive(Debug, thiserror::Error)]
pub enum PublicKeyError {
    /// Another algorithm, from a newer version perhaps.
    #[error("key {id} has algorithm `{algorithm}`, expected `ed25519`")]
    Algorithm {
        /// The key's id.
        id: KeyId,
        /// What it says.
        algorithm: String,
    },
    /// Not 32 bytes in hexadecimal digits, or not a point on the curve.
    #[error("not an Ed25519 public key: expected 32 bytes that are a point on the curve")]
    Malformed,
    /// The id is not the hash of the key.
    #[error("key id {id} does not belong to its key")]
    Id {
        /// The id that was claimed.
        id: KeyId,
    },
}

impl PublicKey {
    /// The key of these 32 bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, PublicKeyError> {
        let bytes = bytes.try_into().map_err(|_| PublicKeyError::Malformed)?;
        VerifyingKey::from_bytes(&bytes)
            .map(Self)
            .map_err(|_| PublicKeyError::Malformed)
    }

    /// The public half of `key`.
    pub fn of(key: &SigningKey) -> Self {
        Self(key.verifying_key())
    }

    /// The key's name.
    pub fn id(&self) -> KeyId {
        KeyId(Digest::of(self.0.as_bytes()))
    }

    /// The key's 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        self.0.as_bytes()
    }

    /// Whether `signature` over `message` is this key's (strict verification: no small-order keys,
    /// no malleable signatures).
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        Ed25519Signature::from_slice(signature)
            .is_ok_and(|signature| self.0.verify_strict(message, &signature).is_ok())
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", self.id())
    }
}

impl From<PublicKey> for RawPublicKey {
    fn from(key: PublicKey) -> Self {
        Self {
            id: key.id(),
            algorithm: ED25519.to_owned(),
            public: hex::encode(key.as_bytes()),
        }
    }
}

impl TryFrom<RawPublicKey> for PublicKey {
    type Error = PublicKeyError;

    fn try_from(raw: RawPublicKey) -> Result<Self, PublicKeyError> {
        if raw.algorithm != ED25519 {
            return Err(PublicKeyError::Algorithm {
                id: raw.id,
                algorithm: raw.algorithm,
            });
        }
        let bytes = hex::decode(&raw.public).map_err(|_| PublicKeyError::Malformed)?;
        let key = Self::from_bytes(&bytes)?;
        if key.id() != raw.id {
            return Err(PublicKeyError::Id { id: raw.id });
        }
        Ok(key)
    }
}

/// A kind of statement that is signed.
pub trait Statement: DeserializeOwned + Serialize {
    /// The DSSE payload type. No two statements share one.
    const TYPE: &'static str;
    /// Longest payload in bytes that is looked at.
    const BYTES_MAX: usize;
}

/// A signed statement as it travels and is kept. Nothing in it is to be believed before
/// [`Envelope::verify`].
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Envelope {
    /// What kind of statement the payload is.
    #[serde(rename = "payloadType")]
    pub payload_type: String,
    /// The statement, JSON in base64.
    #[serde(with = "base64_text")]
    pub payload: Vec<u8>,
    /// Who signed it.
    pub signatures: Vec<Signature>,
}

/// One signature of an envelope.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Signature {
    /// The key that made it. Only a hint where to look, as DSSE says.
    pub keyid: KeyId,
    /// The signature's 64 bytes.
    #[serde(with = "base64_text")]
    pub sig: Vec<u8>,
}

/// A statement whose signature was checked. Nothing else makes one.
#[derive(Clone, Debug)]
pub struct Verified<T> {
    value: T,
    envelope: Envelope,
    payload_sha256: Digest,
    signer: KeyId,
}

/// Why an envelope was not believed.
#[derive(Debug, thiserror::Error)]
pub enum EnvelopeError {
    /// Another kind of statement.
    #[error("this is a `{found}`, expected a `{expected}`")]
    Type {
        /// What it says it is.
        found: String,
        /// What it should be.
        expected: &'static str,
    },
    /// Larger than any honest statement.
    #[error("the {kind} has {bytes} bytes, at most {limit} are allowed")]
    TooLarge {
        /// Payload type.
        kind: &'static str,
        /// Its length.
        bytes: usize,
        /// The bound.
        limit: usize,
    },
    /// More signatures than anyone needs.
    #[error("{found} signatures on one statement, at most {SIGNATURES_MAX} are allowed")]
    TooManySignatures {
        /// How many.
        found: usize,
    },
    /// A signature longer than any of an algorithm that we can imagine.
    #[error("a signature of {bytes} bytes, at most {SIGNATURE_BYTES_MAX} are allowed")]
    LongSignature {
        /// Its length.
        bytes: usize,
    },
    /// No signature by a key that counts.
    #[error("the {kind} is not signed by a key that is trusted for it (signed by {signers})")]
    Untrusted {
        /// Payload type.
        kind: &'static str,
        /// Key ids it names, for the log.
        signers: String,
    },
    /// Signed, but not what we understand.
    #[error("the {kind} is signed but cannot be read")]
    Malformed {
        /// Payload type.
        kind: &'static str,
        /// The parser's reason.
        source: serde_json::Error,
    },
}

/// The bytes that are signed: DSSE's pre-authentication encoding.
fn pre_authentication_encoding(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut out = format!(
        "DSSEv1 {} {payload_type} {} ",
        payload_type.len(),
        payload.len()
    )
    .into_bytes();
    out.extend_from_slice(payload);
    out
}

/// Signs a statement.
pub fn sign<T: Statement>(statement: T, key: &SigningKey) -> Verified<T> {
    let payload = serde_json::to_vec(&statement).expect("our own statements serialise");
    let signer = PublicKey::of(key).id();
    let sig = key
        .sign(&pre_authentication_encoding(T::TYPE, &payload))
        .to_bytes()
        .to_vec();
    let payload_sha256 = Digest::of(&payload);
    let envelope = Envelope {
        payload_type: T::TYPE.to_owned(),
        payload,
        signatures: vec![Signature { keyid: signer, sig }],
    };
    Verified {
        value: statement,
        envelope,
        payload_sha256,
        signer,
    }
}

impl Envelope {
    /// Checks type, size and signature, then parses. One good signature by any of `keys` is enough.
    pub fn verify<'k, T: Statement>(
        &self,
        keys: impl IntoIterator<Item = &'k PublicKey> + Clone,
    ) -> Result<Verified<T>, EnvelopeError> {
        if self.payload_type != T::TYPE {
            let found = self.payload_type.chars().take(80).collect();
            return Err(EnvelopeError::Type {
                found,
                expected: T::TYPE,
            });
        }
        self.check_size::<T>()?;
        if self.signatures.len() > SIGNATURES_MAX {
            return Err(EnvelopeError::TooManySignatures {
                found: self.signatures.len(),
            });
        }
        let longest = self
            .signatures
            .iter()
            .map(|signature| signature.sig.len())
            .max();
        if let Some(bytes) = longest.filter(|bytes| *bytes > SIGNATURE_BYTES_MAX) {
            return Err(EnvelopeError::LongSignature { bytes });
        }
        let message = pre_authentication_encoding(T::TYPE, &self.payload);
        let signer = self.signatures.iter().find_map(|signature| {
            let key = keys
                .clone()
                .into_iter()
                .find(|key| key.id() == signature.keyid)?;
            key.verifies(&message, &signature.sig)
                .then_some(signature.keyid)
        });
        let Some(signer) = signer else {
            let ids: Vec<_> = self.signatures.iter().map(|s| s.keyid.0.short()).collect();
            let signers = if ids.is_empty() {
                "nobody".to_owned()
            } else {
                ids.join(", ")
            };
            return Err(EnvelopeError::Untrusted {
                kind: T::TYPE,
                signers,
            });
        };
        Ok(Verified {
            value: self.parse()?,
            envelope: self.clone(),
            payload_sha256: Digest::of(&self.payload),
            signer,
        })
    }

    /// Parses the payload *without* checking who signed it: only to find the key that must have.
    pub(crate) fn peek<T: Statement>(&self) -> Result<T, EnvelopeError> {
        self.check_size::<T>()?;
        self.parse()
    }

    fn check_size<T: Statement>(&self) -> Result<(), EnvelopeError> {
        let (bytes, limit) = (self.payload.len(), T::BYTES_MAX);
        if bytes > limit {
            return Err(EnvelopeError::TooLarge {
                kind: T::TYPE,
                bytes,
                limit,
            });
        }
        Ok(())
    }

    fn parse<T: Statement>(&self) -> Result<T, EnvelopeError> {
        serde_json::from_slice(&self.payload).map_err(|source| EnvelopeError::Malformed {
            kind: T::TYPE,
            source,
        })
    }
}

impl<T> Verified<T> {
    /// The envelope, to keep or send on.
    pub fn envelope(&self) -> &Envelope {
        &self.envelope
    }

    /// The key whose signature counted.
    pub fn signer(&self) -> KeyId {
        self.signer
    }

    /// SHA-256 of the payload: the statement's name.
    pub fn payload_sha256(&self) -> Digest {
        self.payload_sha256
    }
}

impl<T> std::ops::Deref for Verified<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

mod base64_text {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};
    use std::borrow::Cow;

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], out: S) -> Result<S::Ok, S::Error> {
        out.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<u8>, D::Error> {
        let text = Cow::<'de, str>::deserialize(input)?;
        STANDARD.decode(text.as_bytes()).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize, Serialize)]
    struct Note {
        text: String,
    }
    impl Statement for Note {
        const TYPE: &'static str = "application/vnd.example.note+json";
        const BYTES_MAX: usize = 100;
    }
    #[derive(Debug, Deserialize, Serialize)]
    struct Other {
        text: String,
    }
    impl Statement for Other {
        const TYPE: &'static str = "application/vnd.example.other+json";
        const BYTES_MAX: usize = 100;
    }

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_bytes(&[seed; 32])
    }

    fn note() -> Verified<Note> {
        sign(
            Note {
                text: "hello".into(),
            },
            &key(1),
        )
    }

    #[test]
    fn the_encoding_is_the_one_of_the_specification() {
        // The test vector of the DSSE protocol page.
        let encoded = pre_authentication_encoding("http://example.com/HelloWorld", b"hello world");
        assert_eq!(
            encoded,
            b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
        );
    }

    #[test]
    fn a_signed_statement_survives_the_wire() {
        let text = serde_json::to_string(note().envelope()).unwrap();
        let envelope: Envelope = serde_json::from_str(&text).unwrap();
        let trusted = [PublicKey::of(&key(2)), PublicKey::of(&key(1))];
        let verified: Verified<Note> = envelope.verify(&trusted).unwrap();
        assert_eq!(verified.text, "hello");
        assert_eq!(verified.signer(), trusted[1].id());
    }

    #[test]
    fn only_a_trusted_key_counts_and_only_for_its_type() {
        let envelope = note().envelope().clone();
        let [good, bad] = [PublicKey::of(&key(1)), PublicKey::of(&key(2))];
        assert!(matches!(
            envelope.verify::<Note>([&bad]),
            Err(EnvelopeError::Untrusted { .. })
        ));
        assert!(matches!(
            envelope.verify::<Other>([&good]),
            Err(EnvelopeError::Type { .. })
        ));

        let mut retyped = envelope.clone();
        retyped.payload_type = Other::TYPE.into();
        assert!(matches!(
            retyped.verify::<Other>([&good]),
            Err(EnvelopeError::Untrusted { .. })
        ));

        let mut relabelled = envelope.clone();
        relabelled.signatures[0].keyid = bad.id();
        assert!(relabelled.verify::<Note>([&good, &bad]).is_err());
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        let envelope = note().envelope().clone();
        let trusted = PublicKey::of(&key(1));
        for at in 0..envelope.payload.len() {
            let mut changed = envelope.clone();
            changed.payload[at] ^= 1;
            assert!(changed.verify::<Note>([&trusted]).is_err(), "byte {at}");
        }
        for at in 0..64 {
            let mut changed = envelope.clone();
            changed.signatures[0].sig[at] ^= 1;
            assert!(
                changed.verify::<Note>([&trusted]).is_err(),
                "signature byte {at}"
            );
        }
    }

    #[test]
    fn sizes_are_checked_before_signatures() {
        let mut envelope = note().envelope().clone();
        envelope.payload = vec![b' '; 101];
        let trusted = PublicKey::of(&key(1));
        assert!(matches!(
            envelope.verify::<Note>([&trusted]),
            Err(EnvelopeError::TooLarge { .. })
        ));
        let mut envelope = note().envelope().clone();
        envelope.signatures = vec![envelope.signatures[0].clone(); 5];
        assert!(matches!(
            envelope.verify::<Note>([&trusted]),
            Err(EnvelopeError::TooManySignatures { found: 5 })
        ));
    }
}
