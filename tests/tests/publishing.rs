//! What the master publishes, by the word of the real ClamAV.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use clamcast_tests::lab::{
    Container, Fleet, Master, PATIENCE, program, search_path, signatures, until,
};
use clamcast_tests::require;

#[test]
fn a_database_that_clamscan_cannot_load_is_held_with_its_reason() {
    require!(Clamscan);
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    let good = Container::new("daily", 1).member("hsb", signatures(0..10));
    good.write(&mirror);
    let mut master = fleet.master(&mirror);
    master.configure("require = []", "require = []\nload_test = \"always\"");
    master.start();
    master.wait_generation(1);

    Container::refused_by_clamd("daily", 2).write(&mirror);
    let reason = master.wait_refused();
    assert!(reason.starts_with("the load test failed: "), "{reason}");
    assert!(reason.contains("Malformed database"), "{reason}");
    assert_eq!(master.json(&["status"]).unwrap()["generation"], 1);
    master.wait_audit("held", 1);

    let repaired = Container::new("daily", 3).member("hsb", signatures(0..11));
    repaired.write(&mirror);
    master.wait_generation(2);
}

/// Puts a script in the place of clamscan, and returns its directory. It is a fake: the real one
/// cannot be made slow or be killed at a given moment.
fn fake_clamscan(fleet: &Fleet, script: &str) -> PathBuf {
    let directory = fleet.join("fake");
    fs::create_dir_all(&directory).unwrap();
    let program = directory.join("clamscan.new");
    fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(program, directory.join("clamscan")).unwrap();
    directory
}

/// Starts the master with `directory` before all others on its search path.
fn start_with(master: &mut Master, directory: &Path) {
    let mut path = directory.as_os_str().to_owned();
    path.push(":");
    path.push(search_path());
    let mut process = master.process();
    process.env("PATH", path);
    master.launch(process);
    master.wait_ready();
}

#[test]
fn a_stop_does_not_wait_for_the_load_test_and_the_next_start_publishes() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    let good = Container::new("daily", 1).member("hsb", signatures(0..10));
    good.write(&mirror);
    let fake = fake_clamscan(&fleet, "echo $$ > \"$TMPDIR/pid\"; sleep 1000");
    let mut master = fleet.master(&mirror);
    start_with(&mut master, &fake);
    let pid = until(PATIENCE, "clamscan runs", || {
        // All that it may write in.
        let places = fs::read_dir(master.directory().join("state/tmp"))?;
        let mut pids = places.flatten().flat_map(|place| {
            let pid = fs::read_to_string(place.path().join("tmp/pid"));
            pid.ok().filter(|pid| pid.ends_with('\n'))
        });
        pids.next()
            .ok_or(std::io::Error::other("there is none yet"))
    });
    let waiting = {
        let mut publish = program("clamcast-master");
        publish.arg("--socket").arg(master.socket()).arg("publish");
        publish.stdout(Stdio::null()).stderr(Stdio::null()).spawn()
    };
    let mut waiting = waiting.unwrap();
    assert!(master.stop().success()); // or it waits longer than this test does
    let ended = until(PATIENCE, "the command ends", || waiting.try_wait().unwrap());
    assert!(!ended.success());
    assert!(
        !master.log().contains("panicked"),
        "the signal reached the thread in the jail"
    );
    until(PATIENCE, "clamscan is gone", || {
        // Of one that nobody has reaped yet there is a directory, and no command line.
        let command_line = fs::read(format!("/proc/{}/cmdline", pid.trim()));
        command_line.unwrap_or_default().is_empty()
    });

    fake_clamscan(&fleet, "exit 0");
    start_with(&mut master, &fake);
    master.wait_generation(1);
    assert_eq!(master.audit("refused").len(), 0);
}

#[test]
fn a_load_test_that_was_killed_is_made_again_and_refuses_nothing() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    Container::new("daily", 1)
        .member("hsb", signatures(0..10))
        .write(&mirror);
    let fake = fake_clamscan(&fleet, "kill -KILL $$");
    let mut master = fleet.master(&mirror);
    start_with(&mut master, &fake);
    until(PATIENCE, "status shows why", || {
        let status = master.json(&["status"]).unwrap();
        let alarm = status["alarm"].as_str().unwrap_or_default().to_owned();
        if alarm.contains("SIGKILL") {
            Ok(())
        } else {
            Err(status)
        }
    });
    fake_clamscan(&fleet, "exit 0");
    master.wait_generation(1);
    assert!(
        master.json(&["status"]).unwrap()["alarm"].is_null(),
        "and that it is over"
    );
    assert_eq!(master.audit("refused").len(), 0);
    assert!(master.log().contains("SIGKILL"), "it is told");
}

#[test]
fn databases_that_crash_clamscan_are_refused_with_the_signal() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    let good = Container::new("daily", 1).member("hsb", signatures(0..10));
    good.write(&mirror);
    let fake = fake_clamscan(&fleet, "kill -SEGV $$");
    let mut master = fleet.master(&mirror);
    start_with(&mut master, &fake);
    let refusal = master.wait_audit("refused", 1).remove(0);
    assert!(refusal.to_string().contains("SIGSEGV"), "{refusal}");
}

#[test]
fn the_load_test_cannot_read_the_keys_of_the_master_that_runs_it() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    let good = Container::new("daily", 1).member("hsb", signatures(0..10));
    good.write(&mirror);
    // Any key that can be read ends it with what would be a refusal.
    let keys = ["manifest.key", "audit.key", "master/key.pem"].map(|key| fleet.pki().join(key));
    let mut script = String::new();
    for key in keys {
        assert!(!fs::read(&key).unwrap().is_empty());
        script += &format!("cat {} && kill -SEGV $$\n", key.display());
    }
    let fake = fake_clamscan(&fleet, &(script + "exit 0"));
    let mut master = fleet.master(&mirror);
    start_with(&mut master, &fake);
    master.wait_generation(1);
}
