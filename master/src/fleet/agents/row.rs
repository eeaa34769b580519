//! What operators are shown of an agent, in words.

use std::net::SocketAddr;

use clamcast_proto::receipt::{ClamdReport, ClamdState, Drift, Found, Outcome};
use clamcast_proto::wire::{OfferId, Phase};
use clamcast_proto::{AgentName, DatabaseName, GroupName, Position};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::agent::{Agent, Answered, Standing};
use crate::fleet::Twins;
use crate::fleet::rollout::{Rollout, Wanted};

/// Why a host that is not connected is not where it should be.
pub const AWAY: &str = "not connected; it catches up when it comes back";

/// What is said of an agent that has an offer and has given no sign of it.
pub const OFFERED: &str = "offered";

/// An agent at work says so every 15 s. Whoever looks is told of a silence that is longer than this,
/// two signs that are missing, and shorter than what it takes to lose the connection of a dead one.
const SILENCE_TOLD: SignedDuration = SignedDuration::from_secs(30);

/// Names of drifted files that a table has room for.
const DRIFT_SHOWN: usize = 3;

/// What `agents` shows of one.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Row {
    /// Its name.
    pub name: AgentName,
    /// Its groups.
    pub groups: Vec<GroupName>,
    /// Whether it is connected.
    pub connected: bool,
    /// The generation in its database directory: keys `epoch` and `generation`, null for none.
    #[serde(flatten, with = "clamcast_proto::position::or_null")]
    pub position: Option<Position>,
    /// Whether clamd was seen scanning with it.
    pub live: bool,
    /// The generation that it is wanted at now; that which it has where it is to keep it.
    pub wanted: Option<Position>,
    /// Whether a group of it is pinned.
    pub pinned: bool,
    /// Whether it is what the master wants, with every file intact.
    pub conformant: bool,
    /// Whether that was halted, aborted or rolled back.
    pub taken_back: bool,
    /// What came of the last generation: an outcome, or what it is doing.
    pub outcome: String,
    /// Why it is not what is wanted, or what it refused before that was taken back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Since when: of the last receipt, else of the connection or the last one.
    pub since: Timestamp,
    /// Its clamd.
    pub clamd: ClamdReport,
    /// Databases of others beside ours.
    pub foreign: Vec<String>,
    /// The host's own files under names of the fleet, which come back when the fleet withdraws the
    /// name.
    pub adopted: Vec<DatabaseName>,
    /// Files that its last receipt says were found changed, and whether they are mended.
    pub drift: Vec<Drift>,
    /// Where it connects from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    /// When the certificate that it last came with ends.
    pub certificate_ends: Timestamp,
    /// Whether it may be about to be offered what it is wanted at: it has just connected, or the master
    /// was started a moment ago and it was there before.
    #[serde(skip)]
    pub coming: bool,
    /// The offer that is under way.
    #[serde(skip)]
    pub offered: Option<OfferId>,
    /// The last offer that was answered, also on a connection which has ended.
    #[serde(skip)]
    pub answered: Option<Answered>,
}

fn told_of_twins(twins: &Twins) -> String {
    let [one, other] = twins.addresses;
    format!("two hosts use this name: {one} and {other}")
}

impl Agent {
    /// What is shown of it. `wanted`: what it is wanted at now.
    pub(super) fn row(
        &self,
        rollout: &Rollout,
        wanted: Wanted,
        standing: Standing,
        now: Timestamp,
    ) -> Row {
        let record = &self.record;
        let twins = self.arrivals.twins(now);
        let installed = record.installed.as_ref();
        let offer = self.link.as_ref().and_then(|link| link.offer.as_ref());
        let times = [
            installed.map(|i| i.time),
            record.failed.as_ref().map(|f| f.time),
        ];
        Row {
            name: record.name.clone(),
            groups: record.groups.clone(),
            connected: self.link.is_some(),
            position: installed.map(|installed| installed.position),
            live: installed.is_some_and(|installed| installed.live),
            wanted: match wanted {
                Wanted::Nothing => None,
                Wanted::Stay | Wanted::Later(_) => installed.map(|installed| installed.position),
                Wanted::At(target) => Some(target.position),
            },
            pinned: rollout.pin(&record.groups).is_some(),
            conformant: standing == Standing::Conformant && installed.is_some() && twins.is_none(),
            outcome: self.outcome(),
            error: twins
                .map(told_of_twins)
                .or_else(|| self.error(standing, now))
                .or_else(|| {
                    if let Wanted::Later(target) = wanted {
                        return Some(format!(
                            "gets {} when a window of it opens",
                            target.position
                        ));
                    }
                    let installed = installed.filter(|_| self.has_taken_back(rollout))?;
                    Some(format!("{} was taken back", installed.position))
                }),
            taken_back: self.has_taken_back(rollout),
            since: times.into_iter().flatten().max().unwrap_or(record.seen),
            clamd: record.clamd.clone(),
            foreign: record.foreign.clone(),
            adopted: record.adopted.clone(),
            drift: record.drift.clone(),
            address: self.link.as_ref().map(|link| link.address),
            certificate_ends: record.certificate_ends,
            coming: match &self.link {
                Some(link) => offer.is_none() && link.answered.is_none(),
                None => self.returning && rollout.is_reconnecting(now),
            },
            offered: offer.map(|offer| offer.id),
            answered: self
                .link
                .as_ref()
                .and_then(|link| link.answered)
                .or(self.answered),
        }
    }

    /// What it is doing, or what came of the last thing it did.
    fn outcome(&self) -> String {
        let link = self.link.as_ref();
        if let Some(offer) = link.and_then(|link| link.offer.as_ref()) {
            let begun = offer.phase != Phase::Idle;
            return if begun {
                offer.phase.to_string()
            } else {
                OFFERED.to_owned()
            };
        }
        if link.is_some_and(|link| link.declined.is_some()) {
            return "declined".to_owned();
        }
        match (&self.record.failed, &self.record.installed) {
            (Some(failed), _) => failed.outcome.to_string(),
            (None, Some(installed)) if installed.live => Outcome::Live.to_string(),
            (None, Some(_)) => Outcome::Installed.to_string(),
            (None, None) => "none".to_owned(),
        }
    }

    /// Which files are not the published ones, and why that stays so.
    fn drifted(&self) -> String {
        let drift = self.record.drift.iter().filter(|file| !file.mended);
        let words: Vec<_> = drift
            .map(|file| match file.found {
                Found::Missing => format!("{} is missing", file.name),
                Found::Changed => format!("{} was changed", file.name),
                Found::Unreadable => format!("{} cannot be read", file.name),
            })
            .collect();
        let mut text = match words.len() {
            0 => "a file on its disk is not the published one".to_owned(),
            shown => words[..shown.min(DRIFT_SHOWN)].join(", "),
        };
        if words.len() > DRIFT_SHOWN {
            text += &format!(" and {} more", words.len() - DRIFT_SHOWN);
        }
        match &self.record.drift_error {
            Some(error) => format!("{text}: {error}"),
            None => text,
        }
    }

    /// Why it is not conformant, as far as it or its silence says.
    fn error(&self, standing: Standing, now: Timestamp) -> Option<String> {
        if standing == Standing::Conformant && self.record.failed.is_none() {
            return None;
        }
        let link = self.link.as_ref();
        if let Some(unsent) = link.and_then(|link| link.unsent.as_ref()) {
            return Some(unsent.clone());
        }
        if let Some(offer) = link.and_then(|link| link.offer.as_ref()) {
            let silent = now.duration_since(offer.progress);
            let told = standing == Standing::Failed || silent >= SILENCE_TOLD;
            let silent = match silent.as_secs() {
                seconds @ ..120 => format!("{seconds}s"),
                seconds => format!("{}m", seconds / 60),
            };
            return told
                .then(|| format!("no sign of progress with {} for {silent}", offer.position));
        }
        if let Some(declined) = link.and_then(|link| link.declined.as_ref()) {
            return Some(declined.message.clone());
        }
        if let Some(failed) = &self.record.failed {
            return Some(format!("{}: {}", failed.position, failed.error));
        }
        if link.is_none() {
            let ends = self.record.certificate_ends;
            return Some(match ends <= now {
                true => format!(
                    "not connected; its certificate expired at {ends:.0}: `clamcast-certs agent {} \
                     --force` makes a new one",
                    self.record.name
                ),
                false => AWAY.to_owned(),
            });
        }
        let installed = self.record.installed.as_ref()?;
        let clamd = &self.record.clamd;
        match (installed.live, installed.intact, clamd.state) {
            (_, false, _) => Some(self.drifted()),
            (true, true, _) => None, // behind, and on its way
            (false, true, ClamdState::Down) => Some("nobody answers at clamd's socket".to_owned()),
            (false, true, ClamdState::Up | ClamdState::Silent | ClamdState::None) => {
                let note = clamd.note.clone();
                Some(note.unwrap_or_else(|| "clamd has not shown that it scans with it".to_owned()))
            }
        }
    }
}
