//! Rotation frequencies of a `Rope`, the one place where RoPE scaling is arithmetic, and the tables
//! of a model's layers.
//!
//! Owns the formulas (default, linear, llama3, yarn, stored factors). Never reads configuration.
//! The thing to know: everything is f64 until the one rounding at the end, and yarn also scales cos
//! and sin.

use crate::shape::{ModelShape, Rope, RopeScaling};
use polylora_kernels::{Error, Memory, RopeTable};
use std::f64::consts::PI;

/// cos and sin of every position, for every kind of layer.
pub struct RopeTables {
    all: RopeTable,
    /// Of sliding-window layers, where it differs.
    local: Option<RopeTable>,
}

impl RopeTables {
    /// For positions below `positions`. Errors: a device that has no such tables.
    pub fn new(memory: &Memory, shape: &ModelShape, positions: usize) -> Result<Self, Error> {
        let table = |rope: &Rope| {
            let (inv_freq, scale) = rope.frequencies(shape.head_dim);
            RopeTable::new(memory, positions, shape.head_dim, &inv_freq, scale)
        };
        Ok(Self {
            all: table(&shape.rope)?,
            local: shape.rope_local.as_ref().map(table).transpose()?,
        })
    }

    /// Bytes that `new` takes.
    pub fn bytes(shape: &ModelShape, positions: usize) -> usize {
        let tables = 1 + usize::from(shape.rope_local.is_some());
        tables * positions * shape.head_dim * size_of::<f32>()
    }

    /// The table of a layer, with a window or without.
    pub fn of_layer(&self, windowed: bool) -> &RopeTable {
        self.local.as_ref().filter(|_| windowed).unwrap_or(&self.all)
    }
}

impl Rope {
    /// Inverse frequencies [D/2] and the factor on cos and sin.
    pub fn frequencies(&self, head_dim: usize) -> (Vec<f32>, f32) {
        let plain = (0..head_dim / 2)
            .map(|i| self.theta.powf(-((2 * i) as f64) / head_dim as f64))
            .collect::<Vec<_>>();
        let mut attention_scale = 1.0;
        let scaled: Vec<f64> = match &self.scaling {
            RopeScaling::None => plain,
            RopeScaling::Linear { factor } => plain.iter().map(|f| f / factor).collect(),
            RopeScaling::Factors(factors) => {
                plain.iter().zip(factors).map(|(f, d)| f / f64::from(*d)).collect()
            }
            &RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context,
            } => {
                let ratio = |f: f64| original_context as f64 * f / (2.0 * PI);
                let keep = |f: f64| {
                    ((ratio(f) - low_freq_factor) / (high_freq_factor - low_freq_factor))
                        .clamp(0.0, 1.0)
                };
                let mix = |f: f64| f * (keep(f) + (1.0 - keep(f)) / factor);
                plain.into_iter().map(mix).collect()
            }
            &RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original_context,
                attention_factor,
                truncate,
            } => {
                attention_scale = attention_factor;
                let bounds = (beta_fast, beta_slow, original_context, truncate);
                let (low, high) = self.yarn_range(head_dim, bounds);
                let ramp = |i: usize| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                let mix = |(i, f): (usize, f64)| f * (1.0 - ramp(i)) + f / factor * ramp(i);
                plain.into_iter().enumerate().map(mix).collect()
            }
        };
        let inv_freq = scaled.into_iter().map(|f| f as f32).collect();
        (inv_freq, attention_scale as f32)
    }

    /// Frequency indices between which yarn passes from extrapolation to interpolation.
    fn yarn_range(
        &self,
        head_dim: usize,
        (fast, slow, context, truncate): (f64, f64, usize, bool),
    ) -> (f64, f64) {
        let dim = head_dim as f64;
        let index = |rotations: f64| {
            dim * (context as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (index(fast), index(slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        // A ramp of no width would divide by zero.
        if low == high {
            high += 0.001;
        }
        (low, high)
    }
}
