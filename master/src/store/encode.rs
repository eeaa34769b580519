//! How an object travels, worked out once however many agents ask at the same time.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufReader};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clamcast_proto::Digest;
use clamcast_proto::container::HEADER_BYTES;
use clamcast_proto::delta::{self, Delta, MakeError, VERSION};
use clamcast_proto::manifest::ManifestFile;
use clamcast_proto::wire::{Have, PartEncoding, PartKind};
use jiff::Timestamp;
use tempfile::NamedTempFile;

use super::integrity::{self, SEAL_BYTES};
use super::{ALARM, HEALED_SHOWN, Store, StoreError, io_error, map};

/// A compressed file must be smaller by this much, or it travels as it is and spares the agents
/// the inflating.
const COMPRESSION_SAVES_MIN: u64 = 5; // percent

/// zstd level of full files. Higher ones do no better on signatures, which are mostly hexadecimal
/// digits of random numbers, and take ten times as long.
const FULL_LEVEL: i32 = 1;

/// A delta of at most this part of the file is smaller than the file compressed, without
/// compressing it to see: signatures never shrink to a tenth.
const OBVIOUS_SHARE: u64 = 16;

/// Ends the names of encodings, which carry a SHA-256 of their content behind it. Files of earlier
/// versions, which have none, are not used.
const SEALED: &str = ".sealed";

/// First byte of a gzip stream (RFC 1952).
const GZIP_MAGIC: u8 = 0x1f;

/// An encoded part, ready to be sent.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// Names it, as the agent is told.
    pub encoding: PartEncoding,
    /// The file that begins with its bytes. It may be read on after the store has removed it.
    pub path: PathBuf,
}

/// Which encoding: from an old object, or of the whole file.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) struct Pair {
    from: Option<Digest>,
    to: Digest,
}

/// One computation that any number of askers wait for.
#[derive(Debug, Default)]
struct Flight {
    landed: Mutex<Option<Result<Encoded, Arc<StoreError>>>>,
}

/// What is being made or was made since the start.
#[derive(Debug, Default)]
pub(super) struct Encoder {
    flights: Mutex<HashMap<Pair, Arc<Flight>>>,
    #[cfg(test)]
    made: std::sync::atomic::AtomicUsize,
}

impl Store {
    /// Deltas that were made since the start.
    #[cfg(test)]
    pub(super) fn made(&self) -> usize {
        self.encoder.made.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// The encoding in which a file of a generation goes to an agent that has `have`; with `full`
    /// never a delta.
    ///
    /// Blocks while it is made, or while another thread makes the same one.
    pub(crate) fn encode(&self, pair: Pair) -> Result<Encoded, StoreError> {
        let encoded = self.made_once(pair)?;
        if self.is_whole(&encoded)? {
            return Ok(encoded);
        }
        // Retention removed it, or the disk damaged it.
        self.encoder.forget(pair);
        self.encoder.forget(Pair { from: None, ..pair });
        self.made_once(pair)
    }

    /// The encoding, if it is there and was found whole not long ago. Reads no content.
    pub(crate) fn ready(&self, pair: Pair) -> Option<Encoded> {
        let flight = lock(&self.encoder.flights).get(&pair)?.clone();
        let encoded = flight
            .landed
            .try_lock()
            .ok()?
            .as_ref()?
            .as_ref()
            .ok()?
            .clone();
        let metadata = fs::metadata(&encoded.path).ok()?;
        self.whole.has(&encoded.path, &metadata).then_some(encoded)
    }

    /// Has an encoding hashed before its next use, and what it was made of: an agent that received all
    /// of it asks for it again.
    pub(crate) fn doubt(&self, pair: Pair) {
        for digest in pair.from.iter().chain([&pair.to]) {
            self.whole.doubt(&self.object(digest));
        }
        let flight = lock(&self.encoder.flights).get(&pair).cloned();
        let landed = flight.as_ref().and_then(|it| it.landed.try_lock().ok());
        if let Some(Some(Ok(encoded))) = landed.as_deref() {
            self.whole.doubt(&encoded.path);
        }
    }

    /// Which encoding that is. The old file that an agent claims to have counts only if the store has it
    /// under the same base name: else each digest would be an encoding of its own.
    pub(crate) fn pair(&self, have: &Have, target: &ManifestFile, full: bool) -> Pair {
        let to = target.sha256;
        let from = match have {
            Have::Sha256(from) if !full && *from != to && self.has_base(from, &target.name) => {
                Some(*from)
            }
            Have::Sha256(_) | Have::Search | Have::Ranges(_) | Have::Nothing => None,
        };
        Pair { from, to }
    }

    /// Whether the file of an encoding is there and has its content; one that is damaged is removed.
    fn is_whole(&self, encoded: &Encoded) -> Result<bool, StoreError> {
        let path = &encoded.path;
        if *path == self.object(&encoded.encoding.to) {
            return self.open_object(&encoded.encoding.to).map(|_| true);
        }
        let Ok(file) = File::open(path) else {
            return Ok(false);
        };
        let metadata = file.metadata().map_err(io_error("read", path))?;
        if self.whole.has(path, &metadata) {
            return Ok(true);
        }
        // A sector that cannot be read is damage, too.
        if integrity::is_sealed(&file).unwrap_or(false) {
            self.whole.insert(path, &metadata);
            return Ok(true);
        }
        // Another thread may have made it again meanwhile.
        let is_same = fs::metadata(path).is_ok_and(|there| there.ino() == metadata.ino());
        if !is_same {
            return Ok(false);
        }
        super::remove(path)?;
        let now = Timestamp::now();
        let text = format!(
            "{} was damaged at {now:.0} and is made again; check the disk",
            path.display()
        );
        let subject = path.display().to_string();
        self.alarms
            .raise_for(ALARM, &subject, text, HEALED_SHOWN, now);
        Ok(false)
    }

    /// The first asker makes it and the others wait. If it fails, all of them hear why, and the
    /// next asker tries again.
    fn made_once(&self, pair: Pair) -> Result<Encoded, StoreError> {
        let flight = lock(&self.encoder.flights).entry(pair).or_default().clone();
        let mut landed = lock(&flight.landed);
        if landed.is_none() {
            let made = match pair.from {
                Some(from) => self.delta(from, pair.to),
                None => self.whole(pair.to),
            };
            if made.is_err() {
                self.encoder.forget(pair);
            }
            *landed = Some(made.map_err(Arc::new));
        }
        match landed.as_ref().expect("it was just made") {
            Ok(encoded) => Ok(encoded.clone()),
            Err(source) => {
                let source = source.clone();
                let to = pair.to;
                Err(StoreError::Shared { to, source })
            }
        }
    }

    /// The delta between two objects; the whole file where that is not larger.
    fn delta(&self, from: Digest, to: Digest) -> Result<Encoded, StoreError> {
        let path = self.directory.join("deltas").join(delta_name(from, to));
        let encoded = |length, path| Encoded {
            encoding: PartEncoding {
                kind: PartKind::Delta,
                zstd: false,
                from: Some(from),
                to,
                length,
            },
            path,
        };
        if let Some(length) = sealed_length(&path) {
            return Ok(encoded(length, path)); // only those that are worth it are kept
        }
        let Some(delta) = self.make_delta(from, to)? else {
            return self.made_once(Pair { from: None, to });
        };
        if delta.length > delta.target_bytes / OBVIOUS_SHARE {
            let whole = self.made_once(Pair { from: None, to })?;
            if delta.length >= whole.encoding.length {
                return Ok(whole);
            }
        }
        let length = self.keep_sealed(delta.file, &path)?;
        Ok(encoded(length, path))
    }

    /// Makes a delta and applies it once, so that no agent is sent one that does not do what it
    /// should: a tenth of the time that making it took. `None` where a delta cannot be small.
    fn make_delta(&self, from: Digest, to: Digest) -> Result<Option<Made>, StoreError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| StoreError::Delta {
            from,
            to,
            source,
        };
        let map = |digest| {
            let file = self.open_object(&digest)?;
            let path = self.object(&digest);
            map::object(&file).map_err(io_error("map", &path))
        };
        let new = map(to)?;
        let old = match map(from) {
            Err(StoreError::Lost { .. }) => return Ok(None), // fall back to the full file
            old => old?,
        };
        if is_compressed(&old) || is_compressed(&new) {
            return Ok(None);
        }
        #[cfg(test)]
        self.encoder
            .made
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let file = self.temporary()?;
        let input = |digest, bytes| delta::Input { digest, bytes };
        match delta::make(input(from, &old), input(to, &new), file.as_file()) {
            Ok(()) => {}
            Err(MakeError::TooManyOperations { .. }) => return Ok(None),
            Err(error @ MakeError::Write { .. }) => return Err(failed(error.into())),
        }
        let object = |digest, bytes: &[u8]| delta::Object {
            digest,
            size: bytes.len() as u64,
        };
        let written = file.reopen().map_err(io_error("open", file.path()))?;
        let length = written
            .metadata()
            .map_err(io_error("read", file.path()))?
            .len();
        Delta::open(
            BufReader::new(written),
            object(from, &old),
            object(to, &new),
        )
        .and_then(|delta| delta.apply(|buffer, at| read_at(&old, buffer, at), io::sink()))
        .map_err(|error| failed(error.into()))?;
        let target_bytes = new.len() as u64;
        Ok(Some(Made {
            file,
            length,
            target_bytes,
        }))
    }

    /// The whole file, compressed where that helps.
    fn whole(&self, to: Digest) -> Result<Encoded, StoreError> {
        let object = self.open_object(&to)?;
        let path = self.object(&to);
        let size = object.metadata().map_err(io_error("read", &path))?.len();
        let encoded = |zstd, length, path| Encoded {
            encoding: PartEncoding {
                kind: PartKind::Full,
                zstd,
                from: None,
                to,
                length,
            },
            path,
        };
        let compressed = self.directory.join("fulls").join(full_name(to));
        if let Some(length) = sealed_length(&compressed) {
            return Ok(encoded(true, length, compressed));
        }
        let temporary = self.temporary()?;
        let length = compress(&object, size, temporary.as_file())
            .map_err(io_error("compress into", temporary.path()))?;
        if length > size / 100 * (100 - COMPRESSION_SAVES_MIN) {
            return Ok(encoded(false, size, path));
        }
        let length = self.keep_sealed(temporary, &compressed)?;
        Ok(encoded(true, length, compressed))
    }

    /// Seals a finished encoding and gives it its name. Returns the length of its content.
    fn keep_sealed(&self, file: NamedTempFile, path: &Path) -> Result<u64, StoreError> {
        let length = integrity::seal(file.as_file()).map_err(io_error("seal", file.path()))?;
        self.keep(file, path)?;
        let metadata = fs::metadata(path).map_err(io_error("read", path))?;
        self.whole.insert(path, &metadata);
        Ok(length)
    }
}

/// The length of a sealed file's content, if the file is there and long enough for a seal.
fn sealed_length(path: &Path) -> Option<u64> {
    let metadata = fs::metadata(path).ok()?;
    metadata.len().checked_sub(SEAL_BYTES)
}

fn full_name(to: Digest) -> String {
    format!("{to}.zst{SEALED}")
}

/// The object that the file of a compressed object is named after; `None` if it is not named like one.
pub(super) fn full_object(file_name: &str) -> Option<&str> {
    file_name.strip_suffix(SEALED)?.strip_suffix(".zst")
}

/// The name of a delta's file in `deltas/`. One of another format version has another name, and so
/// is never sent by a master that was updated.
pub(super) fn delta_name(from: Digest, to: Digest) -> String {
    format!("{from}-{to}{}", delta_suffix())
}

/// The objects that the file of a delta is named after; `None` if it is not named like one of the
/// format in use.
pub(super) fn delta_pair(file_name: &str) -> Option<(&str, &str)> {
    file_name.strip_suffix(&delta_suffix())?.split_once('-')
}

fn delta_suffix() -> String {
    format!(".v{VERSION}{SEALED}")
}

/// A delta that was made and does what it should.
struct Made {
    file: NamedTempFile,
    length: u64,
    target_bytes: u64,
}

/// Whether it is a container whose body is gzip, in which one changed line changes everything
/// after it.
fn is_compressed(bytes: &[u8]) -> bool {
    bytes.starts_with(b"ClamAV-VDB:") && bytes.get(HEADER_BYTES) == Some(&GZIP_MAGIC)
}

/// Fills `buffer` from offset `at`, as `pread` would.
fn read_at(bytes: &[u8], buffer: &mut [u8], at: u64) -> io::Result<()> {
    let range = usize::try_from(at)
        .ok()
        .and_then(|at| bytes.get(at..)?.get(..buffer.len()));
    buffer.copy_from_slice(range.ok_or(io::ErrorKind::UnexpectedEof)?);
    Ok(())
}

/// Writes `source` as one zstd frame and returns its length.
fn compress(mut source: &File, size: u64, mut target: &File) -> io::Result<u64> {
    let mut encoder = zstd::Encoder::new(&mut target, FULL_LEVEL)?;
    encoder.set_pledged_src_size(Some(size))?;
    io::copy(&mut source, &mut encoder)?;
    encoder.finish()?;
    Ok(target.metadata()?.len())
}

impl Encoder {
    fn forget(&self, pair: Pair) {
        lock(&self.flights).remove(&pair);
    }

    /// Forgets encodings of objects that are not kept.
    pub(super) fn retain(&self, kept: impl Fn(&Digest) -> bool) {
        lock(&self.flights)
            .retain(|pair, _| kept(&pair.to) && pair.from.as_ref().is_none_or(&kept));
    }
}

/// No lock here guards anything that a panic could leave half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
