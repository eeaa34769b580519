//! `[rollout]`: the waves, and how careful they are.
//!
//! Pure: no sockets, no disk, no clock.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use clamcast_daemon::values::Percent;
use clamcast_proto::GroupName;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Window;

/// How careful rollouts are: `[rollout]` of the configuration.
#[derive(Clone, Debug)]
pub struct Rules {
    /// The waves, in order. After the last one every agent should run the generation.
    pub waves: Vec<Wave>,
    /// Wait after a wave is done before the next begins.
    pub settle: Duration,
    /// Members of later waves that refused it and are not set aside, as a part of all members: more of
    /// them, and more than one, halt it unless more hosts have proven it.
    pub refused_max: Percent,
    /// Members with trouble of their own, as a part of a wave: more of them, and more than one, pause it.
    pub unwell_max: Percent,
    /// Whether those who took what was halted go back.
    pub rollback_on_halt: bool,
    /// How long a wave waits for its members. A member's progress renews its own time to twice this
    /// at most.
    pub deadline: Duration,
    /// When hosts of a group may be given something new. A group without one: always.
    pub windows: BTreeMap<GroupName, Vec<Window>>,
}

impl Rules {
    /// Members of a wave that may have trouble of their own: one in any case, so that no host alone
    /// pauses a rollout.
    pub fn unwell(&self, members: usize) -> u64 {
        self.unwell_max.of(members as u64).max(1)
    }

    /// Whether an agent of these groups may be given something new now.
    pub fn is_open(&self, groups: &[GroupName], now: Timestamp) -> bool {
        let mut windows = groups
            .iter()
            .filter_map(|group| self.windows.get(group))
            .flatten()
            .peekable();
        windows.peek().is_none() || windows.any(|window| window.is_open(now))
    }

    /// The windows of the groups for which `has` is true: `GROUP: WINDOW, ...` of each.
    pub fn windows_of(&self, has: impl Fn(&GroupName) -> bool) -> Vec<String> {
        let windows = self.windows.iter().filter(|(group, _)| has(group));
        let text = |(group, windows): (&GroupName, &Vec<Window>)| {
            let windows: Vec<_> = windows.iter().map(Window::to_string).collect();
            format!("{group}: {}", windows.join(", "))
        };
        windows.map(text).collect()
    }
}

/// One step of a rollout, as it is configured.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(try_from = "String", into = "String")]
pub enum Wave {
    /// The members of a group.
    Group(GroupName),
    /// This part of the connected agents, at least one.
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

#[cfg(test)]
mod tests {
    use super::*;

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
