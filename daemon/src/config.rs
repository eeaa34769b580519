//! Configuration files: TOML in which a key that we do not know is a mistake, not a comment, and
//! every mistake is told with its line, its key and what was expected there.

mod problem;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::de::{DeserializeOwned, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::exit;
use crate::input::{self, InputError};

pub use problem::Problem;

/// Longest configuration file in bytes that is read: thousands of groups fit, and a path that was
/// mistyped to a database or a device is not taken into memory.
pub const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(transparent)]
    Read(#[from] InputError),
    /// It is some other kind of file.
    #[error("{path}:{line}: not a text in UTF-8; is it a configuration file?")]
    NotText {
        /// The file.
        path: PathBuf,
        /// The line of the first byte that is none, from 1.
        line: usize,
    },
    /// There is nothing in it.
    #[error("{path} is empty; is it the right file?")]
    Empty {
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

impl ConfigError {
    /// The exit code of a command that only wants to know what the configuration says.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Read(error) => error.exit_code(),
            Self::NotText { .. } | Self::Empty { .. } | Self::Content { .. } => exit::USAGE,
        }
    }
}

/// What a configuration file may hold. Its structs are to be `#[serde(deny_unknown_fields)]`.
pub trait Settings: DeserializeOwned {
    /// Every key with the tables around it, as in `mirror.path`, and what may stand there, in words
    /// that go on after "expected". `*` stands for names that the operator chooses.
    const KEYS: &'static [(&'static str, &'static str)];
}

/// A configuration file that was read.
#[derive(Debug)]
pub struct File {
    path: PathBuf,
    text: String,
}

impl File {
    /// Reads `path`, which the option `--config` names.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let origin = "name the configuration file with --config";
        Self::read_for("--config", path, origin)
    }

    /// Reads `path`, see [`input::read`].
    pub fn read_for(
        option: &'static str,
        path: &Path,
        origin: &'static str,
    ) -> Result<Self, ConfigError> {
        let bytes = input::read(option, path, CONFIG_BYTES_MAX, origin)?;
        let path = path.to_owned();
        let text = match String::from_utf8(bytes) {
            Err(error) => {
                let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
                let line = line_of(good);
                return Err(ConfigError::NotText { path, line });
            }
            // TOML has no such byte, nor does any text; a zeroed file is what some crashes leave.
            Ok(text) => match text.find('\0') {
                None => text,
                Some(at) => {
                    let line = line_of(&text.as_bytes()[..at]);
                    return Err(ConfigError::NotText { path, line });
                }
            },
        };
        if text.trim().is_empty() {
            return Err(ConfigError::Empty { path });
        }
        Ok(Self { path, text })
    }

    /// What it says.
    pub fn parse<T: Settings>(&self) -> Result<T, ConfigError> {
        problem::parse(&self.text).map_err(|(line, problem)| self.error(line, problem))
    }

    /// The error that the value of `key` (the names of its tables, and its own) is well-formed but
    /// not what is expected there; `found` is the part of a list that is not.
    pub fn wrong<T: Settings>(&self, key: &[&str], found: Option<&str>) -> ConfigError {
        let (line, problem) = problem::wrong::<T>(&self.text, key, found);
        self.error(line, problem)
    }

    /// The error that a part of the value of `key` is not what it should be, which `why` says with
    /// what stands there.
    pub fn wrong_part(&self, key: &[&str], why: &dyn std::error::Error) -> ConfigError {
        let (line, problem) = problem::part(&self.text, key, why.to_string());
        self.error(line, problem)
    }

    fn error(&self, line: Option<usize>, problem: Problem) -> ConfigError {
        ConfigError::Content {
            path: self.path.clone(),
            line,
            problem: Box::new(problem),
        }
    }
}

/// The line, from 1, in which the text after `before` begins.
fn line_of(before: &[u8]) -> usize {
    before.iter().filter(|byte| **byte == b'\n').count() + 1
}

/// The path as the file `file` means it: relative to the directory that the file is in.
pub fn beside(file: &Path, path: &Path) -> PathBuf {
    file.parent().unwrap_or(Path::new("")).join(path)
}

/// Whether one of two directories is the other, or is in it, wherever links lead. What is not there
/// yet is taken to be a plain directory.
pub fn overlap(one: &Path, other: &Path) -> bool {
    let (one, other) = (without_links(one), without_links(other));
    one.starts_with(&other) || other.starts_with(&one)
}

fn without_links(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let real = path.ancestors().find_map(|there| {
        let rest = path.strip_prefix(there).ok()?;
        there.canonicalize().ok().map(|real| real.join(rest))
    });
    real.unwrap_or(path)
}

/// A path; nothing is none.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "PathBuf")]
pub struct FilePath(PathBuf);

impl TryFrom<PathBuf> for FilePath {
    type Error = &'static str;

    fn try_from(path: PathBuf) -> Result<Self, &'static str> {
        if path.as_os_str().is_empty() {
            return Err("a path is not empty");
        }
        Ok(Self(path))
    }
}

impl FilePath {
    /// The path as the file `file` means it, see [`beside`].
    pub fn beside(&self, file: &Path) -> PathBuf {
        beside(file, &self.0)
    }
}

/// Longest length of time. Nothing here is to wait for longer than a certificate counts, and what is
/// so long could not be added to the time of day.
pub const SPAN_MAX: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// A length of time up to [`SPAN_MAX`], written like `"3s"`, `"5m"`, `"1h 30m"`.
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
    const EXPECTED: &'static str =
        "a length of time up to \"365d\", such as \"3s\", \"5m\" or \"48h\"";
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
            .ok()
            .filter(|span| *span <= SPAN_MAX)
            .map(Self)
            .ok_or_else(|| wrong::<Self>(text))
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
    fn directories_overlap_where_one_is_in_the_other_behind_links_too() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("db/inner")).unwrap();
        std::os::unix::fs::symlink("db", dir.path().join("link")).unwrap();
        let check = |one: &str, other: &str, expected: bool| {
            let (one, other) = (dir.path().join(one), dir.path().join(other));
            assert_eq!(overlap(&one, &other), expected, "{one:?} {other:?}");
            assert_eq!(overlap(&other, &one), expected, "{other:?} {one:?}");
        };
        check("db", "db/", true);
        check("db", "db/inner", true);
        check("db", "db/not/there/yet", true);
        check("db/inner/..", "db/state", true);
        check("link/state", "db", true);
        check("db", "db2", false);
        check("db/inner", "db/state", false);
        check("state", "link", false);
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
    fn lengths_of_time_end_at_a_year() {
        let span = |text: &str| text.parse::<Span>().ok().map(|span| span.0);
        assert_eq!(span("365d"), Some(SPAN_MAX));
        for bad in ["365d 1ms", "99999999999d", "106751991167300d", "3"] {
            assert_eq!(span(bad), None, "{bad}");
        }
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
