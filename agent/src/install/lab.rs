//! A host for tests: a real database directory, the real installer, a disk that fails on command,
//! and a fake clamd that loads what is really in the directory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use clamcast_proto::dsse::{Verified, sign};
use clamcast_proto::manifest::{ContainerFacts, Manifest, ManifestFile, Publisher, content_digest};
use clamcast_proto::names::looks_like_a_database;
use clamcast_proto::receipt::{ClamdReport, ClamdState, InstallNumber, Outcome, Proof};
use clamcast_proto::wire::{OfferId, Part, PartEncoding, PartKind};
use clamcast_proto::{DatabaseName, Digest, Epoch, Generation};
use ed25519_dalek::SigningKey;
use nix::errno::Errno;
use tokio_util::sync::CancellationToken;

use super::disk::{At, Call, Dir, HostFault, Interpose, Kind, Tree};
use super::{
    Completed, Depth, Findings, HostStorage, Installer, Look, NeedFile, Planned, Prove, Sighting,
};
use crate::clamd::proof::{CANARY, GATE, Nonce, canary_number, gate_number};
use crate::clamd::{LoadTest, Verdict};

/// Files by name, as a test writes them down and as it finds them.
pub(super) type Files = BTreeMap<String, String>;

/// A set from a line like `daily.cld@27001=new main.cvd@62=main x.ndb=x`.
pub(super) fn files(line: &str) -> Vec<(String, Option<u64>, String)> {
    let file = |word: &str| {
        let (name, content) = word.split_once('=').expect("NAME[@VERSION]=CONTENT");
        let (name, version) = match name.split_once('@') {
            Some((name, version)) => (name, Some(version.parse().expect("a number"))),
            None => (name, None),
        };
        (name.to_owned(), version, content.to_owned())
    };
    line.split_whitespace().map(file).collect()
}

/// The same as it stands in a directory.
pub(super) fn set(line: &str) -> Files {
    let files = files(line).into_iter();
    files.map(|(name, _, content)| (name, content)).collect()
}

/// A signed manifest of these files.
pub(super) fn manifest(generation: u64, line: &str) -> Verified<Manifest> {
    let file = |(name, version, content): (String, Option<u64>, String)| ManifestFile {
        captured: None,
        name: name.parse().expect("a database name"),
        size: content.len() as u64,
        sha256: Digest::of(content.as_bytes()),
        container: version.map(|version| ContainerFacts {
            version,
            signatures: 1,
            built: None,
            signed_by: None,
        }),
    };
    let files: Vec<_> = files(line).into_iter().map(file).collect();
    let manifest = Manifest {
        fleet: "example".parse().expect("a fleet name"),
        epoch: Epoch(1),
        generation: Generation::new(generation).expect("not zero"),
        publisher: Publisher("publisher".into()),
        created: jiff::Timestamp::UNIX_EPOCH,
        previous: None,
        rollback_of: None,
        content: content_digest(files.iter().map(|f| (&f.name, f.size, &f.sha256))),
        files,
    };
    sign(manifest, &SigningKey::from_bytes(&[7; 32]))
}

/// What goes wrong with the disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fault {
    /// Nothing.
    None,
    /// Call n fails without an effect.
    Once(u64, Errno),
    /// Call n has its effect and fails nonetheless.
    After(u64, Errno),
    /// From call n on nothing can be written.
    From(u64, Errno),
    /// The process is killed at call n: neither it nor any later one has an effect.
    Stop(u64),
    /// The power fails at call n: what was not synced by then is lost, names and content.
    PowerCut(u64),
}

/// Gives the real disk a fault. It counts every call, syncs nothing, and remembers what a sync would
/// have saved.
#[derive(Clone)]
pub(super) struct Shim {
    database: PathBuf,
    directory: PathBuf,
    state: Arc<Mutex<ShimState>>,
}

struct ShimState {
    fault: Fault,
    calls: u64,
    unsynced: BTreeSet<PathBuf>,
    /// How to take back changes of names that no sync has made durable, the oldest first.
    undo: Vec<Undo>,
    kept: u64,
    /// Device and inode of a file that nobody may change, link, rename or remove: `chattr +i`.
    immutable: Option<(u64, u64)>,
    /// Whether two names can change places.
    exchanges: bool,
}

/// Takes back one change of a name. File systems with a journal lose the last changes, never one in
/// the middle, and a sync of one directory saves the changes of all that came before.
struct Undo {
    dir: Dir,
    /// The name that was made, and where it came from if it was moved.
    made: Option<(PathBuf, Option<PathBuf>)>,
    /// What had the name before, and where that is kept.
    lost: Option<(PathBuf, PathBuf)>,
}

/// Stands for the rights of another user's file, which the tests cannot make: the agent may not read
/// it, the fake clamd does.
const DENIED_MODE: u32 = 0o640;

/// Where the shim keeps what a power cut brings back.
const KEPT: &str = "kept";

impl Shim {
    fn new(database: PathBuf, directory: PathBuf, fault: Fault) -> Self {
        let kept = directory.join(KEPT);
        let _ = fs::remove_dir_all(&kept); // of the start before
        fs::create_dir(kept).unwrap();
        let state = ShimState {
            fault,
            calls: 0,
            unsynced: BTreeSet::new(),
            undo: Vec::new(),
            kept: 0,
            immutable: None,
            exchanges: true,
        };
        Self {
            database,
            directory,
            state: Arc::new(Mutex::new(state)),
        }
    }

    fn path(&self, at: At<'_>) -> PathBuf {
        at.path(&self.database, &self.directory)
    }

    pub(super) fn calls(&self) -> u64 {
        self.state.lock().unwrap().calls
    }

    pub(super) fn set_fault(&self, fault: Fault) {
        let mut state = self.state.lock().unwrap();
        state.fault = fault;
        state.calls = 0;
    }

    /// Counts a call. `Err`: it fails before its effect. `Ok(Some)`: it fails after it.
    fn step(&self, kind: Kind) -> io::Result<Option<Errno>> {
        let mut state = self.state.lock().unwrap();
        let now = state.calls;
        state.calls += 1;
        match state.fault {
            Fault::Once(n, errno) if n == now => Err(errno.into()),
            Fault::From(n, errno) if now >= n && kind == Kind::Changes => Err(errno.into()),
            Fault::Stop(n) | Fault::PowerCut(n) if now >= n => {
                Err(io::Error::other("the machine has stopped"))
            }
            Fault::After(n, errno) if n == now => Ok(Some(errno)),
            Fault::None
            | Fault::Once(..)
            | Fault::After(..)
            | Fault::From(..)
            | Fault::Stop(_)
            | Fault::PowerCut(_) => Ok(None),
        }
    }

    pub(super) fn make_immutable(&self, at: At<'_>) {
        self.state.lock().unwrap().immutable = Some(self.inode(at).unwrap());
    }

    /// Is a file system on which two names cannot change places.
    pub(super) fn without_exchange(self) -> Self {
        self.state.lock().unwrap().exchanges = false;
        self
    }

    fn inode(&self, at: At<'_>) -> Option<(u64, u64)> {
        let facts = fs::symlink_metadata(self.path(at)).ok()?;
        Some((facts.dev(), facts.ino()))
    }

    fn may_change(&self, at: At<'_>) -> io::Result<()> {
        let inode = self.inode(at);
        match inode.is_some() && inode == self.state.lock().unwrap().immutable {
            true => Err(Errno::EPERM.into()),
            false => Ok(()),
        }
    }

    /// Changes a name, and remembers how that is taken back.
    fn change(
        &self,
        name: At<'_>,
        made: Option<Option<PathBuf>>,
        effect: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        let path = self.path(name);
        let kept = {
            let mut state = self.state.lock().unwrap();
            state.kept += 1;
            let kept = self.directory.join(KEPT);
            kept.join(state.kept.to_string())
        };
        let lost = fs::hard_link(&path, &kept).is_ok();
        effect()?;
        let mut state = self.state.lock().unwrap();
        if let Some(Some(from)) = &made
            && state.unsynced.remove(from)
        {
            state.unsynced.insert(path.clone());
        }
        state.undo.push(Undo {
            dir: name.0,
            made: made.map(|from| (path.clone(), from)),
            lost: lost.then_some((path, kept)),
        });
        Ok(())
    }

    /// What a power cut leaves: names as they were at the last sync, and half of a content that was
    /// not synced.
    pub(super) fn cut_power(&self) {
        let mut state = self.state.lock().unwrap();
        for undo in std::mem::take(&mut state.undo).into_iter().rev() {
            match undo.made {
                Some((now, Some(before))) => {
                    fs::rename(&now, &before).unwrap();
                    if state.unsynced.remove(&now) {
                        state.unsynced.insert(before);
                    }
                }
                Some((now, None)) => fs::remove_file(now).unwrap(),
                None => {}
            }
            if let Some((name, kept)) = undo.lost {
                fs::hard_link(kept, name).unwrap();
            }
        }
        for path in &state.unsynced {
            if let Ok(bytes) = fs::read(path) {
                fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
            }
        }
    }
}

/// Another user's file cannot be opened, nor linked where `fs.protected_hardlinks` is set.
fn may_use(facts: io::Result<fs::Metadata>, errno: Errno) -> io::Result<()> {
    let is_denied = |facts: fs::Metadata| facts.is_file() && facts.mode() & 0o7777 == DENIED_MODE;
    match facts.is_ok_and(is_denied) {
        true => Err(errno.into()),
        false => Ok(()),
    }
}

impl Interpose for Shim {
    fn around(
        &self,
        call: &Call<'_>,
        effect: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        if let Call::Readable(at) = *call {
            // Not counted: it is the second half of `Call::Behind`, and its failure is an answer.
            may_use(fs::metadata(self.path(at)), Errno::EACCES)?;
            return effect();
        }
        let after = self.step(call.describe().0)?;
        match *call {
            Call::Open(at) => {
                may_use(fs::symlink_metadata(self.path(at)), Errno::EACCES)?;
                effect()
            }
            Call::Create(at) => self.change(at, Some(None), effect).map(|()| {
                let mut state = self.state.lock().unwrap();
                state.unsynced.insert(self.path(at));
            }),
            Call::Link(from, to) => {
                may_use(fs::symlink_metadata(self.path(from)), Errno::EPERM)?;
                self.may_change(from)?;
                self.change(to, Some(None), effect)
            }
            Call::Symlink(at) => self.change(at, Some(None), effect),
            Call::Rename(from, to) => {
                self.may_change(from)?;
                self.may_change(to)?;
                match self.inode(from) == self.inode(to) {
                    true => effect(), // which changes nothing
                    false => self.change(to, Some(Some(self.path(from))), effect),
                }
            }
            Call::Exchange(one, other) => {
                if !self.state.lock().unwrap().exchanges {
                    return Err(Errno::EINVAL.into());
                }
                self.may_change(one)?;
                self.may_change(other)?;
                // Moved back, what `other` had before goes back to it, too.
                self.change(other, Some(Some(self.path(one))), effect)
            }
            Call::Remove(at) => {
                self.may_change(at)?;
                self.change(at, None, effect)
            }
            Call::Sync(at) => {
                self.state.lock().unwrap().unsynced.remove(&self.path(at));
                Ok(())
            }
            Call::SyncDir(dir) => {
                // The state directory may be on a file system of its own.
                let other = |undo: &Undo| (undo.dir == Dir::State) != (dir == Dir::State);
                self.state.lock().unwrap().undo.retain(other);
                Ok(())
            }
            Call::Facts(_)
            | Call::Behind(_)
            | Call::Readable(_)
            | Call::Append(_)
            | Call::Read(_)
            | Call::Write(_)
            | Call::SetMode(_)
            | Call::List(_)
            | Call::FreeBytes
            | Call::InPlace => effect(),
        }?;
        match after {
            Some(errno) => Err(errno.into()),
            None => Ok(()),
        }
    }
}

/// What the fake clamd does when it is asked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Mood {
    /// Loads the directory; refuses a file that contains `BAD`.
    Up,
    /// Answers, and loads no set at all: for want of memory, or because it only claims to.
    Rejecting,
    /// Nobody at the socket.
    Away,
}

/// What the fake `clamscan` says of files that the fake clamd rejects.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum FakeScan {
    /// A content error that names the first file with `BAD`; it loads everything else.
    Names,
    /// The same without a name.
    NamesNothing,
    /// A content error that names this file, whatever is in it.
    Claims(&'static str),
    /// It loads them.
    Loads,
    /// It lacks memory.
    Hindered,
    /// It is not on this host.
    Missing,
}

/// A clamd that is none: it looks at the directory, as a reload would, and remembers every number
/// that it was seen with. It judges by the content `BAD` instead of parsing signatures.
#[derive(Clone)]
pub(super) struct FakeClamd {
    directory: PathBuf,
    pub(super) mood: Arc<Mutex<Mood>>,
    pub(super) proven: Arc<Mutex<Vec<InstallNumber>>>,
    /// How often it was made to load what is there.
    pub(super) loads: Arc<Mutex<usize>>,
    pub(super) load_test: bool,
    pub(super) scan: FakeScan,
    /// Directories that were loaded with the fake `clamscan`, by name.
    pub(super) scans: Arc<Mutex<Vec<String>>>,
    /// Whether memory permits a control.
    pub(super) memory: bool,
    /// Whether the fake clamd goes back to loading good sets after this many rejections.
    pub(super) recovers_after: Option<usize>,
    pub(super) rejections: Arc<Mutex<usize>>,
    /// A file of others that somebody mends right after a load that failed, and what it is then.
    pub(super) mended: Option<(&'static str, Option<&'static str>)>,
    /// Whether it is older than 1.5 and reads no signature files.
    pub(super) is_old: bool,
}

impl FakeClamd {
    fn look(&self, n: InstallNumber) -> Verdict {
        let report = |state, proof| ClamdReport {
            state,
            proof,
            ..ClamdReport::default()
        };
        if *self.mood.lock().unwrap() == Mood::Away {
            return Verdict::Absent(report(ClamdState::Down, Proof::None));
        }
        let there = loaded(&self.directory);
        let bad = there.values().any(|content| content.contains("BAD"));
        if bad || *self.mood.lock().unwrap() == Mood::Rejecting {
            let scan = self.scan(&self.directory);
            let said = match &scan {
                LoadTest::Failed(said) => format!("; clamscan: {said}"),
                LoadTest::Passed | LoadTest::Hindered(_) | LoadTest::Missing(_) => String::new(),
            };
            return Verdict::Refused {
                reason: format!("clamd: Malformed database{said}"),
                scan,
                control: !self.load_test,
                report: report(ClamdState::Up, Proof::None),
            };
        }
        let text = |name| there.get(name).map_or("", String::as_str);
        let canary = canary_number(text(CANARY));
        assert_eq!(
            gate_number(text(GATE)),
            canary,
            "proven with a gate of another install"
        );
        if canary != Some(n) {
            return Verdict::Unproven(report(ClamdState::Up, Proof::None));
        }
        self.proven.lock().unwrap().push(n);
        Verdict::Live(report(ClamdState::Up, Proof::Canary))
    }
}

impl FakeClamd {
    fn scan(&self, directory: &Path) -> LoadTest {
        let there = loaded(directory);
        let bad = there.iter().find(|(_, content)| content.contains("BAD"));
        match (self.scan, bad) {
            (FakeScan::Hindered, _) => LoadTest::Hindered("Can't allocate memory".into()),
            (FakeScan::Missing, _) => LoadTest::Missing("no clamscan on this host".into()),
            (FakeScan::Claims(name), _) => {
                LoadTest::Failed(format!("Can't load {name}: Malformed database"))
            }
            (FakeScan::Loads, _) | (_, None) => LoadTest::Passed,
            (FakeScan::NamesNothing, Some(_)) => LoadTest::Failed("Malformed database".into()),
            (FakeScan::Names, Some((name, _))) => {
                LoadTest::Failed(format!("Can't load {name}: Malformed database"))
            }
        }
    }
}

impl Prove for FakeClamd {
    type Mark = ();

    fn mark(&self) {}

    async fn prove(&self, n: InstallNumber, (): (), _: CancellationToken) -> Verdict {
        *self.loads.lock().unwrap() += 1;
        let verdict = self.look(n);
        if let Verdict::Refused { .. } = &verdict {
            let mut rejections = self.rejections.lock().unwrap();
            *rejections += 1;
            if self.recovers_after == Some(*rejections) {
                *self.mood.lock().unwrap() = Mood::Up;
            }
        }
        if let (Verdict::Refused { .. }, Some((name, content))) = (&verdict, self.mended) {
            let path = self.directory.join(name);
            match content {
                Some(content) => fs::write(path, content).unwrap(),
                None if path.exists() => fs::remove_file(path).unwrap(),
                None => {}
            }
        }
        verdict
    }

    async fn probe(&self, n: InstallNumber) -> Verdict {
        self.look(n)
    }

    async fn ping(&self) -> ClamdReport {
        let state = match *self.mood.lock().unwrap() {
            Mood::Up | Mood::Rejecting => ClamdState::Up,
            Mood::Away => ClamdState::Down,
        };
        ClamdReport {
            state,
            ..ClamdReport::default()
        }
    }

    fn wants_load_test(&self) -> bool {
        self.load_test
    }

    fn begin_install(&self) {}

    async fn load_test(&self, directory: &Path) -> LoadTest {
        let name = directory.file_name().unwrap().to_string_lossy();
        self.scans.lock().unwrap().push(name.into_owned());
        self.scan(directory)
    }

    fn memory_shortage(&self, _: &Path) -> Option<String> {
        (!self.memory).then(|| "this host has no 700 MiB left".to_owned())
    }

    fn ignores_signature_files(&self) -> bool {
        self.is_old
    }

    fn loads(&self, name: &DatabaseName) -> bool {
        !name.as_str().ends_with(".hdb")
    }

    fn report(&self) -> ClamdReport {
        ClamdReport::default()
    }
}

/// What clamd would load from a directory: everything whose name ends as a database's does.
pub(super) fn loaded(directory: &Path) -> Files {
    let mut files = Files::new();
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        // It passes over a link that leads nowhere.
        if looks_like_a_database(&name) && entry.path().exists() {
            files.insert(name, fs::read_to_string(entry.path()).unwrap());
        }
    }
    files
}

/// A host with its directories.
pub(super) struct Host {
    root: tempfile::TempDir,
    pub(super) clamd: FakeClamd,
    runtime: tokio::runtime::Runtime,
}

pub(super) type FakeInstaller = Installer<HostStorage, FakeClamd>;

/// What an offer ended with: the completed install, or the fault that kept it from beginning.
pub(super) type Taken = Result<Completed, String>;

impl Host {
    pub(super) fn new() -> Self {
        // In memory where that is possible: a test makes thousands of small hosts.
        let memory = Path::new("/dev/shm");
        let root = match memory.is_dir() {
            true => tempfile::tempdir_in(memory),
            false => tempfile::tempdir(),
        };
        let root = root.unwrap();
        for name in ["db", "state"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        let clamd = FakeClamd {
            directory: root.path().join("db"),
            mood: Arc::new(Mutex::new(Mood::Up)),
            proven: Arc::default(),
            loads: Arc::default(),
            load_test: false,
            scan: FakeScan::Names,
            scans: Arc::default(),
            memory: true,
            recovers_after: None,
            rejections: Arc::default(),
            mended: None,
            is_old: false,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        Self {
            root,
            clamd,
            runtime,
        }
    }

    /// With this generation installed and live, unless the line is empty.
    pub(super) fn with(generation: u64, line: &str) -> Self {
        Self::with_own("", generation, line)
    }

    /// The same, where the host had files of its own before.
    pub(super) fn with_own(own: &str, generation: u64, line: &str) -> Self {
        let host = Self::new();
        host.put(own);
        if !line.is_empty() {
            let taken = host
                .take(&host.start(), &manifest(generation, line), line)
                .unwrap();
            assert_eq!(taken.outcome, Outcome::Live, "{:?}", taken.error);
        }
        host
    }

    pub(super) fn database(&self) -> PathBuf {
        self.root.path().join("db")
    }

    pub(super) fn state(&self) -> PathBuf {
        self.root.path().join("state")
    }

    pub(super) fn hidden(&self, path: &str) -> PathBuf {
        self.database().join(super::disk::HIDDEN).join(path)
    }

    /// What somebody else puts there.
    pub(super) fn put(&self, line: &str) {
        for (name, _, content) in files(line) {
            let path = self.database().join(name);
            let _ = fs::remove_file(&path);
            fs::write(path, content).unwrap();
        }
    }

    /// The same, as files of another user that the agent cannot read.
    pub(super) fn put_denied(&self, line: &str) {
        self.put(line);
        for (name, _, _) in files(line) {
            let rights = fs::Permissions::from_mode(DENIED_MODE);
            fs::set_permissions(self.database().join(name), rights).unwrap();
        }
    }

    /// Databases in the directory, proof files aside.
    pub(super) fn there(&self) -> Files {
        let mut there = loaded(&self.database());
        there.remove(CANARY);
        there.remove(GATE);
        there
    }

    /// The number of the canary in the directory; none if there is none.
    pub(super) fn canary(&self) -> InstallNumber {
        let text = fs::read_to_string(self.database().join(CANARY));
        text.ok()
            .and_then(|text| canary_number(&text))
            .unwrap_or_default()
    }

    pub(super) fn shim(&self, fault: Fault) -> Shim {
        Shim::new(self.database(), self.state(), fault)
    }

    /// A start on a good disk; what was interrupted is ended.
    pub(super) fn start(&self) -> FakeInstaller {
        let (installer, _) = self.start_on(self.shim(Fault::None)).unwrap();
        installer
    }

    pub(super) fn start_on(
        &self,
        shim: Shim,
    ) -> Result<(FakeInstaller, Option<Completed>), HostFault> {
        let tree = Tree::open_directories(&self.database(), &self.state(), shim).unwrap();
        let storage = HostStorage::new(tree, Nonce([3; 16]));
        let installer = Installer::with_storage(storage, self.clamd.clone())?;
        let resumed = self
            .runtime
            .block_on(installer.resume(CancellationToken::new()));
        Ok((installer, resumed))
    }

    /// Takes an offer from the plan to its end; the master's side sends whole files of `line`.
    pub(super) fn take(
        &self,
        installer: &FakeInstaller,
        manifest: &Verified<Manifest>,
        line: &str,
    ) -> Taken {
        let contents = set(line);
        let plan = installer.plan(manifest, false, false, CancellationToken::new());
        let needs = match self.runtime.block_on(plan).1 {
            Ok(Planned::Needs(needs)) => needs,
            Ok(Planned::Answered(before)) => return Ok(*before),
            Err(fault) => return Err(crate::chain(&fault)),
        };
        for need in needs {
            let file = manifest.file(&need.name).unwrap();
            let content = contents[need.name.as_str()].as_bytes();
            let part = full(file);
            let part = Part {
                offset: need.resume_at,
                ..part
            };
            let bytes = &content[usize::try_from(need.resume_at).unwrap()..];
            installer
                .receive(&part, file, bytes)
                .map_err(|e| crate::chain(&e))?;
        }
        Ok(self.install(installer, manifest))
    }

    pub(super) fn install(
        &self,
        installer: &FakeInstaller,
        manifest: &Verified<Manifest>,
    ) -> Completed {
        let install = installer.install(manifest, false, CancellationToken::new());
        self.runtime.block_on(install)
    }

    pub(super) fn probe_on(&self, installer: &FakeInstaller) -> Option<Completed> {
        self.runtime
            .block_on(installer.probe_on(CancellationToken::new()))
    }

    pub(super) fn look_at_clamd(&self, installer: &FakeInstaller) -> Option<Completed> {
        self.runtime
            .block_on(installer.look_at_clamd(CancellationToken::new()))
    }

    pub(super) fn repair(&self, installer: &FakeInstaller) -> Result<Option<Completed>, String> {
        let repair = installer.repair(CancellationToken::new());
        self.runtime.block_on(repair).map_err(|e| crate::chain(&e))
    }
}

/// Runs something of the installer to its end.
pub(super) fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.unwrap().block_on(work)
}

/// What a plan asks the master for.
pub(super) fn plan(
    installer: &FakeInstaller,
    manifest: &Verified<Manifest>,
    forced: bool,
) -> Result<Vec<NeedFile>, HostFault> {
    let plan = installer.plan(manifest, forced, false, CancellationToken::new());
    match block_on(plan).1? {
        Planned::Needs(needs) => Ok(needs),
        Planned::Answered(before) => panic!("it was refused before: {:?}", before.error),
    }
}

/// What an offer is answered with that was refused before.
pub(super) fn refused_before(
    installer: &FakeInstaller,
    manifest: &Verified<Manifest>,
) -> Option<Completed> {
    let plan = installer.plan(manifest, false, false, CancellationToken::new());
    match block_on(plan).1.unwrap() {
        Planned::Needs(_) => None,
        Planned::Answered(before) => Some(*before),
    }
}

/// A look at the directory.
pub(super) fn look(installer: &FakeInstaller, depth: Depth) -> Look {
    block_on(installer.look(depth, CancellationToken::new())).0
}

/// What a look finds, where nothing is in its way.
pub(super) fn findings(installer: &FakeInstaller, depth: Depth) -> Findings {
    let Look::Made(findings) = look(installer, depth) else {
        panic!("something is in its way");
    };
    findings
}

/// The files that a look finds wrong.
pub(super) fn wrong(installer: &FakeInstaller, depth: Depth) -> Vec<Sighting> {
    findings(installer, depth).wrong
}

/// The databases of others that a receipt lists.
pub(super) fn foreign(installer: &FakeInstaller, manifest: &Verified<Manifest>) -> Vec<String> {
    let fault = HostFault::because("test", PathBuf::new(), String::new());
    block_on(installer.host_fault(manifest, &fault)).foreign
}

/// The header of a whole file, as it is.
pub(super) fn full(file: &ManifestFile) -> Part {
    Part {
        offer: OfferId(1),
        name: file.name.clone(),
        encoding: PartEncoding {
            kind: PartKind::Full,
            zstd: false,
            from: None,
            to: file.sha256,
            length: file.size,
        },
        offset: 0,
    }
}
