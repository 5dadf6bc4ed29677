//! One job carried out: merge, write the report down, publish, evaluate, end.
//!
//! Owns the order of these. Never computes on the server's own threads. The thing to know: each
//! step can be the last before a crash. Before publication everything is made again; the version
//! that was published names its job, so after publication nothing is.

use super::evaluate::{Contestant, evaluate};
use super::job::{Job, Outcome, Stage, State};
use super::pace::apart;
use super::plan::{Made, Plan};
use super::{Inner, Posted, now};
use crate::adapters::registry::Staging;
use crate::adapters::version::{Entry, Lineage, Publish, State as VersionState};
use crate::database::FULL;
use crate::error::{Error, Kind, Result};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// So often a job waits for room on the disk: after that it is what takes it.
const WAITS_MAX: u64 = 3;

impl Inner {
    /// Works on a queued job until it is over, its turn is, or the server stops.
    pub(super) async fn work(self: &Arc<Self>, posted: &Posted) {
        if !self.writable().await || !posted.job.send_if_modified(|job| job.begin(now())) {
            return;
        }
        let id = posted.job.borrow().id.clone();
        let tenant = posted.job.borrow().owner.tenant.clone().unwrap_or_default();
        let _active = self.pace.enter(&tenant);
        let failure = match self.carry_out(&id, posted).await {
            Ok(false) => return self.set_aside(&id, posted).await,
            Ok(true) => None,
            // What was begun at a shutdown is begun again by the next start.
            Err(_) if self.pace.is_stopping() => return,
            // Nothing of it is lost but time: it begins again when there is room.
            Err(e) if e.code == FULL && posted.waits.fetch_add(1, Relaxed) < WAITS_MAX => {
                self.storage.turn(&e.message);
                tracing::warn!(job = id, error = %e, "a merge waits for room on the disk");
                posted.job.send_if_modified(|job| job.state != State::Cancelled && job.requeue());
                return;
            }
            Err(e) => Some(e),
        };
        // One that was cancelled in the last moment is over, and stays as it was told to be.
        if !posted.job.send_if_modified(|job| job.end(failure.as_ref(), now())) {
            return;
        }
        match &failure {
            None => tracing::info!(job = id, "merged"),
            Some(e) => tracing::warn!(job = id, code = e.code, error = %e, "a merge failed"),
        }
        let job = posted.job.borrow().clone();
        while let Err(error) = self.settle(&job).await {
            // It begins anew with the next start, and finds what it published.
            tracing::error!(job = id, %error, "the end of a merge is not in its journal");
            if error.code != FULL || !self.writable().await {
                return;
            }
        }
    }

    /// A job that was neither cancelled nor stopped has had its turn: it waits again, and gets
    /// twice as long the next time.
    async fn set_aside(&self, id: &str, posted: &Posted) {
        if self.pace.is_stopping() || !posted.job.send_if_modified(Job::set_aside) {
            return;
        }
        let _ = posted.turn.fetch_update(Relaxed, Relaxed, |turn| turn.checked_mul(2));
        tracing::info!(job = id, "a merge is set aside for another tenant's");
        if let Err(error) = self.journal.set_aside(id).await {
            tracing::warn!(job = id, %error, "the journal still has it running");
        }
    }

    /// False when it was cancelled, its turn is over, or the server stops.
    async fn carry_out(self: &Arc<Self>, id: &str, posted: &Posted) -> Result<bool> {
        let job = posted.job.borrow().clone();
        self.journal.start(&job, now()).await?;
        let entry = match self.published(&job) {
            Some(entry) => entry,
            None => {
                let Some((staging, made)) = self.merged(posted).await? else { return Ok(false) };
                if !posted.job.send_if_modified(|job| job.advance(Stage::Publishing)) {
                    return Ok(false);
                }
                self.journal.report(id, &made.report, &made.picture).await?;
                let how = Publish { lineage: lineage(&job), by: job.actor(), ..Publish::default() };
                self.registry.publish(staging, how).await?
            }
        };
        if entry.state == VersionState::Ineffective {
            let message = format!(
                "{} was made and changes nothing (its probe saw {}), so it is not served",
                entry.version.id(),
                entry.version.logit_change_max
            );
            return Err(Error::new(Kind::Conflict, "adapter_ineffective", message));
        }
        let version = &entry.version;
        let outcome = Outcome { id: version.id(), digest: version.digest.to_string() };
        posted.job.send_modify(|job| job.published(outcome));
        self.evaluated(id, posted, &entry).await
    }

    /// The version that this job published before the server ended, if it did.
    fn published(&self, job: &Job) -> Option<Entry> {
        let of_job = |e: &Entry| {
            let lineage = &e.version.lineage;
            matches!(lineage, Lineage::Merged { job: Some(id), .. } if *id == job.id)
        };
        self.registry.versions(&job.order.name).into_iter().find(of_job)
    }

    /// The merged adapter in a staging directory; `None` where `carry_out` is false.
    async fn merged(self: &Arc<Self>, posted: &Posted) -> Result<Option<(Staging, Made)>> {
        let order = posted.job.borrow().order.clone();
        let tenant = posted.job.borrow().owner.tenant.clone().unwrap_or_default();
        let staging = self.registry.stage(&order.name)?;
        let (inner, posted) = (self.clone(), posted.clone());
        apart(move || {
            let (pace, job) = (&inner.pace, &posted.job);
            let mut plan = Plan::new(&order, &inner.registry, &posted.kept)?;
            let mut spent = Duration::ZERO;
            loop {
                let cancelled = job.borrow().state == State::Cancelled;
                if pace.is_stopping() || cancelled || inner.is_turn_over(&posted, spent) {
                    return Ok(None);
                }
                let (progress, worked) = pace.compute(&tenant, || plan.step());
                let progress = progress?;
                spent += worked;
                job.send_modify(|job| job.progress = Some(progress));
                if progress.done == progress.total {
                    inner.registry.check_reserve()?;
                    let made = plan.finish(&staging.dir)?;
                    return Ok(Some((staging, made)));
                }
                pace.rest(worked);
            }
        })
        .await
    }

    /// Adds the evaluation that was asked for to the report; false as for `carry_out`. What goes
    /// wrong stands in the report: the adapter is there and serves.
    async fn evaluated(&self, id: &str, posted: &Posted, entry: &Entry) -> Result<bool> {
        let sets = self.journal.sets(id).await?;
        if sets.is_empty() {
            return Ok(true);
        }
        let order = posted.job.borrow().order.clone();
        let mut contestants = vec![Contestant { model: "base".to_owned(), id: None }];
        for (source, kept) in order.spec.sources.iter().zip(posted.kept.iter()) {
            let id = Some(kept.version().id());
            contestants.push(Contestant { model: source.name.clone(), id });
        }
        let result = entry.version.id();
        contestants.push(Contestant { model: result.clone(), id: Some(result) });
        let (registry, engine) = (&self.registry, &self.engine);
        let begun = Instant::now();
        let over = || {
            self.pace.is_stopping()
                || posted.job.borrow().state.is_over()
                || self.is_turn_over(posted, begun.elapsed())
        };
        let table = evaluate(&sets, &contestants, registry, engine, &self.pace, over).await;
        let table = match table {
            Ok(None) => return Ok(false),
            Ok(Some(table)) => json!(table),
            Err(_) if self.pace.is_stopping() => return Ok(false),
            Err(e) => json!({"error": {"code": e.code, "message": e.message}}),
        };
        self.journal.evaluation(id, &table.to_string()).await?;
        Ok(true)
    }
}

fn lineage(job: &Job) -> Lineage {
    Lineage::Merged {
        method: job.order.spec.method.name().to_owned(),
        from: job.order.from.clone(),
        job: Some(job.id.clone()),
    }
}
