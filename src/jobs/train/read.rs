//! The files of a training job as examples.
//!
//! Owns which file is read how, and what of it is worth telling. Never decides what is learnt:
//! `train::data` does. The thing to know: a job reads its files each time it begins, so examples
//! are never kept beside the file.

use super::means::Means;
use super::spec::{FileUse, TrainingSpec};
use crate::error::{Error, Result};
use crate::jobs::events::{Event, Level};
use crate::train::data::{self, Examples, Kind, Limits, Reading};
use std::fs::File;
use std::io::BufReader;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

/// A file of examples.
pub struct Dataset {
    pub examples: Arc<Examples>,
    counts: data::Counts,
    digests: Vec<data::Digest>,
    kind: Kind,
}

/// Examples below which a job is warned.
const FEW: usize = 10;

impl Dataset {
    /// Examples, or pairs of them.
    pub fn count(&self) -> usize {
        match self.kind {
            Kind::Preference => self.examples.len() / 2,
            Kind::Supervised => self.examples.len(),
        }
    }

    /// Lines that another file has as well.
    pub fn shared(&self, other: &Self) -> u64 {
        data::shared(&self.digests, &other.digests)
    }

    /// What a person should know of the file called `name`.
    pub fn warnings(&self, name: &str) -> Vec<Event> {
        let counts = &self.counts;
        let mut events = Vec::new();
        let mut warn = |count: u64, what: &str| {
            if count > 0 {
                let message = format!("The {name} file: {count} {what}");
                events.push(Event::message(Level::Warn, message));
            }
        };
        warn(counts.duplicates, "lines are equal to an earlier one");
        warn(counts.dropped, "examples were dropped: nothing in them is learnt");
        warn(counts.cut, "examples were cut at the context");
        warn(if self.count() < FEW { self.count() as u64 } else { 0 }, "examples are few");
        events
    }
}

/// Reads a file. Blocking. `None` when `over` says so first. Errors: `invalid_training_file`, with
/// `param` before its message.
pub fn read(
    file: &FileUse,
    param: &'static str,
    content: File,
    (spec, created): (&TrainingSpec, u64),
    means: &Means,
    over: &dyn Fn() -> bool,
) -> Result<Option<Dataset>> {
    let kind = if spec.asked.beta.is_some() { Kind::Preference } else { Kind::Supervised };
    let reading = reading(means, Some(kind), spec.asked.truncate, created);
    let blame = |e: Error| {
        let message = format!("{param} ({}): {}", file.id, e.message);
        Error { message, ..e }.param(param)
    };
    let Some(read) = reading.read(BufReader::new(content), over).map_err(blame)? else {
        return Ok(None);
    };
    let data::Dataset { kind, examples, counts, digests } = read;
    Ok(Some(Dataset { examples: Arc::new(examples), counts, digests, kind }))
}

/// Of a file that is looked at before a job reads it.
#[derive(Debug, Clone, Copy)]
pub struct Preview {
    /// What a job would expect; `None`: what the first line is.
    pub kind: Option<Kind>,
    /// As a job's `truncate`.
    pub truncate: bool,
    /// Examples at most.
    pub limit: usize,
    /// Unix seconds.
    pub now: u64,
}

/// The first examples of a file as text. Blocking. `None` when `over` says so first. Errors:
/// `invalid_training_file`, of the lines that were read.
pub fn preview(
    content: File,
    how: Preview,
    means: &Means,
    over: &dyn Fn() -> bool,
) -> Result<Option<Vec<data::Preview>>> {
    let reading = reading(means, how.kind, how.truncate, how.now);
    reading.preview(BufReader::new(content), how.limit, over)
}

/// `created`: a template may write the date, and writes the same each time the job begins.
fn reading(means: &Means, kind: Option<Kind>, truncate: bool, created: u64) -> Reading<'_> {
    Reading {
        text: &means.text,
        own: None,
        kind,
        context: means.context,
        truncate,
        drop_unsupervised: false,
        now: UNIX_EPOCH + Duration::from_secs(created),
        limits: Limits::default(),
    }
}
