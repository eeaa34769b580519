//! Follows clamd's log from a mark on, through rotation and truncation.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use clamcast_daemon::input;

use super::log::{Load, Loads};

/// So much of the log is read at a time, in bytes. A clamd that logs clean files writes much.
const READ_BYTES: usize = 64 << 10;

/// A log from a mark on. Blocking.
#[derive(Debug)]
pub(super) struct Tail {
    path: PathBuf,
    /// Held open, so that what is written before a rotation is read after it.
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    file: File,
    offset: u64,
}

impl Tail {
    /// Marks the end of the log. One that is not there yet is read from its beginning.
    pub(super) fn at_end(path: &Path) -> io::Result<Self> {
        let open = match input::open(path) {
            Ok(file) => Some(Open {
                offset: file.metadata()?.len(),
                file,
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let path = path.to_owned();
        Ok(Self { path, open })
    }

    /// Reads what was written since, and returns the loads that ended in it.
    pub(super) fn read(&mut self, loads: &mut Loads) -> io::Result<Vec<Load>> {
        let mut ended = Vec::new();
        if let Some(open) = &mut self.open {
            open.read(loads, &mut ended)?;
        }
        let now = match input::open(&self.path) {
            Ok(file) => file,
            // Between the two steps of a rotation, or the log of a clamd that never ran.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(ended),
            Err(error) => return Err(error),
        };
        let (is, was) = (now.metadata()?, self.open.as_ref());
        let same = match was.map(|open| open.file.metadata()).transpose()? {
            Some(was) => (is.dev(), is.ino()) == (was.dev(), was.ino()),
            None => false,
        };
        if !same {
            loads.begin_anew();
            let mut open = Open {
                file: now,
                offset: 0,
            };
            open.read(loads, &mut ended)?;
            self.open = Some(open);
        }
        Ok(ended)
    }
}

impl Open {
    /// Reads up to the length that the file has now, so that a busy log cannot hold us.
    fn read(&mut self, loads: &mut Loads, ended: &mut Vec<Load>) -> io::Result<()> {
        let length = self.file.metadata()?.len();
        if length < self.offset {
            // Truncated (logrotate's copytruncate): what was between is lost.
            loads.begin_anew();
            self.offset = 0;
        }
        let mut buffer = vec![0; READ_BYTES];
        while self.offset < length {
            let read = self.file.read_at(&mut buffer, self.offset)?;
            if read == 0 {
                break;
            }
            self.offset += read as u64;
            ended.extend(loads.read(&buffer[..read]));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clamd::log::tests::{ACTIVE, KEEPING, LOADED, MALFORMED, READING, STARTED, words};
    use std::fs;
    use std::io::Write;

    /// Follows a log through `steps`, and returns what was seen after each.
    fn follow(steps: &[&dyn Fn(&Path)]) -> Vec<String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("clamav.log");
        append(&path, &[READING, MALFORMED]);
        let mut tail = Tail::at_end(&path).unwrap();
        let mut loads = Loads::default();
        let see = |step: &&dyn Fn(&Path)| {
            step(&path);
            let ended = tail.read(&mut loads).unwrap();
            words(&loads, &ended)
        };
        steps.iter().map(see).collect()
    }

    fn append(path: &Path, lines: &[&str]) {
        let mut file = File::options()
            .append(true)
            .create(true)
            .open(path)
            .unwrap();
        for line in lines {
            writeln!(file, "{line}").unwrap();
        }
    }

    #[test]
    fn the_log_is_read_from_the_mark_on() {
        let seen = follow(&[
            &|_| {},
            &|path| append(path, &[KEEPING, READING]),
            &|path| append(path, &[LOADED, ACTIVE]),
            &|_| {},
        ]);
        let expected = [
            "",
            "before:hindered(database reload failed, keeping the previous instance) ...",
            "loaded",
            "",
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn rotation_loses_nothing() {
        let seen = follow(&[
            &|path| append(path, &[READING]),
            &|path| {
                append(path, &[MALFORMED]);
                fs::rename(path, path.with_extension("1")).unwrap();
                append(path, &[KEEPING, READING]);
            },
            &|path| fs::rename(path, path.with_extension("1")).unwrap(),
            &|path| append(path, &[LOADED, ACTIVE]),
        ]);
        assert_eq!(
            seen,
            ["...", "failed(Malformed database) ...", "...", "loaded"]
        );
    }

    #[test]
    fn a_truncated_log_is_read_from_its_beginning() {
        let seen = follow(&[&|path| append(path, &[READING]), &|path| {
            File::create(path).unwrap();
            append(path, &[LOADED, ACTIVE]);
        }]);
        assert_eq!(seen, ["...", "loaded"]);
    }

    #[test]
    fn a_log_that_appears_later_is_read_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("clamav.log");
        let mut tail = Tail::at_end(&path).unwrap();
        let mut loads = Loads::default();
        assert_eq!(tail.read(&mut loads).unwrap(), []);
        append(&path, &[STARTED, READING, "Loaded 10 signatures."]);
        let ended = tail.read(&mut loads).unwrap();
        assert_eq!(words(&loads, &ended), "loaded");
    }
}
