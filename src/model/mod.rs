//! The decoder: one forward pass over ragged rows for the whole family, by the fields of
//! `ModelShape`.
//!
//! Owns weights, step buffers and the KV cache. Never samples, schedules or knows names; rows come
//! from a `Batch`, adapters from the `Bank`. The thing to know: weights are shared read-only
//! (`Arc<Weights>`), everything else is the engine thread's.

mod batch;
mod decoder;
mod forward;
mod rope;
pub mod weights;

use crate::adapters::bank::Bank;
use crate::error::{Error, Kind, Result};
use crate::shape::ModelShape;
pub use batch::{Batch, ModelOptions};
pub use decoder::Decoder;
use forward::{Buffers, Step};
use polylora_kernels::{Device, KvCache, KvDtype};
pub use rope::RopeTables;
use std::sync::Arc;
use weights::Weights;

pub struct Model {
    pub weights: Arc<Weights>,
    device: Device,
    kv: KvCache,
    rope: RopeTables,
    buffers: Buffers,
    rows_max: usize,
    logit_rows_max: usize,
}

impl Model {
    /// Takes every buffer a step needs. Errors: `context_too_long` when `options.context` is beyond
    /// what the model was made for; `internal_error` on a device that lacks an operation.
    pub fn new(weights: Arc<Weights>, device: Device, options: &ModelOptions) -> Result<Self> {
        let shape = &weights.shape;
        if options.context > shape.context {
            let message = format!(
                "a context of {} tokens was asked for; the model has {}",
                options.context, shape.context
            );
            return Err(Error::new(Kind::Invalid, "context_too_long", message));
        }
        let memory = device.memory();
        let kv = KvCache::new(
            memory,
            options.kv_dtype,
            shape.layers,
            options.kv_pages,
            shape.kv_heads,
            shape.head_dim,
        )?;
        Ok(Self {
            kv: kv.touched(&device),
            rope: RopeTables::new(memory, shape, options.context)?,
            buffers: Buffers::new(memory, &weights, options)?,
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
        Buffers::bytes(shape, o) + RopeTables::bytes(shape, o.context)
    }

    /// One step: writes K and V of every row to its page, returns logits `[S', V]` f32 of
    /// `batch.logit_rows`. Allocates nothing. Errors: `internal_error` when the device failed in an
    /// operation. A batch that breaks its own rules (too many rows, an empty slot) is our bug and
    /// panics.
    pub fn forward(&mut self, batch: &Batch, bank: &Bank) -> Result<&mut [f32]> {
        assert!(batch.tokens.len() <= self.rows_max, "too many rows");
        assert!(batch.logit_rows.len() <= self.logit_rows_max, "too many logit rows");
        let step = Step {
            batch,
            residents: bank.residents(),
            decoder: Decoder { weights: &self.weights, rope: &self.rope },
            device: &self.device,
        };
        Ok(step.run(&mut self.buffers, &mut self.kv)?)
    }

    pub fn device(&self) -> &Device {
        &self.device
    }
}
