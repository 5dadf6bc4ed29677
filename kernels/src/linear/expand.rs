//! y = gain ∘ (y + u·Bᵀ) + w·delta.bias + bias of one change:   u `[T, R]` f32   B `[R, O]` in
//! blocks   y `[T, O]` f32.
//!
//! Lanes over outputs; every output is one chain over the ranks in order, on top of x·Wᵀ. One row
//! reads B as one stream.

use std::hint::black_box;
use std::ops::Range;

use crate::linear::change::{Change, FEW_ROWS};
use crate::linear::delta::{FactorB, block_start, block_width, ranks_b};
use crate::linear::halves::{Halves, multiply};
use crate::linear::stream::{LINE, Stream};
use crate::matrix::{BLOCK, BLOCK_PANELS};
use crate::simd::{Element, GROUP, Kernel, LANES, Simd};

/// Rows whose y is to be finished, for a range of output blocks.
pub(super) struct Expand<'a> {
    pub(super) u: *const f32,
    pub(super) u_stride: usize,
    pub(super) rows: Range<usize>,
    pub(super) blocks: Range<usize>,
    pub(super) y: *mut f32,
    pub(super) outputs: usize,
    /// The base's bias, where it was not added yet.
    pub(super) bias: Option<&'a [f32]>,
    /// Those of some of `rows`, in their order; several of the same rows follow each other.
    pub(super) changes: &'a [Change],
}

/// What one delta does to its rows.
struct Segment<'a, E> {
    at: &'a Expand<'a>,
    rows: Range<usize>,
    b: &'a [E],
    rank: usize,
    /// u is pairs of bf16.
    pairs: bool,
    /// Where its ranks start in u.
    column: usize,
    gain: Option<&'a [f32]>,
    /// The delta's, and its weight.
    own_bias: Option<&'a [f32]>,
    weight: f32,
    /// The base's, where this change is the last of its rows.
    bias: Option<&'a [f32]>,
    /// What this thread probably reads next.
    after: *const u8,
}

/// Rows of the next tile where so many are left.
#[inline(always)]
fn rows_of_tile<S: Simd>(left: usize) -> usize {
    match left {
        4.. if S::WIDE => 4,
        2.. => 2,
        _ => 1,
    }
}

impl Kernel for Expand<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        if self.is_plain::<S>() {
            return self.add_plain::<S>();
        }
        let mut row = self.rows.start;
        for (index, change) in self.changes.iter().enumerate() {
            let start = change.rows().start.max(self.rows.start);
            let end = change.rows().end.min(self.rows.end);
            // Empty where the change before is of the same rows.
            self.base_rows::<S>(row..start);
            // Runs of B are short when blocks are few: the run to ask for is some changes on.
            let run = change.delta().b_bytes(self.blocks.clone()).max(1);
            let next = self.changes.get(index + (Stream::DISTANCE / run).max(1));
            let after = next.map_or(std::ptr::null(), |n| n.delta().place_b(self.blocks.start));
            self.changed_rows::<S>(change, start..end, after);
            row = end;
        }
        self.base_rows::<S>(row..self.rows.end);
    }
}

impl Expand<'_> {
    /// Whether there are only whole blocks, of changes of bf16 factors and nothing else, which are
    /// multiplied in pairs where the CPU can.
    #[inline(always)]
    fn is_plain<S: Simd>(&self) -> bool {
        let whole = self.blocks.end * BLOCK <= self.outputs;
        let plain = |change: &Change| !change.words.is_null() && change.pairs == S::PAIRS;
        whole && self.bias.is_none() && self.changes.iter().all(plain)
    }

    /// What most steps consist of; so short a stretch of work that to choose a way for each run of
    /// B, as `run` does, takes half as long again.
    #[inline(always)]
    unsafe fn add_plain<S: Simd>(&self) {
        // For more rows B was fetched beside the products.
        let fetches = self.rows.len() <= FEW_ROWS;
        let run = self.changes.first().map_or(0, |c| self.blocks.len() * c.block_words());
        let skip = (Stream::DISTANCE / (run * size_of::<u32>()).max(1)).max(1);
        for (index, change) in self.changes.iter().enumerate() {
            let start = change.rows().start.max(self.rows.start);
            let end = change.rows().end.min(self.rows.end);
            let next = self.changes.get(index + skip).filter(|_| fetches);
            for block in self.blocks.clone() {
                if let Some(next) = next {
                    let (ahead, lines) = (next.block(block), next.block_words() / LANES);
                    (0..lines).for_each(|l| S::prefetch(ahead.wrapping_add(l * LANES).cast()));
                }
                let (b, rank) = (change.block(block), change.rank as usize);
                let mut row = start;
                while row < end {
                    let u = self.u.add(row * self.u_stride + change.column as usize);
                    let y = self.y.add(row * self.outputs + block * BLOCK);
                    let rows = rows_of_tile::<S>(end - row);
                    self.ask_for_rows::<S>(row + rows, rows, block);
                    match rows {
                        4 => self.plain_tile::<S, 4, 4>(y, u, b, rank),
                        2 if S::WIDE => self.plain_tile::<S, 2, 4>(y, u, b, rank),
                        2 => self.plain_tile::<S, 2, 2>(y, u, b, rank),
                        _ => self.plain_tile::<S, 1, 4>(y, u, b, rank),
                    }
                    row += rows;
                }
            }
        }
    }

    /// Asks for the y of some rows' block. Rows lie far apart, and since their products weights
    /// have passed through the caches.
    #[inline(always)]
    unsafe fn ask_for_rows<S: Simd>(&self, first: usize, count: usize, block: usize) {
        for row in first..(first + count).min(self.rows.end) {
            let y = self.y.wrapping_add(row * self.outputs + block * BLOCK);
            for line in 0..BLOCK_PANELS {
                S::prefetch_near(y.wrapping_add(line * LANES).cast());
            }
        }
    }

    /// Adds the products of some rows and a block of 4 vectors, `PART` at a time.
    #[inline(always)]
    #[expect(clippy::needless_range_loop, reason = "iterators over parts of `acc` spill it")]
    unsafe fn plain_tile<S: Simd, const ROWS: usize, const PART: usize>(
        &self,
        y: *mut f32,
        u: *const f32,
        b: *const u32,
        rank: usize,
    ) {
        for first in (0..BLOCK_PANELS).step_by(PART) {
            let (y, b) = (y.add(first * LANES), b.add(first * LANES));
            let mut acc = [[S::zero(); PART]; ROWS];
            for t in 0..ROWS {
                for v in 0..PART {
                    acc[t][v] = S::load(y.add(t * self.outputs + v * LANES));
                }
            }
            let factors = Halves { b, vecs: BLOCK_PANELS, rank, ahead: None };
            acc = if S::PAIRS {
                factors.add_pairs::<S, ROWS, PART>(acc, u.cast(), self.u_stride)
            } else {
                factors.add::<S, ROWS, PART>(acc, u, self.u_stride)
            };
            for t in 0..ROWS {
                for v in 0..PART {
                    S::store(y.add(t * self.outputs + v * LANES), acc[t][v]);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn changed_rows<S: Simd>(&self, change: &Change, rows: Range<usize>, after: *const u8) {
        match change.delta().parts().0 {
            FactorB::F32(b) => self.segment(change, b, rows, after).run::<S>(),
            FactorB::Bf16(b) => self.segment(change, b, rows, after).run::<S>(),
            FactorB::Int8(b) => self.segment(change, b, rows, after).run::<S>(),
        }
    }

    #[inline(always)]
    unsafe fn segment<'a, E>(
        &'a self,
        change: &'a Change,
        b: &'a [E],
        rows: Range<usize>,
        after: *const u8,
    ) -> Segment<'a, E> {
        let (_, gain, own_bias) = change.delta().parts();
        Segment {
            at: self,
            rows,
            b,
            rank: change.delta().rank(),
            pairs: change.pairs,
            column: change.column as usize,
            gain,
            own_bias,
            weight: change.weight,
            bias: self.bias.filter(|_| change.last),
            after,
        }
    }

    /// Rows without a delta only lack the bias.
    #[inline(always)]
    unsafe fn base_rows<S: Simd>(&self, rows: Range<usize>) {
        let Some(bias) = self.bias else { return };
        for row in rows {
            for block in self.blocks.clone() {
                for output in (block * BLOCK..self.outputs.min((block + 1) * BLOCK)).step_by(LANES)
                {
                    let n = (self.outputs - output).min(LANES);
                    let y = self.y.add(row * self.outputs + output);
                    let bias = S::load_n(bias.as_ptr().add(output), n);
                    S::store_row_n(y, n, S::add(S::load_n(y, n), bias));
                }
            }
        }
    }
}

impl<E: Element> Segment<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        if E::multiplied_in_pairs::<S>() && self.pairs {
            self.tiles::<S, true>();
        } else {
            self.tiles::<S, false>();
        }
    }

    #[inline(always)]
    unsafe fn tiles<S: Simd, const PAIRS: bool>(self) {
        for block in self.at.blocks.clone() {
            let full = (block + 1) * BLOCK <= self.at.outputs;
            let wide = block_width(self.at.outputs, block) == BLOCK;
            let mut row = self.rows.start;
            while row < self.rows.end {
                let rows = rows_of_tile::<S>(self.rows.end - row);
                // Else the addresses and masks of tiles of every shape are made before each turn,
                // which takes longer than the tile.
                let (row_of, block) = (black_box(row), black_box(block));
                self.at.ask_for_rows::<S>(row_of + rows, rows, block);
                match (rows, wide, full) {
                    (4, _, true) => self.parts::<S, PAIRS, 4, 4, true>(row_of, block),
                    (4, true, _) => self.parts::<S, PAIRS, 4, 4, false>(row_of, block),
                    (4, ..) => self.parts::<S, PAIRS, 4, 2, false>(row_of, block),
                    (2, _, true) => self.parts::<S, PAIRS, 2, 4, true>(row_of, block),
                    (2, true, _) => self.parts::<S, PAIRS, 2, 4, false>(row_of, block),
                    (2, ..) => self.parts::<S, PAIRS, 2, 2, false>(row_of, block),
                    (_, _, true) => self.parts::<S, PAIRS, 1, 4, true>(row_of, block),
                    (_, true, _) => self.parts::<S, PAIRS, 1, 4, false>(row_of, block),
                    _ => self.parts::<S, PAIRS, 1, 2, false>(row_of, block),
                }
                row += rows;
            }
        }
    }

    /// Some rows of a block of `VECS` vectors, an even number, as many at a time as registers hold;
    /// `FULL`: all its lanes are outputs.
    #[inline(always)]
    unsafe fn parts<
        S: Simd,
        const PAIRS: bool,
        const ROWS: usize,
        const VECS: usize,
        const FULL: bool,
    >(
        &self,
        row: usize,
        block: usize,
    ) {
        if S::WIDE || ROWS != 2 {
            return self.tile::<S, PAIRS, ROWS, VECS, VECS, FULL>(row, block, 0);
        }
        for first in (0..VECS).step_by(2) {
            self.tile::<S, PAIRS, ROWS, VECS, 2, FULL>(row, block, first);
        }
    }

    /// `PART` of the vectors, from `first` on.
    #[inline(always)]
    #[expect(clippy::needless_range_loop, reason = "iterators over parts of `acc` spill it")]
    unsafe fn tile<
        S: Simd,
        const PAIRS: bool,
        const ROWS: usize,
        const VECS: usize,
        const PART: usize,
        const FULL: bool,
    >(
        &self,
        row: usize,
        block: usize,
        first: usize,
    ) {
        let mut acc = [[S::zero(); PART]; ROWS];
        for t in 0..ROWS {
            for v in 0..PART {
                let (y, n, _) = self.place::<FULL>(row + t, block, first + v);
                acc[t][v] = S::load_n(y, n);
            }
        }
        let ranks = ranks_b::<E>(self.rank);
        let [start, front, end] = [block, self.at.blocks.start, self.at.blocks.end]
            .map(|block| self.b.as_ptr().wrapping_add(block_start(self.at.outputs, ranks, block)));
        let bytes = end.addr() - front.addr();
        let stream = Stream {
            end: end.cast(),
            after: self.after,
            distance: Stream::DISTANCE.min(bytes).max(1),
        };
        let ahead = stream.ahead(start.cast());
        let u = self.at.u.wrapping_add(row * self.at.u_stride + self.column);
        acc = match E::DEPTH {
            1 => self.add::<S, ROWS, VECS, PART>(acc, u, start, ahead, first),
            _ => {
                let part = first * GROUP * size_of::<E>();
                let b = start.cast::<u8>().wrapping_add(part).cast();
                let ahead = Some(ahead.wrapping_add(part));
                let factors = Halves { b, vecs: VECS, rank: self.rank, ahead };
                if PAIRS {
                    factors.add_pairs::<S, ROWS, PART>(acc, u.cast(), self.at.u_stride)
                } else {
                    factors.add::<S, ROWS, PART>(acc, u, self.at.u_stride)
                }
            }
        };
        for t in 0..ROWS {
            for v in 0..PART {
                let (y, n, _) = self.place::<FULL>(row + t, block, first + v);
                S::store_n(y, n, acc[t][v]);
            }
        }
        // Most deltas are factors alone. Read again, for were `acc` touched here too, it would be
        // kept in memory all along.
        if self.gain.is_some() || self.own_bias.is_some() || self.bias.is_some() {
            for t in 0..ROWS {
                for v in 0..PART {
                    let (y, n, output) = self.place::<FULL>(row + t, block, first + v);
                    S::store_n(y, n, self.finish::<S>(S::load_n(y, n), output, n));
                }
            }
        }
    }

    /// Adds the products of all ranks.
    #[inline(always)]
    unsafe fn add<S: Simd, const ROWS: usize, const VECS: usize, const PART: usize>(
        &self,
        mut acc: [[S::F; PART]; ROWS],
        u: *const f32,
        b: *const E,
        ahead: *const u8,
        first: usize,
    ) -> [[S::F; PART]; ROWS] {
        for r in 0..self.rank {
            let mut factors = [S::zero(); PART];
            for g in 0..PART / 2 {
                let at = (r * VECS + first) * LANES + g * GROUP;
                [factors[2 * g], factors[2 * g + 1]] = E::load_pair::<S>(b.add(at));
                let ahead = ahead.wrapping_add(at * size_of::<E>());
                if size_of::<E>() > 1 || first + g == 0 {
                    S::prefetch(ahead);
                }
                if size_of::<E>() == 4 {
                    S::prefetch(ahead.wrapping_add(LINE));
                }
            }
            acc = multiply::<S, ROWS, PART>(acc, u.wrapping_add(r), self.at.u_stride, &factors);
        }
        acc
    }

    /// Where vector `v` of a block lies in y, how many of its lanes are outputs, and its first
    /// output.
    #[inline(always)]
    fn place<const FULL: bool>(
        &self,
        row: usize,
        block: usize,
        v: usize,
    ) -> (*mut f32, usize, usize) {
        let output = block * BLOCK + v * LANES;
        let n = if FULL { LANES } else { self.at.outputs.saturating_sub(output).min(LANES) };
        (self.at.y.wrapping_add(row * self.at.outputs + output), n, output)
    }

    /// gain ∘ sum + w·own_bias + bias. A weight of 1 changes no bit of the product.
    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, mut sum: S::F, output: usize, n: usize) -> S::F {
        if let Some(gain) = self.gain {
            sum = S::mul(sum, S::load_n(gain.as_ptr().wrapping_add(output), n));
        }
        if let Some(own) = self.own_bias {
            let own = S::load_n(own.as_ptr().wrapping_add(output), n);
            sum = S::fma(S::splat(self.weight), own, sum);
        }
        if let Some(bias) = self.bias {
            sum = S::add(sum, S::load_n(bias.as_ptr().wrapping_add(output), n));
        }
        sum
    }
}
