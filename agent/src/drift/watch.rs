//! File events of the database directory, wherever its path leads to at the moment.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use notify::event::{AccessKind, AccessMode, CreateKind};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::Notify;

use crate::install::disk::HIDDEN;

/// Says that something happened, as well as it can.
#[derive(Debug)]
pub struct Watch {
    path: PathBuf,
    events: Arc<Notify>,
    /// Whether a directory was made since the last event was taken: freshclam's runs begin so.
    run_begun: Arc<AtomicBool>,
    watching: Option<Watching>,
    /// Whether it was told already that there are no events.
    warned: bool,
}

#[derive(Debug)]
struct Watching {
    /// Device and inode of the directory.
    identity: (u64, u64),
    broken: Arc<AtomicBool>,
    _watcher: RecommendedWatcher,
}

impl Watch {
    /// A watch on `path` that begins with [`Watch::follow`].
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            events: Arc::default(),
            run_begun: Arc::default(),
            watching: None,
            warned: false,
        }
    }

    /// The directory, as configured.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether events come, as far as is known.
    pub fn is_watching(&self) -> bool {
        self.watching.is_some()
    }

    /// Waits for an event. Any number of them since the last call count as one. Returns whether a
    /// directory was made, as freshclam does at the beginning of a run.
    pub async fn event(&self) -> bool {
        self.events.notified().await;
        self.run_begun.swap(false, Ordering::Relaxed)
    }

    /// Watches the directory that stands there now, if it is not watched already. Returns whether
    /// events come. Without them (no directory, or the host's inotify limits are reached) there are
    /// looks from time to time.
    pub fn follow(&mut self) -> bool {
        let identity = fs::metadata(&self.path).map(|facts| (facts.dev(), facts.ino()));
        if let (Some(watching), Ok(identity)) = (&self.watching, &identity)
            && watching.identity == *identity
            && !watching.broken.load(Ordering::Relaxed)
        {
            return true;
        }
        self.watching = None;
        let watching = identity
            .map_err(notify::Error::io)
            .and_then(|identity| self.watch(identity));
        match watching {
            Ok(watching) => {
                self.watching = Some(watching);
                self.warned = false;
                self.events.notify_one(); // what happened meanwhile nobody has told
            }
            Err(error) if !self.warned => {
                tracing::warn!(
                    path = %self.path.display(), %error,
                    "no events from the database directory, looking at it often instead; are \
                     fs.inotify.max_user_instances and max_user_watches high enough?"
                );
                self.warned = true;
            }
            Err(_) => {}
        }
        self.watching.is_some()
    }

    fn watch(&self, identity: (u64, u64)) -> notify::Result<Watching> {
        let broken = Arc::new(AtomicBool::new(false));
        let (events, breaks) = (self.events.clone(), broken.clone());
        let run_begun = self.run_begun.clone();
        let (directory, hidden) = (self.path.clone(), self.path.join(HIDDEN));
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            match event {
                Ok(event) if !concerns(&event, &hidden) => return,
                Ok(event) if event.paths.contains(&directory) => {
                    breaks.store(true, Ordering::Relaxed); // moved, removed or unmounted
                }
                Ok(event) if event.kind == EventKind::Create(CreateKind::Folder) => {
                    run_begun.store(true, Ordering::Relaxed);
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, "events from the database directory were lost");
                    breaks.store(true, Ordering::Relaxed);
                }
            }
            events.notify_one();
        })?;
        watcher.watch(&self.path, RecursiveMode::NonRecursive)?;
        Ok(Watching {
            identity,
            broken,
            _watcher: watcher,
        })
    }
}

/// Whether an event may have changed a database. Reading is none of it: a look reads them all.
fn concerns(event: &Event, hidden: &Path) -> bool {
    match event.kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => {}
        EventKind::Access(_) => return false,
        EventKind::Any
        | EventKind::Create(_)
        | EventKind::Modify(_)
        | EventKind::Remove(_)
        | EventKind::Other => {}
    }
    event.paths.is_empty() || event.paths.iter().any(|path| path != hidden)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(20);

    async fn event(watch: &Watch) -> bool {
        let event = tokio::time::timeout(PATIENCE, watch.event());
        event.await.expect("an event comes")
    }

    #[tokio::test]
    async fn a_run_of_freshclam_is_seen_to_begin() {
        let root = tempfile::tempdir().unwrap();
        let mut watch = Watch::new(root.path());
        assert!(watch.follow());
        assert!(!event(&watch).await);
        fs::create_dir(root.path().join("tmp.0123456789")).unwrap();
        assert!(event(&watch).await);
        fs::create_dir(root.path().join(HIDDEN)).unwrap(); // the agent's own
        fs::remove_dir(root.path().join("tmp.0123456789")).unwrap();
        assert!(!event(&watch).await);
    }

    #[tokio::test]
    async fn a_replaced_directory_is_followed_and_a_missing_one_is_found_when_it_comes() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("db");
        let mut watch = Watch::new(&path);
        assert!(!watch.follow());
        fs::create_dir(&path).unwrap();
        assert!(watch.follow());
        event(&watch).await; // looked at once, whatever happened before
        fs::write(path.join("daily.cld"), "1").unwrap();
        event(&watch).await;

        fs::rename(&path, root.path().join("moved")).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(watch.follow());
        while tokio::time::timeout(Duration::from_millis(100), watch.event())
            .await
            .is_ok()
        {} // the news of the move
        fs::write(path.join("daily.cld"), "2").unwrap();
        event(&watch).await;
    }
}
