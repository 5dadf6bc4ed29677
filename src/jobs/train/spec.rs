//! A training job: what it learns from, how, and under which name the result is published.
//!
//! Owns what the journal keeps of it. Never opens a file. The thing to know: what was asked for and
//! what it came to are kept apart, so a job that begins anew comes to the same.

use crate::adapters::version::{Lineage, Parent};
use crate::jobs::rights::Rights;
use crate::train::{Asked, TrainSpec};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A training job that was asked for. Stored as JSON; fields may be added, never renamed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingSpec {
    /// Of the adapter that comes out.
    pub name: String,
    /// As the client called the model that is trained.
    pub model: String,
    /// The version whose factors it goes on from; none: the base.
    pub from: Vec<Parent>,
    pub training: FileUse,
    pub validation: Option<FileUse>,
    pub asked: Asked,
    /// What `asked` came to, once the examples were read.
    #[serde(default)]
    pub resolved: Option<TrainSpec>,
    pub promote: Promote,
    /// The client's own notes.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    #[serde(default)]
    pub suffix: Option<String>,
    /// What its key allowed when it came in.
    #[serde(default)]
    pub rights: Rights,
}

/// A file that a job reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileUse {
    /// `file-…`
    pub id: String,
    /// `sha256:…`
    pub digest: String,
}

/// What the name means once the result is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Promote {
    /// The result.
    Auto,
    /// What it meant before, until somebody moves it. A new name means nothing until then.
    Manual,
}

impl TrainingSpec {
    /// What the version that comes out of the job `id` says of itself.
    pub fn lineage(&self, id: &str) -> Lineage {
        Lineage::Trained { from: self.from.first().cloned(), job: id.to_owned(), step: None }
    }

    /// The same for what stands after a step.
    pub fn checkpoint_lineage(&self, id: &str, step: u64) -> Lineage {
        let from = self.from.first().cloned();
        Lineage::Trained { from, job: id.to_owned(), step: Some(step) }
    }
}
