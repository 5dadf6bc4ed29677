//! What a training job costs besides arithmetic: the memory it said, and none after warm-up.
//!
//! One test in a binary of its own: the counting allocator, and what is resident, are the whole
//! process's.

use polylora::checkpoint::{Checkpoint, source};
use polylora::model::weights::Weights;
use polylora::shape::Projection;
use polylora::train::data::Examples;
use polylora::train::{Advance, Decay, Init, Objective, OptimiserKind, TrainSpec, Trainer};
use polylora_kernels::Device;
use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const ROWS: usize = 256;

fn spec() -> TrainSpec {
    TrainSpec {
        rank: 8,
        alpha: 16.0,
        rslora: false,
        dora: false,
        targets: Projection::ALL.to_vec(),
        epochs: 3,
        batch: 4,
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
    }
}

/// Bytes of the process that are in memory.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("it is read");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    let number = line.split_whitespace().next().expect("a number");
    number.parse::<u64>().expect("a number") << 10
}

/// Eight examples of 40 tokens, half of them supervised.
fn examples() -> Arc<Examples> {
    let mut examples = Examples::default();
    for i in 0..8 {
        let ids: Vec<u32> = (0..40).map(|t| 100 + 7 * t + i).collect();
        let weights: Vec<f32> = (0..40).map(|t| f32::from(u8::from(t >= 20))).collect();
        examples.add(&ids, &weights);
    }
    Arc::new(examples)
}

/// Runs so many steps.
fn run(trainer: &mut Trainer, dev: &Device, steps: u64) {
    let mut reports = 0;
    while reports < steps {
        let advance = trainer.advance(dev).expect("an op");
        reports += u64::from(matches!(advance, Advance::Stepped(_)));
    }
}

#[test]
fn a_job_takes_what_it_said_and_nothing_after_its_first_epoch() {
    let located = source::locate(source::DEMO).expect("the demo model");
    let checkpoint = Checkpoint::open(&located.path).expect("it opens");
    let dev = Device::cpu(2);
    let weights = Weights::load(&checkpoint, None, &dev, &|_, _| ()).expect("weights");
    let (weights, data) = (Arc::new(weights), examples());
    let pairs = TrainSpec { objective: Objective::Dpo { beta: 0.1 }, ..spec() };
    let (lion, adafactor) = (OptimiserKind::Lion, OptimiserKind::Adafactor);
    // The allocator keeps what a small job gave back, which would count as the next one's: so small
    // ones are first and last.
    for spec in [
        TrainSpec { optimiser: adafactor, nested: true, ..spec() },
        spec(),
        TrainSpec { dora: true, ..spec() },
        TrainSpec { start: Some("ticket-json".into()), ..pairs.clone() },
        pairs,
        TrainSpec { optimiser: lion, freeze_a: true, ..spec() },
    ] {
        let case = format!("{spec:?}");
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let start = spec.start.as_ref().map(|name| root.join("adapters").join(name));
        let said = Trainer::bytes(&weights, &spec, data.longest(), ROWS, dev.threads());
        let before = resident();
        let (data, validation) = (data.clone(), Some(data.clone()));
        let mut trainer =
            Trainer::new(weights.clone(), &dev, spec, ROWS, data, validation, start.as_deref())
                .expect("a trainer");
        let epoch = trainer.steps() / 3;
        run(&mut trainer, &dev, epoch);
        let taken = resident() - before;
        let apart = taken as f64 / said as f64;
        eprintln!("{case}: said {said}, taken {taken}: {apart:.4}");
        assert!((0.98..1.02).contains(&apart), "said {said}, taken {taken}");
        let before = ALLOCATIONS.load(Ordering::SeqCst);
        run(&mut trainer, &dev, epoch);
        let allocations = ALLOCATIONS.load(Ordering::SeqCst) - before;
        assert_eq!(allocations, epoch, "a report a step is all");
        drop(trainer);
    }
}
