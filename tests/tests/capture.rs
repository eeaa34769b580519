//! Captures under fire: whatever happens to the mirror meanwhile, a captured set stood there at one
//! moment.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clamcast_daemon::alarms::Alarms;
use clamcast_master::publish::capture::{Capture, CaptureError, capture};
use clamcast_master::publish::mirror::activity::Activity;
use clamcast_master::store::Store;
use clamcast_proto::dsse::{PublicKey, sign};
use clamcast_proto::keys::KeySet;
use clamcast_proto::{Digest, Epoch};
use clamcast_tests::lab::{Container, Mount, Scratch, signatures};
use clamcast_tests::require;
use ed25519_dalek::SigningKey;
use jiff::Timestamp;
use rand::Rng as _;

/// The official databases, in the order in which the writers of these tests replace them.
const OFFICIAL: [&str; 3] = ["main", "daily", "bytecode"];

/// A mirror and the store of a master, in directories of their own.
struct Lab {
    mirror: PathBuf,
    store: Store,
    activity: Activity,
    _disk: Option<Mount>,
    _scratch: Scratch,
}

impl Lab {
    fn new() -> Self {
        Self::on(|_| None)
    }

    /// One on the disk that `mount` mounts.
    fn on(mount: impl FnOnce(&Path) -> Option<Mount>) -> Self {
        let scratch = Scratch::new();
        let disk = mount(&scratch.directory("disk"));
        let mirror = scratch.directory("disk/mirror");
        Self {
            store: store(&scratch.join("disk/state"), &mirror),
            mirror,
            activity: Activity::default(),
            _disk: disk,
            _scratch: scratch,
        }
    }

    /// Captures as the master does; `None` if the mirror did not rest.
    fn capture(&self) -> Option<Capture> {
        match capture(&self.mirror, &self.store, &self.activity) {
            Ok(capture) => Some(capture),
            Err(CaptureError::Changing | CaptureError::RunOpen { .. }) => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn content(&self, digest: &Digest) -> Vec<u8> {
        fs::read(self.store.object(digest)).unwrap()
    }
}

fn store(state: &Path, mirror: &Path) -> Store {
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
    Store::open(state, mirror, &sign(set, &key), Alarms::default()).unwrap()
}

/// Runs `write` again and again while `look` captures, and returns how many captures succeeded.
fn under_fire(
    lasting: Duration,
    write: impl Fn(u64) + Sync,
    look: impl Fn() -> bool + Sync,
) -> (u32, u32) {
    /// Ends the writer, also when an assertion fails.
    struct Over<'a>(&'a AtomicBool);

    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for version in 2.. {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                write(version);
            }
        });
        let _over = Over(&over);
        let deadline = Instant::now() + lasting;
        let (mut captures, mut tries) = (0, 0);
        while Instant::now() < deadline {
            tries += 1;
            captures += u32::from(look());
        }
        (captures, tries)
    })
}

/// Blocks of a file that is written in place. Each has the version that it belongs to.
const BLOCK: usize = 4096;
const BLOCKS: u64 = 64;
const LOOSE: [&str; 2] = ["a.hdb", "b.hdb"];

fn block(version: u64) -> [u8; BLOCK] {
    let mut block = [b'\n'; BLOCK];
    block[..8].copy_from_slice(&version.to_be_bytes());
    block
}

/// The versions of a file's blocks.
fn versions(content: &[u8]) -> impl Iterator<Item = u64> {
    content
        .chunks(BLOCK)
        .map(|block| u64::from_be_bytes(block[..8].try_into().unwrap()))
}

/// Rewrites both files from their beginning to their end, while captures are made. At any moment,
/// what is in the files begins with blocks of one version and goes on with those of the one before.
fn rewrite_in_place(lab: &Lab, lasting: Duration) {
    let files = LOOSE.map(|name| File::create(lab.mirror.join(name)).unwrap());
    let write = |version| {
        for file in &files {
            for number in 0..BLOCKS {
                file.write_all_at(&block(version), number * BLOCK as u64)
                    .unwrap();
            }
        }
    };
    write(1);
    let write = |version| {
        write(version);
        // Most changes come in pairs within a tick of the kernel's clock.
        let mut random = rand::rng();
        thread::sleep(match version % 16 {
            0 => Duration::from_millis(150),
            2 | 4 | 6 | 8 | 10 | 12 | 14 => Duration::from_millis(random.random_range(5..20)),
            _ => Duration::from_micros(random.random_range(0..1000)),
        });
    };
    let look = || {
        let Some(capture) = lab.capture() else {
            return false;
        };
        let content: Vec<u8> = capture
            .files
            .iter()
            .flat_map(|file| lab.content(&file.sha256))
            .collect();
        let found: Vec<u64> = versions(&content).collect();
        assert_eq!(found.len() as u64, BLOCKS * LOOSE.len() as u64);
        let new = found[0];
        let count = found.iter().take_while(|it| **it == new).count();
        let is_a_state = found[count..].iter().all(|it| it + 1 == new);
        assert!(is_a_state, "this was never on disk: {found:?}");
        true
    };
    let (captures, tries) = under_fire(lasting, write, look);
    println!("{captures} captures in {tries} tries");
    assert!(captures > 20, "only {captures} captures in {tries} tries");
}

#[test]
fn files_that_are_rewritten_in_place_are_captured_as_they_were_at_one_moment() {
    rewrite_in_place(&Lab::new(), Duration::from_secs(6));
}

#[test]
fn two_writes_within_one_tick_of_the_clock_of_the_file_system_are_noticed() {
    require!(Root);
    // Also the store: Linux 6.13 and later make a tick of the time stamp of any file that was looked
    // at, on other disks, too.
    let lab = Lab::on(|disk| Some(Mount::of_coarse_times(disk)));
    rewrite_in_place(&lab, Duration::from_secs(6));
}

#[test]
fn official_sets_that_are_renamed_into_place_are_captured_as_they_were_at_one_moment() {
    let (captures, tries) = thread::scope(|scope| {
        let pairs: Vec<_> = (0..8).map(|_| scope.spawn(rename_into_place)).collect();
        let counts = pairs.into_iter().map(|pair| pair.join().unwrap());
        counts.fold((0, 0), |sum, it| (sum.0 + it.0, sum.1 + it.1))
    });
    println!("{captures} captures in {tries} tries");
    assert!(captures > 1000, "only {captures} captures in {tries} tries");
    assert!(captures < tries, "no capture met a change");
}

/// Replaces one database after the other as freshclam does, now by a `.cld` and now by a `.cvd`,
/// while captures are made.
fn rename_into_place() -> (u32, u32) {
    let lab = Lab::new();
    let part = lab.mirror.with_extension("part");
    let known: Mutex<HashMap<Digest, u64>> = Mutex::default();
    let put = |version: u64, base: &str| {
        let container = Container::new(base, version).member("hsb", signatures(0..version % 50));
        let content = container.bytes();
        known.lock().unwrap().insert(Digest::of(&content), version);
        fs::write(&part, content).unwrap();
        let [new, old] = match version % 4 {
            0 | 1 => ["cvd", "cld"],
            _ => ["cld", "cvd"],
        };
        fs::rename(&part, lab.mirror.join(format!("{base}.{new}"))).unwrap();
        if version.is_multiple_of(2) {
            fs::remove_file(lab.mirror.join(format!("{base}.{old}"))).unwrap();
        }
    };
    for base in OFFICIAL {
        put(1, base);
    }
    let pause = |max| {
        let pause = rand::rng().random_range(0..max);
        thread::sleep(Duration::from_millis(pause));
    };
    let write = |version| {
        for base in OFFICIAL {
            put(version, base);
            pause(3);
        }
        pause(100);
    };
    let look = || {
        let Some(capture) = lab.capture() else {
            return false;
        };
        let known = known.lock().unwrap();
        let found = OFFICIAL.map(|base| {
            let mut files = capture.files.iter().filter(|it| it.name.base() == base);
            let file = files.next().expect("it was there all the time");
            assert_eq!(files.next(), None, "one form of it");
            known[&file.sha256]
        });
        let [first, .., last] = found;
        let is_a_state = found.is_sorted_by(|a, b| a >= b) && first - last <= 1;
        assert!(is_a_state, "this was never on disk: {found:?}");
        true
    };
    under_fire(Duration::from_secs(10), write, look)
}
