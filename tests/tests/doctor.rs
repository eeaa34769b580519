//! `clamcast-agent doctor` on hosts that are as they should be but for one thing, and an agent
//! that has no more rights than its own user.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use clamcast_tests::lab::{
    self, Agent, Clamd, Container, Fleet, Master, PATIENCE, UdpProxy, signatures, until,
};
use clamcast_tests::require;
use serde_json::Value;

/// Users without an entry in the system's list: the agent's, clamd's, and a third one.
const AGENT: u32 = 54_310;
const CLAMD: u32 = 54_311;
const OTHER: u32 = 54_312;

/// A host with a clamd and an agent that are users of their own, and the fleet's master.
struct Host {
    fleet: Fleet,
    master: Master,
    agent: Agent,
    clamd: Clamd,
    mirror: PathBuf,
}

impl Host {
    /// Everything runs, and nothing is installed yet: the mirror is empty.
    fn new() -> Self {
        let fleet = Fleet::new();
        let mirror = fleet.mirror();
        let mut master = fleet.master(&mirror);
        master.start();

        let database = fleet.database("web1");
        // clamd does not start without databases.
        Container::new("daily", 1)
            .member("hsb", signatures(0..10))
            .write(&database);
        let mut clamd = Clamd::new(&database).with_user(CLAMD);
        let agent = fleet.agent_of("web1", &clamd);
        let pki = fleet.pki();
        for directory in [pki.parent().unwrap(), &pki, &pki.join("agents")] {
            set(directory, None, 0o755);
        }
        own_all(&fleet.pki().join("agents/web1"), AGENT);
        own_all(agent.directory(), AGENT);
        set(clamd.config().parent().unwrap(), Some(CLAMD), 0o755);
        clamd.start();
        clamd.wait_ready();
        Self {
            fleet,
            master,
            agent,
            clamd,
            mirror,
        }
    }

    /// The agent as its unit runs it: its own user, no capabilities, none to be gained.
    fn start_agent(&mut self) {
        let process = unprivileged(&self.agent.process(), AGENT);
        self.agent.launch(process);
        self.agent.wait_ready();
        self.master
            .wait_agent("web1", "the agent is connected", |row| {
                row["connected"] == true
            });
    }

    fn doctor(&self, user: u32) -> (Output, Value) {
        let mut doctor = lab::program("clamcast-agent");
        doctor
            .arg("doctor")
            .arg("--config")
            .arg(self.agent.config());
        let output = unprivileged(doctor.arg("--json"), user).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let report = serde_json::from_slice(&output.stdout).expect(&said);
        (output, report)
    }

    /// All findings, and whether nothing is bad.
    fn findings(&self) -> (bool, Vec<Value>) {
        let (output, report) = self.doctor(AGENT);
        let ok = report["ok"] == true;
        assert_eq!(output.status.code(), Some(if ok { 0 } else { 1 }));
        (ok, report["findings"].as_array().unwrap().clone())
    }

    /// Breaks one thing, sees that `doctor` says so and what to do, and mends it.
    #[track_caller]
    fn check(&mut self, broken: impl Fn(&mut Self), mended: impl Fn(&mut Self), expected: &str) {
        broken(self);
        let (ok, findings) = self.findings();
        let (state, rest) = expected.split_once(' ').unwrap();
        let (check, words) = rest.split_once(": ").unwrap();
        let found = findings.iter().find(|f| {
            let text = line(f);
            f["check"] == check
                && f["state"] == state
                && words.split(" | ").all(|w| text.contains(w))
        });
        assert!(found.is_some(), "no {expected} in {findings:#?}");
        assert_eq!(ok, state != "bad", "{findings:#?}");
        mended(self);
    }
}

/// `STATE FOUND -> ADVICE`.
fn line(finding: &Value) -> String {
    let text = |key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    format!("{} {} -> {}", text("state"), text("found"), text("advice"))
}

/// `command` as `uid`, without capabilities and without a way to get any.
fn unprivileged(command: &Command, uid: u32) -> Command {
    let mut process = Command::new("setpriv");
    process
        .args([format!("--reuid={uid}"), format!("--regid={uid}")])
        .args([
            "--clear-groups",
            "--bounding-set=-all",
            "--inh-caps=-all",
            "--no-new-privs",
        ])
        .arg(command.get_program())
        .args(command.get_args());
    for (key, value) in command.get_envs() {
        process.env(key, value.expect("none is removed"));
    }
    if let Some(directory) = command.get_current_dir() {
        process.current_dir(directory);
    }
    process
}

fn set(path: &Path, owner: Option<u32>, mode: u32) {
    chown(path, owner, owner).unwrap();
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn own_all(path: &Path, uid: u32) {
    chown(path, Some(uid), Some(uid)).unwrap();
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            own_all(&entry.unwrap().path(), uid);
        }
    }
}

#[test]
fn an_agent_without_any_capability_brings_clamd_of_another_user_up_to_date() {
    require!(Root, Clamd);
    let mut host = Host::new();
    host.start_agent();
    let daily = Container::new("daily", 7).member("hsb", signatures(0..20));
    daily.write(&host.mirror);
    host.master.wait_live("web1", 1);
    assert!(host.clamd.version().unwrap().contains("/7/"));

    let status = fs::read_to_string(format!("/proc/{}/status", host.agent.pid())).unwrap();
    let field = |name: &str| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap();
        line.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        field("Uid:"),
        [
            AGENT.to_string(),
            AGENT.to_string(),
            AGENT.to_string(),
            AGENT.to_string()
        ]
    );
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    assert_eq!(field("NoNewPrivs:"), ["1"]);
}

#[test]
fn the_doctor_names_what_is_broken_and_what_to_do() {
    require!(Root, Clamd, Clamscan);
    let mut host = Host::new();
    host.start_agent();
    let (ok, findings) = host.findings();
    assert!(ok, "{findings:#?}");

    let database = host.agent.database();
    let hidden = database.join(".clamcast");
    let state = host.agent.directory().join("state");
    let bundle = host.fleet.pki().join("agents/web1");
    let key = bundle.join("key.pem");
    let config = host.clamd.config();
    let log = config.with_file_name("clamd.log");
    let socket = host.clamd.socket();
    let mode = |path: &Path, owner: u32, mode: u32| {
        let path = path.to_owned();
        move |_: &mut Host| set(&path, Some(owner), mode)
    };
    let conf = |from: &str, to: &str| {
        let (path, from, to) = (config.clone(), from.to_owned(), to.to_owned());
        move |_: &mut Host| {
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.contains(&from), "{from} is not in {text}");
            fs::write(&path, text.replace(&from, &to)).unwrap();
        }
    };

    // Rights.
    host.check(
        mode(&database, OTHER, 0o755),
        mode(&database, AGENT, 0o755),
        "bad database: has to belong to 54310 | chown 54310: ",
    );
    host.check(
        mode(&database, AGENT, 0o777),
        mode(&database, AGENT, 0o755),
        "bad clamd-writes: clamd's user 54311 can write | chmod go-w",
    );
    host.check(
        mode(&database, AGENT, 0o700),
        mode(&database, AGENT, 0o755),
        "bad clamd-reads: clamd's user 54311 cannot read | chmod o+x",
    );
    host.check(
        mode(&database.join("daily.cud"), AGENT, 0o600),
        mode(&database.join("daily.cud"), AGENT, 0o644),
        "bad clamd-reads: daily.cud | chmod 644",
    );
    host.check(
        mode(&hidden, AGENT, 0o755),
        mode(&hidden, AGENT, 0o700),
        "bad database: .clamcast | alone | chmod 700",
    );
    host.check(
        mode(&state, AGENT, 0o750),
        mode(&state, AGENT, 0o700),
        "bad state: alone | chmod 700",
    );
    host.check(
        mode(&key, AGENT, 0o644),
        mode(&key, AGENT, 0o600),
        "bad key: alone | chmod 600",
    );

    // clamd.
    host.check(
        mode(&socket, CLAMD, 0o660),
        mode(&socket, CLAMD, 0o666),
        "bad clamd-socket: may not talk to clamd | usermod -aG 54311 54310",
    );
    host.check(
        mode(&socket, CLAMD, 0o600),
        mode(&socket, CLAMD, 0o666),
        "bad clamd-socket: may not talk to clamd | LocalSocketMode 666",
    );
    host.check(
        mode(&log, CLAMD, 0o640),
        mode(&log, CLAMD, 0o644),
        "note clamd-log: cannot read | usermod -aG 54311 54310",
    );
    let here = format!("DatabaseDirectory {}", database.display());
    host.check(
        conf(&here, "DatabaseDirectory /srv/nowhere"),
        conf("DatabaseDirectory /srv/nowhere", &here),
        "bad clamd-database: clamd loads /srv/nowhere | [database] path",
    );
    host.check(
        conf("Foreground yes", "Foreground yes\nOfficialDatabaseOnly yes"),
        conf("\nOfficialDatabaseOnly yes", ""),
        "note proof: weaker | OfficialDatabaseOnly no",
    );
    // In the words of the clamd that is installed here.
    host.check(
        conf("Foreground yes\n", "Foreground yes\nExample\n"),
        conf("Example\n", ""),
        "bad clamd-conf: does not start with | Please edit the example | take the line `Example` out",
    );
    host.check(
        conf("Foreground yes\n", "Foreground yes\nNoSuchOption yes\n"),
        conf("NoSuchOption yes\n", ""),
        "bad clamd-conf: does not start with | Unknown option NoSuchOption | --version",
    );
    host.check(
        conf("Foreground yes\n", "Foreground yes\nScanOnAccess yes\n"),
        conf("ScanOnAccess yes\n", ""),
        "note clamd-conf: Ignoring deprecated option ScanOnAccess",
    );
    let signal = "EnableReloadCommand no\n";
    host.check(
        conf("Foreground yes\n", &format!("Foreground yes\n{signal}")),
        conf(signal, ""),
        "bad reload: takes signals from its own user and root only | reload = \"socket\"",
    );
    let moved = config.with_file_name("moved");
    host.check(
        |_| fs::rename(&config, &moved).unwrap(),
        |_| fs::rename(&moved, &config).unwrap(),
        "bad clamd-conf: does not exist | name this host's clamd.conf",
    );
    host.check(
        |host| host.clamd.stop(),
        |host| host.clamd.restart(),
        "bad clamd-socket: no clamd at | systemctl enable --now clamav-daemon",
    );

    // Databases of others that keep clamd from loading any.
    let foreign = database.join("x.ndb");
    host.check(
        |_| fs::create_dir(&foreign).unwrap(),
        |_| fs::remove_dir(&foreign).unwrap(),
        "bad databases: x.ndb is a directory | remove it",
    );
    for content in ["no signature\n", ""] {
        host.check(
            |_| fs::write(&foreign, content).unwrap(),
            |_| fs::remove_file(&foreign).unwrap(),
            "bad databases: clamd cannot load x.ndb | Malformed database | remove it",
        );
    }
    host.check(
        |_| fs::write(&foreign, "Lab.N:0:*:deadbeef\n").unwrap(),
        |_| fs::remove_file(&foreign).unwrap(),
        "good databases: those of others, too: daily.cud, x.ndb",
    );

    // Another updater: the kernel calls a script by its own name.
    let freshclam = host.fleet.join("freshclam");
    fs::write(&freshclam, "#!/bin/sh\nread line\n").unwrap();
    fs::set_permissions(&freshclam, Permissions::from_mode(0o755)).unwrap();
    let mut process = Command::new(&freshclam)
        .arg(format!("--datadir={}", database.display()))
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    host.check(
        |_| {},
        |_| {},
        "bad updaters: freshclam (pid | as the agent does | systemctl disable --now clamav-freshclam",
    );
    process.kill().unwrap();
    process.wait().unwrap();

    let (ok, findings) = host.findings();
    assert!(ok, "everything is mended: {findings:#?}");
}

#[test]
fn a_file_of_others_that_clamds_user_may_not_read_is_named_and_once_it_may_the_set_is_live() {
    require!(Root, Clamd);
    let mut host = Host::new();
    let soon = "[clamd]\ndeadline = \"5s\"";
    host.agent.configure("[clamd]", soon);
    host.start_agent();
    let publish = |host: &Host, version| {
        let daily = Container::new("daily", version).member("hsb", signatures(0..20 + version));
        daily.write(&host.mirror);
    };
    publish(&host, 7);
    host.master.wait_live("web1", 1);

    let site = host.agent.database().join("site.ndb");
    fs::write(&site, "Site.Own:0:*:6120736974652773206f776e\n").unwrap();
    set(&site, Some(0), 0o600);
    publish(&host, 8);
    let row = host
        .master
        .wait_agent("web1", "host_fault", |row| row["outcome"] == "host_fault");
    let said = row["error"].as_str().unwrap();
    assert!(
        said.contains("site.ndb beside the set is not readable for everybody")
            && said.contains("chmod a+r"),
        "{said}"
    );
    assert!(host.clamd.version().unwrap().contains("/7/"), "it scans on");
    let (ok, findings) = host.findings();
    let lines: Vec<_> = findings.iter().map(line).collect();
    let named = lines.iter().any(|line| {
        line.starts_with("bad clamd's user 54311 cannot read") && line.contains("site.ndb")
    });
    assert!(!ok && named, "{lines:#?}");

    fs::set_permissions(&site, Permissions::from_mode(0o644)).unwrap();
    host.master.wait_live("web1", 2);
    assert!(host.clamd.version().unwrap().contains("/8/"));
    let said = host.clamd.scan(b"a site's own").unwrap();
    assert_eq!(said, "stream: Site.Own.UNOFFICIAL FOUND");
}

#[test]
fn root_looks_as_the_agents_user_does() {
    require!(Root, Clamd);
    let mut host = Host::new();
    host.start_agent();
    let doctor = |user: &str| {
        let mut doctor = lab::program("clamcast-agent");
        doctor
            .arg("doctor")
            .arg("--config")
            .arg(host.agent.config());
        doctor.args(["--user", user]).output().unwrap()
    };
    set(&host.clamd.socket(), Some(CLAMD), 0o600);
    // Whoever owns the state directory is the agent's user; root's own rights would see nothing.
    let output = host.agent.process().get_program().to_owned();
    let output = Command::new(output)
        .args(["doctor", "--json", "--config"])
        .arg(host.agent.config())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("looked at as 54310") && text.contains("may not talk to clamd"),
        "{text}"
    );

    let output = doctor("nobody-of-that-name");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("useradd --system"), "{text}");
}

#[test]
fn what_another_user_sees_is_said_to_hold_for_that_user_only() {
    require!(Root, Clamd);
    let mut host = Host::new();
    host.start_agent();
    let log = host.clamd.config().with_file_name("clamd.log");
    set(&log, Some(CLAMD), 0o600);
    set(host.agent.config(), Some(AGENT), 0o644);
    let (_, report) = host.doctor(AGENT);
    assert_eq!(report["user"], AGENT.to_string());
    assert_eq!(report["agent_user"], AGENT.to_string());
    let (output, report) = host.doctor(OTHER);
    assert_eq!(report["user"], OTHER.to_string());
    assert_eq!(report["agent_user"], AGENT.to_string());
    let findings = report["findings"].as_array().unwrap();
    let lines: Vec<_> = findings.iter().map(line).collect();
    assert!(lines[0].contains("holds for 54312 only"), "{lines:#?}");
    // It may see neither of these, and says nothing bad of the agent for it.
    assert_eq!(output.status.code(), Some(0), "{lines:#?}");
    for check in ["clamd-log", "key", "outcome"] {
        let finding = findings.iter().find(|finding| finding["check"] == check);
        let line = line(finding.unwrap_or_else(|| panic!("no {check} in {lines:#?}")));
        assert!(line.starts_with("unknown 54312 may not look: "), "{line}");
    }
}

#[test]
fn what_came_of_the_newest_generation_is_told_with_what_is_in_its_way() {
    require!(Clamd, Clamscan);
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    let publish = |version| {
        let daily = Container::new("daily", version).member("hsb", signatures(0..10 + version));
        daily.write(&mirror);
    };
    publish(1);
    let mut master = fleet.master(&mirror);
    let (mut agent, mut clamd) = fleet.agent_and_clamd("web1");
    master.start_with(&mut agent, &mut clamd);
    let database = agent.database();
    assert_eq!(said(&agent, "outcome"), "good generation 1.1 is live -> ");

    let foreign = database.join("x.ndb");
    fs::write(&foreign, "no signature\n").unwrap();
    publish(2);
    master.wait_agent("web1", "clamd loads nothing beside that", |row| {
        row["outcome"] == "host_fault"
    });
    let fault = "bad this host could not take generation 1.2: x.ndb is not of this set";
    let in_the_way = "bad clamd cannot load x.ndb, which is not the agent's";
    let check = |agent: &Agent| {
        let lines = said(agent, "outcome");
        assert!(
            lines.starts_with(fault) && lines.contains("force-sync"),
            "{lines}"
        );
        let lines = said(agent, "databases");
        assert!(lines.contains(in_the_way), "{lines}");
    };
    check(&agent);
    assert!(agent.stop().success());
    check(&agent);
    assert_eq!(said(&agent, "copies"), "");
    fs::remove_dir_all(database.join(".clamcast")).unwrap();
    let lines = said(&agent, "copies");
    assert!(
        lines.starts_with("note ") && lines.contains("daily.cud"),
        "{lines}"
    );

    // As it is told to be mended.
    fs::remove_file(&foreign).unwrap();
    agent.start();
    master.wait_agent("web1", "web1 is connected", |row| row["connected"] == true);
    let forced = master.command(&["force-sync", "web1"]);
    assert_eq!(forced.status.code(), Some(0), "{forced:?}");
    assert_eq!(said(&agent, "outcome"), "good generation 1.2 is live -> ");
    assert_eq!(said(&agent, "copies"), "");
    assert!(database.join(".clamcast/current/daily.cud").exists());
}

/// What `doctor` says of `check`, a line each.
fn said(agent: &Agent, check: &str) -> String {
    let mut doctor = lab::program("clamcast-agent");
    let output = doctor
        .args(["doctor", "--json", "--config"])
        .arg(agent.config());
    let output = output.output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).expect("doctor prints JSON");
    let findings = report["findings"].as_array().unwrap().iter();
    let lines = findings.filter(|finding| finding["check"] == check);
    lines.map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_way_to_the_master_is_tried_without_taking_the_agents_place() {
    let fleet = Fleet::new();
    let mirror = fleet.mirror();
    let mut master = fleet.master(&mirror);
    master.start();
    let mut agent = fleet.agent("web1");
    let proxy = UdpProxy::start(([127, 0, 0, 1], fleet.port()).into(), 1);
    let (direct, way) = (
        format!("127.0.0.1:{}", fleet.port()),
        proxy.address().to_string(),
    );
    agent.configure(&direct, &way);

    // No agent has ever run: the master does not get to know of the host.
    let lines = said(&agent, "master");
    assert!(lines.contains("note the agent does not run ->"), "{lines}");
    assert!(
        lines.contains(&format!("good {way} answers over UDP as this fleet")),
        "{lines}"
    );
    assert!(master.agent("web1").is_none());

    // One has: the probe goes as far as the master's first words.
    agent.start();
    master.wait_agent("web1", "web1 is connected", |row| row["connected"] == true);
    agent.stop();
    let lines = said(&agent, "master");
    assert!(lines.contains("note the agent does not run"), "{lines}");
    assert!(
        lines.contains(&format!("good {way} answers over UDP and welcomes")),
        "{lines}"
    );
    assert_eq!(said(&agent, "clock").split(' ').next(), Some("good"));

    // One runs: its connection stays the one that it is.
    agent.start();
    let connected = |agent: &Agent| {
        let status = agent.json(&["status"])?;
        (status["master"]["connected"] == true).then(|| status["master"]["since"].clone())
    };
    let since = until(PATIENCE, "the agent is connected", || connected(&agent));
    let row = master.wait_agent("web1", "web1 is connected", |row| row["connected"] == true);
    let lines = said(&agent, "master");
    assert!(
        lines.contains("good the agent runs and is connected"),
        "{lines}"
    );
    assert!(
        lines.contains(&format!("good {way} answers over UDP as this fleet")),
        "{lines}"
    );
    assert_eq!(said(&agent, "clock").split(' ').next(), Some("good"));
    assert_eq!(connected(&agent), Some(since));
    assert_eq!(master.agent("web1").unwrap()["since"], row["since"]);
    assert!(
        master.audit("rejected").is_empty(),
        "{:?}",
        master.audit("rejected")
    );
    agent.stop();

    // Nothing gets through.
    proxy.cut();
    let lines = said(&agent, "master");
    assert!(
        lines.contains(&format!("bad no answer from {way} over UDP")),
        "{lines}"
    );
    proxy.mend();

    // No such name.
    agent.configure(
        &format!("[\"{way}\"]"),
        &format!("[\"nowhere.invalid:1\", \"{way}\"]"),
    );
    let lines = said(&agent, "master");
    assert!(
        lines.contains("note cannot find the address of nowhere.invalid:1"),
        "{lines}"
    );
    assert!(lines.contains(&format!("good {way} answers")), "{lines}");

    // The master of another fleet.
    let other = Fleet::new();
    let mut stranger = other.master(&mirror);
    stranger.start();
    proxy.retarget(([127, 0, 0, 1], other.port()).into());
    let lines = said(&agent, "master");
    assert!(
        lines.contains("bad what answers at") && lines.contains("not this fleet's master"),
        "{lines}"
    );
    proxy.retarget(([127, 0, 0, 1], fleet.port()).into());

    // Certificates that do not fit together, then one that is revoked.
    let bundle = fleet.pki().join("agents/web1");
    let kept = fs::read(bundle.join("ca.pem")).unwrap();
    fs::copy(other.pki().join("ca.pem"), bundle.join("ca.pem")).unwrap();
    let lines = said(&agent, "certificate");
    assert!(
        lines.contains("cert.pem was not signed by the CA"),
        "{lines}"
    );
    fs::write(bundle.join("ca.pem"), kept).unwrap();
    fleet.certs(&["revoke", "web1"]);
    until(PATIENCE, "the revocation is in force", || {
        let lines = said(&agent, "master");
        if lines.contains("bad the master at") && lines.contains("revocation list") {
            Ok(())
        } else {
            Err(lines)
        }
    });
}

#[test]
fn a_wrong_configuration_is_no_finding() {
    let mut doctor = lab::program("clamcast-agent");
    let output = doctor
        .args(["doctor", "--config", "/nowhere/agent.toml"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty());
}
