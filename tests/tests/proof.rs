//! The proof that clamd scans with an install, against a real clamd.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use clamcast_agent::clamd::proof::{self, Nonce};
use clamcast_agent::clamd::{
    Address, ClamdConf, LoadTest, ProofBy, Prover, RawClamd, ReloadBy, Settings, Verdict,
};
use clamcast_proto::receipt::{ClamdState, InstallNumber, Proof};
use clamcast_tests::lab::{self, Clamd, Container, PATIENCE, Part, Scratch, signatures, until};
use clamcast_tests::require;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tokio_util::sync::CancellationToken;

const NONCE: Nonce = Nonce([42; 16]);

/// A database directory whose installs are a version of `daily.cud`, a canary and a gate.
struct Host {
    scratch: Scratch,
    databases: PathBuf,
    deadline: Duration,
    proof: ProofBy,
    reload: ReloadBy,
}

impl Host {
    /// With install 1 in place.
    fn new() -> Self {
        let scratch = Scratch::new();
        let host = Self {
            databases: scratch.directory("databases"),
            scratch,
            deadline: PATIENCE,
            proof: ProofBy::Canary,
            reload: ReloadBy::Socket,
        };
        host.install(1);
        host
    }

    /// The databases first, then the canary, the gate last.
    fn install(&self, n: u64) {
        daily(n).write(&self.databases);
        self.place(proof::CANARY, proof::canary(&NONCE, InstallNumber(n)));
        self.place(proof::GATE, proof::gate(InstallNumber(n)));
    }

    /// Puts a file where it belongs, all at once.
    fn place(&self, name: &str, content: impl AsRef<[u8]>) {
        let part = self.scratch.join("part");
        fs::write(&part, content).unwrap();
        fs::rename(part, self.databases.join(name)).unwrap();
    }

    /// Makes every load take about a second.
    fn slow_down(&self) {
        // Spread out: for hashes that begin alike the loader takes hours.
        let line = |n: u64| {
            format!(
                "S:F:{:016x}{n:048x}\n",
                n.wrapping_mul(0x9E37_79B9_7F4A_7C15)
            )
        };
        self.place("local.gdb", (0..800_000).map(line).collect::<String>());
    }

    fn clamd(&self) -> Clamd {
        Clamd::new(&self.databases)
    }

    fn settings(&self, clamd: &Clamd, sockets: Option<Vec<Address>>) -> Settings {
        let raw = RawClamd {
            sockets,
            reload: self.reload,
            pid_file: None,
            proof: self.proof,
            deadline: self.deadline,
            splay: Duration::ZERO,
            database_directory: self.databases.clone(),
        };
        let conf = ClamdConf::read(&clamd.config()).unwrap();
        let (mut settings, _) = Settings::resolve(raw, Some(conf));
        settings.scanner = None;
        settings
    }

    fn prover(&self, clamd: &Clamd) -> Prover {
        Prover::new(self.settings(clamd, None), NONCE)
    }
}

/// The daily database whose version is the install that brings it.
fn daily(n: u64) -> Container {
    Container::new("daily", n).member("hsb", signatures(0..10))
}

fn started(mut clamd: Clamd) -> Clamd {
    clamd.start();
    clamd.wait_ready();
    clamd
}

async fn prove(prover: &Prover, n: u64) -> Verdict {
    let stop = CancellationToken::new();
    prover.prove(InstallNumber(n), prover.mark(), stop).await
}

#[track_caller]
fn assert_live(verdict: &Verdict, proof: Proof) {
    assert!(matches!(verdict, Verdict::Live(_)), "{verdict:?}");
    assert_eq!(verdict.report().proof, proof);
    assert_eq!(verdict.report().state, ClamdState::Up);
}

#[track_caller]
fn assert_refused(verdict: &Verdict, words: &[&str]) {
    let Verdict::Refused { reason, .. } = verdict else {
        panic!("{verdict:?}");
    };
    for word in words {
        assert!(reason.contains(word), "{reason} lacks {word}");
    }
}

/// Waits until the log has `hits` lines about installs with `words`: clamd answers first, and logs
/// then.
#[track_caller]
fn assert_hits(clamd: &Clamd, words: &str, hits: usize) {
    until(PATIENCE, "clamd to log its hits", || {
        hits <= count(clamd, words)
    });
    assert_eq!(count(clamd, words), hits, "{}", clamd.log());
}

/// How often the log has a line with `words`.
fn count(clamd: &Clamd, words: &str) -> usize {
    clamd
        .log()
        .lines()
        .filter(|line| line.contains(words))
        .count()
}

#[tokio::test]
async fn an_install_is_live_when_clamd_names_its_sample_and_is_one_hit_in_the_log() {
    require!(Clamd);
    let host = Host::new();
    let clamd = started(host.clamd());
    let prover = host.prover(&clamd);
    assert_live(&prove(&prover, 1).await, Proof::Canary);
    for n in 2..=4 {
        host.install(n);
        let verdict = prove(&prover, n).await;
        assert_live(&verdict, Proof::Canary);
        let version = verdict.report().version.clone().unwrap();
        assert!(version.contains(&format!("/{n}/")), "{version}");
    }
    assert_hits(&clamd, "Clamcast.Install-", 4);
}

#[tokio::test]
async fn the_first_install_is_proven_like_any_other() {
    require!(Clamd);
    let host = Host::new();
    for name in [proof::CANARY, proof::GATE] {
        fs::remove_file(host.databases.join(name)).unwrap();
    }
    let clamd = started(host.clamd());
    host.install(1);
    assert_live(&prove(&host.prover(&clamd), 1).await, Proof::Canary);
}

#[tokio::test]
async fn a_reload_that_clamd_drops_is_sent_again() {
    require!(Clamd);
    let host = Host::new();
    let clamd = started(host.clamd());
    let load = HeldLoad::begin(&host, &clamd);
    host.install(2);
    let prover = host.prover(&clamd);
    let mark = prover.mark();
    // Taken, it says.
    assert_eq!(clamd.reload().unwrap(), "RELOADING");
    load.end();
    let verdict = prover
        .prove(InstallNumber(2), mark, CancellationToken::new())
        .await;
    assert_live(&verdict, Proof::Canary);
    assert!(clamd.version().unwrap().contains("/2/"));
    // That of its start, the one that was held, and ours.
    assert_eq!(count(&clamd, "Reading databases"), 3, "{}", clamd.log());
}

#[tokio::test]
async fn a_canary_alone_can_lie_and_with_the_gate_it_does_not() {
    require!(Clamd, TestFiles);
    let version = |n: u32| fs::read(Part::TestFiles.path().join(format!("test-{n}.cvd"))).unwrap();
    let host = Host::new();
    fs::remove_file(host.databases.join("daily.cud")).unwrap();
    host.place("daily.cvd", version(5));
    fs::remove_file(host.databases.join(proof::GATE)).unwrap();
    let mut clamd = started(host.clamd());
    let load = HeldLoad::begin(&host, &clamd);
    host.place("daily.cvd", version(6));
    host.place(proof::CANARY, proof::canary(&NONCE, InstallNumber(2)));
    load.end();
    until(PATIENCE, "the canary to be found", || {
        let said = clamd
            .scan(&proof::sample(&NONCE, InstallNumber(2)))
            .unwrap();
        said.contains("Clamcast.Install-2.UNOFFICIAL")
    });
    assert!(clamd.version().unwrap().contains("/5/"), "it did not lie");

    host.place("daily.cvd", version(5));
    host.place(proof::CANARY, proof::canary(&NONCE, InstallNumber(1)));
    host.place(proof::GATE, proof::gate(InstallNumber(1)));
    clamd.restart();
    let load = HeldLoad::begin(&host, &clamd);
    host.place("daily.cvd", version(6));
    host.place(proof::CANARY, proof::canary(&NONCE, InstallNumber(2)));
    host.place(proof::GATE, proof::gate(InstallNumber(2)));
    load.end();
    assert_live(&prove(&host.prover(&clamd), 2).await, Proof::Canary);
    assert!(clamd.version().unwrap().contains("/6/"));
}

/// Somebody else's reload, held at `local.gdb`, which is a pipe. That is loaded after the gate and
/// `daily.cvd`, and before the canary and `daily.cud`.
struct HeldLoad(File);

impl HeldLoad {
    fn begin(host: &Host, clamd: &Clamd) -> Self {
        let pipe = host.databases.join("local.gdb");
        let _ = fs::remove_file(&pipe);
        mkfifo(&pipe, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        clamd.reload().unwrap();
        let files = PathBuf::from(format!("/proc/{}/fd", clamd.pid()));
        let reads = || {
            let files = fs::read_dir(&files).unwrap().flatten();
            let mut targets = files.filter_map(|file| fs::read_link(file.path()).ok());
            targets.any(|target| target == pipe)
        };
        let open = || {
            let writer = until(PATIENCE, "clamd to open the pipe", || {
                let mut writer = File::options();
                writer.write(true).custom_flags(OFlag::O_NONBLOCK.bits());
                writer.open(&pipe)
            });
            until(PATIENCE, "clamd to read the pipe", reads);
            writer
        };
        // First it counts the signatures in all files, then it loads them.
        drop(open());
        until(PATIENCE, "clamd to have counted", || !reads());
        let load = Self(open());
        // Later loads find a file.
        host.place("local.gdb", PREFIX);
        load
    }

    fn end(mut self) {
        self.0.write_all(PREFIX.as_bytes()).unwrap();
    }
}

/// A line of a `.gdb` file.
const PREFIX: &str = "S:F:8d969eef6ecad3c29a3a629280e686cf0c3f5d5a86aff3ca12020c923adc6c92\n";

#[tokio::test]
async fn databases_that_clamd_cannot_load_are_refused_with_its_reason_and_the_file() {
    require!(Clamd, Clamscan);
    let host = Host::new();
    let clamd = started(host.clamd());
    host.install(2);
    Container::refused_by_clamd("bad", 1).write(&host.databases);
    let refused = prove(&host.prover(&clamd), 2).await;
    assert_refused(&refused, &["clamd: Malformed database"]);
    assert!(
        clamd.version().unwrap().contains("/1/"),
        "it keeps what it has"
    );

    let mut settings = host.settings(&clamd, None);
    settings.scanner = Some(Part::Clamscan.path());
    let prover = Prover::new(settings, NONCE);
    let refused = prove(&prover, 2).await;
    assert_refused(
        &refused,
        &["clamd: Malformed database", "clamscan: ", "bad.cud"],
    );
    let tested = prover.load_test(&host.databases).await;
    assert!(
        matches!(&tested, LoadTest::Failed(reason) if reason.contains("bad.cud")),
        "{tested:?}"
    );

    fs::remove_file(host.databases.join("bad.cud")).unwrap();
    host.install(3);
    assert_live(&prove(&prover, 3).await, Proof::Canary);
    assert_eq!(prover.load_test(&host.databases).await, LoadTest::Passed);
}

#[tokio::test]
async fn somebody_elses_half_written_file_is_no_refusal() {
    require!(Clamd);
    let host = Host::new();
    let clamd = started(host.clamd());
    host.install(2);
    host.place("theirs.ndb", "half a li");
    let prover = host.prover(&clamd);
    let stop = CancellationToken::new();
    let proving = tokio::spawn({
        let prover = prover.clone();
        async move { prover.prove(InstallNumber(2), prover.mark(), stop).await }
    });
    lab::until_async(PATIENCE, "a load to fail", async || {
        count(&clamd, "Database load failed") > 0
    })
    .await;
    host.place(
        "theirs.ndb",
        "Theirs.Whole:0:*:6c696e65206f66207468656972\n",
    );
    assert_live(&proving.await.unwrap(), Proof::Canary);
}

#[tokio::test]
async fn a_directory_that_clamd_reads_for_ever_is_silence_and_no_refusal() {
    require!(Clamd);
    let mut host = Host::new();
    host.deadline = Duration::from_secs(4);
    let clamd = started(host.clamd());
    // Named like a file of signatures, it is read as one, and the reload never ends.
    fs::create_dir(host.databases.join("theirs.ndb")).unwrap();
    host.install(2);
    let verdict = prove(&host.prover(&clamd), 2).await;
    assert!(matches!(verdict, Verdict::Unproven(_)), "{verdict:?}");
    assert!(
        clamd
            .scan(b"the engine before goes on")
            .unwrap()
            .ends_with("OK")
    );
}

#[tokio::test]
async fn without_a_log_the_scanner_says_whether_clamd_refuses() {
    require!(Clamd, Clamscan);
    let mut host = Host::new();
    host.deadline = Duration::from_secs(4);
    let clamd = started(host.clamd());
    host.install(2);
    Container::refused_by_clamd("bad", 1).write(&host.databases);
    let mut settings = host.settings(&clamd, None);
    settings.log_file = None;
    settings.scanner = Some(Part::Clamscan.path());
    let refused = prove(&Prover::new(settings, NONCE), 2).await;
    assert_refused(&refused, &["clamscan: ", "bad.cud"]);
}

#[tokio::test]
async fn an_absent_clamd_is_live_when_it_comes() {
    require!(Clamd);
    let host = Host::new();
    let mut clamd = host.clamd();
    let prover = host.prover(&clamd);
    host.install(2);
    let absent = prove(&prover, 2).await;
    assert!(matches!(absent, Verdict::Absent(_)), "{absent:?}");
    assert_eq!(absent.report().state, ClamdState::Down);
    clamd.start();
    clamd.wait_ready();
    assert_live(&prover.probe(InstallNumber(2)).await, Proof::Canary);
}

#[tokio::test]
async fn a_clamd_that_is_restarted_in_between_is_waited_for() {
    require!(Clamd);
    let host = Host::new();
    host.slow_down();
    let mut clamd = started(host.clamd());
    let prover = host.prover(&clamd);
    host.install(2);
    clamd.kill();
    let proving = tokio::spawn({
        let prover = prover.clone();
        async move { prove(&prover, 2).await }
    });
    // It loads for a second before it makes its socket.
    clamd.start();
    assert_live(&proving.await.unwrap(), Proof::Canary);
}

#[tokio::test]
async fn a_clamd_that_does_not_start_with_the_databases_refuses_them() {
    require!(Clamd, Clamscan);
    let host = Host::new();
    let mut clamd = host.clamd();
    let mut settings = host.settings(&clamd, None);
    settings.scanner = Some(Part::Clamscan.path());
    let prover = Prover::new(settings, NONCE);
    Container::refused_by_clamd("bad", 1).write(&host.databases);
    let mark = prover.mark();
    clamd.start();
    clamd.wait_ended();
    let refused = prover
        .prove(InstallNumber(1), mark, CancellationToken::new())
        .await;
    assert_refused(&refused, &["clamscan: ", "bad.cud"]);
}

#[tokio::test]
async fn where_clamd_loads_official_databases_only_the_proof_is_version_and_the_log() {
    require!(Clamd, TestFiles);
    let version = |n: u32| fs::read(Part::TestFiles.path().join(format!("test-{n}.cvd"))).unwrap();
    let host = Host::new();
    fs::remove_file(host.databases.join("daily.cud")).unwrap();
    host.place("daily.cvd", version(5));
    let clamd = started(host.clamd().with("OfficialDatabaseOnly", "yes"));
    let prover = host.prover(&clamd);
    host.place("daily.cvd", version(6));
    let verdict = prove(&prover, 2).await;
    assert_live(&verdict, Proof::Version);
    let note = verdict.report().note.clone().unwrap();
    assert!(note.starts_with("OfficialDatabaseOnly yes"), "{note}");
    assert!(clamd.version().unwrap().contains("/6/"));
}

#[tokio::test]
async fn a_load_without_the_daily_database_of_the_set_is_no_proof() {
    require!(Clamd);
    let mut host = Host::new();
    host.proof = ProofBy::Version;
    let clamd = started(host.clamd());
    // clamd passes over a `daily.cld` that it may not read, and logs a good load. Whoever runs the
    // tests as root has no file that clamd may not read; so it loads one, and we have another.
    let mut settings = host.settings(&clamd, None);
    settings.database_directory = host.scratch.directory("ours");
    daily(2).write(&settings.database_directory);
    let verdict = prove(&Prover::new(settings, NONCE), 2).await;
    assert!(matches!(verdict, Verdict::Unproven(_)), "{verdict:?}");
    let note = verdict.report().note.clone().unwrap();
    assert!(note.starts_with("VERSION says"), "{note}");
}

#[tokio::test]
async fn clamd_may_listen_on_tcp() {
    require!(Clamd);
    let host = Host::new();
    // Free a moment ago; clamd cannot choose one itself.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let clamd = host.clamd().with("TCPSocket", &port.to_string());
    let clamd = started(clamd.with("TCPAddr", "127.0.0.1"));
    let address = Address::Tcp(format!("127.0.0.1:{port}"));
    let settings = host.settings(&clamd, Some(vec![address]));
    assert!(settings.instances[0].logs);
    host.install(2);
    assert_live(
        &prove(&Prover::new(settings, NONCE), 2).await,
        Proof::Canary,
    );
}

#[tokio::test]
async fn of_several_clamds_each_must_have_it() {
    require!(Clamd);
    let mut host = Host::new();
    let [one, other] = Clamd::several([&host.databases, &host.databases]);
    let (one, mut other) = (started(one), started(other));
    let sockets = [&one, &other].map(|clamd| Address::Unix(clamd.socket()));
    let prover = Prover::new(host.settings(&one, Some(sockets.to_vec())), NONCE);
    host.install(2);
    assert_live(&prove(&prover, 2).await, Proof::Canary);
    for clamd in [&one, &other] {
        assert_hits(clamd, "Clamcast.Install-2", 1);
    }

    other.stop();
    host.install(3);
    host.deadline = Duration::from_secs(10);
    let verdict = prove(&prover, 3).await;
    assert!(matches!(verdict, Verdict::Absent(_)), "{verdict:?}");
    let note = verdict.report().note.clone().unwrap();
    assert!(
        note.contains(&other.socket().display().to_string()),
        "{note}"
    );
}

#[tokio::test]
async fn a_signal_does_where_the_command_does_not() {
    require!(Clamd);
    let mut host = Host::new();
    host.reload = ReloadBy::Signal;
    let clamd = started(host.clamd());
    let socket = without_reload(&host, &clamd);
    let prover = Prover::new(host.settings(&clamd, Some(vec![socket])), NONCE);
    host.install(2);
    assert_live(&prove(&prover, 2).await, Proof::Canary);

    // The number is somebody else's now: the command is sent, over the socket that takes it.
    fs::write(clamd.pid_file(), std::process::id().to_string()).unwrap();
    host.install(3);
    assert_live(&prove(&host.prover(&clamd), 3).await, Proof::Canary);
}

#[tokio::test]
async fn a_clamd_that_forbids_reload_has_the_install_when_it_checks_by_itself() {
    require!(Clamd);
    let host = Host::new();
    let clamd = started(host.clamd().with("SelfCheck", "3"));
    let socket = without_reload(&host, &clamd);
    let prover = Prover::new(host.settings(&clamd, Some(vec![socket])), NONCE);
    host.install(2);
    assert_live(&prove(&prover, 2).await, Proof::Canary);
}

/// A socket before `clamd` that does not let RELOAD through, as clamd 1.5 answers it with
/// `EnableReloadCommand no`.
fn without_reload(host: &Host, clamd: &Clamd) -> Address {
    let path = host.scratch.join("guarded.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let real = clamd.socket();
    thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let _ = guard(client, &real);
        }
    });
    Address::Unix(path)
}

fn guard(mut client: UnixStream, real: &Path) -> io::Result<()> {
    let mut request = vec![0; 4096];
    let length = client.read(&mut request)?;
    if request.starts_with(b"zRELOAD\0") {
        return client.write_all(b"COMMAND UNAVAILABLE\0");
    }
    let mut clamd = UnixStream::connect(real)?;
    clamd.write_all(&request[..length])?;
    io::copy(&mut clamd, &mut client).map(drop)
}

#[tokio::test]
async fn a_clamd_that_blocks_while_it_loads_is_waited_for() {
    require!(Clamd);
    let host = Host::new();
    host.slow_down();
    let clamd = host.clamd().with("ConcurrentDatabaseReload", "no");
    let clamd = started(clamd.with("IdleTimeout", "5"));
    host.install(2);
    assert_live(&prove(&host.prover(&clamd), 2).await, Proof::Canary);
    assert_hits(&clamd, "Clamcast.Install-2", 1);
    assert_eq!(count(&clamd, "Reading databases"), 2, "{}", clamd.log());
}

#[tokio::test]
async fn a_clamd_that_blocks_and_fails_is_a_refusal_if_the_scanner_agrees() {
    require!(Clamd, Clamscan);
    let host = Host::new();
    let clamd = host.clamd().with("ConcurrentDatabaseReload", "no");
    let clamd = started(clamd.with("IdleTimeout", "5"));
    let mut settings = host.settings(&clamd, None);
    settings.scanner = Some(Part::Clamscan.path());
    let prover = Prover::new(settings, NONCE);
    host.install(2);
    Container::refused_by_clamd("bad", 1).write(&host.databases);
    assert_refused(&prove(&prover, 2).await, &["clamscan: ", "bad.cud"]);
}
