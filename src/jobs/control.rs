//! What may be said to a training job while it is there: pause, resume, and what has it told.
//!
//! Owns the order of memory and journal in each. Never runs a job. The thing to know: a job that is
//! paused keeps what it has done, and waits as others do once it is resumed.

use super::Jobs;
use super::events::StoredEvent;
use super::job::Job;
use super::train::{self, Preview};
use super::work::Kind;
use crate::blocking::blocking;
use crate::error::{Error, Kind as ErrorKind, Result};
use crate::train::data;
use std::fs::File;

impl Jobs {
    /// Whether this server trains. Errors: `training_disabled`.
    pub fn check_training(&self) -> Result<()> {
        if self.inner.means.train_bytes > 0 {
            return Ok(());
        }
        let message = "this server does not train: its train_bytes is 0";
        Err(Error::new(ErrorKind::Unavailable, "training_disabled", message))
    }

    /// Stops a job after the step that it is at. Errors: those of [`Jobs::get`]; the kind's
    /// `…_over` for one that is over, published or paused.
    pub async fn pause(&self, kind: Kind, id: &str, tenant: Option<&str>) -> Result<Job> {
        let entry = self.inner.find(kind, id, tenant)?;
        if !entry.job.send_if_modified(Job::pause) {
            return Err(entry.job.borrow().over("paused"));
        }
        if let Err(error) = self.inner.journal.pause(id).await {
            // What could not be written down is not so.
            entry.job.send_if_modified(Job::resume);
            self.inner.wake.notify_one();
            return Err(error);
        }
        Ok(entry.job.borrow().clone())
    }

    /// Lets a paused job go on. Errors: as [`Jobs::pause`].
    pub async fn resume(&self, kind: Kind, id: &str, tenant: Option<&str>) -> Result<Job> {
        let entry = self.inner.find(kind, id, tenant)?;
        if !entry.job.send_if_modified(Job::resume) {
            return Err(entry.job.borrow().over("resumed"));
        }
        if let Err(error) = self.inner.journal.resume(id).await {
            entry.job.send_if_modified(Job::pause);
            return Err(error);
        }
        self.inner.wake.notify_one();
        Ok(entry.job.borrow().clone())
    }

    /// At most `limit` of what a job has told before event `before`, newest first. Errors: those of
    /// [`Jobs::get`].
    pub async fn told(
        &self,
        kind: Kind,
        id: &str,
        tenant: Option<&str>,
        (before, limit): (u64, u64),
    ) -> Result<Vec<StoredEvent>> {
        self.inner.find(kind, id, tenant)?;
        self.inner.journal.told(id, before, limit).await
    }

    /// What a job has told after event number `after`, oldest first. Errors: those of
    /// [`Jobs::get`].
    pub async fn told_since(
        &self,
        kind: Kind,
        id: &str,
        tenant: Option<&str>,
        after: u64,
    ) -> Result<Vec<StoredEvent>> {
        self.inner.find(kind, id, tenant)?;
        self.inner.journal.told_since(id, after).await
    }

    /// The first examples of a file as a job would learn them. Errors: `invalid_training_file`.
    pub async fn preview(&self, content: File, how: Preview) -> Result<Vec<data::Preview>> {
        let means = self.inner.means.clone();
        // Nobody can end it, and it is short: a page of a bounded file.
        let over = || false;
        let shown = blocking(move || train::preview(content, how, &means, &over)).await?;
        Ok(shown.unwrap_or_default())
    }
}
