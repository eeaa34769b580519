//! Keys that are replaced while a fleet runs.

use std::fs;
use std::path::Path;

use clamcast_proto::audit::Checkpoint;
use clamcast_proto::dsse::{Envelope, PublicKey};
use clamcast_proto::keys::KeySet;
use clamcast_tests::lab::{Agent, Container, Fleet, Master, PATIENCE, signatures, until};
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::DecodePrivateKey as _;
use serde_json::Value;

fn publish(mirror: &Path, version: u64) {
    let signatures = signatures(0..10 + version);
    Container::new("daily", version)
        .member("hsb", signatures)
        .write(mirror);
}

fn public(fleet: &Fleet, key: &str) -> PublicKey {
    let pem = fs::read_to_string(fleet.pki().join(key)).unwrap();
    PublicKey::of(&SigningKey::from_pkcs8_pem(&pem).unwrap())
}

/// The master reads its key files as they are now, as after they were copied to it.
fn restart(master: &mut Master) {
    assert!(master.stop().success());
    master.start();
}

/// Verifies the whole log, by the master's files and the newest key set.
fn verify(master: &Master) -> Value {
    let config = master.config().to_str().unwrap();
    let verified = master
        .json(&["audit", "verify", "--config", config])
        .unwrap();
    assert_eq!(verified["ok"], true, "{verified}");
    verified
}

/// Waits until the file holds a checkpoint that `key` signed.
fn wait_checkpoint(path: &Path, key: &PublicKey) {
    until(PATIENCE, "a checkpoint of the new key", || {
        let checkpoint = fs::read_to_string(path).map_err(|error| error.to_string())?;
        Checkpoint::verify(&checkpoint, [key], None).map_err(|error| error.to_string())
    });
}

fn key_set(agent: &Agent) -> KeySet {
    let text = fs::read(agent.directory().join("state/keys.json")).unwrap();
    let envelope: Envelope = serde_json::from_slice(&text).unwrap();
    (*KeySet::verify(&envelope).unwrap()).clone()
}

#[test]
fn the_audit_key_of_a_running_fleet_is_rotated_and_the_log_verifies_over_the_change() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    publish(&mirror, 1);
    let mut master = fleet.master(&mirror);
    master.start();
    let [agent] = fleet.start_agents(["web1"]);
    master.wait_live("web1", 1);
    let old = public(&fleet, "audit.key");
    let before = verify(&master)["records"].as_u64().unwrap();

    let said = fleet.certs(&["rotate", "audit"]);
    let new = public(&fleet, "audit.key");
    assert!(said.contains(&new.id().to_string()), "{said}");
    restart(&mut master);
    wait_checkpoint(&master.directory().join("state/audit/checkpoint"), &new);
    assert!(verify(&master)["records"].as_u64().unwrap() > before);
    publish(&mirror, 2);
    master.wait_live("web1", 2);
    wait_checkpoint(&agent.directory().join("state/checkpoint"), &new);
    assert_eq!(key_set(&agent).audit, [new.clone(), old]);

    // A master that goes back to the key before it is right, too.
    let [newest, kept] = ["audit.key", "audit.key.old"].map(|name| fleet.pki().join(name));
    let newest_pem = fs::read(&newest).unwrap();
    fs::copy(kept, &newest).unwrap();
    restart(&mut master);
    verify(&master);
    fs::write(&newest, newest_pem).unwrap();
    restart(&mut master);

    fleet.certs(&["rotate", "audit", "--drop-old"]);
    restart(&mut master);
    verify(&master);
    publish(&mirror, 3);
    master.wait_live("web1", 3);
    assert_eq!(key_set(&agent).audit, [new]);
}

#[test]
fn a_master_whose_audit_key_was_dropped_too_early_starts_with_the_restored_key() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    publish(&mirror, 1);
    let mut master = fleet.master(&mirror);
    master.start();
    master.wait_generation(1);
    assert!(master.stop().success());
    fleet.certs(&["rotate", "audit"]);
    let said = fleet.certs(&["rotate", "audit", "--drop-old"]);
    assert!(said.contains("--restore-old"), "{said}");
    let process = master.process();
    master.launch(process);
    assert!(!master.wait_ended().success());
    assert!(master.log().contains("--restore-old"), "{}", master.log());

    fleet.certs(&["rotate", "audit", "--restore-old"]);
    master.start();
    verify(&master);
    fleet.certs(&["rotate", "audit", "--drop-old"]);
    restart(&mut master);
    verify(&master);
}

#[test]
fn the_manifest_key_of_a_running_fleet_is_rotated_and_then_dropped() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    publish(&mirror, 1);
    let mut master = fleet.master(&mirror);
    master.start();
    let [agent] = fleet.start_agents(["web1"]);
    // It was set up with the old key set, and starts after the change.
    let mut late = fleet.agent("web2");
    master.wait_live("web1", 1);
    let signer = |position: &str| {
        let path = master_generation(&fleet, position);
        let envelope: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        envelope["signatures"][0]["keyid"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let old = public(&fleet, "manifest.key");

    fleet.certs(&["rotate", "manifest"]);
    let new = public(&fleet, "manifest.key");
    restart(&mut master);
    late.start();
    master.wait_live("web2", 1);
    assert_eq!(
        master.audit("published").len(),
        1,
        "the old generation counts"
    );
    publish(&mirror, 2);
    for name in ["web1", "web2"] {
        master.wait_live(name, 2);
    }
    assert_eq!(signer("1-1"), old.id().to_string());
    assert_eq!(signer("1-2"), new.id().to_string());
    assert_eq!(key_set(&agent).manifest, [new.clone(), old]);

    fleet.certs(&["rotate", "manifest", "--drop-old"]);
    restart(&mut master);
    let in_epoch = |name: &str, epoch: u64, generation: u64| {
        master.wait_agent(name, "live in the new epoch", |row| {
            row["epoch"] == epoch && row["generation"] == generation && row["live"] == true
        });
    };
    in_epoch("web1", 2, 1);
    in_epoch("web2", 2, 1);
    publish(&mirror, 3);
    in_epoch("web1", 2, 2);
    in_epoch("web2", 2, 2);
    assert_eq!(key_set(&agent).manifest, [new]);
}

fn master_generation(fleet: &Fleet, position: &str) -> std::path::PathBuf {
    fleet
        .join("master/state/generations")
        .join(format!("{position}.json"))
}
