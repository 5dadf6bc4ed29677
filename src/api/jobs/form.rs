//! A form with one file in it: the file to the disk as it comes, the other fields to text.
//!
//! Owns how much of a form is taken and which fields it may have. Never makes a path of a client's
//! name. The thing to know: one thread writes, hashes and looks at lines while the next bytes come.

use crate::access::Caller;
use crate::adapters::actor::Tenant;
use crate::api::Api;
use crate::api::http::auth::tenant;
use crate::api::http::body::{declared_length, missing};
use crate::api::http::errors::{UNSUPPORTED_MEDIA_TYPE, invalid_value};
use crate::api::http::intake::UPLOAD_BYTES;
use crate::api::http::paced::{Paced, Reins};
use crate::blocking::blocking;
use crate::error::{Error, Result, brief};
use crate::files::{Incoming, Received, too_large};
use axum::body::Body;
use axum::extract::multipart::Field;
use axum::extract::{FromRequest, Multipart, Request};
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use std::collections::BTreeMap;
use tokio::sync::mpsc;

/// Heads of parts, boundaries and other fields, beside the file.
const FRAME_BYTES_MAX: u64 = 64 << 10;
/// Of one field that is text.
const TEXT_BYTES_MAX: usize = 1 << 10;
/// Parts of a form, at most.
const PARTS_MAX: usize = 16;
/// Pieces that wait for the disk.
const PIECES_MAX: usize = 4;
/// Bytes to the disk between two looks at what is left there.
const DISK_STEP: u64 = 256 << 10;
const FILENAME_CHARS_MAX: usize = 255;
/// What OpenAI's clients call a file without a name.
const NAMELESS: &str = "upload";

/// What a form may hold.
pub struct Form<'a> {
    /// The field with the file.
    pub file: &'static str,
    /// Fields that are text.
    pub texts: &'static [&'static str],
    /// Refuses a text as soon as it is there.
    pub check: fn(&str, &str) -> Result<()>,
    /// Where the file goes, and how large it may be.
    pub incoming: Incoming,
    pub bytes_max: u64,
    pub api: &'a Api,
    pub caller: &'a Caller,
}

/// What it held.
pub struct Filled {
    pub received: Received,
    /// The file's name, without directories.
    pub filename: String,
    pub texts: BTreeMap<String, String>,
}

/// Reads the form. Errors: `missing_parameter` where it has no file.
pub async fn read(request: Request, form: Form<'_>) -> Result<Filled> {
    let kind = request.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok());
    let kind = kind.and_then(|v| v.split(';').next()).unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("multipart/form-data") {
        let file = form.file;
        let message = format!("the body must be multipart/form-data with the file in `{file}`");
        return Err(Error::invalid(UNSUPPORTED_MEDIA_TYPE, message));
    }
    let most = form.bytes_max + FRAME_BYTES_MAX;
    let declared = declared_length(&request).unwrap_or(0);
    if declared > most {
        return Err(too_large(form.bytes_max).param(form.file));
    }
    let least = declared.saturating_sub(FRAME_BYTES_MAX);
    form.api.registry.check_bytes(&tenant(form.caller), least, 0)?;
    let (head, body) = request.into_parts();
    let body = Paced::new(body, form.api.config.body_seconds_max);
    let reins = body.reins();
    let request = Request::from_parts(head, Body::from_stream(body));
    // A form's parser has words of its own for a body that ended early.
    parts(request, form, most, &reins).await.map_err(|e| match e.code {
        "incomplete_body" => reins.ended().unwrap_or(e),
        _ => e,
    })
}

async fn parts(request: Request, form: Form<'_>, most: u64, reins: &Reins) -> Result<Filled> {
    let (name, api, caller) = (form.file, form.api, form.caller);
    let mut multipart =
        Multipart::from_request(request, &()).await.map_err(|e| broken(&e.body_text()))?;
    let mut incoming = Some(form.incoming);
    let (mut file, mut texts) = (None, BTreeMap::new());
    for _ in 0..PARTS_MAX {
        // The parser keeps a part's head in memory until it is whole, however long it is.
        let more = (reins.came() + UPLOAD_BYTES).min(most);
        let head = broken(&format!("a part's head is longer than {UPLOAD_BYTES} bytes"));
        reins.limit(more, if more == most { too_large(form.bytes_max) } else { head });
        let field = multipart.next_field().await;
        reins.limit(most, too_large(form.bytes_max));
        let Some(field) = field.map_err(|e| broken(&e.body_text()))? else {
            let (received, filename) = file.ok_or_else(|| missing(name))?;
            return Ok(Filled { received, filename, texts });
        };
        let part = field.name().unwrap_or_default().to_owned();
        if part == name {
            let Some(incoming) = incoming.take() else {
                let message = format!("the form has `{name}` twice; one file at a time");
                return Err(Error::invalid("duplicate_file", message).param(name));
            };
            let filename = plain_name(field.file_name().unwrap_or_default());
            file = Some((write(field, incoming, api, caller).await?, filename));
        } else if form.texts.contains(&part.as_str()) {
            let text = text(field, &part).await?;
            (form.check)(&part, &text)?;
            if texts.insert(part.clone(), text).is_some() {
                return Err(invalid_value(&part, format!("`{part}` is there twice")));
            }
        } else {
            let shown = brief(&part);
            let message = format!("unknown field `{shown}` in the form");
            return Err(Error::invalid("unknown_parameter", message).param(shown));
        }
    }
    Err(broken(&format!("the form has more than {PARTS_MAX} parts")))
}

/// Writes a part to the disk while it comes.
async fn write(
    mut field: Field<'_>,
    mut incoming: Incoming,
    api: &Api,
    caller: &Caller,
) -> Result<Received> {
    let (pieces, mut coming) = mpsc::channel::<Bytes>(PIECES_MAX);
    let written = blocking(move || {
        while let Some(piece) = coming.blocking_recv() {
            incoming.write(&piece)?;
        }
        Ok(incoming)
    });
    let tenant = tenant(caller);
    let sent = async {
        let sent = hand_over(&mut field, &pieces, api, &tenant).await;
        drop(pieces);
        sent
    };
    let (sent, written) = tokio::join!(sent, written);
    // What the disk said is the answer.
    let (incoming, sent) = (written?, sent?);
    if sent == 0 {
        let part = field.name().unwrap_or_default();
        return Err(invalid_value(part, format!("`{part}` is empty")));
    }
    api.registry.check_bytes(&tenant, sent, sent)?;
    blocking(move || incoming.finish()).await
}

/// Gives the writer what comes, and says how much that was.
async fn hand_over(
    field: &mut Field<'_>,
    pieces: &mpsc::Sender<Bytes>,
    api: &Api,
    tenant: &Tenant,
) -> Result<u64> {
    let (mut sent, mut asked) = (0, 0);
    while let Some(piece) = field.chunk().await.map_err(|e| broken(&e.body_text()))? {
        sent += piece.len() as u64;
        if pieces.send(piece).await.is_err() {
            break;
        }
        if sent - asked >= DISK_STEP {
            api.registry.check_bytes(tenant, sent, sent)?;
            asked = sent;
        }
    }
    Ok(sent)
}

async fn text(mut field: Field<'_>, name: &str) -> Result<String> {
    let mut bytes = Vec::new();
    while let Some(piece) = field.chunk().await.map_err(|e| broken(&e.body_text()))? {
        bytes.extend_from_slice(&piece);
        if bytes.len() > TEXT_BYTES_MAX {
            let message = format!("`{name}` is longer than {TEXT_BYTES_MAX} bytes");
            return Err(invalid_value(name, message));
        }
    }
    String::from_utf8(bytes).map_err(|_| invalid_value(name, format!("`{name}` is not UTF-8")))
}

/// A name for people: without directories, without what cannot be shown.
pub fn plain_name(given: &str) -> String {
    let last = given.rsplit(['/', '\\']).next().unwrap_or_default();
    let shown = last.chars().filter(|c| !c.is_control()).take(FILENAME_CHARS_MAX);
    let shown: String = shown.collect();
    match shown.trim() {
        "" | "." | ".." => NAMELESS.to_owned(),
        name => name.to_owned(),
    }
}

fn broken(reason: &str) -> Error {
    Error::invalid("incomplete_body", format!("the upload could not be read: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_files_name_leads_nowhere() {
        for (given, plain) in [
            ("train.jsonl", "train.jsonl"),
            ("../../etc/passwd", "passwd"),
            ("C:\\data\\a b.jsonl", "a b.jsonl"),
            ("..", "upload"),
            ("a/", "upload"),
            ("", "upload"),
            ("\0\r\nx: y", "x: y"),
            ("ä.jsonl", "ä.jsonl"),
        ] {
            assert_eq!(plain_name(given), plain);
        }
        assert_eq!(plain_name(&"ä".repeat(1000)).chars().count(), 255);
    }
}
