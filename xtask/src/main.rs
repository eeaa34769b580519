//! `cargo xtask`: what developers and CI run.

mod debian;
mod demo;
mod dist;
mod fuzz;
mod imports;
mod programs;
mod source;
mod test;
mod tools;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::{env, path};

use anyhow::{Context, bail};
use clap::Parser;

/// What developers and CI run.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Xtask {
    Demo(demo::Arguments),
    Dist(dist::Arguments),
    Fuzz(fuzz::Arguments),
    Imports(imports::Arguments),
    Test(test::Arguments),
}

fn main() -> ExitCode {
    let done = match Xtask::parse() {
        Xtask::Demo(arguments) => demo::run(&arguments),
        Xtask::Dist(arguments) => dist::run(&arguments),
        Xtask::Fuzz(arguments) => fuzz::run(&arguments),
        Xtask::Imports(arguments) => imports::run(&arguments),
        Xtask::Test(arguments) => test::run(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\ncargo xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The root of the workspace.
fn workspace() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent()
        .expect("xtask is a directory of the workspace")
}

/// Cargo's target directory. What we start is told, too, since it may run in another directory.
fn target() -> anyhow::Result<PathBuf> {
    let target = env::var_os("CARGO_TARGET_DIR");
    Ok(path::absolute(target.map_or_else(
        || workspace().join("target"),
        PathBuf::from,
    ))?)
}

fn cargo(arguments: &[&str]) -> anyhow::Result<()> {
    finish(&mut command(arguments))
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command
        .args(arguments)
        .current_dir(workspace())
        .stdin(Stdio::null());
    command
}

fn finish(command: &mut Command) -> anyhow::Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status();
    let status = status.with_context(|| format!("cannot run {program}"))?;
    if !status.success() {
        bail!("{program} ended with {status}");
    }
    Ok(())
}
