//! One adapter's change of one site, and its two products: u = x·Aᵀ (shrink) and y += u·Bᵀ
//! (expand).
//!
//! A is kept `[R, I]`, lanes over inputs, rows padded with zeros to 16 inputs. B is kept transposed
//! in blocks of 64 outputs, each `[R][64]`, lanes over outputs, the last block padded to 16
//! outputs: a row's product reads both as one sequential stream. Ranks are exact. Factors have
//! their own dtype; all arithmetic is f32.

use std::ops::Range;

use half::bf16;

use crate::Dtype;
use crate::buffer::Buffer;
use crate::matrix::{BLOCK, BLOCK_PANELS};
use crate::simd::{Element, Isa, Kernel, LANES, Simd};

/// See the module page. Immutable; scale folded into B at construction.
pub struct Delta {
    factors: Factors,
    rank: usize,
    inputs: usize,
    outputs: usize,
    gain: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
}

enum Factors {
    F32(Pair<f32>),
    Bf16(Pair<bf16>),
}

struct Pair<E: Copy + crate::buffer::Zeroed> {
    /// `[R, I padded to 16]`
    a: Buffer<E>,
    /// Blocks of `[R, 64]`.
    b: Buffer<E>,
}

/// Shape and numbers of a delta to pack: `a` `[R, I]`, `b` `[O, R]`.
struct Source<'a> {
    rank: usize,
    inputs: usize,
    outputs: usize,
    a: &'a [f32],
    b: &'a [f32],
    scale: f32,
}

impl<E: Element + crate::buffer::Zeroed> Pair<E> {
    fn pack(source: &Source<'_>) -> Pair<E> {
        let Source { rank, inputs, outputs, a, b, scale } = *source;
        let stride = inputs.next_multiple_of(LANES);
        let mut pair = Pair {
            a: Buffer::zeroed(rank * stride),
            b: Buffer::zeroed(rank * outputs.next_multiple_of(LANES)),
        };
        for r in 0..rank {
            for i in 0..inputs {
                pair.a[r * stride + i] = E::from_f32(a[r * inputs + i]);
            }
        }
        for o in 0..outputs {
            let block = o / BLOCK;
            let width = block_width(outputs, block);
            for r in 0..rank {
                pair.b[block * BLOCK * rank + r * width + o % BLOCK] =
                    E::from_f32(scale * b[o * rank + r]);
            }
        }
        pair
    }
}

/// Outputs of a block of B, padding included.
fn block_width(outputs: usize, block: usize) -> usize {
    (outputs.next_multiple_of(LANES) - block * BLOCK).min(BLOCK)
}

/// Rows whose u is wanted, for a range of ranks.
pub(super) struct Shrink {
    pub(super) x: *const f32,
    pub(super) x_stride: usize,
    pub(super) rows: Range<usize>,
    pub(super) ranks: Range<usize>,
    pub(super) u: *mut f32,
    pub(super) u_stride: usize,
}

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
}

impl Delta {
    /// `a` `[R, I]` and `b` `[O, R]`, row-major as in PEFT files. The scale multiplies B. `gain` `[O]`
    /// multiplies the sum of base and delta (DoRA); `bias` `[O]` is added after it, already scaled.
    /// Rank 0 is a gain or a bias alone.
    ///
    /// # Panics
    /// On lengths that do not fit the shape.
    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of one delta, named as in its formula"
    )]
    pub fn new(
        dtype: Dtype,
        rank: usize,
        inputs: usize,
        outputs: usize,
        a: &[f32],
        b: &[f32],
        scale: f32,
        gain: Option<Vec<f32>>,
        bias: Option<Vec<f32>>,
    ) -> Delta {
        assert_eq!(a.len(), rank * inputs, "A is [{rank}, {inputs}]");
        assert_eq!(b.len(), outputs * rank, "B is [{outputs}, {rank}]");
        for values in [&gain, &bias].into_iter().flatten() {
            assert_eq!(values.len(), outputs, "gain and bias have {outputs} values");
        }
        let source = Source { rank, inputs, outputs, a, b, scale };
        let factors = match dtype {
            Dtype::F32 => Factors::F32(Pair::pack(&source)),
            Dtype::Bf16 => Factors::Bf16(Pair::pack(&source)),
        };
        Delta { factors, rank, inputs, outputs, gain, bias }
    }

    /// R.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// I.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// O.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let factors = match &self.factors {
            Factors::F32(pair) => pair.a.bytes() + pair.b.bytes(),
            Factors::Bf16(pair) => pair.a.bytes() + pair.b.bytes(),
        };
        let outputs = usize::from(self.gain.is_some()) + usize::from(self.bias.is_some());
        factors + outputs * self.outputs * size_of::<f32>()
    }

    /// # Safety
    /// Rows lie within x and u, ranks within `0..rank`; rows of x are padded with zeros to 16; no
    /// other task writes these u.
    pub(super) unsafe fn shrink(&self, isa: Isa, at: Shrink) {
        let inputs = self.inputs.next_multiple_of(LANES);
        match &self.factors {
            Factors::F32(pair) => isa.run(ShrinkRows { at, a: pair.a.as_ptr(), inputs }),
            Factors::Bf16(pair) => isa.run(ShrinkRows { at, a: pair.a.as_ptr(), inputs }),
        }
    }

    /// y = gain ∘ (y + u·Bᵀ) + delta.bias + bias; without a delta only the bias.
    ///
    /// # Safety
    /// Rows lie within u and y, blocks within the outputs; u is written; no other task touches
    /// these y.
    pub(super) unsafe fn expand(delta: Option<&Delta>, isa: Isa, at: Expand<'_>) {
        let rank = delta.map_or(0, |d| d.rank);
        let gain = delta.and_then(|d| d.gain.as_deref());
        let own_bias = delta.and_then(|d| d.bias.as_deref());
        match delta.map(|d| &d.factors) {
            Some(Factors::Bf16(pair)) => {
                isa.run(ExpandRows { at, b: pair.b.as_ptr(), rank, gain, own_bias })
            }
            Some(Factors::F32(pair)) => {
                isa.run(ExpandRows { at, b: pair.b.as_ptr(), rank, gain, own_bias })
            }
            None => isa.run(ExpandRows::<f32> { at, b: std::ptr::null(), rank, gain, own_bias }),
        }
    }
}

struct ShrinkRows<E> {
    at: Shrink,
    a: *const E,
    /// Padded to 16; also A's stride.
    inputs: usize,
}

impl<E: Element> Kernel for ShrinkRows<E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut rank = self.at.ranks.start;
        while rank < self.at.ranks.end {
            let four = rank + 4 <= self.at.ranks.end;
            let mut row = self.at.rows.start;
            while row < self.at.rows.end {
                let rows = if row + 4 <= self.at.rows.end { 4 } else { 1 };
                match (rows, four) {
                    (4, true) => self.tile::<S, 4, 4>(row, rank),
                    (4, false) => self.tile::<S, 4, 1>(row, rank),
                    (_, true) => self.tile::<S, 1, 4>(row, rank),
                    (_, false) => self.tile::<S, 1, 1>(row, rank),
                }
                row += rows;
            }
            rank += if four { 4 } else { 1 };
        }
    }
}

impl<E: Element> ShrinkRows<E> {
    #[inline(always)]
    unsafe fn tile<S: Simd, const ROWS: usize, const RANKS: usize>(&self, row: usize, rank: usize) {
        let mut acc = [[S::zero(); RANKS]; ROWS];
        let x = self.at.x.add(row * self.at.x_stride);
        let a = self.a.add(rank * self.inputs);
        for i in (0..self.inputs).step_by(LANES) {
            let mut lanes = [S::zero(); RANKS];
            for (r, lane) in lanes.iter_mut().enumerate() {
                let p = a.add(r * self.inputs + i);
                // The four ranks of this tile are one stretch of memory; the next tile's follows
                // it.
                S::prefetch(p.wrapping_add(RANKS * self.inputs).cast());
                *lane = E::load::<S>(p);
            }
            for (t, sums) in acc.iter_mut().enumerate() {
                let x = S::load(x.add(t * self.at.x_stride + i));
                for (sum, &a) in sums.iter_mut().zip(&lanes) {
                    *sum = S::fma(x, a, *sum);
                }
            }
        }
        for (t, sums) in acc.iter().enumerate() {
            for (r, &sum) in sums.iter().enumerate() {
                *self.at.u.add((row + t) * self.at.u_stride + rank + r) = S::sum(sum);
            }
        }
    }
}

struct ExpandRows<'a, E> {
    at: Expand<'a>,
    b: *const E,
    rank: usize,
    gain: Option<&'a [f32]>,
    own_bias: Option<&'a [f32]>,
}

impl<E: Element> Kernel for ExpandRows<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for block in self.at.blocks.clone() {
            let width = block_width(self.at.outputs, block);
            let mut row = self.at.rows.start;
            while row < self.at.rows.end {
                let rows = if row + 4 <= self.at.rows.end { 4 } else { 1 };
                let full = width == BLOCK && (S::WIDE || rows == 1);
                let panels = if full { BLOCK_PANELS } else { 1 };
                for panel in (0..width / LANES).step_by(panels) {
                    match (rows, full) {
                        (4, true) => self.tile::<S, 4, BLOCK_PANELS>(row, block, panel),
                        (4, false) => self.tile::<S, 4, 1>(row, block, panel),
                        (_, true) => self.tile::<S, 1, BLOCK_PANELS>(row, block, panel),
                        (_, false) => self.tile::<S, 1, 1>(row, block, panel),
                    }
                }
                row += rows;
            }
        }
    }
}

impl<E: Element> ExpandRows<'_, E> {
    #[inline(always)]
    unsafe fn tile<S: Simd, const ROWS: usize, const PANELS: usize>(
        &self,
        row: usize,
        block: usize,
        panel: usize,
    ) {
        let at = &self.at;
        let output = block * BLOCK + panel * LANES;
        let lanes = |p: usize| (at.outputs - output - p * LANES).min(LANES);
        let y = |t: usize, p: usize| at.y.add((row + t) * at.outputs + output + p * LANES);
        let mut acc = [[S::zero(); PANELS]; ROWS];
        for (t, sums) in acc.iter_mut().enumerate() {
            for (p, sum) in sums.iter_mut().enumerate() {
                *sum = S::load_n(y(t, p), lanes(p));
            }
        }
        let width = block_width(at.outputs, block);
        let b = self.b.wrapping_add(block * BLOCK * self.rank + panel * LANES);
        for r in 0..self.rank {
            let b = b.add(r * width);
            let mut factors = [S::zero(); PANELS];
            for (p, factor) in factors.iter_mut().enumerate() {
                let b = b.add(p * LANES);
                S::prefetch(b.wrapping_add(8 * BLOCK).cast());
                *factor = E::load::<S>(b);
            }
            for (t, sums) in acc.iter_mut().enumerate() {
                let u = S::splat(*at.u.add((row + t) * at.u_stride + r));
                for (sum, &factor) in sums.iter_mut().zip(&factors) {
                    *sum = S::fma(u, factor, *sum);
                }
            }
        }
        for (t, sums) in acc.iter_mut().enumerate() {
            for (p, &sum) in sums.iter().enumerate() {
                let mut sum = sum;
                let from = output + p * LANES;
                if let Some(gain) = self.gain {
                    sum = S::mul(sum, S::load_n(gain.as_ptr().add(from), lanes(p)));
                }
                for bias in [self.own_bias, at.bias].into_iter().flatten() {
                    sum = S::add(sum, S::load_n(bias.as_ptr().add(from), lanes(p)));
                }
                S::store_n(y(t, p), lanes(p), sum);
            }
        }
    }
}
