//! Rules that no compiler holds: who may depend on whom, and what may stand in a file.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use clamcast_tests::lab::Part;
use clamcast_tests::require;
use serde_json::Value;

#[path = "../../xtask/src/source.rs"]
mod source;

use source::{Source, sources};

#[test]
fn crates_depend_only_in_the_direction_of_the_map() {
    let metadata = cargo(&["metadata", "--no-deps", "--format-version=1"]);
    let metadata: Value = serde_json::from_str(&metadata).expect("cargo writes JSON");
    let packages = metadata["packages"].as_array().expect("there are packages");
    let names: Vec<_> = packages
        .iter()
        .filter_map(|package| package["name"].as_str())
        .collect();
    for package in packages {
        let name = package["name"].as_str().expect("a package has a name");
        let dependencies = package["dependencies"].as_array().expect("it has a list");
        for dependency in dependencies {
            let on = dependency["name"]
                .as_str()
                .expect("a dependency has a name");
            let allowed = match name {
                "clamcast-proto" | "xtask" => false,
                "clamcast-daemon" => on == "clamcast-proto",
                "clamcast-master" | "clamcast-agent" | "clamcast-certs" => {
                    ["clamcast-proto", "clamcast-daemon"].contains(&on)
                }
                "clamcast-fuzz" | "clamcast-manual" => on != "clamcast-tests",
                "clamcast-tests" => true,
                other => panic!("say here on what `{other}` may depend"),
            };
            assert!(
                allowed || !names.contains(&on),
                "{name} must not depend on {on}"
            );
        }
    }
}

#[test]
fn proto_builds_without_runtime_network_and_files() {
    let tree = cargo(&[
        "tree",
        "-p",
        "clamcast-proto",
        "-e",
        "normal",
        "--prefix",
        "none",
    ]);
    assert!(tree.starts_with("clamcast-proto "), "{tree}");
    for line in tree.lines() {
        let name = line.split(' ').next().unwrap_or_default();
        let banned = [
            "tokio",
            "mio",
            "quinn",
            "quinn-proto",
            "notify",
            "nix",
            "tempfile",
        ];
        assert!(!banned.contains(&name), "proto depends on {name}");
    }
}

#[test]
fn every_dependency_says_what_it_is_for() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).expect("it is there");
    let (_, dependencies) = manifest
        .split_once("[workspace.dependencies]\n")
        .expect("the workspace has them");
    let lines = dependencies
        .lines()
        .take_while(|line| !line.starts_with('['));
    let others = lines.filter(|line| line.contains(" = ") && !line.contains("path = "));
    let mut count = 0;
    for line in others {
        let reason = line
            .split_once(" # ")
            .map(|(_, reason)| reason.trim())
            .unwrap_or_default();
        assert!(!reason.is_empty(), "say what it is for: {line}");
        count += 1;
    }
    assert!(count > 10, "only {count} dependencies were found");
}

#[test]
fn every_dependency_is_used() {
    let metadata = cargo(&["metadata", "--format-version=1"]);
    let metadata: Value = serde_json::from_str(&metadata).expect("cargo writes JSON");
    let list = |value: &Value| value.as_array().expect("a list").clone();
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let ours = list(&metadata["workspace_members"]);
    let mut count = 0;
    for package in list(&metadata["packages"]) {
        if !ours.contains(&package["id"]) {
            continue;
        }
        let manifest = PathBuf::from(text(&package["manifest_path"]));
        let directory = manifest.parent().expect("it is in a directory");
        // Attributes are no tokens of a source, and may name a library.
        let production = sources(&directory.join("src")).into_iter().map(|source| {
            let text = fs::read_to_string(source.path).expect("it was read before");
            let (code, _) = text
                .split_once("\n#[cfg(test)]\nmod tests {")
                .unwrap_or((&text, ""));
            code.to_owned()
        });
        let production: Vec<_> = production.collect();
        let mut all: Vec<_> = files(directory).into_iter().map(|(_, text)| text).collect();
        if package["name"] == "clamcast-tests" {
            let shared = root().join("xtask/src/source.rs"); // a module of this file
            all.push(fs::read_to_string(shared).expect("it is there"));
        }
        let nodes = list(&metadata["resolve"]["nodes"]);
        let node = nodes.iter().find(|node| node["id"] == package["id"]);
        for dependency in list(&node.expect("it is resolved")["deps"]) {
            // The name that the code uses: that of the library.
            let name = text(&dependency["name"]);
            let kinds = list(&dependency["dep_kinds"]);
            let for_tests = kinds.iter().all(|kind| kind["kind"] == "dev");
            let used = if for_tests || package["name"] == "clamcast-tests" {
                all.iter().any(|text| mentions(text, &name))
            } else {
                production.iter().any(|text| mentions(text, &name))
            };
            let whose = if for_tests { "tests" } else { "programs" };
            assert!(
                used,
                "{}: no use of {name} in the {whose}",
                manifest.display()
            );
            count += 1;
        }
    }
    assert!(count > 100, "only {count} dependencies were found");
}

/// Whether code names something of the library `name`.
fn mentions(code: &str, name: &str) -> bool {
    let lines = code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    let path = format!("{name}::");
    lines.into_iter().any(|line| {
        line.match_indices(&path).any(|(at, _)| {
            let before = line[..at].chars().next_back();
            before.is_none_or(|c| !c.is_alphanumeric() && c != '_')
        })
    })
}

#[test]
fn dependencies_have_allowed_licences_and_sources_and_none_is_banned() {
    require!(CargoDeny);
    let check = |config: &Path| {
        let mut deny = Command::new(Part::CargoDeny.path());
        deny.current_dir(root()).args(["--offline", "--config"]);
        deny.arg(config)
            .args(["check", "licenses", "bans", "sources"]);
        let ran = deny.output().expect("cargo-deny was found");
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        if ran.status.success() {
            Ok(())
        } else {
            Err(said)
        }
    };
    let rules = root().join("deny.toml");
    check(&rules).unwrap();

    // And these rules are applied: each change of them is found.
    let rules = fs::read_to_string(rules).unwrap();
    let changed = tempfile::NamedTempFile::new().unwrap();
    for (from, to, found) in [
        ("    \"ISC\",\n", "", "rejected"),
        ("\"openssl\"", "\"aws-lc-rs\"", "banned"),
        ("crates.io-index", "another-index", "source-not-allowed"),
    ] {
        assert!(rules.contains(from), "{from}");
        fs::write(changed.path(), rules.replace(from, to)).unwrap();
        let said = check(changed.path()).unwrap_err();
        assert!(said.contains(found), "{from}: {said}");
    }
    for banned in ["ring", "openssl", "openssl-sys"] {
        assert!(
            rules.contains(&format!("{{ crate = {banned:?}, ")),
            "{banned}"
        );
    }
}

#[test]
fn no_dependency_has_a_known_vulnerability() {
    // There is no network in a test: a copy of https://github.com/RustSec/advisory-db.
    let Some(database) = env::var_os("CLAMCAST_ADVISORY_DB") else {
        println!("not run: CLAMCAST_ADVISORY_DB names no advisory database");
        return;
    };
    require!(CargoAudit);
    let mut audit = Command::new(Part::CargoAudit.path());
    audit
        .current_dir(root())
        .args(["audit", "--no-fetch", "--stale", "--db"]);
    let ran = audit.arg(database).output().expect("cargo-audit was found");
    let said = [ran.stdout, ran.stderr].concat();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&said));
}

#[test]
fn no_file_mentions_the_paths_of_one_machine() {
    let homes = ["work", "root", "home", "Users", "farm"].map(|name| format!("/{name}/"));
    for (path, text) in files(&root()) {
        for (number, line) in text.lines().enumerate() {
            for home in &homes {
                // In the middle of a path it is a directory like any other.
                let begins = |at: usize| {
                    let before = line[..at].chars().next_back();
                    before.is_none_or(|c| !c.is_alphanumeric() && !"}._-/".contains(c))
                };
                let found = line.match_indices(home.as_str()).any(|(at, _)| begins(at));
                assert!(!found, "{}:{}: {line}", path.display(), number + 1);
            }
        }
    }
}

#[test]
fn no_test_sleeps_and_none_is_ignored() {
    let banned = ["thread::sleep", "time::sleep"].map(|name| format!("{name}("));
    let ignore = format!("#[{}", "ignore");
    for (path, text) in files(&root()) {
        if path.extension().is_some_and(|extension| extension == "rs") {
            assert!(
                !text.contains(&ignore),
                "{}: call `long!()` instead",
                path.display()
            );
        }
    }
    for (path, text) in files(&root().join("tests")) {
        let sleeps = banned.iter().any(|name| text.contains(name.as_str()));
        assert!(
            !sleeps,
            "{}: poll a condition with `until` instead",
            path.display()
        );
    }
}

#[test]
fn files_that_call_themselves_pure_are() {
    let mut count = 0;
    for Source { path, tokens } in crate_sources() {
        let text = fs::read_to_string(&path).expect("it was read before");
        let mut header = text.lines().map_while(|line| line.strip_prefix("//!"));
        let words = header
            .clone()
            .flat_map(|line| line.split(|c: char| !c.is_alphabetic()));
        let path = path.display().to_string();
        let is_core = path.contains("agent/src/core/");
        if !header.any(|line| line.starts_with(" Pure: ")) && !is_core {
            let mut words = words.map(str::to_lowercase);
            let says = words.any(|word| word == "pure");
            assert!(!says, "{path}: begin the line of the header with `Pure:`");
            continue;
        }
        count += 1;
        let code = tokens.concat();
        for call in ["::now()", "rand::"] {
            assert!(!code.contains(call), "{path} is not pure: {call}");
        }
        // `fs` alone, since it may be imported as `std::{fs, io}`.
        for name in ["tokio", "fs"] {
            let uses = tokens.iter().any(|token| token == name);
            assert!(!uses, "{path} is not pure: {name}");
        }
    }
    assert!(count > 5, "only {count} pure files were found");
}

#[test]
fn daemons_read_files_within_bounds() {
    let daemons = ["agent/src", "certs/src", "daemon/src", "master/src"];
    for directory in daemons {
        for Source { path, tokens } in sources(&root().join(directory)) {
            let code = tokens.concat();
            for call in ["fs::read(", "fs::read_to_string("] {
                let path = path.display();
                assert!(
                    !code.contains(call),
                    "{path}: `{call}..)` has no bound; call one of daemon/src/input.rs"
                );
            }
        }
    }
}

#[test]
fn the_readme_names_the_two_commands() {
    let readme = fs::read_to_string(root().join("README.md")).expect("there is a README.md");
    for command in ["cargo xtask demo", "cargo xtask test"] {
        assert!(
            readme.contains(command),
            "README.md does not name `{command}`"
        );
    }
}

/// Each row of SECURITY.md's table names the tests that show what it claims.
#[test]
fn each_claim_of_the_security_page_names_a_test_that_exists() {
    let page = fs::read_to_string(root().join("SECURITY.md")).expect("there is one");
    let table = page
        .split("\n## What is met")
        .nth(1)
        .expect("the table's heading");
    let table = table.split("\n## ").next().expect("a part");
    let rows = table.lines().filter(|line| line.starts_with('|')).skip(2);
    let rows: Vec<Vec<&str>> = rows
        .map(|row| row.trim_matches('|').split('|').collect())
        .collect();
    assert!(rows.len() > 20, "{} rows", rows.len());
    let tests = tests();
    for row in rows {
        let [claim, _, named] = row[..] else {
            panic!("a row has three cells: {row:?}");
        };
        let named: Vec<_> = named.split('`').skip(1).step_by(2).collect();
        assert!(!named.is_empty(), "no test shows: {claim}");
        for name in named {
            assert!(tests.contains(name), "{claim}: there is no test `{name}`");
        }
    }
}

/// The names of all tests.
fn tests() -> BTreeSet<String> {
    let rust = files(&root()).into_iter();
    let rust = rust.filter(|(path, _)| path.extension().is_some_and(|it| it == "rs"));
    let mut names = BTreeSet::new();
    for (_, text) in rust {
        let parts = text.split("#[test]").chain(text.split("#[tokio::test"));
        // What stands before the first attribute is no test.
        for part in parts.filter(|part| part.len() < text.len()) {
            let Some((_, named)) = part.split_once("fn ") else {
                continue;
            };
            names.extend(named.split('(').next().map(str::to_owned));
        }
    }
    names
}

/// The sources of every crate.
fn crate_sources() -> Vec<Source> {
    let crates = [
        "agent",
        "certs",
        "daemon",
        "master",
        "proto",
        "xtask",
        "tests",
        "tests/fuzz",
    ];
    let directories = crates.map(|name| format!("{name}/src"));
    let sources_of = |name| sources(&root().join(name));
    directories.iter().flat_map(sources_of).collect()
}

/// Every text file of the project below `directory`.
fn files(directory: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("the project can be read") {
        let path = entry.expect("the project can be read").path();
        let name = path.file_name().unwrap_or_default();
        if name == "target" || name == ".git" {
            continue; // the latter is a file in a linked worktree
        }
        if path.is_dir() {
            found.extend(files(&path));
        } else if let Ok(text) = fs::read_to_string(&path) {
            found.push((path, text));
        }
    }
    found
}

fn cargo(arguments: &[&str]) -> String {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let ran = Command::new(cargo)
        .args(arguments)
        .args(["--offline"])
        .current_dir(root())
        .output();
    let ran = ran.expect("cargo runs these tests");
    assert!(
        ran.status.success(),
        "{}",
        String::from_utf8_lossy(&ran.stderr)
    );
    String::from_utf8_lossy(&ran.stdout).into_owned()
}

fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent()
        .expect("this crate is a directory of the workspace")
        .to_owned()
}
