//! The rules of a rollout, told with a fleet that does what the tests say.

use std::time::Duration;

use clamcast_proto::{Epoch, Generation};

use super::run::BLAMED_MAX;
use super::*;

mod quorum;

const DEADLINE: i64 = 900;

/// Live, and proven so by a real clamd.
const LIVE: Answer = Answer::Live { proven: true };

/// A fleet and the rollout over it.
struct Lab {
    rollout: Rollout,
    rules: Rules,
    hosts: BTreeMap<AgentName, Host>,
    /// Seconds.
    now: i64,
    /// What was noted, as `event generation`.
    noted: Vec<String>,
    rejected: Vec<u64>,
}

#[derive(Clone, Debug, Default)]
struct Host {
    groups: Vec<GroupName>,
    away: bool,
    seen: i64,
    at: Option<u64>,
    /// What it says of a generation.
    answers: BTreeMap<u64, Answer>,
    /// The file that it names when it refuses one.
    blames: Option<DatabaseName>,
    /// When it was offered one, and when it last made progress with it.
    offered: BTreeMap<u64, (i64, i64)>,
    version: Option<&'static str>,
    was_connected: bool,
    returning: bool,
}

fn target(number: u64) -> Target {
    let digest = Digest::of(&number.to_be_bytes());
    Target {
        position: position(number),
        manifest_sha256: digest,
        content: digest,
    }
}

/// The databases of another one under a new number.
fn again(number: u64, of: u64) -> Target {
    Target {
        content: target(of).content,
        ..target(number)
    }
}

fn position(number: u64) -> Position {
    Position {
        epoch: Epoch(1),
        generation: Generation::new(number).unwrap(),
    }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

impl Lab {
    /// Hosts `h0`, `h1`, ... of which the first `canaries` are in the group of that name.
    fn new(hosts: usize, canaries: usize, waves: &[&str]) -> Self {
        let host = |i| {
            let groups = if i < canaries {
                vec!["canary".parse().unwrap()]
            } else {
                vec![]
            };
            let name = format!("h{i}").parse().unwrap();
            (
                name,
                Host {
                    groups,
                    ..Host::default()
                },
            )
        };
        Self {
            rollout: Rollout::default(),
            rules: Rules {
                waves: waves.iter().map(|wave| wave.parse().unwrap()).collect(),
                settle: Duration::ZERO,
                refused_max: "2%".parse().unwrap(),
                unwell_max: "20%".parse().unwrap(),
                rollback_on_halt: true,
                deadline: Duration::from_secs(DEADLINE as u64),
                windows: BTreeMap::new(),
            },
            hosts: (0..hosts).map(host).collect(),
            now: 1_000_000,
            noted: Vec::new(),
            rejected: Vec::new(),
        }
    }

    /// The usual three waves over 100 hosts, of which two are canaries.
    fn usual() -> Self {
        let mut lab = Self::new(100, 2, &["group:canary", "10%", "100%"]);
        lab.published(1);
        lab.everybody(1, LIVE);
        lab.noted.clear();
        lab
    }

    fn step(&mut self) -> &mut Self {
        let fleet = Hosts(&self.hosts, self.now);
        let effects = self.rollout.step(&fleet, &self.rules, at(self.now));
        self.take(effects);
        self.offer();
        self
    }

    fn take(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Note {
                    event,
                    position,
                    host,
                    ..
                } => {
                    let generation = position.map(|position| position.generation.to_string());
                    let host = host.map(|host| host.to_string());
                    let about = host.or(generation).unwrap_or_default();
                    self.noted.push(format!("{event} {about}"));
                }
                Effect::Withdrawn { target, .. } => {
                    self.rejected.push(target.position.generation.number())
                }
                Effect::Look => self.noted.push("look".to_owned()),
            }
        }
    }

    /// Whoever is there hears what it is wanted at.
    fn offer(&mut self) {
        let names: Vec<_> = self.hosts.keys().cloned().collect();
        for name in names {
            let Some(number) = self
                .wanted(&name)
                .filter(|number| Some(*number) != self.hosts[&name].at)
            else {
                continue;
            };
            let now = self.now;
            let host = self.hosts.get_mut(&name).unwrap();
            if !host.away && !host.answers.contains_key(&number) {
                host.offered.entry(number).or_insert((now, now));
            }
        }
    }

    fn wanted(&self, name: &AgentName) -> Option<u64> {
        let running = self.rollout.running().map(|run| run.target);
        let member = self.hosts[name].member(name, running.as_ref(), self.now);
        match self.rollout.wanted(&member, &self.rules, at(self.now)) {
            Wanted::Nothing => None,
            Wanted::Stay | Wanted::Later(_) => self.hosts[name].at,
            Wanted::At(target) => Some(number(&target)),
        }
    }

    /// Hosts that were offered a generation.
    fn offered(&self, number: u64) -> usize {
        self.hosts
            .values()
            .filter(|host| host.offered.contains_key(&number))
            .count()
    }

    fn published(&mut self, number: u64) -> &mut Self {
        self.publish(target(number), false);
        self.step()
    }

    fn publish(&mut self, target: Target, supersede: bool) {
        let now = at(self.now);
        let effects = self.rollout.published(target, supersede, &self.rules, now);
        self.take(effects);
    }

    /// A host that was offered it says what came of it.
    fn say(&mut self, name: &str, number: u64, answer: Answer) -> &mut Self {
        let host = self
            .hosts
            .get_mut(&name.parse::<AgentName>().unwrap())
            .unwrap();
        assert!(
            host.offered.contains_key(&number),
            "{name} was not offered {number}"
        );
        host.answers.insert(number, answer);
        if matches!(answer, LIVE | Answer::Installed) {
            host.at = Some(number);
        }
        self.step()
    }

    /// Everybody who is there and was offered it says the same, wave after wave.
    fn everybody(&mut self, number: u64, answer: Answer) -> &mut Self {
        loop {
            let asked = |host: &Host| {
                !host.away
                    && host.offered.contains_key(&number)
                    && !host.answers.contains_key(&number)
            };
            let names: Vec<_> = self
                .hosts
                .iter()
                .filter(|(_, host)| asked(host))
                .map(|(name, _)| name.to_string())
                .collect();
            if names.is_empty() {
                return self;
            }
            for name in names {
                self.say(&name, number, answer);
            }
        }
    }

    fn host(&mut self, name: &str) -> &mut Host {
        self.hosts
            .get_mut(&name.parse::<AgentName>().unwrap())
            .unwrap()
    }

    fn wait(&mut self, seconds: i64) -> &mut Self {
        self.now += seconds;
        self.step()
    }

    /// `complete 1, running 2 wave 1 of 3`.
    fn state(&self) -> String {
        let mut state = match self.rollout.complete() {
            Some(target) => format!("complete {}", target.position.generation),
            None => "nothing".to_owned(),
        };
        if let Some(run) = self.rollout.running() {
            let (begun, all) = (run.begun.len(), run.begun.len() + run.ahead.len());
            state += &format!(
                ", running {} wave {begun} of {all}",
                run.target.position.generation
            );
            if let Some(pause) = &run.paused {
                state += &format!(", paused {:?}", pause.kind);
            }
        }
        if let Some(waiting) = self.rollout.waiting() {
            state += &format!(", waiting {}", waiting.position.generation);
        }
        if let Some(owed) = self.rollout.owed() {
            state += &format!(
                ", owes {} for {}",
                owed.to.position.generation, owed.of.position.generation
            );
        }
        state
    }

    #[track_caller]
    fn is(&self, expected: &str) {
        assert_eq!(self.state(), expected, "noted: {:?}", self.noted);
    }
}

impl Host {
    fn member<'a>(&'a self, name: &'a AgentName, of: Option<&Target>, now: i64) -> Member<'a> {
        let of = of.map(number);
        Member {
            name,
            groups: &self.groups,
            version: self.version.unwrap_or(UNKNOWN_VERSION),
            connected: !self.away,
            was_connected: self.was_connected,
            returning: self.returning,
            seen: at(if self.away { self.seen } else { now }),
            at: self.at.map(position),
            answer: of.and_then(|number| self.answers.get(&number).copied()),
            blamed: self.blames.as_ref(),
            offered: of.and_then(|number| {
                let (since, renewed) = self.offered.get(&number)?;
                Some(Offering {
                    since: at(*since),
                    renewed: at(*renewed),
                })
            }),
        }
    }
}

struct Hosts<'a>(&'a BTreeMap<AgentName, Host>, i64);

impl Agents for Hosts<'_> {
    fn members(&self, target: Option<&Target>) -> Vec<Member<'_>> {
        let hosts = self.0.iter();
        hosts
            .map(|(name, host)| host.member(name, target, self.1))
            .collect()
    }

    fn is_enrolled(&self, name: &AgentName) -> bool {
        self.0.contains_key(name)
    }

    fn proven(&self, name: &AgentName) -> Option<Position> {
        let host = self.0.get(name)?;
        let proven = host.at.filter(|at| host.answers.get(at) == Some(&LIVE));
        proven.map(position)
    }
}

fn number(target: &Target) -> u64 {
    target.position.generation.number()
}

#[test]
fn a_good_generation_goes_through_wave_by_wave() {
    let mut lab = Lab::usual();
    lab.published(2).is("complete 1, running 2 wave 1 of 3");
    assert_eq!(lab.offered(2), 2);
    lab.say("h0", 2, LIVE)
        .is("complete 1, running 2 wave 1 of 3");
    lab.say("h1", 2, LIVE)
        .is("complete 1, running 2 wave 2 of 3");
    assert!((10..=12).contains(&lab.offered(2)), "{}", lab.offered(2));
    lab.everybody(2, LIVE).is("complete 2");
    assert_eq!(
        lab.noted,
        [
            "rollout 2",
            "wave 2",
            "wave 2",
            "wave 2",
            "rollout-complete 2"
        ]
    );
}

#[test]
fn refusals_of_the_first_wave_halt_and_those_who_took_it_go_back() {
    let mut lab = Lab::usual();
    lab.published(2)
        .say("h0", 2, LIVE)
        .say("h1", 2, Answer::Refused);
    lab.is("complete 1, owes 1 for 2");
    assert_eq!((lab.offered(2), &lab.rejected[..]), (2, &[2][..]));
    assert_eq!(
        lab.wanted(&"h0".parse().unwrap()),
        Some(2),
        "it has no other yet"
    );
    assert_eq!(lab.wanted(&"h9".parse().unwrap()), Some(1));
    let effects = lab.rollout.went_back(again(3, 1));
    lab.take(effects);
    lab.step().is("complete 3");
    assert_eq!(
        lab.offered(3),
        100,
        "who never had it counts the number only"
    );
    assert_eq!(lab.noted.last().unwrap(), "look");
}

#[test]
fn a_halt_keeps_the_files_that_its_refusals_blame_if_each_names_one() {
    let check = |blames: [Option<&str>; 3], expected: &[&str]| {
        let mut lab = Lab::new(10, 3, &["group:canary", "100%"]);
        lab.published(1).everybody(1, LIVE);
        lab.published(2);
        for (name, file) in ["h0", "h1", "h2"].into_iter().zip(blames) {
            lab.host(name).blames = file.map(|file| file.parse().unwrap());
            lab.host(name).answers.insert(2, Answer::Refused);
        }
        lab.host("h9").blames = Some("other.ndb".parse().unwrap()); // which has not refused it
        lab.step().is("complete 1, owes 1 for 2");
        let saved = serde_json::to_string(&lab.rollout).unwrap();
        let loaded: Rollout = serde_json::from_str(&saved).unwrap();
        let failed = loaded.failed().unwrap().target.position;
        let blamed = &loaded.withdrawn().of(failed).unwrap().blamed;
        let blamed: Vec<_> = blamed.iter().map(DatabaseName::as_str).collect();
        assert_eq!(blamed, expected, "{blames:?}");
    };
    let feed = Some("feed.ndb");
    check([feed, feed, feed], &["feed.ndb"]);
    check([feed, Some("daily.cld"), feed], &["daily.cld", "feed.ndb"]);
    check([feed, None, feed], &[]);
}

#[test]
fn a_halt_by_too_many_blamed_files_blames_the_whole_generation() {
    let hosts = BLAMED_MAX + 1;
    let mut lab = Lab::new(hosts, hosts, &["group:canary"]);
    lab.published(1).everybody(1, LIVE);
    lab.published(2);
    for (number, host) in lab.hosts.values_mut().enumerate() {
        host.blames = Some(format!("{number}.ndb").parse().unwrap());
        host.answers.insert(2, Answer::Refused);
    }
    lab.step().is("complete 1, owes 1 for 2");
    let failed = lab.rollout.failed().unwrap().target.position;
    let withdrawal = lab.rollout.withdrawn().of(failed).unwrap();
    assert_eq!(withdrawal.blamed, BTreeSet::new());
}

#[test]
fn refusals_of_a_later_wave_that_outweigh_the_proofs_halt_it() {
    let mut lab = Lab::usual();
    lab.published(2).say("h0", 2, LIVE).say("h1", 2, LIVE);
    let wave = lab.hosts.iter();
    let wave = wave.filter(|(_, host)| host.offered.contains_key(&2) && host.at == Some(1));
    let wave: Vec<_> = wave.map(|(name, _)| name.to_string()).collect();
    for name in &wave[..2] {
        lab.say(name, 2, Answer::Refused)
            .is("complete 1, running 2 wave 2 of 3");
    }
    let offered = lab.offered(2);
    for name in &wave[2..] {
        lab.say(name, 2, Answer::Refused);
        if lab.rollout.running().is_none() {
            break;
        }
    }
    lab.is("complete 1, owes 1 for 2");
    lab.wait(10).wait(10_000);
    assert_eq!(lab.offered(2), offered);
}

#[test]
fn hosts_with_trouble_of_their_own_only_pause_it_until_they_are_well() {
    let mut lab = Lab::new(100, 3, &["group:canary", "10%", "100%"]);
    lab.published(2)
        .say("h0", 2, Answer::Unwell)
        .is("nothing, running 2 wave 1 of 3"); // one host alone pauses nothing
    lab.say("h1", 2, Answer::Unwell)
        .is("nothing, running 2 wave 1 of 3, paused Unwell");
    lab.host("h2").offered.clear();
    lab.wait(1);
    assert_eq!(
        lab.offered(2),
        3,
        "a member of the wave is still offered it"
    );
    lab.say("h0", 2, LIVE).is("nothing, running 2 wave 1 of 3");
    lab.say("h2", 2, LIVE).is("nothing, running 2 wave 2 of 3");
}

#[test]
fn an_operator_can_go_on_with_the_unwell_but_not_with_more_of_them() {
    let mut lab = Lab::new(10, 5, &["group:canary", "100%"]);
    lab.published(1);
    lab.say("h0", 1, Answer::Unwell)
        .say("h1", 1, Answer::Unwell);
    lab.is("nothing, running 1 wave 1 of 2, paused Unwell");
    lab.resume().unwrap();
    lab.step().is("nothing, running 1 wave 1 of 2");
    lab.say("h2", 1, Answer::Unwell)
        .is("nothing, running 1 wave 1 of 2, paused Unwell");
}

#[test]
fn a_clamd_that_is_not_there_counts_as_trouble_after_the_deadline_only() {
    let mut lab = Lab::usual();
    lab.published(2)
        .say("h0", 2, Answer::Installed)
        .say("h1", 2, LIVE);
    lab.is("complete 1, running 2 wave 2 of 3"); // one of two is half
    let mut lab = Lab::usual();
    lab.published(2)
        .say("h0", 2, Answer::Installed)
        .say("h1", 2, Answer::Installed);
    lab.is("complete 1, running 2 wave 1 of 3");
    lab.wait(DEADLINE)
        .is("complete 1, running 2 wave 1 of 3, paused Unwell");
    lab.say("h0", 2, LIVE)
        .is("complete 1, running 2 wave 2 of 3");
}

#[test]
fn a_wave_that_nobody_proves_pauses_and_resumes_when_its_hosts_return() {
    let mut lab = Lab::usual();
    lab.published(2).is("complete 1, running 2 wave 1 of 3");
    lab.wait(1);
    for name in ["h0", "h1"] {
        lab.host(name).away = true;
        lab.host(name).seen = lab.now;
    }
    lab.wait(DEADLINE)
        .is("complete 1, running 2 wave 1 of 3, paused Unwell"); // they vanished with it
    lab.host("h0").away = false;
    lab.say("h0", 2, LIVE)
        .is("complete 1, running 2 wave 2 of 3");
}

#[test]
fn members_that_were_not_connected_since_the_wave_began_are_not_waited_for_and_catch_up() {
    let mut lab = Lab::usual();
    let seen = lab.now - 1;
    *lab.host("h1") = Host {
        away: true,
        seen,
        ..lab.host("h1").clone()
    };
    lab.published(2)
        .say("h0", 2, LIVE)
        .is("complete 1, running 2 wave 2 of 3");
    lab.everybody(2, LIVE).is("complete 2");
    lab.host("h1").away = false;
    lab.wait(1);
    assert_eq!(lab.offered(2), 100);
}

#[test]
fn a_silent_host_delays_its_wave_for_the_deadline_only() {
    let mut lab = Lab::new(10, 4, &["group:canary", "100%"]);
    lab.rules.unwell_max = "50%".parse().unwrap();
    lab.published(1);
    for name in ["h0", "h1", "h2"] {
        lab.say(name, 1, LIVE);
    }
    lab.is("nothing, running 1 wave 1 of 2");
    lab.wait(DEADLINE - 1).is("nothing, running 1 wave 1 of 2");
    lab.wait(1).is("nothing, running 1 wave 2 of 2");
}

#[test]
fn an_empty_canary_group_does_not_mean_that_everybody_is_next() {
    let mut lab = Lab::new(50, 0, &["group:canary", "100%"]);
    lab.published(1).is("nothing, running 1 wave 1 of 2");
    assert_eq!(lab.offered(1), 5);
    assert!(lab.noted.contains(&"wave-skipped 1".to_owned()));
    lab.everybody(1, LIVE).is("complete 1");
}

#[test]
fn without_canaries_not_everybody_whose_window_is_open_is_next() {
    let mut lab = Lab::new(50, 0, &["group:canary", "100%"]);
    let night: GroupName = "night".parse().unwrap();
    lab.host("h0").groups = vec![night.clone()];
    let closed = "Sun 00:00-00:01 UTC".parse().unwrap();
    lab.rules.windows.insert(night, vec![closed]);
    lab.published(1);
    assert!(lab.offered(1) < 10, "{}", lab.offered(1));
}

#[test]
fn before_anybody_is_enrolled_the_first_to_come_is_the_first_wave() {
    let mut lab = Lab::new(0, 0, &["group:canary", "10%", "100%"]);
    lab.published(1).is("nothing, running 1 wave 0 of 3");
    lab.hosts.insert("first".parse().unwrap(), Host::default());
    lab.step();
    assert_eq!(lab.offered(1), 1);
    for i in 0..9 {
        lab.hosts
            .insert(format!("late{i}").parse().unwrap(), Host::default());
    }
    lab.step();
    assert!(lab.offered(1) < 10, "the wave has begun without them");
    lab.everybody(1, LIVE).is("complete 1");
    assert_eq!(lab.offered(1), 10);
}

#[test]
fn a_newer_generation_waits_and_only_the_newest_of_them() {
    let mut lab = Lab::usual();
    lab.published(2)
        .published(3)
        .published(4)
        .is("complete 1, running 2 wave 1 of 3, waiting 4");
    lab.everybody(2, LIVE)
        .is("complete 2, running 4 wave 1 of 3");
    assert_eq!(lab.offered(3), 0);
}

#[test]
fn what_waited_for_a_halted_one_is_captured_anew_above_the_rollback() {
    let mut lab = Lab::usual();
    lab.published(2)
        .published(3)
        .say("h0", 2, Answer::Refused)
        .is("complete 1, owes 1 for 2");
    let effects = lab.rollout.went_back(again(4, 1));
    lab.take(effects);
    assert_eq!(lab.noted.last().unwrap(), "look");
}

#[test]
fn superseding_begins_the_waves_anew_and_nobody_goes_back() {
    let mut lab = Lab::usual();
    lab.published(2).say("h0", 2, LIVE);
    lab.publish(target(3), true);
    lab.rules.waves = vec!["1".parse().unwrap()];
    lab.step().is("complete 1, running 3 wave 1 of 3");
    for name in ["h0", "h50"] {
        let wanted = lab.wanted(&name.parse().unwrap());
        assert!(wanted >= lab.host(name).at, "{name} {wanted:?}");
    }
}

#[test]
fn what_waits_behind_one_that_does_not_move_is_let_past_it_by_an_operator() {
    let mut lab = Lab::usual();
    lab.published(2)
        .say("h0", 2, Answer::Unwell)
        .say("h1", 2, Answer::Unwell)
        .published(3);
    lab.is("complete 1, running 2 wave 1 of 3, paused Unwell, waiting 3");
    let supersede = |lab: &mut Lab| {
        let fleet = Hosts(&lab.hosts, lab.now);
        lab.rollout
            .order(Order::Supersede, &fleet, &lab.rules, at(lab.now))
    };
    let effects = supersede(&mut lab).unwrap();
    lab.take(effects);
    lab.step().is("complete 1, running 3 wave 1 of 3");
    assert_eq!(supersede(&mut lab), Err(OrderError::NothingWaits));
}

#[test]
fn paused_by_an_operator_nothing_begins_and_what_was_begun_is_finished() {
    let mut lab = Lab::usual();
    lab.published(2);
    lab.order(|lab, now| lab.rollout.pause("lunch".into(), now));
    lab.say("h0", 2, LIVE).say("h1", 2, LIVE);
    lab.wait(DEADLINE)
        .is("complete 1, running 2 wave 1 of 3, paused Operator");
    lab.resume().unwrap();
    lab.step().is("complete 1, running 2 wave 2 of 3");
    assert_eq!(lab.resume(), Err(OrderError::NotPaused(position(2))));
}

#[test]
fn a_second_pause_by_an_operator_is_refused_with_the_reason_of_the_first() {
    let mut lab = Lab::usual();
    lab.published(2);
    lab.order(|lab, now| lab.rollout.pause("lunch".into(), now));
    let error = lab.rollout.pause("dinner".into(), at(lab.now)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the rollout of 1.2 is paused since 1970-01-12T13:46:40Z: lunch; `rollout resume` first"
    );
    let pause = lab.rollout.running().and_then(|run| run.paused.as_ref());
    assert_eq!(pause.unwrap().reason, "lunch");
}

#[test]
fn a_pause_by_an_operator_keeps_why_it_had_paused_by_itself_and_outlasts_that() {
    let mut lab = Lab::usual();
    lab.published(2)
        .say("h0", 2, Answer::Unwell)
        .say("h1", 2, Answer::Unwell);
    lab.is("complete 1, running 2 wave 1 of 3, paused Unwell");
    lab.order(|lab, now| lab.rollout.pause("lunch".into(), now));
    let pause = lab.rollout.running().and_then(|run| run.paused.clone());
    let pause = pause.unwrap();
    let before = pause.before.unwrap();
    assert_eq!(
        (pause.reason.as_str(), before.kind),
        ("lunch", PauseKind::Unwell)
    );
    assert!(before.reason.contains("trouble of their own: h0, h1"));
    lab.say("h0", 2, LIVE).say("h1", 2, LIVE);
    lab.is("complete 1, running 2 wave 1 of 3, paused Operator");

    // A wave without a quorum has as long again after either pause.
    let mut lab = Lab::usual();
    lab.published(2);
    lab.say("h0", 2, Answer::Unwell).wait(DEADLINE);
    lab.is("complete 1, running 2 wave 1 of 3, paused Unwell");
    let mut lab = Lab::new(100, 3, &["group:canary", "100%"]);
    lab.published(2);
    lab.say("h0", 2, LIVE).say("h1", 2, Answer::Unwell);
    lab.host("h2").offered.clear(); // the offer never reached it
    lab.host("h2").away = true;
    lab.host("h2").seen = lab.now;
    lab.wait(DEADLINE);
    lab.is("nothing, running 2 wave 1 of 2, paused Unproven");
    lab.order(|lab, now| lab.rollout.pause("lunch".into(), now));
    lab.resume().unwrap();
    lab.step().is("nothing, running 2 wave 1 of 2");
}

#[test]
fn aborted_is_halted_by_hand_and_promoted_is_everybody_at_once() {
    let mut lab = Lab::usual();
    lab.published(2).say("h0", 2, LIVE);
    lab.order(|lab, now| {
        let hosts = Hosts(&lab.hosts, lab.now);
        lab.rollout
            .abort("looks odd".into(), &hosts, &lab.rules, now)
    });
    lab.is("complete 1, owes 1 for 2");

    let mut lab = Lab::usual();
    lab.published(2);
    lab.order(|lab, now| lab.rollout.promote("urgent".into(), now));
    lab.step();
    assert_eq!(lab.offered(2), 100);
    lab.everybody(2, LIVE).is("complete 2");
    let idle = lab.rollout.promote("again".into(), at(0));
    assert_eq!(
        idle,
        Err(OrderError::Idle {
            complete: Some(target(2))
        })
    );
}

#[test]
fn rolled_back_by_hand_nothing_is_published_until_resumed() {
    let mut lab = Lab::usual();
    lab.published(2).everybody(2, LIVE);
    lab.roll_back(target(1), "false positives").unwrap();
    lab.is("complete 2, owes 1 for 2");
    assert!(lab.rollout.held().is_some());
    let effects = lab.rollout.went_back(again(3, 1));
    lab.take(effects);
    lab.step().is("complete 3");
    assert_eq!((lab.offered(3), &lab.rejected[..]), (100, &[2][..]));
    assert_ne!(lab.noted.last().unwrap(), "look", "publishing is held");
    lab.resume().unwrap();
    assert_eq!(lab.noted.last().unwrap(), "look");
}

#[test]
fn a_pinned_group_stays_and_is_neither_waited_for_nor_asked() {
    let mut lab = Lab::usual();
    let canary: GroupName = "canary".parse().unwrap();
    let group = canary.clone();
    lab.order(|lab, now| {
        let fleet = Hosts(&lab.hosts, lab.now);
        lab.rollout.pin_group(group, target(1), None, &fleet, now)
    });
    lab.published(2).is("complete 1, running 2 wave 1 of 2");
    assert_eq!(lab.wanted(&"h0".parse().unwrap()), Some(1));
    lab.everybody(2, LIVE).is("complete 2");
    assert_eq!(lab.offered(2), 98);
    lab.order(|lab, _| lab.rollout.unpin_group(&canary, None));
    lab.step();
    assert_eq!(lab.offered(2), 100);
}

#[test]
fn a_refusal_counts_also_where_the_group_is_pinned_meanwhile() {
    let mut lab = Lab::usual();
    lab.published(2);
    for name in ["h0", "h1"] {
        lab.host(name).at = Some(2);
    }
    lab.pin("canary", 2).unwrap();
    lab.say("h0", 2, Answer::Refused)
        .is("complete 1, owes 1 for 2");
}

#[test]
fn a_pin_offers_nobody_what_was_taken_back() {
    let mut lab = Lab::usual();
    lab.published(2);
    lab.host("h1").at = Some(2);
    lab.host("h1").groups = vec!["db".parse().unwrap()];
    lab.pin("db", 2).unwrap();
    assert_eq!(lab.wanted(&"h1".parse().unwrap()), Some(2));
    lab.say("h0", 2, Answer::Refused);
    assert!(
        lab.rollout.pins().is_empty(),
        "it goes back with the others"
    );
    assert!(lab.noted.contains(&"unpin 2".to_owned()));
    let taken_back = OrderError::TakenBack(position(2));
    assert_eq!(lab.pin("canary", 2), Err(taken_back));
    let taken_back = OrderError::TakenBack(position(2));
    assert_eq!(lab.roll_back(target(2), "it was better"), Err(taken_back));
}

#[test]
fn what_is_rolled_back_is_offered_to_nobody_until_the_other_is_published() {
    let mut lab = Lab::usual();
    lab.published(2).everybody(2, LIVE).is("complete 2");
    lab.host("h9").at = Some(1);
    lab.roll_back(target(1), "slow").unwrap();
    assert_eq!(lab.wanted(&"h9".parse().unwrap()), Some(1), "it stays");
}

#[test]
fn a_rollback_that_another_order_overtook_is_not_taken_for_that() {
    let mut lab = Lab::usual();
    for number in [2, 3] {
        lab.published(number).everybody(number, LIVE);
    }
    lab.roll_back(target(2), "slow").unwrap();
    lab.roll_back(target(1), "slower").unwrap();
    lab.rollout.went_back(again(4, 2));
    lab.is("complete 3, owes 1 for 3");
    lab.rollout.went_back(again(5, 1));
    lab.is("complete 5");
}

#[test]
fn so_many_groups_are_pinned_and_no_more() {
    let mut lab = Lab::usual();
    let mut pin = |group: String| {
        let fleet = Hosts(&lab.hosts, lab.now);
        let (group, now) = (group.parse().unwrap(), at(lab.now));
        lab.rollout.pin_group(group, target(1), None, &fleet, now)
    };
    for number in 0..PINS_MAX {
        pin(format!("g{number}")).unwrap();
    }
    assert_eq!(pin("one-more".to_owned()), Err(OrderError::TooManyPins));
    pin("g7".to_owned()).unwrap();
}

#[test]
fn nobody_is_pinned_below_what_it_has() {
    let mut lab = Lab::usual();
    lab.host("h1").at = Some(7);
    let canary = "canary".parse().unwrap();
    let fleet = Hosts(&lab.hosts, lab.now);
    let past = lab
        .rollout
        .pin_group(canary, target(3), None, &fleet, at(0));
    assert!(matches!(past, Err(OrderError::Past { .. })), "{past:?}");
}

#[test]
fn outside_its_window_a_host_keeps_what_it_has_and_a_rollback_does_not_wait() {
    let mut lab = Lab::usual();
    lab.now = at_utc("2026-11-20T12:00:00Z");
    let db: GroupName = "db".parse().unwrap();
    lab.rules
        .windows
        .insert(db.clone(), vec!["Mon-Sun 22:00-05:00 UTC".parse().unwrap()]);
    lab.host("h7").groups.push(db);
    lab.published(2).everybody(2, LIVE).is("complete 2");
    assert_eq!(
        (lab.offered(2), lab.wanted(&"h7".parse().unwrap())),
        (99, Some(1))
    );
    let name = "h7".parse().unwrap();
    let member = lab.hosts[&name].member(&name, None, lab.now);
    let wanted = lab.rollout.wanted(&member, &lab.rules, at(lab.now));
    assert_eq!(wanted, Wanted::Later(target(2)), "and that is told");
    lab.now = at_utc("2026-11-20T22:00:00Z");
    lab.step();
    assert_eq!(lab.offered(2), 100);
    lab.everybody(2, LIVE);
    lab.now = at_utc("2026-11-21T12:00:00Z");
    lab.roll_back(target(1), "bad").unwrap();
    let effects = lab.rollout.went_back(again(3, 1));
    lab.take(effects);
    lab.step();
    assert_eq!(lab.offered(3), 100);
}

#[test]
fn a_rollback_past_what_is_complete_waits_for_no_window_either() {
    let mut lab = Lab::usual();
    lab.published(2).everybody(2, LIVE).is("complete 2");
    lab.now = at_utc("2026-11-20T12:00:00Z");
    let db: GroupName = "db".parse().unwrap();
    let night = "Mon-Sun 22:00-05:00 UTC".parse().unwrap();
    lab.rules.windows.insert(db.clone(), vec![night]);
    lab.host("h7").groups.push(db);
    lab.published(3).is("complete 2, running 3 wave 1 of 3");
    lab.roll_back(target(1), "bad").unwrap();
    let effects = lab.rollout.went_back(again(4, 1));
    lab.take(effects);
    lab.step();
    assert_eq!(lab.offered(4), 100);
}

#[test]
fn who_comes_with_what_was_taken_back_waits_for_no_window_though_a_newer_one_is_on_its_way() {
    let mut lab = Lab::usual();
    lab.published(2).everybody(2, LIVE);
    lab.roll_back(target(1), "bad").unwrap();
    lab.host("h7").away = true;
    let effects = lab.rollout.went_back(again(3, 1));
    lab.take(effects);
    lab.step().everybody(3, LIVE);
    lab.resume().unwrap();
    lab.published(4).everybody(4, LIVE).is("complete 4");
    lab.now = at_utc("2026-11-20T12:00:00Z");
    let db: GroupName = "db".parse().unwrap();
    let night = "Mon-Sun 22:00-05:00 UTC".parse().unwrap();
    lab.rules.windows.insert(db.clone(), vec![night]);
    lab.host("h7").groups.push(db);
    lab.host("h7").away = false;
    assert_eq!(lab.wanted(&"h7".parse().unwrap()), Some(4));
}

#[test]
fn whoever_is_at_it_when_its_window_closes_is_still_waited_for() {
    let mut lab = Lab::usual();
    let canary: GroupName = "canary".parse().unwrap();
    let night = "Mon-Sun 22:00-05:00 UTC".parse().unwrap();
    lab.rules.windows.insert(canary, vec![night]);
    lab.now = at_utc("2026-11-21T04:59:00Z");
    lab.published(2);
    lab.say("h0", 2, LIVE);
    lab.wait(120).is("complete 1, running 2 wave 1 of 3");
    lab.say("h1", 2, LIVE);
    lab.is("complete 1, running 2 wave 2 of 3");
}

#[test]
fn what_was_forced_on_hosts_before_their_wave_is_taken_back_with_a_halt() {
    let mut lab = Lab::usual();
    let canary: GroupName = "canary".parse().unwrap();
    let night = "Mon-Sun 22:00-05:00 UTC".parse().unwrap();
    lab.rules.windows.insert(canary, vec![night]);
    lab.now = at_utc("2026-11-21T12:00:00Z");
    lab.published(2).is("complete 1, running 2 wave 0 of 3");
    for (name, word) in [("h7", LIVE), ("h8", Answer::Refused)] {
        let now = lab.now;
        lab.host(name).offered.insert(2, (now, now));
        lab.say(name, 2, word);
    }
    lab.is("complete 1, owes 1 for 2");
}

#[test]
fn nobody_is_rolled_back_to_what_something_newer_took_the_place_of() {
    let mut lab = Lab::usual();
    lab.published(2).everybody(2, LIVE).published(3);
    lab.published(4).published(5); // 4 waited, and was never offered
    let refused = |lab: &mut Lab, to| lab.roll_back(target(to), "oh").unwrap_err();
    for to in [4, 5] {
        assert_eq!(refused(&mut lab, to), OrderError::Unproven(position(to)));
    }
    lab.publish(target(6), true);
    lab.step().is("complete 2, running 6 wave 1 of 3");
    for to in [3, 5] {
        assert_eq!(refused(&mut lab, to), OrderError::Unproven(position(to)));
    }
    lab.roll_back(target(1), "oh").unwrap();
}

#[test]
fn what_an_operator_paused_neither_promote_nor_supersede_sets_going() {
    let mut lab = Lab::usual();
    lab.published(2);
    lab.order(|lab, now| lab.rollout.pause("freeze".into(), now));
    let now = at(lab.now);
    let promoted = lab.rollout.promote("hurry".into(), now);
    assert!(matches!(promoted, Err(OrderError::Paused { .. })));
    lab.publish(target(3), true);
    let hosts = Hosts(&lab.hosts, lab.now);
    let superseded = lab.rollout.order(Order::Supersede, &hosts, &lab.rules, now);
    assert!(matches!(superseded, Err(OrderError::Paused { .. })));
    lab.is("complete 1, running 2 wave 1 of 3, paused Operator, waiting 3");
}

#[test]
fn a_second_rollback_takes_back_what_the_first_one_brought() {
    let mut lab = Lab::usual();
    lab.published(2).everybody(2, LIVE);
    lab.published(3).say("h0", 3, Answer::Refused);
    let effects = lab.rollout.went_back(again(4, 2));
    lab.take(effects);
    lab.step().everybody(4, LIVE);
    lab.roll_back(target(1), "bad, too").unwrap();
    lab.is("complete 4, owes 1 for 4");
}

#[test]
fn after_a_restart_it_goes_on_where_it_was() {
    let mut lab = Lab::usual();
    lab.published(2)
        .say("h0", 2, LIVE)
        .say("h1", 2, LIVE)
        .published(3);
    let kept = serde_json::to_string(&lab.rollout).unwrap();
    lab.rollout = serde_json::from_str(&kept).unwrap();
    lab.published(2)
        .published(3)
        .is("complete 1, running 2 wave 2 of 3, waiting 3");
    lab.everybody(2, LIVE).everybody(3, LIVE).is("complete 3");
}

#[test]
fn settle_time_passes_between_waves() {
    let mut lab = Lab::usual();
    lab.rules.settle = Duration::from_secs(60);
    lab.published(2).say("h0", 2, LIVE).say("h1", 2, LIVE);
    lab.wait(59).is("complete 1, running 2 wave 1 of 3");
    lab.wait(1).is("complete 1, running 2 wave 2 of 3");
}

#[test]
fn promoted_again_and_with_everybody_there_it_still_ends() {
    let mut lab = Lab::usual();
    lab.rules.settle = Duration::from_secs(3600);
    lab.published(2).say("h0", 2, LIVE).say("h1", 2, LIVE);
    for _ in 0..3 {
        lab.order(|lab, now| lab.rollout.promote("it is good".to_owned(), now));
    }
    lab.step().is("complete 1, running 2 wave 1 of 1");
    lab.everybody(2, LIVE).is("complete 2");
}

#[test]
fn a_wave_that_everybody_left_is_passed_over() {
    let mut lab = Lab::usual();
    lab.published(2);
    for name in ["h0", "h1"] {
        lab.hosts.remove(&name.parse::<AgentName>().unwrap());
    }
    lab.step().is("complete 1, running 2 wave 1 of 2");
    assert!(lab.noted.contains(&"wave-skipped 2".to_owned()));
}

#[test]
fn a_wave_whose_window_is_closed_is_waited_for() {
    let mut lab = Lab::usual();
    lab.now = at_utc("2026-11-23T12:00:00Z");
    let night = "Mon-Fri 22:00-05:00 UTC".parse().unwrap();
    lab.rules.windows = BTreeMap::from([("canary".parse().unwrap(), vec![night])]);
    lab.published(2);
    assert_eq!(lab.offered(2), 0, "not without its canaries");
    lab.is("complete 1, running 2 wave 0 of 3");
    assert_eq!(lab.noted, ["rollout 2", "rollout-waits 2"]);
    lab.now = at_utc("2026-11-23T22:00:00Z");
    lab.step().is("complete 1, running 2 wave 1 of 3");
    lab.say("h0", 2, LIVE).say("h1", 2, LIVE);
    lab.is("complete 1, running 2 wave 2 of 3");
}

#[test]
fn a_wave_that_everybody_left_settles_all_the_same() {
    let mut lab = Lab::usual();
    lab.rules.settle = Duration::from_secs(3600);
    lab.published(2).say("h0", 2, LIVE).say("h1", 2, LIVE);
    for name in ["h0", "h1"] {
        lab.host(name).groups.clear();
    }
    lab.wait(3599).is("complete 1, running 2 wave 0 of 2");
    lab.wait(1).is("complete 1, running 2 wave 1 of 2");
}

#[test]
fn a_member_that_vanishes_after_its_offer_counts_for_the_quorum_and_is_not_waited_for() {
    let mut lab = Lab::usual();
    lab.published(2).say("h0", 2, LIVE);
    lab.host("h1").away = true;
    lab.host("h1").seen = lab.now;
    lab.wait(1).is("complete 1, running 2 wave 2 of 3"); // one of two has proven it
    let mut lab = Lab::new(100, 3, &["group:canary", "100%"]);
    lab.published(2).say("h0", 2, LIVE);
    for name in ["h1", "h2"] {
        lab.host(name).away = true;
        lab.host(name).seen = lab.now;
    }
    lab.wait(60).is("nothing, running 2 wave 1 of 2"); // one of three has
    lab.wait(DEADLINE)
        .is("nothing, running 2 wave 1 of 2, paused Unwell");
    lab.host("h1").away = false;
    lab.say("h1", 2, LIVE).is("nothing, running 2 wave 2 of 2");
}

#[test]
fn after_a_start_no_wave_begins_before_the_agents_that_were_connected_are_back() {
    let mut lab = Lab::usual();
    lab.published(2).say("h0", 2, LIVE).say("h1", 2, LIVE);
    lab.rules.settle = Duration::from_secs(1);
    lab.everybody(2, LIVE)
        .wait(1)
        .everybody(2, LIVE)
        .wait(1)
        .is("complete 2");
    // The next master knows the state it kept. 20 agents are not back; one was away before.
    let now = lab.now;
    for (number, host) in lab.hosts.values_mut().enumerate() {
        host.was_connected = number != 0;
        let away = number < 21;
        host.returning = away && number != 0;
        (host.away, host.seen) = (away, now - 3600);
    }
    lab.rollout.resumed(at(now));
    lab.rules.waves = vec!["10%".parse().unwrap(), "100%".parse().unwrap()];
    lab.published(3)
        .wait(60)
        .is("complete 2, running 3 wave 0 of 2");
    for host in lab.hosts.values_mut().skip(10).take(5) {
        (host.away, host.returning) = (false, false);
    }
    lab.step().is("complete 2, running 3 wave 0 of 2"); // 84 of 99
    for host in lab.hosts.values_mut().skip(15).take(6) {
        (host.away, host.returning) = (false, false);
    }
    lab.step().is("complete 2, running 3 wave 1 of 2"); // 90 of 99
    // Those that stay away are waited for no longer than three minutes.
    let mut other = Lab::usual();
    for host in other.hosts.values_mut().take(50) {
        (host.away, host.was_connected, host.returning) = (true, true, true);
    }
    other.rollout.resumed(at(other.now));
    other
        .published(2)
        .wait(179)
        .is("complete 1, running 2 wave 0 of 3");
    other.wait(1);
    assert!(other.offered(2) > 0);
}

#[test]
fn progress_renews_a_members_deadline_to_twice_that_of_the_wave_at_most() {
    let mut lab = Lab::new(30, 5, &["group:canary", "100%"]);
    lab.published(1);
    for name in ["h0", "h1"] {
        lab.say(name, 1, LIVE);
    }
    let begun = lab.now;
    for _ in 0..60 {
        lab.is("nothing, running 1 wave 1 of 2");
        let now = lab.now + 30;
        for name in ["h2", "h3", "h4"] {
            lab.host(name).offered.insert(1, (begun, now));
        }
        lab.wait(30);
    }
    assert_eq!(lab.now - begun, 2 * DEADLINE);
    lab.is("nothing, running 1 wave 1 of 2, paused Unwell");
}

#[test]
fn a_clock_that_was_in_the_future_stops_nothing() {
    let mut lab = Lab::usual();
    lab.rules.settle = Duration::from_secs(60);
    lab.now += 1 << 30;
    lab.published(2).say("h0", 2, LIVE).say("h1", 2, LIVE);
    lab.now -= 1 << 30;
    lab.step().is("complete 1, running 2 wave 1 of 3");
    lab.wait(60).is("complete 1, running 2 wave 2 of 3");
}

#[test]
fn a_group_of_which_a_part_is_ahead_is_not_pinned_to_where_it_is() {
    let mut lab = Lab::usual();
    lab.published(2).say("h0", 2, LIVE);
    let split = lab.pin_where_it_is("canary");
    assert!(matches!(split, Err(OrderError::Split { .. })), "{split:?}");
    lab.say("h1", 2, LIVE);
    lab.pin_where_it_is("canary").unwrap();
    assert_eq!(
        number(&lab.rollout.pins().values().next().unwrap().target),
        2
    );
}

#[test]
fn where_a_halt_took_nobody_back_an_operator_can() {
    let mut lab = Lab::usual();
    lab.rules.rollback_on_halt = false;
    lab.published(2)
        .say("h1", 2, LIVE)
        .say("h0", 2, Answer::Refused);
    lab.is("complete 1");
    lab.roll_back(target(1), "h1 is still there").unwrap();
    lab.is("complete 1, owes 1 for 2");
}

#[test]
fn what_is_on_its_way_is_not_rolled_back_to() {
    let mut lab = Lab::usual();
    lab.published(2);
    let on_its_way = OrderError::OnItsWay(position(2));
    assert_eq!(lab.roll_back(target(2), "now"), Err(on_its_way));
}

#[test]
fn the_same_databases_do_not_come_again_behind_those_that_were_halted() {
    let mut lab = Lab::usual();
    lab.rules.rollback_on_halt = false;
    lab.published(2);
    lab.publish(again(4, 2), false);
    lab.say("h0", 2, Answer::Refused).is("complete 1");
    assert_eq!(lab.noted.last().unwrap(), "look");
}

#[test]
fn hosts_with_a_window_hold_nobody_up_but_are_waited_for_in_the_end() {
    let mut lab = Lab::new(20, 1, &["group:canary", "group:db", "100%"]);
    lab.published(1).everybody(1, LIVE);
    lab.now = at_utc("2026-11-23T12:00:00Z");
    let night = "Mon-Fri 22:00-05:00 UTC".parse().unwrap();
    let db: GroupName = "db".parse().unwrap();
    lab.rules.windows = BTreeMap::from([(db.clone(), vec![night])]);
    for name in ["h7", "h8"] {
        lab.host(name).groups.push(db.clone());
    }
    lab.published(2).everybody(2, LIVE).is("complete 2");
    // Where all but the canary have one, the night is waited for, and a newer one goes first.
    for i in 1..20 {
        lab.host(&format!("h{i}")).groups = vec![db.clone()];
    }
    lab.published(3).say("h0", 3, LIVE);
    lab.is("complete 2, running 3 wave 1 of 3");
    lab.published(4).say("h0", 4, LIVE);
    lab.is("complete 2, running 4 wave 1 of 3");
    lab.now = at_utc("2026-11-23T22:00:00Z");
    lab.step().is("complete 2, running 4 wave 2 of 3");
}

#[test]
fn settle_time_does_not_pass_where_nobody_is_left() {
    let mut lab = Lab::new(2, 2, &["group:canary", "10%", "100%"]);
    lab.rules.settle = Duration::from_secs(60);
    lab.published(1).everybody(1, LIVE).is("complete 1");
}

#[test]
fn a_host_that_is_past_it_is_left_alone() {
    let mut lab = Lab::usual();
    lab.host("h7").at = Some(9);
    lab.published(2).everybody(2, LIVE).is("complete 2");
    assert_eq!(
        (lab.offered(2), lab.wanted(&"h7".parse().unwrap())),
        (99, Some(9))
    );
}

fn at_utc(text: &str) -> i64 {
    text.parse::<Timestamp>().unwrap().as_second()
}

impl Lab {
    fn resume(&mut self) -> Result<(), OrderError> {
        let fleet = Hosts(&self.hosts, self.now);
        let effects = self
            .rollout
            .resume(None, &fleet, &self.rules, at(self.now))?;
        self.take(effects);
        Ok(())
    }

    fn pin(&mut self, group: &str, number: u64) -> Result<Vec<Effect>, OrderError> {
        let fleet = Hosts(&self.hosts, self.now);
        let (group, target) = (group.parse().unwrap(), target(number));
        let now = at(self.now);
        self.rollout.pin_group(group, target, None, &fleet, now)
    }

    fn roll_back(&mut self, to: Target, why: &str) -> Result<(), OrderError> {
        let fleet = Hosts(&self.hosts, self.now);
        let order = Order::RollBack(to, why.to_owned());
        let effects = self
            .rollout
            .order(order, &fleet, &self.rules, at(self.now))?;
        self.take(effects);
        Ok(())
    }

    fn pin_where_it_is(&mut self, group: &str) -> Result<(), OrderError> {
        let fleet = Hosts(&self.hosts, self.now);
        let order = Order::Pin(group.parse().unwrap(), None, None);
        let effects = self
            .rollout
            .order(order, &fleet, &self.rules, at(self.now))?;
        self.take(effects);
        Ok(())
    }

    #[track_caller]
    fn order(
        &mut self,
        order: impl FnOnce(&mut Self, Timestamp) -> Result<Vec<Effect>, OrderError>,
    ) {
        let now = at(self.now);
        let effects = order(self, now).unwrap();
        self.take(effects);
    }
}
