//! From gradients to new factors: the optimisers, with one clipping norm over an adapter, and
//! LoRA+'s two rates.
//!
//! Owns their state, f32 like the factors. Never chooses a rate. The thing to know: a gradient that
//! is not finite changes neither factors nor state.

mod adafactor;
mod adamw;
mod frugal;
mod lion;
mod update;

use super::adapter::{Adapter, Part};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use update::Update;

/// Which optimiser.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimiserKind {
    /// Adam with decoupled decay (arXiv 1711.05101), as torch has it: β 0.9 and 0.999, ε 1e-8. Two
    /// numbers of state a value.
    #[default]
    AdamW,
    /// The sign of a moment (arXiv 2302.06675): β 0.9 and 0.99. One number of state a value; it
    /// wants a rate 3 to 10 times smaller than AdamW's.
    Lion,
    /// The second moment by its rows and columns (arXiv 1804.04235), as transformers has it with
    /// `scale_parameter` and `relative_step` off: nearly no state.
    Adafactor,
    /// AdamW on a quarter of each factor's ranks, which changes every 200 updates, and the sign of
    /// the gradient on the rest (FRUGAL, arXiv 2411.07837): half a number of state a value.
    Frugal,
}

impl OptimiserKind {
    pub const ALL: [Self; 4] = [Self::AdamW, Self::Lion, Self::Adafactor, Self::Frugal];

    /// As people name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::AdamW => "adamw",
            Self::Lion => "lion",
            Self::Adafactor => "adafactor",
            Self::Frugal => "frugal",
        }
    }
}

/// What updates are made with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimiserSettings {
    pub kind: OptimiserKind,
    /// Decoupled: factors shrink by lr times it; magnitudes never do.
    pub weight_decay: f64,
    /// The largest norm of a gradient; a larger one is scaled down to it. 0: none.
    pub max_grad_norm: f64,
    /// LoRA+ (arXiv 2402.12354): B and magnitudes learn at so many times the rate.
    pub ratio: f64,
}

impl Default for OptimiserSettings {
    /// AdamW without decay, clipping at 1, one rate.
    fn default() -> Self {
        Self { kind: OptimiserKind::AdamW, weight_decay: 0.0, max_grad_norm: 1.0, ratio: 1.0 }
    }
}

/// See the file's head.
pub struct Optimiser {
    settings: OptimiserSettings,
    /// Moments, by name.
    state: Vec<(&'static str, Vec<f32>)>,
    /// Where those of each tensor of the adapter lie.
    places: Vec<Range<usize>>,
    /// Updates done.
    updates: i32,
}

impl OptimiserKind {
    /// The names of its moments.
    fn names(self) -> &'static [&'static str] {
        match self {
            Self::AdamW | Self::Frugal => &["first", "second"],
            Self::Lion => &["first"],
            Self::Adafactor => &["second"],
        }
    }

    /// Numbers of each moment for a trained tensor of these dims.
    fn moment_len(self, dims: [usize; 2]) -> usize {
        match self {
            Self::AdamW | Self::Lion => dims[0] * dims[1],
            Self::Adafactor => adafactor::moment_len(dims),
            Self::Frugal => frugal::moment_len(dims),
        }
    }

    /// Numbers of all moments for a trained tensor of these dims.
    pub(super) fn state_len(self, dims: [usize; 2]) -> usize {
        self.names().len() * self.moment_len(dims)
    }
}

impl Optimiser {
    /// Without any gradient seen, for an adapter.
    pub fn new(settings: OptimiserSettings, adapter: &Adapter) -> Self {
        let mut end = 0;
        let places = adapter.tensors().iter().map(|tensor| {
            let len = |_| settings.kind.moment_len(tensor.dims);
            let start = end;
            end += adapter.trained(tensor).map_or(0, len);
            start..end
        });
        let places = places.collect();
        let state = settings.kind.names().iter().map(|name| (*name, vec![0.0; end])).collect();
        Self { settings, state, places, updates: 0 }
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
        let OptimiserSettings { weight_decay, max_grad_norm, ratio, .. } = self.settings;
        let clip = match max_grad_norm > 0.0 {
            true => (max_grad_norm / (norm + 1e-6)).min(1.0) as f32,
            false => 1.0,
        };
        for i in tensors {
            let tensor = &adapter.tensors()[i];
            let (part, range, dims) = (tensor.part, tensor.range.clone(), tensor.dims);
            let Some(at) = adapter.trained(tensor) else { continue };
            let lr = if part == Part::A { lr } else { lr * ratio };
            let decay = if part == Part::Magnitude { 0.0 } else { weight_decay };
            let update = Update {
                values: &mut adapter.values[range],
                gradients: &adapter.gradients[at.clone()],
                dims,
                lr,
                shrink: (1.0 - lr * decay) as f32,
                clip,
                number: self.updates,
            };
            let place = self.places[i].clone();
            let mut moments = self.state.iter_mut().map(|(_, all)| &mut all[place.clone()]);
            match (self.settings.kind, moments.next(), moments.next()) {
                (OptimiserKind::AdamW, Some(first), Some(second)) => {
                    adamw::apply(update, first, second);
                }
                (OptimiserKind::Frugal, Some(first), Some(second)) => {
                    frugal::apply(update, first, second);
                }
                (OptimiserKind::Lion, Some(first), _) => lion::apply(update, first),
                (OptimiserKind::Adafactor, Some(second), _) => adafactor::apply(update, second),
                (kind, ..) => unreachable!("{kind:?} has other moments"),
            }
            adapter.gradients[at].fill(0.0);
        }
    }

    /// Moments by name, and the number of updates: with the factors, all that a job resumes with.
    pub(super) fn state(&self) -> (&[(&'static str, Vec<f32>)], i32) {
        (&self.state, self.updates)
    }

    /// The same, to be overwritten.
    pub(super) fn state_mut(&mut self) -> (&mut [(&'static str, Vec<f32>)], &mut i32) {
        (&mut self.state, &mut self.updates)
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
    adapter.tensors()[tensors].iter().filter_map(|tensor| adapter.trained(tensor)).map(of).sum()
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
        let settings = OptimiserSettings { weight_decay: 0.5, ratio: 4.0, ..Default::default() };
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
        let mut optimiser = Optimiser::new(OptimiserSettings::default(), &adapter);
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
