//! Decides whether two hosts use one identity: a cloned machine or a stolen key.
//!
//! Pure: no sockets, no disk, no clock.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};

use jiff::{SignedDuration, Timestamp};

/// Connections of one name are compared over this time.
const WINDOW: SignedDuration = SignedDuration::from_mins(10);

/// Changes between addresses that were seen before, from which on two hosts share the name. A host
/// that moves to another address changes once.
const ALTERNATIONS: usize = 3;

/// Connections that are remembered for each name.
const ARRIVALS_MAX: usize = 16;

/// How long a name counts as shared after the last sign of it.
const SHOWN: SignedDuration = SignedDuration::from_hours(1);

/// The connections of one name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Arrivals {
    recent: VecDeque<(Timestamp, SocketAddr)>,
    twins: Option<Twins>,
}

/// Two hosts with one name.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Twins {
    /// Their addresses.
    pub addresses: [SocketAddr; 2],
    /// Since when.
    pub since: Timestamp,
    /// The last sign.
    last: Timestamp,
}

impl Arrivals {
    /// A connection was made. Returns the twins if this is the first sign of them.
    pub(crate) fn connected(&mut self, address: SocketAddr, now: Timestamp) -> Option<&Twins> {
        self.recent
            .retain(|(at, _)| now.duration_since(*at).abs() < WINDOW);
        if self.recent.len() == ARRIVALS_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back((now, address));
        if self.alternations() < ALTERNATIONS {
            return None;
        }
        let other = |it: &&(Timestamp, SocketAddr)| it.1.ip() != address.ip();
        let other = self.recent.iter().rev().find(other)?.1;
        self.sign([other, address], now)
    }

    /// The connection that a newer one replaced still answers.
    pub(crate) fn both_answer(
        &mut self,
        addresses: [SocketAddr; 2],
        now: Timestamp,
    ) -> Option<&Twins> {
        self.sign(addresses, now)
    }

    fn sign(&mut self, addresses: [SocketAddr; 2], now: Timestamp) -> Option<&Twins> {
        let known = self.twins(now).map(|twins| twins.since);
        self.twins = Some(Twins {
            addresses,
            since: known.unwrap_or(now),
            last: now,
        });
        self.twins.as_ref().filter(|_| known.is_none())
    }

    /// The twins, until no sign of them was seen for an hour.
    pub(crate) fn twins(&self, now: Timestamp) -> Option<&Twins> {
        let twins = self.twins.as_ref();
        twins.filter(|twins| now.duration_since(twins.last) < SHOWN)
    }

    /// Connections from another address than the one before, which was seen before that.
    fn alternations(&self) -> usize {
        let mut addresses: Vec<IpAddr> = self.recent.iter().map(|(_, it)| it.ip()).collect();
        addresses.dedup();
        let changes = addresses.windows(2).enumerate();
        changes
            .filter(|(before, pair)| *before == 0 || addresses[..*before].contains(&pair[1]))
            .count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether connections from these hosts, a minute apart, show twins.
    fn show_twins(hosts: &str) -> bool {
        let mut arrivals = Arrivals::default();
        for (minute, host) in hosts.bytes().enumerate() {
            let address = SocketAddr::from(([10, 0, 0, host], 4000 + minute as u16));
            arrivals.connected(address, at(60 * minute as i64));
        }
        arrivals.twins(at(60 * hosts.len() as i64)).is_some()
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn addresses_that_alternate_three_times_in_ten_minutes_are_two_hosts() {
        assert!(show_twins("abab"));
        assert!(show_twins("aabbab"));
        assert!(show_twins("abcbcb"));
        assert!(!show_twins("aba"));
    }

    #[test]
    fn a_host_that_reconnects_or_moves_is_one_host() {
        for hosts in ["aaaaaaaaaa", "aaaabbbb", "abcdefgh", "ab"] {
            assert!(!show_twins(hosts), "{hosts}");
        }
    }

    #[test]
    fn slow_alternation_is_a_host_with_two_networks() {
        let mut arrivals = Arrivals::default();
        for hour in 0..10 {
            let address = SocketAddr::from(([10, 0, 0, hour as u8 % 2], 1));
            assert_eq!(arrivals.connected(address, at(3600 * hour)), None);
        }
    }

    #[test]
    fn twins_are_reported_once_and_forgotten_an_hour_after_the_last_sign() {
        let addresses = [1, 2].map(|host| SocketAddr::from(([10, 0, 0, host], 1)));
        let mut arrivals = Arrivals::default();
        assert!(arrivals.both_answer(addresses, at(0)).is_some());
        assert!(arrivals.both_answer(addresses, at(3000)).is_none());
        assert_eq!(arrivals.twins(at(6000)).unwrap().since, at(0));
        assert_eq!(arrivals.twins(at(6600)), None);
        assert!(arrivals.both_answer(addresses, at(7000)).is_some());
    }
}
