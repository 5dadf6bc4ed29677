//! Activations as integer weights multiply them: 8 bits in groups of 32 that share a scale.
//!
//! x ≈ scale · q,   scale = max |x| / 127 of the group.   Owns that rounding and the sums of q that
//! make up for the weights' zero. Never multiplies. The thing to know: a row is rounded by itself,
//! so its bits do not depend on its neighbours; a group with a value that is not finite gets the
//! scale NaN, so that it spoils its row as it would unrounded.
//!
//! One value far beyond all others of its group would leave those few steps. It is held apart:
//! the scale is then that of the others, and its q = 255 · high + low, low where the others' q are.
//! Such groups are few (one in seventeen of SmolLM2's) and make half of the error.

use std::ops::Range;

use crate::buffer::{Buffer, Shared, Zeroed};
use crate::simd::{GROUP, LANES, Simd};

/// Memory of the rounded rows of one [`super::Act`].
pub(super) struct Bytes {
    /// `[T, I padded to 32]`
    q: Buffer<i8>,
    /// `[T, I / 32]`
    scales: Buffer<f32>,
    /// `[T, I / 32, 2]`: of the first and the last 16 q of a group
    sums: Buffer<i32>,
    /// `[I / 32, rows_max]`: the value that a group holds apart, of neighbouring rows in one word
    apart: Buffer<Apart>,
}

/// How many times as large as all others of its group a value is that is held apart.
const FAR: f32 = 4.0;
/// The q of a value held apart: 255 · high + low, both within ±127.
pub(crate) const HIGH: i32 = 255;
/// The largest such q.
const MOST: f32 = (HIGH * 127 + 127) as f32;

/// The value that a group of 32 holds apart: its high part, 0 where there is none, and its place.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Apart {
    pub(crate) high: i8,
    pub(crate) at: u8,
}

impl Zeroed for Apart {}

impl Apart {
    const NONE: Apart = Apart { high: 0, at: 0 };
    /// Rows that [`Apart::any`] looks at together.
    const ROWS_MAX: usize = size_of::<u64>() / size_of::<Apart>();

    /// Whether one of the `ROWS` rows from `first` on, at most four, holds a value apart.
    ///
    /// # Safety
    /// Four can be read.
    #[inline(always)]
    pub(crate) unsafe fn any<const ROWS: usize>(first: *const Apart) -> bool {
        let of_others = u64::BITS as usize * Self::ROWS_MAX.saturating_sub(ROWS) / Self::ROWS_MAX;
        u64::from_le(first.cast::<u64>().read_unaligned()) << of_others != 0
    }
}

/// A group with nothing beyond counts as zeros: 127 / max would overflow.
const NOTHING: f32 = 1e-36;

/// Where rounded rows are.
#[derive(Clone, Copy)]
pub(crate) struct Rounded {
    pub(crate) q: Shared<i8>,
    pub(crate) scales: Shared<f32>,
    pub(crate) sums: Shared<i32>,
    pub(crate) apart: Shared<Apart>,
    /// Groups a row.
    pub(crate) groups: usize,
    pub(crate) rows_max: usize,
}

impl Bytes {
    /// For `rows_max` rows of `width` values.
    pub(super) fn new(rows_max: usize, width: usize) -> Bytes {
        let groups = rows_max * width.div_ceil(GROUP);
        Bytes {
            q: Buffer::zeroed(groups * GROUP),
            scales: Buffer::zeroed(groups),
            sums: Buffer::zeroed(2 * groups),
            // The last rows' are read as one word too.
            apart: Buffer::zeroed(groups + Apart::ROWS_MAX),
        }
    }

    /// Bytes that each row takes.
    pub(super) fn row_bytes(width: usize) -> usize {
        width.div_ceil(GROUP)
            * (GROUP + size_of::<f32>() + 2 * size_of::<i32>() + size_of::<Apart>())
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.q.bytes() + self.scales.bytes() + self.sums.bytes() + self.apart.bytes()
    }

    /// Where the rows are, of `groups` groups each, to be written.
    pub(super) fn writer(&mut self, groups: usize, rows_max: usize) -> Rounded {
        Rounded {
            q: Shared::of(&mut self.q),
            scales: Shared::of(&mut self.scales),
            sums: Shared::of(&mut self.sums),
            apart: Shared::of(&mut self.apart),
            groups,
            rows_max,
        }
    }

    /// The same, only to be read.
    pub(super) fn reader(&self, groups: usize, rows_max: usize) -> Rounded {
        Rounded {
            q: Shared::new(self.q.as_ptr().cast_mut()),
            scales: Shared::new(self.scales.as_ptr().cast_mut()),
            sums: Shared::new(self.sums.as_ptr().cast_mut()),
            apart: Shared::new(self.apart.as_ptr().cast_mut()),
            groups,
            rows_max,
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
            group += if groups.end - group > 1 {
                self.take::<S, 2>(from, row, group)
            } else {
                self.take::<S, 1>(from, row, group)
            };
        }
    }

    /// Rounds N groups of the row from `group` on; returns N.
    #[inline(always)]
    unsafe fn take<S: Simd, const N: usize>(
        &self,
        from: *const f32,
        row: usize,
        group: usize,
    ) -> usize {
        let (from, index) = (from.add(group * GROUP), row * self.groups + group);
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
            let far = S::splat(largest / FAR);
            let are_far = sizes.map(|size| S::select_lt(size, far, none, S::splat(1.0)));
            let one_is_far = finite && S::sum(S::add(are_far[0], are_far[1])) == 1.0;
            let top = if one_is_far {
                let others = sizes.map(|size| S::select_lt(size, far, size, none));
                S::max_lane(S::max(others[0], others[1])).max(largest / MOST * 127.0)
            } else {
                largest
            };
            let some = top > NOTHING;
            let scale = if some { top / 127.0 } else { 0.0 };
            let scale = if finite { scale } else { f32::NAN };
            let factor = if some { 127.0 / top } else { 0.0 };
            let q_of_group = self.q.get().add((index + g) * GROUP);
            for (half, x) in [low, high].into_iter().enumerate() {
                let q = S::round(S::mul(x, S::splat(factor)));
                S::store_i8(q_of_group.add(half * LANES), q);
                halves[2 * g + half] = q;
            }
            *self.scales.get().add(index + g) = scale;
            *self.apart.get().add((group + g) * self.rows_max + row) = if one_is_far && some {
                hold_apart(from, largest, factor, q_of_group)
            } else {
                Apart::NONE
            };
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

/// Holds the value of size `largest` apart: stores the low part of its q, returns the high one.
///
/// # Safety
/// A group can be read and written; `largest` is in it.
#[inline(always)]
unsafe fn hold_apart(from: *const f32, largest: f32, factor: f32, q_of_group: *mut i8) -> Apart {
    let at = (0..GROUP).find(|&i| (*from.add(i)).abs() == largest).expect("it is in the group");
    let q = (*from.add(at) * factor).round_ties_even();
    let high = (q / HIGH as f32).round_ties_even();
    *q_of_group.add(at) = (q as i32 - HIGH * high as i32) as i8;
    Apart { high: high as i8, at: at as u8 }
}
