//! What an adapter says of itself.
//!
//! Owns the summary that listings show and the catalogue keeps. Never changes one.

use super::generation::Generation;

/// What an adapter says of itself, for `GET /v1/adapters`.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Summary {
    /// `lora`, `rslora`, `dora`, or `gguf-lora`.
    pub method: String,
    pub rank_max: usize,
    /// Number of sites changed, e.g. 210; the embedding counts as one.
    pub sites: usize,
    /// Projection names touched, e.g. ["q_proj", "v_proj"], then `lm_head`, `embed_tokens` and
    /// replaced norms.
    pub targets: Vec<String>,
    pub parameters: u64,
    /// `base_model_name_or_path` of the config, informative.
    pub base_model: Option<String>,
    /// Whether chats are rendered by a template of its own.
    #[serde(default)]
    pub chat_template: bool,
    #[serde(default)]
    pub generation: Generation,
}
