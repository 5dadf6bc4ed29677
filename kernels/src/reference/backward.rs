//! Gradients of the loops in [`super`], as plain loops in f64. The tests hold them against central
//! differences of those, and the fast paths against them.

use crate::Gate;

/// dx = dy·W of one row: `w` `[O, I]` row-major, `dy` `[O]`.
pub fn linear_backward_row(dy: &[f32], w: &[f32]) -> Vec<f64> {
    let inputs = w.len() / dy.len();
    let mut dx = vec![0.0; inputs];
    for (&dy, w) in dy.iter().zip(w.chunks(inputs)) {
        for (dx, &w) in dx.iter_mut().zip(w) {
            *dx += f64::from(dy) * f64::from(w);
        }
    }
    dx
}

/// dx of [`super::rms_norm`].
pub fn rms_norm_backward(x: &[f64], w: &[f32], eps: f64, dy: &[f64]) -> Vec<f64> {
    let count = x.len() as f64;
    let root = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / count + eps).sqrt();
    let dy: Vec<f64> = dy.iter().zip(w).map(|(dy, &w)| dy * f64::from(w)).collect();
    let slope = root.powi(3) / count * dy.iter().zip(x).map(|(dy, x)| dy * x).sum::<f64>();
    dy.iter().zip(x).map(|(dy, x)| root * dy - slope * x).collect()
}

/// dx of [`super::rotate`].
pub fn rotate_backward(d: &[f64], position: u32, inv_freq: &[f32], scale: f64) -> Vec<f64> {
    let half = d.len() / 2;
    let mut dx = d.to_vec();
    for i in 0..half {
        let (sin, cos) = f64::from(position as f32 * inv_freq[i]).sin_cos();
        let (sin, cos) = (sin * scale, cos * scale);
        dx[i] = d[i] * cos + d[i + half] * sin;
        dx[i + half] = d[i + half] * cos - d[i] * sin;
    }
    dx
}

/// dg and du of [`super::glu`].
pub fn glu_backward(gate: Gate, g: f64, u: f64, da: f64) -> [f64; 2] {
    let sigma = |z: f64| 1.0 / (1.0 + (-z).exp());
    let (value, slope) = match gate {
        Gate::Silu => (g * sigma(g), sigma(g) * (1.0 + g * (1.0 - sigma(g)))),
        Gate::GeluTanh => {
            let steep = (2.0 / std::f64::consts::PI).sqrt();
            let tanh = (steep * (g + 0.044715 * g * g * g)).tanh();
            let of_tanh = (1.0 - tanh * tanh) * steep * (1.0 + 3.0 * 0.044715 * g * g);
            (0.5 * g * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * g * of_tanh)
        }
    };
    [da * u * slope, da * value]
}

/// log softmax(logits) of `target`.
pub fn log_prob(logits: &[f64], target: usize) -> f64 {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    logits[target] - most - logits.iter().map(|x| (x - most).exp()).sum::<f64>().ln()
}

/// The gradient of −[`log_prob`].
pub fn log_prob_backward(logits: &[f64], target: usize) -> Vec<f64> {
    let p = |i: usize| log_prob(logits, i).exp();
    (0..logits.len()).map(|i| p(i) - f64::from(u8::from(i == target))).collect()
}

/// What one query of [`super::attend`] gives back: dq, dk of every key, dv of every value.
pub struct Attended {
    pub dq: Vec<f64>,
    pub dk: Vec<Vec<f64>>,
    pub dv: Vec<Vec<f64>>,
}

/// Gradients of [`super::attend`], by way of the whole softmax.
pub fn attend_backward(
    q: &[f64],
    keys: &[Vec<f64>],
    values: &[Vec<f64>],
    scale: f64,
    d_out: &[f64],
) -> Attended {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let scores: Vec<f64> = keys.iter().map(|k| scale * dot(q, k)).collect();
    let p: Vec<f64> = (0..keys.len()).map(|j| log_prob(&scores, j).exp()).collect();
    let dp: Vec<f64> = values.iter().map(|v| dot(d_out, v)).collect();
    let mean = dot(&p, &dp);
    let ds: Vec<f64> = p.iter().zip(&dp).map(|(p, dp)| scale * p * (dp - mean)).collect();
    let times = |x: &[f64], by: f64| x.iter().map(|x| x * by).collect::<Vec<f64>>();
    let mut dq = vec![0.0; q.len()];
    for (k, ds) in keys.iter().zip(&ds) {
        dq.iter_mut().zip(k).for_each(|(dq, k)| *dq += ds * k);
    }
    let dk = ds.iter().map(|&ds| times(q, ds)).collect();
    let dv = p.iter().map(|&p| times(d_out, p)).collect();
    Attended { dq, dk, dv }
}
