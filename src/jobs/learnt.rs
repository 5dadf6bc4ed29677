//! What jobs learnt: rows of the digests of lines, kept as long as a version rests on them.
//!
//! Owns the statements on these rows. Never keeps a line. The thing to know: a row outlives its
//! job's, its file and even its versions, as long as something was made of them.

use super::job::Job;
use super::journal::Journal;
use super::work::Work;
use crate::error::Result;
use crate::train::data::Digest;
use sqlx::Row as _;
use std::collections::BTreeSet;

impl Journal {
    /// A training job learns these lines, of sorted digests. One that begins anew learns the same.
    pub async fn learns(&self, job: &Job, lines: &[Digest]) -> Result<()> {
        let Work::Train(spec) = &*job.work else { return Ok(()) };
        let row = "INSERT OR REPLACE INTO learnt (job, tenant, file, lines) VALUES (?, ?, ?, ?)";
        let row = sqlx::query(row)
            .bind(&job.id)
            .bind(&job.owner.tenant)
            .bind(&spec.training.id)
            .bind(lines.as_flattened());
        self.database.run(row).await.map(drop)
    }

    /// Jobs of a tenant, or without one of all, that learnt a line.
    pub async fn learners(&self, tenant: Option<&str>, line: &Digest) -> Result<Vec<String>> {
        let jobs = "SELECT job FROM learnt WHERE ?1 IS NULL OR tenant = ?1 ORDER BY job";
        let mut learners = Vec::new();
        // One row at a time: each may be megabytes.
        for row in self.database.rows(sqlx::query(jobs).bind(tenant)).await? {
            let job: String = row.try_get("job")?;
            let lines = sqlx::query("SELECT lines FROM learnt WHERE job = ?").bind(&job);
            let Some(row) = self.database.row(lines).await? else { continue };
            let lines: Vec<u8> = row.try_get("lines")?;
            if lines.as_chunks().0.binary_search(line).is_ok() {
                learners.push(job);
            }
        }
        Ok(learners)
    }

    /// Jobs that learnt from a file.
    pub async fn learners_from(&self, file: &str) -> Result<Vec<String>> {
        let jobs = sqlx::query("SELECT job FROM learnt WHERE file = ? ORDER BY job").bind(file);
        let rows = self.database.rows(jobs).await?;
        rows.iter().map(|row| Ok(row.try_get("job")?)).collect()
    }

    /// Whether a job of a tenant, or without one any, learnt from a file.
    pub async fn is_learnt_by(&self, file: &str, tenant: Option<&str>) -> Result<bool> {
        let jobs = "SELECT job FROM learnt WHERE file = ?1 AND (?2 IS NULL OR tenant = ?2) LIMIT 1";
        let row = self.database.row(sqlx::query(jobs).bind(file).bind(tenant)).await?;
        Ok(row.is_some())
    }

    /// Forgets what a job learnt.
    pub async fn unlearn(&self, job: &str) -> Result<()> {
        let row = sqlx::query("DELETE FROM learnt WHERE job = ?").bind(job);
        self.database.run(row).await.map(drop)
    }

    /// Forgets what jobs learnt that are in none of these: jobs that are known, and jobs that
    /// versions rest on.
    pub async fn unlearn_others(&self, kept: &BTreeSet<String>) -> Result<()> {
        let rows = self.database.rows(sqlx::query("SELECT job FROM learnt")).await?;
        for row in rows {
            let job: String = row.try_get("job")?;
            if !kept.contains(&job) {
                self.unlearn(&job).await?;
            }
        }
        Ok(())
    }
}
