//! The lock of a data directory: two servers are kept apart.
//!
//! Owns the lock file's name. Never reads what is in the directory.

use crate::error::{Error, Kind, Result};
use std::fs::{self, File, TryLockError};
use std::path::Path;

/// A data directory that is this process's. It goes with the value.
pub struct Lock {
    _files: Vec<File>,
}

/// Takes the data directory for this process, making it if need be. On a disk that takes no new
/// file the directory itself is locked; it is always, so that two servers are kept apart whatever
/// each of them could make. Errors: `data_dir_locked`.
pub fn lock(dir: &Path) -> Result<Lock> {
    let failed = |e: std::io::Error| Error::fault(format!("data directory {}: {e}", dir.display()));
    fs::create_dir_all(dir).map_err(failed)?;
    let path = dir.join("lock");
    let named = File::create(&path).or_else(|_| File::open(&path));
    let mut files = Vec::new();
    for file in [named, File::open(dir)] {
        let Ok(file) = file else { continue };
        match file.try_lock() {
            Ok(()) => files.push(file),
            Err(TryLockError::WouldBlock) => {
                return Err(Error::new(
                    Kind::Conflict,
                    "data_dir_locked",
                    format!(
                        "data directory {} is in use by another server; stop that one, or choose \
                         another --data-dir",
                        dir.display()
                    ),
                ));
            }
            // A file system that locks no directories locks the file.
            Err(TryLockError::Error(e)) => tracing::debug!(error = %e, "a lock is not to be had"),
        }
    }
    if files.is_empty() {
        return Err(failed(std::io::Error::other("it cannot be locked")));
    }
    Ok(Lock { _files: files })
}
