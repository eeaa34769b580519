//! File events of the database directory, wherever its path leads to at the moment.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clamcast_daemon::input;
use nix::errno::Errno;
use notify::event::{AccessKind, AccessMode, CreateKind};
use notify::{ErrorKind, Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::Notify;

use crate::install::disk::HIDDEN;

/// Where the kernel says what inotify is limited to (inotify(7)).
const LIMITS: &str = "/proc/sys/fs/inotify";

/// Longest of its files that is read, in bytes: each holds one number.
const LIMIT_BYTES_MAX: u64 = 32;

/// Why no events come. There are looks from time to time instead.
#[derive(Debug, thiserror::Error)]
pub enum Blind {
    /// All that this user may have of something is in use, by whatever programs.
    #[error("no file events from {path}: this user's fs.inotify.{limit}{} are used up", value(*.now))]
    Limit {
        /// The directory.
        path: PathBuf,
        /// What it is called.
        limit: &'static str,
        /// How much that is, if the kernel says so.
        now: Option<u64>,
    },
    /// The directory is not there, or something else.
    #[error("no file events from {path}")]
    Other {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: notify::Error,
    },
}

fn number(text: &[u8]) -> Option<u64> {
    str::from_utf8(text).ok()?.trim().parse().ok()
}

fn value(limit: Option<u64>) -> String {
    limit.map_or_else(String::new, |limit| format!(" ({limit})"))
}

impl Blind {
    fn new(path: &Path, source: notify::Error) -> Self {
        let limit = match &source.kind {
            ErrorKind::MaxFilesWatch => "max_user_watches",
            // inotify_init1(2): the same error where a process has no descriptor left, which for an
            // agent with some dozens of them is not it.
            ErrorKind::Io(error) if error.raw_os_error() == Some(Errno::EMFILE as i32) => {
                "max_user_instances"
            }
            ErrorKind::Io(_)
            | ErrorKind::Generic(_)
            | ErrorKind::PathNotFound
            | ErrorKind::WatchNotFound
            | ErrorKind::InvalidConfig(_) => {
                let path = path.to_owned();
                return Self::Other { path, source };
            }
        };
        let now = input::whole(&Path::new(LIMITS).join(limit), LIMIT_BYTES_MAX);
        Self::Limit {
            path: path.to_owned(),
            limit,
            now: now.ok().and_then(|text| number(&text)),
        }
    }

    /// What to do about it.
    pub fn remedy(&self) -> String {
        match self {
            Self::Limit { limit, now, .. } => {
                let more = now.map_or_else(|| "N".to_owned(), |now| (now * 2).to_string());
                format!(
                    "sysctl -w fs.inotify.{limit}={more}, and `fs.inotify.{limit} = {more}` in \
                     /etc/sysctl.d/90-inotify.conf for the next boot"
                )
            }
            Self::Other { path, .. } => format!("see what {} is: ls -ld", path.display()),
        }
    }
}

/// Tries whether events come from `path`, and leaves nothing behind.
///
/// # Errors
///
/// Why they do not.
pub fn try_events(path: &Path) -> Result<(), Blind> {
    let watcher = notify::recommended_watcher(|_| {});
    watcher
        .and_then(|mut watcher| watcher.watch(path, RecursiveMode::NonRecursive))
        .map_err(|error| Blind::new(path, error))
}

/// Says that something happened, as well as it can.
#[derive(Debug)]
pub struct Watch {
    path: PathBuf,
    events: Arc<Notify>,
    /// Whether a directory was made since the last event was taken: freshclam's runs begin so.
    run_begun: Arc<AtomicBool>,
    watching: Option<Watching>,
    /// Why there are no events, which was told.
    blind: Option<Blind>,
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
            blind: None,
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

    /// Why they do not.
    pub fn blind(&self) -> Option<&Blind> {
        self.blind.as_ref()
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
                if self.blind.take().is_some() {
                    tracing::info!(path = %self.path.display(), "file events come");
                }
                self.events.notify_one(); // what happened meanwhile nobody has told
            }
            Err(error) => {
                let blind = Blind::new(&self.path, error);
                if self.blind.is_none() {
                    tracing::warn!(
                        error = crate::chain(&blind),
                        "looking at the databases often instead; {}",
                        blind.remedy()
                    );
                }
                self.blind = Some(blind);
            }
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
