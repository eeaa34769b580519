//! A fake clamd for tests: it answers what it is told to, and scans nothing. For faults that a real
//! one cannot be made to show on demand.

use std::sync::{Arc, Mutex};

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{JoinHandle, JoinSet};

use super::client::Address;

/// It stops listening, and its socket is gone, when it is dropped.
pub(super) struct Fake {
    directory: TempDir,
    asked: Arc<Mutex<Vec<String>>>,
    listening: JoinHandle<()>,
}

impl Fake {
    /// Answers each command (`PING`, `INSTREAM` ...) with the bytes that `answer` gives for it;
    /// for `None` it keeps the connection open and says nothing.
    pub(super) fn new(answer: impl Fn(&str) -> Option<Vec<u8>> + Send + Sync + 'static) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let listener = UnixListener::bind(directory.path().join("clamd.ctl")).expect("a socket");
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (answer, log) = (Arc::new(answer), asked.clone());
        let listening = tokio::spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                open.spawn(converse(stream, answer.clone(), log.clone()));
            }
        });
        Self {
            directory,
            asked,
            listening,
        }
    }

    /// Where it listens.
    pub(super) fn address(&self) -> Address {
        Address::Unix(self.directory.path().join("clamd.ctl"))
    }

    /// What it was asked so far.
    pub(super) fn asked(&self) -> Vec<String> {
        self.asked.lock().expect("no test panics there").clone()
    }

    /// Stops listening, as a killed clamd does: its socket stays behind.
    pub(super) async fn kill(&mut self) {
        self.listening.abort();
        let _ = (&mut self.listening).await;
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

async fn converse(
    mut stream: UnixStream,
    answer: Arc<impl Fn(&str) -> Option<Vec<u8>>>,
    asked: Arc<Mutex<Vec<String>>>,
) {
    let mut request = Vec::new();
    let end = loop {
        match stream.read_buf(&mut request).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if let Some(end) = request.iter().position(|&b| b == 0) {
            break end;
        }
    };
    let command = String::from_utf8_lossy(&request[1..end]).into_owned();
    asked
        .lock()
        .expect("no test panics there")
        .push(command.clone());
    match answer(&command) {
        Some(answer) => {
            let _ = stream.write_all(&answer).await;
        }
        None => std::future::pending().await,
    }
}
