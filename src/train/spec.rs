//! What a training job is asked for, with every choice made.
//!
//! Owns the numbers. Never chooses one. The thing to know: the same spec, base and data give the
//! same adapter, bit by bit, on the same kind of CPU.

use super::optimiser::{OptimiserKind, OptimiserSettings};
use super::schedule::{Decay, Schedule};
use crate::random::{Stream, word};
use crate::shape::Projection;
use serde::{Deserialize, Serialize};

/// What is made smaller.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// Cross-entropy of supervised tokens.
    Supervised,
    /// Direct preference optimisation of pairs, against what the job starts from: the base without
    /// an adapter, or the adapter that it goes on from.
    Dpo { beta: f64 },
    /// The same with each answer's log-probability divided by its supervised tokens, which takes
    /// the reward from length (LN-DPO, arXiv 2407.15229).
    LnDpo { beta: f64 },
}

impl Objective {
    /// Examples that are read together: 2 where they are pairs.
    pub fn group(self) -> usize {
        match self {
            Self::Supervised => 1,
            Self::Dpo { .. } | Self::LnDpo { .. } => 2,
        }
    }
}

/// Where A starts, in a job that goes on from no adapter. B starts at zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// Uniform, as PEFT's default.
    #[default]
    Random,
    /// EVA (arXiv 2410.07170) with equal ranks: the leading right singular vectors of what the
    /// site reads in the first examples.
    Eva,
}

/// See the file's head.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainSpec {
    pub rank: usize,
    pub alpha: f64,
    /// The scale is alpha/√rank instead of alpha/rank.
    pub rslora: bool,
    /// With magnitudes.
    pub dora: bool,
    /// Of every layer.
    pub targets: Vec<Projection>,
    pub epochs: u32,
    /// Examples, or pairs, of an optimizer step.
    pub batch: usize,
    pub seed: u64,
    pub lr: f64,
    /// B and magnitudes learn at so many times the rate.
    pub loraplus_ratio: f64,
    pub decay: Decay,
    /// Of all steps.
    pub warmup_ratio: f64,
    pub weight_decay: f64,
    /// 0: gradients are not clipped.
    pub max_grad_norm: f64,
    pub objective: Objective,
    /// Steps between validations; 0: only at the ends of epochs, where there always is one.
    pub validate_every: u32,
    /// What the adapter is known by that the job goes on from, such as its digest.
    #[serde(default)]
    pub start: Option<String>,
    /// LoRA-FA (arXiv 2308.03303): A stays as it starts, which makes a step and its memory smaller.
    #[serde(default)]
    pub freeze_a: bool,
    #[serde(default)]
    pub optimiser: OptimiserKind,
    /// DyLoRA (arXiv 2210.07558): every step reads and trains the first b ranks only, b drawn from
    /// 1 to `rank`, so that any first ranks of the result are an adapter of their own.
    #[serde(default)]
    pub nested: bool,
    #[serde(default)]
    pub init: Init,
}

impl TrainSpec {
    /// Whether A is found in what the examples make sites read.
    pub(super) fn calibrates(&self) -> bool {
        self.init == Init::Eva && self.start.is_none()
    }

    /// Whether pairs are held against an adapter, which is then kept as it was.
    pub(super) fn has_reference(&self) -> bool {
        self.start.is_some() && self.objective.group() == 2
    }

    /// What the factors' product is multiplied by.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// The ranks that a step reads: all, or some of a job that nests.
    pub(super) fn rank_of(&self, step: u64) -> usize {
        if !self.nested {
            return self.rank;
        }
        let drawn = Stream::new(&[self.seed, step, word("nested")]).unit();
        1 + (drawn * self.rank as f64) as usize
    }

    pub(super) fn settings(&self) -> OptimiserSettings {
        OptimiserSettings {
            kind: self.optimiser,
            weight_decay: self.weight_decay,
            max_grad_norm: self.max_grad_norm,
            ratio: self.loraplus_ratio,
        }
    }

    /// Warm-up is rounded up to a step, as Hugging Face's trainer does.
    pub(super) fn schedule(&self, steps: u64) -> Schedule {
        let warmup = (self.warmup_ratio * steps as f64).ceil() as u64;
        Schedule { lr: self.lr, decay: self.decay, warmup, steps }
    }
}
