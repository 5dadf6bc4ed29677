//! `/v1/audit` and `/v1/limits`: records and limits.

use super::KeyLimits;
use crate::access::audit::Record;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One administrative action, done or refused.
#[derive(Serialize, ToSchema)]
pub struct AuditRecord {
    #[schema(example = "audit.record")]
    pub object: &'static str,
    /// Counts up.
    pub id: u64,
    /// Unix milliseconds
    pub at: u64,
    /// Id of the key; `api_key` is the configured one, `anonymous` none.
    pub key: String,
    pub tenant: Option<String>,
    /// Method and route
    pub action: String,
    /// Of the adapter, alias, key or tenant that was changed.
    pub name: Option<String>,
    pub digest: Option<String>,
    /// `ok` or the error's code
    pub outcome: String,
    /// HTTP status of the answer.
    pub status: u16,
    pub request_id: String,
    /// More than 1: so many refusals of this key, summed; the last of them is shown.
    pub count: u64,
}

impl From<Record> for AuditRecord {
    fn from(r: Record) -> Self {
        Self {
            object: "audit.record",
            id: r.id,
            at: r.at,
            key: r.key,
            tenant: r.tenant,
            action: r.action,
            name: r.name,
            digest: r.digest,
            outcome: r.outcome,
            status: r.status,
            request_id: r.request_id,
            count: r.count,
        }
    }
}

#[derive(Serialize, ToSchema)]
pub struct AuditList {
    #[schema(example = "list")]
    pub object: &'static str,
    pub data: Vec<AuditRecord>,
    /// Older ones follow: ask again with `before` = the last id.
    pub has_more: bool,
}

/// Which records a rotation takes out; one of the two.
#[derive(Deserialize, ToSchema)]
pub struct AuditRotate {
    /// Those with a smaller id.
    pub before: Option<u64>,
    /// Those older than so many days.
    pub keep_days: Option<u64>,
}

/// What a rotation took out of the table.
#[derive(Serialize, ToSchema)]
pub struct AuditRotated {
    #[schema(example = "audit.rotated")]
    pub object: &'static str,
    /// Where they are now, in the data directory; null: there were none.
    pub file: Option<String>,
    /// How many went to the file.
    pub records: u64,
    /// Id of the oldest of them.
    pub first: Option<u64>,
    /// Id of the newest of them.
    pub last: Option<u64>,
}

/// The limits of an adapter, over all keys together.
#[derive(Serialize, ToSchema)]
pub struct AdapterLimits {
    #[schema(example = "limits")]
    pub object: &'static str,
    pub name: String,
    pub limits: KeyLimits,
}
