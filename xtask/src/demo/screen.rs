//! What the demo prints: for a person, with colours on a terminal (<https://no-color.org>).

use std::io::{self, IsTerminal, Write};
use std::{cell::Cell, env};

/// Standard output.
pub(super) struct Screen {
    colours: bool,
    headings: Cell<u32>,
}

const BOLD: &str = "1";
const RED: &str = "31";
const GREEN: &str = "32";
const YELLOW: &str = "33";
const CYAN: &str = "36";

impl Screen {
    pub(super) fn new() -> Self {
        let plain = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self {
            colours: !plain && io::stdout().is_terminal(),
            headings: Cell::new(0),
        }
    }

    /// Begins a step.
    pub(super) fn heading(&self, text: &str) -> io::Result<()> {
        self.headings.set(self.headings.get() + 1);
        let text = format!("{}. {text}", self.headings.get());
        writeln!(io::stdout())?;
        self.line(BOLD, &text)?;
        self.line(BOLD, &"-".repeat(text.len()))
    }

    /// What happens, in words.
    pub(super) fn say(&self, text: &str) -> io::Result<()> {
        writeln!(io::stdout(), "{text}")
    }

    /// What is run.
    pub(super) fn command(&self, line: &str) -> io::Result<()> {
        self.line(CYAN, &format!("$ {line}"))
    }

    /// What a command printed.
    pub(super) fn output(&self, text: &str) -> io::Result<()> {
        match text {
            "" => Ok(()),
            _ => writeln!(io::stdout(), "{}", indented(text)),
        }
    }

    /// What a command printed that found something bad.
    pub(super) fn bad_output(&self, text: &str) -> io::Result<()> {
        self.line(RED, &indented(text))
    }

    /// What was checked and holds.
    pub(super) fn fact(&self, text: &str) -> io::Result<()> {
        self.line(GREEN, &format!("=> {text}"))
    }

    /// What is less than it could be.
    pub(super) fn warning(&self, text: &str) -> io::Result<()> {
        self.line(YELLOW, &format!("!! {text}"))
    }

    fn line(&self, colour: &str, text: &str) -> io::Result<()> {
        if self.colours {
            writeln!(io::stdout(), "\x1b[{colour}m{text}\x1b[0m")
        } else {
            writeln!(io::stdout(), "{text}")
        }
    }
}

fn indented(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(|line| format!("    {line}")).collect();
    let lines: Vec<_> = lines.iter().map(|line| line.trim_end()).collect();
    lines.join("\n")
}
