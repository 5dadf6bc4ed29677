//! An upload in progress: a directory of its own below the store's staging area.
//!
//! Owns which uploaded names become which files. Never reads one. The thing to know: dropping it
//! removes the directory; what was published has been moved out before.

use crate::adapters::format::{files, names};
use std::path::PathBuf;

/// A directory that only this upload knows.
/// Removed on drop.
pub struct Staging {
    pub name: String,
    pub dir: PathBuf,
}

impl Staging {
    /// Where an uploaded file goes; `None` for a file that is no part of an adapter (README.md, a
    /// tokenizer) and should be read over. Nothing of the uploaded name but its kind reaches the
    /// disk.
    pub fn file_path(&self, uploaded: &str) -> Option<PathBuf> {
        if let Some(name) = files::canonical_name(uploaded) {
            return Some(self.dir.join(name));
        }
        if files::is_pickle(uploaded) {
            // The pickle itself is not kept; an empty mark lets the check say why it does not
            // count.
            let mark = self.dir.join(names::PICKLE_MARK);
            if let Err(e) = std::fs::File::create(mark) {
                tracing::warn!(error = %e, "cannot mark an uploaded pickle");
            }
        }
        None
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(&self.dir)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(error = %e, "cannot remove a staging directory");
        }
    }
}
