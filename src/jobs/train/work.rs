//! A training job under way: its examples are read, then step follows step.
//!
//! Owns the order of these, and where the trainer's state is kept. Never computes a step on its own
//! thread. The thing to know: the state is written at the border of a step, so a job goes on where
//! it was written last and comes to the same bytes.

use super::means::Means;
use super::quantum;
use super::read::{Data, Dataset, Job};
use super::spec::TrainingSpec;
use crate::database::write_failed;
use crate::engine::EngineHandle;
use crate::error::{Error, Kind, Result};
use crate::jobs::events::{Event, Level};
use crate::jobs::stage::{Progress, Stepped};
use crate::train::data::Digest;
use crate::train::{StepReport, TrainSpec, Trainer, figures};
use polylora_kernels::Device;
use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time after which the state is written again: what a crash can cost. Longer where writing takes
/// more than a part of it.
const KEEP_TIME: Duration = Duration::from_secs(10);
const KEEP_PART: u32 = 50;

/// A job with its trainer.
pub struct Training {
    engine: EngineHandle,
    /// The engine has it while a step runs.
    trainer: Option<Box<Trainer>>,
    state: PathBuf,
    kept: Instant,
    /// What writing it took the last time.
    keeping: Duration,
    base_name: String,
}

/// A job that was begun.
pub struct Start {
    pub training: Training,
    /// What the job came to.
    pub spec: TrainingSpec,
    pub events: Vec<Event>,
    /// Digests of the lines that it learns, sorted.
    pub seen: Vec<Digest>,
}

impl Training {
    /// Reads the files and takes the memory; goes on where the state was kept. Blocking. `None`
    /// when `over` says so first. `from`: the adapter that it goes on from. Errors:
    /// `invalid_training_file`, `training_memory_exhausted`, `incompatible_start`.
    pub fn begin(
        id: &str,
        (spec, created): (&TrainingSpec, u64),
        (files, from): (Vec<File>, Option<PathBuf>),
        means: &Means,
        over: &dyn Fn() -> bool,
    ) -> Result<Option<Start>> {
        let Some(data) = (Job { spec, created, means }).data(files, over)? else {
            return Ok(None);
        };
        let Data { training: data, validation: valid } = data;
        let mut resolved = spec.asked.resolve(data.count(), means.weights.shape.hidden);
        resolved.start = spec.from.first().map(|parent| parent.digest.clone());
        let longest = |data: &Dataset| data.examples.longest();
        let longest = valid.as_ref().map_or(0, longest).max(longest(&data));
        let rows = rows(&resolved, longest, means)?;
        let mut events = told(&data, valid.as_ref(), &resolved);
        let (weights, trained) = (means.weights.clone(), resolved.clone());
        let (examples, valid) = (data.examples, valid.map(|data| data.examples));
        let make = move |device: &Device| {
            Trainer::new(weights, device, trained, rows, examples, valid, from.as_deref())
        };
        let Some(mut trainer) = quantum::start(&means.engine, make, over)? else {
            return Ok(None);
        };
        let state = means.directory.join(id);
        if state.exists() {
            trainer.restore(&state)?;
            let message = format!("Going on after step {}", trainer.step());
            events.push(Event::message(Level::Info, message));
        }
        let spec = spec.resolved(resolved, trainer.steps(), means.weights.digest);
        let trainer = Some(Box::new(trainer));
        let (engine, base_name) = (means.engine.clone(), means.base_name.clone());
        let (kept, keeping) = (Instant::now(), Duration::ZERO);
        let training = Self { engine, trainer, state, kept, keeping, base_name };
        Ok(Some(Start { training, spec, events, seen: data.digests }))
    }

    /// The next optimizer step. Blocking. `None` when `over` says so before its end.
    pub fn step(&mut self, over: &dyn Fn() -> bool) -> Result<Option<Stepped>> {
        let begun = Instant::now();
        let trainer = self.taken()?;
        let Some((trainer, report)) = quantum::run(&self.engine, trainer, over)? else {
            return Ok(None);
        };
        let (done, total) = (trainer.step() as usize, trainer.steps() as usize);
        let progress = Progress { done, total };
        self.trainer = Some(trainer);
        let checkpoint = report.as_ref().is_some_and(|report| report.epoch_end);
        let event = report.map(|report| event(&report, begun.elapsed()));
        let kept = self.kept.elapsed() > KEEP_TIME.max(KEEP_PART * self.keeping);
        if kept {
            self.keep()?;
        }
        Ok(Some(Stepped { progress, events: event.into_iter().collect(), checkpoint, kept }))
    }

    fn taken(&mut self) -> Result<Box<Trainer>> {
        self.trainer.take().ok_or_else(|| Error::fault("a training job lost its trainer"))
    }

    /// Writes the state down, so that the next start of the job goes on from here.
    pub fn keep(&mut self) -> Result<()> {
        if let Some(trainer) = &self.trainer {
            let begun = Instant::now();
            if let Some(directory) = self.state.parent() {
                let made = std::fs::create_dir_all(directory);
                let what = || format!("cannot make {}", directory.display());
                made.map_err(|e| write_failed(&what(), &e))?;
            }
            trainer.save(&self.state)?;
            (self.kept, self.keeping) = (Instant::now(), begun.elapsed());
        }
        Ok(())
    }

    /// Writes the adapter as it is into `dir`.
    pub fn export(&self, dir: &Path) -> Result<()> {
        match &self.trainer {
            Some(trainer) => trainer.export(dir, &self.base_name),
            None => Err(Error::fault("a training job lost its trainer")),
        }
    }
}

/// Removes what a job that is over kept.
pub fn forget(directory: &Path, id: &str) {
    let state = directory.join(id);
    if let Err(error) = std::fs::remove_file(&state)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(job = id, %error, "the state of a training job is left");
    }
}

/// Removes states of jobs that are not there any more, or are over. Blocking.
pub fn sweep(directory: &Path, unfinished: &HashSet<String>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !unfinished.contains(&name) {
            forget(directory, &name);
        }
    }
}

/// The most rows of a pass that a job's part of the memory allows.
fn rows(spec: &TrainSpec, longest: usize, means: &Means) -> Result<usize> {
    let most = means.bytes_max();
    Trainer::rows(&means.weights, spec, longest, means.threads, most).map_err(|needed| {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let message = format!(
            "the job needs {} MiB, and a job may have {} MiB (half of train_bytes); a smaller \
             rank, fewer target_modules or shorter examples (the longest has {longest} tokens) \
             need less",
            mib(needed),
            mib(most),
        );
        Error::new(Kind::Capacity, "training_memory_exhausted", message)
    })
}

/// What is told before the first step.
fn told(data: &Dataset, validation: Option<&Dataset>, spec: &TrainSpec) -> Vec<Event> {
    let mut events = data.warnings("training");
    events.extend(validation.into_iter().flat_map(|data| data.warnings("validation")));
    let shared = validation.map_or(0, |other| data.shared(other));
    if shared > 0 {
        let message = format!("The validation file has {shared} lines of the training file");
        events.push(Event::message(Level::Warn, message));
    }
    let scale = spec.scale();
    let message = format!(
        "{} examples of {} tokens; epochs {}, batches of {}, learning rate {:.2e}, rank {}, \
         scale {scale:.3}",
        data.count(),
        data.examples.tokens(),
        spec.epochs,
        spec.batch,
        spec.lr,
        spec.rank
    );
    events.push(Event::message(Level::Info, message));
    events
}

/// A step, told.
fn event(report: &StepReport, took: Duration) -> Event {
    let message =
        format!("Step {}/{}: training loss={:.4}", report.step, report.steps, report.loss);
    let metrics = Some(figures(report, took));
    Event { level: Level::Info, message, metrics, step: Some(report.step) }
}
