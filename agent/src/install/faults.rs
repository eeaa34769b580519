//! Every file-system call of an install, failed and stopped at, one after the other.
//!
//! The real code works in a real directory through a disk that fails or stops the world at call n,
//! for all n. Only clamd is a fake: it judges by what is in the directory (`lab.rs`). After each
//! fault the invariants are checked by reading the directory as clamd would; then the host starts
//! again on a good disk, and they are checked again.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

use clamcast_proto::DatabaseName;
use clamcast_proto::receipt::{InstallNumber, Outcome};
use nix::errno::Errno;

use super::lab::{
    FakeInstaller, FakeScan, Fault, Files, Host, Mood, Taken, loaded, manifest, plan, set,
};
use crate::clamd::proof::{CANARY, GATE, canary_number, gate_number};

/// A host before an offer, and the offer.
struct Scenario {
    /// What the host had of its own before generation 1 was installed.
    own: &'static str,
    /// What is installed as generation 1, if anything.
    old: &'static str,
    /// What others have in the directory. Under names of the new set it is the old set, too.
    foreign: &'static str,
    /// The same, but the agent cannot read them.
    denied: &'static str,
    /// The offer, as generation 2.
    new: &'static str,
    mood: Mood,
    scan: FakeScan,
}

const UPDATE: Scenario = Scenario {
    own: "",
    old: "daily.cld@1=daily-one main.cvd@62=main x.ndb=x",
    foreign: "local.ndb=local",
    denied: "",
    new: "daily.cld@2=daily-two main.cvd@62=main y.ndb=y",
    mood: Mood::Up,
    scan: FakeScan::Names,
};

const OTHER_FORM: Scenario = Scenario {
    own: "",
    old: "daily.cvd@1=daily-one daily-1.cvd.sign=signed-one",
    foreign: "",
    denied: "",
    new: "daily.cld@2=daily-two daily-2.cvd.sign=signed-two",
    mood: Mood::Up,
    scan: FakeScan::Names,
};

/// Without a reload.
const OTHER_SIGNATURE_FILES: Scenario = Scenario {
    own: "",
    old: "daily.cvd@1=daily-one daily-1.cvd.sign=signed main.cvd@62=main main-62.cvd.sign=signed",
    foreign: "local.ndb=local",
    denied: "",
    new: "daily.cvd@1=daily-one daily-1.cvd.sign=again main.cvd@62=main x-1.cvd.sign=signed",
    mood: Mood::Up,
    scan: FakeScan::Names,
};

const LOWER_FORM: Scenario = Scenario {
    own: "",
    old: "daily.cld@9=daily-nine",
    foreign: "",
    denied: "",
    new: "daily.cvd@8=daily-eight",
    mood: Mood::Up,
    scan: FakeScan::Names,
};

const FIRST: Scenario = Scenario {
    own: "",
    old: "",
    foreign: "",
    denied: "",
    new: "daily.cld@2=daily-two main.cvd@62=main",
    mood: Mood::Up,
    scan: FakeScan::Names,
};

const ADOPTION: Scenario = Scenario {
    own: "",
    old: "",
    foreign: "daily.cvd=freshclams main.cvd=main local.ndb=local",
    denied: "",
    new: "daily.cld@2=daily-two main.cvd@62=main",
    mood: Mood::Up,
    scan: FakeScan::Names,
};

const REFUSED: Scenario = Scenario {
    own: "",
    old: "daily.cvd@1=daily-one x.ndb=x",
    foreign: "local.ndb=local",
    denied: "",
    new: "daily.cld@2=BAD y.ndb=y",
    mood: Mood::Up,
    scan: FakeScan::Names,
};

const REFUSED_AFTER_A_CONTROL: Scenario = Scenario {
    scan: FakeScan::Missing,
    ..REFUSED
};

const REFUSED_BESIDE_OTHERS: Scenario = Scenario {
    own: "",
    old: "",
    foreign: "local.ndb=local",
    denied: "",
    new: "daily.cld@2=BAD y.ndb=y",
    mood: Mood::Up,
    scan: FakeScan::Names,
};

const REFUSED_OVER_UNREADABLE: Scenario = Scenario {
    own: "",
    old: "",
    foreign: "",
    denied: "daily.cvd=freshclams x.ndb=x",
    new: "daily.cld@2=BAD x.ndb=y",
    mood: Mood::Up,
    scan: FakeScan::Names,
};

const WITHDRAWAL: Scenario = Scenario {
    own: "local.ign2=own list.ndb=own daily.cvd=freshclams same.ndb=same",
    old: "daily.cld@1=daily-one local.ign2=fleets same.ndb=same x.ndb=x",
    foreign: "",
    denied: "",
    new: "main.cvd@62=main x.ndb=x",
    mood: Mood::Up,
    scan: FakeScan::Names,
};

const REFUSED_WITHDRAWAL: Scenario = Scenario {
    new: "main.cvd@62=BAD x.ndb=x",
    ..WITHDRAWAL
};

const REFUSED_ADOPTION: Scenario = Scenario {
    own: "local.ign2=own",
    old: "daily.cvd@1=daily-one",
    foreign: "",
    denied: "",
    new: "daily.cld@2=BAD local.ign2=fleets",
    mood: Mood::Up,
    scan: FakeScan::Names,
};

const CLAMD_AWAY: Scenario = Scenario {
    own: "",
    old: "daily.cvd@1=daily-one",
    foreign: "",
    denied: "",
    new: "daily.cld@2=daily-two",
    mood: Mood::Away,
    scan: FakeScan::Names,
};

/// What a disk answers that is full, broken, read-only, somebody else's, or counted; and words of
/// what a receipt then says is to be done.
const ERRNOS: [(Errno, &str); 6] = [
    (Errno::ENOSPC, "make room"),
    (Errno::EIO, "kernel's log"),
    (Errno::EROFS, "writable"),
    (Errno::EACCES, "must own"),
    (Errno::EPERM, "must own"),
    (Errno::EDQUOT, "quota"),
];

/// The faults at call n. Every error is met once at every call, and after it in turn; a disk that
/// goes on failing meets all of them over six calls.
fn faults(n: u64) -> Vec<Fault> {
    let count = ERRNOS.len() as u64;
    let errno = |shift: u64| ERRNOS[usize::try_from((n + shift) % count).expect("below 6")].0;
    let mut faults = vec![
        Fault::Stop(n),
        Fault::PowerCut(n),
        Fault::After(n, errno(0)),
        Fault::From(n, errno(1)),
        Fault::From(n, errno(4)),
    ];
    faults.extend(ERRNOS.map(|(errno, _)| Fault::Once(n, errno)));
    faults
}

impl Scenario {
    fn host(&self) -> Host {
        let mut host = Host::with_own(self.own, 1, self.old);
        host.clamd.scan = self.scan;
        host.clamd.is_old = true;
        host.put(self.foreign);
        host.put_denied(self.denied);
        *host.clamd.mood.lock().unwrap() = self.mood;
        host
    }

    /// The directory before the offer.
    fn before(&self) -> Files {
        let mut before = self.own_beside(self.old);
        before.extend(set(&format!(
            "{} {} {}",
            self.old, self.foreign, self.denied
        )));
        before
    }

    /// The host's own files whose names a set does not own.
    fn own_beside(&self, line: &str) -> Files {
        let mut own = set(self.own);
        let bases: BTreeSet<_> = set(line).keys().map(|name| base(name).to_owned()).collect();
        own.retain(|name, _| !bases.contains(base(name)));
        own
    }

    /// The directory after it: foreign files stay where the set has no successor for them.
    fn after(&self) -> Files {
        let new = set(self.new);
        let bases: BTreeSet<_> = new.keys().map(|name| base(name)).collect();
        let mut after = set(&format!("{} {}", self.foreign, self.denied));
        after.retain(|name, _| !bases.contains(base(name)));
        after.extend(self.own_beside(self.new));
        after.extend(new);
        after
    }

    /// The directory while clamd has not been seen with the new set: an old form may be beside it.
    fn waiting(&self) -> Files {
        let mut waiting = self.after();
        for (name, content) in set(self.old) {
            let replaced = base(&name) == "daily" && !waiting.contains_key(&name);
            if replaced && self.mood == Mood::Away {
                waiting.insert(name, content);
            }
        }
        waiting
    }
}

fn base(name: &str) -> &str {
    name.split_once('.').unwrap().0
}

// The invariants.

/// Whoever opens a name that clamd loads finds all of a file that belongs there.
fn a_database_name_never_holds_a_partial_file(host: &Host, scenario: &Scenario, at: &str) {
    let old = [scenario.before(), set(scenario.new), set(scenario.own)];
    for (name, content) in loaded(&host.database()) {
        let whole = match name.as_str() {
            CANARY => canary_number(&content).is_some(),
            GATE => gate_number(&content).is_some(),
            _ => old.iter().any(|files| files.get(&name) == Some(&content)),
        };
        assert!(whole, "{at}: {name} holds `{content}`");
    }
}

/// Whoever opens a name of both sets finds a file, at any moment.
fn a_name_of_both_sets_is_never_missing(host: &Host, scenario: &Scenario, at: &str) {
    let (there, new) = (host.there(), scenario.after());
    for name in scenario
        .before()
        .keys()
        .filter(|name| new.contains_key(*name))
    {
        assert!(there.contains_key(name), "{at}: {name} is missing");
    }
}

/// Databases first, then the canary, then the gate: who sees a new canary finds a whole set.
fn the_canary_comes_after_every_database_and_the_gate_last(
    host: &Host,
    old: InstallNumber,
    scenario: &Scenario,
    at: &str,
) {
    let there = loaded(&host.database());
    let text = |name| there.get(name).map_or("", String::as_str);
    let canary = canary_number(text(CANARY)).unwrap_or_default();
    let gate = gate_number(text(GATE)).unwrap_or_default();
    assert!(gate <= canary, "{at}: gate {gate} before canary {canary}");
    let has = |files: Files| {
        files
            .iter()
            .all(|(name, content)| there.get(name) == Some(content))
    };
    let whole = has(set(scenario.new)) || has(scenario.before());
    assert!(
        canary == old || whole,
        "{at}: canary {canary} before {there:?}"
    );
}

/// After a start, clamd would load exactly the old set or exactly the new one, and what is foreign.
fn the_directory_is_the_old_set_or_the_new_one(host: &Host, scenario: &Scenario, at: &str) {
    let there = host.there();
    let sets = [scenario.before(), scenario.after(), scenario.waiting()];
    assert!(sets.contains(&there), "{at}: {there:?}");
}

/// Where nothing went wrong any more, the offer ends as it does on a good disk.
fn the_next_offer_ends_as_it_should(host: &Host, scenario: &Scenario, at: &str) {
    let installer = host.start();
    let taken = host.take(&installer, &manifest(2, scenario.new), scenario.new);
    let completed = taken.unwrap_or_else(|error| panic!("{at}: {error}"));
    let refused = scenario.new.contains("BAD");
    let (outcome, sets) = match scenario.mood {
        _ if refused => (Outcome::Refused, vec![scenario.before()]),
        Mood::Up | Mood::Rejecting => (Outcome::Live, vec![scenario.after()]),
        // An old form that could not be read was taken for damaged, and went at once.
        Mood::Away => (
            Outcome::Installed,
            vec![scenario.waiting(), scenario.after()],
        ),
    };
    assert_eq!(completed.outcome, outcome, "{at}: {:?}", completed.error);
    assert!(sets.contains(&host.there()), "{at}: {:?}", host.there());
    if scenario.mood == Mood::Up {
        let installed = installer
            .installed()
            .map(|i| (i.set.manifest.generation.number(), i.outcome));
        let generation = match (refused, scenario.old) {
            (false, _) => Some(2),
            (true, "") => None,
            (true, _) => Some(1),
        };
        let expected = generation.map(|generation| (generation, Outcome::Live));
        assert_eq!(installed, expected, "{at}");
        let now = if refused { scenario.old } else { scenario.new };
        let mut kept = set(scenario.own);
        kept.retain(|name, _| !scenario.own_beside(now).contains_key(name));
        if !scenario.own.is_empty() {
            let adopted = completed.adopted.iter().map(DatabaseName::as_str);
            assert!(adopted.eq(kept.keys()), "{at}: {:?}", completed.adopted);
            assert_eq!(loaded(&host.hidden("adopted")), kept, "{at}");
        }
        nothing_is_left_over(host, &installer, at);
    }
}

/// A receipt tells the truth about the directory. A disk that fails for good in the middle of the
/// renames keeps its half of them until it works again, and the receipt says that, too.
fn a_receipt_says_what_is_there(host: &Host, scenario: &Scenario, taken: &Taken, at: &str) {
    let there = host.there();
    let Ok(completed) = taken else {
        assert_eq!(there, scenario.before(), "{at}: a fault before the install");
        return;
    };
    let error = completed.error.as_deref().unwrap_or_default();
    match completed.outcome {
        Outcome::Live => {
            // Old forms go after the proof: some are left where the disk failed by then.
            let (mut tidy, after) = (there.clone(), scenario.after());
            tidy.retain(|name, _| after.contains_key(name));
            let untidy = tidy.len() < there.len();
            assert_eq!(tidy, after, "{at}: {there:?}");
            assert!(
                !untidy || error.contains("cannot "),
                "{at}: {there:?}, {error}"
            );
        }
        Outcome::Installed => assert!(
            [scenario.after(), scenario.waiting()].contains(&there),
            "{at}: {there:?}"
        ),
        Outcome::Refused | Outcome::HostFault => {
            let back = there == scenario.before();
            let said = error.contains("the previous set is not back yet");
            // A set stays that could not be read again to be blamed.
            let new = scenario.after();
            let whole = new.iter().all(|(name, text)| there.get(name) == Some(text));
            let stays = error.contains("cannot be read again") && whole;
            assert!(back || said || stays, "{at}: {there:?}, {error}");
        }
    }
}

/// A fault of the host names the call, the path and the system's reason, with what to do about it.
fn a_fault_is_named_with_its_remedy(host: &Host, fault: Fault, taken: &Taken, at: &str) {
    let (Fault::Once(_, errno) | Fault::After(_, errno) | Fault::From(_, errno)) = fault else {
        return;
    };
    let error = match taken {
        Err(error) => error,
        Ok(completed) if completed.outcome == Outcome::HostFault => {
            completed.error.as_ref().expect("a fault has a reason")
        }
        Ok(_) => return,
    };
    // What cannot be read is taken for damaged: the log says why, the receipt what follows of it.
    if error.contains("is not staged with digest") {
        return;
    }
    let known = ERRNOS.iter().find(|(known, _)| *known == errno);
    let (_, remedy) = known.expect("only these are tried");
    let places = [host.database(), host.state()].map(|path| path.display().to_string());
    let named = places.iter().any(|place| error.contains(place));
    let reason = format!("os error {}", errno as i32);
    let whole = error.contains("cannot ") && named && error.contains(&reason);
    assert!(whole && error.contains(remedy), "{at}: {error}");
}

/// What an ended install leaves lying about goes with the next offer at the latest.
fn nothing_is_left_over(host: &Host, installer: &FakeInstaller, at: &str) {
    plan(installer, &manifest(3, "z.ndb=z"), false).unwrap();
    let names = |directory: PathBuf| -> Vec<_> {
        let entries = fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect()
    };
    for directory in ["stage", "trial"] {
        let left = names(host.hidden(directory));
        assert!(left.is_empty(), "{at}: {directory} holds {left:?}");
    }
    for name in ["place", "canary", "gate"] {
        assert!(!host.hidden(name).exists(), "{at}: {name} is left");
    }
    let records = names(host.state()).into_iter();
    let records: Vec<_> = records.filter(|name| name != "kept").collect();
    let known = |name: &OsString| ["installed.json", "refused.json"].iter().any(|k| name == k);
    assert!(
        records.iter().all(known),
        "{at}: the state holds {records:?}"
    );
}

/// Runs one offer with one fault, starts the host again, and checks.
fn survive(scenario: &Scenario, fault: Fault, at: &str) {
    let host = scenario.host();
    let old = host.canary();
    let shim = host.shim(fault);
    if let Ok((installer, _)) = host.start_on(shim.clone()) {
        let taken = host.take(&installer, &manifest(2, scenario.new), scenario.new);
        a_database_name_never_holds_a_partial_file(&host, scenario, at);
        if !matches!(fault, Fault::Stop(_) | Fault::PowerCut(_)) {
            a_receipt_says_what_is_there(&host, scenario, &taken, at);
            a_fault_is_named_with_its_remedy(&host, fault, &taken, at);
        }
    }
    a_name_of_both_sets_is_never_missing(&host, scenario, at);
    the_canary_comes_after_every_database_and_the_gate_last(&host, old, scenario, at);
    if matches!(fault, Fault::PowerCut(_)) {
        shim.cut_power();
        a_database_name_never_holds_a_partial_file(&host, scenario, at);
    }
    drop(host.start());
    the_directory_is_the_old_set_or_the_new_one(&host, scenario, at);
    the_next_offer_ends_as_it_should(&host, scenario, at);
}

fn survive_everything(name: &str, scenario: &Scenario) {
    let host = scenario.host();
    let shim = host.shim(Fault::None);
    let (installer, _) = host.start_on(shim.clone()).unwrap();
    host.take(&installer, &manifest(2, scenario.new), scenario.new)
        .unwrap();
    let calls = shim.calls();
    let mut tried = 0;
    for n in 0..calls {
        for fault in faults(n) {
            survive(scenario, fault, &format!("{name}, {fault:?} of {calls}"));
            tried += 1;
        }
    }
    println!("{name}: {calls} calls, {tried} faults tried, {tried} survived");
}

#[test]
fn an_update_survives_every_fault() {
    survive_everything("update", &UPDATE);
}

#[test]
fn a_change_of_form_survives_every_fault() {
    survive_everything("other form", &OTHER_FORM);
}

#[test]
fn a_change_of_signature_files_alone_survives_every_fault() {
    survive_everything("other signature files", &OTHER_SIGNATURE_FILES);
}

#[test]
fn a_change_to_a_lower_version_in_the_other_form_survives_every_fault() {
    survive_everything("lower form", &LOWER_FORM);
}

#[test]
fn a_first_install_survives_every_fault() {
    survive_everything("first install", &FIRST);
}

#[test]
fn an_adoption_survives_every_fault() {
    survive_everything("adoption", &ADOPTION);
}

#[test]
fn a_refusal_and_the_way_back_survive_every_fault() {
    survive_everything("refusal", &REFUSED);
}

#[test]
fn a_refusal_after_a_control_survives_every_fault() {
    survive_everything("refusal after a control", &REFUSED_AFTER_A_CONTROL);
}

#[test]
fn a_refusal_beside_files_of_others_survives_every_fault() {
    survive_everything("refusal beside others", &REFUSED_BESIDE_OTHERS);
}

#[test]
fn a_refusal_over_files_that_cannot_be_read_survives_every_fault() {
    survive_everything("refusal over unreadable", &REFUSED_OVER_UNREADABLE);
}

#[test]
fn a_withdrawal_that_restores_the_hosts_own_files_survives_every_fault() {
    survive_everything("withdrawal", &WITHDRAWAL);
}

#[test]
fn a_refusal_after_the_hosts_own_files_were_restored_survives_every_fault() {
    survive_everything("refused withdrawal", &REFUSED_WITHDRAWAL);
}

#[test]
fn a_refusal_gives_the_host_its_own_file_back_whatever_fails() {
    survive_everything("refused adoption", &REFUSED_ADOPTION);
}

#[test]
fn an_install_without_clamd_survives_every_fault() {
    survive_everything("clamd away", &CLAMD_AWAY);
}

#[test]
fn a_crash_while_ending_a_crash_is_survived() {
    let host = UPDATE.host();
    let shim = host.shim(Fault::None);
    let (installer, _) = host.start_on(shim.clone()).unwrap();
    host.take(&installer, &manifest(2, UPDATE.new), UPDATE.new)
        .unwrap();
    let calls = shim.calls();
    for first in (0..calls).step_by(7) {
        for second in (0..calls).step_by(7) {
            let at = format!("no power at {first}, then at {second}");
            let host = UPDATE.host();
            for stop in [first, second] {
                let shim = host.shim(Fault::PowerCut(stop));
                if let Ok((installer, _)) = host.start_on(shim.clone()) {
                    let _ = host.take(&installer, &manifest(2, UPDATE.new), UPDATE.new);
                }
                shim.cut_power();
                a_database_name_never_holds_a_partial_file(&host, &UPDATE, &at);
            }
            drop(host.start());
            the_directory_is_the_old_set_or_the_new_one(&host, &UPDATE, &at);
            the_next_offer_ends_as_it_should(&host, &UPDATE, &at);
        }
    }
}
