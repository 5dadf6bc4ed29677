//! What a tile of attention's backward is made of beside products: keys and values both ways
//! round, the weights and their gradients, Σ dO∘O.
//!
//! Owns these inner loops. Never chooses rows or tokens.

use std::f32::consts::LOG2_E;

use crate::act::cpu::ActWriter;
use crate::kv::{KvCache, Layout};
use crate::simd::{Kernel, LANES, Simd, Stored};

/// Tokens of a tile: four pages.
pub(super) const TOKENS: usize = 4 * KvCache::PAGE;

/// `[TOKENS, D padded to 16]`, and turned `[D padded to 16, TOKENS]`.
#[derive(Clone, Copy)]
pub(super) struct BothWays {
    pub(super) rows: *mut f32,
    pub(super) turned: *mut f32,
}

/// Widens keys and values of some tokens of a head; those behind are zero.
pub(super) struct Unpack<'a, E> {
    pub(super) values: *const E,
    pub(super) layout: Layout,
    pub(super) layer: usize,
    pub(super) kv_head: usize,
    /// Of the tile's tokens.
    pub(super) pages: &'a [u32],
    pub(super) tokens: usize,
    pub(super) k: BothWays,
    pub(super) v: BothWays,
}

impl<E: Stored> Kernel for Unpack<'_, E> {
    type Output = ();

    /// # Safety
    /// Pages are of the cache, and hold the tokens.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Unpack { layout, k, v, .. } = self;
        let stride = layout.v_stride();
        std::ptr::write_bytes(k.turned, 0, TOKENS * stride);
        std::ptr::write_bytes(v.rows, 0, TOKENS * stride);
        for (index, &page) in self.pages.iter().enumerate() {
            let first = index * KvCache::PAGE;
            let tokens = (self.tokens - first).min(KvCache::PAGE);
            let page = self.values.add(layout.at(self.layer, page as usize, self.kv_head));
            for d in (0..layout.head_dim).step_by(2) {
                for (i, keys) in E::load_pair::<S>(page.add(d * KvCache::PAGE)).iter().enumerate() {
                    S::store_n(k.turned.add((d + i) * TOKENS + first), tokens, *keys);
                }
            }
            for token in 0..tokens {
                for d in (0..stride).step_by(LANES) {
                    let two = E::load_pair::<S>(page.add(layout.v_group(token, d)));
                    S::store(v.rows.add((first + token) * stride + d), two[token % 2]);
                }
            }
        }
        turn::<S>(k.turned, [stride, TOKENS], k.rows);
        turn::<S>(v.rows, [TOKENS, stride], v.turned);
    }
}

/// Rows become columns; both numbers are multiples of 16.
#[inline(always)]
unsafe fn turn<S: Simd>(from: *const f32, [rows, columns]: [usize; 2], to: *mut f32) {
    for row in (0..rows).step_by(LANES) {
        for column in (0..columns).step_by(LANES) {
            let mut tile = [S::splat_int(0); LANES];
            for (i, words) in tile.iter_mut().enumerate() {
                *words = S::load_int(from.add((row + i) * columns + column).cast());
            }
            let to = to.add(column * rows + row).cast::<u32>();
            S::store_turned(&tile, [to, to.add(8 * rows)], rows);
        }
    }
}

/// Of some rows of a head: scores become weights, and their gradients the scores'.
pub(super) struct Soften {
    /// `[rows, TOKENS]`: scale · q·k / ln 2, then P.
    pub(super) p: *mut f32,
    /// The same of dP = dO·v, then scale · P∘(dP − Σ dO∘O).
    pub(super) ds: *mut f32,
    pub(super) rows: usize,
    /// Position of the first row, and of the first token.
    pub(super) position: usize,
    pub(super) start: usize,
    pub(super) window: usize,
    pub(super) scale: f32,
    /// Those of the rows, so many values apart.
    pub(super) lse: *const f32,
    pub(super) delta: *const f32,
    pub(super) heads: usize,
}

impl Kernel for Soften {
    type Output = ();

    /// # Safety
    /// The pointers are valid for the rows.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (lane, hidden) = (S::load(LANE.as_ptr()), S::splat(f32::NEG_INFINITY));
        let scale = S::splat(self.scale);
        for r in 0..self.rows {
            let position = self.position + r;
            // The tokens this row sees.
            let end = (position + 1).saturating_sub(self.start) as f32;
            let first = (position + 1).saturating_sub(self.window);
            let first = first.saturating_sub(self.start) as f32;
            let lse = S::splat(*self.lse.add(r * self.heads) * LOG2_E);
            let delta = S::splat(*self.delta.add(r * self.heads));
            for at in (0..TOKENS).step_by(LANES) {
                let p = self.p.add(r * TOKENS + at);
                let ds = self.ds.add(r * TOKENS + at);
                let token = S::add(lane, S::splat(at as f32));
                let score = S::sub(S::load(p), lse);
                let score = S::select_lt(token, S::splat(end), score, hidden);
                let score = S::select_lt(token, S::splat(first), hidden, score);
                let weight = S::exp2(score);
                S::store(p, weight);
                let slope = S::mul(weight, S::sub(S::load(ds), delta));
                S::store(ds, S::mul(scale, slope));
            }
        }
    }
}

/// Σ dO∘O of some rows of a head.
pub(super) struct Deltas {
    pub(super) out: *const f32,
    pub(super) out_row: usize,
    pub(super) d_out: *const f32,
    pub(super) d_out_row: usize,
    pub(super) rows: usize,
    pub(super) dim: usize,
    pub(super) delta: *mut f32,
    pub(super) heads: usize,
}

impl Kernel for Deltas {
    type Output = ();

    /// # Safety
    /// The pointers are valid for the rows.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for r in 0..self.rows {
            let out = self.out.add(r * self.out_row);
            let d_out = self.d_out.add(r * self.d_out_row);
            let mut sums = S::zero();
            for d in (0..self.dim).step_by(LANES) {
                let n = (self.dim - d).min(LANES);
                sums = S::fma(S::load_n(out.add(d), n), S::load_n(d_out.add(d), n), sums);
            }
            *self.delta.add(r * self.heads) = S::sum(sums);
        }
    }
}

/// Writes rows of a head to an activation.
pub(super) struct Put {
    pub(super) from: *const f32,
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) dim: usize,
    pub(super) out: ActWriter,
    pub(super) row: usize,
    pub(super) column: usize,
}

impl Kernel for Put {
    type Output = ();

    /// # Safety
    /// In bounds; nobody else touches these values.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for r in 0..self.rows {
            for d in (0..self.dim).step_by(LANES) {
                let n = (self.dim - d).min(LANES);
                let values = S::load_n(self.from.add(r * self.stride + d), n);
                self.out.store::<S>(self.row + r, self.column + d, n, values);
            }
        }
    }
}

const LANE: [f32; LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
