//! The ranking of tokens, and its head: the n best, or the fewest that hold a share of the
//! probability.
//!
//! Owns the scratch for candidates. Never sorts a vocabulary: most tokens are out at the first
//! comparison. The thing to know: the order is total, so that ties are cut the same way on every
//! machine.

use super::numerics;
use std::cmp::Ordering;

/// A logit and its token.
pub type Candidate = (f32, u32);

/// Falling by logit, then rising by id. Logits are not NaN here.
pub fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    let by_logit = b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal);
    by_logit.then(a.1.cmp(&b.1))
}

/// Candidates collected when this many, at least, are still in question.
const COLLECTED_MIN: usize = 256;

/// Scratch with room for every token.
pub struct Ranking {
    candidates: Vec<Candidate>,
}

impl Ranking {
    pub fn new(vocab: usize) -> Self {
        Self {
            candidates: Vec::with_capacity(vocab),
        }
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
                self.candidates.push((logit, token as u32));
                if self.candidates.len() == collected_max {
                    floor = self.keep_best(n);
                }
            }
        }
        if self.candidates.len() > n {
            self.keep_best(n);
        }
        &mut self.candidates
    }

    /// Cuts the candidates down to the `n` best of more than that; returns the logit of the worst
    /// kept.
    fn keep_best(&mut self, n: usize) -> f32 {
        let (_, worst, _) = self.candidates.select_nth_unstable_by(n - 1, by_rank);
        let floor = worst.0;
        self.candidates.truncate(n);
        floor
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
                self.candidates.push((logits[token], token as u32));
            } else {
                *weight = 0.0;
            }
        }
        // Halve the place of the cut: less than `wanted` lies before `low`, enough of it before
        // `high`.
        let (mut low, mut high, mut before) = (0, self.candidates.len(), 0.0);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            self.candidates[low..high].select_nth_unstable_by(middle - low, by_rank);
            let head = self.candidates[low..middle].iter();
            let mass = head.map(|c| f64::from(weights[c.1 as usize])).sum::<f64>();
            if before + mass >= wanted {
                high = middle;
            } else {
                before += mass;
                low = middle;
            }
        }
        for &(_, token) in &self.candidates[high..] {
            weights[token as usize] = 0.0;
        }
    }
}
