//! Loads a set of databases with `clamscan`: it says what clamd's log keeps to itself.

use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::time::timeout;

use super::attempt::LoadTest;
use super::log::is_hosts_trouble;
use super::settings::Settings;

/// A full set takes half a minute on a slow host. A directory that is named like a database makes
/// the loader spin for ever.
pub(super) const LOAD_TEST_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// So much of what it says is kept, in bytes. The reason comes last, after a warning for every odd
/// line; the rest is thrown away.
const SAID_BYTES_MAX: usize = 16 << 10;

/// So many of its errors make a reason: the line, the file, the kind.
const ERRORS_MAX: usize = 3;

/// Loads `directory` as clamd would, with as much memory as clamd needs for it.
pub(super) async fn load(settings: &Settings, directory: &Path, limit: Duration) -> LoadTest {
    let Some(scanner) = &settings.scanner else {
        return LoadTest::NotRun("no clamscan on this host".into());
    };
    let mut command = Command::new(scanner);
    command.arg("--no-summary").arg("--database").arg(directory);
    if settings.official_only {
        command.arg("--official-db-only=yes");
    }
    // It scans its standard input, which is empty, when everything is loaded.
    command.arg("-").stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    // Also when the attempt that wanted to know is over.
    command.kill_on_drop(true);
    let ended = timeout(limit, async {
        let mut child = command.spawn()?;
        let stderr = child.stderr.take().expect("it was asked for");
        let said = last_of(stderr).await?;
        io::Result::Ok((child.wait().await?, said))
    });
    match ended.await {
        Ok(Ok((status, _))) if status.success() => LoadTest::Passed,
        Ok(Ok((status, said))) => match reason(&said) {
            Some(reason) if !is_hosts_trouble(&reason) => LoadTest::Failed(reason),
            Some(reason) => LoadTest::NotRun(format!("clamscan: {reason}")),
            None => LoadTest::NotRun(format!("clamscan ended with {status}, without a reason")),
        },
        Ok(Err(error)) => LoadTest::NotRun(format!("cannot run {}: {error}", scanner.display())),
        Err(_) => LoadTest::NotRun(format!("clamscan was not done after {limit:?}")),
    }
}

/// The end of what is written, however much it is.
async fn last_of(mut stream: impl AsyncRead + Unpin) -> io::Result<String> {
    let mut kept = Vec::new();
    while stream.read_buf(&mut kept).await? > 0 {
        if kept.len() > 2 * SAID_BYTES_MAX {
            kept.drain(..kept.len() - SAID_BYTES_MAX);
        }
    }
    Ok(String::from_utf8_lossy(&kept).into_owned())
}

/// What libclamav gave as the reason of a failed load, which ends with a line `ERROR: ...`.
fn reason(said: &str) -> Option<String> {
    let last = said.lines().rev().find_map(|l| l.strip_prefix("ERROR: "))?;
    let errors: Vec<_> = said
        .lines()
        .filter_map(|line| line.strip_prefix("LibClamAV Error: "))
        // Says the same as the line before it, without the kind.
        .filter(|error| !error.starts_with("cli_loaddbdir: error loading"))
        .collect();
    let errors = &errors[errors.len().saturating_sub(ERRORS_MAX)..];
    if errors.is_empty() || !errors.iter().any(|error| error.contains(last)) {
        let all: Vec<_> = errors.iter().copied().chain([last]).collect();
        return Some(all.join("; "));
    }
    Some(errors.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(said: &str, expected: Option<&str>) {
        assert_eq!(reason(said).as_deref(), expected, "{said}");
    }

    #[test]
    fn the_reason_names_the_file() {
        check(
            "LibClamAV Error: Problem parsing database at line 1\n\
             LibClamAV Error: Can't load db/bad.ndb: Malformed database\n\
             LibClamAV Error: cli_loaddbdir: error loading database db/bad.ndb\n\
             ERROR: Malformed database\n",
            Some("Problem parsing database at line 1; Can't load db/bad.ndb: Malformed database"),
        );
        check(
            "LibClamAV Error: cli_loaddbdir: No supported database files found in db\n\
             ERROR: Can't open file or directory\n",
            Some(
                "cli_loaddbdir: No supported database files found in db; \
                 Can't open file or directory",
            ),
        );
        check(
            "ERROR: Can't allocate memory\n",
            Some("Can't allocate memory"),
        );
    }

    #[test]
    fn without_an_error_at_the_end_there_is_no_reason() {
        check("", None);
        check("LibClamAV Warning: something odd\nKilled\n", None);
    }
}
