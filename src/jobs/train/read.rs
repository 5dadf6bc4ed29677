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

/// A file of examples, or a part of one.
pub struct Dataset {
    pub examples: Arc<Examples>,
    /// Of its different lines, sorted.
    pub digests: Vec<data::Digest>,
    counts: data::Counts,
    kind: Kind,
}

/// Examples below which a job is warned.
const FEW: usize = 10;

impl From<data::Dataset> for Dataset {
    fn from(read: data::Dataset) -> Self {
        let data::Dataset { kind, examples, counts, digests, .. } = read;
        Self { examples: Arc::new(examples), digests, counts, kind }
    }
}

impl Dataset {
    /// Examples, or pairs of them.
    pub fn count(&self) -> usize {
        self.examples.len() / self.kind.group()
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

/// What a job is made of: what it learns, and what it only measures itself by.
pub struct Data {
    pub training: Dataset,
    pub validation: Option<Dataset>,
}

/// How the files of a job are read.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    pub spec: &'a TrainingSpec,
    /// Unix seconds.
    pub created: u64,
    pub means: &'a Means,
}

impl Job<'_> {
    /// Reads a job's files, in its order. Blocking. `None` when `over` says so first. Errors:
    /// `invalid_training_file`, with the field before its message.
    pub fn data(self, files: Vec<File>, over: &dyn Fn() -> bool) -> Result<Option<Data>> {
        let mut files = files.into_iter();
        let Some(training) = files.next() else {
            return Err(Error::fault("a training job has a file"));
        };
        let param = "training_file";
        let Some(read) = self.read(&self.spec.training, param, training, over)? else {
            return Ok(None);
        };
        if let Some(share) = self.spec.validation_split {
            let (training, held) =
                read.hold_out(share, self.spec.asked.seed).ok_or_else(|| too_short(self.spec))?;
            let (training, validation) = (training.into(), Some(held.into()));
            return Ok(Some(Data { training, validation }));
        }
        let mut validation = None;
        if let Some((file, content)) = self.spec.validation.as_ref().zip(files.next()) {
            validation = self.read(file, "validation_file", content, over)?;
            if validation.is_none() {
                return Ok(None);
            }
        }
        Ok(Some(Data { training: read.into(), validation: validation.map(Into::into) }))
    }

    fn read(
        self,
        file: &FileUse,
        param: &'static str,
        content: File,
        over: &dyn Fn() -> bool,
    ) -> Result<Option<data::Dataset>> {
        let Self { spec, created, means } = self;
        let reading = reading(means, Some(spec.kind()), spec.asked.truncate, created);
        let blame = |e: Error| {
            let message = format!("{param} ({}): {}", file.id, e.message);
            Error { message, ..e }.param(param)
        };
        reading.read(BufReader::new(content), over).map_err(blame)
    }
}

fn too_short(spec: &TrainingSpec) -> Error {
    let message = format!(
        "training_file ({}): nothing can be held out of a file without two different lines",
        spec.training.id
    );
    Error::invalid("invalid_training_file", message).param("training_file")
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
