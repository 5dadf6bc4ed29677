//! FRUGAL (Zmushko et al., arXiv 2411.07837): Adam on a part of every factor, and the sign of the
//! gradient, which needs no state, on the rest. Parts are taken in turn.
//!
//! Owns the formula, and which part has its turn. Never keeps a moment. The thing to know: a part
//! is a quarter of a factor's ranks, since factors lie rank by rank; its moments begin at zero, and
//! magnitudes always have theirs, as the paper's vectors do.

use super::adamw;
use super::update::Update;

/// Ranks of a part: one in so many, rounded up.
const PARTS: usize = 4;
/// Updates of a part.
const GAP: i32 = 200;

/// Numbers of each moment of a tensor.
pub(super) fn moment_len([rows, columns]: [usize; 2]) -> usize {
    rows.div_ceil(PARTS) * columns
}

/// One update of a tensor whose moments are those of the part that has its turn.
pub(super) fn apply(update: Update<'_>, first: &mut [f32], second: &mut [f32]) {
    let Update { values, gradients, dims, lr, shrink, clip, number } = update;
    let ([rows, columns], done) = (dims, number - 1);
    let ranks = rows.div_ceil(PARTS);
    let turn = if rows == 1 { 0 } else { (done / GAP) as usize % rows.div_ceil(ranks) };
    let start = turn * ranks * columns;
    let end = (start + ranks * columns).min(values.len());
    if rows > 1 && done % GAP == 0 {
        first.fill(0.0);
        second.fill(0.0);
    }
    let number = if rows == 1 { number } else { done % GAP + 1 };
    let free = (0..start).chain(end..values.len());
    for i in free {
        let gradient = gradients[i];
        // `signum` of a zero is not zero.
        let step = if gradient == 0.0 { 0.0 } else { (lr as f32).copysign(gradient) };
        values[i] = values[i] * shrink - step;
    }
    let (values, gradients) = (&mut values[start..end], &gradients[start..end]);
    let part = Update { values, gradients, dims, lr, shrink, clip, number };
    adamw::apply(part, first, second);
}
