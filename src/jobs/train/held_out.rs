//! What a result is measured by: examples that it did not learn from.
//!
//! Owns which these are, and what the scores on them come to. Never runs a model. The thing to
//! know: they are read again after training, so that a restart measures by the same ones.

use super::gate::Measured;
use super::read::{Dataset, Job};
use crate::error::Result;
use crate::jobs::evaluate::{Contestant, Example, Score, Scored};
use serde_json::{Value, json};
use std::fs::File;

/// Examples that are scored, at most: the first ones. A pair is two.
const EXAMPLES_MAX: usize = 1000;
/// Lines of flips that a report names.
const LINES_MAX: usize = 100;

/// See the file's head.
pub struct HeldOut {
    pub examples: Vec<Example>,
    /// The line that each is of.
    lines: Vec<u64>,
    /// As many as there are.
    all: usize,
    /// DPO's; `None`: the examples are no pairs.
    beta: Option<f64>,
}

impl Job<'_> {
    /// What a job's result is measured by, of one that has something held out. Blocking. `None`
    /// when `over` says so first. Errors: as of [`Job::data`].
    pub fn held_out(self, files: Vec<File>, over: &dyn Fn() -> bool) -> Result<Option<HeldOut>> {
        let Some(data) = self.data(files, over)? else { return Ok(None) };
        let held = data.validation.map(|set| HeldOut::of(&set, self));
        Ok(Some(held.unwrap_or_else(|| HeldOut::of(&data.training, self))))
    }
}

impl HeldOut {
    fn of(set: &Dataset, job: Job<'_>) -> Self {
        let group = job.spec.kind().group();
        let (mut examples, mut lines) = (Vec::new(), Vec::new());
        for entry in (0..set.examples.len()).step_by(group) {
            let whole = entry..entry + group;
            let taken: Vec<Example> =
                whole.filter_map(|i| example(set, i, job.means.context)).collect();
            if examples.len() + group > EXAMPLES_MAX {
                break;
            }
            if taken.len() == group {
                lines.extend(vec![set.examples.line(entry); group]);
                examples.extend(taken);
            }
        }
        Self { examples, lines, all: set.examples.len(), beta: job.spec.asked.beta }
    }

    /// What the scores come to, and all of it for the report. The base comes first, the result
    /// last, and the version that the name means between them where there is one.
    pub fn measured(
        &self,
        contestants: &[Contestant],
        scored: &[Vec<Scored>],
    ) -> (Measured, Value) {
        let names = contestants.iter().map(|c| c.model.as_str());
        let (first, last) = (&scored[0], &scored[scored.len() - 1]);
        let current = (scored.len() > 2).then(|| &scored[1]);
        let tokens: usize = last.iter().map(|s| s.counted).sum();
        let mut report = json!({
            "examples": self.examples.len(), "held_out": self.all, "answer_tokens": tokens,
        });
        if let Some(beta) = self.beta {
            let of = |of: &Vec<Scored>| preference(beta, of, first);
            let scores = names.zip(scored).map(|(model, scored)| {
                let (loss, accuracy) = of(scored);
                json!({"model": model, "loss": loss, "preference_accuracy": accuracy})
            });
            report["scores"] = scores.collect();
            let (loss, base_loss) = (of(last).0, of(first).0);
            let current_loss = current.map(|current| of(current).0);
            let (exact_match, negative_flips) = (None, None);
            let measured = Measured { loss, base_loss, current_loss, exact_match, negative_flips };
            return (measured, report);
        }
        let scores: Vec<Score> =
            names.zip(scored).map(|(m, scored)| Score::of(m, scored)).collect();
        report["scores"] = json!(scores);
        let flips = current.map(|current| [flips(current, last), flips(last, current)]);
        let [negative, positive] = flips.unwrap_or_default();
        report["negative_flips"] = self.told(&negative);
        report["positive_flips"] = self.told(&positive);
        let measured = Measured {
            loss: scores[scores.len() - 1].loss,
            base_loss: scores[0].loss,
            current_loss: current.map(|_| scores[1].loss),
            exact_match: Some(scores[scores.len() - 1].exact_match),
            negative_flips: Some(negative.len() as u64),
        };
        (measured, report)
    }

    fn told(&self, flips: &[usize]) -> Value {
        let lines: Vec<u64> = flips.iter().take(LINES_MAX).map(|i| self.lines[*i]).collect();
        json!({"count": flips.len(), "lines": lines})
    }
}

/// An example as a request may have it: one token shorter than the context. `None`: nothing of it
/// is learnt.
fn example(set: &Dataset, index: usize, context: usize) -> Option<Example> {
    let example = set.examples.get(index);
    let length = example.ids.len().min(context - 1);
    let weights = example.weights[..length].to_vec();
    let answer = (1..length).find(|at| weights[*at] != 0.0)?;
    Some(Example { tokens: example.ids[..length].to_vec(), answer, weights })
}

/// Examples that the one answers exactly and the other does not.
fn flips(right: &[Scored], wrong: &[Scored]) -> Vec<usize> {
    let pairs = right.iter().zip(wrong).enumerate();
    pairs.filter(|(_, (a, b))| a.is_exact() && !b.is_exact()).map(|(i, _)| i).collect()
}

/// DPO's loss against `base`, and the share of pairs whose preferred answer gained more.
fn preference(beta: f64, scored: &[Scored], base: &[Scored]) -> (f64, f64) {
    let margin = |pair: &[Scored]| pair[0].logprob - pair[1].logprob;
    let pairs = scored.chunks_exact(2).zip(base.chunks_exact(2));
    let margins: Vec<f64> = pairs.map(|(own, base)| beta * (margin(own) - margin(base))).collect();
    let count = margins.len() as f64;
    // ln(1 + e^-z), without an overflow.
    let loss = |z: &f64| (-z).max(0.0) + (-z.abs()).exp().ln_1p();
    let right = margins.iter().filter(|z| **z > 0.0).count();
    (margins.iter().map(loss).sum::<f64>() / count, right as f64 / count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(logprob: f64, correct: usize) -> Scored {
        Scored { logprob, weight: 2.0, counted: 2, correct }
    }

    fn held(examples: usize, beta: Option<f64>) -> HeldOut {
        let example = Example { tokens: vec![1, 2, 3], answer: 1, weights: Vec::new() };
        let lines = (1..).take(examples).map(|n| 10 * n).collect();
        HeldOut { examples: vec![example; examples], lines, all: 99, beta }
    }

    fn contestants(names: &[&str]) -> Vec<Contestant> {
        names.iter().map(|n| Contestant { model: (*n).to_owned(), id: None }).collect()
    }

    #[test]
    fn a_flip_is_what_was_right_before_and_is_wrong_now() {
        let base = vec![scored(-8.0, 0); 4];
        let current = [2, 2, 1, 0].map(|correct| scored(-2.0, correct)).to_vec();
        let result = [2, 1, 2, 2].map(|correct| scored(-1.0, correct)).to_vec();
        let names = contestants(&["base", "a@1", "a@2"]);
        let (measured, report) = held(4, None).measured(&names, &[base.clone(), current, result]);
        assert_eq!((measured.negative_flips, measured.exact_match), (Some(1), Some(0.75)));
        assert_eq!((measured.loss, measured.base_loss), (0.5, 4.0));
        assert_eq!(measured.current_loss, Some(1.0));
        assert_eq!(report["negative_flips"], json!({"count": 1, "lines": [20]}));
        assert_eq!(report["positive_flips"], json!({"count": 2, "lines": [30, 40]}));
        assert_eq!(report["scores"][1]["token_accuracy"], 5.0 / 8.0);
        assert_eq!((&report["examples"], &report["held_out"]), (&json!(4), &json!(99)));
        let names = contestants(&["base", "a@1"]);
        let (first, _) = held(4, None).measured(&names, &[base.clone(), base]);
        assert_eq!((first.negative_flips, first.current_loss), (Some(0), None));
    }

    #[test]
    fn pairs_have_the_loss_of_dpo_against_the_base() {
        let pair = |a, b| vec![scored(a, 0), scored(b, 0)];
        let base = [pair(-5.0, -4.0), pair(-3.0, -3.0)].concat();
        let result = [pair(-4.0, -5.0), pair(-4.0, -3.5)].concat();
        let names = contestants(&["base", "a@1"]);
        let (measured, report) = held(4, Some(0.5)).measured(&names, &[base, result]);
        // z = 0.5 · (1 − (−1)) and 0.5 · (−0.5 − 0): ln(1 + e^-1), ln(1 + e^0.25).
        let loss = (0.31326168751822286 + 0.8259394198788436) / 2.0;
        assert!((measured.loss - loss).abs() < 1e-12, "{measured:?}");
        assert!((measured.base_loss - std::f64::consts::LN_2).abs() < 1e-12);
        assert_eq!((measured.exact_match, measured.negative_flips), (None, None));
        assert_eq!(report["scores"][1]["preference_accuracy"], 0.5);
    }
}
