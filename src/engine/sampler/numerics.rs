//! The arithmetic of sampling over a whole vocabulary: exponentials, sums, the draw.
//!
//! Plain loops in fixed order, so that the same logits give the same bits every time. Never knows
//! what the numbers mean. The thing to know: loops run in independent lanes, which compilers turn
//! into vector code.

const LANES: usize = 16;
/// Weights summed at once; the draw looks inside one such block only.
const BLOCK: usize = 1024;

/// e^x for x <= 0 within two units in the last place; 0 where the result would be subnormal.
pub fn exp(x: f32) -> f32 {
    // x = n·ln 2 + r with |r| <= ln 2 / 2. Adding 1.5·2^23 rounds to an integer and leaves it in
    // the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4; // 355 / 512: n·LN_2_HIGH is exact
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let mut e_r = 1.0 / 5040.0;
    for factorial in [720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0] {
        e_r = e_r * r + 1.0 / factorial;
    }
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    let power = f32::from_bits(exponent << 23);
    if x < -87.0 { 0.0 } else { e_r * power }
}

/// out[i] = e^((logits[i] - peak) / temperature).
pub fn exp_each(logits: &[f32], peak: f32, temperature: f32, out: &mut [f32]) {
    for (weight, &logit) in out.iter_mut().zip(logits) {
        *weight = exp((logit - peak) / temperature);
    }
}

fn block_total(block: &[f32]) -> f64 {
    let mut totals = [0.0_f64; LANES];
    for chunk in block.chunks(LANES) {
        for (total, &weight) in totals.iter_mut().zip(chunk) {
            *total += f64::from(weight);
        }
    }
    totals.iter().sum()
}

/// The sum of `weights`.
pub fn total(weights: &[f32]) -> f64 {
    weights.chunks(BLOCK).map(block_total).sum()
}

/// The index that the share `u` (0 <= u < 1) of the sum of `weights` falls on, walking up from
/// index 0. Some weight must be positive; an index of weight 0 is never drawn.
pub fn draw(weights: &[f32], u: f64) -> u32 {
    let target = u * total(weights);
    let mut before = 0.0;
    let mut last = None;
    for (number, block) in weights.chunks(BLOCK).enumerate() {
        let after = before + block_total(block);
        if after > before {
            last = Some((number, block, before));
        }
        if after > target {
            break;
        }
        before = after;
    }
    let (number, block, before) = last.expect("some weight is positive");
    let mut sum = before;
    let mut drawn = 0;
    for (index, &weight) in block.iter().enumerate() {
        if weight > 0.0 {
            drawn = index;
            sum += f64::from(weight);
            // Rounding may leave the sum of the block a hair short of the target: then it is the
            // last one.
            if sum > target {
                break;
            }
        }
    }
    (number * BLOCK + drawn) as u32
}

/// A number in [0, 1) that depends on `seed` and `index` only: the `index`-th of a SplitMix64
/// stream whose start is the mixed seed, so that neighbouring seeds have unrelated streams.
pub fn uniform(seed: u64, index: u64) -> f64 {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let start = mix(seed.wrapping_add(GOLDEN));
    let bits = mix(start.wrapping_add(index.wrapping_add(1).wrapping_mul(GOLDEN)));
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
