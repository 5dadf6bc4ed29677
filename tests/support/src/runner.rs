//! The simplest thing that can run a model: no scheduler, no prefix cache, pages handed out once.
//!
//! Tests compare the engine, and the model itself, against what this computes.

use polylora::adapters::bank::{AdapterMix, Bank, Slot};
use polylora::model::{Batch, Model, ModelOptions};
use polylora_kernels::{Device, KvCache, KvDtype};
use std::sync::Arc;

pub use polylora::model::weights::Weights;

/// A sequence that is run by hand.
pub struct Stream {
    pub tokens: Vec<u32>,
    pub computed: usize,
    pub mix: Option<AdapterMix>,
    pages: Vec<u32>,
}

pub struct Runner {
    pub model: Model,
    pub bank: Bank,
    pages_next: u32,
    pages_total: u32,
    rows_max: usize,
}

impl Runner {
    pub fn new(weights: Arc<Weights>, kv_dtype: impl Into<KvDtype>, tokens_max: usize) -> Self {
        let rows_max = 256;
        let pages = tokens_max.div_ceil(KvCache::PAGE);
        let options = ModelOptions {
            threads: 2,
            rows_max,
            logit_rows_max: rows_max,
            kv_pages: pages,
            kv_dtype: kv_dtype.into(),
            context: 2048.min(weights.shape.context),
        };
        let model = Model::new(weights, Device::cpu(2), &options).expect("model");
        Self { model, bank: Bank::new(64), pages_next: 0, pages_total: pages as u32, rows_max }
    }

    /// A new sequence with room for `tokens_max` tokens.
    pub fn stream(&mut self, tokens: &[u32], slot: Option<Slot>, tokens_max: usize) -> Stream {
        self.blended(tokens, slot.map(AdapterMix::from), tokens_max)
    }

    /// The same with several adapters.
    pub fn blended(
        &mut self,
        tokens: &[u32],
        mix: Option<AdapterMix>,
        tokens_max: usize,
    ) -> Stream {
        let count = tokens_max.div_ceil(KvCache::PAGE) as u32;
        assert!(self.pages_next + count <= self.pages_total, "runner is out of pages");
        // Highest first: pages of one sequence are never in ascending order.
        let pages = (self.pages_next..self.pages_next + count).rev().collect();
        self.pages_next += count;
        Stream { tokens: tokens.to_vec(), computed: 0, mix, pages }
    }

    /// Forgets every sequence's pages.
    pub fn reset(&mut self) {
        self.pages_next = 0;
    }

    /// Computes every token not computed yet, in steps of up to `rows_max` rows that mix all
    /// streams. `seen` gets (stream, position, logits of the next token) for every computed
    /// position.
    pub fn advance(&mut self, streams: &mut [Stream], mut seen: impl FnMut(usize, usize, &[f32])) {
        loop {
            let mut parts: Vec<(usize, usize, usize)> = Vec::new();
            let mut rows = 0;
            for (i, s) in streams.iter().enumerate() {
                let len = (s.tokens.len() - s.computed).min(self.rows_max - rows);
                if len > 0 {
                    parts.push((i, s.computed, len));
                    rows += len;
                }
            }
            if parts.is_empty() {
                return;
            }
            parts.sort_by_key(|&(i, _, _)| (streams[i].mix.is_none(), streams[i].mix));
            let batch = batch_of(&parts, streams);
            let vocab = self.model.shape().vocab;
            let logits = self.model.forward(&batch, &self.bank).expect("a step");
            let mut row = 0;
            for &(i, start, len) in &parts {
                for position in start..start + len {
                    seen(i, position, &logits[row * vocab..(row + 1) * vocab]);
                    row += 1;
                }
                streams[i].computed += len;
            }
        }
    }

    /// Greedy continuations of at most `tokens_max` tokens; ends a stream after `stop`.
    /// Returns (tokens, gaps between the two best logits).
    pub fn greedy(
        &mut self,
        streams: &mut [Stream],
        tokens_max: usize,
        stop: u32,
    ) -> Vec<(Vec<u32>, Vec<f32>)> {
        let mut out = vec![(Vec::new(), Vec::new()); streams.len()];
        for _ in 0..tokens_max {
            let mut next = vec![None; streams.len()];
            let lens: Vec<usize> = streams.iter().map(|s| s.tokens.len()).collect();
            self.advance(streams, |i, position, logits| {
                if position + 1 == lens[i] {
                    next[i] = Some(best(logits));
                }
            });
            for (i, n) in next.into_iter().enumerate() {
                let Some((token, gap)) = n else { continue };
                out[i].0.push(token);
                out[i].1.push(gap);
                if token != stop {
                    streams[i].tokens.push(token);
                }
            }
        }
        out
    }
}

/// (index of the first maximum, its distance to the second best)
pub fn best(logits: &[f32]) -> (u32, f32) {
    let (mut top, mut second) = (0, f32::NEG_INFINITY);
    for (i, &x) in logits.iter().enumerate().skip(1) {
        if x > logits[top] {
            second = logits[top];
            top = i;
        } else if x > second {
            second = x;
        }
    }
    (top as u32, logits[top] - second)
}

/// Natural-log softmax at some ids, in f64.
pub fn logprobs_at(logits: &[f32], ids: &[u32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let sum: f64 = logits.iter().map(|&x| (x as f64 - max).exp()).sum();
    ids.iter().map(|&i| logits[i as usize] as f64 - max - sum.ln()).collect()
}

fn batch_of(parts: &[(usize, usize, usize)], streams: &[Stream]) -> Batch {
    let mut b = Batch { page_indptr: vec![0], segment_indptr: vec![0], ..Batch::default() };
    for (sequence, &(i, start, len)) in parts.iter().enumerate() {
        let s = &streams[i];
        for position in start..start + len {
            b.tokens.push(s.tokens[position]);
            b.positions.push(position as u32);
            b.sequences.push(sequence as u32);
            b.logit_rows.push(b.tokens.len() as u32 - 1);
        }
        b.pages.extend_from_slice(&s.pages);
        b.page_indptr.push(b.pages.len() as u32);
        let Some(mix) = s.mix else { continue };
        if b.segment_mixes.last() == Some(&mix) {
            *b.segment_indptr.last_mut().expect("starts at 0") = b.tokens.len() as u32;
        } else {
            b.segment_mixes.push(mix);
            b.segment_indptr.push(b.tokens.len() as u32);
        }
    }
    b.logit_indptr = b.segment_indptr.clone();
    b.logit_mixes = b.segment_mixes.clone();
    b
}
