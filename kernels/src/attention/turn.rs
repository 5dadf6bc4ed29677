//! One turn: a tile of (row, head) pairs takes four pages.
//!
//! Owns the inner loops: scores, their weights under a running maximum, the sums over values. Never
//! chooses pages, rows or an order. The thing to know: in int8 a page's scales multiply 16 scores
//! at a time, and the weights of 16 values, so that the loops over d are those of the floats.

use std::ops::Range;

use crate::attention::{Job, State, TOKENS, TURN};
use crate::kv::KvCache;
use crate::simd::{GROUP, LANES, Simd, Stored};

/// Four pages' turn for one tile of states.
pub(super) struct Turn<'a, E> {
    pub(super) job: &'a Job<'a>,
    pub(super) pages: [*const E; TURN],
    /// The next turn's, fetched meanwhile line for line; where there is none, these again.
    pub(super) next: [*const E; TURN],
    /// Position of the first token.
    pub(super) start: usize,
    /// `[states][v_stride]`
    pub(super) sums: *mut f32,
}

impl<E: Stored> Turn<'_, E> {
    /// # Safety
    /// Pages hold keys and values of all tokens that the states see; N is the number of states.
    #[inline(always)]
    pub(super) unsafe fn tile<S: Simd, const N: usize>(&self, states: &mut [State]) {
        // Scores, then weights.
        let mut lanes = [[0.0f32; TOKENS]; N];
        if !self.pages[TURN - 1].is_null() {
            self.scores::<S, N, TURN>(states, &mut lanes, 0);
        } else {
            for j in (0..TURN).take_while(|&j| !self.pages[j].is_null()) {
                self.scores::<S, N, 1>(states, &mut lanes, j);
            }
        }
        let (mut low, mut high) = (TOKENS, 0);
        for (i, state) in states.iter_mut().enumerate() {
            // The tokens this row sees; none if the turn is outside its span.
            let from = state.first.saturating_sub(self.start).min(TOKENS);
            let to = (state.last + 1).saturating_sub(self.start).min(TOKENS);
            if from < to {
                (low, high) = (low.min(from), high.max(to));
                let sums = self.sums.add(i * self.job.layout.v_stride());
                self.soften::<S>(state, &mut lanes[i], from..to, sums);
            } else {
                lanes[i] = [0.0; TOKENS];
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

    /// scale · q·k of the tokens of P pages from page `j` on, for N states.
    #[inline(always)]
    unsafe fn scores<S: Simd, const N: usize, const P: usize>(
        &self,
        states: &[State],
        lanes: &mut [[f32; TOKENS]; N],
        j: usize,
    ) {
        let mut acc = [[S::zero(); P]; N];
        for d in (0..self.job.layout.head_dim).step_by(2) {
            let mut keys = [[S::zero(); 2]; P];
            for (p, key) in keys.iter_mut().enumerate() {
                let at = d * KvCache::PAGE;
                *key = E::load_pair::<S>(self.pages[j + p].add(at));
                if P == TURN {
                    fetch::<S, E>(self.next[p].wrapping_add(at));
                }
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
                let mut scaled = S::mul(sum, S::splat(self.job.scale));
                if E::SCALED {
                    scaled = S::mul(scaled, S::load(self.scales(j + p)));
                }
                S::store(lanes.as_mut_ptr().add((j + p) * LANES), scaled);
            }
        }
    }

    /// Turns one state's scores into weights under the new maximum, and brings what it has so far
    /// under it too.
    #[inline(always)]
    unsafe fn soften<S: Simd>(
        &self,
        state: &mut State,
        lanes: &mut [f32; TOKENS],
        seen: Range<usize>,
        sums: *mut f32,
    ) {
        let mut scores = [S::zero(); TURN];
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
        let max = S::max_lane(top).max(state.max);
        let mut weights = [S::zero(); TURN];
        for (j, weight) in weights.iter_mut().enumerate() {
            *weight = S::exp(S::sub(scores[j], S::splat(max)));
            S::store(lanes.as_mut_ptr().add(j * LANES), *weight);
        }
        if max > state.max {
            let factor = S::exp(S::splat(state.max - max));
            for d in (0..self.job.layout.v_stride()).step_by(LANES) {
                S::store(sums.add(d), S::mul(S::load(sums.add(d)), factor));
            }
            let mut lane = [0.0; LANES];
            S::store(lane.as_mut_ptr(), factor);
            state.sum *= lane[0];
            state.max = max;
        }
        let sum = S::add(S::add(weights[0], weights[1]), S::add(weights[2], weights[3]));
        state.sum += S::sum(sum);
    }

    /// sums += weights · V over the tokens `span`, in order. A row that does not see one of them
    /// has weight 0 there.
    #[inline(always)]
    unsafe fn add_values<S: Simd, const N: usize>(
        &self,
        weights: &[[f32; TOKENS]; N],
        span: Range<usize>,
    ) {
        const WIDTH: usize = 2;
        let stride = self.job.layout.v_stride();
        let mut d = 0;
        while d < stride {
            if S::WIDE && d + WIDTH * GROUP <= stride {
                self.columns::<S, N, WIDTH>(weights, span.clone(), d);
                d += WIDTH * GROUP;
            } else {
                self.columns::<S, N, 1>(weights, span.clone(), d);
                d += GROUP;
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
        let mut acc = [[[S::zero(); 2]; WIDTH]; N];
        for (i, acc) in acc.iter_mut().enumerate() {
            for (w, sum) in acc.as_flattened_mut().iter_mut().enumerate() {
                *sum = S::load(self.sums.add(i * stride + d + w * LANES));
            }
        }
        for token in span {
            let page = token / KvCache::PAGE;
            let at = layout.v_start() + token % KvCache::PAGE * stride + d;
            let (v, next) = (self.pages[page].add(at), self.next[page].wrapping_add(at));
            let mut values = [[S::zero(); 2]; WIDTH];
            for (w, value) in values.iter_mut().enumerate() {
                *value = E::load_pair::<S>(v.add(w * GROUP));
                fetch::<S, E>(next.wrapping_add(w * GROUP));
            }
            for (acc, weights) in acc.iter_mut().zip(weights) {
                let weight = S::splat(weights[token]);
                let sums = acc.as_flattened_mut().iter_mut();
                for (sum, &value) in sums.zip(values.as_flattened()) {
                    *sum = S::fma(weight, value, *sum);
                }
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            for (w, &sum) in acc.as_flattened().iter().enumerate() {
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
