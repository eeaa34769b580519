//! Watches over the installed files: what follows from the decisions of the [`Guard`], one look or
//! repair at a time, and none while an install is under way.

use std::collections::HashMap;

use clamcast_proto::receipt::{Drift, FileState, InstallNumber};

use super::drift::{Action as GuardAction, Outages};
use super::*;
use crate::config::DriftPolicy;
use crate::install::{Findings, Set};

/// What is known of the installed files.
pub(super) struct Files {
    pub(super) guard: Guard,
    /// Whether the file system reports changes.
    pub(super) is_watched: bool,
    /// Which faults of the directory are reported.
    outages: Outages,
    pub(super) is_repairing: bool,
    /// Whether somebody else's updater is being looked for.
    is_scanning: bool,
    /// The last one that was seen.
    pub(super) updater: Option<(Updater, Timestamp)>,
    /// Why the database directory cannot be used.
    pub(super) blocked: Option<String>,
    /// Whether damaged files can come from the master alone.
    is_lacking: bool,
    /// When every byte was read last.
    pub(super) rehashed: Option<Timestamp>,
    /// The manifest of the last install.
    guarded: Option<Digest>,
    /// Databases of others, and adopted files, as of the last look or install.
    pub(super) foreign: Vec<String>,
    pub(super) adopted: Vec<DatabaseName>,
}

impl Files {
    /// Nothing is known to be wrong with the installed set.
    pub(super) fn new(guard: Guard, installed: Option<Digest>, now: Instant) -> Self {
        Self {
            guard,
            is_watched: false,
            outages: Outages::new(now),
            is_repairing: false,
            is_scanning: false,
            updater: None,
            blocked: None,
            is_lacking: false,
            rehashed: None,
            guarded: installed,
            foreign: Vec::new(),
            adopted: Vec::new(),
        }
    }

    pub(super) fn scanned(&mut self) {
        self.is_scanning = false;
    }
}

impl Core {
    /// Begins to watch. Names, kinds and lengths are looked at before anything is said to a master;
    /// what is written there, in time. Where files are left alone every byte is read first, so that
    /// they are known, and an offer does not put them back.
    pub(super) fn open(&mut self) {
        let depth = match self.files.guard.rests() {
            true => Depth::Ordered,
            false => Depth::Surface,
        };
        self.actions.push(Action::Start(Task::Look(depth)));
    }

    /// Something happened in the database directory.
    pub(super) fn touched(&mut self, run_begun: bool) {
        if self.probing.is_running && !self.is_busy() {
            // It keeps the installer, for as long as a proof takes.
            self.actions.push(Action::Cut(Cut::Probe));
        }
        self.guard_event(GuardEvent::Touched { run_begun });
    }

    /// Whether the directory is being worked on: then nothing in it is drift.
    pub(super) fn is_busy(&self) -> bool {
        self.slot.phase() != Phase::Idle || self.files.is_repairing
    }

    pub(super) fn guard_event(&mut self, event: GuardEvent) {
        for action in self.files.guard.handle(event, self.now.at, self.random) {
            match action {
                GuardAction::Scan => self.scan(),
                GuardAction::Look(depth) => self.actions.push(Action::Start(Task::Look(depth))),
                GuardAction::Keep(kept) => {
                    let record = LeftAlone::of(&kept, self.now);
                    self.save(Record::LeftAlone(record));
                }
                GuardAction::Report(drift) => self.report_drift(drift),
                GuardAction::Repair => self.repair(),
            }
        }
    }

    fn scan(&mut self) {
        if self.is_busy() || self.files.is_scanning {
            return; // it is the agent itself that works there, or was asked already
        }
        self.files.is_scanning = true;
        self.actions.push(Action::Start(Task::Scan));
    }

    pub(super) fn sighted(&mut self, updater: Option<Updater>) {
        let Some(updater) = updater else { return };
        if self.files.updater.as_ref().map(|(known, _)| known) != Some(&updater) {
            tracing::warn!(%updater, "somebody else is at work on the database directory");
        }
        self.files.updater = Some((updater.clone(), self.now.clock));
        self.guard_event(GuardEvent::Sighted(updater));
    }

    pub(super) fn looked(&mut self, looked: Looked) {
        let Looked {
            depth,
            look,
            updater,
            clamd,
        } = looked;
        self.clamd = clamd;
        self.sighted(updater);
        // No install is under way before the first look, whatever the slot says.
        let is_first = std::mem::replace(&mut self.is_opening, false);
        match look {
            // What began meanwhile changes the files itself.
            Look::Made(_) if self.is_busy() && !is_first => {
                self.guard_event(GuardEvent::NotLooked);
            }
            Look::Made(Findings {
                wrong,
                foreign,
                adopted,
            }) => {
                if !wrong.is_empty() {
                    (self.files.foreign, self.files.adopted) = (foreign, adopted);
                }
                if depth == Depth::Full {
                    self.files.rehashed = Some(self.now.clock);
                    tracing::debug!(wrong = wrong.len(), "every file was hashed anew");
                }
                let (is_right, watched) = (wrong.is_empty(), self.files.is_watched);
                self.guard_event(GuardEvent::Looked {
                    depth,
                    wrong,
                    watched,
                });
                self.unblocked(is_right);
            }
            Look::Blocked(reason) => {
                self.blocked_by(reason);
                self.guard_event(GuardEvent::NotLooked);
            }
            Look::NotNow | Look::Stopped => self.guard_event(GuardEvent::NotLooked),
        }
        if is_first {
            self.actions.push(Action::Start(Task::Resume));
            self.actions.push(Action::Start(Task::Ping));
            if let Some(greeting) = self.heard.early.take() {
                self.welcomed(greeting);
            }
        }
    }

    /// The database directory cannot be used, which is a fault of the host. [`Outages`] says whether
    /// to report it.
    fn blocked_by(&mut self, reason: String) {
        self.files.blocked = Some(reason.clone());
        if self
            .files
            .outages
            .blocked(&reason, self.now.at, self.random)
        {
            tracing::error!(reason, "the database directory cannot be used");
            self.report_host_fault(reason);
        }
    }

    /// The database directory can be used. After a reported fault the installed set is proven again,
    /// which ends the fault for the master, and a generation that could not be taken is asked for. A
    /// fault that was not reported needs neither: a failed offer is tried again in time.
    fn unblocked(&mut self, is_right: bool) {
        self.files.blocked = None;
        if !self.files.outages.usable() {
            return;
        }
        tracing::info!("the database directory can be used again");
        if self.slot.is_resting() || self.standing.installed.is_none() {
            self.say(ToMaster::Reoffer {});
        } else if is_right {
            self.repair();
        }
    }

    /// An operator ordered a look at every byte. The install that follows tells of it.
    pub(super) fn learn(&mut self, wrong: Vec<Sighting>) {
        for Sighting {
            name, found, owner, ..
        } in &wrong
        {
            tracing::warn!(
                name,
                ?found,
                owner,
                "an installed file was changed; the order mends it"
            );
        }
        self.files.guard.learn(wrong, self.now.at);
    }

    /// Tells the master, and the host's own logs, what was found. What clamd has in its memory is
    /// not changed by it, and so the outcome stays.
    fn report_drift(&mut self, drift: Vec<Drift>) {
        let Some(installed) = self.standing.installed.clone() else {
            return;
        };
        let reason = self.files.guard.reason(&self.settings.directory);
        for wrong in self.files.guard.wrong() {
            let (name, found, owner) = (&wrong.name, wrong.found, &wrong.owner);
            tracing::warn!(name, ?found, owner, reason, "an installed file was changed");
        }
        if drift.is_empty() {
            return; // canary and gate are the host's own affair
        }
        let event = match drift.iter().all(|file| file.mended) {
            true => AuditEvent::Repair,
            false => AuditEvent::Drift,
        };
        let position = Some(installed.set.manifest.position());
        let files = json!({ "files": drift, "reason": reason });
        self.note(event, position, None, files);
        let files = if event == AuditEvent::Drift {
            self.found(&installed.set)
        } else {
            installed.set.files()
        };
        let completed = Completed {
            outcome: installed.outcome,
            install: installed.install,
            files,
            foreign: self.files.foreign.clone(),
            adopted: self.files.adopted.clone(),
            blamed: None,
            clamd: self.clamd.clone(),
            error: reason,
            set: installed.set,
        };
        self.send_receipt(&completed, Duration::ZERO, drift);
    }

    /// What is on disk of the installed set, as far as the last look knows: a file that could not be read
    /// is left out.
    pub(super) fn found(&self, set: &Set) -> Vec<FileState> {
        let wrong = self.files.guard.wrong();
        let wrong: HashMap<_, _> = wrong.map(|it| (it.name.as_str(), &it.state)).collect();
        let files = set.files().into_iter();
        files
            .filter_map(|file| match wrong.get(file.name.as_str()) {
                None => Some(file),
                Some(state) => (*state).clone(),
            })
            .collect()
    }

    fn repair(&mut self) {
        if self.is_busy() {
            return self.guard_event(GuardEvent::NotLooked);
        }
        tracing::info!(
            files = self.files.guard.wrong().len(),
            "putting the published files back"
        );
        self.files.is_repairing = true;
        self.actions.push(Action::Cut(Cut::Probe));
        self.actions.push(Action::Start(Task::Repair));
    }

    pub(super) fn repaired(
        &mut self,
        repaired: Result<Option<Box<Completed>>, RepairError>,
        clamd: ClamdReport,
    ) {
        self.clamd = clamd;
        self.files.is_repairing = false;
        self.files.is_lacking = false;
        match repaired {
            Ok(Some(completed)) => self.complete(&completed, self.files.guard.since(), false),
            Ok(None) => {}
            Err(error @ RepairError::Missing(_)) => {
                tracing::warn!(
                    error = chain(&error),
                    "the master is asked for the set again"
                );
                self.files.is_lacking = true;
                self.say(ToMaster::Reoffer {});
            }
            Err(error @ RepairError::Host(_)) => {
                tracing::warn!(error = chain(&error), "cannot put the published files back");
                self.report_host_fault(chain(&error));
            }
        }
        self.schedule_probe();
    }

    /// A directory that cannot be used, and a repair that this host cannot make, are faults of the
    /// host, as with an install.
    fn report_host_fault(&mut self, reason: String) {
        let Some(installed) = self.standing.installed.clone() else {
            return;
        };
        let completed = Completed {
            outcome: Outcome::HostFault,
            install: InstallNumber::NONE,
            files: Vec::new(),
            foreign: Vec::new(),
            adopted: self.files.adopted.clone(),
            blamed: None,
            clamd: self.clamd.clone(),
            error: Some(reason),
            set: installed.set,
        };
        self.complete(&completed, self.files.guard.since(), false);
    }

    /// What a receipt about an install says of the files that were wrong before it, and what the
    /// guard has to know of it. `forced`: by an operator.
    pub(super) fn mended_by(&mut self, completed: &Completed, forced: bool) -> Vec<Drift> {
        let digest = completed.set.sha256();
        if !self.standing.has(&digest) {
            return Vec::new(); // it is about a set that did not come to stay
        }
        let good = matches!(completed.outcome, Outcome::Live | Outcome::Installed);
        let whole = good && completed.files == completed.set.files();
        let mut drift = self.files.guard.drift(false);
        for file in &mut drift {
            let published = completed.set.manifest.file(&file.name);
            let is_right = published.is_none_or(|published| {
                let mut there = completed.files.iter();
                there.any(|there| there.name == file.name && there.sha256 == published.sha256)
            });
            file.mended = good && is_right;
        }
        if !drift.is_empty() {
            let detail = json!({ "files": drift, "error": completed.error });
            let event = match whole {
                true => AuditEvent::Repair,
                false => AuditEvent::Drift,
            };
            let position = Some(completed.set.manifest.position());
            self.note(event, position, Some(completed.outcome.as_str()), detail);
        }
        if whole {
            let anew = forced || self.files.guarded.replace(digest) != Some(digest);
            self.files.is_lacking = false;
            self.guard_event(GuardEvent::Installed { anew });
        } else if good {
            self.guard_event(GuardEvent::Touched { run_begun: false });
        }
        drift
    }

    /// Why an offer of what is installed is not taken: it would put files back that are to stay as
    /// they are. `None` if it is taken.
    pub(super) fn stands_back(&self) -> Option<String> {
        let reason = self.files.guard.reason(&self.settings.directory);
        reason.filter(|_| self.files.guard.holds_back())
    }

    /// Whether the set can be called installed: not if files of it can come from the master alone.
    pub(super) fn is_lacking(&self) -> bool {
        self.files.is_lacking && self.files.guard.policy() == DriftPolicy::Repair
    }
}
