//! What clamd's log says about the loads of its databases.
//!
//! Pure: pieces of a log come in, ended loads go out.

use clamcast_daemon::clamscan::is_hosts_trouble;

/// Longest line that is looked at, in bytes: the ones that matter have less than 5 kB, the longest
/// path and some words. The rest of a longer one is passed over.
const LINE_BYTES_MAX: usize = 8 << 10;

/// A load of the databases that has ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Load {
    /// Whether it began after the mark, and so read what was on disk then.
    pub(super) after: bool,
    /// How it ended.
    pub(super) end: LoadEnd,
}

/// How a load ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum LoadEnd {
    /// clamd scans with it.
    Loaded,
    /// clamd cannot use the databases; its own words.
    Failed(String),
    /// Something else stood in the way; clamd's own words.
    Hindered(String),
    /// clamd has no engine left to reload, and will not have one until it is restarted.
    Dead,
}

/// Reads a log, in pieces of any length, that begins at a mark.
#[derive(Debug, Default)]
pub(super) struct Loads {
    line: Vec<u8>,
    /// clamd was started, and has not begun to load yet.
    starting: bool,
    current: Option<Current>,
    end: Option<LoadEnd>,
}

/// A load whose beginning was seen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Current {
    /// clamd's first one, which words its end differently. It makes its socket after that.
    First,
    /// Any later one. It ends with its clamd, if not before.
    Reload,
}

impl Loads {
    /// Takes the next piece of the log and returns the loads that ended in it, in order.
    pub(super) fn read(&mut self, bytes: &[u8]) -> Vec<Load> {
        let mut ended = Vec::new();
        for piece in bytes.split_inclusive(|&b| b == b'\n') {
            let room = LINE_BYTES_MAX - self.line.len();
            self.line.extend(&piece[..piece.len().min(room)]);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                ended.extend(self.line(String::from_utf8_lossy(&line).trim_end()));
            }
        }
        ended
    }

    /// The log goes on in a new file, or from its beginning: no half line goes with it.
    pub(super) fn begin_anew(&mut self) {
        self.line.clear();
    }

    /// The load that is under way, if one began after the mark. That of a clamd which was just
    /// started counts before it has begun.
    pub(super) fn under_way(&self) -> Option<Current> {
        self.current.or(self.starting.then_some(Current::First))
    }

    fn line(&mut self, line: &str) -> Option<Load> {
        // `LogTime yes`: "Sun Nov 22 16:16:55 2026 -> ".
        let line = match line.get(24..28) {
            Some(" -> ") => &line[28..],
            Some(_) | None => line,
        };
        if line.starts_with("+++ Started at ") {
            self.starting = true;
            self.current = None;
        } else if line.starts_with("--- Stopped at ") {
            self.starting = false;
            self.current = None;
        } else if line.starts_with("Reading databases from ") {
            let first = std::mem::take(&mut self.starting);
            self.current = Some(if first {
                Current::First
            } else {
                Current::Reload
            });
            self.end = None;
        } else if self.current == Some(Current::First) {
            if line.starts_with("Loaded ") && line.ends_with(" signatures.") {
                return Some(self.ended(LoadEnd::Loaded));
            } else if let Some(reason) = line.strip_prefix("ERROR: ") {
                return Some(self.ended(failed(reason)));
            }
        } else if let Some(error) = line.strip_prefix("ERROR: reload_th: ") {
            let reason = ["Database load failed: ", "Database initialization error: "]
                .iter()
                .find_map(|words| error.strip_prefix(words));
            self.end = Some(match reason {
                Some(reason) => failed(reason),
                None if error.starts_with("Invalid arguments") => LoadEnd::Dead,
                None => LoadEnd::Hindered(error.to_owned()),
            });
        } else if line.starts_with("Database correctly reloaded (") {
            self.end = Some(LoadEnd::Loaded);
        } else if line.starts_with("Activating the newly loaded database") {
            return Some(self.ended(LoadEnd::Loaded));
        } else if let Some(warning) = line.strip_prefix("WARNING: Database reload ") {
            // "failed" or "setup failed", and ", keeping the previous instance".
            let end = self.end.take();
            return Some(self.ended(match end {
                Some(end) if end != LoadEnd::Loaded => end,
                Some(_) | None => LoadEnd::Hindered(format!("database reload {warning}")),
            }));
        }
        None
    }

    fn ended(&mut self, end: LoadEnd) -> Load {
        self.end = None;
        Load {
            after: self.current.take().is_some(),
            end,
        }
    }
}

fn failed(reason: &str) -> LoadEnd {
    if is_hosts_trouble(reason) {
        LoadEnd::Hindered(reason.to_owned())
    } else {
        LoadEnd::Failed(reason.to_owned())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// One word a load: `loaded`, `failed(REASON)` ..., with `before:` in front of one that began
    /// before the mark; and `...` if one is under way at the end.
    pub(in crate::clamd) fn words(loads: &Loads, ended: &[Load]) -> String {
        let one = |load: &Load| {
            let end = match &load.end {
                LoadEnd::Loaded => "loaded".to_owned(),
                LoadEnd::Failed(reason) => format!("failed({reason})"),
                LoadEnd::Hindered(reason) => format!("hindered({reason})"),
                LoadEnd::Dead => "dead".to_owned(),
            };
            format!("{}{end}", if load.after { "" } else { "before:" })
        };
        let mut words: Vec<_> = ended.iter().map(one).collect();
        if loads.under_way().is_some() {
            words.push("...".into());
        }
        words.join(" ")
    }

    /// Checks the lines as they are, with times in front, and in pieces of every length up to 40.
    #[track_caller]
    fn check(lines: &[&str], expected: &str) {
        let time = "Sun Nov 22 16:16:55 2026 -> ";
        for front in ["", time] {
            let text: String = lines
                .iter()
                .map(|line| format!("{front}{line}\n"))
                .collect();
            for piece in (1..40).chain([text.len().max(1)]) {
                let mut loads = Loads::default();
                let pieces = text.as_bytes().chunks(piece);
                let ended: Vec<_> = pieces.flat_map(|piece| loads.read(piece)).collect();
                assert_eq!(words(&loads, &ended), expected, "{front:?} {piece}");
            }
        }
    }

    pub(in crate::clamd) const READING: &str = "Reading databases from /var/lib/clamav";
    pub(in crate::clamd) const LOADED: &str = "Database correctly reloaded (10 signatures)";
    pub(in crate::clamd) const ACTIVE: &str = "Activating the newly loaded database...";
    pub(in crate::clamd) const MALFORMED: &str =
        "ERROR: reload_th: Database load failed: Malformed database";
    pub(in crate::clamd) const KEEPING: &str =
        "WARNING: Database reload failed, keeping the previous instance";
    const DONE: &str = "Database reload completed.";
    pub(in crate::clamd) const STARTED: &str = "+++ Started at Sun Nov 22 16:17:14 2026";

    #[test]
    fn a_reload_that_began_after_the_mark_is_told_from_one_before() {
        check(&[READING, LOADED, ACTIVE], "loaded");
        check(&[LOADED, ACTIVE], "before:loaded");
        check(&[ACTIVE], "before:loaded");
        check(
            &[LOADED, ACTIVE, READING, LOADED, ACTIVE],
            "before:loaded loaded",
        );
        check(&[READING], "...");
        check(&[READING, LOADED], "...");
    }

    #[test]
    fn a_failed_reload_gives_its_reason() {
        check(&[READING, MALFORMED, KEEPING], "failed(Malformed database)");
        check(&[MALFORMED, KEEPING], "before:failed(Malformed database)");
        check(
            &[READING, MALFORMED, KEEPING, READING, LOADED, ACTIVE],
            "failed(Malformed database) loaded",
        );
    }

    #[test]
    fn with_blocking_reloads_a_failed_one_leaves_clamd_dead() {
        let invalid = "ERROR: reload_th: Invalid arguments, unable to load signature databases.";
        check(
            &[READING, MALFORMED, DONE, KEEPING, invalid, DONE, KEEPING],
            "failed(Malformed database) before:dead",
        );
        check(&[READING, LOADED, DONE, ACTIVE], "loaded");
    }

    #[test]
    fn want_of_memory_or_rights_says_nothing_about_the_databases() {
        for reason in ["Can't allocate memory", "Can't open file or directory"] {
            let line = format!("ERROR: reload_th: Database load failed: {reason}");
            check(&[READING, &line, KEEPING], &format!("hindered({reason})"));
        }
        let setup = "WARNING: Database reload setup failed, keeping the previous instance";
        check(
            &[setup],
            "before:hindered(database reload setup failed, keeping the previous instance)",
        );
    }

    #[test]
    fn a_started_clamd_loads_too() {
        let pua = "Not loading PUA signatures.";
        check(&[STARTED], "...");
        check(&[STARTED, READING, pua], "...");
        check(&[STARTED, READING, pua, "Loaded 10 signatures."], "loaded");
        check(
            &[STARTED, READING, pua, "ERROR: Malformed database"],
            "failed(Malformed database)",
        );
        // It was stopped in the middle.
        check(&[READING, "--- Stopped at Sun Nov 22 16:17:14 2026"], "");
    }

    #[test]
    fn other_lines_mean_nothing() {
        let long = "x".repeat(3 * LINE_BYTES_MAX);
        check(&[&long, READING, &long, LOADED, ACTIVE], "loaded");
        check(
            &[
                "instream(local): Clamcast.Install-7.UNOFFICIAL FOUND",
                "",
                "é -> ü",
            ],
            "",
        );
        check(
            &["SelfCheck: Database status OK.", "Loaded 7 signatures."],
            "",
        );
    }
}
