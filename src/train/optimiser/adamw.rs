//! AdamW as torch defines it.
//!
//! Owns the formula. Never keeps a moment.

use super::update::Update;

/// Of the first and the second moment.
const BETAS: [f64; 2] = [0.9, 0.999];
const EPS: f64 = 1e-8;

/// One update of a tensor whose moments are these.
pub(super) fn apply(update: Update<'_>, first: &mut [f32], second: &mut [f32]) {
    let Update { values, gradients, lr, shrink, clip, number, .. } = update;
    let [first_rest, second_rest] = BETAS.map(|beta| 1.0 - beta.powi(number));
    let [keep_first, keep_second] = BETAS.map(|beta| beta as f32);
    let [add_first, add_second] = BETAS.map(|beta| (1.0 - beta) as f32);
    let (root, eps) = (second_rest.sqrt() as f32, EPS as f32);
    let step = (lr / first_rest) as f32;
    let moments = first.iter_mut().zip(second);
    for ((value, slope), (first, second)) in values.iter_mut().zip(gradients).zip(moments) {
        let gradient = *slope * clip;
        *first = keep_first * *first + add_first * gradient;
        *second = keep_second * *second + add_second * gradient * gradient;
        *value = *value * shrink - step * *first / (second.sqrt() / root + eps);
    }
}
