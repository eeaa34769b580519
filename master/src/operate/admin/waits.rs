//! The commands that are under way, for `status`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clamcast_proto::audit::Operator;
use jiff::{SignedDuration, Timestamp};

use crate::operate::api::{Request, Wait};

/// The commands that are under way. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Waits(Arc<Mutex<BTreeMap<u64, Wait>>>);

/// A command under way, for as long as this lives.
#[derive(Debug)]
pub(super) struct Waiting {
    number: u64,
    waits: Waits,
}

impl Waits {
    /// A command begins. Queries, which are answered at once, are left out.
    pub(super) fn begin(&self, request: &Request, operator: &Operator) -> Option<Waiting> {
        let timeout = match request {
            Request::Status
            | Request::ForceSync(_) // which registers its order
            | Request::Agents
            | Request::Generations
            | Request::AuditShow { .. }
            | Request::RolloutStatus { timeout: None } => return None,
            Request::Publish { .. } | Request::Preview { .. } | Request::Rollout { .. } => None,
            Request::RolloutStatus { timeout } => *timeout,
        };
        Some(self.insert(request.word(), operator, timeout))
    }

    /// A command of an operator waits, at most for `timeout`.
    pub(super) fn insert(
        &self,
        command: &str,
        operator: &Operator,
        timeout: Option<Duration>,
    ) -> Waiting {
        let since = Timestamp::now();
        let until = timeout.and_then(|timeout| {
            let timeout = SignedDuration::try_from(timeout).ok()?;
            since.checked_add(timeout).ok()
        });
        let wait = Wait {
            name: "command".to_owned(),
            text: format!("`{command}` of {operator}"),
            since,
            until,
        };
        let mut waits = self.lock();
        let number = waits.last_key_value().map_or(0, |(number, _)| number + 1);
        waits.insert(number, wait);
        drop(waits);
        let waits = self.clone();
        Waiting { number, waits }
    }

    /// The commands, in the order of their start.
    pub(super) fn all(&self) -> Vec<Wait> {
        self.lock().values().cloned().collect()
    }

    /// Each change is one insertion or removal: a panic leaves the map whole.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Wait>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.waits.lock().remove(&self.number);
    }
}
