//! Checks of the packages: they are reproducible, and lintian and rpmlint find nothing.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};

use super::{Arguments, epoch, run};
use crate::programs::{output, search_path};
use crate::{finish, target, workspace};

/// Builds the packages into `target/dist` and lints them. Then builds them again and compares: with `long`,
/// in the release profile, from a copy of the sources in another directory.
pub(crate) fn packages(target: &Path, long: bool) -> anyhow::Result<()> {
    let out = target.join("dist");
    let again = target.join("dist-again");
    build(&out, !long)?;
    if long {
        let sources = target.join("again");
        copy_sources(&sources, "HEAD")?;
        let build = target.join("again-build");
        dist(&sources, &build, &again, &["--out"])?;
        parent(target)?;
    } else {
        build(&again, true)?;
    }
    let sums = |directory: &Path| fs::read_to_string(directory.join("SHA256SUMS"));
    let (first, second) = (sums(&out)?, sums(&again)?);
    ensure!(
        first == second,
        "two builds of the packages differ:\n{first}\n{second}"
    );
    lint(&out)
}

fn build(out: &Path, quick: bool) -> anyhow::Result<()> {
    run(&Arguments {
        out: Some(out.to_owned()),
        key: None,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        quick,
    })
}

/// Builds packages of the parent commit, as version 0.0.9, into `target/dist-old`: the test of an
/// upgrade begins with them. A parent that cannot build packages is left out.
fn parent(target: &Path) -> anyhow::Result<()> {
    let (sources, old) = (target.join("parent"), target.join("dist-old"));
    if old.exists() {
        fs::remove_dir_all(&old)?;
    }
    copy_sources(&sources, "HEAD^")?;
    if sources.join("xtask/src/dist.rs").exists() {
        let options = ["--quick", "--version", "0.0.9", "--out"];
        dist(&sources, &target.join("parent-build"), &old, &options)?;
    }
    Ok(())
}

/// The sources of a commit, in `directory`.
fn copy_sources(directory: &Path, commit: &str) -> anyhow::Result<()> {
    if directory.exists() {
        fs::remove_dir_all(directory)?;
    }
    fs::create_dir_all(directory)?;
    let mut git = Command::new("git");
    git.current_dir(workspace()).args(["archive", commit]);
    let mut git = git.stdout(Stdio::piped()).spawn()?;
    let archive = git.stdout.take().expect("it was piped");
    let mut tar = Command::new("tar");
    tar.arg("-x").arg("-C").arg(directory).stdin(archive);
    finish(&mut tar)?;
    ensure!(
        git.wait()?.success(),
        "cannot read commit {commit}; fetch it"
    );
    Ok(())
}

/// `cargo xtask dist` of a copy of the sources.
fn dist(sources: &Path, build: &Path, out: &Path, options: &[&str]) -> anyhow::Result<()> {
    let mut dist = Command::new("cargo");
    dist.current_dir(sources)
        .args(["xtask", "dist"])
        .args(options)
        .arg(out)
        .env("CARGO_TARGET_DIR", build)
        .env("SOURCE_DATE_EPOCH", epoch()?.to_string())
        .env("PATH", search_path(&target()?)?);
    finish(&mut dist).with_context(|| format!("cannot build packages in {}", sources.display()))
}

fn lint(out: &Path) -> anyhow::Result<()> {
    let with = |extension: &str| -> anyhow::Result<Vec<_>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(out)? {
            let path = entry?.path();
            if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
        found.sort();
        Ok(found)
    };
    let mut lintian = Command::new("lintian");
    lintian.args([
        "--allow-root",
        "--tag-display-limit",
        "0",
        "--fail-on",
        "error,warning",
    ]);
    let said = output(lintian.args(with("deb")?))
        .context("lintian found faults; correct them, or override them with a reason")?;
    eprint!("{said}");
    let mut rpmlint = Command::new("rpmlint");
    let configuration = workspace().join("xtask/package/rpmlint.toml");
    rpmlint.arg("--strict").arg("--config").arg(configuration);
    let said = output(rpmlint.args(with("rpm")?))
        .context("rpmlint found faults; correct them, or filter them with a reason")?;
    eprint!("{said}");
    Ok(())
}
