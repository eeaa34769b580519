//! What waves are for: a bad generation reaches the canaries and nobody else.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{SystemTime, UNIX_EPOCH};

use clamcast_tests::lab::{
    Agent, Clamd, Container, Fleet, Master, PATIENCE, hash_signature, program, signatures, until,
};
use clamcast_tests::require;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const SAMPLE: &[u8] = b"a sample that the good sets find";

/// A set that clamd loads.
fn good(version: u64) -> Container {
    let members = signatures(0..50 + version) + &hash_signature(SAMPLE, "Lab.Good-1");
    Container::new("daily", version).member("hsb", members)
}

/// One that it does not.
fn bad(version: u64) -> Container {
    let nonsense = "Lab.Nonsense:0:*:these are no hexadecimal digits\n";
    good(version).member("ndb", nonsense)
}

/// A master whose canaries are `web1` and `web2`, with `rollout` as its table of that name. Not
/// started, and its mirror is empty.
fn master(fleet: &Fleet, rollout: &str) -> Master {
    let master = fleet.master(&fleet.mirror());
    let tables = format!(
        "load_test = \"never\"\n[groups]\ncanary = [\"web1\", \"web2\"]\n[rollout]\n{rollout}"
    );
    master.configure("require = []", &format!("require = []\n{tables}"));
    master
}

/// Starts it all, with agents `web1` and `db1` without clamds. Set 1 is published when both are there,
/// for a wave that nobody is in is skipped.
fn start(fleet: &Fleet, master: &mut Master) -> [Agent; 2] {
    master.start();
    let agents = fleet.start_agents(["web1", "db1"]);
    for name in ["web1", "db1"] {
        master.wait_agent(name, "it is there", |row| row["connected"] == true);
    }
    good(1).write(&fleet.mirror());
    agents
}

fn rollout(master: &Master) -> Value {
    master.json(&["status"]).unwrap_or_default()["rollout"].clone()
}

#[track_caller]
fn wait_state(master: &Master, state: &str) -> Value {
    until(PATIENCE, &format!("the rollout is {state}"), || {
        let rollout = rollout(master);
        if rollout["state"] == state {
            Ok(rollout)
        } else {
            Err(rollout)
        }
    })
}

/// The generations that an agent was offered, by the audit log.
fn offered(master: &Master, agent: &str) -> Vec<Value> {
    let offers = master.audit("offer").into_iter();
    let to = offers.filter(|offer| offer["subject"] == agent);
    to.map(|offer| offer["generation"].clone()).collect()
}

#[test]
fn a_generation_that_clamd_cannot_load_halts_at_the_canaries_and_is_taken_back() {
    require!(Clamd);
    let fleet = Fleet::new();
    let mut master = master(&fleet, "");
    good(1).write(&fleet.mirror());
    let databases = ["web1", "web2"].map(|name| fleet.database(name));
    let mut clamds = Clamd::several([&databases[0], &databases[1]]);
    let mut agents: [Agent; 3] = [
        fleet.agent_of("web1", &clamds[0]),
        fleet.agent_of("web2", &clamds[1]),
        fleet.agent("db1"),
    ];
    master.start();
    for agent in &mut agents {
        agent.start();
    }
    for (name, clamd) in ["web1", "web2"].into_iter().zip(&mut clamds) {
        master.wait_agent(name, "the first set is there", |row| row["generation"] == 1);
        clamd.start();
    }
    for name in ["web1", "web2", "db1"] {
        master.wait_live(name, 1);
    }
    wait_state(&master, "complete");

    let mirror = fleet.mirror();
    bad(2).write(&mirror);
    let halt = master.wait_audit("halt", 1).remove(0);
    assert_eq!(halt["generation"], 2);
    let reason = halt["detail"]["reason"].as_str().unwrap();
    assert!(reason.contains("clamd refused it on"), "{reason}");

    // The databases from before are published again, and the canaries are back on them.
    for (name, clamd) in ["web1", "web2"].into_iter().zip(&clamds) {
        master.wait_live(name, 3);
        let found = clamd.scan(SAMPLE).unwrap();
        assert_eq!(found, "stream: Lab.Good-1.UNOFFICIAL FOUND");
    }
    master.wait_live("db1", 3);
    assert_eq!(offered(&master, "db1"), [json!(1), json!(3)], "never 2");
    let status = master.json(&["status"]).unwrap();
    let rollout = &status["rollout"];
    assert_eq!(rollout["state"], "halted", "{status}");
    assert_eq!(rollout["failed"]["generation"], 2);
    assert_eq!(rollout["failed"]["reason"], reason);

    // The mirror still has what nobody wants.
    let looked = master.command(&["publish"]);
    assert_eq!(looked.status.code(), Some(4), "{looked:?}");
    let held = String::from_utf8(looked.stderr).unwrap();
    assert!(held.contains("which was halted"), "{held}");
    master.wait_audit("held", 1);
    let generations = master.json(&["generations"]).unwrap();
    let states = generations.as_array().unwrap().iter();
    let states: Vec<_> = states.map(|generation| &generation["state"]).collect();
    assert_eq!(states, ["superseded", "halted", "current"]);

    good(3).write(&mirror);
    for name in ["web1", "web2", "db1"] {
        master.wait_live(name, 4);
    }
    wait_state(&master, "complete");
}

#[test]
fn a_host_that_refused_a_generation_has_the_one_before_mended_by_the_master() {
    require!(Clamd);
    let fleet = Fleet::new();
    let mut master = master(&fleet, "rollback_on_halt = false");
    master.configure("[signing]", "[signing]\nfresh = \"1m\"");
    good(1).write(&fleet.mirror());
    let (mut agent, mut clamd) = fleet.agent_and_clamd("web1");
    let database = agent.database();
    master.start_with(&mut agent, &mut clamd);
    wait_state(&master, "complete");
    bad(2).write(&fleet.mirror());
    master.wait_audit("halt", 1);
    let row = master.wait_live("web1", 1);
    assert_eq!(row["outcome"], "refused", "{row}");

    // Its own copies go first, so that only the master has the file.
    let file = database.join("daily.cud");
    let good = fs::read(&file).unwrap();
    for kept in ["current", "previous", "stage"] {
        let kept = database.join(".clamcast").join(kept);
        for entry in fs::read_dir(kept).into_iter().flatten() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
    }
    fs::remove_file(&file).unwrap();
    let repair = master.wait_audit("repair", 1).remove(0);
    assert_eq!(repair["generation"], 1, "{repair}");
    master.wait_live("web1", 1);
    assert_eq!(fs::read(&file).unwrap(), good);
    let found = clamd.scan(SAMPLE).unwrap();
    assert_eq!(found, "stream: Lab.Good-1.UNOFFICIAL FOUND");
    let offers = [json!(1), json!(2), json!(1)];
    assert_eq!(offered(&master, "web1"), offers, "2 no second time");

    let forced = master.command(&["force-sync", "web1"]);
    assert_eq!(forced.status.code(), Some(0), "{forced:?}");
    let table = String::from_utf8(forced.stdout).unwrap();
    let row: Vec<_> = table.lines().last().unwrap().split_whitespace().collect();
    assert_eq!(row, ["web1", "live", "1.1", "yes", "-", "-"], "{table}");

    // It goes on being told that what it runs is current.
    let fresh = || agent.json(&["status"]).unwrap_or_default()["fresh_until"].clone();
    let told = fresh();
    assert!(told.is_string());
    until(PATIENCE, "a newer word comes", || {
        let now = fresh();
        (now.as_str() > told.as_str()).then_some(()).ok_or(now)
    });
    assert_eq!(offered(&master, "web1").len(), 4);
}

/// A fleet of `web1`, a canary, and `db1` without clamds, complete at 1; then set 2 stands at the
/// canary for as long as nobody promotes it.
fn standing(fleet: &Fleet) -> (Master, [Agent; 2]) {
    standing_with(fleet, "")
}

fn standing_with(fleet: &Fleet, rules: &str) -> (Master, [Agent; 2]) {
    let mut master = master(fleet, &format!("settle = \"1h\"\n{rules}"));
    let agents = start(fleet, &mut master);
    master.wait_live("web1", 1);
    // Wave by wave.
    until(PATIENCE, "the first is complete", || {
        master.command(&["rollout", "promote", "--reason", "the first"]);
        let rollout = rollout(&master);
        (rollout["state"] == "complete")
            .then_some(())
            .ok_or(rollout)
    });
    master.wait_live("db1", 1);
    good(2).write(&fleet.mirror());
    master.wait_live("web1", 2);
    (master, agents)
}

/// Runs a command that must end with this exit code, and returns what it says on stderr.
#[track_caller]
fn order(master: &Master, command: &[&str], code: i32) -> String {
    let output = master.command(command);
    assert_eq!(output.status.code(), Some(code), "{command:?}: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_restarted_master_goes_on_where_the_rollout_stood() {
    let fleet = Fleet::new();
    let (mut master, _agents) = standing(&fleet);
    master.kill();
    master.start();
    master.wait_agent("db1", "db1 is back", |row| row["connected"] == true);
    master.wait_agent("web1", "web1 is back", |row| row["connected"] == true);
    assert_eq!(wait_state(&master, "running")["running"]["generation"], 2);
    let status = master.json(&["status"]).unwrap();
    assert_eq!(status["generation"], 1, "what the fleet is at");
    assert_eq!(
        order(&master, &["rollout", "status", "--timeout", "1s"], 1),
        "clamcast-master: not complete in time: 1.2 is not through: 1 of 1 are live with it in wave 1 \
         of 3 (group:canary)\n"
    );
    order(
        &master,
        &["rollout", "promote", "--reason", "it is good"],
        0,
    );
    master.wait_live("db1", 2);
    let promoted = master.wait_audit("promoted", master.audit("promoted").len());
    assert_eq!(promoted.last().unwrap()["detail"]["reason"], "it is good");
    assert_eq!(offered(&master, "db1"), [json!(1), json!(2)]);
}

#[test]
fn operators_pause_abort_roll_back_and_pin() {
    let fleet = Fleet::new();
    let (mut master, _agents) = standing(&fleet);
    order(&master, &["rollout", "pause", "--reason", "freeze"], 0);
    assert_eq!(wait_state(&master, "paused")["paused"]["reason"], "freeze");
    let again = order(&master, &["rollout", "pause", "--reason", "lunch"], 4);
    assert!(
        again.contains("is paused since") && again.contains("freeze"),
        "{again}"
    );
    order(&master, &["rollout", "status"], 0);
    let waited = order(&master, &["rollout", "status", "--timeout", "1s"], 1);
    assert!(
        waited.contains("not complete in time: 1.2 is paused: freeze"),
        "{waited}"
    );
    order(&master, &["rollout", "resume"], 0);
    let nothing = order(&master, &["rollout", "resume"], 4);
    assert!(nothing.contains("1.2 is not paused"), "{nothing}");

    // Those who have it go back, and the mirror's set is held.
    order(&master, &["rollout", "abort", "--reason", "ticket 7"], 0);
    for name in ["web1", "db1"] {
        master.wait_live(name, 3);
    }
    assert_eq!(offered(&master, "db1"), [json!(1), json!(3)]);
    assert_eq!(
        wait_state(&master, "halted")["failed"]["reason"],
        "ticket 7"
    );
    assert!(order(&master, &["publish"], 4).contains("which was aborted"));
    for back in [["rollback", "2"].as_slice(), &["pin", "canary", "2"]] {
        let refused = order(&master, back, 4);
        assert!(refused.contains("1.2 was aborted; `publish"), "{refused}");
    }

    let slip = order(&master, &["pin", "cannary"], 2);
    assert!(slip.contains("no agent is in group `cannary`"), "{slip}");
    // A pinned group stays where it is while the others go on.
    order(&master, &["pin", "canary", "--reason", "audit"], 0);
    good(3).write(&fleet.mirror());
    master.wait_live("db1", 4);
    order(&master, &["rollout", "status", "--timeout", "60s"], 0);
    let row = master.agent("web1").unwrap();
    assert_eq!(
        (
            &row["generation"],
            &row["wanted"]["generation"],
            &row["pinned"]
        ),
        (&json!(3), &json!(3), &json!(true))
    );
    let table = String::from_utf8(master.command(&["agents"]).stdout).unwrap();
    assert!(table.contains("1.3 pinned"), "{table}");
    order(&master, &["unpin", "canary"], 0);
    master.wait_live("web1", 4);

    // After a rollback by hand nothing is published until somebody says so.
    order(
        &master,
        &["rollback", "3", "--reason", "false positives"],
        0,
    );
    for name in ["web1", "db1"] {
        master.wait_live(name, 5);
    }
    good(4).write(&fleet.mirror());
    let held = order(&master, &["publish"], 4);
    assert!(
        held.contains("rolled back to the databases of 1.3"),
        "{held}"
    );
    master.kill();
    master.start();
    order(&master, &["rollout", "resume"], 0);
    master.wait_live("web1", 6);
    assert!(order(&master, &["rollback", "77"], 2).contains("`generations`"));
}

#[test]
fn whoever_waits_for_a_rollout_goes_on_waiting_over_a_reload() {
    let fleet = Fleet::new();
    let (mut master, _agents) = standing(&fleet);
    let mut waiting = program("clamcast-master");
    waiting.arg("--socket").arg(master.socket());
    let waiting = waiting.args(["rollout", "status", "--timeout", "60s"]);
    let mut waiting = waiting.stdout(Stdio::null()).spawn().unwrap();
    for reloads in 1..=2 {
        master.reload();
        master.wait_audit("reload", reloads);
        master.wait_agent("db1", "it is back", |row| row["connected"] == true);
    }
    assert!(waiting.try_wait().unwrap().is_none());
    master.kill();
    master.start();
    order(&master, &["rollout", "promote", "--reason", "good"], 0);
    assert_eq!(waiting.wait().unwrap().code(), Some(0));
    assert_eq!(rollout(&master)["complete"]["generation"], 2);
}

#[test]
fn a_rollback_is_waited_for_until_who_is_there_is_back() {
    let fleet = Fleet::new();
    let (mut master, mut agents) = standing(&fleet);
    order(&master, &["rollout", "promote", "--reason", "good"], 0);
    master.wait_live("db1", 2);
    wait_state(&master, "complete");
    let wait = |master: &Master, time| master.command(&["rollout", "status", "--timeout", time]);
    let going_back = |master: &Master| rollout(master)["going_back"].clone();

    // One that does not get on with it is waited for.
    kill(Pid::from_raw(agents[0].pid() as i32), Signal::SIGSTOP).unwrap();
    order(&master, &["rollback", "1", "--reason", "a test"], 0);
    master.wait_live("db1", 3);
    let late = wait(&master, "1s");
    assert_eq!(late.status.code(), Some(1), "{late:?}");
    let said = String::from_utf8(late.stderr).unwrap();
    let on_its_way = "1.3 takes the place of 1.2, and 1 host is on the way to it";
    assert!(said.contains(on_its_way), "{said}");
    let shown = String::from_utf8(late.stdout).unwrap();
    assert!(
        shown.contains("WAITS FOR") && shown.contains("web1"),
        "{shown}"
    );
    let back = going_back(&master);
    assert_eq!(
        (&back["from"]["generation"], &back["to"]["generation"]),
        (&json!(2), &json!(3))
    );
    assert_eq!(
        (&back["on_their_way"], &back["left"]),
        (&json!(1), &json!(0))
    );
    order(&master, &["rollout", "status"], 0);
    // After a start it is waited for before it is connected.
    master.kill();
    master.start();
    assert_eq!(wait(&master, "1s").status.code(), Some(1));
    assert_eq!(going_back(&master)["on_their_way"], 1);
    agents[0].resume();
    assert_eq!(wait(&master, "60s").status.code(), Some(0));
    master.wait_live("web1", 3);
    assert_eq!(going_back(&master), json!(null));

    // One that is away is not waited for, but named.
    order(&master, &["rollout", "resume"], 0);
    good(3).write(&fleet.mirror());
    master.wait_live("web1", 4);
    agents[0].stop();
    master.wait_agent("web1", "it is away", |row| row["connected"] == false);
    order(&master, &["rollout", "abort", "--reason", "a test"], 0);
    let halted = wait(&master, "60s");
    assert_eq!(halted.status.code(), Some(1), "aborted: {halted:?}");
    let shown = String::from_utf8(halted.stdout).unwrap();
    assert!(
        shown.contains("STILL HAS IT") && shown.contains("not connected"),
        "{shown}"
    );
    let back = going_back(&master);
    assert_eq!(
        (&back["on_their_way"], &back["left"]),
        (&json!(0), &json!(1))
    );
    agents[0].start();
    master.wait_live("web1", 5);
    assert_eq!(going_back(&master), json!(null));
}

#[test]
fn what_was_taken_back_is_forced_by_name_and_with_a_reason_only() {
    let fleet = Fleet::new();
    let (master, _agents) = standing_with(&fleet, "rollback_on_halt = false");
    order(&master, &["rollout", "abort", "--reason", "ticket 7"], 0);
    let force = |rest: &[&str], code| {
        let command = [&["force-sync"], rest].concat();
        order(&master, &command, code)
    };
    force(&["--all", "--generation", "2", "--accept", "a test"], 2);
    force(&["db1", "--generation", "2"], 2);
    force(&["db1", "--generation", "2", "--accept", "a test"], 0);
    master.wait_agent(
        "db1",
        "db1 has what was taken back, and that is told",
        |row| {
            row["generation"] == 2
                && row["live"] == true
                && row["conformant"] == false
                && row["error"] == "1.2 was taken back"
        },
    );
    let end = master.wait_audit("force-sync", 1).remove(0);
    assert_eq!(end["generation"], 2);
    assert_eq!(end["detail"]["reason"], "a test");
    // Nobody goes back.
    let back = master.command(&["force-sync", "--all"]);
    assert_eq!(back.status.code(), Some(1), "{back:?}");
    let table = String::from_utf8(back.stdout).unwrap();
    assert!(table.contains("it took 1.2 and never goes back"), "{table}");
    assert_eq!(offered(&master, "db1"), [json!(1), json!(2)]);
    let none = force(&["db1", "--generation", "77", "--accept", "a test"], 2);
    assert!(none.contains("no such generation"), "{none}");
}

/// Asks for the `status` of a master that does not know where its rollout stood, and that holds
/// everything until somebody says so.
#[track_caller]
fn check_lost(master: &Master, why: &str) {
    let status = master.json(&["status"]).unwrap();
    let alarm = status["alarm"].as_str().unwrap();
    assert!(alarm.contains("until `rollout resume`"), "{status}");
    let held = order(master, &["publish"], 4);
    assert!(held.contains(why), "{held}");
    let alarms = master.audit("alarm");
    let alarm = alarms.last().unwrap();
    assert_eq!(alarm["subject"], "rollout.json");
    assert!(
        alarm["detail"]["reason"].as_str().unwrap().contains(why),
        "{alarm}"
    );
}

#[test]
fn a_master_that_lost_where_its_rollout_stood_offers_nothing_until_an_operator_says_so() {
    let fleet = Fleet::new();
    let (mut master, _agents) = standing_with(&fleet, "rollback_on_halt = false");
    order(&master, &["rollout", "abort", "--reason", "ticket 7"], 0);
    let state = master.directory().join("state/rollout.json");
    master.kill();
    fs::write(&state, "{").unwrap();
    master.configure("[rollout]", "[store]\nkeep = 1\n[rollout]");
    master.start();
    for name in ["web1", "db1"] {
        master.wait_agent(name, "it is back", |row| row["connected"] == true);
    }
    check_lost(&master, "rollout.json is damaged");
    let aside = || fs::read_to_string(state.with_extension("json.damaged")).unwrap();
    check_lost(&master, "it is kept as");
    assert_eq!(aside(), "{");
    good(3).write(&fleet.mirror());
    order(&master, &["publish"], 4);
    let kept = master.json(&["generations"]).unwrap();
    assert_eq!(kept.as_array().unwrap().len(), 2, "nothing is removed");

    order(&master, &["rollout", "resume"], 0);
    assert_eq!(aside(), "{", "the first order has written another one");
    master.wait_live("web1", 3);
    order(&master, &["rollout", "promote", "--reason", "good"], 0);
    master.wait_live("db1", 3);
    assert!(!offered(&master, "db1").contains(&json!(2)));
    assert!(master.json(&["status"]).unwrap()["alarm"].is_null());

    // Gone it is not known either; what is published goes through the waves again.
    wait_state(&master, "complete");
    master.kill();
    fs::remove_file(&state).unwrap();
    master.start();
    check_lost(&master, "rollout.json is gone");
    order(&master, &["rollout", "resume"], 0);
    until(PATIENCE, "it begins anew", || {
        let rollout = rollout(&master);
        (rollout["running"]["generation"] == 3 || rollout["state"] == "complete")
            .then_some(())
            .ok_or(rollout)
    });
}

#[test]
fn an_order_is_done_when_the_disk_has_it() {
    let fleet = Fleet::new();
    let (master, _agents) = standing(&fleet);
    let pause = ["rollout", "pause", "--reason", "freeze"];
    order(&master, &pause, 0);
    // While it is paused nothing else is written there.
    let state = refuse_rollout(&master);
    let unwritten = order(&master, &["rollout", "resume"], 5);
    assert!(
        unwritten.contains("cannot write the state of the rollout")
            && unwritten.contains("forgotten if the daemon ends before"),
        "{unwritten}"
    );
    let refused = order(&master, &pause, 5);
    assert!(refused.contains("no order is taken"), "{refused}");
    fs::remove_dir(&state).unwrap();
    until(PATIENCE, "it is written", || state.is_file());
    until(PATIENCE, "the alarm is over", || {
        master.json(&["status"]).unwrap()["alarm"].is_null()
    });
    assert_eq!(rollout(&master)["state"], "running");
    order(&master, &pause, 0);
}

#[test]
fn superseding_that_the_disk_refuses_is_told_and_with_nothing_waiting_changes_nothing() {
    let fleet = Fleet::new();
    let (master, _agents) = standing(&fleet);
    let supersede = |code| {
        let output = master.command(&["publish", "--supersede"]);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap()
    };
    assert!(supersede(0).contains("unchanged: 1.2"), "nothing waits");
    good(3).write(&fleet.mirror());
    until(PATIENCE, "the disk has it that the third waits", || {
        let text = fs::read(master.directory().join("state/rollout.json")).unwrap_or_default();
        let state = serde_json::from_slice::<Value>(&text).unwrap_or_default();
        state["waiting"]["position"]["generation"] == 3
    });
    let state = refuse_rollout(&master);
    let unwritten = supersede(5);
    assert!(
        unwritten.contains("cannot write the state of the rollout"),
        "{unwritten}"
    );
    fs::remove_dir(&state).unwrap();
    master.wait_live("web1", 3);
}

/// As good as a disk that refuses the state of the rollout, until the directory that it returns is
/// removed.
fn refuse_rollout(master: &Master) -> PathBuf {
    let state = master.directory().join("state/rollout.json");
    fs::remove_file(&state).unwrap();
    fs::create_dir(&state).unwrap();
    state
}

#[test]
fn a_rollback_that_cannot_be_published_is_told_and_made_later() {
    let fleet = Fleet::new();
    let (master, _agents) = standing(&fleet);
    let generations = master.directory().join("state/generations");
    let aside = master.directory().join("aside");
    fs::rename(&generations, &aside).unwrap();
    order(&master, &["rollout", "abort", "--reason", "ticket 7"], 0);
    let status = until(PATIENCE, "the master says that it cannot", || {
        let status = master.json(&["status"]).unwrap();
        let alarm = status["alarm"].as_str().unwrap_or_default();
        if alarm.contains("the rollback cannot be published") {
            Ok(status)
        } else {
            Err(status)
        }
    });
    let owed = &status["rollout"]["owed"];
    assert_eq!(
        (&owed["to"]["generation"], &owed["of"]["generation"]),
        (&json!(1), &json!(2))
    );
    fs::rename(&aside, &generations).unwrap();
    for name in ["web1", "db1"] {
        master.wait_live(name, 3);
    }
    let status = master.json(&["status"]).unwrap();
    assert!(status["alarm"].is_null() && status["rollout"]["owed"].is_null());
}

#[test]
fn publish_that_waits_says_so_when_the_fleet_does_not_get_it() {
    let fleet = Fleet::new();
    let mut master = master(&fleet, "deadline = \"3s\"");
    let [web1, _db1] = start(&fleet, &mut master);
    for name in ["web1", "db1"] {
        master.wait_live(name, 1);
    }
    wait_state(&master, "complete");
    // The canary is connected and silent.
    kill(Pid::from_raw(web1.pid() as i32), Signal::SIGSTOP).unwrap();
    good(2).write(&fleet.mirror());
    for again in ["published", "unchanged"] {
        let output = master.command(&["publish", "--wait"]);
        assert_eq!(output.status.code(), Some(1), "{again}: {output:?}");
        let stuck = String::from_utf8(output.stderr).unwrap();
        assert!(
            stuck.contains(
                "1.2 is paused: too few to go on have proven it live: 0 of 1 hosts of the wave"
            ),
            "{stuck}"
        );
    }
}

/// A window, as the configuration has it, that is closed for hours.
fn closed_window() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let hour = (now.as_secs() / 3600 + 12) % 24;
    format!("Mon-Sun {hour:02}:00-{hour:02}:59 UTC")
}

#[test]
fn publish_waits_for_no_window() {
    let fleet = Fleet::new();
    let window = closed_window();
    let mut master = master(&fleet, &format!("[rollout.windows]\ndb = [{window:?}]"));
    master.configure("[groups]", "[groups]\ndb = [\"db1\"]");
    let _agents = start(&fleet, &mut master);
    master.wait_live("web1", 1);
    let told = order(&master, &["publish", "--wait"], 1);
    assert!(
        told.contains("when a window of its members opens"),
        "{told}"
    );
    assert_eq!(offered(&master, "db1"), [] as [Value; 0]);
}

#[test]
fn the_end_of_a_rollout_is_in_a_checkpoint_that_agents_have() {
    let fleet = Fleet::new();
    let mut master = master(&fleet, "");
    let agents = start(&fleet, &mut master);
    let end = master.wait_audit("rollout-complete", 1).remove(0);
    let end = end["seq"].as_u64().unwrap();
    for agent in &agents {
        until(PATIENCE, "the agent has a checkpoint of it", || {
            // C2SP tlog-checkpoint: the second line is the number of records, which begin with 1.
            let path = agent.directory().join("state/checkpoint");
            let text = fs::read_to_string(path).unwrap_or_default();
            let records = text
                .lines()
                .nth(1)
                .and_then(|line| line.parse::<u64>().ok());
            records.is_some_and(|records| records >= end)
        });
    }
}
