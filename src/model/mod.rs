//! The decoder: one forward pass over ragged rows for the whole family, by the fields of
//! `ModelShape`.
//!
//! Owns weights, step buffers and the KV cache. Never samples, schedules or knows names; rows come
//! from a `Batch`, adapters from the `Bank`. The thing to know: weights are shared read-only
//! (`Arc<Weights>`), everything else is the engine thread's.

mod batch;
mod forward;
mod rope;
pub mod weights;

use crate::adapters::bank::Bank;
use crate::error::{Error, Kind, Result};
use crate::shape::{ModelShape, Rope};
pub use batch::{Batch, ModelOptions};
use forward::{Buffers, Step};
use polylora_kernels::{Device, KvCache, KvDtype, RopeTable};
use std::sync::Arc;
use weights::Weights;

pub struct Model {
    pub weights: Arc<Weights>,
    device: Device,
    kv: KvCache,
    rope: RopeTable,
    /// Of sliding-window layers, where it differs.
    rope_local: Option<RopeTable>,
    buffers: Buffers,
    rows_max: usize,
    logit_rows_max: usize,
}

impl Model {
    /// Takes every buffer a step needs. Errors (`context_too_long`) when `options.context` is
    /// beyond what the model was made for.
    pub fn new(weights: Arc<Weights>, device: Device, options: &ModelOptions) -> Result<Self> {
        let shape = &weights.shape;
        if options.context > shape.context {
            let message = format!(
                "a context of {} tokens was asked for; the model has {}",
                options.context, shape.context
            );
            return Err(Error::new(Kind::Invalid, "context_too_long", message));
        }
        let table = |rope: &Rope| {
            let (inv_freq, scale) = rope.frequencies(shape.head_dim);
            RopeTable::new(options.context, shape.head_dim, &inv_freq, scale)
        };
        let kv = KvCache::new(
            options.kv_dtype,
            shape.layers,
            options.kv_pages,
            shape.kv_heads,
            shape.head_dim,
        );
        Ok(Self {
            kv: kv.touched(&device),
            rope: table(&shape.rope),
            rope_local: shape.rope_local.as_ref().map(table),
            buffers: Buffers::new(&weights, options),
            rows_max: options.rows_max,
            logit_rows_max: options.logit_rows_max,
            device,
            weights,
        })
    }

    pub fn shape(&self) -> &ModelShape {
        &self.weights.shape
    }

    /// Bytes of one KV page over all layers.
    pub fn page_bytes(shape: &ModelShape, dtype: KvDtype) -> usize {
        KvCache::page_bytes(dtype, shape.layers, shape.kv_heads, shape.head_dim)
    }

    /// Bytes of step buffers and rope tables, for the start-up ledger; the KV pages are not in it.
    pub fn buffer_bytes(shape: &ModelShape, o: &ModelOptions) -> usize {
        let tables = 1 + usize::from(shape.rope_local.is_some());
        Buffers::bytes(shape, o) + tables * o.context * shape.head_dim * size_of::<f32>()
    }

    /// One step: writes K and V of every row to its page, returns logits `[S', V]` f32 of
    /// `batch.logit_rows`. Allocates nothing. A batch that breaks its own rules (too many rows, an
    /// empty slot) is our bug and panics.
    pub fn forward(&mut self, batch: &Batch, bank: &Bank) -> &mut [f32] {
        assert!(batch.tokens.len() <= self.rows_max, "too many rows");
        assert!(batch.logit_rows.len() <= self.logit_rows_max, "too many logit rows");
        let step = Step {
            batch,
            bank,
            weights: &self.weights,
            device: &self.device,
            rope: &self.rope,
            rope_local: self.rope_local.as_ref(),
        };
        step.run(&mut self.buffers, &mut self.kv)
    }

    pub fn device(&self) -> &Device {
        &self.device
    }
}
