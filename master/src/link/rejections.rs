//! Connections that were not let in, and commands of users who may not give any: each is logged, and
//! the audit log is not flooded.

use std::net::SocketAddr;
use std::sync::Mutex;

use clamcast_daemon::admin::Operator;
use clamcast_daemon::audit::Draft;
use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use crate::record::recorder::{Job, Recorder};

/// Rejections written into the audit log in one [`WINDOW`]; the rest are counted in the next one.
const PER_WINDOW: u64 = 10;

/// A minute.
const WINDOW: SignedDuration = SignedDuration::from_secs(60);

/// Decides which rejections are written. Pure.
#[derive(Debug)]
struct Window {
    start: Timestamp,
    written: u64,
    unwritten: u64,
}

impl Window {
    /// Whether the one at `now` is written, and how many were not since the last that was.
    fn admit(&mut self, now: Timestamp) -> Option<u64> {
        if now.duration_since(self.start) >= WINDOW || now < self.start {
            self.start = now;
            self.written = 0;
        }
        if self.written == PER_WINDOW {
            self.unwritten += 1;
            return None;
        }
        self.written += 1;
        Some(std::mem::take(&mut self.unwritten))
    }
}

/// Notes rejected connections.
#[derive(Debug)]
pub struct Rejections {
    window: Mutex<Window>,
    recorder: Recorder,
}

impl Rejections {
    /// Notes them through `recorder`.
    pub fn new(recorder: Recorder) -> Self {
        let window = Window {
            start: Timestamp::UNIX_EPOCH,
            written: 0,
            unwritten: 0,
        };
        Self {
            window: Mutex::new(window),
            recorder,
        }
    }

    /// Somebody was not let in.
    pub async fn note(&self, address: SocketAddr, reason: &str) {
        let Some(unwritten) = self.admit() else {
            return;
        };
        tracing::warn!(%address, reason, "connection rejected");
        let draft = Draft {
            event: "rejected".to_owned(),
            actor: "master".to_owned(),
            subject: address.ip().to_string(),
            position: None,
            outcome: None,
            detail: json!({ "reason": reason, "not_logged_before": unwritten }),
        };
        self.write(draft).await;
    }

    /// A user who reached the admin socket gave a command that only operators may give.
    pub async fn denied(&self, user: &Operator, command: &str) {
        let Some(unwritten) = self.admit() else {
            return;
        };
        tracing::warn!(%user, login_uid = user.login_uid, command, "command denied");
        self.write(denial(user, command, unwritten)).await;
    }

    fn admit(&self) -> Option<u64> {
        let mut window = self.window.lock().expect("nothing panics with it");
        window.admit(Timestamp::now())
    }

    async fn write(&self, draft: Draft) {
        let draft = Some(draft);
        let job = Job {
            draft,
            ..Job::default()
        };
        self.recorder.write(job).await;
    }
}

fn denial(user: &Operator, command: &str, unwritten: u64) -> Draft {
    Draft {
        event: "denied".to_owned(),
        actor: user.to_string(),
        subject: command.to_owned(),
        position: None,
        outcome: None,
        detail: json!({ "login_uid": user.login_uid, "not_logged_before": unwritten }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denied_command_is_recorded_with_who_gave_it() {
        let user = Operator {
            uid: 1000,
            name: "mallory".to_owned(),
            login_uid: Some(7),
            may_act: false,
        };
        let draft = denial(&user, "force-sync", 3);
        assert!(crate::record::events::EVENTS.contains(&draft.event.as_str()));
        assert_eq!(draft.actor, "operator:1000/mallory");
        assert_eq!(draft.subject, "force-sync");
        assert_eq!(
            draft.detail,
            json!({ "login_uid": 7, "not_logged_before": 3 })
        );
    }

    #[test]
    fn a_flood_is_counted_and_not_written() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let mut window = Window {
            start: at(0),
            written: 0,
            unwritten: 0,
        };
        let written = (0..1000).filter(|_| window.admit(at(5)).is_some()).count();
        assert_eq!(written, 10);
        assert_eq!(window.admit(at(65)), Some(990));
        assert_eq!(window.admit(at(66)), Some(0));
    }
}
