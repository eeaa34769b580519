//! What counts as evidence against a set, and what is the host's fault.

use super::*;

const OLD: &str = "daily.cld@1=one";
const BAD: &str = "daily.cld@2=BAD";

/// A host with `OLD` live, whose clamscan says this.
fn host(scan: FakeScan) -> Host {
    let mut host = Host::with(1, OLD);
    host.clamd.scan = scan;
    host
}

/// Offers `line`; what came of it, and whether a refusal is remembered.
#[track_caller]
fn offer(host: &Host, line: &str, outcome: Outcome, there: &str) -> (FakeInstaller, String) {
    let installer = host.start();
    let offer = manifest(2, line);
    let completed = host.take(&installer, &offer, line).unwrap();
    assert_eq!(completed.outcome, outcome, "{:?}", completed.error);
    assert_eq!(host.there(), set(there));
    let remembered = refused_before(&installer, &offer).is_some();
    assert_eq!(remembered, outcome == Outcome::Refused);
    (installer, completed.error.unwrap_or_default())
}

fn loads(host: &Host) -> usize {
    *host.clamd.loads.lock().unwrap()
}

fn scans(host: &Host) -> Vec<String> {
    host.clamd.scans.lock().unwrap().clone()
}

#[test]
fn clamscan_that_names_an_intact_file_and_loads_the_previous_set_is_evidence() {
    let host = host(FakeScan::Names);
    let (_, error) = offer(&host, BAD, Outcome::Refused, OLD);
    assert!(error.contains("Can't load daily.cld"), "{error}");
    assert_eq!(scans(&host), ["trial"], "one control");
}

#[test]
fn a_refusal_blames_the_file_that_clamscan_names_also_when_it_is_repeated() {
    let host = host(FakeScan::Names);
    let installer = host.start();
    let offer = manifest(2, BAD);
    let refused = host.take(&installer, &offer, BAD).unwrap();
    assert_eq!(refused.outcome, Outcome::Refused);
    assert_eq!(refused.blamed, Some("daily.cld".parse().unwrap()));
    let again = refused_before(&installer, &offer).unwrap();
    assert_eq!(again.blamed, refused.blamed);
}

#[test]
fn what_is_not_refused_or_names_no_file_of_the_generation_blames_none() {
    let host = host(FakeScan::Loads);
    mood(&host, Mood::Rejecting);
    let new = "daily.cld@2=two";
    let completed = host.take(&host.start(), &manifest(2, new), new).unwrap();
    assert_eq!(
        (completed.outcome, completed.blamed),
        (Outcome::HostFault, None)
    );
    let named = |error: &str| {
        let ending = Ending {
            outcome: Outcome::Refused,
            install: InstallNumber(1),
            clamd: ClamdReport::default(),
            error: Some(error.to_owned()),
        };
        let blamed = receipt::blamed(&manifest(2, new), &ending);
        blamed.map(|name| name.to_string())
    };
    let ours = "clamscan: Can't load daily.cld: Malformed database; live as install 3";
    assert_eq!(named(ours).as_deref(), Some("daily.cld"));
    assert_eq!(
        named("clamscan: Can't load site.ndb: Malformed database"),
        None
    );
    assert_eq!(named("clamd: Malformed database"), None);
}

#[test]
fn a_set_that_clamscan_loads_stays_and_is_live_once_clamd_can_load_it() {
    for scan in [FakeScan::Loads, FakeScan::Hindered] {
        let host = host(scan);
        mood(&host, Mood::Rejecting);
        let new = "daily.cld@2=two";
        let (installer, error) = offer(&host, new, Outcome::HostFault, new);
        assert!(error.starts_with("clamd: Malformed database"), "{error}");
        assert!(error.contains("memory"), "{error}");
        assert!(installer.standing().borrow().waits_for_clamd);
        let before = loads(&host);
        assert!(host.probe_on(&installer).is_none(), "reported once");
        assert_eq!(loads(&host), before + 1, "and loaded again");
        mood(&host, Mood::Up);
        let completed = host.probe_on(&installer).unwrap();
        assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
        assert_eq!(host.there(), set(new));
    }
}

#[test]
fn without_clamscan_clamd_must_reject_the_set_before_and_after_it_accepts_the_previous_one() {
    for scan in [FakeScan::Missing, FakeScan::NamesNothing] {
        let host = host(scan);
        let before = loads(&host);
        let (installer, error) = offer(&host, BAD, Outcome::Refused, OLD);
        assert!(error.contains("twice"), "{error}");
        // Forward, back, forward, back.
        assert_eq!(loads(&host), before + 4);
        let installed = installer.installed().unwrap();
        assert_eq!(installed.outcome, Outcome::Live);
        assert_eq!(proven(&host).last(), Some(&installed.install.0));
        assert!(fs::read_dir(host.hidden("stage")).unwrap().next().is_none());
    }
}

#[test]
fn a_clamd_that_accepts_no_control_is_the_hosts_fault() {
    let host = host(FakeScan::Missing);
    mood(&host, Mood::Rejecting);
    let (installer, error) = offer(&host, "daily.cld@2=two", Outcome::HostFault, OLD);
    assert!(error.contains("does not load it either"), "{error}");
    assert!(host.probe_on(&installer).is_none(), "reported once");
    mood(&host, Mood::Up);
    let completed = host.probe_on(&installer).unwrap();
    assert_eq!(completed.outcome, Outcome::Live);
    let new = "daily.cld@2=two";
    offer(&host, new, Outcome::Live, new);
}

#[test]
fn a_clamd_that_recovers_after_the_control_has_the_set_live() {
    let mut host = host(FakeScan::Missing);
    host.clamd.recovers_after = Some(1);
    mood(&host, Mood::Rejecting);
    let new = "daily.cld@2=two";
    offer(&host, new, Outcome::Live, new);
}

#[test]
fn without_a_previous_set_a_clamd_that_rejects_is_the_hosts_fault() {
    for scan in [FakeScan::Missing, FakeScan::NamesNothing] {
        let mut host = Host::new();
        host.clamd.scan = scan;
        let (installer, error) = offer(&host, BAD, Outcome::HostFault, BAD);
        assert!(error.contains("no previous set"), "{error}");
        assert!(host.probe_on(&installer).is_none(), "reported once");
        host.put("daily.cld=two");
        assert!(host.probe_on(&installer).is_some());
    }
}

#[test]
fn a_named_file_that_is_damaged_or_unreadable_is_the_hosts_fault() {
    for damaged in [false, true] {
        let host = host(FakeScan::Claims("daily.cld"));
        let installer = host.start();
        let (line, manifest) = ("daily.cld@2=two", manifest(2, "daily.cld@2=two"));
        mood(&host, Mood::Away);
        host.take(&installer, &manifest, line).unwrap();
        match damaged {
            true => host.put("daily.cld=BAD"),
            false => host.put_denied("daily.cld=two"),
        }
        mood(&host, Mood::Rejecting);
        let completed = host.probe_on(&installer).unwrap();
        let error = completed.error.unwrap();
        assert_eq!(completed.outcome, Outcome::HostFault, "{error}");
        let said = match damaged {
            true => "daily.cld was changed by somebody",
            false => "daily.cld cannot be read again",
        };
        assert!(error.starts_with(said), "{error}");
        assert!(refused_before(&installer, &manifest).is_none());
        assert!(installer.standing().borrow().waits_for_clamd);
    }
}

#[test]
fn where_clamscan_loads_no_previous_set_either_the_host_is_at_fault_and_the_set_stays() {
    let host = host(FakeScan::Claims("daily.cld"));
    mood(&host, Mood::Rejecting);
    let new = "daily.cld@2=two";
    let (installer, error) = offer(&host, new, Outcome::HostFault, new);
    assert!(error.contains("the previous set either"), "{error}");
    assert!(installer.standing().borrow().waits_for_clamd);
}

#[test]
fn where_memory_permits_no_control_the_previous_set_is_back_and_nothing_is_remembered() {
    let mut host = host(FakeScan::Names);
    host.clamd.memory = false;
    let (_, error) = offer(&host, BAD, Outcome::HostFault, OLD);
    assert!(error.contains("as a control"), "{error}");
    assert_eq!(scans(&host), [""; 0]);
}

#[test]
fn a_blocking_clamd_gets_no_set_that_clamscan_rejects_whatever_the_evidence() {
    for (scan, outcome) in [
        (FakeScan::Names, Outcome::Refused),
        (FakeScan::NamesNothing, Outcome::HostFault),
        (FakeScan::Claims("daily.cld"), Outcome::HostFault),
    ] {
        let mut host = host(scan);
        host.clamd.load_test = true;
        let before = loads(&host);
        offer(&host, BAD, outcome, OLD);
        assert_eq!(loads(&host), before, "clamd was not asked");
    }
}

#[test]
fn a_blocking_clamd_without_clamscan_has_no_control_and_the_previous_set_is_back() {
    let mut host = host(FakeScan::Missing);
    host.clamd.load_test = true;
    let before = loads(&host);
    let (_, error) = offer(&host, BAD, Outcome::HostFault, OLD);
    assert!(error.contains("install clamscan"), "{error}");
    // Once forward; the way back is proven twice.
    assert_eq!(loads(&host), before + 3);
}
