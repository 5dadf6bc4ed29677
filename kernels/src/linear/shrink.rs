//! u = w·x·Aᵀ of one change:   x `[T, I]` f32   A `[R, I]`   u `[T, R]` f32; times the rank's scale
//! where factors are integers.
//!
//! Lanes over inputs: 16 chains (inputs i, i+16, …) joined in one order. A tile of 4 ranks by 4
//! rows lives in registers and reads A as one stream.

use std::ops::Range;

use crate::linear::delta::Stream;
use crate::linear::lines::LINE;
use crate::simd::{Element, GROUP, Kernel, LANES, Simd};

/// Ranks that are stored, and computed, together.
pub(super) const RANKS: usize = 4;

/// Rows whose u is wanted, for a range of ranks.
pub(super) struct Shrink {
    pub(super) x: *const f32,
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
        let mut rank = self.at.ranks.start;
        while rank < self.at.ranks.end {
            let four = rank + RANKS <= self.at.ranks.end;
            let mut row = self.at.rows.start;
            while row < self.at.rows.end {
                let rows = match self.at.rows.end - row {
                    4.. => 4,
                    2.. => 2,
                    _ => 1,
                };
                match (rows, four) {
                    (4, true) => self.tile::<S, 4, RANKS>(row, rank),
                    (4, false) => self.tile::<S, 4, 1>(row, rank),
                    (2, true) => self.tile::<S, 2, RANKS>(row, rank),
                    (2, false) => self.tile::<S, 2, 1>(row, rank),
                    (_, true) => self.tile::<S, 1, RANKS>(row, rank),
                    (_, false) => self.tile::<S, 1, 1>(row, rank),
                }
                row += rows;
            }
            rank += if four { RANKS } else { 1 };
        }
    }
}

impl<E: Element> ShrinkRows<'_, E> {
    /// Fetched some tiles ahead, each of so many bytes.
    #[inline(always)]
    fn stream(&self, tile: usize) -> Stream {
        Stream {
            end: self.a.wrapping_add(self.at.ranks.end * self.inputs).cast(),
            after: self.at.after,
            distance: Stream::DISTANCE.next_multiple_of(tile),
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const ROWS: usize, const COUNT: usize>(&self, row: usize, rank: usize) {
        let mut acc = [[S::zero(); COUNT]; ROWS];
        let x = self.at.x.add(row * self.at.x_stride);
        let a = self.a.add(rank * self.inputs);
        let stream = self.stream(COUNT * self.inputs * size_of::<E>());
        let ahead = stream.ahead(a.cast());
        for i in (0..self.inputs).step_by(GROUP) {
            let mut factors = [[S::zero(); 2]; COUNT];
            for (r, pair) in factors.iter_mut().enumerate() {
                let at = i * COUNT + r * GROUP;
                *pair = E::load_pair::<S>(a.add(at));
                let ahead = ahead.wrapping_add(at * size_of::<E>());
                if (at * size_of::<E>()).is_multiple_of(LINE) {
                    S::prefetch(ahead);
                }
                if size_of::<E>() == 4 {
                    S::prefetch(ahead.wrapping_add(64));
                }
            }
            for (t, sums) in acc.iter_mut().enumerate() {
                let x = x.add(t * self.at.x_stride + i);
                let (low, high) = (S::load(x), S::load(x.add(LANES)));
                for (sum, pair) in sums.iter_mut().zip(&factors) {
                    *sum = S::fma(high, pair[1], S::fma(low, pair[0], *sum));
                }
            }
        }
        for (t, sums) in acc.iter().enumerate() {
            for (r, &sum) in sums.iter().enumerate() {
                let scale = self.scales.map_or(1.0, |scales| scales[rank + r]);
                *self.at.u.add((row + t) * self.at.u_stride + rank + r) =
                    self.at.weight * scale * S::sum(sum);
            }
        }
    }
}
