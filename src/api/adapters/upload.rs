//! From the body of an upload to the files of an adapter in a staging directory.
//!
//! Owns how many bytes are taken and in which wrappings. Never parses a file and never makes a path
//! of a client's name: the staging says where a name belongs, if anywhere. The thing to know: the
//! bytes go to disk as they come.

use super::archive;
use super::received::{Budget, Files, too_large};
use crate::adapters::format::files::{canonical_name, is_archive};
use crate::adapters::registry::Staging;
use crate::api::Api;
use crate::api::http::body::declared_length;
use crate::api::http::errors::UNSUPPORTED_MEDIA_TYPE;
use crate::api::http::intake::UPLOAD_BYTES;
use crate::api::http::paced::{Paced, Reins};
use crate::blocking::blocking;
use crate::database::write_failed;
use crate::error::{Error, Result};
use axum::body::Body;
use axum::extract::multipart::Field;
use axum::extract::{FromRequest, Multipart, Request};
use bytes::Bytes;
use futures::StreamExt;
use http::header::CONTENT_TYPE;
use std::path::Path;
use tokio::fs::File;
use tokio::io::AsyncWriteExt;

/// Where an archive waits to be unpacked; gone before the registry looks.
const SPOOL: &str = ".upload";
/// Parts of a form, at most.
const PARTS_MAX: usize = 1000;

/// Reads the body into the staging directory. What is missing there is the registry's to say.
pub async fn receive(request: Request, staging: Staging, api: &Api) -> Result<Files> {
    let config = &api.config;
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
    let files = Files::new(staging, bytes_max, api.registry.clone());
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
        // A part that is called as the file is to be called says so, whatever was its name there.
        let known = field.name().filter(|part| canonical_name(part).is_some());
        let name = known.or(field.file_name()).or(field.name()).unwrap_or_default();
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
    let unpack = move || {
        archive::unpack(&spool, &mut files)?;
        std::fs::remove_file(&spool)
            .map_err(|e| write_failed("removing the spooled upload failed", &e))?;
        Ok(files)
    };
    blocking(unpack).await
}
