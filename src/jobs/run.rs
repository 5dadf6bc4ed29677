//! One job carried out: make, write the report down, publish, evaluate, end.
//!
//! Owns the order of these. Never computes on the server's own threads. The thing to know: each
//! step can be the last before a crash. Before publication everything is made again; the version
//! that was published names its job, so after publication nothing is.

use super::evaluate::{Bench, Contestant};
use super::events::{Event, Level};
use super::job::{Job, Outcome, State};
use super::pace::{REST, apart};
use super::stage::{Stage, Stepped};
use super::work::{Begun, Kind as WorkKind, Made, Making, Sources};
use super::{Inner, JobEntry};
use crate::adapters::registry::{PinnedSource, Staging};
use crate::adapters::version::{Entry, Publish, State as VersionState};
use crate::clock::unix_seconds;
use crate::database::FULL;
use crate::error::{Error, Kind, Result};
use serde_json::json;
use std::collections::BTreeSet;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// So often a job waits for room on the disk: after that it is what takes it.
const WAITS_MAX: u64 = 3;

impl Inner {
    /// Works on a queued job until it is over, its quantum is, or the server stops.
    pub(super) async fn work(self: &Arc<Self>, entry: &JobEntry) {
        if !self.writable().await || !entry.job.send_if_modified(|job| job.begin(unix_seconds())) {
            return;
        }
        let id = entry.job.borrow().id.clone();
        let tenant = entry.job.borrow().owner.tenant.clone().unwrap_or_default();
        let _active = self.pace.enter(&tenant);
        let failure = match self.carry_out(&id, entry).await {
            Ok(false) => return self.set_aside(&id, entry).await,
            Ok(true) => None,
            // What was begun at a shutdown is begun again by the next start.
            Err(_) if self.pace.is_stopping() => return,
            // Nothing of it is lost but time: it begins again when there is room.
            Err(e) if e.code == FULL && entry.waits.fetch_add(1, Relaxed) < WAITS_MAX => {
                self.storage.make_read_only(&e.message);
                tracing::warn!(job = id, error = %e, "a job waits for room on the disk");
                entry.job.send_if_modified(|job| job.state != State::Cancelled && job.requeue());
                return;
            }
            Err(e) => Some(e),
        };
        // One that was cancelled in the last moment is over, and stays as it was told to be.
        if !entry.job.send_if_modified(|job| job.end(failure.as_ref(), unix_seconds())) {
            return;
        }
        let kind = entry.job.borrow().work.kind().word();
        match &failure {
            None => tracing::info!(job = id, kind, "a job is done"),
            Some(e) => tracing::warn!(job = id, kind, code = e.code, error = %e, "a job failed"),
        }
        let job = entry.job.borrow().clone();
        while let Err(error) = self.settle(&job).await {
            // It begins anew with the next start, and finds what it published.
            tracing::error!(job = id, %error, "the end of a job is not in its journal");
            if error.code != FULL || !self.writable().await {
                return;
            }
        }
    }

    /// A job that was neither cancelled nor stopped has had its turn: it waits again, and gets
    /// twice as long the next time.
    async fn set_aside(&self, id: &str, entry: &JobEntry) {
        // One that was paused is where it was told to be.
        if self.pace.is_stopping() || !entry.job.send_if_modified(Job::set_aside) {
            return;
        }
        let _ = entry.quantum.fetch_update(Relaxed, Relaxed, |quantum| quantum.checked_mul(2));
        tracing::info!(job = id, "a job is set aside for another tenant's");
        if let Err(error) = self.journal.set_aside(id).await {
            tracing::warn!(job = id, %error, "the journal still has it running");
        }
    }

    /// False when it was cancelled, its quantum is over, or the server stops.
    async fn carry_out(self: &Arc<Self>, id: &str, entry: &JobEntry) -> Result<bool> {
        let job = entry.job.borrow().clone();
        self.journal.start(&job, unix_seconds()).await?;
        let made = match self.published(&job) {
            Some(made) => made,
            None => {
                let Some((staging, result)) = self.made(entry).await? else { return Ok(false) };
                if !entry.job.send_if_modified(|job| job.advance(Stage::Publishing)) {
                    return Ok(false);
                }
                if let Some(Made { report, picture }) = &result {
                    self.journal.report(id, report, picture).await?;
                }
                // Known more exactly than before it was made.
                let work = entry.job.borrow().work.clone();
                let how = Publish {
                    lineage: work.lineage(id, rests_on(&entry.kept)),
                    candidate: work.is_candidate(),
                    by: job.actor(),
                    ..Publish::default()
                };
                self.registry.publish(staging, how).await?
            }
        };
        if made.state == VersionState::Ineffective {
            let message = format!(
                "{} was made and changes nothing (its probe saw {}), so it is not served",
                made.version.id(),
                made.version.logit_change_max
            );
            return Err(Error::new(Kind::Conflict, "adapter_ineffective", message));
        }
        let (version, digest) = (made.version.id(), made.version.digest.to_string());
        let outcome = Outcome { id: version, digest, files: Vec::new(), tokens: None };
        entry.job.send_modify(|job| job.published(outcome));
        match job.work.kind() {
            WorkKind::Merge => self.evaluated(id, entry, &made).await,
            WorkKind::Train => self.gated(entry, &made).await,
        }
    }

    /// The version that this job published before the server ended, if it did.
    fn published(&self, job: &Job) -> Option<Entry> {
        let of_job = |e: &Entry| {
            let lineage = &e.version.lineage;
            lineage.job() == Some(job.id.as_str()) && !lineage.is_checkpoint()
        };
        self.registry.versions(job.work.name()).into_iter().find(of_job)
    }

    /// The made adapter in a staging directory; `None` where `carry_out` is false.
    async fn made(self: &Arc<Self>, entry: &JobEntry) -> Result<Option<(Staging, Option<Made>)>> {
        let name = entry.job.borrow().work.name().to_owned();
        let staging = self.registry.stage(&name)?;
        let (inner, entry) = (self.clone(), entry.clone());
        let runtime = Handle::current();
        apart(move || inner.make(&entry, &runtime, staging)).await
    }

    /// Makes the adapter. Blocking.
    fn make(
        &self,
        entry: &JobEntry,
        runtime: &Handle,
        staging: Staging,
    ) -> Result<Option<(Staging, Option<Made>)>> {
        let (pace, job) = (&self.pace, &entry.job);
        let (id, work) = (job.borrow().id.clone(), job.borrow().work.clone());
        let tenant = job.borrow().owner.tenant.clone().unwrap_or_default();
        let unwanted = || pace.is_stopping() || job.borrow().state == State::Cancelled;
        let begun = {
            let files = runtime.block_on(self.contents(&job.borrow().clone()))?;
            let created = job.borrow().created;
            let sources = Sources { registry: &self.registry, kept: &entry.kept, files };
            work.begin((&id, created), &self.means, sources, &unwanted)?
        };
        let Some(Begun { mut making, work: known, events, seen }) = begun else { return Ok(None) };
        if let Some(known) = known {
            runtime.block_on(self.journal.learns(&job.borrow().clone(), &seen))?;
            runtime.block_on(self.journal.specify(&id, &known))?;
            job.send_modify(|job| job.work = Arc::new(known));
        }
        self.tell(&id, runtime, &events)?;
        job.send_if_modified(|job| job.made_ready());
        let mut spent = Duration::ZERO;
        loop {
            if unwanted() {
                return Ok(None);
            }
            // Paused, or resumed before this was seen: it begins again where it was kept.
            let stopped = !matches!(job.borrow().state, State::Running(_));
            if stopped || self.is_quantum_over(entry, spent) {
                making.keep()?;
                return Ok(None);
            }
            let (stepped, worked) = pace.compute(&tenant, || making.step(&unwanted));
            let Some(stepped) = stepped? else { return Ok(None) };
            let Stepped { progress, events, checkpoint, kept } = stepped;
            self.tell(&id, runtime, &events)?;
            if checkpoint && progress.done < progress.total {
                self.checkpoint(entry, &making, runtime, progress.done as u64)?;
            }
            if kept && job.send_if_modified(|job| std::mem::take(&mut job.restarts) > 0) {
                runtime.block_on(self.journal.got_further(&id))?;
            }
            spent += worked;
            job.send_modify(|job| job.progress = Some(progress));
            if progress.done == progress.total {
                self.registry.check_reserve()?;
                let made = making.finish(&staging.dir)?;
                return Ok(Some((staging, made)));
            }
            if making.rests() {
                pace.rest(worked);
            }
        }
    }

    /// Publishes what a job stands at as a version that the name does not move to. One that is not
    /// taken is told of, and the job goes on.
    fn checkpoint(
        &self,
        entry: &JobEntry,
        making: &Making,
        runtime: &Handle,
        step: u64,
    ) -> Result<()> {
        let job = entry.job.borrow().clone();
        let rests_on = rests_on(&entry.kept);
        let Some(lineage) = job.work.checkpoint_lineage(&job.id, step, rests_on) else {
            return Ok(());
        };
        let versions = self.registry.versions(job.work.name());
        if versions.iter().any(|e| e.version.lineage.checkpoint_of(&job.id) == Some(step)) {
            return Ok(()); // from before the server ended
        }
        let published = self.registry.stage(job.work.name()).and_then(|staging| {
            making.export(&staging.dir)?;
            let how = Publish { lineage, candidate: true, by: job.actor(), ..Publish::default() };
            runtime.block_on(self.registry.publish(staging, how))
        });
        let event = match published {
            Ok(entry) => {
                let message = format!("Checkpoint {} after step {step}", entry.version.id());
                Event { step: Some(step), ..Event::message(Level::Info, message) }
            }
            Err(error) if error.code == FULL => return Err(error),
            Err(error) => {
                let message = format!("No checkpoint after step {step}: {}", error.message);
                Event::message(Level::Warn, message)
            }
        };
        self.tell(&job.id, runtime, &[event])
    }

    /// The files that a job reads, in its order.
    pub(super) async fn contents(&self, job: &Job) -> Result<Vec<File>> {
        let mut files = Vec::new();
        for id in job.work.files() {
            let tenant = job.owner.tenant.as_deref();
            files.push(self.means.files.open_content(id, tenant).await?.1);
        }
        Ok(files)
    }

    /// Writes down what a job tells.
    fn tell(&self, id: &str, runtime: &Handle, events: &[Event]) -> Result<()> {
        if events.is_empty() {
            return Ok(());
        }
        runtime.block_on(self.journal.tell(id, unix_seconds(), events))
    }

    /// Adds the evaluation that was asked for to the report; false as for `carry_out`. What goes
    /// wrong stands in the report: the adapter is there and serves.
    async fn evaluated(&self, id: &str, entry: &JobEntry, made: &Entry) -> Result<bool> {
        let sets = self.journal.sets(id).await?;
        if sets.is_empty() {
            return Ok(true);
        }
        let work = entry.job.borrow().work.clone();
        let mut contestants = vec![Contestant { model: "base".to_owned(), id: None }];
        for (model, kept) in work.compared().into_iter().zip(entry.kept.iter()) {
            let id = Some(kept.version().id());
            contestants.push(Contestant { model, id });
        }
        let result = made.version.id();
        contestants.push(Contestant { model: result.clone(), id: Some(result) });
        let begun = Instant::now();
        let over = || self.is_evaluation_over(entry, begun);
        let table = self.bench(REST).evaluate(&sets, &contestants, over).await;
        let table = match table {
            Ok(None) => return Ok(false),
            Ok(Some(table)) => json!(table),
            Err(_) if self.pace.is_stopping() => return Ok(false),
            Err(e) => json!({"error": {"code": e.code, "message": e.message}}),
        };
        self.journal.evaluation(id, &table.to_string()).await?;
        Ok(true)
    }

    /// Where adapters are scored, resting so many times as long as that took while requests run.
    pub(super) fn bench(&self, rest: u32) -> Bench<'_> {
        Bench { registry: &self.registry, engine: &self.engine, pace: &self.pace, rest }
    }

    /// Whether an evaluation that began then is to stop.
    pub(super) fn is_evaluation_over(&self, entry: &JobEntry, begun: Instant) -> bool {
        self.pace.is_stopping()
            || entry.job.borrow().state.is_over()
            || self.is_quantum_over(entry, begun.elapsed())
    }
}

/// Training jobs that these sources rest on.
fn rests_on(kept: &[PinnedSource]) -> Vec<String> {
    let all = kept.iter().flat_map(|source| source.version().lineage.training_jobs());
    let all: BTreeSet<String> = all.map(str::to_owned).collect();
    all.into_iter().collect()
}
