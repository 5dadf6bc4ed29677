//! dx = Σ dy·W on every type of weights.

use super::{act_of, assert_near, bits};
use crate::common::{CPU, Rng, devices, plane, read_all, rounded, weight_dtypes};
use polylora_kernels::reference::linear_backward_row;
use polylora_kernels::{
    Accumulate, Device, Dtype, Isa, LinearBackward, Matrix, Plane, WeightDtype, linear_backward,
};

/// Some sites that read the same x, and the gradients of what they made.
struct Sites {
    inputs: usize,
    weights: Vec<Matrix>,
    dy: Vec<Vec<f32>>,
}

impl Sites {
    fn new(seed: u64, dtype: WeightDtype, rows: usize, inputs: usize, outputs: &[usize]) -> Sites {
        let mut rng = Rng(seed);
        let mut weight = |&outputs: &usize| {
            let values = rng.values(outputs * inputs);
            Matrix::from_f32(CPU, dtype, outputs, inputs, &values).expect("memory")
        };
        let weights = outputs.iter().map(&mut weight).collect();
        let dy = outputs.iter().map(|outputs| rng.values(rows * outputs)).collect();
        Sites { inputs, weights, dy }
    }

    /// dx of some rows, on top of `start` where that is given.
    fn dx(&self, dev: &Device, rows: std::ops::Range<usize>, start: Option<&[f32]>) -> Vec<f32> {
        let dy = |(w, dy): (&Matrix, &Vec<f32>)| {
            act_of(&dy[rows.start * w.outputs()..rows.end * w.outputs()], w.outputs())
        };
        let dy: Vec<_> = self.weights.iter().zip(&self.dy).map(dy).collect();
        let sites = self.weights.iter().zip(&dy).map(|(weight, dy)| LinearBackward { weight, dy });
        let sites: Vec<_> = sites.collect();
        let there = vec![f32::NAN; rows.len() * self.inputs];
        let mut dx = plane(start.unwrap_or(&there), self.inputs);
        let accumulate = start.map_or(Accumulate::Overwrite, |_| Accumulate::Add);
        linear_backward(dev, &sites, rows.len(), &mut dx, accumulate);
        read_all(dev, &mut dx)
    }

    /// The same in f64, of operands as `seen` rounds them (W, dy).
    fn want(&self, t: usize, seen: impl Fn(&[f32]) -> Vec<f32>) -> Vec<f64> {
        let mut dx = vec![0.0; self.inputs];
        for (weight, dy) in self.weights.iter().zip(&self.dy) {
            let outputs = weight.outputs();
            let mut w = vec![0.0; outputs * self.inputs];
            for (o, row) in w.chunks_mut(self.inputs).enumerate() {
                weight.read_row(o, row);
            }
            let row = linear_backward_row(&seen(&dy[t * outputs..][..outputs]), &seen(&w));
            dx.iter_mut().zip(row).for_each(|(dx, more)| *dx += more);
        }
        dx
    }
}

#[test]
fn dx_equals_the_f64_loop_on_every_type_of_weights_and_site_list() {
    for dev in devices() {
        let pairs = dev.isa() == Some(Isa::Avx512Bf16);
        for dtype in weight_dtypes() {
            let seen = |x: &[f32]| match pairs && dtype != WeightDtype::F32 {
                true => rounded(Dtype::Bf16, x),
                false => x.to_vec(),
            };
            for (seed, rows, inputs, outputs) in [
                (1, 1, 64, &[64][..]),
                (2, 3, 33, &[17]),
                (3, 7, 130, &[65, 40, 40]),
                (4, 41, 96, &[1, 3]),
                (5, 13, 200, &[900, 31]),
            ] {
                let sites = Sites::new(seed, dtype, rows, inputs, outputs);
                let dx = sites.dx(&dev, 0..rows, None);
                let start = Rng(seed).values(rows * inputs);
                let more = sites.dx(&dev, 0..rows, Some(&start));
                for t in 0..rows {
                    let what = format!("{} {dtype:?} case {seed} row {t}", dev.name());
                    let at = t * inputs..(t + 1) * inputs;
                    let mut want = sites.want(t, seen);
                    assert_near(&dx[at.clone()], &want, 1e-5, &what);
                    assert_near(&dx[at.clone()], &sites.want(t, <[f32]>::to_vec), 1e-2, &what);
                    let start = &start[at.clone()];
                    want.iter_mut().zip(start).for_each(|(dx, &start)| *dx += f64::from(start));
                    assert_near(&more[at], &want, 1e-5, &format!("{what}, added"));
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_on_any_number_of_threads() {
    for dtype in weight_dtypes() {
        let sites = Sites::new(6, dtype, 83, 130, &[1500, 33]);
        for &isa in Isa::available() {
            let one = Device::cpu_with(1, isa).expect("available");
            let all = bits(&sites.dx(&one, 0..83, None));
            for threads in [2, 3] {
                let dev = Device::cpu_with(threads, isa).expect("available");
                assert!(bits(&sites.dx(&dev, 0..83, None)) == all, "{} {dtype:?}", dev.name());
            }
            for rows in [0..1, 5..6, 9..31, 82..83] {
                let alone = bits(&sites.dx(&one, rows.clone(), None));
                let among = &all[rows.start * 130..rows.end * 130];
                assert!(alone == among, "{} {dtype:?} rows {rows:?}", one.name());
            }
        }
    }
}

#[test]
#[should_panic(expected = "site 1: dy is [T, 40]")]
fn a_gradient_of_another_width_is_refused() {
    let sites = Sites::new(7, WeightDtype::F32, 2, 32, &[40, 40]);
    let (good, bad) = (act_of(&[0.0; 80], 40), act_of(&[0.0; 82], 41));
    let site = |i: usize, dy| LinearBackward { weight: &sites.weights[i], dy };
    let mut dx = Plane::new(CPU, 2, 32).expect("memory");
    let dev = Device::cpu(1);
    linear_backward(&dev, &[site(0, &good), site(1, &bad)], 2, &mut dx, Accumulate::Overwrite);
}
