//! `/tokenize`, `/detokenize`, and the small public pages.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

/// Either `prompt` or `messages`.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct TokenizeRequest {
    /// Whose chat template renders `messages`. Default: the base's.
    pub model: Option<String>,
    pub prompt: Option<String>,
    #[schema(value_type = Option<Vec<Object>>)]
    pub messages: Option<Vec<Value>>,
    #[schema(value_type = Option<Vec<Object>>)]
    pub tools: Option<Vec<Value>>,
    /// For `prompt`: the start token that the model wants. Default true.
    pub add_special_tokens: Option<bool>,
    /// For `messages`. Default true.
    pub add_generation_prompt: Option<bool>,
    /// Also the text of each token. Default false.
    pub return_token_strs: Option<bool>,
}

#[derive(Serialize, ToSchema)]
pub struct Tokenized {
    pub count: usize,
    /// Longest prompt and answer together, in tokens.
    pub max_model_len: usize,
    pub tokens: Vec<u32>,
    /// Their texts, if `return_token_strs` asked for them.
    pub token_strs: Option<Vec<String>>,
}

#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct DetokenizeRequest {
    /// Checked to exist; the text does not depend on it.
    pub model: Option<String>,
    pub tokens: Vec<u32>,
}

#[derive(Serialize, ToSchema)]
pub struct Detokenized {
    pub prompt: String,
}

/// `/live`, `/ready` and `/health`: 200 when `status` is `ok`, else 503.
#[derive(Serialize, ToSchema)]
pub struct Health {
    /// `ok`, `stalled` or `draining`
    pub status: &'static str,
    /// Seconds since the engine last finished a step or was idle.
    pub stalled_seconds: f64,
    /// Requests that run and that wait, where the caller has a key or none is needed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub running: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting: Option<i64>,
    /// `writable`, or `read_only`: it serves, and changes are refused until there is room.
    pub storage: &'static str,
}

#[derive(Serialize, ToSchema)]
pub struct Version {
    pub name: &'static str,
    pub version: &'static str,
    /// Served name of the base model.
    pub base: String,
    /// Of its files.
    pub base_digest: String,
    /// What computes: the CPU with its instruction set, or the GPU's name.
    pub device: String,
    /// Longest prompt and answer together, in tokens.
    pub max_model_len: usize,
}
