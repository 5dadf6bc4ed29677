//! Jobs, events and what they came to, as OpenAI's clients type them.
//!
//! Owns the words of the wire. Never changes a job. The thing to know: the clients know six
//! statuses and no pause, so a job that is paused is `queued` and says so under `polylora`.

use crate::adapters::version::Entry;
use crate::api::wire::{
    FineTuningCheckpoint, FineTuningError, FineTuningEvent, FineTuningExtra, FineTuningJob,
    GateShown, Hyperparameters, Method, MethodShown,
};
use crate::clock::unix_seconds;
use crate::jobs::{Job, Stage, State, StoredEvent, TrainingSpec, Verdict, Work};
use serde_json::{Value, json};

/// Whom OpenAI's objects belong to.
const ORGANIZATION: &str = "polylora";

/// A training job; `None` for one of another kind.
pub fn job(job: &Job) -> Option<FineTuningJob> {
    let Work::Train(spec) = &*job.work else { return None };
    let shown = hyperparameters(spec);
    let method = MethodShown { hyperparameters: shown.clone() };
    let (supervised, dpo, r#type) = match spec.asked.beta {
        None => (Some(method), None, "supervised"),
        Some(_) => (None, Some(method), "dpo"),
    };
    let progress = job.progress;
    Some(FineTuningJob {
        object: "fine_tuning.job",
        id: job.id.clone(),
        created_at: job.created,
        finished_at: job.ended,
        estimated_finish: estimated_finish(job),
        model: spec.model.clone(),
        fine_tuned_model: job.outcome.as_ref().map(|outcome| outcome.id.clone()),
        organization_id: ORGANIZATION,
        status: status(job),
        hyperparameters: shown,
        method: Method { r#type, supervised, dpo },
        training_file: spec.training.id.clone(),
        validation_file: spec.validation.as_ref().map(|file| file.id.clone()),
        result_files: job.outcome.iter().flat_map(|outcome| outcome.files.clone()).collect(),
        trained_tokens: job.outcome.as_ref().and_then(|outcome| outcome.tokens),
        error: job.failure.as_ref().map(|failure| FineTuningError {
            code: failure.code.clone(),
            message: failure.message.clone(),
            param: blamed(&failure.code),
        }),
        seed: spec.asked.seed,
        integrations: Vec::new(),
        metadata: spec.metadata.clone(),
        polylora: FineTuningExtra {
            name: spec.name.clone(),
            stage: match job.state {
                State::Running(stage) => Some(stage.name()),
                _ => None,
            },
            paused: job.state == State::Paused,
            step: progress.map(|p| p.done as u64),
            steps: progress.map(|p| p.total as u64),
            restarted: job.restarts,
            resolved: spec.resolved.as_ref().map(|resolved| json!(resolved)),
            promote: spec.promote.name(),
            validation_split: spec.validation_split,
            gate: job.gate.as_ref().map(|verdict| gate(spec, verdict)),
        },
    })
}

fn gate(spec: &TrainingSpec, verdict: &Verdict) -> GateShown {
    GateShown {
        passed: verdict.passed,
        reasons: verdict.reasons.clone(),
        promoted: verdict.promoted,
        thresholds: json!(spec.gate),
    }
}

fn status(job: &Job) -> &'static str {
    match job.state {
        State::Running(Stage::Preparing) => "validating_files",
        State::Queued | State::Paused => "queued",
        State::Running(_) => "running",
        State::Done => "succeeded",
        State::Failed => "failed",
        State::Cancelled => "cancelled",
    }
}

/// The parameter of the job that an error is about.
fn blamed(code: &str) -> Option<&'static str> {
    match code {
        "invalid_training_file" => Some("training_file"),
        "invalid_validation_file" => Some("validation_file"),
        _ => None,
    }
}

/// What the examples came to; what is not known yet as it was asked for.
fn hyperparameters(spec: &TrainingSpec) -> Hyperparameters {
    let (asked, resolved) = (&spec.asked, spec.resolved.as_ref());
    let known = |resolved: Option<Value>, asked: Option<Value>| {
        resolved.or(asked).unwrap_or_else(|| json!("auto"))
    };
    Hyperparameters {
        n_epochs: known(resolved.map(|r| json!(r.epochs)), asked.epochs.map(|n| json!(n))),
        batch_size: known(resolved.map(|r| json!(r.batch)), asked.batch.map(|n| json!(n))),
        learning_rate_multiplier: known(
            resolved.map(|_| json!(asked.lr_multiplier.unwrap_or(1.0))),
            asked.lr_multiplier.map(|n| json!(n)),
        ),
        beta: asked.beta.map(|beta| json!(beta)),
    }
}

/// When it will be over if it goes on as it did since it began.
fn estimated_finish(job: &Job) -> Option<u64> {
    let (started, progress) = (job.started?, job.progress?);
    let (State::Running(Stage::Training), true) = (job.state, progress.done > 0) else {
        return None;
    };
    let now = unix_seconds();
    let left = (progress.total - progress.done) as u64;
    Some(now + now.saturating_sub(started) * left / progress.done as u64)
}

pub fn event(stored: &StoredEvent) -> FineTuningEvent {
    let event = &stored.event;
    FineTuningEvent {
        object: "fine_tuning.job.event",
        id: format!("ftevent-{}", stored.number),
        created_at: stored.at,
        level: event.level.name(),
        message: event.message.clone(),
        r#type: if event.metrics.is_some() { "metrics" } else { "message" },
        data: event.metrics.clone().unwrap_or_else(|| json!({})),
    }
}

/// What a job left at the ends of epochs, newest first, with the figures of the step.
pub fn checkpoints(
    job: &Job,
    versions: &[Entry],
    told: &[StoredEvent],
) -> Vec<FineTuningCheckpoint> {
    let of = |entry: &Entry| {
        let version = &entry.version;
        let step = version.lineage.checkpoint_of(&job.id)?;
        let measured =
            told.iter().find(|e| e.event.step == Some(step) && e.event.metrics.is_some());
        Some(FineTuningCheckpoint {
            object: "fine_tuning.job.checkpoint",
            id: format!("ftckpt_{}_{step}", job.id),
            created_at: version.created,
            fine_tuning_job_id: job.id.clone(),
            step_number: step,
            fine_tuned_model_checkpoint: version.id(),
            metrics: measured.and_then(|e| e.event.metrics.clone()).unwrap_or_else(|| json!({})),
        })
    };
    versions.iter().rev().filter_map(of).collect()
}
