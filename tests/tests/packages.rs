//! Packages on real systems: apt installs them in booted Debian trees, and the real units run them.
//!
//! These tests need root, systemd-nspawn and the packages of `cargo xtask dist`. The scriptlets of
//! the RPM packages and SELinux are not tested: they would take a tree of the Red Hat family.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use std::{env, fs};

use clamcast_tests::lab::{
    PATIENCE, Part, Scratch, Tree, freeze, package, succeeded, threads, until,
};
use clamcast_tests::{long, require};
use serde_json::Value;

#[test]
fn bookworm_fleet_is_live_again_after_both_hosts_reboot() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    fleet_is_live_again_after_both_hosts_reboot(Part::Bookworm);
}

#[test]
fn trixie_fleet_is_live_again_after_both_hosts_reboot() {
    long!();
    require!(Nspawn, Trixie, Packages, TestFiles);
    fleet_is_live_again_after_both_hosts_reboot(Part::Trixie);
}

fn fleet_is_live_again_after_both_hosts_reboot(release: Part) {
    let fleet = Fleet::install(release);
    fleet.web1.reboot();
    fleet.mirror.reboot();
    for (host, tree) in [("mirror", &fleet.mirror), ("web1", &fleet.web1)] {
        fleet.wait_live(host, 1);
        assert_eq!(tree.show("clamav-daemon", "ActiveState"), "active");
        assert_eq!(tree.show("clamcast-agent", "NRestarts"), "0");
    }
    // Debian 13 gives the database directory to user clamav at each boot.
    fleet.publish(2);
    for host in ["mirror", "web1"] {
        fleet.wait_live(host, 2);
    }
}

#[test]
fn agent_is_ready_before_clamd_starts_at_boot() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    let fleet = Fleet::install(Part::Bookworm);
    fleet.web1.reboot();
    fleet.wait_live("web1", 1);
    let time = |unit, property| -> u64 {
        let shown = fleet.web1.show(unit, property);
        shown.parse().expect("a time in microseconds")
    };
    let ready = time("clamcast-agent", "ActiveEnterTimestampMonotonic");
    let clamd = time("clamav-daemon", "ExecMainStartTimestampMonotonic");
    assert!(
        0 < ready && ready <= clamd,
        "agent ready at {ready}, clamd started at {clamd}"
    );
}

#[test]
fn bookworm_first_databases_start_clamd_and_a_clamd_that_an_operator_stopped_stays_stopped() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    first_databases_start_clamd_and_a_clamd_that_an_operator_stopped_stays_stopped(Part::Bookworm);
}

#[test]
fn trixie_first_databases_start_clamd_and_a_clamd_that_an_operator_stopped_stays_stopped() {
    long!();
    require!(Nspawn, Trixie, Packages, TestFiles);
    first_databases_start_clamd_and_a_clamd_that_an_operator_stopped_stays_stopped(Part::Trixie);
}

fn first_databases_start_clamd_and_a_clamd_that_an_operator_stopped_stays_stopped(release: Part) {
    let fleet = Fleet::prepare(release);
    let web1 = &fleet.web1;
    assert_eq!(
        web1.show("clamav-daemon", "ConditionResult"),
        "no",
        "Debian skips it at boot"
    );
    fleet.start();
    assert_eq!(web1.show("clamav-daemon", "ActiveState"), "active");
    // The administrator enabled and started the agent alone.
    assert_eq!(web1.show("clamcast-clamd.path", "ActiveState"), "active");
    assert_eq!(web1.show("clamcast-clamd.path", "UnitFileState"), "enabled");

    web1.run("systemctl stop clamav-daemon.socket clamav-daemon.service");
    fleet.publish(2);
    fleet.wait_agent("web1", "web1 has version 2 without a clamd", |row| {
        row["generation"] == 2 && row["live"] == false
    });
    web1.run("systemctl restart clamcast-agent");
    fleet.wait_agent("web1", "web1 is back", |row| row["connected"] == true);
    web1.wait_shown("clamcast-agent", "ActiveState", "active");
    assert_eq!(web1.show("clamav-daemon", "ActiveState"), "inactive");

    web1.run("systemctl start clamav-daemon");
    fleet.wait_live("web1", 2);
}

#[test]
fn reviver_starts_a_killed_clamd_and_no_stopped_one() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    let fleet = Fleet::install(Part::Bookworm);
    let web1 = &fleet.web1;
    // The agent asks clamd, and Debian's clamav-daemon.socket would start clamd for it.
    web1.run("systemctl stop clamcast-agent; systemctl kill --signal KILL clamav-daemon");
    web1.wait_shown("clamav-daemon", "ActiveState", "failed");
    web1.run("systemctl start clamcast-revive");
    web1.wait_shown("clamav-daemon", "ActiveState", "active");

    web1.run("systemctl stop clamav-daemon.socket clamav-daemon.service");
    web1.run("systemctl start clamcast-revive");
    assert_eq!(web1.show("clamav-daemon", "ActiveState"), "inactive");
}

#[test]
fn agent_under_its_unit_names_a_running_freshclam_as_the_other_updater() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    let fleet = Fleet::install(Part::Bookworm);
    let web1 = &fleet.web1;
    // It ends where it cannot write. Without a network, it tries again in two hours.
    web1.run(
        "chmod 775 /var/lib/clamav
         systemd-run --unit updater --uid clamav freshclam --daemon --foreground",
    );
    let named = format!(
        "freshclam (pid {}, user clamav)",
        web1.show("updater", "MainPID")
    );
    web1.run(&as_user(
        "clamav",
        "sh -c 'cd /var/lib/clamav && cp main.cvd new && mv -f new daily.cvd'",
    ));
    fleet.wait_agent("web1", "the master knows who did it", |row| {
        row["error"].to_string().contains(&named)
    });
    let audited = fleet
        .mirror
        .run("clamcast-master audit show --event drift --json");
    assert!(audited.contains(&named), "{audited}");
    let status = web1.run("clamcast-agent status --json");
    let status: Value = serde_json::from_str(&status).expect("it is JSON");
    assert_eq!(status["drift"]["updater"], named, "{status}");
    let journal = web1.journal("clamcast-agent");
    assert!(
        journal.iter().any(|entry| {
            let message = entry["MESSAGE"].as_str().unwrap_or_default();
            message.contains("somebody else is at work") && message.contains(&named)
        }),
        "{journal:?}"
    );
}

#[test]
fn agent_under_its_unit_reads_which_limit_of_inotify_is_used_up() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    let fleet = Fleet::boot(Part::Bookworm);
    let web1 = &fleet.web1;
    // The limit is that of a user id, on whatever system of this machine. The package takes a user
    // that is there.
    web1.run("useradd --system --uid 64014 --user-group clamcast-agent");
    fleet.set_up();
    fleet.start();
    let limit = web1.run("cat /proc/sys/fs/inotify/max_user_instances");
    let limit = limit.trim();
    web1.write(
        "/opt/instances.py",
        "import ctypes, os, time
init = ctypes.CDLL(None).inotify_init
os.setuid(64014)
while 0 <= init():
    while 0 <= init():
        pass
    # This process may have no more descriptors. A child holds none.
    if os.fork():
        time.sleep(3600)
    os.closerange(3, os.sysconf('SC_OPEN_MAX'))
os.mkdir('/tmp/instances')
time.sleep(3600)
",
    );
    web1.run("systemctl stop clamcast-agent; systemd-run python3 /opt/instances.py");
    until(PATIENCE, "all instances are in use", || {
        web1.path("/tmp/instances").exists()
    });
    web1.run("systemctl start clamcast-agent");
    fleet.wait_live("web1", 1);
    let status = web1.run("clamcast-agent status --json");
    let status: Value = serde_json::from_str(&status).expect("it is JSON");
    let why = status["drift"]["blind"]["why"].to_string();
    let used_up = format!("fs.inotify.max_user_instances ({limit}) are used up");
    assert!(why.contains(&used_up), "{status}");
}

#[test]
fn killed_daemons_restart_and_the_fleet_is_live_again() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    let fleet = Fleet::install(Part::Bookworm);
    for (tree, unit) in [
        (&fleet.mirror, "clamcast-master"),
        (&fleet.web1, "clamcast-agent"),
    ] {
        tree.run(&format!("systemctl kill --signal KILL {unit}"));
        tree.wait_shown(unit, "NRestarts", "1");
        tree.wait_shown(unit, "ActiveState", "active");
    }
    fleet.publish(2);
    fleet.wait_live("web1", 2);
}

#[test]
fn stopped_daemons_are_restarted_by_the_watchdog() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    let fleet = Fleet::install(Part::Bookworm);
    for (tree, unit) in [
        (&fleet.mirror, "clamcast-master"),
        (&fleet.web1, "clamcast-agent"),
    ] {
        assert_eq!(tree.show(unit, "WatchdogUSec"), "1min", "{unit}");
        shorten_watchdog(tree, unit);
        tree.run(&format!("systemctl kill --signal STOP {unit}"));
        wait_watchdog(tree, unit);
    }
    fleet.publish(2);
    fleet.wait_live("web1", 2);
}

#[test]
fn agent_whose_main_loop_alone_is_stalled_is_restarted_by_the_watchdog() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    let fleet = Fleet::install(Part::Bookworm);
    let unit = "clamcast-agent";
    shorten_watchdog(&fleet.web1, unit);
    fleet.wait_live("web1", 1);
    let threads = threads(fleet.web1.process(unit), "keeper");
    let [main_loop] = threads[..] else {
        panic!("one thread has the main loop: {threads:?}");
    };
    freeze(main_loop);
    // The thread that feeds the watchdog says so.
    until(PATIENCE, "the process sees the stall", || {
        let journal = fleet.web1.journal(unit);
        journal.iter().any(|entry| {
            let message = entry["MESSAGE"].as_str().unwrap_or_default();
            message.contains("main loop is stalled")
        })
    });
    wait_watchdog(&fleet.web1, unit);
    fleet.publish(2);
    fleet.wait_live("web1", 2);
}

#[test]
fn disks_that_reject_writes_make_the_watchdog_restart_no_daemon() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    let fleet = Fleet::prepare(Part::Bookworm);
    let daemons = [
        (&fleet.mirror, "clamcast-master", "/var/lib/clamcast/master"),
        (&fleet.web1, "clamcast-agent", "/var/lib/clamcast/agent"),
    ];
    for (tree, unit, state) in daemons {
        tree.run(&format!(
            "mount -t tmpfs -o size=64m,mode=700,uid=$(id -u {unit}),gid=$(id -g {unit}) \
             {unit} {state}"
        ));
    }
    fleet.start();
    let before = daemons.map(|(tree, unit, state)| {
        shorten_watchdog(tree, unit);
        fleet.wait_live("web1", 1);
        // It takes the master's reserve for operators' lines as soon as the master releases it.
        tree.run(&format!(
            "systemd-run --unit filler sh -c \
                 'while :; do cat /dev/zero >>{state}/filler; sleep 0.1; done' 2>&1"
        ));
        tree.show(unit, "MainPID")
    });
    // The master cannot keep a generation, nor the agent what it does about a changed file.
    fleet.publish(2);
    fleet
        .web1
        .run("cp /var/lib/clamav/main.cvd /var/lib/clamav/daily.cvd");
    for (tree, unit, _) in daemons {
        until(PATIENCE, &format!("{unit} meets the full disk"), || {
            let journal = tree.run(&format!("journalctl --boot --unit {unit}"));
            let met = journal.contains("No space left on device");
            if met { Ok(()) } else { Err(journal) }
        });
    }
    let full = Instant::now();
    until(PATIENCE, "the watchdog had time to act", || {
        3 * WATCHDOG < full.elapsed()
    });
    for ((tree, unit, state), pid) in daemons.into_iter().zip(before) {
        assert_eq!(tree.show(unit, "NRestarts"), "0", "{unit}");
        assert_eq!(tree.show(unit, "MainPID"), pid, "{unit}");
        tree.run(&format!("systemctl stop filler; rm {state}/filler"));
    }
    fleet.wait_live("web1", 2);
}

/// In place of the minute that the units give the daemons. A loop turns every two seconds.
const WATCHDOG: Duration = Duration::from_secs(8);

/// Restarts a daemon with [`WATCHDOG`].
fn shorten_watchdog(tree: &Tree, unit: &str) {
    tree.run(&format!(
        "mkdir -p /run/systemd/system/{unit}.service.d
         printf '[Service]\nWatchdogSec={}\n' \
             >/run/systemd/system/{unit}.service.d/test.conf
         systemctl daemon-reload
         systemctl restart {unit}",
        WATCHDOG.as_secs()
    ));
}

/// Waits until systemd has restarted a daemon because of its watchdog.
fn wait_watchdog(tree: &Tree, unit: &str) {
    tree.wait_shown(unit, "NRestarts", "1");
    tree.wait_shown(unit, "ActiveState", "active");
    let journal = tree.run(&format!("journalctl --boot --unit {unit}"));
    assert!(journal.contains("Watchdog timeout"), "{journal}");
}

#[test]
fn packages_make_directories_and_users_and_enable_and_start_nothing() {
    long!();
    require!(Nspawn, Bookworm, Packages);
    let [host] = Tree::boot(Part::Bookworm, ["mirror"]);
    install(&host, &packages(), &["master", "agent", "certs"]);
    let directories = "stat --format '%n %U:%G %a' /etc/clamcast /run/clamcast \
                           /var/lib/clamcast /var/lib/clamcast/agent /var/lib/clamcast/master";
    let wanted = "/etc/clamcast root:root 755
/run/clamcast root:root 755
/var/lib/clamcast root:root 755
/var/lib/clamcast/agent clamcast-agent:clamcast-agent 700
/var/lib/clamcast/master clamcast-master:clamcast-master 700
";
    assert_eq!(host.run(directories), wanted);
    assert_eq!(
        host.run("systemctl list-units --all --plain --no-legend 'clamcast*'"),
        ""
    );
    let enabled = host.run("find /etc/systemd -name '*clamcast*'");
    assert_eq!(enabled, "");
    // tmpfiles.d makes what dpkg and the scriptlets of a first installation do not.
    for package in ["agent", "master"] {
        host.run("rmdir /etc/clamcast");
        host.run(&format!(
            "systemd-tmpfiles --create clamcast-{package}.conf; test -d /etc/clamcast"
        ));
    }
    host.run("rmdir /etc/clamcast /var/lib/clamcast/* /var/lib/clamcast");
    host.reboot();
    assert_eq!(host.run(directories), wanted);
}

#[test]
fn configuration_error_ends_a_daemon_for_good() {
    long!();
    require!(Nspawn, Bookworm, Packages);
    let [host] = Tree::boot(Part::Bookworm, ["mirror"]);
    install(&host, &packages(), &["master", "agent"]);
    for (unit, config) in [
        ("clamcast-master", "master.toml"),
        ("clamcast-agent", "agent.toml"),
    ] {
        host.write(&format!("/etc/clamcast/{config}"), "no_such_key = 1\n");
        let started = host.attempt(&format!("systemctl start {unit}"));
        assert!(
            !started.expect("the system runs").status.success(),
            "{unit} started"
        );
        host.wait_shown(unit, "ActiveState", "failed");
        assert_eq!(host.show(unit, "ExecMainStatus"), "2", "{unit}");
        assert_eq!(host.show(unit, "NRestarts"), "0", "{unit}");
        let journal = host.run(&format!("journalctl --boot --unit {unit}"));
        assert!(journal.contains("no_such_key"), "{journal}");
        // A command does not start what cannot start.
        let asked = host.attempt(&format!("{unit} status"));
        assert_eq!(
            asked.expect("the system runs").status.code(),
            Some(3),
            "{unit}"
        );
        assert_eq!(host.show(unit, "ActiveState"), "failed", "{unit}");
    }
}

#[test]
fn bookworm_sockets_obey_root_and_operators_and_refuse_nobody() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    sockets_obey_root_and_operators_and_refuse_nobody(Part::Bookworm);
}

#[test]
fn trixie_sockets_obey_root_and_operators_and_refuse_nobody() {
    long!();
    require!(Nspawn, Trixie, Packages, TestFiles);
    sockets_obey_root_and_operators_and_refuse_nobody(Part::Trixie);
}

fn sockets_obey_root_and_operators_and_refuse_nobody(release: Part) {
    let fleet = Fleet::install(release);
    let mirror = &fleet.mirror;
    let modes = mirror.run(
        "cd /run/clamcast; stat --format '%n %U:%G %a' . agent.sock loadtest.sock master.sock",
    );
    assert_eq!(
        modes.lines().collect::<Vec<_>>(),
        [
            ". root:root 755",
            "agent.sock root:clamcast 660",
            "loadtest.sock clamcast-master:clamcast-master 600",
            "master.sock root:clamcast 660",
        ]
    );
    assert_eq!(
        mirror.run("getent group clamcast | cut -d: -f4").trim(),
        "",
        "no daemon is a member"
    );

    mirror.run("useradd --create-home --groups clamcast olga");
    for user in ["nobody", "clamcast-agent", "clamcast-master", "olga"] {
        for program in ["clamcast-master", "clamcast-agent"] {
            let asked = mirror.attempt(&as_user(user, &format!("{program} status --json")));
            let code = asked.expect("the system runs").status.code();
            let wanted = if user == "olga" { 0 } else { 4 };
            assert_eq!(code, Some(wanted), "{program} status as {user}");
        }
    }

    // A compromised agent reads nothing of the master, and the other way round.
    for (user, files) in [
        (
            "clamcast-agent",
            "/etc/clamcast/manifest.key /etc/clamcast/master/key.pem /var/lib/clamcast/master",
        ),
        (
            "clamcast-master",
            "/etc/clamcast/key.pem /var/lib/clamcast/agent",
        ),
    ] {
        for file in files.split(' ') {
            mirror.run(&format!("test -e {file}"));
            let may = mirror.attempt(&as_user(user, &format!("test -r {file}")));
            assert!(
                !may.expect("the system runs").status.success(),
                "{user} may read {file}"
            );
        }
    }
}

#[test]
fn operator_is_audited_with_user_id_name_and_login_user_id() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    let fleet = Fleet::install(Part::Bookworm);
    // Bob logs in and becomes Olga, as su(1) does it.
    fleet
        .mirror
        .run("useradd --uid 1500 --groups clamcast olga; useradd --uid 1501 bob");
    fleet.mirror.run(&format!(
        "echo 1501 >/proc/self/loginuid; {}",
        as_user("olga", "clamcast-master force-sync web1")
    ));
    let record = fleet
        .mirror
        .run("clamcast-master audit show --event force-sync --json");
    let record: Value = serde_json::from_str(record.trim()).expect("one record");
    assert_eq!(record["actor"], "operator:1500/olga", "{record}");
    assert!(record["detail"].to_string().contains("1501"), "{record}");
}

#[test]
fn systemd_shows_what_a_daemon_does_and_journald_has_the_fields_of_its_log() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    let fleet = Fleet::install(Part::Bookworm);
    for (tree, unit) in [
        (&fleet.mirror, "clamcast-master"),
        (&fleet.web1, "clamcast-agent"),
    ] {
        until(PATIENCE, &format!("StatusText of {unit}"), || {
            let text = tree.show(unit, "StatusText");
            if text.contains("1.1") {
                Ok(())
            } else {
                Err(text)
            }
        });
        let journal = tree.journal(unit);
        let own = journal.iter().filter(|entry| entry["_COMM"] == unit);
        assert!(0 < own.clone().count(), "{unit} logs");
        for entry in own {
            assert_eq!(entry["_SYSTEMD_UNIT"], format!("{unit}.service"), "{entry}");
            assert_eq!(entry["SYSLOG_IDENTIFIER"], unit, "{entry}");
            let message = entry["MESSAGE"].as_str().unwrap_or_default();
            let priority = match message.split_whitespace().next() {
                Some("INFO") => "6",
                Some("WARN") => "4",
                Some("ERROR") => "3",
                Some(_) | None => panic!("no level: {entry}"),
            };
            assert_eq!(entry["PRIORITY"], priority, "{entry}");
        }
    }
}

#[test]
fn bookworm_purge_leaves_keys_and_audit_log_and_names_them() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    purge_leaves_keys_and_audit_log_and_names_them(Part::Bookworm);
}

#[test]
fn trixie_purge_leaves_keys_and_audit_log_and_names_them() {
    long!();
    require!(Nspawn, Trixie, Packages, TestFiles);
    purge_leaves_keys_and_audit_log_and_names_them(Part::Trixie);
}

fn purge_leaves_keys_and_audit_log_and_names_them(release: Part) {
    let fleet = Fleet::boot(release);
    let before = [&fleet.mirror, &fleet.web1].map(files);
    fleet.set_up();
    fleet.start();
    for ((tree, packages, kept), before) in [
        (
            &fleet.mirror,
            "clamcast-master clamcast-agent clamcast-certs",
            [AGENT_KEPT, MASTER_KEPT].concat(),
        ),
        (&fleet.web1, "clamcast-agent", AGENT_KEPT.to_vec()),
    ]
    .into_iter()
    .zip(before)
    {
        let said = tree.run(&format!("apt-get -y purge {packages} 2>&1"));
        // Users and groups that are left are named as what they are.
        let users = tree.run("getent passwd | cut -d: -f1 | grep ^clamcast");
        for user in users.lines() {
            assert!(said.contains(&format!("user {user}")), "{user}: {said}");
        }
        let named = said.lines().filter_map(|line| line.strip_prefix("  /"));
        let named = named.map(|path| without_digest(&format!("/{path}")));
        let kept: BTreeSet<String> = kept.into_iter().map(Into::into).collect();
        assert_eq!(named.collect::<BTreeSet<_>>(), kept, "{said}");

        let left = files(tree)
            .into_iter()
            .filter(|path| !before.contains(path));
        let left: BTreeSet<_> = left.map(|path| without_digest(&path)).collect();
        eprintln!("a purge on {} leaves {left:#?}", tree.name());
        let databases = DATABASES.iter().map(|path| (*path).into());
        assert_eq!(
            left,
            kept.into_iter().chain(databases).collect::<BTreeSet<_>>()
        );
        let owner = tree.run("stat --format %U:%G /var/lib/clamav /var/lib/clamav/daily.cvd");
        assert_eq!(
            owner, "clamav:clamav\nclamav:clamav\n",
            "freshclam could not go on"
        );
        assert_eq!(tree.show("clamav-daemon", "ActiveState"), "active");
        let running = tree.attempt("pgrep clamcast").expect("the system runs");
        assert_eq!(
            String::from_utf8_lossy(&running.stdout),
            "",
            "a daemon still runs"
        );
    }
}

/// What a purge of the agent keeps.
const AGENT_KEPT: &[&str] = &[
    "/etc/clamcast/key.pem",
    "/var/lib/clamcast/agent/audit.key",
    "/var/lib/clamcast/agent/audit.pub",
    "/var/lib/clamcast/agent/audit/checkpoint",
    "/var/lib/clamcast/agent/audit/leaves",
    "/var/lib/clamcast/agent/audit/log.jsonl",
    "/var/lib/clamcast/agent/keys.json",
];

/// What a purge of the master keeps. The certificates, of master and agents, verify the audit log.
const MASTER_KEPT: &[&str] = &[
    "/etc/clamcast/audit.key",
    "/etc/clamcast/manifest.key",
    "/etc/clamcast/master/key.pem",
    "/var/lib/clamcast/master/audit/checkpoint",
    "/var/lib/clamcast/master/audit/leaves",
    "/var/lib/clamcast/master/audit/log.jsonl",
    "/var/lib/clamcast/master/certificates/DIGEST.der",
    "/var/lib/clamcast/master/keys.json",
];

/// Databases that the fleet delivered, with which clamd goes on.
const DATABASES: &[&str] = &["/var/lib/clamav/daily.cvd", "/var/lib/clamav/main.cvd"];

/// The path, where a file that is named by a digest has one name for all digests.
fn without_digest(path: &str) -> String {
    let (directory, name) = path.rsplit_once('/').expect("the path is absolute");
    match name.split_once('.') {
        Some((digest, extension)) if digest.len() == 64 => {
            format!("{directory}/DIGEST.{extension}")
        }
        Some(_) | None => path.into(),
    }
}

#[test]
fn upgrade_keeps_keys_state_and_configuration_and_the_fleet_stays_live() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    let scratch = Scratch::new();
    let fleet = Fleet::boot(Part::Bookworm);
    fleet.set_up_from(&older_debs(&scratch));
    fleet.start();
    // Configuration, keys, and what a daemon writes once, with their times: a daemon may make anew
    // what is lost. The audit log as it is so far.
    let kept = r"find /etc/clamcast /var/lib/clamcast -type f \
                    \( -path '/etc/*' -o -name '*.key' -o -name keys.json -o -name nonce \
                    -o -name installed.json -o -name publisher -o -path '*/master/keys/*' \
                    -o -path '*/certificates/*' -o -path '*/generations/*' -o -path '*/objects/*' \) \
                    -printf '%p %U:%G %m %s %T+\n' | sort
                head --verbose --lines 3 /var/lib/clamcast/*/audit/log.jsonl";
    let before = [&fleet.mirror, &fleet.web1].map(|tree| tree.run(kept));
    let wanted: [&[&str]; 2] = [
        &[
            "/etc/clamcast/manifest.key",
            "/etc/clamcast/master.toml",
            "/var/lib/clamcast/master/generations/1-1.json",
            "/var/lib/clamcast/master/keys.json",
            "/var/lib/clamcast/master/objects/",
            "/var/lib/clamcast/master/publisher",
            "/var/lib/clamcast/agent/keys.json",
            "/var/lib/clamcast/master/audit/log.jsonl <==\n{",
            "/var/lib/clamcast/agent/audit/log.jsonl <==\n{",
        ],
        &[
            "/etc/clamcast/key.pem",
            "/var/lib/clamcast/agent/installed.json",
            "/var/lib/clamcast/agent/keys.json",
            "/var/lib/clamcast/agent/audit/log.jsonl <==\n{",
        ],
    ];
    for (kept, wanted) in before.iter().zip(wanted) {
        for what in wanted {
            assert!(kept.contains(what), "no {what} in {kept}");
        }
    }
    let pid = fleet.web1.show("clamcast-agent", "MainPID");

    install(&fleet.mirror, &packages(), &["master", "agent", "certs"]);
    install(&fleet.web1, &packages(), &["agent"]);
    assert_ne!(
        fleet.web1.show("clamcast-agent", "MainPID"),
        pid,
        "an upgrade restarts the daemon"
    );
    assert_eq!(
        [&fleet.mirror, &fleet.web1].map(|tree| tree.run(kept)),
        before
    );
    for host in ["mirror", "web1"] {
        fleet.wait_live(host, 1);
    }
    fleet.publish(2);
    for host in ["mirror", "web1"] {
        fleet.wait_live(host, 2);
    }
}

#[test]
fn rpm_packages_install_verify_upgrade_and_erase() {
    long!();
    require!(Rpm, Packages);
    for name in ["clamcast-master", "clamcast-agent", "clamcast-certs"] {
        let scratch = Scratch::new();
        let root = scratch.directory("root");
        let rpm = |operation: &[&str], what: &str| {
            let mut rpm = Command::new("rpm");
            rpm.arg("--force-debian").arg("--root").arg(&root);
            printed(
                rpm.args(["--dbpath", "/var/lib/rpm"])
                    .args(operation)
                    .arg(what),
            )
        };
        let without = ["--nodeps", "--noscripts"];
        let new = package(&packages(), &format!("{name}-"), ".rpm")
            .display()
            .to_string();
        let old = older_rpm(&scratch, name, &new);
        rpm(&[&["--install"], &without[..]].concat(), &old);
        assert_eq!(
            rpm(&["--query"], name).trim(),
            format!("{name}-0.0.9-1.x86_64")
        );
        rpm(&[&["--verify"], &without[..]].concat(), name);

        let etc = scratch.directory("root/etc/clamcast");
        fs::write(etc.join("agent.toml"), "# an administrator wrote this\n")
            .expect("it can be written");
        rpm(&[&["--upgrade"], &without[..]].concat(), &new);
        assert_ne!(
            rpm(&["--query"], name).trim(),
            format!("{name}-0.0.9-1.x86_64")
        );
        rpm(&[&["--verify"], &without[..]].concat(), name);
        rpm(&[&["--erase"], &without[..]].concat(), name);

        // The packages contain no configuration files, so that rpm neither replaces the
        // administrator's nor leaves an .rpmnew or .rpmsave beside it.
        let left = "( -type f -o -type l ) -not -path */var/lib/rpm/* -printf %P\\n".split(' ');
        assert_eq!(
            printed(Command::new("find").arg(&root).args(left)),
            "etc/clamcast/agent.toml\n"
        );
    }
}

/// Two hosts that an administrator has set up by hand: `mirror`, with the master and an agent, and
/// `web1`, with an agent.
struct Fleet {
    mirror: Tree,
    web1: Tree,
    began: Instant,
}

impl Fleet {
    /// Live at generation 1.
    fn install(release: Part) -> Self {
        let fleet = Self::prepare(release);
        fleet.start();
        fleet
    }

    /// Installed and configured, not started.
    fn prepare(release: Part) -> Self {
        let fleet = Self::boot(release);
        fleet.set_up();
        fleet
    }

    /// Systems without clamcast, on which clamd is enabled: Debian 13 leaves that to the
    /// administrator. On the mirror, a freshclam has been at work.
    fn boot(release: Part) -> Self {
        let [mirror, web1] = Tree::boot(release, ["mirror", "web1"]);
        let fleet = Self {
            mirror,
            web1,
            began: Instant::now(),
        };
        for tree in [&fleet.mirror, &fleet.web1] {
            tree.run("systemctl enable clamav-daemon");
        }
        fleet
            .mirror
            .run("install -d -o clamav -g clamav /var/lib/clamav-mirror");
        fleet.mirror_file("main.cvd", "test-6.cvd");
        fleet.mirror_file("daily.cvd", "test-1.cvd");
        fleet
    }

    fn set_up(&self) {
        self.set_up_from(&packages());
    }

    fn set_up_from(&self, packages: &Path) {
        install(&self.mirror, packages, &["master", "agent", "certs"]);
        install(&self.web1, packages, &["agent"]);
        self.mirror.run(
            "cd /opt
             clamcast-certs init --dir pki --fleet example
             clamcast-certs master --dir pki --host mirror
             clamcast-certs agent --dir pki mirror
             clamcast-certs agent --dir pki web1
             install -m 644 pki/ca.pem pki/manifest.pub /etc/clamcast/
             install -m 600 pki/manifest.key pki/audit.key /etc/clamcast/
             install -d /etc/clamcast/master
             install -m 644 pki/master/cert.pem /etc/clamcast/master/
             install -m 600 pki/master/key.pem /etc/clamcast/master/",
        );
        self.mirror.write("/etc/clamcast/master.toml", MASTER);
        for (host, tree) in [("mirror", &self.mirror), ("web1", &self.web1)] {
            let bundle = self.mirror.path(&format!("/opt/pki/agents/{host}"));
            tree.copy(&bundle, "/opt");
            tree.run(&format!(
                "cp --preserve=mode /opt/{host}/* /etc/clamcast/
                 chmod 600 /etc/clamcast/key.pem
                 echo 'z /var/lib/clamav 0755 clamcast-agent clamav -' \
                     > /etc/tmpfiles.d/clamcast-database.conf
                 systemd-tmpfiles --create clamcast-database.conf"
            ));
        }
    }

    fn start(&self) {
        self.mirror.run("systemctl enable --now clamcast-master");
        for tree in [&self.mirror, &self.web1] {
            tree.run("systemctl enable --now clamcast-agent");
        }
        for host in ["mirror", "web1"] {
            self.wait_live(host, 1);
        }
        eprintln!(
            "from empty trees to two live hosts: {:.1?}",
            self.began.elapsed()
        );
    }

    /// Brings a version of the signed test database into the mirror, which becomes a generation.
    fn publish(&self, version: u32) {
        self.mirror_file("daily.cvd", &format!("test-{version}.cvd"));
    }

    fn mirror_file(&self, name: &str, source: &str) {
        let content = fs::read(Part::TestFiles.path().join(source)).expect("it was found");
        self.mirror
            .write("/var/lib/clamav-mirror/new.part", content);
        self.mirror.run(&format!(
            "cd /var/lib/clamav-mirror; chmod 644 new.part; mv new.part {name}"
        ));
    }

    #[track_caller]
    fn wait_live(&self, host: &str, generation: u64) {
        self.wait_agent(host, &format!("{host} is live at {generation}"), |row| {
            row["generation"] == generation
                && [&row["live"], &row["conformant"], &row["connected"]]
                    .iter()
                    .all(|it| **it == true)
        });
    }

    #[track_caller]
    fn wait_agent(&self, host: &str, what: &str, wanted: impl Fn(&Value) -> bool) {
        until(2 * PATIENCE, what, || {
            let asked = self.mirror.attempt("clamcast-master agents --json");
            let asked = asked.map_err(|error| error.to_string())?;
            let rows: Value = serde_json::from_slice(&asked.stdout).unwrap_or_default();
            let mut rows = rows.as_array().into_iter().flatten();
            match rows.find(|row| row["name"] == host) {
                Some(row) if wanted(row) => Ok(()),
                Some(row) => Err(row.to_string()),
                None => Err(String::from_utf8_lossy(&asked.stderr).into_owned()),
            }
        });
    }
}

const MASTER: &str = r#"fleet = "example"
state = "/var/lib/clamcast/master"

[mirror]
path = "/var/lib/clamav-mirror"

[tls]
ca = "/etc/clamcast/ca.pem"
cert = "/etc/clamcast/master/cert.pem"
key = "/etc/clamcast/master/key.pem"

[signing]
manifest_key = "/etc/clamcast/manifest.key"
audit_key = "/etc/clamcast/audit.key"
keys = "/etc/clamcast/manifest.pub"
"#;

/// Where the packages under test are.
fn packages() -> PathBuf {
    Part::Packages.path()
}

/// Installs packages with apt, from files alone.
#[track_caller]
fn install(tree: &Tree, directory: &Path, names: &[&str]) {
    tree.run("rm -rf /opt/packages; mkdir /opt/packages");
    for name in names {
        tree.copy(
            &package(directory, &format!("clamcast-{name}_"), ".deb"),
            "/opt/packages",
        );
    }
    tree.run("apt-get -y install /opt/packages/*.deb; rm -r /opt/packages");
}

/// Packages of a lower version: those in the directory that `CLAMCAST_DIST_OLD` names, such as the
/// packages of the parent commit, or else those under test.
fn older_debs(scratch: &Scratch) -> PathBuf {
    let source = env::var_os("CLAMCAST_DIST_OLD").map_or_else(packages, PathBuf::from);
    let older = scratch.directory("older");
    for name in ["clamcast-master", "clamcast-agent", "clamcast-certs"] {
        const REPACK: &str = r#"dpkg-deb --raw-extract "$1" "$2"
            sed -i 's/^Version:.*/Version: 0.0.9-1/' "$2/DEBIAN/control"
            dpkg-deb -Zgzip --build "$2" "$3""#;
        printed(Command::new("sh").args(["-ec", REPACK, "sh"]).args([
            package(&source, &format!("{name}_"), ".deb"),
            scratch.join(name),
            older.join(format!("{name}_0.0.9-1_amd64.deb")),
        ]));
    }
    older
}

/// An RPM package with the files of another one, and a lower version.
fn older_rpm(scratch: &Scratch, name: &str, new: &str) -> String {
    let files = printed(Command::new("rpm").args(["--query", "--package", "--list", new]));
    let spec = format!(
        "%global __os_install_post %{{nil}}
%global debug_package %{{nil}}
Name: {name}
Version: 0.0.9
Release: 1
Summary: An older version
License: MIT
AutoReqProv: no
%description
An older version.
%install
mkdir -p %{{buildroot}} && cd %{{buildroot}} && rpm2cpio {new} | cpio -idm --quiet
%files
{files}"
    );
    let path = scratch.join("older.spec");
    fs::write(&path, spec).expect("a scratch file can be written");
    let top = format!("_topdir {}", scratch.join("build").display());
    printed(
        Command::new("rpmbuild")
            .args(["--define", &top, "-bb"])
            .arg(path),
    );
    let built = format!("build/RPMS/x86_64/{name}-0.0.9-1.x86_64.rpm");
    scratch.join(built).display().to_string()
}

/// What a command printed.
///
/// # Panics
///
/// If it fails.
#[track_caller]
fn printed(command: &mut Command) -> String {
    let ran = command.output();
    let ran = ran.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    succeeded(&ran, &format!("{command:?}"))
}

/// Every file and every empty directory of a system, but for those of its kernel, of dpkg, apt and
/// systemd, logs, and what the tests put there.
fn files(tree: &Tree) -> Vec<String> {
    let found = tree.run(
        "find / -xdev \\( -path /proc -o -path /sys -o -path /run -o -path /tmp -o -path /var/tmp \
         -o -path /var/lib/dpkg -o -path /var/lib/apt -o -path /var/cache -o -path /var/log -o -path /var/lib/systemd \
         -o -path /root -o -path /opt \\) -prune -o \\( -not -type d -o -empty \\) -print",
    );
    found.lines().map(Into::into).collect()
}

/// A shell command as another user, with the groups of that user.
fn as_user(user: &str, command: &str) -> String {
    format!("setpriv --reuid {user} --regid $(id -g {user}) --init-groups {command}")
}
