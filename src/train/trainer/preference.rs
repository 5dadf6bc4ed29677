//! Direct preference optimisation: what a pair's loss is, and what the reference says of every
//! pair.
//!
//! Owns the reference's log-probabilities. Never runs a pass. The thing to know: the reference is
//! what the job starts from and does not change, so it reads a pair once a job, in the first epoch.

/// The reference's Σ log p of both answers of every pair, as far as they are known.
pub(super) struct References(Vec<Option<[f64; 2]>>);

impl References {
    /// Of so many pairs, none known.
    pub fn new(pairs: usize) -> Self {
        Self(vec![None; pairs])
    }

    pub fn keep(&mut self, pair: u32, log_probs: [f64; 2]) {
        self.0[pair as usize] = Some(log_probs);
    }

    pub fn lack(&self, pair: u32) -> bool {
        self.0[pair as usize].is_none()
    }

    /// NaN where a pair is not known.
    pub fn of(&self, pair: u32) -> [f64; 2] {
        self.0[pair as usize].unwrap_or([f64::NAN; 2])
    }
}

/// σ(−z) and −log σ(z), z = β·((log π − log π_ref) of the preferred − of the other).
pub(super) fn slope_and_loss(beta: f64, policy: [f64; 2], reference: [f64; 2]) -> (f64, f64) {
    let z = beta * ((policy[0] - reference[0]) - (policy[1] - reference[1]));
    // log(1 + e^−z), without overflow.
    (1.0 / (1.0 + z.exp()), (-z.abs()).exp().ln_1p() + (-z).max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand, and at both ends.
    #[test]
    fn a_pair_pulls_the_more_the_worse_it_is() {
        let (slope, loss) = slope_and_loss(0.1, [-3.0, -3.0], [-3.0, -3.0]);
        assert_eq!((slope, loss), (0.5, 2f64.ln()));
        let (slope, loss) = slope_and_loss(0.5, [-1.0, -4.0], [-2.0, -3.0]);
        assert!((slope - 1.0 / (1.0 + 1f64.exp())).abs() < 1e-15, "{slope}");
        assert!((loss - (1.0 + (-1f64).exp()).ln()).abs() < 1e-15, "{loss}");
        assert_eq!(slope_and_loss(1.0, [-1e6, 0.0], [0.0; 2]), (1.0, 1e6));
        assert_eq!(slope_and_loss(1.0, [0.0, -1e6], [0.0; 2]), (0.0, 0.0));
    }
}
