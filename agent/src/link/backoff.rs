//! Decides how long to wait before the next try.
//!
//! Pure: randomness is an argument.

use std::time::Duration;

/// Waits that double from one try to the next, up to a bound. Of each wait a random half is taken
/// away, so that hosts that lost their master at the same moment do not come back at the same
/// moment.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    tries: u32,
}

impl Backoff {
    /// Starts at `first` and stays at `longest`.
    pub const fn new(first: Duration, longest: Duration) -> Self {
        Self {
            first,
            longest,
            tries: 0,
        }
    }

    /// The next wait. `random` is from 0 to 1.
    pub fn next(&mut self, random: f64) -> Duration {
        // Past 2^20 every bound in use is reached.
        let whole = self.first.saturating_mul(1 << self.tries.min(20));
        self.tries = self.tries.saturating_add(1);
        whole
            .min(self.longest)
            .mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0)
    }

    /// What is tried worked.
    pub fn reset(&mut self) {
        self.tries = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(random: f64, expected_ms: &[u64]) {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        for ms in expected_ms {
            assert_eq!(backoff.next(random), Duration::from_millis(*ms));
        }
        backoff.reset();
        assert_eq!(backoff.next(random).as_millis(), u128::from(expected_ms[0]));
    }

    #[test]
    fn waits_double_up_to_the_bound_and_start_again_after_a_reset() {
        check(1.0, &[1000, 2000, 4000, 8000, 16000, 32000, 60000, 60000]);
        check(0.0, &[500, 1000, 2000, 4000, 8000, 16000, 30000, 30000]);
    }

    #[test]
    fn a_year_of_tries_does_not_overflow() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        for _ in 0..1_000_000 {
            assert!(backoff.next(0.5) <= Duration::from_secs(60));
        }
    }
}
