//! The audit log: who did what to which name, and how it ended.
//!
//! Owns the record's fields. Never forgets: the table refuses updates and deletes by trigger. The
//! thing to know: a record is written after the deed and before its answer, in one synced insert.

use serde::Serialize;

/// One administrative action, done or refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Record {
    /// Rises with time; 0 until it is written, so the line in the log, which comes first, has none.
    #[serde(skip)]
    pub id: u64,
    /// Unix milliseconds.
    pub at: u64,
    pub key: String,
    pub tenant: Option<String>,
    /// Method and path of the route, e.g. `PUT /v1/adapters/{name}`.
    pub action: String,
    /// The adapter, or the key, that it was done to.
    pub name: Option<String>,
    pub digest: Option<String>,
    /// `ok`, or the error's code.
    pub outcome: String,
    pub status: u16,
    pub request_id: String,
}

/// Which records are asked for.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// Only this tenant's.
    pub tenant: Option<String>,
    /// Only records before this one; `None` begins with the newest.
    pub before: Option<u64>,
    pub limit: u64,
}
