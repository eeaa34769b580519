//! The admin socket of the master: what commands request and what the daemon answers.
//!
//! `report` and `admin` build these types, `show` renders them as text, and `--json` prints the JSON
//! that the daemon sent. Scripts rely on that JSON: keys may be added, but a key keeps its name, its
//! meaning and its `null`. A command ignores keys that it does not know.

use std::collections::BTreeMap;
use std::time::Duration;

pub use clamcast_daemon::alarms::Alarm;
use clamcast_daemon::audit::Record;
use clamcast_proto::manifest::{Manifest, ManifestFile};
use clamcast_proto::{AgentName, DatabaseName, Digest, FleetName, GroupName, Position};
use jiff::Timestamp;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::config::Wave;
use crate::config::units::UnitName;
pub use crate::fleet::agents::{Counts, ThinVersion};
pub use crate::fleet::rollout::{Awaited, Tally};

use crate::fleet::agents::Row;
use crate::fleet::force::{End, Meant, Selection};
use crate::fleet::rollout::{Ending, Held, Pause, SetAside, Withheld};
use crate::operate::preflight::Running;
use crate::publish::plan::Carried;
pub use crate::publish::plan::Skipped;
use crate::publish::publisher::Refusal;
use crate::record::events::Filter;

/// A command.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Request {
    /// Capture and publish now. Progress: [`Progress`]; answer: [`Publication`].
    Publish {
        /// Return only when the connected agents have settled.
        wait: bool,
        /// The operator's reason to publish also held units.
        accept: Option<String>,
        /// The units that the reason is about; none: all.
        #[serde(default)]
        units: Vec<String>,
        /// Replace the generation on its way.
        supersede: bool,
    },
    /// Report what `publish` would do. Answer: [`Preview`].
    Preview {
        /// The operator's reason to publish also held units.
        accept: Option<String>,
        /// The units that the reason is about; none: all.
        units: Vec<String>,
    },
    /// Answer: [`Status`].
    Status,
    /// Answer: an array of [`Row`].
    Agents,
    /// Answer: an array of [`Generation`], oldest first.
    Generations,
    /// Install a generation on these agents now. Progress: [`News`](crate::fleet::force::News);
    /// answer: [`Forced`].
    ForceSync(ForceRequest),
    /// Report the rollout. Progress: [`Progress`]; answer: [`Rollout`].
    RolloutStatus {
        /// How long to wait until the rollout is complete or halted and all connected agents have
        /// followed it.
        timeout: Option<Duration>,
    },
    /// Change the rollout. Answer: [`Rollout`].
    Rollout {
        /// The change.
        change: Change,
        /// The operator's reason.
        reason: Option<String>,
    },
    /// Read the audit log. Progress: [`AuditPiece`]; no answer.
    AuditShow {
        /// Which records.
        filter: Filter,
        /// Continue with new records as they are written.
        follow: bool,
    },
}

/// A change of the rollout.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// Begin no further wave and offer nothing more.
    Pause,
    /// End a pause; publish again after a rollback.
    Resume,
    /// End the running generation, as a halt does.
    Abort,
    /// Begin all remaining waves.
    Promote,
    /// Publish the databases of a generation again.
    RollBack(Meant),
    /// Keep a group at a generation; default: the group's current target.
    Pin(GroupName, Option<Meant>),
    /// End a pin.
    Unpin(GroupName),
    /// Ignore the refusals of a host.
    SetAside(AgentName),
    /// Count the refusals of a host again.
    Restore(AgentName),
}

/// A `force-sync`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ForceRequest {
    /// Which agents.
    pub selection: Selection,
    /// Send whole files instead of deltas.
    pub full: bool,
    /// The generation; default: the newest one that was not taken back. The daemon refuses one that is
    /// neither current nor taken back.
    pub generation: Option<Meant>,
    /// The operator's reason, for the audit log.
    pub accept: Option<String>,
    /// Return when the agents are done.
    pub wait: bool,
    /// Time after which an agent that is not done counts as failed.
    pub timeout: Duration,
}

impl Request {
    /// The command, as an operator types it.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Publish { .. } => "publish",
            Self::Preview { .. } => "publish --dry-run",
            Self::Status => "status",
            Self::Agents => "agents",
            Self::Generations => "generations",
            Self::ForceSync(_) => "force-sync",
            Self::RolloutStatus { .. } => "rollout status",
            Self::Rollout { change, .. } => change.word(),
            Self::AuditShow { .. } => "audit show",
        }
    }

    /// The operator's reason.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Publish { accept: reason, .. } | Self::Rollout { reason, .. } => {
                reason.as_deref()
            }
            Self::ForceSync(request) => request.accept.as_deref(),
            Self::Preview { .. }
            | Self::Status
            | Self::Agents
            | Self::Generations
            | Self::RolloutStatus { .. }
            | Self::AuditShow { .. } => None,
        }
    }
}

impl Change {
    fn word(&self) -> &'static str {
        match self {
            Self::Pause => "rollout pause",
            Self::Resume => "rollout resume",
            Self::Abort => "rollout abort",
            Self::Promote => "rollout promote",
            Self::RollBack(_) => "rollback",
            Self::Pin(..) => "pin",
            Self::Unpin(_) => "unpin",
            Self::SetAside(_) => "rollout set-aside",
            Self::Restore(_) => "rollout restore",
        }
    }
}

// Generations.

/// A published generation.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Published {
    /// Keys `epoch` and `generation`.
    #[serde(flatten)]
    pub position: Position,
    /// The content digest.
    pub content: Digest,
    /// When the master signed it.
    pub published: Timestamp,
}

impl From<&Manifest> for Published {
    fn from(manifest: &Manifest) -> Self {
        Self {
            position: manifest.position(),
            content: manifest.content,
            published: manifest.created,
        }
    }
}

/// A generation in the store.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Generation {
    /// Its number, content and time.
    #[serde(flatten)]
    pub published: Published,
    /// Its databases, by name.
    pub files: Vec<ManifestFile>,
    /// What became of it.
    pub state: GenerationState,
}

/// What became of a generation.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GenerationState {
    /// On its way through the fleet.
    Running,
    /// The target of all agents outside any started wave.
    Current,
    /// Waits for the running generation to end.
    Waiting,
    /// Refused by clamds.
    Halted,
    /// Ended by an operator on its way.
    Aborted,
    /// Taken back by an operator after it was complete.
    RolledBack,
    /// A newer generation replaced it.
    Superseded,
}

impl GenerationState {
    /// As it stands in JSON and in tables.
    pub fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Current => "current",
            Self::Waiting => "waiting",
            Self::Halted => "halted",
            Self::Aborted => "aborted",
            Self::RolledBack => "rolled_back",
            Self::Superseded => "superseded",
        }
    }
}

/// The answer to `publish`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Publication {
    /// What came of the capture.
    pub outcome: PublicationOutcome,
    /// The generation with the mirror's content; if that is held or refused, the complete generation.
    #[serde(flatten, deserialize_with = "if_generation")]
    pub generation: Option<Published>,
    /// Why the capture is held or refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The units that are held.
    #[serde(default)]
    pub held: Vec<HeldUnit>,
    /// After `--wait`: the agents by state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agents: Option<Counts>,
    /// After `--wait`: connected agents that are not conformant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<Vec<AgentName>>,
}

/// What came of a capture.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PublicationOutcome {
    /// It is a new generation.
    New,
    /// Its generation existed, waited, and runs now (`--supersede`).
    Begun,
    /// Its generation existed.
    Unchanged,
    /// An operator may publish it with `--accept`.
    Held,
    /// It cannot be published.
    Refused,
}

/// A unit that is held.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct HeldUnit {
    /// Its name.
    pub unit: UnitName,
    /// Why.
    pub reason: String,
    /// What to do.
    pub remedy: String,
    /// Since when.
    pub since: Timestamp,
    /// What is published in its place; absent if nothing is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub carries: Option<Carried>,
}

/// The answer to `publish --dry-run`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Preview {
    /// What `publish` would come to.
    pub outcome: PublicationOutcome,
    /// Why nothing would be published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The units of the mirror and of the fleet, by name.
    pub units: Vec<PreviewUnit>,
    /// Files of the mirror that no generation carries.
    pub skipped: Vec<Skipped>,
    /// What the operator's reason would overrule.
    pub accepted: Vec<String>,
}

/// What `publish` would do with a unit.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct PreviewUnit {
    /// Its name.
    pub unit: UnitName,
    /// What would be done.
    pub state: UnitState,
    /// Its files in the generation.
    pub files: Vec<DatabaseName>,
    /// Why it would be held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What to do about that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// What a generation has of a unit.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum UnitState {
    /// It is published for the first time.
    New,
    /// It has changed.
    Changed,
    /// It is published already.
    Unchanged,
    /// It is gone from the mirror.
    Removed,
    /// The published version stays.
    Held,
}

impl UnitState {
    /// As it stands in JSON and in tables.
    pub fn word(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Changed => "changed",
            Self::Unchanged => "unchanged",
            Self::Removed => "removed",
            Self::Held => "held",
        }
    }
}

/// How far the fleet is, while a command waits.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Progress {
    /// The agents by state.
    pub agents: Counts,
    /// Agents that the command waits for; not always all of them.
    pub unsettled: Vec<AgentName>,
    /// What `rollout status` waits for, as a sentence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub standing: Option<String>,
    /// When this was so.
    pub time: Timestamp,
}

// The fleet.

/// The answer to `status`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Status {
    /// The fleet's name.
    pub fleet: FleetName,
    /// The complete generation; before the first is complete, the one on its way. Without any, the key
    /// `generation` is null.
    #[serde(
        flatten,
        serialize_with = "or_null_generation",
        deserialize_with = "if_generation"
    )]
    pub current: Option<Current>,
    /// Directories and sockets of the daemon.
    pub daemon: Running,
    /// Why the mirror's databases are not published.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refusal>,
    /// The units that are held.
    #[serde(default)]
    pub held: Vec<HeldUnit>,
    /// Files of the mirror that clamd would load and that no generation carries.
    #[serde(default)]
    pub skipped: Vec<Skipped>,
    /// The alarms about the master itself, in one line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alarm: Option<String>,
    /// All alarms.
    pub alarms: Vec<Alarm>,
    /// All waits.
    #[serde(default)]
    pub waits: Vec<Wait>,
    /// The rollout.
    pub rollout: Rollout,
    /// The agents by state.
    pub agents: Counts,
    /// Agents that are not conformant or not connected.
    pub lagging: Vec<Lagging>,
    /// Certificates that expire soon.
    pub certificates: Vec<Expiry>,
}

/// The generation of the fleet.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Current {
    /// Its number, content and time.
    #[serde(flatten)]
    pub published: Published,
    /// Its age; none without a container that names its build time.
    pub signatures: Option<Signatures>,
}

/// The age of the signatures: of the container `daily`, else of the one built last.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Signatures {
    /// The container.
    pub name: DatabaseName,
    /// Its version.
    pub version: u64,
    /// When it was built.
    pub built: Timestamp,
    /// The limit that its age exceeds: `[mirror] age_alarm`, or the `7d` that auditors allow.
    pub alarm: Option<String>,
}

/// Something that is waited for.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Wait {
    /// What waits: `mirror`, `rollout`, `generation`, `rollback`, `command`.
    pub name: String,
    /// What for.
    pub text: String,
    /// Since when.
    pub since: Timestamp,
    /// When the wait ends by itself or becomes an alarm; null if it needs an operator or a host.
    pub until: Option<Timestamp>,
}

/// An agent that is not conformant or not connected.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Lagging {
    /// Its name.
    pub name: AgentName,
    /// Whether it is connected.
    pub connected: bool,
    /// See [`Row::outcome`].
    pub outcome: String,
    /// See [`Row::since`].
    pub since: Timestamp,
    /// Why it lags.
    pub error: Option<String>,
}

/// A certificate that expires soon.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Expiry {
    /// Whose: `master`, or the agent's name.
    pub name: String,
    /// When it expires.
    pub ends: Timestamp,
}

/// The answer to `force-sync`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Forced {
    /// The generation: keys `epoch` and `generation`.
    #[serde(flatten)]
    pub position: Position,
    /// The agents that are done, in the order in which they ended.
    pub agents: Vec<End>,
}

/// A part of the answer to `audit show`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(untagged)]
pub enum AuditPiece {
    /// The next records.
    Records(Vec<Record>),
    /// No record matches so far; with the likely reason.
    Nothing(String),
}

// The rollout.

/// The answer to `rollout status` and to each [`Change`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Rollout {
    /// Its state.
    pub state: RolloutState,
    /// Waves that have begun or were skipped; 0 without a running generation.
    pub wave: usize,
    /// All waves; 0 without a running generation.
    pub waves: usize,
    /// The last generation that is complete: every wave settled, or a rollback.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub complete: Option<Position>,
    /// ClamAV versions that the complete generation is withheld from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub complete_withheld: Vec<String>,
    /// The generation on its way.
    #[serde(flatten, deserialize_with = "if_running")]
    pub running: Option<Run>,
    /// Hosts that hold up the running generation or a rollback.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocking: Option<Vec<Host>>,
    /// Hosts whose refusals do not count.
    pub set_aside: BTreeMap<AgentName, SetAside>,
    /// The last generation that was taken back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<Failed>,
    /// A rollback that is not published yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owed: Option<Owed>,
    /// A published rollback that some hosts have yet to take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub going_back: Option<GoingBack>,
    /// Why nothing is published until `rollout resume`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held: Option<Held>,
    /// ClamAV versions with too few canaries.
    pub thin: Vec<ThinVersion>,
    /// Groups that an operator keeps at a generation.
    pub pins: Vec<Pin>,
}

/// The state of the rollout.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RolloutState {
    /// Nothing was rolled out yet.
    None,
    /// A generation is on its way.
    Running,
    /// A generation is on its way and paused.
    Paused,
    /// The last generation was halted or aborted.
    Halted,
    /// The last generation is complete.
    Complete,
}

impl RolloutState {
    /// As it stands in JSON and in text.
    pub fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Halted => "halted",
            Self::Complete => "complete",
        }
    }
}

/// A generation on its way through the fleet.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Run {
    /// The generation.
    #[serde(rename = "running")]
    pub position: Position,
    /// Waves that were skipped.
    pub skipped: Vec<Wave>,
    /// The wave that began last; null before the first.
    pub name: Option<Wave>,
    /// When that wave began.
    pub since: Option<Timestamp>,
    /// Why it is paused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paused: Option<Pause>,
    /// Members of all started waves.
    pub all: Tally,
    /// Members of the last started wave.
    pub this_wave: Tally,
    /// Some of the members that the last started wave waits for.
    pub waits_for: Vec<Awaited>,
    /// Whether the next wave waits for a window of its members.
    pub waits_for_window: bool,
    /// The windows that the next wave waits for.
    pub windows: Vec<String>,
    /// The group that the next wave waits for, because none of its members is connected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waits_for_group: Option<AwaitedGroup>,
    /// The newer generation that waits for this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting: Option<Position>,
    /// Refusals that are being weighed, by ClamAV version.
    pub weighing: BTreeMap<String, Weighing>,
    /// ClamAV versions that are not offered the generation.
    pub withheld: BTreeMap<String, Withheld>,
    /// Some of the hosts that settled waves left behind.
    pub stragglers: Vec<Host>,
    /// The number of hosts that settled waves left behind.
    pub stragglers_total: usize,
}

/// A group whose members are all disconnected.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct AwaitedGroup {
    /// The wave of that group.
    pub wave: Option<Wave>,
    /// Since when the rollout waits.
    pub since: Timestamp,
}

/// Refusals by hosts of one ClamAV version, which the master weighs against proofs.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Weighing {
    /// Some of the hosts that refused.
    pub refused: Vec<AgentName>,
    /// Since when.
    pub since: Timestamp,
    /// When the time of the other hosts of that version ends.
    pub until: Timestamp,
}

/// A host that a rollout waits for or left behind.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Host {
    /// Its name.
    pub name: AgentName,
    /// See [`Row::outcome`].
    pub outcome: String,
    /// See [`Row::error`].
    pub error: Option<String>,
}

impl From<&Row> for Host {
    fn from(row: &Row) -> Self {
        Self {
            name: row.name.clone(),
            outcome: row.outcome.clone(),
            error: row.error.clone(),
        }
    }
}

/// A generation that was taken back.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Failed {
    /// Keys `epoch` and `generation`.
    #[serde(flatten)]
    pub position: Position,
    /// How it ended.
    pub how: Ending,
    /// Why.
    pub reason: String,
    /// When.
    pub since: Timestamp,
}

/// A rollback that is not published yet.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Owed {
    /// The generation whose databases are published again.
    pub to: Position,
    /// The generation that is taken back.
    pub of: Position,
}

/// A published rollback that some hosts have yet to take.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct GoingBack {
    /// The generation that is taken back.
    pub from: Position,
    /// The rollback.
    pub to: Position,
    /// Hosts that install the rollback, or are about to.
    pub on_their_way: usize,
    /// Hosts that still have what was taken back, and are disconnected or cannot install the rollback.
    pub left: usize,
    /// Some of those.
    pub named: Vec<Host>,
}

/// A group that an operator keeps at a generation.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Pin {
    /// The group.
    pub group: GroupName,
    /// Keys `epoch` and `generation`.
    #[serde(flatten)]
    pub position: Position,
    /// The operator's reason.
    pub reason: Option<String>,
    /// Since when.
    pub since: Timestamp,
}

// Flattened fields that may be missing. Without these, serde takes fields that it cannot read for
// missing ones.

fn or_null_generation<S: Serializer>(
    current: &Option<Current>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match current {
        Some(current) => current.serialize(serializer),
        None => BTreeMap::from([("generation", ())]).serialize(serializer),
    }
}

fn if_generation<'de, D: Deserializer<'de>, T: DeserializeOwned>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    if_there("generation", deserializer)
}

fn if_running<'de, D: Deserializer<'de>, T: DeserializeOwned>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    if_there("running", deserializer)
}

/// Reads flattened fields, of which `key` is the first; `None` if it is missing or null.
fn if_there<'de, D: Deserializer<'de>, T: DeserializeOwned>(
    key: &str,
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    let fields = Value::deserialize(deserializer)?;
    match fields.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(_) => T::deserialize(fields).map(Some).map_err(D::Error::custom),
    }
}
