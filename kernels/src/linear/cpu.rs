//! [`super::linear`] on the CPU: what it plans, and the memory that takes.
//!
//! One fork, whatever the number of adapters, ranks and sites: u = x·Aᵀ of every (site, segment),
//! and, output block by output block, x·Wᵀ and on top of it u·Bᵀ of every segment
//! ([`super::call`] says in which order). Tasks are ranges of outputs (and rows, if many), never of
//! a reduction, so any popularity of adapters spreads evenly.

use std::ops::Range;
use std::sync::atomic::AtomicUsize;

use crate::act::cpu::Act;
use crate::buffer::Buffer;
use crate::device::{Cpu, part};
use crate::linear::base::{Cut, Site};
use crate::linear::call::Call;
use crate::linear::delta::Delta;
use crate::linear::lines::LINE;
use crate::linear::{Linear, PARTS_MAX, SITES_MAX, check_delta, check_ranks};
use crate::matrix::BLOCK;
use crate::segments::Segments;
use crate::simd::{Kernel, Simd};

/// So few rows are one tile high: they read weights and factors once, as a stream.
pub(super) const FEW_ROWS: usize = 6;
/// Rows and ranks of a piece of u at most. Sixteen ranks of a row are a cache line, which two
/// threads should not write.
const PIECE_ROWS: usize = 32;
const PIECE_RANKS: usize = 16;
/// Turns a thread takes, at most, to make its share of u.
pub(super) const TURNS_PER_THREAD: usize = 4;
/// Rows times blocks whose y (256 bytes each) the deltas are added to while it is near.
pub(super) const STRETCH: usize = 1024;

/// The sites of a call.
pub(super) type Sites<'a> = [Option<Site<'a>>; SITES_MAX];

/// A delta of one site and the rows it changes. Looked up once a call: a delta's own page has left
/// the caches since the last step, and many tasks ask for it.
#[derive(Clone, Copy)]
pub(super) struct Change {
    delta: *const Delta,
    pub(super) weight: f32,
    rows: [u32; 2],
    /// Where its ranks start in the rows of u.
    pub(super) column: u32,
    /// No other change of the same rows comes after it.
    pub(super) last: bool,
    /// Its products are of bf16 pairs: it reads x rounded, and its u is rounded.
    pub(super) pairs: bool,
    /// B, where it is of bf16 and all that is added; else null.
    pub(super) words: *const u32,
    pub(super) rank: u32,
}

// SAFETY: a delta is immutable, and its owner outlives the call that listed it.
unsafe impl Send for Change {}
unsafe impl Sync for Change {}

impl Change {
    /// # Safety
    /// Within the call that listed it.
    #[inline(always)]
    pub(super) unsafe fn delta(&self) -> &Delta {
        &*self.delta
    }

    #[inline(always)]
    pub(super) fn rows(&self) -> Range<usize> {
        self.rows[0] as usize..self.rows[1] as usize
    }

    /// Words of B of a whole block of outputs.
    #[inline(always)]
    pub(super) fn block_words(&self) -> usize {
        self.rank.div_ceil(2) as usize * BLOCK
    }

    /// B of a block, those before it whole; `words` is not null.
    #[inline(always)]
    pub(super) fn block(&self, block: usize) -> *const u32 {
        self.words.wrapping_add(block * self.block_words())
    }
}

/// A piece of u: some rows of one change of a site, and some ranks.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub(super) site: u32,
    pub(super) change: u32,
    pub(super) rows: [u32; 2],
    pub(super) ranks: [u32; 2],
}

/// Memory of [`linear`], taken once.
pub(super) struct Scratch {
    /// `[SITES_MAX, rows_max, u_stride]`
    pub(super) u: Buffer<f32>,
    pub(super) u_stride: usize,
    /// Of all sites, site by site, by rows; where each site's start.
    pub(super) changes: Vec<Change>,
    pub(super) firsts: [usize; SITES_MAX + 1],
    pub(super) pieces: Vec<Piece>,
    /// By task of the base product: who is to add its deltas.
    pub(super) left_by: Vec<AtomicUsize>,
    pub(super) rows_max: usize,
    rank_max: usize,
}

impl Scratch {
    /// For steps of at most `rows_max` rows, and ranks of a row's deltas of at most `rank_max` in
    /// sum.
    pub(super) fn new(rows_max: usize, rank_max: usize) -> Scratch {
        // Rows of u start at a cache line of their own.
        let u_stride = rank_max.next_multiple_of(PIECE_RANKS);
        Scratch {
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
    pub(super) fn row_bytes(rank_max: usize) -> usize {
        let u = SITES_MAX * rank_max.next_multiple_of(PIECE_RANKS) * size_of::<f32>();
        let changes = SITES_MAX * PARTS_MAX * size_of::<Change>();
        u + changes + pieces_max(rank_max) * size_of::<Piece>()
    }
}

/// See [`super::linear`]; shapes are checked but for the deltas'.
pub(super) fn linear(
    cpu: &Cpu,
    x: &Act,
    rows: usize,
    outs: &mut [Linear<'_>],
    segments: Segments<'_>,
    scratch: &mut Scratch,
) {
    cpu.count_op();
    if rows == 0 {
        return;
    }
    scratch.plan(cpu, x, outs, segments);
    let rounds = outs.iter().any(|out| out.weight.dtype().group().is_some());
    let outliers = rounds.then(|| x.outliers(rows));
    let outliers = outliers.as_deref().map_or(&[][..], Vec::as_slice);
    let sites: Sites<'_> = std::array::from_fn(|i| {
        let changed = scratch.firsts[i] < scratch.firsts[i + 1];
        outs.get_mut(i).map(|out| Site::new(cpu.isa(), x, out, changed))
    });
    let cut = Cut::new(cpu, rows, &sites);
    Call::new(cpu, x, outliers, sites, &cut, scratch).run(cpu);
}

impl Scratch {
    /// Lists the changes of every site and the pieces of u.
    fn plan(&mut self, cpu: &Cpu, x: &Act, outs: &[Linear<'_>], segments: Segments<'_>) {
        // SAFETY: only addresses of living deltas.
        unsafe { cpu.isa().run(Ask { outs, segments }) };
        let x_has_pairs = x.halves().is_some() && cpu.isa().multiplies_pairs();
        self.changes.clear();
        self.pieces.clear();
        let tasks = Cut::tasks_max(cpu);
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
                let rows = segments.rows(g);
                for (delta, weight) in segments.deltas(g, out.site) {
                    check_delta(delta, out.weight, i, g);
                    let (delta, change) = (delta.on().cpu(), self.changes.len());
                    self.pieces.extend(pieces(i, change, rows.clone(), delta.rank()));
                    self.changes.push(Change {
                        delta,
                        weight,
                        rows: [rows.start as u32, rows.end as u32],
                        column,
                        last: false,
                        pairs: x_has_pairs && delta.has_pairs(),
                        words: delta.plain_words(),
                        rank: delta.rank() as u32,
                    });
                    column += delta.rank() as u32;
                }
                check_ranks(column as usize, self.rank_max);
                self.end_segment(first);
            }
            self.firsts[i + 1] = self.changes.len();
        }
    }

    /// The changes from `first` on are all that their rows have at a site.
    fn end_segment(&mut self, first: usize) {
        let of_rows = &mut self.changes[first..];
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
struct Ask<'c, 'o> {
    outs: &'c [Linear<'o>],
    segments: Segments<'c>,
}

impl Kernel for Ask<'_, '_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for out in self.outs {
            for g in 0..self.segments.count() {
                for (delta, _) in self.segments.deltas(g, out.site) {
                    let page = (&raw const *delta).cast::<u8>();
                    for at in (0..size_of::<Delta>()).step_by(LINE) {
                        S::prefetch(page.wrapping_add(at));
                    }
                }
            }
        }
    }
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
