//! What the store keeps, and how it encodes it.

use std::io::Write as _;
use std::sync::Barrier;
use std::thread;

use clamcast_proto::dsse::sign;
use clamcast_proto::manifest::{Form, ManifestFile, Publisher, content_digest};
use clamcast_proto::wire::{Have, PartKind};
use ed25519_dalek::SigningKey;
use jiff::Timestamp;

use super::*;

/// A store of a fleet whose root key made a key set of its own.
pub(crate) fn open_store(path: &Path) -> Store {
    let key = SigningKey::from_bytes(&[1; 32]);
    let public = PublicKey::of(&key);
    let set = KeySet {
        fleet: "bank".parse().unwrap(),
        version: 1,
        epoch: Epoch(1),
        issued: Timestamp::UNIX_EPOCH,
        root: public.clone(),
        manifest: vec![public.clone()],
        audit: vec![public],
    };
    let mirror = path.join("mirror");
    fs::create_dir_all(&mirror).unwrap();
    Store::open(path, &mirror, &sign(set, &key), Alarms::default()).unwrap()
}

/// Publishes these files, so that the store knows their names.
fn publish(store: &Store, files: &[&ManifestFile]) {
    let key = SigningKey::from_bytes(&[1; 32]);
    let taken = store.taken().map(|taken| taken.generation);
    let mut files: Vec<_> = files.iter().map(|file| (*file).clone()).collect();
    files.sort_by(|one, other| one.name.cmp(&other.name));
    let content = content_digest(files.iter().map(|it| (&it.name, it.size, &it.sha256)));
    let manifest = Manifest {
        fleet: "bank".parse().unwrap(),
        epoch: Epoch(1),
        generation: taken.map_or(Generation::FIRST, |it| it.next().unwrap()),
        publisher: Publisher("lab".to_owned()),
        created: Timestamp::UNIX_EPOCH,
        previous: None,
        rollback_of: None,
        content,
        files,
    };
    store.add(sign(manifest, &key)).unwrap();
}

/// Two versions of a database that were published one after the other.
fn two_published(store: &Store, lines: u64) -> [ManifestFile; 2] {
    [1, 2].map(|version| {
        let file = import(store, &signatures(lines, version));
        publish(store, &[&file]);
        file
    })
}

/// The encoding of a file for an agent that has `have`.
fn encode(
    store: &Store,
    have: &Have,
    target: &ManifestFile,
    full: bool,
) -> Result<Encoded, StoreError> {
    store.encode(store.pair(have, target, full))
}

fn import(store: &Store, content: &[u8]) -> ManifestFile {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    io::Seek::rewind(&mut file).unwrap();
    let (sha256, size) = store.import(&file).unwrap();
    assert_eq!((sha256, size), (Digest::of(content), content.len() as u64));
    ManifestFile {
        captured: None,
        name: "daily.cud".parse().unwrap(),
        size,
        sha256,
        container: None,
    }
}

/// Lines of random hexadecimal digits, as signatures are; every thousandth is another one in each
/// version.
fn signatures(lines: u64, version: u64) -> Vec<u8> {
    let line = |number| {
        let version = if number % 1000 == 0 { version } else { 0 };
        let digest = Digest::of(format!("{number} {version}").as_bytes());
        format!("{digest}:1000:Lab.Nothing-{number}:73\n")
    };
    (0..lines).map(line).collect::<String>().into_bytes()
}

/// Bytes that no compressor makes shorter.
fn noise(blocks: u32) -> Vec<u8> {
    let block = |number: u32| *Digest::of(&number.to_be_bytes()).as_bytes();
    (0..blocks).flat_map(block).collect()
}

fn check(encoded: &Encoded, kind: PartKind, zstd: bool) -> u64 {
    let encoding = &encoded.encoding;
    assert_eq!((encoding.kind, encoding.zstd), (kind, zstd));
    let seal = match zstd || kind == PartKind::Delta {
        true => integrity::SEAL_BYTES,
        false => 0, // the object itself
    };
    let length = fs::metadata(&encoded.path).unwrap().len();
    assert_eq!(length, encoding.length + seal);
    encoding.length
}

#[test]
fn an_agent_with_an_old_object_gets_a_delta_and_one_without_the_file_compressed() {
    let root = tempfile::tempdir().unwrap();
    let store = open_store(root.path());
    let [old, new] = two_published(&store, 20_000);
    let have = Have::Sha256(old.sha256);
    let delta = encode(&store, &have, &new, false).unwrap();
    assert!(check(&delta, PartKind::Delta, false) < 3000);
    assert_eq!(delta.encoding.from, Some(old.sha256));

    let unknown = Have::Sha256(Digest::of(b"never published"));
    let full = encode(&store, &unknown, &new, false).unwrap();
    let length = check(&full, PartKind::Full, true);
    assert!(length < new.size * 3 / 4, "{length} of {}", new.size);
    let compressed = File::open(&full.path).unwrap().take(length);
    let inflated = zstd::decode_all(compressed).unwrap();
    assert_eq!(Digest::of(&inflated), new.sha256);
    for (have, full) in [(Have::Nothing, false), (Have::Search, false), (have, true)] {
        let encoded = encode(&store, &have, &new, full).unwrap();
        check(&encoded, PartKind::Full, true);
    }
}

#[test]
fn bases_that_are_not_in_the_store_are_one_encoding() {
    let root = tempfile::tempdir().unwrap();
    let store = open_store(root.path());
    let [old, new] = two_published(&store, 10);
    let known = Have::Sha256(old.sha256);
    let claims = [&b"a"[..], b"b", b"c"].map(|claim| Have::Sha256(Digest::of(claim)));
    let whole = store.pair(&Have::Nothing, &new, false);
    for have in claims.iter().chain([&Have::Search]) {
        assert_eq!(store.pair(have, &new, false), whole);
    }
    assert_eq!(store.pair(&known, &new, true), whole);
    assert_ne!(store.pair(&known, &new, false), whole);
}

#[test]
fn what_does_not_compress_travels_as_it_is() {
    let root = tempfile::tempdir().unwrap();
    let store = open_store(root.path());
    for content in [&noise(1000)[..], b"", b"short"] {
        let file = import(&store, content);
        let encoded = encode(&store, &Have::Nothing, &file, false).unwrap();
        check(&encoded, PartKind::Full, false);
        assert_eq!(fs::read(encoded.path).unwrap(), content);
    }
}

#[test]
fn a_delta_that_is_not_smaller_than_the_file_is_not_sent() {
    let root = tempfile::tempdir().unwrap();
    let store = open_store(root.path());
    let old = import(&store, b"nothing in common");
    let new = import(&store, &noise(1000));
    publish(&store, &[&old]);
    publish(&store, &[&new]);
    let encoded = encode(&store, &Have::Sha256(old.sha256), &new, false).unwrap();
    check(&encoded, PartKind::Full, false);
    assert_eq!(fs::read_dir(root.path().join("deltas")).unwrap().count(), 0);
}

#[test]
fn no_delta_is_tried_between_compressed_containers() {
    let root = tempfile::tempdir().unwrap();
    let store = open_store(root.path());
    let compressed = |version| {
        let mut bytes = format!("{:512}", format!("ClamAV-VDB:{version}")).into_bytes();
        bytes.push(0x1f);
        bytes.extend(signatures(5000, 0));
        bytes
    };
    let [old, new] = [1, 2].map(|version| import(&store, &compressed(version)));
    publish(&store, &[&old]);
    publish(&store, &[&new]);
    let encoded = encode(&store, &Have::Sha256(old.sha256), &new, false).unwrap();
    check(&encoded, PartKind::Full, true);
}

#[test]
fn a_delta_is_made_once_for_many_who_ask_at_the_same_time() {
    let root = tempfile::tempdir().unwrap();
    let store = open_store(root.path());
    let [old, new] = two_published(&store, 50_000);
    let have = Have::Sha256(old.sha256);
    let all = Barrier::new(16);
    let inodes: HashSet<u64> = thread::scope(|scope| {
        let ask = || {
            all.wait();
            let encoded = encode(&store, &have, &new, false).unwrap();
            check(&encoded, PartKind::Delta, false);
            // Whoever made it again would have renamed another file over it.
            std::os::unix::fs::MetadataExt::ino(&fs::metadata(encoded.path).unwrap())
        };
        let askers: Vec<_> = (0..16).map(|_| scope.spawn(ask)).collect();
        let asked = askers.into_iter().map(|asker| asker.join().unwrap());
        asked.collect()
    });
    assert_eq!(inodes.len(), 1);
    assert_eq!(store.made(), 1);
}

#[test]
fn encodings_outlive_a_restart_and_are_made_again_when_they_are_gone() {
    let root = tempfile::tempdir().unwrap();
    let store = open_store(root.path());
    let [old, new] = two_published(&store, 5000);
    let have = Have::Sha256(old.sha256);
    let first = encode(&store, &have, &new, false).unwrap();
    drop(store);
    let store = open_store(root.path());
    let second = encode(&store, &have, &new, false).unwrap();
    assert_eq!((first.encoding, store.made()), (second.encoding, 0));
    fs::remove_file(&second.path).unwrap();
    let third = encode(&store, &have, &new, false).unwrap();
    check(&third, PartKind::Delta, false);
    assert_eq!(store.made(), 1);
}

/// Flips one byte in the middle of a file, as a disk may.
fn flip_byte(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_damaged_or_missing_object_is_captured_again_from_the_mirror() {
    let root = tempfile::tempdir().unwrap();
    let store = open_store(root.path());
    let [old, new] = two_published(&store, 5000);
    fs::write(root.path().join("mirror/daily.cud"), signatures(5000, 2)).unwrap();
    let path = store.object(&new.sha256);
    for damage in [flip_byte, |path: &Path| fs::remove_file(path).unwrap()] {
        damage(&path);
        for have in [Have::Sha256(old.sha256), Have::Nothing] {
            encode(&store, &have, &new, false).unwrap();
        }
        store.open_object(&new.sha256).unwrap();
        assert_eq!(fs::read(&path).unwrap(), signatures(5000, 2));
        let [alarm] = &store.alarms.all(Timestamp::now())[..] else {
            panic!("an operator should look at the disk");
        };
        assert!(alarm.text.contains("captured again"), "{}", alarm.text);
    }
}

#[test]
fn a_damaged_object_that_the_mirror_lacks_is_an_alarm_until_it_is_back() {
    let root = tempfile::tempdir().unwrap();
    let store = open_store(root.path());
    let [old, new] = two_published(&store, 5000);
    flip_byte(&store.object(&new.sha256));
    for have in [Have::Sha256(old.sha256), Have::Nothing] {
        let error = encode(&store, &have, &new, false).unwrap_err();
        assert!(chain(&error).contains("damaged in the store"), "{error}");
    }
    let alarms = store.alarms.all(Timestamp::now());
    assert_eq!(alarms.len(), 1);
    let text = &alarms[0].text;
    assert!(
        text.contains("daily.cud") && text.contains("hosts cannot get it"),
        "{text}"
    );
    import(&store, &signatures(5000, 2));
    assert!(store.alarms.all(Timestamp::now()).is_empty());
    encode(&store, &Have::Nothing, &new, false).unwrap();
}

#[test]
fn a_damaged_old_object_costs_the_delta_and_nothing_else() {
    let root = tempfile::tempdir().unwrap();
    let store = open_store(root.path());
    let [old, new] = two_published(&store, 5000);
    flip_byte(&store.object(&old.sha256));
    let encoded = encode(&store, &Have::Sha256(old.sha256), &new, false).unwrap();
    check(&encoded, PartKind::Full, true);
}

#[test]
fn a_damaged_encoding_is_made_again() {
    let root = tempfile::tempdir().unwrap();
    let mut store = open_store(root.path());
    let [old, new] = two_published(&store, 5000);
    for have in [Have::Sha256(old.sha256), Have::Nothing] {
        for restart in [false, true] {
            let first = encode(&store, &have, &new, false).unwrap();
            let content = fs::read(&first.path).unwrap();
            flip_byte(&first.path);
            if restart {
                drop(store);
                store = open_store(root.path());
            }
            let again = encode(&store, &have, &new, false).unwrap();
            assert_eq!(
                fs::read(&again.path).unwrap(),
                content,
                "{have:?} {restart}"
            );
            assert_eq!(store.alarms.all(Timestamp::now()).len(), 1);
            store.alarms.end(ALARM, &first.path.display().to_string());
        }
    }
}

#[test]
fn deltas_are_made_only_between_files_of_one_base_name() {
    let root = tempfile::tempdir().unwrap();
    let store = open_store(root.path());
    let daily = import(&store, &signatures(5000, 1));
    let mut main = import(&store, &signatures(5000, 2));
    main.name = "main.cud".parse().unwrap();
    publish(&store, &[&daily, &main]);
    let mut other_form = import(&store, &signatures(5000, 3));
    other_form.name = "daily.cld".parse().unwrap();
    publish(&store, &[&other_form, &main]);
    let have = Have::Sha256(daily.sha256);
    assert_eq!(
        store.pair(&have, &main, false),
        store.pair(&Have::Nothing, &main, false)
    );
    let delta = encode(&store, &have, &other_form, false).unwrap();
    check(&delta, PartKind::Delta, false);
}

#[test]
fn an_object_that_is_not_there_is_named() {
    let root = tempfile::tempdir().unwrap();
    let store = open_store(root.path());
    let mut file = import(&store, b"x");
    file.sha256 = Digest::of(b"gone");
    let error = encode(&store, &Have::Nothing, &file, false).unwrap_err();
    assert!(chain(&error).contains("is missing in the store"), "{error}");
}

#[test]
fn a_damaged_record_is_kept_once_when_another_takes_its_place() {
    let root = tempfile::tempdir().unwrap();
    let store = open_store(root.path());
    let path = root.path().join("rollout.json");
    for damaged in ["{", "[[["] {
        fs::write(&path, damaged).unwrap();
        for _again in 0..2 {
            let kept = store.keep_damaged("rollout.json").unwrap();
            assert_eq!(kept, root.path().join("rollout.json.damaged"));
            assert_eq!(fs::read_to_string(&path).unwrap(), damaged);
        }
        store.save("rollout.json", &"mended").unwrap();
        let kept = fs::read_to_string(root.path().join("rollout.json.damaged"));
        assert_eq!(kept.unwrap(), damaged);
    }
    assert!(store.keep_damaged("gone.json").is_err());
}

#[test]
fn a_manifest_is_named_by_its_digest_and_the_newest_are_known_first() {
    let root = tempfile::tempdir().unwrap();
    let store = open_store(root.path());
    two_published(&store, 10);
    let manifests = store.manifests();
    let digests = [&manifests[1], &manifests[0]].map(|it| it.payload_sha256());
    assert_eq!(store.known(usize::MAX), digests);
    assert_eq!(store.known(1), digests[..1]);
    let named = store.named(&digests[0]).unwrap();
    assert_eq!(named.position(), manifests[1].position());
    assert!(store.named(&Digest::of(b"another")).is_none());
    assert!(store.has(manifests[0].envelope()));
    let mut other = manifests[0].envelope().clone();
    other.payload.push(b' ');
    assert!(!store.has(&other));
}

#[test]
fn a_compressed_manifest_is_read_again_at_a_start() {
    let root = tempfile::tempdir().unwrap();
    let store = open_store(root.path());
    let file = import(&store, b"x");
    let files: Vec<_> = (0..6_000)
        .map(|number| ManifestFile {
            name: format!("feed-{number:04}-of-a-list-with-a-long-name.ndb")
                .parse()
                .unwrap(),
            sha256: Digest::of(&u32::to_be_bytes(number)),
            ..file.clone()
        })
        .collect();
    publish(&store, &files.iter().collect::<Vec<_>>());
    let kept = store.manifests();
    assert_eq!(Manifest::form_of(kept[0].envelope()), Form::Compressed);
    drop(store);
    let again = open_store(root.path()).manifests();
    assert_eq!(again[0].payload_sha256(), kept[0].payload_sha256());
    assert_eq!(again[0].files, files);
}
