//! `POST /v1/completions`: body, answer and chunks.

use super::{SamplingFields, Usage};
use serde::{Deserialize, Serialize, Serializer};
use utoipa::ToSchema;

/// What only plain completions take.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct CompletionFields {
    pub prompt: Prompt,
    /// Alternatives per token, 0 to 20; the sampled token is always among them.
    pub logprobs: Option<i64>,
    /// Put the prompt in front of the answer; with `logprobs` its tokens are scored too. Default
    /// false.
    pub echo: Option<bool>,
}

/// One prompt or several, as text or as tokens.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected a string, a list of strings, a list of token ids or a list of such lists"
)]
pub enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

/// Body of a plain completion.
#[derive(ToSchema)]
pub struct CompletionRequest {
    #[serde(flatten)]
    pub shared: SamplingFields,
    #[serde(flatten)]
    pub own: CompletionFields,
}

/// The answer; also each event of a stream.
#[derive(Serialize, ToSchema)]
pub struct Completion {
    pub id: String,
    #[schema(example = "text_completion")]
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub system_fingerprint: String,
    pub choices: Vec<CompletionChoice>,
    /// In a stream only with `include_usage`: null in all events but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
}

#[derive(Serialize, ToSchema)]
pub struct CompletionChoice {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; null before the end of a stream.
    pub finish_reason: Option<&'static str>,
}

/// Four lists of one length.
#[derive(Default, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    /// Null for the first token of an echoed prompt.
    pub token_logprobs: Vec<Option<f32>>,
    #[schema(value_type = Vec<Option<Object>>)]
    pub top_logprobs: Vec<Option<Alternatives>>,
    /// Characters of `text` before the token.
    pub text_offset: Vec<usize>,
}

/// Log probabilities by token, likeliest first: an object, its numbers written as those of
/// `token_logprobs` are.
pub struct Alternatives(pub Vec<(String, f32)>);

impl Serialize for Alternatives {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}
