//! u = w·x·Aᵀ of one change:   x `[T, I]` f32   A `[R, I]`   u `[T, R]` f32; times the rank's scale
//! where factors are integers.
//!
//! Lanes over inputs: 16 chains (inputs i, i+16, …) joined in one order. A tile of 4 ranks by 4
//! rows lives in registers and reads A as one stream.

use std::ops::Range;

use half::bf16;

use crate::linear::stream::{LINE, Stream};
use crate::simd::{Element, GROUP, Kernel, LANES, Simd};

/// Ranks that are stored, and computed, together.
pub(super) const RANKS: usize = 4;

/// Rows whose u is wanted, for a range of ranks.
pub(super) struct Shrink {
    pub(super) x: *const f32,
    /// x rounded, where that is what A multiplies; u is rounded then too, its pairs from where its
    /// f32 would be.
    pub(super) halves: *const bf16,
    /// Of both, in values.
    pub(super) x_stride: usize,
    pub(super) rows: Range<usize>,
    pub(super) ranks: Range<usize>,
    pub(super) u: *mut f32,
    pub(super) u_stride: usize,
    /// w; 1 keeps every bit.
    pub(super) weight: f32,
    /// What this thread probably reads next.
    pub(super) after: *const u8,
}

pub(super) struct ShrinkRows<'a, E> {
    pub(super) at: Shrink,
    pub(super) a: *const E,
    /// Padded to 32; also A's stride.
    pub(super) inputs: usize,
    /// Of every rank; none is 1.
    pub(super) scales: Option<&'a [f32]>,
}

impl<E: Element> Kernel for ShrinkRows<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        if E::multiplied_in_pairs::<S>() && !self.at.halves.is_null() {
            self.tiles::<S, true>();
            self.round::<S>();
        } else {
            self.tiles::<S, false>();
        }
    }
}

impl<E: Element> ShrinkRows<'_, E> {
    #[inline(always)]
    unsafe fn tiles<S: Simd, const PAIRS: bool>(&self) {
        let mut rank = self.at.ranks.start;
        while rank < self.at.ranks.end {
            let four = rank + RANKS <= self.at.ranks.end;
            let mut row = self.at.rows.start;
            while row < self.at.rows.end {
                let rows = match self.at.rows.end - row {
                    4.. if S::WIDE => 4,
                    2.. => 2,
                    _ => 1,
                };
                match (rows, four) {
                    (4, true) => self.tile::<S, PAIRS, 4, RANKS, RANKS>(row, rank, 0),
                    (4, false) => self.tile::<S, PAIRS, 4, 1, 1>(row, rank, 0),
                    (2, true) if S::WIDE => self.tile::<S, PAIRS, 2, RANKS, RANKS>(row, rank, 0),
                    // Few registers: half of the ranks at a time.
                    (2, true) => {
                        self.tile::<S, PAIRS, 2, RANKS, 2>(row, rank, 0);
                        self.tile::<S, PAIRS, 2, RANKS, 2>(row, rank, 2);
                    }
                    (2, false) => self.tile::<S, PAIRS, 2, 1, 1>(row, rank, 0),
                    (_, true) => self.tile::<S, PAIRS, 1, RANKS, RANKS>(row, rank, 0),
                    (_, false) => self.tile::<S, PAIRS, 1, 1, 1>(row, rank, 0),
                }
                row += rows;
            }
            rank += if four { RANKS } else { 1 };
        }
    }

    /// Rounds u where it lies.
    #[inline(always)]
    unsafe fn round<S: Simd>(&self) {
        let ranks = self.at.ranks.clone();
        for row in self.at.rows.clone() {
            for rank in ranks.clone().step_by(LANES) {
                let (n, u) = ((ranks.end - rank).min(LANES), self.at.u.add(row * self.at.u_stride));
                S::store_pairs_n(u.add(rank).cast(), n, S::load_n(u.add(rank), n));
            }
        }
    }

    /// Fetched some tiles ahead, each of so many bytes.
    #[inline(always)]
    fn stream(&self, tile: usize) -> Stream {
        Stream {
            end: self.a.wrapping_add(self.at.ranks.end * self.inputs).cast(),
            after: self.at.after,
            distance: Stream::DISTANCE.next_multiple_of(tile),
        }
    }

    /// Some rows by `PART`, from `first` on, of `COUNT` ranks that are stored together.
    #[inline(always)]
    unsafe fn tile<
        S: Simd,
        const PAIRS: bool,
        const ROWS: usize,
        const COUNT: usize,
        const PART: usize,
    >(
        &self,
        row: usize,
        rank: usize,
        first: usize,
    ) {
        let mut acc = [[S::zero(); PART]; ROWS];
        let a = self.a.add(rank * self.inputs);
        let stream = self.stream(COUNT * self.inputs * size_of::<E>());
        let ahead = stream.ahead(a.cast());
        for i in (0..self.inputs).step_by(GROUP) {
            let a = a.add(i * COUNT);
            for r in 0..if first == 0 { COUNT } else { 0 } {
                let at = (i * COUNT + r * GROUP) * size_of::<E>();
                if at.is_multiple_of(LINE) {
                    S::prefetch(ahead.wrapping_add(at));
                }
                if size_of::<E>() == 4 {
                    S::prefetch(ahead.wrapping_add(at + LINE));
                }
            }
            let a = a.add(first * GROUP);
            if PAIRS {
                acc = self.add_pairs::<S, ROWS, PART>(acc, a, row, i);
            } else {
                acc = self.add::<S, ROWS, PART>(acc, a, row, i);
            }
        }
        let rank = rank + first;
        for (t, &sums) in acc.iter().enumerate() {
            let u = self.at.u.add((row + t) * self.at.u_stride + rank);
            let weights = std::array::from_fn(|r| {
                self.at.weight * self.scales.map_or(1.0, |scales| scales[rank + r])
            });
            S::store_sums(u, sums, weights);
        }
    }

    /// Adds the products of a group of inputs.
    #[inline(always)]
    unsafe fn add<S: Simd, const ROWS: usize, const COUNT: usize>(
        &self,
        mut acc: [[S::F; COUNT]; ROWS],
        a: *const E,
        row: usize,
        i: usize,
    ) -> [[S::F; COUNT]; ROWS] {
        if !S::WIDE {
            // Few registers: a rank's factors at a time, and x anew for each.
            for r in 0..COUNT {
                let pair = E::load_pair::<S>(a.add(r * GROUP));
                for (t, sums) in acc.iter_mut().enumerate() {
                    let x = self.at.x.add((row + t) * self.at.x_stride + i);
                    sums[r] = S::fma(S::load(x), pair[0], sums[r]);
                    sums[r] = S::fma(S::load(x.add(LANES)), pair[1], sums[r]);
                }
            }
            return acc;
        }
        let mut factors = [[S::zero(); 2]; COUNT];
        for (r, pair) in factors.iter_mut().enumerate() {
            *pair = E::load_pair::<S>(a.add(r * GROUP));
        }
        for (t, sums) in acc.iter_mut().enumerate() {
            let x = self.at.x.add((row + t) * self.at.x_stride + i);
            let (low, high) = (S::load(x), S::load(x.add(LANES)));
            for (sum, pair) in sums.iter_mut().zip(&factors) {
                *sum = S::fma(high, pair[1], S::fma(low, pair[0], *sum));
            }
        }
        acc
    }

    /// The same with x rounded.
    #[inline(always)]
    unsafe fn add_pairs<S: Simd, const ROWS: usize, const COUNT: usize>(
        &self,
        mut acc: [[S::F; COUNT]; ROWS],
        a: *const E,
        row: usize,
        i: usize,
    ) -> [[S::F; COUNT]; ROWS] {
        let mut x = [S::splat_int(0); ROWS];
        for (t, x) in x.iter_mut().enumerate() {
            *x = S::load_pairs(self.at.halves.add((row + t) * self.at.x_stride + i));
        }
        for r in 0..COUNT {
            let factors = S::load_int(a.add(r * GROUP).cast());
            for (sums, &x) in acc.iter_mut().zip(&x) {
                sums[r] = S::dot_bf16(sums[r], x, factors);
            }
        }
        acc
    }
}
