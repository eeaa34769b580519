//! A fleet of simulated agents and the real master: an update in waves, and two restarts.

use std::process::Command;
use std::time::{Duration, Instant};

use clamcast_tests::lab::{
    Container, Fleet, Master, Scratch, Usage, datagrams_dropped, signatures, until,
};
use clamcast_tests::long;
use clamcast_tests::simulated::{self, Agents, Standing};
use nix::unistd::geteuid;
use serde_json::Value;

/// Enough for the slowest machine.
const PATIENCE: Duration = Duration::from_secs(600);

/// Lines of the database: 20 MB.
const SIGNATURES: u64 = 220_000;

/// How long the fleet is watched doing nothing: two rounds of keep-alives.
const IDLE: Duration = Duration::from_secs(30);

#[test]
fn two_hundred_agents_survive_restarts_of_their_master() {
    check(200);
}

#[test]
fn two_thousand_agents_survive_restarts_of_their_master() {
    long!();
    check(2000);
}

/// An update of a 20 MB database reaches all of so many agents by deltas, though the master is
/// killed in the middle and stopped after it; none is lost.
fn check(count: usize) {
    let scratch = Scratch::new();
    let (mirror, disk) = (scratch.directory("mirror"), scratch.directory("disk"));
    database(1).write(&mirror);
    database(1).write(&disk);
    let fleet = Fleet::new();
    let mut master = master(&fleet, &mirror);
    start(&mut master);
    master.wait_generation(1);
    let empty = Usage::of(master.pid());

    let begun = Instant::now();
    let agents = Agents::start(&fleet, &simulated::names(count), &disk);
    println!(
        "{count} agents: certificates made in {:.1?}",
        begun.elapsed()
    );
    let begun = Instant::now();
    all(&agents, "connected", |agent| agent.connected);
    println!("all enrolled after {:.1?}", begun.elapsed());
    all(&agents, "live at 1", |agent| agent.acknowledged == 1);
    println!(
        "all live at 1, which they had, after {:.1?}",
        begun.elapsed()
    );
    assert_eq!(parts(&agents).0, 0, "nothing was sent");
    figures(&master, &fleet, empty, count);

    let begun = Instant::now();
    database(2).write(&mirror);
    until(PATIENCE, "half of them have it", || {
        agents.count(|agent| agent.installed == 2) >= count / 2
    });
    println!(
        "half have generation 2 after {:.1?}; the master is killed",
        begun.elapsed()
    );
    let welcomes: Vec<_> = agents.standings().map(|agent| agent.welcomes).collect();
    let spent = Usage::of(master.pid());
    println!(
        "until then: CPU {:.2?}, peak {} MiB",
        spent.processor,
        spent.memory_peak >> 20
    );
    master.kill();
    let killed = Instant::now();
    start(&mut master);
    println!("ready again after {:.1?}", killed.elapsed());
    back(&agents, &welcomes);
    returned(&agents, "the kill", killed);
    all(&agents, "live at 2", |agent| agent.acknowledged == 2);
    println!(
        "all live at 2 {:.1?} after the kill, {:.1?} after the mirror changed",
        killed.elapsed(),
        begun.elapsed()
    );
    none_is_lost(&master, count);
    let (sent, bytes) = parts(&agents);
    println!(
        "{sent} deltas of {} bytes each",
        bytes / u64::from(sent).max(1)
    );
    figures(&master, &fleet, empty, count);

    let welcomes: Vec<_> = agents.standings().map(|agent| agent.welcomes).collect();
    let stopped = Instant::now();
    master.stop();
    start(&mut master);
    println!("stopped and ready again after {:.1?}", stopped.elapsed());
    back(&agents, &welcomes);
    returned(&agents, "the stop", stopped);
    none_is_lost(&master, count);
    figures(&master, &fleet, empty, count);
    if count >= 1000 {
        idle(&master);
    }
}

/// A database of 20 MB; each day a few of its signatures go and some come.
fn database(day: u64) -> Container {
    let stays = |number: &u64| number % 4000 > day;
    let old = (0..SIGNATURES).filter(stays);
    let new = SIGNATURES..SIGNATURES + 100 * day;
    Container::new("daily", day).member("hsb", signatures(old.chain(new)))
}

fn master(fleet: &Fleet, mirror: &std::path::Path) -> Master {
    let master = fleet.master(mirror);
    let tables = "load_test = \"never\"\n[groups]\ncanary = [\"host-000*\"]";
    master.configure("require = []", &format!("require = []\n{tables}"));
    master
}

/// Starts the master as a service runs: with receive buffers that the kernel caps.
fn start(master: &mut Master) {
    let process = master.process();
    if !geteuid().is_root() {
        master.launch(process);
        return master.wait_ready();
    }
    let mut service = Command::new("setpriv");
    service
        .args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"])
        .arg(process.get_program())
        .args(process.get_args())
        .current_dir(master.directory());
    for (key, value) in process.get_envs() {
        service.env(key, value.expect("the laboratory only sets variables"));
    }
    service.env("CLAMCAST_LOG", "info"); // as it is by default
    master.launch(service);
    master.wait_ready();
}

#[track_caller]
fn all(agents: &Agents, what: &str, so: impl Fn(&Standing) -> bool) {
    until(PATIENCE, &format!("all are {what}"), || {
        match agents.count(|agent| !so(agent)) {
            0 => Ok(()),
            others => Err(format!("{others} are not")),
        }
    });
    assert_eq!(agents.count(|agent| agent.refused > 0), 0);
}

/// Waits until every agent was greeted again.
#[track_caller]
fn back(agents: &Agents, welcomes: &[u32]) {
    until(PATIENCE, "all are back", || {
        let standings = agents.standings().zip(welcomes);
        let away = standings.filter(|(now, before)| !now.connected || now.welcomes <= **before);
        match away.count() {
            0 => Ok(()),
            others => Err(format!("{others} are away")),
        }
    });
}

/// Prints when the agents were greeted again.
fn returned(agents: &Agents, after: &str, since: Instant) {
    let times = agents.standings().filter_map(|agent| agent.welcomed);
    let mut times: Vec<_> = times.map(|time| time.duration_since(since)).collect();
    times.sort();
    let part = |percent: usize| times[(times.len() - 1) * percent / 100];
    println!(
        "back after {after}: the first {:.1?}, half {:.1?}, 90 % {:.1?}, 99 % {:.1?}, all {:.1?}",
        part(0),
        part(50),
        part(90),
        part(99),
        part(100)
    );
}

fn parts(agents: &Agents) -> (u32, u64) {
    let parts = agents.standings().map(|agent| agent.parts).sum();
    (
        parts,
        agents.standings().map(|agent| agent.part_bytes).sum(),
    )
}

/// The master knows of all of them, and its log says of each that it is live.
#[track_caller]
fn none_is_lost(master: &Master, count: usize) {
    until(PATIENCE, "the master counts all of them", || {
        let status = master.json(&["status"]).unwrap_or_default();
        let agents = &status["agents"];
        let all = ["total", "connected", "conformant"].map(|key| agents[key] == count);
        if all == [true; 3] && status["rollout"]["state"] == "complete" {
            Ok(())
        } else {
            Err(status)
        }
    });
    let receipts = master.audit("receipt");
    let live = receipts.iter().filter(|receipt| receipt["generation"] == 2);
    let hosts = live.map(|receipt: &Value| receipt["subject"].as_str().expect("a name"));
    let hosts: std::collections::BTreeSet<_> = hosts.collect();
    assert_eq!(hosts.len(), count);
    let config = master.config().to_str().expect("its path is text");
    let verified = master.command(&["audit", "verify", "--config", config]);
    assert!(verified.status.success(), "{verified:?}");
}

fn figures(master: &Master, fleet: &Fleet, empty: Usage, count: usize) {
    let now = Usage::of(master.pid());
    let each = now.memory.saturating_sub(empty.memory) / count as u64;
    println!(
        "  master: CPU {:.2?}, {} MiB (peak {}), {} KiB for each agent (bar: 64), {} datagrams dropped",
        now.processor,
        now.memory >> 20,
        now.memory_peak >> 20,
        each >> 10,
        datagrams_dropped(fleet.port()),
    );
    let agents = Usage::of(std::process::id());
    println!(
        "  agents: CPU {:.2?} altogether, {} MiB",
        agents.processor,
        agents.memory >> 20
    );
}

/// What agents cost that only keep their connections alive.
fn idle(master: &Master) {
    let (begun, before) = (Instant::now(), Usage::of(master.pid()));
    until(PATIENCE, "the time is over", || begun.elapsed() > IDLE);
    let spent = Usage::of(master.pid()).processor - before.processor;
    let share = 100.0 * spent.as_secs_f64() / begun.elapsed().as_secs_f64();
    println!("  idle: {share:.2} % of a core (bar: 2)");
}
