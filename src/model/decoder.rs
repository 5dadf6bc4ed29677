//! What the ops of a decoder layer read of the base model, family by family.
//!
//! Owns the choice of weights, norms, rope tables and gates. Never runs an op. The thing to know:
//! serving and training take their operands from here, so both are the same model.

use super::rope::RopeTables;
use super::weights::Weights;
use crate::shape::{Activation, ModelShape, Norm, Site};
use polylora_kernels::{Gate, Linear, NormWeight, Plane, RopeStore, RopeTable};

/// See the file's head.
#[derive(Clone, Copy)]
pub struct Decoder<'a> {
    pub weights: &'a Weights,
    pub rope: &'a RopeTables,
}

impl<'a> Decoder<'a> {
    /// What the base looks like.
    pub fn shape(&self) -> &'a ModelShape {
        &self.weights.shape
    }

    /// The base's weight of a norm, where no adapter brings its own. `[H]`, of q and k `[D]`
    pub fn norm(&self, norm: Norm) -> NormWeight<'a> {
        NormWeight { base: self.weights.norm(norm), norm: self.shape().norm_index(norm) }
    }

    /// y = x·Wᵀ + bias of a site. y `[T, O]`
    pub fn linear<'y>(&self, site: Site, y: &'y mut Plane) -> Linear<'y>
    where
        'a: 'y,
    {
        let (weight, bias) = (self.weights.site(site), self.weights.bias(site));
        Linear { weight, bias, site: self.shape().site_index(site), y }
    }

    /// The activation of the gate.
    pub fn gate(&self) -> Gate {
        match self.shape().activation {
            Activation::Silu => Gate::Silu,
            Activation::GeluTanh => Gate::GeluTanh,
        }
    }

    /// The table of a layer.
    pub fn rope_table(&self, layer: usize) -> &'a RopeTable {
        self.rope.of_layer(self.shape().windows[layer].is_some())
    }

    /// The norms of q and k and the rotation of a layer, which stores its k and v in `into` of the
    /// cache. q `[T, N·D]`, k and v `[T, K·D]`
    pub fn rotation<'y>(
        &self,
        layer: usize,
        [q, k]: [&'y mut Plane; 2],
        v: &'y Plane,
        into: usize,
    ) -> RopeStore<'y>
    where
        'a: 'y,
    {
        let shape = self.shape();
        RopeStore {
            q,
            k,
            v,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            q_norm: shape.qk_norm.then(|| self.norm(Norm::Query(layer))),
            k_norm: shape.qk_norm.then(|| self.norm(Norm::Key(layer))),
            eps: shape.norm_eps,
            rope: self.rope_table(layer),
            layer: into,
        }
    }
}
