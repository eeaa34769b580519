//! `clamcast-certs list`: what was issued and what of it counts.

use std::fmt;
use std::path::Path;

use clamcast_proto::dsse::Verified;
use clamcast_proto::identity::{Certificate, Role, Serial};
use clamcast_proto::revocation::{RevocationList, Revoked};
use clamcast_proto::{Digest, GroupName};
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::fleet::{Fleet, OpenError};

/// A certificate with less than this many days left is `expiring`.
pub const EXPIRING_DAYS: i64 = 30;

/// One issued certificate, as `list --json` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct Listed {
    /// The agent; `master` for the master.
    pub name: String,
    /// `master` or `agent`.
    pub role: &'static str,
    /// The groups in the certificate.
    pub groups: Vec<GroupName>,
    /// Whether it counts.
    pub state: State,
    /// Whether the holder was issued a newer one. The older one counts all the same.
    pub replaced: bool,
    /// Whether the record of what was issued has it. If not, a part of that record is gone, and
    /// others may be missing here.
    pub recorded: bool,
    /// Its serial number.
    pub serial: Serial,
    /// SHA-256 of its DER encoding.
    pub fingerprint: Digest,
    /// From when it counts.
    pub not_before: Timestamp,
    /// Until when it counts.
    pub not_after: Timestamp,
    /// When and why it was revoked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revoked: Option<Revoked>,
}

/// Whether a certificate counts.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It does.
    Valid,
    /// It does, for less than [`EXPIRING_DAYS`].
    Expiring,
    /// It has expired.
    Expired,
    /// It was revoked; it may have run out since.
    Revoked,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Valid => "valid",
            Self::Expiring => "expiring",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
        })
    }
}

/// Everything that was issued: the master's first, then by agent, the oldest first. Where the record
/// of it is gone, what the bundles hold.
pub fn list(dir: &Path, now: Timestamp) -> Result<Vec<Listed>, OpenError> {
    let fleet = Fleet::open(dir)?;
    let revoked = fleet.revoked()?;
    let agents = fleet.agents()?.into_iter().map(|name| Role::Agent {
        name,
        groups: Vec::new(),
    });
    let mut listed = Vec::new();
    for holder in std::iter::once(Role::Master).chain(agents) {
        let issued = fleet.issued(&holder)?;
        let unrecorded = fleet.unrecorded(&holder, &fleet.recorded(&holder)?);
        let unrecorded = unrecorded.map(|certificate| certificate.serial);
        let newest = issued
            .iter()
            .map(|certificate| certificate.not_before)
            .max();
        for certificate in issued {
            let replaced = Some(certificate.not_before) < newest;
            let recorded = Some(&certificate.serial) != unrecorded.as_ref();
            let mut one = describe(certificate, revoked.as_ref(), now);
            (one.replaced, one.recorded) = (replaced, recorded);
            listed.push(one);
        }
    }
    if listed.is_empty() {
        fleet.check_record()?;
    }
    Ok(listed)
}

fn describe(
    certificate: Certificate,
    revoked: Option<&Verified<RevocationList>>,
    now: Timestamp,
) -> Listed {
    let revoked = revoked.and_then(|list| list.entry(&certificate)).cloned();
    let left = certificate.not_after.duration_since(now);
    let state = if revoked.is_some() {
        State::Revoked
    } else if left <= SignedDuration::ZERO {
        State::Expired
    } else if left < SignedDuration::from_hours(24 * EXPIRING_DAYS) {
        State::Expiring
    } else {
        State::Valid
    };
    let identity = certificate
        .identity
        .expect("the index checks who it is for");
    let (name, role, groups) = match identity.role {
        Role::Master => ("master".to_owned(), "master", Vec::new()),
        Role::Agent { name, groups } => (name.into(), "agent", groups),
    };
    Listed {
        name,
        role,
        groups,
        state,
        replaced: false,
        recorded: true,
        serial: certificate.serial,
        fingerprint: certificate.fingerprint,
        not_before: certificate.not_before,
        not_after: certificate.not_after,
        revoked,
    }
}
