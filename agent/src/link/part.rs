//! A part on its way: the bytes of a stream for a reader that blocks.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use quinn::RecvStream;
use tokio::runtime::Handle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// A master that sends nothing of an open stream for this long has forgotten it.
const STALL: Duration = Duration::from_secs(60);

/// Reads a stream from a blocking thread. Whatever cuts the stream short (a reset, a lost
/// connection, `stop`) is an error and never looks like its end.
#[derive(Debug)]
pub struct PartReader {
    stream: RecvStream,
    stop: CancellationToken,
    read: Arc<AtomicU64>,
    runtime: Handle,
}

impl PartReader {
    /// Reads `stream` until `stop` fires, counting in `read` what came. Call it on the runtime.
    pub fn new(stream: RecvStream, stop: CancellationToken, read: Arc<AtomicU64>) -> Self {
        let runtime = Handle::current();
        Self {
            stream,
            stop,
            read,
            runtime,
        }
    }
}

impl Read for PartReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Self {
            stream,
            stop,
            read,
            runtime,
        } = self;
        // No error here may be of the kind `Interrupted`, which readers take for "try again".
        let bytes = runtime.block_on(async {
            tokio::select! {
                biased;
                () = stop.cancelled() => Err(io::ErrorKind::ConnectionAborted.into()),
                read = timeout(STALL, stream.read(buffer)) => match read {
                    Ok(Ok(bytes)) => Ok(bytes.unwrap_or(0)),
                    Ok(Err(error)) => Err(io::Error::new(io::ErrorKind::ConnectionReset, error)),
                    Err(_) => Err(io::ErrorKind::TimedOut.into()),
                },
            }
        })?;
        read.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(bytes)
    }
}
