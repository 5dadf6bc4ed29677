//! Columns of a packed weight turned into a block of the forward product's packing: a step is one
//! output, or a pair of neighbours, and the lanes are columns.
//!
//! Owns the choice of the word: pairs of bf16 where the CPU multiplies them and the weights are not
//! f32, else f32. Never multiplies.

use std::ops::Range;

use crate::WeightDtype;
use crate::matrix::columns::{Columns, Integers, Pairs, Singles};
use crate::matrix::{BLOCK, BLOCK_PANELS, cpu};
use crate::simd::{GROUP, Isa, Kernel, LANES, Simd};

/// Whether the columns of such weights become pairs of bf16.
#[inline(always)]
pub(super) fn turns_pairs<S: Simd>(dtype: WeightDtype) -> bool {
    S::PAIRS && dtype != WeightDtype::F32
}

/// 64 columns of some panels of outputs, the first of a block.
#[derive(Clone)]
pub(super) struct Turn<'a> {
    pub(super) weight: &'a cpu::Matrix,
    /// Panels of 16.
    pub(super) outputs: Range<usize>,
    /// Of 64 columns.
    pub(super) block: usize,
    /// `[steps][panels of columns][16]` words, 16 steps of each panel of outputs, or 8 of pairs.
    pub(super) to: *mut u32,
}

/// Never inlined: beside it the products' loops would have fewer registers.
///
/// # Safety
/// The panels and columns are of the matrix, and `to` has room for them.
#[inline(never)]
pub(super) unsafe fn turn(isa: Isa, columns: Turn<'_>) {
    isa.run(columns);
}

impl Kernel for Turn<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        match self.weight.dtype() {
            WeightDtype::F32 => self.of::<S, Singles>(),
            WeightDtype::Bf16 => self.of::<S, Pairs>(),
            WeightDtype::Int8 => self.of::<S, Integers<8, 32, false>>(),
            WeightDtype::Int8By16 => self.of::<S, Integers<8, 16, false>>(),
            WeightDtype::Int8Min => self.of::<S, Integers<8, 32, true>>(),
            WeightDtype::Int4 => self.of::<S, Integers<4, 32, false>>(),
            WeightDtype::Int4Min => self.of::<S, Integers<4, 32, true>>(),
        }
    }
}

impl Turn<'_> {
    /// The stretches of memory that are read: start and bytes, one of each block of outputs.
    #[inline(always)]
    pub(super) fn stretches(&self) -> impl Iterator<Item = (*const u8, usize)> {
        let (weight, dtype) = (self.weight, self.weight.dtype());
        let columns = [0, 1].map(|i| dtype.steps(weight.inputs().min((self.block + i) * BLOCK)));
        let blocks = self.outputs.start / BLOCK_PANELS..self.outputs.end.div_ceil(BLOCK_PANELS);
        blocks.map(move |block| {
            let words = (columns[1] - columns[0]) * weight.step_words(block);
            (weight.place(block, columns[0]).cast(), words * size_of::<u32>())
        })
    }

    #[inline(always)]
    unsafe fn of<S: Simd, C: Columns>(self) {
        let pairs = turns_pairs::<S>(self.weight.dtype());
        let columns = (self.weight.inputs() - self.block * BLOCK).div_ceil(LANES);
        let panels = columns.min(BLOCK_PANELS);
        let steps = if pairs { LANES / 2 } else { LANES };
        let stride = panels * LANES;
        for (index, panel) in self.outputs.enumerate() {
            for two in 0..panels.div_ceil(2) {
                let (mut low, mut high) = ([S::splat_int(0); LANES], [S::splat_int(0); LANES]);
                let group = self.block * (BLOCK / GROUP) + two;
                C::read::<S>(self.weight, panel, group, |i, [a, b]| {
                    if pairs {
                        low[i] = S::pairs(a, b);
                    } else {
                        (low[i], high[i]) = (S::float_bits(a), S::float_bits(b));
                    }
                });
                let to = self.to.add(index * steps * stride + 2 * two * LANES);
                let has_second = 2 * two + 1 < panels;
                if pairs {
                    // Eight steps of each panel of columns; of one that is not there, the other's
                    // are stored over them.
                    let second = if has_second { to.add(LANES) } else { to };
                    S::store_turned(&low, [to, second], stride);
                    continue;
                }
                S::store_turned(&low, [to, to.add(8 * stride)], stride);
                if has_second {
                    let to = to.add(LANES);
                    S::store_turned(&high, [to, to.add(8 * stride)], stride);
                }
            }
        }
    }
}
