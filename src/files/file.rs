//! A file and an upload as they are kept: plain types.
//!
//! Owns purposes and states. Never holds a content.

use std::io::BufRead;

/// Looks at a whole content: what is wrong with it, if anything is.
pub type Check = fn(&mut dyn BufRead) -> Option<String>;

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// What a training job learns from, or is measured on.
    FineTune,
    /// What a training job measured; the server makes these.
    FineTuneResults,
}

impl Purpose {
    pub const ALL: [Self; 2] = [Self::FineTune, Self::FineTuneResults];

    pub fn name(self) -> &'static str {
        match self {
            Self::FineTune => "fine-tune",
            Self::FineTuneResults => "fine-tune-results",
        }
    }

    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|purpose| purpose.name() == name)
    }
}

/// A file as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileRow {
    /// Files are listed in this order; never given twice.
    pub number: u64,
    pub id: String,
    /// `None`: an operator's.
    pub tenant: Option<String>,
    /// SHA-256 of the content, in hex digits.
    pub digest: String,
    pub bytes: u64,
    /// As its uploader called it, for people.
    pub name: String,
    pub purpose: Purpose,
    /// Unix seconds.
    pub created: u64,
    pub expires: Option<u64>,
    /// Why nothing can be learned from it, if that is so.
    pub problem: Option<String>,
}

/// What a file is to be.
#[derive(Debug, Clone)]
pub struct NewFile {
    pub tenant: Option<String>,
    pub name: String,
    pub purpose: Purpose,
    /// Seconds after which it is removed.
    pub lifetime: Option<u64>,
}

/// Which files to list.
#[derive(Debug, Clone, Default)]
pub struct Page {
    pub purpose: Option<Purpose>,
    pub ascending: bool,
    /// The number of the file before the first.
    pub after: Option<u64>,
    pub limit: usize,
}

/// How an upload in parts stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Pending,
    Completed,
    Cancelled,
}

impl State {
    pub const ALL: [Self; 3] = [Self::Pending, Self::Completed, Self::Cancelled];

    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// An upload in parts as it is kept, until its hour is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upload {
    pub id: String,
    pub tenant: Option<String>,
    /// Of all parts together, as it was said.
    pub bytes: u64,
    pub name: String,
    pub purpose: Purpose,
    /// Of the file that it becomes.
    pub lifetime: Option<u64>,
    pub created: u64,
    pub expires: u64,
    pub state: State,
    /// What it became.
    pub file: Option<String>,
}

/// A part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    pub id: String,
    pub upload: String,
    pub bytes: u64,
    pub created: u64,
}
