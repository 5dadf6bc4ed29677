//! Activations as integer weights multiply them: 8 bits in groups of 32 that share a scale.
//!
//! x ≈ scale · q,   scale = max |x| / 127 of the group.   Owns that rounding and the sums of q that
//! make up for the weights' zero. Never multiplies. The thing to know: a row is rounded by itself,
//! so its bits do not depend on its neighbours; a group with a value that is not finite gets the
//! scale NaN, so that it spoils its row as it would unrounded.

use std::ops::Range;

use crate::buffer::{Buffer, Shared};
use crate::simd::{GROUP, LANES, Simd};

/// Memory of the rounded rows of one [`super::Act`].
pub(super) struct Bytes {
    /// `[T, I padded to 32]`
    q: Buffer<i8>,
    /// `[T, I / 32]`
    scales: Buffer<f32>,
    /// `[T, I / 32, 2]`: of the first and the last 16 q of a group
    sums: Buffer<i32>,
}

/// A group with nothing beyond counts as zeros: 127 / max would overflow.
const NOTHING: f32 = 1e-36;

/// Where rounded rows are.
#[derive(Clone, Copy)]
pub(crate) struct Rounded {
    pub(crate) q: Shared<i8>,
    pub(crate) scales: Shared<f32>,
    pub(crate) sums: Shared<i32>,
    /// Groups a row.
    pub(crate) groups: usize,
}

impl Bytes {
    /// For `rows_max` rows of `width` values.
    pub(super) fn new(rows_max: usize, width: usize) -> Bytes {
        let groups = rows_max * width.div_ceil(GROUP);
        Bytes {
            q: Buffer::zeroed(groups * GROUP),
            scales: Buffer::zeroed(groups),
            sums: Buffer::zeroed(2 * groups),
        }
    }

    /// Bytes that each row takes.
    pub(super) fn row_bytes(width: usize) -> usize {
        width.div_ceil(GROUP) * (GROUP + size_of::<f32>() + 2 * size_of::<i32>())
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.q.bytes() + self.scales.bytes() + self.sums.bytes()
    }

    /// Where the rows are, of `groups` groups each, to be written.
    pub(super) fn writer(&mut self, groups: usize) -> Rounded {
        Rounded {
            q: Shared::of(&mut self.q),
            scales: Shared::of(&mut self.scales),
            sums: Shared::of(&mut self.sums),
            groups,
        }
    }

    /// The same, only to be read.
    pub(super) fn reader(&self, groups: usize) -> Rounded {
        Rounded {
            q: Shared::new(self.q.as_ptr().cast_mut()),
            scales: Shared::new(self.scales.as_ptr().cast_mut()),
            sums: Shared::new(self.sums.as_ptr().cast_mut()),
            groups,
        }
    }
}

impl Rounded {
    /// Rounds some groups of a row that starts at `from`.
    ///
    /// # Safety
    /// In bounds, the row padded with zeros to whole groups, and no other task touches them.
    #[inline(always)]
    pub(crate) unsafe fn round<S: Simd>(&self, from: *const f32, row: usize, groups: Range<usize>) {
        let mut group = groups.start;
        while group < groups.end {
            // Two groups where there are.
            let (from, index) = (from.add(group * GROUP), row * self.groups + group);
            group += if groups.end - group > 1 {
                self.take::<S, 2>(from, index)
            } else {
                self.take::<S, 1>(from, index)
            };
        }
    }

    /// Rounds N groups from `index` on; returns N.
    #[inline(always)]
    unsafe fn take<S: Simd, const N: usize>(&self, from: *const f32, index: usize) -> usize {
        let mut halves = [S::zero(); 4];
        for g in 0..N {
            let from = from.add(g * GROUP);
            let (low, high) = (S::load(from), S::load(from.add(LANES)));
            let none = S::zero();
            let sizes = [S::max(low, S::sub(none, low)), S::max(high, S::sub(none, high))];
            let largest = S::max_lane(S::max(sizes[0], sizes[1]));
            // A maximum may lose what is not a number.
            let infinity = S::splat(f32::INFINITY);
            let finite = S::all_lt(sizes[0], infinity) && S::all_lt(sizes[1], infinity);
            let some = largest > NOTHING;
            let scale = if some { largest / 127.0 } else { 0.0 };
            let scale = if finite { scale } else { f32::NAN };
            let factor = S::splat(if some { 127.0 / largest } else { 0.0 });
            for (half, x) in [low, high].into_iter().enumerate() {
                let q = S::round(S::mul(x, factor));
                S::store_i8(self.q.get().add((index + g) * GROUP + half * LANES), q);
                halves[2 * g + half] = q;
            }
            *self.scales.get().add(index + g) = scale;
        }
        // Whole numbers below 2^24: the sums are exact in any order.
        let mut sums = [0.0; 4];
        S::store_sums(sums.as_mut_ptr(), halves, [1.0; 4]);
        for (i, sum) in sums[..2 * N].iter().enumerate() {
            *self.sums.get().add(2 * index + i) = *sum as i32;
        }
        N
    }
}
