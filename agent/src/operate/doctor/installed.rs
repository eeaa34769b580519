//! What this host has: what came of the newest generation, the copies that are kept of it, and the
//! databases of others, which clamd loads or fails on together with the agent's.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clamcast_daemon::clamscan::{self, LoadError};
use clamcast_proto::receipt::Outcome;

use super::Finding;
use super::master::Agent;
use crate::clamd::Settings;
use crate::clamd::proof::{CANARY, GATE};
use crate::config::Config;
use crate::core::status::{Blindness, LastStatus};
use crate::host::state::{self, StateError};
use crate::install::journal::INSTALLED;
use crate::install::watch::Blind;
use crate::install::{HIDDEN, Installed};
use crate::keeper::receipts;

/// Databases of others are tried with clamscan up to this size: each takes some hundredths of a
/// second and a few MB of memory.
const TRIED_BYTES_MAX: u64 = 1 << 20;

/// So many of them are tried.
const TRIED_MAX: usize = 64;

/// So long one may take. A name that clamscan reads for ever is no plain file, and not tried.
const TRIED_TIME: Duration = Duration::from_secs(10);

/// So many names are listed.
const NAMES_MAX: usize = 5;

/// What is installed, by the agent's own records and its databases.
#[derive(Debug, Default)]
pub(super) struct Facts {
    /// The database directory.
    database: PathBuf,
    /// Names of the installed generation; `None` if nothing is.
    names: Option<Vec<String>>,
    /// Whether `.clamcast` is there.
    hidden: bool,
    /// Names like databases that are no files, and what they are.
    odd: Vec<(String, &'static str)>,
    /// Databases of others.
    foreign: Vec<String>,
    /// Those that clamd cannot load, and why.
    broken: Vec<(String, String)>,
    /// Those that it may not be able to load: nothing is in them, and there is no clamscan to ask.
    empty: Vec<String>,
}

impl Facts {
    /// Looks at records and databases.
    pub(super) async fn look(config: &Config, settings: &Settings) -> Result<Self, StateError> {
        let path = config.state.join(INSTALLED);
        let installed: Option<Installed> = state::load(&path, "the agent finds out anew")?;
        let names = installed.map(|installed| {
            let files = installed.set.manifest.files.iter();
            files.map(|file| file.name.to_string()).collect::<Vec<_>>()
        });
        let database = &settings.database_directory;
        let mut facts = Self {
            hidden: database.join(HIDDEN).is_dir(),
            database: database.clone(),
            names,
            ..Self::default()
        };
        for name in crate::host::memory::names(database) {
            // A link that leads nowhere is passed over by clamd, too.
            let Ok(at) = fs::metadata(database.join(&name)) else {
                continue;
            };
            if !at.is_file() {
                let kind = if at.is_dir() {
                    "a directory"
                } else {
                    "no file"
                };
                facts.odd.push((name, kind));
            } else if !facts.is_ours(&name) {
                facts.load(&name, at.len(), settings).await;
                facts.foreign.push(name);
            }
        }
        Ok(facts)
    }

    fn is_ours(&self, name: &String) -> bool {
        let installed = self.names.iter().flatten().any(|own| own == name);
        installed || [CANARY, GATE].contains(&name.as_str())
    }

    /// Has a database of somebody else loaded alone: what fails so fails with the others, too.
    async fn load(&mut self, name: &str, size: u64, settings: &Settings) {
        let Some(scanner) = &settings.scanner else {
            if size == 0 {
                self.empty.push(name.to_owned());
            }
            return;
        };
        if size > TRIED_BYTES_MAX || self.foreign.len() >= TRIED_MAX {
            return;
        }
        let path = self.database.join(name);
        let loaded = clamscan::load(scanner, &path, settings.official_only, TRIED_TIME).await;
        // Whatever else comes of it says nothing about the database.
        if let Err(LoadError::Refused { reason }) = loaded {
            self.broken.push((name.to_owned(), reason));
        }
    }
}

/// Judges the databases, and what is kept of the agent's.
pub(super) fn judge(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let directory = facts.database.display();
    let mend = "and nothing that the agent installs is loaded until it is gone";
    for (name, kind) in facts.odd.iter().take(NAMES_MAX) {
        findings.push(Finding::bad(
            "databases",
            format!("{name} is {kind}: clamd reads it for ever or refuses to load, {mend}"),
            format!("mv {directory}/{name} out of that directory, or remove it"),
        ));
    }
    for (name, reason) in facts.broken.iter().take(NAMES_MAX) {
        findings.push(Finding::bad(
            "databases",
            format!("clamd cannot load {name}, which is not the agent's, {mend}: {reason}"),
            format!("mend {directory}/{name}, or remove it; whoever brings it should know"),
        ));
    }
    for name in facts.empty.iter().take(NAMES_MAX) {
        findings.push(Finding::note(
            "databases",
            format!("{name} is empty, and not the agent's: of most kinds clamd loads none so"),
            format!("remove {directory}/{name}, unless clamd is known to load it"),
        ));
    }
    if findings.is_empty() {
        let found = match facts.foreign.as_slice() {
            [] => "there are none of others".to_owned(),
            names => format!("clamd loads those of others, too: {}", list(names)),
        };
        findings.push(Finding::good("databases", found));
    }
    if let Some(names) = &facts.names
        && !facts.hidden
    {
        findings.push(Finding::note(
            "copies",
            format!(
                "{directory}/{HIDDEN} is gone, and with it the copies of {}: what is damaged \
                 comes from the master, and there is no set to go back to",
                list(names)
            ),
            "start the agent, which makes it anew; the next generation fills it, or on the \
             master: clamcast-master force-sync NAME",
        ));
    }
    findings
}

fn list(names: &[String]) -> String {
    let more = names.len().saturating_sub(NAMES_MAX);
    let shown = names[..names.len() - more].join(", ");
    match more {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// What came of the newest generation: by the agent that runs, else by its records.
pub(super) fn last(running: &Agent, state: &Path) -> Result<Option<LastStatus>, StateError> {
    match running {
        Agent::Runs(status) => Ok(status.last.clone()),
        Agent::Away | Agent::Unknown(..) => {
            let newest = receipts::newest(state)?;
            Ok(newest.as_ref().map(LastStatus::from))
        }
    }
}

/// Judges it.
pub(super) fn judge_last(last: &LastStatus) -> Finding {
    let check = "outcome";
    let position = format!("generation {}.{}", last.epoch, last.generation);
    let why = last.error.as_deref().unwrap_or("no reason is known");
    match last.outcome {
        Outcome::Live => Finding::good(check, format!("{position} is live")),
        Outcome::Installed => Finding::note(
            check,
            format!("{position} is installed, and clamd was not seen with it: {why}"),
            "see what is said of clamd; once it answers, it is asked again by itself",
        ),
        Outcome::Refused => Finding::bad(
            check,
            format!("clamd refused {position}: {why}"),
            "a newer generation is taken by itself; once the reason is gone, this one is tried \
             again by, on the master: clamcast-master force-sync NAME",
        ),
        Outcome::HostFault => Finding::bad(
            check,
            format!("this host could not take {position}: {why}"),
            "mend that; it is tried again by itself, and at once by, on the master: \
             clamcast-master force-sync NAME",
        ),
    }
}

/// Judges what the agent that runs sees of its own files.
pub(super) fn judge_drift(running: &Agent) -> Option<Finding> {
    let Agent::Runs(status) = running else {
        return None;
    };
    let drift = &status.drift;
    let names: Vec<_> = drift
        .files
        .iter()
        .map(|file| file.name.to_string())
        .collect();
    if names.is_empty() {
        return None;
    }
    let found = format!("not what was installed: {}", list(&names));
    Some(match &drift.reason {
        Some(reason) => Finding::bad("drift", found, reason.as_str()),
        None => Finding::note("drift", found, "nothing: the agent puts it right"),
    })
}

/// Judges whether changes of files are told at once: by the agent that runs, or by what came of
/// trying.
pub(super) fn judge_events(running: &Agent, tried: impl FnOnce() -> Result<(), Blind>) -> Finding {
    let check = "file-events";
    let why = match running {
        Agent::Runs(status) if status.drift.watched => None,
        Agent::Runs(status) => status.drift.blind.clone(),
        Agent::Away | Agent::Unknown(..) => tried().err().map(|blind| Blindness::from(&blind)),
    };
    match why {
        None => Finding::good(check, "a changed database is seen at once"),
        Some(Blindness { why, remedy }) => Finding::note(
            check,
            format!("{why}; the databases are looked at every few seconds instead"),
            remedy,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operate::doctor::testing;
    use clamcast_proto::{Epoch, Generation};
    use jiff::Timestamp;

    #[track_caller]
    fn check(change: impl Fn(&mut Facts), expected: &[&str]) {
        let mut facts = Facts {
            database: "/db".into(),
            names: Some(vec!["daily.cld".into()]),
            hidden: true,
            ..Facts::default()
        };
        change(&mut facts);
        testing::assert_lines(&judge(&facts), expected);
    }

    #[test]
    fn what_clamd_fails_on_is_bad_whosever_it_is() {
        check(|_| {}, &["good databases: there are none of others"]);
        check(
            |facts| facts.foreign = vec!["x.ndb".into()],
            &["good databases: | those of others, too: x.ndb"],
        );
        check(
            |facts| facts.odd = vec![("x.ndb".into(), "a directory")],
            &["bad databases: x.ndb is a directory: | for ever | mv /db/x.ndb"],
        );
        check(
            |facts| facts.broken = vec![("x.ndb".into(), "Malformed database".into())],
            &["bad databases: clamd cannot load x.ndb | Malformed database | remove it"],
        );
        check(
            |facts| facts.empty = vec!["x.hdb".into()],
            &["note databases: x.hdb is empty | remove /db/x.hdb"],
        );
    }

    #[test]
    fn lost_copies_are_a_note_where_something_is_installed() {
        let lost = "note copies: /db/.clamcast is gone | daily.cld | force-sync NAME";
        check(|facts| facts.hidden = false, &["good databases", lost]);
        let nothing_yet = |facts: &mut Facts| (facts.hidden, facts.names) = (false, None);
        check(nothing_yet, &["good databases"]);
    }

    #[test]
    fn what_came_of_the_newest_generation_says_what_to_do() {
        for (outcome, expected) in [
            (Outcome::Live, "good outcome: generation 1.1 is live"),
            (
                Outcome::Installed,
                "note outcome: | was not seen with it: so",
            ),
            (
                Outcome::Refused,
                "bad outcome: clamd refused | : so | force-sync NAME",
            ),
            (
                Outcome::HostFault,
                "bad outcome: this host could not | : so | force-sync NAME",
            ),
        ] {
            let last = LastStatus {
                epoch: Epoch(1),
                generation: Generation::FIRST,
                outcome,
                error: Some("so".into()),
                time: Timestamp::UNIX_EPOCH,
            };
            testing::assert_lines(&[judge_last(&last)], &[expected]);
        }
    }
}
