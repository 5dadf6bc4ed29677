//! What jobs do, by kind. Another kind is a directory beside `merge`, a variant here, and an arm of
//! each match.
//!
//! Owns the list of kinds, and what the queue asks of each. Never runs one. The thing to know: what
//! the journal has from before there were kinds are merges.

use super::events::Event;
use super::merge::{MergeSpec, Plan};
use super::rights::Rights;
use super::stage::{Stage, Stepped};
use super::train::{self, Start, Training, TrainingSpec};
use crate::adapters::registry::{PinnedSource, Registry};
use crate::adapters::version::{Lineage, Parent};
use crate::error::{Error, Kind as ErrorKind, Result, brief};
use crate::train::data;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::File;
use std::path::Path;

/// What is to be done. Stored as JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Work {
    Merge(MergeSpec),
    Train(Box<TrainingSpec>),
}

/// The kinds, without what is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Merge,
    Train,
}

/// Work under way.
pub enum Making {
    Merge(Box<Plan>),
    Train(Box<Training>),
}

/// What work is made of.
pub struct Sources<'a> {
    pub registry: &'a Registry,
    /// Versions, in the order of [`Work::from`].
    pub kept: &'a [PinnedSource],
    /// Contents, in the order of [`Work::files`].
    pub files: Vec<File>,
}

/// Work that was begun.
pub struct Begun {
    pub making: Making,
    /// What is to be done, now that it is known more exactly.
    pub work: Option<Work>,
    pub events: Vec<Event>,
    /// Digests of the lines that are learnt, sorted.
    pub seen: Vec<data::Digest>,
}

/// What the made says of itself. A training's is made of its events.
pub struct Made {
    /// JSON
    pub report: String,
    /// SVG
    pub picture: String,
}

impl Work {
    /// As the journal has it. Errors when the text is no work of this version.
    pub fn parse(text: &str) -> serde_json::Result<Self> {
        let mut value: Value = serde_json::from_str(text)?;
        if let Some(fields) = value.as_object_mut() {
            fields.entry("kind").or_insert_with(|| "merge".into());
        }
        serde_json::from_value(value)
    }

    pub fn kind(&self) -> Kind {
        match self {
            Self::Merge(_) => Kind::Merge,
            Self::Train(_) => Kind::Train,
        }
    }

    /// Of the adapter that comes out.
    pub fn name(&self) -> &str {
        match self {
            Self::Merge(spec) => &spec.name,
            Self::Train(spec) => &spec.name,
        }
    }

    /// The versions that it is made of, which are kept until it is over.
    pub fn from(&self) -> &[Parent] {
        match self {
            Self::Merge(spec) => &spec.from,
            Self::Train(spec) => &spec.from,
        }
    }

    /// What its key allowed when it came in.
    pub fn rights(&self) -> Rights {
        match self {
            Self::Merge(spec) => spec.rights,
            Self::Train(spec) => spec.rights,
        }
    }

    /// What it is at when it begins.
    pub fn first_stage(&self) -> Stage {
        match self {
            Self::Merge(_) => Stage::Merging,
            Self::Train(_) => Stage::Preparing,
        }
    }

    /// What the version that comes out of the job `id` says of itself, and which training jobs its
    /// sources rest on.
    pub fn lineage(&self, id: &str, rests_on: Vec<String>) -> Lineage {
        match self {
            Self::Merge(spec) => spec.lineage(id, rests_on),
            Self::Train(spec) => spec.lineage(id, None, rests_on),
        }
    }

    /// The same for what stands after a step, of a kind that keeps such.
    pub fn checkpoint_lineage(
        &self,
        id: &str,
        step: u64,
        rests_on: Vec<String>,
    ) -> Option<Lineage> {
        match self {
            Self::Merge(_) => None,
            Self::Train(spec) => Some(spec.lineage(id, Some(step), rests_on)),
        }
    }

    /// Names of those that its result is compared with, in the order of `from`.
    pub fn compared(&self) -> Vec<String> {
        match self {
            Self::Merge(spec) => spec.spec.sources.iter().map(|s| s.name.clone()).collect(),
            Self::Train(_) => Vec::new(),
        }
    }

    /// Ids of the files that it reads.
    pub fn files(&self) -> Vec<&str> {
        match self {
            Self::Merge(_) => Vec::new(),
            Self::Train(spec) => {
                let files = [Some(&spec.training), spec.validation.as_ref()];
                files.into_iter().flatten().map(|file| &*file.id).collect()
            }
        }
    }

    /// Whether the name goes on to mean what it means when the result is published. What was
    /// trained is measured first.
    pub fn is_candidate(&self) -> bool {
        match self {
            Self::Merge(_) => false,
            Self::Train(_) => true,
        }
    }

    /// Opens the sources. Blocking. `None` when `over` says so before the end. Errors: those of
    /// the kind.
    pub fn begin(
        &self,
        (id, created): (&str, u64),
        means: &train::Means,
        sources: Sources<'_>,
        over: &dyn Fn() -> bool,
    ) -> Result<Option<Begun>> {
        match self {
            Self::Merge(spec) => {
                let plan = Plan::new(spec, sources.registry, sources.kept)?;
                let making = Making::Merge(Box::new(plan));
                Ok(Some(Begun { making, work: None, events: Vec::new(), seen: Vec::new() }))
            }
            Self::Train(spec) => {
                let from = sources.kept.first().map(|kept| sources.registry.files_of(kept));
                let read = (sources.files, from.transpose()?);
                let begun = Training::begin(id, (spec, created), read, means, over)?;
                let Some(Start { training, spec, events, seen }) = begun else { return Ok(None) };
                let making = Making::Train(Box::new(training));
                let work = Some(Self::Train(Box::new(spec)));
                Ok(Some(Begun { making, work, events, seen }))
            }
        }
    }

    /// A job is over: what it kept for its next beginning is removed.
    pub fn forget(&self, id: &str, means: &train::Means) {
        match self {
            Self::Merge(_) => {}
            Self::Train(_) => train::forget(&means.directory, id),
        }
    }
}

impl Making {
    /// The next piece of work, short enough that requests do not feel it, or given to the engine,
    /// which sees to that. `None` when `over` says so before its end.
    pub fn step(&mut self, over: &dyn Fn() -> bool) -> Result<Option<Stepped>> {
        match self {
            Self::Merge(plan) => plan.step().map(|progress| Some(Stepped::of(progress))),
            Self::Train(training) => training.step(over),
        }
    }

    /// Whether its thread itself computes, and is to rest while requests run.
    pub fn rests(&self) -> bool {
        match self {
            Self::Merge(_) => true,
            Self::Train(_) => false,
        }
    }

    /// Keeps what is done so far, where it can, for the job's next beginning.
    pub fn keep(&mut self) -> Result<()> {
        match self {
            Self::Merge(_) => Ok(()),
            Self::Train(training) => training.keep(),
        }
    }

    /// Writes what is there now into `dir`, of a kind that has something before its end.
    pub fn export(&self, dir: &Path) -> Result<()> {
        match self {
            Self::Merge(_) => Err(Error::fault("a merge has no checkpoints")),
            Self::Train(training) => training.export(dir),
        }
    }

    /// Writes the adapter into `dir`. A merge says something of itself.
    pub fn finish(self, dir: &Path) -> Result<Option<Made>> {
        match self {
            Self::Merge(plan) => {
                let (report, picture) = plan.finish(dir)?;
                Ok(Some(Made { report, picture }))
            }
            Self::Train(training) => training.export(dir).map(|()| None),
        }
    }
}

impl Kind {
    /// As logs and errors say it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Merge => "merge",
            Self::Train => "fine-tuning job",
        }
    }

    /// 404 for a job that nobody has, or that the caller may not know of.
    pub fn not_found(self, id: &str) -> Error {
        let shown = brief(id);
        let error = match self {
            Self::Merge => {
                Error::not_found("merge_not_found", format!("there is no merge `{shown}`"))
            }
            Self::Train => Error::not_found(
                "fine_tuning_job_not_found",
                format!("there is no fine-tuning job `{shown}`"),
            ),
        };
        error.param("id")
    }

    /// 409 for a job that `is` something in which it cannot be cancelled, paused or resumed.
    pub fn over(self, id: &str, is: &str, done: &str) -> Error {
        let message = format!("the {} `{id}` is {is} and cannot be {done}", self.word());
        let code = match self {
            Self::Merge => "merge_over",
            Self::Train => "fine_tuning_job_over",
        };
        Error::new(ErrorKind::Conflict, code, message).param("id")
    }

    /// 409 for a job without a report.
    pub fn report_missing(self, id: &str, is: &str) -> Error {
        let message = format!("the {} `{id}` is {is} and has no report", self.word());
        let code = match self {
            Self::Merge => "merge_report_missing",
            Self::Train => "fine_tuning_report_missing",
        };
        Error::new(ErrorKind::Conflict, code, message).param("id")
    }

    /// 429 where `max` jobs of all kinds wait or run, or as many of the `tenant`'s as it may have.
    pub fn queue_full(self, max: usize, tenant: bool) -> Error {
        let whose = if tenant { " for your tenant" } else { "" };
        let message = format!("the queue of jobs is full{whose} ({max} jobs); try again");
        let code = match self {
            Self::Merge => "merge_queue_full",
            Self::Train => "fine_tuning_queue_full",
        };
        Error::new(ErrorKind::Busy, code, message)
    }

    /// A job that ended the server too often.
    pub fn abandoned(self, restarts: u64) -> Error {
        let message = format!("the server ended {restarts} times while it ran");
        let code = match self {
            Self::Merge => "merge_abandoned",
            Self::Train => "fine_tuning_abandoned",
        };
        Error::new(ErrorKind::Fault, code, message)
    }

    /// A source that is no longer there.
    pub fn source_gone(self, source: &Parent) -> Error {
        let message = format!("the source {} ({}) is gone", source.id, source.digest);
        let code = match self {
            Self::Merge => "merge_source_gone",
            Self::Train => "fine_tuning_source_gone",
        };
        Error::new(ErrorKind::Conflict, code, message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_from_before_there_were_kinds_is_a_merge() {
        let old = r#"{"name": "both", "from": [], "any_base": false,
            "spec": {"method": "lego", "sources": [], "options": {},
                "seed": 18446744073709551615}}"#;
        let Ok(Work::Merge(spec)) = Work::parse(old) else { panic!("no merge") };
        assert_eq!((spec.name.as_str(), spec.spec.seed), ("both", u64::MAX));
        let written = serde_json::to_string(&Work::Merge(spec.clone())).unwrap();
        assert_eq!(Work::parse(&written).unwrap(), Work::Merge(spec));
        assert!(Work::parse(r#"{"kind": "dream", "name": "both"}"#).is_err());
    }
}
