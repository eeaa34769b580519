//! Decides what a load test with `clamscan`, a control and a verdict of clamd show about a set.
//!
//! Pure: no disk, no clamd. `proving` makes the tests and reads the files.

use clamcast_daemon::clamscan;
use clamcast_proto::receipt::{ClamdReport, InstallNumber};

use super::journal::{Journal, Refusal, Set, Way};
use super::machine::Event;
use super::others::{Blame, Other};
use super::receipt::FileCheck;
use super::swap::names_of;
use crate::clamd::{LoadTest, Verdict};

/// What the load tests of a staged set came to.
pub(super) enum Tried {
    /// It loads, beside these files of others; or nobody can tell.
    Loads(Vec<Other>),
    /// It loads, but for what others have beside it: it may stand there, and clamd is not asked.
    Alone,
    /// It does not load: there is evidence against it.
    Bad(String),
    /// This host cannot tell, or cannot load it.
    Hindered(String),
}

/// What follows from one load test of a staged set.
pub(super) enum Trial {
    Done(Tried),
    /// `clamscan` names a file of the set: look at the file, and load the previous set as a control.
    Weigh(String),
    /// Something else than the set may be at fault. Load the set alone.
    Alone {
        hindrance: String,
    },
}

/// What loading the previous set with `clamscan` shows about its verdict on the new one.
pub(super) enum Control {
    /// `clamscan` loads the previous set, or there is none: its verdict stands.
    Stands,
    /// `clamscan` loads neither: this host is at fault.
    Fails(String),
    /// It could not be tried.
    Impossible(String),
}

/// Whether a host needs a set whatever lies beside it: it has none, or a damaged one.
fn is_needed(journal: &Journal) -> bool {
    let before = journal.before.installed.as_ref();
    before.is_none_or(|before| before.set == journal.set)
}

impl Trial {
    /// After a load test of a set beside the files of others.
    pub(super) fn beside(test: LoadTest, journal: &Journal, others: Vec<Other>) -> Self {
        let said = match test {
            LoadTest::Passed | LoadTest::Hindered(_) | LoadTest::Missing(_) => {
                return Self::Done(Tried::Loads(others));
            }
            LoadTest::Failed(said) => said,
        };
        let ours = names_of(journal).collect();
        match Blame::of_failure(&said, &ours, &others) {
            Blame::Set => Self::Weigh(said),
            Blame::Others(reason) if !is_needed(journal) => Self::Done(Tried::Hindered(reason)),
            Blame::Others(hindrance) => Self::Alone { hindrance },
            Blame::Host(_) | Blame::Unknown => Self::Alone {
                hindrance: format!("clamscan cannot load the set, and names no file of it: {said}"),
            },
        }
    }

    /// After a load test of the set alone.
    pub(super) fn alone(test: LoadTest, journal: &Journal, hindrance: String) -> Self {
        match test {
            LoadTest::Failed(said) => {
                let ours = names_of(journal).collect();
                match Blame::of_failure(&said, &ours, &[]) == Blame::Set {
                    true => Self::Weigh(said),
                    false => Self::Done(Tried::Hindered(hindrance)),
                }
            }
            LoadTest::Passed if is_needed(journal) => Self::Done(Tried::Alone),
            LoadTest::Passed | LoadTest::Hindered(_) | LoadTest::Missing(_) => {
                Self::Done(Tried::Hindered(hindrance))
            }
        }
    }
}

impl Tried {
    /// `clamscan` rejects the set and names a file of it, which is intact.
    pub(super) fn weighed(said: String, control: Control) -> Self {
        match control {
            Control::Stands => Self::Bad(said),
            Control::Fails(why) | Control::Impossible(why) => {
                Self::Hindered(format!("clamscan: {said}; {why}"))
            }
        }
    }

    /// How the install begins, and beside which files of others the set was loaded.
    ///
    /// # Errors
    ///
    /// Why this host cannot take the set.
    pub(super) fn begin(
        self,
        set: &Set,
        journal: Box<Journal>,
        report: ClamdReport,
    ) -> Result<(Event, Option<Vec<Other>>), String> {
        match self {
            Self::Loads(others) => Ok((Event::Begin(journal), Some(others))),
            Self::Alone => Ok((Event::Begin(journal), None)),
            Self::Bad(error) => {
                let refusal = Refusal {
                    position: set.manifest.position(),
                    manifest_sha256: set.sha256(),
                    install: InstallNumber::NONE,
                    error,
                };
                Ok((Event::Unloadable(Box::new(refusal), report), None))
            }
            Self::Hindered(reason) => Err(reason),
        }
    }
}

impl Control {
    /// Whether there was anything before the set that could be loaded.
    pub(super) fn is_possible(journal: &Journal) -> bool {
        !journal.before.files.is_empty() || journal.before.others
    }

    /// After a load test of what was there before the set.
    pub(super) fn of(test: LoadTest) -> Self {
        match test {
            LoadTest::Passed => Self::Stands,
            LoadTest::Failed(why) | LoadTest::Hindered(why) | LoadTest::Missing(why) => {
                Self::Fails(format!(
                    "clamscan does not load the previous set either ({why}): look at this host's \
                     memory and limits"
                ))
            }
        }
    }

    /// It could not be made.
    pub(super) fn impossible(why: &str) -> Self {
        Self::Impossible(format!(
            "the previous set could not be tried with clamscan as a control: {why}"
        ))
    }
}

/// A load test of the database directory failed, so clamd must not get it.
pub(super) fn rejected(said: String, report: ClamdReport) -> Verdict {
    Verdict::Refused {
        reason: format!("clamscan: {said}"),
        scan: LoadTest::Failed(said),
        control: false,
        report,
    }
}

/// What a verdict means for the set that is being proven. `before`: the files of others that clamd, or
/// `clamscan` in its place, may have met; `others`: those that are there now, if they could be listed.
pub(super) fn blame(
    verdict: Verdict,
    open: &Journal,
    before: Option<&[Other]>,
    others: Option<&[Other]>,
) -> (Verdict, Blame) {
    let is_changed = matches!((before, others), (Some(before), Some(now)) if before != now);
    let verdict = unless_changed_beside(verdict, open, is_changed);
    let ours = names_of(open).collect();
    let blame = match others {
        Some(others) => Blame::of(&verdict, &ours, others),
        None => Blame::Unknown,
    };
    (verdict, blame)
}

/// Where databases beside the set were changed meanwhile, clamd's error says nothing about those
/// that are there now: probing goes on.
fn unless_changed_beside(verdict: Verdict, open: &Journal, is_changed: bool) -> Verdict {
    match verdict {
        Verdict::Refused { reason, report, .. } if is_changed && open.way == Way::Forward => {
            let note = format!("a database beside the set was changed by somebody: {reason}");
            tracing::warn!(note, "clamd rejects what is not there any more");
            let note = Some(note);
            Verdict::Unproven(ClamdReport { note, ..report })
        }
        Verdict::Refused { .. } | Verdict::Live(_) | Verdict::Unproven(_) | Verdict::Absent(_) => {
            verdict
        }
    }
}

/// Whether the files of the set must be read before it is blamed. Returns what `clamscan` said of them.
pub(super) fn to_be_doubted<'v>(
    verdict: &'v Verdict,
    blame: &Blame,
    open: &Journal,
) -> Option<&'v str> {
    let Verdict::Refused { scan, .. } = verdict else {
        return None;
    };
    match (blame, scan) {
        _ if open.way != Way::Forward => None,
        (Blame::Others(_) | Blame::Host(_), _) => None,
        (Blame::Set, LoadTest::Failed(said)) => Some(said),
        (Blame::Set | Blame::Unknown, _) => Some(""),
    }
}

/// Why the files of a set, read again, are no evidence against it. Of a file that `said` does not name a
/// failed read says nothing.
pub(super) fn doubt(
    said: &str,
    names: &[&str],
    checks: impl IntoIterator<Item = FileCheck>,
) -> Option<String> {
    let named = clamscan::culprit(said, names.iter().copied());
    checks.into_iter().find_map(|check| {
        let name = &check.expected.name;
        match &check.error {
            Some(error) if named == Some(name.as_str()) => {
                Some(format!("{name} cannot be read again ({error})"))
            }
            None if !check.is_right() => Some(format!("{name} was changed by somebody")),
            Some(_) | None => None,
        }
    })
}

/// Nobody blames a set whose files are not what was published: then this host is at fault.
pub(super) fn doubted(verdict: &Verdict, doubt: &str) -> Blame {
    let reason = match verdict {
        Verdict::Refused { reason, .. } => reason.as_str(),
        Verdict::Live(_) | Verdict::Unproven(_) | Verdict::Absent(_) => "",
    };
    tracing::warn!(doubt, reason, "clamd rejects what was not published");
    Blame::Host(format!("{doubt}: {reason}"))
}

/// Whether a control must confirm that the set is to blame.
pub(super) fn wants_control(verdict: &Verdict, blame: &Blame, open: &Journal) -> bool {
    let is_refused = matches!(verdict, Verdict::Refused { .. });
    is_refused && *blame == Blame::Set && open.way == Way::Forward
}

/// What becomes of a verdict against the set after the control.
pub(super) fn controlled(verdict: Verdict, blame: Blame, control: Control) -> Event {
    match (verdict, control) {
        (Verdict::Refused { reason, report, .. }, Control::Fails(why)) => Event::Judged(
            Verdict::Unproven(report),
            Blame::Host(format!("{reason}; {why}")),
        ),
        // Not evidence enough, and clamd could not start with the set: the previous one comes
        // back, which no other fault of the host asks for.
        (
            Verdict::Refused {
                reason,
                scan,
                report,
                ..
            },
            Control::Impossible(why),
        ) => Event::Judged(
            Verdict::Refused {
                reason: format!("{reason}; {why}"),
                scan,
                control: false,
                report,
            },
            Blame::Unknown,
        ),
        (verdict, _) => Event::Judged(verdict, blame),
    }
}
