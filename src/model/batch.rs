//! What a step is given, and what a model is made for.
//!
//! Owns the plain records. Never computes.

use crate::adapters::bank::AdapterMix;
use polylora_kernels::KvDtype;

/// The rows of one step. Adapter rows first, grouped by mix; base rows last. Buffers are reused
/// from step to step.
#[derive(Debug, Default, Clone)]
pub struct Batch {
    /// `[T]`
    pub tokens: Vec<u32>,
    /// `[T]`
    pub positions: Vec<u32>,
    /// `[T]` index of the row's sequence in the page table below
    pub sequences: Vec<u32>,
    /// Page ids of all sequences, one after the other.
    pub pages: Vec<u32>,
    /// `[S + 1]`
    pub page_indptr: Vec<u32>,
    /// `[G + 1]` row borders
    pub segment_indptr: Vec<u32>,
    /// `[G]` what each segment is computed with
    pub segment_mixes: Vec<AdapterMix>,
    /// Rows whose logits are wanted, ascending. `[S']`
    pub logit_rows: Vec<u32>,
    /// `[G' + 1]` borders over `logit_rows` of the segments that have any, and their mixes
    pub logit_indptr: Vec<u32>,
    pub logit_mixes: Vec<AdapterMix>,
}

/// Sizes that are fixed at start.
#[derive(Debug, Clone)]
pub struct ModelOptions {
    pub threads: usize,
    /// Most rows of a step (T).
    pub rows_max: usize,
    /// Most rows with logits in a step.
    pub logit_rows_max: usize,
    pub kv_pages: usize,
    /// Storage of the KV cache.
    pub kv_dtype: KvDtype,
    /// Positions to make rope tables for.
    pub context: usize,
}
