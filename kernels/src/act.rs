//! Activations of one step: `[rows_max, width]` f32, and their bf16 rounding beside them when the
//! weights are bf16.
//!
//! Rows are padded with zeros to a multiple of 32 so that factors stored in groups of 32 need no
//! tail. The two copies never differ but by rounding: whoever writes one writes both.

use half::bf16;

use crate::Dtype;
use crate::buffer::{Buffer, Shared};
use crate::simd::{GROUP, Simd};

/// See the module page.
pub struct Act {
    wide: Buffer<f32>,
    half: Option<Buffer<bf16>>,
    rows_max: usize,
    width: usize,
    stride: usize,
}

/// The write access of a fork's tasks: each task answers for rows and columns of its own.
#[derive(Clone, Copy)]
pub(crate) struct ActWriter {
    wide: Shared<f32>,
    half: Shared<bf16>,
    stride: usize,
}

impl Act {
    /// Zeros for `rows_max` rows; `dtype` is that of the weights that will read them.
    pub fn new(dtype: Dtype, rows_max: usize, width: usize) -> Act {
        let stride = width.next_multiple_of(GROUP);
        let half = (dtype == Dtype::Bf16).then(|| Buffer::zeroed(rows_max * stride));
        Act { wide: Buffer::zeroed(rows_max * stride), half, rows_max, width, stride }
    }

    /// Values a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows there is room for.
    pub fn rows_max(&self) -> usize {
        self.rows_max
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.wide.bytes() + self.half.as_ref().map_or(0, Buffer::bytes)
    }

    /// Row `t` in f32.
    pub fn row(&self, t: usize) -> &[f32] {
        &self.wide[t * self.stride..][..self.width]
    }

    /// Fills both copies of row `t`.
    pub fn set_row(&mut self, t: usize, x: &[f32]) {
        assert_eq!(x.len(), self.width, "a row of Act has width {}", self.width);
        let start = t * self.stride;
        self.wide[start..][..self.width].copy_from_slice(x);
        if let Some(half) = &mut self.half {
            for (h, &x) in half[start..][..self.width].iter_mut().zip(x) {
                *h = bf16::from_f32(x);
            }
        }
    }

    /// f32 rows with their stride in values; the padding is zero.
    pub(crate) fn wide(&self) -> (&[f32], usize) {
        (&self.wide, self.stride)
    }

    /// The bf16 rows, where they are kept, with the stride of the others.
    pub(crate) fn halves(&self) -> Option<&[bf16]> {
        self.half.as_deref()
    }

    /// The rows as 32-bit words of a packed matmul of `dtype` (a pair of bf16, or an f32), and the
    /// stride in words.
    pub(crate) fn words(&self, dtype: Dtype) -> (*const u32, usize) {
        match dtype {
            Dtype::F32 => (self.wide.as_ptr().cast(), self.stride),
            Dtype::Bf16 => {
                let half = self.half.as_ref().expect("bf16 weights read an Act made for bf16");
                (half.as_ptr().cast(), self.stride / 2)
            }
        }
    }

    pub(crate) fn writer(&mut self) -> ActWriter {
        ActWriter {
            wide: Shared::of(&mut self.wide),
            half: self.half.as_mut().map_or(Shared::null(), |h| Shared::of(h)),
            stride: self.stride,
        }
    }
}

impl ActWriter {
    /// Writes `n` lanes at `(row, column)` of both copies.
    ///
    /// # Safety
    /// In bounds, and no other task touches these values.
    #[inline(always)]
    pub(crate) unsafe fn store<S: Simd>(self, row: usize, column: usize, n: usize, v: S::F) {
        let at = row * self.stride + column;
        S::store_row_n(self.wide.get().add(at), n, v);
        if !self.half.get().is_null() {
            S::store_bf16_n(self.half.get().add(at), n, v);
        }
    }

    /// The f32 values from `(row, 0)` on.
    #[inline(always)]
    pub(crate) fn row(self, row: usize) -> *const f32 {
        self.wide.get().wrapping_add(row * self.stride)
    }
}
