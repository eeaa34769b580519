//! Sends files to agents: one unidirectional stream a file, encoded once for all who ask.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::Duration;

use bytes::BytesMut;
use clamcast_proto::AgentName;
use clamcast_proto::manifest::ManifestFile;
use clamcast_proto::wire::{self, Have, NeedFile, OfferId, Part};
use quinn::{Connection, SendStream, VarInt};
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use tokio::time::timeout;

use crate::store::{Encoded, Pair, Store, StoreError};

/// Bytes read and handed to QUIC at a time.
const CHUNK_BYTES: usize = 64 << 10;

/// A stream that takes no chunk for this long is given up, so that an agent that stopped reading
/// cannot keep one of the transfers that others wait for.
const STALL: Duration = Duration::from_secs(30);

/// A transfer that has taken no chunk for this long makes place for another one: others do not wait
/// for an agent that hardly reads. Slower than the slowest path that is worth a database.
const SLOW: Duration = Duration::from_secs(2);

/// Transfers that go on slowly beside the others, at most: each may hold as many bytes as QUIC takes
/// ahead, 2 MiB. With more of them, the others wait.
const SLOW_MAX: usize = 64;

/// Encodings that are made at the same time: a delta takes up to 100 MiB of memory, and agents that
/// were away may ask from many old generations at once.
const MAKERS_MAX: usize = 2;

/// Threads that look whether an encoding is there, which waits for the disk.
const LOOKS_MAX: usize = 4;

/// Makes and sends what agents need.
#[derive(Debug)]
pub struct Pusher {
    store: Arc<Store>,
    transfers: Semaphore,
    slow: Semaphore,
    /// Encodings being made at this moment, so that a whole fleet that asks for one at the same
    /// time costs one computation and no thread each.
    making: Mutex<HashMap<Pair, Weak<OnceCell<Encoded>>>>,
    /// Threads that make encodings.
    makers: Semaphore,
    /// Threads that look whether an encoding is there.
    looks: Semaphore,
    /// Agents that wait for an encoding. Each waits for one at a time, over all its connections: an
    /// agent that asks for many occupies one thread at most.
    asking: Mutex<HashMap<AgentName, Weak<Semaphore>>>,
}

/// A file that an agent asks for.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The agent.
    pub agent: &'a AgentName,
    /// The offer that it answers.
    pub offer: OfferId,
    /// What the agent has, and where it goes on.
    pub need: &'a NeedFile,
    /// The file.
    pub target: &'a ManifestFile,
    /// Whether it is never a delta.
    pub full: bool,
}

/// A file could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// Nothing to send it from.
    #[error("cannot encode `{name}`")]
    Encode {
        /// The file.
        name: String,
        /// Why.
        source: StoreError,
    },
    /// Our disk.
    #[error("cannot read {path}")]
    Read {
        /// The encoded file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The agent or the network.
    #[error("cannot send `{name}`")]
    Send {
        /// The file.
        name: String,
        /// Why.
        source: quinn::WriteError,
    },
    /// No stream to send it on.
    #[error("cannot open a stream for `{name}`")]
    Open {
        /// The file.
        name: String,
        /// Why.
        source: quinn::ConnectionError,
    },
    /// The agent stopped reading.
    #[error("the agent took nothing of `{name}` for {STALL:?}")]
    Stalled {
        /// The file.
        name: String,
    },
}

impl PushError {
    /// Whether the master's own disk is at fault.
    pub fn is_ours(&self) -> bool {
        match self {
            Self::Encode { .. } | Self::Read { .. } => true,
            Self::Send { .. } | Self::Open { .. } | Self::Stalled { .. } => false,
        }
    }
}

impl Pusher {
    /// Sends from `store`, at most `concurrent` files at a time over all agents that read them.
    pub fn new(store: Arc<Store>, concurrent: usize) -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self {
            makers: Semaphore::new(cores.min(MAKERS_MAX)),
            looks: Semaphore::new(LOOKS_MAX),
            asking: Mutex::default(),
            store,
            transfers: Semaphore::new(concurrent),
            slow: Semaphore::new(SLOW_MAX),
            making: Mutex::default(),
        }
    }

    /// Sends one file to an agent, and adds to `sent` what QUIC has taken of it. Returns the bytes that
    /// went over the wire for it.
    pub async fn push(
        self: &Arc<Self>,
        connection: &Connection,
        Request {
            agent,
            offer,
            need,
            target,
            full,
        }: Request<'_>,
        sent: &AtomicU64,
    ) -> Result<u64, PushError> {
        let name = || need.name.to_string();
        let encoded = self
            .encode(agent, need, target, full)
            .await
            .map_err(|source| PushError::Encode {
                name: name(),
                source,
            })?;
        let same = need.resume.as_ref() == Some(&encoded.encoding);
        let offset = if same {
            need.resume_at.min(encoded.encoding.length)
        } else {
            0
        };

        // First, for an agent that opens itself to no stream must not take a place.
        let stream = timeout(STALL, connection.open_uni())
            .await
            .map_err(|_| PushError::Stalled { name: name() })?
            .map_err(|source| PushError::Open {
                name: name(),
                source,
            })?;
        let mut stream = Sending {
            stream: Some(stream),
            pusher: self,
            _place: self.transfers.acquire().await.expect("never closed"),
            is_slow: false,
        };
        let read = |source| PushError::Read {
            path: encoded.path.clone(),
            source,
        };
        let mut file = File::open(&encoded.path).await.map_err(read)?;
        file.seek(io::SeekFrom::Start(offset)).await.map_err(read)?;

        let part = Part {
            offer,
            name: need.name.clone(),
            encoding: encoded.encoding.clone(),
            offset,
        };
        let header = wire::frame(&part).expect("a part header is short").into();
        stream.write(header, &need.name).await?;

        let length = encoded.encoding.length - offset;
        let mut left = length;
        while left > 0 {
            let mut chunk = BytesMut::with_capacity(CHUNK_BYTES);
            let read_bytes = file.read_buf(&mut chunk).await.map_err(read)?;
            if read_bytes == 0 {
                return Err(read(io::ErrorKind::UnexpectedEof.into()));
            }
            chunk.truncate(usize::try_from(left).unwrap_or(usize::MAX).min(read_bytes));
            let taken = chunk.len() as u64;
            stream.write(chunk.freeze(), &need.name).await?;
            sent.fetch_add(taken, Ordering::Relaxed);
            left -= taken;
        }
        stream.finish();
        Ok(length)
    }

    /// The encoding of a file for an agent, made once however many agents ask.
    async fn encode(
        self: &Arc<Self>,
        agent: &AgentName,
        need: &NeedFile,
        target: &ManifestFile,
        full: bool,
    ) -> Result<Encoded, StoreError> {
        // Before the computation is joined: nobody else waits behind this agent.
        let asked = self.ask(agent).await;
        let (pair, ready) = self.look(need.have.clone(), target.clone(), full).await;
        if let Some(encoded) = ready {
            return Ok(encoded);
        }
        let cell = self.cell(pair);
        let pusher = self.clone();
        // In a task of its own, which lasts as long as the thread: an agent that asks again has this
        // push ended, and must find the computation that goes on.
        let made = tokio::spawn(async move {
            let _asked = asked;
            let made = cell.get_or_try_init(|| async {
                let _maker = pusher.makers.acquire().await.expect("never closed");
                let store = pusher.store.clone();
                let made = tokio::task::spawn_blocking(move || store.encode(pair));
                made.await.expect("encoding does not panic")
            });
            made.await.cloned()
        });
        made.await.expect("encoding does not panic")
    }

    /// Which encoding that is, and whether it is there. In a thread: it waits for the disk.
    async fn look(&self, have: Have, target: ManifestFile, full: bool) -> (Pair, Option<Encoded>) {
        let _look = self.looks.acquire().await.expect("never closed");
        let store = self.store.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let pair = store.pair(&have, &target, full);
            (pair, store.ready(pair))
        });
        looked.await.expect("a look does not panic")
    }

    /// Has a file that an agent received hashed before it is sent again, for it may have been damaged
    /// here.
    pub async fn doubt(&self, need: &NeedFile, target: &ManifestFile, full: bool) {
        let (pair, _) = self.look(need.have.clone(), target.clone(), full).await;
        self.store.doubt(pair);
    }

    /// Waits until the agent waits for no other encoding.
    async fn ask(&self, agent: &AgentName) -> OwnedSemaphorePermit {
        let turn = {
            let mut asking = self.asking.lock().expect("nothing panics with it");
            if let Some(turn) = asking.get(agent).and_then(Weak::upgrade) {
                turn
            } else {
                asking.retain(|_, turn| turn.strong_count() > 0);
                let turn = Arc::new(Semaphore::new(1));
                asking.insert(agent.clone(), Arc::downgrade(&turn));
                turn
            }
        };
        turn.acquire_owned().await.expect("never closed")
    }

    /// The computation of an encoding, which others may have begun.
    fn cell(&self, pair: Pair) -> Arc<OnceCell<Encoded>> {
        let mut making = self.making.lock().expect("nothing panics with it");
        if let Some(cell) = making.get(&pair).and_then(Weak::upgrade) {
            return cell;
        }
        making.retain(|_, cell| cell.strong_count() > 0);
        let cell = Arc::new(OnceCell::new());
        making.insert(pair, Arc::downgrade(&cell));
        cell
    }
}

/// A stream on its way, and its place among those that are.
///
/// quinn finishes a stream that is dropped, so a push that ends halfway would look complete to the
/// agent. This resets it instead.
struct Sending<'p> {
    stream: Option<SendStream>,
    pusher: &'p Pusher,
    _place: SemaphorePermit<'p>,
    is_slow: bool,
}

impl Sending<'_> {
    async fn write(
        &mut self,
        chunk: bytes::Bytes,
        name: &clamcast_proto::DatabaseName,
    ) -> Result<(), PushError> {
        let name = || name.to_string();
        let stream = self.stream.as_mut().expect("only `finish` takes it");
        let mut writing = pin!(stream.write_chunk(chunk));
        let mut written = timeout(SLOW, &mut writing).await;
        if written.is_err() {
            if !self.is_slow
                && let Ok(place) = self.pusher.slow.try_acquire()
            {
                self._place = place;
                self.is_slow = true;
            }
            written = timeout(STALL - SLOW, writing).await;
        }
        written
            .map_err(|_| PushError::Stalled { name: name() })?
            .map_err(|source| PushError::Send {
                name: name(),
                source,
            })
    }

    fn finish(mut self) {
        // An error means that the agent has stopped the stream already; its receipt tells the rest.
        let _ = self.stream.take().expect("only `finish` takes it").finish();
    }
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        if let Some(stream) = &mut self.stream {
            // An error means that the stream is gone already, which is as good.
            let _ = stream.reset(VarInt::from_u32(wire::close::STOPPING));
        }
    }
}
