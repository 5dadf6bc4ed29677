//! What a job tells while it runs.
//!
//! Owns the form of an event. Never stores one: `journal` does.

use serde_json::Value;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Info,
    Warn,
    Error,
}

impl Level {
    pub const ALL: [Self; 3] = [Self::Info, Self::Warn, Self::Error];

    /// As the journal and the wire say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }
}

/// Something that a job tells.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    pub level: Level,
    pub message: String,
    /// Figures of a step; none for a plain message.
    pub metrics: Option<Value>,
    /// The optimizer step that it tells of. What is told of steps that are done again after a
    /// restart is told again.
    pub step: Option<u64>,
}

impl Event {
    pub fn message(level: Level, message: impl Into<String>) -> Self {
        Self { level, message: message.into(), metrics: None, step: None }
    }
}

/// An event as the journal keeps it.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredEvent {
    /// Ascending over all jobs.
    pub number: u64,
    /// Unix seconds
    pub at: u64,
    pub event: Event,
}
