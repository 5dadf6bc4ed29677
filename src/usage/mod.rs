//! Usage records: who used which adapter version for how many tokens, one row a request.
//!
//! Owns `usage.db`, the queue before it and the one task that writes. Never meters: whoever answers
//! says what was used. The thing to know: a place in the queue is taken before a request is
//! computed, so a record always has room, and a row's key is the answer's own id, so that writing
//! it again changes nothing.

mod read;
mod record;
mod write;

pub use read::{Filter, Sum};
use record::{MIGRATIONS, Message};
pub use record::{Record, UsageOptions};

use crate::clock::Now;
use crate::database::{Database, Storage};
use crate::error::{Error, Kind, Result};
use crate::metrics::Metrics;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{mpsc, oneshot};

/// What a client is told to wait for when no record can be written.
const RETRY_SECONDS: u64 = 5;

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
