//! Decides which missing files the master is asked for next: as many as fit into one message.
//!
//! Pure: no sockets, no disk, no clock. A master takes a new Need in place of the one before, so the next
//! batch is asked for when all files of the last one have arrived or failed.

use std::collections::{BTreeSet, VecDeque};

use clamcast_proto::DatabaseName;
use clamcast_proto::wire::NeedFile;

/// Longest list of files in one Need, in bytes: a quarter of a control frame. The master holds a whole
/// frame of each agent in memory.
const NEED_BYTES_MAX: usize = 256 << 10;

/// The files that the last plan found missing.
#[derive(Debug, Default)]
pub(super) struct Needs {
    /// Files of the batch that was asked for last, until their transfers end.
    asked: BTreeSet<DatabaseName>,
    /// Batches that were not asked for.
    later: VecDeque<Vec<NeedFile>>,
}

impl Needs {
    /// Divides a list into batches.
    pub(super) fn new(files: Vec<NeedFile>) -> Self {
        let mut later = VecDeque::<Vec<_>>::new();
        let mut bytes = 0;
        for file in files {
            let length = serde_json::to_vec(&file).expect("our own messages serialise");
            let length = length.len() + ",".len();
            match later.back_mut() {
                Some(batch) if bytes + length <= NEED_BYTES_MAX => {
                    batch.push(file);
                    bytes += length;
                }
                Some(_) | None => {
                    later.push_back(vec![file]);
                    bytes = length;
                }
            }
        }
        Self {
            asked: BTreeSet::new(),
            later,
        }
    }

    /// The next batch. It counts as asked for.
    pub(super) fn next(&mut self) -> Vec<NeedFile> {
        let files = self.later.pop_front().unwrap_or_default();
        self.asked = files.iter().map(|file| file.name.clone()).collect();
        files
    }

    /// Whether a file was asked for and its transfer has not ended.
    pub(super) fn awaits(&self, name: &DatabaseName) -> bool {
        self.asked.contains(name)
    }

    /// Whether the transfers of all files have ended.
    pub(super) fn is_empty(&self) -> bool {
        self.asked.is_empty() && self.later.is_empty()
    }

    /// The transfer of a file has ended. Returns whether the next batch is due.
    pub(super) fn ended(&mut self, name: &DatabaseName) -> bool {
        self.asked.remove(name) && self.asked.is_empty() && !self.later.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clamcast_proto::Digest;
    use clamcast_proto::manifest::FILES_MAX;
    use clamcast_proto::wire::{self, Have, OfferId, PartEncoding, PartKind, ToMaster};

    /// A need with the longest name, a base and a part to go on with.
    fn long(number: usize) -> NeedFile {
        let digest = Digest::of(&number.to_be_bytes());
        NeedFile {
            name: format!("{number:0251}.ndb").parse().unwrap(),
            have: Have::Sha256(digest),
            resume_at: u64::MAX,
            resume: Some(PartEncoding {
                kind: PartKind::Delta,
                zstd: true,
                from: Some(digest),
                to: digest,
                length: u64::MAX,
            }),
        }
    }

    #[test]
    fn the_most_files_that_a_manifest_can_have_are_asked_for_in_frames() {
        let files: Vec<_> = (0..FILES_MAX).map(long).collect();
        let mut needs = Needs::new(files.clone());
        let (mut asked, mut batches) = (Vec::new(), 0);
        loop {
            let batch = needs.next();
            batches += 1;
            let need = ToMaster::Need {
                offer: OfferId(u64::MAX),
                files: batch.clone(),
            };
            let frame = wire::frame(&need).expect("it fits a frame");
            assert!(frame.len() < NEED_BYTES_MAX + 100);
            let due: Vec<_> = batch.iter().map(|file| needs.ended(&file.name)).collect();
            let (last, before) = due.split_last().unwrap();
            assert!(
                !before.contains(&true),
                "a batch is due when the last one has ended"
            );
            asked.extend(batch);
            if !last {
                break;
            }
        }
        assert_eq!(asked, files);
        assert!(batches > 10);
    }

    #[test]
    fn a_few_files_are_one_batch_and_no_files_are_an_empty_one() {
        let mut needs = Needs::new(vec![long(1), long(2)]);
        assert_eq!(needs.next().len(), 2);
        assert!(!needs.ended(&long(1).name) && !needs.ended(&long(2).name));
        assert!(needs.next().is_empty());
        assert!(Needs::new(Vec::new()).next().is_empty());
    }

    #[test]
    fn a_file_that_was_not_asked_for_ends_no_batch() {
        let mut needs = Needs::new((0..FILES_MAX).map(long).collect());
        needs.next();
        assert!(!needs.ended(&long(FILES_MAX - 1).name));
    }
}
