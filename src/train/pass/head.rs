//! The head and the loss: cross-entropy of supervised rows, some of them at a time.
//!
//! Owns what each row scored. Never holds the logits of all rows. The thing to know: the gradient
//! of a chunk's logits is final as soon as they are there, because Σ w of the whole optimizer batch
//! is known beforehand.

use super::buffers::{Buffers, HEAD_ROWS};
use super::ops::Ops;
use crate::shape::{Norm, Site};
use polylora_kernels::{
    Accumulate, Error, LinearBackward, NormBackward, Scored, Segments, add_norm_rows,
    add_norm_rows_backward, cross_entropy_backward, linear, linear_backward, score,
};
use std::ops::Range;

/// Whether a pass makes gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    Train,
    /// The loss alone.
    Evaluate,
    /// What each example scored; then [`super::Pass::resume`] trains.
    Score,
    /// Σ (x·Aᵀ)ᵀ·x of every site in the place of A's gradient, and nothing beyond the last layer.
    Calibrate,
}

/// Sums over supervised rows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sums {
    /// Σ −k·log p, k the rows' coefficients: the mean loss where these are w/Σw.
    pub loss: f64,
    /// Rows.
    pub rows: usize,
    /// Rows whose target is the likeliest token.
    pub correct: usize,
}

impl Sums {
    /// Of rows whose coefficients are `coefficients`.
    pub(super) fn of(coefficients: &[f32], scored: &[Scored]) -> Self {
        let mut sums = Self { rows: scored.len(), ..Self::default() };
        for (coefficient, scored) in coefficients.iter().zip(scored) {
            sums.loss -= f64::from(*coefficient) * f64::from(scored.log_prob);
            sums.correct += usize::from(scored.is_greatest);
        }
        sums
    }
}

impl std::ops::AddAssign for Sums {
    fn add_assign(&mut self, other: Self) {
        self.loss += other.loss;
        self.rows += other.rows;
        self.correct += other.correct;
    }
}

impl Ops<'_> {
    /// Chunk `index` of the supervised rows.
    pub fn chunk(&self, index: usize) -> Range<usize> {
        let count = self.batch.supervised().len();
        (index * HEAD_ROWS).min(count)..((index + 1) * HEAD_ROWS).min(count)
    }

    /// No row has a gradient yet.
    pub fn clear_gradient(&self, b: &mut Buffers) -> Result<(), Error> {
        b.dh.read(self.dev, self.rows())?.fill(0.0);
        Ok(())
    }

    /// Scores the rows of a chunk into `scored`, and makes the gradient of their logits.
    pub fn head(
        &self,
        b: &mut Buffers,
        chunk: Range<usize>,
        purpose: Purpose,
        scored: &mut [Scored],
    ) {
        if chunk.is_empty() {
            return;
        }
        let (dev, eps) = (self.dev, self.shape().norm_eps);
        let rows = &self.batch.supervised()[chunk.clone()];
        let targets = &self.batch.targets()[chunk.clone()];
        let norm = self.decoder.norm(Norm::Final);
        add_norm_rows(dev, &b.h, rows, None, norm, eps, Segments::none(), &mut b.last);
        let mut outs = [self.decoder.linear(Site::Head, &mut b.logits)];
        linear(dev, &b.last, rows.len(), &mut outs, Segments::none(), &mut b.scratch);
        if purpose != Purpose::Train {
            return score(dev, &b.logits, targets, scored);
        }
        let coefficients = &self.batch.coefficients()[chunk];
        cross_entropy_backward(dev, &b.logits, targets, coefficients, &mut b.d_logits, scored);
    }

    /// Adds to dh what the loss of the chunk gives.
    pub fn head_backward(&self, b: &mut Buffers, chunk: Range<usize>) {
        if chunk.is_empty() {
            return;
        }
        let (dev, eps) = (self.dev, self.shape().norm_eps);
        let rows = &self.batch.supervised()[chunk];
        let weight = self.decoder.weights.site(Site::Head);
        let head = [LinearBackward { weight, dy: &b.d_logits }];
        linear_backward(dev, &head, rows.len(), &mut b.d_last, Accumulate::Overwrite);
        let weight = self.decoder.norm(Norm::Final).base;
        let norm = NormBackward { x: &b.h, weight, eps, dy: &b.d_last };
        add_norm_rows_backward(dev, norm, rows, &mut b.dh);
    }
}
