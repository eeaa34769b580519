//! Captures under fire: whatever happens to the mirror meanwhile, a captured set stood there at one
//! moment.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use clamcast_daemon::alarms::Alarms;
use clamcast_master::config::units::{UnitName, Units};
use clamcast_master::publish::capture::{Captured, Fault, Source, capture};
use clamcast_master::publish::mirror::activity::Activity;
use clamcast_master::publish::mirror::listing::Listing;
use clamcast_master::publish::mirror::quiet::{ABANDONED_AFTER, Reason};
use clamcast_master::store::Store;
use clamcast_proto::dsse::{PublicKey, sign};
use clamcast_proto::keys::KeySet;
use clamcast_proto::{Digest, Epoch};
use clamcast_tests::lab::{
    Container, Fleet, Master, Mirror, Mount, NameServer, PATIENCE, Part, Scratch, Strace,
    certificates_in, pace, signatures, target, until,
};
use clamcast_tests::{long, require};
use ed25519_dalek::SigningKey;
use jiff::{SignedDuration, Timestamp};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::Rng as _;
use serde_json::{Value, json};

/// The official databases, in the order in which the writers of these tests replace them.
const OFFICIAL: [&str; 3] = ["main", "daily", "bytecode"];

/// So few captures say nothing.
const CAPTURES_MIN: u32 = 20;

/// A mirror and the store of a master, in directories of their own.
struct Lab {
    mirror: PathBuf,
    store: Store,
    activity: Activity,
    /// The two loose files of these tests are one unit.
    units: Units,
    _disk: Option<Mount>,
    _scratch: Scratch,
}

impl Lab {
    fn new() -> Self {
        Self::on(Scratch::new(), |_| None)
    }

    /// One on the disk that `mount` mounts.
    fn on(scratch: Scratch, mount: impl FnOnce(&Path) -> Option<Mount>) -> Self {
        let disk = mount(&scratch.directory("disk"));
        let mirror = scratch.directory("disk/mirror");
        Self {
            store: store(&scratch.join("disk/state"), &mirror),
            mirror,
            activity: Activity::default(),
            units: {
                let files = LOOSE.map(|name| name.parse().unwrap());
                Units::joining([("loose".to_owned(), files.to_vec())]).unwrap()
            },
            _disk: disk,
            _scratch: scratch,
        }
    }

    /// Captures as the master does; `None` if a unit of the mirror did not rest.
    fn capture(&self) -> Option<Vec<Captured>> {
        let units = self.capture_units(&self.mirror, &self.activity);
        let mut files = Vec::new();
        for (unit, captured) in units? {
            match captured {
                Ok(captured) => files.extend(captured),
                Err(Fault::Changing | Fault::Waiting(_)) => return None,
                Err(fault) => panic!("{unit}: {fault}"),
            }
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Some(files)
    }

    /// Captures a mirror unit by unit; `None` if names came and went all the time.
    fn capture_units(
        &self,
        mirror: &Path,
        activity: &Activity,
    ) -> Option<BTreeMap<UnitName, Result<Vec<Captured>, Fault>>> {
        let source = Source {
            path: mirror,
            units: &self.units,
            activity,
            waits_for: &|_, reason| matches!(reason, Reason::Run(_)),
        };
        let capture = capture(&source, &self.store).unwrap();
        capture.is_whole.then_some(capture.units)
    }

    /// The names and digests of a mirror at rest.
    fn files_of(&self, mirror: &Path, activity: &Activity) -> Vec<(String, Digest)> {
        let units = self.capture_units(mirror, activity).unwrap().into_values();
        let files = units.flat_map(Result::unwrap);
        let mut files: Vec<_> = files.map(|it| (it.name.to_string(), it.sha256)).collect();
        files.sort();
        files
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

/// A program that a test started, and that ends with it.
struct Started(Child);

impl Started {
    fn new(command: &mut Command) -> Self {
        Self(command.spawn().unwrap())
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill(); // it may have ended, and one that is stopped dies too
        let _ = self.0.wait();
    }
}

/// Runs `write` for one version after the other, as long as it returns true, while `look` captures: for
/// so long, and on a slow machine until more than [`CAPTURES_MIN`] succeeded. Returns how many captures
/// succeeded, and how many were tried.
fn under_fire(
    lasting: Duration,
    write: impl Fn(u64) -> bool + Sync,
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
                if over.load(Ordering::Relaxed) || !write(version) {
                    break;
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        let _over = Over(&over);
        let begun = Instant::now();
        let (mut captures, mut tries) = (0, 0);
        let goes_on = |captures| {
            let elapsed = begun.elapsed();
            elapsed < lasting || captures <= CAPTURES_MIN && elapsed < PATIENCE
        };
        while goes_on(captures) && !over.load(Ordering::Relaxed) {
            tries += 1;
            captures += u32::from(look());
        }
        (captures, tries)
    })
}

/// Up to so many milliseconds between two changes.
fn pause(max: u64) {
    pace(Duration::from_millis(rand::rng().random_range(0..max)));
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

/// A capture of files that are rewritten one after the other, from their beginning to their end: what
/// is in them begins with blocks of one version and goes on with those of the one before.
#[track_caller]
fn assert_was_rewritten(lab: &Lab, capture: &[Captured]) {
    let content: Vec<u8> = capture
        .iter()
        .flat_map(|file| lab.content(&file.sha256))
        .collect();
    let found: Vec<u64> = versions(&content).collect();
    assert_eq!(found.len() as u64, BLOCKS * LOOSE.len() as u64);
    let new = found[0];
    let count = found.iter().take_while(|it| **it == new).count();
    let is_a_state = found[count..].iter().all(|it| it + 1 == new);
    assert!(is_a_state, "this was never on disk: {found:?}");
}

/// Rewrites both files again and again while captures are made.
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
        pace(match version % 16 {
            0 => Duration::from_millis(150),
            2 | 4 | 6 | 8 | 10 | 12 | 14 => Duration::from_millis(random.random_range(5..20)),
            _ => Duration::from_micros(random.random_range(0..1000)),
        });
        true
    };
    let look = || {
        let Some(capture) = lab.capture() else {
            return false;
        };
        assert_was_rewritten(lab, &capture);
        true
    };
    let (captures, tries) = under_fire(lasting, write, look);
    println!("{captures} captures in {tries} tries");
    assert!(
        captures > CAPTURES_MIN,
        "only {captures} captures in {tries} tries"
    );
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
    let lab = Lab::on(Scratch::new(), |disk| Some(Mount::of_coarse_times(disk)));
    rewrite_in_place(&lab, Duration::from_secs(6));
}

/// Writes like [`rewrite_in_place`], but through mappings: the kernel sees the first store to a page,
/// and then no other one until the page is on disk.
const MAPPER: &str = r#"
import mmap, random, sys, time
opened = [open(path, "r+b") for path in sys.argv[2:]]
files = [mmap.mmap(file.fileno(), 0) for file in opened]
block = int(sys.argv[1])
version = 2
while True:
    for file in files:
        for at in range(0, len(file), block):
            file[at:at + 8] = version.to_bytes(8, "big")
    time.sleep(0.15 if version % 16 == 0 else random.random() / 1000)
    version += 1
"#;

#[test]
fn stores_through_a_mapping_are_noticed() {
    require!(Python);
    // The directory for temporary files may be in memory, where no such store shows.
    let lab = Lab::on(Scratch::below(&target()), |_| None);
    let paths = LOOSE.map(|name| lab.mirror.join(name));
    for path in &paths {
        fs::write(path, block(1).repeat(BLOCKS as usize)).unwrap();
    }
    let mut mapper = Command::new(Part::Python.path());
    mapper.args(["-c", MAPPER, &BLOCK.to_string()]).args(&paths);
    let mut mapper = Started::new(&mut mapper);
    until(PATIENCE, "it has written once", || {
        let content = fs::read(&paths[0]).unwrap();
        let version = versions(&content).next();
        if version > Some(1) {
            Ok(())
        } else {
            Err(version)
        }
    });
    let look = || match lab.capture() {
        Some(capture) => {
            assert_was_rewritten(&lab, &capture);
            true
        }
        None => false,
    };
    let write = |_| {
        pause(10);
        true
    };
    let (captures, tries) = under_fire(Duration::from_secs(5), write, look);
    assert!(
        mapper.0.try_wait().unwrap().is_none(),
        "it went on to the end"
    );
    println!("{captures} captures in {tries} tries");
    assert!(
        captures > CAPTURES_MIN,
        "only {captures} captures in {tries} tries"
    );
}

#[test]
fn official_sets_that_are_renamed_into_place_are_captured_as_they_were_at_one_moment() {
    rename_into_place_and_capture(Duration::from_secs(10), 100);
}

#[test]
fn thousands_of_captures_find_official_sets_as_they_were_at_one_moment() {
    long!();
    rename_into_place_and_capture(Duration::from_secs(120), 4000);
}

fn rename_into_place_and_capture(lasting: Duration, captures_min: u32) {
    let (captures, tries) = thread::scope(|scope| {
        let pairs = [(); 8].map(|()| scope.spawn(|| rename_into_place(lasting)));
        let counts = pairs.into_iter().map(|pair| pair.join().unwrap());
        counts.fold((0, 0), |sum, it| (sum.0 + it.0, sum.1 + it.1))
    });
    println!("{captures} captures in {tries} tries");
    assert!(captures >= captures_min, "only {captures} captures");
    assert!(captures < tries, "no capture met a change");
}

/// Replaces one database after the other as freshclam does, now by a `.cld` and now by a `.cvd`,
/// while captures are made.
fn rename_into_place(lasting: Duration) -> (u32, u32) {
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
    let write = |version| {
        for base in OFFICIAL {
            put(version, base);
            pause(3);
        }
        pause(100);
        true
    };
    let look = || {
        let Some(capture) = lab.capture() else {
            return false;
        };
        let known = known.lock().unwrap();
        let found = OFFICIAL.map(|base| {
            let mut files = capture.iter().filter(|it| it.name.base() == base);
            let file = files.next().expect("it was there all the time");
            assert_eq!(files.next(), None, "one form of it");
            known[&file.sha256]
        });
        let [first, .., last] = found;
        let is_a_state = found.is_sorted_by(|a, b| a >= b) && first - last <= 1;
        assert!(is_a_state, "this was never on disk: {found:?}");
        true
    };
    under_fire(lasting, write, look)
}

/// A master that has published what the mirror has.
fn publishing(fleet: &Fleet, mirror: &Path) -> Master {
    let mut master = fleet.master(mirror);
    master.start();
    master.wait_generation(1);
    master
}

/// Number and file names of each publication in the audit log.
fn published(master: &Master) -> Vec<(u64, Vec<String>)> {
    let records = master.audit("published").into_iter();
    let files = records.map(|record| {
        let names = record["detail"]["files"].as_array().unwrap().iter();
        let names = names.map(|name| name.as_str().unwrap().to_owned());
        (record["generation"].as_u64().unwrap(), names.collect())
    });
    files.collect()
}

/// What `status` says that the mirror is waited for, if its text has `what` in it.
fn waiting(master: &Master, what: &str) -> Result<Value, Value> {
    let waits = master.json(&["status"]).ok_or(Value::Null)?["waits"].clone();
    let mut all = waits.as_array().into_iter().flatten();
    let wait = all.find(|wait| {
        wait["name"] == "mirror" && wait["text"].as_str().unwrap_or_default().contains(what)
    });
    wait.cloned().ok_or_else(|| waits.clone())
}

/// The working directory that a freshclam has in the mirror.
fn run_in(mirror: &Path) -> Option<String> {
    let entries = fs::read_dir(mirror).unwrap();
    let mut names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.find(|name| name.starts_with("tmp."))
}

/// The runs of freshclam as a master sees them that starts a quarter of an hour later.
fn a_quarter_of_an_hour_later(mirror: &Path) -> Activity {
    let listing = Listing::of(mirror, SystemTime::now() + ABANDONED_AFTER).unwrap();
    let activity = Activity::default();
    activity.look(&listing, Instant::now());
    activity
}

/// A mirror at version 1 of `test`, and a freshclam that updates that, `bytecode` and two files.
fn updating(mirror: &Mirror) -> Command {
    mirror.offer(2);
    mirror.serve(
        "bytecode.cvd",
        fs::read(Part::TestFiles.path().join("bytecode.cvd")).unwrap(),
    );
    let mut lines = "ExcludeDatabase main\nExcludeDatabase daily\nExtraDatabase test\n\
                     MaxAttempts 1\n"
        .to_owned();
    for name in ["a.hsb", "b.hsb"] {
        mirror.serve(name, signatures(0..10));
        lines += &format!("DatabaseCustomURL {}\n", mirror.url(name));
    }
    let mut freshclam = mirror.freshclam_of_all(&lines);
    freshclam.stdout(Stdio::null()).stderr(Stdio::null());
    freshclam
}

#[test]
fn the_official_databases_of_a_freshclam_run_are_published_once_when_it_is_over() {
    require!(Freshclam, TestFiles);
    let fleet = Fleet::new();
    let mirror = Mirror::new();
    let master = publishing(&fleet, &mirror.directory());

    let hold = mirror.hold("b.hsb");
    let mut freshclam = Started::new(&mut updating(&mirror));
    hold.wait();
    let run = run_in(&mirror.directory()).unwrap();
    until(PATIENCE, "the run is waited for", || waiting(&master, &run));
    assert!(mirror.directory().join("test.cld").exists());
    let ordered = master.command(&["publish"]);
    let said = String::from_utf8_lossy(&ordered.stdout).into_owned();
    assert!(said.contains(&run), "{said}");
    let has_official = |files: &[String]| files.iter().any(|name| name == "bytecode.cvd");
    assert!(
        published(&master)
            .iter()
            .all(|(_, files)| !has_official(files))
    );
    drop(hold);
    assert!(freshclam.0.wait().unwrap().success());
    let all = ["a.hsb", "b.hsb", "bytecode.cvd", "test.cld"].map(str::to_owned);
    until(PATIENCE, "everything is published", || {
        let last = published(&master).pop().unwrap().1;
        if last == all {
            Ok(())
        } else {
            Err(format!("{last:?}"))
        }
    });
    let official = published(&master)
        .into_iter()
        .filter(|(_, files)| has_official(files));
    assert_eq!(official.count(), 1);
}

#[test]
fn what_a_killed_freshclam_leaves_behind_is_named_and_blocks_for_a_quarter_of_an_hour() {
    require!(Freshclam, TestFiles);
    let fleet = Fleet::new();
    let mirror = Mirror::new();
    let directory = mirror.directory();
    let master = publishing(&fleet, &directory);

    let hold = mirror.hold("b.hsb");
    let mut freshclam = Started::new(&mut updating(&mirror));
    hold.wait();
    freshclam.0.kill().unwrap();
    freshclam.0.wait().unwrap();
    drop(hold);
    let run = run_in(&directory).expect("it stays");
    let wait = until(PATIENCE, "the run is waited for", || waiting(&master, &run));
    let until: Timestamp = wait["until"].as_str().unwrap().parse().unwrap();
    let left = until.duration_since(Timestamp::now());
    let quarter = SignedDuration::from_mins(14)..=SignedDuration::from_mins(15);
    assert!(quarter.contains(&left), "{wait}");
    let names = published(&master).into_iter().flat_map(|(_, files)| files);
    assert!(
        !names
            .collect::<Vec<_>>()
            .contains(&"bytecode.cvd".to_owned())
    );

    let lab = Lab::new();
    let units = lab.capture_units(&directory, &lab.activity).unwrap();
    let official = units[&UnitName::official()].as_ref().unwrap_err();
    assert!(official.to_string().contains(&run), "{official}");
    assert!(
        units.values().filter(|it| it.is_ok()).count() == 2,
        "{units:?}"
    );
    let later = a_quarter_of_an_hour_later(&directory);
    let files = lab.files_of(&directory, &later);
    let on_disk = |name: &str| {
        let content = fs::read(directory.join(name)).unwrap();
        (name.to_owned(), Digest::of(&content))
    };
    assert_eq!(files, ["a.hsb", "bytecode.cvd", "test.cld"].map(on_disk));

    // The next freshclam leaves it, too, and does not make it younger.
    assert!(updating(&mirror).status().unwrap().success());
    assert_eq!(run_in(&directory), Some(run));
    let later = a_quarter_of_an_hour_later(&directory);
    assert_eq!(lab.files_of(&directory, &later).len(), 4);
}

#[test]
fn of_a_freshclam_that_is_killed_between_rename_and_unlink_the_newer_form_is_captured() {
    require!(Freshclam, Strace, TestFiles);
    let mirror = Mirror::new();
    let directory = mirror.directory();
    let scratch = Scratch::new();
    let hold = mirror.hold("test.cvd");
    let mut freshclam = mirror.freshclam(2);
    let mut freshclam = Started::new(freshclam.stdout(Stdio::null()));
    hold.wait();
    let old = directory.join("test.cvd");
    let strace = Strace::spoil(
        freshclam.0.id(),
        scratch.path(),
        "?unlink,?unlinkat",
        "test.cvd",
        "signal=SIGKILL",
        "1",
    );
    drop(hold);
    assert!(!freshclam.0.wait().unwrap().success());
    drop(strace);
    assert!(old.exists() && directory.join("test.cld").exists());

    let lab = Lab::new();
    let later = a_quarter_of_an_hour_later(&directory);
    let names = lab.files_of(&directory, &later).into_iter();
    assert_eq!(names.map(|it| it.0).collect::<Vec<_>>(), ["test.cld"]);
}

#[test]
fn of_a_freshclam_that_fails_at_the_second_database_the_first_one_is_published() {
    require!(Freshclam, TestFiles);
    let fleet = Fleet::new();
    let mirror = Mirror::new();
    let master = publishing(&fleet, &mirror.directory());

    let mut freshclam = updating(&mirror);
    mirror.serve("test.cvd", {
        let mut broken = fs::read(Part::TestFiles.path().join("test-3.cvd")).unwrap();
        broken[5000] ^= 1;
        broken
    });
    mirror.serve("test-2.cdiff", ""); // which says that there is no patch
    assert!(!freshclam.status().unwrap().success());
    assert_eq!(run_in(&mirror.directory()), None);
    master.wait_audit("published", 2);
    let files = ["bytecode.cvd", "test.cvd"].map(str::to_owned);
    assert_eq!(published(&master)[1], (2, files.to_vec()));
    assert!(master.json(&["status"]).unwrap()["refused"].is_null());
}

/// The cvdupdate that keeps `bytecode`, whose version the name server tells, `test` and a loose file
/// in the mirror, with its configuration, state and log.
fn cvdupdate(mirror: &Mirror, names: &NameServer) -> Command {
    let directory = mirror.directory();
    let [config, state] = ["config.json", "state.json"].map(|name| directory.join(name));
    if !state.exists() {
        let database = |name: &str, field: u32| {
            json!({
                "url": mirror.url(name), "retry after": 0, "last modified": 0, "last checked": 0,
                "DNS field": field, "local version": 0, "CDIFFs": [],
            })
        };
        let databases = json!({
            "bytecode.cvd": database("bytecode.cvd", 7),
            "local.hsb": database("local.hsb", 0),
            "test.cvd": database("test.cvd", 0),
        });
        fs::write(state, json!({ "dbs": databases }).to_string()).unwrap();
        let mut set = Command::new(Part::Cvdupdate.path());
        set.args(["config", "set", "--config"]).arg(&config);
        set.arg("--dbdir").arg(&directory);
        set.arg("--logdir").arg(directory.join("log"));
        set.args(["--nameserver", &names.address().to_string()]);
        set.env_remove("CVDUPDATE_NAMESERVER");
        let set = set.output().unwrap();
        assert!(set.status.success(), "{set:?}");
    }
    let mut update = Command::new(Part::Cvdupdate.path());
    update.args(["update", "--config"]).arg(config);
    // It also asks PyPI for a newer one of itself, at a port that is closed here.
    for name in ["https_proxy", "HTTPS_PROXY"] {
        update.env(name, "http://127.0.0.1:9");
    }
    for name in ["no_proxy", "NO_PROXY"] {
        update.env(name, "127.0.0.1");
    }
    update.env_remove("CVDUPDATE_NAMESERVER");
    update
}

#[test]
fn of_what_cvdupdate_writes_in_place_only_whole_databases_are_published() {
    require!(Cvdupdate, NameServer, Strace, TestFiles);
    let fleet = Fleet::new();
    let (mirror, scratch) = (Mirror::new(), Scratch::new());
    let directory = mirror.directory();
    let names = NameServer::start("1.4.6:62:27000:1700000000:1:90:49192:19");
    let test_file = |name: &str| fs::read(Part::TestFiles.path().join(name)).unwrap();
    mirror.serve("bytecode.cvd", test_file("bytecode.cvd"));
    mirror.serve("local.hsb", signatures(0..10));
    let certs = scratch.directory("certs");
    let issuer = certificates_in(&test_file("test-2.cvd.sign"));
    fs::write(certs.join("issuer.pem"), issuer).unwrap();
    let mut master = fleet.master(&directory);
    let trusted = format!("require = []\ncvd_certs = {certs:?}");
    master.configure("require = []", &trusted);
    master.start();
    master.wait_generation(1);

    mirror.offer(2);
    for name in ["test-2.cvd.sign", "test-2.cdiff.sign"] {
        mirror.serve(name, test_file(name));
    }
    let updated = cvdupdate(&mirror, &names).output().unwrap();
    assert!(updated.status.success(), "{updated:?}");
    for name in [
        "dns.txt",
        "config.json",
        "state.json",
        "log",
        "test-2.cdiff",
        "test-2.cdiff.sign",
    ] {
        assert!(directory.join(name).exists(), "{name}: {updated:?}");
    }
    let last = |files: &[&str]| {
        until(PATIENCE, "the set is published", || {
            let (generation, published) = published(&master).pop().unwrap();
            if published == files {
                Ok(generation)
            } else {
                Err(published)
            }
        })
    };
    let files = ["bytecode.cvd", "local.hsb", "test-2.cvd.sign", "test.cvd"];
    let generation = last(&files);

    // Stopped when it has emptied the file.
    mirror.offer(3);
    let hold = mirror.hold("test.cvd");
    let mut updating = cvdupdate(&mirror, &names);
    let updating = updating.stdout(Stdio::null()).stderr(Stdio::null());
    let mut updating = Started::new(updating);
    hold.wait();
    let test = directory.join("test.cvd");
    let (call, path) = ("openat", test.to_str().unwrap());
    let strace = Strace::spoil(
        updating.0.id(),
        scratch.path(),
        call,
        path,
        "signal=SIGSTOP",
        "1",
    );
    drop(hold);
    until(PATIENCE, "it is stopped", || strace.has_stopped());
    assert_eq!(fs::metadata(&test).unwrap().len(), 0);
    let open = "test.cvd in the mirror is open for writing";
    until(PATIENCE, "it is waited for", || waiting(&master, open));
    let pid = Pid::from_raw(updating.0.id().try_into().unwrap());
    kill(pid, Signal::SIGCONT).unwrap();
    assert!(updating.0.wait().unwrap().success());
    drop(strace);
    master.wait_generation(generation + 1);
    let files = ["bytecode.cvd", "local.hsb", "test.cvd"]; // the signature was of the former version
    assert_eq!(last(&files), generation + 1);
    let status = master.json(&["status"]).unwrap();
    assert_eq!(status["held"], json!([]));
}

#[test]
fn a_snapshot_symlink_that_is_swapped_fifty_times_gives_whole_snapshots() {
    let lab = Lab::new();
    fs::remove_dir(&lab.mirror).unwrap();
    let snapshots = lab.mirror.with_extension("snapshots");
    fs::create_dir(&snapshots).unwrap();
    let snapshot = |number: u64| snapshots.join(number.to_string());
    let content = |base: &str, number: u64| signatures(0..number) + base;
    for number in 1..=51 {
        let directory = snapshot(number);
        fs::create_dir(&directory).unwrap();
        for base in OFFICIAL {
            let path = directory.join(format!("{base}.hsb"));
            fs::write(&path, content(base, number)).unwrap();
        }
        // Names come and go with the numbers.
        fs::write(directory.join(format!("only-{number}.hsb")), "").unwrap();
        fs::set_permissions(&directory, Permissions::from_mode(0o555)).unwrap();
    }
    let swap = |number: u64| {
        let link = lab.mirror.with_extension("new");
        symlink(snapshot(number), &link).unwrap();
        fs::rename(&link, &lab.mirror).unwrap();
        if number > 1 {
            let old = snapshot(number - 1);
            fs::set_permissions(&old, Permissions::from_mode(0o755)).unwrap();
            fs::remove_dir_all(old).unwrap();
        }
    };
    swap(1);
    let seen: Mutex<BTreeSet<u64>> = Mutex::default();
    let write = |number| {
        swap(number);
        pause(100);
        number < 51
    };
    let look = || {
        let Some(capture) = lab.capture() else {
            return false;
        };
        let mut names = capture.iter().map(|file| file.name.base());
        let only = names.find_map(|name| name.strip_prefix("only-")).unwrap();
        let number = only.parse().unwrap();
        let mut expected: Vec<_> = OFFICIAL
            .map(|base| {
                (
                    format!("{base}.hsb"),
                    Digest::of(content(base, number).as_bytes()),
                )
            })
            .to_vec();
        expected.push((format!("only-{number}.hsb"), Digest::of(b"")));
        expected.sort();
        let files = capture.iter();
        let files: Vec<_> = files.map(|it| (it.name.to_string(), it.sha256)).collect();
        assert_eq!(files, expected);
        seen.lock().unwrap().insert(number);
        true
    };
    let (captures, tries) = under_fire(Duration::MAX, write, look);
    let seen = seen.into_inner().unwrap();
    println!(
        "{captures} captures in {tries} tries, of {} snapshots",
        seen.len()
    );
    assert!(seen.len() > 10, "only of {seen:?}");
}

/// rsync brings the mirror to the content of a directory, again and again, while captures are made.
fn rsync(
    lab: &Lab,
    options: &[&str],
    fill: impl Fn(&Path, u64) + Sync,
    check: impl Fn(&[Captured]) + Sync,
) {
    let source = lab.mirror.with_extension("source");
    let run = |version: u64| {
        let _ = fs::remove_dir_all(&source);
        fs::create_dir(&source).unwrap();
        fill(&source, version);
        let mut rsync = Command::new(Part::Rsync.path());
        rsync.args(["--archive", "--ignore-times"]).args(options);
        let ran = rsync.arg(source.join("")).arg(lab.mirror.join("")).output();
        let ran = ran.unwrap();
        assert!(ran.status.success(), "{ran:?}");
    };
    run(1);
    let write = |version| {
        run(version);
        pause(if version.is_multiple_of(4) { 300 } else { 10 });
        true
    };
    let look = || match lab.capture() {
        Some(capture) => {
            check(&capture);
            true
        }
        None => false,
    };
    let (captures, tries) = under_fire(Duration::from_secs(5), write, look);
    println!("{captures} captures in {tries} tries");
    assert!(
        captures > CAPTURES_MIN,
        "only {captures} captures in {tries} tries"
    );
    assert!(captures < tries, "no capture met a change");
}

#[test]
fn rsync_in_place_is_captured_as_it_stood_at_one_moment() {
    require!(Rsync);
    let lab = Lab::new();
    let fill = |source: &Path, version| {
        for name in LOOSE {
            let content = block(version).repeat(BLOCKS as usize);
            fs::write(source.join(name), content).unwrap();
        }
    };
    let check = |capture: &[Captured]| assert_was_rewritten(&lab, capture);
    for delta in ["--whole-file", "--no-whole-file"] {
        rsync(&lab, &["--inplace", delta], fill, check);
    }
}

#[test]
fn of_an_rsync_that_deletes_before_it_writes_every_file_is_captured_whole() {
    require!(Rsync);
    let lab = Lab::new();
    // Two files change their names with the version, and one, which comes last, keeps it.
    let content = |name: &str, version: u64| format!("{}{name}", signatures(0..version % 90));
    let fill = |source: &Path, version: u64| {
        for base in ["a", "b"] {
            let path = source.join(format!("{base}-{version}.hsb"));
            fs::write(path, content(base, version)).unwrap();
        }
        fs::write(source.join("daily.hsb"), version.to_string()).unwrap();
    };
    let check = |capture: &[Captured]| {
        for file in capture {
            let text = String::from_utf8(lab.content(&file.sha256)).unwrap();
            match file.name.base().split_once('-') {
                Some((base, version)) => {
                    let version = version.parse().unwrap();
                    assert_eq!(text, content(base, version), "half of {}", file.name);
                }
                None => assert!(text.parse::<u64>().is_ok(), "half of {}: {text}", file.name),
            }
        }
        assert!(capture.iter().any(|file| file.name.base() == "daily"));
    };
    rsync(&lab, &["--delete-before"], fill, check);
}

#[test]
fn a_file_that_grows_slowly_is_published_when_it_is_whole() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    Container::new("daily", 1)
        .member("hsb", signatures(0..10))
        .write(&mirror);
    let mut master = fleet.master(&mirror);
    master.configure("quiet = \"300ms\"", "quiet = \"5s\"");
    master.start();
    master.wait_generation(1);

    let over = AtomicBool::new(false);
    let lines = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut slow = File::create(mirror.join("slow.hsb")).unwrap();
            let mut lines = 0;
            while !over.load(Ordering::Relaxed) {
                slow.write_all(signatures(lines..lines + 1).as_bytes())
                    .unwrap();
                lines += 1;
                pace(Duration::from_millis(50));
            }
            lines
        });
        until(PATIENCE, "the file is named", || {
            waiting(&master, "slow.hsb in the mirror is open for writing")
        });
        assert_eq!(master.audit("published").len(), 1);
        over.store(true, Ordering::Relaxed);
        writer.join().unwrap()
    });
    master.wait_audit("published", 2);
    let whole = Digest::of(signatures(0..lines).as_bytes());
    let object = master
        .directory()
        .join("state/objects")
        .join(whole.to_string());
    assert!(object.exists(), "no other content was published");
}

#[test]
fn a_container_is_waited_for_while_it_is_copied_and_refused_if_it_was_copied_by_half() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    let daily = |version| Container::new("daily", version).member("hsb", signatures(0..1000));
    daily(1).write(&mirror);
    let master = publishing(&fleet, &mirror);

    // cp writes in place what comes through the pipe.
    let content = daily(2).bytes();
    let (half, rest) = content.split_at(content.len() / 2);
    let copy_half = || {
        let mut cp = Command::new("cp");
        cp.arg("/dev/stdin").arg(mirror.join("daily.cud"));
        let mut cp = cp.stdin(Stdio::piped()).spawn().unwrap();
        let mut pipe = cp.stdin.take().unwrap();
        pipe.write_all(half).unwrap();
        until(PATIENCE, "the file is named", || {
            waiting(&master, "daily.cud in the mirror is open for writing")
        });
        (cp, pipe)
    };
    let (mut cp, pipe) = copy_half();
    drop(pipe);
    assert!(cp.wait().unwrap().success());
    let refused = master.wait_refused();
    assert!(
        refused.starts_with("daily.cud is not a whole database"),
        "{refused}"
    );
    let (mut cp, mut pipe) = copy_half();
    pipe.write_all(rest).unwrap();
    drop(pipe);
    assert!(cp.wait().unwrap().success());
    master.wait_generation(2);
    let status = master.json(&["status"]).unwrap();
    assert_eq!(status["held"], json!([]));
}
