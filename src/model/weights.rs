//! The base model's weights, packed for the kernels, read-only after load.

use super::checkpoint::Checkpoint;
use crate::adapters::{BaseBias, BaseRows, Digest};
use crate::error::Result;
use crate::shape::{ModelShape, Site};
use polylora_kernels::Dtype;
use std::sync::Arc;

/// Immutable; shared by the engine thread and by adapter loaders (DoRA norms).
pub struct Weights {
    pub shape: ModelShape,
    pub dtype: Dtype,
    pub digest: Digest,
}

impl Weights {
    /// Reads and packs every tensor. `dtype` None: bf16 unless the checkpoint stores f32.
    /// `progress` is told (done, total) bytes.
    pub fn load(
        _c: &Checkpoint,
        _dtype: Option<Dtype>,
        _progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        unimplemented!()
    }
    pub fn bytes(&self) -> usize {
        unimplemented!()
    }
    pub fn read_row(&self, _site: Site, _row: usize, _out: &mut [f32]) {
        unimplemented!()
    }
    pub fn bias(&self, _site: Site) -> Option<&[f32]> {
        unimplemented!()
    }
    pub fn base_rows(self: &Arc<Self>) -> BaseRows {
        let w = self.clone();
        Arc::new(move |site, row, out| w.read_row(site, row, out))
    }
    pub fn base_bias(self: &Arc<Self>) -> BaseBias {
        let w = self.clone();
        Arc::new(move |site| w.bias(site).map(<[f32]>::to_vec))
    }
}
