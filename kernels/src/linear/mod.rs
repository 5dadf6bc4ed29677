//! y = gain ∘ (x·Wᵀ + Σ w·(x·Aᵀ)·Bᵀ) + Σ w·delta.bias + bias,   one to three sites that read the
//! same x.
//!
//! x `[T, I]`   W `[O, I]`   y `[T, O]`   and for every segment its mix of residents, each with
//! its own A `[R, I]`, B `[O, R]` (scale folded in), gain `[O]`, bias `[O]` and weight w. Rows
//! without a delta are x·Wᵀ + bias and cost nothing beyond it. A gain is of a delta alone, of
//! weight 1. Several deltas are each a change of the same rows by the same code; their u = x·Aᵀ lie
//! side by side.
//!
//! Numerics: sums in f32. On the CPU, W·x is one chain over the inputs in order (fused
//! multiply-add; with `vdpbf16ps` a pair at a time). u is 16 chains (inputs i, i+16, …) joined in
//! one order. The delta is added on top of x·Wᵀ rank by rank, its weight multiplied into u. Integer
//! weights multiply x rounded once to 8 bits in groups of 32 ([`ints`], [`Act`]), all others the
//! f32 x; u is f32. But a CPU with `vdpbf16ps` multiplies bf16 weights by x rounded once to bf16,
//! and beside them bf16 factors as well: x, and u, are rounded for those. On a GPU: see
//! [`crate::cuda`].

mod backward;
mod base;
mod call;
mod change;
mod cpu;
pub(crate) mod delta;
mod expand;
mod floats;
mod halves;
mod ints;
mod lines;
mod operands;
mod scratch;
mod shrink;
mod stream;
mod tile;
mod turn;

use crate::Error;
use crate::act::Act;
use crate::cuda;
use crate::device::{Device, Kind, Memory, On};
use crate::segments::Segments;
pub use backward::{Accumulate, LinearBackward, linear_backward};
pub use operands::{Linear, PARTS_MAX, SITES_MAX};
pub(crate) use operands::{check_delta, check_ranks};

/// Memory of [`linear`], taken once.
pub struct LoraScratch {
    on: On<scratch::Scratch, cuda::LoraScratch>,
    rows_max: usize,
}

impl LoraScratch {
    /// For steps of at most `rows_max` rows, and ranks of a row's deltas of at most `rank_max` in
    /// sum.
    ///
    /// # Errors
    /// A GPU without room.
    pub fn new(memory: &Memory, rows_max: usize, rank_max: usize) -> Result<LoraScratch, Error> {
        let on = match memory {
            Memory::Cpu => On::Cpu(scratch::Scratch::new(rows_max, rank_max)),
            Memory::Cuda(memory) => {
                On::Cuda(Box::new(cuda::LoraScratch::new(memory, rows_max, rank_max)?))
            }
        };
        Ok(LoraScratch { on, rows_max })
    }

    /// Bytes that each row takes.
    pub fn row_bytes(rank_max: usize) -> usize {
        scratch::Scratch::row_bytes(rank_max)
    }
}

/// One to three linears that read the same x (q, k, v / gate, up / one), with the deltas that their
/// sites have in the rows' segments.
///
/// # Panics
/// On shapes that do not fit: x and W, W and y, a delta and its site, more rows or ranks than the
/// scratch has; on an x without the copy that W reads (bf16, bytes); on a gain whose delta is not
/// alone with weight 1 (what it means then is not a sum).
pub fn linear(
    dev: &Device,
    x: &Act,
    rows: usize,
    outs: &mut [Linear<'_>],
    segments: Segments<'_>,
    scratch: &mut LoraScratch,
) {
    check(x, rows, outs, segments, scratch);
    match &dev.kind {
        Kind::Cpu(cpu) => {
            cpu::linear(cpu, x.on().cpu(), rows, outs, segments, scratch.on.cpu_mut());
        }
        Kind::Cuda(gpu) => {
            let (x, scratch) = (x.on().cuda(), scratch.on.cuda_mut());
            if let Err(error) = cuda::linear(gpu, x, rows, outs, segments, scratch) {
                dev.remember(error);
            }
        }
    }
}

fn check(x: &Act, rows: usize, outs: &[Linear<'_>], segments: Segments<'_>, scratch: &LoraScratch) {
    segments.check(rows);
    assert!((1..=SITES_MAX).contains(&outs.len()), "{} sites in one call", outs.len());
    assert!(rows <= x.rows_max(), "{rows} rows of x's {}", x.rows_max());
    assert!(rows <= scratch.rows_max, "{rows} rows, scratch for {}", scratch.rows_max);
    for (i, out) in outs.iter().enumerate() {
        let (outputs, inputs) = (out.weight.outputs(), out.weight.inputs());
        assert_eq!(inputs, x.width(), "site {i}: W is [{outputs}, {inputs}]");
        assert!(out.y.holds(rows, outputs), "site {i}: y holds {rows} rows of {outputs}");
        assert!(out.bias.is_none_or(|b| b.len() == outputs), "site {i}: bias has {outputs} values");
    }
}
