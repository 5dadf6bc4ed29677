//! A training job: what it learns from, how, and under which name the result is published.
//!
//! Owns what the journal keeps of it. Never opens a file. The thing to know: what was asked for and
//! what it came to are kept apart, so a job that begins anew comes to the same.

use super::gate::Gate;
use crate::adapters::Digest;
use crate::adapters::version::{FileRecord, Lineage, Parent, TrainingRecord};
use crate::jobs::rights::Rights;
use crate::train::data::Kind;
use crate::train::{Asked, TrainSpec};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
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
    /// What its versions say of it, known then as well.
    #[serde(default)]
    pub record: Option<TrainingRecord>,
    pub promote: Promote,
    /// Share of the training file's lines that is held out to measure by.
    #[serde(default)]
    pub validation_split: Option<f64>,
    /// What must hold before the name moves.
    #[serde(default)]
    pub gate: Gate,
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
    /// The result, where the gate lets it through.
    Auto,
    /// What it meant before, until somebody moves it. A new name means nothing until then.
    Manual,
    /// The same, and nobody is asked to.
    Never,
}

impl Promote {
    /// As the wire says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Manual => "manual",
            Self::Never => "never",
        }
    }
}

impl TrainingSpec {
    /// What its files hold.
    pub fn kind(&self) -> Kind {
        if self.asked.beta.is_some() { Kind::Preference } else { Kind::Supervised }
    }

    /// With what `asked` came to, once the examples were read.
    pub fn resolved(&self, resolved: TrainSpec, steps: u64, base: Digest) -> Self {
        let settings = serde_json::to_vec(&resolved).unwrap_or_default();
        let file = |file: &FileUse| FileRecord {
            id: file.id.clone(),
            // Older files have no prefix.
            digest: format!("sha256:{}", file.digest.trim_start_matches("sha256:")),
        };
        let record = TrainingRecord {
            spec: Digest(Sha256::digest(settings).into()).to_string(),
            base: base.to_string(),
            training_file: file(&self.training),
            validation_file: self.validation.as_ref().map(file),
            seed: resolved.seed,
            steps,
        };
        Self { resolved: Some(resolved), record: Some(record), ..self.clone() }
    }

    /// Whether something is held out to measure the result by.
    pub fn holds_out(&self) -> bool {
        self.validation.is_some() || self.validation_split.is_some()
    }

    /// What the version that comes out of the job `id`, or a checkpoint of it, says of itself.
    pub fn lineage(&self, id: &str, step: Option<u64>, rests_on: Vec<String>) -> Lineage {
        Lineage::Trained {
            from: self.from.first().cloned(),
            job: id.to_owned(),
            step,
            rests_on,
            record: self.record.clone().map(Box::new),
        }
    }
}
