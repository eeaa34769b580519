//! `clamcast-certs revoke`: certificates that count no more.

use std::path::{Path, PathBuf};

use clamcast_daemon::exit;
use clamcast_proto::dsse::{Statement as _, sign};
use clamcast_proto::identity::Role;
use clamcast_proto::revocation::{RevocationList, Revoked};
use clamcast_proto::{AgentName, FleetName};
use jiff::Timestamp;

use crate::files::{self, WriteError, Written};
use crate::fleet::{self, Fleet, OpenError};

/// Longest reason in characters. The list goes to the master as a whole, with all reasons.
pub const REASON_CHARS_MAX: usize = 200;

/// What [`revoke`] did.
#[derive(Debug)]
pub struct Revocation {
    /// The list, signed by the CA.
    pub path: PathBuf,
    /// Its version; 0 if nothing was ever revoked.
    pub version: u64,
    /// What was revoked now. Empty: there was nothing left to revoke, and nothing was written.
    pub revoked: Vec<Revoked>,
    /// What had been revoked before.
    pub before: Vec<Revoked>,
    /// Whether the record of what was issued to the agent is whole, as far as can be seen. If not,
    /// there may be certificates that are not revoked.
    pub recorded: bool,
}

/// Why nothing was revoked.
#[derive(Debug, thiserror::Error)]
pub enum RevokeError {
    /// The fleet's directory.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// No such agent.
    #[error("fleet `{fleet}` never had an agent `{name}`{}", hint(name, nearest))]
    Unknown {
        /// Who was asked for.
        name: AgentName,
        /// The agent that is called most like it.
        nearest: Option<AgentName>,
        /// The fleet.
        fleet: FleetName,
    },
    /// A reason that would spoil tables and logs.
    #[error("the reason is longer than {REASON_CHARS_MAX} characters or has control characters")]
    Reason,
    /// The list is as long as it may be.
    #[error(
        "the revocation list would be longer than {} bytes; time for a new CA",
        RevocationList::BYTES_MAX
    )]
    Full,
    /// The list could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

fn hint(name: &AgentName, nearest: &Option<AgentName>) -> String {
    match nearest {
        Some(nearest) => format!("; did you mean `{nearest}`?"),
        None if name.as_str() == "master" => {
            "; the master itself cannot be revoked, for agents do \
             not read the list: if its key was stolen, the fleet needs a new CA"
                .to_owned()
        }
        None => "; `clamcast-certs list` shows them all".to_owned(),
    }
}

impl RevokeError {
    /// The exit code of a command that ends with this.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Open(error) => error.exit_code(),
            Self::Unknown { .. } | Self::Reason => exit::USAGE,
            Self::Full | Self::Write(_) => exit::FAILED,
        }
    }
}

/// Revokes every certificate of `name` that has not run out. Again is harmless.
pub fn revoke(
    dir: &Path,
    name: &AgentName,
    reason: Option<&str>,
    now: Timestamp,
) -> Result<Revocation, RevokeError> {
    let (fleet, _guard) = Fleet::open_to_write(dir)?;
    if reason.is_some_and(|reason| {
        reason.chars().count() > REASON_CHARS_MAX || reason.chars().any(char::is_control)
    }) {
        return Err(RevokeError::Reason);
    }
    let holder = Role::Agent {
        name: name.clone(),
        groups: Vec::new(),
    };
    let issued = fleet.issued(&holder)?;
    let recorded = fleet
        .unrecorded(&holder, &fleet.recorded(&holder)?)
        .is_none();
    if issued.is_empty() {
        fleet.check_record()?;
        return Err(RevokeError::Unknown {
            name: name.clone(),
            nearest: nearest(name, fleet.agents()?),
            fleet: fleet.charter.fleet,
        });
    }

    let path = fleet.dir.join(fleet::REVOKED);
    let mut list = match fleet.revoked()? {
        Some(list) => (*list).clone(),
        None => RevocationList {
            fleet: fleet.charter.fleet.clone(),
            version: 0,
            issued: now,
            revoked: Vec::new(),
        },
    };
    let before = issued
        .iter()
        .filter_map(|certificate| list.entry(certificate).cloned());
    let before: Vec<Revoked> = before.collect();
    let revoked: Vec<Revoked> = issued
        .iter()
        .filter(|certificate| certificate.not_after > now && list.entry(certificate).is_none())
        .map(|certificate| Revoked {
            name: name.clone(),
            serial: certificate.serial.clone(),
            time: now,
            reason: reason
                .filter(|reason| !reason.is_empty())
                .map(str::to_owned),
        })
        .collect();
    if !revoked.is_empty() {
        list.version += 1;
        list.issued = now;
        list.revoked.extend_from_slice(&revoked);
        let signed = sign(list.clone(), fleet.authority()?.key());
        if signed.envelope().payload.len() > RevocationList::BYTES_MAX {
            return Err(RevokeError::Full);
        }
        let text =
            serde_json::to_string_pretty(signed.envelope()).expect("an envelope serialises") + "\n";
        let file = Written::new(path.clone(), "revocation list");
        files::write(file, &text, files::PUBLIC)?;
    }
    Ok(Revocation {
        path,
        version: list.version,
        revoked,
        before,
        recorded,
    })
}

/// The name that a typing mistake would turn into `name`, if one is near enough.
fn nearest(name: &AgentName, known: Vec<AgentName>) -> Option<AgentName> {
    let name = name.as_str().to_lowercase();
    let likeness = |known: &AgentName| strsim::jaro_winkler(&name, &known.as_str().to_lowercase());
    known
        .into_iter()
        .map(|known| (likeness(&known), known))
        .filter(|(likeness, _)| *likeness >= 0.8) // host names share beginnings: web1, web2
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, known)| known)
}
