//! What goes wrong in the middle: kills, slow links, full disks.

use std::fs;
use std::path::Path;
use std::time::Duration;

use clamcast_tests::lab::{
    Agent, Container, Fleet, Link, Master, PATIENCE, SmallDisk, UdpProxy, signatures, until,
};
use clamcast_tests::require;
use sha2::{Digest, Sha256};

/// A set of some megabytes that does not compress away.
fn large(version: u64) -> Container {
    Container::new("daily", version).member(
        "hsb",
        signatures(version * 100_000..version * 100_000 + 60_000),
    )
}

/// A link over which a large set takes some seconds.
const SLOW: Link = Link {
    loss: 0.0,
    delay: Duration::ZERO,
    bandwidth: Some(400_000),
    cut: false,
};

/// A master for one large set, and an agent behind a link to it.
fn slow_fleet(fleet: &Fleet) -> (Master, Agent, UdpProxy) {
    let mirror = fleet.mirror();
    large(1).write(&mirror);
    let master = fleet.master(&mirror);
    master.configure("require = []", "require = []\nload_test = \"never\"");
    let proxy = UdpProxy::start(([127, 0, 0, 1], fleet.port()).into(), 1);
    let agent = fleet.agent("web1");
    agent.configure(
        &format!("127.0.0.1:{}", fleet.port()),
        &proxy.address().to_string(),
    );
    (master, agent, proxy)
}

/// Bytes of the parts that are being received.
fn received(agent: &Agent) -> u64 {
    let stage = agent.database().join(".clamcast/stage");
    let parts = fs::read_dir(stage).into_iter().flatten().flatten();
    let parts = parts.filter(|part| part.path().extension().is_some_and(|part| part == "part"));
    parts
        .filter_map(|part| part.metadata().ok())
        .map(|part| part.len())
        .sum()
}

fn assert_complete(agent: &Agent, fleet: &Fleet) {
    let digest = |directory: &Path| {
        hex::encode(Sha256::digest(
            fs::read(directory.join("daily.cud")).unwrap(),
        ))
    };
    assert_eq!(digest(&agent.database()), digest(&fleet.mirror()));
}

#[test]
fn an_agent_killed_six_times_in_a_transfer_leaves_no_stray_name_and_then_completes() {
    let fleet = Fleet::new();
    let (mut master, mut agent, proxy) = slow_fleet(&fleet);
    proxy.set(SLOW);
    master.start();
    let mut before = 0;
    for kill in 1..=6 {
        agent.start();
        until(PATIENCE, "some more arrives", || {
            let now = received(&agent);
            if now > before + 100_000 {
                Ok(())
            } else {
                Err(now)
            }
        });
        before = received(&agent);
        agent.kill();
        assert_eq!(agent.names(), [""; 0], "after kill {kill}");
    }
    proxy.set(Link::default());
    agent.start();
    master.wait_live("web1", 1);
    assert_complete(&agent, &fleet);
    assert_eq!(agent.names(), ["daily.cud"]);
    let stage = fs::read_dir(agent.database().join(".clamcast/stage")).unwrap();
    assert_eq!(stage.count(), 0, "nothing is left of the transfer");
}

#[test]
fn a_master_killed_in_the_middle_of_a_push_goes_on_after_its_restart() {
    let fleet = Fleet::new();
    let (mut master, mut agent, proxy) = slow_fleet(&fleet);
    proxy.set(SLOW);
    master.start();
    agent.start();
    until(PATIENCE, "some arrives", || received(&agent) > 100_000);
    master.kill();
    let before = received(&agent);
    proxy.set(Link::default());
    master.start();
    master.wait_live("web1", 1);
    assert!(before > 100_000);
    assert_complete(&agent, &fleet);
    assert_eq!(master.audit("published").len(), 1, "the same generation");
}

#[test]
fn a_lossy_and_slow_path_only_takes_longer() {
    let fleet = Fleet::new();
    let (mut master, mut agent, proxy) = slow_fleet(&fleet);
    let delay = Duration::from_millis(20);
    proxy.set(Link {
        loss: 0.01,
        delay,
        ..Link::default()
    });
    master.start();
    agent.start();
    master.wait_live("web1", 1);
    assert_complete(&agent, &fleet);
}

#[test]
fn a_part_goes_on_where_it_was_when_the_master_was_killed() {
    let fleet = Fleet::new();
    let (mut master, mut agent, proxy) = slow_fleet(&fleet);
    proxy.set(SLOW);
    master.start();
    agent.start();
    until(PATIENCE, "some arrives", || received(&agent) > 200_000);
    master.kill();
    let before = received(&agent);
    master.start();
    until(PATIENCE, "it goes on", || received(&agent) > before);
    proxy.set(Link::default());
    master.wait_live("web1", 1);
    assert_complete(&agent, &fleet);
}

#[test]
fn the_database_directory_was_emptied_while_the_agent_was_down() {
    let fleet = Fleet::new();
    let (mut master, mut agent, _proxy) = slow_fleet(&fleet);
    master.start();
    agent.start();
    master.wait_live("web1", 1);
    assert!(agent.stop().success());
    let database = agent.database();
    fs::remove_dir_all(&database).unwrap();
    fs::create_dir(&database).unwrap();
    agent.start();
    until(PATIENCE, "the set is back", || {
        let names = agent.names();
        if names == ["daily.cud"] {
            Ok(())
        } else {
            Err(names)
        }
    });
    assert_complete(&agent, &fleet);
    until(PATIENCE, "it is live again", || {
        let status = agent.json(&["status"]);
        status.is_some_and(|status| status["live"] == true)
    });
    master.wait_audit("repair", 1);
    assert_eq!(master.audit("published").len(), 1, "the same generation");
}

#[test]
fn a_full_disk_on_the_agent_keeps_the_old_set_and_says_so() {
    require!(Root);
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    Container::new("daily", 1)
        .member("hsb", signatures(0..100))
        .write(&mirror);
    let mut master = fleet.master(&mirror);
    master.configure(
        "require = []",
        "require = []\nload_test = \"never\"\nshrink_max = \"100%\"",
    );
    let mut agent = fleet.agent("web1");
    let _disk = SmallDisk::mount(&agent.database());
    master.start();
    agent.start();
    master.wait_live("web1", 1);
    Container::new("daily", 2)
        .member("hsb", signatures(0..200_000))
        .write(&mirror);
    let row = master.wait_agent("web1", "host_fault", |row| row["outcome"] == "host_fault");
    let error = row["error"].as_str().unwrap();
    assert!(error.contains("make room"), "{error}");
    assert_eq!(
        (&row["generation"], &row["live"]),
        (&1.into(), &true.into())
    );
    assert_eq!(agent.names(), ["daily.cud"]);
    // A smaller set waits behind the one that has no room, until an operator says otherwise.
    Container::new("daily", 3)
        .member("hsb", signatures(0..200))
        .write(&mirror);
    master.wait_audit("rollout-waits", 1);
    let published = master.command(&["publish", "--supersede"]);
    assert_eq!(published.status.code(), Some(0), "{published:?}");
    master.wait_live("web1", 3);
}

#[test]
fn what_a_kill_left_of_writes_is_removed_at_the_start_and_nothing_else() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    Container::new("daily", 1)
        .member("hsb", signatures(0..10))
        .write(&mirror);
    let mut master = fleet.master(&mirror);
    master.start();
    let [mut agent] = fleet.start_agents(["web1"]);
    master.wait_live("web1", 1);
    agent.kill();
    master.kill();
    let of_master = ["", "agents", "certificates", "audit", "generations", "keys"];
    let of_master = of_master.map(|name| master.directory().join("state").join(name));
    let of_agent = ["", "audit", "receipts"].map(|name| agent.directory().join("state").join(name));
    let directories: Vec<_> = of_master.into_iter().chain(of_agent).collect();
    let (left, similar) = (".AbC123.new", ".web1.new");
    for directory in &directories {
        for name in [left, similar] {
            fs::write(directory.join(name), "half").unwrap();
        }
    }
    master.start();
    agent.start();
    master.wait_live("web1", 1);
    for directory in &directories {
        let shown = directory.display();
        assert!(!directory.join(left).exists(), "{shown}");
        assert!(directory.join(similar).exists(), "{shown}");
    }
}
