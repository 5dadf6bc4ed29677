//! DoRA: norms by Gram algebra, magnitudes and their gradients.

use super::{act_of, assert_near, bits, rows_of, wide};
use crate::common::{CPU, Rng, devices, plane, read_all, vector, weight_dtypes};
use polylora_kernels::{
    Device, DoraFactors, DoraScratch, Isa, Magnitude, MagnitudeGradient, Matrix, dora,
    dora_backward, dora_norms, weight_squares,
};
use std::ops::Range;

#[test]
fn norms_are_those_of_the_dense_sum_on_every_type_of_weights() {
    for dev in devices() {
        for dtype in weight_dtypes() {
            for (outputs, inputs, rank) in [(1, 32, 1), (65, 96, 3), (130, 64, 16), (40, 33, 5)] {
                if inputs % 32 != 0 && dtype.group().is_some() {
                    continue;
                }
                let mut rng = Rng((outputs + inputs) as u64);
                let w = rng.values(outputs * inputs);
                let (a, b) = (rng.values(rank * inputs), rng.values(rank * outputs));
                let weight = Matrix::from_f32(CPU, dtype, outputs, inputs, &w).expect("memory");
                let mut squares = vec![0.0; outputs];
                weight_squares(&dev, &weight, &mut squares);
                let factors = DoraFactors { rank, a: &a, b: &b, scale: -0.7 };
                let mut scratch = DoraScratch::new(CPU, dev.threads(), 16).expect("memory");
                let mut norms = vec![0.0; outputs];
                dora_norms(&dev, &weight, &squares, factors, &mut norms, &mut scratch);
                let mut want = [Vec::new(), Vec::new()];
                for o in 0..outputs {
                    let mut row = vec![0.0; inputs];
                    weight.read_row(o, &mut row);
                    let mut row = wide(&row);
                    want[0].push(row.iter().map(|w| w * w).sum::<f64>());
                    for r in 0..rank {
                        let b = f64::from(-0.7f32) * f64::from(b[r * outputs + o]);
                        let a = &a[r * inputs..][..inputs];
                        row.iter_mut().zip(a).for_each(|(w, &a)| *w += b * f64::from(a));
                    }
                    want[1].push(row.iter().map(|w| w * w).sum::<f64>().sqrt());
                }
                let what = format!("{} {dtype:?} [{outputs}, {inputs}]", dev.name());
                assert_near(&squares, &want[0], 1e-5, &what);
                assert_near(&norms, &want[1], 1e-5, &what);
            }
        }
    }
}

const ROWS: usize = 170;
const JOBS: [Range<usize>; 2] = [1..3, 4..169];

fn both() -> [(usize, Range<usize>); 2] {
    [0, 1].map(|job| (job, JOBS[job].clone()))
}

/// m and c of two jobs.
struct Sizes {
    values: [Vec<f32>; 2],
    norms: [Vec<f32>; 2],
}

impl Sizes {
    fn new(rng: &mut Rng, width: usize) -> Sizes {
        let values = [(); 2].map(|()| rng.values(width));
        let norms = [(); 2].map(|()| rng.values(width).iter().map(|c| 1.5 + c).collect());
        Sizes { values, norms }
    }

    fn of(&self, job: usize, rows: Range<usize>) -> Magnitude<'_> {
        Magnitude { rows, values: &self.values[job], norms: &self.norms[job] }
    }

    /// dz of some jobs, which have these rows, and dm.
    fn backward(
        &self,
        dev: &Device,
        z: &[f32],
        dy: &[f32],
        jobs: &[(usize, Range<usize>)],
    ) -> (Vec<f32>, Vec<Vec<f32>>) {
        let width = self.values[0].len();
        let mut gradients: Vec<Vec<f32>> = jobs.iter().map(|_| Rng(5).values(width)).collect();
        let mut segments: Vec<MagnitudeGradient<'_>> = jobs
            .iter()
            .zip(&mut gradients)
            .map(|((job, rows), gradient)| {
                let of = self.of(*job, rows.clone());
                MagnitudeGradient { of, gradient }
            })
            .collect();
        let mut dz = act_of(dy, width);
        dora_backward(dev, &plane(z, width), &mut segments, &mut dz);
        (rows_of(&dz, ROWS), gradients)
    }
}

#[test]
fn magnitudes_equal_f64_loops_and_leave_other_rows_alone() {
    for dev in devices() {
        for width in [1, 33, 100] {
            let mut rng = Rng(width as u64);
            let sizes = Sizes::new(&mut rng, width);
            let [z, dy] = [(); 2].map(|()| rng.values(ROWS * width));
            let bias = rng.values(width);
            let segments = [0, 1].map(|job| sizes.of(job, JOBS[job].clone()));
            let mut y = plane(&vec![f32::NAN; ROWS * width], width);
            dora(&dev, &plane(&z, width), ROWS, &segments, Some(&vector(&bias)), &mut y);
            let y = read_all(&dev, &mut y);
            let (dz, gradients) = sizes.backward(&dev, &z, &dy, &both());
            let mut dm = [(); 2].map(|()| wide(&Rng(5).values(width)));
            for (t, o) in (0..ROWS).flat_map(|t| (0..width).map(move |o| (t, o))) {
                let [z, dy, bias] = [z[t * width + o], dy[t * width + o], bias[o]].map(f64::from);
                let job = JOBS.iter().position(|rows| rows.contains(&t));
                let gain = job.map_or(1.0, |job| {
                    let c = f64::from(sizes.norms[job][o]);
                    dm[job][o] += dy * z / c;
                    f64::from(sizes.values[job][o]) / c
                });
                let what = format!("{} width {width} [{t}, {o}]", dev.name());
                let near = |got: f32, want: f64| (f64::from(got) - want).abs() < 1e-6;
                assert!(near(y[t * width + o], gain * z + bias), "{what}: y");
                assert!(near(dz[t * width + o], gain * dy), "{what}: dz");
            }
            for (got, want) in gradients.iter().zip(&dm) {
                assert_near(got, want, 1e-5, &format!("{} width {width}: dm", dev.name()));
            }
        }
    }
}

#[test]
fn a_jobs_magnitudes_have_the_same_bits_alone_and_on_any_number_of_threads() {
    let width = 70;
    let mut rng = Rng(109);
    let sizes = Sizes::new(&mut rng, width);
    let [z, dy] = [(); 2].map(|()| rng.values(ROWS * width));
    for &isa in Isa::available() {
        let one = Device::cpu_with(1, isa).expect("available");
        let (dz, gradients) = sizes.backward(&one, &z, &dy, &both());
        for threads in [2, 3] {
            let dev = Device::cpu_with(threads, isa).expect("available");
            let made = sizes.backward(&dev, &z, &dy, &both());
            assert!(bits(&made.0) == bits(&dz) && made.1 == gradients, "{}", dev.name());
        }
        for job in 0..2 {
            // The same rows from row 0 on, with nobody else.
            let rows = JOBS[job].start * width..JOBS[job].end * width;
            let moved = |x: &[f32]| {
                let mut moved = x[rows.clone()].to_vec();
                moved.resize(ROWS * width, 0.0);
                moved
            };
            let jobs = [(job, 0..JOBS[job].len())];
            let alone = sizes.backward(&one, &moved(&z), &moved(&dy), &jobs);
            assert!(bits(&alone.1[0]) == bits(&gradients[job]), "{} job {job}", one.name());
            assert!(alone.0[..rows.len()] == dz[rows], "{} job {job}: dz", one.name());
        }
    }
}
