//! Uploads in parts: begun, filled in any order, put together or cancelled.
//!
//! Owns what may follow what. Never trusts a count: the parts that are named must come to the bytes
//! that were said. The thing to know: parts are kept through a restart, and an upload is forgotten
//! an hour after it was begun, whatever became of it.

use super::file::{FileRow, NewFile, Part, State, Upload};
use super::incoming::{Incoming, Received, too_large};
use super::{Files, Inner, owner, share};
use crate::blocking::blocking;
use crate::clock::Now;
use crate::error::{Error, Kind, Result, brief};
use std::collections::HashSet;

/// As OpenAI's.
const LIFETIME_SECONDS: u64 = 3600;
/// Parts of 1 MiB for the largest file, and as many again.
const PARTS_MAX: usize = 1024;
/// A client that does not know whether a part arrived sends it again: so many times the bytes of
/// the file may lie there.
const SPARE: u64 = 2;

impl Files {
    /// Begins an upload of `bytes`. Errors: `file_too_large`, `invalid_value`,
    /// `upload_limit_reached`, `tenant_share_exceeded`, `storage_full`.
    pub async fn begin_upload(&self, new: NewFile, bytes: u64) -> Result<Upload> {
        let limits = self.inner.limits;
        if bytes > limits.file_bytes_max {
            return Err(too_large(limits.file_bytes_max).param("bytes"));
        }
        if bytes == 0 {
            let message = "`bytes` must be 1 at least: an empty file is of no use";
            return Err(Error::invalid("invalid_value", message).param("bytes"));
        }
        let _naming = self.inner.naming.lock().await;
        let mut pending = self.inner.rows.uploads().await?;
        pending.retain(|upload| upload.state == State::Pending);
        let (all, most) = (pending.len() as u64, limits.uploads_max);
        if all >= most {
            let message = format!("{most} uploads are not over, which is the limit");
            return Err(Error::new(Kind::Busy, "upload_limit_reached", message));
        }
        let own = pending.iter().filter(|upload| upload.tenant == new.tenant).count();
        share(new.tenant.as_deref(), "uploads in parts", own as u64, most - all)?;
        let created = Now::read().wall.as_secs();
        let upload = Upload {
            id: format!("upload_{:032x}", rand::random::<u128>()),
            tenant: new.tenant,
            bytes,
            name: new.name,
            purpose: new.purpose,
            lifetime: new.lifetime,
            created,
            expires: created + LIFETIME_SECONDS,
            state: State::Pending,
            file: None,
        };
        self.inner.rows.add_upload(&upload).await?;
        Ok(upload)
    }

    /// A fresh content for a part of an upload. Errors: `upload_not_found`, `upload_over`,
    /// `storage_full`.
    pub async fn receive_part(&self, upload: &str, tenant: Option<&str>) -> Result<Incoming> {
        let upload = self.inner.pending(upload, tenant).await?;
        let incoming = self.inner.blobs.incoming(upload.bytes)?;
        Ok(incoming.counted(self.inner.tally.begin(owner(&upload.tenant))))
    }

    /// Adds a part: it is on disk when this returns. Errors: `upload_not_found`, `upload_over`,
    /// `upload_mismatch`, `storage_full`.
    pub async fn add_part(
        &self,
        upload: &str,
        tenant: Option<&str>,
        received: Received,
    ) -> Result<Part> {
        let _naming = self.inner.naming.lock().await;
        let upload = self.inner.pending(upload, tenant).await?;
        let parts = self.inner.rows.parts(Some(&upload.id)).await?;
        let held: u64 = parts.iter().map(|part| part.bytes).sum();
        let room = (SPARE * upload.bytes).saturating_sub(held);
        if received.bytes == 0 || received.bytes > room || parts.len() >= PARTS_MAX {
            let message = format!(
                "a part of {} bytes: the upload is of {} bytes and has {held} in {} parts; at \
                 most {PARTS_MAX} parts, with twice its bytes in all, none of them empty",
                received.bytes,
                upload.bytes,
                parts.len()
            );
            return Err(Error::invalid("upload_mismatch", message).param("data"));
        }
        let part = Part {
            id: format!("part_{:032x}", rand::random::<u128>()),
            upload: upload.id,
            bytes: received.bytes,
            created: Now::read().wall.as_secs(),
        };
        let (blobs, id) = (self.inner.blobs.clone(), part.id.clone());
        let received = blocking(move || blobs.keep_part(&received, &id).map(|()| received)).await?;
        if let Err(error) = self.inner.rows.add_part(&part).await {
            self.inner.discard_parts(vec![part.id]).await?;
            return Err(error);
        }
        received.keep();
        Ok(part)
    }

    /// Puts the named parts together, in this order, into a file. A second time answers the same.
    /// Errors: `upload_not_found`, `upload_over`, `upload_mismatch`, `invalid_value`,
    /// `file_limit_reached`, `tenant_share_exceeded`, `storage_full`.
    pub async fn complete(
        &self,
        upload: &str,
        tenant: Option<&str>,
        part_ids: &[String],
        md5: Option<&str>,
    ) -> Result<(Upload, FileRow)> {
        let inner = &self.inner;
        let upload = inner.upload(upload, tenant).await?;
        let _alone = inner.guards.take_alone(&upload.id).ok_or_else(|| {
            let message = "the upload is being put together by another request";
            Error::new(Kind::Conflict, "upload_over", message)
        })?;
        // Another request may have ended it before.
        let upload = inner.upload(&upload.id, tenant).await?;
        match (upload.state, &upload.file) {
            (State::Completed, Some(id)) => {
                let file = inner.file(id, tenant).await?;
                return Ok((upload, file));
            }
            (State::Pending, _) => {}
            _ => return Err(over(&upload)),
        }
        inner.check_count(upload.tenant.as_deref())?;
        let held = inner.rows.parts(Some(&upload.id)).await?;
        check_parts(&upload, &held, part_ids)?;
        let received = inner.put_together(&upload, part_ids, md5.is_some()).await?;
        if let (Some(asked), Some(found)) = (md5, &received.md5)
            && !asked.eq_ignore_ascii_case(found)
        {
            let message = format!("the MD5 of the parts is {found}, not {}", brief(asked));
            return Err(Error::invalid("upload_mismatch", message).param("md5"));
        }
        let _naming = inner.naming.lock().await;
        // Its hour may be over.
        let upload = inner.pending(&upload.id, tenant).await?;
        let held = inner.rows.parts(Some(&upload.id)).await?;
        let new = NewFile {
            tenant: upload.tenant.clone(),
            name: upload.name.clone(),
            purpose: upload.purpose,
            lifetime: upload.lifetime,
        };
        let file = inner.name(received, new, Some(&upload.id)).await?;
        inner.parts_gone(&upload, held).await?;
        let done = Upload { state: State::Completed, file: Some(file.id.clone()), ..upload };
        Ok((done, file))
    }

    /// Ends an upload and removes its parts; a second time changes nothing. Errors:
    /// `upload_not_found`, `upload_over`, `storage_full`.
    pub async fn cancel_upload(&self, upload: &str, tenant: Option<&str>) -> Result<Upload> {
        let inner = &self.inner;
        let _naming = inner.naming.lock().await;
        let upload = inner.upload(upload, tenant).await?;
        let putting_together = inner.guards.hold(&upload.id);
        match upload.state {
            State::Cancelled => return Ok(upload),
            State::Completed => return Err(over(&upload)),
            State::Pending if putting_together => {
                let message = "the upload is being put together";
                return Err(Error::new(Kind::Conflict, "upload_over", message));
            }
            State::Pending => {}
        }
        let held = inner.rows.parts(Some(&upload.id)).await?;
        inner.rows.cancel(&upload.id).await?;
        inner.parts_gone(&upload, held).await?;
        Ok(Upload { state: State::Cancelled, ..upload })
    }
}

impl Inner {
    async fn upload(&self, id: &str, tenant: Option<&str>) -> Result<Upload> {
        let now = self.now().as_secs();
        let seen = |upload: &Upload| {
            let own = tenant.is_none() || upload.tenant.as_deref() == tenant;
            own && upload.expires > now
        };
        let upload = self.rows.upload(id).await?.filter(seen);
        upload.ok_or_else(|| {
            let message = format!("there is no upload `{}`, or its hour is over", brief(id));
            Error::not_found("upload_not_found", message).param("id")
        })
    }

    async fn pending(&self, id: &str, tenant: Option<&str>) -> Result<Upload> {
        let upload = self.upload(id, tenant).await?;
        match upload.state {
            State::Pending => Ok(upload),
            State::Completed | State::Cancelled => Err(over(&upload)),
        }
    }

    /// Reads the parts into one content. It is counted by its parts until they are gone.
    async fn put_together(&self, upload: &Upload, ids: &[String], md5: bool) -> Result<Received> {
        let (blobs, ids) = (self.blobs.clone(), ids.to_vec());
        let mut incoming = blobs.incoming(upload.bytes)?.checked(self.limits.check);
        if md5 {
            incoming = incoming.with_md5();
        }
        let put = move || {
            for id in ids {
                let part = blobs.open_part(&id);
                incoming.copy(part.map_err(|e| Error::fault(format!("the part {id}: {e}")))?)?;
            }
            incoming.finish()
        };
        blocking(put).await
    }

    /// No row names these parts of an upload any more; `naming` is held.
    async fn parts_gone(&self, upload: &Upload, parts: Vec<Part>) -> Result<()> {
        self.tally.take(owner(&upload.tenant), 0, parts.iter().map(|part| part.bytes).sum());
        self.discard_parts(parts.into_iter().map(|part| part.id).collect()).await
    }

    async fn discard_parts(&self, ids: Vec<String>) -> Result<()> {
        let blobs = self.blobs.clone();
        blocking(move || {
            blobs.discard_parts(&ids);
            Ok(())
        })
        .await
    }

    /// Forgets uploads whose hour is over; `naming` is held.
    pub(super) async fn sweep_uploads(&self, now: u64) -> Result<()> {
        for upload in self.rows.uploads().await? {
            if upload.expires > now || self.guards.hold(&upload.id) {
                continue;
            }
            let held = self.rows.parts(Some(&upload.id)).await?;
            self.rows.remove_upload(&upload.id).await?;
            self.parts_gone(&upload, held).await?;
        }
        Ok(())
    }
}

fn over(upload: &Upload) -> Error {
    let message = format!("the upload is {}", upload.state.name());
    Error::new(Kind::Conflict, "upload_over", message)
}

/// Whether the named parts are the upload's, each once, and come to its bytes.
fn check_parts(upload: &Upload, held: &[Part], ids: &[String]) -> Result<()> {
    let mut seen = HashSet::new();
    let mut bytes = 0;
    for (at, id) in ids.iter().enumerate() {
        let part = held.iter().find(|part| part.id == *id);
        let wrong = match part {
            None => "no part of this upload",
            Some(_) if !seen.insert(id) => "named twice",
            Some(part) => {
                bytes += part.bytes;
                continue;
            }
        };
        let message = format!("the part `{}` is {wrong}", brief(id));
        return Err(Error::invalid("invalid_value", message).param(format!("part_ids[{at}]")));
    }
    if bytes != upload.bytes {
        let message =
            format!("the parts have {bytes} bytes; the upload was begun for {}", upload.bytes);
        return Err(Error::invalid("upload_mismatch", message).param("part_ids"));
    }
    Ok(())
}
