//! Compares the database directory with the installed set, as sparingly as it can.
//!
//! A look writes nothing. What it reads goes by its own descriptor, and leaves the page cache again:
//! the next look reads the disk, and the host's other files stay where they are.

use std::collections::HashMap;
use std::io::{self, Read};
use std::os::fd::AsFd as _;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use clamcast_daemon::input::user_name;
use clamcast_proto::receipt::{FileState, Found};
use clamcast_proto::{DatabaseName, Digest};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::unistd::{Uid, geteuid};
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use super::disk::{At, DATABASE_MODE, Dir, Facts, Tree};
use super::journal::Installed;
use super::lock;
use crate::clamd::proof::{CANARY, GATE, Nonce, canary, gate};

/// Bytes of a file that are read at a time.
const CHUNK_BYTES: usize = 256 << 10;

/// A full look reads so many bytes a second: 300 MB in ten seconds, at an eighth of a core that
/// hashes 250 MB a second.
const FULL_BYTES_PER_SECOND: f64 = (32 << 20) as f64;

/// A file of another length is wrong without being read. It is read nonetheless, so that the
/// receipt has its digest, up to this many times the published length.
const READ_TIMES_MAX: u64 = 2;

/// How much of the files a look reads.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Depth {
    /// Nothing: names, kinds, lengths and rights.
    Surface,
    /// What seems to have been written since it was read last.
    Touched,
    /// Every byte. Damage that changes neither size nor time is found by nothing else.
    Full,
    /// Every byte, and at once: an operator waits for it.
    Ordered,
}

/// A file that is not what was published, or a name where there is none.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Sighting {
    /// The name: of a database, or of one of the two files of the proof.
    pub name: String,
    /// What is the matter.
    pub found: Found,
    /// What is there, if it could be read.
    pub state: Option<FileState>,
    /// The user that it belongs to now, if it is not the agent's own.
    pub owner: Option<String>,
}

/// What came of a look.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Look {
    /// The directory was compared with the installed set.
    Made(Findings),
    /// The database directory cannot be used, for this reason.
    Blocked(String),
    /// An install is under way.
    NotNow,
    /// It was broken off.
    Stopped,
}

/// What a look found.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Findings {
    /// Every file that is wrong.
    pub wrong: Vec<Sighting>,
    /// Databases in the directory that are not ours, bounded as a receipt is.
    pub foreign: Vec<String>,
    /// The host's own files that are kept while the installed set owns their names.
    pub adopted: Vec<DatabaseName>,
}

/// What is known of the files in the directory, by name: those that were read and were right.
#[derive(Debug, Default)]
pub(super) struct Baseline(Mutex<HashMap<String, (Facts, Digest)>>);

impl Baseline {
    fn is_untouched(&self, file: &Wanted, facts: &Facts) -> bool {
        lock(&self.0).get(&file.name) == Some(&(*facts, file.sha256))
    }

    pub(super) fn insert(&self, name: &str, facts: Facts, digest: Digest) {
        lock(&self.0).insert(name.to_owned(), (facts, digest));
    }
}

/// What should stand under a name.
struct Wanted {
    name: String,
    size: u64,
    sha256: Digest,
}

/// Why a file could not be hashed.
enum Unread {
    Stopped,
    Failed,
}

/// A look at the directory.
pub(super) struct Comparison<'a> {
    pub(super) tree: &'a Tree,
    pub(super) baseline: &'a Baseline,
    pub(super) depth: Depth,
    pub(super) stop: &'a CancellationToken,
}

impl Comparison<'_> {
    /// Looks at every file of the installed set, and at canary and gate.
    pub(super) fn make(
        &self,
        installed: &Installed,
        nonce: &Nonce,
        old_forms: &[DatabaseName],
    ) -> Option<Vec<Sighting>> {
        let files = installed.set.files().into_iter().map(|file| Wanted {
            name: file.name.to_string(),
            size: file.size,
            sha256: file.sha256,
        });
        let mut files: Vec<_> = files.collect();
        for (name, text) in [
            (CANARY, canary(nonce, installed.install)),
            (GATE, gate(installed.install)),
        ] {
            files.push(Wanted {
                name: name.to_owned(),
                size: text.len() as u64,
                sha256: Digest::of(text.as_bytes()),
            });
        }
        let mut pace = Pace::of(self.depth);
        let mut wrong = Vec::new();
        for file in &files {
            match self.look_at(file, &mut pace) {
                Ok(None) if self.is_outranked(file, &files, old_forms) => wrong.push(Sighting {
                    name: file.name.clone(),
                    found: Found::Changed,
                    state: state(file, file.size, file.sha256),
                    owner: None,
                }),
                Ok(sighting) => wrong.extend(sighting),
                Err(Unread::Stopped) => return None,
                Err(Unread::Failed) => wrong.push(Sighting {
                    name: file.name.clone(),
                    found: Found::Unreadable,
                    state: None,
                    owner: None,
                }),
            }
        }
        Some(wrong)
    }

    fn look_at(&self, file: &Wanted, pace: &mut Pace) -> Result<Option<Sighting>, Unread> {
        let at = At(Dir::Databases, file.name.as_str());
        let sighting = |found, state, owner| {
            let name = file.name.clone();
            Some(Sighting {
                name,
                found,
                state,
                owner,
            })
        };
        let Some(facts) = self.tree.facts(at).map_err(|_| Unread::Failed)? else {
            return Ok(sighting(Found::Missing, None, None));
        };
        let ours = facts.owner == geteuid().as_raw();
        let owner = (!ours).then(|| user_name(Uid::from_raw(facts.owner)));
        if !facts.regular {
            return Ok(sighting(Found::Changed, None, owner));
        }
        let as_placed = ours && facts.mode == DATABASE_MODE && facts.size == file.size;
        let found = match facts.mode & 0o444 {
            0o444 => Found::Changed,
            _ => Found::Unreadable, // for clamd, which is another user
        };
        let is_long = facts.size > file.size.saturating_mul(READ_TIMES_MAX);
        let read = match self.depth {
            Depth::Surface => false,
            Depth::Touched => !self.baseline.is_untouched(file, &facts),
            Depth::Full | Depth::Ordered => true,
        };
        if !read && as_placed {
            // At the surface it is taken as it is, so that what changes from now on is read.
            self.baseline.insert(&file.name, facts, file.sha256);
            return Ok(None);
        }
        if !read || is_long {
            return Ok(sighting(found, None, owner));
        }
        let (read_as, digest) = match self.digest(at, &facts, pace) {
            Ok(read) => read,
            Err(Unread::Failed) => return Ok(sighting(Found::Unreadable, None, owner)),
            Err(stopped @ Unread::Stopped) => return Err(stopped),
        };
        if as_placed && digest == file.sha256 {
            self.baseline.insert(&file.name, read_as, digest);
            return Ok(None);
        }
        let state = state(file, facts.size, digest);
        Ok(sighting(found, state, owner))
    }

    fn digest(
        &self,
        at: At<'_>,
        facts: &Facts,
        pace: &mut Pace,
    ) -> Result<(Facts, Digest), Unread> {
        let open = self.tree.open(at).map_err(|_| Unread::Failed)?;
        let input = open.ok_or(Unread::Failed)?;
        let read_as = input.facts().map_err(|_| Unread::Failed)?;
        let mut file = input.into_file();
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; CHUNK_BYTES];
        // One that grows while it is read is wrong anyway.
        let mut left = facts.size.saturating_add(1);
        while left > 0 {
            if self.stop.is_cancelled() {
                return Err(Unread::Stopped);
            }
            let room = usize::try_from(left).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
            match file.read(&mut buffer[..room]) {
                Ok(0) => break,
                Ok(read) => {
                    hasher.update(&buffer[..read]);
                    left -= read as u64;
                    pace.read(read);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Unread::Failed),
            }
        }
        // A hint, which not every file system takes.
        let _ = posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        Ok((read_as, Digest::finish(hasher)))
    }

    /// Whether the other form of a container stands beside it, which is in nobody's set: clamd
    /// loads whichever has the higher version.
    fn is_outranked(&self, file: &Wanted, files: &[Wanted], old_forms: &[DatabaseName]) -> bool {
        let name = file.name.parse::<DatabaseName>().ok();
        let Some(other) = name.and_then(|name| name.other_form()) else {
            return false;
        };
        let known =
            files.iter().any(|file| file.name == other.as_str()) || old_forms.contains(&other);
        let there = |at| self.tree.facts(at).is_ok_and(|facts| facts.is_some());
        !known && there(At(Dir::Databases, other.as_str()))
    }
}

/// What a receipt says of a file; of those of the proof it says nothing.
fn state(file: &Wanted, size: u64, sha256: Digest) -> Option<FileState> {
    let name = file.name.parse().ok()?;
    Some(FileState { name, size, sha256 })
}

/// Keeps a full look from taking the disk away from others.
struct Pace {
    bytes_per_second: Option<f64>,
    started: Instant,
    bytes: f64,
}

impl Pace {
    fn of(depth: Depth) -> Self {
        Self {
            bytes_per_second: (depth == Depth::Full).then_some(FULL_BYTES_PER_SECOND),
            started: Instant::now(),
            bytes: 0.0,
        }
    }

    fn read(&mut self, bytes: usize) {
        self.bytes += bytes as f64;
        if let Some(rate) = self.bytes_per_second {
            let due = Duration::from_secs_f64(self.bytes / rate);
            thread::sleep(due.saturating_sub(self.started.elapsed()));
        }
    }
}

impl Tree {
    /// Whether a name is a directory's.
    pub(super) fn is_directory(&self, at: At<'_>) -> Result<bool, super::HostFault> {
        Ok(self.facts(at)?.is_some_and(|facts| facts.directory))
    }
}
