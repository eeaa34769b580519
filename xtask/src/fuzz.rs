//! `cargo xtask fuzz`: the fuzz targets of `tests/fuzz`, under libFuzzer.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};

use crate::{command, programs, target, tools, workspace};

/// Memory of a target, in MiB. The parsers promise to need little more than their input.
const MEMORY_MIB_MAX: u32 = 512;

/// Time for one input, in seconds.
const INPUT_SECS_MAX: u32 = 10;

/// Fuzz the parsers of hostile input, one target after another.
///
/// Stable Rust and g++ suffice. The target directory keeps new inputs for the next run; `cargo xtask
/// test` replays those of tests/fuzz/corpus.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Names of fuzz targets, all if there is none
    targets: Vec<String>,
    /// Duration of each target's run in seconds
    #[arg(long, default_value_t = 600)]
    seconds: u32,
}

/// Runs the targets and prints the last line of each run. A finding ends the command.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let all = targets()?;
    for name in &arguments.targets {
        let known = all.join(", ");
        ensure!(
            all.contains(name),
            "unknown target `{name}`, expected one of: {known}"
        );
    }
    let chosen = match arguments.targets.as_slice() {
        [] => &all,
        chosen => chosen,
    };
    let target = target()?;
    tools::provide(&target, &["cargo-fuzz@0.13.2"])?;
    for name in chosen {
        fuzz(&target, name, arguments.seconds)?;
    }
    Ok(())
}

fn fuzz(target: &Path, name: &str, seconds: u32) -> anyhow::Result<()> {
    let work = target.join("fuzz/work").join(name);
    let (inputs, findings) = (work.join("inputs"), work.join("findings"));
    for directory in [&inputs, &findings] {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
    }
    let log = work.join("log");
    let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    eprintln!("{name}: {seconds} s; output in {}", log.display());

    // No sanitizer, which takes a nightly compiler; and the profile of the tests, which checks for
    // overflow and builds quickly.
    let mut fuzz = command(&["fuzz", "run", "--fuzz-dir", "tests/fuzz"]);
    fuzz.args(["-s", "none", "-D", "--features", "libfuzzer"]);
    fuzz.arg("--target-dir").arg(target.join("fuzz")).arg(name);
    fuzz.arg(&inputs).arg(corpora().join(name)).arg("--");
    fuzz.arg(format!("-max_total_time={seconds}"))
        .arg(format!("-timeout={INPUT_SECS_MAX}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB_MAX}"))
        .arg(format!("-artifact_prefix={}/", findings.display()))
        .env("PATH", programs::search_path(target)?)
        .stdout(output.try_clone()?)
        .stderr(output);
    let status = fuzz.status().context("cannot run cargo fuzz")?;

    let text = fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
    let text = String::from_utf8_lossy(&text);
    if let Some(input) = text.lines().find_map(finding) {
        bail!(
            "{name} failed; {} has the reason. Copy {input} to {}, where the test \
             of clamcast-fuzz replays it, and correct the code",
            log.display(),
            corpora().join(name).display()
        );
    }
    ensure!(
        status.success(),
        "{name} ended with {status}; see {}",
        log.display()
    );
    println!("{name}: {}", text.lines().next_back().unwrap_or_default());
    Ok(())
}

/// The input that libFuzzer wrote for a finding.
fn finding(line: &str) -> Option<&str> {
    let (_, input) = line.split_once("Test unit written to ")?;
    Some(input)
}

/// The names of all fuzz targets: each has a corpus.
fn targets() -> anyhow::Result<Vec<String>> {
    let entries = fs::read_dir(corpora()).context("cannot list the corpora")?;
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn corpora() -> PathBuf {
    workspace().join("tests/fuzz/corpus")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_told_from_the_rest_of_the_output() {
        let prefix = "artifact_prefix='findings/'; Test unit written to ";
        let line = format!("{prefix}findings/crash-0a");
        assert_eq!(finding(&line), Some("findings/crash-0a"));
        assert_eq!(finding("Done 10 runs in 1 second(s)"), None);
        assert!(targets().unwrap().contains(&"header".to_owned()));
    }
}
