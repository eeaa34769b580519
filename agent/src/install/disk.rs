//! Every effect that an install has on a file system.
//!
//! An install works below a few directories that are opened once. Names are taken relative to
//! their descriptors and a symbolic link is never followed, so that one planted in the database
//! directory by another user leads nowhere. `Tree` makes every call, and `Call` names each of them.
//! Tests interpose a shim that fails, or stops the world, at the n-th call.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{File, TryLockError};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use clamcast_daemon::input::{this_user, user_name};
use clamcast_proto::Digest;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, RenameFlags, openat, renameat, renameat2};
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, fchmodat, fstat, fstatat, mkdirat};
use nix::sys::statvfs::fstatvfs;
use nix::unistd::{Uid, UnlinkatFlags, fsync, geteuid, linkat, symlinkat, unlinkat};
use sha2::{Digest as _, Sha256};

/// Permissions of a database: clamd runs as another user and silently leaves out a daily database
/// that it cannot read.
pub const DATABASE_MODE: u32 = 0o644;

/// Permissions of the agent's own records.
pub const RECORD_MODE: u32 = 0o600;

/// The hidden directory in the database directory. clamd does not descend into it and freshclam
/// does not prune it: its name neither ends in a database extension nor contains `.cld` or `.cvd`.
pub const HIDDEN: &str = ".clamcast";

/// The file in [`HIDDEN`] whose lock says that an agent works on the database directory.
const LOCK: &str = "lock";

/// Entries of a directory that are looked at. A database directory has dozens; one with more than
/// this was filled by mistake or by malice.
const ENTRIES_MAX: usize = 20_000;

/// Bytes read at a time when hashing and copying: few enough to stay in the cache.
const BUFFER_BYTES: usize = 128 << 10;

/// A directory that an install works in.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Dir {
    /// The database directory, which clamd reads.
    Databases,
    /// `.clamcast` in it.
    Hidden,
    /// `.clamcast/stage`: verified files by digest, and what is still being received.
    Stage,
    /// `.clamcast/current`: links to what was installed last.
    Current,
    /// `.clamcast/previous`: links to what stood there before that.
    Previous,
    /// `.clamcast/adopted`: what others had put where clamcast's files are now.
    Adopted,
    /// `.clamcast/trial`: a set under its real names, for a load test.
    Trial,
    /// The agent's state directory.
    State,
}

/// The directories below `.clamcast`, with their names.
const BELOW_HIDDEN: [(Dir, &str); 5] = [
    (Dir::Stage, "stage"),
    (Dir::Current, "current"),
    (Dir::Previous, "previous"),
    (Dir::Adopted, "adopted"),
    (Dir::Trial, "trial"),
];

/// A name in a directory.
#[derive(Clone, Copy, Debug)]
pub struct At<'n>(pub Dir, pub &'n str);

impl At<'_> {
    /// Its path, or that of the directory if the name is empty.
    pub(super) fn path(self, database: &Path, state: &Path) -> PathBuf {
        let At(dir, name) = self;
        let directory = match dir {
            Dir::Databases => database.to_owned(),
            Dir::Hidden => database.join(HIDDEN),
            Dir::State => state.to_owned(),
            Dir::Stage | Dir::Current | Dir::Previous | Dir::Adopted | Dir::Trial => {
                let named = BELOW_HIDDEN.iter().find(|(below, _)| *below == dir);
                let name = named.expect("every hidden directory has a name").1;
                database.join(HIDDEN).join(name)
            }
        };
        if name.is_empty() {
            directory
        } else {
            directory.join(name)
        }
    }
}

/// Names a file whatever it is called.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Inode {
    device: u64,
    number: u64,
}

/// What is known of a file without reading it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Facts {
    /// Two names with the same one are one file.
    pub inode: Inode,
    /// Length in bytes.
    pub size: u64,
    /// Time of the last change of its content, in nanoseconds.
    pub modified: i128,
    /// Permission bits.
    pub mode: u32,
    /// Its owner.
    pub owner: u32,
    /// Time of the last change of anything: content, rights, names.
    pub changed: i128,
    /// A regular file, not a link, directory or device.
    pub regular: bool,
    /// A directory.
    pub directory: bool,
}

/// What whoever reads a name as clamd does finds there: links are followed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Behind {
    /// What is known of it.
    pub facts: Facts,
    /// Whether it is a file that this user may read.
    pub readable: bool,
}

/// A call of the file system that is about to be made.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(
    not(test),
    expect(
        dead_code,
        reason = "only the shim of the tests reads the first of two names"
    )
)]
pub(super) enum Call<'n> {
    /// Looks at a name; a link is looked at itself.
    Facts(At<'n>),
    /// Looks at the file that a name leads to.
    Behind(At<'n>),
    /// Opens the file that a name leads to and closes it, to see whether this user may read it.
    Readable(At<'n>),
    Open(At<'n>),
    Read(At<'n>),
    List(Dir),
    FreeBytes,
    /// Compares the open directories with those that their paths lead to now.
    InPlace,
    /// Makes a new file for writing; its name must not be taken.
    Create(At<'n>),
    /// Opens one of the agent's own files for writing at its end.
    Append(At<'n>),
    Write(At<'n>),
    /// Makes the content of an open file durable.
    Sync(At<'n>),
    /// Makes the names in a directory durable.
    SyncDir(Dir),
    /// Gives the first file a second name, which must not be taken.
    Link(At<'n>, At<'n>),
    /// Makes a symbolic link, whose name must not be taken.
    Symlink(At<'n>),
    /// Sets the permissions of the agent's own file in one of its own directories.
    SetMode(At<'n>),
    /// Moves the first name over the second.
    Rename(At<'n>, At<'n>),
    /// Lets two names change places in one step. Not every file system can.
    Exchange(At<'n>, At<'n>),
    Remove(At<'n>),
}

/// What a call does to the disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    Reads,
    /// Changes the disk, or what a power cut leaves of it.
    Changes,
}

impl<'n> Call<'n> {
    /// Its kind, what an error message says after "cannot", and the name that follows.
    pub(super) fn describe(&self) -> (Kind, &'static str, At<'n>) {
        use Kind::{Changes, Reads};
        let databases = At(Dir::Databases, "");
        match *self {
            Call::Facts(at) => (Reads, "look at", at),
            Call::Behind(at) => (Reads, "look behind", at),
            Call::Readable(at) | Call::Open(at) => (Reads, "open", at),
            Call::Read(at) => (Reads, "read", at),
            Call::List(dir) => (Reads, "list", At(dir, "")),
            Call::FreeBytes => (Reads, "see the free space of", databases),
            Call::InPlace => (Reads, "look at", databases),
            Call::Create(at) => (Changes, "make", at),
            Call::Append(at) => (Changes, "write to", at),
            Call::Write(at) | Call::Sync(at) => (Changes, "write", at),
            Call::SyncDir(dir) => (Changes, "sync", At(dir, "")),
            Call::Link(_, at) | Call::Symlink(at) => (Changes, "make the link", at),
            Call::SetMode(at) => (Changes, "set the permissions of", at),
            Call::Rename(_, to) => (Changes, "rename a file to", to),
            Call::Exchange(_, other) => (Changes, "exchange a file with", other),
            Call::Remove(at) => (Changes, "remove", at),
        }
    }
}

/// Stands between the installer and the file system. The default makes the call.
pub(super) trait Interpose: Send + Sync + 'static {
    /// Makes `call`, whose effect is `effect`. A success without the effect has the default value
    /// of its type, such as no bytes read.
    fn around(
        &self,
        _call: &Call<'_>,
        effect: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        effect()
    }
}

/// Leaves every call as it is.
pub(super) struct Direct;

impl Interpose for Direct {}

/// Makes a call. Every call of an install comes through here.
fn make<T: Default>(
    interpose: &dyn Interpose,
    call: &Call<'_>,
    mut effect: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    let mut value = T::default();
    interpose.around(call, &mut || {
        value = effect()?;
        Ok(())
    })?;
    Ok(value)
}

/// An open file, and the name that it was opened by.
struct Opened {
    file: File,
    dir: Dir,
    name: Box<str>,
    interpose: Arc<dyn Interpose>,
}

impl Opened {
    fn call<'s, T: Default>(
        &'s self,
        call: fn(At<'s>) -> Call<'s>,
        effect: impl FnMut() -> io::Result<T>,
    ) -> io::Result<T> {
        let call = call(At(self.dir, &self.name));
        make(&*self.interpose, &call, effect)
    }

    fn sync(&self) -> io::Result<()> {
        self.call(Call::Sync, || self.file.sync_all())
    }
}

/// A file being read: as a stream, or at any place.
pub(super) struct Input(Opened);

impl Input {
    pub(super) fn facts(&self) -> io::Result<Facts> {
        Ok(facts_of(&fstat(&self.0.file)?))
    }

    /// Waits until its content is on disk, whoever wrote it.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }

    /// The file itself, to be read at any place.
    pub(super) fn into_file(self) -> File {
        self.0.file
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.call(Call::Read, || (&self.0.file).read(buffer))
    }
}

/// A file being written.
pub(super) struct Output(Opened);

impl Output {
    /// Waits until its content is on disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.call(Call::Write, || (&self.0.file).write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(()) // nothing is buffered
    }
}

/// Something of the host's own stands in the way: the outcome is `host_fault`.
#[derive(Debug, thiserror::Error)]
pub enum HostFault {
    /// A call failed.
    #[error("cannot {doing} {path}{}", advice(source))]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// It would not fit.
    #[error(
        "{path} has {free} bytes free, {needed} are needed, reserve included; make room on that file system"
    )]
    Space {
        /// Where.
        path: PathBuf,
        /// What it takes, in bytes.
        needed: u64,
        /// What there is, in bytes.
        free: u64,
    },
    /// There is no such directory.
    #[error("there is no directory {path}; make it with `install -d -o {user} -m 755 {path}`")]
    NoDirectory {
        /// Its path.
        path: PathBuf,
        /// The user that this agent runs as.
        user: String,
    },
    /// It belongs to somebody else.
    #[error("{path} belongs to {owner} and {user} cannot write to it; run `chown {user} {path}`")]
    NotOurs {
        /// Its path.
        path: PathBuf,
        /// Its owner.
        owner: String,
        /// The user that this agent runs as.
        user: String,
    },
    /// Somebody else made the hidden directory, or may write into it.
    #[error("{path} is not a directory of {user} alone; look what it is, then remove it")]
    Planted {
        /// Its path.
        path: PathBuf,
        /// The user that this agent runs as.
        user: String,
    },
    /// Another agent works on it.
    #[error(
        "another agent works on {path}; stop that one, or give this one a `[database] path` of its \
         own"
    )]
    Shared {
        /// The database directory.
        path: PathBuf,
    },
    /// A file that should be staged is not there with its digest.
    #[error("{path} is not staged with digest {digest}; it has to be transferred again")]
    Unstaged {
        /// Where it should go.
        path: PathBuf,
        /// What it should be.
        digest: Digest,
    },
    /// An earlier install could not be ended, and still cannot.
    #[error("an earlier install is not ended: {reason}")]
    Unfinished {
        /// What stands in the way.
        reason: String,
    },
}

impl HostFault {
    /// A fault for a reason that is no error of the system.
    pub fn because(doing: &'static str, path: PathBuf, reason: String) -> Self {
        Self::Io {
            doing,
            path,
            source: io::Error::other(reason),
        }
    }
}

/// What to do about an error of the system, where its own text does not say. By kind: on its way
/// through other crates an error may lose its number.
fn advice(source: &io::Error) -> &'static str {
    let known = [
        (
            io::ErrorKind::StorageFull,
            "; make room on that file system",
        ),
        (
            io::ErrorKind::QuotaExceeded,
            "; make room there, or raise the quota of the agent's user",
        ),
        (
            io::ErrorKind::ReadOnlyFilesystem,
            "; make that file system writable again",
        ),
        (
            io::ErrorKind::PermissionDenied,
            "; the agent's user must own what it works on, and nothing may make it immutable",
        ),
    ];
    if let Some((_, advice)) = known.iter().find(|(kind, _)| *kind == source.kind()) {
        return advice;
    }
    match source.raw_os_error() {
        Some(libc_errno::EIO) => "; the kernel's log says what is wrong with the device",
        Some(_) | None => "",
    }
}

/// The directories of an install. Each method makes one call; its errors name the call and the file.
pub(super) struct Tree {
    database: PathBuf,
    state: PathBuf,
    open: RwLock<Open>,
    interpose: Arc<dyn Interpose>,
}

/// What is open.
#[derive(Debug)]
struct Open {
    state: Arc<OwnedFd>,
    database: Database,
    /// Held as long as it is open. The kernel gives it up when the process dies.
    lock: Option<File>,
}

/// The database directory and those below it.
#[derive(Debug)]
enum Database {
    /// All of one directory.
    Open(Vec<(Dir, Arc<OwnedFd>)>),
    /// It could not be opened yet, for this reason. [`Tree::check_in_place`] tries again.
    Closed(String),
}

impl Tree {
    /// Opens the directories and makes the hidden ones.
    pub(super) fn open_directories(
        database: &Path,
        state: &Path,
        interpose: impl Interpose,
    ) -> Result<Self, HostFault> {
        let open = open_all(database, state)?;
        Ok(Self::of(database, state, open, interpose))
    }

    /// The same, for one agent alone. A database directory that cannot be used now is opened by
    /// [`Tree::check_in_place`]: an agent that exits looks like a host that is switched off.
    pub(super) fn open_or_wait(database: &Path, state: &Path) -> Result<Self, HostFault> {
        let opened = Self::open_directories(database, state, Direct).and_then(Self::locked);
        let fault = match opened {
            Err(fault) if !matches!(fault, HostFault::Shared { .. }) => fault,
            opened => return opened,
        };
        let state_fd = open_directory(state, &this_user())?;
        tracing::error!(
            error = crate::chain(&fault),
            "cannot use the database directory, trying again"
        );
        let open = Open {
            state: Arc::new(state_fd),
            database: Database::Closed(crate::chain(&fault)),
            lock: None,
        };
        Ok(Self::of(database, state, open, Direct))
    }

    /// The same, for one agent alone: two with state directories of their own would swap each
    /// other's sets away.
    pub(super) fn locked(self) -> Result<Self, HostFault> {
        {
            let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
            open.lock = Some(self.lock(&open, None)?);
        }
        Ok(self)
    }

    fn of(database: &Path, state: &Path, open: Open, interpose: impl Interpose) -> Self {
        Self {
            database: database.to_owned(),
            state: state.to_owned(),
            open: RwLock::new(open),
            interpose: Arc::new(interpose),
        }
    }

    /// Locks what is open, unless `held` is that lock already.
    fn lock(&self, open: &Open, held: Option<File>) -> Result<File, HostFault> {
        let path = self.path(At(Dir::Hidden, LOCK));
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(RECORD_MODE);
        let hidden = open.fd(Dir::Hidden);
        let hidden = hidden.map_err(|source| io_fault("open", &path, source))?;
        let opened = openat(hidden, LOCK, flags, mode);
        let file = File::from(opened.map_err(|errno| io_fault("open", &path, errno.into()))?);
        let inode = |file: &File| fstat(file).ok().map(|stat| facts_of(&stat).inode);
        if let Some(held) = held
            && inode(&held) == inode(&file)
        {
            return Ok(held);
        }
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(HostFault::Shared {
                path: self.database.clone(),
            }),
            Err(TryLockError::Error(source)) => Err(io_fault("lock", &path, source)),
        }
    }

    fn fd(&self, dir: Dir) -> io::Result<Arc<OwnedFd>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.fd(dir)
    }
}

impl Open {
    fn fd(&self, dir: Dir) -> io::Result<Arc<OwnedFd>> {
        if dir == Dir::State {
            return Ok(self.state.clone());
        }
        match &self.database {
            Database::Open(dirs) => {
                let found = dirs.iter().find(|(open, _)| *open == dir);
                Ok(found.expect("every directory was opened").1.clone())
            }
            Database::Closed(reason) => Err(io::Error::other(reason.clone())),
        }
    }
}

fn open_all(database: &Path, state: &Path) -> Result<Open, HostFault> {
    let user = this_user();
    let databases = open_directory(database, &user)?;
    let hidden_path = database.join(HIDDEN);
    let hidden = hidden_directory(&databases, HIDDEN, &hidden_path, &user)
        .map_err(|fault| explain(fault, database, &databases, &user))?;
    let mut dirs = Vec::new();
    for (dir, name) in BELOW_HIDDEN {
        let path = hidden_path.join(name);
        let fd = hidden_directory(&hidden, name, &path, &user)?;
        dirs.push((dir, Arc::new(fd)));
    }
    dirs.push((Dir::Databases, Arc::new(databases)));
    dirs.push((Dir::Hidden, Arc::new(hidden)));
    Ok(Open {
        state: Arc::new(open_directory(state, &user)?),
        database: Database::Open(dirs),
        lock: None,
    })
}

const DIRECTORY: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_CLOEXEC);

/// A directory that an operator configured: its path may lead over links.
fn open_directory(path: &Path, user: &str) -> Result<OwnedFd, HostFault> {
    let opened = openat(nix::fcntl::AT_FDCWD, path, DIRECTORY, Mode::empty());
    opened.map_err(|errno| {
        if errno != Errno::ENOENT {
            return io_fault("open the directory", path, errno.into());
        }
        HostFault::NoDirectory {
            path: path.to_owned(),
            user: user.to_owned(),
        }
    })
}

/// Opens one of our hidden directories, making it if need be. It must be ours alone: in a directory
/// where others may write, one of them could have put a link or a directory of theirs there.
fn hidden_directory(
    parent: &OwnedFd,
    name: &str,
    path: &Path,
    user: &str,
) -> Result<OwnedFd, HostFault> {
    match mkdirat(parent, name, Mode::from_bits_truncate(0o700)) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(errno) => return Err(io_fault("make", path, errno.into())),
    }
    let planted = || HostFault::Planted {
        path: path.to_owned(),
        user: user.to_owned(),
    };
    let fd = match openat(parent, name, DIRECTORY | OFlag::O_NOFOLLOW, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::ELOOP | Errno::ENOTDIR) => return Err(planted()),
        Err(errno) => return Err(io_fault("open", path, errno.into())),
    };
    let stat = fstat(&fd).map_err(|errno| io_fault("look at", path, errno.into()))?;
    if stat.st_uid != geteuid().as_raw() || stat.st_mode & 0o077 != 0 {
        return Err(planted());
    }
    Ok(fd)
}

/// Says who owns the database directory and what to do, where that is why it could not be used.
fn explain(fault: HostFault, path: &Path, fd: &OwnedFd, user: &str) -> HostFault {
    let denied = matches!(&fault, HostFault::Io { source, .. }
        if matches!(source.raw_os_error(), Some(libc_errno::EACCES | libc_errno::EPERM)));
    match fstat(fd) {
        Ok(stat) if denied => HostFault::NotOurs {
            path: path.to_owned(),
            owner: user_name(Uid::from_raw(stat.st_uid)),
            user: user.to_owned(),
        },
        Ok(_) | Err(_) => fault,
    }
}

/// Numbers of errors, as raw errors carry them.
mod libc_errno {
    use super::Errno;
    pub(super) const EPERM: i32 = Errno::EPERM as i32;
    pub(super) const EIO: i32 = Errno::EIO as i32;
    pub(super) const EACCES: i32 = Errno::EACCES as i32;
}

pub(super) fn io_fault(doing: &'static str, path: &Path, source: io::Error) -> HostFault {
    HostFault::Io {
        doing,
        path: path.to_owned(),
        source,
    }
}

impl Tree {
    pub(super) fn path(&self, at: At<'_>) -> PathBuf {
        at.path(&self.database, &self.state)
    }

    /// The path of a directory.
    pub(super) fn directory(&self, dir: Dir) -> PathBuf {
        self.path(At(dir, ""))
    }

    /// The host's fault for a call that failed, with the words and the path of the call.
    pub(super) fn fault(&self, call: &Call<'_>, source: io::Error) -> HostFault {
        let (_, doing, at) = call.describe();
        let path = self.path(at);
        HostFault::Io {
            doing,
            path,
            source,
        }
    }

    /// Makes a call of which every error is a fault.
    fn call<T: Default>(
        &self,
        call: Call<'_>,
        effect: impl FnMut() -> io::Result<T>,
    ) -> Result<T, HostFault> {
        self.ask(call, |_| false, effect)
    }

    /// Makes a call of which some errors are an answer: no file, or `false`.
    fn ask<T: Default>(
        &self,
        call: Call<'_>,
        is_answer: fn(&io::Error) -> bool,
        effect: impl FnMut() -> io::Result<T>,
    ) -> Result<T, HostFault> {
        make(&*self.interpose, &call, effect).or_else(|error| match is_answer(&error) {
            true => Ok(T::default()),
            false => Err(self.fault(&call, error)),
        })
    }

    fn opened(&self, At(dir, name): At<'_>, file: File) -> Opened {
        Opened {
            file,
            dir,
            name: name.into(),
            interpose: Arc::clone(&self.interpose),
        }
    }

    /// Work goes to the directory that stands there now: in one that was removed it is lost.
    pub(super) fn check_in_place(&self) -> Result<(), HostFault> {
        if self.call(Call::InPlace, || self.is_in_place())? {
            return Ok(());
        }
        self.reopen()?;
        tracing::warn!(
            path = ?self.directory(Dir::Databases),
            "the database directory is there again or was replaced, going on in it"
        );
        Ok(())
    }

    /// Whether the paths of the database directory and of those below it still lead to the
    /// directories that were opened.
    fn is_in_place(&self) -> io::Result<bool> {
        let is_there = |dir| -> io::Result<bool> {
            let opened = fstat(self.fd(dir)?)?;
            let there = match std::fs::metadata(self.directory(dir)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                there => there?,
            };
            Ok((there.dev(), there.ino()) == (opened.st_dev, opened.st_ino))
        };
        {
            let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
            if let Database::Closed(_) = open.database {
                return Ok(false);
            }
        }
        let hidden = BELOW_HIDDEN.map(|(dir, _)| dir);
        let mut dirs = [Dir::Databases, Dir::Hidden].into_iter().chain(hidden);
        dirs.try_fold(true, |all, dir| Ok(all && is_there(dir)?))
    }

    /// Opens what stands there now.
    fn reopen(&self) -> Result<(), HostFault> {
        let mut new = open_all(&self.database, &self.state)?;
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = open.lock.take() {
            let kept = held.try_clone();
            let locked = self.lock(&new, Some(held));
            if locked.is_err() {
                open.lock = kept.ok(); // a clone is the same lock
            }
            new.lock = Some(locked?);
        } else if let Database::Closed(_) = open.database {
            new.lock = Some(self.lock(&new, None)?);
        }
        *open = new;
        Ok(())
    }

    /// Whether `needed` bytes fit.
    pub(super) fn check_space(&self, needed: u64) -> Result<(), HostFault> {
        let free = self.call(Call::FreeBytes, || {
            let stat = fstatvfs(self.fd(Dir::Databases)?)?;
            Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
        })?;
        if free >= needed {
            return Ok(());
        }
        let path = self.directory(Dir::Databases);
        Err(HostFault::Space { path, needed, free })
    }

    /// `None` if there is nothing with this name.
    pub(super) fn facts(&self, at: At<'_>) -> Result<Option<Facts>, HostFault> {
        self.ask(Call::Facts(at), is_absent, || {
            let stat = fstatat(self.fd(at.0)?, at.1, AtFlags::AT_SYMLINK_NOFOLLOW)?;
            Ok(Some(facts_of(&stat)))
        })
    }

    /// `None` if it leads to nothing.
    pub(super) fn behind(&self, at: At<'_>) -> Result<Option<Behind>, HostFault> {
        let facts = self.ask(Call::Behind(at), is_absent, || {
            let stat = fstatat(self.fd(at.0)?, at.1, AtFlags::empty())?;
            Ok(Some(facts_of(&stat)))
        })?;
        let Some(facts) = facts else {
            return Ok(None);
        };
        let open = || {
            let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
            openat(self.fd(at.0)?, at.1, flags, Mode::empty())?;
            Ok(true)
        };
        // A pipe is not opened: that would wake a program that waits for another reader.
        let readable = facts.regular && self.ask(Call::Readable(at), |_| true, open)?;
        Ok(Some(Behind { facts, readable }))
    }

    /// `None` if there is no regular file with this name.
    pub(super) fn open(&self, at: At<'_>) -> Result<Option<Input>, HostFault> {
        // A link or a pipe that somebody planted is not a file that we could use.
        let is_no_file = |error: &io::Error| {
            is_absent(error)
                || error.kind() == io::ErrorKind::InvalidInput
                || error.raw_os_error() == Some(Errno::ELOOP as i32)
        };
        let file = self.ask(Call::Open(at), is_no_file, || {
            // Without waiting: a planted pipe must not hold us up.
            let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
            let file = File::from(openat(self.fd(at.0)?, at.1, flags, Mode::empty())?);
            if !file.metadata()?.is_file() {
                let message = "it is not a regular file";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            }
            Ok(Some(file))
        })?;
        Ok(file.map(|file| Input(self.opened(at, file))))
    }

    pub(super) fn create(&self, at: At<'_>, mode: u32) -> Result<Output, HostFault> {
        self.output(at, Call::Create(at), || {
            let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
            let first = Mode::from_bits_truncate(0o600);
            let file = File::from(openat(self.fd(at.0)?, at.1, flags, first)?);
            // The umask must not decide what clamd can read.
            file.set_permissions(std::fs::Permissions::from_mode(mode))?;
            Ok(Some(file))
        })
    }

    pub(super) fn append(&self, at: At<'_>) -> Result<Output, HostFault> {
        self.output(at, Call::Append(at), || {
            let flags = OFlag::O_WRONLY | OFlag::O_APPEND | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let fd = openat(self.fd(at.0)?, at.1, flags, Mode::empty())?;
            Ok(Some(fd.into()))
        })
    }

    fn output(
        &self,
        at: At<'_>,
        call: Call<'_>,
        effect: impl FnMut() -> io::Result<Option<File>>,
    ) -> Result<Output, HostFault> {
        let file = self.call(call, effect)?;
        let file = file.expect("opening a file for writing has a file or a fault");
        Ok(Output(self.opened(at, file)))
    }

    pub(super) fn link(&self, from: At<'_>, to: At<'_>) -> Result<(), HostFault> {
        self.call(Call::Link(from, to), || {
            let (old, new) = (self.fd(from.0)?, self.fd(to.0)?);
            // No flag: a symbolic link is linked itself, never what it points to.
            Ok(linkat(old, from.1, new, to.1, AtFlags::empty())?)
        })
    }

    pub(super) fn symlink(&self, target: &str, at: At<'_>) -> Result<(), HostFault> {
        self.call(Call::Symlink(at), || {
            Ok(symlinkat(target, self.fd(at.0)?, at.1)?)
        })
    }

    pub(super) fn set_mode(&self, at: At<'_>, mode: u32) -> Result<(), HostFault> {
        self.call(Call::SetMode(at), || {
            let (fd, mode) = (self.fd(at.0)?, Mode::from_bits_truncate(mode));
            Ok(fchmodat(fd, at.1, mode, FchmodatFlags::FollowSymlink)?)
        })
    }

    pub(super) fn rename(&self, from: At<'_>, to: At<'_>) -> Result<(), HostFault> {
        self.call(Call::Rename(from, to), || {
            Ok(renameat(self.fd(from.0)?, from.1, self.fd(to.0)?, to.1)?)
        })
    }

    /// Lets two names change places; `false` where the file system cannot.
    pub(super) fn exchange(&self, one: At<'_>, other: At<'_>) -> Result<bool, HostFault> {
        let is_unable = |error: &io::Error| {
            let unable = [Errno::EINVAL as i32, Errno::ENOSYS as i32];
            error.raw_os_error().is_some_and(|e| unable.contains(&e))
        };
        self.ask(Call::Exchange(one, other), is_unable, || {
            let (old, new) = (self.fd(one.0)?, self.fd(other.0)?);
            renameat2(old, one.1, new, other.1, RenameFlags::RENAME_EXCHANGE)?;
            Ok(true)
        })
    }

    /// A name that is not there is removed already.
    pub(super) fn remove(&self, at: At<'_>) -> Result<(), HostFault> {
        self.ask(Call::Remove(at), is_absent, || {
            Ok(unlinkat(self.fd(at.0)?, at.1, UnlinkatFlags::NoRemoveDir)?)
        })
    }

    pub(super) fn list(&self, dir: Dir) -> Result<Vec<OsString>, HostFault> {
        self.call(Call::List(dir), || {
            let mut open = nix::dir::Dir::openat(self.fd(dir)?, ".", DIRECTORY, Mode::empty())?;
            let mut names = BTreeSet::new(); // sorted, so that a repeated run makes the same calls
            for entry in open.iter() {
                let name = OsString::from_vec(entry?.file_name().to_bytes().to_vec());
                if name != "." && name != ".." {
                    names.insert(name);
                }
                if names.len() > ENTRIES_MAX {
                    let message = format!(
                        "it has more than {ENTRIES_MAX} entries; move away what does not belong \
                         there"
                    );
                    return Err(io::Error::new(io::ErrorKind::InvalidData, message));
                }
            }
            Ok(names.into_iter().collect())
        })
    }

    pub(super) fn sync_dir(&self, dir: Dir) -> Result<(), HostFault> {
        self.call(Call::SyncDir(dir), || Ok(fsync(self.fd(dir)?)?))
    }

    /// A new file with this content, on disk when this returns; its name is not yet durable.
    pub(super) fn write_new(&self, at: At<'_>, bytes: &[u8], mode: u32) -> Result<(), HostFault> {
        self.remove(at)?;
        let mut file = self.create(at, mode)?;
        let written = file.write_all(bytes).and_then(|()| file.sync());
        written.map_err(|error| self.fault(&Call::Write(at), error))
    }

    /// Replaces a file of ours by a rename, durable when this returns.
    pub(super) fn replace(&self, at: At<'_>, bytes: &[u8], mode: u32) -> Result<(), HostFault> {
        let beside = format!("{}.new", at.1);
        self.write_new(At(at.0, &beside), bytes, mode)?;
        self.rename(At(at.0, &beside), at)?;
        self.sync_dir(at.0)
    }

    /// The content of a small file; `None` if there is none or it is longer than `bytes_max`.
    pub(super) fn read(&self, at: At<'_>, bytes_max: u64) -> Result<Option<Vec<u8>>, HostFault> {
        let Some(file) = self.open(at)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        file.take(bytes_max + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| self.fault(&Call::Read(at), error))?;
        Ok((bytes.len() as u64 <= bytes_max).then_some(bytes))
    }

    /// Hashes an open file to its end; `each` sees the bytes on the way.
    pub(super) fn digest(
        &self,
        at: At<'_>,
        file: &mut Input,
        mut each: impl FnMut(&[u8]) -> Result<(), HostFault>,
    ) -> Result<(u64, Digest), HostFault> {
        let mut hasher = Sha256::new();
        let mut size = 0;
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let read = match file.read(&mut buffer) {
                Ok(0) => return Ok((size, Digest::finish(hasher))),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.fault(&Call::Read(at), error)),
            };
            hasher.update(&buffer[..read]);
            size += read as u64;
            each(&buffer[..read])?;
        }
    }
}

fn facts_of(stat: &FileStat) -> Facts {
    let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
    Facts {
        inode: Inode {
            device: stat.st_dev,
            number: stat.st_ino,
        },
        size: u64::try_from(stat.st_size).unwrap_or_default(),
        modified: i128::from(stat.st_mtime) * 1_000_000_000 + i128::from(stat.st_mtime_nsec),
        mode: stat.st_mode & 0o7777,
        owner: stat.st_uid,
        changed: i128::from(stat.st_ctime) * 1_000_000_000 + i128::from(stat.st_ctime_nsec),
        regular: kind == SFlag::S_IFREG,
        directory: kind == SFlag::S_IFDIR,
    }
}

fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}
