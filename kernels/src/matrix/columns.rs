//! Columns of a packed weight, widened to f32: a register is one input of 16 outputs.
//!
//! Owns how a column is found in each type's steps. Never stores one. The thing to know: columns
//! come as pairs (i, 16 + i) of a group of 32, which is what turning a tile into words wants.

use half::f16;

use super::BLOCK_PANELS;
use super::cpu::Matrix;
use super::ints::SCALE_WORDS;
use crate::simd::{GROUP, LANES, Simd};

/// A type of weights whose columns can be read.
pub(crate) trait Columns {
    /// Calls `each(i, [column 32·group + i, column 32·group + 16 + i])` for i < 16, of the 16
    /// outputs of a panel. Outputs beyond O are zero; columns beyond I may be anything finite.
    ///
    /// # Safety
    /// The matrix is of this type, the panel one of its panels, column 32·group one of its columns.
    unsafe fn read<S: Simd>(
        matrix: &Matrix,
        panel: usize,
        group: usize,
        each: impl FnMut(usize, [S::F; 2]),
    );
}

/// Weights in f32.
pub(crate) struct Singles;
/// Weights in bf16.
pub(crate) struct Pairs;
/// `BITS` of a value, inputs of a `SHARED` scale, whether it has a `LEAST` value.
pub(crate) struct Integers<const BITS: usize, const SHARED: usize, const LEAST: bool>;

/// The block of a panel, and its place there.
#[inline(always)]
fn place(panel: usize) -> (usize, usize) {
    (panel / BLOCK_PANELS, panel % BLOCK_PANELS)
}

impl Columns for Singles {
    #[inline(always)]
    unsafe fn read<S: Simd>(
        matrix: &Matrix,
        panel: usize,
        group: usize,
        mut each: impl FnMut(usize, [S::F; 2]),
    ) {
        let (block, at) = place(panel);
        for i in 0..LANES {
            let mut two = [S::zero(); 2];
            for (half, values) in two.iter_mut().enumerate() {
                let column = group * GROUP + half * LANES + i;
                if column < matrix.steps() {
                    *values = S::load(matrix.place(block, column).add(at * LANES).cast());
                }
            }
            each(i, two);
        }
    }
}

impl Columns for Pairs {
    #[inline(always)]
    unsafe fn read<S: Simd>(
        matrix: &Matrix,
        panel: usize,
        group: usize,
        mut each: impl FnMut(usize, [S::F; 2]),
    ) {
        const ZEROS: [u32; LANES] = [0; LANES];
        let (block, at) = place(panel);
        for step in 0..LANES / 2 {
            let mut words = [ZEROS.as_ptr(); 2];
            for (half, words) in words.iter_mut().enumerate() {
                let step = group * LANES + half * (LANES / 2) + step;
                if step < matrix.steps() {
                    *words = matrix.place(block, step).add(at * LANES);
                }
            }
            // `each` stands here once, so that it is inlined.
            for odd in 0..2 {
                let mut two = [S::zero(); 2];
                for half in 0..2 {
                    two[half] = match odd {
                        0 => S::low_halves(words[half]),
                        _ => S::high_halves(words[half]),
                    };
                }
                each(2 * step + odd, two);
            }
        }
    }
}

impl<const BITS: usize, const SHARED: usize, const LEAST: bool> Columns
    for Integers<BITS, SHARED, LEAST>
{
    #[inline(always)]
    unsafe fn read<S: Simd>(
        matrix: &Matrix,
        panel: usize,
        group: usize,
        mut each: impl FnMut(usize, [S::F; 2]),
    ) {
        let zero = S::splat(if LEAST { 0.0 } else { (1 << (BITS - 1)) as f32 });
        let (block, at) = place(panel);
        let panels = matrix.panels(block);
        let head = panels * SCALE_WORDS * (1 + LEAST as usize) + at * LANES;
        // Each half of the group has a scale of its own, or both the same.
        let (mut words, mut firsts) = ([std::ptr::null(); 2], [0; 2]);
        let (mut scales, mut least) = ([S::zero(); 2], [S::zero(); 2]);
        for half in 0..2 {
            let step = group * (GROUP / SHARED) + half * LANES / SHARED;
            let start = matrix.place(block, step);
            firsts[half] = half * LANES % SHARED;
            words[half] = start.add(head);
            scales[half] = S::load_f16(start.add(at * SCALE_WORDS).cast::<f16>());
            if LEAST {
                let start = start.add((panels + at) * SCALE_WORDS);
                least[half] = S::load_f16(start.cast::<f16>());
            }
        }
        for i in 0..LANES {
            let mut two = [S::zero(); 2];
            for half in 0..2 {
                let input = firsts[half] + i;
                // Four q of 8 bits are a word; of nibbles two such words are one.
                let word = words[half].add(input / 4 * BITS / 8 * panels * LANES);
                let bit = 8 * (input % 4) + input / 4 % (8 / BITS) * BITS;
                let q = S::to_float(S::bits::<BITS>(S::load_int(word), bit));
                two[half] = S::fma(S::sub(q, zero), scales[half], least[half]);
            }
            each(i, two);
        }
    }
}
