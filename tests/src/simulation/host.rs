//! A host: the real slot, install machine and trust, on a disk and with a clamd that are made up.
//!
//! What the keeper and the installer do around them is done here in the same order.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clamcast_agent::clamd::Verdict;
use clamcast_agent::clamd::proof::GATE_SPAN;
use clamcast_agent::core::keeper::{CLAMD_LOOK, PROBE, PROGRESS};
use clamcast_agent::core::slot::{Action, Ending, Event as Slotted, Slot, Work};
use clamcast_agent::install::journal::{
    Before, Ending as InstallEnding, Installed, Journal, Refusal, Step, Way,
};
use clamcast_agent::install::machine::{Action as Write, Event as Install, Machine};
use clamcast_agent::install::{Blame, Set};
use clamcast_agent::link::RETRY;
use clamcast_agent::link::backoff::Backoff;
use clamcast_proto::dsse::{PublicKey, Verified, sign};
use clamcast_proto::identity::Serial;
use clamcast_proto::keys::KeySet;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::{
    ClamdReport, ClamdState, FileState, InstallNumber, Outcome, Proof, Receipt, ReceiptFile,
};
use clamcast_proto::trust::Trust;
use clamcast_proto::wire::{OfferId, Phase, RECEIPTS_PENDING_MAX};
use clamcast_proto::{AgentName, DatabaseName, Digest, FleetName, GroupName, Position};
use ed25519_dalek::SigningKey;
use jiff::{SignedDuration, Timestamp};
use rand::Rng as _;
use rand::rngs::StdRng;

mod clamd;
mod installer;
mod lies;

pub(super) use clamd::Clamd;

use lies::Lying;

use super::contents::{Bad, CLAMD_VERSIONS};
use super::disk::{Disk, Fate, Trouble};
use super::network::{LinkNumber, Said, Told};

/// Files that are missing are asked for again after this: the longest wait of the agent's guard.
const MEND_AGAIN: Duration = Duration::from_secs(15 * 60);

/// One host.
pub(super) struct Host {
    pub(super) name: AgentName,
    pub(super) groups: Vec<GroupName>,
    pub(super) serial: Serial,
    key: SigningKey,
    pub(super) honest: bool,
    /// Whether another host has its name, key and certificate: a cloned machine, or a stolen key.
    pub(super) cloned: bool,
    pub(super) clamd: Clamd,
    pub(super) disk: Disk,
    /// Whether the agent runs, and how often it was started.
    pub(super) up: bool,
    pub(super) life: u32,
    /// Whether it will never come back.
    pub(super) left: bool,
    /// Whether no packet gets to the master or back.
    pub(super) cut: bool,
    /// The connection that it made last.
    pub(super) dialed: Option<LinkNumber>,
    /// How far its clock is ahead.
    pub(super) skew: SignedDuration,
    /// Everything takes so many times as long as elsewhere.
    pub(super) slowness: f64,
    /// How long it waits before a swap.
    pub(super) splay: Duration,
    /// Whether files that only the master has are missing.
    pub(super) lacking: bool,
    mind: Mind,
}

/// What the agent forgets in a crash.
struct Mind {
    slot: Slot<Job>,
    machine: Machine,
    link: Option<LinkNumber>,
    retry: Backoff,
    probe: Backoff,
    /// Whether a probe is going to be made.
    probing: bool,
    /// Whether missing files are going to be asked for again.
    mending: bool,
    /// What the installer is at.
    work: Option<At>,
    /// Files that arrive, and how often their arrival was cut short.
    receiving: BTreeSet<DatabaseName>,
    cuts: u32,
    /// When the slot is to be told the time.
    tick: Option<Instant>,
    /// Whether the job's progress is going to be told.
    telling: bool,
    /// What a dishonest host is at.
    lying: Option<Lying>,
}

#[derive(Clone, Debug)]
enum At {
    Install(Job),
    Resume(Set),
    Probe(Set),
}

/// An accepted offer.
#[derive(Clone, Debug)]
struct Job {
    offer: OfferId,
    manifest: Arc<Verified<Manifest>>,
    rehash: bool,
    /// It was taken although it is below the mark, because it is installed.
    mends: bool,
    link: LinkNumber,
}

impl Work for Job {
    fn is_same(&self, other: &Self) -> bool {
        self.manifest.payload_sha256() == other.manifest.payload_sha256()
    }
}

/// What happens on a host.
#[derive(Debug)]
pub(super) enum HostEvent {
    /// The agent starts, and clamd after it.
    Start,
    /// It is time to dial.
    Dial,
    /// The disk was looked at.
    Planned,
    /// A file has arrived, or what came of it; of the transfers after so many cuts.
    Arrived(DatabaseName, Ending, u32),
    /// The swap begins.
    Swap,
    /// clamd is asked for this number.
    Judge(InstallNumber),
    /// The slot is told the time.
    Tick,
    /// The master is told that something goes on.
    Tell,
    /// clamd is looked at once more.
    Probe,
    /// A clamd that was there is looked for.
    Look,
    /// Missing files are asked for again.
    Mend,
    /// A dishonest host goes on with its lie.
    Lie,
}

/// What a host does to the world.
#[derive(Debug)]
pub(super) enum Deed {
    Say(LinkNumber, Said),
    Later(Duration, HostEvent),
    /// The agent is gone, with the host or without.
    Crash,
    /// No packet gets to the master or back for so long.
    Vanish(Duration),
}

/// What a host sees of the world.
pub(super) struct Sight<'w> {
    pub(super) now: Instant,
    pub(super) clock: Timestamp,
    pub(super) keys: &'w Verified<KeySet>,
    pub(super) bad: &'w Bad,
    pub(super) random: &'w mut StdRng,
    pub(super) deeds: Vec<Deed>,
}

impl Sight<'_> {
    fn later(&mut self, after: Duration, event: HostEvent) {
        self.deeds.push(Deed::Later(after, event));
    }

    fn chance(&mut self, of: f64) -> bool {
        self.random.random_bool(of)
    }
}

/// Where the installer stops to ask or to say something.
enum Next {
    Prove(InstallNumber),
    Finish(InstallEnding),
    Nothing,
    /// The host has crashed.
    Gone,
}

impl Mind {
    fn new(resuming: bool) -> Self {
        Self {
            slot: Slot::new(resuming),
            machine: Machine::default(),
            link: None,
            retry: RETRY,
            probe: PROBE,
            probing: false,
            mending: false,
            work: None,
            receiving: BTreeSet::new(),
            cuts: 0,
            tick: None,
            telling: false,
            lying: None,
        }
    }
}

impl Host {
    pub(super) fn new(number: usize, groups: Vec<GroupName>, version: u32) -> Self {
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&number.to_le_bytes());
        Self {
            name: format!("h{number}").parse().expect("an agent's name"),
            groups,
            serial: Serial(format!("{number:x}")),
            key: SigningKey::from_bytes(&seed),
            honest: true,
            cloned: false,
            clamd: Clamd {
                version,
                wanted: true,
                loaded: None,
                unlucky: false,
            },
            disk: Disk::default(),
            up: false,
            life: 0,
            left: false,
            cut: false,
            dialed: None,
            skew: SignedDuration::ZERO,
            slowness: 1.0,
            splay: Duration::ZERO,
            lacking: false,
            mind: Mind::new(false),
        }
    }

    /// Another machine with the name, key and certificate of `host`.
    pub(super) fn clone_of(host: &Self) -> Self {
        Self {
            name: host.name.clone(),
            serial: host.serial.clone(),
            key: host.key.clone(),
            honest: true,
            cloned: true,
            ..Self::new(usize::MAX, host.groups.clone(), host.clamd.version)
        }
    }

    /// Whether it is a member of the fleet that says what is so.
    pub(super) fn is_itself(&self) -> bool {
        self.honest && !self.cloned
    }

    /// What its receipts are checked with.
    pub(super) fn public_key(&self) -> PublicKey {
        PublicKey::of(&self.key)
    }

    pub(super) fn link(&self) -> Option<LinkNumber> {
        self.mind.link.filter(|_| self.up)
    }

    /// Where it is, in words.
    pub(super) fn said(&self) -> String {
        let (disk, clamd) = (&self.disk, &self.clamd);
        let installed = disk.installed.as_ref();
        let installed = installed.map(|it| (it.set.manifest.generation, it.outcome, it.install));
        let journal = disk.journal.as_ref();
        let journal = journal.map(|it| (it.set.manifest.generation, &it.way, &it.step));
        let mark = disk.mark.as_ref().map(|mark| mark.position);
        format!(
            "took {mark:?}, has {installed:?}, journal {journal:?}, slot {:?} {:?}, lacking {}, {clamd:?}",
            self.mind.slot.phase(),
            self.mind.slot.job().map(|job| job.manifest.generation),
            self.lacking,
        )
    }

    /// The agent is gone; what is on disk stays.
    pub(super) fn crash(&mut self) {
        self.up = false;
        self.life += 1;
        self.mind = Mind::new(true);
    }

    pub(super) fn on(&mut self, event: HostEvent, sight: &mut Sight<'_>) {
        match event {
            HostEvent::Start => self.start(sight),
            HostEvent::Dial => {} // the network's matter
            HostEvent::Planned => self.planned(sight),
            HostEvent::Arrived(name, ending, cuts) => {
                if cuts == self.mind.cuts && self.mind.receiving.remove(&name) {
                    self.arrived(name, ending, sight);
                }
            }
            HostEvent::Swap => self.swap(sight),
            HostEvent::Judge(number) => {
                let silent = sight.chance(0.03);
                let verdict = self
                    .clamd
                    .prove(number, &self.disk, sight.bad, self.lacking, silent);
                let next = self.judged(verdict, sight);
                self.follow(next, sight);
            }
            HostEvent::Tick => {
                let due = self.mind.tick.take_if(|tick| *tick <= sight.now);
                if due.is_some() && self.mind.slot.deadline().is_some_and(|at| at <= sight.now) {
                    self.slotted(Slotted::Tick, sight);
                }
                self.set_tick(sight);
            }
            HostEvent::Tell => {
                self.mind.telling = false;
                self.tell(sight);
            }
            HostEvent::Probe => self.probe(sight),
            HostEvent::Look => self.look(sight),
            HostEvent::Lie => self.lies_on(sight),
            HostEvent::Mend => {
                self.mind.mending = false;
                self.mend(sight);
                self.set_mending(sight);
            }
        }
    }

    // The connection.

    /// How long to wait before the next try.
    pub(super) fn retry(&mut self, rejected: bool, was_welcome: bool, random: f64) -> Duration {
        if was_welcome && !rejected {
            self.mind.retry.reset();
        }
        self.mind.retry.next(random)
    }

    pub(super) fn lost(&mut self, link: LinkNumber, sight: &mut Sight<'_>) -> bool {
        if self.mind.link != Some(link) {
            return false;
        }
        self.mind.link = None;
        self.slotted(Slotted::Disconnected, sight);
        true
    }

    pub(super) fn heard(&mut self, link: LinkNumber, told: Told, sight: &mut Sight<'_>) {
        match told {
            Told::Welcome => {
                self.mind.link = Some(link);
                let installed = self.disk.installed.as_ref().filter(|_| !self.lacking);
                let outcome = installed.map(|installed| installed.outcome);
                let installed = installed.map(|installed| installed.set.clone().into());
                let mut clamd = self.clamd.report(ClamdState::Up, Proof::None);
                if !self.honest {
                    clamd.version = Some(self.claimed_version(sight));
                }
                let hello = Said::Hello {
                    installed,
                    outcome,
                    clamd,
                };
                self.say(hello, sight);
                for receipt in self.disk.receipts.values() {
                    let said = Said::Receipt(Box::new(receipt.clone()));
                    sight.deeds.push(Deed::Say(link, said));
                }
                if self.lacking {
                    self.say(Said::Reoffer, sight);
                }
            }
            Told::Offer {
                offer,
                manifest,
                rehash,
            } => match self.honest {
                true => self.offered(link, offer, manifest, rehash, sight),
                false => self.lie(link, offer, manifest, rehash, sight),
            },
            Told::Part { offer, name } => self.part(offer, name, sight),
            Told::Acknowledge(seq) => {
                self.disk.receipts.remove(&seq);
            }
        }
    }

    fn say(&self, said: Said, sight: &mut Sight<'_>) {
        if let Some(link) = self.mind.link {
            sight.deeds.push(Deed::Say(link, said));
        }
    }

    // An offer, and what the slot makes of it.

    fn offered(
        &mut self,
        link: LinkNumber,
        offer: OfferId,
        manifest: Arc<Verified<Manifest>>,
        rehash: bool,
        sight: &mut Sight<'_>,
    ) {
        if self.mind.link != Some(link) {
            return;
        }
        let trust = Trust::new(sight.keys.clone(), self.disk.mark.clone());
        if let Err(error) = trust.judge_manifest(manifest.envelope(), self.settled()) {
            let message = error.to_string();
            return self.say(Said::Declined { offer, message }, sight);
        }
        if let Some(mark) = trust.raised(&manifest) {
            self.disk.mark = Some(mark);
        }
        let mends = trust.is_below(&manifest);
        let job = Job {
            offer,
            manifest,
            rehash,
            mends,
            link,
        };
        if job.rehash {
            self.say_progress(&job, Phase::Fetching, None, sight);
        }
        self.slotted(Slotted::Offered(job), sight);
    }

    /// What is installed, unless another set is being put in its place.
    fn settled(&self) -> Option<Digest> {
        let installed = self.disk.installed.as_ref()?.set.sha256();
        let journal = self.mind.machine.journal();
        let journal = journal.map(|journal| journal.set.sha256());
        journal
            .is_none_or(|set| set == installed)
            .then_some(installed)
    }

    fn slotted(&mut self, event: Slotted<Job>, sight: &mut Sight<'_>) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            let random = sight.random.random();
            for action in self.mind.slot.handle(event, sight.now, random) {
                events.extend(self.act(action, sight));
            }
        }
        if self.up {
            self.set_tick(sight);
            self.set_probe(sight);
            self.set_telling(sight);
            self.set_mending(sight);
        }
    }

    fn act(&mut self, action: Action<Job>, sight: &mut Sight<'_>) -> Option<Slotted<Job>> {
        match action {
            Action::Plan { job, .. } => {
                if job.mends && self.settled() != Some(job.manifest.payload_sha256()) {
                    let message = "it is not installed any more".to_owned();
                    sight.deeds.push(Deed::Say(
                        job.link,
                        Said::Declined {
                            offer: job.offer,
                            message,
                        },
                    ));
                    return Some(Slotted::Answered);
                }
                let takes = self.takes(0.1, 2.0, sight);
                sight.later(takes, HostEvent::Planned);
            }
            Action::Need(job) => {
                let files = self.missing(&job.manifest);
                let offer = job.offer;
                sight
                    .deeds
                    .push(Deed::Say(job.link, Said::Need { offer, files }));
            }
            Action::Abort => {
                self.mind.cuts += 1;
                let cuts = self.mind.cuts;
                for name in &self.mind.receiving {
                    let event = HostEvent::Arrived(name.clone(), Ending::Interrupted, cuts);
                    sight.later(Duration::from_millis(10), event);
                }
            }
            Action::Wait(job, until) => {
                let left = until.saturating_duration_since(sight.now);
                let until = sight.clock.checked_add(left).ok();
                self.say_progress(&job, Phase::Staged, until, sight);
            }
            Action::Install(job) => {
                self.say_progress(&job, Phase::Staged, None, sight);
                let takes = self.takes(0.1, 3.0, sight);
                sight.later(takes, HostEvent::Swap);
            }
            Action::Fault(job) => {
                let ending = self.host_fault("the files did not arrive, or could not be written");
                self.complete(&Set::from(&*job.manifest), ending, sight);
            }
        }
        None
    }

    /// How long something takes here, between these seconds on an ordinary host.
    fn takes(&self, from: f64, to: f64, sight: &mut Sight<'_>) -> Duration {
        Duration::from_secs_f64(sight.random.random_range(from..to) * self.slowness)
    }

    fn missing(&self, manifest: &Manifest) -> Vec<DatabaseName> {
        let files = manifest
            .files
            .iter()
            .filter(|file| !self.disk.has(&file.sha256));
        files.map(|file| file.name.clone()).collect()
    }

    fn planned(&mut self, sight: &mut Sight<'_>) {
        if self.mind.work.is_some() {
            return sight.later(Duration::from_secs(1), HostEvent::Planned); // it waits for it
        }
        let Some(job) = self.mind.slot.job().cloned() else {
            let (missing, splay) = (Vec::new(), Duration::ZERO);
            return self.slotted(Slotted::Planned { missing, splay }, sight);
        };
        if !job.rehash
            && let Some(refusal) = self.refusal(&job.manifest).cloned()
        {
            self.answer(&job, refusal, sight);
            return self.slotted(Slotted::Answered, sight);
        }
        match self.recover(sight) {
            Ok(true) => {}
            Ok(false) => return, // gone
            Err(_) => return self.slotted(Slotted::PlanFailed, sight),
        }
        if self.disk.trouble == Trouble::Full {
            return self.slotted(Slotted::PlanFailed, sight);
        }
        self.disk
            .stage_what_is_here(&Set::from(&*job.manifest).files());
        let missing = self.missing(&job.manifest);
        let digests = missing.iter().filter_map(|name| job.manifest.file(name));
        self.mind.machine.handle(Install::Planned {
            manifest: job.manifest.payload_sha256(),
            missing: digests.map(|file| file.sha256).collect(),
        });
        let splay = if job.rehash {
            Duration::ZERO
        } else {
            self.splay
        };
        self.slotted(Slotted::Planned { missing, splay }, sight);
    }

    fn part(&mut self, offer: OfferId, name: DatabaseName, sight: &mut Sight<'_>) {
        let job = self.mind.slot.job().filter(|job| job.offer == offer);
        let is_wanted = job.is_some_and(|job| job.manifest.file(&name).is_some());
        if !is_wanted || !self.mind.slot.begin(&name) {
            return;
        }
        let ending = match (self.disk.trouble, sight.random.random_range(0..100)) {
            (Trouble::Full, _) => Ending::Fault,
            (_, 0..3) => Ending::Interrupted,
            (_, 3..5) => Ending::Spoilt,
            (_, _) => Ending::Good,
        };
        self.mind.receiving.insert(name.clone());
        let takes = self.takes(0.1, 20.0, sight);
        sight.later(takes, HostEvent::Arrived(name, ending, self.mind.cuts));
    }

    fn arrived(&mut self, name: DatabaseName, ending: Ending, sight: &mut Sight<'_>) {
        let job = self.mind.slot.job();
        let file = job.and_then(|job| job.manifest.file(&name));
        if let Some(sha256) = file.map(|file| file.sha256)
            && ending == Ending::Good
        {
            self.disk.stage.insert(sha256);
            self.mind.machine.handle(Install::Arrived(sha256));
        }
        self.slotted(Slotted::PartEnded(name, ending), sight);
    }

    fn set_tick(&mut self, sight: &mut Sight<'_>) {
        let Some(at) = self.mind.slot.deadline() else {
            return;
        };
        if self.mind.tick.is_none_or(|tick| at < tick) {
            self.mind.tick = Some(at);
            sight.later(at.saturating_duration_since(sight.now), HostEvent::Tick);
        }
    }

    fn set_telling(&mut self, sight: &mut Sight<'_>) {
        let is_busy = self.mind.slot.job().is_some() && !self.mind.slot.is_resting();
        if is_busy && !self.mind.telling {
            self.mind.telling = true;
            sight.later(PROGRESS, HostEvent::Tell);
        }
    }

    /// Tells the master what is going on, if anything is.
    fn tell(&mut self, sight: &mut Sight<'_>) {
        let slot = &self.mind.slot;
        if let Some(job) = slot.job().filter(|_| !slot.is_resting()).cloned() {
            let phase = self.mind.slot.phase_given(Phase::Proving);
            if phase != Phase::Staged
                && (phase != Phase::Fetching || !self.mind.receiving.is_empty())
            {
                self.say_progress(&job, phase, None, sight);
            }
            self.set_telling(sight);
        }
    }

    fn say_progress(
        &self,
        job: &Job,
        phase: Phase,
        until: Option<Timestamp>,
        sight: &mut Sight<'_>,
    ) {
        let offer = job.offer;
        let said = Said::Progress {
            offer,
            phase,
            until,
            sent: 0,
        };
        sight.deeds.push(Deed::Say(job.link, said));
    }

    // clamd, once more.

    fn set_probe(&mut self, sight: &mut Sight<'_>) {
        let machine = &self.mind.machine;
        let on_disk = matches!(
            machine.phase(),
            Phase::Swapping | Phase::Reloading | Phase::Proving
        );
        let busy = self.mind.slot.phase() == Phase::Swapping;
        if busy || !(on_disk || machine.waits_for_clamd()) {
            self.mind.probe.reset();
        } else if !self.mind.probing && self.mind.work.is_none() {
            self.mind.probing = true;
            let wait = self.mind.probe.next(1.0);
            sight.later(wait, HostEvent::Probe);
        }
    }

    fn probe(&mut self, sight: &mut Sight<'_>) {
        self.mind.probing = false;
        if self.mind.slot.phase() == Phase::Swapping || self.mind.work.is_some() {
            return; // it is set again after that
        }
        let Some(journal) = self.mind.machine.journal().cloned() else {
            return;
        };
        self.mind.work = Some(At::Probe(journal.set.clone()));
        let next = if journal.step != Step::Waiting {
            self.resume(Box::new(journal), sight)
        } else {
            match self.clamd.probe(journal.install, &self.disk, sight.bad) {
                Verdict::Unproven(_) => Next::Prove(journal.install),
                verdict @ (Verdict::Live(_) | Verdict::Refused { .. } | Verdict::Absent(_)) => {
                    self.judged(verdict, sight)
                }
            }
        };
        self.follow(next, sight);
    }

    /// clamd has stopped: that is seen within [`CLAMD_LOOK`].
    pub(super) fn clamd_stopped(&mut self, sight: &mut Sight<'_>) {
        self.clamd.stop();
        let wait = CLAMD_LOOK.mul_f64(sight.random.random());
        sight.later(wait, HostEvent::Look);
    }

    fn look(&mut self, sight: &mut Sight<'_>) {
        let idle = self.mind.work.is_none() && self.mind.machine.journal().is_none();
        let installed = self.disk.installed.clone();
        let installed = installed.filter(|installed| installed.outcome == Outcome::Live);
        if let Some(installed) = installed
            && idle
            && self.mind.slot.phase() != Phase::Swapping
            && !self.clamd.is_up(&self.disk, sight.bad)
        {
            self.mind.work = Some(At::Probe(installed.set.clone()));
            let report = self.clamd.report(ClamdState::Down, Proof::None);
            let next = self.drive(Install::Lost(installed, report), sight);
            self.follow(next, sight);
        }
    }

    /// A file was lost that only the master has.
    pub(super) fn damage(&mut self, sight: &mut Sight<'_>) {
        let name = self.disk.databases.keys().next().cloned();
        let calm = self.mind.work.is_none() && self.mind.slot.job().is_none();
        if let Some(name) = name.filter(|_| calm && self.disk.journal.is_none()) {
            let lost = self.disk.databases.remove(&name).expect("it is a key");
            self.disk.previous.remove(&lost.sha256);
            self.lacking = true;
            self.mend(sight);
            self.set_mending(sight);
        }
    }

    /// Asks the master for the files that are missing, unless something is being done there.
    fn mend(&mut self, sight: &mut Sight<'_>) {
        let open = self.mind.machine.journal();
        let calm = open.is_none_or(|open| open.step == Step::Waiting)
            && self.mind.slot.phase() == Phase::Idle
            && self.mind.work.is_none();
        if self.lacking && calm {
            self.say(Said::Reoffer, sight);
        }
    }

    fn set_mending(&mut self, sight: &mut Sight<'_>) {
        if self.lacking && !self.mind.mending {
            self.mind.mending = true;
            sight.later(MEND_AGAIN, HostEvent::Mend);
        }
    }

    // What the master hears of it.

    fn report(&self) -> ClamdReport {
        self.clamd.report(ClamdState::Up, Proof::Canary)
    }

    fn refusal(&self, manifest: &Verified<Manifest>) -> Option<&Refusal> {
        let digest = manifest.payload_sha256();
        self.disk
            .refusals
            .iter()
            .find(|refusal| refusal.manifest_sha256 == digest)
    }

    fn answer(&mut self, job: &Job, refusal: Refusal, sight: &mut Sight<'_>) {
        let ending = InstallEnding {
            outcome: Outcome::Refused,
            install: refusal.install,
            clamd: self.report(),
            error: Some(format!("refused before: {}", refusal.error)),
        };
        self.complete(&Set::from(&*job.manifest), ending, sight);
    }

    fn host_fault(&self, error: &str) -> InstallEnding {
        InstallEnding {
            outcome: Outcome::HostFault,
            install: InstallNumber::NONE,
            clamd: self.report(),
            error: Some(error.to_owned()),
        }
    }

    fn complete(&mut self, set: &Set, ending: InstallEnding, sight: &mut Sight<'_>) {
        let files = set.manifest.files.iter();
        let files = files
            .filter_map(|file| self.disk.databases.get(&file.name))
            .map(|file| ReceiptFile::new(file.clone(), &set.manifest));
        let receipt = Receipt {
            fleet: set.manifest.fleet.clone(),
            agent: self.name.clone(),
            seq: 0,
            epoch: set.manifest.epoch,
            generation: set.manifest.generation,
            manifest_sha256: set.sha256(),
            install: ending.install,
            outcome: ending.outcome,
            content: None,
            files: files.collect(),
            missing: Vec::new(),
            unlisted: 0,
            foreign: Vec::new(),
            adopted: Vec::new(),
            drift: Vec::new(),
            clamd: ending.clamd,
            error: ending.error,
            blamed: None,
            took: 1.0,
            time: sight.clock,
        };
        self.send(receipt, sight);
    }

    fn send(&mut self, receipt: Receipt, sight: &mut Sight<'_>) {
        while self.disk.receipts.len() >= RECEIPTS_PENDING_MAX {
            self.disk.receipts.pop_first();
        }
        self.disk.receipts_made += 1;
        let seq = self.disk.receipts_made;
        let receipt = sign(Receipt { seq, ..receipt }, &self.key);
        self.disk.receipts.insert(seq, receipt.clone());
        self.say(Said::Receipt(Box::new(receipt)), sight);
    }
}
