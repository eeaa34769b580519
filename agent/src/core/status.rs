//! The agent at one moment, as the keeper reports it to operators.

use clamcast_proto::dsse::KeyId;
use clamcast_proto::receipt::{ClamdReport, Drift, InstallNumber, Outcome, Receipt};
use clamcast_proto::wire::Phase;
use clamcast_proto::{AgentName, DatabaseName, Digest, Epoch, FleetName, Generation, Position};
use jiff::Timestamp;
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
    /// Whether clamd was seen scanning with it.
    pub live: bool,
    /// What came of the newest generation that came to an end here.
    pub outcome: Option<Outcome>,
    /// What is going on.
    pub phase: Phase,
    /// The generation that it is going on for.
    pub working_on: Option<Position>,
    /// The newest generation that came to an end here.
    pub last: Option<LastStatus>,
    /// Until when the freshness statement for the newest accepted generation holds; `None` if none
    /// ever came.
    pub fresh_until: Option<Timestamp>,
    /// Whether it expired, or none came in time after the first start.
    pub stale: bool,
    /// Since when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stale_since: Option<Timestamp>,
    /// clamd, as it was last seen.
    pub clamd: ClamdReport,
    /// Databases in the directory that are not clamcast's.
    pub foreign: Vec<String>,
    /// The host's own files under names of the fleet, kept until the fleet withdraws the name.
    #[serde(default)]
    pub adopted: Vec<DatabaseName>,
    /// What became of the installed files.
    #[serde(default)]
    pub drift: DriftStatus,
    /// What stands in the way, if anything does.
    pub error: Option<String>,
    /// What somebody should look at although nothing stands in the way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alarm: Option<String>,
    /// Receipts that the master has not acknowledged.
    pub receipts_pending: usize,
    /// Last second of the host certificate's validity.
    pub certificate_expires: Timestamp,
    /// Whether that is over.
    #[serde(default)]
    pub certificate_expired: bool,
    /// The pinned root key.
    pub root: KeyId,
    /// Version of the key set in use.
    pub keys_version: u64,
}

/// The connection to the master.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct MasterStatus {
    /// Whether it is there.
    pub connected: bool,
    /// Where the master is.
    pub address: Option<String>,
    /// Its program version.
    pub version: Option<String>,
    /// Since when the connection is there, or is not.
    pub since: Timestamp,
    /// Why it is not there.
    pub error: Option<String>,
    /// Seconds that this host's clock was ahead of the master's when the connection was made.
    #[serde(default)]
    pub clock_ahead_secs: Option<i64>,
}

/// How the installed files are watched over.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct DriftStatus {
    /// What is done about a changed one.
    pub policy: DriftPolicy,
    /// Those that are not what was published.
    pub files: Vec<Drift>,
    /// Why they stay so.
    pub reason: Option<String>,
    /// The repair that is put off, if one is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repair_waits: Option<RepairWait>,
    /// The updater of somebody else that was last seen at work on the directory, and when.
    pub updater: Option<String>,
    /// When it was seen.
    pub updater_seen: Option<Timestamp>,
    /// When every byte was read and hashed last.
    pub rehashed: Option<Timestamp>,
    /// Whether the file system tells of changes; else there are looks from time to time.
    pub watched: bool,
    /// Why it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blind: Option<Blindness>,
}

/// A repair that is put off.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct RepairWait {
    /// Since when.
    pub since: Timestamp,
    /// When it is tried at the latest, unless another updater is seen again before.
    pub until: Timestamp,
}

/// Why there are no file events.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Blindness {
    /// What is in the way.
    pub why: String,
    /// What to do about it.
    pub remedy: String,
}

/// How a generation ended.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct LastStatus {
    /// Its epoch.
    pub epoch: Epoch,
    /// Its number.
    pub generation: Generation,
    /// What came of it.
    pub outcome: Outcome,
    /// Why it is not live.
    pub error: Option<String>,
    /// When.
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
