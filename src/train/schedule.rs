//! The learning rate of every step, as Hugging Face's schedulers define it.
//!
//! Owns the formulas. Never keeps a place. The thing to know: warm-up begins at 0, so the first
//! step of a job with warm-up changes nothing.

use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// How the rate falls after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    Constant,
    /// In a straight line to 0.
    Linear,
    /// Half a cosine to 0.
    Cosine,
}

/// See the file's head.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    /// The rate at the end of warm-up.
    pub lr: f64,
    pub decay: Decay,
    /// Steps of warm-up.
    pub warmup: u64,
    /// Steps in all.
    pub steps: u64,
}

impl Schedule {
    /// The rate of step `step`, from 0.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.lr * step as f64 / self.warmup as f64;
        }
        let rest = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let done = ((step - self.warmup) as f64 / rest).min(1.0);
        self.lr
            * match self.decay {
                Decay::Constant => 1.0,
                Decay::Linear => 1.0 - done,
                Decay::Cosine => 0.5 * (1.0 + (PI * done).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What transformers 5 gives for a peak of 1: get_scheduler(name, optimizer, 5, 20).
    #[test]
    fn rates_are_those_of_transformers() {
        let at = |decay, step| Schedule { lr: 1.0, decay, warmup: 5, steps: 20 }.at(step);
        for (decay, step, expected) in [
            (Decay::Constant, 0, 0.0),
            (Decay::Constant, 3, 0.6),
            (Decay::Constant, 19, 1.0),
            (Decay::Linear, 5, 1.0),
            (Decay::Linear, 8, 0.8),
            (Decay::Linear, 20, 0.0),
            (Decay::Linear, 99, 0.0),
            (Decay::Cosine, 4, 0.8),
            (Decay::Cosine, 6, 0.989_073_800_366_902_8),
            (Decay::Cosine, 10, 0.75),
            (Decay::Cosine, 20, 0.0),
        ] {
            let ours = at(decay, step);
            assert!((ours - expected).abs() < 1e-12, "{decay:?} at {step}: {ours}");
        }
        let without = Schedule { lr: 3.0, decay: Decay::Linear, warmup: 0, steps: 1 };
        assert_eq!((without.at(0), without.at(1)), (3.0, 0.0));
    }
}
