//! Lion: the sign of a moment (Chen et al., arXiv 2302.06675, program 1).
//!
//! Owns the formula. Never keeps a moment. The thing to know: every value moves by the whole rate,
//! or, where the moment is exactly zero, not at all.

use super::update::Update;

/// Of what is moved by, and of what is kept.
const BETAS: [f64; 2] = [0.9, 0.99];

/// One update of a tensor whose moment is this.
pub(super) fn apply(update: Update<'_>, moment: &mut [f32]) {
    let Update { values, gradients, lr, shrink, clip, .. } = update;
    let ([keep, keep_kept], lr) = (BETAS.map(|beta| beta as f32), lr as f32);
    let [add, add_kept] = BETAS.map(|beta| (1.0 - beta) as f32);
    let moments = moment.iter_mut();
    for ((value, slope), first) in values.iter_mut().zip(gradients).zip(moments) {
        let gradient = *slope * clip;
        let towards = keep * *first + add * gradient;
        // `signum` of a zero is not zero.
        let step = if towards == 0.0 { 0.0 } else { lr.copysign(towards) };
        *first = keep_kept * *first + add_kept * gradient;
        *value = *value * shrink - step;
    }
}
