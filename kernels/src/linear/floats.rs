//! A tile of y = x·Wᵀ with f32 or bf16 weights: every lane is one chain over the inputs in order.
//!
//! Bf16 weights multiply x rounded to bf16 where the CPU multiplies pairs ([`Simd::PAIRS`]); else
//! they are widened, and multiply x as it is.

use crate::linear::tile::{Product, Tile};
use crate::simd::{LANES, Simd};

pub(super) struct Floats<const BF16: bool>;

impl<const BF16: bool> Product for Floats<BF16> {
    const ROWS: usize = 6;
    const ROWS_NARROW: usize = 6;
    const TICKS: usize = 1;

    #[inline(always)]
    unsafe fn compute<S: Simd, const ROWS: usize, const PANELS: usize>(tile: &Tile) {
        if BF16 && !S::PAIRS {
            return widened::<S, ROWS, PANELS>(tile);
        }
        let mut acc = tile.begin::<S, ROWS, PANELS>();
        let stride = tile.panels * LANES;
        let mut w = tile.w.add(tile.panel * LANES);
        let x = tile.x.words.add(tile.start);
        for step in 0..tile.steps {
            tile.bring::<S>(step);
            for (r, row) in acc.iter_mut().enumerate() {
                let x = *x.add(r * tile.x.stride + step);
                for (p, sum) in row.iter_mut().enumerate() {
                    let w = w.add(p * LANES);
                    *sum = if BF16 {
                        S::dot_bf16(*sum, S::splat_int(x as i32), S::load_int(w))
                    } else {
                        S::fma(S::splat(f32::from_bits(x)), S::load(w.cast()), *sum)
                    };
                }
            }
            w = w.add(stride);
        }
        tile.end::<S, ROWS, PANELS>(&acc);
    }
}

/// Of bf16 weights, widened: of each step's pairs the first, then the second. Both at hand at once,
/// and the sums of six rows would not fit in sixteen registers.
#[inline(always)]
unsafe fn widened<S: Simd, const ROWS: usize, const PANELS: usize>(tile: &Tile) {
    let mut acc = tile.begin::<S, ROWS, PANELS>();
    let stride = tile.panels * LANES;
    let mut w = tile.w.add(tile.panel * LANES);
    let mut x = tile.x.words.add(2 * tile.start).cast::<f32>();
    for step in 0..tile.steps {
        tile.bring::<S>(step);
        for half in 0..2 {
            let mut factors = [S::zero(); PANELS];
            for (p, factor) in factors.iter_mut().enumerate() {
                let w = w.add(p * LANES);
                *factor = if half == 0 { S::low_halves(w) } else { S::high_halves(w) };
            }
            for (r, row) in acc.iter_mut().enumerate() {
                let x = S::splat(*x.add(r * tile.x.stride + half));
                for (sum, &factor) in row.iter_mut().zip(&factors) {
                    *sum = S::fma(x, factor, *sum);
                }
            }
        }
        x = x.add(2);
        w = w.add(stride);
    }
    tile.end::<S, ROWS, PANELS>(&acc);
}
