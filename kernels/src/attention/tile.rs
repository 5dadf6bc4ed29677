//! One tile: a group of (row, head) pairs takes four pages.
//!
//! Owns the inner loops: scores, their weights under a running maximum, the sums over values. Never
//! chooses pages, rows or an order. The things to know: in int8 a page's scales multiply 16 scores
//! at a time, and the weights of 16 values, so that the loops over d are those of the floats; and
//! where the CPU multiplies pairs of bf16, q and the weights are rounded to them,
//! weights before they are summed, so that V's factors still add up to one.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use crate::attention::job::{Job, State, TILE_PAGES, TOKENS};
use crate::kv::KvCache;
use crate::simd::{GROUP, LANES, Simd, Stored};

/// Four pages for one group of states.
pub(super) struct Tile<'a, E> {
    pub(super) job: &'a Job<'a>,
    pub(super) pages: [*const E; TILE_PAGES],
    /// The next tile's, fetched meanwhile line for line; where there is none, these again.
    pub(super) next: [*const E; TILE_PAGES],
    /// Position of the first token.
    pub(super) start: usize,
    /// `[states][v_stride]`
    pub(super) sums: *mut f32,
}

impl<E: Stored> Tile<'_, E> {
    /// # Safety
    /// Pages hold keys and values of all tokens that the states see; there are N states.
    #[inline(always)]
    pub(super) unsafe fn tile<S: Simd, const N: usize>(&self, states: &mut [State]) {
        let states = states.first_chunk_mut::<N>().expect("a tile of N states");
        // Scores, then weights.
        let mut lanes = [[0.0f32; TOKENS]; N];
        if !self.pages[TILE_PAGES - 1].is_null() {
            self.scores::<S, N, TILE_PAGES>(states, &mut lanes, 0);
        } else {
            for j in (0..TILE_PAGES).take_while(|&j| !self.pages[j].is_null()) {
                self.scores::<S, N, 1>(states, &mut lanes, j);
            }
        }
        let (mut low, mut high) = (TOKENS, 0);
        for (i, (state, lanes)) in states.iter_mut().zip(&mut lanes).enumerate() {
            // The tokens this row sees; none if the tile is outside its span.
            let from = state.first.saturating_sub(self.start).min(TOKENS);
            let to = (state.last + 1).saturating_sub(self.start).min(TOKENS);
            if from < to {
                (low, high) = (low.min(from), high.max(to));
                let sums = self.sums.add(i * self.job.layout.v_stride());
                self.soften::<S>(state, lanes, from..to, sums);
            } else {
                *lanes = [0.0; TOKENS];
            }
        }
        if low < high {
            if E::SCALED {
                self.scale_weights::<S, N>(&mut lanes, low..high);
            }
            self.add_values::<S, N>(&lanes, low..high);
        }
    }

    /// Where the scales of a page's keys are; those of its values follow.
    #[inline(always)]
    unsafe fn scales(&self, page: usize) -> *const f32 {
        self.pages[page].add(self.job.layout.scales_start()).cast()
    }

    /// Weights of what values are multiples of. (Of tokens that nobody sees, nobody reads them.)
    #[inline(always)]
    unsafe fn scale_weights<S: Simd, const N: usize>(
        &self,
        weights: &mut [[f32; TOKENS]; N],
        span: Range<usize>,
    ) {
        for page in span.start / LANES..span.end.div_ceil(LANES) {
            let scales = S::load(self.scales(page).add(LANES));
            for weights in &mut *weights {
                let at = weights.as_mut_ptr().add(page * LANES);
                S::store(at, S::mul(S::load(at), scales));
            }
        }
    }

    /// scale · q·k / ln 2 of the tokens of P pages from page `j` on, for N states.
    #[inline(always)]
    unsafe fn scores<S: Simd, const N: usize, const P: usize>(
        &self,
        states: &[State; N],
        lanes: &mut [[f32; TOKENS]; N],
        j: usize,
    ) {
        let mut acc = [[S::zero(); P]; N];
        for d in (0..self.job.layout.head_dim).step_by(2) {
            let at = d * KvCache::PAGE;
            if P == TILE_PAGES {
                for next in self.next {
                    fetch::<S, E>(next.wrapping_add(at));
                }
            }
            if E::multiplied_in_pairs::<S>() {
                let mut keys = [S::splat_int(0); P];
                for (p, key) in keys.iter_mut().enumerate() {
                    *key = S::load_int(self.pages[j + p].add(at).cast());
                }
                for (acc, state) in acc.iter_mut().zip(states) {
                    let q = S::splat_int(*state.q.cast::<i32>().add(d / 2));
                    for (sum, &key) in acc.iter_mut().zip(&keys) {
                        *sum = S::dot_bf16(*sum, q, key);
                    }
                }
                continue;
            }
            let mut keys = [[S::zero(); 2]; P];
            for (p, key) in keys.iter_mut().enumerate() {
                *key = E::load_pair::<S>(self.pages[j + p].add(at));
            }
            for (acc, state) in acc.iter_mut().zip(states) {
                let q = [S::splat(*state.q.add(d)), S::splat(*state.q.add(d + 1))];
                for (sum, key) in acc.iter_mut().zip(&keys) {
                    *sum = S::fma(q[1], key[1], S::fma(q[0], key[0], *sum));
                }
            }
        }
        for (lanes, acc) in lanes.iter_mut().zip(&acc) {
            for (p, &sum) in acc.iter().enumerate() {
                let mut scaled = S::mul(sum, S::splat(self.job.scale * LOG2_E));
                if E::SCALED {
                    scaled = S::mul(scaled, S::load(self.scales(j + p)));
                }
                S::store(lanes.as_mut_ptr().add((j + p) * LANES), scaled);
            }
        }
    }

    /// Turns one state's scores into weights under the new maximum, and brings what it has so far
    /// under it too. Words of two weights fill the first half of `lanes`.
    #[inline(always)]
    unsafe fn soften<S: Simd>(
        &self,
        state: &mut State,
        lanes: &mut [f32; TOKENS],
        seen: Range<usize>,
        sums: *mut f32,
    ) {
        let mut scores = [S::zero(); TILE_PAGES];
        let hidden = S::splat(f32::NEG_INFINITY);
        for (j, score) in scores.iter_mut().enumerate() {
            *score = S::load(lanes.as_ptr().add(j * LANES));
            if seen.len() < TOKENS {
                let lane = S::load(LANE.as_ptr());
                let (from, to) = (seen.start as f32, seen.end as f32);
                let before = (j * LANES) as f32;
                *score = S::select_lt(lane, S::splat(to - before), *score, hidden);
                *score = S::select_lt(lane, S::splat(from - before), hidden, *score);
            }
        }
        let top = S::max(S::max(scores[0], scores[1]), S::max(scores[2], scores[3]));
        let sum = state.sum.as_mut_ptr();
        if S::any_lt(S::splat(state.max), top) {
            let max = S::max_lane(top);
            let factor = S::exp2(S::splat(state.max - max));
            for d in (0..self.job.layout.v_stride()).step_by(LANES) {
                S::store(sums.add(d), S::mul(S::load(sums.add(d)), factor));
            }
            S::store(sum, S::mul(S::load(sum), factor));
            state.max = max;
        }
        let max = S::splat(state.max);
        for score in &mut scores {
            *score = S::exp2(S::sub(*score, max));
        }
        let [a, b, c, d] = scores;
        if E::multiplied_in_pairs::<S>() {
            let (ones, words) = (S::splat_int(0x3f80_3f80), lanes.as_mut_ptr().cast::<u32>());
            let (ab, cd) = (S::pairs(a, b), S::pairs(c, d));
            S::store_int(words, ab);
            S::store_int(words.add(LANES), cd);
            S::store(sum, S::dot_bf16(S::dot_bf16(S::load(sum), ab, ones), cd, ones));
        } else {
            for (j, &weight) in scores.iter().enumerate() {
                S::store(lanes.as_mut_ptr().add(j * LANES), weight);
            }
            S::store(sum, S::add(S::load(sum), S::add(S::add(a, b), S::add(c, d))));
        }
    }

    /// sums += weights · V over the tokens `span`, in order. A row that does not see one of them
    /// has weight 0 there.
    #[inline(always)]
    unsafe fn add_values<S: Simd, const N: usize>(
        &self,
        weights: &[[f32; TOKENS]; N],
        span: Range<usize>,
    ) {
        const WIDTH: usize = 4;
        let stride = self.job.layout.v_stride();
        let mut d = 0;
        while d < stride {
            if S::WIDE && d + WIDTH * LANES <= stride {
                self.columns::<S, N, WIDTH>(weights, span.clone(), d);
                d += WIDTH * LANES;
            } else {
                self.columns::<S, N, 1>(weights, span.clone(), d);
                d += LANES;
            }
        }
    }

    #[inline(always)]
    unsafe fn columns<S: Simd, const N: usize, const WIDTH: usize>(
        &self,
        weights: &[[f32; TOKENS]; N],
        span: Range<usize>,
        d: usize,
    ) {
        let layout = self.job.layout;
        let stride = layout.v_stride();
        let mut acc = [[S::zero(); WIDTH]; N];
        for (i, acc) in acc.iter_mut().enumerate() {
            for (w, sum) in acc.iter_mut().enumerate() {
                *sum = S::load(self.sums.add(i * stride + d + w * LANES));
            }
        }
        for token in (span.start / 2 * 2..span.end).step_by(2) {
            let (page, at) = (token / KvCache::PAGE, layout.v_group(token % KvCache::PAGE, d));
            let (v, next) = (self.pages[page].add(at), self.next[page].wrapping_add(at));
            for w in 0..WIDTH {
                fetch::<S, E>(next.wrapping_add(w * GROUP));
            }
            // What lies beyond the span may be anything, even not a number.
            let seen = [span.start <= token, token + 1 < span.end];
            if E::multiplied_in_pairs::<S>() {
                let halves = if seen[0] { 0xffff } else { 0 } | if seen[1] { !0xffff } else { 0 };
                let halves = S::splat_int(halves);
                let mut values = [halves; WIDTH];
                for (w, value) in values.iter_mut().enumerate() {
                    *value = S::and(halves, S::load_int(v.add(w * GROUP).cast()));
                }
                for (acc, weights) in acc.iter_mut().zip(weights) {
                    let weight = S::splat_int(*weights.as_ptr().cast::<i32>().add(token / 2));
                    for (sum, &value) in acc.iter_mut().zip(&values) {
                        *sum = S::dot_bf16(*sum, weight, value);
                    }
                }
                continue;
            }
            let mut values = [[S::zero(); 2]; WIDTH];
            for (w, value) in values.iter_mut().enumerate() {
                *value = E::load_pair::<S>(v.add(w * GROUP));
            }
            for half in 0..2 {
                if !seen[half] {
                    continue;
                }
                for (acc, weights) in acc.iter_mut().zip(weights) {
                    let weight = S::splat(weights[token + half]);
                    for (sum, value) in acc.iter_mut().zip(&values) {
                        *sum = S::fma(weight, value[half], *sum);
                    }
                }
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            for (w, &sum) in acc.iter().enumerate() {
                S::store(self.sums.add(i * stride + d + w * LANES), sum);
            }
        }
    }
}

/// Asks for the lines of a group.
#[inline(always)]
unsafe fn fetch<S: Simd, E: Stored>(group: *const E) {
    S::prefetch(group.cast());
    if size_of::<E>() == 4 {
        S::prefetch(group.wrapping_add(LANES).cast());
    }
}

const LANE: [f32; LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
