//! What a decode step costs besides arithmetic: nothing allocated, and as many ops for eight
//! adapters as for none.
//!
//! One test in a binary of its own: the counting allocator sees the whole process.

use polylora::adapters::composition::{Composition, Part};
use polylora::adapters::registry::Lease;
use polylora::checkpoint::Checkpoint;
use polylora::engine::EngineOptions;
use polylora::engine::{EngineHandle, EventStream, Request, Sampling, probe};
use polylora::metrics::Metrics;
use polylora::model::weights::Weights;
use polylora::model::{Model, ModelOptions};
use polylora::shape::Projection;
use polylora_kernels::Device;
use serde_json::json;
use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use support::adapters::{Recipe, write_adapter};
use support::{bank, tiny};

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

const STREAMS: usize = 16;
const PROMPT: usize = 8;
const TOKENS: usize = 3000;
const CONTEXT: usize = 4096;

fn start(weights: &Arc<Weights>, metrics: &Arc<Metrics>) -> EngineHandle {
    let kv_pages = STREAMS * CONTEXT / 16;
    let options = EngineOptions {
        rows_max: 64,
        logit_rows_max: 64,
        sequences_max: 32,
        quantum_tokens: 512,
        waiting_max: 64,
        waiting_tokens_max: 4096,
        kv_pages,
        context: CONTEXT,
        stream_events_max: TOKENS + 8,
        slots_max: 16,
        prefix_cache: true,
        prefix_share: false,
        background_share: 0.05,
        probe_prompts: vec![vec![5, 6, 7]],
    };
    let model = ModelOptions {
        threads: 2,
        rows_max: 64,
        logit_rows_max: 64,
        kv_pages: kv_pages + probe::pages_needed(1),
        kv_dtype: weights.dtype.into(),
        context: CONTEXT,
    };
    let model = Model::new(weights.clone(), Device::cpu(2), &model).expect("model");
    EngineHandle::start(model, weights.digest, options, metrics.clone()).expect("engine")
}

async fn lease(engine: &EngineHandle, weights: &Arc<Weights>, dir: &Path, rank: usize) -> Lease {
    write_adapter(dir, &weights.shape, &Recipe::new(rank, &Projection::ALL, rank as u64));
    bank::install(engine, weights, weights.dtype, dir).await
}

/// What steady decoding did in a while; allocations are the whole process's.
#[derive(Debug)]
struct Window {
    steps: u64,
    ops: u64,
    allocations: u64,
}

/// Decodes `STREAMS` sequences that nobody reads (their rings hold everything) and watches for a
/// while.
fn watch(engine: &EngineHandle, metrics: &Metrics, leases: &[Option<Composition>]) -> Window {
    let started = metrics.generation_tokens.get();
    let streams: Vec<EventStream> = (0..STREAMS)
        .map(|i| {
            let request = Request {
                prompt: (0..PROMPT as u32).map(|t| 3 + t + i as u32).collect(),
                sampling: Sampling { temperature: 0.8, seed: i as u64, ..Sampling::default() },
                tokens_max: TOKENS as u32,
                tokens_min: 0,
                stop_tokens: Vec::new(),
                lease: leases[i % leases.len()].clone(),
                tenant: String::new(),
                weight: 1,
            };
            engine.submit(request).expect("room")
        })
        .collect();
    let pause = || std::thread::sleep(Duration::from_millis(1));
    // Warm-up: every sequence decodes, and has for a page or two.
    while metrics.requests_running.get() < STREAMS as i64 {
        pause();
    }
    let all_running = metrics.generation_tokens.get();
    while metrics.generation_tokens.get() < all_running + 40 * STREAMS as u64 {
        pause();
    }
    let read = || {
        let allocations = ALLOCATIONS.load(Ordering::SeqCst);
        (metrics.steps.get(), metrics.generation_tokens.get(), metrics.ops.get(), allocations)
    };
    let before = read();
    while metrics.generation_tokens.get() < before.1 + 100 * STREAMS as u64 {
        pause();
    }
    let after = read();
    assert!(after.1 - started < (STREAMS * TOKENS) as u64, "they must still be decoding");
    drop(streams);
    while metrics.requests_running.get() > 0 {
        pause();
    }
    Window { steps: after.0 - before.0, ops: after.2 - before.2, allocations: after.3 - before.3 }
}

#[tokio::test]
async fn decode_step_allocates_nothing_and_its_ops_do_not_count_adapters() {
    let dir = tempfile::tempdir().expect("directory");
    let case = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                      "max_position_embeddings": CONTEXT});
    tiny::write(dir.path(), &case, tiny::Storage::Bf16, 1);
    let checkpoint = Checkpoint::open(dir.path()).expect("checkpoint");
    let weights = Weights::load(&checkpoint, None, &Device::cpu(2), &|_, _| ()).expect("weights");
    let (weights, metrics) = (Arc::new(weights), Arc::new(Metrics::new()));
    let engine = start(&weights, &metrics);
    let (mut adapters, mut leases) = (Vec::new(), Vec::new());
    for rank in [1, 2, 3, 4, 8, 16, 32, 64] {
        let path = dir.path().join(format!("rank-{rank}"));
        let lease = lease(&engine, &weights, &path, rank).await;
        adapters.push(lease.clone());
        leases.push(Some(Composition::from(lease)));
    }
    let sum = |parts: &[Lease]| {
        let part = |lease: &Lease| Part { lease: lease.clone(), weight: 0.25 };
        Some(Composition::new(parts.iter().map(part).collect()).expect("a sum"))
    };
    let sums: Vec<_> = (1..=8).map(|count| sum(&adapters[..count])).collect();
    let base = watch(&engine, &metrics, &[None]);
    let one = watch(&engine, &metrics, &leases[..1]);
    let eight = watch(&engine, &metrics, &leases);
    let mixed = watch(&engine, &metrics, &[&leases[..], &[None]].concat());
    let summed = watch(&engine, &metrics, &[&sums[..], &leases[..2], &[None]].concat());
    let ops = base.ops as f64 / base.steps as f64;
    for window in [&base, &one, &eight, &mixed, &summed] {
        eprintln!("{window:?}: {:.2} ops a step", window.ops as f64 / window.steps as f64);
        assert_eq!(window.allocations, 0, "{window:?}");
        // A window may begin and end between a step's counters, by one step at most.
        let apart = (window.ops as f64 / window.steps as f64 - ops).abs();
        assert!(apart <= ops / 50.0, "{window:?} has other ops than {ops} a step");
    }
}
