//! `/v1/adapters`: versions, states and what an upload came to.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Serialize, ToSchema)]
pub struct AdapterList {
    #[schema(example = "list")]
    pub object: &'static str,
    /// Every version of every name, by name then version.
    pub data: Vec<AdapterVersion>,
    /// Bytes of all resident versions.
    pub resident_bytes: u64,
    /// Their budget.
    pub resident_bytes_max: u64,
}

/// One name.
#[derive(Serialize, ToSchema)]
pub struct Adapter {
    #[schema(example = "adapter")]
    pub object: &'static str,
    pub name: String,
    /// The version that the bare name means.
    pub current: Option<u64>,
    /// Oldest first.
    pub versions: Vec<AdapterVersion>,
}

/// One immutable version of a name.
#[derive(Serialize, ToSchema)]
pub struct AdapterVersion {
    #[schema(example = "adapter.version")]
    pub object: &'static str,
    /// `name@version`
    pub id: String,
    pub name: String,
    /// Counts from 1 for each name and is never given again.
    pub version: u64,
    /// The tenant that owns the name; null: an operator, or another tenant than yours.
    pub owner: Option<String>,
    /// `sha256:` of the content: the same files have the same digest under any name.
    pub digest: String,
    /// `ready`, `ineffective` or `draining`
    pub state: &'static str,
    /// Whether the bare name means this version.
    pub current: bool,
    /// Stays resident and is kept until unpinned.
    pub pinned: bool,
    /// In memory since this version was last used, not only since another of the same content was.
    pub resident: bool,
    /// Running requests that hold it.
    pub leases: usize,
    /// Unix seconds
    pub created: u64,
    /// Bytes on disk.
    pub file_bytes: u64,
    /// Bytes in memory while it is resident.
    pub resident_bytes: u64,
    /// Served although the probe saw no change.
    pub forced: bool,
    pub probe: AdapterProbe,
    pub lineage: AdapterLineage,
    #[serde(flatten)]
    pub summary: AdapterSummary,
}

#[derive(Serialize, ToSchema)]
pub struct AdapterProbe {
    /// Largest change of a logit over the probe's prompts; 0: the adapter does nothing.
    pub logit_change_max: f32,
}

/// What the adapter's files say.
#[derive(Serialize, ToSchema)]
pub struct AdapterSummary {
    /// As PEFT names it: `lora`, `dora`, `ia3` and so on.
    pub method: String,
    /// The largest rank of its modules.
    pub rank_max: usize,
    /// Linear maps of the model that it changes.
    pub sites: usize,
    /// Modules it changes, by their last name.
    pub targets: Vec<String>,
    /// Values in its tensors.
    pub parameters: u64,
    /// What its config says it was trained on.
    pub base_model: Option<String>,
    /// Whether chats are rendered by a template of its own.
    pub chat_template: bool,
    /// Its own defaults where a request says nothing; null: it has none.
    pub generation: Option<AdapterGeneration>,
}

/// From the adapter's `generation_config.json`; null: the server's default.
#[derive(Serialize, ToSchema)]
pub struct AdapterGeneration {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub max_tokens: Option<u32>,
    /// Tokens that end an answer instead of the base's.
    pub eos_token_ids: Option<Vec<u32>>,
    /// Tokens that end an answer as the base's do.
    pub stop_token_ids: Vec<u32>,
    pub stop: Vec<String>,
}

/// Answer to an upload.
#[derive(Serialize, ToSchema)]
pub struct AdapterPut {
    #[serde(flatten)]
    pub adapter: AdapterVersion,
    /// `created`, `updated` or `unchanged`
    pub result: &'static str,
    /// Files of the upload that an adapter does not need.
    pub ignored_files: Vec<String>,
}

/// Where a version came from.
#[derive(Serialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum AdapterLineage {
    /// `by`: the id of the key; `anonymous` where none is asked for, `start` for `--adapter`.
    Uploaded {
        by: Option<String>,
        files: Vec<String>,
    },
    Merged {
        method: String,
        from: Vec<AdapterParent>,
        job: Option<String>,
    },
    Trained {
        from: Option<AdapterParent>,
        /// Id of the job.
        job: String,
        /// The step that it stood at, of a checkpoint.
        step: Option<u64>,
        /// Null of what was trained before this was noted.
        record: Option<AdapterTraining>,
    },
}

/// What a version was trained with.
#[derive(Serialize, ToSchema)]
pub struct AdapterTraining {
    /// `sha256:` of the settings, every choice made.
    pub spec: String,
    /// `sha256:` of the base's weights.
    pub base: String,
    pub training_file: TrainedFile,
    pub validation_file: Option<TrainedFile>,
    pub seed: u64,
    /// Optimizer steps of the whole job.
    pub steps: u64,
}

/// A file as it was when the job read it.
#[derive(Serialize, ToSchema)]
pub struct TrainedFile {
    pub id: String,
    /// `sha256:` of the content.
    pub digest: String,
}

/// A version that another was made of.
#[derive(Serialize, ToSchema)]
pub struct AdapterParent {
    /// `name@version` as it was called then.
    pub id: String,
    pub digest: String,
    /// Its weight in the merge.
    pub weight: Option<f64>,
}

/// Body of rollback, pin and unpin; may be `{}`.
#[derive(Deserialize, ToSchema)]
pub struct VersionFields {
    /// Default: for a rollback the newest servable version before the current one, else the
    /// current one.
    pub version: Option<u64>,
}

/// Bytes that are no longer taken; what other names share stays and is not counted.
#[derive(Serialize, ToSchema)]
pub struct FreedBytes {
    /// Of memory.
    pub resident: u64,
    /// Of disk.
    pub file: u64,
}

/// Answer to a removal.
#[derive(Serialize, ToSchema)]
pub struct AdapterDeleted {
    #[schema(example = "adapter")]
    pub object: &'static str,
    pub name: String,
    /// The name is gone: always true.
    pub deleted: bool,
    /// `gone`, or `draining` while running requests still hold versions of it.
    pub state: &'static str,
    /// What became free.
    pub freed_bytes: FreedBytes,
    /// Requests that still ran when `drain_seconds` were over, and were ended.
    pub cut: usize,
    /// What went; versions with leases finish their requests first.
    pub versions: Vec<AdapterVersion>,
}
