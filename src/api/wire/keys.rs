//! `/v1/keys`: what a key is to be, and what is shown of it.

use crate::access;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Bounds of a key; what is left out is without bound.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct KeyLimits {
    /// Completions asked for in a minute.
    pub requests_per_minute: Option<u64>,
    /// Tokens in a minute, prompt and answer together: reserved with `max_tokens` when a request
    /// comes in, settled when it ends.
    pub tokens_per_minute: Option<u64>,
    /// Completions being answered at once.
    pub concurrent_max: Option<u64>,
    /// Tokens from midnight to midnight UTC.
    pub tokens_per_day: Option<u64>,
    /// Tokens of a calendar month UTC.
    pub tokens_per_month: Option<u64>,
    /// Of a key only, as all below: names of adapters and aliases that its tenant may own.
    pub adapters_max: Option<u64>,
    /// Bytes that its tenant's adapters, all versions together, and files may have on disk.
    pub disk_bytes_max: Option<u64>,
    /// Bytes of memory that its tenant's adapters may have; pins count here too.
    pub resident_bytes_max: Option<u64>,
    /// Uploads of its tenant at once, of adapters and files.
    pub uploads_max: Option<u64>,
    /// Merges of its tenant that are not over.
    pub merges_max: Option<u64>,
}

impl From<KeyLimits> for access::Limits {
    fn from(l: KeyLimits) -> Self {
        Self {
            requests_per_minute: l.requests_per_minute,
            tokens_per_minute: l.tokens_per_minute,
            concurrent_max: l.concurrent_max,
            tokens_per_day: l.tokens_per_day,
            tokens_per_month: l.tokens_per_month,
            adapters_max: l.adapters_max,
            disk_bytes_max: l.disk_bytes_max,
            resident_bytes_max: l.resident_bytes_max,
            uploads_max: l.uploads_max,
            merges_max: l.merges_max,
        }
    }
}

impl From<access::Limits> for KeyLimits {
    fn from(l: access::Limits) -> Self {
        Self {
            requests_per_minute: l.requests_per_minute,
            tokens_per_minute: l.tokens_per_minute,
            concurrent_max: l.concurrent_max,
            tokens_per_day: l.tokens_per_day,
            tokens_per_month: l.tokens_per_month,
            adapters_max: l.adapters_max,
            disk_bytes_max: l.disk_bytes_max,
            resident_bytes_max: l.resident_bytes_max,
            uploads_max: l.uploads_max,
            merges_max: l.merges_max,
        }
    }
}

/// What a new key is to be.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct KeyCreate {
    /// For people, at most 64 characters.
    pub label: Option<String>,
    /// `inference`, `admin`, `metrics`
    #[schema(value_type = Vec<String>)]
    pub scopes: Vec<access::Scope>,
    /// Whose key it is; without one it is an operator's and sees every adapter.
    pub tenant: Option<String>,
    /// Names of adapters that a tenant's key may know of; `*` stands for any characters, `?` for
    /// one.
    pub adapters: Option<Vec<String>>,
    /// Names that it may create and change, whosever they are; it may also use them. Without: names
    /// that its tenant owns, and those that match `adapters` and nobody has.
    pub manage: Option<Vec<String>>,
    /// Share of the engine against other tenants, 1 to 1000. Default 1.
    pub weight: Option<u32>,
    pub limits: Option<KeyLimits>,
    /// Default: without end.
    pub lifetime_seconds: Option<u64>,
}

#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct KeyRotate {
    /// How long the secret before stays good, at most 30 days. Default 0.
    pub overlap_seconds: Option<u64>,
}

#[derive(Serialize, ToSchema)]
pub struct KeyObject {
    #[schema(example = "key")]
    pub object: &'static str,
    pub id: String,
    pub label: String,
    /// What it may do: `inference`, `admin` and so on.
    pub scopes: Vec<&'static str>,
    /// Null for an operator's.
    pub tenant: Option<String>,
    /// Patterns of names it may use.
    pub adapters: Vec<String>,
    /// Null: names that its tenant owns, or that nobody has.
    pub manage: Option<Vec<String>>,
    /// Share of the engine, beside other tenants' weights.
    pub weight: u32,
    pub limits: KeyLimits,
    /// Unix seconds
    pub created: u64,
    /// Unix seconds; null for never.
    pub expires: Option<u64>,
    /// Unix seconds; null while it is good.
    pub revoked: Option<u64>,
    /// To a minute.
    pub last_used: Option<u64>,
}

#[derive(Serialize, ToSchema)]
pub struct KeyObjectList {
    #[schema(example = "list")]
    pub object: &'static str,
    pub data: Vec<KeyObject>,
}

/// A key and its secret, which is shown once.
#[derive(Serialize, ToSchema)]
pub struct KeyMade {
    /// What to send as `Authorization: Bearer …`.
    pub secret: String,
    pub key: KeyObject,
}
