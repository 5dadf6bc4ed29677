//! What is known of a version: what it is, where it came from, how it stands; and how a change to a
//! name is meant.
//!
//! Owns the plain types that registry and callers share. Never holds a lease. The thing to know: a
//! `Version` never changes but for `forced`; everything that moves is in `Entry`.

use super::Digest;
use super::actor::Actor;
use super::format::Summary;
use crate::error::{Error, Kind, brief};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// One immutable version of a name.
#[derive(Debug, Clone, PartialEq)]
pub struct Version {
    pub name: String,
    /// 1, 2, 3 … per name; never used twice, not even after a delete.
    pub number: u64,
    pub digest: Digest,
    pub summary: Summary,
    /// Largest logit change over the probe's prompts.
    pub logit_change_max: f32,
    /// The uploader said to serve it even if the probe sees no change.
    pub forced: bool,
    /// Unix seconds.
    pub created: u64,
    /// Bytes of the files.
    pub file_bytes: u64,
    /// Bytes when resident.
    pub resident_bytes: u64,
    pub lineage: Lineage,
}

impl Version {
    /// `name@number`, as clients may ask for it.
    pub fn id(&self) -> String {
        format!("{}@{}", self.name, self.number)
    }
}

/// What a client writes for a version: `name`, or `name@number`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VersionRef<'a> {
    pub name: &'a str,
    /// `None`: the one that the bare name means.
    pub number: Option<u64>,
}

impl<'a> VersionRef<'a> {
    /// `None` where the number is not written as [`Version::id`] writes it: `sql@01` is nobody.
    pub fn parse(text: &'a str) -> Option<Self> {
        let Some((name, digits)) = text.split_once('@') else {
            return Some(Self { name: text, number: None });
        };
        let number = digits.parse().ok().filter(|n: &u64| *n > 0 && n.to_string() == digits)?;
        Some(Self { name, number: Some(number) })
    }
}

/// Who uploaded what the server was given when it started.
pub const START: &str = "start";

/// Where a version came from. Stored as JSON; fields may be added, never renamed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Lineage {
    /// Somebody sent its files.
    Uploaded {
        /// Who, by the id of the key; `None` where no key is asked for.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<String>,
        /// Names of the files as the uploader called them, without paths.
        #[serde(default)]
        files: Vec<String>,
    },
    /// Computed from other versions.
    Merged {
        method: String,
        from: Vec<Parent>,
        /// Id of the job; `None` where there was none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        job: Option<String>,
        /// Training jobs that its parents rest on, sorted.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        rests_on: Vec<String>,
    },
    /// Trained here, from the base or on from another version.
    Trained {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<Parent>,
        /// Id of the job.
        job: String,
        /// The step that it stands at, of one that is not the job's result.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        step: Option<u64>,
        /// Training jobs that the version it went on from rests on, sorted.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        rests_on: Vec<String>,
        /// `None` of what was trained before this was noted.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        record: Option<Box<TrainingRecord>>,
    },
}

/// What a version was trained with. Stored as JSON; fields may be added, never renamed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingRecord {
    /// `sha256:…` of the settings, every choice made, as JSON.
    pub spec: String,
    /// `sha256:…` of the base's weights.
    pub base: String,
    pub training_file: FileRecord,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_file: Option<FileRecord>,
    pub seed: u64,
    /// Optimizer steps of the whole job.
    pub steps: u64,
}

/// A file as it was when it was read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FileRecord {
    /// `file-…`
    pub id: String,
    /// `sha256:…`
    pub digest: String,
}

impl Lineage {
    /// Whether it was given to the server when it started.
    pub fn is_of_start(&self) -> bool {
        matches!(self, Self::Uploaded { by: Some(by), .. } if by == START)
    }

    /// Whether it is what a job stood at in between.
    pub fn is_checkpoint(&self) -> bool {
        matches!(self, Self::Trained { step: Some(_), .. })
    }

    /// Whether a training job made it, as its result or in between.
    pub fn is_trained(&self) -> bool {
        matches!(self, Self::Trained { .. })
    }

    /// The step of this job that it is a checkpoint of.
    pub fn checkpoint_of(&self, id: &str) -> Option<u64> {
        match self {
            Self::Trained { job, step, .. } if job == id => *step,
            _ => None,
        }
    }

    /// Every training job that the version rests on: its own, and those of what it is made of.
    pub fn training_jobs(&self) -> impl Iterator<Item = &str> {
        let (own, others) = match self {
            Self::Uploaded { .. } => (None, &[][..]),
            Self::Merged { rests_on, .. } => (None, &rests_on[..]),
            Self::Trained { job, rests_on, .. } => (Some(job), &rests_on[..]),
        };
        own.into_iter().chain(others).map(String::as_str)
    }

    /// Versions that it was made of.
    pub fn parents(&self) -> &[Parent] {
        match self {
            Self::Uploaded { .. } => &[],
            Self::Merged { from, .. } => from,
            Self::Trained { from, .. } => from.as_slice(),
        }
    }

    /// Whether a job made it of this file.
    pub fn is_trained_on(&self, file: &str) -> bool {
        let Self::Trained { record: Some(record), .. } = self else { return false };
        record.training_file.id == file
    }

    /// Id of the job that made the version, if one did.
    pub fn job(&self) -> Option<&str> {
        match self {
            Self::Uploaded { .. } => None,
            Self::Merged { job, .. } => job.as_deref(),
            Self::Trained { job, .. } => Some(job),
        }
    }
}

impl Default for Lineage {
    fn default() -> Self {
        Self::Uploaded { by: None, files: Vec::new() }
    }
}

/// A version that another was made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Parent {
    /// `name@number` as it was called then.
    pub id: String,
    /// `sha256:…`: what it was, whatever the name means now.
    pub digest: String,
    /// Its share in a merge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Ready,
    /// The probe saw no change at all; not servable unless forced.
    Ineffective,
    /// Replaced or deleted; running requests finish on it.
    Draining,
}

/// What a listing shows of one version.
#[derive(Debug, Clone)]
pub struct Entry {
    pub version: Arc<Version>,
    /// The tenant that owns the name; empty: the operator.
    pub owner: Arc<str>,
    pub state: State,
    /// Whether it is the version that the bare name means.
    pub current: bool,
    /// Stays resident and on disk until unpinned.
    pub pinned: bool,
    /// In memory since this version itself was used: what others do with the same content does not
    /// show.
    pub resident: bool,
    pub leases: usize,
}

/// What a change takes for granted about a name; it is checked under the name's own lock, so that
/// nothing comes between. Broken: `version_conflict` (412).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expected {
    /// There is no such name.
    Absent,
    /// There is one.
    Present,
    /// The bare name means this version.
    Version(u64),
    /// The bare name means a version with one of these contents.
    Content(Vec<Digest>),
}

/// How an upload is meant.
#[derive(Debug, Clone, Default)]
pub struct Publish {
    /// Serve it even if the probe sees no change.
    pub force: bool,
    /// All must hold.
    pub expected: Vec<Expected>,
    pub lineage: Lineage,
    /// Leave the name to what it means; a new one means nothing then.
    pub candidate: bool,
    /// Leave the name to what was published after the same uploader last brought this content.
    pub yields: bool,
    pub by: Actor,
}

/// How a removal is meant.
#[derive(Debug, Clone, Default)]
pub struct Removal {
    /// All must hold.
    pub expected: Vec<Expected>,
    /// Wait for running requests so long, then cut them. `None`: neither wait nor cut.
    pub drain: Option<Duration>,
    pub by: Actor,
}

/// What a removal came to, so far.
#[derive(Debug, Clone)]
pub struct Removed {
    /// As they were when the name went.
    pub entries: Vec<Entry>,
    /// Nothing of the name is left in memory or on disk; else running requests hold it still.
    pub gone: bool,
    /// Requests that were cut.
    pub cut: usize,
    /// What others share is not freed and not counted.
    pub resident_bytes_freed: u64,
    pub file_bytes_freed: u64,
}

/// Why a content that a request wanted was not in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cold {
    /// Not asked for since this server started.
    Restart,
    /// It had made room for others.
    Evicted,
    /// It left when its name moved on, and was asked for by number or by a rollback.
    Replaced,
}

impl Cold {
    /// The label of metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Restart => "restart",
            Self::Evicted => "evicted",
            Self::Replaced => "replaced",
        }
    }
}

/// Numbers for metrics; counts are since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    pub names: usize,
    pub versions: usize,
    /// Versions of deleted names that requests still use.
    pub departing: usize,
    pub pinned: usize,
    pub aliases: usize,
    pub residents: usize,
    pub resident_bytes: u64,
    pub loads: u64,
    pub evictions: u64,
    /// Loads that wait for memory now.
    pub loads_waiting: usize,
}

/// Whether requests may use the version: its probe saw a finite change, or its uploader forced it.
pub fn servable(version: &Version) -> bool {
    let change = version.logit_change_max;
    version.forced || (change.is_finite() && change > 0.0)
}

/// 404 for a model that nobody has.
pub fn model_not_found(model: &str) -> Error {
    let model = brief(model);
    let message = format!("the model `{model}` does not exist; GET /v1/models lists those that do");
    Error::not_found("model_not_found", message).param("model")
}

/// 409 for a version whose probe saw nothing.
pub fn ineffective(version: &Version) -> Error {
    let message = format!(
        "Adapter `{}` is not served: its probe saw a logit change of {}. Publish it with force to \
         serve it anyway.",
        version.id(),
        version.logit_change_max
    );
    Error::new(Kind::Conflict, "adapter_ineffective", message).param("model")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_spelled_in_one_way() {
        let parsed = |text| VersionRef::parse(text).map(|r| (r.name, r.number));
        assert_eq!(parsed("sql"), Some(("sql", None)));
        assert_eq!(parsed("sql@12"), Some(("sql", Some(12))));
        let others =
            ["sql@", "sql@0", "sql@01", "sql@+1", "sql@-1", "sql@1@2", "sql@18446744073709551616"];
        for other in others {
            assert_eq!(parsed(other), None, "{other}");
        }
    }
}
