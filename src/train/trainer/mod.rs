//! A training job, op by op: passes over batches, updates, validation.
//!
//! Owns the job's state. Never reads a clock or decides when to go on. The thing to know: its place
//! is (step, micro-batch, op), and at the border of a step it is factors, moments and a number.

mod calibrate;
mod export;
mod preference;
mod reader;
mod report;
mod sizes;
mod start;
mod state;

use super::adapter::Adapter;
use super::data::Examples;
use super::norms::Norms;
use super::optimiser::{self, Optimiser};
use super::order::Order;
use super::pass::Pass;
use super::schedule::Schedule;
use super::spec::TrainSpec;
use crate::error::{Error, Result};
use crate::model::weights::Weights;
use polylora_kernels::Device;
use preference::References;
use reader::{Reader, Reading};
pub use report::{Evaluated, StepReport};
use sizes::{options, sites};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Steps in a row that may be skipped, less one.
const SKIPPED_MAX: u32 = 3;
/// Values of an op of the optimiser.
const UPDATE_VALUES: usize = 1 << 19;

/// Rows of a pass, from the fastest down; fewer take less memory.
const ROWS: [usize; 5] = [512, 256, 128, 64, 32];

/// How far a job is.
#[derive(Debug)]
pub enum Advance {
    Running,
    /// An optimizer step is done, validation included where it has some.
    Stepped(Box<StepReport>),
    /// All steps are done.
    Done,
}

/// What the next op is.
#[derive(Debug, Clone, PartialEq)]
enum Phase {
    /// The base's part of DoRA's norms of a site, and the norms of what pairs are held against.
    Measure(usize),
    /// DoRA's norms of a site, of the factors as they are.
    Norms(usize),
    /// Examples are read to find where A starts: a round, and the next site to be settled.
    Calibrate(u32),
    Settle(u32, usize),
    /// A step begins.
    Begin,
    /// DoRA's norms of a site, of the ranks that the step reads.
    Narrow(usize),
    Train,
    /// Σ g² of some tensors on top of what is there.
    Gradient(usize, f64),
    /// The update of some tensors, by gradients of this norm.
    Update(usize, f64),
    Validate,
}

/// See the file's head.
pub struct Trainer {
    spec: TrainSpec,
    weights: Arc<Weights>,
    data: Arc<Examples>,
    validation: Option<Arc<Examples>>,
    pass: Pass,
    /// What is trained; then, if it is an adapter, what pairs are held against.
    adapters: Vec<Adapter>,
    /// Until A is found, in a job that looks for it.
    sketch: Option<[Adapter; 1]>,
    norms: Norms,
    optimiser: Optimiser,
    schedule: Schedule,
    order: Order,
    reader: Reader,
    references: References,
    /// Of the validation's pairs.
    validation_references: References,
    phase: Phase,
    /// Optimizer steps done.
    step: u64,
    /// How many of the last ones were skipped.
    skipped: u32,
    /// Of the step at hand.
    report: StepReport,
}

impl Trainer {
    /// Bytes that `new` takes for examples of at most `longest` tokens, on a device of so many
    /// threads. What grows with the number of examples (30 bytes each at most) is left out.
    pub fn bytes(
        weights: &Weights,
        spec: &TrainSpec,
        longest: usize,
        rows_max: usize,
        threads: usize,
    ) -> u64 {
        let [_, whole] = options(spec, longest, rows_max);
        // What a device refuses, `new` says.
        sizes::bytes(weights, spec, whole, threads).map_or(u64::MAX, |bytes| bytes as u64)
    }

    /// The most rows of a pass, of those that are worth it, with which `new` takes at most
    /// `bytes_max`. Errors: what the fewest rows take.
    pub fn rows(
        weights: &Weights,
        spec: &TrainSpec,
        longest: usize,
        threads: usize,
        bytes_max: u64,
    ) -> Result<usize, u64> {
        let bytes = |rows| Self::bytes(weights, spec, longest, rows, threads);
        let fits = ROWS.into_iter().find(|rows| bytes(*rows) <= bytes_max);
        fits.ok_or_else(|| bytes(ROWS[ROWS.len() - 1]))
    }

    /// Takes all memory that the job needs, and goes on from the adapter in `start`, which
    /// `spec.start` names. Errors: what the device has no room or no operation for;
    /// `incompatible_start` and every refusal of adapter files.
    ///
    /// # Panics
    /// On a spec without targets, rank or examples, on pairs that are not whole, and on a start
    /// that only one of both names.
    pub fn new(
        weights: Arc<Weights>,
        dev: &Device,
        spec: TrainSpec,
        rows_max: usize,
        data: Arc<Examples>,
        validation: Option<Arc<Examples>>,
        start: Option<&Path>,
    ) -> Result<Self> {
        assert_eq!(spec.start.is_some(), start.is_some(), "a start has a name and a directory");
        let group = spec.objective.group();
        let validation = validation.filter(|examples| !examples.is_empty());
        let all = || std::iter::once(&data).chain(&validation);
        assert!(all().all(|examples| examples.len().is_multiple_of(group)), "pairs are whole");
        let longest = all().map(|examples| examples.longest()).max().unwrap_or(0);
        let [micro, whole] = options(&spec, longest, rows_max);
        let sites = sites(&weights.shape, &spec);
        assert!(spec.rank > 0 && !sites.is_empty(), "a rank, and something to train");
        let make = if spec.freeze_a { Adapter::with_frozen_a } else { Adapter::new };
        let mut adapter = make(&weights.shape, &sites, spec.rank, spec.scale() as f32, spec.dora);
        match start {
            Some(dir) => start::read(&mut adapter, dir, &weights.shape)?,
            None => start::random(&mut adapter, &weights.shape, spec.seed),
        }
        let norms = Norms::new(dev, &weights, &adapter)?;
        let optimiser = Optimiser::new(spec.settings(), &adapter);
        let entries = data.len() / group;
        let order = Order::new(spec.seed, entries as u32, spec.batch);
        let steps = order.steps_per_epoch() * u64::from(spec.epochs);
        let validated = validation.as_ref().map_or(0, |examples| examples.len() / group);
        let pairs = |entries: usize| References::new(if group == 2 { entries } else { 0 });
        let reference = spec.has_reference().then(|| adapter.as_frozen());
        let adapters = std::iter::once(adapter).chain(reference).collect::<Vec<_>>();
        Ok(Self {
            pass: Pass::new(weights.clone(), dev, whole, &adapters)?,
            norms,
            optimiser,
            schedule: spec.schedule(steps),
            order,
            reader: Reader::new(spec.objective, micro, spec.batch.max(validated)),
            references: pairs(entries),
            validation_references: pairs(validated),
            phase: Phase::Measure(0),
            step: 0,
            skipped: 0,
            report: StepReport::default(),
            adapters,
            sketch: None,
            spec,
            weights,
            data,
            validation,
        })
    }

    /// Optimizer steps of the job.
    pub fn steps(&self) -> u64 {
        self.schedule.steps
    }

    /// Optimizer steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// One op, a few milliseconds. Errors: `non_finite_loss` after the third step in a row that
    /// has no finite loss or gradient and is skipped; what the device met.
    pub fn advance(&mut self, dev: &Device) -> Result<Advance> {
        match self.phase {
            Phase::Measure(site) if site < self.norms.len() => {
                // After a step, magnitudes are trained ones.
                let is_new = self.step == 0 && self.spec.start.is_none();
                self.norms.measure(dev, &self.weights, &mut self.adapters[0], site, is_new);
                for reference in &mut self.adapters[1..] {
                    self.norms.update(dev, &self.weights, reference, site);
                }
                self.phase = Phase::Measure(site + 1);
            }
            Phase::Measure(_) => self.phase = Phase::Norms(0),
            Phase::Norms(site) if site < self.norms.len() => {
                self.norms.update(dev, &self.weights, &mut self.adapters[0], site);
                self.phase = Phase::Norms(site + 1);
            }
            // The norms are those of the factors that the last step left.
            Phase::Norms(_) if self.report.step == self.step && self.step > 0 => {
                return Ok(self.updated());
            }
            Phase::Norms(_) if self.step == 0 && self.spec.calibrates() => self.calibrate(0),
            Phase::Norms(_) => self.phase = Phase::Begin,
            Phase::Calibrate(round) => self.read_calibration(dev, round)?,
            Phase::Settle(round, site) => self.settle(round, site),
            Phase::Begin if self.step >= self.steps() => return Ok(Advance::Done),
            Phase::Begin => {
                let list = self.order.batch(self.step).iter().copied();
                self.reader.begin(list, &self.data, Reading::Train);
                self.adapters[0].narrow(self.spec.rank_of(self.step));
                self.phase = if self.spec.nested { Phase::Narrow(0) } else { Phase::Train };
            }
            Phase::Narrow(site) if site < self.norms.len() => {
                self.norms.update(dev, &self.weights, &mut self.adapters[0], site);
                self.phase = Phase::Narrow(site + 1);
            }
            Phase::Narrow(_) => self.phase = Phase::Train,
            Phase::Train => {
                let references = &mut self.references;
                let (pass, to) = (&mut self.pass, &mut self.adapters[..]);
                if self.reader.advance(dev, pass, to, &self.data, references)? {
                    self.phase = Phase::Gradient(0, 0.0);
                }
            }
            Phase::Gradient(from, sum) => self.gradient(from, sum)?,
            Phase::Update(from, norm) => self.update(from, norm),
            Phase::Validate => return self.validate(dev),
        }
        Ok(Advance::Running)
    }

    /// Tensors from `from` on whose values are as many as an op takes.
    fn some_tensors(&self, from: usize) -> Range<usize> {
        let tensors = &self.adapters[0].tensors()[from..];
        let mut values = 0;
        let more = tensors.iter().take_while(|tensor| {
            let is_first = values == 0;
            values += tensor.range.len();
            is_first || values <= UPDATE_VALUES
        });
        from..from + more.count()
    }

    fn gradient(&mut self, from: usize, sum: f64) -> Result<()> {
        let tensors = self.some_tensors(from);
        let (end, adapter) = (tensors.end, &self.adapters[0]);
        let sum = sum + optimiser::squares(adapter, tensors);
        if end < adapter.tensors().len() {
            self.phase = Phase::Gradient(end, sum);
            return Ok(());
        }
        let (norm, loss) = (sum.sqrt(), self.reader.totals.loss);
        self.report = self.begun_report(norm);
        // A loss that is not finite is a norm that is not, for the optimiser.
        if self.optimiser.begin(if loss.is_finite() { norm } else { f64::NAN }) {
            self.skipped = 0;
            self.phase = Phase::Update(0, norm);
            return Ok(());
        }
        self.adapters[0].gradients.fill(0.0);
        self.skipped += 1;
        self.report.skipped = true;
        if self.skipped == SKIPPED_MAX {
            return Err(Error::unprocessable(
                "non_finite_loss",
                format!(
                    "the loss or its gradient was not finite in {SKIPPED_MAX} steps in a row, the \
                     last of them step {}; a smaller learning rate may help",
                    self.step + 1
                ),
            ));
        }
        self.end_step();
        Ok(())
    }

    fn update(&mut self, from: usize, norm: f64) {
        let tensors = self.some_tensors(from);
        let end = tensors.end;
        self.optimiser.apply(&mut self.adapters[0], tensors, self.report.lr, norm);
        self.phase = Phase::Update(end, norm);
        if end == self.adapters[0].tensors().len() {
            self.end_step();
        }
    }

    fn end_step(&mut self) {
        self.step += 1;
        self.adapters[0].narrow(self.spec.rank);
        self.phase = Phase::Norms(0);
    }

    /// After an update: validation where it is due, or the report.
    fn updated(&mut self) -> Advance {
        let every = u64::from(self.spec.validate_every);
        let is_due = self.report.epoch_end || (every > 0 && self.step.is_multiple_of(every));
        if let Some(validation) = self.validation.as_ref().filter(|_| is_due) {
            let entries = validation.len() / self.spec.objective.group();
            self.reader.begin(0..entries as u32, validation, Reading::Evaluate);
            self.phase = Phase::Validate;
            return Advance::Running;
        }
        self.phase = Phase::Begin;
        Advance::Stepped(Box::new(self.report.clone()))
    }

    fn validate(&mut self, dev: &Device) -> Result<Advance> {
        let Some(validation) = &self.validation else { return Ok(Advance::Running) };
        let (pass, references) = (&mut self.pass, &mut self.validation_references);
        if !self.reader.advance(dev, pass, &mut self.adapters, validation, references)? {
            return Ok(Advance::Running);
        }
        self.report.valid = Some(Evaluated::of(&self.reader.totals));
        self.phase = Phase::Begin;
        Ok(Advance::Stepped(Box::new(self.report.clone())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Jobs are made on one thread and advanced on another.
    #[test]
    fn a_job_may_change_threads() {
        fn send<T: Send>() {}
        send::<Trainer>();
    }
}
