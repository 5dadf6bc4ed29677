//! A weighted alias: one name over several versions, each caller always led to the same one.
//!
//! Owns what an alias is and how it chooses. Never changes one: the registry does. The thing to
//! know: the choice is weighted rendezvous hashing: every target draws a number from (alias,
//! caller, target) and its weight, the highest wins; so a shift of weights moves only callers
//! towards what gained.

use crate::error::{Error, Result, brief};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::sync::Arc;

/// Versions that one alias may lead to: each request hashes once per target.
const TARGETS_MAX: usize = 16;
const WEIGHT_MAX: u32 = 1_000_000;

/// A version and its share of an alias.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Target {
    pub name: String,
    pub number: u64,
    /// Against the sum of all weights.
    pub weight: u32,
}

impl Target {
    /// `name@number`
    pub fn id(&self) -> String {
        format!("{}@{}", self.name, self.number)
    }
}

/// A name over versions. It shares the namespace of adapters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alias {
    pub name: String,
    /// The tenant that made it; empty: the operator.
    pub owner: Arc<str>,
    /// By name then number; never empty.
    pub targets: Vec<Target>,
    /// What it was before the last change, for a rollback.
    pub previous: Option<Vec<Target>>,
    /// Unix seconds.
    pub created: u64,
    pub updated: u64,
}

impl Alias {
    /// Whether what it leads to, of a name that is `owner`'s, stays for its sake: another tenant
    /// may only use the name.
    pub fn keeps(&self, owner: &str) -> bool {
        self.owner.is_empty() || *self.owner == *owner
    }

    /// The target of this caller: the same as long as the weights are.
    pub fn choose(&self, sticky: &str) -> &Target {
        let best = self.targets.iter().max_by(|a, b| {
            let (a, b) = (self.draw(a, sticky), self.draw(b, sticky));
            a.total_cmp(&b)
        });
        best.expect("an alias has a target")
    }

    /// Whether it leads to this version, by whatever share.
    pub fn leads_to(&self, name: &str, number: u64) -> bool {
        self.targets.iter().any(|t| t.number == number && t.name == name)
    }

    /// `weight / -ln(u)` with u in (0, 1) from the hash: the largest of these falls on each target
    /// in proportion to its weight.
    fn draw(&self, target: &Target, sticky: &str) -> f64 {
        let mut hash = Sha256::new();
        for part in [self.name.as_str(), sticky, &target.id()] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let hash = hash.finalize();
        let bits = u64::from_le_bytes(hash[..8].try_into().expect("a hash has 32 bytes")) >> 11;
        let u = (bits as f64 + 0.5) / (1u64 << 53) as f64;
        f64::from(target.weight) / -u.ln()
    }
}

/// Puts targets in order. Errors: `invalid_alias`.
pub fn check_targets(targets: &mut [Target]) -> Result<()> {
    if targets.is_empty() || targets.len() > TARGETS_MAX {
        return Err(invalid(format!("an alias leads to 1 to {TARGETS_MAX} versions")));
    }
    targets.sort();
    if let Some(t) = targets.iter().find(|t| !(1..=WEIGHT_MAX).contains(&t.weight)) {
        let id = brief(&t.id());
        return Err(invalid(format!("the weight of `{id}` is not from 1 to {WEIGHT_MAX}")));
    }
    if let Some(twice) = targets.windows(2).find(|w| w[0].id() == w[1].id()) {
        let id = brief(&twice[0].id());
        return Err(invalid(format!("`{id}` is there twice")));
    }
    Ok(())
}

/// An alias that cannot be.
pub fn invalid(message: String) -> Error {
    Error::invalid("invalid_alias", message).param("weights")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alias(weights: &[u32]) -> Alias {
        let target = |(i, w): (usize, &u32)| Target {
            name: "acme".into(),
            number: i as u64 + 1,
            weight: *w,
        };
        let targets = weights.iter().enumerate().map(target).filter(|t| t.weight > 0).collect();
        let owner = Arc::default();
        Alias { name: "prod".into(), owner, targets, previous: None, created: 0, updated: 0 }
    }

    const CALLERS: usize = 20_000;

    fn chosen(alias: &Alias) -> Vec<u64> {
        (0..CALLERS).map(|i| alias.choose(&format!("user-{i}")).number).collect()
    }

    #[test]
    fn callers_fall_on_versions_in_proportion_to_the_weights() {
        for weights in [&[95, 5][..], &[1, 1], &[90, 9, 1], &[100]] {
            let chosen = chosen(&alias(weights));
            let sum: u32 = weights.iter().sum();
            for (i, weight) in weights.iter().enumerate() {
                let share = f64::from(*weight) / f64::from(sum);
                let got = chosen.iter().filter(|n| **n == i as u64 + 1).count() as f64;
                // Four standard deviations of a binomial.
                let spread = 4.0 * (CALLERS as f64 * share * (1.0 - share)).sqrt();
                let expected = CALLERS as f64 * share;
                assert!((got - expected).abs() <= spread, "{weights:?} {i}: {got} of {expected}");
            }
        }
    }

    #[test]
    fn a_shift_of_weights_moves_only_callers_that_it_must() {
        let cases: [(&[u32], &[u32]); 4] = [
            (&[95, 5], &[90, 10]),
            (&[90, 10], &[0, 10]),
            (&[50, 50], &[50, 0]),
            (&[2, 1], &[20, 10]),
        ];
        for (before, after) in cases {
            let (a, b) = (chosen(&alias(before)), chosen(&alias(after)));
            let moved: Vec<_> = a.iter().zip(&b).filter(|(a, b)| a != b).collect();
            let share = |w: &[u32]| f64::from(w[1]) / f64::from(w[0] + w[1]);
            let must = (share(after) - share(before)).abs() * CALLERS as f64;
            assert!((moved.len() as f64 - must).abs() < 0.02 * CALLERS as f64, "{before:?}");
            // All in one direction: towards what gained.
            let gains = if share(after) > share(before) { 2 } else { 1 };
            assert!(moved.iter().all(|(_, b)| **b == gains), "{before:?} to {after:?}");
        }
        // A third version takes from both and moves nobody between them.
        let (a, b) = (chosen(&alias(&[50, 50])), chosen(&alias(&[50, 50, 25])));
        assert!(a.iter().zip(&b).all(|(a, b)| a == b || *b == 3));
    }

    #[test]
    fn targets_that_make_no_alias_are_refused() {
        let target = |number, weight| Target { name: "a".into(), number, weight };
        let refused = |mut targets: Vec<Target>| check_targets(&mut targets).unwrap_err().code;
        let many = (1..=17).map(|n| target(n, 1)).collect();
        let cases = [vec![], many, vec![target(1, 0)], vec![target(1, 5), target(1, 6)]];
        for case in cases {
            assert_eq!(refused(case), "invalid_alias");
        }
        assert_eq!(refused(vec![target(1, WEIGHT_MAX + 1)]), "invalid_alias");
    }
}
