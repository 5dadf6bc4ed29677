//! Activations as integer weights multiply them: 8 bits in groups of 32 that share a scale.
//!
//! x ≈ scale · q,   scale = max |x| / 127 of the group.   Owns that rounding and the sums of q that
//! make up for the weights' zero. Never multiplies. The thing to know: a row is rounded by itself,
//! so its bits do not depend on its neighbours; a group with a value that is not finite gets the
//! scale NaN, so that it spoils its row as it would unrounded.

use crate::act::Act;
use crate::buffer::{Buffer, Shared};
use crate::device::{Device, part};
use crate::simd::{GROUP, Kernel, LANES, Simd};

/// Memory for the rounded rows of one call.
pub(super) struct Bytes {
    /// `[T, I padded to 32]`
    q: Buffer<i8>,
    /// `[T, I / 32]`
    scales: Buffer<f32>,
    /// `[T, I / 32, 2]`: of the first and the last 16 q of a group
    sums: Buffer<i32>,
}

/// Where a call's rounded rows are.
#[derive(Clone, Copy)]
pub(super) struct Rounded {
    pub(super) q: Shared<i8>,
    pub(super) scales: Shared<f32>,
    pub(super) sums: Shared<i32>,
    /// Groups a row.
    pub(super) groups: usize,
}

impl Bytes {
    /// For `rows_max` rows of `inputs_max` values.
    pub(super) fn new(rows_max: usize, inputs_max: usize) -> Bytes {
        let groups = rows_max * inputs_max.div_ceil(GROUP);
        Bytes {
            q: Buffer::zeroed(groups * GROUP),
            scales: Buffer::zeroed(groups),
            sums: Buffer::zeroed(2 * groups),
        }
    }

    /// Bytes that each row takes.
    pub(super) fn row_bytes(inputs_max: usize) -> usize {
        inputs_max.div_ceil(GROUP) * (GROUP + size_of::<f32>() + 2 * size_of::<i32>())
    }

    pub(super) fn bytes(&self) -> usize {
        self.q.bytes() + self.scales.bytes() + self.sums.bytes()
    }

    /// Rounds the first `rows` rows of x.
    pub(super) fn round(&mut self, dev: &Device, x: &Act, rows: usize) -> Rounded {
        let groups = x.width().div_ceil(GROUP);
        let most = self.scales.len();
        assert!(rows * groups <= most, "{rows} rows of {} values, scratch for less", x.width());
        let to = Rounded {
            q: Shared::of(&mut self.q),
            scales: Shared::of(&mut self.scales),
            sums: Shared::of(&mut self.sums),
            groups,
        };
        let (wide, stride) = x.wide();
        let (from, isa) = (Shared::new(wide.as_ptr().cast_mut()), dev.isa());
        let pieces = dev.pieces(rows * groups, COST);
        dev.fork(pieces, &|piece| {
            let groups = part(rows * groups, pieces, piece);
            // SAFETY: in bounds as asserted; rows of x are padded to whole groups; a group belongs
            // to one piece.
            unsafe { isa.run(Round { from: from.get(), stride, groups, to }) }
        });
        to
    }
}

/// Of a group, in the device's measure.
const COST: usize = 16;

struct Round {
    from: *const f32,
    stride: usize,
    groups: std::ops::Range<usize>,
    to: Rounded,
}

impl Kernel for Round {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut index = self.groups.start;
        let (mut row, mut group) = (index / self.to.groups, index % self.to.groups);
        while index < self.groups.end {
            // Two groups of a row where there are.
            let left = (self.groups.end - index).min(self.to.groups - group);
            let from = self.from.add(row * self.stride + group * GROUP);
            let taken = if left > 1 {
                self.round::<S, 2>(from, index)
            } else {
                self.round::<S, 1>(from, index)
            };
            index += taken;
            group += taken;
            if group == self.to.groups {
                (row, group) = (row + 1, 0);
            }
        }
    }
}

impl Round {
    /// Rounds N groups from `index` on; returns N.
    #[inline(always)]
    unsafe fn round<S: Simd, const N: usize>(&self, from: *const f32, index: usize) -> usize {
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
            let scale = if finite { largest / 127.0 } else { f32::NAN };
            let factor = S::splat(if largest > 0.0 { 127.0 / largest } else { 0.0 });
            for (half, x) in [low, high].into_iter().enumerate() {
                let q = S::round(S::mul(x, factor));
                S::store_i8(self.to.q.get().add((index + g) * GROUP + half * LANES), q);
                halves[2 * g + half] = q;
            }
            *self.to.scales.get().add(index + g) = scale;
        }
        // Whole numbers below 2^24: the sums are exact in any order.
        let mut sums = [0.0; 4];
        S::store_sums(sums.as_mut_ptr(), halves, [1.0; 4]);
        for (i, sum) in sums[..2 * N].iter().enumerate() {
            *self.to.sums.get().add(2 * index + i) = *sum as i32;
        }
        N
    }
}
