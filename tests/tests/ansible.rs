//! The Ansible collection against booted Debian systems.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clamcast_tests::lab::{Part, Scratch, Tree, program};
use clamcast_tests::{long, require};

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
    assert!(agents.contains("\"live\":true"), "{agents}");
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
        for (name, source) in [("main.cvd", "bytecode.cvd"), ("daily.cvd", "test-1.cvd")] {
            let content = fs::read(Part::TestFiles.path().join(source)).expect("it was found");
            let path = format!("/var/lib/clamav/{name}");
            mirror.write(&path, content);
            mirror.run(&format!("chown clamav: {path}"));
        }
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
            .env("CLAMCAST_MASTER_DEB", package("clamcast-master_"))
            .env("CLAMCAST_AGENT_DEB", package("clamcast-agent_"));
        let played = play.output().expect("the script is there");
        let output = String::from_utf8_lossy(&played.stdout).into_owned();
        let errors = String::from_utf8_lossy(&played.stderr);
        assert!(played.status.success(), "{playbook}: {output}{errors}");
        output
    }

    /// The files of each host that a playbook may change, with owner, mode and size, and the state
    /// of the units.
    fn states(&self) -> [String; 2] {
        let script = "
            find /etc /var/lib/clamav /var/lib/clamcast /usr/bin /usr/lib/systemd \
                -not -path '/etc/*.dpkg-*' -not -path '/var/lib/clamav/*.c[vl]d' \
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

/// The newest file of `cargo xtask dist` whose name begins with `prefix`.
fn package(prefix: &str) -> PathBuf {
    let directory = fs::read_dir(Part::Packages.path()).expect("it was found");
    let paths = directory.map(|entry| entry.expect("it can be listed").path());
    let mut packages = paths.filter(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(prefix) && name.ends_with(".deb")
    });
    packages.next().expect("the package was built")
}
