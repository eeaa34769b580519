//! The certificates that agents ever came with, so that old receipts verify for as long as the
//! audit log is kept.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Mutex;

use clamcast_daemon::input;
use clamcast_proto::dsse::PublicKey;
use clamcast_proto::identity::{Certificate, Role};
use clamcast_proto::{AgentName, Digest};

/// Keys of one agent that its receipts are tried with: those of its last certificates. A receipt
/// is older than its agent's certificate only for as long as it waits to be sent.
const KEYS_TRIED_MAX: usize = 8;

/// Certificates that are kept: those of a full fleet, renewed fifty times.
const CERTIFICATES_MAX: usize = 1 << 20;

/// Longest certificate in bytes of DER: ours have some hundred.
const CERTIFICATE_BYTES_MAX: u64 = 64 << 10;

/// What is known of the directory of certificates, `FINGERPRINT.der` each.
#[derive(Debug, Default)]
pub struct Archive(Mutex<HashMap<AgentName, Vec<(Digest, PublicKey)>>>);

impl Archive {
    /// Reads the directory, which exists.
    pub fn load(directory: &Path) -> io::Result<Self> {
        let mut certificates = Vec::new();
        for name in input::names(directory, CERTIFICATES_MAX)? {
            let path = directory.join(name);
            if path.extension().is_none_or(|extension| extension != "der") {
                continue;
            }
            let der = input::whole(&path, CERTIFICATE_BYTES_MAX);
            let read = der.and_then(|der| Certificate::from_der(&der).map_err(io::Error::other));
            match read {
                Ok(certificate) => certificates.push(certificate),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "left out of the archive");
                }
            }
        }
        certificates.sort_by_key(|certificate| certificate.not_before);
        let archive = Self::default();
        for certificate in &certificates {
            let identity = certificate.identity.as_ref();
            if let Some(Role::Agent { name, .. }) = identity.map(|identity| &identity.role) {
                archive.learn(name, certificate);
            }
        }
        Ok(archive)
    }

    /// Takes a certificate whose chain was verified. Returns whether it is new, and so to be
    /// written into the directory before any receipt that its key signs.
    pub fn learn(&self, name: &AgentName, certificate: &Certificate) -> bool {
        let mut keys = self.0.lock().expect("nothing panics with it");
        let keys = keys.entry(name.clone()).or_default();
        let fingerprint = certificate.fingerprint;
        if keys.iter().any(|(known, _)| *known == fingerprint) {
            return false;
        }
        keys.push((fingerprint, certificate.key.clone()));
        if keys.len() > KEYS_TRIED_MAX {
            keys.remove(0);
        }
        true
    }

    /// The keys that a receipt of this agent may be signed with, newest last.
    pub fn keys(&self, name: &AgentName) -> Vec<PublicKey> {
        let keys = self.0.lock().expect("nothing panics with it");
        let keys = keys.get(name).into_iter().flatten();
        keys.map(|(_, key)| key.clone()).collect()
    }
}
