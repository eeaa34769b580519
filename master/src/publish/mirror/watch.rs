//! File events of the mirror directory, wherever `path` leads to at the moment.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use notify::event::{AccessKind, AccessMode, CreateKind, Flag, ModifyKind, RenameMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::Notify;

use super::activity::Activity;
use super::listing::{Identity, Listing};
use super::writers::FileEvent;

/// Says that something happened, as well as it can, and tells `activity` of the events of files.
#[derive(Debug)]
pub(super) struct Watch {
    path: PathBuf,
    events: Arc<Notify>,
    activity: Activity,
    watching: Option<Watching>,
    /// Whether it was told already that there are no events.
    warned: bool,
}

#[derive(Debug)]
struct Watching {
    identity: Identity,
    /// Whether no symlink leads to it, anywhere on the path.
    is_direct: bool,
    broken: Arc<AtomicBool>,
    _watcher: RecommendedWatcher,
}

impl Watch {
    pub(super) fn new(path: &Path, activity: Activity) -> Self {
        Self {
            path: path.components().collect(), // a slash at the end would hide a symlink
            events: Arc::default(),
            activity,
            watching: None,
            warned: false,
        }
    }

    /// Waits for an event. Any number of them since the last call count as one.
    pub(super) async fn event(&self) {
        self.events.notified().await;
    }

    /// Whether every change makes an event.
    pub(super) fn is_reliable(&self) -> bool {
        self.watching
            .as_ref()
            .is_some_and(|watching| watching.is_direct)
    }

    /// Watches the directory that was listed, if it is not watched already. Returns whether a new
    /// watch was set.
    pub(super) fn follow(&mut self, listing: &Listing) -> bool {
        if let Some(watching) = &self.watching {
            let broken = watching.broken.load(Ordering::Relaxed);
            // The same directory may stand behind a symlink now, whose swapping must be seen.
            let is_same = watching.identity == listing.identity
                && watching.is_direct == self.is_direct(listing);
            if !broken && is_same {
                return false;
            }
        }
        if let Some(watching) = self.watching.take() {
            watching.broken.store(true, Ordering::Relaxed); // late events of it count no more
        }
        self.activity.event(FileEvent::Lost, Instant::now());
        match self.watch(listing) {
            Ok(watching) => {
                self.watching = Some(watching);
                self.warned = false;
                true
            }
            Err(error) => {
                if !self.warned {
                    tracing::warn!(path = %self.path.display(), %error, "no events from the mirror; looking at it often instead");
                }
                self.warned = true;
                false
            }
        }
    }

    /// Whether no symlink leads to what was listed.
    fn is_direct(&self, listing: &Listing) -> bool {
        std::path::absolute(&self.path).is_ok_and(|path| path == listing.directory)
    }

    /// Where `path` is a symlink, its own directory is watched too, since swapping the link
    /// changes nothing in the directory it led to.
    fn watch(&self, listing: &Listing) -> notify::Result<Watching> {
        let directory = listing.directory.clone();
        let link = link(&self.path)?;
        let broken = Arc::new(AtomicBool::new(false));
        let (events, breaks) = (self.events.clone(), broken.clone());
        let activity = self.activity.clone();
        let mirrored = directory.clone();
        let swapped = link.clone();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            let of_a_file = match &event {
                Ok(event) => file_event(event, &mirrored),
                Err(_) => Some(FileEvent::Lost),
            };
            if let Some(of_a_file) = of_a_file
                && !breaks.load(Ordering::Relaxed)
            {
                activity.event(of_a_file, Instant::now());
            }
            match event {
                // The watch ends with the directory. Another one may get its inode number.
                Ok(event) if is_end(&event, &mirrored) => breaks.store(true, Ordering::Relaxed),
                Ok(event) if !concerns(&event, &mirrored, swapped.as_deref()) => return,
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, "events from the mirror were lost");
                    breaks.store(true, Ordering::Relaxed);
                }
            }
            events.notify_one();
        })?;
        watcher.watch(&directory, RecursiveMode::NonRecursive)?;
        if let Some(parent) = link.as_deref().and_then(Path::parent) {
            watcher.watch(parent, RecursiveMode::NonRecursive)?;
        }
        Ok(Watching {
            identity: listing.identity,
            is_direct: self.is_direct(listing),
            broken,
            _watcher: watcher,
        })
    }
}

/// Where the symlink is that `path` names, if it names one.
fn link(path: &Path) -> notify::Result<Option<PathBuf>> {
    if !fs::symlink_metadata(path)?.is_symlink() {
        return Ok(None);
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    let name = path.file_name();
    let parent = fs::canonicalize(parent)?;
    Ok(name.map(|name| parent.join(name)))
}

/// What an event says of a file in the directory, if it says anything of its writers.
fn file_event(event: &Event, directory: &Path) -> Option<FileEvent> {
    if event.attrs.flag() == Some(Flag::Rescan) {
        return Some(FileEvent::Lost);
    }
    let path = event.paths.first()?;
    if path.parent() != Some(directory) {
        return None;
    }
    let name = path.file_name()?.to_owned();
    let rename = event.attrs.tracker();
    match event.kind {
        EventKind::Create(CreateKind::File) => Some(FileEvent::Created(name)),
        EventKind::Access(AccessKind::Open(_)) => Some(FileEvent::Opened(name)),
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => Some(FileEvent::Closed(name)),
        EventKind::Modify(ModifyKind::Data(_)) => Some(FileEvent::Modified(name)),
        EventKind::Modify(ModifyKind::Name(RenameMode::From)) => {
            Some(FileEvent::MovedFrom(name, rename))
        }
        EventKind::Modify(ModifyKind::Name(RenameMode::To)) => {
            Some(FileEvent::MovedTo(name, rename))
        }
        EventKind::Remove(_) => Some(FileEvent::Removed(name)),
        EventKind::Any
        | EventKind::Access(_)
        | EventKind::Create(_)
        | EventKind::Modify(_)
        | EventKind::Other => None,
    }
}

/// Whether the directory was removed or has another name.
fn is_end(event: &Event, directory: &Path) -> bool {
    let is_gone = match event.kind {
        EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_)) => true,
        EventKind::Any
        | EventKind::Access(_)
        | EventKind::Create(_)
        | EventKind::Modify(_)
        | EventKind::Other => false,
    };
    is_gone && event.paths.iter().any(|path| path == directory)
}

/// Whether an event may have changed what a look finds. Reading is none of it: a look reads the
/// directory itself, and would go on for ever.
fn concerns(event: &Event, directory: &Path, link: Option<&Path>) -> bool {
    match event.kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => {}
        EventKind::Access(_) => return false,
        EventKind::Any
        | EventKind::Create(_)
        | EventKind::Modify(_)
        | EventKind::Remove(_)
        | EventKind::Other => {}
    }
    let here = |path: &PathBuf| path.starts_with(directory) || Some(path.as_path()) == link;
    event.paths.is_empty() || event.paths.iter().any(here)
}
