//! What the engine thread is told.
//!
//! Owns the commands. Never carries one out: `step` does.

use super::background::Background;
use super::sequence::Sequence;
use crate::adapters::bank::BankCommand;

/// Everything that can wake the engine.
pub enum Command {
    Submit(Box<Sequence>),
    Bank(BankCommand),
    /// Whatever was computed so far is found by no later request.
    ForgetPrefixes,
    /// To be done when requests leave time.
    Background(Box<dyn Background>),
    /// Every sequence fails with `shutting_down`, and what runs in the background is dropped.
    AbortAll,
}
