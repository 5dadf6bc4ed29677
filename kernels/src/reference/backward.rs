//! Gradients of the loops in [`super`], as plain loops in f64. The tests hold them against central
//! differences of those, and the fast paths against them.

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
