//! What others leave in the database directory: links, files of their own, what clamd cannot load, and
//! rights that the agent lacks.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::Path;
use std::process::Command;

use clamcast_agent::clamd::proof::{CANARY, GATE};
use clamcast_proto::Digest;
use clamcast_tests::lab::{Container, Fleet, Mirror, Mount, Part, signatures};
use clamcast_tests::require;

use crate::host::{ALWAYS, Host, RUBBISH, set, the_last_set_is_there_and_live};

#[test]
fn links_that_another_user_plants_lead_nowhere() {
    require!(Clamd, Root);
    let mut host = Host::new();
    let precious = host.fleet.join("precious");
    fs::write(&precious, "precious").unwrap();
    chown(&precious, Some(1), Some(1)).unwrap();
    fs::set_permissions(&precious, fs::Permissions::from_mode(0o604)).unwrap();
    let facts = || {
        let facts = fs::metadata(&precious).unwrap();
        let content = fs::read_to_string(&precious).unwrap();
        (
            content,
            facts.mode(),
            facts.uid(),
            facts.gid(),
            facts.mtime_nsec(),
        )
    };
    let before = facts();
    let database = host.agent.database();
    let digest = Digest::of(&set(2)["daily.cud"]).to_string();
    let names = [
        "daily.cud",
        "main.cud",
        "even.ndb",
        CANARY,
        GATE,
        ".clamcast/place",
        ".clamcast/canary",
        ".clamcast/gate",
        ".clamcast/current/daily.cud",
        ".clamcast/previous/main.cud",
        ".clamcast/adopted/daily.cud",
        ".clamcast/trial/x.ndb",
    ];
    let staged =
        ["", ".part", ".part.json", ".new"].map(|end| format!(".clamcast/stage/{digest}{end}"));
    for hard in [false, true] {
        for name in names
            .iter()
            .copied()
            .chain(staged.iter().map(String::as_str))
            // Under a name that is new to the fleet it would be the host's own, and adopted.
            .filter(|name| hard || *name != "even.ndb")
        {
            let path = database.join(name);
            let _ = fs::remove_file(&path);
            match hard {
                true => fs::hard_link(&precious, &path).unwrap(),
                false => {
                    symlink(&precious, &path).unwrap();
                    lchown(&path, Some(1), Some(1)).unwrap();
                }
            }
        }
        host.publish();
        host.wait_live();
        let at = if hard { "hard links" } else { "symbolic links" };
        the_last_set_is_there_and_live(&host, at);
        assert_eq!(facts(), before, "{at}");
        for name in host.agent.names() {
            let facts = fs::symlink_metadata(database.join(&name)).unwrap();
            assert!(facts.is_file() && facts.uid() != 1, "{at}: {name}");
        }
    }
}

#[test]
fn a_directory_that_may_not_be_written_is_named_with_what_to_do_and_works_once_it_may() {
    require!(Clamd, Root);
    let mut host = Host::new();
    let database = host.agent.database();
    let hidden = database.join(".clamcast/stage");
    // While it runs: whoever sets this attribute stops even root.
    let immutable = |how: &str| {
        let chattr = Command::new("chattr")
            .arg(how)
            .args([&database, &hidden])
            .output();
        chattr.is_ok_and(|chattr| chattr.status.success())
    };
    if immutable("+i") {
        host.publish();
        let row = host
            .master
            .wait_agent("web1", "host_fault", |row| row["outcome"] == "host_fault");
        assert!(immutable("-i"));
        let said = row["error"].as_str().unwrap();
        assert!(
            said.contains("immutable") && said.contains("stage"),
            "{said}"
        );
        assert!(host.there() == set(1));
        host.publish();
        host.wait_live();
    } else {
        println!("this file system has no immutable attribute");
    }

    // From the start: a read-only mount. The agent runs, and takes the next set once it may.
    host.agent.stop();
    let mount = Mount::read_only(&database);
    host.agent.start();
    let said = host.wait_failed("host_fault");
    let advice = "make that file system writable again";
    assert!(said.contains(advice), "{said}");
    let row = host.row();
    assert_eq!(row["connected"], true, "{row}");
    let status = host.agent.json(&["status"]).unwrap();
    assert!(status["error"].as_str().unwrap().contains(advice));
    host.publish();
    drop(mount);
    host.wait_live();
    the_last_set_is_there_and_live(&host, "writable again");
}

#[test]
fn an_agent_whose_database_directory_is_missing_runs_reports_it_and_heals_when_it_is_back() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    Container::new("daily", 1)
        .member("hsb", signatures(0..100))
        .write(&mirror);
    let mut master = fleet.master(&mirror);
    master.start();
    let [mut agent] = fleet.start_agents(["web1"]);
    master.wait_live("web1", 1);
    let (database, away) = (agent.database(), fleet.join("away"));
    let fault = |row: &serde_json::Value| {
        let error = row["error"].as_str().unwrap_or_default();
        row["connected"] == true
            && row["outcome"] == "host_fault"
            && error.contains("there is no directory")
    };
    // One that has a set, and one that has none yet.
    assert!(agent.stop().success());
    fs::rename(&database, &away).unwrap();
    agent.start();
    let mut new = fleet.agent("web2");
    fs::remove_dir(new.database()).unwrap();
    new.start();
    for name in ["web1", "web2"] {
        master.wait_agent(name, "it reports the fault", fault);
    }
    let status = agent.json(&["status"]).unwrap();
    let error = status["error"].as_str().unwrap();
    assert!(error.contains("install -d -o"), "{status}");
    fs::rename(&away, &database).unwrap();
    fs::create_dir(new.database()).unwrap();
    for name in ["web1", "web2"] {
        master.wait_live(name, 1);
        let conforms = |row: &serde_json::Value| row["conformant"] == true;
        master.wait_agent(name, "it conforms", conforms);
    }
    assert_eq!(master.audit("drift"), Vec::<serde_json::Value>::new());
}

#[test]
fn what_freshclam_left_is_adopted_under_a_running_clamd_and_others_files_stay() {
    require!(Clamd, Freshclam, TestFiles);
    let mirror = Mirror::new();
    mirror.freshclam_to(2);
    let fleet = Fleet::new();
    let (mut agent, mut clamd) = fleet.agent_and_clamd("web1");
    let database = agent.database();
    let left = Part::TestFiles.path().join("test-1.cvd");
    fs::copy(&left, database.join("test.cvd")).unwrap();
    let local = format!("Lab.Local:0:*:{}\n", hex::encode(ALWAYS));
    fs::write(database.join("local.ndb"), &local).unwrap();
    clamd.start();
    clamd.wait_ready();
    let mut master = fleet.master(&mirror.directory());
    master.start();
    agent.start();
    let row = master.wait_live("web1", 1);
    assert_eq!(row["foreign"], serde_json::json!(["local.ndb"]));
    assert_eq!(agent.names(), ["local.ndb", "test.cld"]);
    assert_eq!(
        fs::read_to_string(database.join("local.ndb")).unwrap(),
        local
    );
    assert_eq!(
        clamd.scan(ALWAYS).unwrap(),
        "stream: Lab.Local.UNOFFICIAL FOUND"
    );
    let adopted = database.join(".clamcast/adopted/test.cvd");
    assert!(fs::read(adopted).unwrap() == fs::read(left).unwrap());
    assert_eq!(row["adopted"], serde_json::json!(["test.cvd"]));
}

#[test]
fn an_allow_list_of_the_host_is_reported_as_adopted_and_restored_when_the_fleet_withdraws_it() {
    require!(Clamd);
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    Container::new("daily", 1)
        .member("hsb", signatures(0..100))
        .write(&mirror);
    fs::write(mirror.join("local.ign2"), "Lab.Fleet\n").unwrap();
    let (mut agent, mut clamd) = fleet.agent_and_clamd("web1");
    let database = agent.database();
    let local = format!("Lab.Local:0:*:{}\n", hex::encode(ALWAYS));
    fs::write(database.join("local.ndb"), local).unwrap();
    fs::write(database.join("local.ign2"), "Lab.Local\n").unwrap();
    clamd.start();
    clamd.wait_ready();
    assert_eq!(clamd.scan(ALWAYS).unwrap(), "stream: OK");
    let mut master = fleet.master(&mirror);
    master.start();
    agent.start();
    let row = master.wait_live("web1", 1);
    assert_eq!(row["adopted"], serde_json::json!(["local.ign2"]));
    assert_eq!(row["foreign"], serde_json::json!(["local.ndb"]));
    let receipts = master.audit("receipt");
    let adopted = &receipts.last().unwrap()["detail"]["adopted"];
    assert_eq!(*adopted, serde_json::json!(["local.ign2"]));
    let text = String::from_utf8(master.command(&["agents"]).stdout).unwrap();
    assert!(text.contains("adopted: local.ign2 of web1"), "{text}");
    assert_eq!(
        clamd.scan(ALWAYS).unwrap(),
        "stream: Lab.Local.UNOFFICIAL FOUND"
    );

    assert!(agent.stop().success());
    agent.start();
    fs::remove_file(mirror.join("local.ign2")).unwrap();
    let row = master.wait_live("web1", 2);
    assert_eq!(row["adopted"], serde_json::json!([]));
    let own = fs::read_to_string(database.join("local.ign2")).unwrap();
    assert_eq!(own, "Lab.Local\n");
    assert_eq!(clamd.scan(ALWAYS).unwrap(), "stream: OK");
}

#[test]
fn a_bad_file_of_others_is_a_fault_of_the_host_and_without_it_the_set_is_live() {
    require!(Clamd, Clamscan);
    let mut host = Host::new();
    let site = host.agent.database().join("site.ndb");
    fs::write(&site, RUBBISH).unwrap();
    host.publish();
    let said = host.wait_failed("host_fault");
    assert!(said.contains("site.ndb is not of this set"), "{said}");
    assert!(host.finds_all_of(1), "clamd keeps what it has");
    let mut there = host.there();
    assert_eq!(
        there.remove("site.ndb").as_deref(),
        Some(RUBBISH.as_bytes())
    );
    assert!(there == set(2), "the new set stays");
    fs::remove_file(&site).unwrap();
    host.wait_live();
    the_last_set_is_there_and_live(&host, "the file is gone");
    assert_eq!(host.row()["outcome"], "live");
}

#[test]
fn what_is_named_like_a_database_and_is_no_file_is_a_fault_of_the_host() {
    require!(Clamd, Clamscan);
    let mut host = Host::new();
    let site = host.agent.database().join("site.cud");
    fs::create_dir(&site).unwrap();
    host.publish();
    let said = host.wait_failed("host_fault");
    assert!(said.contains("site.cud is not of this set"), "{said}");
    fs::remove_dir(&site).unwrap();
    host.wait_live();
    the_last_set_is_there_and_live(&host, "the directory is gone");
}

#[test]
fn without_a_scanner_the_old_set_tells_that_a_file_of_others_is_bad() {
    require!(Clamd);
    let mut host = Host::new();
    host.agent.stop();
    // Nothing but the agent itself is found there.
    let mut process = host.agent.process();
    process.env("PATH", host.fleet.join(""));
    if Path::new("/usr/bin/clamscan").exists() || Path::new("/usr/local/bin/clamscan").exists() {
        println!("SKIPPED: this machine has a clamscan");
        return;
    }
    host.agent.launch(process);
    host.agent.wait_ready();
    host.wait_live();
    let site = host.agent.database().join("site.ndb");
    fs::write(&site, RUBBISH).unwrap();
    host.publish();
    let said = host.wait_failed("host_fault");
    assert!(said.contains("clamd does not load it either"), "{said}");
    fs::remove_file(&site).unwrap();
    host.publish();
    host.wait_live();
    the_last_set_is_there_and_live(&host, "the file is gone");
}
