//! Decides which objects, generations and encodings are kept.
//! Keeps captured files by their digest and published generations by their position, and makes the
//! encodings in which files travel.
//! Must not know who publishes or who fetches.
//!
//! ```text
//! lock                        held while a master runs: there is one at a time
//! objects/SHA256              a captured file, 0444, never changed
//! generations/EPOCH-NUMBER.json   a published manifest in its envelope
//! keys/VERSION.json           every key set that manifests were published under
//! deltas/FROM-TO.vVERSION.sealed  how to make one object from another, and a SHA-256 of that
//! fulls/SHA256.zst.sealed     an object, compressed, and a SHA-256 of that
//! rollout.json                where the rollout stands; there is one as long as there are generations
//! rejected.json               the generations that were withdrawn, a second time
//! rollout.json.damaged        the last one that could not be read, for people to look at
//! tmp/                        files in the making; emptied at start
//! ```
//!
//! Objects and generations are named by what they hold and never change, so whoever opened one may
//! read on while it is removed, and a write that is repeated after a crash is a no-op.
//!
//! A file is hashed before it is used (`integrity`). A damaged or missing object is captured again
//! from the mirror, if the mirror still has it; a damaged encoding is made again.

mod encode;
mod integrity;
mod map;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File, Permissions};
use std::io::{self, Read as _, Seek as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use clamcast_daemon::alarms::Alarms;
use clamcast_daemon::durable::{self, LockError, LockGuard};
use clamcast_daemon::input;
use clamcast_proto::dsse::{Envelope, PublicKey, Verified};
use clamcast_proto::keys::KeySet;
use clamcast_proto::manifest::{DATABASE_BYTES_MAX, Manifest, ManifestFile};
use clamcast_proto::{DatabaseName, Digest, Epoch, Generation, Position};
use jiff::{SignedDuration, Timestamp};
use nix::fcntl::OFlag;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use crate::chain;

pub use encode::Encoded;
use encode::Encoder;
pub(crate) use encode::Pair;
use integrity::Whole;

/// Longest file of ours that is read whole: the state of a rollout that names each agent of a full
/// fleet (`hub::AGENTS_MAX`) twice, in a wave and among the hosts that are set aside, with a reason.
/// The envelope of the largest manifest is shorter.
pub(crate) const RECORD_BYTES_MAX: u64 = 24 << 20;

/// Most entries in one of the store's directories: thousands of generations of a hundred databases.
const ENTRIES_MAX: usize = 1 << 20;

/// How much of a file is read at a time.
const BUFFER_BYTES: usize = 256 << 10;

/// The alarm about damaged files of the store.
const ALARM: &str = "store";

/// A lost object is hashed, and looked for in the mirror, again after this time: every host asks for it.
const RECAPTURES_APART: Duration = Duration::from_secs(10);

/// How long `status` shows that a file of the store was damaged and healed: long enough for somebody
/// to look at the disk.
const HEALED_SHOWN: SignedDuration = SignedDuration::from_hours(24);

/// The state directory of a running master. Cheap to share; all methods block on the disk.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
    generations: RwLock<Generations>,
    /// Kept however old they are.
    needed: RwLock<HashSet<Position>>,
    encoder: Encoder,
    whole: Whole,
    /// Objects that could not be captured again.
    lost: Mutex<HashMap<Digest, Lost>>,
    /// Where an object may be captured again.
    mirror: PathBuf,
    alarms: Alarms,
    _lock: LockGuard,
}

#[derive(Debug, Default)]
struct Generations {
    manifests: BTreeMap<Position, Arc<Verified<Manifest>>>,
    /// The highest position that a file name takes, also one that cannot be read any more.
    taken: Option<Position>,
}

/// Why the state directory could not be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another master runs on it.
    #[error("state: the directory is in use; one master at a time may publish from it")]
    Locked(#[source] LockError),
    /// Its lock file.
    #[error(
        "state: cannot use the directory; it and what is in it must belong to the daemon's user"
    )]
    Lock(#[source] LockError),
    /// A file or directory of ours.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A record of ours is not what we write.
    #[error("{} is damaged; restore it from a backup, or remove it", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// A record is longer than we write.
    #[error("{} has more than {limit} bytes; restore it from a backup, or remove it", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The bound.
        limit: u64,
    },
    /// A captured file is larger than clamd could load.
    #[error("the file has more than {limit} bytes, which clamd does not load")]
    TooLarge {
        /// The bound.
        limit: u64,
    },
    /// An object that no kept generation needs, or that was removed or damaged.
    #[error("object {digest} is {state} in the store, and no file of the mirror has that content")]
    Lost {
        /// Its name.
        digest: Digest,
        /// `missing` or `damaged`.
        state: &'static str,
    },
    /// Generations only go up.
    #[error("generation {offered} is not above {taken}, which was published before")]
    NotAbove {
        /// The new one.
        offered: Position,
        /// The highest so far.
        taken: Position,
    },
    /// A delta could not be made, or did not make the file it should.
    #[error("cannot make the delta from {from} to {to}")]
    Delta {
        /// The old object.
        from: Digest,
        /// The new object.
        to: Digest,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The encoding failed for another asker who was first.
    #[error("cannot encode object {to}")]
    Shared {
        /// The object.
        to: Digest,
        /// What the first asker met.
        source: Arc<StoreError>,
    },
}

/// An object that could not be captured again.
#[derive(Clone, Copy, Debug)]
struct Lost {
    state: &'static str,
    /// When that was tried last.
    at: Instant,
}

impl Lost {
    fn error(self, digest: &Digest) -> StoreError {
        let (digest, state) = (*digest, self.state);
        StoreError::Lost { digest, state }
    }
}

/// An object on disk.
enum Found {
    Intact(File),
    Missing,
    Damaged,
}

impl Store {
    /// Opens the state directory, which is made if need be, and takes its lock. Damaged objects are
    /// captured again from `mirror`, and reported as `alarms`.
    ///
    /// The key set is remembered, so that generations that were published under it are still
    /// believed when a later one has other keys. A generation that cannot be read any more is
    /// warned of, and its number is never given away again.
    pub fn open(
        directory: &Path,
        mirror: &Path,
        keys: &Verified<KeySet>,
        alarms: Alarms,
    ) -> Result<Self, StoreError> {
        for name in [
            "",
            "objects",
            "generations",
            "keys",
            "deltas",
            "fulls",
            "tmp",
        ] {
            let path = directory.join(name);
            durable::create_dir(&path, 0o750).map_err(io_error("create", &path))?;
        }
        let lock = durable::lock(&directory.join("lock")).map_err(|error| match error {
            LockError::Held { .. } => StoreError::Locked(error),
            LockError::Io { .. } => StoreError::Lock(error),
        })?;
        let store = Self {
            directory: directory.to_owned(),
            generations: RwLock::default(),
            needed: RwLock::default(),
            encoder: Encoder::default(),
            whole: Whole::default(),
            lost: Mutex::default(),
            mirror: mirror.to_owned(),
            alarms,
            _lock: lock,
        };
        store.clear_temporary()?;
        for name in ["generations", "keys"] {
            durable::sweep(&directory.join(name));
        }
        store.save(&format!("keys/{}.json", keys.version), keys.envelope())?;
        let signers = store.signers(keys)?;
        *store.write_generations() = store.load_generations(&signers)?;
        Ok(store)
    }

    /// The state directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The highest generation.
    pub fn current(&self) -> Option<Arc<Verified<Manifest>>> {
        let generations = self.read_generations();
        generations.manifests.values().next_back().cloned()
    }

    /// The generation at a position, if it is still kept.
    pub fn manifest(&self, position: Position) -> Option<Arc<Verified<Manifest>>> {
        self.read_generations().manifests.get(&position).cloned()
    }

    /// Every generation that is kept, oldest first.
    pub fn manifests(&self) -> Vec<Arc<Verified<Manifest>>> {
        self.read_generations()
            .manifests
            .values()
            .cloned()
            .collect()
    }

    /// The generation whose manifest's payload has this digest, if it is still kept.
    pub fn named(&self, payload_sha256: &Digest) -> Option<Arc<Verified<Manifest>>> {
        let generations = self.read_generations();
        let mut manifests = generations.manifests.values();
        manifests
            .find(|manifest| manifest.payload_sha256() == *payload_sha256)
            .cloned()
    }

    /// Whether this very manifest is kept.
    pub fn has(&self, envelope: &Envelope) -> bool {
        let generations = self.read_generations();
        let mut manifests = generations.manifests.values();
        manifests.any(|manifest| {
            let kept = manifest.envelope();
            kept.payload == envelope.payload && kept.payload_type == envelope.payload_type
        })
    }

    /// Payload digests of the newest generations, at most `max`.
    pub fn known(&self, max: usize) -> Vec<Digest> {
        let generations = self.read_generations();
        let newest = generations.manifests.values().rev().take(max);
        newest.map(|manifest| manifest.payload_sha256()).collect()
    }

    /// Whether a generation is still here, with its files.
    pub fn keeps(&self, position: Position) -> bool {
        self.read_generations().manifests.contains_key(&position)
    }

    /// The highest position that was ever given away here.
    pub(crate) fn taken(&self) -> Option<Position> {
        self.read_generations().taken
    }

    /// Keeps a new generation. When this returns it is on disk, and only then may it be offered.
    pub(crate) fn add(
        &self,
        manifest: Verified<Manifest>,
    ) -> Result<Arc<Verified<Manifest>>, StoreError> {
        let position = manifest.position();
        let mut generations = self.write_generations();
        if let Some(taken) = generations.taken.filter(|taken| *taken >= position) {
            let offered = position;
            return Err(StoreError::NotAbove { offered, taken });
        }
        self.save(&generation_name(position), manifest.envelope())?;
        let manifest = Arc::new(manifest);
        generations.taken = Some(position);
        generations.manifests.insert(position, manifest.clone());
        Ok(manifest)
    }

    /// Where the object of this digest is, whether it is there or not.
    pub fn object(&self, digest: &Digest) -> PathBuf {
        self.directory.join("objects").join(digest.to_string())
    }

    /// Copies an open file into the store and returns its digest and length in bytes.
    ///
    /// What is hashed is what was written here, not what the source has afterwards. An intact object
    /// is not written again.
    pub(crate) fn import(&self, source: &File) -> Result<(Digest, u64), StoreError> {
        let temporary = self.temporary()?;
        let path = temporary.path().to_owned();
        let cloned = reflink_copy::reflink_file(source, temporary.as_file()).is_ok();
        let hashed = if cloned {
            let clone = temporary.reopen().map_err(io_error("open", &path))?;
            copy_hashed(&clone, &mut io::sink())
        } else {
            copy_hashed(source, &mut temporary.as_file())
        };
        let (digest, length) = hashed.map_err(io_error("copy a mirror file to", &path))?;
        if length > DATABASE_BYTES_MAX {
            let limit = DATABASE_BYTES_MAX;
            return Err(StoreError::TooLarge { limit });
        }
        let object = self.object(&digest);
        if !matches!(self.intact(&digest)?, Found::Intact(_)) {
            self.keep(temporary, &object)?;
        }
        self.is_back(&digest);
        Ok((digest, length))
    }

    /// Opens an object whose content is what its name says. One that is missing or damaged is captured
    /// again from the mirror first.
    pub(crate) fn open_object(&self, digest: &Digest) -> Result<File, StoreError> {
        let known = self.lost().get(digest).copied();
        if let Some(lost) = known.filter(|lost| lost.at.elapsed() < RECAPTURES_APART) {
            return Err(lost.error(digest));
        }
        let state = match self.intact(digest)? {
            Found::Intact(file) => {
                self.is_back(digest);
                return Ok(file);
            }
            Found::Missing => "missing",
            Found::Damaged => "damaged",
        };
        let at = Instant::now();
        let lost = Lost { state, at };
        if self.files_of(digest, |_| ()).is_empty() {
            return Err(lost.error(digest)); // no generation needs it
        }
        let now = Timestamp::now();
        let (subject, what) = (digest.to_string(), self.describe(digest));
        self.recapture(digest);
        if let Found::Intact(file) = self.intact(digest)? {
            let text = format!(
                "{what} was {state} in the store at {now:.0} and was captured again from the mirror; \
                 check the disk"
            );
            self.alarms
                .raise_for(ALARM, &subject, text, HEALED_SHOWN, now);
            return Ok(file);
        }
        self.lost().insert(*digest, lost);
        let text = format!(
            "{what} is {state} in the store, and no file of the mirror has that content: hosts cannot \
             get it; check the disk, then publish other databases or restore {}",
            self.object(digest).display()
        );
        self.alarms.raise(ALARM, &subject, text, now);
        Err(lost.error(digest))
    }

    /// An object that was lost is there again, or nothing needs it any more.
    fn is_back(&self, digest: &Digest) {
        if self.lost().remove(digest).is_some() {
            self.alarms.end(ALARM, &digest.to_string());
        }
    }

    /// Each change is one insertion or removal: a panic leaves the map whole.
    fn lost(&self) -> MutexGuard<'_, HashMap<Digest, Lost>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks whether an object has the content that its name says.
    fn intact(&self, digest: &Digest) -> Result<Found, StoreError> {
        let path = self.object(digest);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Missing),
            Err(error) => return Err(io_error("open", &path)(error)),
        };
        let metadata = file.metadata().map_err(io_error("read", &path))?;
        if self.whole.has(&path, &metadata) {
            return Ok(Found::Intact(file));
        }
        // A sector that cannot be read is damage, too.
        if !integrity::is_object(&file, digest).unwrap_or(false) {
            return Ok(Found::Damaged);
        }
        self.whole.insert(&path, &metadata);
        file.rewind().map_err(io_error("read", &path))?;
        Ok(Found::Intact(file))
    }

    /// Copies the file of the mirror that has this content into the store again, if there is one.
    fn recapture(&self, digest: &Digest) {
        let size = self.files_of(digest, |file| file.size);
        let Some(size) = size.first() else {
            return; // no generation needs it
        };
        let names = input::names(&self.mirror, ENTRIES_MAX).unwrap_or_default();
        for name in names {
            let opened = File::options()
                .read(true)
                .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
                .open(self.mirror.join(name));
            let Ok(file) = opened else { continue };
            let is_candidate = file
                .metadata()
                .is_ok_and(|it| it.is_file() && it.len() == *size);
            if !is_candidate {
                continue;
            }
            match self.import(&file) {
                Ok((found, _)) if found == *digest => return,
                Ok(_) => {} // another file of that length; the next retention removes it
                Err(error) => {
                    tracing::warn!(error = chain(&error), "cannot capture an object again");
                }
            }
        }
    }

    /// An object as operators know it.
    fn describe(&self, digest: &Digest) -> String {
        let names = self.files_of(digest, |file| file.name.clone());
        match names.last() {
            Some(name) => format!("{name} ({})", self.object(digest).display()),
            None => self.object(digest).display().to_string(),
        }
    }

    /// Whether a kept generation has the object under this name or, of a container, under the same name
    /// in another form. An agent may ask for every file of a set, so this looks names up.
    fn has_base(&self, digest: &Digest, name: &DatabaseName) -> bool {
        let forms = ["cvd", "cld", "cud"].iter().filter(|_| name.is_container());
        let forms = forms.filter_map(|form| format!("{}.{form}", name.base()).parse().ok());
        let forms: Vec<DatabaseName> = forms.collect();
        let names = || forms.iter().chain([name]);
        let generations = self.read_generations();
        let mut manifests = generations.manifests.values();
        manifests.any(|manifest| {
            let mut files = names().filter_map(|name| manifest.file(name));
            files.any(|file| file.sha256 == *digest)
        })
    }

    /// What the kept generations say of an object, oldest first.
    fn files_of<T>(&self, digest: &Digest, what: impl Fn(&ManifestFile) -> T) -> Vec<T> {
        let generations = self.read_generations();
        let files = generations.manifests.values().flat_map(|it| &it.files);
        files
            .filter(|file| file.sha256 == *digest)
            .map(what)
            .collect()
    }

    /// A new file of ours in `tmp/`, removed again unless it is kept.
    fn temporary(&self) -> Result<tempfile::NamedTempFile, StoreError> {
        let directory = self.directory.join("tmp");
        tempfile::NamedTempFile::new_in(&directory)
            .map_err(io_error("create a file in", &directory))
    }

    /// A new directory in `tmp/`, removed when it is dropped.
    pub(crate) fn temporary_directory(&self) -> Result<tempfile::TempDir, StoreError> {
        let directory = self.directory.join("tmp");
        tempfile::tempdir_in(&directory).map_err(io_error("create a directory in", &directory))
    }

    /// Gives a finished file its name. It is read-only from then on, since whoever maps or sends it
    /// relies on it; and on disk, since a generation will name it.
    fn keep(&self, file: tempfile::NamedTempFile, path: &Path) -> Result<(), StoreError> {
        let directory = path.parent().expect("our files are in directories");
        let kept = file
            .as_file()
            .set_permissions(Permissions::from_mode(0o444))
            .and_then(|()| file.as_file().sync_all())
            .and_then(|()| file.persist(path).map_err(|error| error.error))
            .and_then(|_| durable::sync_dir(directory));
        kept.map_err(io_error("write", path))
    }

    /// Writes a record of ours durably.
    pub(crate) fn save(&self, name: &str, record: &impl Serialize) -> Result<(), StoreError> {
        let path = self.directory.join(name);
        let mut json = serde_json::to_vec_pretty(record).expect("our own records serialise");
        json.push(b'\n');
        durable::ensure(&path, &json, 0o640).map_err(io_error("write", &path))
    }

    /// Reads a record of ours; `None` if it was never written.
    pub(crate) fn load<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StoreError> {
        let path = self.directory.join(name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("open", &path)(error)),
        };
        let mut json = Vec::new();
        file.take(RECORD_BYTES_MAX + 1)
            .read_to_end(&mut json)
            .map_err(io_error("read", &path))?;
        if json.len() as u64 > RECORD_BYTES_MAX {
            let limit = RECORD_BYTES_MAX;
            return Err(StoreError::TooLong { path, limit });
        }
        let record = serde_json::from_slice(&json);
        record
            .map(Some)
            .map_err(|source| StoreError::Damaged { path, source })
    }

    /// Removes a record of ours, if it is there.
    pub(crate) fn forget(&self, name: &str) -> Result<(), StoreError> {
        let path = self.directory.join(name);
        match fs::remove_file(&path) {
            Ok(()) => durable::sync_dir(&self.directory).map_err(io_error("sync", &self.directory)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(io_error("remove", &path)(error)),
        }
    }

    /// Gives a record of ours that cannot be read a second name, `NAME.damaged`, under which it stays
    /// when the next one takes its place. Returns that path. Of several the last one is kept.
    pub(crate) fn keep_damaged(&self, name: &str) -> Result<PathBuf, StoreError> {
        let path = self.directory.join(name);
        let kept = self.directory.join(format!("{name}.damaged"));
        // A crash in between loses a former one at most: the next start does the same again.
        self.forget(&format!("{name}.damaged"))?;
        let linked = fs::hard_link(&path, &kept);
        if let Ok(file) = File::open(&path) {
            let _ = file.sync_all(); // what the disk has of it is all that there is to keep
        }
        linked
            .and_then(|()| durable::sync_dir(&self.directory))
            .map_err(io_error("keep a damaged file as", &kept))?;
        Ok(kept)
    }

    /// Says which generations agents may be wanted at: they are kept however old they are.
    pub(crate) fn need(&self, positions: HashSet<Position>) {
        *self.needed.write().unwrap_or_else(PoisonError::into_inner) = positions;
    }

    /// Keeps the newest `generations` and those that are needed, and removes the others with every object and encoding
    /// that none of the kept ones needs. At least the current one stays.
    ///
    /// Manifests go first: a crash in between leaves objects that nothing names, and the next call
    /// removes them.
    pub(crate) fn retain(&self, generations: usize) -> Result<(), StoreError> {
        let mut kept = self.write_generations();
        let surplus = kept.manifests.len().saturating_sub(generations.max(1));
        let needed = self.needed.read().unwrap_or_else(PoisonError::into_inner);
        let old = kept.manifests.keys().take(surplus).copied();
        let old: Vec<_> = old.filter(|old| !needed.contains(old)).collect();
        drop(needed);
        for position in old {
            let path = self.directory.join(generation_name(position));
            fs::remove_file(&path).map_err(io_error("remove", &path))?;
            kept.manifests.remove(&position);
        }
        let needed: HashSet<String> = kept
            .manifests
            .values()
            .flat_map(|manifest| &manifest.files)
            .map(|file| file.sha256.to_string())
            .collect();
        drop(kept);
        self.sweep("objects", |name| needed.contains(name))?;
        self.sweep("fulls", |name| {
            encode::full_object(name).is_some_and(|digest| needed.contains(digest))
        })?;
        self.sweep("deltas", |name| {
            encode::delta_pair(name)
                .is_some_and(|(from, to)| needed.contains(from) && needed.contains(to))
        })?;
        self.encoder
            .retain(|digest| needed.contains(&digest.to_string()));
        self.whole.forget_removed();
        let lost: Vec<_> = self.lost().keys().copied().collect();
        for digest in lost {
            if !needed.contains(&digest.to_string()) {
                self.is_back(&digest);
            }
        }
        Ok(())
    }

    /// Removes the files of a directory whose names are not to be kept.
    fn sweep(&self, directory: &str, keep: impl Fn(&str) -> bool) -> Result<(), StoreError> {
        let directory = self.directory.join(directory);
        for path in entries(&directory)? {
            let name = path.file_name().unwrap_or_default();
            if !name.to_str().is_some_and(&keep) {
                remove(&path)?;
            }
        }
        Ok(())
    }

    /// Removes what a crash left in the making.
    fn clear_temporary(&self) -> Result<(), StoreError> {
        for path in entries(&self.directory.join("tmp"))? {
            let removed = if path.is_dir() {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            removed.map_err(io_error("remove", &path))?;
        }
        Ok(())
    }

    /// The manifest keys of every key set that was in use here, as far as the root in use signed
    /// it.
    fn signers(&self, keys: &Verified<KeySet>) -> Result<Vec<PublicKey>, StoreError> {
        let mut signers = keys.manifest.clone();
        for path in entries(&self.directory.join("keys"))? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let set = self.load::<Envelope>(&format!("keys/{name}"));
            match set.map(|set| set.map(|set| KeySet::verify_by(&set, &keys.root))) {
                Ok(Some(Ok(set))) => signers.extend(set.manifest.iter().cloned()),
                Ok(None) => {}
                Ok(Some(Err(error))) => {
                    tracing::warn!(path = %path.display(), error = %chain(&error), "a former key set is not believed");
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), error = %chain(&error), "a former key set cannot be read");
                }
            }
        }
        Ok(signers)
    }

    fn load_generations(&self, signers: &[PublicKey]) -> Result<Generations, StoreError> {
        let mut generations = Generations::default();
        for path in entries(&self.directory.join("generations"))? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let Some(position) = generation_position(&name) else {
                tracing::warn!(path = %path.display(), "not a generation of ours, ignored");
                continue;
            };
            generations.taken = generations.taken.max(Some(position));
            let name = generation_name(position);
            let problem = match self.load::<Envelope>(&name) {
                Ok(None) => continue,
                Ok(Some(envelope)) => match Manifest::verify(&envelope, signers) {
                    Ok(manifest) if manifest.position() == position => {
                        generations.manifests.insert(position, Arc::new(manifest));
                        continue;
                    }
                    Ok(manifest) => format!("it holds generation {}", manifest.position()),
                    Err(error) => chain(&error),
                },
                Err(error) => chain(&error),
            };
            tracing::warn!(path = %path.display(), problem, "a generation is lost; the next one gets a higher number");
        }
        Ok(generations)
    }

    fn read_generations(&self) -> std::sync::RwLockReadGuard<'_, Generations> {
        // Every change is one insertion or removal: what a panic leaves behind is whole.
        self.generations
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn write_generations(&self) -> std::sync::RwLockWriteGuard<'_, Generations> {
        self.generations
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes a file; one that is gone already is as good.
fn remove(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io_error("remove", path)(error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io {
        action,
        path,
        source,
    }
}

/// Copies `source` from its beginning, but no more than one byte past what clamd could load, and
/// hashes what was written.
fn copy_hashed(mut source: &File, target: &mut impl io::Write) -> io::Result<(Digest, u64)> {
    let mut hasher = Sha256::new();
    let mut length = 0;
    let mut buffer = vec![0; BUFFER_BYTES];
    while length <= DATABASE_BYTES_MAX {
        let count = match source.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        target.write_all(&buffer[..count])?;
        hasher.update(&buffer[..count]);
        length += count as u64;
    }
    Ok((Digest::finish(hasher), length))
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let names = input::names(directory, ENTRIES_MAX).map_err(io_error("list", directory))?;
    Ok(names.iter().map(|name| directory.join(name)).collect())
}

fn generation_name(position: Position) -> String {
    let Position { epoch, generation } = position;
    format!("generations/{epoch}-{generation}.json")
}

fn generation_position(file_name: &str) -> Option<Position> {
    let (epoch, generation) = file_name.strip_suffix(".json")?.split_once('-')?;
    let epoch = Epoch(epoch.parse().ok()?);
    let generation = Generation::new(generation.parse().ok()?)?;
    Some(Position { epoch, generation })
}
