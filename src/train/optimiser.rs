//! AdamW as torch defines it, with one clipping norm over an adapter, and LoRA+'s two rates.
//!
//! Owns the moments, f32 like the factors. Never chooses a rate. The thing to know: a gradient that
//! is not finite changes neither factors nor moments.

use super::adapter::{Adapter, Part};
use std::ops::Range;

/// What the update is made with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Of the first and the second moment.
    pub betas: [f64; 2],
    pub eps: f64,
    /// Decoupled: factors shrink by lr times it; magnitudes never do.
    pub weight_decay: f64,
    /// The largest norm of a gradient; a larger one is scaled down to it. 0: none.
    pub max_grad_norm: f64,
    /// LoRA+: B and magnitudes learn at so many times the rate.
    pub ratio: f64,
}

impl Default for AdamW {
    /// No decay, clipping at 1, one rate.
    fn default() -> Self {
        let (betas, eps) = ([0.9, 0.999], 1e-8);
        Self { betas, eps, weight_decay: 0.0, max_grad_norm: 1.0, ratio: 1.0 }
    }
}

/// See the file's head.
pub struct Optimiser {
    settings: AdamW,
    /// The moments, in the layout of [`Adapter::values`].
    first: Vec<f32>,
    second: Vec<f32>,
    /// Updates done.
    updates: i32,
}

impl Optimiser {
    /// Moments of zero for an adapter.
    pub fn new(settings: AdamW, adapter: &Adapter) -> Self {
        let zeros = || vec![0.0; adapter.values.len()];
        Self { settings, first: zeros(), second: zeros(), updates: 0 }
    }

    /// Applies the adapter's gradients at the rate `lr` and sets them to zero. Returns their norm
    /// before clipping; where that is not finite, nothing is applied.
    pub fn update(&mut self, adapter: &mut Adapter, lr: f64) -> f64 {
        let all = 0..adapter.tensors().len();
        let norm = squares(adapter, all.clone()).sqrt();
        if self.begin(norm) {
            self.apply(adapter, all, lr, norm);
        }
        adapter.gradients.fill(0.0);
        norm
    }

    /// Begins an update with gradients of this norm, unless that is not finite.
    pub(super) fn begin(&mut self, norm: f64) -> bool {
        self.updates += i32::from(norm.is_finite());
        norm.is_finite()
    }

    /// The part of an update that changes these tensors; their gradients are zero afterwards.
    pub(super) fn apply(
        &mut self,
        adapter: &mut Adapter,
        tensors: Range<usize>,
        lr: f64,
        norm: f64,
    ) {
        let AdamW { betas, eps, weight_decay, max_grad_norm, ratio } = self.settings;
        let clip = match max_grad_norm > 0.0 {
            true => (max_grad_norm / (norm + 1e-6)).min(1.0) as f32,
            false => 1.0,
        };
        let [first_rest, second_rest] = betas.map(|beta| 1.0 - beta.powi(self.updates));
        let [keep_first, keep_second] = betas.map(|beta| beta as f32);
        let [add_first, add_second] = betas.map(|beta| (1.0 - beta) as f32);
        let (root, eps) = (second_rest.sqrt() as f32, eps as f32);
        for i in tensors {
            let (part, range) = (adapter.tensors()[i].part, adapter.tensors()[i].range.clone());
            let lr = if part == Part::A { lr } else { lr * ratio };
            let decay = if part == Part::Magnitude { 0.0 } else { weight_decay };
            let (shrink, step) = ((1.0 - lr * decay) as f32, (lr / first_rest) as f32);
            let values = adapter.values[range.clone()].iter_mut();
            let gradients = adapter.gradients[range.clone()].iter_mut();
            let moments = self.first[range.clone()].iter_mut().zip(&mut self.second[range]);
            for ((value, slope), (first, second)) in values.zip(gradients).zip(moments) {
                let gradient = *slope * clip;
                *slope = 0.0;
                *first = keep_first * *first + add_first * gradient;
                *second = keep_second * *second + add_second * gradient * gradient;
                *value = *value * shrink - step * *first / (second.sqrt() / root + eps);
            }
        }
    }

    /// The moments and the number of updates: with the factors, all that a job resumes with.
    pub(super) fn state(&self) -> ([&[f32]; 2], i32) {
        ([&self.first, &self.second], self.updates)
    }

    /// The same, to be overwritten.
    pub(super) fn state_mut(&mut self) -> ([&mut [f32]; 2], &mut i32) {
        ([&mut self.first, &mut self.second], &mut self.updates)
    }
}

/// Σ g² of some tensors.
pub(super) fn squares(adapter: &Adapter, tensors: Range<usize>) -> f64 {
    const LANES: usize = 8;
    let of = |range: Range<usize>| {
        let mut sums = [0.0; LANES];
        for lanes in adapter.gradients[range].chunks(LANES) {
            for (sum, g) in sums.iter_mut().zip(lanes) {
                *sum += f64::from(*g) * f64::from(*g);
            }
        }
        sums.iter().sum::<f64>()
    };
    adapter.tensors()[tensors].iter().map(|tensor| of(tensor.range.clone())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::{ModelShape, Projection, Site};
    use serde_json::json;

    fn adapter() -> Adapter {
        let config = json!({"model_type": "llama", "vocab_size": 8, "hidden_size": 4,
            "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "max_position_embeddings": 8, "rms_norm_eps": 1e-5,
            "rope_theta": 1e4, "tie_word_embeddings": true});
        let shape = ModelShape::from_config(&config).expect("a shape");
        let mut adapter = Adapter::new(&shape, &[Site::Layer(0, Projection::Q)], 1, 1.0, false);
        adapter.values.fill(2.0);
        adapter
    }

    /// By hand: the first update of Adam is lr in the gradient's direction, whatever its size.
    #[test]
    fn decay_shrinks_a_factor_beside_the_update() {
        let mut adapter = adapter();
        adapter.gradients.fill(-0.25);
        let settings = AdamW { weight_decay: 0.5, ratio: 4.0, ..AdamW::default() };
        let norm = Optimiser::new(settings, &adapter).update(&mut adapter, 0.01);
        assert!((norm - 0.25 * 8f64.sqrt()).abs() < 1e-6, "{norm}");
        let [a, b] = [adapter.values[0], adapter.values[7]];
        assert!((a - (2.0 * (1.0 - 0.01 * 0.5) + 0.01)).abs() < 1e-6, "{a}");
        assert!((b - (2.0 * (1.0 - 0.04 * 0.5) + 0.04)).abs() < 1e-6, "{b}");
        assert!(adapter.gradients.iter().all(|g| *g == 0.0));
    }

    #[test]
    fn what_is_not_finite_changes_nothing() {
        let mut adapter = adapter();
        let mut optimiser = Optimiser::new(AdamW::default(), &adapter);
        for wrong in [f32::NAN, f32::INFINITY] {
            adapter.gradients.fill(0.5);
            adapter.gradients[3] = wrong;
            assert!(!optimiser.update(&mut adapter, 0.01).is_finite());
            assert!(adapter.values.iter().all(|value| *value == 2.0));
            assert!(adapter.gradients.iter().all(|g| *g == 0.0));
        }
        assert_eq!(optimiser.updates, 0);
    }
}
