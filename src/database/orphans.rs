//! Files that the catalogue does not name: left alone, set aside, or, after days, removed.
//!
//! Owns `orphans/` and the marks of contents that are about to be named. Never removes what the
//! catalogue cannot have seen. The thing to know: a catalogue that is new, empty, or older than a
//! file may be the one that is wrong, so the file stays where it is and the start says so.

use super::Storage;
use crate::clock::{Now, Trusted};
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{ErrorKind, Result};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

/// What was set aside is removed after so long.
const KEPT_FOR: Duration = Duration::from_secs(7 * 86_400);
const MARK: &str = "naming-";

/// The name of the mark of a content that is about to be named; `digest` in hex digits.
pub fn mark(digest: &str) -> String {
    format!("{MARK}{digest}")
}

/// Names of the contents that uploads were at when the server ended: those that no row names were
/// never acknowledged.
pub fn interrupted(staging: &Path) -> HashSet<String> {
    let entries = fs::read_dir(staging).into_iter().flatten().flatten();
    let name = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        name.strip_prefix(MARK).map(str::to_owned)
    };
    entries.filter_map(name).collect()
}

/// Removes a content that no row names any more: first whole out of its place into `staging`,
/// which the next start clears. What a kill left of it in its place would be newer than the
/// catalogue, and so stay. Errors: the place still holds it, or `staging` a part of it.
pub fn remove(blob: &Path, staging: &Path) -> Result<()> {
    let name = blob.file_name().unwrap_or_default().to_string_lossy();
    let gone = staging.join(format!("gone-{name}"));
    match fs::rename(blob, &gone) {
        Ok(()) => fs::remove_dir_all(gone),
        // A full disk may have no room for a name, and is to get some.
        Err(_) => fs::remove_dir_all(blob),
    }
}

/// What a catalogue says of one kind of contents.
pub struct Named<'a> {
    /// What the contents are of, in the plural, and the directory that they lie in.
    pub what: &'a str,
    pub directory: &'a str,
    /// Where those lie that a row names.
    pub places: HashSet<PathBuf>,
    /// When the catalogue last changed, since 1970.
    pub changed: Duration,
}

/// The place of files that were set aside.
pub struct Orphans {
    storage: Storage,
    /// By which they age.
    time: Mutex<Trusted>,
}

impl Orphans {
    pub fn new(storage: &Storage) -> Self {
        Self { storage: storage.clone(), time: Mutex::new(Trusted::new(None, Now::read())) }
    }

    fn time(&self) -> MutexGuard<'_, Trusted> {
        self.time.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dir(&self) -> PathBuf {
        self.storage.dir().join("orphans")
    }

    /// Moves what lies in `blobs` and is not `named` to `orphans/`, unless the catalogue may not
    /// know of it; and says what was found.
    pub fn set_aside(
        &self,
        blobs: &Path,
        named: &Named<'_>,
        interrupted: &HashSet<String>,
    ) -> Result<()> {
        *self.time() = Trusted::new(Some(named.changed), Now::read());
        let (mut unnamed, mut unseen) = (Vec::new(), 0);
        if !blobs.exists() {
            return Ok(());
        }
        for prefix in directories(blobs)? {
            for blob in directories(&prefix)?.into_iter().filter(|b| !named.places.contains(b)) {
                let name = blob.file_name().unwrap_or_default().to_string_lossy().into_owned();
                match interrupted.contains(&name) || made(&blob)? <= named.changed {
                    true => unnamed.push((name, blob)),
                    false => unseen += 1,
                }
            }
        }
        let (count, known) = (unnamed.len(), named.places.len());
        let Named { what, directory, .. } = *named;
        if known == 0 && count + unseen > 0 {
            tracing::warn!(
                files = count + unseen,
                "polylora.db names no {what}, but {directory}/ holds some: they stay where they \
                 are, and a polylora.db that names them makes them served again"
            );
            return Ok(());
        }
        if unseen > 0 {
            tracing::warn!(
                files = unseen,
                known,
                "{directory}/ holds files that are newer than polylora.db, which may be an older \
                 copy: they stay where they are"
            );
        }
        if count == 0 || self.storage.read_only().is_some() {
            return Ok(());
        }
        fs::create_dir_all(self.dir())?;
        for (name, blob) in unnamed {
            let since = Now::read().wall.as_secs();
            fs::rename(&blob, self.dir().join(format!("{since}-{name}")))
                .or_else(|e| if again(&e) { fs::remove_dir_all(&blob) } else { Err(e) })?;
        }
        File::open(self.dir())?.sync_all()?;
        let days = KEPT_FOR.as_secs() / 86_400;
        tracing::warn!(files = count, days, "set aside in orphans/ what no row names");
        Ok(())
    }

    /// Removes what was set aside long ago. Blocking.
    pub fn remove_old(&self) {
        let now = self.time().look(Now::read());
        for orphan in directories(&self.dir()).unwrap_or_default() {
            let name = orphan.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let since = name.split_once('-').and_then(|(since, _)| since.parse().ok());
            let Some(since) = since.map(Duration::from_secs) else { continue };
            if now < since + KEPT_FOR || self.storage.read_only().is_some() {
                continue;
            }
            match fs::remove_dir_all(&orphan) {
                Ok(()) => tracing::info!(orphan = name, "removed what was set aside long ago"),
                Err(e) => tracing::warn!(orphan = name, error = %e, "cannot remove an orphan"),
            }
        }
    }
}

/// It was set aside in this second already: the same content.
fn again(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists)
}

/// When a blob was staged, since 1970.
fn made(blob: &Path) -> Result<Duration> {
    let time = fs::metadata(blob)?.modified()?;
    Ok(time.duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// The directories in one; what else lies there is not ours.
fn directories(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            found.push(path);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_content_leaves_its_place_whole() {
        const FILES: usize = 500;
        let dir = tempfile::tempdir().unwrap();
        let staging = dir.path().join("staging");
        fs::create_dir(&staging).unwrap();
        for round in 0..20 {
            let blob = dir.path().join(format!("blob-{round}"));
            fs::create_dir(&blob).unwrap();
            for n in 0..FILES {
                File::create(blob.join(n.to_string())).unwrap();
            }
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while let Ok(entries) = fs::read_dir(&blob) {
                        // What was opened may have left since, and be removed as it is read.
                        let whole = entries.count() == FILES;
                        assert!(whole || !blob.exists(), "a part of it is in its place");
                    }
                });
                remove(&blob, &staging).unwrap();
            });
        }
        assert_eq!(fs::read_dir(&staging).unwrap().count(), 0);
        let blob = dir.path().join("blob");
        fs::create_dir(&blob).unwrap();
        remove(&blob, &dir.path().join("nowhere")).unwrap();
        assert!(!blob.exists(), "it goes also where there is nothing to move it to");
        assert_eq!(remove(&blob, &staging).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
