//! How far a running job is.
//!
//! Owns the words. Never moves a job.

/// What a running job is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Merging,
    Publishing,
    Evaluating,
}

impl Stage {
    pub fn name(self) -> &'static str {
        match self {
            Self::Merging => "merging",
            Self::Publishing => "publishing",
            Self::Evaluating => "evaluating",
        }
    }

    /// Whether the job is still at what its result is made of.
    pub fn is_making(self) -> bool {
        match self {
            Self::Merging => true,
            Self::Publishing | Self::Evaluating => false,
        }
    }
}

/// How much of the first stage is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    pub done: usize,
    pub total: usize,
}
