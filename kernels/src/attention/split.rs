//! Parts of a long context, computed apart and joined in order.
//!
//! Owns the arithmetic of joining and the memory where parts wait for it. Never decides which
//! thread computes a part: the bits are the same whoever does.
//!
//! A part is (V, m, z): V `[D]` = Σ 2^(s − m)·v, z = Σ 2^(s − m), m the largest score s, which are
//! in units of ln 2. Two are one: with M = max(m₁, m₂), V = V₁·2^(m₁ − M) + V₂·2^(m₂ − M), z alike.

use std::ops::Range;

use crate::Error;
use crate::attention::job::{Job, PART};
use crate::buffer::Buffer;
use crate::device::Memory;
use crate::kv::Layout;
use crate::simd::{GROUP, Kernel, LANES, Simd};

/// Tasks of a (row, kv head) each from which on there are enough without cutting contexts.
const TASKS_PER_THREAD: usize = 8;

/// Memory of [`super::attention`], taken once: where the parts of a step's few long contexts wait
/// to be joined.
pub struct AttentionScratch {
    /// `[rows_max, parts_max, N, D padded to 16, and m, z in 16 more]`
    values: Buffer<f32>,
    rows_max: usize,
    parts_max: usize,
}

impl AttentionScratch {
    /// For contexts of at most `positions_max` tokens on a device of `threads`.
    ///
    /// # Errors
    /// On a GPU.
    pub fn new(
        memory: &Memory,
        threads: usize,
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        positions_max: usize,
    ) -> Result<AttentionScratch, Error> {
        memory.only_cpu("the memory of attention")?;
        let (rows_max, parts_max) = sizes(threads, kv_heads, positions_max);
        let values = Buffer::zeroed(rows_max * parts_max * heads * slot_len(head_dim));
        Ok(AttentionScratch { values, rows_max, parts_max })
    }

    /// Bytes that [`AttentionScratch::new`] takes.
    pub fn bytes(
        threads: usize,
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        positions_max: usize,
    ) -> usize {
        let (rows_max, parts_max) = sizes(threads, kv_heads, positions_max);
        rows_max * parts_max * heads * slot_len(head_dim) * size_of::<f32>()
    }

    /// Where the parts of `rows` contexts of up to `parts` parts are to wait; `None` where cutting
    /// them brings nothing.
    pub(super) fn slots(&mut self, rows: usize, parts: usize, layout: Layout) -> Option<Slots> {
        let worth = parts > 1 && rows <= self.rows_max && parts <= self.parts_max;
        worth.then(|| Slots {
            start: self.values.as_mut_ptr(),
            parts,
            len: slot_len(layout.head_dim),
        })
    }
}

/// Rows and parts there is room for: none where one thread does it all, or a part is the whole.
fn sizes(threads: usize, kv_heads: usize, positions_max: usize) -> (usize, usize) {
    let parts_max = positions_max.div_ceil(PART);
    if threads == 1 || parts_max < 2 {
        return (0, 0);
    }
    ((TASKS_PER_THREAD * threads - 1) / kv_heads, parts_max)
}

fn slot_len(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES) + LANES
}

/// `[rows, parts, N]` slots.
#[derive(Clone, Copy)]
pub(super) struct Slots {
    start: *mut f32,
    pub(super) parts: usize,
    len: usize,
}

// SAFETY: a slot is written by the task that owns its (row, part, head) and read after the fork.
unsafe impl Send for Slots {}
unsafe impl Sync for Slots {}

impl Slots {
    #[inline(always)]
    pub(super) fn at(self, row: usize, part: usize, heads: usize, head: usize) -> *mut f32 {
        self.start.wrapping_add(((row * self.parts + part) * heads + head) * self.len)
    }
}

/// What some positions give: V, m, z.
#[derive(Clone, Copy)]
pub(super) struct Partial {
    pub(super) values: *mut f32,
    pub(super) max: f32,
    pub(super) sum: f32,
}

impl Partial {
    /// Nothing yet; V is not looked at before something is added.
    pub(super) fn none(values: *mut f32) -> Partial {
        Partial { values, max: f32::NEG_INFINITY, sum: 0.0 }
    }

    /// Adds what the following positions give.
    ///
    /// # Safety
    /// Both V have `stride` values.
    #[inline(always)]
    pub(super) unsafe fn add<S: Simd>(&mut self, next: Partial, stride: usize) {
        if next.sum == 0.0 {
            return;
        }
        if self.sum == 0.0 {
            std::ptr::copy_nonoverlapping(next.values, self.values, stride);
            (self.max, self.sum) = (next.max, next.sum);
            return;
        }
        let max = self.max.max(next.max);
        let [own, its] = [self.max, next.max].map(|m| S::exp2(S::splat(m - max)));
        for d in (0..stride).step_by(LANES) {
            let v = S::mul(S::load(self.values.add(d)), own);
            S::store(self.values.add(d), S::fma(S::load(next.values.add(d)), its, v));
        }
        let z = S::fma(S::splat(next.sum), its, S::mul(S::splat(self.sum), own));
        let mut lanes = [0.0; LANES];
        S::store(lanes.as_mut_ptr(), z);
        (self.max, self.sum) = (max, lanes[0]);
    }

    /// Writes it to a slot.
    #[inline(always)]
    pub(super) unsafe fn store(&self, slot: *mut f32, stride: usize) {
        std::ptr::copy_nonoverlapping(self.values, slot, stride);
        *slot.add(stride) = self.max;
        *slot.add(stride + 1) = self.sum;
    }

    #[inline(always)]
    unsafe fn load(slot: *mut f32, stride: usize) -> Partial {
        Partial { values: slot, max: *slot.add(stride), sum: *slot.add(stride + 1) }
    }

    /// out = V / z, lse = m + ln z.
    #[inline(always)]
    pub(super) unsafe fn finish<S: Simd>(&self, job: &Job<'_>, row: usize, head: usize) {
        let dim = job.layout.head_dim;
        let factor = S::splat(1.0 / self.sum);
        for d in (0..dim).step_by(LANES) {
            let n = (dim - d).min(LANES);
            let values = S::load(self.values.add(d));
            job.out.store::<S>(row, head * dim + d, n, S::mul(values, factor));
        }
        if !job.lse.get().is_null() {
            let log = f64::from(self.max) + f64::from(self.sum).log2();
            *job.lse.get().add(row * job.heads + head) = (log * std::f64::consts::LN_2) as f32;
        }
        // Else heads share groups, and the op rounds when all are made.
        if dim.is_multiple_of(GROUP) {
            let groups = dim / GROUP;
            job.out.round::<S>(row, head * groups..(head + 1) * groups);
        }
    }
}

/// Joins the parts of some heads of a row, all of which are made.
pub(super) struct Join<'a> {
    pub(super) job: &'a Job<'a>,
    pub(super) slots: Slots,
    pub(super) row: usize,
    pub(super) heads: Range<usize>,
}

impl Kernel for Join<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Join { job, slots, row, heads } = self;
        let stride = job.layout.v_stride();
        for head in heads {
            let slot = |part| slots.at(row, part, job.heads, head);
            // The first slot's own V takes the sum.
            let mut total = Partial::load(slot(0), stride);
            for part in 1..job.parts(row).len() {
                total.add::<S>(Partial::load(slot(part), stride), stride);
            }
            total.finish::<S>(job, row, head);
        }
    }
}
