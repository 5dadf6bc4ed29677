//! The files of an upload as they arrive, and how many bytes may still come.
//!
//! Owns the count and the place of each file. Never makes a path of a client's name: the staging
//! says where a name belongs, if anywhere.

use crate::adapters::registry::{Registry, Staging};
use crate::error::{Error, Kind, Result, brief};
use std::path::PathBuf;

/// Bytes to the disk between two looks at what is left there.
const DISK_STEP: usize = 256 << 10;
/// Names listed back to the client, at most.
const IGNORED_MAX: usize = 64;

/// Bytes that may still come.
#[derive(Clone)]
pub struct Budget {
    left: u64,
    pub bytes_max: u64,
    /// Asked now and then whether the disk has room beside what is kept for the databases.
    registry: Registry,
    unasked: usize,
}

impl Budget {
    /// Accounts for bytes about to be written.
    pub fn spend(&mut self, bytes: usize) -> Result<()> {
        let left = self.left.checked_sub(bytes as u64);
        self.left = left.ok_or_else(|| too_large(self.bytes_max))?;
        self.unasked += bytes;
        if self.unasked >= DISK_STEP {
            self.registry.check_reserve()?;
            self.unasked = 0;
        }
        Ok(())
    }
}

/// What came of an upload, as it is gathered.
pub struct Files {
    pub staging: Staging,
    taken: Vec<PathBuf>,
    /// Names of the files that were taken, as the uploader called them.
    pub names: Vec<String>,
    /// Names of files that an adapter does not need.
    pub ignored: Vec<String>,
    /// Over all files together.
    pub budget: Budget,
}

impl Files {
    pub fn new(staging: Staging, bytes_max: u64, registry: Registry) -> Self {
        Self {
            staging,
            taken: Vec::new(),
            names: Vec::new(),
            ignored: Vec::new(),
            budget: Budget { left: bytes_max, bytes_max, registry, unasked: 0 },
        }
    }

    /// Where the file `name` is to be written; `None` when an adapter does not need it.
    pub fn place(&mut self, name: &str) -> Result<Option<PathBuf>> {
        let shown = brief(name);
        let Some(place) = self.staging.file_path(name) else {
            if self.ignored.len() < IGNORED_MAX {
                self.ignored.push(shown);
            }
            return Ok(None);
        };
        if self.taken.contains(&place) {
            return Err(Error::invalid(
                "duplicate_file",
                format!("the upload has a second file where `{shown}` belongs"),
            ));
        }
        self.taken.push(place.clone());
        self.names.push(shown);
        Ok(Some(place))
    }
}

/// Errors: `upload_too_large`.
pub fn too_large(bytes_max: u64) -> Error {
    Error::new(
        Kind::TooLarge,
        "upload_too_large",
        format!("the upload is larger than upload_bytes_max = {bytes_max}"),
    )
}
