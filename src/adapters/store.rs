//! The store: adapter files by digest on disk, and the catalogue of names and versions in SQLite.
//!
//! Owns the data directory: `adapters/sha256/`, `staging/`, `polylora.db`, `lock`. Never loads an
//! adapter and knows no leases. The thing to know: a version appears whole or not at all: files are
//! synced and renamed into place first, one transaction names them after, and opening removes what
//! no row names.

mod aliases;
mod owners;

use super::Digest;
use super::format::files::AdapterFiles;
use super::registry::{Alias, Version};
use crate::database;
use crate::error::{Error, Kind, Result};
use sqlx::Row as _;
use sqlx::query::Query;
use sqlx::sqlite::{Sqlite, SqliteArguments, SqlitePool, SqliteRow};
use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// How the catalogue came to its format, oldest first. "IF NOT EXISTS" in the first: files made
/// before migrations were counted have these tables.
const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE IF NOT EXISTS names (
        name TEXT PRIMARY KEY, current INTEGER, next_number INTEGER NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS versions (
        name TEXT NOT NULL, number INTEGER NOT NULL, digest TEXT NOT NULL,
        summary TEXT NOT NULL,
        logit_change_max REAL, forced INTEGER NOT NULL, created INTEGER NOT NULL,
        file_bytes INTEGER NOT NULL, resident_bytes INTEGER NOT NULL,
        PRIMARY KEY (name, number)) STRICT;
",
    "
    ALTER TABLE versions ADD COLUMN lineage TEXT NOT NULL DEFAULT '{\"kind\":\"uploaded\"}';
    ALTER TABLE versions ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE base (only INTEGER PRIMARY KEY CHECK (only = 1), digest TEXT NOT NULL) STRICT;
    CREATE TABLE aliases (
        alias TEXT PRIMARY KEY, targets TEXT NOT NULL, previous TEXT,
        created INTEGER NOT NULL, updated INTEGER NOT NULL) STRICT;
",
    "
    CREATE TABLE owners (name TEXT PRIMARY KEY, tenant TEXT) STRICT;
    INSERT INTO owners (name) SELECT DISTINCT name FROM versions;
    INSERT OR IGNORE INTO owners (name) SELECT alias FROM aliases;
",
];

/// The data directory of one server.
pub struct Store {
    blobs: PathBuf,
    staging: PathBuf,
    catalogue: SqlitePool,
    /// Number of the next staging directory.
    staged: AtomicU64,
    /// Held open: the lock goes with the file.
    _lock: File,
}

/// What the catalogue holds.
pub struct Catalogue {
    pub versions: Vec<Version>,
    /// (name, number of its current version)
    pub current: Vec<(String, u64)>,
    /// (name, number)
    pub pinned: Vec<(String, u64)>,
    pub aliases: Vec<Alias>,
    /// (name, tenant); an empty tenant is the operator
    pub owners: Vec<(String, String)>,
}

impl Store {
    /// Opens or creates the directory, takes its lock, clears staging and removes files that no
    /// version names. Errors: `data_dir_locked` (another server has it), `data_dir_unsupported` (a
    /// newer format), `data_dir_other_base` (its adapters were checked against another base).
    pub async fn open(dir: &Path, base: Digest) -> Result<(Self, Catalogue)> {
        let io = |e: std::io::Error| Error::fault(format!("data directory {}: {e}", dir.display()));
        let blobs = dir.join("adapters").join("sha256");
        let staging = dir.join("staging");
        fs::create_dir_all(&blobs).map_err(io)?;
        let lock = database::lock(dir)?;
        if staging.exists() {
            fs::remove_dir_all(&staging).map_err(io)?;
        }
        fs::create_dir_all(&staging).map_err(io)?;
        let catalogue = database::open(&dir.join("polylora.db"), MIGRATIONS).await?;
        let store = Self { blobs, staging, catalogue, staged: AtomicU64::new(0), _lock: lock };
        store.check_base(dir, base).await?;
        let catalogue = store.read().await?;
        store.remove_orphans(&catalogue).map_err(io)?;
        Ok((store, catalogue))
    }

    /// A fresh, empty directory for an upload.
    pub fn stage(&self) -> Result<PathBuf> {
        let number = self.staged.fetch_add(1, Ordering::Relaxed);
        let dir = self.staging.join(number.to_string());
        fs::create_dir(&dir).map_err(|e| Error::fault(format!("cannot stage an upload: {e}")))?;
        Ok(dir)
    }

    /// Where the files of a digest lie.
    pub fn blob(&self, digest: Digest) -> PathBuf {
        let hex = hex::encode(digest.0);
        self.blobs.join(&hex[..2]).join(hex)
    }

    /// Moves the adapter's files from a staging directory to their place, synced. A place that
    /// already holds the same content is left alone; one whose content has rotted is replaced.
    /// Blocking.
    pub fn keep(&self, staged: &Path, digest: Digest) -> Result<()> {
        let place = self.blob(digest);
        if place.exists() {
            let there = AdapterFiles::find(&place).and_then(|f| f.digest());
            if there.is_ok_and(|d| d == digest) {
                return Ok(());
            }
        }
        let files = AdapterFiles::find(staged)?;
        move_into_place(staged, &files, &place)
            .map_err(|e| Error::fault(format!("cannot store adapter {digest}: {e}")))
    }

    /// Removes the files of a digest. Blocking; a failure only leaves an orphan for the next start.
    pub fn discard(&self, digest: Digest) {
        if let Err(e) = fs::remove_dir_all(self.blob(digest))
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%digest, error = %e, "cannot remove adapter files");
        }
    }

    /// The number that a name's next version gets; never one that it has had, even before a delete.
    pub async fn next_number(&self, name: &str) -> Result<u64> {
        let row = sqlx::query("SELECT next_number FROM names WHERE name = ?")
            .bind(name)
            .fetch_optional(&self.catalogue)
            .await
            .map_err(catalogue_error)?;
        row.map_or(Ok(1), |r| number(&r, "next_number"))
    }

    /// Adds a version, and makes it the name's current one if asked, in one transaction. A new name
    /// comes with its owner.
    pub async fn add(&self, version: &Version, current: bool, owner: Option<&str>) -> Result<()> {
        let change = version.logit_change_max;
        let mut t = self.catalogue.begin().await.map_err(catalogue_error)?;
        sqlx::query(
            "INSERT INTO versions (name, number, digest, summary, logit_change_max, forced, created,
             file_bytes, resident_bytes, lineage) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(&version.name)
        .bind(version.number as i64)
        .bind(hex::encode(version.digest.0))
        .bind(json(&version.summary)?)
        .bind((!change.is_nan()).then_some(f64::from(change))) // SQLite has no NaN
        .bind(version.forced)
        .bind(version.created as i64)
        .bind(version.file_bytes as i64)
        .bind(version.resident_bytes as i64)
        .bind(json(&version.lineage)?)
        .execute(&mut *t)
        .await
        .map_err(catalogue_error)?;
        sqlx::query(
            "INSERT INTO names (name, next_number) VALUES (?1, ?2 + 1)
             ON CONFLICT (name) DO UPDATE SET next_number = excluded.next_number",
        )
        .bind(&version.name)
        .bind(version.number as i64)
        .execute(&mut *t)
        .await
        .map_err(catalogue_error)?;
        if let Some(owner) = owner {
            owners::own(&version.name, owner, &mut t).await?;
        }
        if current {
            sqlx::query("UPDATE names SET current = ?2 WHERE name = ?1")
                .bind(&version.name)
                .bind(version.number as i64)
                .execute(&mut *t)
                .await
                .map_err(catalogue_error)?;
        }
        t.commit().await.map_err(catalogue_error)
    }

    /// Marks a version as served in spite of its probe, and makes it current.
    pub async fn force(&self, name: &str, version: u64) -> Result<()> {
        let mut t = self.catalogue.begin().await.map_err(catalogue_error)?;
        for statement in [
            "UPDATE versions SET forced = TRUE WHERE name = ?1 AND number = ?2",
            "UPDATE names SET current = ?2 WHERE name = ?1",
        ] {
            sqlx::query(statement)
                .bind(name)
                .bind(version as i64)
                .execute(&mut *t)
                .await
                .map_err(catalogue_error)?;
        }
        t.commit().await.map_err(catalogue_error)
    }

    /// Makes another version of a name its current one.
    pub async fn turn(&self, name: &str, version: u64) -> Result<()> {
        let change = sqlx::query("UPDATE names SET current = ?2 WHERE name = ?1");
        self.change(change.bind(name).bind(version as i64)).await
    }

    /// Whether a version is to stay resident.
    pub async fn set_pinned(&self, name: &str, version: u64, pinned: bool) -> Result<()> {
        let change = sqlx::query("UPDATE versions SET pinned = ?3 WHERE name = ?1 AND number = ?2");
        self.change(change.bind(name).bind(version as i64).bind(pinned)).await
    }

    /// Removes one version that is not current.
    pub async fn remove_version(&self, name: &str, version: u64) -> Result<()> {
        let change = sqlx::query("DELETE FROM versions WHERE name = ? AND number = ?");
        self.change(change.bind(name).bind(version as i64)).await
    }

    /// Removes every version of a name. The name's row stays, so that its numbers are not used
    /// again.
    pub async fn remove_name(&self, name: &str) -> Result<()> {
        let mut t = self.catalogue.begin().await.map_err(catalogue_error)?;
        for statement in [
            "DELETE FROM versions WHERE name = ?",
            "UPDATE names SET current = NULL WHERE name = ?",
        ] {
            sqlx::query(statement).bind(name).execute(&mut *t).await.map_err(catalogue_error)?;
        }
        owners::disown(name, &mut t).await?;
        t.commit().await.map_err(catalogue_error)
    }

    /// Refuses a directory whose adapters were checked and probed against another base: equal
    /// shapes would let them load and answer nonsense. One without versions is for any base.
    async fn check_base(&self, dir: &Path, base: Digest) -> Result<()> {
        let held: Option<String> = sqlx::query_scalar("SELECT digest FROM base")
            .fetch_optional(&self.catalogue)
            .await
            .map_err(catalogue_error)?;
        let base = base.to_string();
        if held.as_ref() == Some(&base) {
            return Ok(());
        }
        let versions: i64 = sqlx::query_scalar("SELECT count(*) FROM versions")
            .fetch_one(&self.catalogue)
            .await
            .map_err(catalogue_error)?;
        if let Some(held) = held.filter(|_| versions > 0) {
            let message = format!(
                "data directory {} has adapters for the base {held}; this server's base is {base}. \
                 Use another --data-dir for it",
                dir.display()
            );
            return Err(Error::new(Kind::Conflict, "data_dir_other_base", message));
        }
        let change = sqlx::query("INSERT OR REPLACE INTO base (only, digest) VALUES (1, ?)");
        self.change(change.bind(base)).await
    }

    /// A change that is one statement.
    async fn change(&self, statement: Query<'_, Sqlite, SqliteArguments>) -> Result<()> {
        statement.execute(&self.catalogue).await.map_err(catalogue_error).map(drop)
    }

    async fn read(&self) -> Result<Catalogue> {
        let rows = sqlx::query("SELECT * FROM versions ORDER BY name, number")
            .fetch_all(&self.catalogue)
            .await
            .map_err(catalogue_error)?;
        let versions = rows.iter().map(version).collect::<Result<_>>()?;
        let current = "SELECT name, current AS number FROM names WHERE current IS NOT NULL";
        let pinned = "SELECT name, number FROM versions WHERE pinned";
        Ok(Catalogue {
            versions,
            current: self.pairs(current).await?,
            pinned: self.pairs(pinned).await?,
            aliases: self.aliases().await?,
            owners: self.owners().await?,
        })
    }

    async fn pairs(&self, query: &'static str) -> Result<Vec<(String, u64)>> {
        let rows = sqlx::query(query).fetch_all(&self.catalogue).await.map_err(catalogue_error)?;
        rows.iter().map(|r| Ok((text(r, "name")?, number(r, "number")?))).collect()
    }

    fn remove_orphans(&self, catalogue: &Catalogue) -> std::io::Result<()> {
        let named: HashSet<PathBuf> =
            catalogue.versions.iter().map(|v| self.blob(v.digest)).collect();
        for prefix in directories(&self.blobs)? {
            for blob in directories(&prefix)? {
                if !named.contains(&blob) {
                    tracing::info!(path = %blob.display(), "removing files that no version names");
                    fs::remove_dir_all(blob)?;
                }
            }
        }
        Ok(())
    }
}

/// The directories in one; what else lies there is not ours.
fn directories(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            found.push(path);
        }
    }
    Ok(found)
}

/// Leaves only the canonical files in `staged`, syncs them, renames the directory and syncs its
/// parents.
fn move_into_place(staged: &Path, files: &AdapterFiles, place: &Path) -> std::io::Result<()> {
    for (name, path) in files.list() {
        let canonical = staged.join(name);
        if path != canonical {
            fs::rename(path, &canonical)?;
        }
        File::open(&canonical)?.sync_all()?;
    }
    for entry in fs::read_dir(staged)? {
        let entry = entry?;
        let part = files.list().iter().any(|(n, _)| entry.file_name() == *n);
        match (part, entry.file_type()?.is_dir()) {
            (true, _) => {}
            (false, true) => fs::remove_dir_all(entry.path())?,
            (false, false) => fs::remove_file(entry.path())?,
        }
    }
    File::open(staged)?.sync_all()?;
    if place.exists() {
        fs::remove_dir_all(place)?;
    }
    let parent = place.parent().expect("a blob lies in a directory");
    fs::create_dir_all(parent)?;
    fs::rename(staged, place)?;
    File::open(parent)?.sync_all()?;
    File::open(parent.parent().expect("and that in another"))?.sync_all()
}

fn version(row: &SqliteRow) -> Result<Version> {
    let bad = |what: &str| Error::fault(format!("polylora.db: a version has a bad {what}"));
    let mut digest = [0; 32];
    hex::decode_to_slice(text(row, "digest")?, &mut digest).map_err(|_| bad("digest"))?;
    let change: Option<f64> = row.try_get("logit_change_max").map_err(catalogue_error)?;
    Ok(Version {
        name: text(row, "name")?,
        number: number(row, "number")?,
        digest: Digest(digest),
        summary: serde_json::from_str(&text(row, "summary")?).map_err(|_| bad("summary"))?,
        logit_change_max: change.map_or(f32::NAN, |c| c as f32),
        forced: row.try_get("forced").map_err(catalogue_error)?,
        created: number(row, "created")?,
        file_bytes: number(row, "file_bytes")?,
        resident_bytes: number(row, "resident_bytes")?,
        lineage: serde_json::from_str(&text(row, "lineage")?).map_err(|_| bad("lineage"))?,
    })
}

fn json(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value)
        .map_err(|e| Error::fault(format!("cannot write to the catalogue: {e}")))
}

fn text(row: &SqliteRow, column: &str) -> Result<String> {
    row.try_get(column).map_err(catalogue_error)
}

fn number(row: &SqliteRow, column: &str) -> Result<u64> {
    let n: i64 = row.try_get(column).map_err(catalogue_error)?;
    u64::try_from(n).map_err(|_| Error::fault(format!("polylora.db: {column} is {n}")))
}

fn catalogue_error(e: sqlx::Error) -> Error {
    Error::fault(format!("the catalogue polylora.db: {e}"))
}
