//! y = gain ∘ (x·Wᵀ + (x·Aᵀ)·Bᵀ) + delta.bias + bias,   one to three sites that read the same x.
//!
//! x `[T, I]`   W `[O, I]`   y `[T, O]`   and for every segment g its own A `[R, I]`, B `[O, R]`
//! (scale folded in), gain `[O]`, bias `[O]`. Rows without a delta are x·Wᵀ + bias and cost nothing
//! beyond it.
//!
//! One fork, whatever the number of adapters, ranks and sites: its first tasks are u = x·Aᵀ of
//! every (site, segment), its others, output block by output block, x·Wᵀ and on top of it, while
//! that y is in the nearest cache, u·Bᵀ of every segment. Tasks start in order, so whoever needs u
//! finds it made, or in the making on another thread, and waits no longer than one such task.
//! Tasks are ranges of outputs (and rows, if many), never of a reduction, so any popularity of
//! adapters spreads evenly.
//!
//! Numerics: sums in f32. W·x is one chain over the inputs in order (fused multiply-add; with
//! `vdpbf16ps` a pair at a time). u is 16 chains (inputs i, i+16, …) joined in one order. The delta
//! is added on top of x·Wᵀ rank by rank. With bf16 weights W multiplies x rounded once to bf16; A
//! multiplies the f32 x; u stays f32.

mod base;
mod delta;
mod expand;
mod shrink;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::act::Act;
use crate::buffer::{Buffer, Shared};
use crate::device::{Device, part};
use crate::matrix::Matrix;
use crate::segments::Segments;
use crate::simd::Isa;
use base::{Cut, Site};
pub use delta::Delta;
use expand::Expand;
use shrink::Shrink;

/// Sites of one call at most.
pub const SITES_MAX: usize = 3;
/// Rows of one shrink piece, and its ranks at most and at least.
const PIECE_ROWS: usize = 32;
const PIECE_RANKS: usize = 64;
const PIECE_RANKS_MIN: usize = 4;
/// Shrink pieces wanted per thread, and in all, where adapters are few.
const PIECES_PER_THREAD: usize = 4;
const PIECES: usize = 256;
/// Rows times blocks whose y (256 bytes each) the deltas are added to while it is near.
const STRETCH: usize = 1024;

/// One site: y = x·Wᵀ (+ segment deltas) (+ bias). `y` is `[T, O]`.
pub struct Linear<'a> {
    pub weight: &'a Matrix,
    pub bias: Option<&'a [f32]>,
    pub y: &'a mut [f32],
}

/// Which delta the rows of a segment have at a site; `None` leaves them at the base.
type DeltaOf<'c, 'd> = &'c (dyn Fn(usize, usize) -> Option<&'d Delta> + Sync);

/// A piece of the first fork: some rows of one segment at one site, and some ranks.
#[derive(Clone, Copy)]
struct Piece {
    site: u32,
    segment: u32,
    rows: [u32; 2],
    ranks: [u32; 2],
}

/// Memory of [`linear`] between its forks, taken once.
pub struct LoraScratch {
    /// `[SITES_MAX, rows_max, rank_max]`
    u: Buffer<f32>,
    pieces: Vec<Piece>,
    rows_max: usize,
    rank_max: usize,
}

impl LoraScratch {
    /// For steps of at most `rows_max` rows and adapters of rank at most `rank_max`.
    pub fn new(rows_max: usize, rank_max: usize) -> LoraScratch {
        // A segment has a row at least, so chunks of rows never outnumber rows.
        let pieces = SITES_MAX * rows_max * rank_max.div_ceil(PIECE_RANKS) + PIECES;
        LoraScratch {
            u: Buffer::zeroed(SITES_MAX * rows_max * rank_max),
            pieces: Vec::with_capacity(pieces),
            rows_max,
            rank_max,
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.u.bytes() + self.pieces.capacity() * size_of::<Piece>()
    }
}

/// One to three linears that read the same x (q, k, v / gate, up / one). `delta(i, g)` is the delta
/// of output `i` for the rows of segment `g`; `None` leaves them at the base.
///
/// # Panics
/// On shapes that do not fit: x and W, W and y, a delta and its site, more rows or ranks than the
/// scratch has.
pub fn linear<'d>(
    dev: &Device,
    x: &Act,
    rows: usize,
    outs: &mut [Linear<'_>],
    segments: Segments<'_>,
    delta: &(dyn Fn(usize, usize) -> Option<&'d Delta> + Sync),
    scratch: &mut LoraScratch,
) {
    dev.count_op();
    check(x, rows, outs, segments, scratch);
    if rows == 0 {
        return;
    }
    let changed = scratch.plan(dev, outs, segments, delta);
    let cut = Cut::new(dev, rows, outs);
    let call = Call {
        isa: dev.isa(),
        x,
        sites: std::array::from_fn(|i| outs.get_mut(i).map(|out| Site::new(x, out, changed[i]))),
        segments,
        delta,
        u: Shared::of(&mut scratch.u),
        shrunk: AtomicUsize::new(0),
        rows_max: scratch.rows_max,
        rank_max: scratch.rank_max,
    };
    let pieces = &scratch.pieces;
    // Every thread claims tasks in turn, so it can guess its next one and have those weights on
    // their way.
    let threads = dev.threads();
    let (shrinks, failed) = (pieces.len(), dev.failed());
    dev.fork(shrinks + cut.tasks(), &|task| {
        if task < shrinks {
            let after = pieces.get(task + threads).map_or(std::ptr::null(), |p| call.place_a(p));
            // SAFETY: `check` and `plan` bound rows and ranks; pieces are disjoint in u.
            unsafe { call.shrink(&pieces[task], after) };
            call.shrunk.fetch_add(1, Ordering::Release);
            return;
        }
        let task = task - shrinks;
        let next = task + threads;
        let after = if next < cut.tasks() {
            let (i, _, blocks) = cut.task(next);
            call.site(i).weight.block(blocks.start)
        } else {
            std::ptr::null()
        };
        let (i, rows, blocks) = cut.task(task);
        let u_is_made = || call.wait_for_u(shrinks, failed);
        // SAFETY: shapes are checked; u is read after `u_is_made` only; tasks are disjoint in y.
        unsafe { call.product(i, rows, blocks, after, &u_is_made) };
    });
}

fn check(x: &Act, rows: usize, outs: &[Linear<'_>], segments: Segments<'_>, scratch: &LoraScratch) {
    segments.check(rows);
    assert!((1..=SITES_MAX).contains(&outs.len()), "{} sites in one call", outs.len());
    assert!(rows <= x.rows_max(), "{rows} rows of x's {}", x.rows_max());
    assert!(rows <= scratch.rows_max, "{rows} rows, scratch for {}", scratch.rows_max);
    for (i, out) in outs.iter().enumerate() {
        let (outputs, inputs) = (out.weight.outputs(), out.weight.inputs());
        assert_eq!(inputs, x.width(), "site {i}: W is [{outputs}, {inputs}]");
        assert!(out.y.len() >= rows * outputs, "site {i}: y holds {rows} rows of {outputs}");
        assert!(out.bias.is_none_or(|b| b.len() == outputs), "site {i}: bias has {outputs} values");
    }
}

impl LoraScratch {
    /// Lists the pieces of the first fork, and says which sites any delta changes.
    fn plan(
        &mut self,
        dev: &Device,
        outs: &[Linear<'_>],
        segments: Segments<'_>,
        delta: DeltaOf<'_, '_>,
    ) -> [bool; SITES_MAX] {
        self.pieces.clear();
        let mut changed = [false; SITES_MAX];
        let mut ranks = 0;
        for (i, out) in outs.iter().enumerate() {
            for g in 0..segments.count() {
                let Some(delta) = delta(i, g) else { continue };
                self.check_delta(delta, out.weight, i, g);
                changed[i] = true;
                ranks += delta.rank() * segments.rows(g).len().div_ceil(PIECE_ROWS);
            }
        }
        let wanted = (PIECES_PER_THREAD * dev.threads()).min(PIECES);
        let span = (ranks / wanted).clamp(PIECE_RANKS_MIN, PIECE_RANKS);
        let span = span.next_multiple_of(PIECE_RANKS_MIN);
        for i in (0..outs.len()).filter(|&i| changed[i]) {
            for g in 0..segments.count() {
                if let Some(delta) = delta(i, g) {
                    self.pieces.extend(pieces(i, g, segments.rows(g), delta.rank(), span));
                }
            }
        }
        changed
    }

    fn check_delta(&self, delta: &Delta, weight: &Matrix, i: usize, g: usize) {
        let (outputs, inputs) = (weight.outputs(), weight.inputs());
        assert!(
            delta.outputs() == outputs && delta.inputs() == inputs,
            "site {i}, segment {g}: a delta of [{}, {}] on W [{outputs}, {inputs}]",
            delta.outputs(),
            delta.inputs(),
        );
        assert!(
            delta.rank() <= self.rank_max,
            "rank {}, scratch for {}",
            delta.rank(),
            self.rank_max
        );
    }
}

/// Cuts the rows of one segment at one site into pieces of at most `PIECE_ROWS` rows by `span`
/// ranks.
fn pieces(
    site: usize,
    segment: usize,
    rows: Range<usize>,
    rank: usize,
    span: usize,
) -> impl Iterator<Item = Piece> {
    let row_parts = rows.len().div_ceil(PIECE_ROWS);
    let parts = rank.div_ceil(span);
    (0..row_parts * parts).map(move |index| {
        let r = part(rows.len(), row_parts, index / parts);
        let start = index % parts * span;
        Piece {
            site: site as u32,
            segment: segment as u32,
            rows: [(rows.start + r.start) as u32, (rows.start + r.end) as u32],
            ranks: [start as u32, (start + span).min(rank) as u32],
        }
    })
}

/// One call, as its tasks see it.
struct Call<'c, 'd> {
    isa: Isa,
    x: &'c Act,
    sites: [Option<Site<'c>>; SITES_MAX],
    segments: Segments<'c>,
    delta: DeltaOf<'c, 'd>,
    u: Shared<f32>,
    /// Pieces of u that are made.
    shrunk: AtomicUsize,
    rows_max: usize,
    rank_max: usize,
}

impl<'d> Call<'_, 'd> {
    fn site(&self, i: usize) -> &Site<'_> {
        self.sites[i].as_ref().expect("tasks name existing sites")
    }

    /// Row 0 of a site's u.
    fn u(&self, i: usize) -> *mut f32 {
        self.u.get().wrapping_add(i * self.rows_max * self.rank_max)
    }

    fn delta_of(&self, piece: &Piece) -> &'d Delta {
        let delta = (self.delta)(piece.site as usize, piece.segment as usize);
        delta.expect("a piece has a delta")
    }

    fn place_a(&self, piece: &Piece) -> *const u8 {
        self.delta_of(piece).place_a(piece.ranks[0] as usize)
    }

    unsafe fn shrink(&self, piece: &Piece, after: *const u8) {
        let (x, x_stride) = self.x.wide();
        let at = Shrink {
            x: x.as_ptr(),
            x_stride,
            rows: piece.rows[0] as usize..piece.rows[1] as usize,
            ranks: piece.ranks[0] as usize..piece.ranks[1] as usize,
            u: self.u(piece.site as usize),
            u_stride: self.rank_max,
            after,
        };
        self.delta_of(piece).shrink(self.isa, at);
    }

    /// Waits for the last pieces of u, which other threads are at. False when one of them panicked.
    fn wait_for_u(&self, shrinks: usize, failed: &AtomicBool) -> bool {
        const POLLS_MAX: usize = 10_000;
        let mut polls = 0;
        while self.shrunk.load(Ordering::Acquire) < shrinks {
            if failed.load(Ordering::Acquire) {
                return false;
            }
            if polls < POLLS_MAX {
                polls += 1;
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        true
    }

    /// y of some rows and output blocks of a site, finished once `u_is_made`.
    unsafe fn product(
        &self,
        i: usize,
        rows: Range<usize>,
        blocks: Range<usize>,
        after: *const u32,
        u_is_made: &dyn Fn() -> bool,
    ) {
        let site = self.site(i);
        if !site.changed {
            return site.run(self.isa, rows, blocks, after);
        }
        let most = (STRETCH / rows.len()).max(1);
        for start in blocks.clone().step_by(most) {
            let end = blocks.end.min(start + most);
            let after = if end < blocks.end { site.weight.block(end) } else { after };
            site.run(self.isa, rows.clone(), start..end, after);
            if !u_is_made() {
                return;
            }
            self.finish(i, rows.clone(), start..end);
        }
    }

    /// Adds the deltas of the segments among `rows`, and the bias, to x·Wᵀ.
    unsafe fn finish(&self, i: usize, rows: Range<usize>, blocks: Range<usize>) {
        let segments = self.segments;
        let mut row = rows.start;
        let mut next = segments.of_row(row).unwrap_or(segments.count());
        while row < rows.end {
            let g = next;
            next += 1;
            let end =
                if g < segments.count() { segments.rows(g).end.min(rows.end) } else { rows.end };
            let delta_of = |g: usize| (g < segments.count()).then(|| (self.delta)(i, g)).flatten();
            self.expand(i, row..end, blocks.clone(), delta_of(g), delta_of(next));
            row = end;
        }
    }

    unsafe fn expand(
        &self,
        i: usize,
        rows: Range<usize>,
        blocks: Range<usize>,
        delta: Option<&Delta>,
        next: Option<&Delta>,
    ) {
        let site = self.site(i);
        if delta.is_none() && site.bias.is_none() {
            return;
        }
        let after = next.map_or(std::ptr::null(), |next| next.place_b(blocks.start));
        let at = Expand {
            u: self.u(i),
            u_stride: self.rank_max,
            rows,
            blocks,
            y: site.y.get(),
            outputs: site.weight.outputs(),
            bias: site.bias,
            after,
        };
        Delta::expand(delta, self.isa, at);
    }
}
