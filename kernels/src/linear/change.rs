//! What the deltas of a call change: whose rows, in which pieces.
//!
//! Owns the records that a call lists once and its tasks read. Never computes.

use std::ops::Range;

use crate::linear::delta::Delta;
use crate::matrix::BLOCK;

/// So few rows are one tile high: they read weights and factors once, as a stream.
pub(super) const FEW_ROWS: usize = 6;
/// Turns a thread takes, at most, to make its share of u.
pub(super) const TURNS_PER_THREAD: usize = 4;
/// Rows times blocks whose y (256 bytes each) the deltas are added to while it is near.
pub(super) const STRETCH: usize = 1024;

/// A delta of one site and the rows it changes. Looked up once a call: a delta's own page has left
/// the caches since the last step, and many tasks ask for it.
#[derive(Clone, Copy)]
pub(super) struct Change {
    pub(super) delta: *const Delta,
    pub(super) weight: f32,
    pub(super) rows: [u32; 2],
    /// Where its ranks start in the rows of u.
    pub(super) column: u32,
    /// No other change of the same rows comes after it.
    pub(super) last: bool,
    /// Its products are of bf16 pairs: it reads x rounded, and its u is rounded.
    pub(super) pairs: bool,
    /// B, where it is of bf16 and all that is added; else null.
    pub(super) words: *const u32,
    pub(super) rank: u32,
}

// SAFETY: a delta is immutable, and its owner outlives the call that listed it.
unsafe impl Send for Change {}
unsafe impl Sync for Change {}

impl Change {
    /// # Safety
    /// Within the call that listed it.
    #[inline(always)]
    pub(super) unsafe fn delta(&self) -> &Delta {
        &*self.delta
    }

    #[inline(always)]
    pub(super) fn rows(&self) -> Range<usize> {
        self.rows[0] as usize..self.rows[1] as usize
    }

    /// Words of B of a whole block of outputs.
    #[inline(always)]
    pub(super) fn block_words(&self) -> usize {
        self.rank.div_ceil(2) as usize * BLOCK
    }

    /// B of a block, those before it whole; `words` is not null.
    #[inline(always)]
    pub(super) fn block(&self, block: usize) -> *const u32 {
        self.words.wrapping_add(block * self.block_words())
    }
}

/// A piece of u: some rows of one change of a site, and some ranks.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub(super) site: u32,
    pub(super) change: u32,
    pub(super) rows: [u32; 2],
    pub(super) ranks: [u32; 2],
}
