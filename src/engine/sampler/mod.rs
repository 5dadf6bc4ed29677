//! The sampler: from one row of logits to one token, and what else might have stood there.
//!
//! Owns the order of penalties, filters and the draw, and the scratch for them. Never keeps state
//! between calls: what a row gives depends on its logits, its history, its seed and its index only.
//! The thing to know: tokens are ranked by logit, falling, then id, rising; every filter keeps the
//! head of that ranking, and the draw walks the kept by id.

mod filter;
mod numerics;

use polylora_kernels::argmax;

use super::request::{Sampling, TOP_LOGPROBS_MAX, TokenEvent};
use crate::error::{Error, Kind, Result};
use filter::Ranking;

pub use numerics::uniform;

impl TokenEvent {
    /// A token without logprobs.
    pub fn unscored(token: u32) -> Self {
        Self { token, logprob: f32::NAN, top: [(0, 0.0); TOP_LOGPROBS_MAX], top_len: 0 }
    }
}

/// Whose next token it is.
#[derive(Debug, Clone, Copy)]
pub struct History<'a> {
    /// Prompt, then output. The number of output tokens is the index of the draw.
    pub tokens: &'a [u32],
    pub prompt_len: usize,
    /// Tokens that must not come next.
    pub banned: &'a [u32],
}

/// Scratch for one row at a time, taken once.
pub struct Sampler {
    /// `[V]`, all zero between calls.
    counts: Vec<u32>,
    /// `[V]`, the logits as the model gave them.
    raw: Vec<f32>,
    /// `[V]`, probabilities times a constant.
    weights: Vec<f32>,
    ranking: Ranking,
}

impl Sampler {
    /// For rows of `vocab` logits.
    pub fn new(vocab: usize) -> Self {
        assert!(vocab > 0, "an empty vocabulary");
        Self {
            counts: vec![0; vocab],
            raw: vec![0.0; vocab],
            weights: vec![0.0; vocab],
            ranking: Ranking::new(vocab),
        }
    }

    /// The next token. `logits` `[V]` are used up. Errors (`non_finite_logits`): a NaN or +inf
    /// among the logits, or nothing left above -inf.
    ///
    /// In this order: logprobs of the untouched logits; repetition penalty (prompt and output),
    /// frequency and presence penalties (output), bias, ban; then the first maximum if the
    /// temperature is 0, else temperature, top_k, top_p, min_p and a draw.
    pub fn sample(
        &mut self,
        logits: &mut [f32],
        sampling: &Sampling,
        history: History<'_>,
    ) -> Result<TokenEvent> {
        assert_eq!(logits.len(), self.counts.len(), "a row of another vocabulary");
        let mut event = TokenEvent::unscored(0);
        let mut log_total = 0.0;
        if let Some(top) = sampling.logprobs {
            log_total = self.top_logprobs(logits, top, &mut event)?;
            self.raw.copy_from_slice(logits);
        }
        self.penalise(logits, sampling, history);
        let index = (history.tokens.len() - history.prompt_len) as u64;
        event.token = self.choose(logits, sampling, index)?;
        if sampling.logprobs.is_some() {
            event.logprob = (f64::from(self.raw[event.token as usize]) - log_total) as f32;
        }
        Ok(event)
    }

    /// What `logits` `[V]` say of a `token` that is already known, with `top` alternatives. Errors
    /// as [`sample`](Self::sample).
    pub fn score(&mut self, logits: &[f32], token: u32, top: u8) -> Result<TokenEvent> {
        assert_eq!(logits.len(), self.counts.len(), "a row of another vocabulary");
        let mut event = TokenEvent::unscored(token);
        let log_total = self.top_logprobs(logits, top, &mut event)?;
        event.logprob = (f64::from(logits[token as usize]) - log_total) as f32;
        Ok(event)
    }

    /// Fills the alternatives of `event`; returns what to subtract from a logit to make it a
    /// logprob.
    fn top_logprobs(&mut self, logits: &[f32], top: u8, event: &mut TokenEvent) -> Result<f64> {
        let (_, peak) = argmax(logits).ok_or_else(not_finite)?;
        numerics::exp_each(logits, peak, 1.0, &mut self.weights);
        let log_total = f64::from(peak) + numerics::total(&self.weights).ln();
        let best = self.ranking.best(logits, usize::from(top).min(TOP_LOGPROBS_MAX));
        best.sort_unstable();
        for (entry, token) in event.top.iter_mut().zip(best.iter().map(|c| c.token())) {
            *entry = (token as u32, (f64::from(logits[token]) - log_total) as f32);
        }
        event.top_len = best.len() as u8;
        Ok(log_total)
    }

    /// Everything that changes logits. Tokens outside the vocabulary are let be: the edge checks
    /// them.
    fn penalise(&mut self, logits: &mut [f32], sampling: &Sampling, history: History<'_>) {
        if sampling.repetition_penalty != 1.0 {
            self.tally(history.tokens, |token, _| {
                let logit = &mut logits[token];
                // As in Hugging Face: away from likely, whatever the sign.
                if *logit > 0.0 {
                    *logit /= sampling.repetition_penalty;
                } else {
                    *logit *= sampling.repetition_penalty;
                }
            });
        }
        if sampling.frequency_penalty != 0.0 || sampling.presence_penalty != 0.0 {
            self.tally(&history.tokens[history.prompt_len..], |token, times| {
                logits[token] -=
                    sampling.frequency_penalty * times as f32 + sampling.presence_penalty;
            });
        }
        for &(token, bias) in &sampling.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        for &token in history.banned {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    /// Calls `each` once for every distinct token of `tokens`, with how often it occurs. Touches
    /// the counts of those tokens only and leaves them zero.
    fn tally(&mut self, tokens: &[u32], mut each: impl FnMut(usize, u32)) {
        for &token in tokens {
            if let Some(count) = self.counts.get_mut(token as usize) {
                *count += 1;
            }
        }
        for &token in tokens {
            let Some(count) = self.counts.get_mut(token as usize) else {
                continue;
            };
            let times = std::mem::take(count);
            if times > 0 {
                each(token as usize, times);
            }
        }
    }

    /// Temperature, filters, draw.
    fn choose(&mut self, logits: &[f32], sampling: &Sampling, index: u64) -> Result<u32> {
        let (first, peak) = argmax(logits).ok_or_else(not_finite)?;
        if sampling.temperature == 0.0 {
            return Ok(first as u32);
        }
        let top_k = sampling.top_k as usize;
        if (1..logits.len()).contains(&top_k) {
            self.weights.fill(0.0);
            for token in self.ranking.best(logits, top_k).iter().map(|c| c.token()) {
                let below = logits[token] - peak;
                self.weights[token] = numerics::exp(below / sampling.temperature);
            }
        } else {
            numerics::exp_each(logits, peak, sampling.temperature, &mut self.weights);
        }
        if sampling.top_p < 1.0 {
            self.ranking.keep_nucleus(logits, &mut self.weights, sampling.top_p);
        }
        if sampling.min_p > 0.0 {
            // The most likely token weighs exactly 1.
            for weight in self.weights.iter_mut().filter(|weight| **weight < sampling.min_p) {
                *weight = 0.0;
            }
        }
        Ok(numerics::draw(&self.weights, uniform(sampling.seed, index)))
    }
}

fn not_finite() -> Error {
    let message = "the logits of this row hold a NaN or +inf, or leave no token possible";
    Error::new(Kind::Fault, "non_finite_logits", message)
}
