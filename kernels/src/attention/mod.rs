//! out[t, n] = Σ_j softmax_j(scale · q[t, n]·k[j]) · v[j]   over positions j in (p − window, p], p
//! the row's own.
//!
//! q `[T, N, D]`   pages as in [`KvCache`]   out `[T, N·D]`. Query head n reads kv head n / (N/K).
//!
//! In order of position, four pages at a time (aligned in the sequence, see [`tile`]), with a
//! running maximum and sum per (row, head) ("online softmax"). Several rows of one sequence and all
//! heads of a group take the pages together while they are in the first-level cache; each (row,
//! head) has its own running state, so its bits do not depend on who else is there. Every 1,024
//! positions a state begins anew and is added to what came before ([`split`]): so several threads
//! can take parts of one long context, and the bits are the same when they do. Numerics: f32, but
//! beside bf16 pages on CPUs that multiply its pairs (`vdpbf16ps`) q and the softmax weights are
//! rounded to it; a score is one chain over d, a sum over v one chain over the positions of a part.

mod backward;
mod job;
mod split;
mod tile;
mod unpack;

use std::mem::MaybeUninit;
use std::ops::{Range, RangeInclusive};

use crate::act::Act;
use crate::buffer::Shared;
use crate::device::{Cpu, Device, Kind};
use crate::kv::{KvCache, Rows, Values};
use crate::simd::{GROUP, Kernel, LANES, Simd, Stored};
use crate::{Error, Plane};
pub use backward::{AttentionBackward, AttentionBackwardScratch, attention_backward};
use job::{Job, PART, State, TILE_PAGES, TOKENS};
pub use split::AttentionScratch;
use split::{Join, Partial, Slots};
use tile::Tile;

/// D at most: the running sums lie on the stack.
pub const HEAD_DIM_MAX: usize = 512;
/// (row, head) pairs that take a page together at most.
const BATCH: usize = 16;
/// Pairs in registers at a time.
const TILE: usize = 4;
/// See the module page.
///
/// # Panics
/// On shapes that do not fit, a head dim above [`HEAD_DIM_MAX`], or a window of 0.
#[expect(clippy::too_many_arguments, reason = "operands of one formula")]
pub fn attention(
    dev: &Device,
    q: &Plane,
    heads: usize,
    kv: &KvCache,
    layer: usize,
    rows: Rows<'_>,
    scale: f32,
    window: Option<u32>,
    out: &mut Act,
    scratch: &mut AttentionScratch,
) {
    check(q, heads, kv, layer, rows, window, out);
    match &dev.kind {
        Kind::Cpu(cpu) => {
            let lse = Shared::null();
            on_cpu(cpu, q, heads, kv, layer, rows, scale, window, out, lse, scratch);
        }
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("attention")),
    }
}

/// The same bits, and what [`attention_backward`] needs beside them: `lse[t, n]` =
/// ln Σ_j exp(scale · q·k_j), `[T, N]`.
///
/// # Panics
/// As [`attention`].
#[expect(clippy::too_many_arguments, reason = "operands of one formula")]
pub fn attention_lse(
    dev: &Device,
    q: &Plane,
    heads: usize,
    kv: &KvCache,
    layer: usize,
    rows: Rows<'_>,
    scale: f32,
    window: Option<u32>,
    out: &mut Act,
    lse: &mut Plane,
    scratch: &mut AttentionScratch,
) {
    check(q, heads, kv, layer, rows, window, out);
    assert!(lse.holds(rows.count(), heads), "lse holds {} rows of {heads}", rows.count());
    match &dev.kind {
        Kind::Cpu(cpu) => {
            let lse = Shared::of(lse.on_mut().cpu_mut());
            on_cpu(cpu, q, heads, kv, layer, rows, scale, window, out, lse, scratch);
        }
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("attention_lse")),
    }
}

fn check(
    q: &Plane,
    heads: usize,
    kv: &KvCache,
    layer: usize,
    rows: Rows<'_>,
    window: Option<u32>,
    out: &Act,
) {
    let (count, layout) = (rows.count(), kv.layout());
    let dim = layout.head_dim;
    rows.check(layout);
    assert!(heads.is_multiple_of(layout.kv_heads), "{heads} heads in {} groups", layout.kv_heads);
    assert!(q.holds(count, heads * dim), "q holds {count} rows of {heads} x {dim}");
    assert!(out.width() == heads * dim && out.rows_max() >= count, "out is [T, N·D]");
    assert!(layer < layout.layers, "layer {layer} of {}", layout.layers);
    assert!(dim <= HEAD_DIM_MAX && dim.is_multiple_of(2), "head dim {dim}");
    assert!(window != Some(0), "a window of at least one position");
}

#[expect(clippy::too_many_arguments, reason = "operands of one formula")]
fn on_cpu(
    cpu: &Cpu,
    q: &Plane,
    heads: usize,
    kv: &KvCache,
    layer: usize,
    rows: Rows<'_>,
    scale: f32,
    window: Option<u32>,
    out: &mut Act,
    lse: Shared<f32>,
    scratch: &mut AttentionScratch,
) {
    cpu.count_op();
    let (isa, values, q, layout) = (cpu.isa(), kv.reader(), q.on().cpu().as_ptr(), kv.layout());
    let out = out.on_mut().cpu_mut();
    let writer = out.writer();
    let job = Job { isa, values, q, heads, layout, layer, rows, scale, window, out: writer, lse };
    job.run_all(cpu, scratch);
    if !layout.head_dim.is_multiple_of(GROUP) {
        out.round(cpu, rows.count());
    }
}

impl Job<'_> {
    fn run_all(&self, cpu: &Cpu, scratch: &mut AttentionScratch) {
        let count = self.rows.count();
        let parts = (0..count).map(|row| self.parts(row).len()).max().unwrap_or(0);
        match scratch.slots(count, parts, self.layout) {
            Some(slots) => self.by_parts(cpu, slots),
            None => self.whole(cpu),
        }
    }

    /// Tasks of some rows and a kv head each.
    fn whole(&self, cpu: &Cpu) {
        let (count, kv_heads) = (self.rows.count(), self.layout.kv_heads);
        // Rows share pages only if they are of one sequence; few rows are better spread over the
        // threads.
        let sharing = (BATCH / self.group()).max(1);
        let batch_rows = sharing.min(count * kv_heads / (8 * cpu.threads())).max(1);
        let (tasks, threads) = (count.div_ceil(batch_rows) * kv_heads, cpu.threads());
        cpu.fork(tasks, &|task| {
            let place = |task: usize| (task / kv_heads * batch_rows, task % kv_heads);
            let (mut start, kv_head) = place(task);
            // Every thread claims tasks in turn, so it can guess its next one.
            let then = (task + threads < tasks).then(|| {
                let (row, kv_head) = place(task + threads);
                (row, kv_head, self.span(row).0)
            });
            let end = (start + batch_rows).min(count);
            while start < end {
                let owners = &self.rows.sequences[start..end];
                let same = owners.iter().take_while(|&&owner| owner == owners[0]).count();
                // SAFETY: bounds are asserted by the op; a (row, kv head) belongs to one task.
                unsafe { self.run(start..start + same, kv_head, then, None) };
                start += same;
            }
        });
    }

    /// Tasks of a part of a row's context and a kv head each; then the parts are joined.
    fn by_parts(&self, cpu: &Cpu, slots: Slots) {
        let (count, kv_heads) = (self.rows.count(), self.layout.kv_heads);
        let (tasks, threads) = (count * kv_heads * slots.parts, cpu.threads());
        let place = |task: usize| (task / slots.parts / kv_heads, task / slots.parts % kv_heads);
        cpu.fork(tasks, &|task| {
            let ((row, kv_head), index) = (place(task), task % slots.parts);
            let Some(part) = self.parts(row).nth(index) else { return };
            let next = task + threads;
            let then = (next < tasks).then(|| {
                let (row, kv_head) = place(next);
                let start = (self.parts(row).start + next % slots.parts) * PART;
                (row, kv_head, start.max(self.span(row).0))
            });
            // SAFETY: as in `whole`; a (row, part, kv head) belongs to one task.
            unsafe { self.run(row..row + 1, kv_head, then, Some((part, index, slots))) };
        });
        cpu.fork(count * kv_heads, &|task| {
            let (row, kv_head) = (task / kv_heads, task % kv_heads);
            let heads = kv_head * self.group()..(kv_head + 1) * self.group();
            // SAFETY: the fork above made all parts; a (row, kv head) belongs to one task.
            unsafe { self.isa.run(Join { job: self, slots, row, heads }) };
        });
    }

    /// Rows of one sequence, heads of one group, in batches of (row, head) pairs.
    unsafe fn run(
        &self,
        rows: Range<usize>,
        kv_head: usize,
        then: Option<(usize, usize, usize)>,
        part: Option<(usize, usize, Slots)>,
    ) {
        let group = self.group();
        for first in (0..group).step_by(BATCH) {
            let heads = first..group.min(first + BATCH);
            let heads = kv_head * group + heads.start..kv_head * group + heads.end;
            let rows = rows.clone();
            let batch = Batch { job: self, rows, heads, kv_head, then, part };
            match self.values {
                Values::F32(p) => self.isa.run(Pages { batch, values: p.get() }),
                Values::Bf16(p) => self.isa.run(Pages { batch, values: p.get() }),
                Values::Int8(p) => self.isa.run(Pages { batch, values: p.get() }),
            }
        }
    }
}

struct Batch<'a> {
    job: &'a Job<'a>,
    rows: Range<usize>,
    heads: Range<usize>,
    kv_head: usize,
    /// Row, kv head and position this thread probably takes next.
    then: Option<(usize, usize, usize)>,
    /// The only part wanted, which of the row's it is, where it is to wait; `None`: all, joined.
    part: Option<(usize, usize, Slots)>,
}

struct Pages<'a, E> {
    batch: Batch<'a>,
    values: *const E,
}

impl<E: Stored> Kernel for Pages<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Batch { job, rows, heads, part, .. } = &self.batch;
        let stride = job.layout.v_stride();
        let mut states =
            [State { q: job.q, first: 0, last: 0, max: 0.0, sum: [0.0; LANES] }; BATCH];
        let mut count = 0;
        let mut words = [MaybeUninit::<u32>::uninit(); BATCH * HEAD_DIM_MAX / 2];
        let dim = job.layout.head_dim;
        for t in rows.clone() {
            let (first, last) = job.span(t);
            for head in heads.clone() {
                let mut q = job.q.add((t * job.heads + head) * dim);
                if E::multiplied_in_pairs::<S>() {
                    let words = words.as_mut_ptr().cast::<u32>().add(count * HEAD_DIM_MAX / 2);
                    for d in (0..dim).step_by(LANES) {
                        let n = (dim - d).min(LANES);
                        S::store_pairs_n(words.add(d / 2), n, S::load_n(q.add(d), n));
                    }
                    q = words.cast();
                }
                states[count] = State { q, first, last, ..states[count] };
                count += 1;
            }
        }
        let states = &mut states[..count];
        let first = states.iter().map(|s| s.first).min().unwrap_or(0);
        let last = states.iter().map(|s| s.last).max().unwrap_or(0);
        let place = |i: usize| (rows.start + i / heads.len(), heads.start + i % heads.len());

        let mut sums = [MaybeUninit::<f32>::uninit(); BATCH * HEAD_DIM_MAX];
        let sums = sums.as_mut_ptr().cast::<f32>();
        if let &Some((part, index, slots)) = part {
            self.part::<S>(states, first.max(part * PART)..=last.min(part * PART + PART - 1), sums);
            for (i, state) in states.iter().enumerate() {
                let (row, head) = place(i);
                let made = state.partial::<S>(sums.add(i * stride));
                made.store(slots.at(row, index, job.heads, head), stride);
            }
            return;
        }
        let mut totals = [MaybeUninit::<f32>::uninit(); BATCH * HEAD_DIM_MAX];
        let totals = totals.as_mut_ptr().cast::<f32>();
        let total = |i: usize| Partial::none(totals.wrapping_add(i * stride));
        let mut joined: [Partial; BATCH] = std::array::from_fn(total);
        for part in first / PART..=last / PART {
            self.part::<S>(states, first.max(part * PART)..=last.min(part * PART + PART - 1), sums);
            for (i, state) in states.iter().enumerate() {
                joined[i].add::<S>(state.partial::<S>(sums.add(i * stride)), stride);
            }
        }
        for (i, joined) in joined[..count].iter().enumerate() {
            let (row, head) = place(i);
            joined.finish::<S>(job, row, head);
        }
    }
}

impl State {
    #[inline(always)]
    unsafe fn partial<S: Simd>(&self, values: *mut f32) -> Partial {
        Partial { values, max: self.max, sum: S::sum(S::load(self.sum.as_ptr())) }
    }
}

impl<E: Stored> Pages<'_, E> {
    /// Takes all states through positions of one part, from nothing on.
    #[inline(always)]
    unsafe fn part<S: Simd>(
        &self,
        states: &mut [State],
        span: RangeInclusive<usize>,
        sums: *mut f32,
    ) {
        let Batch { job, rows, kv_head, then, .. } = &self.batch;
        let stride = job.layout.v_stride();
        std::ptr::write_bytes(sums, 0, states.len() * stride);
        for state in &mut *states {
            (state.max, state.sum) = (f32::NEG_INFINITY, [0.0; LANES]);
        }
        let of_row = (rows.start, *kv_head);
        let last = *span.end();
        for four in span.start() / TOKENS..=last / TOKENS {
            let pages = self.pages(of_row, four, last, [std::ptr::null(); TILE_PAGES]);
            let next = match *then {
                Some((row, kv_head, position)) if four == last / TOKENS => {
                    self.pages((row, kv_head), position / TOKENS, job.span(row).1, pages)
                }
                _ => self.pages(of_row, four + 1, last, pages),
            };
            for (tile, states) in states.chunks_mut(TILE).enumerate() {
                let work = Tile {
                    job,
                    pages,
                    next: if tile == 0 { next } else { pages },
                    start: four * TOKENS,
                    sums: sums.add(tile * TILE * stride),
                };
                match states.len() {
                    1 => work.tile::<S, 1>(states),
                    2 => work.tile::<S, 2>(states),
                    3 => work.tile::<S, 3>(states),
                    _ => work.tile::<S, TILE>(states),
                }
            }
        }
    }

    /// A head's four pages of a row's sequence; those of `none` from behind the page of
    /// position `last` on.
    #[inline(always)]
    unsafe fn pages(
        &self,
        (row, kv_head): (usize, usize),
        turn: usize,
        last: usize,
        none: [*const E; TILE_PAGES],
    ) -> [*const E; TILE_PAGES] {
        let job = self.batch.job;
        let pages = job.rows.pages_of(row);
        std::array::from_fn(|j| {
            let page = turn * TILE_PAGES + j;
            if page > last / KvCache::PAGE {
                return none[j];
            }
            self.values.wrapping_add(job.layout.at(job.layer, pages[page] as usize, kv_head))
        })
    }
}
