//! A data directory and the databases open in it.
//!
//! Owns the probe that makes it writable again. Never writes what must last. The
//! thing to know: a probe has written and synced a file in the directory and committed to every
//! database.

use super::directory::{DataDir, write_failed};
use super::files::Files;
use crate::error::{Error, Result};
use std::fs::File;
use std::io::{self, Write};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::{Mutex as AsyncMutex, MutexGuard as AsyncMutexGuard};

/// Between two probes.
const PROBE_PERIOD: Duration = Duration::from_secs(2);
/// What a probe writes: room for less than this is none, or the state would flutter.
const PROBE_BYTES: usize = 256 << 10;
/// Where it writes that; removed after.
const PROBE_FILE: &str = ".room";

/// One data directory. Cheap to clone; all clones share the state.
#[derive(Clone)]
pub struct Storage {
    directory: DataDir,
    databases: Arc<Mutex<Vec<Weak<Files>>>>,
    /// One file that several share is opened at a time.
    opening: Arc<AsyncMutex<()>>,
}

/// A storage is its directory, with what is open in it.
impl Deref for Storage {
    type Target = DataDir;
    fn deref(&self) -> &DataDir {
        &self.directory
    }
}

impl Storage {
    /// The storage in `dir`, taken for writable until a write fails. Touches nothing.
    pub fn of(dir: impl Into<PathBuf>) -> Self {
        let directory = DataDir::of(dir.into());
        Self { directory, databases: Arc::default(), opening: Arc::default() }
    }

    /// Probes every few seconds while the storage is read-only. Never returns.
    pub async fn watch(self) {
        loop {
            self.became_read_only().await;
            tokio::time::sleep(PROBE_PERIOD).await;
            self.try_again().await;
        }
    }

    /// One probe, if it is read-only.
    pub async fn try_again(&self) {
        if self.check().is_ok() {
            return;
        }
        match self.probe().await {
            Ok(()) => self.make_writable(),
            Err(error) => tracing::debug!(%error, "storage stays read-only"),
        }
    }

    async fn probe(&self) -> Result<()> {
        let place = self.dir().join(PROBE_FILE);
        let written = tokio::task::spawn_blocking(move || {
            let written = write_and_sync(&place);
            let removed = std::fs::remove_file(&place);
            written.and(removed).map_err(|e| write_failed("the data directory", &e))
        });
        written.await.map_err(|_| Error::fault("a probe failed"))??;
        for database in self.open_databases() {
            database.probe().await?;
        }
        Ok(())
    }

    /// Closes every database, at the end.
    pub async fn close(&self) {
        for database in self.open_databases() {
            database.close().await;
        }
    }

    pub(super) async fn opening(&self) -> AsyncMutexGuard<'_, ()> {
        self.opening.lock().await
    }

    /// The open database of this name.
    pub(super) fn opened(&self, name: &str) -> Option<Arc<Files>> {
        self.open_databases().into_iter().find(|files| files.name == name)
    }

    fn open_databases(&self) -> Vec<Arc<Files>> {
        self.databases().iter().filter_map(Weak::upgrade).collect()
    }

    /// A database to be probed as long as it is open.
    pub(super) fn add(&self, database: &Arc<Files>) {
        let mut databases = self.databases();
        databases.retain(|d| d.strong_count() > 0);
        databases.push(Arc::downgrade(database));
    }

    fn databases(&self) -> MutexGuard<'_, Vec<Weak<Files>>> {
        self.databases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn write_and_sync(place: &Path) -> io::Result<()> {
    let mut file = File::create(place)?;
    file.write_all(&vec![1; PROBE_BYTES])?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::database::directory::{EIO, FULL};
    use crate::error::Kind;
    use std::io::ErrorKind;

    #[tokio::test]
    async fn the_disks_errors_make_it_read_only_and_a_probe_writable() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Storage::of(dir.path());
        let error = storage.failed("a file", &io::Error::from(ErrorKind::PermissionDenied));
        assert_eq!((error.code, storage.read_only()), ("internal_error", None));
        for code in [28, 122, 30, EIO] {
            let error = storage.failed("adapter 7", &io::Error::from_raw_os_error(code));
            assert_eq!((error.code, error.kind), (FULL, Kind::Capacity), "{error}");
            assert!(error.message.starts_with("adapter 7: "), "{error}");
        }
        let refused = storage.check().unwrap_err();
        assert!(refused.message.contains("adapter 7") && refused.retry_after.is_some());
        let watching = tokio::spawn(storage.clone().watch());
        storage.writable().await;
        storage.check().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the probe leaves nothing");
        watching.abort();
    }
}
