//! What is wrong with a file, by line, and how the reading of a line ends early.
//!
//! Owns how many problems are told. Never decides what is one. The thing to know: reading goes on
//! after a problem, so that a file is mended in one go.

use crate::error::{Error, Result, cut};

/// Problems told; the rest is counted.
const SHOWN_MAX: usize = 20;
/// Characters of one.
const CHARS_MAX: usize = 300;

/// Why a line is not read to its end.
pub enum Stop {
    /// The caller said so.
    Over,
    Wrong(Error),
    /// And no line after it can be read.
    Last(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Wrong(error)
    }
}

/// See the file's head.
#[derive(Debug, Default)]
pub struct Problems {
    shown: Vec<String>,
    more: u64,
}

impl Problems {
    pub fn add(&mut self, line: u64, message: impl Into<String>) {
        if self.shown.len() == SHOWN_MAX {
            self.more += 1;
            return;
        }
        let mut message = message.into();
        cut(&mut message, CHARS_MAX);
        self.shown.push(format!("line {line}: {message}"));
    }

    pub fn is_empty(&self) -> bool {
        self.shown.is_empty()
    }

    /// Errors: `invalid_training_file`, a problem a line.
    pub fn none(mut self) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        if self.more > 0 {
            self.shown.push(format!("and {} more", self.more));
        }
        Err(Error::invalid("invalid_training_file", self.shown.join("\n")))
    }
}
