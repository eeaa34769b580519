//! The host's own files under names that the fleet publishes.

use super::*;

/// Takes a generation, each time after a restart, and returns what the receipt calls adopted.
#[track_caller]
fn take(host: &Host, generation: u64, line: &str) -> Vec<String> {
    let offer = manifest(generation, line);
    let completed = host.take(&host.start(), &offer, line).unwrap();
    assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
    let adopted = completed.adopted.iter();
    adopted.map(|name| name.to_string()).collect()
}

fn kept(host: &Host) -> Files {
    loaded(&host.hidden("adopted"))
}

/// The file that was put aside.
#[track_caller]
fn obsolete(host: &Host) -> String {
    fs::read_to_string(host.hidden("adopted/local.ign2.obsolete")).unwrap()
}

fn lose_state(host: &Host) {
    fs::remove_dir_all(host.state()).unwrap();
    fs::create_dir(host.state()).unwrap();
}

#[test]
fn an_adopted_file_is_reported_and_restored_when_the_fleet_withdraws_its_name() {
    let host = Host::new();
    host.put("local.ign2=own daily.cvd=freshclams other.ndb=other");
    let fleets = "daily.cld@1=one local.ign2=fleets";
    assert_eq!(take(&host, 1, fleets), ["daily.cvd", "local.ign2"]);
    assert_eq!(host.there(), set(&format!("{fleets} other.ndb=other")));
    let installer = host.start();
    let offer = manifest(1, fleets);
    assert_eq!(foreign(&installer, &offer), ["other.ndb"]);
    // Another form of the same name does not end the adoption.
    assert_eq!(take(&host, 2, "daily.cvd@2=two"), ["daily.cvd"]);
    let there = "daily.cvd=two local.ign2=own other.ndb=other";
    assert_eq!(host.there(), set(there));
    assert_eq!(foreign(&host.start(), &offer), ["local.ign2", "other.ndb"]);
    assert!(take(&host, 3, "main.cvd@1=main").is_empty());
    let there = "main.cvd=main daily.cvd=freshclams local.ign2=own other.ndb=other";
    assert_eq!(host.there(), set(there));
    assert_eq!(kept(&host), Files::new());
}

#[test]
fn a_name_that_is_adopted_twice_comes_back_as_it_was_last() {
    let host = Host::new();
    for (generation, own) in [(1, "first"), (3, "second"), (5, "third")] {
        host.put(&format!("local.ign2={own}"));
        let fleets = format!("a.ndb=a local.ign2=fleets-{generation}");
        assert_eq!(take(&host, generation, &fleets), ["local.ign2"]);
        assert!(take(&host, generation + 1, "a.ndb=a").is_empty());
        assert_eq!(host.there(), set(&format!("a.ndb=a local.ign2={own}")));
        assert_eq!(kept(&host), Files::new());
    }
}

#[test]
fn a_file_that_was_kept_before_is_not_overwritten_and_the_newest_is_restored() {
    let host = Host::with(1, "a.ndb=a");
    // Of an agent that restored nothing.
    fs::write(host.hidden("adopted/local.ign2"), "old").unwrap();
    host.put("local.ign2=own");
    assert_eq!(take(&host, 2, "a.ndb=a local.ign2=fleets"), ["local.ign2"]);
    assert!(take(&host, 3, "a.ndb=a").is_empty());
    assert_eq!(host.there(), set("a.ndb=a local.ign2=own"));
    assert_eq!(kept(&host), Files::new());
    assert_eq!(obsolete(&host), "old");
}

#[test]
fn a_file_of_the_host_that_reappears_stays_when_the_fleet_withdraws_its_name() {
    let host = Host::new();
    host.put("local.ign2=first");
    take(&host, 1, "a.ndb=a local.ign2=fleets");
    host.put("local.ign2=second");
    assert!(take(&host, 2, "a.ndb=a").is_empty());
    assert_eq!(host.there(), set("a.ndb=a local.ign2=second"));
    assert_eq!(kept(&host), set("local.ign2=first"), "nothing is lost");
}

#[test]
fn a_damaged_file_of_the_fleet_is_not_taken_for_the_hosts_own() {
    let host = Host::new();
    host.put("local.ign2=own");
    take(&host, 1, "a.ndb=a local.ign2=fleets");
    fs::write(host.database().join("local.ign2"), "damage").unwrap(); // in place
    assert!(take(&host, 2, "a.ndb=a").is_empty());
    assert_eq!(host.there(), set("a.ndb=a local.ign2=own"));
}

#[test]
fn an_adopted_file_that_the_agent_cannot_read_is_restored() {
    let host = Host::new();
    host.put_denied("local.ign2=own");
    assert_eq!(take(&host, 1, "a.ndb=a local.ign2=fleets"), ["local.ign2"]);
    assert!(take(&host, 2, "a.ndb=a").is_empty());
    assert_eq!(host.there(), set("a.ndb=a local.ign2=own"));
}

#[test]
fn a_refused_set_adopts_nothing_and_takes_no_file_of_the_host() {
    let host = Host::with(1, "a.ndb=a");
    host.put("local.ign2=own");
    let bad = "a.ndb=BAD local.ign2=fleets";
    let completed = host.take(&host.start(), &manifest(2, bad), bad).unwrap();
    assert_eq!(completed.outcome, Outcome::Refused);
    assert!(completed.adopted.is_empty());
    assert_eq!(completed.foreign, ["local.ign2"]);
    assert_eq!(kept(&host), Files::new());
    assert!(take(&host, 3, "a.ndb=c").is_empty());
    assert_eq!(host.there(), set("a.ndb=c local.ign2=own"));
}

#[test]
fn a_file_of_the_host_stays_where_the_old_set_waits_for_clamd_after_a_refusal() {
    let mut host = Host::with(1, "a.ndb=a");
    host.clamd.scan = FakeScan::Missing;
    host.put("local.ign2=own");
    let installer = host.start();
    mood(&host, Mood::Rejecting);
    let bad = "a.ndb=b local.ign2=fleets";
    host.take(&installer, &manifest(2, bad), bad).unwrap();
    assert_eq!(host.there(), set("a.ndb=a local.ign2=own"));
    mood(&host, Mood::Up);
    assert!(take(&host, 3, "a.ndb=c").is_empty());
    assert_eq!(host.there(), set("a.ndb=c local.ign2=own"));
}

#[test]
fn a_lost_state_directory_does_not_make_the_fleets_file_the_hosts_own() {
    let host = Host::new();
    host.put("local.ign2=own");
    take(&host, 1, "a.ndb=a local.ign2=fleets");
    lose_state(&host);
    assert_eq!(take(&host, 2, "a.ndb=a local.ign2=newer"), ["local.ign2"]);
    assert_eq!(kept(&host), set("local.ign2=own"));
    assert!(take(&host, 3, "a.ndb=a").is_empty());
    assert_eq!(host.there(), set("a.ndb=a local.ign2=own"));
}

#[test]
fn a_name_that_is_withdrawn_after_the_loss_of_the_state_directory_is_the_hosts_again() {
    let host = Host::new();
    host.put("daily.cvd=freshclams local.ign2=own");
    take(
        &host,
        1,
        "a.ndb=a b.ndb=b daily.cld@1=one local.ign2=fleets",
    );
    lose_state(&host);
    assert!(take(&host, 2, "a.ndb=a").is_empty());
    let own = "daily.cvd=freshclams local.ign2=own";
    assert_eq!(host.there(), set(&format!("a.ndb=a {own}")));
    assert_eq!(
        foreign(&host.start(), &manifest(1, "x.ndb=x")),
        ["daily.cvd", "local.ign2"]
    );
    assert_eq!(kept(&host), Files::new());
}

#[test]
fn a_loose_file_of_the_host_with_the_published_bytes_is_adopted_and_restored() {
    let first = "a.ndb=a daily.cvd@1=one local.ign2=same";
    for updates in [vec![], vec!["a.ndb=a daily.cvd@2=two local.ign2=newer"]] {
        let host = Host::new();
        host.put("daily.cvd=one local.ign2=same");
        assert_eq!(take(&host, 1, first), ["local.ign2"]);
        for line in &updates {
            assert_eq!(take(&host, 2, line), ["local.ign2"]);
        }
        // A withdrawal that clamd refuses gives nothing up.
        let bad = "a.ndb=BAD";
        let completed = host.take(&host.start(), &manifest(3, bad), bad).unwrap();
        assert_eq!(completed.outcome, Outcome::Refused);
        assert_eq!(kept(&host), set("local.ign2=same"));
        assert!(take(&host, 4, "a.ndb=a").is_empty());
        assert_eq!(host.there(), set("a.ndb=a local.ign2=same"));
        assert_eq!(kept(&host), Files::new());
    }
}

#[test]
fn an_adopted_file_that_the_host_has_replaced_or_removed_since_is_not_restored() {
    let host = Host::new();
    host.put("local.ign2=first");
    take(&host, 1, "a.ndb=a local.ign2=fleets");
    host.put("local.ign2=second");
    take(&host, 2, "a.ndb=a");
    assert_eq!(host.there(), set("a.ndb=a local.ign2=second"));
    fs::remove_file(host.database().join("local.ign2")).unwrap();
    assert!(take(&host, 3, "a.ndb=a local.ign2=fleets").is_empty());
    assert!(take(&host, 4, "a.ndb=a").is_empty());
    assert_eq!(host.there(), set("a.ndb=a"));
    assert_eq!(obsolete(&host), "first", "nothing is lost");
}

#[test]
fn a_withdrawal_is_tried_with_the_file_that_is_restored() {
    for (own, outcome) in [("own", Outcome::Live), ("BAD", Outcome::HostFault)] {
        let mut host = Host::new();
        host.clamd.load_test = true;
        host.put(&format!("local.ndb={own}"));
        take(&host, 1, "a.ndb=a local.ndb=fleets");
        if outcome == Outcome::Live {
            // In place: no copy of the published file is left.
            fs::write(host.database().join("local.ndb"), "BAD").unwrap();
        }
        let without = "a.ndb=a";
        let offer = manifest(2, without);
        let completed = host.take(&host.start(), &offer, without).unwrap();
        assert_eq!(completed.outcome, outcome, "{:?}", completed.error);
        if outcome == Outcome::Live {
            assert_eq!(host.there(), set("a.ndb=a local.ndb=own"));
            continue;
        }
        let error = completed.error.unwrap();
        let named = ".clamcast/adopted/local.ndb is not of this set";
        assert!(error.starts_with(named), "{error}");
        assert_eq!(host.there(), set("a.ndb=a local.ndb=fleets"));
    }
}

#[test]
fn the_adopted_copy_stays_while_the_hosts_file_cannot_be_put_back() {
    let host = Host::with(1, "a.ndb=a");
    host.put("local.ign2=own");
    let shim = host.shim(Fault::None);
    let (installer, _) = host.start_on(shim.clone()).unwrap();
    mood(&host, Mood::Away);
    let bad = "a.ndb=BAD local.ign2=fleets";
    host.take(&installer, &manifest(2, bad), bad).unwrap();
    shim.make_immutable(At(Dir::Databases, "local.ign2"));
    mood(&host, Mood::Up);
    host.probe_on(&installer);
    assert_eq!(host.there(), set("a.ndb=a local.ign2=fleets"));
    assert_eq!(kept(&host), set("local.ign2=own"));
    drop(installer);
    host.start();
    assert_eq!(host.there(), set("a.ndb=a local.ign2=own"));
    assert_eq!(kept(&host), Files::new());
}
