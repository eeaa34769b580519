//! What the master knows of its agents, told in receipts.

use super::*;
use crate::fleet::rollout::Answer;
use clamcast_proto::dsse::sign;
use clamcast_proto::identity::Serial;
use clamcast_proto::manifest::{ManifestFile, Publisher, content_digest};
use clamcast_proto::receipt::{
    Drift, FileState, Found, InstallNumber, Outcome, Proof, ReceiptFile,
};
use clamcast_proto::revocation::Revoked;
use clamcast_proto::wire::{Feature, Features, Phase};
use clamcast_proto::{Epoch, Generation};
use ed25519_dalek::SigningKey;

const DEADLINE: Duration = Duration::from_secs(900);

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

pub(crate) fn withdrawal(manifest: &Manifest) -> Withdrawal {
    Withdrawal {
        content: manifest.content,
        position: manifest.position(),
        outcome: Ending::Halted,
        since: at(0),
        new: None,
        blamed: BTreeSet::new(),
    }
}

pub(crate) fn manifest(generation: u64) -> Arc<Verified<Manifest>> {
    let name = "daily.cld".parse().unwrap();
    let sha256 = Digest::of(&generation.to_be_bytes());
    let manifest = Manifest {
        fleet: "bank".parse().unwrap(),
        epoch: Epoch(1),
        generation: Generation::new(generation).unwrap(),
        publisher: Publisher("p".into()),
        created: at(0),
        previous: None,
        rollback_of: None,
        content: content_digest([(&name, 1, &sha256)]),
        files: vec![ManifestFile {
            captured: None,
            name,
            size: 1,
            sha256,
            container: None,
        }],
    };
    Arc::new(sign(manifest, &SigningKey::from_bytes(&[1; 32])))
}

pub(crate) fn receipt(generation: u64, seq: u64, outcome: Outcome) -> Verified<Receipt> {
    let manifest = manifest(generation);
    let files = manifest.files.iter().map(|file| {
        let state = FileState {
            name: file.name.clone(),
            size: file.size,
            sha256: file.sha256,
        };
        ReceiptFile::new(state, &manifest)
    });
    let receipt = Receipt {
        fleet: manifest.fleet.clone(),
        agent: "web1".parse().unwrap(),
        seq,
        epoch: manifest.epoch,
        generation: manifest.generation,
        manifest_sha256: manifest.payload_sha256(),
        install: InstallNumber(seq),
        outcome,
        content: None,
        files: files.collect(),
        missing: Vec::new(),
        unlisted: 0,
        foreign: vec![],
        adopted: vec![],
        drift: vec![],
        clamd: ClamdReport {
            proof: Proof::Canary,
            ..ClamdReport::default()
        },
        error: (outcome == Outcome::Refused).then(|| "Malformed database".to_owned()),
        blamed: None,
        took: 1.0,
        time: at(100 + i64::try_from(seq).unwrap()),
    };
    sign(receipt, &SigningKey::from_bytes(&[2; 32]))
}

fn link(id: u64) -> Link {
    let (address, serial) = ("127.0.0.1:1".parse().unwrap(), Serial("01".into()));
    Link::new(LinkId(id), at(0), address, serial, at(1 << 30))
}

/// Nobody, with these waves.
pub(crate) fn fleet_of(waves: &[&str]) -> Fleet {
    let rules = Rules {
        waves: waves.iter().map(|wave| wave.parse().unwrap()).collect(),
        settle: Duration::ZERO,
        refused_max: "2%".parse().unwrap(),
        unwell_max: "20%".parse().unwrap(),
        rollback_on_halt: true,
        deadline: DEADLINE,
        windows: BTreeMap::new(),
    };
    Fleet::new(vec![], Rollout::default(), rules, vec![])
}

/// One agent, `web1`, connected, with these receipts, generation `wanted` wanted.
fn fleet(wanted: u64, receipts: &[(u64, Outcome)]) -> Fleet {
    let mut fleet = fleet_of(&[]);
    fleet.connected(
        &"web1".parse().unwrap(),
        vec![],
        Digest::of(b"certificate"),
        link(1),
    );
    fleet.published(&manifest(wanted), false, at(0));
    fleet.step(at(0)); // without waves everybody is wanted at it
    for (seq, (generation, outcome)) in (1..).zip(receipts) {
        assert!(fleet.receipt(&receipt(*generation, seq, *outcome), at(0)));
    }
    fleet
}

fn check(wanted: u64, receipts: &[(u64, Outcome)], standing: Standing, row: &str) {
    let fleet = fleet(wanted, receipts);
    assert_eq!(
        fleet.standing(&"web1".parse().unwrap(), at(200), DEADLINE),
        standing
    );
    let found = &fleet.rows(at(200), DEADLINE)[0];
    let live = if found.live { "live" } else { "not live" };
    let text = format!(
        "{:?} {live}: {}",
        found.position.map_or(0, |it| it.generation.number()),
        found.outcome
    );
    assert_eq!(text, row);
}

#[test]
fn versions_with_less_than_three_canaries_are_reported() {
    let mut fleet = fleet(1, &[]);
    fleet.rules.waves = vec!["group:canary".parse().unwrap()];
    let mut check = |hosts: &[(&str, &str, &str)], expected: &[(&str, usize, usize)]| {
        for (id, (name, group, version)) in (2..).zip(hosts) {
            let name = name.parse().unwrap();
            fleet.connected(
                &name,
                vec![group.parse().unwrap()],
                Digest::of(b"certificate"),
                link(id),
            );
            let clamd = ClamdReport {
                version: Some((*version).to_owned()),
                ..ClamdReport::default()
            };
            fleet.hello(&name, LinkId(id), Features::default(), clamd, vec![]);
        }
        let thin = fleet.thin_versions();
        let thin = thin
            .iter()
            .map(|it| (it.version.as_str(), it.canaries, it.hosts));
        assert_eq!(thin.collect::<Vec<_>>(), expected);
    };
    check(&[("db1", "db", "ClamAV 1.0.7/1/Sat")], &[]); // no canaries: reported elsewhere
    check(
        &[("web2", "canary", "ClamAV 1.4.3/2/Sun")],
        &[("ClamAV 1.0.7", 0, 1)],
    );
    check(
        &[
            ("db2", "db", "ClamAV 1.0.7"),
            ("db3", "db", "ClamAV 1.4.3/1"),
        ],
        &[("ClamAV 1.0.7", 0, 2), ("ClamAV 1.4.3", 1, 1)],
    );
    check(
        &[
            ("web3", "canary", "ClamAV 1.0.7/1/Sat"),
            ("web4", "canary", "ClamAV 1.0.7"),
            ("web5", "canary", "ClamAV 1.0.7"),
        ],
        &[("ClamAV 1.4.3", 1, 1)],
    );
}

#[test]
fn a_host_stands_where_its_receipts_say() {
    use Outcome::{HostFault, Installed, Live, Refused};
    check(7, &[], Standing::Behind, "0 not live: none");
    check(7, &[(7, Live)], Standing::Conformant, "7 live: live");
    check(8, &[(7, Live)], Standing::Behind, "7 live: live");
    check(
        7,
        &[(7, Installed)],
        Standing::Behind,
        "7 not live: installed",
    );
    check(
        8,
        &[(7, Live), (8, Refused)],
        Standing::Failed,
        "7 live: refused",
    );
    check(
        8,
        &[(7, Live), (8, HostFault)],
        Standing::Failed,
        "7 live: host_fault",
    );
    check(
        9,
        &[(7, Live), (8, Refused)],
        Standing::Behind,
        "7 live: refused",
    );
    // What it went back to is seen in clamd once more.
    check(
        8,
        &[(7, Live), (8, Refused), (7, Live)],
        Standing::Failed,
        "7 live: refused",
    );
    check(
        8,
        &[(7, Live), (8, Refused), (7, HostFault)],
        Standing::Failed,
        "7 live: refused",
    );
    check(
        7,
        &[(7, Live), (7, HostFault)],
        Standing::Failed,
        "7 live: host_fault",
    );
    check(
        8,
        &[(7, Live), (8, HostFault), (8, Live)],
        Standing::Conformant,
        "8 live: live",
    );
}

#[test]
fn whoever_declines_what_it_is_wanted_at_is_not_conformant() {
    let mut fleet = fleet(7, &[(7, Outcome::Live)]);
    let (name, link) = ("web1".parse().unwrap(), LinkId(1));
    fleet.offered(&name, link, OfferId(9), &manifest(7), at(0));
    fleet.declined(&name, link, "older than 1.8".to_owned(), None, at(5));
    let standing = fleet.standing(&name, at(0), DEADLINE);
    assert_eq!(standing, Standing::Failed);
}

#[test]
fn a_receipt_that_is_sent_again_is_known() {
    let mut fleet = fleet(7, &[(7, Outcome::Live)]);
    assert!(!fleet.receipt(&receipt(7, 1, Outcome::Live), at(0)));
}

#[test]
fn a_changed_file_is_not_conformant() {
    let mut fleet = fleet(7, &[]);
    let mut changed = (*receipt(7, 1, Outcome::Live)).clone();
    changed.files[0].file.sha256 = Digest::of(b"drift");
    fleet.receipt(&sign(changed, &SigningKey::from_bytes(&[2; 32])), at(0));
    assert_eq!(
        fleet.standing(&"web1".parse().unwrap(), at(200), DEADLINE),
        Standing::Behind
    );
}

#[test]
fn a_drifted_file_is_named_and_its_news_answer_no_offer() {
    let name: AgentName = "web1".parse().unwrap();
    let mut fleet = fleet(7, &[(7, Outcome::Live)]);
    fleet.offered(&name, LinkId(1), OfferId(9), &manifest(7), at(150));
    let mut drifted = |seq, mended, error: Option<&str>| {
        let mut receipt = (*receipt(7, seq, Outcome::Live)).clone();
        receipt.drift = vec![Drift {
            name: "daily.cld".parse().unwrap(),
            found: Found::Missing,
            mended,
        }];
        receipt.error = error.map(str::to_owned);
        fleet.receipt(&sign(receipt, &SigningKey::from_bytes(&[2; 32])), at(150));
        fleet.rows(at(200), DEADLINE).remove(0)
    };
    let row = drifted(2, false, Some("freshclam (pid 812)"));
    assert!(row.live && !row.conformant);
    assert_eq!((row.offered, row.answered), (Some(OfferId(9)), None));
    let row = drifted(3, true, None);
    assert!(row.conformant && row.error.is_none());
    assert_eq!(row.answered.map(|it| it.offer), Some(OfferId(9)));
    let row = drifted(4, false, Some("freshclam (pid 812)"));
    assert_eq!(
        row.error.unwrap(),
        "daily.cld is missing: freshclam (pid 812)"
    );
}

/// `web1`, complete at 7, was offered 8, and this came of it. No halt takes anybody back.
fn after(outcome: Outcome) -> Fleet {
    let name = "web1".parse().unwrap();
    let mut fleet = fleet(7, &[(7, Outcome::Live)]);
    fleet.rules.waves = vec!["100%".parse().unwrap()];
    fleet.rules.rollback_on_halt = false;
    fleet.published(&manifest(8), false, at(150));
    fleet.step(at(150));
    fleet.offered(&name, LinkId(1), OfferId(1), &manifest(8), at(150));
    assert!(fleet.receipt(&receipt(8, 2, outcome), at(160)));
    fleet
}

fn abort(fleet: &mut Fleet) {
    let order = Order::Abort("ticket 7".to_owned());
    fleet.order(order, at(170)).unwrap();
}

/// Which generation `web1` is to be offered, is vouched for, and is offered when it lacks files.
#[track_caller]
fn check_offers(fleet: &Fleet, kept: &[u64], expected: [Option<u64>; 3]) {
    let (name, now) = ("web1".parse().unwrap(), at(200));
    let is_kept = |position: Position| kept.contains(&position.generation.number());
    let found = [
        fleet.wanted(&name, now),
        fleet.vouched(&name, now),
        fleet.mending(&name, is_kept, now),
    ];
    let found = found.map(|it| it.map(|manifest| manifest.generation.number()));
    assert_eq!(found, expected);
}

#[test]
fn who_lacks_files_is_offered_what_it_is_wanted_at_or_where_it_failed_with_that_what_it_has() {
    for failed in [Outcome::Refused, Outcome::HostFault] {
        check_offers(&after(failed), &[7, 8], [Some(8), Some(8), Some(7)]);
        check_offers(&after(failed), &[8], [Some(8), Some(8), Some(8)]);
        let mut halted = after(failed);
        abort(&mut halted);
        check_offers(&halted, &[7, 8], [None, Some(7), Some(7)]);
        check_offers(&halted, &[8], [None, Some(7), None]);
    }
    check_offers(&after(Outcome::Live), &[7, 8], [Some(8), Some(8), Some(8)]);
}

#[test]
fn what_was_taken_back_is_neither_vouched_for_nor_mended() {
    let mut fleet = after(Outcome::Live);
    abort(&mut fleet);
    check_offers(&fleet, &[7, 8], [None, None, None]);
}

#[test]
fn what_must_not_be_published_again_is_not_vouched_for_though_the_rollout_was_lost() {
    let mut fleet = fleet(7, &[(7, Outcome::Live)]);
    fleet.rollout = Rollout::lost("gone".to_owned(), at(100));
    check_offers(&fleet, &[7], [None, Some(7), Some(7)]);
    fleet.rollout.were_withdrawn([withdrawal(&manifest(7))]);
    check_offers(&fleet, &[7], [None, None, None]);
}

#[test]
fn who_has_what_was_taken_back_is_not_where_it_should_be() {
    let mut fleet = fleet(7, &[(7, Outcome::Live)]);
    assert!(fleet.rows(at(200), DEADLINE)[0].conformant);
    fleet.rollout.were_withdrawn([withdrawal(&manifest(7))]);
    let row = fleet.rows(at(200), DEADLINE).remove(0);
    assert_eq!(
        (row.conformant, row.error.as_deref()),
        (false, Some("1.7 was taken back"))
    );
    assert_eq!(fleet.counts(at(200), DEADLINE).behind, 1);
}

#[test]
fn an_offer_keeps_that_its_host_is_there_over_a_restart() {
    let mut fleet = fleet(7, &[]);
    fleet.offered(
        &"web1".parse().unwrap(),
        LinkId(1),
        OfferId(9),
        &manifest(7),
        at(90_000),
    );
    let record = fleet.record(&"web1".parse().unwrap()).unwrap();
    assert_eq!(record.seen, at(90_000));
}

#[test]
fn the_file_that_a_refusal_blames_is_kept_with_it() {
    for (outcome, expected) in [
        (Outcome::Refused, Some("x.ndb")),
        (Outcome::HostFault, None),
    ] {
        let mut fleet = after(outcome);
        let blaming = Receipt {
            blamed: Some("x.ndb".parse().unwrap()),
            ..Receipt::clone(&receipt(8, 3, outcome))
        };
        let blaming = sign(blaming, &SigningKey::from_bytes(&[2; 32]));
        assert!(fleet.receipt(&blaming, at(192)));
        let record = fleet.record(&"web1".parse().unwrap()).unwrap();
        let saved = serde_json::to_string(record).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&saved).unwrap(), *record);
        let blamed = fleet.members()[0].blamed.map(|name| name.as_str());
        assert_eq!(blamed, expected);
    }
}

#[test]
fn a_mended_host_says_nothing_new_of_what_it_failed_with_and_is_then_offered_that_again() {
    for (failed, answer) in [
        (Outcome::Refused, Answer::Refused),
        (Outcome::HostFault, Answer::Unwell),
    ] {
        for mended in [Outcome::Live, Outcome::HostFault] {
            let name: AgentName = "web1".parse().unwrap();
            let mut fleet = after(failed);
            let said = |fleet: &Fleet| {
                let Member { at, answer, .. } = fleet.members()[0];
                (at, answer, fleet.members()[0].offered)
            };
            let before = said(&fleet);
            assert_eq!(before.1, Some(answer));
            fleet.offered(&name, LinkId(1), OfferId(2), &manifest(7), at(190));
            assert_eq!(said(&fleet), before);
            check_offers(&fleet, &[7, 8], [None, Some(8), Some(7)]);
            fleet.progress(&name, LinkId(1), Phase::Fetching, None, 0, at(191));
            assert!(fleet.receipt(&receipt(7, 3, mended), at(192)));
            assert_eq!(said(&fleet), before);
            check_offers(&fleet, &[7, 8], [Some(8), Some(8), Some(7)]);
        }
    }
}

#[test]
fn what_a_host_has_is_forced_on_it_whatever_it_took_before() {
    let name = "web1".parse().unwrap();
    let mut fleet = after(Outcome::Refused);
    abort(&mut fleet);
    let eight = manifest(8).position();
    let past = |generation| fleet.past(&name, &manifest(generation));
    assert_eq!([6, 7, 8, 9].map(past), [Some(eight), None, None, None]);
    // Then it is where the master wants it, and so says the answer, whatever it refused before.
    let (link, mended) = (LinkId(1), receipt(7, 3, Outcome::Live));
    fleet.offered(&name, link, OfferId(2), &manifest(7), at(190));
    fleet.receipt(&mended, at(192));
    let row = fleet.rows(at(200), DEADLINE).remove(0);
    let answered = Answered {
        offer: OfferId(2),
        outcome: Some(Outcome::Live),
    };
    assert_eq!((row.conformant, row.answered), (true, Some(answered)));
    assert_eq!(row.outcome, "refused");
}

#[test]
fn a_receipt_from_before_an_order_does_not_answer_it() {
    let name = "web1".parse().unwrap();
    let mut fleet = fleet(8, &[(7, Outcome::Live)]);
    fleet.offered(&name, LinkId(1), OfferId(1), &manifest(8), at(1000));
    fleet.forced(&name, LinkId(1));
    assert!(fleet.receipt(&receipt(8, 2, Outcome::HostFault), at(1001)));
    assert_eq!(fleet.offer(&name), Some(OfferId(1)));
    fleet.progress(&name, LinkId(1), Phase::Fetching, None, 0, at(1002));
    assert!(fleet.receipt(&receipt(8, 3, Outcome::Live), at(1003)));
    assert_eq!(fleet.offer(&name), None);
}

#[test]
fn silence_past_the_deadline_counts_as_failure() {
    let name = "web1".parse().unwrap();
    let mut fleet = fleet(8, &[(7, Outcome::Live)]);
    fleet.offered(&name, LinkId(1), OfferId(1), &manifest(8), at(1000));
    assert_eq!(fleet.standing(&name, at(1900), DEADLINE), Standing::Behind);
    assert_eq!(fleet.standing(&name, at(1901), DEADLINE), Standing::Failed);
    fleet.progress(&name, LinkId(1), Phase::Fetching, None, 0, at(1901));
    assert_eq!(fleet.standing(&name, at(1902), DEADLINE), Standing::Behind);
    let error = |fleet: &Fleet, now| fleet.rows(at(now), DEADLINE).remove(0).error;
    assert_eq!(error(&fleet, 1930), None);
    assert!(error(&fleet, 1931).unwrap().ends_with("for 30s"));
    assert_eq!(
        error(&fleet, 1901 + 4 * 60).unwrap(),
        "no sign of progress with 1.8 for 4m"
    );
    fleet.progress(&name, LinkId(1), Phase::Staged, Some(at(9000)), 0, at(1902));
    assert_eq!(error(&fleet, 8000), None);
    let announced = fleet.standing(&name, at(9000), DEADLINE);
    assert_eq!(
        announced,
        Standing::Behind,
        "it said that it would be silent"
    );
    // Of a silence without end half a day is believed, and none that lies in the past.
    fleet.progress(
        &name,
        LinkId(1),
        Phase::Staged,
        Some(Timestamp::MAX),
        0,
        at(2000),
    );
    let end = 2000 + SILENCE_MAX.as_secs() + 900;
    assert_eq!(fleet.standing(&name, at(end), DEADLINE), Standing::Behind);
    assert_eq!(
        fleet.standing(&name, at(end + 1), DEADLINE),
        Standing::Failed
    );
    fleet.progress(
        &name,
        LinkId(1),
        Phase::Staged,
        Some(Timestamp::MIN),
        0,
        at(end),
    );
    assert_eq!(fleet.standing(&name, at(end), DEADLINE), Standing::Behind);
}

#[test]
fn a_new_connection_replaces_the_old_one_whose_end_then_means_nothing() {
    let name = "web1".parse().unwrap();
    let mut fleet = fleet(7, &[]);
    let arrival = Arrival {
        new: false,
        changed: false,
        replaced: Some(LinkId(1)),
        twins: None,
        is_new_certificate: false,
    };
    assert_eq!(
        fleet.connected(&name, vec![], Digest::of(b"certificate"), link(2)),
        arrival
    );
    fleet.disconnected(&name, LinkId(1), at(5));
    assert_eq!(fleet.counts(at(5), DEADLINE).connected, 1);
    fleet.disconnected(&name, LinkId(2), at(6));
    assert_eq!(fleet.counts(at(6), DEADLINE).connected, 0);
}

/// When `web1`, which was offered 8 at 1000, last made real progress.
fn renewed(fleet: &Fleet) -> i64 {
    let record = fleet.record(&"web1".parse().unwrap()).unwrap();
    record.taken.as_ref().unwrap().renewed.as_second()
}

fn offered_8() -> (Fleet, AgentName) {
    let name: AgentName = "web1".parse().unwrap();
    let mut fleet = fleet(8, &[(7, Outcome::Live)]);
    fleet.offered(&name, LinkId(1), OfferId(1), &manifest(8), at(1000));
    (fleet, name)
}

#[test]
fn a_phase_is_progress_once_and_a_repeated_message_is_none() {
    let (mut fleet, name) = offered_8();
    let mut tell = |phase, second| {
        fleet.progress(&name, LinkId(1), phase, None, 0, at(second));
        renewed(&fleet)
    };
    assert_eq!(tell(Phase::Fetching, 1010), 1010);
    assert_eq!(tell(Phase::Fetching, 1500), 1010);
    assert_eq!(tell(Phase::Proving, 1600), 1600);
    assert_eq!(tell(Phase::Fetching, 1700), 1600, "back is no progress");
    assert_eq!(tell(Phase::Proving, 1800), 1600);
}

#[test]
fn bytes_are_progress_at_a_minimum_rate_only() {
    let (mut fleet, name) = offered_8();
    let mut tell = |sent, second| {
        let phase = Phase::Fetching;
        fleet.progress(&name, LinkId(1), phase, None, sent, at(second));
        renewed(&fleet)
    };
    assert_eq!(tell(0, 1000), 1000);
    // 60 kbit/s for a minute is less than 16 KiB/s.
    assert_eq!(tell(60 * 7_500, 1060), 1000);
    assert_eq!(tell(120 * (16 << 10), 1120), 1120);
    assert_eq!(tell(120 * (16 << 10) + 10, 1130), 1120);
}

#[test]
fn a_reconnect_or_a_restart_of_the_master_is_no_progress() {
    let (mut fleet, name) = offered_8();
    fleet.progress(&name, LinkId(1), Phase::Fetching, None, 1 << 30, at(1010));
    fleet.connected(&name, vec![], Digest::of(b"certificate"), link(2));
    fleet.offered(&name, LinkId(2), OfferId(2), &manifest(8), at(1500));
    fleet.progress(&name, LinkId(2), Phase::Fetching, None, 10, at(1510));
    assert_eq!(renewed(&fleet), 1010);
    let record = fleet.record(&name).unwrap().clone();
    let text = serde_json::to_string(&record).unwrap();
    assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record);
    let (rollout, rules) = (fleet.rollout().clone(), fleet.rules().clone());
    let fleet = Fleet::new(vec![record], rollout, rules, vec![manifest(8)]);
    assert_eq!(renewed(&fleet), 1010);
    assert!(fleet.members()[0].returning);
}

#[test]
fn an_answer_counts_for_the_version_that_was_known_when_the_host_was_offered() {
    let name: AgentName = "web1".parse().unwrap();
    let mut fleet = fleet(7, &[(7, Outcome::Live)]);
    fleet.rules.waves = vec!["group:canary".parse().unwrap()];
    let hello = |fleet: &mut Fleet, version: &str| {
        let clamd = ClamdReport {
            version: Some(version.to_owned()),
            ..ClamdReport::default()
        };
        fleet.hello(&name, LinkId(1), Features::default(), clamd, vec![]);
        fleet.members()[0].version.to_owned()
    };
    fleet.published(&manifest(8), false, at(100));
    assert_eq!(hello(&mut fleet, "ClamAV 1.4.5/27890/Sat"), "ClamAV 1.4.5");
    assert_eq!(hello(&mut fleet, "ClamAV 1.4.6/27890/Sat"), "ClamAV 1.4.6");
    fleet.offered(&name, LinkId(1), OfferId(1), &manifest(8), at(100));
    assert_eq!(hello(&mut fleet, "ClamAV 1.0.9"), "ClamAV 1.4.6");
    // The report of a clamd that is down names no version: the last one stays.
    assert!(fleet.receipt(&receipt(8, 2, Outcome::Refused), at(110)));
    assert_eq!(fleet.members()[0].version, "ClamAV 1.4.6");
    assert_eq!(
        fleet.record(&name).unwrap().version.as_deref(),
        Some("ClamAV 1.0.9")
    );
}

/// Says Hello with these features, over the connection with this number.
fn greet(fleet: &mut Fleet, name: &AgentName, id: u64, accepts: &[Feature]) -> Option<bool> {
    let accepts = accepts.iter().copied().collect();
    fleet.hello(name, LinkId(id), accepts, ClamdReport::default(), vec![])
}

fn connect(fleet: &mut Fleet, name: &str, id: u64) -> AgentName {
    let name: AgentName = name.parse().unwrap();
    let certificate = Digest::of(name.as_str().as_bytes());
    fleet.connected(&name, vec![], certificate, link(id));
    name
}

fn empty_fleet() -> Fleet {
    let rules = fleet(1, &[]).rules().clone();
    Fleet::new(vec![], Rollout::default(), rules, vec![])
}

#[test]
fn only_plain_names_are_published_while_an_agent_lacks_wide_names() {
    let mut fleet = empty_fleet();
    assert_eq!(fleet.plain_names(), None);
    let web1 = connect(&mut fleet, "web1", 1);
    // Nobody knows yet, and it was never offered anything.
    assert_eq!(fleet.plain_names(), None);
    greet(&mut fleet, &web1, 1, &[Feature::LargeManifests]);
    let said = fleet.directives().plain_names.unwrap();
    assert!(said.starts_with("web1 runs a clamcast-agent"), "{said}");
    for (id, name) in (2..).zip(["web2", "web3", "web4"]) {
        let name = connect(&mut fleet, name, id);
        greet(&mut fleet, &name, id, &[]);
    }
    let said = fleet.plain_names().unwrap();
    assert_eq!(
        said,
        "web1 and 3 more run a clamcast-agent that does not accept such names; upgrade them"
    );
    // An agent that is away counts: it declines such a manifest when it is back.
    fleet.disconnected(&web1, LinkId(1), at(100));
    assert_eq!(fleet.plain_names().unwrap(), said);
    for (id, name) in (11..).zip(["web1", "web2", "web3", "web4"]) {
        let name = connect(&mut fleet, name, id);
        let news = greet(&mut fleet, &name, id, &[Feature::WideNames]);
        assert_eq!(news, Some(true), "it is kept");
    }
    assert_eq!(fleet.plain_names(), None);
}

#[test]
fn a_revoked_agent_that_lacks_wide_names_holds_nobody_up() {
    let mut fleet = empty_fleet();
    let web1 = connect(&mut fleet, "web1", 1);
    greet(&mut fleet, &web1, 1, &[]);
    assert!(fleet.plain_names().is_some());
    let serial = fleet.record(&web1).unwrap().serial.clone();
    fleet.revoked(&RevocationList {
        fleet: "bank".parse().unwrap(),
        version: 1,
        issued: at(0),
        revoked: vec![Revoked {
            name: web1,
            serial,
            time: at(0),
            reason: None,
        }],
    });
    assert_eq!(fleet.plain_names(), None);
}

#[test]
fn what_an_agent_accepts_outlives_a_restart_and_a_record_of_before_accepts_nothing_new() {
    let mut fleet = empty_fleet();
    let web1 = connect(&mut fleet, "web1", 1);
    greet(&mut fleet, &web1, 1, &[Feature::WideNames]);
    let record = fleet.record(&web1).unwrap();
    let mut json = serde_json::to_value(record).unwrap();
    let read: Record = serde_json::from_value(json.clone()).unwrap();
    assert!(!read.lacks(Feature::WideNames));
    json.as_object_mut().unwrap().remove("accepts");
    let old: Record = serde_json::from_value(json).unwrap();
    assert!(old.lacks(Feature::WideNames));
}
