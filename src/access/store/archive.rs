//! Rotation of the audit log: records out of the table, into a file that lasts.
//!
//! Owns the files `audit/audit-<first>-<last>.jsonl` and the one way past the table's triggers.
//! Never removes a record that is not in a file on disk. The thing to know: a crash in between
//! leaves the records in both places, and the next rotation writes them once more.

use super::{Store, number, record};
use crate::access::audit::{Archived, Record};
use crate::error::{Error, Result};
use serde::Serialize;
use std::path::Path;
use tokio::fs::{self, File};
use tokio::io::AsyncWriteExt;

/// Records that are in memory at once.
const BATCH: i64 = 1000;
/// Records that one change takes out: uploads and other deeds wait for it.
const FORGOTTEN: usize = 10_000;

/// One line of a file.
#[derive(Serialize)]
struct Line<'a> {
    id: u64,
    #[serde(flatten)]
    record: &'a Record,
}

impl Store {
    /// The id of the first record that was made at `at` (unix milliseconds) or later, or else one
    /// that no record has.
    pub async fn first_since(&self, at: u64) -> Result<u64> {
        let first = "SELECT coalesce(min(id), (SELECT coalesce(max(id), 0) + 1 FROM audit)) AS id
                     FROM audit WHERE at >= ?";
        let row = self.database.row(sqlx::query(first).bind(at as i64)).await?;
        row.map_or(Ok(0), |row| number(&row, "id"))
    }

    /// Moves the records before `before` into a file, if there are any.
    pub async fn archive(&self, before: u64) -> Result<Option<Archived>> {
        let range = "SELECT count(*) AS records, coalesce(min(id), 0) AS first,
                     coalesce(max(id), 0) AS last FROM audit WHERE id < ?";
        let before = i64::try_from(before).unwrap_or(i64::MAX);
        let row = self.database.row(sqlx::query(range).bind(before)).await?;
        let records = row.as_ref().map_or(Ok(0), |row| number(row, "records"))?;
        let Some(row) = row.filter(|_| records > 0) else { return Ok(None) };
        let (first, last) = (number(&row, "first")?, number(&row, "last")?);
        let file = format!("audit-{first}-{last}.jsonl");
        let io = |e| self.database.storage().failed(&format!("cannot write audit/{file}"), &e);
        fs::create_dir_all(&self.archives).await.map_err(io)?;
        let half = self.archives.join(format!("{file}.part"));
        self.write_out(&half, last).await?;
        fs::rename(&half, self.archives.join(&file)).await.map_err(io)?;
        for dir in [Some(self.archives.as_path()), self.archives.parent()].into_iter().flatten() {
            File::open(dir).await.map_err(io)?.sync_all().await.map_err(io)?;
        }
        let bites = (first..=last).step_by(FORGOTTEN);
        for end in bites.map(|from| last.min(from + FORGOTTEN as u64 - 1)) {
            self.forget(end).await?;
        }
        Ok(Some(Archived { file: format!("audit/{file}"), first, last, records }))
    }

    /// Writes the records up to `last`, synced.
    async fn write_out(&self, path: &Path, last: u64) -> Result<()> {
        let storage = self.database.storage();
        let io = |e| storage.failed("cannot write records of the audit log to a file", &e);
        let mut file = File::create(path).await.map_err(io)?;
        let mut after = 0;
        loop {
            let page = "SELECT * FROM audit WHERE id > ? AND id <= ? ORDER BY id LIMIT ?";
            let page = sqlx::query(page).bind(after as i64).bind(last as i64).bind(BATCH);
            let rows = self.database.rows(page).await?;
            let records = rows.iter().map(record).collect::<Result<Vec<_>>>()?;
            let Some(newest) = records.last() else { break };
            after = newest.id;
            let mut text = String::new();
            for record in &records {
                let line = serde_json::to_string(&Line { id: record.id, record });
                text += &line.map_err(|e| Error::fault(format!("an audit record: {e}")))?;
                text.push('\n');
            }
            file.write_all(text.as_bytes()).await.map_err(io)?;
        }
        file.flush().await.map_err(io)?;
        file.sync_all().await.map_err(io)
    }

    /// Takes the records up to `last` out of the table. The trigger that forbids it is away only
    /// inside the transaction, so nobody else meets the table without it.
    async fn forget(&self, last: u64) -> Result<()> {
        let mut t = self.database.begin().await?;
        let open = "DROP TRIGGER audit_is_not_shortened";
        t.run(sqlx::query(open)).await?;
        let delete = sqlx::query("DELETE FROM audit WHERE id <= ?").bind(last as i64);
        t.run(delete).await?;
        let close = "CREATE TRIGGER audit_is_not_shortened BEFORE DELETE ON audit BEGIN
                     SELECT RAISE(ABORT, 'the audit log is append-only'); END";
        t.run(sqlx::query(close)).await?;
        t.commit().await
    }
}
