//! Tokens a second of training beside prompts, on the demo model: `cargo bench --bench train`.
//!
//! Each figure is the best of several steps, because other programs only ever slow one down.
//! Arguments: threads (all by default), and words that choose rows of the table: `stored`, `f32`,
//! `lora`, `dora`, `60`, `256`.

use polylora::adapters::bank::Bank;
use polylora::checkpoint::{Checkpoint, source};
use polylora::model::weights::Weights;
use polylora::model::{Batch, Model, ModelOptions};
use polylora::shape::Projection;
use polylora::train::data::Examples;
use polylora::train::{Advance, Decay, Init, Objective, OptimiserKind, TrainSpec, Trainer};
use polylora_kernels::{Device, KvCache, WeightDtype};
use std::sync::Arc;
use std::time::{Duration, Instant};

const ROWS: usize = 512;
const BATCH: usize = 8;
const STEPS: u32 = 5;

fn main() {
    let given = std::env::args().skip(1).find_map(|arg| arg.parse().ok().filter(|n| *n < 60));
    let threads =
        given.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let of = |words: &[&'static str]| -> Vec<&'static str> {
        let named = |word: &&str| std::env::args().skip(1).any(|arg| arg == *word);
        let chosen: Vec<_> = words.iter().copied().filter(named).collect();
        if chosen.is_empty() { words.to_vec() } else { chosen }
    };
    let dev = Device::cpu(threads);
    let located = source::locate(source::DEMO).expect("the demo model");
    let checkpoint = Checkpoint::open(&located.path).expect("it opens");
    println!("{}; {BATCH} examples a step, micro-batches of {ROWS} rows", dev.name());
    println!("weights  adapter  tokens   tokens/s  of prefill   longest op, 99th of 100, MiB");
    for storage in of(&["stored", "f32"]) {
        let dtype = (storage == "f32").then_some(WeightDtype::F32);
        let weights = Weights::load(&checkpoint, dtype, &dev, &|_, _| ()).expect("weights");
        let weights = Arc::new(weights);
        let prefill = prefill(&weights, threads);
        println!("{storage:7}  prefill of {ROWS}      {prefill:6.0}");
        for adapter in of(&["lora", "dora"]) {
            for length in of(&["60", "256"]) {
                let data = examples(length.parse().expect("a number"), weights.shape.vocab);
                let got = train(&weights, &dev, adapter == "dora", Arc::new(data));
                let [longest, usual] = [got.longest, got.usual].map(|d| d.as_secs_f64() * 1e3);
                let (rate, share) = (got.rate, got.rate / prefill);
                let mib = got.bytes as f64 / f64::from(1 << 20);
                print!("{storage:7}  {adapter:7}  8 x {length:3} {rate:8.0}  {share:9.2}  ");
                println!("{longest:9.1} ms {usual:6.1} ms {mib:6.0}");
            }
        }
    }
}

/// Tokens a second of one prompt, without an adapter.
fn prefill(weights: &Arc<Weights>, threads: usize) -> f64 {
    let options = ModelOptions {
        threads,
        rows_max: ROWS,
        logit_rows_max: 1,
        kv_pages: ROWS.div_ceil(KvCache::PAGE),
        kv_dtype: weights.dtype.into(),
        context: ROWS,
    };
    let mut model = Model::new(weights.clone(), Device::cpu(threads), &options).expect("a model");
    let batch = Batch {
        tokens: (0..ROWS as u32).map(|i| i * 37 % 40_000).collect(),
        positions: (0..ROWS as u32).collect(),
        sequences: vec![0; ROWS],
        pages: (0..options.kv_pages as u32).collect(),
        page_indptr: vec![0, options.kv_pages as u32],
        segment_indptr: vec![0],
        logit_rows: vec![ROWS as u32 - 1],
        logit_indptr: vec![0],
        ..Batch::default()
    };
    let bank = Bank::new(1);
    let mut best = Duration::MAX;
    for _ in 0..8 {
        let start = Instant::now();
        model.forward(&batch, &bank).expect("a step");
        best = best.min(start.elapsed());
    }
    ROWS as f64 / best.as_secs_f64()
}

/// About 60 tokens of which the last 39 % are supervised, or so many, all supervised.
fn examples(length: usize, vocab: usize) -> Examples {
    let mut state = length as u32;
    let mut id = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % vocab as u32
    };
    let mut examples = Examples::default();
    for i in 0..BATCH {
        let (length, share) =
            if length < 100 { (length - 10 + i * 3, 0.39) } else { (length, 1.0) };
        let ids: Vec<u32> = (0..length).map(|_| id()).collect();
        let from = length - (length as f64 * share) as usize;
        let weights: Vec<f32> = (0..length).map(|t| f32::from(u8::from(t >= from))).collect();
        examples.add(&ids, &weights);
    }
    examples
}

struct Got {
    rate: f64,
    longest: Duration,
    /// Of all ops, the 99th of a hundred.
    usual: Duration,
    bytes: u64,
}

fn train(weights: &Arc<Weights>, dev: &Device, dora: bool, data: Arc<Examples>) -> Got {
    let spec = TrainSpec {
        rank: 8,
        alpha: 16.0,
        rslora: false,
        dora,
        targets: Projection::ALL.to_vec(),
        epochs: STEPS + 1,
        batch: BATCH,
        seed: 1,
        lr: 1e-4,
        loraplus_ratio: 1.0,
        decay: Decay::Constant,
        warmup_ratio: 0.0,
        weight_decay: 0.0,
        max_grad_norm: 1.0,
        objective: Objective::Supervised,
        validate_every: 0,
        start: None,
        freeze_a: false,
        optimiser: OptimiserKind::AdamW,
        nested: false,
        init: Init::Random,
    };
    let bytes = Trainer::bytes(weights, &spec, data.longest(), ROWS, dev.threads());
    let mut trainer =
        Trainer::new(weights.clone(), dev, spec, ROWS, data, None, None).expect("a trainer");
    let (mut best, mut ops) = (f64::MAX, Vec::new());
    let (mut start, mut tokens) = (Instant::now(), 0);
    loop {
        let before = Instant::now();
        let advance = trainer.advance(dev).expect("an op");
        if trainer.step() > 0 {
            ops.push(before.elapsed());
        }
        match advance {
            Advance::Running => {}
            Advance::Stepped(report) => {
                if report.step > 1 {
                    best = best.min(start.elapsed().as_secs_f64());
                }
                (start, tokens) = (Instant::now(), report.tokens);
            }
            Advance::Done => break,
        }
    }
    ops.sort_unstable();
    let usual = ops[ops.len() * 99 / 100];
    Got { rate: tokens as f64 / best, longest: ops[ops.len() - 1], usual, bytes }
}
