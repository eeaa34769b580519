//! `cargo xtask dist`: packages for Debian and RPM systems, and a tarball.

pub(crate) mod check;
mod tree;

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, ensure};

use crate::{command, finish, programs, target, tools, workspace};

/// The packages, each from the crate that its name ends with.
pub(crate) const PACKAGES: [&str; 3] = ["clamcast-agent", "clamcast-certs", "clamcast-master"];

/// The newest glibc that the packages may require: that of RHEL 9. Debian 12 has 2.36.
const GLIBC_MAX: (u32, u32) = (2, 34);

/// Tools that build packages; `cargo install` puts them into `target/tools` where they are missing.
const TOOLS: [&str; 3] = [
    "cargo-deb@3.8.0",
    "cargo-generate-rpm@0.21.1",
    "cargo-cyclonedx@0.5.9",
];

/// Build the packages (.deb, .rpm, .tar.gz) with an SBOM and SHA256SUMS.
///
/// The same sources, compiler, package builders and SOURCE_DATE_EPOCH give the same bytes.
/// SOURCE_DATE_EPOCH defaults to the time of the last commit. Missing package builders are installed into
/// the target directory.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Directory for the packages, which replace those of an earlier run [default: dist in the target
    /// directory]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Ed25519 private key (PEM) that signs SHA256SUMS
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// Version of the packages [default: that of the workspace]
    #[arg(long, value_name = "X.Y.Z", default_value = env!("CARGO_PKG_VERSION"))]
    version: String,
    /// Package binaries of the development profile, without an SBOM: for tests of the packages
    #[arg(long)]
    quick: bool,
}

/// Builds everything into the output directory, which holds nothing else afterwards.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let target = target()?;
    let out = match &arguments.out {
        Some(out) => std::path::absolute(out)?,
        None => target.join("dist"),
    };
    let build = Build {
        target: &target,
        epoch: epoch()?,
        version: &arguments.version,
    };
    provide(&target, arguments.quick)?;
    let binaries = build.binaries(arguments.quick)?;
    check_glibc(&binaries)?;
    let manual = build.manual()?;
    let trees = tree::stage(&build, &binaries, &manual)?;

    if out.exists() {
        let is_empty = fs::read_dir(&out)?.next().is_none();
        ensure!(
            is_empty || out.join("SHA256SUMS").exists(),
            "{} holds other files; name an empty directory",
            out.display()
        );
        fs::remove_dir_all(&out).with_context(|| format!("cannot replace {}", out.display()))?;
    }
    fs::create_dir_all(&out)?;
    for package in PACKAGES {
        build.deb(package, &out)?;
        build.rpm(package, &out)?;
    }
    build.tarball(&trees, &out)?;
    if !arguments.quick {
        build.sbom(&out)?;
    }
    sums(&out)?;
    if let Some(key) = &arguments.key {
        sign(&out, key)?;
    }
    println!("packages in {}", out.display());
    Ok(())
}

/// Installs the package builders.
pub(crate) fn provide(target: &Path, quick: bool) -> anyhow::Result<()> {
    tools::provide(target, if quick { &TOOLS[..2] } else { &TOOLS })
}

/// What all steps need to know.
struct Build<'a> {
    target: &'a Path,
    /// SOURCE_DATE_EPOCH, seconds.
    epoch: u64,
    version: &'a str,
}

impl Build<'_> {
    /// Where the package builders expect the trees. Both replace `target/release` in an asset by the
    /// real target directory.
    fn stage(&self) -> PathBuf {
        self.target.join("release/package")
    }

    /// The programs of the packages, with their symbols stripped.
    fn binaries(&self, quick: bool) -> anyhow::Result<PathBuf> {
        let mut build = command(&["build", "--locked", "--bins"]);
        for package in PACKAGES {
            build.args(["--package", package]);
        }
        let from = if quick {
            build.arg("--target-dir").arg(self.target);
            self.target.join("debug")
        } else {
            // Flags of its own need a directory of its own, or the other builds would start over.
            let directory = self.target.join("dist-build");
            reproducible(&mut build, &directory)?;
            build
                .args(["--release", "--target-dir"])
                .arg(&directory)
                .env("SOURCE_DATE_EPOCH", self.epoch.to_string());
            directory.join("release")
        };
        finish(&mut build).context("cannot build the programs")?;
        let into = self.stage().join("bin");
        fs::create_dir_all(&into)?;
        for package in PACKAGES {
            let mut strip = Command::new("strip");
            strip.arg("--strip-all").arg("-o").arg(into.join(package));
            programs::run(strip.arg(from.join(package)))?;
        }
        Ok(into)
    }

    /// Manual pages, completions and example configurations.
    fn manual(&self) -> anyhow::Result<PathBuf> {
        let manual = self.stage().join("manual");
        if manual.exists() {
            fs::remove_dir_all(&manual)?;
        }
        let mut date = Command::new("date");
        let date = programs::output(
            date.args(["--utc", "+%Y-%m-%d", "-d"])
                .arg(format!("@{}", self.epoch)),
        )?;
        let mut run = command(&["run", "--quiet", "--locked", "--package", "clamcast-manual"]);
        run.arg("--target-dir").arg(self.target);
        finish(run.arg("--").arg(&manual).arg(date.trim()))?;
        Ok(manual)
    }

    fn deb(&self, package: &str, out: &Path) -> anyhow::Result<()> {
        let mut deb = self.builder("cargo-deb")?;
        deb.args([
            "deb",
            "--no-build",
            "--no-strip",
            "--quiet",
            "--package",
            package,
        ])
        .args(["--deb-version", &format!("{}-1", self.version), "--output"]);
        programs::run(deb.arg(out)).with_context(|| format!("cannot package {package}"))
    }

    fn rpm(&self, package: &str, out: &Path) -> anyhow::Result<()> {
        let directory = package.strip_prefix("clamcast-").unwrap_or(package);
        let mut rpm = self.builder("cargo-generate-rpm")?;
        rpm.args(["generate-rpm", "--package", directory, "--set-metadata"])
            .arg(format!("version = \"{}\"", self.version))
            .args(["--source-date", &self.epoch.to_string(), "--output"]);
        programs::run(rpm.arg(out)).with_context(|| format!("cannot package {package} as rpm"))
    }

    fn builder(&self, tool: &str) -> anyhow::Result<Command> {
        let program = programs::find(tool, self.target).context("it was installed")?;
        let mut builder = Command::new(program);
        builder
            .current_dir(workspace())
            .env("CARGO_TARGET_DIR", self.target)
            .env("SOURCE_DATE_EPOCH", self.epoch.to_string());
        Ok(builder)
    }

    /// All three trees in one archive, to be unpacked at the root of a host.
    fn tarball(&self, trees: &Path, out: &Path) -> anyhow::Result<()> {
        let name = format!("clamcast-{}-{}.tar.gz", self.version, env::consts::ARCH);
        let whole = self.stage().join("whole");
        if whole.exists() {
            fs::remove_dir_all(&whole)?;
        }
        for package in PACKAGES {
            let mut copy = Command::new("cp");
            copy.arg("-a")
                .arg(trees.join(package))
                .arg("-T")
                .arg(&whole);
            programs::run(&mut copy)?;
        }
        let archive = File::create(out.join(&name))?;
        let mut tar = Command::new("tar");
        tar.args([
            "--create",
            "--sort=name",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
        ])
        .arg(format!("--mtime=@{}", self.epoch))
        .args([
            "--use-compress-program=gzip --best --no-name",
            "--directory",
        ])
        .arg(&whole)
        .arg(".");
        programs::run(tar.stdout(archive))
    }

    /// A CycloneDX bill of materials for each program.
    fn sbom(&self, out: &Path) -> anyhow::Result<()> {
        let mut cyclonedx = self.builder("cargo-cyclonedx")?;
        cyclonedx.args(["cyclonedx", "--format", "json", "--all"]);
        programs::run(cyclonedx.arg("--quiet"))?;
        // The tool writes a file into the directory of each crate, and names crates by their paths.
        let here = format!("path+file://{}", workspace().display());
        for directory in [workspace().to_owned(), workspace().join("xtask")] {
            for entry in fs::read_dir(directory)? {
                let Ok(files) = fs::read_dir(entry?.path()) else {
                    continue; // a file
                };
                for file in files {
                    let from = file?.path();
                    let name = from.file_name().unwrap_or_default().to_string_lossy();
                    let Some(name) = name.strip_suffix(".cdx.json") else {
                        continue;
                    };
                    if PACKAGES.contains(&name) {
                        let text = fs::read_to_string(&from)?;
                        let text = text.replace(&here, "path+file:///usr/src/clamcast");
                        fs::write(out.join(format!("{name}-{}.cdx.json", self.version)), text)?;
                    }
                    fs::remove_file(&from)?;
                }
            }
        }
        Ok(())
    }
}

/// SOURCE_DATE_EPOCH, or the time of the last commit, or outside a git checkout that of the changelog.
fn epoch() -> anyhow::Result<u64> {
    if let Ok(epoch) = env::var("SOURCE_DATE_EPOCH") {
        return epoch
            .parse()
            .context("SOURCE_DATE_EPOCH is not a number of seconds");
    }
    let mut git = Command::new("git");
    git.args(["log", "-1", "--format=%ct"])
        .current_dir(workspace());
    if let Ok(epoch) = programs::output(&mut git) {
        return epoch.trim().parse().context("git names no time");
    }
    let changed = fs::metadata(workspace().join("CHANGELOG.md"))?.modified()?;
    Ok(changed.duration_since(SystemTime::UNIX_EPOCH)?.as_secs())
}

/// Keeps the paths of this machine out of the programs.
fn reproducible(build: &mut Command, directory: &Path) -> anyhow::Result<()> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| env::home_dir().map(|home| home.join(".cargo")));
    let home = home.context("neither CARGO_HOME nor HOME is set")?;
    let prefixes = [
        (workspace(), "/usr/src/clamcast"),
        (directory, "/usr/src/build"),
        (home.as_path(), "/usr/src/cargo"),
    ];
    let flags = |flag: &str| {
        let one = |(from, to): &(&Path, &str)| format!("{flag}{}={to}", from.display());
        prefixes.iter().map(one).collect::<Vec<_>>()
    };
    build
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            flags("--remap-path-prefix=").join("\x1f"),
        )
        .env("CFLAGS", flags("-ffile-prefix-map=").join(" "));
    Ok(())
}

/// Fails if a program needs a newer glibc than [`GLIBC_MAX`].
fn check_glibc(binaries: &Path) -> anyhow::Result<()> {
    for package in PACKAGES {
        let mut objdump = Command::new("objdump");
        let symbols = programs::output(objdump.arg("--dynamic-syms").arg(binaries.join(package)))
            .context("cannot run objdump; install binutils")?;
        // A weak symbol may be absent.
        let strong = symbols.lines().filter(|line| !line.contains("  w "));
        let versions = strong.filter_map(|line| {
            let (_, version) = line.split_once("GLIBC_")?;
            let version: String = version
                .chars()
                .take_while(|c| *c != ')' && *c != ' ')
                .collect();
            let mut numbers = version.split('.').map_while(|number| number.parse().ok());
            Some((numbers.next()?, numbers.next().unwrap_or(0)))
        });
        let newest = versions.max().unwrap_or((0, 0));
        ensure!(
            newest <= GLIBC_MAX,
            "{package} needs glibc {}.{}, and RHEL 9 has {}.{}; build on Debian 12 or RHEL 9",
            newest.0,
            newest.1,
            GLIBC_MAX.0,
            GLIBC_MAX.1
        );
        eprintln!("{package}: needs glibc {}.{}", newest.0, newest.1);
    }
    Ok(())
}

/// Writes SHA256SUMS, in the format of sha256sum.
fn sums(out: &Path) -> anyhow::Result<()> {
    let mut names: Vec<_> = fs::read_dir(out)?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<anyhow::Result<_>>()?;
    names.sort();
    let mut sha256sum = Command::new("sha256sum");
    let sums = programs::output(sha256sum.current_dir(out).args(names))?;
    fs::write(out.join("SHA256SUMS"), sums)?;
    Ok(())
}

/// Writes the Ed25519 signature of SHA256SUMS, 64 raw bytes.
fn sign(out: &Path, key: &Path) -> anyhow::Result<()> {
    let key = std::path::absolute(key)?;
    let mut openssl = Command::new("openssl");
    openssl
        .current_dir(out)
        .args([
            "pkeyutl",
            "-sign",
            "-rawin",
            "-in",
            "SHA256SUMS",
            "-out",
            "SHA256SUMS.sig",
            "-inkey",
        ])
        .arg(&key);
    programs::run(&mut openssl).with_context(|| {
        format!(
            "cannot sign; is {} an Ed25519 private key in PEM?",
            key.display()
        )
    })?;
    let signature = fs::metadata(out.join("SHA256SUMS.sig"))?;
    ensure!(
        signature.len() == 64,
        "{} is not an Ed25519 key",
        key.display()
    );
    Ok(())
}
