//! Packages on real systems: apt installs them in booted Debian trees, and the real units run them.
//!
//! These tests need root, systemd-nspawn and the packages of `cargo xtask dist`. The scriptlets of
//! the RPM packages and SELinux are not tested: they would take a tree of the Red Hat family.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use clamcast_tests::lab::{PATIENCE, Part, Scratch, Tree, until};
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
fn first_databases_start_clamd_and_a_clamd_that_an_operator_stopped_stays_stopped() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    let fleet = Fleet::prepare(Part::Bookworm);
    let web1 = &fleet.web1;
    assert_eq!(
        web1.show("clamav-daemon", "ConditionResult"),
        "no",
        "Debian skips it at boot"
    );
    fleet.start();
    assert_eq!(web1.show("clamav-daemon", "ActiveState"), "active");

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
fn stalled_daemons_are_restarted_by_the_watchdog() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    let fleet = Fleet::install(Part::Bookworm);
    for (tree, unit) in [
        (&fleet.mirror, "clamcast-master"),
        (&fleet.web1, "clamcast-agent"),
    ] {
        let watchdog = tree.show(unit, "WatchdogUSec");
        assert_eq!(watchdog, "1min", "{unit}");
        // The real interval is a minute, which the test need not wait for.
        tree.run(&format!(
            "mkdir -p /run/systemd/system/{unit}.service.d
             printf '[Service]\nWatchdogSec=3\n' >/run/systemd/system/{unit}.service.d/test.conf
             systemctl daemon-reload
             systemctl restart {unit}
             systemctl kill --signal STOP {unit}"
        ));
        tree.wait_shown(unit, "NRestarts", "1");
        tree.wait_shown(unit, "ActiveState", "active");
        let journal = tree.run(&format!("journalctl --boot --unit {unit}"));
        assert!(journal.contains("Watchdog timeout"), "{journal}");
    }
    fleet.publish(2);
    fleet.wait_live("web1", 2);
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
fn sockets_obey_root_and_operators_and_refuse_nobody() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    let fleet = Fleet::install(Part::Bookworm);
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
            let wanted = if user == "olga" { 0 } else { 3 };
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
            assert!(entry["PRIORITY"].is_string(), "{entry}");
        }
    }
}

#[test]
fn purge_leaves_keys_and_audit_log_and_names_them() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    let fleet = Fleet::boot(Part::Bookworm);
    let before = [&fleet.mirror, &fleet.web1].map(files);
    fleet.set_up();
    fleet.start();
    let left = [
        (
            &fleet.mirror,
            "clamcast-master clamcast-agent clamcast-certs",
        ),
        (&fleet.web1, "clamcast-agent"),
    ]
    .map(|(tree, packages)| {
        let said = tree.run(&format!("apt-get -y purge {packages} 2>&1"));
        (said, files(tree))
    });
    for ((host, before), (said, after)) in ["mirror", "web1"].iter().zip(before).zip(left) {
        let new: Vec<_> = after.iter().filter(|path| !before.contains(path)).collect();
        eprintln!("{host}: purge says\n{said}\nand leaves\n{new:#?}");
    }
}

#[test]
fn upgrade_keeps_keys_state_and_configuration_and_the_fleet_stays_live() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles);
    let older = Older::packages();
    let fleet = Fleet::boot(Part::Bookworm);
    fleet.set_up_from(older.directory());
    fleet.start();
    let kept =
        "find /etc/clamcast /var/lib/clamcast/*/identity* -type f | xargs sha256sum | sort -k 2";
    let before = [&fleet.mirror, &fleet.web1].map(|tree| tree.run(kept));
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

    /// Systems without clamcast. On the mirror, a freshclam has been at work.
    fn boot(release: Part) -> Self {
        let [mirror, web1] = Tree::boot(release, ["mirror", "web1"]);
        let fleet = Self {
            mirror,
            web1,
            began: Instant::now(),
        };
        fleet
            .mirror
            .run("install -d -o clamav -g clamav /var/lib/clamav-mirror");
        fleet.mirror_file("main.cvd", "bytecode.cvd");
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
            "cd /root
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
            let bundle = self.mirror.path(&format!("/root/pki/agents/{host}"));
            tree.copy(&bundle, "/root");
            tree.run(&format!(
                "cp /root/{host}/* /etc/clamcast/
                 chmod 600 /etc/clamcast/key.pem
                 chown clamcast-agent:clamav /var/lib/clamav
                 chmod 755 /var/lib/clamav"
            ));
        }
    }

    fn start(&self) {
        self.mirror
            .run("systemctl enable --now clamcast-master clamcast-agent");
        self.web1.run("systemctl enable --now clamcast-agent");
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
load_test = "never"

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
    tree.run("rm -rf /root/packages; mkdir /root/packages");
    for name in names {
        tree.copy(
            &package(directory, &format!("clamcast-{name}_"), ".deb"),
            "/root/packages",
        );
    }
    tree.run("apt-get -y install /root/packages/*.deb; rm -r /root/packages");
}

/// The one package of a name.
fn package(directory: &Path, prefix: &str, suffix: &str) -> PathBuf {
    let entries = fs::read_dir(directory).expect("the packages were found");
    let paths = entries.map(|entry| entry.expect("it is there").path());
    let mut found = paths.filter(|path| {
        let name = path
            .file_name()
            .expect("a file has a name")
            .to_string_lossy();
        name.starts_with(prefix) && name.ends_with(suffix)
    });
    let wanted = || format!("{prefix}*{suffix} in {}", directory.display());
    let path = found
        .next()
        .unwrap_or_else(|| panic!("no {}; run `cargo xtask dist`", wanted()));
    assert!(found.next().is_none(), "several {}", wanted());
    path
}

/// The same packages under a lower version, or those in the directory that `CLAMCAST_DIST_OLD` names.
struct Older(Scratch);

impl Older {
    fn packages() -> Self {
        let scratch = Scratch::new();
        for name in ["clamcast-master", "clamcast-agent", "clamcast-certs"] {
            let new = package(&packages(), &format!("{name}_"), ".deb");
            let old = scratch.join(format!("{name}_0.0.9-1_amd64.deb"));
            let repacked = Command::new("sh")
                .args(["-ec", "dpkg-deb -R $1 $2; sed -i 's/^Version:.*/Version: 0.0.9-1/' $2/DEBIAN/control; dpkg-deb -Zgzip -b $2 $3", "sh"])
                .args([&new, &scratch.join(name), &old])
                .output();
            let repacked = repacked.expect("every system has sh");
            assert!(repacked.status.success(), "{repacked:?}");
        }
        Self(scratch)
    }

    fn directory(&self) -> &Path {
        self.0.path()
    }
}

/// Every file and directory of a system, but for those of its kernel, of dpkg and apt, and logs.
fn files(tree: &Tree) -> Vec<String> {
    let found = tree.run(
        "find / -xdev \\( -path /proc -o -path /sys -o -path /run -o -path /tmp -o -path /var/tmp \
         -o -path /var/lib/dpkg -o -path /var/cache -o -path /var/log -o -path /var/lib/systemd \
         -o -path /root \\) -prune -o -print | sort",
    );
    found.lines().map(Into::into).collect()
}

/// A shell command as another user, with the groups of that user.
fn as_user(user: &str, command: &str) -> String {
    format!("setpriv --reuid {user} --regid $(id -g {user}) --init-groups {command}")
}
