//! Knows which files of the mirror are open for writing, from file events.
//!
//! Pure: events and points in time come in, names come out. The events are those of inotify, which
//! announce the end of a write access and not its beginning. A file is open from the first sign of a
//! writer to the event that ends its access.
//!
//! Limits. A program that writes through a mapping shows only when it closes the file. `truncate(2)`
//! has no end, so a file that it shortened counts as open until [`ABANDONED_AFTER`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsString;
use std::time::Instant;

use clamcast_proto::DatabaseName;

use super::listing::ENTRIES_MAX;
use super::quiet::ABANDONED_AFTER;

/// Most names that are remembered. A directory with more entries is not published.
const NAMES_MAX: usize = ENTRIES_MAX;

/// Renames of which only the first half was reported. The kernel reports both halves in a row.
const RENAMES_MAX: usize = 64;

/// What happened to one name in the mirror.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum FileEvent {
    /// The name is new: a program created a file, or linked one.
    Created(OsString),
    /// A program opened the file, perhaps only to read it.
    Opened(OsString),
    /// The content changed.
    Modified(OsString),
    /// A program that could write closed the file.
    Closed(OsString),
    /// The first half of a rename, with the number that both halves have.
    MovedFrom(OsString, Option<usize>),
    /// The second half of a rename, or a file of another directory.
    MovedTo(OsString, Option<usize>),
    /// The name is gone.
    Removed(OsString),
    /// Events were lost.
    Lost,
}

/// The files of the mirror that programs write to.
#[derive(Debug, Default)]
pub(super) struct Writers {
    /// Open files, with their last modification.
    open: HashMap<OsString, Instant>,
    /// Names that were created since the last look and not opened yet.
    created: HashSet<OsString>,
    /// Open files that have lost their old name and not yet got the new one.
    moved: BTreeMap<usize, Instant>,
}

impl Writers {
    /// Takes in one event.
    pub(super) fn handle(&mut self, event: FileEvent, now: Instant) {
        if self.open.len().max(self.created.len()) >= NAMES_MAX {
            *self = Self::default();
        }
        match event {
            FileEvent::Created(name) => {
                self.open.remove(&name);
                self.created.insert(name);
            }
            // `open(O_CREAT)` makes both events at once, and a hard link only the first.
            FileEvent::Opened(name) => {
                if self.created.remove(&name) {
                    self.open.insert(name, now);
                }
            }
            FileEvent::Modified(name) => {
                self.created.remove(&name);
                self.open.insert(name, now);
            }
            FileEvent::Closed(name) | FileEvent::Removed(name) => {
                self.created.remove(&name);
                self.open.remove(&name);
            }
            FileEvent::MovedFrom(name, rename) => {
                self.created.remove(&name);
                if let (Some(modified), Some(rename)) = (self.open.remove(&name), rename) {
                    self.moved.insert(rename, modified);
                    if self.moved.len() > RENAMES_MAX {
                        self.moved.pop_first();
                    }
                }
            }
            FileEvent::MovedTo(name, rename) => {
                self.created.remove(&name);
                match rename.and_then(|rename| self.moved.remove(&rename)) {
                    Some(modified) => _ = self.open.insert(name, modified),
                    None => _ = self.open.remove(&name),
                }
            }
            FileEvent::Lost => *self = Self::default(),
        }
    }

    /// The mirror is about to be judged: a name that was created before and not opened was linked.
    /// Also forgets the files that nothing was written to for long.
    pub(super) fn settle(&mut self, now: Instant) {
        self.created.clear();
        self.open
            .retain(|_, modified| now.saturating_duration_since(*modified) < ABANDONED_AFTER);
    }

    /// The databases that are open for writing, each with the time when it counts as abandoned.
    pub(super) fn databases(&self) -> impl Iterator<Item = (DatabaseName, Instant)> {
        self.open.iter().filter_map(|(name, modified)| {
            let name: DatabaseName = name.to_str()?.parse().ok()?;
            Some((name, *modified + ABANDONED_AFTER))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Runs lines such as `3: write a.ndb -> a.ndb`: an event at a second, and the databases that are
    /// open for writing after it. `look` is no event.
    fn check(script: &str) {
        let start = Instant::now();
        let mut writers = Writers::default();
        for line in script.lines().filter(|line| !line.trim().is_empty()) {
            let (at, rest) = line.split_once(':').unwrap();
            let (event, expected) = rest.split_once("->").unwrap();
            let now = start + Duration::from_secs(at.trim().parse().unwrap());
            let words: Vec<_> = event.split_whitespace().collect();
            let rename = words.get(2).map(|number| number.parse().unwrap());
            let name = || OsString::from(words[1]);
            match words[0] {
                "create" => writers.handle(FileEvent::Created(name()), now),
                "open" => writers.handle(FileEvent::Opened(name()), now),
                "write" => writers.handle(FileEvent::Modified(name()), now),
                "close" => writers.handle(FileEvent::Closed(name()), now),
                "from" => writers.handle(FileEvent::MovedFrom(name(), rename), now),
                "to" => writers.handle(FileEvent::MovedTo(name(), rename), now),
                "remove" => writers.handle(FileEvent::Removed(name()), now),
                "lost" => writers.handle(FileEvent::Lost, now),
                "look" => writers.settle(now),
                other => panic!("no such event: {other}"),
            }
            let mut open: Vec<_> = writers.databases().map(|it| it.0.to_string()).collect();
            open.sort();
            assert_eq!(open.join(" "), expected.trim(), "{line}");
        }
    }

    #[test]
    fn a_file_is_open_from_its_creation_or_first_change_until_it_is_closed() {
        check(
            "0: create a.ndb ->
             0: open a.ndb -> a.ndb
             1: write a.ndb -> a.ndb
             2: write b.ndb -> a.ndb b.ndb
             3: close a.ndb -> b.ndb
             4: close b.ndb ->",
        );
    }

    #[test]
    fn a_hard_link_that_is_read_later_is_not_open_for_writing() {
        check(
            "0: create a.ndb ->
             1: look ->
             2: open a.ndb ->",
        );
    }

    #[test]
    fn a_rename_moves_the_open_file_and_ends_what_was_there() {
        check(
            "0: write part -> 
             1: write a.ndb -> a.ndb
             2: from part 7 -> a.ndb
             2: to b.ndb 7 -> a.ndb b.ndb
             3: from whole 8 -> a.ndb b.ndb
             3: to a.ndb 8 -> b.ndb
             4: from b.ndb 9 ->
             5: to c.ndb ->",
        );
    }

    #[test]
    fn a_removal_and_lost_events_end_it() {
        check(
            "0: write a.ndb -> a.ndb
             0: write b.ndb -> a.ndb b.ndb
             1: remove a.ndb -> b.ndb
             2: lost ->
             3: close b.ndb ->",
        );
    }

    #[test]
    fn a_writer_that_wrote_nothing_for_a_quarter_of_an_hour_is_abandoned() {
        check(
            "0: write a.ndb -> a.ndb
            10: write a.ndb -> a.ndb
           909: look -> a.ndb
           910: look ->",
        );
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut writers = Writers::default();
        let now = Instant::now();
        for number in 0..2 * NAMES_MAX {
            writers.handle(FileEvent::Modified(format!("{number}.ndb").into()), now);
            let half = FileEvent::MovedFrom(format!("{number}.ndb").into(), Some(number));
            writers.handle(half, now);
            writers.handle(FileEvent::Created(format!("{number}.ldb").into()), now);
            writers.handle(FileEvent::Modified(format!("{number}.hdb").into()), now);
        }
        assert!(writers.open.len() <= NAMES_MAX && writers.created.len() <= NAMES_MAX);
        assert!(writers.moved.len() <= RENAMES_MAX);
    }
}
