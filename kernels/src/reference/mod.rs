//! The ops as plain loops in f64: what the fast paths are tested against. Slow, allocating, with no
//! layout of its own.

mod backward;

use crate::Gate;
pub use backward::*;

/// One adapter's change of one site as in a PEFT file: `a` `[R, I]`, `b` `[O, R]`.
#[derive(Clone, Copy)]
pub struct Factors<'a> {
    pub rank: usize,
    pub a: &'a [f32],
    pub b: &'a [f32],
    pub scale: f32,
    pub gain: Option<&'a [f32]>,
    pub bias: Option<&'a [f32]>,
}

/// One row of a linear: `w` `[O, I]` on `x_base` `[I]`, the delta on `x` `[I]` (they differ by bf16
/// rounding).
pub fn linear_row(
    x_base: &[f32],
    x: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    delta: Option<Factors<'_>>,
) -> Vec<f64> {
    let inputs = x.len();
    let u: Vec<f64> =
        delta.map_or(Vec::new(), |d| d.a.chunks(inputs).take(d.rank).map(|a| dot(a, x)).collect());
    let row = |(o, w): (usize, &[f32])| {
        let mut y = dot(w, x_base);
        if let Some(d) = delta {
            let b = &d.b[o * d.rank..][..d.rank];
            let sum: f64 = b.iter().zip(&u).map(|(&b, u)| f64::from(b) * u).sum();
            y += f64::from(d.scale) * sum;
            y *= d.gain.map_or(1.0, |gain| f64::from(gain[o]));
            y += d.bias.map_or(0.0, |bias| f64::from(bias[o]));
        }
        y + bias.map_or(0.0, |bias| f64::from(bias[o]))
    };
    w.chunks(inputs).enumerate().map(row).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// x / sqrt(mean(x²) + eps) · w.
pub fn rms_norm(x: &[f64], w: &[f32], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (mean + eps).sqrt();
    x.iter().zip(w).map(|(x, &w)| x * factor * f64::from(w)).collect()
}

/// One head rotated at `position`; dimension d is paired with d + D/2.
pub fn rotate(x: &[f64], position: u32, inv_freq: &[f32], attention_scale: f64) -> Vec<f64> {
    let half = x.len() / 2;
    let mut out = x.to_vec();
    for d in 0..half {
        let angle = f64::from(position as f32 * inv_freq[d]);
        let (sin, cos) = angle.sin_cos();
        let (sin, cos) = (sin * attention_scale, cos * attention_scale);
        out[d] = x[d] * cos - x[d + half] * sin;
        out[d + half] = x[d + half] * cos + x[d] * sin;
    }
    out
}

/// One query over the keys and values it sees, each of D values.
pub fn attend(q: &[f64], keys: &[Vec<f64>], values: &[Vec<f64>], scale: f64) -> Vec<f64> {
    let score = |k: &Vec<f64>| scale * k.iter().zip(q).map(|(k, q)| k * q).sum::<f64>();
    let scores: Vec<f64> = keys.iter().map(score).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let column = |d: usize| values.iter().zip(&weights).map(|(v, w)| v[d] * w / sum).sum();
    (0..q.len()).map(column).collect()
}

/// gate(g) · u.
pub fn glu(gate: Gate, g: f64, u: f64) -> f64 {
    let gated = match gate {
        Gate::Silu => g / (1.0 + (-g).exp()),
        Gate::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g * g * g);
            0.5 * g * (1.0 + inner.tanh())
        }
    };
    gated * u
}

/// The segment of row `t` by looking at each border.
pub fn segment_of(indptr: &[u32], t: usize) -> Option<usize> {
    indptr.windows(2).position(|rows| (rows[0] as usize..rows[1] as usize).contains(&t))
}
