//! How an object travels, worked out once however many agents ask at the same time.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufReader};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use clamcast_proto::Digest;
use clamcast_proto::container::HEADER_BYTES;
use clamcast_proto::delta::{self, Delta, MakeError, VERSION};
use clamcast_proto::manifest::ManifestFile;
use clamcast_proto::wire::{Have, PartEncoding, PartKind};
use tempfile::NamedTempFile;

use super::{Store, StoreError, io_error, map};

/// Encodings that are made at the same time: a delta takes up to 100 MiB of memory, and agents
/// that were away may ask from many old generations at once.
const MAKERS_MAX: usize = 2;

/// A compressed file must be smaller by this much, or it travels as it is and spares the agents
/// the inflating.
const COMPRESSION_SAVES_MIN: u64 = 5; // percent

/// zstd level of full files. Higher ones do no better on signatures, which are mostly hexadecimal
/// digits of random numbers, and take ten times as long.
const FULL_LEVEL: i32 = 1;

/// A delta of at most this part of the file is smaller than the file compressed, without
/// compressing it to see: signatures never shrink to a tenth.
const OBVIOUS_SHARE: u64 = 16;

/// First byte of a gzip stream (RFC 1952).
const GZIP_MAGIC: u8 = 0x1f;

/// An encoded part, ready to be sent.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// Names it, as the agent is told.
    pub encoding: PartEncoding,
    /// Where its bytes are. Whoever opened it may read on after the store has removed it.
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
    makers: Makers,
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
    /// Blocks while it is made, or while somebody else makes the same one.
    pub fn encode(
        &self,
        have: &Have,
        target: &ManifestFile,
        full: bool,
    ) -> Result<Encoded, StoreError> {
        let pair = self.pair(have, target, full);
        let encoded = self.made_once(pair)?;
        if encoded.path.is_file() {
            return Ok(encoded);
        }
        // Retention took it, and somebody asks again: it is made again if its objects are there.
        self.encoder.forget(pair);
        self.made_once(pair)
    }

    /// Which encoding that is. What an agent claims to have counts only if it is in the store: else
    /// each unknown digest would be an encoding of its own, and all of them the same file.
    pub(crate) fn pair(&self, have: &Have, target: &ManifestFile, full: bool) -> Pair {
        let to = target.sha256;
        let from = match have {
            Have::Sha256(from) if !full && *from != to && self.object(from).is_file() => {
                Some(*from)
            }
            Have::Sha256(_) | Have::Search | Have::Ranges(_) | Have::Nothing => None,
        };
        Pair { from, to }
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
        if let Ok(metadata) = fs::metadata(&path) {
            return Ok(encoded(metadata.len(), path)); // only those that are worth it are kept
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
        self.keep(delta.file, &path)?;
        Ok(encoded(delta.length, path))
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
        let (old, new) = (map(from)?, map(to)?);
        if is_compressed(&old) || is_compressed(&new) {
            return Ok(None);
        }
        let _maker = self.encoder.makers.enter();
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
        let compressed = self.directory.join("fulls").join(format!("{to}.zst"));
        if let Ok(metadata) = fs::metadata(&compressed) {
            return Ok(encoded(true, metadata.len(), compressed));
        }
        let _maker = self.encoder.makers.enter();
        let temporary = self.temporary()?;
        let length = compress(&object, size, temporary.as_file())
            .map_err(io_error("compress into", temporary.path()))?;
        if length > size / 100 * (100 - COMPRESSION_SAVES_MIN) {
            return Ok(encoded(false, size, path));
        }
        self.keep(temporary, &compressed)?;
        Ok(encoded(true, length, compressed))
    }
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
    format!(".v{VERSION}")
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

/// Lets a few in at a time.
#[derive(Debug, Default)]
struct Makers {
    busy: Mutex<usize>,
    left: Condvar,
}

struct Maker<'m>(&'m Makers);

impl Makers {
    fn enter(&self) -> Maker<'_> {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let limit = cores.min(MAKERS_MAX);
        let mut busy = lock(&self.busy);
        while *busy >= limit {
            busy = self.left.wait(busy).unwrap_or_else(PoisonError::into_inner);
        }
        *busy += 1;
        Maker(self)
    }
}

impl Drop for Maker<'_> {
    fn drop(&mut self) {
        *lock(&self.0.busy) -= 1;
        self.0.left.notify_one();
    }
}

/// No lock here guards anything that a panic could leave half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
