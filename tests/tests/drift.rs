//! Files that somebody changes under the agent's hands: seen, reported, repaired, proven by a real
//! clamd; and the cases where repairing would be wrong.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use clamcast_tests::lab::{
    Agent, Container, Fleet, Master, Mirror, PATIENCE, hash_signature, program, signatures, until,
};
use clamcast_tests::require;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::Value;

/// Kinds of damage, each to a file of its own: its name, what is done, and what it is found as.
type Damage = (&'static str, fn(&Path), &'static str);

const DAMAGES: [Damage; 9] = [
    (
        "changed.hsb",
        |file| fs::write(file, "no signature\n").unwrap(),
        "changed",
    ),
    (
        "truncated.hsb",
        |file| {
            let open = fs::File::options().write(true).open(file).unwrap();
            open.set_len(10).unwrap();
        },
        "changed",
    ),
    (
        "deleted.hsb",
        |file| fs::remove_file(file).unwrap(),
        "missing",
    ),
    (
        "replaced.hsb",
        |file| {
            let beside = file.with_extension("new");
            fs::write(&beside, signatures(0..3)).unwrap();
            fs::rename(beside, file).unwrap();
        },
        "changed",
    ),
    (
        "linked.hsb",
        |file| {
            fs::remove_file(file).unwrap();
            symlink("/dev/null", file).unwrap();
        },
        "changed",
    ),
    (
        "directory.hsb",
        |file| {
            fs::remove_file(file).unwrap();
            fs::create_dir(file).unwrap();
        },
        "changed",
    ),
    (
        "pipe.hsb",
        |file| {
            fs::remove_file(file).unwrap();
            mkfifo(file, Mode::S_IRWXU).unwrap();
        },
        "changed",
    ),
    (
        "rights.hsb",
        |file| {
            fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
        },
        "unreadable",
    ),
    ("flipped.hsb", |file| flip(file), "changed"),
];

/// One bit, in place, with size and time kept: rsync never finds it.
fn flip(file: &Path) {
    let time = fs::metadata(file).unwrap().modified().unwrap();
    let mut bytes = fs::read(file).unwrap();
    bytes[5] ^= 1;
    fs::write(file, bytes).unwrap();
    let open = fs::File::options().write(true).open(file).unwrap();
    open.set_modified(time).unwrap();
}

/// A mirror with these files, each of which finds its own name as a sample.
fn mirror_of(fleet: &Fleet, names: &[&str]) -> Master {
    let mirror = fleet.mirror();
    for name in names {
        fs::write(
            mirror.join(name),
            hash_signature(name.as_bytes(), "Lab.Found"),
        )
        .unwrap();
    }
    Container::new("daily", 1)
        .member("hsb", signatures(0..1000))
        .write(&mirror);
    fleet.master(&mirror)
}

/// A master and an agent without a clamd, live at generation 1; `database` are lines of that table.
fn pair(names: &[&str], database: &str) -> (Fleet, Master, Agent) {
    let fleet = Fleet::new();
    let mut master = mirror_of(&fleet, names);
    master.start();
    let mut agent = fleet.agent("web1");
    agent.configure("[database]\n", &format!("[database]\n{database}\n"));
    agent.start();
    master.wait_live("web1", 1);
    (fleet, master, agent)
}

fn status(agent: &Agent) -> Value {
    agent.json(&["status"]).unwrap_or_default()
}

/// Waits until nothing is wrong any more, by an install after number `before`.
#[track_caller]
fn wait_mended(agent: &Agent, before: u64) {
    until(PATIENCE, "it is mended and live", || {
        let status = status(agent);
        let mended = status["drift"]["files"] == serde_json::json!([])
            && status["live"] == true
            && status["install"].as_u64() > Some(before);
        if mended { Ok(()) } else { Err(status) }
    });
}

fn install(agent: &Agent) -> u64 {
    status(agent)["install"].as_u64().unwrap()
}

/// Waits for a record of `event` that names `file`, and returns it.
#[track_caller]
fn wait_told(master: &Master, event: &str, file: &str) -> Value {
    until(PATIENCE, &format!("{event} of {file} is told"), || {
        let records = master.audit(event);
        let names = |record: &&Value| {
            let mut files = record["detail"]["files"].as_array().into_iter().flatten();
            files.any(|entry| entry["name"] == file)
        };
        records.iter().find(names).cloned().ok_or(records)
    })
}

#[test]
fn whatever_happens_to_a_file_it_is_seen_reported_repaired_and_proven() {
    require!(Clamd);
    let fleet = Fleet::new();
    let names = DAMAGES.map(|(name, ..)| name);
    let mut master = mirror_of(&fleet, &names);
    let (mut agent, mut clamd) = fleet.agent_and_clamd("web1");
    master.start_with(&mut agent, &mut clamd);
    let database = agent.database();

    for (name, damage, found) in DAMAGES {
        let file = database.join(name);
        let good = fs::read(&file).unwrap();
        let before = install(&agent);
        let begun = Instant::now();
        damage(&file);
        wait_mended(&agent, before);
        let took = begun.elapsed();
        println!("{name}: damage to repaired and proven {took:.1?}");
        assert!(fs::symlink_metadata(&file).unwrap().is_file());
        assert_eq!(fs::read(&file).unwrap(), good, "{name}");
        let mode = fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644);
        let scanned = clamd.scan(name.as_bytes()).unwrap();
        assert_eq!(scanned, "stream: Lab.Found.UNOFFICIAL FOUND", "{name}");
        for event in ["drift", "repair"] {
            let record = wait_told(&master, event, name);
            assert_eq!(record["actor"], "agent:web1");
            assert_eq!(record["detail"]["files"][0]["found"], found, "{record}");
        }
    }
    let row = master.wait_live("web1", 1);
    assert_eq!(row["clamd"]["proof"], "canary", "{row}");
    assert_eq!(master.audit("drift").len(), DAMAGES.len(), "once each");
}

#[test]
fn damage_without_any_event_is_found_by_the_rehash_and_the_master_has_the_file() {
    let (_fleet, master, agent) = pair(&["x.hsb"], "rescan = \"1s\"");
    let file = agent.database().join("x.hsb");
    let good = fs::read(&file).unwrap();
    until(PATIENCE, "the events of the install are over", || {
        status(&agent)["drift"]["rehashed"].is_string()
    });
    let before = install(&agent);
    // By the agent's own link: nothing happens in the directory that is watched.
    let begun = Instant::now();
    flip(&agent.database().join(".clamcast/current/x.hsb"));
    assert_ne!(fs::read(&file).unwrap(), good, "it is the same file");
    wait_mended(&agent, before);
    println!(
        "shared damage to repaired from the master {:.1?}",
        begun.elapsed()
    );
    assert_eq!(fs::read(&file).unwrap(), good);
    wait_told(&master, "drift", "x.hsb");
    wait_told(&master, "repair", "x.hsb");
    master.wait_live("web1", 1);
}

#[test]
fn where_it_is_only_reported_it_stays_until_an_operator_says_otherwise() {
    let (_fleet, master, mut agent) = pair(&["x.hsb"], "drift = \"report\"");
    let file = agent.database().join("x.hsb");
    fs::write(&file, "theirs").unwrap();
    let row = master.wait_agent("web1", "it is told", |row| row["conformant"] == false);
    let error = row["error"].as_str().unwrap();
    assert!(error.contains("x.hsb was changed"), "{row}");
    assert!(error.contains("\"report\""), "{row}");
    assert_eq!(row["live"], true, "clamd has what it had: {row}");
    // Not when it comes back either, where the master offers it the set again.
    assert!(agent.stop().success());
    agent.start();
    master.wait_agent("web1", "it does not take it", |row| {
        row["outcome"] == "declined"
    });
    assert_eq!(fs::read(&file).unwrap(), b"theirs");
    let text = agent.command(&["status"]).stdout;
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("x.hsb was changed"), "{text}");

    let forced = master.command(&["force-sync", "web1"]);
    assert_eq!(forced.status.code(), Some(0), "{forced:?}");
    assert_ne!(fs::read(&file).unwrap(), b"theirs");
    wait_told(&master, "repair", "x.hsb");
}

#[test]
fn a_real_freshclam_on_the_directory_is_named_and_not_fought() {
    require!(Freshclam, TestFiles);
    let mirror = Mirror::new();
    mirror.freshclam_to(4);
    let fleet = Fleet::new();
    let mut master = fleet.master(&mirror.directory());
    master.start();
    let mut agent = fleet.agent("web1");
    agent.start();
    master.wait_live("web1", 1);
    let database = agent.database();
    let published = fs::read(database.join("test.cld")).unwrap();

    let mut freshclam = mirror.freshclam(6);
    freshclam.arg(format!("--datadir={}", database.display()));
    let mut freshclam = freshclam.spawn().unwrap();
    assert!(freshclam.wait().unwrap().success());
    let theirs = fs::read(database.join("test.cld")).unwrap();
    assert_ne!(theirs, published);
    let row = master.wait_agent("web1", "it is told", |row| row["conformant"] == false);
    let named = format!("freshclam (pid {}, user ", freshclam.id());
    let error = row["error"].as_str().unwrap();
    assert!(error.contains("test.cld is rewritten by somebody"), "{row}");
    assert!(error.contains(&named), "{row}");
    assert!(error.contains("disable --now clamav-freshclam"), "{row}");
    wait_told(&master, "drift", "test.cld");
    assert_eq!(fs::read(database.join("test.cld")).unwrap(), theirs);
    assert_eq!(master.audit("repair").len(), 0);

    // A restart is no reason to begin to fight: the updater is gone, and comes again.
    let before = agent.log().matches("connected to the master").count();
    assert!(agent.stop().success());
    agent.start();
    until(
        PATIENCE,
        "the agent is there again, and was offered it",
        || {
            let log = agent.log();
            let connected = log.matches("connected to the master").count() > before;
            let looked = status(&agent)["drift"]["reason"]
                .as_str()
                .map(str::to_owned);
            let declined = master.agent("web1")?["outcome"] == "declined";
            (connected && declined).then_some(looked?)
        },
    );
    assert_eq!(fs::read(database.join("test.cld")).unwrap(), theirs);
    assert_eq!(master.audit("repair").len(), 0);

    // A new generation is another matter.
    mirror.freshclam_to(5);
    master.wait_live("web1", 2);
    assert_ne!(fs::read(database.join("test.cld")).unwrap(), theirs);
}

#[test]
fn one_run_of_freshclam_that_prunes_a_database_heals_once_no_updater_was_seen_for_ten_minutes() {
    require!(Freshclam, TestFiles);
    let mirror = Mirror::new();
    mirror.freshclam_to(4);
    let fleet = Fleet::new();
    let mut master = fleet.master(&mirror.directory());
    master.start();
    let mut agent = fleet.agent("web1");
    agent.start();
    master.wait_live("web1", 1);
    let pruned = agent.database().join("test.cld");
    let published = fs::read(&pruned).unwrap();

    // Told to update what Talos publishes, it prunes every other container.
    let configured = mirror.freshclam(6);
    let mut freshclam = Command::new(configured.get_program());
    let arguments = configured.get_args().filter(|it| *it != "--update-db=test");
    freshclam.args(arguments);
    freshclam.arg(format!("--datadir={}", agent.database().display()));
    freshclam.output().unwrap();
    assert!(!pruned.exists(), "freshclam prunes it");
    let waits = until(PATIENCE, "the repair waits", || {
        let status = status(&agent);
        let missing = status["drift"]["files"][0]["name"] == "test.cld";
        let waits = &status["drift"]["repair_waits"];
        (missing && waits["since"].is_string() && waits["until"].is_string()).then_some(status)
    });
    let reason = waits["drift"]["reason"].as_str().unwrap();
    assert!(
        reason.contains("the repair waits until no updater"),
        "{waits}"
    );
    let text = String::from_utf8(agent.command(&["status"]).stdout).unwrap();
    assert!(text.contains("the repair waits since"), "{text}");

    // Ten minutes pass, in the record that the next start reads.
    assert!(agent.stop().success());
    let path = agent.directory().join("state/left-alone.json");
    let mut kept: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let earlier = jiff::Timestamp::now() - jiff::SignedDuration::from_mins(11);
    kept["rest"]["updater"]["seen"] = earlier.to_string().into();
    fs::write(&path, kept.to_string()).unwrap();
    agent.start();
    until(PATIENCE, "the published file is back", || {
        fs::read(&pruned).ok().filter(|found| *found == published)
    });
    wait_told(&master, "repair", "test.cld");
    master.wait_agent("web1", "it conforms", |row| row["conformant"] == true);
}

#[test]
fn a_file_that_is_rewritten_again_and_again_is_left_alone_until_an_operator_forces_it() {
    let (_fleet, master, agent) = pair(&["x.hsb"], "");
    let file = agent.database().join("x.hsb");
    let rewrite = || {
        let beside = file.with_extension("new");
        fs::write(&beside, "theirs").unwrap();
        fs::rename(beside, &file).unwrap();
    };
    for _ in 0..3 {
        let before = install(&agent);
        rewrite();
        wait_mended(&agent, before);
    }
    rewrite();
    let row = master.wait_agent("web1", "it gives up", |row| {
        let error = row["error"].as_str().unwrap_or_default();
        error.contains("x.hsb is rewritten by somebody")
    });
    assert!(
        row["error"].as_str().unwrap().contains("find out who"),
        "{row}"
    );
    assert_eq!(fs::read(&file).unwrap(), b"theirs");
    let forced = master.command(&["force-sync", "web1"]);
    assert_eq!(forced.status.code(), Some(0), "{forced:?}");
    let before = install(&agent);
    rewrite();
    wait_mended(&agent, before);
}

#[test]
fn without_a_clamd_it_is_repaired_all_the_same() {
    require!(Clamd);
    let fleet = Fleet::new();
    let mut master = mirror_of(&fleet, &["x.hsb"]);
    master.start();
    let (mut agent, mut clamd) = fleet.agent_and_clamd("web1");
    agent.start();
    master.wait_installed("web1");
    let database = agent.database();
    let good = fs::read(database.join("x.hsb")).unwrap();
    fs::remove_file(database.join("x.hsb")).unwrap();
    wait_told(&master, "repair", "x.hsb");
    assert_eq!(fs::read(database.join("x.hsb")).unwrap(), good);

    // And where nothing at all is left, not even the agent's own copies.
    for entry in fs::read_dir(&database).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            fs::remove_dir_all(path).unwrap();
        } else {
            fs::remove_file(path).unwrap();
        }
    }
    until(PATIENCE, "the set is back", || {
        let names = agent.names();
        let back = names == ["daily.cud", "x.hsb"];
        if back { Ok(()) } else { Err(names) }
    });
    clamd.start();
    master.wait_live("web1", 1);
}

/// A user namespace has limits of its own, so that nobody else's instances or watches are taken.
#[test]
fn without_file_events_it_is_said_once_and_files_are_looked_at_often() {
    require!(Namespace);
    for (own, limit) in [
        ("max_inotify_instances", "fs.inotify.max_user_instances"),
        ("max_inotify_watches", "fs.inotify.max_user_watches"),
    ] {
        let (_fleet, master, mut agent) = pair(&["x.hsb"], "");
        assert!(agent.stop().success());
        let own = format!("/proc/sys/user/{own}");
        let none_left = |command: &Command| {
            let mut process = Command::new("unshare");
            process.args(["--user", "--map-root-user", "sh", "-c"]);
            process.arg(format!("echo 0 > {own} && exec \"$0\" \"$@\""));
            process.arg(command.get_program()).args(command.get_args());
            for (key, value) in command.get_envs() {
                process.env(key, value.expect("none is removed"));
            }
            process
        };
        let doctor = |wrap: &dyn Fn(&Command) -> Command, agent: &Agent| {
            let mut doctor = program("clamcast-agent");
            doctor
                .args(["doctor", "--json", "--config"])
                .arg(agent.config());
            let output = wrap(&doctor).output().unwrap();
            let report: Value = serde_json::from_slice(&output.stdout).expect("it prints JSON");
            let mut findings = report["findings"].as_array().unwrap().iter();
            let finding = findings.find(|finding| finding["check"] == "file-events");
            let finding = finding.expect("it is looked at");
            assert_eq!(finding["state"], "note", "{finding}");
            assert!(
                finding["found"].as_str().unwrap().contains(limit),
                "{finding}"
            );
            let advice = format!("sysctl -w {limit}=");
            assert!(
                finding["advice"].as_str().unwrap().contains(&advice),
                "{finding}"
            );
        };
        doctor(&none_left, &agent);

        let process = none_left(&agent.process());
        agent.launch(process);
        agent.wait_ready();
        master.wait_agent("web1", "web1 is connected", |row| row["connected"] == true);
        for content in ["theirs", "theirs, too"] {
            let before = install(&agent);
            fs::write(agent.database().join("x.hsb"), content).unwrap();
            wait_mended(&agent, before);
        }
        assert_eq!(status(&agent)["drift"]["watched"], false);
        let log = agent.log();
        assert_eq!(log.matches("no file events from").count(), 1, "{log}");
        assert!(log.contains(&format!("sysctl -w {limit}=")), "{log}");
        let text = String::from_utf8(agent.command(&["status"]).stdout).unwrap();
        assert!(text.contains(limit), "{text}");
        doctor(&|command: &Command| copy(command), &agent);

        // Once there are some, it takes them by itself.
        let target = agent.pid().to_string();
        let mut raise = Command::new("nsenter");
        raise.args(["--user", "--target", &target, "sh", "-c"]);
        let raised = raise.arg(format!("echo 100 > {own}")).status().unwrap();
        assert!(raised.success());
        until(PATIENCE, "events come", || {
            let status = status(&agent);
            let seen = status["drift"]["watched"] == true;
            if seen { Ok(()) } else { Err(status) }
        });
        assert_eq!(status(&agent)["drift"]["blind"], Value::Null);
    }
}

fn copy(command: &Command) -> Command {
    let mut copy = Command::new(command.get_program());
    copy.args(command.get_args());
    for (key, value) in command.get_envs() {
        copy.env(key, value.expect("none is removed"));
    }
    copy
}

#[test]
fn installs_are_not_taken_for_drift() {
    let (fleet, master, agent) = pair(&["x.hsb"], "rescan = \"1s\"");
    for version in 2..6 {
        Container::new("daily", version)
            .member("hsb", signatures(0..1000 + version))
            .write(&fleet.mirror());
        master.wait_live("web1", version);
    }
    let hashed = || status(&agent)["drift"]["rehashed"].clone();
    let first = hashed();
    until(PATIENCE, "everything was hashed once more", || {
        hashed() != first
    });
    assert_eq!(master.audit("drift").len(), 0);
    assert!(!agent.log().contains("was changed"), "{}", agent.log());
}

/// Long, because it makes and hashes a database of the size of a real one.
#[test]
fn a_full_look_at_a_real_size_is_slow_on_purpose_and_gives_way_to_an_install() {
    clamcast_tests::long!();
    let (fleet, master, agent) = pair(&[], "rescan = \"1s\"");
    let mirror = fleet.mirror();
    fs::write(mirror.join("large.hsb"), signatures(0..3_000_000)).unwrap();
    master.wait_live("web1", 2);
    let hashed = || status(&agent)["drift"]["rehashed"].clone();
    let first = hashed();
    let begun = Instant::now();
    until(PATIENCE, "everything was hashed once more", || {
        hashed() != first
    });
    let bytes = fs::metadata(agent.database().join("large.hsb"))
        .unwrap()
        .len();
    println!("{} MB read in {:.1?}", bytes >> 20, begun.elapsed());
    Container::new("daily", 2)
        .member("hsb", signatures(0..1001))
        .write(&mirror);
    master.wait_live("web1", 3);
}
