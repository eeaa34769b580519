//! The laboratory does what its tests rely on, with real parts.

use std::net::{SocketAddr, UdpSocket};
use std::process::{Command, Output};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{fs, io};

use clamcast_tests::lab::{
    Clamd, Container, Link, Mirror, PATIENCE, Part, Scratch, UdpProxy, hash_signature, signatures,
    until, until_async,
};
use clamcast_tests::{lab, long, require, test_name};

const SAMPLE: &[u8] = b"a sample that only one signature knows";

#[test]
fn freshclam_walks_the_chain_and_clamd_loads_what_it_made() {
    require!(Clamd, Freshclam, Sigtool, TestFiles);
    let mirror = Mirror::new();
    let mut clamd = Clamd::new(mirror.directory());
    clamd.start();
    clamd.wait_ready();
    for version in 2..=6 {
        let database = mirror.freshclam_to(version);
        assert!(!mirror.directory().join("test.cvd").exists());
        let info = Command::new(Part::Sigtool.path())
            .arg("--info")
            .arg(&database)
            .output();
        let info = String::from_utf8_lossy(&info.expect("sigtool was found").stdout).into_owned();
        assert!(info.contains(&format!("Version: {version}\n")), "{info}");
        assert!(info.contains("Verification OK"), "{info}");
    }
    let requests = mirror.requests();
    assert_eq!(
        requests[..2],
        ["GET /test.cvd bytes=0-511", "GET /test-2.cdiff"]
    );

    fs::write(
        mirror.directory().join("canary.hsb"),
        hash_signature(SAMPLE, "Lab.Canary"),
    )
    .expect("the mirror can be written");
    assert_eq!(clamd.scan(SAMPLE).expect("it answers"), "stream: OK");
    assert_eq!(clamd.reload().expect("it answers"), "RELOADING");
    until(PATIENCE, "the canary to be found", || found(&clamd, SAMPLE));
}

#[test]
fn freshclam_catches_up_over_several_versions_at_once() {
    require!(Freshclam, TestFiles);
    let mirror = Mirror::new();
    mirror.freshclam_to(4);
    mirror.freshclam_to(6);
    assert_eq!(
        mirror
            .requests()
            .iter()
            .filter(|line| line.contains(".cdiff"))
            .count(),
        5
    );
}

#[test]
fn clamd_loads_a_container_and_tells_the_version_of_a_daily_one() {
    require!(Clamd);
    let scratch = Scratch::new();
    let canary = hash_signature(SAMPLE, "Lab.Member");
    let daily = |version| Container::new("daily", version).member("hsb", canary.clone());
    daily(41).write(scratch.path());
    let mut clamd = Clamd::new(scratch.path());
    clamd.start();
    clamd.wait_ready();
    assert_eq!(
        clamd.scan(SAMPLE).expect("it answers"),
        "stream: Lab.Member.UNOFFICIAL FOUND"
    );
    assert!(clamd.version().expect("it answers").contains("/41/"));

    daily(42).write(scratch.path());
    clamd.reload().expect("it answers");
    until(PATIENCE, "version 42", || {
        let version = clamd.version().map_err(|error| error.to_string())?;
        if version.contains("/42/") {
            Ok(())
        } else {
            Err(version)
        }
    });
}

#[test]
fn clamd_refuses_a_bad_container_and_keeps_its_engine() {
    require!(Clamd);
    let scratch = Scratch::new();
    let good = Container::new("lab", 1).member("hsb", hash_signature(SAMPLE, "Lab.Good"));
    good.write(scratch.path());
    let mut clamd = Clamd::new(scratch.path());
    clamd.start();
    clamd.wait_ready();

    Container::refused_by_clamd("lab", 2).write(scratch.path());
    clamd.reload().expect("it answers");
    until(PATIENCE, "the failure in the log", || {
        let log = clamd.log();
        if log.contains("Database reload failed") {
            Ok(())
        } else {
            Err(log)
        }
    });
    assert!(
        clamd.stderr().contains("LibClamAV Error"),
        "{}",
        clamd.stderr()
    );
    assert_eq!(
        clamd.scan(SAMPLE).expect("it answers"),
        "stream: Lab.Good.UNOFFICIAL FOUND"
    );

    clamd.stop();
    clamd.start();
    assert!(
        !clamd.wait_ended().success(),
        "a clamd does not start with a bad database"
    );

    good.write(scratch.path());
    clamd.start();
    clamd.wait_ready();
}

#[test]
fn clamscan_and_sigtool_accept_a_container() {
    require!(Clamscan, Sigtool);
    let scratch = Scratch::new();
    let member = signatures(0..500) + &hash_signature(SAMPLE, "Lab.One");
    let path = Container::new("lab", 7)
        .member("hsb", member)
        .write(scratch.path());
    let sample = scratch.join("sample");
    fs::write(&sample, SAMPLE).expect("a scratch file can be written");

    let scan = Command::new(Part::Clamscan.path())
        .arg("-d")
        .arg(&path)
        .arg(&sample)
        .output();
    let scan = String::from_utf8_lossy(&scan.expect("clamscan was found").stdout).into_owned();
    assert!(scan.contains("Lab.One.UNOFFICIAL FOUND"), "{scan}");
    assert!(scan.contains("Known viruses: 501\n"), "{scan}");

    let info = Command::new(Part::Sigtool.path())
        .arg("--info")
        .arg(&path)
        .output();
    let info = String::from_utf8_lossy(&info.expect("sigtool was found").stdout).into_owned();
    assert!(
        info.contains("Version: 7\n") && info.contains("Signatures: 501\n"),
        "{info}"
    );
}

#[test]
fn a_killed_clamd_leaves_its_socket_and_a_stopped_one_does_not() {
    require!(Clamd);
    let scratch = Scratch::new();
    fs::write(scratch.join("lab.hsb"), signatures(0..10)).expect("a scratch file can be written");
    let other = Scratch::new();
    let mut pair = Clamd::several([scratch.path(), other.path()]);
    let clamd = &mut pair[0];
    clamd.start();
    clamd.wait_ready();
    clamd.kill();
    assert!(clamd.socket().exists() && clamd.ping().is_err());

    clamd.start();
    clamd.wait_ready();
    clamd.stop();
    assert!(!clamd.socket().exists() && !clamd.is_running());

    let empty = &mut pair[1];
    empty.start();
    assert!(
        !empty.wait_ended().success(),
        "a clamd does not start without a database"
    );
}

#[test]
fn a_setting_takes_the_place_of_the_one_before() {
    require!(Clamd);
    let scratch = Scratch::new();
    let clamd = Clamd::new(scratch.path())
        .with("SelfCheck", "5")
        .with("VirusEvent", "/bin/true");
    let config = fs::read_to_string(clamd.config()).expect("it was written");
    assert!(
        config.contains("SelfCheck 5\n") && !config.contains("SelfCheck 0\n"),
        "{config}"
    );
    assert!(config.contains("VirusEvent /bin/true\n"), "{config}");
}

#[test]
fn the_corpus_makes_databases_that_clamd_loads() {
    require!(Clamd, Corpus);
    let scratch = Scratch::new();
    lab::make_corpus(scratch.path(), 0.002, 2);
    let mut clamd = Clamd::new(scratch.join("0002"));
    clamd.start();
    clamd.wait_ready();
}

#[test]
fn librsync_and_rsync_are_here() {
    require!(Rdiff, Rsync);
    for part in [Part::Rdiff, Part::Rsync] {
        let answer = Command::new(part.path()).arg("--version").output();
        assert!(answer.expect("it was found").status.success(), "{part:?}");
    }
}

#[test]
fn the_proxy_passes_both_ways_and_counts() {
    let (client, _server, proxy) = echo(1);
    for _ in 0..10 {
        client.send(&[7; 100]).expect("loopback");
        assert_eq!(client.recv(&mut [0; 200]).expect("the echo"), 100);
    }
    let counts = proxy.counts();
    assert_eq!(
        (counts.sent_bytes, counts.received_bytes, counts.lost),
        (1000, 1000, 0)
    );
}

#[test]
fn the_proxy_loses_what_its_seed_says() {
    let lost = |seed| {
        let (client, _server, proxy) = echo(seed);
        proxy.set(Link {
            loss: 0.5,
            ..Link::default()
        });
        // One at a time, so that every datagram meets the dice in the same order.
        for sent in 1..=50 {
            client.send(&[0; 10]).expect("loopback");
            until(PATIENCE, "its fate", || {
                let counts = proxy.counts();
                counts.received_bytes / 10 + counts.lost == sent
            });
        }
        proxy.counts().lost
    };
    let first = lost(1);
    assert!((10..50).contains(&first), "{first} of 50 lost");
    assert_eq!(first, lost(1));
}

#[test]
fn a_cut_proxy_passes_nothing_until_it_is_mended() {
    let (client, _server, proxy) = echo(1);
    proxy.cut();
    client.send(b"lost").expect("loopback");
    until(PATIENCE, "the loss", || proxy.counts().lost == 1);
    proxy.mend();
    client.send(b"through").expect("loopback");
    assert_eq!(client.recv(&mut [0; 200]).expect("the echo"), 7);
}

#[test]
fn a_slow_proxy_delays_and_drops_what_its_queue_cannot_hold() {
    let (client, _server, proxy) = echo(1);
    let delay = Duration::from_millis(40);
    proxy.set(Link {
        delay,
        bandwidth: Some(100_000),
        ..Link::default()
    });
    let sent = Instant::now();
    client.send(&[0; 1000]).expect("loopback");
    client.recv(&mut [0; 2000]).expect("the echo");
    // A lower bound, which holds on the slowest machine.
    assert!(2 * delay <= sent.elapsed(), "both ways are delayed");

    // 10 ms each, against 200 ms of queue.
    for _ in 0..100 {
        client.send(&[0; 1000]).expect("loopback");
    }
    until(PATIENCE, "a full queue", || proxy.counts().lost > 0);
}

#[test]
fn a_proxy_follows_its_target() {
    let (client, server, proxy) = echo(1);
    drop(server);
    let other = Echo::start();
    proxy.retarget(other.address);
    client.send(b"there you are").expect("loopback");
    assert_eq!(client.recv(&mut [0; 200]).expect("the echo"), 13);
}

#[test]
#[should_panic(expected = "not within 50ms: the impossible; last: \"still false\"")]
fn waiting_ends_with_the_last_state() {
    until(Duration::from_millis(50), "the impossible", || {
        Err::<(), _>("still false")
    });
}

#[tokio::test]
#[should_panic(expected = "not within 50ms: an answer; last: the condition did not return")]
async fn waiting_ends_even_if_the_condition_does_not() {
    until_async(
        Duration::from_millis(50),
        "an answer",
        std::future::pending::<bool>,
    )
    .await;
}

#[tokio::test]
async fn waiting_returns_what_became_known() {
    let mut left = 3;
    let value = until_async(PATIENCE, "the third look", async || {
        left -= 1;
        (left == 0).then_some("here")
    });
    assert_eq!(value.await, "here");
}

#[test]
fn a_scratch_directory_goes_with_its_test_unless_it_fails() {
    let scratch = Scratch::new();
    let path = scratch.directory("inner");
    drop(scratch);
    assert!(!path.exists());

    let kept = Scratch::new();
    let path = kept.path().to_owned();
    let failed = std::thread::spawn(move || {
        let _kept = kept;
        panic!("as a failing test does");
    });
    assert!(failed.join().is_err() && path.exists());
    fs::remove_dir(path).expect("it is empty");
}

#[tokio::test]
async fn a_test_knows_its_name() {
    assert_eq!(test_name!(), "lab::a_test_knows_its_name");
}

#[test]
fn clamscan_loads_every_step_of_a_corpus() {
    long!();
    require!(Clamscan, Corpus);
    let scratch = Scratch::new();
    let steps = 8;
    lab::make_corpus(scratch.path(), 0.05, steps);
    for step in 1..=steps {
        let databases = scratch.join(format!("{step:04}"));
        let sample = scratch.join("steps.tsv");
        let scan = Command::new(Part::Clamscan.path())
            .arg("-d")
            .arg(databases)
            .arg(sample)
            .output();
        let scan = scan.expect("clamscan was found");
        let said = String::from_utf8_lossy(&scan.stdout);
        assert!(
            scan.status.success() && said.contains("steps.tsv: OK"),
            "step {step}: {said}"
        );
    }
}

#[test]
fn a_missing_part_is_a_noted_skip_and_with_ci_a_failure() {
    let test = "librsync_and_rsync_are_here";
    let bare = |ci, note: &str| {
        let scratch = Scratch::new();
        let ran = again(test, &scratch, &[("PATH", ""), ("CI", ci)]);
        (ran, fs::read_to_string(scratch.join(note)).ok())
    };
    let note = "not-run/skipped/lab::librsync_and_rsync_are_here";
    let (skipped, noted) = bare("", note);
    assert!(skipped.status.success());
    let said = String::from_utf8_lossy(&skipped.stderr);
    assert!(said.contains("SKIPPED: no rdiff on this machine"), "{said}");
    assert!(
        noted
            .expect("it is noted")
            .contains("no rsync on this machine")
    );

    let (failed, noted) = bare("true", note);
    assert!(!failed.status.success());
    let said = String::from_utf8_lossy(&failed.stderr);
    assert!(said.contains("no rdiff on this machine"), "{said}");
    assert_eq!(noted, None);
}

#[test]
fn a_long_test_that_was_not_asked_for_is_noted() {
    let scratch = Scratch::new();
    let ran = again(
        "clamscan_loads_every_step_of_a_corpus",
        &scratch,
        &[("CLAMCAST_LONG", "0")],
    );
    assert!(ran.status.success());
    assert!(
        scratch
            .join("not-run/long/lab::clamscan_loads_every_step_of_a_corpus")
            .exists()
    );
}

/// Runs one of these tests in a process of its own, with `target` as its target directory.
fn again(test: &str, target: &Scratch, environment: &[(&str, &str)]) -> Output {
    let ourselves = std::env::current_exe().expect("a process knows its program");
    Command::new(ourselves)
        .args(["--exact", test, "--nocapture"])
        .env("CARGO_TARGET_DIR", target.path())
        .envs(environment.iter().copied())
        .output()
        .expect("it just ran")
}

/// Whether clamd finds something in `sample`; if not, what it says.
fn found(clamd: &Clamd, sample: &[u8]) -> Result<(), String> {
    match clamd.scan(sample) {
        Ok(answer) if answer.ends_with(" FOUND") => Ok(()),
        Ok(answer) => Err(answer),
        Err(error) => Err(error.to_string()),
    }
}

/// A client whose datagrams come back to it through a proxy.
fn echo(seed: u64) -> (UdpSocket, Echo, UdpProxy) {
    let server = Echo::start();
    let proxy = UdpProxy::start(server.address, seed);
    let client = UdpSocket::bind("127.0.0.1:0").expect("loopback has a free port");
    client
        .set_read_timeout(Some(PATIENCE))
        .expect("a UDP socket");
    client.connect(proxy.address()).expect("a UDP socket");
    (client, server, proxy)
}

/// Sends everything back to where it came from.
struct Echo {
    address: SocketAddr,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Echo {
    fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("loopback has a free port");
        let address = socket.local_addr().expect("a bound socket has an address");
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 2000];
            // An empty datagram ends it.
            while let (length @ 1.., from) = socket.recv_from(&mut buffer)? {
                socket.send_to(&buffer[..length], from)?;
            }
            Ok(())
        });
        Self {
            address,
            thread: Some(thread),
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let told =
            UdpSocket::bind("127.0.0.1:0").and_then(|socket| socket.send_to(&[], self.address));
        if let (Ok(_), Some(thread)) = (told, self.thread.take()) {
            let _ = thread.join();
        }
    }
}
