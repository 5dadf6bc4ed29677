//! Integer weights: what a file's groups become, what rounding to groups costs, and what happens to
//! read_all that no integer stands for.

use crate::common::{
    CPU, INTS, Rng, assert_close, devices, plane, read_all, scratch, seen, vector,
};
use half::f16;
use polylora_kernels::reference::linear_row;
use polylora_kernels::{
    Act, Device, Dtype, Grouped, Linear, Matrix, Segments, WeightDtype, linear,
};

/// What a dtype's page says of it: bits, group, zero, whether there are minimums.
fn said(dtype: WeightDtype) -> (u32, usize, u8, bool) {
    match dtype {
        WeightDtype::Int8 => (8, 32, 128, false),
        WeightDtype::Int8By16 => (8, 16, 128, false),
        WeightDtype::Int8Min => (8, 32, 0, true),
        WeightDtype::Int4 => (4, 32, 8, false),
        WeightDtype::Int4Min => (4, 32, 0, true),
        _ => unreachable!("{dtype:?} has no groups"),
    }
}

/// Random groups as a file has them, and the weights they stand for.
struct File {
    q: Vec<u8>,
    scales: Vec<f16>,
    mins: Vec<f16>,
    weights: Vec<f32>,
}

impl File {
    fn new(rng: &mut Rng, dtype: WeightDtype, outputs: usize, inputs: usize) -> File {
        let (bits, group, zero, has_min) = said(dtype);
        let count = outputs * inputs / group;
        let halves = |rng: &mut Rng, n| -> Vec<f16> {
            rng.values(n).into_iter().map(f16::from_f32).collect()
        };
        let q: Vec<u8> = (0..outputs * inputs).map(|_| rng.below(1 << bits) as u8).collect();
        let scales: Vec<f16> =
            halves(rng, count).into_iter().map(|s| f16::from_f32(s.to_f32() / 64.0)).collect();
        let mins = halves(rng, if has_min { count } else { 0 });
        let weight = |(i, q): (usize, &u8)| {
            let steps = f32::from(*q) - f32::from(zero);
            let min = mins.get(i / group).map_or(0.0, |l| l.to_f32());
            scales[i / group].to_f32() * steps + min
        };
        let weights = q.iter().enumerate().map(weight).collect();
        File { q, scales, mins, weights }
    }

    fn matrix(&self, dtype: WeightDtype, outputs: usize, inputs: usize) -> Matrix {
        let from = Grouped { q: &self.q, scales: &self.scales, min: &self.mins };
        Matrix::from_groups(CPU, dtype, outputs, inputs, &from).expect("memory")
    }
}

fn product(dev: &Device, weight: &Matrix, bias: Option<&[f32]>, x: &[Vec<f32>]) -> Vec<f32> {
    let (rows, inputs) = (x.len(), weight.inputs());
    let mut act = Act::with_bytes(CPU, Dtype::F32, rows, inputs).expect("memory");
    act.write(0, &x.concat()).expect("a copy");
    let mut y = plane(&vec![f32::NAN; rows * weight.outputs()], weight.outputs());
    let bias = bias.map(vector);
    let mut outs = [Linear { weight, bias: bias.as_ref(), site: 0, y: &mut y }];
    linear(dev, &act, rows, &mut outs, Segments::none(), &mut scratch(rows, 1));
    read_all(dev, &mut y)
}

#[test]
fn groups_of_a_file_are_multiplied_as_they_are() {
    let mut rng = Rng(1);
    let devices = devices();
    for dtype in INTS {
        for (rows, inputs, outputs) in
            [(1, 32, 1), (1, 96, 64), (2, 576, 70), (4, 160, 48), (7, 1536, 66), (40, 224, 130)]
        {
            let file = File::new(&mut rng, dtype, outputs, inputs);
            let matrix = file.matrix(dtype, outputs, inputs);
            let mut row = vec![0.0; inputs];
            for (output, want) in file.weights.chunks(inputs).enumerate() {
                matrix.read_row(output, &mut row);
                assert_eq!(row, want, "{dtype:?} [{outputs}, {inputs}] row {output}");
            }
            let x: Vec<Vec<f32>> = (0..rows).map(|_| rng.values(inputs)).collect();
            for dev in &devices {
                let y = product(dev, &matrix, None, &x);
                for (x, y) in x.iter().zip(y.chunks(outputs)) {
                    let x = seen(dev, dtype, x);
                    let want = linear_row(&x, &x, &file.weights, None, None);
                    let what = format!("{}, {dtype:?} [{outputs}, {inputs}]", dev.name());
                    assert_close(y, &want, 2e-6 * inputs as f64, &what);
                }
            }
        }
    }
}

#[test]
fn an_outlier_leaves_the_others_of_its_group_their_steps() {
    let (mut rng, devices) = (Rng(4), devices());
    // The last row has none.
    let sizes = [5.0f32, -30.0, 1e2, -2e2, 1e4, 1e30, 0.5];
    for dtype in INTS {
        for (rows, inputs, outputs) in [(7, 32, 1), (7, 96, 64), (3, 576, 70), (110, 576, 130)] {
            let file = File::new(&mut rng, dtype, outputs, inputs);
            let matrix = file.matrix(dtype, outputs, inputs);
            let bias = rng.values(outputs);
            let rows = (0..rows).map(|t| {
                let mut x = rng.values(inputs);
                let size = 2.0 * sizes[t % sizes.len()];
                (11 * t % 32..inputs).step_by(45).for_each(|i| x[i] = size);
                x
            });
            let rows: Vec<Vec<f32>> = rows.collect();
            let wants = rows.iter().map(|x| {
                let seen = seen(&Device::cpu(1), dtype, x);
                for (seen, x) in seen.iter().zip(x) {
                    assert!((seen - x).abs() <= 2.0 / 254.0 * 1.001, "{x} is seen as {seen}");
                }
                linear_row(&seen, &seen, &file.weights, Some(&bias), None)
            });
            let wants: Vec<Vec<f64>> = wants.collect();
            for dev in &devices {
                let y = product(dev, &matrix, Some(&bias), &rows);
                for (t, (x, y)) in rows.iter().zip(y.chunks(outputs)).enumerate() {
                    let what = format!("{}, {dtype:?} [{outputs}, {inputs}] {t}", dev.name());
                    let sum: f64 = x.iter().map(|x| f64::from(x.abs())).sum();
                    assert_close(y, &wants[t], 1e-6 * sum, &what);
                    let alone = product(dev, &matrix, Some(&bias), &rows[t..=t]);
                    assert_eq!(y, alone, "{what} and alone");
                }
            }
        }
    }
}

/// Where sums of 16 bits or a sign's change could overflow.
#[test]
fn the_largest_integers_are_multiplied_as_others() {
    let (outputs, inputs) = (32, 64);
    for dtype in INTS {
        let (bits, group, zero, has_min) = said(dtype);
        for q in [0, (1u32 << bits) - 1].map(|q| q as u8) {
            let scales = vec![f16::ONE; outputs * inputs / group];
            let mins = vec![f16::ZERO; if has_min { scales.len() } else { 0 }];
            let weights = vec![f32::from(q) - f32::from(zero); outputs * inputs];
            let file = File { q: vec![q; weights.len()], scales, mins, weights };
            let matrix = file.matrix(dtype, outputs, inputs);
            for signs in [[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]] {
                let x: Vec<f32> = (0..inputs).map(|i| 127.0 * signs[i % 2]).collect();
                let want = linear_row(&x, &x, &file.weights, None, None);
                for dev in devices() {
                    for row in product(&dev, &matrix, None, &vec![x.clone(); 4]).chunks(outputs) {
                        let row: Vec<f64> = row.iter().map(|&y| f64::from(y)).collect();
                        assert_eq!(row, want, "{}, {dtype:?}: {q} by {signs:?}", dev.name());
                    }
                }
            }
        }
    }
}

#[test]
fn rounding_to_groups_is_off_by_half_a_step_at_most() {
    let mut rng = Rng(2);
    for dtype in INTS {
        let (bits, group, _, has_min) = said(dtype);
        for (size, shift) in [(1.0f32, 0.0f32), (1e-3, 0.0), (0.5, 3.0)] {
            let (outputs, inputs) = (40, 100);
            let values: Vec<f32> =
                rng.values(outputs * inputs).iter().map(|v| size * v + shift).collect();
            let matrix = Matrix::from_f32(CPU, dtype, outputs, inputs, &values).expect("memory");
            let mut row = vec![0.0; inputs];
            for (output, values) in values.chunks(inputs).enumerate() {
                matrix.read_row(output, &mut row);
                for (held, values) in row.chunks(group).zip(values.chunks(group)) {
                    // The last group is padded with zeros.
                    let padded =
                        values.iter().copied().chain((values.len() < group).then_some(0.0));
                    let (low, high) = padded
                        .fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
                    let step = match has_min {
                        true => (high - low) / ((1 << bits) - 1) as f32,
                        false => high.max(-low) / ((1 << (bits - 1)) - 1) as f32,
                    };
                    // Scale and minimum are rounded to f16, small ones in steps of 2^-24.
                    let most = 0.52 * step + high.abs().max(low.abs()) * 2e-3 + 255.0 * 3e-8;
                    for (held, value) in held.iter().zip(values) {
                        let error = (held - value).abs();
                        assert!(error <= most, "{dtype:?}: {value} became {held}, step {step}");
                    }
                }
            }
        }
        let zeros = Matrix::from_f32(CPU, dtype, 3, 64, &[0.0; 192]).expect("memory");
        let mut row = vec![1.0; 64];
        zeros.read_row(2, &mut row);
        assert_eq!(row, [0.0; 64], "{dtype:?}");
    }
}

#[test]
fn a_value_that_is_not_finite_spoils_its_row_and_no_other() {
    let mut rng = Rng(3);
    for dtype in INTS {
        let weight = Matrix::from_f32(CPU, dtype, 20, 96, &rng.values(20 * 96)).expect("memory");
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 40, 95] {
                let mut x: Vec<Vec<f32>> = (0..5).map(|_| rng.values(96)).collect();
                x[2][at] = bad;
                for dev in devices() {
                    let y = product(&dev, &weight, None, &x);
                    for (t, y) in y.chunks(20).enumerate() {
                        let finite = y.iter().filter(|y| y.is_finite()).count();
                        let want = if t == 2 { 0 } else { 20 };
                        assert_eq!(finite, want, "{}, {dtype:?}: {bad} at {at}", dev.name());
                    }
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "integer weights read an Act made with bytes")]
fn an_act_without_bytes_is_refused() {
    let weight = Matrix::from_f32(CPU, WeightDtype::Int8, 16, 96, &[0.0; 16 * 96]);
    let act = Act::new(CPU, Dtype::F32, 2, 96).expect("memory");
    let mut y = plane(&[0.0; 32], 16);
    let weight = &weight.expect("memory");
    let mut outs = [Linear { weight, bias: None, site: 0, y: &mut y }];
    linear(&Device::cpu(1), &act, 2, &mut outs, Segments::none(), &mut scratch(2, 1));
}
