//! GGUF's quantised blocks as the groups our integer matrices hold.
//!
//! Owns the bit layouts of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K (ggml's
//! `ggml-common.h`). Never touches a file. The thing to know: legacy blocks come out exactly; the
//! scales of K-blocks are a product of two stored numbers and are rounded once, to f16. Types that
//! are not here (Q2_K, Q3_K) are dequantised instead.

use candle_core::quantized::GgmlDType;
use half::f16;
use polylora_kernels::{Group, Panel, WeightDtype};

/// What matrices of this type are kept as; `None`: they are dequantised.
pub fn kept_as(dtype: GgmlDType) -> Option<WeightDtype> {
    match dtype {
        GgmlDType::Q8_0 | GgmlDType::Q5_0 => Some(WeightDtype::Int8),
        GgmlDType::Q6K => Some(WeightDtype::Int8By16),
        GgmlDType::Q5_1 | GgmlDType::Q5K => Some(WeightDtype::Int8Min),
        GgmlDType::Q4_0 => Some(WeightDtype::Int4),
        GgmlDType::Q4_1 | GgmlDType::Q4K => Some(WeightDtype::Int4Min),
        _ => None,
    }
}

/// Packs rows of blocks of a type that `kept_as` knows.
pub fn pack_blocks(panel: Panel<'_>, dtype: GgmlDType, rows: &[&[u8]]) {
    match dtype {
        GgmlDType::Q8_0 => pack_each::<34, 1>(panel, rows, |block, _| q8_0(block)),
        GgmlDType::Q5_0 => pack_each::<22, 1>(panel, rows, |block, _| q5_0(block)),
        GgmlDType::Q5_1 => pack_each::<24, 1>(panel, rows, |block, _| q5_1(block)),
        GgmlDType::Q4_0 => pack_each::<18, 1>(panel, rows, |block, _| q4_0(block)),
        GgmlDType::Q4_1 => pack_each::<20, 1>(panel, rows, |block, _| q4_1(block)),
        GgmlDType::Q4K => pack_each::<144, 8>(panel, rows, q4_k),
        GgmlDType::Q5K => pack_each::<176, 8>(panel, rows, q5_k),
        GgmlDType::Q6K => pack_each::<210, 16>(panel, rows, q6_k),
        other => unreachable!("{other:?} is dequantised"),
    }
}

/// Blocks of N bytes with G groups each; `group` is told which of them.
fn pack_each<const N: usize, const G: usize>(
    panel: Panel<'_>,
    rows: &[&[u8]],
    group: impl Fn(&[u8; N], usize) -> Group,
) {
    let blocks = |n: usize| rows.get(n).map_or(&[][..], |row| row.as_chunks::<N>().0);
    let blocks: [&[[u8; N]]; 16] = std::array::from_fn(blocks);
    panel.pack_groups(|n, step| group(&blocks[n][step / G], step % G));
}

/// A group without a minimum.
fn about_zero(scale: f16, q: [u8; 32]) -> Group {
    Group { q, scale, min: f16::ZERO }
}

/// Sixteen bytes hold 32 values: the low nibbles come first.
fn nibbles(bytes: &[u8]) -> [u8; 32] {
    let mut q = [0; 32];
    for (j, b) in bytes[..16].iter().enumerate() {
        (q[j], q[j + 16]) = (b & 15, b >> 4);
    }
    q
}

/// The same with a fifth bit from `high`, bit j for value j.
fn five_bits(high: &[u8], bytes: &[u8], add: u8) -> [u8; 32] {
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    let mut q = nibbles(bytes);
    for (j, q) in q.iter_mut().enumerate() {
        *q = (*q | ((high >> j & 1) as u8) << 4) + add;
    }
    q
}

fn q8_0(block: &[u8; 34]) -> Group {
    let mut q = [0; 32];
    q.iter_mut().zip(&block[2..]).for_each(|(q, b)| *q = b.wrapping_add(128));
    about_zero(half(block, 0), q)
}

/// Values from −16; stored about 128.
fn q5_0(block: &[u8; 22]) -> Group {
    about_zero(half(block, 0), five_bits(&block[2..6], &block[6..], 128 - 16))
}

fn q5_1(block: &[u8; 24]) -> Group {
    let q = five_bits(&block[4..8], &block[8..], 0);
    Group { q, scale: half(block, 0), min: half(block, 2) }
}

fn q4_0(block: &[u8; 18]) -> Group {
    about_zero(half(block, 0), nibbles(&block[2..]))
}

fn q4_1(block: &[u8; 20]) -> Group {
    Group { q: nibbles(&block[4..]), scale: half(block, 0), min: half(block, 2) }
}

/// Group j of the eight of a Q4_K or Q5_K block. Scale and minimum are d·s and −dmin·m, with s
/// and m of 6 bits, packed into twelve bytes.
fn k_group(block: &[u8], j: usize, q: [u8; 32]) -> Group {
    let (d, d_min) = (half(block, 0).to_f32(), half(block, 2).to_f32());
    let packed = &block[4..16];
    let (s, m) = match j {
        0..4 => (packed[j] & 63, packed[j + 4] & 63),
        _ => {
            (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
        }
    };
    Group { q, scale: f16::from_f32(d * f32::from(s)), min: f16::from_f32(-d_min * f32::from(m)) }
}

/// Thirty-two bytes hold two groups: the low nibbles are the first.
fn q4_k(block: &[u8; 144], j: usize) -> Group {
    let bytes = &block[16 + j / 2 * 32..][..32];
    let mut q = [0; 32];
    q.iter_mut().zip(bytes).for_each(|(q, b)| *q = b >> (j % 2 * 4) & 15);
    k_group(block, j, q)
}

/// The same, and bit j of byte l of the high bits is the fifth of value l of group j.
fn q5_k(block: &[u8; 176], j: usize) -> Group {
    let (high, low) = block[16..].split_at(32);
    let mut q = [0; 32];
    for (q, (b, h)) in q.iter_mut().zip(low[j / 2 * 32..].iter().zip(high)) {
        *q = b >> (j % 2 * 4) & 15 | (h >> j & 1) << 4;
    }
    k_group(block, j, q)
}

/// Values from −32, stored about 128, in groups of 16. A half of 128 values is four runs of 32:
/// low nibbles of the first and the second 32 bytes, then their high ones; a byte of the high
/// bits has two for each run.
fn q6_k(block: &[u8; 210], j: usize) -> Group {
    let (n, run, part) = (j / 8, j / 2 % 4, j % 2 * 16);
    let low = &block[64 * n + run % 2 * 32 + part..][..16];
    let high = &block[128 + 32 * n + part..][..16];
    let mut q = [0; 32];
    for (q, (b, h)) in q.iter_mut().zip(low.iter().zip(high)) {
        *q = (b >> (run / 2 * 4) & 15 | (h >> (2 * run) & 3) << 4) + 128 - 32;
    }
    let d = half(block, 208).to_f32();
    about_zero(f16::from_f32(d * f32::from(block[192 + j] as i8)), q)
}

fn half(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::QTensor;
    use candle_core::{Device, Tensor};
    use polylora_kernels::{Block, Matrix};

    /// Three rows of 512 values with groups of every size.
    fn values() -> Vec<f32> {
        let noise = |i: usize| ((i * 2_654_435_761 % 10_007) as f32 / 10_007.0 - 0.4) * 0.2;
        (0..3 * 512).map(|i| noise(i) * (1.0 + (i / 16 % 7) as f32)).collect()
    }

    fn unpacked(dtype: GgmlDType, rows: &[&[u8]]) -> Vec<f32> {
        let device = polylora_kernels::Device::cpu(1);
        let kept = kept_as(dtype).unwrap();
        let matrix = Matrix::packed(&device, kept, 3, 512, |_, mut block: Block<'_>| {
            pack_blocks(block.panel(0), dtype, rows);
            Ok::<_, polylora_kernels::Error>(())
        });
        let mut values = vec![0.0; 3 * 512];
        for (row, out) in values.chunks_mut(512).enumerate() {
            matrix.as_ref().unwrap().read_row(row, out);
        }
        values
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
            let bytes = blocks.data().unwrap();
            let rows: Vec<&[u8]> = bytes.chunks(bytes.len() / 3).collect();
            let got = unpacked(dtype, &rows);
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                // Scale and minimum of a K-block are rounded to f16.
                let most = if exact { 1e-7 } else { 1e-3 };
                assert!((got - want).abs() <= most, "{dtype:?} value {i}: {got}, not {want}");
            }
            let turned = unpacked(dtype, &[rows[2], rows[0], rows[1]]);
            assert_eq!(turned, [&got[1024..], &got[..1024]].concat(), "{dtype:?}");
        }
    }
}
