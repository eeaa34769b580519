//! What an offer comes to.

use super::*;
use crate::install::lab::Shim;

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
    assert_eq!((proven(&host), completed.install.0), (vec![1, 2, 3], 3));
}

#[test]
fn without_a_gate_or_with_a_damaged_one_it_takes_two() {
    for damage in ["", "Clamcast.Install-9\n"] {
        let host = Host::with(1, "daily.cld@1=one");
        host.clamd.proven.lock().unwrap().clear();
        fs::write(host.database().join(GATE), damage).unwrap();
        let new = "daily.cld@2=two";
        let completed = host.take(&host.start(), &manifest(2, new), new).unwrap();
        assert_eq!((proven(&host), completed.install.0), (vec![3, 4], 4));
    }
}

#[test]
fn the_same_content_under_a_new_number_moves_only_the_number() {
    let line = "daily.cld@1=one";
    let (host, completed) = check(line, "", line, Outcome::Live, line);
    assert_eq!(
        completed.install,
        InstallNumber(2),
        "the install of the generation before"
    );
    let installed = host.start().installed().unwrap();
    assert_eq!(installed.set.manifest.generation.number(), 2);
}

/// Offers these files to a host with a clamd that is `old`. Returns what came of it, how often clamd
/// loaded and the numbers it was seen with, and checks the directory.
fn resign(is_old: bool, before: &str, new: &str) -> (Completed, usize, Vec<u64>) {
    let mut host = Host::with(1, before);
    host.clamd.is_old = is_old;
    let (loads, canary) = (*host.clamd.loads.lock().unwrap(), host.canary());
    host.clamd.proven.lock().unwrap().clear();
    let installer = host.start();
    let completed = host.take(&installer, &manifest(2, new), new).unwrap();
    assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
    assert_eq!(completed.files, completed.set.files());
    assert_eq!(host.there(), set(new));
    assert_eq!(
        installer
            .verify()
            .iter()
            .filter(|it| !it.is_right())
            .count(),
        0
    );
    let installed = installer.installed().unwrap();
    assert_eq!(installed.set.manifest.generation.number(), 2);
    assert_eq!(installed.install, completed.install);
    let loaded = *host.clamd.loads.lock().unwrap() - loads;
    assert_eq!(host.canary() == canary, loaded == 0);
    (completed, loaded, proven(&host))
}

#[test]
fn other_signature_files_alone_do_not_reload_a_clamd_that_reads_none() {
    let signed = "daily.cvd@1=one daily-1.cvd.sign=signed x.ndb=x";
    for new in [
        "daily.cvd@1=one daily-1.cvd.sign=again x.ndb=x",
        "daily.cvd@1=one x.ndb=x",
        "daily.cvd@1=one daily-1.cvd.sign=signed x.ndb=x y-1.cvd.sign=signed",
    ] {
        let (completed, loads, proven) = resign(true, signed, new);
        assert_eq!(loads, 0, "{new}");
        assert_eq!(proven, [completed.install.0], "seen with the number it has");
        let (_, loads, _) = resign(false, signed, new);
        assert!(loads > 0, "ClamAV 1.5 reads them: {new}");
    }
}

#[test]
fn a_database_that_changes_with_its_signature_file_is_loaded_and_proven() {
    let signed = "daily.cvd@1=one daily-1.cvd.sign=signed x.ndb=x";
    for new in [
        "daily.cvd@2=two daily-2.cvd.sign=signed x.ndb=x",
        "daily.cvd@1=one daily-1.cvd.sign=again",
        "daily.cvd@1=one daily-1.cvd.sign=again x.ndb=x y.ndb=y",
    ] {
        let (_, loads, _) = resign(true, signed, new);
        assert!(loads > 0, "{new}");
    }
}

#[test]
fn other_signature_files_are_installed_as_ever_where_clamd_is_not_seen() {
    let mut host = Host::with(1, "daily.cvd@1=one daily-1.cvd.sign=signed");
    host.clamd.is_old = true;
    mood(&host, Mood::Away);
    let new = "daily.cvd@1=one daily-1.cvd.sign=again";
    let before = host.canary();
    let completed = host.take(&host.start(), &manifest(2, new), new).unwrap();
    assert_eq!(completed.outcome, Outcome::Installed);
    assert_eq!(host.there(), set(new));
    assert!(host.canary() > before);
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
    assert!(installer.standing().borrow().waits_for_clamd);
    assert_eq!(installer.installed().unwrap().outcome, Outcome::Installed);
    assert!(host.look_at_clamd(&installer).is_none(), "it is told once");
    mood(&host, Mood::Up);
    let completed = host.probe_on(&installer).unwrap();
    assert_eq!(
        (completed.outcome, completed.install),
        (Outcome::Live, number)
    );
    assert!(!installer.standing().borrow().waits_for_clamd);
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
    assert_eq!(proven(&host).last(), Some(&installed.install.0));
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
        refused_before(&installer, &offer).unwrap().outcome,
        Outcome::Refused
    );
    let again = host.take(&installer, &offer, line).unwrap();
    assert!(again.error.unwrap().starts_with("refused before: "));
    assert_eq!(host.canary(), tries, "not tried again");
    let needs = plan(&installer, &offer, true).unwrap();
    for need in needs {
        let file = offer.file(&need.name).unwrap();
        installer.receive(&full(file), file, &b"BAD"[..]).unwrap();
    }
    let forced = installer.install(&offer, true, CancellationToken::new());
    let forced = block_on(forced);
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
fn a_lost_state_directory_costs_neither_a_transfer_nor_a_number() {
    let line = "daily.cld@1=one main.cvd@62=main";
    let host = Host::with(1, line);
    let number = host.canary();
    fs::remove_dir_all(host.state()).unwrap();
    fs::create_dir(host.state()).unwrap();
    let installer = host.start();
    assert!(installer.installed().is_none());
    let offer = manifest(2, line);
    assert_eq!(plan(&installer, &offer, false).unwrap(), []);
    let completed = host.install(&installer, &offer);
    assert_eq!(
        (completed.outcome, completed.install),
        (Outcome::Live, number.next().unwrap())
    );
    assert_eq!(gate_number(&loaded(&host.database())[GATE]), number.next());
    assert!(loaded(&host.hidden("adopted")).is_empty());
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
    let completed = host.probe_on(&installer).unwrap();
    assert_eq!(completed.outcome, Outcome::HostFault);
    assert!(
        installer.standing().borrow().waits_for_clamd,
        "probing goes on"
    );
    assert!(refused_before(&installer, &manifest(2, line)).is_none());
    let completed = host.repair(&installer).unwrap().unwrap();
    assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
    assert_eq!(host.there(), set(line));
}

/// Installs `line` as generation 2 over `daily.cld@1=one`, again and again: the disk fails at the first
/// call, then at the second, and so on until an install ends before it. `fault` says how the disk fails,
/// `mood` what clamd does. `inspect` gets every install that the start of the agent did not prevent.
fn at_each_call(
    fault: impl Fn(u64) -> Fault,
    clamd: Mood,
    line: &str,
    mut inspect: impl FnMut(u64, &Host, &Shim, &FakeInstaller, Option<Outcome>),
) {
    for call in 0.. {
        let host = Host::with(1, "daily.cld@1=one");
        mood(&host, clamd);
        let shim = host.shim(fault(call));
        let Ok((installer, _)) = host.start_on(shim.clone()) else {
            continue; // it was the start that failed
        };
        let taken = host.take(&installer, &manifest(2, line), line);
        if shim.calls() <= call {
            break; // it ended before
        }
        let outcome = taken.ok().map(|taken| taken.outcome);
        inspect(call, &host, &shim, &installer, outcome);
    }
}

/// The record of what is installed, as it is on disk.
fn record(host: &Host) -> Installed {
    serde_json::from_slice(&fs::read(host.state().join("installed.json")).unwrap()).unwrap()
}

fn once(call: u64) -> Fault {
    Fault::Once(call, Errno::EIO)
}

#[test]
fn a_set_that_waits_for_clamd_is_the_installed_one_although_its_record_could_not_be_written() {
    let mut unrecorded = 0;
    let line = "daily.cld@2=two";
    at_each_call(
        once,
        Mood::Away,
        line,
        |call, host, _, installer, outcome| {
            if outcome == Some(Outcome::Installed) {
                let old = manifest(1, "daily.cld@1=one").envelope().clone();
                let is_old = record(host).set.envelope.payload == old.payload;
                unrecorded += usize::from(is_old);
                assert_eq!(wrong(installer, Depth::Surface), [], "call {call}");
            }
        },
    );
    assert!(unrecorded > 0, "no call was the write of the record");
}

#[test]
fn the_same_content_under_a_new_number_is_installed_although_its_record_could_not_be_written() {
    let mut unrecorded = 0;
    let line = "daily.cld@1=one";
    at_each_call(once, Mood::Up, line, |call, host, _, installer, outcome| {
        if outcome == Some(Outcome::Live) {
            let generation = |installed: Installed| installed.set.manifest.generation.number();
            unrecorded += usize::from(generation(record(host)) == 1);
            let installed = installer.installed().map(generation);
            assert_eq!(installed, Some(2), "call {call}");
        }
    });
    assert!(unrecorded > 0, "no call was the write of the record");
}

#[test]
fn what_a_failing_disk_left_untidy_is_tidied_by_a_probe_without_another_receipt() {
    let mut untidy = 0;
    let line = "daily.cld@2=two";
    let from = |call| Fault::From(call, Errno::EIO);
    at_each_call(
        from,
        Mood::Up,
        line,
        |call, host, shim, installer, outcome| {
            shim.set_fault(Fault::None);
            if outcome == Some(Outcome::Live) && host.state().join("journal.json").exists() {
                untidy += 1;
                assert_eq!(look(installer, Depth::Surface), Look::NotNow);
                assert!(installer.standing().borrow().is_unproven, "it is probed");
                assert!(host.probe_on(installer).is_none());
                assert_eq!(wrong(installer, Depth::Surface), [], "call {call}");
            }
        },
    );
    assert!(untidy > 0, "no call was one of the last");
}
