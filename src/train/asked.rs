//! What somebody asks for, and what "auto" comes to.
//!
//! Owns the defaults that depend on the examples and the model. Never looks at an example.

use super::optimiser::OptimiserKind;
use super::schedule::Decay;
use super::spec::{Init, Objective, TrainSpec};
use crate::adapters::format::factors::{FactorSite, OpenAdapter};
use crate::error::{Error, Result};
use crate::shape::{Projection, Site};
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;

/// What may be asked for: first and last.
pub const RANKS: RangeInclusive<usize> = 1..=256;
pub const EPOCHS: RangeInclusive<usize> = 1..=50;
pub const BATCHES: RangeInclusive<usize> = 1..=256;
/// Above 0 and at most these.
pub const RATE_MAX: f64 = 10.0;
pub const BETA_MAX: f64 = 2.0;
/// Of LN-DPO, whose log-probabilities are means.
pub const BETA_BY_LENGTH_MAX: f64 = 100.0;
pub const MULTIPLIER_MAX: f64 = 1e6;
pub const ALPHA_MAX: f64 = 1e6;
pub const RATIO_MAX: f64 = 1e4;
pub const NORM_MAX: f64 = 1e9;

/// What is used where nothing is said.
pub const RANK: usize = 8;
pub const BETA: f64 = 0.1;

/// What is asked for; `None` is "auto".
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Asked {
    pub epochs: Option<u32>,
    pub batch: Option<usize>,
    /// Multiplies the rate that fits the model's width.
    pub lr_multiplier: Option<f64>,
    /// The rate itself, whatever the multiplier.
    pub lr: Option<f64>,
    /// DPO's; `None`: supervised.
    pub beta: Option<f64>,
    pub rank: usize,
    pub alpha: f64,
    pub rslora: bool,
    pub dora: bool,
    pub targets: Vec<Projection>,
    pub loraplus_ratio: f64,
    pub decay: Decay,
    pub warmup_ratio: f64,
    pub weight_decay: f64,
    pub max_grad_norm: f64,
    /// Cut examples at the context instead of refusing them.
    pub truncate: bool,
    /// Steps between two looks at the validation file; 0: at the ends of epochs.
    pub eval_steps: u32,
    pub seed: u64,
    /// A stays as it starts.
    #[serde(default)]
    pub freeze_a: bool,
    #[serde(default)]
    pub optimiser: OptimiserKind,
    /// Any first ranks of the result are an adapter of their own.
    #[serde(default)]
    pub nested: bool,
    #[serde(default)]
    pub init: Init,
    /// DPO's log-probabilities are means over an answer's tokens.
    #[serde(default)]
    pub by_length: bool,
}

/// Epochs of a file with enough examples.
const USUAL_EPOCHS: u32 = 3;
/// Most that "auto" raises them to.
const AUTO_EPOCHS_MAX: u32 = 25;
/// Steps that "auto" wants.
const STEPS_MIN: usize = 30;

impl Default for Asked {
    /// LoRA of rank 8 on every linear, the rest as the examples want it.
    fn default() -> Self {
        Self {
            epochs: None,
            batch: None,
            lr_multiplier: None,
            lr: None,
            beta: None,
            rank: RANK,
            alpha: 2.0 * RANK as f64,
            rslora: false,
            dora: false,
            targets: Projection::ALL.to_vec(),
            loraplus_ratio: 1.0,
            decay: Decay::Linear,
            warmup_ratio: 0.0,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            truncate: false,
            eval_steps: 0,
            seed: 0,
            freeze_a: false,
            optimiser: OptimiserKind::default(),
            nested: false,
            init: Init::default(),
            by_length: false,
        }
    }
}

impl Asked {
    /// What it comes to for so many examples of a model of this width.
    pub fn resolve(&self, examples: usize, hidden: usize) -> TrainSpec {
        let batch = self.batch.unwrap_or_else(|| (examples / 16).clamp(1, 16)).min(examples);
        let steps = examples.div_ceil(batch).max(1);
        let enough = STEPS_MIN.div_ceil(steps) as u32;
        let epochs = self.epochs.unwrap_or_else(|| enough.clamp(USUAL_EPOCHS, AUTO_EPOCHS_MAX));
        // Lion's steps are all of one size: a tenth of AdamW's rate (arXiv 2302.06675, section 5).
        let part = if self.optimiser == OptimiserKind::Lion { 0.1 } else { 1.0 };
        let usual = || part * rate(hidden) * self.lr_multiplier.unwrap_or(1.0);
        let lr = self.lr.unwrap_or_else(usual);
        TrainSpec {
            rank: self.rank,
            alpha: self.alpha,
            rslora: self.rslora,
            dora: self.dora,
            targets: self.targets.clone(),
            epochs,
            batch,
            seed: self.seed,
            lr,
            loraplus_ratio: self.loraplus_ratio,
            decay: self.decay,
            warmup_ratio: self.warmup_ratio,
            weight_decay: self.weight_decay,
            max_grad_norm: self.max_grad_norm,
            objective: match (self.beta, self.by_length) {
                (None, _) => Objective::Supervised,
                (Some(beta), false) => Objective::Dpo { beta },
                (Some(beta), true) => Objective::LnDpo { beta },
            },
            validate_every: self.eval_steps,
            start: None,
            freeze_a: self.freeze_a,
            optimiser: self.optimiser,
            nested: self.nested,
            init: self.init,
        }
    }

    /// With rank, scale, parts and targets of an adapter, so that a job can go on from it. Errors:
    /// `incompatible_start` of one without factors in a layer; `non_finite_values`.
    pub fn shaped_like(self, adapter: &OpenAdapter) -> Result<Self> {
        let layers = adapter.modules().iter().filter_map(|(site, dims)| match site {
            FactorSite::Site(site @ Site::Layer(_, projection)) => Some((*site, *projection, dims)),
            _ => None,
        });
        let all: Vec<_> = layers.collect();
        let none = || {
            let message = "the job cannot go on from it: it has no factors in a layer";
            Error::unprocessable("incompatible_start", message)
        };
        let (site, _, dims) = *all.first().ok_or_else(none)?;
        let factors = adapter.read(FactorSite::Site(site))?.ok_or_else(none)?;
        let mut targets: Vec<Projection> = all.iter().map(|(_, p, _)| *p).collect();
        targets.sort_unstable();
        targets.dedup();
        Ok(Self {
            rank: dims.rank,
            alpha: f64::from(factors.scale) * dims.rank as f64,
            rslora: false,
            dora: adapter.magnitude(site)?.is_some(),
            targets,
            ..self
        })
    }
}

/// The rate that fits adapters of a model of this width: 5e-4·(2000/H)^0.78, which Thinking
/// Machines found for Llama-like models ("LoRA Without Regret", Tinker cookbook).
fn rate(hidden: usize) -> f64 {
    5e-4 * (2000.0 / hidden as f64).powf(0.78)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked() -> Asked {
        Asked::default()
    }

    #[test]
    fn auto_gives_a_small_file_more_epochs_and_a_large_one_larger_batches() {
        let of = |examples| {
            let spec = asked().resolve(examples, 576);
            (spec.batch, spec.epochs)
        };
        assert_eq!(of(1), (1, 25), "one example is read as often as it may be");
        assert_eq!(of(10), (1, 3));
        assert_eq!(of(60), (3, 3));
        assert_eq!(of(100), (6, 3));
        assert_eq!(of(1000), (16, 3));
    }

    #[test]
    fn what_is_said_holds_and_the_rate_follows_the_width() {
        let said = Asked { epochs: Some(2), batch: Some(300), lr_multiplier: Some(2.0), ..asked() };
        let spec = said.resolve(100, 2000);
        assert_eq!((spec.epochs, spec.batch), (2, 100), "a batch is at most all examples");
        assert!((spec.lr - 1e-3).abs() < 1e-12);
        let spec = Asked { lr: Some(0.5), beta: Some(0.1), ..said }.resolve(10, 2000);
        assert_eq!((spec.lr, spec.objective), (0.5, Objective::Dpo { beta: 0.1 }));
    }
}
