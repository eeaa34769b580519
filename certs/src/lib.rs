//! Issues, revokes and lists the fleet's certificates and signing keys.
//!
//! Everything lives in one directory, made by [`init`] and kept where the CA's key is safe. The
//! daemons never see it: they get copies of a few files. Time is an argument, so that tests can
//! issue certificates that have run out.

mod fleet;
mod host;
mod init;
mod issue;
mod key;
mod list;
mod revoke;
mod x509;

pub use fleet::{OpenError, WriteError};
pub use host::{Host, HostError};
pub use init::{InitError, Initialised, init};
pub use issue::{HOSTS_MAX, IssueError, Issued, issue_agent, issue_master};
pub use list::{EXPIRING_DAYS, Listed, State, list};
pub use revoke::{REASON_CHARS_MAX, Revocation, RevokeError, revoke};

use std::path::PathBuf;

use clamcast_proto::Digest;
use clamcast_proto::dsse::PublicKey;
use clamcast_proto::identity::Certificate;
use jiff::Timestamp;

/// A file that was written, as the commands report it.
#[derive(Clone, Debug)]
pub struct Written {
    /// Where it is.
    pub path: PathBuf,
    /// What it is, in a few words.
    pub what: &'static str,
    /// SHA-256 of what it holds: of a certificate's DER encoding, or of a key's 32 public bytes
    /// (its id in key sets, receipts and logs). A key set goes by its root key. `None` for text.
    pub fingerprint: Option<Digest>,
    /// When a certificate runs out.
    pub not_after: Option<Timestamp>,
}

impl Written {
    fn new(path: PathBuf, what: &'static str) -> Self {
        Self {
            path,
            what,
            fingerprint: None,
            not_after: None,
        }
    }

    fn with_key(mut self, key: &PublicKey) -> Self {
        self.fingerprint = Some(Digest::of(key.as_bytes()));
        self
    }

    fn with_certificate(mut self, certificate: &Certificate) -> Self {
        self.fingerprint = Some(certificate.fingerprint);
        self.not_after = Some(certificate.not_after);
        self
    }
}
