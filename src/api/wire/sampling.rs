//! Parameters that chat and plain completions share.

use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// What both kinds of completion take.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct SamplingFields {
    /// The base model's name, an adapter's `name`, `name@version`, or `base:name`.
    pub model: String,
    /// LoRAX's way to name an adapter: one that is registered here, beside the base's name as
    /// `model`.
    pub adapter_id: Option<String>,
    /// Only `local`.
    pub adapter_source: Option<String>,
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
    /// Above 0, at most 10; over prompt and output. Default 1.
    pub repetition_penalty: Option<f64>,
    /// Texts that end the answer.
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
    /// Send the answer as server-sent events while it is made. Default false.
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
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
