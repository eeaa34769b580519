//! What a receipt says of an install: what came of it, and what is in the directory now.

use clamcast_daemon::clamscan::culprit;
use clamcast_proto::DatabaseName;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::{ClamdReport, FileState, InstallNumber, Outcome};

use super::disk::{At, Dir, Tree};
use super::journal::{Ending, Installed, Journal, Set};
use super::survey::earlier_sets;
use super::{Prove, Shared, Storage};
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

impl<S: Storage, P: Prove> Shared<S, P> {
    /// What a receipt says of a set: what came of it, and what is on disk now. `installed` and `open`: what
    /// the installer has.
    pub(super) fn completed(
        &self,
        installed: Option<&Installed>,
        open: Option<&Journal>,
        set: Set,
        ending: Ending,
    ) -> Completed {
        self.storage.forget_digests(); // a receipt says what is on disk now
        let clamd = match ending.clamd == ClamdReport::default() {
            true => self.prover.report(),
            false => ending.clamd.clone(),
        };
        let files = self.storage.files(&set);
        let (foreign, adopted) = self.beside(installed, open);
        Completed {
            blamed: blamed(&set.manifest, &ending),
            files,
            foreign,
            adopted,
            clamd: with_passed_over(&self.prover, clamd, &set.manifest),
            outcome: ending.outcome,
            install: ending.install,
            error: ending.error,
            set,
        }
    }

    /// Databases in the directory that no set of the fleet owns, and the host's own files that are kept
    /// while the installed set owns their names.
    pub(super) fn beside(
        &self,
        installed: Option<&Installed>,
        open: Option<&Journal>,
    ) -> (Vec<String>, Vec<DatabaseName>) {
        let sets = earlier_sets(installed, open);
        let files = sets.iter().flat_map(|set| &set.files);
        let ours = files.map(|file| file.name.as_str()).collect();
        let foreign = self.storage.foreign(&ours).unwrap_or_else(|fault| {
            tracing::warn!(error = chain(&fault), "cannot look for databases of others");
            Vec::new()
        });
        let adopted = installed.map(|installed| self.storage.adopted(&installed.set.manifest));
        let adopted = adopted.unwrap_or(Ok(Vec::new())).unwrap_or_else(|fault| {
            tracing::warn!(error = chain(&fault), "cannot look for adopted files");
            Vec::new()
        });
        (foreign, adopted)
    }
}

/// A set is live without what clamd is configured not to load: the receipt says so.
pub(super) fn with_passed_over(
    prover: &impl Prove,
    mut report: ClamdReport,
    manifest: &Manifest,
) -> ClamdReport {
    let names = manifest.files.iter().map(|file| &file.name);
    let mut passed: Vec<_> = names.filter(|name| !prover.loads(name)).collect();
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

impl FileCheck {
    /// Reads every byte of a file that should stand in `dir`.
    pub(super) fn read(tree: &Tree, dir: Dir, expected: FileState) -> Self {
        let at = At(dir, expected.name.as_str());
        let read = tree.open(at).and_then(|file| {
            let Some(mut file) = file else {
                return Ok(None);
            };
            tree.digest(at, &mut file, |_| Ok(())).map(Some)
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
        Self {
            expected,
            found,
            error,
        }
    }
}
