//! Small products in f32:   c = α·(a·b)   or   c += α·(a·b).
//!
//! Owns one inner loop, lanes over the columns of b and c. Never shares work out: a task runs it on
//! what is its own. The thing to know: an element is one chain over the steps in order, from zero
//! on, then multiplied by α and added to c; so its bits depend on nothing but its row of a and its
//! column of b.

use crate::simd::{Kernel, LANES, Simd};

/// The operands. `a` may lie either way; rows of `b` and `c` are consecutive values.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    /// `[rows, steps]`: from one row, and from one step, to the next.
    pub(crate) a: *const f32,
    pub(crate) a_row: usize,
    pub(crate) a_step: usize,
    /// `[steps, columns]`
    pub(crate) b: *const f32,
    pub(crate) b_step: usize,
    /// `[rows, columns]`
    pub(crate) c: *mut f32,
    pub(crate) c_row: usize,
    pub(crate) rows: usize,
    pub(crate) steps: usize,
    pub(crate) columns: usize,
    /// α.
    pub(crate) factor: f32,
    /// Added to c, else written.
    pub(crate) add: bool,
}

/// Vectors of a tile where there are registers for them, and where there are few.
const WIDE: usize = 4;
const NARROW: usize = 2;

impl Kernel for Product {
    type Output = ();

    /// # Safety
    /// The pointers are valid for what the fields say; nobody else touches c.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let vecs = if S::WIDE { WIDE } else { NARROW };
        let mut column = 0;
        while column < self.columns {
            let whole = column + vecs * LANES <= self.columns;
            let mut row = 0;
            while row < self.rows {
                let left = self.rows - row;
                row += match (left, whole, S::WIDE) {
                    (4.., true, true) => self.tile::<S, 4, WIDE>(row, column),
                    (2.., true, true) => self.tile::<S, 2, WIDE>(row, column),
                    (_, true, true) => self.tile::<S, 1, WIDE>(row, column),
                    (2.., true, false) => self.tile::<S, 2, NARROW>(row, column),
                    (_, true, false) => self.tile::<S, 1, NARROW>(row, column),
                    (4.., false, _) => self.tile::<S, 4, 1>(row, column),
                    (_, false, _) => self.tile::<S, 1, 1>(row, column),
                };
            }
            column += if whole { vecs * LANES } else { LANES };
        }
    }
}

impl Product {
    /// Computes a tile; returns its rows.
    #[inline(always)]
    #[expect(clippy::needless_range_loop, reason = "iterators over parts of `acc` spill it")]
    unsafe fn tile<S: Simd, const ROWS: usize, const VECS: usize>(
        &self,
        row: usize,
        column: usize,
    ) -> usize {
        let n = if VECS > 1 { LANES } else { (self.columns - column).min(LANES) };
        let mut acc = [[S::zero(); VECS]; ROWS];
        let mut a = self.a.wrapping_add(row * self.a_row);
        let mut b = self.b.wrapping_add(column);
        for _ in 0..self.steps {
            let mut values = [S::zero(); VECS];
            for v in 0..VECS {
                values[v] = S::load_n(b.wrapping_add(v * LANES), n);
            }
            for r in 0..ROWS {
                let a = S::splat(*a.wrapping_add(r * self.a_row));
                for v in 0..VECS {
                    acc[r][v] = S::fma(a, values[v], acc[r][v]);
                }
            }
            a = a.wrapping_add(self.a_step);
            b = b.wrapping_add(self.b_step);
        }
        let factor = S::splat(self.factor);
        for r in 0..ROWS {
            for v in 0..VECS {
                let c = self.c.add((row + r) * self.c_row + column + v * LANES);
                let sum = match self.add {
                    true => S::fma(factor, acc[r][v], S::load_n(c, n)),
                    false => S::mul(factor, acc[r][v]),
                };
                S::store_n(c, n, sum);
            }
        }
        ROWS
    }
}
