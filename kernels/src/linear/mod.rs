//! y = gain ∘ (x·Wᵀ + (x·Aᵀ)·Bᵀ) + delta.bias + bias,   one to three sites that read the same x.
//!
//! x `[T, I]`   W `[O, I]`   y `[T, O]`   and for every segment g its own A `[R, I]`, B `[O, R]`
//! (scale folded in), gain `[O]`, bias `[O]`. Rows without a delta are x·Wᵀ + bias and cost nothing
//! beyond it. A segment may have several weighted deltas ([`linear_sum`]):
//! y = x·Wᵀ + Σ w·((x·Aᵀ)·Bᵀ + delta.bias) + bias, each a change of the same rows by the same code;
//! their u lie side by side.
//!
//! One fork, whatever the number of adapters, ranks and sites: u = x·Aᵀ of every (site, segment),
//! and, output block by output block, x·Wᵀ and on top of it u·Bᵀ of every segment ([`call`] says in
//! which order). Tasks are ranges of outputs (and rows, if many), never of a reduction, so any
//! popularity of adapters spreads evenly.
//!
//! Numerics: sums in f32. W·x is one chain over the inputs in order (fused multiply-add; with
//! `vdpbf16ps` a pair at a time). u is 16 chains (inputs i, i+16, …) joined in one order. The delta
//! is added on top of x·Wᵀ rank by rank, its weight multiplied into u. Integer weights multiply x
//! rounded once to 8 bits in groups of 32 ([`ints`], [`Act`]), all others the f32 x; u is f32. But
//! a CPU with `vdpbf16ps` multiplies bf16 weights by x rounded once to bf16, and beside them bf16
//! factors as well: x, and u, are rounded for those.

mod base;
mod call;
mod delta;
mod expand;
mod floats;
mod halves;
mod ints;
mod lines;
mod shrink;
mod tile;

use std::ops::Range;
use std::sync::atomic::AtomicUsize;

use crate::act::Act;
use crate::buffer::Buffer;
use crate::device::{Device, part};
use crate::linear::lines::LINE;
use crate::matrix::{BLOCK, Matrix};
use crate::segments::Segments;
use crate::simd::{Kernel, Simd};
use base::{Cut, Site};
use call::Call;
pub use delta::Delta;

/// Sites of one call at most.
pub const SITES_MAX: usize = 3;
/// Weighted deltas of one segment at most.
pub const PARTS_MAX: usize = 8;
/// So few rows are one tile high: they read weights and factors once, as a stream.
const FEW_ROWS: usize = 6;
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

/// Takes a delta and its weight.
pub type Add<'c, 'd> = &'c mut dyn FnMut(&'d Delta, f32);

/// Tells, by site and segment, the deltas that the segment's rows have there.
type Deltas<'c, 'd> = &'c dyn Fn(usize, usize, Add<'_, 'd>);

/// A delta of one site and the rows it changes. Looked up once a call: a delta's own page has left
/// the caches since the last step, and many tasks ask for it.
#[derive(Clone, Copy)]
struct Change {
    delta: *const Delta,
    weight: f32,
    rows: [u32; 2],
    /// Where its ranks start in the rows of u.
    column: u32,
    /// No other change of the same rows comes after it.
    last: bool,
    /// Its products are of bf16 pairs: it reads x rounded, and its u is rounded.
    pairs: bool,
    /// B, where it is of bf16 and all that is added; else null.
    words: *const u32,
    rank: u32,
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

    /// Words of B of a whole block of outputs.
    #[inline(always)]
    fn block_words(&self) -> usize {
        self.rank.div_ceil(2) as usize * BLOCK
    }

    /// B of a block, those before it whole; `words` is not null.
    #[inline(always)]
    fn block(&self, block: usize) -> *const u32 {
        self.words.wrapping_add(block * self.block_words())
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
    /// By task of the base product: who is to add its deltas.
    left_by: Vec<AtomicUsize>,
    rows_max: usize,
    rank_max: usize,
}

impl LoraScratch {
    /// For steps of at most `rows_max` rows, and ranks of a row's deltas of at most `rank_max` in
    /// sum.
    pub fn new(rows_max: usize, rank_max: usize) -> LoraScratch {
        // Rows of u start at a cache line of their own.
        let u_stride = rank_max.next_multiple_of(PIECE_RANKS);
        LoraScratch {
            u: Buffer::zeroed(SITES_MAX * rows_max * u_stride),
            u_stride,
            changes: Vec::with_capacity(SITES_MAX * rows_max * PARTS_MAX),
            firsts: [0; SITES_MAX + 1],
            pieces: Vec::with_capacity(rows_max * pieces_max(rank_max)),
            left_by: Vec::new(),
            rows_max,
            rank_max,
        }
    }

    /// Bytes that each row takes.
    pub fn row_bytes(rank_max: usize) -> usize {
        let u = SITES_MAX * rank_max.next_multiple_of(PIECE_RANKS) * size_of::<f32>();
        let changes = SITES_MAX * PARTS_MAX * size_of::<Change>();
        u + changes + pieces_max(rank_max) * size_of::<Piece>()
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
/// scratch has; on an x without the copy that W reads (bf16, bytes).
pub fn linear<'d>(
    dev: &Device,
    x: &Act,
    rows: usize,
    outs: &mut [Linear<'_>],
    segments: Segments<'_>,
    delta: &dyn Fn(usize, usize) -> Option<&'d Delta>,
    scratch: &mut LoraScratch,
) {
    let alone = |i: usize, g: usize, add: Add<'_, 'd>| {
        if let Some(delta) = delta(i, g) {
            add(delta, 1.0);
        }
    };
    linear_sum(dev, x, rows, outs, segments, &alone, scratch);
}

/// The same for segments with several weighted deltas: `deltas(i, g, add)` adds those that the rows
/// of segment `g` have at output `i`, in the order in which they are summed. One delta of weight 1
/// gives the very bits of [`linear`].
///
/// # Panics
/// As [`linear`]; on more than [`PARTS_MAX`] deltas of a segment, and on a gain whose delta is not
/// alone with weight 1 (what it means then is not a sum).
pub fn linear_sum<'d>(
    dev: &Device,
    x: &Act,
    rows: usize,
    outs: &mut [Linear<'_>],
    segments: Segments<'_>,
    deltas: &dyn Fn(usize, usize, Add<'_, 'd>),
    scratch: &mut LoraScratch,
) {
    dev.count_op();
    check(x, rows, outs, segments, scratch);
    if rows == 0 {
        return;
    }
    scratch.plan(dev, x, outs, segments, deltas);
    let cut = Cut::new(dev, rows, outs);
    let sites = std::array::from_fn(|i| {
        let changed = scratch.firsts[i] < scratch.firsts[i + 1];
        outs.get_mut(i).map(|out| Site::new(dev.isa(), x, out, changed))
    });
    let rounds = outs.iter().any(|out| out.weight.dtype().group().is_some());
    let outliers = rounds.then(|| x.outliers(rows));
    let outliers = outliers.as_deref().map_or(&[][..], Vec::as_slice);
    Call::new(dev, x, outliers, sites, &cut, scratch).run(dev);
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
        x: &Act,
        outs: &[Linear<'_>],
        segments: Segments<'_>,
        deltas: Deltas<'_, '_>,
    ) {
        // SAFETY: only addresses of living deltas.
        unsafe { dev.isa().run(Ask { sites: outs.len(), segments: segments.count(), deltas }) };
        let x_has_pairs = x.halves().is_some() && dev.isa().multiplies_pairs();
        self.changes.clear();
        self.pieces.clear();
        let tasks = Cut::tasks_max(dev);
        if self.left_by.len() < tasks {
            self.left_by.resize_with(tasks, AtomicUsize::default);
        }
        for i in 0..SITES_MAX {
            let Some(out) = outs.get(i) else {
                self.firsts[i + 1] = self.changes.len();
                continue;
            };
            for g in 0..segments.count() {
                let (first, mut column) = (self.changes.len(), 0);
                deltas(i, g, &mut |delta, weight| {
                    check_delta(delta, out.weight, i, g);
                    let rows = segments.rows(g);
                    let change = self.changes.len();
                    self.pieces.extend(pieces(i, change, rows.clone(), delta.rank()));
                    let rows = [rows.start as u32, rows.end as u32];
                    self.changes.push(Change {
                        delta,
                        weight,
                        rows,
                        column,
                        last: false,
                        pairs: x_has_pairs && delta.has_pairs(),
                        words: delta.plain_words(),
                        rank: delta.rank() as u32,
                    });
                    column += delta.rank() as u32;
                });
                let most = self.rank_max;
                assert!(column as usize <= most, "rank {column}, scratch for {most}");
                self.end_segment(first);
            }
            self.firsts[i + 1] = self.changes.len();
        }
    }

    /// The changes from `first` on are all that their rows have at a site.
    fn end_segment(&mut self, first: usize) {
        let of_rows = &mut self.changes[first..];
        assert!(of_rows.len() <= PARTS_MAX, "{} deltas, at most {PARTS_MAX}", of_rows.len());
        let alone = of_rows.len() == 1 && of_rows[0].weight == 1.0;
        // SAFETY: within the call that listed them.
        let gained = of_rows.iter().any(|change| unsafe { change.delta() }.has_gain());
        assert!(alone || !gained, "a gain is of a delta alone");
        if let Some(last) = of_rows.last_mut() {
            last.last = true;
        }
    }
}

/// Asks for the deltas' own pages, all at once: they have left the caches since the last step, and
/// the plan looks at one after the other.
struct Ask<'c, 'd> {
    sites: usize,
    segments: usize,
    deltas: Deltas<'c, 'd>,
}

impl Kernel for Ask<'_, '_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for i in 0..self.sites {
            for g in 0..self.segments {
                (self.deltas)(i, g, &mut |delta, _| {
                    let page = (&raw const *delta).cast::<u8>();
                    for at in (0..size_of::<Delta>()).step_by(LINE) {
                        S::prefetch(page.wrapping_add(at));
                    }
                });
            }
        }
    }
}

fn check_delta(delta: &Delta, weight: &Matrix, i: usize, g: usize) {
    let (outputs, inputs) = (weight.outputs(), weight.inputs());
    assert!(
        delta.outputs() == outputs && delta.inputs() == inputs,
        "site {i}, segment {g}: a delta of [{}, {}] on W [{outputs}, {inputs}]",
        delta.outputs(),
        delta.inputs(),
    );
}

/// Pieces of u by row, at most: a segment has a row at least, so chunks of rows never outnumber
/// rows; each delta may end in a piece that is not full.
fn pieces_max(rank_max: usize) -> usize {
    SITES_MAX * (rank_max.div_ceil(PIECE_RANKS) + PARTS_MAX - 1)
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
