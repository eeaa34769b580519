//! The way from a mirror to a generation, on real directories.

mod units;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use clamcast_daemon::alarms::Alarms;
use clamcast_daemon::values::Percent;
use clamcast_proto::delta::VERSION;
use clamcast_proto::dsse::sign;
use clamcast_proto::manifest::{ManifestFile, SignedBy, content_digest};
use nix::sys::stat::Mode;
use sha2::{Digest as _, Sha256};

use super::*;
use crate::config::units::Units;
use crate::config::{LoadTest, OnBadUnit, Unsigned};
use crate::publish::withdrawn::Ending;

/// A mirror, a state directory and the keys of a fleet.
pub(crate) struct Lab {
    pub(crate) root: tempfile::TempDir,
    settings: Settings,
    keys: Verified<KeySet>,
    directives: watch::Sender<Directives>,
}

const ROOT: u8 = 1;
const MANIFEST: u8 = 2;

pub(crate) fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

fn key_set(version: u64, epoch: u64, manifest: u8) -> Verified<KeySet> {
    let set = KeySet {
        fleet: "bank".parse().unwrap(),
        version,
        epoch: Epoch(epoch),
        issued: Timestamp::UNIX_EPOCH,
        root: PublicKey::of(&key(ROOT)),
        manifest: vec![PublicKey::of(&key(manifest))],
        audit: vec![PublicKey::of(&key(3))],
    };
    sign(set, &key(ROOT))
}

impl Lab {
    /// An empty mirror that nothing is required of.
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("mirror");
        fs::create_dir(&path).unwrap();
        let mirror = Mirror {
            path,
            quiet: Duration::ZERO,
            rescan: Duration::ZERO,
            require: Vec::new(),
            unsigned: Unsigned::Allow,
            load_test: LoadTest::Never,
            load_test_socket: "/nowhere/loadtest.sock".into(),
            shrink_max: Percent::new(30).unwrap(),
            on_bad_unit: OnBadUnit::Hold,
            units: Units::default(),
            cvd_certs: None,
            age_alarm: Duration::from_secs(48 * 3600),
        };
        let settings = Settings {
            fleet: "bank".parse().unwrap(),
            mirror,
            keep: 20,
            fresh: Duration::from_secs(3600),
        };
        let keys = key_set(1, 1, MANIFEST);
        Self {
            root,
            settings,
            keys,
            directives: watch::Sender::default(),
        }
    }

    /// One with a daily database of ten signatures.
    pub(crate) fn with_daily(version: u64) -> Self {
        let lab = Self::new();
        lab.put("daily.cud", &container("daily", version, 10));
        lab
    }

    fn mirror(&self, name: &str) -> PathBuf {
        self.settings.mirror.path.join(name)
    }

    /// Renames a file into place, as freshclam does.
    pub(crate) fn put(&self, name: &str, content: &[u8]) {
        let part = self.root.path().join("part");
        fs::write(&part, content).unwrap();
        fs::rename(part, self.mirror(name)).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.mirror(name)).unwrap();
    }

    fn open(&self, state: &Path) -> Result<Store, StoreError> {
        let mirror = &self.settings.mirror.path;
        Store::open(state, mirror, &self.keys, Alarms::default())
    }

    fn store(&self, state: &str) -> Arc<Store> {
        Arc::new(self.open(&self.root.path().join(state)).unwrap())
    }

    /// A master's publisher on a state directory.
    pub(crate) fn publisher(&self, state: &str) -> Publisher {
        let store = self.store(state);
        Publisher::new(
            self.settings.clone(),
            store,
            key(MANIFEST),
            self.keys.clone(),
            self.directives.subscribe(),
            Activity::default(),
        )
        .unwrap()
    }

    /// The fleet took this generation back, in which these files were new.
    fn reject(&self, manifest: &Manifest, new: &[&str], blamed: &[&str]) {
        self.withdraw(manifest);
        let new = new.iter().map(|name| {
            let name = name.parse().unwrap();
            let sha256 = manifest.file(&name).unwrap().sha256;
            (name, sha256)
        });
        self.directives.send_modify(|directives| {
            let position = manifest.position();
            let mut withdrawal = directives.withdrawn.of(position).unwrap().clone();
            withdrawal.new = Some(new.collect());
            withdrawal.blamed = blamed.iter().map(|name| name.parse().unwrap()).collect();
            directives.withdrawn.insert(withdrawal);
        });
    }

    /// The fleet took this generation back, as an earlier build remembers it.
    fn withdraw(&self, manifest: &Manifest) {
        self.directives.send_modify(|directives| {
            directives.withdrawn.insert(Withdrawal {
                content: manifest.content,
                position: manifest.position(),
                outcome: Ending::Halted,
                since: Timestamp::UNIX_EPOCH,
                new: None,
                blamed: BTreeSet::new(),
            });
        });
    }
}

/// What came of publishing: `1.2 daily.cud=7 local.ndb` for a new generation with its files and
/// versions, or why there is none; then ` | UNIT: REASON` for each held unit.
fn publish(publisher: &Publisher) -> String {
    publish_as(publisher, None)
}

fn accept(publisher: &Publisher) -> String {
    accept_units(publisher, &[])
}

fn accept_units(publisher: &Publisher, units: &[&str]) -> String {
    let units = units.iter().map(|unit| (*unit).to_owned()).collect();
    let reason = "it is right".to_owned();
    publish_as(publisher, Some(Accept { reason, units }))
}

fn publish_as(publisher: &Publisher, accept: Option<Accept>) -> String {
    let request = Request {
        is_operators: accept.is_some(),
        accept,
        supersede: false,
    };
    let published = outcome(publisher, &request);
    let held = publisher.holds().into_iter();
    let held = held.map(|(unit, hold)| format!(" | {unit}: {}", hold.held.cause.text));
    published + &held.collect::<String>()
}

fn outcome(publisher: &Publisher, request: &Request) -> String {
    match publisher
        .publish(
            request,
            "tester",
            Timestamp::now(),
            &CancellationToken::new(),
        )
        .unwrap()
    {
        Published::New {
            manifest,
            announcement,
        } => {
            let mut text = manifest.position().to_string();
            for file in &manifest.files {
                text += &format!(" {}", file.name);
                if let Some(facts) = &file.container {
                    text += &format!("={}", facts.version);
                }
            }
            for overruled in announcement.accepted {
                text += &format!(" in spite of: {overruled}");
            }
            text
        }
        Published::Unchanged => "unchanged".to_owned(),
        Published::Held(refusal) | Published::Refused(refusal) => refusal.to_string(),
        Published::Busy { reason } => format!("busy: {reason}"),
    }
}

#[track_caller]
fn check(publisher: &Publisher, expected: &str) {
    expect(&publish(publisher), expected);
}

#[track_caller]
fn expect(found: &str, expected: &str) {
    assert!(
        found == expected || (expected.contains(": ") && found.contains(expected)),
        "expected `{expected}`, found `{found}`"
    );
}

/// An unsigned container with one `.hsb` member: the header, then a plain tar of COPYING, `.info`
/// and the member (`buildcld` in libfreshclam_internal.c).
pub(crate) fn container(base: &str, version: u64, signatures: u64) -> Vec<u8> {
    let member: String = (0..signatures)
        .map(|number| format!("{number:064x}:1000:Lab.Nothing-{number}:73\n"))
        .collect();
    let head = format!(
        "ClamAV-VDB:14 Nov 2023 22-13 +0000:{version}:{signatures}:90:X:X:lab:{}",
        1_700_000_000 + version
    );
    let digest = hex::encode(Sha256::digest(&member));
    let info = format!("{head}\n{base}.hsb:{}:{digest}\n", member.len());
    let mut bytes = format!("{head:512}").into_bytes();
    for (name, content) in [
        ("COPYING".to_owned(), "made for a test\n".to_owned()),
        (format!("{base}.info"), info),
        (format!("{base}.hsb"), member),
    ] {
        let mut header = [0; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        let size = format!("{:o}", content.len());
        header[124..124 + size.len()].copy_from_slice(size.as_bytes());
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0\0").as_bytes());
        bytes.extend(header);
        bytes.extend(content.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    bytes
}

#[test]
fn a_changed_mirror_is_a_new_generation_and_an_unchanged_one_is_none() {
    let lab = Lab::with_daily(7);
    lab.put("local.ndb", b"Lab.Local:0:*:6c6f63616c\n");
    let publisher = lab.publisher("state");
    check(&publisher, "1.1 daily.cud=7 local.ndb");
    check(&publisher, "unchanged");
    lab.put("daily.cud", &container("daily", 8, 11));
    check(&publisher, "1.2 daily.cud=8 local.ndb");

    let [first, second] = publisher.store().manifests().try_into().unwrap();
    assert_eq!(second.previous, Some(first.payload_sha256()));
    assert_eq!(
        (first.previous, &first.publisher),
        (None, &second.publisher)
    );
    let facts = second.files[0].container.as_ref().unwrap();
    assert_eq!(
        (facts.signatures, facts.signed_by),
        (11, Some(SignedBy::None))
    );
    for file in &second.files {
        let object = fs::read(publisher.store().object(&file.sha256)).unwrap();
        assert_eq!(Digest::of(&object), file.sha256);
        assert_eq!(object, fs::read(lab.mirror(file.name.as_str())).unwrap());
    }
}

#[test]
fn an_agent_with_the_key_set_takes_what_is_published() {
    let lab = Lab::with_daily(7);
    let publisher = lab.publisher("state");
    publish(&publisher);
    let trust = clamcast_proto::trust::Trust::new(lab.keys.clone(), None);
    let current = publisher.current().unwrap();
    let manifest = trust.judge_manifest(current.envelope(), None).unwrap();
    let now = Timestamp::now();
    let fresh = publisher.vouch(&publisher.current().unwrap(), now);
    let digest = manifest.payload_sha256();
    let fresh = trust.judge_fresh(fresh.envelope(), digest).unwrap();
    assert_eq!(fresh.position(), manifest.position());
    assert_eq!(fresh.expires, now + SignedDuration::from_hours(1));
}

#[test]
fn a_truncated_or_foreign_file_is_held_and_the_published_one_stays() {
    let lab = Lab::with_daily(7);
    let publisher = lab.publisher("state");
    publish(&publisher);
    let whole = container("daily", 8, 100);
    for (content, why) in [
        (&whole[..whole.len() - 1000], "was cut off"),
        (&whole[..1024], "was cut off"),
        (&whole[..300], "was cut off"),
        (&[b'<'; 600], "not a ClamAV header"),
        (b"", "was cut off"),
    ] {
        lab.put("daily.cud", content);
        check(
            &publisher,
            "unchanged | official: daily.cud is not a whole database",
        );
        assert!(publish(&publisher).contains(why), "{}", publish(&publisher));
    }
    assert_eq!(publisher.current().unwrap().generation, Generation::FIRST);
    lab.put("daily.cud", &whole);
    check(&publisher, "1.2 daily.cud=8");
}

#[test]
fn an_empty_or_missing_mirror_is_refused() {
    let lab = Lab::with_daily(7);
    let publisher = lab.publisher("state");
    publish(&publisher);
    lab.remove("daily.cud");
    check(&publisher, "refused: the mirror ");
    assert!(publish(&publisher).contains("has no databases"));
    fs::remove_dir(&lab.settings.mirror.path).unwrap();
    check(&publisher, "refused: cannot list the mirror ");
    assert!(publisher.current().is_some());
}

#[test]
fn a_required_base_must_be_there_in_any_form() {
    let mut lab = Lab::new();
    lab.settings.mirror.require = vec!["daily".to_owned()];
    lab.put("main.cud", &container("main", 60, 5));
    let publisher = lab.publisher("state");
    check(&publisher, "refused: daily is not in the mirror");
    lab.put("daily.cud", &container("daily", 7, 5));
    check(&publisher, "1.1 daily.cud=7 main.cud=60");
}

#[test]
fn a_lower_version_is_held_until_an_operator_accepts_it() {
    let lab = Lab::with_daily(7);
    let publisher = lab.publisher("state");
    publish(&publisher);
    lab.put("daily.cud", &container("daily", 6, 10));
    check(
        &publisher,
        "unchanged | official: daily.cud has version 6, version 7 is published",
    );
    let accepted = accept(&publisher);
    assert!(
        accepted.starts_with("1.2 daily.cud=6 in spite of: "),
        "{accepted}"
    );
}

#[test]
fn a_database_that_shrank_is_held_until_an_operator_accepts_it() {
    let lab = Lab::new();
    lab.put("daily.cud", &container("daily", 7, 100));
    lab.put("local.ndb", &[b'\n'; 100]);
    let publisher = lab.publisher("state");
    publish(&publisher);
    lab.put("daily.cud", &container("daily", 8, 70));
    lab.put("local.ndb", &[b'\n'; 70]);
    check(&publisher, "1.2 daily.cud=8 local.ndb"); // 30 % is not more than 30 %
    lab.put("daily.cud", &container("daily", 9, 48));
    check(
        &publisher,
        "unchanged | official: daily.cud shrank from 70 to 48 signatures",
    );
    let accepted = accept(&publisher);
    assert!(
        accepted.starts_with("1.3 daily.cud=9 local.ndb in spite of: daily.cud shrank"),
        "{accepted}"
    );
    assert!(publisher.holds().is_empty());
    lab.put("local.ndb", &[b'\n'; 10]);
    check(
        &publisher,
        "unchanged | local.ndb: local.ndb shrank from 70 to 10 bytes",
    );
}

#[test]
fn a_loose_database_or_a_cud_that_is_gone_is_withdrawn() {
    let lab = Lab::with_daily(7);
    lab.put("local.ndb", b"Lab.Local:0:*:6c6f63616c\n");
    lab.put("lab.cud", &container("lab", 1, 1));
    let publisher = lab.publisher("state");
    publish(&publisher);
    lab.remove("local.ndb");
    lab.remove("lab.cud");
    check(&publisher, "1.2 daily.cud=7");
}

#[test]
fn a_forged_database_that_an_earlier_build_published_is_refused_after_the_upgrade() {
    let lab = Lab::with_daily(7);
    publish(&lab.publisher("state"));
    lab.put("main.cld", &container("main", 60, 10));
    let store = lab.store("state");
    let current = store.current().unwrap();
    let forged = fs::File::open(lab.mirror("main.cld")).unwrap();
    let (sha256, size) = store.import(&forged).unwrap();
    let mut files = current.files.clone();
    files.push(ManifestFile {
        captured: None,
        name: "main.cld".parse().unwrap(),
        size,
        sha256,
        container: None,
    });
    let manifest = Manifest {
        generation: Generation::new(2).unwrap(),
        content: content_digest(files.iter().map(|f| (&f.name, f.size, &f.sha256))),
        files,
        ..Manifest::clone(&current)
    };
    store.add(sign(manifest, &key(MANIFEST))).unwrap();
    drop(store);
    check(
        &lab.publisher("state"),
        "refused: main.cld has no valid signature of Talos",
    );
}

#[test]
fn a_forged_database_is_refused_also_if_an_operator_accepts_it() {
    let lab = Lab::with_daily(7);
    lab.put("main.cld", &container("main", 60, 10));
    let publisher = lab.publisher("state");
    let why = "main.cld has no valid signature of Talos; remove it and run freshclam: `.info` has no signature";
    check(
        &publisher,
        &format!("refused: nothing is left to publish: official is held, because {why}"),
    );
    assert!(accept(&publisher).contains(why));
}

#[test]
fn databases_that_nobody_signed_can_be_refused() {
    let mut lab = Lab::with_daily(7);
    lab.settings.mirror.unsigned = Unsigned::Refuse;
    check(
        &lab.publisher("one"),
        "nothing is left to publish: official is held, because daily.cud is not signed by Talos",
    );
    lab.remove("daily.cud");
    lab.put("local.ndb", b"Lab.Local:0:*:6c6f63616c\n");
    check(
        &lab.publisher("two"),
        "nothing is left to publish: local.ndb is held, because local.ndb is not signed by Talos",
    );
}

#[test]
fn a_rule_about_signatures_that_is_tightened_also_judges_what_is_published() {
    let mut lab = Lab::with_daily(7);
    publish(&lab.publisher("state"));
    lab.settings.mirror.unsigned = Unsigned::Refuse;
    check(
        &lab.publisher("state"),
        "nothing is left to publish: official is held, because daily.cud is not signed by Talos",
    );
}

#[test]
fn names_cannot_bring_in_anything_but_files_of_the_mirror() {
    let lab = Lab::with_daily(7);
    let publisher = lab.publisher("state");
    for ignored in [
        ".hidden.ndb",
        "a\nb.ndb",
        "clamcast-gate.ign2",
        "daily.cld.tmp",
    ] {
        lab.put(ignored, b"no database at all");
    }
    check(&publisher, "1.1 daily.cud=7");
    let skipped = publisher.skipped().into_iter().map(|it| it.to_string());
    assert_eq!(
        skipped.collect::<Vec<_>>(),
        [
            ".hidden.ndb: hidden",
            "a\\nb.ndb: control characters in the name",
            "clamcast-gate.ign2: the name of a file of clamcast",
        ]
    );

    fs::create_dir(lab.mirror("x.ndb")).unwrap();
    check(&publisher, "unchanged | x.ndb: x.ndb is a directory");
    fs::remove_dir(lab.mirror("x.ndb")).unwrap();
    let secret = lab.root.path().join("secret");
    fs::write(&secret, "root:x:0:0").unwrap();
    symlink(secret, lab.mirror("x.ndb")).unwrap();
    check(&publisher, "unchanged | x.ndb: x.ndb is a symbolic link");
    lab.remove("x.ndb");
    nix::unistd::mkfifo(&lab.mirror("x.ndb"), Mode::S_IRWXU).unwrap();
    check(&publisher, "unchanged | x.ndb: x.ndb is a pipe");
    lab.remove("x.ndb");

    lab.put("local.ndb", b"a");
    lab.put("LOCAL.ndb", b"b");
    check(
        &publisher,
        "1.2 LOCAL.ndb daily.cud=7 | local.ndb: local.ndb and LOCAL.ndb are one name where case does not count",
    );
    lab.put("LOCAL.ndb", b"bb"); // the published one keeps its name
    check(&publisher, "1.3 LOCAL.ndb daily.cud=7 | local.ndb: ");
}

#[test]
fn nothing_is_captured_in_the_middle_of_a_freshclam_run() {
    let lab = Lab::with_daily(7);
    let publisher = lab.publisher("state");
    let run = lab.mirror("tmp.0123456789");
    fs::create_dir(&run).unwrap();
    lab.put("local.ndb", b"Lab.Local:0:*:6c6f63616c\n");
    let waits = "| official: a freshclam run is open in the mirror";
    let found = publish(&publisher);
    assert!(
        found.starts_with("1.1 local.ndb | ") && found.contains(waits),
        "{found}"
    );
    fs::remove_dir(&run).unwrap();
    check(&publisher, "1.2 daily.cud=7 local.ndb");

    fs::create_dir(&run).unwrap();
    lab.put("daily.cud", &container("daily", 8, 10));
    expect(&publish(&publisher), &format!("unchanged {waits}"));
    expect(
        &accept_units(&publisher, &["local.ndb"]),
        &format!("unchanged {waits}"),
    );
    let accepted = accept_units(&publisher, &["daily.cud"]);
    assert!(
        accepted.starts_with("1.3 daily.cud=8 local.ndb in spite of: official: a freshclam run"),
        "{accepted}"
    );
}

#[test]
fn a_refusal_survives_a_restart_and_ends_when_the_mirror_is_whole() {
    let mut lab = Lab::with_daily(7);
    lab.settings.mirror.on_bad_unit = OnBadUnit::Refuse;
    let publisher = lab.publisher("state");
    publish(&publisher);
    lab.put("daily.cud", b"broken");
    publish(&publisher);
    let refusal = publisher.refusal().unwrap();
    drop(publisher);

    let publisher = lab.publisher("state");
    assert_eq!(publisher.refusal(), Some(refusal.clone()));
    publish(&publisher);
    assert_eq!(publisher.refusal(), Some(refusal)); // one reason, one date
    lab.put("daily.cud", &container("daily", 7, 10));
    check(&publisher, "unchanged");
    assert_eq!(publisher.refusal(), None);
    drop(publisher);
    assert_eq!(lab.publisher("state").refusal(), None);
}

#[test]
fn a_restart_goes_on_with_the_numbers_and_the_publisher_id() {
    let lab = Lab::with_daily(7);
    let publisher = lab.publisher("state");
    publish(&publisher);
    let first = publisher.current().unwrap();
    drop(publisher);
    let publisher = lab.publisher("state");
    let again = publisher.current().unwrap();
    assert_eq!(again.payload_sha256(), first.payload_sha256());
    check(&publisher, "unchanged");
    lab.put("daily.cud", &container("daily", 8, 10));
    check(&publisher, "1.2 daily.cud=8");
    assert_eq!(publisher.current().unwrap().publisher, first.publisher);
}

#[test]
fn a_damaged_generation_does_not_give_its_number_away_again() {
    let lab = Lab::with_daily(7);
    let publisher = lab.publisher("state");
    publish(&publisher);
    lab.put("daily.cud", &container("daily", 8, 10));
    publish(&publisher);
    drop(publisher);
    let state = lab.root.path().join("state");
    fs::write(state.join("generations/1-2.json"), "{").unwrap();
    let publisher = lab.publisher("state");
    assert_eq!(publisher.current().unwrap().generation, Generation::FIRST);
    check(&publisher, "1.3 daily.cud=8");
}

#[test]
fn one_master_at_a_time_has_the_state_directory() {
    let lab = Lab::new();
    let path = lab.root.path().join("state");
    let held = lab.open(&path).unwrap();
    let second = lab.open(&path).unwrap_err();
    let told = chain(&second);
    assert!(told.contains("in use") && told.contains("lock"), "{told}");
    drop(held);
    lab.open(&path).unwrap();
}

#[test]
fn the_manifest_key_must_be_in_the_key_set() {
    let mut lab = Lab::new();
    let start = |lab: &Lab, seed| {
        let store = lab.store("state");
        let settings = lab.settings.clone();
        Publisher::new(
            settings,
            store,
            key(seed),
            lab.keys.clone(),
            lab.directives.subscribe(),
            Activity::default(),
        )
        .map(|_| ())
    };
    assert!(matches!(start(&lab, 9), Err(StartError::Key { .. })));
    lab.settings.fleet = "shop".parse().unwrap();
    assert!(matches!(
        start(&lab, MANIFEST),
        Err(StartError::Fleet { .. })
    ));
}

#[test]
fn a_raised_epoch_is_published_at_once_from_number_one() {
    let mut lab = Lab::with_daily(7);
    let publisher = lab.publisher("state");
    publish(&publisher);
    lab.put("daily.cud", &container("daily", 8, 10));
    publish(&publisher);
    let last = publisher.current().unwrap();
    drop(publisher);

    lab.keys = key_set(2, 2, MANIFEST);
    let publisher = lab.publisher("state");
    assert!(publisher.current().is_none(), "agents refuse the old epoch");
    assert!(publisher.is_due());
    check(&publisher, "2.1 daily.cud=8");
    let first = publisher.current().unwrap();
    assert_eq!(first.previous, Some(last.payload_sha256()));
    assert!(!publisher.is_due());
    drop(publisher);

    lab.keys = key_set(1, 1, MANIFEST);
    let (store, keys) = (lab.store("state"), lab.keys.clone());
    let older = Publisher::new(
        lab.settings.clone(),
        store,
        key(MANIFEST),
        keys,
        lab.directives.subscribe(),
        Activity::default(),
    );
    assert!(matches!(older, Err(StartError::Epoch { .. })));
}

#[test]
fn a_new_manifest_key_signs_anew_and_the_old_generations_are_still_believed() {
    let mut lab = Lab::with_daily(7);
    let publisher = lab.publisher("state");
    publish(&publisher);
    drop(publisher);
    lab.keys = key_set(2, 1, 8);
    let store = lab.store("state");
    let publisher = Publisher::new(
        lab.settings.clone(),
        store,
        key(8),
        lab.keys.clone(),
        lab.directives.subscribe(),
        Activity::default(),
    )
    .unwrap();
    assert!(publisher.is_due());
    check(&publisher, "1.2 daily.cud=7");
    assert_eq!(publisher.store().manifests().len(), 2);
}

#[test]
fn a_rejected_content_is_held_until_it_changes_or_is_accepted() {
    let lab = Lab::with_daily(7);
    let publisher = lab.publisher("state");
    publish(&publisher);
    lab.put("daily.cud", &container("daily", 8, 10));
    publish(&publisher);
    let halted = publisher.current().unwrap();
    lab.withdraw(&halted);
    lab.put("daily.cud", &container("daily", 8, 11));
    check(&publisher, "1.3 daily.cud=8");

    lab.put("daily.cud", &container("daily", 8, 10));
    let held = "held: the mirror has the databases of generation 1.2, which was halted";
    check(&publisher, held);
    let accepted = accept(&publisher);
    assert!(
        accepted.starts_with("1.4 daily.cud=8 in spite of: the mirror has"),
        "{accepted}"
    );
    assert_eq!(publish(&publisher), "unchanged");
}

/// A manifest of this fleet, signed with its key by some master.
fn elsewhere(lab: &Lab, publisher: &str, number: u64) -> Verified<Manifest> {
    let file = ManifestFile {
        captured: None,
        name: "daily.cud".parse().unwrap(),
        size: 1,
        sha256: Digest::of(b"elsewhere"),
        container: None,
    };
    let manifest = Manifest {
        fleet: "bank".parse().unwrap(),
        epoch: lab.keys.epoch,
        generation: Generation::new(number).unwrap(),
        publisher: PublisherId(publisher.to_owned()),
        created: Timestamp::UNIX_EPOCH,
        previous: None,
        rollback_of: None,
        content: content_digest([(&file.name, file.size, &file.sha256)]),
        files: vec![file],
    };
    sign(manifest, &key(MANIFEST))
}

#[test]
fn a_lost_state_directory_goes_on_above_the_fleet_and_under_its_publisher() {
    let lab = Lab::with_daily(7);
    let publisher = lab.publisher("new");
    publish(&publisher);
    let theirs = elsewhere(&lab, "lost", 57);
    let adoption = publisher.adopt(theirs.envelope()).unwrap();
    assert_eq!(
        adoption,
        Adoption::Restored {
            position: theirs.position(),
            publisher: true
        }
    );
    assert!(publisher.current().is_none(), "agents would refuse it");
    assert!(publisher.is_due());
    drop(publisher);

    let publisher = lab.publisher("new");
    check(&publisher, "1.58 daily.cud=7");
    let current = publisher.current().unwrap();
    assert_eq!(current.publisher, theirs.publisher);
    assert_eq!(current.previous, Some(theirs.payload_sha256()));
    assert!(!publisher.is_due());
    assert_eq!(publisher.adopt(theirs.envelope()).unwrap(), Adoption::Known);
}

#[test]
fn a_state_directory_from_a_backup_goes_on_above_the_fleet() {
    let lab = Lab::with_daily(7);
    let publisher = lab.publisher("state");
    publish(&publisher);
    let ours = publisher.current().unwrap();
    publisher.accepted(&ours.payload_sha256()).unwrap();
    // One number, two manifests: the fleet has another first generation of ours than the backup.
    for number in [1, 5] {
        let theirs = elsewhere(&lab, &ours.publisher.0, number);
        let position = theirs.position();
        let expected = Adoption::Restored {
            position,
            publisher: false,
        };
        assert_eq!(publisher.adopt(theirs.envelope()).unwrap(), expected);
    }
    check(&publisher, "1.6 daily.cud=7");
}

#[test]
fn two_masters_are_told_apart_once_an_agent_follows_one() {
    let lab = Lab::with_daily(7);
    let publisher = lab.publisher("state");
    publish(&publisher);
    let ours = publisher.current().unwrap();
    assert_eq!(publisher.adopt(ours.envelope()).unwrap(), Adoption::Known);
    let theirs = elsewhere(&lab, "second", 9);
    let adoption = publisher.adopt(theirs.envelope()).unwrap();
    assert!(matches!(adoption, Adoption::OtherPublisher { .. }));
    assert!(!publisher.is_due());
    check(&publisher, "unchanged");
}

#[test]
fn an_unsigned_or_foreign_claim_moves_nothing() {
    let lab = Lab::with_daily(7);
    let publisher = lab.publisher("state");
    publish(&publisher);
    let forged = sign((*elsewhere(&lab, "thief", 99)).clone(), &key(9));
    assert!(matches!(
        publisher.adopt(forged.envelope()),
        Err(AdoptError::Manifest(_))
    ));
    let mut foreign = (*elsewhere(&lab, "p", 99)).clone();
    foreign.fleet = "shop".parse().unwrap();
    let foreign = sign(foreign, &key(MANIFEST));
    assert!(matches!(
        publisher.adopt(foreign.envelope()),
        Err(AdoptError::Fleet { .. })
    ));
    assert!(!publisher.is_due());
}

#[test]
fn numbers_that_a_thief_ran_up_end_with_a_way_out() {
    let lab = Lab::with_daily(7);
    let publisher = lab.publisher("state");
    let theirs = elsewhere(&lab, "thief", u64::MAX);
    publisher.adopt(theirs.envelope()).unwrap();
    let error = publisher
        .publish(
            &Request::default(),
            "tester",
            Timestamp::now(),
            &CancellationToken::new(),
        )
        .unwrap_err();
    assert!(error.to_string().contains("raise the epoch"), "{error}");
}

#[test]
fn retention_keeps_what_the_kept_generations_need_and_nothing_else() {
    let mut lab = Lab::with_daily(1);
    lab.settings.keep = 2;
    lab.put("main.cud", &container("main", 60, 10));
    let publisher = lab.publisher("state");
    for version in 1..=4 {
        lab.put("daily.cud", &container("daily", version, 10));
        publish(&publisher);
        let manifests = publisher.store().manifests();
        let target = &manifests.last().unwrap().files[0];
        for old in &manifests {
            let have = clamcast_proto::wire::Have::Sha256(old.files[0].sha256);
            let store = publisher.store();
            store.encode(store.pair(&have, target, false)).unwrap();
        }
    }
    let state = lab.root.path().join("state");
    let names = |directory: &str| {
        let mut names: Vec<_> = fs::read_dir(state.join(directory))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let manifests = publisher.store().manifests();
    let mut objects: Vec<_> = manifests
        .iter()
        .flat_map(|manifest| &manifest.files)
        .map(|file| file.sha256.to_string())
        .collect();
    objects.sort();
    objects.dedup();
    assert_eq!(objects.len(), 3, "two daily and one main");
    assert_eq!(names("objects"), objects);
    assert_eq!(names("generations"), ["1-3.json", "1-4.json"]);
    let [old, new] = [0, 1].map(|at: usize| manifests[at].files[0].sha256);
    assert_eq!(names("deltas"), [format!("{old}-{new}.v{VERSION}.sealed")]);
    drop(publisher);

    // What a crash left behind is gone after the next start.
    fs::write(state.join("tmp/half"), "x").unwrap();
    fs::create_dir(state.join("tmp/load")).unwrap();
    fs::write(state.join("objects").join("0".repeat(64)), "x").unwrap();
    let other_version = format!("deltas/{old}-{new}.v{}.sealed", VERSION + 1);
    fs::write(state.join(other_version), "x").unwrap();
    let publisher = lab.publisher("state");
    assert_eq!(names("objects"), objects);
    assert_eq!(names("deltas"), [format!("{old}-{new}.v{VERSION}.sealed")]);
    assert!(names("tmp").is_empty());
    check(&publisher, "unchanged");
}

#[test]
fn what_is_held_leaves_nothing_in_the_store() {
    let lab = Lab::with_daily(7);
    let publisher = lab.publisher("state");
    publish(&publisher);
    lab.put("local.ndb", b"");
    lab.put("daily.cud", b"broken");
    publish(&publisher);
    let objects = fs::read_dir(lab.root.path().join("state/objects")).unwrap();
    assert_eq!(objects.count(), 1);
}

#[test]
fn objects_are_read_only() {
    let lab = Lab::with_daily(7);
    let publisher = lab.publisher("state");
    publish(&publisher);
    let current = publisher.current().unwrap();
    let object = publisher.store().object(&current.files[0].sha256);
    assert!(is_read_only(&object));
}

fn is_read_only(path: &Path) -> bool {
    fs::metadata(path).unwrap().permissions().readonly()
}

#[test]
fn a_rollback_is_published_once_also_when_the_mirror_was_published_since() {
    let lab = Lab::with_daily(7);
    let publisher = lab.publisher("state");
    publish(&publisher);
    lab.put("daily.cud", &container("daily", 8, 11));
    publish(&publisher);
    let [to, of] = [0, 1].map(|index| publisher.store().manifests()[index].position());
    let roll_back = || {
        publisher
            .roll_back(Rollback { to, of }, Timestamp::now())
            .unwrap()
    };
    let (first, announcement) = roll_back();
    assert!(announcement.is_some() && first.rollback_of == Some(of));
    lab.put("daily.cud", &container("daily", 9, 12));
    check(&publisher, "1.4 daily.cud=9");
    let (again, announcement) = roll_back();
    assert_eq!(again.position(), first.position());
    assert!(announcement.is_none());
    assert_eq!(publisher.store().manifests().len(), 4);
}

#[test]
fn what_the_fleet_rejected_is_not_the_newest() {
    let lab = Lab::with_daily(7);
    let publisher = lab.publisher("state");
    assert!(publisher.newest().is_none());
    publish(&publisher);
    lab.put("daily.cud", &container("daily", 8, 11));
    publish(&publisher);
    let newest = || publisher.newest().unwrap().position();
    let bad = publisher.current().unwrap();
    assert_eq!(newest(), bad.position());
    lab.withdraw(&bad);
    assert_eq!(newest().generation, Generation::FIRST);
}
