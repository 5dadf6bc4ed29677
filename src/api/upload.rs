//! From the body of an upload to the files of an adapter in a staging directory.
//!
//! Owns which files are taken and how many bytes. Never parses them. The thing to know: names from the client choose between
//! three fixed kinds and never become paths; the bytes go to disk as they come.

use super::archive;
use super::body::{declared_length, discard};
use super::errors::UNSUPPORTED_MEDIA_TYPE;
use crate::error::{Error, Kind, Result};
use axum::extract::multipart::Field;
use axum::extract::{FromRequest, Multipart, Request};
use bytes::Bytes;
use futures::StreamExt;
use http::header::CONTENT_TYPE;
use std::path::{Path, PathBuf};
use tokio::fs::File;
use tokio::io::AsyncWriteExt;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// A GGUF adapter under a name of our own.
const GGUF: &str = "adapter.gguf";
/// Where an archive waits to be unpacked; gone before the registry looks.
const SPOOL: &str = ".upload";
/// Names listed back to the client, at most.
const IGNORED_MAX: usize = 64;

/// What came of an upload, as it is gathered.
pub struct Files {
    dir: PathBuf,
    /// Taken, under our names.
    taken: Vec<&'static str>,
    pickles: Vec<String>,
    ignored: Vec<String>,
    /// Bytes still allowed over all files.
    left: u64,
    bytes_max: u64,
}

impl Files {
    pub fn new(dir: &Path, bytes_max: u64) -> Self {
        Self {
            dir: dir.to_owned(),
            taken: Vec::new(),
            pickles: Vec::new(),
            ignored: Vec::new(),
            left: bytes_max,
            bytes_max,
        }
    }

    /// Where the file `name` is to be written; `None` when an adapter does not need it.
    pub fn place(&mut self, name: &str) -> Result<Option<PathBuf>> {
        let lower = name.to_ascii_lowercase();
        let ours = match name {
            CONFIG => CONFIG,
            WEIGHTS => WEIGHTS,
            _ if lower.ends_with(".gguf") => GGUF,
            _ => {
                let pickles = [".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"];
                let shown: String = name.chars().take(200).collect();
                if pickles.iter().any(|end| lower.ends_with(end))
                    && self.pickles.len() < IGNORED_MAX
                {
                    self.pickles.push(shown.clone());
                }
                if self.ignored.len() < IGNORED_MAX {
                    self.ignored.push(shown);
                }
                return Ok(None);
            }
        };
        if self.taken.contains(&ours) {
            return Err(Error::invalid(
                "duplicate_file",
                format!("the upload has `{ours}` twice"),
            ));
        }
        self.taken.push(ours);
        Ok(Some(self.dir.join(ours)))
    }

    /// As many bytes again as are left, for a copy that does not stay.
    pub fn allowance(&self) -> Self {
        Self {
            bytes_max: self.bytes_max,
            ..Self::new(&self.dir, self.left)
        }
    }

    /// Accounts for bytes about to be written.
    pub fn spend(&mut self, bytes: usize) -> Result<()> {
        let left = self.left.checked_sub(bytes as u64);
        self.left = left.ok_or_else(|| too_large(self.bytes_max))?;
        Ok(())
    }

    /// The names that were ignored, when what was taken is an adapter.
    fn settle(self) -> Result<Vec<String>> {
        let has = |name| self.taken.contains(&name);
        match (has(CONFIG), has(WEIGHTS), has(GGUF)) {
            (true, true, false) | (false, false, true) => Ok(self.ignored),
            (_, _, true) => Err(Error::unprocessable(
                "ambiguous_upload",
                "the upload has both a .gguf and PEFT files; send one adapter",
            )),
            (_, false, false) if !self.pickles.is_empty() => Err(Error::unprocessable(
                "pickle_not_allowed",
                format!(
                    "`{}` is a pickle, which can run code; save the adapter as {WEIGHTS}",
                    self.pickles[0]
                ),
            )),
            (config, ..) => {
                let missing = if config { WEIGHTS } else { CONFIG };
                Err(Error::unprocessable(
                    "missing_file",
                    format!(
                        "the upload has no `{missing}` (an adapter is {CONFIG} and {WEIGHTS}, or one .gguf)"
                    ),
                ))
            }
        }
    }
}

fn too_large(bytes_max: u64) -> Error {
    Error::new(
        Kind::TooLarge,
        "upload_too_large",
        format!("the upload is larger than upload_bytes_max = {bytes_max}"),
    )
}

/// Reads the body into `dir`; returns the names of files it left out.
pub async fn receive(request: Request, dir: &Path, bytes_max: u64) -> Result<Vec<String>> {
    if declared_length(&request).is_some_and(|n| n > bytes_max) {
        discard(request.into_body().into_data_stream()).await;
        return Err(too_large(bytes_max));
    }
    let content_type = request.headers().get(CONTENT_TYPE);
    let content_type = content_type
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default();
    let content_type = content_type.split(';').next().unwrap_or_default().trim();
    let mut files = Files::new(dir, bytes_max);
    match content_type.to_ascii_lowercase().as_str() {
        "multipart/form-data" => parts(request, &mut files).await?,
        "application/json" | "application/x-www-form-urlencoded" | "text/plain" => {
            return Err(Error::invalid(
                UNSUPPORTED_MEDIA_TYPE,
                "an upload is multipart/form-data, or a tar, tar.gz, zip or .gguf file as the body",
            ));
        }
        _ => {
            let chunks = request.into_body().into_data_stream();
            let chunks = chunks.map(|c| c.map_err(|e| broken(&e.to_string())));
            files = archive(chunks, files).await?;
        }
    }
    files.settle()
}

fn broken(reason: &str) -> Error {
    Error::invalid(
        "incomplete_body",
        format!("the upload could not be read: {reason}"),
    )
}

async fn parts(request: Request, files: &mut Files) -> Result<()> {
    let mut form = Multipart::from_request(request, &())
        .await
        .map_err(|e| broken(&e.body_text()))?;
    loop {
        let field = form
            .next_field()
            .await
            .map_err(|e| broken(&e.body_text()))?;
        let Some(field) = field else {
            return Ok(());
        };
        let name = field
            .file_name()
            .or(field.name())
            .unwrap_or_default()
            .to_owned();
        if is_archive(&name) {
            let empty = files.allowance();
            let whole = std::mem::replace(files, empty);
            *files = archive(contents(field), whole).await?;
        } else {
            // Some clients send the path on their own disk; only its last part names the file.
            let name = name.rsplit(['/', '\\']).next().unwrap_or_default();
            let place = files.place(name)?;
            write(contents(field), place.as_deref(), files).await?;
        }
    }
}

fn is_archive(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    [".zip", ".tar", ".tar.gz", ".tgz"]
        .iter()
        .any(|end| name.ends_with(end))
}

fn contents(field: Field<'_>) -> impl futures::Stream<Item = Result<Bytes>> + Unpin {
    Box::pin(field.map(|chunk| chunk.map_err(|e| broken(&e.body_text()))))
}

/// Writes what comes to `place`, or nowhere; counts it either way.
async fn write(
    mut chunks: impl futures::Stream<Item = Result<Bytes>> + Unpin,
    place: Option<&Path>,
    files: &mut Files,
) -> Result<()> {
    let failed = |e: std::io::Error| Error::fault(format!("writing the upload failed: {e}"));
    let mut file = match place {
        None => None,
        Some(place) => Some(File::create_new(place).await.map_err(failed)?),
    };
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk?;
        if let Err(error) = files.spend(chunk.len()) {
            discard(chunks).await;
            return Err(error);
        }
        if let Some(file) = &mut file {
            file.write_all(&chunk).await.map_err(failed)?;
        }
    }
    if let Some(mut file) = file {
        file.flush().await.map_err(failed)?;
    }
    Ok(())
}

/// Spools an archive (or a GGUF file) and unpacks it on a blocking thread.
async fn archive(
    chunks: impl futures::Stream<Item = Result<Bytes>> + Unpin,
    mut files: Files,
) -> Result<Files> {
    let spool = files.dir.join(SPOOL);
    let mut spooled = files.allowance();
    write(chunks, Some(&spool), &mut spooled).await?;
    let unpacked = tokio::task::spawn_blocking(move || {
        let result = archive::unpack(&spool, &mut files);
        let removed = std::fs::remove_file(&spool);
        result?;
        removed.map_err(|e| Error::fault(format!("removing the spooled upload failed: {e}")))?;
        Ok(files)
    });
    unpacked
        .await
        .map_err(|_| Error::fault("unpacking the upload failed"))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settle(names: &[&str]) -> Result<Vec<String>, &'static str> {
        let mut files = Files::new(Path::new("/nowhere"), 10);
        for name in names {
            files.place(name).map_err(|e| e.code)?;
        }
        files.settle().map_err(|e| e.code)
    }

    #[test]
    fn files_that_are_not_needed_are_named_and_pickles_alone_are_refused() {
        let both = [CONFIG, WEIGHTS, "README.md", "training_args.bin"];
        assert_eq!(
            settle(&both),
            Ok(vec!["README.md".to_owned(), "training_args.bin".to_owned()])
        );
        assert_eq!(
            settle(&[CONFIG, "adapter_model.bin"]),
            Err("pickle_not_allowed")
        );
        assert_eq!(settle(&[CONFIG]), Err("missing_file"));
        assert_eq!(settle(&[WEIGHTS]), Err("missing_file"));
        assert_eq!(settle(&["a.gguf"]), Ok(vec![]));
        assert_eq!(settle(&["a.gguf", "b.gguf"]), Err("duplicate_file"));
        assert_eq!(settle(&["a.gguf", CONFIG]), Err("ambiguous_upload"));
    }

    #[test]
    fn bytes_over_all_files_are_counted() {
        let mut files = Files::new(Path::new("/nowhere"), 10);
        assert!(files.spend(10).is_ok());
        let e = files.spend(1).unwrap_err();
        assert_eq!((e.code, e.kind), ("upload_too_large", Kind::TooLarge));
    }
}
