//! Driving a model in tests: sequences in steps, logits out; golden files in.
//!
//! Never knows an expected result.

use polylora::adapters::bank::Bank;
use polylora::checkpoint::Checkpoint;
use polylora::model::weights::Weights;
use polylora::model::{Batch, Model, ModelOptions};
use polylora_kernels::{Device, Dtype, KvCache};
use serde_json::Value;
use std::sync::Arc;

/// Rows of one sequence in a step.
pub struct Part<'a> {
    pub tokens: &'a [u32],
    pub position: usize,
    /// Pages of the whole sequence so far.
    pub pages: &'a [u32],
}

/// A model with room for `tokens` tokens in 32 pages.
pub fn model(checkpoint: &Checkpoint, dtype: Dtype, tokens: usize) -> Model {
    let weights = Weights::load(checkpoint, Some(dtype.into()), &Device::cpu(2), &|_, _| ())
        .expect("weights load");
    let options = ModelOptions {
        threads: 2,
        rows_max: tokens,
        logit_rows_max: tokens,
        kv_pages: 32,
        kv_dtype: dtype.into(),
        context: tokens.max(64),
    };
    let device = Device::cpu(options.threads);
    Model::new(Arc::new(weights), device, &options).expect("a model")
}

/// Logits of every row of every part, in order: `[rows][V]`.
pub fn step(model: &mut Model, parts: &[Part]) -> Vec<Vec<f32>> {
    let mut batch = Batch {
        page_indptr: vec![0],
        segment_indptr: vec![0],
        logit_indptr: vec![0],
        ..Batch::default()
    };
    for (s, part) in parts.iter().enumerate() {
        for (i, token) in part.tokens.iter().enumerate() {
            batch.logit_rows.push(batch.tokens.len() as u32);
            batch.tokens.push(*token);
            batch.positions.push((part.position + i) as u32);
            batch.sequences.push(s as u32);
        }
        batch.pages.extend(part.pages);
        batch.page_indptr.push(batch.pages.len() as u32);
    }
    let vocab = model.shape().vocab;
    let logits = model.forward(&batch, &Bank::new(1)).expect("a step");
    logits.chunks(vocab).map(<[f32]>::to_vec).collect()
}

/// One sequence from its first token, in one step.
pub fn prefill(model: &mut Model, tokens: &[u32]) -> Vec<Vec<f32>> {
    let pages: Vec<u32> = (0..tokens.len().div_ceil(KvCache::PAGE) as u32).collect();
    step(model, &[Part { tokens, position: 0, pages: &pages }])
}

pub fn tiny_checkpoint(case: &Value, storage: crate::tiny::Storage, shards: usize) -> Checkpoint {
    let dir = tempfile::tempdir().expect("a temporary directory");
    crate::tiny::write(dir.path(), case, storage, shards);
    // Kept: tensors are read from the files when they are asked for.
    Checkpoint::open(&dir.keep()).expect("a tiny model opens")
}

pub fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("token ids")
}

pub fn difference_max(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |m, d| if d.is_nan() { f32::INFINITY } else { m.max(d) })
}
