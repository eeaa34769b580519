//! Checks of the packages: they are reproducible, and lintian and rpmlint find nothing.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};

use super::{Arguments, output, run};
use crate::workspace;

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
    lint(&out)
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
