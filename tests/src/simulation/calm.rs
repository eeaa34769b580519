//! What must have become of everybody some time after the last fault: everybody has what it is
//! wanted at and clamd scans with it, or clamd refused it; or the rollout waits and says for what.

use clamcast_master::fleet::agents::{Fleet, Standing};
use clamcast_master::fleet::rollout::Run;

use super::host::Host;
use super::rules::sketch;
use super::world::World;

impl World {
    /// `Err`: what is still to come, in words.
    pub(super) fn is_calm(&self) -> Result<(), String> {
        let Some(running) = &self.master.running else {
            return Err("the master is down".to_owned());
        };
        let fleet = running.dispatcher.fleet();
        self.witness.looks_at_all(fleet, self.clock());
        let rollout = fleet.rollout();
        if let Some(owed) = rollout.owed() {
            return Err(format!("a rollback is owed: {owed:?}"));
        }
        if let Some(run) = rollout.running() {
            self.waits_for_a_reason(fleet, run)?;
        }
        let revoked = self.master.revocations();
        for host in &self.hosts {
            let out =
                revoked.is_some_and(|list| list.revoked.iter().any(|it| it.serial == host.serial));
            if host.is_itself() && !host.left && !out {
                self.is_at_rest(host, fleet)?;
            }
        }
        Ok(())
    }

    fn waits_for_a_reason(&self, fleet: &Fleet, run: &Run) -> Result<(), String> {
        let (all, _) = fleet.tallies(self.clock()).ok_or("there is no tally")?;
        let nobody = run.begun.is_empty() && all.members == 0;
        let pause = run.paused.as_ref().map(|pause| &pause.reason);
        match pause.is_some_and(|reason| !reason.is_empty()) || nobody {
            true => Ok(()),
            false => Err(format!("it neither goes on nor says why: {all:?} {run:#?}")),
        }
    }

    /// Whether the master knows what a host has, and nobody holds that against it.
    fn is_to_be_mended(host: &Host, fleet: &Fleet) -> bool {
        let known = fleet.record(&host.name);
        let known = known.and_then(|record| record.installed.as_ref());
        let body = host.body();
        let installed = body.disk.installed.as_ref();
        known.zip(installed).is_some_and(|(known, installed)| {
            known.manifest_sha256 == installed.set.sha256()
                && !fleet.rollout().is_taken_back(known.position)
        })
    }

    fn is_at_rest(&self, host: &Host, fleet: &Fleet) -> Result<(), String> {
        let (name, now) = (&host.name, self.clock());
        if host.link().is_none() {
            return Err(format!("{name} is not connected"));
        }
        let receipts = host.body().disk.records.receipts.keys().copied().collect();
        // One that the master has may stay until the next connection.
        if !self.witness.has_receipts(name, receipts) {
            return Err(format!("the master lacks receipts of {name}"));
        }
        let is_damaged = host.body().disk.is_damaged;
        if is_damaged && Self::is_to_be_mended(host, fleet) {
            return Err(format!("{name} lacks files: {}", host.said()));
        }
        let Some(wanted) = fleet.wanted(name, now) else {
            return Ok(());
        };
        let at = wanted.position();
        let standing = fleet.standing(name, now, self.master.rules.deadline);
        let body = host.body();
        let (disk, clamd) = (&body.disk, &body.clamd);
        let files = wanted.files.iter().map(|file| &file.sha256);
        let bad = self.bad.read().expect("nothing panics with it");
        let good = bad.loads(clamd.version, files);
        // What counts is what is there: of a disk that failed at the very end a record may be old
        // until the next install.
        let installed = disk.holds(wanted);
        let loaded = clamd.loaded.map(|(content, _)| content);
        let live = installed && loaded == Some(wanted.content);
        let mark = disk.records.mark.as_ref().map(|kept| kept.mark.position);
        match (standing, good) {
            (Standing::Conformant, _) if live => Ok(()),
            (Standing::Conformant, _) => Err(format!(
                "{name} counts as conformant at {}, and has {:#?} with {:?}",
                wanted.position(),
                disk.installed,
                clamd
            )),
            (Standing::Failed, false) => Ok(()),
            // It was enrolled anew, and said that it took a higher one before.
            (Standing::Failed, _) if mark > Some(at) => Ok(()),
            // Its clamd was away when the set came, and cannot start with it.
            (Standing::Behind, false) if installed => Ok(()),
            (Standing::Failed | Standing::Behind, _) => {
                drop(body);
                let said = host.said();
                let rollout = sketch(fleet.rollout());
                Err(format!(
                    "{name} is {standing:?} with {}: {said}; {rollout}; {:#?}",
                    wanted.position(),
                    fleet.record(name)
                ))
            }
        }
    }
}
