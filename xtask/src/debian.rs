//! Programs that tests and the demo run, from Debian's packages where the system does not have them.
//!
//! They are unpacked in `target/debian`: nothing outside the build changes, no
//! daemon starts, and an ordinary user can do it. apt works on lists and a cache of its own there,
//! and reads what is installed, so that it brings just the libraries that are not.
//! Only what checks packages is installed, by root.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};

use crate::programs::{find, run};

/// Each program that is run, and the package that has it.
pub(crate) const PROGRAMS: [(&str, &str); 7] = [
    ("clamd", "clamav-daemon"),
    ("clamscan", "clamav"),
    ("freshclam", "clamav-freshclam"),
    ("sigtool", "clamav"),
    ("rsync", "rsync"),
    ("rdiff", "rdiff"),
    ("strace", "strace"),
];

/// Programs of the tests of packages, and the package that has each. They work only where they are
/// installed.
const INSTALLED: [(&str, &str); 7] = [
    ("cpio", "cpio"),
    ("lintian", "lintian"),
    ("mmdebstrap", "mmdebstrap"),
    ("rpm", "rpm"),
    ("rpm2cpio", "rpm2cpio"),
    ("rpmlint", "rpmlint"),
    ("systemd-nspawn", "systemd-container"),
];

/// Installs those of the programs of the tests of packages that are not here, if root runs this. None
/// of them is a service.
pub(crate) fn install(target: &Path) -> anyhow::Result<()> {
    let missing: Vec<_> = INSTALLED
        .into_iter()
        .filter(|(name, _)| find(name, target).is_none())
        .map(|(_, package)| package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages = missing.join(" ");
    let advice = || format!("packages cannot be tested; run apt-get install {packages}");
    ensure!(nix::unistd::Uid::effective().is_root(), advice());
    eprintln!("installing {packages}");
    let apt = || {
        let mut apt = Command::new("apt-get");
        apt.env("DEBIAN_FRONTEND", "noninteractive").arg("--quiet");
        apt
    };
    let install = ["install", "--yes", "--no-install-recommends"];
    run(apt().arg("update"))
        .and_then(|()| run(apt().args(install).args(missing)))
        .with_context(advice)
}

/// Unpacks those of the programs `wanted` that [`find`] does not find. Fails with what to install.
pub(crate) fn provide(target: &Path, wanted: &[&str]) -> anyhow::Result<()> {
    let debian = target.join("debian");
    fs::create_dir_all(&debian)?;
    // Another run in this workspace may be at it.
    let lock = File::create(debian.join("lock"))?;
    lock.lock()?;
    // The master confines clamscan to its own file and the `lib` beside its directory, and so the
    // scripts find what they start there.
    let lib = debian.join("lib");
    if lib.symlink_metadata().is_err() {
        symlink("root", lib)?;
    }
    let missing: Vec<_> = PROGRAMS
        .into_iter()
        .filter(|(name, _)| wanted.contains(name) && find(name, target).is_none())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    packages.sort();
    packages.dedup();
    let names: Vec<_> = missing.iter().map(|(name, _)| *name).collect();
    eprintln!(
        "unpacking {} in {}, for {}",
        packages.join(", "),
        debian.display(),
        names.join(", ")
    );
    unpack(&debian, &packages).and_then(|()| link(&debian, &names)).with_context(|| {
        format!(
            "no {} here, and they could not be unpacked; install them (Debian: apt-get install {})",
            names.join(", "),
            packages.join(" "),
        )
    })
}

/// Gets `packages` and what they need that is not installed, and unpacks it in `debian/root`.
fn unpack(debian: &Path, packages: &[&str]) -> anyhow::Result<()> {
    let archives = debian.join("cache/archives");
    fs::create_dir_all(archives.join("partial"))?;
    fs::create_dir_all(debian.join("lists/partial"))?;
    // One of several sources that cannot be reached need not be the one that matters.
    if let Err(error) = run(apt(debian).arg("update")) {
        eprintln!("{error:#}; trying with the lists that are there");
    }
    run(apt(debian)
        .args([
            "install",
            "--download-only",
            "--yes",
            "--no-install-recommends",
        ])
        .args(packages))?;
    for archive in fs::read_dir(&archives)? {
        let archive = archive?;
        let name = archive.file_name();
        let name = name.to_string_lossy();
        // Programs start with the system's loader, which goes only with the system's own C library.
        if name.ends_with(".deb") && !name.starts_with("libc6_") {
            run(Command::new("dpkg")
                .arg("-x")
                .arg(archive.path())
                .arg(debian.join("root")))?;
        }
    }
    Ok(())
}

/// Makes a small script for each program, which starts it with the libraries beside it. Paths are
/// relative to the script, so that a target directory may be moved.
fn link(debian: &Path, names: &[&str]) -> anyhow::Result<()> {
    let bin = debian.join("bin");
    fs::create_dir_all(&bin)?;
    let libraries = library_directories(debian)?;
    let libraries = |debian: &str| {
        let paths: Vec<_> = libraries
            .iter()
            .map(|path| format!("{debian}/{path}"))
            .collect();
        paths.join(":")
    };
    let here = debian.display().to_string();
    for name in names {
        let programs = ["usr/bin", "usr/sbin"].map(|directory| format!("root/{directory}/{name}"));
        let program = programs
            .into_iter()
            .find(|program| debian.join(program).is_file());
        let program = program.with_context(|| format!("no {name} in the packages"))?;

        let mut ldd = Command::new("ldd");
        ldd.env("LD_LIBRARY_PATH", libraries(&here))
            .arg(debian.join(&program));
        let needs = ldd.output().context("cannot run ldd")?;
        let needs = String::from_utf8_lossy(&needs.stdout);
        let lacks: Vec<_> = needs
            .lines()
            .filter(|line| line.contains("not found"))
            .collect();
        ensure!(
            lacks.is_empty(),
            "{name} lacks libraries: {}",
            lacks.join(", ")
        );

        let script = format!(
            "#!/bin/sh\ndebian=${{0%/*}}/..\nexport LD_LIBRARY_PATH=\"{}\"\n\
             exec \"$debian/{program}\" \"$@\"\n",
            libraries("$debian"),
        );
        // Whole from the moment it has its name: the name says that all of it is there.
        let part = bin.join(format!("{name}.part"));
        fs::write(&part, script)?;
        fs::set_permissions(&part, fs::Permissions::from_mode(0o755))?;
        fs::rename(part, bin.join(name))?;
    }
    Ok(())
}

/// Where libraries were unpacked, relative to `debian`: `lib`, `usr/lib`, and in them what is for
/// one architecture, such as `x86_64-linux-gnu`.
fn library_directories(debian: &Path) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for parent in ["root/usr/lib", "root/lib"] {
        if !debian.join(parent).is_dir() {
            continue;
        }
        for entry in fs::read_dir(debian.join(parent))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.contains("-linux-") {
                found.push(format!("{parent}/{name}"));
            }
        }
        found.push(parent.into());
    }
    Ok(found)
}

/// apt-get with its state in `debian`.
fn apt(debian: &Path) -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive").arg("--quiet");
    let directory = |name: &str| debian.join(name).display().to_string();
    for option in [
        format!("Dir::State::Lists={}", directory("lists")),
        format!("Dir::Cache={}", directory("cache")),
        // We hold a lock, and an ordinary user may not take dpkg's.
        "Debug::NoLocking=1".into(),
        // The user `_apt`, as which root's apt-get would fetch, may not be let in here.
        "APT::Sandbox::User=root".into(),
        // A list that cannot be fetched is a failure to tell of, not just a warning.
        "APT::Update::Error-Mode=any".into(),
        "Acquire::Languages=none".into(),
        "Acquire::Retries=2".into(),
        "Acquire::http::Timeout=20".into(),
    ] {
        apt.args(["-o", &option]);
    }
    apt
}
