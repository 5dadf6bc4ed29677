//! A content on its way to the disk: written and hashed as it comes, looked at when it is whole.
//!
//! Owns one file below `files/incoming/`. Never names it. The thing to know: every call blocks, and
//! dropping it removes what was written.

use super::file::Check;
use super::tally::Counted;
use crate::database::DataDir;
use crate::error::{Error, Kind, Result};
use md5::Md5;
use sha2::{Digest as _, Sha256};
use std::fs::{self, File};
use std::io::{BufReader, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

/// Bytes that are copied at a time.
const PIECE: usize = 256 << 10;

/// A file below `files/incoming/`, removed when it is dropped.
struct Spool {
    path: PathBuf,
    file: File,
}

/// A content that is being written.
pub struct Incoming {
    spool: Spool,
    storage: DataDir,
    sha256: Sha256,
    /// What looks at it, where somebody asked for it.
    check: Option<Check>,
    md5: Option<Md5>,
    bytes: u64,
    bytes_max: u64,
    /// What the tenant has of it; `None`: it is counted elsewhere.
    counted: Option<Counted>,
}

/// A content that is whole, synced, and has no name yet.
pub struct Received {
    spool: Spool,
    /// SHA-256, in hex digits.
    pub digest: String,
    /// The same of MD5, where it was asked for.
    pub md5: Option<String>,
    pub bytes: u64,
    /// What is wrong with it, if that was looked at.
    pub problem: Option<String>,
    counted: Option<Counted>,
}

impl Incoming {
    /// A fresh file at `path`. Errors: `storage_full`.
    pub fn create(path: PathBuf, storage: &DataDir, bytes_max: u64) -> Result<Self> {
        storage.check()?;
        let file = File::create_new(&path).map_err(|e| storage.failed("a file", &e))?;
        Ok(Self {
            spool: Spool { path, file },
            storage: storage.clone(),
            sha256: Sha256::new(),
            check: None,
            md5: None,
            bytes: 0,
            bytes_max,
            counted: None,
        })
    }

    /// Has it looked at as well.
    pub fn checked(mut self, check: Check) -> Self {
        self.check = Some(check);
        self
    }

    /// Makes its MD5 as well.
    pub fn with_md5(mut self) -> Self {
        self.md5 = Some(Md5::new());
        self
    }

    pub fn counted(mut self, counted: Counted) -> Self {
        self.counted = Some(counted);
        self
    }

    /// Errors: `file_too_large`, `storage_full`.
    pub fn write(&mut self, piece: &[u8]) -> Result<()> {
        self.bytes += piece.len() as u64;
        if self.bytes > self.bytes_max {
            return Err(too_large(self.bytes_max));
        }
        let failed = |e| self.storage.failed("a file cannot be written", &e);
        self.spool.file.write_all(piece).map_err(failed)?;
        if let Some(counted) = &mut self.counted {
            counted.grow(piece.len() as u64);
        }
        self.sha256.update(piece);
        if let Some(md5) = &mut self.md5 {
            md5.update(piece);
        }
        Ok(())
    }

    /// Writes what `from` holds.
    pub fn copy(&mut self, mut from: File) -> Result<()> {
        let mut piece = vec![0; PIECE];
        loop {
            match from.read(&mut piece) {
                Ok(0) => return Ok(()),
                Ok(n) => self.write(&piece[..n])?,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::fault(format!("a part cannot be read: {e}"))),
            }
        }
    }

    /// Syncs it. Errors: `storage_full`.
    pub fn finish(self) -> Result<Received> {
        let failed = |e| self.storage.failed("a file cannot be synced", &e);
        self.spool.file.sync_all().map_err(failed)?;
        let problem = match self.check {
            Some(check) => {
                let written = File::open(&self.spool.path);
                let unread = |e| Error::fault(format!("a file cannot be read again: {e}"));
                check(&mut BufReader::new(written.map_err(unread)?))
            }
            None => None,
        };
        Ok(Received {
            digest: hex::encode(self.sha256.finalize()),
            md5: self.md5.map(|md5| hex::encode(md5.finalize())),
            bytes: self.bytes,
            problem,
            spool: self.spool,
            counted: self.counted,
        })
    }
}

impl Received {
    /// Moves it to where it stays.
    pub fn rename(&self, to: &Path) -> std::io::Result<()> {
        fs::rename(&self.spool.path, to)
    }

    /// A row counts it now.
    pub fn keep(self) {
        if let Some(counted) = self.counted {
            counted.keep();
        }
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        // What was kept has been moved out before.
        if let Err(e) = fs::remove_file(&self.path)
            && e.kind() != ErrorKind::NotFound
        {
            tracing::warn!(error = %e, "cannot remove what came of a file");
        }
    }
}

/// Errors: `file_too_large`.
pub fn too_large(bytes_max: u64) -> Error {
    let message = format!("a file has at most {bytes_max} bytes");
    Error::new(Kind::TooLarge, "file_too_large", message)
}
