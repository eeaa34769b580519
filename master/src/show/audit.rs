//! What `audit show` and `audit verify` print.

use clamcast_daemon::audit::Verification;
use clamcast_daemon::exit::{self, Exit};
use clamcast_daemon::say;
use clamcast_daemon::table::printable;
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::{or_dash, position, text, time};

/// Reads `--since`: a point in time, or how long ago.
pub(crate) fn since(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    let ago = humantime::parse_duration(text)
        .map_err(|_| "expected a time like 2026-11-22T08:00:00Z or a duration like 24h")?;
    let ago = SignedDuration::try_from(ago).map_err(|error| error.to_string())?;
    Timestamp::now()
        .checked_sub(ago)
        .map_err(|error| error.to_string())
}

/// Prints a piece of the audit log.
pub(crate) fn records(records: Value, json: bool) {
    for record in records.as_array().into_iter().flatten() {
        if json {
            say!("{record}");
            continue;
        }
        let at = if record["generation"].is_null() {
            "-".to_owned()
        } else {
            position(record)
        };
        let outcome = or_dash(text(&record["outcome"]));
        let line = format!(
            "{:>6} {} {:<15} {:<18} {:<18} {:<6} {:<9} {}",
            text(&record["seq"]),
            time(&record["time"]),
            text(&record["event"]),
            text(&record["actor"]),
            text(&record["subject"]),
            at,
            outcome,
            detail(&record["detail"]),
        );
        say!("{}", printable(&line));
    }
}

/// The details that a person can read; a receipt's envelope is for machines (`--json`).
fn detail(detail: &Value) -> String {
    let fields = detail.as_object().into_iter().flatten();
    let readable = fields.filter(|(_, value)| !value.is_object() && !value.is_null());
    let pairs = readable.map(|(key, value)| match value.as_array() {
        Some(list) => format!(
            "{key}={}",
            list.iter().map(text).collect::<Vec<_>>().join(",")
        ),
        None => format!("{key}={}", text(value)),
    });
    pairs.collect::<Vec<_>>().join(" ")
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
