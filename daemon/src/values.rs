//! Values of the configuration that are written as text: lengths of time, sizes, shares.
//!
//! Pure: no sockets, no disk, no clock.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

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
