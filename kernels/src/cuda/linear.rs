//! [`crate::linear`] on a GPU: for each site a product, and the deltas of its segments on top.
//!
//! Owns the order of launches. The thing to know: a bias, a gain and integer weights cannot be made
//! on a GPU, so none comes here.

use crate::cuda::gemm::gemm;
use crate::cuda::lora::{LoraScratch, Segmented, lora};
use crate::cuda::{Act, Error, Gpu};
use crate::linear::Linear;
use crate::segments::Segments;

/// See the module page; shapes are checked but for the deltas'.
pub(crate) fn linear(
    gpu: &Gpu,
    x: &Act,
    rows: usize,
    outs: &mut [Linear<'_>],
    segments: Segments<'_>,
    scratch: &mut LoraScratch,
) -> Result<(), Error> {
    if rows == 0 {
        return Ok(());
    }
    for (i, out) in outs.iter_mut().enumerate() {
        scratch.plan(gpu, Segmented { i, site: out.site, weight: out.weight, segments });
        let (weight, y) = (out.weight.on().cuda(), &mut out.y.on_mut().cuda_mut().values);
        gemm(gpu, x, rows, weight, y)?;
        lora(gpu, x, y, weight.outputs(), scratch)?;
    }
    Ok(())
}
