//! GGUF's quantised blocks as the groups our integer matrices hold.
//!
//! Owns the bit layouts of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K (ggml's
//! `ggml-common.h`). Never touches a file. The thing to know: legacy blocks come out exactly; the
//! scales of K-blocks are a product of two stored numbers and are rounded once, to f16. Types that
//! are not here (Q2_K, Q3_K) are dequantised instead.

use candle_core::quantized::GgmlDType;
use half::f16;
use polylora_kernels::{Grouped, WeightDtype};

/// The weights of some whole rows, row-major.
#[derive(Default)]
pub struct Groups {
    q: Vec<u8>,
    scales: Vec<f16>,
    least: Vec<f16>,
}

/// What matrices of this type are kept as; `None`: they are dequantised.
pub fn kept_as(dtype: GgmlDType) -> Option<WeightDtype> {
    match dtype {
        GgmlDType::Q8_0 | GgmlDType::Q5_0 => Some(WeightDtype::Int8),
        GgmlDType::Q6K => Some(WeightDtype::Int8By16),
        GgmlDType::Q5_1 | GgmlDType::Q5K => Some(WeightDtype::Int8Least),
        GgmlDType::Q4_0 => Some(WeightDtype::Int4),
        GgmlDType::Q4_1 | GgmlDType::Q4K => Some(WeightDtype::Int4Least),
        _ => None,
    }
}

impl Groups {
    /// Appends blocks. `bytes` are whole blocks of a type that `kept_as` knows.
    pub fn extend(&mut self, dtype: GgmlDType, bytes: &[u8]) {
        for block in bytes.chunks_exact(dtype.type_size()) {
            match dtype {
                GgmlDType::Q8_0 => self.q8_0(block),
                GgmlDType::Q5_0 => self.q5_0(block),
                GgmlDType::Q5_1 => self.q5_1(block),
                GgmlDType::Q4_0 => self.q4_0(block),
                GgmlDType::Q4_1 => self.q4_1(block),
                GgmlDType::Q4K => self.q4_k(block),
                GgmlDType::Q5K => self.q5_k(block),
                GgmlDType::Q6K => self.q6_k(block),
                other => unreachable!("{other:?} is dequantised"),
            }
        }
    }

    pub fn view(&self) -> Grouped<'_> {
        Grouped { q: &self.q, scales: &self.scales, least: &self.least }
    }

    /// See `reordered`.
    pub fn reordered(self, order: &[usize]) -> Self {
        Self {
            q: reordered(&self.q, order),
            scales: reordered(&self.scales, order),
            least: reordered(&self.least, order),
        }
    }

    /// Sixteen bytes hold 32 values: the low nibbles come first.
    fn nibbles(&mut self, bytes: &[u8]) {
        self.q.extend(bytes.iter().map(|b| b & 15));
        self.q.extend(bytes.iter().map(|b| b >> 4));
    }

    /// The same with a fifth bit from `high`, bit j for value j.
    fn five_bits(&mut self, high: &[u8], bytes: &[u8], add: u8) {
        let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
        let fifth = |j: usize| ((high >> j & 1) as u8) << 4;
        self.q.extend(bytes.iter().enumerate().map(|(j, b)| (b & 15 | fifth(j)) + add));
        self.q.extend(bytes.iter().enumerate().map(|(j, b)| (b >> 4 | fifth(j + 16)) + add));
    }

    fn q8_0(&mut self, block: &[u8]) {
        self.scales.push(half(block, 0));
        self.q.extend(block[2..].iter().map(|q| q.wrapping_add(128)));
    }

    /// Values from −16; stored about 128.
    fn q5_0(&mut self, block: &[u8]) {
        self.scales.push(half(block, 0));
        self.five_bits(&block[2..6], &block[6..], 128 - 16);
    }

    fn q5_1(&mut self, block: &[u8]) {
        self.scales.push(half(block, 0));
        self.least.push(half(block, 2));
        self.five_bits(&block[4..8], &block[8..], 0);
    }

    fn q4_0(&mut self, block: &[u8]) {
        self.scales.push(half(block, 0));
        self.nibbles(&block[2..]);
    }

    fn q4_1(&mut self, block: &[u8]) {
        self.scales.push(half(block, 0));
        self.least.push(half(block, 2));
        self.nibbles(&block[4..]);
    }

    /// Scale and least value of the eight groups of a Q4_K or Q5_K block: d·s and −dmin·m, with s
    /// and m of 6 bits, packed into twelve bytes.
    fn k_scales(&mut self, block: &[u8]) {
        let (d, d_least) = (half(block, 0).to_f32(), half(block, 2).to_f32());
        let packed = &block[4..16];
        for j in 0..8 {
            let (s, m) = match j {
                0..4 => (packed[j] & 63, packed[j + 4] & 63),
                _ => (
                    packed[j + 4] & 15 | packed[j - 4] >> 6 << 4,
                    packed[j + 4] >> 4 | packed[j] >> 6 << 4,
                ),
            };
            self.scales.push(f16::from_f32(d * f32::from(s)));
            self.least.push(f16::from_f32(-d_least * f32::from(m)));
        }
    }

    fn q4_k(&mut self, block: &[u8]) {
        self.k_scales(block);
        block[16..].chunks(32).for_each(|bytes| self.nibbles(bytes));
    }

    /// Bit j of byte l of the high bits is the fifth of value l of group j.
    fn q5_k(&mut self, block: &[u8]) {
        self.k_scales(block);
        let (high, low) = block[16..].split_at(32);
        for (pair, bytes) in low.chunks(32).enumerate() {
            let fifth = |j: usize| move |h: &u8| (h >> j & 1) << 4;
            let (first, second) = (fifth(2 * pair), fifth(2 * pair + 1));
            self.q.extend(bytes.iter().zip(high).map(|(b, h)| b & 15 | first(h)));
            self.q.extend(bytes.iter().zip(high).map(|(b, h)| b >> 4 | second(h)));
        }
    }

    /// Values from −32, stored about 128, in groups of 16. A half of 128 values is four runs of 32:
    /// low nibbles of the first and the second 32 bytes, then their high ones; a byte of the high
    /// bits has two for each run.
    fn q6_k(&mut self, block: &[u8]) {
        let d = half(block, 208).to_f32();
        self.scales.extend(block[192..208].iter().map(|s| f16::from_f32(d * f32::from(*s as i8))));
        for n in 0..2 {
            let (low, high) = (&block[64 * n..][..64], &block[128 + 32 * n..][..32]);
            for run in 0..4 {
                let bytes = &low[run % 2 * 32..][..32];
                let value = |(b, h): (&u8, &u8)| {
                    (b >> (run / 2 * 4) & 15 | (h >> (2 * run) & 3) << 4) + 128 - 32
                };
                self.q.extend(bytes.iter().zip(high).map(value));
            }
        }
    }
}

fn half(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

/// Rows of equal width in another order: `order[row]` is the row that comes there.
pub fn reordered<T: Copy>(values: &[T], order: &[usize]) -> Vec<T> {
    let width = values.len() / order.len();
    order.iter().flat_map(|row| values[row * width..][..width].iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::QTensor;
    use candle_core::{Device, Tensor};

    /// Three rows of 512 values with groups of every size.
    fn values() -> Vec<f32> {
        let noise = |i: usize| ((i * 2_654_435_761 % 10_007) as f32 / 10_007.0 - 0.4) * 0.2;
        (0..3 * 512).map(|i| noise(i) * (1.0 + (i / 16 % 7) as f32)).collect()
    }

    fn unpacked(dtype: WeightDtype, groups: &Groups) -> Vec<f32> {
        let matrix = polylora_kernels::Matrix::from_groups(dtype, 3, 512, &groups.view());
        let mut rows = vec![0.0; 3 * 512];
        for (row, out) in rows.chunks_mut(512).enumerate() {
            matrix.read_row(row, out);
        }
        rows
    }

    #[test]
    fn every_block_type_is_what_candle_dequantises() {
        let tensor = Tensor::from_vec(values(), (3, 512), &Device::Cpu).unwrap();
        for (dtype, exact) in [
            (GgmlDType::Q8_0, true),
            (GgmlDType::Q5_0, true),
            (GgmlDType::Q5_1, true),
            (GgmlDType::Q4_0, true),
            (GgmlDType::Q4_1, true),
            (GgmlDType::Q4K, false),
            (GgmlDType::Q5K, false),
            (GgmlDType::Q6K, false),
        ] {
            let blocks = QTensor::quantize(&tensor, dtype).unwrap();
            let flat = blocks.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap();
            let want: Vec<f32> = flat.to_vec1().unwrap();
            let mut groups = Groups::default();
            groups.extend(dtype, &blocks.data().unwrap());
            let got = unpacked(kept_as(dtype).unwrap(), &groups);
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                // Scale and least value of a K-block are rounded to f16.
                let most = if exact { 1e-7 } else { 1e-3 };
                assert!((got - want).abs() <= most, "{dtype:?} value {i}: {got}, not {want}");
            }
            let turned = unpacked(kept_as(dtype).unwrap(), &groups.reordered(&[2, 0, 1]));
            assert_eq!(turned, [&got[1024..], &got[..1024]].concat(), "{dtype:?}");
        }
    }
}
