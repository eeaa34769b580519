//! What came of an install: for the log, the audit log, the master, and those who ask for the status.

use clamcast_proto::receipt::{ClamdState, Contents, Drift, ERROR_BYTES_MAX, ReceiptFile};
use clamcast_proto::wire::Feature;

use super::status::{DriftStatus, HeldBack, LastStatus, RepairWait, Status, Surroundings};
use super::*;

/// Most files that a receipt lists for a master of version 0.1.0, which publishes no more.
const LISTED_MAX: usize = 2_000;

impl Core {
    /// What came of an install goes into the logs and to the master. `since`: when the offer was
    /// made, if it was in this run; `forced`: by an operator.
    pub(super) fn complete(&mut self, completed: &Completed, since: Option<Instant>, forced: bool) {
        let position = completed.set.manifest.position();
        let error = completed.error.as_deref().map(bounded);
        let took = since.map_or_else(
            || {
                let took = self
                    .trusted
                    .accepted
                    .map(|since| self.now.clock.duration_since(since));
                // The clock may have been set back.
                took.and_then(|took| Duration::try_from(took).ok())
                    .unwrap_or_default()
            },
            |since| self.now.at.saturating_duration_since(since),
        );
        let secs = took.as_secs_f64();
        match completed.outcome {
            Outcome::Live => tracing::info!(%position, took = secs, "live"),
            Outcome::Installed => tracing::warn!(
                %position, error, "installed, and clamd has yet to be seen with it"
            ),
            Outcome::Refused => tracing::error!(%position, error, "refused by clamd"),
            Outcome::HostFault => tracing::warn!(%position, error, "this host cannot take it"),
        }
        let outcome = Some(completed.outcome.as_str());
        let detail = json!({
            "install": completed.install, "error": error, "took": secs,
            "adopted": completed.adopted,
        });
        self.note(AuditEvent::Installed, Some(position), outcome, detail);
        let back = self.installed().filter(|back| *back != position);
        if completed.outcome == Outcome::Refused && back.is_some() {
            let detail = json!({ "refused": position.to_string() });
            self.note(AuditEvent::RolledBack, back, None, detail);
        }
        self.files.foreign = completed.foreign.clone();
        self.files.adopted = completed.adopted.clone();
        let drift = self.mended_by(completed, forced);
        self.send_receipt(completed, took, drift);
    }

    /// Signs, keeps and sends a receipt.
    pub(super) fn send_receipt(
        &mut self,
        completed: &Completed,
        took: Duration,
        drift: Vec<Drift>,
    ) {
        let manifest = &completed.set.manifest;
        let is_short =
            self.heard.accepts.has(Feature::ShortReceipts) || completed.files.len() > LISTED_MAX;
        let contents = is_short.then(|| Contents::of(manifest, &completed.files));
        let (content, files, missing, unlisted) = match contents {
            Some(it) => (Some(it.content), it.files, it.missing, it.unlisted),
            None => (None, completed.files.clone(), Vec::new(), 0),
        };
        let files = files
            .into_iter()
            .map(|file| ReceiptFile::new(file, manifest));
        let (identity, time) = (&self.identity, self.now.clock);
        let receipt = |seq| Receipt {
            fleet: identity.fleet.clone(),
            agent: identity.agent.clone(),
            seq,
            epoch: manifest.epoch,
            generation: manifest.generation,
            manifest_sha256: completed.set.sha256(),
            install: completed.install,
            outcome: completed.outcome,
            content,
            files: files.collect(),
            missing,
            unlisted,
            foreign: completed.foreign.clone(),
            adopted: completed.adopted.clone(),
            drift,
            clamd: completed.clamd.clone(),
            error: completed.error.as_deref().map(bounded),
            blamed: completed.blamed.clone(),
            took: took.as_secs_f64(),
            time,
        };
        let (records, receipt) = self.receipts.add(&identity.key, receipt);
        for record in records {
            self.save(record);
        }
        self.say(ToMaster::Receipt { receipt });
    }

    /// Where this host is, in one line.
    pub fn summary(&self, clamd: ClamdState) -> String {
        let installed = self.standing.installed.as_ref();
        let generation = match installed {
            None => "nothing installed".to_owned(),
            Some(installed) => {
                let position = installed.set.manifest.position();
                let word = if self.is_live(Some(installed.outcome), clamd) {
                    "live"
                } else {
                    "not live"
                };
                format!("generation {position} {word}")
            }
        };
        let job = self.slot.job().map(|job| job.manifest.position());
        let job = job.map_or_else(String::new, |job| format!(", installing {job}"));
        match &self.master {
            Master::Connected { address, .. } => {
                format!("{generation}{job}, connected to {address}")
            }
            Master::Away { .. } => format!("{generation}{job}, not connected to the master"),
        }
    }

    /// Whether clamd scans with the whole installed set, whose outcome this is.
    fn is_live(&self, outcome: Option<Outcome>, clamd: ClamdState) -> bool {
        outcome == Some(Outcome::Live)
            && self.files.guard.wrong().len() == 0
            && self.files.blocked.is_none()
            && clamd != ClamdState::Down
    }

    /// The agent at this moment, for operators.
    pub fn status(&self, now: Now, around: Surroundings) -> Status {
        let installed = self.standing.installed.as_ref();
        let manifest = installed.map(|installed| &installed.set.manifest);
        let outcome = installed.map(|installed| installed.outcome);
        let last = self.receipts.last();
        let unwell = last.filter(|last| last.outcome != Outcome::Live);
        let (held_back, held_back_more) =
            manifest.map_or_else(Default::default, |it| HeldBack::of(it));
        let unused = self.unused_configuration.as_ref();
        let unused = unused.map(|reason| format!("configuration on disk is not in use: {reason}"));
        let alarms: Vec<_> = unused.into_iter().chain(around.invalid).collect();
        let stale_since = self.stale_since(now.clock);
        Status {
            held_back,
            held_back_more,
            fleet: self.identity.fleet.clone(),
            agent: self.identity.agent.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            master: self.master.status(),
            epoch: manifest.map(|manifest| manifest.epoch),
            generation: manifest.map(|manifest| manifest.generation),
            content: manifest.map(|manifest| manifest.content),
            published: manifest.map(|manifest| manifest.created),
            install: installed.map(|installed| installed.install),
            files: manifest.map_or_else(Vec::new, |manifest| {
                manifest.files.iter().map(|f| f.name.clone()).collect()
            }),
            unsigned: manifest
                .map_or_else(Vec::new, |manifest| manifest.unsigned().cloned().collect()),
            live: self.is_live(outcome, around.clamd.state),
            outcome: last.map(|last| last.outcome).or(outcome),
            alarm: (!alarms.is_empty()).then(|| alarms.join("; ")),
            phase: self.phase(),
            working_on: self.slot.job().map(|job| job.manifest.position()),
            last: last.map(LastStatus::from),
            fresh_until: self.heard.fresh.as_ref().map(|fresh| fresh.until),
            stale: stale_since.is_some(),
            stale_since,
            clamd: around.clamd,
            foreign: last.map_or_else(Vec::new, |last| last.foreign.clone()),
            adopted: last.map_or_else(Vec::new, |last| last.adopted.clone()),
            drift: DriftStatus {
                policy: self.files.guard.policy(),
                files: self.files.guard.drift(false),
                reason: self.files.guard.reason(&self.settings.directory),
                repair_waits: self.repair_waits(now),
                updater: self
                    .files
                    .updater
                    .as_ref()
                    .map(|(updater, _)| updater.to_string()),
                updater_seen: self.files.updater.as_ref().map(|(_, time)| *time),
                rehashed: self.files.rehashed,
                watched: around.watched,
                blind: around.blind,
            },
            error: self
                .heard
                .refusal
                .clone()
                .or_else(|| self.files.blocked.clone())
                .or_else(|| self.files.guard.reason(&self.settings.directory))
                .or_else(|| unwell.and_then(|last| last.error.clone())),
            receipts_pending: self.receipts.pending().len(),
            certificate_expires: around.certificate_expires,
            certificate_expired: around.certificate_expires < now.clock,
            root: self.trusted.trust.root().id(),
            keys_version: self.trusted.trust.keys().version,
        }
    }

    /// How long the repair of a changed file is put off, if it is.
    fn repair_waits(&self, now: Now) -> Option<RepairWait> {
        if self.files.is_repairing {
            return None;
        }
        let wait = self.files.guard.wait(now.at)?;
        Some(RepairWait {
            since: now.time(wait.since),
            until: now.time(wait.until),
        })
    }
}

/// An error that fits a receipt.
fn bounded(error: &str) -> String {
    let end = error.floor_char_boundary(ERROR_BYTES_MAX);
    error[..end].to_owned()
}
