//! A name server that gives one answer.

use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// The only port at which resolvers ask.
const PORT: u16 = 53;

/// Time between two looks whether the server is still wanted.
const TICK: Duration = Duration::from_millis(50);

/// Answers every question with one TXT record. It is a mock of the name server of clamav.net, whose
/// `current.cvd.clamav.net` says which versions of the databases there are: those of today, and not
/// those that a test has.
#[derive(Debug)]
pub struct NameServer {
    address: Ipv4Addr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl NameServer {
    /// One that answers `text`, of at most 255 bytes.
    ///
    /// # Panics
    ///
    /// If this process may not listen on a port of the system.
    pub fn start(text: &str) -> Self {
        let (address, socket) = bind().expect("the test asked for the right to do it");
        let ticks = socket.set_read_timeout(Some(TICK));
        ticks.expect("a tick is not zero");
        let stop = Arc::<AtomicBool>::default();
        let thread = thread::spawn({
            let (stop, text) = (stop.clone(), text.to_owned());
            move || {
                let mut question = [0; 512];
                while !stop.load(Ordering::SeqCst) {
                    let Ok((length, client)) = socket.recv_from(&mut question) else {
                        continue; // a tick
                    };
                    if let Some(answer) = answer(&question[..length], &text) {
                        let _ = socket.send_to(&answer, client); // the client asks again
                    }
                }
            }
        });
        Self {
            address,
            stop,
            thread: Some(thread),
        }
    }

    /// Where it answers.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Whether this process may listen at the port of name servers.
pub(super) fn may_bind() -> Result<(), String> {
    match bind() {
        Ok(_) => Ok(()),
        Err(error) => Err(format!(
            "no UDP port {PORT} of loopback for a name server ({error}); root may have it"
        )),
    }
}

/// A socket on a random address of loopback, so that tests beside this one get others.
fn bind() -> io::Result<(Ipv4Addr, UdpSocket)> {
    let [one, two] = rand::random();
    let address = Ipv4Addr::new(127, 53, one, two);
    Ok((address, UdpSocket::bind((address, PORT))?))
}

/// The answer to a question (RFC 1035, section 4); `None` if it is none.
fn answer(question: &[u8], text: &str) -> Option<Vec<u8>> {
    const HEADER: usize = 12;
    let mut end = HEADER;
    while *question.get(end)? != 0 {
        end += 1 + usize::from(question[end]);
    }
    end += 1 + 4; // the root, type and class
    let mut answer = question.get(..end)?.to_vec();
    answer[2..4].copy_from_slice(&[0x85, 0x80]); // an authoritative answer, and no error
    answer[4..HEADER].copy_from_slice(&[0, 1, 0, 1, 0, 0, 0, 0]); // one question, one answer
    let length = u8::try_from(text.len()).ok()?;
    answer.extend([0xc0, 12]); // the name in the question
    answer.extend([0, 16, 0, 1]); // TXT, IN
    answer.extend([0, 0, 0, 1]); // for a second
    answer.extend((u16::from(length) + 1).to_be_bytes());
    answer.push(length);
    answer.extend(text.as_bytes());
    Some(answer)
}
