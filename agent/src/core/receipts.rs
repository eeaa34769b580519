//! The receipts that the master has not acknowledged, with their numbers.
//!
//! A receipt is kept until it is acknowledged, so it outlives a lost connection, a crash and a master
//! that was away. Numbers go upwards without a gap.

use std::collections::BTreeMap;

use clamcast_proto::dsse::{Envelope, sign};
use clamcast_proto::receipt::Receipt;
use clamcast_proto::wire::RECEIPTS_PENDING_MAX;
use ed25519_dalek::SigningKey;

use super::Record;

/// The receipts of one host.
#[derive(Debug, Default)]
pub struct Receipts {
    pending: BTreeMap<u64, Envelope>,
    highest: u64,
    last: Option<Receipt>,
}

impl Receipts {
    /// As they were kept: those that wait, the highest number in use, and what the newest one said.
    pub fn new(pending: BTreeMap<u64, Envelope>, highest: u64, last: Option<Receipt>) -> Self {
        Self {
            pending,
            highest,
            last,
        }
    }

    /// What the newest receipt said.
    pub fn last(&self) -> Option<&Receipt> {
        self.last.as_ref()
    }

    /// What waits, the oldest first.
    pub fn pending(&self) -> impl ExactSizeIterator<Item = &Envelope> {
        self.pending.values()
    }

    /// Numbers and signs a receipt. The records that it returns are to be saved before it is sent.
    pub fn add(
        &mut self,
        key: &SigningKey,
        receipt: impl FnOnce(u64) -> Receipt,
    ) -> (Vec<Record>, Envelope) {
        let mut records = Vec::new();
        // A host that is cut off for months writes one for every install and fault; what came of
        // the last generations is what counts.
        while self.pending.len() >= RECEIPTS_PENDING_MAX {
            let (seq, _) = self.pending.pop_first().expect("it is full");
            tracing::warn!(
                seq,
                "receipt dropped: {RECEIPTS_PENDING_MAX} wait for the master already"
            );
            records.push(Record::ReceiptDone(seq, None));
        }
        self.highest += 1;
        let seq = self.highest;
        let receipt = sign(receipt(seq), key);
        let envelope = receipt.envelope().clone();
        self.last = Some((*receipt).clone());
        self.pending.insert(seq, envelope.clone());
        records.push(Record::Receipt(seq, envelope.clone()));
        (records, envelope)
    }

    /// The master has it in its audit log: what is to be saved, after which [`Receipts::forget`] follows.
    /// `None`: it was forgotten before, as it was sent on two connections.
    pub fn acknowledge(&self, seq: u64) -> Option<Record> {
        self.pending.get(&seq)?;
        let last = self.last.clone().filter(|last| last.seq == seq);
        Some(Record::ReceiptDone(seq, last.map(Box::new)))
    }

    /// It is not on disk any more.
    pub fn forget(&mut self, seq: u64) {
        self.pending.remove(&seq);
    }
}
