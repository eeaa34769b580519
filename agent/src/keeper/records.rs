//! What survives a restart, in the state directory.

use std::path::PathBuf;

use clamcast_daemon::durable;
use clamcast_proto::trust::Trust;
use clamcast_proto::wire::Features;
use jiff::Timestamp;
use serde::de::DeserializeOwned;

use super::{receipts, trust};
use crate::chain;
use crate::core::left_alone::AnyLeftAlone;
use crate::core::{Kept, KeptMark, Now, Record};
use crate::host::state::{self, State, StateError};

const FRESH: &str = "fresh.json";
const ACCEPTED: &str = "accepted.json";
const FIRST_START: &str = "first-start.json";
const CHECKPOINT: &str = "checkpoint";
const LEFT_ALONE: &str = "left-alone.json";

/// The records of one agent.
#[derive(Debug)]
pub struct Records {
    state: State,
}

impl Records {
    /// Keeps records in this state directory.
    pub fn new(state: State) -> Self {
        Self { state }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.state.path().join(name)
    }

    /// What the last run left. `not_before`: the start of the agent's certificate.
    ///
    /// # Errors
    ///
    /// If the receipts cannot be read.
    pub fn load(
        &self,
        (trust, mark): (Trust, Option<KeptMark>),
        not_before: Timestamp,
        now: Now,
    ) -> Result<Kept, StateError> {
        Ok(Kept {
            trust,
            accepted: mark.map(|mark| mark.accepted),
            receipts: receipts::open(self.state.path())?,
            fresh: self.load_or_warn(FRESH, "the master says it again"),
            accepts: self
                .load_or_warn::<Features>(ACCEPTED, "receipts list every file until then")
                .unwrap_or_default(),
            first_start: self.first_start(now.clock, not_before),
            left_alone: self
                .load_or_warn::<AnyLeftAlone>(LEFT_ALONE, "what was left alone is repaired")
                .map_or_else(Default::default, |record| record.kept(now)),
        })
    }

    /// A record that the agent does without if it is damaged.
    fn load_or_warn<T: DeserializeOwned>(&self, name: &str, without: &'static str) -> Option<T> {
        state::load(&self.path(name), without).unwrap_or_else(|error| {
            tracing::warn!(
                error = chain(&error),
                "going on without a record: {without}"
            );
            None
        })
    }

    /// When this host's agent started first, by its clock, kept at the first start. A time of the
    /// future, of a clock that was wrong, counts as now. A time before the agent's certificate counts as
    /// the start of the certificate: the clock was wrong, or the file is that of a cloned image.
    fn first_start(&self, now: Timestamp, not_before: Timestamp) -> Timestamp {
        let kept = self.load_or_warn(FIRST_START, "staleness counts from now");
        if let Some(first) = kept.filter(|first| *first <= now) {
            return not_before.max(first);
        }
        if let Err(error) = state::save(&self.path(FIRST_START), &now) {
            tracing::warn!(
                error = chain(&error),
                "the time of the first start is not kept"
            );
        }
        now.max(not_before)
    }

    /// Keeps a record; it is on disk when this returns.
    ///
    /// # Errors
    ///
    /// If it cannot be written. What was kept before stays.
    pub fn save(&self, record: &Record) -> Result<(), StateError> {
        let state = self.state.path();
        match record {
            Record::Keys(keys) => trust::save_keys(state, keys),
            Record::Mark(mark) => trust::save_mark(state, mark),
            Record::Fresh(fresh) => state::save(&self.path(FRESH), fresh),
            Record::Accepts(features) => state::save(&self.path(ACCEPTED), features),
            Record::Checkpoint(checkpoint) => {
                let path = self.path(CHECKPOINT);
                durable::write(&path, checkpoint.as_bytes(), 0o600)
                    .map_err(|source| StateError::Write { path, source })
            }
            Record::LeftAlone(record) => state::save(&self.path(LEFT_ALONE), record),
            Record::Receipt(seq, receipt) => receipts::save(state, *seq, receipt),
            Record::ReceiptDone(seq, last) => receipts::done(state, *seq, last.as_deref()),
        }
    }
}
