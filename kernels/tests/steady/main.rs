//! A step in its steady state: nothing allocated on any thread, op calls that do not count
//! adapters, and panics that fail the step and not the device. One test function, because the
//! allocation counter is the process's.

mod backward;

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use backward::Training;
use polylora_kernels::{
    Act, AdapterMix, AttentionScratch, Delta, Device, Dtype, Gate, KvCache, Linear, LoraScratch,
    Matrix, NormWeight, Plane, Resident, Residents, RopeStore, RopeTable, Rows, Segments, Slot,
    Vector, add_norm, add_norm_rows, argmax, attention, embed, glu, linear, rope_store,
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

fn delta_of(dev: &Device, rank: usize, width: usize) -> Delta {
    let (a, b) = (values(rank * HIDDEN), values(rank * width));
    let gain = Some(values(width));
    let memory = dev.memory();
    Delta::new(memory, Dtype::Bf16, rank, HIDDEN, width, &a, &b, 0.1, gain, None).expect("memory")
}

/// An adapter of all three sites, whose delta at one of them may be of another width.
fn adapter_of(dev: &Device, rank: usize, wrong: Option<usize>) -> Resident {
    let width = |site| if wrong == Some(site) { HIDDEN - 1 } else { HIDDEN };
    let deltas = (0..3).map(|site| Some(delta_of(dev, rank, width(site)))).collect();
    Resident { deltas, ..Resident::default() }
}

struct Step {
    table: Matrix,
    weight: Matrix,
    norm: Vector,
    rope: RopeTable,
    kv: KvCache,
    scratch: LoraScratch,
    parts: AttentionScratch,
    h: Plane,
    y: [Plane; 3],
    x: Act,
}

impl Step {
    fn new(dev: &Device) -> Step {
        Self::on(dev).expect("memory")
    }

    fn on(dev: &Device) -> Result<Step, polylora_kernels::Error> {
        let (memory, square) = (dev.memory(), values(HIDDEN * HIDDEN));
        let plane = || Plane::new(memory, ROWS, HIDDEN);
        Ok(Step {
            table: Matrix::from_f32(memory, Dtype::Bf16, HIDDEN, HIDDEN, &square)?,
            weight: Matrix::from_f32(memory, Dtype::Bf16, HIDDEN, HIDDEN, &square)?,
            norm: Vector::new(memory, values(HIDDEN))?,
            rope: RopeTable::new(memory, 64, DIM, &[1.0; DIM / 2], 1.0)?,
            kv: KvCache::new(memory, Dtype::Bf16, 1, ROWS, HEADS, DIM)?,
            scratch: LoraScratch::new(memory, ROWS, 64)?,
            parts: AttentionScratch::new(memory, dev.threads(), HEADS, HEADS, DIM, 4096)?,
            h: plane()?,
            y: [plane()?, plane()?, plane()?],
            x: Act::new(memory, Dtype::Bf16, ROWS, HIDDEN)?,
        })
    }

    /// Every op once or more.
    fn run(&mut self, dev: &Device, segments: Segments<'_>) {
        let index: [u32; ROWS] = std::array::from_fn(|i| i as u32);
        let indptr: [u32; ROWS + 1] = std::array::from_fn(|i| i as u32);
        let (positions, pages) = (&[3; ROWS], &index);
        let rows = Rows { positions, sequences: &index, pages, page_indptr: &indptr };
        let norm = NormWeight { base: &self.norm, norm: 0 };
        embed(dev, &self.table, &index, 1.0, segments, &mut self.h);
        add_norm(dev, &mut self.h, ROWS, None, norm, 1e-5, segments, &mut self.x);
        let [q, k, v] = &mut self.y;
        let bias = Some(&self.norm);
        let mut sites = 0..3;
        let mut outs = [&mut *q, k, v].map(|y| Linear {
            weight: &self.weight,
            bias,
            site: sites.next().expect("three sites"),
            y,
        });
        linear(dev, &self.x, ROWS, &mut outs, segments, &mut self.scratch);
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
    let mut residents = Residents::new(ROWS);
    let mixes: Vec<AdapterMix> = (0..ROWS)
        .map(|i| {
            let slot = residents.install(adapter_of(&dev, 1 + 2 * i, None));
            slot.map_err(|_| "full").expect("a slot").into()
        })
        .collect();
    let indptr: Vec<u32> = (0..=ROWS as u32).collect();
    let none = Segments::none();
    let all = Segments { indptr: &indptr, mixes: &mixes, residents: &residents };
    step.run(&dev, none);

    let steps = |count: usize, step: &mut Step| {
        for _ in 0..count {
            step.run(&dev, none);
            step.run(&dev, all);
        }
    };
    assert_no_allocation("steps", || steps(50, &mut step));
    let mut training = Training::new(&dev).expect("memory");
    training.run(&dev);
    assert_no_allocation("training steps", || (0..50).for_each(|_| training.run(&dev)));

    let ops = dev.op_calls();
    step.run(&dev, none);
    let base_only = dev.op_calls() - ops;
    step.run(&dev, all);
    assert_eq!(dev.op_calls() - ops - base_only, base_only, "ops do not depend on adapters");
    assert_eq!(base_only, 7);

    a_panic_fails_the_step_only(&dev, &mut step, &mut residents, &indptr, &mixes);
}

/// The test harness has a thread of its own that allocates now and then; an op's allocation would
/// be in every round.
fn assert_no_allocation(what: &str, mut round: impl FnMut()) {
    let rounds: Vec<usize> = (0..5)
        .map(|_| {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            round();
            ALLOCATIONS.load(Ordering::Relaxed) - before
        })
        .collect();
    assert!(rounds.contains(&0), "allocations in rounds of {what}: {rounds:?}");
}

fn a_panic_fails_the_step_only(
    dev: &Device,
    step: &mut Step,
    residents: &mut Residents,
    indptr: &[u32],
    mixes: &[AdapterMix],
) {
    let q = |step: &mut Step| step.y[0].read(dev, ROWS).expect("no op failed").to_vec();
    step.run(dev, Segments { indptr, mixes, residents });
    let before = q(step);
    // Of the second and third sites' deltas, pieces are planned already.
    for (site, segment) in [(0, 0), (0, 1), (1, 0), (2, 1)] {
        let slot = Slot(segment as u32);
        let kept = residents.remove(slot).expect("a resident");
        let wrong = adapter_of(dev, 1 + 2 * segment, Some(site));
        assert!(residents.install(wrong).is_ok_and(|taken| taken == slot));
        let segments = Segments { indptr, mixes, residents };
        let result = catch_unwind(AssertUnwindSafe(|| step.run(dev, segments)));
        let payload = result.expect_err("the step fails");
        let said = payload.downcast_ref::<String>().expect("a sentence");
        assert!(said.starts_with(&format!("site {site}, segment {segment}: a delta")), "{said}");
        residents.remove(slot);
        assert!(residents.install(kept).is_ok_and(|taken| taken == slot));
    }
    // And in the middle of a fork.
    let worst = AssertUnwindSafe(|| {
        let tokens = [HIDDEN as u32; ROWS];
        embed(dev, &step.table, &tokens, 1.0, Segments::none(), &mut step.h);
    });
    catch_unwind(worst).expect_err("a token outside the table fails the step");
    step.run(dev, Segments { indptr, mixes, residents });
    assert_eq!(q(step), before, "the device works on");
}
