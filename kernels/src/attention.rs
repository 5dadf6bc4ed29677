//! out[t, n] = Σ_j softmax_j(scale · q[t, n]·k[j]) · v[j]   over positions j in (p − window, p], p
//! the row's own.
//!
//! q `[T, N, D]`   pages as in [`KvCache`]   out `[T, N·D]`. Query head n reads kv head n / (N/K).
//!
//! One pass in order of position, four pages at a time (aligned in the sequence), with a running
//! maximum and sum per (row, head) ("online softmax"). Several rows of one sequence and all heads
//! of a group take the pages together while they are in the first-level cache; each (row, head) has
//! its own running state, so its bits do not depend on who else is there. Numerics: f32; a score is
//! one chain over d, a sum over v one chain over positions.

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::act::{Act, ActWriter};
use crate::device::Device;
use crate::kv::{KvCache, Layout, Rows, Values};
use crate::simd::{Element, GROUP, Isa, Kernel, LANES, Simd};

/// D at most: the running sums lie on the stack.
pub const HEAD_DIM_MAX: usize = 512;
/// (row, head) pairs that take a page together at most.
const BATCH: usize = 16;
/// Pairs in registers at a time.
const TILE: usize = 4;
/// Pages of one turn, and their tokens.
const TURN: usize = 4;
const TOKENS: usize = TURN * KvCache::PAGE;

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
    assert!(dim <= HEAD_DIM_MAX && dim.is_multiple_of(2), "head dim {dim}");
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
    let (values, isa, threads) = (kv.reader(), dev.isa(), dev.threads());
    let tasks = batches * layout.kv_heads;
    dev.fork(tasks, &|task| {
        let place = |task: usize| (task / layout.kv_heads * batch_rows, task % layout.kv_heads);
        let (mut start, kv_head) = place(task);
        // Every thread claims tasks in turn, so it can guess its next one.
        let then = (task + threads < tasks).then(|| place(task + threads));
        let end = (start + batch_rows).min(count);
        while start < end {
            let sequence = rows.sequences[start];
            let same = rows.sequences[start..end].iter().take_while(|&&s| s == sequence).count();
            // SAFETY: bounds are asserted above; a (row, kv head) belongs to one task.
            unsafe { job.0.run(isa, values, start..start + same, kv_head, then) };
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
    unsafe fn run(
        &self,
        isa: Isa,
        values: Values,
        rows: Range<usize>,
        kv_head: usize,
        then: Option<(usize, usize)>,
    ) {
        let group = self.heads / self.layout.kv_heads;
        for first in (0..group).step_by(BATCH) {
            let heads = first..group.min(first + BATCH);
            let heads = kv_head * group + heads.start..kv_head * group + heads.end;
            let rows = rows.clone();
            let batch = Batch { job: self, rows, heads, kv_head, then };
            match values {
                Values::F32(p) => isa.run(Pages { batch, values: p.get() }),
                Values::Bf16(p) => isa.run(Pages { batch, values: p.get() }),
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
    /// Row and kv head this thread probably takes next.
    then: Option<(usize, usize)>,
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
        let Batch { job, rows, heads, kv_head, then } = &self.batch;
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

        let first = states.iter().map(|s| s.first).min().unwrap_or(0);
        let last = states.iter().map(|s| s.last).max().unwrap_or(0);
        for turn in first / TOKENS..=last / TOKENS {
            let pages = self.pages((rows.start, *kv_head), turn, last, [std::ptr::null(); TURN]);
            let next = match *then {
                Some((row, kv_head)) if turn == last / TOKENS => {
                    let (first, last) = job.span(row);
                    self.pages((row, kv_head), first / TOKENS, last, pages)
                }
                _ => self.pages((rows.start, *kv_head), turn + 1, last, pages),
            };
            for (tile, states) in states.chunks_mut(TILE).enumerate() {
                let turn = Turn {
                    job,
                    pages,
                    next: if tile == 0 { next } else { pages },
                    start: turn * TOKENS,
                    sums: sums.add(tile * TILE * stride),
                };
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

impl<E: Element> Pages<'_, E> {
    /// A head's pages of a turn of a row's sequence; those of `none` from behind the page of
    /// position `last` on.
    #[inline(always)]
    unsafe fn pages(
        &self,
        (row, kv_head): (usize, usize),
        turn: usize,
        last: usize,
        none: [*const E; TURN],
    ) -> [*const E; TURN] {
        let job = self.batch.job;
        let pages = job.rows.pages_of(row);
        std::array::from_fn(|j| {
            let page = turn * TURN + j;
            if page > last / KvCache::PAGE {
                return none[j];
            }
            self.values.wrapping_add(job.layout.at(job.layer, pages[page] as usize, kv_head))
        })
    }
}

/// Four pages' turn for one tile of states.
struct Turn<'a, E> {
    job: &'a Job<'a>,
    pages: [*const E; TURN],
    /// The next turn's, fetched meanwhile line for line; where there is none, these again.
    next: [*const E; TURN],
    /// Position of the first token.
    start: usize,
    sums: *mut f32,
}

impl<E: Element> Turn<'_, E> {
    #[inline(always)]
    unsafe fn tile<S: Simd, const N: usize>(&self, states: &mut [State]) {
        // Scores, then weights.
        let mut lanes = [[0.0f32; TOKENS]; N];
        if !self.pages[TURN - 1].is_null() {
            self.scores::<S, N, TURN>(states, &mut lanes, 0);
        } else {
            for j in (0..TURN).take_while(|&j| !self.pages[j].is_null()) {
                self.scores::<S, N, 1>(states, &mut lanes, j);
            }
        }
        let (mut low, mut high) = (TOKENS, 0);
        for (i, state) in states.iter_mut().enumerate() {
            // The tokens this row sees; none if the turn is outside its span.
            let from = state.first.saturating_sub(self.start).min(TOKENS);
            let to = (state.last + 1).saturating_sub(self.start).min(TOKENS);
            if from < to {
                (low, high) = (low.min(from), high.max(to));
                let sums = self.sums.add(i * self.job.layout.v_stride());
                self.soften::<S>(state, &mut lanes[i], from..to, sums);
            } else {
                lanes[i] = [0.0; TOKENS];
            }
        }
        if low < high {
            self.add_values::<S, N>(&lanes, low..high);
        }
    }

    /// scale · q·k of the tokens of P pages from page `j` on, for N states.
    #[inline(always)]
    unsafe fn scores<S: Simd, const N: usize, const P: usize>(
        &self,
        states: &[State],
        lanes: &mut [[f32; TOKENS]; N],
        j: usize,
    ) {
        let mut acc = [[S::zero(); P]; N];
        for d in (0..self.job.layout.head_dim).step_by(2) {
            let mut keys = [[S::zero(); 2]; P];
            for (p, key) in keys.iter_mut().enumerate() {
                let at = d * KvCache::PAGE;
                *key = E::load_pair::<S>(self.pages[j + p].add(at));
                if P == TURN {
                    fetch::<S, E>(self.next[p].wrapping_add(at));
                }
            }
            for (acc, state) in acc.iter_mut().zip(states) {
                let q = [S::splat(*state.q.add(d)), S::splat(*state.q.add(d + 1))];
                for (sum, key) in acc.iter_mut().zip(&keys) {
                    *sum = S::fma(q[1], key[1], S::fma(q[0], key[0], *sum));
                }
            }
        }
        for (lanes, acc) in lanes.iter_mut().zip(&acc) {
            for (p, &sum) in acc.iter().enumerate() {
                let scaled = S::mul(sum, S::splat(self.job.scale));
                S::store(lanes.as_mut_ptr().add((j + p) * LANES), scaled);
            }
        }
    }

    /// Turns one state's scores into weights under the new maximum, and brings what it has so far
    /// under it too.
    #[inline(always)]
    unsafe fn soften<S: Simd>(
        &self,
        state: &mut State,
        lanes: &mut [f32; TOKENS],
        seen: Range<usize>,
        sums: *mut f32,
    ) {
        let mut scores = [S::zero(); TURN];
        let hidden = S::splat(f32::NEG_INFINITY);
        for (j, score) in scores.iter_mut().enumerate() {
            *score = S::load(lanes.as_ptr().add(j * LANES));
            if seen.len() < TOKENS {
                let lane = S::load(LANE.as_ptr());
                let (from, to) = (seen.start as f32, seen.end as f32);
                let before = (j * LANES) as f32;
                *score = S::select_lt(lane, S::splat(to - before), *score, hidden);
                *score = S::select_lt(lane, S::splat(from - before), hidden, *score);
            }
        }
        let top = S::max(S::max(scores[0], scores[1]), S::max(scores[2], scores[3]));
        let max = S::max_lane(top).max(state.max);
        let mut weights = [S::zero(); TURN];
        for (j, weight) in weights.iter_mut().enumerate() {
            *weight = S::exp(S::sub(scores[j], S::splat(max)));
            S::store(lanes.as_mut_ptr().add(j * LANES), *weight);
        }
        if max > state.max {
            let factor = S::exp(S::splat(state.max - max));
            for d in (0..self.job.layout.v_stride()).step_by(LANES) {
                S::store(sums.add(d), S::mul(S::load(sums.add(d)), factor));
            }
            let mut lane = [0.0; LANES];
            S::store(lane.as_mut_ptr(), factor);
            state.sum *= lane[0];
            state.max = max;
        }
        let sum = S::add(S::add(weights[0], weights[1]), S::add(weights[2], weights[3]));
        state.sum += S::sum(sum);
    }

    /// sums += weights · V over the tokens `span`, in order. A row that does not see one of them
    /// has weight 0 there.
    #[inline(always)]
    unsafe fn add_values<S: Simd, const N: usize>(
        &self,
        weights: &[[f32; TOKENS]; N],
        span: Range<usize>,
    ) {
        const WIDTH: usize = 2;
        let stride = self.job.layout.v_stride();
        let mut d = 0;
        while d < stride {
            if S::WIDE && d + WIDTH * GROUP <= stride {
                self.columns::<S, N, WIDTH>(weights, span.clone(), d);
                d += WIDTH * GROUP;
            } else {
                self.columns::<S, N, 1>(weights, span.clone(), d);
                d += GROUP;
            }
        }
    }

    #[inline(always)]
    unsafe fn columns<S: Simd, const N: usize, const WIDTH: usize>(
        &self,
        weights: &[[f32; TOKENS]; N],
        span: Range<usize>,
        d: usize,
    ) {
        let layout = self.job.layout;
        let stride = layout.v_stride();
        let mut acc = [[[S::zero(); 2]; WIDTH]; N];
        for (i, acc) in acc.iter_mut().enumerate() {
            for (w, sum) in acc.as_flattened_mut().iter_mut().enumerate() {
                *sum = S::load(self.sums.add(i * stride + d + w * LANES));
            }
        }
        for token in span {
            let page = token / KvCache::PAGE;
            let at = layout.v_start() + token % KvCache::PAGE * stride + d;
            let (v, next) = (self.pages[page].add(at), self.next[page].wrapping_add(at));
            let mut values = [[S::zero(); 2]; WIDTH];

            for (w, value) in values.iter_mut().enumerate() {
                *value = E::load_pair::<S>(v.add(w * GROUP));
                fetch::<S, E>(next.wrapping_add(w * GROUP));
            }
            for (acc, weights) in acc.iter_mut().zip(weights) {
                let weight = S::splat(weights[token]);
                let sums = acc.as_flattened_mut().iter_mut();
                for (sum, &value) in sums.zip(values.as_flattened()) {
                    *sum = S::fma(weight, value, *sum);
                }
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            for (w, &sum) in acc.as_flattened().iter().enumerate() {
                S::store(self.sums.add(i * stride + d + w * LANES), sum);
            }
        }
    }
}

/// Asks for the lines of a group.
#[inline(always)]
unsafe fn fetch<S: Simd, E: Element>(group: *const E) {
    S::prefetch(group.cast());
    if size_of::<E>() == 4 {
        S::prefetch(group.wrapping_add(LANES).cast());
    }
}

const LANE: [f32; LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
