//! The load test in a service of its own (`clamcast-loadtest@.service`), which has another user than
//! the master, no network and none of the master's files.
//!
//! The master connects to the service's socket, and sends one line with the limits and the directory
//! of the databases as a descriptor. The service answers with one line:
//!
//! ```text
//! master   {"memory":2147483648,"cpu":600}        and a directory (SCM_RIGHTS)
//! service  {"refused":{"reason":"daily.ndb: Malformed database"}}
//! ```

use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::thread;
use std::time::{Duration, Instant};

use clamcast_daemon::clamscan::{self, LoadError};
use clamcast_daemon::exit::Exit;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::load_test::{Limits, LoadTestError, TIME_MAX, confined};

/// Longest request in bytes: two numbers.
const REQUEST_BYTES_MAX: usize = 256;

/// Longest answer in bytes: a reason has at most 400 characters.
const ANSWER_BYTES_MAX: usize = 16 << 10;

/// Each end writes its line at once. An end that has not done so within this time hangs.
const LINE_TIME_MAX: Duration = Duration::from_secs(10);

/// The service is given this much more time than clamscan has: systemd starts the service first.
const START_TIME_MAX: Duration = Duration::from_secs(60);

/// The master looks this often whether it has to stop.
const LOOK: Duration = Duration::from_millis(200);

/// Limits of clamscan.
#[derive(Deserialize, Serialize)]
struct Request {
    /// Address space in bytes.
    memory: u64,
    /// CPU time in seconds.
    cpu: u64,
}

/// The end of clamscan.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Loaded,
    Refused { reason: String },
    Hindered { reason: String },
    NoReason { status: i32 },
    TimedOut,
    Run { program: PathBuf, reason: String },
    Failed { reason: String },
}

/// Why the service gave no verdict.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The socket.
    #[error("cannot send the request to the service")]
    Socket(#[source] io::Error),
    /// Nothing came in time.
    #[error("the service has not answered within {0:?}")]
    Silent(Duration),
    /// It ended without an answer.
    #[error("the service ended without an answer")]
    Ended,
    /// Another version answers, or something else.
    #[error("the answer of the service is malformed; install service and daemon of one version")]
    Answer(#[source] serde_json::Error),
    /// The service could not run clamscan.
    #[error("the service could not run clamscan: {0}")]
    Failed(String),
}

impl From<Result<(), LoadError>> for Answer {
    fn from(loaded: Result<(), LoadError>) -> Self {
        match loaded {
            Ok(()) => Self::Loaded,
            Err(LoadError::Refused { reason }) => Self::Refused { reason },
            Err(LoadError::Hindered { reason }) => Self::Hindered { reason },
            Err(LoadError::NoReason { status }) => Self::NoReason {
                status: status.into_raw(),
            },
            Err(LoadError::TimedOut { .. }) => Self::TimedOut,
            Err(LoadError::Run { program, source }) => Self::Run {
                program,
                reason: source.to_string(),
            },
        }
    }
}

impl Answer {
    fn verdict(self) -> Result<Result<(), LoadError>, ServiceError> {
        Ok(Err(match self {
            Self::Loaded => return Ok(Ok(())),
            Self::Failed { reason } => return Err(ServiceError::Failed(reason)),
            Self::Refused { reason } => LoadError::Refused { reason },
            Self::Hindered { reason } => LoadError::Hindered { reason },
            Self::NoReason { status } => LoadError::NoReason {
                status: ExitStatus::from_raw(status),
            },
            Self::TimedOut => LoadError::TimedOut { limit: TIME_MAX },
            Self::Run { program, reason } => LoadError::Run {
                program,
                source: io::Error::other(reason),
            },
        }))
    }
}

/// Has the service at `socket` load the databases. `None` if there is no such socket.
pub(super) fn load(
    socket: &Path,
    databases: &Path,
    limits: &Limits,
    stop: &CancellationToken,
) -> Option<Result<Result<(), LoadError>, LoadTestError>> {
    let connected = UnixStream::connect(socket);
    if let Err(error) = &connected
        && error.kind() == io::ErrorKind::NotFound
    {
        return None;
    }
    let ask = || -> Result<_, ServiceError> {
        let stream = connected.map_err(ServiceError::Socket)?;
        send(&stream, databases, limits).map_err(ServiceError::Socket)?;
        let Some(line) = wait(&stream, stop)? else {
            return Ok(None); // closing the connection ends clamscan
        };
        let answer: Answer = serde_json::from_slice(&line).map_err(ServiceError::Answer)?;
        answer.verdict().map(Some)
    };
    Some(match ask() {
        Ok(Some(verdict)) => Ok(verdict),
        Ok(None) => Err(LoadTestError::Stopping),
        Err(source) => Err(LoadTestError::Service {
            socket: socket.to_owned(),
            source,
        }),
    })
}

fn send(mut stream: &UnixStream, databases: &Path, limits: &Limits) -> io::Result<()> {
    stream.set_write_timeout(Some(LINE_TIME_MAX))?;
    let request = Request {
        memory: limits.memory,
        cpu: limits.cpu.as_secs(),
    };
    let mut line = serde_json::to_vec(&request).expect("two numbers");
    line.push(b'\n');
    let directory = fs::File::open(databases)?;
    let descriptors = [directory.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(
        control.push(SendAncillaryMessage::ScmRights(&descriptors)),
        "there is room for one"
    );
    let sent = sendmsg(
        stream,
        &[IoSlice::new(&line)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    stream.write_all(&line[sent..])
}

/// Waits for the answer. `None` if the master has to stop.
fn wait(
    mut stream: &UnixStream,
    stop: &CancellationToken,
) -> Result<Option<Vec<u8>>, ServiceError> {
    let patience = TIME_MAX + START_TIME_MAX;
    let until = Instant::now() + patience;
    let looking = stream.set_read_timeout(Some(LOOK));
    looking.map_err(ServiceError::Socket)?;
    let (mut line, mut bytes) = (Vec::new(), [0; 4096]);
    loop {
        if stop.is_cancelled() {
            return Ok(None);
        }
        if Instant::now() > until {
            return Err(ServiceError::Silent(patience));
        }
        match stream.read(&mut bytes) {
            Ok(0) => return Err(ServiceError::Ended),
            Ok(length) => line.extend(&bytes[..length]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(ServiceError::Socket(error)),
        }
        if line.ends_with(b"\n") {
            return Ok(Some(line));
        }
        if line.len() > ANSWER_BYTES_MAX {
            let message = format!("its answer has more than {ANSWER_BYTES_MAX} bytes");
            return Err(ServiceError::Socket(io::Error::other(message)));
        }
    }
}

/// Runs as the service: answers the request on stdin, which is the connection (`Accept=yes`).
pub fn serve() -> Result<(), Exit> {
    let stream = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    Ok(answer(&stream, clamscan::find().as_deref())?)
}

/// Answers one request with `program`, a clamscan. When the master closes the connection, clamscan is
/// killed.
fn answer(mut stream: &UnixStream, program: Option<&Path>) -> io::Result<()> {
    stream.set_read_timeout(Some(LINE_TIME_MAX))?;
    stream.set_write_timeout(Some(LINE_TIME_MAX))?;
    let (request, databases) = receive(stream)?;
    stream.set_read_timeout(None)?;
    let stop = CancellationToken::new();
    let ending = (stream.try_clone()?, stop.clone());
    thread::spawn(move || {
        let (mut stream, stop) = ending;
        let _ = stream.read(&mut [0]); // the master says nothing more
        stop.cancel();
    });
    let answer = match test(request, &databases, program, &stop) {
        Ok(loaded) => loaded.into(),
        Err(LoadTestError::Stopping) => return Ok(()),
        Err(error) => Answer::Failed {
            reason: crate::chain(&error),
        },
    };
    let mut line = serde_json::to_vec(&answer).expect("our own answers serialise");
    line.push(b'\n');
    stream.write_all(&line)
}

fn test(
    request: Request,
    databases: &OwnedFd,
    program: Option<&Path>,
    stop: &CancellationToken,
) -> Result<Result<(), LoadError>, LoadTestError> {
    let program = program.ok_or(LoadTestError::NoClamscan)?;
    let limits = Limits {
        memory: request.memory,
        cpu: Duration::from_secs(request.cpu),
    };
    // clamscan inherits the descriptor under the same number. It can pass no directory above this one,
    // because they belong to the master's user.
    fcntl_setfd(databases, FdFlags::empty())
        .map_err(|error| LoadTestError::Prepare(error.into()))?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", databases.as_raw_fd()));
    let temporary = tempfile::tempdir().map_err(LoadTestError::Prepare)?;
    confined(program, &path, temporary.path(), &limits, stop)
}

/// Reads the request and takes the directory that comes with it.
fn receive(stream: &UnixStream) -> io::Result<(Request, OwnedFd)> {
    let malformed = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why);
    let (mut line, mut directory) = (Vec::new(), None);
    while !line.ends_with(b"\n") {
        if line.len() > REQUEST_BYTES_MAX {
            return Err(malformed("the request is too long"));
        }
        let mut bytes = [0; REQUEST_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let received = recvmsg(stream, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
                directory = descriptors.next().or(directory);
            }
        }
        if received.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.extend(&bytes[..received.bytes]);
    }
    let directory = directory.ok_or_else(|| malformed("the request has no directory"))?;
    Ok((serde_json::from_slice(&line)?, directory))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixListener;

    /// A directory with a database, a socket, and a shell script in the place of clamscan.
    struct Scene(tempfile::TempDir);

    impl Scene {
        fn new(script: &str) -> Self {
            let scene = Self(tempfile::tempdir().unwrap());
            for directory in ["db", "bin"] {
                fs::create_dir(scene.path(directory)).unwrap();
            }
            fs::write(scene.path("db/daily.cud"), "x").unwrap();
            let program = scene.path("bin/clamscan");
            fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
            scene
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        /// Has a service that behaves like `serve` load the databases.
        fn load(
            &self,
            stop: &CancellationToken,
            serve: impl FnOnce(UnixStream) + Send,
        ) -> Result<Result<(), LoadError>, LoadTestError> {
            let _ = fs::remove_file(self.path("socket"));
            let listener = UnixListener::bind(self.path("socket")).unwrap();
            let limits = Limits::for_databases(0);
            thread::scope(|scope| {
                scope.spawn(move || serve(listener.accept().unwrap().0));
                load(&self.path("socket"), &self.path("db"), &limits, stop).unwrap()
            })
        }

        fn test(&self, stop: &CancellationToken) -> Result<Result<(), LoadError>, LoadTestError> {
            let program = self.path("bin/clamscan");
            loop {
                let tested = self.load(stop, |stream| answer(&stream, Some(&program)).unwrap());
                match tested {
                    // A test beside this one may be about to start a process that still has the script
                    // open.
                    Ok(Err(LoadError::Run { source, .. }))
                        if source.to_string().contains("busy") => {}
                    tested => return tested,
                }
            }
        }
    }

    #[test]
    fn the_service_loads_the_directory_it_was_sent_and_returns_the_verdict() {
        for (script, expected) in [
            ("test -f \"$3/daily.cud\"", "Ok(())"),
            ("! true > \"$3/new\" && ! cat /etc/passwd", "Ok(())"),
            ("echo x > \"$TMPDIR/x\"", "Ok(())"),
            (
                "echo 'ERROR: Malformed database' >&2; exit 2",
                "Err(Refused { reason: \"Malformed database\" })",
            ),
            (
                "echo \"ERROR: Can't allocate memory\" >&2; exit 2",
                "Err(Hindered { reason: \"Can't allocate memory\" })",
            ),
        ] {
            let verdict = Scene::new(script).test(&CancellationToken::new()).unwrap();
            assert_eq!(format!("{verdict:?}"), expected, "{script}");
        }
        let verdict = Scene::new("kill -SEGV $$").test(&CancellationToken::new());
        let Ok(Err(LoadError::NoReason { status })) = verdict else {
            panic!("{verdict:?}");
        };
        assert_eq!(status.signal(), Some(11));
    }

    #[test]
    fn a_service_that_fails_says_nothing_about_the_databases() {
        let scene = Scene::new("");
        let stop = CancellationToken::new();
        let check = |serve: fn(UnixStream), expected: &str| {
            let error = scene.load(&stop, serve).unwrap_err();
            assert!(error.is_ours(), "{error}");
            let said = crate::chain(&error);
            assert!(said.contains(expected), "{said}");
            assert!(said.contains("journalctl"), "{said}");
        };
        check(drop, "");
        check(
            |mut stream| {
                let _ = stream.read(&mut [0; REQUEST_BYTES_MAX]);
                stream.write_all(b"what?\n").unwrap();
            },
            "malformed",
        );
        check(
            |mut stream| {
                let _ = stream.read(&mut [0; REQUEST_BYTES_MAX]);
                let _ = stream.write_all(&[b'x'; 2 * ANSWER_BYTES_MAX]);
            },
            "more than",
        );
        check(|stream| answer(&stream, None).unwrap(), "no clamscan");

        // A socket at which nobody listens.
        let limits = Limits::for_databases(0);
        let refused = load(&scene.path("socket"), &scene.path("db"), &limits, &stop);
        assert!(matches!(
            refused.unwrap(),
            Err(LoadTestError::Service { .. })
        ));
        let absent = load(&scene.path("absent"), &scene.path("db"), &limits, &stop);
        assert!(absent.is_none(), "the daemon tests by itself");
    }

    #[test]
    fn a_master_that_stops_ends_the_services_clamscan() {
        let scene = Scene::new("echo $$ > \"$TMPDIR/pid\"; exec sleep 1000");
        let stop = CancellationToken::new();
        let begun = Instant::now();
        let tested = thread::scope(|scope| {
            let testing = scope.spawn(|| scene.test(&stop));
            thread::sleep(Duration::from_millis(300));
            stop.cancel();
            testing.join().unwrap()
        });
        assert!(matches!(tested, Err(LoadTestError::Stopping)), "{tested:?}");
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "clamscan is killed"
        );
    }

    #[test]
    fn a_request_without_a_directory_or_without_an_end_is_malformed() {
        let (mut here, there) = UnixStream::pair().unwrap();
        here.write_all(b"{\"memory\":1,\"cpu\":1}\n").unwrap();
        let error = receive(&there).err().unwrap();
        assert_eq!(error.to_string(), "the request has no directory");
        here.write_all(&[b'x'; 3 * REQUEST_BYTES_MAX]).unwrap();
        let error = receive(&there).err().unwrap();
        assert_eq!(error.to_string(), "the request is too long");
    }
}
