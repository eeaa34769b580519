//! What honest hosts are promised, as long as dishonest hosts are a minority of each ClamAV version in
//! each wave: every good generation becomes live on all of them in bounded time, no bad one gets past
//! a first wave that has an honest canary of their version, and no message of a single host changes
//! their target generation for longer than one deadline.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use clamcast_master::config::Rules;
use clamcast_master::fleet::agents::Fleet;
use clamcast_master::fleet::rollout::Run;
use clamcast_proto::dsse::Verified;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::Outcome;
use clamcast_proto::{AgentName, Digest, Position};

use super::contents::{Bad, CLAMD_VERSIONS};
use super::host::Host;
use super::rules::sketch;
use super::world::{Event, World};

/// What a master, a network and a clamd may need beside the times that the rules of a rollout name.
const SLACK: Duration = Duration::from_secs(120);

/// Everything that was promised.
#[derive(Default)]
pub(super) struct Promises {
    runs: HashMap<Digest, Watched>,
    running: Option<Digest>,
    /// The highest generation that each host was live with.
    live: HashMap<AgentName, Position>,
    /// Offers that were made when the hosts were looked at last.
    offers: u64,
    /// Rollouts of good generations that were on all honest hosts in time.
    pub(super) kept: u64,
}

/// A rollout that is watched.
struct Watched {
    /// Dishonest hosts were a minority of each version in each of its waves so far.
    minority: bool,
    /// Waves that have begun.
    waves: usize,
    /// Versions that an honest member of the first wave has.
    canaries: BTreeSet<u32>,
}

/// Something that is due.
#[derive(Clone, Debug)]
pub(super) enum Promise {
    /// A generation is live on all honest hosts.
    Live(Digest, Position),
    /// The target generation of a host is this one again, or a newer one.
    Target(AgentName, Digest, Position),
}

/// What an honest host's target generation was.
pub(super) type Targets = Vec<(AgentName, Option<Position>)>;

/// Whether every clamd loads a generation.
fn is_good(bad: &Bad, manifest: &Manifest) -> bool {
    (0..CLAMD_VERSIONS).all(|version| loads(bad, manifest, version))
}

fn loads(bad: &Bad, manifest: &Manifest, version: u32) -> bool {
    bad.loads(version, manifest.files.iter().map(|file| &file.sha256))
}

/// Within this time of its beginning a good generation is live everywhere.
fn bound(run: &Run, rules: &Rules) -> Duration {
    let waves = run.begun.len() + run.ahead.len() + run.skipped.len();
    let waves = u32::try_from(waves).expect("a few");
    (2 * rules.deadline + rules.settle) * waves + SLACK
}

impl World {
    /// The names of hosts that are members of the fleet and say what is so.
    fn honest(&self) -> BTreeMap<&AgentName, &Host> {
        let dishonest: BTreeSet<_> = self
            .hosts
            .iter()
            .filter(|host| !host.is_itself())
            .map(|host| &host.name)
            .collect();
        let honest = self.hosts.iter().map(|host| (&host.name, host));
        honest
            .filter(|(name, _)| !dishonest.contains(name))
            .collect()
    }

    /// Whether dishonest hosts are a minority of each version that honest hosts have, in each wave.
    fn is_a_minority(&self, fleet: &Fleet, run: &Run) -> bool {
        let honest = self.honest();
        let versions: BTreeSet<_> = fleet
            .members()
            .iter()
            .filter(|member| honest.contains_key(member.name))
            .map(|member| member.version.to_owned())
            .collect();
        let mut counts: BTreeMap<(usize, String), (usize, usize)> = BTreeMap::new();
        for member in fleet.members() {
            let mut begun = run.begun.iter();
            let wave = begun.position(|begun| begun.has(member.name, member.groups));
            let is_honest = honest.contains_key(member.name);
            let Some(wave) = wave.filter(|_| member.connected || !is_honest) else {
                continue;
            };
            // In the whole wave, and in each version that honest hosts have.
            let of_version = versions.contains(member.version).then_some(member.version);
            for version in [Some("all"), of_version].into_iter().flatten() {
                let (dishonest, all) = counts.entry((wave, version.to_owned())).or_default();
                *dishonest += usize::from(!is_honest);
                *all += 1;
            }
        }
        counts
            .values()
            .all(|(dishonest, all)| *dishonest == 0 || 2 * dishonest < *all)
    }

    fn published(&self, manifest: &Digest) -> Option<&Verified<Manifest>> {
        let mut published = self.master.disk.published.iter();
        let found = published.find(|it| it.payload_sha256() == *manifest)?;
        Some(found)
    }

    /// Something has happened on a host.
    pub(super) fn is_live(&mut self, number: usize) {
        let host = &self.hosts[number];
        let body = host.body();
        let installed = body.disk.installed.as_ref();
        let live = installed.filter(|it| it.outcome == Outcome::Live);
        if let Some(position) = live
            .map(|it| it.set.manifest.position())
            .filter(|_| self.size.only_lies)
        {
            let highest = self
                .promises
                .live
                .entry(host.name.clone())
                .or_insert(position);
            *highest = position.max(*highest);
        }
    }

    /// The master has done something.
    pub(super) fn promises_follow(&mut self) {
        if !self.size.only_lies {
            return;
        }
        let Some(running) = &self.master.running else {
            return;
        };
        let fleet = running.dispatcher.fleet();
        let Some(run) = fleet.rollout().running() else {
            self.promises.running = None;
            return;
        };
        let (manifest, position) = (run.target.manifest_sha256, run.target.position);
        let is_new = self.promises.running != Some(manifest);
        let waves = run.begun.len();
        let known = self.promises.runs.get(&manifest);
        let has_begun = waves > known.map_or(0, |watched| watched.waves);
        if has_begun {
            let minority = self.is_a_minority(fleet, run);
            let honest = self.honest();
            let members = fleet.members();
            let first = members
                .iter()
                .filter(|member| member.connected && run.begun[0].has(member.name, member.groups));
            // A clamd that does not load what it has is no judge of what comes.
            let judge = |host: &&Host| {
                let body = host.body();
                let version = body.clamd.version;
                let files = body.disk.databases.values().map(|file| &file.sha256);
                let bad = self.bad.read().expect("nothing panics with it");
                bad.loads(version, files).then_some(version)
            };
            let canaries = first.filter_map(|it| judge(honest.get(it.name)?));
            let canaries: BTreeSet<_> = canaries.collect();
            let due = bound(run, &self.master.rules);
            let watched = self.promises.runs.entry(manifest).or_insert(Watched {
                minority: true,
                waves: 0,
                canaries,
            });
            watched.minority &= minority;
            let first = watched.waves == 0;
            watched.waves = waves;
            if first {
                self.set(due, Event::Promise(Promise::Live(manifest, position)));
            }
        }
        if is_new {
            self.promises.running = Some(manifest);
        }
        if self.promises.offers != self.witness.offers {
            self.promises.offers = self.witness.offers;
            self.no_bad_generation_gets_past_its_first_wave(manifest);
        }
    }

    fn no_bad_generation_gets_past_its_first_wave(&self, manifest: Digest) {
        let watched = self.promises.runs.get(&manifest);
        let Some(watched) = watched.filter(|watched| watched.minority) else {
            return;
        };
        let Some(running) = &self.master.running else {
            return;
        };
        let published = self.published(&manifest).expect("it runs");
        if is_good(&self.bad.read().expect("nothing panics with it"), published) {
            return;
        }
        let fleet = running.dispatcher.fleet();
        let Some(run) = fleet.rollout().running() else {
            return;
        };
        let honest = self.honest();
        for member in fleet.members() {
            let Some(host) = honest.get(member.name) else {
                continue;
            };
            let version = host.body().clamd.version;
            let is_first = run.begun[0].has(member.name, member.groups);
            assert!(
                is_first
                    || member.offered.is_none()
                    || loads(
                        &self.bad.read().expect("nothing panics with it"),
                        published,
                        version
                    )
                    || !watched.canaries.contains(&version),
                "{} is offered {}, which its clamd cannot load: {} {run:#?}",
                member.name,
                published.position(),
                sketch(fleet.rollout()),
            );
        }
    }

    /// The target generations of honest hosts before a dishonest one is heard.
    pub(super) fn targets_before(&self, speaker: usize) -> Option<Targets> {
        let watches = self.size.only_lies && !self.hosts[speaker].is_itself();
        watches.then(|| self.targets())
    }

    fn targets(&self) -> Targets {
        let Some(running) = &self.master.running else {
            return Vec::new();
        };
        let (fleet, now) = (running.dispatcher.fleet(), self.clock());
        let target = |name: &AgentName| {
            let record = fleet.record(name)?;
            let has = record.installed.as_ref().map(|it| it.position);
            has.max(fleet.wanted(name, now).map(|it| it.position()))
        };
        let honest = self.honest().into_keys();
        honest.map(|name| (name.clone(), target(name))).collect()
    }

    /// And after that.
    pub(super) fn targets_after(&mut self, speaker: usize, before: Option<Targets>) {
        let Some(before) = before else {
            return;
        };
        let running = self.master.running.as_ref();
        let fleet = running.map(|running| running.dispatcher.fleet());
        if let Some((fleet, run)) =
            fleet.and_then(|fleet| Some((fleet, fleet.rollout().running()?)))
            && let Some(minority) = self.promises.runs.get(&run.target.manifest_sha256)
            && minority.minority
            && !self.is_a_minority(fleet, run)
        {
            let manifest = run.target.manifest_sha256;
            let watched = self.promises.runs.get_mut(&manifest);
            watched.expect("just looked up").minority = false;
        }
        let Some(manifest) = self.promises.running else {
            return;
        };
        let deadline = self.master.rules.deadline + self.size.look + Duration::from_secs(1);
        let after = self.targets();
        for ((name, before), (_, after)) in before.into_iter().zip(after) {
            if let Some(before) = before.filter(|before| Some(*before) > after) {
                let said = self.hosts[speaker].name.clone();
                self.note(format!("{said} lowers the target of {name}"));
                let promise = Promise::Target(name, manifest, before);
                self.set(deadline, Event::Promise(promise));
            }
        }
    }

    /// Something that was promised is due.
    pub(super) fn is_kept(&mut self, promise: &Promise) {
        let (Promise::Live(manifest, position) | Promise::Target(_, manifest, position)) = promise;
        let watched = &self.promises.runs[manifest];
        let published = self.published(manifest).expect("it was on its way");
        if !watched.minority
            || !is_good(&self.bad.read().expect("nothing panics with it"), published)
        {
            return;
        }
        match promise {
            Promise::Live(..) => {
                for (name, host) in self.honest() {
                    let live = self.promises.live.get(name);
                    assert!(
                        live >= Some(position),
                        "{name} was not live with {position} in time: {}; {}",
                        host.said(),
                        self.rollout_sketch()
                    );
                }
                self.promises.kept += 1;
            }
            Promise::Target(name, ..) => {
                let targets = self.targets();
                let target = targets.iter().find(|(it, _)| it == name);
                let target = target.and_then(|(_, target)| *target);
                assert!(
                    target >= Some(*position),
                    "one host has kept {name} from {position} for longer than a deadline: it is to \
                     have {target:?}; {}",
                    self.rollout_sketch()
                );
            }
        }
    }

    fn rollout_sketch(&self) -> String {
        let running = self.master.running.as_ref();
        running.map_or_else(String::new, |running| {
            let rollout = running.dispatcher.fleet().rollout();
            format!("{} {:#?}", sketch(rollout), rollout.running())
        })
    }
}
