//! What an optimizer step came to.
//!
//! Owns the numbers that a job tells of. Never computes a gradient. The thing to know: losses are
//! those before the step's update, validation is after it.

use super::Trainer;
use super::reader::Totals;
use serde::{Deserialize, Serialize};

/// Of the validation's examples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluated {
    pub loss: f64,
    pub accuracy: f64,
}

impl Evaluated {
    pub(super) fn of(totals: &Totals) -> Self {
        // Of nothing, nothing is wrong.
        let counted = totals.counted.max(1) as f64;
        Self { loss: totals.loss, accuracy: totals.correct as f64 / counted }
    }
}

/// Of an optimizer step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Of `steps`, from 1.
    pub step: u64,
    pub steps: u64,
    /// Epochs done, with the part of the one at hand.
    pub epoch: f64,
    /// The mean over the batch's supervised weight, or over its pairs.
    pub loss: f64,
    /// Share of supervised tokens that were the likeliest, or of pairs in the right order.
    pub accuracy: f64,
    /// Before clipping.
    pub grad_norm: f64,
    pub lr: f64,
    /// Supervised tokens of the batch.
    pub supervised: u64,
    /// All tokens of the batch.
    pub tokens: u64,
    pub valid: Option<Evaluated>,
    /// Whether the step is the last of an epoch.
    pub epoch_end: bool,
    /// Whether nothing was updated, because the loss or its gradient was not finite.
    pub skipped: bool,
}

impl Trainer {
    /// Of the step whose gradients are there.
    pub(super) fn begun_report(&self, grad_norm: f64) -> StepReport {
        let (totals, step) = (&self.reader.totals, self.step + 1);
        let Evaluated { loss, accuracy } = Evaluated::of(totals);
        let per_epoch = self.order.steps_per_epoch();
        StepReport {
            step,
            steps: self.steps(),
            epoch: step as f64 / per_epoch as f64,
            loss,
            accuracy,
            grad_norm,
            lr: self.schedule.at(self.step),
            supervised: totals.supervised,
            tokens: totals.tokens,
            valid: None,
            epoch_end: step.is_multiple_of(per_epoch),
            skipped: false,
        }
    }
}
