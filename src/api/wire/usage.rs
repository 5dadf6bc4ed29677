//! `/v1/usage` on the wire.
//!
//! Owns the names of the fields. Never reads the log. The thing to know: a page has sums or
//! records, whichever was asked for.

use serde::Serialize;
use utoipa::ToSchema;

/// A page of the usage log.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct UsagePage {
    /// By tenant and adapter, in that order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sums: Option<Vec<UsageSum>>,
    /// In the order of their commits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub records: Option<Vec<UsageRecord>>,
    /// Whether there are more: ask again with `after`.
    pub has_more: bool,
    /// `after` of the next page of records.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_after: Option<u64>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct UsageSum {
    /// Empty for keys without a tenant.
    pub tenant: String,
    /// Name without version; `base` is the base model; `a@1:0.5+b@2` a sum of adapters.
    pub adapter: String,
    pub requests: u64,
    pub prompt_tokens: u64,
    /// Of the prompt tokens, found in the prefix cache.
    pub cached_tokens: u64,
    pub completion_tokens: u64,
}

/// One request.
#[derive(Debug, Serialize, ToSchema)]
pub struct UsageRecord {
    /// The `id` of the answer.
    pub id: String,
    /// The `x-request-id` of the answer.
    pub request_id: String,
    /// Unix milliseconds.
    pub ended_ms: u64,
    pub tenant: String,
    /// Of the key that asked; never the key.
    pub key_id: String,
    /// As in the sums.
    pub adapter: String,
    /// 0 is the base model, or a sum of adapters.
    pub version: u64,
    /// Of the adapter version that answered, or of the base.
    pub digest: String,
    pub prompt_tokens: u64,
    /// Prompt tokens whose keys and values were there already.
    pub cached_tokens: u64,
    pub completion_tokens: u64,
    /// stop, length, cancelled or failed
    pub finish_reason: String,
    /// Path of the request.
    pub route: String,
    /// 200, 499 where the client went away, or the status of the failure.
    pub status: u16,
}
