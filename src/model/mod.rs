//! The decoder: one forward pass over ragged rows for the whole family, by the fields of `ModelShape`.
//!
//! Owns weights, step buffers and the KV cache. Never samples, schedules or knows names; rows come from a `Batch`, adapters
//! from the `Bank`. The thing to know: weights are shared read-only (`Arc<Weights>`), everything else is the engine thread's.

pub mod checkpoint;
pub mod source;
pub mod weights;

use crate::adapters::bank::{Bank, Slot};
use crate::error::Result;
use crate::shape::ModelShape;
use polylora_kernels::{Device, Dtype};
use std::sync::Arc;
use weights::Weights;

/// The rows of one step. Adapter rows first, grouped by slot; base rows last. Buffers are reused from step to step.
#[derive(Debug, Default, Clone)]
pub struct Batch {
    /// [T]
    pub tokens: Vec<u32>,
    /// [T]
    pub positions: Vec<u32>,
    /// [T] index of the row's sequence in the page table below
    pub sequences: Vec<u32>,
    /// Page ids of all sequences, one after the other.
    pub pages: Vec<u32>,
    /// [S + 1]
    pub page_indptr: Vec<u32>,
    /// [G + 1] row borders
    pub segment_indptr: Vec<u32>,
    /// [G] the adapter of each segment
    pub segment_slots: Vec<Slot>,
    /// Rows whose logits are wanted, ascending. [S']
    pub logit_rows: Vec<u32>,
    /// [G' + 1] borders over `logit_rows` of the segments that have any, and their slots
    pub logit_indptr: Vec<u32>,
    pub logit_slots: Vec<Slot>,
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
    pub kv_dtype: Dtype,
    /// Positions to make rope tables for.
    pub context: usize,
}

pub struct Model {
    pub weights: Arc<Weights>,
}

impl Model {
    /// Takes every buffer a step needs.
    pub fn new(_weights: Arc<Weights>, _device: Device, _options: &ModelOptions) -> Result<Self> {
        unimplemented!()
    }
    pub fn shape(&self) -> &ModelShape {
        &self.weights.shape
    }
    /// Bytes of one KV page over all layers.
    pub fn page_bytes(_shape: &ModelShape, _dtype: Dtype) -> usize {
        unimplemented!()
    }
    /// Bytes of step buffers, for the start-up ledger.
    pub fn buffer_bytes(_shape: &ModelShape, _o: &ModelOptions) -> usize {
        unimplemented!()
    }
    /// One step: writes K and V of every row to its page, returns logits [S', V] f32 of `batch.logit_rows`.
    /// Allocates nothing.
    pub fn forward(&mut self, _batch: &Batch, _bank: &Bank) -> &mut [f32] {
        unimplemented!()
    }
    pub fn device(&self) -> &Device {
        unimplemented!()
    }
}
