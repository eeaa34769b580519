//! `cargo xtask test`: everything that has to hold before a change is done.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;
use std::{env, fs, io, iter};

use anyhow::{Context, bail, ensure};

use crate::{cargo, command, debian, dist, finish, programs, target, tools, workspace};

/// Format, lints, documentation, packages and all tests.
///
/// Programs that tests run and that are not here (clamd, freshclam, rsync ...) are unpacked from
/// Debian's packages in the target directory, and cargo-deny and the package builders are built there.
/// Root also installs what checks packages (lintian, rpm, rpmlint, mmdebstrap, systemd-nspawn).
/// Tests that need what is still not here are skipped, counted and listed; with CI=true they fail.
/// Where CLAMCAST_ADVISORY_DB names a copy of RustSec's advisory database, cargo-audit runs, too.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Also run the tests that are too slow for every run
    #[arg(long)]
    long: bool,
}

/// Runs all steps; the first that fails is the last.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let started = Instant::now();
    let target = target()?;
    step("format", || {
        cargo(&["fmt", "--all", "--check"]).context("run `cargo fmt --all`, or install rustfmt")
    })?;
    step("programs that tests run", || {
        let wanted = debian::PROGRAMS.map(|(name, _)| name);
        is_here(debian::provide(&target, &wanted)).map(drop)
    })?;
    let mut judges = vec!["cargo-deny"];
    if env::var_os("CLAMCAST_ADVISORY_DB").is_some() {
        judges.push("cargo-audit");
    }
    step("crates", || {
        // Also those of other systems, which the judges of our dependencies read without a network.
        cargo(&["fetch", "--locked"]).context("cannot download the crates of Cargo.lock")
    })?;
    step("tools that tests run", || {
        is_here(tools::provide(&target, &judges)).map(drop)
    })?;
    step("clippy", || {
        cargo(&[
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ])
        .context("mend what clippy found, or install clippy")
    })?;
    step("documentation", || {
        let mut doc = command(&["doc", "--workspace", "--no-deps"]);
        finish(doc.env("RUSTDOCFLAGS", "-D warnings")).context("mend what rustdoc found")
    })?;
    step("packages", || {
        let builders = || dist::provide(&target, !arguments.long);
        match is_here(debian::install(&target).and_then(|()| builders()))? {
            Some(()) => dist::check::packages(&target, arguments.long),
            None => Ok(()),
        }
    })?;
    step("manual, playbooks, containers", || {
        let mdbook = tools::provide(&target, &["mdbook@0.5.4"]);
        match is_here(mdbook.and_then(|()| tools::python(&target, arguments.long)))? {
            Some(python) => manual(&target, python),
            None => Ok(()),
        }
    })?;
    let not_run = target.join("not-run");
    if not_run.exists() {
        fs::remove_dir_all(&not_run).context("cannot forget what an earlier run skipped")?;
    }
    step("tests", || {
        tests(arguments, &target).context("mend the tests that failed")
    })?;
    report(&not_run)?;
    println!("all of it passed in {} s", started.elapsed().as_secs());
    Ok(())
}

/// What a step needs, if it could be provided. Outside CI the step is skipped without it.
fn is_here<T>(provided: anyhow::Result<T>) -> anyhow::Result<Option<T>> {
    match provided {
        Err(error) if env::var_os("CI").is_none_or(|ci| ci != "true") => {
            eprintln!("{error:#}\nwhat needs it will be skipped");
            Ok(None)
        }
        provided => provided.map(Some),
    }
}

/// Builds the manual without warnings, and checks its links and messages, the Ansible collection, and
/// the Kubernetes example.
fn manual(target: &Path, python: PathBuf) -> anyhow::Result<()> {
    finish(&mut here("docs/check")).context("mend the manual")?;
    let mut mdbook = Command::new(programs::find("mdbook", target).context("it was installed")?);
    mdbook
        .args(["build", "docs", "--dest-dir"])
        .arg(target.join("manual"))
        .env("MDBOOK_LOG", "warn")
        .current_dir(workspace());
    let built = mdbook.output().context("cannot run mdbook")?;
    // A warning is no failure to mdbook.
    let said = String::from_utf8_lossy(&built.stderr);
    ensure!(
        built.status.success() && said.trim().is_empty(),
        "mdbook: {said}"
    );
    let found = programs::search_path(target)?;
    let programs = iter::once(python).chain(env::split_paths(&found));
    let path = env::join_paths(programs.collect::<Vec<_>>())?;
    let mut lint = here("tests/ansible/play");
    lint.arg("lint").env("WORK", target.join("ansible"));
    finish(lint.env("PATH", &path)).context("mend what ansible-lint found")?;
    let mut kubernetes = here("tests/kubernetes/check");
    kubernetes.arg(target.join("debug/clamcast-master"));
    finish(kubernetes.env("PATH", &path)).context("mend the Kubernetes example")
}

/// A program of the project.
fn here(program: &str) -> Command {
    let mut command = Command::new(workspace().join(program));
    command.current_dir(workspace()).stdin(Stdio::null());
    command
}

fn step(name: &str, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    eprintln!("\n== {name}");
    let started = Instant::now();
    work().with_context(|| format!("step `{name}` failed"))?;
    eprintln!("== {name}: {} s", started.elapsed().as_secs());
    Ok(())
}

/// All tests, by nextest where it is installed: it runs them side by side. It leaves out the
/// examples in the documentation, so that they go first, and its summary comes last.
fn tests(arguments: &Arguments, target: &Path) -> anyhow::Result<()> {
    let prepare = |mut test: Command| -> anyhow::Result<Command> {
        test.env("PATH", programs::search_path(target)?)
            .env("CARGO_TARGET_DIR", target);
        test.env("CLAMCAST_LONG", if arguments.long { "1" } else { "0" });
        let parent = target.join("dist-old");
        if parent.exists() {
            test.env("CLAMCAST_DIST_OLD", parent);
        }
        Ok(test)
    };
    let nextest = Command::new("cargo")
        .args(["nextest", "--version"])
        .output();
    if nextest.is_ok_and(|nextest| nextest.status.success()) {
        finish(&mut prepare(command(&["test", "--workspace", "--doc"]))?)?;
        finish(&mut prepare(command(&[
            "nextest",
            "run",
            "--workspace",
            "--no-fail-fast",
        ]))?)
    } else {
        sum_up(prepare(command(&[
            "test",
            "--workspace",
            "--no-fail-fast",
        ]))?)
    }
}

/// Runs `cargo test`, which ends with one summary for each program, and adds these up.
fn sum_up(mut test: Command) -> anyhow::Result<()> {
    let mut child = test
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let output = child.stdout.take().expect("it was piped");
    let (mut passed, mut failed) = (0, 0);
    for line in BufReader::new(output).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        println!("{line}");
        // test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; ...
        let words: Vec<_> = line
            .split([' ', ';'])
            .filter(|word| !word.is_empty())
            .collect();
        if let ["test", "result:", _, good, "passed", bad, "failed", ..] = words[..] {
            passed += good.parse::<usize>()?;
            failed += bad.parse::<usize>()?;
        }
    }
    let status = child.wait()?;
    println!(
        "\nSummary: {} tests run: {passed} passed, {failed} failed",
        passed + failed
    );
    if !status.success() {
        bail!("cargo test ended with {status}");
    }
    Ok(())
}

/// Counts and lists the tests that passed without having run: the lab of `tests/` leaves a file
/// for each, named as the test, with the reason in it.
fn report(not_run: &Path) -> anyhow::Result<()> {
    let skipped = names(&not_run.join("skipped"))?;
    println!(
        "\ntests skipped for what this machine lacks: {}",
        skipped.len()
    );
    for name in &skipped {
        let reason = fs::read_to_string(not_run.join("skipped").join(name))?;
        println!("  {name}: {reason}");
    }
    let long = names(&not_run.join("long"))?;
    if !long.is_empty() {
        let count = long.len();
        println!("long tests left out: {count} (`cargo xtask test --long` runs them)");
    }
    Ok(())
}

fn names(directory: &Path) -> anyhow::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("cannot list {}", directory.display()))?,
    };
    let mut names = entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}
