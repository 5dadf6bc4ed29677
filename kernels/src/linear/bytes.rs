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
        for index in self.groups {
            let (row, group) = (index / self.to.groups, index % self.to.groups);
            let from = self.from.add(row * self.stride + group * GROUP);
            let x = [S::load(from), S::load(from.add(LANES))];
            let size = x.map(|x| S::max(x, S::sub(S::zero(), x)));
            let largest = S::max_lane(S::max(size[0], size[1]));
            // Zero, unless something is not finite: a maximum may lose what is not a number.
            let zeros = S::mul(S::add(x[0], x[1]), S::zero());
            let factor = S::splat(if largest > 0.0 { 127.0 / largest } else { 0.0 });
            let q = x.map(|x| S::round(S::mul(x, factor)));
            for (half, q) in q.into_iter().enumerate() {
                S::store_i8(self.to.q.get().add(index * GROUP + half * LANES), q);
                // Whole numbers below 2^24: the sum is exact in any order.
                *self.to.sums.get().add(2 * index + half) = S::sum(q) as i32;
            }
            *self.to.scales.get().add(index) = largest / 127.0 + S::sum(zeros);
        }
    }
}
