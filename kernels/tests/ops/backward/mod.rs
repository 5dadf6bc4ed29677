//! Backward ops against f64 loops, those loops against central differences, and the bits of what
//! is computed beside others.

mod linear;

use crate::common::CPU;
use polylora_kernels::{Act, Dtype};

/// An activation, or a gradient, that every type of weights can read.
pub fn act_of(rows: &[f32], width: usize) -> Act {
    let mut act = Act::with_bytes(CPU, Dtype::Bf16, rows.len() / width, width).expect("memory");
    act.write(0, rows).expect("a copy");
    act
}

/// The largest difference relative to the largest value that is wanted.
#[track_caller]
pub fn assert_near(got: &[f32], want: &[f64], relative: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let most = want.iter().fold(1e-30, |most: f64, x| most.max(x.abs()));
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let off = (f64::from(got) - want).abs() / most;
        assert!(off <= relative, "{what}: [{i}] is {got}, not {want} (off by {off:e})");
    }
}

/// Central differences of `f` at `x`.
pub fn differences(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut at = x.to_vec();
    let slope = |i: usize| {
        let mut moved = |by: f64| {
            at[i] = x[i] + by;
            let y = f(&at);
            at[i] = x[i];
            y
        };
        (moved(STEP) - moved(-STEP)) / (2.0 * STEP)
    };
    (0..x.len()).map(slope).collect()
}

/// That gradients are those of the differences.
#[track_caller]
pub fn assert_slopes(got: &[f64], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let most = want.iter().fold(1e-30, |most: f64, x| most.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() / most < 1e-7, "{what}: [{i}] is {got}, not {want}");
    }
}

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}
