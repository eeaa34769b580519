//! What must hold at every moment, whatever goes wrong. Each rule is a function that says it.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use clamcast_master::config::{Rules, Wave};
use clamcast_master::fleet::agents::Fleet;
use clamcast_master::fleet::rollout::{Answer, Begun, Member, Rollout, Run, Target, Weighing};
use clamcast_proto::AuditEvent;
use clamcast_proto::audit::Draft;
use clamcast_proto::dsse::Verified;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::Receipt;
use clamcast_proto::{AgentName, Digest, GroupName, Position};
use jiff::{SignedDuration, Timestamp};

use super::disk::Disk;
use super::host::{Body, Host};
use super::network::Told;

/// Events of rollouts that a failure shows.
const TOLD: usize = 40;

/// Somebody who sees everything and forgets nothing.
pub(super) struct Witness {
    rules: Rules,
    /// Those that the master took.
    pub(super) receipts: u64,
    pub(super) offers: u64,
    pub(super) completed: u64,
    pub(super) halted: u64,
    trace: DefaultHasher,
    /// The last events of rollouts, for a failure to show.
    pub(super) told: VecDeque<String>,
    contents: HashSet<Digest>,
    manifests: HashMap<Position, Digest>,
    /// Contents that must not be published again.
    rejected: HashSet<Digest>,
    /// Manifests that ended badly, as this process of the master knows.
    ended: BTreeSet<Digest>,
    /// As its disk knows.
    ended_on_disk: BTreeSet<Digest>,
    /// Who this process of the master has let in, or knew.
    enrolled: BTreeSet<AgentName>,
    /// The highest generation that it offered to an agent.
    offered: HashMap<AgentName, Position>,
    /// What each agent was offered last, by any process of the master.
    offered_last: HashMap<AgentName, Digest>,
    /// What was on the master's disk at some time.
    runs_on_disk: HashMap<Digest, Run>,
    complete_on_disk: HashSet<Digest>,
    pins_on_disk: HashSet<(GroupName, Digest)>,
    pub(super) receipts_on_disk: HashSet<(AgentName, u64)>,
    /// The highest generation that each host took.
    marks: Vec<Option<Position>>,
    /// What each host had, and what it is to have again if its clamd refuses what is being put in its
    /// place.
    had: Vec<Had>,
    /// Hosts that had something installed.
    supplied: HashSet<usize>,
}

/// What a host had.
#[derive(Clone, Copy, Default)]
struct Had {
    installed: Option<(Position, Digest)>,
    before: Option<Digest>,
}

/// A refusal as it became known.
pub(super) struct Refused {
    manifest: Digest,
    host: AgentName,
}

impl Witness {
    pub(super) fn new(rules: Rules) -> Self {
        Self {
            rules,
            receipts: 0,
            offers: 0,
            completed: 0,
            halted: 0,
            trace: DefaultHasher::new(),
            told: VecDeque::new(),
            contents: HashSet::new(),
            manifests: HashMap::new(),
            rejected: HashSet::new(),
            ended: BTreeSet::new(),
            ended_on_disk: BTreeSet::new(),
            enrolled: BTreeSet::new(),
            offered: HashMap::new(),
            offered_last: HashMap::new(),
            runs_on_disk: HashMap::new(),
            complete_on_disk: HashSet::new(),
            pins_on_disk: HashSet::new(),
            receipts_on_disk: HashSet::new(),
            marks: Vec::new(),
            had: Vec::new(),
            supplied: HashSet::new(),
        }
    }

    pub(super) fn trace(&self) -> u64 {
        self.trace.finish()
    }

    // What is seen.

    /// A process of the master begins with what is on disk.
    pub(super) fn started(&mut self, fleet: &Fleet) {
        self.ended = self.ended_on_disk.clone();
        self.enrolled = fleet.names().cloned().collect();
        self.offered.clear();
    }

    pub(super) fn enrolled(&mut self, name: &AgentName) {
        self.enrolled.insert(name.clone());
    }

    pub(super) fn revoked(&mut self, name: &AgentName) {
        self.enrolled.remove(name);
        self.offered.remove(name);
    }

    /// Something is about to be written into the audit log.
    pub(super) fn decided(&mut self, draft: &Draft) {
        let Draft { event, detail, .. } = draft;
        self.receipts += u64::from(*event == AuditEvent::Receipt);
        if [AuditEvent::Receipt, AuditEvent::Offer].contains(event) {
            return;
        }
        let position = draft.position;
        let at = position.map(|position| position.to_string());
        let subject = &draft.subject;
        self.told
            .push_back(format!("{event} {at:?} {subject} {detail}"));
        if self.told.len() > TOLD {
            self.told.pop_front();
        }
        let Some(position) = position.filter(|_| subject == "fleet") else {
            return;
        };
        (event.name(), position, detail.to_string()).hash(&mut self.trace);
        if [AuditEvent::Halt, AuditEvent::Abort, AuditEvent::RolledBack].contains(event) {
            self.halted += u64::from(*event == AuditEvent::Halt);
            self.ended.extend(self.manifests.get(&position));
        }
        self.completed += u64::from(*event == AuditEvent::RolloutComplete);
    }

    /// This content is not to be published again.
    pub(super) fn rejected(&mut self, content: &Digest) {
        self.rejected.insert(*content);
    }

    /// An operator wants this content in spite of everything.
    pub(super) fn accepted(&mut self, content: &Digest) {
        self.rejected.remove(content);
    }

    /// The rollout has changed and is not on disk yet.
    pub(super) fn changed(&mut self, before: &Rollout, fleet: &Fleet, now: Timestamp) {
        let rollout = fleet.rollout();
        if let Some(run) = rollout.running() {
            let same = before.running().filter(|it| it.target == run.target);
            let begun = same.map_or(&[][..], |it| &it.begun);
            let is_new = |wave: &usize| {
                begun.get(*wave).map(|begun| &begun.wave) != Some(&run.begun[*wave].wave)
            };
            let new: Vec<_> = (0..run.begun.len()).filter(is_new).collect();
            if !new.is_empty() && !run.promoted {
                // As it was when that was decided: nobody was offered anything of it yet.
                let before = |at: Timestamp| at < now;
                let crowd = Crowd::new(fleet, run, &self.rules, before, now);
                for wave in &new {
                    a_wave_starts_only_when_the_one_before_is_settled(&crowd, rollout, run, *wave);
                }
                if new.contains(&0) {
                    an_empty_canary_group_never_means_that_everybody_is_next(&crowd, run);
                }
            }
        }
        every_enrolled_agent_is_accounted_for(&self.enrolled, fleet, &self.rules, now);
    }

    /// The rollout is on disk.
    pub(super) fn kept(&mut self, rollout: &Rollout) {
        if let Some(run) = rollout.running() {
            self.runs_on_disk
                .insert(run.target.manifest_sha256, run.clone());
        }
        let complete = rollout.complete().map(|target| target.manifest_sha256);
        self.complete_on_disk.extend(complete);
        let pins = rollout.pins().iter();
        self.pins_on_disk
            .extend(pins.map(|(group, pin)| (group.clone(), pin.target.manifest_sha256)));
        let failed = rollout.failed().map(|failed| failed.target.manifest_sha256);
        self.ended_on_disk.extend(failed);
    }

    pub(super) fn published(&mut self, manifest: &Verified<Manifest>) {
        what_is_rejected_is_never_published_again(&self.rejected, manifest);
        self.contents.insert(manifest.content);
        let digest = manifest.payload_sha256();
        self.manifests.insert(manifest.position(), digest);
    }

    pub(super) fn publications(&self) -> usize {
        self.contents.len()
    }

    /// An offer was decided. `forced`: by an operator.
    pub(super) fn offered(
        &mut self,
        fleet: &Fleet,
        name: &AgentName,
        manifest: &Verified<Manifest>,
        forced: bool,
        now: Timestamp,
    ) {
        self.offers += 1;
        let position = manifest.position();
        (name.as_str(), manifest.position()).hash(&mut self.trace);
        nothing_is_offered_after_a_halt(&self.ended, fleet, name, manifest);
        let digest = manifest.payload_sha256();
        let last = self.offered_last.insert(name.clone(), digest);
        if !forced && last != Some(digest) {
            a_refusal_stops_further_offers(fleet, name, digest, now);
        }
        let before = self.offered.get(name).copied();
        self.offered.insert(
            name.clone(),
            before.map_or(position, |before| before.max(position)),
        );
        if !forced {
            no_agent_is_offered_a_lower_generation(fleet, name, before, manifest);
        }
    }

    /// An agent is told something now.
    pub(super) fn told(&self, fleet: &Fleet, name: &AgentName, told: &Told) {
        match told {
            Told::Offer {
                manifest,
                rehash: false,
                ..
            } => {
                let Some(record) = fleet.record(name) else {
                    return;
                };
                let installed = record.installed.as_ref();
                let has_it =
                    installed.is_some_and(|it| it.manifest_sha256 == manifest.payload_sha256());
                let kept = has_it || self.allows_on_disk(name, &record.groups, manifest);
                state_is_kept_before_any_agent_hears_of_it(kept, name, manifest);
            }
            Told::Acknowledge(seq) => {
                let kept = self.receipts_on_disk.contains(&(name.clone(), *seq));
                a_receipt_is_on_disk_before_it_is_acknowledged(kept, name, *seq);
            }
            Told::Offer { .. } | Told::Welcome | Told::Part { .. } => {}
        }
    }

    /// Whether some state that was on the master's disk wants this agent at this generation.
    fn allows_on_disk(
        &self,
        name: &AgentName,
        groups: &[GroupName],
        of: &Verified<Manifest>,
    ) -> bool {
        let digest = of.payload_sha256();
        let run = self.runs_on_disk.get(&digest);
        let pinned = |group: &GroupName| self.pins_on_disk.contains(&(group.clone(), digest));
        self.complete_on_disk.contains(&digest)
            || run.is_some_and(|run| run.begun.iter().any(|begun| begun.has(name, groups)))
            || groups.iter().any(pinned)
    }

    /// A refusal is known, and the rollout was not looked at yet.
    pub(super) fn learns_of(&self, receipt: &Verified<Receipt>, fleet: &Fleet) -> Option<Refused> {
        let manifest = receipt.manifest_sha256;
        let run = fleet.rollout().running();
        run.filter(|run| run.target.manifest_sha256 == manifest)?;
        let host = receipt.agent.clone();
        Some(Refused { manifest, host })
    }

    /// And now it was.
    pub(super) fn was_looked_at(&self, refused: Option<Refused>, fleet: &Fleet) {
        if let Some(refused) = refused {
            every_refusal_is_weighed(&refused, fleet);
        }
    }

    /// Something happened on a host.
    pub(super) fn looks_at(&mut self, number: usize, host: &Host) {
        if self.marks.len() <= number {
            self.marks.resize(number + 1, None);
            self.had.resize(number + 1, Had::default());
        }
        let body = host.body();
        let disk = &body.disk;
        let mark = disk.records.mark.as_ref().map(|kept| kept.mark.position);
        no_agent_gets_a_lower_generation(host, self.marks[number], mark);
        self.marks[number] = mark;
        let had = &mut self.had[number];
        a_host_goes_back_only_to_what_it_had_before(host, disk, *had);
        let installed = disk.installed.as_ref();
        let installed = installed.map(|it| (it.set.manifest.position(), it.set.sha256()));
        had.installed = installed;
        if let Some(journal) = &disk.journal {
            // The journal of an old set that waits for clamd again has nothing before it, and the record of
            // that set may still be missing.
            if let Some(before) = &journal.before.installed {
                had.before = Some(before.set.sha256());
            }
        }
        if disk.installed.is_some() {
            self.supplied.insert(number);
        }
        let supplied = self.supplied.contains(&number);
        a_clamd_is_never_without_a_whole_set(host, &body, supplied, &self.contents);
    }

    /// Whether the master's disk has these receipts of a host.
    pub(super) fn has_receipts(&self, name: &AgentName, receipts: Vec<u64>) -> bool {
        let mut receipts = receipts.into_iter();
        receipts.all(|seq| self.receipts_on_disk.contains(&(name.clone(), seq)))
    }

    /// Everything that can be asked at any time.
    pub(super) fn looks_at_all(&self, fleet: &Fleet, now: Timestamp) {
        every_enrolled_agent_is_accounted_for(&self.enrolled, fleet, &self.rules, now);
    }
}

/// The agents that take part in a rollout, found out anew.
struct Crowd<'f> {
    members: Vec<Member<'f>>,
    deadline: SignedDuration,
    now: Timestamp,
}

impl<'f> Crowd<'f> {
    /// `counts`: whether an offer of that time makes one take part whose window is closed.
    fn new(
        fleet: &'f Fleet,
        run: &Run,
        rules: &Rules,
        counts: impl Fn(Timestamp) -> bool,
        now: Timestamp,
    ) -> Self {
        let takes_part = |member: &Member<'_>| {
            let pin = fleet.rollout().pin(member.groups);
            let pinned = pin.is_some_and(|pin| pin.position != run.target.position);
            let past = member.at > Some(run.target.position);
            let refused = member.answer == Some(Answer::Refused);
            (!pinned || refused)
                && !past
                && (member.answer.is_some()
                    || member.offered.is_some_and(|offered| counts(offered.since))
                    || is_open(rules, member.groups, now))
        };
        Self {
            members: fleet.members().into_iter().filter(takes_part).collect(),
            deadline: SignedDuration::try_from(rules.deadline).expect("a few minutes"),
            now,
        }
    }

    /// Those that are in this wave and in none before it.
    fn wave<'c>(&'c self, run: &'c Run, wave: usize) -> impl Iterator<Item = &'c Member<'f>> {
        let has = |begun: &Begun, it: &Member<'f>| begun.has(it.name, it.groups);
        let is_in =
            move |it: &&Member<'f>| run.begun.iter().position(|begun| has(begun, it)) == Some(wave);
        self.members.iter().filter(is_in)
    }
}

fn is_open(rules: &Rules, groups: &[GroupName], now: Timestamp) -> bool {
    let windows = groups
        .iter()
        .filter_map(|group| rules.windows.get(group))
        .flatten();
    let windows: Vec<_> = windows.collect();
    windows.is_empty() || windows.iter().any(|window| window.is_open(now))
}

fn nothing_is_offered_after_a_halt(
    ended: &BTreeSet<Digest>,
    fleet: &Fleet,
    name: &AgentName,
    manifest: &Verified<Manifest>,
) {
    let (position, digest) = (manifest.position(), manifest.payload_sha256());
    let groups = fleet.record(name).map(|record| &record.groups);
    assert!(
        !ended.contains(&digest),
        "{name} of {groups:?} is offered {position}, which was taken back: {}",
        sketch(fleet.rollout())
    );
}

fn a_wave_starts_only_when_the_one_before_is_settled(
    crowd: &Crowd<'_>,
    rollout: &Rollout,
    run: &Run,
    wave: usize,
) {
    let Some(before) = wave.checked_sub(1) else {
        return;
    };
    let since = run.begun[before].since;
    let (mut members, mut live) = (0, 0);
    for member in crowd.wave(run, before) {
        let name = member.name;
        let is_out =
            rollout.set_aside().contains_key(name) || run.withheld.contains_key(member.version);
        if is_out || !(member.connected || member.seen >= since) {
            continue;
        }
        let is_due = crowd.now.duration_since(since) >= crowd.deadline;
        assert!(
            is_due || member.answer.is_some() || !member.connected,
            "wave {wave} begins while {name} is at work and has time: {run:#?}"
        );
        members += 1;
        live += usize::from(member.is_live());
    }
    assert!(
        members == 0 || live > 0 && 2 * live >= members,
        "wave {wave} begins after {live} live of {members} that were connected: {run:#?}"
    );
}

/// While a refusal is weighed, only hosts of its version are offered the generation for the first time.
fn a_refusal_stops_further_offers(fleet: &Fleet, name: &AgentName, of: Digest, now: Timestamp) {
    let deadline = SignedDuration::try_from(fleet.rules().deadline).expect("a few minutes");
    let run = fleet.rollout().running();
    let Some(run) = run.filter(|run| run.target.manifest_sha256 == of) else {
        return;
    };
    if run.weighing.is_empty() {
        return; // before the whole fleet is looked through
    }
    let pinned = fleet
        .record(name)
        .and_then(|it| fleet.rollout().pin(&it.groups));
    let members = fleet.members();
    let member = members.iter().find(|member| member.name == name);
    let had_it = member
        .and_then(|it| it.offered)
        .is_some_and(|it| it.since < now);
    let version = member.map_or("", |member| member.version);
    let stops = |(of, weighing): (&String, &Weighing)| {
        of != version && now.duration_since(weighing.since) < deadline
    };
    assert!(
        !run.weighing.iter().any(stops) || had_it || pinned.is_some(),
        "{name} is offered what is being weighed: {run:#?}"
    );
}

fn an_empty_canary_group_never_means_that_everybody_is_next(crowd: &Crowd<'_>, run: &Run) {
    let all = crowd.members.len();
    let is_canary = |wave: &Wave| matches!(wave, Wave::Group(_));
    if all < 2 || !run.skipped.iter().any(is_canary) {
        return;
    }
    let first = crowd.wave(run, 0).count();
    assert!(
        first < all,
        "all {all} agents are first, since the canaries are nobody: {run:#?}"
    );
}

fn every_enrolled_agent_is_accounted_for(
    enrolled: &BTreeSet<AgentName>,
    fleet: &Fleet,
    rules: &Rules,
    now: Timestamp,
) {
    let known: BTreeSet<_> = fleet.names().cloned().collect();
    assert_eq!(known, *enrolled, "the fleet is not who was enrolled");
    let counts = fleet.counts(now, rules.deadline);
    let sum = counts.conformant + counts.behind + counts.failed;
    assert_eq!(
        (counts.total, sum),
        (enrolled.len(), enrolled.len()),
        "{counts:?}"
    );
    let Some((run, (all, wave))) = fleet.rollout().running().zip(fleet.tallies(now)) else {
        return;
    };
    let crowd = Crowd::new(fleet, run, rules, |_| true, now);
    let members = |wave: usize| crowd.wave(run, wave).count();
    let most: usize = (0..run.begun.len()).map(members).sum();
    let told = wave.live + wave.unsettled + wave.refused + wave.unwell;
    assert!(
        all.members <= most && wave.members <= all.members && told <= wave.members + wave.unsettled,
        "{all:?} {wave:?} of {most}: {run:#?}"
    );
}

/// What it has it may be offered again at any time, to be mended.
fn no_agent_is_offered_a_lower_generation(
    fleet: &Fleet,
    name: &AgentName,
    before: Option<Position>,
    manifest: &Verified<Manifest>,
) {
    let position = manifest.position();
    let record = fleet.record(name);
    let has = record.and_then(|record| record.installed.as_ref());
    let has_it = has.is_some_and(|it| it.manifest_sha256 == manifest.payload_sha256());
    let highest = before.max(has.map(|it| it.position));
    assert!(
        has_it || highest <= Some(position),
        "{name} is offered {position} after {highest:?}: {}",
        sketch(fleet.rollout())
    );
}

fn no_agent_gets_a_lower_generation(host: &Host, before: Option<Position>, now: Option<Position>) {
    assert!(before <= now, "{} took {now:?} after {before:?}", host.name);
}

/// Only an install that comes to nothing lowers what is installed.
fn a_host_goes_back_only_to_what_it_had_before(host: &Host, disk: &Disk, had: Had) {
    let Some((now, before)) = disk.installed.as_ref().zip(had.installed) else {
        return;
    };
    let (position, digest) = (now.set.manifest.position(), now.set.sha256());
    assert!(
        position >= before.0 || Some(digest) == had.before,
        "{} has {position} after {}",
        host.name,
        before.0
    );
}

fn what_is_rejected_is_never_published_again(
    rejected: &HashSet<Digest>,
    manifest: &Verified<Manifest>,
) {
    let position = manifest.position();
    assert!(
        !rejected.contains(&manifest.content),
        "{position} was rejected before"
    );
}

fn state_is_kept_before_any_agent_hears_of_it(
    kept: bool,
    name: &AgentName,
    manifest: &Verified<Manifest>,
) {
    let position = manifest.position();
    assert!(
        kept,
        "{name} hears of {position}, and the disk knows of no reason for that"
    );
}

fn a_receipt_is_on_disk_before_it_is_acknowledged(kept: bool, name: &AgentName, seq: u64) {
    assert!(
        kept,
        "receipt {seq} of {name} is acknowledged and not on disk"
    );
}

/// A refusal ends the rollout, or takes the generation from the version of its host, or stops further
/// offers until it is weighed; or the host is set aside.
fn every_refusal_is_weighed(refused: &Refused, fleet: &Fleet) {
    let rollout = fleet.rollout();
    let run = rollout.running();
    let Some(run) = run.filter(|run| run.target.manifest_sha256 == refused.manifest) else {
        return; // it is over
    };
    if rollout.set_aside().contains_key(&refused.host) || fleet.is_weighed(&refused.host) {
        return;
    }
    let members = fleet.members();
    let member = members.iter().find(|member| *member.name == refused.host);
    let Some(member) = member.filter(|member| {
        member.answer == Some(Answer::Refused)
            && member.at <= Some(run.target.position)
            && (run.has(member) || member.offered.is_some())
    }) else {
        return; // it is about something else, or a newer receipt is there already
    };
    panic!(
        "the refusal of {} has no effect: {}",
        member.name,
        sketch(rollout)
    );
}

/// Where the directory holds no published set, the journal on disk says how it will again; one that
/// had a set is never left with nothing; and what clamd has in memory is a published set.
fn a_clamd_is_never_without_a_whole_set(
    host: &Host,
    body: &Body,
    supplied: bool,
    contents: &HashSet<Digest>,
) {
    let (name, disk) = (&host.name, &body.disk);
    let empty = disk.databases.is_empty() && !disk.is_damaged;
    assert!(!supplied || !empty, "{name} had a set and has nothing now");
    if disk.journal.is_none() && !disk.is_damaged {
        let holds = match &disk.installed {
            Some(installed) => disk.holds(&installed.set.manifest),
            None => disk.databases.is_empty(),
        };
        assert!(
            holds,
            "no journal, and {name} holds {:#?} of {:#?}",
            disk.databases, disk.installed
        );
    }
    if let Some((content, _)) = body.clamd.loaded {
        assert!(
            contents.contains(&content) || body.clamd.unlucky,
            "the clamd of {name} has half a set"
        );
    }
}

/// Where a rollout is, in a line.
pub(super) fn sketch(rollout: &Rollout) -> String {
    let number = |target: &Target| target.position.generation.number();
    let pins = rollout.pins().iter();
    let pins: Vec<_> = pins
        .map(|(group, pin)| format!("{group} at {}", number(&pin.target)))
        .collect();
    format!(
        "complete {:?}, running {:?}, waiting {:?}, failed {:?}, owed {:?}, held {}, pins {pins:?}",
        rollout.complete().map(number),
        rollout.running().map(|run| number(&run.target)),
        rollout.waiting().map(number),
        rollout
            .failed()
            .map(|failed| (number(&failed.target), failed.how)),
        rollout
            .owed()
            .map(|owed| (number(&owed.to), number(&owed.of))),
        rollout.held().is_some(),
    )
}
