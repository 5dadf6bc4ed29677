//! What all tasks of an attention read, and where one of them is.
//!
//! Owns the operands and their spans. Never computes.

use std::ops::Range;

use crate::act::cpu::ActWriter;
use crate::buffer::Shared;
use crate::kv::{KvCache, Layout, Rows, Values};
use crate::simd::{Isa, LANES};

/// Pages of one tile, and their tokens.
pub(super) const TILE_PAGES: usize = 4;
pub(super) const TOKENS: usize = TILE_PAGES * KvCache::PAGE;
/// Positions of a part, whole tiles.
pub(super) const PART: usize = 16 * TOKENS;

/// What all tasks read.
pub(super) struct Job<'a> {
    pub(super) isa: Isa,
    pub(super) values: Values,
    pub(super) q: *const f32,
    pub(super) heads: usize,
    pub(super) layout: Layout,
    pub(super) layer: usize,
    pub(super) rows: Rows<'a>,
    pub(super) scale: f32,
    pub(super) window: Option<u32>,
    pub(super) out: ActWriter,
    /// `[T, N]`, or null.
    pub(super) lse: Shared<f32>,
}

// SAFETY: `q` and `values` are only read, `out` and `lse` are written by the task that owns the row
// and head.
unsafe impl Sync for Job<'_> {}

impl Job<'_> {
    /// Query heads of a kv head.
    pub(super) fn group(&self) -> usize {
        self.heads / self.layout.kv_heads
    }

    /// First and last position row `t` sees.
    #[inline(always)]
    pub(super) fn span(&self, t: usize) -> (usize, usize) {
        let last = self.rows.positions[t] as usize;
        (self.window.map_or(0, |w| (last + 1).saturating_sub(w as usize)), last)
    }

    /// The parts these positions are in.
    #[inline(always)]
    pub(super) fn parts(&self, t: usize) -> Range<usize> {
        let (first, last) = self.span(t);
        first / PART..last / PART + 1
    }
}

/// Running state of one (row, head).
#[derive(Clone, Copy)]
pub(super) struct State {
    /// `[D]`, or `[D/2]` words of two bf16 where those are multiplied.
    pub(super) q: *const f32,
    /// Positions it sees.
    pub(super) first: usize,
    pub(super) last: usize,
    /// Largest score so far, in units of ln 2.
    pub(super) max: f32,
    /// Sum of weights so far, lane by lane.
    pub(super) sum: [f32; LANES],
}
