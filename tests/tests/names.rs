//! Names of databases with spaces, letters outside ASCII and extensions in capitals: published,
//! installed, proven by a real clamd, repaired, adopted, restored, and blamed by their names.

use std::fs;

use clamcast_tests::lab::{
    Agent, Clamd, Container, Fleet, Master, PATIENCE, Update, hash_signature, signatures, until,
};
use clamcast_tests::require;

const WIDE: [&str; 3] = ["my list.hsb", "gr\u{f6}\u{df}e.hsb", "LOCAL.HSB"];

/// What no ClamAV loads, and longer than what it replaces: the master holds what shrank.
fn bad() -> String {
    format!("{}{}\n", signatures(0..3), "no signature:".repeat(5))
}

/// A fleet of one host, whose mirror has databases with wide names beside a plain one.
struct Site {
    fleet: Fleet,
    master: Master,
    agent: Agent,
    clamd: Clamd,
}

impl Site {
    fn new() -> Self {
        let fleet = Fleet::new();
        let mirror = fleet.mirror();
        for name in WIDE {
            let signature = hash_signature(name.as_bytes(), "Lab.Wide");
            fs::write(mirror.join(name), signature).unwrap();
        }
        Container::new("daily", 1)
            .member("hsb", signatures(0..1000))
            .write(&mirror);
        let (master, agent, clamd) = fleet.one_host(
            "require = []\nload_test = \"never\"\n[rollout]\nwaves = [\"100%\"]\nrollback_on_halt = false",
        );
        Self {
            fleet,
            master,
            agent,
            clamd,
        }
    }

    fn start(&mut self) {
        self.master.start_with(&mut self.agent, &mut self.clamd);
    }

    fn finds(&self, sample: &str) -> bool {
        let said = self.clamd.scan(sample.as_bytes()).expect("clamd answers");
        said.contains("FOUND")
    }
}

#[test]
fn wide_names_are_installed_proven_live_repaired_and_withdrawn_for_the_hosts_own_file() {
    require!(Clamd, Clamscan);
    let mut site = Site::new();
    let own = hash_signature(b"of the host", "Lab.Own");
    fs::write(site.agent.database().join(WIDE[0]), &own).unwrap();
    site.start();
    for name in WIDE {
        assert!(site.finds(name), "{name}");
    }
    assert!(!site.finds("of the host"));
    let row = site.master.agent("web1").unwrap();
    assert_eq!(row["adopted"], serde_json::json!([WIDE[0]]), "{row}");

    let file = site.agent.database().join(WIDE[1]);
    fs::remove_file(&file).unwrap();
    until(PATIENCE, "the file is repaired", || file.exists());
    site.master.wait_live("web1", 1);

    let mirror = Update::begin(site.fleet.mirror());
    mirror.remove(WIDE[0]);
    drop(mirror);
    site.master.wait_live("web1", 2);
    let restored = fs::read_to_string(site.agent.database().join(WIDE[0])).unwrap();
    assert_eq!(restored, own);
    assert!(site.finds("of the host") && !site.finds(WIDE[0]) && site.finds(WIDE[2]));
}

#[test]
fn a_broken_database_with_a_wide_name_is_refused_by_its_name_and_the_old_one_comes_back() {
    require!(Clamd, Clamscan);
    for name in WIDE {
        let mut site = Site::new();
        site.start();
        Update::begin(site.fleet.mirror()).put(name, bad());
        let row = site
            .master
            .wait_agent("web1", "it is refused", |row| row["outcome"] == "refused");
        let error = row["error"].as_str().unwrap();
        assert!(error.contains(&format!("Can't load {name}: ")), "{error}");
        assert!(site.finds(name), "{name}");
    }
}

#[test]
fn a_broken_database_of_the_host_with_a_wide_name_is_no_evidence_against_the_set() {
    require!(Clamd, Clamscan);
    let mut site = Site::new();
    site.start();
    for (name, generation) in [("out of memory.hsb", 2), ("a: b.hsb", 3)] {
        let file = site.agent.database().join(name);
        fs::write(&file, bad()).unwrap();
        Update::begin(site.fleet.mirror()).put(WIDE[2], signatures(0..generation));
        site.master.wait_agent("web1", "the file is blamed", |row| {
            let error = row["error"].as_str().unwrap_or_default();
            error.contains(&format!("{name} is not of this set"))
        });
        fs::remove_file(&file).unwrap();
        site.master.wait_live("web1", generation);
    }
}
