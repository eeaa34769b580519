//! What the recorder writes.
//!
//! Pure: no sockets, no disk, no clock.

use std::fmt;

use clamcast_proto::audit::Draft;
use clamcast_proto::{AgentName, Digest};

/// What is written as one: the certificates first, then the line of the audit log, then the records
/// of agents, the state of the rollout, and what was withdrawn.
#[derive(Clone, Debug, Default)]
pub struct Entry {
    /// A line for the audit log.
    pub draft: Option<Draft>,
    /// Files, each with its new content; `None` removes it.
    pub files: Vec<(FileName, Option<Vec<u8>>)>,
}

/// A file of the state directory that the recorder writes.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum FileName {
    /// A certificate in DER, by its fingerprint.
    Certificate(Digest),
    /// What is known of an agent.
    Agent(AgentName),
    /// Where the rollout is.
    Rollout,
    /// The generations that were withdrawn, a second time.
    Withdrawn,
}

/// The file that says where the rollout is, in the state directory.
pub const ROLLOUT: &str = "rollout.json";

/// The file that says what was withdrawn, in the state directory.
pub const WITHDRAWN: &str = "rejected.json";

impl Entry {
    /// A line of the audit log alone.
    pub fn line(draft: Draft) -> Self {
        Self {
            draft: Some(draft),
            files: Vec::new(),
        }
    }

    /// One file alone; `None` removes it.
    pub fn file(name: FileName, content: Option<Vec<u8>>) -> Self {
        Self {
            draft: None,
            files: vec![(name, content)],
        }
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Certificate(fingerprint) => write!(f, "{fingerprint}.der"),
            Self::Agent(name) => write!(f, "{name}.json"),
            Self::Withdrawn => f.write_str(WITHDRAWN),
            Self::Rollout => f.write_str(ROLLOUT),
        }
    }
}
