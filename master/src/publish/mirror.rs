//! The mirror directory: what stands in it, and when that is worth a capture.
//!
//! File events trigger looks, and show which files are open for writing. The comparison of two looks shows
//! what has changed. A lost event costs time, and an event without meaning costs a look.

pub mod activity;
pub mod listing;
pub mod quiet;
mod watch;
mod writers;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::config::Mirror;
use activity::Activity;
use listing::Listing;
use quiet::Next;
use watch::Watch;

/// Time between looks where there are no events to rely on: the mirror is missing, the kernel has
/// no watch left, or a symlink leads to the mirror. A link that is swapped makes an event only if
/// it is the last one on the way.
const POLL: Duration = Duration::from_secs(5);

/// After an event others follow within moments. One look serves them all.
const EVENTS_SETTLE: Duration = Duration::from_millis(20);

/// Watches the mirror until `stop`, and sends on `wake` when a capture is due: once for every change
/// of a unit, when the unit is quiet. The first look counts as a change, and so does a mirror that
/// cannot be listed any more, whose capture then says why.
///
/// `again` is for a capture that met a mirror in motion: it is due again after the next quiet time.
/// A full channel is as good as a sent wake-up, since the capture that it leads to is still to come.
pub async fn watch(
    settings: Mirror,
    wake: mpsc::Sender<()>,
    again: Arc<Notify>,
    activity: Activity,
    stop: CancellationToken,
) {
    let mut watch = Watch::new(&settings.path, activity.clone());
    let mut trouble = None;
    loop {
        let listing = look(&settings.path).await;
        if let Ok(listing) = &listing
            && watch.follow(listing)
        {
            continue; // what changed between the look and the watch is seen now
        }
        report(&settings.path, listing.as_ref().err(), &mut trouble);
        let poll = match &listing {
            Ok(_) if watch.is_reliable() => settings.rescan,
            Ok(_) | Err(_) => settings.rescan.min(POLL),
        };
        let now = Instant::now();
        let rescan = now + poll;
        let wait = match activity.watched(listing.as_ref().ok(), now) {
            Next::Idle => rescan,
            Next::Wait(until) => until.min(rescan),
            Next::Due => {
                if let Err(mpsc::error::TrySendError::Closed(())) = wake.try_send(()) {
                    return; // nobody captures any more: the daemon stops
                }
                activity.told(now);
                rescan
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = again.notified() => activity.whole_again(Instant::now()),
            () = activity.woken() => {}
            () = watch.event() => sleep(EVENTS_SETTLE).await,
            () = sleep_until(wait.into()) => {}
        }
    }
}

/// Lists the mirror off the async threads: it may be on a network file system that hangs.
async fn look(path: &Path) -> io::Result<Listing> {
    let path = path.to_owned();
    let listing = tokio::task::spawn_blocking(move || Listing::of(&path, SystemTime::now()));
    listing.await.expect("listing does not panic")
}

/// Tells once of a mirror that cannot be listed, and when it is back.
fn report(path: &Path, error: Option<&io::Error>, trouble: &mut Option<String>) {
    let new = error.map(ToString::to_string);
    if new == *trouble {
        return;
    }
    match &new {
        Some(error) => {
            tracing::warn!(path = %path.display(), error, "cannot list the mirror; trying again every {POLL:?}");
        }
        None => tracing::info!(path = %path.display(), "the mirror can be listed again"),
    }
    *trouble = new;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::units::{UnitName, Units};
    use crate::config::{LoadTest, OnBadUnit, Unsigned};
    use clamcast_daemon::values::Percent;
    use std::fs;
    use std::io::Write as _;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// A watched mirror whose rescans come too late for any test.
    struct Watched {
        root: tempfile::TempDir,
        due: mpsc::Receiver<()>,
        again: Arc<Notify>,
        activity: Activity,
        stop: CancellationToken,
    }

    impl Watched {
        fn start(path: &str, prepare: impl FnOnce(&Path)) -> Self {
            let root = tempfile::tempdir().unwrap();
            prepare(root.path());
            let settings = Mirror {
                path: root.path().join(path),
                quiet: Duration::from_millis(50),
                rescan: Duration::from_secs(3600),
                require: Vec::new(),
                unsigned: Unsigned::Allow,
                load_test: LoadTest::Never,
                load_test_socket: "/nowhere/loadtest.sock".into(),
                shrink_max: Percent::new(30).unwrap(),
                on_bad_unit: OnBadUnit::Hold,
                units: Units::default(),
                cvd_certs: None,
                age_alarm: Duration::from_secs(48 * 3600),
            };
            let (wake, due) = mpsc::channel(1);
            let again = Arc::new(Notify::new());
            let stop = CancellationToken::new();
            let activity = Activity::new(settings.quiet, Units::default());
            let shared = activity.clone();
            let watching = watch(settings, wake, again.clone(), shared, stop.clone());
            tokio::spawn(watching);
            Self {
                root,
                due,
                again,
                activity,
                stop,
            }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.root.path().join(name)
        }

        async fn due(&mut self) {
            let woken = tokio::time::timeout(PATIENCE, self.due.recv()).await;
            woken.expect("no capture became due").expect("it watches");
        }
    }

    #[tokio::test]
    async fn a_freshclam_run_makes_one_capture_due() {
        let mut mirror = Watched::start("mirror", |root| {
            fs::create_dir(root.join("mirror")).unwrap();
            fs::write(root.join("mirror/daily.cvd"), "1").unwrap();
        });
        mirror.due().await; // what stood there at the start
        fs::create_dir(mirror.path("mirror/tmp.0123456789")).unwrap();
        let part = mirror.path("mirror/tmp.0123456789/clamav-0.tmp-daily.cld");
        fs::write(&part, "2").unwrap();
        fs::rename(&part, mirror.path("mirror/daily.cld")).unwrap();
        fs::remove_file(mirror.path("mirror/daily.cvd")).unwrap();
        assert!(mirror.due.try_recv().is_err(), "the run is still open");
        fs::remove_dir(mirror.path("mirror/tmp.0123456789")).unwrap();
        mirror.due().await;
        mirror.again.notify_one();
        mirror.due().await;
        mirror.stop.cancel();
        assert_eq!(mirror.due.recv().await, None);
    }

    #[tokio::test]
    async fn a_file_that_is_open_for_writing_is_seen_until_it_is_closed_and_delays_no_other() {
        let mut mirror = Watched::start("mirror", |root| {
            fs::create_dir(root.join("mirror")).unwrap();
            fs::write(root.join("mirror/daily.cld"), "1").unwrap();
        });
        mirror.due().await;
        let mut slow = fs::File::create(mirror.path("mirror/slow.ndb")).unwrap();
        slow.write_all(b"half").unwrap();
        fs::write(mirror.path("mirror/part"), "1").unwrap();
        fs::rename(mirror.path("mirror/part"), mirror.path("mirror/a.ndb")).unwrap();
        mirror.due().await; // a.ndb
        let slow_unit = UnitName::new("slow.ndb");
        // Later than any quiet time, and earlier than the file counts as abandoned.
        let later = Instant::now() + Duration::from_secs(600);
        let unsettled = mirror.activity.unsettled(later);
        assert_eq!(unsettled.keys().collect::<Vec<_>>(), [&slow_unit]);
        assert_eq!(
            unsettled[&slow_unit].to_string(),
            "still being written: slow.ndb is open for writing"
        );
        let waits = mirror.activity.waiting(later).waits;
        assert_eq!(waits.len(), 1, "{waits:?}");
        assert_eq!(
            waits[0].reason,
            "slow.ndb in the mirror is open for writing"
        );
        assert!(mirror.due.try_recv().is_err());
        drop(slow);
        mirror.due().await;
        assert!(mirror.activity.unsettled(later).is_empty());
    }

    #[tokio::test]
    async fn what_a_capture_found_in_motion_is_due_again() {
        let mut mirror = Watched::start("mirror", |root| {
            fs::create_dir(root.join("mirror")).unwrap();
            fs::write(root.join("mirror/a.ndb"), "1").unwrap();
        });
        mirror.due().await;
        let unit = [UnitName::new("a.ndb")].into();
        mirror.activity.again(&unit, Instant::now());
        mirror.due().await;
    }

    #[tokio::test]
    async fn a_symlink_that_is_swapped_is_a_change() {
        let mut mirror = Watched::start("mirror", |root| {
            for snapshot in ["one", "two"] {
                fs::create_dir(root.join(snapshot)).unwrap();
                fs::write(root.join(snapshot).join("daily.cld"), snapshot).unwrap();
            }
            symlink("one", root.join("mirror")).unwrap();
        });
        mirror.due().await;
        symlink("two", mirror.path("new")).unwrap();
        fs::rename(mirror.path("new"), mirror.path("mirror")).unwrap();
        mirror.due().await;
        fs::write(mirror.path("two/main.cld"), "1").unwrap();
        mirror.due().await;
    }

    #[tokio::test]
    async fn a_mirror_that_becomes_a_symlink_is_followed() {
        let mut mirror = Watched::start("mirror", |root| {
            fs::create_dir(root.join("mirror")).unwrap();
            fs::write(root.join("mirror/daily.cld"), "1").unwrap();
            fs::create_dir(root.join("next")).unwrap();
            fs::write(root.join("next/daily.cld"), "22").unwrap();
        });
        mirror.due().await;
        fs::rename(mirror.path("mirror"), mirror.path("first")).unwrap();
        symlink("first", mirror.path("mirror")).unwrap();
        fs::write(mirror.path("first/main.cld"), "1").unwrap();
        mirror.due().await;
        symlink("next", mirror.path("new")).unwrap();
        fs::rename(mirror.path("new"), mirror.path("mirror")).unwrap();
        mirror.due().await;
    }

    #[tokio::test]
    async fn a_mirror_that_is_made_again_with_its_old_inode_number_is_watched() {
        use std::os::unix::fs::MetadataExt as _;
        let inode = |path: &Path| fs::metadata(path).unwrap().ino();
        let mut mirror = Watched::start("mirror", |root| {
            fs::create_dir(root.join("mirror")).unwrap();
            fs::write(root.join("mirror/daily.cld"), "1").unwrap();
        });
        mirror.due().await;
        let path = mirror.path("mirror");
        let old = inode(&path);
        for content in ["22", "333", "4444"] {
            fs::remove_dir_all(&path).unwrap();
            fs::create_dir(&path).unwrap();
            println!("inode {old} and then {}", inode(&path)); // the same on ext4
            fs::write(path.join("daily.cld"), content).unwrap();
            mirror.due().await;
            // Only an event leads to this one: rescans come too late.
            fs::write(path.join("main.cld"), content).unwrap();
            mirror.due().await;
        }
    }

    #[tokio::test]
    async fn a_missing_mirror_is_told_and_found_when_it_comes() {
        let mut mirror = Watched::start("mirror", |_| {});
        mirror.due().await;
        fs::create_dir(mirror.path("mirror")).unwrap();
        mirror.due().await;
        fs::write(mirror.path("mirror/daily.cld"), "1").unwrap();
        mirror.due().await;
    }
}
