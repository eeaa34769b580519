//! Signed envelopes: DSSE (Dead Simple Signing Envelope, <https://github.com/secure-systems-lab/dsse>,
//! protocol version 1) with Ed25519 (RFC 8032).
//!
//! What is signed is the type and the exact payload bytes, so nothing is ever serialised again to
//! check a signature, and a statement of one kind can never pass for another. A long statement is signed
//! compressed, under a payload type of its own.

use std::fmt;
use std::io::{self, Read as _};

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
    /// The form of a statement whose JSON has more than [`Statement::BYTES_MAX`] bytes, if there is one.
    const COMPRESSED: Option<Compressed> = None;
}

/// The form of a long statement: its JSON as one zstd frame of at most [`Statement::BYTES_MAX`] bytes.
/// The frame is what is signed, and the statement's digest is that of the frame.
#[derive(Clone, Copy, Debug)]
pub struct Compressed {
    /// The DSSE payload type.
    pub payload_type: &'static str,
    /// Longest JSON in bytes. Whatever size the frame claims, decompression ends there.
    pub json_bytes_max: usize,
}

/// Compression level of long statements. Higher levels take ten times as long for a fiftieth.
const ZSTD_LEVEL: i32 = 9;

/// Largest window that a frame may ask a reader to allocate, as a power of two: 4 MiB.
const ZSTD_WINDOW_LOG_MAX: u32 = 22;

/// A signed statement as it travels and is kept. Nothing in it is to be believed before
/// [`Envelope::verify`].
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Envelope {
    /// What kind of statement the payload is.
    #[serde(rename = "payloadType")]
    pub payload_type: String,
    /// The statement in base64: JSON, or a zstd frame with JSON ([`Compressed`]).
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
    /// Signed, but not one whole zstd frame.
    #[error("the {kind} is signed but is not one zstd frame")]
    Decompress {
        /// Payload type.
        kind: &'static str,
        /// The reason of zstd.
        source: io::Error,
    },
    /// More than any honest statement after decompression.
    #[error("the {kind} has more than {limit} bytes after decompression")]
    DecompressesTooLarge {
        /// Payload type.
        kind: &'static str,
        /// The bound.
        limit: usize,
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

/// The payload of a statement and its type: the JSON, or its compressed form where the JSON is too long
/// and the statement has such a form.
pub(crate) fn payload<T: Statement>(statement: &T) -> (&'static str, Vec<u8>) {
    let json = serde_json::to_vec(statement).expect("our own statements serialise");
    match T::COMPRESSED {
        Some(compressed) if json.len() > T::BYTES_MAX => {
            let frame = zstd::bulk::compress(&json, ZSTD_LEVEL);
            let frame = frame.expect("memory is compressed into memory");
            (compressed.payload_type, frame)
        }
        Some(_) | None => (T::TYPE, json),
    }
}

/// Signs a statement.
pub fn sign<T: Statement>(statement: T, key: &SigningKey) -> Verified<T> {
    let (payload_type, payload) = payload(&statement);
    let signer = PublicKey::of(key).id();
    let sig = key
        .sign(&pre_authentication_encoding(payload_type, &payload))
        .to_bytes()
        .to_vec();
    let payload_sha256 = Digest::of(&payload);
    let envelope = Envelope {
        payload_type: payload_type.to_owned(),
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

/// The JSON in a zstd frame, at most `limit` bytes of it. The size that the frame claims is not used:
/// memory grows with what really comes out.
fn decompress(frame: &[u8], kind: &'static str, limit: usize) -> Result<Vec<u8>, EnvelopeError> {
    let failed = |source| EnvelopeError::Decompress { kind, source };
    let mut rest = frame;
    let mut json = Vec::new();
    let mut decoder = zstd::Decoder::with_buffer(&mut rest)
        .map_err(failed)?
        .single_frame();
    decoder
        .window_log_max(ZSTD_WINDOW_LOG_MAX)
        .map_err(failed)?;
    let read = decoder.by_ref().take(limit as u64 + 1);
    { read }.read_to_end(&mut json).map_err(failed)?;
    if json.len() > limit {
        return Err(EnvelopeError::DecompressesTooLarge { kind, limit });
    }
    drop(decoder);
    if !rest.is_empty() {
        let behind = io::Error::other(format!("{} bytes follow the frame", rest.len()));
        return Err(failed(behind));
    }
    Ok(json)
}

impl Envelope {
    /// Checks type, size and signature, then parses. One good signature by any of `keys` is enough.
    pub fn verify<'k, T: Statement>(
        &self,
        keys: impl IntoIterator<Item = &'k PublicKey> + Clone,
    ) -> Result<Verified<T>, EnvelopeError> {
        let compressed = self.form::<T>()?;
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
        let payload_type = compressed.map_or(T::TYPE, |compressed| compressed.payload_type);
        let message = pre_authentication_encoding(payload_type, &self.payload);
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

    /// Parses the payload *without* checking who signed it: for a statement that was verified before it
    /// was kept, or to find the key that must have signed it.
    pub fn peek<T: Statement>(&self) -> Result<T, EnvelopeError> {
        self.check_size::<T>()?;
        self.parse()
    }

    /// The form that the payload type names: `None` for plain JSON.
    fn form<T: Statement>(&self) -> Result<Option<Compressed>, EnvelopeError> {
        if self.payload_type == T::TYPE {
            return Ok(None);
        }
        let compressed = T::COMPRESSED;
        let compressed = compressed.filter(|it| self.payload_type == it.payload_type);
        compressed.map(Some).ok_or_else(|| EnvelopeError::Type {
            found: self.payload_type.chars().take(80).collect(),
            expected: T::TYPE,
        })
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
        let kind = T::TYPE;
        let parsed = match self.form::<T>()? {
            None => serde_json::from_slice(&self.payload),
            Some(compressed) => {
                let json = decompress(&self.payload, kind, compressed.json_bytes_max)?;
                serde_json::from_slice(&json)
            }
        };
        parsed.map_err(|source| EnvelopeError::Malformed { kind, source })
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

    #[derive(Debug, Deserialize, PartialEq, Serialize)]
    struct Long {
        text: String,
    }
    impl Statement for Long {
        const TYPE: &'static str = "application/vnd.example.long+json";
        const BYTES_MAX: usize = 100;
        const COMPRESSED: Option<Compressed> = Some(Compressed {
            payload_type: "application/vnd.example.long+json+zstd",
            json_bytes_max: 1000,
        });
    }

    /// Signs any payload under any type.
    fn signed(payload_type: &str, payload: &[u8]) -> Envelope {
        let sig = key(1).sign(&pre_authentication_encoding(payload_type, payload));
        Envelope {
            payload_type: payload_type.to_owned(),
            payload: payload.to_vec(),
            signatures: vec![Signature {
                keyid: PublicKey::of(&key(1)).id(),
                sig: sig.to_bytes().to_vec(),
            }],
        }
    }

    fn verify_long(envelope: &Envelope) -> Result<Verified<Long>, EnvelopeError> {
        envelope.verify([&PublicKey::of(&key(1))])
    }

    #[test]
    fn a_long_statement_is_signed_compressed_and_a_short_one_as_it_was() {
        let long = |text: String| sign(Long { text }, &key(1));
        let (short, long) = (long("x".repeat(50)), long("x".repeat(500)));
        assert_eq!(short.envelope().payload_type, Long::TYPE);
        assert_eq!(short.envelope().payload[0], b'{');
        let payload_type = Long::COMPRESSED.unwrap().payload_type;
        assert_eq!(long.envelope().payload_type, payload_type);
        assert_eq!(long.payload_sha256(), Digest::of(&long.envelope().payload));
        for statement in [short, long] {
            let read = verify_long(statement.envelope()).unwrap();
            assert_eq!(*read, *statement);
            assert_eq!(read.payload_sha256(), statement.payload_sha256());
            let peeked: Long = statement.envelope().peek().unwrap();
            assert_eq!(peeked, *statement);
        }
    }

    #[test]
    fn a_reader_without_the_compressed_form_names_the_type_that_it_does_not_know() {
        let long = sign(
            Long {
                text: "x".repeat(500),
            },
            &key(1),
        );
        let error = long.envelope().verify::<Note>([&PublicKey::of(&key(1))]);
        assert_eq!(
            error.unwrap_err().to_string(),
            "this is a `application/vnd.example.long+json+zstd`, expected a \
             `application/vnd.example.note+json`"
        );
    }

    #[test]
    fn the_two_forms_of_a_statement_do_not_pass_for_each_other() {
        let text = "x".repeat(500);
        let json = serde_json::to_vec(&Long { text }).unwrap();
        let frame = zstd::bulk::compress(&json, 3).unwrap();
        let payload_type = Long::COMPRESSED.unwrap().payload_type;
        assert!(verify_long(&signed(payload_type, &frame)).is_ok());
        let mut retyped = signed(payload_type, &frame);
        retyped.payload_type = Long::TYPE.to_owned();
        assert!(matches!(
            verify_long(&retyped),
            Err(EnvelopeError::Untrusted { .. })
        ));
        assert!(matches!(
            verify_long(&signed(Long::TYPE, &frame)),
            Err(EnvelopeError::Malformed { .. })
        ));
        assert!(matches!(
            verify_long(&signed(payload_type, &json[..100])),
            Err(EnvelopeError::Decompress { .. })
        ));
    }

    #[test]
    fn decompression_ends_at_the_limit_whatever_the_frame_claims() {
        let payload_type = Long::COMPRESSED.unwrap().payload_type;
        let compress = |bytes: &[u8]| zstd::bulk::compress(bytes, 19).unwrap();
        let verify = |frame: &[u8]| verify_long(&signed(payload_type, frame)).unwrap_err();
        let bomb = compress(&vec![b' '; 1 << 20]);
        assert!(matches!(
            verify(&bomb[..bomb.len().min(100)]),
            EnvelopeError::DecompressesTooLarge { limit: 1000, .. }
        ));
        // The same without a size in its header.
        let mut unsized_frame = zstd::Encoder::new(Vec::new(), 3).unwrap();
        std::io::Write::write_all(&mut unsized_frame, &[b' '; 1001]).unwrap();
        assert!(matches!(
            verify(&unsized_frame.finish().unwrap()),
            EnvelopeError::DecompressesTooLarge { .. }
        ));
        let mut two = compress(br#"{"text":""}"#);
        let good = two.clone();
        assert!(verify_long(&signed(payload_type, &good)).is_ok());
        for behind in [&good[..], b"x"] {
            two.truncate(good.len());
            two.extend(behind);
            assert!(matches!(verify(&two), EnvelopeError::Decompress { .. }));
        }
        for cut in 1..good.len() {
            assert!(matches!(
                verify(&good[..cut]),
                EnvelopeError::Decompress { .. }
            ));
        }
        // A window of 128 MiB, which a reader would have to allocate.
        let mut wide = zstd::Encoder::new(Vec::new(), 3).unwrap();
        wide.window_log(27).unwrap();
        std::io::Write::write_all(&mut wide, br#"{"text":""}"#).unwrap();
        assert!(matches!(
            verify(&wide.finish().unwrap()),
            EnvelopeError::Decompress { .. }
        ));
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
