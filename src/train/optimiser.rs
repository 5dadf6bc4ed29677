//! AdamW as torch defines it, with one clipping norm over an adapter, and LoRA+'s two rates.
//!
//! Owns the moments, f32 like the factors. Never chooses a rate. The thing to know: a gradient that
//! is not finite changes neither factors nor moments.

use super::adapter::{Adapter, Part};

/// What the update is made with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Of the first and the second moment.
    pub betas: [f64; 2],
    pub eps: f64,
    /// Decoupled: factors shrink by lr times it.
    pub weight_decay: f64,
    /// The largest norm of a gradient; a larger one is scaled down to it. 0: none.
    pub max_grad_norm: f64,
    /// LoRA+: B learns at so many times the rate.
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
        let norm = norm(adapter);
        if norm.is_finite() {
            self.updates += 1;
            let max = self.settings.max_grad_norm;
            let clip = if max > 0.0 { (max / (norm + 1e-6)).min(1.0) } else { 1.0 };
            self.apply(adapter, lr, clip as f32);
        }
        adapter.gradients.fill(0.0);
        norm
    }

    fn apply(&mut self, adapter: &mut Adapter, lr: f64, clip: f32) {
        let AdamW { betas, eps, weight_decay, ratio, .. } = self.settings;
        let [first_rest, second_rest] = betas.map(|beta| 1.0 - beta.powi(self.updates));
        let [keep_first, keep_second] = betas.map(|beta| beta as f32);
        let [add_first, add_second] = betas.map(|beta| (1.0 - beta) as f32);
        let (root, eps) = (second_rest.sqrt() as f32, eps as f32);
        for i in 0..adapter.tensors().len() {
            let (part, range) = (adapter.tensors()[i].part, adapter.tensors()[i].range.clone());
            let lr = if part == Part::B { lr * ratio } else { lr };
            let (shrink, step) = ((1.0 - lr * weight_decay) as f32, (lr / first_rest) as f32);
            let values = adapter.values[range.clone()].iter_mut();
            let gradients = &adapter.gradients[range.clone()];
            let moments = self.first[range.clone()].iter_mut().zip(&mut self.second[range]);
            for ((value, gradient), (first, second)) in values.zip(gradients).zip(moments) {
                let gradient = gradient * clip;
                *first = keep_first * *first + add_first * gradient;
                *second = keep_second * *second + add_second * gradient * gradient;
                *value = *value * shrink - step * *first / (second.sqrt() / root + eps);
            }
        }
    }
}

/// Of all gradients of an adapter.
fn norm(adapter: &Adapter) -> f64 {
    adapter.gradients.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>().sqrt()
}
