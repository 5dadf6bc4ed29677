//! Rows of access in `polylora.db`: keys and the hashes of their secrets, limits, use of quotas,
//! the audit log.
//!
//! Owns the statements on them. Never holds a secret itself, and judges nothing. The thing to know:
//! a change is one transaction, synced when the call returns.

mod archive;

use super::audit::{Query, Record};
use super::key::{Key, Limits, Scope};
use super::keyring::{Rows, SecretRow};
use super::meters::{Period, UsageRow};
use crate::database::{Database, Storage, Transaction};
use crate::error::{Error, Result};
use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;
use std::collections::BTreeMap;
use std::path::PathBuf;

const KEYS: &str = "SELECT * FROM keys ORDER BY number";
const SECRETS: &str = "SELECT * FROM secrets";

pub struct Store {
    database: Database,
    /// Of rotated records of the audit log.
    archives: PathBuf,
}

/// (id of a key, unix seconds of its last use)
type Used = [(String, u64)];

/// Changes to keys. Each notes last uses on the way and returns the rows as they are after it, read
/// before it is committed: nothing that can fail comes after.
impl Store {
    pub async fn open(storage: &Storage) -> Result<Self> {
        std::fs::create_dir_all(storage.dir()).map_err(|e| {
            Error::fault(format!("data directory {}: {e}", storage.dir().display()))
        })?;
        let database = Database::catalogue(storage).await?;
        Ok(Self { database, archives: storage.dir().join("audit") })
    }

    pub async fn read(&self) -> Result<Rows> {
        let keys = self.database.rows(sqlx::query(KEYS)).await?;
        let secrets = self.database.rows(sqlx::query(SECRETS)).await?;
        rows(&keys, &secrets)
    }

    pub async fn add(&self, key: &Key, hash: &[u8; 32], used: &Used) -> Result<Rows> {
        let scopes: Vec<&str> = key.scopes.iter().map(|s| s.name()).collect();
        let mut t = self.database.begin().await?;
        let insert = sqlx::query(
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
        .bind(key.expires.map(|n| n as i64));
        t.run(insert).await?;
        add_secret(hash, &key.id, &mut t).await?;
        finish(t, used).await
    }

    /// A new secret; the ones before are good until `until`. Those of this key that are over go;
    /// not those of others, which a clock that was set may only call over.
    pub async fn rotate(
        &self,
        id: &str,
        hash: &[u8; 32],
        until: u64,
        now: u64,
        used: &Used,
    ) -> Result<Rows> {
        let mut t = self.database.begin().await?;
        let older = "UPDATE secrets SET expires = min(coalesce(expires, ?2), ?2) WHERE key = ?1";
        t.run(sqlx::query(older).bind(id).bind(until as i64)).await?;
        let over = "DELETE FROM secrets WHERE key = ? AND expires <= ?";
        t.run(sqlx::query(over).bind(id).bind(now as i64)).await?;
        add_secret(hash, id, &mut t).await?;
        finish(t, used).await
    }

    pub async fn revoke(&self, id: &str, now: u64, used: &Used) -> Result<Rows> {
        let mut t = self.database.begin().await?;
        let update = sqlx::query("UPDATE keys SET revoked = ?2 WHERE id = ?1");
        t.run(update.bind(id).bind(now as i64)).await?;
        t.run(sqlx::query("DELETE FROM secrets WHERE key = ?").bind(id)).await?;
        finish(t, used).await
    }

    /// Notes last uses.
    pub async fn used(&self, used: &Used) -> Result<()> {
        if used.is_empty() {
            return Ok(());
        }
        let mut t = self.database.begin().await?;
        note(used, &mut t).await?;
        t.commit().await
    }
}

async fn finish(mut t: Transaction, used: &Used) -> Result<Rows> {
    note(used, &mut t).await?;
    let keys = t.rows(sqlx::query(KEYS)).await?;
    let secrets = t.rows(sqlx::query(SECRETS)).await?;
    let rows = rows(&keys, &secrets)?;
    t.commit().await?;
    Ok(rows)
}

async fn note(used: &Used, t: &mut Transaction) -> Result<()> {
    for (id, at) in used {
        let update = sqlx::query("UPDATE keys SET last_used = ?2 WHERE id = ?1");
        t.run(update.bind(id).bind(*at as i64)).await?;
    }
    Ok(())
}

fn rows(keys: &[SqliteRow], secrets: &[SqliteRow]) -> Result<Rows> {
    Ok(Rows {
        keys: keys.iter().map(key).collect::<Result<_>>()?,
        secrets: secrets.iter().map(secret).collect::<Result<_>>()?,
    })
}

impl Store {
    pub async fn usage(&self) -> Result<Vec<UsageRow>> {
        let rows = self.database.rows(sqlx::query("SELECT * FROM usage")).await?;
        let row = |r: &SqliteRow| -> Result<UsageRow> {
            let period = |of: &str, tokens: &str| -> Result<Period> {
                Ok(Period::of(number(r, of)?, number(r, tokens)?))
            };
            Ok(UsageRow {
                subject: r.try_get("subject")?,
                day: period("day", "day_tokens")?,
                month: period("month", "month_tokens")?,
            })
        };
        rows.iter().map(row).collect()
    }

    /// Sets what was used; the rows are sums, so writing one twice changes nothing.
    pub async fn write_usage(&self, rows: &[UsageRow]) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let mut t = self.database.begin().await?;
        for row in rows {
            let insert = sqlx::query("INSERT OR REPLACE INTO usage VALUES (?, ?, ?, ?, ?)")
                .bind(&row.subject)
                .bind(row.day.number as i64)
                .bind(row.day.used as i64)
                .bind(row.month.number as i64)
                .bind(row.month.used as i64);
            t.run(insert).await?;
        }
        t.commit().await
    }

    pub async fn limits(&self) -> Result<BTreeMap<String, Limits>> {
        let rows = self.database.rows(sqlx::query("SELECT * FROM limits")).await?;
        let row = |r: &SqliteRow| -> Result<(String, Limits)> {
            let text: String = r.try_get("limits")?;
            let limits = serde_json::from_str(&text);
            let limits = limits.map_err(|_| Error::fault("polylora.db: bad limits"))?;
            Ok((r.try_get("name")?, limits))
        };
        rows.iter().map(row).collect()
    }

    pub async fn set_limits(&self, name: &str, limits: &Limits) -> Result<()> {
        let insert = sqlx::query("INSERT OR REPLACE INTO limits VALUES (?, ?)");
        self.database.run(insert.bind(name).bind(json(limits)?)).await.map(drop)
    }

    pub async fn remove_limits(&self, name: &str) -> Result<()> {
        let delete = sqlx::query("DELETE FROM limits WHERE name = ?").bind(name);
        self.database.run(delete).await.map(drop)
    }

    /// Appends to the audit log, all or nothing.
    pub async fn record(&self, records: &[Record]) -> Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        let mut t = self.database.begin().await?;
        for record in records {
            append(record, &mut t).await?;
        }
        t.commit().await
    }

    pub async fn records(&self, query: &Query) -> Result<Vec<Record>> {
        // Two statements: each is answered without a look at records that are not asked for.
        let rows = sqlx::query(match &query.tenant {
            None => "SELECT * FROM audit WHERE id < ?1 ORDER BY id DESC LIMIT ?2",
            Some(_) => {
                "SELECT * FROM audit WHERE id < ?1 AND tenant = ?3 ORDER BY id DESC LIMIT ?2"
            }
        });
        let before = query.before.and_then(|id| id.try_into().ok()).unwrap_or(i64::MAX);
        let rows = rows.bind(before).bind(query.limit as i64);
        let rows = query.tenant.iter().fold(rows, |rows, tenant| rows.bind(tenant));
        self.database.rows(rows).await?.iter().map(record).collect()
    }
}

fn record(r: &SqliteRow) -> Result<Record> {
    let text = |column: &str| r.try_get::<String, _>(column);
    let maybe = |column: &str| r.try_get::<Option<String>, _>(column);
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
    let n: i64 = row.try_get(column)?;
    Ok(n.max(0) as u64)
}

async fn append(record: &Record, t: &mut Transaction) -> Result<()> {
    let insert = sqlx::query(
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
    .bind(record.count as i64);
    t.run(insert).await.map(drop)
}

async fn add_secret(hash: &[u8; 32], key: &str, t: &mut Transaction) -> Result<()> {
    let insert = sqlx::query("INSERT INTO secrets (hash, key) VALUES (?, ?)");
    t.run(insert.bind(&hash[..]).bind(key)).await.map(drop)
}

fn json<T: serde::Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::fault(format!("polylora.db: {e}")))
}

fn key(row: &SqliteRow) -> Result<Key> {
    let bad = |what: &str| Error::fault(format!("polylora.db: a key has bad {what}"));
    let text = |column: &str| row.try_get::<String, _>(column);
    let time = |column: &str| -> Result<Option<u64>> {
        let n: Option<i64> = row.try_get(column)?;
        Ok(n.map(|n| n.max(0) as u64))
    };
    let split = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let words = |column: &str| -> Result<Vec<String>> { Ok(split(&text(column)?)) };
    let manage: Option<String> = row.try_get("manage")?;
    let scope = |name: &String| Scope::ALL.into_iter().find(|s| s.name() == name);
    let scopes = words("scopes")?.iter().map(scope).collect::<Option<_>>();
    Ok(Key {
        id: text("id")?,
        label: text("label")?,
        scopes: scopes.ok_or_else(|| bad("scopes"))?,
        tenant: row.try_get("tenant")?,
        adapters: words("adapters")?,
        manage: manage.as_deref().map(split),
        weight: row.try_get("weight")?,
        limits: serde_json::from_str(&text("limits")?).map_err(|_| bad("limits"))?,
        created: time("created")?.unwrap_or(0),
        expires: time("expires")?,
        revoked: time("revoked")?,
        last_used: time("last_used")?,
    })
}

fn secret(row: &SqliteRow) -> Result<SecretRow> {
    let hash: Vec<u8> = row.try_get("hash")?;
    let expires: Option<i64> = row.try_get("expires")?;
    Ok(SecretRow {
        hash: hash.try_into().map_err(|_| Error::fault("polylora.db: a hash is no SHA-256"))?,
        key: row.try_get("key")?,
        expires: expires.map(|n| n.max(0) as u64),
    })
}
