//! The wire: JSON bodies as they are sent and received, with their schemas.
//!
//! Owns names and shapes of fields. Never checks ranges and never reaches into the engine's types:
//! nothing inside the server is serialised directly. The thing to know: field docs here are the
//! documentation at `/docs`.

mod adapters;
mod aliases;
mod audit;
mod chat;
mod compat;
mod completions;
mod files;
mod fine_tuning;
mod keys;
pub mod known;
mod merges;
mod models;
mod sampling;
mod tokens;
mod usage;

pub use adapters::*;
pub use aliases::*;
pub use audit::*;
pub use chat::*;
pub use compat::*;
pub use completions::*;
pub use files::*;
pub use fine_tuning::*;
pub use keys::*;
pub use merges::*;
pub use models::*;
pub use sampling::*;
pub use tokens::*;
pub use usage::*;

use serde::Serialize;
use utoipa::ToSchema;

/// Every error, also as data of an `error` event in a stream.
#[derive(Serialize, ToSchema)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

/// OpenAI's four keys; all are always there.
#[derive(Serialize, ToSchema)]
pub struct ErrorDetail {
    /// One sentence for a person.
    pub message: String,
    /// OpenAI's class of the error, such as `invalid_request_error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Path of the request field to blame, e.g. `messages[1].content`.
    pub param: Option<String>,
    /// Stable snake_case code.
    pub code: Option<String>,
}

/// Tokens of a request over all its choices; a prompt counts once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    /// Those of the prompt, template included.
    pub prompt_tokens: u64,
    /// Those generated, of all choices.
    pub completion_tokens: u64,
    /// Their sum.
    pub total_tokens: u64,
    pub prompt_tokens_details: PromptTokensDetails,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Prompt tokens whose keys and values were found in the prefix cache.
    pub cached_tokens: u64,
}
