//! Tools from crates.io: `cargo install` puts them into `target/tools` where the system lacks them.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::{command, finish};

/// Where `tool` is: on `PATH`, or in `target/tools`. The lab of `tests/` looks in the same places.
pub(crate) fn find(target: &Path, tool: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain([target.join("tools/bin")])
        .map(|directory| directory.join(tool))
        .find(|program| program.is_file())
}

/// Installs those of the tools `wanted` that [`find`] does not find. They are built without much
/// optimisation: each takes two cores one to three minutes.
pub(crate) fn provide(target: &Path, wanted: &[&str]) -> anyhow::Result<()> {
    for tool in wanted {
        if find(target, tool).is_none() {
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
