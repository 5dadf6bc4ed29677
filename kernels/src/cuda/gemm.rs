//! y = x·Wᵀ on a GPU.
//!
//! x `[T, I]`   W `[O, I]`   y `[T, O]` f32. One launch; `kernels/cuda/gemm.cu` has two kernels for
//! few and for many rows, which give the same bits, so the choice between them is free.

use crate::cuda::gpu::{Arg, Entry};
use crate::cuda::{
    Act, Buffer, Error, FEW_OUTPUTS, FEW_ROWS, Gpu, MANY_OUTPUTS, MANY_ROWS, Matrix,
};

/// Up to so many rows the weights come straight from memory. A guess until it is measured.
const FEW_ROWS_MAX: usize = 32;

/// `y` `[T, O]` becomes x·Wᵀ of the first `rows` rows of `x`. The caller has checked the shapes.
///
/// # Panics
/// On memory of another GPU.
pub(super) fn gemm(
    gpu: &Gpu,
    x: &Act,
    rows: usize,
    w: &Matrix,
    y: &mut Buffer<f32>,
) -> Result<(), Error> {
    let outputs = w.outputs();
    let (entry, rows_each, outputs_each) = if rows <= FEW_ROWS_MAX {
        (Entry::GemmFew, FEW_ROWS, FEW_OUTPUTS)
    } else {
        (Entry::GemmMany, MANY_ROWS, MANY_OUTPUTS)
    };
    let args = [
        Arg::Address(w.values.address(gpu.memory())),
        Arg::Address(x.values.address(gpu.memory())),
        Arg::Address(y.address(gpu.memory())),
        Arg::count(rows),
        Arg::count(outputs),
        Arg::count(x.stride()),
    ];
    // SAFETY: shapes are checked by the op, rows of x and W have the same stride, and blocks are
    // disjoint tiles of y.
    unsafe { gpu.launch(entry, [rows.div_ceil(rows_each), outputs.div_ceil(outputs_each)], &args) }
}
