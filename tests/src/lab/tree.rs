//! Whole systems: copies of a Debian tree that systemd boots, each in namespaces of its own.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::{env, thread};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::needs::{Part, target};
use super::scratch::Scratch;
use super::until::{PATIENCE, until};

/// What a tree consists of: systemd, and ClamAV as Debian packages it.
const PACKAGES: &str = "systemd,systemd-sysv,dbus,iproute2,procps,python3-apt,adduser,\
                        clamav,clamav-daemon,clamav-freshclam";

/// Units that wait for a network that leads out, or use dpkg on their own.
const MASKED: [&str; 5] = [
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "clamav-freshclam-once.timer",
    "clamav-freshclam-once.service",
    "clamav-freshclam.service",
];

/// The first process of a system's outer process namespace. It boots the system again after a
/// reboot (exit code 133 of systemd-nspawn with `--keep-unit`). All mounts end with it.
/// Arguments: tree, scratch directory, cgroup, host name, network namespace.
const INIT: &str = r#"
set -e
mount --bind "$5" "$2/network"
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root"
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir "/sys/fs/cgroup/$3"
echo 0 >"/sys/fs/cgroup/$3/cgroup.procs"
set +e
while :; do
  systemd-nspawn --boot --directory="$2/root" --machine="$4" --network-namespace-path="$2/network" \
    --register=no --keep-unit --resolv-conf=off --console=pipe \
    --system-call-filter="landlock_add_rule landlock_create_ruleset landlock_restrict_self"
  [ $? -eq 133 ] || exit
done
"#;

/// A booted system. Everything that it is ends when this is dropped, or with the test's process.
#[derive(Debug)]
pub struct Tree {
    scratch: Scratch,
    name: &'static str,
    cgroup: String,
    namespaces: Child,
    network: Child,
}

impl Tree {
    /// Boots copies of the tree of a Debian release ([`Part::Bookworm`], [`Part::Trixie`]). The
    /// first host has a network link to each of the others. All know it by its name.
    pub fn boot<const HOSTS: usize>(release: Part, names: [&'static str; HOSTS]) -> [Self; HOSTS] {
        let mut number = 0;
        let trees = names.map(|name| {
            number += 1;
            Self::start(release, name, names[0], number)
        });
        for (number, other) in (1..).zip(&trees).skip(1) {
            trees[0].link(other, number);
        }
        for tree in &trees {
            tree.wait_running();
        }
        trees
    }

    /// `number` counts from 1, as [`Tree::link`] does.
    fn start(release: Part, name: &'static str, first: &str, number: usize) -> Self {
        let scratch = Scratch::new();
        for directory in ["root", "work", "upper/etc/systemd/system"] {
            scratch.directory(directory);
        }
        File::create(scratch.join("network")).expect("a scratch file can be written");
        let etc = scratch.join("upper/etc");
        let address = if number == 1 {
            "127.0.0.1".into()
        } else {
            address(number, 1)
        };
        let hosts = format!("127.0.0.1 localhost\n{address} {first}\n");
        fs::write(etc.join("hosts"), hosts)
            .and_then(|()| fs::write(etc.join("hostname"), format!("{name}\n")))
            .and_then(|()| {
                let mut units = MASKED
                    .iter()
                    .map(|unit| etc.join("systemd/system").join(unit));
                units.try_for_each(|unit| symlink("/dev/null", unit))
            })
            .expect("a scratch directory can be written");

        let mut network = Command::new("unshare");
        network
            .args(["--net", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        let network = network.spawn().expect("unshare was found");
        until(PATIENCE, "a network namespace", || {
            let comm = fs::read_to_string(format!("/proc/{}/comm", network.id()));
            comm.is_ok_and(|comm| comm == "cat\n")
        });
        ip(&network, &["link", "set", "lo", "up"]);

        let cgroup = scratch
            .path()
            .file_name()
            .expect("it has a name of its own");
        let cgroup = cgroup.to_string_lossy().into_owned();
        let console = File::create(scratch.join("console"));
        let console = console.expect("a scratch file can be written");
        let mut namespaces = Command::new("setpriv");
        namespaces
            .args([
                "--pdeathsig",
                "KILL",
                "unshare",
                "--mount",
                "--pid",
                "--fork",
            ])
            .args(["--kill-child", "sh", "-c", INIT, "sh"])
            .arg(release.path())
            .arg(scratch.path())
            .args([&cgroup, name])
            .arg(format!("/proc/{}/ns/net", network.id()))
            .stdin(Stdio::null())
            .stdout(console.try_clone().expect("a file can be had twice"))
            .stderr(console);
        let namespaces = namespaces.spawn().expect("setpriv was found");
        Self {
            scratch,
            name,
            cgroup,
            namespaces,
            network,
        }
    }

    /// Connects a host to this one, which is the first.
    fn link(&self, other: &Self, number: usize) {
        let there = other.network.id().to_string();
        let near = format!("host{number}");
        let veth = [
            "link", "add", &near, "type", "veth", "peer", "name", "host1", "netns", &there,
        ];
        ip(&self.network, &veth);
        for (namespace, device, end) in [
            (&self.network, near.as_str(), 1),
            (&other.network, "host1", 2),
        ] {
            let address = format!("{}/24", address(number, end));
            ip(namespace, &["address", "add", &address, "dev", device]);
            ip(namespace, &["link", "set", device, "up"]);
        }
    }

    /// Its host name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Waits until systemd has started everything.
    ///
    /// # Panics
    ///
    /// If a unit failed.
    #[track_caller]
    pub fn wait_running(&self) {
        until(PATIENCE, &format!("{} has booted", self.name), || {
            let asked = self.attempt("systemctl is-system-running")?;
            let state = String::from_utf8_lossy(&asked.stdout).trim().to_owned();
            assert_ne!(
                state,
                "degraded",
                "{}",
                self.run("systemctl --failed --no-pager")
            );
            if state == "running" {
                Ok(())
            } else {
                Err(io::Error::other(state))
            }
        });
    }

    /// Reboots it as an operator does, and waits until systemd has started everything.
    #[track_caller]
    pub fn reboot(&self) {
        let before = self.first();
        self.run("systemctl reboot");
        until(PATIENCE, &format!("{} goes down", self.name), || {
            self.first() != before
        });
        self.wait_running();
    }

    /// The path by which the test reaches a file of the running system. A symbolic link on the way
    /// must not be absolute.
    ///
    /// # Panics
    ///
    /// While it reboots.
    pub fn path(&self, inside: &str) -> PathBuf {
        let first = self.first().expect("the system runs");
        PathBuf::from(format!("/proc/{first}/root{inside}"))
    }

    /// Writes a file with the content alone; its owner is root.
    #[track_caller]
    pub fn write(&self, inside: &str, content: impl AsRef<[u8]>) {
        let written = fs::write(self.path(inside), content);
        written.unwrap_or_else(|error| panic!("cannot write {inside}: {error}"));
    }

    /// Copies a file or a directory into it, to a directory.
    #[track_caller]
    pub fn copy(&self, from: &Path, directory: &str) {
        let copied = Command::new("cp")
            .arg("-r")
            .arg(from)
            .arg(self.path(directory))
            .output();
        succeeded(&copied.expect("every system has cp"), "cp");
    }

    /// Runs a shell script as root, and returns what it printed.
    ///
    /// # Panics
    ///
    /// If it fails, with what it said.
    #[track_caller]
    pub fn run(&self, script: &str) -> String {
        let ran = self.attempt(script).expect("the system runs");
        succeeded(&ran, &format!("on {}: {script}", self.name))
    }

    /// Runs a shell script as root. It is an error while the system reboots.
    pub fn attempt(&self, script: &str) -> io::Result<Output> {
        let first = self
            .first()
            .ok_or_else(|| io::Error::other("the system is down"))?;
        Command::new("nsenter")
            .args([
                "--target",
                &first.to_string(),
                "--all",
                "env",
                "--ignore-environment",
            ])
            .arg("PATH=/usr/sbin:/usr/bin:/sbin:/bin")
            .args([
                "LC_ALL=C.UTF-8",
                "DEBIAN_FRONTEND=noninteractive",
                "sh",
                "-ec",
                script,
            ])
            .stdin(Stdio::null())
            .output()
    }

    /// A property of a unit, as `systemctl show` prints it.
    #[track_caller]
    pub fn show(&self, unit: &str, property: &str) -> String {
        let shown = self.run(&format!("systemctl show --value -p {property} {unit}"));
        shown.trim_end().to_owned()
    }

    /// Waits until a property of a unit has a value.
    #[track_caller]
    pub fn wait_shown(&self, unit: &str, property: &str, wanted: &str) {
        until(PATIENCE, &format!("{property}={wanted} of {unit}"), || {
            let shown = self.show(unit, property);
            if shown == wanted { Ok(()) } else { Err(shown) }
        });
    }

    /// The first process of a unit, as this machine numbers it.
    #[track_caller]
    pub fn process(&self, unit: &str) -> u32 {
        let cgroup = self.show(unit, "ControlGroup");
        let processes = self.path(&format!("/sys/fs/cgroup{cgroup}/cgroup.procs"));
        let processes = fs::read_to_string(processes).expect("the unit runs");
        let first = processes.lines().next().and_then(|id| id.parse().ok());
        first.unwrap_or_else(|| panic!("{unit} has no process"))
    }

    /// What a unit has logged in this boot, in the fields of journald.
    #[track_caller]
    pub fn journal(&self, unit: &str) -> Vec<Value> {
        let printed = self.run(&format!("journalctl --boot --output json --unit {unit}"));
        let entries = printed.lines().map(serde_json::from_str);
        entries
            .collect::<Result<_, _>>()
            .expect("journalctl prints JSON")
    }

    /// The process that is systemd, if the system is up.
    pub fn first(&self) -> Option<u32> {
        let shell = only_child(self.namespaces.id())?;
        only_child(only_child(shell)?)
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        if thread::panicking() {
            let console = fs::read_to_string(self.scratch.join("console")).unwrap_or_default();
            let journal = self
                .attempt("journalctl --no-pager --lines 200")
                .map(|ran| ran.stdout);
            let journal = journal.unwrap_or_default();
            eprintln!(
                "---- {}\n{console}{}",
                self.name,
                String::from_utf8_lossy(&journal)
            );
        }
        // The end of the outer process namespace's first process ends all others before it is
        // reported, so that nobody writes to the scratch directory after that.
        if let Some(shell) = only_child(self.namespaces.id()).and_then(|id| i32::try_from(id).ok())
        {
            let _ = kill(Pid::from_raw(shell), Signal::SIGKILL);
        } else {
            let _ = self.namespaces.kill();
        }
        let _ = self.namespaces.wait();
        let _ = self.network.kill();
        let _ = self.network.wait();
        let cleaned = in_cgroup2(&format!(
            "find /sys/fs/cgroup/{} -depth -type d -exec rmdir {{}} +",
            self.cgroup
        ));
        if let Err(error) = cleaned {
            eprintln!("cgroup {} is left: {error}", self.cgroup);
        }
    }
}

/// The tree of a Debian release below the target directory, or in the directory that
/// `CLAMCAST_TREES` names. It is built if it is not there, which takes about two minutes.
pub(super) fn cached(release: &str) -> Result<PathBuf, String> {
    let trees = env::var_os("CLAMCAST_TREES").map_or_else(|| target().join("trees"), PathBuf::from);
    let (tree, ready) = (trees.join(release), trees.join(format!("{release}.ready")));
    // The list of packages that it was built with.
    let is_current = || fs::read_to_string(&ready).is_ok_and(|built| built == PACKAGES);
    if is_current() {
        return Ok(tree);
    }
    let build = || -> io::Result<Output> {
        fs::create_dir_all(&trees)?;
        // Another test process may be building the same tree.
        let lock = File::create(trees.join(format!("{release}.lock")))?;
        lock.lock()?;
        let mut mmdebstrap = Command::new("mmdebstrap");
        mmdebstrap.args([
            "--variant=minbase",
            &format!("--include={PACKAGES}"),
            release,
        ]);
        if is_current() {
            return Command::new("true").output();
        }
        for unfinished in [&tree, &trees.join(format!("{release}.part"))] {
            if unfinished.exists() {
                fs::remove_dir_all(unfinished)?;
            }
        }
        let part = trees.join(format!("{release}.part"));
        let built = mmdebstrap.arg(&part).output()?;
        if built.status.success() {
            fs::rename(part, &tree)?;
            fs::write(&ready, PACKAGES)?;
        }
        Ok(built)
    };
    match build() {
        Ok(built) if built.status.success() => Ok(tree),
        Ok(built) => {
            let said = String::from_utf8_lossy(&built.stderr).into_owned();
            let reason = said
                .lines()
                .rfind(|line| line.starts_with("E:"))
                .unwrap_or_default();
            Err(format!(
                "mmdebstrap cannot build a tree of {release}: {reason}"
            ))
        }
        Err(error) => Err(format!("cannot build a tree of {release}: {error}")),
    }
}

/// Whether systemd-nspawn can boot a tree here.
pub(super) fn may_boot(nspawn: PathBuf) -> Result<PathBuf, String> {
    if !nix::unistd::Uid::effective().is_root() {
        return Err("it takes root to boot a tree".into());
    }
    match in_cgroup2("true") {
        Ok(()) => Ok(nspawn),
        Err(error) => Err(format!("systemd-nspawn needs cgroup2: {error}")),
    }
}

/// Runs a command where `/sys/fs/cgroup` is the hierarchy of cgroup2. Elsewhere it may be that of
/// cgroup v1.
fn in_cgroup2(command: &str) -> io::Result<()> {
    let script = format!("mount -t cgroup2 cgroup2 /sys/fs/cgroup && {command}");
    let ran = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .output()?;
    if ran.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&ran.stderr);
    Err(io::Error::other(said.trim().to_owned()))
}

/// An end of the link to host `number`.
fn address(number: usize, end: u8) -> String {
    format!("10.66.{number}.{end}")
}

/// Runs ip(8) in the network namespace of a process.
#[track_caller]
fn ip(namespace: &Child, arguments: &[&str]) {
    let mut ip = Command::new("nsenter");
    ip.args(["--target", &namespace.id().to_string(), "--net", "ip"])
        .args(arguments);
    succeeded(&ip.output().expect("nsenter was found"), "ip");
}

fn only_child(parent: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
    children.trim().parse().ok()
}

/// What a program printed. `what` names the program.
///
/// # Panics
///
/// If the program failed.
#[track_caller]
pub fn succeeded(output: &Output, what: &str) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(
        output.status.success(),
        "{what}: {}\n{stdout}{stderr}",
        output.status
    );
    stdout
}
