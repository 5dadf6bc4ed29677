//! A data directory: this process's alone, and writable or read-only until there is room again.
//!
//! Owns that state, and which errors make it read-only. Never makes it writable by itself, nor
//! opens a database. The thing to know: the first write that fails for want of room, or of a sound
//! disk, makes it read-only for all; serving goes on, changes are refused.

use super::lock::{self, Lock};
use crate::error::{Error, Kind, Result};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;

/// What a refused client is told to wait.
const RETRY_SECONDS: u64 = 5;
/// A disk that cannot write or sync, as the system says it.
pub const EIO: i32 = 5;
/// The code of what could not be written down.
pub const FULL: &str = "storage_full";

/// The directory. Cheap to clone; all clones share the state.
#[derive(Clone)]
pub struct DataDir {
    path: Arc<Path>,
    /// Why it is read-only; `None`: it is not.
    state: watch::Sender<Option<String>>,
    lock: Arc<Mutex<Option<Lock>>>,
}

impl DataDir {
    /// Taken for writable until a write fails. Touches nothing.
    pub fn of(path: PathBuf) -> Self {
        Self { path: path.into(), state: watch::Sender::new(None), lock: Arc::default() }
    }

    /// Takes the directory for this process, until the last clone is gone; a second time changes
    /// nothing. Errors: `data_dir_locked`.
    pub fn lock(&self) -> Result<()> {
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if lock.is_none() {
            *lock = Some(lock::lock(self.dir())?);
        }
        Ok(())
    }

    pub fn dir(&self) -> &Path {
        &self.path
    }

    /// Why nothing is written at the moment, if so.
    pub fn read_only(&self) -> Option<String> {
        self.state.borrow().clone()
    }

    /// Whether a change may be begun. Errors: `storage_full`.
    pub fn check(&self) -> Result<()> {
        match &*self.state.borrow() {
            None => Ok(()),
            Some(why) => {
                Err(full(format!("nothing can be changed until it can be written down: {why}")))
            }
        }
    }

    /// Nothing more is written until it is writable again.
    pub fn make_read_only(&self, why: &str) {
        let changed = self.state.send_if_modified(|state| {
            let was_writable = state.is_none();
            if was_writable {
                *state = Some(why.to_owned());
            }
            was_writable
        });
        if changed {
            tracing::error!(why, "storage is read-only: serving goes on, changes are refused");
        }
    }

    /// What a failed write means, see [`write_failed`]; makes the storage read-only if it is the
    /// disk's fault.
    pub fn failed(&self, what: &str, error: &io::Error) -> Error {
        let error = write_failed(what, error);
        if error.code == FULL {
            self.make_read_only(&error.message);
        }
        error
    }

    /// What a failed write to a database means; makes the storage read-only if it is the disk's
    /// fault.
    pub fn sql_failed(&self, name: &str, error: &sqlx::Error) -> Error {
        if !is_storage(error) {
            return wrong(name, error);
        }
        let message = format!("{name}: {error}");
        self.make_read_only(&message);
        full(message)
    }

    /// Waits until changes may be begun.
    pub async fn writable(&self) {
        // The sender lives as long as self.
        let _ = self.state.subscribe().wait_for(Option::is_none).await;
    }

    /// Waits until they may not.
    pub async fn became_read_only(&self) {
        let _ = self.state.subscribe().wait_for(Option::is_some).await;
    }

    /// What could not be written can be again.
    pub fn make_writable(&self) {
        self.state.send_replace(None);
        tracing::warn!("storage is writable again");
    }
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

pub fn full(message: String) -> Error {
    let error = Error::new(Kind::Capacity, "storage_full", message);
    Error { retry_after: Some(RETRY_SECONDS), ..error }
}

/// What any other failure of a database means: the fault is ours.
pub fn wrong(name: &str, error: &sqlx::Error) -> Error {
    Error::fault(format!("{name}: {error}"))
}

impl From<sqlx::Error> for Error {
    /// Whoever is given rows can only meet one that is not as its table says.
    fn from(error: sqlx::Error) -> Self {
        wrong("a row of a database", &error)
    }
}

/// Whether SQLite could not write: READONLY, IOERR, FULL, CANTOPEN. Memory that lacked is none.
fn is_storage(error: &sqlx::Error) -> bool {
    const IOERR_NOMEM: i32 = 10 | (12 << 8);
    let code = error.as_database_error().and_then(|e| e.code()?.parse::<i32>().ok());
    code.is_some_and(|code| code != IOERR_NOMEM && matches!(code & 0xff, 8 | 10 | 13 | 14))
}
