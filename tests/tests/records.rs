//! What the master writes down when its disk or one of its files does not take it.

use std::fs;
use std::path::PathBuf;

use clamcast_proto::names::AGENT_NAME_BYTES_MAX;
use clamcast_proto::wire::{self, ToMaster};
use clamcast_tests::lab::{
    Container, Fleet, Master, PATIENCE, Rogue, SmallDisk, code, receipt, signatures, until,
};
use clamcast_tests::require;
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::time::timeout;

/// A fleet with a small set in its mirror.
fn fleet() -> (Fleet, Master) {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    Container::new("daily", 1)
        .member("hsb", signatures(0..100))
        .write(&mirror);
    let master = fleet.master(&mirror);
    master.configure("[listen]", "[rollout]\nwaves = [\"100%\"]\n[listen]");
    (fleet, master)
}

fn state(master: &Master) -> PathBuf {
    master.directory().join("state")
}

/// What `status` says is wrong.
fn alarm(master: &Master) -> String {
    let status = master.json(&["status"]).expect("status answers");
    status["alarm"].as_str().unwrap_or_default().to_owned()
}

/// Entries that wait for the disk, as `status` tells.
fn waiting(master: &Master) -> u64 {
    let alarm = alarm(master);
    let number = alarm.split(" entries wait").next().unwrap_or_default();
    let number = number.rsplit(' ').next().unwrap_or_default();
    number.parse().unwrap_or(0)
}

/// Hosts whose receipts fill the queue of a recorder, and what each may send at once.
const TALKERS: u64 = 10;
const RECEIPTS: u64 = 450;

#[test]
fn a_full_disk_keeps_no_revoked_host_in_and_status_answers() {
    require!(Root);
    let (fleet, mut master) = fleet();
    let disk = SmallDisk::mount(&state(&master));
    master.start();
    master.wait_generation(1);
    let runtime = Runtime::new().unwrap();
    let (thief, talkers) = runtime.block_on(async {
        let thief = Rogue::new(&fleet, "thief");
        let thief = thief.enter(thief.config()).await;
        let mut talkers = Vec::new();
        for number in 0..TALKERS {
            let name = format!("talker{number}");
            let talker = Rogue::new(&fleet, &name);
            let mut conversation = talker.enter(talker.config()).await;
            let offer = timeout(PATIENCE, conversation.offer()).await.unwrap();
            talkers.push((name, talker, conversation, offer));
        }
        (thief, talkers)
    });
    disk.fill();
    let talking = talkers
        .into_iter()
        .map(|(name, talker, mut conversation, offer)| {
            runtime.spawn(async move {
                for seq in 1..=RECEIPTS {
                    let receipt = talker.sign(receipt(&offer, &name, seq));
                    conversation.say(&ToMaster::Receipt { receipt }).await;
                }
                conversation
            })
        });
    let talking: Vec<_> = talking.collect();
    until(PATIENCE, "the queue is full", || waiting(&master) >= 4096);
    let alarm = alarm(&master);
    assert!(alarm.contains("cannot write the audit log"), "{alarm}");

    let forced = master.command(&["force-sync", "thief"]);
    let said = String::from_utf8_lossy(&forced.stderr);
    assert_eq!(forced.status.code(), Some(5), "{said}");
    assert!(said.contains("No space left on device"), "{said}");

    fleet.certs(&["revoke", "thief", "--reason", "stolen"]);
    let closed = runtime.block_on(async { timeout(PATIENCE, thief.connection.closed()).await });
    assert_eq!(code(&closed.unwrap()), Some(wire::close::REVOKED));
    assert!(waiting(&master) >= 4096, "the disk is still full");
    assert!(master.audit("revoked").is_empty());

    disk.free();
    let revoked = &master.wait_audit("revoked", 1)[0];
    assert_eq!(revoked["subject"], "thief");
    let all = usize::try_from(TALKERS * RECEIPTS).unwrap();
    master.wait_audit("receipt", all);
    until(PATIENCE, "the alarm ends", || alarm_ended(&master));
    drop(talking);
}

fn alarm_ended(master: &Master) -> bool {
    !alarm(master).contains("cannot write")
}

#[test]
fn the_longest_name_is_recorded() {
    let (fleet, mut master) = fleet();
    master.start();
    let longest = "n".repeat(AGENT_NAME_BYTES_MAX);
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        let rogue = Rogue::new(&fleet, &longest);
        let mut conversation = rogue.enter(rogue.config()).await;
        timeout(PATIENCE, conversation.offer()).await.unwrap(); // it follows what was written down
    });
    let record = state(&master).join(format!("agents/{longest}.json"));
    let record: Value = serde_json::from_slice(&fs::read(record).unwrap()).unwrap();
    assert_eq!(record["name"], longest);
    assert_eq!(alarm(&master), "");
}

#[test]
fn a_record_that_can_never_be_written_stops_nobody_else() {
    let (fleet, mut master) = fleet();
    master.start();
    master.wait_generation(1);
    let record = state(&master).join("agents/web1.json");
    fs::create_dir_all(record.join("inner")).unwrap();
    let _agents = fleet.start_agents(["web1", "web2"]);
    for name in ["web1", "web2"] {
        master.wait_live(name, 1);
    }
    let alarm = alarm(&master);
    assert!(
        alarm.contains("web1.json") && !alarm.contains("web2"),
        "{alarm}"
    );
    // It heals as soon as it can be written.
    fs::remove_dir_all(&record).unwrap();
    until(PATIENCE, "the record is kept", || record.is_file());
    until(PATIENCE, "the alarm ends", || {
        self::alarm(&master).is_empty()
    });
}
