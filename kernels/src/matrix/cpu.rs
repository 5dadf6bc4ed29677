//! A weight on the CPU, packed once at load for lanes over outputs. Never changes afterwards.
//!
//! Outputs are cut into panels of 16 and four panels make a block. A block is a list of steps, and
//! a step is some inputs of every panel, in words of 32 bits: with floats `[panels][16]` words, an
//! f32 each or two bf16 of consecutive inputs (the lower input in the low half); with integers a
//! group of inputs and its scales ([`super::ints`]). So a register is a panel's 16 outputs, and a
//! block is read as one sequential stream whatever `T` is. Outputs are padded with zeros to 16, and
//! `I` to whole steps; the last block has as many panels as are left.

use crate::WeightDtype;
use crate::buffer::Buffer;
use crate::simd::LANES;

/// Panels of a full block.
pub(crate) const BLOCK_PANELS: usize = 4;
/// Outputs of a full block.
pub(crate) const BLOCK: usize = BLOCK_PANELS * LANES;

/// See the module page.
pub(crate) struct Matrix {
    pub(super) words: Buffer<u32>,
    pub(super) dtype: WeightDtype,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

/// The same bits of the same type and shape.
impl PartialEq for Matrix {
    fn eq(&self, other: &Matrix) -> bool {
        let shape = |m: &Matrix| (m.dtype, m.outputs, m.inputs);
        shape(self) == shape(other) && self.words[..] == other.words[..]
    }
}

impl Matrix {
    /// Packs row-major `rows` `[O, I]`, rounding to `dtype`.
    pub(super) fn from_f32(
        dtype: WeightDtype,
        outputs: usize,
        inputs: usize,
        rows: &[f32],
    ) -> Matrix {
        assert_eq!(rows.len(), outputs * inputs, "rows of a [{outputs}, {inputs}] matrix");
        Self::packed_here(dtype, outputs, inputs, |panel| {
            let first = panel.outputs().start;
            panel.pack_f32(|n| &rows[(first + n) * inputs..][..inputs]);
        })
    }

    /// Zeros, in pages that are not there yet.
    pub(super) fn empty(dtype: WeightDtype, outputs: usize, inputs: usize) -> Matrix {
        assert!(outputs > 0 && inputs > 0, "a matrix has outputs and inputs");
        let panels = outputs.div_ceil(LANES);
        let words = Buffer::untouched(panels * dtype.steps(inputs) * dtype.step_words());
        Matrix { words, dtype, outputs, inputs }
    }

    /// O.
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// I.
    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    /// What the values are stored as.
    pub(crate) fn dtype(&self) -> WeightDtype {
        self.dtype
    }

    /// Bytes held, padding included.
    pub(super) fn bytes(&self) -> usize {
        self.words.bytes()
    }

    /// The weights of one output, unpacked: `out` `[I]`.
    pub(crate) fn read_row(&self, output: usize, out: &mut [f32]) {
        assert!(output < self.outputs, "output {output} of {}", self.outputs);
        assert_eq!(out.len(), self.inputs, "a row has {} values", self.inputs);
        let (start, stride) = self.column(output);
        let words = self.words[start..].iter().step_by(stride);
        match self.dtype {
            WeightDtype::F32 => {
                for (x, &word) in out.iter_mut().zip(words) {
                    *x = f32::from_bits(word);
                }
            }
            WeightDtype::Bf16 => {
                for (pair, &word) in out.chunks_mut(2).zip(words) {
                    pair[0] = f32::from_bits(word << 16);
                    if let Some(second) = pair.get_mut(1) {
                        *second = f32::from_bits(word & 0xffff_0000);
                    }
                }
            }
            _ => self.read_ints(output, out),
        }
    }

    /// Steps of a block.
    pub(crate) fn steps(&self) -> usize {
        self.dtype.steps(self.inputs)
    }

    pub(crate) fn blocks(&self) -> usize {
        self.outputs.div_ceil(BLOCK)
    }

    /// Panels of `block`: 4, or fewer in the last.
    pub(crate) fn panels(&self, block: usize) -> usize {
        (self.outputs - block * BLOCK).div_ceil(LANES).min(BLOCK_PANELS)
    }

    /// Words of a step of `block`.
    pub(crate) fn step_words(&self, block: usize) -> usize {
        self.panels(block) * self.dtype.step_words()
    }

    /// First word of a step of `block`.
    pub(crate) fn place(&self, block: usize, step: usize) -> *const u32 {
        let start = self.block_start(block) + step * self.step_words(block);
        self.words.as_ptr().wrapping_add(start)
    }

    pub(super) fn block_start(&self, block: usize) -> usize {
        block * BLOCK_PANELS * self.steps() * self.dtype.step_words()
    }

    /// Where the words of one output of a float matrix start, and their stride.
    fn column(&self, output: usize) -> (usize, usize) {
        let (block, within) = (output / BLOCK, output % BLOCK);
        (self.block_start(block) + within, self.step_words(block))
    }
}
