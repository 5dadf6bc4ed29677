//! The data directory's state: writable, or read-only until there is room again.
//!
//! Owns that state, the errors that turn it, and the probe that turns it back. Never writes what
//! must last. The thing to know: the first write that fails for want of room, or of a sound disk,
//! turns it for all; serving goes on, changes are refused until a probe has written and synced a
//! file in the directory and committed to every database.

use super::{Files, Lock};
use crate::error::{Error, Kind, Result};
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::{Mutex as AsyncMutex, MutexGuard as AsyncMutexGuard, watch};

/// Between two probes.
const PROBE_PERIOD: Duration = Duration::from_secs(2);
/// What a probe writes: room for less than this is none, or the state would flutter.
const PROBE_BYTES: usize = 256 << 10;
/// Where it writes that; removed after.
const PROBE_FILE: &str = ".room";
/// What a refused client is told to wait.
const RETRY_SECONDS: u64 = 5;
/// A disk that cannot write or sync, as the system says it.
const EIO: i32 = 5;

/// The code of what could not be written down.
pub const FULL: &str = "storage_full";

/// One data directory. Cheap to clone; all clones share the state.
#[derive(Clone)]
pub struct Storage {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    /// Why it is read-only; `None`: it is not.
    state: watch::Sender<Option<String>>,
    databases: Mutex<Vec<Weak<Files>>>,
    /// One file that several share is opened at a time.
    opening: AsyncMutex<()>,
    lock: Mutex<Option<Lock>>,
}

impl Storage {
    /// The storage in `dir`, taken for writable until a write fails. Touches nothing.
    pub fn of(dir: impl Into<PathBuf>) -> Self {
        let inner = Inner {
            dir: dir.into(),
            state: watch::Sender::new(None),
            databases: Mutex::default(),
            opening: AsyncMutex::default(),
            lock: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Takes the directory for this process, until the last clone is gone; a second time changes
    /// nothing. Errors: `data_dir_locked`.
    pub fn lock(&self) -> Result<()> {
        let mut lock = self.inner.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if lock.is_none() {
            *lock = Some(super::lock(self.dir())?);
        }
        Ok(())
    }

    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// Why nothing is written at the moment, if so.
    pub fn read_only(&self) -> Option<String> {
        self.inner.state.borrow().clone()
    }

    /// Whether a change may be begun. Errors: `storage_full`.
    pub fn check(&self) -> Result<()> {
        match &*self.inner.state.borrow() {
            None => Ok(()),
            Some(why) => {
                Err(full(format!("nothing can be changed until it can be written down: {why}")))
            }
        }
    }

    /// Nothing more is written until a probe succeeds.
    pub fn turn(&self, why: &str) {
        let turned = self.inner.state.send_if_modified(|state| {
            let turns = state.is_none();
            if turns {
                *state = Some(why.to_owned());
            }
            turns
        });
        if turned {
            tracing::error!(why, "storage is read-only: serving goes on, changes are refused");
        }
    }

    /// What a failed write means, see [`write_failed`]; turns the storage if it is its fault.
    pub fn failed(&self, what: &str, error: &io::Error) -> Error {
        let error = write_failed(what, error);
        if error.code == FULL {
            self.turn(&error.message);
        }
        error
    }

    /// Waits until changes may be begun.
    pub async fn writable(&self) {
        // The sender lives as long as self.
        let _ = self.inner.state.subscribe().wait_for(Option::is_none).await;
    }

    /// Probes every few seconds while the storage is read-only. Never returns.
    pub async fn watch(self) {
        let mut state = self.inner.state.subscribe();
        loop {
            let _ = state.wait_for(Option::is_some).await;
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
            Ok(()) => {
                self.inner.state.send_replace(None);
                tracing::warn!("storage is writable again");
            }
            Err(error) => tracing::debug!(%error, "storage stays read-only"),
        }
    }

    async fn probe(&self) -> Result<()> {
        let place = self.inner.dir.join(PROBE_FILE);
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
        self.inner.opening.lock().await
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
        self.inner.databases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn write_and_sync(place: &Path) -> io::Result<()> {
    let mut file = File::create(place)?;
    file.write_all(&vec![1; PROBE_BYTES])?;
    file.sync_all()
}

/// What a failed write of `what` means: `storage_full` where the disk is full, read-only or broken,
/// else a fault.
pub fn write_failed(what: &str, error: &io::Error) -> Error {
    let message = format!("{what}: {error}");
    let disk = matches!(
        error.kind(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::ReadOnlyFilesystem
    );
    if disk || error.raw_os_error() == Some(EIO) { full(message) } else { Error::fault(message) }
}

pub(super) fn full(message: String) -> Error {
    let error = Error::new(Kind::Capacity, "storage_full", message);
    Error { retry_after: Some(RETRY_SECONDS), ..error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_turns_by_the_disks_errors_and_back_by_a_probe() {
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
