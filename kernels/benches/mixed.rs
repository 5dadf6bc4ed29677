//! What a step's linears cost with an adapter of rank 16 on each row, beside the base alone, op by
//! op: `cargo bench -p polylora-kernels --bench mixed`.
//!
//! Shapes of SmolLM2-135M; base and mixed steps take turns, and medians are told. Arguments: rows
//! (16 by default), `q8`/`q4` (bf16 by default), `int8` factors, `one` adapter for all rows, and
//! the name of an instruction set (the best by default).

use std::time::Instant;

use polylora_kernels::{
    Act, AdapterMix, Delta, Device, Dtype, FactorDtype, Isa, Linear, LoraScratch, Machine, Matrix,
    Memory, Plane, Resident, Residents, Segments, WeightDtype, linear,
};

const CPU: &Memory = &Memory::Cpu;

const LAYERS: usize = 30;
const RANK: usize = 16;
const HIDDEN: usize = 576;
const FFN: usize = 1536;
/// Name, inputs, and outputs of each site.
const OPS: [(&str, usize, &[usize]); 4] = [
    ("q, k, v", HIDDEN, &[HIDDEN, 192, 192]),
    ("o", HIDDEN, &[HIDDEN]),
    ("gate, up", HIDDEN, &[FFN, FFN]),
    ("down", FFN, &[HIDDEN]),
];
const ROUNDS: usize = 40;

/// A step's matrices, and what is multiplied by them.
struct Step {
    dev: Device,
    rows: usize,
    /// By layer, op and site.
    weights: Vec<Vec<Vec<Matrix>>>,
    /// Of deltas by layer, op and site; what each adapter is computed with.
    residents: Residents,
    mixes: Vec<AdapterMix>,
    delta_bytes: usize,
    x: [Act; 4],
    /// By op and site.
    y: Vec<Vec<Plane>>,
    scratch: LoraScratch,
}

fn by_shape<T>(mut make: impl FnMut(usize, usize) -> T) -> Vec<Vec<Vec<T>>> {
    let mut op = |&(_, inputs, outputs): &(&str, usize, &[usize])| {
        outputs.iter().map(|&outputs| make(inputs, outputs)).collect::<Vec<T>>()
    };
    (0..LAYERS).map(|_| OPS.iter().map(&mut op).collect()).collect()
}

fn values(count: usize, turn: usize) -> Vec<f32> {
    (0..count).map(|i| (i % turn) as f32 / turn as f32 - 0.5).collect()
}

impl Step {
    fn new(dev: Device, rows: usize, dtype: WeightDtype, factors: FactorDtype, all: usize) -> Step {
        let floats = if dtype == WeightDtype::Bf16 { Dtype::Bf16 } else { Dtype::F32 };
        let weights = by_shape(|inputs, outputs| {
            let rows = values(outputs * inputs, 37);
            Matrix::from_f32(CPU, dtype, outputs, inputs, &rows).expect("memory")
        });
        let delta = |inputs: usize, outputs: usize| {
            let (a, b) = (values(RANK * inputs, 31), values(RANK * outputs, 29));
            let made = Delta::new(CPU, factors, RANK, inputs, outputs, &a, &b, 1.0, None, None);
            made.expect("memory")
        };
        let (mut residents, mut delta_bytes) = (Residents::new(all), 0);
        let mixes = (0..all).map(|_| {
            let deltas = by_shape(delta).into_iter().flatten().flatten().map(Some).collect();
            let resident = Resident { deltas, ..Resident::default() };
            delta_bytes += resident.bytes();
            residents.install(resident).map_err(|_| "full").expect("a slot").into()
        });
        let mixes = mixes.collect();
        let x = OPS.map(|(_, inputs, _)| {
            let mut x = Act::with_bytes(CPU, floats, rows, inputs).expect("memory");
            (0..rows).for_each(|t| x.write(t, &values(inputs, 23 + t)).expect("a copy"));
            x
        });
        let plane = |&outputs: &usize| Plane::new(CPU, rows, outputs).expect("memory");
        Step {
            dev,
            rows,
            weights,
            residents,
            mixes,
            delta_bytes,
            x,
            y: OPS.map(|(_, _, sites)| sites.iter().map(plane).collect()).into(),
            scratch: LoraScratch::new(CPU, rows, RANK).expect("memory"),
        }
    }

    /// Seconds of each op, over all layers.
    fn run(&mut self, indptr: &[u32]) -> [f64; 4] {
        let (mut seconds, mut site) = ([0.0; 4], 0);
        let mixes = &self.mixes[..indptr.len() - 1];
        let segments = Segments { indptr, mixes, residents: &self.residents };
        for layer in 0..LAYERS {
            for (op, total) in seconds.iter_mut().enumerate() {
                let start = Instant::now();
                let weights = &self.weights[layer][op];
                let mut outs: Vec<Linear<'_>> = weights
                    .iter()
                    .zip(&mut self.y[op])
                    .enumerate()
                    .map(|(i, (weight, y))| Linear { weight, bias: None, site: site + i, y })
                    .collect();
                site += outs.len();
                let (dev, x) = (&self.dev, &self.x[op]);
                linear(dev, x, self.rows, &mut outs, segments, &mut self.scratch);
                *total += start.elapsed().as_secs_f64();
            }
        }
        seconds
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| words.iter().any(|w| w == word);
    let rows = words.iter().find_map(|w| w.parse().ok()).unwrap_or(16);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let isa = Isa::available().iter().find(|isa| has(isa.name()));
    let dev = match isa {
        Some(&isa) => Device::cpu_with(threads, isa).expect("available"),
        None => Device::cpu(threads),
    };
    let dtype = match (has("q8"), has("q4")) {
        (true, _) => WeightDtype::Int8,
        (_, true) => WeightDtype::Int4,
        _ => WeightDtype::Bf16,
    };
    let factors: FactorDtype = if has("int8") { FactorDtype::Int8 } else { Dtype::Bf16.into() };
    println!("{}; {}", dev.name(), words.join(" "));
    let all = if has("one") { 1 } else { rows };
    let mut step = Step::new(dev, rows, dtype, factors, all);
    let bytes = |step: &Step| {
        let base: usize = step.weights.iter().flatten().flatten().map(Matrix::bytes).sum();
        (base, base + step.delta_bytes)
    };
    let (base_bytes, mixed_bytes) = bytes(&step);
    let each = (rows / all) as u32;
    let indptr: Vec<u32> = (0..=all as u32).map(|g| g * each).collect();
    let machine = Machine::new(threads);
    println!("{}", machine.state());
    let mut times: Vec<[[f64; 4]; 2]> = Vec::new();
    for _ in 0..ROUNDS {
        times.push([step.run(&[0]), step.run(&indptr)]);
    }
    println!("{}", machine.state());
    println!("ms a step        base  mixed  base/mixed");
    let sum = |times: &[f64; 4]| times.iter().sum::<f64>();
    for (op, (name, ..)) in OPS.iter().enumerate() {
        let of = |which: usize| 1e3 * median(times.iter().map(|t| t[which][op]).collect());
        println!("{name:12} {:8.2} {:6.2}", of(0), of(1));
    }
    let of = |which: usize| 1e3 * median(times.iter().map(|t| sum(&t[which])).collect());
    let ratio = median(times.iter().map(|t| sum(&t[0]) / sum(&t[1])).collect());
    println!("all          {:8.2} {:6.2} {ratio:8.3}", of(0), of(1));
    let rate = |bytes: usize, ms: f64| bytes as f64 / ms / 1e6;
    let rates = [rate(base_bytes, of(0)), rate(mixed_bytes, of(1))];
    println!("GB/s         {:8.1} {:6.1}", rates[0], rates[1]);
}
