//! Units: what is published, held and rejected one by one.

use super::*;

/// A mirror with a daily database, two lists and their first generation.
fn published() -> (Lab, Publisher) {
    let lab = Lab::with_daily(7);
    lab.put("a.ndb", &list(10));
    lab.put("b.ndb", &list(10));
    let publisher = lab.publisher("state");
    check(&publisher, "1.1 a.ndb b.ndb daily.cud=7");
    (lab, publisher)
}

fn list(lines: usize) -> Vec<u8> {
    let lines = (0..lines).map(|line| format!("Lab.List-{line}:0:*:6c6f63616c{line:04}\n"));
    lines.collect::<String>().into_bytes()
}

#[test]
fn one_bad_unit_holds_no_other_and_its_published_version_stays() {
    let (lab, publisher) = published();
    let old = publisher.current().unwrap();
    lab.put("daily.cud", &container("daily", 8, 10));
    lab.put("b.ndb", &list(11));
    lab.put("a.ndb", b"");
    check(
        &publisher,
        "1.2 a.ndb b.ndb daily.cud=8 | a.ndb: a.ndb is empty, and clamd loads no set with it",
    );
    let new = publisher.current().unwrap();
    let of = |manifest: &Manifest, name: &str| manifest.file(&name.parse().unwrap()).cloned();
    assert_eq!(
        of(&new, "a.ndb"),
        of(&old, "a.ndb"),
        "also when it was captured"
    );
    let captured = |name: &str| of(&new, name).unwrap().captured;
    assert!(captured("a.ndb") < captured("b.ndb"));
    let hold = publisher.holds().into_values().next().unwrap();
    assert_eq!(hold.held.carries.unwrap().captured, captured("a.ndb"));

    // A unit that was never published is left out.
    lab.put("c.hdb", b"");
    lab.put("b.ndb", &list(12));
    check(&publisher, "1.3 a.ndb b.ndb daily.cud=8 | a.ndb: ");
    assert_eq!(publisher.holds().len(), 2);
    let since = hold.since;
    drop(publisher);
    let publisher = lab.publisher("state");
    publish(&publisher);
    let holds = publisher.holds();
    assert!(
        holds.values().any(|hold| hold.since == since),
        "a restart keeps the date"
    );
    lab.put("a.ndb", &list(12));
    lab.remove("c.hdb");
    check(&publisher, "1.4 a.ndb b.ndb daily.cud=8");
}

#[test]
fn a_bad_unit_can_refuse_everything() {
    let (mut lab, publisher) = published();
    drop(publisher);
    lab.settings.mirror.on_bad_unit = OnBadUnit::Refuse;
    let publisher = lab.publisher("state");
    lab.put("daily.cud", &container("daily", 8, 10));
    lab.put("b.ndb", &list(1));
    check(&publisher, "held: b.ndb shrank from ");
    assert_eq!(publisher.refusal().unwrap().kind, RefusalKind::Held);
    lab.put("a.ndb", b"");
    check(&publisher, "refused: a.ndb is empty");
    assert_eq!(publisher.current().unwrap().generation, Generation::FIRST);
}

#[test]
fn an_operator_accepts_single_units_and_never_a_broken_one() {
    let (lab, publisher) = published();
    lab.put("a.ndb", &list(1));
    lab.put("b.ndb", &list(1));
    lab.put("c.ndb", b"");
    assert!(publish(&publisher).starts_with("unchanged | a.ndb: a.ndb shrank"));
    let accepted = accept_units(&publisher, &["b.ndb"]);
    assert!(
        accepted.starts_with(
            "1.2 a.ndb b.ndb daily.cud=7 in spite of: b.ndb shrank from 300 to 30 bytes | a.ndb: "
        ),
        "{accepted}"
    );
    let accepted = accept(&publisher);
    assert!(
        accepted.contains("1.3 ")
            && accepted.ends_with("| c.ndb: c.ndb is empty, and clamd loads no set with it"),
        "{accepted}"
    );
    let slip = Accept {
        reason: "x".to_owned(),
        units: vec!["d.ndb".to_owned()],
    };
    let request = Request {
        accept: Some(slip),
        ..Request::default()
    };
    let stop = CancellationToken::new();
    let error = publisher.publish(&request, "tester", Timestamp::now(), &stop);
    assert!(matches!(error, Err(PublishError::NoSuchUnit { name }) if name == "d.ndb"));
}

#[test]
fn joined_files_are_published_or_held_together() {
    let (mut lab, publisher) = published();
    drop(publisher);
    let files = ["a.ndb", "a.ign2"].map(|name| name.parse().unwrap());
    lab.settings.mirror.units = Units::joining([("a".to_owned(), files.to_vec())]).unwrap();
    let publisher = lab.publisher("state");
    lab.put("a.ign2", b"Lab.List-1\n");
    check(&publisher, "1.2 a.ign2 a.ndb b.ndb daily.cud=7");
    lab.put("a.ign2", b"Lab.List-1\nLab.List-2\n");
    lab.put("a.ndb", b"");
    check(&publisher, "unchanged | a: a.ndb is empty");
    lab.remove("a.ndb");
    check(&publisher, "1.3 a.ign2 b.ndb daily.cud=7"); // a loose file may go
}

#[test]
fn units_that_were_new_in_a_rejected_generation_stay_held_until_they_change() {
    let (lab, publisher) = published();
    lab.put("daily.cud", &container("daily", 8, 10));
    lab.put("a.ndb", &list(11));
    publish(&publisher);
    let bad = publisher.current().unwrap();
    lab.reject(&bad, &["daily.cud", "a.ndb"], &[]);
    let [to, of] = [0, 1].map(|index| publisher.store().manifests()[index].position());
    publisher
        .roll_back(Rollback { to, of }, Timestamp::now())
        .unwrap();

    let why = "was new in generation 1.2, which was halted";
    let held = format!("unchanged | a.ndb: a.ndb {why} | official: daily.cud {why}");
    assert_eq!(publish(&publisher), held);
    // A change of one list brings back neither of them.
    lab.put("b.ndb", &list(11));
    let found = publish(&publisher);
    assert!(
        found.starts_with("1.4 a.ndb b.ndb daily.cud=7 | a.ndb: ")
            && found.contains("| official: "),
        "{found}"
    );
    let current = publisher.current().unwrap();
    let before = publisher.store().manifests()[0].clone();
    let a: clamcast_proto::DatabaseName = "a.ndb".parse().unwrap();
    assert_eq!(current.file(&a), before.file(&a));
    // A change of their own does, and so does an operator's word.
    lab.put("daily.cud", &container("daily", 9, 10));
    check(
        &publisher,
        &format!("1.5 a.ndb b.ndb daily.cud=9 | a.ndb: a.ndb {why}"),
    );
    let accepted = accept_units(&publisher, &["a.ndb"]);
    assert_eq!(
        accepted,
        format!("1.6 a.ndb b.ndb daily.cud=9 in spite of: a.ndb {why}")
    );
    check(&publisher, "unchanged");
    lab.put("b.ndb", &list(12));
    check(&publisher, "1.7 a.ndb b.ndb daily.cud=9");
}

#[test]
fn of_a_rejected_generation_only_what_clamscan_blamed_stays_held() {
    let (lab, publisher) = published();
    lab.put("daily.cud", &container("daily", 8, 10));
    lab.put("a.ndb", &list(11));
    publish(&publisher);
    let bad = publisher.current().unwrap();
    lab.reject(&bad, &["daily.cud", "a.ndb"], &["a.ndb"]);
    check(
        &publisher,
        "1.3 a.ndb b.ndb daily.cud=8 | a.ndb: a.ndb was new in generation 1.2, which was halted",
    );
}

#[test]
fn a_halted_generation_that_nobody_rolled_back_is_not_replaced_by_what_was_before() {
    let (lab, publisher) = published();
    lab.put("daily.cud", &container("daily", 8, 10));
    publish(&publisher);
    lab.reject(&publisher.current().unwrap(), &["daily.cud"], &[]);
    check(
        &publisher,
        "unchanged | official: daily.cud was new in generation 1.2",
    );
    assert_eq!(publisher.store().manifests().len(), 2);
}

#[test]
fn a_held_unit_that_a_restored_master_does_not_have_is_published_in_its_own_version() {
    let (lab, publisher) = published();
    let mut theirs = (*elsewhere(&lab, "lost", 57)).clone();
    let ours = publisher.current().unwrap();
    let other = |file: &ManifestFile| ManifestFile {
        sha256: Digest::of(file.name.as_str().as_bytes()),
        ..file.clone()
    };
    theirs.files = ours.files.iter().map(other).collect();
    theirs.content = content_digest(theirs.files.iter().map(|f| (&f.name, f.size, &f.sha256)));
    let theirs = sign(theirs, &key(MANIFEST));
    publisher.adopt(theirs.envelope()).unwrap();
    lab.put("a.ndb", b"");
    let found = publish(&publisher);
    assert!(
        found.starts_with("1.58 a.ndb b.ndb daily.cud=7 | a.ndb: "),
        "{found}"
    );
}

#[test]
fn a_preview_changes_nothing() {
    let (lab, publisher) = published();
    lab.put("daily.cud", &container("daily", 8, 10));
    lab.put("a.ndb", b"");
    lab.put("c.ndb", &list(3));
    lab.remove("b.ndb");
    let stop = CancellationToken::new();
    let preview = publisher.preview(&Request::default(), Timestamp::now(), &stop);
    let plan = preview.unwrap().plan.unwrap();
    let units: Vec<_> = plan
        .units()
        .map(|(unit, state)| format!("{unit} {state:?}"))
        .collect();
    assert!(units[0].starts_with("a.ndb Held"));
    assert_eq!(
        units[1..],
        [
            "b.ndb Removed",
            "c.ndb Changed { is_new: true }",
            "official Changed { is_new: false }"
        ]
    );
    assert!(publisher.holds().is_empty());
    assert_eq!(publisher.store().manifests().len(), 1);
    let objects = fs::read_dir(lab.root.path().join("state/objects")).unwrap();
    assert_eq!(objects.count(), 2, "a.ndb and b.ndb are one");
}

#[test]
fn more_files_than_a_generation_carries_are_held() {
    let (lab, publisher) = published();
    let mut plan = Plan::new(Default::default());
    let base = publisher.current().unwrap();
    for (number, unit) in ["official", "a", "b", "c"].into_iter().enumerate() {
        let mut file = base.files[0].clone();
        file.name = format!("x{number}.ndb").parse().unwrap();
        plan.take(UnitName::new(unit), vec![file]);
    }
    plan.fit(3, |_| 1, "files");
    let held: Vec<_> = plan.held().map(|(unit, _)| unit.as_str()).collect();
    assert_eq!(held, ["c"]);
    drop(lab);
}

#[test]
fn a_signature_file_without_its_database_is_no_unit() {
    let (lab, publisher) = published();
    lab.put("alpha-7.cvd.sign", b"PKCS7");
    let stop = CancellationToken::new();
    let preview = publisher.preview(&Request::default(), Timestamp::now(), &stop);
    let plan = preview.unwrap().plan.unwrap();
    let units: Vec<_> = plan.units().map(|(unit, _)| unit.as_str()).collect();
    assert_eq!(units, ["a.ndb", "b.ndb", "official"]);
}
