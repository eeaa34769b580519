//! What operators do, with the real commands on real daemons.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Output, Stdio};

use clamcast_tests::lab::{Agent, Container, Fleet, Master, PATIENCE, program, signatures, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// A master with `agents`, all live at generation 1 of a small set.
fn fleet_of(names: &[&str]) -> (Fleet, Master, Vec<Agent>) {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    Container::new("daily", 1)
        .member("hsb", signatures(0..1000))
        .write(&mirror);
    let mut master = fleet.master(&mirror);
    master.start();
    let agents = names.iter().flat_map(|name| fleet.start_agents([name]));
    let agents = agents.collect();
    for name in names {
        master.wait_live(name, 1);
    }
    (fleet, master, agents)
}

/// From now on it leaves a changed file to the operators.
fn only_reports(agent: &mut Agent) {
    assert!(agent.stop().success());
    agent.configure("[database]\n", "[database]\ndrift = \"report\"\n");
    agent.start();
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
    let (_fleet, master, mut agents) = fleet_of(&["web1", "web2"]);
    only_reports(&mut agents[0]);
    master.wait_agent("web1", "it is back", |row| row["connected"] == true);
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
    exits(&output, 0, "daily.cud was changed, mended");
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
fn a_forced_host_that_loses_its_connection_looks_at_its_disk_all_the_same() {
    let (_fleet, master, mut agents) = fleet_of(&["web1"]);
    only_reports(&mut agents[0]);
    master.wait_agent("web1", "it is back", |row| row["connected"] == true);
    let mut order = held_order(&master, &agents[0], &["web1", "--no-wait"]);
    exits_with(&mut order, 0);
    agents[0].kill();
    // What no event tells of is found by a re-hash only.
    let file = agents[0].database().join("daily.cud");
    let mut bytes = fs::read(&file).unwrap();
    bytes[5000] ^= 1;
    fs::write(&file, &bytes).unwrap();
    agents[0].start();
    let end = &master.wait_audit("force-sync-end", 1)[0];
    assert_eq!(end["outcome"], "done", "{end}");
    exits(&agents[0].command(&["verify"]), 0, "");
}

#[test]
fn force_sync_full_sends_the_file_and_json_has_one_object_a_line() {
    let (_fleet, master, mut agents) = fleet_of(&["web1"]);
    only_reports(&mut agents[0]);
    master.wait_agent("web1", "it is back", |row| row["connected"] == true);
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
        2,
        "no such generation",
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
    let mut command = program("clamcast-master");
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
    let master = fleet.master(&fleet.mirror());
    for command in ["status", "agents", "generations", "publish"] {
        exits(&master.command(&[command]), 3, "is it running");
    }
    let agent = fleet.agent("web1");
    exits(&agent.command(&["status"]), 3, "is it running");
}

#[test]
fn a_reload_takes_what_is_good_and_keeps_the_old_on_an_error() {
    let (fleet, mut master, mut agents) = fleet_of(&["web1"]);
    master.configure("quiet = \"300ms\"", "quite = \"1s\"");
    master.reload();
    until(PATIENCE, "the error is logged", || {
        master.log().contains("did you mean `quiet`?")
    });
    assert_eq!(
        master.agent("web1").unwrap()["connected"],
        true,
        "nothing else happened"
    );
    let alarm = |master: &Master| master.json(&["status"]).unwrap()["alarm"].clone();
    let shown = alarm(&master).to_string();
    assert!(
        shown.contains("not in use") && shown.contains("did you mean `quiet`?"),
        "{shown}"
    );
    assert_eq!(master.wait_audit("reload", 1)[0]["outcome"], "failed");

    // A new certificate and another quiet time.
    fleet.certs(&["master", "--host", "127.0.0.1", "--force"]);
    master.configure("quite = \"1s\"", "quiet = \"100ms\"");
    master.reload();
    until(PATIENCE, "it starts anew", || {
        master.audit("started").len() == 2
    });
    assert_eq!(master.wait_audit("reload", 2)[1]["outcome"], "done");
    assert_eq!(master.audit("stopped")[0]["outcome"], "reload");
    assert_eq!(alarm(&master), Value::Null);
    agents[0].reload();
    Container::new("daily", 2)
        .member("hsb", signatures(0..1100))
        .write(&fleet.mirror());
    master.wait_live("web1", 2);
    let certificate = |record: &Value| record["detail"]["certificate"].clone();
    let started = master.audit("started");
    assert_ne!(
        certificate(&started[0]),
        certificate(&started[1]),
        "the new certificate is in use"
    );
    assert!(agents[0].stop().success() && master.stop().success());
}

#[test]
fn status_names_who_is_not_conformant_and_the_age_of_the_signatures() {
    let (_fleet, master, mut agents) = fleet_of(&["web1", "web2"]);
    agents[1].stop();
    fs::remove_dir_all(agents[1].directory().join("state")).unwrap();
    until(PATIENCE, "web2 is gone", || {
        master.agent("web2").unwrap()["connected"] == false
    });
    let shown = text(&master.command(&["status"]).stdout);
    // The lab's databases were built in 2023.
    assert!(shown.contains("older than the 7 days"), "{shown}");
    assert!(!shown.contains('\x1b'), "no colour into a pipe: {shown}");
    assert!(
        shown.contains("web2") && shown.contains("not connected"),
        "{shown}"
    );
    let status = master.json(&["status"]).unwrap();
    assert_eq!(status["agents"]["connected"], 1, "{status}");
    assert_eq!(status["signatures"]["alarm"], "7d", "{status}");
}

#[test]
fn audit_show_follows_and_filters() {
    let (fleet, master, _agents) = fleet_of(&["web1"]);
    let mut follow = program("clamcast-master");
    follow.arg("--socket").arg(master.socket());
    follow.args([
        "audit",
        "show",
        "--follow",
        "--event",
        "published",
        "--json",
    ]);
    let out = fs::File::create(fleet.join("followed")).unwrap();
    let mut follow = follow.stdout(out).stderr(Stdio::null()).spawn().unwrap();
    let followed = |lines| {
        until(PATIENCE, "the records arrive", || {
            fs::read_to_string(fleet.join("followed"))
                .unwrap()
                .lines()
                .count()
                == lines
        });
    };
    followed(1);
    Container::new("daily", 2)
        .member("hsb", signatures(0..1100))
        .write(&fleet.mirror());
    followed(2);
    follow.kill().unwrap();
    follow.wait().unwrap();
    let show = |filter: &[&str]| {
        let output = master.command(&[&["audit", "show", "--json"], filter].concat());
        text(&output.stdout).lines().count()
    };
    assert_eq!(show(&["--since", "2999-01-01T00:00:00Z"]), 0);
    let before = show(&["--agent", "web1"]);
    assert!(before >= 3);
    exits(&master.command(&["force-sync", "web1"]), 0, "live");
    assert!(
        show(&["--agent", "web1", "--event", "force-sync"]) == 1,
        "who ordered it"
    );
    assert_eq!(show(&["--operator", "somebody-else"]), 0);
}

#[test]
fn audit_show_says_what_matched_nothing_and_refuses_what_it_does_not_know() {
    let (_fleet, master, _agents) = fleet_of(&["web1", "web2"]);
    exits(&master.command(&["force-sync", "web1"]), 0, "live");
    let show = |filter: &[&str]| master.command(&[&["audit", "show"], filter].concat());
    let records = |filter: &[&str]| text(&show(filter).stdout).lines().count().saturating_sub(1);

    let all = text(&show(&[]).stdout);
    assert!(all.starts_with("SEQ     TIME"), "{all}");
    assert!(!all.contains('\x1b'), "{all}");
    let long = |word: &str| word.len() >= 64 && word.bytes().all(|b| b.is_ascii_hexdigit());
    assert!(
        !all.split([' ', '=', ',']).any(long),
        "whole digests: {all}"
    );

    // What is beside another is restricted by both.
    let both = records(&["--agent", "web*"]);
    let one = records(&["--agent", "web2"]);
    assert!(one > 0 && both > one, "{both} and {one}");
    assert_eq!(records(&["--agent", "web?", "--event", "enrolled"]), 2);
    assert_eq!(records(&["--agent", "web2", "--event", "force-sync"]), 0);
    let ordered = master.audit("force-sync").remove(0);
    let actor = ordered["actor"].as_str().unwrap();
    let (uid, name) = actor["operator:".len()..].split_once('/').unwrap();
    for operator in [uid, name] {
        assert_eq!(records(&["--operator", operator, "--since", "1h"]), 2);
    }
    assert_eq!(records(&["--since", "2000-01-01"]), all.lines().count() - 1);

    // Nothing is no failure, and no line on stdout.
    let nothing = |filter: &[&str], says: &str| {
        let output = show(filter);
        exits(&output, 0, says);
        assert_eq!(text(&output.stdout), "");
    };
    nothing(&["--since", "2999-01-01"], "no records match");
    nothing(&["--operator", "somebody-else"], "no records match");
    nothing(
        &["--agent", "WBE1"],
        "no agent is called `WBE1`; did you mean `web1`?",
    );
    nothing(&["--agent", "db*"], "no agent matches `db*`");
    exits(&show(&["--event", "publishd"]), 2, "'published'");
    exits(&show(&["--event", "nonsense"]), 2, "force-sync-end");
    exits(&show(&["--agent", "web["]), 2, "a pattern like");
    exits(&show(&["--since", "soon"]), 2, "a day like");
}

#[test]
fn output_that_cannot_be_written_is_an_error_and_not_a_panic() {
    let (_fleet, master, agents) = fleet_of(&["web1"]);
    let full = || fs::File::options().write(true).open("/dev/full").unwrap();
    for arguments in [
        &["status"][..],
        &["agents"],
        &["generations", "--json"],
        &["audit", "show"],
    ] {
        let mut command = program("clamcast-master");
        command.arg("--socket").arg(master.socket()).args(arguments);
        let output = command.stdout(full()).output().unwrap();
        exits(&output, 5, "cannot write the result");
    }
    let mut command = program("clamcast-agent");
    command
        .arg("--socket")
        .arg(agents[0].socket())
        .arg("status");
    exits(
        &command.stdout(full()).output().unwrap(),
        5,
        "cannot write the result",
    );
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
    check(0, "doubtful: mirror.path: ");
    let json = |ok: bool, list: &str, says: &str| {
        let config = master.config().to_str().unwrap().to_owned();
        let output = master.command(&["check-config", "--json", "--config", &config]);
        let checked: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(checked["ok"], ok, "{checked}");
        assert!(checked[list].to_string().contains(says), "{checked}");
    };
    json(true, "doubts", "mirror.path: ");
    fleet.mirror();
    check(0, "good");
    master.configure("quiet = \"300ms\"", "quite = \"300ms\"");
    check(2, "did you mean `quiet`?");
    json(false, "errors", "did you mean `quiet`?");
    master.configure("quite = \"300ms\"", "quiet = \"soon\"");
    check(2, "master.toml:5");
    master.configure("quiet = \"soon\"", "quiet = \"1s\"");
    master.configure("manifest.key", "audit.key");
    check(2, "is not one of the keys for this in the key set");
}

#[test]
fn a_configuration_that_cannot_be_used_is_an_alarm_on_the_agent_until_a_good_one_is() {
    let (fleet, _master, agents) = fleet_of(&["web1"]);
    let agent = &agents[0];
    let alarm = || {
        agent
            .json(&["status"])
            .map(|status| status["alarm"].clone())
    };
    let log = || agent_log(agent);
    let check = |broken: &dyn Fn(), mended: &dyn Fn(), says: &str| {
        broken();
        agent.reload();
        until(PATIENCE, "the alarm is shown", || {
            let alarm = alarm()?.to_string();
            (alarm.contains("not in use: ") && alarm.contains(says)).then_some(())
        });
        mended();
        agent.reload();
        until(PATIENCE, "the alarm is over", || {
            alarm() == Some(Value::Null)
        });
    };
    check(
        &|| agent.configure("[trust]", "[thrust]"),
        &|| agent.configure("[thrust]", "[trust]"),
        "thrust",
    );
    assert!(log().contains(r#""event":"reload""#) && log().contains("thrust"));
    assert!(log().contains(r#""outcome":"done""#));

    // The files that it names are part of it.
    for (file, key) in [
        ("key.pem", "tls.key"),
        ("cert.pem", "tls.cert"),
        ("ca.pem", "tls.ca"),
        ("manifest.pub", "trust.keys"),
    ] {
        let path = fleet.pki().join("agents/web1").join(file);
        let good = fs::read(&path).unwrap();
        check(
            &|| fs::write(&path, "nonsense").unwrap(),
            &|| fs::write(&path, &good).unwrap(),
            key,
        );
    }
}

/// A `force-sync` that does not end, for its agent is held.
fn held_order(master: &Master, agent: &Agent, arguments: &[&str]) -> Child {
    let before = master.audit("force-sync").len();
    signal(agent.pid(), Signal::SIGSTOP);
    let mut command = program("clamcast-master");
    command.arg("--socket").arg(master.socket());
    command.arg("force-sync").args(arguments);
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    master.wait_audit("force-sync", before + 1);
    child
}

#[track_caller]
fn exits_with(command: &mut Child, code: i32) {
    assert_eq!(command.wait().unwrap().code(), Some(code));
}

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
}

#[test]
fn an_order_that_a_reload_interrupts_says_who_is_done_and_who_is_not() {
    let (_fleet, mut master, agents) = fleet_of(&["web1", "web2"]);
    let waiting = held_order(&master, &agents[0], &["--all"]);
    until(PATIENCE, "web2 has answered", || {
        master.audit("receipt").len() > 2
    });
    master.reload();
    let output = waiting.wait_with_output().unwrap();
    exits(
        &output,
        1,
        "1 of 2 agents failed: web1; the daemon read its configuration again",
    );
    exits(&output, 1, "interrupted");
    let end = &master.wait_audit("force-sync-end", 1)[0];
    assert_eq!(end["outcome"], "interrupted");
    assert_eq!(end["detail"]["failed"], serde_json::json!(["web1"]));
    assert_eq!(end["detail"]["done"], 1);

    // The same for an end of the daemon; nobody waits for the order.
    signal(agents[0].pid(), Signal::SIGCONT);
    master.wait_agent("web1", "is back", |row| row["connected"] == true);
    let mut order = held_order(&master, &agents[0], &["web1", "--no-wait"]);
    order.wait().unwrap();
    assert!(master.stop().success());
    signal(agents[0].pid(), Signal::SIGCONT);
    let log = fs::read_to_string(master.directory().join("state/audit/log.jsonl")).unwrap();
    assert_eq!(
        log.matches(r#""outcome":"interrupted""#).count(),
        2,
        "{log}"
    );
    assert!(!master.socket().exists());
}

/// What the agent wrote down of itself.
fn agent_log(agent: &Agent) -> String {
    fs::read_to_string(agent.directory().join("state/audit/log.jsonl")).unwrap()
}

/// A command that has come to the admin socket, and asks with the last byte of its request.
struct Waiting(UnixStream);

impl Waiting {
    fn at(socket: &Path) -> Self {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.write_all(br#"{"command":"status"}"#).unwrap();
        Self(stream)
    }

    #[track_caller]
    fn gets_an_answer(mut self) {
        self.0.write_all(b"\n").unwrap();
        let mut answer = String::new();
        self.0.read_to_string(&mut answer).unwrap();
        assert!(answer.contains(r#""exit":0"#), "{answer}");
    }
}

#[test]
fn commands_that_come_during_a_reload_are_answered() {
    let (_fleet, master, agents) = fleet_of(&["web1"]);
    let agent = &agents[0];
    let (at_master, at_agent) = (Waiting::at(&master.socket()), Waiting::at(&agent.socket()));
    master.reload();
    while master.audit("reload").is_empty() {
        exits(&master.command(&["status"]), 0, "fleet");
    }
    at_master.gets_an_answer();
    agent.reload();
    while !agent_log(agent).contains(r#""event":"reload""#) {
        exits(&agent.command(&["status"]), 0, "web1");
    }
    at_agent.gets_an_answer();
}

#[test]
fn an_interrupted_force_sync_says_that_the_work_goes_on() {
    let (_fleet, master, agents) = fleet_of(&["web1"]);
    let mut waiting = held_order(&master, &agents[0], &["web1", "--json"]);
    let mut first = String::new();
    let mut lines = BufReader::new(waiting.stdout.take().unwrap());
    lines.read_line(&mut first).unwrap();
    assert!(first.contains("ordered"), "{first}");
    signal(waiting.id(), Signal::SIGINT);
    let output = waiting.wait_with_output().unwrap();
    exits(&output, 130, "audit show --event force-sync-end");
    signal(agents[0].pid(), Signal::SIGCONT);
    assert_eq!(master.wait_audit("force-sync-end", 1)[0]["outcome"], "done");
}

#[test]
fn no_wait_names_the_offline_and_holds_no_session_and_orders_are_bounded() {
    let (_fleet, master, mut agents) = fleet_of(&["web1", "web2"]);
    agents[1].stop();
    master.wait_agent("web2", "is gone", |row| row["connected"] == false);
    let json = |output: &Output| -> Vec<Value> {
        let lines = text(&output.stdout);
        let lines = lines
            .lines()
            .map(|line| serde_json::from_str(line).unwrap());
        lines.collect()
    };
    let output = master.command(&["force-sync", "web1", "--no-wait", "--json"]);
    exits(&output, 0, "");
    let ordered = serde_json::json!({"agent": "web1", "phase": "ordered"});
    assert_eq!(json(&output), std::slice::from_ref(&ordered));
    let output = master.command(&["force-sync", "--all", "--no-wait", "--json"]);
    exits(&output, 1, "1 of 2 agents not told: web2");
    assert_eq!(json(&output)[0], ordered);
    assert_eq!(json(&output)[1]["outcome"], "offline");
    master.wait_audit("force-sync-end", 2);

    // One that does not answer has all the orders that may be under way.
    held_order(&master, &agents[0], &["web1", "--no-wait"])
        .wait()
        .unwrap();
    let mut refused = 0;
    for _ in 1..=clamcast_master::operate::admin::ORDERS_MAX {
        let output = master.command(&["force-sync", "web1", "--no-wait"]);
        if output.status.code() != Some(0) {
            exits(&output, 5, "too many force-syncs");
            refused += 1;
        }
    }
    assert!(refused > 0);
    exits(&master.command(&["status"]), 0, "fleet");
    signal(agents[0].pid(), Signal::SIGCONT);
    until(PATIENCE, "every order comes to its end", || {
        master.audit("force-sync-end").len() == master.audit("force-sync").len()
    });
}

#[test]
fn a_host_that_gives_no_sign_is_said_to_give_no_answer() {
    let (_fleet, master, agents) = fleet_of(&["web1"]);
    let order = [
        "web1",
        "--timeout",
        "1s",
        "--generation",
        "1.1",
        "--accept",
        "x",
    ];
    let waiting = held_order(&master, &agents[0], &order);
    exits(&waiting.wait_with_output().unwrap(), 1, "no answer");
    signal(agents[0].pid(), Signal::SIGCONT);
}

#[test]
fn the_wrong_socket_says_whose_it_is() {
    let (_fleet, master, agents) = fleet_of(&["web1"]);
    let check = |program_name: &str, socket: std::path::PathBuf, says: &str| {
        let mut command = program(program_name);
        let output = command.arg("--socket").arg(socket).arg("status").output();
        exits(&output.unwrap(), 2, says);
    };
    check(
        "clamcast-master",
        agents[0].socket(),
        "is the admin socket of clamcast-agent",
    );
    check(
        "clamcast-agent",
        master.socket(),
        "is the admin socket of clamcast-master",
    );
    check(
        "clamcast-master",
        master.config().to_owned(),
        "is not a socket",
    );
    check(
        "clamcast-agent",
        master.directory().to_owned(),
        "is not a socket",
    );
}

#[test]
fn hundreds_of_idle_connections_keep_no_operator_out() {
    let (_fleet, master, _agents) = fleet_of(&["web1"]);
    let connect = |_| UnixStream::connect(master.socket()).unwrap();
    let _idle: Vec<_> = (0..900).map(connect).collect();
    exits(&master.command(&["status"]), 0, "fleet");
    exits(&master.command(&["force-sync", "web1"]), 0, "live");
}
