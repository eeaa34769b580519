//! The admin socket: how an operator's command talks to a running daemon.
//!
//! A Unix stream socket. The command sends one line of JSON and reads lines of JSON until the last:
//!
//! ```text
//! command  {"to":"clamcast-master","command":"publish","wait":true}
//! daemon   {"progress":{...}}                                    any number of times
//! daemon   {"exit":0,"result":{...},"message":"..."}             and closes
//! ```
//!
//! Who is at the other end is what the kernel says (SO_PEERCRED), not what the command says. `to` in
//! the request is the program that the command means: the daemon of another one says so instead of
//! answering what was not asked.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::fs::{self, Permissions};
use std::io::{self, BufRead as _, Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as BlockingStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use clamcast_proto::audit::Operator;
use nix::unistd::{Gid, Group, Uid, User, chown, getgrouplist};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::UCred;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinSet, spawn_blocking};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::input::{self, this_user};
use crate::{chain, durable, exit, inherited};

/// Longest path of the socket in bytes (`sun_path` of unix(7), without the byte that ends it).
pub const PATH_BYTES_MAX: usize = 107;

/// Longest request in bytes, newline included: a `force-sync` that names hundreds of agents fits.
pub const REQUEST_BYTES_MAX: u64 = 64 << 10;

/// Longest line in bytes that a command takes from a daemon: 100,000 agents at a kilobyte each.
pub const ANSWER_BYTES_MAX: u64 = 100 << 20;

/// A command writes its request at once; one that has not by then holds a descriptor for nothing.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(10);

/// Connections without a request, at most: a command's is there a moment after it has connected. Of
/// more, the oldest of the user who has the most is dropped.
const SILENT_MAX: usize = 64;

/// Commands that wait for a place, at most.
const QUEUE_MAX: usize = 64;

/// How long a command waits for a place before it is told that there is none.
const QUEUE_TIME_MAX: Duration = Duration::from_secs(10);

/// A command that was stopped (Ctrl-Z) does not read; after this long the daemon lets go of it.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);

/// The same once the daemon stops.
const LAST_WORD_TIME_MAX: Duration = Duration::from_secs(1);

/// The end of an answer.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Finish {
    /// The command's exit code, see [`crate::exit`].
    pub exit: u8,
    /// The result: printed as it is with `--json`, shown as text without.
    #[serde(default)]
    pub result: Value,
    /// For people, on stderr.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

impl Finish {
    /// Done, with a result.
    pub fn done(result: impl Serialize) -> Self {
        Self {
            exit: exit::DONE,
            result: serde_json::to_value(result).expect("our own results serialise"),
            message: None,
        }
    }

    /// Not done: why, and the exit code that says so to scripts.
    pub fn because(exit: u8, message: impl fmt::Display) -> Self {
        Self {
            exit,
            result: Value::Null,
            message: Some(message.to_string()),
        }
    }
}

/// A line of an answer.
#[derive(Deserialize, Serialize)]
#[serde(untagged)]
enum Answer {
    Progress { progress: Value },
    Finish(Finish),
}

impl Answer {
    fn line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).expect("our own answers serialise");
        line.push(b'\n');
        line
    }
}

/// Why the admin socket does not work, or one conversation on it.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Another daemon answers there.
    #[error("another daemon is listening at {path}; stop it, or choose another [listen] admin")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is not a socket has the name.
    #[error("{path} is not a socket; remove it, or choose another [listen] admin")]
    NotASocket {
        /// The name.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("cannot listen at {path}")]
    Bind {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The request is not one line of reasonable length.
    #[error("the request is not a line of at most {REQUEST_BYTES_MAX} bytes")]
    RequestLine,
    /// The request is not one that this version knows.
    #[error("the request cannot be understood; are command and daemon of one version?")]
    Request(#[source] serde_json::Error),
    /// The command is gone, silent or does not read.
    #[error("the command at the admin socket is gone")]
    Gone(#[source] io::Error),
}

/// The daemon's end of the admin socket. It outlives a reload of the configuration, so that a command
/// that comes meanwhile waits instead of failing.
#[derive(Debug)]
pub struct Listener {
    program: &'static str,
    path: PathBuf,
    owner: SocketOwner,
    socket: UnixListener,
    admins: Option<Gid>,
    hall: Hall,
}

/// Who made the socket's name in the file system, and removes it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum SocketOwner {
    /// The daemon. Device and inode of the socket.
    Daemon(u64, u64),
    /// systemd.
    Systemd,
}

/// Where commands wait until they are served.
#[derive(Debug, Default)]
struct Hall {
    /// Read the requests of those that have connected; also tell the ones that are turned away.
    silent: JoinSet<Option<Caller>>,
    /// Of the reading ones, oldest first: whose it is, and how to drop it.
    readers: VecDeque<(u32, AbortHandle)>,
    /// Commands that wait for a place, oldest first.
    queue: VecDeque<Caller>,
}

/// A command whose request has arrived.
#[derive(Debug)]
struct Caller {
    stream: BufReader<UnixStream>,
    peer: UCred,
    line: Vec<u8>,
    since: Instant,
}

impl Listener {
    /// Listens at `path` for commands to `program`. Members of `group` may use it, too: one that
    /// cannot be used is logged, and then root and the daemon's own user are the only ones who may
    /// act. The socket of a dead daemon is replaced. `kept` is the listener from before a reload: it
    /// is taken if it is at `path`.
    ///
    /// A socket that systemd listens at under `path` is taken as it is: its unit decides about owner,
    /// group and permissions, and the members of its group may act.
    pub fn open(
        program: &'static str,
        path: &Path,
        group: Option<&str>,
        kept: &mut Option<Self>,
    ) -> Result<Self, AdminError> {
        let inherited = || inherited::unix_listener(path);
        Self::open_or_inherit(program, path, group, kept, inherited)
    }

    fn open_or_inherit(
        program: &'static str,
        path: &Path,
        group: Option<&str>,
        kept: &mut Option<Self>,
        inherited: impl FnOnce() -> Option<io::Result<StdListener>>,
    ) -> Result<Self, AdminError> {
        let failed = |source| AdminError::Bind {
            path: path.to_owned(),
            source,
        };
        let mut listener = match kept.take_if(|kept| kept.path == path && kept.has_its_name()) {
            Some(kept) => kept,
            None => {
                let (socket, owner) = match inherited() {
                    Some(inherited) => {
                        let socket = inherited.and_then(from_systemd).map_err(failed)?;
                        (socket, SocketOwner::Systemd)
                    }
                    None => {
                        if let Some(parent) = path.parent() {
                            durable::create_dir(parent, 0o755).map_err(failed)?;
                        }
                        remove_stale(path)?;
                        let socket = UnixListener::bind(path).map_err(failed)?;
                        let found = fs::symlink_metadata(path).map_err(failed)?;
                        (socket, SocketOwner::Daemon(found.dev(), found.ino()))
                    }
                };
                Self {
                    program,
                    path: path.to_owned(),
                    owner,
                    socket,
                    admins: None,
                    hall: Hall::default(),
                }
            }
        };
        if listener.owner == SocketOwner::Systemd {
            listener.admins = group_of(path, group);
            return Ok(listener);
        }
        listener.admins = group.and_then(|name| give_to_group(path, name));
        // Between bind and this somebody else may have connected: `may_act` holds for them, too.
        fs::set_permissions(path, Permissions::from_mode(0o660)).map_err(failed)?;
        Ok(listener)
    }

    /// Has `answer` answer commands until `stop` fires, at most `places` at a time. Returns what is
    /// still being answered: the caller waits for it or ends it. Commands that were not begun by then
    /// wait for the next call.
    pub async fn serve<F>(
        &mut self,
        places: usize,
        stop: &CancellationToken,
        answer: impl Fn(Session) -> F + Clone + Send + 'static,
    ) -> JoinSet<()>
    where
        F: Future<Output = Result<(), AdminError>> + Send + 'static,
    {
        let places = Places::new(places);
        let mut sessions = JoinSet::new();
        loop {
            while let Some((caller, place)) = self.hall.next(&places) {
                let (answer, stop, admins) = (answer.clone(), stop.clone(), self.admins);
                sessions.spawn(async move {
                    let answered = match caller.enter(admins, place, stop).await {
                        Ok(session) => answer(session).await,
                        Err(error) => Err(error),
                    };
                    if let Err(error) = answered {
                        tracing::debug!(error = chain(&error), "a command got no answer");
                    }
                });
            }
            let oldest = self.hall.queue.front();
            let patience = oldest.map(|oldest| oldest.since + QUEUE_TIME_MAX);
            tokio::select! {
                biased;
                () = stop.cancelled() => return sessions,
                Some(_) = sessions.join_next() => {}
                () = places.freed() => {}
                Some(read) = self.hall.silent.join_next() => {
                    let Ok(Some(caller)) = read else { continue };
                    match self.stranger(&caller) {
                        Some(finish) => self.hall.turn_away(caller, finish),
                        None => self.hall.enqueue(caller),
                    }
                }
                () = sleep_until(patience.unwrap_or_else(Instant::now)), if patience.is_some() => {
                    let caller = self.hall.queue.pop_front().expect("its time is over");
                    self.hall.turn_away(caller, busy());
                }
                accepted = self.socket.accept() => match accepted {
                    Ok((stream, _)) => self.hall.arrived(stream),
                    Err(error) => {
                        tracing::error!(%error, "cannot accept a command");
                        sleep(Duration::from_millis(100)).await; // out of descriptors, say
                    }
                },
            }
        }
    }

    /// Ends it. Nobody can connect any more, and whoever did and was not served gets `last_word`.
    pub async fn close(self, last_word: Finish) {
        if self.owner != SocketOwner::Systemd && self.has_its_name() {
            let _ = fs::remove_file(&self.path); // one that stays is replaced by the next daemon
        }
        let closing = Instant::now() + LAST_WORD_TIME_MAX;
        let mut hall = self.hall;
        // Without its name nobody connects any more. A socket of systemd keeps its name, so the time is
        // limited.
        let Ok(socket) = self.socket.into_std() else {
            return;
        };
        while Instant::now() < closing
            && let Ok((stream, _)) = socket.accept()
        {
            let stream = stream.set_nonblocking(true).map(|()| stream);
            if let Ok(stream) = stream.and_then(UnixStream::from_std) {
                hall.arrived(stream);
            }
        }
        for caller in std::mem::take(&mut hall.queue) {
            hall.turn_away(caller, last_word.clone());
        }
        let told = async {
            while let Some(read) = hall.silent.join_next().await {
                if let Ok(Some(caller)) = read {
                    hall.turn_away(caller, last_word.clone());
                }
            }
        };
        let _ = timeout_at(closing, told).await; // the others say nothing
    }

    fn has_its_name(&self) -> bool {
        match self.owner {
            SocketOwner::Daemon(device, inode) => fs::symlink_metadata(&self.path)
                .is_ok_and(|found| (found.dev(), found.ino()) == (device, inode)),
            SocketOwner::Systemd => true,
        }
    }

    /// What a command is told that is meant for another program.
    fn stranger(&self, caller: &Caller) -> Option<Finish> {
        let meant = caller.meant().filter(|meant| meant != self.program)?;
        let (path, program) = (self.path.display(), self.program);
        let message = format!(
            "{path} is the admin socket of {program}; --socket takes the admin socket of {meant}"
        );
        Some(Finish::because(exit::USAGE, message))
    }
}

impl Hall {
    /// Somebody has connected.
    fn arrived(&mut self, stream: UnixStream) {
        let Ok(peer) = stream.peer_cred() else { return };
        self.readers.retain(|(_, reader)| !reader.is_finished());
        if self.readers.len() >= SILENT_MAX {
            let crowd = crowding(self.readers.iter().map(|(uid, _)| *uid));
            let (_, reader) = self.readers.remove(crowd).expect("found in it");
            reader.abort();
        }
        let uid = peer.uid();
        let reader = self.silent.spawn(Caller::read(stream, peer));
        self.readers.push_back((uid, reader));
    }

    /// A command waits for a place. One too many of the user who has most of them there is turned
    /// away, so that nobody keeps the others out.
    fn enqueue(&mut self, caller: Caller) {
        self.queue.push_back(caller);
        if self.queue.len() > QUEUE_MAX {
            // The last of theirs: those before it have waited longer.
            let latest_first = self.queue.iter().rev().map(|caller| caller.peer.uid());
            let crowd = self.queue.len() - 1 - crowding(latest_first);
            let caller = self.queue.remove(crowd).expect("found in it");
            self.turn_away(caller, busy());
        }
    }

    /// The oldest command for whose user there is a place.
    fn next(&mut self, places: &Places) -> Option<(Caller, Place)> {
        let mut queue = self.queue.iter().enumerate();
        let (index, place) =
            queue.find_map(|(index, caller)| Some((index, places.take(caller.peer.uid())?)))?;
        Some((self.queue.remove(index)?, place))
    }

    fn turn_away(&mut self, mut caller: Caller, finish: Finish) {
        self.silent.spawn(async move {
            let line = Answer::Finish(finish).line();
            // Whoever does not even read one line has gone.
            let _ = timeout(LAST_WORD_TIME_MAX, caller.stream.write_all(&line)).await;
            None
        });
    }
}

impl Caller {
    /// Waits for the request. `None`: there is none.
    async fn read(stream: UnixStream, peer: UCred) -> Option<Self> {
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        let mut limited = (&mut stream).take(REQUEST_BYTES_MAX);
        let read = timeout(REQUEST_TIME_MAX, limited.read_until(b'\n', &mut line));
        read.await.ok()?.ok()?;
        let whole = line.last() == Some(&b'\n') || line.len() as u64 == REQUEST_BYTES_MAX;
        let since = Instant::now();
        whole.then_some(Self {
            stream,
            peer,
            line,
            since,
        })
    }

    /// The program that the command means, if it says so.
    fn meant(&self) -> Option<String> {
        #[derive(Deserialize)]
        struct Address {
            to: Option<String>,
        }
        serde_json::from_slice::<Address>(&self.line).ok()?.to
    }

    async fn enter(
        self,
        admins: Option<Gid>,
        place: Place,
        stop: CancellationToken,
    ) -> Result<Session, AdminError> {
        // The user database may be on the network.
        let looked_up = spawn_blocking(move || look_up(self.peer, admins)).await;
        let (operator, may_act) =
            looked_up.map_err(|error| AdminError::Gone(io::Error::other(error)))?;
        Ok(Session {
            operator,
            may_act,
            line: self.line,
            stream: self.stream,
            stop,
            _place: place,
        })
    }
}

fn busy() -> Finish {
    let message = "the daemon answers as many commands as it may at a time; end some (`publish --wait`, `audit show --follow`), or try again";
    Finish::because(exit::FAILED, message)
}

/// Of the users of a crowded place, in this order, the first one of the user who is there most often.
fn crowding(uids: impl Iterator<Item = u32> + Clone) -> usize {
    let mut counts = HashMap::<u32, usize>::new();
    for uid in uids.clone() {
        *counts.entry(uid).or_default() += 1;
    }
    let most = counts.values().max();
    let mut uids = uids;
    uids.position(|uid| counts.get(&uid) == most)
        .unwrap_or_default()
}

/// A number of places that no user but root can take away from the others: one has at most half of
/// them, and a quarter of them is root's alone.
#[derive(Clone, Debug)]
pub struct Places(Arc<Taken>);

#[derive(Debug)]
struct Taken {
    max: usize,
    by_uid: Mutex<HashMap<u32, usize>>,
    freed: Notify,
}

/// A place that is taken until this is dropped.
#[derive(Debug)]
pub struct Place {
    uid: u32,
    of: Arc<Taken>,
}

impl Places {
    /// `max` free places.
    pub fn new(max: usize) -> Self {
        let (by_uid, freed) = Default::default();
        Self(Arc::new(Taken { max, by_uid, freed }))
    }

    /// A place for this user, if there is one.
    pub fn take(&self, uid: u32) -> Option<Place> {
        let mut by_uid = self.0.by_uid.lock().expect("nothing panics with it");
        let all: usize = by_uid.values().sum();
        let own = by_uid.get(&uid).copied().unwrap_or_default();
        let max = self.0.max;
        let is_free = match uid {
            0 => all < max,
            _ => all < max - max / 4 && own < (max / 2).max(1),
        };
        is_free.then(|| {
            *by_uid.entry(uid).or_default() += 1;
            let of = self.0.clone();
            Place { uid, of }
        })
    }

    /// Returns when a place was given back since the last call.
    pub async fn freed(&self) {
        self.0.freed.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut by_uid = self.of.by_uid.lock().expect("nothing panics with it");
        let held = by_uid.get_mut(&self.uid).expect("it was counted");
        *held -= 1;
        if *held == 0 {
            by_uid.remove(&self.uid);
        }
        self.of.freed.notify_one();
    }
}

/// Makes way for a new socket, unless somebody listens at the old one.
fn remove_stale(path: &Path) -> Result<(), AdminError> {
    let path = || path.to_owned();
    let failed = |source| AdminError::Bind {
        path: path(),
        source,
    };
    match fs::symlink_metadata(path()) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(AdminError::NotASocket { path: path() });
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    }
    match BlockingStream::connect(path()) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path()).map_err(failed)
        }
        Ok(_) => Err(AdminError::InUse { path: path() }),
        Err(error) => Err(failed(error)),
    }
}

/// A listener that systemd passed on. The standard library and tokio expect it not to block.
fn from_systemd(socket: StdListener) -> io::Result<UnixListener> {
    socket.set_nonblocking(true)?;
    UnixListener::from_std(socket)
}

/// The group that owns a socket which systemd made. `configured` is the group that the configuration
/// names for it.
fn group_of(path: &Path, configured: Option<&str>) -> Option<Gid> {
    let group = match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => Gid::from_raw(found.gid()),
        Ok(_) | Err(_) => {
            let path = path.display();
            tracing::warn!(
                "{path} is not a socket any more; restart the service, which restarts its socket unit"
            );
            return None;
        }
    };
    if let Some(name) = configured
        && Group::from_name(name).ok().flatten().map(|it| it.gid) != Some(group)
    {
        tracing::warn!(
            group = name,
            "systemd gave the admin socket to group {group}, not to the configured admin group; set \
             SocketGroup= in the socket unit with `systemctl edit`"
        );
    }
    Some(group)
}

/// Lets the group use the socket.
fn give_to_group(path: &Path, name: &str) -> Option<Gid> {
    let own = || match this_user() {
        own if own == "root" => "only root may act".to_owned(),
        own => format!("only root and the daemon's own user `{own}` may act"),
    };
    let group = match Group::from_name(name) {
        Ok(Some(group)) => group.gid,
        Ok(None) => {
            tracing::warn!(group = name, "admin group does not exist, {}", own());
            return None;
        }
        Err(error) => {
            tracing::warn!(group = name, %error, "cannot look up the admin group, {}", own());
            return None;
        }
    };
    if let Err(error) = chown(path, None, Some(group)) {
        tracing::warn!(
            group = name, %error,
            "cannot give the admin socket to the admin group, {}; add the daemon's user to it", own()
        );
        return None;
    }
    Some(group)
}

/// Looks up who `peer` is, and whether that is root, the daemon's own user or a member of the group
/// of `admins`. Blocking.
fn look_up(peer: UCred, admins: Option<Gid>) -> (Operator, bool) {
    let uid = Uid::from_raw(peer.uid());
    let user = User::from_uid(uid).ok().flatten();
    let mut groups = vec![Gid::from_raw(peer.gid())];
    if let Some(user) = &user
        && let Ok(name) = std::ffi::CString::new(user.name.as_str())
    {
        groups.extend(getgrouplist(&name, user.gid).unwrap_or_default());
    }
    let operator = Operator {
        uid: uid.as_raw(),
        name: user.map_or_else(|| uid.to_string(), |user| user.name),
        login_uid: peer.pid().and_then(login_uid),
    };
    (operator, may_act(uid, &groups, Uid::effective(), admins))
}

/// Who may give orders: root, the daemon's own user, and members of the admin group.
fn may_act(uid: Uid, groups: &[Gid], daemon: Uid, admins: Option<Gid>) -> bool {
    uid.is_root() || uid == daemon || admins.is_some_and(|admins| groups.contains(&admins))
}

/// Longest `/proc/PID/loginuid` that is read, in bytes: a number of 32 bits has ten digits.
const LOGIN_UID_BYTES_MAX: u64 = 16;

/// Who logged in and then became the user that process `pid` runs as.
fn login_uid(pid: i32) -> Option<u32> {
    let path = format!("/proc/{pid}/loginuid");
    let text = input::whole(Path::new(&path), LOGIN_UID_BYTES_MAX).ok()?;
    let uid = str::from_utf8(&text).ok()?.trim().parse().ok()?;
    (uid != u32::MAX).then_some(uid) // all ones: nobody logged in, a service for example
}

/// One command's conversation. It holds its place until it is dropped.
#[derive(Debug)]
pub struct Session {
    /// Who is there.
    pub operator: Operator,
    /// Whether this is root, the daemon's own user or a member of the admin group.
    pub may_act: bool,
    line: Vec<u8>,
    stream: BufReader<UnixStream>,
    stop: CancellationToken,
    _place: Place,
}

impl Session {
    /// The request. Where there is none to be understood, the command still waits for a
    /// [`Session::finish`] that tells it.
    pub fn request<T: DeserializeOwned>(&self) -> Result<T, AdminError> {
        if self.line.last() != Some(&b'\n') {
            return Err(AdminError::RequestLine);
        }
        serde_json::from_slice(&self.line).map_err(AdminError::Request)
    }

    /// Tells how far the work is.
    pub async fn progress(&mut self, progress: &impl Serialize) -> Result<(), AdminError> {
        let progress = serde_json::to_value(progress).expect("our own progress serialises");
        self.send(&Answer::Progress { progress }).await
    }

    /// Ends the conversation.
    pub async fn finish(mut self, finish: Finish) -> Result<(), AdminError> {
        self.send(&Answer::Finish(finish)).await?;
        self.stream.shutdown().await.map_err(AdminError::Gone)
    }

    /// Waits until the command hangs up, to stop work that nobody waits for any more. Can be
    /// cancelled.
    pub async fn gone(&mut self) {
        let mut ignored = [0; 64]; // a command has nothing to say after its request
        while self
            .stream
            .read(&mut ignored)
            .await
            .is_ok_and(|read| read > 0)
        {}
    }

    async fn send(&mut self, answer: &Answer) -> Result<(), AdminError> {
        let line = answer.line();
        let stop = &self.stop;
        let last_word = async {
            stop.cancelled().await;
            sleep(LAST_WORD_TIME_MAX).await;
        };
        tokio::select! {
            biased;
            sent = self.stream.write_all(&line) => sent.map_err(AdminError::Gone),
            () = last_word => Err(AdminError::Gone(io::ErrorKind::TimedOut.into())),
            () = sleep(ANSWER_TIME_MAX) => Err(AdminError::Gone(io::ErrorKind::TimedOut.into())),
        }
    }
}

/// The daemon that a command means.
#[derive(Clone, Copy, Debug)]
pub struct Daemon {
    /// Its program, and its systemd unit.
    pub program: &'static str,
    /// Where it listens unless somebody says otherwise.
    pub socket: &'static str,
}

/// Why a command got no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody there.
    #[error("no daemon is listening at {socket}; {next}")]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// What to look at.
        next: String,
        /// Why.
        source: io::Error,
    },
    /// Something else has the name.
    #[error("{socket} is not a socket; --socket takes the admin socket of {program}")]
    NotASocket {
        /// The name.
        socket: PathBuf,
        /// The program that the command means.
        program: &'static str,
    },
    /// The socket is for others.
    #[error("you may not use {socket}; it is for root{}", group.as_ref().map(|group| format!(" and members of group `{group}` (log in again after joining it)")).unwrap_or_default())]
    Forbidden {
        /// The socket.
        socket: PathBuf,
        /// The group that may use it, if it could be found out.
        group: Option<String>,
        /// Why.
        source: io::Error,
    },
    /// It hung up before the end.
    #[error(
        "the daemon at {socket} closed the connection before it answered; its log says why, if it is {program} at all"
    )]
    Lost {
        /// The socket.
        socket: PathBuf,
        /// The program that the command means.
        program: &'static str,
        /// Why.
        source: io::Error,
    },
    /// What answers there is none of our daemons.
    #[error(
        "{socket} is not the admin socket of a clamcast daemon: something else answers there; --socket takes the admin socket of {program}"
    )]
    Stranger {
        /// The socket.
        socket: PathBuf,
        /// The program that the command means.
        program: &'static str,
    },
    /// It answered something else.
    #[error("the answer of {socket} cannot be understood; are command and daemon of one version?")]
    Answer {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

impl CallError {
    /// The exit code of a command that ends with this.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Unreachable { .. } | Self::Lost { .. } => exit::UNREACHABLE,
            Self::NotASocket { .. } | Self::Stranger { .. } => exit::USAGE,
            Self::Forbidden { .. } => exit::REFUSED,
            Self::Answer { .. } => exit::FAILED,
        }
    }
}

/// Sends `request`, a JSON object, to the `daemon` at `socket` and waits for its answer, however long
/// the work takes. Blocking: a command has nothing else to do.
pub fn call(
    daemon: Daemon,
    socket: &Path,
    request: &impl Serialize,
    mut on_progress: impl FnMut(Value),
) -> Result<Finish, CallError> {
    let program = daemon.program;
    let lost = |source| CallError::Lost {
        socket: socket.to_owned(),
        program,
        source,
    };
    let mut stream =
        BlockingStream::connect(socket).map_err(|source| not_connected(daemon, socket, source))?;
    let mut request = serde_json::to_value(request).expect("our own requests serialise");
    if let Some(fields) = request.as_object_mut() {
        fields.insert("to".to_owned(), daemon.program.into());
    }
    let mut line = serde_json::to_vec(&request).expect("a value serialises");
    line.push(b'\n');
    // A daemon that refuses an overlong request answers before it has read all of it.
    let sent = stream.write_all(&line);
    let mut stream = io::BufReader::new(stream);
    loop {
        line.clear();
        (&mut stream)
            .take(ANSWER_BYTES_MAX)
            .read_until(b'\n', &mut line)
            .map_err(lost)?;
        // Ours say JSON objects only. What is none of them, another program said.
        if line.first().is_some_and(|first| *first != b'{') {
            let socket = socket.to_owned();
            return Err(CallError::Stranger { socket, program });
        }
        if line.last() != Some(&b'\n') {
            return Err(lost(
                sent.err().unwrap_or(io::ErrorKind::UnexpectedEof.into()),
            ));
        }
        let answer = serde_json::from_slice(&line).map_err(|source| CallError::Answer {
            socket: socket.to_owned(),
            source,
        })?;
        match answer {
            Answer::Progress { progress } => on_progress(progress),
            Answer::Finish(finish) => return Ok(finish),
        }
    }
}

fn not_connected(daemon: Daemon, socket: &Path, source: io::Error) -> CallError {
    let found = fs::metadata(socket).ok();
    let (is_default, socket) = (socket == Path::new(daemon.socket), socket.to_owned());
    let program = daemon.program;
    if found
        .as_ref()
        .is_some_and(|found| !found.file_type().is_socket())
    {
        return CallError::NotASocket { socket, program };
    }
    if source.kind() == io::ErrorKind::PermissionDenied {
        let group = found
            .and_then(|found| Group::from_gid(Gid::from_raw(found.gid())).ok().flatten())
            .map(|group| group.name);
        return CallError::Forbidden {
            socket,
            group,
            source,
        };
    }
    let next = if is_default {
        format!(
            "is it running (`systemctl status {program}`), or does it listen elsewhere (--socket)?"
        )
    } else {
        format!("is it running, and is this the `[listen] admin` of {program}?")
    };
    CallError::Unreachable {
        socket,
        next,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tokio::sync::mpsc;
    use tokio::task::JoinHandle;

    const DAEMON: Daemon = Daemon {
        program: "clamcast-test",
        socket: "/run/clamcast/test.sock",
    };

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    fn open(path: &Path, group: Option<&str>) -> Result<Listener, AdminError> {
        Listener::open(DAEMON.program, path, group, &mut None)
    }

    fn call(path: &Path, request: &impl Serialize) -> Result<Finish, CallError> {
        super::call(DAEMON, path, request, |_| {})
    }

    /// Serves one command with `serve` while `command` runs, and returns what the command got.
    async fn converse<T: Send + 'static>(
        path: PathBuf,
        serve: impl AsyncFnOnce(Session),
        command: impl FnOnce(&Path) -> T + Send + 'static,
    ) -> T {
        let mut listener = open(&path, None).unwrap();
        let command = spawn_blocking(move || command(&path));
        let (stop, (arrived, mut arrivals)) = (CancellationToken::new(), mpsc::channel(1));
        let answer = move |session| {
            let arrived = arrived.clone();
            async move {
                arrived.send(session).await.unwrap();
                Ok(())
            }
        };
        let session = tokio::select! {
            _ = listener.serve(1, &stop, answer) => unreachable!("it is not stopped"),
            session = arrivals.recv() => session.unwrap(),
        };
        serve(session).await;
        command.await.unwrap()
    }

    #[tokio::test]
    async fn a_request_is_answered_to_the_operator_that_the_kernel_names() {
        let dir = directory();
        let answer = converse(
            dir.path().join("run/admin.sock"),
            async |mut session| {
                let operator = session.operator.clone();
                assert_eq!(operator.uid, Uid::effective().as_raw());
                assert!(session.may_act);
                let name = User::from_uid(Uid::effective()).unwrap().unwrap().name;
                assert_eq!(
                    operator.to_string(),
                    format!("operator:{}/{name}", operator.uid)
                );
                let request: Value = session.request().unwrap();
                session.progress(&json!({"done": 1})).await.unwrap();
                session.progress(&json!({"done": 2})).await.unwrap();
                session.finish(Finish::done(request)).await.unwrap();
            },
            |path| {
                let mut seen = Vec::new();
                let status = json!({"command": "status"});
                let finish = super::call(DAEMON, path, &status, |step| seen.push(step));
                (finish.unwrap(), seen)
            },
        )
        .await;
        let asked = json!({"command": "status", "to": DAEMON.program});
        assert_eq!(answer.0, Finish::done(asked));
        assert_eq!(answer.1, [json!({"done": 1}), json!({"done": 2})]);
    }

    #[tokio::test]
    async fn an_overlong_request_is_refused_and_told_so() {
        let dir = directory();
        let finish = converse(
            dir.path().join("admin.sock"),
            async |session| {
                let error = session.request::<Value>().unwrap_err();
                assert!(matches!(error, AdminError::RequestLine), "{error:?}");
                let told = session.finish(Finish::because(exit::USAGE, error)).await;
                told.unwrap();
            },
            |path| {
                let request = "x".repeat(REQUEST_BYTES_MAX as usize);
                call(path, &request)
            },
        )
        .await;
        assert_eq!(finish.unwrap().exit, exit::USAGE);
    }

    #[tokio::test]
    async fn a_request_that_is_not_json_is_an_error_and_not_the_end() {
        let dir = directory();
        converse(
            dir.path().join("admin.sock"),
            async |session| {
                let error = session.request::<Value>().unwrap_err();
                assert!(matches!(error, AdminError::Request(_)), "{error:?}");
            },
            |path| {
                let mut stream = BlockingStream::connect(path).unwrap();
                stream.write_all(b"hello\n").unwrap();
            },
        )
        .await;
    }

    #[tokio::test]
    async fn a_command_that_hangs_up_is_noticed() {
        let dir = directory();
        converse(
            dir.path().join("admin.sock"),
            async |mut session| {
                let _: Value = session.request().unwrap();
                timeout(Duration::from_secs(10), session.gone())
                    .await
                    .unwrap();
            },
            |path| {
                let mut stream = BlockingStream::connect(path).unwrap();
                stream.write_all(b"{}\n").unwrap();
            },
        )
        .await;
    }

    #[tokio::test]
    async fn a_daemon_that_hangs_up_is_an_error_with_a_code() {
        let dir = directory();
        let answer = converse(
            dir.path().join("admin.sock"),
            async |session| {
                let _: Value = session.request().unwrap();
            },
            |path| call(path, &json!({})),
        )
        .await;
        let error = answer.unwrap_err();
        assert!(matches!(error, CallError::Lost { .. }), "{error:?}");
        assert_eq!(error.exit_code(), exit::UNREACHABLE);
    }

    #[test]
    fn what_another_program_answers_is_wrong_usage() {
        let check = |answer: &'static [u8], code: u8, says: &str| {
            let dir = directory();
            let path = dir.path().join("other.ctl");
            let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
            let serving = std::thread::spawn(move || {
                let (mut stream, _) = other.accept().unwrap();
                let mut request = String::new();
                io::BufReader::new(&stream).read_line(&mut request).unwrap();
                stream.write_all(answer).unwrap();
            });
            let error = call(&path, &json!({})).unwrap_err();
            serving.join().unwrap();
            assert_eq!(error.exit_code(), code, "{error}");
            assert!(error.to_string().contains(says), "{error}");
        };
        let stranger = "not the admin socket of a clamcast daemon";
        check(b"UNKNOWN COMMAND\n", exit::USAGE, stranger);
        check(b"UNKNOWN COMMAND\0", exit::USAGE, stranger);
        check(b"\n", exit::USAGE, stranger);
        check(b"", exit::UNREACHABLE, "if it is clamcast-test at all");
        check(b"{\"exit\":0", exit::UNREACHABLE, "before it answered");
        check(b"{}\n", exit::FAILED, "of one version");
    }

    #[test]
    fn a_daemon_that_is_not_there_is_unreachable_and_what_is_no_socket_is_wrong_usage() {
        let dir = directory();
        let check = |path: &Path, default: bool, code: u8, says: &str| {
            let mut daemon = DAEMON;
            let text = path.to_str().unwrap().to_owned().leak();
            if default {
                daemon.socket = text;
            }
            let error = super::call(daemon, path, &json!({}), |_| {}).unwrap_err();
            assert_eq!(error.exit_code(), code, "{error}");
            assert!(error.to_string().contains(says), "{error}");
            assert_eq!(error.to_string().contains("systemctl"), default, "{error}");
        };
        let none = dir.path().join("none.sock");
        check(&none, true, exit::UNREACHABLE, "status clamcast-test");
        check(&none, false, exit::UNREACHABLE, "admin` of clamcast-test");
        check(dir.path(), false, exit::USAGE, "is not a socket");
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        check(&file, false, exit::USAGE, "is not a socket");
    }

    /// Answers with who was asked what, until the token fires.
    fn echo(path: &Path, places: usize) -> (CancellationToken, JoinHandle<Listener>) {
        let (mut listener, stop) = (open(path, None).unwrap(), CancellationToken::new());
        let stopped = stop.clone();
        let serving = tokio::spawn(async move {
            let answer = |session: Session| async {
                let request: Value = session.request().unwrap();
                session.finish(Finish::done(request)).await
            };
            let sessions = listener.serve(places, &stopped, answer).await;
            sessions.join_all().await;
            listener
        });
        (stop, serving)
    }

    async fn calling(path: PathBuf) -> JoinHandle<Result<Finish, CallError>> {
        spawn_blocking(move || call(&path, &json!({"command": "status"})))
    }

    #[tokio::test]
    async fn a_command_for_another_daemon_is_told_whose_socket_it_is() {
        let dir = directory();
        let path = dir.path().join("admin.sock");
        let _serving = echo(&path, 1);
        let other = Daemon {
            program: "clamcast-other",
            ..DAEMON
        };
        let asking = spawn_blocking(move || super::call(other, &path, &json!({}), |_| {}));
        let finish = asking.await.unwrap().unwrap();
        assert_eq!(finish.exit, exit::USAGE);
        let message = finish.message.unwrap();
        let both = ["socket of clamcast-test;", "socket of clamcast-other"];
        assert!(both.iter().all(|text| message.contains(text)), "{message}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn hundreds_that_say_nothing_keep_nobody_out() {
        let dir = directory();
        let path = dir.path().join("admin.sock");
        let (stop, serving) = echo(&path, 1);
        let mut silent = Vec::new();
        for _ in 0..400 {
            silent.push(UnixStream::connect(&path).await.unwrap());
        }
        let finish = calling(path).await.await.unwrap().unwrap();
        assert_eq!(finish.exit, exit::DONE);
        stop.cancel();
        let listener = serving.await.unwrap();
        assert!(listener.hall.readers.len() <= SILENT_MAX);
    }

    #[tokio::test]
    async fn a_command_that_comes_during_a_reload_is_answered_after_it() {
        let dir = directory();
        let path = dir.path().join("admin.sock");
        let mut kept = Some(open(&path, None).unwrap()); // as left by the daemon before
        let calling = calling(path.clone()).await;
        let listener = Listener::open(DAEMON.program, &path, None, &mut kept);
        let (mut listener, stop) = (listener.unwrap(), CancellationToken::new());
        assert!(kept.is_none(), "it is the same socket");
        let serving = tokio::spawn(async move {
            let answer = |session: Session| session.finish(Finish::done(true));
            listener.serve(1, &stop, answer).await
        });
        let finish = calling.await.unwrap().unwrap();
        assert_eq!(finish, Finish::done(true));
        serving.abort();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_command_that_comes_too_late_is_told_so() {
        let dir = directory();
        let path = dir.path().join("admin.sock");
        let listener = open(&path, None).unwrap();
        let mut waiting = Vec::new();
        for _ in 0..20 {
            waiting.push(UnixStream::connect(&path).await.unwrap());
        }
        for stream in &mut waiting {
            stream.write_all(b"{}\n").await.unwrap();
        }
        listener.close(Finish::because(3, "stopping")).await;
        for stream in &mut waiting {
            let mut line = String::new();
            stream.read_to_string(&mut line).await.unwrap();
            assert!(line.contains("stopping"), "{line}");
        }
        assert!(!path.exists());
    }

    #[test]
    fn of_a_crowd_the_oldest_of_the_user_with_the_most_goes() {
        let check = |uids: &[u32], goes| assert_eq!(crowding(uids.iter().copied()), goes);
        check(&[0, 7, 8, 7], 1);
        check(&[7, 0, 0], 1);
        check(&[5], 0);
    }

    #[test]
    fn no_user_takes_the_places_of_the_others_and_of_root() {
        let places = Places::new(8);
        let take = |uid| std::iter::from_fn(|| places.take(uid)).collect::<Vec<_>>();
        let one = take(7);
        let two = take(8);
        assert_eq!((one.len(), two.len()), (4, 2));
        let root = take(0);
        assert_eq!(root.len(), 2);
        drop(one);
        assert_eq!(take(0).len(), 4);
    }

    #[tokio::test]
    async fn a_dead_daemons_socket_is_replaced_and_a_live_one_is_not() {
        let dir = directory();
        let path = dir.path().join("admin.sock");
        drop(open(&path, None).unwrap());
        assert!(path.exists());
        let _live = open(&path, None).unwrap();
        let error = open(&path, None).unwrap_err();
        assert!(matches!(error, AdminError::InUse { .. }), "{error:?}");
    }

    #[tokio::test]
    async fn a_file_under_the_sockets_name_is_not_touched() {
        let dir = directory();
        let path = dir.path().join("admin.sock");
        fs::write(&path, "precious").unwrap();
        let error = open(&path, None).unwrap_err();
        assert!(matches!(error, AdminError::NotASocket { .. }), "{error:?}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[tokio::test]
    async fn the_socket_is_for_owner_and_group_only() {
        let dir = directory();
        let path = dir.path().join("admin.sock");
        let own = Group::from_gid(Gid::effective()).unwrap().unwrap();
        let listener = open(&path, Some(&own.name)).unwrap();
        assert_eq!(listener.admins, Some(own.gid));
        let found = fs::metadata(&path).unwrap();
        assert_eq!(
            (found.mode() & 0o777, found.gid()),
            (0o660, own.gid.as_raw())
        );
    }

    #[tokio::test]
    async fn a_socket_of_systemd_is_taken_as_it_is_and_never_removed() {
        let dir = directory();
        let path = dir.path().join("admin.sock");
        let systemds = StdListener::bind(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let before = fs::metadata(&path).unwrap();
        let open = |group, kept: &mut Option<Listener>| {
            let inherited = || Some(systemds.try_clone());
            Listener::open_or_inherit(DAEMON.program, &path, group, kept, inherited)
        };
        let mut kept = Some(open(Some("no-such-group-here"), &mut None).unwrap());
        let found = fs::metadata(&path).unwrap();
        assert_eq!(
            (found.ino(), found.mode(), found.gid()),
            (before.ino(), before.mode(), before.gid())
        );

        let mut listener = open(None, &mut kept).unwrap();
        assert!(kept.is_none(), "a reload keeps it");
        assert_eq!(listener.admins, Some(Gid::from_raw(before.gid())));
        let calling = calling(path.clone()).await;
        let stop = CancellationToken::new();
        let stops = stop.clone();
        let serving = tokio::spawn(async move {
            let answer = |session: Session| session.finish(Finish::done(true));
            listener.serve(4, &stops, answer).await;
            listener
        });
        assert_eq!(calling.await.unwrap().unwrap(), Finish::done(true));
        stop.cancel();
        let listener = serving.await.unwrap();
        listener.close(Finish::because(3, "stopping")).await;
        assert!(path.exists(), "systemd still listens there");
    }

    #[tokio::test]
    async fn a_missing_group_leaves_root_and_the_daemons_user() {
        let dir = directory();
        let group = Some("no-such-group-here");
        let listener = open(&dir.path().join("admin.sock"), group).unwrap();
        assert_eq!(listener.admins, None);
    }

    #[test]
    fn only_root_the_daemons_user_and_the_admin_group_may_act() {
        fn check(uid: u32, groups: &[u32], admins: Option<u32>, expected: bool) {
            let groups: Vec<_> = groups.iter().copied().map(Gid::from_raw).collect();
            let daemon = Uid::from_raw(990);
            let found = may_act(
                Uid::from_raw(uid),
                &groups,
                daemon,
                admins.map(Gid::from_raw),
            );
            assert_eq!(
                found, expected,
                "uid {uid}, groups {groups:?}, admins {admins:?}"
            );
        }
        check(0, &[0], None, true);
        check(0, &[0], Some(500), true);
        check(990, &[990], None, true);
        check(1000, &[1000, 500], Some(500), true);
        check(1000, &[500], Some(500), true);
        check(1000, &[1000, 27], Some(500), false);
        check(1000, &[1000, 0], Some(500), false);
        check(1000, &[1000, 500], None, false);
        check(1000, &[], Some(500), false);
    }
}
