//! Weights as small integers: groups of 16 or 32 inputs of an output share a scale, and, where the
//! dtype has one, a minimum:   w = scale · (q − zero) + min.
//!
//! Owns the layout of such a step, packing, quantising and reading back. Never multiplies. A step
//! is one group of every panel of the block:
//!
//!   scales `[panels][16]` f16, minimums `[panels][16]` f16 (if any), q `[words][panels][16]`
//!
//! An 8-bit word holds four consecutive inputs, the first in the low byte. A 4-bit word holds
//! eight: the first four in the low nibbles of its bytes, the others in the high ones. q is
//! unsigned, for the CPU multiplies unsigned by signed bytes; `zero` makes up for it. Scales are
//! f16 as in GGUF files, whose blocks of 32 are thus kept exactly; scales that K-blocks make by a
//! product are rounded once (relative 2⁻¹¹, a hundredth of a quantisation step).

use half::f16;

use super::BLOCK;
use super::cpu::Matrix;
use crate::WeightDtype;
use crate::simd::LANES;

/// Words of a panel's scales, or minimums.
pub(crate) const SCALE_WORDS: usize = LANES / 2;

/// Weights `[O, I]` in groups, row-major, as a file has them. `I` is a multiple of the group.
pub struct Grouped<'a> {
    /// `[O, I]`, at most 4 or 8 bits as the dtype says.
    pub q: &'a [u8],
    /// `[O, I / group]`
    pub scales: &'a [f16],
    /// `[O, I / group]`, empty unless the dtype has minimums.
    pub min: &'a [f16],
}

/// One group of an output: 32 integers, or 16 and no more.
#[derive(Clone, Copy)]
pub struct Group {
    /// At most 4 or 8 bits as the dtype says.
    pub q: [u8; 32],
    pub scale: f16,
    /// Zero unless the dtype has minimums.
    pub min: f16,
}

impl Matrix {
    /// Packs integers as they are.
    ///
    /// # Panics
    /// On a dtype of floats, and on lengths that do not fit.
    pub(super) fn from_groups(
        dtype: WeightDtype,
        outputs: usize,
        inputs: usize,
        from: &Grouped<'_>,
    ) -> Matrix {
        let size = dtype.group().expect("integers have groups");
        assert!(inputs.is_multiple_of(size), "rows of {inputs} in groups of {size}");
        let count = inputs / size;
        let min = if dtype.has_min() { outputs * count } else { 0 };
        assert_eq!(from.q.len(), outputs * inputs, "q is [{outputs}, {inputs}]");
        assert_eq!(from.scales.len(), outputs * count, "scales are [{outputs}, {count}]");
        assert_eq!(from.min.len(), min, "minimums are [{outputs}, {count}] or none");
        Self::packed_here(dtype, outputs, inputs, |panel| {
            let first = panel.outputs().start;
            panel.pack_groups(|n, step| {
                if step >= count {
                    return Group::none(dtype);
                }
                let (output, mut q) = (first + n, [0; 32]);
                q[..size].copy_from_slice(&from.q[output * inputs + step * size..][..size]);
                let at = output * count + step;
                let min = from.min.get(at).copied().unwrap_or(f16::ZERO);
                Group { q, scale: from.scales[at], min }
            });
        })
    }

    /// See [`Matrix::read_row`].
    pub(super) fn read_ints(&self, output: usize, out: &mut [f32]) {
        let size = self.dtype.group().expect("integers have groups");
        let zero = f32::from(self.dtype.zero());
        for (step, out) in out.chunks_mut(size).enumerate() {
            let group = self.get(output, step);
            let (scale, min) = (group.scale.to_f32(), group.min.to_f32());
            for (value, q) in out.iter_mut().zip(group.q) {
                *value = scale * (f32::from(q) - zero) + min;
            }
        }
    }

    /// Where a group of an output is: first word of its step, panels of the step, its lane.
    fn at(&self, output: usize, step: usize) -> (usize, usize, usize) {
        let block = output / BLOCK;
        let start = self.block_start(block) + step * self.step_words(block);
        (start, self.panels(block), output % BLOCK)
    }

    fn get(&self, output: usize, step: usize) -> Group {
        let (start, panels, lane) = self.at(output, step);
        let dtype = self.dtype;
        let half = |words: &[u32]| f16::from_bits((words[lane / 2] >> (16 * (lane % 2))) as u16);
        let scale = half(&self.words[start..]);
        let min = match dtype.has_min() {
            true => half(&self.words[start + panels * SCALE_WORDS..]),
            false => f16::ZERO,
        };
        let start = start + panels * dtype.head_words() + lane;
        let mut q = [dtype.zero(); 32];
        for (index, q) in q.chunks_mut(dtype.word_inputs()).enumerate().take(dtype.group_words()) {
            let bytes = self.words[start + index * panels * LANES].to_le_bytes();
            for (i, q) in q.iter_mut().enumerate() {
                *q = match dtype.word_inputs() {
                    4 => bytes[i],
                    _ => bytes[i % 4] >> (4 * (i / 4)) & 15,
                };
            }
        }
        Group { q, scale, min }
    }
}

impl Group {
    /// What stands where a row has no more inputs: weights of 0.
    pub fn none(dtype: WeightDtype) -> Group {
        Group { q: [dtype.zero(); 32], scale: f16::ZERO, min: f16::ZERO }
    }

    /// Rounds values: symmetric about zero, or from the minimum to the largest.
    pub(super) fn of(dtype: WeightDtype, values: &[f32]) -> Group {
        let top = f32::from(dtype.top());
        let min = values.iter().copied().fold(f32::INFINITY, f32::min);
        let largest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (min, scale) = match dtype.has_min() {
            true => (f16::from_f32(min), f16::from_f32((largest - min) / top)),
            false => {
                let steps = top - f32::from(dtype.zero());
                (f16::ZERO, f16::from_f32(largest.max(-min) / steps))
            }
        };
        // Rounded with the scale that is stored, so that its rounding is made up for.
        let (step, origin) = (scale.to_f32(), min.to_f32());
        let mut q = [dtype.zero(); 32];
        for (q, value) in q.iter_mut().zip(values) {
            let steps = if step > 0.0 { (value - origin) / step } else { 0.0 };
            let steps = (steps + f32::from(dtype.zero())).clamp(0.0, top);
            // Adding 2^23 leaves no room for a fraction: to the nearest, ties to even.
            *q = ((steps + 8_388_608.0) - 8_388_608.0) as u8;
        }
        Group { q, scale, min }
    }
}

impl WeightDtype {
    /// Inputs that share a scale; `None` for floats.
    pub fn group(self) -> Option<usize> {
        match self {
            WeightDtype::F32 | WeightDtype::Bf16 => None,
            WeightDtype::Int8By16 => Some(16),
            _ => Some(32),
        }
    }

    /// Bits of a value on average, scales included.
    pub fn bits(self) -> f64 {
        (32 * self.step_words()) as f64 / (LANES * self.step_inputs()) as f64
    }

    /// Whether a group has a minimum.
    pub(crate) fn has_min(self) -> bool {
        matches!(self, WeightDtype::Int8Min | WeightDtype::Int4Min)
    }

    /// The stored integer that stands for 0 (for the minimum, where there is one).
    pub(crate) fn zero(self) -> u8 {
        match self {
            WeightDtype::Int8 | WeightDtype::Int8By16 => 128,
            WeightDtype::Int4 => 8,
            _ => 0,
        }
    }

    /// The largest stored integer.
    fn top(self) -> u8 {
        match self {
            WeightDtype::Int4 | WeightDtype::Int4Min => 15,
            _ => 255,
        }
    }

    /// Consecutive inputs of an output in one word.
    pub(crate) fn word_inputs(self) -> usize {
        match self {
            WeightDtype::F32 => 1,
            WeightDtype::Bf16 => 2,
            WeightDtype::Int8 | WeightDtype::Int8By16 | WeightDtype::Int8Min => 4,
            WeightDtype::Int4 | WeightDtype::Int4Min => 8,
        }
    }

    /// Inputs of a step.
    fn step_inputs(self) -> usize {
        self.group().unwrap_or(self.word_inputs())
    }

    /// Words of one output in a step.
    pub(crate) fn group_words(self) -> usize {
        self.step_inputs() / self.word_inputs()
    }

    /// Words of a panel before its values.
    pub(crate) fn head_words(self) -> usize {
        match self.group() {
            Some(_) => SCALE_WORDS * (1 + usize::from(self.has_min())),
            None => 0,
        }
    }

    /// Words of a panel's step.
    pub(crate) fn step_words(self) -> usize {
        self.head_words() + self.group_words() * LANES
    }

    /// Steps of a row of `inputs`. Activations are quantised in groups of 32, so groups of 16 come
    /// in pairs.
    pub(crate) fn steps(self, inputs: usize) -> usize {
        match self.group() {
            Some(group) => inputs.div_ceil(32) * (32 / group),
            None => inputs.div_ceil(self.word_inputs()),
        }
    }
}
