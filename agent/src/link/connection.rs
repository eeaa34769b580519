//! The connection to the master: made, kept, and made again.
//!
//! The agent dials, so that no host opens a port. The master checks certificate and revocation list
//! after the handshake, and an agent's `connect` succeeds before that: connected means that
//! `Welcome` arrived and its key set was believed, and only that resets the back-off.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clamcast_proto::wire::{self, FrameError, Part, ToAgent, ToMaster, Welcome, close};
use quinn::{
    Connection, ConnectionError, Endpoint, RecvStream, SendStream, TransportErrorCode, VarInt,
};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::StreamExt as _;
use tokio_util::codec::{FramedRead, LengthDelimitedCodec};
use tokio_util::sync::CancellationToken;

use crate::chain;
use crate::config::MASTERS_MAX;
use crate::link::backoff::Backoff;
use crate::link::endpoint::{Credentials, SERVER_NAME};

/// Waits between two tries to reach a master.
pub const RETRY: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));

/// One address gets this long for the handshake, and the master behind it as long again for its
/// `Welcome`.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// Addresses that are tried for one name.
const RESOLVED_MAX: usize = MASTERS_MAX;

/// Between two keep-alives until a master says otherwise.
const KEEP_ALIVE: Duration = Duration::from_secs(wire::KEEP_ALIVE_SECS);

/// The longest that a master may ask for: two still fit into the idle timeout.
const KEEP_ALIVE_LONGEST: Duration = Duration::from_secs(wire::IDLE_TIMEOUT_SECS / 2);

/// A master that does not take a message for this long does not read.
const WRITE_TIME: Duration = Duration::from_secs(30);

/// A part's header comes with the stream; one that does not is never going to.
const HEADER_TIME: Duration = Duration::from_secs(30);

/// Messages that wait to be written: all receipts after Hello, and what an install says meanwhile.
const OUTBOX_MAX: usize = wire::RECEIPTS_PENDING_MAX + 64;

/// What the link tells the keeper.
#[derive(Debug)]
pub enum Event {
    /// The master's first words. Whoever is told judges them and then may speak.
    Welcome {
        /// The words.
        welcome: Box<Welcome>,
        /// Where the master is.
        address: SocketAddr,
        /// The way to it.
        outbox: Outbox,
        /// Whether its key set is believed; if not, why.
        answer: oneshot::Sender<Result<(), String>>,
    },
    /// A message.
    Message(ToAgent),
    /// A file that arrives.
    Part(Part, RecvStream),
    /// The connection is over, or none could be made; nothing more comes from it.
    Disconnected {
        /// Why.
        error: Arc<LinkError>,
    },
}

/// The way to the master.
#[derive(Clone, Debug)]
pub struct Outbox {
    frames: mpsc::Sender<Vec<u8>>,
    connection: Connection,
}

impl Outbox {
    /// Queues a message; never waits. A master that does not read loses its connection.
    ///
    /// # Errors
    ///
    /// If the message is longer than a frame may be.
    pub fn send(&self, message: &ToMaster) -> Result<(), FrameError> {
        let frame = wire::frame(message)?;
        if let Err(mpsc::error::TrySendError::Full(_)) = self.frames.try_send(frame) {
            tracing::warn!("the master reads nothing, connection closed");
            hang_up(&self.connection, close::TIMEOUT, "reads nothing");
        }
        Ok(())
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No such name.
    #[error("cannot find the address of {name}")]
    Resolve {
        /// `host:port` as configured.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// No route, no IPv6 and the like.
    #[error("cannot connect to {address}")]
    Connect {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: quinn::ConnectError,
    },
    /// Nobody there, or UDP does not get through.
    #[error("no answer from {address}; is the master running, and does UDP get there?")]
    NoAnswer {
        /// The address.
        address: SocketAddr,
    },
    /// It ended.
    #[error("{}", said(*address, end))]
    Lost {
        /// The address.
        address: SocketAddr,
        /// Why; the text says what it means.
        end: ConnectionError,
    },
    /// It is not spoken to any more.
    #[error("the master at {address} {what}")]
    Protocol {
        /// The address.
        address: SocketAddr,
        /// What it did.
        what: String,
    },
}

/// What the end of a connection means, with the next step if there is one.
fn said(address: SocketAddr, error: &ConnectionError) -> String {
    match error {
        ConnectionError::ApplicationClosed(closed) => {
            let code = u32::try_from(closed.error_code.into_inner()).unwrap_or(u32::MAX);
            match code {
                close::STOPPING => format!("the master at {address} stops"),
                close::REVOKED => format!(
                    "the master at {address} has this host's certificate on its revocation list; \
                     make a new one with `clamcast-certs agent --force`"
                ),
                close::NOT_AN_AGENT => format!(
                    "the master at {address} does not take this host's certificate for one of an \
                     agent of its fleet"
                ),
                close::REPLACED => format!(
                    "another connection with this host's certificate took over at {address}; is \
                     the same bundle on two hosts?"
                ),
                close::BUSY => format!(
                    "the master at {address} has too many agents, or too much work by this one"
                ),
                _ => format!("the master at {address} closed the connection: {closed}"),
            }
        }
        ConnectionError::ConnectionClosed(closed)
            if closed.error_code == TransportErrorCode::CONNECTION_REFUSED =>
        {
            format!("the master at {address} lets nobody in now: it stops, or has too many agents")
        }
        ConnectionError::ConnectionClosed(closed) => format!(
            "the master at {address} refused the handshake ({closed}); is this host's certificate \
             from its CA, and not expired?"
        ),
        ConnectionError::TransportError(error) => format!(
            "what answers at {address} is not this fleet's master ({error}); wrong address, or ca \
             of another fleet?"
        ),
        ConnectionError::TimedOut => format!("nothing more was heard from {address}"),
        ConnectionError::Reset => format!("the master at {address} was restarted"),
        ConnectionError::VersionMismatch
        | ConnectionError::LocallyClosed
        | ConnectionError::CidsExhausted => format!("the connection to {address} ended ({error})"),
    }
}

impl LinkError {
    /// Whether it came from a master that will not want this host in a second either.
    fn is_rejection(&self) -> bool {
        let Self::Lost {
            end: ConnectionError::ApplicationClosed(closed),
            ..
        } = self
        else {
            return false;
        };
        [
            close::REVOKED,
            close::NOT_AN_AGENT,
            close::REPLACED,
            close::BUSY,
        ]
        .map(VarInt::from_u32)
        .contains(&closed.error_code)
    }
}

/// What it takes to connect.
#[derive(Debug)]
pub struct Link {
    /// The socket.
    pub endpoint: Endpoint,
    /// Who this host is.
    pub credentials: Arc<Credentials>,
    /// `host:port` of the master, tried in order.
    pub addresses: Vec<String>,
    /// Who hears of it.
    pub events: mpsc::Sender<Event>,
}

/// Keeps a connection to the master until `stop` fires.
pub async fn run(link: Link, stop: CancellationToken) {
    let mut backoff = RETRY;
    let mut keep_alive = KEEP_ALIVE;
    let mut complaint = String::new();
    loop {
        let visit = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            visit = link.visit(&mut keep_alive) => visit,
        };
        let text = visit.error.to_string();
        // A master that is away for a weekend is one line in the log, not one a minute.
        if visit.welcomed || text != complaint {
            let error = chain(&*visit.error); // a peer's words may be in it: text is quoted
            tracing::warn!(error, "no connection to the master");
            complaint = text;
        }
        // Two hosts with one certificate replace each other: that must not go round once a second.
        if visit.welcomed && !visit.error.is_rejection() {
            backoff.reset();
        }
        let error = visit.error;
        if link
            .events
            .send(Event::Disconnected { error })
            .await
            .is_err()
        {
            break; // the keeper is gone, so is the agent
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            () = tokio::time::sleep(backoff.next(rand::random())) => {}
        }
    }
    link.endpoint
        .close(VarInt::from_u32(close::STOPPING), b"stopping");
    // The master need not hear it: it notices by itself.
    let _ = timeout(Duration::from_secs(1), link.endpoint.wait_idle()).await;
}

/// How a round through the addresses went.
struct Visit {
    /// Whether a master was connected in it.
    welcomed: bool,
    error: Arc<LinkError>,
}

/// A connection with the master's first words.
struct Greeted {
    connection: Connection,
    send: SendStream,
    frames: Frames,
    welcome: Welcome,
}

type Frames = FramedRead<RecvStream, LengthDelimitedCodec>;

fn frames(stream: RecvStream, limit: usize) -> Frames {
    let codec = LengthDelimitedCodec::builder()
        .max_frame_length(limit)
        .new_codec();
    FramedRead::new(stream, codec)
}

impl Link {
    /// Tries every address once; returns when a conversation ended, or nobody was there.
    async fn visit(&self, keep_alive: &mut Duration) -> Visit {
        let mut failure = None;
        for name in &self.addresses {
            let found = match tokio::net::lookup_host(name).await {
                Ok(found) => found,
                Err(source) => {
                    let name = name.clone();
                    keep_telling(&mut failure, LinkError::Resolve { name, source });
                    continue;
                }
            };
            for address in found.take(RESOLVED_MAX) {
                match greet(&self.endpoint, &self.credentials, address, *keep_alive).await {
                    Ok(greeted) => {
                        let asked = Duration::from_secs(greeted.welcome.keep_alive);
                        // Of effect from the next connection on; this one was made with the last.
                        *keep_alive = asked.clamp(Duration::from_secs(1), KEEP_ALIVE_LONGEST);
                        let (welcomed, error) = self.converse(greeted, address).await;
                        let error = Arc::new(error);
                        return Visit { welcomed, error };
                    }
                    Err(error) => keep_telling(&mut failure, error),
                }
            }
        }
        let nowhere = || LinkError::Resolve {
            name: self.addresses.join(", "),
            source: io::ErrorKind::NotFound.into(),
        };
        Visit {
            welcomed: false,
            error: Arc::new(failure.unwrap_or_else(nowhere)),
        }
    }

    /// Speaks with the master until the connection ends. Also returns whether it was believed.
    async fn converse(&self, greeted: Greeted, address: SocketAddr) -> (bool, LinkError) {
        let Greeted {
            connection,
            send,
            mut frames,
            welcome,
        } = greeted;
        let (to_writer, from_keeper) = mpsc::channel(OUTBOX_MAX);
        let outbox = Outbox {
            frames: to_writer,
            connection: connection.clone(),
        };
        let (answer, judged) = oneshot::channel();
        let version = welcome.master_version.clone();
        let event = Event::Welcome {
            welcome: Box::new(welcome),
            address,
            outbox: outbox.clone(),
            answer,
        };
        let judged = match self.events.send(event).await {
            Ok(()) => judged.await,
            Err(_) => return (false, stopped(address)),
        };
        match judged {
            Ok(Ok(())) => tracing::info!(%address, version, "connected to the master"),
            Ok(Err(what)) => {
                hang_up(&connection, close::PROTOCOL, "key set refused");
                return (false, LinkError::Protocol { address, what });
            }
            Err(_) => return (false, stopped(address)),
        }
        let mut headers = JoinSet::new();
        let error = tokio::select! {
            error = self.read(&mut frames, &outbox, &connection, address) => error,
            error = write(send, from_keeper, &connection, address) => error,
            error = self.accept_parts(&connection, &mut headers, address) => error,
        };
        hang_up(&connection, close::STOPPING, "conversation over"); // nothing if it is closed
        headers.shutdown().await; // so that no part arrives after the news of the end
        (true, error)
    }

    /// Hands messages on.
    async fn read(
        &self,
        frames: &mut Frames,
        outbox: &Outbox,
        connection: &Connection,
        address: SocketAddr,
    ) -> LinkError {
        loop {
            let message = match next(frames, connection, address).await {
                Ok(Ok(message)) => message,
                Ok(Err(error)) => {
                    tracing::warn!(
                        error = chain(&error),
                        "a message of the master is not understood"
                    );
                    let answer = ToMaster::Error {
                        offer: None,
                        message: error.to_string(),
                        other_master: None,
                    };
                    outbox
                        .send(&answer)
                        .expect("a kind is 40 characters at most");
                    continue;
                }
                Err(error) => return error,
            };
            if self.events.send(Event::Message(message)).await.is_err() {
                return stopped(address);
            }
        }
    }

    /// Takes the streams that files come on, and hands them on once it is known which file it is.
    async fn accept_parts(
        &self,
        connection: &Connection,
        headers: &mut JoinSet<()>,
        address: SocketAddr,
    ) -> LinkError {
        loop {
            let stream = match connection.accept_uni().await {
                Ok(stream) => stream,
                Err(end) => return LinkError::Lost { address, end },
            };
            while headers.try_join_next().is_some() {}
            let events = self.events.clone();
            headers.spawn(async move {
                match timeout(HEADER_TIME, header(stream)).await {
                    // Nobody hears it only when the agent stops.
                    Ok(Ok((part, stream))) => drop(events.send(Event::Part(part, stream)).await),
                    Ok(Err(error)) => {
                        let error = chain(&error);
                        tracing::warn!(error, "a stream of the master has no part in it");
                    }
                    Err(_) => tracing::warn!("a stream of the master stays empty"),
                }
            });
        }
    }
}

/// The master's first words to this host. The master then takes this connection for the host's only
/// one, and it ends here: not beside an agent that runs.
pub async fn first_words(
    endpoint: &Endpoint,
    credentials: &Credentials,
    address: SocketAddr,
) -> Result<Welcome, LinkError> {
    let greeted = greet(endpoint, credentials, address, KEEP_ALIVE).await?;
    hang_up(&greeted.connection, close::STOPPING, "that was all");
    Ok(greeted.welcome)
}

/// Connects, and waits for the master's first words.
async fn greet(
    endpoint: &Endpoint,
    credentials: &Credentials,
    address: SocketAddr,
    keep_alive: Duration,
) -> Result<Greeted, LinkError> {
    let lost = |end| {
        if end == ConnectionError::TimedOut {
            LinkError::NoAnswer { address }
        } else {
            LinkError::Lost { address, end }
        }
    };
    let config = credentials.client_config(keep_alive);
    let connecting = endpoint
        .connect_with(config, address, SERVER_NAME)
        .map_err(|source| LinkError::Connect { address, source })?;
    let connection = timeout(CONNECT_TIME, connecting)
        .await
        .map_err(|_| LinkError::NoAnswer { address })?
        .map_err(lost)?;

    let protocol = |what: &str| LinkError::Protocol {
        address,
        what: what.to_owned(),
    };
    let greeting = async {
        let (send, receive) = connection.accept_bi().await.map_err(lost)?;
        let mut frames = frames(receive, wire::FRAME_BYTES_MAX);
        match next(&mut frames, &connection, address).await? {
            Ok(ToAgent::Welcome(welcome)) => Ok((send, frames, welcome)),
            Ok(_) | Err(_) => Err(protocol("did not begin with a welcome")),
        }
    };
    let (send, frames, welcome) = timeout(CONNECT_TIME, greeting)
        .await
        .map_err(|_| protocol("took the connection and said nothing"))??;
    if welcome.fleet != credentials.fleet {
        hang_up(&connection, close::PROTOCOL, "another fleet");
        return Err(protocol(&format!("is of fleet `{}`", welcome.fleet)));
    }
    Ok(Greeted {
        connection,
        send,
        frames,
        welcome,
    })
}

/// Of several addresses that failed, the one behind which somebody is tells the most.
fn keep_telling(kept: &mut Option<LinkError>, new: LinkError) {
    let rank = |error: &LinkError| match error {
        LinkError::Resolve { .. } | LinkError::Connect { .. } => 0,
        LinkError::NoAnswer { .. } => 1,
        LinkError::Lost { .. } | LinkError::Protocol { .. } => 2,
    };
    if kept.as_ref().is_none_or(|kept| rank(kept) < rank(&new)) {
        *kept = Some(new);
    }
}

fn stopped(address: SocketAddr) -> LinkError {
    LinkError::Protocol {
        address,
        what: "is left, the agent stops".to_owned(),
    }
}

/// The next message, or why it is none. What breaks the framing breaks the connection.
async fn next(
    frames: &mut Frames,
    connection: &Connection,
    address: SocketAddr,
) -> Result<Result<ToAgent, FrameError>, LinkError> {
    let broken = |what: String| {
        hang_up(connection, close::PROTOCOL, "broken frame");
        Err(LinkError::Protocol { address, what })
    };
    match frames.next().await {
        Some(Ok(frame)) => match wire::parse(&frame) {
            Err(error @ (FrameError::Json { .. } | FrameError::TooLong { .. })) => {
                broken(format!("sent {error}"))
            }
            message => Ok(message),
        },
        Some(Err(error)) => match connection.close_reason() {
            Some(end) => Err(LinkError::Lost { address, end }),
            None => broken(format!("broke the control stream ({error})")),
        },
        None => broken("ended the control stream".to_owned()),
    }
}

/// Writes what is queued.
async fn write(
    mut send: SendStream,
    mut queue: mpsc::Receiver<Vec<u8>>,
    connection: &Connection,
    address: SocketAddr,
) -> LinkError {
    while let Some(frame) = queue.recv().await {
        match timeout(WRITE_TIME, send.write_all(&frame)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                return match connection.close_reason() {
                    Some(end) => LinkError::Lost { address, end },
                    None => LinkError::Protocol {
                        address,
                        what: format!("does not read any more ({error})"),
                    },
                };
            }
            Err(_) => {
                hang_up(connection, close::TIMEOUT, "reads nothing");
                let what = "reads nothing".to_owned();
                return LinkError::Protocol { address, what };
            }
        }
    }
    stopped(address)
}

/// Reads which file a stream carries. Byte for byte as the frame says: what follows is the file.
async fn header(mut stream: RecvStream) -> Result<(Part, RecvStream), HeaderError> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await?;
    let mut json = vec![0; wire::frame_length(prefix, wire::PART_BYTES_MAX)?];
    stream.read_exact(&mut json).await?;
    let part = serde_json::from_slice(&json).map_err(HeaderError::Json)?;
    Ok((part, stream))
}

/// A stream does not begin with a part.
#[derive(Debug, thiserror::Error)]
enum HeaderError {
    #[error("it ends too early")]
    Read(#[from] quinn::ReadExactError),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("its header cannot be read")]
    Json(#[source] serde_json::Error),
}

fn hang_up(connection: &Connection, code: u32, reason: &str) {
    connection.close(VarInt::from_u32(code), reason.as_bytes());
}
