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

/// 64 columns of some panels of outputs.
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
    #[inline(always)]
    unsafe fn of<S: Simd, C: Columns>(self) {
        let pairs = turns_pairs::<S>(self.weight.dtype());
        let columns = (self.weight.inputs() - self.block * BLOCK).div_ceil(LANES);
        let panels = columns.min(BLOCK_PANELS);
        let steps = if pairs { LANES / 2 } else { LANES };
        let mut tiles = [[[0u32; LANES]; LANES]; 2];
        for (index, panel) in self.outputs.enumerate() {
            let to = self.to.add(index * steps * panels * LANES);
            for two in 0..panels.div_ceil(2) {
                C::read::<S>(
                    self.weight,
                    panel,
                    self.block * (BLOCK / GROUP) + two,
                    |i, [a, b]| {
                        if pairs {
                            S::store_int(tiles[0][i].as_mut_ptr(), S::pairs(a, b));
                        } else {
                            S::store(tiles[0][i].as_mut_ptr().cast(), a);
                            S::store(tiles[1][i].as_mut_ptr().cast(), b);
                        }
                    },
                );
                S::transpose(&mut tiles[0]);
                if !pairs {
                    S::transpose(&mut tiles[1]);
                }
                // The second half of the pairs' one tile is the second panel's.
                let of_panel =
                    |half: usize| if pairs { &tiles[0][half * steps..] } else { &tiles[half][..] };
                for half in 0..2.min(panels - 2 * two) {
                    let to = to.add((2 * two + half) * LANES);
                    for (step, words) in of_panel(half).iter().take(steps).enumerate() {
                        let words = S::load_int(words.as_ptr());
                        S::store_int(to.add(step * panels * LANES), words);
                    }
                }
            }
        }
    }
}
