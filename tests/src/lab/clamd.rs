//! A real clamd in the foreground, with a configuration of its own.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::chown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::needs::Part;
use super::scratch::Scratch;
use super::slots::{self, Slot};
use super::until::{PATIENCE, until};

/// A clamd on a database directory. It runs as whoever runs the tests, does no self-checks unless
/// asked to, and is killed when dropped. It keeps one of the [`CLAMDS_MAX`](super::CLAMDS_MAX)
/// places from its making to its end, whether it runs or not.
#[derive(Debug)]
pub struct Clamd {
    scratch: Scratch,
    settings: Vec<(String, String)>,
    user: Option<u32>,
    memory_kib: Option<u64>,
    child: Option<Child>,
    _slot: Slot,
}

impl Clamd {
    /// A clamd for the databases in `directory`, not started yet. Waits until it may run. A test
    /// that needs several asks for all with [`Clamd::several`].
    pub fn new(directory: impl AsRef<Path>) -> Self {
        let [slot] = slots::take();
        Self::in_slot(directory.as_ref(), slot)
    }

    /// Several at once: asking for one after the other would let two tests wait for each other.
    pub fn several<const COUNT: usize>(directories: [&Path; COUNT]) -> [Self; COUNT] {
        let mut slots = slots::take::<COUNT>().into_iter();
        directories.map(|directory| Self::in_slot(directory, slots.next().expect("one for each")))
    }

    fn in_slot(directory: &Path, slot: Slot) -> Self {
        let scratch = Scratch::new();
        let path = |name: &str| scratch.join(name).display().to_string();
        let settings = [
            ("DatabaseDirectory", directory.display().to_string()),
            ("LocalSocket", path("clamd.sock")),
            ("PidFile", path("clamd.pid")),
            ("LogFile", path("clamd.log")),
            ("LogTime", "yes".into()),
            ("Foreground", "yes".into()),
            ("ConcurrentDatabaseReload", "yes".into()),
            // Off, so that every reload in a test is one that the test knows of.
            ("SelfCheck", "0".into()),
        ];
        let settings = settings.map(|(key, value)| (key.into(), value)).into();
        let clamd = Self {
            scratch,
            settings,
            user: None,
            memory_kib: None,
            child: None,
            _slot: slot,
        };
        clamd.write_config();
        clamd
    }

    /// Sets a line of clamd.conf, in place of the one that was there. Counts from the next start.
    #[must_use]
    pub fn with(mut self, key: &str, value: &str) -> Self {
        self.settings.retain(|(known, _)| known != key);
        self.settings.push((key.into(), value.into()));
        self.write_config();
        self
    }

    /// Removes a line of clamd.conf. Counts from the next start.
    #[must_use]
    pub fn without(mut self, key: &str) -> Self {
        self.settings.retain(|(known, _)| known != key);
        self.write_config();
        self
    }

    /// Limits its address space, as `ulimit -v` does, or lifts that. Counts from the next start.
    pub fn limit_memory(&mut self, kib: Option<u64>) {
        self.memory_kib = kib;
    }

    /// Lets it run as another user, who then owns what it has here. Counts from the next start, and
    /// takes root.
    #[must_use]
    pub fn with_user(mut self, uid: u32) -> Self {
        let owned = chown(self.scratch.path(), Some(uid), Some(uid));
        owned.expect("root may give files away");
        self.user = Some(uid);
        self
    }

    /// Starts it and returns at once; the socket appears after the databases were loaded.
    ///
    /// # Panics
    ///
    /// If it runs already.
    pub fn start(&mut self) {
        assert!(!self.is_running(), "this clamd runs already");
        // The last one's, if it was killed.
        let _ = fs::remove_file(self.socket());
        let output = File::create(self.scratch.join("clamd.stderr"));
        let output = output.expect("a scratch file can be written");
        let mut command = match self.memory_kib {
            None => Command::new(Part::Clamd.path()),
            Some(kib) => {
                let mut shell = Command::new("sh");
                let limited = format!("ulimit -v {kib}; exec \"$0\" \"$@\"");
                shell.arg("-c").arg(limited).arg(Part::Clamd.path());
                shell
            }
        };
        if let Some(uid) = self.user {
            command.uid(uid).gid(uid); // without any further group (CommandExt::uid)
        }
        let child = command
            .arg("--config-file")
            .arg(self.config())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output)
            .spawn();
        self.child = Some(child.expect("clamd was found"));
    }

    /// Waits until it answers.
    ///
    /// # Panics
    ///
    /// If it ends instead, or takes too long; with what it said.
    pub fn wait_ready(&mut self) {
        until(PATIENCE, "clamd to answer", || {
            if let Some(status) = self.ended() {
                panic!("clamd ended with {status}: {}{}", self.log(), self.stderr());
            }
            self.ping()
        });
    }

    /// Waits until it has ended by itself, as it does when it cannot load a database at its start.
    pub fn wait_ended(&mut self) -> ExitStatus {
        until(PATIENCE, "clamd to end", || self.ended())
    }

    /// Whether its process is there.
    pub fn is_running(&mut self) -> bool {
        self.child.is_some() && self.ended().is_none()
    }

    /// Kills it with SIGKILL. Its socket stays behind, as it does after a crash.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Fails only for one that has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Ends it with SIGTERM, and waits. Its socket is gone then.
    pub fn stop(&mut self) {
        if self.is_running() {
            kill(Pid::from_raw(self.pid() as i32), Signal::SIGTERM).expect("our own child");
            self.wait_ended();
        }
        self.child = None;
    }

    /// Stops it, starts it and waits until it answers.
    pub fn restart(&mut self) {
        self.stop();
        self.start();
        self.wait_ready();
    }

    /// Its process id.
    ///
    /// # Panics
    ///
    /// If it was not started.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("this clamd was started").id()
    }

    /// Where its clamd.conf is.
    pub fn config(&self) -> PathBuf {
        self.scratch.join("clamd.conf")
    }

    /// Where its socket is, or will be.
    pub fn socket(&self) -> PathBuf {
        self.scratch.join("clamd.sock")
    }

    /// Where it writes its process id.
    pub fn pid_file(&self) -> PathBuf {
        self.scratch.join("clamd.pid")
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.scratch.join("clamd.log")).unwrap_or_default()
    }

    /// What it has said on its standard error so far: there libclamav gives its reasons.
    pub fn stderr(&self) -> String {
        fs::read_to_string(self.scratch.join("clamd.stderr")).unwrap_or_default()
    }

    /// Whether it answers.
    pub fn ping(&self) -> io::Result<()> {
        match self.command("PING")?.as_str() {
            "PONG" => Ok(()),
            other => Err(io::Error::other(format!("not PONG but `{other}`"))),
        }
    }

    /// Its version, and that of its daily database if it has one: `ClamAV 1.4.6/27890/...`.
    pub fn version(&self) -> io::Result<String> {
        self.command("VERSION")
    }

    /// Asks for a reload. It says nothing about whether one happens.
    pub fn reload(&self) -> io::Result<String> {
        self.command("RELOAD")
    }

    /// Sends one command and returns the answer.
    pub fn command(&self, command: &str) -> io::Result<String> {
        self.ask(format!("z{command}\0").as_bytes())
    }

    /// Scans bytes: `stream: OK`, or `stream: NAME FOUND`. It says OK to anything shorter than
    /// six bytes.
    pub fn scan(&self, bytes: &[u8]) -> io::Result<String> {
        let length = u32::try_from(bytes.len()).expect("a sample is small");
        let end = 0_u32.to_be_bytes();
        self.ask(&[b"zINSTREAM\0", &length.to_be_bytes()[..], bytes, &end].concat())
    }

    fn ask(&self, request: &[u8]) -> io::Result<String> {
        let mut stream = UnixStream::connect(self.socket())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(request)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.trim_end_matches(['\0', '\n']).to_owned())
    }

    fn ended(&mut self) -> Option<ExitStatus> {
        self.child.as_mut()?.try_wait().expect("our own child")
    }

    fn write_config(&self) {
        let lines: String = self
            .settings
            .iter()
            .map(|(key, value)| format!("{key} {value}\n"))
            .collect();
        fs::write(self.config(), lines).expect("a scratch file can be written");
    }
}

impl Drop for Clamd {
    fn drop(&mut self) {
        self.kill();
    }
}
