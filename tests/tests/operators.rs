//! What operators do, with the real commands on real daemons.

use std::fs;
use std::process::{Output, Stdio};

use clamcast_tests::lab::{Agent, Container, Fleet, Master, PATIENCE, signatures, until};
use serde_json::Value;

/// A master with `agents`, all live at generation 1 of a small set.
fn fleet_of(names: &[&str]) -> (Fleet, Master, Vec<Agent>) {
    let fleet = Fleet::new();
    let mirror = fleet.join("mirror");
    fs::create_dir_all(&mirror).unwrap();
    Container::new("daily", 1)
        .member("hsb", signatures(0..1000))
        .write(&mirror);
    let mut master = fleet.master(&mirror);
    master.start();
    let mut agents: Vec<_> = names.iter().map(|name| fleet.agent(name)).collect();
    for agent in &mut agents {
        agent.start();
    }
    for name in names {
        master.wait_live(name, 1);
    }
    (fleet, master, agents)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn exits(output: &Output, code: i32, says: &str) {
    let said = text(&output.stdout) + &text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(said.contains(says), "{says} is not in: {said}");
}

#[test]
fn force_sync_finds_a_changed_file_and_mends_it() {
    let (_fleet, master, agents) = fleet_of(&["web1", "web2"]);
    let file = agents[0].database().join("daily.cud");
    let good = fs::read(&file).unwrap();
    // In place, with size and time kept: the link that the agent keeps is damaged with it.
    let time = fs::metadata(&file).unwrap().modified().unwrap();
    let mut bad = good.clone();
    bad[5000] ^= 1;
    fs::write(&file, &bad).unwrap();
    fs::File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .set_modified(time)
        .unwrap();
    exits(&agents[0].command(&["verify"]), 1, "daily.cud");

    let output = master.command(&["force-sync", "web*"]);
    exits(&output, 0, "web1");
    assert_eq!(fs::read(&file).unwrap(), good);
    exits(&agents[0].command(&["verify"]), 0, "");

    let log = master.audit("force-sync");
    assert_eq!(log.len(), 1);
    assert!(
        log[0]["actor"].as_str().unwrap().starts_with("operator:"),
        "{}",
        log[0]
    );
    assert_eq!(
        log[0]["detail"]["agents"],
        serde_json::json!(["web1", "web2"])
    );
    assert_eq!(master.audit("force-sync-end")[0]["outcome"], "done");
}

#[test]
fn force_sync_full_sends_the_file_and_json_has_one_object_a_line() {
    let (_fleet, master, agents) = fleet_of(&["web1"]);
    fs::remove_file(agents[0].database().join("daily.cud")).unwrap();
    let output = master.command(&["force-sync", "--all", "--full", "--json"]);
    exits(&output, 0, "");
    let lines: Vec<Value> = text(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let last = lines.last().unwrap();
    assert_eq!(
        (&last["agent"], &last["outcome"]),
        (&"web1".into(), &"live".into())
    );
    assert_eq!(agents[0].names(), ["daily.cud"]);
}

#[test]
fn force_sync_names_whoever_is_offline_unknown_or_too_late() {
    let (_fleet, master, mut agents) = fleet_of(&["web1", "web2"]);
    agents[1].stop();
    until(PATIENCE, "web2 is gone", || {
        master.agent("web2").unwrap()["connected"] == false
    });
    let output = master.command(&["force-sync", "--all"]);
    exits(&output, 1, "offline");
    exits(&output, 1, "1 of 2 agents failed");
    exits(
        &master.command(&["force-sync", "wbe1"]),
        2,
        "did you mean `web1`",
    );
    exits(&master.command(&["force-sync"]), 2, "required");
    exits(
        &master.command(&["force-sync", "--group", "attic"]),
        2,
        "no agent is in group `attic`",
    );
    exits(
        &master.command(&["force-sync", "--all", "--generation", "1", "--accept", "x"]),
        2,
        "cannot be used",
    );
    exits(
        &master.command(&["force-sync", "web1", "--generation", "9", "--accept", "x"]),
        4,
        "never go back",
    );
    exits(
        &master.command(&["force-sync", "web1", "--no-wait"]),
        0,
        "ordered",
    );
    until(PATIENCE, "the outcome is in the log", || {
        master.audit("force-sync-end").len() == 2
    });
}

#[test]
fn what_was_ordered_survives_the_operators_interruption() {
    let (_fleet, master, agents) = fleet_of(&["web1"]);
    fs::remove_file(agents[0].database().join("daily.cud")).unwrap();
    let mut command = clamcast_tests::lab::program("clamcast-master");
    command
        .arg("--socket")
        .arg(master.socket())
        .args(["force-sync", "web1"]);
    let mut command = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until(PATIENCE, "it is ordered", || {
        !master.audit("force-sync").is_empty()
    });
    command.kill().unwrap(); // Ctrl-C and worse
    command.wait().unwrap();
    until(PATIENCE, "its end is in the log", || {
        master
            .audit("force-sync-end")
            .iter()
            .any(|end| end["outcome"] == "done")
    });
    assert_eq!(agents[0].names(), ["daily.cud"]);
}

#[test]
fn a_daemon_that_is_not_there_is_exit_three_with_the_next_step() {
    let fleet = Fleet::new();
    let master = fleet.master(&fleet.join("mirror"));
    for command in ["status", "agents", "generations", "publish"] {
        exits(&master.command(&[command]), 3, "is it running");
    }
    let agent = fleet.agent("web1");
    exits(&agent.command(&["status"]), 3, "is it running");
}

#[test]
fn check_config_names_line_and_nearest_key() {
    let fleet = Fleet::new();
    let master = fleet.master(&fleet.join("mirror"));
    let check = |code, says: &str| {
        let config = master.config().to_str().unwrap().to_owned();
        exits(
            &master.command(&["check-config", "--config", &config]),
            code,
            says,
        );
    };
    check(0, "good");
    master.configure("quiet = \"300ms\"", "quite = \"300ms\"");
    check(2, "did you mean `quiet`?");
    master.configure("quite = \"300ms\"", "quiet = \"soon\"");
    check(2, "master.toml:5");
    master.configure("quiet = \"soon\"", "quiet = \"1s\"");
    master.configure("manifest.key", "audit.key");
    check(2, "not one of the manifest keys");
}
