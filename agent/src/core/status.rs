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
    /// Those of them without a verified signature of Talos.
    #[serde(default)]
    pub unsigned: Vec<DatabaseName>,
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
