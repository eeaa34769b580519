//! Walks every way through an install, and checks at every step what must hold.

use std::collections::BTreeSet;

use clamcast_proto::Digest;

use super::tests::{begin_again, journal};
use super::*;
use crate::clamd::LoadTest;
use crate::install::journal::Set;
use crate::install::lab::manifest;

/// So many choices follow one another: enough for an install, its way back and a restart.
const CHOICES: usize = 6;

/// One way through an install, and what has been seen on it.
#[derive(Clone, Debug)]
struct Path {
    machine: Machine,
    trace: Vec<String>,
    /// The number that the journal on disk holds.
    saved: InstallNumber,
    /// How often clamd was seen with it since the last swap.
    proofs: usize,
    passes: usize,
    finished: usize,
    /// Whether there is evidence against the set.
    evidence: bool,
    /// Sets that stood in the directory.
    swapped: BTreeSet<Digest>,
}

#[test]
fn every_way_through_an_install_keeps_the_rules() {
    let mut seen = 0;
    for before in [true, false] {
        let path = Path {
            machine: Machine::default(),
            trace: Vec::new(),
            saved: InstallNumber::NONE,
            proofs: 0,
            passes: 0,
            finished: 0,
            evidence: false,
            swapped: [Set::from(&manifest(1, "daily.cvd=one")).sha256()].into(),
        };
        walk(path, Event::Begin(journal(before)), CHOICES, &mut seen);
    }
    println!("{seen} events");
}

#[test]
fn every_way_through_an_install_of_other_signature_files_keeps_the_rules() {
    let journal = journal(true);
    let path = Path {
        machine: Machine::default(),
        trace: Vec::new(),
        saved: journal.install,
        // The databases were proven under the number of the journal.
        proofs: 1,
        passes: 1,
        finished: 0,
        evidence: false,
        swapped: [Set::from(&manifest(1, "daily.cvd=one")).sha256()].into(),
    };
    let event = Event::Resigned(journal, ClamdReport::default());
    walk(path, event, CHOICES, &mut 0);
}

/// Walks every way of `choices` choices that begins with this event.
fn walk(mut path: Path, event: Event, choices: usize, seen: &mut usize) {
    *seen += 1;
    path.trace
        .push(format!("{event:?}").chars().take(60).collect());
    if let Event::Judged(verdict, blame) = &event {
        path.proofs += usize::from(matches!(verdict, Verdict::Live(_)));
        let control = path.machine.journal().is_some_and(|open| open.control);
        path.evidence |= match (verdict, blame) {
            (Verdict::Refused { .. }, Blame::Set) => true,
            (Verdict::Refused { control: able, .. }, Blame::Unknown) => control && *able,
            (_, _) => false,
        };
    }
    let resumed = matches!(event, Event::Resumed { .. });
    let shown = path.saved;
    let actions = path.machine.handle(event);
    if resumed {
        a_replay_has_a_number_that_clamd_was_never_shown(&path, &actions, shown);
    }
    let mut asked = false;
    for (at, action) in actions.iter().enumerate() {
        the_journal_is_saved_before_the_directory_changes(&path, &actions[..at], action);
        a_set_is_called_live_only_after_its_proofs(&path, action);
        nothing_is_taken_away_where_nothing_was(&path, action);
        only_what_is_on_disk_is_recorded_as_installed(&path, action);
        nothing_is_refused_without_evidence(&path, action);
        if choices > 0
            && !matches!(
                action,
                Action::Prove(_) | Action::Finish(_) | Action::TrySave(_)
            )
        {
            for touched in [false, true] {
                let fault = "fault".to_owned();
                walk(
                    path.clone(),
                    Event::Failed { fault, touched },
                    choices - 1,
                    seen,
                );
            }
        }
        match action {
            Action::Save(journal) | Action::TrySave(journal) => {
                numbers_only_rise(&path, journal);
                path.saved = journal.install;
            }
            Action::Swap(journal) => {
                path.proofs = 0;
                path.passes = usize::from(journal.passes);
                path.swapped.insert(journal.set.sha256());
            }
            Action::Place(journal) => _ = path.swapped.insert(journal.set.sha256()),
            Action::Prove(_) => asked = true,
            Action::Finish(_) => path.finished += 1,
            Action::Renumber(_)
            | Action::RemoveLater(_)
            | Action::Record(_)
            | Action::Remember(_)
            | Action::Forget
            | Action::Clean
            | Action::Again(_) => {}
        }
    }
    if choices == 0 {
        return;
    }
    let report = ClamdReport::default;
    let over = matches!(actions.last(), None | Some(Action::Finish(_)));
    if asked || path.machine.waits_for_clamd() && over {
        for verdict in [
            Verdict::Live(report()),
            Verdict::Refused {
                reason: "bad".into(),
                scan: LoadTest::Missing("none".into()),
                control: true,
                report: report(),
            },
            Verdict::Unproven(report()),
            Verdict::Absent(report()),
        ] {
            let others = || Blame::Others("theirs".into());
            let blames = match &verdict {
                Verdict::Refused { .. } => vec![
                    Blame::Set,
                    Blame::Unknown,
                    Blame::Host("memory".into()),
                    others(),
                ],
                Verdict::Live(_) | Verdict::Unproven(_) | Verdict::Absent(_) => {
                    vec![Blame::Set]
                }
            };
            for blame in blames {
                let event = Event::Judged(verdict.clone(), blame);
                walk(path.clone(), event, choices - 1, seen);
            }
        }
    } else if let Some(Action::Again(_)) = actions.last() {
        let again = begin_again(&path.machine);
        walk(path.clone(), again, choices, seen);
    } else if !over {
        walk(path.clone(), Event::Done, choices, seen);
    }
    if let Some(journal) = path.machine.journal().cloned() {
        let (journal, next) = (Box::new(journal), after(path.saved));
        path.machine = Machine::default(); // what a crash leaves is the journal alone
        walk(path, Event::Resumed { journal, next }, choices - 1, seen);
    }
}

fn the_journal_is_saved_before_the_directory_changes(
    path: &Path,
    done: &[Action],
    action: &Action,
) {
    let number = match action {
        Action::Swap(journal) | Action::Place(journal) | Action::RemoveLater(journal) => {
            journal.install
        }
        Action::Renumber(install) => *install,
        Action::Save(_)
        | Action::TrySave(_)
        | Action::Prove(_)
        | Action::Record(_)
        | Action::Remember(_)
        | Action::Forget
        | Action::Clean
        | Action::Again(_)
        | Action::Finish(_) => return,
    };
    let saved = done.iter().any(|action| {
        matches!(action, Action::Save(journal) | Action::TrySave(journal) if journal.install == number)
    });
    assert!(saved, "{path:#?}\n{action:?}");
}

fn a_replay_has_a_number_that_clamd_was_never_shown(
    path: &Path,
    actions: &[Action],
    shown: InstallNumber,
) {
    for action in actions {
        if let Action::Swap(journal) = action {
            assert!(journal.install > shown, "{path:#?}");
        }
    }
}

fn numbers_only_rise(path: &Path, journal: &Journal) {
    assert!(journal.install >= path.saved, "{path:#?}");
}

fn a_set_is_called_live_only_after_its_proofs(path: &Path, action: &Action) {
    if let Action::Finish(ending) = action
        && ending.outcome == Outcome::Live
    {
        assert!(path.proofs >= path.passes && path.passes > 0, "{path:#?}");
    }
}

/// Half a set is no set: after a fault of the disk it goes, whatever was there before. A whole
/// one that clamd refuses stays where there is no other.
fn nothing_is_taken_away_where_nothing_was(path: &Path, action: &Action) {
    if let Action::Swap(journal) = action
        && let Way::Back { cause, .. } = &journal.way
    {
        let faulted = matches!(cause, Cause::HostFault(_));
        assert!(faulted || !journal.files.is_empty(), "{path:#?}");
    }
}

fn nothing_is_refused_without_evidence(path: &Path, action: &Action) {
    let refused = match action {
        Action::Remember(_) => true,
        Action::Finish(ending) => ending.outcome == Outcome::Refused,
        Action::Save(_)
        | Action::TrySave(_)
        | Action::Swap(_)
        | Action::Place(_)
        | Action::Renumber(_)
        | Action::Prove(_)
        | Action::RemoveLater(_)
        | Action::Record(_)
        | Action::Forget
        | Action::Clean
        | Action::Again(_) => false,
    };
    assert!(!refused || path.evidence, "{path:#?}");
}

fn only_what_is_on_disk_is_recorded_as_installed(path: &Path, action: &Action) {
    if let Action::Record(Some(installed)) = action {
        let proven = path.proofs >= path.passes && path.passes > 0;
        let right = match installed.outcome {
            Outcome::Live => proven,
            Outcome::Installed | Outcome::Refused => true,
            Outcome::HostFault => false,
        };
        assert!(
            right && path.swapped.contains(&installed.set.sha256()),
            "{path:#?}"
        );
    }
}
