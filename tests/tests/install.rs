//! Installs on a real host: the real agent, a real master and a real clamd, and what goes wrong in
//! the middle.

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{SystemTime, UNIX_EPOCH};

use clamcast_agent::clamd::proof::{self, CANARY, GATE, Nonce, canary_number, gate_number};
use clamcast_proto::Digest;
use clamcast_tests::lab::{
    Agent, Call, Clamd, Container, Fleet, Master, Mirror, PATIENCE, Part, Strace, hash_signature,
    until,
};
use clamcast_tests::{long, require};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Files by name.
type Files = BTreeMap<String, Vec<u8>>;

/// Set `version`: two containers, and a loose file whose name changes from one set to the next. Each
/// finds a sample of its own version, and the first one that every version finds.
fn set(version: u64) -> Files {
    let container = |name: &str| {
        let found = hash_signature(&sample(name, version), &format!("Lab.{name}-{version}"));
        let always = hash_signature(ALWAYS, "Lab.Always");
        let container = Container::new(name, version).member("hsb", found + &always);
        (format!("{name}.cud"), container.bytes())
    };
    let loose = format!(
        "Lab.loose-{version}:0:*:{}\n",
        hex::encode(sample("loose", version))
    );
    let name = if version.is_multiple_of(2) {
        "even.ndb"
    } else {
        "odd.ndb"
    };
    let mut set = Files::from(["daily", "main"].map(container));
    set.insert(name.to_owned(), loose.into_bytes());
    set
}

/// The master does not load what it publishes, so that a set may be one that clamd refuses; and it
/// does not take a refused one back, so that the numbers of generations are the test's.
const ALONE: &str = "require = []\nload_test = \"never\"\n[rollout]\nrollback_on_halt = false";

/// What every set finds.
const ALWAYS: &[u8] = b"a sample that is found by every set";

fn sample(name: &str, version: u64) -> Vec<u8> {
    format!("a sample that {name} {version} finds").into_bytes()
}

/// A fleet of one host, whose clamd and agent work on one directory.
struct Host {
    fleet: Fleet,
    master: Master,
    agent: Agent,
    clamd: Clamd,
    /// What was published last.
    version: u64,
}

impl Host {
    /// With set 1 live.
    fn new() -> Self {
        Self::on(Fleet::new())
    }

    fn on(fleet: Fleet) -> Self {
        Self::with(fleet, |clamd| clamd)
    }

    /// With another clamd.
    fn with(fleet: Fleet, configured: impl FnOnce(Clamd) -> Clamd) -> Self {
        let database = fleet.join("agents/web1/db");
        fs::create_dir_all(&database).unwrap();
        let mirror = fleet.join("mirror");
        fs::create_dir_all(&mirror).unwrap();
        let clamd = configured(Clamd::new(&database));
        let agent = fleet.agent_with("web1", &format!("config = {:?}", clamd.config()));
        let master = fleet.master(&mirror);
        master.configure("quiet = \"300ms\"", "quiet = \"20ms\"");
        master.configure("require = []", ALONE);
        let mut host = Self {
            fleet,
            master,
            agent,
            clamd,
            version: 0,
        };
        host.publish();
        host.master.start();
        host.agent.start();
        host.master
            .wait_agent("web1", "the first set is there", |row| {
                row["outcome"] == "installed"
            });
        host.clamd.start();
        host.wait_live();
        host
    }

    /// Publishes the next set, as a whole: the mirror looks like one that freshclam is at work on.
    fn publish(&mut self) {
        self.publish_with(None);
    }

    /// The same, with a file more.
    fn publish_with(&mut self, more: Option<(&str, &str)>) {
        self.version += 1;
        let mirror = self.fleet.join("mirror");
        let busy = mirror.join("tmp.0123456789");
        fs::create_dir(&busy).unwrap();
        let mut set = set(self.version);
        set.extend(more.map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec())));
        for (name, bytes) in &set {
            let part = busy.join(name);
            fs::write(&part, bytes).unwrap();
            fs::rename(part, mirror.join(name)).unwrap();
        }
        for entry in fs::read_dir(&mirror).unwrap().flatten() {
            if entry.path() != busy && !set.contains_key(entry.file_name().to_str().unwrap()) {
                fs::remove_file(entry.path()).unwrap();
            }
        }
        fs::remove_dir(busy).unwrap();
        // Also past one that this host could not take: it is all of its wave.
        until(PATIENCE, "it is published", || {
            let published = self.master.command(&["publish", "--supersede"]);
            // 3: the master is still to be started.
            matches!(published.status.code(), Some(0 | 3))
        });
    }

    fn row(&self) -> Value {
        self.master.agent("web1").unwrap_or_default()
    }

    fn is_live(&self) -> bool {
        let row = self.row();
        row["generation"] == self.version && row["live"] == true
    }

    /// Waits until the last set is live by the agent's receipt.
    #[track_caller]
    fn wait_live(&self) {
        self.master.wait_live("web1", self.version);
    }

    fn state(&self) -> PathBuf {
        self.agent.directory().join("state")
    }

    /// What clamd would load from the directory, canary and gate aside.
    fn there(&self) -> Files {
        let names = self.agent.names().into_iter();
        names
            .map(|name| {
                (
                    name.clone(),
                    fs::read(self.agent.database().join(name)).unwrap(),
                )
            })
            .collect()
    }

    fn proof_file(&self, name: &str) -> String {
        fs::read_to_string(self.agent.database().join(name)).unwrap()
    }

    /// Number of the canary on disk.
    fn canary(&self) -> u64 {
        canary_number(&self.proof_file(CANARY)).expect("a canary is whole")
    }

    /// Waits until the last set has come to this; the reason that the master shows.
    #[track_caller]
    fn wait_failed(&self, outcome: &str) -> String {
        let about = format!(".{}: ", self.version);
        let row = self.master.wait_agent("web1", outcome, |row| {
            let error = row["error"].as_str().unwrap_or_default();
            row["outcome"] == outcome && error.contains(&about)
        });
        row["error"].as_str().unwrap_or_default().to_owned()
    }

    /// How often clamd began to load.
    fn loads(&self) -> usize {
        self.clamd.log().matches("Reading databases from").count()
    }

    fn finds(&self, name: &str, version: u64) -> bool {
        let said = self.clamd.scan(&sample(name, version)).unwrap();
        said == format!("stream: Lab.{name}-{version}.UNOFFICIAL FOUND")
    }

    fn finds_all_of(&self, version: u64) -> bool {
        ["daily", "main", "loose"]
            .iter()
            .all(|name| self.finds(name, version))
    }

    /// Makes clamd load what is there, as a reload of somebody else's would.
    fn load(&self) {
        let loads = || {
            self.clamd
                .log()
                .matches("Activating the newly loaded database")
                .count()
        };
        let before = loads();
        self.clamd.reload().unwrap();
        until(PATIENCE, "clamd to load what is there", || before < loads());
    }
}

// The invariants.

/// Every name is whole, and a file of the old set or of the new one.
fn every_database_name_belongs_to_the_old_set_or_the_new_one(host: &Host, at: &str) {
    let sets = [set(host.version - 1), set(host.version)];
    for (name, bytes) in host.there() {
        let whole = sets.iter().any(|set| set.get(&name) == Some(&bytes));
        assert!(whole, "{at}: {name} is of no set");
    }
    assert!(gate_number(&host.proof_file(GATE)).is_some(), "{at}");
}

/// clamd loads whatever is there; and if it then answers to a canary that it was not seen with
/// before, it has all of the new set.
fn clamd_loads_it_and_a_new_canary_means_the_new_set(host: &Host, proven: u64, at: &str) {
    host.load();
    let canary = host.canary();
    let nonce = hex::decode(
        fs::read_to_string(host.state().join("nonce"))
            .unwrap()
            .trim(),
    );
    let nonce = Nonce(nonce.unwrap().try_into().unwrap());
    let said = host.clamd.scan(&proof::sample(&nonce, canary)).unwrap();
    if canary > proven && said.ends_with("FOUND") {
        assert!(
            host.finds_all_of(host.version),
            "{at}: {said} and not all of the set"
        );
    }
}

/// The directory holds the set, all of it and nothing else, and clamd scans with it.
#[track_caller]
fn the_last_set_is_there_and_live(host: &Host, at: &str) {
    assert!(
        host.there() == set(host.version),
        "{at}: {:?}",
        host.agent.names()
    );
    assert!(host.finds_all_of(host.version), "{at}");
    for name in ["daily", "main", "loose"] {
        assert!(
            !host.finds(name, host.version - 1),
            "{at}: {name} is still loaded"
        );
    }
}

/// A start takes away what a kill left half written in the state directory.
fn no_half_record_is_left(host: &Host, at: &str) {
    for directory in ["", "receipts", "audit"] {
        let names = fs::read_dir(host.state().join(directory)).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let half: Vec<_> = names.filter(|name| name.starts_with('.')).collect();
        assert!(half.len() <= 1, "{at}: {half:?}"); // one may be in the making
    }
}

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
fn kill_at(host: &mut Host, step: &Step) -> Option<(u64, String)> {
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

/// What somebody who loads the directory as clamd does gets: a list of names, the gate before all
/// else, then file after file; one that is gone by then is left out.
#[derive(PartialEq)]
struct Load {
    gate: u64,
    canary: u64,
    files: Files,
}

impl Load {
    fn of(database: &Path) -> Self {
        let names = fs::read_dir(database)
            .unwrap()
            .map(|entry| entry.unwrap().file_name());
        let names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        let text = |name| fs::read_to_string(database.join(name)).unwrap_or_default();
        let gate = gate_number(&text(GATE)).unwrap_or_default();
        let mut files = Files::new();
        for name in names
            .iter()
            .filter(|name| name.contains(".cud") || name.ends_with(".ndb"))
        {
            files.extend(
                fs::read(database.join(name))
                    .ok()
                    .map(|bytes| (name.clone(), bytes)),
            );
        }
        let canary = canary_number(&text(CANARY)).unwrap_or_default();
        Self {
            gate,
            canary,
            files,
        }
    }

    /// The install that a clamd with this load answers to: the gate hides those after its own.
    fn answers_to(&self) -> Option<u64> {
        let hidden = self.gate + 1..=self.gate + proof::GATE_SPAN;
        (!hidden.contains(&self.canary)).then_some(self.canary)
    }

    /// Whether there are all files of the set, or of the one after it for which they made way.
    fn has(&self, version: u64) -> bool {
        let (this, next) = (set(version), set(version + 1));
        let part = |name: &str| {
            self.files
                .get(name)
                .is_some_and(|bytes| this.get(name) == Some(bytes) || next.get(name) == Some(bytes))
        };
        let loose = ["odd.ndb", "even.ndb"].iter().any(|name| part(name));
        part("daily.cud") && part("main.cud") && (loose || self.has_begun(&next))
    }

    fn has_begun(&self, set: &Files) -> bool {
        set.iter()
            .any(|(name, bytes)| self.files.get(name) == Some(bytes))
    }
}

/// Somebody reads the directory and makes clamd reload, again and again, during `updates` updates.
fn reload_in_a_loop(updates: u64) {
    let mut host = Host::new();
    let stop = Arc::new(AtomicBool::new(false));
    let reader = thread::spawn({
        let (stop, database, socket) = (stop.clone(), host.agent.database(), host.clamd.socket());
        move || {
            let (mut loads, mut looks) = (Vec::new(), 0);
            while !stop.load(Ordering::Relaxed) {
                looks += 1;
                let load = Load::of(&database);
                if loads.last() != Some(&load) {
                    loads.push(load);
                }
                let _ = UnixStream::connect(&socket)
                    .and_then(|mut clamd| clamd.write_all(b"zRELOAD\0"));
            }
            (loads, looks)
        }
    });
    // The number by which each set was proven in the end.
    let mut proven = BTreeMap::from([(host.canary(), 1)]);
    for _ in 0..updates {
        host.publish();
        host.wait_live();
        proven.insert(host.canary(), host.version);
        the_last_set_is_there_and_live(&host, &format!("set {}", host.version));
    }
    stop.store(true, Ordering::Relaxed);
    let (loads, looks) = reader.join().unwrap();
    let whole = |load: &Load| proven.values().any(|version| load.files == set(*version));
    let mixed = loads.iter().filter(|load| !whole(load)).count();
    let mut answered = 0;
    for load in &loads {
        let Some(version) = load.answers_to().and_then(|n| proven.get(&n)) else {
            continue;
        };
        answered += 1;
        let names: Vec<_> = load.files.keys().collect();
        assert!(
            load.has(*version),
            "answers as set {version} and has {names:?}"
        );
    }
    println!(
        "{updates} updates: {looks} looks, {} different loads, {mixed} of them with files of two \
         sets; {answered} answer to the number of a proof, and all of these have the whole set",
        loads.len()
    );
    assert!(looks > updates, "it looked often");
    assert!(answered >= updates, "every set was seen by its number");
}

#[test]
fn reloads_in_a_loop_never_pass_for_a_set_that_they_mixed() {
    require!(Clamd);
    reload_in_a_loop(15);
}

#[test]
fn reloads_in_a_loop_during_200_updates_never_pass_for_a_set_that_they_mixed() {
    long!();
    require!(Clamd);
    reload_in_a_loop(200);
}

/// A client of clamd that scans without a pause: what every set finds, and what none does.
fn scanner(socket: PathBuf, stop: Arc<AtomicBool>) -> JoinHandle<u64> {
    let scan = move |bytes: &[u8]| -> io::Result<String> {
        let mut clamd = UnixStream::connect(&socket)?;
        clamd.set_read_timeout(Some(PATIENCE))?;
        let length = u32::try_from(bytes.len()).expect("a sample is small");
        clamd.write_all(&[b"zINSTREAM\0", &length.to_be_bytes()[..], bytes, &[0; 4]].concat())?;
        let mut answer = String::new();
        clamd.read_to_string(&mut answer)?;
        Ok(answer.trim_end_matches('\0').to_owned())
    };
    thread::spawn(move || {
        let mut scans = 0;
        while !stop.load(Ordering::Relaxed) {
            assert_eq!(scan(ALWAYS).unwrap(), "stream: Lab.Always.UNOFFICIAL FOUND");
            assert_eq!(scan(b"nothing is wrong with this").unwrap(), "stream: OK");
            scans += 2;
        }
        scans
    })
}

/// Two clients scan during `updates` updates.
fn scan_in_a_loop(updates: u64) {
    let mut host = Host::new();
    let stop = Arc::new(AtomicBool::new(false));
    let clients = [0, 1].map(|_| scanner(host.clamd.socket(), stop.clone()));
    for _ in 0..updates {
        host.publish();
        host.wait_live();
    }
    stop.store(true, Ordering::Relaxed);
    let scans: u64 = clients.map(|client| client.join().unwrap()).iter().sum();
    println!("{updates} updates under {scans} scans, none of which failed");
    assert!(scans > updates * 2, "clamd was busy");
}

#[test]
fn updates_of_a_clamd_that_scans_cost_no_scan() {
    require!(Clamd);
    scan_in_a_loop(20);
}

#[test]
fn a_hundred_updates_of_a_clamd_that_scans_cost_no_scan() {
    long!();
    require!(Clamd);
    scan_in_a_loop(100);
}

/// A small disk in memory, unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(directory: PathBuf) -> Self {
        fs::create_dir_all(&directory).unwrap();
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=24m", "tmpfs"])
            .arg(&directory));
        Self(directory)
    }

    /// Leaves no byte free.
    fn fill(&self) {
        let mut filler = File::create(self.0.join("filler")).unwrap();
        for size in [1 << 16, 1] {
            while filler.write_all(&vec![0; size]).is_ok() {}
        }
    }

    fn free(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: the agent may still be there.
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[track_caller]
fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
}

/// The disk that the agent has everything on is full from one in `among` calls of an update on.
fn fill_at_calls(among: usize) {
    let fleet = Fleet::new();
    let disk = SmallDisk::mount(fleet.join("agents/web1"));
    let mut host = Host::on(fleet);
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

    // From the start: a read-only mount.
    host.agent.stop();
    let bind = |options: &str| {
        run(Command::new("mount")
            .args(["-o", options])
            .args([&database, &database]));
    };
    bind("bind");
    let mount = Mount(database.clone());
    bind("remount,bind,ro");
    let process = host.agent.process();
    host.agent.launch(process);
    assert!(!host.agent.wait_ended().success());
    assert!(
        host.agent
            .log()
            .contains("make that file system writable again"),
        "{}",
        host.agent.log()
    );
    drop(mount);
    host.agent.start();
    host.publish();
    host.wait_live();
    the_last_set_is_there_and_live(&host, "writable again");
}

/// A mount, taken away when dropped.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output(); // lazily: somebody may be there
    }
}

#[test]
fn a_clamd_that_is_slow_or_killed_in_a_reload_keeps_the_new_set_and_is_live_when_it_comes_back() {
    require!(Clamd);
    let mut host = Host::new();
    assert!(host.agent.stop().success());
    host.agent
        .configure("[clamd]", "[clamd]\ndeadline = \"3s\"");
    host.agent.start();
    host.wait_live();
    for killed in [false, true] {
        let clamd = Pid::from_raw(host.clamd.pid() as i32);
        kill(clamd, Signal::SIGSTOP).unwrap();
        host.publish();
        let version = host.version;
        host.master.wait_agent("web1", "installed", |row| {
            row["outcome"] == "installed" && row["generation"] == version
        });
        assert!(host.there() == set(version), "silence rolls nothing back");
        if killed {
            host.clamd.kill();
            host.clamd.start();
        } else {
            kill(clamd, Signal::SIGCONT).unwrap();
        }
        host.wait_live();
        the_last_set_is_there_and_live(&host, "back again");
    }
}

#[test]
fn a_database_changes_its_form_both_ways_and_also_back_from_a_refusal() {
    require!(Clamd, Freshclam, TestFiles);
    let mirror = Mirror::new();
    let fleet = Fleet::new();
    let database = fleet.join("agents/web1/db");
    fs::create_dir_all(&database).unwrap();
    let mut clamd = Clamd::new(&database);
    let mut agent = fleet.agent_with("web1", &format!("config = {:?}", clamd.config()));
    let mut master = fleet.master(&mirror.directory());
    master.configure("require = []", ALONE);
    master.start();
    agent.start();
    master.wait_agent("web1", "the first set is there", |row| {
        row["outcome"] == "installed"
    });
    clamd.start();
    master.wait_live("web1", 1);
    assert_eq!(agent.names(), ["test.cvd"]);
    mirror.freshclam_to(2);
    master.wait_live("web1", 2);
    assert_eq!(agent.names(), ["test.cld"]);

    // The mirror is left alone while somebody is at work on it.
    let busy = mirror.directory().join("tmp.0123456789");
    fs::create_dir(&busy).unwrap();
    let third = Part::TestFiles.path().join("test-3.cvd");
    fs::copy(third, mirror.directory().join("test.cvd")).unwrap();
    fs::remove_file(mirror.directory().join("test.cld")).unwrap();
    fs::remove_dir(&busy).unwrap();
    master.wait_live("web1", 3);
    assert_eq!(agent.names(), ["test.cvd"]);

    // The other form again, and a line beside it that clamd cannot read.
    let bad = mirror.directory().join("bad.ndb");
    fs::create_dir(&busy).unwrap();
    fs::write(&bad, "Lab.Bad:0:*:no hexadecimal digits\n").unwrap();
    mirror.freshclam_to(4);
    fs::remove_dir(&busy).unwrap();
    let row = master.wait_agent("web1", "refused", |row| row["outcome"] == "refused");
    assert!(row["error"].as_str().unwrap().contains("alformed"), "{row}");
    assert_eq!(
        (&row["generation"], &row["live"]),
        (&3.into(), &true.into()),
        "{row}"
    );
    assert_eq!(agent.names(), ["test.cvd"]);
    fs::remove_file(bad).unwrap();
    master.wait_live("web1", 5);
    assert_eq!(agent.names(), ["test.cld"]);
}

#[test]
fn what_freshclam_left_is_adopted_under_a_running_clamd_and_others_files_stay() {
    require!(Clamd, Freshclam, TestFiles);
    let mirror = Mirror::new();
    mirror.freshclam_to(2);
    let fleet = Fleet::new();
    let database = fleet.join("agents/web1/db");
    fs::create_dir_all(&database).unwrap();
    let left = Part::TestFiles.path().join("test-1.cvd");
    fs::copy(&left, database.join("test.cvd")).unwrap();
    let local = format!("Lab.Local:0:*:{}\n", hex::encode(ALWAYS));
    fs::write(database.join("local.ndb"), &local).unwrap();
    let mut clamd = Clamd::new(&database);
    clamd.start();
    clamd.wait_ready();
    let mut agent = fleet.agent_with("web1", &format!("config = {:?}", clamd.config()));
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
}

/// What clamd cannot read.
const RUBBISH: &str = "Site.Own:0:*:no hexadecimal digits\n";

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

#[test]
fn where_a_failed_load_is_the_end_of_clamd_it_gets_only_what_clamscan_loads() {
    require!(Clamd, Clamscan);
    let mut host = Host::with(Fleet::new(), |clamd| {
        let clamd = clamd.with("ConcurrentDatabaseReload", "no");
        clamd.with("IdleTimeout", "5") // so long it waits for its own threads before a load
    });
    host.publish();
    host.wait_live();
    the_last_set_is_there_and_live(&host, "a good update");

    let loads = host.loads();
    host.publish_with(Some(("bad.ndb", RUBBISH)));
    let said = host.wait_failed("refused");
    assert!(said.contains("Can't load bad.ndb"), "{said}");
    assert!(host.finds_all_of(2), "clamd scans on");
    assert!(host.there() == set(2));

    let site = host.agent.database().join("site.ndb");
    fs::write(&site, RUBBISH).unwrap();
    host.publish();
    let said = host.wait_failed("host_fault");
    assert!(said.contains("site.ndb is not of this set"), "{said}");
    assert!(host.finds_all_of(2), "clamd scans on");
    assert_eq!(
        host.loads(),
        loads,
        "no RELOAD was sent: {}",
        host.clamd.log()
    );

    // Another user's file, which the kernel lets nobody else link.
    fs::write(
        &site,
        format!("Site.Own:0:*:{}\n", hex::encode("a sample of the site")),
    )
    .unwrap();
    let _ = chown(&site, Some(1), Some(1)); // takes root
    host.publish();
    host.wait_live();
    assert!(host.finds_all_of(host.version));
    let said = host.clamd.scan(b"a sample of the site").unwrap();
    assert!(said.contains("Site.Own"), "{said}");
    assert!(!host.clamd.log().contains("ERROR"), "{}", host.clamd.log());
}

#[test]
fn what_clamd_is_configured_not_to_load_of_a_set_is_named_where_it_is_live() {
    require!(Clamd, TestFiles);
    let mut host = Bare::new();
    host.clamd = host.clamd.with("OfficialDatabaseOnly", "yes");
    let signed = fs::read(Part::TestFiles.path().join("test-1.cvd")).unwrap();
    let own = format!("Lab.Own:0:*:{}\n", hex::encode(ALWAYS));
    host.publish(&[("test.cvd", &signed), ("own.ndb", own.as_bytes())], &[]);
    host.master.start();
    host.agent.start();
    host.master
        .wait_agent("web1", "the first set is there", |row| {
            row["outcome"] == "installed"
        });
    host.clamd.start();
    let row = host.master.wait_live("web1", 1);
    assert_eq!(host.clamd.scan(ALWAYS).unwrap(), "stream: OK");
    let named = "OfficialDatabaseOnly yes: clamd does not load own.ndb";
    let note = row["clamd"]["note"].as_str().unwrap_or_default();
    assert!(note.starts_with(named), "{row}");
    let status = host.agent.command(&["status"]);
    let status = String::from_utf8_lossy(&status.stdout);
    assert!(status.contains(named), "{status}");
}

/// A fleet of one host that publishes what a test puts into the mirror; its clamd does not run yet.
struct Bare {
    fleet: Fleet,
    mirror: PathBuf,
    master: Master,
    agent: Agent,
    clamd: Clamd,
}

impl Bare {
    fn new() -> Self {
        let fleet = Fleet::new();
        let (database, mirror) = (fleet.join("agents/web1/db"), fleet.join("mirror"));
        for directory in [&database, &mirror] {
            fs::create_dir_all(directory).unwrap();
        }
        let clamd = Clamd::new(&database);
        let agent = fleet.agent_with("web1", &format!("config = {:?}", clamd.config()));
        let master = fleet.master(&mirror);
        master.configure("quiet = \"300ms\"", "quiet = \"20ms\"");
        master.configure("require = []", ALONE);
        Self {
            fleet,
            mirror,
            master,
            agent,
            clamd,
        }
    }

    /// Puts files into the mirror, all at once.
    fn publish(&self, put: &[(&str, &[u8])], remove: &[&str]) {
        let busy = self.mirror.join("tmp.0123456789");
        fs::create_dir(&busy).unwrap();
        for (name, bytes) in put {
            let part = busy.join(name);
            fs::write(&part, bytes).unwrap();
            fs::rename(part, self.mirror.join(name)).unwrap();
        }
        for name in remove {
            fs::remove_file(self.mirror.join(name)).unwrap();
        }
        fs::remove_dir(busy).unwrap();
    }
}

#[test]
fn a_refused_first_set_stays_and_its_receipt_says_why() {
    require!(Clamd);
    let mut host = Bare::new();
    let good = Container::new("daily", 1).member("hsb", hash_signature(ALWAYS, "Lab.Always"));
    let good = good.bytes();
    host.publish(
        &[("daily.cud", &good), ("bad.ndb", RUBBISH.as_bytes())],
        &[],
    );
    host.master.start();
    host.agent.start();
    host.master
        .wait_agent("web1", "the first set is there", |row| {
            row["outcome"] == "installed"
        });
    // It does not start with it, nor when it is tried again.
    for _ in 0..2 {
        host.clamd.start();
        assert!(!host.clamd.wait_ended().success());
    }
    let row = host
        .master
        .wait_agent("web1", "refused", |row| row["outcome"] == "refused");
    let said = row["error"].as_str().unwrap_or_default();
    assert!(said.contains("Malformed database"), "{row}");
    assert!(
        said.contains("there is no previous set to go back to"),
        "{row}"
    );
    assert_eq!(host.agent.names(), ["bad.ndb", "daily.cud"], "nothing goes");

    host.publish(&[], &["bad.ndb"]);
    let row = host
        .master
        .wait_agent("web1", "the next set is there", |row| {
            row["outcome"] == "installed"
        });
    assert_eq!(host.agent.names(), ["daily.cud"], "{row}");
    host.clamd.start();
    host.master.wait_live("web1", 2);
}

#[test]
fn a_detached_signature_comes_before_its_database_and_the_old_one_goes_after_the_proof() {
    require!(Clamd, Strace, TestFiles);
    let mut host = Bare::new();
    let file = |name: &str| fs::read(Part::TestFiles.path().join(name)).unwrap();
    let set = |n: u32| {
        (
            file(&format!("test-{n}.cvd")),
            file(&format!("test-{n}.cvd.sign")),
        )
    };
    let (cvd, sign) = set(1);
    host.publish(&[("test.cvd", &cvd), ("test-1.cvd.sign", &sign)], &[]);
    host.master.start();
    host.agent.start();
    host.master
        .wait_agent("web1", "the first set is there", |row| {
            row["outcome"] == "installed"
        });
    host.clamd.start();
    host.master.wait_live("web1", 1);
    let database = host.agent.database();
    assert_eq!(host.agent.names(), ["test-1.cvd.sign", "test.cvd"]);

    let strace = Strace::list(host.agent.pid(), &host.fleet.join(""));
    let (cvd, sign) = set(2);
    let put: [(&str, &[u8]); 2] = [("test.cvd", &cvd), ("test-2.cvd.sign", &sign)];
    host.publish(&put, &["test-1.cvd.sign"]);
    host.master.wait_live("web1", 2);
    assert_eq!(host.agent.names(), ["test-2.cvd.sign", "test.cvd"]);
    let calls = strace.calls(&[&database]);
    let directory = database.display().to_string();
    let place = |call: &str, name: &str| {
        let is = |made: &Call| {
            made.name.starts_with(call)
                && made.paths.ends_with(&[directory.clone(), name.to_owned()])
        };
        let found = calls.iter().rposition(is);
        found.unwrap_or_else(|| panic!("no {call} of {name}: {calls:?}"))
    };
    let order = [
        place("rename", "test-2.cvd.sign"),
        place("rename", "test.cvd"),
        place("rename", GATE),
        place("unlink", "test-1.cvd.sign"),
    ];
    assert!(order.is_sorted(), "{order:?} of {calls:?}");
}

#[test]
fn a_clamd_killed_in_the_middle_of_a_load_is_live_once_it_is_back() {
    require!(Clamd);
    let mut host = Host::new();
    // A file of others that makes every load take a while: spread out, since for hashes that begin
    // alike the loader takes hours.
    let line = |n: u64| {
        let spread = n.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        format!("S:F:{spread:016x}{n:048x}\n")
    };
    let slow: String = (0..800_000).map(line).collect();
    fs::write(host.agent.database().join("local.gdb"), slow).unwrap();
    host.load();
    let whole = |host: &Host| {
        let log = host.clamd.log();
        log.matches("Activating the newly loaded database").count()
    };
    let (loads, before) = (host.loads(), whole(&host));
    host.publish();
    until(PATIENCE, "a load to begin", || loads < host.loads());
    host.clamd.kill();
    assert_eq!(whole(&host), before, "the load was under way");
    let mut there = host.there();
    there.remove("local.gdb");
    assert!(there == set(2), "the new set stays");
    host.clamd.start();
    host.wait_live();
    assert!(host.finds_all_of(host.version));
    assert_eq!(host.row()["outcome"], "live");
}
