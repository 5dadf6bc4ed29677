//! An activation `[T, I]` on a GPU: bf16, row by row, rows padded with zeros to whole steps.
//!
//! Owns the rounding of what is written from here. Never changes its width.

use half::bf16;

use crate::cuda::{Buffer, Error, Memory, STEP};

/// See the module page.
pub(crate) struct Act {
    pub(super) values: Buffer<bf16>,
    rows_max: usize,
    width: usize,
}

impl Act {
    /// `rows_max` rows of zeros.
    pub(crate) fn new(memory: &Memory, rows_max: usize, width: usize) -> Result<Act, Error> {
        assert!(width > 0, "an activation has a width");
        let values = Buffer::zeroed(memory, rows_max * width.next_multiple_of(STEP))?;
        Ok(Act { values, rows_max, width })
    }

    /// Rounds row-major `rows` `[n, I]` to bf16 and writes them from row `first` on.
    ///
    /// # Panics
    /// If they are not whole rows, or do not fit.
    pub(crate) fn write(&mut self, first: usize, rows: &[f32]) -> Result<(), Error> {
        let stride = self.stride();
        self.values.write(first * stride, &padded(rows, self.width, stride))
    }

    /// Rows it has room for.
    pub(crate) fn rows_max(&self) -> usize {
        self.rows_max
    }

    /// I.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.values.bytes()
    }

    /// Values from row to row.
    pub(super) fn stride(&self) -> usize {
        self.width.next_multiple_of(STEP)
    }
}

/// Row-major rows rounded to bf16, each followed by zeros.
pub(super) fn padded(rows: &[f32], width: usize, stride: usize) -> Vec<bf16> {
    assert_eq!(rows.len() % width, 0, "whole rows of {width}");
    let mut out = vec![bf16::ZERO; rows.len() / width * stride];
    for (to, row) in out.chunks_mut(stride).zip(rows.chunks(width)) {
        for (to, &x) in to.iter_mut().zip(row) {
            *to = bf16::from_f32(x);
        }
    }
    out
}
