//! Sizes that the launches and the CUDA sources agree on.
//!
//! Owns the numbers. Never launches.

/// Inputs of a step of a sum: rows of x, W and A are padded with zeros to so many.
pub(super) const STEP: usize = 32;
/// Threads of a block, in every kernel.
pub(super) const THREADS: u32 = 128;
/// Rows, and outputs or ranks, of a block that reads straight from memory.
pub(super) const FEW_ROWS: usize = 16;
pub(super) const FEW_OUTPUTS: usize = 16;
/// Rows and outputs of a block that goes through shared memory.
pub(super) const MANY_ROWS: usize = 32;
pub(super) const MANY_OUTPUTS: usize = 64;
/// Outputs of a block that adds deltas.
pub(super) const EXPAND_OUTPUTS: usize = 256;
