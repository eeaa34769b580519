//! What is wrong in a configuration, in the words of whoever wrote it. The parser's own messages
//! speak of its types; they only decide of which kind a mistake is.

use std::ops::Range;

use toml::de::{DeTable, DeValue};

use super::{Settings, line_of};

/// What is wrong in a configuration.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub enum Problem {
    /// A key that does not exist.
    #[error("unknown key `{key}`{}; {}", within(table), suggestion(nearest, &format!("expected one of: {}", known.join(", "))))]
    UnknownKey {
        /// As written.
        key: String,
        /// The table that it stands in; empty for the top.
        table: String,
        /// The existing key that looks most like it.
        nearest: Option<String>,
        /// All keys of that table.
        known: Vec<String>,
    },
    /// A name that the operator chooses is none.
    #[error(
        "`{name}` cannot be a name in [{table}]; expected letters, digits, `.`, `_` and `-`, first \
         and last a letter or digit"
    )]
    Name {
        /// As written.
        name: String,
        /// The table that it stands in.
        table: String,
    },
    /// A key without a default is not there.
    #[error("key `{key}` is missing{}; expected {expected}", within(table))]
    MissingKey {
        /// Its name.
        key: String,
        /// The table that it belongs in; empty for the top.
        table: String,
        /// What would stand there.
        expected: &'static str,
    },
    /// A table without which nothing goes is not there.
    #[error("table [{table}] is missing; expected a line `[{table}]` and its keys below it")]
    MissingTable {
        /// Its name.
        table: String,
    },
    /// A value of the wrong kind, or out of its bounds.
    #[error("`{key}` cannot be {found}; {}", suggestion(nearest, &format!("expected {expected}")))]
    Value {
        /// The key with its tables.
        key: String,
        /// What stands there.
        found: String,
        /// The allowed value that looks most like it.
        nearest: Option<String>,
        /// What may stand there.
        expected: &'static str,
    },
    /// A part of a value that is not what it should be.
    #[error("`{key}`: {why}")]
    Part {
        /// The key with its tables.
        key: String,
        /// What is wrong, with what stands there and what was expected.
        why: String,
    },
    /// A key or a table is there a second time.
    #[error("`{key}` stands here a second time, the first is in line {first}; keep one of them")]
    Twice {
        /// The name.
        key: String,
        /// The line of the first, from 1.
        first: usize,
    },
    /// Not TOML.
    #[error("cannot make sense of `{line}`; {hint}")]
    Syntax {
        /// The line.
        line: String,
        /// What is probably wrong with it.
        hint: &'static str,
    },
}

fn within(table: &str) -> String {
    match table {
        "" => String::new(),
        table => format!(" in [{table}]"),
    }
}

fn suggestion(nearest: &Option<String>, otherwise: &str) -> String {
    match nearest {
        Some(nearest) => format!("did you mean `{nearest}`?"),
        None => otherwise.to_owned(),
    }
}

/// Parses `text`; the error is the line, from 1, and what is wrong there.
pub(super) fn parse<T: Settings>(text: &str) -> Result<T, (Option<usize>, Problem)> {
    let (tree, errors) = DeTable::parse_recoverable(text);
    if let Some(first) = errors
        .iter()
        .min_by_key(|error| error.span().map(|span| span.start))
    {
        let span = first.span().unwrap_or_default();
        let line = line_of(&text.as_bytes()[..span.start]);
        return Err((Some(line), malformed(text, first.message(), &span)));
    }
    toml::from_str(text).map_err(|error| {
        // serde's word for "the file as a whole" is the empty span at its beginning.
        let span = error.span().filter(|span| *span != (0..0));
        let line = span
            .as_ref()
            .map(|span| line_of(&text.as_bytes()[..span.start]));
        let place = span.and_then(|span| place(tree.get_ref(), &span));
        let place = place.unwrap_or_default();
        (line, problem::<T>(text, error.message(), place))
    })
}

/// The problem that the value of `key` is not what it should be, or `item` in it, and its line.
pub(super) fn wrong<T: Settings>(
    text: &str,
    key: &[&str],
    item: Option<&str>,
) -> (Option<usize>, Problem) {
    let span = span_of(text, key);
    let line = span.as_ref().map(|span| line_at(text, span));
    let key: Vec<String> = key.iter().map(|name| (*name).to_owned()).collect();
    let found = match (item, span) {
        (Some(item), _) => shown(&format!("{item:?}")),
        (None, Some(span)) => shown(&text[span]),
        (None, None) => "what it is without being there".to_owned(),
    };
    let expected = expected::<T>(&key);
    let problem = Problem::Value {
        key: path(&key),
        found,
        nearest: None,
        expected,
    };
    (line, problem)
}

/// The problem with a part of the value of `key`, and its line.
pub(super) fn part(text: &str, key: &[&str], why: String) -> (Option<usize>, Problem) {
    let line = span_of(text, key).map(|span| line_at(text, &span));
    let key = path(key);
    (line, Problem::Part { key, why })
}

fn line_at(text: &str, span: &Range<usize>) -> usize {
    line_of(&text.as_bytes()[..span.start])
}

/// Where the value of `key` stands.
fn span_of(text: &str, key: &[&str]) -> Option<Range<usize>> {
    let (tree, _) = DeTable::parse_recoverable(text);
    let mut table = Some(tree.get_ref());
    let mut span = None;
    for name in key {
        let value = table.and_then(|table| table.get(*name));
        span = value.map(|value| value.span());
        table = value.and_then(|value| match value.get_ref() {
            DeValue::Table(table) => Some(table),
            DeValue::String(_)
            | DeValue::Integer(_)
            | DeValue::Float(_)
            | DeValue::Boolean(_)
            | DeValue::Datetime(_)
            | DeValue::Array(_) => None,
        });
    }
    span
}

/// Where in the file an error is.
#[derive(Default)]
struct Place {
    /// The key, with the tables around it.
    key: Vec<String>,
    /// It is about the key itself, not its value.
    on_key: bool,
    /// The value there, as it is written; `None` for a table.
    found: Option<Range<usize>>,
}

/// The key that stands at `span`, or whose value does.
fn place(table: &DeTable<'_>, span: &Range<usize>) -> Option<Place> {
    table.iter().find_map(|(key, value)| {
        let name = key.get_ref().to_string();
        let below = match value.get_ref() {
            DeValue::Table(table) => place(table, span),
            DeValue::String(_)
            | DeValue::Integer(_)
            | DeValue::Float(_)
            | DeValue::Boolean(_)
            | DeValue::Datetime(_)
            | DeValue::Array(_) => None,
        };
        if let Some(mut below) = below {
            below.key.insert(0, name);
            return Some(below);
        }
        let here = |range: Range<usize>| range.start <= span.start && span.end <= range.end;
        let on_key = here(key.span());
        (on_key || here(value.span())).then(|| Place {
            key: vec![name],
            on_key,
            found: (!matches!(value.get_ref(), DeValue::Table(_))).then(|| span.clone()),
        })
    })
}

/// What a parser's message means, which is the only place where it tells the names that it knows.
fn problem<T: Settings>(text: &str, message: &str, place: Place) -> Problem {
    let Place { key, on_key, found } = place;
    // What stands in the file may have such quotes itself, the names after it have none.
    let (unknown, names) = match message.rfind(EXPECTED) {
        Some(at) => message.split_at(at),
        None => (message.strip_suffix('`').unwrap_or(message), ""),
    };
    let (_, subject) = unknown.split_once('`').unwrap_or_default();
    let known = || names.split('`').skip(2).step_by(2).map(str::to_owned);
    if message.starts_with("unknown field ") {
        return Problem::UnknownKey {
            key: shown_name(subject),
            table: path(&key[..key.len().saturating_sub(1)]),
            nearest: nearest(subject, known()),
            known: known().collect(),
        };
    }
    if message.starts_with("missing field ") {
        let table = path(&key);
        let mut missing = key;
        missing.push(subject.to_owned());
        let inner = format!("{}.", missing.join("."));
        return if T::KEYS.iter().any(|known| known.name.starts_with(&inner)) {
            Problem::MissingTable {
                table: path(&missing),
            }
        } else {
            Problem::MissingKey {
                key: subject.to_owned(),
                table,
                expected: expected::<T>(&missing),
            }
        };
    }
    if on_key && let Some((last, tables)) = key.split_last() {
        return Problem::Name {
            name: shown_name(last),
            table: path(tables),
        };
    }
    Problem::Value {
        nearest: message
            .starts_with("unknown variant ")
            .then(|| nearest(subject, known()))
            .flatten(),
        found: found.map_or("a table".to_owned(), |span| shown(&text[span])),
        expected: expected::<T>(&key),
        key: path(&key),
    }
}

/// Begins the part of a parser's message with the names that it knows.
const EXPECTED: &str = "`, expected ";

/// What may stand at a key. A table that has no words of its own is a table.
fn expected<T: Settings>(key: &[String]) -> &'static str {
    let is = |name: &str| {
        let mut parts = name.split('.');
        let same = key
            .iter()
            .all(|part| parts.next().is_some_and(|name| name == "*" || name == part));
        same && parts.next().is_none()
    };
    let found = T::KEYS.iter().find(|known| is(known.name));
    found.map_or(
        "a table: its name in `[...]`, and its keys below it",
        |known| known.expected,
    )
}

/// Longest piece of a file that is shown in a message, in characters.
const SHOWN_CHARS_MAX: usize = 60;

/// A piece of the file on one line.
fn shown(text: &str) -> String {
    if text.contains('\n') {
        return match text.trim_start().starts_with(['"', '\'']) {
            true => "a text of several lines".to_owned(),
            false => "a list of several lines".to_owned(),
        };
    }
    format!("`{}`", cut(text))
}

fn cut(text: &str) -> String {
    shown_name(text.trim())
}

/// A key, or the name of a table, with the tables around it.
fn path(names: &[impl AsRef<str>]) -> String {
    let names: Vec<_> = names.iter().map(AsRef::as_ref).collect();
    shown_name(&names.join("."))
}

/// A name for a message: in quotes it may contain anything and have any length.
fn shown_name(text: &str) -> String {
    let clean = |c: char| if c.is_control() { '?' } else { c };
    let mut name: String = text.chars().take(SHOWN_CHARS_MAX).map(clean).collect();
    if text.chars().count() > SHOWN_CHARS_MAX {
        name.push_str("...");
    }
    name
}

/// What is probably meant by what is not TOML.
fn malformed(text: &str, message: &str, span: &Range<usize>) -> Problem {
    let start = text[..span.start].rfind('\n').map_or(0, |at| at + 1);
    let line = text[start..].lines().next().unwrap_or_default();
    if message.starts_with("duplicate key") {
        let key = text[span.clone()].trim_matches(['"', '\'']).to_owned();
        if let Some(first) = last_line_of(&key, &text[..start]) {
            let key = shown_name(&key);
            return Problem::Twice { key, first };
        }
    }
    Problem::Syntax {
        line: cut(line),
        hint: hint(line.trim()),
    }
}

/// The last line, from 1, where `key` stands in `text`, before an `=` or in a table's brackets. The
/// parser's tree would not do: of a table that is there twice it keeps the second.
fn last_line_of(key: &str, text: &str) -> Option<usize> {
    let is_key = |line: &str| {
        let name = line.split(['=', '#']).next().unwrap_or_default();
        let name = name.trim_matches(|c: char| c.is_whitespace() || "[]\"'".contains(c));
        name == key || name.rsplit('.').next() == Some(key)
    };
    let lines = text.lines().zip(1..);
    lines
        .filter(|(line, _)| is_key(line))
        .map(|(_, number)| number)
        .last()
}

fn hint(line: &str) -> &'static str {
    let Some((key, value)) = line.split_once('=') else {
        return match line.starts_with('[') {
            true => "expected a table's name in brackets, as in `[mirror]`",
            false => "expected `key = value`, a `[table]`, or `#` before a comment",
        };
    };
    let value = value.trim();
    let closed = |quote: char| value.len() > 1 && value[1..].contains(quote);
    match value.chars().next() {
        _ if key.trim().is_empty() => "expected a key before the `=`",
        None => "a value is missing after the `=`",
        Some(quote @ ('"' | '\'')) if !closed(quote) => "the quotes are not closed",
        Some('"') if value.contains('\\') => {
            "in quotes a `\\` has a meaning of its own; write 'the text' or `\\\\`"
        }
        Some('"' | '\'') => "nothing but a comment may follow the value",
        Some('[') => "expected a list as in `[\"a\", \"b\"]`",
        Some('{') => "expected `{ key = value, key = value }` on one line",
        Some(_) => "a value that is no number, true or false stands in quotes: `key = \"value\"`",
    }
}

/// The known name that a typing mistake would turn into `name`, if one is near enough.
fn nearest(name: &str, known: impl Iterator<Item = String>) -> Option<String> {
    let name = name.to_lowercase();
    // Jaro-Winkler: 0.7 still takes two swapped or missing letters in a short word.
    known
        .map(|candidate| {
            let likeness = strsim::jaro_winkler(&name, &candidate.to_lowercase());
            (likeness, candidate)
        })
        .filter(|(likeness, _)| *likeness >= 0.7)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::super::{ConfigError, File, FilePath, Key, Percent, Size, Span, Value};
    use super::*;
    use serde::Deserialize;
    use std::collections::BTreeMap;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "parsed for its errors")]
    struct Sample {
        fleet: String,
        mirror: Mirror,
        #[serde(default)]
        groups: BTreeMap<clamcast_proto::GroupName, Vec<String>>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "parsed for its errors")]
    struct Mirror {
        path: FilePath,
        quiet: Option<Span>,
        shrink_max: Option<Percent>,
        bandwidth: Option<Size>,
        unsigned: Option<Unsigned>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Unsigned {
        Allow,
        Refuse,
    }

    impl Settings for Sample {
        const KEYS: &'static [Key] = &[
            key("fleet", "a name"),
            key("mirror.path", "a path"),
            key("mirror.quiet", "a time"),
            key("mirror.shrink_max", "a share"),
            key("mirror.bandwidth", "a size"),
            key("mirror.unsigned", "\"allow\" or \"refuse\""),
            key("groups.*", "a list of names"),
        ];
    }

    const fn key(name: &'static str, expected: &'static str) -> Key {
        Key {
            name,
            value: Value::Default(""),
            expected,
            meaning: "",
        }
    }

    fn load<T: Settings>(path: &std::path::Path) -> Result<T, ConfigError> {
        File::read(path)?.parse()
    }

    fn checked(text: &[u8], expected: &str) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master.toml");
        std::fs::write(&path, text).unwrap();
        let error = load::<Sample>(&path).unwrap_err().to_string();
        let shown = error.replace(&path.display().to_string(), "master.toml");
        assert_eq!(shown, expected);
    }

    fn check(text: &str, expected: &str) {
        checked(text.as_bytes(), &format!("master.toml{expected}"));
    }

    /// As `check`, for lines that stand under `[mirror]`; the first of them is line 4.
    fn in_mirror(lines: &str, expected: &str) {
        let text = format!("fleet = 'x'\n[mirror]\npath = '/m'\n{lines}\n");
        check(&text, expected);
    }

    #[test]
    fn an_unknown_key_gives_its_line_and_the_nearest_key() {
        in_mirror(
            "\nquite = '3s'",
            ":5: unknown key `quite` in [mirror]; did you mean `quiet`?",
        );
        check(
            "fleet = 'x'\nmirror = { path = '/m', shrinkmax = '1%' }\n",
            ":2: unknown key `shrinkmax` in [mirror]; did you mean `shrink_max`?",
        );
        check(
            "fleet = 'x'\n[miror]\npath = '/m'\n",
            ":2: unknown key `miror`; did you mean `mirror`?",
        );
        check(
            "zzz = 1\n",
            ":1: unknown key `zzz`; expected one of: fleet, mirror, groups",
        );
    }

    #[test]
    fn a_key_in_quotes_cannot_garble_the_message() {
        check(
            "\"a\\n`, expected `b\" = 1\n",
            ":1: unknown key `a?`, expected `b`; expected one of: fleet, mirror, groups",
        );
        check(
            &format!("{} = 1\n", "x".repeat(1000)),
            &format!(
                ":1: unknown key `{}...`; expected one of: fleet, mirror, groups",
                "x".repeat(60)
            ),
        );
    }

    #[test]
    fn a_wrong_value_is_shown_beside_what_was_expected() {
        for (line, problem) in [
            (
                "quiet = '3 parsecs'",
                "`mirror.quiet` cannot be `'3 parsecs'`; expected a time",
            ),
            ("quiet = 3", "`mirror.quiet` cannot be `3`; expected a time"),
            (
                "quiet = 1979-05-27",
                "`mirror.quiet` cannot be `1979-05-27`; expected a time",
            ),
            (
                "quiet = ['3s']",
                "`mirror.quiet` cannot be `['3s']`; expected a time",
            ),
            (
                "quiet = ['3s',\n]",
                "`mirror.quiet` cannot be a list of several lines; expected a time",
            ),
            (
                "quiet = { s = 3 }",
                "`mirror.quiet` cannot be a table; expected a time",
            ),
            (
                "shrink_max = '130%'",
                "`mirror.shrink_max` cannot be `'130%'`; expected a share",
            ),
            (
                "bandwidth = -1",
                "`mirror.bandwidth` cannot be `-1`; expected a size",
            ),
            (
                "unsigned = 'alow'",
                "`mirror.unsigned` cannot be `'alow'`; did you mean `allow`?",
            ),
            (
                "unsigned = 'x'",
                "`mirror.unsigned` cannot be `'x'`; expected \"allow\" or \"refuse\"",
            ),
            (
                "unsigned = true",
                "`mirror.unsigned` cannot be `true`; expected \"allow\" or \"refuse\"",
            ),
        ] {
            in_mirror(line, &format!(":4: {problem}"));
        }
        check(
            "fleet = 'x'\n[mirror]\npath = ''",
            ":3: `mirror.path` cannot be `''`; expected a path",
        );
        let long = "x".repeat(100);
        in_mirror(
            &format!("quiet = '{long}'"),
            &format!(
                ":4: `mirror.quiet` cannot be `'{}...`; expected a time",
                "x".repeat(59)
            ),
        );
    }

    #[test]
    fn a_value_is_no_table_and_a_table_no_value() {
        let table = "expected a table: its name in `[...]`, and its keys below it";
        check(
            "fleet = 'x'\nmirror = '/m'\n",
            &format!(":2: `mirror` cannot be `'/m'`; {table}"),
        );
        check(
            "mirror = 1\n",
            &format!(":1: `mirror` cannot be `1`; {table}"),
        );
        check(
            "fleet = 'x'\n[mirror.path]\n",
            ":2: `mirror.path` cannot be a table; expected a path",
        );
    }

    #[test]
    fn what_is_wrong_in_a_list_is_named_alone() {
        in_mirror(
            "[groups]\ncanary = ['web1', 2]",
            ":5: `groups.canary` cannot be `2`; expected a list of names",
        );
        in_mirror(
            "[groups]\ncanary = 'web1'",
            ":5: `groups.canary` cannot be `'web1'`; expected a list of names",
        );
        in_mirror(
            "[groups]\n'all of them' = []",
            ":5: `all of them` cannot be a name in [groups]; expected letters, digits, `.`, `_` \
             and `-`, first and last a letter or digit",
        );
    }

    #[test]
    fn what_is_missing_is_named_with_its_table() {
        check(
            "fleet = 'x'\n[mirror]\nquiet = '3s'\n",
            ":2: key `path` is missing in [mirror]; expected a path",
        );
        for text in [
            "[mirror]\npath = '/m'\n",
            "\n[mirror]\npath = '/m'\n",
            "# nothing\n",
        ] {
            check(text, ": key `fleet` is missing; expected a name");
        }
        check(
            "fleet = 'x'\n",
            ": table [mirror] is missing; expected a line `[mirror]` and its keys below it",
        );
    }

    #[test]
    fn what_is_there_twice_is_shown_with_both_lines() {
        in_mirror(
            "path = '/n'",
            ":4: `path` stands here a second time, the first is in line 3; keep one of them",
        );
        in_mirror(
            "[mirror]\nquiet = '3s'",
            ":4: `mirror` stands here a second time, the first is in line 2; keep one of them",
        );
    }

    #[test]
    fn a_line_that_is_no_toml_says_what_it_lacks() {
        let hint = |line: &str, hint: &str| {
            in_mirror(line, &format!(":4: cannot make sense of `{line}`; {hint}"));
        };
        let quotes = "a value that is no number, true or false stands in quotes: `key = \"value\"`";
        hint("quiet = 3s", quotes);
        hint("quiet = yes", quotes);
        hint("quiet = /srv/mirror", quotes);
        hint(
            "quiet = [::]:7310",
            "expected a list as in `[\"a\", \"b\"]`",
        );
        hint("quiet = \"3s", "the quotes are not closed");
        hint("quiet = '3s", "the quotes are not closed");
        hint(
            "quiet = '3s' or so",
            "nothing but a comment may follow the value",
        );
        hint(
            "quiet = \"C:\\mirror\"",
            "in quotes a `\\` has a meaning of its own; write 'the text' or `\\\\`",
        );
        hint("quiet =", "a value is missing after the `=`");
        hint("= '3s'", "expected a key before the `=`");
        hint(
            "[rollout",
            "expected a table's name in brackets, as in `[mirror]`",
        );
        hint(
            "quiet: 3s",
            "expected `key = value`, a `[table]`, or `#` before a comment",
        );
        hint(
            "quiet = { s = 3",
            "expected `{ key = value, key = value }` on one line",
        );
    }

    #[test]
    fn what_is_no_text_is_not_parsed() {
        let no_text = "master.toml:2: not a text in UTF-8; is it a configuration file?";
        checked(b"fleet = 'x'\n\xff", no_text);
        checked(b"fleet = 'x'\n\0\0\0", no_text);
        check("", " is empty; is it the right file?");
        check(" \n\n", " is empty; is it the right file?");
    }

    #[test]
    fn a_file_that_is_none_says_what_to_do() {
        let error = |path: &str| load::<Sample>(path.as_ref()).unwrap_err().to_string();
        assert_eq!(
            error("/nonexistent/master.toml"),
            "--config: /nonexistent/master.toml does not exist; name the configuration file with --config"
        );
        assert_eq!(
            error("/"),
            "--config: / is a directory; name the configuration file with --config"
        );
        assert!(matches!(
            load::<Sample>("/dev/zero".as_ref()),
            Err(ConfigError::Read(_))
        ));
    }
}
