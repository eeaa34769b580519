//! What the installed clamd says of its configuration: it reads it as it would at a start, and ends
//! with its version. That loads nothing, listens nowhere and writes nothing (tried with clamd 1.4
//! under strace), and needs no table of options that the next release makes wrong.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use tokio::time::timeout;

/// It takes some hundredths of a second.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// So much of what it says is read, in bytes: a line for every odd option.
const SAID_BYTES_MAX: u64 = 16 << 10;

/// So many warnings are passed on.
const WARNINGS_MAX: usize = 5;

/// Options that findings advise and that not every clamd in use knows.
const ADVISED: [&str; 4] = [
    "ConcurrentDatabaseReload",
    "EnableReloadCommand",
    "EnableVersionCommand",
    "OfficialDatabaseOnly",
];

/// What the installed clamd says.
#[derive(Clone, Debug, Default)]
pub(super) struct Program {
    /// Where it is.
    pub(super) path: PathBuf,
    /// Its version, if it takes the configuration; else why it would not start.
    pub(super) verdict: Option<Result<String, String>>,
    /// What it passes over in that configuration.
    pub(super) warnings: Vec<String>,
    /// Those of the advised options that it does not know.
    pub(super) unknown: Vec<&'static str>,
}

impl Program {
    /// Asks the clamd of this host about the configuration at `conf`; `None` if there is none.
    pub(super) async fn ask(conf: &Path) -> Option<Self> {
        let path = find()?;
        let judged = Said::of(&path, conf.as_os_str(), "").await.ok();
        let mut unknown = Vec::new();
        // It stops at the first that it does not know, so that each round is about one of them.
        for _ in ADVISED {
            let asked = ADVISED.iter().filter(|option| !unknown.contains(*option));
            let text: String = asked.map(|option| format!("{option} yes\n")).collect();
            let Ok(said) = Said::of(&path, OsStr::new("/dev/stdin"), &text).await else {
                break;
            };
            let named = said.unknown_option();
            match ADVISED.into_iter().find(|option| Some(*option) == named) {
                Some(option) => unknown.push(option),
                None => break,
            }
        }
        Some(Self {
            verdict: judged.as_ref().and_then(Said::verdict),
            warnings: judged.map_or_else(Vec::new, |said| said.warnings()),
            path,
            unknown,
        })
    }
}

/// `clamd` on the search path, or where Debian, Red Hat and a build from source put it, which an
/// ordinary user's path need not have.
fn find() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from);
    env::split_paths(&path)
        .chain(usual)
        .map(|directory| directory.join("clamd"))
        .find(|program| program.is_file())
}

/// What it said.
#[derive(Debug)]
struct Said {
    success: bool,
    version: String,
    errors: String,
}

impl Said {
    async fn of(program: &Path, conf: &OsStr, stdin: &str) -> io::Result<Self> {
        let mut clamd = Command::new(program)
            .env("LC_ALL", "C")
            .arg("--config-file")
            .arg(conf)
            .arg("--version")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut question = clamd.stdin.take().expect("it was asked for");
        let mut version = clamd.stdout.take().expect("it was asked for");
        let mut errors = clamd.stderr.take().expect("it was asked for");
        let answer = async {
            // One that does not read it to the end has its answer already.
            let _ = question.write_all(stdin.as_bytes()).await;
            drop(question);
            let mut said = [Vec::new(), Vec::new()];
            let [out, err] = &mut said;
            let (mut version, mut errors) = (
                (&mut version).take(SAID_BYTES_MAX),
                (&mut errors).take(SAID_BYTES_MAX),
            );
            tokio::try_join!(version.read_to_end(out), errors.read_to_end(err))?;
            let [version, errors] = said.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
            let success = clamd.wait().await?.success();
            io::Result::Ok(Self {
                success,
                version,
                errors,
            })
        };
        timeout(ANSWER_TIME, answer).await?
    }

    /// Whether it would start with that configuration. A file that it cannot open says nothing of it.
    fn verdict(&self) -> Option<Result<String, String>> {
        if self.success {
            let version = self.version.trim();
            let version = version.split('/').next().unwrap_or(version);
            return Some(Ok(version.to_owned()));
        }
        let mut errors = self.errors.lines();
        let error = errors.find_map(|line| line.strip_prefix("ERROR: "))?;
        let opened = !error.starts_with("Can't open/parse the config file");
        opened.then(|| Err(error.to_owned()))
    }

    /// As clamd words it: `ERROR: Parse error at FILE:LINE: Unknown option NAME`.
    fn unknown_option(&self) -> Option<&str> {
        let mut errors = self.errors.lines();
        errors.find_map(|line| Some(line.rsplit_once(": Unknown option ")?.1))
    }

    fn warnings(&self) -> Vec<String> {
        let lines = self.errors.lines();
        let warnings = lines.filter_map(|line| line.strip_prefix("WARNING: "));
        warnings.take(WARNINGS_MAX).map(str::to_owned).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(said: (&str, &str), verdict: Option<Result<&str, &str>>, unknown: Option<&str>) {
        let said = Said {
            success: said.1.is_empty(),
            version: said.0.into(),
            errors: said.1.into(),
        };
        let found = said.verdict();
        let found = found.as_ref().map(|found| match found {
            Ok(version) => Ok(version.as_str()),
            Err(error) => Err(error.as_str()),
        });
        assert_eq!(found, verdict);
        assert_eq!(said.unknown_option(), unknown);
    }

    #[test]
    fn clamd_says_itself_why_it_would_not_start() {
        check(
            ("ClamAV 1.4.6/27890/Sun Nov 22 06:43:59 2026\n", ""),
            Some(Ok("ClamAV 1.4.6")),
            None,
        );
        let parse = "Can't open/parse the config file /c\n";
        let unknown = "Parse error at /c:4: Unknown option EnableReloadCommand";
        check(
            ("", &format!("ERROR: {unknown}\nERROR: {parse}")),
            Some(Err(unknown)),
            Some("EnableReloadCommand"),
        );
        // It may not read it, which is no fault of what stands there.
        check(("", &format!("ERROR: {parse}")), None, None);
        check(("", "Segmentation fault\n"), None, None);
    }
}
