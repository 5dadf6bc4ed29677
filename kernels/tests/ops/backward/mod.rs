//! Backward ops against f64 loops, those loops against central differences, and the bits of what
//! is computed beside others.

mod attention;
mod dora;
mod linear;
mod lora;
mod loss;
mod pointwise;
mod slopes;

use crate::common::{CPU, Rng};
use polylora_kernels::{Act, Device, Dtype};
use std::collections::HashMap;

/// An activation, or a gradient, that every type of weights can read.
pub fn act_of(rows: &[f32], width: usize) -> Act {
    let mut act = Act::with_bytes(CPU, Dtype::Bf16, rows.len() / width, width).expect("memory");
    act.write(0, rows).expect("a copy");
    act
}

/// One to be written, with rows of something before.
pub fn act_for(rows: usize, width: usize) -> Act {
    act_of(&Rng(77).values(rows * width), width)
}

/// The first rows of an activation.
pub fn rows_of(act: &Act, rows: usize) -> Vec<f32> {
    (0..rows).flat_map(|t| act.row(t).to_vec()).collect()
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

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// The bits that a case gave on each instruction set: any number of threads must give the same.
#[derive(Default)]
pub struct Seen(HashMap<String, Vec<u32>>);

impl Seen {
    #[track_caller]
    pub fn same(&mut self, dev: &Device, case: &str, values: &[f32]) {
        let key = format!("{:?} {case}", dev.isa());
        let before = self.0.entry(key).or_insert_with(|| bits(values));
        assert!(*before == bits(values), "{}: other bits, {case}", dev.name());
    }
}

pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}
