//! Usage records: who used which adapter version for how many tokens, one row a request.
//!
//! Owns `usage.db`, the queue before it and the one task that writes. Never meters: whoever answers
//! says what was used. The thing to know: a place in the queue is taken before a request is
//! computed, so a record always has room, and a row's key is the answer's own id, so that writing
//! it again changes nothing.

mod read;
mod write;

pub use read::{Filter, Sum};

use crate::clock::Now;
use crate::database::{Database, Storage};
use crate::error::{Error, Kind, Result};
use crate::metrics::Metrics;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

const MIGRATIONS: &[&str] = &["
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

/// What a client is told to wait for when no record can be written.
const RETRY_SECONDS: u64 = 5;

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
    /// stop, length, cancelled or failed
    pub finish_reason: String,
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
enum Message {
    Record(Box<Record>, oneshot::Sender<bool>),
    /// Answered once everything sent before is committed, or cannot be for now.
    Flush(oneshot::Sender<bool>),
}

/// The log. Cheap to clone; the writer ends when the last clone and the last place are gone.
#[derive(Clone)]
pub struct UsageLog {
    queue: mpsc::Sender<Message>,
    database: Database,
    storage: Storage,
    /// Records handed over that no commit has.
    pending: Arc<AtomicU64>,
}

/// A request's place in the queue.
pub struct LogPermit {
    permit: mpsc::OwnedPermit<Message>,
    pending: Arc<AtomicU64>,
}

impl LogPermit {
    /// Hands the record over; never waits. The receipt resolves when it is committed.
    pub fn write(self, record: Record) -> Receipt {
        let (committed, receipt) = oneshot::channel();
        self.pending.fetch_add(1, Ordering::Relaxed);
        self.permit.send(Message::Record(Box::new(record), committed));
        Receipt(receipt)
    }
}

/// A commit that is to come.
pub struct Receipt(oneshot::Receiver<bool>);

impl Receipt {
    /// Waits until the record is on disk. Errors: `usage_backlogged` when the disk does not take it
    /// for now; it is kept, and written when there is room.
    pub async fn committed(self) -> Result<()> {
        // A writer that is gone was told to end after a last commit.
        if self.0.await.unwrap_or(true) { Ok(()) } else { Err(backlogged()) }
    }
}

fn backlogged() -> Error {
    let message = "usage records cannot be written fast enough; see the server's log";
    let error = Error::new(Kind::Unavailable, "usage_backlogged", message);
    Error { retry_after: Some(RETRY_SECONDS), ..error }
}

impl UsageLog {
    /// Opens `usage.db` and starts the writer. Errors: `data_dir_unsupported`.
    pub async fn open(options: UsageOptions, metrics: Arc<Metrics>) -> Result<Self> {
        let database = Database::open(&options.storage, "usage.db", MIGRATIONS).await?;
        let (newest, storage) = (read::newest(&database).await?, options.storage.clone());
        let (queue, messages) = mpsc::channel(options.queue_max.max(1));
        let pending = Arc::new(AtomicU64::new(0));
        let writer = write::Writer::new(
            (database.clone(), newest, Now::read()),
            options,
            metrics,
            pending.clone(),
        );
        tokio::spawn(writer.run(messages));
        Ok(Self { queue, database, storage, pending })
    }

    /// A place for one record; `sync`: it must be committed before its answer ends. Errors:
    /// `usage_backlogged` when the disk is so far behind that the queue is full, or takes nothing
    /// that an answer would have to wait for: what cannot be accounted for is not computed.
    pub fn reserve(&self, sync: bool) -> Result<LogPermit> {
        if sync && self.storage.read_only().is_some() {
            return Err(backlogged());
        }
        let permit = self.queue.clone().try_reserve_owned().map_err(|_| backlogged())?;
        Ok(LogPermit { permit, pending: self.pending.clone() })
    }

    /// Waits until every record handed over before is committed.
    pub async fn flush(&self) {
        let (done, flushed) = oneshot::channel();
        if self.queue.send(Message::Flush(done)).await.is_ok() {
            let _ = flushed.await;
        }
    }

    /// Records of requests that were answered, which no commit has yet.
    pub fn pending(&self) -> u64 {
        self.pending.load(Ordering::Relaxed)
    }

    /// Tokens by tenant and adapter, in that order; at most `limit` rows.
    pub async fn sums(&self, filter: &Filter, limit: u64) -> Result<Vec<Sum>> {
        read::sums(&self.database, filter, limit).await
    }

    /// Records in the order of their commits, after the one numbered `after`, each with its number.
    pub async fn records(
        &self,
        filter: &Filter,
        after: u64,
        limit: u64,
    ) -> Result<Vec<(u64, Record)>> {
        read::records(&self.database, filter, after, limit).await
    }
}
