//! A clamd that is slow, killed, or cannot use what it gets.

use std::fs;
use std::os::unix::fs::chown;

use clamcast_tests::lab::{Container, Fleet, PATIENCE, Part, hash_signature, until};
use clamcast_tests::require;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::{ALWAYS, Host, RUBBISH, set, the_last_set_is_there_and_live};

#[test]
fn a_clamd_that_is_slow_or_killed_in_a_reload_keeps_the_new_set_and_is_live_when_it_comes_back() {
    require!(Clamd);
    let mut host = Host::new();
    assert!(host.agent.stop().success());
    host.agent
        .configure("[clamd]", "[clamd]\ndeadline = \"3s\"");
    host.agent.start();
    host.wait_live();
    for killed in [false, true] {
        let clamd = Pid::from_raw(host.clamd.pid() as i32);
        kill(clamd, Signal::SIGSTOP).unwrap();
        host.publish();
        let version = host.version;
        host.master.wait_agent("web1", "installed", |row| {
            row["outcome"] == "installed" && row["generation"] == version
        });
        assert!(host.there() == set(version), "silence rolls nothing back");
        if killed {
            host.clamd.kill();
            host.clamd.start();
        } else {
            kill(clamd, Signal::SIGCONT).unwrap();
        }
        host.wait_live();
        the_last_set_is_there_and_live(&host, "back again");
    }
}

#[test]
fn a_clamd_killed_in_the_middle_of_a_load_is_live_once_it_is_back() {
    require!(Clamd);
    let mut host = Host::new();
    // A file of others that makes every load take a while: spread out, since for hashes that begin
    // alike the loader takes hours.
    let line = |n: u64| {
        let spread = n.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        format!("S:F:{spread:016x}{n:048x}\n")
    };
    let slow: String = (0..800_000).map(line).collect();
    fs::write(host.agent.database().join("local.gdb"), slow).unwrap();
    host.load();
    let whole = |host: &Host| {
        let log = host.clamd.log();
        log.matches("Activating the newly loaded database").count()
    };
    let (loads, before) = (host.loads(), whole(&host));
    host.publish();
    until(PATIENCE, "a load to begin", || loads < host.loads());
    host.clamd.kill();
    assert_eq!(whole(&host), before, "the load was under way");
    let mut there = host.there();
    there.remove("local.gdb");
    assert!(there == set(2), "the new set stays");
    // Long before the deadline of five minutes, though the log has no end of that load.
    let row = host.master.wait_installed("web1");
    assert_eq!(row["generation"], 2, "{row}");
    host.clamd.start();
    host.wait_live();
    assert!(host.finds_all_of(host.version));
    assert_eq!(host.row()["outcome"], "live");
}

#[test]
fn a_refused_first_set_stays_and_its_receipt_says_why() {
    require!(Clamd, Clamscan);
    let mut host = Host::bare(Fleet::new());
    let good = Container::new("daily", 1).member("hsb", hash_signature(ALWAYS, "Lab.Always"));
    let good = good.bytes();
    host.put(
        &[("daily.cud", &good), ("bad.ndb", RUBBISH.as_bytes())],
        &[],
    );
    host.master.start();
    host.agent.start();
    host.master.wait_installed("web1");
    // It does not start with it, nor when it is tried again.
    for _ in 0..2 {
        host.clamd.start();
        assert!(!host.clamd.wait_ended().success());
    }
    let row = host
        .master
        .wait_agent("web1", "refused", |row| row["outcome"] == "refused");
    let said = row["error"].as_str().unwrap_or_default();
    assert!(said.contains("Malformed database"), "{row}");
    assert!(
        said.contains("there is no previous set to go back to"),
        "{row}"
    );
    assert_eq!(host.agent.names(), ["bad.ndb", "daily.cud"], "nothing goes");

    host.put(&[], &["bad.ndb"]);
    let row = host.master.wait_installed("web1");
    assert_eq!(host.agent.names(), ["daily.cud"], "{row}");
    host.clamd.start();
    host.master.wait_live("web1", 2);
}

#[test]
fn where_a_failed_load_is_the_end_of_clamd_it_gets_only_what_clamscan_loads() {
    require!(Clamd, Clamscan);
    let mut host = Host::bare(Fleet::new());
    let clamd = host.clamd.with("ConcurrentDatabaseReload", "no");
    host.clamd = clamd.with("IdleTimeout", "5"); // so long it waits for its own threads before a load
    let mut host = host.live();
    host.publish();
    host.wait_live();
    the_last_set_is_there_and_live(&host, "a good update");

    let loads = host.loads();
    host.publish_with(Some(("bad.ndb", RUBBISH)));
    let said = host.wait_failed("refused");
    assert!(said.contains("Can't load bad.ndb"), "{said}");
    assert!(host.finds_all_of(2), "clamd scans on");
    assert!(host.there() == set(2));

    let site = host.agent.database().join("site.ndb");
    fs::write(&site, RUBBISH).unwrap();
    host.publish();
    let said = host.wait_failed("host_fault");
    assert!(said.contains("site.ndb is not of this set"), "{said}");
    assert!(host.finds_all_of(2), "clamd scans on");
    assert_eq!(
        host.loads(),
        loads,
        "no RELOAD was sent: {}",
        host.clamd.log()
    );

    // Another user's file, which the kernel lets nobody else link.
    fs::write(
        &site,
        format!("Site.Own:0:*:{}\n", hex::encode("a sample of the site")),
    )
    .unwrap();
    let _ = chown(&site, Some(1), Some(1)); // takes root
    host.publish();
    host.wait_live();
    assert!(host.finds_all_of(host.version));
    let said = host.clamd.scan(b"a sample of the site").unwrap();
    assert!(said.contains("Site.Own"), "{said}");
    assert!(!host.clamd.log().contains("ERROR"), "{}", host.clamd.log());
}

#[test]
fn what_clamd_is_configured_not_to_load_of_a_set_is_named_where_it_is_live() {
    require!(Clamd, TestFiles);
    let mut host = Host::bare(Fleet::new());
    host.clamd = host.clamd.with("OfficialDatabaseOnly", "yes");
    let signed = fs::read(Part::TestFiles.path().join("test-1.cvd")).unwrap();
    let own = format!("Lab.Own:0:*:{}\n", hex::encode(ALWAYS));
    host.put(&[("test.cvd", &signed), ("own.ndb", own.as_bytes())], &[]);
    let row = host.start();
    assert_eq!(host.clamd.scan(ALWAYS).unwrap(), "stream: OK");
    let named = "OfficialDatabaseOnly yes: clamd does not load own.ndb";
    let note = row["clamd"]["note"].as_str().unwrap_or_default();
    assert!(note.starts_with(named), "{row}");
    let status = host.agent.command(&["status"]);
    let status = String::from_utf8_lossy(&status.stdout);
    assert!(status.contains(named), "{status}");
}
