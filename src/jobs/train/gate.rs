//! What must hold of a result before its name moves to it.
//!
//! Owns the thresholds and their judgement. Never measures or moves anything. The thing to know: a
//! threshold holds only if its figure is there and on its side; what cannot be measured fails.

use serde::{Deserialize, Serialize};

/// Thresholds of a job, each where it was asked for. Stored as JSON; fields may be added.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Gate {
    /// Of the held-out loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_valid_loss: Option<f64>,
    /// Of the held-out loss as a part of the base's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_loss_ratio_to_base: Option<f64>,
    /// Of the share of examples that are answered exactly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_exact_match: Option<f64>,
    /// Of the examples that the version before answers exactly and the result does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_negative_flips: Option<u64>,
    /// The held-out loss is not above that of the version before, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub must_beat_current: Option<bool>,
}

/// What was measured of a result.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    pub loss: f64,
    pub base_loss: f64,
    /// Of the version that the name means.
    pub current_loss: Option<f64>,
    /// `None` of pairs.
    pub exact_match: Option<f64>,
    /// `None` of pairs; 0 where there was no version before.
    pub negative_flips: Option<u64>,
}

/// How a result stands. Stored as JSON; fields may be added, never renamed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    pub passed: bool,
    /// Why it did not pass, or why the name did not move all the same.
    pub reasons: Vec<String>,
    /// Number of the version that the name meant when it was judged.
    #[serde(default)]
    pub before: Option<u64>,
    /// Whether the name was moved to it.
    #[serde(default)]
    pub promoted: bool,
}

impl Gate {
    /// Whether there is anything to hold.
    pub fn is_open(&self) -> bool {
        let Self { must_beat_current, .. } = *self;
        *self == Self { must_beat_current, ..Self::default() } && must_beat_current != Some(true)
    }

    /// What does not hold, with both figures.
    pub fn broken(&self, measured: &Measured) -> Vec<String> {
        let Measured { loss, base_loss, current_loss, exact_match, negative_flips } = *measured;
        let mut broken = Vec::new();
        let mut holds = |holds: bool, otherwise: String| {
            if !holds {
                broken.push(otherwise);
            }
        };
        if let Some(most) = self.max_valid_loss {
            holds(loss <= most, format!("valid_loss {loss:.4} is above max_valid_loss {most}"));
        }
        if let Some(most) = self.max_loss_ratio_to_base {
            let ratio = loss / base_loss;
            let wrong =
                format!("loss_ratio_to_base {ratio:.4} is above max_loss_ratio_to_base {most}");
            holds(ratio <= most, wrong);
        }
        if let Some(least) = self.min_exact_match {
            let wrong = match exact_match {
                Some(is) => format!("exact_match {is:.4} is below min_exact_match {least}"),
                None => format!("min_exact_match {least} is set, and of pairs there is none"),
            };
            holds(exact_match.is_some_and(|is| is >= least), wrong);
        }
        if let Some(most) = self.max_negative_flips {
            let wrong = match negative_flips {
                Some(is) => format!("negative_flips {is} is above max_negative_flips {most}"),
                None => format!("max_negative_flips {most} is set, and of pairs there are none"),
            };
            holds(negative_flips.is_some_and(|is| is <= most), wrong);
        }
        if let Some(current) = current_loss.filter(|_| self.must_beat_current == Some(true)) {
            let wrong = format!(
                "valid_loss {loss:.4} is above the current version's {current:.4}, and \
                 must_beat_current is set"
            );
            holds(loss <= current, wrong);
        }
        broken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEASURED: Measured = Measured {
        loss: 1.5,
        base_loss: 3.0,
        current_loss: Some(1.5),
        exact_match: Some(0.25),
        negative_flips: Some(2),
    };

    fn all(loss: f64, ratio: f64, exact: f64, flips: u64) -> Gate {
        Gate {
            max_valid_loss: Some(loss),
            max_loss_ratio_to_base: Some(ratio),
            min_exact_match: Some(exact),
            max_negative_flips: Some(flips),
            must_beat_current: Some(true),
        }
    }

    #[test]
    fn a_threshold_holds_at_its_own_figure_and_not_beyond() {
        assert!(all(1.5, 0.5, 0.25, 2).broken(&MEASURED).is_empty());
        let broken = all(1.4, 0.4, 0.3, 1).broken(&Measured { loss: 1.6, ..MEASURED });
        assert_eq!(
            broken,
            [
                "valid_loss 1.6000 is above max_valid_loss 1.4",
                "loss_ratio_to_base 0.5333 is above max_loss_ratio_to_base 0.4",
                "exact_match 0.2500 is below min_exact_match 0.3",
                "negative_flips 2 is above max_negative_flips 1",
                "valid_loss 1.6000 is above the current version's 1.5000, and \
                 must_beat_current is set",
            ]
        );
        assert!(Gate::default().broken(&Measured { loss: 99.0, ..MEASURED }).is_empty());
    }

    #[test]
    fn what_is_no_number_or_not_there_breaks_what_asks_for_it() {
        let broken = |measured| all(1e9, 1e9, 0.0, 99).broken(&measured).len();
        assert_eq!(broken(MEASURED), 0);
        assert_eq!(broken(Measured { loss: f64::NAN, ..MEASURED }), 3);
        assert_eq!(broken(Measured { exact_match: None, negative_flips: None, ..MEASURED }), 2);
        let first = Measured { current_loss: None, ..MEASURED };
        assert_eq!(broken(first), 0, "a first version has nobody to beat");
    }

    #[test]
    fn a_gate_without_thresholds_is_open() {
        assert!(Gate::default().is_open());
        assert!(Gate { must_beat_current: Some(false), ..Gate::default() }.is_open());
        assert!(!Gate { must_beat_current: Some(true), ..Gate::default() }.is_open());
        assert!(!Gate { min_exact_match: Some(0.0), ..Gate::default() }.is_open());
    }
}
