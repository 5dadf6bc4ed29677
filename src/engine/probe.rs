//! The probe: does an adapter change anything at all?
//!
//! Owns a few pages beyond the page book's. Runs fixed prompts once without and once with the
//! adapter in one step and reports the largest change of a logit. Never touches a sequence. An
//! adapter that loads and does nothing is the field's commonest silent fault.

use crate::adapters::bank::{Bank, Probe, Slot};
use crate::error::{Error, Result};
use crate::model::{Batch, Model};
use polylora_kernels::KvCache;

/// Pages the probe needs for `prompts` prompts of at most one page each, with and without the
/// adapter.
pub fn pages_needed(prompts: usize) -> usize {
    prompts * 2
}

/// (rows, rows with logits) of the probe's batch of so many prompts, at most: a model that probes
/// has room for them, however small its steps are.
pub fn rows_needed(prompts: usize) -> (usize, usize) {
    (prompts * 2 * KvCache::PAGE, prompts * 2)
}

/// Runs the probe in the pages from `first_page` on.
/// Errors: `non_finite_logits` when the adapter makes infinities or NaN of the fixed prompts;
/// `internal_error` when the device failed.
pub fn run(
    model: &mut Model,
    bank: &Bank,
    slot: Slot,
    prompts: &[Vec<u32>],
    first_page: u32,
) -> Result<Probe> {
    let batch = batch(prompts, slot, first_page);
    let vocab = model.shape().vocab;
    let logits = model.forward(&batch, bank)?;
    let (with, without) = logits.split_at(prompts.len() * vocab);
    let mut largest = 0.0f32;
    for (a, b) in with.iter().zip(without) {
        if !a.is_finite() {
            let message = "the adapter turns the probe's logits into NaN or infinity";
            return Err(Error::unprocessable("non_finite_logits", message));
        }
        largest = largest.max((a - b).abs());
    }
    Ok(Probe { logit_change_max: largest })
}

/// The adapter's rows first, then the same prompts on the base; the last row of each has logits.
fn batch(prompts: &[Vec<u32>], slot: Slot, first_page: u32) -> Batch {
    let mut b = Batch { page_indptr: vec![0], segment_indptr: vec![0], ..Batch::default() };
    for half in 0..2 {
        for prompt in prompts {
            assert!(!prompt.is_empty() && prompt.len() <= KvCache::PAGE, "a probe is one page");
            let sequence = b.page_indptr.len() as u32 - 1;
            for (position, &token) in prompt.iter().enumerate() {
                b.tokens.push(token);
                b.positions.push(position as u32);
                b.sequences.push(sequence);
            }
            b.logit_rows.push(b.tokens.len() as u32 - 1);
            b.pages.push(first_page + sequence);
            b.page_indptr.push(b.pages.len() as u32);
        }
        if half == 0 {
            b.segment_indptr.push(b.tokens.len() as u32);
            b.segment_mixes.push(slot.into());
            b.logit_indptr = vec![0, b.logit_rows.len() as u32];
            b.logit_mixes.push(slot.into());
        }
    }
    b
}
