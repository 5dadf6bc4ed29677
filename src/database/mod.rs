//! The data directory and its SQLite files: how one is opened, read and changed.
//!
//! Owns every connection, and begins and ends every transaction. Never reads or changes a row of
//! its own. The thing to know: after any error the connection is closed and the next change opens a
//! new one, so what a failed commit left behind can never swallow a later one.

mod catalogue;
mod connect;
mod directory;
mod files;
mod lock;
mod moved;
pub mod orphans;
mod storage;

use crate::error::{Error, Result};
use directory::wrong;
pub use directory::{DataDir, FULL, write_failed};
use files::Files;
pub use lock::lock;
use moved::Moved;
use sqlx::Connection as _;
use sqlx::query::Query;
use sqlx::sqlite::{Sqlite, SqliteArguments, SqliteConnection, SqliteRow};
use std::sync::Arc;
pub use storage::Storage;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// One SQLite file. Cheap to clone.
#[derive(Clone)]
pub struct Database {
    files: Arc<Files>,
}

type Statement<'q> = Query<'q, Sqlite, SqliteArguments>;

impl Database {
    /// Opens or creates `name` in the directory of `storage`, every commit synced, and applies the
    /// migrations that it lacks, all in one transaction. A migration is one or more statements; the
    /// list only ever grows: migration n turns format n into n + 1. On a disk that takes no writes,
    /// what is there can be read, and what is not is empty. Errors: `data_dir_unsupported` (a newer
    /// format), `storage_full` (an older format that cannot be brought up).
    pub async fn open(storage: &Storage, name: &str, migrations: &[&'static str]) -> Result<Self> {
        Self::open_moving(storage, name, migrations, &[]).await
    }

    /// Opens `polylora.db`, or shares it with whoever has opened it in this storage: one file, one
    /// connection that writes. Whoever brings an older directory up holds its lock. Errors: those
    /// of `open`.
    pub async fn catalogue(storage: &Storage) -> Result<Self> {
        let _opening = storage.opening().await;
        let (name, migrations) = (catalogue::NAME, catalogue::MIGRATIONS);
        match storage.opened(name) {
            Some(files) => Ok(Self { files }),
            None => Self::open_moving(storage, name, migrations, catalogue::MOVED).await,
        }
    }

    async fn open_moving(
        storage: &Storage,
        name: &str,
        migrations: &[&'static str],
        moved: &'static [Moved],
    ) -> Result<Self> {
        let files = Arc::new(Files {
            name: name.to_owned(),
            path: storage.dir().join(name),
            migrations: migrations.to_vec(),
            moved,
            directory: DataDir::clone(storage),
            writer: Arc::default(),
            reader: AsyncMutex::default(),
        });
        match files.connect_writer().await {
            Ok(connection) => {
                *files.writer.lock().await = Some(connection);
                if let Err(error) = moved::put_aside(storage, moved).await {
                    // What they held is in this file: they are only in the way.
                    tracing::warn!(%error, "the next start tries again");
                }
            }
            Err(e) if e.code == FULL => {}
            Err(e) => return Err(e),
        }
        *files.reader.lock().await = Some(files.connect_reader().await?);
        storage.add(&files);
        Ok(Self { files })
    }

    /// The data directory that it lies in.
    pub fn storage(&self) -> &DataDir {
        &self.files.directory
    }

    /// Begins a change; nothing of it lasts before `commit`. Errors: `storage_full`.
    pub async fn begin(&self) -> Result<Transaction> {
        self.files.directory.check()?;
        Transaction::begin(&self.files).await
    }

    /// A change that is one statement; returns the rows that it changed. Errors: `storage_full`.
    pub async fn run(&self, statement: Statement<'_>) -> Result<u64> {
        let mut t = self.begin().await?;
        let changed = t.run(statement).await?;
        t.commit().await?;
        Ok(changed)
    }

    /// Reads what is committed.
    pub async fn rows(&self, query: Statement<'_>) -> Result<Vec<SqliteRow>> {
        let mut slot = self.files.reader.lock().await;
        let mut reader = match slot.take() {
            Some(reader) => reader,
            None => self.files.connect_reader().await?,
        };
        let rows = query.fetch_all(&mut reader.connection).await;
        let rows = rows.map_err(|e| wrong(&self.files.name, &e))?;
        *slot = Some(reader);
        Ok(rows)
    }

    /// The first row, if there is one.
    pub async fn row(&self, query: Statement<'_>) -> Result<Option<SqliteRow>> {
        Ok(self.rows(query).await?.into_iter().next())
    }
}

/// A change under way. It begins and ends by statements of its own: `BEGIN` fails inside another
/// transaction and `COMMIT` outside of one, so one that succeeds is SQLite's word for a commit.
/// Dropped before that, or after an error, its connection goes with it and nothing is changed.
pub struct Transaction {
    connection: Option<SqliteConnection>,
    slot: OwnedMutexGuard<Option<SqliteConnection>>,
    files: Arc<Files>,
}

impl Transaction {
    async fn begin(files: &Arc<Files>) -> Result<Self> {
        let mut slot = files.writer.clone().lock_owned().await;
        let mut connection = match slot.take() {
            Some(connection) => connection,
            None => files.connect_writer().await?,
        };
        let begun = sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut connection).await;
        let mut t = Self { connection: Some(connection), slot, files: files.clone() };
        match begun {
            Ok(_) => Ok(t),
            Err(error) => Err(t.fail(&error).await),
        }
    }

    /// Returns the rows that it changed.
    pub async fn run(&mut self, statement: Statement<'_>) -> Result<u64> {
        let done = statement.execute(self.open()?).await;
        match done {
            Ok(done) => Ok(done.rows_affected()),
            Err(error) => Err(self.fail(&error).await),
        }
    }

    /// What a statement returns, as the change leaves it.
    pub async fn rows(&mut self, statement: Statement<'_>) -> Result<Vec<SqliteRow>> {
        let rows = statement.fetch_all(self.open()?).await;
        match rows {
            Ok(rows) => Ok(rows),
            Err(error) => Err(self.fail(&error).await),
        }
    }

    /// Makes it last: it is on disk when this returns, or was not done.
    pub async fn commit(mut self) -> Result<()> {
        let done = sqlx::raw_sql("COMMIT").execute(self.open()?).await;
        if let Err(error) = done {
            return Err(self.fail(&error).await);
        }
        *self.slot = self.connection.take();
        Ok(())
    }

    fn open(&mut self) -> Result<&mut SqliteConnection> {
        let name = &self.files.name;
        let over = || Error::fault(format!("{name}: a change went on after it failed"));
        self.connection.as_mut().ok_or_else(over)
    }

    /// Closes the connection. A commit that could not be synced may stand in the log, whole: the
    /// new connection writes over it at once, so that a kill cannot bring it back.
    async fn fail(&mut self, error: &sqlx::Error) -> Error {
        if let Some(connection) = self.connection.take() {
            // A reader keeps the log's index: without one, the next connection would read back what
            // was not synced.
            let mut reader = self.files.reader.lock().await;
            if reader.is_none() {
                *reader = self.files.connect_reader().await.ok();
            }
            drop(reader);
            // Whatever it says, it is closed.
            let _ = connection.close().await;
        }
        let failure = self.files.failed(error);
        if failure.code == FULL {
            *self.slot = self.files.connect_writer().await.ok();
        }
        failure
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sqlx::Row as _;
    use std::fs;
    use std::path::Path;

    const ONE: &str = "CREATE TABLE a (x INTEGER) STRICT; INSERT INTO a VALUES (1);";
    const TWO: &str = "ALTER TABLE a ADD COLUMN y INTEGER; UPDATE a SET y = x + 1;";

    async fn open(dir: &Path, migrations: &[&'static str]) -> Result<Database> {
        Database::open(&Storage::of(dir), "t.db", migrations).await
    }

    async fn count(database: &Database) -> i64 {
        let row = database.row(sqlx::query("SELECT count(*) AS n FROM a")).await;
        row.unwrap().unwrap().get("n")
    }

    #[tokio::test]
    async fn a_file_gets_the_migrations_it_lacks_once_and_a_newer_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), &[ONE]).await.unwrap());
        for _ in 0..2 {
            let database = open(dir.path(), &[ONE, TWO]).await.unwrap();
            let rows = database.rows(sqlx::query("SELECT x, y FROM a")).await.unwrap();
            let rows: Vec<(i64, i64)> = rows.iter().map(|r| (r.get("x"), r.get("y"))).collect();
            assert_eq!(rows, [(1, 2)]);
        }
        let refused = open(dir.path(), &[ONE]).await.map(drop).expect_err("refused");
        assert_eq!(refused.code, "data_dir_unsupported");
        assert!(refused.message.contains("t.db has format 2"), "{}", refused.message);
    }

    #[tokio::test]
    async fn a_migration_that_fails_leaves_the_file_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), &[ONE]).await.unwrap());
        let half = "INSERT INTO a VALUES (2); INSERT INTO missing VALUES (1);";
        assert!(open(dir.path(), &[ONE, half]).await.is_err());
        assert_eq!(count(&open(dir.path(), &[ONE]).await.unwrap()).await, 1);
    }

    #[tokio::test]
    async fn what_is_dropped_or_fails_changes_nothing_and_the_next_change_lasts() {
        let dir = tempfile::tempdir().unwrap();
        let database = open(dir.path(), &[ONE]).await.unwrap();
        let insert = || sqlx::query("INSERT INTO a VALUES (2)");
        let mut dropped = database.begin().await.unwrap();
        dropped.run(insert()).await.unwrap();
        drop(dropped);
        for _ in 0..3 {
            let mut failed = database.begin().await.unwrap();
            failed.run(insert()).await.unwrap();
            assert!(failed.run(sqlx::query("INSERT INTO missing VALUES (1)")).await.is_err());
            assert!(failed.run(insert()).await.is_err());
            assert!(failed.commit().await.is_err());
        }
        assert_eq!(count(&database).await, 1);
        // A transaction that a statement ended by itself is not reported as committed.
        let mut ended = database.begin().await.unwrap();
        ended.run(sqlx::query("ROLLBACK")).await.unwrap();
        assert!(ended.commit().await.is_err());
        assert_eq!(database.run(insert()).await.unwrap(), 1);
        drop(database);
        assert_eq!(count(&open(dir.path(), &[ONE]).await.unwrap()).await, 2);
    }

    #[tokio::test]
    async fn two_servers_are_kept_apart_by_the_file_or_by_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(dir.path()).unwrap();
        let refused = |dir: &Path| lock(dir).map(drop).expect_err("held").code;
        assert_eq!(refused(dir.path()), "data_dir_locked");
        fs::remove_file(dir.path().join("lock")).unwrap();
        assert_eq!(refused(dir.path()), "data_dir_locked");
        drop(held);
        lock(dir.path()).unwrap();
    }
}
