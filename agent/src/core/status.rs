//! The agent at one moment, as operators see it.

use clamcast_proto::dsse::KeyId;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::{ClamdReport, Drift, InstallNumber, Outcome, Receipt};
use clamcast_proto::wire::Phase;
use clamcast_proto::{AgentName, DatabaseName, Digest, Epoch, FleetName, Generation, Position};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::chain;
use crate::config::DriftPolicy;
use crate::install::watch::Blind;

/// The agent at one moment. The keys are for scripts and stay as they are.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Status {
    /// The fleet.
    pub fleet: FleetName,
    /// The host's name in it.
    pub agent: AgentName,
    /// The agent's program version.
    pub version: String,
    /// The connection.
    pub master: MasterStatus,
    /// The installed generation's epoch.
    pub epoch: Option<Epoch>,
    /// The installed generation.
    pub generation: Option<Generation>,
    /// Digest of its content.
    pub content: Option<Digest>,
    /// When it was published.
    pub published: Option<Timestamp>,
    /// Number of the install.
    pub install: Option<InstallNumber>,
    /// Its databases.
    pub files: Vec<DatabaseName>,
    /// Those of them without a verified signature of Talos.
    #[serde(default)]
    pub unsigned: Vec<DatabaseName>,
    /// Those of them that the master holds back, the longest first; at most [`HELD_BACK_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held_back: Vec<HeldBack>,
    /// How many more the master holds back.
    #[serde(default)]
    pub held_back_more: usize,
    /// Whether clamd was seen scanning with it.
    pub live: bool,
    /// Outcome of the newest generation that ended on this host.
    pub outcome: Option<Outcome>,
    /// Phase of the install under way; idle if there is none.
    pub phase: Phase,
    /// The generation of the install under way.
    pub working_on: Option<Position>,
    /// The newest generation that ended on this host.
    pub last: Option<LastStatus>,
    /// When the freshness statement for the newest accepted generation expires; `None` if no
    /// statement ever came.
    pub fresh_until: Option<Timestamp>,
    /// Whether the freshness statement expired, or none came in time after the first start.
    pub stale: bool,
    /// When the host became stale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stale_since: Option<Timestamp>,
    /// clamd, as it was last seen.
    pub clamd: ClamdReport,
    /// Databases in the directory that are not clamcast's.
    pub foreign: Vec<String>,
    /// The host's own files under names of the fleet, kept until the fleet withdraws the name.
    #[serde(default)]
    pub adopted: Vec<DatabaseName>,
    /// Drift of the installed files.
    #[serde(default)]
    pub drift: DriftStatus,
    /// The current error, if there is one.
    pub error: Option<String>,
    /// A condition that an operator should look at although it is no error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alarm: Option<String>,
    /// Receipts that the master has not acknowledged.
    pub receipts_pending: usize,
    /// Last second of the host certificate's validity.
    pub certificate_expires: Timestamp,
    /// Whether the host certificate has expired.
    #[serde(default)]
    pub certificate_expired: bool,
    /// The pinned root key.
    pub root: KeyId,
    /// Version of the key set in use.
    pub keys_version: u64,
}

/// The parts of a status that the core does not know.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// clamd, as it was last seen.
    pub clamd: ClamdReport,
    /// Whether the file system reports changes.
    pub watched: bool,
    /// Why it does not.
    pub blind: Option<Blindness>,
    /// Why no master believes the host certificate.
    pub invalid: Option<String>,
    /// Last second of the host certificate's validity.
    pub certificate_expires: Timestamp,
}

/// Files that the master holds back, as far as they are listed.
pub const HELD_BACK_MAX: usize = 20;

/// A file that was captured so much earlier than its generation was made is held back. The load test
/// of a capture takes minutes.
const HELD_BACK_AFTER: SignedDuration = SignedDuration::from_hours(1);

/// A database that the master publishes with older content than its mirror has.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct HeldBack {
    /// Its name.
    pub name: DatabaseName,
    /// When the master last found this content in the mirror and could publish it.
    pub since: Timestamp,
}

impl HeldBack {
    /// The files of a generation that the master held back when it made the generation, the longest
    /// first, and how many more there are. A rollback brings earlier content on purpose.
    pub fn of(manifest: &Manifest) -> (Vec<Self>, usize) {
        let files = manifest.files.iter();
        let captured = files.filter_map(|file| {
            let (name, since) = (file.name.clone(), file.captured?);
            Some(Self { name, since })
        });
        let is_late = |it: &Self| manifest.created.duration_since(it.since) > HELD_BACK_AFTER;
        let mut held: Vec<_> = captured
            .filter(|it| manifest.rollback_of.is_none() && is_late(it))
            .collect();
        held.sort_by(|a, b| (a.since, &a.name).cmp(&(b.since, &b.name)));
        let more = held.len().saturating_sub(HELD_BACK_MAX);
        held.truncate(HELD_BACK_MAX);
        (held, more)
    }
}

/// The connection to the master.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct MasterStatus {
    /// Whether the agent is connected.
    pub connected: bool,
    /// The master's address.
    pub address: Option<String>,
    /// The master's program version.
    pub version: Option<String>,
    /// When the agent connected or disconnected last.
    pub since: Timestamp,
    /// Why the agent is not connected.
    pub error: Option<String>,
    /// Seconds that this host's clock was ahead of the master's when the connection was made.
    #[serde(default)]
    pub clock_ahead_secs: Option<i64>,
}

/// Drift of the installed files.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct DriftStatus {
    /// The policy for changed files.
    pub policy: DriftPolicy,
    /// Files that differ from the published ones.
    pub files: Vec<Drift>,
    /// Why the agent does not repair these files.
    pub reason: Option<String>,
    /// The repair that waits, if one does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repair_waits: Option<RepairWait>,
    /// The other updater that was last seen at work on the directory.
    pub updater: Option<String>,
    /// When that updater was seen.
    pub updater_seen: Option<Timestamp>,
    /// When the agent last read and hashed every byte.
    pub rehashed: Option<Timestamp>,
    /// Whether the file system reports changes. Otherwise the agent looks every five seconds.
    pub watched: bool,
    /// Why the file system does not report changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blind: Option<Blindness>,
}

/// A repair that waits.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct RepairWait {
    /// When the wait began.
    pub since: Timestamp,
    /// When the repair starts at the latest, unless another updater is seen again before.
    pub until: Timestamp,
}

/// Why there are no file events.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Blindness {
    /// The cause.
    pub why: String,
    /// The command or change that removes the cause.
    pub remedy: String,
}

/// How a generation ended.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct LastStatus {
    /// The generation's epoch.
    pub epoch: Epoch,
    /// The generation's number.
    pub generation: Generation,
    /// The outcome.
    pub outcome: Outcome,
    /// Why the generation is not live.
    pub error: Option<String>,
    /// When the generation ended.
    pub time: Timestamp,
}

impl From<&Blind> for Blindness {
    fn from(blind: &Blind) -> Self {
        Self {
            why: chain(blind),
            remedy: blind.remedy(),
        }
    }
}

impl From<&Receipt> for LastStatus {
    fn from(receipt: &Receipt) -> Self {
        Self {
            epoch: receipt.epoch,
            generation: receipt.generation,
            outcome: receipt.outcome,
            error: receipt.error.clone(),
            time: receipt.time,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clamcast_proto::manifest::{ManifestFile, Publisher, content_digest};

    /// A generation of the second 100,000 with files that were captured so many seconds before.
    fn manifest(ages: &[Option<i64>]) -> Manifest {
        let at = |second| Timestamp::from_second(second).unwrap();
        let files = ages.iter().enumerate().map(|(number, age)| ManifestFile {
            name: format!("{number:02}.ndb").parse().unwrap(),
            size: 0,
            sha256: Digest::of(b""),
            captured: age.map(|age| at(100_000 - age)),
            container: None,
        });
        Manifest {
            fleet: "bank".parse().unwrap(),
            epoch: Epoch(1),
            generation: Generation::FIRST,
            publisher: Publisher("p".into()),
            created: at(100_000),
            previous: None,
            rollback_of: None,
            content: content_digest([]),
            files: files.collect(),
        }
    }

    #[test]
    fn files_that_were_captured_more_than_an_hour_before_their_generation_are_held_back() {
        let manifest = manifest(&[
            Some(0),
            None,
            Some(3601),
            Some(3600),
            Some(90_000),
            Some(-9),
        ]);
        let (held, more) = HeldBack::of(&manifest);
        let named: Vec<_> = held
            .iter()
            .map(|it| (it.name.as_str(), it.since.as_second()))
            .collect();
        assert_eq!(named, [("04.ndb", 10_000), ("02.ndb", 96_399)]);
        assert_eq!(more, 0);
    }

    #[test]
    fn a_rollback_holds_nothing_back() {
        let mut manifest = manifest(&[Some(90_000)]);
        manifest.rollback_of = Some(manifest.position());
        assert_eq!(HeldBack::of(&manifest), (Vec::new(), 0));
    }

    #[test]
    fn the_files_that_are_held_back_longest_are_listed_and_the_others_counted() {
        let ages: Vec<_> = (0..50).map(|number| Some(10_000 + number)).collect();
        let (held, more) = HeldBack::of(&manifest(&ages));
        assert_eq!((held.len(), more), (HELD_BACK_MAX, 30));
        assert_eq!(held[0].name.as_str(), "49.ndb");
    }
}
