//! One task for each connection: checks who it is, speaks the control stream, pushes files.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clamcast_daemon::table::printable;
use clamcast_proto::dsse::{EnvelopeError, Verified};
use clamcast_proto::identity::{Certificate, CertificateError, Role};
use clamcast_proto::keys::KeySet;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::receipt::Receipt;
use clamcast_proto::wire::{
    self, FRAME_BYTES_MAX, Feature, FrameError, NeedFile, Offer, OfferId, ToAgent, ToMaster,
    Welcome,
};
use clamcast_proto::{AgentName, DatabaseName, FleetName, GroupName};
use jiff::Timestamp;
use quinn::{Connecting, Connection, Endpoint, RecvStream, SendStream, VarInt};
use rustls_pki_types::CertificateDer;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt as _;
use tokio_util::codec::{FramedRead, LengthDelimitedCodec};
use tokio_util::sync::CancellationToken;

use crate::config::Groups;
use crate::fleet::agents::LinkId;
use crate::fleet::dispatch::{Decline, Message, Newcomer, Progress, Unwanted};
use crate::fleet::hub::{AGENTS_MAX, Event, Hub};
use crate::link::meter::{Meters, Talk};
use crate::link::push::{Pusher, Request};
use crate::link::rejections::Rejections;
use crate::publish::publisher::Publisher;
use crate::record::archive::Archive;
use crate::record::entry::{Entry, FileName};
use crate::record::recorder::Recorder;

/// A handshake, and then a Hello, must be done within this time.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// From this many unfinished handshakes on, newcomers must first prove that they are where they
/// say they are (QUIC Retry): an Initial then costs a sixteenth.
const HANDSHAKES_UNPROVEN_MAX: usize = 64;

/// From this many on nobody is let in: each may hold 37 KiB for as long as [`HANDSHAKE`], and some
/// seconds more while its connection drains, which is 250 MB in a flood that goes on. The agents
/// back off and come again.
const HANDSHAKES_MAX: usize = 4096;

/// Connections at a time: a fleet, and again as many while it reconnects.
const CONNECTIONS_MAX: usize = 2 * AGENTS_MAX;

/// A control message that an agent does not take for this long ends the connection.
const STALL: Duration = Duration::from_secs(30);

/// Bytes that are read of the control stream at a time: what an agent says is seldom longer, and
/// every agent's connection keeps as many.
const READ_BYTES: usize = 2 << 10;

/// A file that the master's own disk did not yield is tried again after this time, for as long as the
/// agent waits for it.
const UNSENT_RETRY: Duration = Duration::from_secs(10);

/// Characters of a peer's message that are kept.
const SAID_CHARS_MAX: usize = 1000;

/// How long open connections may take to finish what they are at when the daemon stops.
const DRAIN: Duration = Duration::from_secs(3);

/// What every connection's task needs.
#[derive(Debug)]
pub struct Shared {
    /// The fleet.
    pub fleet: FleetName,
    /// The fleet's hub.
    pub hub: Hub,
    /// The key set.
    pub keys: Arc<Verified<KeySet>>,
    /// Signs that a generation is current.
    pub publisher: Arc<Publisher>,
    /// Sends files.
    pub pusher: Arc<Pusher>,
    /// Groups by name patterns.
    pub groups: Groups,
    /// What every agent makes of work.
    pub meters: Meters,
    /// Certificates that were seen.
    pub archive: Archive,
    /// Keeps them.
    pub recorder: Recorder,
    /// Connections that were not let in.
    pub rejections: Rejections,
}

/// Why a connection was not let in or did not last.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("the handshake failed")]
    Handshake(#[source] quinn::ConnectionError),
    #[error("the handshake took longer than {HANDSHAKE:?}")]
    HandshakeTimeout,
    #[error("the certificate cannot be read")]
    Certificate(#[from] CertificateError),
    #[error("the certificate is not one of an agent of fleet `{0}`")]
    NotAnAgent(FleetName),
    #[error(transparent)]
    Unwanted(#[from] Unwanted),
    #[error("the daemon stops")]
    Stopping,
    #[error("the connection ended")]
    Connection(#[from] quinn::ConnectionError),
    #[error("cannot write to the control stream")]
    Write(#[from] quinn::WriteError),
    #[error("the control stream broke")]
    Read(#[source] std::io::Error),
    #[error("the agent took no control message for {STALL:?}")]
    Stalled,
    #[error("the agent said no Hello within {HANDSHAKE:?}")]
    NoHello,
    #[error("a message cannot be read")]
    Frame(#[from] FrameError),
    #[error("`{0}` exceeded its work budget of connections, receipts and requests for files")]
    TooMuch(AgentName),
    #[error("the agent said {0}")]
    Order(&'static str),
}

impl LinkError {
    /// The QUIC application error that tells the agent.
    fn code(&self) -> u32 {
        match self {
            Self::Certificate(_) | Self::NotAnAgent(_) => wire::close::NOT_AN_AGENT,
            Self::Unwanted(Unwanted::Revoked { .. }) => wire::close::REVOKED,
            Self::Unwanted(Unwanted::Full(_)) | Self::TooMuch(_) => wire::close::BUSY,
            Self::HandshakeTimeout | Self::Stalled | Self::NoHello => wire::close::TIMEOUT,
            Self::Frame(_) | Self::Order(_) => wire::close::PROTOCOL,
            Self::Stopping
            | Self::Handshake(_)
            | Self::Connection(_)
            | Self::Write(_)
            | Self::Read(_) => wire::close::STOPPING,
        }
    }

    /// Whether somebody was kept out who may be hostile or misconfigured, as opposed to a
    /// connection that merely ended.
    fn is_rejection(&self) -> bool {
        match self {
            Self::Handshake(error) => {
                matches!(error, quinn::ConnectionError::TransportError(_))
            }
            Self::Certificate(_) | Self::NotAnAgent(_) | Self::Unwanted(_) => true,
            Self::Frame(_) | Self::TooMuch(_) | Self::Order(_) => true,
            Self::HandshakeTimeout
            | Self::Stopping
            | Self::Connection(_)
            | Self::Write(_)
            | Self::Read(_)
            | Self::Stalled
            | Self::NoHello => false,
        }
    }
}

/// Accepts agents until `stop` fires, then lets open connections end. Owns every task it starts:
/// when this returns, none is left running.
pub async fn serve(endpoint: Endpoint, shared: Arc<Shared>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    let handshakes = Arc::new(());
    loop {
        let incoming = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(ended) = connections.join_next() => { report(ended); continue },
            incoming = endpoint.accept() => incoming,
        };
        let Some(incoming) = incoming else { break };
        // Every unfinished handshake holds a clone.
        let unfinished = Arc::strong_count(&handshakes) - 1;
        let is_proven = incoming.remote_address_validated();
        match Answer::to_newcomer(connections.len(), unfinished, is_proven) {
            Answer::Accept => {}
            Answer::Retry => {
                let _ = incoming.retry(); // fails only for a validated address
                continue;
            }
            Answer::Refuse => {
                incoming.refuse(); // the agent backs off and tries again
                continue;
            }
        }
        // Here and not in the connection's task: nobody reads the socket while an Initial is worked
        // on, so that is done for one at a time, and whoever reads comes before the next.
        let (address, accepted) = (canonical(incoming.remote_address()), incoming.accept());
        let (shared, stop, permit) = (shared.clone(), stop.child_token(), handshakes.clone());
        connections.spawn(converse(address, accepted, shared, permit, stop));
        tokio::task::yield_now().await;
    }
    // They saw the token too and end by themselves, at a file boundary.
    let drained = async {
        while let Some(ended) = connections.join_next().await {
            report(ended)
        }
    };
    if timeout(DRAIN, drained).await.is_err() {
        tracing::debug!(
            open = connections.len(),
            "the grace period of {DRAIN:?} is over"
        );
        connections.shutdown().await;
    }
    endpoint.close(VarInt::from_u32(wire::close::STOPPING), b"the master stops");
    // Lets the last packets out; an agent that is not there any more must not hold us up.
    let idle = timeout(Duration::from_secs(1), endpoint.wait_idle()).await;
    if idle.is_err()
        && let Err(error) = crate::link::endpoint::free_port(&endpoint)
    {
        tracing::debug!(%error, "the port is kept until the last connection has drained");
    }
}

/// What somebody hears who wants to connect.
#[derive(Debug, PartialEq)]
enum Answer {
    Accept,
    /// Show first that you are where you say you are.
    Retry,
    Refuse,
}

impl Answer {
    /// With so many connections, so many of them in their handshake still, to somebody whose
    /// address is proven or not.
    fn to_newcomer(connections: usize, unfinished: usize, is_proven: bool) -> Self {
        if connections >= CONNECTIONS_MAX || unfinished >= HANDSHAKES_MAX {
            Self::Refuse
        } else if unfinished >= HANDSHAKES_UNPROVEN_MAX && !is_proven {
            Self::Retry
        } else {
            Self::Accept
        }
    }
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection's task panicked; this is a bug");
    }
}

/// The life of one connection. What it does seldom or once is boxed, because thousands of these
/// tasks wait for agents that say nothing.
async fn converse(
    address: SocketAddr,
    accepted: Result<Connecting, quinn::ConnectionError>,
    shared: Arc<Shared>,
    handshake: Arc<()>,
    stop: CancellationToken,
) {
    let shaken = match accepted {
        Ok(connecting) => Box::pin(shake_hands(connecting)).await,
        Err(error) => Err(LinkError::Handshake(error)),
    };
    drop(handshake);
    match shaken {
        Ok(connection) => {
            let agent = identify(&connection, &shared.fleet);
            let name = agent.as_ref().map(|agent| agent.name.clone()).ok();
            let ended = match agent {
                Ok(agent) => speak(&connection, agent, &shared, &stop).await,
                Err(error) => Err(error),
            };
            if let Err(error) = ended {
                // Before it is noted: the audit log may have to wait for its disk.
                connection.close(VarInt::from_u32(error.code()), error.to_string().as_bytes());
                rejected(&shared, name.as_ref(), address, &error);
            }
        }
        Err(error) => rejected(&shared, None, address, &error),
    }
}

fn rejected(shared: &Shared, agent: Option<&AgentName>, address: SocketAddr, error: &LinkError) {
    let text = crate::chain(error);
    if error.is_rejection() {
        shared.rejections.note(agent, address, &text);
    } else {
        tracing::debug!(%address, error = text, "a connection ended");
    }
}

async fn shake_hands(connecting: Connecting) -> Result<Connection, LinkError> {
    timeout(HANDSHAKE, connecting)
        .await
        .map_err(|_| LinkError::HandshakeTimeout)?
        .map_err(LinkError::Handshake)
}

/// Lets an agent in, and speaks with it until one of the two ends it.
async fn speak(
    connection: &Connection,
    agent: Agent,
    shared: &Arc<Shared>,
    stop: &CancellationToken,
) -> Result<(), LinkError> {
    let Admitted { name, id, messages } = Box::pin(admit(connection, agent, shared)).await?;
    let converse = async {
        let opened = timeout(HANDSHAKE, connection.open_bi()).await;
        let (send, recv) = opened.map_err(|_| LinkError::NoHello)??;
        let mut link = Link {
            connection,
            shared,
            name: name.clone(),
            id,
            send,
            offer: None,
            parts: JoinSet::new(),
            sent: Arc::default(),
            complete: Complete::default(),
            talk: Talk::new(Instant::now()),
            waiting: None,
        };
        link.run(recv, messages, stop).await
    };
    let result = Box::pin(converse).await;
    // From here on the hub must hear of the end, whatever it was; but where the master stops, the
    // next start has to know that the agent was connected.
    if !stop.is_cancelled() {
        let told = shared.hub.tell(Event::Disconnected { name, id });
        let _ = Box::pin(told).await; // it may be gone already
    }
    result
}

/// An agent that was let in.
struct Admitted {
    name: AgentName,
    id: LinkId,
    messages: mpsc::Receiver<Message>,
}

/// An agent, by its certificate.
struct Agent {
    name: AgentName,
    groups: Vec<GroupName>,
    certificate: Certificate,
    der: CertificateDer<'static>,
}

/// TLS has verified the chain and the dates. Here: is it an agent of this fleet?
fn identify(connection: &Connection, fleet: &FleetName) -> Result<Agent, LinkError> {
    let chain = connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .expect("the handshake demands a certificate");
    let der = chain.first().expect("a verified chain has a leaf").clone();
    let certificate = Certificate::from_der(&der)?;
    let not_an_agent = || LinkError::NotAnAgent(fleet.clone());
    let identity = certificate.identity.as_ref().ok_or_else(not_an_agent)?;
    let Role::Agent { name, groups } = &identity.role else {
        return Err(not_an_agent());
    };
    if identity.fleet != *fleet {
        return Err(not_an_agent());
    }
    let (name, groups) = (name.clone(), groups.clone());
    Ok(Agent {
        name,
        groups,
        certificate,
        der,
    })
}

/// Lets an agent in that is not revoked and has not exceeded its work budget.
async fn admit(
    connection: &Connection,
    agent: Agent,
    shared: &Shared,
) -> Result<Admitted, LinkError> {
    let Agent {
        name,
        groups,
        certificate,
        der,
    } = agent;
    if !shared.meters.spend(&name, 0, Instant::now()) {
        return Err(LinkError::TooMuch(name));
    }
    if shared.archive.learn(&name, &certificate) {
        // It stands in the recorder's queue before every receipt that its key signs.
        let file = FileName::Certificate(certificate.fingerprint);
        shared.recorder.write(Entry::file(file, Some(der.to_vec())));
    }

    let (reply, admitted) = oneshot::channel();
    let newcomer = Newcomer {
        name: name.clone(),
        groups: shared.groups.of(name.as_str(), &groups),
        address: canonical(connection.remote_address()),
        serial: certificate.serial.clone(),
        certificate_ends: certificate.not_after,
        fingerprint: certificate.fingerprint,
    };
    let connected = Event::Connected {
        newcomer: Box::new(newcomer),
        connection: connection.clone(),
        reply,
    };
    let told = shared.hub.tell(connected).await;
    told.map_err(|_| LinkError::Stopping)?;
    let (id, messages) = admitted.await.map_err(|_| LinkError::Stopping)??;
    Ok(Admitted { name, id, messages })
}

struct Link<'a> {
    connection: &'a Connection,
    shared: &'a Arc<Shared>,
    name: AgentName,
    id: LinkId,
    send: SendStream,
    offer: Option<Offering>,
    parts: JoinSet<()>,
    /// Bytes of files that went out on this connection.
    sent: Arc<AtomicU64>,
    /// Files of the current offer that went out whole.
    complete: Complete,
    talk: Talk,
    /// What the hub is told when the recorder has room.
    waiting: Option<Box<Event>>,
}

/// What became of the files of an offer.
#[derive(Clone, Debug, Default)]
struct Complete {
    names: Arc<Mutex<HashSet<DatabaseName>>>,
    /// Whether the hub was told last that a file cannot be sent.
    failed: Arc<AtomicBool>,
}

impl Complete {
    fn insert(&self, name: DatabaseName) {
        self.names
            .lock()
            .expect("nothing panics with it")
            .insert(name);
    }

    fn remove(&self, name: &DatabaseName) -> bool {
        self.names
            .lock()
            .expect("nothing panics with it")
            .remove(name)
    }
}

/// What came of reading a frame.
enum Heard {
    /// With the length of its frame.
    Message(ToMaster, usize),
    Unknown,
    End,
}

/// The offer that this agent was made last.
struct Offering {
    id: OfferId,
    manifest: Arc<Verified<Manifest>>,
    full: bool,
}

impl Link<'_> {
    async fn run(
        &mut self,
        recv: RecvStream,
        mut messages: mpsc::Receiver<Message>,
        stop: &CancellationToken,
    ) -> Result<(), LinkError> {
        let codec = LengthDelimitedCodec::builder()
            .max_frame_length(FRAME_BYTES_MAX)
            .new_codec();
        let mut frames = FramedRead::with_capacity(recv, codec, READ_BYTES);
        // The first message is Welcome.
        if let Some(welcome) = messages.recv().await {
            self.deliver(welcome).await?;
        }
        let hello = timeout(HANDSHAKE, self.next(&mut frames));
        match hello.await.map_err(|_| LinkError::NoHello)?? {
            Some(ToMaster::Hello(hello)) => {
                let (name, id) = (self.name.clone(), self.id);
                self.tell(Event::Hello { name, id, hello }).await?;
            }
            Some(_) => return Err(LinkError::Order("something else before Hello")),
            None => return Ok(()),
        }
        loop {
            let pause = self.talk.pause(Instant::now());
            let (shared, waits) = (self.shared, self.waiting.is_some());
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                closed = self.connection.closed(), if waits => return Err(closed.into()),
                Some(ended) = self.parts.join_next() => report(ended),
                message = messages.recv() => match message {
                    Some(message) => Box::pin(self.deliver(message)).await?,
                    None => return Ok(()), // replaced, revoked, or the daemon stops
                },
                () = shared.recorder.room(), if waits => {
                    if let Some(event) = self.waiting.take() {
                        self.tell(*event).await?;
                    }
                }
                // Cancel-safe: what was read of a frame stays in the codec's buffer.
                frame = after(pause, frames.next()), if !waits => match Box::pin(self.read(frame)).await? {
                    Heard::Message(message, bytes) => Box::pin(self.hear(message, bytes)).await?,
                    Heard::Unknown => {}
                    Heard::End => return Ok(()),
                },
            }
        }
    }

    /// The next message that can be read; the ones that cannot are answered.
    async fn next(
        &mut self,
        frames: &mut FramedRead<RecvStream, LengthDelimitedCodec>,
    ) -> Result<Option<ToMaster>, LinkError> {
        loop {
            let frame = frames.next().await;
            match self.read(frame).await? {
                Heard::Message(message, _) => return Ok(Some(message)),
                Heard::Unknown => {}
                Heard::End => return Ok(None),
            }
        }
    }

    /// A frame's message. One that this version does not know is answered and survived.
    async fn read(
        &mut self,
        frame: Option<Result<bytes::BytesMut, std::io::Error>>,
    ) -> Result<Heard, LinkError> {
        let Some(frame) = frame else {
            return Ok(Heard::End);
        };
        let frame = frame.map_err(|error| {
            if error.kind() == std::io::ErrorKind::InvalidData {
                let limit = FRAME_BYTES_MAX;
                LinkError::Frame(FrameError::TooLong {
                    length: limit + 1,
                    limit,
                })
            } else {
                LinkError::Read(error)
            }
        })?;
        self.talk.heard(frame.len(), Instant::now());
        match wire::parse(&frame) {
            Ok(message) => Ok(Heard::Message(message, frame.len())),
            Err(error @ FrameError::Message { .. }) => {
                tracing::debug!(agent = %self.name, %error, "answered with an error");
                self.say(&ToAgent::Error {
                    message: crate::chain(&error),
                })
                .await?;
                Ok(Heard::Unknown)
            }
            Err(error @ (FrameError::Json { .. } | FrameError::TooLong { .. })) => {
                Err(error.into())
            }
        }
    }

    /// Says what the agent is told.
    async fn deliver(&mut self, message: Message) -> Result<(), LinkError> {
        let Shared {
            keys, publisher, ..
        } = &**self.shared;
        let message = match message {
            Message::Welcome => ToAgent::Welcome(Welcome {
                fleet: keys.fleet.clone(),
                master_version: env!("CARGO_PKG_VERSION").to_owned(),
                time: Timestamp::now(),
                keep_alive: wire::KEEP_ALIVE_SECS,
                keys: Some(keys.envelope().clone()),
                accepts: [Feature::ShortReceipts].into_iter().collect(),
                known: publisher.store().known(wire::KNOWN_MAX),
            }),
            Message::Fresh(manifest) => {
                let fresh = publisher.vouch(&manifest, Timestamp::now());
                let fresh = fresh.envelope().clone();
                ToAgent::Fresh { fresh }
            }
            Message::Acknowledge(seq) => ToAgent::ReceiptAck { seq },
            Message::Checkpoint(checkpoint) => ToAgent::Checkpoint {
                checkpoint: checkpoint.to_string(),
            },
            Message::Offer {
                offer,
                manifest,
                manner,
            } => {
                // The newest offer counts; what was on its way for an older one is reset.
                self.parts.shutdown().await;
                let fresh = publisher.vouch(&manifest, Timestamp::now());
                let message = ToAgent::Offer(Box::new(Offer {
                    offer,
                    manifest: manifest.envelope().clone(),
                    fresh: fresh.envelope().clone(),
                    keys: Some(keys.envelope().clone()),
                    rehash: manner.rehash,
                    full: manner.full,
                }));
                self.complete = Complete::default();
                self.offer = Some(Offering {
                    id: offer,
                    manifest,
                    full: manner.full,
                });
                message
            }
        };
        self.say(&message).await
    }

    /// Takes what the agent says, in so many bytes.
    async fn hear(&mut self, message: ToMaster, bytes: usize) -> Result<(), LinkError> {
        let name = self.name.clone();
        let event = match message {
            ToMaster::Hello(_) => return Err(LinkError::Order("a second Hello")),
            ToMaster::Progress {
                offer,
                phase,
                until,
            } => Event::Progress {
                name,
                id: self.id,
                progress: Progress {
                    offer,
                    phase,
                    until,
                    sent: self.sent.load(Ordering::Relaxed),
                },
            },
            ToMaster::Need { offer, files } => {
                self.spend(bytes)?;
                return self.need(offer, files).await;
            }
            ToMaster::Reoffer {} => {
                // An offer is a line in the audit log, as a receipt is.
                self.spend(bytes)?;
                Event::Reoffer { name, id: self.id }
            }
            ToMaster::Receipt { receipt } => {
                self.spend(bytes)?;
                let keys = self.shared.archive.keys(&name);
                let verified: Result<Verified<Receipt>, EnvelopeError> = receipt.verify(&keys);
                match verified {
                    Ok(receipt) if !receipt.is_bounded() => {
                        let message = "the receipt's texts or lists are too long".to_owned();
                        return self.say(&ToAgent::Error { message }).await;
                    }
                    Ok(receipt) if receipt.agent == name && receipt.fleet == self.shared.fleet => {
                        Event::Receipt {
                            id: self.id,
                            receipt: Box::new(receipt),
                        }
                    }
                    Ok(_) => {
                        let message = "the receipt is somebody else's".to_owned();
                        return self.say(&ToAgent::Error { message }).await;
                    }
                    Err(error) => {
                        let message = crate::chain(&error);
                        tracing::warn!(agent = %name, error = message, "a receipt is not believed");
                        return self.say(&ToAgent::Error { message }).await;
                    }
                }
            }
            ToMaster::Error {
                offer: Some(offer),
                message,
                other_master,
            } => {
                if self
                    .offer
                    .as_ref()
                    .is_none_or(|current| current.id != offer)
                {
                    return Ok(()); // about an offer that is no longer ours
                }
                let decline = Decline {
                    offer,
                    message: said(&message),
                    other_master: other_master.filter(|other| other.is_bounded()),
                };
                Event::Declined {
                    name,
                    id: self.id,
                    decline,
                }
            }
            ToMaster::Error {
                offer: None,
                message,
                other_master: _, // of no offer of ours
            } => {
                self.spend(bytes)?; // a line in the log
                tracing::warn!(agent = %name, said = said(&message), "the agent did not understand");
                return Ok(());
            }
        };
        self.tell(event).await
    }

    fn spend(&self, bytes: usize) -> Result<(), LinkError> {
        let meters = &self.shared.meters;
        let is_left = meters.spend(&self.name, bytes, Instant::now());
        let too_much = || LinkError::TooMuch(self.name.clone());
        is_left.then_some(()).ok_or_else(too_much)
    }

    /// Tells the hub; later, if the recorder has no room for what the hub writes down of it. The agent
    /// is not read from until then.
    async fn tell(&mut self, event: Event) -> Result<(), LinkError> {
        let is_written = !matches!(event, Event::Progress { .. });
        if is_written && !self.shared.recorder.has_room() {
            self.waiting = Some(Box::new(event));
            return Ok(());
        }
        let told = self.shared.hub.tell(event).await;
        told.map_err(|_| LinkError::Stopping)
    }

    /// Sends the files of the current offer that the agent lacks. A new Need replaces the one
    /// before: the agent asks again only for what did not arrive.
    async fn need(&mut self, offer: OfferId, files: Vec<NeedFile>) -> Result<(), LinkError> {
        let offering = self.offer.as_ref();
        let Some(offering) = offering.filter(|offering| offering.id == offer) else {
            return Ok(()); // about an offer that is no longer ours
        };
        let (manifest, full) = (offering.manifest.clone(), offering.full);
        self.parts.shutdown().await;
        let mut needs = HashMap::new();
        for file in files {
            // A name that is not in the manifest is nothing that we could send.
            if manifest.file(&file.name).is_some() {
                needs.insert(file.name.clone(), file);
            }
        }
        tracing::debug!(agent = %self.name, files = needs.len(), "needs");
        let (connection, shared, sent) = (
            self.connection.clone(),
            self.shared.clone(),
            self.sent.clone(),
        );
        let (name, id, complete) = (self.name.clone(), self.id, self.complete.clone());

        let agent = name.clone();
        let told = move |reason| Event::Unsent {
            name: agent.clone(),
            id,
            offer,
            reason,
        };
        // One file after the other: the link is the bottleneck, and a file that is complete early
        // survives a lost connection whole.
        self.parts.spawn(async move {
            let mut needs: Vec<_> = needs.values().collect();
            while !needs.is_empty() {
                let mut unsent = Vec::new();
                for need in needs {
                    let target = manifest.file(&need.name).expect("looked up above");
                    if complete.remove(&need.name) && need.resume_at == 0 {
                        shared.pusher.doubt(need, target, full).await; // it may have arrived damaged
                    }
                    let request = Request {
                        agent: &name,
                        offer,
                        need,
                        target,
                        full,
                    };
                    let pushed = shared.pusher.push(&connection, request, &sent).await;
                    let events: Vec<_> = match pushed {
                        Ok(bytes) => {
                            tracing::debug!(agent = %name, file = %need.name, bytes, "sent");
                            complete.insert(need.name.clone());
                            let was_unsent = complete.failed.swap(false, Ordering::Relaxed);
                            let again = was_unsent.then_some(None);
                            let progress = Progress {
                                offer,
                                phase: wire::Phase::Fetching,
                                until: None,
                                sent: sent.load(Ordering::Relaxed),
                            };
                            let name = name.clone();
                            let progress = Event::Progress { name, id, progress };
                            let again = again.map(&told);
                            again.into_iter().chain([progress]).collect()
                        }
                        Err(error) => {
                            let reason = crate::chain(&error);
                            // The others may fare better; the agent asks for this one again.
                            tracing::warn!(agent = %name, file = %need.name, error = reason, "not sent");
                            if error.is_ours() {
                                complete.failed.store(true, Ordering::Relaxed);
                                unsent.push(need);
                                let file = &need.name;
                                vec![told(Some(format!("the master cannot send {file}: {reason}")))]
                            } else {
                                Vec::new()
                            }
                        }
                    };
                    for event in events {
                        if shared.hub.tell(event).await.is_err() {
                            return; // the daemon stops
                        }
                    }
                }
                needs = unsent;
                if !needs.is_empty() {
                    sleep(UNSENT_RETRY).await; // the mirror may have the file again
                }
            }
        });
        Ok(())
    }

    async fn say(&mut self, message: &ToAgent) -> Result<(), LinkError> {
        let frame = wire::frame(message)?;
        timeout(STALL, self.send.write_all(&frame))
            .await
            .map_err(|_| LinkError::Stalled)??;
        Ok(())
    }
}

/// An address as operators know it: a socket that listens on IPv6 and IPv4 reports IPv4 peers as
/// `::ffff:192.0.2.1` (RFC 4291 section 2.5.5.2).
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// A peer's text, bounded and safe to show.
fn said(message: &str) -> String {
    let bounded: String = message.chars().take(SAID_CHARS_MAX).collect();
    printable(&bounded)
}

/// What comes of `doing`, which is begun after a pause.
async fn after<T>(pause: Duration, doing: impl Future<Output = T>) -> T {
    if !pause.is_zero() {
        sleep(pause).await;
    }
    doing.await
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What those hear whose address is proven, and those whose is not.
    #[track_caller]
    fn check(connections: usize, unfinished: usize, proven: Answer, unproven: Answer) {
        let answer = |is_proven| Answer::to_newcomer(connections, unfinished, is_proven);
        assert_eq!((answer(true), answer(false)), (proven, unproven));
    }

    #[test]
    fn from_64_unfinished_handshakes_on_an_address_has_to_be_proven() {
        check(0, 0, Answer::Accept, Answer::Accept);
        check(63, 63, Answer::Accept, Answer::Accept);
        check(64, 64, Answer::Accept, Answer::Retry);
        check(4095, 4095, Answer::Accept, Answer::Retry);
    }

    #[test]
    fn an_ipv4_peer_is_named_by_its_ipv4_address() {
        let canonical = |address: &str| canonical(address.parse().unwrap()).to_string();
        assert_eq!(canonical("[::ffff:192.0.2.1]:7310"), "192.0.2.1:7310");
        assert_eq!(canonical("[2001:db8::1]:7310"), "[2001:db8::1]:7310");
    }

    #[test]
    fn from_4096_unfinished_handshakes_on_nobody_is_let_in() {
        check(4096, 4096, Answer::Refuse, Answer::Refuse);
        check(4097, 4097, Answer::Refuse, Answer::Refuse);
    }

    #[test]
    fn a_fleet_twice_over_is_all_that_is_let_in_however_few_are_in_their_handshake() {
        let most = 2 * AGENTS_MAX;
        check(most - 1, 0, Answer::Accept, Answer::Accept);
        check(most - 1, 64, Answer::Accept, Answer::Retry);
        check(most, 0, Answer::Refuse, Answer::Refuse);
        check(most, 64, Answer::Refuse, Answer::Refuse);
    }
}
