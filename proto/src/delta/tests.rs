use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::Command;

use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};

use super::apply::Operations;
use super::*;

fn object(bytes: &[u8]) -> Object {
    Object {
        digest: Digest::of(bytes),
        size: bytes.len() as u64,
    }
}

fn delta(old: &[u8], new: &[u8]) -> Vec<u8> {
    let input = |bytes| Input {
        digest: Digest::of(bytes),
        bytes,
    };
    let mut out = Vec::new();
    make(input(old), input(new), &mut out).expect("a vector takes everything");
    out
}

fn apply(old: &[u8], new: Object, delta: impl Read) -> Result<Vec<u8>, ApplyError> {
    let mut out = Vec::new();
    let read_old = |buffer: &mut [u8], offset: u64| {
        buffer.copy_from_slice(&old[offset as usize..][..buffer.len()]);
        Ok(())
    };
    Delta::open(delta, object(old), new)?.apply(read_old, &mut out)?;
    Ok(out)
}

/// The same delta as librsync has it, with the widest form of every command.
fn librsync(delta: &[u8], new: &[u8]) -> Vec<u8> {
    let header = Header::read(&mut &delta[..]).unwrap().unwrap();
    let frame = &delta[Header::BYTES..][..header.operations_frame_bytes as usize];
    let operations = zstd::bulk::decompress(frame, header.operations_bytes as usize).unwrap();
    let mut operations = Operations::new(&operations, &header);
    let (mut bytes, mut made) = (b"rs\x026".to_vec(), 0);
    while let Some(operation) = operations.next().unwrap() {
        if operation.insert > 0 {
            bytes.push(0x44);
            bytes.extend(operation.insert.to_be_bytes());
            bytes.extend(&new[made..][..operation.insert as usize]);
        }
        let copied = operation.copy.end - operation.copy.start;
        if copied > 0 {
            bytes.push(0x54);
            bytes.extend(operation.copy.start.to_be_bytes());
            bytes.extend(copied.to_be_bytes());
        }
        made += (operation.insert + copied) as usize;
    }
    bytes.push(0);
    bytes
}

/// Makes the delta and applies it with our applier and with another one; gives what it inserts.
fn check(old: &[u8], new: &[u8]) -> u64 {
    let delta = delta(old, new);
    assert!(apply(old, object(new), &delta[..]).expect("our own delta is sound") == new);

    let mut out = Vec::new();
    fast_rsync::apply_limited(old, &librsync(&delta, new), &mut out, new.len()).unwrap();
    assert!(out == new, "fast_rsync makes something else from the delta");
    Header::read(&mut &delta[..])
        .unwrap()
        .unwrap()
        .inserted_bytes
}

/// Old and new bytes of one kind or another: text, noise, runs, with edits and moved parts.
fn case(seed: u64) -> (Vec<u8>, Vec<u8>) {
    let rng = &mut StdRng::seed_from_u64(seed);
    let size = [0, 1, 100, 256, 257, 3_000, 40_000][rng.random_range(0..7)];
    let kind = rng.random_range(0..4);
    let old = content(rng, kind, size);
    let mut new = old.clone();
    for _ in 0..rng.random_range(0..12) {
        let at = rng.random_range(0..=new.len());
        let end = (at + rng.random_range(0..600)).min(new.len());
        let kind = rng.random_range(0..4);
        let fresh = rng.random_range(0..300);
        match rng.random_range(0..5) {
            0 => drop(new.splice(at..at, content(rng, kind, fresh))),
            1 => drop(new.drain(at..end)),
            2 => drop(new.splice(at..end, content(rng, kind, fresh))),
            3 => new.rotate_left(at),
            _ => new.extend_from_within(at..end),
        }
    }
    if rng.random_range(0..20) == 0 {
        (old, Vec::new())
    } else {
        (old, new)
    }
}

fn content(rng: &mut StdRng, kind: usize, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    rng.fill_bytes(&mut bytes);
    match kind {
        0 => bytes,
        1 => bytes.iter().map(|byte| b'a' + byte % 4).collect(),
        2 => vec![bytes.first().copied().unwrap_or(0); size],
        _ => {
            let line = |piece: &[u8]| format!("{}:Win.Trojan-{}\n", hex::encode(piece), piece[0]);
            bytes
                .chunks(20)
                .flat_map(|piece| line(piece).into_bytes())
                .take(size)
                .collect()
        }
    }
}

#[test]
fn a_delta_makes_the_new_object() {
    for seed in 0..4_000 {
        let (old, new) = case(seed);
        eprintln!("seed {seed}: {} bytes to {}", old.len(), new.len());
        check(&old, &new);
    }
}

#[test]
fn rdiff_makes_the_same_from_it() {
    if Command::new("rdiff").arg("--version").output().is_err() {
        eprintln!("skipped: there is no rdiff here");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name| dir.path().join(name);
    for seed in 0..100 {
        let (old, new) = case(seed);
        std::fs::write(path("old"), &old).unwrap();
        std::fs::write(path("delta"), librsync(&delta(&old, &new), &new)).unwrap();
        let status = Command::new("rdiff")
            .args(["--force", "patch"])
            .args(["old", "delta", "new"].map(path))
            .status();
        assert!(status.unwrap().success(), "seed {seed}");
        assert!(std::fs::read(path("new")).unwrap() == new, "seed {seed}");
    }
}

#[test]
fn only_what_changed_is_inserted() {
    let rng = &mut StdRng::seed_from_u64(1);
    let old = content(rng, 3, 100_000);
    let edited = |edit: &dyn Fn(&mut Vec<u8>)| {
        let mut new = old.clone();
        edit(&mut new);
        check(&old, &new)
    };
    assert_eq!(edited(&|_| {}), 0);
    assert_eq!(edited(&|new| new[50_000] ^= 1), 1);
    assert_eq!(edited(&|new| new.extend(b"added at the end")), 16);
    assert_eq!(edited(&|new| drop(new.splice(700..700, *b"\0\0\0"))), 3);
    assert_eq!(edited(&|new| drop(new.drain(30_001..30_777))), 0);
    assert_eq!(edited(&|new| new.rotate_left(51_234)), 0);
}

#[test]
fn objects_shorter_than_a_block_share_their_ends() {
    assert_eq!(check(b"", b""), 0);
    assert_eq!(check(b"one line\n", b"one line\n"), 0);
    assert_eq!(check(b"one line\n", b"one more line\n"), 3);
    assert_eq!(check(b"one line\n", b""), 0);
    assert_eq!(check(b"", b"one line\n"), 9);
}

#[test]
fn what_is_new_may_be_larger_than_the_window() {
    let rng = &mut StdRng::seed_from_u64(2);
    assert_eq!(check(b"", &content(rng, 3, 3 << 20)), 3 << 20);
    assert_eq!(check(b"old", &content(rng, 0, 17 << 20)), 17 << 20);
}

#[test]
fn a_day_takes_less_than_its_own_lines() {
    let script = std::env::var_os("CLAMCAST_CORPUS").map_or_else(
        || {
            PathBuf::from(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../../shared/corpus/make_corpus.py"
            ))
        },
        PathBuf::from,
    );
    if !script.exists() || Command::new("python3").arg("--version").output().is_err() {
        eprintln!("skipped: needs python3 and the corpus script, which CLAMCAST_CORPUS names");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let made = Command::new("python3")
        .args([script.as_os_str(), dir.path().as_os_str()])
        .args([
            "--scale", "0.05", "--steps", "2", "--main", "0", "--ext", "cud",
        ])
        .output();
    assert!(made.unwrap().status.success());
    let read = |name| std::fs::read(dir.path().join(name)).unwrap();

    let steps = String::from_utf8(read("steps.tsv")).unwrap();
    let day = steps
        .lines()
        .next_back()
        .unwrap()
        .split('\t')
        .collect::<Vec<_>>();
    let [added, change] = [day[4], day[6]].map(|number| number.parse::<u64>().unwrap());
    let (old, new) = (read("0001/daily.cud"), read("0002/daily.cud"));
    let inserted = check(&old, &new);
    // Beside the added lines there are the headers, a digest for every member, and here and there a
    // line between two deleted ones that is shorter than a block.
    assert!(
        inserted * 100 <= added * 105,
        "{inserted} bytes inserted for {added} that were added"
    );
    let bytes = delta(&old, &new).len() as u64;
    assert!(
        bytes * 100 <= change * 75,
        "{bytes} bytes for a change of {change}"
    );
}

#[test]
fn too_many_operations_are_refused() {
    let (old, new) = (vec![0; 256], vec![0; 110 << 20]); // every block is a copy of the same one
    let input = |bytes| Input {
        digest: object(b"").digest,
        bytes,
    };
    let mut out = Vec::new();
    let made = make(input(&old), input(&new), &mut out);
    assert!(matches!(made, Err(MakeError::TooManyOperations { .. })));
    assert!(out.is_empty());
}

#[test]
fn a_delta_may_arrive_byte_by_byte() {
    struct Trickle<'a>(&'a [u8], bool);
    impl Read for Trickle<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                Err(io::ErrorKind::Interrupted.into())
            } else {
                (&mut self.0).take(1).read(buffer)
            }
        }
    }
    let (old, new) = sample();
    let delta = delta(&old, &new);
    assert!(apply(&old, object(&new), Trickle(&delta, false)).unwrap() == new);
}

fn sample() -> (Vec<u8>, Vec<u8>) {
    let rng = &mut StdRng::seed_from_u64(3);
    let old = content(rng, 3, 2_000);
    let new = [
        &old[1_000..],
        b"; something new in the middle; ",
        &old[..900],
        b"\n",
    ]
    .concat();
    (old, new)
}

#[test]
fn a_delta_cut_anywhere_is_refused() {
    let (old, new) = sample();
    let delta = delta(&old, &new);
    for end in 0..delta.len() {
        let result = apply(&old, object(&new), &delta[..end]);
        assert!(
            matches!(result, Err(ApplyError::Receive { .. })),
            "cut at {end}: {result:?}"
        );
    }
}

#[test]
fn a_flipped_bit_never_makes_something_else() {
    let (old, new) = sample();
    let delta = delta(&old, &new);
    for bit in 0..delta.len() * 8 {
        let mut flipped = delta.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        if let Ok(made) = apply(&old, object(&new), &flipped[..]) {
            assert!(made == new, "bit {bit}");
        }
    }
}

#[test]
fn another_base_or_target_is_refused_before_any_work() {
    let (old, new) = sample();
    let delta = delta(&old, &new);
    let head = &delta[..Header::BYTES]; // nothing behind it is looked at
    let other = object(b"other");
    let refused = |old, new| Delta::open(head, old, new).err().unwrap();
    assert!(matches!(
        refused(other, object(&new)),
        ApplyError::WrongBase { .. }
    ));
    assert!(matches!(
        refused(object(&old), other),
        ApplyError::WrongTarget { .. }
    ));
    let mut version = delta.clone();
    version[7] += 1;
    let unknown = apply(&old, object(&new), &version[..]);
    assert!(matches!(unknown, Err(ApplyError::Unknown { .. })));
}

#[test]
fn a_base_that_changed_is_noticed_at_the_end() {
    let (old, new) = sample();
    let delta = delta(&old, &new);
    let opened = Delta::open(&delta[..], object(&old), object(&new)).unwrap();
    let mut out = Vec::new();
    let other = |buffer: &mut [u8], _| io::repeat(b'x').read_exact(buffer);
    assert!(matches!(
        opened.apply(other, &mut out),
        Err(ApplyError::WrongResult { .. })
    ));
}

#[test]
fn trouble_of_the_host_is_told_from_a_bad_delta() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (old, new) = sample();
    let delta = delta(&old, &new);
    let open = || Delta::open(&delta[..], object(&old), object(&new)).unwrap();
    let zeros = |_: &mut [u8], _| Ok(());
    assert!(matches!(
        open().apply(zeros, Full),
        Err(ApplyError::Write { .. })
    ));
    let broken = |_: &mut [u8], _| Err(io::ErrorKind::UnexpectedEof.into());
    assert!(matches!(
        open().apply(broken, io::sink()),
        Err(ApplyError::ReadOld { .. })
    ));
}

/// A delta as an attacker would write it, from a base of 100 bytes to a new object of 50.
struct Forged {
    operations: Vec<u8>,
    operations_bytes: u32,
    inserts: Vec<u8>,
    inserted_bytes: u64,
}

impl Forged {
    const OLD: [u8; 100] = [b'o'; 100];

    /// Sound but for what the operations say, with 10 inserted bytes.
    fn new(operations: &[u8]) -> Self {
        Self {
            operations: zstd::encode_all(operations, 1).unwrap(),
            operations_bytes: operations.len() as u32,
            inserts: zstd::encode_all(&[b'i'; 10][..], 1).unwrap(),
            inserted_bytes: 10,
        }
    }

    fn refusal(self) -> String {
        let new = Object {
            digest: Digest::of(b"new"),
            size: 50,
        };
        let header = Header {
            old: object(&Self::OLD),
            new,
            inserted_bytes: self.inserted_bytes,
            operations_bytes: self.operations_bytes,
            operations_frame_bytes: self.operations.len() as u32,
        };
        let delta = [header.to_bytes(), self.operations, self.inserts].concat();
        apply(&Self::OLD, new, &delta[..])
            .expect_err("nothing has this digest")
            .to_string()
    }
}

#[test]
fn operations_stay_within_both_objects() {
    fn check(operations: &[u8], refusal: &str) {
        assert!(
            Forged::new(operations).refusal().contains(refusal),
            "{operations:?}: {refusal}"
        );
    }
    check(&[10, 40, 0], "the delta made"); // in order, but for the digest
    check(&[0, 40, 120, 10, 0], "the delta made"); // up to the last byte of the base
    check(&[0, 40, 122, 10, 0], "copies from beyond the base");
    check(&[0, 20, 0, 10, 20, 41], "copies from before the base");
    check(&[10, 41, 0], "make more than the new file");
    check(&[10, 39, 0], "make less than the new file");
    check(&[0, 50, 0], "leave inserted bytes over");
    check(&[11, 39, 0], "insert more than there is");
    check(&[0, 0, 10, 40, 0], "makes nothing");
    check(&[10, 40], "end within one");
    check(&[], "make less than the new file");
    let most = [255, 255, 255, 255, 255, 255, 255, 255, 255, 1]; // 2^64 - 1
    check(
        &[&[0, 40], &most[..]].concat(),
        "copies from before the base",
    );
    check(
        &[&[0, 40, 254], &most[1..]].concat(),
        "copies from beyond the base",
    );
    check(
        &[&[10], &most[..], &[0]].concat(),
        "make more than the new file",
    );
    check(&[&most[..], &[40, 0]].concat(), "insert more than there is");
    check(&[255; 11], "more than 64 bits");
    check(
        &[255, 255, 255, 255, 255, 255, 255, 255, 255, 2],
        "more than 64 bits",
    );
}

#[test]
fn lengths_are_exact_and_bounded() {
    let sound = || Forged::new(&[10, 40, 0]);
    let check = |forged: Forged, refusal: &str| {
        let found = forged.refusal();
        assert!(found.contains(refusal), "{found}, expected: {refusal}");
    };
    check(
        Forged {
            operations_bytes: u32::MAX,
            ..sound()
        },
        "larger than the limit",
    );
    check(
        Forged {
            operations_bytes: 4,
            ..sound()
        },
        "shorter than its header says",
    );
    check(
        Forged {
            operations_bytes: 2,
            ..sound()
        },
        "cannot inflate its operations",
    );
    check(
        Forged {
            operations: vec![0; 10],
            ..sound()
        },
        "cannot inflate its operations",
    );
    check(
        Forged {
            operations: vec![0; 1 << 20],
            ..sound()
        },
        "larger than the limit",
    );
    check(
        Forged {
            inserted_bytes: 51,
            ..sound()
        },
        "more than the whole new file",
    );
    check(
        Forged {
            inserted_bytes: u64::MAX,
            ..sound()
        },
        "more than the whole new file",
    );
    let mut fewer = Forged::new(&[11, 39, 0]);
    fewer.inserted_bytes = 11;
    check(fewer, "fewer inserted bytes");
    let mut more = Forged::new(&[9, 41, 0]);
    more.inserted_bytes = 9;
    check(more, "more inserted bytes");
    check(
        Forged {
            inserts: vec![b'i'; 10],
            ..sound()
        },
        "cannot inflate its inserted bytes",
    );
}

#[test]
fn nothing_follows_a_delta() {
    for behind in [&b"x"[..], &zstd::encode_all(&b"more"[..], 1).unwrap()] {
        let mut forged = Forged::new(&[10, 40, 0]);
        forged.inserts.extend(behind);
        assert!(forged.refusal().contains("something follows it"));

        let mut forged = Forged::new(&[10, 40, 0]);
        forged.operations.extend(behind);
        forged.refusal();
    }
}

#[test]
fn a_bomb_is_refused_where_it_exceeds_what_was_declared() {
    let bomb = zstd::encode_all(&vec![0; 64 << 20][..], 19).unwrap();
    let operations = Forged {
        operations: bomb[..60].to_vec(),
        ..Forged::new(&[10, 40, 0])
    };
    assert!(
        operations
            .refusal()
            .contains("cannot inflate its operations")
    );

    let inserts = Forged {
        inserts: bomb,
        ..Forged::new(&[10, 40, 0])
    };
    assert!(
        inserts
            .refusal()
            .contains("cannot inflate its inserted bytes")
    ); // its window

    let mut narrow = zstd::Encoder::new(Vec::new(), 19).unwrap();
    narrow.window_log(WINDOW_LOG_MAX).unwrap();
    io::copy(&mut io::repeat(0).take(64 << 20), &mut narrow).unwrap();
    let inserts = Forged {
        inserts: narrow.finish().unwrap(),
        ..Forged::new(&[10, 40, 0])
    };
    assert!(inserts.refusal().contains("more inserted bytes"));
}

#[test]
fn a_frame_of_empty_blocks_does_not_go_on_for_ever() {
    let mut forged = Forged::new(&[10, 40, 0]);
    forged.inserts = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 0]; // magic number, no size, window of 1 KiB
    forged.inserts.extend([0; 3 << 12]); // raw blocks of no bytes, none of them the last
    assert!(
        forged
            .refusal()
            .contains("compressed to more than they are")
    );
}
