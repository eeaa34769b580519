//! Each fault is attributed to the party that caused it, and everything that is known or waits stands
//! in `status`.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use clamcast_proto::wire::{self, ToMaster};
use clamcast_tests::lab::{
    Container, Fleet, Master, PATIENCE, Rogue, SmallDisk, receipt, signatures, until,
};
use clamcast_tests::require;
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::time::timeout;

/// A fleet with a set in its mirror that compresses.
fn fleet() -> (Fleet, Master) {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    set(1).write(&mirror);
    let master = fleet.master(&mirror);
    master.configure("[listen]", "[rollout]\nwaves = [\"100%\"]\n[listen]");
    (fleet, master)
}

fn set(version: u64) -> Container {
    Container::new("daily", version).member("hsb", signatures(0..2000 + version))
}

fn state(master: &Master) -> PathBuf {
    master.directory().join("state")
}

/// The alarms of this name.
fn alarms(master: &Master, name: &str) -> Vec<Value> {
    named(master, "alarms", name)
}

/// The waits of this name.
fn waits(master: &Master, name: &str) -> Vec<Value> {
    named(master, "waits", name)
}

fn named(master: &Master, list: &str, name: &str) -> Vec<Value> {
    let status = master.json(&["status"]).expect("status answers");
    let entries = status[list].as_array().unwrap().iter();
    entries.filter(|it| it["name"] == name).cloned().collect()
}

fn wait_alarm(master: &Master, name: &str) -> Value {
    until(PATIENCE, "the alarm stands", || alarms(master, name).pop())
}

/// Flips a byte in the middle of each file of a directory.
fn flip_bytes(directory: &Path) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::remove_file(&path).unwrap(); // it is read-only
        fs::write(&path, bytes).unwrap();
    }
}

#[test]
fn damaged_objects_and_caches_heal_from_the_mirror_and_no_host_is_blamed() {
    let (fleet, mut master) = fleet();
    master.start();
    let _first = fleet.start_agents(["web1"]);
    master.wait_live("web1", 1);
    for (name, damage) in [
        ("web2", &["objects"][..]),
        ("web3", &["fulls"]),
        ("web4", &["objects", "fulls"]),
    ] {
        for directory in damage {
            flip_bytes(&state(&master).join(directory));
        }
        let _agent = fleet.start_agents([name]);
        master.wait_live(name, 1);
        let receipts = master.audit("receipt");
        let blamed = receipts.iter().find(|it| it["outcome"] == "host_fault");
        assert_eq!(blamed, None, "{name}");
    }
    let alarm = wait_alarm(&master, "store");
    let text = alarm["text"].as_str().unwrap();
    assert!(text.contains("check the disk"), "{text}");
    assert!(!master.audit("alarm").is_empty());
}

#[test]
fn a_lost_object_that_the_mirror_lacks_is_an_alarm_about_the_store() {
    let (fleet, mut master) = fleet();
    master.start();
    let _first = fleet.start_agents(["web1"]);
    master.wait_live("web1", 1);
    let mirror = fleet.mirror();
    fs::rename(mirror.join("daily.cud"), fleet.join("daily.cud")).unwrap();
    for directory in ["objects", "fulls"] {
        flip_bytes(&state(&master).join(directory));
    }
    let _second = fleet.start_agents(["web2"]);
    let alarm = wait_alarm(&master, "store");
    let text = alarm["text"].as_str().unwrap();
    assert!(
        text.contains("daily.cud") && text.contains("hosts cannot get it"),
        "{text}"
    );
    let row = master.wait_agent("web2", "it waits for the master", |row| {
        let error = row["error"].as_str().unwrap_or_default();
        error.contains("the master cannot send daily.cud")
    });
    assert_ne!(row["outcome"], "host_fault");
    // It heals when the mirror has the file again.
    fs::rename(fleet.join("daily.cud"), mirror.join("daily.cud")).unwrap();
    assert!(master.command(&["force-sync", "web2"]).status.success());
    master.wait_live("web2", 1);
}

#[test]
fn two_hosts_with_one_identity_are_an_alarm_with_both_addresses() {
    let (fleet, mut master) = fleet();
    master.start();
    master.wait_generation(1);
    let runtime = Runtime::new().unwrap();
    let _inside = runtime.enter();
    let rogue = Rogue::new(&fleet, "web1");
    let (old, new) = runtime.block_on(async {
        let old = rogue.enter(rogue.config()).await;
        (old, rogue.enter(rogue.config()).await)
    });
    let alarm = wait_alarm(&master, "shared-name");
    let text = alarm["text"].as_str().unwrap();
    assert!(
        text.contains("web1") && text.matches("127.0.0.1").count() == 2,
        "{text}"
    );
    let row = master.agent("web1").unwrap();
    assert_eq!(row["conformant"], false);
    assert!(
        row["error"].as_str().unwrap().contains("two hosts"),
        "{row}"
    );
    let recorded = master.wait_audit("alarm", 1);
    assert_eq!(recorded[0]["subject"], "web1");
    assert_eq!(runtime.block_on(old.ended()), Some(wire::close::REPLACED));
    drop(new);
}

#[test]
fn an_agent_that_is_killed_and_comes_back_is_one_host() {
    let (fleet, mut master) = fleet();
    master.start();
    let [mut agent] = fleet.start_agents(["web1"]);
    master.wait_live("web1", 1);
    for _ in 0..3 {
        agent.kill();
        agent.start();
        let since = master.log().matches("connected").count();
        until(PATIENCE, "it is back", || {
            master.log().matches("connected").count() > since
                || master.agent("web1").unwrap()["connected"] == true
        });
    }
    set(2).write(&fleet.mirror());
    master.wait_live("web1", 2);
    assert!(alarms(&master, "shared-name").is_empty());
}

#[test]
fn a_new_certificate_of_a_known_name_is_in_the_audit_log() {
    let (fleet, mut master) = fleet();
    master.start();
    let [mut agent] = fleet.start_agents(["web1"]);
    master.wait_live("web1", 1);
    assert!(agent.stop().success());
    fleet.certs(&["agent", "web1", "--force"]);
    agent.start();
    let recorded = &master.wait_audit("certificate", 1)[0];
    assert_eq!(recorded["subject"], "web1");
    assert!(recorded["detail"]["certificate"].is_string(), "{recorded}");
}

#[test]
fn a_second_master_is_an_alarm_on_the_master_that_learns_of_it() {
    let (fleet, mut master) = fleet();
    master.start();
    let [mut web1] = fleet.start_agents(["web1"]);
    master.wait_live("web1", 1);
    assert!(web1.stop().success());
    assert!(master.stop().success());
    // A second master of the fleet, with keys and mirror of the first and a state of its own.
    fs::rename(state(&master), fleet.join("first")).unwrap();
    master.start();
    let _web2 = fleet.start_agents(["web2"]);
    master.wait_live("web2", 1);
    web1.start();
    let alarm = wait_alarm(&master, "two-masters");
    assert!(
        alarm["text"].as_str().unwrap().contains("another master"),
        "{alarm}"
    );
    assert!(!master.wait_audit("alarm", 1).is_empty());
}

#[test]
fn a_mirror_that_is_never_quiet_and_an_open_run_are_waits_with_start_and_bound() {
    let (fleet, mut master) = fleet();
    master.configure("quiet = \"300ms\"", "quiet = \"30s\"");
    let run = fleet.mirror().join("tmp.0123456789");
    fs::create_dir(&run).unwrap();
    // A time in the future, which any program may set, is no sign of life.
    let future = std::time::SystemTime::now() + Duration::from_secs(86_400);
    fs::File::open(&run).unwrap().set_modified(future).unwrap();
    master.start();
    let wait = until(PATIENCE, "the run is waited for", || {
        waits(&master, "mirror").pop()
    });
    let text = wait["text"].as_str().unwrap();
    assert!(text.contains("tmp.0123456789"), "{text}");
    let time = |wait: &Value, key: &str| -> jiff::Timestamp {
        wait[key].as_str().unwrap().parse().unwrap()
    };
    let bound = time(&wait, "until").duration_since(time(&wait, "since"));
    assert!(bound <= jiff::SignedDuration::from_mins(15), "{wait}");

    fs::remove_dir(&run).unwrap();
    let mut number = 0;
    let wait = until(PATIENCE, "the file is named", || {
        number += 1;
        fs::write(fleet.mirror().join("feed.ndb"), format!("{number}")).unwrap();
        let wait = waits(&master, "mirror").pop()?;
        let text = wait["text"].as_str().unwrap();
        text.contains("feed.ndb").then_some(wait)
    });
    let bound = time(&wait, "until").duration_since(time(&wait, "since"));
    assert_eq!(bound, jiff::SignedDuration::from_mins(15), "{wait}");
}

#[test]
fn a_command_that_waits_stands_in_status_with_its_operator_and_bound() {
    let (fleet, mut master) = fleet();
    master.start();
    master.wait_generation(1);
    let runtime = Runtime::new().unwrap();
    let _inside = runtime.enter();
    let rogue = Rogue::new(&fleet, "silent");
    let silent = runtime.block_on(rogue.enter(rogue.config()));
    let master = &master;
    thread::scope(|scope| {
        let force = ["force-sync", "silent", "--timeout", "20s"];
        let waiting = scope.spawn(move || master.command(&force));
        let wait = until(PATIENCE, "the command waits", || {
            waits(master, "command").pop()
        });
        assert!(
            wait["text"]
                .as_str()
                .unwrap()
                .contains("`force-sync` of operator:"),
            "{wait}"
        );
        assert!(wait["until"].is_string(), "{wait}");
        drop(silent);
        assert_eq!(waiting.join().unwrap().status.code(), Some(1));
    });
    until(PATIENCE, "the wait is over", || {
        waits(master, "command").is_empty()
    });
}

/// Receipts that a hostile agent sends, each as long as a short one.
const RECEIPTS: u64 = 200;

#[test]
fn a_full_disk_keeps_space_for_operators_and_alarms() {
    require!(Root);
    let (fleet, mut master) = fleet();
    let disk = SmallDisk::of(&state(&master), "96m");
    master.start();
    master.wait_generation(1);
    let runtime = Runtime::new().unwrap();
    let _inside = runtime.enter();
    let rogue = Rogue::new(&fleet, "talker");
    let (mut talk, offer) = runtime.block_on(async {
        let mut talk = rogue.enter(rogue.config()).await;
        let offer = timeout(PATIENCE, talk.offer()).await.unwrap();
        (talk, offer)
    });
    disk.fill();
    let talking = runtime.spawn(async move {
        for seq in 1..=RECEIPTS {
            let receipt = rogue.sign(receipt(&offer, "talker", seq));
            // Waits: the master reads nothing more of it.
            talk.say(&ToMaster::Receipt { receipt }).await;
        }
        talk
    });
    let alarm = wait_alarm(&master, "disk");
    let text = alarm["text"].as_str().unwrap();
    assert!(
        text.contains("reserve") && text.contains("in use"),
        "{text}"
    );
    let paused = master.command(&["rollout", "set-aside", "talker", "--reason", "it floods"]);
    let said = String::from_utf8_lossy(&paused.stderr);
    assert!(paused.status.success(), "{said}");
    assert_eq!(master.wait_audit("set-aside", 1)[0]["subject"], "talker");
    assert!(
        master.audit("receipt").len() < RECEIPTS as usize,
        "agents wait"
    );

    disk.free();
    let all = usize::try_from(RECEIPTS).unwrap();
    master.wait_audit("receipt", all);
    until(PATIENCE, "the alarm ends", || {
        alarms(&master, "disk").is_empty()
    });
    assert!(state(&master).join("reserve").is_file());
    drop(talking);
}
