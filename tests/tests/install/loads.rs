//! Loads and scans of others during updates: clamd never answers to a set that it does not have whole,
//! and no scan is lost.

use clamcast_proto::receipt::InstallNumber;
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use clamcast_agent::clamd::proof::{self, CANARY, GATE, canary_number, gate_number};
use clamcast_tests::lab::PATIENCE;
use clamcast_tests::{long, require};

use crate::host::{ALWAYS, Files, Host, set, the_last_set_is_there_and_live};

/// What somebody who loads the directory as clamd does gets: a list of names, the gate before all
/// else, then file after file; one that is gone by then is left out.
#[derive(PartialEq)]
struct Load {
    gate: InstallNumber,
    canary: InstallNumber,
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
    fn answers_to(&self) -> Option<InstallNumber> {
        let hidden = self.gate.0 + 1..=self.gate.0 + proof::GATE_SPAN;
        (!hidden.contains(&self.canary.0)).then_some(self.canary)
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
