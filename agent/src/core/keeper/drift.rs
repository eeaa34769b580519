//! The part of the keeper that watches over the installed files: it carries out what
//! [`crate::core::drift::Guard`] decides, one look or repair at a time, and none while an install
//! is under way.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use clamcast_proto::AuditEvent;
use clamcast_proto::receipt::{Drift, FileState, InstallNumber, Outcome};
use clamcast_proto::wire::{Phase, ToMaster};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Done, Keeper};
use crate::chain;
use crate::config::DriftPolicy;
use crate::core::drift::{Action, Event, Kept, REPAIRS_MAX, Rest};
use crate::core::status::{Blindness, DriftStatus, RepairWait};
use crate::host::state::{self, State};
use crate::host::updater::Updater;
use crate::install::{Completed, Depth, Look, RepairError, Set, Sighting};

/// In the state directory: why changed files are left alone, and which were put back.
const REST: &str = "left-alone.json";

/// Files whose repairs are kept. A host that repairs more has no updater, but a broken disk.
const REPAIRED_MAX: usize = 100;

/// What the guard keeps, with the times of this host's clock.
#[derive(Deserialize, Serialize)]
struct Record {
    rest: Option<RestRecord>,
    repaired: BTreeMap<String, Vec<Timestamp>>,
}

/// The file as this version writes it, or as versions before it wrote it.
#[derive(Deserialize)]
#[serde(untagged)]
enum AnyRecord {
    Now(Record),
    Before(Option<RestBefore>),
}

/// Why changed files were left alone, without times.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum RestBefore {
    Updater(Updater),
    Again,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum RestRecord {
    Updater {
        updater: Updater,
        since: Timestamp,
        seen: Timestamp,
    },
    Again,
}

/// Both clocks at one moment. The wall clock may have been set since a time was kept: a time of the
/// future counts as now.
#[derive(Clone, Copy)]
struct Clocks {
    now: Instant,
    wall: Timestamp,
}

impl Clocks {
    fn read() -> Self {
        Self {
            now: Instant::now(),
            wall: Timestamp::now(),
        }
    }

    fn instant(self, time: Timestamp) -> Instant {
        let ago = Duration::try_from(self.wall.duration_since(time)).unwrap_or_default();
        self.now.checked_sub(ago).unwrap_or(self.now)
    }

    fn time(self, instant: Instant) -> Timestamp {
        let time = match instant.checked_duration_since(self.now) {
            Some(ahead) => self.wall.checked_add(ahead),
            None => self.wall.checked_sub(self.now.duration_since(instant)),
        };
        time.unwrap_or(self.wall)
    }
}

impl Record {
    fn of(kept: &Kept, clocks: Clocks) -> Self {
        let rest = kept.rest.as_ref().map(|rest| match rest {
            Rest::Updater {
                updater,
                since,
                seen,
            } => RestRecord::Updater {
                updater: updater.clone(),
                since: clocks.time(*since),
                seen: clocks.time(*seen),
            },
            Rest::Again => RestRecord::Again,
        });
        let repaired = kept.repaired.iter().take(REPAIRED_MAX);
        let repaired = repaired.map(|(name, times)| {
            let times = times.iter().map(|time| clocks.time(*time));
            (name.clone(), times.collect())
        });
        Self {
            rest,
            repaired: repaired.collect(),
        }
    }

    fn kept(self, clocks: Clocks) -> Kept {
        let rest = self.rest.map(|rest| match rest {
            RestRecord::Updater {
                updater,
                since,
                seen,
            } => Rest::Updater {
                updater,
                since: clocks.instant(since),
                seen: clocks.instant(seen),
            },
            RestRecord::Again => Rest::Again,
        });
        let repaired = self.repaired.into_iter().take(REPAIRED_MAX);
        let repaired = repaired.map(|(name, times)| {
            let times = times.into_iter().take(REPAIRS_MAX);
            (name, times.map(|time| clocks.instant(time)).collect())
        });
        Kept {
            rest,
            repaired: repaired.collect(),
        }
    }
}

impl AnyRecord {
    fn kept(self, clocks: Clocks) -> Kept {
        let rest = match self {
            Self::Now(record) => return record.kept(clocks),
            Self::Before(rest) => rest,
        };
        let rest = rest.map(|rest| match rest {
            RestBefore::Updater(updater) => Rest::Updater {
                updater,
                since: clocks.now,
                seen: clocks.now,
            },
            RestBefore::Again => Rest::Again,
        });
        Kept {
            rest,
            repaired: BTreeMap::new(),
        }
    }
}

/// What the agent before this one left alone. Without it, repairs begin anew.
pub(crate) fn kept_rest(state: &State) -> Kept {
    let path = state.path().join(REST);
    let record = state::load::<AnyRecord>(&path, "what was left alone is repaired");
    let record = record.unwrap_or_else(|error| {
        tracing::warn!(error = chain(&error), "what was left alone is repaired");
        None
    });
    record.map_or_else(Kept::default, |record| record.kept(Clocks::read()))
}

impl Keeper {
    /// Begins to watch. Names, kinds and lengths are looked at before anything is said to a master;
    /// what is written there, in time. Where files are left alone every byte is read first, so that
    /// they are known, and an offer does not put them back.
    pub(super) fn watch_over(&mut self) {
        self.watch.follow();
        let depth = match self.guard.rests() {
            true => Depth::Ordered,
            false => Depth::Surface,
        };
        if self.guard.rests() {
            // An updater that is still at work keeps the repair waiting.
            self.scanned(Updater::find(self.watch.path()));
        }
        // No install is under way yet, whatever the slot says.
        let event = match self.installer.look(depth, &self.stop) {
            Look::Made(wrong) => Event::Looked {
                depth,
                wrong,
                watched: self.watch.is_watching(),
            },
            Look::Blocked(reason) => {
                self.blocked_by(reason);
                Event::NotLooked
            }
            Look::NotNow | Look::Stopped => Event::NotLooked,
        };
        self.guard_event(event);
    }

    /// Something happened in the database directory.
    pub(super) fn touched(&mut self, run_begun: bool) {
        if self.probing.running && !self.is_busy() {
            self.probing.stop.cancel(); // it keeps the installer, for as long as a proof takes
        }
        self.guard_event(Event::Touched { run_begun });
    }

    /// Whether the directory is being worked on: then nothing in it is drift.
    pub(super) fn is_busy(&self) -> bool {
        self.slot.phase() != Phase::Idle || self.repairing.is_some()
    }

    /// An install begins: whatever keeps the installer gives way.
    pub(super) fn give_way(&mut self) {
        self.looking.cancel();
        if let Some(repairing) = &self.repairing {
            repairing.cancel();
        }
    }

    pub(super) fn guard_event(&mut self, event: Event) {
        let (now, random) = (Instant::now(), rand::random());
        for action in self.guard.handle(event, now, random) {
            match action {
                Action::Scan => self.scan(),
                Action::Look(depth) => self.inspect(depth),
                Action::Keep(kept) => self.keep_rest(&kept),
                Action::Report(drift) => self.report_drift(drift),
                Action::Repair => self.repair(),
            }
        }
    }

    fn keep_rest(&self, kept: &Kept) {
        let record = Record::of(kept, Clocks::read());
        if let Err(error) = state::save(&self.state.path().join(REST), &record) {
            tracing::warn!(
                error = chain(&error),
                "a restart will forget what is left alone"
            );
        }
    }

    fn scan(&mut self) {
        if self.is_busy() || self.scanning {
            return; // it is the agent itself that works there, or was asked already
        }
        self.scanning = true;
        let directory = self.watch.path().to_owned();
        self.workers
            .spawn_blocking(move || Done::Scanned(Updater::find(&directory)));
    }

    pub(super) fn scanned(&mut self, updater: Option<Updater>) {
        self.scanning = false;
        if let Some(updater) = updater {
            if self.updater.as_ref().map(|(known, _)| known) != Some(&updater) {
                tracing::warn!(%updater, "somebody else is at work on the database directory");
            }
            self.updater = Some((updater.clone(), Timestamp::now()));
            self.guard_event(Event::Sighted(updater));
        }
    }

    fn inspect(&mut self, depth: Depth) {
        self.looking = self.stop.child_token();
        let (installer, stop) = (self.installer.clone(), self.looking.clone());
        let directory = self.watch.path().to_owned();
        self.workers.spawn_blocking(move || {
            let look = installer.look(depth, &stop);
            let wrong = matches!(&look, Look::Made(wrong) if !wrong.is_empty());
            let updater = wrong.then(|| Updater::find(&directory)).flatten();
            Done::Inspected(depth, look, updater)
        });
    }

    pub(super) fn inspected(&mut self, depth: Depth, look: Look, updater: Option<Updater>) {
        if updater.is_some() {
            self.scanned(updater);
        }
        let watched = self.watch.follow();
        match look {
            // What began meanwhile changes the files itself.
            Look::Made(_) if self.is_busy() => {
                self.guard_event(Event::NotLooked);
            }
            Look::Made(wrong) => {
                if depth == Depth::Full {
                    self.rehashed = Some(Timestamp::now());
                    tracing::debug!(wrong = wrong.len(), "every file was hashed anew");
                }
                let is_right = wrong.is_empty();
                self.guard_event(Event::Looked {
                    depth,
                    wrong,
                    watched,
                });
                self.unblocked(is_right);
            }
            Look::Blocked(reason) => {
                self.blocked_by(reason);
                self.guard_event(Event::NotLooked);
            }
            Look::NotNow | Look::Stopped => self.guard_event(Event::NotLooked),
        }
    }

    /// The database directory cannot be used, which is a fault of the host. [`Outages`] says whether
    /// to report it.
    fn blocked_by(&mut self, reason: String) {
        self.blocked = Some(reason.clone());
        let now = Instant::now();
        if self.outages.blocked(&reason, now, rand::random()) {
            tracing::error!(reason, "the database directory cannot be used");
            self.report_host_fault(reason);
        }
    }

    /// The database directory can be used. After a reported fault the installed set is proven again,
    /// which ends the fault for the master, and a generation that could not be taken is asked for. A
    /// fault that was not reported needs neither: a failed offer is tried again in time.
    fn unblocked(&mut self, is_right: bool) {
        self.blocked = None;
        if !self.outages.usable() {
            return;
        }
        tracing::info!("the database directory can be used again");
        if self.slot.is_resting() || self.installer.installed().is_none() {
            self.say(&ToMaster::Reoffer {});
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
        self.guard.learn(wrong, Instant::now());
    }

    /// Tells the master, and the host's own logs, what was found. What clamd has in its memory is
    /// not changed by it, and so the outcome stays.
    fn report_drift(&mut self, drift: Vec<Drift>) {
        let Some(installed) = self.installer.installed() else {
            return;
        };
        let reason = self.guard.reason(self.watch.path());
        for wrong in self.guard.wrong() {
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
        self.audit.note(event, position, None, files);
        let files = if event == AuditEvent::Drift {
            self.found(&installed.set)
        } else {
            installed.set.files()
        };
        let completed = Completed {
            outcome: installed.outcome,
            install: installed.install,
            files,
            foreign: self.installer.foreign(),
            adopted: self.installer.adopted(),
            blamed: None,
            clamd: self.installer.clamd(),
            error: reason,
            set: installed.set,
        };
        self.send_receipt(&completed, 0.0, drift);
    }

    /// What is on disk of the installed set, as far as the last look knows: a file that could not be read
    /// is left out.
    pub(super) fn found(&self, set: &Set) -> Vec<FileState> {
        let wrong = self.guard.wrong();
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
            self.guard_event(Event::NotLooked);
            return;
        }
        tracing::info!(
            files = self.guard.wrong().len(),
            "putting the published files back"
        );
        self.probing.stop.cancel();
        let stop = self.stop.child_token();
        self.repairing = Some(stop.clone());
        let (installer, progress) = (self.installer.clone(), self.progress());
        self.workers.spawn(async move {
            let repaired = installer.repair(stop, progress).await;
            Done::Repaired(repaired.map(|completed| completed.map(Box::new)))
        });
    }

    pub(super) fn repaired(&mut self, repaired: Result<Option<Box<Completed>>, RepairError>) {
        self.repairing = None;
        self.phase = Phase::Idle;
        self.lacking = false;
        match repaired {
            Ok(Some(completed)) => self.complete(&completed, self.guard.since(), false),
            Ok(None) => {}
            Err(error @ RepairError::Missing(_)) => {
                tracing::warn!(
                    error = chain(&error),
                    "the master is asked for the set again"
                );
                self.lacking = true;
                self.say(&ToMaster::Reoffer {});
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
        let Some(installed) = self.installer.installed() else {
            return;
        };
        let completed = Completed {
            outcome: Outcome::HostFault,
            install: InstallNumber::NONE,
            files: Vec::new(),
            foreign: Vec::new(),
            adopted: self.installer.adopted(),
            blamed: None,
            clamd: self.installer.clamd(),
            error: Some(reason),
            set: installed.set,
        };
        self.complete(&completed, self.guard.since(), false);
    }

    /// What a receipt about an install says of the files that were wrong before it, and what the
    /// guard has to know of it. `forced`: by an operator.
    pub(super) fn mended_by(&mut self, completed: &Completed, forced: bool) -> Vec<Drift> {
        let digest = completed.set.sha256();
        let installed = self.installer.installed();
        if installed.is_none_or(|installed| installed.set.sha256() != digest) {
            return Vec::new(); // it is about a set that did not come to stay
        }
        let good = matches!(completed.outcome, Outcome::Live | Outcome::Installed);
        let whole = good && completed.files == completed.set.files();
        let mut drift = self.guard.drift(false);
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
            self.audit
                .note(event, position, Some(completed.outcome.as_str()), detail);
        }
        if whole {
            let anew = forced || self.guarded.replace(digest) != Some(digest);
            self.lacking = false;
            self.guard_event(Event::Installed { anew });
        } else if good {
            self.guard_event(Event::Touched { run_begun: false });
        }
        drift
    }

    pub(super) fn drift_status(&self) -> DriftStatus {
        DriftStatus {
            policy: self.guard.policy(),
            files: self.guard.drift(false),
            reason: self.guard.reason(self.watch.path()),
            repair_waits: self.repair_waits(),
            updater: self
                .updater
                .as_ref()
                .map(|(updater, _)| updater.to_string()),
            updater_seen: self.updater.as_ref().map(|(_, time)| *time),
            rehashed: self.rehashed,
            watched: self.watch.is_watching(),
            blind: self.watch.blind().map(Blindness::from),
        }
    }

    /// How long the repair of a changed file is put off, if it is.
    fn repair_waits(&self) -> Option<RepairWait> {
        if self.repairing.is_some() {
            return None;
        }
        let clocks = Clocks::read();
        let wait = self.guard.wait(clocks.now)?;
        Some(RepairWait {
            since: clocks.time(wait.since),
            until: clocks.time(wait.until),
        })
    }

    /// Why an offer of what is installed is not taken: it would put files back that are to stay as
    /// they are. `None` if it is taken.
    pub(super) fn stands_back(&self) -> Option<String> {
        let reason = self.guard.reason(self.watch.path());
        reason.filter(|_| self.guard.holds_back())
    }

    /// Whether the set can be called installed: not if files of it can come from the master alone.
    pub(super) fn is_lacking(&self) -> bool {
        self.lacking && self.guard.policy() == DriftPolicy::Repair
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upgrade_keeps_what_older_agents_left_alone() {
        let clocks = Clocks::read();
        let rest = |json: &str| {
            let record: AnyRecord = serde_json::from_str(json).unwrap();
            record.kept(clocks).rest
        };
        assert_eq!(rest("null"), None);
        assert_eq!(rest("\"again\""), Some(Rest::Again));
        let freshclam = r#"{"updater":{"name":"freshclam","pid":812,"user":"clamav"}}"#;
        let Some(Rest::Updater { updater, seen, .. }) = rest(freshclam) else {
            panic!("it is kept");
        };
        assert_eq!((updater.pid, seen), (812, clocks.now));
        assert_eq!(rest(r#"{"rest":"again","repaired":{}}"#), Some(Rest::Again));
    }

    #[test]
    fn kept_times_survive_a_restart_and_a_time_of_the_future_counts_as_now() {
        let clocks = Clocks::read();
        let ago = |secs| clocks.now - Duration::from_secs(secs);
        let kept = Kept {
            rest: Some(Rest::Updater {
                updater: Updater {
                    name: "freshclam".into(),
                    pid: 812,
                    user: "clamav".into(),
                },
                since: ago(500),
                seen: ago(60),
            }),
            repaired: [("daily.cld".to_owned(), [ago(7200)].into())].into(),
        };
        let record = || {
            let json = serde_json::to_string(&Record::of(&kept, clocks)).unwrap();
            serde_json::from_str::<Record>(&json).unwrap()
        };
        assert_eq!(record().kept(clocks), kept);
        let set_back = Clocks {
            wall: clocks.wall - Duration::from_secs(3600),
            ..clocks
        };
        let Some(Rest::Updater { seen, .. }) = record().kept(set_back).rest else {
            panic!("it is kept");
        };
        assert_eq!(seen, clocks.now);
    }
}
