//! The list of revoked certificates, signed by the fleet's CA.
//!
//! A DSSE statement and not an X.509 CRL: it is read by the master alone, says who and why in
//! words, and takes effect on connections that are already open.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::dsse::Statement;
use crate::identity::{Certificate, Serial};
use crate::{AgentName, FleetName};

/// The statement in `revoked.json`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct RevocationList {
    /// The fleet.
    pub fleet: FleetName,
    /// Rises with every revocation.
    pub version: u64,
    /// When it was signed.
    pub issued: Timestamp,
    /// Certificates that count no more.
    pub revoked: Vec<Revoked>,
}

/// One revoked certificate.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Revoked {
    /// Whose it was.
    pub name: AgentName,
    /// Its serial number.
    pub serial: Serial,
    /// When it was revoked.
    pub time: Timestamp,
    /// Why, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Statement for RevocationList {
    const TYPE: &'static str = "application/vnd.clamcast.revoked+json";
    const BYTES_MAX: usize = 16 << 20; // 100,000 revocations with a reason each
}

impl RevocationList {
    /// The entry of a certificate, if it is revoked.
    pub fn entry(&self, certificate: &Certificate) -> Option<&Revoked> {
        self.revoked
            .iter()
            .find(|revoked| revoked.serial == certificate.serial)
    }
}
