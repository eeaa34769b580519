//! Checks of the packages: they are reproducible, and lintian and rpmlint find nothing.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};

use super::{Arguments, output, run};
use crate::{finish, tools, workspace};

/// Builds the packages into `target/dist`, twice, and lints them. `long` takes the release profile.
pub(crate) fn packages(target: &Path, long: bool) -> anyhow::Result<()> {
    let out = target.join("dist");
    let again = target.join("dist-again");
    for directory in [&again, &out] {
        run(&Arguments {
            out: Some(directory.clone()),
            key: None,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            quick: !long,
        })?;
    }
    let sums = |directory: &Path| fs::read_to_string(directory.join("SHA256SUMS"));
    let (first, second) = (sums(&again)?, sums(&out)?);
    ensure!(
        first == second,
        "two builds of the packages differ:\n{first}\n{second}"
    );
    fs::remove_dir_all(&again)?;
    if long {
        parent(target)?;
    }
    lint(&out)
}

/// Builds packages of the parent commit, as version 0.0.9, into `target/dist-old`: the test of an
/// upgrade begins with them. A parent that cannot build packages is left out.
fn parent(target: &Path) -> anyhow::Result<()> {
    let sources = target.join("parent");
    let git = |arguments: &[&str]| {
        let mut git = Command::new("git");
        output(git.arg("-C").arg(workspace()).args(arguments))
    };
    let place = sources.to_string_lossy();
    if sources.exists() {
        git(&["worktree", "remove", "--force", &place])?;
    }
    git(&["worktree", "add", "--force", "--detach", &place, "HEAD^"])
        .context("the upgrade test needs the parent commit; fetch it")?;
    if sources.join("xtask/src/dist.rs").exists() {
        let mut dist = Command::new("cargo");
        dist.current_dir(&sources)
            .args(["xtask", "dist", "--quick", "--version", "0.0.9", "--out"])
            .arg(target.join("dist-old"))
            .env("CARGO_TARGET_DIR", target.join("parent-build"))
            .env("PATH", tools::search_path(target)?);
        finish(&mut dist).context("cannot build the packages of the parent commit")?;
    }
    git(&["worktree", "remove", "--force", &place])?;
    Ok(())
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
        "--no-tag-display-limit",
        "--fail-on",
        "error,warning",
    ]);
    let said = output(lintian.args(with("deb")?)).context("mend what lintian found")?;
    eprint!("{said}");
    let mut rpmlint = Command::new("rpmlint");
    let configuration = workspace().join("xtask/package/rpmlint.toml");
    rpmlint.arg("--strict").arg("--config").arg(configuration);
    let said = output(rpmlint.args(with("rpm")?)).context("mend what rpmlint found")?;
    eprint!("{said}");
    Ok(())
}
