//! What `audit show` and `audit verify` print.

use clamcast_daemon::audit::Verification;
use clamcast_daemon::exit::{self, Exit};
use clamcast_daemon::say;
use clamcast_daemon::table::{Stream, terminal_width};
use clamcast_proto::dsse::Envelope;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::{or_dash, position, text, time};

/// Reads `--since`: a point in time, in UTC if it does not say, or how long ago.
pub(crate) fn since(text: &str, now: Timestamp) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    // A date alone is its midnight. One with another zone in it was read above.
    if let Ok(civil) = text.parse::<DateTime>() {
        let zoned = civil.to_zoned(TimeZone::UTC);
        return zoned
            .map(|zoned| zoned.timestamp())
            .map_err(|error| error.to_string());
    }
    let ago = humantime::parse_duration(text).map_err(|_| {
        "expected a day like 2026-11-22, a time like 2026-11-22T08:00:00Z or a duration like 24h"
    })?;
    let ago = SignedDuration::try_from(ago).map_err(|error| error.to_string())?;
    now.checked_sub(ago).map_err(|error| error.to_string())
}

/// Prints the audit log as it comes: what happened, to whom, what came of it, and who did it.
pub(crate) struct Records {
    json: bool,
    table: Stream,
    /// Whether the daemon has said anything yet.
    begun: bool,
    /// The number of the last record that was shown.
    last: Option<u64>,
}

impl Records {
    pub(crate) fn new(json: bool) -> Self {
        // Wide enough for most, so that lines in a pipe are aligned without having seen the others.
        let table = Stream::new([
            ("seq", 6),
            ("time", 20),
            ("event", 15),
            ("subject", 16),
            ("generation", 10),
            ("outcome", 9),
            ("actor", 18),
            ("detail", 0),
        ]);
        Self {
            json,
            table,
            begun: false,
            last: None,
        }
    }

    pub(crate) fn begun(&self) -> bool {
        self.begun
    }

    pub(crate) fn last(&self) -> Option<u64> {
        self.last
    }

    /// Prints a piece of the log, or says on stderr what there is to say of it.
    pub(crate) fn show(&mut self, piece: &Value) {
        if let Some(word) = piece.as_str() {
            if !self.begun {
                eprintln!("{word}");
            }
            self.begun = true;
            return;
        }
        self.begun = true;
        let records = piece.as_array().into_iter().flatten();
        let last = records
            .clone()
            .filter_map(|record| record["seq"].as_u64())
            .max();
        self.last = self.last.max(last);
        if self.json {
            records.for_each(|record| say!("{record}"));
            return;
        }
        for line in self.table.lines(records.map(row), terminal_width()) {
            say!("{line}");
        }
    }
}

fn row(record: &Value) -> Vec<String> {
    let generation = if record["generation"].is_null() {
        "-".to_owned()
    } else {
        position(record)
    };
    vec![
        text(&record["seq"]),
        time(&record["time"]),
        text(&record["event"]),
        or_dash(text(&record["subject"])),
        generation,
        or_dash(text(&record["outcome"])),
        text(&record["actor"]),
        detail(&record["detail"]),
    ]
}

/// The details that a person can read, and of a receipt why it is not good news; all of it is for
/// machines (`--json`).
fn detail(detail: &Value) -> String {
    let receipt = serde_json::from_value::<Envelope>(detail["receipt"].clone()).ok();
    let receipt = receipt.and_then(|receipt| serde_json::from_slice(&receipt.payload).ok());
    let receipt: Value = receipt.unwrap_or_default();
    let told = ["error", "drift"].map(|key| (key, &receipt[key]));
    let fields = detail.as_object().into_iter().flatten();
    let fields = fields.filter(|(_, value)| !value.is_object());
    let fields = fields.map(|(key, value)| (key.as_str(), value));
    let pairs = fields.chain(told).filter_map(|(key, value)| {
        let list = value.as_array().map(|list| {
            let values: Vec<_> = list.iter().map(short).collect();
            values.join(",")
        });
        let value = list.unwrap_or_else(|| short(value));
        (!value.is_empty()).then(|| format!("{key}={value}"))
    });
    pairs.collect::<Vec<_>>().join(" ")
}

/// A SHA-256 is told from others by its first 12 digits. What has fields of its own, a file that was
/// found changed, is told of by its name.
fn short(value: &Value) -> String {
    let value = text(value.get("name").unwrap_or(value));
    if value.len() == 64 && value.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        value[..12].to_owned()
    } else {
        value
    }
}

/// Prints what `audit verify` found; exit 1 if anything is wrong.
pub(crate) fn verification(verification: &Verification, json: bool) -> Result<(), Exit> {
    if json {
        say!("{:#}", verification.to_json());
    }
    match &verification.first_bad {
        None => {
            if !json {
                say!(
                    "good: {} records, signed head and all",
                    verification.records
                );
            }
            Ok(())
        }
        Some(_) if json => Err(Exit::quietly(exit::NOT_CONFORMANT)),
        Some(bad) => {
            let bad = anyhow::anyhow!("line {}: {}", bad.line, bad.fault);
            Err(Exit::new(
                exit::NOT_CONFORMANT,
                bad.context("the audit log is not what was signed"),
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn since_takes_a_day_a_time_or_how_long_ago() {
        let now: Timestamp = "2026-11-22T12:00:00Z".parse().unwrap();
        let check = |text: &str, expected: &str| {
            let since = since(text, now).map(|time| time.to_string());
            assert_eq!(since.as_deref().unwrap_or("no"), expected, "{text}");
        };
        check("2026-11-20", "2026-11-20T00:00:00Z");
        check("2026-11-20T08:30", "2026-11-20T08:30:00Z");
        check("2026-11-20 08:30:01", "2026-11-20T08:30:01Z");
        check("2026-11-20T08:30:00Z", "2026-11-20T08:30:00Z");
        check("2026-11-20T08:30:00+02:00", "2026-11-20T06:30:00Z");
        check("24h", "2026-11-21T12:00:00Z");
        check("1day 2h", "2026-11-21T10:00:00Z");
        for bad in [
            "",
            "soon",
            "2026-13-01",
            "2026-11-20T08:30:00+99:00",
            "90000000years",
        ] {
            check(bad, "no");
        }
    }

    #[test]
    fn details_are_key_and_value_with_short_digests() {
        let check = |value: Value, expected: &str| assert_eq!(detail(&value), expected);
        let digest = "fde3840f0bd4122539b34bd73b182519656ac15cd7f2a2cbb07a9649a49180d2";
        check(json!(null), "");
        check(
            json!({ "content": digest, "files": ["a.ndb", "b.ndb"], "reason": null }),
            "content=fde3840f0bd4 files=a.ndb,b.ndb",
        );
        check(
            json!({ "failed": [], "done": 1, "digests": [digest] }),
            "digests=fde3840f0bd4 done=1",
        );
        check(json!({ "receipt": { "payload": "?" } }), "");
    }
}
