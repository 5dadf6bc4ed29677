//! A weight file that stays open from its header to its last tensor.
//!
//! Owns reads at a place, the hash over the file and the look whether it is still the same file.
//! Never knows what lies where. The thing to know: several threads read at once, each into memory
//! of its own; nothing is mapped, so a file that shrinks is an error and not the end of the
//! process.

use super::config_json::invalid;
use crate::error::{Error, Result};
use sha2::{Digest as _, Sha256};
use std::fmt::Display;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Read at a time for the hash: stays in a core's own cache.
const PIECE_BYTES: usize = 256 << 10;

pub struct WeightFile {
    path: PathBuf,
    file: File,
    seen: State,
}

/// What differs after a file was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    bytes: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
}

impl State {
    fn of(file: &File) -> std::io::Result<Self> {
        let now = file.metadata()?;
        Ok(Self { bytes: now.len(), modified: (now.mtime(), now.mtime_nsec()) })
    }
}

impl WeightFile {
    pub fn open(path: &Path) -> Result<Self> {
        let fail = |e| invalid(format!("{}: {e}", path.display()));
        let file = File::open(path).map_err(fail)?;
        let seen = State::of(&file).map_err(fail)?;
        Ok(Self { path: path.to_owned(), file, seen })
    }

    /// For reading a header from its front.
    pub fn file(&self) -> &File {
        &self.file
    }

    pub fn bytes(&self) -> u64 {
        self.seen.bytes
    }

    /// What is wrong with it, by name.
    pub fn wrong(&self, why: &dyn Display) -> Error {
        invalid(format!("{}: {why}", self.path.display()))
    }

    /// Fills `buffer` with what lies at `offset`; `what` is said where that fails.
    pub fn read(&self, buffer: &mut [u8], offset: u64, what: &dyn Display) -> Result<()> {
        self.file.read_exact_at(buffer, offset).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => self.wrong(&format!("the file ends within {what}")),
            _ => self.wrong(&format!("{what}: {e}")),
        })
    }

    /// Adds the file's bytes to a hash. `told` hears of every piece, and says whether to go on.
    pub fn hash(&self, hash: &mut Sha256, told: &dyn Fn(u64) -> bool) -> Result<()> {
        let mut piece = vec![0; PIECE_BYTES];
        let mut offset = 0;
        loop {
            let n = match self.file.read_at(&mut piece, offset) {
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(self.wrong(&e)),
            };
            hash.update(&piece[..n]);
            offset += n as u64;
            if n == 0 || !told(n as u64) {
                return Ok(());
            }
        }
    }

    /// What was read at different times belongs together only if nobody wrote meanwhile.
    pub fn check_unchanged(&self) -> Result<()> {
        match State::of(&self.file).map_err(|e| self.wrong(&e))? == self.seen {
            true => Ok(()),
            false => Err(self.wrong(&"the file was changed while it was read")),
        }
    }
}
