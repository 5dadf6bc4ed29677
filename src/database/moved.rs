//! Files whose tables another file has taken in: found, copied in its transaction, put aside after.
//!
//! Owns the names `*.migrated` and the guard. Never removes a row. The thing to know: the copy is
//! committed before the file is touched, so a kill leaves either what was or what is to be; the
//! guard is an empty `access.db` of a format that no program has, which older programs refuse.

use super::connect;
use super::directory::{DataDir, wrong};
use crate::error::{Error, Kind, Result};
use sqlx::Connection as _;
use sqlx::sqlite::SqliteConnection;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// The file that older programs open first, and the format that the guard has.
const GUARDED: &str = "access.db";
const GUARD: i64 = 1000;

/// A file that was, and how its formats go on in the one that took it in.
pub struct Moved {
    pub file: &'static str,
    /// Format n of the file is format `after + n` of the other.
    pub after: usize,
    /// How many formats it had of its own.
    pub formats: usize,
}

/// What stands under the name of such a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    Nothing,
    Guard,
    /// Tables of this format.
    Tables(usize),
}

impl Moved {
    /// Errors: `data_dir_unsupported` (a newer format).
    pub async fn held(&self, dir: &Path) -> Result<Held> {
        let path = dir.join(self.file);
        if !path.exists() {
            return Ok(Held::Nothing);
        }
        let found = format(&path).await.map_err(|e| wrong(self.file, &e))?;
        if found == GUARD && self.file == GUARDED {
            return Ok(Held::Guard);
        }
        match usize::try_from(found) {
            Ok(n @ 1..) if n <= self.formats => Ok(Held::Tables(n)),
            Ok(1..) => {
                let (file, known) = (self.file, self.formats);
                let message = format!("{file} has format {found}; this program knows {known}");
                Err(Error::new(Kind::Conflict, "data_dir_unsupported", message))
            }
            Ok(0) | Err(_) => Ok(Held::Nothing),
        }
    }

    /// Brings the file beside the connection's own, as `name`.
    pub async fn attach(
        &self,
        name: &str,
        dir: &Path,
        to: &mut SqliteConnection,
    ) -> sqlx::Result<()> {
        let path = dir.join(self.file).to_string_lossy().into_owned();
        sqlx::query("ATTACH DATABASE ?1 AS ?2").bind(path).bind(name).execute(to).await.map(drop)
    }
}

/// Statements that copy all rows of what is attached as `name`, and the numbers that it never gives
/// out again.
pub async fn copies(name: &str, from: &mut SqliteConnection) -> sqlx::Result<String> {
    let tables =
        format!("SELECT name FROM {name}.sqlite_schema WHERE type = 'table' ORDER BY rowid");
    let tables = sqlx::query_scalar(sqlx::AssertSqlSafe(tables));
    let tables: Vec<String> = tables.fetch_all(from).await?;
    let copy = |table: &String| match table.as_str() {
        // Copied rows have entered their own numbers, those of rows that are gone are missing.
        "sqlite_sequence" => format!(
            "DELETE FROM main.sqlite_sequence WHERE name IN
                 (SELECT name FROM {name}.sqlite_sequence);
             INSERT INTO main.sqlite_sequence SELECT * FROM {name}.sqlite_sequence;"
        ),
        table => format!("INSERT INTO main.{table} SELECT * FROM {name}.{table};"),
    };
    let (last, first): (Vec<_>, Vec<_>) = tables.iter().partition(|t| *t == "sqlite_sequence");
    Ok(first.into_iter().chain(last).map(copy).collect())
}

/// Renames what was moved, and writes the guard; what a kill left undone is done now.
pub async fn put_aside(directory: &DataDir, all: &[Moved]) -> Result<()> {
    let dir = directory.dir();
    for moved in all {
        if let Held::Tables(_) = moved.held(dir).await? {
            let what = format!("cannot put {} aside", moved.file);
            rename(&dir.join(moved.file)).map_err(|e| directory.failed(&what, &e))?;
            tracing::warn!(
                "{0} is part of polylora.db now; what it was is kept as {0}.migrated",
                moved.file
            );
        }
    }
    let guarded = all.iter().any(|moved| moved.file == GUARDED);
    let path = dir.join(GUARDED);
    if !guarded || path.exists() && format(&path).await.is_ok_and(|found| found == GUARD) {
        return Ok(());
    }
    let failed = |e: sqlx::Error| directory.sql_failed(GUARDED, &e);
    let mut guard = connect::plain(&path).await.map_err(failed)?;
    let mark = format!("PRAGMA user_version = {GUARD}");
    let marked = sqlx::raw_sql(sqlx::AssertSqlSafe(mark)).execute(&mut guard).await;
    // It is written, or was not.
    let _ = guard.close().await;
    marked.map(drop).map_err(failed)
}

/// The log goes first: it is of no use to a file that is not there.
fn rename(path: &Path) -> io::Result<()> {
    let beside = |of: &Path, end: &str| -> PathBuf { format!("{}{end}", of.display()).into() };
    let to = beside(path, ".migrated");
    for end in ["-wal", "-shm", ""] {
        match fs::rename(beside(path, end), beside(&to, end)) {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            done => done?,
        }
    }
    File::open(path.parent().expect("a file lies in a directory"))?.sync_all()
}

async fn format(path: &Path) -> sqlx::Result<i64> {
    let (mut connection, _) = connect::readable(path).await?;
    let found = sqlx::query_scalar("PRAGMA user_version").fetch_one(&mut connection).await;
    // It only read.
    let _ = connection.close().await;
    found
}
