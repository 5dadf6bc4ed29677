//! A file deleted with all that rests on it: versions, jobs, what they learnt, then the file.
//!
//! Owns what goes and in which order. Never decides who may ask. The thing to know: what leads to
//! the rest goes last, so a deletion that ended in the middle is finished by asking again; no job
//! comes in while one is under way.

use super::descent::resting_on;
use super::job::Job;
use super::work::{Kind as WorkKind, Work};
use super::{Inner, Jobs};
use crate::adapters::version::{Entry, servable};
use crate::error::{Error, Kind, Result};
use crate::files::FileRow;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use tokio::sync::OwnedMutexGuard;

/// See the file's head.
pub struct Deletion {
    inner: Arc<Inner>,
    _submitting: OwnedMutexGuard<()>,
    id: String,
    /// `None`: it is gone, and what rests on it is not.
    pub file: Option<FileRow>,
    /// Jobs that learnt from it, and merges of what they made.
    pub jobs: Vec<Job>,
    /// Those that a name means come last.
    pub versions: Vec<Entry>,
    /// Tables of steps.
    pub results: Vec<FileRow>,
    /// Names whose version goes, and what each means then.
    pub moved: BTreeMap<String, Option<u64>>,
    steps: VecDeque<Step>,
}

/// Something that goes.
enum Step {
    Version(Entry),
    Prefixes,
    Job(Box<Job>),
    File(FileRow),
    /// Which lines a job learnt.
    Lines(String),
}

/// Something that went.
pub enum Gone {
    Version(Entry),
    Job(Box<Job>),
    File(FileRow),
}

impl Jobs {
    /// What goes with a file that `tenant` may see, or that its jobs learnt from before it went.
    /// Until it is dropped no job comes in. Errors: `file_not_found`.
    pub async fn deletion(&self, id: &str, tenant: Option<&str>) -> Result<Deletion> {
        let inner = self.inner.clone();
        let submitting = inner.submissions.clone().lock_owned().await;
        let found = inner.means.files.get(id, tenant).await;
        let learners = inner.learners_from(id).await?;
        let file = match found {
            Ok(file) => Some(file),
            Err(e) if !inner.is_known_by(id, tenant).await? => return Err(e),
            Err(_) => None,
        };
        let mut versions = resting_on(inner.registry.list(), &learners);
        versions.sort_by_key(|entry| entry.current);
        let ids: BTreeSet<String> = versions.iter().map(|entry| entry.version.id()).collect();
        let jobs: Vec<Job> =
            inner.jobs().into_iter().filter(|j| goes(j, &learners, &ids)).collect();
        let mut results = Vec::new();
        for outcome in jobs.iter().filter_map(|job| job.outcome.as_ref()) {
            for id in &outcome.files {
                // One that was deleted before is no more to be deleted.
                results.extend(inner.means.files.get(id, None).await.ok());
            }
        }
        let steps = steps(&versions, &jobs, &results, &learners, file.as_ref());
        let moved = moved(&inner, &versions, &ids);
        let (_submitting, id) = (submitting, id.to_owned());
        Ok(Deletion { inner, _submitting, id, file, jobs, versions, results, moved, steps })
    }
}

/// Whether a job goes with the jobs that learnt, or with the versions that rest on them.
fn goes(job: &Job, learners: &BTreeSet<String>, versions: &BTreeSet<String>) -> bool {
    let made = job.outcome.as_ref().is_some_and(|made| versions.contains(&made.id));
    learners.contains(&job.id) || (made && job.work.kind() == WorkKind::Merge)
}

/// What goes, in order.
fn steps(
    versions: &[Entry],
    jobs: &[Job],
    results: &[FileRow],
    learners: &BTreeSet<String>,
    file: Option<&FileRow>,
) -> VecDeque<Step> {
    // Merges are known by their versions, and all else by what was learnt.
    let (merges, trained): (Vec<&Job>, Vec<&Job>) =
        jobs.iter().partition(|job| job.work.kind() == WorkKind::Merge);
    let job = |job: &&Job| Step::Job(Box::new((*job).clone()));
    let mut steps: VecDeque<Step> = merges.iter().map(job).collect();
    steps.extend(versions.iter().cloned().map(Step::Version));
    steps.push_back(Step::Prefixes);
    steps.extend(results.iter().cloned().map(Step::File));
    steps.extend(trained.iter().map(job));
    steps.extend(file.cloned().map(Step::File));
    // They lead to all of it, also when the file is gone.
    steps.extend(learners.iter().cloned().map(Step::Lines));
    steps
}

/// Names whose version goes, and the version that each means then.
fn moved(
    inner: &Inner,
    versions: &[Entry],
    ids: &BTreeSet<String>,
) -> BTreeMap<String, Option<u64>> {
    let current = versions.iter().filter(|entry| entry.current);
    let next = |entry: &Entry| {
        let all = inner.registry.versions(&entry.version.name);
        let before = all.iter().rev().filter(|e| e.version.number < entry.version.number);
        let mut stay = before.filter(|e| {
            let version = &e.version;
            servable(version) && !version.lineage.is_checkpoint() && !ids.contains(&version.id())
        });
        stay.next().map(|e| e.version.number)
    };
    current.map(|entry| (entry.version.name.clone(), next(entry))).collect()
}

impl Deletion {
    /// Whether all of it can go now. Errors: `file_in_use` (a job is not over), `adapter_aliased`.
    pub fn check(&self) -> Result<()> {
        let ids: BTreeSet<String> = self.versions.iter().map(|e| e.version.id()).collect();
        let uses = |job: &Job| {
            let works_on = job.work.from().iter().any(|parent| ids.contains(&parent.id));
            job.work.files().contains(&&*self.id) || works_on
        };
        let mut unfinished = self.inner.jobs().into_iter().filter(|job| !job.state.is_over());
        if unfinished.any(|job| uses(&job)) {
            let message = format!(
                "a job uses the file {} or what was trained on it: cancel the job, or wait for \
                 its end",
                self.id
            );
            return Err(Error::new(Kind::Conflict, "file_in_use", message));
        }
        self.versions.iter().try_for_each(|entry| self.inner.registry.check_alias(entry))
    }

    /// Removes the next thing that somebody may want to know of; `None`: all is gone. Errors:
    /// `adapter_aliased`, `file_in_use`, `storage_full`; what went before them is gone.
    pub async fn next(&mut self) -> Result<Option<Gone>> {
        let inner = &self.inner;
        while let Some(step) = self.steps.pop_front() {
            let gone = match step {
                Step::Version(entry) => {
                    let version = &entry.version;
                    let gone = inner.registry.delete_version(&version.name, version.number).await?;
                    gone.then_some(Gone::Version(entry))
                }
                Step::Prefixes => {
                    if !self.versions.is_empty() {
                        inner.engine.forget_prefixes()?;
                    }
                    None
                }
                Step::Job(job) => {
                    inner.drop_job(&job).await?;
                    Some(Gone::Job(job))
                }
                Step::File(file) => match inner.means.files.remove(&file.id, None).await {
                    Ok(_) => Some(Gone::File(file)),
                    Err(e) if e.kind == Kind::NotFound => None,
                    Err(e) => return Err(e),
                },
                Step::Lines(job) => {
                    inner.journal.unlearn(&job).await?;
                    None
                }
            };
            if gone.is_some() {
                return Ok(gone);
            }
        }
        Ok(None)
    }
}

impl Inner {
    fn jobs(&self) -> Vec<Job> {
        self.table().values().map(|entry| entry.job.borrow().clone()).collect()
    }

    /// Jobs that learnt from a file: by what they left, by what is known of them, and by what
    /// versions say.
    async fn learners_from(&self, file: &str) -> Result<BTreeSet<String>> {
        let mut learners: BTreeSet<String> =
            self.journal.learners_from(file).await?.into_iter().collect();
        let learns = |job: &Job| match &*job.work {
            Work::Train(spec) => spec.training.id == file,
            Work::Merge(_) => false,
        };
        learners.extend(self.jobs().into_iter().filter(learns).map(|job| job.id));
        let entries = self.registry.list();
        let trained = entries.iter().filter(|e| e.version.lineage.is_trained_on(file));
        learners.extend(trained.filter_map(|e| e.version.lineage.job().map(str::to_owned)));
        Ok(learners)
    }

    /// Whether a job of the tenant learnt from a file, be it gone.
    async fn is_known_by(&self, file: &str, tenant: Option<&str>) -> Result<bool> {
        self.journal.is_learnt_by(file, tenant).await
    }

    /// Removes a job that is over, with its events, report and state.
    async fn drop_job(&self, job: &Job) -> Result<()> {
        self.journal.remove(&job.id).await?;
        job.work.forget(&job.id, &self.means);
        self.table().retain(|_, entry| entry.job.borrow().id != job.id);
        Ok(())
    }
}
