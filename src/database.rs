//! The data directory's lock, and its SQLite files: how one is opened and brought to this program's
//! format.
//!
//! Owns the lock, journal, sync and migration. Never knows a table: who opens a file brings its
//! migrations. The thing to know: migration n turns format n into n + 1 in one transaction, and a
//! file that is newer than the program is refused untouched.

use crate::error::{Error, Kind, Result};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use std::fs::{self, File, TryLockError};
use std::path::Path;

/// Page cache of one file, as SQLite says -KiB. Little is read again, and what is lies in the
/// system's own cache.
const CACHE: &str = "-256";

/// Takes the data directory for this process, making it if need be. The lock goes with the file.
/// Errors: `data_dir_locked`.
pub fn lock(dir: &Path) -> Result<File> {
    let failed = |e: std::io::Error| Error::fault(format!("data directory {}: {e}", dir.display()));
    fs::create_dir_all(dir).map_err(failed)?;
    let lock = File::create(dir.join("lock")).map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::Error(e)) => Err(failed(e)),
        Err(TryLockError::WouldBlock) => Err(Error::new(
            Kind::Conflict,
            "data_dir_locked",
            format!("data directory {} is in use by another server", dir.display()),
        )),
    }
}

/// Opens or creates a file, every commit synced, and applies the migrations that it lacks. A
/// migration is one or more statements; the list only ever grows. One connection: writes are short,
/// and what is read often is kept in memory. Errors: `data_dir_unsupported` (a newer format).
pub async fn open(path: &Path, migrations: &[&'static str]) -> Result<SqlitePool> {
    let failed = |e: sqlx::Error| Error::fault(format!("{}: {e}", path.display()));
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .pragma("cache_size", CACHE);
    let pool =
        SqlitePoolOptions::new().max_connections(1).connect_with(options).await.map_err(failed)?;
    let found: i64 =
        sqlx::query_scalar("PRAGMA user_version").fetch_one(&pool).await.map_err(failed)?;
    let known = migrations.len() as i64;
    if found > known {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        return Err(Error::new(
            Kind::Conflict,
            "data_dir_unsupported",
            format!("{file} has format {found}; this program knows {known}"),
        ));
    }
    for (format, migration) in (1..).zip(migrations).skip(found.max(0) as usize) {
        let mut t = pool.begin().await.map_err(failed)?;
        sqlx::raw_sql(*migration).execute(&mut *t).await.map_err(failed)?;
        // PRAGMA takes no bound values; the number is ours.
        let mark = sqlx::AssertSqlSafe(format!("PRAGMA user_version = {format}"));
        sqlx::raw_sql(mark).execute(&mut *t).await.map_err(failed)?;
        t.commit().await.map_err(failed)?;
    }
    Ok(pool)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "CREATE TABLE a (x INTEGER) STRICT; INSERT INTO a VALUES (1);";
    const TWO: &str = "ALTER TABLE a ADD COLUMN y INTEGER; UPDATE a SET y = x + 1;";

    #[tokio::test]
    async fn a_file_gets_the_migrations_it_lacks_once_and_a_newer_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.db");
        open(&path, &[ONE]).await.unwrap().close().await;
        for _ in 0..2 {
            let pool = open(&path, &[ONE, TWO]).await.unwrap();
            let rows: Vec<(i64, i64)> =
                sqlx::query_as("SELECT x, y FROM a").fetch_all(&pool).await.unwrap();
            assert_eq!(rows, [(1, 2)]);
            pool.close().await;
        }
        let refused = open(&path, &[ONE]).await.expect_err("refused");
        assert_eq!(refused.code, "data_dir_unsupported");
        assert!(refused.message.contains("t.db has format 2"), "{}", refused.message);
    }

    #[tokio::test]
    async fn a_migration_that_fails_leaves_the_file_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.db");
        open(&path, &[ONE]).await.unwrap().close().await;
        let half = "INSERT INTO a VALUES (2); INSERT INTO missing VALUES (1);";
        assert!(open(&path, &[ONE, half]).await.is_err());
        let pool = open(&path, &[ONE]).await.unwrap();
        let rows: i64 =
            sqlx::query_scalar("SELECT count(*) FROM a").fetch_one(&pool).await.unwrap();
        assert_eq!(rows, 1);
    }
}
