//! The ops of a GPU against loops in f64. Where there is no GPU each test says on stderr that it
//! was skipped; `emulated` then runs the same tests, whose names begin with `gpu_`, on a driver
//! without one.

#[cfg(target_os = "linux")]
mod emulated;

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::common::{Rng, assert_close};
use polylora_kernels::reference::segment_of;
use polylora_kernels::{
    Act, AdapterMix, AttentionScratch, Delta, Device, DeviceChoice, Dtype, EmbedDelta, Error,
    FactorDtype, Gate, KvCache, Linear, LoraScratch, Matrix, PARTS_MAX, Plane, Resident, Residents,
    RopeTable, Segments, Slot, Vector, WeightDtype, embed, glu, gpus, linear,
};

/// Says it past the test harness, which swallows what a passing test prints.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}"); // nobody reads: nothing to be done
}

/// GPU 0, or nothing and a line.
fn gpu() -> Option<Device> {
    match Device::open(DeviceChoice::Cuda(0), 1) {
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
fn act(gpu: &Device, x: &[f32], width: usize) -> Act {
    let mut act = Act::new(gpu.memory(), Dtype::Bf16, x.len() / width, width).expect("memory");
    act.write(0, x).expect("a copy");
    act
}

fn matrix(gpu: &Device, outputs: usize, inputs: usize, rows: &[f32]) -> Matrix {
    Matrix::from_f32(gpu.memory(), Dtype::Bf16, outputs, inputs, rows).expect("memory")
}

/// x·Wᵀ of the rows of `x`, with the deltas of their segments, in one call.
fn product_with(
    gpu: &Device,
    x: &[f32],
    weight: &Matrix,
    segments: Segments<'_>,
    rank_max: usize,
) -> Vec<f32> {
    let (rows, outputs) = (x.len() / weight.inputs(), weight.outputs());
    let mut y = Plane::new(gpu.memory(), rows, outputs).expect("memory");
    y.write(0, &vec![f32::NAN; rows * outputs]).expect("a copy");
    let x = act(gpu, x, weight.inputs());
    let mut scratch = LoraScratch::new(gpu.memory(), rows, rank_max).expect("memory");
    let outs = &mut [Linear { weight, bias: None, site: 0, y: &mut y }];
    linear(gpu, &x, rows, outs, segments, &mut scratch);
    y.read(gpu, rows).expect("launches and a copy").to_vec()
}

/// x·Wᵀ of the rows of `x` in one call.
fn product(gpu: &Device, x: &[f32], w: &Matrix) -> Vec<f32> {
    product_with(gpu, x, w, Segments::none(), 1)
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
        let matrix = matrix(&gpu, outputs, inputs, &w);
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
        let matrix = matrix(&gpu, outputs, inputs, &rng.values(outputs * inputs));
        let among = product(&gpu, &x, &matrix);
        for (start, end) in [(0, 1), (3, 4), (69, 70), (10, 27), (0, 32), (5, 70)] {
            let some = product(&gpu, &x[start * inputs..end * inputs], &matrix);
            let want = bits(&among[start * outputs..end * outputs]);
            assert_eq!(bits(&some), want, "rows {start}..{end}, W [{outputs}, {inputs}]");
        }
    }
}

/// One adapter at one site, as the reference sees it.
struct Adapter {
    rank: usize,
    a: Vec<f32>,
    b: Vec<f32>,
}

const SCALE: f32 = 0.25;

impl Adapter {
    fn new(rng: &mut Rng, rank: usize, inputs: usize, outputs: usize) -> Adapter {
        Adapter { rank, a: of_bf16(rng, rank * inputs), b: of_bf16(rng, outputs * rank) }
    }

    /// On the GPU.
    fn delta(&self, gpu: &Device) -> Delta {
        let (inputs, outputs) = (self.a.len() / self.rank, self.b.len() / self.rank);
        let Adapter { rank, a, b } = self;
        let memory = gpu.memory();
        let made = Delta::new(memory, Dtype::Bf16, *rank, inputs, outputs, a, b, SCALE, None, None);
        made.expect("memory")
    }

    /// What it adds to a row.
    fn change(&self, x: &[f32], weight: f32) -> Vec<f64> {
        let u: Vec<f64> = self.a.chunks(x.len()).map(|a| dot(a, x)).collect();
        let row = |b: &[f32]| -> f64 { b.iter().zip(&u).map(|(&b, u)| f64::from(b) * u).sum() };
        let rows = self.b.chunks(self.rank);
        rows.map(|b| f64::from(weight) * f64::from(SCALE) * row(b)).collect()
    }
}

/// Residents of one delta each.
fn residents(deltas: impl IntoIterator<Item = Delta>) -> Residents {
    let mut residents = Residents::new(16);
    for delta in deltas {
        let resident = Resident { deltas: vec![Some(delta)], ..Resident::default() };
        residents.install(resident).map_err(|_| "full").expect("a slot");
    }
    residents
}

fn of(parts: &[(usize, f32)]) -> AdapterMix {
    AdapterMix::new(parts.iter().map(|&(slot, weight)| (Slot(slot as u32), weight)))
}

/// Some rows, what multiplies them, and the weighted adapters of each segment.
struct Case {
    inputs: usize,
    outputs: usize,
    x: Vec<f32>,
    w: Vec<f32>,
    weight: Matrix,
    adapters: Vec<Adapter>,
    residents: Residents,
    indptr: Vec<u32>,
    mixes: Vec<Vec<(usize, f32)>>,
}

const RANK_MAX: usize = 600;

impl Case {
    fn new(gpu: &Device, rng: &mut Rng, rows: usize, ranks: &[usize]) -> Case {
        let (inputs, outputs) = (40 + rng.below(120), 30 + rng.below(300));
        let new = |&rank: &usize| Adapter::new(rng, rank, inputs, outputs);
        let adapters: Vec<Adapter> = ranks.iter().map(new).collect();
        let (x, w) = (of_bf16(rng, rows * inputs), of_bf16(rng, outputs * inputs));
        Case {
            inputs,
            outputs,
            x,
            weight: matrix(gpu, outputs, inputs, &w),
            w,
            residents: residents(adapters.iter().map(|adapter| adapter.delta(gpu))),
            adapters,
            indptr: vec![0],
            mixes: Vec::new(),
        }
    }

    fn segment(&mut self, rows: usize, mix: &[(usize, f32)]) {
        self.indptr.push(self.indptr[self.indptr.len() - 1] + rows as u32);
        self.mixes.push(mix.to_vec());
    }

    fn rows(&self) -> usize {
        self.x.len() / self.inputs
    }

    /// y of some rows of x, with these segments over them.
    fn run_rows(
        &self,
        gpu: &Device,
        rows: std::ops::Range<usize>,
        indptr: &[u32],
        mixes: &[Vec<(usize, f32)>],
    ) -> Vec<f32> {
        let x = &self.x[rows.start * self.inputs..rows.end * self.inputs];
        let mixes: Vec<AdapterMix> = mixes.iter().map(|mix| of(mix)).collect();
        let segments = Segments { indptr, mixes: &mixes, residents: &self.residents };
        product_with(gpu, x, &self.weight, segments, RANK_MAX)
    }

    fn run(&self, gpu: &Device) -> Vec<f32> {
        self.run_rows(gpu, 0..self.rows(), &self.indptr, &self.mixes)
    }

    fn check(&self, gpu: &Device, what: &str) {
        let (got, base) = (self.run(gpu), product(gpu, &self.x, &self.weight));
        for t in 0..self.rows() {
            let x = &self.x[t * self.inputs..][..self.inputs];
            let mut want: Vec<f64> = self.w.chunks(self.inputs).map(|w| dot(w, x)).collect();
            let segment = segment_of(&self.indptr, t);
            let mix = segment.map_or(&[][..], |g| &self.mixes[g]);
            let mut ranks = 0;
            for &(adapter, weight) in mix {
                ranks += self.adapters[adapter].rank;
                let change = self.adapters[adapter].change(x, weight);
                want.iter_mut().zip(change).for_each(|(y, change)| *y += change);
            }
            let got = &got[t * self.outputs..][..self.outputs];
            let what = format!("{what}: row {t} of {}, ranks {ranks}", self.rows());
            if ranks == 0 {
                assert_eq!(bits(got), bits(&base[t * self.outputs..][..self.outputs]), "{what}");
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
                let mix = [(i % RANKS.len(), 1.0)];
                case.segment(rows, if i % 7 == 6 { &[] } else { &mix });
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
            let segment = segment_of(&case.indptr, t);
            let mixes: Vec<_> = segment.map(|g| case.mixes[g].clone()).into_iter().collect();
            let indptr: &[u32] = if mixes.is_empty() { &[0] } else { &[0, 1] };
            let alone = case.run_rows(&gpu, t..t + 1, indptr, &mixes);
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
        let before = gpu.op_calls();
        case.run(&gpu);
        // The product's, and two for all deltas.
        let expected = 1 + if segments.is_empty() { 0 } else { 2 };
        assert_eq!(gpu.op_calls() - before, expected, "{name}");
    }
}

#[test]
fn gpu_planes_keep_what_is_written_and_begin_as_zeros() {
    let Some(gpu) = gpu() else { return };
    let mut plane = Plane::new(gpu.memory(), 100, 1).expect("memory");
    plane.write(40, &[1.0, 2.0, 3.0]).expect("a copy");
    let got = plane.read(&gpu, 50).expect("a copy");
    let want: Vec<f32> =
        (0..50).map(|i| if (40..43).contains(&i) { (i - 39) as f32 } else { 0.0 }).collect();
    assert_eq!(got, want);
    assert_eq!((plane.rows_max(), plane.bytes()), (100, 400));
    let mut none = Plane::new(gpu.memory(), 0, 7).expect("no memory is no failure");
    assert!(none.read(&gpu, 0).expect("nothing to copy").is_empty());
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
    let x = Act::new(gpu.memory(), Dtype::Bf16, 4, 64).expect("memory");
    let mut y = Plane::new(gpu.memory(), 4, 16).expect("memory");
    let narrow = matrix(&gpu, 16, 32, &rng.values(16 * 32));
    let even = matrix(&gpu, 16, 64, &rng.values(16 * 64));
    let wide = matrix(&gpu, 17, 64, &rng.values(17 * 64));
    let residents = residents(
        [(9, 17), (9, 16)]
            .map(|(rank, outputs)| Adapter::new(&mut rng, rank, 64, outputs).delta(&gpu)),
    );
    let mut scratch = LoraScratch::new(gpu.memory(), 5, 8).expect("memory");
    let before = gpu.op_calls();
    let mut refuse = |weight: &Matrix, rows: usize, indptr: &[u32], slot: usize| {
        refused(|| {
            let mixes = &[AdapterMix::from(Slot(slot as u32))][..indptr.len() - 1];
            let segments = Segments { indptr, mixes, residents: &residents };
            let outs = &mut [Linear { weight, bias: None, site: 0, y: &mut y }];
            linear(&gpu, &x, rows, outs, segments, &mut scratch);
        })
    };
    let says = |said: String, what: &str| assert!(said.contains(what), "{said}");
    says(refuse(&narrow, 4, &[0], 0), "W is [16, 32]");
    says(refuse(&wide, 4, &[0], 0), "y holds 4 rows of 17");
    says(refuse(&even, 5, &[0], 0), "5 rows of x's 4");
    says(refuse(&even, 4, &[0, 5], 0), "segments reach row 5 of 4");
    says(refuse(&even, 4, &[0, 2], 0), "a delta of [17, 64] on W [16, 64]");
    says(refuse(&even, 3, &[0, 2], 1), "rank 9, scratch for 8");
    assert_eq!(gpu.op_calls(), before);
}

/// What no operation of a GPU reads cannot be made there, and the error names it.
#[test]
fn gpu_operands_that_only_the_cpu_has_are_refused_by_name() {
    let Some(gpu) = gpu() else { return };
    let memory = gpu.memory();
    let refused = |made: Option<Error>, name: &str| {
        let said = made.expect("refused").to_string();
        assert!(said.starts_with(name) && said.contains("for the CPU only"), "{said}");
    };
    let values = [0.5; 64];
    refused(Act::new(memory, Dtype::F32, 1, 8).err(), "an activation in f32");
    refused(Act::with_bytes(memory, Dtype::Bf16, 1, 8).err(), "an activation in 8 bits");
    let matrix = |dtype: WeightDtype| Matrix::from_f32(memory, dtype, 2, 32, &values).err();
    refused(matrix(WeightDtype::F32), "a matrix in f32");
    refused(matrix(WeightDtype::Int4), "a matrix of integers");
    let read = Matrix::packed(&gpu, Dtype::Bf16, 2, 32, |_, _| Ok::<(), Error>(()));
    refused(read.err(), "a matrix read from a file");
    let delta = |dtype: FactorDtype, gain, bias| {
        Delta::new(memory, dtype, 1, 2, 2, &values[..2], &values[..2], 1.0, gain, bias).err()
    };
    refused(delta(FactorDtype::F32, None, None), "an adapter's factors in f32");
    refused(delta(FactorDtype::Int8, None, None), "an adapter's factors in int8");
    refused(delta(FactorDtype::Bf16, Some(vec![1.0; 2]), None), "an adapter's gain (DoRA)");
    refused(delta(FactorDtype::Bf16, None, Some(vec![1.0; 2])), "an adapter's bias");
    let table = EmbedDelta::new(memory, Dtype::Bf16, 1, 2, 2, &values[..2], &values[..2], 1.0);
    refused(table.err(), "an adapter's change of the embedding table");
    refused(KvCache::new(memory, Dtype::Bf16, 1, 1, 1, 16).err(), "a KV cache");
    refused(RopeTable::new(memory, 1, 2, &[1.0], 1.0).err(), "a rope table");
    refused(AttentionScratch::new(memory, 1, 1, 1, 16, 16).err(), "the memory of attention");
    refused(Vector::new(memory, [1.0]).err(), "a norm or a bias");
}

/// An operation without code for a GPU does nothing there: whoever reads results is told, once.
#[test]
fn gpu_operations_that_only_the_cpu_has_are_told_to_the_reader() {
    let Some(gpu) = gpu() else { return };
    let plane = || Plane::new(gpu.memory(), 2, 32).expect("memory");
    let mut out = Act::new(gpu.memory(), Dtype::Bf16, 2, 32).expect("memory");
    let (g, u, mut h) = (plane(), plane(), plane());
    glu(&gpu, Gate::Silu, &g, &u, 2, &mut out);
    let table = matrix(&gpu, 4, 32, &[0.5; 4 * 32]);
    embed(&gpu, &table, &[1, 2], 1.0, Segments::none(), &mut h);
    let said = h.read(&gpu, 2).expect_err("the first of the two").to_string();
    assert!(said.starts_with("glu is for the CPU only"), "{said}");
    assert_eq!(h.read(&gpu, 2).expect("nothing failed since"), [0.0; 64]);
}

/// What opening a GPU gives, for `emulated`; on a machine without a driver, what it must be.
#[test]
fn opening_a_gpu_gives_one_or_one_line() {
    let index = std::env::var("EMULATED_OPEN").map_or(0, |n| n.parse().expect("a number"));
    let line = match Device::open(DeviceChoice::Cuda(index), 1) {
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
