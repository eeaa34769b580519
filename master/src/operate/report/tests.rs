//! The JSON of every answer, which scripts rely on: keys may be added, none may change.

use clamcast_proto::manifest::{ContainerFacts, ManifestFile, SignedBy};
use clamcast_proto::receipt::{ClamdReport, ClamdState, Drift, Found, Proof};
use clamcast_proto::wire::OtherMaster;
use clamcast_proto::{Digest, Epoch, Generation};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;
use crate::config::units::UnitName;
use crate::fleet::agents::{Counts, ThinVersion, Turn, tests::manifest};
use crate::fleet::budget::Exceeded;
use crate::fleet::force::{End, News};
use crate::fleet::rollout::{Awaited, Tally};
use crate::operate::api::{Forced, Publication, PublicationOutcome};
use crate::publish::publisher::RefusalKind;

const CONTENT: &str = "fde3840f0bd4122539b34bd73b182519656ac15cd7f2a2cbb07a9649a49180d2";

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn position(number: u64) -> Position {
    Position {
        epoch: Epoch(1),
        generation: Generation::new(number).unwrap(),
    }
}

fn target(number: u64) -> Value {
    json!({ "position": position(number), "manifest_sha256": CONTENT, "content": CONTENT })
}

fn withdrawal(number: u64, outcome: &str) -> Value {
    json!({ "content": CONTENT, "position": position(number), "outcome": outcome, "since": at(1) })
}

/// A generation with a container and a loose file.
fn generation_of(number: u64) -> Manifest {
    let sha256: Digest = CONTENT.parse().unwrap();
    let file = |name: &str, container| ManifestFile {
        captured: None,
        name: name.parse().unwrap(),
        size: 5,
        sha256,
        container,
    };
    let daily = ContainerFacts {
        version: 27821,
        signatures: 2,
        built: Some(at(0)),
        signed_by: Some(SignedBy::Talos),
    };
    Manifest {
        content: sha256,
        files: vec![file("a.ndb", None), file("daily.cld", Some(daily))],
        ..Manifest::clone(&manifest(number))
    }
}

fn host(name: &str, installed: u64, outcome: &str) -> Row {
    Row {
        name: name.parse().unwrap(),
        groups: vec!["canary".parse().unwrap()],
        connected: true,
        position: Some(position(installed)),
        live: true,
        wanted: Some(position(7)),
        pinned: false,
        taken_back: false,
        conformant: outcome == "live",
        outcome: outcome.to_owned(),
        error: None,
        since: at(60),
        clamd: ClamdReport {
            state: ClamdState::Up,
            version: Some("ClamAV 1.4.3/27821/Sun".to_owned()),
            proof: Proof::Canary,
            note: None,
        },
        foreign: vec!["urlhaus.ndb".to_owned()],
        adopted: vec!["local.ign2".parse().unwrap()],
        drift: vec![Drift {
            name: "daily.cld".parse().unwrap(),
            found: Found::Changed,
            mended: true,
        }],
        address: Some("10.0.0.1:7310".parse().unwrap()),
        certificate_ends: at(86_400 * 365),
        coming: false,
        offered: None,
        answered: None,
    }
}

/// A host that has never installed anything and is disconnected.
fn newcomer(name: &str) -> Row {
    Row {
        connected: false,
        position: None,
        live: false,
        wanted: None,
        clamd: ClamdReport::default(),
        foreign: vec![],
        adopted: vec![],
        drift: vec![],
        address: None,
        certificate_ends: at(86_400),
        ..host(name, 1, "none")
    }
}

fn view(rollout: Value, rows: Vec<Row>) -> View {
    let mut fields = json!({
        "complete": null, "urgent": null, "running": null, "waiting": null, "pins": {},
        "failed": null, "owed": null, "held": null,
    });
    let given = rollout.as_object().unwrap().clone();
    fields.as_object_mut().unwrap().extend(given);
    let rollout: Rollout = serde_json::from_value(fields).unwrap();
    View {
        current: None,
        tallies: rollout.running().map(|_| Default::default()),
        rollout,
        newest: None,
        windows: vec![],
        deadline: std::time::Duration::from_secs(900),
        stragglers: vec![],
        thin: vec![],
        counts: Counts {
            total: 3,
            connected: 2,
            conformant: 1,
            behind: 1,
            failed: 1,
        },
        unsettled: vec![],
        rows,
        waiting: None,
        reconnecting: None,
        twins: vec![],
        exceeded: vec![],
        other_masters: vec![],
    }
}

/// A generation on its way, in the second of three waves, with everything that can hold it up.
fn held_up() -> View {
    let run = json!({
        "target": target(7), "since": at(10), "promoted": false, "done": null, "unwell_seen": 0,
        "begun": [{
            "wave": "10%", "members": "everybody", "since": at(20), "timed_from": at(20),
        }],
        "ahead": ["group:db"], "skipped": ["group:canary"],
        "waits_for_window": true, "waits_for_group": at(30),
        "paused": {
            "kind": "operator", "reason": "freeze", "since": at(40),
            "before": { "kind": "unwell", "reason": "2 of 5 are unwell", "since": at(35) },
        },
        "weighing": { "ClamAV 1.4.3": { "refused": ["web1"], "since": at(50) } },
        "withheld": {
            "ClamAV 1.0.9": { "cause": "refused", "reason": "web2 refused it", "since": at(55) },
        },
    });
    let rollout = json!({
        "complete": target(6), "running": run, "waiting": target(8),
        "pins": { "db": { "target": target(5), "reason": null, "since": at(5) } },
        "unfit": [[CONTENT, ["ClamAV 0.103"]]],
        "set_aside": {
            "web3": { "refused": position(4), "rollouts": 2, "reason": "it lies", "since": at(15) },
        },
    });
    let rows = vec![
        host("web1", 6, "refused"),
        host("web2", 7, "live"),
        newcomer("web3"),
    ];
    let mut view = view(rollout, rows);
    let mut all = Tally::default();
    (all.members, all.refused, all.named) = (5, 1, vec!["web1".parse().unwrap()]);
    let mut wave = Tally::default();
    (wave.members, wave.live, wave.unsettled) = (3, 1, 1);
    wave.waits_for = vec![Awaited {
        agent: "web2".parse().unwrap(),
        until: at(920),
    }];
    view.tallies = Some((all, wave));
    view.windows = vec!["db: Mon-Fri 22:00-05:00 UTC".to_owned()];
    view.stragglers = vec!["web3".parse().unwrap()];
    view.thin = vec![ThinVersion {
        version: "ClamAV 1.4.3".to_owned(),
        canaries: 1,
        hosts: 2,
        one: "web2".parse().unwrap(),
    }];
    view
}

/// A rollback after a halt, which one host has yet to take and another cannot.
fn rolling_back() -> View {
    let rollout = json!({
        "complete": target(8), "urgent": position(7), "withdrawn": [withdrawal(7, "halted")],
        "failed": { "target": target(7), "how": "halted", "reason": "web1 refused it", "since": at(70) },
        "owed": { "to": target(6), "of": target(5) },
        "held": { "reason": "rollback by root", "since": at(80) },
    });
    let at_it = Row {
        wanted: Some(position(8)),
        ..host("web1", 7, "fetching")
    };
    let left = Row {
        error: Some("disk is full".to_owned()),
        ..host("web2", 7, "host_fault")
    };
    let mut view = view(rollout, vec![at_it, left]);
    view.unsettled = vec!["web1".parse().unwrap()];
    view
}

/// `answer` has the JSON that stands under `name` in `answers.json`. A command reads all of it, also with
/// keys of a newer daemon.
fn check<T: Serialize + DeserializeOwned>(name: &str, answer: T) {
    let mut answers: Value = serde_json::from_str(include_str!("answers.json")).unwrap();
    let json = serde_json::to_value(answer).unwrap();
    let mut newer = json.clone();
    extend(&mut newer);
    let read: T = serde_json::from_value(newer).expect(name);
    assert_eq!(serde_json::to_value(read).unwrap(), json, "{name}");
    assert_eq!(json, answers[name].take(), "{name}: {json:#}");
}

/// Adds a key to each object that has fields, not names, for keys.
fn extend(json: &mut Value) {
    match json {
        Value::Object(fields) => {
            for (key, value) in fields.iter_mut() {
                if ["set_aside", "weighing", "withheld"].contains(&key.as_str()) {
                    value.as_object_mut().unwrap().values_mut().for_each(extend);
                } else {
                    extend(value);
                }
            }
            fields.insert("newer".to_owned(), json!({ "generation": "?" }));
        }
        Value::Array(values) => values.iter_mut().for_each(extend),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn master(refused: Option<Refusal>) -> Master {
    let alarm = refused.as_ref().map(|_| Alarm {
        name: "disk".to_owned(),
        text: "the disk is full".to_owned(),
        since: at(95),
    });
    Master {
        fleet: "bank".parse().unwrap(),
        daemon: Running {
            state: "/var/lib/clamcast/master".into(),
            quic: "[::]:7310".parse().unwrap(),
            admin: "/run/clamcast/master.sock".into(),
        },
        held: Vec::new(),
        skipped: Vec::new(),
        refused,
        alarms: alarm.into_iter().collect(),
        waits: vec![],
        age_alarm: Duration::from_secs(24 * 3600),
        certificate_ends: at(86_400 * 365),
    }
}

#[test]
fn status_before_anything_is_published() {
    let status = status(master(None), &view(json!({}), vec![]), None, at(100));
    check("status: nothing is published", status);
}

#[test]
fn status_with_alarms_and_hosts_that_lag() {
    let refused = Refusal {
        kind: RefusalKind::Held,
        reason: "daily shrank".to_owned(),
        since: at(90),
    };
    let manifest = generation_of(6);
    let held = HeldUnit {
        unit: UnitName::new("feed.ndb"),
        reason: "feed.ndb is empty".to_owned(),
        remedy: "mend it".to_owned(),
        since: at(80),
        carries: None,
    };
    let master = Master {
        held: vec![held],
        ..master(Some(refused))
    };
    let status = status(master, &held_up(), Some(&manifest), at(86_400 * 2));
    check("status: alarms", status);
}

#[test]
fn status_of_a_lost_rollout_and_loose_files() {
    let lost = view(
        json!({ "held": { "reason": "unreadable", "since": at(1) } }),
        vec![],
    );
    let status = status(master(None), &lost, Some(&manifest(6)), at(86_400 * 8));
    check("status: lost", status);
}

#[test]
fn rollout_status_of_every_kind() {
    check("rollout status: held up", rollout(&held_up()));
    check("rollout status: rolling back", rollout(&rolling_back()));
}

#[test]
fn agents_and_generations() {
    let rows = vec![host("web1", 6, "live"), newcomer("web2")];
    check("agents", rows);
    let withdrawn: Withdrawn =
        serde_json::from_value(json!([withdrawal(4, "rolled_back")])).unwrap();
    let rows = |number| generation(&generation_of(number), &held_up().rollout, &withdrawn);
    check("generations", vec![rows(4), rows(7)]);
}

#[test]
fn publications() {
    let new = Publication {
        outcome: PublicationOutcome::New,
        generation: Some((&generation_of(7)).into()),
        held: Vec::new(),
        reason: None,
        agents: None,
        failed: None,
    };
    check("publish", new.clone());
    check(
        "publish --wait",
        Publication {
            agents: Some(view(json!({}), vec![]).counts),
            failed: Some(vec!["web1".parse().unwrap()]),
            ..new.clone()
        },
    );
    check(
        "publish: refused before anything is published",
        Publication {
            outcome: PublicationOutcome::Refused,
            generation: None,
            reason: Some("no daily".to_owned()),
            ..new
        },
    );
}

#[test]
fn force_sync() {
    let agent = || "web1".parse().unwrap();
    let phase = News::Phase {
        agent: agent(),
        phase: "fetching".to_owned(),
    };
    let live = End {
        agent: agent(),
        outcome: "live".to_owned(),
        position: Some(position(7)),
        conformant: true,
        drift: host("web1", 7, "live").drift,
        error: None,
    };
    let offline = End {
        agent: agent(),
        outcome: "offline".to_owned(),
        position: None,
        conformant: false,
        drift: vec![],
        error: Some("not connected".to_owned()),
    };
    let forced = Forced {
        position: position(7),
        agents: vec![live.clone()],
    };
    check("force-sync", forced);
    check(
        "force-sync: news",
        vec![phase, News::End(live), News::End(offline)],
    );
}

#[test]
fn a_part_that_cannot_be_read_is_not_taken_for_a_missing_one() {
    let mut answers: Value = serde_json::from_str(include_str!("answers.json")).unwrap();
    let status = answers["status: alarms"].take();
    for (key, path) in [("content", ""), ("this_wave", "/rollout")] {
        let mut status = status.clone();
        let part = status.pointer_mut(path).unwrap();
        part.as_object_mut().unwrap().remove(key);
        let error = serde_json::from_value::<Status>(status).unwrap_err();
        assert!(error.to_string().contains(key), "{error}");
    }
}

#[test]
fn status_names_every_alarm_and_every_wait_with_its_start_and_bound() {
    let mut view = held_up();
    view.waiting = Some(Turn {
        position: position(8),
        since: at(60),
        until: Some(at(3610)),
    });
    view.reconnecting = Some((at(5), at(185)));
    let addresses = ["10.0.0.1:1", "10.0.0.2:1"].map(|it| it.parse().unwrap());
    let mut arrivals = crate::fleet::twins::Arrivals::default();
    arrivals.both_answer(addresses, at(70));
    let twins = arrivals.twins(at(70)).unwrap().clone();
    view.twins = vec![("web1".parse().unwrap(), twins)];
    let exceeded = Exceeded {
        since: at(80),
        until: at(86_400),
        lines: 9,
    };
    let other = OtherMaster {
        publisher: clamcast_proto::manifest::Publisher("other".to_owned()),
        position: position(9),
        manifest_sha256: CONTENT.parse().unwrap(),
    };
    view.other_masters = vec![("web3".parse().unwrap(), other, at(65))];
    view.exceeded = vec![("web2".parse().unwrap(), exceeded)];
    let mut master = master(Some(Refusal {
        kind: RefusalKind::Held,
        reason: "daily shrank".to_owned(),
        since: at(90),
    }));
    master.waits = vec![Wait {
        name: "mirror".to_owned(),
        text: "feed.ndb in the mirror keeps changing".to_owned(),
        since: at(100),
        until: Some(at(1000)),
    }];
    let now = at(86_400 + 91);
    let status = status(master, &view, Some(&generation_of(6)), now);
    let alarms: Vec<_> = status
        .alarms
        .iter()
        .map(|it| (&*it.name, it.since))
        .collect();
    assert_eq!(
        alarms,
        [
            ("disk", at(95)),
            ("signatures-old", at(86_400)),
            ("held", at(86_490)),
            ("mirror-busy", at(1000)),
            ("two-masters", at(65)),
            ("shared-name", at(70)),
            ("audit-budget", at(80)),
            ("set-aside", at(15)),
            ("withheld", at(55)),
            ("weighing", at(50)),
        ]
    );
    let waits: Vec<_> = status
        .waits
        .iter()
        .map(|it| (&*it.name, it.since, it.until))
        .collect();
    assert_eq!(
        waits,
        [
            ("rollout", at(5), Some(at(185))),
            ("rollout", at(40), None), // an operator's pause
            ("generation", at(60), Some(at(3610))),
            ("mirror", at(100), Some(at(1000))),
        ]
    );
}
