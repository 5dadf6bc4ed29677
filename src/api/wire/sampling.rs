//! Parameters that chat and plain completions share.

use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// What both kinds of completion take.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct SamplingFields {
    /// The base model's name, an adapter's `name`, `name@version`, or `base:name`; or several,
    /// weighted and summed: `pirate:0.7+sql@2:0.3`.
    pub model: String,
    /// LoRAX's way to name an adapter: one that is registered here, beside the base's name as
    /// `model`.
    pub adapter_id: Option<String>,
    /// Only `local`.
    pub adapter_source: Option<String>,
    /// Several adapters, weighted and summed, beside the base's name as `model`.
    pub adapters: Option<Vec<AdapterPart>>,
    /// LoRAX's way to name several, beside the base's name as `model`: accepted where it is the
    /// weighted sum.
    pub merged_adapters: Option<MergedAdapters>,
    /// 0 (greedy) to 2. Default 1.
    pub temperature: Option<f64>,
    /// Above 0, at most 1. Default 1.
    pub top_p: Option<f64>,
    /// Keep this many likeliest tokens; 0 or -1: all. Default all.
    pub top_k: Option<i64>,
    /// Drop tokens below this share of the likeliest one's probability, 0 to 1. Default 0.
    pub min_p: Option<f64>,
    /// Same seed, same answer. Default: a random one.
    pub seed: Option<i64>,
    /// Token id to a bias from -100 to 100.
    #[schema(value_type = Option<std::collections::HashMap<String, f64>>)]
    pub logit_bias: Option<Map<String, Value>>,
    /// -2 to 2. Default 0.
    pub presence_penalty: Option<f64>,
    /// -2 to 2. Default 0.
    pub frequency_penalty: Option<f64>,
    /// 0.01 to 10; over prompt and output. Default 1.
    pub repetition_penalty: Option<f64>,
    /// Texts that end the answer, of at most 1024 bytes each.
    pub stop: Option<Stop>,
    /// Tokens that end the answer.
    pub stop_token_ids: Option<Vec<i64>>,
    /// Show the stop string that ended the answer. Default false.
    pub include_stop_str_in_output: Option<bool>,
    /// Special tokens make no text. Default true.
    pub skip_special_tokens: Option<bool>,
    /// Do not end at the model's end-of-text tokens. Default false.
    pub ignore_eos: Option<bool>,
    /// Most tokens to generate. Default: the rest of the context in chat, 16 in plain completions.
    pub max_tokens: Option<i64>,
    /// No end before this many tokens. Default 0.
    pub min_tokens: Option<i64>,
    /// Answers per prompt. Default 1.
    pub n: Option<i64>,
    /// Whose request it is: an alias leads the same user to the same version. Default: the key, if
    /// it is not the one that all share.
    pub user: Option<String>,
    /// Send the answer as server-sent events while it is made. Default false.
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
}

/// One adapter of a sum.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AdapterPart {
    /// `name`, `name@version` or an alias.
    pub name: String,
    /// Any finite number. Default 1.
    pub weight: Option<f64>,
}

/// Several adapters in LoRAX's shape.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MergedAdapters {
    pub ids: Vec<String>,
    /// As many as ids. Default: 1 each.
    pub weights: Option<Vec<f64>>,
    /// `cat`, the weighted sum. LoRAX's own (`linear`, its default, `ties`, `dare_linear`,
    /// `dare_ties`) are not that sum, and are refused but for one adapter with weight 1.
    pub merge_strategy: Option<String>,
    /// Says nothing with `cat`.
    pub density: Option<f64>,
    /// Says nothing with `cat`.
    pub majority_sign_method: Option<String>,
}

impl MergedAdapters {
    /// `{}`, as clients send what they do not use.
    pub fn asks_nothing(&self) -> bool {
        self.ids.is_empty() && self.weights.as_ref().is_none_or(Vec::is_empty)
    }
}

/// One stop string or several.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub enum Stop {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamOptions {
    /// One more event before `[DONE]` with the usage and no choices.
    pub include_usage: Option<bool>,
    /// Only `false`: our events are not padded.
    pub include_obfuscation: Option<bool>,
}
