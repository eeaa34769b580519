//! What is written, what is said, and in which order.

use super::*;
use crate::fleet::agents::tests::{fleet_of, manifest, receipt};
use clamcast_proto::receipt::ClamdReport;
use clamcast_proto::revocation::Revoked;

/// A master whose waves are these, with nobody connected.
struct Desk {
    dispatcher: Dispatcher,
    start: Instant,
    seconds: u64,
}

impl Desk {
    fn new(waves: &[&str]) -> Self {
        let bounds = Bounds {
            agents: 2,
            looks_apart: Duration::ZERO,
            backlog: 64,
        };
        let start = Instant::now();
        let now = Now {
            clock: Timestamp::UNIX_EPOCH,
            at: start,
        };
        Self {
            dispatcher: Dispatcher::new(fleet_of(waves), bounds, now),
            start,
            seconds: 0,
        }
    }

    fn now(&self) -> Now {
        let seconds = i64::try_from(self.seconds).unwrap();
        Now {
            clock: Timestamp::from_second(seconds).unwrap(),
            at: self.start + Duration::from_secs(self.seconds),
        }
    }

    fn connect(&mut self, name: &str, group: &str) -> Result<LinkId, Unwanted> {
        let now = self.now();
        self.dispatcher.connected(newcomer(name, group), now)
    }

    fn hello(&mut self, name: &str, id: LinkId) {
        let (name, now) = (name.parse().unwrap(), self.now());
        self.dispatcher.hello(&name, id, hello(None), now);
    }

    fn greeted(&mut self, name: &str, group: &str) -> LinkId {
        let id = self.connect(name, group).unwrap();
        self.hello(name, id);
        id
    }

    fn publish(&mut self, generation: u64) {
        let now = self.now();
        self.dispatcher.published(&manifest(generation), false, now);
        self.dispatcher.look(now);
    }

    fn receipt(&mut self, id: LinkId, generation: u64, seq: u64, outcome: Outcome) {
        let now = self.now();
        let receipt = receipt(generation, seq, outcome);
        self.dispatcher.receipt(id, &receipt, now);
    }

    /// The agent begins with the offer that it was made last.
    fn begins(&mut self, name: &str, id: LinkId) {
        let (name, now) = (name.parse().unwrap(), self.now());
        let offer = self.dispatcher.fleet().offer(&name).unwrap();
        let progress = Progress {
            offer,
            phase: Phase::Fetching,
            until: None,
            sent: 0,
        };
        self.dispatcher.progress(&name, id, progress, now);
    }

    /// What is to be done, a word each. The disk takes everything as soon as that was decided.
    fn done(&mut self) -> Vec<String> {
        let mut done = self.refused();
        loop {
            self.dispatcher.durable(0, &"head".into());
            let more = self.refused();
            if more.is_empty() {
                return done;
            }
            done.extend(more);
        }
    }

    /// What is to be done while the disk takes nothing.
    fn refused(&mut self) -> Vec<String> {
        self.dispatcher.actions().iter().map(word).collect()
    }

    #[track_caller]
    fn check(&mut self, expected: &[&str]) {
        assert_eq!(self.done(), expected);
    }
}

fn newcomer(name: &str, group: &str) -> Newcomer {
    Newcomer {
        name: name.parse().unwrap(),
        groups: vec![group.parse().unwrap()],
        address: SocketAddr::from(([127, 0, 0, 1], 1)),
        serial: Serial(format!("{name}-1")),
        certificate_ends: Timestamp::MAX,
        fingerprint: Digest::of(name.as_bytes()),
    }
}

fn decline(offer: OfferId, message: &str) -> Decline {
    Decline {
        offer,
        message: message.to_owned(),
        other_master: None,
    }
}

fn hello(installed: Option<&Envelope>) -> Hello {
    Hello {
        installed: installed.cloned(),
        outcome: installed.map(|_| Outcome::Live),
        ..Hello::new("", ClamdReport::default())
    }
}

fn word(action: &Action) -> String {
    let said = |LinkId(id): &LinkId, message: &Message| match message {
        Message::Welcome => format!("{id}: welcome"),
        Message::Offer {
            manifest, manner, ..
        } => {
            let how = if manner.rehash { "forced" } else { "offered" };
            format!("{id}: {how} {}", manifest.generation)
        }
        Message::Fresh(manifest) => format!("{id}: {} is current", manifest.generation),
        Message::Acknowledge(seq) => format!("{id}: acknowledged {seq}"),
        Message::Checkpoint(head) => format!("{id}: {head}"),
    };
    match action {
        Action::Tell(id, message) => said(id, message),
        Action::Write(entry) => {
            let event = entry.draft.as_ref().map(|draft| draft.event.to_string());
            let files = entry
                .files
                .iter()
                .map(|(name, content)| match (name, content.is_some()) {
                    (FileName::Agent(name), true) => format!("keep {name}"),
                    (FileName::Agent(name), false) => format!("forget {name}"),
                    (FileName::Rollout, _) => "state".to_owned(),
                    (name @ (FileName::Withdrawn | FileName::Certificate(_)), _) => {
                        name.to_string()
                    }
                });
            let parts: Vec<_> = event.into_iter().chain(files).collect();
            format!("write {}", parts.join(", "))
        }
        Action::Close(LinkId(id), closing) => format!("{id}: {closing:?}"),
        Action::Publish => "publish".to_owned(),
        Action::RollBack(owed) => format!("roll back to {}", owed.to.position.generation),
        Action::Accepted(_) => "accepted".to_owned(),
        Action::Ahead(_) => "ahead".to_owned(),
    }
}

#[test]
fn what_the_disk_does_not_know_is_behind_what_is_written_of_it() {
    let mut desk = Desk::new(&["group:canary"]);
    desk.greeted("web1", "canary");
    // Its record is kept as it connects, and with what its Hello says that it accepts.
    desk.check(&[
        "write enrolled",
        "1: welcome",
        "write keep web1",
        "write keep web1",
    ]);
    desk.publish(7);
    desk.check(&[
        "write rollout",
        "write state",
        "write wave",
        "write state",
        "write offer, keep web1",
        "1: offered 7",
    ]);
}

#[test]
fn a_receipt_is_acknowledged_behind_its_line_in_the_log_also_when_it_comes_again() {
    let mut desk = Desk::new(&["100%"]);
    let id = desk.greeted("web1", "canary");
    desk.publish(7);
    desk.done();
    desk.receipt(id, 7, 1, Outcome::Live);
    assert_eq!(desk.refused(), ["accepted", "write receipt, keep web1"]);
    desk.receipt(id, 7, 1, Outcome::Live);
    assert_eq!(desk.refused(), [""; 0]);
    desk.check(&["1: acknowledged 1", "1: acknowledged 1"]);
    desk.receipt(id, 7, 1, Outcome::Live);
    desk.check(&["1: acknowledged 1"]);
}

#[test]
fn a_refusal_ends_it_before_anybody_else_hears_of_it() {
    let mut desk = Desk::new(&["group:canary"]);
    let canary = desk.greeted("web1", "canary");
    desk.publish(7);
    desk.receipt(canary, 7, 1, Outcome::Live);
    let now = desk.now();
    desk.dispatcher.look(now);
    desk.publish(8);
    desk.done();
    desk.receipt(canary, 8, 2, Outcome::Refused);
    desk.check(&[
        "write receipt, keep web1",
        "write halt",
        "write rejected.json, state",
        "1: acknowledged 2",
        "roll back to 7",
    ]);
    desk.greeted("web2", "canary");
    assert!(!desk.done().iter().any(|it| it.contains("offered 8")));
}

#[test]
fn a_rollback_that_is_owed_is_asked_for_again_after_a_while() {
    let mut desk = Desk::new(&["group:canary"]);
    let canary = desk.greeted("web1", "canary");
    for (generation, outcome) in [(7, Outcome::Live), (8, Outcome::Refused)] {
        desk.publish(generation);
        desk.receipt(canary, generation, generation, outcome);
    }
    desk.done();
    let mut asked = Vec::new();
    for second in 1..=20 {
        desk.seconds = second;
        let now = desk.now();
        desk.dispatcher.tick(now);
        desk.dispatcher.look(now);
        if desk.done().contains(&"roll back to 7".to_owned()) {
            asked.push(second);
        }
    }
    assert_eq!(asked, [10, 20]);
}

#[test]
fn who_is_forced_and_comes_again_is_still_to_look_at_its_disk() {
    let mut desk = Desk::new(&["100%"]);
    let id = desk.greeted("web1", "canary");
    desk.publish(7);
    desk.receipt(id, 7, 1, Outcome::Live);
    desk.done();
    let (what, name) = (
        Forcing::Current(manifest(7).position()),
        "web1".parse().unwrap(),
    );
    let now = desk.now();
    let forced = desk
        .dispatcher
        .force(&what, vec![name], false, now)
        .unwrap();
    assert_eq!(forced.offers.len(), 1);
    desk.check(&["write offer, keep web1", "1: forced 7"]);
    desk.greeted("web1", "canary");
    let done = desk.done();
    assert_eq!(done[0], "1: Replaced");
    assert!(done.contains(&"2: forced 7".to_owned()), "{done:?}");
    desk.receipt(LinkId(1), 7, 2, Outcome::Live); // of the connection that was replaced
    desk.check(&[]);
    desk.begins("web1", LinkId(2));
    desk.receipt(LinkId(2), 7, 2, Outcome::Live);
    desk.done();
    desk.greeted("web1", "canary");
    let done = desk.done();
    assert!(!done.iter().any(|it| it.contains("forced")), "{done:?}");
}

#[test]
fn an_agent_whose_last_receipt_a_crash_took_is_offered_again_what_it_has() {
    let mut desk = Desk::new(&["100%"]);
    let id = desk.greeted("web1", "canary");
    desk.publish(7);
    desk.receipt(id, 7, 1, Outcome::Live);
    desk.dispatcher
        .disconnected(&"web1".parse().unwrap(), id, desk.now());
    // It was `installed` meanwhile and is live again; only the former receipt is still there.
    let id = desk.connect("web1", "canary").unwrap();
    let (name, now) = ("web1".parse().unwrap(), desk.now());
    let seven = manifest(7);
    desk.done();
    let hello = hello(Some(seven.envelope()));
    desk.dispatcher.hello(&name, id, hello, now);
    assert!(!desk.done().iter().any(|it| it.contains("offered")));
    desk.receipt(id, 7, 2, Outcome::Installed);
    assert!(desk.done().iter().any(|it| it.contains("offered 7")));
    desk.receipt(id, 7, 3, Outcome::Installed);
    assert!(!desk.done().iter().any(|it| it.contains("offered")));
}

#[test]
fn who_does_not_answer_an_order_is_offered_what_is_newer() {
    let mut desk = Desk::new(&["100%"]);
    let id = desk.greeted("web1", "canary");
    desk.publish(7);
    desk.receipt(id, 7, 1, Outcome::Live);
    let (what, name) = (
        Forcing::Current(manifest(7).position()),
        "web1".parse().unwrap(),
    );
    let now = desk.now();
    desk.dispatcher
        .force(&what, vec![name], false, now)
        .unwrap();
    desk.dispatcher.look(now);
    desk.done();
    desk.publish(8);
    let done = desk.done();
    assert!(done.contains(&"1: offered 8".to_owned()), "{done:?}");
}

#[test]
fn a_word_about_an_offer_that_another_took_the_place_of_is_none() {
    let mut desk = Desk::new(&["100%"]);
    let id = desk.greeted("web1", "canary");
    desk.publish(7);
    let name = "web1".parse().unwrap();
    let old = desk.dispatcher.fleet().offer(&name).unwrap();
    desk.receipt(id, 7, 1, Outcome::Live);
    desk.publish(8);
    desk.done();
    let now = desk.now();
    desk.dispatcher
        .declined(&name, id, decline(old, "too late"), now);
    desk.check(&[]);
    let new = desk.dispatcher.fleet().offer(&name).unwrap();
    desk.dispatcher
        .declined(&name, id, decline(new, "no room"), now);
    desk.check(&["write declined"]);
}

#[test]
fn what_is_not_current_any_more_is_not_forced() {
    let mut desk = Desk::new(&["100%"]);
    desk.publish(7);
    let what = Forcing::Current(manifest(6).position());
    let now = desk.now();
    assert!(
        desk.dispatcher
            .force(&what, Vec::new(), false, now)
            .is_none()
    );
}

#[test]
fn a_full_fleet_lets_in_whom_it_knows() {
    let mut desk = Desk::new(&["100%"]);
    for name in ["web1", "web2", "web1"] {
        desk.connect(name, "canary").unwrap();
    }
    let full = desk.connect("web3", "canary").unwrap_err().to_string();
    assert_eq!(full, "the fleet is full: 2 agents");
}

#[test]
fn whoever_is_revoked_is_sent_away_forgotten_and_stays_out() {
    let mut desk = Desk::new(&["100%"]);
    desk.greeted("web1", "canary");
    desk.done();
    let name = "web1".parse().unwrap();
    let revoked = Revoked {
        name,
        serial: Serial("web1-1".to_owned()),
        time: Timestamp::UNIX_EPOCH,
        reason: None,
    };
    desk.dispatcher.revoked(RevocationList {
        fleet: "bank".parse().unwrap(),
        version: 1,
        issued: Timestamp::UNIX_EPOCH,
        revoked: vec![revoked],
    });
    desk.check(&["1: Revoked", "write revoked, forget web1"]);
    assert!(desk.connect("web1", "canary").is_err());
}

#[test]
fn an_offer_that_waits_for_the_disk_is_dropped_when_its_generation_is_withdrawn() {
    let mut desk = Desk::new(&["group:canary", "100%"]);
    let canary = desk.greeted("web1", "canary");
    desk.publish(7);
    desk.receipt(canary, 7, 1, Outcome::Live);
    desk.publish(8);
    desk.done();
    desk.greeted("web2", "canary");
    let waits = desk.refused();
    assert!(
        waits.iter().any(|it| it.starts_with("write offer")),
        "{waits:?}"
    );
    desk.receipt(canary, 8, 2, Outcome::Refused);
    let done = desk.done();
    assert!(done.contains(&"write halt".to_owned()), "{done:?}");
    assert!(!done.iter().any(|it| it.contains("offered 8")), "{done:?}");
}

#[test]
fn an_order_that_waits_for_the_disk_is_dropped_when_its_generation_is_withdrawn() {
    let mut desk = Desk::new(&["group:canary", "100%"]);
    let canary = desk.greeted("web1", "canary");
    desk.publish(7);
    desk.receipt(canary, 7, 1, Outcome::Live);
    desk.publish(8);
    let other = desk.greeted("web2", "others");
    desk.done();
    let (what, name, now) = (
        Forcing::Current(manifest(8).position()),
        "web2".parse().unwrap(),
        desk.now(),
    );
    let forced = desk.dispatcher.force(&what, vec![name], true, now);
    assert_eq!(forced.unwrap().offers.len(), 1);
    desk.receipt(canary, 8, 2, Outcome::Refused);
    let done = desk.done();
    assert!(!done.iter().any(|it| it.contains("forced 8")), "{done:?}");
    // As if it had never been made.
    let fleet = desk.dispatcher.fleet();
    assert_eq!(fleet.offer(&"web2".parse().unwrap()), None);
    desk.receipt(other, 8, 1, Outcome::HostFault);
}

#[test]
fn a_disk_that_takes_nothing_stops_offers_and_keeps_each_record_once() {
    let mut desk = Desk::new(&["100%"]);
    let now = desk.now();
    let names = ["web1", "web2"];
    let mut written = 0;
    for _ in 0..100 {
        for name in names {
            let id = desk.greeted(name, "canary");
            desk.dispatcher
                .disconnected(&name.parse().unwrap(), id, now);
        }
        let writes = |it: &String| it.starts_with("write");
        written += desk.refused().into_iter().filter(writes).count();
    }
    assert_eq!(written, 64);
    for name in names {
        desk.greeted(name, "canary");
    }
    desk.publish(7);
    let refused = desk.refused();
    assert!(
        !refused.iter().any(|it| it.starts_with("write offer")),
        "{refused:?}"
    );
    // The rollout is looked at again when the disk takes what waits.
    desk.done();
    desk.dispatcher.look(now);
    let done = desk.done();
    assert!(done.iter().any(|it| it.contains("offered 7")), "{done:?}");
}

#[test]
fn agents_are_told_the_head_of_the_log_that_has_the_end_of_a_rollout() {
    let mut desk = Desk::new(&["100%"]);
    let id = desk.greeted("web1", "canary");
    desk.publish(7);
    desk.done();
    desk.receipt(id, 7, 1, Outcome::Live);
    let now = desk.now();
    desk.dispatcher.look(now);
    let done = desk.refused();
    assert!(
        done.contains(&"write rollout-complete".to_owned()),
        "{done:?}"
    );
    desk.dispatcher.tick(now);
    assert!(!desk.refused().contains(&"1: head".to_owned()));
    assert!(desk.done().contains(&"1: head".to_owned()));
}

#[test]
fn an_agent_past_its_audit_budget_is_neither_acknowledged_nor_offered_until_the_next_day() {
    let mut desk = Desk::new(&["100%"]);
    desk.publish(7);
    let id = desk.greeted("web1", "canary");
    desk.done();
    let mut lines = 0;
    let seq = (1..).find(|seq| {
        desk.receipt(id, 7, *seq, Outcome::Live);
        let done = desk.done();
        lines += done
            .iter()
            .filter(|it| it.starts_with("write receipt"))
            .count();
        !done.contains(&format!("{id}: acknowledged {seq}", id = id.0))
    });
    let seq = seq.unwrap();
    assert!(
        lines > 100,
        "{lines} receipts are more than an honest agent sends"
    );
    desk.receipt(id, 7, seq + 1, Outcome::Live);
    desk.check(&[]);
    desk.publish(8);
    let done = desk.done();
    assert!(
        !done.iter().any(|it| it.starts_with("write offer")),
        "{done:?}"
    );
    let other = desk.greeted("web2", "canary");
    let done = desk.done();
    assert!(
        done.contains(&format!("{}: offered 8", other.0)),
        "{done:?}"
    );

    desk.seconds = 86_400;
    let now = desk.now();
    desk.dispatcher.tick(now);
    let done = desk.done();
    assert!(
        done.contains(&"write budget-exceeded".to_owned()),
        "{done:?}"
    );
    assert!(done.contains(&format!("{}: NewDay", id.0)), "{done:?}");
    let name = "web1".parse().unwrap();
    desk.dispatcher.disconnected(&name, id, now);
    let id = desk.greeted("web1", "canary");
    desk.receipt(id, 7, seq, Outcome::Live);
    let done = desk.done();
    assert!(
        done.contains(&format!("{}: acknowledged {seq}", id.0)),
        "{done:?}"
    );
}

#[test]
fn lines_that_are_left_out_are_counted_at_a_stop() {
    let mut desk = Desk::new(&["100%"]);
    desk.publish(7);
    let id = desk.greeted("web1", "canary");
    let name: AgentName = "web1".parse().unwrap();
    while !desk.dispatcher.budgets().is_exceeded(&name) {
        desk.begins("web1", id);
        let now = desk.now();
        desk.dispatcher.reoffer(&name, id, |_| None, now);
    }
    desk.done();
    desk.dispatcher.stop();
    desk.check(&["write budget-exceeded"]);
}

#[test]
fn a_connection_whose_certificate_has_expired_is_closed() {
    let mut desk = Desk::new(&["100%"]);
    let newcomer = Newcomer {
        certificate_ends: Timestamp::from_second(60).unwrap(),
        ..newcomer("web1", "canary")
    };
    let now = desk.now();
    let id = desk.dispatcher.connected(newcomer, now).unwrap();
    desk.done();
    desk.seconds = 59;
    let now = desk.now();
    desk.dispatcher.tick(now);
    desk.check(&[]);
    desk.seconds = 60;
    let now = desk.now();
    desk.dispatcher.tick(now);
    let done = desk.done();
    assert_eq!(
        done[..2],
        [format!("{}: Expired", id.0), "write expired".to_owned()]
    );
    desk.dispatcher.tick(now);
    desk.check(&[]);
}

#[test]
fn a_new_certificate_of_a_known_name_is_recorded() {
    let mut desk = Desk::new(&["100%"]);
    for (certificate, expected) in [
        ("first", &["write enrolled"][..]),
        ("first", &[]),
        ("second", &["write certificate, keep web1"]),
        ("first", &[]),
    ] {
        let newcomer = Newcomer {
            fingerprint: Digest::of(certificate.as_bytes()),
            ..newcomer("web1", "canary")
        };
        let now = desk.now();
        let id = desk.dispatcher.connected(newcomer, now).unwrap();
        let done = desk.done();
        let noted: Vec<_> = done
            .iter()
            .filter(|it| it.starts_with("write ") && !it.starts_with("write keep"))
            .collect();
        assert_eq!(noted, expected.iter().collect::<Vec<_>>(), "{done:?}");
        desk.dispatcher
            .disconnected(&"web1".parse().unwrap(), id, now);
        desk.done();
    }
}

#[test]
fn a_name_that_two_hosts_use_is_reported_and_not_conformant() {
    let mut desk = Desk::new(&["100%"]);
    desk.publish(7);
    let id = desk.greeted("web1", "canary");
    desk.receipt(id, 7, 1, Outcome::Live);
    desk.done();
    let conformant = |desk: &Desk| {
        let rows = desk
            .dispatcher
            .fleet()
            .rows(desk.now().clock, Duration::from_secs(60));
        let counts = desk
            .dispatcher
            .fleet()
            .counts(desk.now().clock, Duration::from_secs(60));
        assert_eq!(counts.conformant, usize::from(rows[0].conformant));
        (rows[0].conformant, rows[0].error.clone())
    };
    assert_eq!(conformant(&desk), (true, None));
    let (old, now) = (SocketAddr::from(([10, 0, 0, 9], 1)), desk.now());
    let name = "web1".parse().unwrap();
    desk.dispatcher.both_answer(&name, old, now);
    desk.dispatcher.both_answer(&name, old, now);
    desk.check(&["write alarm"]);
    let (is_conformant, error) = conformant(&desk);
    let error = error.unwrap();
    assert!(
        !is_conformant && error.contains("10.0.0.9:1 and 127.0.0.1:1"),
        "{error}"
    );
}

#[test]
fn a_master_restored_from_a_copy_made_during_a_rollout_goes_on_with_what_the_fleet_has() {
    let mut desk = Desk::new(&["group:canary", "100%"]);
    desk.publish(6);
    let id = desk.greeted("web1", "canary");
    desk.receipt(id, 6, 1, Outcome::Live);
    desk.publish(7);
    desk.publish(8); // waits
    desk.done();
    assert_eq!(
        desk.dispatcher.fleet().turn().unwrap().position,
        manifest(8).position()
    );

    // An agent that this master never offered what waits has it.
    let other = desk.connect("web2", "db").unwrap();
    let now = desk.now();
    let installed = manifest(8);
    let said = hello(Some(installed.envelope()));
    desk.dispatcher
        .hello(&"web2".parse().unwrap(), other, said, now);
    let done = desk.done();
    assert!(done.contains(&"write restored".to_owned()), "{done:?}");
    assert!(done.contains(&format!("{}: offered 8", id.0)), "{done:?}");
    // Outside the first wave the other one keeps what it has.
    assert!(
        !done
            .iter()
            .any(|it| it.starts_with(&format!("{}: offered", other.0))),
        "{done:?}"
    );
    let running = desk.dispatcher.fleet().rollout().running().unwrap();
    assert_eq!(running.target.position, manifest(8).position());
}
