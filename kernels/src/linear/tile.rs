//! One tile of x·Wᵀ: some rows by one or four panels, over some steps.
//!
//! Owns where a tile is, how its sums begin and end, and what it asks the memory for beside its
//! products. Never multiplies: that is a [`Product`]. The thing to know: the rows and panels of a
//! tile are constants, so its sums live in registers.

use crate::act::{Outlier, Rounded};
use crate::linear::lines::RATE_ONE;
use crate::matrix::BLOCK_PANELS;
use crate::simd::{LANES, Simd};

/// A way to multiply.
pub(super) trait Product {
    /// Rows of a tile at most, `FEW_ROWS` or fewer; where registers are few, and tiles of one
    /// panel.
    const ROWS: usize;
    const ROWS_NARROW: usize;
    /// Times in a step that a tile may ask for lines.
    const TICKS: usize;

    /// # Safety
    /// The tile's pointers are valid for its rows, panels and steps.
    unsafe fn compute<S: Simd, const ROWS: usize, const PANELS: usize>(tile: &Tile);

    /// Whether x is rounded to integers, and its outliers are left out of tiles:
    /// [`Self::add_outliers`].
    const ROUNDED: bool = false;

    /// Adds their products to the sums of a block.
    ///
    /// # Safety
    /// The block's pointers are valid for the rows and columns of the outliers.
    #[inline(always)]
    unsafe fn add_outliers<S: Simd>(_outliers: &[Outlier], _block: Block) {
        unreachable!("asked where x is not rounded")
    }
}

/// A block of weights, all steps of it, and the outputs that rows have of it.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub(super) w: *const u32,
    pub(super) panels: usize,
    /// Of row 0.
    pub(super) y: *mut f32,
    pub(super) y_stride: usize,
    pub(super) outputs: usize,
}

/// A tile of one panel has few products a tick: it asks for lines at every fourth.
const TICKS_NARROW: usize = 4;

/// Rows of a tile at most.
#[inline(always)]
pub(super) const fn rows_max<S: Simd, P: Product>() -> usize {
    if S::WIDE { P::ROWS } else { P::ROWS_NARROW }
}

/// Ticks of some steps.
#[inline(always)]
pub(super) fn ticks<S: Simd, P: Product>(steps: usize) -> usize {
    let ticks = steps * P::TICKS;
    if S::WIDE { ticks } else { ticks.div_ceil(TICKS_NARROW) }
}

/// Rows of x as a product reads them.
#[derive(Clone, Copy)]
pub(super) struct X {
    /// An f32, two bf16 or four i8 a word.
    pub(super) words: *const u32,
    /// Words a row.
    pub(super) stride: usize,
    /// Of i8: `[T, groups]` and `[T, groups, 2]`.
    pub(super) scales: *const f32,
    pub(super) sums: *const i32,
    pub(super) groups: usize,
}

// SAFETY: only numbers; every read is an unsafe act of its user, and x is not written in a call.
unsafe impl Send for X {}
unsafe impl Sync for X {}

impl X {
    pub(super) fn of_floats((words, stride): (*const u32, usize)) -> X {
        X { words, stride, scales: std::ptr::null(), sums: std::ptr::null(), groups: 0 }
    }

    pub(super) fn of_bytes(x: Rounded) -> X {
        X {
            words: x.q.get().cast_const().cast(),
            stride: x.groups * 8,
            scales: x.scales.get(),
            sums: x.sums.get(),
            groups: x.groups,
        }
    }

    /// The rows from `row` on.
    #[inline(always)]
    pub(super) fn at_row(self, row: usize) -> X {
        X {
            words: self.words.wrapping_add(row * self.stride),
            scales: self.scales.wrapping_add(row * self.groups),
            sums: self.sums.wrapping_add(row * 2 * self.groups),
            ..self
        }
    }
}

/// See the module page.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// From the first row on.
    pub(super) x: X,
    /// First word of the first step of the block, whatever panels the tile has of it.
    pub(super) w: *const u32,
    /// Panels of the block, and the first of the tile's.
    pub(super) panels: usize,
    pub(super) panel: usize,
    /// The first step.
    pub(super) start: usize,
    /// Sums start at zero; else at y.
    pub(super) fresh: bool,
    pub(super) steps: usize,
    pub(super) y: *mut f32,
    pub(super) y_stride: usize,
    /// Outputs of the tile, fewer than its lanes at W's end.
    pub(super) outputs: usize,
    /// What to bring near beside the products, from here on: so many lines a tick, in
    /// `RATE_ONE`ths.
    pub(super) ahead: *const u32,
    pub(super) ahead_rate: usize,
    /// What else to bring near: a list, and how many of it a tick, in `RATE_ONE`ths.
    pub(super) gather: *const *const u8,
    pub(super) gather_rate: usize,
}

impl Tile {
    /// Gives the tile of `group` its share of the `words` at `ahead`, which the next turn reads.
    #[inline(always)]
    pub(super) fn look_ahead(
        &mut self,
        ahead: *const u32,
        words: usize,
        ticks: usize,
        group: usize,
        groups: usize,
    ) {
        let lines = words / LANES;
        self.ahead = ahead.wrapping_add(lines * group / groups * LANES);
        self.ahead_rate = (lines * RATE_ONE).div_ceil(groups * ticks);
    }

    /// Asks for what the tile is to bring near at this tick.
    #[inline(always)]
    pub(super) unsafe fn bring<S: Simd>(&self, tick: usize) {
        let tick = match TICKS_NARROW {
            _ if S::WIDE => tick,
            each if tick.is_multiple_of(each) => tick / each,
            _ => return,
        };
        if self.ahead_rate > 0 {
            let line = self.ahead.wrapping_add(tick * self.ahead_rate / RATE_ONE * LANES);
            S::prefetch(line.cast());
            if self.ahead_rate > RATE_ONE {
                S::prefetch(line.wrapping_add(LANES).cast());
            }
            if self.ahead_rate > 2 * RATE_ONE {
                S::prefetch(line.wrapping_add(2 * LANES).cast());
            }
            if !S::WIDE && self.ahead_rate > 3 * RATE_ONE {
                S::prefetch(line.wrapping_add(3 * LANES).cast());
            }
        }
        if self.gather_rate > 0 {
            S::prefetch(*self.gather.add(tick * self.gather_rate / RATE_ONE));
        }
    }

    /// Computes `rows` rows of all panels.
    #[inline(always)]
    pub(super) unsafe fn rows<S: Simd, P: Product>(self, rows: usize) {
        match rows {
            1 => self.all_panels::<S, P, 1>(),
            2 => self.all_panels::<S, P, 2>(),
            3 => self.all_panels::<S, P, 3>(),
            4 if rows_max::<S, P>() >= 4 => self.all_panels::<S, P, 4>(),
            5 if rows_max::<S, P>() >= 5 => self.all_panels::<S, P, 5>(),
            6 if rows_max::<S, P>() >= 6 => self.all_panels::<S, P, 6>(),
            _ => unreachable!("a tile of {rows} rows"),
        }
    }

    #[inline(always)]
    unsafe fn all_panels<S: Simd, P: Product, const ROWS: usize>(self) {
        if self.panels == BLOCK_PANELS && (S::WIDE || ROWS == 1) {
            return P::compute::<S, ROWS, BLOCK_PANELS>(&self);
        }
        for panel in 0..self.panels {
            let mut tile = self;
            tile.panel = panel;
            // Each panel's pass brings its share.
            tile.ahead_rate = self.ahead_rate.div_ceil(self.panels);
            let lines = ticks::<S, P>(self.steps) * tile.ahead_rate / RATE_ONE;
            tile.ahead = self.ahead.wrapping_add(panel * lines * LANES);
            let lines = panel * ticks::<S, P>(self.steps) * self.gather_rate / RATE_ONE;
            tile.gather = self.gather.wrapping_add(lines);
            tile.y = self.y.add(panel * LANES);
            tile.outputs = (self.outputs - panel * LANES).min(LANES);
            P::compute::<S, ROWS, 1>(&tile);
        }
    }

    #[inline(always)]
    fn lanes(&self, panel: usize) -> usize {
        (self.outputs - panel * LANES).min(LANES)
    }

    /// The sums so far.
    #[inline(always)]
    pub(super) unsafe fn begin<S: Simd, const ROWS: usize, const PANELS: usize>(
        &self,
    ) -> [[S::F; PANELS]; ROWS] {
        let mut acc = [[S::zero(); PANELS]; ROWS];
        if !self.fresh {
            for (r, row) in acc.iter_mut().enumerate() {
                for (p, sum) in row.iter_mut().enumerate() {
                    *sum = S::load_n(self.y.add(r * self.y_stride + p * LANES), self.lanes(p));
                }
            }
        }
        acc
    }

    /// Stores the sums.
    #[inline(always)]
    pub(super) unsafe fn end<S: Simd, const ROWS: usize, const PANELS: usize>(
        &self,
        acc: &[[S::F; PANELS]; ROWS],
    ) {
        for (r, row) in acc.iter().enumerate() {
            for (p, &sum) in row.iter().enumerate() {
                S::store_n(self.y.add(r * self.y_stride + p * LANES), self.lanes(p), sum);
            }
        }
    }
}
