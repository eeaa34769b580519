//! The certificates that agents ever came with, so that old receipts verify for as long as the
//! audit log is kept.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::PathBuf;

use clamcast_daemon::durable;
use clamcast_proto::dsse::PublicKey;
use clamcast_proto::identity::{Certificate, Role};
use clamcast_proto::{AgentName, Digest};

/// Keys of one agent that its receipts are tried with: those of its last certificates. A receipt
/// is older than its agent's certificate only for as long as it waits to be sent.
const KEYS_TRIED_MAX: usize = 8;

/// The directory of certificates, `FINGERPRINT.der` each.
#[derive(Debug)]
pub struct Archive {
    directory: PathBuf,
    keys: HashMap<AgentName, Vec<(Digest, PublicKey)>>,
}

impl Archive {
    /// Opens the directory, which exists.
    pub fn open(directory: PathBuf) -> io::Result<Self> {
        let mut certificates = Vec::new();
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "der") {
                match Certificate::from_der(&fs::read(&path)?) {
                    Ok(certificate) => certificates.push(certificate),
                    Err(error) => {
                        tracing::warn!(path = %path.display(), %error, "left out of the archive");
                    }
                }
            }
        }
        certificates.sort_by_key(|certificate| certificate.not_before);
        let mut archive = Self {
            directory,
            keys: HashMap::new(),
        };
        for certificate in certificates {
            if let Some(Role::Agent { name, .. }) = certificate.identity.map(|i| i.role) {
                archive.remember(&name, certificate.fingerprint, certificate.key);
            }
        }
        Ok(archive)
    }

    /// Keeps a certificate whose chain was verified. Cheap if it is there already.
    pub fn keep(&mut self, name: &AgentName, der: &[u8]) -> io::Result<()> {
        let fingerprint = Digest::of(der);
        let known = self
            .keys
            .get(name)
            .is_some_and(|keys| keys.iter().any(|k| k.0 == fingerprint));
        if known {
            return Ok(());
        }
        durable::write(
            &self.directory.join(format!("{fingerprint}.der")),
            der,
            0o600,
        )?;
        let certificate = Certificate::from_der(der).map_err(io::Error::other)?;
        self.remember(name, fingerprint, certificate.key);
        Ok(())
    }

    /// The keys that a receipt of this agent may be signed with, newest last.
    pub fn keys(&self, name: &AgentName) -> Vec<PublicKey> {
        self.keys
            .get(name)
            .into_iter()
            .flatten()
            .map(|(_, key)| key.clone())
            .collect()
    }

    fn remember(&mut self, name: &AgentName, fingerprint: Digest, key: PublicKey) {
        let keys = self.keys.entry(name.clone()).or_default();
        keys.push((fingerprint, key));
        if keys.len() > KEYS_TRIED_MAX {
            keys.remove(0);
        }
    }
}
