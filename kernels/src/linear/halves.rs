//! Products of u with B in bf16:   sums `[T, 16·VECS]` += u `[T, R]` · Bᵀ of as many outputs.
//!
//! Owns how two ranks of an output that share a word are taken apart, or multiplied together where
//! the CPU can. Never loads or stores a sum: a tile keeps its own in registers.

use crate::simd::{LANES, Simd};

/// Adds the products of one rank.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "iterators over parts of `acc` spill it")]
pub(super) unsafe fn multiply<S: Simd, const ROWS: usize, const VECS: usize>(
    mut acc: [[S::F; VECS]; ROWS],
    u: *const f32,
    u_stride: usize,
    factors: &[S::F; VECS],
) -> [[S::F; VECS]; ROWS] {
    for t in 0..ROWS {
        let u = S::splat(*u.add(t * u_stride));
        for v in 0..VECS {
            acc[t][v] = S::fma(u, factors[v], acc[t][v]);
        }
    }
    acc
}

/// Factors in bf16, two ranks of an output a word.
pub(super) struct Halves {
    /// The first word to read of the first two ranks.
    pub(super) b: *const u32,
    /// Vectors of two ranks.
    pub(super) vecs: usize,
    pub(super) rank: usize,
    /// What to bring near beside them.
    pub(super) ahead: Option<*const u8>,
}

impl Halves {
    /// Where a vector of a pair of ranks lies; asks for what is ahead of it.
    #[inline(always)]
    unsafe fn place<S: Simd>(&self, pair: usize, v: usize) -> *const u32 {
        let at = (pair * self.vecs + v) * LANES;
        if let Some(ahead) = self.ahead {
            S::prefetch(ahead.wrapping_add(at * size_of::<u32>()));
        }
        self.b.wrapping_add(at)
    }

    /// Adds the products with u, the first rank of a pair before the other.
    #[inline(always)]
    #[expect(clippy::needless_range_loop, reason = "iterators over parts of `acc` spill it")]
    pub(super) unsafe fn add<S: Simd, const ROWS: usize, const VECS: usize>(
        &self,
        mut acc: [[S::F; VECS]; ROWS],
        u: *const f32,
        u_stride: usize,
    ) -> [[S::F; VECS]; ROWS] {
        for pair in 0..self.rank.div_ceil(2) {
            let mut factors = [S::zero(); VECS];
            for v in 0..VECS {
                factors[v] = S::low_halves(self.place::<S>(pair, v));
            }
            acc = multiply::<S, ROWS, VECS>(acc, u.wrapping_add(2 * pair), u_stride, &factors);
            if 2 * pair + 1 < self.rank {
                for v in 0..VECS {
                    factors[v] =
                        S::high_halves(self.b.wrapping_add((pair * self.vecs + v) * LANES));
                }
                let u = u.wrapping_add(2 * pair + 1);
                acc = multiply::<S, ROWS, VECS>(acc, u, u_stride, &factors);
            }
        }
        acc
    }

    /// The same with u as [`super::shrink`] rounds it: the pairs of 16 ranks are where the first
    /// eight of their f32 would be.
    #[inline(always)]
    #[expect(clippy::needless_range_loop, reason = "iterators over parts of `acc` spill it")]
    pub(super) unsafe fn add_pairs<S: Simd, const ROWS: usize, const VECS: usize>(
        &self,
        mut acc: [[S::F; VECS]; ROWS],
        u: *const i32,
        u_stride: usize,
    ) -> [[S::F; VECS]; ROWS] {
        for pair in 0..self.rank.div_ceil(2) {
            let mut factors = [S::splat_int(0); VECS];
            for v in 0..VECS {
                factors[v] = S::load_int(self.place::<S>(pair, v));
            }
            let at = pair / (LANES / 2) * LANES + pair % (LANES / 2);
            for t in 0..ROWS {
                let u = S::splat_int(*u.add(t * u_stride + at));
                for v in 0..VECS {
                    acc[t][v] = S::dot_bf16(acc[t][v], u, factors[v]);
                }
            }
        }
        acc
    }
}
