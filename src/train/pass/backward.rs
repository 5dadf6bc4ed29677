//! The backward half, op by op in the opposite order: from what the forward half kept to the
//! gradients of factors.
//!
//! Owns the order of what an op does. Never changes a factor. The thing to know: norms and gates
//! are computed again from what they read, with the bits they had, instead of being kept.

use super::buffers::{Buffers, Kept};
use super::ops::{Below, Ops, Trained, site};
use super::stage::Stage;
use crate::shape::{Norm, Projection};
use crate::train::adapter::Adapter;
use polylora_kernels::{
    Accumulate, AttentionBackward, GluBackward, HeadNorm, NormBackward, Plane, ResidualBackward,
    add_norm_backward, attention_backward, glu_backward, rope_backward,
};

impl Ops<'_> {
    /// The gradient of one op of a layer. `wanted`: whether something below reads dx.
    pub fn backward(
        &self,
        b: &mut Buffers,
        (layer, stage): (usize, Stage),
        adapters: &mut [Adapter],
        wanted: bool,
    ) {
        match stage {
            Stage::Down => self.down_backward(b, layer, adapters, wanted),
            Stage::Glu => self.glu_backward(b, layer),
            Stage::Gate => self.gate_backward(b, layer, adapters, wanted),
            Stage::Up => self.up_backward(b, layer, adapters, wanted),
            Stage::MlpNorm => self.mlp_norm_backward(b, layer),
            Stage::O => self.o_backward(b, layer, adapters, wanted),
            Stage::Attention => self.attention_backward(b, layer),
            Stage::Rope => self.rope_backward(b, layer),
            Stage::Qkv => self.qkv_backward(b, layer, adapters, wanted),
            Stage::Norm => self.norm_backward(b, layer),
        }
    }

    /// dy of what the last layer's MLP made; the head has added its part of dh already.
    pub fn last_norm_backward(&self, b: &mut Buffers) {
        let Buffers { layers, dh, dy, .. } = b;
        let last = self.shape().layers - 1;
        let made = layers[self.place(last)].made.as_ref().map(|[_, mlp]| mlp);
        let residual =
            ResidualBackward { post: self.post(made, self.shape().norm_after_mlp(last)), dy };
        add_norm_backward(self.dev, None, self.rows(), dh, Some(residual));
    }

    /// A post-norm, and what it read.
    fn post<'y>(
        &'y self,
        made: Option<&'y Plane>,
        norm: Option<Norm>,
    ) -> Option<(&'y Plane, &'y polylora_kernels::Vector, f32)> {
        let weights = self.decoder.weights;
        made.zip(norm).map(|(y, norm)| (y, weights.norm(norm), self.shape().norm_eps))
    }

    /// A norm that read `x` and whose output has the gradient `dy`.
    fn norm_of<'y>(&'y self, norm: Norm, x: &'y Plane, dy: &'y Plane) -> NormBackward<'y> {
        let weight = self.decoder.weights.norm(norm);
        NormBackward { x, weight, eps: self.shape().norm_eps, dy }
    }

    fn down_backward(&self, b: &mut Buffers, layer: usize, to: &mut [Adapter], wanted: bool) {
        self.glu(b, layer);
        let Buffers { layers, dy, gated, d_gated, u, v_rank, .. } = b;
        let [.., z] = &layers[self.place(layer)].z;
        let down = Trained { site: site(layer, Projection::Down), dy, z: z.as_ref() };
        self.sites_backward(to, [down], gated, (d_gated, below(wanted)), [u, v_rank]);
    }

    fn glu_backward(&self, b: &mut Buffers, layer: usize) {
        let kept = &b.layers[self.place(layer)];
        let gate = self.decoder.gate();
        let of = GluBackward { gate, g: &kept.gate, u: &kept.up, da: &b.d_gated };
        glu_backward(self.dev, of, self.rows(), &mut b.d_gate, &mut b.d_up);
    }

    /// Makes the norm's x again.
    fn gate_backward(&self, b: &mut Buffers, layer: usize, to: &mut [Adapter], wanted: bool) {
        let Buffers { layers, x, d_gate, dx, u, v_rank, .. } = b;
        let Kept { h_mlp, z: [_, _, _, _, z, ..], .. } = &mut layers[self.place(layer)];
        self.add_norm(h_mlp, None, self.shape().norm_before_mlp(layer), x);
        let gate = Trained { site: site(layer, Projection::Gate), dy: d_gate, z: z.as_ref() };
        self.sites_backward(to, [gate], x, (dx, below(wanted)), [u, v_rank]);
    }

    /// Reads the x that the gate's backward made, and adds to its dx.
    fn up_backward(&self, b: &mut Buffers, layer: usize, to: &mut [Adapter], wanted: bool) {
        let Buffers { layers, x, d_up, dx, u, v_rank, .. } = b;
        let [_, _, _, _, _, z, _] = &layers[self.place(layer)].z;
        let up = Trained { site: site(layer, Projection::Up), dy: d_up, z: z.as_ref() };
        let below = if wanted { Below::Read(Accumulate::Add) } else { Below::Unread };
        self.sites_backward(to, [up], x, (dx, below), [u, v_rank]);
    }

    fn mlp_norm_backward(&self, b: &mut Buffers, layer: usize) {
        let Buffers { layers, dx, dh, dy, .. } = b;
        let kept = &layers[self.place(layer)];
        let norm = self.norm_of(self.shape().norm_before_mlp(layer), &kept.h_mlp, dx);
        let made = kept.made.as_ref().map(|[attention, _]| attention);
        let post = self.post(made, self.shape().norm_after_attention(layer));
        let residual = Some(ResidualBackward { post, dy });
        add_norm_backward(self.dev, Some(norm), self.rows(), dh, residual);
    }

    fn o_backward(&self, b: &mut Buffers, layer: usize, to: &mut [Adapter], wanted: bool) {
        let Buffers { layers, dy, d_found, u, v_rank, .. } = b;
        let Kept { found, z: [_, _, _, z, ..], .. } = &layers[self.place(layer)];
        let o = Trained { site: site(layer, Projection::O), dy, z: z.as_ref() };
        self.sites_backward(to, [o], found, (d_found, below(wanted)), [u, v_rank]);
    }

    fn attention_backward(&self, b: &mut Buffers, layer: usize) {
        let (shape, place) = (self.shape(), self.place(layer));
        let kept = &b.layers[place];
        let of = AttentionBackward {
            q: &kept.q,
            heads: shape.heads,
            kv: &b.kv,
            layer: place,
            rows: self.batch.page_rows(),
            scale: shape.attention_scale,
            window: shape.windows[layer],
            out: &kept.found,
            lse: &kept.lse,
            d_out: &b.d_found,
        };
        let [dq, dk] = &mut b.d_rotated;
        attention_backward(self.dev, of, dq, dk, &mut b.dv, &mut b.attention);
    }

    fn rope_backward(&self, b: &mut Buffers, layer: usize) {
        let (shape, positions) = (self.shape(), self.batch.page_rows().positions);
        let (table, unnormed) =
            (self.decoder.rope_table(layer), &b.layers[self.place(layer)].unnormed);
        let norm = |which: usize, norm: Norm| {
            let weight = self.decoder.weights.norm(norm);
            let x = unnormed.as_ref().map(|both| &both[which]);
            x.map(|x| HeadNorm { x, weight, eps: shape.norm_eps })
        };
        let [dq, dk] = &mut b.d_rotated;
        let (q, k) = (norm(0, Norm::Query(layer)), norm(1, Norm::Key(layer)));
        rope_backward(self.dev, dq, shape.heads, positions, table, q, &mut b.dq);
        rope_backward(self.dev, dk, shape.kv_heads, positions, table, k, &mut b.dk);
    }

    fn qkv_backward(&self, b: &mut Buffers, layer: usize, to: &mut [Adapter], wanted: bool) {
        let Buffers { layers, x, dq, dk, dv, dx, u, v_rank, .. } = b;
        let Kept { h, z: [z_q, z_k, z_v, ..], .. } = &mut layers[self.place(layer)];
        self.add_norm(h, None, Norm::Input(layer), x);
        let sites = [
            Trained { site: site(layer, Projection::Q), dy: dq, z: z_q.as_ref() },
            Trained { site: site(layer, Projection::K), dy: dk, z: z_k.as_ref() },
            Trained { site: site(layer, Projection::V), dy: dv, z: z_v.as_ref() },
        ];
        self.sites_backward(to, sites, x, (dx, below(wanted)), [u, v_rank]);
    }

    /// dh of the norm before attention, and dy of what the layer below made.
    fn norm_backward(&self, b: &mut Buffers, layer: usize) {
        let Buffers { layers, dx, dh, dy, .. } = b;
        let norm = self.norm_of(Norm::Input(layer), &layers[self.place(layer)].h, dx);
        let residual = layer.checked_sub(1).map(|below| {
            let made = layers[self.place(below)].made.as_ref().map(|[_, mlp]| mlp);
            ResidualBackward { post: self.post(made, self.shape().norm_after_mlp(below)), dy }
        });
        add_norm_backward(self.dev, Some(norm), self.rows(), dh, residual);
    }
}

/// dx is written, where it is wanted.
fn below(wanted: bool) -> Below {
    if wanted { Below::Read(Accumulate::Overwrite) } else { Below::Unread }
}
