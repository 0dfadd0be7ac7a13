//! The one error type, and the exit codes that a job script can rely on.
//!
//! An error carries a kind, which decides the exit code, and one message that
//! names what failed, where, and what to do about it. It travels between ranks
//! as bytes (see [`crate::comm::agree`]), so it holds no live sources.

use std::fmt;
use std::io::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// `Result` with farm's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure it was; decides the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorKind {
    /// An unexpected fault: exit code 1.
    Fault,
    /// The command line is wrong: exit code 2.
    Usage,
    /// Bad input or model, nothing was done: exit code 3.
    Input,
    /// Stopped early by a signal or the time limit; a rerun goes on: exit code 75.
    Interrupted,
}

impl ErrorKind {
    /// The process exit code for this kind.
    pub fn exit_code(self) -> i32 {
        match self {
            ErrorKind::Fault => 1,
            ErrorKind::Usage => 2,
            ErrorKind::Input => 3,
            ErrorKind::Interrupted => 75,
        }
    }
}

/// Exit code of a run that wrote every record, some of them as error records.
pub const EXIT_SOME_RECORDS_FAILED: i32 = 4;

/// A failure: its kind and a message for the user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// Decides the exit code.
    pub kind: ErrorKind,
    /// What failed, where, and what to do about it.
    pub message: String,
}

impl Error {
    /// An unexpected fault (exit code 1).
    pub fn fault(message: impl fmt::Display) -> Self {
        Self { kind: ErrorKind::Fault, message: message.to_string() }
    }

    /// A wrong command line (exit code 2).
    pub fn usage(message: impl fmt::Display) -> Self {
        Self { kind: ErrorKind::Usage, message: message.to_string() }
    }

    /// Bad input or model (exit code 3).
    pub fn input(message: impl fmt::Display) -> Self {
        Self { kind: ErrorKind::Input, message: message.to_string() }
    }

    /// An IO failure at run time on `path` (exit code 1).
    pub fn io(path: &Path, error: std::io::Error) -> Self {
        Self::fault(format!("{}: {error}", path.display()))
    }

    /// The same error with `context: ` put before its message.
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }
}

/// Writes a line to stderr. Where that fails (its disk is full, nobody reads it any more)
/// the line is lost and the run goes on: `eprintln` would panic and end the job.
pub(crate) fn say(line: impl fmt::Display) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Error::fault(format!("tensor: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_the_templates_rely_on() {
        let codes = [ErrorKind::Fault, ErrorKind::Usage, ErrorKind::Input, ErrorKind::Interrupted]
            .map(ErrorKind::exit_code);
        assert_eq!(codes, [1, 2, 3, 75]);
    }

    #[test]
    fn context_goes_before_the_message() {
        let error = Error::input("no such file").context("model /x");
        assert_eq!(error.to_string(), "model /x: no such file");
    }
}
