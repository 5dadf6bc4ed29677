//! From a plan to the flat arrays of one step.
//!
//! Owns the order of rows: sequences of one mix are neighbours, base rows come last. Never
//! decides who runs. The thing to know: a sequence's lease is checked against the bank here, once a
//! step: wrong weights are a loud bug, never an answer.

use super::scheduler::{Plan, Planned};
use super::sequence::Sequence;
use crate::adapters::bank::{AdapterMix, Bank};
use crate::model::Batch;

/// What a row of logits is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogitRow {
    /// Index into the plan's rows.
    pub planned: u32,
    /// Position of the token that was fed; the logits are of the next one.
    pub position: u32,
    /// The next token is to be sampled (else it is known: prompt logprobs).
    pub samples: bool,
}

/// Reused from step to step: building allocates nothing once the buffers have grown.
pub struct Builder {
    pub batch: Batch,
    /// One entry per row of logits, in the logits' order.
    pub logit_rows: Vec<LogitRow>,
    /// Plan indices ordered by mix.
    order: Vec<u32>,
}

impl Builder {
    /// Takes room for the largest step there can be.
    pub fn new(rows_max: usize, logit_rows_max: usize, sequences_max: usize, pages: usize) -> Self {
        let page_entries = pages.max(sequences_max);
        Self {
            batch: Batch {
                tokens: Vec::with_capacity(rows_max),
                positions: Vec::with_capacity(rows_max),
                sequences: Vec::with_capacity(rows_max),
                pages: Vec::with_capacity(page_entries),
                page_indptr: Vec::with_capacity(sequences_max + 1),
                segment_indptr: Vec::with_capacity(sequences_max + 1),
                segment_mixes: Vec::with_capacity(sequences_max),
                logit_rows: Vec::with_capacity(logit_rows_max),
                logit_indptr: Vec::with_capacity(sequences_max + 1),
                logit_mixes: Vec::with_capacity(sequences_max),
            },
            logit_rows: Vec::with_capacity(logit_rows_max),
            order: Vec::with_capacity(sequences_max),
        }
    }

    /// Fills `batch` and `logit_rows` for the plan. Panics when a slot holds another digest than a
    /// sequence leased.
    pub fn build(&mut self, plan: &Plan, running: &[Sequence], bank: &Bank) {
        self.clear();
        let blend_of = |i: u32| running[plan.entries()[i as usize].sequence].mix();
        self.order.extend(0..plan.entries().len() as u32);
        self.order.sort_unstable_by_key(|&i| {
            let mix = blend_of(i);
            (mix.is_none(), mix, i)
        });
        for at in 0..self.order.len() {
            let planned = self.order[at];
            let row = plan.entries()[planned as usize];
            let sequence = &running[row.sequence];
            if let Some(lease) = &sequence.lease {
                lease.check_in(bank);
            }
            self.push_rows(planned, row, sequence);
        }
        self.check();
    }

    fn clear(&mut self) {
        let b = &mut self.batch;
        b.tokens.clear();
        b.positions.clear();
        b.sequences.clear();
        b.pages.clear();
        b.page_indptr.clear();
        b.page_indptr.push(0);
        b.segment_indptr.clear();
        b.segment_indptr.push(0);
        b.segment_mixes.clear();
        b.logit_rows.clear();
        b.logit_indptr.clear();
        b.logit_indptr.push(0);
        b.logit_mixes.clear();
        self.logit_rows.clear();
        self.order.clear();
    }

    fn push_rows(&mut self, planned: u32, row: Planned, sequence: &Sequence) {
        let b = &mut self.batch;
        let index = b.page_indptr.len() as u32 - 1;
        let end = row.start + row.len;
        for position in row.start..end {
            let samples = row.samples && position + 1 == end;
            if samples || row.prompt_logits {
                b.logit_rows.push(b.tokens.len() as u32);
                self.logit_rows.push(LogitRow { planned, position: position as u32, samples });
            }
            b.tokens.push(sequence.tokens[position]);
            b.positions.push(position as u32);
            b.sequences.push(index);
        }
        b.pages.extend_from_slice(&sequence.pages);
        b.page_indptr.push(b.pages.len() as u32);
        let Some(mix) = sequence.mix() else { return };
        extend_segment(&mut b.segment_indptr, &mut b.segment_mixes, mix, b.tokens.len());
        if row.samples || row.prompt_logits {
            extend_segment(&mut b.logit_indptr, &mut b.logit_mixes, mix, b.logit_rows.len());
        }
    }

    /// Invariant 6: borders strictly increasing, adapters distinct, base rows in no segment.
    fn check(&self) {
        let b = &self.batch;
        for (indptr, mixes) in
            [(&b.segment_indptr, &b.segment_mixes), (&b.logit_indptr, &b.logit_mixes)]
        {
            assert!(indptr.windows(2).all(|w| w[0] < w[1]), "an empty segment");
            assert!(mixes.windows(2).all(|w| w[0] < w[1]), "a mix in two segments");
        }
        assert_eq!(b.page_indptr.len(), self.order.len() + 1);
        assert_eq!(b.logit_rows.len(), self.logit_rows.len());
    }
}

fn extend_segment(indptr: &mut Vec<u32>, mixes: &mut Vec<AdapterMix>, mix: AdapterMix, end: usize) {
    if mixes.last() == Some(&mix) {
        *indptr.last_mut().expect("starts at 0") = end as u32;
    } else {
        mixes.push(mix);
        indptr.push(end as u32);
    }
}
