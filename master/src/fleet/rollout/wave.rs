//! The waves of a rollout: who is in which.

use std::collections::BTreeSet;
use std::sync::Arc;

use clamcast_proto::{AgentName, Digest, GroupName};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::config::Wave;

/// A wave that has begun.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Begun {
    /// As configured.
    pub wave: Wave,
    members: Members,
    /// When it began.
    pub since: Timestamp,
    /// Since when its deadline runs: an operator's pause moves it on.
    pub(super) timed_from: Timestamp,
}

/// Which agents a started wave has.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Members {
    /// Those of the wave's group, now and later.
    Group,
    /// The connected agents that were drawn when the wave began.
    Drawn(Arc<BTreeSet<AgentName>>),
    Everybody,
}

impl Begun {
    /// Begins a wave. A percentage or count is drawn from the `connected` agents, in the order that
    /// their names have in the rollout of `content`.
    pub fn new<'a>(
        wave: Wave,
        content: &Digest,
        connected: impl Iterator<Item = &'a AgentName>,
        since: Timestamp,
    ) -> Self {
        let members = match &wave {
            Wave::Group(_) => Members::Group,
            Wave::Share(share) if share.of(100) == 100 => Members::Everybody,
            Wave::Share(_) | Wave::Count(_) => {
                Members::Drawn(Arc::new(draw(&wave, content, connected)))
            }
        };
        Self {
            wave,
            members,
            since,
            timed_from: since,
        }
    }

    /// Forgets drawn members that an earlier wave has: each name is kept once.
    pub(super) fn keep_new(&mut self, is_in_earlier: impl Fn(&AgentName) -> bool) {
        if let Members::Drawn(names) = &mut self.members {
            Arc::make_mut(names).retain(|name| !is_in_earlier(name));
        }
    }

    /// Whether every agent is a member, now and later.
    pub(super) fn is_of_everybody(&self) -> bool {
        self.members == Members::Everybody
    }

    /// Whether this agent was drawn.
    pub(super) fn has_drawn(&self, name: &AgentName) -> bool {
        match &self.members {
            Members::Drawn(names) => names.contains(name),
            Members::Group | Members::Everybody => false,
        }
    }

    /// Whether this agent of these groups is a member.
    pub fn has(&self, name: &AgentName, groups: &[GroupName]) -> bool {
        match (&self.members, &self.wave) {
            (Members::Everybody, _) => true,
            (Members::Drawn(names), _) => names.contains(name),
            (Members::Group, Wave::Group(group)) => groups.contains(group),
            (Members::Group, Wave::Share(_) | Wave::Count(_)) => false,
        }
    }
}

/// The first agents in the order of a hash of content and name: the order is the same throughout one
/// rollout and differs in the next, so that it is not always the same hosts that go first.
fn draw<'a>(
    wave: &Wave,
    content: &Digest,
    connected: impl Iterator<Item = &'a AgentName>,
) -> BTreeSet<AgentName> {
    let place = |name: &AgentName| {
        Digest::of(&[content.as_bytes().as_slice(), name.as_str().as_bytes()].concat())
    };
    let mut places: Vec<_> = connected.map(|name| (place(name), name)).collect();
    let total = places.len();
    let many = match wave {
        Wave::Group(_) => 0,
        Wave::Share(share) => usize::try_from(share.of_rounded_up(total as u64)).unwrap_or(total),
        Wave::Count(count) => (*count).min(total),
    };
    if (1..total).contains(&many) {
        places.select_nth_unstable(many - 1);
    }
    let drawn = places.into_iter().take(many);
    drawn.map(|(_, name)| name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(count: usize) -> Vec<AgentName> {
        (0..count)
            .map(|i| format!("web{i}").parse().unwrap())
            .collect()
    }

    /// The members of a wave that begins while `names` are connected.
    fn begun(wave: &str, content: &Digest, names: &[AgentName]) -> Begun {
        let wave = wave.parse().unwrap();
        Begun::new(wave, content, names.iter(), Timestamp::UNIX_EPOCH)
    }

    /// Which of `count` agents are in the wave.
    fn members(wave: &str, content: &Digest, count: usize) -> Vec<AgentName> {
        let names = names(count);
        let begun = begun(wave, content, &names);
        let is_in = |name: &AgentName| begun.has(name, &[]);
        names.into_iter().filter(is_in).collect()
    }

    #[test]
    fn a_share_is_rounded_up_and_never_nobody() {
        let content = Digest::of(b"monday");
        for (wave, count, expected) in [
            ("10%", 1, 1),
            ("10%", 11, 2),
            ("1%", 3, 1),
            ("50%", 3, 2),
            ("100%", 7, 7),
            ("5", 3, 3),
            ("5", 100, 5),
            ("10%", 0, 0),
        ] {
            assert_eq!(
                members(wave, &content, count).len(),
                expected,
                "{wave} of {count}"
            );
        }
    }

    #[test]
    fn who_goes_first_is_stable_within_a_rollout_and_another_in_the_next() {
        let [monday, tuesday] = [b"monday".as_slice(), b"tuesday"].map(Digest::of);
        assert_eq!(members("10%", &monday, 100), members("10%", &monday, 100));
        assert_ne!(members("10%", &monday, 100), members("10%", &tuesday, 100));
        // A larger wave has all of the smaller one.
        let small = members("10%", &monday, 100);
        let large = members("30%", &monday, 100);
        assert!(small.iter().all(|name| large.contains(name)));
    }

    #[test]
    fn agents_that_enrol_later_do_not_change_a_drawn_wave() {
        let content = Digest::of(b"monday");
        let begun = begun("5", &content, &names(50));
        let members = names(500).into_iter().filter(|name| begun.has(name, &[]));
        assert_eq!(members.count(), 5);
    }
}
