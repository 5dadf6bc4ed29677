//! What becomes of a trained version: measured, judged, and its name moved or not.
//!
//! Owns the order of these. Never trains, and decides by the job's thresholds alone. The thing to
//! know: the judgement is written down before the name moves, and the name moves only from the
//! version that was judged against, so a restart neither judges twice nor undoes what came since.

use super::evaluate::Contestant;
use super::events::{Event, Level};
use super::job::Job;
use super::pace::apart;
use super::stage::Stage;
use super::train::{Change, Gate, Promote, Reading, TrainingSpec, Verdict};
use super::work::Work;
use super::{Inner, JobEntry};
use crate::adapters::version::{Entry, Expected, servable};
use crate::clock::unix_seconds;
use crate::database::FULL;
use crate::error::{Error, Result};
use crate::train::Steps;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Instant;
use tokio::runtime::Handle;

/// Rest for each second of scoring while requests run: a step with an example's rows in it is
/// rarer than what a 99th percentile sees, and a name does not wait for hours.
const REST: u32 = 50;

impl Inner {
    /// Measures and judges what a job published, and moves the name or not; false as for
    /// `carry_out`.
    pub(super) async fn gated(self: &Arc<Self>, entry: &JobEntry, made: &Entry) -> Result<bool> {
        let job = entry.job.borrow().clone();
        let Work::Train(spec) = &*job.work else {
            return Err(Error::fault("only what was trained is judged"));
        };
        // Others may come meanwhile: it is not pushed out by them.
        let _kept = self.registry.keep(&made.version.name, made.version.number)?;
        let known = match job.gate.clone() {
            Some(known) => known,
            None => match self.judged(entry, spec, made).await? {
                Some(verdict) => verdict,
                None => return Ok(false),
            },
        };
        if !entry.job.send_if_modified(|job| job.advance(Stage::Publishing)) {
            return Ok(false);
        }
        let verdict = self.promoted(&job, spec, made, known).await?;
        let (files, tokens) = self.left_beside(&job, made).await?;
        entry.job.send_modify(|job| {
            job.gate = Some(verdict);
            if let Some(outcome) = &mut job.outcome {
                (outcome.files, outcome.tokens) = (files, Some(tokens));
            }
        });
        Ok(true)
    }

    /// How a result stands beside the base and what its name means; written down. `None` where
    /// `carry_out` is false.
    async fn judged(
        self: &Arc<Self>,
        entry: &JobEntry,
        spec: &TrainingSpec,
        made: &Entry,
    ) -> Result<Option<Verdict>> {
        let job = entry.job.borrow().clone();
        let current = self.current(&spec.name);
        let before = current.as_ref().map(|entry| entry.version.number);
        let (reasons, evaluation) = match spec.holds_out() {
            false => (Vec::new(), Value::Null),
            true => match self.measured(entry, spec, current.as_ref(), made).await {
                Ok(None) => return Ok(None),
                Ok(Some((reasons, evaluation))) => (reasons, evaluation),
                Err(_) if self.pace.is_stopping() => return Ok(None),
                Err(e) if e.code == FULL => return Err(e),
                Err(e) => unmeasured(&spec.gate, &e),
            },
        };
        let verdict = Verdict { passed: reasons.is_empty(), reasons, before, promoted: false };
        let (event, evaluation) = (told(spec, made, &verdict), evaluation.to_string());
        let events: Vec<Event> = event.into_iter().collect();
        let journal = &self.journal;
        journal.judged(&job.id, (&verdict, &evaluation), unix_seconds(), &events).await?;
        entry.job.send_modify(|job| job.gate = Some(verdict.clone()));
        Ok(Some(verdict))
    }

    /// What of the gate does not hold, and the figures; `None` where `carry_out` is false.
    async fn measured(
        self: &Arc<Self>,
        entry: &JobEntry,
        spec: &TrainingSpec,
        current: Option<&Entry>,
        made: &Entry,
    ) -> Result<Option<(Vec<String>, Value)>> {
        let job = entry.job.borrow().clone();
        let (files, means) = (self.contents(&job).await?, self.means.clone());
        let (pace, watched, asked) = (self.pace.clone(), entry.job.clone(), spec.clone());
        let read = apart(move || {
            let over = || pace.is_stopping() || watched.borrow().state.is_over();
            let reading = Reading { spec: &asked, created: job.created, means: &means };
            reading.held_out(files, &over)
        });
        let Some(held) = read.await? else { return Ok(None) };
        if held.examples.is_empty() {
            return Err(Error::invalid("invalid_training_file", "nothing held out can be scored"));
        }
        let mut contestants = vec![Contestant { model: "base".to_owned(), id: None }];
        let others = current.filter(|c| c.version.number != made.version.number);
        for version in others.into_iter().chain([made]).map(|entry| entry.version.id()) {
            contestants.push(Contestant { model: version.clone(), id: Some(version) });
        }
        let begun = Instant::now();
        let over = || self.is_evaluation_over(entry, begun);
        let scored = self.bench(REST).score(&held.examples, &contestants, &over).await?;
        let Some(scored) = scored else { return Ok(None) };
        let (measured, report) = held.measured(&contestants, &scored);
        Ok(Some((spec.gate.broken(&measured), report)))
    }

    /// The version that a name means, where it serves.
    fn current(&self, name: &str) -> Option<Entry> {
        let versions = self.registry.versions(name);
        versions.into_iter().find(|entry| entry.current && servable(&entry.version))
    }

    /// Moves the name to what passed, where that was asked for.
    async fn promoted(
        &self,
        job: &Job,
        spec: &TrainingSpec,
        made: &Entry,
        mut verdict: Verdict,
    ) -> Result<Verdict> {
        if !verdict.passed || verdict.promoted || spec.promote != Promote::Auto {
            return Ok(verdict);
        }
        let (name, number) = (&made.version.name, made.version.number);
        // Moved already, by this job before the server ended or by somebody.
        let is_there = self.current(name).is_some_and(|entry| entry.version.number == number);
        if !is_there {
            let expected = match verdict.before {
                Some(before) => Expected::Version(before),
                None => Expected::Absent,
            };
            let (expected, by) = (vec![expected], job.actor());
            match self.registry.roll_back(name, Some(number), expected, &by).await {
                Ok(_) => {}
                Err(e) if e.code == FULL || self.pace.is_stopping() => return Err(e),
                Err(e) => {
                    let id = made.version.id();
                    let message = format!("The name does not move to {id}: {}", e.message);
                    let event = Event::message(Level::Warn, message);
                    self.journal.tell(&job.id, unix_seconds(), &[event]).await?;
                    verdict.reasons.push(e.message);
                    return Ok(verdict);
                }
            }
        }
        verdict.promoted = true;
        Ok(verdict)
    }

    /// The report of what was trained, and the table of its steps as a file of its owner's; also
    /// the tokens that were read.
    async fn left_beside(self: &Arc<Self>, job: &Job, made: &Entry) -> Result<(Vec<String>, u64)> {
        let (inner, runtime, made) = (self.clone(), Handle::current(), made.clone());
        let tenant = job.owner.tenant.clone().unwrap_or_default();
        let weights = apart(move || {
            let kept = inner.registry.keep(&made.version.name, made.version.number)?;
            let adapter = inner.registry.open_factors(&kept)?;
            let mut change = Change::new(&adapter, &inner.means);
            loop {
                let (more, worked) = inner.pace.compute(&tenant, || change.step());
                if !more? {
                    return Ok(change.report());
                }
                runtime.block_on(inner.pace.rest_task(worked, REST));
            }
        });
        let weights = match weights.await {
            Ok(weights) => weights,
            Err(e) => json!({"error": {"code": e.code, "message": e.message}}),
        };
        let told = self.journal.told_since(&job.id, 0).await?;
        let steps = Steps::of(told.into_iter().filter_map(|stored| stored.event.metrics));
        let tokens = steps.tokens();
        let report = json!({"trained_tokens": tokens, "last": steps.last(), "weights": weights});
        self.journal.report(&job.id, &report.to_string(), &steps.picture()).await?;
        let tenant = job.owner.tenant.as_deref();
        let name = format!("{}-steps.csv", job.id);
        let file = self.means.files.add_result(tenant, &name, steps.csv().into_bytes()).await?;
        Ok((vec![file.id], tokens))
    }
}

/// Of what could not be measured: whatever asks for a figure does not hold.
fn unmeasured(gate: &Gate, error: &Error) -> (Vec<String>, Value) {
    let reason = format!("it could not be measured: {}", error.message);
    let reasons = if gate.is_open() { Vec::new() } else { vec![reason] };
    (reasons, json!({"error": {"code": error.code, "message": error.message}}))
}

/// What is told of a judgement.
fn told(spec: &TrainingSpec, made: &Entry, verdict: &Verdict) -> Option<Event> {
    let (id, name) = (made.version.id(), &spec.name);
    if !verdict.passed {
        let reasons = verdict.reasons.join("; ");
        let message = format!("The gate refuses {id}, which stays a candidate: {reasons}");
        return Some(Event::message(Level::Warn, message));
    }
    let message = match spec.promote {
        Promote::Auto => return None,
        Promote::Manual => format!(
            "{id} passes the gate; POST /v1/adapters/{name}/rollback with {{\"version\": {}}} \
             moves the name to it",
            made.version.number
        ),
        Promote::Never => format!("{id} passes the gate, and the name stays as it is"),
    };
    Some(Event::message(Level::Info, message))
}
