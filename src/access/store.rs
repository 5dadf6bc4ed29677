//! `access.db`: keys and the hashes of their secrets, limits, use of quotas, the audit log.
//!
//! Owns the tables. Never holds a secret itself, and judges nothing. The thing to know: a change is
//! one transaction, synced when the call returns.

mod archive;

use super::audit::{Query, Record};
use super::key::{Key, Limits, Scope};
use super::keyring::{Rows, SecretRow};
use super::meters::{Period, UsageRow};
use crate::database;
use crate::error::{Error, Result};
use sqlx::Row as _;
use sqlx::sqlite::{SqlitePool, SqliteRow};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE keys (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, label TEXT NOT NULL,
        scopes TEXT NOT NULL, tenant TEXT, adapters TEXT NOT NULL, weight INTEGER NOT NULL,
        limits TEXT NOT NULL, created INTEGER NOT NULL, expires INTEGER, revoked INTEGER,
        last_used INTEGER) STRICT;
    CREATE TABLE secrets (
        hash BLOB PRIMARY KEY, key TEXT NOT NULL REFERENCES keys (id), expires INTEGER) STRICT;
",
    "
    CREATE TABLE limits (name TEXT PRIMARY KEY, limits TEXT NOT NULL) STRICT;
    CREATE TABLE usage (
        subject TEXT PRIMARY KEY, day INTEGER NOT NULL, day_tokens INTEGER NOT NULL,
        month INTEGER NOT NULL, month_tokens INTEGER NOT NULL) STRICT;
    CREATE TABLE audit (
        id INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER NOT NULL, key TEXT NOT NULL, tenant TEXT,
        action TEXT NOT NULL, name TEXT, digest TEXT, outcome TEXT NOT NULL,
        status INTEGER NOT NULL, request TEXT NOT NULL) STRICT;
    CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit BEGIN
        SELECT RAISE(ABORT, 'the audit log is append-only'); END;
    CREATE TRIGGER audit_is_not_shortened BEFORE DELETE ON audit BEGIN
        SELECT RAISE(ABORT, 'the audit log is append-only'); END;
",
    "
    ALTER TABLE keys ADD COLUMN manage TEXT;
    ALTER TABLE audit ADD COLUMN count INTEGER NOT NULL DEFAULT 1;
",
];

pub struct Store {
    pool: SqlitePool,
    /// Of rotated records of the audit log.
    archives: PathBuf,
}

impl Store {
    pub async fn open(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)
            .map_err(|e| Error::fault(format!("data directory {}: {e}", dir.display())))?;
        let pool = database::open(&dir.join("access.db"), MIGRATIONS).await?;
        Ok(Self { pool, archives: dir.join("audit") })
    }

    pub async fn read(&self) -> Result<Rows> {
        let keys = sqlx::query("SELECT * FROM keys ORDER BY number");
        let keys = keys.fetch_all(&self.pool).await.map_err(failed)?;
        let secrets = sqlx::query("SELECT * FROM secrets").fetch_all(&self.pool).await;
        Ok(Rows {
            keys: keys.iter().map(key).collect::<Result<_>>()?,
            secrets: secrets.map_err(failed)?.iter().map(secret).collect::<Result<_>>()?,
        })
    }

    pub async fn add(&self, key: &Key, hash: &[u8; 32]) -> Result<()> {
        let scopes: Vec<&str> = key.scopes.iter().map(|s| s.name()).collect();
        let mut t = self.pool.begin().await.map_err(failed)?;
        sqlx::query(
            "INSERT INTO keys (id, label, scopes, tenant, adapters, manage, weight, limits, created,
             expires) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(&key.id)
        .bind(&key.label)
        .bind(scopes.join(" "))
        .bind(&key.tenant)
        .bind(key.adapters.join(" "))
        .bind(key.manage.as_ref().map(|given| given.join(" ")))
        .bind(key.weight)
        .bind(json(&key.limits)?)
        .bind(key.created as i64)
        .bind(key.expires.map(|n| n as i64))
        .execute(&mut *t)
        .await
        .map_err(failed)?;
        insert(hash, &key.id, &mut t).await?;
        t.commit().await.map_err(failed)
    }

    /// A new secret; the ones before are good until `until`. Those that are over go.
    pub async fn rotate(&self, id: &str, hash: &[u8; 32], until: u64, now: u64) -> Result<()> {
        let mut t = self.pool.begin().await.map_err(failed)?;
        let older = "UPDATE secrets SET expires = min(coalesce(expires, ?2), ?2) WHERE key = ?1";
        let update = sqlx::query(older).bind(id).bind(until as i64);
        update.execute(&mut *t).await.map_err(failed)?;
        let over = sqlx::query("DELETE FROM secrets WHERE expires <= ?").bind(now as i64);
        over.execute(&mut *t).await.map_err(failed)?;
        insert(hash, id, &mut t).await?;
        t.commit().await.map_err(failed)
    }

    pub async fn revoke(&self, id: &str, now: u64) -> Result<()> {
        let mut t = self.pool.begin().await.map_err(failed)?;
        let update = sqlx::query("UPDATE keys SET revoked = ?2 WHERE id = ?1");
        update.bind(id).bind(now as i64).execute(&mut *t).await.map_err(failed)?;
        let delete = sqlx::query("DELETE FROM secrets WHERE key = ?").bind(id);
        delete.execute(&mut *t).await.map_err(failed)?;
        t.commit().await.map_err(failed)
    }

    /// Notes last uses, as (id, unix seconds).
    pub async fn used(&self, used: &[(String, u64)]) -> Result<()> {
        if used.is_empty() {
            return Ok(());
        }
        let mut t = self.pool.begin().await.map_err(failed)?;
        for (id, at) in used {
            let update = sqlx::query("UPDATE keys SET last_used = ?2 WHERE id = ?1");
            update.bind(id).bind(*at as i64).execute(&mut *t).await.map_err(failed)?;
        }
        t.commit().await.map_err(failed)
    }
}

impl Store {
    pub async fn usage(&self) -> Result<Vec<UsageRow>> {
        let rows = sqlx::query("SELECT * FROM usage").fetch_all(&self.pool).await;
        let row = |r: &SqliteRow| -> Result<UsageRow> {
            let period = |of: &str, tokens: &str| -> Result<Period> {
                Ok(Period::of(number(r, of)?, number(r, tokens)?))
            };
            Ok(UsageRow {
                subject: r.try_get("subject").map_err(failed)?,
                day: period("day", "day_tokens")?,
                month: period("month", "month_tokens")?,
            })
        };
        rows.map_err(failed)?.iter().map(row).collect()
    }

    /// Sets what was used; the rows are sums, so writing one twice changes nothing.
    pub async fn write_usage(&self, rows: &[UsageRow]) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let mut t = self.pool.begin().await.map_err(failed)?;
        for row in rows {
            sqlx::query("INSERT OR REPLACE INTO usage VALUES (?, ?, ?, ?, ?)")
                .bind(&row.subject)
                .bind(row.day.number as i64)
                .bind(row.day.used as i64)
                .bind(row.month.number as i64)
                .bind(row.month.used as i64)
                .execute(&mut *t)
                .await
                .map_err(failed)?;
        }
        t.commit().await.map_err(failed)
    }

    pub async fn limits(&self) -> Result<BTreeMap<String, Limits>> {
        let rows = sqlx::query("SELECT * FROM limits").fetch_all(&self.pool).await;
        let row = |r: &SqliteRow| -> Result<(String, Limits)> {
            let text: String = r.try_get("limits").map_err(failed)?;
            let limits = serde_json::from_str(&text);
            let limits = limits.map_err(|_| Error::fault("access.db: bad limits"))?;
            Ok((r.try_get("name").map_err(failed)?, limits))
        };
        rows.map_err(failed)?.iter().map(row).collect()
    }

    pub async fn set_limits(&self, name: &str, limits: &Limits) -> Result<()> {
        let insert = sqlx::query("INSERT OR REPLACE INTO limits VALUES (?, ?)");
        let insert = insert.bind(name).bind(json(limits)?);
        insert.execute(&self.pool).await.map(drop).map_err(failed)
    }

    pub async fn remove_limits(&self, name: &str) -> Result<()> {
        let delete = sqlx::query("DELETE FROM limits WHERE name = ?").bind(name);
        delete.execute(&self.pool).await.map(drop).map_err(failed)
    }

    /// Appends to the audit log, all or nothing.
    pub async fn record_all(&self, records: &[Record]) -> Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        let mut t = self.pool.begin().await.map_err(failed)?;
        for record in records {
            append(record, &mut t).await?;
        }
        t.commit().await.map_err(failed)
    }

    pub async fn records(&self, query: &Query) -> Result<Vec<Record>> {
        let rows = sqlx::query(
            "SELECT * FROM audit WHERE (?1 IS NULL OR tenant = ?1) AND (?2 IS NULL OR id < ?2)
             ORDER BY id DESC LIMIT ?3",
        );
        let rows = rows
            .bind(&query.tenant)
            .bind(query.before.map(|n| n as i64))
            .bind(query.limit as i64)
            .fetch_all(&self.pool)
            .await;
        rows.map_err(failed)?.iter().map(record).collect()
    }
}

fn record(r: &SqliteRow) -> Result<Record> {
    let text = |column: &str| r.try_get::<String, _>(column).map_err(failed);
    let maybe = |column: &str| r.try_get::<Option<String>, _>(column).map_err(failed);
    Ok(Record {
        id: number(r, "id")?,
        at: number(r, "at")?,
        key: text("key")?,
        tenant: maybe("tenant")?,
        action: text("action")?,
        name: maybe("name")?,
        digest: maybe("digest")?,
        outcome: text("outcome")?,
        status: number(r, "status")? as u16,
        request_id: text("request")?,
        count: number(r, "count")?,
    })
}

fn number(row: &SqliteRow, column: &str) -> Result<u64> {
    let n: i64 = row.try_get(column).map_err(failed)?;
    Ok(n.max(0) as u64)
}

async fn append(record: &Record, t: &mut sqlx::SqliteConnection) -> Result<()> {
    sqlx::query(
        "INSERT INTO audit (at, key, tenant, action, name, digest, outcome, status, request,
         count) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(record.at as i64)
    .bind(&record.key)
    .bind(&record.tenant)
    .bind(&record.action)
    .bind(&record.name)
    .bind(&record.digest)
    .bind(&record.outcome)
    .bind(record.status)
    .bind(&record.request_id)
    .bind(record.count as i64)
    .execute(t)
    .await
    .map(drop)
    .map_err(failed)
}

async fn insert(hash: &[u8; 32], key: &str, t: &mut sqlx::SqliteConnection) -> Result<()> {
    let insert = sqlx::query("INSERT INTO secrets (hash, key) VALUES (?, ?)");
    insert.bind(&hash[..]).bind(key).execute(t).await.map(drop).map_err(failed)
}

fn json<T: serde::Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::fault(format!("access.db: {e}")))
}

fn key(row: &SqliteRow) -> Result<Key> {
    let bad = |what: &str| Error::fault(format!("access.db: a key has bad {what}"));
    let text = |column: &str| row.try_get::<String, _>(column).map_err(failed);
    let time = |column: &str| -> Result<Option<u64>> {
        let n: Option<i64> = row.try_get(column).map_err(failed)?;
        Ok(n.map(|n| n.max(0) as u64))
    };
    let split = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let words = |column: &str| -> Result<Vec<String>> { Ok(split(&text(column)?)) };
    let manage: Option<String> = row.try_get("manage").map_err(failed)?;
    let scope = |name: &String| Scope::ALL.into_iter().find(|s| s.name() == name);
    let scopes = words("scopes")?.iter().map(scope).collect::<Option<_>>();
    Ok(Key {
        id: text("id")?,
        label: text("label")?,
        scopes: scopes.ok_or_else(|| bad("scopes"))?,
        tenant: row.try_get("tenant").map_err(failed)?,
        adapters: words("adapters")?,
        manage: manage.as_deref().map(split),
        weight: row.try_get("weight").map_err(failed)?,
        limits: serde_json::from_str(&text("limits")?).map_err(|_| bad("limits"))?,
        created: time("created")?.unwrap_or(0),
        expires: time("expires")?,
        revoked: time("revoked")?,
        last_used: time("last_used")?,
    })
}

fn secret(row: &SqliteRow) -> Result<SecretRow> {
    let hash: Vec<u8> = row.try_get("hash").map_err(failed)?;
    let expires: Option<i64> = row.try_get("expires").map_err(failed)?;
    Ok(SecretRow {
        hash: hash.try_into().map_err(|_| Error::fault("access.db: a hash is no SHA-256"))?,
        key: row.try_get("key").map_err(failed)?,
        expires: expires.map(|n| n.max(0) as u64),
    })
}

fn failed(e: sqlx::Error) -> Error {
    Error::fault(format!("access.db: {e}"))
}
