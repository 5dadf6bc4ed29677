//! The f64 loops of gradients against central differences of the forward loops.

use super::wide;
use crate::common::Rng;
use polylora_kernels::Gate;
use polylora_kernels::reference::{
    attend, attend_backward, glu, glu_backward, linear_backward_row, linear_row, log_prob,
    log_prob_backward, rms_norm, rms_norm_backward, rotate, rotate_backward,
};

/// Central differences of `f` at `x`.
fn differences(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut at = x.to_vec();
    let mut slopes = Vec::new();
    for i in 0..x.len() {
        let mut moved = |by: f64| {
            at[i] = x[i] + by;
            f(&at)
        };
        slopes.push((moved(STEP) - moved(-STEP)) / (2.0 * STEP));
        at[i] = x[i];
    }
    slopes
}

#[track_caller]
fn assert_slopes(got: &[f64], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let most = want.iter().fold(1e-30, |most: f64, x| most.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() / most < 1e-8, "{what}: [{i}] is {got}, not {want}");
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[test]
fn the_loops_are_the_slopes_of_the_forward_loops() {
    let mut rng = Rng(101);
    let mut draw = |n: usize| wide(&rng.values(n));
    let (w, x, dy) = (Rng(1).values(13), draw(13), draw(13));
    let norm = differences(&x, |x| dot(&rms_norm(x, &w, 1e-3), &dy));
    assert_slopes(&rms_norm_backward(&x, &w, 1e-3, &dy), &norm, "norm");

    let (freq, x, d) = ([0.9, 0.3, 0.01], draw(6), draw(6));
    let turned = differences(&x, |x| dot(&rotate(x, 17, &freq, 1.3), &d));
    assert_slopes(&rotate_backward(&d, 17, &freq, 1.3), &turned, "rope");

    for gate in [Gate::Silu, Gate::GeluTanh] {
        for g in [-2.5, -1.1, -0.2, 0.0, 0.7, 4.0] {
            let slopes = differences(&[g, 0.8], |x| 1.7 * glu(gate, x[0], x[1]));
            assert_slopes(&glu_backward(gate, g, 0.8, 1.7), &slopes, &format!("{gate:?} at {g}"));
        }
    }

    let logits = draw(11);
    let slopes = differences(&logits, |logits| -log_prob(logits, 4));
    assert_slopes(&log_prob_backward(&logits, 4), &slopes, "log-probability");

    let (q, d_out) = (draw(6), draw(6));
    let [keys, values] = [(); 2].map(|()| (0..5).map(|_| draw(6)).collect::<Vec<_>>());
    let got = attend_backward(&q, &keys, &values, 0.4, &d_out);
    let dq = differences(&q, |q| dot(&attend(q, &keys, &values, 0.4), &d_out));
    assert_slopes(&got.dq, &dq, "dq");
    let flat = |rows: &[Vec<f64>]| rows.concat();
    let rows = |flat: &[f64]| flat.chunks(6).map(<[f64]>::to_vec).collect::<Vec<_>>();
    let dk = differences(&flat(&keys), |k| dot(&attend(&q, &rows(k), &values, 0.4), &d_out));
    assert_slopes(&flat(&got.dk), &dk, "dk");
    let dv = differences(&flat(&values), |v| dot(&attend(&q, &keys, &rows(v), 0.4), &d_out));
    assert_slopes(&flat(&got.dv), &dv, "dv");
}

#[test]
fn the_loop_of_linear_is_its_slope() {
    let mut rng = Rng(102);
    let (w, x, dy) = (rng.values(7 * 5), rng.values(5), rng.values(7));
    // Linear in x, so that a step that f32 holds is exact.
    let at = |i: usize, by: f32| {
        let mut x = x.clone();
        x[i] = by;
        dot(&linear_row(&x, &x, &w, None, None), &wide(&dy))
    };
    let slopes: Vec<f64> = (0..5).map(|i| (at(i, 1.0) - at(i, -1.0)) / 2.0).collect();
    assert_slopes(&linear_backward_row(&dy, &w), &slopes, "dy·W");
}
