//! A clamd that is made up: it loads what is in the directory, if its version can.

use clamcast_agent::clamd::{LoadTest, Verdict};
use clamcast_proto::Digest;
use clamcast_proto::manifest::content_digest;
use clamcast_proto::receipt::{ClamdReport, ClamdState, FileState, InstallNumber, Proof};

use crate::simulation::contents::Bad;
use crate::simulation::disk::Disk;

/// A host's clamd.
#[derive(Debug, Default)]
pub(in crate::simulation) struct Clamd {
    pub(in crate::simulation) version: u32,
    /// Whether somebody wants it to run.
    pub(in crate::simulation) wanted: bool,
    /// The content and the number that it has in memory, if it runs.
    pub(in crate::simulation) loaded: Option<(Digest, Option<InstallNumber>)>,
    /// Whether it loaded that while the directory held no whole set, through no doing of the agent:
    /// somebody had damaged it, or had started clamd while the disk failed.
    pub(in crate::simulation) unlucky: bool,
}

impl Clamd {
    pub(super) fn new(version: u32) -> Self {
        Self {
            version,
            wanted: true,
            loaded: None,
            unlucky: false,
        }
    }

    /// Whether it answers; it comes up by itself where it can.
    pub(in crate::simulation) fn is_up(&mut self, disk: &Disk, bad: &Bad) -> bool {
        if self.wanted && self.loaded.is_none() && self.load(disk, bad) {
            let installed = disk.installed.as_ref();
            self.unlucky = !installed.is_some_and(|it| disk.holds(&it.set.manifest));
        }
        self.wanted && self.loaded.is_some()
    }

    /// Loads what is in the directory; what it has in memory stays if it cannot.
    fn load(&mut self, disk: &Disk, bad: &Bad) -> bool {
        let files = || disk.databases.values();
        let loads =
            !disk.databases.is_empty() && bad.loads(self.version, files().map(|file| &file.sha256));
        if loads {
            let content = content_digest(files().map(|f| (&f.name, f.size, &f.sha256)));
            self.loaded = Some((content, disk.gate));
        }
        loads
    }

    pub(in crate::simulation) fn stop(&mut self) {
        self.wanted = false;
        self.loaded = None;
    }

    pub(in crate::simulation) fn report(&self, state: ClamdState, proof: Proof) -> ClamdReport {
        ClamdReport {
            state,
            version: Some(format!("ClamAV 1.{}", self.version)),
            proof,
            note: None,
        }
    }

    /// What this host's `clamscan` makes of some files.
    pub(super) fn load_test<'f>(
        &self,
        files: impl IntoIterator<Item = &'f FileState>,
        bad: &Bad,
    ) -> LoadTest {
        let mut files = files.into_iter();
        match files.find(|file| !bad.loads(self.version, [&file.sha256])) {
            Some(file) => LoadTest::Failed(format!("Can't load {}: Malformed database", file.name)),
            None => LoadTest::Passed,
        }
    }

    fn has_number(&self, number: InstallNumber) -> bool {
        self.loaded.is_some_and(|(_, gate)| gate == Some(number))
    }

    /// One look, without a reload.
    pub(super) fn probe(&mut self, number: InstallNumber, disk: &Disk, bad: &Bad) -> Verdict {
        if !self.is_up(disk, bad) {
            return Verdict::Absent(self.report(ClamdState::Down, Proof::None));
        }
        match self.has_number(number) {
            true => Verdict::Live(self.report(ClamdState::Up, Proof::Canary)),
            false => Verdict::Unproven(self.report(ClamdState::Up, Proof::None)),
        }
    }

    /// A reload, and what it shows.
    pub(super) fn prove(
        &mut self,
        number: InstallNumber,
        disk: &Disk,
        bad: &Bad,
        silent: bool,
    ) -> Verdict {
        if !self.wanted {
            return Verdict::Absent(self.report(ClamdState::Down, Proof::None));
        }
        if silent {
            return Verdict::Unproven(self.report(ClamdState::Silent, Proof::None));
        }
        if !self.load(disk, bad) {
            let scan = self.load_test(disk.databases.values(), bad);
            return Verdict::Refused {
                scan,
                reason: "Malformed database".to_owned(),
                control: true,
                report: self.report(ClamdState::Up, Proof::None),
            };
        }
        self.unlucky = disk.is_damaged;
        self.probe(number, disk, bad)
    }
}
