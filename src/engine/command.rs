//! What the engine thread is told.
//!
//! Owns the commands. Never carries one out: `step` does.

use super::sequence::Sequence;
use crate::adapters::bank::BankCommand;

/// Everything that can wake the engine.
pub enum Command {
    Submit(Box<Sequence>),
    Bank(BankCommand),
    /// Every sequence fails with `shutting_down`.
    AbortAll,
}
