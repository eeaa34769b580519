//! Connections that were not let in, and commands of users who may not give any: each is logged, and
//! the audit log is not flooded.

use std::net::SocketAddr;
use std::sync::Mutex;

use clamcast_proto::AuditEvent;
use clamcast_proto::audit::{Draft, Operator};
use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use crate::record::entry::Entry;
use crate::record::recorder::Recorder;

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
    /// Whether the one at `now` is written, and how many were not since the last that was. None is
    /// while the recorder has no room.
    fn admit(&mut self, now: Timestamp, has_room: bool) -> Option<u64> {
        if now.duration_since(self.start) >= WINDOW || now < self.start {
            self.start = now;
            self.written = 0;
        }
        if self.written == PER_WINDOW || !has_room {
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
    pub fn note(&self, address: SocketAddr, reason: &str) {
        let Some(unwritten) = self.admit() else {
            return;
        };
        tracing::warn!(%address, reason, "connection rejected");
        let draft = Draft {
            detail: json!({ "reason": reason, "not_logged_before": unwritten }),
            ..Draft::new(AuditEvent::Rejected, "master", address.ip())
        };
        self.recorder.write(Entry::line(draft));
    }

    /// A user who reached the admin socket gave a command that only operators may give.
    pub fn denied(&self, user: &Operator, command: &str) {
        let Some(unwritten) = self.admit() else {
            return;
        };
        tracing::warn!(%user, login_uid = user.login_uid, command, "command denied");
        let draft = denial(user, command, unwritten);
        self.recorder.write(Entry::line(draft));
    }

    fn admit(&self) -> Option<u64> {
        let has_room = self.recorder.has_room();
        let mut window = self.window.lock().expect("nothing panics with it");
        window.admit(Timestamp::now(), has_room)
    }
}

fn denial(user: &Operator, command: &str, unwritten: u64) -> Draft {
    Draft {
        detail: json!({ "login_uid": user.login_uid, "not_logged_before": unwritten }),
        ..Draft::new(AuditEvent::Denied, user, command)
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
        };
        let draft = denial(&user, "force-sync", 3);
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
        let written = (0..1000)
            .filter(|_| window.admit(at(5), true).is_some())
            .count();
        assert_eq!(written, 10);
        assert_eq!(window.admit(at(65), true), Some(990));
        assert_eq!(window.admit(at(66), false), None);
        assert_eq!(window.admit(at(67), true), Some(1));
    }
}
