//! Configuration files: TOML in which a key that we do not know is a mistake, not a comment.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::de::{DeserializeOwned, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use toml::de::{DeTable, DeValue};

/// Longest configuration file in bytes that is read: thousands of groups fit, and a path that was
/// mistyped to a database or a device is not taken into memory.
pub const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// There is no such file.
    #[error("{path} does not exist; name the configuration file with --config")]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no configuration.
    #[error("{path} is longer than {CONFIG_BYTES_MAX} bytes; is it a configuration file?")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Something in it is wrong.
    #[error("{path}:{}{problem}", line.map_or(" ".to_owned(), |line| format!("{line}: ")))]
    Content {
        /// The file.
        path: PathBuf,
        /// The line, from 1; `None` if it is about the file as a whole.
        line: Option<usize>,
        /// What is wrong there.
        problem: Box<Problem>,
    },
}

/// What is wrong in a configuration.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub enum Problem {
    /// A key that does not exist.
    #[error("unknown key `{key}`{}{}", within(table), did_you_mean(nearest, known))]
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
    /// A value that is none of those allowed.
    #[error("`{key}` cannot be `{value}`{}", did_you_mean(nearest, known))]
    UnknownValue {
        /// The key with its tables.
        key: String,
        /// As written.
        value: String,
        /// The value that looks most like it.
        nearest: Option<String>,
        /// All that may stand there.
        known: Vec<String>,
    },
    /// A key without a default is not there.
    #[error("key `{key}` is missing{}", within(table))]
    MissingKey {
        /// Its name.
        key: String,
        /// The table that it belongs in; empty for the top.
        table: String,
    },
    /// A value of the wrong type or out of its bounds.
    #[error("`{key}`: {reason}")]
    Value {
        /// The key with its tables.
        key: String,
        /// What was expected.
        reason: String,
    },
    /// Not TOML, or values that do not go together.
    #[error("{0}")]
    Other(String),
}

fn within(table: &str) -> String {
    match table {
        "" => String::new(),
        table => format!(" in [{table}]"),
    }
}

fn did_you_mean(nearest: &Option<String>, known: &[String]) -> String {
    match nearest {
        Some(nearest) => format!("; did you mean `{nearest}`?"),
        None => format!("; expected one of: {}", known.join(", ")),
    }
}

/// Reads the TOML file `path` into `T`, whose structs are to be `#[serde(deny_unknown_fields)]`.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let failed = |source: io::Error| {
        let path = path.to_owned();
        if source.kind() == io::ErrorKind::NotFound {
            ConfigError::Missing { path }
        } else {
            ConfigError::Read { path, source }
        }
    };
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text))
        .map_err(failed)?;
    if text.len() as u64 > CONFIG_BYTES_MAX {
        return Err(ConfigError::TooLarge { path: path.into() });
    }
    parse(&text).map_err(|(line, problem)| ConfigError::Content {
        path: path.into(),
        line,
        problem: Box::new(problem),
    })
}

/// The path as the file `file` means it: relative to the directory that the file is in.
pub fn beside(file: &Path, path: &Path) -> PathBuf {
    file.parent().unwrap_or(Path::new("")).join(path)
}

/// Parses `text`; the error is the line, from 1, and what is wrong there.
fn parse<T: DeserializeOwned>(text: &str) -> Result<T, (Option<usize>, Problem)> {
    toml::from_str(text).map_err(|error| {
        // serde's word for "the file as a whole" is the empty span at its beginning.
        let span = error.span().filter(|span| *span != (0..0));
        let line = span.as_ref().map(|span| {
            let before = &text.as_bytes()[..span.start.min(text.len())];
            before.iter().filter(|byte| **byte == b'\n').count() + 1
        });
        // A syntax error leaves no tree to find the key in.
        let at = span.and_then(|span| key_at(DeTable::parse(text).ok()?.get_ref(), &span));
        (line, problem(error.message(), at.unwrap_or_default()))
    })
}

/// The key that stands at `span`, or whose value does, with the tables around it.
fn key_at(table: &DeTable<'_>, span: &Range<usize>) -> Option<Vec<String>> {
    table.iter().find_map(|(key, value)| {
        let name = key.get_ref().to_string();
        let below = match value.get_ref() {
            DeValue::Table(table) => key_at(table, span),
            DeValue::String(_)
            | DeValue::Integer(_)
            | DeValue::Float(_)
            | DeValue::Boolean(_)
            | DeValue::Datetime(_)
            | DeValue::Array(_) => None,
        };
        if let Some(mut path) = below {
            path.insert(0, name);
            return Some(path);
        }
        let here = |range: Range<usize>| range.start <= span.start && span.end <= range.end;
        (here(key.span()) || here(value.span())).then(|| vec![name])
    })
}

/// Reads serde's own messages, the only place where it tells the names that it knows.
fn problem(message: &str, at: Vec<String>) -> Problem {
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let subject = quoted.first().copied().unwrap_or_default().to_owned();
    let known: Vec<String> = quoted.iter().skip(1).map(|name| (*name).into()).collect();
    let nearest = nearest(&subject, &known);
    if message.starts_with("unknown field ") {
        Problem::UnknownKey {
            table: at[..at.len().saturating_sub(1)].join("."),
            key: subject,
            nearest,
            known,
        }
    } else if message.starts_with("unknown variant ") {
        Problem::UnknownValue {
            key: at.join("."),
            value: subject,
            nearest,
            known,
        }
    } else if message.starts_with("missing field ") {
        Problem::MissingKey {
            key: subject,
            table: at.join("."),
        }
    } else if at.is_empty() {
        Problem::Other(message.to_owned())
    } else {
        Problem::Value {
            key: at.join("."),
            reason: message.to_owned(),
        }
    }
}

/// The known name that a typing mistake would turn into `name`, if one is near enough.
fn nearest(name: &str, known: &[String]) -> Option<String> {
    let name = name.to_lowercase();
    // Jaro-Winkler: 0.7 still takes two swapped or missing letters in a short word.
    known
        .iter()
        .map(|candidate| {
            (
                strsim::jaro_winkler(&name, &candidate.to_lowercase()),
                candidate,
            )
        })
        .filter(|(likeness, _)| *likeness >= 0.7)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, candidate)| candidate.clone())
}

/// A length of time, written like `"3s"`, `"5m"`, `"1h 30m"`.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Span(pub Duration);

/// A number of bytes, written like `"64MiB"`, `"500kB"`, `"0"`.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Size(pub u64);

/// A share between `"0%"` and `"100%"`, in whole percents.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Percent(u8);

/// A value that is not what was expected.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
#[error("`{found}` is not {expected}")]
pub struct ValueError {
    found: String,
    expected: &'static str,
}

/// A value that is written as a string.
trait Text: FromStr<Err = ValueError> {
    /// What may be written, with examples.
    const EXPECTED: &'static str;
}

impl Text for Span {
    const EXPECTED: &'static str = "a length of time such as \"3s\", \"5m\" or \"48h\"";
}

impl Text for Size {
    const EXPECTED: &'static str = "a number of bytes such as \"0\", \"500kB\" or \"64MiB\" (B, kB, MB, GB, KiB, MiB, GiB, TiB)";
}

impl Text for Percent {
    const EXPECTED: &'static str = "a whole percentage from \"0%\" to \"100%\"";
}

fn wrong<T: Text>(text: &str) -> ValueError {
    ValueError {
        found: text.chars().take(80).collect(),
        expected: T::EXPECTED,
    }
}

impl FromStr for Span {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        humantime::parse_duration(text)
            .map(Self)
            .map_err(|_| wrong::<Self>(text))
    }
}

impl FromStr for Size {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let unit = unit.trim();
        let factor = SIZE_UNITS.iter().find(|(name, _)| *name == unit);
        number
            .parse::<u64>()
            .ok()
            .zip(factor)
            .and_then(|(number, (_, factor))| number.checked_mul(*factor))
            .map(Self)
            .ok_or_else(|| wrong::<Self>(text))
    }
}

impl FromStr for Percent {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        text.strip_suffix('%')
            .and_then(|number| number.trim_end().parse().ok())
            .filter(|percent| *percent <= 100)
            .map(Self)
            .ok_or_else(|| wrong::<Self>(text))
    }
}

/// Largest first, so that the first that divides a size is the one to show it in.
const SIZE_UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("B", 1),
    ("", 1),
];

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, factor) = SIZE_UNITS
            .into_iter()
            .find(|(_, factor)| self.0 != 0 && self.0.is_multiple_of(*factor))
            .unwrap_or(("B", 1));
        write!(f, "{}{unit}", self.0 / factor)
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

impl Percent {
    /// `number` percent; `None` past 100.
    pub fn new(number: u8) -> Option<Self> {
        (number <= 100).then_some(Self(number))
    }

    /// This share of `total`, rounded down.
    pub fn of(self, total: u64) -> u64 {
        let share = u128::from(total) * u128::from(self.0) / 100;
        u64::try_from(share).expect("a share is at most the whole")
    }

    /// This share of `total`, rounded up.
    pub fn of_rounded_up(self, total: u64) -> u64 {
        let share = (u128::from(total) * u128::from(self.0)).div_ceil(100);
        u64::try_from(share).expect("a share is at most the whole")
    }
}

impl From<Duration> for Span {
    fn from(duration: Duration) -> Self {
        Self(duration)
    }
}

/// Serde as text, for each of the three.
macro_rules! as_text {
    ($($name:ident),*) => {$(
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
                input.deserialize_str(TextVisitor(std::marker::PhantomData))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
                output.collect_str(self)
            }
        }
    )*};
}
as_text!(Span, Size, Percent);

struct TextVisitor<T>(std::marker::PhantomData<T>);

impl<T: Text> Visitor<'_> for TextVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::EXPECTED)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "parsed for its errors")]
    struct Settings {
        fleet: String,
        mirror: Mirror,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "parsed for its errors")]
    struct Mirror {
        path: PathBuf,
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

    fn check(text: &str, expected: &str) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master.toml");
        std::fs::write(&path, text).unwrap();
        let error = load::<Settings>(&path).unwrap_err().to_string();
        let shown = error.replace(&path.display().to_string(), "master.toml");
        assert_eq!(shown, expected);
    }

    #[test]
    fn an_unknown_key_gives_its_line_and_the_nearest_key() {
        check(
            "fleet = 'x'\n\n[mirror]\npath = '/m'\nquite = '3s'\n",
            "master.toml:5: unknown key `quite` in [mirror]; did you mean `quiet`?",
        );
        check(
            "fleet = 'x'\nmirror = { path = '/m', shrinkmax = '1%' }\n",
            "master.toml:2: unknown key `shrinkmax` in [mirror]; did you mean `shrink_max`?",
        );
        check(
            "fleet = 'x'\n[miror]\npath = '/m'\n",
            "master.toml:2: unknown key `miror`; did you mean `mirror`?",
        );
        check(
            "zzz = 1\n",
            "master.toml:1: unknown key `zzz`; expected one of: fleet, mirror",
        );
    }

    #[test]
    fn a_wrong_value_says_what_was_expected() {
        let mirror = |line: &str| format!("fleet = 'x'\n[mirror]\npath = '/m'\n{line}\n");
        check(
            &mirror("quiet = '3 parsecs'"),
            "master.toml:4: `mirror.quiet`: `3 parsecs` is not a length of time such as \"3s\", \"5m\" or \"48h\"",
        );
        check(
            &mirror("quiet = 3"),
            "master.toml:4: `mirror.quiet`: invalid type: integer `3`, expected a length of time such as \"3s\", \"5m\" or \"48h\"",
        );
        check(
            &mirror("shrink_max = '130%'"),
            "master.toml:4: `mirror.shrink_max`: `130%` is not a whole percentage from \"0%\" to \"100%\"",
        );
        check(
            &mirror("unsigned = 'alow'"),
            "master.toml:4: `mirror.unsigned` cannot be `alow`; did you mean `allow`?",
        );
        check(
            &mirror("unsigned = 'x'"),
            "master.toml:4: `mirror.unsigned` cannot be `x`; expected one of: allow, refuse",
        );
    }

    #[test]
    fn what_is_missing_is_named_with_its_table() {
        check(
            "fleet = 'x'\n[mirror]\nquiet = '3s'\n",
            "master.toml:2: key `path` is missing in [mirror]",
        );
        for text in ["[mirror]\npath = '/m'\n", "\n[mirror]\npath = '/m'\n"] {
            check(text, "master.toml: key `fleet` is missing");
        }
        check("", "master.toml: key `fleet` is missing");
    }

    #[test]
    fn a_syntax_error_gives_its_line() {
        check(
            "fleet = 'x'\n[mirror\n",
            "master.toml:2: unclosed table, expected `]`",
        );
    }

    #[test]
    fn a_missing_file_says_what_to_do() {
        let error = load::<Settings>(Path::new("/nonexistent/master.toml")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "/nonexistent/master.toml does not exist; name the configuration file with --config"
        );
    }

    #[test]
    fn a_file_too_long_to_be_a_configuration_is_not_parsed() {
        let text = "#".repeat(CONFIG_BYTES_MAX as usize + 1);
        check(
            &text,
            "master.toml is longer than 1048576 bytes; is it a configuration file?",
        );
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let file = Path::new("/etc/clamcast/agent.toml");
        let found = |path: &str| beside(file, Path::new(path)).display().to_string();
        assert_eq!(found("ca.pem"), "/etc/clamcast/ca.pem");
        assert_eq!(found("/srv/ca.pem"), "/srv/ca.pem");
        let bare = beside(Path::new("agent.toml"), Path::new("ca.pem"));
        assert_eq!(bare, Path::new("ca.pem"));
    }

    #[test]
    fn values_are_shown_as_they_are_written() {
        fn check<T: FromStr + fmt::Display>(texts: &[&str]) {
            for text in texts {
                let value = text.parse::<T>().ok().expect(text);
                assert_eq!(value.to_string(), *text);
            }
        }
        check::<Span>(&["3s", "5m", "1h 30m", "0s", "250ms"]);
        check::<Size>(&["0B", "1B", "64MiB", "500kB", "3GB", "2TiB", "1025B"]);
        check::<Percent>(&["0%", "30%", "100%"]);
    }

    #[test]
    fn sizes_have_units_and_do_not_overflow() {
        let size = |text: &str| text.parse::<Size>().ok().map(|size| size.0);
        assert_eq!(size("0"), Some(0));
        assert_eq!(size("10 MB"), Some(10_000_000));
        assert_eq!(size("16777215TiB"), Some(((1 << 24) - 1) << 40));
        for bad in [
            "16777216TiB",
            "-1",
            "1.5MB",
            "MB",
            "",
            "1 mb",
            "9".repeat(30).as_str(),
        ] {
            assert_eq!(size(bad), None, "{bad}");
        }
    }

    #[test]
    fn shares_round_as_their_name_says() {
        let ten = Percent::new(10).unwrap();
        assert_eq!((ten.of(19), ten.of_rounded_up(11)), (1, 2));
        assert_eq!((ten.of(0), ten.of_rounded_up(0)), (0, 0));
        let all = Percent::new(100).unwrap();
        assert_eq!((all.of(u64::MAX), all.of_rounded_up(7)), (u64::MAX, 7));
        assert_eq!(Percent::new(101), None);
    }
}
