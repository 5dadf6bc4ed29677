//! The naive reference: penalties by counting, filters by sorting everything, sums in f64.
//!
//! Owns the dice of the tests too. Never uses the sampler, but for its random numbers. The thing to
//! know: it is held to Hugging Face's probabilities before the sampler is held to it.

use polylora::engine::request::Sampling;
use polylora::engine::sampler::{History, uniform};

/// Numbers for test data, from the generator under test: its own tests are below.
pub struct Dice(pub u64);

impl Dice {
    pub fn unit(&mut self) -> f64 {
        self.0 += 1;
        uniform(0xd1ce, self.0)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.unit() * n as f64) as usize
    }
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
    /// Logits of about the spread of a model's, many of them equal.
    pub fn logits(&mut self, vocab: usize, scale: f64) -> Vec<f32> {
        let grain = if self.below(2) == 0 { 4.0 } else { 65536.0 };
        let sum = |dice: &mut Self| (0..6).map(|_| dice.unit() - 0.5).sum::<f64>();
        (0..vocab).map(|_| ((sum(self) * scale * grain).round() / grain) as f32).collect()
    }
}

pub fn no_history() -> History<'static> {
    History { tokens: &[0], prompt_len: 1, banned: &[] }
}

/// The logits after penalties, bias and ban: in f32, where two may be equal that are not in f64.
fn changed(logits: &[f32], s: &Sampling, history: History<'_>) -> Vec<f64> {
    let output = &history.tokens[history.prompt_len..];
    let change = |(token, &logit): (usize, &f32)| {
        let is = |t: &&u32| **t as usize == token;
        let mut x = logit;
        if history.tokens.iter().any(|t| is(&t)) {
            x = if x > 0.0 { x / s.repetition_penalty } else { x * s.repetition_penalty };
        }
        let times = output.iter().filter(is).count();
        if times > 0 {
            x -= s.frequency_penalty * times as f32 + s.presence_penalty;
        }
        for bias in s.logit_bias.iter().filter(|b| b.0 as usize == token) {
            x += bias.1;
        }
        if history.banned.iter().any(|t| is(&t)) {
            x = f32::NEG_INFINITY;
        }
        f64::from(x)
    };
    logits.iter().enumerate().map(change).collect()
}

/// The probability left to each token, by sorting everything; and whether a cut is too close to
/// call in f32.
pub fn reference(logits: &[f32], s: &Sampling, history: History<'_>) -> (Vec<f64>, bool) {
    let x = changed(logits, s, history);
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&a, &b| x[b].partial_cmp(&x[a]).unwrap().then(a.cmp(&b)));
    let peak = x[order[0]];
    let weight = |t: usize| ((x[t] - peak) / f64::from(s.temperature)).exp();
    let mut kept = order.clone();
    if s.top_k > 0 {
        kept.truncate(s.top_k as usize);
    }
    let total: f64 = kept.iter().map(|&t| weight(t)).sum();
    let (mut mass, mut nucleus, mut close) = (0.0, 0, false);
    while s.top_p < 1.0 && nucleus < kept.len() && mass < f64::from(s.top_p) {
        mass += weight(kept[nucleus]) / total;
        nucleus += 1;
        close |= (mass - f64::from(s.top_p)).abs() < 1e-5;
    }
    if s.top_p < 1.0 {
        kept.truncate(nucleus);
    }
    close |= kept.iter().any(|&t| (weight(t) / f64::from(s.min_p) - 1.0).abs() < 1e-5);
    kept.retain(|&t| weight(t) >= f64::from(s.min_p));
    let total: f64 = kept.iter().map(|&t| weight(t)).sum();
    let mut probabilities = vec![0.0; x.len()];
    for t in kept {
        probabilities[t] = weight(t) / total;
    }
    (probabilities, close)
}

/// Pearson's sum over the cells that expect something, against its mean plus five deviations.
pub fn assert_distributed(counts: &[usize], probabilities: &[f64], of: &str) {
    let draws = counts.iter().sum::<usize>() as f64;
    let (mut sum, mut cells) = (0.0, -1.0);
    let mut rest = (0.0, 0.0);
    for (&count, &p) in counts.iter().zip(probabilities) {
        assert!(p > 0.0 || count == 0, "{of}: a token without probability was drawn");
        if p * draws < 8.0 {
            rest = (rest.0 + count as f64, rest.1 + p * draws);
        } else {
            sum += (count as f64 - p * draws).powi(2) / (p * draws);
            cells += 1.0;
        }
    }
    if rest.1 >= 8.0 {
        sum += (rest.0 - rest.1).powi(2) / rest.1;
        cells += 1.0;
    }
    let limit = cells + 5.0 * (2.0_f64 * f64::max(cells, 1.0)).sqrt();
    assert!(sum <= limit, "{of}: chi-square {sum} of {cells} degrees of freedom");
}
