//! Reads Rust sources as tokens, without comments, literals and test code.
//!
//! Used here and, by its path, in the tidy tests, which may not depend on this crate.

use std::path::{Path, PathBuf};
use std::{fs, iter};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// A source file with the tokens that are compiled outside tests.
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    /// Identifiers, single punctuation characters and brackets; a literal is `""`.
    pub(crate) tokens: Vec<String>,
}

/// The sources below `directory`, in the order of their paths. Files of `#[cfg(test)] mod NAME;`
/// are left out.
pub(crate) fn sources(directory: &Path) -> Vec<Source> {
    let (mut sources, mut tests) = (Vec::new(), Vec::new());
    for path in files(directory) {
        let text = fs::read_to_string(&path).expect("our sources are text");
        let (tokens, test_modules) = production(&text);
        let children = children(&path);
        tests.extend(test_modules.iter().map(|name| children.join(name)));
        sources.push(Source { path, tokens });
    }
    let is_test = |path: &Path| {
        let module = path.with_extension("");
        tests.iter().any(|test| module.starts_with(test))
    };
    sources.retain(|source| !is_test(&source.path));
    sources
}

/// Every `.rs` file below `directory`, sorted.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("the project can be read") {
        let path = entry.expect("the project can be read").path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The directory of a file's child modules.
fn children(path: &Path) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default();
    if ["lib", "main", "mod"].iter().any(|root| stem == *root) {
        path.parent().expect("a file is in a directory").to_owned()
    } else {
        path.with_extension("")
    }
}

/// The tokens of `text` outside `#[cfg(test)]` items, and the names of test modules in other files.
pub(crate) fn production(text: &str) -> (Vec<String>, Vec<String>) {
    let tokens: TokenStream = text.parse().expect("our sources are Rust");
    let (mut production, mut test_modules) = (Vec::new(), Vec::new());
    collect(tokens, &mut production, &mut test_modules);
    (production, test_modules)
}

fn collect(tokens: TokenStream, production: &mut Vec<String>, test_modules: &mut Vec<String>) {
    let mut tokens = tokens.into_iter().peekable();
    while let Some(token) = tokens.next() {
        match token {
            TokenTree::Punct(punct) if punct.as_char() == '#' => {
                // `#![...]` has another punctuation character in between.
                let inner = tokens.next_if(
                    |next| matches!(next, TokenTree::Punct(next) if next.as_char() == '!'),
                );
                let Some(attribute) = tokens.next_if(|next| group(next, Delimiter::Bracket)) else {
                    production.push("#".to_owned()); // of a macro
                    continue;
                };
                let attribute = attribute.to_string().replace(' ', "");
                if inner.is_none() && attribute == "[cfg(test)]" {
                    let item: Vec<_> = item(&mut tokens).collect();
                    test_modules.extend(module_in_a_file(&item));
                }
            }
            TokenTree::Group(inner) => {
                let (open, close) = match inner.delimiter() {
                    Delimiter::Parenthesis => ("(", ")"),
                    Delimiter::Brace => ("{", "}"),
                    Delimiter::Bracket => ("[", "]"),
                    Delimiter::None => ("", ""),
                };
                production.push(open.to_owned());
                collect(inner.stream(), production, test_modules);
                production.push(close.to_owned());
            }
            TokenTree::Literal(_) => production.push("\"\"".to_owned()),
            TokenTree::Ident(_) | TokenTree::Punct(_) => production.push(token.to_string()),
        }
    }
}

/// Takes one item: up to its braces or its semicolon.
fn item(tokens: &mut impl Iterator<Item = TokenTree>) -> impl Iterator<Item = TokenTree> {
    let (mut over, mut is_use) = (false, false);
    iter::from_fn(move || {
        if over {
            return None;
        }
        let token = tokens.next()?;
        is_use |= matches!(&token, TokenTree::Ident(word) if word == "use");
        let semicolon = matches!(&token, TokenTree::Punct(punct) if punct.as_char() == ';');
        over = semicolon || (!is_use && group(&token, Delimiter::Brace));
        Some(token)
    })
}

/// `NAME` of `mod NAME;`.
fn module_in_a_file(item: &[TokenTree]) -> Option<String> {
    match item {
        [
            ..,
            TokenTree::Ident(keyword),
            TokenTree::Ident(name),
            TokenTree::Punct(_),
        ] if keyword == "mod" => Some(name.to_string()),
        _ => None,
    }
}

fn group(token: &TokenTree, delimiter: Delimiter) -> bool {
    matches!(token, TokenTree::Group(group) if group.delimiter() == delimiter)
}
