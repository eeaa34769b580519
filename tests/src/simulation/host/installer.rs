//! What the installer does around its machine: the machine decides, the disk and clamd follow.

use super::*;
use clamcast_proto::receipt::InstallNumber;

impl Host {
    /// Ends on disk what was interrupted, and goes on with it.
    pub(super) fn start(&mut self, sight: &mut Sight<'_>) {
        self.up = true;
        let Some(journal) = self.disk.journal.clone() else {
            self.clamd.is_up(&self.disk, sight.bad);
            self.mind.slot = Slot::new(true);
            self.slotted(Slotted::Installed { fault: false }, sight);
            return sight.later(Duration::ZERO, HostEvent::Dial);
        };
        self.mind.work = Some(At::Resume(journal.set.clone()));
        let next = self.resume(journal, sight);
        if self.up {
            self.clamd.is_up(&self.disk, sight.bad);
            self.follow(next, sight);
            sight.later(Duration::ZERO, HostEvent::Dial);
        }
    }

    pub(super) fn resume(&mut self, journal: Box<Journal>, sight: &mut Sight<'_>) -> Next {
        let next = self.next_number(Some(&journal));
        self.drive(Install::Resumed { journal, next }, sight)
    }

    pub(super) fn next_number(&self, journal: Option<&Journal>) -> InstallNumber {
        let installed = self
            .disk
            .installed
            .as_ref()
            .map(|installed| installed.install);
        let journal = journal.map(|journal| journal.install);
        let seen = [self.disk.gate, journal, installed];
        let highest = seen.into_iter().flatten().max().unwrap_or_default();
        highest.next().expect("a simulation is short")
    }

    /// An install begins with a whole set. `Ok(false)`: the host has crashed.
    pub(super) fn recover(&mut self, sight: &mut Sight<'_>) -> Result<bool, String> {
        let open = self.mind.machine.journal().cloned();
        let Some(open) = open.filter(|journal| journal.step != Step::Waiting) else {
            return Ok(true);
        };
        match self.resume(Box::new(open), sight) {
            Next::Gone => Ok(false),
            Next::Finish(ending)
                if matches!(ending.outcome, Outcome::HostFault | Outcome::Refused)
                    && self.is_unfinished() =>
            {
                Err(ending.error.unwrap_or_default())
            }
            Next::Finish(_) | Next::Prove(_) | Next::Nothing => Ok(true),
        }
    }

    pub(super) fn is_unfinished(&self) -> bool {
        let open = self
            .mind
            .machine
            .journal()
            .filter(|open| open.step == Step::Swapping);
        open.is_some_and(|open| open.files.iter().all(|file| self.disk.has(&file.sha256)))
    }

    pub(super) fn swap(&mut self, sight: &mut Sight<'_>) {
        if self.mind.work.is_some() {
            return sight.later(Duration::from_secs(1), HostEvent::Swap); // it waits for it
        }
        let Some(job) = self.mind.slot.job().cloned() else {
            unreachable!("an install is ended before anything else begins");
        };
        self.mind.work = Some(At::Install(job.clone()));
        if !job.rehash
            && let Some(refusal) = self.refusal(&job.manifest).cloned()
        {
            let next = Next::Finish(InstallEnding {
                outcome: Outcome::Refused,
                install: refusal.install,
                clamd: self.report(),
                error: Some(format!("refused before: {}", refusal.error)),
            });
            return self.follow(next, sight);
        }
        let next = match self.recover(sight) {
            Ok(false) => return,
            Err(fault) => Next::Finish(self.host_fault(&fault)),
            Ok(true) if !self.missing(&job.manifest).is_empty() => {
                Next::Finish(self.host_fault("a file is not staged"))
            }
            Ok(true) => {
                let event = self.prepare(&job, sight);
                self.drive(event, sight)
            }
        };
        self.follow(next, sight);
    }

    pub(super) fn prepare(&mut self, job: &Job, sight: &mut Sight<'_>) -> Install {
        let set = Set::from(&*job.manifest);
        let open = self.mind.machine.journal();
        let install = self.next_number(open);
        let files = set.files();
        let names = self.disk.databases.keys();
        let withdraw: Vec<_> = names
            .filter(|name| set.manifest.file(name).is_none())
            .cloned()
            .collect();
        let in_place = self.disk.holds(&files);
        self.disk.stage_what_is_here(&files);
        let unproven = open.is_some_and(|open| open.pass < open.passes);
        let hides = self
            .disk
            .gate
            .is_some_and(|gate| install.0 <= gate.0 + GATE_SPAN);
        if let Some(installed) = &self.disk.installed
            && in_place
            && open.is_none()
            && installed.outcome == Outcome::Live
            && installed.set.manifest.content == set.manifest.content
            && let Verdict::Live(report) =
                self.clamd.probe(installed.install, &self.disk, sight.bad)
        {
            let install = installed.install;
            let moved = Installed {
                set,
                install,
                outcome: Outcome::Live,
            };
            return Install::Moved(Box::new(moved), report);
        }
        let before = Before {
            installed: self.disk.installed.as_deref().cloned(),
            files: self.disk.databases.values().cloned().collect(),
            moved: Vec::new(),
            others: false,
        };
        Install::Begin(Box::new(Journal {
            set,
            install,
            pass: 1,
            passes: if withdraw.is_empty() && !unproven && hides {
                1
            } else {
                2
            },
            way: Way::Forward,
            step: Step::Swapping,
            touched: false,
            whole: false,
            control: false,
            files,
            before,
            obsolete: Vec::new(),
            adopt: Vec::new(),
            restore: Vec::new(),
            withdraw,
            later: Vec::new(),
        }))
    }

    /// A set is blamed only if it was there.
    pub(super) fn judged(&mut self, verdict: Verdict, sight: &mut Sight<'_>) -> Next {
        let open = self.mind.machine.journal();
        let changed =
            open.is_some_and(|open| open.way == Way::Forward && !self.disk.holds(&open.files));
        let verdict = match verdict {
            Verdict::Refused { ref report, .. } if changed => Verdict::Unproven(report.clone()),
            Verdict::Live(_)
            | Verdict::Refused { .. }
            | Verdict::Unproven(_)
            | Verdict::Absent(_) => verdict,
        };
        self.drive(Install::Judged(verdict, Blame::Set), sight)
    }

    pub(super) fn drive(&mut self, mut event: Install, sight: &mut Sight<'_>) -> Next {
        loop {
            let writes = self.mind.machine.handle(event);
            if writes.is_empty() {
                return Next::Nothing;
            }
            event = Install::Done;
            for write in writes {
                match self.write(write, sight) {
                    Ok(None) => {}
                    Ok(Some(next)) => return next,
                    Err(touched) => {
                        let fault = "the disk failed".to_owned();
                        event = Install::Failed { fault, touched };
                        break;
                    }
                }
            }
        }
    }

    /// `Err`: the disk failed, and whether something in the database directory was changed.
    pub(super) fn write(
        &mut self,
        write: Write,
        sight: &mut Sight<'_>,
    ) -> Result<Option<Next>, bool> {
        match write {
            Write::Prove(journal) => return Ok(Some(Next::Prove(journal.install))),
            Write::Finish(ending) => return Ok(Some(Next::Finish(ending))),
            Write::Swap(journal) => {
                let (fate, touched) = self.disk.swap(&journal, sight.random);
                if fate == Fate::Done {
                    // The way back leads to what was there, damaged or not.
                    let old = journal.before.installed.as_ref();
                    let set = match journal.way {
                        Way::Forward => Some(&journal.set),
                        Way::Back { .. } => old.map(|old| &old.set),
                    };
                    self.lacking = set.is_some_and(|set| !self.disk.holds(&set.files()));
                }
                return self.came(fate, touched, sight);
            }
            // It fails without a word.
            Write::TrySave(journal) => {
                let fate = self.disk.fate();
                if fate == Fate::Done {
                    self.disk.journal = Some(journal);
                }
                let fate = if fate == Fate::Fault {
                    Fate::Done
                } else {
                    fate
                };
                return self.came(fate, false, sight);
            }
            // Every host has a clamscan: clamd alone is nobody's evidence.
            Write::Again(_) => return Err(false),
            Write::Place(_) => unreachable!("no generation differs in signature files alone"),
            Write::Save(_)
            | Write::Renumber(_)
            | Write::RemoveLater(_)
            | Write::Record(_)
            | Write::Remember(_)
            | Write::Forget
            | Write::Clean => {}
        }
        let fate = self.disk.fate();
        // What fails may have had its effect all the same.
        if fate == Fate::Done || sight.chance(0.5) {
            self.effect(write);
        }
        self.came(fate, false, sight)
    }

    pub(super) fn effect(&mut self, write: Write) {
        let disk = &mut self.disk;
        match write {
            Write::Save(journal) => disk.journal = Some(journal),
            Write::Renumber(install) => disk.gate = Some(install),
            Write::Record(installed) => disk.installed = installed,
            Write::Remember(refusal) => {
                disk.refusals
                    .retain(|known| known.manifest_sha256 != refusal.manifest_sha256);
                disk.refusals.push(*refusal);
            }
            Write::Forget => disk.journal = None,
            Write::Clean => disk.stage.clear(),
            // Nothing is kept beside the new files here.
            Write::RemoveLater(_) => {}
            Write::Swap(_)
            | Write::Place(_)
            | Write::TrySave(_)
            | Write::Prove(_)
            | Write::Again(_)
            | Write::Finish(_) => {
                unreachable!("done by themselves")
            }
        }
    }

    pub(super) fn came(
        &mut self,
        fate: Fate,
        touched: bool,
        sight: &mut Sight<'_>,
    ) -> Result<Option<Next>, bool> {
        match fate {
            Fate::Done => Ok(None),
            Fate::Fault => Err(touched),
            Fate::Crash => {
                self.crash();
                sight.deeds.push(Deed::Crash);
                Ok(Some(Next::Gone))
            }
        }
    }

    pub(super) fn follow(&mut self, next: Next, sight: &mut Sight<'_>) {
        let (ending, work) = match next {
            Next::Gone => return,
            Next::Prove(number) => {
                let takes = self.takes(2.0, 40.0, sight);
                return sight.later(takes, HostEvent::Judge(number));
            }
            Next::Finish(ending) => (Some(ending), self.mind.work.take()),
            Next::Nothing => (None, self.mind.work.take()),
        };
        match work {
            Some(At::Install(job)) => {
                let ending = ending.unwrap_or_else(|| InstallEnding {
                    outcome: Outcome::Installed,
                    install: InstallNumber::NONE,
                    clamd: self.report(),
                    error: None,
                });
                let set = Set::from(&*job.manifest);
                let installed = self.disk.installed.as_ref().map(|it| it.set.sha256());
                let stays = self.mind.machine.waits_for_clamd() && installed == Some(set.sha256());
                let fault = ending.outcome == Outcome::HostFault && !stays;
                self.complete(&set, ending, sight);
                self.slotted(Slotted::Installed { fault }, sight);
            }
            Some(At::Resume(set)) => {
                if let Some(ending) = ending {
                    self.complete(&set, ending, sight);
                }
                self.slotted(Slotted::Installed { fault: false }, sight);
            }
            Some(At::Probe(set)) => {
                if let Some(ending) = ending {
                    let fault = ending.outcome == Outcome::HostFault;
                    self.complete(&set, ending, sight);
                    let installed = self.disk.installed.as_ref().map(|it| it.set.sha256());
                    if fault && installed != Some(set.sha256()) {
                        self.say(Said::Reoffer, sight);
                    }
                }
                self.set_probe(sight);
                self.set_mending(sight);
            }
            None => {}
        }
    }
}
