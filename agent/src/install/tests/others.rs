//! What others keep in the directory, beside a set.

use super::*;

#[test]
fn a_bad_file_of_others_is_no_refusal_and_without_it_the_set_is_live() {
    let (host, completed) = check(
        "daily.cld@1=one",
        "site.ndb=BAD",
        "daily.cld@2=two",
        Outcome::HostFault,
        "daily.cld=two site.ndb=BAD",
    );
    let error = completed.error.unwrap();
    assert!(error.starts_with("site.ndb is not of this set"), "{error}");
    let offer = manifest(2, "daily.cld@2=two");
    let installer = host.start();
    assert!(refused_before(&installer, &offer).is_none());
    assert!(installer.standing().borrow().waits_for_clamd);
    let number = host.canary();
    assert!(host.probe_on(&installer).is_none(), "it was told");
    host.put("site.ndb=BAD_too");
    let again = host.probe_on(&installer).unwrap();
    assert_eq!(again.outcome, Outcome::HostFault);
    host.put("site.ndb=good");
    let completed = host.probe_on(&installer).unwrap();
    assert_eq!(
        (completed.outcome, completed.install),
        (Outcome::Live, number)
    );
}

#[test]
fn a_file_of_others_that_is_mended_while_the_refusal_is_looked_at_makes_no_refusal() {
    for scan in [FakeScan::Names, FakeScan::Missing] {
        for mended in [None, Some("good signatures")] {
            let mut host = Host::with(1, "daily.cld@1=one");
            host.clamd.scan = scan;
            host.clamd.mended = Some(("site.ndb", mended));
            host.put("site.ndb=BAD");
            let installer = host.start();
            let (line, offer) = ("daily.cld@2=two", manifest(2, "daily.cld@2=two"));
            let completed = host.take(&installer, &offer, line).unwrap();
            let context = format!("{mended:?}, {scan:?}: {:?}", completed.error);
            assert_eq!(completed.outcome, Outcome::Installed, "{context}");
            assert!(refused_before(&installer, &offer).is_none(), "{context}");
            let probed = host.probe_on(&installer).map(|completed| completed.outcome);
            assert_eq!(probed, Some(Outcome::Live), "{context}");
        }
    }
}

#[test]
fn where_nobody_names_the_file_the_old_set_tells_whose_fault_it_is() {
    for (theirs, outcome) in [("BAD", Outcome::HostFault), ("good", Outcome::Refused)] {
        let mut host = Host::with(1, "daily.cld@1=one");
        host.clamd.scan = FakeScan::Missing;
        host.put(&format!("site.ndb={theirs}"));
        let installer = host.start();
        let (line, offer) = ("daily.cld@2=BAD", manifest(2, "daily.cld@2=BAD"));
        let completed = host.take(&installer, &offer, line).unwrap();
        assert_eq!(completed.outcome, outcome, "{:?}", completed.error);
        let remembered = refused_before(&installer, &offer).is_some();
        assert_eq!(remembered, outcome == Outcome::Refused);
        assert_eq!(
            host.there(),
            set(&format!("daily.cld=one site.ndb={theirs}"))
        );
        assert!(host.probe_on(&installer).is_none(), "nothing new");
        host.put("site.ndb=good");
        let back = host.probe_on(&installer).map(|completed| completed.outcome);
        assert_eq!(back, (theirs == "BAD").then_some(Outcome::Live));
        let first = manifest(1, "daily.cld@1=one");
        assert!(refused_before(&installer, &first).is_none());
    }
}

#[test]
fn where_a_failed_load_kills_clamd_no_bad_file_of_others_gets_there() {
    let mut host = Host::with(1, "daily.cld@1=one");
    host.clamd.load_test = true;
    let installer = host.start();
    let (line, offer) = ("daily.cld@2=two", manifest(2, "daily.cld@2=two"));
    let loads = *host.clamd.loads.lock().unwrap();
    let hindered = |word: &str| {
        let completed = host.take(&installer, &offer, line).unwrap();
        assert_eq!(completed.outcome, Outcome::HostFault);
        let error = completed.error.unwrap();
        assert!(error.contains(word), "{error}");
        assert_eq!(fs::read(host.database().join("daily.cld")).unwrap(), b"one");
        let now = *host.clamd.loads.lock().unwrap();
        assert_eq!(now, loads, "clamd was not asked");
    };
    host.put("site.ndb=BAD");
    hindered("site.ndb is not of this set, and clamd loads no set beside it");
    host.put_denied("site.ndb=own");
    hindered("site.ndb is not of this set and the agent cannot read it");
    let site = host.database().join("site.ndb");
    fs::remove_file(&site).unwrap();
    fs::create_dir(&site).unwrap();
    hindered("site.ndb is not of this set and no file");
    fs::remove_dir(&site).unwrap();
    symlink("/nowhere/x.ndb", &site).unwrap(); // clamd passes over it
    let completed = host.take(&installer, &offer, line).unwrap();
    assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
}

#[test]
fn where_a_failed_load_kills_clamd_a_bad_file_of_others_keeps_no_first_set_and_no_repair_out() {
    let mut host = Host::new();
    host.clamd.load_test = true;
    host.put("site.ndb=BAD");
    let installer = host.start();
    let (line, offer) = ("daily.cld@1=one", manifest(1, "daily.cld@1=one"));
    let stands = |completed: Completed, loads: usize| {
        assert_eq!(completed.outcome, Outcome::HostFault);
        assert!(completed.error.unwrap().starts_with("site.ndb is not of"));
        assert_eq!(fs::read(host.database().join("daily.cld")).unwrap(), b"one");
        assert_eq!(
            *host.clamd.loads.lock().unwrap(),
            loads,
            "clamd is not asked"
        );
    };
    stands(host.take(&installer, &offer, line).unwrap(), 0);
    host.put("site.ndb=good");
    let live = host.probe_on(&installer).unwrap();
    assert_eq!(live.outcome, Outcome::Live);
    let loads = *host.clamd.loads.lock().unwrap();

    host.put("site.ndb=BAD");
    fs::remove_file(host.database().join("daily.cld")).unwrap();
    stands(host.repair(&installer).unwrap().unwrap(), loads);
    host.put("site.ndb=good");
    let live = host.probe_on(&installer).unwrap();
    assert_eq!(live.outcome, Outcome::Live);
}

#[test]
fn where_a_failed_load_kills_clamd_every_reload_is_tried_first() {
    let mut host = Host::with(1, "daily.cld@1=one");
    host.clamd.load_test = true;
    let (line, offer) = ("daily.cld@2=two", manifest(2, "daily.cld@2=two"));
    mood(&host, Mood::Away);
    let completed = host.take(&host.start(), &offer, line).unwrap();
    assert_eq!(completed.outcome, Outcome::Installed);
    // While nobody was there, somebody put a bad file beside it; then clamd and agent start.
    host.put("site.ndb=BAD");
    mood(&host, Mood::Up);
    let loads = *host.clamd.loads.lock().unwrap();
    let (installer, resumed) = host.start_on(host.shim(Fault::None)).unwrap();
    let resumed = resumed.unwrap();
    assert_eq!(resumed.outcome, Outcome::HostFault, "{:?}", resumed.error);
    assert_eq!(
        *host.clamd.loads.lock().unwrap(),
        loads,
        "clamd was not asked"
    );
    assert!(host.probe_on(&installer).is_none());
    host.put("site.ndb=good");
    let completed = host.probe_on(&installer).unwrap();
    assert_eq!(completed.outcome, Outcome::Live);
}

#[test]
fn what_clamd_does_not_load_of_a_set_is_named() {
    let many: String = (0..12).map(|n| format!(" many{n:02}.hdb=x")).collect();
    for (line, note) in [
        ("daily.cld@2=two x.ndb=x", None),
        ("daily.cld@2=two x.hdb=x", Some("clamd does not load x.hdb")),
        (&many, Some("many06.hdb, many07.hdb, 4 more")),
    ] {
        let (host, completed) = check("daily.cld@1=one", "", line, Outcome::Live, line);
        let noted = completed.clamd.note.unwrap_or_default();
        assert!(noted.ends_with(note.unwrap_or_default()), "{noted}");
        assert_eq!(noted.is_empty(), note.is_none());
        assert_eq!(host.start().clamd().note.unwrap_or_default(), noted);
    }
}

#[test]
fn what_freshclam_left_is_adopted_and_others_files_stay() {
    let new = "daily.cld@2=two main.cvd@62=main daily-2.cvd.sign=new";
    let foreign = "daily.cvd=freshclams main.cvd=main daily-1.cvd.sign=old local.ndb=local";
    let there = format!("{new} local.ndb=local");
    let (host, completed) = check("", foreign, new, Outcome::Live, &there);
    assert_eq!(completed.foreign, ["local.ndb"]);
    let adopted = loaded(&host.hidden("adopted"));
    assert_eq!(adopted, set("daily.cvd=freshclams daily-1.cvd.sign=old"));
    for (name, _) in set(new) {
        let mode = fs::metadata(host.database().join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o644);
    }
}

#[test]
fn foreign_databases_are_listed_as_clamd_sees_them_and_bounded() {
    let host = Host::with(1, "daily.cld@1=one");
    host.put(".hidden.ndb=x UPPER.NDB=x daily.cvd=x notes.txt=x .x.swp=x");
    let listed = foreign(&host.start(), &manifest(1, "daily.cld@1=one"));
    assert_eq!(listed, [".hidden.ndb", "UPPER.NDB", "daily.cvd"]);
    for n in 0..200 {
        host.put(&format!("many{n}.ndb=x"));
    }
    let listed = foreign(&host.start(), &manifest(1, "daily.cld@1=one"));
    assert_eq!(listed.len(), FOREIGN_MAX);
    assert_eq!(listed.last().unwrap(), "(and 104 more)");
}
