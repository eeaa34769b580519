//! What must hold at every moment, whatever goes wrong. Each rule is a function that says it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use clamcast_daemon::audit::Draft;
use clamcast_master::events::EVENTS;
use clamcast_master::fleet::Fleet;
use clamcast_master::rollout::{Begun, Member, Rollout, Rules, Run, Target, Wave, Word, place};
use clamcast_proto::dsse::Verified;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::Receipt;
use clamcast_proto::{AgentName, Digest, GroupName, Position};
use jiff::{SignedDuration, Timestamp};

use super::host::Host;
use super::network::Told;

/// An agent that was not seen for this long is not waited for.
const SEEN: SignedDuration = SignedDuration::from_hours(24);

/// Somebody who sees everything and forgets nothing.
pub(super) struct Witness {
    rules: Rules,
    /// Those that the master took.
    pub(super) receipts: u64,
    pub(super) offers: u64,
    pub(super) completed: u64,
    pub(super) halted: u64,
    trace: DefaultHasher,
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

/// A refusal as it became known: of which generation, in which wave, by how many.
pub(super) struct Refused {
    manifest: Digest,
    waves: usize,
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
            contents: HashSet::new(),
            manifests: HashMap::new(),
            rejected: HashSet::new(),
            ended: BTreeSet::new(),
            ended_on_disk: BTreeSet::new(),
            enrolled: BTreeSet::new(),
            offered: HashMap::new(),
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
        assert!(EVENTS.contains(&event.as_str()), "{event} is no event");
        self.receipts += u64::from(event == "receipt");
        let Some(position) = draft.position.filter(|_| draft.subject == "fleet") else {
            return;
        };
        (event, position, detail.to_string()).hash(&mut self.trace);
        match event.as_str() {
            "halt" | "abort" | "rolled-back" => {
                self.halted += u64::from(event == "halt");
                self.ended.extend(self.manifests.get(&position));
            }
            "rollout-complete" => self.completed += 1,
            _ => {}
        }
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
                    a_wave_starts_only_when_the_one_before_is_done(&crowd, run, *wave);
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
    ) {
        self.offers += 1;
        let position = manifest.position();
        (name.as_str(), manifest.position()).hash(&mut self.trace);
        nothing_is_offered_after_a_halt(&self.ended, fleet, name, manifest);
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
        let place = place(&of.content, name);
        let run = self.runs_on_disk.get(&digest);
        let pinned = |group: &GroupName| self.pins_on_disk.contains(&(group.clone(), digest));
        self.complete_on_disk.contains(&digest)
            || run.is_some_and(|run| run.begun.iter().any(|begun| begun.has(groups, &place)))
            || groups.iter().any(pinned)
    }

    /// A refusal is known, and the rollout was not looked at yet.
    pub(super) fn learns_of(&self, receipt: &Verified<Receipt>, fleet: &Fleet) -> Option<Refused> {
        let manifest = receipt.manifest_sha256;
        let run = fleet.rollout().running();
        let run = run.filter(|run| run.target.manifest_sha256 == manifest)?;
        let waves = run.begun.len();
        Some(Refused { manifest, waves })
    }

    /// And now it was.
    pub(super) fn was_looked_at(&self, refused: Option<Refused>, fleet: &Fleet) {
        if let Some(refused) = refused {
            a_bad_generation_reaches_at_most_the_wave_that_is_running(&refused, fleet, &self.rules);
        }
    }

    /// Something happened on a host.
    pub(super) fn looks_at(&mut self, number: usize, host: &Host) {
        if self.marks.len() <= number {
            self.marks.resize(number + 1, None);
            self.had.resize(number + 1, Had::default());
        }
        let mark = host.disk.mark.as_ref().map(|mark| mark.position);
        no_agent_gets_a_lower_generation(host, self.marks[number], mark);
        self.marks[number] = mark;
        let had = &mut self.had[number];
        a_host_goes_back_only_to_what_it_had_before(host, *had);
        let installed = host.disk.installed.as_ref();
        let installed = installed.map(|it| (it.set.manifest.position(), it.set.sha256()));
        had.installed = installed;
        if let Some(journal) = &host.disk.journal {
            let before = journal.before.installed.as_ref();
            had.before = before.map(|before| before.set.sha256());
        }
        if host.disk.installed.is_some() {
            self.supplied.insert(number);
        }
        let supplied = self.supplied.contains(&number);
        a_clamd_is_never_without_a_whole_set(host, supplied, &self.contents);
    }

    /// Everything that can be asked at any time.
    pub(super) fn looks_at_all(&self, fleet: &Fleet, now: Timestamp) {
        every_enrolled_agent_is_accounted_for(&self.enrolled, fleet, &self.rules, now);
    }
}

/// The agents that take part in a rollout, found out anew.
struct Crowd<'f> {
    members: Vec<(Member<'f>, Digest)>,
    deadline: SignedDuration,
    now: Timestamp,
}

impl<'f> Crowd<'f> {
    /// `counts`: whether progress of that time makes one take part whose window is closed.
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
            let refused = member.word == Some(Word::Refused);
            (!pinned || refused)
                && !past
                && (member.word.is_some()
                    || member.progress.is_some_and(&counts)
                    || is_open(rules, member.groups, now))
        };
        let members = fleet.members().into_iter().filter(takes_part);
        let placed = |member: Member<'f>| {
            let place = place(&run.target.content, member.name);
            (member, place)
        };
        Self {
            members: members.map(placed).collect(),
            deadline: SignedDuration::try_from(rules.deadline).expect("a few minutes"),
            now,
        }
    }

    /// Those that are in this wave and in none before it.
    fn wave<'c>(&'c self, run: &'c Run, wave: usize) -> impl Iterator<Item = &'c Member<'f>> {
        let has =
            |begun: &Begun, (member, place): &(Member<'f>, Digest)| begun.has(member.groups, place);
        let is_in = move |it: &&(Member<'f>, Digest)| {
            run.begun.iter().position(|begun| has(begun, it)) == Some(wave)
        };
        self.members.iter().filter(is_in).map(|(member, _)| member)
    }

    /// Whether it has something to do and does it, or may be about to.
    fn is_at_work(&self, member: &Member<'_>) -> bool {
        let since = |time| self.now.duration_since(time);
        let is_late = member
            .progress
            .is_some_and(|progress| since(progress) >= self.deadline);
        let had_long = member.offered.is_some_and(|offered| since(offered) >= SEEN);
        let has_begun = member.connected || member.progress.is_some();
        member.word.is_none() && has_begun && !is_late && !had_long
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

fn a_wave_starts_only_when_the_one_before_is_done(crowd: &Crowd<'_>, run: &Run, wave: usize) {
    let Some(before) = wave.checked_sub(1) else {
        return;
    };
    let (mut seen, mut live) = (0, 0);
    for member in crowd.wave(run, before) {
        let name = member.name;
        assert!(
            !crowd.is_at_work(member),
            "wave {wave} begins while {name} is at work: {run:#?}"
        );
        seen += usize::from(member.connected || crowd.now.duration_since(member.seen) < SEEN);
        live += usize::from(member.word == Some(Word::Live));
    }
    assert!(
        live > 0 && 2 * live >= seen,
        "wave {wave} begins after {live} live of {seen} that were seen: {run:#?}"
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
    let forced = |member: &Member<'_>| member.word == Some(Word::Refused);
    let in_waves = (0..run.begun.len()).map(|wave| crowd.wave(run, wave).count());
    let in_waves: Vec<_> = in_waves.collect();
    let counted = crowd
        .members
        .iter()
        .filter(|(member, _)| run.has(member) || forced(member));
    assert_eq!(all.members, counted.count(), "{run:#?}");
    assert_eq!(
        wave.members,
        in_waves.last().copied().unwrap_or(wave.members),
        "{run:#?}"
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
fn a_host_goes_back_only_to_what_it_had_before(host: &Host, had: Had) {
    let Some((now, before)) = host.disk.installed.as_ref().zip(had.installed) else {
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

/// In the first wave one refusal ends it; later so many are let pass as the configuration says.
fn a_bad_generation_reaches_at_most_the_wave_that_is_running(
    refused: &Refused,
    fleet: &Fleet,
    rules: &Rules,
) {
    let run = fleet.rollout().running();
    let Some(run) = run.filter(|run| run.target.manifest_sha256 == refused.manifest) else {
        return; // it is over
    };
    let counts = |member: &&Member<'_>| {
        member.word == Some(Word::Refused) && member.at <= Some(run.target.position)
    };
    let members = fleet.members();
    let refusals = members.iter().filter(counts).count() as u64;
    let in_waves = members.iter().filter(|member| run.has(member)).count() as u64;
    let let_pass = match refused.waves {
        0 | 1 if !run.promoted => 0,
        _ => rules.refused_max.of(in_waves).max(1),
    };
    assert!(
        refusals <= let_pass,
        "{refusals} hosts refused it, {let_pass} are let pass, and it goes on: {}",
        sketch(fleet.rollout())
    );
}

/// Where the directory holds no published set, the journal on disk says how it will again; one that
/// had a set is never left with nothing; and what clamd has in memory is a published set.
fn a_clamd_is_never_without_a_whole_set(host: &Host, supplied: bool, contents: &HashSet<Digest>) {
    let Host { name, disk, .. } = host;
    let empty = disk.databases.is_empty() && !host.lacking;
    assert!(!supplied || !empty, "{name} had a set and has nothing now");
    if disk.journal.is_none() && !host.lacking {
        let holds = match &disk.installed {
            Some(installed) => disk.holds(&installed.set.files()),
            None => disk.databases.is_empty(),
        };
        assert!(
            holds,
            "no journal, and {name} holds {:#?} of {:#?}",
            disk.databases, disk.installed
        );
    }
    if let Some((content, _)) = host.clamd.loaded {
        assert!(
            contents.contains(&content) || host.clamd.unlucky,
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
