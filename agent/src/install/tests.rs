//! What an offer comes to, on a real directory with the fake clamd of `lab.rs`.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

use clamcast_proto::Digest;
use clamcast_proto::delta;
use clamcast_proto::receipt::{FOREIGN_MAX, InstallNumber, Outcome};
use clamcast_proto::wire::{Have, PartEncoding, PartKind};
use nix::errno::Errno;

use super::disk::At;
use super::lab::{
    FakeInstaller, FakeScan, Fault, Files, Host, Mood, block_on, foreign, full, loaded, look,
    manifest, plan, refused_before, set, wrong,
};
use super::*;
use crate::clamd::proof::{CANARY, GATE, gate_number};

mod adopted;
mod directory;
mod drift;
mod evidence;
mod others;
mod outcomes;
mod receiving;

/// Offers `new` to a host that has `old` live and `foreign` lying around.
fn check(old: &str, foreign: &str, new: &str, outcome: Outcome, there: &str) -> (Host, Completed) {
    let host = Host::with(1, old);
    host.put(foreign);
    let completed = host.take(&host.start(), &manifest(2, new), new).unwrap();
    assert_eq!(completed.outcome, outcome, "{:?}", completed.error);
    assert_eq!(host.there(), set(there));
    (host, completed)
}

/// Numbers under which the fake clamd was seen since the host was made.
fn proven(host: &Host) -> Vec<u64> {
    let proven = host.clamd.proven.lock().unwrap();
    proven.iter().map(|number| number.0).collect()
}

fn mood(host: &Host, mood: Mood) {
    *host.clamd.mood.lock().unwrap() = mood;
}

#[test]
fn the_nonce_is_made_once() {
    let host = Host::new();
    let first = nonce(&host.state(), [1; 16]).unwrap();
    assert_eq!(nonce(&host.state(), [2; 16]).unwrap(), first);
}

#[test]
fn a_damaged_nonce_is_replaced() {
    let host = Host::new();
    for damaged in [&b""[..], b"0303", b"\xff\xfe\x00"] {
        fs::write(host.state().join(NONCE), damaged).unwrap();
        let new = nonce(&host.state(), [1; 16]).unwrap();
        assert_eq!(new, Nonce([1; 16]));
        assert_eq!(nonce(&host.state(), [2; 16]).unwrap(), new);
    }
}
