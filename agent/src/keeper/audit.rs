//! The host's own log of what its agent did, of the same kind as the master's: an edited or
//! removed line is found by `audit.pub` alone.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clamcast_daemon::audit::{AuditError, Draft, Log};
use clamcast_daemon::{durable, input};
use clamcast_proto::dsse::PublicKey;
use clamcast_proto::{AgentName, FleetName};
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _};
use jiff::Timestamp;

use crate::core::Note;
use crate::host::state::{self, StateError};

/// The log. A host keeps its signatures current even where the log cannot be written; that is
/// an error in its other log.
#[derive(Debug)]
pub struct AuditLog {
    log: Option<Log>,
    agent: AgentName,
}

/// There is no key to sign the log with.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A file cannot be read or written.
    #[error(transparent)]
    State(#[from] StateError),
    /// The key is damaged.
    #[error("{path} is not an Ed25519 key in PKCS#8 PEM; move it away, and the log with it")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ed25519_dalek::pkcs8::Error,
    },
}

impl AuditLog {
    /// Opens the log in the state directory. A log that is not what was signed is moved aside for
    /// whoever wants to know why, and a new one begun. `random` makes the key at the first start.
    pub fn open(
        state: &Path,
        fleet: &FleetName,
        agent: &AgentName,
        random: [u8; 32],
        now: Timestamp,
    ) -> Result<Self, KeyError> {
        let key = key(state, random)?;
        let origin = format!("clamcast/{fleet}/agent/{agent}");
        let directory = state.join("audit");
        let mut log = Log::open(&directory, key.clone(), origin.clone());
        if let Err(error @ AuditError::Bad { .. }) = &log {
            let aside = state.join(format!("audit-damaged-{}", now.as_second()));
            let error = error as &dyn std::error::Error;
            tracing::error!(error, aside = %aside.display(), "the local audit log is not what was signed, a new one begins");
            log = fs::rename(&directory, &aside)
                .map_err(|source| AuditError::Write {
                    path: aside,
                    source,
                })
                .and_then(|()| Log::open(&directory, key, origin));
        }
        let log = log
            .inspect_err(|error| {
                let error = error as &dyn std::error::Error;
                tracing::error!(error, "no local audit log is kept");
            })
            .ok();
        if let Some(repair) = log.as_ref().and_then(Log::repair) {
            tracing::warn!(
                bytes = repair.bytes,
                "removed from the local audit log what a crash had left"
            );
        }
        let agent = agent.clone();
        Ok(Self { log, agent })
    }

    /// Writes a line.
    pub fn note(&mut self, note: Note) {
        let Some(log) = &mut self.log else { return };
        let Note {
            event,
            position,
            outcome,
            detail,
        } = note;
        let draft = Draft {
            event,
            actor: format!("agent:{}", self.agent),
            subject: self.agent.to_string(),
            position,
            outcome: outcome.map(str::to_owned),
            detail,
        };
        if let Err(error) = log.append(draft, Timestamp::now()) {
            let error = &error as &dyn std::error::Error;
            tracing::error!(error, %event, "not in the local audit log");
        }
    }
}

/// Longest `audit.key` that is read, in bytes: ours has some hundred. A longer one is damaged.
const KEY_BYTES_MAX: u64 = 4 << 10;

/// The key that signs the log, and beside it, for whoever verifies, its public half.
fn key(state: &Path, random: [u8; 32]) -> Result<SigningKey, KeyError> {
    let path = state.join("audit.key");
    let write = |path: &Path, source| StateError::Write {
        path: path.to_owned(),
        source,
    };
    let pem = match input::whole(&path, KEY_BYTES_MAX) {
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => Ok(Vec::new()), // damaged
        pem => pem,
    };
    let key = match pem {
        Ok(pem) => {
            SigningKey::from_pkcs8_pem(&String::from_utf8_lossy(&pem)).map_err(|source| {
                KeyError::Damaged {
                    path: path.clone(),
                    source,
                }
            })?
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = SigningKey::from_bytes(&random);
            let pem = key
                .to_pkcs8_pem(LineEnding::LF)
                .expect("an Ed25519 key has a PEM form");
            durable::write(&path, pem.as_bytes(), 0o600).map_err(|source| write(&path, source))?;
            key
        }
        Err(source) => return Err(StateError::Read { path, source }.into()),
    };
    let public = state.join("audit.pub");
    if !public.exists() {
        state::save(&public, &PublicKey::of(&key))?;
    }
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clamcast_daemon::audit;
    use clamcast_proto::AuditEvent;
    use serde_json::Value;

    fn open(state: &Path, random: u8) -> AuditLog {
        let (fleet, agent) = ("bank".parse().unwrap(), "web1".parse().unwrap());
        AuditLog::open(state, &fleet, &agent, [random; 32], Timestamp::UNIX_EPOCH).unwrap()
    }

    fn note(event: AuditEvent) -> Note {
        Note {
            event,
            position: None,
            outcome: None,
            detail: Value::Null,
        }
    }

    fn verify(state: &Path) -> u64 {
        let key: PublicKey = state::load(&state.join("audit.pub"), "").unwrap().unwrap();
        let verification = audit::verify(&state.join("audit"), &[key], None).unwrap();
        assert!(verification.ok());
        verification.records
    }

    #[test]
    fn the_log_goes_on_after_a_restart_and_verifies_by_the_public_key_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        for start in 1..=3 {
            // Randomness counts only at the first start.
            open(dir.path(), start).note(note(AuditEvent::Started));
            assert_eq!(verify(dir.path()), u64::from(start));
        }
    }

    #[test]
    fn an_edited_log_is_kept_aside_and_a_new_one_begun() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path(), 1).note(note(AuditEvent::Refused));
        let path = dir.path().join("audit/log.jsonl");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("refused", "adopted")).unwrap();
        open(dir.path(), 1).note(note(AuditEvent::Started));
        assert_eq!(verify(dir.path()), 1);
        assert!(dir.path().join("audit-damaged-0/log.jsonl").exists());
    }
}
