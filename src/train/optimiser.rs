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
        let mut adapter = Adapter::new(&shape, &[Site::Layer(0, Projection::Q)], 1, 1.0);
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
