//! Replays the corpora of the fuzz targets.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clamcast_fuzz::{TARGETS, Target};

/// Longest time for one input. The slowest takes some milliseconds.
const INPUT_TIME_MAX: Duration = Duration::from_secs(10);

#[test]
fn every_input_of_the_corpora_holds_and_each_target_reaches_both_outcomes() {
    for (name, run) in TARGETS {
        let mut outcomes = BTreeSet::new();
        for file in files(&corpus(name)) {
            let bytes = fs::read(&file).expect("the corpus can be read");
            println!("{}", file.display()); // the last line of a failure
            let started = Instant::now();
            outcomes.insert(run(&bytes));
            let took = started.elapsed();
            assert!(took < INPUT_TIME_MAX, "{} took {took:?}", file.display());
        }
        assert!(outcomes.contains(&true), "{name}: no input is accepted");
        assert!(outcomes.contains(&false), "{name}: no input is refused");
    }
}

#[test]
fn every_target_has_a_corpus_and_every_corpus_a_target() {
    let names = |path: &str| -> BTreeSet<String> {
        let files = files(&root().join(path));
        let stems = files.iter().filter_map(|file| file.file_stem());
        stems
            .map(|stem| stem.to_string_lossy().into_owned())
            .collect()
    };
    let targets = TARGETS.map(|(name, _): Target| name.to_owned());
    let targets = BTreeSet::from(targets);
    assert_eq!(names("corpus"), targets);
    assert_eq!(names("fuzz_targets"), targets);
}

/// A corpus is part of every checkout and of every test run.
#[test]
fn the_corpora_are_small() {
    let mut bytes = 0;
    for (name, _) in TARGETS {
        let files = files(&corpus(name));
        assert!(files.len() <= 70, "{name} has {} inputs", files.len());
        let length = |file: &PathBuf| fs::metadata(file).expect("it is there").len();
        bytes += files.iter().map(length).sum::<u64>();
    }
    assert!(bytes <= 200 << 10, "the corpora have {bytes} bytes");
}

fn corpus(target: &str) -> PathBuf {
    root().join("corpus").join(target)
}

/// The entries of a directory, sorted.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory);
    let entries = entries.unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut files: Vec<_> = entries
        .map(|entry| entry.expect("the directory can be read").path())
        .collect();
    files.sort();
    files
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
