//! Why changed files are left alone and which files were put back, as it survives a restart: with the
//! times of the wall clock.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Now;
use super::drift::{Kept, REPAIRS_MAX, Rest};
use crate::host::updater::Updater;

/// Files whose repairs are kept. A host that repairs more has no updater, but a broken disk.
const REPAIRED_MAX: usize = 100;

/// What the guard keeps.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct LeftAlone {
    rest: Option<RestRecord>,
    repaired: BTreeMap<String, Vec<Timestamp>>,
}

/// The record as this version writes it, or as versions before it wrote it.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum AnyLeftAlone {
    /// This version.
    Now(LeftAlone),
    /// Before.
    Before(Option<RestBefore>),
}

/// Why changed files were left alone, without times.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestBefore {
    /// Another updater was at work.
    Updater(Updater),
    /// Repairs did not last.
    Again,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum RestRecord {
    Updater {
        updater: Updater,
        since: Timestamp,
        seen: Timestamp,
    },
    Again,
}

impl LeftAlone {
    /// Converts the guard's state for the disk.
    pub(super) fn of(kept: &Kept, clocks: Now) -> Self {
        let rest = kept.rest.as_ref().map(|rest| match rest {
            Rest::Updater {
                updater,
                since,
                seen,
            } => RestRecord::Updater {
                updater: updater.clone(),
                since: clocks.time(*since),
                seen: clocks.time(*seen),
            },
            Rest::Again => RestRecord::Again,
        });
        let repaired = kept.repaired.iter().take(REPAIRED_MAX);
        let repaired = repaired.map(|(name, times)| {
            let times = times.iter().map(|time| clocks.time(*time));
            (name.clone(), times.collect())
        });
        Self {
            rest,
            repaired: repaired.collect(),
        }
    }

    fn kept(self, clocks: Now) -> Kept {
        let rest = self.rest.map(|rest| match rest {
            RestRecord::Updater {
                updater,
                since,
                seen,
            } => Rest::Updater {
                updater,
                since: clocks.instant(since),
                seen: clocks.instant(seen),
            },
            RestRecord::Again => Rest::Again,
        });
        let repaired = self.repaired.into_iter().take(REPAIRED_MAX);
        let repaired = repaired.map(|(name, times)| {
            let times = times.into_iter().take(REPAIRS_MAX);
            (name, times.map(|time| clocks.instant(time)).collect())
        });
        Kept {
            rest,
            repaired: repaired.collect(),
        }
    }
}

impl AnyLeftAlone {
    /// Converts the record for the guard.
    pub fn kept(self, clocks: Now) -> Kept {
        let rest = match self {
            Self::Now(record) => return record.kept(clocks),
            Self::Before(rest) => rest,
        };
        let rest = rest.map(|rest| match rest {
            RestBefore::Updater(updater) => Rest::Updater {
                updater,
                since: clocks.at,
                seen: clocks.at,
            },
            RestBefore::Again => Rest::Again,
        });
        Kept {
            rest,
            repaired: BTreeMap::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn now() -> Now {
        Now {
            clock: Timestamp::now(),
            at: Instant::now(),
        }
    }

    #[test]
    fn an_upgrade_keeps_what_older_agents_left_alone() {
        let clocks = now();
        let rest = |json: &str| {
            let record: AnyLeftAlone = serde_json::from_str(json).unwrap();
            record.kept(clocks).rest
        };
        assert_eq!(rest("null"), None);
        assert_eq!(rest("\"again\""), Some(Rest::Again));
        let freshclam = r#"{"updater":{"name":"freshclam","pid":812,"user":"clamav"}}"#;
        let Some(Rest::Updater { updater, seen, .. }) = rest(freshclam) else {
            panic!("it is kept");
        };
        assert_eq!((updater.pid, seen), (812, clocks.at));
        assert_eq!(rest(r#"{"rest":"again","repaired":{}}"#), Some(Rest::Again));
    }

    #[test]
    fn kept_times_survive_a_restart_and_a_time_of_the_future_counts_as_now() {
        let clocks = now();
        let ago = |secs| clocks.at - Duration::from_secs(secs);
        let kept = Kept {
            rest: Some(Rest::Updater {
                updater: Updater {
                    name: "freshclam".into(),
                    pid: 812,
                    user: "clamav".into(),
                },
                since: ago(500),
                seen: ago(60),
            }),
            repaired: [("daily.cld".to_owned(), [ago(7200)].into())].into(),
        };
        let record = || {
            let json = serde_json::to_string(&LeftAlone::of(&kept, clocks)).unwrap();
            serde_json::from_str::<LeftAlone>(&json).unwrap()
        };
        assert_eq!(record().kept(clocks), kept);
        let set_back = Now {
            clock: clocks.clock - Duration::from_secs(3600),
            ..clocks
        };
        let Some(Rest::Updater { seen, .. }) = record().kept(set_back).rest else {
            panic!("it is kept");
        };
        assert_eq!(seen, clocks.at);
    }
}
