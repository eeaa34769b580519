//! Renders `audit show` and `audit verify`.

use clamcast_daemon::audit::{Record, Verification};
use clamcast_daemon::exit::{self, Exit};
use clamcast_daemon::table::{Stream, terminal_width};
use clamcast_daemon::{say, table};
use clamcast_proto::dsse::Envelope;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use serde_json::Value;

use super::{or_dash, position_or_dash};
use crate::operate::api::AuditPiece;

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

    /// Prints a piece of the log, or the reason why there is none on stderr.
    pub(crate) fn show(&mut self, piece: &Value) -> serde_json::Result<()> {
        let begun = std::mem::replace(&mut self.begun, true);
        let records = match AuditPiece::deserialize(piece)? {
            AuditPiece::Nothing(reason) => {
                if !begun {
                    eprintln!("{reason}");
                }
                return Ok(());
            }
            AuditPiece::Records(records) => records,
        };
        self.last = self.last.max(records.iter().map(|record| record.seq).max());
        if self.json {
            let records = piece.as_array().into_iter().flatten();
            records.for_each(|record| say!("{}", table::printable_json(&record.to_string()))); // with fields of a newer daemon
            return Ok(());
        }
        for line in self.table.lines(records.iter().map(row), terminal_width()) {
            say!("{line}");
        }
        Ok(())
    }
}

fn row(record: &Record) -> Vec<String> {
    vec![
        record.seq.to_string(),
        format!("{:.0}", record.time),
        record.event.clone(),
        or_dash(Some(&record.subject)).to_owned(),
        position_or_dash(record.position()),
        or_dash(record.outcome.as_deref()).to_owned(),
        record.actor.clone(),
        detail(&record.detail),
    ]
}

/// The details that a person can read, and of a receipt the bad news; `--json` has all of it.
fn detail(detail: &Value) -> String {
    #[derive(Deserialize)]
    struct WithReceipt {
        receipt: Envelope,
    }
    /// Free-form, as the rest: an agent of another version may have written it.
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct BadNews {
        error: Value,
        drift: Value,
    }
    let receipt = WithReceipt::deserialize(detail).ok();
    let news = receipt.and_then(|it| serde_json::from_slice(&it.receipt.payload).ok());
    let BadNews { error, drift } = news.unwrap_or_default();
    let fields = detail.as_object().into_iter().flatten();
    let fields = fields.filter(|(_, value)| !value.is_object());
    let fields = fields.map(|(key, value)| (key.as_str(), value));
    let news = [("error", &error), ("drift", &drift)];
    let pairs = fields.chain(news).filter_map(|(key, value)| {
        let list = value.as_array().map(|list| {
            let values: Vec<_> = list.iter().map(short).collect();
            values.join(",")
        });
        let value = list.unwrap_or_else(|| short(value));
        (!value.is_empty()).then(|| format!("{key}={value}"))
    });
    pairs.collect::<Vec<_>>().join(" ")
}

/// A scalar as text: a SHA-256 by its first 12 digits, an object (a file that was found changed) by its
/// name.
fn short(value: &Value) -> String {
    let text = match value.get("name").unwrap_or(value) {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        value @ (Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => {
            value.to_string()
        }
    };
    if text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        text[..12].to_owned()
    } else {
        text
    }
}

/// Prints what `audit verify` found; exit 1 if anything is wrong.
pub(crate) fn verification(verification: &Verification, json: bool) -> Result<(), Exit> {
    if json {
        say!("{}", table::json(&verification.to_json()));
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
