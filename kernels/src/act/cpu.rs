//! An activation on the CPU: `[rows_max, width]` f32, and beside it what packed weights multiply:
//! its bf16 rounding on CPUs that multiply bf16 (others do not write it), its rounding to 8 bits
//! ([`bytes`]) for integers.
//!
//! Rows are padded with zeros to a multiple of 32 so that factors stored in groups of 32 need no
//! tail. The copies never differ but by rounding: whoever writes one writes all, while the values
//! are near; a product finds them ready.

use std::ops::Range;
use std::sync::MutexGuard;

use half::bf16;

use crate::Dtype;
use crate::act::bytes::{Bytes, Outlier, Rounded};
use crate::buffer::{Buffer, Shared};
use crate::device::{Cpu, part};
use crate::simd::{GROUP, Isa, Kernel, Simd};

/// See the module page.
pub(crate) struct Act {
    wide: Buffer<f32>,
    half: Option<Buffer<bf16>>,
    bytes: Option<Bytes>,
    rows_max: usize,
    width: usize,
    stride: usize,
}

/// The write access of a fork's tasks: each task answers for rows and columns of its own.
#[derive(Clone, Copy)]
pub(crate) struct ActWriter {
    wide: Shared<f32>,
    half: Shared<bf16>,
    rounded: Option<Rounded>,
    stride: usize,
}

impl Act {
    /// Zeros for `rows_max` rows; `dtype` is that of the floats among the weights that will read
    /// them.
    pub(super) fn new(dtype: Dtype, rows_max: usize, width: usize) -> Act {
        let stride = width.next_multiple_of(GROUP);
        let half = (dtype == Dtype::Bf16).then(|| Buffer::zeroed(rows_max * stride));
        let wide = Buffer::zeroed(rows_max * stride);
        Act { wide, half, bytes: None, rows_max, width, stride }
    }

    /// The same (still zeros), to be read by integer weights too.
    pub(super) fn with_bytes(self) -> Act {
        let bytes = Bytes::new(self.rows_max, self.width);
        Act { bytes: Some(bytes), ..self }
    }

    /// Bytes that each row takes at most, whatever reads it.
    pub(crate) fn row_bytes(width: usize) -> usize {
        let stride = width.next_multiple_of(GROUP);
        stride * (size_of::<f32>() + size_of::<bf16>()) + Bytes::row_bytes(width)
    }

    /// Values a row.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Groups of 32 a row.
    fn groups(&self) -> usize {
        self.stride / GROUP
    }

    /// Rows there is room for.
    pub(crate) fn rows_max(&self) -> usize {
        self.rows_max
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        let copies = self.half.as_ref().map_or(0, Buffer::bytes);
        self.wide.bytes() + copies + self.bytes.as_ref().map_or(0, Bytes::bytes)
    }

    /// Row `t` in f32.
    pub(crate) fn row(&self, t: usize) -> &[f32] {
        &self.wide[t * self.stride..][..self.width]
    }

    /// Fills all copies of row `t`.
    pub(crate) fn set_row(&mut self, t: usize, x: &[f32]) {
        assert_eq!(x.len(), self.width, "a row of Act has width {}", self.width);
        let start = t * self.stride;
        self.wide[start..][..self.width].copy_from_slice(x);
        if let Some(half) = &mut self.half {
            for (h, &x) in half[start..][..self.width].iter_mut().zip(x) {
                *h = bf16::from_f32(x);
            }
        }
        let groups = 0..self.groups();
        // SAFETY: the row is asserted by the slices above, and this Act is borrowed mutably.
        unsafe { Isa::Portable.run(Round { out: self.writer(), row: t, groups }) }
    }

    /// Rounds the first `rows` rows to bytes, where they are kept; for ops whose tasks cannot.
    pub(crate) fn round(&mut self, dev: &Cpu, rows: usize) {
        if self.bytes.is_none() {
            return;
        }
        let groups = self.groups();
        let (out, isa) = (self.writer(), dev.isa());
        let pieces = dev.pieces(rows, groups * ROUND_COST);
        dev.fork(pieces, &|piece| {
            for row in part(rows, pieces, piece) {
                // SAFETY: a row belongs to one piece.
                unsafe { isa.run(Round { out, row, groups: 0..groups }) }
            }
        });
    }

    /// The rows in bytes.
    ///
    /// # Panics
    /// Where they are not kept.
    pub(crate) fn rounded(&self) -> Rounded {
        self.kept_bytes().reader(self.groups())
    }

    /// What the bytes of the first `rows` rows leave out, in the order of rows and columns.
    ///
    /// # Panics
    /// As [`Self::rounded`].
    pub(crate) fn outliers(&self, rows: usize) -> MutexGuard<'_, Vec<Outlier>> {
        self.kept_bytes().list(rows, self.groups())
    }

    fn kept_bytes(&self) -> &Bytes {
        self.bytes.as_ref().expect("integer weights read an Act made with bytes")
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
        let groups = self.groups();
        ActWriter {
            wide: Shared::of(&mut self.wide),
            half: self.half.as_mut().map_or(Shared::null(), |h| Shared::of(h)),
            rounded: self.bytes.as_mut().map(|b| b.writer(groups)),
            stride: self.stride,
        }
    }
}

/// To round a group, in the device's measure.
const ROUND_COST: usize = 16;

/// Rounds some groups of a row.
struct Round {
    out: ActWriter,
    row: usize,
    groups: Range<usize>,
}

impl Kernel for Round {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        self.out.round::<S>(self.row, self.groups);
    }
}

impl ActWriter {
    /// Writes `n` lanes at `(row, column)` of the float copies; when all of a group of 32 is
    /// written, [`Self::round`] follows.
    ///
    /// # Safety
    /// In bounds, and no other task touches these values.
    #[inline(always)]
    pub(crate) unsafe fn store<S: Simd>(self, row: usize, column: usize, n: usize, v: S::F) {
        let at = row * self.stride + column;
        S::store_row_n(self.wide.get().add(at), n, v);
        if S::PAIRS && !self.half.get().is_null() {
            S::store_bf16_n(self.half.get().add(at), n, v);
        }
    }

    /// Rounds some groups of a row to bytes, where they are kept.
    ///
    /// # Safety
    /// As [`Self::store`].
    #[inline(always)]
    pub(crate) unsafe fn round<S: Simd>(self, row: usize, groups: Range<usize>) {
        if let Some(rounded) = self.rounded {
            rounded.round::<S>(self.row(row), row, groups);
        }
    }

    /// The f32 values from `(row, 0)` on.
    #[inline(always)]
    pub(crate) fn row(self, row: usize) -> *const f32 {
        self.wide.get().wrapping_add(row * self.stride)
    }
}
