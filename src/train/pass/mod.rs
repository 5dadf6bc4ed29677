//! One micro-batch, forward and backward, as a state machine stopped between ops.
//!
//! Owns the program, its place in it and the memory of both halves. Never changes a factor or
//! decides when to go on. The thing to know: gradients are added to those of the adapters, so the
//! passes of an optimizer step are run one after the other on the same ones.

mod backward;
mod buffers;
mod forward;
mod head;
mod ops;
mod stage;

use super::adapter::Adapter;
use super::batch::MicroBatch;
use crate::error::Result;
use crate::model::weights::Weights;
use crate::model::{Decoder, RopeTables};
use crate::shape::{Projection, Site};
use buffers::Buffers;
pub use buffers::PassOptions;
pub(super) use buffers::Sizes;
pub use head::{Purpose, Sums};
use ops::{ADAPTERS_MAX, Ops};
use polylora_kernels::{Device, Scored};
use stage::{Op, head, program};
use std::sync::Arc;

/// How far a pass is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    Running,
    /// Every row is scored, and the pass waits for [`Pass::resume`].
    Scored,
    /// All ops are done: what the rows scored, and the gradients, are there.
    Done,
}

/// See the file's head.
pub struct Pass {
    weights: Arc<Weights>,
    rope: RopeTables,
    options: PassOptions,
    buffers: Buffers,
    batch: MicroBatch,
    /// Of the supervised rows.
    scored: Vec<Scored>,
    program: Vec<Op>,
    /// The lowest layer with an adapted site.
    lowest: usize,
    /// The next op, and the next chunk of the head's.
    at: usize,
    chunk: usize,
    purpose: Purpose,
}

impl Pass {
    /// Takes all memory that a pass of these adapters needs. Errors: what the device has no room or
    /// no operation for.
    ///
    /// # Panics
    /// On more adapters than a pass can have.
    pub fn new(
        weights: Arc<Weights>,
        dev: &Device,
        options: PassOptions,
        adapters: &[Adapter],
    ) -> Result<Self> {
        assert!(options.adapters_max <= ADAPTERS_MAX, "at most {ADAPTERS_MAX} adapters");
        let shape = &weights.shape;
        let adapted = |site| adapters.iter().any(|adapter| adapter.has(shape.site_index(site)));
        let program = program(shape, adapted);
        let lowest = match program.last() {
            Some(Op::Backward(layer, _)) => *layer,
            _ => shape.layers - 1,
        };
        let scaled = |p| {
            (0..shape.layers).any(|l| {
                let site = shape.site_index(Site::Layer(l, p));
                adapters.iter().any(|adapter| adapter.is_dora() && adapter.has(site))
            })
        };
        let sizes = Sizes {
            options,
            threads: dev.threads(),
            layers: shape.layers - lowest,
            rank: adapters.iter().map(Adapter::rank_max).max().unwrap_or(0),
            z: Projection::ALL.map(scaled),
        };
        let PassOptions { rows_max, sequences_max, adapters_max } = options;
        Ok(Self {
            rope: RopeTables::new(dev.memory(), shape, rows_max)?,
            buffers: Buffers::new(dev, &weights, sizes)?,
            batch: MicroBatch::with_capacity(rows_max, sequences_max, adapters_max),
            scored: Vec::with_capacity(rows_max),
            at: program.len(),
            chunk: 0,
            purpose: Purpose::Evaluate,
            weights,
            options,
            program,
            lowest,
        })
    }

    /// Bytes that `new` takes. Errors: as `new`.
    pub(super) fn bytes(weights: &Weights, sizes: Sizes) -> Result<usize> {
        let PassOptions { rows_max, sequences_max, adapters_max } = sizes.options;
        Ok(RopeTables::bytes(&weights.shape, rows_max)
            + Buffers::bytes(weights, sizes)?
            + MicroBatch::bytes(rows_max, sequences_max, adapters_max)
            + rows_max * size_of::<Scored>())
    }

    /// Begins a micro-batch, to be filled before the first step.
    pub fn begin(&mut self, purpose: Purpose) -> &mut MicroBatch {
        (self.at, self.chunk, self.purpose) = (0, 0, purpose);
        self.scored.clear();
        self.batch.clear();
        &mut self.batch
    }

    /// Runs the next op, a few milliseconds. Errors: what the device met.
    ///
    /// # Panics
    /// On a micro-batch that is larger than the pass, and on other adapters than it was made for.
    pub fn step(&mut self, dev: &Device, adapters: &mut [Adapter]) -> Result<Progress> {
        let Some(&op) = self.program.get(self.at) else { return Ok(Progress::Done) };
        let decoder = Decoder { weights: &self.weights, rope: &self.rope };
        let ops = Ops { dev, decoder, batch: &self.batch, lowest: self.lowest };
        let b = &mut self.buffers;
        let wanted = self.at + 1 < self.program.len();
        self.at += 1;
        match op {
            Op::Embed => {
                assert!(self.batch.rows() <= self.options.rows_max, "too many rows");
                assert!(self.batch.sequences() <= self.options.sequences_max, "too many examples");
                assert!(adapters.len() <= self.options.adapters_max, "too many adapters");
                self.scored.resize(self.batch.supervised().len(), Scored::default());
                ops.clear_gradient(b)?;
                ops.embed(b);
            }
            Op::Forward(layer, stage) => {
                ops.forward(b, (layer, stage), adapters)?;
                if self.purpose == Purpose::Calibrate {
                    ops.calibrate(b, (layer, stage), adapters);
                }
            }
            Op::LastNorm if self.purpose == Purpose::Calibrate => self.at = self.program.len(),
            Op::LastNorm => ops.last_norm(b),
            Op::Head => {
                let chunk = ops.chunk(self.chunk);
                ops.head(b, chunk.clone(), self.purpose, &mut self.scored[chunk]);
                if self.purpose != Purpose::Train || self.at == self.program.len() {
                    self.chunk += 1;
                    let more = !ops.chunk(self.chunk).is_empty();
                    self.at = if more { self.at - 1 } else { self.program.len() };
                }
            }
            Op::HeadBackward => {
                ops.head_backward(b, ops.chunk(self.chunk));
                self.chunk += 1;
                if !ops.chunk(self.chunk).is_empty() {
                    self.at -= 2;
                }
            }
            Op::LastNormBackward => ops.last_norm_backward(b),
            Op::Backward(layer, stage) => ops.backward(b, (layer, stage), adapters, wanted),
        }
        match dev.take_error() {
            Some(error) => Err(error.into()),
            None if self.at < self.program.len() => Ok(Progress::Running),
            None if self.purpose == Purpose::Score => Ok(Progress::Scored),
            None => Ok(Progress::Done),
        }
    }

    /// Σ w·log p of an example, once the rows are scored; w as they were pushed.
    pub fn log_prob(&self, example: usize) -> f64 {
        let rows = self.batch.supervised_of(example);
        -Sums::of(&self.batch.coefficients()[rows.clone()], &self.scored[rows]).loss
    }

    /// Supervised tokens of an example.
    pub(super) fn supervised(&self, example: usize) -> usize {
        self.batch.supervised_of(example).len()
    }

    /// Trains with rows that are scored, each example's weights times what `factor` says of it.
    pub fn resume(&mut self, factor: impl Fn(usize) -> f64) {
        for example in 0..self.batch.sequences() {
            self.batch.weigh(example, factor(example));
        }
        (self.at, self.chunk, self.purpose) = (head(&self.program), 0, Purpose::Train);
    }

    /// What the rows of an adapter scored, once the pass is done.
    pub fn sums(&self, adapter: usize) -> Sums {
        let (rows, supervised) = (self.batch.segment(adapter), self.batch.supervised());
        let at = |row: usize| supervised.partition_point(|&t| (t as usize) < row);
        let of = at(rows.start)..at(rows.end);
        Sums::of(&self.batch.coefficients()[of.clone()], &self.scored[of])
    }
}
