//! `cargo xtask imports`: which top-level module of a daemon imports from which.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{fs, iter};

use anyhow::{Context, bail};

use crate::source::{Source, sources};
use crate::workspace;

/// The top-level modules of a daemon from top to bottom: each imports only from those below it.
struct Layers {
    directory: &'static str,
    /// The library's name, by which `main.rs` imports from it.
    library: &'static str,
    modules: &'static [&'static str],
}

const DAEMONS: [Layers; 2] = [
    Layers {
        directory: "master/src",
        library: "clamcast_master",
        modules: &[
            "main", "serve", "operate", "link", "fleet", "publish", "store", "record", "config",
        ],
    },
    Layers {
        directory: "agent/src",
        library: "clamcast_agent",
        modules: &[
            "main", "run", "operate", "keeper", "core", "link", "config", "install", "host",
            "clamd",
        ],
    },
];

/// What stands around the table in ARCHITECTURE.md.
const BEGIN: &str = "<!-- The table is written by `cargo xtask imports --write`. -->\n";
const END: &str = "<!-- End of the table of `cargo xtask imports`. -->\n";

/// Print which top-level module of master and agent imports from which.
///
/// A test holds the direction, from top to bottom, and the table in ARCHITECTURE.md.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Replace the table in ARCHITECTURE.md instead
    #[arg(long)]
    write: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let table = tables()?;
    if !arguments.write {
        print!("{table}");
        return Ok(());
    }
    let text = fs::read_to_string(architecture()).context("cannot read ARCHITECTURE.md")?;
    let (before, _, after) = around(&text)?;
    let text = format!("{before}{BEGIN}\n{table}\n{END}{after}");
    fs::write(architecture(), text).context("cannot write ARCHITECTURE.md")
}

fn architecture() -> PathBuf {
    workspace().join("ARCHITECTURE.md")
}

/// The text before the table, the table, and the text after it.
fn around(text: &str) -> anyhow::Result<(&str, &str, &str)> {
    let (before, rest) = text
        .split_once(BEGIN)
        .with_context(|| format!("no line {BEGIN}"))?;
    let (table, after) = rest
        .split_once(END)
        .with_context(|| format!("no line {END}"))?;
    Ok((before, table, after))
}

fn tables() -> anyhow::Result<String> {
    let mut text = String::new();
    for layers in &DAEMONS {
        if !text.is_empty() {
            text.push('\n');
        }
        text += &table(layers)?;
    }
    Ok(text)
}

fn table(layers: &Layers) -> anyhow::Result<String> {
    let imports = imports(layers)?;
    let mut text = format!(
        "| `{}` | in one sentence | imports from |\n|---|---|---|\n",
        layers.directory
    );
    for name in layers.modules {
        let header = header(layers, name)?;
        let decides = first_sentence(&header);
        let from = layers
            .modules
            .iter()
            .filter(|other| imports[name].contains_key(**other));
        let from: Vec<_> = from.map(|other| format!("`{other}`")).collect();
        writeln!(text, "| `{name}` | {decides} | {} |", from.join(", "))?;
    }
    Ok(text)
}

/// For each module, the modules that it imports from, each with the files that do.
type Imports = BTreeMap<&'static str, BTreeMap<String, BTreeSet<PathBuf>>>;

fn imports(layers: &Layers) -> anyhow::Result<Imports> {
    let directory = workspace().join(layers.directory);
    let mut imports: Imports = layers
        .modules
        .iter()
        .map(|name| (*name, BTreeMap::new()))
        .collect();
    for Source { path, tokens } in sources(&directory) {
        let relative = path.strip_prefix(&directory)?.to_owned();
        let module = module(&relative);
        let Some(top) = module.first() else {
            continue; // lib.rs
        };
        let Some((top, from)) = imports.iter_mut().find(|(name, _)| *name == top) else {
            bail!(
                "xtask/src/imports.rs does not say where {} stands",
                path.display()
            );
        };
        for name in imported(&tokens, layers.library, module.len()) {
            if name != *top && layers.modules.contains(&name.as_str()) {
                from.entry(name).or_default().insert(relative.clone());
            }
        }
    }
    Ok(imports)
}

/// The path of the module in a file: `core/keeper.rs` holds `core::keeper`, `lib.rs` the root.
fn module(path: &Path) -> Vec<String> {
    let path = path.with_extension("");
    let mut names: Vec<_> = path
        .iter()
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    if names
        .last()
        .is_some_and(|name| name == "mod" || name == "lib")
    {
        names.pop();
    }
    names
}

/// The names below the crate's root that paths in `tokens` lead to. `depth` is how many times
/// `super` leads from the file's module to the root.
fn imported(tokens: &[String], library: &str, depth: usize) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for at in 0..tokens.len() {
        let rest = &tokens[at..];
        let supers = iter::successors(Some(rest), |rest| rest.get(1..).and_then(after_colons))
            .take_while(|rest| rest.first().is_some_and(|word| word == "super"))
            .count();
        let root = match rest[0].as_str() {
            "crate" => after_colons(&rest[1..]),
            word if word == library => after_colons(&rest[1..]),
            // Each `super` with its two colons has three tokens.
            "super" if supers >= depth => rest.get(3 * supers..),
            _ => None,
        };
        names.extend(root.into_iter().flat_map(first_names));
    }
    names
}

/// What follows `::`.
fn after_colons(tokens: &[String]) -> Option<&[String]> {
    let [first, second, rest @ ..] = tokens else {
        return None;
    };
    (first == ":" && second == ":").then_some(rest)
}

/// The first name of a path, or of each path of a `{...}`.
fn first_names(tokens: &[String]) -> Vec<String> {
    if tokens.first().is_none_or(|token| token != "{") {
        return tokens.first().cloned().into_iter().collect();
    }
    let (mut names, mut depth, mut begins) = (Vec::new(), 0, false);
    for token in tokens {
        match token.as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            _ if begins => names.push(token.clone()),
            _ => {}
        }
        if depth == 0 {
            break;
        }
        begins = depth == 1 && ["{", ","].contains(&token.as_str());
    }
    names
}

/// The `//!` lines at the top of a module's file.
fn header(layers: &Layers, name: &str) -> anyhow::Result<String> {
    let directory = workspace().join(layers.directory);
    let paths = [format!("{name}.rs"), format!("{name}/mod.rs")].map(|path| directory.join(path));
    let path = paths.iter().find(|path| path.exists());
    let path = path.with_context(|| format!("{} has no module {name}", layers.directory))?;
    let text = fs::read_to_string(path)?;
    let lines = text.lines().map_while(|line| line.strip_prefix("//!"));
    Ok(lines.map(str::trim).collect::<Vec<_>>().join(" "))
}

fn first_sentence(text: &str) -> &str {
    text.split_inclusive(". ").next().unwrap_or_default().trim()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::production;

    #[test]
    fn modules_import_in_one_direction_only() {
        for layers in &DAEMONS {
            let place = |name: &str| layers.modules.iter().position(|other| *other == name);
            let mut upwards = Vec::new();
            for (name, from) in imports(layers).unwrap() {
                let up = from.iter().filter(|(other, _)| place(other) <= place(name));
                upwards.extend(up.map(|(other, files)| format!("{name} from {other}: {files:?}")));
            }
            assert_eq!(upwards, [""; 0], "{}: imports from above", layers.directory);
        }
    }

    #[test]
    fn the_import_table_in_architecture_is_current() {
        let text = fs::read_to_string(architecture()).unwrap();
        let (_, table, _) = around(&text).unwrap();
        assert_eq!(
            table.trim(),
            tables().unwrap().trim(),
            "run `cargo xtask imports --write`"
        );
    }

    #[track_caller]
    fn check(text: &str, expected: &str) {
        let (tokens, _) = production(text);
        let names: Vec<_> = imported(&tokens, "lib", 2).into_iter().collect();
        assert_eq!(names.join(" "), expected, "{text}");
    }

    #[test]
    fn paths_from_the_root_are_found_wherever_they_stand() {
        check("use crate::link;", "link");
        check("use crate::link::{self, Link};", "link");
        check(
            "use crate::{core::{slot, trust}, link, run as go};",
            "core link run",
        );
        check("pub use lib::{a::b, c};", "a c");
        check(
            "fn f() { crate::link::run(x(&crate::core::F)) }",
            "core link",
        );
        check("info!(error = crate::chain(e), \"crate::no\");", "chain");
        check("use super::super::link; use super::slot;", "link");
        check("// crate::a\n/// [`crate::b`]\nmod c {}", "");
    }

    #[test]
    fn test_code_may_import_from_anywhere() {
        check(
            "use crate::a;\n#[cfg(test)]\nmod tests { use crate::b; }",
            "a",
        );
        check("#[cfg(test)] use crate::{b, c}; use crate::a;", "a");
        check(
            "#[cfg(test)] #[derive(X)] struct S; fn f() -> crate::a::A {}",
            "a",
        );
        check(
            "impl X { #[cfg(test)] fn f() { crate::b() } fn g() { crate::a() } }",
            "a",
        );
        let (_, modules) = production("#[cfg(test)]\npub(crate) mod lab;\nmod real;");
        assert_eq!(modules, ["lab"]);
    }

    #[test]
    fn a_file_is_a_module() {
        for (path, expected) in [
            ("lib.rs", ""),
            ("main.rs", "main"),
            ("run.rs", "run"),
            ("core/mod.rs", "core"),
            ("core/keeper/drift.rs", "core::keeper::drift"),
        ] {
            assert_eq!(module(Path::new(path)).join("::"), expected);
        }
    }
}
