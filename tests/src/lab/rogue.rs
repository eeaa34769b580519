//! Somebody who has a certificate of the fleet and keeps none of its rules.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use clamcast_agent::config::Tls;
use clamcast_agent::link::endpoint::{Credentials, SERVER_NAME};
use clamcast_proto::dsse::{Envelope, sign};
use clamcast_proto::receipt::{ClamdReport, InstallNumber, Outcome, Receipt};
use clamcast_proto::wire::{self, Hello, Offer, ToAgent, ToMaster};
use clamcast_proto::{Digest, Epoch, Generation};
use jiff::Timestamp;
use quinn::{
    ClientConfig, Connection, ConnectionError, Endpoint, RecvStream, SendStream, TransportConfig,
};
use serde_json::Value;
use tokio::time::timeout;

use super::fleet::Fleet;
use super::until::PATIENCE;

/// A certificate of a fleet in the hands of a test. Clones share certificate and socket.
#[derive(Clone, Debug)]
pub struct Rogue {
    endpoint: Endpoint,
    credentials: Arc<Credentials>,
    master: SocketAddr,
}

/// The control stream with the master, and the connection it is on.
#[derive(Debug)]
pub struct Conversation {
    /// The connection.
    pub connection: Connection,
    /// What the master reads.
    pub send: SendStream,
    /// What it says.
    pub recv: RecvStream,
}

impl Rogue {
    /// With a new certificate of the agent `name`, towards the fleet's master. Inside a runtime.
    pub fn new(fleet: &Fleet, name: &str) -> Self {
        fleet.certs(&["agent", name]);
        let bundle = fleet.pki().join("agents").join(name);
        let tls = Tls {
            ca: bundle.join("ca.pem"),
            cert: bundle.join("cert.pem"),
            key: bundle.join("key.pem"),
        };
        let of = "bank".parse().expect("a name");
        let credentials = Credentials::load(&tls, &of, Timestamp::now());
        let endpoint = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into());
        Self {
            endpoint: endpoint.expect("loopback has a free port"),
            credentials: Arc::new(credentials.expect("the certificate is good")),
            master: (Ipv4Addr::LOCALHOST, fleet.port()).into(),
        }
    }

    /// How an agent of the fleet would connect.
    pub fn config(&self) -> ClientConfig {
        let keep_alive = Duration::from_secs(wire::KEEP_ALIVE_SECS);
        self.credentials.client_config(keep_alive)
    }

    /// A connection, as far as this side knows of it: the master may yet refuse the certificate.
    pub async fn connect(&self, config: ClientConfig) -> Result<Connection, ConnectionError> {
        self.connect_to(self.master, config).await
    }

    /// The same, to what stands between it and the master.
    pub async fn connect_to(
        &self,
        address: SocketAddr,
        config: ClientConfig,
    ) -> Result<Connection, ConnectionError> {
        let connecting = self.endpoint.connect_with(config, address, SERVER_NAME);
        connecting.expect("the address is one of loopback").await
    }

    /// Connects and hears the master's first words.
    pub async fn greet(&self, config: ClientConfig) -> Conversation {
        let greeted = self.try_greet(config).await;
        greeted.expect("the master lets it in")
    }

    /// [`Rogue::greet`] where the master may refuse.
    pub async fn try_greet(&self, config: ClientConfig) -> Result<Conversation, ConnectionError> {
        let connection = self.connect(config).await?;
        let (send, recv) = connection.accept_bi().await?;
        let mut conversation = Conversation {
            connection,
            send,
            recv,
        };
        match conversation.hear().await {
            Some(ToAgent::Welcome(_)) => Ok(conversation),
            other => Err(other.map_or_else(
                || conversation.reason(),
                |other| panic!("not a welcome: {other:?}"),
            )),
        }
    }

    /// Connects and says a proper Hello of an agent that has nothing.
    pub async fn enter(&self, config: ClientConfig) -> Conversation {
        let mut conversation = self.greet(config).await;
        conversation.say(&hello()).await;
        conversation
    }

    /// Signs a receipt with the certificate's key, whatever is in it.
    pub fn sign(&self, receipt: Receipt) -> Envelope {
        sign(receipt, &self.credentials.key.0).envelope().clone()
    }
}

/// The Hello of an agent that has nothing.
pub fn hello() -> ToMaster {
    let hello = Hello::new("0.1.0", ClamdReport::default());
    ToMaster::Hello(Box::new(hello))
}

/// The receipt of an agent that met a fault with an offer.
///
/// # Panics
///
/// If the offer or the name is none.
pub fn receipt(offer: &Offer, agent: &str, seq: u64) -> Receipt {
    let manifest: Value = serde_json::from_slice(&offer.manifest.payload).expect("JSON");
    let number = |key: &str| manifest[key].as_u64().expect("a number");
    Receipt {
        fleet: "bank".parse().expect("a name"),
        agent: agent.parse().expect("a name"),
        seq,
        epoch: Epoch(number("epoch")),
        generation: Generation::new(number("generation")).expect("above zero"),
        manifest_sha256: Digest::of(&offer.manifest.payload),
        install: InstallNumber(1),
        outcome: Outcome::HostFault,
        content: None,
        files: Vec::new(),
        missing: Vec::new(),
        unlisted: 0,
        foreign: Vec::new(),
        adopted: Vec::new(),
        drift: Vec::new(),
        clamd: ClamdReport::default(),
        error: Some(format!("trouble {seq}")),
        blamed: None,
        took: 1.0,
        time: Timestamp::now(),
    }
}

impl Conversation {
    /// Says a message. Whether the master still hears it is another question.
    pub async fn say(&mut self, message: &ToMaster) {
        let frame = wire::frame(message).expect("it fits a frame");
        self.write(&frame).await;
    }

    /// Sends these bytes on the control stream. `false`: the connection is over.
    pub async fn write(&mut self, bytes: &[u8]) -> bool {
        self.send.write_all(bytes).await.is_ok()
    }

    /// The next message; `None` when the conversation is over.
    pub async fn next(&mut self) -> Option<ToAgent> {
        let mut prefix = [0; 4];
        self.recv.read_exact(&mut prefix).await.ok()?;
        let mut json = vec![0; u32::from_be_bytes(prefix) as usize];
        self.recv.read_exact(&mut json).await.ok()?;
        Some(wire::parse(&json).expect("the master speaks properly"))
    }

    /// [`Conversation::next`] where something is about to be said.
    ///
    /// # Panics
    ///
    /// If nothing comes.
    pub async fn hear(&mut self) -> Option<ToAgent> {
        let heard = timeout(PATIENCE, self.next());
        heard.await.expect("the master says something")
    }

    /// The next offer; whatever else is said meanwhile does not count.
    pub async fn offer(&mut self) -> Box<Offer> {
        loop {
            match self.next().await {
                Some(ToAgent::Offer(offer)) => return offer,
                Some(_) => {}
                None => panic!("no offer but an end: {}", self.reason()),
            }
        }
    }

    /// Waits for the end of the connection and returns the [`code`] that the master gave it.
    ///
    /// # Panics
    ///
    /// If it does not end.
    pub async fn ended(&self) -> Option<u32> {
        let closed = timeout(PATIENCE, self.connection.closed());
        code(&closed.await.expect("the master ends the connection"))
    }

    fn reason(&self) -> ConnectionError {
        let reason = self.connection.close_reason();
        reason.unwrap_or(ConnectionError::LocallyClosed)
    }
}

/// The code with which the master ended a connection. `None`: its last word was lost, as it may be in
/// a flood, and what was sent after it was answered with a reset.
///
/// # Panics
///
/// If it ended otherwise.
pub fn code(end: &ConnectionError) -> Option<u32> {
    if *end == ConnectionError::Reset {
        return None;
    }
    let ConnectionError::ApplicationClosed(closed) = end else {
        panic!("the master gave no code: {end}")
    };
    let code = closed.error_code.into_inner();
    Some(u32::try_from(code).expect("our codes are small"))
}

/// `config` with a transport of one's own.
pub fn with_transport(mut config: ClientConfig, transport: TransportConfig) -> ClientConfig {
    config.transport_config(Arc::new(transport));
    config
}
