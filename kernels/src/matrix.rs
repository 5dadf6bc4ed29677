//! A weight `[O, I]`, packed once at load for lanes over outputs. Never changes afterwards.
//!
//! Outputs are cut into panels of 16 and four panels make a block. A block is `[steps][panels][16]`
//! words of 32 bits: an f32, or two bf16 of consecutive inputs (the lower input in the low half),
//! so one step of a panel is 64 bytes, one register, and a block is read as one sequential stream
//! whatever `T` is. Outputs are padded with zeros to 16, and an odd `I` to a pair; the last block
//! has as many panels as are left.

use half::bf16;

use crate::Dtype;
use crate::buffer::Buffer;
use crate::simd::LANES;

/// Panels of a full block.
pub(crate) const BLOCK_PANELS: usize = 4;
/// Outputs of a full block.
pub(crate) const BLOCK: usize = BLOCK_PANELS * LANES;

/// See the module page.
pub struct Matrix {
    words: Buffer<u32>,
    dtype: Dtype,
    outputs: usize,
    inputs: usize,
}

impl Matrix {
    /// Packs row-major `rows` `[O, I]`, rounding to `dtype`.
    pub fn from_f32(dtype: Dtype, outputs: usize, inputs: usize, rows: &[f32]) -> Matrix {
        assert_eq!(rows.len(), outputs * inputs, "rows of a [{outputs}, {inputs}] matrix");
        Self::pack(dtype, outputs, inputs, |o, i| rows[o * inputs + i])
    }

    /// Packs row-major `rows` `[O, I]`; exact in either dtype.
    pub fn from_bf16(dtype: Dtype, outputs: usize, inputs: usize, rows: &[bf16]) -> Matrix {
        assert_eq!(rows.len(), outputs * inputs, "rows of a [{outputs}, {inputs}] matrix");
        Self::pack(dtype, outputs, inputs, |o, i| rows[o * inputs + i].to_f32())
    }

    fn pack(
        dtype: Dtype,
        outputs: usize,
        inputs: usize,
        at: impl Fn(usize, usize) -> f32,
    ) -> Matrix {
        assert!(outputs > 0 && inputs > 0, "a matrix has outputs and inputs");
        let steps = steps(dtype, inputs);
        let words = Buffer::zeroed(outputs.next_multiple_of(LANES) * steps);
        let mut matrix = Matrix { words, dtype, outputs, inputs };
        for output in 0..outputs {
            let (start, stride) = matrix.column(output);
            for step in 0..steps {
                matrix.words[start + step * stride] = match dtype {
                    Dtype::F32 => at(output, step).to_bits(),
                    Dtype::Bf16 => {
                        let half = |i| {
                            let x = if i < inputs { at(output, i) } else { 0.0 };
                            u32::from(bf16::from_f32(x).to_bits())
                        };
                        half(2 * step) | half(2 * step + 1) << 16
                    }
                };
            }
        }
        matrix
    }

    /// O.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// I.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// What the values are stored as.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes held, padding included.
    pub fn bytes(&self) -> usize {
        self.words.bytes()
    }

    /// The weights of one output, unpacked: `out` `[I]`. For embedding look-up, DoRA norms and
    /// verification.
    pub fn read_row(&self, output: usize, out: &mut [f32]) {
        assert!(output < self.outputs, "output {output} of {}", self.outputs);
        assert_eq!(out.len(), self.inputs, "a row has {} values", self.inputs);
        let (start, stride) = self.column(output);
        let words = self.words[start..].iter().step_by(stride);
        match self.dtype {
            Dtype::F32 => {
                for (x, &word) in out.iter_mut().zip(words) {
                    *x = f32::from_bits(word);
                }
            }
            Dtype::Bf16 => {
                for (pair, &word) in out.chunks_mut(2).zip(words) {
                    pair[0] = f32::from_bits(word << 16);
                    if let Some(second) = pair.get_mut(1) {
                        *second = f32::from_bits(word & 0xffff_0000);
                    }
                }
            }
        }
    }

    /// 64-byte steps of a panel.
    pub(crate) fn steps(&self) -> usize {
        steps(self.dtype, self.inputs)
    }

    pub(crate) fn blocks(&self) -> usize {
        self.outputs.div_ceil(BLOCK)
    }

    /// Panels of `block`: 4, or fewer in the last.
    pub(crate) fn panels(&self, block: usize) -> usize {
        (self.outputs - block * BLOCK).div_ceil(LANES).min(BLOCK_PANELS)
    }

    /// First word of `block`.
    pub(crate) fn block(&self, block: usize) -> *const u32 {
        self.words[block * BLOCK * self.steps()..].as_ptr()
    }

    /// Where the words of one output start, and their stride.
    fn column(&self, output: usize) -> (usize, usize) {
        let (block, within) = (output / BLOCK, output % BLOCK);
        let stride = self.panels(block) * LANES;
        (block * BLOCK * self.steps() + within, stride)
    }
}

fn steps(dtype: Dtype, inputs: usize) -> usize {
    match dtype {
        Dtype::F32 => inputs,
        Dtype::Bf16 => inputs.div_ceil(2),
    }
}
