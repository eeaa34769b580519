//! The units of the packages: their sandbox, their watchdog, and the names that they share with the code.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use clamcast_agent::config as agent;
use clamcast_daemon::service::Occasion;
use clamcast_master::config as master;
use clamcast_master::serve::Master;
use clamcast_tests::lab::{Fleet, PATIENCE, until};
use clamcast_tests::require;
use tokio::runtime::Builder;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn unit(path: &str) -> String {
    fs::read_to_string(root().join(path)).expect("the unit is in the package's sources")
}

/// The values of a setting, in order.
fn values<'u>(unit: &'u str, setting: &str) -> Vec<&'u str> {
    let lines = unit.lines();
    let values = lines.filter_map(|line| line.strip_prefix(setting)?.strip_prefix('='));
    values.collect()
}

const MASTER: &str = "master/package/systemd/clamcast-master.service";
const AGENT: &str = "agent/package/systemd/clamcast-agent.service";

/// Ten times the highest score of `systemd-analyze security` that a daemon may have.
const THRESHOLD: &str = "--threshold=14";

#[test]
fn the_sandbox_of_both_daemons_scores_at_most_1_4_and_blinds_neither() {
    for path in [MASTER, AGENT] {
        let unit = unit(path);
        assert_eq!(values(&unit, "CapabilityBoundingSet"), [""], "{path}");
        // These hide operators' user ids, other users' processes and the limits of inotify.
        for blinding in ["PrivateUsers", "ProtectProc", "ProcSubset"] {
            assert_eq!(values(&unit, blinding), [""; 0], "{path}: {blinding}");
        }
    }
    require!(SystemdAnalyze);
    for path in [MASTER, AGENT] {
        let analyzed = Command::new("systemd-analyze")
            .args(["security", "--offline=yes", "--no-pager", THRESHOLD])
            .arg(root().join(path))
            .output()
            .expect("it was found");
        let said = [analyzed.stdout, analyzed.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(analyzed.status.success(), "{path}: {said}");
        assert!(!said.contains("ignoring"), "{path}: {said}");
    }
}

#[test]
fn units_and_code_agree_on_programs_sockets_keys_and_state() {
    for (service, program, command, default_socket) in [
        (MASTER, "clamcast-master", "serve", master::DEFAULT_SOCKET),
        (AGENT, "clamcast-agent", "run", agent::DEFAULT_SOCKET),
    ] {
        let text = unit(service);
        let start = format!("/usr/bin/{program} {command}");
        assert_eq!(values(&text, "ExecStart"), [start.as_str()]);
        assert_eq!(values(&text, "User"), [program]);
        assert_eq!(values(&text, "RestartPreventExitStatus"), ["2"]);
        let socket = unit(&service.replace(".service", ".socket"));
        assert_eq!(values(&socket, "ListenStream"), [default_socket]);
        assert_eq!(values(&socket, "SocketGroup"), ["clamcast"]);
        assert_eq!(values(&socket, "SocketMode"), ["0660"]);
        // Without a fallback systemd refuses to start a daemon whose key is elsewhere.
        let name = |value: &str| value.split(':').next().unwrap_or_default().to_owned();
        let names = |setting| {
            values(&text, setting)
                .into_iter()
                .map(name)
                .collect::<Vec<_>>()
        };
        assert_eq!(names("LoadCredential"), names("SetCredential"));
        let keys: &[&str] = match service {
            MASTER => &["tls.key", "signing.manifest_key", "signing.audit_key"],
            _ => &["tls.key"],
        };
        assert_eq!(names("LoadCredential"), keys);
    }
    let socket = unit("master/package/systemd/clamcast-loadtest.socket");
    let beside = Path::new(master::DEFAULT_SOCKET).with_file_name(master::LOAD_TEST_SOCKET);
    assert_eq!(values(&socket, "ListenStream"), [beside.to_str().unwrap()]);
    for (unit_of, script) in [("clamd", "start-clamd"), ("revive", "revive-clamd")] {
        let text = unit(&format!("agent/package/systemd/clamcast-{unit_of}.service"));
        let start = values(&text, "ExecStart")[0];
        assert!(start.starts_with(&format!("/usr/lib/clamcast/{script} ")));
        assert!(root().join("agent/package/libexec").join(script).is_file());
    }
    let path = unit("agent/package/systemd/clamcast-clamd.path");
    let gate = values(&path, "PathExists")[0];
    assert!(gate.ends_with("/clamcast-gate.ign2"), "{gate}");
}

/// Blocks the only worker of a runtime. The hub is one of its tasks, and no task turns meanwhile.
#[test]
fn a_hub_that_gets_no_worker_counts_as_stalled() {
    const LIMIT: Duration = Duration::from_secs(2);
    let fleet = Fleet::new();
    let master = fleet.master(&fleet.mirror());
    let config = master::Config::load(master.config()).unwrap();
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let running = runtime.spawn(async { Master::start(config, &mut None).await.unwrap() });
    let running = runtime.block_on(running).unwrap();
    let pulse = running.pulse();
    runtime.block_on(pulse.begun());
    until(PATIENCE, "the hub turns", || !pulse.is_stalled(LIMIT));
    let (release, released) = mpsc::channel::<()>();
    runtime.spawn(async move { released.recv().is_ok() });
    until(PATIENCE, "the hub is stalled", || pulse.is_stalled(LIMIT));
    drop(release);
    until(PATIENCE, "the hub turns again", || !pulse.is_stalled(LIMIT));
    let said = pulse.status().borrow().clone();
    assert_eq!(
        said,
        "nothing published, 0 of 0 hosts conformant, 0 connected"
    );
    runtime.block_on(running.stop(Occasion::Exit));
}
