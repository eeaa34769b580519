//! Issues, revokes and lists the fleet's certificates, makes and rotates its signing keys.
//!
//! Everything lives in one directory, made by [`init`] and kept where the CA's key is safe. The
//! daemons never see it: they get copies of a few files. Time is an argument, so that tests can
//! issue certificates that have run out.

pub mod cli;
mod files;
mod fleet;
mod host;
mod init;
mod issue;
mod key;
mod list;
mod revoke;
mod rotate;
mod x509;

pub use files::{FileError, WriteError, Written};
pub use fleet::OpenError;
pub use host::{Host, HostError};
pub use init::{InitError, Initialised, init};
pub use issue::{HOSTS_MAX, IssueError, Issued, issue_agent, issue_master};
pub use list::{EXPIRING_DAYS, Listed, State, list};
pub use revoke::{REASON_CHARS_MAX, Revocation, RevokeError, revoke};
pub use rotate::{Change, Outcome, RotateError, Rotated, Rotation, rotate};
