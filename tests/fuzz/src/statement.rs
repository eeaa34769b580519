//! `key_set` and `manifest`: signed statements, as an envelope and as the payload of one.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt::Debug;
use std::sync::LazyLock;

use clamcast_proto::dsse::{Envelope, PublicKey, Signature, Statement, Verified, sign};
use clamcast_proto::fresh::Freshness;
use clamcast_proto::keys::{KEYS_MAX, KeySet};
use clamcast_proto::manifest::{FILES_MAX, Manifest, content_digest};
use clamcast_proto::receipt::Receipt;
use clamcast_proto::trust::{Mark, Trust};
use ed25519_dalek::{Signer as _, SigningKey};
use jiff::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::render;

/// Root key, manifest key and audit key of the targets. `corpus` has key sets with its public half.
static KEY: LazyLock<SigningKey> = LazyLock::new(|| SigningKey::from_bytes(&[1; 32]));

/// Verifies the input as an envelope with a key set, and as the payload of one that the root key
/// has signed.
pub fn key_set(bytes: &[u8]) -> bool {
    if let Some(envelope) = envelope(bytes) {
        judge(KeySet::verify(&envelope));
    }
    let envelope = signed::<KeySet>(bytes);
    let Some(set) = judge(KeySet::verify(&envelope)) else {
        return false;
    };
    let root = PublicKey::of(&KEY);
    assert_eq!(set.root, root);
    for keys in [&set.manifest, &set.audit] {
        assert!((1..=KEYS_MAX).contains(&keys.len()));
    }
    // An agent that has this set stays with it, takes a newer one, and never goes back.
    assert!(matches!(KeySet::accept(&set, &envelope), Ok(None)));
    let mut newer = (*set).clone();
    newer.version = set.version.saturating_add(1);
    if newer.version > set.version {
        let newer = sign(newer, &KEY);
        let accepted = judge(KeySet::accept(&set, newer.envelope())).expect("it is newer");
        let newer = accepted.expect("it is another set");
        assert!(KeySet::accept(&newer, &envelope).is_err());
    }
    true
}

/// Verifies the input as an envelope with a manifest, and as the plain and the compressed payload of one
/// that the manifest key has signed.
pub fn manifest(bytes: &[u8]) -> bool {
    let keys = [PublicKey::of(&KEY)];
    if let Some(envelope) = envelope(bytes) {
        judge(Manifest::verify(&envelope, &keys));
    }
    let compressed = Manifest::COMPRESSED.expect("a manifest has such a form");
    let envelopes = [
        signed::<Manifest>(bytes),
        signed_as(compressed.payload_type, bytes),
    ];
    let manifests = envelopes.map(|envelope| judge(Manifest::verify(&envelope, &keys)));
    let Some(manifest) = manifests.into_iter().flatten().next() else {
        return false;
    };
    let again: Manifest = manifest.envelope().peek().expect("it was verified");
    assert_eq!(again, *manifest);
    assert!(manifest.files.len() <= FILES_MAX);
    let files = &manifest.files;
    assert!(!files.is_empty());
    let names = files.iter().map(|file| file.name.as_str().to_lowercase());
    assert_eq!(names.collect::<BTreeSet<_>>().len(), files.len());
    for file in files {
        let other = file.name.other_form();
        assert!(other.is_none_or(|other| manifest.file(&other).is_none()));
    }
    let backwards = files.iter().rev();
    let content = content_digest(backwards.map(|file| (&file.name, file.size, &file.sha256)));
    assert_eq!(content, manifest.content);
    manifest.total_bytes();
    trust(&manifest);
    true
}

/// An agent that accepts the manifest keeps its position.
fn trust(manifest: &Verified<Manifest>) {
    let key = PublicKey::of(&KEY);
    let set = KeySet {
        fleet: manifest.fleet.clone(),
        version: 1,
        epoch: manifest.epoch,
        issued: manifest.created,
        root: key.clone(),
        manifest: vec![key.clone()],
        audit: vec![key],
    };
    let mut trust = Trust::new(sign(set, &KEY), None);
    let envelope = manifest.envelope();
    judge(trust.judge_manifest(envelope, None)).expect("nothing was accepted before");
    trust.adopt_mark(Mark::of(manifest));
    judge(trust.judge_manifest(envelope, None)).expect("an offer may be repeated");
    assert!(trust.raised(manifest).is_none());
    let mut another = (**manifest).clone();
    another.previous = Some(manifest.payload_sha256());
    let another = sign(another, &KEY);
    assert!(trust.judge_manifest(another.envelope(), None).is_err());
}

/// Reads the input as the payload of a receipt and of a freshness statement, which frames carry.
pub(crate) fn carried(bytes: &[u8]) -> bool {
    let keys = [PublicKey::of(&KEY)];
    let mut accepted = false;
    // Most inputs are neither, and signing takes longest.
    if serde_json::from_slice::<Receipt>(bytes).is_ok() {
        let verdict = signed::<Receipt>(bytes).verify::<Receipt>(&keys);
        let mut receipt = (*verdict.expect("it is signed")).clone();
        receipt.is_bounded();
        receipt.took = 0.0; // for people: the parser may be off by the last digit
        assert_same_again(&receipt);
        accepted = true;
    }
    if serde_json::from_slice::<Freshness>(bytes).is_ok() {
        let fresh = signed::<Freshness>(bytes).verify::<Freshness>(&keys);
        let fresh = judge(fresh).expect("it is signed");
        for now in [Timestamp::MIN, fresh.issued, fresh.expires, Timestamp::MAX] {
            assert!(fresh.holds_until(now) <= fresh.expires);
        }
        accepted = true;
    }
    accepted
}

/// The input as an envelope, which survives being written and read again.
fn envelope(bytes: &[u8]) -> Option<Envelope> {
    let envelope: Envelope = serde_json::from_slice(bytes).ok()?;
    assert_same_again(&envelope);
    Some(envelope)
}

/// An envelope with this payload and a good signature (DSSE, protocol version 1).
fn signed<T: Statement>(payload: &[u8]) -> Envelope {
    signed_as(T::TYPE, payload)
}

/// The same under any payload type.
fn signed_as(kind: &str, payload: &[u8]) -> Envelope {
    let length = payload.len();
    let mut message = format!("DSSEv1 {} {kind} {length} ", kind.len()).into_bytes();
    message.extend(payload);
    Envelope {
        payload_type: kind.to_owned(),
        payload: payload.to_vec(),
        signatures: vec![Signature {
            keyid: PublicKey::of(&KEY).id(),
            sig: KEY.sign(&message).to_bytes().to_vec(),
        }],
    }
}

/// What was verified survives being written and read again; an error can be rendered.
fn judge<T: Checked, E: Error + 'static>(verdict: Result<T, E>) -> Option<T> {
    match verdict {
        Ok(value) => {
            value.check();
            Some(value)
        }
        Err(error) => {
            render(&error);
            None
        }
    }
}

trait Checked {
    fn check(&self);
}

impl<T: Statement + Debug + PartialEq> Checked for Verified<T> {
    fn check(&self) {
        assert_same_again::<T>(self);
    }
}

impl<T: Checked> Checked for Option<T> {
    fn check(&self) {
        if let Some(value) = self {
            value.check();
        }
    }
}

/// A value that was parsed is the same after it was serialised and parsed again, and its text, too.
fn assert_same_again<T: Serialize + DeserializeOwned + Debug + PartialEq>(value: &T) {
    let text = serde_json::to_string(value).expect("what was parsed serialises");
    let again: T = serde_json::from_str(&text).expect("what was serialised parses");
    assert_eq!(again, *value);
    let text_again = serde_json::to_string(&again).expect("what was parsed serialises");
    assert_eq!(text_again, text);
}
