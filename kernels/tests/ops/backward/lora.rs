//! Shrink, expand and outer of several jobs' segments.

use super::{act_of, assert_near, bits, wide};
use crate::common::{Rng, devices, plane, read_all};
use polylora_kernels::{Device, Factor, FactorGradient, Isa, expand, outer, shrink};
use std::ops::Range;

/// A job's rows, rank, scale and factors at a site of some width.
struct Job {
    rows: Range<usize>,
    rank: usize,
    scale: f32,
    values: Vec<f32>,
}

impl Job {
    fn factor(&self) -> Factor<'_> {
        let Job { rows, rank, scale, values } = self;
        Factor { rows: rows.clone(), rank: *rank, values, scale: *scale }
    }
}

/// Three jobs with rows of nobody between them.
fn jobs(rng: &mut Rng, width: usize) -> Vec<Job> {
    let mut job = |rows: Range<usize>, rank: usize, scale: f32| Job {
        rows,
        rank,
        scale,
        values: rng.values(rank * width),
    };
    vec![job(2..3, 5, 0.5), job(3..140, 16, 2.0), job(141..206, 3, -1.5)]
}

const ROWS: usize = 210;
const RANK: usize = 16;

/// What a job's products are, from x, u and what is added to.
struct Made {
    u: Vec<f32>,
    y: Vec<f32>,
    gradients: Vec<Vec<f32>>,
}

fn run(dev: &Device, width: usize, jobs: &[Job], x: &[f32], u0: &[f32], y: &[f32]) -> Made {
    let segments: Vec<Factor<'_>> = jobs.iter().map(Job::factor).collect();
    let x = act_of(x, width);
    let mut u = plane(&vec![f32::NAN; ROWS * RANK], RANK);
    shrink(dev, &x, &segments, &mut u);
    let (u0, mut y) = (plane(u0, RANK), plane(y, width));
    expand(dev, &u0, &segments, &mut y);
    let mut gradients: Vec<Vec<f32>> =
        jobs.iter().map(|job| Rng(9).values(job.rank * width)).collect();
    let mut of: Vec<FactorGradient<'_>> = jobs
        .iter()
        .zip(&mut gradients)
        .map(|(job, values)| FactorGradient {
            rows: job.rows.clone(),
            rank: job.rank,
            values,
            scale: job.scale,
        })
        .collect();
    outer(dev, &u0, &x, &mut of);
    Made { u: read_all(dev, &mut u), y: read_all(dev, &mut y), gradients }
}

#[test]
fn the_three_products_equal_f64_loops_and_touch_nobody_elses_rows() {
    for dev in devices() {
        for width in [1, 33, 64, 200] {
            let mut rng = Rng(width as u64);
            let jobs = jobs(&mut rng, width);
            let [x, y] = [0, 1].map(|_| rng.values(ROWS * width));
            let u0 = rng.values(ROWS * RANK);
            let made = run(&dev, width, &jobs, &x, &u0, &y);
            for t in 0..ROWS {
                let what = format!("{} width {width} row {t}", dev.name());
                let (mut want, x) =
                    (wide(&y[t * width..][..width]), wide(&x[t * width..][..width]));
                let u = &made.u[t * RANK..][..RANK];
                let Some(job) = jobs.iter().find(|job| job.rows.contains(&t)) else {
                    assert!(u.iter().all(|u| u.is_nan()), "{what}: u of nobody's row");
                    assert_near(&made.y[t * width..][..width], &want, 0.0, &what);
                    continue;
                };
                assert!(u[job.rank..].iter().all(|u| u.is_nan()), "{what}: u beyond the rank");
                let factors: Vec<Vec<f64>> = job.values.chunks(width).map(wide).collect();
                let dot = |f: &Vec<f64>| f.iter().zip(&x).map(|(f, x)| f * x).sum::<f64>();
                let scale = f64::from(job.scale);
                let of_x: Vec<f64> = factors.iter().map(|f| scale * dot(f)).collect();
                assert_near(&u[..job.rank], &of_x, 1e-5, &what);
                for (f, &u) in factors.iter().zip(&u0[t * RANK..]) {
                    want.iter_mut().zip(f).for_each(|(y, f)| *y += scale * f64::from(u) * f);
                }
                // Of one column, terms may cancel: against the largest value there is.
                for (got, want) in made.y[t * width..][..width].iter().zip(&want) {
                    assert!((f64::from(*got) - want).abs() < 1e-5, "{what}: {got}, not {want}");
                }
            }
            for (job, got) in jobs.iter().zip(&made.gradients) {
                let what = format!("{} width {width} rows {:?}", dev.name(), job.rows);
                let mut want = wide(&Rng(9).values(job.rank * width));
                for t in job.rows.clone() {
                    for r in 0..job.rank {
                        let u = f64::from(job.scale) * f64::from(u0[t * RANK + r]);
                        let x = &x[t * width..][..width];
                        let row = want[r * width..].iter_mut().zip(x);
                        row.for_each(|(want, &x)| *want += u * f64::from(x));
                    }
                }
                assert_near(got, &want, 1e-5, &what);
            }
        }
    }
}

#[test]
fn a_job_has_the_same_bits_alone_and_on_any_number_of_threads() {
    let width = 100;
    let mut rng = Rng(103);
    let jobs = jobs(&mut rng, width);
    let [x, y] = [0, 1].map(|_| rng.values(ROWS * width));
    let u0 = rng.values(ROWS * RANK);
    for &isa in Isa::available() {
        let one = Device::cpu_with(1, isa).expect("available");
        let all = run(&one, width, &jobs, &x, &u0, &y);
        for threads in [2, 3] {
            let dev = Device::cpu_with(threads, isa).expect("available");
            let made = run(&dev, width, &jobs, &x, &u0, &y);
            assert!(bits(&made.u) == bits(&all.u), "{}: u", dev.name());
            assert!(bits(&made.y) == bits(&all.y), "{}: y", dev.name());
            assert!(made.gradients == all.gradients, "{}: gradients", dev.name());
        }
        for (job, gradient) in jobs.iter().zip(&all.gradients) {
            // The same rows from row 0 on, with nobody else.
            let of = |values: &[f32], width: usize| {
                let mut moved = values[job.rows.start * width..job.rows.end * width].to_vec();
                moved.resize(ROWS * width, 0.0);
                moved
            };
            let rows = 0..job.rows.len();
            let Job { rank, scale, ref values, .. } = *job;
            let alone = [Job { rows: rows.clone(), rank, scale, values: values.clone() }];
            let made = run(&one, width, &alone, &of(&x, width), &of(&u0, RANK), &of(&y, width));
            let same = |got: &[f32], among: &[f32], width: usize| {
                bits(&got[..rows.len() * width]) == bits(&of(among, width)[..rows.len() * width])
            };
            assert!(same(&made.y, &all.y, width), "{}: y of {:?}", one.name(), job.rows);
            assert!(same(&made.u, &all.u, RANK), "{}: u of {:?}", one.name(), job.rows);
            assert!(bits(&made.gradients[0]) == bits(gradient), "{}: {:?}", one.name(), job.rows);
        }
    }
}

#[test]
#[should_panic(expected = "segment 1 starts at row 4")]
fn a_row_of_two_jobs_is_refused() {
    let values = [0.0; 8];
    let of = |rows| Factor { rows, rank: 1, values: &values, scale: 1.0 };
    let mut u = plane(&[0.0; 8], 1);
    shrink(&Device::cpu(1), &act_of(&[0.0; 64], 8), &[of(0..4), of(3..5)], &mut u);
}
