//! Not too many clamds at a time, however many tests run and in however many processes.

use std::fs::{self, File, TryLockError};
use std::time::Duration;

use super::needs::target;
use super::until::until;

/// So many clamds run at a time, since each may need as much memory as its databases, twice while
/// it reloads.
pub const CLAMDS_MAX: usize = 3;

/// Longer than all tests with a clamd take one after another: it ends only a deadlock.
const WAIT_MAX: Duration = Duration::from_secs(15 * 60);

/// The right to run one clamd. Dropping it, or the end of the process, gives it back.
#[derive(Debug)]
pub(super) struct Slot(#[expect(dead_code, reason = "it is there to hold the lock")] File);

/// Waits for `N` slots and takes them together. The test that waits holds the gate, so that
/// two tests that want several slots cannot take each other's.
pub(super) fn take<const N: usize>() -> [Slot; N] {
    const { assert!(N <= CLAMDS_MAX, "there are not so many slots") };
    let _gate = until(WAIT_MAX, "turn to start a clamd", || lock("gate"));
    std::array::from_fn(|_| Slot(until(WAIT_MAX, "another test's clamd to end", free)))
}

fn free() -> Option<File> {
    (0..CLAMDS_MAX).find_map(|slot| lock(&slot.to_string()))
}

fn lock(name: &str) -> Option<File> {
    let directory = target().join("clamd-slots");
    fs::create_dir_all(&directory).expect("the target directory can be written");
    let path = directory.join(name);
    let file = File::create(&path).expect("the target directory can be written");
    match file.try_lock() {
        Ok(()) => Some(file),
        Err(TryLockError::WouldBlock) => None,
        Err(TryLockError::Error(error)) => panic!("cannot lock {}: {error}", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn who_has_all_slots_leaves_none() {
        let all = take::<CLAMDS_MAX>();
        assert!(free().is_none());
        drop(all);
        take::<1>();
    }

    #[test]
    fn who_wants_all_slots_gets_them_in_turn() {
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let _all = take::<CLAMDS_MAX>();
                    assert!(free().is_none());
                });
            }
        });
    }
}
