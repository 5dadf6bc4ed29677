//! `POST /v1/chat/completions`: body, answer and chunks.

use super::{SamplingFields, Usage};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

/// What only chat takes.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct ChatFields {
    /// The conversation: `role` and `content` (a string or text parts).
    #[schema(value_type = Vec<Object>)]
    pub messages: Vec<Value>,
    /// `max_tokens` under its newer name; not both.
    pub max_completion_tokens: Option<i64>,
    /// Whether to return log probabilities of the answer's tokens. Default false.
    pub logprobs: Option<bool>,
    /// Alternatives per token, 0 to 20; needs `logprobs`.
    pub top_logprobs: Option<i64>,
    /// Given to the chat template; calls are not parsed out of the answer.
    #[schema(value_type = Option<Vec<Object>>)]
    pub tools: Option<Vec<Value>>,
    /// `auto` or `none`.
    #[schema(value_type = Option<String>)]
    pub tool_choice: Option<Value>,
    /// End the rendered conversation with the start of an assistant turn. Default true.
    pub add_generation_prompt: Option<bool>,
}

/// Body of a chat completion.
#[derive(ToSchema)]
pub struct ChatRequest {
    #[serde(flatten)]
    pub shared: SamplingFields,
    #[serde(flatten)]
    pub own: ChatFields,
}

#[derive(Serialize, ToSchema)]
pub struct ChatCompletion {
    pub id: String,
    #[schema(example = "chat.completion")]
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub system_fingerprint: String,
    pub choices: Vec<ChatChoice>,
    pub usage: Usage,
}

#[derive(Serialize, ToSchema)]
pub struct ChatChoice {
    pub index: usize,
    pub message: ChatMessage,
    pub logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`
    pub finish_reason: &'static str,
}

#[derive(Serialize, ToSchema)]
pub struct ChatMessage {
    /// `assistant`.
    pub role: &'static str,
    pub content: String,
    /// Always null: the server never refuses in the model's name.
    pub refusal: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub struct ChatLogprobs {
    pub content: Vec<ChatLogprob>,
    pub refusal: Option<Vec<ChatLogprob>>,
}

#[derive(Serialize, ToSchema)]
pub struct ChatLogprob {
    /// Its text; a token that ends within a character shows replacement characters.
    pub token: String,
    /// Natural logarithm; -9999 stands for less than that.
    pub logprob: f32,
    /// Its bytes, exact.
    pub bytes: Vec<u8>,
    /// The most probable tokens at its position.
    pub top_logprobs: Vec<TopLogprob>,
}

#[derive(Serialize, ToSchema)]
pub struct TopLogprob {
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    pub bytes: Vec<u8>,
}

/// One event of a stream.
#[derive(Serialize, ToSchema)]
pub struct ChatChunk {
    pub id: String,
    #[schema(example = "chat.completion.chunk")]
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub system_fingerprint: String,
    pub choices: Vec<ChatChunkChoice>,
    /// With `include_usage`: null in all events but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
}

#[derive(Serialize, ToSchema)]
pub struct ChatChunkChoice {
    pub index: usize,
    pub delta: ChatDelta,
    pub logprobs: Option<ChatLogprobs>,
    /// In the last chunk only: `stop` or `length`.
    pub finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize, ToSchema)]
pub struct ChatDelta {
    /// In the first chunk only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// Text to append.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}
