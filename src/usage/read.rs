//! Reading the log back: sums and records.
//!
//! Owns the queries. Never sees what is not committed. The thing to know: filters that are not
//! given are NULL, which every row passes.

use super::record::Record;
use crate::database::Database;
use crate::ending::EndReason;
use crate::error::{Error, Result};
use sqlx::Row;
use sqlx::sqlite::SqliteRow;
use std::time::Duration;

/// Which records; `None` is any.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Unix milliseconds of the end: from `since_ms` on, before `until_ms`.
    pub since_ms: Option<u64>,
    pub until_ms: Option<u64>,
    /// Name without version, or what a sum of adapters is called.
    pub adapter: Option<String>,
    pub tenant: Option<String>,
}

/// What one tenant used of one adapter, over its versions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sum {
    pub tenant: String,
    pub adapter: String,
    pub requests: u64,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub completion_tokens: u64,
}

const SUMS: &str = "
    SELECT tenant, adapter, count(*) AS requests, sum(prompt_tokens) AS prompt_tokens,
           sum(cached_tokens) AS cached_tokens, sum(completion_tokens) AS completion_tokens
    FROM usage
    WHERE (?1 IS NULL OR ended_ms >= ?1) AND (?2 IS NULL OR ended_ms < ?2)
      AND (?3 IS NULL OR adapter = ?3) AND (?4 IS NULL OR tenant = ?4)
    GROUP BY tenant, adapter ORDER BY tenant, adapter LIMIT ?5";

const RECORDS: &str = "
    SELECT * FROM usage
    WHERE (?1 IS NULL OR ended_ms >= ?1) AND (?2 IS NULL OR ended_ms < ?2)
      AND (?3 IS NULL OR adapter = ?3) AND (?4 IS NULL OR tenant = ?4) AND sequence > ?6
    ORDER BY sequence LIMIT ?5";

/// When the newest record ended, since 1970.
pub async fn newest(database: &Database) -> Result<Option<Duration>> {
    let row = database.row(sqlx::query("SELECT max(ended_ms) AS newest FROM usage")).await?;
    let newest = row.map(|row| row.try_get::<Option<i64>, _>("newest")).transpose();
    let newest = newest?.flatten();
    Ok(newest.map(|ms| Duration::from_millis(ms.max(0) as u64)))
}

pub async fn sums(database: &Database, filter: &Filter, limit: u64) -> Result<Vec<Sum>> {
    let rows = sqlx::query(SUMS)
        .bind(filter.since_ms.map(|t| t as i64))
        .bind(filter.until_ms.map(|t| t as i64))
        .bind(&filter.adapter)
        .bind(&filter.tenant)
        .bind(limit as i64);
    let sum = |row: &SqliteRow| -> Result<Sum> {
        Ok(Sum {
            tenant: row.try_get("tenant")?,
            adapter: row.try_get("adapter")?,
            requests: number(row, "requests")?,
            prompt_tokens: number(row, "prompt_tokens")?,
            cached_tokens: number(row, "cached_tokens")?,
            completion_tokens: number(row, "completion_tokens")?,
        })
    };
    database.rows(rows).await?.iter().map(sum).collect()
}

pub async fn records(
    database: &Database,
    filter: &Filter,
    after: u64,
    limit: u64,
) -> Result<Vec<(u64, Record)>> {
    let rows = sqlx::query(RECORDS)
        .bind(filter.since_ms.map(|t| t as i64))
        .bind(filter.until_ms.map(|t| t as i64))
        .bind(&filter.adapter)
        .bind(&filter.tenant)
        .bind(limit as i64)
        .bind(after as i64);
    database.rows(rows).await?.iter().map(record).collect()
}

fn record(row: &SqliteRow) -> Result<(u64, Record)> {
    let word: String = row.try_get("finish_reason")?;
    let unknown = || Error::fault(format!("usage.db: a request ended as {word}"));
    let record = Record {
        id: row.try_get("id")?,
        request_id: row.try_get("request_id")?,
        ended_ms: number(row, "ended_ms")?,
        tenant: row.try_get("tenant")?,
        key_id: row.try_get("key_id")?,
        adapter: row.try_get("adapter")?,
        version: number(row, "version")?,
        digest: row.try_get("digest")?,
        prompt_tokens: number(row, "prompt_tokens")?,
        cached_tokens: number(row, "cached_tokens")?,
        completion_tokens: number(row, "completion_tokens")?,
        finish_reason: EndReason::named(&word).ok_or_else(unknown)?,
        route: row.try_get("route")?,
        status: number(row, "status")? as u16,
    };
    Ok((number(row, "sequence")?, record))
}

/// Counts and times, which are never negative.
fn number(row: &SqliteRow, column: &str) -> Result<u64> {
    let n: i64 = row.try_get(column)?;
    Ok(n.max(0) as u64)
}
