//! The writer: gathers records for a moment and commits them together.
//!
//! Owns commits and the removal of old records. Never loses a record it was given while the process
//! lives: a commit that fails is tried again, once the storage is writable. The thing to know:
//! records that are not committed yet are all that a crash can lose, and old ones go by a time that
//! a clock which was set does not move.

use super::record::{Message, Record, UsageOptions};
use crate::clock::{Now, Trusted};
use crate::database::{Database, FULL};
use crate::error::Result;
use crate::metrics::Metrics;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// Records of one commit, at most.
const BATCH_MAX: usize = 1000;
/// Between two looks for old records, and how many go at once.
const PRUNE_EVERY: Duration = Duration::from_secs(60);
const PRUNED_MAX: u64 = 10_000;
/// After a commit that failed, doubled each time up to the second.
const RETRY_AFTER: Duration = Duration::from_millis(100);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(5);

const DAY_MS: u64 = 86_400_000;

const INSERT: &str = "
    INSERT INTO usage (id, request_id, ended_ms, tenant, key_id, adapter, version, digest,
                       prompt_tokens, cached_tokens, completion_tokens, finish_reason, route,
                       status)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (id) DO NOTHING";

pub struct Writer {
    database: Database,
    options: UsageOptions,
    metrics: Arc<Metrics>,
    pending: Arc<AtomicU64>,
    time: Trusted,
    records: Vec<Record>,
    waiting: Vec<oneshot::Sender<bool>>,
    pruned: Option<Instant>,
}

impl Writer {
    /// On what is there: the newest record's time, looked at now.
    pub fn new(
        (database, newest, now): (Database, Option<Duration>, Now),
        options: UsageOptions,
        metrics: Arc<Metrics>,
        pending: Arc<AtomicU64>,
    ) -> Self {
        let (records, waiting) = (Vec::new(), Vec::new());
        let time = Trusted::new(newest, now);
        Self { database, options, metrics, pending, time, records, waiting, pruned: None }
    }

    /// Until every sender is gone.
    pub async fn run(mut self, mut messages: mpsc::Receiver<Message>) {
        while let Some(first) = messages.recv().await {
            if !self.take(first) {
                self.gather(&mut messages).await;
            }
            self.commit().await;
            self.prune(Now::read()).await;
        }
    }

    /// True: somebody waits for the commit now.
    fn take(&mut self, message: Message) -> bool {
        match message {
            Message::Record(record, committed) => {
                self.records.push(*record);
                self.waiting.push(committed);
                false
            }
            Message::Flush(done) => {
                self.waiting.push(done);
                true
            }
        }
    }

    /// Takes what comes within the commit time, or until a flush.
    async fn gather(&mut self, messages: &mut mpsc::Receiver<Message>) {
        let end = tokio::time::Instant::now() + self.options.commit_time;
        while self.records.len() < BATCH_MAX {
            match tokio::time::timeout_at(end, messages.recv()).await {
                Ok(Some(message)) => {
                    if self.take(message) {
                        return;
                    }
                }
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// Commits the batch, however long it takes.
    async fn commit(&mut self) {
        let mut pause = RETRY_AFTER;
        while let Err(error) = self.try_commit().await {
            self.metrics.usage_commit_failures.inc();
            tracing::error!(%error, records = self.records.len(), "usage records not committed");
            if error.code == FULL {
                // Nobody waits for room: the records do.
                self.tell(false);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_AFTER_MAX);
            self.options.storage.writable().await;
        }
        self.metrics.usage_records.inc_by(self.records.len() as u64);
        self.pending.fetch_sub(self.records.len() as u64, Ordering::Relaxed);
        self.records.clear();
        self.tell(true);
    }

    fn tell(&mut self, committed: bool) {
        for waiting in self.waiting.drain(..) {
            // Whoever does not wait any more has its record all the same.
            let _ = waiting.send(committed);
        }
    }

    async fn try_commit(&self) -> Result<()> {
        if self.records.is_empty() {
            return Ok(());
        }
        let mut t = self.database.begin().await?;
        for r in &self.records {
            let insert = sqlx::query(INSERT)
                .bind(&r.id)
                .bind(&r.request_id)
                .bind(r.ended_ms as i64)
                .bind(&r.tenant)
                .bind(&r.key_id)
                .bind(&r.adapter)
                .bind(r.version as i64)
                .bind(&r.digest)
                .bind(r.prompt_tokens as i64)
                .bind(r.cached_tokens as i64)
                .bind(r.completion_tokens as i64)
                .bind(r.finish_reason.name())
                .bind(&r.route)
                .bind(i64::from(r.status));
            t.run(insert).await?;
        }
        t.commit().await
    }

    /// Removes what is too old or too much, a bounded number at a time.
    async fn prune(&mut self, now: Now) {
        if self.pruned.is_some_and(|at| at.elapsed() < PRUNE_EVERY) {
            return;
        }
        let now = self.time.look(now).as_millis() as u64;
        let oldest = now.saturating_sub(self.options.days_max.saturating_mul(DAY_MS));
        let surplus = sqlx::query(
            "DELETE FROM usage WHERE sequence IN (
                SELECT sequence FROM usage
                WHERE sequence <= (SELECT max(sequence) FROM usage) - ?1 OR ended_ms < ?2
                ORDER BY sequence LIMIT ?3)",
        )
        .bind(self.options.records_max as i64)
        .bind(oldest as i64)
        .bind(PRUNED_MAX as i64);
        let removed = self.database.run(surplus).await;
        match removed {
            // A full bite leaves more to do: the next commit goes on.
            Ok(PRUNED_MAX) => {}
            Ok(_) => self.pruned = Some(Instant::now()),
            Err(error) => {
                tracing::warn!(%error, "old usage records not removed");
                self.pruned = Some(Instant::now());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::read;
    use super::super::record::MIGRATIONS;
    use super::*;
    use crate::database::Storage;
    use crate::ending::EndReason;

    const DAY: u64 = 86_400;
    /// A day in 2026, in seconds.
    const START: u64 = 20_500 * DAY;

    fn at(wall: u64, monotonic: u64) -> Now {
        Now { wall: Duration::from_secs(wall), monotonic: Duration::from_secs(monotonic) }
    }

    fn record(id: &str, ended: u64) -> Record {
        let text = String::new;
        Record {
            id: id.to_owned(),
            request_id: text(),
            ended_ms: ended * 1000,
            tenant: text(),
            key_id: text(),
            adapter: "base".to_owned(),
            version: 0,
            digest: text(),
            prompt_tokens: 1,
            cached_tokens: 0,
            completion_tokens: 1,
            finish_reason: EndReason::Failed,
            route: text(),
            status: 200,
        }
    }

    /// The commit time is for those who come; at the end nothing waits for it.
    #[tokio::test]
    async fn what_is_gathered_when_the_last_sender_goes_is_committed() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Storage::of(dir.path());
        let mut writer = writer(&storage, at(START, 0)).await;
        writer.options.commit_time = Duration::from_secs(u64::from(u32::MAX));
        let database = writer.database.clone();
        let (records, messages) = mpsc::channel(2);
        let (told, committed) = oneshot::channel();
        let message = Message::Record(Box::new(record("last", START)), told);
        assert!(records.send(message).await.is_ok());
        let running = tokio::spawn(writer.run(messages));
        tokio::task::yield_now().await;
        drop(records);
        running.await.unwrap();
        assert_eq!(committed.await, Ok(true));
        let all = read::records(&database, &read::Filter::default(), 0, 10).await.unwrap();
        assert_eq!(all.len(), 1);
    }

    /// A writer that keeps 90 days, begun at `now` on what is in `storage`.
    async fn writer(storage: &Storage, now: Now) -> Writer {
        let database = Database::open(storage, "usage.db", MIGRATIONS).await.unwrap();
        let newest = read::newest(&database).await.unwrap();
        let options = UsageOptions {
            storage: storage.clone(),
            queue_max: 1,
            commit_time: Duration::ZERO,
            days_max: 90,
            records_max: 1000,
        };
        Writer::new((database, newest, now), options, Arc::default(), Arc::default())
    }

    async fn left(writer: &mut Writer, now: Now) -> usize {
        writer.pruned = None;
        writer.prune(now).await;
        let all = read::Filter::default();
        read::records(&writer.database, &all, 0, 1000).await.unwrap().len()
    }

    #[tokio::test]
    async fn records_go_by_age_and_not_by_a_clock_that_was_set() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Storage::of(dir.path());
        let mut first = writer(&storage, at(START, 0)).await;
        first.records = vec![record("old", START - 80 * DAY), record("new", START)];
        first.try_commit().await.unwrap();
        assert_eq!(left(&mut first, at(START, 0)).await, 2);
        // 200 days ahead, for an hour.
        for minute in 1..60 {
            let now = at(START + 200 * DAY + 60 * minute, 60 * minute);
            assert_eq!(left(&mut first, now).await, 2, "minute {minute}");
        }
        // Back, and eleven days go by.
        assert_eq!(left(&mut first, at(START + 3600, 3600)).await, 2);
        assert_eq!(left(&mut first, at(START + 11 * DAY, 11 * DAY)).await, 1);
        drop(first);
        // A start with a clock that is ahead goes by the newest record.
        let mut second = writer(&storage, at(START + 300 * DAY, 0)).await;
        assert_eq!(left(&mut second, at(START + 300 * DAY + 60, 60)).await, 1);
    }
}
