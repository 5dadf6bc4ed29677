//! Merging: PEFT's own results, algebraic properties on random adapters, and refusals.
//!
//! `golden/merge.json` and `golden/merge_layer0.safetensors` hold what peft 0.21
//! (`add_weighted_adapter` on the sample adapters pirate and ticket-json) computed with torch 2.15
//! and transformers 5.23 in f32.

mod dare;
mod lego;
mod nearest;
mod oracle;
mod properties;
mod refusals;
mod sources;
