//! Rows of jobs in `polylora.db`: what was ordered, how it stands, the reports of what was made.
//!
//! Owns the statements on them. Never decides what happens to a job. The thing to know: every
//! change is synced when the call returns, and a job that is over is never changed again.

use super::evaluate::EvaluationSet;
use super::events::{Event, Level, StoredEvent};
use super::job::{Failure, Job, Outcome, Owner, State};
use super::train::Verdict;
use super::work::Work;
use crate::database::{Database, Storage, Transaction};
use crate::error::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;
use std::sync::Arc;

/// A report as it is kept: JSON, SVG, and JSON.
pub struct StoredReport {
    pub report: String,
    pub picture: String,
    pub evaluation: Option<String>,
}

pub struct Journal {
    pub(super) database: Database,
}

impl Journal {
    /// Opens `polylora.db`. Errors: `data_dir_unsupported`.
    pub async fn open(storage: &Storage) -> Result<Self> {
        Ok(Self { database: Database::catalogue(storage).await? })
    }

    /// Every job, oldest first, each with its number. Those that were running when the server ended
    /// are queued again; that is written down when they start.
    pub async fn load(&self) -> Result<Vec<(u64, Job)>> {
        let rows = self.database.rows(sqlx::query("SELECT * FROM jobs ORDER BY number")).await?;
        let again = |row: &SqliteRow| {
            let (number, mut job) = read(row)?;
            if matches!(job.state, State::Running(_)) {
                (job.state, job.restarts) = (State::Queued, job.restarts + 1);
            }
            Ok((number, job))
        };
        rows.iter().map(again).collect()
    }

    /// Enters a new job; returns its number and the job as it is read back.
    pub async fn add(&self, job: &Job, sets: &[EvaluationSet]) -> Result<(u64, Job)> {
        let insert = sqlx::query(
            "INSERT INTO jobs (id, key, tenant, spec, sets, state, created)
             VALUES (?, ?, ?, ?, ?, 'queued', ?) RETURNING *",
        )
        .bind(&job.id)
        .bind(&job.owner.key)
        .bind(&job.owner.tenant)
        .bind(json(&*job.work)?)
        .bind((!sets.is_empty()).then(|| json(&sets)).transpose()?)
        .bind(job.created as i64);
        let mut t = self.database.begin().await?;
        let rows = t.rows(insert).await?;
        let added = rows.first().ok_or_else(|| Error::fault("polylora.db: a job was not added"))?;
        let added = read(added)?;
        t.commit().await?;
        Ok(added)
    }

    /// The job begins, or begins again.
    pub async fn start(&self, job: &Job, now: u64) -> Result<()> {
        let begun = "UPDATE jobs SET state = 'running', started = ?2, restarts = ?3
                     WHERE id = ?1 AND state IN ('queued', 'running')";
        let begun = sqlx::query(begun).bind(&job.id).bind(now as i64).bind(job.restarts as i64);
        self.database.run(begun).await.map(drop)
    }

    /// The job waits again.
    pub async fn set_aside(&self, id: &str) -> Result<()> {
        let queued = "UPDATE jobs SET state = 'queued' WHERE id = ? AND state = 'running'";
        self.database.run(sqlx::query(queued).bind(id)).await.map(drop)
    }

    /// The job waits until it is resumed.
    pub async fn pause(&self, id: &str) -> Result<()> {
        let paused =
            "UPDATE jobs SET state = 'paused' WHERE id = ? AND state IN ('queued', 'running')";
        self.database.run(sqlx::query(paused).bind(id)).await.map(drop)
    }

    /// A paused job waits again.
    pub async fn resume(&self, id: &str) -> Result<()> {
        let queued = "UPDATE jobs SET state = 'queued' WHERE id = ? AND state = 'paused'";
        self.database.run(sqlx::query(queued).bind(id)).await.map(drop)
    }

    /// What is to be done, now that it is known more exactly.
    pub async fn specify(&self, id: &str, work: &Work) -> Result<()> {
        let known = sqlx::query("UPDATE jobs SET spec = ?2 WHERE id = ?1");
        self.database.run(known.bind(id).bind(json(work)?)).await.map(drop)
    }

    /// Adds what a job told. What it told of the same steps, or later ones, before a restart is
    /// replaced.
    pub async fn tell(&self, id: &str, now: u64, events: &[Event]) -> Result<()> {
        let mut t = self.database.begin().await?;
        tell(&mut t, id, now, events).await?;
        t.commit().await
    }

    /// How a result was judged and by what, with what is told of it.
    pub async fn judged(
        &self,
        id: &str,
        (verdict, evaluation): (&Verdict, &str),
        now: u64,
        events: &[Event],
    ) -> Result<()> {
        let mut t = self.database.begin().await?;
        let judged = sqlx::query("UPDATE jobs SET gate = ?2 WHERE id = ?1");
        t.run(judged.bind(id).bind(json(verdict)?)).await?;
        let kept = "INSERT INTO reports (id, report, picture, evaluation) VALUES (?1, '{}', '', ?2)
                    ON CONFLICT (id) DO UPDATE SET evaluation = excluded.evaluation";
        t.run(sqlx::query(kept).bind(id).bind(evaluation)).await?;
        tell(&mut t, id, now, events).await?;
        t.commit().await
    }

    /// At most `limit` events of a job that are older than number `before`, newest first.
    pub async fn told(&self, id: &str, before: u64, limit: u64) -> Result<Vec<StoredEvent>> {
        let query =
            "SELECT * FROM events WHERE job = ? AND number < ? ORDER BY number DESC LIMIT ?";
        let bound = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let query = sqlx::query(query).bind(id).bind(bound(before)).bind(bound(limit));
        self.database.rows(query).await?.iter().map(event).collect()
    }

    /// What a job has told after event number `after`, oldest first.
    pub async fn told_since(&self, id: &str, after: u64) -> Result<Vec<StoredEvent>> {
        let query = "SELECT * FROM events WHERE job = ? AND number > ? ORDER BY number";
        let query = sqlx::query(query).bind(id).bind(i64::try_from(after).unwrap_or(i64::MAX));
        self.database.rows(query).await?.iter().map(event).collect()
    }

    /// A job got further than when the server last ended under it.
    pub async fn got_further(&self, id: &str) -> Result<()> {
        let query = "UPDATE jobs SET restarts = 0 WHERE id = ?";
        self.database.run(sqlx::query(query).bind(id)).await.map(drop)
    }

    /// Keeps the report of what is about to be published; a restarted job replaces its own.
    pub async fn report(&self, id: &str, report: &str, picture: &str) -> Result<()> {
        let kept = "INSERT INTO reports (id, report, picture) VALUES (?, ?, ?)
                    ON CONFLICT (id) DO UPDATE SET report = excluded.report,
                        picture = excluded.picture";
        let kept = sqlx::query(kept).bind(id).bind(report).bind(picture);
        self.database.run(kept).await.map(drop)
    }

    /// Adds an evaluation to a job's report.
    pub async fn evaluation(&self, id: &str, evaluation: &str) -> Result<()> {
        let added = "UPDATE reports SET evaluation = ?2 WHERE id = ?1";
        let added = sqlx::query(added).bind(id).bind(evaluation);
        self.database.run(added).await.map(drop)
    }

    /// The job is over; what it was to be evaluated on is dropped.
    pub async fn end(&self, job: &Job) -> Result<()> {
        let ended = sqlx::query(
            "UPDATE jobs SET state = ?2, ended = ?3, outcome = ?4, failure = ?5, gate = ?6,
                 sets = NULL
             WHERE id = ?1 AND state IN ('queued', 'running', 'paused')",
        )
        .bind(&job.id)
        .bind(job.state.name())
        .bind(job.ended.map(|t| t as i64))
        .bind(job.outcome.as_ref().map(json).transpose()?)
        .bind(job.failure.as_ref().map(json).transpose()?)
        .bind(job.gate.as_ref().map(json).transpose()?);
        self.database.run(ended).await.map(drop)
    }

    /// What a job is evaluated on.
    pub async fn sets(&self, id: &str) -> Result<Vec<EvaluationSet>> {
        let query = sqlx::query("SELECT sets FROM jobs WHERE id = ?").bind(id);
        let sets = self.database.row(query).await?.map(|row| row.try_get("sets"));
        let sets: Option<String> = sets.transpose()?.flatten();
        sets.map_or(Ok(Vec::new()), |sets| parsed(&sets, "sets"))
    }

    /// `None` while there is none.
    pub async fn report_of(&self, id: &str) -> Result<Option<StoredReport>> {
        let row = sqlx::query("SELECT * FROM reports WHERE id = ?").bind(id);
        let row = self.database.row(row).await?;
        row.map(|row| {
            Ok(StoredReport {
                report: row.try_get("report")?,
                picture: row.try_get("picture")?,
                evaluation: row.try_get("evaluation")?,
            })
        })
        .transpose()
    }

    /// Forgets a job and its report.
    pub async fn remove(&self, id: &str) -> Result<()> {
        let mut t = self.database.begin().await?;
        for statement in [
            "DELETE FROM reports WHERE id = ?",
            "DELETE FROM events WHERE job = ?",
            "DELETE FROM jobs WHERE id = ?",
        ] {
            t.run(sqlx::query(statement).bind(id)).await?;
        }
        t.commit().await
    }
}

/// See [`Journal::tell`].
async fn tell(t: &mut Transaction, id: &str, now: u64, events: &[Event]) -> Result<()> {
    let measured = events.iter().filter(|event| event.metrics.is_some());
    if let Some(step) = measured.filter_map(|event| event.step).min() {
        let again = sqlx::query("DELETE FROM events WHERE job = ? AND step >= ?");
        t.run(again.bind(id).bind(step as i64)).await?;
    }
    for event in events {
        let added = sqlx::query(
            "INSERT INTO events (job, at, level, message, metrics, step)
             VALUES (?, ?, ?, ?, ?, ?)",
        )
        .bind(id)
        .bind(now as i64)
        .bind(event.level.name())
        .bind(&event.message)
        .bind(event.metrics.as_ref().map(json).transpose()?)
        .bind(event.step.map(|step| step as i64));
        t.run(added).await?;
    }
    Ok(())
}

fn event(row: &SqliteRow) -> Result<StoredEvent> {
    let number = |column: &str| row.try_get::<i64, _>(column).map(|n| n.max(0) as u64);
    let level: String = row.try_get("level")?;
    let known = Level::ALL.into_iter().find(|l| l.name() == level);
    let metrics: Option<String> = row.try_get("metrics")?;
    let step: Option<i64> = row.try_get("step")?;
    Ok(StoredEvent {
        number: number("number")?,
        at: number("at")?,
        event: Event {
            level: known.ok_or_else(|| Error::fault(format!("polylora.db: a level is {level}")))?,
            message: row.try_get("message")?,
            metrics: metrics.map(|m| parsed(&m, "metrics")).transpose()?,
            step: step.map(|n| n.max(0) as u64),
        },
    })
}

fn read(row: &SqliteRow) -> Result<(u64, Job)> {
    let text = |column: &str| row.try_get::<Option<String>, _>(column);
    let needed = |column: &str| row.try_get::<String, _>(column);
    let time = |column: &str| {
        let n: Option<i64> = row.try_get(column)?;
        Ok::<_, Error>(n.map(|n| n.max(0) as u64))
    };
    let state = needed("state")?;
    let known = State::ALL.into_iter().find(|s| s.name() == state);
    let job = Job {
        id: needed("id")?,
        owner: Owner { key: needed("key")?, tenant: text("tenant")? },
        work: Arc::new(Work::parse(&needed("spec")?).map_err(|e| bad("spec", &e))?),
        state: known.ok_or_else(|| Error::fault(format!("polylora.db: a job is {state}")))?,
        progress: None,
        restarts: time("restarts")?.unwrap_or(0),
        created: time("created")?.unwrap_or(0),
        started: time("started")?,
        ended: time("ended")?,
        outcome: text("outcome")?.map(|o| parsed::<Outcome>(&o, "outcome")).transpose()?,
        failure: text("failure")?.map(|f| parsed::<Failure>(&f, "failure")).transpose()?,
        gate: text("gate")?.map(|g| parsed::<Verdict>(&g, "gate")).transpose()?,
    };
    Ok((time("number")?.unwrap_or(0), job))
}

fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::fault(format!("cannot write polylora.db: {e}")))
}

fn parsed<T: DeserializeOwned>(text: &str, column: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|e| bad(column, &e))
}

fn bad(column: &str, e: &serde_json::Error) -> Error {
    Error::fault(format!("polylora.db: a bad {column}: {e}"))
}
