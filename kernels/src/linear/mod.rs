//! y = gain ∘ (x·Wᵀ + (x·Aᵀ)·Bᵀ) + delta.bias + bias,   one to three sites that read the same x.
//!
//! x `[T, I]`   W `[O, I]`   y `[T, O]`   and for every segment g its own A `[R, I]`, B `[O, R]`
//! (scale folded in), gain `[O]`, bias `[O]`. Rows without a delta are x·Wᵀ + bias and cost nothing
//! beyond it.
//!
//! One fork, whatever the number of adapters, ranks and sites: u = x·Aᵀ of every (site, segment),
//! and, output block by output block, x·Wᵀ and on top of it u·Bᵀ of every segment ([`call`] says in
//! which order). Tasks are ranges of outputs (and rows, if many), never of a reduction, so any
//! popularity of adapters spreads evenly.
//!
//! Numerics: sums in f32. W·x is one chain over the inputs in order (fused multiply-add; with
//! `vdpbf16ps` a pair at a time). u is 16 chains (inputs i, i+16, …) joined in one order. The delta
//! is added on top of x·Wᵀ rank by rank. With bf16 weights W multiplies x rounded once to bf16; A
//! multiplies the f32 x; u stays f32.

mod base;
mod call;
mod delta;
mod expand;
mod lines;
mod shrink;

use std::ops::Range;
use std::sync::atomic::AtomicU8;

use crate::act::Act;
use crate::buffer::Buffer;
use crate::device::{Device, part};
use crate::matrix::Matrix;
use crate::segments::Segments;
use base::{Cut, Site};
use call::Call;
pub use delta::Delta;

/// Sites of one call at most.
pub const SITES_MAX: usize = 3;
/// Rows and ranks of a piece of u at most. Sixteen ranks of a row are a cache line, which two
/// threads should not write.
const PIECE_ROWS: usize = 32;
const PIECE_RANKS: usize = 16;
/// Turns a thread takes, at most, to make its share of u.
const TURNS_PER_THREAD: usize = 4;
/// Rows times blocks whose y (256 bytes each) the deltas are added to while it is near.
const STRETCH: usize = 1024;

/// One site: y = x·Wᵀ (+ segment deltas) (+ bias). `y` is `[T, O]`.
pub struct Linear<'a> {
    pub weight: &'a Matrix,
    pub bias: Option<&'a [f32]>,
    pub y: &'a mut [f32],
}

/// Which delta the rows of a segment have at a site; `None` leaves them at the base.
type DeltaOf<'c, 'd> = &'c dyn Fn(usize, usize) -> Option<&'d Delta>;

/// A delta of one site and the rows it changes. Looked up once a call: a delta's own page has left
/// the caches since the last step, and many tasks ask for it.
#[derive(Clone, Copy)]
struct Change {
    delta: *const Delta,
    rows: [u32; 2],
}

// SAFETY: a delta is immutable, and its owner outlives the call that listed it.
unsafe impl Send for Change {}
unsafe impl Sync for Change {}

impl Change {
    /// # Safety
    /// Within the call that listed it.
    #[inline(always)]
    unsafe fn delta(&self) -> &Delta {
        &*self.delta
    }

    #[inline(always)]
    fn rows(&self) -> Range<usize> {
        self.rows[0] as usize..self.rows[1] as usize
    }
}

/// A piece of u: some rows of one change of a site, and some ranks.
#[derive(Clone, Copy)]
struct Piece {
    site: u32,
    change: u32,
    rows: [u32; 2],
    ranks: [u32; 2],
}

/// Memory of [`linear`], taken once.
pub struct LoraScratch {
    /// `[SITES_MAX, rows_max, u_stride]`
    u: Buffer<f32>,
    u_stride: usize,
    /// Of all sites, site by site, by rows; where each site's start.
    changes: Vec<Change>,
    firsts: [usize; SITES_MAX + 1],
    pieces: Vec<Piece>,
    /// How far each task of the base product is.
    states: Vec<AtomicU8>,
    rows_max: usize,
    rank_max: usize,
}

impl LoraScratch {
    /// For steps of at most `rows_max` rows and adapters of rank at most `rank_max`.
    pub fn new(rows_max: usize, rank_max: usize) -> LoraScratch {
        // Rows of u start at a cache line of their own.
        let u_stride = rank_max.next_multiple_of(PIECE_RANKS);
        // A segment has a row at least, so chunks of rows never outnumber rows.
        let pieces = SITES_MAX * rows_max * rank_max.div_ceil(PIECE_RANKS);
        LoraScratch {
            u: Buffer::zeroed(SITES_MAX * rows_max * u_stride),
            u_stride,
            changes: Vec::with_capacity(SITES_MAX * rows_max),
            firsts: [0; SITES_MAX + 1],
            pieces: Vec::with_capacity(pieces),
            states: Vec::new(),
            rows_max,
            rank_max,
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.u.bytes()
            + self.changes.capacity() * size_of::<Change>()
            + self.pieces.capacity() * size_of::<Piece>()
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
    delta: &dyn Fn(usize, usize) -> Option<&'d Delta>,
    scratch: &mut LoraScratch,
) {
    dev.count_op();
    check(x, rows, outs, segments, scratch);
    if rows == 0 {
        return;
    }
    scratch.plan(dev, outs, segments, delta);
    let cut = Cut::new(dev, rows, outs);
    let sites = std::array::from_fn(|i| {
        let changed = scratch.firsts[i] < scratch.firsts[i + 1];
        outs.get_mut(i).map(|out| Site::new(x, out, changed))
    });
    Call::new(dev, x, sites, &cut, scratch).run(dev);
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
    /// Lists the changes of every site and the pieces of u.
    fn plan(
        &mut self,
        dev: &Device,
        outs: &[Linear<'_>],
        segments: Segments<'_>,
        delta: DeltaOf<'_, '_>,
    ) {
        self.changes.clear();
        self.pieces.clear();
        let tasks = Cut::tasks_max(dev);
        if self.states.len() < tasks {
            self.states.resize_with(tasks, AtomicU8::default);
        }
        for i in 0..SITES_MAX {
            let Some(out) = outs.get(i) else {
                self.firsts[i + 1] = self.changes.len();
                continue;
            };
            for g in 0..segments.count() {
                let Some(delta) = delta(i, g) else { continue };
                self.check_delta(delta, out.weight, i, g);
                let rows = segments.rows(g);
                let change = self.changes.len();
                self.pieces.extend(pieces(i, change, rows.clone(), delta.rank()));
                let rows = [rows.start as u32, rows.end as u32];
                self.changes.push(Change { delta, rows });
            }
            self.firsts[i + 1] = self.changes.len();
        }
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

/// Cuts the rows of one change into pieces of at most `PIECE_ROWS` rows by `PIECE_RANKS` ranks.
fn pieces(
    site: usize,
    change: usize,
    rows: Range<usize>,
    rank: usize,
) -> impl Iterator<Item = Piece> {
    let row_parts = rows.len().div_ceil(PIECE_ROWS);
    let parts = rank.div_ceil(PIECE_RANKS);
    (0..row_parts * parts).map(move |index| {
        let r = part(rows.len(), row_parts, index / parts);
        let start = index % parts * PIECE_RANKS;
        Piece {
            site: site as u32,
            change: change as u32,
            rows: [(rows.start + r.start) as u32, (rows.start + r.end) as u32],
            ranks: [start as u32, (start + PIECE_RANKS).min(rank) as u32],
        }
    })
}
