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
        let load = |column: usize| match column < matrix.steps() {
            true => S::load(matrix.place(block, column).add(at * LANES).cast()),
            false => S::zero(),
        };
        for i in 0..LANES {
            each(i, [load(group * GROUP + i), load(group * GROUP + LANES + i)]);
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
        let words = |step: usize| match step < matrix.steps() {
            true => matrix.place(block, step).add(at * LANES),
            false => ZEROS.as_ptr(),
        };
        for step in 0..LANES / 2 {
            let first = group * LANES + step;
            let words = [words(first), words(first + LANES / 2)];
            each(2 * step, words.map(|words| S::low_halves(words)));
            each(2 * step + 1, words.map(|words| S::high_halves(words)));
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
        // Where each half of the group has its scale, and from which input of it on.
        let steps = [0, LANES].map(|first| {
            let head = matrix.place(block, group * (GROUP / SHARED) + first / SHARED);
            (head, first % SHARED)
        });
        let scales = steps.map(|(head, _)| S::load_f16(head.add(at * SCALE_WORDS).cast::<f16>()));
        let least = steps.map(|(head, _)| match LEAST {
            true => S::load_f16(head.add((panels + at) * SCALE_WORDS).cast::<f16>()),
            false => S::zero(),
        });
        let words = panels * SCALE_WORDS * (1 + LEAST as usize) + at * LANES;
        for i in 0..LANES {
            each(
                i,
                [0, 1].map(|half| {
                    let (head, first) = steps[half];
                    let input = first + i;
                    // Four q of 8 bits are a word; of nibbles two such words are one.
                    let word = head.add(words + input / 4 * BITS / 8 * panels * LANES);
                    let bit = 8 * (input % 4) + input / 4 % (8 / BITS) * BITS;
                    let q = S::to_float(S::bits::<BITS>(S::load_int(word), bit));
                    S::fma(S::sub(q, zero), scales[half], least[half])
                }),
            );
        }
    }
}
