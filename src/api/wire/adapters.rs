//! `/v1/adapters`: versions, states and what an upload came to.

use serde::Serialize;
use utoipa::ToSchema;

#[derive(Serialize, ToSchema)]
pub struct AdapterList {
    #[schema(example = "list")]
    pub object: &'static str,
    /// Every version of every name, by name then version.
    pub data: Vec<AdapterVersion>,
    pub resident_bytes: u64,
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
    pub version: u64,
    pub digest: String,
    /// `ready`, `ineffective` or `draining`
    pub state: &'static str,
    pub current: bool,
    pub resident: bool,
    /// Running requests that hold it.
    pub leases: usize,
    /// Unix seconds
    pub created: u64,
    pub file_bytes: u64,
    pub resident_bytes: u64,
    /// Served although the probe saw no change.
    pub forced: bool,
    pub probe: AdapterProbe,
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
    pub method: String,
    pub rank_max: usize,
    /// Linear maps of the model that it changes.
    pub sites: usize,
    pub targets: Vec<String>,
    pub parameters: u64,
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

/// Answer to a removal.
#[derive(Serialize, ToSchema)]
pub struct AdapterDeleted {
    #[schema(example = "adapter")]
    pub object: &'static str,
    pub name: String,
    pub deleted: bool,
    /// What went; versions with leases finish their requests first.
    pub versions: Vec<AdapterVersion>,
}
