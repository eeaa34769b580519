//! An update that goes wrong at one of its calls: the agent is killed there, the call fails, the disk
//! is full from there on.

use std::env;
use std::time::{SystemTime, UNIX_EPOCH};

use clamcast_proto::Digest;
use clamcast_proto::receipt::InstallNumber;
use clamcast_tests::lab::{Call, Fleet, PATIENCE, SmallDisk, Strace, until};
use clamcast_tests::{long, require};

use crate::host::{
    Host, clamd_loads_it_and_a_new_canary_means_the_new_set,
    every_database_name_belongs_to_the_old_set_or_the_new_one, no_half_record_is_left, set,
    the_last_set_is_there_and_live,
};

/// A place in an update: a call, on what, and which time in its thread.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Step {
    call: String,
    /// With the digests of an update's files replaced by their names; empty for any.
    path: String,
    when: usize,
}

/// The calls on files of one update, once each, in their order.
fn steps(host: &mut Host) -> Vec<Step> {
    let directories = [host.agent.database(), host.state()];
    let strace = Strace::list(host.agent.pid(), &host.fleet.join(""));
    host.publish();
    host.wait_live();
    let calls = strace.calls(&[&directories[0], &directories[1]]);
    let mut steps: Vec<Step> = Vec::new();
    for (at, call) in calls.iter().enumerate() {
        let path = call.paths.last().expect("a call on files names one");
        // Names that are different each time cannot be waited for; the call itself can.
        let changing = path.ends_with(".new") && path.contains("/.") || path.contains("/receipts/");
        let anywhere = ["fchmod", "fsync", "renameat", "unlink"].contains(&&*call.name);
        if changing && !anywhere {
            continue;
        }
        let same = |other: &&Call| {
            let named = changing || other.paths.contains(path);
            other.thread == call.thread && other.name == call.name && named
        };
        let step = Step {
            call: call.name.clone(),
            path: if changing {
                String::new()
            } else {
                named(path, host.version)
            },
            when: calls[..=at].iter().filter(same).count(),
        };
        if !steps.contains(&step) {
            steps.push(step);
        }
    }
    steps
}

/// Digests of the files of update `version`, with the words that stand for them.
fn digests(version: u64) -> Vec<(String, String)> {
    let mut digests = Vec::new();
    for (age, version) in [("new", version), ("old", version - 1)] {
        for (name, bytes) in set(version) {
            let name = if name.ends_with(".ndb") {
                "loose"
            } else {
                &name
            };
            digests.push((Digest::of(&bytes).to_string(), format!("{{{age} {name}}}")));
        }
    }
    let [new, old] = if version.is_multiple_of(2) {
        ["even.ndb", "odd.ndb"]
    } else {
        ["odd.ndb", "even.ndb"]
    };
    digests.push((new.into(), "{new}".into()));
    digests.push((old.into(), "{old}".into()));
    digests
}

fn named(path: &str, version: u64) -> String {
    digests(version)
        .iter()
        .fold(path.to_owned(), |path, (digest, word)| {
            path.replace(digest, word)
        })
}

impl Step {
    /// Lets `what` happen at this place of the next update.
    fn spoil(&self, host: &Host, what: &str) -> Strace {
        let words = digests(host.version + 1);
        let path = words
            .iter()
            .fold(self.path.clone(), |path, (digest, word)| {
                path.replace(word, digest)
            });
        let when = self.when.to_string();
        Strace::spoil(
            host.agent.pid(),
            &host.fleet.join(""),
            &self.call,
            &path,
            what,
            &when,
        )
    }
}

/// strace counts for each thread, and which one gets a piece of work is open: so many updates are
/// given to a call that was not reached.
const TRIES: usize = 4;

/// Which share of the calls is tried; without it, another one each day.
const SHARE: &str = "CLAMCAST_SHARE";

/// Every `among`th of them.
fn share<T>(all: Vec<T>, among: usize) -> Vec<T> {
    let chosen = env::var(SHARE)
        .ok()
        .map(|share| share.parse().expect("a number"));
    let share: usize = chosen.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let days = now.expect("it is after 1970").as_secs() / 86_400;
        usize::try_from(days).expect("days are few")
    });
    println!("every {among}th call, {SHARE}={share}");
    all.into_iter().skip(share % among).step_by(among).collect()
}

/// Kills the agent at one in `among` calls of an update, one update each.
fn kill_at_calls(among: usize) {
    let mut host = Host::new();
    let all = steps(&mut host);
    println!("{} calls in an update", all.len());
    let (mut tried, mut missed) = (0, 0);
    for step in share(all, among) {
        let Some((proven, at)) = (0..TRIES).find_map(|_| kill_at(&mut host, &step)) else {
            println!("not reached: {step:?}");
            missed += 1;
            continue;
        };
        every_database_name_belongs_to_the_old_set_or_the_new_one(&host, &at);
        clamd_loads_it_and_a_new_canary_means_the_new_set(&host, proven, &at);
        host.agent.start();
        host.wait_live();
        the_last_set_is_there_and_live(&host, &at);
        no_half_record_is_left(&host, &at);
        tried += 1;
    }
    assert!(!host.clamd.log().contains("ERROR"), "{}", host.clamd.log());
    println!("agent killed at calls: {tried} tried, {tried} survived, {missed} not reached");
    assert!(tried > missed, "most calls are reached");
}

/// Kills the agent in the next update, if it gets there; the number proven before, and a name for it.
fn kill_at(host: &mut Host, step: &Step) -> Option<(InstallNumber, String)> {
    let proven = host.canary();
    let _strace = step.spoil(host, "signal=SIGKILL");
    host.publish();
    let at = format!("killed at {step:?} of set {}", host.version);
    until(PATIENCE, &at, || host.agent.has_ended() || host.is_live());
    host.agent.has_ended().then_some((proven, at))
}

#[test]
fn an_agent_killed_at_a_call_of_an_update_has_one_set_or_the_other_and_then_the_new_one() {
    require!(Clamd, Strace);
    kill_at_calls(7);
}

#[test]
fn an_agent_killed_at_any_call_of_an_update_has_one_set_or_the_other_and_then_the_new_one() {
    long!();
    require!(Clamd, Strace);
    kill_at_calls(1);
}

/// What a disk answers at a call, and words of the remedy that the receipt then names.
const ERRORS: [(&str, &str); 4] = [
    ("ENOSPC", "make room"),
    ("EIO", "kernel's log"),
    ("EROFS", "writable"),
    ("EACCES", "must own"),
];

/// Lets one in `among` calls of an update fail once, one update each.
fn fail_calls(among: usize) {
    let mut host = Host::new();
    let all = steps(&mut host);
    println!("{} calls in an update", all.len());
    let all = all
        .iter()
        .flat_map(|step| ERRORS.map(|error| (step.clone(), error)))
        .collect();
    let (mut tried, mut missed, mut faults) = (0, 0, 0);
    for (step, (error, remedy)) in share(all, among) {
        let at = format!("{error} at {step:?}");
        if !(0..TRIES).any(|_| fail_at(&mut host, &step, error)) {
            println!("not reached: {step:?}");
            missed += 1;
            continue;
        }
        tried += 1;
        if host.agent.has_ended() {
            println!(
                "ended: {at}: {}",
                host.agent.log().lines().last().unwrap_or_default()
            );
            host.agent.start();
            host.wait_live();
        }
        let row = host.row();
        if row["outcome"] == "host_fault" {
            faults += 1;
            let said = row["error"].as_str().unwrap_or_default();
            // What cannot be read is taken for damaged: then the log has the reason.
            let named = said.contains("cannot ") && said.contains(remedy);
            assert!(
                named || said.contains("is not staged with digest"),
                "{at}: {row}"
            );
            assert!(
                host.there() == set(host.version - 1),
                "{at}: the old set stays: {row}"
            );
            host.publish(); // and the next offer goes through
            host.wait_live();
        }
        the_last_set_is_there_and_live(&host, &at);
    }
    println!(
        "calls failed: {tried} tried, {tried} survived ({faults} with a host_fault), {missed} not reached"
    );
    assert!(tried > missed, "most calls are reached");
}

/// Lets a call of the next update fail; whether it got there.
fn fail_at(host: &mut Host, step: &Step, error: &str) -> bool {
    let strace = step.spoil(host, &format!("error={error}"));
    host.publish();
    until(PATIENCE, &format!("{error} at {step:?} to matter"), || {
        host.agent.has_ended() || host.is_live() || host.row()["outcome"] == "host_fault"
    });
    strace.has_struck()
}

#[test]
fn a_call_of_an_update_that_fails_leaves_the_old_set_or_the_new_one_and_a_clear_receipt() {
    require!(Clamd, Strace);
    fail_calls(31);
}

#[test]
fn any_call_of_an_update_that_fails_leaves_the_old_set_or_the_new_one_and_a_clear_receipt() {
    long!();
    require!(Clamd, Strace);
    fail_calls(1);
}

/// The disk that the agent has everything on is full from one in `among` calls of an update on.
fn fill_at_calls(among: usize) {
    let fleet = Fleet::new();
    let disk = SmallDisk::mount(&fleet.join("agents/web1"));
    let mut host = Host::bare(fleet).live();
    let all = steps(&mut host);
    println!("{} calls in an update", all.len());
    let (mut tried, mut missed, mut faults) = (0, 0, 0);
    for step in share(all, among) {
        let at = format!("full at {step:?}");
        let strace = step.spoil(&host, "signal=SIGSTOP");
        host.publish();
        until(PATIENCE, &at, || strace.has_stopped() || host.is_live());
        if !strace.has_stopped() {
            println!("not reached: {step:?}");
            missed += 1;
            continue;
        }
        disk.fill();
        host.agent.resume();
        drop(strace);
        host.agent.resume(); // another thread may have got there in between, and stopped it again
        tried += 1;
        until(PATIENCE, &at, || {
            host.agent.has_ended() || host.is_live() || host.row()["outcome"] == "host_fault"
        });
        let row = host.row();
        if row["outcome"] == "host_fault" {
            faults += 1;
            let said = row["error"].as_str().unwrap_or_default();
            assert!(said.contains("make room"), "{at}: {row}");
            assert!(
                host.there() == set(host.version - 1),
                "{at}: the old set stays: {row}"
            );
        }
        disk.free();
        if host.row()["outcome"] == "host_fault" {
            host.publish();
        }
        host.wait_live();
        the_last_set_is_there_and_live(&host, &at);
    }
    println!(
        "disk full at calls: {tried} tried, {tried} survived ({faults} with a host_fault), {missed} not reached"
    );
    assert!(tried > missed, "most calls are reached");
}

#[test]
fn a_disk_that_is_full_from_a_call_on_keeps_the_old_set_and_with_room_again_takes_the_next() {
    require!(Clamd, Strace, Root);
    fill_at_calls(9);
}

#[test]
fn a_disk_that_is_full_from_any_call_on_keeps_the_old_set_and_with_room_again_takes_the_next() {
    long!();
    require!(Clamd, Strace, Root);
    fill_at_calls(1);
}
