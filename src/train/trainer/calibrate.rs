//! EVA: where A starts, found in what the sites read (Paischer et al., arXiv 2410.07170).
//!
//! Owns the rounds of a subspace iteration. Never changes B. The thing to know: a round reads the
//! first examples and makes Σ (x·Aᵀ)ᵀ·x, which is A·XᵀX, of orthonormal A; its rows, made
//! orthonormal again, turn towards the leading right singular vectors of X, so X is never kept.

use super::reader::Reading;
use super::{Phase, Trainer, start};
use crate::error::Result;
use crate::shape::Site;
use crate::train::adapter::{Adapter, Part};
use polylora_kernels::Device;

/// Examples, or pairs, of the job's first batches that are read.
const EXAMPLES: usize = 32;
/// How often. Unlike PEFT's (`init_lora_weights="eva"`), the inputs are not centred, as in the
/// paper, and ranks are not spread over the sites (PEFT's `rho` is 1).
const ROUNDS: u32 = 8;
/// A row that is shorter than this share of the first one has seen nothing new.
const NOTHING: f64 = 1e-5;

impl Trainer {
    /// Begins a round, of the random A at first.
    pub(super) fn calibrate(&mut self, round: u32) {
        let (shape, rank) = (&self.weights.shape, self.spec.rank);
        if round == 0 {
            let sites: Vec<Site> = self.adapters[0].sites().collect();
            let mut sketch = Adapter::sketch(shape, &sites, rank);
            start::random(&mut sketch, shape, self.spec.seed);
            self.sketch = Some([sketch]);
        }
        let batches = 0..EXAMPLES.div_ceil(self.spec.batch) as u64;
        let batches = batches.start..batches.end.min(self.order.steps_per_epoch());
        let mut list: Vec<u32> = Vec::with_capacity(EXAMPLES + self.spec.batch);
        batches.for_each(|batch| list.extend(self.order.batch(batch)));
        self.reader.begin(list.into_iter(), &self.data, Reading::Calibrate);
        self.phase = Phase::Calibrate(round);
    }

    /// One op of a round's reading.
    pub(super) fn read_calibration(&mut self, dev: &Device, round: u32) -> Result<()> {
        let Some(sketch) = &mut self.sketch else {
            self.phase = Phase::Begin;
            return Ok(());
        };
        let (pass, references) = (&mut self.pass, &mut self.references);
        if self.reader.advance(dev, pass, sketch, &self.data, references)? {
            self.phase = Phase::Settle(round, 0);
        }
        Ok(())
    }

    /// The rows of one site become orthonormal; after the last round, its A is found.
    pub(super) fn settle(&mut self, round: u32, site: usize) {
        let is_last = round + 1 == ROUNDS;
        let Some([sketch]) = &mut self.sketch else { return };
        let all = sketch.tensors().iter().filter(|tensor| tensor.part == Part::A);
        let Some(tensor) = all.clone().nth(site).cloned() else {
            if is_last {
                (self.sketch, self.phase) = (None, Phase::Begin);
            } else {
                sketch.gradients.fill(0.0);
                self.calibrate(round + 1);
            }
            return;
        };
        if let Some(seen) = sketch.trained(&tensor) {
            let (old, new) = (&mut sketch.values[tensor.range], &sketch.gradients[seen]);
            orthonormal(new, old, tensor.dims[1]);
            if is_last {
                let found = &mut self.adapters[0];
                let a = found.tensors().iter().filter(|tensor| tensor.part == Part::A).nth(site);
                if let Some(range) = a.map(|tensor| tensor.range.clone()) {
                    found.values[range].copy_from_slice(old);
                }
            }
        }
        self.phase = Phase::Settle(round, site + 1);
    }
}

/// The rows of `new` made orthonormal, into `old`; a row without anything new stays what it was,
/// as far as that is orthogonal to the others.
fn orthonormal(new: &[f32], old: &mut [f32], width: usize) {
    let wide = |row: &[f32]| row.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut done: Vec<Vec<f64>> = Vec::with_capacity(new.len() / width);
    let mut least = 0.0;
    for (new, old) in new.chunks(width).zip(old.chunks_mut(width)) {
        let mut row = wide(new);
        let rest = |row: &mut Vec<f64>| {
            // Twice: once leaves the rounding of a row that is nearly taken whole.
            for other in done.iter().chain(&done) {
                let along = dot(row, other);
                row.iter_mut().zip(other).for_each(|(x, o)| *x -= along * o);
            }
            dot(row, row).sqrt()
        };
        let mut norm = rest(&mut row);
        if norm <= least {
            row = wide(old);
            norm = rest(&mut row);
        }
        least = f64::max(least, NOTHING * norm);
        row.iter_mut().for_each(|x| *x /= norm.max(f64::MIN_POSITIVE));
        old.iter_mut().zip(&row).for_each(|(old, x)| *old = *x as f32);
        done.push(row);
    }
}
