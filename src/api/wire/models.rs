//! `GET /v1/models`: OpenAI's model object, and ours beside it.

use serde::Serialize;
use utoipa::ToSchema;

#[derive(Serialize, ToSchema)]
pub struct ModelList {
    #[schema(example = "list")]
    pub object: &'static str,
    pub data: Vec<Model>,
}

#[derive(Serialize, ToSchema)]
pub struct Model {
    /// What to say as `model`.
    pub id: String,
    #[schema(example = "model")]
    pub object: &'static str,
    /// Unix seconds
    pub created: u64,
    pub owned_by: &'static str,
    /// The base model's name; null for the base itself.
    pub parent: Option<String>,
    /// The base model's name.
    pub root: String,
    /// Prompt plus answer, in tokens.
    pub max_model_len: usize,
    pub polylora: ModelIdentity,
}

/// What exactly answers under the name.
#[derive(Serialize, ToSchema)]
pub struct ModelIdentity {
    /// `base` or `adapter`
    pub kind: &'static str,
    /// Of the adapter's content or the base model's files.
    pub digest: String,
    /// Null for the base.
    pub version: Option<u64>,
    /// `ready`, `ineffective` or `draining`
    pub state: &'static str,
    /// Whether the next request finds it in memory.
    pub resident: bool,
}

#[derive(Serialize, ToSchema)]
pub struct ModelDeleted {
    pub id: String,
    #[schema(example = "model")]
    pub object: &'static str,
    pub deleted: bool,
}
