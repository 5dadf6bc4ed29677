//! out[t, n] = Σ_j softmax_j(scale · q[t, n]·k[j]) · v[j]   over positions j in (p − window, p], p the row's own.
//!
//! q `[T, N, D]`   pages as in [`KvCache`]   out `[T, N·D]`. Query head n reads kv head n / (N/K).
//!
//! One pass, page by page in order of position, with a running maximum and sum per (row, head)
//! ("online softmax"). Several rows of one sequence and all heads of a group take a page together
//! while it is in the first-level cache; each (row, head) has its own running state, so its bits do
//! not depend on who else is there. Numerics: f32; a score is 4 chains (d mod 4) joined in one
//! order; v is summed in order of position.

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::act::{Act, ActWriter};
use crate::device::Device;
use crate::kv::{KvCache, Layout, Rows, Values};
use crate::simd::{Element, Isa, Kernel, LANES, Simd};

/// D at most: the running sums lie on the stack.
pub const HEAD_DIM_MAX: usize = 512;
/// (row, head) pairs that take a page together at most.
const BATCH: usize = 16;
/// Pairs in registers at a time.
const TILE: usize = 4;
/// Chains of one score.
const CHAINS: usize = 4;

/// See the module page.
///
/// # Panics
/// On shapes that do not fit, a head dim above [`HEAD_DIM_MAX`], or a window of 0.
#[expect(clippy::too_many_arguments, reason = "operands of one formula")]
pub fn attention(
    dev: &Device,
    q: &[f32],
    heads: usize,
    kv: &KvCache,
    layer: usize,
    rows: Rows<'_>,
    scale: f32,
    window: Option<u32>,
    out: &mut Act,
) {
    dev.count_op();
    let (count, layout) = (rows.count(), kv.layout());
    let dim = layout.head_dim;
    rows.check(layout);
    assert!(heads.is_multiple_of(layout.kv_heads), "{heads} heads in {} groups", layout.kv_heads);
    assert!(q.len() >= count * heads * dim, "q holds {count} rows of {heads} x {dim}");
    assert!(out.width() == heads * dim && out.rows_max() >= count, "out is [T, N·D]");
    assert!(layer < layout.layers, "layer {layer} of {}", layout.layers);
    assert!(dim <= HEAD_DIM_MAX && dim.is_multiple_of(CHAINS), "head dim {dim}");
    assert!(window != Some(0), "a window of at least one position");

    let group = heads / layout.kv_heads;
    // Rows share pages only if they are of one sequence; few rows are better spread over the
    // threads.
    let sharing = (BATCH / group).max(1);
    let tasks_alone = count * layout.kv_heads;
    let batch_rows = sharing.min(tasks_alone / (8 * dev.threads())).max(1);
    let batches = count.div_ceil(batch_rows);
    let job = Job { q: q.as_ptr(), heads, layout, layer, rows, scale, window, out: out.writer() };
    let job = &Shareable(job);
    let (values, isa) = (kv.reader(), dev.isa());
    dev.fork(batches * layout.kv_heads, &|task| {
        let (batch, kv_head) = (task / layout.kv_heads, task % layout.kv_heads);
        let end = ((batch + 1) * batch_rows).min(count);
        let mut start = batch * batch_rows;
        while start < end {
            let sequence = rows.sequences[start];
            let same = rows.sequences[start..end].iter().take_while(|&&s| s == sequence).count();
            // SAFETY: bounds are asserted above; a (row, kv head) belongs to one task.
            unsafe { job.0.run(isa, values, start..start + same, kv_head) };
            start += same;
        }
    });
}

/// What all tasks read.
struct Job<'a> {
    q: *const f32,
    heads: usize,
    layout: Layout,
    layer: usize,
    rows: Rows<'a>,
    scale: f32,
    window: Option<u32>,
    out: ActWriter,
}

struct Shareable<'a>(Job<'a>);
// SAFETY: `q` is only read, `out` is written by the task that owns the row and head.
unsafe impl Sync for Shareable<'_> {}

impl Job<'_> {
    /// Rows of one sequence, heads of one group, in batches of (row, head) pairs.
    unsafe fn run(&self, isa: Isa, values: Values, rows: Range<usize>, kv_head: usize) {
        let group = self.heads / self.layout.kv_heads;
        for first in (0..group).step_by(BATCH) {
            let heads = first..group.min(first + BATCH);
            let heads = kv_head * group + heads.start..kv_head * group + heads.end;
            let batch = |rows| Batch { job: self, rows, heads: heads.clone(), kv_head };
            match values {
                Values::F32(p) => isa.run(Pages { batch: batch(rows.clone()), values: p.get() }),
                Values::Bf16(p) => isa.run(Pages { batch: batch(rows.clone()), values: p.get() }),
            }
        }
    }

    /// First and last position row `t` sees.
    #[inline(always)]
    fn span(&self, t: usize) -> (usize, usize) {
        let last = self.rows.positions[t] as usize;
        (self.window.map_or(0, |w| (last + 1).saturating_sub(w as usize)), last)
    }
}

struct Batch<'a> {
    job: &'a Job<'a>,
    rows: Range<usize>,
    heads: Range<usize>,
    kv_head: usize,
}

struct Pages<'a, E> {
    batch: Batch<'a>,
    values: *const E,
}

/// Running state of one (row, head).
#[derive(Clone, Copy)]
struct State {
    q: *const f32,
    /// Positions it sees.
    first: usize,
    last: usize,
    max: f32,
    sum: f32,
}

impl<E: Element> Kernel for Pages<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Batch { job, rows, heads, kv_head } = &self.batch;
        let dim = job.layout.head_dim;
        let stride = job.layout.v_stride();
        let empty = State { q: job.q, first: 0, last: 0, max: f32::NEG_INFINITY, sum: 0.0 };
        let mut states = [empty; BATCH];
        let mut count = 0;
        for t in rows.clone() {
            let (first, last) = job.span(t);
            for head in heads.clone() {
                let q = job.q.add((t * job.heads + head) * dim);
                states[count] = State { q, first, last, ..empty };
                count += 1;
            }
        }
        let states = &mut states[..count];
        let mut sums = [MaybeUninit::<f32>::uninit(); BATCH * HEAD_DIM_MAX];
        let sums = sums.as_mut_ptr().cast::<f32>();
        std::ptr::write_bytes(sums, 0, count * stride);

        let pages = job.rows.pages_of(rows.start);
        let first = states.iter().map(|s| s.first).min().unwrap_or(0);
        let last = states.iter().map(|s| s.last).max().unwrap_or(0);
        let seen = first / KvCache::PAGE..last / KvCache::PAGE + 1;
        for (page, &place) in seen.clone().zip(&pages[seen]) {
            let at = self.values.add(job.layout.at(job.layer, place as usize, *kv_head));
            for (tile, states) in states.chunks_mut(TILE).enumerate() {
                let sums = sums.add(tile * TILE * stride);
                let turn = Turn { job, k: at, v: at.add(job.layout.v_start()), page, sums };
                match states.len() {
                    1 => turn.tile::<S, 1>(states),
                    2 => turn.tile::<S, 2>(states),
                    3 => turn.tile::<S, 3>(states),
                    _ => turn.tile::<S, TILE>(states),
                }
            }
        }
        for (i, state) in states.iter().enumerate() {
            let (row, head) = (rows.start + i / heads.len(), heads.start + i % heads.len());
            let factor = S::splat(1.0 / state.sum);
            for d in (0..dim).step_by(LANES) {
                let n = (dim - d).min(LANES);
                let sum = S::load(sums.add(i * stride + d));
                job.out.store::<S>(row, head * dim + d, n, S::mul(sum, factor));
            }
        }
    }
}

/// One page's turn for one tile of states.
struct Turn<'a, E> {
    job: &'a Job<'a>,
    k: *const E,
    v: *const E,
    page: usize,
    sums: *mut f32,
}

impl<E: Element> Turn<'_, E> {
    #[inline(always)]
    unsafe fn tile<S: Simd, const N: usize>(&self, states: &mut [State]) {
        let start = self.page * KvCache::PAGE;
        let scores = self.scores::<S, N>(states);
        let mut weights = [[0.0f32; LANES]; N];
        let (mut low, mut high) = (LANES, 0);
        for (i, state) in states.iter_mut().enumerate() {
            // The lanes this row sees; none if the page is outside its span.
            let from = state.first.saturating_sub(start).min(LANES);
            let to = (state.last + 1).saturating_sub(start).min(LANES);
            if from >= to {
                continue;
            }
            (low, high) = (low.min(from), high.max(to));
            let lanes = S::load(LANE.as_ptr());
            let hidden = S::splat(f32::NEG_INFINITY);
            let score = S::select_lt(lanes, S::splat(to as f32), scores[i], hidden);
            let score = S::select_lt(lanes, S::splat(from as f32), hidden, score);
            let max = S::max_lane(score).max(state.max);
            let weight = S::exp(S::sub(score, S::splat(max)));
            S::store(weights[i].as_mut_ptr(), weight);
            if max > state.max {
                let factor = S::exp(S::splat(state.max - max));
                let sums = self.sums.add(i * self.job.layout.v_stride());
                for d in (0..self.job.layout.v_stride()).step_by(LANES) {
                    S::store(sums.add(d), S::mul(S::load(sums.add(d)), factor));
                }
                let mut lane = [0.0; LANES];
                S::store(lane.as_mut_ptr(), factor);
                state.sum *= lane[0];
                state.max = max;
            }
            state.sum += S::sum(weight);
        }
        if low < high {
            self.add_values::<S, N>(&weights, low..high);
        }
    }

    /// scale · q·k of 16 tokens for N states.
    #[inline(always)]
    unsafe fn scores<S: Simd, const N: usize>(&self, states: &[State]) -> [S::F; N] {
        let mut chains = [[S::zero(); CHAINS]; N];
        for d in (0..self.job.layout.head_dim).step_by(CHAINS) {
            for c in 0..CHAINS {
                let k = E::load::<S>(self.k.add((d + c) * KvCache::PAGE));
                for (chains, state) in chains.iter_mut().zip(states) {
                    chains[c] = S::fma(S::splat(*state.q.add(d + c)), k, chains[c]);
                }
            }
        }
        let mut scores = [S::zero(); N];
        for (score, c) in scores.iter_mut().zip(&chains) {
            let sum = S::add(S::add(c[0], c[1]), S::add(c[2], c[3]));
            *score = S::mul(sum, S::splat(self.job.scale));
        }
        scores
    }

    /// sums += weights · V over the tokens `span`, in order. A row that does not see one of them
    /// has weight 0 there.
    #[inline(always)]
    unsafe fn add_values<S: Simd, const N: usize>(
        &self,
        weights: &[[f32; LANES]; N],
        span: Range<usize>,
    ) {
        const WIDTH: usize = 4;
        let stride = self.job.layout.v_stride();
        let mut d = 0;
        while d < stride {
            if d + WIDTH * LANES <= stride {
                self.columns::<S, N, WIDTH>(weights, span.clone(), d);
                d += WIDTH * LANES;
            } else {
                self.columns::<S, N, 1>(weights, span.clone(), d);
                d += LANES;
            }
        }
    }

    #[inline(always)]
    unsafe fn columns<S: Simd, const N: usize, const WIDTH: usize>(
        &self,
        weights: &[[f32; LANES]; N],
        span: Range<usize>,
        d: usize,
    ) {
        let stride = self.job.layout.v_stride();
        let mut acc = [[S::zero(); WIDTH]; N];
        for (i, acc) in acc.iter_mut().enumerate() {
            for (w, sum) in acc.iter_mut().enumerate() {
                *sum = S::load(self.sums.add(i * stride + d + w * LANES));
            }
        }
        for token in span {
            let mut v = [S::zero(); WIDTH];
            for (w, v) in v.iter_mut().enumerate() {
                *v = E::load::<S>(self.v.add(token * stride + d + w * LANES));
            }
            for (acc, weights) in acc.iter_mut().zip(weights) {
                let weight = S::splat(weights[token]);
                for (sum, &v) in acc.iter_mut().zip(&v) {
                    *sum = S::fma(weight, v, *sum);
                }
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            for (w, &sum) in acc.iter().enumerate() {
                S::store(self.sums.add(i * stride + d + w * LANES), sum);
            }
        }
    }
}

const LANE: [f32; LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
