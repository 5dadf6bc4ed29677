//! How far a running job is.
//!
//! Owns the words. Never moves a job.

use super::events::Event;

/// What a running job is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Merging,
    /// The files are read and tokenised.
    Preparing,
    Training,
    Publishing,
    Evaluating,
}

impl Stage {
    pub fn name(self) -> &'static str {
        match self {
            Self::Merging => "merging",
            Self::Preparing => "preparing",
            Self::Training => "training",
            Self::Publishing => "publishing",
            Self::Evaluating => "evaluating",
        }
    }

    /// Whether the job is still at what its result is made of.
    pub fn is_making(self) -> bool {
        match self {
            Self::Merging | Self::Preparing | Self::Training => true,
            Self::Publishing | Self::Evaluating => false,
        }
    }
}

/// How much of the work is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    pub done: usize,
    pub total: usize,
}

/// What a step of work came to.
pub struct Stepped {
    pub progress: Progress,
    pub events: Vec<Event>,
    /// Whether what is there now is worth keeping as a version.
    pub checkpoint: bool,
    /// Whether a restart goes on from here.
    pub kept: bool,
}

impl Stepped {
    /// Nothing but progress.
    pub fn of(progress: Progress) -> Self {
        Self { progress, events: Vec::new(), checkpoint: false, kept: false }
    }
}
