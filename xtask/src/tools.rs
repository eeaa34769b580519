//! Tools from crates.io: `cargo install` puts them into `target/tools` where the system lacks them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::programs::find;
use crate::{command, finish};

/// Installs those of the tools `wanted` (`NAME` or `NAME@VERSION`) that [`find`] does not find. They
/// are built without much optimisation: each takes two cores one to three minutes.
pub(crate) fn provide(target: &Path, wanted: &[&str]) -> anyhow::Result<()> {
    for tool in wanted {
        let name = tool.split('@').next().unwrap_or(tool);
        if find(name, target).is_none() {
            eprintln!("building {tool}");
            let mut install = command(&["install", tool, "--locked", "--quiet", "--root"]);
            install
                .arg(target.join("tools"))
                .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
                .env("CARGO_PROFILE_RELEASE_LTO", "off")
                .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
                .env("CARGO_PROFILE_RELEASE_DEBUG", "0");
            finish(&mut install).with_context(|| format!("cannot install {tool}"))?;
        }
    }
    Ok(())
}

/// Programs from PyPI that check playbooks and the Kubernetes example, at versions that they pass, and
/// the updater cvdupdate, which tests run.
const PYTHON: [&str; 5] = [
    "ansible-core==2.19.*",
    "ansible-lint==26.*",
    "cvdupdate==1.2.0",
    "dockerfile-parse==2.0.1",
    "kubernetes-validate==1.37.0",
];

/// The package with the collections that `--long` tests of the playbooks need.
const COLLECTIONS: &str = "ansible==12.*";

/// Installs [`PYTHON`] into a virtual environment below the target directory, and with `long` also
/// [`COLLECTIONS`]. Returns the directory of its programs.
pub(crate) fn python(target: &Path, long: bool) -> anyhow::Result<PathBuf> {
    let environment = target.join("python");
    let bin = environment.join("bin");
    let mut packages = PYTHON.to_vec();
    packages.extend(long.then_some(COLLECTIONS));
    // Written last: an interrupted install is repeated.
    let installed = environment.join("installed");
    let wanted = packages.join("\n");
    if fs::read_to_string(&installed).is_ok_and(|found| found == wanted) {
        return Ok(bin);
    }
    eprintln!("installing {} from PyPI", packages.join(", "));
    let mut venv = Command::new("python3");
    venv.args(["-m", "venv"]).arg(&environment);
    finish(&mut venv).context("install python3-venv")?;
    let mut pip = Command::new(bin.join("pip"));
    pip.args(["install", "--quiet", "--disable-pip-version-check"]);
    finish(pip.args(packages))?;
    fs::write(installed, wanted)?;
    Ok(bin)
}
