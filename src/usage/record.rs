//! A usage record, its table, and the bounds of the log.
//!
//! Owns the plain types. Never writes one.

use crate::database::Storage;
use crate::ending::EndReason;
use std::time::Duration;
use tokio::sync::oneshot;

pub const MIGRATIONS: &[&str] = &["
    CREATE TABLE usage (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        request_id TEXT NOT NULL,
        ended_ms INTEGER NOT NULL,
        tenant TEXT NOT NULL,
        key_id TEXT NOT NULL,
        adapter TEXT NOT NULL,
        version INTEGER NOT NULL,
        digest TEXT NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        finish_reason TEXT NOT NULL,
        route TEXT NOT NULL,
        status INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX usage_by_time ON usage (ended_ms);
"];

/// What one request used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The answer's id, made by the server: the key. A client's own request id may repeat.
    pub id: String,
    /// What the `x-request-id` of the answer said.
    pub request_id: String,
    /// Unix milliseconds of its end.
    pub ended_ms: u64,
    /// Whose key it was; empty for one without a tenant.
    pub tenant: String,
    pub key_id: String,
    /// Name and version; `base` for the base model, what it is called (`a@1:0.5+b@2`) for a sum of
    /// adapters, both at version 0.
    pub adapter: String,
    pub version: u64,
    pub digest: String,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub completion_tokens: u64,
    pub finish_reason: EndReason,
    pub route: String,
    /// 200, 499 where the client went away, or the error's.
    pub status: u16,
}

/// Bounds of the log.
#[derive(Clone)]
pub struct UsageOptions {
    /// Where `usage.db` lies.
    pub storage: Storage,
    /// Records that may wait for their commit, requests under way included.
    pub queue_max: usize,
    /// Records are gathered for this long before they are committed together.
    pub commit_time: Duration,
    /// Older records, and more of them, are removed.
    pub days_max: u64,
    pub records_max: u64,
}

/// What the writer is sent.
pub enum Message {
    Record(Box<Record>, oneshot::Sender<bool>),
    /// Answered once everything sent before is committed, or cannot be for now.
    Flush(oneshot::Sender<bool>),
}
