//! Files that clients upload: contents by digest on disk, rows in `polylora.db`.
//!
//! Owns who sees which file, how many there may be, and when one goes. Never sees HTTP, a token or
//! an adapter. The thing to know: a file is there once one transaction has named what is synced,
//! and stays while a [`Guard`] of it lives; what is not the asker's is not found.

mod blobs;
mod file;
mod guards;
mod incoming;
mod rows;
mod tally;
mod uploads;

use crate::blocking::blocking;
use crate::clock::{Now, Trusted};
use crate::database::Storage;
use crate::error::{Error, Kind, Result, brief};
use crate::share::fair;
use blobs::Blobs;
pub use file::{Check, FileRow, NewFile, Page, Part, Purpose, State, Upload};
pub use guards::Guard;
use guards::Guards;
pub use incoming::{Incoming, Received, too_large};
use rows::Rows;
use std::collections::HashSet;
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tally::Tally;
use tokio::sync::Mutex as AsyncMutex;

/// Between two looks for what has expired.
const HOUSE_PERIOD: Duration = Duration::from_secs(60);

/// How much there may be, and of what.
#[derive(Debug, Clone, Copy)]
pub struct FileLimits {
    /// Bytes of one file.
    pub file_bytes_max: u64,
    /// Files of all together; a tenant has as many as it leaves free.
    pub files_max: u64,
    /// Uploads in parts that are not over, likewise.
    pub uploads_max: u64,
    /// What looks at the files of clients.
    pub check: Check,
}

/// All files. Cheap to clone.
#[derive(Clone)]
pub struct Files {
    inner: Arc<Inner>,
}

struct Inner {
    rows: Rows,
    blobs: Arc<Blobs>,
    limits: FileLimits,
    tally: Tally,
    /// Files that jobs use, and uploads that are being put together, by id.
    guards: Guards,
    /// By which files and uploads expire.
    time: Mutex<Trusted>,
    /// Held while rows and contents change together, or one is looked at to be kept.
    naming: AsyncMutex<()>,
}

impl Files {
    /// Opens or creates `files/`; sets aside contents that no row names. Errors:
    /// `data_dir_unsupported`.
    pub async fn open(storage: &Storage, limits: FileLimits) -> Result<Self> {
        let rows = Rows::open(storage).await?;
        let (files, changed) = (rows.files().await?, rows.changed().await?);
        let (uploads, parts) = (rows.uploads().await?, rows.parts(None).await?);
        let tally = Tally::default();
        for file in &files {
            tally.add(owner(&file.tenant), 1, file.bytes);
        }
        for part in &parts {
            let whole = uploads.iter().find(|upload| upload.id == part.upload);
            tally.add(whole.map_or("", |upload| owner(&upload.tenant)), 0, part.bytes);
        }
        let named: Vec<String> = files.into_iter().map(|file| file.digest).collect();
        let parts: HashSet<String> = parts.into_iter().map(|part| part.id).collect();
        let blobs = Blobs::open(storage, &named, &parts, changed)?;
        let inner = Arc::new(Inner {
            rows,
            blobs: Arc::new(blobs),
            limits,
            tally,
            guards: Guards::default(),
            time: Mutex::new(Trusted::new(Some(changed).filter(|t| !t.is_zero()), Now::read())),
            naming: AsyncMutex::default(),
        });
        tokio::spawn(keep_house(Arc::downgrade(&inner)));
        Ok(Self { inner })
    }

    pub fn limits(&self) -> FileLimits {
        self.inner.limits
    }

    /// Bytes that a tenant (empty: the operator) has, those on their way included.
    pub fn bytes_of(&self, tenant: &str) -> u64 {
        self.inner.tally.of(tenant).bytes
    }

    /// A fresh content of a tenant, to be written, finished and [added](Self::add). Errors:
    /// `file_limit_reached`, `tenant_share_exceeded`, `storage_full`.
    pub fn receive(&self, tenant: Option<&str>) -> Result<Incoming> {
        self.inner.check_count(tenant)?;
        let incoming = self.inner.blobs.incoming(self.inner.limits.file_bytes_max)?;
        let counted = self.inner.tally.begin(tenant.unwrap_or_default());
        Ok(incoming.counted(counted).checked(self.inner.limits.check))
    }

    /// Names a content: the file is on disk, and stays, when this returns. Errors:
    /// `file_limit_reached`, `tenant_share_exceeded`, `storage_full`.
    pub async fn add(&self, received: Received, new: NewFile) -> Result<FileRow> {
        let _naming = self.inner.naming.lock().await;
        self.inner.check_count(new.tenant.as_deref())?;
        self.inner.name(received, new, None).await
    }

    /// Adds what a job made, as a file of purpose `fine-tune-results`. The job is done, so no bound
    /// of the tenant's refuses it; it counts afterwards. Errors: `storage_full`.
    pub async fn add_result(
        &self,
        tenant: Option<&str>,
        name: &str,
        bytes: Vec<u8>,
    ) -> Result<FileRow> {
        let incoming = self.inner.blobs.incoming(self.inner.limits.file_bytes_max)?;
        let counted = self.inner.tally.begin(tenant.unwrap_or_default());
        let mut incoming = incoming.counted(counted);
        let written = move || incoming.write(&bytes).and_then(|()| incoming.finish());
        let received = blocking(written).await?;
        let (tenant, name) = (tenant.map(str::to_owned), name.to_owned());
        let new = NewFile { tenant, name, purpose: Purpose::FineTuneResults, lifetime: None };
        let _naming = self.inner.naming.lock().await;
        self.inner.name(received, new, None).await
    }

    /// A page of the files of a tenant, or, without a tenant, of all; whether more follow.
    pub async fn page(&self, tenant: Option<&str>, page: &Page) -> Result<(Vec<FileRow>, bool)> {
        self.inner.rows.page(tenant, page, self.inner.now()).await
    }

    /// A file that `tenant` may see. Errors: `file_not_found`.
    pub async fn get(&self, id: &str, tenant: Option<&str>) -> Result<FileRow> {
        self.inner.file(id, tenant).await
    }

    /// A file and its content, for reading from the beginning. It may be removed meanwhile; what
    /// was opened can still be read. Errors: `file_not_found`.
    pub async fn open_content(&self, id: &str, tenant: Option<&str>) -> Result<(FileRow, File)> {
        let file = self.inner.file(id, tenant).await?;
        let (blobs, digest) = (self.inner.blobs.clone(), file.digest.clone());
        match blocking(move || Ok(blobs.open_content(&digest))).await? {
            Ok(content) => Ok((file, content)),
            Err(e) => {
                // Removed since it was looked up, or it is really gone.
                self.inner.file(id, tenant).await?;
                Err(Error::fault(format!("the content of {id} cannot be read: {e}")))
            }
        }
    }

    /// The same for a job: while the guard lives, the file is neither removed nor does it expire. A
    /// job takes it when it is ordered, and again at a start, before the port opens. Errors:
    /// `file_not_found`.
    pub async fn open_for(&self, id: &str, tenant: Option<&str>) -> Result<(Guard, File, FileRow)> {
        let _naming = self.inner.naming.lock().await;
        let (file, content) = self.open_content(id, tenant).await?;
        Ok((self.inner.guards.take(id), content, file))
    }

    /// Removes a file; its content goes with the last file that has it. What was made from it
    /// stays: versions trained on it are removed by whoever asks for that, around this call.
    /// Errors: `file_not_found`, `file_in_use`, `storage_full`.
    pub async fn remove(&self, id: &str, tenant: Option<&str>) -> Result<FileRow> {
        let _naming = self.inner.naming.lock().await;
        let file = self.inner.file(id, tenant).await?;
        if self.inner.guards.hold(id) {
            let message = format!("a job uses the file {id}: cancel the job, or wait for its end");
            return Err(Error::new(Kind::Conflict, "file_in_use", message));
        }
        self.inner.remove(&file).await?;
        Ok(file)
    }
}

impl Inner {
    /// Now, by the clock that things expire by.
    fn now(&self) -> Duration {
        self.time.lock().unwrap_or_else(PoisonError::into_inner).look(Now::read())
    }

    async fn file(&self, id: &str, tenant: Option<&str>) -> Result<FileRow> {
        let now = self.now().as_secs();
        let seen = |file: &FileRow| {
            let own = tenant.is_none() || file.tenant.as_deref() == tenant;
            own && file.expires.is_none_or(|at| at > now)
        };
        let file = self.rows.file(id).await?.filter(seen);
        file.ok_or_else(|| {
            let message = format!("there is no file `{}`", brief(id));
            Error::not_found("file_not_found", message).param("id")
        })
    }

    /// Whether a tenant may have one more file.
    fn check_count(&self, tenant: Option<&str>) -> Result<()> {
        let (all, most) = (self.tally.files(), self.limits.files_max);
        if all >= most {
            let message = format!("{most} files are kept, which is the limit; remove one first");
            return Err(Error::new(Kind::Capacity, "file_limit_reached", message));
        }
        let own = tenant.map_or(0, |tenant| self.tally.of(tenant).files);
        share(tenant, "files", own, most - all)
    }

    /// Moves a content to its place and enters its row; `naming` is held.
    async fn name(
        &self,
        received: Received,
        new: NewFile,
        upload: Option<&str>,
    ) -> Result<FileRow> {
        let created = Now::read().wall.as_secs();
        let row = FileRow {
            number: 0,
            id: format!("file-{:032x}", rand::random::<u128>()),
            tenant: new.tenant,
            digest: received.digest.clone(),
            bytes: received.bytes,
            name: new.name,
            purpose: new.purpose,
            created,
            expires: new.lifetime.map(|seconds| created + seconds),
            problem: received.problem.clone(),
        };
        let blobs = self.blobs.clone();
        let kept = blocking(move || blobs.keep(&received).map(|()| received)).await;
        let added = match kept {
            Ok(received) => self.rows.add(&row, upload).await.map(|added| (received, added)),
            Err(error) => Err(error),
        };
        let (received, added) = match added {
            Ok(both) => both,
            Err(error) => {
                self.forget(&row.digest).await?;
                return Err(error);
            }
        };
        self.tally.add(owner(&added.tenant), 1, 0);
        match upload {
            // Its parts were what was counted.
            Some(_) => self.tally.add(owner(&added.tenant), 0, added.bytes),
            None => received.keep(),
        }
        let (blobs, digest) = (self.blobs.clone(), row.digest);
        blocking(move || {
            blobs.settled(&digest);
            Ok(())
        })
        .await?;
        Ok(added)
    }

    /// Removes a row, and its content unless another has it; `naming` is held.
    async fn remove(&self, file: &FileRow) -> Result<()> {
        self.rows.remove(&file.id).await?;
        self.tally.take(owner(&file.tenant), 1, file.bytes);
        self.forget(&file.digest).await
    }

    /// Removes a content that no row names; `naming` is held.
    async fn forget(&self, digest: &str) -> Result<()> {
        if self.rows.names(digest).await? {
            return Ok(());
        }
        let (blobs, digest) = (self.blobs.clone(), digest.to_owned());
        blocking(move || {
            blobs.discard(&digest);
            Ok(())
        })
        .await
    }

    /// Removes what has expired and is not in use.
    async fn sweep(&self) -> Result<()> {
        let _naming = self.naming.lock().await;
        let now = self.now().as_secs();
        let expired = |file: &FileRow| file.expires.is_some_and(|at| at <= now);
        for file in self.rows.files().await?.iter().filter(|f| expired(f)) {
            if !self.guards.hold(&file.id) {
                self.remove(file).await?;
                tracing::info!(file = file.id, "removed a file that has expired");
            }
        }
        self.sweep_uploads(now).await
    }
}

/// Whether a tenant that has `own` of something may have one more, of which `free` are left.
fn share(tenant: Option<&str>, what: &str, own: u64, free: u64) -> Result<()> {
    if tenant.is_none() || fair(own, 1, free) {
        return Ok(());
    }
    let message = format!(
        "your tenant has {own} {what} and would have {}; it may have as many as it leaves free, \
         {free}",
        own + 1
    );
    Err(Error::new(Kind::Capacity, "tenant_share_exceeded", message))
}

/// As the tally knows whose something is.
fn owner(tenant: &Option<String>) -> &str {
    tenant.as_deref().unwrap_or_default()
}

async fn keep_house(files: Weak<Inner>) {
    loop {
        tokio::time::sleep(HOUSE_PERIOD).await;
        let Some(files) = files.upgrade() else { return };
        if let Err(error) = files.sweep().await {
            tracing::debug!(%error, "what has expired stays for now");
        }
    }
}
