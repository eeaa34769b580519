//! The main job, with real parts from end to end: freshclam, master, QUIC, agents, clamd.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use clamcast_tests::lab::{
    Clamd, Container, Fleet, Mirror, PATIENCE, hash_signature, signatures, until,
};
use clamcast_tests::require;
use sha2::{Digest, Sha256};

/// What version 5 of the test database finds and version 4 does not: the bytes of its
/// `Win.Worm.Sobig-1`.
const SOBIG: &str = "6fec40cb4ad432859b126508015369262a47554a451edfaae437057ac6d6683e4a187189b7daf883e3768a107b1f263cbf2dfaeef372e9258f2ded8943fe63fd5dbd6a317ce6f8953634874247aab83228a5caf585c1d3823cc123678823552d71af200b";

fn sha256(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    let content = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    hex::encode(Sha256::digest(content))
}

/// A set of generated signatures that finds `sample` as `name`.
fn finds(version: u64, sample: &[u8], name: &str) -> Container {
    Container::new("daily", version)
        .member("hsb", signatures(0..50) + &hash_signature(sample, name))
}

#[test]
fn a_freshclam_run_ends_with_both_agents_live_by_the_proof() {
    require!(Clamd, Freshclam, TestFiles);
    let mirror = Mirror::new();
    mirror.freshclam_to(4);
    let fleet = Fleet::new();
    let databases = ["web1", "web2"].map(|name| fleet.database(name));
    let mut clamds = Clamd::several([&databases[0], &databases[1]]);
    let mut agents = [0, 1].map(|i| fleet.agent_of(["web1", "web2"][i], &clamds[i]));
    let mut master = fleet.master(&mirror.directory());
    master.start();
    for agent in &mut agents {
        agent.start();
    }
    // Each clamd starts when there are databases, and the next host waits until the first is live.
    let mut hosts: Vec<_> = ["web1", "web2"].into_iter().zip(&mut clamds).collect();
    while !hosts.is_empty() {
        let is_there = |name| {
            master
                .agent(name)
                .is_some_and(|row| row["outcome"] == "installed")
        };
        let next = until(PATIENCE, "the first set is there", || {
            hosts.iter().position(|(name, _)| is_there(name))
        });
        hosts.remove(next).1.start();
    }
    for name in ["web1", "web2"] {
        master.wait_live(name, 1);
    }
    let sobig = hex::decode(SOBIG).unwrap();
    for clamd in &clamds {
        assert_eq!(clamd.scan(&sobig).unwrap(), "stream: OK");
    }

    let file = mirror.freshclam_to(5);
    for name in ["web1", "web2"] {
        let row = master.wait_live(name, 2);
        assert_eq!(row["clamd"]["proof"], "canary", "{row}");
    }
    for (agent, clamd) in agents.iter().zip(&clamds) {
        assert_eq!(sha256(agent.database().join("test.cld")), sha256(&file));
        assert_eq!(
            clamd.scan(&sobig).unwrap(),
            "stream: Win.Worm.Sobig-1 FOUND"
        );
    }
    for receipt in master.audit("receipt") {
        assert!(
            ["live", "installed"].contains(&receipt["outcome"].as_str().unwrap()),
            "{receipt}"
        );
    }
    assert!(master.command(&["publish", "--wait"]).status.success());
}

#[test]
fn a_reader_in_a_loop_never_sees_a_partial_file_under_a_database_name() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    let published = Arc::new(Mutex::new(BTreeSet::new()));
    let publish = |version: u64| {
        let members = signatures(version * 1000..version * 1000 + 5000 + version * 300);
        let container = Container::new("daily", version).member("hsb", members);
        let digest = hex::encode(Sha256::digest(container.bytes()));
        published.lock().unwrap().insert(digest);
        container.write(&mirror);
    };
    publish(1);
    let mut master = fleet.master(&mirror);
    let mut agent = fleet.agent("web1");
    master.start();
    agent.start();
    master.wait_live("web1", 1);

    let stop = Arc::new(AtomicBool::new(false));
    let reader = {
        let (stop, published) = (stop.clone(), published.clone());
        let path = agent.database().join("daily.cud");
        thread::spawn(move || {
            let mut looks = 0;
            while !stop.load(Ordering::Relaxed) {
                let digest = sha256(&path);
                assert!(
                    published.lock().unwrap().contains(&digest),
                    "{digest} was never published"
                );
                looks += 1;
            }
            looks
        })
    };
    for version in 2..=6 {
        publish(version);
        master.wait_live("web1", version);
    }
    stop.store(true, Ordering::Relaxed);
    assert!(reader.join().unwrap() > 100, "the reader looked often");
}

#[test]
fn a_clean_host_without_any_database_gets_its_first_set_and_starts_its_clamd_later() {
    require!(Clamd);
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    finds(1, b"a sample of the first set", "Lab.First-1").write(&mirror);
    let (mut agent, mut clamd) = fleet.agent_and_clamd("web1");
    let mut master = fleet.master(&mirror);
    master.start();
    agent.start();
    let row = master.wait_installed("web1");
    assert_eq!(
        (&row["live"], &row["generation"]),
        (&false.into(), &1.into())
    );
    assert_eq!(agent.names(), ["daily.cud"]);
    clamd.start();
    master.wait_live("web1", 1);
    let found = clamd.scan(b"a sample of the first set").unwrap();
    assert_eq!(found, "stream: Lab.First-1.UNOFFICIAL FOUND");
}

#[test]
fn a_set_that_clamd_refuses_is_rolled_back_and_proven() {
    require!(Clamd);
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    finds(1, b"a sample of the good set", "Lab.Good-1").write(&mirror);
    let (mut agent, mut clamd) = fleet.agent_and_clamd("web1");
    let mut master = fleet.master(&mirror);
    // The master's own load test would keep it out, and a rollback take the place of the agent's.
    master.configure(
        "require = []",
        "require = []\nload_test = \"never\"\nshrink_max = \"100%\"\n\
         [rollout]\nrollback_on_halt = false",
    );
    master.start_with(&mut agent, &mut clamd);
    let good = sha256(agent.database().join("daily.cud"));

    Container::refused_by_clamd("daily", 2).write(&mirror);
    let row = master.wait_agent("web1", "refused", |row| row["outcome"] == "refused");
    assert_eq!(
        (&row["generation"], &row["live"]),
        (&1.into(), &true.into()),
        "{row}"
    );
    assert_eq!(
        row["clamd"]["proof"], "canary",
        "the old set is proven: {row}"
    );
    assert!(
        row["error"].as_str().unwrap().contains("alformed"),
        "clamd's own reason: {row}"
    );
    assert_eq!(sha256(agent.database().join("daily.cud")), good);
    assert!(
        clamd
            .scan(b"a sample of the good set")
            .unwrap()
            .ends_with("Lab.Good-1.UNOFFICIAL FOUND")
    );
    let status = master.json(&["status"]).unwrap();
    assert_eq!(status["rollout"]["state"], "halted", "{status}");
    let held = master.command(&["publish", "--wait"]);
    assert_eq!(held.status.code(), Some(4));

    // The next good one goes on.
    finds(3, b"a sample of the next set", "Lab.Next-1").write(&mirror);
    master.wait_live("web1", 3);
    assert!(
        clamd
            .scan(b"a sample of the next set")
            .unwrap()
            .ends_with("Lab.Next-1.UNOFFICIAL FOUND")
    );
}

#[test]
fn a_dead_clamd_rolls_nothing_back_and_a_clamd_that_comes_back_is_live() {
    require!(Clamd);
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    finds(1, b"a sample of set one", "Lab.One-1").write(&mirror);
    let (mut agent, mut clamd) = fleet.agent_and_clamd("web1");
    let mut master = fleet.master(&mirror);
    master.start_with(&mut agent, &mut clamd);
    clamd.kill();
    let container = finds(2, b"a sample of set two", "Lab.Two-1");
    let path = container.write(&mirror);
    master.wait_agent("web1", "installed at 2", |row| {
        row["outcome"] == "installed" && row["generation"] == 2
    });
    assert_eq!(sha256(agent.database().join("daily.cud")), sha256(path));
    clamd.start();
    master.wait_live("web1", 2);
}

#[test]
fn a_set_is_not_live_while_its_clamd_is_gone() {
    require!(Clamd);
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    finds(1, b"a sample", "Lab.One-1").write(&mirror);
    let (mut agent, mut clamd) = fleet.agent_and_clamd("web1");
    let mut master = fleet.master(&mirror);
    master.start_with(&mut agent, &mut clamd);
    let install = agent.json(&["status"]).unwrap()["install"].clone();
    // An agent that runs notices it in a minute, one that starts at once.
    agent.stop();
    clamd.kill();
    agent.start();
    let row = master.wait_agent("web1", "no more live", |row| row["live"] == false);
    let note = row["clamd"]["note"].as_str().unwrap_or_default();
    assert!(note.contains("is gone"), "{row}");
    let status = agent.json(&["status"]).unwrap();
    assert_eq!(status["live"], false, "{status}");
    clamd.start();
    master.wait_live("web1", 1);
    let status = agent.json(&["status"]).unwrap();
    assert_eq!(status["install"], install, "seen again without a reload");
}

#[test]
fn an_agent_that_was_away_catches_up_and_a_restarted_master_goes_on_with_the_numbering() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    finds(1, b"sample", "Lab.A-1").write(&mirror);
    let mut master = fleet.master(&mirror);
    let mut agent = fleet.agent("web1");
    master.start();
    agent.start();
    master.wait_live("web1", 1);
    assert!(agent.stop().success());
    finds(2, b"sample", "Lab.A-2").write(&mirror);
    master.wait_generation(2);
    assert!(master.stop().success());
    master.start();
    master.wait_generation(2);
    agent.start();
    master.wait_live("web1", 2);
    finds(3, b"sample", "Lab.A-3").write(&mirror);
    master.wait_live("web1", 3);
    master.wait_audit("receipt", 3); // one for each generation
}

#[test]
fn a_revoked_agent_is_cut_off_and_stays_out() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    finds(1, b"sample", "Lab.A-1").write(&mirror);
    let mut master = fleet.master(&mirror);
    master.start();
    let _agents = fleet.start_agents(["web1", "web2"]);
    master.wait_live("web1", 1);
    master.wait_live("web2", 1);
    fleet.certs(&["revoke", "web1", "--reason", "lost"]);
    until(PATIENCE, "web1 is gone", || master.agent("web1").is_none());
    finds(2, b"sample", "Lab.A-2").write(&mirror);
    master.wait_live("web2", 2);
    assert!(master.agent("web1").is_none());
    until(PATIENCE, "the rejection is logged", || {
        master
            .audit("rejected")
            .iter()
            .any(|record| record.to_string().contains("revoked"))
    });
    // Nobody is brought back by a restart.
    master.stop();
    master.start();
    master.wait_live("web2", 2);
    assert!(master.agent("web1").is_none());
}

#[test]
fn an_agent_with_a_certificate_of_another_ca_is_kept_out() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    finds(1, b"sample", "Lab.A-1").write(&mirror);
    let mut master = fleet.master(&mirror);
    master.start();
    // The same names, made by somebody else.
    let forger = Fleet::new();
    let mut stranger = forger.agent("web1");
    let port = |fleet: &Fleet| format!("127.0.0.1:{}", fleet.port());
    stranger.configure(&port(&forger), &port(&fleet));
    stranger.start();
    until(PATIENCE, "the stranger says why", || {
        stranger.log().contains("not this fleet's master")
    });

    // And one that believes the master but has a certificate of the other CA.
    let bundle = |fleet: &Fleet| fleet.pki().join("agents/web2");
    let mut spy = forger.agent("web2");
    fleet.certs(&["agent", "web2"]);
    spy.configure(&port(&forger), &port(&fleet));
    for file in ["ca.pem", "manifest.pub"] {
        let (from, to) = (bundle(&forger).join(file), bundle(&fleet).join(file));
        spy.configure(&from.display().to_string(), &to.display().to_string());
    }
    spy.start();
    until(PATIENCE, "the rejection is logged", || {
        master
            .audit("rejected")
            .iter()
            .any(|record| record.to_string().contains("certificate"))
    });
    assert_eq!(master.json(&["agents"]).unwrap(), serde_json::json!([]));
    assert_eq!(spy.names(), [""; 0]);
}

#[test]
fn files_of_the_same_content_are_one_transfer_and_stop_nobody() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    finds(1, b"sample", "Lab.A-1").write(&mirror);
    let same = "Lab.Same:0:*:6c61622073616d65\n".repeat(2000);
    for number in 0..12 {
        fs::write(mirror.join(format!("same{number}.ndb")), &same).unwrap();
    }
    let mut master = fleet.master(&mirror);
    master.configure("require = []", "require = []\nload_test = \"never\"");
    master.start();
    let agents = fleet.start_agents(["web1", "web2", "web3"]);
    for (name, agent) in ["web1", "web2", "web3"].iter().zip(&agents) {
        master.wait_live(name, 1);
        assert_eq!(agent.names().len(), 13);
    }
}

#[test]
fn a_truncated_or_foreign_file_in_the_mirror_is_held_and_the_published_one_stays() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    let good = finds(1, b"sample", "Lab.A-1");
    good.write(&mirror);
    let mut master = fleet.master(&mirror);
    let mut agent = fleet.agent("web1");
    master.start();
    agent.start();
    master.wait_live("web1", 1);
    let held = || {
        until(PATIENCE, "held", || {
            let status = master.json(&["status"]).unwrap();
            if status["held"][0]["reason"].is_string() {
                Ok(status)
            } else {
                Err(status)
            }
        })
    };
    let bytes = finds(2, b"sample", "Lab.A-2").bytes();
    fs::write(mirror.join("daily.cud"), &bytes[..bytes.len() - 600]).unwrap();
    let status = held();
    assert_eq!(status["generation"], 1);
    let shown = String::from_utf8(master.command(&["status"]).stdout).unwrap();
    assert!(shown.contains("held: official: daily.cud"), "{shown}");
    good.write(&mirror);
    until(PATIENCE, "good again", || {
        master.json(&["status"]).unwrap()["held"]
            .as_array()
            .unwrap()
            .is_empty()
    });
    fs::write(mirror.join("main.cvd"), b"<html>not found</html>").unwrap();
    assert_eq!(held()["generation"], 1);
    assert_eq!(agent.names(), ["daily.cud"]);
    master.wait_audit("held", 2);
}

#[test]
fn the_audit_log_verifies_and_one_changed_removed_inserted_or_cut_line_is_found() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    let mut master = fleet.master(&mirror);
    let mut agent = fleet.agent("web1");
    finds(1, b"sample", "Lab.A-1").write(&mirror);
    master.start();
    agent.start();
    master.wait_live("web1", 1);
    let state = master.directory().join("state");
    let keys = fleet.pki().join("manifest.pub");
    let arguments = [
        "audit",
        "verify",
        "--state",
        state.to_str().unwrap(),
        "--keys",
        keys.to_str().unwrap(),
    ];
    let verify = || master.command(&arguments).status.code();
    assert_eq!(verify(), Some(0), "while the master runs");
    master.stop();
    let verify = || master.command(&arguments).status.code();
    assert_eq!(verify(), Some(0));

    let log = state.join("audit/log.jsonl");
    let text = fs::read_to_string(&log).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert!(lines.len() > 4, "{text}");
    let changed = lines[2]
        .replacen("master", "mastef", 1)
        .replacen("agent:", "agenz:", 1);
    assert_ne!(changed, lines[2]);
    let with = |at: usize, remove: usize, new: &[&str]| {
        let mut lines = lines.clone();
        lines.splice(at..at + remove, new.iter().copied());
        lines.join("\n") + "\n"
    };
    for (what, tampered) in [
        ("changed", with(2, 1, &[&changed])),
        ("removed", with(2, 1, &[])),
        ("inserted", with(2, 0, &[lines[1]])),
        ("swapped", with(1, 2, &[lines[2], lines[1]])),
        ("cut off", with(lines.len() - 1, 1, &[])),
        ("added", with(lines.len(), 0, &[lines[1]])),
    ] {
        fs::write(&log, tampered).unwrap();
        assert_eq!(verify(), Some(1), "a line was {what}");
    }
    fs::write(&log, text).unwrap();
    assert_eq!(verify(), Some(0));
}
