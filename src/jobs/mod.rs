//! Jobs: work that is done beside serving, tenants in turns, and that survives the server.
//!
//! Owns the queue of jobs, their rows in `polylora.db` and the task that works on them. Never sees
//! HTTP, and of what a job does only what `work` says; results are published as uploads are. The
//! thing to know: a job that the server's end interrupted begins anew, and the version that it
//! published carries its id, so it never publishes twice.

mod control;
mod deletion;
mod descent;
mod desk;
pub mod evaluate;
mod events;
mod gating;
mod job;
mod journal;
mod learnt;
mod merge;
mod pace;
mod queue;
mod rights;
mod run;
mod stage;
mod train;
mod work;

use crate::adapters::Digest;
use crate::adapters::registry::{PinnedSource, Registry};
use crate::adapters::version::{Parent, model_not_found};
use crate::clock::unix_seconds;
use crate::database::{FULL, Storage};
use crate::engine::{EngineHandle, shutting_down};
use crate::error::Result;
use crate::files::Guard;
use crate::share::Pool;
pub use deletion::{Deletion, Gone};
pub use events::{Event, StoredEvent};
pub use job::{Job, Owner, State, Submission};
use journal::Journal;
pub use journal::StoredReport;
pub use merge::MergeSpec;
use pace::Pace;
use queue::Queue;
pub use rights::Rights;
pub use stage::Stage;
use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Mutex as AsyncMutex, Notify, watch};
pub use train::{FileUse, Gate, Means, Preview, Promote, TrainingSpec, Verdict};
pub use work::{Kind, Work};

/// A job that ended the server so often is not tried again: it may well be why.
const RESTARTS_MAX: u64 = 10;
/// Surveys that are made at once, without a job.
const SURVEYS_MAX: u64 = 4;
/// Orders whose sources are read and compared with their digests at once.
const CHECKS_MAX: u64 = 2;
/// Work after which a job is set aside for a tenant that waits for a place; twice as much each
/// time, so that at most half of all work is done for nothing.
const QUANTUM_MS: u64 = 2000;

/// Bounds of the queue.
#[derive(Debug, Clone, Copy)]
pub struct JobLimits {
    /// Jobs that are not over. A tenant may have as many as are left free.
    pub unfinished_max: usize,
    /// Jobs that are over and still known, with their reports.
    pub kept_max: usize,
}

/// All jobs. Cheap to clone. The last clone's drop ends the task.
#[derive(Clone)]
pub struct Jobs {
    inner: Arc<Inner>,
}

struct Inner {
    journal: Journal,
    storage: Storage,
    registry: Registry,
    engine: EngineHandle,
    means: Means,
    pace: Pace,
    limits: JobLimits,
    /// By number: the order in which they came.
    table: Mutex<BTreeMap<u64, JobEntry>>,
    /// One submission at a time, so that the bound holds.
    submissions: Arc<AsyncMutex<()>>,
    queue: Mutex<Queue>,
    surveys: Arc<Pool>,
    checks: Arc<Pool>,
    /// The task has work, or an end.
    wake: Arc<Notify>,
    stopping: Arc<AtomicBool>,
    /// Tells those who watch that nothing more will come.
    closing: watch::Sender<bool>,
}

/// A job in the table.
#[derive(Clone)]
struct JobEntry {
    /// The job itself: whoever changes it tells those who watch.
    job: Arc<watch::Sender<Job>>,
    /// Its sources and files; none once it is over.
    kept: Arc<Vec<PinnedSource>>,
    /// Let go when it is over, by whoever still works on it too.
    files: Arc<Mutex<Vec<Guard>>>,
    /// Milliseconds that it works before it is set aside for others.
    quantum: Arc<AtomicU64>,
    /// How often it has waited for room on the disk.
    waits: Arc<AtomicU64>,
}

/// A job under way; its drop makes room for another.
struct Running {
    inner: Arc<Inner>,
    tenant: Option<String>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.inner.queue().give_back(&self.tenant);
        self.inner.wake.notify_one();
    }
}

/// A job that is looked at while it runs.
pub struct Watch {
    job: watch::Receiver<Job>,
    closing: watch::Receiver<bool>,
    told: bool,
}

impl Watch {
    /// The job as it stands first, then after every change, `None` after it is over. Changes that
    /// come while nobody asks are told as one. Errors: `shutting_down`.
    pub async fn next(&mut self) -> Result<Option<Job>> {
        if self.told {
            if self.job.borrow().state.is_over() {
                return Ok(None);
            }
            let changed = tokio::select! {
                changed = self.job.changed() => changed.is_ok(),
                _ = self.closing.wait_for(|closing| *closing) => false,
            };
            if !changed {
                return Err(shutting_down());
            }
        }
        self.told = true;
        Ok(Some(self.job.borrow_and_update().clone()))
    }
}

impl Jobs {
    /// Opens `polylora.db` and goes on with the jobs in it. Errors: `data_dir_unsupported`.
    pub async fn open(
        storage: &Storage,
        registry: Registry,
        means: Means,
        limits: JobLimits,
    ) -> Result<Self> {
        let engine = means.engine.clone();
        let stopping = Arc::new(AtomicBool::new(false));
        let inner = Arc::new(Inner {
            journal: Journal::open(storage).await?,
            storage: storage.clone(),
            registry,
            pace: Pace::new(engine.clone(), stopping.clone()),
            engine,
            means,
            limits,
            table: Mutex::default(),
            submissions: Arc::default(),
            queue: Mutex::default(),
            surveys: Pool::new(SURVEYS_MAX),
            checks: Pool::new(CHECKS_MAX),
            wake: Arc::default(),
            stopping,
            closing: watch::Sender::new(false),
        });
        for (number, job) in inner.journal.load().await? {
            inner.restore(number, job).await?;
        }
        unless_full(inner.forget().await)?;
        let unfinished: HashSet<String> = {
            let table = inner.table();
            let jobs = table.values().map(|entry| entry.job.borrow());
            jobs.filter(|job| !job.state.is_over()).map(|job| job.id.clone()).collect()
        };
        train::sweep(&inner.means.directory, &unfinished);
        // The task holds no jobs while it waits, so the last clone's drop ends both.
        let (weak, wake) = (Arc::downgrade(&inner), inner.wake.clone());
        tokio::spawn(async move {
            while let Some(inner) = weak.upgrade().filter(|i| !i.pace.is_stopping()) {
                match inner.next() {
                    Some(entry) => {
                        let tenant = entry.job.borrow().owner.tenant.clone();
                        let running = Running { inner, tenant };
                        tokio::spawn(async move { running.inner.work(&entry).await });
                    }
                    None => {
                        drop(inner);
                        wake.notified().await;
                    }
                }
            }
        });
        Ok(Self { inner })
    }

    /// Whether another job of `owner` may wait, of whose tenant at most `most` may. Errors:
    /// `merge_queue_full`.
    pub fn check_room(&self, kind: Kind, owner: &Owner, most: Option<u64>) -> Result<()> {
        self.inner.check_room(kind, owner, most)
    }

    /// Enters a job, its sources kept. Errors: `merge_queue_full`.
    pub async fn submit(
        &self,
        submission: Submission,
        kept: Arc<Vec<PinnedSource>>,
        most: Option<u64>,
    ) -> Result<Job> {
        let inner = &self.inner;
        let _submitting = inner.submissions.lock().await;
        inner.check_room(submission.work.kind(), &submission.owner, most)?;
        let job = Job {
            id: submission.id,
            owner: submission.owner,
            work: Arc::new(submission.work),
            state: State::Queued,
            progress: None,
            restarts: 0,
            created: unix_seconds(),
            started: None,
            ended: None,
            outcome: None,
            failure: None,
            gate: None,
        };
        for source in kept.iter().map(PinnedSource::version) {
            // Deleted since it was looked up: nothing more is made of it.
            let living = inner.registry.versions(&source.name);
            if living.iter().all(|entry| entry.version.number != source.number) {
                return Err(model_not_found(&source.id()));
            }
        }
        let files = inner.guards(&job).await?;
        let (number, job) = inner.journal.add(&job, &submission.sets).await?;
        inner.table().insert(number, JobEntry::new(job.clone(), kept, files));
        inner.wake.notify_one();
        Ok(job)
    }

    /// Jobs that an operator (`None`) or a tenant may know of, newest first.
    pub fn list(&self, kind: Kind, tenant: Option<&str>) -> Vec<Job> {
        let table = self.inner.table();
        let jobs = table.values().rev().map(|p| p.job.borrow().clone());
        jobs.filter(|j| j.work.kind() == kind && j.owner.known_to(tenant)).collect()
    }

    /// Errors: `merge_not_found`.
    pub fn get(&self, kind: Kind, id: &str, tenant: Option<&str>) -> Result<Job> {
        Ok(self.inner.find(kind, id, tenant)?.job.borrow().clone())
    }

    /// Whose the job is, of whatever kind.
    pub fn owner_of(&self, id: &str) -> Option<Owner> {
        let table = self.inner.table();
        let mut owners = table.values().map(|entry| entry.job.borrow());
        owners.find(|job| job.id == id).map(|job| job.owner.clone())
    }

    /// Looks at a job while it runs. Errors: `merge_not_found`.
    pub fn watch(&self, kind: Kind, id: &str, tenant: Option<&str>) -> Result<Watch> {
        let job = self.inner.find(kind, id, tenant)?.job.subscribe();
        Ok(Watch { job, closing: self.inner.closing.subscribe(), told: false })
    }

    /// Errors: `merge_not_found`; `merge_report_missing` when it is not made yet, or never was.
    pub async fn report(&self, kind: Kind, id: &str, tenant: Option<&str>) -> Result<StoredReport> {
        let job = self.get(kind, id, tenant)?;
        // What a job wrote down before it published is no report before it did.
        let stored = match job.state {
            State::Done | State::Running(Stage::Evaluating) => {
                self.inner.journal.report_of(id).await?
            }
            _ => None,
        };
        stored.ok_or_else(|| job.work.kind().report_missing(id, job.state.name()))
    }

    /// Ends a job that does not publish yet; what it computes is dropped after the site that it is
    /// at. Of one that has published it ends the evaluation. Errors: `merge_not_found`,
    /// `merge_over`.
    pub async fn cancel(&self, kind: Kind, id: &str, tenant: Option<&str>) -> Result<Job> {
        let entry = self.inner.find(kind, id, tenant)?;
        if !entry.job.send_if_modified(|job| job.cancel(unix_seconds())) {
            return Err(entry.job.borrow().over("cancelled"));
        }
        let job = entry.job.borrow().clone();
        if let Err(error) = self.inner.settle(&job).await {
            // What could not be written down is not so.
            entry.job.send_if_modified(Job::requeue);
            self.inner.wake.notify_one();
            return Err(error);
        }
        Ok(job)
    }

    /// Nothing more is begun, and those who watch are told; jobs stay in the journal as they are.
    pub fn stop(&self) {
        self.inner.stopping.store(true, Ordering::Release);
        self.inner.closing.send_replace(true);
        self.inner.wake.notify_one();
    }
}

impl JobEntry {
    fn new(job: Job, kept: Arc<Vec<PinnedSource>>, files: Vec<Guard>) -> Self {
        let (job, files) = (Arc::new(watch::Sender::new(job)), Arc::new(Mutex::new(files)));
        let quantum = Arc::new(AtomicU64::new(QUANTUM_MS));
        Self { job, kept, files, quantum, waits: Arc::default() }
    }
}

impl Inner {
    fn table(&self) -> MutexGuard<'_, BTreeMap<u64, JobEntry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, kind: Kind, id: &str, tenant: Option<&str>) -> Result<JobEntry> {
        let table = self.table();
        let found = table.values().find(|p| {
            let job = p.job.borrow();
            job.id == id && job.work.kind() == kind && job.owner.known_to(tenant)
        });
        found.cloned().ok_or_else(|| kind.not_found(id))
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The job to begin now, if there is one and a place for it.
    fn next(&self) -> Option<JobEntry> {
        let table = self.table();
        let number = self.queue().take(queued(&table))?;
        table.get(&number).cloned()
    }

    /// Whether a job that worked for so long is to make room for another tenant's.
    fn is_quantum_over(&self, entry: &JobEntry, worked: Duration) -> bool {
        worked.as_millis() as u64 >= entry.quantum.load(Ordering::Relaxed) && {
            let table = self.table();
            self.queue().is_wanted(queued(&table))
        }
    }

    fn check_room(&self, kind: Kind, owner: &Owner, most: Option<u64>) -> Result<()> {
        let max = self.limits.unfinished_max;
        let (mut all, mut own) = (0, 0);
        for entry in self.table().values() {
            let job = entry.job.borrow();
            all += usize::from(!job.state.is_over());
            own += usize::from(!job.state.is_over() && job.owner.tenant == owner.tenant);
        }
        let free = max.saturating_sub(all);
        let bounded = most.is_some_and(|most| own as u64 >= most);
        if free > 0 && !bounded && (owner.tenant.is_none() || own < free) {
            return Ok(());
        }
        Err(kind.queue_full(max, free > 0))
    }

    /// Puts a job of the journal into the table; one that is not over needs its sources again.
    async fn restore(&self, number: u64, mut job: Job) -> Result<()> {
        let (mut kept, mut files) = (Vec::new(), Vec::new());
        if !job.state.is_over() {
            match self.found_again(&job).await {
                Ok(found) => (kept, files) = found,
                Err(e) => {
                    tracing::warn!(job = job.id, error = %e, "a job cannot go on");
                    job.end(Some(&e), unix_seconds());
                    unless_full(self.journal.end(&job).await)?;
                }
            }
        }
        self.table().insert(number, JobEntry::new(job, Arc::new(kept), files));
        Ok(())
    }

    async fn found_again(&self, job: &Job) -> Result<(Vec<PinnedSource>, Vec<Guard>)> {
        if job.restarts > RESTARTS_MAX {
            return Err(job.work.kind().abandoned(job.restarts));
        }
        let find = |parent: &Parent| {
            let digest = Digest::parse(&parent.digest);
            let kept = digest.and_then(|d| self.registry.keep_content(d, &parent.id));
            kept.ok_or_else(|| job.work.kind().source_gone(parent))
        };
        let sources = job.work.from().iter().map(find).collect::<Result<_>>()?;
        Ok((sources, self.guards(job).await?))
    }

    /// Keeps the files that a job reads. Errors: `file_not_found`.
    async fn guards(&self, job: &Job) -> Result<Vec<Guard>> {
        let mut guards = Vec::new();
        for id in job.work.files() {
            let (guard, ..) = self.means.files.open_for(id, job.owner.tenant.as_deref()).await?;
            guards.push(guard);
        }
        Ok(guards)
    }

    /// A job is over: it is written down, its sources are let go, and old jobs are forgotten.
    async fn settle(&self, job: &Job) -> Result<()> {
        self.journal.end(job).await?;
        job.work.forget(&job.id, &self.means);
        for entry in self.table().values_mut() {
            if entry.job.borrow().id == job.id {
                entry.kept = Arc::default();
                entry.files.lock().unwrap_or_else(PoisonError::into_inner).clear();
            }
        }
        // It is over whether or not others could be forgotten: the next start forgets them.
        unless_full(self.forget().await)
    }

    /// Waits for room to write in; false when the server stops.
    async fn writable(&self) -> bool {
        while !self.pace.is_stopping() {
            tokio::select! {
                () = self.storage.writable() => return true,
                () = self.wake.notified() => {}
            }
        }
        false
    }

    /// Takes the oldest jobs that are over away, beyond those that are kept.
    async fn forget(&self) -> Result<()> {
        let surplus: Vec<String> = {
            let mut table = self.table();
            let mut over: BTreeMap<Option<String>, VecDeque<u64>> = BTreeMap::new();
            for (number, entry) in &*table {
                let job = entry.job.borrow();
                if job.state.is_over() {
                    over.entry(job.owner.tenant.clone()).or_default().push_back(*number);
                }
            }
            let all: usize = over.values().map(VecDeque::len).sum();
            // The oldest of the tenant that has most: nobody's jobs push out another's few.
            let gone = (self.limits.kept_max..all).filter_map(|_| {
                let most = over.values_mut().max_by_key(|jobs| jobs.len())?;
                table.remove(&most.pop_front()?)
            });
            gone.map(|p| p.job.borrow().id.clone()).collect()
        };
        if surplus.is_empty() {
            return Ok(());
        }
        for id in surplus {
            self.journal.remove(&id).await?;
        }
        let versions = self.registry.list();
        let rested_on = versions.iter().flat_map(|entry| entry.version.lineage.training_jobs());
        let mut kept: BTreeSet<String> = rested_on.map(str::to_owned).collect();
        kept.extend(self.table().values().map(|entry| entry.job.borrow().id.clone()));
        self.journal.unlearn_others(&kept).await
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.wake.notify_one();
    }
}

/// What can be written down by the next start as well.
fn unless_full(written: Result<()>) -> Result<()> {
    match written {
        Err(error) if error.code == FULL => {
            tracing::warn!(%error, "the journal of jobs is behind");
            Ok(())
        }
        written => written,
    }
}

/// Jobs that wait, as (number, tenant), in the order of their coming.
fn queued(table: &BTreeMap<u64, JobEntry>) -> impl Iterator<Item = (u64, Option<String>)> {
    table.iter().filter_map(|(number, entry)| {
        let job = entry.job.borrow();
        (job.state == State::Queued).then(|| (*number, job.owner.tenant.clone()))
    })
}
