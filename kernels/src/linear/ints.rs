//! A tile of y = x·Wᵀ with integer weights and 8-bit activations.
//!
//! y = Σ over groups of  a·(s·Σ(q − zero)·x + min·Σx),   a: the activation's scale, s: W's.
//! The sums of integers are exact, wherever they start; a lane's float is one chain over the groups
//! in order and then the outliers, so y has the same bits in any batch and on any CPU with fused
//! multiply-add. Outliers come last, from a list: a tile that looked for them group by group would
//! guess wrong at every fifth, and cost a sixth more.

use std::hint::black_box;

use half::f16;

use crate::act::Outlier;
use crate::linear::tile::{Block, Product, Tile};
use crate::matrix::ints::SCALE_WORDS;
use crate::matrix::{BLOCK, BLOCK_PANELS};
use crate::simd::{LANES, Simd};

/// `BITS` of a value, inputs of a `GROUP`, whether it has a `LEAST` value.
pub(super) struct Ints<const BITS: usize, const GROUP: usize, const LEAST: bool>;

impl<const BITS: usize, const GROUP: usize, const LEAST: bool> Ints<BITS, GROUP, LEAST> {
    const ZERO: i32 = if LEAST { 0 } else { 1 << (BITS - 1) };
    /// Words of an output, and of a row of x, in a group.
    const WORDS: usize = GROUP * BITS / 32;
    const X_WORDS: usize = GROUP / 4;
    const HEAD: usize = SCALE_WORDS * (1 + LEAST as usize);

    /// Scale and sum of a row's group.
    #[inline(always)]
    unsafe fn activation(tile: &Tile, row: usize, step: usize) -> (f32, i32) {
        let groups = tile.x.groups;
        if GROUP == 16 {
            let sum = *tile.x.sums.add(row * 2 * groups + step);
            return (*tile.x.scales.add(row * groups + step / 2), sum);
        }
        let sums = tile.x.sums.add(2 * (row * groups + step));
        (*tile.x.scales.add(row * groups + step), *sums + *sums.add(1))
    }

    /// A tile of nibbles, which are multiplied by bytes in fewer instructions than bytes are.
    #[inline(always)]
    unsafe fn by_nibbles<S: Simd, const ROWS: usize, const PANELS: usize>(tile: &Tile) {
        let mut acc = tile.begin::<S, ROWS, PANELS>();
        let stride = tile.panels * (Self::HEAD + Self::WORDS * LANES);
        // As in `compute`.
        let count = black_box(Self::WORDS);
        for step in 0..tile.steps {
            let head = tile.w.add(step * stride);
            let words = head.add(tile.panels * Self::HEAD + tile.panel * LANES);
            let group = tile.start + step;
            let x = tile.x.words.add(group * Self::X_WORDS);
            let mut dots = [[S::splat_int(0); PANELS]; ROWS];
            for index in 0..count {
                tile.bring::<S>(step * Self::WORDS + index);
                let w = words.add(index * tile.panels * LANES);
                for p in 0..PANELS {
                    let w = S::load_int(w.add(p * LANES));
                    for (half, w) in [S::low_nibbles(w), S::high_nibbles(w)].iter().enumerate() {
                        for (r, row) in dots.iter_mut().enumerate() {
                            let x = *x.add(r * tile.x.stride + 2 * index + half);
                            row[p] = S::dot_nibbles(row[p], *w, S::splat_int(x as i32));
                        }
                    }
                }
            }
            let (mut scales, mut rests) = ([0.0; ROWS], [0.0; ROWS]);
            for (r, row) in dots.iter_mut().enumerate() {
                let (scale, sum) = Self::activation(tile, r, group);
                for dot in row {
                    *dot = S::nibble_sums(*dot, -Self::ZERO * sum);
                }
                (scales[r], rests[r]) = (scale, scale * sum as f32);
            }
            acc = Self::scaled::<S, ROWS, PANELS>(acc, tile, head, &dots, &scales, &rests);
        }
        tile.end::<S, ROWS, PANELS>(&acc);
    }

    /// Adds an outlier's products to some panels of a block, `FULL` where all lanes are outputs.
    #[inline(always)]
    unsafe fn add_outlier<S: Simd, const PANELS: usize, const FULL: bool>(
        outlier: &Outlier,
        block: &Block,
        panel: usize,
    ) {
        let (column, x) = (outlier.column as usize, S::splat(outlier.value));
        let (step, place) = (column / GROUP, column % GROUP);
        let head = block.w.add(step * block.panels * (Self::HEAD + Self::WORDS * LANES));
        // Four q of 8 bits are a word of W; of nibbles two such words are one.
        let word = place / 4 * BITS / 8;
        let bit = 8 * (place % 4) + place / 4 % (8 / BITS) * BITS;
        let words = head.add(block.panels * (Self::HEAD + word * LANES));
        let y = block.y.add(outlier.row as usize * block.y_stride);
        for p in panel..panel + PANELS {
            let w = S::bits::<BITS>(S::load_int(words.add(p * LANES)), bit);
            let w = S::sub(S::to_float(w), S::splat(Self::ZERO as f32));
            let head = head.add(p * SCALE_WORDS);
            let n = if FULL { LANES } else { (block.outputs - p * LANES).min(LANES) };
            let y = y.add(p * LANES);
            let sum = S::load_n(y, n);
            let mut sum = S::fma(w, S::mul(S::load_f16(head.cast::<f16>()), x), sum);
            if LEAST {
                let min = S::load_f16(head.add(block.panels * SCALE_WORDS).cast::<f16>());
                sum = S::fma(min, x, sum);
            }
            S::store_n(y, n, sum);
        }
    }

    /// Adds the sums of a group, times the scales of W (at `head`) and of x.
    #[inline(always)]
    unsafe fn scaled<S: Simd, const ROWS: usize, const PANELS: usize>(
        mut acc: [[S::F; PANELS]; ROWS],
        tile: &Tile,
        head: *const u32,
        dots: &[[S::I; PANELS]; ROWS],
        scales: &[f32; ROWS],
        rests: &[f32; ROWS],
    ) -> [[S::F; PANELS]; ROWS] {
        for p in 0..PANELS {
            let head = head.add((tile.panel + p) * SCALE_WORDS);
            let scale = S::load_f16(head.cast::<f16>());
            for r in 0..ROWS {
                let scale = S::mul(scale, S::splat(scales[r]));
                acc[r][p] = S::fma(S::to_float(dots[r][p]), scale, acc[r][p]);
            }
            if LEAST {
                let min = S::load_f16(head.add(tile.panels * SCALE_WORDS).cast::<f16>());
                for r in 0..ROWS {
                    acc[r][p] = S::fma(min, S::splat(rests[r]), acc[r][p]);
                }
            }
        }
        acc
    }
}

impl<const BITS: usize, const GROUP: usize, const LEAST: bool> Product
    for Ints<BITS, GROUP, LEAST>
{
    const ROWS: usize = 3;
    const ROWS_NARROW: usize = 4;
    const TICKS: usize = Self::WORDS;
    const ROUNDED: bool = true;

    #[inline(always)]
    unsafe fn compute<S: Simd, const ROWS: usize, const PANELS: usize>(tile: &Tile) {
        if BITS == 4 && S::NIBBLES {
            return Self::by_nibbles::<S, ROWS, PANELS>(tile);
        }
        let mut acc = tile.begin::<S, ROWS, PANELS>();
        let stride = tile.panels * (Self::HEAD + Self::WORDS * LANES);
        // Not known to the compiler, which would unroll the loop, load all of a group's words
        // ahead, and have no registers for them.
        let count = black_box(Self::WORDS);
        for step in 0..tile.steps {
            let head = tile.w.add(step * stride);
            let words = head.add(tile.panels * Self::HEAD + tile.panel * LANES);
            let group = tile.start + step;
            let x = tile.x.words.add(group * Self::X_WORDS);
            let mut dots = [[S::splat_int(0); PANELS]; ROWS];
            let mut scales = [0.0; ROWS];
            let mut rests = [0.0; ROWS];
            for (r, row) in dots.iter_mut().enumerate() {
                let (scale, sum) = Self::activation(tile, r, group);
                *row = [S::splat_int((S::ORIGIN - Self::ZERO) * sum); PANELS];
                (scales[r], rests[r]) = (scale, scale * sum as f32);
            }
            for index in 0..count {
                tile.bring::<S>(step * Self::WORDS + index);
                let w = words.add(index * tile.panels * LANES);
                let w: [S::I; PANELS] = std::array::from_fn(|p| S::load_int(w.add(p * LANES)));
                for (r, row) in dots.iter_mut().enumerate() {
                    let x = x.add(r * tile.x.stride + index * (Self::X_WORDS / Self::WORDS));
                    let low = S::splat_int(*x as i32);
                    for (p, dot) in row.iter_mut().enumerate() {
                        let w = if BITS == 4 { S::low_nibbles(w[p]) } else { w[p] };
                        *dot = S::dot(*dot, w, low);
                    }
                    if BITS == 4 {
                        let high = S::splat_int(*x.add(1) as i32);
                        for (p, dot) in row.iter_mut().enumerate() {
                            *dot = S::dot(*dot, S::high_nibbles(w[p]), high);
                        }
                    }
                }
            }
            acc = Self::scaled::<S, ROWS, PANELS>(acc, tile, head, &dots, &scales, &rests);
        }
        tile.end::<S, ROWS, PANELS>(&acc);
    }

    #[inline(always)]
    unsafe fn add_outliers<S: Simd>(outliers: &[Outlier], block: Block) {
        let full = block.outputs == BLOCK;
        for outlier in outliers {
            if full {
                Self::add_outlier::<S, BLOCK_PANELS, true>(outlier, &block, 0);
                continue;
            }
            for panel in 0..block.panels {
                Self::add_outlier::<S, 1, false>(outlier, &block, panel);
            }
        }
    }
}
