//! What a test cannot do without, where it is, and what happens when it is not there.
//!
//! Programs are looked for on `PATH`, in the directories for system programs, which an ordinary
//! user often does not have on it, and in `target/debian/bin`, where `cargo xtask test` puts what
//! it unpacked from Debian's packages.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, iter};

use super::{dns, tree};

/// Something real that a test needs and that may not be on this machine.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Part {
    /// The scanning daemon.
    Clamd,
    /// The scanner that loads databases by itself.
    Clamscan,
    /// The updater of a mirror.
    Freshclam,
    /// Talos's other updater, which writes in place. `cargo xtask test` installs it from PyPI.
    Cvdupdate,
    /// The right to listen on port 53 of loopback, for a name server that cvdupdate asks. Root has it.
    NameServer,
    /// ClamAV's own reader of database containers.
    Sigtool,
    /// The interpreter of small programs that need what the project forbids in Rust: `unsafe`.
    Python,
    /// What clamcast is measured against.
    Rsync,
    /// The command line of librsync, which reads deltas of its format.
    Rdiff,
    /// What stops a program at a system call, or spoils one; and the right to do that here.
    Strace,
    /// What judges the licences and sources of our dependencies.
    CargoDeny,
    /// What looks for advisories on them.
    CargoAudit,
    /// What scores the sandbox of a unit.
    SystemdAnalyze,
    /// A user namespace, which has limits of its own.
    Namespace,
    /// Databases that Talos signed; `CLAMCAST_TESTFILES` names another place for them.
    TestFiles,
    /// The script that makes large database histories; it needs `python3`.
    Corpus,
    /// The right to mount a small disk. CI has it.
    Root,
    /// What boots a whole system, and the right to do that here.
    Nspawn,
    /// A bootable tree of Debian 12; `CLAMCAST_TREES` names another directory for it.
    Bookworm,
    /// A bootable tree of Debian 13.
    Trixie,
    /// The packages that `cargo xtask dist` built; `CLAMCAST_DIST` names another place for them.
    Packages,
    /// What runs playbooks, with the collection community.general; `cargo xtask test --long` installs it.
    Ansible,
    /// The package manager of Red Hat, and what builds its packages.
    Rpm,
}

impl Part {
    /// Where it is.
    ///
    /// # Panics
    ///
    /// If it is not here, which a test asks first, with [`require!`](crate::require).
    pub fn path(self) -> PathBuf {
        self.find().unwrap_or_else(|missing| panic!("{missing}"))
    }

    /// Where it is, or what is missing and what to do about it.
    fn find(self) -> Result<PathBuf, String> {
        match self {
            Part::Clamd => program("clamd"),
            Part::Clamscan => program("clamscan"),
            Part::Freshclam => program("freshclam"),
            Part::Cvdupdate => python_program("cvdupdate"),
            Part::NameServer => dns::may_bind().map(|()| "/".into()),
            Part::Sigtool => program("sigtool"),
            Part::Python => program("python3"),
            Part::Rsync => program("rsync"),
            Part::Rdiff => program("rdiff"),
            Part::Strace => program("strace").and_then(may_trace),
            Part::CargoDeny => program("cargo-deny"),
            Part::CargoAudit => program("cargo-audit"),
            Part::SystemdAnalyze => program("systemd-analyze"),
            Part::Namespace => program("unshare").and_then(may_unshare),
            Part::TestFiles => {
                let there = env::var_os("CLAMCAST_TESTFILES").map(PathBuf::from);
                file(there.unwrap_or_else(|| workspace().join("../shared/clamav-testfiles")))
            }
            Part::Corpus => program("python3")
                .and_then(|_| file(workspace().join("../shared/corpus/make_corpus.py"))),
            Part::Nspawn => ["mmdebstrap", "nsenter", "setpriv", "unshare"]
                .into_iter()
                .try_for_each(|name| program(name).map(drop))
                .and_then(|()| program("systemd-nspawn"))
                .and_then(tree::may_boot),
            Part::Bookworm => tree::cached("bookworm"),
            Part::Trixie => tree::cached("trixie"),
            Part::Packages => {
                let there = env::var_os("CLAMCAST_DIST").map(PathBuf::from);
                file(there.unwrap_or_else(|| target().join("dist")))
            }
            Part::Ansible => python_program("ansible-playbook"),
            Part::Rpm => ["cpio", "rpm2cpio", "rpmbuild"]
                .into_iter()
                .try_for_each(|name| program(name).map(drop))
                .and_then(|()| program("rpm")),
            Part::Root if nix::unistd::Uid::effective().is_root() => Ok("/".into()),
            Part::Root => Err("it takes root to mount a file system".into()),
        }
    }
}

/// Returns from a test that needs parts which are not here, after saying so: `require!(Clamd,
/// TestFiles);`. Where `CI` is `true` a missing part fails the test instead.
#[macro_export]
macro_rules! require {
    ($($part:ident),+ $(,)?) => {
        if !$crate::lab::needs($crate::test_name!(), &[$($crate::lab::Part::$part),+]) {
            return;
        }
    };
}

/// Returns from a test that is too slow for every run, unless `cargo xtask test --long` asked for
/// it by `CLAMCAST_LONG=1`.
#[macro_export]
macro_rules! long {
    () => {
        if !$crate::lab::wants_long($crate::test_name!()) {
            return;
        }
    };
}

/// The path of the function it stands in, such as `lab::freshclam_walks_the_chain`.
#[macro_export]
macro_rules! test_name {
    () => {{
        fn here() {}
        $crate::lab::named(here)
    }};
}

/// The function that encloses the function `here`. It is what [`test_name!`](crate::test_name)
/// asks.
pub fn named<F>(here: F) -> &'static str {
    let _ = here;
    let name = std::any::type_name::<F>();
    let name = name.strip_suffix("::here").unwrap_or(name);
    name.strip_suffix("::{{closure}}").unwrap_or(name)
}

/// Whether all `parts` are here; if not, the test `name` is noted as skipped.
///
/// # Panics
///
/// If a part is missing and `CI` is `true`.
pub fn needs(name: &str, parts: &[Part]) -> bool {
    let missing: Vec<_> = parts.iter().filter_map(|part| part.find().err()).collect();
    if missing.is_empty() {
        return true;
    }
    let missing = missing.join("; ");
    assert!(
        env::var_os("CI").is_none_or(|ci| ci != "true"),
        "{missing} (with CI=true nothing is skipped)"
    );
    eprintln!("SKIPPED: {missing}");
    note("skipped", name, &missing);
    false
}

/// Whether long tests run; if not, the test `name` is noted as one of them.
pub fn wants_long(name: &str) -> bool {
    let wanted = env::var_os("CLAMCAST_LONG").is_some_and(|long| long == "1");
    if !wanted {
        eprintln!("SKIPPED: long; run `cargo xtask test --long`");
        note("long", name, "");
    }
    wanted
}

/// `PATH` for a process that looks for the same programs by name.
pub fn search_path() -> OsString {
    env::join_paths(program_directories()).expect("no directory on PATH has a colon in its name")
}

/// Makes a history of `steps` mirror states, `out/0001` and so on, that a real clamd loads.
/// A `scale` of 1.0 is a daily database of 220 MB.
///
/// # Panics
///
/// If the script fails.
pub fn make_corpus(out: &Path, scale: f64, steps: u32) {
    let made = Command::new("python3")
        .arg(Part::Corpus.path())
        .arg(out)
        .args(["--ext", "cud", "--scale", &scale.to_string()])
        .args(["--steps", &steps.to_string()])
        .output()
        .expect("python3 was found");
    let said = String::from_utf8_lossy(&made.stderr);
    assert!(made.status.success(), "make_corpus.py failed: {said}");
}

fn program(name: &str) -> Result<PathBuf, String> {
    program_directories()
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| format!("no {name} on this machine (`cargo xtask test` looks for it)"))
}

/// The same of one from PyPI, which `cargo xtask test` installs in `target/python`.
fn python_program(name: &str) -> Result<PathBuf, String> {
    program(name).or_else(|_| file(target().join("python/bin").join(name)))
}

/// Containers and hardened kernels often forbid it.
fn may_trace(strace: PathBuf) -> Result<PathBuf, String> {
    let tried = Command::new(&strace)
        .args(["-qq", "-e", "trace=none", "true"])
        .output();
    match tried {
        Ok(tried) if tried.status.success() => Ok(strace),
        Ok(tried) => {
            let said = String::from_utf8_lossy(&tried.stderr);
            Err(format!("strace may not trace here: {}", said.trim()))
        }
        Err(error) => Err(format!("strace does not run here: {error}")),
    }
}

/// So do they of user namespaces.
fn may_unshare(unshare: PathBuf) -> Result<PathBuf, String> {
    let tried = Command::new(&unshare)
        .args(["--user", "--map-root-user", "true"])
        .output();
    match tried {
        Ok(tried) if tried.status.success() => Ok(unshare),
        Ok(_) | Err(_) => Err("unshare makes no user namespace here".into()),
    }
}

fn file(path: PathBuf) -> Result<PathBuf, String> {
    match path.canonicalize() {
        Ok(path) => Ok(path),
        Err(_) => Err(format!("no {} on this machine", path.display())),
    }
}

fn program_directories() -> impl Iterator<Item = PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let path: Vec<_> = env::split_paths(&path).collect();
    path.into_iter()
        .chain(["/usr/local/sbin", "/usr/sbin"].map(PathBuf::from))
        .chain(iter::once_with(|| target().join("debian/bin")))
        .chain(iter::once_with(|| target().join("tools/bin")))
}

/// One file a test, so that running a test twice does not count it twice; `cargo xtask test`
/// counts and lists them.
fn note(kind: &str, name: &str, reason: &str) {
    let directory = target().join("not-run").join(kind);
    fs::create_dir_all(&directory)
        .and_then(|()| fs::write(directory.join(name), reason))
        .unwrap_or_else(|error| panic!("cannot note {name} in {}: {error}", directory.display()));
}

/// Cargo's target directory.
pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

fn workspace() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent()
        .expect("this crate is a directory of the workspace")
}
