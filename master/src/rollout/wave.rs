//! The waves of a rollout: who is in which.

use std::fmt;
use std::str::FromStr;

use clamcast_daemon::config::Percent;
use clamcast_proto::{AgentName, Digest, GroupName};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// One step of a rollout, as it is configured.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(try_from = "String", into = "String")]
pub enum Wave {
    /// The members of a group.
    Group(GroupName),
    /// This part of the enrolled agents, at least one.
    Share(Percent),
    /// So many of them.
    Count(usize),
}

/// A text is not a wave.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{0}` is not a wave: expected \"group:NAME\", a percentage such as \"10%\", or a number of agents such as \"5\""
)]
pub struct WaveError(String);

impl FromStr for Wave {
    type Err = WaveError;

    fn from_str(text: &str) -> Result<Self, WaveError> {
        let wrong = || WaveError(text.chars().take(80).collect());
        if let Some(group) = text.strip_prefix("group:") {
            return group.parse().map(Self::Group).map_err(|_| wrong());
        }
        if text.ends_with('%') {
            let share: Percent = text.parse().map_err(|_| wrong())?;
            return (share.of(100) > 0)
                .then_some(Self::Share(share))
                .ok_or_else(wrong);
        }
        match text.parse() {
            Ok(count) if count > 0 => Ok(Self::Count(count)),
            Ok(_) | Err(_) => Err(wrong()),
        }
    }
}

impl fmt::Display for Wave {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Group(group) => write!(f, "group:{group}"),
            Self::Share(share) => share.fmt(f),
            Self::Count(count) => count.fmt(f),
        }
    }
}

impl TryFrom<String> for Wave {
    type Error = WaveError;

    fn try_from(text: String) -> Result<Self, WaveError> {
        text.parse()
    }
}

impl From<Wave> for String {
    fn from(wave: Wave) -> Self {
        wave.to_string()
    }
}

/// A wave that has begun. Who is in it does not change any more, but for agents that are enrolled
/// later or change their groups.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Begun {
    /// As configured.
    pub wave: Wave,
    /// How far it reaches in the rollout's order of agents.
    reach: Reach,
    /// Since when.
    pub since: Timestamp,
}

/// How far a share or a count reaches. A group reaches nobody by place.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Reach {
    Nobody,
    /// To this place, which is in it.
    UpTo(Digest),
    Everybody,
}

impl Begun {
    /// Begins a wave over the enrolled agents, given by their places in the rollout's order.
    pub fn new(wave: Wave, places: &mut [Digest], since: Timestamp) -> Self {
        let total = places.len();
        let members = match &wave {
            Wave::Group(_) => 0,
            Wave::Share(share) => {
                usize::try_from(share.of_rounded_up(total as u64)).unwrap_or(total)
            }
            Wave::Count(count) => (*count).min(total),
        };
        let reach = match (&wave, members) {
            (Wave::Share(share), _) if share.of(100) == 100 => Reach::Everybody,
            (_, 0) => Reach::Nobody,
            (_, members) => Reach::UpTo(*places.select_nth_unstable(members - 1).1),
        };
        Self { wave, reach, since }
    }

    /// Whether an agent with these groups and this place is in it.
    pub fn has(&self, groups: &[GroupName], place: &Digest) -> bool {
        match &self.wave {
            Wave::Group(group) => groups.contains(group),
            Wave::Share(_) | Wave::Count(_) => match &self.reach {
                Reach::Nobody => false,
                Reach::UpTo(last) => place <= last,
                Reach::Everybody => true,
            },
        }
    }
}

/// An agent's place in the order of a rollout: the same as long as it lasts, another one in the
/// next, so that it is not always the same hosts that go first.
pub fn place(content: &Digest, name: &AgentName) -> Digest {
    Digest::of(&[content.as_bytes().as_slice(), name.as_str().as_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(count: usize) -> Vec<AgentName> {
        (0..count)
            .map(|i| format!("web{i}").parse().unwrap())
            .collect()
    }

    /// How many of `count` agents are in the wave.
    fn members(wave: &str, content: &Digest, count: usize) -> Vec<AgentName> {
        let names = names(count);
        let mut places: Vec<_> = names.iter().map(|name| place(content, name)).collect();
        let begun = Begun::new(wave.parse().unwrap(), &mut places, Timestamp::UNIX_EPOCH);
        let is_in = |name: &AgentName| begun.has(&[], &place(content, name));
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
    fn whoever_is_enrolled_later_pushes_nobody_out() {
        let content = Digest::of(b"monday");
        let first = names(50);
        let mut places: Vec<_> = first.iter().map(|name| place(&content, name)).collect();
        let begun = Begun::new(Wave::Count(5), &mut places, Timestamp::UNIX_EPOCH);
        let all = names(500);
        let now = all
            .iter()
            .filter(|name| begun.has(&[], &place(&content, name)));
        let before = first
            .iter()
            .filter(|name| begun.has(&[], &place(&content, name)));
        assert_eq!(before.count(), 5);
        assert!(now.count() > 5, "some of the later ones are in its range");
    }

    #[test]
    fn what_is_not_a_wave_says_what_one_is() {
        for text in ["", "group:", "0%", "0", "101%", "-1", "canary", "10 %%"] {
            let error = text.parse::<Wave>().unwrap_err().to_string();
            assert!(error.contains("is not a wave"), "{text:?}: {error}");
        }
        for text in ["group:canary", "10%", "5"] {
            assert_eq!(text.parse::<Wave>().unwrap().to_string(), text);
        }
    }
}
