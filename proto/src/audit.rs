//! The audit log's format: records, the Merkle tree over them, and the signed head of the tree.
//!
//! - A record is one line of JSON. What is hashed is the exact bytes of the line, without the
//!   newline, so that nobody has to agree how JSON is written.
//! - The lines are the leaves of a Merkle tree as in RFC 6962, section 2.1.
//! - Its head is signed as a C2SP checkpoint (<https://c2sp.org/tlog-checkpoint>), a signed note
//!   (<https://c2sp.org/signed-note>) with an Ed25519 signature, type 0x01.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ed25519_dalek::{Signer as _, SigningKey};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::dsse::PublicKey;
use crate::{AuditEvent, Digest, Epoch, Generation, Position};

/// Longest line in bytes, without the newline: what one control message can tell fits. It bounds
/// what reading a hostile log takes.
pub const LINE_BYTES_MAX: usize = 1 << 20;

/// Longest checkpoint in bytes: 16 signatures, which the format asks us to accept, with room for
/// those of other algorithms.
pub const CHECKPOINT_BYTES_MAX: usize = 64 << 10;

/// Longest origin in bytes.
pub const ORIGIN_BYTES_MAX: usize = 255;

/// What is to be recorded. The log adds number and time.
#[derive(Clone, Debug, PartialEq)]
pub struct Draft {
    /// What happened.
    pub event: AuditEvent,
    /// Who did it: `operator:uid/name`, `agent:NAME`, `master`.
    pub actor: String,
    /// What it was done to; may be empty.
    pub subject: String,
    /// The generation that it is about.
    pub position: Option<Position>,
    /// What came of it.
    pub outcome: Option<String>,
    /// Everything else.
    pub detail: Value,
}

/// One record of the log.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Record {
    /// Its number, which is also its line: the first is 1, each one more than the one before.
    pub seq: u64,
    /// When it was recorded, by the recording host's clock, which may have been set back.
    pub time: Timestamp,
    /// What happened.
    pub event: String,
    /// Who did it.
    pub actor: String,
    /// What it was done to.
    pub subject: String,
    /// Epoch of the generation that it is about.
    pub epoch: Option<Epoch>,
    /// The generation that it is about.
    pub generation: Option<Generation>,
    /// What came of it.
    pub outcome: Option<String>,
    /// Everything else.
    #[serde(default)]
    pub detail: Value,
}

/// Who gave an order at the admin socket.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Operator {
    /// The user id of the command's process.
    pub uid: u32,
    /// Its name in the user database, or the number again.
    pub name: String,
    /// Who logged in, before `sudo` and the like, where the kernel's audit keeps it. It is read by
    /// process id, so it is evidence for the log, and nothing is decided by it.
    pub login_uid: Option<u32>,
}

/// As the audit log names its actor.
impl fmt::Display for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "operator:{}/{}", self.uid, self.name)
    }
}

impl Draft {
    /// The draft of an event, with no position, no outcome and no detail.
    pub fn new(event: AuditEvent, actor: impl fmt::Display, subject: impl fmt::Display) -> Self {
        Self {
            event,
            actor: actor.to_string(),
            subject: subject.to_string(),
            position: None,
            outcome: None,
            detail: Value::Null,
        }
    }

    /// The record of this.
    pub fn record(self, seq: u64, time: Timestamp) -> Record {
        Record {
            seq,
            time,
            event: self.event.name().to_owned(),
            actor: self.actor,
            subject: self.subject,
            epoch: self.position.map(|position| position.epoch),
            generation: self.position.map(|position| position.generation),
            outcome: self.outcome,
            detail: self.detail,
        }
    }
}

impl Record {
    /// The line, without the newline. JSON escapes control characters, so it is one line whatever
    /// the fields hold.
    pub fn line(&self) -> String {
        serde_json::to_string(self).expect("records serialise")
    }

    /// The generation that it is about.
    pub fn position(&self) -> Option<Position> {
        let (epoch, generation) = self.epoch.zip(self.generation)?;
        Some(Position { epoch, generation })
    }
}

/// The Merkle hash of a line: RFC 6962's leaf hash, which no inner node can equal.
pub fn leaf_hash(line: &[u8]) -> Digest {
    Digest::finish(Sha256::new_with_prefix([0]).chain_update(line))
}

fn node_hash(left: Digest, right: Digest) -> Digest {
    let hasher = Sha256::new_with_prefix([1])
        .chain_update(left.as_bytes())
        .chain_update(right.as_bytes());
    Digest::finish(hasher)
}

/// The Merkle tree over the lines so far, of which only the roots of its largest perfect subtrees
/// are kept: one digest for each bit that is set in the number of leaves. That is all that appending
/// and the head need.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Tree {
    size: u64,
    /// Left to right, so from the largest to the smallest.
    subtrees: Vec<Digest>,
}

impl Tree {
    /// The number of leaves.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Appends a leaf, given its [`leaf_hash`].
    pub fn push(&mut self, leaf: Digest) {
        let mut node = leaf;
        // Two perfect subtrees of one height make one of the next, like carrying a binary one.
        for _ in 0..self.size.trailing_ones() {
            let left = self.subtrees.pop().expect("a subtree for each set bit");
            node = node_hash(left, node);
        }
        self.subtrees.push(node);
        self.size += 1;
    }

    /// The tree's head: RFC 6962's Merkle tree hash, which is SHA-256 of nothing for an empty tree.
    pub fn root(&self) -> Digest {
        let from_the_right = self.subtrees.iter().rev().copied();
        from_the_right
            .reduce(|right, left| node_hash(left, right))
            .unwrap_or_else(|| Digest::of(b""))
    }
}

/// Which log a checkpoint is of, also the name of the key that signs it: a URL without its scheme,
/// such as `clamcast/bank/master`, without spaces and plus signs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Origin(String);

/// The text cannot name a log.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{0}` cannot name an audit log: expected 1 to {ORIGIN_BYTES_MAX} bytes without spaces, control characters and `+`"
)]
pub struct OriginError(String);

impl FromStr for Origin {
    type Err = OriginError;

    fn from_str(text: &str) -> Result<Self, OriginError> {
        let bad = |c: char| c.is_whitespace() || c.is_control() || c == '+';
        if text.is_empty() || text.len() > ORIGIN_BYTES_MAX || text.contains(bad) {
            return Err(OriginError(text.chars().take(80).collect()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The head of a log's tree at one size.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Checkpoint {
    /// Which log.
    pub origin: Origin,
    /// How many lines it has.
    pub size: u64,
    /// The tree's head.
    pub root: Digest,
}

/// Why a checkpoint is not believed.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Longer than any honest one.
    #[error("the checkpoint has {bytes} bytes, at most {CHECKPOINT_BYTES_MAX} are allowed")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// Not in the form of the specification.
    #[error("this is not a checkpoint: {0}")]
    Malformed(&'static str),
    /// It cannot be of any log.
    #[error("this is not a checkpoint")]
    OriginMalformed(#[from] OriginError),
    /// Another log's.
    #[error("this is a checkpoint of `{found}`, expected one of `{expected}`")]
    Origin {
        /// Whose it is.
        found: Origin,
        /// Whose it should be.
        expected: Origin,
    },
    /// Nobody whom we trust signed it.
    #[error("the checkpoint of `{origin}` is not signed by a trusted audit key")]
    Untrusted {
        /// Whose it is.
        origin: Origin,
    },
    /// A trusted key's signature is for something else.
    #[error("the signature on the checkpoint of `{origin}` does not belong to its text")]
    Signature {
        /// Whose it is.
        origin: Origin,
    },
}

impl Checkpoint {
    /// The signed text.
    pub fn sign(&self, key: &SigningKey) -> String {
        sign_note(&self.text(), &self.origin.0, key)
    }

    /// Reads a signed checkpoint: of the log `origin`, if one is given, and signed by one of `keys`.
    pub fn verify<'k>(
        note: &str,
        keys: impl IntoIterator<Item = &'k PublicKey>,
        origin: Option<&Origin>,
    ) -> Result<Self, CheckpointError> {
        if note.len() > CHECKPOINT_BYTES_MAX {
            return Err(CheckpointError::TooLong { bytes: note.len() });
        }
        let (text, signatures) = split_note(note).ok_or(CheckpointError::Malformed(
            "expected text, an empty line and signatures",
        ))?;
        let checkpoint = Self::parse(text)?;
        if let Some(expected) = origin
            && checkpoint.origin != *expected
        {
            return Err(CheckpointError::Origin {
                found: checkpoint.origin,
                expected: expected.clone(),
            });
        }
        match check_signatures(text, signatures, &checkpoint.origin.0, keys) {
            Signed::ByTrusted => Ok(checkpoint),
            Signed::ByNobody => Err(CheckpointError::Untrusted {
                origin: checkpoint.origin,
            }),
            Signed::Wrongly => Err(CheckpointError::Signature {
                origin: checkpoint.origin,
            }),
        }
    }

    fn text(&self) -> String {
        let root = BASE64.encode(self.root.as_bytes());
        format!("{}\n{}\n{root}\n", self.origin, self.size)
    }

    /// Reads the text. Lines after the third are extensions, which the format says to ignore.
    fn parse(text: &str) -> Result<Self, CheckpointError> {
        let wrong = CheckpointError::Malformed;
        let mut lines = text.lines();
        let origin = lines.next().unwrap_or_default().parse()?;
        let size = lines.next().unwrap_or_default();
        let canonical = |number: &u64| number.to_string() == size;
        let size = size.parse().ok().filter(canonical);
        let root = lines.next().and_then(|line| BASE64.decode(line).ok());
        let root: Option<[u8; 32]> = root.and_then(|bytes| bytes.try_into().ok());
        if lines.any(str::is_empty) {
            return Err(wrong("its text has an empty line"));
        }
        Ok(Self {
            origin,
            size: size.ok_or(wrong("expected the number of records in its second line"))?,
            root: root
                .ok_or(wrong("expected a SHA-256 in base64 in its third line"))?
                .into(),
        })
    }
}

/// Signature type 0x01 of the signed-note format: Ed25519 over the text.
const NOTE_ED25519: u8 = 1;

/// Begins a signature line: an em dash and a space.
const NOTE_SIGNATURE: &str = "\u{2014} ";

/// Signs `text`, which ends in a newline, as the key called `name`.
fn sign_note(text: &str, name: &str, key: &SigningKey) -> String {
    let mut signature = note_key_id(name, &PublicKey::of(key)).to_vec();
    signature.extend(key.sign(text.as_bytes()).to_bytes());
    format!(
        "{text}\n{NOTE_SIGNATURE}{name} {}\n",
        BASE64.encode(signature)
    )
}

/// Splits a note into its text, which ends in a newline, and its signature lines.
fn split_note(note: &str) -> Option<(&str, &str)> {
    let control = |c: char| c < ' ' && c != '\n';
    if note.contains(control) {
        return None;
    }
    let empty_line = note.rfind("\n\n")?;
    let (text, signatures) = note.split_at(empty_line + 1);
    let signatures = signatures[1..].strip_suffix('\n')?;
    Some((text, signatures))
}

enum Signed {
    /// A trusted key's signature is good.
    ByTrusted,
    /// No trusted key signed.
    ByNobody,
    /// A trusted key is named, with a signature that is not its.
    Wrongly,
}

/// Looks for the signatures of `keys` under `name`. Those of unknown keys are ignored, as the format
/// says: a witness may have added its own.
fn check_signatures<'k>(
    text: &str,
    signatures: &str,
    name: &str,
    keys: impl IntoIterator<Item = &'k PublicKey>,
) -> Signed {
    let found: Vec<Vec<u8>> = signatures
        .split('\n')
        .filter_map(|line| line.strip_prefix(NOTE_SIGNATURE)?.split_once(' '))
        .filter(|(signer, _)| *signer == name)
        .filter_map(|(_, signature)| BASE64.decode(signature).ok())
        .collect();
    let mut signed = Signed::ByNobody;
    for key in keys {
        let id = note_key_id(name, key);
        for signature in found.iter().filter_map(|found| found.strip_prefix(&id)) {
            if !key.verifies(text.as_bytes(), signature) {
                return Signed::Wrongly;
            }
            signed = Signed::ByTrusted;
        }
    }
    signed
}

/// Names a key in a note: the first four bytes of a hash over name, type and key.
fn note_key_id(name: &str, key: &PublicKey) -> [u8; 4] {
    let hasher = Sha256::new_with_prefix(name)
        .chain_update([b'\n', NOTE_ED25519])
        .chain_update(key.as_bytes());
    let hash = Digest::finish(hasher);
    let [a, b, c, d, ..] = *hash.as_bytes();
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;
    use ct_merkle::mem_backed_tree::MemoryBackedTree;
    use serde_json::json;

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_bytes(&[seed; 32])
    }

    fn origin(name: &str) -> Origin {
        name.parse().unwrap()
    }

    fn record(seq: u64) -> Record {
        let draft = Draft {
            event: AuditEvent::Published,
            actor: "operator:1000/operator".into(),
            subject: "agent:web1".into(),
            position: Some(Position {
                epoch: Epoch(1),
                generation: Generation::FIRST,
            }),
            outcome: Some("live".into()),
            detail: json!({"reason": "two\nlines\u{2028}"}),
        };
        draft.record(seq, Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn a_record_is_one_line_that_can_be_read_again() {
        let line = record(7).line();
        assert!(!line.contains('\n'));
        assert_eq!(serde_json::from_str::<Record>(&line).unwrap(), record(7));
        assert_eq!(record(7).position().unwrap().to_string(), "1.1");
    }

    #[test]
    fn the_fields_stand_in_the_order_of_the_format() {
        let draft = Draft::new(AuditEvent::Wave, "", "");
        let line = draft.record(1, Timestamp::UNIX_EPOCH).line();
        assert_eq!(
            line,
            r#"{"seq":1,"time":"1970-01-01T00:00:00Z","event":"wave","actor":"","subject":"","epoch":null,"generation":null,"outcome":null,"detail":null}"#
        );
    }

    #[test]
    fn the_head_is_the_one_of_an_independent_implementation() {
        let mut tree = Tree::default();
        let mut oracle = MemoryBackedTree::<Sha256, Vec<u8>>::new();
        for number in 0..=200_u32 {
            assert_eq!(tree.root().as_bytes()[..], oracle.root().as_bytes()[..]);
            assert_eq!(tree.size(), u64::from(number));
            assert_eq!(tree.subtrees.len() as u32, tree.size().count_ones());
            let line = number.to_string().into_bytes();
            tree.push(leaf_hash(&line));
            oracle.push(line);
        }
    }

    #[test]
    fn the_head_of_an_empty_tree_is_the_hash_of_nothing() {
        assert!(Tree::default().root().to_string().starts_with("e3b0c442"));
    }

    fn checkpoint() -> Checkpoint {
        Checkpoint {
            origin: origin("clamcast/bank/master"),
            size: 42,
            root: Digest::of(b"root"),
        }
    }

    #[test]
    fn a_checkpoint_has_the_form_of_the_specification() {
        let note = checkpoint().sign(&key(1));
        let lines: Vec<_> = note.split('\n').collect();
        assert_eq!(lines.len(), 6);
        assert_eq!(lines[0], "clamcast/bank/master");
        assert_eq!(lines[1], "42");
        assert_eq!(
            BASE64.decode(lines[2]).unwrap(),
            Digest::of(b"root").as_bytes()
        );
        assert_eq!((lines[3], lines[5]), ("", ""));
        let signature = lines[4].strip_prefix("— clamcast/bank/master ").unwrap();
        assert_eq!(BASE64.decode(signature).unwrap().len(), 4 + 64);
    }

    #[test]
    fn a_note_of_another_implementation_verifies() {
        // The example of Go's golang.org/x/mod/sumdb/note, where the format comes from.
        let key = BASE64
            .decode("ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
            .unwrap();
        let key = PublicKey::from_bytes(&key[1..]).unwrap();
        assert_eq!(hex::encode(note_key_id("PeterNeumann", &key)), "c74f20a3");
        let note = "If you think cryptography is the answer to your problem,\n\
            then you don't know what your problem is.\n\
            \n\
            — PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n";
        let (text, signatures) = split_note(note).unwrap();
        let signed = check_signatures(text, signatures, "PeterNeumann", [&key]);
        assert!(matches!(signed, Signed::ByTrusted));
    }

    /// Verifies `note` with the keys 1 and 2, and shows the outcome.
    fn check(note: &str, expected: &str) {
        let keys = [1, 2].map(|seed| PublicKey::of(&key(seed)));
        let found = match Checkpoint::verify(note, &keys, Some(&checkpoint().origin)) {
            Ok(found) => format!("{} lines", found.size),
            Err(error) => error.to_string(),
        };
        assert!(found.contains(expected), "{found}");
    }

    #[test]
    fn any_trusted_key_will_do_and_no_other() {
        check(&checkpoint().sign(&key(1)), "42 lines");
        check(&checkpoint().sign(&key(2)), "42 lines");
        check(&checkpoint().sign(&key(3)), "not signed by a trusted");
    }

    #[test]
    fn the_signature_of_a_witness_is_ignored() {
        let witness = sign_note(&checkpoint().text(), "witness.example", &key(9));
        let line = witness.lines().last().unwrap();
        check(
            &format!("{}{line}\n", checkpoint().sign(&key(1))),
            "42 lines",
        );
        check(&witness, "not signed by a trusted");
    }

    #[test]
    fn a_checkpoint_of_another_log_is_not_ours() {
        let other = Checkpoint {
            origin: origin("clamcast/shop/master"),
            ..checkpoint()
        };
        check(
            &other.sign(&key(1)),
            "expected one of `clamcast/bank/master`",
        );
    }

    #[test]
    fn any_changed_character_is_noticed() {
        let note = checkpoint().sign(&key(1));
        let keys = [PublicKey::of(&key(1))];
        for (at, old) in note.char_indices() {
            let new = if old == 'A' { "B" } else { "A" };
            let changed = format!("{}{new}{}", &note[..at], &note[at + old.len_utf8()..]);
            assert!(
                Checkpoint::verify(&changed, &keys, None).is_err(),
                "{changed}"
            );
        }
        for end in (0..note.len()).filter(|end| note.is_char_boundary(*end)) {
            assert!(
                Checkpoint::verify(&note[..end], &keys, None).is_err(),
                "cut at {end}"
            );
        }
    }

    #[test]
    fn only_the_one_spelling_of_a_size_is_taken() {
        for size in ["042", "+42", "-1", "", "4 2", "18446744073709551616"] {
            let text = checkpoint().text().replace("42", size);
            let note = sign_note(&text, "clamcast/bank/master", &key(1));
            assert!(
                Checkpoint::verify(&note, &[PublicKey::of(&key(1))], None).is_err(),
                "{size}"
            );
        }
    }

    #[test]
    fn an_overlong_checkpoint_is_not_looked_at() {
        check(
            &"x".repeat(CHECKPOINT_BYTES_MAX + 1),
            "at most 65536 are allowed",
        );
    }

    #[test]
    fn an_origin_has_no_spaces_and_no_plus() {
        let long = "x".repeat(ORIGIN_BYTES_MAX + 1);
        for bad in ["", "a b", "a+b", "a\nb", "a\u{a0}b", "\u{7f}", &long] {
            assert!(bad.parse::<Origin>().is_err(), "{bad:?}");
        }
    }
}
