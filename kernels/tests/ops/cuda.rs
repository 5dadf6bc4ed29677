//! The ops of a GPU against loops in f64. Where there is no GPU each test says on stderr that it
//! was skipped; `emulated` then runs the same tests, whose names begin with `gpu_`, on a driver
//! without one.

#[cfg(target_os = "linux")]
mod emulated;

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::common::{Rng, assert_close};
use polylora_kernels::cuda::{
    Act, Buffer, Delta, Error, Gpu, LoraScratch, Matrix, gemm, gpus, lora,
};
use polylora_kernels::reference::segment_of;
use polylora_kernels::{Dtype, PARTS_MAX, Segments};

/// Says it past the test harness, which swallows what a passing test prints.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}"); // nobody reads: nothing to be done
}

/// GPU 0, or nothing and a line.
fn gpu() -> Option<Gpu> {
    match Gpu::open(0) {
        Ok(gpu) => Some(gpu),
        Err(why @ (Error::NoDriver | Error::NoSuchGpu { found: 0, .. })) => {
            let test = std::thread::current().name().unwrap_or("a test").to_owned();
            say(&format!("SKIPPED, not passed: {test}: {why}"));
            None
        }
        Err(why) => panic!("a GPU that cannot be used: {why}"),
    }
}

fn of_bf16(rng: &mut Rng, n: usize) -> Vec<f32> {
    rng.stored(Dtype::Bf16, n)
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// x `[T, I]` on the GPU.
fn act(gpu: &Gpu, x: &[f32], width: usize) -> Act {
    let mut act = Act::new(gpu, x.len() / width, width).expect("memory");
    act.write(0, x).expect("a copy");
    act
}

/// x·Wᵀ of the rows of `x` in one call.
fn product(gpu: &Gpu, x: &[f32], w: &Matrix) -> Vec<f32> {
    let rows = x.len() / w.inputs();
    let mut got = vec![f32::NAN; rows * w.outputs()];
    let mut y = Buffer::from(gpu, &got).expect("memory");
    gemm(gpu, &act(gpu, x, w.inputs()), rows, w, &mut y).expect("a launch");
    y.read(&mut got).expect("a copy");
    got
}

#[test]
fn gpu_gemm_equals_the_f64_loop_on_odd_shapes() {
    let Some(gpu) = gpu() else { return };
    let mut rng = Rng(11);
    let mut shapes = vec![
        (1, 1, 1),
        (1, 128, 16),
        (2, 33, 17),
        (7, 31, 65),
        (16, 160, 48),
        (17, 577, 15),
        (32, 96, 64),
        (33, 100, 64),
        (64, 129, 128),
        (65, 640, 63),
    ];
    shapes.extend((0..6).map(|_| (1 + rng.below(200), 1 + rng.below(300), 1 + rng.below(150))));
    for (rows, inputs, outputs) in shapes {
        let (x, w) = (of_bf16(&mut rng, rows * inputs), of_bf16(&mut rng, outputs * inputs));
        let matrix = Matrix::from_f32(&gpu, outputs, inputs, &w).expect("memory");
        let got = product(&gpu, &x, &matrix);
        for (t, (x, got)) in x.chunks(inputs).zip(got.chunks(outputs)).enumerate() {
            let want: Vec<f64> = w.chunks(inputs).map(|w| dot(w, x)).collect();
            let what = format!("row {t} of {rows}, W [{outputs}, {inputs}]");
            assert_close(got, &want, 3e-7 * inputs as f64 + 1e-6, &what);
        }
    }
}

#[test]
fn gpu_gemm_gives_a_row_the_same_bits_alone_and_among_others() {
    let Some(gpu) = gpu() else { return };
    let mut rng = Rng(12);
    for (inputs, outputs) in [(64, 20), (300, 70), (1000, 40)] {
        let x = rng.values(70 * inputs);
        let matrix = Matrix::from_f32(&gpu, outputs, inputs, &rng.values(outputs * inputs));
        let matrix = matrix.expect("memory");
        let among = product(&gpu, &x, &matrix);
        for (start, end) in [(0, 1), (3, 4), (69, 70), (10, 27), (0, 32), (5, 70)] {
            let some = product(&gpu, &x[start * inputs..end * inputs], &matrix);
            let want = bits(&among[start * outputs..end * outputs]);
            assert_eq!(bits(&some), want, "rows {start}..{end}, W [{outputs}, {inputs}]");
        }
    }
}

/// One adapter at one site: on the GPU, and as the reference sees it.
struct Adapter {
    a: Vec<f32>,
    b: Vec<f32>,
    delta: Delta,
}

const SCALE: f32 = 0.25;

impl Adapter {
    fn new(gpu: &Gpu, rng: &mut Rng, rank: usize, inputs: usize, outputs: usize) -> Adapter {
        let (a, b) = (of_bf16(rng, rank * inputs), of_bf16(rng, outputs * rank));
        let delta = Delta::new(gpu, rank, inputs, outputs, &a, &b, SCALE).expect("memory");
        Adapter { a, b, delta }
    }

    /// What it adds to a row.
    fn change(&self, x: &[f32], weight: f32) -> Vec<f64> {
        let u: Vec<f64> = self.a.chunks(x.len()).map(|a| dot(a, x)).collect();
        let row = |b: &[f32]| -> f64 { b.iter().zip(&u).map(|(&b, u)| f64::from(b) * u).sum() };
        let rows = self.b.chunks(self.delta.rank());
        rows.map(|b| f64::from(weight) * f64::from(SCALE) * row(b)).collect()
    }
}

/// Some rows, what they are added to, and the weighted adapters of each segment.
struct Case {
    inputs: usize,
    outputs: usize,
    x: Vec<f32>,
    y: Vec<f32>,
    adapters: Vec<Adapter>,
    indptr: Vec<u32>,
    blends: Vec<Vec<(usize, f32)>>,
}

const RANK_MAX: usize = 600;

impl Case {
    fn new(gpu: &Gpu, rng: &mut Rng, rows: usize, ranks: &[usize]) -> Case {
        let (inputs, outputs) = (40 + rng.below(120), 30 + rng.below(300));
        let new = |&rank: &usize| Adapter::new(gpu, rng, rank, inputs, outputs);
        let adapters = ranks.iter().map(new).collect();
        let (x, y) = (of_bf16(rng, rows * inputs), rng.values(rows * outputs));
        Case { inputs, outputs, x, y, adapters, indptr: vec![0], blends: Vec::new() }
    }

    fn segment(&mut self, rows: usize, blend: &[(usize, f32)]) {
        self.indptr.push(self.indptr[self.indptr.len() - 1] + rows as u32);
        self.blends.push(blend.to_vec());
    }

    fn rows(&self) -> usize {
        self.x.len() / self.inputs
    }

    /// y after the op, with these segments over `rows` of x.
    fn run_rows(
        &self,
        gpu: &Gpu,
        rows: std::ops::Range<usize>,
        indptr: &[u32],
        blends: &[Vec<(usize, f32)>],
    ) -> Vec<f32> {
        let x = act(gpu, &self.x[rows.start * self.inputs..rows.end * self.inputs], self.inputs);
        let before = &self.y[rows.start * self.outputs..rows.end * self.outputs];
        let mut y = Buffer::from(gpu, before).expect("memory");
        let mut scratch = LoraScratch::new(gpu, rows.len(), RANK_MAX).expect("memory");
        lora(
            gpu,
            &x,
            rows.len(),
            Segments { indptr },
            &|g, add| blends[g].iter().for_each(|&(a, w)| add(&self.adapters[a].delta, w)),
            &mut y,
            self.outputs,
            &mut scratch,
        )
        .expect("a launch");
        let mut after = vec![0.0; before.len()];
        y.read(&mut after).expect("a copy");
        after
    }

    fn run(&self, gpu: &Gpu) -> Vec<f32> {
        self.run_rows(gpu, 0..self.rows(), &self.indptr, &self.blends)
    }

    fn check(&self, gpu: &Gpu, what: &str) {
        let got = self.run(gpu);
        for t in 0..self.rows() {
            let x = &self.x[t * self.inputs..][..self.inputs];
            let mut want: Vec<f64> =
                self.y[t * self.outputs..][..self.outputs].iter().map(|&y| f64::from(y)).collect();
            let segment = segment_of(Segments { indptr: &self.indptr }, t);
            let blend = segment.map_or(&[][..], |g| &self.blends[g]);
            let mut ranks = 0;
            for &(adapter, weight) in blend {
                ranks += self.adapters[adapter].delta.rank();
                let change = self.adapters[adapter].change(x, weight);
                want.iter_mut().zip(change).for_each(|(y, change)| *y += change);
            }
            let got = &got[t * self.outputs..][..self.outputs];
            let what = format!("{what}: row {t} of {}, ranks {ranks}", self.rows());
            if ranks == 0 {
                assert_eq!(bits(got), bits(&self.y[t * self.outputs..][..self.outputs]), "{what}");
            }
            let tolerance = 3e-7 * self.inputs as f64 * (1.0 + 0.05 * ranks as f64) + 1e-6;
            assert_close(got, &want, tolerance, &what);
        }
    }
}

/// Rows of each segment under the popularity; the rest of `rows` are base rows.
fn popularity(name: &str, rows: usize) -> Vec<usize> {
    match name {
        "identical" => vec![rows],
        "distinct" => vec![1; rows],
        "uniform" => vec![3; rows / 3],
        "zipf" => (1..).map(|i| rows / (3 * i)).take_while(|&n| n > 0).collect(),
        "skewed" => std::iter::once(rows - 8).chain([1; 4]).collect(),
        "none" => vec![],
        _ => unreachable!("{name}"),
    }
}

const POPULARITIES: [&str; 6] = ["identical", "distinct", "uniform", "zipf", "skewed", "none"];
const RANKS: [usize; 10] = [16, 1, 512, 7, 64, 33, 8, 2, 100, 17];

#[test]
fn gpu_lora_of_any_rank_and_popularity_equals_the_f64_loop() {
    let Some(gpu) = gpu() else { return };
    let mut rng = Rng(13);
    for name in POPULARITIES {
        for rows in [12, 50] {
            let mut case = Case::new(&gpu, &mut rng, rows, &RANKS);
            for (i, rows) in popularity(name, rows).into_iter().enumerate() {
                // The adapters of every seventh segment do not touch this site.
                let blend = [(i % RANKS.len(), 1.0)];
                case.segment(rows, if i % 7 == 6 { &[] } else { &blend });
            }
            case.check(&gpu, name);
        }
    }
    for rank in [1, 15, 16, 31, 32, 129, 512] {
        let mut case = Case::new(&gpu, &mut rng, 37, &[rank]);
        case.segment(36, &[(0, 1.0)]);
        case.check(&gpu, "one adapter");
    }
}

#[test]
fn gpu_lora_sums_the_weighted_deltas_of_a_segment() {
    let Some(gpu) = gpu() else { return };
    let mut rng = Rng(14);
    let mut case = Case::new(&gpu, &mut rng, 30, &[16, 5, 33, 1, 64]);
    case.segment(2, &[(0, 0.5), (1, -1.25)]);
    case.segment(19, &[(2, 1.0), (3, 0.75), (0, 2.0)]);
    case.segment(1, &[(4, 1.0)]);
    case.segment(4, &[(1, 0.1); PARTS_MAX]);
    case.check(&gpu, "sums");
}

#[test]
fn gpu_lora_gives_a_row_the_same_bits_alone_and_among_others() {
    let Some(gpu) = gpu() else { return };
    let mut rng = Rng(15);
    for name in ["identical", "uniform", "zipf", "distinct"] {
        let mut case = Case::new(&gpu, &mut rng, 40, &RANKS);
        for (i, rows) in popularity(name, 40).into_iter().enumerate() {
            case.segment(rows, &[(i % RANKS.len(), 1.0), (0, 0.5)]);
        }
        let among = case.run(&gpu);
        for t in [0, 1, 2, 7, 15, 16, 17, 33, 39] {
            let segment = segment_of(Segments { indptr: &case.indptr }, t);
            let blends: Vec<_> = segment.map(|g| case.blends[g].clone()).into_iter().collect();
            let indptr: &[u32] = if blends.is_empty() { &[0] } else { &[0, 1] };
            let alone = case.run_rows(&gpu, t..t + 1, indptr, &blends);
            let row = &among[t * case.outputs..][..case.outputs];
            assert_eq!(bits(&alone), bits(row), "{name}, row {t}");
        }
    }
}

#[test]
fn gpu_launches_do_not_depend_on_the_adapters() {
    let Some(gpu) = gpu() else { return };
    let mut rng = Rng(16);
    for name in POPULARITIES {
        let mut case = Case::new(&gpu, &mut rng, 24, &[8, 1, 40]);
        let segments = popularity(name, 24);
        segments.iter().enumerate().for_each(|(i, &rows)| case.segment(rows, &[(i % 3, 1.0)]));
        let before = gpu.launches();
        case.run(&gpu);
        let expected = if segments.is_empty() { 0 } else { 2 };
        assert_eq!(gpu.launches() - before, expected, "{name}");
    }
}

#[test]
fn gpu_buffers_keep_what_is_written_and_begin_as_zeros() {
    let Some(gpu) = gpu() else { return };
    let mut buffer: Buffer<f32> = Buffer::zeroed(&gpu, 100).expect("memory");
    buffer.write(40, &[1.0, 2.0, 3.0]).expect("a copy");
    let mut got = vec![f32::NAN; 50];
    buffer.read(&mut got).expect("a copy");
    let want: Vec<f32> =
        (0..50).map(|i| if (40..43).contains(&i) { (i - 39) as f32 } else { 0.0 }).collect();
    assert_eq!(got, want);
    assert_eq!((buffer.len(), buffer.bytes()), (100, 400));
    let none: Buffer<u32> = Buffer::zeroed(&gpu, 0).expect("no memory is no failure");
    assert!(none.is_empty());
}

/// What the op says when it refuses.
#[track_caller]
fn refused(body: impl FnOnce()) -> String {
    let payload = catch_unwind(AssertUnwindSafe(body)).expect_err("refused");
    payload.downcast_ref::<String>().expect("a sentence").clone()
}

#[test]
fn gpu_shapes_that_do_not_fit_are_refused_before_a_launch() {
    let Some(gpu) = gpu() else { return };
    let mut rng = Rng(17);
    let x = Act::new(&gpu, 4, 64).expect("memory");
    let mut y = Buffer::zeroed(&gpu, 4 * 16).expect("memory");
    let narrow = Matrix::from_f32(&gpu, 16, 32, &rng.values(16 * 32)).expect("memory");
    let wide = Matrix::from_f32(&gpu, 17, 64, &rng.values(17 * 64)).expect("memory");
    let before = gpu.launches();
    let said = refused(|| gemm(&gpu, &x, 4, &narrow, &mut y).expect("refused"));
    assert!(said.contains("W is [16, 32]"), "{said}");
    let said = refused(|| gemm(&gpu, &x, 4, &wide, &mut y).expect("refused"));
    assert!(said.contains("y holds 4 rows of 17"), "{said}");
    let said = refused(|| gemm(&gpu, &x, 5, &wide, &mut y).expect("refused"));
    assert!(said.contains("5 rows of x's 4"), "{said}");

    let adapter = Adapter::new(&gpu, &mut rng, 9, 64, 17);
    let mut scratch = LoraScratch::new(&gpu, 4, 8).expect("memory");
    let mut lora = |rows: usize, indptr: &[u32], outputs: usize| {
        refused(|| {
            let segments = Segments { indptr };
            lora(
                &gpu,
                &x,
                rows,
                segments,
                &|_, add| add(&adapter.delta, 1.0),
                &mut y,
                outputs,
                &mut scratch,
            )
            .expect("refused");
        })
    };
    assert!(lora(4, &[0, 5], 16).contains("segments reach row 5 of 4"));
    assert!(lora(4, &[0, 2], 16).contains("a delta of [17, 64] on W [16, 64]"));
    assert!(lora(3, &[0, 2], 17).contains("rank 9, scratch for 8"));
    assert!(lora(4, &[0, 2], 17).contains("y holds 4 rows of 17"));
    assert_eq!(gpu.launches(), before);
}

/// What opening a GPU gives, for `emulated`; on a machine without a driver, what it must be.
#[test]
fn opening_a_gpu_gives_one_or_one_line() {
    let index = std::env::var("EMULATED_OPEN").map_or(0, |n| n.parse().expect("a number"));
    let line = match Gpu::open(index) {
        Ok(gpu) => gpu.name(),
        Err(why) => {
            let names = gpus();
            assert!(!matches!(why, Error::NoDriver) || names == Err(Error::NoDriver), "{names:?}");
            why.to_string()
        }
    };
    assert!(!line.contains('\n'), "{line}");
    say(&format!("OPENED {line}"));
}
