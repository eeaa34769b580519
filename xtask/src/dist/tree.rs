//! The files of each package, as they are on a host.

use std::fs::{self, File, FileTimes};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;

use super::{Build, PACKAGES};
use crate::programs::{output, run};
use crate::workspace;

/// Directories of a package's sources, in the crate's `package` directory, and their place on a host.
const SOURCES: [(&str, &str); 6] = [
    ("systemd", "usr/lib/systemd/system"),
    ("sysusers.d", "usr/lib/sysusers.d"),
    ("tmpfiles.d", "usr/lib/tmpfiles.d"),
    ("sysctl.d", "usr/lib/sysctl.d"),
    ("libexec", "usr/lib/clamcast"),
    ("apparmor", "usr/share/doc/PACKAGE/examples/apparmor"),
];

/// Directories of the generated manual, and their place on a host.
const MANUAL: [(&str, &str); 6] = [
    ("man1", "usr/share/man/man1"),
    ("man5", "usr/share/man/man5"),
    ("bash", "usr/share/bash-completion/completions"),
    ("zsh", "usr/share/zsh/vendor-completions"),
    ("fish", "usr/share/fish/vendor_completions.d"),
    ("examples", "usr/share/doc/PACKAGE/examples"),
];

/// Builds one tree for each package; returns the directory that holds them.
pub(super) fn stage(build: &Build<'_>, binaries: &Path, manual: &Path) -> anyhow::Result<PathBuf> {
    let trees = build.stage().join("tree");
    if trees.exists() {
        fs::remove_dir_all(&trees)?;
    }
    for package in PACKAGES {
        let tree = trees.join(package);
        let (_, directory) = package.split_once('-').expect("the name of a package");
        let sources = workspace().join(directory).join("package");
        copy(&binaries.join(package), &tree.join("usr/bin").join(package))?;
        for (from, to) in SOURCES {
            copy_all(
                &sources.join(from),
                &tree.join(to.replace("PACKAGE", package)),
            )?;
        }
        for (from, to) in MANUAL {
            let from = manual.join(package).join(from);
            copy_all(&from, &tree.join(to.replace("PACKAGE", package)))?;
        }
        let doc = tree.join("usr/share/doc").join(package);
        let licenses = tree.join("usr/share/licenses").join(package);
        for license in ["LICENSE-APACHE", "LICENSE-MIT"] {
            copy(&workspace().join(license), &licenses.join(license))?;
        }
        copy(&workspace().join("CHANGELOG.md"), &doc.join("changelog"))?;
        fs::write(
            doc.join("changelog.Debian"),
            debian_changelog(build, package)?,
        )?;
        compress(&tree)?;
        // lintian looks for it under the name of the package, without an extension.
        let overrides = sources.join("lintian-overrides");
        if overrides.exists() {
            copy(
                &overrides,
                &tree.join("usr/share/lintian/overrides").join(package),
            )?;
        }
        date(&tree, build.epoch)?;
    }
    Ok(trees)
}

/// The entry of this version; `CHANGELOG.md` says what changed.
fn debian_changelog(build: &Build<'_>, package: &str) -> anyhow::Result<String> {
    let mut date = Command::new("date");
    date.args(["--utc", "--rfc-email", "-d"])
        .arg(format!("@{}", build.epoch));
    Ok(format!(
        "{package} ({}-1) unstable; urgency=medium\n\n  \
         * See /usr/share/doc/{package}/changelog.gz.\n\n \
         -- The clamcast authors <clamcast@packages.invalid>  {}",
        build.version,
        output(&mut date)?
    ))
}

fn copy_all(from: &Path, into: &Path) -> anyhow::Result<()> {
    if !from.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        copy(&entry.path(), &into.join(entry.file_name()))?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let parent = to.parent().expect("a file is in a directory");
    fs::create_dir_all(parent)?;
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    let is_program = ["bin", "clamcast"]
        .iter()
        .any(|directory| parent.ends_with(directory));
    let mode = if is_program { 0o755 } else { 0o644 };
    fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
    Ok(())
}

/// Compresses manual pages and changelogs, as both kinds of distributions expect.
fn compress(tree: &Path) -> anyhow::Result<()> {
    for path in files(tree)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_page = path.parent().is_some_and(|parent| {
            parent
                .parent()
                .is_some_and(|above| above.ends_with("share/man"))
        });
        if is_page || name.starts_with("changelog") {
            let mut gzip = Command::new("gzip");
            run(gzip.args(["--best", "--no-name"]).arg(&path))?;
        }
    }
    Ok(())
}

/// Gives every file the time `epoch`.
fn date(tree: &Path, epoch: u64) -> anyhow::Result<()> {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(epoch);
    for path in files(tree)? {
        let times = FileTimes::new().set_modified(time).set_accessed(time);
        File::open(path)?.set_times(times)?;
    }
    Ok(())
}

/// All files below `directory`.
fn files(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else {
            found.push(path);
        }
    }
    Ok(found)
}
