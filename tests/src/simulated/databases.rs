//! The contents of databases, kept once however many agents have them.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::{Arc, Mutex};

use clamcast_proto::delta::{ApplyError, Delta, Object};
use clamcast_proto::manifest::ManifestFile;
use clamcast_proto::wire::{PartEncoding, PartKind};
use clamcast_proto::{DatabaseName, Digest};

/// What an agent's directory holds.
pub(super) type Disk = BTreeMap<DatabaseName, Object>;

/// All contents, by their digests.
#[derive(Debug, Default)]
pub(super) struct Databases(Mutex<HashMap<Digest, Arc<Vec<u8>>>>);

/// A part does not make its file.
#[derive(Debug, thiserror::Error)]
pub(super) enum MakeError {
    #[error("it is from a file that nobody here has")]
    Base,
    #[error("the delta does not make it")]
    Delta(#[from] ApplyError),
    #[error("the file does not inflate")]
    Inflate(#[source] io::Error),
    #[error("it makes {0}")]
    Other(Object),
    #[error("no agent asks for a part of that kind")]
    Kind,
}

impl Databases {
    /// The databases in `directory`, and the list of them.
    pub(super) fn read(directory: &Path) -> (Self, Disk) {
        let (databases, mut disk) = (Self::default(), Disk::new());
        for entry in fs::read_dir(directory).expect("a directory of databases") {
            let path = entry.expect("a directory of databases").path();
            let name = path.file_name().and_then(|name| name.to_str());
            let Some(Ok(name)) = name.map(str::parse::<DatabaseName>) else {
                continue;
            };
            let bytes = fs::read(&path).expect("a database can be read");
            let object = object(&bytes);
            databases.keep(object.digest, bytes);
            disk.insert(name, object);
        }
        (databases, disk)
    }

    fn content(&self, digest: &Digest) -> Option<Arc<Vec<u8>>> {
        let contents = self.0.lock().expect("nothing panics with it");
        contents.get(digest).cloned()
    }

    fn keep(&self, digest: Digest, bytes: Vec<u8>) {
        let mut contents = self.0.lock().expect("nothing panics with it");
        contents.entry(digest).or_insert_with(|| Arc::new(bytes));
    }

    /// Makes `file` from the encoded bytes and the file `base`, and checks length and SHA-256. It
    /// is all done whoever has made it before; only the first result is kept. Blocking.
    pub(super) fn make(
        &self,
        encoding: &PartEncoding,
        bytes: &[u8],
        base: Option<Object>,
        file: &ManifestFile,
    ) -> Result<Object, MakeError> {
        let new = Object {
            digest: file.sha256,
            size: file.size,
        };
        let mut made = Made::new(self.content(&new.digest).is_none());
        match (encoding.kind, base) {
            (PartKind::Delta, Some(old)) => {
                let base = self.content(&old.digest).ok_or(MakeError::Base)?;
                let read_old = |buffer: &mut [u8], offset: u64| {
                    let start = usize::try_from(offset).map_err(io::Error::other)?;
                    let part = base.get(start..).and_then(|rest| rest.get(..buffer.len()));
                    buffer.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
                    Ok(())
                };
                Delta::open(bytes, old, new)?.apply(read_old, &mut made)?;
            }
            (PartKind::Full, _) => {
                let mut whole = Vec::new();
                if encoding.zstd {
                    let decoder = zstd::stream::read::Decoder::new(bytes);
                    let decoder = decoder.map_err(MakeError::Inflate)?;
                    let inflated = decoder.take(new.size + 1).read_to_end(&mut whole);
                    inflated.map_err(MakeError::Inflate)?;
                } else {
                    whole.extend(bytes);
                }
                let found = object(&whole);
                if found != new {
                    return Err(MakeError::Other(found));
                }
                made.0 = made.0.map(|_| whole);
            }
            (PartKind::Delta | PartKind::Signature | PartKind::Ranges, _) => {
                return Err(MakeError::Kind);
            }
        }
        if let Some(bytes) = made.0 {
            self.keep(new.digest, bytes);
        }
        Ok(new)
    }
}

/// Keeps what is written if nobody has it yet.
struct Made(Option<Vec<u8>>);

impl Made {
    fn new(is_first: bool) -> Self {
        Self(is_first.then(Vec::new))
    }
}

impl io::Write for Made {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(kept) = &mut self.0 {
            kept.extend(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn object(bytes: &[u8]) -> Object {
    Object {
        digest: Digest::of(bytes),
        size: bytes.len() as u64,
    }
}
