//! Archives of uploads: tar, tar.gz, zip. Also a GGUF file that comes as the whole body.
//!
//! Owns the rules for entries. Never writes to a path that an archive names. The thing to know:
//! every byte that comes out is counted as it comes, so a small archive cannot become a large
//! directory.

use super::received::{Budget, Files};
use crate::adapters::format::names::GGUF;
use crate::database::write_failed;
use crate::error::{Error, Result, brief};
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Component, Path};
use zip::unstable::read::ZipIterable;

/// Entries of an archive, at most.
const ENTRIES_MAX: usize = 1000;
/// Longest extension record of a tar (long names, times): they are read into memory.
const EXTENSION_BYTES_MAX: u64 = 64 << 10;

/// Unpacks the archive at `spool` into the places that `files` gives.
pub fn unpack(spool: &Path, files: &mut Files) -> Result<()> {
    let mut file = File::open(spool).map_err(io)?;
    let mut head = [0u8; 264];
    let mut filled = 0;
    while filled < head.len() {
        match file.read(&mut head[filled..]).map_err(io)? {
            0 => break,
            n => filled += n,
        }
    }
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    if head.starts_with(b"PK") {
        unzip(file, files)
    } else if head.starts_with(&[0x1f, 0x8b]) {
        let inflated = spool.with_extension("inflated");
        untar(inflate(file, &inflated, files.budget.clone())?, files)?;
        std::fs::remove_file(&inflated).map_err(io)
    } else if head.starts_with(b"GGUF") {
        match files.place(GGUF)? {
            Some(place) => copy(&mut file, &place, &mut files.budget).map(drop),
            None => Ok(()),
        }
    } else if &head[257..262] == b"ustar" {
        untar(file, files)
    } else {
        Err(invalid("it is neither tar, tar.gz, zip nor GGUF"))
    }
}

fn io(e: std::io::Error) -> Error {
    write_failed("unpacking the upload failed", &e)
}

fn invalid(reason: impl std::fmt::Display) -> Error {
    Error::invalid("invalid_archive", format!("the archive cannot be read: {reason}"))
}

/// Writes a gzip's content to `place`; it does not stay, so the bytes are counted on a copy of the
/// budget.
fn inflate(file: File, place: &Path, mut budget: Budget) -> Result<File> {
    let mut inflating = flate2::read::MultiGzDecoder::new(file);
    copy(&mut inflating, place, &mut budget)?;
    File::open(place).map_err(io)
}

/// Where entries belong: their plain names count, and they may stand in one directory; everything
/// deeper is not the adapter's.
struct Names {
    /// The directory of the first file that was taken.
    home: Option<String>,
    entries: usize,
}

impl Names {
    fn new() -> Self {
        Self { home: None, entries: 0 }
    }

    fn count(&mut self) -> Result<()> {
        self.entries += 1;
        if self.entries > ENTRIES_MAX {
            return Err(invalid(format!("it has more than {ENTRIES_MAX} entries")));
        }
        Ok(())
    }

    /// The place for the entry `path`, by its last part. Errors: `archive_path_not_allowed` for a
    /// path that leads out, `ambiguous_upload` for an adapter's files in two directories.
    fn place(&mut self, path: &str, files: &mut Files) -> Result<Option<std::path::PathBuf>> {
        let shown = brief(path);
        let outside = || {
            Error::invalid(
                "archive_path_not_allowed",
                format!("the archive's entry `{shown}` leads out of it"),
            )
        };
        if path.contains(['\\', '\0']) {
            return Err(outside());
        }
        let mut parts = Vec::new();
        for component in Path::new(path).components() {
            match component {
                Component::Normal(part) => parts.push(part.to_str().ok_or_else(outside)?),
                Component::CurDir => {}
                _ => return Err(outside()),
            }
        }
        let (folder, name) = match parts[..] {
            [name] => ("", name),
            [folder, name] => (folder, name),
            // Deeper files (checkpoints) are listed whole, so that they match no name.
            _ => return files.place(&format!("{shown}/")),
        };
        let place = files.place(name)?;
        if place.is_some() {
            let home = self.home.get_or_insert_with(|| folder.to_owned());
            if home != folder {
                return Err(Error::invalid(
                    "ambiguous_upload",
                    format!("the archive has adapter files in `{home}/` and in `{folder}/`"),
                ));
            }
        }
        Ok(place)
    }
}

fn link(path: &str) -> Error {
    let shown = brief(path);
    Error::invalid(
        "archive_link_not_allowed",
        format!("the archive's entry `{shown}` is not a plain file or directory"),
    )
}

fn untar(mut file: File, files: &mut Files) -> Result<()> {
    // First the raw records: the reader below takes long names into memory, whatever length they
    // claim.
    let mut raw = tar::Archive::new(&file);
    for (count, entry) in raw.entries().map_err(invalid)?.raw(true).enumerate() {
        let entry = entry.map_err(invalid)?;
        let kind = entry.header().entry_type();
        let extension = kind.is_pax_local_extensions()
            || kind.is_pax_global_extensions()
            || kind.is_gnu_longname()
            || kind.is_gnu_longlink();
        if extension && entry.size() > EXTENSION_BYTES_MAX || count > 3 * ENTRIES_MAX {
            return Err(invalid("its headers are too large"));
        }
    }
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    let mut names = Names::new();
    let mut archive = tar::Archive::new(file);
    for entry in archive.entries().map_err(invalid)? {
        let mut entry = entry.map_err(invalid)?;
        names.count()?;
        let path = entry.path_bytes().into_owned();
        let path = String::from_utf8_lossy(&path).into_owned();
        let kind = entry.header().entry_type();
        if kind.is_dir() || kind.is_pax_global_extensions() {
            continue;
        }
        if !kind.is_file() {
            return Err(link(&path));
        }
        if let Some(place) = names.place(&path, files)? {
            let copied = copy(&mut entry, &place, &mut files.budget)?;
            if copied != entry.size() {
                return Err(invalid("it ends within an entry"));
            }
        }
    }
    Ok(())
}

/// Entry by entry, without a table of them: a reader that makes one believes whatever number the
/// end of the file says.
fn unzip(file: File, files: &mut Files) -> Result<()> {
    let contents = file.try_clone().map_err(io)?;
    let mut archive = ZipIterable::try_new(file, zip::read::Config::default()).map_err(invalid)?;
    if archive.len() > ENTRIES_MAX {
        return Err(invalid(format!("it has more than {ENTRIES_MAX} entries")));
    }
    let mut names = Names::new();
    let options = zip::ZipReadOptions::default();
    let mut entries = archive.files_with_reader(contents, options).map_err(invalid)?;
    while let Some(entry) = entries.next() {
        let mut entry = entry.map_err(invalid)?;
        names.count()?;
        let path = entry.name().map_err(invalid)?.into_owned();
        if entry.is_symlink() {
            return Err(link(&path));
        }
        if entry.is_dir() {
            continue;
        }
        if let Some(place) = names.place(&path, files)? {
            copy(&mut entry, &place, &mut files.budget)?;
        }
    }
    Ok(())
}

/// Copies an entry to its place, counting as it goes. Returns the bytes.
fn copy(from: &mut impl Read, place: &Path, budget: &mut Budget) -> Result<u64> {
    let mut to = File::create_new(place).map_err(io)?;
    let mut buffer = vec![0u8; 1 << 16];
    let mut copied = 0;
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => return to.flush().map(|()| copied).map_err(io),
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) => return Err(invalid(e)),
        };
        budget.spend(n)?;
        copied += n as u64;
        to.write_all(&buffer[..n]).map_err(io)?;
    }
}
