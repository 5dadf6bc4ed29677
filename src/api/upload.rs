//! From the body of an upload to the files of an adapter in a staging directory.
//!
//! Owns how many bytes are taken and in which wrappings. Never parses a file and never makes a path
//! of a client's name: the staging says where a name belongs, if anywhere. The thing to know: the
//! bytes go to disk as they come.

use super::Api;
use super::archive;
use super::body::declared_length;
use super::errors::UNSUPPORTED_MEDIA_TYPE;
use super::intake::UPLOAD_BYTES;
use super::paced::{Paced, Reins};
use crate::adapters::registry::{Registry, Staging};
use crate::database::write_failed;
use crate::error::{Error, Kind, Result};
use axum::body::Body;
use axum::extract::multipart::Field;
use axum::extract::{FromRequest, Multipart, Request};
use bytes::Bytes;
use futures::StreamExt;
use http::header::CONTENT_TYPE;
use std::path::{Path, PathBuf};
use tokio::fs::File;
use tokio::io::AsyncWriteExt;

/// A GGUF adapter that comes without a name.
pub const GGUF: &str = "adapter.gguf";
/// Where an archive waits to be unpacked; gone before the registry looks.
const SPOOL: &str = ".upload";
/// Bytes to the disk between two looks at what is left there.
const DISK_STEP: usize = 256 << 10;
/// Names listed back to the client, at most.
const IGNORED_MAX: usize = 64;
/// Parts of a form, at most.
const PARTS_MAX: usize = 1000;

/// Bytes that may still come.
#[derive(Clone)]
pub struct Budget {
    left: u64,
    bytes_max: u64,
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
    fn new(staging: Staging, bytes_max: u64, registry: Registry) -> Self {
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
        let shown: String = name.chars().take(200).collect();
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

fn too_large(bytes_max: u64) -> Error {
    Error::new(
        Kind::TooLarge,
        "upload_too_large",
        format!("the upload is larger than upload_bytes_max = {bytes_max}"),
    )
}

/// Reads the body into the staging directory. What is missing there is the registry's to say.
pub(super) async fn receive(request: Request, staging: Staging, api: &Api) -> Result<Files> {
    let config = &api.app.config;
    let bytes_max = config.upload_bytes_max.0;
    let declared = declared_length(&request);
    let (head, body) = request.into_parts();
    let body = Paced::new(body, config.body_seconds_max);
    if declared.is_some_and(|n| n > bytes_max) {
        return Err(too_large(bytes_max));
    }
    let reins = body.reins();
    let request = Request::from_parts(head, Body::from_stream(body));
    // A form's parser has words of its own for a body that ended early.
    let files = Files::new(staging, bytes_max, api.app.registry.clone());
    gather(request, files, &reins).await.map_err(|e| match e.code {
        "incomplete_body" => reins.ended().unwrap_or(e),
        _ => e,
    })
}

async fn gather(request: Request, files: Files, reins: &Reins) -> Result<Files> {
    let content_type = request.headers().get(CONTENT_TYPE);
    let content_type = content_type.and_then(|v| v.to_str().ok()).unwrap_or_default();
    let content_type = content_type.split(';').next().unwrap_or_default().trim();
    match content_type.to_ascii_lowercase().as_str() {
        "multipart/form-data" => parts(request, files, reins).await,
        "application/json" | "application/x-www-form-urlencoded" | "text/plain" => {
            Err(Error::invalid(
                UNSUPPORTED_MEDIA_TYPE,
                "an upload is multipart/form-data, or a tar, tar.gz, zip or .gguf file as the body \
                 with `Content-Type: application/octet-stream`, which `curl --data-binary` must be \
                 told by -H",
            ))
        }
        _ => {
            let chunks = request.into_body().into_data_stream();
            let chunks = chunks.map(|c| c.map_err(|e| broken(&e.to_string())));
            archive(chunks, files).await
        }
    }
}

fn broken(reason: &str) -> Error {
    Error::invalid("incomplete_body", format!("the upload could not be read: {reason}"))
}

async fn parts(request: Request, mut files: Files, reins: &Reins) -> Result<Files> {
    let mut form =
        Multipart::from_request(request, &()).await.map_err(|e| broken(&e.body_text()))?;
    // What stands between the contents is of the upload too.
    let bytes_max = files.budget.bytes_max;
    for _ in 0..PARTS_MAX {
        // The parser keeps a part's head in memory until it is whole, however long it is.
        let head = format!("a part's head is longer than {UPLOAD_BYTES} bytes");
        let more = (reins.came() + UPLOAD_BYTES).min(bytes_max);
        reins.limit(more, if more == bytes_max { too_large(bytes_max) } else { broken(&head) });
        let field = form.next_field().await;
        reins.limit(bytes_max, too_large(bytes_max));
        let Some(field) = field.map_err(|e| broken(&e.body_text()))? else {
            return Ok(files);
        };
        let name = field.file_name().or(field.name()).unwrap_or_default();
        if is_archive(name) {
            files = archive(contents(field), files).await?;
        } else {
            // Some clients send the path on their own disk; only its last part names the file.
            let name = name.rsplit(['/', '\\']).next().unwrap_or_default();
            let place = files.place(name)?;
            write(contents(field), place.as_deref(), &mut files.budget).await?;
        }
    }
    Err(broken(&format!("the form has more than {PARTS_MAX} parts")))
}

/// Whether a file so named is unpacked.
pub fn is_archive(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    [".zip", ".tar", ".tar.gz", ".tgz"].iter().any(|end| name.ends_with(end))
}

fn contents(field: Field<'_>) -> impl futures::Stream<Item = Result<Bytes>> + Unpin {
    Box::pin(field.map(|chunk| chunk.map_err(|e| broken(&e.body_text()))))
}

/// Writes what comes to `place`, or nowhere; counts it either way.
async fn write(
    mut chunks: impl futures::Stream<Item = Result<Bytes>> + Unpin,
    place: Option<&Path>,
    budget: &mut Budget,
) -> Result<()> {
    let failed = |e: std::io::Error| write_failed("writing the upload failed", &e);
    let mut file = match place {
        None => None,
        Some(place) => Some(File::create_new(place).await.map_err(failed)?),
    };
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk?;
        budget.spend(chunk.len())?;
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
    let spool = files.staging.dir.join(SPOOL);
    // The spool does not stay: what comes out of it is counted in its stead.
    let mut budget = files.budget.clone();
    write(chunks, Some(&spool), &mut budget).await?;
    let unpacked = tokio::task::spawn_blocking(move || {
        archive::unpack(&spool, &mut files)?;
        std::fs::remove_file(&spool)
            .map_err(|e| write_failed("removing the spooled upload failed", &e))?;
        Ok(files)
    });
    unpacked.await.map_err(|_| Error::fault("unpacking the upload failed"))?
}
