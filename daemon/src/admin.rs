//! The admin socket: how an operator's command talks to a running daemon.
//!
//! A Unix stream socket. The command sends one line of JSON and reads lines of JSON until the last:
//!
//! ```text
//! command  {"command":"publish","wait":true}
//! daemon   {"progress":{...}}                                    any number of times
//! daemon   {"exit":0,"result":{...},"message":"..."}             and closes
//! ```
//!
//! Who is at the other end is what the kernel says (SO_PEERCRED), not what the command says.

use std::fmt;
use std::fs::{self, Permissions};
use std::io::{self, BufRead as _, Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{Gid, Group, Uid, User, chown, getgrouplist};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::UCred;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{JoinHandle, JoinSet, spawn_blocking};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::{chain, durable, exit};

/// Longest request in bytes, newline included: a `force-sync` that names hundreds of agents fits.
pub const REQUEST_BYTES_MAX: u64 = 64 << 10;

/// Longest line in bytes that a command takes from a daemon: 100,000 agents at a kilobyte each.
pub const ANSWER_BYTES_MAX: u64 = 100 << 20;

/// A command writes its request at once; one that has not by then holds a task for nothing.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(10);

/// A command that was stopped (Ctrl-Z) does not read; after this long the daemon lets go of it.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);

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

/// Who gives an order.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Operator {
    /// The user id of the command's process.
    pub uid: u32,
    /// Its name in the user database, or the number again.
    pub name: String,
    /// Who logged in, before `sudo` and the like, where the kernel's audit keeps it. Read by process
    /// id, so it is evidence for the log and nothing is decided by it.
    pub login_uid: Option<u32>,
    /// Whether this is root, the daemon's own user or a member of the admin group.
    pub may_act: bool,
}

/// As the audit log names its actor.
impl fmt::Display for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "operator:{}/{}", self.uid, self.name)
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

/// The daemon's end of the admin socket.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    admins: Option<Gid>,
    /// A command that has connected and whose names are being looked up. Kept here so that
    /// [`Listener::accept`] can be cancelled without losing it.
    arriving: Option<(UnixStream, JoinHandle<Operator>)>,
}

impl Listener {
    /// Listens at `path`, which members of `group` may use, too. The socket of a dead daemon is
    /// replaced. A group that cannot be used is logged; then root and the daemon's own user are the
    /// only ones who may act.
    pub fn bind(path: &Path, group: Option<&str>) -> Result<Self, AdminError> {
        let failed = |source| AdminError::Bind {
            path: path.to_owned(),
            source,
        };
        if let Some(parent) = path.parent() {
            durable::create_dir(parent, 0o755).map_err(failed)?;
        }
        remove_stale(path)?;
        let socket = UnixListener::bind(path).map_err(failed)?;
        let admins = group.and_then(|name| give_to_group(path, name));
        // Between bind and this somebody else may have connected: `may_act` holds for them, too.
        fs::set_permissions(path, Permissions::from_mode(0o660)).map_err(failed)?;
        Ok(Self {
            socket,
            admins,
            arriving: None,
        })
    }

    /// Has `answer` answer commands until `stop` fires, at most `sessions_max` at a time. Returns the
    /// sessions that are still being answered: the caller waits for them or ends them.
    pub async fn serve<F>(
        &mut self,
        sessions_max: usize,
        stop: CancellationToken,
        answer: impl Fn(Session) -> F,
    ) -> JoinSet<()>
    where
        F: Future<Output = Result<(), AdminError>> + Send + 'static,
    {
        let mut sessions = JoinSet::new();
        loop {
            let session = tokio::select! {
                biased;
                () = stop.cancelled() => return sessions,
                Some(_) = sessions.join_next() => continue,
                session = self.accept(), if sessions.len() < sessions_max => session,
            };
            match session {
                Ok(session) => {
                    let answer = answer(session);
                    sessions.spawn(async move {
                        if let Err(error) = answer.await {
                            tracing::debug!(error = chain(&error), "a command got no answer");
                        }
                    });
                }
                Err(error) => {
                    tracing::error!(%error, "cannot accept a command");
                    tokio::time::sleep(Duration::from_millis(100)).await; // out of descriptors, say
                }
            }
        }
    }

    /// The next command. Can be cancelled without losing one.
    pub async fn accept(&mut self) -> io::Result<Session> {
        if self.arriving.is_none() {
            let (stream, _) = self.socket.accept().await?;
            let peer = stream.peer_cred()?;
            let admins = self.admins;
            // The user database may be on the network.
            let lookup = spawn_blocking(move || Operator::at(peer, admins));
            self.arriving = Some((stream, lookup));
        }
        let (_, lookup) = self.arriving.as_mut().expect("was set above");
        let operator = lookup.await;
        let (stream, _) = self.arriving.take().expect("was set above");
        Ok(Session {
            operator: operator.map_err(io::Error::other)?,
            stream: BufReader::new(stream),
        })
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

/// Lets the group use the socket.
fn give_to_group(path: &Path, name: &str) -> Option<Gid> {
    let group = match Group::from_name(name) {
        Ok(Some(group)) => group.gid,
        Ok(None) => {
            tracing::warn!(
                group = name,
                "admin group does not exist, only root may act"
            );
            return None;
        }
        Err(error) => {
            tracing::warn!(group = name, %error, "cannot look up the admin group, only root may act");
            return None;
        }
    };
    if let Err(error) = chown(path, None, Some(group)) {
        tracing::warn!(
            group = name, %error,
            "cannot give the admin socket to the admin group, only root may act; add the daemon's user to it"
        );
        return None;
    }
    Some(group)
}

impl Operator {
    /// Looks up who `peer` is. Blocking.
    fn at(peer: UCred, admins: Option<Gid>) -> Self {
        let uid = Uid::from_raw(peer.uid());
        let user = User::from_uid(uid).ok().flatten();
        let mut groups = vec![Gid::from_raw(peer.gid())];
        if let Some(user) = &user
            && let Ok(name) = std::ffi::CString::new(user.name.as_str())
        {
            groups.extend(getgrouplist(&name, user.gid).unwrap_or_default());
        }
        Self {
            uid: uid.as_raw(),
            name: user.map_or_else(|| uid.to_string(), |user| user.name),
            login_uid: peer.pid().and_then(login_uid),
            may_act: may_act(uid, &groups, Uid::effective(), admins),
        }
    }
}

/// Who may give orders: root, the daemon's own user, and members of the admin group.
fn may_act(uid: Uid, groups: &[Gid], daemon: Uid, admins: Option<Gid>) -> bool {
    uid.is_root() || uid == daemon || admins.is_some_and(|admins| groups.contains(&admins))
}

/// Who logged in and then became the user that process `pid` runs as.
fn login_uid(pid: i32) -> Option<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/loginuid")).ok()?;
    let uid = text.trim().parse().ok()?;
    (uid != u32::MAX).then_some(uid) // all ones: nobody logged in, a service for example
}

/// One command's conversation.
#[derive(Debug)]
pub struct Session {
    /// Who is there.
    pub operator: Operator,
    stream: BufReader<UnixStream>,
}

impl Session {
    /// Reads the request. After [`AdminError::Request`] and [`AdminError::RequestLine`] the command
    /// still waits for a [`Session::finish`] that tells it.
    pub async fn request<T: DeserializeOwned>(&mut self) -> Result<T, AdminError> {
        let mut line = Vec::new();
        let mut limited = (&mut self.stream).take(REQUEST_BYTES_MAX);
        timeout(REQUEST_TIME_MAX, limited.read_until(b'\n', &mut line))
            .await
            .map_err(|_| AdminError::Gone(io::ErrorKind::TimedOut.into()))?
            .map_err(AdminError::Gone)?;
        match line.last() {
            Some(b'\n') => serde_json::from_slice(&line).map_err(AdminError::Request),
            Some(_) if line.len() as u64 == REQUEST_BYTES_MAX => Err(AdminError::RequestLine),
            Some(_) | None => Err(AdminError::Gone(io::ErrorKind::UnexpectedEof.into())),
        }
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
        let mut line = serde_json::to_vec(answer).expect("our own answers serialise");
        line.push(b'\n');
        timeout(ANSWER_TIME_MAX, self.stream.write_all(&line))
            .await
            .map_err(|_| AdminError::Gone(io::ErrorKind::TimedOut.into()))?
            .map_err(AdminError::Gone)
    }
}

/// Why a command got no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody there.
    #[error(
        "no daemon is listening at {socket}; is it running (`systemctl status 'clamcast-*'`), and is this its socket (--socket)?"
    )]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
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
    #[error("the daemon at {socket} closed the connection before it answered; its log says why")]
    Lost {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
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
            Self::Forbidden { .. } => exit::REFUSED,
            Self::Answer { .. } => exit::FAILED,
        }
    }
}

/// Sends `request` to the daemon at `socket` and waits for its answer, however long the work takes.
/// Blocking: a command has nothing else to do.
pub fn call(
    socket: &Path,
    request: &impl Serialize,
    mut on_progress: impl FnMut(Value),
) -> Result<Finish, CallError> {
    let lost = |source| CallError::Lost {
        socket: socket.to_owned(),
        source,
    };
    let mut stream =
        BlockingStream::connect(socket).map_err(|source| not_connected(socket, source))?;
    let mut line = serde_json::to_vec(request).expect("our own requests serialise");
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

fn not_connected(socket: &Path, source: io::Error) -> CallError {
    let socket = socket.to_owned();
    if source.kind() != io::ErrorKind::PermissionDenied {
        return CallError::Unreachable { socket, source };
    }
    let group = fs::metadata(&socket)
        .ok()
        .and_then(|found| Group::from_gid(Gid::from_raw(found.gid())).ok().flatten())
        .map(|group| group.name);
    CallError::Forbidden {
        socket,
        group,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    /// Serves one command with `serve` while `command` runs, and returns what the command got.
    async fn converse<T: Send + 'static>(
        path: PathBuf,
        serve: impl AsyncFnOnce(Session),
        command: impl FnOnce(&Path) -> T + Send + 'static,
    ) -> T {
        let mut listener = Listener::bind(&path, None).unwrap();
        let command = spawn_blocking(move || command(&path));
        serve(listener.accept().await.unwrap()).await;
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
                assert!(operator.may_act);
                let name = User::from_uid(Uid::effective()).unwrap().unwrap().name;
                assert_eq!(
                    operator.to_string(),
                    format!("operator:{}/{name}", operator.uid)
                );
                let request: Value = session.request().await.unwrap();
                session.progress(&json!({"done": 1})).await.unwrap();
                session.progress(&json!({"done": 2})).await.unwrap();
                session.finish(Finish::done(request)).await.unwrap();
            },
            |path| {
                let mut seen = Vec::new();
                let finish = call(path, &json!({"command": "status"}), |step| seen.push(step));
                (finish.unwrap(), seen)
            },
        )
        .await;
        assert_eq!(answer.0, Finish::done(json!({"command": "status"})));
        assert_eq!(answer.1, [json!({"done": 1}), json!({"done": 2})]);
    }

    #[tokio::test]
    async fn an_overlong_request_is_refused_and_told_so() {
        let dir = directory();
        let finish = converse(
            dir.path().join("admin.sock"),
            async |mut session| {
                let error = session.request::<Value>().await.unwrap_err();
                assert!(matches!(error, AdminError::RequestLine), "{error:?}");
                let told = session.finish(Finish::because(exit::USAGE, error)).await;
                told.unwrap();
            },
            |path| {
                let request = "x".repeat(REQUEST_BYTES_MAX as usize);
                call(path, &request, |_| {})
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
            async |mut session| {
                let error = session.request::<Value>().await.unwrap_err();
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
                let _: Value = session.request().await.unwrap();
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
            async |mut session| {
                let _: Value = session.request().await.unwrap();
            },
            |path| call(path, &json!({}), |_| {}),
        )
        .await;
        let error = answer.unwrap_err();
        assert!(matches!(error, CallError::Lost { .. }), "{error:?}");
        assert_eq!(error.exit_code(), exit::UNREACHABLE);
    }

    #[test]
    fn nobody_at_the_socket_is_unreachable_and_says_what_to_look_at() {
        let dir = directory();
        let error = call(&dir.path().join("none.sock"), &json!({}), |_| {}).unwrap_err();
        assert_eq!(error.exit_code(), exit::UNREACHABLE);
        let text = error.to_string();
        assert!(
            text.contains("systemctl status") && text.contains("--socket"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn a_dead_daemons_socket_is_replaced_and_a_live_one_is_not() {
        let dir = directory();
        let path = dir.path().join("admin.sock");
        drop(Listener::bind(&path, None).unwrap());
        assert!(path.exists());
        let _live = Listener::bind(&path, None).unwrap();
        let error = Listener::bind(&path, None).unwrap_err();
        assert!(matches!(error, AdminError::InUse { .. }), "{error:?}");
    }

    #[tokio::test]
    async fn a_file_under_the_sockets_name_is_not_touched() {
        let dir = directory();
        let path = dir.path().join("admin.sock");
        fs::write(&path, "precious").unwrap();
        let error = Listener::bind(&path, None).unwrap_err();
        assert!(matches!(error, AdminError::NotASocket { .. }), "{error:?}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[tokio::test]
    async fn the_socket_is_for_owner_and_group_only() {
        let dir = directory();
        let path = dir.path().join("admin.sock");
        let own = Group::from_gid(Gid::effective()).unwrap().unwrap();
        let listener = Listener::bind(&path, Some(&own.name)).unwrap();
        assert_eq!(listener.admins, Some(own.gid));
        let found = fs::metadata(&path).unwrap();
        assert_eq!(
            (found.mode() & 0o777, found.gid()),
            (0o660, own.gid.as_raw())
        );
    }

    #[tokio::test]
    async fn a_missing_group_leaves_root_and_the_daemons_user() {
        let dir = directory();
        let group = Some("no-such-group-here");
        let listener = Listener::bind(&dir.path().join("admin.sock"), group).unwrap();
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
