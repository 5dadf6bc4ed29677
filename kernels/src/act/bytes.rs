//! Activations as integer weights multiply them: 8 bits in groups of 32 that share a scale.
//!
//! x ≈ scale · q,   scale = max |x| / 127 of the group.   Owns that rounding and the sums of q that
//! make up for the weights' zero. Never multiplies. The thing to know: a row is rounded by itself,
//! so its bits do not depend on its neighbours; a group with a value that is not finite gets the
//! scale NaN, so that it spoils its row as it would unrounded.
//!
//! An outlier, one value far beyond all others of its group, would leave those few steps. It is 0
//! among the q, whose scale is that of the others, and kept in f32, to be multiplied by itself (the
//! decomposition of LLM.int8(), arXiv 2208.07339, by value instead of by feature).

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::buffer::{Buffer, Shared};
use crate::simd::{GROUP, LANES, Simd};

/// Memory of the rounded rows of one [`super::cpu::Act`].
pub(super) struct Bytes {
    /// `[T, I padded to 32]`
    q: Buffer<i8>,
    /// `[T, I / 32]`
    scales: Buffer<f32>,
    /// `[T, I / 32, 2]`: of the first and the last 16 q of a group
    sums: Buffer<i32>,
    /// `[T, I / 32 padded to 8]`: 1 + the place in its group of a group's outlier, 0 where it has
    /// none.
    places: Buffer<u8>,
    /// `[T, I / 32]`: the outlier of a group that has one.
    outliers: Buffer<f32>,
    /// Memory of [`Bytes::list`].
    listed: Mutex<Vec<Outlier>>,
}

/// A value that is multiplied by itself.
#[derive(Clone, Copy)]
pub(crate) struct Outlier {
    pub(crate) row: u32,
    pub(crate) column: u32,
    pub(crate) value: f32,
}

/// How many times as large as all others of its group an outlier is.
const FAR: f32 = 4.0;

/// A group with nothing beyond counts as zeros: 127 / max would overflow.
const NOTHING: f32 = 1e-36;

/// What the values of a group count as: their sum tells whether it is of one, and which.
const ONE: f32 = 2.0 * GROUP as f32;
static COUNTS: [f32; GROUP] = {
    let mut counts = [ONE; GROUP];
    let mut place = 0;
    while place < GROUP {
        counts[place] += place as f32;
        place += 1;
    }
    counts
};

/// Groups whose places are looked at together.
const PLACES: usize = size_of::<u64>();

/// Where rounded rows are.
#[derive(Clone, Copy)]
pub(crate) struct Rounded {
    pub(crate) q: Shared<i8>,
    pub(crate) scales: Shared<f32>,
    pub(crate) sums: Shared<i32>,
    places: Shared<u8>,
    outliers: Shared<f32>,
    /// Groups a row.
    pub(crate) groups: usize,
}

impl Bytes {
    /// For `rows_max` rows of `width` values.
    pub(super) fn new(rows_max: usize, width: usize) -> Bytes {
        let groups = width.div_ceil(GROUP);
        let all = rows_max * groups;
        Bytes {
            q: Buffer::zeroed(all * GROUP),
            scales: Buffer::zeroed(all),
            sums: Buffer::zeroed(2 * all),
            places: Buffer::zeroed(rows_max * groups.next_multiple_of(PLACES)),
            outliers: Buffer::zeroed(all),
            listed: Mutex::new(Vec::with_capacity(all)),
        }
    }

    /// Bytes that each row takes.
    pub(super) fn row_bytes(width: usize) -> usize {
        let groups = width.div_ceil(GROUP);
        let each = GROUP + 2 * size_of::<f32>() + 2 * size_of::<i32>() + size_of::<Outlier>();
        groups * each + groups.next_multiple_of(PLACES)
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.q.bytes()
            + self.scales.bytes()
            + self.sums.bytes()
            + self.places.bytes()
            + self.outliers.bytes()
            + self.outliers.len() * size_of::<Outlier>()
    }

    /// Where the rows are, of `groups` groups each, to be written.
    pub(super) fn writer(&mut self, groups: usize) -> Rounded {
        Rounded {
            q: Shared::of(&mut self.q),
            scales: Shared::of(&mut self.scales),
            sums: Shared::of(&mut self.sums),
            places: Shared::of(&mut self.places),
            outliers: Shared::of(&mut self.outliers),
            groups,
        }
    }

    /// The same, only to be read.
    pub(super) fn reader(&self, groups: usize) -> Rounded {
        Rounded {
            q: Shared::new(self.q.as_ptr().cast_mut()),
            scales: Shared::new(self.scales.as_ptr().cast_mut()),
            sums: Shared::new(self.sums.as_ptr().cast_mut()),
            places: Shared::new(self.places.as_ptr().cast_mut()),
            outliers: Shared::new(self.outliers.as_ptr().cast_mut()),
            groups,
        }
    }

    /// The outliers of the first `rows` rows, of `groups` groups each, by row and column.
    pub(super) fn list(&self, rows: usize, groups: usize) -> MutexGuard<'_, Vec<Outlier>> {
        // Whatever a panic left is cleared.
        let mut listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        listed.clear();
        let stride = groups.next_multiple_of(PLACES);
        let (words, _) = self.places[..rows * stride].as_chunks::<PLACES>();
        for (index, &places) in words.iter().enumerate() {
            let mut left = u64::from_le_bytes(places);
            while left != 0 {
                let byte = left.trailing_zeros() as usize / 8;
                left &= !(0xff << (8 * byte));
                let (row, group) = (index * PLACES / stride, index * PLACES % stride + byte);
                let column = group * GROUP + usize::from(places[byte]) - 1;
                let value = self.outliers[row * groups + group];
                listed.push(Outlier { row: row as u32, column: column as u32, value });
            }
        }
        listed
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

    /// Places a row.
    #[inline(always)]
    fn places_stride(&self) -> usize {
        self.groups.next_multiple_of(PLACES)
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
        let places = self.places.get().add(row * self.places_stride() + group);
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
            let (mut x, mut top, mut place) = ([low, high], largest, 0);
            let near = S::splat(largest / FAR);
            let mut count = S::zero();
            for (size, counts) in sizes.into_iter().zip(COUNTS.chunks_exact(LANES)) {
                let counts = S::load(counts.as_ptr());
                count = S::add(count, S::select_lt(size, near, none, counts));
            }
            let count = S::sum(count);
            if finite && count < 2.0 * ONE {
                place = (count - ONE) as u8 + 1;
                *self.outliers.get().add(index + g) = *from.add(usize::from(place) - 1);
                let mut others = none;
                for (x, size) in x.iter_mut().zip(sizes) {
                    *x = S::select_lt(size, near, *x, none);
                    others = S::max(others, S::select_lt(size, near, size, none));
                }
                top = S::max_lane(others);
            }
            *places.add(g) = place;
            let some = top > NOTHING;
            let scale = if some { top / 127.0 } else { 0.0 };
            let scale = if finite { scale } else { f32::NAN };
            let factor = S::splat(if some { 127.0 / top } else { 0.0 });
            for (half, x) in x.into_iter().enumerate() {
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
