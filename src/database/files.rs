//! One SQLite file: its connections, and how it is brought to this program's format.
//!
//! Owns the opening, probing and closing of both connections. Never begins a change. The thing to
//! know: all migrations that a file lacks, and what other files held, come in one transaction.

use super::connect;
use super::directory::{DataDir, full, wrong};
use super::moved::{Held, Moved, copies};
use crate::error::{Error, Kind, Result};
use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, Connection as _};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::Mutex as AsyncMutex;

/// The file and its two connections. One writes; the other reads, and is always open: the index of
/// the log lives as long as a connection does, so opening the first anew reads back no commit that
/// failed.
pub struct Files {
    pub name: String,
    pub path: PathBuf,
    pub migrations: Vec<&'static str>,
    /// Files that it has taken in.
    pub moved: &'static [Moved],
    pub directory: DataDir,
    pub writer: Arc<AsyncMutex<Option<SqliteConnection>>>,
    pub reader: AsyncMutex<Option<Reader>>,
}

/// A connection that reads. One that was opened in need may keep a writer out, or see no later
/// commit: a writer replaces it.
pub struct Reader {
    pub connection: SqliteConnection,
    pub in_need: bool,
}

impl Files {
    /// A connection that has just written and synced something: the format, over itself.
    pub async fn connect_writer(&self) -> Result<SqliteConnection> {
        let mut connection = connect::writable(&self.path).await.map_err(|e| self.failed(&e))?;
        let found = self.format(&mut connection).await?;
        if found < self.migrations.len() {
            self.bring_up(&mut connection, found).await?;
        } else {
            self.write(&mut connection, "", found).await?;
        }
        Ok(connection)
    }

    async fn write(&self, to: &mut SqliteConnection, what: &str, format: usize) -> Result<()> {
        // PRAGMA takes no bound values; the number is ours, and migrations are the program's.
        let all = format!("BEGIN IMMEDIATE; {what} ; PRAGMA user_version = {format}; COMMIT;");
        let done = sqlx::raw_sql(AssertSqlSafe(all)).execute(to).await;
        done.map(drop).map_err(|e| self.failed(&e))
    }

    /// How many migrations the file has had. Errors: `data_dir_unsupported`.
    async fn format(&self, of: &mut SqliteConnection) -> Result<usize> {
        let found = sqlx::query_scalar("PRAGMA user_version").fetch_one(of).await;
        let found: i64 = found.map_err(|e| self.failed(&e))?;
        let known = self.migrations.len();
        let found = usize::try_from(found).unwrap_or(0);
        if found <= known {
            return Ok(found);
        }
        let message = format!("{} has format {found}; this program knows {known}", self.name);
        Err(Error::new(Kind::Conflict, "data_dir_unsupported", message))
    }

    pub async fn connect_reader(&self) -> Result<Reader> {
        let wrong = |e: sqlx::Error| wrong(&self.name, &e);
        let mut found = 0;
        if self.path.exists() {
            let (mut connection, around) = connect::readable(&self.path).await.map_err(wrong)?;
            // SQLite opens for reading only what it cannot open for writing, and says nothing.
            let in_need = around || self.directory.check().is_err();
            found = self.format(&mut connection).await?;
            if found == self.migrations.len() {
                return Ok(Reader { connection, in_need });
            }
        }
        if found > 0 || !self.waiting(found).await?.is_empty() {
            let (name, known) = (&self.name, self.migrations.len());
            return Err(full(format!(
                "{name} has format {found} and cannot be brought to {known}: nothing is written"
            )));
        }
        // Never made, and cannot be now.
        let mut connection = connect::in_memory().await.map_err(wrong)?;
        for migration in &self.migrations {
            sqlx::raw_sql(*migration).execute(&mut connection).await.map_err(wrong)?;
        }
        Ok(Reader { connection, in_need: true })
    }

    /// Whether a commit gets to the disk. A reader that was opened in need is opened anew.
    pub async fn probe(&self) -> Result<()> {
        let mut slot = self.writer.lock().await;
        let mut reader = self.reader.lock().await;
        if reader.as_ref().is_some_and(|r| r.in_need)
            && let Some(reader) = reader.take()
        {
            // It only read.
            let _ = reader.connection.close().await;
        }
        let mut connection = match slot.take() {
            Some(connection) => connection,
            None => self.connect_writer().await?,
        };
        self.write(&mut connection, "", self.migrations.len()).await?;
        *slot = Some(connection);
        if reader.is_none() {
            *reader = Some(self.connect_reader().await?);
        }
        Ok(())
    }

    /// Closes both connections, so that the log is folded into the file. Later calls open new ones.
    pub async fn close(&self) {
        let writer = self.writer.lock().await.take();
        let reader = self.reader.lock().await.take().map(|reader| reader.connection);
        for connection in writer.into_iter().chain(reader) {
            // What it cannot fold stays in the log, for the next start.
            let _ = connection.close().await;
        }
    }

    /// What a failed write means.
    pub fn failed(&self, error: &sqlx::Error) -> Error {
        self.directory.sql_failed(&self.name, error)
    }

    /// From format `found` to the last, with what other files held, in one transaction: a kill
    /// leaves the one state or the other.
    async fn bring_up(&self, connection: &mut SqliteConnection, found: usize) -> Result<()> {
        let (mut moves, mut names) = (BTreeMap::new(), Vec::new());
        for (moved, format) in self.waiting(found).await? {
            let name = format!("moved{}", names.len());
            let attached = moved.attach(&name, self.directory.dir(), connection).await;
            attached.map_err(|e| self.failed(&e))?;
            let copy = copies(&name, connection).await.map_err(|e| self.failed(&e))?;
            moves.insert(moved.after + format, copy);
            names.push(name);
        }
        let mut all = String::new();
        for (format, migration) in (1..).zip(&self.migrations).skip(found) {
            let copy = moves.get(&format).map_or("", String::as_str);
            all += &format!("{migration};{copy}");
        }
        self.write(connection, &all, self.migrations.len()).await?;
        for name in names {
            let detach = sqlx::query("DETACH DATABASE ?").bind(name).execute(&mut *connection);
            detach.await.map_err(|e| self.failed(&e))?;
        }
        Ok(())
    }

    /// Files whose tables this one lacks at format `found`, with their own formats. Errors:
    /// `data_dir_unsupported` (a newer one, or this one is a copy from before it took them in).
    async fn waiting(&self, found: usize) -> Result<Vec<(&'static Moved, usize)>> {
        let mut waiting = Vec::new();
        for moved in self.moved.iter().filter(|moved| found <= moved.after) {
            match moved.held(self.directory.dir()).await? {
                Held::Nothing => {}
                Held::Tables(format) => waiting.push((moved, format)),
                Held::Guard if found == 0 => {
                    tracing::warn!("{} is new, and the one before held keys and jobs", self.name);
                }
                Held::Guard => {
                    let message = format!(
                        "{} has format {found}, and the {} that belongs to it is not there",
                        self.name, moved.file
                    );
                    return Err(Error::new(Kind::Conflict, "data_dir_unsupported", message));
                }
            }
        }
        Ok(waiting)
    }
}
