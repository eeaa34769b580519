//! What an offer comes to, on a real directory with the fake clamd of `lab.rs`.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

use clamcast_proto::delta;
use clamcast_proto::receipt::{FOREIGN_MAX, Outcome};
use clamcast_proto::wire::{Have, PartEncoding, PartKind};
use nix::errno::Errno;

use super::lab::{Fault, Files, Host, Mood, full, loaded, manifest, set};
use super::*;
use crate::clamd::proof::{CANARY, GATE, gate_number};

/// Offers `new` to a host that has `old` live and `foreign` lying around.
fn check(old: &str, foreign: &str, new: &str, outcome: Outcome, there: &str) -> (Host, Completed) {
    let host = Host::with(1, old);
    host.put(foreign);
    let completed = host.take(&host.start(), &manifest(2, new), new).unwrap();
    assert_eq!(completed.outcome, outcome, "{:?}", completed.error);
    assert_eq!(host.there(), set(there));
    (host, completed)
}

/// Numbers under which the fake clamd was seen since the host was made.
fn proven(host: &Host) -> Vec<u64> {
    host.clamd.proven.lock().unwrap().clone()
}

fn mood(host: &Host, mood: Mood) {
    *host.clamd.mood.lock().unwrap() = mood;
}

#[test]
fn a_new_set_goes_live_and_withdrawn_names_go() {
    let old = "daily.cld@1=one main.cvd@62=main x.ndb=x";
    let new = "daily.cld@2=two main.cvd@62=main y.ndb=y";
    let (host, completed) = check(old, "", new, Outcome::Live, new);
    assert_eq!(completed.files, completed.set.files());
    assert_eq!(proven(&host), [1, 2, 3, 4], "names went: proven twice");
}

#[test]
fn with_a_gate_and_no_change_of_names_one_proof_is_enough() {
    let new = "daily.cld@2=two";
    let (host, completed) = check("daily.cld@1=one", "", new, Outcome::Live, new);
    assert_eq!((proven(&host), completed.install), (vec![1, 2, 3], 3));
}

#[test]
fn without_a_gate_or_with_a_damaged_one_it_takes_two() {
    for damage in ["", "Clamcast.Install-9\n"] {
        let host = Host::with(1, "daily.cld@1=one");
        host.clamd.proven.lock().unwrap().clear();
        fs::write(host.database().join(GATE), damage).unwrap();
        let new = "daily.cld@2=two";
        let completed = host.take(&host.start(), &manifest(2, new), new).unwrap();
        assert_eq!((proven(&host), completed.install), (vec![3, 4], 4));
    }
}

#[test]
fn the_same_content_under_a_new_number_moves_only_the_number() {
    let line = "daily.cld@1=one";
    let (host, completed) = check(line, "", line, Outcome::Live, line);
    assert_eq!(completed.install, 2, "the install of the generation before");
    let installed = host.start().installed().unwrap();
    assert_eq!(installed.set.manifest.generation.number(), 2);
}

#[test]
fn an_outranked_old_form_stays_until_the_proof() {
    let host = Host::with(1, "daily.cvd@1=one");
    let installer = host.start();
    mood(&host, Mood::Away);
    let new = "daily.cld@2=two";
    for _ in 0..2 {
        let completed = host.take(&installer, &manifest(2, new), new).unwrap();
        assert_eq!(completed.outcome, Outcome::Installed);
        assert_eq!(host.there(), set("daily.cvd=one daily.cld=two"));
    }
    mood(&host, Mood::Up);
    let completed = host.probe_on(&installer).unwrap();
    assert_eq!(completed.outcome, Outcome::Live);
    assert_eq!(host.there(), set(new));
    assert!(
        host.probe_on(&installer).is_none(),
        "nothing is left to prove"
    );
}

#[test]
fn a_set_is_not_live_in_a_clamd_that_is_gone_until_it_is_back() {
    let host = Host::with(1, "daily.cld@1=one");
    let installer = host.start();
    let number = host.canary();
    assert!(host.look_at_clamd(&installer).is_none(), "clamd is there");
    mood(&host, Mood::Away);
    let completed = host.look_at_clamd(&installer).unwrap();
    assert_eq!(completed.outcome, Outcome::Installed);
    let error = completed.error.unwrap();
    assert!(error.contains("is gone"), "{error}");
    assert!(installer.waits_for_clamd());
    assert_eq!(installer.installed().unwrap().outcome, Outcome::Installed);
    assert!(host.look_at_clamd(&installer).is_none(), "it is told once");
    mood(&host, Mood::Up);
    let completed = host.probe_on(&installer).unwrap();
    assert_eq!(
        (completed.outcome, completed.install),
        (Outcome::Live, number)
    );
    assert!(!installer.waits_for_clamd());
}

#[test]
fn an_old_form_that_would_win_goes_before_the_proof() {
    let new = "daily.cvd@2=two";
    check("daily.cld@3=three", "", new, Outcome::Live, new);
    check("daily.cld@2=tie", "", new, Outcome::Live, new);
}

#[test]
fn a_damaged_old_form_goes_before_the_proof() {
    // It would make the whole load fail, and the new set would be blamed for it.
    let new = "daily.cld@2=two";
    check("daily.cvd@1=one", "daily.cvd=BAD", new, Outcome::Live, new);
}

#[test]
fn a_refused_set_goes_and_the_old_one_is_back_and_proven() {
    let old = "daily.cvd@1=one x.ndb=x";
    let (host, completed) = check(old, "", "daily.cld@2=BAD", Outcome::Refused, old);
    let error = completed.error.unwrap();
    assert!(
        error.contains("Malformed database") && error.contains("live as install"),
        "{error}"
    );
    let installed = host.start().installed().unwrap();
    assert_eq!(
        (
            installed.set.manifest.generation.number(),
            installed.outcome
        ),
        (1, Outcome::Live)
    );
    assert_eq!(proven(&host).last(), Some(&installed.install));
}

#[test]
fn a_refused_set_is_remembered_unless_an_operator_forces_it() {
    let host = Host::with(1, "daily.cld@1=one");
    let installer = host.start();
    let (line, offer) = ("daily.cld@2=BAD", manifest(2, "daily.cld@2=BAD"));
    host.take(&installer, &offer, line).unwrap();
    drop(installer);
    let installer = host.start();
    let tries = host.canary();
    assert_eq!(
        installer.refused_before(&offer).unwrap().outcome,
        Outcome::Refused
    );
    let again = host.take(&installer, &offer, line).unwrap();
    assert!(again.error.unwrap().starts_with("refused before: "));
    assert_eq!(host.canary(), tries, "not tried again");
    let needs = installer.plan(&offer, true, false).unwrap();
    for need in needs {
        let file = offer.file(&need.name).unwrap();
        installer.receive(&full(file), file, &b"BAD"[..]).unwrap();
    }
    let forced = host.install(&installer, &offer);
    assert!(!forced.error.unwrap().starts_with("refused before"));
}

#[test]
fn a_refused_first_set_stays_for_there_is_nothing_else() {
    let (host, _) = check("", "", "daily.cld@1=BAD", Outcome::Refused, "daily.cld=BAD");
    assert_eq!(host.start().installed().unwrap().outcome, Outcome::Refused);
}

#[test]
fn a_refused_first_set_gives_way_to_what_freshclam_had_left() {
    let left = "daily.cvd=freshclams main.cvd=main";
    check(
        "",
        left,
        "daily.cld@2=BAD main.cvd@62=main",
        Outcome::Refused,
        left,
    );
}

#[test]
fn a_refused_first_set_goes_where_clamd_had_a_database_of_others() {
    let (host, completed) = check(
        "",
        "site.ndb=own",
        "daily.cld@1=BAD",
        Outcome::Refused,
        "site.ndb=own",
    );
    let error = completed.error.unwrap();
    assert!(error.contains("the previous set is back"), "{error}");
    assert!(host.start().installed().is_none());
}

#[test]
fn what_cannot_be_restored_keeps_nothing_else_from_it() {
    let host = Host::with(1, "b.ndb=one c.ndb=one");
    let shim = host.shim(Fault::None);
    let (installer, _) = host.start_on(shim.clone()).unwrap();
    shim.make_immutable(At(Dir::Databases, "b.ndb"));
    let new = "a.ndb=two b.ndb=two c.ndb=two";
    let completed = host.take(&installer, &manifest(2, new), new).unwrap();
    assert_eq!(completed.outcome, Outcome::HostFault);
    let error = completed.error.unwrap();
    assert!(error.contains("is not back yet"), "{error}");
    assert_eq!(host.there(), set("b.ndb=one c.ndb=one"));
}

#[test]
fn what_the_agent_cannot_read_is_kept_and_comes_back() {
    let theirs = "daily.cvd=theirs loc.ndb=own test.cvd=test";
    let adopted = |host: &Host| loaded(&host.hidden("adopted"));
    for bad in ["daily.cld@1=BAD loc.ndb=x", "daily.cvd@1=BAD loc.ndb=x"] {
        let host = Host::new();
        host.put_denied(theirs);
        let completed = host.take(&host.start(), &manifest(1, bad), bad).unwrap();
        assert_eq!(completed.outcome, Outcome::Refused, "{:?}", completed.error);
        assert_eq!(host.there(), set(theirs));
        assert_eq!(adopted(&host), Files::new());
    }
    let host = Host::new();
    for (theirs, kept) in [
        ("daily.cvd=1 loc.ndb=1", "daily.cvd=1 loc.ndb=1"),
        // Kept before, under that name.
        ("loc.ndb=2", "daily.cvd=1 loc.ndb=1"),
    ] {
        host.put_denied(theirs);
        let _ = fs::remove_file(host.state().join("installed.json"));
        let good = "daily.cld@2=two loc.ndb=x";
        let completed = host.take(&host.start(), &manifest(2, good), good).unwrap();
        assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
        assert_eq!(host.there(), set(good));
        assert_eq!(adopted(&host), set(kept));
    }
    let second = fs::read_to_string(host.hidden("adopted/loc.ndb-2"));
    assert_eq!(second.unwrap(), "2");
}

#[test]
fn where_names_cannot_change_places_what_cannot_be_read_is_kept_too() {
    for (line, outcome) in [("x.ndb=BAD", Outcome::Refused), ("x.ndb=x", Outcome::Live)] {
        let host = Host::new();
        host.put_denied("x.ndb=theirs");
        let shim = host.shim(Fault::None).without_exchange();
        let (installer, _) = host.start_on(shim).unwrap();
        let completed = host.take(&installer, &manifest(1, line), line).unwrap();
        assert_eq!(completed.outcome, outcome, "{:?}", completed.error);
        let (there, kept) = match outcome {
            Outcome::Live => (line, "x.ndb=theirs"),
            Outcome::Installed | Outcome::Refused | Outcome::HostFault => ("x.ndb=theirs", ""),
        };
        assert_eq!(host.there(), set(there));
        assert_eq!(loaded(&host.hidden("adopted")), set(kept));
    }
}

#[test]
fn a_link_that_outranks_the_set_goes_and_is_kept() {
    let host = Host::new();
    let outside = host.state().join("outside.cld");
    fs::write(&outside, "own").unwrap();
    symlink(&outside, host.database().join("daily.cld")).unwrap();
    let new = "daily.cvd@2=two";
    let completed = host.take(&host.start(), &manifest(2, new), new).unwrap();
    assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
    assert_eq!(host.there(), set(new));
    let kept = fs::read_link(host.hidden("adopted/daily.cld"));
    assert_eq!(kept.unwrap(), outside);
}

#[test]
fn a_refused_set_gives_a_link_its_name_back() {
    let host = Host::new();
    let outside = host.state().join("outside.ndb");
    fs::write(&outside, "own").unwrap();
    let link = host.database().join("x.ndb");
    symlink(&outside, &link).unwrap();
    let bad = "daily.cld@1=BAD x.ndb=x";
    let completed = host.take(&host.start(), &manifest(1, bad), bad).unwrap();
    assert_eq!(completed.outcome, Outcome::Refused, "{:?}", completed.error);
    assert_eq!(fs::read_link(&link).unwrap(), outside);
    assert_eq!(host.there(), set("x.ndb=own"));
    assert_eq!(fs::read_to_string(outside).unwrap(), "own");
}

#[test]
fn where_a_failed_load_kills_clamd_it_never_sees_the_set() {
    let mut host = Host::with(1, "daily.cld@1=one");
    host.clamd.load_test = true;
    let before = fs::metadata(host.database().join(CANARY)).unwrap().ino();
    let bad = "daily.cld@2=BAD";
    let completed = host.take(&host.start(), &manifest(2, bad), bad).unwrap();
    assert_eq!(completed.outcome, Outcome::Refused);
    assert_eq!(host.there(), set("daily.cld=one"));
    assert_eq!(
        fs::metadata(host.database().join(CANARY)).unwrap().ino(),
        before
    );
    let good = "daily.cld@3=three";
    let completed = host.take(&host.start(), &manifest(3, good), good).unwrap();
    assert_eq!(completed.outcome, Outcome::Live);
}

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
    assert!(installer.refused_before(&offer).is_none());
    assert!(installer.waits_for_clamd());
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
    for names_the_file in [true, false] {
        for mended in [None, Some("good signatures")] {
            let mut host = Host::with(1, "daily.cld@1=one");
            host.clamd.names_the_file = names_the_file;
            host.clamd.mended = Some(("site.ndb", mended));
            host.put("site.ndb=BAD");
            let installer = host.start();
            let (line, offer) = ("daily.cld@2=two", manifest(2, "daily.cld@2=two"));
            let completed = host.take(&installer, &offer, line).unwrap();
            let context = format!("{mended:?}, named: {names_the_file}: {:?}", completed.error);
            assert_eq!(completed.outcome, Outcome::Installed, "{context}");
            assert!(installer.refused_before(&offer).is_none(), "{context}");
            let probed = host.probe_on(&installer).map(|completed| completed.outcome);
            assert_eq!(probed, Some(Outcome::Live), "{context}");
        }
    }
}

#[test]
fn where_nobody_names_the_file_the_old_set_tells_whose_fault_it_is() {
    for (theirs, outcome) in [("BAD", Outcome::HostFault), ("good", Outcome::Refused)] {
        let mut host = Host::with(1, "daily.cld@1=one");
        host.clamd.names_the_file = false;
        host.put(&format!("site.ndb={theirs}"));
        let installer = host.start();
        let (line, offer) = ("daily.cld@2=BAD", manifest(2, "daily.cld@2=BAD"));
        let completed = host.take(&installer, &offer, line).unwrap();
        assert_eq!(completed.outcome, outcome, "{:?}", completed.error);
        let remembered = installer.refused_before(&offer).is_some();
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
        assert!(installer.refused_before(&first).is_none());
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
    let foreign = host.start().foreign();
    assert_eq!(foreign, [".hidden.ndb", "UPPER.NDB", "daily.cvd"]);
    for n in 0..200 {
        host.put(&format!("many{n}.ndb=x"));
    }
    let foreign = host.start().foreign();
    assert_eq!(foreign.len(), FOREIGN_MAX);
    assert_eq!(foreign.last().unwrap(), "(and 104 more)");
}

#[test]
fn a_lost_state_directory_costs_neither_a_transfer_nor_a_number() {
    let line = "daily.cld@1=one main.cvd@62=main";
    let host = Host::with(1, line);
    let number = host.canary();
    fs::remove_dir_all(host.state()).unwrap();
    fs::create_dir(host.state()).unwrap();
    let installer = host.start();
    assert!(installer.installed().is_none());
    let offer = manifest(2, line);
    assert_eq!(installer.plan(&offer, false, false).unwrap(), []);
    let completed = host.install(&installer, &offer);
    assert_eq!(
        (completed.outcome, completed.install),
        (Outcome::Live, number + 1)
    );
    assert_eq!(
        gate_number(&loaded(&host.database())[GATE]),
        Some(number + 1)
    );
    assert!(loaded(&host.hidden("adopted")).is_empty());
}

#[test]
fn drift_is_seen_and_repaired_from_the_hosts_own_copy() {
    let line = "daily.cld@1=one x.ndb=x";
    let host = Host::with(1, line);
    let installer = host.start();
    host.put("daily.cld=own");
    fs::remove_file(host.database().join("x.ndb")).unwrap();
    let wrong = |checks: Vec<FileCheck>| checks.iter().filter(|check| !check.is_right()).count();
    assert_eq!(wrong(installer.verify()), 2);
    let completed = host.repair(&installer).unwrap().unwrap();
    assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
    assert_eq!(wrong(installer.verify()), 0);
    assert_eq!(host.there(), set(line));
}

#[test]
fn damage_that_the_hard_link_shares_is_not_repaired_from_it() {
    let host = Host::with(1, "daily.cld@1=one");
    let installer = host.start();
    // In place, with the same length and time: only a hash tells.
    let path = host.database().join("daily.cld");
    let time = fs::metadata(&path).unwrap().modified().unwrap();
    let mut file = fs::File::options().write(true).open(&path).unwrap();
    file.write_all(b"onE").unwrap();
    file.set_modified(time).unwrap();
    let error = host.repair(&installer).unwrap_err();
    assert!(error.contains("the master has to send them"), "{error}");
    let offer = manifest(1, "daily.cld@1=one");
    let completed = host.take(&installer, &offer, "daily.cld@1=one").unwrap();
    assert_eq!(completed.outcome, Outcome::Live);
    assert_eq!(host.there(), set("daily.cld=one"));
}

#[test]
fn planted_links_pipes_and_names_do_nothing() {
    let host = Host::with(1, "daily.cld@1=one");
    let outside = host.state().join("outside");
    fs::write(&outside, "untouched").unwrap();
    let new = "daily.cld@2=two x.ndb=x y.ndb=y";
    symlink(&outside, host.database().join("x.ndb")).unwrap();
    nix::unistd::mkfifo(
        &host.database().join("y.ndb"),
        nix::sys::stat::Mode::S_IRWXU,
    )
    .unwrap();
    fs::remove_file(host.database().join("daily.cld")).unwrap();
    fs::hard_link(&outside, host.database().join("daily.cld")).unwrap();
    let completed = host.take(&host.start(), &manifest(2, new), new).unwrap();
    assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
    assert_eq!(host.there(), set(new));
    assert_eq!(fs::read_to_string(outside).unwrap(), "untouched");
}

#[test]
fn a_hidden_directory_that_others_may_write_is_not_used() {
    let host = Host::new();
    fs::create_dir(host.hidden("")).unwrap();
    fs::set_permissions(host.hidden(""), fs::Permissions::from_mode(0o777)).unwrap();
    let fault = disk::HostDisk::open(&host.database(), &host.state()).unwrap_err();
    assert!(matches!(fault, HostFault::Planted { .. }), "{fault}");
    fs::remove_dir(host.hidden("")).unwrap();
    symlink(host.state(), host.database().join(disk::HIDDEN)).unwrap();
    let fault = disk::HostDisk::open(&host.database(), &host.state()).unwrap_err();
    assert!(matches!(fault, HostFault::Planted { .. }), "{fault}");
}

#[test]
fn a_database_directory_has_one_agent_whatever_its_state_directory() {
    let host = Host::new();
    let open = |state: &str| {
        let state = host.state().join(state);
        fs::create_dir_all(&state).unwrap();
        let database = host.database();
        let settings = Settings { database, state };
        Installer::open(&settings, Nonce([3; 16]), host.clamd.clone())
    };
    let first = open("one").map_err(|fault| fault.to_string()).unwrap();
    let fault = open("two").err().unwrap();
    let text = fault.to_string();
    assert!(matches!(fault, HostFault::Shared { .. }), "{text}");
    let database = host.database();
    assert!(text.contains(database.to_str().unwrap()), "{text}");
    drop(first);
    assert!(open("two").is_ok());
}

#[test]
fn a_link_planted_as_the_lock_is_not_followed() {
    let host = Host::new();
    host.start();
    symlink(host.state().join("elsewhere"), host.hidden("lock")).unwrap();
    let disk = disk::HostDisk::open(&host.database(), &host.state()).unwrap();
    assert!(disk.locked().is_err());
    assert!(!host.state().join("elsewhere").exists());
}

#[test]
fn a_missing_directory_is_named_with_the_command_that_makes_it() {
    let host = Host::new();
    let missing = host.database().join("none");
    let fault = disk::HostDisk::open(&missing, &host.state()).unwrap_err();
    assert!(fault.to_string().contains("install -d -o "), "{fault}");
}

#[test]
fn a_replaced_or_emptied_directory_is_worked_on_and_the_one_that_was_open_is_not() {
    for emptied in [false, true] {
        let host = Host::with(1, "daily.cld@1=one");
        let installer = host.start();
        let moved = host.state().join("moved");
        fs::rename(host.database(), &moved).unwrap();
        fs::create_dir(host.database()).unwrap();
        if emptied {
            // With the same inode, as after `rm -r DB/* DB/.clamcast`.
            fs::remove_dir(host.database()).unwrap();
            fs::rename(&moved, host.database()).unwrap();
            fs::remove_dir_all(host.hidden("")).unwrap();
            fs::remove_file(host.database().join("daily.cld")).unwrap();
        }
        let line = "daily.cld@2=two";
        let completed = host.take(&installer, &manifest(2, line), line).unwrap();
        assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
        assert_eq!(host.there(), set(line));
        if !emptied {
            assert_eq!(loaded(&moved)["daily.cld"], "one");
        }
    }
}

#[test]
fn a_lost_way_back_does_not_keep_the_next_set_out() {
    let host = Host::with(1, "daily.cld@1=one");
    let shim = host.shim(Fault::None);
    let (installer, _) = host.start_on(shim.clone()).unwrap();
    mood(&host, Mood::Away);
    let bad = "daily.cld@2=BAD";
    host.take(&installer, &manifest(2, bad), bad).unwrap();
    // The old set is nowhere any more when clamd comes and refuses the new one.
    fs::remove_file(host.hidden("previous/daily.cld")).unwrap();
    mood(&host, Mood::Up);
    host.probe_on(&installer);
    let good = "daily.cld@3=three";
    let completed = host.take(&installer, &manifest(3, good), good).unwrap();
    assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
    assert_eq!(host.there(), set(good));
}

#[test]
fn a_set_that_somebody_damaged_is_not_blamed_for_what_clamd_says() {
    let host = Host::with(1, "daily.cld@1=one");
    let installer = host.start();
    mood(&host, Mood::Away);
    let line = "daily.cld@2=two";
    host.take(&installer, &manifest(2, line), line).unwrap();
    host.put("daily.cld=BAD");
    mood(&host, Mood::Up);
    assert!(host.probe_on(&installer).is_none(), "probing goes on");
    assert!(installer.refused_before(&manifest(2, line)).is_none());
    let completed = host.repair(&installer).unwrap().unwrap();
    assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
    assert_eq!(host.there(), set(line));
}

/// What a look says of a host that has this set, after `damage`.
fn sight(depth: Depth, damage: impl FnOnce(&Host)) -> String {
    let host = Host::with(1, "daily.cld@1=one main.cvd@62=main");
    let installer = host.start();
    let stop = CancellationToken::new();
    // What is read in this look is known in the next one.
    assert_eq!(installer.look(Depth::Full, &stop), Look::Made(Vec::new()));
    damage(&host);
    let Look::Made(wrong) = installer.look(depth, &stop) else {
        panic!("nothing is in its way");
    };
    let words = wrong.iter().map(|wrong| {
        let read = wrong.state.as_ref().map_or("", |_| " and read");
        format!("{} {:?}{read}", wrong.name, wrong.found)
    });
    words.collect::<Vec<_>>().join(", ")
}

#[test]
fn a_look_names_what_is_wrong_and_reads_what_was_touched() {
    let daily = |host: &Host| host.database().join("daily.cld");
    for depth in [Depth::Touched, Depth::Full] {
        let check = |damage: &dyn Fn(&Host), expected: &str| {
            assert_eq!(sight(depth, damage), expected, "{depth:?}");
        };
        check(&|_| (), "");
        check(
            &|host| fs::write(daily(host), "onE").unwrap(),
            "daily.cld Changed and read",
        );
        check(
            &|host| fs::write(daily(host), "o").unwrap(),
            "daily.cld Changed and read",
        );
        check(
            &|host| fs::write(daily(host), "much too long").unwrap(),
            "daily.cld Changed",
        );
        check(
            &|host| fs::remove_file(daily(host)).unwrap(),
            "daily.cld Missing",
        );
        let mode = |mode: u32| {
            move |host: &Host| {
                fs::set_permissions(daily(host), fs::Permissions::from_mode(mode)).unwrap();
            }
        };
        check(&mode(0o600), "daily.cld Unreadable and read");
        check(&mode(0o666), "daily.cld Changed and read");
        let instead = |make: &dyn Fn(&std::path::Path)| {
            sight(depth, |host| {
                fs::remove_file(daily(host)).unwrap();
                make(&daily(host));
            })
        };
        assert_eq!(
            instead(&|path| fs::create_dir(path).unwrap()),
            "daily.cld Changed"
        );
        assert_eq!(
            instead(&|path| symlink("main.cvd", path).unwrap()),
            "daily.cld Changed"
        );
        let pipe = |path: &std::path::Path| {
            nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        };
        assert_eq!(instead(&pipe), "daily.cld Changed");
        assert_eq!(
            instead(&|path| fs::write(path, "one").unwrap()),
            "",
            "put back by somebody"
        );
        check(
            &|host| host.put("daily.cvd=theirs"),
            "daily.cld Changed and read",
        );
        check(&|host| host.put("other.ndb=theirs"), "");
        let canary = |host: &Host| fs::remove_file(host.database().join(CANARY)).unwrap();
        check(&canary, "clamcast-canary.hsb Missing");
    }
}

#[test]
fn a_look_gives_way_and_does_not_judge_an_install_under_way() {
    let host = Host::with(1, "daily.cld@1=one");
    let installer = host.start();
    let stop = CancellationToken::new();
    stop.cancel();
    assert_eq!(installer.look(Depth::Full, &stop), Look::Stopped);
    let stop = CancellationToken::new();
    let guard = installer.shared.slot.try_lock().unwrap();
    assert_eq!(installer.look(Depth::Full, &stop), Look::NotNow);
    drop(guard);
    let nothing = Host::new();
    let look = nothing.start().look(Depth::Full, &stop);
    assert_eq!(look, Look::Made(Vec::new()));
}

#[test]
fn whatever_stands_in_the_place_of_a_file_is_repaired_and_proven_anew() {
    let line = "daily.cld@1=one x.ndb=x y.ndb=y z.ndb=z w.ndb=w";
    let host = Host::with(1, line);
    let installer = host.start();
    let number = host.canary();
    let at = |name: &str| host.database().join(name);
    for name in ["daily.cld", "x.ndb", "y.ndb"] {
        fs::remove_file(at(name)).unwrap();
    }
    fs::create_dir(at("daily.cld")).unwrap();
    fs::write(at("daily.cld").join("inside"), "kept").unwrap();
    symlink("z.ndb", at("x.ndb")).unwrap();
    nix::unistd::mkfifo(&at("y.ndb"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::set_permissions(at("z.ndb"), fs::Permissions::from_mode(0o000)).unwrap();
    fs::remove_file(at(GATE)).unwrap();
    let stop = CancellationToken::new();
    let Look::Made(wrong) = installer.look(Depth::Touched, &stop) else {
        panic!("nothing is in its way");
    };
    assert_eq!(wrong.len(), 5, "{wrong:?}");
    let completed = host.repair(&installer).unwrap().unwrap();
    assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
    assert!(completed.install > number);
    assert_eq!(host.there(), set(line));
    assert_eq!(installer.look(Depth::Full, &stop), Look::Made(Vec::new()));
    let kept = host.hidden("adopted/daily.cld.directory/inside");
    assert_eq!(fs::read_to_string(kept).unwrap(), "kept");
}

#[test]
fn a_file_that_came_right_by_itself_is_proven_anew() {
    let line = "daily.cld@1=one";
    let host = Host::with(1, line);
    let installer = host.start();
    let number = host.canary();
    let aside = host.state().join("aside");
    fs::rename(host.database().join("daily.cld"), &aside).unwrap();
    let stop = CancellationToken::new();
    assert_ne!(
        installer.look(Depth::Touched, &stop),
        Look::Made(Vec::new())
    );
    // Meanwhile clamd may have loaded the directory without it.
    fs::rename(&aside, host.database().join("daily.cld")).unwrap();
    let completed = host.repair(&installer).unwrap().unwrap();
    assert!(completed.install > number);
}

#[test]
fn what_does_not_fit_is_said_before_it_is_transferred() {
    let host = Host::with(1, "daily.cld@1=one");
    let mut huge = manifest(2, "daily.cld@2=two");
    let mut files = huge.files.clone();
    files[0].size = u64::from(u32::MAX) << 20; // a promise, not a file
    huge = clamcast_proto::dsse::sign(
        Manifest {
            files,
            ..Manifest::clone(&huge)
        },
        &ed25519_dalek::SigningKey::from_bytes(&[7; 32]),
    );
    let fault = host.start().plan(&huge, false, false).unwrap_err();
    assert!(matches!(fault, HostFault::Space { .. }), "{fault}");
    let completed = host.start().host_fault(&huge, &fault);
    assert_eq!(completed.outcome, Outcome::HostFault);
    assert!(completed.error.unwrap().contains("bytes free"));
}

#[test]
fn a_full_disk_while_receiving_is_a_host_fault_with_path_and_reason() {
    let host = Host::with(1, "daily.cld@1=one");
    let shim = host.shim(Fault::None);
    let (installer, _) = host.start_on(shim.clone()).unwrap();
    let offer = manifest(2, "daily.cld@2=two");
    installer.plan(&offer, false, false).unwrap();
    shim.set_fault(Fault::From(0, Errno::ENOSPC));
    let file = &offer.files[0];
    let error = installer
        .receive(&full(file), file, &b"two"[..])
        .unwrap_err();
    let text = crate::chain(&error);
    assert!(
        text.contains("stage") && text.contains("No space left"),
        "{text}"
    );
    assert_eq!(host.there(), set("daily.cld=one"));
}

/// Sends the part of an encoding from `offset` on.
fn send(
    installer: &lab::FakeInstaller,
    file: &ManifestFile,
    encoding: &PartEncoding,
    offset: usize,
    bytes: &[u8],
) -> Result<(), ReceiveError> {
    let part = Part {
        encoding: encoding.clone(),
        offset: offset as u64,
        ..full(file)
    };
    installer.receive(&part, file, bytes)
}

/// A file that is large enough to cut, with one record that changes.
fn large(day: u32) -> String {
    let record = |n| format!("record-{n}-{}|", if n == 2500 { day } else { 0 });
    (0..5000).map(record).collect()
}

#[test]
fn a_delta_and_a_compressed_file_come_out_as_the_file_in_any_pieces() {
    let (old, new) = (large(1), large(2));
    let old_line = format!("daily.cld@1={old}");
    let offer = manifest(2, &format!("daily.cld@2={new}"));
    let file = &offer.files[0];
    let from = Digest::of(old.as_bytes());
    let input = |digest, bytes| delta::Input { digest, bytes };
    let (base, target) = (
        input(from, old.as_bytes()),
        input(file.sha256, new.as_bytes()),
    );
    let mut delta = Vec::new();
    delta::make(base, target, &mut delta).unwrap();
    let zstd = zstd::bulk::compress(new.as_bytes(), 1).unwrap();
    let encoding = |kind, zstd, from, length: usize| PartEncoding {
        kind,
        zstd,
        from,
        to: file.sha256,
        length: length as u64,
    };
    for (encoding, bytes) in [
        (
            encoding(PartKind::Delta, false, Some(from), delta.len()),
            &delta[..],
        ),
        (encoding(PartKind::Full, true, None, zstd.len()), &zstd),
        (
            encoding(PartKind::Full, false, None, new.len()),
            new.as_bytes(),
        ),
    ] {
        for cut in [1, bytes.len() / 2, bytes.len() - 1] {
            let host = Host::with(1, &old_line);
            let installer = host.start();
            let needs = installer.plan(&offer, false, false).unwrap();
            assert_eq!(needs[0].have, Have::Sha256(from));
            let cut_off = send(&installer, file, &encoding, 0, &bytes[..cut]).unwrap_err();
            assert!(
                matches!(cut_off, ReceiveError::Interrupted { .. }),
                "{cut_off}"
            );
            drop(installer);
            let installer = host.start(); // a restart in between
            let needs = installer.plan(&offer, false, false).unwrap();
            assert_eq!(
                (needs[0].resume_at, needs[0].resume.as_ref()),
                (cut as u64, Some(&encoding))
            );
            send(&installer, file, &encoding, cut, &bytes[cut..]).unwrap();
            assert_eq!(installer.plan(&offer, false, false).unwrap(), []);
            let completed = host.install(&installer, &offer);
            assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
            assert_eq!(host.there()["daily.cld"], new);
        }
        // Damage is thrown away, and the next plan starts from nothing.
        let host = Host::with(1, &old_line);
        let installer = host.start();
        installer.plan(&offer, false, false).unwrap();
        let mut damaged = bytes.to_vec();
        let at = damaged.len() - 9;
        damaged[at] ^= 1;
        let error = send(&installer, file, &encoding, 0, &damaged).unwrap_err();
        assert!(matches!(error, ReceiveError::Damaged { .. }), "{error}");
        assert_eq!(
            installer.plan(&offer, false, false).unwrap()[0].resume_at,
            0
        );
        assert_eq!(host.there()["daily.cld"], old);
    }
}

#[test]
fn a_part_that_was_not_asked_for_is_refused_before_it_is_read() {
    let host = Host::with(1, "daily.cld@1=one");
    let installer = host.start();
    let offer = manifest(2, "daily.cld@2=two");
    let file = &offer.files[0];
    let good = full(file).encoding;
    for bad in [
        PartEncoding {
            to: Digest::of(b"x"),
            ..good.clone()
        },
        PartEncoding {
            length: 4,
            ..good.clone()
        },
        PartEncoding {
            length: u64::MAX,
            zstd: true,
            ..good.clone()
        },
        PartEncoding {
            kind: PartKind::Signature,
            ..good.clone()
        },
        PartEncoding {
            from: Some(Digest::of(b"x")),
            ..good.clone()
        },
        PartEncoding {
            kind: PartKind::Delta,
            from: Some(Digest::of(b"x")),
            ..good.clone()
        },
        PartEncoding {
            kind: PartKind::Delta,
            ..good.clone()
        },
    ] {
        let error = send(&installer, file, &bad, 0, b"two").unwrap_err();
        assert!(
            matches!(error, ReceiveError::Unexpected { .. }),
            "{bad:?}: {error}"
        );
    }
    let error = send(&installer, file, &good, 2, b"o").unwrap_err();
    assert!(matches!(error, ReceiveError::Unexpected { .. }), "{error}");
}

#[test]
fn a_bomb_ends_at_the_length_of_the_file() {
    let host = Host::with(1, "daily.cld@1=one");
    let installer = host.start();
    let offer = manifest(2, "daily.cld@2=two");
    let file = &offer.files[0];
    let bomb = zstd::bulk::compress(&vec![0; 8 << 20], 1).unwrap();
    let encoding = PartEncoding {
        zstd: true,
        length: bomb.len() as u64,
        ..full(file).encoding
    };
    let error = send(&installer, file, &encoding, 0, &bomb).unwrap_err();
    assert!(error.to_string().contains("more than 3 bytes"), "{error}");
}

#[test]
fn stages_outlive_an_offer_that_supersedes_theirs_only_where_it_wants_them() {
    let host = Host::with(1, "daily.cld@1=one");
    let installer = host.start();
    let first = manifest(2, "daily.cld@2=two x.ndb=x");
    installer.plan(&first, false, false).unwrap();
    for (file, content) in first.files.iter().zip(["two", "x"]) {
        installer
            .receive(&full(file), file, content.as_bytes())
            .unwrap();
    }
    let second = manifest(3, "daily.cld@3=three x.ndb=x");
    let needs = installer.plan(&second, false, false).unwrap();
    assert_eq!(needs.len(), 1);
    assert_eq!(needs[0].name.as_str(), "daily.cld");
    let staged = fs::read_dir(host.hidden("stage")).unwrap().count();
    assert_eq!(staged, 1, "the file that nobody wants any more is gone");
}

#[test]
fn a_reader_never_sees_a_part_of_a_file() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let content = |generation: u64| format!("{generation}:").repeat(20_000);
    let line = |generation| format!("daily.cld@{generation}={}", content(generation));
    let host = Host::with(1, &line(1));
    let path = host.database().join("daily.cld");
    let stop = Arc::new(AtomicBool::new(false));
    let reader = std::thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            let mut looks = 0;
            while !stop.load(Ordering::Relaxed) {
                let text = fs::read_to_string(&path).unwrap();
                let (number, _) = text.split_once(':').unwrap();
                assert_eq!(text, format!("{number}:").repeat(20_000));
                looks += 1;
            }
            looks
        }
    });
    let installer = host.start();
    for generation in 2..=200 {
        let line = line(generation);
        let completed = host
            .take(&installer, &manifest(generation, &line), &line)
            .unwrap();
        assert_eq!(completed.outcome, Outcome::Live);
    }
    stop.store(true, Ordering::Relaxed);
    assert!(reader.join().unwrap() > 0);
}

#[test]
fn the_nonce_is_made_once() {
    let host = Host::new();
    let first = nonce(&host.state(), [1; 16]).unwrap();
    assert_eq!(nonce(&host.state(), [2; 16]).unwrap(), first);
}

#[test]
fn a_damaged_nonce_is_replaced() {
    let host = Host::new();
    for damaged in [&b""[..], b"0303", b"\xff\xfe\x00"] {
        fs::write(host.state().join(NONCE), damaged).unwrap();
        let new = nonce(&host.state(), [1; 16]).unwrap();
        assert_eq!(new, Nonce([1; 16]));
        assert_eq!(nonce(&host.state(), [2; 16]).unwrap(), new);
    }
}
