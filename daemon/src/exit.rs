//! Exit codes, the same in every command, and the one place where an error is printed.

use std::fmt;
use std::io::{self, Write as _};
use std::process::{self, ExitCode};

/// Done. `status`, `agents`, `generations`: they could answer.
pub const DONE: u8 = 0;
/// Something does not conform, or a wait timed out. The output says what.
pub const NOT_CONFORMANT: u8 = 1;
/// Wrong usage or configuration.
pub const USAGE: u8 = 2;
/// The daemon cannot be reached.
pub const UNREACHABLE: u8 = 3;
/// Refused: not authorised, not trusted, publishing held.
pub const REFUSED: u8 = 4;
/// Failed: disk, network, a bug.
pub const FAILED: u8 = 5;

/// A command that did not end well: the code for scripts and, unless the output has said it
/// already, the error for people.
#[derive(Debug)]
pub struct Exit {
    /// One of the codes above.
    pub code: u8,
    /// Printed once, with its chain of sources.
    pub error: Option<anyhow::Error>,
}

impl Exit {
    /// Ends with `code` and `error`.
    pub fn new(code: u8, error: impl Into<anyhow::Error>) -> Self {
        let error = Some(error.into());
        Self { code, error }
    }

    /// Ends with `code` after the output said why.
    pub fn quietly(code: u8) -> Self {
        Self { code, error: None }
    }
}

/// What nobody gave a code is a failure, so `?` does the right thing.
impl<E: Into<anyhow::Error>> From<E> for Exit {
    fn from(error: E) -> Self {
        Self::new(FAILED, error)
    }
}

/// Gives an error its exit code.
pub trait OrExit<T> {
    /// `self`, or the end of the command with `code`.
    fn or_exit(self, code: u8) -> Result<T, Exit>;
}

impl<T, E: Into<anyhow::Error>> OrExit<T> for Result<T, E> {
    fn or_exit(self, code: u8) -> Result<T, Exit> {
        self.map_err(|error| Exit::new(code, error))
    }
}

/// Prints a line of a command's result on stdout. `println!` panics where this ends the command:
/// quietly if nobody reads any more (`| head`), with an error if the disk is full.
#[macro_export]
macro_rules! say {
    ($($argument:tt)*) => {
        $crate::exit::print_line(format_args!($($argument)*))
    };
}

/// What [`say!`](crate::say) does.
pub fn print_line(line: fmt::Arguments<'_>) {
    let Err(error) = writeln!(io::stdout().lock(), "{line}") else {
        return;
    };
    if error.kind() == io::ErrorKind::BrokenPipe {
        process::exit(DONE.into());
    }
    eprintln!("cannot write the result: {error}");
    process::exit(FAILED.into());
}

/// The end of `main`: prints `PROGRAM: ERROR: SOURCE: ...` on stderr if there is an error, and
/// returns the code.
pub fn end(program: &str, result: Result<(), Exit>) -> ExitCode {
    let Err(exit) = result else {
        return ExitCode::from(DONE);
    };
    if let Some(error) = exit.error {
        eprintln!("{program}: {error:#}");
    }
    ExitCode::from(exit.code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn an_error_without_a_code_is_a_failure() {
        fn command(code: Option<u8>) -> Result<(), Exit> {
            let result = Err::<(), _>(io::Error::other("disk"));
            match code {
                Some(code) => result.or_exit(code),
                None => Ok(result?),
            }
        }
        assert_eq!(command(None).unwrap_err().code, FAILED);
        assert_eq!(command(Some(REFUSED)).unwrap_err().code, REFUSED);
        assert!(command(None).unwrap_err().error.is_some());
        assert!(Exit::quietly(NOT_CONFORMANT).error.is_none());
    }
}
