//! A step in its steady state: nothing allocated on any thread, op calls that do not count
//! adapters, and panics that fail the step and not the device. One test function, because the
//! allocation counter is the process's.

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use polylora_kernels::{
    Act, AttentionScratch, Delta, Device, Dtype, Gate, KvCache, Linear, LoraScratch, Matrix,
    NormWeight, RopeStore, RopeTable, Rows, Segments, add_norm, add_norm_rows, argmax, attention,
    embed, glu, linear, rope_store,
};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands every call on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const ROWS: usize = 24;
const HIDDEN: usize = 64;
const HEADS: usize = 4;
const DIM: usize = 16;

/// Some numbers in -1..1.
fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect()
}

fn delta_of(rank: usize) -> Delta {
    let factor = values(rank * HIDDEN);
    let gain = Some(values(HIDDEN));
    Delta::new(Dtype::Bf16, rank, HIDDEN, HIDDEN, &factor, &factor, 0.1, gain, None)
}

struct Step {
    table: Matrix,
    weight: Matrix,
    norm: Vec<f32>,
    rope: RopeTable,
    kv: KvCache,
    scratch: LoraScratch,
    parts: AttentionScratch,
    h: Vec<f32>,
    y: [Vec<f32>; 3],
    x: Act,
}

impl Step {
    fn new(dev: &Device) -> Step {
        let square = values(HIDDEN * HIDDEN);
        Step {
            table: Matrix::from_f32(Dtype::Bf16, HIDDEN, HIDDEN, &square),
            weight: Matrix::from_f32(Dtype::Bf16, HIDDEN, HIDDEN, &square),
            norm: values(HIDDEN),
            rope: RopeTable::new(64, DIM, &[1.0; DIM / 2], 1.0),
            kv: KvCache::new(Dtype::Bf16, 1, ROWS, HEADS, DIM),
            scratch: LoraScratch::new(ROWS, 64),
            parts: AttentionScratch::new(dev.threads(), HEADS, HEADS, DIM, 4096),
            h: vec![0.0; ROWS * HIDDEN],
            y: [(); 3].map(|()| vec![0.0; ROWS * HIDDEN]),
            x: Act::new(Dtype::Bf16, ROWS, HIDDEN),
        }
    }

    /// Every op once or more.
    fn run<'d>(
        &mut self,
        dev: &Device,
        segments: Segments<'_>,
        delta: &dyn Fn(usize, usize) -> Option<&'d Delta>,
    ) {
        let index: [u32; ROWS] = std::array::from_fn(|i| i as u32);
        let indptr: [u32; ROWS + 1] = std::array::from_fn(|i| i as u32);
        let (positions, pages) = (&[3; ROWS], &index);
        let rows = Rows { positions, sequences: &index, pages, page_indptr: &indptr };
        let keep = |_| None;
        let norm = NormWeight { base: &self.norm, replaced: &keep };
        embed(dev, &self.table, &index, 1.0, segments, &|_, _| (), &mut self.h);
        add_norm(dev, &mut self.h, ROWS, None, norm, 1e-5, segments, &mut self.x);
        let [q, k, v] = &mut self.y;
        let bias = Some(self.norm.as_slice());
        let mut outs = [&mut *q, k, v].map(|y| Linear { weight: &self.weight, bias, y });
        linear(dev, &self.x, ROWS, &mut outs, segments, delta, &mut self.scratch);
        let args = RopeStore {
            q,
            k,
            v,
            heads: HEADS,
            kv_heads: HEADS,
            head_dim: DIM,
            q_norm: None,
            k_norm: None,
            eps: 1e-5,
            rope: &self.rope,
            layer: 0,
        };
        rope_store(dev, args, rows, segments, &mut self.kv);
        attention(dev, q, HEADS, &self.kv, 0, rows, 0.25, None, &mut self.x, &mut self.parts);
        glu(dev, Gate::Silu, k, v, ROWS, &mut self.x);
        add_norm_rows(dev, &self.h, &index[3..], None, norm, 1e-5, segments, &mut self.x);
        argmax(self.x.row(0));
    }
}

#[test]
fn a_warm_step_allocates_nothing_counts_the_same_ops_and_survives_a_panic() {
    let dev = Device::cpu(3);
    let mut step = Step::new(&dev);
    let deltas: Vec<Delta> = (0..ROWS).map(|i| delta_of(1 + 2 * i)).collect();
    let indptr: Vec<u32> = (0..=ROWS as u32).collect();
    let (none, all) = (Segments { indptr: &[0] }, Segments { indptr: &indptr });
    step.run(&dev, none, &|_, _| None);

    let steps = |count: usize, step: &mut Step| {
        for _ in 0..count {
            step.run(&dev, none, &|_, _| None);
            step.run(&dev, all, &|_, g| Some(&deltas[g]));
        }
    };
    // The test harness has a thread of its own that allocates now and then; an op's allocation
    // would be in every round.
    let rounds: Vec<usize> = (0..5)
        .map(|_| {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            steps(50, &mut step);
            ALLOCATIONS.load(Ordering::Relaxed) - before
        })
        .collect();
    assert!(rounds.contains(&0), "allocations in rounds of 100 steps: {rounds:?}");

    let ops = dev.op_calls();
    step.run(&dev, none, &|_, _| None);
    let base_only = dev.op_calls() - ops;
    step.run(&dev, all, &|_, g| Some(&deltas[g]));
    assert_eq!(dev.op_calls() - ops - base_only, base_only, "ops do not depend on adapters");
    assert_eq!(base_only, 7);

    a_panic_fails_the_step_only(&dev, &mut step, all, &deltas);
}

fn a_panic_fails_the_step_only(dev: &Device, step: &mut Step, all: Segments<'_>, deltas: &[Delta]) {
    step.run(dev, all, &|_, g| Some(&deltas[g]));
    let before = step.y[0].clone();
    // The second and third sites' deltas are looked up when pieces are planned already.
    for nth in [0, 1, ROWS, 2 * ROWS + 1] {
        let calls = AtomicUsize::new(0);
        let delta = |_: usize, g: usize| {
            let call = calls.fetch_add(1, Ordering::Relaxed);
            assert!(call < nth, "planted");
            Some(&deltas[g])
        };
        let result = catch_unwind(AssertUnwindSafe(|| step.run(dev, all, &delta)));
        let payload = result.expect_err("the step fails");
        assert_eq!(payload.downcast_ref::<&str>(), Some(&"planted"));
    }
    step.run(dev, all, &|_, g| Some(&deltas[g]));
    assert_eq!(step.y[0], before, "the device works on");
}
