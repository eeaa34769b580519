//! What is going to happen, in order of time.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::time::Duration;

/// Events by their time since the beginning; of two at one moment the one that was set first comes
/// first.
pub(super) struct Agenda<E> {
    entries: BinaryHeap<Reverse<Entry<E>>>,
    set: u64,
}

struct Entry<E> {
    at: Duration,
    number: u64,
    /// Apart, for an entry is moved often before it is its turn.
    event: Box<E>,
}

impl<E> Agenda<E> {
    pub(super) fn new() -> Self {
        Self {
            entries: BinaryHeap::new(),
            set: 0,
        }
    }

    pub(super) fn set(&mut self, at: Duration, event: E) {
        self.set += 1;
        let (number, event) = (self.set, Box::new(event));
        self.entries.push(Reverse(Entry { at, number, event }));
    }

    pub(super) fn next(&mut self) -> Option<(Duration, E)> {
        let Reverse(entry) = self.entries.pop()?;
        Some((entry.at, *entry.event))
    }
}

impl<E> Entry<E> {
    fn order(&self) -> (Duration, u64) {
        (self.at, self.number)
    }
}

impl<E> Ord for Entry<E> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.order().cmp(&other.order())
    }
}

impl<E> PartialOrd for Entry<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> PartialEq for Entry<E> {
    fn eq(&self, other: &Self) -> bool {
        self.order() == other.order()
    }
}

impl<E> Eq for Entry<E> {}
