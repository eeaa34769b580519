//! The Ansible collection against booted Debian systems.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use clamcast_tests::lab::{Part, Scratch, Tree, package, program};
use clamcast_tests::{long, require};
use sha2::{Digest, Sha256};

#[test]
fn ansible_installs_a_live_fleet_changes_nothing_twice_and_gives_the_hosts_back() {
    long!();
    require!(Nspawn, Bookworm, Packages, TestFiles, Ansible);
    let site = Site::boot(Part::Bookworm);
    let before = site.states();

    site.play("site", &["--check", "--diff"]);
    assert_eq!(site.states(), before, "check mode changes nothing");

    site.play("site", &[]);
    let agents = site.mirror.run("clamcast-master agents --json");
    assert!(agents.contains("\"live\": true"), "{agents}");
    let freshclam = site.freshclam();
    assert_eq!(freshclam, ["masked", "inactive"], "web1 has one updater");
    site.check_keys();
    let again = site.play("site", &[]);
    assert_eq!(again.matches("changed=0").count(), 2, "{again}");

    site.play(
        "uninstall",
        &["--extra-vars", "clamcast_uninstall_keep=false"],
    );
    let again = site.play(
        "uninstall",
        &["--extra-vars", "clamcast_uninstall_keep=false"],
    );
    assert_eq!(again.matches("changed=0").count(), 2, "{again}");
    assert_eq!(site.states(), before, "the hosts are as they were");
    assert_eq!(site.freshclam(), ["enabled", "active"]);
}

/// Two hosts without clamcast, and the control machine, which is this one.
struct Site {
    mirror: Tree,
    web1: Tree,
    control: Scratch,
}

impl Site {
    fn boot(release: Part) -> Self {
        let [mirror, web1] = Tree::boot(release, ["mirror", "web1"]);
        for (name, source) in [("main.cvd", "test-6.cvd"), ("daily.cvd", "test-1.cvd")] {
            let content = fs::read(Part::TestFiles.path().join(source)).expect("it was found");
            let path = format!("/var/lib/clamav/{name}");
            mirror.write(&path, content);
            mirror.run(&format!("chown clamav: {path}"));
        }
        // Without a network, freshclam runs and finds no server.
        web1.run(
            "rm /etc/systemd/system/clamav-freshclam.service
            systemctl daemon-reload
            systemctl enable --now clamav-freshclam",
        );
        let control = Scratch::new();
        Self {
            mirror,
            web1,
            control,
        }
    }

    /// Runs a playbook, and returns its output.
    #[track_caller]
    fn play(&self, playbook: &str, options: &[&str]) -> String {
        let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
        let ansible = Part::Ansible.path();
        let packages = Part::Packages.path();
        let programs = ansible.parent().map(Path::to_owned).into_iter();
        let path = env::var_os("PATH").unwrap_or_default();
        let path = env::join_paths(programs.chain(env::split_paths(&path)));
        let mut play = Command::new(tests.join("ansible/play"));
        play.arg(playbook)
            .args(options)
            .env("PATH", path.expect("no directory has a colon"))
            .env("WORK", self.control.path())
            .env("PID_MASTER", first(&self.mirror))
            .env("PID_AGENT", first(&self.web1))
            .env("CLAMCAST_PKI", self.control.join("pki"))
            .env("CLAMCAST_CERTS", program("clamcast-certs").get_program())
            .env(
                "CLAMCAST_MASTER_DEB",
                package(&packages, "clamcast-master_", ".deb"),
            )
            .env(
                "CLAMCAST_AGENT_DEB",
                package(&packages, "clamcast-agent_", ".deb"),
            );
        let played = play.output().expect("the script is there");
        let output = String::from_utf8_lossy(&played.stdout).into_owned();
        let errors = String::from_utf8_lossy(&played.stderr);
        assert!(played.status.success(), "{playbook}: {output}{errors}");
        output
    }

    /// Whether freshclam of web1 is enabled, and whether it runs.
    fn freshclam(&self) -> [String; 2] {
        ["is-enabled", "is-active"].map(|asked| {
            let script = format!("systemctl {asked} clamav-freshclam || true");
            self.web1.run(&script).trim().to_owned()
        })
    }

    /// A host has the private keys that it needs and no other. Keys are compared by their content.
    #[track_caller]
    fn check_keys(&self) {
        let pki = self.control.join("pki");
        let digest = |path: &Path| {
            let key = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            hex::encode(Sha256::digest(key))
        };
        let keys: BTreeMap<_, _> = [
            "root.key",
            "ca.key",
            "manifest.key",
            "audit.key",
            "master/key.pem",
            "agents/web1/key.pem",
        ]
        .map(|key| (digest(&pki.join(key)), key))
        .into();
        let found = [&self.mirror, &self.web1].map(|tree| {
            // Files of running programs disappear meanwhile.
            let listed = tree.run(
                "find /etc /home /opt /root /run /srv /tmp /var -type f \
                    -exec sha256sum {} + 2>/dev/null || true",
            );
            let digests = listed.lines().filter_map(|line| line.split_once(' '));
            let mut found: Vec<_> = digests
                .filter_map(|(digest, _)| keys.get(digest).copied())
                .collect();
            found.sort_unstable();
            found.dedup();
            found
        });
        assert_eq!(
            found,
            [
                vec!["audit.key", "manifest.key", "master/key.pem"],
                vec!["agents/web1/key.pem"],
            ]
        );
    }

    /// Path, owner, group, mode and type of the files of each host that a playbook may change,
    /// except databases and the files of a freshclam at work; then the names of the users that the
    /// packages make, the states of the units, and the content of clamd.conf.
    fn states(&self) -> [String; 2] {
        let script = "
            find /etc /var/lib/clamav /var/lib/clamcast /usr/bin /usr/lib/systemd \
                -not -path '/etc/*.dpkg-*' -not -path '/var/lib/clamav/*.c[vl]d' \
                -not -path /var/lib/clamav/freshclam.dat -not -path '/var/lib/clamav/tmp.*' \
                -printf '%p %u %g %m %y\\n' 2>/dev/null | sort
            getent passwd clamcast-master clamcast-agent | cut -d: -f1
            systemctl is-active clamav-freshclam clamcast-agent clamcast-master
            cat /etc/clamav/clamd.conf";
        [&self.mirror, &self.web1].map(|tree| {
            // Units and users that are not there make a command fail, and the shell goes on.
            tree.run(&format!("set +e; {script}; true"))
        })
    }
}

fn first(tree: &Tree) -> String {
    tree.first().expect("the system runs").to_string()
}
