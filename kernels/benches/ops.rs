//! What the matmuls reach beside what the machine can do, measured in the same run: `cargo bench -p
//! polylora-kernels`.
//!
//! Ceilings: f32, bf16 and int8 products of registers alone, and a sum over 1 GiB. Each figure is
//! the best of several rounds, because other programs only ever slow a round down. Weights are
//! cycled through more memory than the caches hold. Arguments: threads (all by default), an
//! instruction set by its name (the best by default), and sections: bf16, f32, int8, int4, fork,
//! adapters, attention. With one thread the clock is the thread's CPU time, which is of use on a
//! busy machine too.

use std::hint::black_box;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use polylora_kernels::{
    Act, AdapterMix, AttentionScratch, Delta, Device, Dtype, Isa, KvCache, Linear, LoraScratch,
    Matrix, Memory, Plane, Resident, Residents, Rows, Segments, WeightDtype, attention, linear,
};

const CPU: &Memory = &Memory::Cpu;

/// Bytes a round reads before it comes back to the same weights.
const CYCLE_BYTES: usize = 256 << 20;

fn main() {
    let given = std::env::args().skip(1).find_map(|arg| arg.parse().ok());
    let threads =
        given.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    ALONE.store(threads == 1, Ordering::Relaxed);
    let named = |isa: &&Isa| std::env::args().any(|arg| arg == isa.name());
    let isa = Isa::available().iter().rfind(named).or(Isa::available().last());
    let isa = *isa.expect("portable is always there");
    let dev = Device::cpu_with(threads, isa).expect("this CPU has it");
    println!("{}", dev.name());
    let ceilings = Ceilings::measure(threads);
    println!(
        "ceilings: read {:.1} GB/s, f32 {:.0} GFLOP/s, bf16 {:.0} GFLOP/s, int8 {:.0} GOP/s",
        ceilings.read, ceilings.f32, ceilings.bf16, ceilings.int8
    );
    let is_section = |arg: &String| arg.starts_with(char::is_alphabetic) && arg != isa.name();
    let sections: Vec<String> = std::env::args().skip(1).filter(is_section).collect();
    let wanted = |name: &str| sections.is_empty() || sections.iter().any(|s| s == name);
    for (name, dtype, peak) in [
        ("bf16", WeightDtype::Bf16, ceilings.bf16),
        ("f32", WeightDtype::F32, ceilings.f32),
        ("int8", WeightDtype::Int8, ceilings.int8),
        ("int4", WeightDtype::Int4, ceilings.int8),
        ("int4", WeightDtype::Int4Min, ceilings.int8),
    ] {
        if !wanted(name) {
            continue;
        }
        println!(
            "\n{dtype:?}\nmatmul {name:4} [    O,     I]    T     GB/s  of read   GFLOP/s  of peak"
        );
        for (outputs, inputs) in [(1536, 576), (576, 1536), (49152, 576), (4096, 4096)] {
            let weights = weights(dtype, outputs, inputs);
            for rows in [1, 4, 8, 12, 16, 32, 64, 512] {
                matmul(&dev, &weights, rows, peak, ceilings.read);
            }
        }
    }
    if wanted("fork") {
        fork(&dev);
    }
    if wanted("adapters") {
        println!();
        for (outputs, inputs) in [(1536, 576), (4096, 4096)] {
            for rows in [1, 8, 16] {
                adapters(&dev, outputs, inputs, rows);
            }
        }
    }
    if wanted("attention") {
        println!();
        for (rows, history) in
            [(1, 1024), (1, 8191), (4, 8191), (16, 256), (16, 1024), (512, 0), (512, 2048)]
        {
            pages(&dev, rows, history);
        }
    }
}

/// Set where only the calling thread works.
static ALONE: AtomicBool = AtomicBool::new(false);

/// The clock: wall time, or the thread's CPU time where it works alone and the system tells.
fn seconds() -> f64 {
    static START: OnceLock<Instant> = OnceLock::new();
    #[cfg(target_os = "linux")]
    if ALONE.load(Ordering::Relaxed) {
        #[repr(C)]
        struct Time {
            seconds: i64,
            nanos: i64,
        }
        unsafe extern "C" {
            fn clock_gettime(clock: i32, time: *mut Time) -> i32;
        }
        const THREAD_CPU: i32 = 3;
        let mut time = Time { seconds: 0, nanos: 0 };
        // SAFETY: the C library's function, with a struct of its layout on 64-bit Linux.
        unsafe { clock_gettime(THREAD_CPU, &mut time) };
        return time.seconds as f64 + 1e-9 * time.nanos as f64;
    }
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}

/// The best time of one call over rounds of `body(call)`.
fn best(calls: usize, mut body: impl FnMut(usize)) -> f64 {
    let mut best = f64::INFINITY;
    let start = seconds();
    let mut rounds = 0;
    while rounds < 3 || seconds() - start < 0.4 {
        let round = seconds();
        (0..calls).for_each(&mut body);
        best = best.min((seconds() - round) / calls as f64);
        rounds += 1;
    }
    best
}

fn weights(dtype: WeightDtype, outputs: usize, inputs: usize) -> Vec<Matrix> {
    let rows: Vec<f32> = (0..outputs * inputs).map(|i| (i % 37) as f32 / 37.0 - 0.5).collect();
    let bytes = (outputs * inputs) as f64 * dtype.bits() / 8.0;
    let bytes = bytes as usize;
    (0..CYCLE_BYTES.div_ceil(bytes))
        .map(|_| Matrix::from_f32(CPU, dtype, outputs, inputs, &rows).expect("memory"))
        .collect()
}

fn activation(dtype: Dtype, rows: usize, width: usize) -> Act {
    let mut x = Act::with_bytes(CPU, dtype, rows, width).expect("memory");
    for t in 0..rows {
        let row: Vec<f32> = (0..width).map(|i| ((t + i) % 23) as f32 / 23.0 - 0.5).collect();
        x.write(t, &row).expect("a copy");
    }
    x
}

fn plane(rows: usize, width: usize) -> Plane {
    Plane::new(CPU, rows, width).expect("memory")
}

fn scratch(rows: usize, rank: usize) -> LoraScratch {
    LoraScratch::new(CPU, rows, rank).expect("memory")
}

fn matmul(dev: &Device, weights: &[Matrix], rows: usize, peak: f64, read: f64) {
    let (outputs, inputs) = (weights[0].outputs(), weights[0].inputs());
    let floats = if weights[0].dtype() == WeightDtype::Bf16 { Dtype::Bf16 } else { Dtype::F32 };
    let x = activation(floats, rows, inputs);
    let (mut y, mut scratch) = (plane(rows, outputs), scratch(rows, 1));
    let calls = weights.len().min(if rows > 64 { 8 } else { usize::MAX });
    let seconds = best(calls, |call| {
        let weight = &weights[call];
        let outs = &mut [Linear { weight, bias: None, site: 0, y: &mut y }];
        linear(dev, &x, rows, outs, Segments::none(), &mut scratch);
    });
    let bytes = weights[0].bytes() as f64 / seconds / 1e9;
    let operations = 2.0 * (rows * outputs * inputs) as f64 / seconds / 1e9;
    println!(
        "            [{outputs:5}, {inputs:5}] {rows:4} {bytes:8.1} {:7.0}% \
         {operations:9.0} {:7.0}%",
        100.0 * bytes / read,
        100.0 * operations / peak
    );
}

/// A product so small that its time is that of sharing it out.
fn fork(dev: &Device) {
    let outputs = 64 * dev.threads();
    let weight = Matrix::from_f32(CPU, Dtype::F32, outputs, 1, &vec![0.5; outputs]);
    let (weight, x) = (weight.expect("memory"), activation(Dtype::F32, 1, 1));
    let (mut y, mut scratch) = (plane(1, outputs), scratch(1, 1));
    let seconds = best(1000, |_| {
        let outs = &mut [Linear { weight: &weight, bias: None, site: 0, y: &mut y }];
        linear(dev, &x, 1, outs, Segments::none(), &mut scratch);
    });
    println!("\nfork: {:.2} us", 1e6 * seconds);
}

/// One row each of `rows` distinct rank-16 adapters, beside the base alone.
fn adapters(dev: &Device, outputs: usize, inputs: usize, rows: usize) {
    const RANK: usize = 16;
    let mut weights = weights(WeightDtype::Bf16, outputs, inputs);
    weights.truncate(16);
    let a: Vec<f32> = (0..RANK * inputs).map(|i| (i % 31) as f32 / 31.0).collect();
    let b: Vec<f32> = (0..RANK * outputs).map(|i| (i % 29) as f32 / 29.0).collect();
    let one = || {
        let made = Delta::new(CPU, Dtype::Bf16, RANK, inputs, outputs, &a, &b, 1.0, None, None);
        made.expect("memory")
    };
    // A site for each of the weights.
    let mut residents = Residents::new(rows);
    let mixes: Vec<AdapterMix> = (0..rows)
        .map(|_| {
            let deltas = weights.iter().map(|_| Some(one())).collect();
            let slot = residents.install(Resident { deltas, ..Resident::default() });
            slot.map_err(|_| "full").expect("a slot").into()
        })
        .collect();
    let x = activation(Dtype::Bf16, rows, inputs);
    let (mut y, mut scratch) = (plane(rows, outputs), scratch(rows, RANK));
    let indptr: Vec<u32> = (0..=rows as u32).collect();
    let mut time = |indptr: &[u32]| {
        let segments =
            Segments { indptr, mixes: &mixes[..indptr.len() - 1], residents: &residents };
        best(weights.len(), |call| {
            let weight = &weights[call];
            let outs = &mut [Linear { weight, bias: None, site: call, y: &mut y }];
            linear(dev, &x, rows, outs, segments, &mut scratch);
        })
    };
    let base = time(&[0]);
    let same = time(&[0, rows as u32]);
    let distinct = time(&indptr);
    let extra = (one().bytes() * rows) as f64;
    println!(
        "linear bf16 [{outputs}, {inputs}] T {rows:2}: base {:.1} us, \
         one rank-16 adapter {:.1} us, {rows} distinct {:.1} us \
         ({:.0}% of the base's bytes, {:.1} GB/s in all)",
        1e6 * base,
        1e6 * same,
        1e6 * distinct,
        100.0 * extra / weights[0].bytes() as f64,
        (extra + weights[0].bytes() as f64) / distinct / 1e9
    );
}

/// 9 heads of 64 in 3 groups: `rows` sequences of one row if few, one sequence's chunk if many.
fn pages(dev: &Device, rows: usize, history: usize) {
    let chunk = rows > 64;
    let sequences = if chunk { 1 } else { rows };
    let length = history + if chunk { rows } else { 1 };
    let each = length.div_ceil(KvCache::PAGE);
    let layers =
        (CYCLE_BYTES / KvCache::page_bytes(Dtype::Bf16, 1, 3, 64) / each / sequences).clamp(1, 30);
    let kv = KvCache::new(CPU, Dtype::Bf16, layers, sequences * each, 3, 64).expect("memory");
    let of = |s: usize| s * each;
    let (pages, page_indptr): (Vec<u32>, Vec<u32>) =
        ((0..(sequences * each) as u32).collect(), (0..=sequences).map(|s| of(s) as u32).collect());
    let position = |t: usize| (history + if chunk { t } else { 0 }) as u32;
    let positions: Vec<u32> = (0..rows).map(position).collect();
    let owners: Vec<u32> = (0..rows).map(|t| if chunk { 0 } else { t as u32 }).collect();
    let rows_of = Rows {
        positions: &positions,
        sequences: &owners,
        pages: &pages,
        page_indptr: &page_indptr,
    };
    let mut q = plane(rows, 9 * 64);
    q.write(0, &vec![0.1; rows * 9 * 64]).expect("a copy");
    let scratch = AttentionScratch::new(CPU, dev.threads(), 9, 3, 64, length);
    let mut scratch = scratch.expect("memory");
    let mut out = Act::new(CPU, Dtype::Bf16, rows, 9 * 64).expect("memory");
    let seconds = best(layers, |layer| {
        attention(dev, &q, 9, &kv, layer, rows_of, 0.125, None, &mut out, &mut scratch);
    });
    let seen: usize = positions.iter().map(|&p| p as usize + 1).sum();
    println!(
        "attention bf16, T {rows:3}, history {history:4}: {:.1} us, \
         {:.1} GB/s of pages, {:.0} GFLOP/s",
        1e6 * seconds,
        (sequences * each * KvCache::page_bytes(Dtype::Bf16, 1, 3, 64)) as f64 / seconds / 1e9,
        4.0 * (seen * 9 * 64) as f64 / seconds / 1e9
    );
}

struct Ceilings {
    read: f64,
    f32: f64,
    bf16: f64,
    int8: f64,
}

/// `count` words in huge pages where the system has them, as the ops' buffers are.
fn huge(count: usize) -> Vec<u64> {
    const PAGE: usize = 2 << 20;
    let mut words: Vec<u64> = Vec::with_capacity(count + PAGE / 8);
    #[cfg(target_os = "linux")]
    {
        unsafe extern "C" {
            fn madvise(start: *mut u8, bytes: usize, advice: i32) -> i32;
        }
        let spare = words.spare_capacity_mut().as_mut_ptr().cast::<u8>();
        let start = spare.wrapping_add(spare.align_offset(PAGE));
        // SAFETY: advice on untouched memory that the vector owns.
        unsafe { madvise(start, 8 * count / PAGE * PAGE, 14) };
    }
    words.resize(count, 1);
    words
}

impl Ceilings {
    fn measure(threads: usize) -> Ceilings {
        let words = huge(1 << 27);
        let share = words.len() / threads;
        let read = together(threads, |i| {
            // Four streams, as a core with several requests in flight reads.
            let part = &words[i * share..(i + 1) * share];
            black_box(part.chunks_exact(64).fold([0u64; 64], |mut sums, line| {
                sums.iter_mut().zip(line).for_each(|(sum, word)| *sum += word);
                sums
            }));
        });
        const ROUNDS: usize = 20_000_000;
        let of = |of| products(threads, ROUNDS, of);
        let read = (8 * share * threads) as f64 / read / 1e9;
        Ceilings { read, f32: of(Of::F32), bf16: of(Of::Bf16), int8: of(Of::Int8) }
    }
}

/// Seconds of the best of five rounds in which every thread runs `body`.
fn together(threads: usize, body: impl Fn(usize) + Sync) -> f64 {
    (0..5)
        .map(|_| {
            let start = seconds();
            std::thread::scope(|scope| {
                for i in 1..threads {
                    let body = &body;
                    scope.spawn(move || body(i));
                }
                body(0);
            });
            seconds() - start
        })
        .fold(f64::INFINITY, f64::min)
}

/// What is multiplied.
#[derive(Clone, Copy, PartialEq)]
enum Of {
    F32,
    Bf16,
    Int8,
}

/// What there are registers for in AVX2.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    pub(super) const CHAINS: usize = 12;

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn fma(rounds: usize) -> f32 {
        let mut acc = [_mm256_set1_ps(black_box(0.0)); CHAINS];
        let one = _mm256_set1_ps(black_box(0.5));
        for _ in 0..rounds / 2 {
            acc.iter_mut().for_each(|sum| *sum = _mm256_fmadd_ps(*sum, one, one));
        }
        acc.iter().map(|&sum| _mm256_cvtss_f32(sum)).sum()
    }
    #[target_feature(enable = "avx2")]
    pub(super) fn bytes(rounds: usize) -> f32 {
        let mut acc = [_mm256_set1_epi32(black_box(0)); CHAINS];
        let one = _mm256_set1_epi32(black_box(0));
        for _ in 0..rounds / 2 {
            acc.iter_mut().for_each(|sum| {
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(*sum, one));
            });
        }
        acc.iter().map(|&sum| _mm256_extract_epi32::<0>(sum) as f32).sum()
    }
}

/// GFLOP/s of multiply-adds between registers: the instruction the matmuls of that type use, or 0
/// where it is not known.
#[cfg(target_arch = "x86_64")]
fn products(threads: usize, rounds: usize, of: Of) -> f64 {
    use std::arch::x86_64::*;
    const CHAINS: usize = 16;

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn dot(rounds: usize) -> f32 {
        let mut acc = [_mm512_set1_ps(black_box(0.0)); CHAINS];
        let one = _mm512_set1_epi32(black_box(0));
        // SAFETY: the same 64 bytes.
        let pair = unsafe { std::mem::transmute::<__m512i, __m512bh>(one) };
        for _ in 0..rounds / 2 {
            acc.iter_mut().for_each(|sum| *sum = _mm512_dpbf16_ps(*sum, pair, pair));
        }
        acc.iter().map(|&sum| _mm512_reduce_add_ps(sum)).sum()
    }
    #[target_feature(enable = "avx512f")]
    fn fma(rounds: usize) -> f32 {
        let mut acc = [_mm512_set1_ps(black_box(0.0)); CHAINS];
        let one = _mm512_set1_ps(black_box(0.5));
        for _ in 0..rounds / 2 {
            acc.iter_mut().for_each(|sum| *sum = _mm512_fmadd_ps(*sum, one, one));
        }
        acc.iter().map(|&sum| _mm512_reduce_add_ps(sum)).sum()
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn bytes(rounds: usize) -> f32 {
        let mut acc = [_mm512_set1_epi32(black_box(0)); CHAINS];
        let one = _mm512_set1_epi32(black_box(0));
        for _ in 0..rounds / 2 {
            acc.iter_mut().for_each(|sum| *sum = _mm512_dpbusd_epi32(*sum, one, one));
        }
        acc.iter().map(|&sum| _mm512_reduce_add_epi32(sum) as f32).sum()
    }

    let wide = is_x86_feature_detected!("avx512f");
    let known = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let bf16 = wide && is_x86_feature_detected!("avx512bf16");
    let vnni = wide && is_x86_feature_detected!("avx512vnni");
    // Where bf16 is widened, its products are of f32.
    let (body, each): (unsafe fn(usize) -> f32, usize) = match of {
        Of::Bf16 if bf16 => (dot, 64 * CHAINS),
        Of::F32 | Of::Bf16 if wide => (fma, 32 * CHAINS),
        Of::F32 | Of::Bf16 => (avx2::fma, 16 * avx2::CHAINS),
        Of::Int8 if vnni => (bytes, 128 * CHAINS),
        Of::Int8 => (avx2::bytes, 32 * avx2::CHAINS),
    };
    if !known {
        return 0.0;
    }
    let seconds = together(threads, |_| {
        // SAFETY: detected above.
        black_box(unsafe { body(rounds) });
    });
    (threads * rounds / 2 * each) as f64 / seconds / 1e9
}

#[cfg(not(target_arch = "x86_64"))]
fn products(_: usize, _: usize, _: Of) -> f64 {
    0.0
}
