//! What one agent may cost the others.
//!
//! Pure: the clock is an argument.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use clamcast_proto::{AgentName, wire};

use crate::fleet::hub::AGENTS_MAX;

/// What an agent makes the master write down or work out, over all its connections.
///
/// At once it may send all receipts that it may hold, and do as much again: connect, ask for files,
/// complain. An honest one needs a few dozen a day, most of them where its path is bad.
const LASTING: Rate = Rate {
    at_once: 2 * wire::RECEIPTS_PENDING_MAX as u32,
    each: Duration::from_secs(10),
};

/// What an agent says on one connection, whatever it is. An honest one says a word every few
/// seconds, after its receipts.
const TALK: Rate = Rate {
    at_once: 4 * wire::RECEIPTS_PENDING_MAX as u32,
    each: Duration::from_millis(10),
};

/// Of a longer message every so many bytes count as one more: a receipt for a set of a hundred
/// databases has fewer.
const BYTES: usize = 16 << 10;

/// So many at once, and then one in each of these times.
#[derive(Debug)]
struct Rate {
    at_once: u32,
    each: Duration,
}

/// When everything would be earned back. What is used up is what that is ahead of the clock.
#[derive(Clone, Copy, Debug)]
struct Meter(Instant);

impl Meter {
    /// Uses up what a message of so many bytes counts.
    fn charge(&mut self, rate: &Rate, bytes: usize, now: Instant) {
        let count = u32::try_from(bytes / BYTES).map_or(u32::MAX, |more| more.saturating_add(1));
        self.0 = self.0.max(now) + rate.each.saturating_mul(count.min(2 * rate.at_once));
    }

    /// How long it takes until there is something left to use.
    fn wait(&self, rate: &Rate, now: Instant) -> Duration {
        let ahead = self.0.saturating_duration_since(now);
        ahead.saturating_sub(rate.each * (rate.at_once - 1))
    }
}

/// Slows one connection down.
#[derive(Debug)]
pub struct Talk(Meter);

impl Talk {
    /// Of a connection that begins now.
    pub fn new(now: Instant) -> Self {
        Self(Meter(now))
    }

    /// The agent has said so many bytes.
    pub fn heard(&mut self, bytes: usize, now: Instant) {
        self.0.charge(&TALK, bytes, now);
    }

    /// How long it is not listened to.
    pub fn pause(&self, now: Instant) -> Duration {
        self.0.wait(&TALK, now)
    }
}

/// Knows what every agent has used up lately.
#[derive(Debug, Default)]
pub struct Meters(Mutex<HashMap<AgentName, Meter>>);

impl Meters {
    /// Takes note that an agent makes work of so many bytes. `false`: it has made too much.
    pub fn spend(&self, name: &AgentName, bytes: usize, now: Instant) -> bool {
        let mut meters = self.0.lock().expect("nothing panics with it");
        if meters.len() >= 2 * AGENTS_MAX {
            meters.retain(|_, meter| meter.0 > now); // the others are as good as new
        }
        let meter = meters.entry(name.clone()).or_insert(Meter(now));
        let is_left = meter.wait(&LASTING, now).is_zero();
        if is_left {
            meter.charge(&LASTING, bytes, now);
        }
        is_left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spent(meters: &Meters, name: &str, bytes: usize, now: Instant) -> usize {
        let name = name.parse().unwrap();
        (0..10_000)
            .filter(|_| meters.spend(&name, bytes, now))
            .count()
    }

    #[test]
    fn an_agent_that_makes_work_without_end_runs_out_of_it_and_no_other_does() {
        let (start, meters) = (Instant::now(), Meters::default());
        let all = LASTING.at_once as usize;
        assert_eq!(spent(&meters, "web1", 700, start), all);
        assert_eq!(spent(&meters, "web2", 700, start), all);
        assert_eq!(spent(&meters, "web1", 700, start + LASTING.each / 2), 0);
        assert_eq!(spent(&meters, "web1", 700, start + LASTING.each), 1);
        let day = start + Duration::from_secs(86_400);
        assert_eq!(spent(&meters, "web1", 700, day), all);
    }

    #[test]
    fn what_is_long_counts_more() {
        let (start, meters) = (Instant::now(), Meters::default());
        let most = wire::FRAME_BYTES_MAX;
        let spent = spent(&meters, "web1", most, start);
        assert_eq!(spent, (LASTING.at_once as usize).div_ceil(most / BYTES + 1));
    }

    #[test]
    fn an_honest_agent_is_listened_to_at_once_and_a_flood_at_its_rate() {
        let start = Instant::now();
        let mut talk = Talk::new(start);
        for _ in 0..2 * wire::RECEIPTS_PENDING_MAX {
            talk.heard(1000, start);
        }
        assert_eq!(talk.pause(start), Duration::ZERO);
        for _ in 0..10_000 {
            talk.heard(100, start);
        }
        assert!(talk.pause(start) > TALK.each * 9000);
        let mut now = start + talk.pause(start);
        for _ in 0..100 {
            talk.heard(100, now);
            let pause = talk.pause(now);
            assert_eq!(pause, TALK.each);
            now += pause;
        }
    }
}
