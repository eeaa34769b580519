//! Mirrors: one that a real freshclam updates from a server on loopback, and any that a test writes
//! to as if it were a freshclam.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};

use nix::unistd::{Uid, User};

use super::needs::Part;
use super::scratch::Scratch;
use super::until::{PATIENCE, until};

/// A mirror directory, at first with version 1 of the signed database `test.cvd`, and what
/// freshclam needs to bring it to versions 2 to 6.
#[derive(Debug)]
pub struct Mirror {
    scratch: Scratch,
    server: Server,
}

impl Mirror {
    /// A new mirror at version 1.
    #[expect(clippy::new_without_default, reason = "it starts a server")]
    pub fn new() -> Self {
        let scratch = Scratch::new();
        let server = Server::start(scratch.directory("www"));
        let directory = scratch.directory("mirror");
        let first = Part::TestFiles.path().join("test-1.cvd");
        copy(&first, &directory.join("test.cvd"));

        let owner = User::from_uid(Uid::effective()).ok().flatten();
        let owner = owner.expect("whoever runs the tests has a name").name;
        let config = format!(
            "DatabaseDirectory {}\nDatabaseMirror http://{}\nDNSDatabaseInfo no\nDatabaseOwner {owner}\n",
            directory.display(),
            server.address,
        );
        fs::write(scratch.join("freshclam.conf"), config).expect("a scratch file can be written");
        Self { scratch, server }
    }

    /// The directory that freshclam maintains.
    pub fn directory(&self) -> PathBuf {
        self.scratch.join("mirror")
    }

    /// Offers `version` (2 to 6) on the server, and is the freshclam that fetches it: patch by
    /// patch, as long as the mirror is behind.
    pub fn freshclam(&self, version: u32) -> Command {
        self.offer(version);
        let mut freshclam = self.freshclam_of_all("");
        freshclam.arg("--update-db=test");
        freshclam
    }

    /// Offers `version` (2 to 6) of the database `test` on the server.
    pub fn offer(&self, version: u32) {
        let files = Part::TestFiles.path();
        for step in 2..=version {
            let patch = format!("test-{step}.cdiff");
            copy(&files.join(&patch), &self.server.directory.join(patch));
        }
        let whole = files.join(format!("test-{version}.cvd"));
        copy(&whole, &self.server.directory.join("test.cvd"));
    }

    /// Offers a file on the server.
    pub fn serve(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.server.directory.join(name), content)
            .expect("a scratch file can be written");
    }

    /// Where the server has the file `name`.
    pub fn url(&self, name: &str) -> String {
        format!("http://{}/{name}", self.server.address)
    }

    /// A freshclam that updates all that its configuration names: what stands in these lines, too.
    pub fn freshclam_of_all(&self, lines: &str) -> Command {
        let path = self.scratch.join("freshclam.conf");
        let config = fs::read_to_string(&path).expect("it was written");
        let all = self.scratch.join("freshclam-all.conf");
        fs::write(&all, config + lines).expect("a scratch file can be written");
        let mut option = std::ffi::OsString::from("--config-file=");
        option.push(all);
        let mut freshclam = Command::new(Part::Freshclam.path());
        freshclam.arg(option).args(["--no-dns", "--stdout"]);
        freshclam
    }

    /// Answers no request for the file `name` until the returned value is dropped.
    pub fn hold(&self, name: &str) -> Hold<'_> {
        self.server.held.lock(|held| held.insert(name.to_owned()));
        Hold {
            held: &self.server.held,
            requests: &self.server.requests,
            name: name.to_owned(),
        }
    }

    /// Runs the real freshclam until `test.cld` is at `version`, and returns its path.
    ///
    /// # Panics
    ///
    /// If freshclam fails or ends elsewhere.
    pub fn freshclam_to(&self, version: u32) -> PathBuf {
        let ran = self
            .freshclam(version)
            .output()
            .expect("freshclam was found");
        let said = String::from_utf8_lossy(&ran.stdout);
        assert!(
            ran.status.success(),
            "freshclam ended with {}: {said}",
            ran.status
        );
        let database = self.directory().join("test.cld");
        let head = File::open(&database).and_then(|file| {
            let mut head = [0; 512];
            file.read_exact_at(&mut head, 0)?;
            Ok(String::from_utf8_lossy(&head).into_owned())
        });
        let head = head.unwrap_or_else(|error| panic!("no test.cld ({error}): {said}"));
        let reached = head.split(':').nth(2);
        assert_eq!(
            reached,
            Some(version.to_string().as_str()),
            "freshclam said: {said}"
        );
        database
    }

    /// What was asked of the server so far, such as `GET /test.cvd bytes=0-511`.
    pub fn requests(&self) -> Vec<String> {
        self.server
            .requests
            .lock()
            .expect("no request panics")
            .clone()
    }
}

/// A file that the server of a [`Mirror`] does not give away yet.
#[derive(Debug)]
pub struct Hold<'a> {
    held: &'a Held,
    requests: &'a Mutex<Vec<String>>,
    name: String,
}

impl Hold<'_> {
    /// Waits until a client has asked for the file.
    pub fn wait(&self) {
        let request = format!("GET /{}", self.name);
        until(PATIENCE, &format!("{request} comes"), || {
            let requests = self.requests.lock().expect("no request panics").clone();
            let last = requests.last().cloned().unwrap_or_default();
            if last.starts_with(&request) {
                Ok(())
            } else {
                Err(requests)
            }
        });
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.held.lock(|held| held.remove(&self.name));
    }
}

/// The names of files that are not given away yet.
#[derive(Debug, Default)]
struct Held(Mutex<BTreeSet<String>>, Condvar);

impl Held {
    fn lock<T>(&self, change: impl FnOnce(&mut BTreeSet<String>) -> T) -> T {
        let changed = change(&mut self.0.lock().expect("no change panics"));
        self.1.notify_all();
        changed
    }

    fn wait(&self, name: &str) {
        let held = self.0.lock().expect("no change panics");
        let waited = self.1.wait_while(held, |held| held.contains(name));
        drop(waited.expect("no change panics"));
    }
}

/// Makes a mirror look as if a freshclam were at work on it, until this is dropped: what is done to
/// it meanwhile is captured all at once or not at all.
#[derive(Debug)]
pub struct Update {
    mirror: PathBuf,
    /// What a freshclam that runs has in its mirror.
    work: PathBuf,
}

impl Update {
    /// Begins one of the mirror in this directory.
    pub fn begin(mirror: impl Into<PathBuf>) -> Self {
        let mirror = mirror.into();
        let work = mirror.join("tmp.0123456789");
        fs::create_dir(&work).expect("a mirror can be written, by one at a time");
        Self { mirror, work }
    }

    /// Renames a file into place.
    pub fn put(&self, name: &str, content: impl AsRef<[u8]>) {
        let part = self.work.join(name);
        let put = fs::write(&part, content).and_then(|()| fs::rename(part, self.mirror.join(name)));
        put.expect("a mirror can be written");
    }

    /// Removes a file.
    pub fn remove(&self, name: &str) {
        fs::remove_file(self.mirror.join(name)).expect("it is in the mirror");
    }
}

impl Drop for Update {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.work); // fails only for a test that failed itself
    }
}

/// Copies the content alone: test files may be read-only, and a copy that was, too, could not be
/// replaced by the next one but by root.
fn copy(from: &Path, to: &Path) {
    let copied = fs::read(from).and_then(|bytes| fs::write(to, bytes));
    copied.unwrap_or_else(|error| panic!("cannot copy {}: {error}", from.display()));
}

/// Serves the files of one directory over HTTP, whole or in ranges: freshclam reads a database's
/// header by `bytes=0-511` to learn its version.
#[derive(Debug)]
struct Server {
    directory: PathBuf,
    address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
    held: Arc<Held>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(directory: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let address = listener
            .local_addr()
            .expect("a bound socket has an address");
        let requests = Arc::<Mutex<Vec<String>>>::default();
        let held = Arc::<Held>::default();
        let stop = Arc::<AtomicBool>::default();
        let thread = thread::spawn({
            let (directory, requests, stop) = (directory.clone(), requests.clone(), stop.clone());
            let held = held.clone();
            move || {
                // One at a time: freshclam is alone here, and closes before it asks again.
                for connection in listener.incoming() {
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                    // A client that went away is no matter; it says so itself.
                    let _ =
                        connection.and_then(|stream| answer(stream, &directory, &requests, &held));
                }
            }
        });
        Self {
            directory,
            address,
            requests,
            held,
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.held.lock(BTreeSet::clear);
        let woken = TcpStream::connect(self.address);
        if let (Ok(_), Some(thread)) = (woken, self.thread.take()) {
            let _ = thread.join();
        }
    }
}

/// Reads one request and answers it.
fn answer(
    stream: TcpStream,
    directory: &Path,
    requests: &Mutex<Vec<String>>,
    held: &Held,
) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut lines = BufReader::new(stream.try_clone()?.take(64 << 10)).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut range = None;
    for line in lines {
        let line = line?;
        if line.is_empty() {
            break;
        }
        if let Some((_, value)) = line
            .split_once(": ")
            .filter(|(key, _)| key.eq_ignore_ascii_case("range"))
        {
            range = Some(value.to_owned());
        }
    }
    let asked = format!("GET {path} {}", range.as_deref().unwrap_or_default());
    requests
        .lock()
        .expect("no request panics")
        .push(asked.trim_end().to_owned());

    let name = path.rsplit('/').next().unwrap_or_default();
    let name = name.split('?').next().unwrap_or_default(); // cvdupdate adds the version
    held.wait(name);
    let (status, body) = match fs::read(directory.join(name)) {
        Err(_) => ("404 Not Found", Vec::new()),
        Ok(body) => match range.as_deref().and_then(bounds) {
            None => ("200 OK", body),
            Some((from, to)) => {
                let to = body.len().min(to.saturating_add(1));
                ("206 Partial Content", body[from.min(to)..to].to_vec())
            }
        },
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let mut stream = stream;
    stream.write_all(head.as_bytes())?;
    stream.write_all(&body)
}

/// First and last position of `bytes=0-511`.
fn bounds(range: &str) -> Option<(usize, usize)> {
    let (from, to) = range.strip_prefix("bytes=")?.split_once('-')?;
    Some((from.parse().ok()?, to.parse().ok()?))
}
