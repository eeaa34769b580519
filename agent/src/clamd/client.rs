//! One clamd, spoken to over its socket.
//!
//! Every call is a connection of its own, with `z` commands: terminated by NUL, and so is the
//! answer (clamd(8)). Nothing here waits longer than [`CONNECT_TIMEOUT`] and [`ANSWER_TIMEOUT`].

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

/// A socket of this host, or one near: who has not accepted by then does not accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A command that needs no database is answered in a millisecond; one that waits behind a
/// blocking reload is asked again.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest answer that is read, in bytes. The ones that we ask for are shorter than 200.
const ANSWER_BYTES_MAX: u64 = 4 << 10;

/// Where a clamd listens: an absolute path, or `host:port`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    /// Path of a Unix socket.
    Unix(PathBuf),
    /// `host:port`.
    Tcp(String),
}

impl Address {
    /// The path of a Unix socket.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Unix(path) => Some(path),
            Self::Tcp(_) => None,
        }
    }
}

/// Neither a path nor `host:port`.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no clamd socket; give an absolute path, \"host:port\", or \"none\"")]
pub struct AddressError(String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if text.starts_with('/') {
            return Ok(Self::Unix(text.into()));
        }
        match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
                Ok(Self::Tcp(text.to_owned()))
            }
            Some(_) | None => Err(AddressError(text.to_owned())),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

/// Why clamd did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClamdError {
    /// No socket, or nobody behind it.
    #[error("no clamd at {address}")]
    Absent {
        /// Where.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
    /// The socket is there and not for us.
    #[error(
        "may not talk to clamd at {address}; see LocalSocketMode and LocalSocketGroup in clamd.conf"
    )]
    Forbidden {
        /// Where.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody is there, but no answer came, or only a part of one.
    #[error("clamd at {address} does not answer {command}")]
    Silent {
        /// Where.
        address: Address,
        /// What it was asked.
        command: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// clamd.conf forbids the command (`EnableReloadCommand no`, from ClamAV 1.5 on).
    #[error("clamd at {address} does not allow {command}")]
    Unavailable {
        /// Where.
        address: Address,
        /// What it was asked.
        command: &'static str,
    },
    /// Not an answer to what it was asked.
    #[error("clamd at {address} answered {command} with `{answer}`")]
    Unexpected {
        /// Where.
        address: Address,
        /// What it was asked.
        command: &'static str,
        /// What it said.
        answer: String,
    },
}

/// What clamd says to the bytes it was given.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Scan {
    /// Nothing in them.
    Clean,
    /// The name of the signature that matched.
    Found(String),
    /// It could not scan them.
    Error(String),
}

/// A clamd. It holds no connection: clamd may be restarted at any time.
#[derive(Clone, Debug)]
pub struct Clamd {
    address: Address,
    answer_timeout: Duration,
}

impl Clamd {
    /// The one at `address`, whether it is there or not.
    pub fn new(address: Address) -> Self {
        Self {
            address,
            answer_timeout: ANSWER_TIMEOUT,
        }
    }

    /// Where it listens.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Whether it answers.
    ///
    /// # Errors
    ///
    /// If it does not.
    pub async fn ping(&self) -> Result<(), ClamdError> {
        match self.ask("PING", b"").await?.as_str() {
            "PONG" => Ok(()),
            answer => Err(self.unexpected("PING", answer)),
        }
    }

    /// Program, daily database and its time: `ClamAV 1.4.6/27890/Sun Nov 22 06:43:59 2026`.
    ///
    /// # Errors
    ///
    /// If there is no such answer. A clamd without an engine names version 4294967295.
    pub async fn version(&self) -> Result<String, ClamdError> {
        let answer = self.ask("VERSION", b"").await?;
        if answer.starts_with("ClamAV ") {
            Ok(answer)
        } else {
            Err(self.unexpected("VERSION", &answer))
        }
    }

    /// Asks for a reload. That it was asked says nothing about whether one happens: while another
    /// one runs, clamd drops the request without a word.
    ///
    /// # Errors
    ///
    /// If it did not take the request.
    pub async fn reload(&self) -> Result<(), ClamdError> {
        match self.ask("RELOAD", b"").await?.as_str() {
            "RELOADING" => Ok(()),
            answer => Err(self.unexpected("RELOAD", answer)),
        }
    }

    /// Scans `bytes`, which are few.
    ///
    /// # Errors
    ///
    /// If there is no answer about them.
    pub async fn scan(&self, bytes: &[u8]) -> Result<Scan, ClamdError> {
        let length = u32::try_from(bytes.len()).expect("a sample is small");
        // Chunks of length and bytes, ended by an empty one (clamd(8), INSTREAM).
        let body = [&length.to_be_bytes()[..], bytes, &0_u32.to_be_bytes()].concat();
        let answer = self.ask("INSTREAM", &body).await?;
        if let Some(said) = answer.strip_prefix("stream: ") {
            if said == "OK" {
                return Ok(Scan::Clean);
            }
            if let Some(name) = said.strip_suffix(" FOUND") {
                return Ok(Scan::Found(name.to_owned()));
            }
        }
        match answer.strip_suffix(" ERROR") {
            Some(error) => Ok(Scan::Error(error.to_owned())),
            None => Err(self.unexpected("INSTREAM", &answer)),
        }
    }

    async fn ask(&self, command: &'static str, body: &[u8]) -> Result<String, ClamdError> {
        let request = [b"z", command.as_bytes(), b"\0", body].concat();
        let silent = |source| ClamdError::Silent {
            address: self.address.clone(),
            command,
            source,
        };
        let answer = match &self.address {
            Address::Unix(path) => {
                let stream = self.connected(command, UnixStream::connect(path)).await?;
                timeout(self.answer_timeout, exchange(stream, &request)).await
            }
            Address::Tcp(address) => {
                let stream = self.connected(command, TcpStream::connect(address)).await?;
                timeout(self.answer_timeout, exchange(stream, &request)).await
            }
        };
        let answer = answer.map_err(|_| silent(io::ErrorKind::TimedOut.into()))?;
        let answer = answer.map_err(silent)?;
        if answer == "COMMAND UNAVAILABLE" {
            return Err(ClamdError::Unavailable {
                address: self.address.clone(),
                command,
            });
        }
        Ok(answer)
    }

    async fn connected<S>(
        &self,
        command: &'static str,
        connecting: impl Future<Output = io::Result<S>>,
    ) -> Result<S, ClamdError> {
        let address = self.address.clone();
        let connected = timeout(CONNECT_TIMEOUT, connecting).await;
        let source = match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(stream) => return Ok(stream),
            Err(source) => source,
        };
        Err(if source.kind() == io::ErrorKind::PermissionDenied {
            ClamdError::Forbidden { address, source }
        } else if [io::ErrorKind::TimedOut, io::ErrorKind::WouldBlock].contains(&source.kind()) {
            // Its queue of connections is full, or the host behind the address says nothing.
            ClamdError::Silent {
                address,
                command,
                source,
            }
        } else {
            ClamdError::Absent { address, source }
        })
    }

    fn unexpected(&self, command: &'static str, answer: &str) -> ClamdError {
        ClamdError::Unexpected {
            address: self.address.clone(),
            command,
            answer: answer.to_owned(),
        }
    }
}

/// Sends `request` and returns the answer without the NUL at its end, which tells a whole answer
/// from one that was cut off. clamd writes a newline there where it did not get as far as reading
/// the command, and closes the connection.
async fn exchange(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    request: &[u8],
) -> io::Result<String> {
    // A clamd that answers before it has read everything closes: its answer counts nonetheless.
    let sent = stream.write_all(request).await;
    let mut answer = Vec::new();
    let mut bounded = stream.take(ANSWER_BYTES_MAX);
    loop {
        let read = bounded.read_buf(&mut answer).await;
        if let Some(end) = answer.iter().position(|&b| b == 0 || b == b'\n') {
            return Ok(String::from_utf8_lossy(&answer[..end]).into_owned());
        }
        match read {
            Ok(0) if answer.len() as u64 >= ANSWER_BYTES_MAX => {
                let message = format!("an answer of more than {ANSWER_BYTES_MAX} bytes");
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
            Ok(0) => return Err(sent.err().unwrap_or(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => {}
            Err(error) => return Err(sent.err().unwrap_or(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::Fake;
    use super::*;

    #[track_caller]
    fn address(text: &str, expected: Option<Address>) {
        assert_eq!(text.parse().ok(), expected, "{text}");
    }

    #[test]
    fn an_address_is_a_path_or_a_host_with_a_port() {
        address("/run/clamd", Some(Address::Unix("/run/clamd".into())));
        for tcp in ["localhost:3310", "[::1]:3310", "10.0.0.7:3310"] {
            address(tcp, Some(Address::Tcp(tcp.into())));
        }
        for neither in ["", "none", "run/clamd", "localhost", ":3310", "host:99999"] {
            address(neither, None);
        }
    }

    #[tokio::test]
    async fn answers_are_read_to_their_end_mark() {
        let fake = Fake::new(|command| match command {
            "PING" => Some(b"PONG\0".to_vec()),
            "VERSION" => Some(b"ClamAV 1.4.6/27890/Sun Nov 22 06:43:59 2026\0".to_vec()),
            "RELOAD" => Some(b"COMMAND UNAVAILABLE\0".to_vec()),
            _ => Some(b"stream: Clamcast.Install-7.UNOFFICIAL FOUND\0".to_vec()),
        });
        let clamd = Clamd::new(fake.address());
        clamd.ping().await.unwrap();
        assert!(clamd.version().await.unwrap().contains("/27890/"));
        let found = Scan::Found("Clamcast.Install-7.UNOFFICIAL".into());
        assert_eq!(clamd.scan(b"sample").await.unwrap(), found);
        let refused = clamd.reload().await.unwrap_err();
        assert!(
            matches!(refused, ClamdError::Unavailable { .. }),
            "{refused:?}"
        );
    }

    #[tokio::test]
    async fn what_is_no_answer_is_an_error() {
        for (answer, expected) in [
            (&b""[..], "does not answer PING"),
            (b"PON", "does not answer PING"),
            (b"UNKNOWN COMMAND\0", "answered PING with `UNKNOWN COMMAND`"),
            (&[b'x'; 70_000], "does not answer PING"),
        ] {
            let fake = Fake::new(move |_| Some(answer.to_vec()));
            let error = Clamd::new(fake.address()).ping().await.unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    #[tokio::test]
    async fn scans_can_end_in_three_ways() {
        for (answer, expected) in [
            ("stream: OK\0", Scan::Clean),
            ("stream: A.B FOUND\0", Scan::Found("A.B".into())),
            (
                "INSTREAM size limit exceeded. ERROR\0",
                Scan::Error("INSTREAM size limit exceeded.".into()),
            ),
        ] {
            let fake = Fake::new(move |_| Some(answer.as_bytes().to_vec()));
            let scan = Clamd::new(fake.address()).scan(b"sample").await.unwrap();
            assert_eq!(scan, expected);
        }
    }

    #[tokio::test]
    async fn nobody_at_the_socket_is_absent() {
        let mut fake = Fake::new(|_| None);
        fake.kill().await;
        let error = Clamd::new(fake.address()).ping().await.unwrap_err();
        assert!(matches!(error, ClamdError::Absent { .. }), "{error:?}");
        let nowhere = Address::Unix("/nowhere/clamd.ctl".into());
        let error = Clamd::new(nowhere).ping().await.unwrap_err();
        assert!(matches!(error, ClamdError::Absent { .. }), "{error:?}");
    }

    #[tokio::test]
    async fn a_clamd_that_accepts_and_says_nothing_is_silent() {
        let fake = Fake::new(|_| None);
        let clamd = Clamd {
            address: fake.address(),
            answer_timeout: Duration::from_millis(10),
        };
        let error = clamd.ping().await.unwrap_err();
        assert!(matches!(error, ClamdError::Silent { .. }), "{error:?}");
    }
}
