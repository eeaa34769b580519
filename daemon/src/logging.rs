//! The daemons' log: on stderr, for a person at a terminal or for the systemd journal.

use std::fmt;
use std::io::{self, IsTerminal as _};
use std::os::fd::AsFd as _;

use nix::sys::stat::fstat;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::fmt::format::{Format, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// The variable that overrides what is logged, in the syntax of tracing's `EnvFilter`, for example
/// `clamcast=debug,quinn=info`.
pub const FILTER_VARIABLE: &str = "CLAMCAST_LOG";

/// Starts the log: `verbosity` 0 shows what an operator cares about, 1 adds details, 2 everything.
/// Of other crates only warnings. `CLAMCAST_LOG` overrides all of it; if it cannot be understood,
/// that is logged and `verbosity` counts. A second call changes nothing.
pub fn start(verbosity: u8) {
    let (filter, problem) = filter(std::env::var(FILTER_VARIABLE).ok(), verbosity);
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        // It would tell of a line that cannot be written, as on a full disk, by a print to stderr,
        // which cannot be written either and then panics.
        .log_internal_errors(false)
        .with_ansi(io::stderr().is_terminal() && !is_set("NO_COLOR"));
    // The first log to start stays, as tests that run several daemons in one process need it.
    let _ = if journal_reads_stderr() {
        log.event_format(Journal).try_init()
    } else {
        log.try_init()
    };
    if let Some(error) = problem {
        tracing::warn!(%error, "{FILTER_VARIABLE} is not a log filter, ignoring it");
    }
}

/// Lines for the journal: `<N>` in front is the priority (sd-daemon(3)), by which `journalctl -p warning`
/// selects. The journal stamps every line with the time itself.
struct Journal;

impl<S, N> FormatEvent<S, N> for Journal
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(writer, "<{}>", priority(*event.metadata().level()))?;
        let format = Format::default().without_time().with_ansi(false);
        format.format_event(context, writer, event)
    }
}

/// The priority of syslog(3).
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

/// The filter that counts, and what was wrong with the one of the environment.
fn filter(environment: Option<String>, verbosity: u8) -> (EnvFilter, Option<ParseError>) {
    let level = match verbosity {
        0 => "info",
        1 => "debug",
        2.. => "trace",
    };
    // A target matches by its beginning, so this is every crate of ours.
    let ours = || EnvFilter::new(format!("warn,clamcast={level}"));
    let Some(text) = environment.filter(|text| !text.trim().is_empty()) else {
        return (ours(), None);
    };
    match EnvFilter::try_new(text) {
        Ok(filter) => (filter, None),
        Err(error) => (ours(), Some(error)),
    }
}

/// Whether the variable is set to anything (<https://no-color.org>: not empty).
pub fn is_set(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| !value.is_empty())
}

/// Whether stderr goes to the journal: systemd names the device and inode of the stream it set up
/// (systemd.exec(5)), which a child that redirects its stderr inherits without meaning it.
fn journal_reads_stderr() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    fstat(io::stderr().as_fd())
        .is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(environment: Option<&str>, verbosity: u8, filter_text: &str, understood: bool) {
        let (found, problem) = filter(environment.map(str::to_owned), verbosity);
        let mut parts: Vec<_> = found.to_string().split(',').map(str::to_owned).collect();
        parts.sort();
        assert_eq!(parts.join(","), filter_text);
        assert_eq!(problem.is_none(), understood);
    }

    #[test]
    fn the_environment_overrides_verbosity_if_it_can_be_understood() {
        check(None, 0, "clamcast=info,warn", true);
        check(None, 1, "clamcast=debug,warn", true);
        check(Some(""), 2, "clamcast=trace,warn", true);
        check(Some("quinn=debug"), 2, "quinn=debug", true);
        check(Some("clamcast=loud"), 0, "clamcast=info,warn", false);
    }
}
