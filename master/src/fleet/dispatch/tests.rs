//! What is written, what is said, and in which order.

use super::*;
use crate::fleet::agents::tests::{fleet_of, manifest, receipt};
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
        let newcomer = Newcomer {
            name: name.parse().unwrap(),
            groups: vec![group.parse().unwrap()],
            address: SocketAddr::from(([127, 0, 0, 1], 1)),
            serial: Serial(format!("{name}-1")),
            certificate_ends: Timestamp::MAX,
            fingerprint: Digest::of(name.as_bytes()),
        };
        self.dispatcher.connected(newcomer, self.now())
    }

    fn hello(&mut self, name: &str, id: LinkId) {
        let (name, clamd) = (name.parse().unwrap(), ClamdReport::default());
        let now = self.now();
        self.dispatcher
            .hello(&name, id, clamd, Vec::new(), None, None, now);
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

    /// What is to be done, a word each.
    fn done(&mut self) -> Vec<String> {
        self.dispatcher.actions().iter().map(word).collect()
    }

    #[track_caller]
    fn check(&mut self, expected: &[&str]) {
        assert_eq!(self.done(), expected);
    }
}

fn word(action: &Action) -> String {
    let said = |(LinkId(id), word): &(LinkId, Word)| match word {
        Word::Welcome => format!("{id}: welcome"),
        Word::Offer {
            manifest, manner, ..
        } => {
            let how = if manner.rehash { "forced" } else { "offered" };
            format!("{id}: {how} {}", manifest.generation)
        }
        Word::Fresh(manifest) => format!("{id}: {} is current", manifest.generation),
        Word::Acknowledge(seq) => format!("{id}: acknowledged {seq}"),
    };
    match action {
        Action::Tell(id, word) => said(&(*id, word.clone())),
        Action::Write(entry) => {
            let event = entry.draft.as_ref().map(|draft| draft.event.clone());
            let parts = [
                event,
                entry.keep.as_ref().map(|it| format!("keep {}", it.name)),
                entry.forget.as_ref().map(|name| format!("forget {name}")),
                entry.rollout.as_ref().map(|_| "state".to_owned()),
                entry.then.as_ref().map(said),
            ];
            let parts: Vec<_> = parts.into_iter().flatten().collect();
            format!("write {}", parts.join(", "))
        }
        Action::Close(LinkId(id), closing) => format!("{id}: {closing:?}"),
        Action::Reject(rejected) => format!("reject {}", rejected.position.generation),
        Action::Publish => "publish".to_owned(),
        Action::RollBack(owed) => format!("roll back to {}", owed.to.position.generation),
        Action::Accepted(_) => "accepted".to_owned(),
        Action::Ahead(_) => "ahead".to_owned(),
        Action::Checkpoint => "checkpoint".to_owned(),
    }
}

#[test]
fn what_the_disk_does_not_know_is_behind_what_is_written_of_it() {
    let mut desk = Desk::new(&["group:canary"]);
    desk.greeted("web1", "canary");
    desk.check(&["write enrolled", "1: welcome", "write keep web1"]);
    desk.publish(7);
    desk.check(&[
        "write rollout",
        "write state",
        "write wave",
        "write state",
        "write offer, keep web1, 1: offered 7",
    ]);
}

#[test]
fn a_receipt_is_acknowledged_behind_its_line_in_the_log_also_when_it_comes_again() {
    let mut desk = Desk::new(&["100%"]);
    let id = desk.greeted("web1", "canary");
    desk.publish(7);
    desk.done();
    desk.receipt(id, 7, 1, Outcome::Live);
    desk.check(&["accepted", "write receipt, keep web1, 1: acknowledged 1"]);
    desk.receipt(id, 7, 1, Outcome::Live);
    desk.check(&["write 1: acknowledged 1"]);
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
        "write receipt, keep web1, 1: acknowledged 2",
        "write halt",
        "reject 8",
        "write state",
        "checkpoint",
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
        desk.dispatcher.tick();
        let now = desk.now();
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
    desk.check(&["write offer, keep web1, 1: forced 7"]);
    desk.greeted("web1", "canary");
    let done = desk.done();
    assert_eq!(done[0], "1: Replaced");
    assert!(
        done.contains(&"write offer, keep web1, 2: forced 7".to_owned()),
        "{done:?}"
    );
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
    let (clamd, has) = (ClamdReport::default(), Some(seven.envelope()));
    desk.done();
    desk.dispatcher
        .hello(&name, id, clamd, Vec::new(), has, Some(Outcome::Live), now);
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
    assert!(
        done.contains(&"write offer, keep web1, 1: offered 8".to_owned()),
        "{done:?}"
    );
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
    desk.dispatcher
        .declined(&name, id, old, "too late".to_owned());
    desk.check(&[]);
    let new = desk.dispatcher.fleet().offer(&name).unwrap();
    desk.dispatcher
        .declined(&name, id, new, "no room".to_owned());
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
