//! Scripts of what happens to an agent, and what the core does about each step, in order.

use clamcast_proto::dsse::{PublicKey, sign};
use clamcast_proto::fresh::Freshness;
use clamcast_proto::keys::KeySet;
use clamcast_proto::manifest::{Publisher, content_digest};
use clamcast_proto::receipt::{Found, InstallNumber};
use clamcast_proto::wire::{Have, NeedFile, PartEncoding, PartKind};
use clamcast_proto::{Epoch, Generation};
use jiff::SignedDuration;

use super::*;
use crate::config::DriftPolicy;
use crate::install::{Findings, Installed, Set};

fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

fn keys(version: u64) -> Verified<KeySet> {
    let keys = KeySet {
        fleet: "bank".parse().unwrap(),
        version,
        epoch: Epoch(1),
        issued: Timestamp::UNIX_EPOCH,
        root: PublicKey::of(&key(1)),
        manifest: vec![PublicKey::of(&key(2))],
        audit: vec![PublicKey::of(&key(3))],
    };
    sign(keys, &key(1))
}

/// A generation with the file `x.ndb`.
fn manifest(generation: u64) -> Verified<Manifest> {
    let files = vec![ManifestFile {
        captured: None,
        name: "x.ndb".parse().unwrap(),
        size: 1,
        sha256: Digest::of(&generation.to_be_bytes()),
        container: None,
    }];
    let manifest = Manifest {
        fleet: "bank".parse().unwrap(),
        epoch: Epoch(1),
        generation: Generation::new(generation).unwrap(),
        publisher: Publisher("p1".into()),
        created: Timestamp::UNIX_EPOCH,
        previous: None,
        rollback_of: None,
        content: content_digest(files.iter().map(|f| (&f.name, f.size, &f.sha256))),
        files,
    };
    sign(manifest, &key(2))
}

fn standing(generation: u64, outcome: Outcome) -> Standing {
    let set = Set::from(&manifest(generation));
    Standing {
        settled: Some(set.sha256()),
        installed: Some(Installed {
            set,
            install: InstallNumber(generation),
            outcome,
        }),
        phase: Phase::Idle,
        waits_for_clamd: outcome == Outcome::Installed,
        is_unproven: outcome == Outcome::Installed,
    }
}

fn completed(generation: u64, outcome: Outcome) -> Box<Completed> {
    let set = Set::from(&manifest(generation));
    let error = (outcome != Outcome::Live).then(|| "why".to_owned());
    Box::new(Completed {
        files: set.files(),
        set,
        outcome,
        install: InstallNumber(generation),
        foreign: Vec::new(),
        adopted: Vec::new(),
        clamd: ClamdReport::default(),
        error,
        blamed: None,
    })
}

fn unwritten() -> StateError {
    StateError::Write {
        path: PathBuf::from("/"),
        source: std::io::Error::other("no room"),
    }
}

/// An agent, and what a script needs to know of it.
struct Agent {
    core: Core,
    now: Now,
    /// The offer at hand.
    job: Option<Arc<Job>>,
    connections: u64,
}

impl Agent {
    /// One that has this generation live, or nothing.
    fn new(generation: Option<u64>) -> Self {
        let now = Now {
            clock: Timestamp::UNIX_EPOCH + SignedDuration::from_hours(24 * 365),
            at: Instant::now(),
        };
        let identity = Identity {
            fleet: "bank".parse().unwrap(),
            agent: "web1".parse().unwrap(),
            key: key(9),
        };
        let settings = Settings {
            stale: Stale::Warn,
            splay: Duration::ZERO,
            directory: PathBuf::from("/db"),
            drift: DriftPolicy::Repair,
            rescan: Duration::from_secs(3600),
        };
        let mark = generation.map(|generation| Mark::of(&manifest(generation)));
        let kept = Kept {
            trust: Trust::new(keys(1), mark),
            accepted: generation.map(|_| now.clock),
            receipts: Receipts::default(),
            fresh: None,
            accepts: Features::default(),
            first_start: now.clock,
            left_alone: drift::Kept::default(),
        };
        let standing = generation.map(|generation| standing(generation, Outcome::Live));
        let standing = standing.unwrap_or_default();
        Self {
            core: Core::new(identity, settings, kept, standing, now, 1.0),
            now,
            job: None,
            connections: 0,
        }
    }

    /// One that runs and is connected.
    fn connected(generation: Option<u64>) -> Self {
        let mut agent = Self::new(generation);
        agent.run("start; looked; resumed; welcome");
        agent
    }

    fn event(&mut self, step: &str) -> Event {
        let words: Vec<_> = step.split_whitespace().collect();
        let outcome = |word: &str| match word {
            "live" => Outcome::Live,
            "installed" => Outcome::Installed,
            "refused" => Outcome::Refused,
            "fault" => Outcome::HostFault,
            other => panic!("{other}"),
        };
        let number = |word: &str| word.parse::<u64>().unwrap();
        match words[..] {
            ["start"] => Event::Started,
            ["looked", ref wrong @ ..] => {
                let sighting = |name: &&str| Sighting {
                    name: (*name).to_owned(),
                    found: Found::Missing,
                    state: None,
                    owner: None,
                };
                let wrong = wrong.iter().map(sighting).collect();
                Event::Looked(Box::new(Looked {
                    depth: Depth::Touched,
                    look: Look::Made(Findings {
                        wrong,
                        ..Findings::default()
                    }),
                    updater: None,
                    clamd: ClamdReport::default(),
                }))
            }
            ["resumed"] => Event::Resumed(None),
            ["welcome", ref keys_of @ ..] => {
                self.connections += 1;
                let keys = keys_of.first().map(|version| keys(number(version)));
                Event::Welcome(Box::new(Greeting {
                    connection: ConnectionId(self.connections),
                    address: "192.0.2.1:7310".to_owned(),
                    welcome: Welcome {
                        fleet: "bank".parse().unwrap(),
                        master_version: "1".to_owned(),
                        time: self.now.clock,
                        keep_alive: 15,
                        keys: keys.map(|keys| keys.envelope().clone()),
                        accepts: Features::default(),
                        known: Vec::new(),
                    },
                    clamd: ClamdReport::default(),
                    hostname: None,
                }))
            }
            ["offer", generation, ref how @ ..] => {
                let manifest = manifest(number(generation));
                let fresh = Freshness {
                    fleet: "bank".parse().unwrap(),
                    epoch: Epoch(1),
                    generation: manifest.generation,
                    manifest_sha256: manifest.payload_sha256(),
                    issued: self.now.clock,
                    expires: self.now.clock + SignedDuration::from_hours(48),
                };
                let keys = how.contains(&"keys").then(|| keys(2).envelope().clone());
                Event::Message(ToAgent::Offer(Box::new(Offer {
                    offer: OfferId(number(generation)),
                    manifest: manifest.envelope().clone(),
                    fresh: sign(fresh, &key(2)).envelope().clone(),
                    keys,
                    rehash: how.contains(&"forced"),
                    full: false,
                })))
            }
            ["saved", what] => Event::Saved(saved(what), Ok(())),
            ["unsaved", what] => Event::Saved(saved(what), Err(unwritten())),
            ["plan", ref files @ ..] => {
                let need = |name: &&str| NeedFile {
                    name: name.parse().unwrap(),
                    have: Have::Nothing,
                    resume_at: 0,
                    resume: None,
                };
                let needs = files.iter().map(need).collect();
                Event::Planned(Vec::new(), Ok(Planned::Needs(needs)))
            }
            ["part", offer, name] => Event::Part(Part {
                offer: OfferId(number(offer)),
                name: name.parse().unwrap(),
                encoding: PartEncoding {
                    kind: PartKind::Full,
                    zstd: false,
                    from: None,
                    to: Digest::of(b""),
                    length: 1,
                },
                offset: 0,
            }),
            ["spoilt", name] => {
                let name: DatabaseName = name.parse().unwrap();
                let reason = "a bit".to_owned();
                let damaged = ReceiveError::Damaged {
                    name: name.clone(),
                    reason,
                };
                Event::Received(name, Err(damaged))
            }
            ["got", name] => Event::Received(name.parse().unwrap(), Ok(())),
            ["stands", generation, word] => {
                Event::Standing(standing(number(generation), outcome(word)))
            }
            ["phase", word] => {
                let phase = match word {
                    "swapping" => Phase::Swapping,
                    "proving" => Phase::Proving,
                    other => panic!("{other}"),
                };
                let standing = self.core.standing.clone();
                Event::Standing(Standing { phase, ..standing })
            }
            ["ended", generation, word] => {
                let job = self.job.take().expect("an install is under way");
                Event::Installed(job, completed(number(generation), outcome(word)))
            }
            ["probed", generation, word] => {
                Event::Probed(Some(completed(number(generation), outcome(word))))
            }
            ["probed"] => Event::Probed(None),
            ["repaired", generation, word] => Event::Repaired(
                Ok(Some(completed(number(generation), outcome(word)))),
                ClamdReport::default(),
            ),
            ["acknowledged", seq] => Event::Message(ToAgent::ReceiptAck { seq: number(seq) }),
            ["lost"] => Event::Disconnected("gone".to_owned()),
            ["touched"] => Event::Touched { run_begun: false },
            ["stopping"] => Event::Stopping,
            ["stopped"] => Event::Stopped,
            // So much time passes, in which so many bytes came.
            [time] | [time, "without", "bytes"] => {
                let passed = humantime::parse_duration(time).unwrap();
                self.now.at += passed;
                self.now.clock += SignedDuration::try_from(passed).unwrap();
                let came = if words.len() == 1 { 1 } else { 0 };
                Event::Tick(self.core.reported + came)
            }
            _ => panic!("{step}"),
        }
    }

    /// What is done about one step.
    fn run(&mut self, script: &str) -> Vec<String> {
        let mut done = Vec::new();
        for step in script.split(';').map(str::trim) {
            let event = self.event(step);
            let actions = self.core.handle(event, self.now, 1.0);
            let words = actions.iter().filter_map(|action| self.word(action));
            done.push(words.collect::<Vec<_>>().join(", "));
            for action in actions {
                if let Action::Start(Task::Plan(job, _) | Task::Install(job)) = action {
                    self.job = Some(job);
                }
            }
        }
        done
    }

    /// An action in words. That something is broken off is said only of transfers and repairs: the rest
    /// may always be.
    fn word(&self, action: &Action) -> Option<String> {
        let word = match action {
            Action::Save(record) => match record {
                Record::Keys(_) => "save keys".to_owned(),
                Record::Mark(kept) => format!("save mark {}", kept.mark.position.generation),
                Record::Fresh(_) => "save freshness".to_owned(),
                Record::Accepts(_) => "save features".to_owned(),
                Record::Checkpoint(_) => "save checkpoint".to_owned(),
                Record::LeftAlone(_) => "save repairs".to_owned(),
                Record::Receipt(seq, _) => format!("save receipt {seq}"),
                Record::ReceiptDone(seq, last) => {
                    let last = if last.is_some() { " as the last" } else { "" };
                    format!("remove receipt {seq}{last}")
                }
            },
            Action::Say(connection, message) => {
                let old = match connection.0 == self.connections {
                    true => "",
                    false => " on an old connection",
                };
                let said = match message {
                    ToMaster::Hello(_) => "hello".to_owned(),
                    ToMaster::Need { files, .. } => format!("need {}", files.len()),
                    ToMaster::Progress { phase, .. } => format!("{phase:?}").to_lowercase(),
                    ToMaster::Receipt { .. } => "receipt".to_owned(),
                    ToMaster::Error { .. } => "no".to_owned(),
                    ToMaster::Reoffer {} => "offer again".to_owned(),
                };
                format!("say {said}{old}")
            }
            Action::Note(note) => format!("note {}", note.event),
            Action::Answer(Ok(())) => "go on".to_owned(),
            Action::Answer(Err(_)) => "hang up".to_owned(),
            Action::Receive(part, _) => format!("receive {}", part.name),
            Action::Start(task) => match task {
                Task::Fault(_, fault) => return Some(format!("report `{fault}`")),
                Task::Plan(..) => "plan",
                Task::Install(_) => "install",
                Task::Resume => "resume",
                Task::Ping => "ping",
                Task::Probe { unproven: true } => "probe",
                Task::Probe { unproven: false } => "look at clamd",
                Task::Look(_) => "look",
                Task::Scan => "scan",
                Task::Repair => "repair",
            }
            .to_owned(),
            Action::Cut(Cut::Transfers) => "cut transfers".to_owned(),
            Action::Cut(Cut::Repair) => "cut the repair".to_owned(),
            Action::Cut(Cut::Probe | Cut::Look) => return None,
        };
        Some(word)
    }

    #[track_caller]
    fn check(&mut self, script: &str, expected: &[&str]) {
        assert_eq!(self.run(script), expected);
    }
}

fn saved(what: &str) -> Saved {
    match what {
        "keys" => Saved::Keys,
        "mark" => Saved::Mark,
        seq => Saved::ReceiptDone(seq.parse().unwrap()),
    }
}

#[test]
fn the_files_are_looked_at_before_anything_is_resumed_or_said() {
    Agent::new(Some(1)).check(
        "start; looked; resumed; welcome",
        &["note started, look", "resume, ping", "", "say hello, go on"],
    );
    // What the look finds is in the Hello.
    let mut agent = Agent::new(Some(1));
    agent.check(
        "start; looked x.ndb",
        &[
            "note started, look",
            "note drift, save receipt 1, resume, ping",
        ],
    );
}

#[test]
fn an_offer_is_on_disk_before_anything_is_done_about_it() {
    let mut agent = Agent::connected(Some(1));
    agent.check(
        "offer 2; saved mark; plan x.ndb; part 2 x.ndb; got x.ndb; plan; stands 2 live; ended 2 live",
        &[
            "save freshness, note accepted, save mark 2",
            "plan",
            "say need 1",
            "receive x.ndb",
            "plan",
            "say staged, install",
            "",
            "note installed, save receipt 1, say receipt",
        ],
    );
    agent.check("acknowledged 1", &["remove receipt 1 as the last"]);
}

#[test]
fn an_offer_that_cannot_be_remembered_is_a_fault_of_the_host_and_tried_again() {
    let mut agent = Agent::connected(Some(1));
    agent.check(
        "offer 2; unsaved mark; 1m; saved mark",
        &[
            "save freshness, note accepted, save mark 2",
            "report `cannot write /`",
            "save mark 2, look at clamd, say fetching",
            "plan",
        ],
    );
}

#[test]
fn what_comes_out_wrong_in_every_round_is_a_fault_that_names_the_file() {
    let mut agent = Agent::connected(None);
    agent.run("offer 1; saved mark");
    for _ in 0..slot::ROUNDS_MAX {
        agent.check(
            "plan x.ndb; part 1 x.ndb; spoilt x.ndb",
            &["say need 1", "receive x.ndb", "plan"],
        );
    }
    agent.check("plan x.ndb", &["report `cannot receive x.ndb`"]);
}

#[test]
fn a_newer_key_set_counts_once_it_is_on_disk() {
    let mut agent = Agent::new(None);
    agent.run("start; looked; resumed");
    agent.check(
        "welcome 2; saved keys",
        &["save keys", "note keys, say hello, go on"],
    );
    let mut agent = Agent::new(None);
    agent.run("start; looked; resumed");
    agent.check(
        "welcome 2; unsaved keys",
        &["save keys", "note refused, hang up"],
    );
    let mut agent = Agent::connected(None);
    agent.check(
        "offer 1 keys; saved keys",
        &[
            "save keys",
            "note keys, save freshness, note accepted, save mark 1",
        ],
    );
    let mut agent = Agent::connected(None);
    agent.check(
        "offer 1 keys; unsaved keys",
        &["save keys", "note refused, say no"],
    );
}

#[test]
fn only_what_is_installed_is_taken_below_the_mark() {
    let mut agent = Agent::connected(Some(2));
    agent.check("offer 1", &["note refused, say no"]);
    // It refused 3 and has 2: the master may mend that.
    agent.run("offer 3; saved mark; plan; ended 3 refused");
    agent.check(
        "offer 2; offer 1",
        &[
            "save freshness, note accepted, plan",
            "note refused, say no",
        ],
    );
}

#[test]
fn an_offer_that_became_void_while_it_waited_is_declined() {
    let mut agent = Agent::connected(Some(2));
    agent.run("offer 3; saved mark; plan");
    agent.check(
        "offer 2; stands 3 live; ended 3 live",
        &[
            "save freshness, note accepted",
            "",
            "note installed, save receipt 1, say receipt, say no",
        ],
    );
}

#[test]
fn a_receipt_waits_until_it_is_acknowledged_and_off_the_disk() {
    let mut agent = Agent::connected(Some(1));
    agent.run("offer 2; saved mark; plan; lost; stands 2 live");
    agent.check(
        "ended 2 live; welcome; acknowledged 1; unsaved 1; lost; welcome; acknowledged 1; saved 1; \
         acknowledged 1; lost; welcome",
        &[
            "note installed, save receipt 1",
            "say hello, say receipt, go on",
            "remove receipt 1 as the last",
            "",
            "",
            "say hello, say receipt, go on",
            "remove receipt 1 as the last",
            "",
            "",
            "",
            "say hello, go on",
        ],
    );
}

#[test]
fn a_mark_counts_although_it_could_not_be_saved_for_the_write_may_have_had_its_effect() {
    let mut agent = Agent::connected(Some(1));
    agent.run("offer 3; unsaved mark");
    agent.check(
        "offer 2; offer 3; saved mark",
        &["note refused, say no", "save mark 3", "plan"],
    );
}

#[test]
fn a_connection_waits_for_the_first_look() {
    let mut agent = Agent::new(Some(1));
    agent.check(
        "start; welcome; looked",
        &["note started, look", "", "resume, ping, say hello, go on"],
    );
}

#[test]
fn the_master_hears_of_the_phases_and_of_transfers_that_move() {
    let mut agent = Agent::connected(None);
    agent.run("offer 1; saved mark; plan x.ndb");
    agent.check(
        "15s; 15s without bytes; part 1 x.ndb; got x.ndb; plan; phase swapping; phase proving; 15s",
        &[
            "look at clamd, say fetching",
            "",
            "receive x.ndb",
            "plan",
            "say staged, install",
            "say swapping",
            "say proving",
            "say proving",
        ],
    );
}

#[test]
fn a_part_that_nobody_waits_for_is_not_received() {
    let mut agent = Agent::connected(None);
    agent.run("offer 1; saved mark; plan x.ndb");
    agent.check(
        "part 7 x.ndb; part 1 y.ndb; part 1 x.ndb; part 1 x.ndb",
        &["", "", "receive x.ndb", ""],
    );
}

#[test]
fn clamd_is_asked_until_it_has_the_set_and_then_once_a_minute() {
    let mut agent = Agent::connected(Some(1));
    agent.run("offer 2; saved mark; plan; stands 2 installed");
    agent.check(
        "ended 2 installed; 1s; probed; 2s; stands 2 live; probed 2 live; 60s",
        &[
            "note installed, save receipt 1, say receipt",
            "probe",
            "",
            "probe",
            "",
            "note installed, save receipt 2, say receipt",
            "look at clamd, look",
        ],
    );
}

#[test]
fn changed_files_are_reported_and_repaired_between_installs() {
    let mut agent = Agent::connected(Some(1));
    agent.check(
        "touched; 500ms; looked x.ndb; repaired 1 live",
        &[
            "scan",
            "look at clamd, look",
            "note drift, save receipt 1, say receipt, repair",
            "note installed, note repair, save repairs, save receipt 2, say receipt",
        ],
    );
    // What an install does itself is no drift.
    agent.run("offer 2; saved mark; plan");
    agent.check("touched; 1m; looked x.ndb", &["", "say staged", ""]);
}

#[test]
fn an_install_makes_a_repair_give_way() {
    let mut agent = Agent::connected(Some(1));
    agent.run("touched; 500ms; looked x.ndb");
    agent.check(
        "offer 2; saved mark",
        &[
            "save freshness, note accepted, save mark 2",
            "cut the repair, plan",
        ],
    );
}

#[test]
fn a_newer_offer_cuts_the_transfers_of_the_older_one() {
    let mut agent = Agent::connected(None);
    agent.run("offer 1; saved mark; plan x.ndb; part 1 x.ndb");
    agent.check(
        "offer 2; saved mark; got x.ndb",
        &[
            "save freshness, note accepted, save mark 2, cut transfers",
            "",
            "plan",
        ],
    );
}

#[test]
fn at_the_end_what_came_of_an_install_is_kept_and_nothing_is_begun() {
    let mut agent = Agent::connected(Some(1));
    agent.run("offer 2; saved mark; plan");
    agent.check(
        "stopping; offer 3; touched; stands 2 live; ended 2 live; stopped",
        &[
            "",
            "",
            "",
            "",
            "note installed, save receipt 1, say receipt",
            "note stopped",
        ],
    );
}
