//! Connections that were not let in: each is logged, and the audit log is not flooded.

use std::net::SocketAddr;
use std::sync::Mutex;

use clamcast_daemon::audit::Draft;
use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use crate::recorder::{Job, Recorder};

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
        let admitted = self
            .window
            .lock()
            .expect("nothing panics with it")
            .admit(Timestamp::now());
        let Some(unwritten) = admitted else { return };
        tracing::warn!(%address, reason, "connection rejected");
        let draft = Draft {
            event: "rejected".to_owned(),
            actor: "master".to_owned(),
            subject: address.ip().to_string(),
            position: None,
            outcome: None,
            detail: json!({ "reason": reason, "not_logged_before": unwritten }),
        };
        self.recorder
            .write(Job {
                draft: Some(draft),
                ..Job::default()
            })
            .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
