//! Contents of files on disk, by digest, and the parts of uploads.
//!
//! Owns `files/` in the data directory. Never reads a row. The thing to know: one content is there
//! once, however many files have it; what no row names is set aside at the start.

use super::incoming::{Incoming, Received};
use crate::database::orphans::{self, Named, Orphans};
use crate::database::{FULL, Storage};
use crate::error::Result;
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The file in a content's directory.
const CONTENT: &str = "content";

pub struct Blobs {
    contents: PathBuf,
    parts: PathBuf,
    incoming: PathBuf,
    storage: Storage,
    /// Number of the next incoming file.
    begun: AtomicU64,
}

impl Blobs {
    /// Opens or creates the directory, sets aside contents that are not `named`, and removes parts
    /// that are not `parts`, and what was on its way. On a disk that takes no writes it only looks.
    pub fn open(
        storage: &Storage,
        named: &[String],
        parts: &HashSet<String>,
        changed: Duration,
    ) -> Result<Self> {
        let dir = storage.dir().join("files");
        let blobs = Self {
            contents: dir.join("sha256"),
            parts: dir.join("parts"),
            incoming: dir.join("incoming"),
            storage: storage.clone(),
            begun: AtomicU64::new(0),
        };
        match blobs.clean(named, parts, changed) {
            Err(e) => match storage.failed("the directory of files", &e) {
                e if e.code == FULL => Ok(blobs),
                e => Err(e),
            },
            Ok(()) => Ok(blobs),
        }
    }

    fn clean(
        &self,
        named: &[String],
        parts: &HashSet<String>,
        changed: Duration,
    ) -> std::io::Result<()> {
        let named = Named {
            what: "file",
            directory: "files",
            places: named.iter().map(|digest| self.directory(digest)).collect(),
            changed,
        };
        let interrupted = orphans::interrupted(&self.incoming);
        Orphans::new(&self.storage).set_aside(&self.contents, &named, &interrupted)?;
        if self.storage.read_only().is_some() {
            return Ok(());
        }
        fs::create_dir_all(&self.contents)?;
        fs::create_dir_all(&self.parts)?;
        if self.incoming.exists() {
            fs::remove_dir_all(&self.incoming)?;
        }
        fs::create_dir_all(&self.incoming)?;
        for entry in fs::read_dir(&self.parts)? {
            let entry = entry?;
            if !entry.file_name().to_str().is_some_and(|name| parts.contains(name)) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// A fresh file for what comes. Errors: `storage_full`.
    pub fn incoming(&self, bytes_max: u64) -> Result<Incoming> {
        self.storage.check()?;
        let failed = |e| self.storage.failed("a file cannot be begun", &e);
        // The directory is not there where the start could not write.
        fs::create_dir_all(&self.incoming).map_err(failed)?;
        loop {
            let number = self.begun.fetch_add(1, Ordering::Relaxed);
            let path = self.incoming.join(number.to_string());
            if !path.exists() {
                return Incoming::create(path, &self.storage, bytes_max);
            }
        }
    }

    /// Moves a content to its place, synced. Until `settled` it counts as that of an upload under
    /// way. Blocking. Errors: `storage_full`.
    pub fn keep(&self, received: &Received) -> Result<()> {
        let (digest, place) = (&received.digest, self.directory(&received.digest));
        let moved = || {
            File::create(self.mark(digest))?;
            fs::create_dir_all(&place)?;
            // Over an equal one, which may have rotted.
            received.rename(&place.join(CONTENT))?;
            sync_above(&place)
        };
        moved().map_err(|e| self.storage.failed("a file cannot be stored", &e))
    }

    /// A row names what was kept, or it is gone. Blocking.
    pub fn settled(&self, digest: &str) {
        quietly(fs::remove_file(self.mark(digest)), "a mark stays");
    }

    /// Removes a content. Blocking; a failure only leaves an orphan for the next start.
    pub fn discard(&self, digest: &str) {
        if quietly(orphans::remove(&self.directory(digest), &self.incoming), "a content stays") {
            self.settled(digest);
        }
    }

    /// Opens a content for reading. Blocking.
    pub fn open_content(&self, digest: &str) -> std::io::Result<File> {
        File::open(self.directory(digest).join(CONTENT))
    }

    /// Moves a part to its place, synced. Blocking. Errors: `storage_full`.
    pub fn keep_part(&self, received: &Received, id: &str) -> Result<()> {
        let moved = || {
            fs::create_dir_all(&self.parts)?;
            received.rename(&self.parts.join(id))?;
            File::open(&self.parts)?.sync_all()
        };
        moved().map_err(|e| self.storage.failed("a part cannot be stored", &e))
    }

    /// Opens a part for reading. Blocking.
    pub fn open_part(&self, id: &str) -> std::io::Result<File> {
        File::open(self.parts.join(id))
    }

    /// Removes parts. Blocking.
    pub fn discard_parts(&self, ids: &[String]) {
        for id in ids {
            quietly(fs::remove_file(self.parts.join(id)), "a part stays");
        }
    }

    fn directory(&self, digest: &str) -> PathBuf {
        self.contents.join(&digest[..2]).join(digest)
    }

    fn mark(&self, digest: &str) -> PathBuf {
        self.incoming.join(orphans::mark(digest))
    }
}

/// The directory of a content, and those above it that may be new.
fn sync_above(place: &Path) -> std::io::Result<()> {
    place.ancestors().take(3).try_for_each(|dir| File::open(dir)?.sync_all())
}

/// Whether it is gone; the next start removes what is not.
fn quietly(done: std::io::Result<()>, what: &str) -> bool {
    match done {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            tracing::warn!(error = %e, "{what}");
            false
        }
        _ => true,
    }
}
