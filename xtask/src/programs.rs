//! Programs that we run: where they are, and what they print.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};

/// Where a program is: on `PATH`, among the programs of the system, which an ordinary user may not
/// have on it, or in the target directory. The lab of `tests/` looks in the same places.
pub(crate) fn find(name: &str, target: &Path) -> Option<PathBuf> {
    directories(target)
        .map(|directory| directory.join(name))
        .find(|program| program.is_file())
}

/// `PATH` with all directories where [`find`] looks.
pub(crate) fn search_path(target: &Path) -> anyhow::Result<OsString> {
    Ok(env::join_paths(directories(target))?)
}

/// `debian/bin` has unpacked programs of Debian, `tools/bin` programs that cargo has built.
fn directories(target: &Path) -> impl Iterator<Item = PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let path: Vec<_> = env::split_paths(&path).collect();
    path.into_iter()
        .chain(["/usr/local/sbin", "/usr/sbin"].map(PathBuf::from))
        .chain(["debian/bin", "tools/bin"].map(|directory| target.join(directory)))
}

/// Runs a command whose output matters only if it fails.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    output(command).map(drop)
}

/// What a command prints. If it fails, the error has all of its output.
pub(crate) fn output(command: &mut Command) -> anyhow::Result<String> {
    let program = command.get_program().display().to_string();
    let ran = command.stdin(Stdio::null()).output();
    let ran = ran.with_context(|| format!("cannot run {program}; is it installed?"))?;
    let printed = String::from_utf8_lossy(&ran.stdout).into_owned();
    ensure!(
        ran.status.success(),
        "{program} failed: {printed}{}",
        String::from_utf8_lossy(&ran.stderr).trim_end()
    );
    Ok(printed)
}
