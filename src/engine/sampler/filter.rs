//! The ranking of tokens, and its head: the n best, or the fewest that hold a share of the
//! probability.
//!
//! Owns the scratch for candidates. Never sorts a vocabulary: most tokens are out at the first
//! comparison. The thing to know: the order is total, so that ties are cut the same way on every
//! machine.

use super::numerics;

/// A token at its place in the ranking: falling by logit, then rising by id. Less is better. One
/// integer, because comparing those is most of the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Candidate(u64);

impl Candidate {
    /// `logit` is not NaN.
    fn new(logit: f32, token: usize) -> Self {
        // Adding 0 makes +0 of -0, which are equal. The bits of positive floats rise with them,
        // those of negative ones fall.
        let bits = (logit + 0.0).to_bits();
        let falling = if bits >> 31 == 1 { bits } else { !bits & (u32::MAX >> 1) };
        Self(u64::from(falling) << 32 | token as u64)
    }
    pub fn token(self) -> usize {
        self.0 as u32 as usize
    }
}

/// Candidates collected when this many, at least, are still in question.
const COLLECTED_MIN: usize = 256;

/// Scratch with room for every token.
pub struct Ranking {
    candidates: Vec<Candidate>,
}

impl Ranking {
    pub fn new(vocab: usize) -> Self {
        Self { candidates: Vec::with_capacity(vocab) }
    }

    /// The `n` best of `logits` in no order; fewer if fewer are above -inf.
    pub fn best(&mut self, logits: &[f32], n: usize) -> &mut [Candidate] {
        self.candidates.clear();
        if n == 0 {
            return &mut [];
        }
        let collected_max = COLLECTED_MIN.max(4 * n);
        let mut floor = f32::NEG_INFINITY;
        for (token, &logit) in logits.iter().enumerate() {
            // Strictly above: ids rise, so an equal logit further on ranks below.
            if logit > floor {
                self.candidates.push(Candidate::new(logit, token));
                if self.candidates.len() == collected_max {
                    self.keep_best(n);
                    floor = logits[self.candidates[n - 1].token()];
                }
            }
        }
        if self.candidates.len() > n {
            self.keep_best(n);
        }
        &mut self.candidates
    }

    /// Cuts the candidates down to the `n` best of more than that, the worst of them last.
    fn keep_best(&mut self, n: usize) {
        self.candidates.select_nth_unstable(n - 1);
        self.candidates.truncate(n);
    }

    /// Zeroes all `weights` but those of the fewest best-ranked tokens that together hold `share`
    /// of the sum.
    pub fn keep_nucleus(&mut self, logits: &[f32], weights: &mut [f32], share: f32) {
        let total = numerics::total(weights);
        let wanted = f64::from(share) * total;
        // All tokens at or below this weight together hold less than what may be cut off, so they
        // are the tail of it. Half of the bound, so that no rounding can matter.
        let floor = ((total - wanted) / weights.len() as f64 / 2.0) as f32;
        self.candidates.clear();
        for (token, weight) in weights.iter_mut().enumerate() {
            if *weight > floor {
                self.candidates.push(Candidate::new(logits[token], token));
            } else {
                *weight = 0.0;
            }
        }
        // Halve the place of the cut: less than `wanted` lies before `low`, enough of it before
        // `high`.
        let (mut low, mut high, mut before) = (0, self.candidates.len(), 0.0);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            self.candidates[low..high].select_nth_unstable(middle - low);
            let head = self.candidates[low..middle].iter();
            let mass = head.map(|c| f64::from(weights[c.token()])).sum::<f64>();
            if before + mass >= wanted {
                high = middle;
            } else {
                before += mass;
                low = middle;
            }
        }
        for cut in &self.candidates[high..] {
            weights[cut.token()] = 0.0;
        }
    }
}
