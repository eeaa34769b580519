//! What a receipt says of an install: what came of it, and what is in the directory now.

use clamcast_daemon::clamscan::culprit;
use clamcast_proto::DatabaseName;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::{ClamdReport, FileState, InstallNumber, Outcome};

use super::disk::{At, Dir};
use super::journal::{Ending, Refusal, Set};
use super::survey::earlier_sets;
use super::{Prove, Shared, lock};
use crate::chain;

/// So many files that clamd passes over are named in a receipt: it is clipped where it is shown.
const PASSED_OVER_MAX: usize = 8;

/// How an install ended: what a receipt says.
#[derive(Clone, Debug)]
pub struct Completed {
    /// The generation it is about.
    pub set: Set,
    /// What came of it.
    pub outcome: Outcome,
    /// The install that the proof was about; none if it did not get that far.
    pub install: InstallNumber,
    /// What is on disk now under a name of the generation.
    pub files: Vec<FileState>,
    /// Databases in the directory that are not ours, bounded.
    pub foreign: Vec<String>,
    /// The host's own files under names of the fleet, kept until the fleet withdraws the name.
    pub adopted: Vec<DatabaseName>,
    /// The clamd it was proven with.
    pub clamd: ClamdReport,
    /// Why it is not live.
    pub error: Option<String>,
    /// The file of the generation that is the cause of a refusal, if `clamscan` or clamd named it.
    pub blamed: Option<DatabaseName>,
}

/// The file of a refused generation that libclamav named in the error.
pub(super) fn blamed(manifest: &Manifest, ending: &Ending) -> Option<DatabaseName> {
    let error = ending.error.as_deref();
    let refused = error.filter(|_| ending.outcome == Outcome::Refused)?;
    let name = culprit(
        refused,
        manifest.files.iter().map(|file| file.name.as_str()),
    )?;
    let mut files = manifest.files.iter().map(|file| &file.name);
    files.find(|file| file.as_str() == name).cloned()
}

/// One database of the installed generation, compared with the disk.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FileCheck {
    /// What the manifest says.
    pub expected: FileState,
    /// What is there; `None` if nothing is.
    pub found: Option<FileState>,
    /// Why it could not be read.
    pub error: Option<String>,
}

impl FileCheck {
    /// Whether the file is as it should be.
    pub fn is_right(&self) -> bool {
        self.found.as_ref() == Some(&self.expected)
    }
}

impl<P: Prove> Shared<P> {
    pub(super) fn answer(&self, set: Set, refusal: Refusal) -> Completed {
        let ending = Ending {
            outcome: Outcome::Refused,
            install: refusal.install,
            clamd: self.prover.report(),
            error: Some(format!("refused before: {}", refusal.error)),
        };
        self.completed(set, ending)
    }

    pub(super) fn completed(&self, set: Set, ending: Ending) -> Completed {
        self.known.clear(); // a receipt says what is on disk now
        let clamd = match ending.clamd == ClamdReport::default() {
            true => self.prover.report(),
            false => ending.clamd.clone(),
        };
        let files = self.swap().files_on_disk(&set, &self.baseline);
        if matches!(ending.outcome, Outcome::Live | Outcome::Installed) && files == set.files() {
            *lock(&self.suspect) = false;
        }
        Completed {
            blamed: blamed(&set.manifest, &ending),
            files,
            foreign: self.foreign(),
            adopted: self.adopted(),
            clamd: self.with_passed_over(clamd, &set.manifest),
            outcome: ending.outcome,
            install: ending.install,
            error: ending.error,
            set,
        }
    }

    /// A set is live without what clamd is configured not to load: the receipt says so.
    pub(super) fn with_passed_over(
        &self,
        mut report: ClamdReport,
        manifest: &Manifest,
    ) -> ClamdReport {
        let names = manifest.files.iter().map(|file| &file.name);
        let mut passed: Vec<_> = names.filter(|name| !self.prover.loads(name)).collect();
        let more = passed.len().saturating_sub(PASSED_OVER_MAX);
        passed.truncate(PASSED_OVER_MAX);
        if passed.is_empty() {
            return report;
        }
        let mut names: Vec<_> = passed.iter().map(|name| name.to_string()).collect();
        if more > 0 {
            names.push(format!("{more} more"));
        }
        let said = format!(
            "OfficialDatabaseOnly yes: clamd does not load {}",
            names.join(", ")
        );
        report.note = Some(match report.note {
            Some(note) => format!("{said}; {note}"),
            None => said,
        });
        report
    }

    /// Databases in the directory that no set of the fleet owns.
    pub(super) fn foreign(&self) -> Vec<String> {
        let installed = lock(&self.installed).clone();
        let open = lock(&self.machine).journal().cloned();
        let sets = earlier_sets(installed.as_ref(), open.as_ref());
        let files = sets.iter().flat_map(|set| &set.files);
        let ours = files.map(|file| file.name.as_str()).collect();
        self.swap().foreign(&ours).unwrap_or_else(|fault| {
            tracing::warn!(error = chain(&fault), "cannot look for databases of others");
            Vec::new()
        })
    }

    /// The host's own files that are kept while the installed set owns their names.
    pub(super) fn adopted(&self) -> Vec<DatabaseName> {
        let installed = lock(&self.installed).clone();
        let adopted = installed.map(|installed| self.swap().adopted(&installed.set.manifest));
        adopted.unwrap_or(Ok(Vec::new())).unwrap_or_else(|fault| {
            tracing::warn!(error = chain(&fault), "cannot look for adopted files");
            Vec::new()
        })
    }

    pub(super) fn check(&self, expected: FileState) -> FileCheck {
        self.check_in(Dir::Databases, expected)
    }

    /// Reads every byte of a file that should stand in `dir`.
    pub(super) fn check_in(&self, dir: Dir, expected: FileState) -> FileCheck {
        let at = At(dir, expected.name.as_str());
        let read = self.tree.open(at).and_then(|file| {
            let Some(mut file) = file else {
                return Ok(None);
            };
            self.tree.digest(at, &mut file, |_| Ok(())).map(Some)
        });
        let (found, error) = match read {
            Ok(found) => (found, None),
            Err(fault) => (None, Some(chain(&fault))),
        };
        let found = found.map(|(size, sha256)| FileState {
            name: expected.name.clone(),
            size,
            sha256,
        });
        FileCheck {
            expected,
            found,
            error,
        }
    }
}
