//! What backward ops reach beside their forward ops, in turns: `cargo bench -p polylora-kernels
//! --bench backward`.
//!
//! Each figure is the best of several rounds, because other programs only ever slow a round down.
//! Weights are cycled through more memory than the caches hold. Arguments: threads (all by
//! default), an instruction set by its name (the best by default), and sections: linear, lora,
//! attention, head, dora.

use std::time::Instant;

use polylora_kernels::{
    Accumulate, Act, AttentionBackward, AttentionBackwardScratch, AttentionScratch, Device,
    DoraFactors, DoraScratch, Dtype, Factor, FactorGradient, Isa, KvCache, Linear, LinearBackward,
    LoraScratch, Matrix, Memory, Plane, Rows, Scored, Segments, WeightDtype, attention_backward,
    attention_lse, cross_entropy_backward, dora_norms, expand, linear, linear_backward, outer,
    shrink,
};

const CPU: &Memory = &Memory::Cpu;

/// Bytes a round reads before it comes back to the same weights.
const CYCLE_BYTES: usize = 64 << 20;
const HIDDEN: usize = 576;
const FFN: usize = 1536;
const VOCAB: usize = 49_152;

fn main() {
    let given = std::env::args().skip(1).find_map(|arg| arg.parse().ok());
    let threads =
        given.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let named = |isa: &&Isa| std::env::args().any(|arg| arg == isa.name());
    let isa = Isa::available().iter().rfind(named).or(Isa::available().last());
    let isa = *isa.expect("portable is always there");
    let dev = Device::cpu_with(threads, isa).expect("this CPU has it");
    println!("{}", dev.name());
    let is_section = |arg: &String| arg.starts_with(char::is_alphabetic) && arg != isa.name();
    let sections: Vec<String> = std::env::args().skip(1).filter(is_section).collect();
    let wanted = |name: &str| sections.is_empty() || sections.iter().any(|s| s == name);
    if wanted("linear") {
        println!("\ndX = dY·W [    O,     I]    T   forward   backward GFLOP/s   of forward");
        for dtype in [WeightDtype::Bf16, WeightDtype::F32, WeightDtype::Int8, WeightDtype::Int4Min]
        {
            for (outputs, inputs) in [(HIDDEN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN), (4096, 4096)]
            {
                for rows in [64, 256, 512] {
                    product(&dev, dtype, outputs, inputs, rows);
                }
            }
        }
    }
    if wanted("lora") {
        println!();
        for (width, rank) in [(HIDDEN, 8), (HIDDEN, 16), (FFN, 16), (4096, 64)] {
            factors(&dev, width, rank, 512);
        }
    }
    if wanted("attention") {
        println!();
        for (sequences, length) in [(8, 64), (8, 256), (1, 2048)] {
            attend(&dev, sequences, length);
        }
    }
    if wanted("head") {
        println!();
        for rows in [16, 64] {
            head(&dev, rows);
        }
    }
    if wanted("dora") {
        println!();
        for (outputs, inputs) in [(HIDDEN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN)] {
            norms(&dev, outputs, inputs, 16);
        }
    }
}

/// The best seconds of one call of each body, which take turns; they are told the call's number.
fn best<const N: usize>(calls: usize, mut bodies: [&mut dyn FnMut(usize); N]) -> [f64; N] {
    let (mut best, start, mut rounds) = ([f64::INFINITY; N], Instant::now(), 0);
    while rounds < 5 || start.elapsed().as_secs_f64() < 0.5 {
        for (best, body) in best.iter_mut().zip(&mut bodies) {
            let round = Instant::now();
            (0..calls).for_each(&mut **body);
            *best = best.min(round.elapsed().as_secs_f64() / calls as f64);
        }
        rounds += 1;
    }
    best
}

fn values(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i % 37) as f32 / 37.0 - 0.5).collect()
}

fn plane(rows: usize, width: usize) -> Plane {
    let mut plane = Plane::new(CPU, rows, width).expect("memory");
    plane.write(0, &values(rows * width)).expect("a copy");
    plane
}

fn act(dtype: Dtype, rows: usize, width: usize) -> Act {
    let mut act = Act::with_bytes(CPU, dtype, rows, width).expect("memory");
    act.write(0, &values(rows * width)).expect("a copy");
    act
}

fn product(dev: &Device, dtype: WeightDtype, outputs: usize, inputs: usize, rows: usize) {
    let weight = values(outputs * inputs);
    let bytes = (outputs * inputs) as f64 * dtype.bits() / 8.0;
    let count = (CYCLE_BYTES as f64 / bytes).ceil() as usize;
    let weights: Vec<Matrix> = (0..count)
        .map(|_| Matrix::from_f32(CPU, dtype, outputs, inputs, &weight).expect("memory"))
        .collect();
    let floats = if dtype == WeightDtype::Bf16 { Dtype::Bf16 } else { Dtype::F32 };
    let (x, dy) = (act(floats, rows, inputs), act(Dtype::Bf16, rows, outputs));
    let (mut y, mut dx) = (plane(rows, outputs), plane(rows, inputs));
    let mut scratch = LoraScratch::new(CPU, rows, 1).expect("memory");
    let calls = weights.len().min(8);
    let [forward, backward] = best(
        calls,
        [
            &mut |call| {
                let weight = &weights[call];
                let outs = &mut [Linear { weight, bias: None, site: 0, y: &mut y }];
                linear(dev, &x, rows, outs, Segments::none(), &mut scratch);
            },
            &mut |call| {
                let sites = [LinearBackward { weight: &weights[call], dy: &dy }];
                linear_backward(dev, &sites, rows, &mut dx, Accumulate::Overwrite);
            },
        ],
    );
    let rate = |seconds: f64| 2.0 * (rows * outputs * inputs) as f64 / seconds / 1e9;
    println!(
        "{:8} [{outputs:5}, {inputs:5}] {rows:4}  {:8.0}   {:8.0}            {:6.2}",
        format!("{dtype:?}"),
        rate(forward),
        rate(backward),
        forward / backward,
    );
}

/// One job's rows at a site of one width.
fn factors(dev: &Device, width: usize, rank: usize, rows: usize) {
    let (x, mut u, mut y) = (act(Dtype::F32, rows, width), plane(rows, rank), plane(rows, width));
    let (factor, mut gradient) = (values(rank * width), vec![0.0; rank * width]);
    let segments = [Factor { rows: 0..rows, rank, values: &factor, scale: 1.0 }];
    let given = plane(rows, rank);
    let seconds = best(
        8,
        [
            &mut |_| shrink(dev, &x, &segments, &mut u),
            &mut |_| expand(dev, &given, &segments, &mut y),
            &mut |_| {
                let of = FactorGradient { rows: 0..rows, rank, values: &mut gradient, scale: 1.0 };
                outer(dev, &given, &x, &mut [of]);
            },
        ],
    );
    let [shrink, expand, outer] =
        seconds.map(|seconds| 2.0 * (rows * rank * width) as f64 / seconds / 1e9);
    println!(
        "lora of {width:4}, rank {rank:2}, T {rows}: shrink {shrink:.0}, expand {expand:.0}, \
         outer {outer:.0} GFLOP/s"
    );
}

/// 9 heads of 64 in 3 groups, packed sequences of one length, over bf16 pages.
fn attend(dev: &Device, sequences: usize, length: usize) {
    let (rows, heads, kv_heads, dim) = (sequences * length, 9, 3, 64);
    let each = length.div_ceil(KvCache::PAGE);
    let pages: Vec<u32> = (0..(sequences * each) as u32).collect();
    let page_indptr: Vec<u32> = (0..=sequences).map(|s| (s * each) as u32).collect();
    let positions: Vec<u32> = (0..rows).map(|t| (t % length) as u32).collect();
    let owners: Vec<u32> = (0..rows).map(|t| (t / length) as u32).collect();
    let of = Rows {
        positions: &positions,
        sequences: &owners,
        pages: &pages,
        page_indptr: &page_indptr,
    };
    let kv = KvCache::new(CPU, Dtype::Bf16, 1, pages.len(), kv_heads, dim).expect("memory");
    let [q, d_out, mut dq] = [(); 3].map(|()| plane(rows, heads * dim));
    let (mut lse, mut dk) = (plane(rows, heads), plane(rows, kv_heads * dim));
    let mut out = act(Dtype::Bf16, rows, heads * dim);
    let mut dv = act(Dtype::Bf16, rows, kv_heads * dim);
    let parts = AttentionScratch::new(CPU, dev.threads(), heads, kv_heads, dim, length);
    let scratch = AttentionBackwardScratch::new(CPU, dev.threads(), rows, heads, dim);
    let (mut parts, mut scratch) = (parts.expect("memory"), scratch.expect("memory"));
    let mut seconds = [f64::INFINITY; 2];
    for _ in 0..20 {
        let start = Instant::now();
        attention_lse(dev, &q, heads, &kv, 0, of, 0.125, None, &mut out, &mut lse, &mut parts);
        seconds[0] = seconds[0].min(start.elapsed().as_secs_f64());
        let args = AttentionBackward {
            q: &q,
            heads,
            kv: &kv,
            layer: 0,
            rows: of,
            scale: 0.125,
            window: None,
            out: &out,
            lse: &lse,
            d_out: &d_out,
        };
        let start = Instant::now();
        attention_backward(dev, args, &mut dq, &mut dk, &mut dv, &mut scratch);
        seconds[1] = seconds[1].min(start.elapsed().as_secs_f64());
    }
    let seen: usize = positions.iter().map(|&p| p as usize + 1).sum();
    let products = 2.0 * (seen * heads * dim) as f64 / 1e9;
    println!(
        "attention, {sequences} x {length:4}: forward {:.2} ms, {:.0} GFLOP/s; backward {:.2} ms, \
         {:.0} GFLOP/s",
        1e3 * seconds[0],
        2.0 * products / seconds[0],
        1e3 * seconds[1],
        5.0 * products / seconds[1],
    );
}

/// A chunk of supervised rows through a bf16 head.
fn head(dev: &Device, rows: usize) {
    let weight = Matrix::from_f32(CPU, Dtype::Bf16, VOCAB, HIDDEN, &values(VOCAB * HIDDEN));
    let (weight, x) = (weight.expect("memory"), act(Dtype::Bf16, rows, HIDDEN));
    let (mut logits, mut dh) = (plane(rows, VOCAB), plane(rows, HIDDEN));
    let (given, mut dlogits) = (plane(rows, VOCAB), act(Dtype::Bf16, rows, VOCAB));
    let dy = act(Dtype::Bf16, rows, VOCAB);
    let mut scratch = LoraScratch::new(CPU, rows, 1).expect("memory");
    let (targets, k) = (vec![7; rows], vec![0.1; rows]);
    let mut scored = vec![Scored::default(); rows];
    let [forward, loss, backward] = best(
        1,
        [
            &mut |_| {
                let outs = &mut [Linear { weight: &weight, bias: None, site: 0, y: &mut logits }];
                linear(dev, &x, rows, outs, Segments::none(), &mut scratch);
            },
            &mut |_| {
                cross_entropy_backward(dev, &given, &targets, &k, &mut dlogits, &mut scored);
            },
            &mut |_| {
                let sites = [LinearBackward { weight: &weight, dy: &dy }];
                linear_backward(dev, &sites, rows, &mut dh, Accumulate::Overwrite);
            },
        ],
    )
    .map(|seconds| 1e3 * seconds);
    println!(
        "head of {VOCAB}, {rows} rows: logits {forward:.2} ms, cross-entropy {loss:.2} ms, dh \
         {backward:.2} ms"
    );
}

fn norms(dev: &Device, outputs: usize, inputs: usize, rank: usize) {
    let weight = Matrix::from_f32(CPU, Dtype::Bf16, outputs, inputs, &values(outputs * inputs));
    let weight = weight.expect("memory");
    let (a, b) = (values(rank * inputs), values(rank * outputs));
    let (squares, mut norms) = (vec![1.0; outputs], vec![0.0; outputs]);
    let mut scratch = DoraScratch::new(CPU, dev.threads(), rank).expect("memory");
    let [seconds] = best(
        8,
        [&mut |_| {
            let factors = DoraFactors { rank, a: &a, b: &b, scale: 0.5 };
            dora_norms(dev, &weight, &squares, factors, &mut norms, &mut scratch);
        }],
    );
    println!("dora norms of [{outputs}, {inputs}], rank {rank}: {:.0} us", 1e6 * seconds);
}
