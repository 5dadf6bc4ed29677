//! A tile of y = x·Wᵀ with f32 or bf16 weights: every lane is one chain over the inputs in order.

use crate::linear::tile::{Product, Tile};
use crate::simd::{LANES, Simd};

pub(super) struct Floats<const BF16: bool>;

impl<const BF16: bool> Product for Floats<BF16> {
    const ROWS: usize = 6;
    const TICKS: usize = 1;

    #[inline(always)]
    unsafe fn compute<S: Simd, const ROWS: usize, const PANELS: usize>(tile: &Tile) {
        let mut acc = tile.begin::<S, ROWS, PANELS>();
        let stride = tile.panels * LANES;
        let mut w = tile.w.add(tile.panel * LANES);
        let x = tile.x.words.add(tile.start);
        for step in 0..tile.steps {
            tile.bring::<S>(step);
            for (r, row) in acc.iter_mut().enumerate() {
                let x = *x.add(r * tile.x.stride + step);
                for (p, sum) in row.iter_mut().enumerate() {
                    *sum = if BF16 {
                        S::step_bf16(*sum, x, w.add(p * LANES))
                    } else {
                        S::step_f32(*sum, x, w.add(p * LANES))
                    };
                }
            }
            w = w.add(stride);
        }
        tile.end::<S, ROWS, PANELS>(&acc);
    }
}
