//! The store: adapter files by digest on disk, and the catalogue of names and versions in SQLite.
//!
//! Owns `adapters/sha256/` and `staging/`, and the catalogue's rows in `polylora.db`.
//! Never loads an adapter and knows no leases. The thing to know: a version appears whole or not at
//! all: files are synced and renamed into place first, one transaction names them after, and
//! opening sets aside what no row names, if the catalogue has seen it.

mod aliases;
mod owners;
mod rows;

use super::Digest;
use super::format::files::AdapterFiles;
use super::version::Version;
use crate::clock::Now;
use crate::database::orphans::{self, Named, Orphans};
use crate::database::{Database, FULL, Storage, Transaction};
use crate::error::{Error, Kind, Result};
pub use rows::Catalogue;
use rows::{disown, json, number, own, text, version};
use sqlx::query::Query;
use sqlx::sqlite::{Sqlite, SqliteArguments};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The data directory of one server.
pub struct Store {
    blobs: PathBuf,
    staging: PathBuf,
    catalogue: Database,
    storage: Storage,
    /// Number of the next staging directory.
    staged: AtomicU64,
    /// What no version names.
    pub orphans: Orphans,
}

impl Store {
    /// Opens or creates the directory, takes its lock, clears staging and sets aside files that no
    /// version names; on a disk that takes no writes it only looks. Errors: `data_dir_locked`
    /// (another server has it), `data_dir_unsupported` (a newer format), `data_dir_other_base` (its
    /// adapters were checked against another base).
    pub async fn open(storage: &Storage, base: Digest) -> Result<(Self, Catalogue)> {
        let dir = storage.dir();
        let what = format!("data directory {}", dir.display());
        let needed = |done: std::io::Result<()>| match done.map_err(|e| storage.failed(&what, &e)) {
            Err(e) if e.code == FULL => Ok(()),
            done => done,
        };
        let (blobs, staging) = (dir.join("adapters").join("sha256"), dir.join("staging"));
        storage.lock()?;
        needed(fs::create_dir_all(&blobs))?;
        let interrupted = orphans::interrupted(&staging);
        let catalogue = Database::catalogue(storage).await?;
        let store = Self {
            blobs,
            staging,
            catalogue,
            storage: storage.clone(),
            staged: AtomicU64::new(0),
            orphans: Orphans::new(storage),
        };
        store.check_base(dir, base).await?;
        let catalogue = store.read().await?;
        let named = Named {
            what: "adapter",
            directory: "adapters",
            places: catalogue.versions.iter().map(|v| store.blob(v.digest)).collect(),
            changed: catalogue.changed,
        };
        // The marks of interrupted uploads lie in staging: cleared when they are of no more use.
        needed(store.orphans.set_aside(&store.blobs, &named, &interrupted))?;
        if storage.read_only().is_none() {
            if store.staging.exists() {
                needed(fs::remove_dir_all(&store.staging))?;
            }
            needed(fs::create_dir_all(&store.staging))?;
        }
        Ok((store, catalogue))
    }

    /// A fresh, empty directory for an upload. Errors: `storage_full`.
    pub fn stage(&self) -> Result<PathBuf> {
        self.storage.check()?;
        let failed = |e| self.storage.failed("an upload cannot be staged", &e);
        fs::create_dir_all(&self.staging).map_err(failed)?;
        loop {
            let number = self.staged.fetch_add(1, Ordering::Relaxed);
            let dir = self.staging.join(number.to_string());
            match fs::create_dir(&dir) {
                Ok(()) => return Ok(dir),
                // Left by a server that could not clear it.
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(failed(e)),
            }
        }
    }

    /// Where the files of a digest lie.
    pub fn blob(&self, digest: Digest) -> PathBuf {
        let hex = hex::encode(digest.0);
        self.blobs.join(&hex[..2]).join(hex)
    }

    /// Moves the adapter's files from a staging directory to their place, synced. A place that
    /// already holds the same content is left alone; one whose content has rotted is replaced.
    /// Until `settled` the content counts as that of an upload under way. Blocking. Errors:
    /// `storage_full`.
    pub fn keep(&self, staged: &Path, digest: Digest) -> Result<()> {
        let what = format!("cannot store adapter {digest}");
        let failed = |e: std::io::Error| self.storage.failed(&what, &e);
        let place = self.blob(digest);
        if place.exists() {
            let there = AdapterFiles::find(&place).and_then(|f| f.digest());
            if there.is_ok_and(|d| d == digest) {
                // Whoever moved it there may have failed to sync that.
                return sync_parents(&place).map_err(failed);
            }
        }
        let files = AdapterFiles::find(staged)?;
        File::create(self.mark(digest)).map_err(failed)?;
        move_into_place(staged, &files, &place).map_err(failed)
    }

    /// The catalogue names what was kept, or it is gone. Blocking.
    pub fn settled(&self, digest: Digest) {
        if let Err(e) = fs::remove_file(self.mark(digest))
            && e.kind() != ErrorKind::NotFound
        {
            tracing::debug!(%digest, error = %e, "a mark stays");
        }
    }

    /// Where it is noted that the files of a digest are about to be named.
    fn mark(&self, digest: Digest) -> PathBuf {
        self.staging.join(orphans::mark(&hex::encode(digest.0)))
    }

    /// Removes the files of a digest. Blocking; a failure only leaves an orphan for the next start.
    pub fn discard(&self, digest: Digest) {
        if let Err(e) = orphans::remove(&self.blob(digest), &self.staging)
            && e.kind() != ErrorKind::NotFound
        {
            tracing::warn!(%digest, error = %e, "cannot remove adapter files");
            return;
        }
        self.settled(digest);
    }

    /// The number that a name's next version gets; never one that it has had, even before a delete.
    pub async fn next_number(&self, name: &str) -> Result<u64> {
        let query = sqlx::query("SELECT next_number FROM names WHERE name = ?").bind(name);
        self.catalogue.row(query).await?.map_or(Ok(1), |r| number(&r, "next_number"))
    }

    /// Adds a version, and makes it the name's current one if asked, in one transaction. A new name
    /// comes with its owner.
    pub async fn add(&self, version: &Version, current: bool, owner: Option<&str>) -> Result<()> {
        let change = version.logit_change_max;
        let mut t = self.begin().await?;
        let insert = sqlx::query(
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
        .bind(json(&version.lineage)?);
        t.run(insert).await?;
        let next = sqlx::query(
            "INSERT INTO names (name, next_number) VALUES (?1, ?2 + 1)
             ON CONFLICT (name) DO UPDATE SET next_number = excluded.next_number",
        );
        t.run(next.bind(&version.name).bind(version.number as i64)).await?;
        if let Some(owner) = owner {
            own(&version.name, owner, &mut t).await?;
        }
        if current {
            let point = sqlx::query("UPDATE names SET current = ?2 WHERE name = ?1");
            t.run(point.bind(&version.name).bind(version.number as i64)).await?;
        }
        t.commit().await
    }

    /// Marks a version as served in spite of its probe, and makes it current.
    pub async fn force(&self, name: &str, version: u64) -> Result<()> {
        let mut t = self.begin().await?;
        for statement in [
            "UPDATE versions SET forced = TRUE WHERE name = ?1 AND number = ?2",
            "UPDATE names SET current = ?2 WHERE name = ?1",
        ] {
            t.run(sqlx::query(statement).bind(name).bind(version as i64)).await?;
        }
        t.commit().await
    }

    /// Makes another version of a name its current one.
    pub async fn set_current(&self, name: &str, version: u64) -> Result<()> {
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

    /// Removes one version; where the name means it, the name means `next` from then on.
    pub async fn remove_version_and_move(
        &self,
        name: &str,
        version: u64,
        current: bool,
        next: Option<u64>,
    ) -> Result<()> {
        let mut t = self.begin().await?;
        let change = sqlx::query("DELETE FROM versions WHERE name = ? AND number = ?");
        t.run(change.bind(name).bind(version as i64)).await?;
        if current {
            let point = sqlx::query("UPDATE names SET current = ?2 WHERE name = ?1");
            t.run(point.bind(name).bind(next.map(|next| next as i64))).await?;
        }
        t.commit().await
    }

    /// Removes every version of a name. The name's row stays, so that its numbers are not used
    /// again.
    pub async fn remove_name(&self, name: &str) -> Result<()> {
        let mut t = self.begin().await?;
        for statement in [
            "DELETE FROM versions WHERE name = ?",
            "UPDATE names SET current = NULL WHERE name = ?",
        ] {
            t.run(sqlx::query(statement).bind(name)).await?;
        }
        disown(name, &mut t).await?;
        t.commit().await
    }

    /// Refuses a directory whose adapters were checked and probed against another base: equal
    /// shapes would let them load and answer nonsense. One without versions is for any base.
    async fn check_base(&self, dir: &Path, base: Digest) -> Result<()> {
        let held = self.catalogue.row(sqlx::query("SELECT digest FROM base")).await?;
        let held = held.map(|row| text(&row, "digest")).transpose()?;
        let base = base.to_string();
        if held.as_ref() == Some(&base) {
            return Ok(());
        }
        let count = self.catalogue.row(sqlx::query("SELECT count(*) AS n FROM versions")).await?;
        let versions = count.map_or(Ok(0), |row| number(&row, "n"))?;
        if let Some(held) = held.filter(|_| versions > 0) {
            let message = format!(
                "data directory {} has adapters for the base {held}; this server's base is {base}. \
                 Use another --data-dir for it",
                dir.display()
            );
            return Err(Error::new(Kind::Conflict, "data_dir_other_base", message));
        }
        let change = sqlx::query("INSERT OR REPLACE INTO base (only, digest) VALUES (1, ?)");
        match self.catalogue.run(change.bind(base)).await {
            // Without versions nothing depends on it yet.
            Err(e) if e.code == FULL => Ok(()),
            done => done.map(drop),
        }
    }

    /// Begins a change of the catalogue, and notes when.
    async fn begin(&self) -> Result<Transaction> {
        let mut t = self.catalogue.begin().await?;
        let now = Now::read().wall.as_millis() as i64;
        t.run(sqlx::query("INSERT OR REPLACE INTO changed VALUES (1, ?)").bind(now)).await?;
        Ok(t)
    }

    /// A change that is one statement.
    async fn change(&self, statement: Query<'_, Sqlite, SqliteArguments>) -> Result<()> {
        let mut t = self.begin().await?;
        t.run(statement).await?;
        t.commit().await
    }

    async fn read(&self) -> Result<Catalogue> {
        let query = sqlx::query("SELECT * FROM versions ORDER BY name, number");
        let versions = self.catalogue.rows(query).await?;
        let versions = versions.iter().map(version).collect::<Result<_>>()?;
        let current = "SELECT name, current AS number FROM names WHERE current IS NOT NULL";
        let pinned = "SELECT name, number FROM versions WHERE pinned";
        let changed = self.catalogue.row(sqlx::query("SELECT at FROM changed")).await?;
        let changed = changed.map_or(Ok(0), |row| number(&row, "at"))?;
        Ok(Catalogue {
            versions,
            current: self.pairs(current).await?,
            pinned: self.pairs(pinned).await?,
            aliases: self.aliases().await?,
            changed: Duration::from_millis(changed),
            owners: self.owners().await?,
        })
    }

    async fn pairs(&self, query: &'static str) -> Result<Vec<(String, u64)>> {
        let rows = self.catalogue.rows(sqlx::query(query)).await?;
        rows.iter().map(|r| Ok((text(r, "name")?, number(r, "number")?))).collect()
    }
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
    sync_parents(place)
}

fn sync_parents(place: &Path) -> std::io::Result<()> {
    let parent = place.parent().expect("a blob lies in a directory");
    File::open(parent)?.sync_all()?;
    File::open(parent.parent().expect("and that in another"))?.sync_all()
}
