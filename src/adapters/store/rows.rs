//! Rows of the catalogue, as they are read; and those of owners, as they change with a name.
//!
//! Owns what the columns mean. Never begins a change.

use crate::adapters::Digest;
use crate::adapters::alias::Alias;
use crate::adapters::version::Version;
use crate::database::Transaction;
use crate::error::{Error, Result};
use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;
use std::time::Duration;

/// What the catalogue holds.
pub struct Catalogue {
    pub versions: Vec<Version>,
    /// (name, number of its current version)
    pub current: Vec<(String, u64)>,
    /// (name, number)
    pub pinned: Vec<(String, u64)>,
    pub aliases: Vec<Alias>,
    /// When it last changed, since 1970; zero if it never did.
    pub changed: Duration,
    /// (name, tenant); an empty tenant is the operator
    pub owners: Vec<(String, String)>,
}

pub fn version(row: &SqliteRow) -> Result<Version> {
    let bad = |what: &str| Error::fault(format!("polylora.db: a version has a bad {what}"));
    let mut digest = [0; 32];
    hex::decode_to_slice(text(row, "digest")?, &mut digest).map_err(|_| bad("digest"))?;
    let change: Option<f64> = row.try_get("logit_change_max")?;
    Ok(Version {
        name: text(row, "name")?,
        number: number(row, "number")?,
        digest: Digest(digest),
        summary: serde_json::from_str(&text(row, "summary")?).map_err(|_| bad("summary"))?,
        logit_change_max: change.map_or(f32::NAN, |c| c as f32),
        forced: row.try_get("forced")?,
        created: number(row, "created")?,
        file_bytes: number(row, "file_bytes")?,
        resident_bytes: number(row, "resident_bytes")?,
        lineage: serde_json::from_str(&text(row, "lineage")?).map_err(|_| bad("lineage"))?,
    })
}

pub fn json(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value)
        .map_err(|e| Error::fault(format!("cannot write to the catalogue: {e}")))
}

pub fn text(row: &SqliteRow, column: &str) -> Result<String> {
    Ok(row.try_get(column)?)
}

pub fn number(row: &SqliteRow, column: &str) -> Result<u64> {
    let n: i64 = row.try_get(column)?;
    u64::try_from(n).map_err(|_| Error::fault(format!("polylora.db: {column} is {n}")))
}

/// Within a change of the name.
pub async fn own(name: &str, tenant: &str, t: &mut Transaction) -> Result<()> {
    let own = sqlx::query("INSERT OR REPLACE INTO owners (name, tenant) VALUES (?, ?)");
    t.run(own.bind(name).bind(tenant)).await.map(drop)
}

/// A tenant's name is given up, the operator's is kept.
pub async fn disown(name: &str, t: &mut Transaction) -> Result<()> {
    let disown = sqlx::query("DELETE FROM owners WHERE name = ? AND tenant IS NOT ''");
    t.run(disown.bind(name)).await.map(drop)
}
