//! A master that lost its state, or got an old copy of it back.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clamcast_tests::lab::{Agent, Container, Fleet, Master, PATIENCE, signatures, until};
use serde_json::json;

/// A fleet of two agents that are live at generation 3, and a copy of the master's state at 2.
struct Restored {
    fleet: Fleet,
    master: Master,
    agents: [Agent; 2],
    copy: PathBuf,
}

impl Restored {
    fn new() -> Self {
        let fleet = Fleet::new();
        let mut master = fleet.master(&fleet.mirror());
        master.start();
        let mut restored = Self {
            master,
            copy: fleet.join("copy"),
            agents: fleet.start_agents(["web1", "web2"]),
            fleet,
        };
        for version in 1..=2 {
            restored.publish(version);
        }
        assert!(restored.master.stop().success());
        copy(&restored.state(), &restored.copy);
        restored.master.start();
        restored.publish(3);
        restored
    }

    fn state(&self) -> PathBuf {
        self.master.directory().join("state")
    }

    /// Publishes a database, of which the next generation is to be.
    fn publish(&self, version: u64) {
        let members = signatures(0..100 + version);
        let container = Container::new("daily", version).member("hsb", members);
        container.write(&self.fleet.mirror());
        self.wait_live(version);
    }

    fn wait_live(&self, generation: u64) {
        for name in ["web1", "web2"] {
            self.master.wait_live(name, generation);
        }
    }

    /// The fleet follows the master again, above what it had.
    fn check_back(&self) {
        self.wait_live(4);
        let restored = self.master.audit("restored");
        let positions: Vec<_> = restored
            .iter()
            .map(|record| &record["generation"])
            .collect();
        assert_eq!(positions, [&json!(3)], "once: {restored:?}");
        // And goes on with it.
        self.publish(5);
    }
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").args([from, to]).status();
    assert!(copied.unwrap().success());
}

#[test]
fn a_master_restored_from_a_copy_brings_the_fleet_above_what_it_forgot() {
    let mut lab = Restored::new();
    lab.master.kill();
    fs::remove_dir_all(lab.state()).unwrap();
    copy(&lab.copy, &lab.state());
    lab.master.start();
    lab.check_back();
}

#[test]
fn a_restored_master_that_gave_a_number_away_twice_takes_the_next_one() {
    let mut lab = Restored::new();
    for agent in &mut lab.agents {
        assert!(agent.stop().success());
    }
    lab.master.kill();
    fs::remove_dir_all(lab.state()).unwrap();
    copy(&lab.copy, &lab.state());
    lab.master.start();
    lab.master.wait_generation(3); // not the one that the agents have
    for agent in &mut lab.agents {
        agent.start();
    }
    lab.check_back();
}

#[test]
fn a_master_that_lost_its_state_gets_its_fleet_back() {
    let mut lab = Restored::new();
    // Stopped, not killed: without the state it cannot tell an agent that its connection is gone,
    // which the agent then finds out in a minute.
    assert!(lab.master.stop().success());
    fs::remove_dir_all(lab.state()).unwrap();
    lab.master.start();
    lab.check_back();
}

#[test]
fn what_a_killed_master_published_and_did_not_write_down_is_written_at_its_start() {
    let mut lab = Restored::new();
    lab.master.kill();
    // As it is on disk from before a generation is there until its line is.
    let announcement = json!({
        "position": { "epoch": 1, "generation": 3 },
        "actor": "user alice", "accepted": [], "reason": null,
    });
    let path = lab.state().join("announcement.json");
    assert!(!path.exists(), "all is written down");
    fs::write(&path, announcement.to_string()).unwrap();
    lab.master.start();
    let recovered = until(PATIENCE, "it is written down", || {
        let published = lab.master.audit("published");
        published
            .into_iter()
            .find(|record| record["detail"]["recovered"] == true)
    });
    assert_eq!(
        (&recovered["generation"], &recovered["actor"]),
        (&json!(3), &json!("user alice"))
    );
    assert!(!path.exists());
    lab.wait_live(3);
}

#[test]
fn a_copy_made_in_the_middle_of_a_rollout_does_not_hold_back_the_fleet() {
    let fleet = Fleet::new();
    let mut master = fleet.master(&fleet.mirror());
    let rollout = "[rollout]\nwaves = [\"50%\", \"100%\"]\nsettle = \"1h\"\n[listen]";
    master.configure("[listen]", rollout);
    master.start();
    let agents = fleet.start_agents(["web1", "web2"]);
    let mut lab = Restored {
        copy: fleet.join("copy"),
        master,
        agents,
        fleet,
    };
    let publish = |lab: &Restored, version: u64| {
        let members = signatures(0..100 + version);
        let container = Container::new("daily", version).member("hsb", members);
        container.write(&lab.fleet.mirror());
        lab.master.wait_generation(version);
    };
    let promote_to = |lab: &Restored, generation: u64| {
        until(PATIENCE, "the fleet is there", || {
            lab.master.command(&["rollout", "promote"]); // an error: nothing runs yet
            let live = |name| {
                lab.master
                    .agent(name)
                    .is_some_and(|row| row["generation"] == generation)
            };
            live("web1") && live("web2")
        });
        lab.wait_live(generation);
    };
    publish(&lab, 1);
    promote_to(&lab, 1);
    publish(&lab, 2); // settles for an hour after its first wave
    publish(&lab, 3); // waits
    assert!(lab.master.stop().success());
    copy(&lab.state(), &lab.copy);
    lab.master.start();
    promote_to(&lab, 3);
    lab.master.kill();
    fs::remove_dir_all(lab.state()).unwrap();
    copy(&lab.copy, &lab.state());
    lab.master.start();
    // The running generation of the copy is 2, which the agents would decline.
    let restored = lab.master.wait_audit("restored", 1);
    assert_eq!(restored[0]["generation"], 3);
    promote_to(&lab, 3);
    publish(&lab, 4);
    promote_to(&lab, 4);
    assert!(lab.master.audit("declined").is_empty());
    assert!(lab.master.audit("rollout-paused").is_empty());
}
