//! A machine that is made up: its disk, and its clamd. The installer of the agent works on it as it is.

use std::collections::HashSet;
use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::task::Poll;

use clamcast_agent::clamd::proof::CANARY;
use clamcast_agent::clamd::{LoadTest, Verdict};
use clamcast_agent::host::updater::Updater;
use clamcast_agent::install::disk::{Dir, HostFault};
use clamcast_agent::install::journal::{Before, Installed, Journal, Refusal, Set, Way};
use clamcast_agent::install::machine::Action;
use clamcast_agent::install::survey::{Numbers, Planner, Role, Seen, Stands, There};
use clamcast_agent::install::{Depth, FileCheck, Other, Prove, Sighting, StepFault, Storage};
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::{ClamdReport, ClamdState, FileState, Found, InstallNumber, Proof};
use clamcast_proto::wire::{Have, NeedFile};
use clamcast_proto::{DatabaseName, Digest};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio_util::sync::CancellationToken;

use super::Clamd;
use crate::simulation::contents::Bad;
use crate::simulation::disk::{Disk, Fate, Trouble};

/// A host without its agent.
pub(in crate::simulation) struct Body {
    pub(in crate::simulation) disk: Disk,
    pub(in crate::simulation) clamd: Clamd,
    pub(super) bad: Arc<RwLock<Bad>>,
    /// Whether clamd stops scanning to reload, so that every set is loaded with `clamscan` first.
    is_blocking: bool,
    random: StdRng,
    /// Proofs that were begun, and the one whose verdict nobody has asked for yet.
    proofs: u64,
    pub(super) asked: Option<Proving>,
    /// The verdict of the newest proof.
    verdict: Option<(u64, Verdict)>,
}

/// A proof that takes its time.
#[derive(Clone, Copy, Debug)]
pub(in crate::simulation) struct Proving {
    number: u64,
    install: InstallNumber,
}

impl Body {
    pub(super) fn new(version: u32, seed: u64, bad: Arc<RwLock<Bad>>) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        Self {
            disk: Disk::default(),
            clamd: Clamd::new(version),
            bad,
            is_blocking: random.random_bool(0.2),
            random,
            proofs: 0,
            asked: None,
            verdict: None,
        }
    }

    /// Whether clamd answers; it comes up by itself where it can.
    pub(in crate::simulation) fn is_clamd_up(&mut self) -> bool {
        let bad = self.bad.read().expect("nothing panics with it");
        self.clamd.is_up(&self.disk, &bad)
    }

    fn probe(&mut self, install: InstallNumber) -> Verdict {
        let bad = self.bad.read().expect("nothing panics with it");
        self.clamd.probe(install, &self.disk, &bad)
    }

    /// What a proof comes to, now that clamd has loaded what is there.
    pub(super) fn judge(&mut self, proof: Proving) {
        let is_silent = self.random.random_bool(0.03);
        let bad = self.bad.read().expect("nothing panics with it");
        let verdict = self.clamd.prove(proof.install, &self.disk, &bad, is_silent);
        self.verdict = Some((proof.number, verdict));
    }

    /// The files of the installed set, with the canary, that are not what they should be.
    pub(super) fn wrong(&self, installed: &Installed) -> Vec<Sighting> {
        let sighting = |name: &str, found| Sighting {
            name: name.to_owned(),
            found,
            state: None,
            owner: None,
        };
        let files = installed.set.manifest.files.iter();
        let mut wrong: Vec<_> = files
            .filter_map(|file| match self.disk.databases.get(&file.name) {
                Some(there) if there.sha256 == file.sha256 => None,
                Some(_) => Some(sighting(file.name.as_str(), Found::Changed)),
                None => Some(sighting(file.name.as_str(), Found::Missing)),
            })
            .collect();
        if self.disk.gate != Some(installed.install) {
            wrong.push(sighting(CANARY, Found::Changed));
        }
        wrong
    }

    fn perform(&mut self, action: &Action) -> Result<(), StepFault> {
        let (fate, touched) = if let Action::Swap(journal) = action {
            let (fate, touched) = self.disk.swap(journal, &mut self.random);
            if fate == Fate::Done {
                // The way back leads to what was there, damaged or not.
                let old = journal.before.installed.as_ref();
                let set = match journal.way {
                    Way::Forward => Some(&journal.set),
                    Way::Back { .. } => old.map(|old| &old.set),
                };
                let holds = set.is_none_or(|set| self.disk.holds(&set.manifest));
                self.disk.is_damaged = !holds;
            }
            (fate, touched)
        } else {
            (self.write(|disk| effect(disk, action)), false)
        };
        match fate {
            Fate::Done => Ok(()),
            Fate::Fault | Fate::Crash => Err(StepFault {
                fault: fault("write"),
                touched,
            }),
        }
    }

    /// Writes something. What fails may have had its effect all the same, also where the host crashes.
    pub(super) fn write(&mut self, effect: impl FnOnce(&mut Disk)) -> Fate {
        let had_crashed = self.disk.has_crashed;
        let fate = self.disk.fate();
        if !had_crashed && (fate == Fate::Done || self.random.random_bool(0.5)) {
            effect(&mut self.disk);
        }
        fate
    }
}

/// What a step does to the disk.
fn effect(disk: &mut Disk, action: &Action) {
    match action {
        Action::Save(journal) => disk.journal = Some(journal.clone()),
        Action::Renumber(install) => disk.gate = Some(*install),
        Action::Record(installed) => disk.installed = installed.clone(),
        Action::Remember(refusal) => {
            disk.refusals
                .retain(|known| known.manifest_sha256 != refusal.manifest_sha256);
            disk.refusals.push((**refusal).clone());
        }
        Action::Forget => disk.journal = None,
        Action::Clean => disk.stage.clear(),
        // Nothing is kept beside the new files here.
        Action::RemoveLater(_) => {}
        Action::Place(_) => unreachable!("no generation differs in signature files alone"),
        Action::Swap(_)
        | Action::TrySave(_)
        | Action::Prove(_)
        | Action::Again(_)
        | Action::Finish(_) => unreachable!("these are no writes of a record"),
    }
}

/// What a call on a disk that fails says.
pub(super) fn fault(doing: &'static str) -> HostFault {
    HostFault::because(doing, PathBuf::from("/"), "the disk failed".to_owned())
}

/// A body that the installer, clamd and the world share.
#[derive(Clone)]
pub(super) struct Shared(pub(super) Arc<Mutex<Body>>);

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Body> {
        self.0.lock().expect("nothing panics with it")
    }
}

impl Storage for Shared {
    fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> impl Future<Output = T> + Send {
        std::future::ready(work())
    }

    fn journal(&self) -> Result<Option<Journal>, HostFault> {
        Ok(self.lock().disk.journal.as_deref().cloned())
    }

    fn installed(&self) -> Result<Option<Installed>, HostFault> {
        Ok(self.lock().disk.installed.as_deref().cloned())
    }

    fn refusal(&self, manifest_sha256: &Digest) -> Option<Refusal> {
        let body = self.lock();
        let mut refusals = body.disk.refusals.iter();
        let found = refusals.find(|refusal| refusal.manifest_sha256 == *manifest_sha256);
        found.cloned()
    }

    fn check_in_place(&self) -> Result<(), HostFault> {
        Ok(())
    }

    fn forget_digests(&self) {}

    fn numbers(&self) -> Result<Numbers, HostFault> {
        Ok(numbers(self.lock().disk.gate))
    }

    fn stage(
        &self,
        manifest: &Manifest,
        _installed: Option<&Manifest>,
        _full: bool,
    ) -> Result<Vec<NeedFile>, HostFault> {
        let mut body = self.lock();
        let disk = &mut body.disk;
        if disk.trouble == Trouble::Full {
            return Err(fault("find room on"));
        }
        let files = manifest.files.iter();
        let missing = files.filter(|file| !disk.stage_if_here(&file.sha256));
        let need = |file: &clamcast_proto::manifest::ManifestFile| NeedFile {
            name: file.name.clone(),
            have: Have::Nothing,
            resume_at: 0,
            resume: None,
        };
        Ok(missing.map(need).collect())
    }

    fn ensure_staged(&self, file: &FileState) -> Result<bool, HostFault> {
        Ok(self.lock().disk.stage_if_here(&file.sha256))
    }

    fn see(&self, planner: &Planner<'_>) -> Result<Seen, HostFault> {
        let body = self.lock();
        let disk = &body.disk;
        let databases = disk.databases.keys();
        let mut seen = Seen {
            numbers: numbers(disk.gate),
            names: databases.clone().map(ToString::to_string).collect(),
            current: databases.cloned().collect(),
            adopted: Vec::new(),
            there: Default::default(),
        };
        for (name, role) in planner.concerned(&seen) {
            let Some(file) = disk.databases.get(&name) else {
                continue;
            };
            let there = There {
                stands: Stands::File,
                state: Some(file.clone()),
                is_current: true,
                is_placed: matches!(role, Role::Placed(digest) if digest == file.sha256),
                is_kept: planner
                    .installed_file(&name)
                    .is_some_and(|file| disk.previous.contains(&file.sha256)),
            };
            seen.there.insert(name, there);
        }
        Ok(seen)
    }

    fn perform(&self, action: &Action) -> Result<(), StepFault> {
        self.lock().perform(action)
    }

    fn others(&self, _: &Journal) -> Result<Vec<Other>, HostFault> {
        Ok(Vec::new())
    }

    fn make_trial(&self, journal: &Journal, _: &[Other]) -> Result<(), HostFault> {
        self.lock().disk.trial = journal.files.clone();
        Ok(())
    }

    fn make_control(&self, before: &Before, _: &[Other]) -> Result<(), HostFault> {
        self.lock().disk.trial = before.files.clone();
        Ok(())
    }

    fn check(&self, dir: Dir, expected: FileState) -> FileCheck {
        let found = match dir == Dir::Databases {
            true => self.lock().disk.databases.get(&expected.name).cloned(),
            false => Some(expected.clone()),
        };
        FileCheck {
            expected,
            found,
            error: None,
        }
    }

    fn files(&self, set: &Set) -> Vec<FileState> {
        let body = self.lock();
        let disk = &body.disk;
        let files = set.manifest.files.iter();
        files
            .filter_map(|file| disk.databases.get(&file.name).cloned())
            .collect()
    }

    fn foreign(&self, _: &HashSet<&str>) -> Result<Vec<String>, HostFault> {
        Ok(Vec::new())
    }

    fn adopted(&self, _: &Manifest) -> Result<Vec<DatabaseName>, HostFault> {
        Ok(Vec::new())
    }

    fn compare(
        &self,
        installed: &Installed,
        _: &[DatabaseName],
        _: Depth,
        stop: &CancellationToken,
    ) -> Option<Vec<Sighting>> {
        (!stop.is_cancelled()).then(|| self.lock().wrong(installed))
    }

    fn updater(&self) -> Option<Updater> {
        None
    }

    fn directory(&self, dir: Dir) -> PathBuf {
        path_of(dir)
    }
}

fn path_of(dir: Dir) -> PathBuf {
    PathBuf::from(format!("/{dir:?}"))
}

fn numbers(gate: Option<InstallNumber>) -> Numbers {
    Numbers {
        canary: gate,
        gate,
        whole: gate,
    }
}

impl Prove for Shared {
    type Mark = ();

    fn mark(&self) {}

    /// Waits for the verdict that the world gives some time later, or for `stop`.
    fn prove(
        &self,
        install: InstallNumber,
        (): (),
        stop: CancellationToken,
    ) -> impl Future<Output = Verdict> + Send {
        let number = {
            let mut body = self.lock();
            body.proofs += 1;
            let number = body.proofs;
            body.asked = Some(Proving { number, install });
            number
        };
        let body = self.clone();
        poll_fn(move |_| {
            let mut body = body.lock();
            if stop.is_cancelled() {
                return Poll::Ready(Verdict::Unproven(
                    body.clamd.report(ClamdState::Up, Proof::None),
                ));
            }
            match body.verdict.take_if(|(of, _)| *of == number) {
                Some((_, verdict)) => Poll::Ready(verdict),
                None => Poll::Pending,
            }
        })
    }

    fn probe(&self, install: InstallNumber) -> impl Future<Output = Verdict> + Send {
        let mut body = self.lock();
        std::future::ready(body.probe(install))
    }

    fn ping(&self) -> impl Future<Output = ClamdReport> + Send {
        self.lock().is_clamd_up();
        std::future::ready(self.report())
    }

    fn wants_load_test(&self) -> bool {
        self.lock().is_blocking
    }

    fn begin_install(&self) {}

    fn load_test(&self, directory: &Path) -> impl Future<Output = LoadTest> + Send {
        let body = self.lock();
        let bad = body.bad.read().expect("nothing panics with it");
        let (disk, clamd) = (&body.disk, &body.clamd);
        std::future::ready(match directory == path_of(Dir::Trial) {
            true => clamd.load_test(&disk.trial, &bad),
            false => clamd.load_test(disk.databases.values(), &bad),
        })
    }

    fn memory_shortage(&self, _: &Path) -> Option<String> {
        None
    }

    fn ignores_signature_files(&self) -> bool {
        true
    }

    fn loads(&self, _: &DatabaseName) -> bool {
        true
    }

    fn report(&self) -> ClamdReport {
        let clamd = &self.lock().clamd;
        let state = match clamd.wanted && clamd.loaded.is_some() {
            true => ClamdState::Up,
            false => ClamdState::Down,
        };
        clamd.report(state, Proof::None)
    }
}
