//! The audit log on disk: a directory with three files.
//!
//! | file | holds |
//! |---|---|
//! | `log.jsonl` | the records, one a line ([`clamcast_proto::audit`] has the format) |
//! | `checkpoint` | the signed head of the Merkle tree over these lines |
//! | `leaves` | the leaf hash of each line, 32 bytes each: only to say *which* line was touched |
//!
//! A line is written and synced first, then the checkpoint that covers it, and only then is the
//! record acknowledged. A crash between the two leaves lines that no checkpoint covers and that
//! nobody was told of; opening the log removes them. They are never signed afterwards: else whoever
//! can write to the file could have a forged line signed by restarting the daemon.
//!
//! What the files alone cannot show is that all of them were replaced by an older copy of themselves,
//! or removed. That takes somebody who remembers a later checkpoint, which is why agents are sent them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use clamcast_proto::audit::{
    CHECKPOINT_BYTES_MAX, Checkpoint, CheckpointError, LINE_BYTES_MAX, Origin, OriginError, Tree,
    leaf_hash,
};
pub use clamcast_proto::audit::{Draft, Record};
use clamcast_proto::digest::Digest;
use clamcast_proto::dsse::PublicKey;
use ed25519_dalek::SigningKey;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{durable, pulse};

/// Name of the file with the records.
pub const LOG: &str = "log.jsonl";
/// Name of the file with the signed head.
pub const CHECKPOINT: &str = "checkpoint";
/// Name of the file with the leaf hashes.
pub const LEAVES: &str = "leaves";

/// Records that are signed together at most, and so the lines that a crash can leave uncovered. More
/// than these were not left by us.
pub const BATCH_MAX: usize = 256;

/// How much of removed lines is kept for the warning, in bytes.
const REPAIR_TEXT_BYTES_MAX: u64 = 4 << 10;

/// A leaf hash's length in `leaves`, in bytes.
const LEAF_BYTES: u64 = 32;

/// Why the audit log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// There is none.
    #[error("there is no audit log in {dir}")]
    Missing {
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// The log's own name is unusable.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The log is not what was signed.
    #[error(
        "the audit log in {dir} is not what was signed: {bad}; keep it as evidence and move the directory away, then a new log is begun"
    )]
    Bad {
        /// The log.
        dir: PathBuf,
        /// Where and what.
        bad: Box<Bad>,
    },
    /// Somebody else wrote to the file while we had it open.
    #[error(
        "{path} was changed or replaced by somebody else, nothing more is recorded; `audit verify` says where"
    )]
    Touched {
        /// The file.
        path: PathBuf,
    },
    /// A record is longer than a line may be.
    #[error("a record of `{event}` has {bytes} bytes, at most {LINE_BYTES_MAX} are allowed")]
    TooLong {
        /// Its event.
        event: String,
        /// The length of its line.
        bytes: usize,
    },
    /// A line is no record.
    #[error("line {line} of {path} is not a record; `audit verify` says whether it was touched")]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// Why, if it is a line at all.
        source: Option<serde_json::Error>,
    },
}

/// The first line that is not as it was signed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("line {line}: {fault}")]
pub struct Bad {
    /// The line, from 1: the first of those that are not known to be good.
    pub line: u64,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What is wrong with a log.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Fault {
    /// Nothing says what the log should be.
    #[error("there is no checkpoint, so nothing is verified")]
    NoCheckpoint,
    /// What says it is not to be believed.
    #[error("nothing is verified: {0}")]
    Checkpoint(String),
    /// This line is the first that differs.
    #[error("not the line that was signed; it was changed, or lines were inserted or removed here")]
    Changed,
    /// The log ends too early.
    #[error("missing; the log was cut off here, {signed} records were signed")]
    CutOff {
        /// How many records the checkpoint covers.
        signed: u64,
    },
    /// Something differs, and the file that would tell where does so, too.
    #[error(
        "something was changed in lines 1 to {signed}{}; `{LEAVES}`, which would tell where, was changed, too", disordered.map_or(String::new(), |line| format!(" (line {line} is out of order)"))
    )]
    Somewhere {
        /// How many records the checkpoint covers.
        signed: u64,
        /// The first line whose number is not its own.
        disordered: Option<u64>,
    },
    /// Signed, but not a record with the right number: a mistake of ours.
    #[error("signed, but not a record with this number")]
    NotARecord,
    /// Lines that no checkpoint covers.
    #[error(
        "not signed, nor what follows; it was added by somebody else, or a crash interrupted the recording (then the daemon's next start removes it)"
    )]
    Uncovered,
}

/// The audit log of this host, open for appending. One at a time: the daemon's lock on its state
/// directory sees to that.
#[derive(Debug)]
pub struct Log {
    dir: PathBuf,
    origin: Origin,
    key: SigningKey,
    /// Keys that may have signed the log before this one.
    former: Vec<PublicKey>,
    file: File,
    leaves: File,
    tree: Tree,
    /// Length of the file in bytes.
    length: u64,
    /// The last checkpoint that is on disk.
    checkpoint: String,
    /// Lines are on disk that no checkpoint on disk is known to cover.
    unsigned: bool,
    /// A failed write may have left part of a line.
    torn: bool,
    repair: Option<Repair>,
}

/// What opening a log removed: lines that a crash left behind, which nobody was told of.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Repair {
    /// How many bytes.
    pub bytes: u64,
    /// The beginning of them.
    pub text: String,
}

impl Log {
    /// Opens the log in `dir`, or begins one there, to be signed with `key` in the name of `origin`.
    /// Reads all of it: a log that is not what was signed is an error, lines that a crash left are
    /// removed (see [`Log::repair`]).
    pub fn open(dir: &Path, key: SigningKey, origin: String) -> Result<Self, AuditError> {
        Self::open_after(dir, key, &[], origin)
    }

    /// [`Log::open`] for a log that any of the `former` keys may have signed last. It is signed with
    /// `key` before this returns, so that it can be verified when the former keys no longer count.
    pub fn open_after(
        dir: &Path,
        key: SigningKey,
        former: &[PublicKey],
        origin: String,
    ) -> Result<Self, AuditError> {
        let origin: Origin = origin.parse()?;
        durable::create_dir(dir, 0o700).map_err(cannot_write(dir))?;
        let open = |name| {
            let path = dir.join(name);
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .map_err(cannot_write(&path))
        };
        let mut log = Self {
            file: open(LOG)?,
            leaves: open(LEAVES)?,
            dir: dir.to_owned(),
            origin,
            key,
            former: former.to_vec(),
            tree: Tree::default(),
            length: 0,
            checkpoint: String::new(),
            unsigned: false,
            torn: false,
            repair: None,
        };
        let empty = |file: &File| file.metadata().map(|found| found.len() == 0);
        let new = empty(&log.file).and_then(|new| Ok(new && empty(&log.leaves)?));
        if new.map_err(cannot_read(dir))? && !dir.join(CHECKPOINT).exists() {
            log.sign()?;
        } else {
            log.take_up()?;
        }
        Ok(log)
    }

    /// What was removed at opening because a crash had left it.
    pub fn repair(&self) -> Option<&Repair> {
        self.repair.as_ref()
    }

    /// The number of records.
    pub fn records(&self) -> u64 {
        self.tree.size()
    }

    /// The signed head of the log as it was last acknowledged.
    pub fn checkpoint(&self) -> String {
        self.checkpoint.clone()
    }

    /// Appends one record. After `Ok` it is on disk and signed. After an error it may be there
    /// nevertheless, so whoever tries again may be recorded twice, but never not at all.
    pub fn append(&mut self, draft: Draft, now: Timestamp) -> Result<Record, AuditError> {
        let mut records = self.append_all(vec![draft], now)?;
        Ok(records.pop().expect("one draft, one record"))
    }

    /// Appends several records for little more than the cost of one: what costs is syncing to disk,
    /// which is done once for each [`BATCH_MAX`] of them.
    ///
    /// After an error [`Log::records`] tells how many of them are in the log; they are not signed,
    /// and so not to be told of, until a later call succeeds, be it one with no drafts.
    pub fn append_all(
        &mut self,
        drafts: Vec<Draft>,
        now: Timestamp,
    ) -> Result<Vec<Record>, AuditError> {
        let _waiting = pulse::on_disk();
        let mut records = Vec::with_capacity(drafts.len());
        let mut drafts = drafts.into_iter().peekable();
        while drafts.peek().is_some() {
            let batch = drafts.by_ref().take(BATCH_MAX);
            let numbered = batch.zip(self.tree.size() + 1..);
            let batch: Vec<_> = numbered
                .map(|(draft, seq)| draft.record(seq, now))
                .collect();
            let failed = cannot_write(&self.dir.join(LOG));
            // Whoever verifies meanwhile takes the same lock, and so sees lines with their checkpoint.
            self.file.lock().map_err(&failed)?;
            let written = self.append_batch(&batch);
            self.file.unlock().map_err(&failed)?;
            written?;
            records.extend(batch);
        }
        if self.unsigned {
            self.sign()?;
        }
        Ok(records)
    }

    fn append_batch(&mut self, records: &[Record]) -> Result<(), AuditError> {
        self.check_untouched()?;
        // Else one failed checkpoint after the other would leave more uncovered than BATCH_MAX.
        if self.unsigned {
            self.sign()?;
        }
        let mut lines = Vec::new();
        let mut tree = self.tree.clone();
        let mut leaves = Vec::new();
        for record in records {
            let line = record.line();
            if line.len() > LINE_BYTES_MAX {
                return Err(AuditError::TooLong {
                    event: record.event.clone(),
                    bytes: line.len(),
                });
            }
            let leaf = leaf_hash(line.as_bytes());
            tree.push(leaf);
            leaves.extend_from_slice(leaf.as_bytes());
            lines.extend_from_slice(line.as_bytes());
            lines.push(b'\n');
        }
        self.torn = true;
        self.file
            .write_all_at(&lines, self.length)
            .and_then(|()| self.file.sync_data())
            .map_err(cannot_write(&self.dir.join(LOG)))?;
        // Not synced: it only helps to say where, and opening the log makes it again.
        self.leaves
            .write_all_at(&leaves, self.tree.size() * LEAF_BYTES)
            .map_err(cannot_write(&self.dir.join(LEAVES)))?;
        self.torn = false;
        self.tree = tree;
        self.length += lines.len() as u64;
        // A crash here leaves lines that no checkpoint covers and that nobody was told of: the next
        // opening removes them. An error from here on leaves them for the next checkpoint to cover;
        // taking them back could put another line under a number that a checkpoint has signed.
        self.unsigned = true;
        self.sign()
    }

    /// Makes the file what it was after the last write, or says that somebody else wrote to it.
    fn check_untouched(&self) -> Result<(), AuditError> {
        let path = self.dir.join(LOG);
        let ours = self.file.metadata().map_err(cannot_read(&path))?;
        let replaced = fs::metadata(&path).map_or(true, |named| {
            (named.dev(), named.ino()) != (ours.dev(), ours.ino())
        });
        if replaced || ours.len() < self.length || ours.len() > self.length && !self.torn {
            return Err(AuditError::Touched { path });
        }
        if ours.len() > self.length {
            self.file
                .set_len(self.length)
                .map_err(cannot_write(&path))?;
        }
        Ok(())
    }

    /// Signs the tree as it is.
    fn sign(&mut self) -> Result<(), AuditError> {
        let checkpoint = Checkpoint {
            origin: self.origin.clone(),
            size: self.tree.size(),
            root: self.tree.root(),
        };
        let text = checkpoint.sign(&self.key);
        let path = self.dir.join(CHECKPOINT);
        durable::write(&path, text.as_bytes(), 0o644).map_err(cannot_write(&path))?;
        self.checkpoint = text;
        self.unsigned = false;
        Ok(())
    }

    /// Goes on where the log was left.
    fn take_up(&mut self) -> Result<(), AuditError> {
        let own = PublicKey::of(&self.key);
        let mut keys = self.former.clone();
        keys.push(own.clone());
        let examined = Snapshot::take(&self.dir)?.examine(&keys, Some(&self.origin))?;
        match examined.bad {
            None => {}
            Some(Bad {
                fault: Fault::Uncovered,
                ..
            }) if examined.uncovered <= BATCH_MAX as u64 => self.cut(examined.length)?,
            Some(bad) => {
                return Err(AuditError::Bad {
                    dir: self.dir.clone(),
                    bad: Box::new(bad),
                });
            }
        }
        if !examined.located {
            self.leaves = remake_leaves(&self.dir)?;
        }
        self.tree = examined.tree;
        self.length = examined.length;
        self.checkpoint = examined.checkpoint;
        if Checkpoint::verify(&self.checkpoint, [&own], Some(&self.origin)).is_err() {
            tracing::info!(key = %own.id(), "the audit log is signed with another key from now on");
            self.sign()?;
        }
        Ok(())
    }

    /// Removes what follows the first `length` bytes.
    fn cut(&mut self, length: u64) -> Result<(), AuditError> {
        let path = self.dir.join(LOG);
        let mut text = Vec::new();
        let mut file = &self.file;
        let read = file
            .seek(SeekFrom::Start(length))
            .and_then(|_| file.take(REPAIR_TEXT_BYTES_MAX).read_to_end(&mut text))
            .and_then(|_| Ok(self.file.metadata()?.len() - length));
        let repair = Repair {
            bytes: read.map_err(cannot_read(&path))?,
            text: String::from_utf8_lossy(&text).into_owned(),
        };
        tracing::warn!(
            bytes = repair.bytes,
            text = repair.text,
            "removed from the audit log what a crash had left unsigned"
        );
        self.file
            .set_len(length)
            .and_then(|()| self.file.sync_all())
            .map_err(cannot_write(&path))?;
        self.repair = Some(repair);
        Ok(())
    }
}

/// Writes `leaves` anew from the lines.
fn remake_leaves(dir: &Path) -> Result<File, AuditError> {
    let (log, path) = (dir.join(LOG), dir.join(LEAVES));
    let mut lines = BufReader::new(File::open(&log).map_err(cannot_read(&log))?);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .truncate(true)
        .open(&path)
        .map_err(cannot_write(&path))?;
    let mut out = io::BufWriter::new(&file);
    let mut line = Vec::new();
    while let Piece::Line = next_piece(&mut lines, &mut line).map_err(cannot_read(&log))? {
        out.write_all(leaf_hash(&line).as_bytes())
            .map_err(cannot_write(&path))?;
        line.clear();
    }
    out.flush().map_err(cannot_write(&path))?;
    drop(out);
    Ok(file)
}

/// What came of verifying a log.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Verification {
    /// The records that are there, good or bad.
    pub records: u64,
    /// `None`: every record is as it was signed, and none is missing.
    pub first_bad: Option<Bad>,
}

impl Verification {
    /// Whether every record is as it was signed, and none is missing.
    pub fn ok(&self) -> bool {
        self.first_bad.is_none()
    }

    /// `{ok, records, first_bad?, reason?}`.
    pub fn to_json(&self) -> Value {
        let mut out = json!({"ok": self.ok(), "records": self.records});
        if let Some(bad) = &self.first_bad {
            out["first_bad"] = bad.line.into();
            out["reason"] = bad.fault.to_string().into();
        }
        out
    }
}

/// Verifies the log in `dir` from public keys alone: `keys` may have signed it, and if `origin` is
/// given, it must be the log of that name. Works beside a running daemon. Memory does not grow with
/// the log.
pub fn verify(
    dir: &Path,
    keys: &[PublicKey],
    origin: Option<&str>,
) -> Result<Verification, AuditError> {
    let origin = origin.map(str::parse).transpose()?;
    let examined = Snapshot::take(dir)?.examine(keys, origin.as_ref())?;
    Ok(Verification {
        records: examined.records,
        first_bad: examined.bad,
    })
}

/// A log's files at one moment.
struct Snapshot {
    dir: PathBuf,
    /// `None`: there is no file.
    log: Option<File>,
    /// How much of it was there.
    length: u64,
    leaves: Option<File>,
    checkpoint: Option<String>,
}

/// What was found in a log.
struct Examined {
    /// Whole lines.
    records: u64,
    /// The tree over the lines that the checkpoint covers.
    tree: Tree,
    /// Length of those lines in bytes.
    length: u64,
    /// The pieces that follow them: whole lines, and one that is not whole.
    uncovered: u64,
    checkpoint: String,
    /// `leaves` is what was signed, so it says which line is wrong.
    located: bool,
    bad: Option<Bad>,
}

impl Snapshot {
    fn take(dir: &Path) -> Result<Self, AuditError> {
        let log = if_there(&dir.join(LOG), File::open)?;
        let leaves = if_there(&dir.join(LEAVES), File::open)?;
        let failed = cannot_read(&dir.join(LOG));
        // Kept only for this moment, so that no one who reads slowly holds up the daemon.
        if let Some(log) = &log {
            log.lock_shared().map_err(&failed)?;
        }
        let checkpoint = if_there(&dir.join(CHECKPOINT), read_checkpoint)?;
        let length = match &log {
            Some(log) => log.metadata().map_err(&failed)?.len(),
            None => 0,
        };
        if let Some(log) = &log {
            log.unlock().map_err(&failed)?;
        }
        if log.is_none() && checkpoint.is_none() {
            return Err(AuditError::Missing { dir: dir.into() });
        }
        Ok(Self {
            dir: dir.to_owned(),
            log,
            length,
            leaves,
            checkpoint,
        })
    }

    fn examine(self, keys: &[PublicKey], origin: Option<&Origin>) -> Result<Examined, AuditError> {
        let checkpoint = match &self.checkpoint {
            None => Err(Fault::NoCheckpoint),
            Some(text) => Checkpoint::verify(text, keys, origin)
                .map_err(|error| Fault::Checkpoint(reason(&error))),
        };
        let (signed, unverifiable) = match checkpoint {
            Ok(checkpoint) => (Some(checkpoint), None),
            Err(fault) => (None, Some(Bad { line: 1, fault })),
        };
        let located = match (&signed, &self.leaves) {
            (Some(signed), Some(leaves)) => {
                leaves_are(leaves, signed).map_err(cannot_read(&self.dir.join(LEAVES)))?
            }
            (Some(signed), None) => signed.size == 0,
            (None, _) => false,
        };
        let mut examined = Examined {
            records: 0,
            tree: Tree::default(),
            length: 0,
            uncovered: 0,
            checkpoint: self.checkpoint.unwrap_or_default(),
            located,
            bad: unverifiable,
        };
        if let Some(log) = self.log {
            let lines = BufReader::new(log.take(self.length));
            let leaves = self.leaves.filter(|_| located).map(BufReader::new);
            examined
                .read(lines, leaves, signed)
                .map_err(cannot_read(&self.dir.join(LOG)))?;
        } else if let Some(signed) = signed {
            examined.conclude(&signed, None);
        }
        Ok(examined)
    }
}

impl Examined {
    /// Reads the lines; `leaves` are the signed leaf hashes, if there are any.
    fn read(
        &mut self,
        mut lines: impl BufRead,
        mut leaves: Option<impl BufRead>,
        signed: Option<Checkpoint>,
    ) -> io::Result<()> {
        let size = signed.as_ref().map_or(0, |signed| signed.size);
        let mut disordered = None;
        let mut line = Vec::new();
        loop {
            line.clear();
            match next_piece(&mut lines, &mut line)? {
                Piece::Line => {}
                Piece::Part => {
                    self.uncovered += 1;
                    break;
                }
                Piece::TooLong => {
                    self.uncovered = u64::MAX; // no crash leaves this
                    break;
                }
                Piece::End => break,
            }
            self.records += 1;
            if self.records > size {
                self.uncovered += 1;
                continue;
            }
            let leaf = leaf_hash(&line);
            self.tree.push(leaf);
            self.length += line.len() as u64 + 1;
            if let Some(leaves) = &mut leaves
                && self.bad.is_none()
                && read_leaf(leaves)? != Some(leaf)
            {
                self.bad = Some(Bad {
                    line: self.records,
                    fault: Fault::Changed,
                });
            }
            let record: Option<Record> = serde_json::from_slice(&line).ok();
            if disordered.is_none() && record.is_none_or(|record| record.seq != self.records) {
                disordered = Some(self.records);
            }
        }
        if let Some(signed) = signed {
            self.conclude(&signed, disordered);
        }
        Ok(())
    }

    /// Says what is wrong, unless it is known already.
    fn conclude(&mut self, signed: &Checkpoint, disordered: Option<u64>) {
        if self.bad.is_some() {
            return;
        }
        let short = self.tree.size() < signed.size;
        let (line, fault) = if short && self.located {
            let signed = signed.size;
            (self.records + 1, Fault::CutOff { signed })
        } else if short || self.tree.root() != signed.root {
            let signed = signed.size;
            (1, Fault::Somewhere { signed, disordered })
        } else if let Some(line) = disordered {
            (line, Fault::NotARecord)
        } else if self.uncovered > 0 {
            (signed.size + 1, Fault::Uncovered)
        } else {
            return;
        };
        self.bad = Some(Bad { line, fault });
    }
}

/// The error with its source, for an operator's one line.
fn reason(error: &CheckpointError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Whether the leaf hashes are those under the signed head.
fn leaves_are(leaves: &File, signed: &Checkpoint) -> io::Result<bool> {
    let mut leaves = BufReader::new(leaves);
    let mut tree = Tree::default();
    while tree.size() < signed.size {
        let Some(leaf) = read_leaf(&mut leaves)? else {
            return Ok(false);
        };
        tree.push(leaf);
    }
    leaves.rewind()?;
    Ok(tree.root() == signed.root)
}

fn read_leaf(leaves: &mut impl BufRead) -> io::Result<Option<Digest>> {
    let mut bytes = [0; LEAF_BYTES as usize];
    match leaves.read_exact(&mut bytes) {
        Ok(()) => Ok(Some(bytes.into())),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// What was read of a log.
enum Piece {
    /// A line, without its newline.
    Line,
    /// The end of the file in the middle of a line.
    Part,
    /// More than a line may have.
    TooLong,
    /// The end of the file after a line.
    End,
}

/// Reads on until `line` holds a line.
fn next_piece(input: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<Piece> {
    let room = LINE_BYTES_MAX + 1 - line.len().min(LINE_BYTES_MAX);
    input.take(room as u64).read_until(b'\n', line)?;
    Ok(match line.last() {
        None => Piece::End,
        Some(b'\n') => {
            line.pop();
            Piece::Line
        }
        Some(_) if line.len() > LINE_BYTES_MAX => Piece::TooLong,
        Some(_) => Piece::Part,
    })
}

fn read_checkpoint(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(CHECKPOINT_BYTES_MAX as u64 + 1)
        .read_to_end(&mut bytes)?;
    // What is not UTF-8 is no checkpoint, and is found out as such.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The records of the log in `dir`, first to last. Nothing is verified here.
///
/// After the end, asking again gives the records that were appended since: that is how to follow.
pub fn read(dir: &Path) -> Result<Records, AuditError> {
    let path = dir.join(LOG);
    let Some(file) = if_there(&path, File::open)? else {
        return Err(AuditError::Missing { dir: dir.into() });
    };
    Ok(Records {
        path,
        input: BufReader::new(file),
        line: Vec::new(),
        lines: 0,
    })
}

/// See [`read`].
#[derive(Debug)]
pub struct Records {
    path: PathBuf,
    input: BufReader<File>,
    /// Of a line that is being written, what is there.
    line: Vec<u8>,
    lines: u64,
}

impl Iterator for Records {
    type Item = Result<Record, AuditError>;

    fn next(&mut self) -> Option<Self::Item> {
        let piece = match next_piece(&mut self.input, &mut self.line) {
            Ok(piece) => piece,
            Err(source) => return Some(Err(cannot_read(&self.path)(source))),
        };
        let not_a_record = |line, source| AuditError::Line {
            path: self.path.clone(),
            line,
            source,
        };
        match piece {
            Piece::End | Piece::Part => return None,
            // The rest of it is taken for the next line; nothing of it can be a record.
            Piece::TooLong => {
                self.line.clear();
                return Some(Err(not_a_record(self.lines + 1, None)));
            }
            Piece::Line => {}
        }
        self.lines += 1;
        let record = serde_json::from_slice(&self.line);
        self.line.clear();
        Some(record.map_err(|source| not_a_record(self.lines, Some(source))))
    }
}

/// What `open` gives, or `None` if there is no such file.
fn if_there<'p, T>(
    path: &'p Path,
    open: impl FnOnce(&'p Path) -> io::Result<T>,
) -> Result<Option<T>, AuditError> {
    match open(path) {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(cannot_read(path)(error)),
    }
}

fn cannot_read(path: &Path) -> impl Fn(io::Error) -> AuditError + use<> {
    let path = path.to_owned();
    move |source| AuditError::Read {
        path: path.clone(),
        source,
    }
}

fn cannot_write(path: &Path) -> impl Fn(io::Error) -> AuditError + use<> {
    let path = path.to_owned();
    move |source| AuditError::Write {
        path: path.clone(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clamcast_proto::AuditEvent;

    const ORIGIN: &str = "clamcast/bank/master";

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_bytes(&[seed; 32])
    }

    fn open(dir: &Path) -> Result<Log, AuditError> {
        Log::open(dir, key(1), ORIGIN.to_owned())
    }

    fn draft(subject: &str) -> Draft {
        Draft::new(AuditEvent::Published, "master", subject)
    }

    fn append(log: &mut Log, subject: &str) -> Result<Record, AuditError> {
        log.append(draft(subject), Timestamp::UNIX_EPOCH)
    }

    /// A log of `records` records, closed again.
    fn log_of(records: usize) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path()).unwrap();
        let drafts = (1..=records).map(|number| draft(&format!("subject {number}")));
        let drafts = drafts.collect();
        log.append_all(drafts, Timestamp::UNIX_EPOCH).unwrap();
        dir
    }

    fn lines(dir: &Path) -> Vec<String> {
        let text = fs::read_to_string(dir.join(LOG)).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn write_lines(dir: &Path, lines: &[String]) {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        fs::write(dir.join(LOG), text).unwrap();
    }

    fn verified_by(dir: &Path, seed: u8) -> Verification {
        verify(dir, &[PublicKey::of(&key(seed))], Some(ORIGIN)).unwrap()
    }

    fn verified(dir: &Path) -> Verification {
        verified_by(dir, 1)
    }

    /// The first bad line after `change` was made to the lines of a log of seven records, with
    /// `leaves` there and without.
    #[track_caller]
    fn check(change: impl Fn(&mut Vec<String>), expected: u64) {
        let dir = log_of(7);
        assert!(verified(dir.path()).ok());
        let mut changed = lines(dir.path());
        change(&mut changed);
        write_lines(dir.path(), &changed);
        let found = verified(dir.path()).first_bad.expect("is red");
        assert_eq!(found.line, expected, "{found}");
        assert!(matches!(open(dir.path()), Err(AuditError::Bad { .. })));

        fs::remove_file(dir.path().join(LEAVES)).unwrap();
        let found = verified(dir.path()).first_bad.expect("is red");
        assert_eq!(found.line, 1, "{found}");
    }

    #[test]
    fn a_log_is_taken_over_from_a_former_key_and_verifies_without_it() {
        let dir = log_of(3);
        let take_over = |former: &[u8]| {
            let former: Vec<_> = former
                .iter()
                .map(|&seed| PublicKey::of(&key(seed)))
                .collect();
            Log::open_after(dir.path(), key(2), &former, ORIGIN.to_owned())
        };
        assert!(matches!(take_over(&[]), Err(AuditError::Bad { .. })));
        assert!(matches!(take_over(&[3]), Err(AuditError::Bad { .. })));
        assert!(verified_by(dir.path(), 1).ok());

        let mut log = take_over(&[3, 1]).unwrap();
        assert!(verified_by(dir.path(), 2).ok(), "it is signed at once");
        assert!(!verified_by(dir.path(), 1).ok());
        append(&mut log, "subject 4").unwrap();
        drop(log);
        let log = take_over(&[]).unwrap();
        assert_eq!(log.records(), 4);
        assert!(verified_by(dir.path(), 2).ok());

        let mut changed = lines(dir.path());
        changed[0].push(' ');
        write_lines(dir.path(), &changed);
        assert!(matches!(take_over(&[1]), Err(AuditError::Bad { .. })));
    }

    #[test]
    fn a_changed_line_is_found() {
        for at in 0..7 {
            let line = at as u64 + 1;
            check(
                |lines| lines[at] = lines[at].replace("subject", "object"),
                line,
            );
            check(
                |lines| lines[at] = lines[at].replace("master", "Master"),
                line,
            );
            check(|lines| lines[at].push(' '), line);
            check(|lines| lines[at].clear(), line);
        }
    }

    #[test]
    fn a_removed_line_is_found() {
        for at in 0..7 {
            check(|lines| drop(lines.remove(at)), at as u64 + 1);
        }
    }

    #[test]
    fn an_inserted_line_is_found() {
        for at in 0..7 {
            check(|lines| lines.insert(at, String::new()), at as u64 + 1);
        }
        // A copy of the last line behind it is a line that was added, see below.
        for at in 0..6 {
            check(|lines| lines.insert(at, lines[at].clone()), at as u64 + 2);
        }
    }

    #[test]
    fn swapped_lines_are_found() {
        for at in 0..6 {
            check(|lines| lines.swap(at, at + 1), at as u64 + 1);
        }
    }

    #[test]
    fn a_cut_off_log_is_found() {
        for kept in 0..7 {
            check(|lines| lines.truncate(kept), kept as u64 + 1);
        }
    }

    #[test]
    fn a_log_cut_at_any_byte_is_found() {
        let dir = log_of(3);
        let whole = fs::read(dir.path().join(LOG)).unwrap();
        for kept in 0..whole.len() {
            fs::write(dir.path().join(LOG), &whole[..kept]).unwrap();
            let line = whole[..kept].iter().filter(|byte| **byte == b'\n').count() as u64 + 1;
            assert_eq!(verified(dir.path()).first_bad.unwrap().line, line, "{kept}");
        }
        fs::remove_file(dir.path().join(LOG)).unwrap();
        assert_eq!(verified(dir.path()).first_bad.unwrap().line, 1);
    }

    #[test]
    fn a_line_added_by_hand_is_found_and_never_signed() {
        let dir = log_of(2);
        let mut forged = lines(dir.path());
        forged.push(draft("forged").record(3, Timestamp::UNIX_EPOCH).line());
        write_lines(dir.path(), &forged);
        let found = verified(dir.path());
        assert_eq!(found.records, 3);
        assert_eq!(
            found.first_bad.unwrap().to_string().split(',').next(),
            Some("line 3: not signed")
        );

        let mut log = open(dir.path()).unwrap();
        assert!(log.repair().unwrap().text.contains("forged"));
        append(&mut log, "honest").unwrap();
        assert!(verified(dir.path()).ok());
        assert!(!lines(dir.path()).join("").contains("forged"));
    }

    #[test]
    fn what_a_crash_before_the_checkpoint_left_is_removed_and_the_log_goes_on() {
        let dir = log_of(3);
        let before = fs::read(dir.path().join(LOG)).unwrap();
        let old = fs::read(dir.path().join(CHECKPOINT)).unwrap();
        append(&mut open(dir.path()).unwrap(), "unacknowledged").unwrap();
        let after = fs::read(dir.path().join(LOG)).unwrap();
        for kept in before.len()..=after.len() {
            fs::write(dir.path().join(CHECKPOINT), &old).unwrap();
            fs::write(dir.path().join(LOG), &after[..kept]).unwrap();
            let mut log = open(dir.path()).unwrap();
            let removed = log.repair().map_or(0, |repair| repair.bytes);
            assert_eq!(removed, (kept - before.len()) as u64);
            assert_eq!(append(&mut log, "next").unwrap().seq, 4);
            let found = verified(dir.path());
            assert!(found.ok() && found.records == 4, "{found:?}");
        }
    }

    #[test]
    fn more_than_a_crash_can_leave_is_not_removed() {
        let dir = log_of(1);
        let line = &lines(dir.path())[0];
        write_lines(dir.path(), &vec![line.clone(); BATCH_MAX + 1]);
        assert!(open(dir.path()).is_ok());
        write_lines(dir.path(), &vec![line.clone(); BATCH_MAX + 2]);
        assert!(matches!(open(dir.path()), Err(AuditError::Bad { .. })));

        let endless = format!("{line}\n{}", "x".repeat(LINE_BYTES_MAX + 1));
        fs::write(dir.path().join(LOG), endless).unwrap();
        assert_eq!(verified(dir.path()).first_bad.unwrap().line, 2);
        assert!(matches!(open(dir.path()), Err(AuditError::Bad { .. })));
    }

    #[test]
    fn a_reopened_log_goes_on_with_its_numbers() {
        let dir = log_of(0);
        for number in 1..=20 {
            let mut log = open(dir.path()).unwrap();
            assert_eq!(log.repair(), None);
            assert_eq!(append(&mut log, "x").unwrap().seq, number);
            assert_eq!(log.records(), number);
            assert_eq!(
                log.checkpoint(),
                fs::read_to_string(dir.path().join(CHECKPOINT)).unwrap()
            );
        }
        let found = verified(dir.path());
        assert_eq!(found.to_json(), json!({"ok": true, "records": 20}));
    }

    #[test]
    fn a_log_is_signed_from_its_first_moment() {
        let dir = log_of(0);
        assert!(verified(dir.path()).ok());
        fs::remove_file(dir.path().join(CHECKPOINT)).unwrap();
        assert!(!verified(dir.path()).ok());
        let dir = log_of(1);
        fs::remove_file(dir.path().join(CHECKPOINT)).unwrap();
        assert_eq!(
            verified(dir.path()).first_bad.unwrap().fault,
            Fault::NoCheckpoint
        );
        fs::write(dir.path().join(LOG), "").unwrap();
        assert!(matches!(open(dir.path()), Err(AuditError::Bad { .. })));
    }

    #[test]
    fn a_log_signed_by_another_key_or_of_another_name_is_red() {
        let dir = log_of(2);
        let found = verified_by(dir.path(), 2);
        assert_eq!(found.to_json()["first_bad"], 1);
        assert_eq!(found.records, 2);
        let keys = [PublicKey::of(&key(1))];
        assert!(
            !verify(dir.path(), &keys, Some("clamcast/shop/master"))
                .unwrap()
                .ok()
        );
        assert!(verify(dir.path(), &keys, None).unwrap().ok());
        assert!(Log::open(dir.path(), key(2), ORIGIN.into()).is_err());
        assert!(Log::open(dir.path(), key(1), "clamcast/shop/master".into()).is_err());
    }

    #[test]
    fn the_leaves_cannot_be_bent_to_hide_a_change() {
        let dir = log_of(7);
        let mut changed = lines(dir.path());
        changed[4] = changed[4].replace("subject", "object");
        write_lines(dir.path(), &changed);
        drop(remake_leaves(dir.path()).unwrap());
        let bad = verified(dir.path()).first_bad.unwrap();
        assert_eq!(bad.line, 1);
        assert!(
            matches!(bad.fault, Fault::Somewhere { signed: 7, .. }),
            "{bad}"
        );
    }

    #[test]
    fn damaged_leaves_are_made_again() {
        let dir = log_of(7);
        let leaves = fs::read(dir.path().join(LEAVES)).unwrap();
        for damage in [&b""[..], &leaves[..100], &[7; 7 * 32]] {
            fs::write(dir.path().join(LEAVES), damage).unwrap();
            assert!(verified(dir.path()).ok());
            open(dir.path()).unwrap();
            assert_eq!(fs::read(dir.path().join(LEAVES)).unwrap(), leaves);
        }
    }

    #[test]
    fn a_file_that_somebody_else_wrote_to_is_not_appended_to() {
        let dir = log_of(2);
        let path = dir.path().join(LOG);
        let whole = fs::read(&path).unwrap();
        let check = |bytes: &[u8], replace: bool| {
            fs::write(&path, &whole).unwrap();
            let mut log = open(dir.path()).unwrap();
            if replace {
                fs::remove_file(&path).unwrap();
            }
            fs::write(&path, bytes).unwrap();
            let error = append(&mut log, "x").unwrap_err();
            assert!(matches!(error, AuditError::Touched { .. }), "{error}");
        };
        check(&[&whole[..], b"x\n"].concat(), false);
        check(&whole[..10], false);
        check(&whole, true);
    }

    #[test]
    fn a_failed_checkpoint_is_made_up_for_by_the_next() {
        let dir = log_of(1);
        let mut log = open(dir.path()).unwrap();
        let path = dir.path().join(CHECKPOINT);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        for _ in 0..3 {
            let error = append(&mut log, "x").unwrap_err();
            assert!(matches!(error, AuditError::Write { .. }), "{error}");
        }
        assert_eq!(lines(dir.path()).len(), 2);
        fs::remove_dir(&path).unwrap();
        assert_eq!(append(&mut log, "y").unwrap().seq, 3);
        assert!(verified(dir.path()).ok());
    }

    #[test]
    fn many_records_are_signed_in_batches() {
        let dir = log_of(2 * BATCH_MAX + 1);
        let found = verified(dir.path());
        assert!(
            found.ok() && found.records == 2 * BATCH_MAX as u64 + 1,
            "{found:?}"
        );
    }

    #[test]
    fn an_overlong_record_is_refused_and_nothing_is_written() {
        let dir = log_of(1);
        let mut log = open(dir.path()).unwrap();
        let error = append(&mut log, &"x".repeat(LINE_BYTES_MAX)).unwrap_err();
        assert!(matches!(error, AuditError::TooLong { .. }), "{error}");
        assert_eq!(append(&mut log, "x").unwrap().seq, 2);
        assert!(verified(dir.path()).ok());
    }

    #[test]
    fn verifying_beside_a_recording_daemon_is_green() {
        let dir = log_of(1);
        let path = dir.path().to_owned();
        let daemon = std::thread::spawn(move || {
            let mut log = open(&path).unwrap();
            for _ in 0..100 {
                append(&mut log, "x").unwrap();
            }
        });
        while !daemon.is_finished() {
            let found = verified(dir.path());
            assert!(found.ok(), "{found:?}");
        }
        daemon.join().unwrap();
    }

    #[test]
    fn no_log_at_all_is_said_so() {
        let dir = tempfile::tempdir().unwrap();
        let found = verify(dir.path(), &[], None);
        assert!(matches!(found, Err(AuditError::Missing { .. })));
        let found = read(dir.path());
        assert!(matches!(found, Err(AuditError::Missing { .. })));
    }

    #[test]
    fn a_reader_gets_what_is_there_and_then_what_is_new() {
        let dir = log_of(3);
        let mut records = read(dir.path()).unwrap();
        let numbers = |records: &mut Records| -> Vec<u64> {
            records.by_ref().map(|record| record.unwrap().seq).collect()
        };
        assert_eq!(numbers(&mut records), [1, 2, 3]);

        let mut log = open(dir.path()).unwrap();
        append(&mut log, "x").unwrap();
        assert_eq!(numbers(&mut records), [4]);

        let line = draft("x").record(5, Timestamp::UNIX_EPOCH).line();
        let mut file = OpenOptions::new()
            .append(true)
            .open(dir.path().join(LOG))
            .unwrap();
        file.write_all(&line.as_bytes()[..20]).unwrap();
        assert_eq!(numbers(&mut records), [0; 0]);
        file.write_all(&line.as_bytes()[20..]).unwrap();
        file.write_all(b"\n").unwrap();
        assert_eq!(numbers(&mut records), [5]);
    }

    #[test]
    fn a_line_that_is_no_record_does_not_hide_those_after_it() {
        let dir = log_of(3);
        let mut changed = lines(dir.path());
        changed[1] = "{}".into();
        write_lines(dir.path(), &changed);
        let records: Vec<_> = read(dir.path()).unwrap().collect();
        assert!(records[0].is_ok() && records[2].is_ok());
        assert!(matches!(records[1], Err(AuditError::Line { line: 2, .. })));
    }
}
