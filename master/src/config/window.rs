//! Maintenance windows: when the hosts of a group may be given something new.
//!
//! Written `DAYS HH:MM-HH:MM [ZONE]`: `Mon-Fri 22:00-05:00`, `Sat,Sun 00:00-24:00 Europe/Berlin`.
//! A window that ends before it begins runs over midnight and belongs to the day on which it
//! begins. Without a zone the master's own counts.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// Names of the days, Monday first.
const DAYS: [&str; 7] = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];

/// Minutes of a day.
const DAY: u16 = 24 * 60;

/// A span of time that comes back every week.
#[derive(Clone, Debug)]
pub struct Window {
    text: String,
    /// By days since Monday.
    days: [bool; 7],
    /// Minutes since midnight.
    from: u16,
    until: u16,
    zone: TimeZone,
}

/// A text is not a window.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub enum WindowError {
    /// It does not have the two or three parts.
    #[error(
        "`{0}` is not a window such as \"Mon-Fri 22:00-05:00\" or \"Sat,Sun 00:00-24:00 Europe/Berlin\""
    )]
    Parts(String),
    /// Not days.
    #[error(
        "`{0}` is not a day or a range of days: Mon Tue Wed Thu Fri Sat Sun, as Mon-Fri or Sat,Sun"
    )]
    Days(String),
    /// Not times.
    #[error("`{0}` is not a pair of times such as 22:00-05:00")]
    Times(String),
    /// A time zone that is not in the system's database.
    #[error("`{0}` is not a time zone that this system knows, such as Europe/Berlin or UTC")]
    Zone(String),
}

impl Window {
    /// Whether it is open.
    pub fn is_open(&self, now: Timestamp) -> bool {
        let local = now.to_zoned(self.zone.clone());
        let minute = u16::from(local.hour().unsigned_abs()) * 60;
        let minute = minute + u16::from(local.minute().unsigned_abs());
        let today = usize::from(local.weekday().to_monday_zero_offset().unsigned_abs());
        let yesterday = (today + 6) % 7;
        if self.from < self.until {
            self.days[today] && (self.from..self.until).contains(&minute)
        } else {
            (self.days[today] && minute >= self.from)
                || (self.days[yesterday] && minute < self.until)
        }
    }
}

/// As it was written, with the zone that counts.
impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let zone = self.zone.iana_name().unwrap_or("local time");
        write!(f, "{} {zone}", self.text)
    }
}

impl FromStr for Window {
    type Err = WindowError;

    fn from_str(text: &str) -> Result<Self, WindowError> {
        let parts: Vec<_> = text.split_whitespace().collect();
        let (days, times, zone) = match parts[..] {
            [days, times] => (days, times, None),
            [days, times, zone] => (days, times, Some(zone)),
            _ => return Err(WindowError::Parts(text.to_owned())),
        };
        let (from, until) = range(times).ok_or_else(|| WindowError::Times(times.to_owned()))?;
        let zone = match zone {
            None => TimeZone::system(),
            Some(name) => TimeZone::get(name).map_err(|_| WindowError::Zone(name.to_owned()))?,
        };
        Ok(Self {
            text: format!("{days} {times}"),
            days: week(days).ok_or_else(|| WindowError::Days(days.to_owned()))?,
            from,
            until,
            zone,
        })
    }
}

fn week(text: &str) -> Option<[bool; 7]> {
    let mut week = [false; 7];
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (day(first)?, day(last)?);
        for offset in 0..=(last + 7 - first) % 7 {
            week[(first + offset) % 7] = true;
        }
    }
    Some(week)
}

fn day(text: &str) -> Option<usize> {
    DAYS.iter().position(|day| day.eq_ignore_ascii_case(text))
}

fn range(text: &str) -> Option<(u16, u16)> {
    let (from, until) = text.split_once('-')?;
    let (from, until) = (minute(from)?, minute(until)?);
    (from < DAY).then_some((from, until))
}

fn minute(text: &str) -> Option<u16> {
    let (hours, minutes) = text.split_once(':')?;
    let digits = |text: &str| text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(hours) || !digits(minutes) {
        return None;
    }
    let (hours, minutes): (u16, u16) = (hours.parse().ok()?, minutes.parse().ok()?);
    let minute = hours * 60 + minutes;
    (minutes < 60 && minute <= DAY).then_some(minute)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the window is open at that local time in Berlin.
    #[track_caller]
    fn check(window: &str, local: &str, open: bool) {
        let window: Window = format!("{window} Europe/Berlin").parse().unwrap();
        let now: jiff::Zoned = format!("{local}[Europe/Berlin]").parse().unwrap();
        assert_eq!(window.is_open(now.timestamp()), open, "{window} at {local}");
    }

    #[test]
    fn a_window_within_a_day() {
        let office = "Mon-Fri 09:00-17:00";
        check(office, "2026-11-20T09:00", true); // a Friday
        check(office, "2026-11-20T16:59:59", true);
        check(office, "2026-11-20T17:00", false);
        check(office, "2026-11-20T08:59:59", false);
        check(office, "2026-11-21T12:00", false);
    }

    #[test]
    fn a_window_over_midnight_belongs_to_the_day_on_which_it_begins() {
        let nights = "Mon-Fri 22:00-05:00";
        check(nights, "2026-11-20T22:00", true);
        check(nights, "2026-11-21T04:59", true);
        check(nights, "2026-11-21T05:00", false);
        check(nights, "2026-11-21T22:00", false);
        check(nights, "2026-11-23T04:00", false); // Monday morning is Sunday's night
        check(nights, "2026-11-23T22:00", true);
    }

    #[test]
    fn days_are_single_ranges_or_lists_and_ranges_go_round() {
        check("Sat,Sun 00:00-24:00", "2026-11-22T23:59", true);
        check("Sat,Sun 00:00-24:00", "2026-11-23T00:00", false);
        check("Fri-Mon 00:00-24:00", "2026-11-22T12:00", true);
        check("Fri-Mon 00:00-24:00", "2026-11-24T12:00", false);
        check("wed 12:00-12:30", "2026-11-25T12:15", true);
    }

    #[test]
    fn the_zone_counts_also_when_the_clocks_change() {
        // 02:30 on the day on which summer time ends comes twice; the window is open both times.
        let window: Window = "Sun 02:00-03:00 Europe/Berlin".parse().unwrap();
        for utc in ["2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z"] {
            assert!(window.is_open(utc.parse().unwrap()), "{utc}");
        }
        assert!(!window.is_open("2026-10-25T02:30:00Z".parse().unwrap()));
    }

    #[test]
    fn what_is_not_a_window_says_what_is_wrong_with_it() {
        for (text, wrong) in [
            ("22:00-05:00", "is not a window"),
            ("Mon 22:00-05:00 Europe/Berlin extra", "is not a window"),
            ("Mo 22:00-05:00", "`Mo` is not a day"),
            ("Mon- 22:00-05:00", "is not a day"),
            ("Mon 22-05", "is not a pair of times"),
            ("Mon 24:00-05:00", "is not a pair of times"),
            ("Mon 22:60-05:00", "is not a pair of times"),
            ("Mon +2:00-05:00", "is not a pair of times"),
            ("Mon 22:00-05:00 Mars/Olympus", "is not a time zone"),
        ] {
            let error = text.parse::<Window>().unwrap_err().to_string();
            assert!(error.contains(wrong), "{text}: {error}");
        }
    }
}
