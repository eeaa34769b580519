//! A fleet of real daemons: their own processes, configured by files, on loopback.

use std::fs::{self, File};
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::{env, thread};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::clamd::Clamd;
use super::needs::{search_path, target};
use super::scratch::Scratch;
use super::tree::succeeded;
use super::until::{PATIENCE, until};

/// The PKI of a fleet, and the directory where its daemons live.
#[derive(Debug)]
pub struct Fleet {
    scratch: Scratch,
    port: u16,
}

impl Fleet {
    /// Makes the PKI of a new fleet, whose master will listen on a free port of 127.0.0.1.
    #[expect(clippy::new_without_default, reason = "it makes a PKI")]
    pub fn new() -> Self {
        let free = UdpSocket::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
        let port = free.expect("loopback has a free port").port();
        let fleet = Self {
            scratch: Scratch::new(),
            port,
        };
        fleet.certs(&["init", "--fleet", "bank"]);
        fleet.certs(&["master", "--host", "127.0.0.1"]);
        fleet
    }

    /// Runs a command of `clamcast-certs` on this fleet's PKI.
    ///
    /// # Panics
    ///
    /// If it fails.
    pub fn certs(&self, arguments: &[&str]) -> String {
        let (command, rest) = arguments.split_first().expect("a command is named");
        let mut certs = program("clamcast-certs");
        certs.arg(command).arg("--dir").arg(self.pki()).args(rest);
        succeeded(&certs.output().expect("clamcast-certs was built"), command)
    }

    /// The directory of the PKI.
    pub fn pki(&self) -> PathBuf {
        self.scratch.join("pki")
    }

    /// A path in the fleet's own directory.
    pub fn join(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// The port that the master listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A directory for the fleet's master to mirror, empty at first.
    pub fn mirror(&self) -> PathBuf {
        self.scratch.directory("mirror")
    }

    /// The database directory of the agent `name`, empty before that agent is made.
    pub fn database(&self, name: &str) -> PathBuf {
        self.scratch.directory(&format!("agents/{name}/db"))
    }

    /// A master for `mirror`, which requires no database in particular. It is not started.
    pub fn master(&self, mirror: &Path) -> Master {
        let directory = self.scratch.directory("master");
        let pki = self.pki();
        let config = format!(
            r#"fleet = "bank"
state = "state"
[mirror]
path = "{mirror}"
quiet = "300ms"
require = []
[listen]
quic = "127.0.0.1:{port}"
admin = "admin.sock"
[tls]
ca = "{pki}/ca.pem"
cert = "{pki}/master/cert.pem"
key = "{pki}/master/key.pem"
revoked = "{pki}/revoked.json"
[signing]
manifest_key = "{pki}/manifest.key"
audit_key = "{pki}/audit.key"
keys = "{pki}/manifest.pub"
"#,
            mirror = mirror.display(),
            port = self.port,
            pki = pki.display(),
        );
        Master(Daemon::new(
            "clamcast-master",
            "serve",
            "master.toml",
            directory,
            &config,
        ))
    }

    /// An agent without a clamd, of a new certificate. It is not started.
    pub fn agent(&self, name: &str) -> Agent {
        self.agent_with(name, "config = \"\"\nsocket = \"none\"")
    }

    /// Such agents, started.
    pub fn start_agents<const COUNT: usize>(&self, names: [&str; COUNT]) -> [Agent; COUNT] {
        names.map(|name| {
            let mut agent = self.agent(name);
            agent.start();
            agent
        })
    }

    /// An agent, and a clamd on its database directory. Neither is started, and clamd does not start
    /// before there is a database.
    pub fn agent_and_clamd(&self, name: &str) -> (Agent, Clamd) {
        let clamd = Clamd::new(self.database(name));
        (self.agent_of(name, &clamd), clamd)
    }

    /// A master with these lines in the place of `require = []`, the agent `web1` and its clamd. None of
    /// them is started.
    pub fn one_host(&self, settings: &str) -> (Master, Agent, Clamd) {
        let master = self.master(&self.mirror());
        master.configure("require = []", settings);
        let (agent, clamd) = self.agent_and_clamd("web1");
        (master, agent, clamd)
    }

    /// An agent that keeps the databases of `clamd`, which is on [`Fleet::database`]. It is not
    /// started.
    pub fn agent_of(&self, name: &str, clamd: &Clamd) -> Agent {
        self.agent_with(name, &format!("config = {:?}", clamd.config()))
    }

    /// An agent whose `[clamd]` table has these lines. It is not started.
    pub fn agent_with(&self, name: &str, clamd: &str) -> Agent {
        self.certs(&["agent", name]);
        let bundle = self.pki().join("agents").join(name);
        let directory = self.scratch.directory(&format!("agents/{name}"));
        self.database(name);
        let config = format!(
            r#"master = ["127.0.0.1:{port}"]
state = "state"
[tls]
ca = "{bundle}/ca.pem"
cert = "{bundle}/cert.pem"
key = "{bundle}/key.pem"
[trust]
keys = "{bundle}/manifest.pub"
[listen]
admin = "admin.sock"
[database]
path = "db"
[clamd]
{clamd}
"#,
            port = self.port,
            bundle = bundle.display(),
        );
        Agent(Daemon::new(
            "clamcast-agent",
            "run",
            "agent.toml",
            directory,
            &config,
        ))
    }
}

/// A daemon of ours: its directory, its configuration and, while it runs, its process.
#[derive(Debug)]
pub struct Daemon {
    program: &'static str,
    command: &'static str,
    directory: PathBuf,
    config: PathBuf,
    child: Option<Child>,
}

impl Daemon {
    fn new(
        program: &'static str,
        command: &'static str,
        file: &str,
        directory: PathBuf,
        config: &str,
    ) -> Self {
        let path = directory.join(file);
        fs::write(&path, config).expect("a scratch file can be written");
        Self {
            program,
            command,
            directory,
            config: path,
            child: None,
        }
    }

    /// Replaces `from` by `to` in the configuration; takes effect at the next start.
    ///
    /// # Panics
    ///
    /// If `from` is not there.
    pub fn configure(&self, from: &str, to: &str) {
        let text = fs::read_to_string(&self.config).expect("it was written");
        assert!(text.contains(from), "{from} is not in {text}");
        fs::write(&self.config, text.replace(from, to)).expect("a scratch file can be written");
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its configuration file.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Starts it and waits until its admin socket answers.
    pub fn start(&mut self) {
        self.launch(self.process());
        self.wait_ready();
    }

    /// The command that is the daemon, for tests that change its surroundings.
    pub fn process(&self) -> Command {
        let mut process = program(self.program);
        process
            .arg(self.command)
            .arg("--config")
            .arg(&self.config)
            .current_dir(&self.directory);
        process
    }

    /// Runs `process` as the daemon.
    pub fn launch(&mut self, mut process: Command) {
        assert!(self.child.is_none(), "{} runs already", self.program);
        let log = self.directory.join("log");
        let log = File::options().create(true).append(true).open(log);
        let log = log.expect("a scratch file can be written");
        let child = process
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        self.child = Some(child.unwrap_or_else(|error| panic!("{}: {error}", self.program)));
    }

    /// Waits until its admin socket answers.
    ///
    /// # Panics
    ///
    /// If it ends instead, with its log.
    pub fn wait_ready(&mut self) {
        let socket = self.socket();
        until(PATIENCE, "the daemon listens", || {
            if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().ok()?) {
                panic!("{} ended with {status}: {}", self.program, self.log());
            }
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// Ends it at once, as a power failure would.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().expect("it is ours");
        child.wait().expect("it is ours");
    }

    /// Asks it to stop and waits for that.
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait_ended()
    }

    /// Asks it to read its configuration again.
    pub fn reload(&self) {
        self.signal(Signal::SIGHUP);
    }

    /// Lets it go on after SIGSTOP.
    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).expect("a process id");
        kill(Pid::from_raw(pid), signal).expect("it is ours");
    }

    /// Waits until it has ended by itself.
    pub fn wait_ended(&mut self) -> ExitStatus {
        let child = self.child.as_mut().expect("it runs");
        let status = until(PATIENCE, "the daemon ends", || {
            child.try_wait().expect("it is ours")
        });
        self.child = None;
        status
    }

    /// Whether it has ended, if it was started.
    pub fn has_ended(&mut self) -> bool {
        let ended = |child: &mut Child| child.try_wait().expect("it is ours").is_some();
        if self.child.as_mut().is_some_and(ended) {
            self.child = None;
        }
        self.child.is_none()
    }

    /// What it wrote on stderr.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    /// Its admin socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("admin.sock")
    }

    /// Runs a command that talks to it.
    pub fn command(&self, arguments: &[&str]) -> Output {
        let mut command = program(self.program);
        command.arg("--socket").arg(self.socket()).args(arguments);
        command
            .current_dir(&self.directory)
            .output()
            .expect("it was built")
    }

    /// Runs a command with `--json`; `None` if it failed.
    pub fn json(&self, arguments: &[&str]) -> Option<Value> {
        let output = self.command(&[arguments, &["--json"]].concat());
        serde_json::from_slice(&output.stdout).ok()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
        if thread::panicking() {
            eprintln!("---- log of {}\n{}", self.directory.display(), self.log());
        }
    }
}

/// A `clamcast-master`.
#[derive(Debug)]
pub struct Master(Daemon);

impl Master {
    /// Starts it, an agent of its fleet and, as soon as that has databases for it, the agent's clamd.
    /// Returns the agent's row once it is live at generation 1.
    #[track_caller]
    pub fn start_with(&mut self, agent: &mut Agent, clamd: &mut Clamd) -> Value {
        self.start();
        agent.start();
        self.wait_installed(&agent.name());
        clamd.start();
        self.wait_live(&agent.name(), 1)
    }

    /// The row of an agent in `agents --json`.
    pub fn agent(&self, name: &str) -> Option<Value> {
        let rows = self.json(&["agents"])?;
        rows.as_array()?
            .iter()
            .find(|row| row["name"] == name)
            .cloned()
    }

    /// Waits until an agent's row is as `wanted` says.
    #[track_caller]
    pub fn wait_agent(&self, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        until(PATIENCE, what, || {
            let row = self.agent(name).ok_or(Value::Null)?;
            if wanted(&row) { Ok(row) } else { Err(row) }
        })
    }

    /// Waits until an agent has a set that no clamd was seen with.
    #[track_caller]
    pub fn wait_installed(&self, name: &str) -> Value {
        self.wait_agent(name, &format!("{name} has the set"), |row| {
            row["outcome"] == "installed"
        })
    }

    /// Waits until an agent is live at `generation`, by its receipt.
    #[track_caller]
    pub fn wait_live(&self, name: &str, generation: u64) -> Value {
        self.wait_agent(name, &format!("{name} is live at {generation}"), |row| {
            row["generation"] == generation && row["live"] == true && row["conformant"] == true
        })
    }

    /// Waits until the generation published last is `generation`.
    #[track_caller]
    pub fn wait_generation(&self, generation: u64) {
        until(PATIENCE, "the generation is published", || {
            let generations = self.json(&["generations"]).unwrap_or_default();
            let last = generations.as_array().and_then(|rows| rows.last());
            if last.is_some_and(|last| last["generation"] == generation) {
                Ok(())
            } else {
                Err(generations)
            }
        });
    }

    /// Waits until the mirror's set is refused or a unit of it held, and returns the reason.
    #[track_caller]
    pub fn wait_refused(&self) -> String {
        until(PATIENCE, "the set is refused", || {
            let status = self.json(&["status"]).ok_or(Value::Null)?;
            let refused = status["refused"]["reason"].as_str();
            let held = status["held"][0]["reason"].as_str();
            let reason = refused.or(held).map(str::to_owned);
            reason.ok_or(status)
        })
    }

    /// Waits until the audit log has so many records of one event. A record follows what it is about.
    #[track_caller]
    pub fn wait_audit(&self, event: &str, count: usize) -> Vec<Value> {
        until(PATIENCE, &format!("{count} records of {event}"), || {
            let records = self.audit(event);
            if records.len() == count {
                Ok(records)
            } else {
                Err(records)
            }
        })
    }

    /// The audit log's records of one event.
    pub fn audit(&self, event: &str) -> Vec<Value> {
        let output = self.command(&["audit", "show", "--event", event, "--json"]);
        let lines = String::from_utf8(output.stdout).expect("JSON is text");
        lines
            .lines()
            .map(|line| serde_json::from_str(line).expect("a record"))
            .collect()
    }
}

/// A `clamcast-agent`.
#[derive(Debug)]
pub struct Agent(Daemon);

impl Agent {
    /// Its name.
    pub fn name(&self) -> String {
        let name = self.directory().file_name().expect("it is named after it");
        name.to_string_lossy().into_owned()
    }

    /// Its database directory.
    pub fn database(&self) -> PathBuf {
        self.directory().join("db")
    }

    /// The names in its database directory that are not clamcast's own, sorted.
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.database()).expect("it is there");
        let names = entries.map(|entry| entry.expect("it is there").file_name());
        let mut names: Vec<_> = names
            .map(|name| name.into_string().expect("names are text"))
            .filter(|name| name != ".clamcast" && !name.starts_with("clamcast-"))
            .collect();
        names.sort();
        names
    }
}

impl std::ops::Deref for Master {
    type Target = Daemon;
    fn deref(&self) -> &Daemon {
        &self.0
    }
}

impl std::ops::DerefMut for Master {
    fn deref_mut(&mut self) -> &mut Daemon {
        &mut self.0
    }
}

impl std::ops::Deref for Agent {
    type Target = Daemon;
    fn deref(&self) -> &Daemon {
        &self.0
    }
}

impl std::ops::DerefMut for Agent {
    fn deref_mut(&mut self) -> &mut Daemon {
        &mut self.0
    }
}

/// A program of this workspace, as it is now.
pub fn program(name: &str) -> Command {
    let mut command = Command::new(binaries().join(name));
    command.env("PATH", search_path()).env(
        "CLAMCAST_LOG",
        "info,clamcast_master=debug,clamcast_agent=debug",
    );
    command
}

/// Where the programs are. `cargo xtask test` has built them and says so in `CLAMCAST_BINARIES`;
/// elsewhere cargo does it now, once for each test process.
fn binaries() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        if let Some(built) = env::var_os("CLAMCAST_BINARIES") {
            return built.into();
        }
        let packages = ["clamcast-master", "clamcast-agent", "clamcast-certs"];
        let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut build = Command::new(cargo);
        build
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(["build", "--quiet", "--bins"]);
        build.args(packages.iter().flat_map(|package| ["--package", package]));
        succeeded(
            &build.output().expect("cargo runs the tests"),
            "cargo build",
        );
        target().join("debug")
    })
}
