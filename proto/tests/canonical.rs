//! Canonical forms: what is written is read as it was, and has one form.

use arbitrary::{Result, Unstructured};
use arbtest::arbtest;
use clamcast_proto::audit::{Checkpoint, Draft, Origin, Record};
use clamcast_proto::dsse::{Envelope, PublicKey, Statement, Verified, sign};
use clamcast_proto::fresh::Freshness;
use clamcast_proto::keys::KeySet;
use clamcast_proto::manifest::{
    ContainerFacts, Manifest, ManifestFile, Publisher, SignedBy, content_digest,
};
use clamcast_proto::position::or_null;
use clamcast_proto::revocation::{RevocationList, Revoked};
use clamcast_proto::{
    AgentName, AuditEvent, DatabaseName, Digest, Epoch, FleetName, Generation, GroupName, Position,
};
use ed25519_dalek::SigningKey;
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// A value survives being written and read again.
fn survives<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(value: &T) {
    let text = serde_json::to_string(value).expect("our values serialise");
    assert_eq!(
        serde_json::from_str::<T>(&text).expect("it was written by us"),
        *value
    );
}

#[test]
fn a_name_is_its_own_text() {
    arbtest(|u| {
        let text = text_of(
            u,
            &[
                "a", "Z", "0", ".", "_", "-", ".cld", ".CvD", "/", " ", "\n", "\u{e9}", "\u{202e}",
            ],
        )?;
        check_name::<FleetName>(&text);
        check_name::<AgentName>(&text);
        check_name::<GroupName>(&text);
        check_name::<DatabaseName>(&text);
        if let Ok(name) = text.parse::<DatabaseName>()
            && let Some(other) = name.other_form()
        {
            check_name::<DatabaseName>(other.as_str());
            assert_eq!(other.base(), name.base());
            assert_eq!(other.other_form(), Some(name));
        }
        Ok(())
    });
}

/// A text and its JSON are names or neither of them is.
fn check_name<T>(text: &str)
where
    T: std::str::FromStr + ToString + DeserializeOwned + Serialize + PartialEq + std::fmt::Debug,
{
    let read: serde_json::Result<T> = serde_json::from_value(text.into());
    match text.parse::<T>() {
        Ok(name) => {
            assert_eq!(name.to_string(), text);
            assert_eq!(
                serde_json::to_value(&name).expect("a name serialises"),
                text
            );
            assert_eq!(read.expect("it is a name"), name);
        }
        Err(_) => assert!(read.is_err(), "{text:?}"),
    }
}

#[test]
fn a_digest_has_one_text() {
    arbtest(|u| {
        let digest = digest(u)?;
        assert_eq!(digest.to_string().parse::<Digest>().ok(), Some(digest));
        survives(&digest);
        let mut text = digest.to_string();
        let at = u.choose_index(text.len())?;
        let other = *u.choose(&['0', 'f', 'F', 'g', ' ', '+'])?;
        text.replace_range(at..=at, other.encode_utf8(&mut [0; 4]));
        if let Ok(digest) = text.parse::<Digest>() {
            assert_eq!(digest.to_string(), text);
        }
        Ok(())
    });
}

#[test]
fn positions_survive_json_and_sort_by_epoch_and_number() {
    #[derive(Debug, Deserialize, PartialEq, Serialize)]
    struct Flat {
        #[serde(flatten, with = "or_null")]
        position: Option<Position>,
    }

    arbtest(|u| {
        let (one, other) = (position(u)?, position(u)?);
        survives(&one);
        survives(&Flat {
            position: u.ratio(1, 2)?.then_some(one),
        });
        let numbers = |it: Position| (it.epoch.0, it.generation.number());
        assert_eq!(one.cmp(&other), numbers(one).cmp(&numbers(other)));
        if let Some(next) = one.generation.next() {
            assert!(next > one.generation);
        }
        Ok(())
    });
}

#[test]
fn statements_survive_their_envelopes() {
    arbtest(|u| {
        let signer = key(u.arbitrary()?);
        let trusted = [PublicKey::of(&signer)];
        let manifest = manifest(u)?;
        check_statement(sign(manifest, &signer), |envelope| {
            Manifest::verify(envelope, &trusted).expect("it is consistent")
        });
        let fresh = Freshness {
            fleet: fleet(u)?,
            epoch: Epoch(u.arbitrary()?),
            generation: generation(u)?,
            manifest_sha256: digest(u)?,
            issued: timestamp(u)?,
            expires: timestamp(u)?,
        };
        check_statement(sign(fresh, &signer), |envelope| {
            envelope.verify(&trusted).expect("it is signed")
        });
        let set = KeySet {
            fleet: fleet(u)?,
            version: u.arbitrary()?,
            epoch: Epoch(u.arbitrary()?),
            issued: timestamp(u)?,
            root: PublicKey::of(&signer),
            manifest: keys(u)?,
            audit: keys(u)?,
        };
        check_statement(sign(set, &signer), |envelope| {
            KeySet::verify(envelope).expect("it has keys")
        });
        let entry = |u: &mut Unstructured<'_>| -> Result<Revoked> {
            Ok(Revoked {
                name: u
                    .choose(&["web1", "db-01.example.net"])?
                    .parse()
                    .expect("a name"),
                serial: clamcast_proto::identity::Serial(u.arbitrary()?),
                time: timestamp(u)?,
                reason: u.arbitrary()?,
            })
        };
        let list = RevocationList {
            fleet: fleet(u)?,
            version: u.arbitrary()?,
            issued: timestamp(u)?,
            revoked: (0..u.int_in_range(0..=3)?)
                .map(|_| entry(u))
                .collect::<Result<_>>()?,
        };
        check_statement(sign(list, &signer), |envelope| {
            envelope.verify(&trusted).expect("it is signed")
        });
        Ok(())
    });

    fn check_statement<T: Statement + PartialEq + std::fmt::Debug>(
        signed: Verified<T>,
        verify: impl Fn(&Envelope) -> Verified<T>,
    ) {
        survives(signed.envelope());
        let verified = verify(signed.envelope());
        assert_eq!(verified.signer(), signed.signer());
        assert_eq!(*verified, *signed);
        assert_eq!(verified.payload_sha256(), signed.payload_sha256());
        // Written once more, it has the bytes that were signed.
        let written = serde_json::to_vec(&*verified).expect("our statements serialise");
        assert_eq!(written, signed.envelope().payload);
    }
}

#[test]
fn one_signature_by_a_trusted_key_is_enough_and_one_is_needed() {
    arbtest(|u| {
        let manifest = manifest(u)?;
        let mut signers = vec![];
        let mut envelope: Option<Envelope> = None;
        for _ in 0..u.int_in_range(1..=4)? {
            let seed = u.int_in_range(0..=5)?;
            let signed = sign(manifest.clone(), &key(seed)).envelope().clone();
            // A damaged signature is none.
            let mut signature = signed.signatures[0].clone();
            if u.ratio(1, 3)? {
                signature.sig[u.choose_index(64)?] ^= u.int_in_range(1..=255)?;
            } else {
                signers.push(seed);
            }
            let envelope = envelope.get_or_insert(Envelope {
                signatures: vec![],
                ..signed
            });
            envelope.signatures.push(signature);
        }
        let envelope = envelope.expect("somebody signed");
        let trusted: Vec<u8> = (0..=5).filter(|seed| seed % 2 == 0).collect();
        let keys: Vec<_> = trusted
            .iter()
            .map(|seed| PublicKey::of(&key(*seed)))
            .collect();
        let expected = signers.iter().any(|seed| trusted.contains(seed));
        assert_eq!(Manifest::verify(&envelope, &keys).is_ok(), expected);
        Ok(())
    });
}

#[test]
fn the_content_digest_is_that_of_the_set() {
    arbtest(|u| {
        let manifest = manifest(u)?;
        let digest = |files: &[ManifestFile]| {
            content_digest(
                files
                    .iter()
                    .map(|file| (&file.name, file.size, &file.sha256)),
            )
        };
        let mut files = manifest.files.clone();
        for at in 1..files.len() {
            files.swap(at, u.int_in_range(0..=at)?);
        }
        assert_eq!(digest(&files), manifest.content);
        let at = u.choose_index(files.len())?;
        match u.int_in_range(0..=2)? {
            0 => files[at].size ^= 1,
            1 => files[at].sha256 = Digest::of(b"another"),
            _ => drop(files.remove(at)),
        }
        assert_ne!(digest(&files), manifest.content);
        Ok(())
    });
}

#[test]
fn an_audit_record_is_one_line_with_one_form() {
    arbtest(|u| {
        let event = *u.choose(&[AuditEvent::Published, AuditEvent::Wave])?;
        let draft = Draft {
            event,
            actor: u.arbitrary()?,
            subject: u.arbitrary()?,
            position: u.ratio(1, 2)?.then_some(position(u)?),
            outcome: u.arbitrary()?,
            detail: detail(u, 3)?,
        };
        let record = draft.record(u.arbitrary()?, timestamp(u)?);
        let line = record.line();
        assert!(!line.contains(['\n', '\r']), "{line}");
        let again: Record = serde_json::from_str(&line).expect("it was written by us");
        assert_eq!(again, record);
        assert_eq!(again.line(), line);
        Ok(())
    });
}

#[test]
fn a_checkpoint_survives_its_signature() {
    arbtest(|u| {
        let origin = text_of(u, &["a", "/", ".", "\u{e9}", "\u{2014}", "-"])?;
        let Ok(origin) = origin.parse::<Origin>() else {
            return Ok(());
        };
        let checkpoint = Checkpoint {
            origin,
            size: u.arbitrary()?,
            root: digest(u)?,
        };
        let signer = key(u.arbitrary()?);
        let note = checkpoint.sign(&signer);
        let keys = [PublicKey::of(&signer)];
        let read = Checkpoint::verify(&note, &keys, Some(&checkpoint.origin));
        let read = read.expect("it was signed by us");
        assert_eq!(read, checkpoint);
        assert_eq!(read.sign(&signer), note);
        Ok(())
    });
}

fn text_of(u: &mut Unstructured<'_>, parts: &[&str]) -> Result<String> {
    let length = u.int_in_range(0..=12)?;
    (0..length).map(|_| u.choose(parts).copied()).collect()
}

fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

fn keys(u: &mut Unstructured<'_>) -> Result<Vec<PublicKey>> {
    let count = u.int_in_range(1..=3)?;
    (0..count)
        .map(|_| Ok(PublicKey::of(&key(u.arbitrary()?))))
        .collect()
}

fn digest(u: &mut Unstructured<'_>) -> Result<Digest> {
    Ok(u.arbitrary::<[u8; 32]>()?.into())
}

fn fleet(u: &mut Unstructured<'_>) -> Result<FleetName> {
    Ok(u.choose(&["bank", "a.b-c_D"])?.parse().expect("a name"))
}

fn generation(u: &mut Unstructured<'_>) -> Result<Generation> {
    Ok(Generation::new(u.int_in_range(1..=u64::MAX)?).expect("it is not zero"))
}

fn position(u: &mut Unstructured<'_>) -> Result<Position> {
    Ok(Position {
        epoch: Epoch(u.arbitrary()?),
        generation: generation(u)?,
    })
}

fn timestamp(u: &mut Unstructured<'_>) -> Result<Timestamp> {
    let range = Timestamp::MIN.as_nanosecond()..=Timestamp::MAX.as_nanosecond();
    let nanosecond = u.int_in_range(range)?;
    Ok(Timestamp::from_nanosecond(nanosecond).expect("it is in range"))
}

/// A consistent manifest of one to five files.
fn manifest(u: &mut Unstructured<'_>) -> Result<Manifest> {
    let mut files = Vec::new();
    for number in 0..u.int_in_range(1..=5)? {
        let extension = u.choose(&["cld", "cvd", "cud", "ndb", "xdb"])?;
        let container = ContainerFacts {
            version: u.arbitrary()?,
            signatures: u.arbitrary()?,
            built: u.ratio(1, 2)?.then_some(timestamp(u)?),
            signed_by: *u.choose(&[None, Some(SignedBy::Talos), Some(SignedBy::None)])?,
        };
        files.push(ManifestFile {
            captured: None,
            name: format!("n{number}.{extension}").parse().expect("a name"),
            size: u.int_in_range(0..=1 << 30)?,
            sha256: digest(u)?,
            container: u.ratio(1, 2)?.then_some(container),
        });
    }
    let facts = files
        .iter()
        .map(|file| (&file.name, file.size, &file.sha256));
    Ok(Manifest {
        fleet: fleet(u)?,
        epoch: Epoch(u.arbitrary()?),
        generation: generation(u)?,
        publisher: Publisher(u.arbitrary()?),
        created: timestamp(u)?,
        previous: u.ratio(1, 2)?.then_some(digest(u)?),
        rollback_of: u.ratio(1, 2)?.then_some(position(u)?),
        content: content_digest(facts),
        files,
    })
}

/// What stands in the details of an audit record. A number with a point is one of milliseconds.
fn detail(u: &mut Unstructured<'_>, depth: u8) -> Result<Value> {
    let leaf = depth == 0;
    Ok(match u.int_in_range(0..=if leaf { 4 } else { 6 })? {
        0 => Value::Null,
        1 => json!(u.arbitrary::<bool>()?),
        2 => json!(u.arbitrary::<i64>()?),
        3 => json!(f64::from(u.arbitrary::<u32>()?) / 1000.0),
        4 => json!(u.arbitrary::<String>()?),
        5 => (0..u.int_in_range(0..=3)?)
            .map(|_| detail(u, depth - 1))
            .collect::<Result<_>>()?,
        _ => {
            let entry = |u: &mut Unstructured<'_>| Ok((u.arbitrary()?, detail(u, depth - 1)?));
            let entries = (0..u.int_in_range(0..=3)?).map(|_| entry(u));
            Value::Object(entries.collect::<Result<_>>()?)
        }
    })
}
