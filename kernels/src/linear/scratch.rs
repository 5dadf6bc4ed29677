//! Memory of a call of linears on the CPU, taken once.
//!
//! Owns its sizes. Never computes.

use std::sync::atomic::AtomicUsize;

use crate::buffer::Buffer;
use crate::linear::change::{Change, Piece};
use crate::linear::operands::{PARTS_MAX, SITES_MAX};

/// Rows and ranks of a piece of u at most. Sixteen ranks of a row are a cache line, which two
/// threads should not write.
pub(super) const PIECE_ROWS: usize = 32;
pub(super) const PIECE_RANKS: usize = 16;

/// See the module page.
pub(super) struct Scratch {
    /// `[SITES_MAX, rows_max, u_stride]`
    pub(super) u: Buffer<f32>,
    pub(super) u_stride: usize,
    /// Of all sites, site by site, by rows; where each site's start.
    pub(super) changes: Vec<Change>,
    pub(super) firsts: [usize; SITES_MAX + 1],
    pub(super) pieces: Vec<Piece>,
    /// By task of the base product: who is to add its deltas.
    pub(super) left_by: Vec<AtomicUsize>,
    pub(super) rows_max: usize,
    pub(super) rank_max: usize,
}

impl Scratch {
    /// For steps of at most `rows_max` rows, and ranks of a row's deltas of at most `rank_max` in
    /// sum.
    pub(super) fn new(rows_max: usize, rank_max: usize) -> Scratch {
        // Rows of u start at a cache line of their own.
        let u_stride = rank_max.next_multiple_of(PIECE_RANKS);
        Scratch {
            u: Buffer::zeroed(SITES_MAX * rows_max * u_stride),
            u_stride,
            changes: Vec::with_capacity(SITES_MAX * rows_max * PARTS_MAX),
            firsts: [0; SITES_MAX + 1],
            pieces: Vec::with_capacity(rows_max * pieces_max(rank_max)),
            left_by: Vec::new(),
            rows_max,
            rank_max,
        }
    }

    /// Bytes that each row takes.
    pub(super) fn row_bytes(rank_max: usize) -> usize {
        let u = SITES_MAX * rank_max.next_multiple_of(PIECE_RANKS) * size_of::<f32>();
        let changes = SITES_MAX * PARTS_MAX * size_of::<Change>();
        u + changes + pieces_max(rank_max) * size_of::<Piece>()
    }
}

/// Pieces of u by row, at most: a segment has a row at least, so chunks of rows never outnumber
/// rows; each delta may end in a piece that is not full.
fn pieces_max(rank_max: usize) -> usize {
    SITES_MAX * (rank_max.div_ceil(PIECE_RANKS) + PARTS_MAX - 1)
}
