//! Rows of files, uploads and parts in `polylora.db`.
//!
//! Owns the statements on them. Never decides who may see one. The thing to know: every change is
//! synced when the call returns.

use super::file::{FileRow, Page, Part, Purpose, State, Upload};
use crate::clock::Now;
use crate::database::{Database, Storage, Transaction};
use crate::error::{Error, Result};
use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;
use std::time::Duration;

pub struct Rows {
    database: Database,
}

impl Rows {
    /// Opens `polylora.db`. Errors: `data_dir_unsupported`.
    pub async fn open(storage: &Storage) -> Result<Self> {
        Ok(Self { database: Database::catalogue(storage).await? })
    }

    /// When anything that names a content last changed, since 1970.
    pub async fn changed(&self) -> Result<Duration> {
        let row = self.database.row(sqlx::query("SELECT at FROM changed")).await?;
        Ok(Duration::from_millis(row.map_or(Ok(0), |row| number(&row, "at"))?))
    }

    /// Every file, oldest first.
    pub async fn files(&self) -> Result<Vec<FileRow>> {
        let rows = self.database.rows(sqlx::query("SELECT * FROM files ORDER BY number")).await?;
        rows.iter().map(file).collect()
    }

    pub async fn file(&self, id: &str) -> Result<Option<FileRow>> {
        let query = sqlx::query("SELECT * FROM files WHERE id = ?").bind(id);
        self.database.row(query).await?.as_ref().map(file).transpose()
    }

    /// One page of a tenant's files, or, without a tenant, of all; and whether more follow.
    pub async fn page(
        &self,
        tenant: Option<&str>,
        page: &Page,
        now: Duration,
    ) -> Result<(Vec<FileRow>, bool)> {
        let text = match page.ascending {
            true => {
                "SELECT * FROM files WHERE (?1 IS NULL OR tenant = ?1)
                 AND (?2 IS NULL OR purpose = ?2) AND (?3 IS NULL OR number > ?3)
                 AND (expires IS NULL OR expires > ?4) ORDER BY number LIMIT ?5"
            }
            false => {
                "SELECT * FROM files WHERE (?1 IS NULL OR tenant = ?1)
                 AND (?2 IS NULL OR purpose = ?2) AND (?3 IS NULL OR number < ?3)
                 AND (expires IS NULL OR expires > ?4) ORDER BY number DESC LIMIT ?5"
            }
        };
        let query = sqlx::query(text)
            .bind(tenant)
            .bind(page.purpose.map(Purpose::name))
            .bind(page.after.map(|number| number as i64))
            .bind(now.as_secs() as i64)
            .bind(page.limit as i64 + 1);
        let rows = self.database.rows(query).await?;
        let more = rows.len() > page.limit;
        let files: Result<Vec<FileRow>> = rows.iter().take(page.limit).map(file).collect();
        Ok((files?, more))
    }

    /// Whether a file has this content.
    pub async fn names(&self, digest: &str) -> Result<bool> {
        let query = sqlx::query("SELECT 1 FROM files WHERE digest = ? LIMIT 1").bind(digest);
        Ok(self.database.row(query).await?.is_some())
    }

    /// Enters a new file; of an upload, which is completed by that and has no parts any more.
    pub async fn add(&self, new: &FileRow, upload: Option<&str>) -> Result<FileRow> {
        let mut t = self.begin().await?;
        let insert = sqlx::query(
            "INSERT INTO files (id, tenant, digest, bytes, name, purpose, created, expires, problem)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING *",
        )
        .bind(&new.id)
        .bind(&new.tenant)
        .bind(&new.digest)
        .bind(new.bytes as i64)
        .bind(&new.name)
        .bind(new.purpose.name())
        .bind(new.created as i64)
        .bind(new.expires.map(|at| at as i64))
        .bind(&new.problem);
        let rows = t.rows(insert).await?;
        let added = rows.first().ok_or_else(|| Error::fault("polylora.db: no file was added"))?;
        let added = file(added)?;
        if let Some(upload) = upload {
            let done = "UPDATE uploads SET state = 'completed', file = ?2 WHERE id = ?1";
            t.run(sqlx::query(done).bind(upload).bind(&new.id)).await?;
            t.run(sqlx::query("DELETE FROM parts WHERE upload = ?").bind(upload)).await?;
        }
        t.commit().await?;
        Ok(added)
    }

    pub async fn remove(&self, id: &str) -> Result<()> {
        let mut t = self.begin().await?;
        t.run(sqlx::query("DELETE FROM files WHERE id = ?").bind(id)).await?;
        t.commit().await
    }

    /// Every upload that is kept.
    pub async fn uploads(&self) -> Result<Vec<Upload>> {
        let rows = self.database.rows(sqlx::query("SELECT * FROM uploads")).await?;
        rows.iter().map(upload).collect()
    }

    pub async fn upload(&self, id: &str) -> Result<Option<Upload>> {
        let query = sqlx::query("SELECT * FROM uploads WHERE id = ?").bind(id);
        self.database.row(query).await?.as_ref().map(upload).transpose()
    }

    pub async fn add_upload(&self, new: &Upload) -> Result<()> {
        let insert = sqlx::query(
            "INSERT INTO uploads (id, tenant, bytes, name, purpose, lifetime, created, expires,
             state) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(&new.id)
        .bind(&new.tenant)
        .bind(new.bytes as i64)
        .bind(&new.name)
        .bind(new.purpose.name())
        .bind(new.lifetime.map(|seconds| seconds as i64))
        .bind(new.created as i64)
        .bind(new.expires as i64)
        .bind(new.state.name());
        self.database.run(insert).await.map(drop)
    }

    /// Every part, of one upload or of all.
    pub async fn parts(&self, upload: Option<&str>) -> Result<Vec<Part>> {
        let query = "SELECT * FROM parts WHERE ?1 IS NULL OR upload = ?1";
        let rows = self.database.rows(sqlx::query(query).bind(upload)).await?;
        rows.iter().map(part).collect()
    }

    pub async fn add_part(&self, new: &Part) -> Result<()> {
        let insert = "INSERT INTO parts (id, upload, bytes, created) VALUES (?, ?, ?, ?)";
        let insert = sqlx::query(insert).bind(&new.id).bind(&new.upload);
        let insert = insert.bind(new.bytes as i64).bind(new.created as i64);
        self.database.run(insert).await.map(drop)
    }

    /// The upload is cancelled; it has no parts any more.
    pub async fn cancel(&self, upload: &str) -> Result<()> {
        self.both(upload, "UPDATE uploads SET state = 'cancelled' WHERE id = ?").await
    }

    /// Forgets an upload and its parts.
    pub async fn remove_upload(&self, upload: &str) -> Result<()> {
        self.both(upload, "DELETE FROM uploads WHERE id = ?").await
    }

    async fn both(&self, upload: &str, statement: &'static str) -> Result<()> {
        let mut t = self.database.begin().await?;
        t.run(sqlx::query("DELETE FROM parts WHERE upload = ?").bind(upload)).await?;
        t.run(sqlx::query(statement).bind(upload)).await?;
        t.commit().await
    }

    /// Begins a change of what names contents, and notes when.
    async fn begin(&self) -> Result<Transaction> {
        let mut t = self.database.begin().await?;
        let now = Now::read().wall.as_millis() as i64;
        t.run(sqlx::query("INSERT OR REPLACE INTO changed VALUES (1, ?)").bind(now)).await?;
        Ok(t)
    }
}

fn file(row: &SqliteRow) -> Result<FileRow> {
    Ok(FileRow {
        number: number(row, "number")?,
        id: row.try_get("id")?,
        tenant: row.try_get("tenant")?,
        digest: digest(row)?,
        bytes: number(row, "bytes")?,
        name: row.try_get("name")?,
        purpose: purpose(row)?,
        created: number(row, "created")?,
        expires: perhaps(row, "expires")?,
        problem: row.try_get("problem")?,
    })
}

/// 64 hex digits: a place is made of it.
fn digest(row: &SqliteRow) -> Result<String> {
    let digest: String = row.try_get("digest")?;
    match digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit()) {
        true => Ok(digest),
        false => Err(Error::fault("polylora.db: a file has a bad digest")),
    }
}

fn upload(row: &SqliteRow) -> Result<Upload> {
    let state: String = row.try_get("state")?;
    let known = State::ALL.into_iter().find(|s| s.name() == state);
    Ok(Upload {
        id: row.try_get("id")?,
        tenant: row.try_get("tenant")?,
        bytes: number(row, "bytes")?,
        name: row.try_get("name")?,
        purpose: purpose(row)?,
        lifetime: perhaps(row, "lifetime")?,
        created: number(row, "created")?,
        expires: number(row, "expires")?,
        state: known.ok_or_else(|| Error::fault(format!("polylora.db: an upload is {state}")))?,
        file: row.try_get("file")?,
    })
}

fn part(row: &SqliteRow) -> Result<Part> {
    Ok(Part {
        id: row.try_get("id")?,
        upload: row.try_get("upload")?,
        bytes: number(row, "bytes")?,
        created: number(row, "created")?,
    })
}

fn purpose(row: &SqliteRow) -> Result<Purpose> {
    let name: String = row.try_get("purpose")?;
    let known = Purpose::named(&name);
    known.ok_or_else(|| Error::fault(format!("polylora.db: a file is for {name}")))
}

fn number(row: &SqliteRow, column: &str) -> Result<u64> {
    Ok(perhaps(row, column)?.unwrap_or(0))
}

fn perhaps(row: &SqliteRow, column: &str) -> Result<Option<u64>> {
    let n: Option<i64> = row.try_get(column)?;
    Ok(n.map(|n| n.max(0) as u64))
}
