//! Ways to open an SQLite file: to write, and to read what is there when nothing can be written.
//!
//! Owns the options of a connection. Never knows a table. The thing to know: a file with a log
//! (`-wal`) needs an index beside it; where that cannot be made, there are three ways around it,
//! and none leaves out what was committed.

use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteLockingMode, SqliteSynchronous,
};
use sqlx::{ConnectOptions as _, Connection as _};
use std::path::Path;

/// Page cache of one file, as SQLite says -KiB. Little is read again, and what is lies in the
/// system's own cache.
const CACHE: &str = "-256";

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new().filename(path).pragma("cache_size", CACHE)
}

/// To write, every commit synced; makes the file if need be.
pub async fn writable(path: &Path) -> sqlx::Result<SqliteConnection> {
    let options = options(path).create_if_missing(true);
    options
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .connect()
        .await
}

/// To write a mark into a file that has no log, and is made if need be.
pub async fn plain(path: &Path) -> sqlx::Result<SqliteConnection> {
    options(path).create_if_missing(true).connect().await
}

/// To read what was committed, on a disk that may take nothing; and whether it had to be by one of
/// the ways around.
pub async fn readable(path: &Path) -> sqlx::Result<(SqliteConnection, bool)> {
    let first = match opened(options(path)).await {
        Ok(connection) => return Ok((connection, false)),
        Err(error) => error,
    };
    // A read-only disk that has log and index.
    if let Ok(connection) = opened(options(path).read_only(true)).await {
        return Ok((connection, true));
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let log = path.with_file_name(format!("{name}-wal"));
    if std::fs::metadata(log).map_or(0, |m| m.len()) == 0 {
        // All that was committed is in the file itself.
        if let Ok(connection) = opened(options(path).read_only(true).immutable(true)).await {
            return Ok((connection, true));
        }
    }
    // A full disk that has a log and no room for its index: kept in memory, by the only reader.
    let alone = options(path).locking_mode(SqliteLockingMode::Exclusive);
    opened(alone).await.map_or(Err(first), |connection| Ok((connection, true)))
}

/// An empty one, which is nowhere.
pub async fn in_memory() -> sqlx::Result<SqliteConnection> {
    SqliteConnectOptions::new().in_memory(true).connect().await
}

/// Opened in earnest: a first look at the file is where it fails.
async fn opened(options: SqliteConnectOptions) -> sqlx::Result<SqliteConnection> {
    let mut connection = options.connect().await?;
    match sqlx::query("SELECT count(*) FROM sqlite_schema").fetch_one(&mut connection).await {
        Ok(_) => Ok(connection),
        Err(error) => {
            // Gone before the next way is tried.
            let _ = connection.close().await;
            Err(error)
        }
    }
}
