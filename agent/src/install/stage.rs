//! Gets the files of a generation together, hidden, verified and on disk, before anything changes.
//!
//! `stage/DIGEST` is a whole file with that SHA-256, synced and readable for clamd. It comes from
//! what the host has already, as a hard link where the file is ours and as a copy where it is not,
//! or from the master. `stage/DIGEST.part` holds the encoded bytes that came so far and
//! `stage/DIGEST.part.json` says which encoding they are of, so that a lost connection, a restart
//! or another offer in between costs nothing. Stages go by digest, not by generation.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt as _;
use std::sync::Mutex;

use clamcast_proto::delta::{ApplyError, Delta, Object};
use clamcast_proto::manifest::{Manifest, ManifestFile};
use clamcast_proto::receipt::FileState;
use clamcast_proto::wire::{Have, NeedFile, PART_BYTES_MAX, Part, PartEncoding, PartKind};
use clamcast_proto::{DatabaseName, Digest};
use nix::unistd::geteuid;
use sha2::{Digest as _, Sha256};

use super::disk::{
    At, Call, DATABASE_MODE, Dir, Facts, HostFault, Inode, Output, RECORD_MODE, Tree,
};
use super::lock;

/// Bytes that stay free beyond what an install takes, for clamd's temporary files and logs, which
/// often share the file system.
pub const SPACE_RESERVE_BYTES: u64 = 16 << 20;

/// A part may be this much longer than its file: headers of a file that does not compress.
const PART_OVERHEAD_BYTES: u64 = 1 << 20;

/// Largest window of a full file's zstd frame, as a power of two: the decoder allocates it, and a
/// small guest has 16 MiB for all of this.
const ZSTD_WINDOW_LOG_MAX: u32 = 22;

/// Bytes moved at a time.
const BUFFER_BYTES: usize = 128 << 10;

/// Where a file is made before it gets its name: its own name never holds a part of it.
pub(super) const PLACE: At<'_> = At(Dir::Hidden, "place");

/// Why a part was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The host's fault: the outcome is `host_fault`.
    #[error("cannot take {name}")]
    Host {
        /// Which file.
        name: DatabaseName,
        /// What stands in the way.
        source: HostFault,
    },
    /// The stream ended early. What came is kept: ask again, from where it ended.
    #[error("the transfer of {name} was interrupted")]
    Interrupted {
        /// Which file.
        name: DatabaseName,
        /// Why.
        source: io::Error,
    },
    /// What came is not what it was to be, and was thrown away: ask again, for the full file.
    #[error("the part for {name} is damaged: {reason}")]
    Damaged {
        /// Which file.
        name: DatabaseName,
        /// What is wrong with it.
        reason: String,
    },
    /// Not a part that was asked for.
    #[error("the part for {name} was not asked for: {reason}")]
    Unexpected {
        /// Which file.
        name: DatabaseName,
        /// What is wrong with it.
        reason: String,
    },
}

/// Digests of files that were read since the last plan, by inode. It lives from a plan to the end
/// of its install, so that no file is read twice in between.
#[derive(Debug, Default)]
pub(super) struct Known(Mutex<HashMap<Inode, Hashed>>);

#[derive(Debug)]
struct Hashed {
    size: u64,
    modified: i128,
    digest: Digest,
}

impl Known {
    pub(super) fn clear(&self) {
        lock(&self.0).clear();
    }

    fn find(&self, facts: &Facts) -> Option<Digest> {
        let known = lock(&self.0);
        let hashed = known.get(&facts.inode)?;
        let same = hashed.size == facts.size && hashed.modified == facts.modified;
        same.then_some(hashed.digest)
    }

    fn insert(&self, facts: &Facts, digest: Digest) {
        let (size, modified) = (facts.size, facts.modified);
        let hashed = Hashed {
            size,
            modified,
            digest,
        };
        lock(&self.0).insert(facts.inode, hashed);
    }
}

/// Digests that are being received, so that nobody else touches their files.
#[derive(Debug, Default)]
pub(super) struct Receiving(Mutex<HashSet<Digest>>);

impl Receiving {
    fn contains(&self, digest: &Digest) -> bool {
        lock(&self.0).contains(digest)
    }

    fn claim(&self, digest: Digest) -> Option<Claim<'_>> {
        // Made only if the claim is ours: dropping one gives the digest free again.
        lock(&self.0).insert(digest).then(|| Claim(self, digest))
    }
}

struct Claim<'r>(&'r Receiving, Digest);

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        lock(&self.0.0).remove(&self.1);
    }
}

/// The stage, and where else a file may be found.
pub(super) struct Stage<'a> {
    pub(super) tree: &'a Tree,
    pub(super) known: &'a Known,
    pub(super) receiving: &'a Receiving,
}

/// Directories that may hold a file under its own name, the likeliest first.
const SOURCES: [Dir; 3] = [Dir::Databases, Dir::Current, Dir::Previous];

impl Stage<'_> {
    /// Stages what is on the host and says what is missing, and from what it could be made.
    pub(super) fn plan(
        &self,
        manifest: &Manifest,
        installed: Option<&Manifest>,
        full: bool,
    ) -> Result<Vec<NeedFile>, HostFault> {
        self.drop_stale(manifest)?;
        let mut needs = Vec::new();
        let mut needed_bytes = 0;
        let mut asked = BTreeSet::new();
        for file in &manifest.files {
            let state = state_of(file);
            if asked.contains(&file.sha256) {
                continue; // two names of one content: it is staged once
            }
            if self.receiving.contains(&file.sha256) || !self.ensure(&state)? {
                let need = self.need(file, installed, full)?;
                needed_bytes += file.size.saturating_sub(need.resume_at);
                needs.push(need);
                asked.insert(file.sha256);
            }
        }
        self.tree.sync_dir(Dir::Stage)?;
        if !needs.is_empty() {
            self.tree.check_space(needed_bytes + SPACE_RESERVE_BYTES)?;
        }
        Ok(needs)
    }

    /// Removes what this manifest has no use for.
    fn drop_stale(&self, manifest: &Manifest) -> Result<(), HostFault> {
        let wanted: BTreeSet<_> = manifest
            .files
            .iter()
            .map(|f| f.sha256.to_string())
            .collect();
        for name in self.tree.list(Dir::Stage)? {
            let name = name.to_string_lossy().into_owned();
            let (digest, kind) = name.split_once('.').unwrap_or((&name, ""));
            let keep = wanted.contains(digest) && kind != "new";
            let busy = digest
                .parse()
                .is_ok_and(|digest| self.receiving.contains(&digest));
            if !keep && !busy {
                self.tree.remove(At(Dir::Stage, &name))?;
            }
        }
        Ok(())
    }

    /// Whether the file is staged now.
    pub(super) fn ensure(&self, file: &FileState) -> Result<bool, HostFault> {
        let hex = file.sha256.to_string();
        let staged = At(Dir::Stage, &hex);
        if self
            .holds(staged, file)?
            .is_some_and(|facts| is_ours(&facts))
        {
            return Ok(true);
        }
        self.give_rights_back(At(Dir::Current, file.name.as_str()))?;
        for dir in SOURCES {
            let source = At(dir, file.name.as_str());
            if let Some(facts) = self.holds(source, file)?
                && self.take(source, &facts, staged, file)?
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whoever took the rights of an installed file away took them from our link to it, too. It is
    /// still ours.
    fn give_rights_back(&self, at: At<'_>) -> Result<(), HostFault> {
        let ours = |facts: &Facts| facts.regular && facts.owner == geteuid().as_raw();
        match self.tree.facts(at)?.filter(ours) {
            Some(facts) if facts.mode != DATABASE_MODE => self.tree.set_mode(at, DATABASE_MODE),
            Some(_) | None => Ok(()),
        }
    }

    /// Facts of the file if it is there with the right content. One that cannot be read is no
    /// source, and not a reason to stop: another one, or the master, has the content too.
    pub(super) fn holds(&self, at: At<'_>, file: &FileState) -> Result<Option<Facts>, HostFault> {
        match self.tree.facts(at)? {
            Some(facts) if facts.regular && facts.size == file.size => {}
            Some(_) | None => return Ok(None),
        }
        let found = self.state(at)?;
        Ok(found.and_then(|(facts, digest)| (digest == file.sha256).then_some(facts)))
    }

    /// What a file is, by reading it; `None` if it is not there or cannot be read.
    pub(super) fn state(&self, at: At<'_>) -> Result<Option<(Facts, Digest)>, HostFault> {
        let hashed = self.tree.open(at).and_then(|file| {
            let Some(mut file) = file else {
                return Ok(None);
            };
            let facts = file.facts().map_err(|e| unreadable(self.tree, at, e))?;
            if let Some(digest) = self.known.find(&facts) {
                return Ok(Some((facts, digest)));
            }
            let (size, digest) = self.tree.digest(at, &mut file, |_| Ok(()))?;
            if size == facts.size {
                self.known.insert(&facts, digest);
            }
            Ok(Some((Facts { size, ..facts }, digest)))
        });
        hashed.or_else(|fault| {
            tracing::warn!(error = %crate::chain(&fault), "taking this file as absent");
            Ok(None)
        })
    }

    /// Gives a file that is there its name in the stage.
    fn take(
        &self,
        source: At<'_>,
        facts: &Facts,
        staged: At<'_>,
        file: &FileState,
    ) -> Result<bool, HostFault> {
        self.tree.remove(PLACE)?;
        let linked = is_ours(facts)
            && self.is_synced(source, facts)?
            && self.tree.link(source, PLACE).is_ok() // not on every file system
            && self.tree.facts(PLACE)?.is_some_and(|now| now.inode == facts.inode);
        if !linked && !self.copy(source, file)? {
            return Ok(false);
        }
        self.tree.rename(PLACE, staged)?;
        Ok(true)
    }

    /// Makes a file durable. The process that wrote the file may have ended before it did so. This comes
    /// before the file gets another link: a link changes the inode, and a file system commits its journal
    /// to sync a changed inode, which takes milliseconds for each of thousands of files.
    fn is_synced(&self, source: At<'_>, facts: &Facts) -> Result<bool, HostFault> {
        let Some(file) = self.tree.open(source)? else {
            return Ok(false);
        };
        let failed = |error| unreadable(self.tree, source, error);
        file.sync().map_err(failed)?;
        let now = file.facts().map_err(failed)?;
        Ok(now.inode == facts.inode)
    }

    /// Another user's file, or one with other permissions: its owner could write into it.
    fn copy(&self, source: At<'_>, file: &FileState) -> Result<bool, HostFault> {
        self.tree.check_space(file.size + SPACE_RESERVE_BYTES)?;
        self.tree.remove(PLACE)?;
        let Some(mut input) = self.tree.open(source)? else {
            return Ok(false);
        };
        let mut output = self.tree.create(PLACE, DATABASE_MODE)?;
        let (size, digest) = self.tree.digest(source, &mut input, |bytes| {
            output
                .write_all(bytes)
                .map_err(|e| unwritten(self.tree, PLACE, e))
        })?;
        output.sync().map_err(|e| unwritten(self.tree, PLACE, e))?;
        Ok((size, digest) == (file.size, file.sha256))
    }

    fn need(
        &self,
        file: &ManifestFile,
        installed: Option<&Manifest>,
        full: bool,
    ) -> Result<NeedFile, HostFault> {
        let base = match full {
            true => None,
            false => self.base(&file.name, installed)?,
        };
        let have = base.map_or(Have::Nothing, Have::Sha256);
        let spool = self.spool(&file.sha256)?;
        let spool = spool.filter(|(encoding, _)| match (encoding.kind, encoding.from) {
            (PartKind::Full, None) => true,
            (PartKind::Delta, Some(from)) => Some(from) == base,
            (PartKind::Full | PartKind::Delta | PartKind::Signature | PartKind::Ranges, _) => false,
        });
        let (resume, resume_at) = spool.unzip();
        Ok(NeedFile {
            name: file.name.clone(),
            have,
            resume_at: resume_at.unwrap_or_default(),
            resume,
        })
    }

    /// The digest of an old file that the new one is likely to resemble: the installed one of this
    /// name or of its other form, which the master certainly had, else what really stands there.
    fn base(
        &self,
        name: &DatabaseName,
        installed: Option<&Manifest>,
    ) -> Result<Option<Digest>, HostFault> {
        let forms = [Some(name.clone()), name.other_form()];
        for form in forms.iter().flatten() {
            let Some(file) = installed.and_then(|manifest| manifest.file(form)) else {
                continue;
            };
            for dir in SOURCES {
                if self
                    .holds(At(dir, form.as_str()), &state_of(file))?
                    .is_some()
                {
                    return Ok(Some(file.sha256));
                }
            }
        }
        for form in forms.iter().flatten() {
            if let Some((_, digest)) = self.state(At(Dir::Databases, form.as_str()))? {
                return Ok(Some(digest));
            }
        }
        Ok(None)
    }

    /// What came of a file so far, if anything.
    fn spool(&self, digest: &Digest) -> Result<Option<(PartEncoding, u64)>, HostFault> {
        let names = SpoolNames::of(digest);
        let Some(json) = self.tree.read(names.encoding(), PART_BYTES_MAX as u64)? else {
            return Ok(None);
        };
        let Some(facts) = self.tree.facts(names.part())? else {
            return Ok(None);
        };
        let encoding = serde_json::from_slice::<PartEncoding>(&json).ok();
        let encoding = encoding.filter(|e| e.to == *digest && facts.size <= e.length);
        Ok(encoding.map(|encoding| (encoding, facts.size)))
    }

    /// Takes a part: keeps the encoded bytes, builds the file and checks it, all in one pass.
    pub(super) fn receive(
        &self,
        part: &Part,
        file: &ManifestFile,
        installed: Option<&Manifest>,
        bytes: impl Read,
    ) -> Result<(), ReceiveError> {
        let name = &file.name;
        let host = |source| ReceiveError::Host {
            name: name.clone(),
            source,
        };
        let unexpected = |reason: &str| ReceiveError::Unexpected {
            name: name.clone(),
            reason: reason.to_owned(),
        };
        self.check_part(part, file).map_err(unexpected)?;
        let Some(_claim) = self.receiving.claim(file.sha256) else {
            return Err(unexpected("it is being received already"));
        };
        if self
            .holds(At(Dir::Stage, &file.sha256.to_string()), &state_of(file))
            .map_err(host)?
            .is_some()
        {
            return Ok(()); // two names with one content
        }
        let base = match part.encoding.from {
            None => None,
            Some(from) => Some(
                self.find_base(name, from, installed)
                    .map_err(host)?
                    .ok_or_else(|| unexpected("the file that it is made from is not here"))?,
            ),
        };
        let spooled = self.spool(&file.sha256).map_err(host)?;
        let spooled = spooled.filter(|(encoding, _)| *encoding == part.encoding);
        let offset = spooled.map_or(0, |(_, length)| length);
        if part.offset != 0 && part.offset != offset {
            return Err(unexpected("it does not go on where the last one ended"));
        }
        let left = part.encoding.length - part.offset;
        self.tree
            .check_space(left + file.size + SPACE_RESERVE_BYTES)
            .map_err(host)?;
        let received = self
            .start_spool(part)
            .and_then(|spool| Ok((spool, self.spooled(part)?)))
            .map_err(host)
            .and_then(|(output, already)| {
                let source = Source {
                    already,
                    incoming: bytes,
                    left,
                    spool: output,
                    failed: None,
                };
                self.build(part, file, base, source)
            });
        if let Err(error) = &received {
            self.give_up(&file.sha256, error);
        }
        received
    }

    fn check_part(&self, part: &Part, file: &ManifestFile) -> Result<(), &'static str> {
        let PartEncoding {
            kind,
            zstd,
            from,
            to,
            length,
        } = &part.encoding;
        if part.name != file.name || *to != file.sha256 {
            return Err("it makes another file");
        }
        if part.offset > *length {
            return Err("it starts beyond its end");
        }
        match (kind, from) {
            (PartKind::Full, None) if !zstd && *length != file.size => {
                Err("it has another length than the file")
            }
            (PartKind::Full, None) | (PartKind::Delta, Some(_))
                if *length > file.size + PART_OVERHEAD_BYTES =>
            {
                Err("it is longer than the file")
            }
            (PartKind::Full, None) => Ok(()),
            (PartKind::Delta, Some(_)) if !zstd => Ok(()),
            (PartKind::Delta | PartKind::Full, _) => Err("its kind and its base do not agree"),
            (PartKind::Signature | PartKind::Ranges, _) => Err("no search was asked for"),
        }
    }

    fn find_base(
        &self,
        name: &DatabaseName,
        digest: Digest,
        installed: Option<&Manifest>,
    ) -> Result<Option<(Object, std::fs::File)>, HostFault> {
        let forms = [Some(name.clone()), name.other_form()];
        for form in forms.iter().flatten() {
            let size = installed
                .and_then(|manifest| manifest.file(form))
                .filter(|file| file.sha256 == digest)
                .map(|file| file.size);
            for dir in SOURCES {
                let at = At(dir, form.as_str());
                if size.is_some() && self.tree.facts(at)?.map(|facts| facts.size) != size {
                    continue;
                }
                let found = self.state(at)?.filter(|(_, found)| *found == digest);
                if let (Some((facts, _)), Some(file)) = (found, self.tree.open(at)?) {
                    let size = facts.size;
                    return Ok(Some((Object { digest, size }, file.into_file())));
                }
            }
        }
        Ok(None)
    }

    /// Opens the spool for what comes, empty or at its end.
    fn start_spool(&self, part: &Part) -> Result<Output, HostFault> {
        let names = SpoolNames::of(&part.encoding.to);
        self.tree.remove(names.unfinished())?;
        if part.offset > 0 {
            return self.tree.append(names.part());
        }
        self.tree.remove(names.encoding())?;
        self.tree.remove(names.part())?;
        let spool = self.tree.create(names.part(), DATABASE_MODE)?;
        let json = serde_json::to_vec(&part.encoding).expect("our own records serialise");
        self.tree.write_new(names.encoding(), &json, RECORD_MODE)?;
        Ok(spool)
    }

    /// What the spool holds already, to be read once more.
    fn spooled(&self, part: &Part) -> Result<Box<dyn Read + Send>, HostFault> {
        if part.offset == 0 {
            return Ok(Box::new(io::empty()));
        }
        let names = SpoolNames::of(&part.encoding.to);
        Ok(match self.tree.open(names.part())? {
            Some(spool) => Box::new(spool.take(part.offset)),
            None => Box::new(io::empty()),
        })
    }

    fn build(
        &self,
        part: &Part,
        file: &ManifestFile,
        base: Option<(Object, std::fs::File)>,
        mut source: Source<impl Read>,
    ) -> Result<(), ReceiveError> {
        let names = SpoolNames::of(&file.sha256);
        let name = &file.name;
        let host = |source| ReceiveError::Host {
            name: name.clone(),
            source,
        };
        let plain = part.encoding.kind == PartKind::Full && !part.encoding.zstd;
        let built = if plain {
            // The encoded bytes are the file: the spool gets its name.
            let checked = exact_copy(&mut source, io::sink(), file);
            checked.and_then(|()| source.spool.sync().map_err(Fault::Write))
        } else {
            let mut output = self
                .tree
                .create(names.unfinished(), DATABASE_MODE)
                .map_err(host)?;
            let written = match base {
                Some((old, base)) => apply(&mut source, old, &base, file, &mut output),
                None => inflate(&mut source, &mut output, file),
            };
            written.and_then(|()| output.sync().map_err(Fault::Write))
        };
        if let Some(error) = source.failed.take() {
            return Err(host(unwritten(self.tree, names.part(), error)));
        }
        let all_came = source.left == 0;
        built.map_err(|fault| match fault {
            // To go on from its end would never end.
            Fault::Stream(_) if all_came => ReceiveError::Damaged {
                name: name.clone(),
                reason: "it ends before the file does".to_owned(),
            },
            Fault::Stream(source) => ReceiveError::Interrupted {
                name: name.clone(),
                source,
            },
            Fault::Content(reason) => ReceiveError::Damaged {
                name: name.clone(),
                reason,
            },
            Fault::Write(error) => host(unwritten(self.tree, names.unfinished(), error)),
            Fault::Read(error) => host(unreadable(
                self.tree,
                At(Dir::Databases, name.as_str()),
                error,
            )),
        })?;
        let made = if plain {
            names.part()
        } else {
            names.unfinished()
        };
        let named = || -> Result<(), HostFault> {
            if let Some(facts) = self.tree.facts(made)? {
                self.known.insert(&facts, file.sha256);
            }
            self.tree.rename(made, names.staged())?;
            self.tree.remove(names.part())?;
            self.tree.remove(names.encoding())?;
            self.tree.sync_dir(Dir::Stage)
        };
        named().map_err(host)
    }

    /// What to keep of a transfer that failed. These removals may fail with the disk; the next plan
    /// finds what is left.
    fn give_up(&self, digest: &Digest, error: &ReceiveError) {
        let names = SpoolNames::of(digest);
        let keep_spool = match error {
            ReceiveError::Interrupted { .. } | ReceiveError::Unexpected { .. } => true,
            ReceiveError::Damaged { .. } => false,
            ReceiveError::Host { source, .. } => !is_full(source),
        };
        let _ = self.tree.remove(names.unfinished());
        if !keep_spool {
            let _ = self.tree.remove(names.encoding());
            let _ = self.tree.remove(names.part());
        }
    }
}

/// Where the disk is full, what was received goes too: it would keep others from writing.
fn is_full(fault: &HostFault) -> bool {
    match fault {
        HostFault::Space { .. } => true,
        HostFault::Io { source, .. } => matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        ),
        HostFault::NoDirectory { .. }
        | HostFault::NotOurs { .. }
        | HostFault::Planted { .. }
        | HostFault::Unstaged { .. }
        | HostFault::Shared { .. }
        | HostFault::Unfinished { .. } => false,
    }
}

/// A file may become clamd's only if nobody else can write into it and clamd can read it.
fn is_ours(facts: &Facts) -> bool {
    facts.regular && facts.owner == geteuid().as_raw() && facts.mode == DATABASE_MODE
}

pub(super) fn state_of(file: &ManifestFile) -> FileState {
    FileState {
        name: file.name.clone(),
        size: file.size,
        sha256: file.sha256,
    }
}

fn unreadable(tree: &Tree, at: At<'_>, source: io::Error) -> HostFault {
    tree.fault(&Call::Read(at), source)
}

fn unwritten(tree: &Tree, at: At<'_>, source: io::Error) -> HostFault {
    tree.fault(&Call::Write(at), source)
}

/// The names that belong to one digest in the stage.
struct SpoolNames {
    staged: String,
    unfinished: String,
    part: String,
    encoding: String,
}

impl SpoolNames {
    fn of(digest: &Digest) -> Self {
        Self {
            staged: digest.to_string(),
            unfinished: format!("{digest}.new"),
            part: format!("{digest}.part"),
            encoding: format!("{digest}.part.json"),
        }
    }

    fn staged(&self) -> At<'_> {
        At(Dir::Stage, &self.staged)
    }

    fn unfinished(&self) -> At<'_> {
        At(Dir::Stage, &self.unfinished)
    }

    fn part(&self) -> At<'_> {
        At(Dir::Stage, &self.part)
    }

    fn encoding(&self) -> At<'_> {
        At(Dir::Stage, &self.encoding)
    }
}

/// The encoded bytes: first those that came before, then those that come, which are kept.
struct Source<R> {
    already: Box<dyn Read + Send>,
    incoming: R,
    /// Bytes that are still to come.
    left: u64,
    spool: Output,
    /// Why nothing more could be kept.
    failed: Option<io::Error>,
}

impl<R: Read> Read for Source<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.already.read(buffer)?;
        if read > 0 || buffer.is_empty() || self.left == 0 {
            return Ok(read);
        }
        let room = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let read = self.incoming.read(&mut buffer[..room])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Err(error) = self.spool.write_all(&buffer[..read]) {
            let told = io::Error::new(error.kind(), "what came could not be kept");
            self.failed = Some(error);
            return Err(told);
        }
        self.left -= read as u64;
        Ok(read)
    }
}

/// Why a file could not be built.
enum Fault {
    /// The stream of encoded bytes ended or failed.
    Stream(io::Error),
    /// The bytes are wrong.
    Content(String),
    /// The new file could not be written.
    Write(io::Error),
    /// The old file could not be read.
    Read(io::Error),
}

/// Copies exactly the file, of the right digest.
fn exact_copy(mut from: impl Read, mut to: impl Write, file: &ManifestFile) -> Result<(), Fault> {
    let mut hasher = Sha256::new();
    let mut left = file.size;
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let read = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Fault::Stream(error)),
        };
        left = left
            .checked_sub(read as u64)
            .ok_or_else(|| Fault::Content(format!("it makes more than {} bytes", file.size)))?;
        hasher.update(&buffer[..read]);
        to.write_all(&buffer[..read]).map_err(Fault::Write)?;
    }
    let made = Digest::finish(hasher);
    if left > 0 || made != file.sha256 {
        return Err(Fault::Content(format!(
            "it makes {made} and {left} bytes are missing, expected {}",
            file.sha256
        )));
    }
    Ok(())
}

fn inflate(
    source: &mut Source<impl Read>,
    to: impl Write,
    file: &ManifestFile,
) -> Result<(), Fault> {
    let mut decoder = zstd::stream::read::Decoder::new(&mut *source).map_err(Fault::Stream)?;
    decoder
        .window_log_max(ZSTD_WINDOW_LOG_MAX)
        .map_err(Fault::Stream)?;
    let mut decoder = decoder.single_frame();
    match exact_copy(&mut decoder, to, file) {
        Err(Fault::Stream(error)) if !was_cut(&error) => Err(Fault::Content(error.to_string())),
        other => other,
    }?;
    drop(decoder);
    match source.left {
        0 => Ok(()),
        left => Err(Fault::Content(format!("{left} bytes follow its end"))),
    }
}

/// A stream's own errors carry a code of the system or say that it ended; zstd's do neither.
fn was_cut(error: &io::Error) -> bool {
    error.raw_os_error().is_some()
        || !matches!(
            error.kind(),
            io::ErrorKind::Other | io::ErrorKind::InvalidData
        )
}

fn apply(
    source: &mut Source<impl Read>,
    old: Object,
    base: &std::fs::File,
    file: &ManifestFile,
    to: impl Write,
) -> Result<(), Fault> {
    let new = Object {
        digest: file.sha256,
        size: file.size,
    };
    let read_old = |buffer: &mut [u8], offset| base.read_exact_at(buffer, offset);
    let applied = Delta::open(source, old, new).and_then(|delta| delta.apply(read_old, to));
    applied.map_err(|error| match error {
        ApplyError::Receive { source } => Fault::Stream(source),
        ApplyError::ReadOld { source, .. } => Fault::Read(source),
        ApplyError::Write { source } => Fault::Write(source),
        error @ (ApplyError::Unknown { .. }
        | ApplyError::WrongBase { .. }
        | ApplyError::WrongTarget { .. }
        | ApplyError::Damaged { .. }
        | ApplyError::Inflate { .. }
        | ApplyError::WrongResult { .. }) => Fault::Content(crate::chain(&error)),
    })
}
