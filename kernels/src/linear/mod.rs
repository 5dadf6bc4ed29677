//! y = gain ∘ (x·Wᵀ + (x·Aᵀ)·Bᵀ) + delta.bias + bias,   one to three sites that read the same x.
//!
//! x `[T, I]`   W `[O, I]`   y `[T, O]`   and for every segment g its own A `[R, I]`, B `[O, R]` (scale folded in), gain `[O]`, bias `[O]`.
//! Rows without a delta are x·Wᵀ + bias and cost nothing beyond it.
//!
//! Two forks, whatever the number of adapters, ranks and sites (one when no row has a delta): first
//! the base product of every site beside u = x·Aᵀ of every (site, segment), which both only read x;
//! then y += u·Bᵀ, gains and biases. Work is cut into pieces over outputs, ranks and rows, never
//! over a reduction, and claimed piece by piece.
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

use crate::act::Act;
use crate::buffer::{Buffer, Shared};
use crate::device::{Device, part};
use crate::matrix::Matrix;
use crate::segments::Segments;
pub use delta::Delta;
use expand::Expand;
use shrink::Shrink;

/// Sites of one call at most.
pub const SITES_MAX: usize = 3;
/// Rows and ranks of one piece of a delta.
const PIECE_ROWS: usize = 32;
const PIECE_RANKS: usize = 64;
/// Factor values of one expand piece, and how many such pieces a site may have.
const PIECE_VALUES: usize = 16384;
const PIECES_MAX: usize = 16;
/// Tasks of the base product per thread: enough that a late thread delays the fork by little.
const TASKS_PER_THREAD: usize = 8;

/// One site: y = x·Wᵀ (+ segment deltas) (+ bias). `y` is `[T, O]`.
pub struct Linear<'a> {
    pub weight: &'a Matrix,
    pub bias: Option<&'a [f32]>,
    pub y: &'a mut [f32],
}

/// A piece of the segments' work: some rows of one segment at one site, and a range of ranks or
/// output blocks.
#[derive(Clone, Copy)]
struct Piece {
    site: u32,
    /// `u32::MAX` for rows that only want the bias.
    segment: u32,
    rows: [u32; 2],
    span: [u32; 2],
}

/// Memory of [`linear`] between its forks, taken once.
pub struct LoraScratch {
    /// `[SITES_MAX, rows_max, rank_max]`
    u: Buffer<f32>,
    shrink: Vec<Piece>,
    expand: Vec<Piece>,
    rows_max: usize,
    rank_max: usize,
}

impl LoraScratch {
    /// For steps of at most `rows_max` rows and adapters of rank at most `rank_max`.
    pub fn new(rows_max: usize, rank_max: usize) -> LoraScratch {
        // A segment has a row at least, so chunks of rows never outnumber rows; base rows add one.
        let chunks = SITES_MAX * (rows_max + 1);
        LoraScratch {
            u: Buffer::zeroed(SITES_MAX * rows_max * rank_max),
            shrink: Vec::with_capacity(chunks * rank_max.div_ceil(PIECE_RANKS)),
            expand: Vec::with_capacity(chunks * PIECES_MAX),
            rows_max,
            rank_max,
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.u.bytes() + (self.shrink.capacity() + self.expand.capacity()) * size_of::<Piece>()
    }

    /// u of `site`: pointer to row 0.
    fn u(u: Shared<f32>, site: usize, rows_max: usize, rank_max: usize) -> *mut f32 {
        u.get().wrapping_add(site * rows_max * rank_max)
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
    let late_bias = scratch.plan(rows, outs, segments, delta);
    let u = Shared::of(&mut scratch.u);
    let (rows_max, rank_max) = (scratch.rows_max, scratch.rank_max);
    let (shrink, expand) = (&scratch.shrink, &scratch.expand);
    let (wide, wide_stride) = x.wide();
    let (isa, threads) = (dev.isa(), dev.threads());

    let cut = base::Cut::new(dev, rows, outs);
    let sites: [Option<base::Site>; SITES_MAX] =
        std::array::from_fn(|i| outs.get_mut(i).map(|out| base::Site::new(x, out, late_bias[i])));
    let site = |i: usize| sites[i].as_ref().expect("pieces name existing sites");

    // The base's pieces are the longer: they have the high numbers, which start first. Tasks are
    // claimed downwards by every thread in turn, so a thread can guess its next one and have its
    // weights on their way.
    let place = |task: usize| match shrink.get(task) {
        Some(piece) => {
            piece.delta(delta).map_or(std::ptr::null(), |d| d.place_a(piece.span().start))
        }
        None => {
            let (i, _, blocks) = cut.task(task - shrink.len());
            site(i).weight.block(blocks.start).cast()
        }
    };
    dev.fork(shrink.len() + cut.tasks(), &|task| {
        let after = task.checked_sub(threads).map_or(std::ptr::null(), place);
        if let Some(piece) = shrink.get(task) {
            let at = Shrink {
                x: wide.as_ptr(),
                x_stride: wide_stride,
                rows: piece.rows(),
                ranks: piece.span(),
                u: LoraScratch::u(u, piece.site as usize, rows_max, rank_max),
                u_stride: rank_max,
                after,
            };
            let delta = piece.delta(delta).expect("shrink pieces have a delta");
            // SAFETY: the checks above bound rows and ranks; pieces are disjoint in u.
            unsafe { delta.shrink(isa, at) };
        } else {
            let (i, rows, blocks) = cut.task(task - shrink.len());
            // SAFETY: shapes are checked, tasks are disjoint in y.
            unsafe { site(i).run(isa, rows, blocks, after.cast()) };
        }
    });
    let place = |task: usize| {
        let piece = &expand[task];
        piece.delta(delta).map_or(std::ptr::null(), |d| d.place_b(piece.span().start))
    };
    dev.fork(expand.len(), &|task| {
        let piece = &expand[task];
        let i = piece.site as usize;
        let at = Expand {
            u: LoraScratch::u(u, i, rows_max, rank_max),
            u_stride: rank_max,
            rows: piece.rows(),
            blocks: piece.span(),
            y: site(i).y.get(),
            outputs: site(i).weight.outputs(),
            bias: if late_bias[i] { site(i).bias } else { None },
            after: task.checked_sub(threads).map_or(std::ptr::null(), place),
        };
        // SAFETY: as above; pieces are disjoint in y, and u was written by the fork before.
        unsafe { Delta::expand(piece.delta(delta), isa, at) };
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
    /// Lists the pieces of both forks, and says for which sites the second one adds the bias: where
    /// a gain may stand between product and bias, so where any row has a delta.
    fn plan<'d>(
        &mut self,
        rows: usize,
        outs: &[Linear<'_>],
        segments: Segments<'_>,
        delta: &(dyn Fn(usize, usize) -> Option<&'d Delta> + Sync),
    ) -> [bool; SITES_MAX] {
        self.shrink.clear();
        self.expand.clear();
        let mut late_bias = [false; SITES_MAX];
        for (i, out) in outs.iter().enumerate() {
            let (outputs, inputs) = (out.weight.outputs(), out.weight.inputs());
            let blocks = out.weight.blocks();
            let found = (0..segments.count()).any(|g| delta(i, g).is_some());
            late_bias[i] = found && out.bias.is_some();
            if !found {
                continue;
            }
            for g in 0..segments.count() {
                let rows = segments.rows(g);
                let Some(delta) = delta(i, g) else {
                    if late_bias[i] {
                        self.expand.extend(pieces(i, None, rows, blocks, blocks));
                    }
                    continue;
                };
                assert!(
                    delta.outputs() == outputs && delta.inputs() == inputs,
                    "site {i}, segment {g}: a delta of [{}, {}] on W [{outputs}, {inputs}]",
                    delta.outputs(),
                    delta.inputs(),
                );
                let rank = delta.rank();
                assert!(rank <= self.rank_max, "rank {rank}, scratch for {}", self.rank_max);
                self.shrink.extend(pieces(i, Some(g), rows.clone(), rank, PIECE_RANKS));
                let span = (PIECE_VALUES / (rank.max(1) * crate::matrix::BLOCK)).max(1);
                let span = span.max(blocks.div_ceil(PIECES_MAX));
                self.expand.extend(pieces(i, Some(g), rows, blocks, span));
            }
            let base_rows = segments.indptr[segments.count()] as usize..rows;
            if late_bias[i] && !base_rows.is_empty() {
                self.expand.extend(pieces(i, None, base_rows, blocks, blocks));
            }
        }
        late_bias
    }
}

/// Cuts the rows of one segment at one site into pieces of `PIECE_ROWS` rows by `span` of
/// `0..count`.
fn pieces(
    site: usize,
    segment: Option<usize>,
    rows: Range<usize>,
    count: usize,
    span: usize,
) -> impl Iterator<Item = Piece> {
    let row_parts = rows.len().div_ceil(PIECE_ROWS);
    let parts = count.div_ceil(span);
    (0..row_parts * parts).map(move |index| {
        let r = part(rows.len(), row_parts, index / parts);
        let s = part(count, parts, index % parts);
        Piece {
            site: site as u32,
            segment: segment.map_or(u32::MAX, |g| g as u32),
            rows: [(rows.start + r.start) as u32, (rows.start + r.end) as u32],
            span: [s.start as u32, s.end as u32],
        }
    })
}

impl Piece {
    fn rows(&self) -> Range<usize> {
        self.rows[0] as usize..self.rows[1] as usize
    }

    fn span(&self) -> Range<usize> {
        self.span[0] as usize..self.span[1] as usize
    }

    fn delta<'d>(
        &self,
        delta: &(dyn Fn(usize, usize) -> Option<&'d Delta> + Sync),
    ) -> Option<&'d Delta> {
        (self.segment != u32::MAX)
            .then(|| delta(self.site as usize, self.segment as usize))
            .flatten()
    }
}
