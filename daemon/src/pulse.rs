//! Signs of life of the loop that does the daemon's work. `service.rs` passes them on to systemd.
//!
//! A loop beats in every iteration, and at least every [`BEAT`]. A loop that waits for a write of
//! `durable.rs` or of the audit log is not stalled: a restart would not make the disk faster. A disk that
//! rejects writes returns at once. Reads count as part of the iteration.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;

/// An idle loop turns at least this often.
pub const BEAT: Duration = Duration::from_secs(2);

/// Beats of one loop, and its state in one line. Clones are of the same loop.
#[derive(Clone, Debug)]
pub struct Pulse(Arc<Loop>);

#[derive(Debug)]
struct Loop {
    made: Instant,
    /// Milliseconds from `made` to the last beat.
    last: AtomicU64,
    /// Operations on the disk that the loop waits for. They may nest.
    on_disk: AtomicUsize,
    has_begun: watch::Sender<bool>,
    status: watch::Sender<String>,
}

thread_local! {
    /// The loop that has this thread for itself.
    static HERE: RefCell<Option<Pulse>> = const { RefCell::new(None) };
}

impl Default for Pulse {
    fn default() -> Self {
        Self(Arc::new(Loop {
            made: Instant::now(),
            last: AtomicU64::new(0),
            on_disk: AtomicUsize::new(0),
            has_begun: watch::Sender::new(false),
            status: watch::Sender::new(String::new()),
        }))
    }
}

impl Pulse {
    /// Begins an iteration of the loop.
    pub fn beat(&self) {
        let millis = self.0.made.elapsed().as_millis();
        let millis = u64::try_from(millis).expect("the process is younger than 500 million years");
        self.0.last.store(millis, Ordering::Relaxed);
        self.0
            .has_begun
            .send_if_modified(|begun| !std::mem::replace(begun, true));
    }

    /// Returns after the first beat.
    pub async fn begun(&self) {
        let mut begun = self.0.has_begun.subscribe();
        let begun = begun.wait_for(|begun| *begun).await;
        begun.expect("the sender is in this pulse");
    }

    /// Sets the status line.
    pub fn say(&self, status: String) {
        self.0.status.send_if_modified(|said| {
            let is_new = *said != status;
            *said = status;
            is_new
        });
    }

    /// The status line, and every change of it.
    pub fn status(&self) -> watch::Receiver<String> {
        self.0.status.subscribe()
    }

    /// Whether the last beat is older than `limit`, and the loop does not wait for the disk.
    pub fn is_stalled(&self, limit: Duration) -> bool {
        let last = Duration::from_millis(self.0.last.load(Ordering::Relaxed));
        self.0.on_disk.load(Ordering::Relaxed) == 0 && self.0.made.elapsed() > last + limit
    }

    /// The loop owns this thread: waits of the thread for the disk are waits of the loop.
    pub fn owns_thread(&self) {
        HERE.set(Some(self.clone()));
    }
}

/// An operation on the disk, until it is dropped.
#[derive(Debug)]
#[must_use]
pub struct OnDisk(Option<Pulse>);

/// This thread begins an operation on the disk.
pub fn on_disk() -> OnDisk {
    let pulse = HERE.with_borrow(Clone::clone);
    if let Some(pulse) = &pulse {
        pulse.0.on_disk.fetch_add(1, Ordering::Relaxed);
    }
    OnDisk(pulse)
}

impl Drop for OnDisk {
    fn drop(&mut self) {
        if let Some(pulse) = &self.0 {
            // In this order, so that the time on the disk does not count as a stall.
            pulse.beat();
            pulse.0.on_disk.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_loop_without_beats_is_stalled_unless_it_waits_for_the_disk() {
        let pulse = Pulse::default();
        let limit = Duration::from_millis(20);
        pulse.beat();
        assert!(!pulse.is_stalled(limit));
        thread::sleep(2 * limit);
        assert!(pulse.is_stalled(limit));
        let (there, limits) = (pulse.clone(), limit);
        thread::spawn(move || {
            there.owns_thread();
            let outer = on_disk();
            drop(on_disk());
            thread::sleep(2 * limits);
            assert!(!there.is_stalled(limits), "it waits for the disk");
            drop(outer);
            assert!(!there.is_stalled(limits), "the disk was done just now");
            thread::sleep(2 * limits);
            assert!(there.is_stalled(limits));
        })
        .join()
        .unwrap();
        let _other_thread = on_disk();
        assert!(pulse.is_stalled(limit), "another thread excuses nothing");
    }
}
